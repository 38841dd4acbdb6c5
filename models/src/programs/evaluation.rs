//! Evaluation: the confusion matrix, and the area under the ROC curve by counting pairs.
//!
//! Nothing is revealed batch by batch: predictions and labels meet under shares, and only the sums
//! leave. For the AUC every row's score `logit_1 - logit_0` is kept; then blocks of rows are compared
//! with all rows. With `G_ij = [s_i >= s_j]`, positives P and negatives N,
//! `S = sum over i in P, j in N of (G_ij - G_ji)` counts wins minus losses, ties cancel, and
//! `AUC = (1 + S / (|P| |N|)) / 2` (Mann-Whitney). Only S and the confusion matrix are revealed.
//! Where there are too many rows for that: `histogram.rs`.

use trefoil_protocol::Program;
use trefoil_protocol::program::{BuildError, Builder, Rounding, Sink, Val};

use super::forward::{Masking, forward};
use super::histogram;
use super::{Format, images, open_weights, zeros};
use crate::network::Network;

const CONFUSION: &str = "eval.confusion";
const SCORES: &str = "eval.scores";
const LABELS: &str = "eval.labels";
const BALANCE: &str = "eval.balance";
/// Counts stay below `2^COUNT_BITS`.
pub(super) const COUNT_BITS: u8 = 40;

/// How the area under the ROC curve is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AucBy {
    /// By comparing every row with every other.
    Pairs {
        /// Number of rows, padding included.
        scores: usize,
    },
    /// By a histogram of scores.
    Histogram,
}

/// A confusion matrix of zeros.
pub(super) fn clear_counts(b: &mut Builder, classes: usize) -> Result<(), BuildError> {
    b.scope("counts");
    let zero = zeros(b, &[classes; 2], 0)?;
    b.output(CONFUSION, zero, Sink::Carry)
}

/// Adds one batch to the confusion matrix: one-hot `labels [rows, classes]`, and the bits of the
/// predicted class.
pub(super) fn add_counts(b: &mut Builder, labels: Val, best: Val) -> Result<(), BuildError> {
    b.scope("counts");
    let classes = b.shape(labels)[1];
    let predicted = b.bit_to_ring(best)?;
    let counts = b.matmul(labels, predicted, true, false)?;
    let confusion = b.carried(CONFUSION, &[classes; 2], 0, COUNT_BITS)?;
    let confusion = b.add(confusion, counts)?;
    b.output(CONFUSION, confusion, Sink::Carry)
}

/// Reveals `confusion [classes, classes]`.
pub(super) fn reveal_counts(b: &mut Builder, classes: usize) -> Result<(), BuildError> {
    b.scope("counts");
    let confusion = b.carried(CONFUSION, &[classes; 2], 0, COUNT_BITS)?;
    b.output("confusion", confusion, Sink::Reveal)
}

/// Opens the weights once and sets all counts to zero.
pub fn evaluation_setup(
    network: &Network,
    format: Format,
    auc: Option<AucBy>,
) -> Result<Program, BuildError> {
    let mut b = Builder::new(
        &format!("{}-evaluation-setup", network.name),
        format.ring_bits,
    )?;
    open_weights(&mut b, network, format)?;
    clear_counts(&mut b, network.classes)?;
    let mut clear = |name: &str, shape: &[usize], frac_bits: u8| {
        let zero = zeros(&mut b, shape, frac_bits)?;
        b.output(name, zero, Sink::Carry)
    };
    if auc == Some(AucBy::Histogram) {
        clear(histogram::ABOVE, &[2, histogram::CELLS], 0)?;
    }
    if let Some(AucBy::Pairs { scores }) = auc {
        clear(SCORES, &[scores], 2 * format.frac_bits)?;
        clear(LABELS, &[scores, 2], 0)?;
        clear(BALANCE, &[1], 0)?;
    }
    Ok(b.finish())
}

