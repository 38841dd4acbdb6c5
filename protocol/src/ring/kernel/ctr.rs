//! AES-128 in counter mode with the counters made in vector registers: the pseudorandom generator's fast path.
//!
//! The definition is `prg.rs`, block by block through the `aes` crate, which is also what runs on machines without
//! VAES. Through any interface of blocks in memory the counters are stored and loaded again, which costs more than
//! the cipher; here four blocks are one vector, made, encrypted and joined to the destination without a copy.
//!
//! All of it is constant time: the key schedule and the rounds are instructions, nothing is looked up.
#![allow(unsafe_code)]

use super::{Isa, isa};

/// How a word of the stream meets the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Join {
    /// `out = word`
    Set,
    /// `out += word`
    Add,
    /// `out -= word`
    Sub,
    /// `out ^= word`
    Xor,
}

/// The round keys of AES-128, for machines with vector AES; `Debug` does not show them.
#[derive(Clone)]
pub struct CtrKeys {
    #[cfg(target_arch = "x86_64")]
    rounds: [std::arch::x86_64::__m128i; 11],
}

impl std::fmt::Debug for CtrKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CtrKeys(..)")
    }
}

impl CtrKeys {
    /// Expands `key`; `None` where the machine, or the instruction set in use, has no vector AES.
    pub fn new(key: &[u8; 16]) -> Option<CtrKeys> {
        Self::new_with(isa(), key)
    }

    /// [`CtrKeys::new`] with a chosen instruction set.
    #[cfg(target_arch = "x86_64")]
    pub fn new_with(isa: Isa, key: &[u8; 16]) -> Option<CtrKeys> {
        let usable = isa.usable() == Isa::Avx512
            && is_x86_feature_detected!("aes")
            && is_x86_feature_detected!("vaes");
        // SAFETY: the features were detected just now.
        usable.then(|| CtrKeys {
            rounds: unsafe { vaes::expand(key) },
        })
    }

    /// [`CtrKeys::new`] with a chosen instruction set.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn new_with(_: Isa, _: &[u8; 16]) -> Option<CtrKeys> {
        None
    }

    /// Joins the encryptions of the counter blocks `high | low`, `high | low + 1`, .. to `out`: two words a block,
    /// of the last block as many as are left. Both halves of a block are big-endian, words are little-endian.
    pub fn stream(&self, high: u64, low: u64, join: Join, out: &mut [u64]) {
        // SAFETY: keys exist only where `new_with` has detected the features.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            match join {
                Join::Set => vaes::stream::<{ Join::Set as u8 }>(&self.rounds, high, low, out),
                Join::Add => vaes::stream::<{ Join::Add as u8 }>(&self.rounds, high, low, out),
                Join::Sub => vaes::stream::<{ Join::Sub as u8 }>(&self.rounds, high, low, out),
                Join::Xor => vaes::stream::<{ Join::Xor as u8 }>(&self.rounds, high, low, out),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (high, low, join, out);
    }
}

#[cfg(target_arch = "x86_64")]
mod vaes {
    use super::Join;
    use std::arch::x86_64::*;

    /// Vectors encrypted at once: with the eleven keys and the counters' constants they fit the 32 registers, and
    /// cover the latency of a round twice.
    const VECTORS: usize = 8;

