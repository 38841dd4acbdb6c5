//! Batch normalisation: with the batch's statistics in training, folded into the convolution before it
//! at inference.
//!
//! With M values a channel, g the gradient that arrives and d = x - mean:
//! - forward: `var = sum d^2 / M`, `y = 1 / sqrt(var + eps)`, `a = gamma y`, result `a d + beta`;
//! - backward: `dgamma = y sum(g d)`, `dbeta = sum g`,
//!   `dx = a g - a mean(g) - a y mean(g xhat) d` with `mean(g xhat) = dgamma / M`.
//!
//! So the normalised value is never built: d and g are opened once each, everything else is one number
//! a channel. Running statistics are carried, `r + momentum (batch - r)`, with the biased variance.
//! At inference `a` and `beta - a mean` follow from them in the set-up step, once for a session.

use trefoil_protocol::program::{BuildError, Builder, Rounding, Sink, Val};

use super::forward::{divide, exactly_const};
use super::{Format, Ratio, WEIGHT_INTEGER_BITS, at_most, exactly};
use crate::network::{Layer, LayerKind, Network, VARIANCE_EPSILON_LOG2, statistics_frac_bits};

/// Variances are below `2^8`.
const VARIANCE_HIGH_LOG2: i8 = 8;
/// Integer bits of scales and of folded weights: `1 / sqrt(eps)` is 32.
const SCALE_INTEGER_BITS: u8 = 8;
/// Fraction bits of means of gradients beyond those of statistics.
const GUARD_BITS: u8 = 4;

/// What the gradient needs of a normalisation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Normalised {
    d: Val,
    inverse: Val,
    scale: Val,
    pub gamma: Val,
    pub beta: Val,
}

/// Gradients of a normalisation, of gamma and beta summed over the batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NormGradient {
    pub gamma: Val,
    pub beta: Val,
    pub x: Option<Val>,
}

/// Axes after the channels.
fn inner_axes(b: &Builder, x: Val) -> Vec<usize> {
    b.shape(x)[2..].to_vec()
}

/// `1 / M`.
fn per_value(b: &Builder, x: Val) -> Ratio {
    let shape = b.shape(x);
    let values: usize = shape.iter().product();
    Ratio::nearest(shape[1] as f64 / values as f64)
}

/// A number for each channel, for every element.
fn spread(b: &mut Builder, channels: Val, like: Val) -> Result<Val, BuildError> {
    let rows = b.shape(like)[0];
    let inner = inner_axes(b, like);
    b.broadcast(channels, &[rows], &inner)
}

fn inverse_deviation(b: &mut Builder, variance: Val) -> Result<Val, BuildError> {
    let frac = b.ty(variance).frac_bits;
    let epsilon = exactly_const(VARIANCE_EPSILON_LOG2, frac);
    let variance = b.add_const(variance, epsilon)?;
    b.inverse_sqrt(variance, VARIANCE_EPSILON_LOG2, VARIANCE_HIGH_LOG2)
}

struct Carried {
    gamma: Val,
    beta: Val,
    mean: Val,
    variance: Val,
}

fn carried(b: &mut Builder, layer: &Layer, format: Format) -> Result<Carried, BuildError> {
    let f = format.frac_bits;
    let s = statistics_frac_bits(f);
    let channels = [layer.input[0]];
    let bound = f + WEIGHT_INTEGER_BITS;
    let statistic = s + VARIANCE_HIGH_LOG2 as u8;
    Ok(Carried {
        gamma: b.carried(&layer.weight_name(), &channels, f, bound)?,
        beta: b.carried(&layer.bias_name(), &channels, f, bound)?,
        mean: b.carried(&layer.mean_name(), &channels, s, statistic)?,
        variance: b.carried(&layer.variance_name(), &channels, s, statistic)?,
    })
}

