//! Exact truncation: `floor((x + add) / 2^f)`, no error, no rounding coin that leaks.
//!
//! Domain: `-2^(k-2) <= x + add <= 2^(k-2)`. Protocol (`docs/protocol.md`, Truncation):
//! 1. `m = x + r` is open; `m' = m + add + 2^(k-2)`, `M = m' >> f`, `R = r >> f`, `rho = msb(r)`.
//! 2. `c = [(m + add) mod 2^f < r mod 2^f]` by the digits of r, XOR-shared (`plan/compare.rs`).
//! 3. `C = c ^ gamma` is open.
//! 4. `[y] = [0](M - 2^(k-2-f) - C) - [R] + (1 - msb(m')) 2^(k-f) [rho] - (1 - 2C) [gamma]`.
//!
//! Rounds: 1 (mask) + 1 (f <= 24) or 2 (combine) + 1 (C). Opened at f = 16, k = 64: 64 + 6 + 1 bits
//! an element; dealt 27.4 bytes. The parties learn nothing: m, the masked digits and C are uniform.
//! Stochastic rounding: the dealer uses `r = v - u` with v the parties' mask and u its coins, so
//! that the same steps give `floor((x + u) / 2^f)`.

use super::{OutOfRange, check_domain, operands, require_ring};
use crate::plan::{BitRef, Corr, Factor, Kernel, Lowering, Rep, Repr, TruncOut, VId};
use crate::program::{Node, Rounding, Type, Val};
use crate::run::plain::Coins;

/// The type of a truncated value.
pub fn infer(shift: u8, ins: &[&Type], ring_bits: u8) -> Result<Vec<Type>, String> {
    let [x] = operands(ins)?;
    require_ring(&x)?;
    if shift == 0 || shift > ring_bits - 3 {
        return Err(format!(
            "cannot truncate by {shift} bits; 1 to {} are possible",
            ring_bits - 3
        ));
    }
    let frac_bits = x.frac_bits.checked_sub(shift).ok_or_else(|| {
        format!(
            "truncates {shift} bits of a value with {} fraction bits; rescale it first",
            x.frac_bits
        )
    })?;
    // One more for rounding up.
    let bound_log2 = x.bound_log2.saturating_sub(shift) + 1;
    Ok(vec![Type {
        frac_bits,
        bound_log2: bound_log2.min(ring_bits - 2),
        ..x
    }])
}

/// What rounding adds before the floor.
pub(super) fn half(shift: u8, rounding: Rounding) -> u64 {
    match rounding {
        Rounding::Nearest => 1 << (shift - 1),
        Rounding::Floor | Rounding::Stochastic => 0,
    }
}

/// `x` plus what rounding adds, per element, after a check of the domain.
pub(super) fn rounded(
    shift: u8,
    rounding: Rounding,
    x: &[u64],
    ring_bits: u8,
    coins: &Coins<'_>,
) -> Result<Vec<u64>, OutOfRange> {
    let limit = 1i64 << (ring_bits - 2);
    let add = half(shift, rounding);
    check_domain(
        x,
        add as i64,
        -limit,
        limit
            - if rounding == Rounding::Stochastic {
                1i64 << shift
            } else {
                0
            },
    )?;
    let mut out = match rounding {
        Rounding::Stochastic => coins.draw(x.len(), shift),
        _ => vec![add; x.len()],
    };
    for (o, v) in out.iter_mut().zip(x) {
        *o = o.wrapping_add(*v);
    }
    Ok(out)
}

/// The plain meaning.
pub fn plain(
    shift: u8,
    rounding: Rounding,
    x: &[u64],
    ring_bits: u8,
    coins: &Coins<'_>,
) -> Result<Vec<u64>, OutOfRange> {
    let mut out = rounded(shift, rounding, x, ring_bits, coins)?;
    for v in &mut out {
        *v = ((*v as i64) >> shift) as u64;
    }
    Ok(out)
}

/// The opened value and the mask as the dealer must see it (with its coins taken off).
pub(super) fn opened(x: Val, shift: u8, rounding: Rounding, cx: &mut Lowering<'_>) -> (VId, VId) {
    let masked = cx.masked(x);
    let r = match rounding {
        Rounding::Stochastic => cx.coin_mask(x, shift),
        _ => masked.mask,
    };
    (masked.open, r)
}

/// `[R]`, `[rho]` and `[gamma]`: what the final step needs beside the public values.
pub(super) fn dealt(r: VId, gamma: BitRef, shift: u8, cx: &mut Lowering<'_>) -> [VId; 3] {
    dealt_with(r, gamma, shift, None, cx)
}

/// The same three, each multiplied by the bit beta if there is one.
pub(super) fn dealt_with(
    r: VId,
    gamma: BitRef,
    shift: u8,
    beta: Option<BitRef>,
    cx: &mut Lowering<'_>,
) -> [VId; 3] {
    let n = cx.plan.len(r);
    let full = Rep::Ring {
        width: cx.ring_bits(),
    };
    // rho is multiplied by 2^(k-f): only its value mod 2^f matters.
    let low = Rep::Ring { width: shift };
    let mut term = |factor: Factor, gate: Option<BitRef>, rep: Rep| {
        let bits: Vec<BitRef> = beta.into_iter().chain(gate).collect();
        let mut ins: Vec<VId> = if factor == Factor::One {
            vec![]
        } else {
            vec![r]
        };
        ins.extend(bits.iter().map(|bit| bit.id));
        let corr = Corr::Term {
            factor,
            bits: bits.iter().map(|bit| bit.plane).collect(),
        };
        cx.plan.deal(corr, ins, rep, n)
    };
    [
        term(Factor::Shr(shift), None, full),
        term(Factor::Msb, None, low),
        term(Factor::One, Some(gamma), full),
    ]
}

/// The constants of step 4.
pub(super) fn spec(shift: u8, rounding: Rounding, ring_bits: u8) -> TruncOut {
    TruncOut {
        ring_bits,
        shift,
        add: half(shift, rounding),
        offset: 1 << (ring_bits - 2),
    }
}

/// The secure form: steps 1 to 4.
pub fn lower(shift: u8, rounding: Rounding, node: &Node, cx: &mut Lowering<'_>) -> Vec<Repr> {
    let (m, r) = opened(node.ins[0], shift, rounding, cx);
    let borrow = cx.plan.borrow(m, half(shift, rounding), r, &[shift]);
    let c = cx.plan.open_bits(borrow);
    let gamma = BitRef {
        id: c.mask,
        plane: 0,
    };
    let [big_r, rho, gamma] = dealt(r, gamma, shift, cx);
    let kernel = Kernel::TruncOut(spec(shift, rounding, cx.ring_bits()));
    let n = cx.plan.len(m);
    vec![Repr::share(cx.plan.local_share(
        kernel,
        vec![m, c.open, big_r, rho, gamma],
        n,
    ))]
}
