//! The text of a consortium file: made of cards, changed, signed. People comment it, so that every
//! change leaves all else as it is; what was written is read again before it is taken.

use anyhow::{Context, Result, bail};
use toml_edit::{Array, ArrayOfTables, DocumentMut, Item, Table, value};
use trefoil_consortium::card::check_title;
use trefoil_consortium::signature::{Part, SignatureLine, Signatures};
use trefoil_consortium::{Card, CardRole, ConsortiumFile, Core, Member, MemberEntry, MemberRole};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::Pin;

const HEAD: &str = "\
# Who takes part, and by which public key each is known (SHA-256 of the certificate's
# SubjectPublicKeyInfo). Every institution compares the pin of its own entry with its card. The four
# nodes sign the core, the three parties the members: trefoil consortium sign, show.

# Of the list of members below; raised with each change of it, never lowered.
";
const CORE_HEAD: &str = "
# What makes a consortium what it is: its hash, without the addresses, is in every session.
";

/// A file and its text.
pub(super) type Edited = (ConsortiumFile, String);

pub(super) fn check(file: &ConsortiumFile) -> Result<()> {
    file.check()
        .map_err(|(field, detail)| anyhow::anyhow!("{field}: {detail}"))
}

fn node(card: &Card) -> Result<Member> {
    let address = card.address.clone();
    Ok(Member {
        name: card.id.clone(),
        pin: card.pin,
        address: address.with_context(|| format!("the card of {} has no address", card.id))?,
    })
}

fn member(card: &Card) -> Result<MemberEntry> {
    let role = match card.role {
        CardRole::Hospital => MemberRole::Hospital,
        CardRole::Analyst => MemberRole::Analyst,
        role => bail!(
            "{} is a {role}: other parties or another dealer make another consortium \
             (trefoil consortium create; a new key of the same: trefoil consortium rotate)",
            card.id
        ),
    };
    Ok(MemberEntry::new(&card.id, role, card.pin))
}

/// A new file that nobody has signed.
pub(super) fn create(name: &str, ring_bits: u8, cards: &[Card]) -> Result<Edited> {
    let name = check_title(name).map_err(|err| anyhow::anyhow!("--name: {err}"))?;
    let of = |role| -> Vec<&Card> { cards.iter().filter(|card| card.role == role).collect() };
    let (parties, dealers) = (of(CardRole::Party), of(CardRole::Dealer));
    let (&[p0, p1, p2], &[dealer]) = (parties.as_slice(), dealers.as_slice()) else {
        bail!(
            "a consortium has three parties and one dealer; the cards give {} and {}",
            parties.len(),
            dealers.len()
        );
    };
    let members = cards.iter().filter(|card| !card.role.listens());
    let core = Core {
        name: name.clone(),
        ring_bits,
        parties: [node(p0)?, node(p1)?, node(p2)?],
        dealer: node(dealer)?,
    };
    let file = ConsortiumFile::new(core, Vec::new());
    let mut text = format!("{HEAD}members_number = 1\n{CORE_HEAD}");
    text += &format!("[core]\nname = {name:?}\nring_bits = {ring_bits}\n");
    for (party, card) in PartyId::ALL.into_iter().zip([p0, p1, p2]) {
        text += &format!("\n# {party}: {}\n[[core.parties]]\n", card.title);
        text += &node_lines(&node(card)?);
    }
    text += &format!(
        "\n# {}. WHOEVER RUNS THE DEALER MUST NOT COLLUDE WITH ANY PARTY.\n[core.dealer]\n",
        dealer.title
    );
    text += &node_lines(&node(dealer)?);
    let (mut file, text) = with_members(&file, &text, members)?;
    let mut doc = parse(&text)?;
    file.members_number = 1;
    doc["members_number"] = value(1);
    verified(doc, file)
}

/// Names, pins and addresses have no character that TOML would escape.
fn node_lines(node: &Member) -> String {
    let Member { name, pin, address } = node;
    format!("name = \"{name}\"\npin = \"{pin}\"\naddress = \"{address}\"\n")
}

fn parse(text: &str) -> Result<DocumentMut> {
    text.parse().context("the consortium file")
}