/// Normalises with the batch's statistics and carries the running ones on.
pub(crate) fn train(
    b: &mut Builder,
    layer: &Layer,
    x: Val,
    format: Format,
    rounding: Rounding,
) -> Result<(Val, Normalised), BuildError> {
    let LayerKind::BatchNorm { momentum } = layer.kind else {
        return Err(b.error("batch_norm", "the layer is another"));
    };
    let f = format.frac_bits;
    let s = statistics_frac_bits(f);
    let state = carried(b, layer, format)?;
    let x = exactly(b, x, f, rounding)?;
    let trailing = inner_axes(b, x).len();
    let per = per_value(b, x);
    let sum = b.sum(x, 1, trailing)?;
    let mean = divide(b, sum, per, f, rounding)?;
    let center = exactly(b, mean, f, rounding)?;
    let center = spread(b, center, x)?;
    let d = b.sub(x, center)?;
    let squares = b.channel_dot(d, d, 1)?;
    let squares = at_most(b, squares, f, rounding)?;
    let variance = divide(b, squares, per, f, rounding)?;
    let variance = exactly(b, variance, s, rounding)?;
    let inverse = inverse_deviation(b, variance)?;
    let scale = b.mul(state.gamma, inverse)?;
    let scale = exactly(b, scale, s, rounding)?;
    let y = b.scale_channels(d, scale, 1)?;
    let shift = exactly(b, state.beta, f + s, rounding)?;
    let shift = spread(b, shift, d)?;
    let y = b.add(y, shift)?;
    let mean = exactly(b, mean, s, rounding)?;
    let updates = [
        (layer.mean_name(), state.mean, mean),
        (layer.variance_name(), state.variance, variance),
    ];
    for (name, running, batch) in updates {
        let by = b.sub(batch, running)?;
        let by = divide(b, by, Ratio::nearest(momentum), f, rounding)?;
        let by = exactly(b, by, s, rounding)?;
        let running = b.add(running, by)?;
        b.output(&name, running, Sink::Carry)?;
    }
    let kept = Normalised {
        d,
        inverse,
        scale,
        gamma: state.gamma,
        beta: state.beta,
    };
    Ok((y, kept))
}

/// The gradients; that of x only if it is wanted.
pub(crate) fn gradient(
    b: &mut Builder,
    kept: &Normalised,
    g: Val,
    wanted: bool,
    format: Format,
    rounding: Rounding,
) -> Result<NormGradient, BuildError> {
    let f = format.frac_bits;
    let s = statistics_frac_bits(f);
    let fine = s + GUARD_BITS;
    let g = at_most(b, g, f, rounding)?;
    let trailing = inner_axes(b, g).len();
    let beta = b.sum(g, 1, trailing)?;
    let dot = b.channel_dot(g, kept.d, 1)?;
    let dot = exactly(b, dot, s, rounding)?;
    let gamma = b.mul(dot, kept.inverse)?;
    let gamma = exactly(b, gamma, s, rounding)?;
    if !wanted {
        return Ok(NormGradient {
            gamma,
            beta,
            x: None,
        });
    }
    let per = per_value(b, g);
    let mean = divide(b, gamma, per, f, rounding)?;
    let mean = exactly(b, mean, fine, rounding)?;
    let along = b.mul(kept.inverse, mean)?;
    let along = exactly(b, along, fine, rounding)?;
    let along = b.mul(kept.scale, along)?;
    let along = exactly(b, along, s, rounding)?;
    let mean = divide(b, beta, per, f, rounding)?;
    let mean = exactly(b, mean, fine, rounding)?;
    let shift = b.mul(kept.scale, mean)?;
    let shift = exactly(b, shift, f + s, rounding)?;
    let shift = spread(b, shift, g)?;
    let x = b.scale_channels(g, kept.scale, 1)?;
    let x = b.sub(x, shift)?;
    let along = b.scale_channels(kept.d, along, 1)?;
    let x = b.sub(x, along)?;
    Ok(NormGradient {
        gamma,
        beta,
        x: Some(x),
    })
}

fn scale_name(layer: &Layer) -> String {
    format!("{}.scale", layer.name)
}

