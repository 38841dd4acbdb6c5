//! The Programs of training and inference: what every step of a job computes.
//!
//! Scales, with f fraction bits: weights, biases and activations have f; a linear layer gives 2f, its
//! bias is scaled up to that; pools work at whatever scale they are given, and a truncation happens
//! where the next product needs f (fused into ReLU where there is one). Logits stay at 2f. Forward,
//! backward, update, evaluation and AUC have a file each. How an operation is made secure is not
//! known here.

mod activation;
mod adam;
mod average;
mod backward;
mod calibration;
mod evaluation;
mod forward;
mod histogram;
mod learnt_poly;
mod loss;
pub(crate) mod neighbours;
mod norm;
mod update;

use trefoil_protocol::program::{BuildError, Builder, Rounding, Sink, Val};
use trefoil_protocol::{Program, Tensor};

pub(crate) use calibration::CONFIDENCE_BITS;
pub use evaluation::{
    AucBy, Figures, auc_block, evaluate, evaluation_result, evaluation_setup, hospital_result,
    validate, validation_result, validation_setup,
};
pub(crate) use loss::LOSS_SCOPES;
pub use update::{Ratio, state_names};

use crate::job::{PredictOutput, TrainSpec};
use crate::network::{Network, statistics_frac_bits};
pub(crate) use forward::dropout_spec;
use forward::{Masking, forward};

/// The number format of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Fraction bits f.
    pub frac_bits: u8,
    /// Ring bits k.
    pub ring_bits: u8,
}

/// Integer bits of images that the programs presume: normalised pixels are below 8.
const IMAGE_INTEGER_BITS: u8 = 3;
/// Integer bits of weights that the programs presume.
pub const WEIGHT_INTEGER_BITS: u8 = 4;

pub(crate) fn images(
    b: &mut Builder,
    network: &Network,
    format: Format,
    rows: usize,
) -> Result<Val, BuildError> {
    let [c, h, w] = network.input;
    b.scope("input");
    b.input(
        "images",
        &[rows, c, h, w],
        format.frac_bits,
        format.frac_bits + IMAGE_INTEGER_BITS,
    )
}

/// One step of stochastic gradient descent with the learning rate `rate`.
///
/// Inputs `images [batch, c, h, w]` (f fraction bits) and `labels [batch, classes]` (one-hot, 0
/// fraction bits); carries the weights (and velocities); reveals nothing.
pub fn train(network: &Network, spec: &TrainSpec, rate: f64) -> Result<Program, BuildError> {
    let format = Format {
        frac_bits: spec.frac_bits,
        ring_bits: spec.ring_bits,
    };
    let mut b = Builder::new(&format!("{}-train", network.name), spec.ring_bits)?;
    let images = images(&mut b, network, format, spec.batch)?;
    let labels = b.input("labels", &[spec.batch, network.classes], 0, 1)?;
    let pass = forward(
        &mut b,
        network,
        format,
        spec.rounding,
        Masking::Fresh { seed: spec.seed },
        images,
        true,
    )?;
    let dz = loss::gradient(&mut b, spec, pass.logits, labels)?;
    let gradients = backward::backward(&mut b, network, format, spec.rounding, &pass.tape, dz)?;
    let step = update::Update::new(&b, spec, rate)?;
    for gradient in gradients {
        b.scope(&network.layers[gradient.layer].name);
        step.apply(&mut b, &gradient.name, gradient.value, gradient.sum)?;
    }
    Ok(b.finish())
}

/// Opens the weights under their masks once, for all steps of the session that follow.
pub fn setup(network: &Network, format: Format) -> Result<Program, BuildError> {
    let mut b = Builder::new(&format!("{}-setup", network.name), format.ring_bits)?;
    open_weights(&mut b, network, format)?;
    Ok(b.finish())
}

fn open_weights(b: &mut Builder, network: &Network, format: Format) -> Result<(), BuildError> {
    let folded: Vec<usize> = (0..network.layers.len())
        .filter_map(|at| network.folded_into(at))
        .collect();
    for (at, layer) in network.layers.iter().enumerate() {
        if layer.is_norm() {
            norm::open(b, network, at, format)?;
        } else if let Some(shape) = layer.weight_shape()
            && !folded.contains(&at)
        {
            b.scope(&layer.name);
            let name = layer.weight_name();
            let w = b.carried(
                &name,
                &shape,
                format.frac_bits,
                format.frac_bits + WEIGHT_INTEGER_BITS,
            )?;
            b.output(&name, w, Sink::CarryMasked)?;
        }
    }
    Ok(())
}

/// Predictions for `images [rows, c, h, w]`; needs [`setup`] before it in the session.
///
/// Reveals `class [rows]`, or `logits [rows, classes]` (2f fraction bits), or `probabilities [rows,
/// classes]` (16 fraction bits).
pub fn predict(
    network: &Network,
    format: Format,
    rows: usize,
    output: PredictOutput,
) -> Result<Program, BuildError> {
    let mut b = Builder::new(&format!("{}-predict", network.name), format.ring_bits)?;
    let images = images(&mut b, network, format, rows)?;
    let logits = forward(
        &mut b,
        network,
        format,
        Rounding::Nearest,
        Masking::Kept,
        images,
        false,
    )?
    .logits;
    match output {
        PredictOutput::Class => {
            b.scope("argmax");
            let class = b.argmax(logits)?;
            b.output("class", class, Sink::RevealIndex)?;
        }
        PredictOutput::Logits => b.output("logits", logits, Sink::Reveal)?,
        PredictOutput::Probabilities => {
            b.scope("softmax");
            let p = b.softmax(logits)?;
            b.output("probabilities", p, Sink::Reveal)?;
        }
    }
    Ok(b.finish())
}

/// Reveals every weight and bias, and every running statistic, under its name.
pub fn reveal_weights(network: &Network, format: Format) -> Result<Program, BuildError> {
    let mut b = Builder::new(
        &format!("{}-reveal-weights", network.name),
        format.ring_bits,
    )?;
    for (name, shape) in network.parameters() {
        let w = b.carried(
            &name,
            &shape,
            format.frac_bits,
            format.frac_bits + WEIGHT_INTEGER_BITS,
        )?;
        b.output(&name, w, Sink::Reveal)?;
    }
    let s = statistics_frac_bits(format.frac_bits);
    for (name, shape) in network.statistics() {
        let v = b.carried(&name, &shape, s, s + 8)?;
        b.output(&name, v, Sink::Reveal)?;
    }
    Ok(b.finish())
}

/// The value with at most `frac_bits` fraction bits: truncated if it has more.
pub(crate) fn at_most(
    b: &mut Builder,
    x: Val,
    frac_bits: u8,
    rounding: Rounding,
) -> Result<Val, BuildError> {
    match b.ty(x).frac_bits.checked_sub(frac_bits) {
        None | Some(0) => Ok(x),
        Some(shift) => b.trunc(x, shift, rounding),
    }
}

/// The value with exactly `frac_bits` fraction bits.
pub(crate) fn exactly(
    b: &mut Builder,
    x: Val,
    frac_bits: u8,
    rounding: Rounding,
) -> Result<Val, BuildError> {
    let frac = b.ty(x).frac_bits;
    if frac >= frac_bits {
        return at_most(b, x, frac_bits, rounding);
    }
    let scaled = b.scale(x, 1 << (frac_bits - frac))?;
    b.rescale(scaled, frac_bits)
}

/// All zeros.
pub(crate) fn zeros(b: &mut Builder, shape: &[usize], frac_bits: u8) -> Result<Val, BuildError> {
    b.constant(Tensor::zeros(shape), frac_bits)
}
