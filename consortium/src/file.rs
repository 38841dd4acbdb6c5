//! The consortium file: who takes part, and by which public key each is known.
//!
//! `core` (parties, dealer, ring) makes a consortium what it is; its hash is in every session id.
//! `members` (hospitals, analysts) may come and go. Addresses are advice and in no hash.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::{Pin, Protocol};

use crate::check_name;
use crate::config::{ConfigError, read_toml};

/// Most members of a consortium.
const MEMBERS_MAX: usize = 10_000;

/// Why a consortium file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConsortiumError {
    /// It could not be read or parsed.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// It says something impossible.
    #[error("{path}: {field}: {detail}")]
    Content {
        /// The file.
        path: PathBuf,
        /// The key.
        field: String,
        /// What is wrong with it.
        detail: String,
    },
}

/// A node that others connect to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// The institution's name.
    pub name: String,
    /// Its public key's pin.
    pub pin: Pin,
    /// `host:port`; may be overridden by each node's own configuration. Empty, and left out of the
    /// file, where the node only dials out.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub address: String,
    /// What its links use; a pair of which one uses TCP uses TCP.
    #[serde(default, skip_serializing_if = "is_quic")]
    pub transport: Protocol,
}

fn is_quic(transport: &Protocol) -> bool {
    *transport == Protocol::Quic
}

/// What a member may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberRole {
    /// Brings data, and may ask for results where the parties' policy allows.
    Hospital,
    /// Brings no data; may ask for results where the parties' policy allows.
    Analyst,
}

/// A hospital or analyst.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberEntry {
    /// Its name.
    pub name: String,
    /// What it may do.
    pub role: MemberRole,
    /// Its public key's pin.
    pub pin: Pin,
}

/// What makes a consortium what it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Core {
    /// Its name.
    pub name: String,
    /// Width of the ring: 64 or 48.
    pub ring_bits: u8,
    /// P0, P1 and P2.
    pub parties: [Member; 3],
    /// The dealer of correlated randomness. It must not collude with any party.
    pub dealer: Member,
}

/// The whole file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsortiumFile {
    /// Parties, dealer, ring.
    pub core: Core,
    /// Hospitals and analysts.
    #[serde(default)]
    pub members: Vec<MemberEntry>,
}

/// Who a public key belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// A party or the dealer.
    Node(Peer),
    /// A hospital or analyst.
    Member(MemberEntry),
}

impl ConsortiumFile {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<ConsortiumFile, ConsortiumError> {
        let file: ConsortiumFile = read_toml(path)?;
        file.check()
            .map_err(|(field, detail)| ConsortiumError::Content {
                path: path.to_owned(),
                field,
                detail,
            })?;
        Ok(file)
    }

