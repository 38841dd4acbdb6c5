//! k-nearest-neighbour: distances by one product, the k nearest by a tournament of sorted blocks,
//! a vote.
//!
//! 1. The squared distance of image q and row t is `|q|^2 - 2 q.t + |t|^2`. `|q|^2` is the same for all
//!    rows, so the nearest have the largest `s = 2 q.t - |t|^2`: exact, at 2f fraction bits.
//! 2. Candidates lie in blocks of 16 (32 for k above 7). In a block all pairs are compared at once; a
//!    candidate's wins are its rank, because the earlier one wins a tie; a public table of the rank gives
//!    the one-hot of the r-th largest, for r below k. What is selected, k of each block in order, makes
//!    up the next level's blocks, until there is one.
//! 3. The r-th nearest (from 0) gives its class `2^k + 2^(k-1-r)` points: most votes win, a tie goes to
//!    the class of the nearest voter among those that are tied.
//!
//! Order is by distance, then by row, at every level, because blocks keep the order of rows. For n
//! rows a level takes 10 rounds, of which there are about `log(n) / log(block / k)`.

use trefoil_protocol::program::{BuildError, Builder, Sink, Table, Val};
use trefoil_protocol::{Program, Tensor};

use super::IMAGE_INTEGER_BITS;
use super::evaluation::{add_counts, clear_counts, reveal_counts};
use crate::neighbours::{NeighbourSpec, Queries};

const ROWS: &str = "neighbours.rows";
const NORMS: &str = "neighbours.norms";
const CLASSES: &str = "neighbours.classes";

/// Bits of the largest distance of images of so many values, and of what stands for no row at all.
pub(crate) fn distance_bits(values: usize, frac_bits: u8) -> u8 {
    let square = 2 * (frac_bits + IMAGE_INTEGER_BITS);
    let values = values.next_power_of_two().trailing_zeros() as u8;
    square.saturating_add(values).saturating_add(2)
}

/// Opens the training rows under their masks for the whole session, and computes their squared
/// norms and class indices.
pub fn setup(spec: &NeighbourSpec) -> Result<Program, BuildError> {
    let f = spec.frac_bits;
    let shape = [spec.dataset.train_rows, spec.values()];
    let mut b = Builder::new("neighbours-setup", spec.ring_bits)?;
    b.scope("rows");
    let rows = b.input("images", &shape, f, f + IMAGE_INTEGER_BITS)?;
    let labels = b.input("labels", &[shape[0], spec.classes], 0, 1)?;
    let norms = b.channel_dot(rows, rows, 0)?;
    b.output(ROWS, rows, Sink::CarryMasked)?;
    b.output(NORMS, norms, Sink::Carry)?;
    let mut index = b.slice(labels, 1, 1, 1)?;
    for class in 2..spec.classes {
        let label = b.slice(labels, 1, class, 1)?;
        let label = b.scale(label, class as i64)?;
        index = b.add(index, label)?;
    }
    let index = b.reshape(index, &shape[..1])?;
    b.output(CLASSES, index, Sink::Carry)?;
    if spec.queries == Queries::Test {
        clear_counts(&mut b, spec.classes)?;
    }
    Ok(b.finish())
}

/// Classes of `images [rows, values]`; needs [`setup`] before it. Reveals `class [rows]`, or adds them
/// to the confusion matrix with `labels [rows, classes]`.
pub fn nearest(spec: &NeighbourSpec, rows: usize) -> Result<Program, BuildError> {
    let (f, n, values) = (spec.frac_bits, spec.dataset.train_rows, spec.values());
    let image_bits = f + IMAGE_INTEGER_BITS;
    let mut b = Builder::new("neighbours", spec.ring_bits)?;
    b.scope("distances");
    let images = b.input("images", &[rows, values], f, image_bits)?;
    let train = b.carried_masked(ROWS, &[n, values], f, image_bits)?;
    let bits = distance_bits(values, f);
    let norms = b.carried(NORMS, &[n], 2 * f, bits)?;
    let classes = b.carried(CLASSES, &[n], 0, 7)?;
    let product = b.matmul(train, images, false, true)?;
    let product = b.scale(product, 2)?;
    let norms = b.broadcast(norms, &[], &[rows])?;
    let mut list = Candidates {
        score: b.sub(product, norms)?,
        class: b.broadcast(classes, &[], &[rows])?,
    };
    b.scope("nearest");
    let block = if spec.k <= 7 { 16 } else { 32 };
    while b.shape(list.score)[0] > block {
        list = level(&mut b, list, block, spec.k, 1 << bits)?;
    }
    let sorted = largest(&mut b, list, spec.k)?;
    b.scope("vote");
    let best = vote(&mut b, sorted.class, spec)?;
    match spec.queries {
        Queries::Upload { .. } => b.output("class", best, Sink::RevealIndex)?,
        Queries::Test => {
            let labels = b.input("labels", &[rows, spec.classes], 0, 1)?;
            add_counts(&mut b, labels, best)?;
        }
    }
    Ok(b.finish())
}

/// Reveals the confusion matrix.
pub fn result(spec: &NeighbourSpec) -> Result<Program, BuildError> {
    let mut b = Builder::new("neighbours-result", spec.ring_bits)?;
    reveal_counts(&mut b, spec.classes)?;
    Ok(b.finish())
}

/// Scores and class indices `[candidates, m]`, for m images (or blocks of them) each.
#[derive(Clone, Copy)]
struct Candidates {
    score: Val,
    class: Val,
}

