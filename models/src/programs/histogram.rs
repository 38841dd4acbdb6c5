//! The area under the ROC curve of more rows than can be compared pair by pair: by a histogram.
//!
//! 1. For every row `[s >= t_b]`, s its score `logit_1 - logit_0` and `t_b` 63 public thresholds: all
//!    from one opening of s. Times the labels, summed: rows of each class at or above each threshold.
//! 2. At the end, with `P_b`, `N_b` the positives and negatives in cell b and `P`, `N` all of them:
//!    `S = sum over b of P_b (negatives in lower cells) - N_b (positives in lower cells)`,
//!    `T = sum over b of P_b N_b`. Only S and T are revealed, not the histogram.
//!
//! `AUC = (1 + S / (P N)) / 2` counts the T pairs that share a cell as ties. Each of them is 0, 1/2 or 1
//! in truth: the error is at most `T / (2 P N)`, whatever the scores are.

use trefoil_protocol::fixed::encode;
use trefoil_protocol::program::{BuildError, Builder, Sink, Val};

use super::evaluation::COUNT_BITS;

/// Carried: rows of class 0 and 1 (first axis) at or above each threshold; the first counts them all.
pub(super) const ABOVE: &str = "eval.above";
/// Cells of the histogram.
pub(crate) const CELLS: usize = 64;

/// The lower end of a cell but the first: fine around 0 (1/8), where classes meet, and up to 24 away.
fn threshold(cell: usize) -> f64 {
    libm::sinh((cell as f64 - CELLS as f64 / 2.0) / 8.0)
}

/// Adds a batch: `score [rows]`, one-hot `labels [rows, 2]`.
pub(super) fn add(b: &mut Builder, score: Val, labels: Val) -> Result<(), BuildError> {
    b.scope("histogram");
    let rows = b.shape(score)[0];
    let frac = u32::from(b.ty(score).frac_bits);
    let all = b.sum(labels, 0, 1)?;
    let mut columns = vec![b.reshape(all, &[rows, 1])?];
    for cell in 1..CELLS {
        let above = b.at_least(score, encode(threshold(cell), frac) as i64)?;
        let above = b.bit_to_ring(above)?;
        columns.push(b.reshape(above, &[rows, 1])?);
    }
    let above = b.concat(&columns, 1)?;
    let counts = b.matmul(labels, above, true, false)?;
    let so_far = b.carried(ABOVE, &[2, CELLS], 0, COUNT_BITS)?;
    let counts = b.add(so_far, counts)?;
    b.output(ABOVE, counts, Sink::Carry)
}

/// Reveals `auc_balance [1]`, which is S, and `auc_ties [1]`, which is T.
pub(super) fn reveal(b: &mut Builder) -> Result<(), BuildError> {
    b.scope("histogram");
    let above = b.carried(ABOVE, &[2, CELLS], 0, COUNT_BITS)?;
    let row = |b: &mut Builder, class: usize| {
        let row = b.slice(above, 0, class, 1)?;
        b.reshape(row, &[1, CELLS])
    };
    let (negative, positive) = (row(b, 0)?, row(b, 1)?);
    let cells = |b: &mut Builder, above: Val| {
        let rest = b.slice(above, 1, 1, CELLS - 1)?;
        let none = super::zeros(b, &[1, 1], 0)?;
        let next = b.concat(&[rest, none], 1)?;
        b.sub(above, next)
    };
    let lower = |b: &mut Builder, above: Val| {
        let all = b.slice(above, 1, 0, 1)?;
        let all = b.reshape(all, &[1])?;
        let all = b.broadcast(all, &[], &[CELLS])?;
        let all = b.reshape(all, &[1, CELLS])?;
        b.sub(all, above)
    };
    let (in_n, in_p) = (cells(b, negative)?, cells(b, positive)?);
    let (below_n, below_p) = (lower(b, negative)?, lower(b, positive)?);
    let won = b.matmul(in_p, below_n, false, true)?;
    let lost = b.matmul(in_n, below_p, false, true)?;
    let balance = b.sub(won, lost)?;
    let balance = b.reshape(balance, &[1])?;
    b.output("auc_balance", balance, Sink::Reveal)?;
    let ties = b.matmul(in_p, in_n, false, true)?;
    let ties = b.reshape(ties, &[1])?;
    b.output("auc_ties", ties, Sink::Reveal)
}
