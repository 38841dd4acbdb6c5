//! Secret bits: the sign of a value, products of bits with values (with and without truncation),
//! bits as ring elements.
//!
//! An opened bit is `b = B ^ beta`, B public, beta known to the dealer. Then (`docs/protocol.md`, Bits)
//! - `[b] = B + (1 - 2B) [beta]`: local, 8 bytes dealt;
//! - `[b x] = B (m - [r]) + (1 - 2B)(m [beta] - [beta r])` for an opened `m = x + r`: local;
//! - `b * round(g / 2^f)`: the truncation of g with every dealt term also multiplied by beta, 3 rounds.
//!
//! Sign: `b = 1 ^ msb(m) ^ msb(r) ^ [m mod 2^(k-1) < r mod 2^(k-1)]`, the top bit of r folded into beta:
//! 4 rounds with the opening of m. Domain: all of the ring.

use super::trunc::{dealt, dealt_with, half, opened, spec};
use super::{OutOfRange, check_domain, operands, require_bits, require_ring};
use crate::plan::{
    BitRef, CircuitBuilder, CircuitInput, Corr, Factor, Kernel, Lowering, Masked, MaskedBit, Repr,
    VId, Wire,
};
use crate::program::{Kind, Linear, Node, Rounding, Type, Val};
use crate::run::plain::Coins;

fn bit_type(shape: &[usize], planes: u16) -> Type {
    Type {
        kind: Kind::Bits { planes },
        shape: shape.to_vec(),
        frac_bits: 0,
        bound_log2: 0,
    }
}

/// One bit for each element.
pub fn infer_non_negative(ins: &[&Type]) -> Result<Vec<Type>, String> {
    let [x] = operands(ins)?;
    require_ring(&x)?;
    Ok(vec![bit_type(&x.shape, 1)])
}

/// Operands bits and ring of the same shape; one result for each plane.
pub fn infer_mul(ins: &[&Type]) -> Result<Vec<Type>, String> {
    let [bits, x] = operands(ins)?;
    let planes = require_bits(&bits)?;
    require_ring(&x)?;
    if bits.shape != x.shape {
        return Err(format!(
            "bits {:?} and values {:?} differ in shape",
            bits.shape, x.shape
        ));
    }
    Ok(vec![x; usize::from(planes)])
}

/// As the product with bits, of the truncated value.
pub fn infer_trunc(shift: u8, ins: &[&Type], ring_bits: u8) -> Result<Vec<Type>, String> {
    let outs = infer_mul(ins)?;
    outs.iter()
        .map(|x| Ok(super::trunc::infer(shift, &[x], ring_bits)?.remove(0)))
        .collect()
}

/// Ring elements 0 and 1; several planes become a last axis.
pub fn infer_to_ring(ins: &[&Type]) -> Result<Vec<Type>, String> {
    let [bits] = operands(ins)?;
    let planes = require_bits(&bits)?;
    let mut shape = bits.shape;
    if planes > 1 {
        shape.push(usize::from(planes));
    }
    Ok(vec![Type {
        kind: Kind::Ring,
        shape,
        frac_bits: 0,
        bound_log2: 1,
    }])
}

/// Operands bits of shape s with n planes, and a ring of shape s + [n].
pub fn infer_dot(ins: &[&Type]) -> Result<Vec<Type>, String> {
    let [bits, x] = operands(ins)?;
    let planes = usize::from(require_bits(&bits)?);
    require_ring(&x)?;
    if x.shape.split_last() != Some((&planes, &bits.shape[..])) {
        return Err(format!("bits {bits} do not select from values {x}"));
    }
    // One-hot is the use: the sum is one of the elements.
    Ok(vec![Type {
        shape: bits.shape,
        ..x
    }])
}

/// Plain bit `[x >= c]`; `x - c` must not wrap.
pub fn plain_at_least(x: &[u64], c: i64, ring_bits: u8) -> Result<Vec<u64>, OutOfRange> {
    let top = i64::MAX >> (64 - ring_bits);
    check_domain(x, c.wrapping_neg(), -top - 1, top)?;
    Ok(x.iter().map(|v| u64::from(*v as i64 >= c)).collect())
}