/// The document's text, if it says what it should; else the plain form without comments, which does.
fn verified(doc: DocumentMut, file: ConsortiumFile) -> Result<Edited> {
    check(&file)?;
    let says = |text: &str| toml::from_str::<ConsortiumFile>(text).is_ok_and(|read| read == file);
    for text in [doc.to_string(), file.to_toml()] {
        if says(&text) {
            return Ok((file, text));
        }
    }
    bail!("the file's new content would not be what was asked for; nothing is written")
}

/// Raises the number of the members and takes their signatures out, which are under the old list.
fn members_changed(doc: &mut DocumentMut, file: &mut ConsortiumFile) {
    file.members_number += 1;
    set_number(doc, file);
    file.signatures.members.clear();
    set_signatures(doc, &file.signatures);
}

fn set_number(doc: &mut DocumentMut, file: &ConsortiumFile) {
    // Through the value, so that a comment beside the number stays.
    let number = i64::try_from(file.members_number).unwrap_or(i64::MAX);
    match doc.get_mut("members_number").and_then(Item::as_value_mut) {
        Some(old) => {
            let decor = old.decor().clone();
            *old = number.into();
            *old.decor_mut() = decor;
        }
        None => doc["members_number"] = value(number),
    }
}

fn set_signatures(doc: &mut DocumentMut, signatures: &Signatures) {
    doc.remove("signatures");
    if signatures.is_empty() {
        return;
    }
    let mut table = Table::new();
    table.decor_mut().set_prefix("\n");
    for part in [Part::Core, Part::Members] {
        let lines = signatures.of(part);
        if lines.is_empty() {
            continue;
        }
        let mut array = Array::new();
        for line in lines {
            array.push(line.to_string());
        }
        let strings = array.iter_mut();
        strings.for_each(|line| line.decor_mut().set_prefix("\n  "));
        array.set_trailing("\n");
        array.set_trailing_comma(true);
        table.insert(&part.to_string(), value(array));
    }
    doc.insert("signatures", Item::Table(table));
}

fn member_tables(doc: &mut DocumentMut) -> Option<&mut ArrayOfTables> {
    let empty = |item: &Item| item.as_array().is_some_and(Array::is_empty);
    if doc.get("members").is_none_or(empty) {
        doc.insert("members", Item::ArrayOfTables(ArrayOfTables::new()));
    }
    doc.get_mut("members")?.as_array_of_tables_mut()
}

fn with_members<'a>(
    old: &ConsortiumFile,
    text: &str,
    cards: impl Iterator<Item = &'a Card>,
) -> Result<Edited> {
    let (mut new, mut doc) = (old.clone(), parse(text)?);
    for card in cards {
        let entry = member(card)?;
        if let Some(tables) = member_tables(&mut doc) {
            let mut table = Table::new();
            table
                .decor_mut()
                .set_prefix(format!("\n# {}\n", card.title));
            table.insert("name", value(&entry.name));
            table.insert("role", value(entry.role.to_string()));
            table.insert("pin", value(entry.pin.to_string()));
            tables.push(table);
        }
        new.members.push(entry);
    }
    members_changed(&mut doc, &mut new);
    verified(doc, new)
}

/// Adds hospitals and analysts.
pub(super) fn add(old: &ConsortiumFile, text: &str, cards: &[Card]) -> Result<Edited> {
    with_members(old, text, cards.iter())
}

/// Which member is called `name`.
fn position(file: &ConsortiumFile, name: &str) -> Result<usize> {
    let at = file.members.iter().position(|member| member.name == name);
    at.with_context(|| {
        let known: Vec<&str> = file.members.iter().map(|m| m.name.as_str()).collect();
        match is_node(file, name) {
            true => format!(
                "{name} is a party or the dealer: without it this is another consortium \
                 (trefoil consortium create)"
            ),
            false => format!(
                "no member is called {name}; there are: {}",
                known.join(", ")
            ),
        }
    })
}

fn is_node(file: &ConsortiumFile, name: &str) -> bool {
    let nodes = Part::Core.signers().iter();
    nodes.map(|peer| file.node(*peer)).any(|n| n.name == name)
}

/// Takes a hospital or analyst out.
pub(super) fn remove(old: &ConsortiumFile, text: &str, name: &str) -> Result<Edited> {
    let at = position(old, name)?;
    let (mut new, mut doc) = (old.clone(), parse(text)?);
    new.members.remove(at);
    if let Some(tables) = member_tables(&mut doc)
        && at < tables.len()
    {
        tables.remove(at);
    }
    members_changed(&mut doc, &mut new);
    verified(doc, new)
}

