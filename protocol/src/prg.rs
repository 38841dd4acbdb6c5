//! The pseudorandom generator: AES-128 in counter mode, addressed and never consumed in order.
//!
//! Every word has a position: (step, correlation id, domain, word). Two parties that hold the same key compute the
//! same word whenever and in whatever order they ask, so chunks and threads cannot change a stream. This file draws
//! no keys and does not know which positions were used; a `Plan` uses each position at most once, by construction.
//!
//! The 128-bit counter block, most significant bits first:
//! `domain (8) | id (32) | step (40) | block index (48)`; its encryption gives two little-endian words.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use aes::cipher::{BlockCipherEncrypt, KeyInit};
use aes::{Aes128, Block};

use crate::ring::kernel::{CtrKeys, Join};

/// What a stream is for. Streams of different domains never meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Domain {
    /// Words of the ring: additive masks and shares.
    Ring = 1,
    /// Packed bits: XOR masks and shares.
    Bits = 2,
    /// Sharings of zero.
    Zero = 3,
    /// Keys of further streams.
    Seed = 4,
    /// Public or dealer-only coins, such as those of stochastic rounding.
    Coin = 5,
}

/// The address of a stream of words under one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Pos {
    /// The step of the session, below 2^40.
    pub step: u64,
    /// The correlation within the step.
    pub id: u32,
    /// What the words are for.
    pub domain: Domain,
}

/// Bits of the step in a counter block.
const STEP_BITS: u32 = 40;
/// Bits of the block index in a counter block.
const INDEX_BITS: u32 = 48;
/// Blocks encrypted at once: what the widest backend takes, twice.
const BATCH: usize = 128;

/// The generator under one key. `Debug` does not show the key.
#[derive(Clone)]
pub struct Prg {
    cipher: Aes128,
    /// Where the machine has vector AES: the same cipher, several blocks in a register.
    vector: Option<CtrKeys>,
    shifts: Option<Arc<Shifts>>,
}

/// What a test adds to (ring) or XORs into (bits) the words of chosen streams; see
/// `protocol/tests/views.rs`, which shows with it that a view does not depend on the inputs.
pub type Shifts = BTreeMap<(u64, u32), Vec<u64>>;

impl fmt::Debug for Prg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Prg(..)")
    }
}

impl Prg {
    /// The generator under `key`.
    pub fn new(key: [u8; 16]) -> Prg {
        Prg {
            cipher: Aes128::new(&key.into()),
            vector: CtrKeys::new(&key),
            shifts: None,
        }
    }

    /// The generator with shifted words: the seam of the view test, of no use to a deployment.
    #[doc(hidden)]
    pub fn shifted(key: [u8; 16], shifts: Arc<Shifts>) -> Prg {
        Prg {
            shifts: Some(shifts),
            ..Prg::new(key)
        }
    }

    /// Writes words `first_word..` of the stream at `at` to `out`.
    ///
    /// # Panics
    /// Where the step is 2^40 or more, or the words end beyond 2^49: positions beyond would meet others.
    pub fn fill(&self, at: Pos, first_word: u64, out: &mut [u64]) {
        self.stream(at, first_word, out, Join::Set, |_, word| word);
    }

    /// Adds words `first_word..` of the stream at `at` to `out`, wrapping.
    ///
    /// # Panics
    /// As [`Prg::fill`].
    pub fn add(&self, at: Pos, first_word: u64, out: &mut [u64]) {
        self.stream(at, first_word, out, Join::Add, u64::wrapping_add);
    }

    /// Subtracts words `first_word..` of the stream at `at` from `out`, wrapping.
    ///
    /// # Panics
    /// As [`Prg::fill`].
    pub fn sub(&self, at: Pos, first_word: u64, out: &mut [u64]) {
        self.stream(at, first_word, out, Join::Sub, u64::wrapping_sub);
    }

    /// XORs words `first_word..` of the stream at `at` into `out`.
    ///
    /// # Panics
    /// As [`Prg::fill`].
    pub fn xor(&self, at: Pos, first_word: u64, out: &mut [u64]) {
        self.stream(at, first_word, out, Join::Xor, |old, word| old ^ word);
    }