/// Plain products, plane by plane.
pub fn plain_mul(bits: &[u64], x: &[u64]) -> Vec<Vec<u64>> {
    bits.chunks(x.len().max(1))
        .map(|plane| {
            plane
                .iter()
                .zip(x)
                .map(|(b, v)| b.wrapping_mul(*v))
                .collect()
        })
        .collect()
}

/// Plain selection, row by row.
pub fn plain_dot(bits: &[u64], x: &[u64], rows: usize) -> Vec<u64> {
    let planes = x.len() / rows.max(1);
    let term = |row: usize, p: usize| bits[p * rows + row].wrapping_mul(x[row * planes + p]);
    (0..rows)
        .map(|row| (0..planes).fold(0u64, |sum, p| sum.wrapping_add(term(row, p))))
        .collect()
}

/// Plain products with the truncated value.
pub fn plain_trunc(
    shift: u8,
    rounding: Rounding,
    bits: &[u64],
    x: &[u64],
    ring_bits: u8,
    coins: &Coins<'_>,
) -> Result<Vec<Vec<u64>>, OutOfRange> {
    let truncated = super::trunc::plain(shift, rounding, x, ring_bits, coins)?;
    Ok(plain_mul(bits, &truncated))
}

/// Plain bits as ring elements, element by element.
pub fn plain_to_ring(bits: &[u64], n: usize) -> Vec<u64> {
    let planes = bits.len() / n.max(1);
    (0..n)
        .flat_map(|e| (0..planes).map(move |p| bits[p * n + e]))
        .collect()
}

/// Steps after the opening of m: the bit `[m + offset - r >= 0]`, opened under beta. Three rounds.
pub(super) fn sign_bit(m: VId, offset: u64, r: VId, cx: &mut Lowering<'_>) -> MaskedBit {
    let lt = cx.plan.borrow(m, offset, r, &[cx.ring_bits() - 1]);
    let lt = cx.plan.open_bits(lt);
    folded_sign(m, offset, r, lt, 0, cx)
}

/// The same from `[(m + offset) mod 2^(k-1) < r mod 2^(k-1)]`, opened as a plane of `lt`: no round.
pub(super) fn folded_sign(
    m: VId,
    offset: u64,
    r: VId,
    lt: Masked,
    plane: u16,
    cx: &mut Lowering<'_>,
) -> MaskedBit {
    let k = cx.ring_bits();
    let n = cx.plan.len(m);
    let inputs = |offset: u64| {
        vec![
            CircuitInput::Ring {
                offset,
                lo: k - 1,
                count: 1,
            },
            CircuitInput::Bits {
                first: plane,
                count: 1,
            },
        ]
    };
    let (mut public, wires) = CircuitBuilder::new(inputs(offset));
    let not_msb = public.xor(wires[0][0], Wire::ONE);
    let b = public.xor(not_msb, wires[1][0]);
    let public = public.finish(&[b]);
    let open = cx.plan.public_circuit(public, vec![m, lt.open], n);
    let (mut fold, wires) = CircuitBuilder::new(inputs(0));
    let beta = fold.xor(wires[0][0], wires[1][0]);
    let fold = fold.finish(&[beta]);
    let beta = cx.plan.derive_circuit(fold, vec![r, lt.mask], n);
    MaskedBit {
        open: BitRef { id: open, plane: 0 },
        beta: BitRef { id: beta, plane: 0 },
    }
}

/// `[b x]` for an opened bit and an opened value: no round.
pub(super) fn bit_times(bit: MaskedBit, x: Masked, cx: &mut Lowering<'_>) -> VId {
    let n = cx.plan.len(x.open);
    let beta = cx.beta_ring(bit);
    let corr = Corr::Term {
        factor: Factor::Raw,
        bits: vec![bit.beta.plane],
    };
    let beta_r = cx.plan.deal_ring(corr, vec![x.mask, bit.beta.id], n);
    let kernel = Kernel::BitMulOut {
        b_plane: bit.open.plane,
    };
    cx.plan
        .local_share(kernel, vec![x.open, x.mask, bit.open.id, beta, beta_r], n)
}

/// Secure bit `[x >= c]`: the sign of `m - c - r`, so that thresholds of one value share its opening.
pub fn lower_at_least(c: i64, node: &Node, cx: &mut Lowering<'_>) -> Repr {
    let x = cx.masked(node.ins[0]);
    let offset = c.wrapping_neg() as u64;
    Repr::bits(vec![sign_bit(x.open, offset, x.mask, cx)])
}