/// Adds one batch to the confusion matrix (rows: label, columns: prediction) and keeps its scores.
pub fn evaluate(
    network: &Network,
    format: Format,
    rows: usize,
    auc: Option<AucBy>,
) -> Result<Program, BuildError> {
    let classes = network.classes;
    let mut b = Builder::new(&format!("{}-evaluate", network.name), format.ring_bits)?;
    let images = images(&mut b, network, format, rows)?;
    let labels = b.input("labels", &[rows, classes], 0, 1)?;
    let pass = forward(
        &mut b,
        network,
        format,
        Rounding::Nearest,
        Masking::Kept,
        images,
        false,
    )?;
    b.scope("argmax");
    let best = b.argmax(pass.logits)?;
    add_counts(&mut b, labels, best)?;
    if let Some(auc) = auc {
        let negative = b.slice(pass.logits, 1, 0, 1)?;
        let positive = b.slice(pass.logits, 1, 1, 1)?;
        let score = b.sub(positive, negative)?;
        let score = b.reshape(score, &[rows])?;
        let AucBy::Pairs { scores: total } = auc else {
            histogram::add(&mut b, score, labels)?;
            return Ok(b.finish());
        };
        let frac = b.ty(score).frac_bits;
        let kept = b.carried(
            SCORES,
            &[total],
            frac,
            frac + COUNT_BITS.min(format.ring_bits - 2 - frac),
        )?;
        push(&mut b, SCORES, kept, score)?;
        let kept = b.carried(LABELS, &[total, 2], 0, 1)?;
        push(&mut b, LABELS, kept, labels)?;
    }
    Ok(b.finish())
}

/// Appends rows to a kept queue, whose oldest rows leave it.
fn push(b: &mut Builder, name: &str, queue: Val, rows: Val) -> Result<(), BuildError> {
    let (total, new) = (b.shape(queue)[0], b.shape(rows)[0]);
    let queue = if total > new {
        let rest = b.slice(queue, 0, new, total - new)?;
        b.concat(&[rest, rows], 0)?
    } else {
        rows
    };
    b.output(name, queue, Sink::Carry)
}

/// Compares the first `rows` of the kept scores with all `scores` of them, adds wins minus losses to
/// the balance, and moves these rows to the end: one program serves every block.
pub fn auc_block(format: Format, rows: usize, scores: usize) -> Result<Program, BuildError> {
    let mut b = Builder::new("auc", format.ring_bits)?;
    b.scope("auc");
    let frac = 2 * format.frac_bits;
    let s = b.carried(
        SCORES,
        &[scores],
        frac,
        frac + COUNT_BITS.min(format.ring_bits - 2 - frac),
    )?;
    let labels = b.carried(LABELS, &[scores, 2], 0, 1)?;
    let block = b.slice(s, 0, 0, rows)?;
    let block_labels = b.slice(labels, 0, 0, rows)?;
    let left = b.broadcast(block, &[], &[scores])?;
    let right = b.broadcast(s, &[rows], &[])?;
    let wins = b.greater_equal(left, right)?;
    let wins = b.bit_to_ring(wins)?;
    // [rows, scores] [scores, 2], then [2, rows] [rows, 2]: entry (a, b) counts pairs of classes a, b.
    let by_class = b.matmul(wins, labels, false, false)?;
    let pairs = b.matmul(block_labels, by_class, true, false)?;
    let pairs = b.reshape(pairs, &[4])?;
    let won = b.slice(pairs, 0, 2, 1)?;
    let lost = b.slice(pairs, 0, 1, 1)?;
    let gain = b.sub(won, lost)?;
    let balance = b.carried(BALANCE, &[1], 0, COUNT_BITS)?;
    let balance = b.add(balance, gain)?;
    b.output(BALANCE, balance, Sink::Carry)?;
    push(&mut b, SCORES, s, block)?;
    push(&mut b, LABELS, labels, block_labels)?;
    Ok(b.finish())
}

/// Reveals `confusion [classes, classes]` and, after an AUC, `auc_balance [1]`, and by a histogram
/// `auc_ties [1]`.
pub fn evaluation_result(
    network: &Network,
    format: Format,
    auc: Option<AucBy>,
) -> Result<Program, BuildError> {
    let mut b = Builder::new(
        &format!("{}-evaluation-result", network.name),
        format.ring_bits,
    )?;
    reveal_counts(&mut b, network.classes)?;
    if auc == Some(AucBy::Histogram) {
        histogram::reveal(&mut b)?;
    } else if auc.is_some() {
        let balance = b.carried(BALANCE, &[1], 0, COUNT_BITS)?;
        b.output("auc_balance", balance, Sink::Reveal)?;
    }
    Ok(b.finish())
}
