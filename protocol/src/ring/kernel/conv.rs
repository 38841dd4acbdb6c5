//! Two-dimensional convolution over Z_2^64 and its two transposes.
//!
//! All three are contractions over a zero-padded image whose taps and positions are tables of offsets; there is no
//! im2col copy. An image is copied once, group by group of images, to add its padding and to part its columns by
//! their remainder modulo the stride, so that neighbouring outputs read neighbouring words. Where there is neither
//! padding nor stride, nothing is copied. The gradient of the input is one stride-1 correlation for each remainder
//! of the output position modulo the stride.
//!
//! Vector lanes run along output rows or, where rows are short, along channels, whichever wastes less.
//! Read next: `correlate.rs`, then `contract.rs` for the loop itself.

use super::contract::{Blocking, Dst, Geometry, Group, Lhs, Rhs, contract};
use super::correlate::{CHUNK_WORDS, Correlation, Layout, Run, images_at_once, join, span};
use super::{Acc, Isa, MACS_PER_NS, isa};
use crate::threads;

/// The shape of a convolution: images NCHW, weights OIHW, zero padding of `pad` on both sides of each axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConvShape {
    /// Images.
    pub n: usize,
    /// Input channels.
    pub c_in: usize,
    /// Input rows.
    pub h: usize,
    /// Input columns.
    pub w: usize,
    /// Output channels.
    pub c_out: usize,
    /// Kernel rows.
    pub kh: usize,
    /// Kernel columns.
    pub kw: usize,
    /// Stride along rows and columns, at least 1.
    pub stride: [usize; 2],
    /// Padding along rows and columns, on both sides.
    pub pad: [usize; 2],
}

fn out_len(len: usize, pad: usize, kernel: usize, stride: usize) -> usize {
    assert!(
        kernel >= 1 && stride >= 1,
        "kernel and stride are at least 1"
    );
    match (len + 2 * pad).checked_sub(kernel) {
        Some(room) => room / stride + 1,
        None => 0,
    }
}

impl ConvShape {
    /// Output rows; 0 where the kernel is larger than the padded image.
    ///
    /// # Panics
    /// Where the kernel or the stride is 0.
    pub fn out_h(&self) -> usize {
        out_len(self.h, self.pad[0], self.kh, self.stride[0])
    }

    /// Output columns; 0 where the kernel is larger than the padded image.
    ///
    /// # Panics
    /// Where the kernel or the stride is 0.
    pub fn out_w(&self) -> usize {
        out_len(self.w, self.pad[1], self.kw, self.stride[1])
    }

    /// Words of the input, `n·c_in·h·w`.
    pub fn x_len(&self) -> usize {
        self.n * self.c_in * self.h * self.w
    }

    /// Words of the weights, `c_out·c_in·kh·kw`.
    pub fn w_len(&self) -> usize {
        self.c_out * self.taps()
    }

    /// Words of the output, `n·c_out·out_h·out_w`.
    pub fn y_len(&self) -> usize {
        self.n * self.c_out * self.out_h() * self.out_w()
    }

    fn taps(&self) -> usize {
        self.c_in * self.kh * self.kw
    }

    fn work_ns(&self) -> usize {
        self.y_len() * self.taps() / MACS_PER_NS
    }

    /// Runs `each(shape, from, to)` for runs of images of two non-empty tensors, on several threads if there is
    /// enough to do.
    fn by_images(
        &self,
        from: &[u64],
        to: &mut [u64],
        each: impl Fn(&ConvShape, &[u64], &mut [u64]) + Sync,
    ) {
        let (from_image, to_image) = (from.len() / self.n, to.len() / self.n);
        threads::split(to, to_image, self.work_ns(), |first, to| {
            let n = to.len() / to_image;
            let from = &from[first * from_image..][..n * from_image];
            each(&ConvShape { n, ..*self }, from, to);
        });
    }

