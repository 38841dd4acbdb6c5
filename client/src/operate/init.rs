//! `trefoil init`: a key pair, a certificate, a configuration file and a card for one institution.
//! Nothing is overwritten; the private key never leaves the folder.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use trefoil_consortium::card::{check_title, id_of};
use trefoil_consortium::{Card, CardRole, check_name, identity};

use super::{HOME, MEMBER_FILE, home, write_new};

const CERTIFICATE: &str = "certificate.der";
const KEY: &str = "key.der";
const CARD: &str = "card";
/// The ports of the shipped examples.
const PARTY_PORT: u16 = 7100;
const DEALER_PORT: u16 = 7103;

/// Arguments of `trefoil init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// What this institution is in the consortium: party, dealer, hospital or analyst.
    role: CardRole,
    /// Its name for people, such as "St. Anna".
    #[arg(long)]
    name: String,
    /// Its name in files, policies and messages; follows from --name where that has ASCII letters
    /// only ("St. Anna" becomes st-anna).
    #[arg(long)]
    id: Option<String>,
    /// The folder to write to; without it TREFOIL_HOME, else the current folder.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Party and dealer: where to listen. 0.0.0.0:7100 for a party, 0.0.0.0:7103 for the dealer.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// Party and dealer: where others reach it. --listen, where that names one interface and port.
    #[arg(long, value_name = "HOST:PORT")]
    address: Option<String>,
}

/// Makes everything and prints the card.
pub fn init(args: &InitArgs) -> Result<()> {
    let dir = home(args.dir.as_deref());
    let title = check_title(&args.name).map_err(|err| anyhow::anyhow!("--name: {err}"))?;
    let id = match &args.id {
        Some(id) => id.clone(),
        None => id_of(&title).with_context(|| {
            format!(
                "no name for files follows from {title:?}: give one of ASCII letters, digits and '-' with --id"
            )
        })?,
    };
    check_name(&id).map_err(|err| anyhow::anyhow!("--id: {err}"))?;
    let (listen, address) = places(args)?;
    let (config, text) = configuration(args.role, &title, listen);
    let files = [CERTIFICATE, KEY, CARD, config].map(|name| dir.join(name));
    if let Some(there) = files.iter().find(|path| path.symlink_metadata().is_ok()) {
        bail!(
            "{} exists: nothing is overwritten; choose another folder with --dir or {HOME}",
            there.display()
        );
    }
    make_folder(&dir)?;
    let made = write(&dir, config, &text, &id.clone(), |pin| Card {
        role: args.role,
        id,
        title,
        pin,
        address,
    });
    let card = made.inspect_err(|_| {
        // None of them was there before; the error says what happened.
        files
            .iter()
            .for_each(|path| drop(std::fs::remove_file(path)));
    })?;
    println!("{card}");
    eprintln!(
        "made {} with a new key; the line above is its public card (also in {}): send it to whoever \
         keeps the consortium file, and put that file, signed, beside {config} as consortium.toml",
        dir.display(),
        dir.join(CARD).display()
    );
    Ok(())
}

/// Where to listen, and where others reach it.
fn places(args: &InitArgs) -> Result<(Option<SocketAddr>, Option<String>)> {
    if !args.role.listens() {
        if args.listen.is_some() || args.address.is_some() {
            bail!(
                "--listen and --address are for parties and the dealer: nobody connects to a {}",
                args.role
            );
        }
        return Ok((None, None));
    }
    let port = match args.role {
        CardRole::Dealer => DEALER_PORT,
        _ => PARTY_PORT,
    };
    let listen = args
        .listen
        .unwrap_or_else(|| (Ipv4Addr::UNSPECIFIED, port).into());
    if listen.port() == 0 {
        bail!("--listen: port 0 is another one at every start; choose one");
    }
    let address = match &args.address {
        Some(address) => address.clone(),
        None if listen.ip().is_unspecified() => bail!(
            "--address HOST:PORT: say where the others reach this {}, such as {}.example.org:{}",
            args.role,
            args.role,
            listen.port()
        ),
        None => listen.to_string(),
    };
    trefoil_consortium::card::check_address(&address)
        .map_err(|err| anyhow::anyhow!("--address: {err}"))?;
    Ok((Some(listen), Some(address)))
}

fn make_folder(dir: &Path) -> Result<()> {
    let mut folder = std::fs::DirBuilder::new();
    folder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut folder, 0o700);
    folder
        .create(dir)
        .with_context(|| format!("cannot make the folder {}", dir.display()))
}

