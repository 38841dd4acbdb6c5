//! One loop under all products: a contraction whose operands are described by tables of offsets.
//!
//! ```text
//! dst[rows[i] + group.dst + l·lane_stride]  (acc)=  Σ_k lhs[rows[i] + cols[k]] · rhs[rows[k] + group.rhs + l·lane_stride]
//! ```
//!
//! `i` runs over rows, `k` over the depth, and the columns come in *groups* of up to one vector of lanes `l`. A
//! matrix product has regular tables. A convolution has tables of taps and positions over a padded image, and so
//! needs neither an im2col copy nor kernels of its own. Left operands are broadcast, right operands are loaded as
//! vectors, and a register tile of `TILE_ROWS` rows by a few groups is summed over the whole depth block.
//!
//! This file blocks for the caches, packs where packing pays, and checks every table against its slice, so that
//! the tiles (`portable.rs`, `avx2.rs`, `avx512.rs`) may run unchecked.
#![allow(unsafe_code)]

use std::cell::Cell;

use super::{Acc, Isa, portable};

/// The broadcast operand: element (i, k) is `data[rows[i] + cols[k]]`.
pub(super) struct Lhs<'a> {
    pub data: &'a [u64],
    pub rows: &'a [usize],
    pub cols: &'a [usize],
}

/// The vector operand: element (k, group, l) is `data[rows[k] + group.rhs + l * lane_stride]`.
pub(super) struct Rhs<'a> {
    pub data: &'a [u64],
    pub rows: &'a [usize],
    pub lane_stride: usize,
}

/// The destination: element (i, group, l) is `data[rows[i] + group.dst + l * lane_stride]`.
pub(super) struct Dst<'a> {
    pub data: &'a mut [u64],
    pub rows: &'a [usize],
    pub lane_stride: usize,
}

/// Up to one vector of columns.
#[derive(Clone, Copy)]
pub(super) struct Group {
    pub rhs: usize,
    pub dst: usize,
    /// 1 to [`Geometry::lanes`].
    pub lanes: usize,
}

/// How a caller wants the loop cut.
#[derive(Clone, Copy)]
pub(super) struct Blocking {
    /// Products summed before the destination is touched.
    pub depth: usize,
    /// Copy the right operand to consecutive vectors first. Always done where its lanes are not consecutive.
    pub pack_rhs: bool,
}

impl Blocking {
    /// 256 rows of one vector are 16 KiB: half a first-level cache.
    pub const DEPTH: usize = 256;
    pub const DIRECT: Blocking = Blocking {
        depth: Self::DEPTH,
        pack_rhs: false,
    };
}

/// The shape of an instruction set's register tile.
#[derive(Clone, Copy)]
pub(super) struct Geometry {
    /// Words in a vector; also the most rows in a tile, so that packed operands share one table of offsets.
    pub lanes: usize,
    /// Vectors in a tile.
    pub groups: usize,
}

impl Geometry {
    pub fn of(isa: Isa) -> Geometry {
        match isa {
            // 8 x 24 sums in 24 of 32 vector registers.
            Isa::Avx512 => Geometry {
                lanes: 8,
                groups: 3,
            },
            // 4 x 4 sums, two registers each, in 8 of 16.
            Isa::Avx2 | Isa::Portable => Geometry {
                lanes: 4,
                groups: 1,
            },
        }
    }
}

/// Rows of the left operand packed at once: 96 * 256 words are 192 KiB of a second-level cache.
const ROW_BLOCK: usize = 96;
/// Tiles of the right operand packed at once: 24 * 24 lanes * 256 words are 1.1 MiB.
const TILE_BLOCK: usize = 24;
/// Rows of the right operand that are packed for all groups before the next ones.
const PACK_ROWS: usize = 8;
/// The most rows of any tile.
const MAX_ROWS: usize = 8;
const IDENTITY: [usize; MAX_ROWS] = [0, 1, 2, 3, 4, 5, 6, 7];