/// Accepts the key of a new card beside the one of before, for the same member.
pub(super) fn rotate(old: &ConsortiumFile, text: &str, card: &Card) -> Result<Edited> {
    if card.role.listens() {
        return rotate_node(old, text, card);
    }
    let at = position(old, &card.id)?;
    let before = &old.members[at];
    if before.role != member(card)?.role {
        bail!(
            "{} is {} in the file and {} on the card; remove it and add the card",
            card.id,
            before.role,
            card.role
        );
    }
    let &[current] = before.accepted() else {
        bail!(
            "{}: a key is being rotated already; finish that first (--finish {})",
            card.id,
            card.id
        );
    };
    set_keys(old, text, at, vec![current, card.pin])
}

/// Refuses the key of before, for the member called `name`.
pub(super) fn finish(old: &ConsortiumFile, text: &str, name: &str) -> Result<Edited> {
    let at = position(old, name)?;
    let &[_, new] = old.members[at].accepted() else {
        bail!("{name}: no key is being rotated");
    };
    set_keys(old, text, at, vec![new])
}

fn set_keys(old: &ConsortiumFile, text: &str, at: usize, keys: Vec<Pin>) -> Result<Edited> {
    let (mut new, mut doc) = (old.clone(), parse(text)?);
    if let Some(table) = member_tables(&mut doc).and_then(|tables| tables.get_mut(at)) {
        let array: Array = keys.iter().map(Pin::to_string).collect();
        table.insert("keys", value(array));
    }
    new.members[at].keys = keys;
    members_changed(&mut doc, &mut new);
    verified(doc, new)
}

/// A new key of a party or the dealer: another core, with the same members.
fn rotate_node(old: &ConsortiumFile, text: &str, card: &Card) -> Result<Edited> {
    let place = Part::Core.signers().iter().copied();
    let place = place
        .filter(|peer| old.node(*peer).name == card.id)
        .find(|peer| (*peer == Peer::Dealer) == (card.role == CardRole::Dealer));
    let Some(place) = place else {
        bail!("no {} is called {} in the file", card.role, card.id);
    };
    let (mut new, mut doc) = (old.clone(), parse(text)?);
    let entry = node(card)?;
    if entry.pin == old.node(place).pin {
        bail!("{} has this key already", card.id);
    }
    let core = doc.get_mut("core").and_then(Item::as_table_like_mut);
    let table = core.and_then(|core| match place {
        Peer::Dealer => core.get_mut("dealer")?.as_table_like_mut(),
        Peer::Party(party) => core
            .get_mut("parties")?
            .as_array_of_tables_mut()?
            .get_mut(party.index())
            .map(|table| table as &mut dyn toml_edit::TableLike),
    });
    if let Some(table) = table {
        table.insert("pin", value(entry.pin.to_string()));
        table.insert("address", value(&entry.address));
    }
    match place {
        Peer::Dealer => new.core.dealer = entry,
        Peer::Party(party) => new.core.parties[party.index()] = entry,
    }
    new.signatures = Signatures::default();
    members_changed(&mut doc, &mut new);
    verified(doc, new)
}

/// Puts signatures in, each checked; one of the same node is replaced.
pub(super) fn sign(old: &ConsortiumFile, text: &str, lines: &[SignatureLine]) -> Result<Edited> {
    let (mut new, mut doc) = (old.clone(), parse(text)?);
    for line in lines {
        old.verify_line(line)?;
        let held = new.signatures.of_mut(line.of);
        held.retain(|other| other.by != line.by);
        held.push(line.clone());
    }
    set_signatures(&mut doc, &new.signatures);
    verified(doc, new)
}

/// The file without signatures that do not hold, and what was wrong with each.
pub(super) fn pruned(old: &ConsortiumFile) -> (ConsortiumFile, Vec<String>) {
    let (mut new, mut faults) = (old.clone(), Vec::new());
    for part in [Part::Core, Part::Members] {
        new.signatures.of_mut(part).retain(|line| {
            let fault = old.verify_line(line).err();
            faults.extend(fault.iter().map(ToString::to_string));
            fault.is_none()
        });
    }
    (new, faults)
}

