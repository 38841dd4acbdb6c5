//! Builds a [`Program`] with shape, scale and bound checks at every operation.
//!
//! Methods take and give [`Val`]s; a mismatch is a [`BuildError`] that names layer, operation and
//! both sides. Convolutions and products along channels are in
//! `bilinear.rs`, the composites (softmax, polynomials, ..) in [`crate::op::composite`].

use std::sync::Arc;

use super::{
    BuildError, DropoutSpec, Kind, Linear, Node, Op, Output, PoolShape, Product, Program, Rounding,
    Sink, Table, Type, Val,
};
use crate::op;
use crate::ring::{Tensor, elements};

/// Windows of a pooling, height first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolSpec {
    /// Window height and width.
    pub window: [usize; 2],
    /// Steps between windows.
    pub stride: [usize; 2],
    /// Border that windows may reach into, less wide than a window: top, left, bottom, right. Sums take
    /// it for zeros, maxima leave it out.
    pub pads: [usize; 4],
}

/// Collects operations into a [`Program`].
#[derive(Debug)]
pub struct Builder {
    program: Program,
    scope: u16,
}

pub(super) type Built<T = Val> = Result<T, BuildError>;

impl Builder {
    /// An empty program over `Z_2^ring_bits` (64 or 48).
    pub fn new(name: &str, ring_bits: u8) -> Built<Builder> {
        let builder = Builder {
            program: Program {
                name: name.into(),
                ring_bits,
                nodes: Vec::new(),
                types: Vec::new(),
                outputs: Vec::new(),
                scopes: vec!["step".into()],
            },
            scope: 0,
        };
        if ![48, 64].contains(&ring_bits) {
            return Err(builder.error(
                "ring",
                format!("{ring_bits} ring bits; 48 and 64 are possible"),
            ));
        }
        Ok(builder)
    }

    /// Starts a named layer; what follows belongs to it. A name that was used continues it.
    pub fn scope(&mut self, name: &str) {
        let at = self.program.scopes.iter().position(|scope| scope == name);
        self.scope = at.unwrap_or(self.program.scopes.len()) as u16;
        if at.is_none() {
            self.program.scopes.push(name.into());
        }
    }

    /// An error at the current layer.
    pub fn error(&self, operation: &str, problem: impl Into<String>) -> BuildError {
        BuildError {
            scope: self.program.scopes[usize::from(self.scope)].clone(),
            operation: operation.into(),
            problem: problem.into(),
        }
    }

    /// The type of a value.
    pub fn ty(&self, val: Val) -> &Type {
        self.program.ty(val)
    }

    /// The shape of a value.
    pub fn shape(&self, val: Val) -> Vec<usize> {
        self.ty(val).shape.clone()
    }

    /// Ring bits k.
    pub fn ring_bits(&self) -> u8 {
        self.program.ring_bits
    }

    fn push(&mut self, op: Op, ins: &[Val], hint: Option<Type>) -> Built<Vec<Val>> {
        let types: Vec<&Type> = ins.iter().map(|val| self.ty(*val)).collect();
        let outs = op::infer(&op, &types, hint.as_ref(), self.program.ring_bits)
            .map_err(|problem| self.error(&op.to_string(), problem))?;
        let first = self.program.types.len();
        self.program.types.extend(outs);
        let outs: Vec<Val> = (first..self.program.types.len())
            .map(|i| Val(i as u32))
            .collect();
        self.program.nodes.push(Node {
            op,
            ins: ins.to_vec(),
            outs: outs.clone(),
            scope: self.scope,
        });
        Ok(outs)
    }

    fn one(&mut self, op: Op, ins: &[Val], hint: Option<Type>) -> Built {
        Ok(self.push(op, ins, hint)?[0])
    }

    fn with_shape(&self, like: Val, shape: &[usize]) -> Option<Type> {
        Some(Type {
            shape: shape.to_vec(),
            ..self.ty(like).clone()
        })
    }

    fn source(&mut self, op: Op, shape: &[usize], frac_bits: u8, bound_log2: u8) -> Built {
        let hint = Type {
            kind: Kind::Ring,
            shape: shape.to_vec(),
            frac_bits,
            bound_log2,
        };
        if elements(shape) == 0 {
            return Err(self.error(&op.to_string(), format!("shape {shape:?} has no elements")));
        }
        self.one(op, &[], Some(hint))
    }

    /// A fresh secret given to each step; magnitude at most `2^bound_log2` as an integer.
    pub fn input(&mut self, name: &str, shape: &[usize], frac_bits: u8, bound_log2: u8) -> Built {
        self.source(Op::Input(name.into()), shape, frac_bits, bound_log2)
    }

