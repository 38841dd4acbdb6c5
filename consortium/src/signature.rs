//! Signatures under the two parts of a consortium file, one line each:
//!
//! ```text
//! trefoil-signature v1 of=members number=3 by=north-clinic hash=9f… key=04… signature=30… check=1b2c3d4e
//! ```
//!
//! All four nodes sign the core, the three parties sign the members. A line holds nothing secret and
//! may be mailed. What exactly is signed: `ConsortiumFile::hash_of`.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::identity::{IdentityError, Signature, Signer};
use crate::{ConsortiumFile, check_name, hex, line};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::Identity;

/// What every signature starts with.
const MARK: &str = "trefoil-signature";
/// The format's version.
const VERSION: &str = "v1";
/// Most signatures in one text.
const LINES_MAX: usize = 100;

/// Which part of a consortium file is signed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Parties, dealer, ring.
    Core,
    /// Hospitals and analysts.
    Members,
}

impl Part {
    /// Who has to sign it.
    pub fn signers(self) -> &'static [Peer] {
        const ALL: [Peer; 4] = [
            Peer::Party(PartyId::P0),
            Peer::Party(PartyId::P1),
            Peer::Party(PartyId::P2),
            Peer::Dealer,
        ];
        match self {
            Part::Core => &ALL,
            Part::Members => &ALL[..3],
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Core => "core",
            Part::Members => "members",
        })
    }
}

/// One node's signature under one part of a consortium file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignatureLine {
    /// What is signed.
    pub of: Part,
    /// The members' number; 0 for the core.
    pub number: u64,
    /// The node that signs, by its name in the core.
    pub by: String,
    /// Hash of what is signed.
    pub hash: [u8; 32],
    signature: Signature,
}

/// The signatures in a file. Their order means nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Signatures {
    /// Under the core.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub core: Vec<SignatureLine>,
    /// Under the members.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<SignatureLine>,
}

impl Signatures {
    /// Those under one part.
    pub fn of(&self, part: Part) -> &Vec<SignatureLine> {
        match part {
            Part::Core => &self.core,
            Part::Members => &self.members,
        }
    }

    /// Those under one part, to be changed.
    pub fn of_mut(&mut self, part: Part) -> &mut Vec<SignatureLine> {
        match part {
            Part::Core => &mut self.core,
            Part::Members => &mut self.members,
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.core.is_empty() && self.members.is_empty()
    }
}

/// What is wrong with the signatures of a consortium file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureFault {
    /// Somebody has not signed yet.
    #[error(
        "{part}: not signed by {}: each of them runs `trefoil consortium sign FILE --home DIR`",
        names.join(", ")
    )]
    Missing {
        /// Which part.
        part: Shown,
        /// By whom, names in the core.
        names: Vec<String>,
    },
    /// A signature under something else: the file was changed after it was signed.
    #[error(
        "{part}: the signature of {by} is under other content (hash {signed}, the file's is {found}): \
         the file was changed after it was signed, and has to be signed again"
    )]
    Other {
        /// Which part.
        part: Shown,
        /// Whose signature.
        by: String,
        /// The start of the hash that was signed.
        signed: String,
        /// The start of the file's own hash.
        found: String,
    },
    /// A signature that does not hold.
    #[error(
        "{part}: the signature of {by} does not hold: it was made with another key than the core \
         names, or altered; compare the pin of {by} by phone"
    )]
    Bad {
        /// Which part.
        part: Shown,
        /// Whose signature it should be.
        by: String,
    },
    /// A signature of somebody who does not sign this part, or a second one of the same node.
    #[error("{part}: the signature of {by:?} does not belong there: take it out")]
    Stranger {
        /// Which part.
        part: Shown,
        /// The name in the signature.
        by: String,
    },
}

/// A part of a file as people name it: `core`, or `members number 3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shown(pub Part, pub u64);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Part::Core => f.write_str("core"),
            Part::Members => write!(f, "members number {}", self.1),
        }
    }
}

/// Why a text holds no usable signature.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("signature {number}: {detail}")]
pub struct LineError {
    /// Which signature of the text, from 1.
    pub number: usize,
    /// What is wrong with it, and what to do.
    pub detail: String,
}

impl SignatureLine {
    /// Signs a part of `file` as the node called `by`.
    pub fn sign(
        file: &ConsortiumFile,
        of: Part,
        by: &str,
        signer: &Signer,
    ) -> Result<SignatureLine, IdentityError> {
        let hash = file.hash_of(of);
        Ok(SignatureLine {
            of,
            number: number(file, of),
            by: by.into(),
            hash,
            signature: signer.sign(&message(of, &hash))?,
        })
    }

