//! Forward and backward of every layer in `f32`, along the network's graph.

use ndarray::{Array2, ArrayView2, Axis, concatenate, s};
use trefoil_protocol::op::dropout;

use super::Parameters;
use super::conv::{conv, conv_backward};
use super::learnt;
use super::norm::{self, Statistics, normalise};
use crate::network::{Layer, LayerKind, Network, Window, fit};
use crate::programs::dropout_spec;

/// What a forward pass leaves. All values are `[rows, elements]`.
#[derive(Debug)]
pub(super) struct Tape {
    images: Array2<f32>,
    outputs: Vec<Array2<f32>>,
    /// For each max pool and output the index of the input that it is.
    winners: Vec<Vec<u32>>,
    /// For each dropout what each value was multiplied with.
    factors: Vec<Option<Array2<f32>>>,
    /// For each normalisation what it used.
    pub(super) statistics: Vec<Option<Statistics>>,
}

impl Tape {
    fn source(&self, source: Option<usize>) -> &Array2<f32> {
        source.map_or(&self.images, |layer| &self.outputs[layer])
    }

    /// The last layer's outputs.
    pub(super) fn logits(&self) -> &Array2<f32> {
        self.outputs.last().unwrap_or(&self.images)
    }
}

/// What a forward pass is for.
#[derive(Clone, Copy)]
pub(super) enum Use<'a> {
    /// A step of training: normalises with the batch's own statistics, drops out.
    Training {
        /// The job's public seed.
        seed: u64,
        /// The step of the job.
        step: u64,
        /// Where these images stand in the batch.
        first_row: usize,
    },
    /// Anything else: normalises with these running statistics.
    Inference(&'a [Option<Statistics>]),
}

/// Computes all layers.
pub(super) fn forward(
    network: &Network,
    parameters: &[Option<Parameters>],
    wanted: Use<'_>,
    images: Array2<f32>,
) -> Tape {
    let mut tape = Tape {
        images,
        outputs: Vec::new(),
        winners: Vec::new(),
        factors: Vec::new(),
        statistics: Vec::new(),
    };
    for (at, (layer, parameters)) in network.layers.iter().zip(parameters).enumerate() {
        let mut statistics = None;
        let x = tape.source(layer.sources[0]);
        let mut winners = Vec::new();
        let mut factors = None;
        let y = match (&layer.kind, parameters) {
            (LayerKind::Conv { .. }, Some(p)) => conv(layer, p, x),
            (LayerKind::Dense { .. }, Some(p)) => x.dot(&p.weight) + &p.bias,
            (LayerKind::Relu, _) => x.mapv(|x| x.max(0.0)),
            (LayerKind::Relu6, _) => x.mapv(|x| x.clamp(0.0, 6.0)),
            (LayerKind::LeakyRelu(slope), _) => x.mapv(|x| x.max(x * *slope as f32)),
            (LayerKind::Smooth(curve), _) => x.mapv(|x| curve.value(x.into()) as f32),
            (LayerKind::BatchNorm { .. }, Some(p)) => {
                let kept = match wanted {
                    Use::Training { .. } => None,
                    Use::Inference(running) => running[at].clone(),
                };
                let by = kept.unwrap_or_else(|| Statistics::of(x, p.bias.len()));
                let y = normalise(x, p, &by);
                statistics = Some(by);
                y
            }
            (LayerKind::Square, _) => x.mapv(|x| x * x),
            (LayerKind::Poly(c), _) => x.mapv(|x| fit::evaluate(c, x.into()) as f32),
            (LayerKind::LearntPoly(_), Some(p)) => learnt::forward(p, x),
            (LayerKind::MaxPool(window), _) => {
                let (y, at) = max_pool(layer, *window, x);
                winners = at;
                y
            }
            (LayerKind::AvgPool { window, .. }, _) => avg_pool(layer, *window, x),
            (LayerKind::Dropout(rate), _) => match wanted {
                Use::Inference(_) => x.clone(),
                Use::Training {
                    seed,
                    step,
                    first_row,
                } => {
                    let spec = dropout_spec(seed, layer, *rate);
                    let mut kept = vec![1.0 / (1.0 - *rate as f32); x.len()];
                    dropout::apply(&spec, step, first_row * x.ncols(), &mut kept);
                    let kept = Array2::from_shape_vec(x.dim(), kept).expect("as many as x has");
                    let y = x * &kept;
                    factors = Some(kept);
                    y
                }
            },
            (LayerKind::Add, _) => {
                let mut sum = x.clone();
                layer.sources[1..]
                    .iter()
                    .for_each(|other| sum += tape.source(*other));
                sum
            }
            (LayerKind::Concat, _) => {
                let parts: Vec<ArrayView2<'_, f32>> = layer
                    .sources
                    .iter()
                    .map(|part| tape.source(*part).view())
                    .collect();
                concatenate(Axis(1), &parts).expect("parts have the batch's rows")
            }
            _ => x.clone(),
        };
        tape.outputs.push(y);
        tape.winners.push(winners);
        tape.factors.push(factors);
        tape.statistics.push(statistics);
    }
    tape
}