fn write(
    dir: &Path,
    config: &str,
    text: &str,
    name: &str,
    card: impl FnOnce(trefoil_transport::Pin) -> Card,
) -> Result<Card> {
    let made = identity::generate(name)?;
    let card = card(identity::pin(&made)?);
    card.check().map_err(anyhow::Error::msg)?;
    identity::save(&made, &dir.join(CERTIFICATE), &dir.join(KEY))?;
    write_new(&dir.join(config), text.as_bytes(), false)?;
    write_new(&dir.join(CARD), format!("{card}\n").as_bytes(), false)?;
    Ok(card)
}

/// The configuration file's name and text.
fn configuration(
    role: CardRole,
    title: &str,
    listen: Option<SocketAddr>,
) -> (&'static str, String) {
    let listen = listen.map_or(String::new(), |listen| listen.to_string());
    let head = format!("# {title}, {role}. Paths are relative to this file.\n");
    match role {
        CardRole::Party => {
            let body = include_str!("party.toml.in");
            ("party.toml", head + &body.replace("{listen}", &listen))
        }
        CardRole::Dealer => {
            let body = include_str!("dealer.toml.in");
            ("dealer.toml", head + &body.replace("{listen}", &listen))
        }
        CardRole::Hospital | CardRole::Analyst => {
            (MEMBER_FILE, head + include_str!("member.toml.in"))
        }
    }
}

#[cfg(test)]
mod tests {
    use trefoil_consortium::{DealerConfig, MemberConfig, PartyConfig};
    use trefoil_transport::Settings;

    use super::*;

    fn args(role: CardRole, dir: &Path) -> InitArgs {
        InitArgs {
            role,
            name: "St. Anna".into(),
            id: None,
            dir: Some(dir.to_owned()),
            listen: role
                .listens()
                .then(|| "127.0.0.1:7100".parse().expect("an address")),
            address: None,
        }
    }

    #[test]
    fn what_is_made_loads_and_its_card_is_of_its_key() {
        for role in [
            CardRole::Party,
            CardRole::Dealer,
            CardRole::Hospital,
            CardRole::Analyst,
        ] {
            let folder = tempfile::tempdir().unwrap();
            let dir = folder.path().join("deep").join("home");
            init(&args(role, &dir)).unwrap();
            let made = identity::load(&dir.join(CERTIFICATE), &dir.join(KEY)).unwrap();
            let text = std::fs::read_to_string(dir.join(CARD)).unwrap();
            let cards = Card::parse_all(&text).unwrap();
            assert_eq!(cards.len(), 1);
            assert_eq!(cards[0].pin, identity::pin(&made).unwrap());
            assert_eq!((cards[0].role, cards[0].id.as_str()), (role, "st-anna"));
            let (transport, files) = match role {
                CardRole::Party => {
                    let config = PartyConfig::load(&dir.join("party.toml")).unwrap();
                    assert!(config.policy.requesters.is_empty(), "nobody may start jobs");
                    assert_eq!(config.listen.to_string(), "127.0.0.1:7100");
                    (config.transport, config.identity)
                }
                CardRole::Dealer => {
                    let config = DealerConfig::load(&dir.join("dealer.toml")).unwrap();
                    assert_eq!(config.simulation_coin_seed, None);
                    (config.transport, config.identity)
                }
                _ => {
                    let config = MemberConfig::load(&dir.join(MEMBER_FILE)).unwrap();
                    (config.transport, config.identity)
                }
            };
            assert_eq!(transport, Settings::default());
            assert_eq!(files.key, dir.join(KEY));
        }
    }

    #[test]
    fn nothing_is_overwritten_and_no_key_is_made_where_something_is_there() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(MEMBER_FILE), "mine").unwrap();
        let err = init(&args(CardRole::Hospital, folder.path())).unwrap_err();
        assert!(err.to_string().contains("member.toml exists"), "{err}");
        assert!(!folder.path().join(KEY).exists());
        let mine = std::fs::read_to_string(folder.path().join(MEMBER_FILE)).unwrap();
        assert_eq!(mine, "mine");
    }

    #[test]
    fn what_does_not_fit_the_role_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let said = |change: &dyn Fn(&mut InitArgs)| {
            let mut args = args(CardRole::Party, folder.path());
            change(&mut args);
            let err = init(&args).unwrap_err().to_string();
            assert!(!folder.path().join(KEY).exists());
            err
        };
        assert!(said(&|args| args.role = CardRole::Hospital).contains("nobody connects"));
        assert!(said(&|args| args.listen = None).contains("--address"));
        assert!(said(&|args| args.name = "Hôpital".into()).contains("--id"));
        assert!(said(&|args| args.id = Some("a/b".into())).contains("--id"));
        assert!(said(&|args| args.address = Some("here".into())).contains("host:port"));
    }
}