    /// All signatures in a text, in order; what stands around them is left alone.
    pub fn parse_all(text: &str) -> Result<Vec<SignatureLine>, LineError> {
        let text = line::ironed(text);
        let bodies = text.split(MARK).skip(1).enumerate();
        bodies
            .map(|(at, body)| {
                let number = at + 1;
                let wrong = |detail| LineError { number, detail };
                if number > LINES_MAX {
                    return Err(wrong(format!("at most {LINES_MAX} signatures are read")));
                }
                parse(body).map_err(wrong)
            })
            .collect()
    }

    fn body(&self) -> String {
        let number = match self.of {
            Part::Core => String::new(),
            Part::Members => format!(" number={}", self.number),
        };
        let (key, signature) = self.signature.parts();
        format!(
            "{MARK} {VERSION} of={}{number} by={} hash={} key={} signature={}",
            self.of,
            self.by,
            hex(&self.hash),
            hex(key),
            hex(signature)
        )
    }

    fn check_sum(&self) -> String {
        line::check_sum(b"trefoil signature v1\0", &self.body())
    }
}

impl fmt::Display for SignatureLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} check={}", self.body(), self.check_sum())
    }
}

impl Serialize for SignatureLine {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SignatureLine {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<SignatureLine, D::Error> {
        let text = String::deserialize(deserializer)?;
        let mut lines = SignatureLine::parse_all(&text).map_err(serde::de::Error::custom)?;
        match (lines.pop(), lines.is_empty()) {
            (Some(line), true) => Ok(line),
            _ => Err(serde::de::Error::custom(
                "expected one trefoil-signature line in each string",
            )),
        }
    }
}

fn parse(body: &str) -> Result<SignatureLine, String> {
    let keys = ["of", "number", "by", "hash", "key", "signature", "check"];
    let [of, number, by, hash, key, signature, check] = line::fields(body, VERSION, &keys)?;
    let bytes = |value: Option<String>, key: &str| {
        let value = line::given(value, key)?;
        unhex(&value).ok_or_else(|| format!("{key} is no hexadecimal number; copy the whole line"))
    };
    let of = match line::given(of, "of")?.as_str() {
        "core" => Part::Core,
        "members" => Part::Members,
        other => return Err(format!("is of {other:?}; core and members are signed")),
    };
    let number = match (of, number) {
        (Part::Core, None) => 0,
        (Part::Core, Some(_)) => return Err("is of the core and has a number".into()),
        (Part::Members, number) => line::given(number, "number")?
            .parse()
            .map_err(|err| format!("number: {err}"))?,
    };
    let by = line::given(by, "by")?;
    check_name(&by)?;
    let hash = bytes(hash, "hash")?;
    let line = SignatureLine {
        of,
        number,
        by,
        hash: hash.try_into().map_err(|_| "hash has not 64 digits")?,
        signature: Signature::from_parts(bytes(key, "key")?, bytes(signature, "signature")?),
    };
    line::check(check, &line.check_sum())?;
    Ok(line)
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let byte = |pair: &[u8; 2]| u8::try_from(digit(pair[0])? << 4 | digit(pair[1])?).ok();
    rest.is_empty()
        .then(|| pairs.iter().map(byte).collect())
        .flatten()
}

fn number(file: &ConsortiumFile, of: Part) -> u64 {
    match of {
        Part::Core => 0,
        Part::Members => file.members_number,
    }
}

fn message(of: Part, hash: &[u8; 32]) -> Vec<u8> {
    let domain: &[u8] = match of {
        Part::Core => b"trefoil consortium core signature v1\0",
        Part::Members => b"trefoil consortium members signature v1\0",
    };
    [domain, hash].concat()
}

impl ConsortiumFile {
    /// Checks one signature: it is of a node that signs this part, under what the file says now,
    /// and made with the key that the core names.
    pub fn verify_line(&self, line: &SignatureLine) -> Result<(), SignatureFault> {
        let (of, by) = (line.of, line.by.clone());
        let part = Shown(of, number(self, of));
        let signer = of
            .signers()
            .iter()
            .find(|peer| self.node(**peer).name == by);
        let Some(signer) = signer else {
            return Err(SignatureFault::Stranger { part, by });
        };
        let hash = self.hash_of(of);
        if line.hash != hash || line.number != part.1 {
            let start = |hash: &[u8; 32]| hex(&hash[..8]);
            let (signed, found) = (start(&line.hash), start(&hash));
            return Err(SignatureFault::Other {
                part,
                by,
                signed,
                found,
            });
        }
        line.signature
            .verify(self.node(*signer).pin, &message(of, &hash))
            .map_err(|_| SignatureFault::Bad { part, by })
    }

