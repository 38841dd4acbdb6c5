//! What AVX-512 does in its own way: the register tile, up to 8 rows by 3 vectors of 8 words with `vpmullq` and
//! `vpaddq`; dot products; and transpositions of words and bits, which the compiler would do with slow gathers.
#![allow(unsafe_code)]

use std::arch::asm;
use std::arch::x86_64::*;

use super::Acc;
use super::contract::{Tile, TileTable};
use super::planes::{BLOCK, MASKS, Plane};
use super::portable::store_lanes;

/// Tiles of 1 to 8 rows by 1 to 3 vectors.
pub(super) static TILES: TileTable = &[
    &[
        avx512_tile_u64::<1, 1>,
        avx512_tile_u64::<1, 2>,
        avx512_tile_u64::<1, 3>,
    ],
    &[
        avx512_tile_u64::<2, 1>,
        avx512_tile_u64::<2, 2>,
        avx512_tile_u64::<2, 3>,
    ],
    &[
        avx512_tile_u64::<3, 1>,
        avx512_tile_u64::<3, 2>,
        avx512_tile_u64::<3, 3>,
    ],
    &[
        avx512_tile_u64::<4, 1>,
        avx512_tile_u64::<4, 2>,
        avx512_tile_u64::<4, 3>,
    ],
    &[
        avx512_tile_u64::<5, 1>,
        avx512_tile_u64::<5, 2>,
        avx512_tile_u64::<5, 3>,
    ],
    &[
        avx512_tile_u64::<6, 1>,
        avx512_tile_u64::<6, 2>,
        avx512_tile_u64::<6, 3>,
    ],
    &[
        avx512_tile_u64::<7, 1>,
        avx512_tile_u64::<7, 2>,
        avx512_tile_u64::<7, 3>,
    ],
    &[
        avx512_tile_u64::<8, 1>,
        avx512_tile_u64::<8, 2>,
        avx512_tile_u64::<8, 3>,
    ],
];

/// Adds the products of two rows' words with a depth's vectors to the sums of both rows.
///
/// The order matters and is fixed here. Two products, then their two sums: on Zen 4 a sum that follows each product
/// takes the multiplier's pipe so often that a third of the rate is lost. And the compiler, left to itself, fetches
/// the words of all eight rows first, which with 24 sums are more registers than there are.
macro_rules! two_rows {
    ($name:ident, $vecs:literal, [$($b:ident $x:ident $y:ident $v:literal),*], [$($code:literal),*]) => {
        #[inline]
        #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
        unsafe fn $name(
            [first, second]: [*const u64; 2],
            col: usize,
            b: &[__m512i; $vecs],
            [x, y]: [&mut [__m512i; $vecs]; 2],
        ) {
            let (_a, _c, _t, _u): (__m512i, __m512i, __m512i, __m512i);
            // SAFETY: reads the words `col` after both pointers, which the caller answers for.
            unsafe {
                asm!(
                    "vpbroadcastq {a}, qword ptr [{p} + {col}*8]",
                    "vpbroadcastq {c}, qword ptr [{q} + {col}*8]",
                    $($code),*,
                    p = in(reg) first,
                    q = in(reg) second,
                    col = in(reg) col,
                    a = out(zmm_reg) _a,
                    c = out(zmm_reg) _c,
                    t = out(zmm_reg) _t,
                    u = out(zmm_reg) _u,
                    $(
                        $b = in(zmm_reg) b[$v],
                        $x = inout(zmm_reg) x[$v],
                        $y = inout(zmm_reg) y[$v],
                    )*
                    options(readonly, nostack, preserves_flags),
                );
            }
        }
    };
}

