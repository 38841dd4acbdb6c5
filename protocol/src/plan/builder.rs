//! Collects instructions; assigns classes and sizes.

use std::sync::Arc;

use super::{Circuit, Class, Corr, Instr, Kernel, PlanOutput, Profile, Rep, Slot, VId};
use crate::op::product::Product;

/// Instructions in the order in which operations were lowered, before rounds are cut.
#[derive(Debug)]
pub struct PlanBuilder {
    /// Ring bits k.
    pub ring_bits: u8,
    /// What lowering saves.
    pub profile: Profile,
    /// The scope that new values belong to.
    pub scope: u16,
    pub(super) slots: Vec<Slot>,
    pub(super) instrs: Vec<Instr>,
    pub(super) outputs: Vec<PlanOutput>,
}

impl PlanBuilder {
    pub(super) fn new(ring_bits: u8, profile: Profile) -> PlanBuilder {
        PlanBuilder {
            ring_bits,
            profile,
            scope: 0,
            slots: Vec::new(),
            instrs: Vec::new(),
            outputs: Vec::new(),
        }
    }

    /// Number of elements of a value.
    pub fn len(&self, id: VId) -> usize {
        self.slots[id.index()].n
    }

    fn full(&self) -> Rep {
        Rep::Ring {
            width: self.ring_bits,
        }
    }

    pub(super) fn slot(&mut self, class: Class, rep: Rep, n: usize) -> VId {
        let id = VId(self.slots.len() as u32);
        self.slots.push(Slot {
            class,
            rep,
            n,
            scope: self.scope,
        });
        id
    }

    pub(super) fn source(&mut self, n: usize, make: impl FnOnce(VId) -> Instr) -> VId {
        let out = self.slot(Class::Share, self.full(), n);
        self.instrs.push(make(out));
        out
    }

    pub(super) fn carried_masked(&mut self, name: &str, n: usize) -> (VId, VId) {
        let open = self.slot(Class::Public, self.full(), n);
        let mask = self.slot(Class::Dealt, self.full(), n);
        self.instrs.push(Instr::CarriedMasked {
            name: name.into(),
            open,
            mask,
        });
        (open, mask)
    }

    /// Fresh random ring elements of `width` bits.
    pub fn rand_ring(&mut self, n: usize, width: u8) -> VId {
        let out = self.slot(Class::Dealt, Rep::Ring { width }, n);
        self.instrs.push(Instr::Rand { out });
        out
    }

    /// Fresh random bit planes.
    pub fn rand_bits(&mut self, n: usize, planes: usize) -> VId {
        let out = self.slot(
            Class::Dealt,
            Rep::Bits {
                planes: planes as u16,
            },
            n,
        );
        self.instrs.push(Instr::Rand { out });
        out
    }

    /// A dealt correlation.
    pub fn deal(&mut self, corr: Corr, ins: Vec<VId>, rep: Rep, n: usize) -> VId {
        let out = self.slot(Class::Dealt, rep, n);
        self.instrs.push(Instr::Deal { corr, ins, out });
        out
    }

    /// A dealt ring correlation of full width.
    pub fn deal_ring(&mut self, corr: Corr, ins: Vec<VId>, n: usize) -> VId {
        self.deal(corr, ins, self.full(), n)
    }

    /// Dealt bit planes computed by a circuit.
    pub fn deal_circuit(&mut self, circuit: Circuit, ins: Vec<VId>, n: usize) -> VId {
        let planes = circuit.outs.len() as u16;
        self.deal(
            Corr::Circuit(Arc::new(circuit)),
            ins,
            Rep::Bits { planes },
            n,
        )
    }

    /// The dealt product of two masks.
    pub fn deal_product(&mut self, product: Product, a: VId, b: VId) -> VId {
        self.deal_ring(Corr::Product(product), vec![a, b], product.lens().2)
    }

    /// A value that only the dealer computes.
    pub fn derive(&mut self, corr: Corr, ins: Vec<VId>, rep: Rep, n: usize) -> VId {
        let out = self.slot(Class::Known, rep, n);
        self.instrs.push(Instr::Derive { corr, ins, out });
        out
    }