/// Gradients of all parameters from the gradient of the logits.
pub(super) fn backward(
    network: &Network,
    parameters: &[Option<Parameters>],
    tape: &Tape,
    dz: Array2<f32>,
) -> Vec<Option<Parameters>> {
    let mut gradients = vec![None; network.layers.len()];
    let trained = network.trained();
    let mut arrived: Vec<Option<Array2<f32>>> = vec![None; network.layers.len()];
    *arrived.last_mut().expect("a network has layers") = Some(dz);
    for (at, layer) in network.layers.iter().enumerate().rev() {
        let Some(g) = arrived[at].take() else {
            continue;
        };
        let x = tape.source(layer.sources[0]);
        let wanted = layer.sources[0].is_some_and(|source| trained[source]);
        let dx = match (&layer.kind, &parameters[at]) {
            (LayerKind::Conv { .. }, Some(p)) => {
                let (gradient, dx) = conv_backward(layer, p, x, &g, wanted);
                gradients[at] = Some(gradient);
                dx
            }
            (LayerKind::Dense { .. }, Some(p)) => {
                gradients[at] = Some(Parameters {
                    weight: x.t().dot(&g),
                    bias: g.sum_axis(Axis(0)),
                });
                if wanted { g.dot(&p.weight.t()) } else { g }
            }
            (LayerKind::Relu, _) => times(g, x, |x| f32::from(u8::from(x > 0.0))),
            (LayerKind::Relu6, _) => times(g, x, |x| f32::from(u8::from(x > 0.0 && x < 6.0))),
            (LayerKind::LeakyRelu(slope), _) => {
                times(g, x, |x| if x > 0.0 { 1.0 } else { *slope as f32 })
            }
            (LayerKind::Smooth(curve), _) => times(g, x, |x| curve.slope(x.into()) as f32),
            (LayerKind::BatchNorm { .. }, Some(p)) => {
                let by = tape.statistics[at]
                    .as_ref()
                    .expect("the forward pass kept them");
                let (gradient, dx) = norm::backward(x, p, by, &g);
                gradients[at] = Some(gradient);
                dx
            }
            (LayerKind::Square, _) => times(g, x, |x| 2.0 * x),
            (LayerKind::Poly(c), _) => {
                let slopes: Vec<f64> = c
                    .iter()
                    .enumerate()
                    .skip(1)
                    .map(|(j, c)| j as f64 * c)
                    .collect();
                times(g, x, |x| fit::evaluate(&slopes, x.into()) as f32)
            }
            (LayerKind::LearntPoly(_), Some(p)) => {
                let (gradient, dx) = learnt::backward(p, x, &g);
                gradients[at] = Some(gradient);
                dx
            }
            (LayerKind::MaxPool(_), _) => {
                let mut dx = Array2::zeros(x.dim());
                let outputs = g.ncols().max(1);
                for ((mut dx, g), winners) in dx
                    .rows_mut()
                    .into_iter()
                    .zip(g.rows())
                    .zip(tape.winners[at].chunks(outputs))
                {
                    g.iter()
                        .zip(winners)
                        .for_each(|(g, at)| dx[*at as usize] += g);
                }
                dx
            }
            (LayerKind::AvgPool { window, .. }, _) => {
                let mut dx = Array2::zeros(x.dim());
                let n = layer.counts();
                for (mut dx, g) in dx.rows_mut().into_iter().zip(g.rows()) {
                    for_windows(layer, *window, |out, at| {
                        dx[at] += g[out] / n[out % n.len()] as f32;
                    });
                }
                dx
            }
            (LayerKind::Dropout(_), _) => match &tape.factors[at] {
                Some(factors) => g * factors,
                None => g,
            },
            _ => g,
        };
        let mut start = 0;
        for source in &layer.sources {
            let part = if layer.kind == LayerKind::Concat {
                let end = start + tape.source(*source).ncols();
                let part = dx.slice(s![.., start..end]).to_owned();
                start = end;
                part
            } else {
                dx.clone()
            };
            if let Some(source) = source.filter(|source| trained[*source]) {
                match &mut arrived[source] {
                    Some(sum) => *sum += &part,
                    none => *none = Some(part),
                }
            }
        }
    }
    gradients
}

fn times(mut g: Array2<f32>, x: &Array2<f32>, slope: impl Fn(f32) -> f32) -> Array2<f32> {
    g.zip_mut_with(x, |g, x| *g *= slope(*x));
    g
}

/// Calls `each(output, input)` for every element of every pooling window that lies in the image.
fn for_windows(layer: &Layer, window: Window, mut each: impl FnMut(usize, usize)) {
    let ([c, h, w], [_, oh, ow]) = (sizes(&layer.input), sizes(&layer.output));
    for plane in 0..c {
        for oy in 0..oh {
            for ox in 0..ow {
                let inside = |axis: usize, at: usize, length: usize| {
                    let start = at * window.stride[axis];
                    let seen = start.max(window.pads[axis])
                        ..(start + window.size[axis]).min(window.pads[axis] + length);
                    seen.map(move |at| at - window.pads[axis])
                };
                for y in inside(0, oy, h) {
                    let row = (plane * h + y) * w;
                    inside(1, ox, w).for_each(|x| each((plane * oh + oy) * ow + ox, row + x));
                }
            }
        }
    }
}

pub(super) fn sizes(shape: &[usize]) -> [usize; 3] {
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
    let n = layer.counts();
    let mut y = Array2::zeros((x.nrows(), layer.output.iter().product()));
    for (mut y, x) in y.rows_mut().into_iter().zip(x.rows()) {
        for_windows(layer, window, |out, at| {
            y[out] += x[at] / n[out % n.len()] as f32;
        });
    }
    y
}