    #[inline(always)]
    fn stream(
        &self,
        at: Pos,
        first_word: u64,
        out: &mut [u64],
        vector_join: Join,
        join: impl Fn(u64, u64) -> u64,
    ) {
        if out.is_empty() {
            return;
        }
        if let Some(shifts) = self
            .shifts
            .as_ref()
            .and_then(|shifts| shifts.get(&(at.step, at.id)))
        {
            return self.shifted_stream(shifts, at, first_word, out, join);
        }
        assert!(at.step >> STEP_BITS == 0, "steps are below 2^{STEP_BITS}");
        let end = first_word.checked_add(out.len() as u64);
        assert!(
            end.is_some_and(|end| end <= 1 << (INDEX_BITS + 1)),
            "words of a stream are below 2^{}",
            INDEX_BITS + 1
        );
        // The step's upper 24 bits share a half of the block with domain and id, its lower 16 with the index.
        let high = (at.domain as u64) << 56 | (at.id as u64) << 24 | at.step >> 16;
        let low = at.step << INDEX_BITS;
        let counter = |index: u64| -> Block {
            let mut block = Block::default();
            block[..8].copy_from_slice(&high.to_be_bytes());
            block[8..].copy_from_slice(&(low | index).to_be_bytes());
            block
        };
        let mut index = first_word / 2;
        let mut rest = out;
        if first_word % 2 == 1 {
            let mut block = counter(index);
            self.cipher.encrypt_block(&mut block);
            let (one, after) = std::mem::take(&mut rest).split_at_mut(1);
            one[0] = join(one[0], words(&block)[1]);
            rest = after;
            index += 1;
        }
        if let Some(keys) = &self.vector {
            return keys.stream(high, low | index, vector_join, rest);
        }
        let mut blocks = [Block::default(); BATCH];
        for piece in rest.chunks_mut(2 * BATCH) {
            let blocks = &mut blocks[..piece.len().div_ceil(2)];
            for block in blocks.iter_mut() {
                *block = counter(index);
                index += 1;
            }
            self.cipher.encrypt_blocks(blocks);
            for (pair, block) in piece.chunks_mut(2).zip(blocks.iter()) {
                for (out, word) in pair.iter_mut().zip(words(block)) {
                    *out = join(*out, word);
                }
            }
        }
    }
}

impl Prg {
    #[cold]
    fn shifted_stream(
        &self,
        shifts: &[u64],
        at: Pos,
        first_word: u64,
        out: &mut [u64],
        join: impl Fn(u64, u64) -> u64,
    ) {
        let unshifted = Prg {
            shifts: None,
            ..self.clone()
        };
        let mut words = vec![0; out.len()];
        unshifted.fill(at, first_word, &mut words);
        for (i, (out, word)) in out.iter_mut().zip(words).enumerate() {
            let shift = shifts.get(first_word as usize + i).copied().unwrap_or(0);
            *out = join(
                *out,
                match at.domain {
                    Domain::Ring => word.wrapping_add(shift),
                    Domain::Bits => word ^ shift,
                    Domain::Zero | Domain::Seed | Domain::Coin => word,
                },
            );
        }
    }
}