#[cfg(test)]
mod tests {
    use super::*;
    use trefoil_consortium::identity::{self, Signer};

    fn card(role: CardRole, id: &str, byte: u8) -> Card {
        Card {
            role,
            id: id.into(),
            title: id.to_uppercase(),
            pin: Pin::from_bytes([byte; 32]),
            address: role.listens().then(|| format!("{id}.example.org:7100")),
        }
    }

    fn cards() -> Vec<Card> {
        vec![
            card(CardRole::Hospital, "anna", 9),
            card(CardRole::Party, "north", 0),
            card(CardRole::Dealer, "notary", 3),
            card(CardRole::Party, "west", 1),
            card(CardRole::Analyst, "office", 8),
            card(CardRole::Party, "east", 2),
        ]
    }

    #[test]
    fn a_file_is_made_of_cards_with_the_parties_in_their_order() {
        let (file, text) = create("Lung study 1", 64, &cards()).unwrap();
        assert_eq!(toml::from_str::<ConsortiumFile>(&text).unwrap(), file);
        let names = file
            .core
            .parties
            .each_ref()
            .map(|party| party.name.as_str());
        assert_eq!(names, ["north", "west", "east"]);
        assert_eq!((file.members.len(), file.members_number), (2, 1));
        assert!(text.contains("# ANNA\n[[members]]"), "{text}");

        let without = |at: usize| {
            let mut cards = cards();
            cards.remove(at);
            create("x", 64, &cards).unwrap_err().to_string()
        };
        assert!(without(1).contains("the cards give 2 and 1"));
        assert!(without(2).contains("the cards give 3 and 0"));
        let mut twice = cards();
        twice.push(card(CardRole::Hospital, "other", 9));
        let err = create("x", 64, &twice).unwrap_err().to_string();
        assert!(err.contains("members[2].pin"), "{err}");
        assert!(
            create("x", 32, &cards())
                .unwrap_err()
                .to_string()
                .contains("ring_bits")
        );
    }

    #[test]
    fn members_come_and_go_and_everything_else_stays_as_it_was_written() {
        let (file, text) = create("study", 64, &cards()).unwrap();
        let text = text.replace("# ANNA", "# Anna's key was compared by phone");
        let text = text.replace("members_number = 1", "members_number = 1 # see the minutes");
        let new = [card(CardRole::Hospital, "berta", 10)];
        let (more, longer) = add(&file, &text, &new).unwrap();
        assert_eq!(
            (more.members[2].name.as_str(), more.members_number),
            ("berta", 2)
        );
        let same = text.replace("members_number = 1", "members_number = 2");
        assert!(longer.starts_with(&same), "{longer}");
        assert_eq!(more.core_hash(), file.core_hash());

        let (_, back) = remove(&more, &longer, "berta").unwrap();
        assert_eq!(
            back,
            same.replace("members_number = 2", "members_number = 3")
        );
        let (read, fewer) = remove(&more, &longer, "anna").unwrap();
        let names: Vec<&str> = read.members.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, ["office", "berta"]);
        assert!(
            !fewer.contains("Anna") && fewer.contains("# OFFICE"),
            "{fewer}"
        );

