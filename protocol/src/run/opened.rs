//! The running hash of everything that was opened in a session: a check that the parties have not
//! diverged, not a defence against a party that lies (`docs/adr/0002-opened-value-hash.md`).
//!
//! BLAKE3, keyed by the hash with which the step began: every step starts at a block boundary, and
//! long values are hashed many blocks at a time (`docs/adr/0015-cost-of-a-step.md`).

use std::fmt;

use crate::ring::kernel::Plane;

use super::value::Value;

/// Words turned into bytes at once: the hash is fastest on runs of several blocks of 1,024 bytes,
/// and these stay in the core's first caches.
const WORDS_AT_ONCE: usize = 4096;

/// The hash while a step runs.
pub(super) struct Opened {
    hash: blake3::Hasher,
    bytes: Vec<u8>,
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Opened(..)")
    }
}

impl Opened {
    /// Goes on from what was opened in the steps before.
    pub fn after(before: &[u8; 32]) -> Opened {
        Opened {
            hash: blake3::Hasher::new_keyed(before),
            bytes: Vec::new(),
        }
    }

    /// Adds an opened value, as little-endian words.
    pub fn add(&mut self, value: &Value<'_>) {
        match value {
            Value::Ring(words) => self.add_words(words),
            Value::Bits(planes) => self.add_words(<[Plane]>::as_flattened(planes)),
            Value::Stream(_) => unreachable!("what is opened is stored"),
        }
    }

    fn add_words(&mut self, words: &[u64]) {
        for words in words.chunks(WORDS_AT_ONCE) {
            let len = 8 * words.len();
            if self.bytes.len() < len {
                self.bytes.resize(len, 0);
            }
            for (bytes, word) in self.bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
                *bytes = word.to_le_bytes();
            }
            self.hash.update(&self.bytes[..len]);
        }
    }

    /// The hash so far.
    pub fn hash(&self) -> [u8; 32] {
        self.hash.finalize().into()
    }

    /// .. as it travels in frames and with output shares: its first 16 bytes.
    pub fn short(&self) -> [u8; 16] {
        let mut short = [0; 16];
        short.copy_from_slice(&self.hash()[..16]);
        short
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_that_of_all_words_in_order_under_the_hash_before() {
        let before = [7; 32];
        let words: Vec<u64> = (0..2 * WORDS_AT_ONCE as u64 + 5)
            .map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .collect();
        let planes: Vec<Plane> = words.as_chunks::<8>().0[..3].to_vec();
        let mut opened = Opened::after(&before);
        opened.add(&Value::from(words.clone()));
        opened.add(&Value::Bits(planes));
        let bytes: Vec<u8> = words
            .iter()
            .chain(&words[..24])
            .flat_map(|word| word.to_le_bytes())
            .collect();
        assert_eq!(
            opened.hash(),
            *blake3::keyed_hash(&before, &bytes).as_bytes()
        );
        assert_eq!(opened.short(), opened.hash()[..16]);
    }

    #[test]
    fn one_changed_bit_and_another_past_change_the_hash() {
        let hash = |before: u8, word: u64| {
            let mut opened = Opened::after(&[before; 32]);
            opened.add(&Value::from(vec![1, word, 3]));
            opened.hash()
        };
        assert_eq!(hash(0, 2), hash(0, 2));
        assert_ne!(hash(0, 2), hash(0, 2 | 1 << 63));
        assert_ne!(hash(0, 2), hash(1, 2));
    }
}
