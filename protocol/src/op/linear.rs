//! Integer linear maps: no rounds, no bytes. The same loop serves shares, opened values, masks and
//! the plain run, which is why it stands here once.

use std::ops::Range;

use crate::program::Type;
use crate::ring::elements;

/// Geometry of pooling over `planes` images of `h x w`. The border is less wide than a window on every
/// side, so that each window has a cell of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PoolShape {
    /// Images times channels.
    pub planes: usize,
    /// Input height.
    pub h: usize,
    /// Input width.
    pub w: usize,
    /// Window height and width.
    pub window: [usize; 2],
    /// Stride down and right.
    pub stride: [usize; 2],
    /// Border that windows may reach into: top, left, bottom, right.
    pub pads: [usize; 4],
}

impl PoolShape {
    fn out(&self, axis: usize) -> usize {
        let all = [self.h, self.w][axis] + self.pads[axis] + self.pads[axis + 2];
        (all - self.window[axis]) / self.stride[axis] + 1
    }

    /// Output height.
    pub fn out_h(&self) -> usize {
        self.out(0)
    }

    /// Output width.
    pub fn out_w(&self) -> usize {
        self.out(1)
    }

    /// Number of windows.
    pub fn windows(&self) -> usize {
        self.planes * self.out_h() * self.out_w()
    }

    /// Elements of a window.
    pub fn window_len(&self) -> usize {
        self.window[0] * self.window[1]
    }

    /// The place along an axis of element `d` of window `o`, or the one nearest to it in the image; and
    /// whether it is in the image.
    fn place(&self, axis: usize, o: usize, d: usize) -> (usize, bool) {
        let at = o * self.stride[axis] + d;
        let nearest = at
            .saturating_sub(self.pads[axis])
            .min([self.h, self.w][axis] - 1);
        (nearest, nearest + self.pads[axis] == at)
    }

    /// Calls `each` with where element `q` of every window lies, a run of windows in a row of the image at
    /// a time.
    fn for_each(&self, q: usize, mut each: impl FnMut(Run)) {
        let (dy, dx) = (q / self.window[1], q % self.window[1]);
        let (out_h, out_w) = (self.out_h(), self.out_w());
        let within = |ox: &usize| self.place(1, *ox, dx).1;
        let first = (0..out_w).find(within).unwrap_or(out_w);
        let last = (first..out_w).rfind(within).map_or(first, |ox| ox + 1);
        // Windows whose element lies in the border have it at one and the same cell.
        let border = (0..first).chain(last..out_w).map(|ox| ox..ox + 1);
        let runs: Vec<_> = border.chain(std::iter::once(first..last)).collect();
        for row in 0..self.planes * out_h {
            let (y, inside) = self.place(0, row % out_h, dy);
            let start = (row / out_h * self.h + y) * self.w;
            for run in runs.iter().filter(|run| !run.is_empty()) {
                let (x, within) = self.place(1, run.start, dx);
                each(Run {
                    windows: row * out_w + run.start..row * out_w + run.end,
                    at: start + x,
                    inside: inside && within,
                });
            }
        }
    }

    /// How many elements of windows lie at one cell, at most; `border`: with those that are outside, at
    /// the nearest cell.
    fn overlap(&self, border: bool) -> usize {
        let along = |axis: usize| {
            let length = [self.h, self.w][axis];
            let image = self.pads[axis]..self.pads[axis] + length;
            // First how many more windows have a cell than have the one before: there may be as many
            // windows as cells, each as long as half of them.
            let mut hits = vec![0usize; length + 1];
            let mut outside = [0; 2];
            for o in 0..self.out(axis) {
                let start = o * self.stride[axis];
                let end = start + self.window[axis];
                let first = &mut hits[start.max(image.start) - image.start];
                *first = first.wrapping_add(1);
                let behind = &mut hits[end.min(image.end) - image.start];
                *behind = behind.wrapping_sub(1);
                outside[0] += image.start.saturating_sub(start);
                outside[1] += end.saturating_sub(image.end);
            }
            for at in 1..length {
                hits[at] = hits[at].wrapping_add(hits[at - 1]);
            }
            if border {
                hits[0] += outside[0];
                hits[length - 1] += outside[1];
            }
            hits.into_iter().take(length).max().unwrap_or(0)
        };
        along(0) * along(1)
    }
}

/// Windows in a row whose elements lie the stride apart in the input.
struct Run {
    windows: Range<usize>,
    /// Input index of the first one's; in the border, of the nearest cell of the image.
    at: usize,
    /// Not in the border.
    inside: bool,
}