    fn check(&self, x: usize, w: usize, y: usize) {
        assert_eq!(x, self.x_len(), "x is n, c_in, h, w");
        assert_eq!(w, self.w_len(), "w is c_out, c_in, kh, kw");
        assert_eq!(y, self.y_len(), "y is n, c_out, out_h, out_w");
    }
}

/// `out[N,O,oh,ow] (acc)= x[N,C,H,W] * w[O,C,kh,kw]`, a cross-correlation as networks use it.
///
/// # Panics
/// Where a slice's length does not fit the shape.
pub fn conv2d(acc: Acc, s: &ConvShape, x: &[u64], w: &[u64], out: &mut [u64]) {
    conv2d_with(isa(), acc, s, x, w, out);
}

/// The transpose of [`conv2d`] in `x`: `dx[N,C,H,W] (acc)= Σ dy · w` over all outputs that an input reaches.
///
/// # Panics
/// As [`conv2d`].
pub fn conv2d_grad_input(acc: Acc, s: &ConvShape, dy: &[u64], w: &[u64], dx: &mut [u64]) {
    conv2d_grad_input_with(isa(), acc, s, dy, w, dx);
}

/// The transpose of [`conv2d`] in `w`: `dw[O,C,kh,kw] (acc)= Σ dy · x` over all images and positions.
///
/// # Panics
/// As [`conv2d`].
pub fn conv2d_grad_weight(acc: Acc, s: &ConvShape, x: &[u64], dy: &[u64], dw: &mut [u64]) {
    conv2d_grad_weight_with(isa(), acc, s, x, dy, dw);
}

/// The layout that `conv2d` reads `x` in, the taps' offsets in it, and the outputs of one image.
fn forward_tables(s: &ConvShape) -> (Layout, Vec<usize>, Vec<Run>) {
    let (oh, ow) = (s.out_h(), s.out_w());
    let padded = [(oh - 1) * s.stride[0] + s.kh, (ow - 1) * s.stride[1] + s.kw];
    let layout = Layout::new([s.h, s.w], s.pad, padded, s.stride[1]);
    let mut taps = Vec::with_capacity(s.taps());
    for c in 0..s.c_in {
        for ky in 0..s.kh {
            taps.extend((0..s.kw).map(|kx| c * layout.plane + layout.at(ky, kx)));
        }
    }
    let runs = (0..oh)
        .map(|y| Run {
            src: layout.at(y * s.stride[0], 0),
            dst: y * ow,
            len: ow,
        })
        .collect();
    (layout, taps, join(runs, 1))
}

/// [`conv2d`] with a chosen instruction set.
///
/// # Panics
/// As [`conv2d`].
pub fn conv2d_with(isa: Isa, acc: Acc, s: &ConvShape, x: &[u64], w: &[u64], out: &mut [u64]) {
    s.check(x.len(), w.len(), out.len());
    let isa = isa.usable();
    if out.is_empty() {
        return;
    }
    if x.is_empty() {
        return settle(acc, out);
    }
    s.by_images(x, out, |s, x, out| forward(isa, acc, s, x, w, out));
}

fn forward(isa: Isa, acc: Acc, s: &ConvShape, x: &[u64], w: &[u64], out: &mut [u64]) {
    let (layout, taps_src, runs) = forward_tables(s);
    let taps_weight: Vec<usize> = (0..s.taps()).collect();
    let positions = s.out_h() * s.out_w();
    let correlation = Correlation {
        runs: &runs,
        taps_src: &taps_src,
        taps_weight: &taps_weight,
        channels: s.c_out,
        weight_step: s.taps(),
        dst_channel: positions,
        dst_step: 1,
        src_image: s.c_in * layout.plane,
        dst_image: s.c_out * positions,
    };
    let at_once = images_at_once(s.n, correlation.src_image);
    let x_chunks = x.chunks(at_once * s.c_in * s.h * s.w);
    for (x, out) in x_chunks.zip(out.chunks_mut(at_once * correlation.dst_image)) {
        let images = out.len() / correlation.dst_image;
        layout.place(x, |src| correlation.run(isa, acc, images, src, w, out));
    }
}