    /// A secret kept from the step before under this name.
    pub fn carried(&mut self, name: &str, shape: &[usize], frac_bits: u8, bound_log2: u8) -> Built {
        self.source(Op::Carried(name.into()), shape, frac_bits, bound_log2)
    }

    /// A secret whose opening an earlier step of the session kept ([`Sink::CarryMasked`]).
    pub fn carried_masked(
        &mut self,
        name: &str,
        shape: &[usize],
        frac_bits: u8,
        bound_log2: u8,
    ) -> Built {
        self.source(Op::CarriedMasked(name.into()), shape, frac_bits, bound_log2)
    }

    /// A public constant.
    pub fn constant(&mut self, tensor: Tensor, frac_bits: u8) -> Built {
        let magnitude = tensor
            .data()
            .iter()
            .map(|v| (*v as i64).unsigned_abs())
            .max()
            .unwrap_or(0);
        let bound = (64 - magnitude.leading_zeros()) as u8;
        let shape = tensor.shape().to_vec();
        self.source(Op::Const(Arc::new(tensor)), &shape, frac_bits, bound)
    }

    /// A named result.
    pub fn output(&mut self, name: &str, val: Val, sink: Sink) -> Built<()> {
        let bits = matches!(self.ty(val).kind, Kind::Bits { .. });
        if bits && matches!(sink, Sink::Carry | Sink::CarryMasked) {
            return Err(self.error(
                "output",
                format!("{name:?} is bits; convert with bit_to_ring to carry it"),
            ));
        }
        if let (Kind::Bits { planes: 65.. }, Sink::Reveal) = (self.ty(val).kind, &sink) {
            return Err(self.error(
                "output",
                format!("{name:?} has more than 64 bits an element; reveal its index"),
            ));
        }
        if sink == Sink::RevealIndex && !bits {
            return Err(self.error("output", format!("{name:?} is not a one-hot bit value")));
        }
        if self
            .program
            .outputs
            .iter()
            .any(|output| output.name == name)
        {
            return Err(self.error("output", format!("{name:?} is named twice")));
        }
        self.program.outputs.push(Output {
            name: name.into(),
            val,
            sink,
        });
        Ok(())
    }

    /// The finished program.
    pub fn finish(self) -> Program {
        self.program
    }

    /// `x + y`, same shape and scale.
    pub fn add(&mut self, x: Val, y: Val) -> Built {
        let hint = self.ty(x).clone();
        self.one(Op::Linear(Linear::Add), &[x, y], Some(hint))
    }

    /// Adds y, which has the axes of x without the first `outer` and the last `inner`, at every place
    /// of those; same scale.
    pub fn add_each(&mut self, x: Val, y: Val, outer: usize, inner: usize) -> Built {
        let (mid, [outer, each, inner]) = self.axes(x, outer, inner);
        if self.shape(y) != mid {
            let problem = format!(
                "{:?} is added to {mid:?} of {:?}",
                self.shape(y),
                self.shape(x)
            );
            return Err(self.error("add_each", problem));
        }
        let map = Linear::AddEach {
            outer,
            mid: each,
            inner,
        };
        let hint = self.ty(x).clone();
        self.one(Op::Linear(map), &[x, y], Some(hint))
    }

    /// `x - y`, same shape and scale.
    pub fn sub(&mut self, x: Val, y: Val) -> Built {
        let hint = self.ty(x).clone();
        self.one(Op::Linear(Linear::Sub), &[x, y], Some(hint))
    }

    /// `by * x` for a public integer.
    pub fn scale(&mut self, x: Val, by: i64) -> Built {
        let hint = self.ty(x).clone();
        self.one(Op::Linear(Linear::Scale(by)), &[x], Some(hint))
    }

    /// Each element times a public integer: `by[j]` for element j, over and over.
    pub fn scale_each(&mut self, x: Val, by: &[i64]) -> Built {
        let hint = self.ty(x).clone();
        self.one(Op::Linear(Linear::ScaleEach(by.to_vec())), &[x], Some(hint))
    }

    /// `by * x` for a public real number, as an integer with `frac_bits` fraction bits that are
    /// added to the scale.
    pub fn scale_real(&mut self, x: Val, by: f64, frac_bits: u8) -> Built {
        let integer = crate::fixed::encode(by, u32::from(frac_bits)) as i64;
        let scaled = self.scale(x, integer)?;
        let frac = self.ty(x).frac_bits + frac_bits;
        self.rescale(scaled, frac)
    }

