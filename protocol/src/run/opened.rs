//! The running hash of everything that was opened in a session: a check that the parties have not
//! diverged, not a defence against a party that lies (`docs/adr/0002-opened-value-hash.md`).
//!
//! BLAKE3, keyed by the hash with which the step began. A long value counts with its own hash, not with
//! its words: it then starts at a block boundary, and many of its blocks are hashed at a time wherever it
//! stands among the others (`docs/adr/0015-cost-of-a-step.md`). Which values are long the plan says.

use std::borrow::Cow;
use std::fmt;

use bytemuck::Pod;

use crate::threads;

/// Values of more bytes count with their own hash.
const SHORT_BYTES: usize = 4096;

/// The hash while a step runs.
pub(super) struct Opened {
    hash: blake3::Hasher,
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
        }
    }

    /// An opened value of `len` words or planes, written as in [`threads::append`] and added, as
    /// little-endian words, run by run.
    pub fn made<T: Pod + Default + Send>(
        &mut self,
        len: usize,
        piece: usize,
        work_ns: usize,
        each: impl Fn(usize, &mut [T]) + Sync,
    ) -> Vec<T> {
        let mut out = Vec::with_capacity(len);
        self.value(size_of::<T>() * len, |hash| {
            threads::append(&mut out, len, piece, work_ns, each, |run| {
                hash.update(&le_bytes(bytemuck::cast_slice(run)));
            });
        });
        out
    }

    /// Adds an opened value that is there already.
    pub fn add(&mut self, words: &[u64]) {
        self.value(size_of_val(words), |hash| {
            hash.update(&le_bytes(words));
        });
    }

    /// Gives `feed` the hash with which a value of so many bytes counts.
    fn value(&mut self, bytes: usize, feed: impl FnOnce(&mut blake3::Hasher)) {
        if bytes <= SHORT_BYTES {
            return feed(&mut self.hash);
        }
        let mut own = blake3::Hasher::new();
        feed(&mut own);
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

/// Words as little-endian bytes.
fn le_bytes(words: &[u64]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        Cow::Borrowed(bytemuck::cast_slice(words))
    } else {
        Cow::Owned(words.iter().flat_map(|word| word.to_le_bytes()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::kernel::Plane;

    const SHORT: usize = SHORT_BYTES / 8;

    fn add<T: Pod + Default + Send + Sync>(opened: &mut Opened, items: &[T]) {
        let made = opened.made(items.len(), 3, 0, |first, run: &mut [T]| {
            run.copy_from_slice(&items[3 * first..][..run.len()]);
        });
        assert!(bytemuck::cast_slice::<T, u8>(&made) == bytemuck::cast_slice::<T, u8>(items));
    }

    #[test]
    fn short_values_count_with_their_words_and_long_ones_with_their_hash_in_order() {
        let before = [7; 32];
        // Longer than what is written at once.
        let words: Vec<u64> = (0..70_001)
            .map(|i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .collect();
        let bytes = |words: &[u64]| -> Vec<u8> {
            words.iter().flat_map(|word| word.to_le_bytes()).collect()
        };
        let planes: Vec<Plane> = words.as_chunks::<8>().0[..3].to_vec();
        let mut opened = Opened::after(&before);
        add(&mut opened, &words[..SHORT]);
        add(&mut opened, &words);
        add(&mut opened, &words[..SHORT + 1]);
        add(&mut opened, &planes);
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
            add(&mut opened, &[1, word, 3]);
            opened.hash()
        };
        assert_eq!(hash(0, 2), hash(0, 2));
        assert_ne!(hash(0, 2), hash(0, 2 | 1 << 63));
        assert_ne!(hash(0, 2), hash(1, 2));
    }
}