/// The two words of an encrypted block.
#[inline(always)]
fn words(block: &Block) -> [u64; 2] {
    let both = u128::from_le_bytes((*block).into());
    [both as u64, (both >> 64) as u64]
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Pos = Pos {
        step: 0x12_3456_789a,
        id: 0xdead_beef,
        domain: Domain::Bits,
    };

    fn prg() -> Prg {
        Prg::new(*b"an unsecret key.")
    }

    fn words_at(at: Pos, first: u64, len: usize) -> Vec<u64> {
        let mut out = vec![0; len];
        prg().fill(at, first, &mut out);
        out
    }

    #[test]
    fn a_word_is_half_an_encrypted_counter_block() {
        let cipher = Aes128::new(&(*b"an unsecret key.").into());
        let first = 2 * 0x1_0203_0405_u64;
        let got = words_at(AT, first, 4);
        for i in 0..2u8 {
            // domain | id | step | index, byte by byte.
            let mut block: Block = [
                2,
                0xde,
                0xad,
                0xbe,
                0xef,
                0x12,
                0x34,
                0x56,
                0x78,
                0x9a,
                0,
                0x01,
                0x02,
                0x03,
                0x04,
                0x05 + i,
            ]
            .into();
            cipher.encrypt_block(&mut block);
            let at = 2 * i as usize;
            assert_eq!(got[at].to_le_bytes(), block[..8]);
            assert_eq!(got[at + 1].to_le_bytes(), block[8..]);
        }
    }

    #[test]
    fn the_cipher_is_aes_128() {
        // FIPS 197, appendix C.1.
        let key: [u8; 16] = std::array::from_fn(|i| i as u8);
        let mut block: Block = std::array::from_fn(|i| (i * 0x11) as u8).into();
        Prg::new(key).cipher.encrypt_block(&mut block);
        assert_eq!(
            u128::from_be_bytes(block.into()),
            0x69c4_e0d8_6a7b_0430_d8cd_b780_70b4_c55a
        );
    }

    #[test]
    fn any_slice_of_a_stream_can_be_asked_for_alone() {
        let long = words_at(AT, 0, 2000);
        for first in [0usize, 1, 2, 3, 127, 255, 256, 257, 511, 1001] {
            for len in [0usize, 1, 2, 3, 7, 255, 256, 257, 513, 999] {
                assert_eq!(
                    words_at(AT, first as u64, len),
                    long[first..first + len],
                    "{first}+{len}"
                );
            }
        }
    }

    #[test]
    fn the_vector_path_and_the_block_cipher_give_the_same_words() {
        let by_blocks = Prg {
            vector: None,
            ..prg()
        };
        type JoinWords = fn(&Prg, Pos, u64, &mut [u64]);
        let joins: [JoinWords; 4] = [Prg::fill, Prg::add, Prg::sub, Prg::xor];
        let last = (1 << 49) - 700;
        for (step, first) in [(0, 0), (0x7fff, 1), (0xffff, last), (3, last + 1), (1, 254)] {
            let at = Pos { step, ..AT };
            for len in [1, 2, 3, 7, 8, 9, 16, 63, 64, 65, 127, 128, 255, 512, 699] {
                for join in joins {
                    let mut vector: Vec<u64> = (0..len).collect();
                    let mut blocks = vector.clone();
                    join(&prg(), at, first, &mut vector);
                    join(&by_blocks, at, first, &mut blocks);
                    assert_eq!(vector, blocks, "{step}:{first}+{len}");
                }
            }
        }
    }

    #[test]
    fn add_sub_and_xor_join_the_same_words() {
        let (stream, start) = (words_at(AT, 5, 600), words_at(Pos { id: 1, ..AT }, 0, 600));
        let check = |got: Vec<u64>, join: fn(u64, u64) -> u64| {
            let want: Vec<u64> = start
                .iter()
                .zip(&stream)
                .map(|(&a, &b)| join(a, b))
                .collect();
            assert_eq!(got, want);
        };
        let run = |f: &dyn Fn(&mut [u64])| {
            let mut out = start.clone();
            f(&mut out);
            out
        };
        check(run(&|out| prg().add(AT, 5, out)), u64::wrapping_add);
        check(run(&|out| prg().sub(AT, 5, out)), u64::wrapping_sub);
        check(run(&|out| prg().xor(AT, 5, out)), |a, b| a ^ b);
    }

    #[test]
    fn different_positions_and_keys_give_different_streams() {
        let mut seen = std::collections::BTreeSet::new();
        let domains = [
            Domain::Ring,
            Domain::Bits,
            Domain::Zero,
            Domain::Seed,
            Domain::Coin,
        ];
        let mut count = 0;
        for domain in domains {
            for id in [0, 1, u32::MAX] {
                for step in [0, 1, 1 << 16, (1 << 40) - 1] {
                    for first in [0, 2, (1 << 49) - 2] {
                        seen.insert(words_at(Pos { step, id, domain }, first, 2));
                        count += 1;
                    }
                }
            }
        }
        let mut other = vec![0; 2];
        Prg::new([7; 16]).fill(AT, 0, &mut other);
        seen.insert(other);
        assert_eq!(seen.len(), count + 1);
    }

    #[test]
    #[should_panic(expected = "steps are below")]
    fn a_step_that_does_not_fit_is_refused() {
        words_at(
            Pos {
                step: 1 << 40,
                ..AT
            },
            0,
            1,
        );
    }

    #[test]
    #[should_panic(expected = "words of a stream")]
    fn a_word_that_does_not_fit_is_refused() {
        words_at(AT, (1 << 49) - 1, 2);
    }

    #[test]
    fn debug_does_not_show_the_key() {
        assert_eq!(format!("{:?}", prg()), "Prg(..)");
    }
}
