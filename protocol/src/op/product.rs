//! Bilinear maps of two secrets: matrix product, convolution and its two adjoints (in groups too),
//! along channels, element-wise.
//!
//! Protocol (Beaver 1991, in the form of `docs/protocol.md`, section Product):
//! 1. `X = x + a`, `Y = y + b` are open, each under the one mask of its value.
//! 2. The dealer deals `[ab]`.
//! 3. `[z]_i = X * ([i=0] Y - [b]_i) - [a]_i * Y + [ab]_i`, two products a party.
//!
//! Rounds 0 beyond the masks; dealer 8 bytes for each element of the result; scale adds up. No
//! party learns anything: X and Y are uniform. Exact in the ring for all inputs.

use super::channel::{ChannelPass, ChannelShape};
use super::grouped::{GroupShape, Pass};
use crate::plan::{Kernel, Lowering, Repr};
use crate::program::{Node, Type};
use crate::ring::kernel::{Acc, ConvShape, conv2d, conv2d_grad_input, conv2d_grad_weight, gemm};

/// Which bilinear map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Product {
    /// `op(x)[m,k] * op(y)[k,n]`
    MatMul {
        /// Rows of the result.
        m: usize,
        /// Length of the sum.
        k: usize,
        /// Columns of the result.
        n: usize,
        /// Whether x is stored transposed.
        ta: bool,
        /// Whether y is stored transposed.
        tb: bool,
    },
    /// Convolution of images x with weights y.
    Conv(ConvShape),
    /// Gradient of the input: x is the output's gradient, y the weights.
    ConvGradInput(ConvShape),
    /// Gradient of the weights: x are the images, y the output's gradient.
    ConvGradWeight(ConvShape),
    /// Element by element.
    Mul {
        /// Number of elements.
        len: usize,
    },
    /// Convolution in groups or dilated, or one of its gradients.
    Grouped(Pass, GroupShape),
    /// Products along the channels.
    Channel(ChannelPass, ChannelShape),
}

impl Product {
    /// Number of elements of x, y and the result.
    pub fn lens(&self) -> (usize, usize, usize) {
        match self {
            Product::MatMul { m, k, n, .. } => (m * k, k * n, m * n),
            Product::Conv(s) => (in_len(s), weight_len(s), out_len(s)),
            Product::ConvGradInput(s) => (out_len(s), weight_len(s), in_len(s)),
            Product::ConvGradWeight(s) => (in_len(s), out_len(s), weight_len(s)),
            Product::Mul { len } => (*len, *len, *len),
            Product::Grouped(pass, s) => {
                let [x, w, y] = s.lens();
                match pass {
                    Pass::Forward => (x, w, y),
                    Pass::Input => (y, w, x),
                    Pass::Weight => (x, y, w),
                }
            }
            Product::Channel(ChannelPass::Scale, s) => (s.elements(), s.channels, s.elements()),
            Product::Channel(ChannelPass::Dot, s) => (s.elements(), s.elements(), s.channels),
        }
    }

    /// Multiply-adds of one evaluation.
    pub fn multiply_adds(&self) -> u64 {
        let product = |factors: &[usize]| factors.iter().map(|f| *f as u64).product();
        match self {
            Product::MatMul { m, k, n, .. } => product(&[*m, *k, *n]),
            Product::Conv(s) | Product::ConvGradInput(s) | Product::ConvGradWeight(s) => {
                product(&[s.n, s.c_out, s.out_h(), s.out_w(), s.c_in, s.kh, s.kw])
            }
            Product::Mul { len } => *len as u64,
            Product::Grouped(_, s) => s.multiply_adds(),
            Product::Channel(_, s) => s.elements() as u64,
        }
    }

    /// Number of terms in one element's sum, at most.
    pub fn terms(&self) -> usize {
        match self {
            Product::MatMul { k, .. } => *k,
            Product::Conv(s) => s.c_in * s.kh * s.kw,
            Product::ConvGradInput(s) => s.c_out * s.kh * s.kw,
            Product::ConvGradWeight(s) => s.n * s.out_h() * s.out_w(),
            Product::Mul { .. } | Product::Channel(ChannelPass::Scale, _) => 1,
            Product::Grouped(pass, s) => s.terms(*pass),
            Product::Channel(ChannelPass::Dot, s) => s.outer * s.inner,
        }
    }

    /// `out (acc)= x * y`
    pub fn apply(&self, acc: Acc, x: &[u64], y: &[u64], out: &mut [u64]) {
        match self {
            Product::MatMul { m, k, n, ta, tb } => gemm(acc, *m, *k, *n, x, *ta, y, *tb, out),
            Product::Conv(s) => conv2d(acc, s, x, y, out),
            Product::ConvGradInput(s) => conv2d_grad_input(acc, s, x, y, out),
            Product::ConvGradWeight(s) => conv2d_grad_weight(acc, s, x, y, out),
            Product::Grouped(pass, s) => s.apply(*pass, acc, x, y, out),
            Product::Channel(pass, s) => s.apply(*pass, acc, x, y, out),
            Product::Mul { .. } => {
                for ((o, a), b) in out.iter_mut().zip(x).zip(y) {
                    let p = a.wrapping_mul(*b);
                    *o = match acc {
                        Acc::Set => p,
                        Acc::Add => o.wrapping_add(p),
                        Acc::Sub => o.wrapping_sub(p),
                    };
                }
            }
        }
    }
}