/// A linear map with integer coefficients.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Linear {
    /// `x + y`
    Add,
    /// `x - y`
    Sub,
    /// `out[o, m, i] = x[o, m, i] + y[m]`
    AddEach {
        /// Outer length.
        outer: usize,
        /// Length of the second operand.
        mid: usize,
        /// Inner length.
        inner: usize,
    },
    /// `by * x`
    Scale(i64),
    /// `out[o, j] = by[j] * in[o, j]`; its own adjoint.
    ScaleEach(Vec<i64>),
    /// `out[i, j] = in[j, i]` for each of `outer` matrices.
    Transpose {
        /// Number of matrices.
        outer: usize,
        /// Rows before.
        rows: usize,
        /// Columns before.
        cols: usize,
    },
    /// `out[m] = sum over o, i of in[o, m, i]`
    Sum {
        /// Outer length.
        outer: usize,
        /// Kept length.
        mid: usize,
        /// Inner length.
        inner: usize,
    },
    /// `out[o, m, i] = in[m]`
    Broadcast {
        /// Outer length.
        outer: usize,
        /// Length of the operand.
        mid: usize,
        /// Inner length.
        inner: usize,
    },
    /// `out[o, j, i] = in[o, start + j, i]`
    Slice {
        /// Outer length.
        outer: usize,
        /// Length of the axis before.
        len: usize,
        /// First element taken.
        start: usize,
        /// Number of elements taken.
        take: usize,
        /// Inner length.
        inner: usize,
    },
    /// Operands one after the other along an axis.
    Concat {
        /// Outer length.
        outer: usize,
        /// Length of the axis in each operand, times the inner length.
        parts: Vec<usize>,
    },
    /// Element `q` of every pooling window; in the border the nearest element of the image, which lies in
    /// the same window, so that maxima do not change.
    Window(PoolShape, usize),
    /// Adjoint of all [`Linear::Window`]s together: one operand for each element of a window.
    Scatter(PoolShape),
    /// Sum over pooling windows; the border is zeros.
    SumPool(PoolShape),
    /// Adjoint of [`Linear::SumPool`].
    SumPoolGrad(PoolShape),
    /// `out[pair, row] = in[row, i] - in[row, j]` for all `i < j` of `n`, pairs in order.
    Pairs {
        /// Rows.
        rows: usize,
        /// Elements of a row.
        n: usize,
    },
}

impl Linear {
    /// Number of output elements, given those of the first operand.
    pub fn out_len(&self, first: usize) -> usize {
        match self {
            Linear::Add
            | Linear::Sub
            | Linear::AddEach { .. }
            | Linear::Scale(_)
            | Linear::ScaleEach(_)
            | Linear::Transpose { .. } => first,
            Linear::Sum { mid, .. } => *mid,
            Linear::Broadcast { outer, mid, inner } => outer * mid * inner,
            Linear::Slice {
                outer, take, inner, ..
            } => outer * take * inner,
            Linear::Concat { outer, parts } => outer * parts.iter().sum::<usize>(),
            Linear::Window(pool, _) | Linear::SumPool(pool) => pool.windows(),
            Linear::Scatter(pool) | Linear::SumPoolGrad(pool) => pool.planes * pool.h * pool.w,
            Linear::Pairs { rows, n } => rows * n * (n - 1) / 2,
        }
    }

    /// Bits by which the bound may grow.
    pub fn growth(&self) -> u32 {
        let log = |n: usize| n.next_power_of_two().trailing_zeros();
        let scaled = |by: &i64| 64 - by.unsigned_abs().saturating_sub(1).leading_zeros();
        match self {
            Linear::Add | Linear::Sub | Linear::AddEach { .. } | Linear::Pairs { .. } => 1,
            Linear::Scale(by) => scaled(by),
            Linear::ScaleEach(by) => by.iter().map(scaled).max().unwrap_or(0),
            Linear::Sum { outer, inner, .. } => log(outer * inner),
            Linear::SumPool(pool) => log(pool.window_len()),
            Linear::Scatter(pool) => log(pool.overlap(true)),
            Linear::SumPoolGrad(pool) => log(pool.overlap(false)),
            _ => 0,
        }
    }

