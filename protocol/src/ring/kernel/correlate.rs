//! What convolutions have in common: padded images, rows of positions, and the correlation of stride 1 to which
//! `conv.rs` reduces `conv2d` and its transpose in the input. The loop itself is in `contract.rs`.

use std::cell::Cell;

use super::contract::{Blocking, Dst, Geometry, Group, Lhs, Rhs, contract};
use super::{Acc, Isa};

/// Words of padded images and offsets of positions made at once: 256 KiB, a quarter of a second-level cache.
pub(super) const CHUNK_WORDS: usize = 32 * 1024;

thread_local! {
    static PADDED: Cell<Vec<u64>> = const { Cell::new(Vec::new()) };
}

/// How planes of `h` by `w` lie in memory once padded: each padded row holds, for each remainder of the column
/// modulo `step`, the columns of that remainder.
pub(super) struct Layout {
    pub h: usize,
    pub w: usize,
    pub before: [usize; 2],
    /// Distance between columns that become neighbours.
    pub step: usize,
    /// Words of one remainder of one row.
    pub run: usize,
    /// Words of a row and of a plane.
    pub row: usize,
    pub plane: usize,
    /// The padded image is the image.
    pub as_is: bool,
}

impl Layout {
    /// `before` is the padding above and left, `padded` the rows and columns that are read.
    pub fn new([h, w]: [usize; 2], before: [usize; 2], padded: [usize; 2], step: usize) -> Layout {
        let run = padded[1].div_ceil(step);
        let as_is = before == [0, 0] && step == 1 && padded[0] <= h && padded[1] <= w;
        let (run, rows) = if as_is { (w, h) } else { (run, padded[0]) };
        let row = run * step;
        Layout {
            h,
            w,
            before,
            step,
            run,
            row,
            plane: rows * row,
            as_is,
        }
    }

    /// Offset of padded position (y, x) in a plane.
    pub fn at(&self, y: usize, x: usize) -> usize {
        y * self.row + x % self.step * self.run + x / self.step
    }

    /// Calls `with` on `planes` lying in this layout.
    pub fn place<R>(&self, planes: &[u64], with: impl FnOnce(&[u64]) -> R) -> R {
        if self.as_is {
            return with(planes);
        }
        let mut padded = PADDED.take();
        padded.clear();
        padded.resize(planes.len() / (self.h * self.w) * self.plane, 0);
        for (from, to) in planes
            .chunks_exact(self.h * self.w)
            .zip(padded.chunks_exact_mut(self.plane))
        {
            let rows = from
                .chunks_exact(self.w)
                .zip(to.chunks_exact_mut(self.row).skip(self.before[0]));
            for (from, to) in rows {
                if self.step == 1 {
                    let used = self.w.min(to.len() - self.before[1].min(to.len()));
                    to[self.before[1]..][..used].copy_from_slice(&from[..used]);
                } else {
                    for (rest, to) in to.chunks_exact_mut(self.run).enumerate() {
                        // The first column at or after the padding with this remainder.
                        let skip = self.before[1].saturating_sub(rest).div_ceil(self.step);
                        let first = skip * self.step + rest - self.before[1];
                        let columns = from.iter().skip(first).step_by(self.step);
                        for (slot, &word) in to.iter_mut().skip(skip).zip(columns) {
                            *slot = word;
                        }
                    }
                }
            }
        }
        let result = with(&padded);
        PADDED.set(padded);
        result
    }
}

/// A row of neighbouring outputs: `len` positions from `src` in the padded image and from `dst` in the result.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub src: usize,
    pub dst: usize,
    pub len: usize,
}

/// Joins runs that continue each other on both sides.
pub(super) fn join(runs: Vec<Run>, dst_step: usize) -> Vec<Run> {
    let mut joined: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs {
        match joined.last_mut() {
            Some(last)
                if last.src + last.len == run.src && last.dst + last.len * dst_step == run.dst =>
            {
                last.len += run.len;
            }
            _ => joined.push(run),
        }
    }
    joined
}