two_rows!(
    two_rows_1,
    1,
    [b0 x0 y0 0],
    [
        "vpmullq {t}, {a}, {b0}",
        "vpmullq {u}, {c}, {b0}",
        "vpaddq {x0}, {x0}, {t}",
        "vpaddq {y0}, {y0}, {u}"
    ]
);
two_rows!(
    two_rows_2,
    2,
    [b0 x0 y0 0, b1 x1 y1 1],
    [
        "vpmullq {t}, {a}, {b0}",
        "vpmullq {u}, {a}, {b1}",
        "vpaddq {x0}, {x0}, {t}",
        "vpaddq {x1}, {x1}, {u}",
        "vpmullq {t}, {c}, {b0}",
        "vpmullq {u}, {c}, {b1}",
        "vpaddq {y0}, {y0}, {t}",
        "vpaddq {y1}, {y1}, {u}"
    ]
);
two_rows!(
    two_rows_3,
    3,
    [b0 x0 y0 0, b1 x1 y1 1, b2 x2 y2 2],
    [
        "vpmullq {t}, {a}, {b0}",
        "vpmullq {u}, {a}, {b1}",
        "vpaddq {x0}, {x0}, {t}",
        "vpaddq {x1}, {x1}, {u}",
        "vpmullq {t}, {a}, {b2}",
        "vpmullq {u}, {c}, {b0}",
        "vpaddq {x2}, {x2}, {t}",
        "vpaddq {y0}, {y0}, {u}",
        "vpmullq {t}, {c}, {b1}",
        "vpmullq {u}, {c}, {b2}",
        "vpaddq {y1}, {y1}, {t}",
        "vpaddq {y2}, {y2}, {u}"
    ]
);

/// The same for vectors of a number that is only known by its type.
///
/// # Safety
/// There are words `col` after both pointers, and `VECS` is 1, 2 or 3.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
unsafe fn two_rows<const VECS: usize>(
    words: [*const u64; 2],
    col: usize,
    b: &[__m512i; VECS],
    [x, y]: &mut [[__m512i; VECS]; 2],
) {
    // SAFETY: the caller's promise; the pointers are to arrays of the length that they are cast to.
    unsafe {
        let (b, x, y) = (b.as_ptr(), x.as_mut_ptr(), y.as_mut_ptr());
        match VECS {
            1 => two_rows_1(words, col, &*b.cast(), [&mut *x.cast(), &mut *y.cast()]),
            2 => two_rows_2(words, col, &*b.cast(), [&mut *x.cast(), &mut *y.cast()]),
            _ => two_rows_3(words, col, &*b.cast(), [&mut *x.cast(), &mut *y.cast()]),
        }
    }
}

