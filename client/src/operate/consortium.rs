//! `trefoil consortium`: puts cards together into a consortium file, changes its members, shows it.
//!
//! The file is text that people comment: adding and removing leave everything else as it is. Whoever
//! keeps it hands it to all nodes and members; that it arrived as it was sent is seen by its core
//! hash, and by the pins that each institution compares with its own card.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use trefoil_consortium::card::check_title;
use trefoil_consortium::{
    Card, CardRole, ConsortiumFile, Core, Member, MemberEntry, MemberRole, hex,
};
use trefoil_protocol::party::{PartyId, Peer};

use super::{replace, write_new};

/// Longest file of cards that is read.
const CARDS_MAX_BYTES: u64 = 16 << 20;
const HEAD: &str = "\
# Who takes part, and by which public key each is known (SHA-256 of the certificate's
# SubjectPublicKeyInfo). Every institution compares the pin of its own entry with its card, and the
# core hash (trefoil consortium show) with the other institutions.

# What makes a consortium what it is: its hash, without the addresses, is in every session.
";

/// Arguments of `trefoil consortium`.
#[derive(Debug, Args)]
pub struct ConsortiumArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a consortium file from the cards of three parties, a dealer and any number of members.
    Create {
        /// The consortium's name.
        #[arg(long)]
        name: String,
        /// Ring bits: 64 or 48.
        #[arg(long, default_value_t = 64)]
        ring_bits: u8,
        /// The file to write; it must not exist.
        #[arg(long, value_name = "FILE", default_value = "consortium.toml")]
        out: PathBuf,
        /// Files with cards, or - for standard input. The three parties become P0, P1 and P2 in the
        /// order given.
        #[arg(required = true, value_name = "CARD")]
        cards: Vec<PathBuf>,
    },
    /// Add hospitals and analysts.
    Add {
        /// The consortium file.
        file: PathBuf,
        /// Files with cards, or - for standard input.
        #[arg(required = true, value_name = "CARD")]
        cards: Vec<PathBuf>,
    },
    /// Remove a hospital or analyst.
    Remove {
        /// The consortium file.
        file: PathBuf,
        /// Its name in the file.
        name: String,
    },
    /// Show roles, names, pins and the core hash.
    Show {
        /// The consortium file.
        file: PathBuf,
    },
}

/// Runs the command.
pub fn consortium(args: &ConsortiumArgs) -> Result<()> {
    match &args.command {
        Command::Create {
            name,
            ring_bits,
            out,
            cards,
        } => {
            let (file, text) = create(name, *ring_bits, &read_cards(cards)?)?;
            write_new(out, text.as_bytes(), false)?;
            println!("{}", core_line(&file));
            eprintln!(
                "made {}: send it to all parties, the dealer and all members, and have each compare \
                 its own pin and the core hash (trefoil consortium show)",
                out.display()
            );
        }
        Command::Add { file, cards } => {
            let (old, text) = load(file)?;
            let (new, text) = add(&old, &text, &read_cards(cards)?)?;
            replace(file, text.as_bytes(), false)?;
            for entry in &new.members[old.members.len()..] {
                println!("added {} {}", role_name(entry.role), entry.name);
            }
            changed(file);
        }
        Command::Remove { file, name } => {
            let (old, text) = load(file)?;
            let text = remove(&old, &text, name)
                .with_context(|| format!("{}: nothing was changed", file.display()))?;
            replace(file, text.as_bytes(), false)?;
            println!("removed {name}");
            changed(file);
        }
        Command::Show { file } => show(&load(file)?.0),
    }
    Ok(())
}

fn changed(file: &Path) {
    eprintln!(
        "send {} to the three parties, the dealer and the members; a node reads it when it starts",
        file.display()
    );
}

fn load(path: &Path) -> Result<(ConsortiumFile, String)> {
    let file = ConsortiumFile::load(path)?;
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok((file, text))
}