    /// `x + c` for a public integer at the scale of x.
    pub fn add_const(&mut self, x: Val, c: i64) -> Built {
        self.one(Op::AddConst(c), &[x], None)
    }

    /// x without the elements that a public mask drops, which follows from the spec and the step.
    pub fn dropout(&mut self, x: Val, spec: DropoutSpec) -> Built {
        self.one(Op::Dropout(spec), &[x], None)
    }

    /// Declares other fraction bits: the meaning is multiplied by `2^(old - new)`; no work.
    pub fn rescale(&mut self, x: Val, frac_bits: u8) -> Built {
        let hint = Type {
            frac_bits,
            ..self.ty(x).clone()
        };
        self.one(Op::Rescale, &[x], Some(hint))
    }

    /// The same elements under another shape; no work.
    pub fn reshape(&mut self, x: Val, shape: &[usize]) -> Built {
        let hint = self.with_shape(x, shape);
        self.one(Op::Reshape, &[x], hint)
    }

    fn axes(&self, x: Val, outer: usize, inner: usize) -> (Vec<usize>, [usize; 3]) {
        let shape = self.shape(x);
        let end = shape
            .len()
            .saturating_sub(inner)
            .max(outer.min(shape.len()));
        let start = outer.min(end);
        let mid = shape[start..end].to_vec();
        let lengths = [
            elements(&shape[..start]),
            elements(&mid),
            elements(&shape[end..]),
        ];
        (mid, lengths)
    }

    /// Swaps the last two axes.
    pub fn transpose(&mut self, x: Val) -> Built {
        let mut shape = self.shape(x);
        let [.., rows, cols] = shape[..] else {
            return Err(self.error("transpose", format!("{shape:?} has no two axes")));
        };
        let outer = elements(&shape[..shape.len() - 2]);
        let last = shape.len() - 1;
        shape.swap(last - 1, last);
        let hint = self.with_shape(x, &shape);
        self.one(
            Op::Linear(Linear::Transpose { outer, rows, cols }),
            &[x],
            hint,
        )
    }

    /// Sums over the first `outer` and the last `inner` axes.
    pub fn sum(&mut self, x: Val, outer: usize, inner: usize) -> Built {
        let (shape, [outer, mid, inner]) = self.axes(x, outer, inner);
        let hint = self.with_shape(x, &shape);
        self.one(Op::Linear(Linear::Sum { outer, mid, inner }), &[x], hint)
    }

    /// Repeats x along new leading axes `outer` and new trailing axes `inner`.
    pub fn broadcast(&mut self, x: Val, outer: &[usize], inner: &[usize]) -> Built {
        let shape = [outer, &self.shape(x)[..], inner].concat();
        let map = Linear::Broadcast {
            outer: elements(outer),
            mid: self.ty(x).len(),
            inner: elements(inner),
        };
        let hint = self.with_shape(x, &shape);
        self.one(Op::Linear(map), &[x], hint)
    }

    /// Elements `start .. start + take` of an axis.
    pub fn slice(&mut self, x: Val, axis: usize, start: usize, take: usize) -> Built {
        let mut shape = self.shape(x);
        if axis >= shape.len() {
            return Err(self.error("slice", format!("{shape:?} has no axis {axis}")));
        }
        let map = Linear::Slice {
            outer: elements(&shape[..axis]),
            len: shape[axis],
            start,
            take,
            inner: elements(&shape[axis + 1..]),
        };
        shape[axis] = take;
        let hint = self.with_shape(x, &shape);
        self.one(Op::Linear(map), &[x], hint)
    }

    /// Operands one after the other along an axis; other axes equal.
    pub fn concat(&mut self, xs: &[Val], axis: usize) -> Built {
        let first = xs
            .first()
            .ok_or_else(|| self.error("concat", "needs operands"))?;
        let mut shape = self.shape(*first);
        if axis >= shape.len() {
            return Err(self.error("concat", format!("{shape:?} has no axis {axis}")));
        }
        let inner = elements(&shape[axis + 1..]);
        let lengths: Vec<usize> = xs
            .iter()
            .map(|x| self.shape(*x).get(axis).copied().unwrap_or(0))
            .collect();
        for (x, len) in xs.iter().zip(&lengths) {
            let mut expected = shape.clone();
            expected[axis] = *len;
            if self.shape(*x) != expected {
                return Err(self.error("concat", format!("{:?} beside {shape:?}", self.shape(*x))));
            }
        }
        let outer = elements(&shape[..axis]);
        shape[axis] = lengths.iter().sum();
        let map = Linear::Concat {
            outer,
            parts: lengths.iter().map(|len| len * inner).collect(),
        };
        let hint = self.with_shape(*first, &shape);
        self.one(Op::Linear(map), xs, hint)
    }