    /// Names of those who have not signed a part yet, in the order of the core. Signatures are not
    /// checked here.
    pub fn unsigned(&self, of: Part) -> Vec<String> {
        let signed = |name: &str| self.signatures.of(of).iter().any(|line| line.by == name);
        let names = of.signers().iter().map(|peer| &self.node(*peer).name);
        names.filter(|name| !signed(name)).cloned().collect()
    }

    /// Checks the signatures of all four nodes under the core and of the three parties under the
    /// members; any other or second one is an error as well.
    pub fn verify(&self) -> Result<(), SignatureFault> {
        for of in [Part::Core, Part::Members] {
            let part = Shown(of, number(self, of));
            let lines = self.signatures.of(of);
            for (at, line) in lines.iter().enumerate() {
                let twice = lines[..at].iter().any(|other| other.by == line.by);
                if twice || line.of != of {
                    let by = line.by.clone();
                    return Err(SignatureFault::Stranger { part, by });
                }
                self.verify_line(line)?;
            }
            let names = self.unsigned(of);
            if !names.is_empty() {
                return Err(SignatureFault::Missing { part, names });
            }
        }
        Ok(())
    }

    /// The file with the signatures of `identities`: for whoever has all keys, as a local cluster.
    pub fn signed_by<'a>(
        mut self,
        identities: impl IntoIterator<Item = &'a Identity>,
    ) -> Result<ConsortiumFile, IdentityError> {
        for identity in identities {
            self.sign(&Signer::new(identity)?)?;
        }
        Ok(self)
    }

    /// Signs everything that the node with this key signs; an earlier signature of it is replaced.
    /// Returns the lines, none where no node of the core has the key.
    pub fn sign(&mut self, signer: &Signer) -> Result<Vec<SignatureLine>, IdentityError> {
        let mut made = Vec::new();
        for of in [Part::Core, Part::Members] {
            let node = of.signers().iter().map(|peer| self.node(*peer));
            let Some(name) = node
                .filter(|node| node.pin == signer.pin())
                .map(|node| node.name.clone())
                .next()
            else {
                continue;
            };
            let line = SignatureLine::sign(self, of, &name, signer)?;
            let lines = self.signatures.of_mut(of);
            lines.retain(|line| line.by != name);
            lines.push(line.clone());
            made.push(line);
        }
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Core, Member, MemberEntry, MemberRole, identity};
    use trefoil_transport::Pin;

    fn made(name: &str) -> (Identity, Member) {
        let made = identity::generate(name).unwrap();
        let pin = identity::pin(&made).unwrap();
        let address = "127.0.0.1:1".into();
        let member = Member {
            name: name.into(),
            pin,
            address,
        };
        (made, member)
    }

    /// A file that all have signed, and the signers of P0, P1, P2 and the dealer.
    fn signed() -> (ConsortiumFile, [Signer; 4]) {
        let [north, west, east, notary] = ["north", "west", "east", "notary"].map(made);
        let signers =
            [&north, &west, &east, &notary].map(|(identity, _)| Signer::new(identity).unwrap());
        let core = Core {
            name: "test".into(),
            ring_bits: 64,
            parties: [north.1, west.1, east.1],
            dealer: notary.1,
        };
        let member = MemberEntry::new("st-anna", MemberRole::Hospital, Pin::from_bytes([9; 32]));
        let mut file = ConsortiumFile::new(core, vec![member]);
        for signer in &signers {
            file.sign(signer).unwrap();
        }
        (file, signers)
    }

    fn fault(change: impl FnOnce(&mut ConsortiumFile, &[Signer; 4])) -> String {
        let (mut file, signers) = signed();
        file.verify().unwrap();
        change(&mut file, &signers);
        file.verify().unwrap_err().to_string()
    }

    #[test]
    fn all_four_sign_the_core_and_the_parties_the_members() {
        let (file, _) = signed();
        assert_eq!(
            (file.signatures.core.len(), file.signatures.members.len()),
            (4, 3)
        );
        // What is written is read, and advice may change.
        let mut read: ConsortiumFile = toml::from_str(&file.to_toml()).unwrap();
        assert_eq!(read, file);
        read.core.dealer.address = "elsewhere:1".into();
        read.verify().unwrap();
    }