fn read_cards(paths: &[PathBuf]) -> Result<Vec<Card>> {
    let mut cards = Vec::new();
    for path in paths {
        let stdin = path.as_os_str() == "-";
        let place = match stdin {
            true => "standard input".to_owned(),
            false => path.display().to_string(),
        };
        let mut text = String::new();
        let read = match stdin {
            true => std::io::stdin()
                .take(CARDS_MAX_BYTES)
                .read_to_string(&mut text),
            false => std::fs::File::open(path)
                .and_then(|file| file.take(CARDS_MAX_BYTES).read_to_string(&mut text)),
        };
        read.with_context(|| format!("cannot read {place}"))?;
        let found = Card::parse_all(&text).with_context(|| place.clone())?;
        if found.is_empty() {
            bail!("{place}: holds no card; a card is the line that `trefoil init` prints");
        }
        cards.extend(found);
    }
    Ok(cards)
}

fn check(file: &ConsortiumFile) -> Result<()> {
    file.check()
        .map_err(|(field, detail)| anyhow::anyhow!("{field}: {detail}"))
}

fn member(card: &Card) -> Result<MemberEntry> {
    let role = match card.role {
        CardRole::Hospital => MemberRole::Hospital,
        CardRole::Analyst => MemberRole::Analyst,
        role => bail!(
            "{} is a {role}: other parties or another dealer make another consortium \
             (trefoil consortium create)",
            card.id
        ),
    };
    Ok(MemberEntry {
        name: card.id.clone(),
        role,
        pin: card.pin,
    })
}

fn create(name: &str, ring_bits: u8, cards: &[Card]) -> Result<(ConsortiumFile, String)> {
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
    let listens = |card: &&Card| card.role.listens();
    let members: Vec<&Card> = cards.iter().filter(|card| !listens(card)).collect();
    let entries: Result<Vec<MemberEntry>> = members.iter().map(|card| member(card)).collect();
    let file = ConsortiumFile {
        core: Core {
            name: name.clone(),
            ring_bits,
            parties: [p0, p1, p2].map(Member::of),
            dealer: Member::of(dealer),
        },
        members: entries?,
    };
    check(&file)?;
    let mut text = format!("{HEAD}[core]\nname = {name:?}\nring_bits = {ring_bits}\n");
    for (party, card) in PartyId::ALL.into_iter().zip([p0, p1, p2]) {
        text += &format!("\n# {party}: {}\n[[core.parties]]\n", card.title);
        text += &Member::of(card).to_lines();
    }
    text += &format!(
        "\n# {}. WHOEVER RUNS THE DEALER MUST NOT COLLUDE WITH ANY PARTY.\n[core.dealer]\n",
        dealer.title
    );
    text += &Member::of(dealer).to_lines();
    for card in members {
        text += &member_lines(card)?;
    }
    verified(text, &file)
}

fn member_lines(card: &Card) -> Result<String> {
    let MemberEntry { name, role, pin } = member(card)?;
    let role = role_name(role);
    Ok(format!(
        "\n# {}\n[[members]]\nname = \"{name}\"\nrole = \"{role}\"\npin = \"{pin}\"\n",
        card.title
    ))
}

fn role_name(role: MemberRole) -> &'static str {
    match role {
        MemberRole::Hospital => "hospital",
        MemberRole::Analyst => "analyst",
    }
}

/// The text, if it says what it should; else the plain form without comments, which does.
fn verified(text: String, file: &ConsortiumFile) -> Result<(ConsortiumFile, String)> {
    let says = |text: &str| toml::from_str::<ConsortiumFile>(text).is_ok_and(|read| read == *file);
    if says(&text) {
        return Ok((file.clone(), text));
    }
    let plain = file.to_toml();
    match says(&plain) {
        true => Ok((file.clone(), plain)),
        false => {
            bail!("the file's new content would not be what was asked for; nothing is written")
        }
    }
}

fn add(old: &ConsortiumFile, text: &str, cards: &[Card]) -> Result<(ConsortiumFile, String)> {
    let mut new = old.clone();
    let mut text = format!("{}\n", text.trim_end());
    for card in cards {
        new.members.push(member(card)?);
        text += &member_lines(card)?;
    }
    check(&new)?;
    verified(text, &new)
}

