//! A max pool and the ReLU with truncation after it, in one comparison of all with all: the
//! lowering of the pair where rounds are dear ([`crate::plan::Profile`]).
//!
//! For the elements `x_1 .. x_w` of a window:
//! 1. x is open under its mask, each element once; masks of differences are differences of masks.
//! 2. At once, and opened: `g_ij = [x_i >= x_j]` of all pairs (`bits.rs`), and of every element the
//!    ReLU's bit and the borrow of its truncation (`relu_trunc.rs`).
//! 3. `b_q` is the AND of the ReLU's bit of `x_q` and of all pairs that q must win. They are open, so
//!    their product needs no round; the `b_q` are then opened under masks of their own. Exactly one is
//!    set where the maximum passes the ReLU, none elsewhere; ties go to the earlier element.
//! 4. `y = sum of b_q round(x_q / 2^f)`: local. The `b_q` are the selectors of the backward pass.
//!
//! 4 rounds with the one-level comparison, where one after the other takes 9. Domain: that of the
//! pool, `-2^(k-2) <= x < 2^(k-2)`.

use super::bits::sign_bit;
use super::relu_trunc::{compared, gated};
use crate::plan::{Corr, Lowering, Masked, MaskedBit, Repr, VId};
use crate::program::{Linear, Node, Op, PoolShape, Rounding, Val};

/// Windows up to this long: beyond, all pairs cost more than the rounds they save.
const MAX_WINDOW: usize = 4;

/// A pool that is lowered with the ReLU after it.
#[derive(Clone, Copy, Debug)]
pub struct PooledRelu {
    pool: PoolShape,
    x: Val,
    bits: Val,
}

/// The pool of a pair that is lowered together: if nobody but the ReLU reads the maxima, and nobody
/// but the selectors' AND the bits of both.
pub fn pair(pool: &PoolShape, node: &Node, cx: &Lowering<'_>) -> Option<PooledRelu> {
    let [y, bits] = node.outs[..] else {
        return None;
    };
    if !cx.plan.profile.saves_rounds(pool.windows()) || pool.window_len() > MAX_WINDOW {
        return None;
    }
    let [relu] = cx.readers(y)?[..] else {
        return None;
    };
    // Stochastic coins belong to the maximum; here every element is truncated.
    let rounds = [Rounding::Nearest, Rounding::Floor];
    if !matches!(relu.op, Op::ReluTrunc { rounding, .. } if rounds.contains(&rounding)) {
        return None;
    }
    let passes = relu.outs[1];
    let selects =
        |node: &&Node| matches!(node.op, Op::PoolSelect(_)) && node.ins[..] == [bits, passes];
    let only_selected = |val: Val| Some(cx.readers(val)?.iter().all(selects));
    (only_selected(bits)? && only_selected(passes)?).then_some(PooledRelu {
        pool: *pool,
        x: node.ins[0],
        bits,
    })
}

/// The secure form of both, in the place of the ReLU.
pub fn lower(pair: PooledRelu, shift: u8, rounding: Rounding, cx: &mut Lowering<'_>) -> Vec<Repr> {
    let PooledRelu { pool, x, bits } = pair;
    let (w, n) = (pool.window_len(), pool.windows());
    let x = cx.masked(x);
    let elements: Vec<Masked> = (0..w)
        .map(|q| {
            let window = Linear::Window(pool, q);
            let mask = Corr::Linear(window.clone());
            Masked {
                open: cx.plan.local_linear(window, vec![x.open]),
                mask: cx.plan.derive_ring(mask, vec![x.mask], n),
            }
        })
        .collect();
    let mut opened: Vec<MaskedBit> = Vec::new();
    let mut won: Vec<Vec<(usize, bool)>> = vec![Vec::new(); w];
    for i in 0..w {
        for j in i + 1..w {
            let [a, b] = [elements[i], elements[j]];
            let open = cx.plan.local_linear(Linear::Sub, vec![a.open, b.open]);
            let mask = Corr::Linear(Linear::Sub);
            let mask = cx.plan.derive_ring(mask, vec![a.mask, b.mask], n);
            won[i].push((opened.len(), false));
            won[j].push((opened.len(), true));
            opened.push(sign_bit(open, 0, mask, cx));
        }
    }
    let mut borrows = Vec::new();
    for (element, won) in elements.iter().zip(&mut won) {
        let (borrow, positive) = compared(element.open, element.mask, shift, rounding, cx);
        borrows.push(borrow);
        won.push((opened.len(), false));
        opened.push(positive);
    }
    let polynomials: Vec<Vec<Vec<(usize, bool)>>> =
        won.into_iter().map(|term| vec![term]).collect();
    let chosen = cx.plan.combine_opened(&opened, &polynomials);
    let chosen = cx.open_planes(chosen);
    let terms: Vec<VId> = elements
        .iter()
        .zip(borrows)
        .zip(&chosen)
        .map(|((x, borrow), bit)| gated(x.open, x.mask, shift, rounding, borrow, *bit, cx))
        .collect();
    let sum = terms
        .into_iter()
        .reduce(|sum, term| cx.plan.local_linear(Linear::Add, vec![sum, term]));
    cx.keep_selectors(bits, chosen);
    let y = Repr {
        share: sum,
        ..Repr::default()
    };
    vec![y, Repr::default()]
}