/// Secure products with every plane.
pub fn lower_mul(node: &Node, cx: &mut Lowering<'_>) -> Vec<Repr> {
    let bits = cx.bits(node.ins[0]);
    let x = cx.masked(node.ins[1]);
    bits.into_iter()
        .map(|bit| Repr::share(bit_times(bit, x, cx)))
        .collect()
}

/// Secure products of every plane with the truncated value; g is opened once for all planes.
pub fn lower_trunc(shift: u8, rounding: Rounding, node: &Node, cx: &mut Lowering<'_>) -> Vec<Repr> {
    let bits = cx.bits(node.ins[0]);
    let (m, r) = opened(node.ins[1], shift, rounding, cx);
    let n = cx.plan.len(m);
    let borrow = cx.plan.borrow(m, half(shift, rounding), r, &[shift]);
    let c = cx.plan.open_bits(borrow);
    let gamma = BitRef {
        id: c.mask,
        plane: 0,
    };
    let [big_r, rho, gamma_ring] = dealt(r, gamma, shift, cx);
    let trunc = spec(shift, rounding, cx.ring_bits());
    let mut outs = Vec::new();
    for bit in bits {
        let beta = cx.beta_ring(bit);
        let [beta_r, beta_rho, beta_gamma] = dealt_with(r, gamma, shift, Some(bit.beta), cx);
        let kernel = Kernel::BitTruncOut {
            trunc,
            c_plane: 0,
            b_plane: bit.open.plane,
            plus_one: false,
        };
        let operands = vec![
            m,
            c.open,
            bit.open.id,
            big_r,
            rho,
            gamma_ring,
            beta,
            beta_r,
            beta_rho,
            beta_gamma,
        ];
        outs.push(Repr::share(cx.plan.local_share(kernel, operands, n)));
    }
    outs
}

/// Secure bits as ring elements.
pub fn lower_to_ring(node: &Node, cx: &mut Lowering<'_>) -> Repr {
    let bits = cx.bits(node.ins[0]);
    let n = cx.plan.len(bits[0].open.id);
    let mut planes = Vec::new();
    for bit in &bits {
        let beta = cx.beta_ring(*bit);
        let kernel = Kernel::BitToRing {
            b_plane: bit.open.plane,
        };
        planes.push(cx.plan.local_share(kernel, vec![bit.open.id, beta], n));
    }
    if planes.len() == 1 {
        return Repr::share(planes[0]);
    }
    let concat = Linear::Concat {
        outer: n,
        parts: vec![1; planes.len()],
    };
    Repr::share(cx.plan.local_linear(concat, planes))
}

/// An opened bit value as XOR shares (for reveals): `B ^ <beta>`, the planes of beta dealt.
pub(crate) fn xor_share(val: Val, cx: &mut Lowering<'_>) -> VId {
    let bits = cx.bits(val);
    let polynomials: Vec<Vec<Vec<(usize, bool)>>> =
        (0..bits.len()).map(|v| vec![vec![(v, false)]]).collect();
    cx.plan.combine_opened(&bits, &polynomials)
}

/// Secure selection: columns of the opened value times their bits, no round.
pub fn lower_dot(node: &Node, cx: &mut Lowering<'_>) -> Repr {
    let bits = cx.bits(node.ins[0]);
    let x = cx.masked(node.ins[1]);
    let rows = cx.plan.len(bits[0].open.id);
    let mut sum: Option<VId> = None;
    for (p, bit) in bits.iter().enumerate() {
        let column = Linear::Slice {
            outer: rows,
            len: bits.len(),
            start: p,
            take: 1,
            inner: 1,
        };
        let open = cx.plan.local_linear(column.clone(), vec![x.open]);
        let mask = cx.plan.local_linear(column, vec![x.mask]);
        let term = bit_times(*bit, Masked { open, mask }, cx);
        sum = Some(match sum {
            Some(sum) => cx.plan.local_linear(Linear::Add, vec![sum, term]),
            None => term,
        });
    }
    Repr {
        share: sum,
        ..Repr::default()
    }
}