/// What a register tile works on. All pointers are into slices that [`contract`] has checked.
pub(super) struct Tile {
    pub acc: Acc,
    pub depth: usize,
    pub lhs: *const u64,
    /// One offset per row of the tile.
    pub lhs_rows: *const usize,
    /// `depth` offsets.
    pub lhs_cols: *const usize,
    pub rhs: *const u64,
    /// `depth` offsets.
    pub rhs_rows: *const usize,
    /// One per vector of the tile.
    pub groups: *const Group,
    pub dst: *mut u64,
    /// One offset per row of the tile.
    pub dst_rows: *const usize,
    pub dst_lane_stride: usize,
}

/// # Safety
/// The tile's pointers and offsets are in bounds for its rows, depth, groups and lanes, and the machine has the
/// instruction set that the function is written for.
pub(super) type TileFn = unsafe fn(&Tile);

/// The tile functions of an instruction set: `[rows - 1][groups - 1]`, as far as its [`Geometry`] goes.
pub(super) type TileTable = &'static [&'static [TileFn]];

fn tiles(isa: Isa) -> TileTable {
    match isa {
        Isa::Portable => portable::TILES,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => super::avx2::TILES,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => super::avx512::TILES,
        #[cfg(not(target_arch = "x86_64"))]
        _ => portable::TILES,
    }
}

/// Buffers kept by each thread, so that a product allocates nothing once warm. Their size is bounded by the block
/// constants above.
#[derive(Default)]
struct Scratch {
    lhs: Vec<u64>,
    rhs: Vec<u64>,
    groups: Vec<Group>,
}

