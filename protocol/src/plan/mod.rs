//! A [`Plan`]: the flat list of primitive instructions that a [`Program`] is lowered to.
//!
//! Every local kernel, opening, dealt correlation and free is explicit, so that rounds, bytes and
//! memory are known before anything runs ([`Plan::cost`]) and single use of masks is a static
//! property ([`Plan::check`]). Values are flat arrays; kernels carry the dimensions they need.
//! The loops that execute a Plan are in [`crate::run`].

mod builder;
mod circuit;
mod combine;
mod compare;
mod cost;
mod lowering;
mod memory;
mod profile;
mod schedule;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use builder::PlanBuilder;
pub use circuit::{Circuit, CircuitBuilder, CircuitInput, Wire};
pub use combine::{Literal, Term};
pub use cost::{Cost, LayerCost};
pub use lowering::{BitRef, Lowering, Masked, MaskedBit, Repr};
pub use profile::{LinkProfile, Profile};

use crate::op::dropout::DropoutSpec;
use crate::op::linear::Linear;
use crate::op::lookup::LookupSpec;
use crate::op::product::Product;
use crate::program::{Program, Sink};
use crate::ring::Tensor;

/// A value of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VId(pub(crate) u32);

impl VId {
    /// Its index in [`Plan::slots`]; also its correlation id.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Who knows a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// All three parties know it in the clear; the dealer does not.
    Public,
    /// Each party holds a share; nobody knows the value.
    Share,
    /// Each party holds a share; the dealer knows the value.
    Dealt,
    /// Only the dealer has it.
    Known,
}

/// How a value is represented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rep {
    /// Ring elements, of which the low `width` bits matter.
    Ring {
        /// Significant bits.
        width: u8,
    },
    /// Bit planes, XOR-shared.
    Bits {
        /// Planes per element.
        planes: u16,
    },
}

impl Rep {
    /// Bytes of `n` elements on the wire: rings in whole bytes an element, planes in whole bytes
    /// for each block of 512 elements.
    pub fn wire_bytes(self, n: usize) -> u64 {
        match self {
            Rep::Ring { width } => n as u64 * u64::from(width.div_ceil(8)),
            Rep::Bits { planes } => {
                let (full, rest) = (n / 512, n % 512);
                u64::from(planes) * (full * 64 + rest.div_ceil(8)) as u64
            }
        }
    }

    /// Bytes of `n` elements in memory.
    pub fn memory_bytes(self, n: usize) -> u64 {
        match self {
            Rep::Ring { .. } => n as u64 * 8,
            Rep::Bits { planes } => u64::from(planes) * n.div_ceil(512) as u64 * 64,
        }
    }
}

/// What a plan knows of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Who knows it.
    pub class: Class,
    /// Its representation.
    pub rep: Rep,
    /// Number of elements.
    pub n: usize,
    /// Index of the scope (layer) that made it.
    pub scope: u16,
}

/// The ring factor of a dealt element-wise product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Factor {
    /// 1
    One,
    /// The ring value itself.
    Raw,
    /// The ring value shifted right.
    Shr(u8),
    /// The top bit of the `k`-bit ring value.
    Msb,
}

/// What the dealer computes from values that it knows.
#[derive(Clone, Debug, PartialEq)]
pub enum Corr {
    /// `a * b` under a bilinear map.
    Product(Product),
    /// `a^j`
    Power(u8),
    /// Product of a ring factor (first operand unless `One`) and of single bits.
    Term {
        /// The ring factor.
        factor: Factor,
        /// Planes of the bit operands, in order.
        bits: Vec<u16>,
    },
    /// Bit planes computed by a circuit.
    Circuit(Arc<Circuit>),
    /// The one-hot digits of a mask, by a circuit: one for each exact comparison.
    Digits(Arc<Circuit>),
    /// One-hot planes of `(index +- bit) mod 2^width`.
    OneHot(LookupSpec),
    /// All planes of a bit value as ring elements 0 and 1, plane after plane.
    BitWords,
    /// A linear map.
    Linear(Linear),
    /// `v - u` with `u` the rounding coins of `shift` bits for this program value.
    SubtractCoins {
        /// Coin bits.
        shift: u8,
        /// Address of the coins: the program value.
        coins: u32,
    },
}

