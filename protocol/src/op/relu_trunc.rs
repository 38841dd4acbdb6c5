//! Exact ReLU fused with truncation: `max(0, round(x / 2^f))` and `b = [result > 0]` (nearest), as
//! PyTorch has it; for floor and stochastic rounding `b = [x + u >= 0]`.
//!
//! Protocol (`docs/protocol.md`, ReLU), for nearest on `x' = x - 2^(f-1)`:
//! 1. `m = x + r` is open.
//! 2. `c` over bits `[0, f)` and `lt` over `[0, k-1)` from one set of digits, two rounds.
//! 3. `b = 1 ^ msb(m') ^ msb(r) ^ lt`; open `c ^ gamma` and `lt ^ s`; `beta = s ^ msb(r)`.
//! 4. `t = M - [R] + (1 - msb(m')) 2^(k-f) [rho] - c` is right wherever `x' >= 0`, and `b = 0` kills it
//!    elsewhere: `[y] = [b (t + 1)]` is local because m is public, given the dealt products with beta.
//!
//! Domain: the whole ring but the lowest `2^(f-1)` values. Rounds 4; at f = 16, k = 64: 64 + 27 + 6 + 2
//! bits opened an element, 85 bytes dealt. The opened bit stays for the backward pass.

use super::bits::folded_sign;
use super::trunc::{dealt, dealt_with, half, opened};
use super::{OutOfRange, check_domain};
use crate::plan::{BitRef, Kernel, Lowering, MaskedBit, Repr, TruncOut, VId};
use crate::program::{Kind, Node, Rounding, Type};
use crate::run::plain::Coins;

/// Types of the result and of the derivative bit.
pub fn infer(shift: u8, ins: &[&Type], ring_bits: u8) -> Result<Vec<Type>, String> {
    let out = super::trunc::infer(shift, ins, ring_bits)?.remove(0);
    let bit = Type {
        kind: Kind::Bits { planes: 1 },
        frac_bits: 0,
        bound_log2: 0,
        ..out.clone()
    };
    Ok(vec![out, bit])
}

/// The plain meaning.
pub fn plain(
    shift: u8,
    rounding: Rounding,
    x: &[u64],
    ring_bits: u8,
    coins: &Coins<'_>,
) -> Result<Vec<Vec<u64>>, OutOfRange> {
    let top = i64::MAX >> (64 - ring_bits);
    let coin = if rounding == Rounding::Stochastic {
        1i64 << shift
    } else {
        0
    };
    let down = half(shift, rounding) as i64;
    check_domain(x, 0, -top - 1 + down, top - coin)?;
    let added = match rounding {
        Rounding::Stochastic => coins.draw(x.len(), shift),
        _ => vec![0; x.len()],
    };
    let mut out = Vec::with_capacity(x.len());
    let mut bit = Vec::with_capacity(x.len());
    for (v, u) in x.iter().zip(&added) {
        let low = (*v as i64) + (*u as i64) - down;
        let b = low >= 0;
        let t = (low >> shift) + i64::from(down != 0);
        out.push(if b { t as u64 } else { 0 });
        bit.push(u64::from(b));
    }
    Ok(vec![out, bit])
}

/// Steps 2 and 3 for an opened m with its mask r: the borrow c, and the bit b.
pub(super) fn compared(
    m: VId,
    r: VId,
    shift: u8,
    rounding: Rounding,
    cx: &mut Lowering<'_>,
) -> (MaskedBit, MaskedBit) {
    let add = half(shift, rounding).wrapping_neg();
    let compared = cx.plan.borrow(m, add, r, &[shift, cx.ring_bits() - 1]);
    let opened = cx.plan.open_bits(compared);
    let plane = |id: VId| BitRef { id, plane: 0 };
    let borrow = MaskedBit {
        open: plane(opened.open),
        beta: plane(opened.mask),
    };
    (borrow, folded_sign(m, add, r, opened, 1, cx))
}

/// Step 4: `[b (t + 1)]` (or `[b t]`) from the public m, its mask r, the borrow and the bit.
pub(super) fn gated(
    m: VId,
    r: VId,
    shift: u8,
    rounding: Rounding,
    borrow: MaskedBit,
    bit: MaskedBit,
    cx: &mut Lowering<'_>,
) -> VId {
    let n = cx.plan.len(m);
    let gamma = borrow.beta;
    let [big_r, rho, gamma_ring] = dealt(r, gamma, shift, cx);
    let beta_ring = cx.beta_ring(bit);
    let [beta_r, beta_rho, beta_gamma] = dealt_with(r, gamma, shift, Some(bit.beta), cx);
    let kernel = Kernel::BitTruncOut {
        trunc: TruncOut {
            ring_bits: cx.ring_bits(),
            shift,
            add: half(shift, rounding).wrapping_neg(),
            offset: 0,
        },
        c_plane: borrow.open.plane,
        b_plane: bit.open.plane,
        plus_one: rounding == Rounding::Nearest,
    };
    let (c, b) = (borrow.open.id, bit.open.id);
    let operands = vec![
        m, c, b, big_r, rho, gamma_ring, beta_ring, beta_r, beta_rho, beta_gamma,
    ];
    cx.plan.local_share(kernel, operands, n)
}

/// The secure form: steps 1 to 4.
pub fn lower(shift: u8, rounding: Rounding, node: &Node, cx: &mut Lowering<'_>) -> Vec<Repr> {
    let (m, r) = opened(node.ins[0], shift, rounding, cx);
    let (borrow, bit) = compared(m, r, shift, rounding, cx);
    let out = gated(m, r, shift, rounding, borrow, bit, cx);
    vec![Repr::share(out), Repr::bits(vec![bit])]
}