    /// The file's text, as `load` reads it.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("strings, integers and tables have a TOML form")
    }

    /// Checks names, ring, and that no two entries share a key. The error names the key in the file.
    pub fn check(&self) -> Result<(), (String, String)> {
        let fail = |field: String, detail: String| Err((field, detail));
        if ![48, 64].contains(&self.core.ring_bits) {
            let detail = format!("expected 48 or 64, found {}", self.core.ring_bits);
            return fail("core.ring_bits".into(), detail);
        }
        if self.members.len() > MEMBERS_MAX {
            return fail(
                "members".into(),
                format!("at most {MEMBERS_MAX} are possible"),
            );
        }
        let nodes = self
            .core
            .parties
            .iter()
            .enumerate()
            .map(|(at, node)| (format!("core.parties[{at}]"), node));
        let nodes = nodes.chain([("core.dealer".to_owned(), &self.core.dealer)]);
        let nodes = nodes.map(|(field, node)| (field, &node.name, node.pin));
        let members = self.members.iter().enumerate();
        let members =
            members.map(|(at, member)| (format!("members[{at}]"), &member.name, member.pin));
        let (mut names, mut pins) = (BTreeSet::new(), BTreeSet::new());
        for (field, name, pin) in nodes.chain(members) {
            if let Err(detail) = check_name(name) {
                return fail(format!("{field}.name"), detail);
            }
            if !names.insert(name.clone()) {
                return fail(format!("{field}.name"), format!("{name:?} is used twice"));
            }
            if !pins.insert(pin) {
                return fail(
                    format!("{field}.pin"),
                    format!("the key of {name:?} belongs to another entry too"),
                );
            }
        }
        self.check_reach()
    }

    /// SHA-256 of the core without its addresses.
    pub fn core_hash(&self) -> [u8; 32] {
        let core = &self.core;
        let mut hash = Sha256::new().chain_update(b"trefoil consortium core v1\0");
        let mut text = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        };
        text(&core.name);
        text(&core.ring_bits.to_string());
        for node in core.parties.iter().chain([&core.dealer]) {
            text(&node.name);
            text(&node.pin.to_string());
        }
        hash.finalize().into()
    }

    /// The entry of a party or the dealer.
    pub fn node(&self, peer: Peer) -> &Member {
        match peer {
            Peer::Party(party) => &self.core.parties[party.index()],
            Peer::Dealer => &self.core.dealer,
        }
    }

    /// Who holds the key pinned as `pin`.
    pub fn role(&self, pin: Pin) -> Option<Role> {
        let peers = PartyId::ALL
            .map(Peer::Party)
            .into_iter()
            .chain([Peer::Dealer]);
        let node = peers
            .into_iter()
            .find(|peer| self.node(*peer).pin == pin)
            .map(Role::Node);
        node.or_else(|| {
            self.members
                .iter()
                .find(|member| member.pin == pin)
                .cloned()
                .map(Role::Member)
        })
    }

    /// All members' pins.
    pub fn member_pins(&self) -> impl Iterator<Item = Pin> + '_ {
        self.members.iter().map(|member| member.pin)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn example() -> ConsortiumFile {
        let pin = |byte| Pin::from_bytes([byte; 32]);
        let node = |name: &str, byte, port| Member {
            name: name.into(),
            pin: pin(byte),
            address: format!("127.0.0.1:{port}"),
            transport: Protocol::Quic,
        };
        ConsortiumFile {
            core: Core {
                name: "test".into(),
                ring_bits: 64,
                parties: [node("north", 0, 1), node("west", 1, 2), node("east", 2, 3)],
                dealer: node("centre", 3, 4),
            },
            members: vec![MemberEntry {
                name: "st-anna".into(),
                role: MemberRole::Hospital,
                pin: pin(9),
            }],
        }
    }

    #[test]
    fn the_file_is_read_as_it_is_written_and_keys_are_looked_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("consortium.toml");
        std::fs::write(&path, example().to_toml()).unwrap();
        let file = ConsortiumFile::load(&path).unwrap();
        assert_eq!(file, example());
        assert_eq!(
            file.role(Pin::from_bytes([1; 32])),
            Some(Role::Node(Peer::Party(PartyId::P1)))
        );
        assert_eq!(
            file.role(Pin::from_bytes([3; 32])),
            Some(Role::Node(Peer::Dealer))
        );
        assert!(
            matches!(file.role(Pin::from_bytes([9; 32])), Some(Role::Member(m)) if m.name == "st-anna")
        );
        assert_eq!(file.role(Pin::from_bytes([8; 32])), None);
    }

    #[test]
    fn the_core_hash_depends_on_keys_and_not_on_addresses_or_members() {
        let mut other = example();
        other.core.dealer.address = "elsewhere:1".into();
        other.members.clear();
        assert_eq!(other.core_hash(), example().core_hash());
        other.core.dealer.pin = Pin::from_bytes([7; 32]);
        assert_ne!(other.core_hash(), example().core_hash());
    }

    #[test]
    fn one_key_for_two_roles_is_refused_naming_the_entry() {
        let mut file = example();
        file.members[0].pin = file.core.dealer.pin;
        let (field, _) = file.check().unwrap_err();
        assert_eq!(field, "members[0].pin");
    }
}
