//! Matrix products over Z_2^64.
//!
//! Describes the operands to `contract.rs`: which side is broadcast and which is loaded as vectors, and whether a
//! copy pays. Products with few rows and a transposed right side are dot products and take their own loop.
//! Large products are cut into runs of rows, one for each thread.
#![allow(unsafe_code)]

use super::contract::{Blocking, Dst, Geometry, Group, Lhs, Rhs, contract};
use super::{Acc, Isa, MACS_PER_NS, isa};
use crate::threads;

/// `c[m,n] (acc)= op(a)[m,k] · op(b)[k,n]`, wrapping.
///
/// `a` is `[m,k]` row-major, or `[k,m]` when `ta`; `b` is `[k,n]`, or `[n,k]` when `tb`; `c` is `[m,n]`.
///
/// # Panics
/// Where a slice's length is not the product of its sides.
#[allow(clippy::too_many_arguments)] // the field's own signature
pub fn gemm(
    acc: Acc,
    m: usize,
    k: usize,
    n: usize,
    a: &[u64],
    ta: bool,
    b: &[u64],
    tb: bool,
    c: &mut [u64],
) {
    gemm_with(isa(), acc, m, k, n, a, ta, b, tb, c);
}

/// A matrix in a slice: element (i, j) is `data[i * row + j * col]`.
#[derive(Clone, Copy)]
struct View<'a> {
    data: &'a [u64],
    row: usize,
    col: usize,
}

