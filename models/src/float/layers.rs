//! Forward and backward of every layer in `f32`: convolutions as matrix products of patches.

use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis};

use super::Parameters;
use crate::network::{Layer, LayerKind, Network, Window};

/// What the backward pass of a layer needs.
#[derive(Debug)]
pub(super) enum Kept {
    /// The input.
    Input(Array2<f32>),
    /// For each output the index of the input that it is.
    Winners(Vec<u32>),
    /// Nothing.
    Nothing,
}

/// Logits and what the backward pass needs, layer by layer. All values are `[rows, elements]`.
pub(super) fn forward(
    network: &Network,
    parameters: &[Option<Parameters>],
    images: Array2<f32>,
) -> (Array2<f32>, Vec<Kept>) {
    let mut x = images;
    let mut tape = Vec::new();
    for (layer, parameters) in network.layers.iter().zip(parameters) {
        let (y, kept) = match (&layer.kind, parameters) {
            (LayerKind::Conv { .. }, Some(p)) => (conv(layer, p, &x), Kept::Input(x)),
            (LayerKind::Dense { .. }, Some(p)) => (x.dot(&p.weight) + &p.bias, Kept::Input(x)),
            (LayerKind::Relu, _) => (x.mapv(|x| x.max(0.0)), Kept::Input(x)),
            (LayerKind::Square, _) => (x.mapv(|x| x * x), Kept::Input(x)),
            (LayerKind::Poly(c), _) => (x.mapv(|x| polynomial(c, x)), Kept::Input(x)),
            (LayerKind::MaxPool(window), _) => {
                let (y, winners) = max_pool(layer, *window, &x);
                (y, Kept::Winners(winners))
            }
            (LayerKind::AvgPool(window), _) => (avg_pool(layer, *window, &x), Kept::Nothing),
            _ => (x, Kept::Nothing),
        };
        x = y;
        tape.push(kept);
    }
    (x, tape)
}

/// Gradients of all parameters from the gradient of the logits.
pub(super) fn backward(
    network: &Network,
    parameters: &[Option<Parameters>],
    tape: &[Kept],
    dz: Array2<f32>,
) -> Vec<Option<Parameters>> {
    let mut gradients = vec![None; network.layers.len()];
    let first = parameters.iter().position(Option::is_some).unwrap_or(0);
    let mut g = dz;
    for (at, layer) in network.layers.iter().enumerate().skip(first).rev() {
        g = match (&layer.kind, &parameters[at], &tape[at]) {
            (LayerKind::Conv { .. }, Some(p), Kept::Input(x)) => {
                let (gradient, dx) = conv_backward(layer, p, x, &g, at > first);
                gradients[at] = Some(gradient);
                dx
            }
            (LayerKind::Dense { .. }, Some(p), Kept::Input(x)) => {
                gradients[at] = Some(Parameters {
                    weight: x.t().dot(&g),
                    bias: g.sum_axis(Axis(0)),
                });
                if at > first { g.dot(&p.weight.t()) } else { g }
            }
            (LayerKind::Relu, _, Kept::Input(x)) => times(g, x, |x| f32::from(u8::from(x > 0.0))),
            (LayerKind::Square, _, Kept::Input(x)) => times(g, x, |x| 2.0 * x),
            (LayerKind::Poly(c), _, Kept::Input(x)) => {
                let slopes: Vec<f64> = c
                    .iter()
                    .enumerate()
                    .skip(1)
                    .map(|(j, c)| j as f64 * c)
                    .collect();
                times(g, x, |x| polynomial(&slopes, x))
            }
            (LayerKind::MaxPool(_), _, Kept::Winners(winners)) => {
                let mut dx = Array2::zeros((g.nrows(), layer.input.iter().product()));
                let outputs = g.ncols().max(1);
                for ((mut dx, g), winners) in dx
                    .rows_mut()
                    .into_iter()
                    .zip(g.rows())
                    .zip(winners.chunks(outputs))
                {
                    g.iter()
                        .zip(winners)
                        .for_each(|(g, at)| dx[*at as usize] += g);
                }
                dx
            }
            (LayerKind::AvgPool(window), _, _) => {
                let mut dx = Array2::zeros((g.nrows(), layer.input.iter().product()));
                let n = (window.size[0] * window.size[1]) as f32;
                for (mut dx, g) in dx.rows_mut().into_iter().zip(g.rows()) {
                    for_windows(layer, *window, |out, at| dx[at] += g[out] / n);
                }
                dx
            }
            _ => g,
        };
    }
    gradients
}

