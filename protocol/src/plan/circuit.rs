//! Straight-line bit circuits: built with common-subexpression elimination, executed block by
//! block by [`crate::ring::kernel::run_gates`].
//!
//! A circuit is used at the parties on XOR shares and public planes, and at the dealer in the
//! clear. It must be affine in its shared inputs over GF(2): `and` and `mux` conditions take
//! public wires (at the dealer everything is clear). [`Wire::ONE_SHARE`] is the constant 1 as a
//! share: all ones at P0 and at the dealer, zero at P1 and P2.

use std::collections::BTreeMap;

use crate::ring::kernel::{Gate, GateOp, Netlist};

/// A wire of a circuit under construction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Wire(u32);

impl Wire {
    /// The constant 1 as an XOR share.
    pub const ONE_SHARE: Wire = Wire(0);
    /// The public constant 1.
    pub const ONE: Wire = Wire(1);
    /// The constant 0.
    pub const ZERO: Wire = Wire(u32::MAX);
}

/// Where input wires come from; one operand of the instruction each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CircuitInput {
    /// Bits `lo .. lo + count` of `x + offset` for a ring operand.
    Ring {
        /// Added first.
        offset: u64,
        /// Lowest bit taken.
        lo: u8,
        /// Bits taken.
        count: u8,
    },
    /// Planes `first .. first + count` of a bit operand.
    Bits {
        /// Lowest plane taken.
        first: u16,
        /// Planes taken.
        count: u16,
    },
}

impl CircuitInput {
    /// Number of wires.
    pub fn count(&self) -> usize {
        match self {
            CircuitInput::Ring { count, .. } => usize::from(*count),
            CircuitInput::Bits { count, .. } => usize::from(*count),
        }
    }
}

/// A finished circuit. Register 0 is the constant share 1, register 1 the public 1, then the
/// inputs in order; gates may reuse registers.
#[derive(Clone, Debug, PartialEq)]
pub struct Circuit {
    /// Inputs in the order of the instruction's operands.
    pub inputs: Vec<CircuitInput>,
    /// The gates, on registers.
    pub gates: Netlist,
    /// Registers of the output planes.
    pub outs: Vec<u16>,
    /// Number of registers, the gate list's own included.
    pub registers: usize,
}

/// Builds a [`Circuit`].
#[derive(Debug)]
pub struct CircuitBuilder {
    inputs: Vec<CircuitInput>,
    wires: u32,
    gates: Vec<(GateOp, Wire, Wire, Wire)>,
    seen: BTreeMap<(u8, Wire, Wire, Wire), Wire>,
}

impl CircuitBuilder {
    /// A circuit with these inputs; also the wires of each input.
    pub fn new(inputs: Vec<CircuitInput>) -> (CircuitBuilder, Vec<Vec<Wire>>) {
        let mut next = 2;
        let wires = inputs
            .iter()
            .map(|input| {
                let first = next;
                next += input.count() as u32;
                (first..next).map(Wire).collect()
            })
            .collect();
        let builder = CircuitBuilder {
            inputs,
            wires: next,
            gates: Vec::new(),
            seen: BTreeMap::new(),
        };
        (builder, wires)
    }

    fn gate(&mut self, op: GateOp, a: Wire, b: Wire, c: Wire) -> Wire {
        let key = (op as u8, a, b, c);
        if let Some(wire) = self.seen.get(&key) {
            return *wire;
        }
        let wire = Wire(self.wires);
        self.wires += 1;
        self.gates.push((op, a, b, c));
        self.seen.insert(key, wire);
        wire
    }

    /// `a ^ b`
    pub fn xor(&mut self, a: Wire, b: Wire) -> Wire {
        match (a, b) {
            _ if a == b => Wire::ZERO,
            (Wire::ZERO, _) => b,
            (_, Wire::ZERO) => a,
            _ => self.gate(GateOp::Xor, a.min(b), a.max(b), Wire::ZERO),
        }
    }

    /// `a & b`; at most one of them shared.
    pub fn and(&mut self, a: Wire, b: Wire) -> Wire {
        match (a, b) {
            _ if a == b => a,
            (Wire::ZERO, _) | (_, Wire::ZERO) => Wire::ZERO,
            (Wire::ONE, _) => b,
            (_, Wire::ONE) => a,
            _ => self.gate(GateOp::And, a.min(b), a.max(b), Wire::ZERO),
        }
    }