/// What a party computes by itself.
#[derive(Clone, Debug, PartialEq)]
pub enum Kernel {
    /// A linear map on rings of any class.
    Linear(Linear),
    /// Adds a public constant to a share.
    AddConst(u64),
    /// Zeroes elements of a share under a public mask.
    Dropout(DropoutSpec),
    /// Operands open, mask: `open - mask`.
    Unmask,
    /// Operands X, [a], Y, [b], [ab].
    Bilinear(Product),
    /// Operands X, [a], [a^2], .. : `x^degree`.
    Power(u8),
    /// A bit circuit on planes.
    Circuit(Arc<Circuit>),
    /// Elements `start .. start + take` of every plane.
    BitSlice {
        /// First element.
        start: usize,
        /// Number of elements.
        take: usize,
    },
    /// Operands m, C, [R], [rho], [gamma]: exact truncation.
    TruncOut(TruncOut),
    /// Operands m, C, B, [R], [rho], [gamma], [beta], [beta R], [beta rho], [beta gamma].
    BitTruncOut {
        /// The truncation inside.
        trunc: TruncOut,
        /// Plane of C in its operand.
        c_plane: u16,
        /// Plane of B in its operand.
        b_plane: u16,
        /// Whether 1 is added before the bit multiplies.
        plus_one: bool,
    },
    /// Operands m, [r], B, [beta], [beta r]: `b * (m - r)`.
    BitMulOut {
        /// Plane of B in its operand.
        b_plane: u16,
    },
    /// Operands B, [beta]: the bit as a ring element.
    BitToRing {
        /// Plane of B in its operand.
        b_plane: u16,
    },
    /// Operands m, (C), one-hot planes: XOR-shared bits of the table values.
    Lookup {
        /// The index.
        spec: LookupSpec,
        /// The tables.
        tables: Vec<Arc<crate::op::lookup::Table>>,
    },
    /// Operands opened planes, [beta words]: ring element of planes `first .. first + count`.
    FromBits {
        /// Lowest plane.
        first: u16,
        /// Number of planes.
        count: u16,
    },
}

/// Constants of an exact truncation of an opened value (see `op/trunc.rs`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TruncOut {
    /// Ring bits k.
    pub ring_bits: u8,
    /// Bits dropped.
    pub shift: u8,
    /// Added to m before anything else.
    pub add: u64,
    /// The offset that makes negative values fit: `2^(k-2)` or 0.
    pub offset: u64,
}

/// One primitive instruction.
#[derive(Clone, Debug, PartialEq)]
pub enum Instr {
    /// A named share given to this step.
    Input {
        /// Its name.
        name: String,
        /// The value.
        out: VId,
    },
    /// A named share kept from the step before.
    Carried {
        /// Its name.
        name: String,
        /// The value.
        out: VId,
    },
    /// A named opening and its mask, kept from an earlier step.
    CarriedMasked {
        /// Its name.
        name: String,
        /// The opened value.
        open: VId,
        /// The mask.
        mask: VId,
    },
    /// A public constant, as the trivial sharing in which P0 holds it.
    Const {
        /// The constant.
        tensor: Arc<Tensor>,
        /// The value.
        out: VId,
    },
    /// Plain randomness: every share is PRG output; costs no bytes.
    Rand {
        /// The value.
        out: VId,
    },
    /// A correlation: two shares are PRG output, the third is the dealer's correction.
    Deal {
        /// What is dealt.
        corr: Corr,
        /// Operands, known to the dealer.
        ins: Vec<VId>,
        /// The value.
        out: VId,
    },
    /// Computed at the dealer alone.
    Derive {
        /// What is computed.
        corr: Corr,
        /// Operands, known to the dealer.
        ins: Vec<VId>,
        /// The value.
        out: VId,
    },
    /// Computed by each party alone (and by the dealer too if the result is `Dealt`).
    Local {
        /// What is computed.
        kernel: Kernel,
        /// Operands.
        ins: Vec<VId>,
        /// The value.
        out: VId,
    },
    /// `out = src + mask` (XOR for bits) becomes public among the parties.
    Open {
        /// The share that is opened.
        src: VId,
        /// Its mask, used here and nowhere else as a mask.
        mask: VId,
        /// The public value.
        out: VId,
    },
}

impl Instr {
    /// Values read.
    pub fn ins(&self) -> Vec<VId> {
        match self {
            Instr::Deal { ins, .. } | Instr::Derive { ins, .. } | Instr::Local { ins, .. } => {
                ins.clone()
            }
            Instr::Open { src, mask, .. } => vec![*src, *mask],
            _ => Vec::new(),
        }
    }

