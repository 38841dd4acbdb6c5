//! The forward pass, and the tape of what the backward pass needs from it.

use rand_chacha::rand_core::Rng;
use trefoil_protocol::program::{
    BuildError, Builder, ConvSpec, DropoutSpec, PoolSpec, Rounding, Val,
};

use super::activation::{self, Gates};
use super::average::Averages;
use super::learnt_poly;
use super::norm::{self, Normalised};
use super::{Format, Ratio, WEIGHT_INTEGER_BITS, at_most, exactly};
use crate::network::{Layer, LayerKind, Network, Window};
use crate::schedule::stream;

/// Where the openings of the weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Masking {
    /// Opened in this step, under this step's masks: a step of training.
    Fresh {
        /// The job's public seed.
        seed: u64,
    },
    /// Opened by a set-up step of the session.
    Kept,
}

/// One layer as the backward pass sees it.
#[derive(Debug)]
pub(crate) struct Recorded {
    /// Shape of its (first) input, batch first.
    pub x_shape: Vec<usize>,
    /// What it did.
    pub what: What,
}

/// What the gradient of a layer needs.
#[derive(Debug)]
pub(crate) enum What {
    /// A convolution or a dense layer on x (f fraction bits), weights w and bias.
    Linear { x: Val, w: Val, bias: Val },
    /// ReLU with its derivative bit.
    Relu { bit: Val },
    /// Max pool with its comparison bits.
    MaxPool { bits: Val },
    /// An activation with this derivative at x, as a value and the factor to multiply it with.
    Derivative { value: Val, log2_factor: u8 },
    /// Average pool with its factors.
    AvgPool(Averages),
    /// Another shape for the same elements.
    Reshape,
    /// An activation of comparisons.
    Gates(Gates),
    /// A normalisation with the batch's statistics.
    BatchNorm(Normalised),
    /// A polynomial with its coefficients.
    LearntPoly(learnt_poly::Kept),
    /// Dropout with what it dropped.
    Dropout(Dropped),
    /// A sum, or inputs put one after the other.
    Join,
}

/// What a dropout drops, and by what the rest grows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dropped {
    spec: DropoutSpec,
    factor: Ratio,
}

impl Dropped {
    /// The layer, and its gradient.
    pub(crate) fn apply(
        &self,
        b: &mut Builder,
        x: Val,
        f: u8,
        rounding: Rounding,
    ) -> Result<Val, BuildError> {
        let x = b.dropout(x, self.spec)?;
        divide(b, x, self.factor, f, rounding)
    }
}

/// The masks of a dropout layer in a job with this public seed.
pub(crate) fn dropout_spec(seed: u64, layer: &Layer, rate: f64) -> DropoutSpec {
    let mut key = [0; 16];
    stream(seed, &format!("dropout {}", layer.name)).fill_bytes(&mut key);
    let whole = libm::exp2(32.0);
    DropoutSpec {
        key,
        keep: libm::round((1.0 - rate) * whole) as u32,
    }
}

/// The forward pass.
#[derive(Debug)]
pub(crate) struct Pass {
    /// `[rows, classes]`, 2f fraction bits.
    pub logits: Val,
    /// For each layer in order what the backward pass needs.
    pub tape: Vec<Recorded>,
}

pub(crate) fn pool_spec(window: Window) -> PoolSpec {
    PoolSpec {
        window: window.size,
        stride: window.stride,
        pads: window.pads,
    }
}

pub(crate) fn conv_spec(kind: &LayerKind) -> ConvSpec {
    match kind {
        LayerKind::Conv {
            stride,
            padding,
            dilation,
            groups,
            ..
        } => ConvSpec {
            stride: *stride,
            pad: *padding,
            dilation: *dilation,
            groups: *groups,
        },
        _ => ConvSpec::default(),
    }
}

