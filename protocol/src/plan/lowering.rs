//! From Program to instructions: what an operation's `lower` may ask for.
//!
//! A program value can exist in several forms (share, opened under a mask, opened bits). Each form
//! is made once, on first request, and then serves every reader: that is how a mask is inserted
//! once per value and openings are shared between forward and backward.

use std::collections::BTreeMap;

use super::{Corr, Factor, Kernel, PlanBuilder, PlanOutput, Profile, Rep, VId};
use crate::op;
use crate::op::relu_pool::PooledRelu;
use crate::program::{Kind, Node, Op, Program, Sink, Type, Val};

/// A public value `open = x + mask` (XOR for bits) and its mask, which the dealer knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Masked {
    /// The public value.
    pub open: VId,
    /// The mask.
    pub mask: VId,
}

/// One plane of a bit value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BitRef {
    /// The value.
    pub id: VId,
    /// The plane.
    pub plane: u16,
}

/// A secret bit `b = open ^ beta`, with open public and beta known to the dealer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskedBit {
    /// The public plane.
    pub open: BitRef,
    /// The mask's plane (`Known` or `Dealt`).
    pub beta: BitRef,
}

/// The forms in which a program value exists.
#[derive(Clone, Debug, Default)]
pub struct Repr {
    /// Additive share.
    pub share: Option<VId>,
    /// Opened under a full-width mask.
    pub masked: Option<Masked>,
    /// XOR-shared planes.
    pub xor: Option<VId>,
    /// Opened bits, one for each plane.
    pub bits: Option<Vec<MaskedBit>>,
}

impl Repr {
    /// A value that exists as a share.
    pub fn share(share: VId) -> Repr {
        Repr {
            share: Some(share),
            ..Repr::default()
        }
    }

    /// A value that exists as opened bits.
    pub fn bits(bits: Vec<MaskedBit>) -> Repr {
        Repr {
            bits: Some(bits),
            ..Repr::default()
        }
    }
}

/// State of a lowering: the program, the forms of its values so far, and the plan being built.
#[derive(Debug)]
pub struct Lowering<'a> {
    /// The program.
    pub program: &'a Program,
    /// The instructions so far.
    pub plan: PlanBuilder,
    reprs: Vec<Repr>,
    canonical: Vec<Val>,
    low: BTreeMap<(Val, u8), Masked>,
    beta_rings: BTreeMap<BitRef, VId>,
    coin_masks: BTreeMap<(Val, u8), VId>,
    /// Pools that wait for their ReLU, by their maxima.
    pooled: BTreeMap<Val, PooledRelu>,
    /// Selectors that a pool with its ReLU has opened, by the pool's bits.
    selectors: BTreeMap<Val, Vec<MaskedBit>>,
}