fn remove(old: &ConsortiumFile, text: &str, name: &str) -> Result<String> {
    let mut new = old.clone();
    let at = old.members.iter().position(|member| member.name == name);
    let Some(at) = at else {
        let known: Vec<&str> = old.members.iter().map(|m| m.name.as_str()).collect();
        match old
            .core
            .parties
            .iter()
            .chain([&old.core.dealer])
            .any(|n| n.name == name)
        {
            true => bail!(
                "{name} is a party or the dealer: without it this is another consortium \
                 (trefoil consortium create)"
            ),
            false => bail!(
                "no member is called {name}; there are: {}",
                known.join(", ")
            ),
        }
    };
    new.members.remove(at);
    let lines: Vec<&str> = text.lines().collect();
    let headers = lines.iter().enumerate();
    let headers = headers.filter(|(_, line)| line.trim_start().starts_with('['));
    let headers: Vec<usize> = headers.map(|(at, _)| at).collect();
    let is_member = |at: &&usize| lines[**at].trim_start().starts_with("[[members]]");
    let start = headers.iter().filter(is_member).nth(at).copied();
    let cut = start.map(|start| {
        let next = headers.iter().find(|next| **next > start).copied();
        let end = next.map_or(lines.len(), |next| above(&lines, next));
        let start = above(&lines, start);
        let kept = lines[..start].iter().chain(&lines[end..]);
        kept.flat_map(|line| [*line, "\n"]).collect::<String>()
    });
    // Without such a block the file is written in another way, and anew.
    verified(cut.unwrap_or_default(), &new).map(|(_, text)| text)
}

/// The first line of the comment that stands over a header, with the empty lines above it.
fn above(lines: &[&str], header: usize) -> usize {
    let mut at = header;
    while at > 0 && lines[at - 1].trim_start().starts_with('#') {
        at -= 1;
    }
    while at > 0 && lines[at - 1].trim().is_empty() {
        at -= 1;
    }
    at
}

fn core_line(file: &ConsortiumFile) -> String {
    format!("core hash {}", hex(&file.core_hash()))
}

fn show(file: &ConsortiumFile) {
    println!("consortium {}", file.core.name);
    println!("ring bits {}", file.core.ring_bits);
    println!("{}", core_line(file));
    let nodes = PartyId::ALL
        .map(Peer::Party)
        .into_iter()
        .chain([Peer::Dealer]);
    let mut rows: Vec<[String; 4]> = Vec::new();
    for peer in nodes {
        let node = file.node(peer);
        let (name, address) = (node.name.clone(), node.place());
        rows.push([peer.to_string(), name, node.pin.to_string(), address]);
    }
    for member in &file.members {
        let (name, pin) = (member.name.clone(), member.pin.to_string());
        rows.push([role_name(member.role).into(), name, pin, String::new()]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let (first, second) = (width(0), width(1));
    for [role, name, pin, address] in &rows {
        let line = format!("{role:<first$}  {name:<second$}  {pin}  {address}");
        println!("{}", line.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use trefoil_transport::Pin;

    use super::*;

    fn card(role: CardRole, id: &str, byte: u8) -> Card {
        Card {
            role,
            id: id.into(),
            title: id.to_uppercase(),
            pin: Pin::from_bytes([byte; 32]),
            address: role.listens().then(|| format!("{id}.example.org:7100")),
            transport: Default::default(),
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
        assert_eq!(file.members.len(), 2);
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
        let new = [card(CardRole::Hospital, "berta", 10)];
        let (more, longer) = add(&file, &text, &new).unwrap();
        assert_eq!(more.members[2].name, "berta");
        assert!(longer.starts_with(&text), "{longer}");
        assert_eq!(more.core_hash(), file.core_hash());

        assert_eq!(remove(&more, &longer, "berta").unwrap(), text);
        let fewer = remove(&more, &longer, "anna").unwrap();
        let read: ConsortiumFile = toml::from_str(&fewer).unwrap();
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
        // An empty list is written inside the file's head, where no block can be appended.
        let text = file.to_toml();
        let (more, longer) = add(&file, &text, &[card(CardRole::Analyst, "office", 8)]).unwrap();
        assert_eq!(toml::from_str::<ConsortiumFile>(&longer).unwrap(), more);
        let fewer = remove(&more, &longer, "office").unwrap();
        assert_eq!(toml::from_str::<ConsortiumFile>(&fewer).unwrap(), file);
    }
}
