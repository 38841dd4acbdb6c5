//! `trefoil consortium`: puts cards together into a consortium file, changes its members, has it
//! signed, shows it.
//!
//! Here: the commands. `edit.rs`: the text of the file; `sign.rs`: what a party or dealer is told
//! before it signs. What a node accepts is `trefoil_consortium`'s word; why the file is as it is:
//! docs/adr/0009-consortium-file.md.

mod edit;
mod sign;

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use trefoil_consortium::signature::{Part, Shown, SignatureLine};
use trefoil_consortium::{Card, ConsortiumFile, hex};

use super::{replace, write_new};

/// Longest file of cards that is read.
const CARDS_MAX_BYTES: u64 = 16 << 20;

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
    /// Sign a consortium file as a party or the dealer; says first what is signed.
    Sign {
        /// The consortium file; the signatures are written into it, and printed.
        file: PathBuf,
        /// The folder with party.toml or dealer.toml; without it TREFOIL_HOME, else the current
        /// folder.
        #[arg(long, value_name = "DIR")]
        home: Option<PathBuf>,
    },
    /// Add hospitals and analysts by their cards, or signatures that came by mail.
    Add {
        /// The consortium file.
        file: PathBuf,
        /// Files with cards or signatures, or - for standard input.
        #[arg(required = true, value_name = "CARD|SIGNATURE")]
        lines: Vec<PathBuf>,
    },
    /// Remove a hospital or analyst: none of its keys is accepted any more.
    Remove {
        /// The consortium file.
        file: PathBuf,
        /// Its name in the file.
        name: String,
    },
    /// Exchange a key. A member's new card is accepted beside its old key, until --finish. A new
    /// card of a party or the dealer makes another core, which all four sign anew.
    Rotate {
        /// The consortium file.
        file: PathBuf,
        /// The file with the new card, or - for standard input.
        #[arg(value_name = "CARD", required_unless_present = "finish")]
        card: Option<PathBuf>,
        /// Refuse the old key of this member from now on.
        #[arg(long, value_name = "NAME", conflicts_with = "card")]
        finish: Option<String>,
    },
    /// Show roles, names, pins, hashes, and who has signed.
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
            let (cards, lines) = read_lines(cards)?;
            if !lines.is_empty() {
                bail!("a new file has no signatures: the cards alone make it");
            }
            let (file, text) = edit::create(name, *ring_bits, &cards)?;
            write_new(out, text.as_bytes(), false)?;
            println!("core hash {}", hex(&file.core_hash()));
            eprintln!(
                "made {}: the three parties and the dealer compare their own pins and the core hash \
                 and sign it, each with `trefoil consortium sign {} --home DIR`",
                out.display(),
                out.display()
            );
        }
        Command::Sign { file, home } => sign::sign(file, home.as_deref())?,
        Command::Add { file, lines } => {
            let (cards, lines) = read_lines(lines)?;
            let (old, text) = load(file)?;
            let (mut new, mut text) = match cards.is_empty() {
                true => (old.clone(), text),
                false => edit::add(&old, &text, &cards)?,
            };
            if !lines.is_empty() {
                (new, text) = edit::sign(&new, &text, &lines)?;
            }
            replace(file, text.as_bytes(), false)?;
            for entry in &new.members[old.members.len()..] {
                println!("added {} {}", entry.role, entry.name);
            }
            for line in &lines {
                let part = Shown(line.of, line.number);
                println!("added the signature of {} under {part}", line.by);
            }
            eprint!("{}", sign::missing(&new));
        }
        Command::Remove { file, name } => {
            let (old, text) = load(file)?;
            let (new, text) = edit::remove(&old, &text, name)
                .with_context(|| format!("{}: nothing was changed", file.display()))?;
            replace(file, text.as_bytes(), false)?;
            println!("removed {name}");
            eprint!("{}", sign::missing(&new));
        }
        Command::Rotate { file, card, finish } => {
            let (old, text) = load(file)?;
            let (new, text) = match (card, finish) {
                (_, Some(name)) => edit::finish(&old, &text, name)?,
                (Some(card), None) => edit::rotate(&old, &text, &one_card(card)?)?,
                (None, None) => bail!("give the new card, or --finish NAME"),
            };
            replace(file, text.as_bytes(), false)?;
            rotated(&old, &new);
        }
        Command::Show { file } => show(&load(file)?.0),
    }
    Ok(())
}

fn rotated(old: &ConsortiumFile, new: &ConsortiumFile) {
    if old.core_hash() == new.core_hash() {
        for change in new.changes_since(old) {
            println!("{change}");
        }
    } else {
        println!("core hash {}", hex(&new.core_hash()));
        eprintln!(
            "this is another core: when all have signed, stop the four nodes, give each the file \
             and the new key to its owner, and start them; data sets and models stay"
        );
    }
    eprint!("{}", sign::missing(new));
}

fn load(path: &Path) -> Result<(ConsortiumFile, String)> {
    let file = ConsortiumFile::load_unsigned(path)?;
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok((file, text))
}

/// The cards and signatures in some files.
fn read_lines(paths: &[PathBuf]) -> Result<(Vec<Card>, Vec<SignatureLine>)> {
    let (mut cards, mut lines) = (Vec::new(), Vec::new());
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
        let signed = SignatureLine::parse_all(&text).with_context(|| place.clone())?;
        if found.is_empty() && signed.is_empty() {
            bail!(
                "{place}: holds no card and no signature; these are the lines that `trefoil init` \
                 and `trefoil consortium sign` print"
            );
        }
        cards.extend(found);
        lines.extend(signed);
    }
    Ok((cards, lines))
}

fn one_card(path: &Path) -> Result<Card> {
    let (mut cards, lines) = read_lines(&[path.to_owned()])?;
    match (cards.pop(), cards.is_empty() && lines.is_empty()) {
        (Some(card), true) => Ok(card),
        _ => bail!("{}: one card, and nothing else, is rotated", path.display()),
    }
}

fn show(file: &ConsortiumFile) {
    println!("consortium {}", file.core.name);
    println!("ring bits {}", file.core.ring_bits);
    println!("core hash {}", hex(&file.core_hash()));
    println!(
        "members number {}, hash {}",
        file.members_number,
        file.members_short()
    );
    let mut rows: Vec<[String; 4]> = Vec::new();
    for peer in Part::Core.signers() {
        let node = file.node(*peer);
        let (name, address) = (node.name.clone(), node.address.clone());
        rows.push([peer.to_string(), name, node.pin.to_string(), address]);
    }
    for member in &file.members {
        let many = member.accepted().len() > 1;
        for (at, key) in member.accepted().iter().enumerate() {
            let note = match (many, at) {
                (true, 0) => "old key, until --finish",
                (true, _) => "new key",
                (false, _) => "",
            };
            let (role, name) = (member.role.to_string(), member.name.clone());
            rows.push([role, name, key.to_string(), note.into()]);
        }
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let (first, second) = (width(0), width(1));
    for [role, name, pin, address] in &rows {
        let line = format!("{role:<first$}  {name:<second$}  {pin}  {address}");
        println!("{}", line.trim_end());
    }
    for part in [Part::Core, Part::Members] {
        let shown = Shown(part, file.members_number);
        for line in file.signatures.of(part) {
            match file.verify_line(line) {
                Ok(()) => println!("{shown}: signed by {}", line.by),
                Err(fault) => println!("{fault}"),
            }
        }
        let names = file.unsigned(part);
        if !names.is_empty() {
            println!("{shown}: NOT SIGNED by {}", names.join(", "));
        }
    }
}
