//! All powers `x^2 .. x^d` of one opened value: the polynomial ReLU approximations are built on it.
//!
//! 1. `X = x + a` is open; the dealer deals `[a^2] .. [a^d]`.
//! 2. `[x^j] = sum over i of binom(j, i) X^(j-i) (-1)^i [a^i]`, with `X^j` added by P0.
//!
//! Rounds 0 beyond the mask, `8 (d-1)` bytes dealt an element, scale `j f`. Exact in the ring.

use super::{OutOfRange, operands, require_ring};
use crate::plan::{Corr, Kernel, Lowering, Repr};
use crate::program::{Node, Type};

/// One result for each power from 2.
pub fn infer(degree: u8, ins: &[&Type], max_bound: u8) -> Result<Vec<Type>, String> {
    let [x] = operands(ins)?;
    require_ring(&x)?;
    if !(2..=4).contains(&degree) {
        return Err(format!("powers up to {degree}; 2 to 4 are possible"));
    }
    let scaled = |by: u8, j: u8| u32::from(by) * u32::from(j);
    if scaled(x.frac_bits, degree) > u32::from(max_bound) {
        return Err(format!(
            "x^{degree} would have {} fraction bits; truncate x first",
            scaled(x.frac_bits, degree)
        ));
    }
    Ok((2..=degree)
        .map(|j| Type {
            frac_bits: x.frac_bits * j,
            bound_log2: scaled(x.bound_log2, j).min(u32::from(max_bound)) as u8,
            ..x.clone()
        })
        .collect())
}

/// The plain meaning; the largest power must stay below `2^(k-1)`.
pub fn plain(degree: u8, x: &[u64], ring_bits: u8) -> Result<Vec<Vec<u64>>, OutOfRange> {
    let limit = 1u128 << (ring_bits - 1);
    let power = |v: &u64| u128::from((*v as i64).unsigned_abs()).checked_pow(u32::from(degree));
    if let Some(index) = x.iter().position(|v| power(v).is_none_or(|p| p >= limit)) {
        let bits = 64 - (x[index] as i64).unsigned_abs().leading_zeros();
        return Err(OutOfRange {
            index,
            magnitude_log2: bits * u32::from(degree),
            limit_log2: u32::from(ring_bits) - 1,
        });
    }
    Ok((2..=u32::from(degree))
        .map(|j| x.iter().map(|v| v.wrapping_pow(j)).collect())
        .collect())
}

/// The secure form.
pub fn lower(degree: u8, node: &Node, cx: &mut Lowering<'_>) -> Vec<Repr> {
    let x = cx.masked(node.ins[0]);
    let n = cx.plan.len(x.open);
    let mut operands = vec![x.open, x.mask];
    let mut outs = Vec::new();
    for j in 2..=degree {
        operands.push(cx.plan.deal_ring(Corr::Power(j), vec![x.mask], n));
        outs.push(Repr::share(cx.plan.local_share(
            Kernel::Power(j),
            operands.clone(),
            n,
        )));
    }
    outs
}