fn times(mut g: Array2<f32>, x: &Array2<f32>, slope: impl Fn(f32) -> f32) -> Array2<f32> {
    g.zip_mut_with(x, |g, x| *g *= slope(*x));
    g
}

fn polynomial(coefficients: &[f64], x: f32) -> f32 {
    coefficients
        .iter()
        .rev()
        .fold(0.0, |sum, c| sum * x + *c as f32)
}

/// Calls `each(output, input)` for every element of every pooling window of one image.
fn for_windows(layer: &Layer, window: Window, mut each: impl FnMut(usize, usize)) {
    let ([c, h, w], [_, oh, ow]) = (sizes(&layer.input), sizes(&layer.output));
    for plane in 0..c {
        for oy in 0..oh {
            for ox in 0..ow {
                for dy in 0..window.size[0] {
                    let row = (plane * h + oy * window.stride[0] + dy) * w + ox * window.stride[1];
                    (0..window.size[1]).for_each(|dx| each((plane * oh + oy) * ow + ox, row + dx));
                }
            }
        }
    }
}

fn sizes(shape: &[usize]) -> [usize; 3] {
    match shape {
        [c, h, w] => [*c, *h, *w],
        _ => [shape.iter().product(), 1, 1],
    }
}

fn max_pool(layer: &Layer, window: Window, x: &Array2<f32>) -> (Array2<f32>, Vec<u32>) {
    let outputs: usize = layer.output.iter().product();
    let mut y = Array2::from_elem((x.nrows(), outputs), f32::NEG_INFINITY);
    let mut winners = vec![0; x.nrows() * outputs];
    for ((mut y, x), winners) in y
        .rows_mut()
        .into_iter()
        .zip(x.rows())
        .zip(winners.chunks_mut(outputs))
    {
        for_windows(layer, window, |out, at| {
            if x[at] > y[out] {
                y[out] = x[at];
                winners[out] = at as u32;
            }
        });
    }
    (y, winners)
}

fn avg_pool(layer: &Layer, window: Window, x: &Array2<f32>) -> Array2<f32> {
    let n = (window.size[0] * window.size[1]) as f32;
    let mut y = Array2::zeros((x.nrows(), layer.output.iter().product()));
    for (mut y, x) in y.rows_mut().into_iter().zip(x.rows()) {
        for_windows(layer, window, |out, at| y[out] += x[at] / n);
    }
    y
}

/// The geometry of a convolution of one image.
struct Patches {
    input: [usize; 3],
    out: [usize; 2],
    kernel: [usize; 2],
    stride: [usize; 2],
    padding: [usize; 2],
}

impl Patches {
    fn new(layer: &Layer) -> Patches {
        let [_, oh, ow] = sizes(&layer.output);
        let LayerKind::Conv {
            kernel,
            stride,
            padding,
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
            for ky in 0..self.kernel[0] {
                for kx in 0..self.kernel[1] {
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

fn conv(layer: &Layer, p: &Parameters, x: &Array2<f32>) -> Array2<f32> {
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
        let mut y = matrix_mut(y, (p.bias.len(), cols));
        general_mat_mul(1.0, &p.weight, &matrix(&buffer, (rows, cols)), 1.0, &mut y);
    }
    y
}

fn conv_backward(
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
        general_mat_mul(
            1.0,
            &g,
            &matrix(&buffer, (rows, cols)).t(),
            1.0,
            &mut weight,
        );
        bias += &g.sum_axis(Axis(1));
        if needs_input {
            general_mat_mul(
                1.0,
                &p.weight.t(),
                &g,
                0.0,
                &mut matrix_mut(&mut buffer, (rows, cols)),
            );
            patches.scatter(&buffer, dx.row_mut(at).as_slice_mut().unwrap_or_default());
        }
    }
    (Parameters { weight, bias }, dx)
}
