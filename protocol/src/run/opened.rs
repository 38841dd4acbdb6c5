//! The running hash of everything that was opened in a session: a check that the parties have not
//! diverged, not a defence against a party that lies (`docs/adr/0002-opened-value-hash.md`).
//!
//! BLAKE3, keyed by the hash with which the step began. A long value counts with its own hash, not with
//! its words: it then starts at a block boundary, and many of its blocks are hashed at a time wherever it
//! stands among the others (`docs/adr/0015-cost-of-a-step.md`). Which values are long the plan says.

use std::fmt;

use crate::ring::kernel::Plane;

use super::value::Value;

/// Words turned into bytes at once: the hash is fastest on long runs of blocks of 1,024 bytes, a power of
/// two, and these stay in the core's own caches.
const WORDS_AT_ONCE: usize = 8192;
/// Values of more words count with their own hash.
const SHORT: usize = 512;

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
        if words.len() <= SHORT {
            return update(&mut self.hash, &mut self.bytes, words);
        }
        let mut own = blake3::Hasher::new();
        update(&mut own, &mut self.bytes, words);
        self.hash.update(own.finalize().as_bytes());
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

/// Adds words, which become bytes in `bytes` first.
fn update(hash: &mut blake3::Hasher, bytes: &mut Vec<u8>, words: &[u64]) {
    for words in words.chunks(WORDS_AT_ONCE) {
        let len = 8 * words.len();
        if bytes.len() < len {
            bytes.resize(len, 0);
        }
        for (bytes, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
        hash.update(&bytes[..len]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_values_count_with_their_words_and_long_ones_with_their_hash_in_order() {
        let before = [7; 32];
        let words: Vec<u64> = (0..2 * WORDS_AT_ONCE as u64 + 5)
            .map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .collect();
        let bytes = |words: &[u64]| -> Vec<u8> {
            words.iter().flat_map(|word| word.to_le_bytes()).collect()
        };
        let planes: Vec<Plane> = words.as_chunks::<8>().0[..3].to_vec();
        let mut opened = Opened::after(&before);
        opened.add(&Value::from(words[..SHORT].to_vec()));
        opened.add(&Value::from(words.clone()));
        opened.add(&Value::from(words[..SHORT + 1].to_vec()));
        opened.add(&Value::Bits(planes));
        let mut all = bytes(&words[..SHORT]);
        for long in [&words[..], &words[..SHORT + 1]] {
            all.extend(blake3::hash(&bytes(long)).as_bytes());
        }
        all.extend(bytes(&words[..24]));
        assert_eq!(opened.hash(), *blake3::keyed_hash(&before, &all).as_bytes());
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