/// # Safety
/// See [`super::contract::TileFn`]; the tile has `ROWS` rows and `VECS` groups of up to 8 lanes.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
unsafe fn avx512_tile_u64<const ROWS: usize, const VECS: usize>(t: &Tile) {
    // SAFETY: the tile has `VECS` groups and `ROWS` rows.
    let (groups, rows) = unsafe {
        (
            &*t.groups.cast::<[super::contract::Group; VECS]>(),
            &*t.lhs_rows.cast::<[usize; ROWS]>(),
        )
    };
    let mut masks = [0 as __mmask8; VECS];
    let mut places = [t.rhs; VECS];
    for v in 0..VECS {
        masks[v] = ((1u16 << groups[v].lanes) - 1) as __mmask8;
        places[v] = t.rhs.wrapping_add(groups[v].rhs);
    }
    let mut lhs = [t.lhs; ROWS];
    for i in 0..ROWS {
        lhs[i] = t.lhs.wrapping_add(rows[i]);
    }
    let mut sums = [[_mm512_setzero_si512(); VECS]; ROWS];
    for k in 0..t.depth {
        // SAFETY: k < depth; masked-off lanes are not read; rows and columns are offsets of the checked tables.
        unsafe {
            let (col, row) = (*t.lhs_cols.add(k), *t.rhs_rows.add(k));
            let mut b = [_mm512_setzero_si512(); VECS];
            for v in 0..VECS {
                b[v] = _mm512_maskz_loadu_epi64(masks[v], places[v].wrapping_add(row).cast());
            }
            // Written out: sums that a loop indexes would live in memory.
            macro_rules! pair {
                ($at:literal) => {
                    if let Some(pair) = sums.get_mut($at..$at + 2)
                        && let Ok(pair) = pair.try_into()
                    {
                        two_rows([lhs[$at], lhs[$at + 1]], col, &b, pair);
                    }
                };
            }
            pair!(0);
            pair!(2);
            pair!(4);
            pair!(6);
            if ROWS % 2 == 1 {
                let a = _mm512_set1_epi64(*lhs[ROWS - 1].wrapping_add(col) as i64);
                for v in 0..VECS {
                    let sum = &mut sums[ROWS - 1][v];
                    *sum = _mm512_add_epi64(*sum, _mm512_mullo_epi64(a, b[v]));
                }
            }
        }
    }
    for (i, sums) in sums.into_iter().enumerate() {
        for v in 0..VECS {
            // SAFETY: the destination row and the group's lanes lie in the destination; masked-off lanes are
            // neither read nor written.
            unsafe {
                if t.dst_lane_stride == 1 {
                    let at = t
                        .dst
                        .wrapping_add(*t.dst_rows.add(i) + groups[v].dst)
                        .cast::<i64>();
                    let value = match t.acc {
                        Acc::Set => sums[v],
                        Acc::Add => {
                            _mm512_add_epi64(_mm512_maskz_loadu_epi64(masks[v], at), sums[v])
                        }
                        Acc::Sub => {
                            _mm512_sub_epi64(_mm512_maskz_loadu_epi64(masks[v], at), sums[v])
                        }
                    };
                    _mm512_mask_storeu_epi64(at, masks[v], value);
                } else {
                    let mut words = [0u64; 8];
                    _mm512_storeu_si512(words.as_mut_ptr().cast(), sums[v]);
                    store_lanes(t, i, groups[v].dst, &words[..groups[v].lanes]);
                }
            }
        }
    }
}

/// Row `l`'s word `k` becomes `out[8 * k + l]`.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
pub(super) fn avx512_turn_8x8(rows: [&[u64; 8]; 8], out: &mut [u64; 64]) {
    // SAFETY: eight words a row.
    let columns = rows.map(|row| unsafe { _mm512_loadu_epi64(row.as_ptr().cast()) });
    for (out, row) in out.chunks_exact_mut(8).zip(transpose_words(columns)) {
        // SAFETY: eight words.
        unsafe { _mm512_storeu_epi64(out.as_mut_ptr().cast(), row) };
    }
}

/// `<a, b>` over the shorter of the two.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
pub(super) fn avx512_dot_u64(a: &[u64], b: &[u64]) -> u64 {
    const WIDTH: usize = 32;
    let len = a.len().min(b.len());
    let (a, b) = (&a[..len], &b[..len]);
    let mut sums = [_mm512_setzero_si512(); WIDTH / 8];
    let mut at = 0;
    while at < len {
        for (v, sum) in sums.iter_mut().enumerate() {
            let left = len.saturating_sub(at + 8 * v).min(8);
            let mask = ((1u16 << left) - 1) as __mmask8;
            // SAFETY: only the `left` words from there that both slices have are read.
            let (x, y) = unsafe {
                (
                    _mm512_maskz_loadu_epi64(mask, a.as_ptr().wrapping_add(at + 8 * v).cast()),
                    _mm512_maskz_loadu_epi64(mask, b.as_ptr().wrapping_add(at + 8 * v).cast()),
                )
            };
            *sum = _mm512_add_epi64(*sum, _mm512_mullo_epi64(x, y));
        }
        at += WIDTH;
    }
    let sum = sums
        .into_iter()
        .fold(_mm512_setzero_si512(), |s, v| _mm512_add_epi64(s, v));
    _mm512_reduce_add_epi64(sum) as u64
}