    #[test]
    fn a_missing_signature_is_named_whoever_it_is_of() {
        let text = fault(|file, _| file.signatures = Signatures::default());
        assert!(text.contains("north, west, east, notary"), "{text}");
        let text = fault(|file, _| drop(file.signatures.core.pop()));
        assert!(text.contains("core: not signed by notary"), "{text}");
        let text = fault(|file, _| drop(file.signatures.members.remove(1)));
        assert!(
            text.contains("members number 1: not signed by west"),
            "{text}"
        );
    }

    #[test]
    fn a_file_that_was_changed_after_it_was_signed_is_refused() {
        for change in [
            |file: &mut ConsortiumFile| file.core.ring_bits = 48,
            |file: &mut ConsortiumFile| file.core.name = "other".into(),
            |file: &mut ConsortiumFile| file.core.dealer.pin = Pin::from_bytes([7; 32]),
        ] {
            let text = fault(|file, _| change(file));
            assert!(
                text.contains("core: the signature of north is under other"),
                "{text}"
            );
        }
        for change in [
            |file: &mut ConsortiumFile| file.members_number = 2,
            |file: &mut ConsortiumFile| file.members.clear(),
            |file: &mut ConsortiumFile| file.members[0].name = "berta".into(),
            |file: &mut ConsortiumFile| file.members[0].role = MemberRole::Analyst,
            |file: &mut ConsortiumFile| file.members[0].pin = Pin::from_bytes([8; 32]),
            |file: &mut ConsortiumFile| file.members[0].keys = vec![Pin::from_bytes([8; 32])],
        ] {
            let text = fault(|file, _| change(file));
            assert!(
                text.contains(": the signature of north is under other"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_signature_with_another_key_or_of_somebody_else_is_refused() {
        // West signs in the name of east.
        let text = fault(|file, signers| {
            let forged = SignatureLine::sign(file, Part::Members, "east", &signers[1]);
            file.signatures.members[2] = forged.unwrap();
        });
        assert!(text.contains("signature of east"), "{text}");
        assert!(text.contains("does not hold"), "{text}");
        // The signature of the core in the place of the members'.
        let text = fault(|file, _| {
            let mut other = file.signatures.core[0].clone();
            (other.of, other.number, other.hash) = (Part::Members, 1, file.hash_of(Part::Members));
            file.signatures.members[0] = other;
        });
        assert!(text.contains("signature of north"), "{text}");
        // The dealer has no word on the members.
        let text = fault(|file, signers| {
            let line = SignatureLine::sign(file, Part::Members, "notary", &signers[3]);
            file.signatures.members.push(line.unwrap());
        });
        assert!(text.contains("\"notary\""), "{text}");
        let text = fault(|file, _| {
            let again = file.signatures.members[0].clone();
            file.signatures.members.push(again);
        });
        assert!(text.contains("\"north\""), "{text}");
    }

    #[test]
    fn a_key_of_no_node_signs_nothing() {
        let (mut file, _) = signed();
        let (stranger, _) = made("stranger");
        let lines = file.sign(&Signer::new(&stranger).unwrap()).unwrap();
        assert_eq!(lines, []);
    }

    #[test]
    fn lines_are_read_as_they_are_written_and_accidents_are_found() {
        let (file, _) = signed();
        let line = &file.signatures.members[1];
        let text = line.to_string();
        let mailed = format!("Hello,\n> {}\nBest\n", text.replace(" key=", "\r\n> key="));
        assert_eq!(
            SignatureLine::parse_all(&mailed).unwrap(),
            std::slice::from_ref(line)
        );
        assert_eq!(SignatureLine::parse_all("no signatures").unwrap(), []);
        let wrong = |text: String| SignatureLine::parse_all(&text).unwrap_err().to_string();
        assert!(wrong(text.replace("by=west", "by=east")).contains("altered"));
        assert!(wrong(text.replace("of=members", "of=core")).contains("has a number"));
        assert!(wrong(text.replace("of=members", "of=all")).contains("\"all\""));
        assert!(wrong(text.replace(" v1 ", " v7 ")).contains("v7"));
        assert!(wrong(text[..200].into()).contains("cut off"));
        assert!(wrong(text.replace("key=04", "key=0")).contains("hexadecimal"));
    }
}
