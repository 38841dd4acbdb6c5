//! A [`Program`]: the straight-line list of high-level operations that the nodes agree on.
//!
//! A Program describes one step (a training step, an inference batch). It is data: printable
//! (`Display` is the canonical text form), hashable ([`Program::hash`]) and independent of how it
//! is executed. Its meaning is [`crate::run::plain`]; its secure execution is the
//! [`crate::plan::Plan`] that [`crate::op::lower`] makes of it. Build one with [`Builder`].

mod bilinear;
mod builder;
mod text;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use crate::op::channel::{ChannelPass, ChannelShape};
pub use crate::op::grouped::{GroupShape, Pass};
pub use crate::op::linear::{Linear, PoolShape};
pub use crate::op::lookup::Table;
pub use crate::op::piecewise::Curve;
pub use crate::op::product::Product;
pub use crate::ring::kernel::ConvShape;
pub use bilinear::ConvSpec;
pub use builder::{Builder, PoolSpec};

use crate::ring::{Tensor, elements};

/// How a truncation rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Rounding {
    /// Towards minus infinity (biased; costs accuracy in training).
    Floor,
    /// To the nearest, halves up.
    #[default]
    Nearest,
    /// Up or down with the probability that makes the expectation exact; coins from the job's key.
    Stochastic,
}

/// What a value's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Ring elements, additively shared.
    Ring,
    /// `planes` secret bits for each element of the shape.
    Bits {
        /// Bits per element.
        planes: u16,
    },
}

/// The type of a value: public facts about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Type {
    /// Ring elements or bits.
    pub kind: Kind,
    /// Lengths of the axes, outermost first.
    pub shape: Vec<usize>,
    /// The ring integer stands for itself divided by `2^frac_bits`.
    pub frac_bits: u8,
    /// The ring integer's magnitude is at most `2^bound_log2`. At most `ring_bits - 2`; a bound
    /// that reaches it is a premise (worst-case analysis gave up), checked by the plain run.
    pub bound_log2: u8,
}

impl Type {
    /// Number of elements (bits planes not counted).
    pub fn len(&self) -> usize {
        elements(&self.shape)
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A value of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Val(pub(crate) u32);

impl Val {
    /// The value's number in the text form.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A high-level operation. Each has its file in [`crate::op`].
#[derive(Clone, Debug, PartialEq)]
pub enum Op {
    /// A fresh secret given to this step.
    Input(String),
    /// A secret kept from the step before.
    Carried(String),
    /// A secret whose opening under a mask was kept from a set-up step of the same session.
    CarriedMasked(String),
    /// A public constant.
    Const(Arc<Tensor>),
    /// An integer linear map.
    Linear(Linear),
    /// Adds a public integer to every element.
    AddConst(i64),
    /// Changes the declared fraction bits (multiplies the meaning by a power of two); no work.
    Rescale,
    /// Changes the shape; no work.
    Reshape,
    /// A bilinear map of two secrets.
    Product(Product),
    /// All powers `x^2 .. x^degree`.
    Powers {
        /// The largest power.
        degree: u8,
    },
    /// `round(x / 2^shift)`.
    Trunc {
        /// Bits dropped.
        shift: u8,
        /// Rounding.
        rounding: Rounding,
    },
    /// `max(0, round(x / 2^shift))` and its derivative bit.
    ReluTrunc {
        /// Bits dropped.
        shift: u8,
        /// Rounding.
        rounding: Rounding,
    },
    /// `b * round(x / 2^shift)` for every plane of a bit value.
    BitTrunc {
        /// Bits dropped.
        shift: u8,
        /// Rounding.
        rounding: Rounding,
    },
    /// The bit `[x >= 0]`.
    NonNegative,
    /// The bit `[x >= c]` for a public integer.
    AtLeast(i64),
    /// `b * x` for every plane of a bit value.
    BitMul,
    /// Sum over planes of `b_p * x[.., p]`: with a one-hot, the selected element.
    BitDot,
    /// The bits as ring elements 0 and 1.
    BitToRing,
    /// Maximum over windows, and the comparison bits that chose it.
    MaxPool(PoolShape),
    /// One-hot selectors of a max pool's windows, optionally ANDed with a ReLU bit.
    PoolSelect(PoolShape),
    /// One-hot of the largest element of the last axis (ties: the first).
    ArgMax,
    /// Values of public tables at an index made of bits of `x`.
    Lookup {
        /// Position of the index's lowest bit.
        position: u8,
        /// Index bits.
        width: u8,
        /// Bits of `x` to open under a mask (at least `position + width`).
        open_bits: u8,
        /// The tables.
        tables: Vec<Arc<Table>>,
    },
}

/// One operation with its operands and results.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What is done.
    pub op: Op,
    /// Operands.
    pub ins: Vec<Val>,
    /// Results.
    pub outs: Vec<Val>,
    /// Index of the scope (layer) that it belongs to.
    pub scope: u16,
}

/// How a named output leaves the step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sink {
    /// Kept as shares under this name for the next step.
    Carry,
    /// Kept under this name together with its opening under a mask, for later steps of the session.
    CarryMasked,
    /// Given as refreshed shares to the receiver that the job names.
    Reveal,
    /// As `Reveal`, but only the index of the set plane of a one-hot bit value.
    RevealIndex,
}

/// A named result of the step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its name.
    pub name: String,
    /// Its value.
    pub val: Val,
    /// Where it goes.
    pub sink: Sink,
}

/// What all nodes agree on for one kind of step.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// A short name, such as `lenet-train`.
    pub name: String,
    /// The ring is `Z_2^ring_bits`: 64 or 48.
    pub ring_bits: u8,
    /// Operations in order; operands come before their users.
    pub nodes: Vec<Node>,
    /// Type of every value.
    pub types: Vec<Type>,
    /// Named results.
    pub outputs: Vec<Output>,
    /// Names of scopes (layers), for reports.
    pub scopes: Vec<String>,
}

/// Why a program cannot be built.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{scope}: {operation}: {problem}")]
pub struct BuildError {
    /// The layer.
    pub scope: String,
    /// The operation.
    pub operation: String,
    /// What does not fit, with expected and actual values.
    pub problem: String,
}

impl Program {
    /// The type of a value.
    pub fn ty(&self, val: Val) -> &Type {
        &self.types[val.index()]
    }

    /// For every value the one whose array it is: reshaped and rescaled values name their original.
    pub fn canonical(&self) -> Vec<Val> {
        let mut canonical: Vec<Val> = (0..self.types.len() as u32).map(Val).collect();
        for node in &self.nodes {
            if matches!(node.op, Op::Reshape | Op::Rescale) {
                canonical[node.outs[0].index()] = canonical[node.ins[0].index()];
            }
        }
        canonical
    }

    /// Named inputs of the step with their types, in order.
    pub fn inputs(&self) -> impl Iterator<Item = (&str, &Type)> {
        self.nodes.iter().filter_map(|node| match &node.op {
            Op::Input(name) => Some((name.as_str(), self.ty(node.outs[0]))),
            _ => None,
        })
    }

    /// Names and types of the carried state that the step reads (not the masked ones).
    pub fn carried(&self) -> impl Iterator<Item = (&str, &Type)> {
        self.nodes.iter().filter_map(|node| match &node.op {
            Op::Carried(name) => Some((name.as_str(), self.ty(node.outs[0]))),
            _ => None,
        })
    }
}