/// A product without summands.
fn settle(acc: Acc, out: &mut [u64]) {
    if acc == Acc::Set {
        out.fill(0);
    }
}

/// [`conv2d_grad_input`] with a chosen instruction set.
///
/// Output row `oy` reaches input row `iy` through tap row `ky` where `iy + pad = sh·oy + ky`. Divide by the stride:
/// `ky = sh·a + r` and `iy + pad = sh·t + r`, so `oy = t - a`, and for each remainder `r` (columns alike)
/// `dx[t] = Σ_a dy[t - a] · w[a]` is a correlation of stride 1.
///
/// # Panics
/// As [`conv2d`].
pub fn conv2d_grad_input_with(
    isa: Isa,
    acc: Acc,
    s: &ConvShape,
    dy: &[u64],
    w: &[u64],
    dx: &mut [u64],
) {
    s.check(dx.len(), w.len(), dy.len());
    let isa = isa.usable();
    if dx.is_empty() {
        return;
    }
    if dy.is_empty() {
        return settle(acc, dx);
    }
    s.by_images(dy, dx, |s, dy, dx| grad_input(isa, acc, s, dy, w, dx));
}

fn grad_input(isa: Isa, acc: Acc, s: &ConvShape, dy: &[u64], w: &[u64], dx: &mut [u64]) {
    // A correlation also multiplies the zeros around dy; the products of a tap and a position need a fold, which
    // costs about three quarters of a vector product for each.
    let lanes = Geometry::of(isa).lanes;
    let reached = s.out_h() * s.stride[0] * s.out_w() * s.stride[1];
    if 4 * s.c_out * s.h * s.w > (4 * s.c_out + 3 * lanes) * reached {
        return grad_input_by_taps(isa, acc, s, dy, w, dx);
    }
    let ([sh, sw], [ph, pw]) = (s.stride, s.pad);
    let (oh, ow) = (s.out_h(), s.out_w());
    // The largest a, and the largest t or output row.
    let reach = [(s.kh - 1) / sh, (s.kw - 1) / sw];
    let last = [
        ((s.h - 1 + ph) / sh).max(oh - 1),
        ((s.w - 1 + pw) / sw).max(ow - 1),
    ];
    let layout = Layout::new(
        [oh, ow],
        reach,
        [reach[0] + last[0] + 1, reach[1] + last[1] + 1],
        1,
    );
    let (src_image, dst_image) = (s.c_out * layout.plane, s.c_in * s.h * s.w);
    let at_once = images_at_once(s.n, src_image);
    let dy_chunks = dy.chunks(at_once * s.c_out * oh * ow);
    for (dy, dx) in dy_chunks.zip(dx.chunks_mut(at_once * dst_image)) {
        let images = dx.len() / dst_image;
        layout.place(dy, |src| {
            for (ry, rx) in (0..sh).flat_map(|ry| (0..sw).map(move |rx| (ry, rx))) {
                let (mut taps_src, mut taps_weight) = (Vec::new(), Vec::new());
                for o in 0..s.c_out {
                    for (a, ky) in (ry..s.kh).step_by(sh).enumerate() {
                        for (b, kx) in (rx..s.kw).step_by(sw).enumerate() {
                            taps_src.push(o * layout.plane + layout.at(reach[0] - a, reach[1] - b));
                            taps_weight.push(o * s.taps() + ky * s.kw + kx);
                        }
                    }
                }
                let (ts, us) = (span(ry, ph, sh, s.h), span(rx, pw, sw, s.w));
                if ts.is_empty() || us.is_empty() {
                    continue;
                }
                let runs = ts
                    .map(|t| Run {
                        src: layout.at(t, us.start),
                        dst: (sh * t + ry - ph) * s.w + sw * us.start + rx - pw,
                        len: us.len(),
                    })
                    .collect();
                let correlation = Correlation {
                    runs: &join(runs, sw),
                    taps_src: &taps_src,
                    taps_weight: &taps_weight,
                    channels: s.c_in,
                    weight_step: s.kh * s.kw,
                    dst_channel: s.h * s.w,
                    dst_step: sw,
                    src_image,
                    dst_image,
                };
                correlation.run(isa, acc, images, src, w, dx);
            }
        });
    }
}

