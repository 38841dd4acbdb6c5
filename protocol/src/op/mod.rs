//! One file per operation: its type rule, its plain meaning, its secure lowering, side by side.
//!
//! [`infer`], [`plain`] and [`lower`] dispatch by one match each; there are no trait objects.
//! Composites (softmax, exp, reciprocal, ..) are functions on the builder in [`composite`]: they
//! are made of the operations here and inherit their exactness.

pub mod argmax;
pub mod bits;
pub mod channel;
pub mod composite;
pub mod grouped;
pub mod inverse_sqrt;
pub mod linear;
pub mod lookup;
pub mod max_pool;
pub mod piecewise;
pub mod polynomial;
pub mod powers;
pub mod product;
pub mod relu_pool;
pub mod relu_trunc;
pub mod trunc;

use thiserror::Error;

use crate::plan::{Kernel, Lowering, Repr};
use crate::program::{Kind, Node, Op, Type};
use crate::run::plain::Coins;

/// A plain value left the domain in which the secure operation is exact.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "{operation} (%{val} in {scope}): element {index} leaves the domain: magnitude about 2^{magnitude_log2}, at most 2^{limit_log2}"
)]
pub struct RangeError {
    /// The layer.
    pub scope: String,
    /// The operation.
    pub operation: String,
    /// The program value that is out of range.
    pub val: usize,
    /// The first element out of range.
    pub index: usize,
    /// Its size.
    pub magnitude_log2: u32,
    /// The size allowed.
    pub limit_log2: u32,
}

/// Where and how far a value is out of range; the caller adds the operation's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRange {
    /// The first element out of range.
    pub index: usize,
    /// Its size.
    pub magnitude_log2: u32,
    /// The size allowed.
    pub limit_log2: u32,
}

/// Checks `low <= x + add <= high` for all elements as signed integers.
pub(crate) fn check_domain(x: &[u64], add: i64, low: i64, high: i64) -> Result<(), OutOfRange> {
    let bad = |v: &u64| match (*v as i64).checked_add(add) {
        Some(v) => v < low || v > high,
        None => true,
    };
    match x.iter().position(bad) {
        None => Ok(()),
        Some(index) => Err(OutOfRange {
            index,
            magnitude_log2: 64 - (x[index] as i64).unsigned_abs().leading_zeros(),
            limit_log2: 64 - high.unsigned_abs().leading_zeros(),
        }),
    }
}

/// Checks that a value can be the difference's operand: `-2^(k-2) <= x < 2^(k-2)`.
pub(crate) fn check_comparable(x: &[u64], ring_bits: u8) -> Result<(), OutOfRange> {
    let limit = 1i64 << (ring_bits - 2);
    check_domain(x, 0, -limit, limit - 1)
}

pub(crate) fn require_ring(ty: &Type) -> Result<(), String> {
    match ty.kind {
        Kind::Ring => Ok(()),
        Kind::Bits { .. } => Err("needs ring elements, has bits; convert with bit_to_ring".into()),
    }
}

pub(crate) fn require_bits(ty: &Type) -> Result<u16, String> {
    match ty.kind {
        Kind::Bits { planes } => Ok(planes),
        Kind::Ring => Err("needs bits, has ring elements".into()),
    }
}

pub(crate) fn operands<const N: usize>(ins: &[&Type]) -> Result<[Type; N], String> {
    let owned: Vec<Type> = ins.iter().map(|ty| (*ty).clone()).collect();
    owned
        .try_into()
        .map_err(|_| format!("needs {N} operands, has {}", ins.len()))
}

