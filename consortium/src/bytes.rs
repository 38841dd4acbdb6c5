//! Small encodings: hexadecimal text, and ring words as one run of bytes on the wire.

use std::fmt;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    Hex(bytes).to_string()
}

/// Displays bytes as lower-case hexadecimal digits.
#[derive(Clone, Copy)]
pub struct Hex<'a>(pub &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Ring words, little-endian, eight bytes each on the wire. `Debug` shows the number only:
/// they are shares.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Words(pub Vec<u64>);

impl Words {
    /// The words as little-endian bytes.
    pub fn to_bytes(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// Words from little-endian bytes; `None` where the length is not a multiple of eight.
    pub fn from_bytes(bytes: &[u8]) -> Option<Vec<u64>> {
        let (words, rest) = bytes.as_chunks::<8>();
        rest.is_empty()
            .then(|| words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Words[{}]", self.0.len())
    }
}

impl Serialize for Words {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&Words::to_bytes(&self.0))
    }
}

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Words, D::Error> {
        struct Run;
        impl Visitor<'_> for Run {
            type Value = Words;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a run of 8-byte words")
            }

            fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Words, E> {
                Words::from_bytes(bytes).map(Words).ok_or_else(|| {
                    E::custom(format!(
                        "{} bytes are no whole number of words",
                        bytes.len()
                    ))
                })
            }
        }
        deserializer.deserialize_bytes(Run)
    }
}
