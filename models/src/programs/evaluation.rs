//! Evaluation: the confusion matrix, and the area under the ROC curve by counting pairs; and how many
//! rows are right, for an early stop.
//!
//! Nothing is revealed batch by batch: predictions and labels meet under shares, and only the sums
//! leave. For the AUC every row's score `logit_1 - logit_0` is kept; then blocks of rows are compared
//! with all rows. With `G_ij = [s_i >= s_j]`, positives P and negatives N,
//! `S = sum over i in P, j in N of (G_ij - G_ji)` counts wins minus losses, ties cancel, and
//! `AUC = (1 + S / (|P| |N|)) / 2` (Mann-Whitney). Only S and the confusion matrix are revealed.
//! Where there are too many rows for that: `histogram.rs`. How sure the model is: `calibration.rs`.

use trefoil_protocol::Program;
use trefoil_protocol::program::{BuildError, Builder, Rounding, Sink, Val};

use super::forward::{Masking, forward};
use super::{Format, images, open_weights, zeros};
use super::{calibration, histogram};
use crate::early_stop::VALIDATION_RIGHT;
use crate::network::Network;

const CONFUSION: &str = "eval.confusion";
/// The confusion matrix of the hospitals so far.
const COUNTED: &str = "eval.counted";
const RIGHT: &str = "eval.right";
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

/// What an evaluation counts beside the confusion matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// The area under the ROC curve.
    pub auc: Option<AucBy>,
    /// The reliability histogram.
    pub calibration: bool,
    /// Counts are revealed after each hospital's rows.
    pub by_hospital: bool,
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
    figures: Figures,
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
    if figures.by_hospital {
        clear(COUNTED, &[network.classes; 2], 0)?;
    }
    if figures.calibration {
        clear(calibration::ABOVE, &[3, calibration::BINS], 0)?;
    }
    if figures.auc == Some(AucBy::Histogram) {
        clear(histogram::ABOVE, &[2, histogram::CELLS], 0)?;
    }
    if let Some(AucBy::Pairs { scores }) = figures.auc {
        clear(SCORES, &[scores], 2 * format.frac_bits)?;
        clear(LABELS, &[scores, 2], 0)?;
        clear(BALANCE, &[1], 0)?;
    }
    Ok(b.finish())
}

/// A batch of labelled rows and what the model says of them, `[rows, classes]` each.
struct Classified {
    logits: Val,
    /// The predicted class, one-hot bits.
    best: Val,
    labels: Val,
}

fn classified(
    b: &mut Builder,
    network: &Network,
    format: Format,
    rows: usize,
) -> Result<Classified, BuildError> {
    let images = images(b, network, format, rows)?;
    let labels = b.input("labels", &[rows, network.classes], 0, 1)?;
    let rounding = Rounding::Nearest;
    let pass = forward(b, network, format, rounding, Masking::Kept, images, false)?;
    b.scope("argmax");
    let best = b.argmax(pass.logits)?;
    b.scope("counts");
    Ok(Classified {
        logits: pass.logits,
        best,
        labels,
    })
}

/// Adds one batch to the confusion matrix (rows: label, columns: prediction) and keeps its scores.
pub fn evaluate(
    network: &Network,
    format: Format,
    rows: usize,
    figures: Figures,
) -> Result<Program, BuildError> {
    let mut b = Builder::new(&format!("{}-evaluate", network.name), format.ring_bits)?;
    let Classified {
        logits,
        best,
        labels,
    } = classified(&mut b, network, format, rows)?;
    add_counts(&mut b, labels, best)?;
    if figures.calibration {
        calibration::add(&mut b, logits, best, labels)?;
    }
    if let Some(auc) = figures.auc {
        let negative = b.slice(logits, 1, 0, 1)?;
        let positive = b.slice(logits, 1, 1, 1)?;
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

/// Reveals `hospital_confusion [classes, classes]`: what was counted since the last such step.
pub fn hospital_result(network: &Network, format: Format) -> Result<Program, BuildError> {
    let mut b = Builder::new(&format!("{}-hospital", network.name), format.ring_bits)?;
    b.scope("counts");
    let counts = b.carried(CONFUSION, &[network.classes; 2], 0, COUNT_BITS)?;
    let counted = b.carried(COUNTED, &[network.classes; 2], 0, COUNT_BITS)?;
    let own = b.sub(counts, counted)?;
    b.output("hospital_confusion", own, Sink::Reveal)?;
    b.output(COUNTED, counts, Sink::Carry)?;
    Ok(b.finish())
}

/// Reveals `confusion [classes, classes]`; where they were counted `calibration [3, 10]` and, after an
/// AUC, `auc_balance [1]`, and by a histogram `auc_ties [1]`.
pub fn evaluation_result(
    network: &Network,
    format: Format,
    figures: Figures,
) -> Result<Program, BuildError> {
    let mut b = Builder::new(
        &format!("{}-evaluation-result", network.name),
        format.ring_bits,
    )?;
    reveal_counts(&mut b, network.classes)?;
    if figures.calibration {
        calibration::reveal(&mut b)?;
    }
    if figures.auc == Some(AucBy::Histogram) {
        histogram::reveal(&mut b)?;
    } else if figures.auc.is_some() {
        let balance = b.carried(BALANCE, &[1], 0, COUNT_BITS)?;
        b.output("auc_balance", balance, Sink::Reveal)?;
    }
    Ok(b.finish())
}

/// Opens the weights and sets the number of right rows to zero.
pub fn validation_setup(network: &Network, format: Format) -> Result<Program, BuildError> {
    let name = format!("{}-validation-setup", network.name);
    let mut b = Builder::new(&name, format.ring_bits)?;
    open_weights(&mut b, network, format)?;
    b.scope("counts");
    let zero = zeros(&mut b, &[1], 0)?;
    b.output(RIGHT, zero, Sink::Carry)?;
    Ok(b.finish())
}

/// Adds the right rows of one batch.
pub fn validate(network: &Network, format: Format, rows: usize) -> Result<Program, BuildError> {
    let mut b = Builder::new(&format!("{}-validate", network.name), format.ring_bits)?;
    let all = classified(&mut b, network, format, rows)?;
    let right = b.bit_dot(all.best, all.labels)?;
    let right = b.sum(right, 1, 0)?;
    let right = b.reshape(right, &[1])?;
    let so_far = b.carried(RIGHT, &[1], 0, COUNT_BITS)?;
    let right = b.add(so_far, right)?;
    b.output(RIGHT, right, Sink::Carry)?;
    Ok(b.finish())
}

/// Reveals `validation_right [1]`.
pub fn validation_result(network: &Network, format: Format) -> Result<Program, BuildError> {
    let name = format!("{}-validation-result", network.name);
    let mut b = Builder::new(&name, format.ring_bits)?;
    b.scope("counts");
    let right = b.carried(RIGHT, &[1], 0, COUNT_BITS)?;
    b.output(VALIDATION_RIGHT, right, Sink::Reveal)?;
    Ok(b.finish())
}
