//! The register tile in plain Rust: the definition that the vector tiles must agree with.
#![allow(unsafe_code)]

use super::contract::{Tile, TileTable};

const LANES: usize = 4;

/// Tiles of 1 to 4 rows by one group.
pub(super) static TILES: TileTable = &[
    &[portable_tile_u64::<1>],
    &[portable_tile_u64::<2>],
    &[portable_tile_u64::<3>],
    &[portable_tile_u64::<4>],
];

/// # Safety
/// See [`super::contract::TileFn`]; the tile has `ROWS` rows and one group.
unsafe fn portable_tile_u64<const ROWS: usize>(t: &Tile) {
    // SAFETY: one group, `ROWS` row offsets and `depth` column offsets are promised by the caller.
    let (group, rows) = unsafe { (&*t.groups, std::slice::from_raw_parts(t.lhs_rows, ROWS)) };
    let mut sums = [[0u64; LANES]; ROWS];
    for k in 0..t.depth {
        let mut b = [0u64; LANES];
        // SAFETY: k < depth, and the group's lanes lie in the right operand.
        let (col, from) = unsafe {
            (
                *t.lhs_cols.add(k),
                t.rhs.add(*t.rhs_rows.add(k) + group.rhs),
            )
        };
        if group.lanes == LANES {
            // SAFETY: four words from `from` lie in the right operand.
            b = unsafe { from.cast::<[u64; LANES]>().read() };
        } else {
            for (l, slot) in b.iter_mut().enumerate().take(group.lanes) {
                // SAFETY: l < lanes.
                *slot = unsafe { *from.add(l) };
            }
        }
        for (sum, &row) in sums.iter_mut().zip(rows) {
            // SAFETY: row and column are offsets of the left operand's tables.
            let a = unsafe { *t.lhs.add(row + col) };
            for (s, &b) in sum.iter_mut().zip(&b) {
                *s = s.wrapping_add(a.wrapping_mul(b));
            }
        }
    }
    for (i, sum) in sums.iter().enumerate() {
        // SAFETY: the tile has `ROWS` destination rows.
        unsafe { store_lanes(t, i, group.dst, &sum[..group.lanes]) };
    }
}

/// Accumulates `sums` to row `i` of the tile, lane by lane.
///
/// # Safety
/// `i` is a row of the tile and the lanes from `dst` lie in the destination.
#[inline(always)]
pub(super) unsafe fn store_lanes(t: &Tile, i: usize, dst: usize, sums: &[u64]) {
    for (l, &sum) in sums.iter().enumerate() {
        // SAFETY: promised by the caller.
        unsafe {
            let at = t.dst.add(*t.dst_rows.add(i) + dst + l * t.dst_lane_stride);
            *at = t.acc.apply(*at, sum);
        }
    }
}