thread_local! {
    static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

fn grow(buffer: &mut Vec<u64>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
}

/// Panics unless every offset that the tables can form lies inside its slice.
fn check(lhs: &Lhs, rhs: &Rhs, groups: &[Group], dst: &Dst, lanes: usize) {
    let max = |table: &[usize]| table.iter().copied().max().unwrap_or(0);
    let reach = |a: usize, b: usize| a.checked_add(b).expect("offsets fit the address space");
    assert_eq!(lhs.rows.len(), dst.rows.len(), "rows of both sides");
    assert_eq!(lhs.cols.len(), rhs.rows.len(), "depth of both sides");
    let (mut rhs_far, mut dst_far) = (0, 0);
    for g in groups {
        assert!(g.lanes >= 1 && g.lanes <= lanes, "lanes of a group");
        rhs_far = rhs_far.max(reach(g.rhs, (g.lanes - 1).saturating_mul(rhs.lane_stride)));
        dst_far = dst_far.max(reach(g.dst, (g.lanes - 1).saturating_mul(dst.lane_stride)));
    }
    assert!(reach(max(dst.rows), dst_far) < dst.data.len(), "dst bounds");
    if !lhs.cols.is_empty() {
        assert!(
            reach(max(lhs.rows), max(lhs.cols)) < lhs.data.len(),
            "lhs bounds"
        );
        assert!(reach(max(rhs.rows), rhs_far) < rhs.data.len(), "rhs bounds");
    }
}

/// Runs the contraction. With an empty depth, `Acc::Set` writes zeros.
pub(super) fn contract(
    isa: Isa,
    acc: Acc,
    lhs: &Lhs,
    rhs: &Rhs,
    groups: &[Group],
    dst: &mut Dst,
    blocking: Blocking,
) {
    let isa = isa.usable();
    if groups.is_empty() || dst.rows.is_empty() {
        return;
    }
    let Geometry { lanes, groups: nv } = Geometry::of(isa);
    check(lhs, rhs, groups, dst, lanes);
    let table = tiles(isa);
    let mut scratch = SCRATCH.take().unwrap_or_default();
    let (m, depth) = (dst.rows.len(), lhs.cols.len());
    // A packed row is read once per tile; with few tiles the copy costs more than it saves.
    let pack_lhs = groups.len() > 4 * nv;
    let pack_rhs = blocking.pack_rhs || rhs.lane_stride != 1;
    let step = blocking.depth.clamp(1, Blocking::DEPTH);
    // Where the rows of a packed operand begin.
    let ramp: Vec<usize> = (0..step.min(depth)).map(|k| k * lanes).collect();

    let mut k0 = 0;
    loop {
        let kc = step.min(depth - k0);
        let acc = match acc {
            Acc::Set if k0 > 0 => Acc::Add,
            other => other,
        };
        for block in groups.chunks(TILE_BLOCK * nv) {
            let packed;
            let (rhs_data, rhs_rows, rhs_groups): (&[u64], &[usize], &[Group]) = if pack_rhs {
                pack_groups(
                    isa,
                    rhs,
                    k0,
                    kc,
                    block,
                    lanes,
                    &mut scratch.rhs,
                    &mut scratch.groups,
                );
                packed = &scratch.groups;
                (&scratch.rhs, &ramp, packed)
            } else {
                (rhs.data, &rhs.rows[k0..], block)
            };
            for r0 in (0..m).step_by(ROW_BLOCK) {
                let rc = ROW_BLOCK.min(m - r0);
                if pack_lhs {
                    pack_rows(isa, lhs, r0, rc, k0, kc, lanes, &mut scratch.lhs);
                }
                for tile_groups in rhs_groups.chunks(nv) {
                    let mut i = 0;
                    while i < rc {
                        let rows = lanes.min(rc - i);
                        let (lhs_data, lhs_rows, lhs_cols) = if pack_lhs {
                            let panel = &scratch.lhs[(i / lanes) * lanes * kc..];
                            (panel.as_ptr(), &IDENTITY[..], &ramp[..])
                        } else {
                            (lhs.data.as_ptr(), &lhs.rows[r0 + i..], &lhs.cols[k0..])
                        };
                        let tile = Tile {
                            acc,
                            depth: kc,
                            lhs: lhs_data,
                            lhs_rows: lhs_rows.as_ptr(),
                            lhs_cols: lhs_cols.as_ptr(),
                            rhs: rhs_data.as_ptr(),
                            rhs_rows: rhs_rows.as_ptr(),
                            groups: tile_groups.as_ptr(),
                            dst: dst.data.as_mut_ptr(),
                            dst_rows: dst.rows[r0 + i..].as_ptr(),
                            dst_lane_stride: dst.lane_stride,
                        };
                        let run = table[rows - 1][tile_groups.len() - 1];
                        // SAFETY: `check` has shown that every offset of the tables lies in its slice, the packed
                        // copies hold `kc` rows of whole vectors (or panels), `rows` rows remain in
                        // every row table, and `usable` has shown that the machine has the instructions.
                        unsafe { run(&tile) };
                        i += rows;
                    }
                }
            }
        }
        k0 += kc;
        if k0 >= depth {
            break;
        }
    }
    SCRATCH.set(Some(scratch));
}

/// Copies rows `r0..r0+rc` to panels of `lanes` rows, depth by depth: `out[(panel * kc + k) * lanes + row]`.
#[allow(clippy::too_many_arguments)] // the block's place and the scratch it goes to
fn pack_rows(
    isa: Isa,
    lhs: &Lhs,
    r0: usize,
    rc: usize,
    k0: usize,
    kc: usize,
    lanes: usize,
    out: &mut Vec<u64>,
) {
    if kc == 0 {
        return;
    }
    grow(out, rc.div_ceil(lanes) * lanes * kc);
    let cols = &lhs.cols[k0..k0 + kc];
    for (panel, rows) in out
        .chunks_exact_mut(lanes * kc)
        .zip(lhs.rows[r0..r0 + rc].chunks(lanes))
    {
        pack_panel(isa, lhs.data, rows, cols, panel);
    }
}

/// Copies the groups to consecutive vectors, `out[(group * kc + k) * lanes + lane]`, absent lanes zero, and writes
/// the groups' new places to `moved`.
#[allow(clippy::too_many_arguments)] // the block's place and the scratch it goes to
fn pack_groups(
    isa: Isa,
    rhs: &Rhs,
    k0: usize,
    kc: usize,
    groups: &[Group],
    lanes: usize,
    out: &mut Vec<u64>,
    moved: &mut Vec<Group>,
) {
    let size = lanes * kc;
    grow(out, groups.len() * size);
    moved.clear();
    let rows = &rhs.rows[k0..k0 + kc];
    moved.extend(groups.iter().enumerate().map(|(index, group)| Group {
        rhs: index * size,
        ..*group
    }));
    // Neighbouring groups of a row lie in the same pages: a few rows of all groups at a time. Groups whose lanes lie
    // apart have nothing in common.
    let at_once = match rhs.lane_stride {
        1 => PACK_ROWS,
        _ => kc.max(1),
    };
    for (at, rows) in rows.chunks(at_once).enumerate() {
        let panels = out[at * at_once * lanes..].chunks_mut(size);
        for (group, panel) in groups.iter().zip(panels) {
            let mut places = [0; MAX_ROWS];
            for (l, place) in places.iter_mut().enumerate().take(group.lanes) {
                *place = group.rhs + l * rhs.lane_stride;
            }
            let vectors = &mut panel[..rows.len() * lanes];
            pack_panel(isa, rhs.data, &places[..group.lanes], rows, vectors);
        }
    }
}

/// `out[k * lanes + l] = data[places[l] + depths[k]]`, zero for lanes without a place. `out` holds whole vectors.
fn pack_panel(isa: Isa, data: &[u64], places: &[usize], depths: &[usize], out: &mut [u64]) {
    let neighbours = places.iter().zip(places[0]..).all(|(&p, next)| p == next);
    match (isa.usable(), neighbours) {
        (Isa::Avx512, true) => copy_panel::<8>(data, places, depths, out),
        (_, true) => copy_panel::<4>(data, places, depths, out),
        (isa @ Isa::Avx512, false) => {
            turn_panel::<8>(data, places, depths, out, |rows, out| {
                turn_8x8(isa, rows, out)
            });
        }
        (_, false) => turn_panel::<4>(data, places, depths, out, turn),
    }
}

/// [`pack_panel`] where the lanes are neighbours already.
fn copy_panel<const LANES: usize>(
    data: &[u64],
    places: &[usize],
    depths: &[usize],
    out: &mut [u64],
) {
    for (vector, &depth) in out.as_chunks_mut::<LANES>().0.iter_mut().zip(depths) {
        let from = &data[places[0] + depth..][..places.len()];
        // A length that the compiler knows is no call.
        match <&[u64; LANES]>::try_from(from) {
            Ok(whole) => *vector = *whole,
            Err(_) => {
                *vector = [0; LANES];
                vector[..from.len()].copy_from_slice(from);
            }
        }
    }
}

/// [`pack_panel`] in squares of words where the depths are neighbours.
fn turn_panel<const LANES: usize>(
    data: &[u64],
    places: &[usize],
    depths: &[usize],
    out: &mut [u64],
    turn: impl Fn([&[u64; LANES]; LANES], &mut [u64]),
) {
    for (vectors, depths) in out.chunks_mut(LANES * LANES).zip(depths.chunks(LANES)) {
        if depths.len() == LANES && depths.iter().zip(depths[0]..).all(|(&d, next)| d == next) {
            let mut rows = [&[0; LANES]; LANES];
            for (row, place) in rows.iter_mut().zip(places) {
                *row = data[place + depths[0]..]
                    .first_chunk()
                    .expect("places and depths lie in the data");
            }
            turn(rows, vectors);
            continue;
        }
        for (vector, depth) in vectors.chunks_exact_mut(LANES).zip(depths) {
            let (used, absent) = vector.split_at_mut(places.len());
            for (slot, place) in used.iter_mut().zip(places) {
                *slot = data[place + depth];
            }
            absent.fill(0);
        }
    }
}

/// Row `l`'s word `k` becomes `out[k * LANES + l]`.
#[inline(always)]
fn turn<const LANES: usize>(rows: [&[u64; LANES]; LANES], out: &mut [u64]) {
    for (k, vector) in out.chunks_exact_mut(LANES).enumerate() {
        for (slot, row) in vector.iter_mut().zip(rows) {
            *slot = row[k];
        }
    }
}

/// [`turn`] with an instruction set that the machine has.
#[inline(always)]
fn turn_8x8(isa: Isa, rows: [&[u64; 8]; 8], out: &mut [u64]) {
    match (isa, <&mut [u64; 64]>::try_from(&mut *out)) {
        // SAFETY: `pack_panel` has shown that the machine has the instructions.
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, Ok(out)) => unsafe { super::avx512::avx512_turn_8x8(rows, out) },
        _ => turn(rows, out),
    }
}