/// A stride-1 correlation of padded planes with weights: the common form of `conv2d` and its transpose in `x`.
pub(super) struct Correlation<'a> {
    /// Outputs of one image.
    pub runs: &'a [Run],
    /// Offset of each tap from a position in the padded image, and in the weights.
    pub taps_src: &'a [usize],
    pub taps_weight: &'a [usize],
    /// Output channels, and the distance from one to the next in the weights and in the result.
    pub channels: usize,
    pub weight_step: usize,
    pub dst_channel: usize,
    /// Distance of neighbouring outputs in the result.
    pub dst_step: usize,
    /// Words of one image in the padded planes and in the result.
    pub src_image: usize,
    pub dst_image: usize,
}

impl Correlation<'_> {
    /// `dst (acc)=` the correlation of the images in `src`, one after the other in the padded layout.
    pub fn run(
        &self,
        isa: Isa,
        acc: Acc,
        images: usize,
        src: &[u64],
        weights: &[u64],
        dst: &mut [u64],
    ) {
        let lanes = Geometry::of(isa).lanes;
        let positions: usize = self.runs.iter().map(|r| r.len).sum();
        let depth = self.taps_src.len();
        let channel_rows: Vec<usize> = (0..self.channels).map(|c| c * self.weight_step).collect();
        let channel_dst: Vec<usize> = (0..self.channels).map(|c| c * self.dst_channel).collect();
        // Vector products of either way, and twelve more for each vector that is written word by word.
        let along_rows = self.channels
            * self
                .runs
                .iter()
                .map(|r| r.len.div_ceil(lanes))
                .sum::<usize>();
        let along_channels = positions * self.channels.div_ceil(lanes);
        let rows_cost = along_rows * (depth + if self.dst_step == 1 { 0 } else { 12 });
        let channels_cost = along_channels * (depth + 12);
        if rows_cost <= channels_cost {
            let groups: Vec<Group> = (0..images)
                .flat_map(|n| self.runs.iter().map(move |r| (n, r)))
                .flat_map(|(n, r)| {
                    (0..r.len).step_by(lanes).map(move |j| Group {
                        rhs: n * self.src_image + r.src + j,
                        dst: n * self.dst_image + r.dst + j * self.dst_step,
                        lanes: lanes.min(r.len - j),
                    })
                })
                .collect();
            contract(
                isa,
                acc,
                &Lhs {
                    data: weights,
                    rows: &channel_rows,
                    cols: self.taps_weight,
                },
                &Rhs {
                    data: src,
                    rows: self.taps_src,
                    lane_stride: 1,
                },
                &groups,
                &mut Dst {
                    data: dst,
                    rows: &channel_dst,
                    lane_stride: self.dst_step,
                },
                Blocking::DIRECT,
            );
        } else {
            let (mut src_rows, mut dst_rows) = (Vec::new(), Vec::new());
            for (n, r) in (0..images).flat_map(|n| self.runs.iter().map(move |r| (n, r))) {
                src_rows.extend((0..r.len).map(|j| n * self.src_image + r.src + j));
                dst_rows.extend((0..r.len).map(|j| n * self.dst_image + r.dst + j * self.dst_step));
            }
            let groups: Vec<Group> = (0..self.channels)
                .step_by(lanes)
                .map(|c| Group {
                    rhs: c * self.weight_step,
                    dst: c * self.dst_channel,
                    lanes: lanes.min(self.channels - c),
                })
                .collect();
            contract(
                isa,
                acc,
                &Lhs {
                    data: src,
                    rows: &src_rows,
                    cols: self.taps_src,
                },
                &Rhs {
                    data: weights,
                    rows: self.taps_weight,
                    lane_stride: self.weight_step,
                },
                &groups,
                &mut Dst {
                    data: dst,
                    rows: &dst_rows,
                    lane_stride: self.dst_channel,
                },
                Blocking::DIRECT,
            );
        }
    }
}

/// How many images to work on at once, so that the padded copies stay in the cache.
pub(super) fn images_at_once(n: usize, words: usize) -> usize {
    (CHUNK_WORDS / words.max(1)).clamp(1, n)
}

/// The `t` with `0 <= step * t + r - p < len`.
pub(super) fn span(r: usize, p: usize, step: usize, len: usize) -> std::ops::Range<usize> {
    p.saturating_sub(r).div_ceil(step)..(len + p).saturating_sub(r).div_ceil(step)
}
