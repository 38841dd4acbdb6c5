//! The home of a party, the dealer, or a member: whichever configuration is there.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use trefoil_consortium::config::{IdentityFiles, Policy, StoreConfig};
use trefoil_consortium::{Addresses, DealerConfig, MemberConfig, PartyConfig, Role};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::Settings;

use super::{HOME, MEMBER_FILE};

/// Whose home it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Party,
    Dealer,
    Member,
}

/// What a home's configuration says.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) kind: Kind,
    /// The configuration file.
    pub(super) file: PathBuf,
    pub(super) consortium: PathBuf,
    pub(super) identity: IdentityFiles,
    /// Addresses that go before the consortium file's.
    pub(super) peers: Addresses,
    pub(super) transport: Settings,
    /// Where it listens; parties and the dealer.
    pub(super) listen: Option<SocketAddr>,
    /// Where it keeps its data; parties only.
    pub(super) store: Option<PathBuf>,
    /// Where it keeps contributions; parties only.
    pub(super) contributions: Option<StoreConfig>,
    /// Parties only.
    pub(super) policy: Option<Policy>,
}

impl Place {
    /// Reads the one configuration that is in `home`.
    pub(super) fn load(home: &Path) -> Result<Place> {
        let files = ["party.toml", "dealer.toml", MEMBER_FILE].map(|name| home.join(name));
        match files.each_ref().map(|file| file.is_file()) {
            [true, false, false] => Place::party(&files[0]),
            [false, true, false] => Place::dealer(&files[1]),
            [false, false, true] => Place::member(&files[2]),
            [false, false, false] => bail!(
                "no party.toml, dealer.toml or {MEMBER_FILE} in {}: go to the folder that \
                 `trefoil init` made, or name it with --home or {HOME}",
                home.display()
            ),
            _ => bail!(
                "{} has more than one of party.toml, dealer.toml and {MEMBER_FILE}: each has a \
                 folder of its own",
                home.display()
            ),
        }
    }

    fn party(file: &Path) -> Result<Place> {
        let config = PartyConfig::load(file)?;
        Ok(Place {
            kind: Kind::Party,
            file: file.to_owned(),
            consortium: config.consortium,
            identity: config.identity,
            peers: config.peers,
            transport: config.transport,
            listen: (!config.dial_out_only).then_some(config.listen),
            store: Some(config.home),
            contributions: Some(config.store),
            policy: Some(config.policy),
        })
    }

    fn dealer(file: &Path) -> Result<Place> {
        let config = DealerConfig::load(file)?;
        Ok(Place {
            kind: Kind::Dealer,
            file: file.to_owned(),
            consortium: config.consortium,
            identity: config.identity,
            peers: config.peers,
            transport: config.transport,
            listen: (!config.dial_out_only).then_some(config.listen),
            store: None,
            contributions: None,
            policy: None,
        })
    }

    fn member(file: &Path) -> Result<Place> {
        let config = MemberConfig::load(file)?;
        Ok(Place {
            kind: Kind::Member,
            file: file.to_owned(),
            consortium: config.consortium,
            identity: config.identity,
            peers: config.peers,
            transport: config.transport,
            listen: None,
            store: None,
            contributions: None,
            policy: None,
        })
    }

    /// The role of this home's key in the consortium file against its configuration.
    pub(super) fn fits(&self, role: &Role) -> Result<()> {
        let (kind, is) = match role {
            Role::Node(Peer::Party(party)) => (Kind::Party, party.to_string()),
            Role::Node(Peer::Dealer) => (Kind::Dealer, "the dealer".into()),
            Role::Member(member) => (Kind::Member, format!("{} {}", member.role, member.name)),
        };
        if kind != self.kind {
            bail!(
                "the key of this home is {is} in {}, and its configuration is {}: the two do not \
                 belong together",
                self.consortium.display(),
                self.file.display()
            );
        }
        Ok(())
    }

    /// The nodes that it has to do with: a member has nothing to do with the dealer.
    pub(super) fn others(&self, role: &Role) -> Vec<Peer> {
        let parties = PartyId::ALL.map(Peer::Party).into_iter();
        let all = parties.chain((self.kind != Kind::Member).then_some(Peer::Dealer));
        all.filter(|peer| *role != Role::Node(*peer)).collect()
    }
}