/// The k best of every block of consecutive candidates, in order; `-worst` fills the last block.
fn level(
    b: &mut Builder,
    list: Candidates,
    block: usize,
    k: usize,
    worst: i64,
) -> Result<Candidates, BuildError> {
    let shape = b.shape(list.score);
    let (n, m) = (shape[0], shape[1]);
    let blocks = n.div_ceil(block);
    let (into, back) = ([blocks, block * m], [k * m, blocks]);
    let cut = |b: &mut Builder, x: Val, filler: i64| {
        let frac_bits = b.ty(x).frac_bits;
        let missing = blocks * block - n;
        let x = match missing {
            0 => x,
            _ => {
                let filler = vec![filler as u64; missing * m];
                let filler = b.constant(Tensor::new(vec![missing, m], filler), frac_bits)?;
                b.concat(&[x, filler], 0)?
            }
        };
        // A block's candidates along the first axis, the blocks of all images along the second.
        let x = b.reshape(x, &into)?;
        let x = b.transpose(x)?;
        b.reshape(x, &[block, m * blocks])
    };
    let list = Candidates {
        score: cut(b, list.score, -worst)?,
        class: cut(b, list.class, 0)?,
    };
    let best = largest(b, list, k)?;
    let mut join = |x: Val| {
        let x = b.reshape(x, &back)?;
        let x = b.transpose(x)?;
        b.reshape(x, &[blocks * k, m])
    };
    Ok(Candidates {
        score: join(best.score)?,
        class: join(best.class)?,
    })
}

/// The k largest of `[n, m]` along the first axis, in order, ties by position.
fn largest(b: &mut Builder, list: Candidates, k: usize) -> Result<Candidates, BuildError> {
    let n = b.shape(list.score)[0];
    if n == 1 {
        return Ok(list);
    }
    let wins = wins(b, list.score)?;
    let width = (n as u64).next_power_of_two().trailing_zeros() as u8;
    let is_rank = |rank: usize| Table {
        values: (0..1u64 << width)
            .map(|wins| u64::from(wins == (n - 1 - rank) as u64))
            .collect(),
        out_bits: 1,
        frac_bits: 0,
    };
    let selectors = b.lookup(wins, 0, width, width, (0..k).map(is_rank).collect())?;
    let m = b.shape(list.score)[1];
    let mut pick = |x: Val| {
        let picked = selectors.iter().map(|selector| {
            let picked = b.mul(*selector, x)?;
            let picked = b.sum(picked, 1, 0)?;
            b.reshape(picked, &[1, m])
        });
        let picked: Vec<Val> = picked.collect::<Result<_, BuildError>>()?;
        b.concat(&picked, 0)
    };
    Ok(Candidates {
        score: pick(list.score)?,
        class: pick(list.class)?,
    })
}

/// For each element of `[n, m]` how many others of the first axis it beats: larger ones, and equal
/// ones behind it.
fn wins(b: &mut Builder, x: Val) -> Result<Val, BuildError> {
    let shape = b.shape(x);
    let (n, m) = (shape[0], shape[1]);
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for i in 0..n - 1 {
        let one = b.slice(x, 0, i, 1)?;
        let one = b.reshape(one, &[m])?;
        left.push(b.broadcast(one, &[n - 1 - i], &[])?);
        right.push(b.slice(x, 0, i + 1, n - 1 - i)?);
    }
    let left = b.concat(&left, 0)?;
    let right = b.concat(&right, 0)?;
    let beats = b.greater_equal(left, right)?;
    let beats = b.bit_to_ring(beats)?;
    // Pairs (i, j), i < j, in order of i, then of j.
    let first = |i: usize| i * (2 * n - i - 1) / 2;
    let mut wins = Vec::new();
    for i in 0..n {
        // The i before it beat it, or it beats them.
        let mut own = match i + 1 < n {
            true => {
                let won = b.slice(beats, 0, first(i), n - 1 - i)?;
                let won = b.sum(won, 1, 0)?;
                b.reshape(won, &[1, m])?
            }
            false => b.constant(Tensor::zeros(&[1, m]), 0)?,
        };
        for j in 0..i {
            let lost = b.slice(beats, 0, first(j) + i - j - 1, 1)?;
            own = b.sub(own, lost)?;
        }
        wins.push(b.add_const(own, i as i64)?);
    }
    b.concat(&wins, 0)
}

/// The one-hot of the winning class `[m]`, of class indices `[k, m]` in order of nearness.
fn vote(b: &mut Builder, class: Val, spec: &NeighbourSpec) -> Result<Val, BuildError> {
    let k = spec.k;
    let width = (spec.classes as u64)
        .next_power_of_two()
        .trailing_zeros()
        .max(1) as u8;
    let is_class = |class: usize| Table {
        values: (0..1u64 << width)
            .map(|index| u64::from(index == class as u64))
            .collect(),
        out_bits: 1,
        frac_bits: 0,
    };
    let tables = (0..spec.classes).map(is_class).collect();
    let votes = b.lookup(class, 0, width, width, tables)?;
    let mut points = Vec::new();
    for votes in votes {
        let mut sum = None;
        for rank in 0..k {
            let vote = b.slice(votes, 0, rank, 1)?;
            let vote = b.scale(vote, (1 << k) + (1 << (k - 1 - rank)))?;
            sum = Some(match sum {
                None => vote,
                Some(sum) => b.add(sum, vote)?,
            });
        }
        points.extend(sum);
    }
    let points = b.concat(&points, 0)?;
    let points = b.transpose(points)?;
    b.argmax(points)
}
