//! Convolution and its gradients in `f32`, as matrix products of patches.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, s};

use super::Parameters;
use super::layers::sizes;
use crate::network::{Layer, LayerKind};

/// The geometry of a convolution of one image.
struct Patches {
    input: [usize; 3],
    out: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [usize; 2],
    dilation: [usize; 2],
    groups: usize,
}

impl Patches {
    fn new(layer: &Layer) -> Patches {
        let [_, oh, ow] = sizes(&layer.output);
        let LayerKind::Conv {
            kernel,
            stride,
            padding,
            dilation,
            groups,
            ..
        } = layer.kind
        else {
            unreachable!("called for convolutions only");
        };
        Patches {
            input: sizes(&layer.input),
            out: [oh, ow],
            kernel,
            stride,
            padding,
            dilation,
            groups,
        }
    }

    /// Rows (channels times kernel) and columns (positions) of the patch matrix.
    fn dim(&self) -> (usize, usize) {
        (
            self.input[0] * self.kernel[0] * self.kernel[1],
            self.out[0] * self.out[1],
        )
    }

    /// Calls `each(row, first column, first input, length)` for every run of positions in a row of the
    /// image; inputs of a run are `stride[1]` apart.
    fn for_runs(&self, mut each: impl FnMut(usize, usize, usize, usize)) {
        let [c, h, w] = self.input;
        let mut row = 0;
        for plane in 0..c {
            for ky in (0..self.kernel[0]).map(|k| k * self.dilation[0]) {
                for kx in (0..self.kernel[1]).map(|k| k * self.dilation[1]) {
                    let from = self.padding[1].saturating_sub(kx).div_ceil(self.stride[1]);
                    let until = (w + self.padding[1])
                        .saturating_sub(kx)
                        .div_ceil(self.stride[1])
                        .min(self.out[1]);
                    for oy in 0..self.out[0] {
                        let y = oy * self.stride[0] + ky;
                        if y < self.padding[0] || y - self.padding[0] >= h || from >= until {
                            continue;
                        }
                        let x = from * self.stride[1] + kx - self.padding[1];
                        let at = (plane * h + y - self.padding[0]) * w + x;
                        each(row, oy * self.out[1] + from, at, until - from);
                    }
                    row += 1;
                }
            }
        }
    }

    fn gather(&self, image: &[f32], patches: &mut [f32]) {
        patches.fill(0.0);
        let cols = self.dim().1;
        self.for_runs(|row, col, at, len| {
            let out = &mut patches[row * cols + col..][..len];
            if self.stride[1] == 1 {
                out.copy_from_slice(&image[at..at + len]);
            } else {
                out.iter_mut()
                    .zip(image[at..].iter().step_by(self.stride[1]))
                    .for_each(|(o, x)| *o = *x);
            }
        });
    }

    fn scatter(&self, patches: &[f32], image: &mut [f32]) {
        let cols = self.dim().1;
        self.for_runs(|row, col, at, len| {
            let values = &patches[row * cols + col..][..len];
            values
                .iter()
                .zip(image[at..].iter_mut().step_by(self.stride[1]))
                .for_each(|(v, o)| *o += *v);
        });
    }
}

fn matrix(data: &[f32], dim: (usize, usize)) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape(dim, data).expect("a row of a batch has the layer's size")
}

fn matrix_mut(data: &mut [f32], dim: (usize, usize)) -> ArrayViewMut2<'_, f32> {
    ArrayViewMut2::from_shape(dim, data).expect("a row of a batch has the layer's size")
}

pub(super) fn conv(layer: &Layer, p: &Parameters, x: &Array2<f32>) -> Array2<f32> {
    let patches = Patches::new(layer);
    let (rows, cols) = patches.dim();
    let x = x.as_standard_layout();
    let mut y = Array2::zeros((x.nrows(), layer.output.iter().product()));
    let mut buffer = vec![0.0; rows * cols];
    for (x, mut y) in x.rows().into_iter().zip(y.rows_mut()) {
        patches.gather(x.as_slice().unwrap_or_default(), &mut buffer);
        let y = y.as_slice_mut().unwrap_or_default();
        y.chunks_mut(cols)
            .zip(&p.bias)
            .for_each(|(plane, bias)| plane.fill(*bias));
        let (filters, taps) = (p.bias.len() / patches.groups, rows / patches.groups);
        for (g, y) in y.chunks_mut(filters * cols).enumerate() {
            let weight = p.weight.slice(s![g * filters..(g + 1) * filters, ..]);
            let x = matrix(&buffer[g * taps * cols..][..taps * cols], (taps, cols));
            general_mat_mul(1.0, &weight, &x, 1.0, &mut matrix_mut(y, (filters, cols)));
        }
    }
    y
}

pub(super) fn conv_backward(
    layer: &Layer,
    p: &Parameters,
    x: &Array2<f32>,
    g: &Array2<f32>,
    needs_input: bool,
) -> (Parameters, Array2<f32>) {
    let patches = Patches::new(layer);
    let (rows, cols) = patches.dim();
    let (x, g) = (x.as_standard_layout(), g.as_standard_layout());
    let mut weight = Array2::zeros(p.weight.dim());
    let mut bias = Array1::zeros(p.bias.dim());
    let mut dx = Array2::zeros(if needs_input { x.dim() } else { (0, 0) });
    let mut buffer = vec![0.0; rows * cols];
    for (at, (x, g)) in x.rows().into_iter().zip(g.rows()).enumerate() {
        patches.gather(x.as_slice().unwrap_or_default(), &mut buffer);
        let g = matrix(g.to_slice().unwrap_or_default(), (p.bias.len(), cols));
        bias += &g.sum_axis(Axis(1));
        let (filters, taps) = (p.bias.len() / patches.groups, rows / patches.groups);
        for group in 0..patches.groups {
            let own = s![group * filters..(group + 1) * filters, ..];
            let part = &mut buffer[group * taps * cols..][..taps * cols];
            let mut weight = weight.slice_mut(own);
            let x = matrix(part, (taps, cols));
            general_mat_mul(1.0, &g.slice(own), &x.t(), 1.0, &mut weight);
            if needs_input {
                let mut dx = matrix_mut(part, (taps, cols));
                general_mat_mul(1.0, &p.weight.slice(own).t(), &g.slice(own), 0.0, &mut dx);
            }
        }
        if needs_input {
            patches.scatter(&buffer, dx.row_mut(at).as_slice_mut().unwrap_or_default());
        }
    }
    (Parameters { weight, bias }, dx)
}