impl<'a> View<'a> {
    /// A row-major matrix with rows of `width`, or its transpose.
    fn new(data: &'a [u64], width: usize, transpose: bool) -> View<'a> {
        let view = View {
            data,
            row: width,
            col: 1,
        };
        if transpose { view.transposed() } else { view }
    }

    /// `rows` rows of `width` from `first` on; a row-major matrix then has no others.
    fn rows(self, first: usize, rows: usize, width: usize) -> Self {
        let end = if self.col == 1 {
            (first + rows - 1) * self.row + width
        } else {
            self.data.len()
        };
        View {
            data: &self.data[first * self.row..end],
            ..self
        }
    }

    fn transposed(self) -> Self {
        View {
            row: self.col,
            col: self.row,
            ..self
        }
    }
}

fn ramp(len: usize, step: usize) -> Vec<usize> {
    (0..len).map(|i| i * step).collect()
}

/// [`gemm`] with a chosen instruction set.
///
/// # Panics
/// As [`gemm`].
#[allow(clippy::too_many_arguments)] // the field's own signature
pub fn gemm_with(
    isa: Isa,
    acc: Acc,
    m: usize,
    k: usize,
    n: usize,
    a: &[u64],
    ta: bool,
    b: &[u64],
    tb: bool,
    c: &mut [u64],
) {
    assert_eq!(a.len(), m * k, "a is m by k");
    assert_eq!(b.len(), k * n, "b is k by n");
    assert_eq!(c.len(), m * n, "c is m by n");
    let isa = isa.usable();
    let a = View::new(a, if ta { m } else { k }, ta);
    let b = View::new(b, if tb { k } else { n }, tb);
    if c.is_empty() {
        return;
    }
    // Whole tiles of rows.
    let piece = 8 * n;
    threads::split(c, piece, m * k * n / MACS_PER_NS, |first, c| {
        let rows = c.len() / n;
        either_way(isa, acc, [rows, k, n], a.rows(8 * first, rows, k), b, c);
    });
}

/// c = a·b or, transposed, c' = b'·a', whichever is cheaper.
fn either_way(isa: Isa, acc: Acc, [m, k, n]: [usize; 3], a: View, b: View, c: &mut [u64]) {
    let lanes = Geometry::of(isa).lanes;
    // In vector products: rows are exact, columns rounded up to whole vectors; a right side whose lanes are not
    // consecutive is copied word by word, a transposed destination written so.
    let straight = k * m * n.div_ceil(lanes) + if b.col == 1 { 0 } else { k * n };
    let transposed = k * n * m.div_ceil(lanes) + if a.col == 1 { k * m } else { 0 } + 2 * m * n;
    if transposed < straight {
        product(
            isa,
            acc,
            [n, k, m],
            b.transposed(),
            a.transposed(),
            c,
            [1, n],
        );
    } else {
        product(isa, acc, [m, k, n], a, b, c, [n, 1]);
    }
}

/// `c` is addressed by `strides` of its rows and columns; `b`'s columns are the vector lanes.
fn product(
    isa: Isa,
    acc: Acc,
    [m, k, n]: [usize; 3],
    a: View,
    b: View,
    c: &mut [u64],
    strides: [usize; 2],
) {
    const FEW: usize = 4;
    if m <= FEW && b.col != 1 && b.row == 1 && k > 0 {
        let mut copy = Vec::new();
        let rows = if a.col == 1 {
            a.data
        } else {
            copy.reserve_exact(m * k);
            copy.extend((0..m * k).map(|at| a.data[at / k * a.row + at % k * a.col]));
            &copy
        };
        return dots(isa, acc, k, rows, b.data, c, strides);
    }
    let lanes = Geometry::of(isa).lanes;
    let few = m <= 2 * lanes;
    let blocking = Blocking {
        // With few rows the right side is read once: go along its rows in order, as memory likes it.
        depth: if few && b.col == 1 {
            32
        } else {
            Blocking::DEPTH
        },
        pack_rhs: !few && n > lanes,
    };
    let groups: Vec<Group> = (0..n)
        .step_by(lanes)
        .map(|j| Group {
            rhs: j * b.col,
            dst: j * strides[1],
            lanes: lanes.min(n - j),
        })
        .collect();
    contract(
        isa,
        acc,
        &Lhs {
            data: a.data,
            rows: &ramp(m, a.row),
            cols: &ramp(k, a.col),
        },
        &Rhs {
            data: b.data,
            rows: &ramp(k, b.row),
            lane_stride: b.col,
        },
        &groups,
        &mut Dst {
            data: c,
            rows: &ramp(m, strides[0]),
            lane_stride: strides[1],
        },
        blocking,
    );
}

/// `<a, b>`.
#[inline(always)]
fn dot_body(a: &[u64], b: &[u64]) -> u64 {
    const WIDTH: usize = 16;
    let mut sums = [0u64; WIDTH];
    let (x, y) = (a.chunks_exact(WIDTH), b.chunks_exact(WIDTH));
    let rest = x.remainder().iter().zip(y.remainder());
    let rest = rest.fold(0u64, |s, (&x, &y)| s.wrapping_add(x.wrapping_mul(y)));
    for (x, y) in x.zip(y) {
        for l in 0..WIDTH {
            sums[l] = sums[l].wrapping_add(x[l].wrapping_mul(y[l]));
        }
    }
    sums.iter().fold(rest, |s, &v| s.wrapping_add(v))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2_dot_u64(a: &[u64], b: &[u64]) -> u64 {
    dot_body(a, b)
}

fn dot(isa: Isa, a: &[u64], b: &[u64]) -> u64 {
    match isa.usable() {
        // SAFETY: `usable` has shown that the machine has AVX-512.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { super::avx512::avx512_dot_u64(a, b) },
        // SAFETY: `usable` has shown that the machine has AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2_dot_u64(a, b) },
        _ => dot_body(a, b),
    }
}

/// `c[i,j] (acc)= <a[i,..], b[j,..]>` for the rows of `a` and `b`, all of length `k`.
fn dots(isa: Isa, acc: Acc, k: usize, a: &[u64], b: &[u64], c: &mut [u64], strides: [usize; 2]) {
    for (j, b) in b.chunks_exact(k).enumerate() {
        for (i, a) in a.chunks_exact(k).enumerate() {
            let at = &mut c[i * strides[0] + j * strides[1]];
            *at = acc.apply(*at, dot(isa, a, b));
        }
    }
}