/// Types of the results. `hint` is the declared type of the first result where the operation
/// leaves something open (its shape, its fraction bits).
pub fn infer(
    op: &Op,
    ins: &[&Type],
    hint: Option<&Type>,
    ring_bits: u8,
) -> Result<Vec<Type>, String> {
    let max_bound = ring_bits - 2;
    let shape = hint.map(|ty| ty.shape.clone()).unwrap_or_default();
    let declared = || {
        hint.cloned()
            .map(|ty| vec![ty])
            .ok_or_else(|| "has no declared type".to_string())
    };
    match op {
        Op::Input(_) | Op::Carried(_) | Op::CarriedMasked(_) | Op::Const(_) => declared(),
        Op::Linear(map) => linear::infer(map, ins, &shape, max_bound),
        Op::AddConst(c) => {
            let [x] = operands(ins)?;
            require_ring(&x)?;
            let constant = 64 - c.unsigned_abs().leading_zeros();
            let bound = (u32::from(x.bound_log2).max(constant) + 1).min(u32::from(max_bound));
            Ok(vec![Type {
                bound_log2: bound as u8,
                ..x
            }])
        }
        Op::Rescale => {
            let [x] = operands(ins)?;
            require_ring(&x)?;
            let frac_bits = hint.map_or(x.frac_bits, |ty| ty.frac_bits);
            Ok(vec![Type { frac_bits, ..x }])
        }
        Op::Reshape => {
            let [x] = operands(ins)?;
            if crate::ring::elements(&shape) != x.len() {
                return Err(format!("cannot reshape {:?} to {shape:?}", x.shape));
            }
            Ok(vec![Type { shape, ..x }])
        }
        Op::Product(product) => product::infer(product, ins, &shape, max_bound),
        Op::Powers { degree } => powers::infer(*degree, ins, max_bound),
        Op::Trunc { shift, .. } => trunc::infer(*shift, ins, ring_bits),
        Op::ReluTrunc { shift, .. } => relu_trunc::infer(*shift, ins, ring_bits),
        Op::BitTrunc { shift, .. } => bits::infer_trunc(*shift, ins, ring_bits),
        Op::NonNegative | Op::AtLeast(_) => bits::infer_non_negative(ins),
        Op::BitMul => bits::infer_mul(ins),
        Op::BitDot => bits::infer_dot(ins),
        Op::BitToRing => bits::infer_to_ring(ins),
        Op::MaxPool(pool) => max_pool::infer(pool, ins, &shape),
        Op::PoolSelect(pool) => max_pool::infer_select(pool, ins),
        Op::ArgMax => argmax::infer(ins),
        Op::Lookup {
            position,
            width,
            open_bits,
            tables,
        } => lookup::infer(*position, *width, *open_bits, tables, ins, ring_bits),
    }
}

/// The plain meaning: results from operands, each a flat array (bits as 0 and 1, plane after
/// plane). `val` is the first operand's program value (the address of rounding coins).
pub fn plain(
    op: &Op,
    ins: &[&[u64]],
    types: &[&Type],
    ring_bits: u8,
    coins: &Coins<'_>,
) -> Result<Vec<Vec<u64>>, OutOfRange> {
    Ok(match op {
        Op::Input(_) | Op::Carried(_) | Op::CarriedMasked(_) | Op::Const(_) => Vec::new(),
        Op::Linear(map) => vec![map.apply(ins)],
        Op::AddConst(c) => vec![ins[0].iter().map(|x| x.wrapping_add(*c as u64)).collect()],
        Op::Rescale | Op::Reshape => vec![ins[0].to_vec()],
        Op::Product(product) => {
            let out = product::plain(product, ins[0], ins[1]);
            product::check_range(product, ins[0], ins[1], &out, ring_bits)?;
            vec![out]
        }
        Op::Powers { degree } => powers::plain(*degree, ins[0], ring_bits)?,
        Op::Trunc { shift, rounding } => {
            vec![trunc::plain(*shift, *rounding, ins[0], ring_bits, coins)?]
        }
        Op::ReluTrunc { shift, rounding } => {
            relu_trunc::plain(*shift, *rounding, ins[0], ring_bits, coins)?
        }
        Op::BitTrunc { shift, rounding } => {
            bits::plain_trunc(*shift, *rounding, ins[0], ins[1], ring_bits, coins)?
        }
        Op::NonNegative => vec![bits::plain_at_least(ins[0], 0, ring_bits)?],
        Op::AtLeast(c) => vec![bits::plain_at_least(ins[0], *c, ring_bits)?],
        Op::BitMul => bits::plain_mul(ins[0], ins[1]),
        Op::BitDot => vec![bits::plain_dot(ins[0], ins[1], types[0].len())],
        Op::BitToRing => vec![bits::plain_to_ring(ins[0], types[0].len())],
        Op::MaxPool(pool) => max_pool::plain(pool, ins[0], ring_bits)?,
        Op::PoolSelect(pool) => max_pool::plain_select(pool, ins),
        Op::ArgMax => vec![argmax::plain(ins[0], types[0], ring_bits)?],
        Op::Lookup {
            position,
            width,
            tables,
            ..
        } => lookup::plain(*position, *width, tables, ins[0]),
    })
}

