//! What the processor's multipliers can do at the most: wrapping 64-bit multiply-adds on registers alone.
//!
//! Each loop uses the instructions of its set's register tile, with more sums than an instruction's latency needs
//! and nothing read from memory. No product can be faster; `trefoil bench` holds the kernels against it.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::arch::{asm, x86_64::*};
use std::hint::black_box;

use super::{Isa, isa};

/// Makes `turns` turns of [`PEAK_TURN`] wrapping multiply-adds with the instruction set in use: every sum starts at 0
/// and gains `a * b` a turn. Gives the sums together: `turns * PEAK_TURN * a * b`, wrapping.
pub fn peak(turns: u32, a: u64, b: u64) -> u64 {
    peak_with(isa(), turns, a, b)
}

/// Multiply-adds in a turn of [`peak`].
pub const PEAK_TURN: usize = 96;

/// [`peak`] with a chosen instruction set.
pub fn peak_with(isa: Isa, turns: u32, a: u64, b: u64) -> u64 {
    match isa.usable() {
        // SAFETY: `usable` has shown that the machine has AVX-512.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512_peak(turns, a, b) },
        // SAFETY: `usable` has shown that the machine has AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2_peak(turns, a, b) },
        _ => portable_peak(turns, a, b),
    }
}

/// Operands that the compiler must take for unknown, and for new ones each time.
fn portable_peak(turns: u32, a: u64, b: u64) -> u64 {
    let mut sums = [0u64; 8];
    let a = black_box([a; 8]);
    for _ in 0..u64::from(turns) * (PEAK_TURN / 8) as u64 {
        let b = black_box(b);
        for (sum, a) in sums.iter_mut().zip(a) {
            *sum = sum.wrapping_add(a.wrapping_mul(b));
        }
    }
    sums.iter().fold(0, |all, sum| all.wrapping_add(*sum))
}

/// Twelve sums of eight words. A product is added six products later, and products and sums come in pairs: of the
/// orders tried on Zen 4 the one that keeps the multiplier busiest.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
fn avx512_peak(turns: u32, a: u64, b: u64) -> u64 {
    let zero = _mm512_setzero_si512();
    let (mut sums, mut late) = ([zero; 12], [zero; 6]);
    let [s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11] = &mut sums;
    let [p0, p1, p2, p3, p4, p5] = &mut late;
    // SAFETY: registers only; a turn is skipped where there are none.
    unsafe {
        asm!(
            "test {turns:e}, {turns:e}",
            "jz 3f",
            "2:",
            "vpaddq zmm18, zmm18, zmm6",
            "vpmullq zmm0, zmm28, zmm29",
            "vpmullq zmm1, zmm28, zmm29",
            "vpaddq zmm19, zmm19, zmm7",
            "vpaddq zmm20, zmm20, zmm8",
            "vpmullq zmm2, zmm28, zmm29",
            "vpmullq zmm3, zmm28, zmm29",
            "vpaddq zmm21, zmm21, zmm9",
            "vpaddq zmm22, zmm22, zmm10",
            "vpmullq zmm4, zmm28, zmm29",
            "vpmullq zmm5, zmm28, zmm29",
            "vpaddq zmm23, zmm23, zmm11",
            "vpaddq zmm12, zmm12, zmm0",
            "vpmullq zmm6, zmm28, zmm29",
            "vpmullq zmm7, zmm28, zmm29",
            "vpaddq zmm13, zmm13, zmm1",
            "vpaddq zmm14, zmm14, zmm2",
            "vpmullq zmm8, zmm28, zmm29",
            "vpmullq zmm9, zmm28, zmm29",
            "vpaddq zmm15, zmm15, zmm3",
            "vpaddq zmm16, zmm16, zmm4",
            "vpmullq zmm10, zmm28, zmm29",
            "vpmullq zmm11, zmm28, zmm29",
            "vpaddq zmm17, zmm17, zmm5",
            "dec {turns:e}",
            "jnz 2b",
            "3:",
            turns = inout(reg) turns => _,
            in("zmm28") _mm512_set1_epi64(a as i64),
            in("zmm29") _mm512_set1_epi64(b as i64),
            out("zmm0") _,
            out("zmm1") _,
            out("zmm2") _,
            out("zmm3") _,
            out("zmm4") _,
            out("zmm5") _,
            inout("zmm6") *p0,
            inout("zmm7") *p1,
            inout("zmm8") *p2,
            inout("zmm9") *p3,
            inout("zmm10") *p4,
            inout("zmm11") *p5,
            inout("zmm12") *s0,
            inout("zmm13") *s1,
            inout("zmm14") *s2,
            inout("zmm15") *s3,
            inout("zmm16") *s4,
            inout("zmm17") *s5,
            inout("zmm18") *s6,
            inout("zmm19") *s7,
            inout("zmm20") *s8,
            inout("zmm21") *s9,
            inout("zmm22") *s10,
            inout("zmm23") *s11,
            options(nomem, nostack),
        );
    }
    let all = sums.into_iter().chain(late);
    _mm512_reduce_add_epi64(all.fold(zero, |all, sum| _mm512_add_epi64(all, sum))) as u64
}