/// The gradient of the input where the output is much smaller: first the products of every tap and position, a few
/// channels of a few images at a time, then their sums at the places that they reach.
fn grad_input_by_taps(isa: Isa, acc: Acc, s: &ConvShape, dy: &[u64], w: &[u64], dx: &mut [u64]) {
    let lanes = Geometry::of(isa).lanes;
    let (oh, ow) = (s.out_h(), s.out_w());
    let (positions, kernel) = (oh * ow, s.kh * s.kw);
    let (dy_image, dx_image) = (s.c_out * positions, s.c_in * s.h * s.w);
    let channels = (CHUNK_WORDS / (kernel * positions)).clamp(1, s.c_in);
    let at_once = images_at_once(s.n, s.taps() * positions);
    let cols: Vec<usize> = (0..s.c_out).map(|o| o * s.taps()).collect();
    let acc = match acc {
        Acc::Set => {
            dx.fill(0);
            Acc::Add
        }
        other => other,
    };
    let mut products = vec![0u64; channels * kernel * at_once * positions];
    let dy_chunks = dy.chunks(at_once * dy_image);
    for (dy, dx) in dy_chunks.zip(dx.chunks_mut(at_once * dx_image)) {
        let images = dx.len() / dx_image;
        let groups: Vec<Group> = (0..images)
            .flat_map(|n| (0..positions).step_by(lanes).map(move |j| (n, j)))
            .map(|(n, j)| Group {
                rhs: n * dy_image + j,
                dst: n * positions + j,
                lanes: lanes.min(positions - j),
            })
            .collect();
        for first in (0..s.c_in).step_by(channels) {
            let taps = first * kernel..(first + channels).min(s.c_in) * kernel;
            let dst_rows: Vec<usize> = (0..taps.len()).map(|t| t * images * positions).collect();
            contract(
                isa,
                Acc::Set,
                &Lhs {
                    data: w,
                    rows: &taps.clone().collect::<Vec<_>>(),
                    cols: &cols,
                },
                &Rhs {
                    data: dy,
                    rows: &(0..s.c_out).map(|o| o * positions).collect::<Vec<_>>(),
                    lane_stride: 1,
                },
                &groups,
                &mut Dst {
                    data: &mut products,
                    rows: &dst_rows,
                    lane_stride: 1,
                },
                Blocking::DIRECT,
            );
            for (t, products) in taps.zip(products.chunks_exact(images * positions)) {
                let (c, ky, kx) = (t / kernel, t % kernel / s.kw, t % s.kw);
                let planes = dx.chunks_exact_mut(s.h * s.w).skip(c).step_by(s.c_in);
                for (plane, products) in planes.zip(products.chunks_exact(positions)) {
                    fold(acc, s, [ky, kx], products, plane);
                }
            }
        }
    }
}

/// Adds a tap's product at every output position to the input position that it reaches, where there is one.
fn fold(acc: Acc, s: &ConvShape, [ky, kx]: [usize; 2], products: &[u64], plane: &mut [u64]) {
    let ow = s.out_w();
    let ([sh, sw], [ph, pw]) = (s.stride, s.pad);
    let (ys, xs) = (span(ky, ph, sh, s.h), span(kx, pw, sw, s.w));
    let (ys, xs) = (ys.start..ys.end.min(s.out_h()), xs.start..xs.end.min(ow));
    if xs.is_empty() {
        return;
    }
    for y in ys {
        let from = &products[y * ow..][xs.clone()];
        let to = &mut plane[(y * sh + ky - ph) * s.w..][xs.start * sw + kx - pw..];
        if sw == 1 {
            for (slot, &word) in to.iter_mut().zip(from) {
                *slot = acc.apply(*slot, word);
            }
        } else {
            for (slot, &word) in to.iter_mut().step_by(sw).zip(from) {
                *slot = acc.apply(*slot, word);
            }
        }
    }
}