        let err = add(&file, &text, &[card(CardRole::Party, "south", 7)]).unwrap_err();
        assert!(err.to_string().contains("another consortium"), "{err}");
        let err = add(&file, &text, &[card(CardRole::Hospital, "anna", 7)]).unwrap_err();
        assert!(err.to_string().contains("used twice"), "{err}");
        let err = remove(&file, &text, "north").unwrap_err().to_string();
        assert!(err.contains("another consortium"), "{err}");
        let err = remove(&file, &text, "nobody").unwrap_err().to_string();
        assert!(err.contains("anna, office"), "{err}");
    }

    #[test]
    fn a_file_in_the_plain_form_is_changed_too() {
        let (mut file, _) = create("study", 48, &cards()).unwrap();
        file.members.clear();
        let text = file.to_toml();
        let (more, longer) = add(&file, &text, &[card(CardRole::Analyst, "office", 8)]).unwrap();
        assert_eq!(toml::from_str::<ConsortiumFile>(&longer).unwrap(), more);
        let (fewer, text) = remove(&more, &longer, "office").unwrap();
        assert_eq!(toml::from_str::<ConsortiumFile>(&text).unwrap(), fewer);
        assert_eq!((fewer.members.len(), fewer.members_number), (0, 3));
    }

    #[test]
    fn a_key_is_rotated_in_two_steps_and_the_member_stays_the_same() {
        let (file, text) = create("study", 64, &cards()).unwrap();
        let pin = |byte| Pin::from_bytes([byte; 32]);
        let (both, text) = rotate(&file, &text, &card(CardRole::Hospital, "anna", 20)).unwrap();
        assert_eq!(both.members[0].accepted(), [pin(9), pin(20)]);
        let again = rotate(&both, &text, &card(CardRole::Hospital, "anna", 21)).unwrap_err();
        assert!(again.to_string().contains("finish that first"), "{again}");
        let (one, text) = finish(&both, &text, "anna").unwrap();
        assert_eq!(
            (one.members[0].pin, one.members[0].accepted()),
            (pin(9), &[pin(20)][..])
        );
        assert_eq!(one.members_number, 3);
        assert!(text.contains("# ANNA"), "{text}");
        let err = finish(&one, &text, "anna").unwrap_err().to_string();
        assert!(err.contains("no key is being rotated"), "{err}");
        let err = rotate(&one, &text, &card(CardRole::Analyst, "anna", 22)).unwrap_err();
        assert!(err.to_string().contains("analyst on the card"), "{err}");
        // Once more, from the second key to a third.
        let (both, _) = rotate(&one, &text, &card(CardRole::Hospital, "anna", 23)).unwrap();
        assert_eq!(both.members[0].accepted(), [pin(20), pin(23)]);
    }

    #[test]
    fn a_new_key_of_a_node_is_another_core_with_the_same_members() {
        let (file, text) = create("study", 64, &cards()).unwrap();
        for (role, id) in [(CardRole::Party, "west"), (CardRole::Dealer, "notary")] {
            let (new, changed) = rotate(&file, &text, &card(role, id, 40)).unwrap();
            assert_ne!(new.core_hash(), file.core_hash());
            assert_eq!(new.members, file.members);
            assert!(
                changed.contains("# ANNA") && changed.contains("# P1: WEST"),
                "{changed}"
            );
        }
        let err = rotate(&file, &text, &card(CardRole::Dealer, "west", 40)).unwrap_err();
        assert!(
            err.to_string().contains("no dealer is called west"),
            "{err}"
        );
    }

    #[test]
    fn signatures_are_put_in_checked_and_taken_out_by_a_change() {
        let made = ["north", "west", "east", "notary"].map(|id| identity::generate(id).unwrap());
        let mut cards = cards();
        for card in cards.iter_mut().filter(|card| card.role.listens()) {
            let at = ["north", "west", "east", "notary"]
                .iter()
                .position(|id| *id == card.id);
            card.pin = identity::pin(&made[at.unwrap()]).unwrap();
        }
        let (mut file, mut text) = create("study", 64, &cards).unwrap();
        for made in &made {
            let lines = file.clone().sign(&Signer::new(made).unwrap()).unwrap();
            (file, text) = sign(&file, &text, &lines).unwrap();
        }
        file.verify().unwrap();
        assert!(text.contains("# ANNA\n[[members]]"), "{text}");
        let again = sign(&file, &text, &file.signatures.core).unwrap();
        assert_eq!(again.0.signatures.core.len(), 4);

        let berta = card(CardRole::Hospital, "berta", 10);
        let (more, longer) = add(&file, &text, &[berta]).unwrap();
        assert_eq!(
            more.signatures.core, file.signatures.core,
            "the core is as it was"
        );
        assert_eq!(more.unsigned(Part::Members), ["north", "west", "east"]);
        let err = sign(&more, &longer, &file.signatures.members).unwrap_err();
        assert!(err.to_string().contains("under other content"), "{err}");
        assert!(
            longer.find("berta") < longer.find("[signatures]"),
            "{longer}"
        );

        // A file that was changed by hand.
        let mut changed = file.clone();
        changed.members.clear();
        let (kept, faults) = pruned(&changed);
        assert_eq!((kept.signatures.members.len(), faults.len()), (0, 3));
        kept.verify_line(&kept.signatures.core[0]).unwrap();
    }
}