    /// Applies the map: wrapping arithmetic on `u64`.
    pub fn apply(&self, ins: &[&[u64]]) -> Vec<u64> {
        let x = ins[0];
        let mut out = Vec::new();
        match self {
            Linear::Add => add_both(&mut out, x, ins[1]),
            Linear::Sub => out.extend(x.iter().zip(ins[1]).map(|(a, b)| a.wrapping_sub(*b))),
            // Whole rows at once: a run of one element is not worth a loop of its own.
            Linear::AddEach { inner: 1, .. } => {
                out.reserve_exact(x.len());
                for row in x.chunks_exact(ins[1].len()) {
                    add_both(&mut out, row, ins[1]);
                }
            }
            Linear::AddEach { inner, .. } => {
                out.reserve_exact(x.len());
                for (run, y) in x.chunks_exact(*inner).zip(ins[1].iter().cycle()) {
                    out.extend(run.iter().map(|x| x.wrapping_add(*y)));
                }
            }
            Linear::Scale(by) => out.extend(x.iter().map(|a| a.wrapping_mul(*by as u64))),
            Linear::ScaleEach(by) => {
                out.reserve_exact(x.len());
                for row in x.chunks_exact(by.len()) {
                    out.extend(row.iter().zip(by).map(|(a, by)| a.wrapping_mul(*by as u64)));
                }
            }
            Linear::Transpose { outer, rows, cols } => {
                out.reserve_exact(x.len());
                for matrix in x.chunks_exact(rows * cols).take(*outer) {
                    for col in 0..*cols {
                        out.extend((0..*rows).map(|row| matrix[row * cols + col]));
                    }
                }
            }
            Linear::Sum { outer, mid, inner } => {
                out.resize(*mid, 0u64);
                for o in 0..*outer {
                    for (m, sum) in out.iter_mut().enumerate() {
                        let at = (o * mid + m) * inner;
                        *sum = x[at..at + inner]
                            .iter()
                            .fold(*sum, |s, v| s.wrapping_add(*v));
                    }
                }
            }
            Linear::Broadcast {
                outer,
                mid: _,
                inner,
            } => {
                for _ in 0..*outer {
                    for value in x {
                        out.extend(std::iter::repeat_n(*value, *inner));
                    }
                }
            }
            Linear::Slice {
                outer,
                len,
                start,
                take,
                inner,
            } => {
                for o in 0..*outer {
                    let at = (o * len + start) * inner;
                    out.extend_from_slice(&x[at..at + take * inner]);
                }
            }
            Linear::Concat { outer, parts } => {
                for o in 0..*outer {
                    for (part, values) in parts.iter().zip(ins) {
                        out.extend_from_slice(&values[o * part..(o + 1) * part]);
                    }
                }
            }
            Linear::Window(pool, q) => {
                out.resize(pool.windows(), 0);
                pool.for_each(*q, |run| {
                    let from = x[run.at..].iter().step_by(pool.stride[1]);
                    let to = &mut out[run.windows];
                    to.iter_mut().zip(from).for_each(|(out, x)| *out = *x);
                });
            }
            Linear::Scatter(pool) => {
                out.resize(pool.planes * pool.h * pool.w, 0u64);
                for (q, values) in ins.iter().enumerate() {
                    pool.for_each(q, |run| {
                        let to = out[run.at..].iter_mut().step_by(pool.stride[1]);
                        add(to, &values[run.windows]);
                    });
                }
            }
            Linear::SumPool(pool) => {
                out.resize(pool.windows(), 0u64);
                for q in 0..pool.window_len() {
                    pool.for_each(q, |run| {
                        if run.inside {
                            let from = x[run.at..].iter().step_by(pool.stride[1]);
                            add(out[run.windows].iter_mut(), from);
                        }
                    });
                }
            }
            Linear::SumPoolGrad(pool) => {
                out.resize(pool.planes * pool.h * pool.w, 0u64);
                for q in 0..pool.window_len() {
                    pool.for_each(q, |run| {
                        if run.inside {
                            let to = out[run.at..].iter_mut().step_by(pool.stride[1]);
                            add(to, &x[run.windows]);
                        }
                    });
                }
            }
            Linear::Pairs { rows, n } => {
                for i in 0..*n {
                    for j in i + 1..*n {
                        out.extend((0..*rows).map(|r| x[r * n + i].wrapping_sub(x[r * n + j])));
                    }
                }
            }
        }
        out
    }
}

/// Appends the sums of two runs of words.
fn add_both(out: &mut Vec<u64>, x: &[u64], y: &[u64]) {
    out.extend(x.iter().zip(y).map(|(x, y)| x.wrapping_add(*y)));
}

/// Adds words to others, as many as there are of both.
fn add<'a>(to: impl Iterator<Item = &'a mut u64>, from: impl IntoIterator<Item = &'a u64>) {
    to.zip(from)
        .for_each(|(to, from)| *to = to.wrapping_add(*from));
}