    pub(super) fn product(&mut self, product: Product, x: Val, y: Val, shape: &[usize]) -> Built {
        let hint = self.with_shape(x, shape);
        self.one(Op::Product(product), &[x, y], hint)
    }

    /// Matrix product of `[m, k]` and `[k, n]`; `ta`, `tb` say that an operand is stored transposed.
    pub fn matmul(&mut self, x: Val, y: Val, ta: bool, tb: bool) -> Built {
        let (xs, ys) = (self.shape(x), self.shape(y));
        let ([x0, x1], [y0, y1]) = (&xs[..], &ys[..]) else {
            return Err(self.error(
                "matmul",
                format!("needs two matrices, has {xs:?} and {ys:?}"),
            ));
        };
        let (m, k) = if ta { (*x1, *x0) } else { (*x0, *x1) };
        let (k2, n) = if tb { (*y1, *y0) } else { (*y0, *y1) };
        if k != k2 {
            return Err(self.error(
                "matmul",
                format!("inner lengths {k} and {k2} differ ({xs:?} times {ys:?})"),
            ));
        }
        self.product(Product::MatMul { m, k, n, ta, tb }, x, y, &[m, n])
    }

    /// `x * y` element by element, same shape.
    pub fn mul(&mut self, x: Val, y: Val) -> Built {
        let shape = self.shape(x);
        if shape != self.shape(y) {
            return Err(self.error(
                "mul",
                format!("shapes {shape:?} and {:?} differ", self.shape(y)),
            ));
        }
        self.product(
            Product::Mul {
                len: elements(&shape),
            },
            x,
            y,
            &shape,
        )
    }

    /// `x^2 .. x^degree`; scale `j f`.
    pub fn powers(&mut self, x: Val, degree: u8) -> Built<Vec<Val>> {
        self.push(Op::Powers { degree }, &[x], None)
    }

    /// `round(x / 2^shift)`: `shift` fraction bits less.
    pub fn trunc(&mut self, x: Val, shift: u8, rounding: Rounding) -> Built {
        self.one(Op::Trunc { shift, rounding }, &[x], None)
    }

    /// `max(0, round(x / 2^shift))` and the derivative bit.
    pub fn relu_trunc(&mut self, x: Val, shift: u8, rounding: Rounding) -> Built<(Val, Val)> {
        let outs = self.push(Op::ReluTrunc { shift, rounding }, &[x], None)?;
        Ok((outs[0], outs[1]))
    }

    /// `b * round(x / 2^shift)` for each plane of the bits.
    pub fn bit_trunc(
        &mut self,
        bits: Val,
        x: Val,
        shift: u8,
        rounding: Rounding,
    ) -> Built<Vec<Val>> {
        self.push(Op::BitTrunc { shift, rounding }, &[bits, x], None)
    }

    /// The bit `[x >= 0]`.
    pub fn non_negative(&mut self, x: Val) -> Built {
        self.one(Op::NonNegative, &[x], None)
    }

    /// The bit `[x >= c]` for a public integer at the scale of x: all thresholds of one value share
    /// its opening.
    pub fn at_least(&mut self, x: Val, c: i64) -> Built {
        self.one(Op::AtLeast(c), &[x], None)
    }

    /// The bit `[x >= y]`.
    pub fn greater_equal(&mut self, x: Val, y: Val) -> Built {
        let difference = self.sub(x, y)?;
        self.non_negative(difference)
    }

    /// `b * x` for each plane of the bits.
    pub fn bit_mul(&mut self, bits: Val, x: Val) -> Built<Vec<Val>> {
        self.push(Op::BitMul, &[bits, x], None)
    }

    /// Sum over planes of `b_p * x[.., p]`; with a one-hot the selected element.
    pub fn bit_dot(&mut self, bits: Val, x: Val) -> Built {
        self.one(Op::BitDot, &[bits, x], None)
    }

    /// `if b { x } else { y }` for a one-plane bit value.
    pub fn select(&mut self, bit: Val, x: Val, y: Val) -> Built {
        let difference = self.sub(x, y)?;
        let chosen = self.bit_mul(bit, difference)?;
        self.add(y, chosen[0])
    }

    /// Bits as ring elements 0 and 1 (0 fraction bits); several planes become a last axis.
    pub fn bit_to_ring(&mut self, bits: Val) -> Built {
        self.one(Op::BitToRing, &[bits], None)
    }

