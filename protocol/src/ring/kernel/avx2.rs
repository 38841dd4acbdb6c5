//! The register tile with AVX2: up to 4 rows by one vector of 4 words.
//!
//! AVX2 has no 64-bit product. With `a = a1·2^32 + a0` and `b` likewise,
//! `a·b = a0·b0 + 2^32·(a0·b1 + a1·b0)  mod 2^64`, and only the low halves of the cross products count. So each sum
//! is kept as two: `vpmuludq` gives `a0·b0` in 64 bits, and one `vpmulld` of `a` with the halves of `b` exchanged
//! gives both cross products in 32 bits each. The two are joined once, after the loop over the depth: two
//! multiplications a vector instead of three.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::Acc;
use super::contract::{Tile, TileTable};
use super::portable::store_lanes;

const LANES: usize = 4;

/// Tiles of 1 to 4 rows by one group.
pub(super) static TILES: TileTable = &[
    &[avx2_tile_u64::<1>],
    &[avx2_tile_u64::<2>],
    &[avx2_tile_u64::<3>],
    &[avx2_tile_u64::<4>],
];

/// # Safety
/// See [`super::contract::TileFn`]; the tile has `ROWS` rows and one group of up to 4 lanes.
#[target_feature(enable = "avx2")]
unsafe fn avx2_tile_u64<const ROWS: usize>(t: &Tile) {
    // SAFETY: the tile has one group and `ROWS` rows.
    let (group, rows) = unsafe { (&*t.groups, &*t.lhs_rows.cast::<[usize; ROWS]>()) };
    let mask = _mm256_cmpgt_epi64(
        _mm256_set1_epi64x(group.lanes as i64),
        _mm256_setr_epi64x(0, 1, 2, 3),
    );
    let rhs = t.rhs.wrapping_add(group.rhs);
    let mut lhs = [t.lhs; ROWS];
    for i in 0..ROWS {
        lhs[i] = t.lhs.wrapping_add(rows[i]);
    }
    let zero = _mm256_setzero_si256();
    let (mut low, mut cross) = ([zero; ROWS], [zero; ROWS]);
    for k in 0..t.depth {
        // SAFETY: k < depth; masked-off lanes are not read; rows and columns are offsets of the checked tables.
        unsafe {
            let (col, row) = (*t.lhs_cols.add(k), *t.rhs_rows.add(k));
            let b = _mm256_maskload_epi64(rhs.wrapping_add(row).cast(), mask);
            let exchanged = _mm256_shuffle_epi32::<0b10_11_00_01>(b);
            for i in 0..ROWS {
                let a = _mm256_set1_epi64x(*lhs[i].wrapping_add(col) as i64);
                low[i] = _mm256_add_epi64(low[i], _mm256_mul_epu32(a, b));
                cross[i] = _mm256_add_epi32(cross[i], _mm256_mullo_epi32(a, exchanged));
            }
        }
    }
    for i in 0..ROWS {
        // The low half of (cross << 32) holds nothing, its high half the sum of both cross products.
        let high = _mm256_add_epi32(_mm256_slli_epi64::<32>(cross[i]), cross[i]);
        let high = _mm256_blend_epi32::<0b10101010>(zero, high);
        let sum = _mm256_add_epi64(low[i], high);
        // SAFETY: the destination row and the group's lanes lie in the destination; masked-off lanes are neither
        // read nor written.
        unsafe {
            if t.dst_lane_stride == 1 {
                let at = t
                    .dst
                    .wrapping_add(*t.dst_rows.add(i) + group.dst)
                    .cast::<i64>();
                let value = match t.acc {
                    Acc::Set => sum,
                    Acc::Add => _mm256_add_epi64(_mm256_maskload_epi64(at, mask), sum),
                    Acc::Sub => _mm256_sub_epi64(_mm256_maskload_epi64(at, mask), sum),
                };
                _mm256_maskstore_epi64(at, mask, value);
            } else {
                let mut words = [0u64; LANES];
                _mm256_storeu_si256(words.as_mut_ptr().cast(), sum);
                store_lanes(t, i, group.dst, &words[..group.lanes]);
            }
        }
    }
}