/// [`conv2d_grad_weight`] with a chosen instruction set.
///
/// Broadcasts words of the padded image, with vectors along the output channels; sums `dw` transposed, then adds.
///
/// # Panics
/// As [`conv2d`].
pub fn conv2d_grad_weight_with(
    isa: Isa,
    acc: Acc,
    s: &ConvShape,
    x: &[u64],
    dy: &[u64],
    dw: &mut [u64],
) {
    s.check(x.len(), dw.len(), dy.len());
    let isa = isa.usable();
    if dw.is_empty() {
        return;
    }
    if x.is_empty() || dy.is_empty() {
        return settle(acc, dw);
    }
    let parts = threads::parts(s.work_ns()).min(s.n);
    let images = s.n.div_ceil(parts);
    // Each part sums its own images, transposed; the sums of the parts are added in the end.
    let size = dw.len();
    let mut sums = vec![0u64; size * s.n.div_ceil(images)];
    threads::split(&mut sums, size, s.work_ns(), |first, sums| {
        for (part, sums) in sums.chunks_exact_mut(size).enumerate() {
            let from = (first + part) * images;
            let n = images.min(s.n - from);
            let of = |all: &[u64]| from * (all.len() / s.n)..(from + n) * (all.len() / s.n);
            grad_weight_sums(isa, &ConvShape { n, ..*s }, &x[of(x)], &dy[of(dy)], sums);
        }
    });
    let (total, others) = sums.split_at_mut(size);
    for sums in others.chunks_exact(size) {
        for (total, sum) in total.iter_mut().zip(sums) {
            *total = total.wrapping_add(*sum);
        }
    }
    for (o, dw) in dw.chunks_exact_mut(s.taps()).enumerate() {
        for (t, word) in dw.iter_mut().enumerate() {
            *word = acc.apply(*word, total[t * s.c_out + o]);
        }
    }
}

/// Adds the gradient of the weights, transposed, to `sums`.
fn grad_weight_sums(isa: Isa, s: &ConvShape, x: &[u64], dy: &[u64], sums: &mut [u64]) {
    let (layout, taps, runs) = forward_tables(s);
    let lanes = Geometry::of(isa).lanes;
    let positions = s.out_h() * s.out_w();
    let (src_image, dy_image) = (s.c_in * layout.plane, s.c_out * positions);
    let groups: Vec<Group> = (0..s.c_out)
        .step_by(lanes)
        .map(|o| Group {
            rhs: o * positions,
            dst: o,
            lanes: lanes.min(s.c_out - o),
        })
        .collect();
    let rows: Vec<usize> = (0..s.taps()).map(|t| t * s.c_out).collect();
    let at_once = images_at_once(s.n, src_image.max(dy_image));
    let x_chunks = x.chunks(at_once * s.c_in * s.h * s.w);
    for (x, dy) in x_chunks.zip(dy.chunks(at_once * dy_image)) {
        let (mut src_cols, mut dy_rows) = (Vec::new(), Vec::new());
        for n in 0..dy.len() / dy_image {
            for r in &runs {
                src_cols.extend((0..r.len).map(|j| n * src_image + r.src + j));
                dy_rows.extend((0..r.len).map(|j| n * dy_image + r.dst + j));
            }
        }
        layout.place(x, |src| {
            contract(
                isa,
                Acc::Add,
                &Lhs {
                    data: src,
                    rows: &taps,
                    cols: &src_cols,
                },
                &Rhs {
                    data: dy,
                    rows: &dy_rows,
                    lane_stride: positions,
                },
                &groups,
                &mut Dst {
                    data: sums,
                    rows: &rows,
                    lane_stride: 1,
                },
                Blocking::DIRECT,
            );
        });
    }
}