/// Builds all layers. `derivatives`: also build what only the backward pass reads.
pub(crate) fn forward(
    b: &mut Builder,
    network: &Network,
    format: Format,
    rounding: Rounding,
    masking: Masking,
    images: Val,
    derivatives: bool,
) -> Result<Pass, BuildError> {
    let f = format.frac_bits;
    let rows = b.shape(images)[0];
    let mut outputs: Vec<Val> = Vec::new();
    let mut tape = Vec::new();
    let folded: Vec<usize> = (0..network.layers.len())
        .filter_map(|at| network.folded_into(at))
        .collect();
    for (at, layer) in network.layers.iter().enumerate() {
        b.scope(&layer.name);
        let source = |source: &Option<usize>| source.map_or(images, |layer| outputs[layer]);
        let sources: Vec<Val> = layer.sources.iter().map(source).collect();
        let mut x = sources[0];
        let x_shape = b.shape(x);
        let what = match &layer.kind {
            LayerKind::Conv { .. } | LayerKind::Dense { .. } => {
                let at_f = exactly(b, x, f, rounding)?;
                let (w, bias) = match masking {
                    Masking::Kept if folded.contains(&at) => norm::folded(b, layer, format)?,
                    _ => parameters(b, layer, format, masking)?,
                };
                x = linear(b, layer, at_f, w, bias, f)?;
                What::Linear { x: at_f, w, bias }
            }
            LayerKind::Relu => {
                // The operation truncates: a value that has f fraction bits already gets more first.
                let wide = if b.ty(x).frac_bits <= f {
                    exactly(b, x, 2 * f, rounding)?
                } else {
                    x
                };
                let shift = b.ty(wide).frac_bits - f;
                let (y, bit) = b.relu_trunc(wide, shift, rounding)?;
                x = y;
                What::Relu { bit }
            }
            LayerKind::MaxPool(window) => {
                let (y, bits) = b.max_pool(x, pool_spec(*window))?;
                x = y;
                What::MaxPool { bits }
            }
            LayerKind::AvgPool { window, .. } => {
                let averages = Averages::new(layer, *window);
                x = averages.forward(b, x, f, rounding)?;
                What::AvgPool(averages)
            }
            LayerKind::Relu6 => {
                let (y, gates) = activation::relu6(b, x)?;
                x = y;
                What::Gates(gates)
            }
            LayerKind::LeakyRelu(slope) => {
                let (y, gates) = activation::leaky_relu(b, x, *slope, f, rounding)?;
                x = y;
                What::Gates(gates)
            }
            LayerKind::Smooth(curve) => {
                let (y, slope) = b.piecewise(x, *curve)?;
                x = y;
                What::Derivative {
                    value: slope,
                    log2_factor: 0,
                }
            }
            LayerKind::BatchNorm { .. } if masking != Masking::Kept => {
                let (y, kept) = norm::train(b, layer, x, format, rounding)?;
                x = y;
                What::BatchNorm(kept)
            }
            LayerKind::BatchNorm { .. } => {
                if network.folded_into(at).is_none() {
                    x = norm::infer(b, layer, x, format, rounding)?;
                }
                What::Reshape
            }
            LayerKind::Square => {
                let at_f = exactly(b, x, f, rounding)?;
                x = b.powers(at_f, 2)?[0];
                What::Derivative {
                    value: at_f,
                    log2_factor: 1,
                }
            }
            LayerKind::Poly(coefficients) => {
                let (y, slope) = b.polynomial(x, coefficients, f, rounding, derivatives)?;
                x = y;
                What::Derivative {
                    value: slope.unwrap_or(y),
                    log2_factor: 0,
                }
            }
            LayerKind::LearntPoly(_) => {
                let learnt = parameters(b, layer, format, masking)?;
                let (y, kept) = learnt_poly::forward(b, x, learnt, f, rounding)?;
                x = y;
                What::LearntPoly(kept)
            }
            LayerKind::Dropout(rate) => match masking {
                Masking::Kept => What::Reshape,
                Masking::Fresh { seed } => {
                    let kept = Dropped {
                        spec: dropout_spec(seed, layer, *rate),
                        factor: Ratio::nearest(1.0 / (1.0 - rate)),
                    };
                    x = kept.apply(b, x, f, rounding)?;
                    What::Dropout(kept)
                }
            },
            LayerKind::Softmax => What::Reshape,
            LayerKind::Flatten => {
                x = b.reshape(x, &[rows, layer.output.iter().product()])?;
                What::Reshape
            }
            LayerKind::Add => {
                let aligned = aligned(b, &sources, rounding)?;
                x = aligned[0];
                for other in &aligned[1..] {
                    x = b.add(x, *other)?;
                }
                What::Join
            }
            LayerKind::Concat => {
                let aligned = aligned(b, &sources, rounding)?;
                x = b.concat(&aligned, 1)?;
                What::Join
            }
        };
        outputs.push(x);
        tape.push(Recorded { x_shape, what });
    }
    let x = *outputs.last().unwrap_or(&images);
    b.scope("logits");
    let logits = b.reshape(x, &[rows, network.classes])?;
    let logits = exactly(b, logits, 2 * f, rounding)?;
    Ok(Pass { logits, tape })
}

