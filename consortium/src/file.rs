//! The consortium file: who takes part, and by which public key each is known.
//!
//! `core` (parties, dealer, ring) makes a consortium what it is; its hash is in every session id, and
//! all four nodes sign it. `members` (hospitals, analysts) come and go under a number that rises; the
//! three parties sign them. Addresses are advice and in no hash. Signatures: `signature.rs`; a node
//! that follows its file while it runs: `live.rs`. Why so: docs/adr/0009-consortium-file.md.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::Pin;

use crate::config::{ConfigError, parse_toml, read_text};
use crate::signature::{Part, SignatureFault, Signatures};
use crate::{check_name, hex};

/// Most members of a consortium.
const MEMBERS_MAX: usize = 10_000;
/// Most keys of one member: the old and the new one while a key is rotated.
const KEYS_MAX: usize = 2;

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
    /// It is not signed as it has to be.
    #[error("{path}: {source}")]
    Signature {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: SignatureFault,
    },
    /// An older list of members than this node has used.
    #[error(
        "{path}: members number {found}, and this node has used number {seen} already: an older \
         list brings removed members back; ask for the newest file ({record} remembers the number)"
    )]
    Older {
        /// The file.
        path: PathBuf,
        /// Its number.
        found: u64,
        /// The highest number that this node has used.
        seen: u64,
        /// Where that is kept.
        record: PathBuf,
    },
    /// Another list of members under a number that this node has used.
    #[error(
        "{path}: members number {number} are others than this node has used under that number \
         (hash {found}, before {seen}): whoever keeps the file raises the number, and the parties \
         sign again"
    )]
    Twofold {
        /// The file.
        path: PathBuf,
        /// The number.
        number: u64,
        /// The start of the hash in the file.
        found: String,
        /// The start of the hash used before.
        seen: String,
    },
    /// Another core than the one this node runs with.
    #[error(
        "{path}: core hash {found}, this node runs with {running}: that is another consortium; a \
         node takes another core only when it is started"
    )]
    OtherCore {
        /// The file.
        path: PathBuf,
        /// The core hash in the file.
        found: String,
        /// The core hash this node runs with.
        running: String,
    },
    /// What this node remembers of earlier files cannot be read or written.
    #[error("{path}: {detail}")]
    Record {
        /// The record.
        path: PathBuf,
        /// What is wrong.
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
    /// `host:port`; may be overridden by each node's own configuration.
    pub address: String,
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
    /// The pin of its first public key: who it is, in everything it shares and asks for.
    pub pin: Pin,
    /// The pins of the public keys it holds now, where that is not the first one alone: two while a
    /// key is rotated, then the new one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<Pin>,
}

impl MemberEntry {
    /// A member with its first key.
    pub fn new(name: &str, role: MemberRole, pin: Pin) -> MemberEntry {
        MemberEntry {
            name: name.into(),
            role,
            pin,
            keys: Vec::new(),
        }
    }

    /// The keys that it may connect with.
    pub fn accepted(&self) -> &[Pin] {
        match self.keys.as_slice() {
            [] => std::slice::from_ref(&self.pin),
            keys => keys,
        }
    }
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
    /// Number of the list of members: raised with each change of it, never lowered.
    pub members_number: u64,
    /// Parties, dealer, ring.
    pub core: Core,
    /// Hospitals and analysts.
    #[serde(default)]
    pub members: Vec<MemberEntry>,
    /// Who has signed what.
    #[serde(default, skip_serializing_if = "Signatures::is_empty")]
    pub signatures: Signatures,
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
    /// A file that nobody has signed, with members number 1.
    pub fn new(core: Core, members: Vec<MemberEntry>) -> ConsortiumFile {
        ConsortiumFile {
            members_number: 1,
            core,
            members,
            signatures: Signatures::default(),
        }
    }

    /// Reads and checks the file and its signatures.
    pub fn load(path: &Path) -> Result<ConsortiumFile, ConsortiumError> {
        ConsortiumFile::parse_signed(path, &read_text(path)?)
    }

    /// Reads and checks the file, signed or not: for those who make and sign it.
    pub fn load_unsigned(path: &Path) -> Result<ConsortiumFile, ConsortiumError> {
        ConsortiumFile::parse(path, &read_text(path)?)
    }

    /// The content of `path`, checked with its signatures.
    pub(crate) fn parse_signed(path: &Path, text: &str) -> Result<ConsortiumFile, ConsortiumError> {
        let file = ConsortiumFile::parse(path, text)?;
        file.verify().map_err(|source| ConsortiumError::Signature {
            path: path.to_owned(),
            source,
        })?;
        Ok(file)
    }