/// Two sums of four words, each kept as in `avx2.rs`: whole products of the low halves, and cross products.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2_peak(turns: u32, a: u64, b: u64) -> u64 {
    let zero = _mm256_setzero_si256();
    let (mut sums, mut late) = ([zero; 4], [zero; 4]);
    let [s0, s1, s2, s3] = &mut sums;
    let [p0, p1, p2, p3] = &mut late;
    let b = _mm256_set1_epi64x(b as i64);
    // Sixteen multiply-adds a pass.
    let passes = u64::from(turns) * (PEAK_TURN / 16) as u64;
    // SAFETY: registers only; a pass is skipped where there are none.
    unsafe {
        asm!(
            "test {passes}, {passes}",
            "jz 3f",
            "2:",
            "vpaddq ymm8, ymm8, ymm4",
            "vpmuludq ymm0, ymm14, ymm15",
            "vpmulld ymm1, ymm14, ymm13",
            "vpaddd ymm9, ymm9, ymm5",
            "vpaddq ymm10, ymm10, ymm6",
            "vpmuludq ymm2, ymm14, ymm15",
            "vpmulld ymm3, ymm14, ymm13",
            "vpaddd ymm11, ymm11, ymm7",
            "vpaddq ymm8, ymm8, ymm0",
            "vpmuludq ymm4, ymm14, ymm15",
            "vpmulld ymm5, ymm14, ymm13",
            "vpaddd ymm9, ymm9, ymm1",
            "vpaddq ymm10, ymm10, ymm2",
            "vpmuludq ymm6, ymm14, ymm15",
            "vpmulld ymm7, ymm14, ymm13",
            "vpaddd ymm11, ymm11, ymm3",
            "dec {passes}",
            "jnz 2b",
            "3:",
            passes = inout(reg) passes => _,
            in("ymm14") _mm256_set1_epi64x(a as i64),
            in("ymm15") b,
            in("ymm13") _mm256_shuffle_epi32::<0b10_11_00_01>(b),
            out("ymm0") _,
            out("ymm1") _,
            out("ymm2") _,
            out("ymm3") _,
            inout("ymm4") *p0,
            inout("ymm5") *p1,
            inout("ymm6") *p2,
            inout("ymm7") *p3,
            inout("ymm8") *s0,
            inout("ymm9") *s1,
            inout("ymm10") *s2,
            inout("ymm11") *s3,
            options(nomem, nostack),
        );
    }
    // Even registers hold products of low halves, odd ones cross products.
    let mut total = 0u64;
    for (i, sum) in sums.into_iter().chain(late).enumerate() {
        let mut words = [0u64; 4];
        // SAFETY: four words.
        unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), sum) };
        for word in words {
            let cross = (word >> 32).wrapping_add(word) << 32;
            total = total.wrapping_add(if i % 2 == 0 { word } else { cross });
        }
    }
    total
}