fn shift_name(layer: &Layer) -> String {
    format!("{}.shift", layer.name)
}

/// The names of the weights and the bias of a linear layer with the normalisation behind it folded in.
pub(crate) fn folded_names(layer: &Layer) -> (String, String) {
    let name = &layer.name;
    (
        format!("{name}.folded.weight"),
        format!("{name}.folded.bias"),
    )
}

/// For the set-up of a session: scale and shift from the running statistics, folded into the weights
/// and the bias of the linear layer before where nobody else reads it.
pub(crate) fn open(
    b: &mut Builder,
    network: &Network,
    at: usize,
    format: Format,
) -> Result<(), BuildError> {
    let nearest = Rounding::Nearest;
    let layer = &network.layers[at];
    let f = format.frac_bits;
    let s = statistics_frac_bits(f);
    b.scope(&layer.name);
    let state = carried(b, layer, format)?;
    let inverse = inverse_deviation(b, state.variance)?;
    let scale = b.mul(state.gamma, inverse)?;
    let scale = exactly(b, scale, s, nearest)?;
    let beta = exactly(b, state.beta, 2 * s, nearest)?;
    let Some(linear) = network.folded_into(at) else {
        let shift = b.mul(state.mean, scale)?;
        let shift = b.sub(beta, shift)?;
        let shift = exactly(b, shift, f, nearest)?;
        b.output(&scale_name(layer), scale, Sink::CarryMasked)?;
        return b.output(&shift_name(layer), shift, Sink::Carry);
    };
    let linear = &network.layers[linear];
    let bound = f + WEIGHT_INTEGER_BITS;
    let shape = linear.weight_shape().unwrap_or_default();
    let axis = usize::from(matches!(linear.kind, LayerKind::Dense { .. }));
    let w = b.carried(&linear.weight_name(), &shape, f, bound)?;
    let w = b.scale_channels(w, scale, axis)?;
    let w = exactly(b, w, f, nearest)?;
    let bias = b.carried(&linear.bias_name(), &[layer.input[0]], f, bound)?;
    let bias = exactly(b, bias, s, nearest)?;
    let bias = b.sub(bias, state.mean)?;
    let bias = b.mul(bias, scale)?;
    let bias = b.add(bias, beta)?;
    let bias = exactly(b, bias, f, nearest)?;
    let (weight_name, bias_name) = folded_names(linear);
    b.output(&weight_name, w, Sink::CarryMasked)?;
    b.output(&bias_name, bias, Sink::Carry)
}

/// Inference where nothing is folded: scale and shift of the set-up.
pub(crate) fn infer(
    b: &mut Builder,
    layer: &Layer,
    x: Val,
    format: Format,
    rounding: Rounding,
) -> Result<Val, BuildError> {
    let f = format.frac_bits;
    let s = statistics_frac_bits(f);
    let channels = [layer.input[0]];
    let x = exactly(b, x, f, rounding)?;
    let scale = scale_name(layer);
    let scale = b.carried_masked(&scale, &channels, s, s + SCALE_INTEGER_BITS)?;
    let shift = b.carried(&shift_name(layer), &channels, f, f + SCALE_INTEGER_BITS)?;
    let shift = exactly(b, shift, f + s, rounding)?;
    let shift = spread(b, shift, x)?;
    let y = b.scale_channels(x, scale, 1)?;
    b.add(y, shift)
}

/// Weights and bias of a folded layer.
pub(crate) fn folded(
    b: &mut Builder,
    layer: &Layer,
    format: Format,
) -> Result<(Val, Val), BuildError> {
    let f = format.frac_bits;
    let bound = f + SCALE_INTEGER_BITS;
    let (weight, bias) = folded_names(layer);
    let shape = layer.weight_shape().unwrap_or_default();
    let w = b.carried_masked(&weight, &shape, f, bound)?;
    let bias = b.carried(&bias, &[layer.bias_len().unwrap_or(0)], f, bound)?;
    Ok((w, bias))
}