    /// The round keys (FIPS 197, section 5.2).
    #[target_feature(enable = "aes")]
    pub fn expand(key: &[u8; 16]) -> [__m128i; 11] {
        #[target_feature(enable = "aes")]
        fn next(key: __m128i, assist: __m128i) -> __m128i {
            let mut sums = key;
            for _ in 0..3 {
                sums = _mm_xor_si128(key, _mm_slli_si128::<4>(sums));
            }
            _mm_xor_si128(sums, _mm_shuffle_epi32::<0xff>(assist))
        }
        // SAFETY: 16 bytes.
        let k0 = unsafe { _mm_loadu_si128(key.as_ptr().cast()) };
        let k1 = next(k0, _mm_aeskeygenassist_si128::<0x01>(k0));
        let k2 = next(k1, _mm_aeskeygenassist_si128::<0x02>(k1));
        let k3 = next(k2, _mm_aeskeygenassist_si128::<0x04>(k2));
        let k4 = next(k3, _mm_aeskeygenassist_si128::<0x08>(k3));
        let k5 = next(k4, _mm_aeskeygenassist_si128::<0x10>(k4));
        let k6 = next(k5, _mm_aeskeygenassist_si128::<0x20>(k5));
        let k7 = next(k6, _mm_aeskeygenassist_si128::<0x40>(k6));
        let k8 = next(k7, _mm_aeskeygenassist_si128::<0x80>(k7));
        let k9 = next(k8, _mm_aeskeygenassist_si128::<0x1b>(k8));
        let k10 = next(k9, _mm_aeskeygenassist_si128::<0x36>(k9));
        [k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10]
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,aes,vaes")]
    pub fn stream<const JOIN: u8>(rounds: &[__m128i; 11], high: u64, low: u64, out: &mut [u64]) {
        let mut keys = [_mm512_setzero_si512(); 11];
        for (key, round) in keys.iter_mut().zip(rounds) {
            *key = _mm512_broadcast_i32x4(*round);
        }
        let (high, low) = (high as i64, low as i64);
        // Lanes from the lowest: high, low, high, low + 1, ..
        let first = _mm512_set_epi64(low, high, low, high, low, high, low, high);
        let mut counter = _mm512_add_epi64(first, _mm512_set_epi64(3, 0, 2, 0, 1, 0, 0, 0));
        let four = _mm512_set_epi64(4, 0, 4, 0, 4, 0, 4, 0);
        let reverse = _mm512_set4_epi32(0x0809_0a0b, 0x0c0d_0e0f, 0x0001_0203, 0x0405_0607);
        let mut wide = out.chunks_exact_mut(8 * VECTORS);
        for out in &mut wide {
            let mut state = [counter; VECTORS];
            for state in &mut state {
                *state = _mm512_xor_si512(_mm512_shuffle_epi8(counter, reverse), keys[0]);
                counter = _mm512_add_epi64(counter, four);
            }
            for key in &keys[1..10] {
                for state in &mut state {
                    *state = _mm512_aesenc_epi128(*state, *key);
                }
            }
            for (state, out) in state.iter().zip(out.chunks_exact_mut(8)) {
                let words = _mm512_aesenclast_epi128(*state, keys[10]);
                let at = out.as_mut_ptr().cast::<i64>();
                // SAFETY: eight words.
                unsafe { _mm512_storeu_epi64(at, join::<JOIN>(_mm512_loadu_epi64(at), words)) };
            }
        }
        for out in wide.into_remainder().chunks_mut(8) {
            let mut state = _mm512_xor_si512(_mm512_shuffle_epi8(counter, reverse), keys[0]);
            counter = _mm512_add_epi64(counter, four);
            for key in &keys[1..10] {
                state = _mm512_aesenc_epi128(state, *key);
            }
            let words = _mm512_aesenclast_epi128(state, keys[10]);
            let mask = (0xffu16 >> (8 - out.len())) as __mmask8;
            let at = out.as_mut_ptr().cast::<i64>();
            // SAFETY: the lanes that are not masked off are the words left.
            unsafe {
                let joined = join::<JOIN>(_mm512_maskz_loadu_epi64(mask, at), words);
                _mm512_mask_storeu_epi64(at, mask, joined);
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn join<const JOIN: u8>(old: __m512i, word: __m512i) -> __m512i {
        match JOIN {
            x if x == Join::Add as u8 => _mm512_add_epi64(old, word),
            x if x == Join::Sub as u8 => _mm512_sub_epi64(old, word),
            x if x == Join::Xor as u8 => _mm512_xor_si512(old, word),
            _ => word,
        }
    }
}