impl Lowering<'_> {
    /// Ring bits k.
    pub fn ring_bits(&self) -> u8 {
        self.program.ring_bits
    }

    /// The type of a value.
    pub fn ty(&self, val: Val) -> &Type {
        self.program.ty(val)
    }

    /// The forms that exist already.
    pub fn repr(&self, val: Val) -> &Repr {
        &self.reprs[self.canonical(val).index()]
    }

    /// A reshaped or rescaled value is the same array: all its forms are those of the original.
    fn canonical(&self, val: Val) -> Val {
        self.canonical[val.index()]
    }

    /// The value as an additive share.
    pub fn share(&mut self, val: Val) -> VId {
        if let Some(share) = self.repr(val).share {
            return share;
        }
        let masked = self.masked(val);
        let n = self.plan.len(masked.open);
        let share = self
            .plan
            .local_share(Kernel::Unmask, vec![masked.open, masked.mask], n);
        self.reprs[self.canonical[val.index()].index()].share = Some(share);
        share
    }

    /// The value opened under its one full-width mask.
    pub fn masked(&mut self, val: Val) -> Masked {
        if let Some(masked) = self.repr(val).masked {
            return masked;
        }
        let share = self
            .repr(val)
            .share
            .expect("a ring value exists as a share or masked");
        let masked = self.plan.open_ring(share, self.ring_bits());
        self.reprs[self.canonical[val.index()].index()].masked = Some(masked);
        masked
    }

    /// The value's low `bits` bits opened under a mask of that width; all of them under its one full mask.
    pub fn masked_low(&mut self, val: Val, bits: u8) -> Masked {
        if bits == self.ring_bits() {
            return self.masked(val);
        }
        let val = self.canonical(val);
        if let Some(masked) = self.low.get(&(val, bits)) {
            return *masked;
        }
        let share = self.share(val);
        let masked = self.plan.open_ring(share, bits);
        self.low.insert((val, bits), masked);
        masked
    }

    /// The mask to use in a stochastic truncation: `v - u` with the coins u at the dealer.
    pub fn coin_mask(&mut self, val: Val, shift: u8) -> VId {
        let val = self.canonical(val);
        if let Some(mask) = self.coin_masks.get(&(val, shift)) {
            return *mask;
        }
        let masked = self.masked(val);
        let corr = Corr::SubtractCoins {
            shift,
            coins: val.0,
        };
        let n = self.plan.len(masked.open);
        let mask = self.plan.derive_ring(corr, vec![masked.mask], n);
        self.coin_masks.insert((val, shift), mask);
        mask
    }

    /// The opened bits of a bit value.
    pub fn bits(&mut self, val: Val) -> Vec<MaskedBit> {
        if let Some(bits) = &self.repr(val).bits {
            return bits.clone();
        }
        let xor = self
            .repr(val)
            .xor
            .expect("a bit value exists opened or XOR-shared");
        let bits = self.open_planes(xor);
        self.reprs[self.canonical[val.index()].index()].bits = Some(bits.clone());
        bits
    }

    /// Opens all planes of an XOR-shared value: one round.
    pub fn open_planes(&mut self, xor: VId) -> Vec<MaskedBit> {
        let Rep::Bits { planes } = self.plan.slots[xor.index()].rep else {
            unreachable!("bit values have planes");
        };
        let opened = self.plan.open_bits(xor);
        (0..planes)
            .map(|plane| MaskedBit {
                open: BitRef {
                    id: opened.open,
                    plane,
                },
                beta: BitRef {
                    id: opened.mask,
                    plane,
                },
            })
            .collect()
    }

    /// `[beta]` as ring elements, dealt once per bit.
    pub fn beta_ring(&mut self, bit: MaskedBit) -> VId {
        if let Some(ring) = self.beta_rings.get(&bit.beta) {
            return *ring;
        }
        let n = self.plan.len(bit.beta.id);
        let corr = Corr::Term {
            factor: Factor::One,
            bits: vec![bit.beta.plane],
        };
        let ring = self.plan.deal_ring(corr, vec![bit.beta.id], n);
        self.beta_rings.insert(bit.beta, ring);
        ring
    }

    /// Operations that read a value, under whatever shape; `None` if it is a result of the step.
    pub fn readers(&self, val: Val) -> Option<Vec<&Node>> {
        let same = |other: &Val| self.canonical(*other) == self.canonical(val);
        if self.program.outputs.iter().any(|output| same(&output.val)) {
            return None;
        }
        let reads = |node: &&Node| {
            !matches!(node.op, Op::Reshape | Op::Rescale) && node.ins.iter().any(same)
        };
        Some(self.program.nodes.iter().filter(reads).collect())
    }

    /// Leaves a pool to the ReLU after it.
    pub(crate) fn lower_with_relu(&mut self, pool: &Node, pair: PooledRelu) -> Vec<Repr> {
        self.pooled.insert(self.canonical(pool.outs[0]), pair);
        vec![Repr::default(); pool.outs.len()]
    }

    /// The pool that was left to the ReLU of this value.
    pub(crate) fn pooled(&self, val: Val) -> Option<PooledRelu> {
        self.pooled.get(&self.canonical(val)).copied()
    }

    /// Keeps the selectors of a pool with its ReLU for the backward pass.
    pub(crate) fn keep_selectors(&mut self, pool_bits: Val, selectors: Vec<MaskedBit>) {
        self.selectors.insert(pool_bits, selectors);
    }

    /// The selectors kept for a pool's bits.
    pub(crate) fn selectors(&self, pool_bits: Val) -> Option<Vec<MaskedBit>> {
        self.selectors.get(&pool_bits).cloned()
    }

    fn source(&mut self, val: Val, make: impl FnOnce(VId) -> super::Instr) -> Vec<Repr> {
        let n = self.ty(val).len();
        vec![Repr::share(self.plan.source(n, make))]
    }

    fn output(&mut self, name: &str, val: Val, sink: &Sink) {
        let bits = matches!(self.ty(val).kind, Kind::Bits { .. });
        let share = match sink {
            Sink::RevealIndex => op::argmax::index_planes(val, self),
            _ if bits => match self.repr(val).xor {
                Some(xor) => xor,
                None => op::bits::xor_share(val, self),
            },
            _ => self.share(val),
        };
        let masked = (*sink == Sink::CarryMasked).then(|| {
            let masked = self.masked(val);
            (masked.open, masked.mask)
        });
        let output = PlanOutput {
            name: name.into(),
            sink: sink.clone(),
            shape: self.ty(val).shape.clone(),
            share,
            masked,
        };
        self.plan.output(output);
    }

    /// Values named by the inputs and carried state of the program.
    pub(crate) fn lower_source(&mut self, node: &Node) -> Option<Vec<Repr>> {
        use super::Instr;
        let out = node.outs[0];
        Some(match &node.op {
            Op::Input(name) => self.source(out, |id| Instr::Input {
                name: name.clone(),
                out: id,
            }),
            Op::Carried(name) => self.source(out, |id| Instr::Carried {
                name: name.clone(),
                out: id,
            }),
            Op::Const(tensor) => self.source(out, |id| Instr::Const {
                tensor: tensor.clone(),
                out: id,
            }),
            Op::CarriedMasked(name) => {
                let (open, mask) = self.plan.carried_masked(name, self.program.ty(out).len());
                vec![Repr {
                    masked: Some(Masked { open, mask }),
                    ..Repr::default()
                }]
            }
            _ => return None,
        })
    }
}

/// Lowers every operation in program order, then the outputs.
pub(super) fn lower(program: &Program, profile: Profile) -> PlanBuilder {
    let mut cx = Lowering {
        program,
        plan: PlanBuilder::new(program.ring_bits, profile),
        reprs: vec![Repr::default(); program.types.len()],
        canonical: program.canonical(),
        low: BTreeMap::new(),
        beta_rings: BTreeMap::new(),
        coin_masks: BTreeMap::new(),
        pooled: BTreeMap::new(),
        selectors: BTreeMap::new(),
    };
    for node in &program.nodes {
        cx.plan.scope = node.scope;
        if matches!(node.op, Op::Reshape | Op::Rescale) {
            continue;
        }
        let reprs = op::lower(node, &mut cx);
        for (out, repr) in node.outs.iter().zip(reprs) {
            cx.reprs[out.index()] = repr;
        }
    }
    for output in &program.outputs {
        cx.output(&output.name, output.val, &output.sink);
    }
    cx.plan
}