    /// `if condition { yes } else { no }`; the condition is public.
    pub fn mux(&mut self, condition: Wire, yes: Wire, no: Wire) -> Wire {
        match (yes, no) {
            _ if yes == no => yes,
            (_, Wire::ZERO) => self.and(condition, yes),
            (Wire::ZERO, _) => {
                let selected = self.and(condition, no);
                self.xor(no, selected)
            }
            _ => self.gate(GateOp::Mux, no, yes, condition),
        }
    }

    /// The wire selected by a public little-endian index.
    pub fn select(&mut self, index: &[Wire], values: &[Wire]) -> Wire {
        let mut level = values.to_vec();
        for bit in index {
            level = level
                .chunks(2)
                .map(|pair| self.mux(*bit, pair[1], pair[0]))
                .collect();
        }
        level[0]
    }

    /// Finishes with these output planes; registers are reused once their last reader has run.
    pub fn finish(mut self, outs: &[Wire]) -> Circuit {
        let outs: Vec<Wire> = outs
            .iter()
            .map(|wire| match *wire {
                Wire::ZERO => self.gate(GateOp::Xor, Wire::ONE, Wire::ONE, Wire::ZERO),
                wire => wire,
            })
            .collect();
        let fixed = self.wires - self.gates.len() as u32;
        let live = self.live(&outs, fixed);
        let mut last_use = vec![usize::MAX; self.wires as usize];
        for (i, (_, a, b, c)) in self.gates.iter().enumerate() {
            if live[i] {
                for wire in [a, b, c] {
                    if *wire != Wire::ZERO {
                        last_use[wire.0 as usize] = i;
                    }
                }
            }
        }
        for wire in &outs {
            last_use[wire.0 as usize] = usize::MAX;
        }
        let mut register: Vec<u16> = (0..self.wires)
            .map(|w| w.min(u32::from(u16::MAX)) as u16)
            .collect();
        let mut spare: Vec<u16> = Vec::new();
        let mut registers = fixed as usize;
        let mut gates = Vec::new();
        for (i, (op, a, b, c)) in self.gates.iter().enumerate() {
            if !live[i] {
                continue;
            }
            let reg = |wire: &Wire, register: &[u16]| match *wire {
                Wire::ZERO => 0,
                wire => register[wire.0 as usize],
            };
            let (ra, rb, rc) = (reg(a, &register), reg(b, &register), reg(c, &register));
            let mut freed = [a, b, c]
                .into_iter()
                .filter(|w| **w != Wire::ZERO && w.0 >= 2 && last_use[w.0 as usize] == i)
                .map(|w| register[w.0 as usize])
                .collect::<Vec<_>>();
            freed.sort_unstable();
            freed.dedup();
            spare.extend(freed);
            let d = spare.pop().unwrap_or_else(|| {
                registers += 1;
                (registers - 1) as u16
            });
            register[fixed as usize + i] = d;
            gates.push(Gate {
                op: *op,
                d,
                a: ra,
                b: rb,
                c: rc,
            });
        }
        assert!(
            registers < usize::from(u16::MAX),
            "a circuit needs too many registers"
        );
        // The list's own scratch planes come after every plane that it names: name the top one.
        let top = (registers - 1) as u16;
        gates.push(Gate {
            op: GateOp::Copy,
            d: top,
            a: top,
            b: top,
            c: top,
        });
        let gates = Netlist::new(&gates);
        Circuit {
            inputs: self.inputs,
            registers: gates.planes(),
            gates,
            outs: outs.iter().map(|wire| register[wire.0 as usize]).collect(),
        }
    }

    fn live(&self, outs: &[Wire], fixed: u32) -> Vec<bool> {
        let mut live = vec![false; self.gates.len()];
        let mark = |wire: &Wire, live: &mut Vec<bool>| {
            if *wire != Wire::ZERO && wire.0 >= fixed {
                live[(wire.0 - fixed) as usize] = true;
            }
        };
        for wire in outs {
            mark(wire, &mut live);
        }
        for i in (0..self.gates.len()).rev() {
            if live[i] {
                let (_, a, b, c) = &self.gates[i];
                for wire in [a, b, c] {
                    mark(wire, &mut live);
                }
            }
        }
        live
    }
}