/// The secure form: adds instructions to the plan, returns the forms of the results.
pub fn lower(node: &Node, cx: &mut Lowering<'_>) -> Vec<Repr> {
    if let Some(reprs) = cx.lower_source(node) {
        return reprs;
    }
    match &node.op {
        Op::Linear(map) => vec![lower_linear(map, node, cx)],
        Op::AddConst(c) => {
            let share = cx.share(node.ins[0]);
            let n = cx.plan.len(share);
            vec![Repr::share(cx.plan.local_share(
                Kernel::AddConst(*c as u64),
                vec![share],
                n,
            ))]
        }
        Op::Product(product) => product::lower(product, node, cx),
        Op::Powers { degree } => powers::lower(*degree, node, cx),
        Op::Trunc { shift, rounding } => trunc::lower(*shift, *rounding, node, cx),
        Op::ReluTrunc { shift, rounding } => match cx.pooled(node.ins[0]) {
            Some(pair) => relu_pool::lower(pair, *shift, *rounding, cx),
            None => relu_trunc::lower(*shift, *rounding, node, cx),
        },
        Op::BitTrunc { shift, rounding } => bits::lower_trunc(*shift, *rounding, node, cx),
        Op::NonNegative => vec![bits::lower_at_least(0, node, cx)],
        Op::AtLeast(c) => vec![bits::lower_at_least(*c, node, cx)],
        Op::BitMul => bits::lower_mul(node, cx),
        Op::BitDot => vec![bits::lower_dot(node, cx)],
        Op::BitToRing => vec![bits::lower_to_ring(node, cx)],
        Op::MaxPool(pool) => match relu_pool::pair(pool, node, cx) {
            Some(pair) => cx.lower_with_relu(node, pair),
            None => max_pool::lower(pool, node, cx),
        },
        Op::PoolSelect(pool) => match cx.selectors(node.ins[0]) {
            Some(selectors) => vec![Repr::bits(selectors)],
            None => vec![max_pool::lower_select(pool, node, cx)],
        },
        Op::ArgMax => vec![argmax::lower(node, cx)],
        Op::Lookup {
            position,
            width,
            open_bits,
            tables,
        } => lookup::lower(*position, *width, *open_bits, tables, node, cx),
        // Sources are handled above; a reshape or rescale shares its operand's forms.
        Op::Rescale
        | Op::Reshape
        | Op::Input(_)
        | Op::Carried(_)
        | Op::CarriedMasked(_)
        | Op::Const(_) => Vec::new(),
    }
}

fn lower_linear(map: &linear::Linear, node: &Node, cx: &mut Lowering<'_>) -> Repr {
    use linear::Linear;
    let selects = matches!(
        map,
        Linear::Slice { .. } | Linear::Transpose { .. } | Linear::Window(..)
    );
    // A selection of an opened value is open too, under the same selection of its mask.
    if let (true, Some(masked)) = (selects, cx.repr(node.ins[0]).masked) {
        let open = cx.plan.local_linear(map.clone(), vec![masked.open]);
        let mask = cx.plan.local_linear(map.clone(), vec![masked.mask]);
        let share = cx.repr(node.ins[0]).share;
        let share = share.map(|share| cx.plan.local_linear(map.clone(), vec![share]));
        return Repr {
            share,
            masked: Some(crate::plan::Masked { open, mask }),
            ..Repr::default()
        };
    }
    let shares = node.ins.iter().map(|val| cx.share(*val)).collect();
    Repr::share(cx.plan.local_linear(map.clone(), shares))
}