    /// Values made.
    pub fn outs(&self) -> Vec<VId> {
        match self {
            Instr::Input { out, .. }
            | Instr::Carried { out, .. }
            | Instr::Const { out, .. }
            | Instr::Rand { out }
            | Instr::Deal { out, .. }
            | Instr::Derive { out, .. }
            | Instr::Local { out, .. }
            | Instr::Open { out, .. } => vec![*out],
            Instr::CarriedMasked { open, mask, .. } => vec![*open, *mask],
        }
    }
}

/// A result of the step.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanOutput {
    /// Its name.
    pub name: String,
    /// Where it goes.
    pub sink: Sink,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The share.
    pub share: VId,
    /// For `CarryMasked`: the opening and its mask.
    pub masked: Option<(VId, VId)>,
}

/// One communication round: local work, then the openings that travel together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Round {
    /// Work before the openings; with each instruction the values that nobody reads after it.
    pub work: Vec<(Instr, Vec<VId>)>,
    /// Openings of this round.
    pub opens: Vec<Instr>,
    /// Values that nobody reads after the openings.
    pub free: Vec<VId>,
}

/// What the nodes execute for one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Ring bits k.
    pub ring_bits: u8,
    /// What lowering saved.
    pub profile: Profile,
    /// Facts about every value.
    pub slots: Vec<Slot>,
    /// Rounds in order; the last one has no openings.
    pub rounds: Vec<Round>,
    /// Results.
    pub outputs: Vec<PlanOutput>,
    /// Names of scopes (layers).
    pub scopes: Vec<String>,
}

impl Plan {
    /// Lowers a program so that it costs few bytes. See [`Plan::for_link`].
    pub fn new(program: &Program) -> Plan {
        Plan::lowered(program, Profile::BYTES)
    }

    /// Lowers a program in a chosen way.
    pub fn lowered(program: &Program, profile: Profile) -> Plan {
        let builder = lowering::lower(program, profile);
        let plan = schedule::schedule(builder, program);
        debug_assert_eq!(plan.check(), Ok(()));
        plan
    }

    /// Facts about a value.
    pub fn slot(&self, id: VId) -> &Slot {
        &self.slots[id.index()]
    }

    /// Static safety: every mask masks exactly one opening, masks are dealt randomness that no
    /// output reveals, nothing known to one side alone is used by the other.
    pub fn check(&self) -> Result<(), String> {
        let mut masks = BTreeMap::new();
        let mut random = BTreeMap::new();
        for round in &self.rounds {
            for (instr, _) in &round.work {
                if let Instr::Rand { out } = instr {
                    random.insert(*out, ());
                }
                if let Instr::Local { ins, out, .. } = instr {
                    for id in ins {
                        if self.slot(*id).class == Class::Known {
                            return Err(format!(
                                "a party's kernel making {out:?} reads {id:?}, which only the dealer has"
                            ));
                        }
                    }
                }
                if let Instr::Deal { ins, out, .. } | Instr::Derive { ins, out, .. } = instr {
                    for id in ins {
                        if !matches!(self.slot(*id).class, Class::Dealt | Class::Known) {
                            return Err(format!(
                                "dealing {out:?} reads {id:?}, which the dealer does not know"
                            ));
                        }
                    }
                }
            }
            for open in &round.opens {
                let Instr::Open { src, mask, .. } = open else {
                    return Err("an opening that is none".into());
                };
                if masks.insert(*mask, *src).is_some() {
                    return Err(format!("mask {mask:?} opens two values"));
                }
                if !random.contains_key(mask) {
                    return Err(format!("mask {mask:?} of {src:?} is not fresh randomness"));
                }
                let (value, mask) = (self.slot(*src), self.slot(*mask));
                let wide_enough = match (value.rep, mask.rep) {
                    (Rep::Ring { width }, Rep::Ring { width: mask }) => mask <= width,
                    (Rep::Bits { planes }, Rep::Bits { planes: mask }) => planes == mask,
                    _ => false,
                };
                if value.n != mask.n || !wide_enough {
                    return Err(format!("the mask of {src:?} does not cover it"));
                }
            }
        }
        for output in &self.outputs {
            if self.slot(output.share).class != Class::Share {
                return Err(format!(
                    "output {:?} is not a share of a secret",
                    output.name
                ));
            }
        }
        Ok(())
    }
}