/// Checks that operand sizes fit the map; the result's bound and scale follow the operands'.
pub fn infer(
    map: &Linear,
    ins: &[&Type],
    shape: &[usize],
    max_bound: u8,
) -> Result<Vec<Type>, String> {
    let first = ins.first().ok_or("needs an operand")?;
    let operands = match map {
        Linear::Add | Linear::Sub | Linear::AddEach { .. } => 2,
        Linear::Concat { parts, .. } => parts.len(),
        Linear::Scatter(pool) => pool.window_len(),
        _ => 1,
    };
    if ins.len() != operands {
        return Err(format!("needs {operands} operands, has {}", ins.len()));
    }
    for ty in ins {
        super::require_ring(ty)?;
        if ty.frac_bits != first.frac_bits {
            return Err(format!(
                "operands have {} and {} fraction bits; truncate or rescale one",
                first.frac_bits, ty.frac_bits
            ));
        }
    }
    if matches!(map, Linear::Add | Linear::Sub) && ins[0].shape != ins[1].shape {
        return Err(format!(
            "shapes {:?} and {:?} differ",
            ins[0].shape, ins[1].shape
        ));
    }
    let expected = match map {
        Linear::Add | Linear::Sub | Linear::Scale(_) => first.len(),
        Linear::AddEach { outer, mid, inner } => {
            if ins[1].len() != *mid || *mid == 0 || *inner == 0 {
                let shape = &ins[1].shape;
                return Err(format!(
                    "{shape:?} added at {outer} x {mid} x {inner} places"
                ));
            }
            outer * mid * inner
        }
        Linear::ScaleEach(by) => {
            if by.is_empty() || !first.len().is_multiple_of(by.len()) {
                return Err(format!("{} factors for {:?}", by.len(), first.shape));
            }
            first.len()
        }
        Linear::Transpose { outer, rows, cols } => outer * rows * cols,
        Linear::Sum { outer, mid, inner } => outer * mid * inner,
        Linear::Broadcast { mid, .. } => *mid,
        Linear::Slice {
            outer,
            len,
            start,
            take,
            inner,
        } => {
            if start + take > *len {
                return Err(format!(
                    "slice {start}..{} of an axis of length {len}",
                    start + take
                ));
            }
            outer * len * inner
        }
        Linear::Concat { outer, parts } => outer * parts[0],
        Linear::Window(pool, _) | Linear::SumPool(pool) => pool.planes * pool.h * pool.w,
        Linear::Scatter(pool) | Linear::SumPoolGrad(pool) => pool.windows(),
        Linear::Pairs { rows, n } => rows * n,
    };
    if first.len() != expected || map.out_len(first.len()) != elements(shape) {
        return Err(format!(
            "operand has {} elements, expected {expected}; result {shape:?}, expected {} elements",
            first.len(),
            map.out_len(first.len())
        ));
    }
    let bound = ins
        .iter()
        .map(|ty| u32::from(ty.bound_log2))
        .max()
        .unwrap_or(0)
        + map.growth();
    Ok(vec![Type {
        kind: first.kind,
        shape: shape.to_vec(),
        frac_bits: first.frac_bits,
        bound_log2: bound.min(u32::from(max_bound)) as u8,
    }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_added_at_every_place_of_its_axis_is_the_sum_with_its_repetition() {
        for (outer, mid, inner) in [(1, 1, 1), (2, 3, 4), (5, 4, 1), (1, 2, 7), (3, 1, 2)] {
            let x: Vec<u64> = (0..outer * mid * inner).map(|i| i as u64 * 1_000).collect();
            let y: Vec<u64> = (0..mid as u64).map(|m| m.wrapping_sub(2)).collect();
            let repeated = Linear::Broadcast { outer, mid, inner }.apply(&[&y]);
            let each = Linear::AddEach { outer, mid, inner };
            assert_eq!(each.apply(&[&x, &y]), Linear::Add.apply(&[&x, &repeated]));
        }
    }

    #[test]
    fn a_gradient_grows_by_as_many_windows_as_have_one_cell_however_large_the_pool() {
        let lengths = [(1, 1), (1, 3), (4, 2), (5, 3), (7, 5), (6, 7)];
        for (h, w) in lengths {
            for (window, stride, before, behind) in [
                (1, 1, 0, 0),
                (2, 1, 1, 0),
                (3, 1, 2, 2),
                (3, 2, 1, 1),
                (2, 3, 0, 1),
            ] {
                let pool = PoolShape {
                    planes: 1,
                    h,
                    w,
                    window: [window, window],
                    stride: [stride, stride],
                    pads: [before, before, behind, behind],
                };
                if h.min(w) + before + behind < window {
                    continue;
                }
                let ones = vec![1; pool.windows()];
                let most = |map: Linear, ins: &[&[u64]]| map.apply(ins).into_iter().max();
                let grad = most(Linear::SumPoolGrad(pool), &[&ones]);
                assert_eq!(grad, Some(pool.overlap(false) as u64), "{pool:?}");
                let each = vec![&ones[..]; pool.window_len()];
                let scattered = most(Linear::Scatter(pool), &each);
                assert_eq!(scattered, Some(pool.overlap(true) as u64), "{pool:?}");
            }
        }
        // As many elements of windows as nobody goes through while a job is looked at.
        let long = PoolShape {
            planes: 1,
            h: 1,
            w: 1 << 24,
            window: [1, 1 << 23],
            stride: [1, 1],
            pads: [0; 4],
        };
        assert_eq!(Linear::SumPoolGrad(long).growth(), 23);
    }
}