    /// The geometry of a pooling of `[.., h, w]`.
    pub fn pool_shape(&self, x: &[usize], spec: PoolSpec) -> Built<PoolShape> {
        let [.., h, w] = x else {
            return Err(self.error("pool", format!("needs [.., h, w], has {x:?}")));
        };
        let PoolSpec {
            window,
            stride,
            pads,
        } = spec;
        let fits = |axis: usize, length: usize| {
            let border = [pads[axis], pads[axis + 2]];
            length > 0
                && stride[axis] > 0
                && border.iter().all(|pad| *pad < window[axis])
                && window[axis] <= length + border[0] + border[1]
        };
        if !fits(0, *h) || !fits(1, *w) {
            return Err(self.error(
                "pool",
                format!(
                    "window {window:?}, stride {stride:?}, border {pads:?} does not fit {h}x{w}"
                ),
            ));
        }
        let planes = elements(&x[..x.len() - 2]);
        Ok(PoolShape {
            planes,
            h: *h,
            w: *w,
            window,
            stride,
            pads,
        })
    }

    fn pooled(&self, x: Val, spec: PoolSpec) -> Built<(PoolShape, Option<Type>)> {
        let mut shape = self.shape(x);
        let pool = self.pool_shape(&shape, spec)?;
        let at = shape.len() - 2;
        shape[at] = pool.out_h();
        shape[at + 1] = pool.out_w();
        Ok((pool, self.with_shape(x, &shape)))
    }

    /// Maxima over windows of `[.., h, w]`, and the comparison bits. A border takes no part.
    pub fn max_pool(&mut self, x: Val, spec: PoolSpec) -> Built<(Val, Val)> {
        let (pool, hint) = self.pooled(x, spec)?;
        let outs = self.push(Op::MaxPool(pool), &[x], hint)?;
        Ok((outs[0], outs[1]))
    }

    /// Selectors for [`Builder::max_pool_grad`], from the comparison bits and, if the pool feeds a
    /// ReLU, its derivative bit. `x_shape` is the pool's input shape.
    pub fn pool_select(
        &mut self,
        bits: Val,
        relu: Option<Val>,
        x_shape: &[usize],
        spec: PoolSpec,
    ) -> Built {
        let pool = self.pool_shape(x_shape, spec)?;
        let ins: Vec<Val> = std::iter::once(bits).chain(relu).collect();
        self.one(Op::PoolSelect(pool), &ins, None)
    }

    /// `selector * round(g / 2^shift)` put back to the pool's input of shape `x_shape`.
    pub fn max_pool_grad(
        &mut self,
        selectors: Val,
        g: Val,
        shift: u8,
        rounding: Rounding,
        x_shape: &[usize],
        spec: PoolSpec,
    ) -> Built {
        let pool = self.pool_shape(x_shape, spec)?;
        let parts = self.bit_trunc(selectors, g, shift, rounding)?;
        let hint = self.with_shape(parts[0], x_shape);
        self.one(Op::Linear(Linear::Scatter(pool)), &parts, hint)
    }

    /// Sums over windows (an average pool once divided).
    pub fn sum_pool(&mut self, x: Val, spec: PoolSpec) -> Built {
        let (pool, hint) = self.pooled(x, spec)?;
        self.one(Op::Linear(Linear::SumPool(pool)), &[x], hint)
    }

    /// Adjoint of [`Builder::sum_pool`].
    pub fn sum_pool_grad(&mut self, g: Val, x_shape: &[usize], spec: PoolSpec) -> Built {
        let pool = self.pool_shape(x_shape, spec)?;
        let hint = self.with_shape(g, x_shape);
        self.one(Op::Linear(Linear::SumPoolGrad(pool)), &[g], hint)
    }

    /// One-hot planes of the largest element of the last axis.
    pub fn argmax(&mut self, x: Val) -> Built {
        self.one(Op::ArgMax, &[x], None)
    }

    /// Table values at the index in bits `[position, position + width)` of x, of which the low
    /// `open_bits` are opened under a mask (share it among lookups of one value).
    pub fn lookup(
        &mut self,
        x: Val,
        position: u8,
        width: u8,
        open_bits: u8,
        tables: Vec<Table>,
    ) -> Built<Vec<Val>> {
        let tables = tables.into_iter().map(Arc::new).collect();
        self.push(
            Op::Lookup {
                position,
                width,
                open_bits,
                tables,
            },
            &[x],
            None,
        )
    }
}
