//! Bit planes: words cut into planes of one bit of each of 512 elements, and back.
//!
//! Plane `i` of a block holds bit `i` of its elements; bit `j % 64` of word `j / 64` belongs to element `j`. A plane
//! is one 512-bit vector, so the loops here are plain arrays of eight words that the compiler turns into vectors of
//! whatever width the machine has; there is nothing to write by hand. Circuits over planes are in `gates.rs`.
#![allow(unsafe_code)]

use super::{Isa, isa};

/// One bit of each element of a block.
pub type Plane = [u64; 8];

/// Elements of a block.
pub const BLOCK: usize = 512;

/// Writes bit `lo + i` of `src[j] + offset` (wrapping) to bit `j` of `out[i]`. Missing elements count as zero words
/// without the offset.
///
/// # Panics
/// Where `src` is longer than a block, or bits above 64 are asked for.
pub fn to_planes(src: &[u64], offset: u64, lo: u32, out: &mut [Plane]) {
    to_planes_with(isa(), src, offset, lo, out);
}

/// Writes bit `j` of the plane, as 0 or 1, to `out[j]`.
///
/// # Panics
/// Where `out` is longer than a block.
pub fn plane_to_words(plane: &Plane, out: &mut [u64]) {
    plane_to_words_with(isa(), plane, out);
}

/// The plane of the lowest bits of `src`; missing elements count as 0.
///
/// # Panics
/// Where `src` is longer than a block.
pub fn words_to_plane(src: &[u64]) -> Plane {
    words_to_plane_with(isa(), src)
}

/// One step of the transposition of 64 rows of 64 bits: exchanges the upper `WIDTH` bits of a row with the lower
/// ones of the row `WIDTH` further, in every 2·`WIDTH` bits. A row is a vector of eight words, one for each of eight
/// squares.
#[inline(always)]
fn exchange<const WIDTH: usize>(rows: &mut [Plane; 64], mask: u64) {
    for base in (0..64).step_by(2 * WIDTH) {
        for i in base..base + WIDTH {
            let (low, high) = (rows[i], rows[i + WIDTH]);
            let swap: Plane = std::array::from_fn(|l| ((low[l] >> WIDTH) ^ high[l]) & mask);
            rows[i] = std::array::from_fn(|l| low[l] ^ (swap[l] << WIDTH));
            rows[i + WIDTH] = std::array::from_fn(|l| high[l] ^ swap[l]);
        }
    }
}

/// The masks of the steps of width 32, 16, 8, 4, 2, 1.
pub(super) const MASKS: [u64; 6] = [
    0x0000_0000_ffff_ffff,
    0x0000_ffff_0000_ffff,
    0x00ff_00ff_00ff_00ff,
    0x0f0f_0f0f_0f0f_0f0f,
    0x3333_3333_3333_3333,
    0x5555_5555_5555_5555,
];

#[inline(always)]
fn to_planes_body(src: &[u64], offset: u64, lo: u32, out: &mut [Plane]) {
    let mut rows = [[0u64; 8]; 64];
    for (square, words) in src.chunks(64).enumerate() {
        for (row, &word) in rows.iter_mut().zip(words) {
            row[square] = word.wrapping_add(offset);
        }
    }
    exchange::<32>(&mut rows, MASKS[0]);
    exchange::<16>(&mut rows, MASKS[1]);
    exchange::<8>(&mut rows, MASKS[2]);
    exchange::<4>(&mut rows, MASKS[3]);
    exchange::<2>(&mut rows, MASKS[4]);
    exchange::<1>(&mut rows, MASKS[5]);
    let lo = lo as usize;
    out.copy_from_slice(&rows[lo..lo + out.len()]);
}

#[inline(always)]
fn plane_to_words_body(plane: &Plane, out: &mut [u64]) {
    for (&bits, words) in plane.iter().zip(out.chunks_mut(64)) {
        for (j, word) in words.iter_mut().enumerate() {
            *word = (bits >> j) & 1;
        }
    }
}

#[inline(always)]
fn words_to_plane_body(src: &[u64]) -> Plane {
    let mut plane = [0; 8];
    for (bits, words) in plane.iter_mut().zip(src.chunks(64)) {
        *bits = words
            .iter()
            .enumerate()
            .fold(0, |bits, (j, &word)| bits | ((word & 1) << j));
    }
    plane
}

#[cfg(target_arch = "x86_64")]
mod compiled {
    //! The same loops, compiled for wider vectors.
    use super::Plane;

    #[target_feature(enable = "avx2")]
    pub fn avx2_to_planes(src: &[u64], offset: u64, lo: u32, out: &mut [Plane]) {
        super::to_planes_body(src, offset, lo, out);
    }
    #[target_feature(enable = "avx2")]
    pub fn avx2_plane_to_words(plane: &Plane, out: &mut [u64]) {
        super::plane_to_words_body(plane, out);
    }
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
    pub fn avx512_plane_to_words(plane: &Plane, out: &mut [u64]) {
        super::plane_to_words_body(plane, out);
    }
    #[target_feature(enable = "avx2")]
    pub fn avx2_words_to_plane(src: &[u64]) -> Plane {
        super::words_to_plane_body(src)
    }
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
    pub fn avx512_words_to_plane(src: &[u64]) -> Plane {
        super::words_to_plane_body(src)
    }
}

/// [`to_planes`] with a chosen instruction set.
///
/// # Panics
/// As [`to_planes`].
pub fn to_planes_with(isa: Isa, src: &[u64], offset: u64, lo: u32, out: &mut [Plane]) {
    assert!(src.len() <= BLOCK, "at most one block");
    assert!(lo <= 64 && out.len() <= 64 - lo as usize, "bits of a word");
    match isa.usable() {
        // SAFETY: `usable` has shown that the machine has AVX-512.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => match <&[u64; BLOCK]>::try_from(src) {
            Ok(block) => unsafe { super::avx512::avx512_to_planes(block, offset, lo, out) },
            Err(_) => {
                // Missing elements become words that the offset turns to zero.
                let mut block = [offset.wrapping_neg(); BLOCK];
                block[..src.len()].copy_from_slice(src);
                unsafe { super::avx512::avx512_to_planes(&block, offset, lo, out) }
            }
        },
        // SAFETY: `usable` has shown that the machine has AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { compiled::avx2_to_planes(src, offset, lo, out) },
        _ => to_planes_body(src, offset, lo, out),
    }
}

/// [`plane_to_words`] with a chosen instruction set.
///
/// # Panics
/// As [`plane_to_words`].
pub fn plane_to_words_with(isa: Isa, plane: &Plane, out: &mut [u64]) {
    assert!(out.len() <= BLOCK, "at most one block");
    match isa.usable() {
        // SAFETY: `usable` has shown that the machine has AVX-512.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { compiled::avx512_plane_to_words(plane, out) },
        // SAFETY: `usable` has shown that the machine has AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { compiled::avx2_plane_to_words(plane, out) },
        _ => plane_to_words_body(plane, out),
    }
}

/// [`words_to_plane`] with a chosen instruction set.
///
/// # Panics
/// As [`words_to_plane`].
pub fn words_to_plane_with(isa: Isa, src: &[u64]) -> Plane {
    assert!(src.len() <= BLOCK, "at most one block");
    match isa.usable() {
        // SAFETY: `usable` has shown that the machine has AVX-512.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { compiled::avx512_words_to_plane(src) },
        // SAFETY: `usable` has shown that the machine has AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { compiled::avx2_words_to_plane(src) },
        _ => words_to_plane_body(src),
    }
}