    fn parse(path: &Path, text: &str) -> Result<ConsortiumFile, ConsortiumError> {
        let file: ConsortiumFile = parse_toml(path, text)?;
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
        if self.members_number == 0 {
            return fail("members_number".into(), "numbers start at 1".into());
        }
        let nodes = self.core.parties.iter().enumerate();
        let nodes = nodes.map(|(at, node)| (format!("core.parties[{at}]"), node));
        let nodes = nodes.chain([("core.dealer".to_owned(), &self.core.dealer)]);
        let nodes = nodes.map(|(field, node)| (field, &node.name, vec![node.pin]));
        let members = self.members.iter().enumerate().map(|(at, member)| {
            let others = member.keys.iter().filter(|key| **key != member.pin);
            let keys = [member.pin].into_iter().chain(others.copied());
            (format!("members[{at}]"), &member.name, keys.collect())
        });
        let (mut names, mut pins) = (BTreeSet::new(), BTreeSet::new());
        for (field, name, keys) in nodes.chain(members) {
            if let Err(detail) = check_name(name) {
                return fail(format!("{field}.name"), detail);
            }
            if !names.insert(name.clone()) {
                return fail(format!("{field}.name"), format!("{name:?} is used twice"));
            }
            for key in keys {
                if !pins.insert(key) {
                    return fail(
                        format!("{field}.pin"),
                        format!("the key {key} of {name:?} is in the file twice"),
                    );
                }
            }
        }
        let many = self.members.iter().position(|m| m.keys.len() > KEYS_MAX);
        if let Some(at) = many {
            let detail = format!("at most {KEYS_MAX} keys are possible, while a key is rotated");
            return fail(format!("members[{at}].keys"), detail);
        }
        Ok(())
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

    /// SHA-256 of the core hash and of the members with their number.
    pub fn members_hash(&self) -> [u8; 32] {
        let mut hash = Sha256::new()
            .chain_update(b"trefoil consortium members v1\0")
            .chain_update(self.core_hash())
            .chain_update(self.members_number.to_le_bytes())
            .chain_update((self.members.len() as u64).to_le_bytes());
        for member in &self.members {
            hash.update((member.name.len() as u64).to_le_bytes());
            hash.update(member.name.as_bytes());
            hash.update([match member.role {
                MemberRole::Hospital => 0,
                MemberRole::Analyst => 1,
            }]);
            hash.update(member.pin.as_bytes());
            hash.update((member.keys.len() as u64).to_le_bytes());
            member
                .keys
                .iter()
                .for_each(|key| hash.update(key.as_bytes()));
        }
        hash.finalize().into()
    }

    /// What is signed of a part.
    pub fn hash_of(&self, part: Part) -> [u8; 32] {
        match part {
            Part::Core => self.core_hash(),
            Part::Members => self.members_hash(),
        }
    }

    /// The start of the members' hash, as people compare it.
    pub fn members_short(&self) -> String {
        hex(&self.members_hash()[..8])
    }

    /// The entry of a party or the dealer.
    pub fn node(&self, peer: Peer) -> &Member {
        match peer {
            Peer::Party(party) => &self.core.parties[party.index()],
            Peer::Dealer => &self.core.dealer,
        }
    }

    /// Who may connect with the key pinned as `key`.
    pub fn role(&self, key: Pin) -> Option<Role> {
        let peers = PartyId::ALL
            .map(Peer::Party)
            .into_iter()
            .chain([Peer::Dealer]);
        let node = peers
            .into_iter()
            .find(|peer| self.node(*peer).pin == key)
            .map(Role::Node);
        node.or_else(|| {
            self.members
                .iter()
                .find(|member| member.accepted().contains(&key))
                .cloned()
                .map(Role::Member)
        })
    }

    /// The member whose first key is pinned as `pin`, whichever it holds now.
    pub fn member(&self, pin: Pin) -> Option<&MemberEntry> {
        self.members.iter().find(|member| member.pin == pin)
    }

    /// The keys of all members.
    pub fn member_pins(&self) -> impl Iterator<Item = Pin> + '_ {
        self.members
            .iter()
            .flat_map(|member| member.accepted().iter().copied())
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
        };
        let core = Core {
            name: "test".into(),
            ring_bits: 64,
            parties: [node("north", 0, 1), node("west", 1, 2), node("east", 2, 3)],
            dealer: node("centre", 3, 4),
        };
        let anna = MemberEntry::new("st-anna", MemberRole::Hospital, pin(9));
        ConsortiumFile::new(core, vec![anna])
    }

    #[test]
    fn the_file_is_read_as_it_is_written_and_keys_are_looked_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("consortium.toml");
        std::fs::write(&path, example().to_toml()).unwrap();
        let file = ConsortiumFile::load_unsigned(&path).unwrap();
        assert_eq!(file, example());
        let err = ConsortiumFile::load(&path).unwrap_err().to_string();
        assert!(err.contains("north, west, east, centre"), "{err}");
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

    #[test]
    fn a_member_connects_with_the_keys_it_holds_and_stays_who_it_is() {
        let [first, second] = [9, 10].map(|byte| Pin::from_bytes([byte; 32]));
        let mut file = example();
        file.members[0].keys = vec![first, second];
        file.check().unwrap();
        for key in [first, second] {
            assert!(matches!(file.role(key), Some(Role::Member(m)) if m.pin == first));
        }
        file.members[0].keys = vec![second];
        file.check().unwrap();
        assert_eq!(file.role(first), None);
        assert!(matches!(file.role(second), Some(Role::Member(m)) if m.pin == first));
        assert_eq!(file.member(first).unwrap().name, "st-anna");
        assert_eq!(file.member(second), None);
        assert_eq!(file.member_pins().collect::<Vec<_>>(), [second]);

        let mut other = MemberEntry::new("berta", MemberRole::Hospital, first);
        file.members.push(other.clone());
        let (field, _) = file.check().unwrap_err();
        assert_eq!(
            field, "members[1].pin",
            "a key that was given up is not another's"
        );
        other.pin = Pin::from_bytes([11; 32]);
        other.keys = [11, 12, 13].map(|byte| Pin::from_bytes([byte; 32])).into();
        file.members[1] = other;
        let (field, _) = file.check().unwrap_err();
        assert_eq!(field, "members[1].keys");
    }
}
