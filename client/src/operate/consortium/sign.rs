//! `trefoil consortium sign`: a party or the dealer looks at a consortium file, is told in words what
//! it would sign, and signs with its key.

use std::path::Path;

use anyhow::{Context, Result, bail};
use trefoil_consortium::identity::{self, Signer};
use trefoil_consortium::signature::{Part, Shown};
use trefoil_consortium::{ConsortiumFile, Role, hex};
use trefoil_protocol::party::Peer;

use super::super::place::{Kind, Place};
use super::super::{home, replace};
use super::edit;

/// Signs the file and writes the signatures into it.
pub(super) fn sign(path: &Path, given: Option<&Path>) -> Result<()> {
    let home = home(given);
    let place = Place::load(&home)?;
    if place.kind == Kind::Member {
        bail!(
            "{}: hospitals and analysts do not sign; the three parties and the dealer do",
            home.display()
        );
    }
    let identity = identity::load(&place.identity.certificate, &place.identity.key)?;
    let signer = Signer::new(&identity)?;
    let (file, text) = super::load(path)?;
    let peer = match file.role(signer.pin()) {
        Some(Role::Node(peer)) => peer,
        Some(Role::Member(member)) => bail!(
            "{}: the key of {} is the {} {} there; only parties and the dealer sign",
            path.display(),
            home.display(),
            member.role,
            member.name
        ),
        None => bail!(
            "{}: the public key {} of {} is not in the core: the file was made with another card; \
             send the card again to whoever keeps the file",
            path.display(),
            signer.pin(),
            home.display()
        ),
    };
    place.fits(&Role::Node(peer))?;
    let (mut signed, faults) = edit::pruned(&file);
    for fault in faults {
        eprintln!("taken out: {fault}");
    }
    let known = known(path, &place.consortium)?;
    eprint!("{}", in_words(&file, peer, known.as_ref())?);
    let lines = signed.sign(&signer)?;
    let (signed, text) = edit::sign(&signed, &text, &lines)?;
    replace(path, text.as_bytes(), false)?;
    for line in &lines {
        println!("{line}");
    }
    eprintln!(
        "signed as {peer} and written into {}; whoever keeps another copy adds the lines above \
         with `trefoil consortium add`",
        path.display()
    );
    eprint!("{}", missing(&signed));
    Ok(())
}

/// The file that the home uses, if it has another one than that which is signed.
fn known(signed: &Path, path: &Path) -> Result<Option<ConsortiumFile>> {
    let same = || Ok::<_, std::io::Error>(path.canonicalize()? == signed.canonicalize()?);
    match path.exists() && !same()? {
        true => ConsortiumFile::load_unsigned(path)
            .map(Some)
            .context("the consortium file that this home uses now"),
        false => Ok(None),
    }
}

/// What is signed, against what the home uses now.
fn in_words(file: &ConsortiumFile, peer: Peer, known: Option<&ConsortiumFile>) -> Result<String> {
    let own = file.node(peer);
    let mut words = format!("{} signs as {peer}, with the key {}\n", own.name, own.pin);
    let core = hex(&file.core_hash());
    let same_core = known.filter(|known| known.core_hash() == file.core_hash());
    let about = match (known, same_core) {
        (None, _) => "this home uses no other file yet",
        (Some(_), Some(_)) => "the one this home uses",
        (Some(_), None) => "NOT THE ONE THIS HOME USES: another consortium",
    };
    words += &format!("  core       {core} ({about})\n");
    if same_core.is_none() {
        for peer in Part::Core.signers() {
            let node = file.node(*peer);
            let dealer = match peer {
                Peer::Dealer => ", which must not collude with any party",
                Peer::Party(_) => "",
            };
            words += &format!("             {peer} is {}{dealer}\n", node.name);
        }
        words += "             compare this hash with the other three by phone\n";
    }
    if !Part::Members.signers().contains(&peer) {
        return Ok(words);
    }
    words += &format!(
        "  members    number {}, hash {}\n",
        file.members_number,
        file.members_short()
    );
    match same_core {
        None => {
            for member in &file.members {
                words += &format!("             {} {}\n", member.role, member.name);
            }
        }
        Some(known) if known.members_number > file.members_number => bail!(
            "the members have number {}, and this home uses number {} already: an older list \
             would bring removed members back; ask for the newest file",
            file.members_number,
            known.members_number
        ),
        Some(known)
            if known.members_number == file.members_number
                && known.members_hash() != file.members_hash() =>
        {
            bail!(
                "the members have number {}, and this home uses others under that number: whoever \
                 keeps the file raises the number",
                file.members_number
            )
        }
        Some(known) => {
            for change in file.changes_since(known) {
                words += &format!("             {change}\n");
            }
            if known.members_number == file.members_number {
                words += "             as this home uses them\n";
            }
        }
    }
    Ok(words)
}

/// Who has to sign yet.
pub(super) fn missing(file: &ConsortiumFile) -> String {
    let mut words = String::new();
    for part in [Part::Core, Part::Members] {
        let names = file.unsigned(part);
        if !names.is_empty() {
            let part = Shown(part, file.members_number);
            words += &format!("{part}: not signed yet by {}\n", names.join(", "));
        }
    }
    match words.is_empty() {
        true => "all have signed: send the file to the four nodes and the members\n".into(),
        false => words,
    }
}