    /// A ring value that only the dealer computes.
    pub fn derive_ring(&mut self, corr: Corr, ins: Vec<VId>, n: usize) -> VId {
        self.derive(corr, ins, self.full(), n)
    }

    /// Bit planes that only the dealer computes.
    pub fn derive_circuit(&mut self, circuit: Circuit, ins: Vec<VId>, n: usize) -> VId {
        let planes = circuit.outs.len() as u16;
        self.derive(
            Corr::Circuit(Arc::new(circuit)),
            ins,
            Rep::Bits { planes },
            n,
        )
    }

    fn local(&mut self, class: Class, kernel: Kernel, ins: Vec<VId>, rep: Rep, n: usize) -> VId {
        let out = self.slot(class, rep, n);
        self.instrs.push(Instr::Local { kernel, ins, out });
        out
    }

    /// A kernel whose result is an additive share.
    pub fn local_share(&mut self, kernel: Kernel, ins: Vec<VId>, n: usize) -> VId {
        self.local(Class::Share, kernel, ins, self.full(), n)
    }

    /// A linear map on values of one class; the result has that class.
    pub fn local_linear(&mut self, map: crate::op::linear::Linear, ins: Vec<VId>) -> VId {
        let class = self.slots[ins[0].index()].class;
        let n = map.out_len(self.len(ins[0]));
        if class == Class::Known {
            return self.derive_ring(Corr::Linear(map), ins, n);
        }
        self.local(class, Kernel::Linear(map), ins, self.full(), n)
    }

    /// XOR-shared planes computed by a circuit.
    pub fn circuit(&mut self, circuit: Circuit, ins: Vec<VId>, n: usize) -> VId {
        self.bits(
            Class::Share,
            Kernel::Circuit(Arc::new(circuit.clone())),
            ins,
            circuit.outs.len(),
            n,
        )
    }

    /// Public planes computed by a circuit from public operands.
    pub fn public_circuit(&mut self, circuit: Circuit, ins: Vec<VId>, n: usize) -> VId {
        self.bits(
            Class::Public,
            Kernel::Circuit(Arc::new(circuit.clone())),
            ins,
            circuit.outs.len(),
            n,
        )
    }

    /// A kernel whose result is XOR-shared planes.
    pub fn local_bits(&mut self, kernel: Kernel, ins: Vec<VId>, planes: usize, n: usize) -> VId {
        self.bits(Class::Share, kernel, ins, planes, n)
    }

    fn bits(
        &mut self,
        class: Class,
        kernel: Kernel,
        ins: Vec<VId>,
        planes: usize,
        n: usize,
    ) -> VId {
        self.local(
            class,
            kernel,
            ins,
            Rep::Bits {
                planes: planes as u16,
            },
            n,
        )
    }

    /// Opens a share under a mask made for it.
    pub fn open(&mut self, src: VId, mask: VId) -> VId {
        let Slot { rep, n, .. } = self.slots[mask.index()];
        let out = self.slot(Class::Public, rep, n);
        self.instrs.push(Instr::Open { src, mask, out });
        out
    }

    /// Opens ring elements under a fresh mask: the public value and the mask.
    pub fn open_ring(&mut self, src: VId, width: u8) -> super::Masked {
        let mask = self.rand_ring(self.len(src), width);
        let open = self.open(src, mask);
        super::Masked { open, mask }
    }

    /// Opens planes under fresh masks: the public planes and the masks.
    pub fn open_bits(&mut self, src: VId) -> super::Masked {
        let Rep::Bits { planes } = self.slots[src.index()].rep else {
            unreachable!("open_bits is called on bit planes");
        };
        let mask = self.rand_bits(self.len(src), usize::from(planes));
        let open = self.open(src, mask);
        super::Masked { open, mask }
    }

    pub(super) fn output(&mut self, output: PlanOutput) {
        self.outputs.push(output);
    }
}