fn parameters(
    b: &mut Builder,
    layer: &Layer,
    format: Format,
    masking: Masking,
) -> Result<(Val, Val), BuildError> {
    let f = format.frac_bits;
    let bound = f + WEIGHT_INTEGER_BITS;
    let shape = layer.weight_shape().unwrap_or_default();
    let name = layer.weight_name();
    let w = match masking {
        Masking::Fresh { .. } => b.carried(&name, &shape, f, bound)?,
        Masking::Kept => b.carried_masked(&name, &shape, f, bound)?,
    };
    let bias = b.carried(
        &layer.bias_name(),
        &[layer.bias_len().unwrap_or(0)],
        f,
        bound,
    )?;
    Ok((w, bias))
}

/// `w x + bias` with 2f fraction bits.
fn linear(
    b: &mut Builder,
    layer: &Layer,
    x: Val,
    w: Val,
    bias: Val,
    f: u8,
) -> Result<Val, BuildError> {
    let rows = b.shape(x)[0];
    let bias = exactly(b, bias, 2 * f, Rounding::Nearest)?;
    if let LayerKind::Conv { .. } = layer.kind {
        let y = b.conv2d(x, w, conv_spec(&layer.kind))?;
        return b.add_each(y, bias, 1, layer.output.len() - 1);
    }
    let x = b.reshape(x, &[rows, layer.fan_in()])?;
    let y = b.matmul(x, w, false, false)?;
    b.add_each(y, bias, 1, 0)
}

/// `2^log2` with these fraction bits, at least one unit.
pub(crate) fn exactly_const(log2: i8, frac_bits: u8) -> i64 {
    1i64 << (i32::from(frac_bits) + i32::from(log2)).max(0)
}

/// The values with the fraction bits of the one that has most: exact.
pub(crate) fn aligned(
    b: &mut Builder,
    values: &[Val],
    rounding: Rounding,
) -> Result<Vec<Val>, BuildError> {
    let frac = values
        .iter()
        .map(|val| b.ty(*val).frac_bits)
        .max()
        .unwrap_or(0);
    values
        .iter()
        .map(|val| exactly(b, *val, frac, rounding))
        .collect()
}

/// x, truncated to at most f fraction bits if with so many more fewer than 8 integer bits were left.
pub(crate) fn with_room(
    b: &mut Builder,
    x: Val,
    more: u8,
    f: u8,
    rounding: Rounding,
) -> Result<Val, BuildError> {
    let room = b.ring_bits() - 2 - 8;
    if b.ty(x).frac_bits + more > room {
        at_most(b, x, f, rounding)
    } else {
        Ok(x)
    }
}

/// `factor * x`, with the fraction bits of both.
pub(crate) fn divide(
    b: &mut Builder,
    x: Val,
    factor: Ratio,
    f: u8,
    rounding: Rounding,
) -> Result<Val, BuildError> {
    let x = with_room(b, x, factor.shift, f, rounding)?;
    let scaled = if factor.factor == 1 {
        x
    } else {
        b.scale(x, factor.factor)?
    };
    let frac = b.ty(x).frac_bits + factor.shift;
    b.rescale(scaled, frac)
}