fn in_len(s: &ConvShape) -> usize {
    s.n * s.c_in * s.h * s.w
}

fn weight_len(s: &ConvShape) -> usize {
    s.c_out * s.c_in * s.kh * s.kw
}

fn out_len(s: &ConvShape) -> usize {
    s.n * s.c_out * s.out_h() * s.out_w()
}

/// Both operands are rings of the right size; the scale is the sum of the scales.
pub fn infer(
    product: &Product,
    ins: &[&Type],
    shape: &[usize],
    max_bound: u8,
) -> Result<Vec<Type>, String> {
    let [x, y] = ins else {
        return Err(format!("needs two operands, has {}", ins.len()));
    };
    super::require_ring(x)?;
    super::require_ring(y)?;
    let (x_len, y_len, out_len) = product.lens();
    if x.len() != x_len || y.len() != y_len || crate::ring::elements(shape) != out_len {
        return Err(format!(
            "operands {:?} and {:?} do not fit {product:?} -> {shape:?}",
            x.shape, y.shape
        ));
    }
    let terms = product.terms().max(1).next_power_of_two().trailing_zeros();
    let bound = u32::from(x.bound_log2) + u32::from(y.bound_log2) + terms;
    let frac = u32::from(x.frac_bits) + u32::from(y.frac_bits);
    if frac > u32::from(max_bound) {
        return Err(format!(
            "the product would have {frac} fraction bits; truncate an operand first"
        ));
    }
    Ok(vec![Type {
        kind: x.kind,
        shape: shape.to_vec(),
        frac_bits: frac as u8,
        bound_log2: bound.min(u32::from(max_bound)) as u8,
    }])
}

/// The plain meaning.
pub fn plain(product: &Product, x: &[u64], y: &[u64]) -> Vec<u64> {
    let mut out = vec![0; product.lens().2];
    product.apply(Acc::Set, x, y, &mut out);
    out
}

/// The secure form: steps 1 to 3 above.
pub fn lower(product: &Product, node: &Node, cx: &mut Lowering<'_>) -> Vec<Repr> {
    let x = cx.masked(node.ins[0]);
    let y = cx.masked(node.ins[1]);
    let ab = cx.plan.deal_product(*product, x.mask, y.mask);
    let z = cx.plan.local_share(
        Kernel::Bilinear(*product),
        vec![x.open, x.mask, y.open, y.mask, ab],
        product.lens().2,
    );
    vec![Repr::share(z)]
}

/// Whether the integers stay below `2^(k-1)`: first by norms; if those do not decide, by the result,
/// or, where that itself may have wrapped, by the product of the operands without their low bits,
/// whose error is bounded.
pub fn check_range(
    product: &Product,
    x: &[u64],
    y: &[u64],
    out: &[u64],
    ring_bits: u8,
) -> Result<(), super::OutOfRange> {
    let max = |v: &[u64]| {
        v.iter()
            .map(|e| (*e as i64).unsigned_abs())
            .max()
            .unwrap_or(0)
    };
    let (x_max, y_max) = (u128::from(max(x)), u128::from(max(y)));
    let terms = product.terms() as u128;
    let bound = x_max * y_max * terms;
    let limit = 1u128 << (ring_bits - 1);
    if bound < limit {
        return Ok(());
    }
    if bound < 1 << 63 {
        return below(out, 0, 0, limit);
    }
    let bits = |v: u128| 128 - v.leading_zeros();
    let excess = (bits(x_max) + bits(y_max) + bits(terms)).saturating_sub(62);
    let (drop_x, drop_y) = (excess.div_ceil(2).min(63), (excess / 2).min(63));
    let drop = |v: &[u64], by: u32| {
        v.iter()
            .map(|e| ((*e as i64) >> by) as u64)
            .collect::<Vec<u64>>()
    };
    let scaled = plain(product, &drop(x, drop_x), &drop(y, drop_y));
    let error = terms * ((x_max << drop_y) + (y_max << drop_x));
    below(&scaled, drop_x + drop_y, error, limit)
}

/// Whether `|v| 2^dropped + error` is below the limit for all elements.
fn below(out: &[u64], dropped: u32, error: u128, limit: u128) -> Result<(), super::OutOfRange> {
    let magnitude = |v: &u64| (u128::from((*v as i64).unsigned_abs()) << dropped) + error;
    match out.iter().position(|v| magnitude(v) >= limit) {
        None => Ok(()),
        Some(index) => Err(super::OutOfRange {
            index,
            magnitude_log2: 128 - magnitude(&out[index]).leading_zeros(),
            limit_log2: limit.trailing_zeros(),
        }),
    }
}