/// See `planes.rs`: bit `lo + i` of `src[j] + offset` becomes bit `j` of `out[i]`.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
pub(super) fn avx512_to_planes(src: &[u64; BLOCK], offset: u64, lo: u32, out: &mut [Plane]) {
    let mut rows = [_mm512_setzero_si512(); 64];
    let offset = _mm512_set1_epi64(offset as i64);
    for first in (0..64).step_by(8) {
        let mut words = [offset; 8];
        for (square, words) in words.iter_mut().enumerate() {
            // SAFETY: eight words from 64 * 7 + 56 at most lie in the block.
            let loaded =
                unsafe { _mm512_loadu_epi64(src.as_ptr().add(64 * square + first).cast()) };
            *words = _mm512_add_epi64(*words, loaded);
        }
        rows[first..first + 8].copy_from_slice(&transpose_words(words));
    }
    for first in 0..8 {
        let mut r = [_mm512_setzero_si512(); 8];
        for j in 0..8 {
            r[j] = rows[first + 8 * j];
        }
        let r = exchange::<1, 8>(
            exchange::<2, 16>(exchange::<4, 32>(r, MASKS[0]), MASKS[1]),
            MASKS[2],
        );
        for j in 0..8 {
            rows[first + 8 * j] = r[j];
        }
    }
    for rows in rows.chunks_exact_mut(8) {
        let mut r = [_mm512_setzero_si512(); 8];
        r.copy_from_slice(rows);
        let r = exchange::<1, 1>(
            exchange::<2, 2>(exchange::<4, 4>(r, MASKS[3]), MASKS[4]),
            MASKS[5],
        );
        rows.copy_from_slice(&r);
    }
    for (out, row) in out.iter_mut().zip(&rows[lo as usize..]) {
        // SAFETY: a plane is eight words.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), *row) };
    }
}

/// One step of the transposition for eight rows: exchanges bits between those `STEP` places apart, which are rows
/// `WIDTH` apart of the whole.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
fn exchange<const STEP: usize, const WIDTH: u32>(mut r: [__m512i; 8], mask: u64) -> [__m512i; 8] {
    let mask = _mm512_set1_epi64(mask as i64);
    for low in 0..8 {
        if low & STEP == 0 {
            let (x, y) = (r[low], r[low + STEP]);
            let swap = _mm512_and_si512(_mm512_xor_si512(_mm512_srli_epi64::<WIDTH>(x), y), mask);
            r[low] = _mm512_xor_si512(x, _mm512_slli_epi64::<WIDTH>(swap));
            r[low + STEP] = _mm512_xor_si512(y, swap);
        }
    }
    r
}

/// Word `i` of vector `j` becomes word `j` of vector `i`.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
fn transpose_words(v: [__m512i; 8]) -> [__m512i; 8] {
    // Pairs of words, then pairs of pairs, then halves.
    let mut a = v;
    for j in (0..8).step_by(2) {
        a[j] = _mm512_unpacklo_epi64(v[j], v[j + 1]);
        a[j + 1] = _mm512_unpackhi_epi64(v[j], v[j + 1]);
    }
    // a[2p + o] holds, in 128-bit lane q, word 2q + o of vectors 2p and 2p + 1.
    let mut out = v;
    for o in 0..2 {
        let low = _mm512_shuffle_i64x2::<0b10_00_10_00>(a[o], a[2 + o]); // lanes p0q0 p0q2 p1q0 p1q2
        let low_odd = _mm512_shuffle_i64x2::<0b11_01_11_01>(a[o], a[2 + o]); // p0q1 p0q3 p1q1 p1q3
        let high = _mm512_shuffle_i64x2::<0b10_00_10_00>(a[4 + o], a[6 + o]);
        let high_odd = _mm512_shuffle_i64x2::<0b11_01_11_01>(a[4 + o], a[6 + o]);
        out[o] = _mm512_shuffle_i64x2::<0b10_00_10_00>(low, high); // q0
        out[2 + o] = _mm512_shuffle_i64x2::<0b10_00_10_00>(low_odd, high_odd); // q1
        out[4 + o] = _mm512_shuffle_i64x2::<0b11_01_11_01>(low, high); // q2
        out[6 + o] = _mm512_shuffle_i64x2::<0b11_01_11_01>(low_odd, high_odd); // q3
    }
    out
}
