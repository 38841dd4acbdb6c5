//! A reliability histogram: how sure a model is of its predictions, and how often it is right.
//!
//! 1. For every row the probability p of the predicted class (softmax, 16 fraction bits), and the bits
//!    `[p >= b / 10]` for b = 1 .. 9, all from one opening of p.
//! 2. Times 1, times whether the prediction is right, and times p, summed over rows with a label
//!    (padding has none): counts at or above each threshold.
//! 3. At the end the differences of neighbours, which are the bins, are revealed: rows, right ones and
//!    the sum of p. Which row is in which bin is not.
//!
//! The softmax is within 2^-10, so that a bin's mean is too, and a row that is nearer than this to a
//! threshold may be counted in the bin beside.

use trefoil_protocol::Tensor;
use trefoil_protocol::program::{BuildError, Builder, Sink, Val};

use super::evaluation::COUNT_BITS;

/// Carried: rows, right ones and the sum of p (first axis) at or above each threshold.
pub(super) const ABOVE: &str = "eval.reliability";
/// Bins of equal width.
pub(crate) const BINS: usize = 10;
/// Fraction bits of p.
pub(crate) const CONFIDENCE_BITS: u8 = 16;

/// Adds a batch: `logits [rows, classes]`, `best` (bits) and `labels` one-hot of the same shape.
pub(super) fn add(b: &mut Builder, logits: Val, best: Val, labels: Val) -> Result<(), BuildError> {
    b.scope("reliability");
    let rows = b.shape(logits)[0];
    let p = b.softmax(logits)?;
    let p = b.bit_dot(best, p)?;
    let right = b.bit_dot(best, labels)?;
    let labelled = b.sum(labels, 0, 1)?;
    let ones = Tensor::new(vec![rows, 1], vec![1; rows]);
    let mut above = vec![b.constant(ones, 0)?];
    for bin in 1..BINS {
        let threshold = ((bin << CONFIDENCE_BITS) as u64).div_ceil(BINS as u64);
        let bit = b.at_least(p, threshold as i64)?;
        let bit = b.bit_to_ring(bit)?;
        above.push(b.reshape(bit, &[rows, 1])?);
    }
    let above = b.concat(&above, 1)?;
    // Whole numbers: a sum of p counts its last place.
    let p = b.rescale(p, 0)?;
    let p = b.mul(p, labelled)?;
    let mut weights = Vec::new();
    for each in [labelled, right, p] {
        weights.push(b.reshape(each, &[1, rows])?);
    }
    let weights = b.concat(&weights, 0)?;
    let counts = b.matmul(weights, above, false, false)?;
    let so_far = b.carried(ABOVE, &[3, BINS], 0, COUNT_BITS)?;
    let counts = b.add(so_far, counts)?;
    b.output(ABOVE, counts, Sink::Carry)
}

/// Reveals `calibration [3, 10]`: rows, right ones, and the sum of their p (16 fraction bits) of each
/// bin.
pub(super) fn reveal(b: &mut Builder) -> Result<(), BuildError> {
    b.scope("reliability");
    let above = b.carried(ABOVE, &[3, BINS], 0, COUNT_BITS)?;
    let rest = b.slice(above, 1, 1, BINS - 1)?;
    let none = super::zeros(b, &[3, 1], 0)?;
    let next = b.concat(&[rest, none], 1)?;
    let bins = b.sub(above, next)?;
    b.output("calibration", bins, Sink::Reveal)
}
