//! Straight-line bit circuits over planes: the comparison and selection logic of a block in vector registers.
//!
//! A circuit is a list of gates over numbered planes. It has no control flow, so its running time tells nothing of
//! the bits. What circuits compute is decided elsewhere.
#![allow(unsafe_code)]

use super::planes::Plane;
use super::{Isa, isa};

/// What a gate does with its planes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GateOp {
    /// `d = a ^ b`
    Xor,
    /// `d = a & b`
    And,
    /// `d = c ^ (a & b)`
    AndXor,
    /// `d = if c { b } else { a }`
    Mux,
    /// `d = !a`
    Not,
    /// `d = a`
    Copy,
}

/// One gate. Operands that the operation does not use must still be numbers of planes: leave them 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gate {
    /// The operation.
    pub op: GateOp,
    /// The plane that is written; it may be one of those read.
    pub d: u16,
    /// First operand.
    pub a: u16,
    /// Second operand.
    pub b: u16,
    /// Third operand.
    pub c: u16,
}

impl Gate {
    /// The largest number among the gate's planes.
    fn top(&self) -> u16 {
        self.d.max(self.a).max(self.b).max(self.c)
    }
}

/// Gates made ready to run on as many blocks as there are: bounds are checked and operations resolved once.
///
/// Every gate becomes `d = ((x ^ y) & z) ^ w` with constant planes where an operand is missing. One formula needs
/// no branch on the operation; such a branch, mispredicted, would cost ten times the gate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Netlist {
    steps: Vec<Step>,
    planes: usize,
}

/// `d = ((x ^ y) & z) ^ w`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Step {
    d: u32,
    x: u32,
    y: u32,
    z: u32,
    w: u32,
}

impl Netlist {
    /// Makes these gates ready, to be run from first to last.
    pub fn new(gates: &[Gate]) -> Netlist {
        let named = planes_needed(gates);
        let (zeros, ones) = (named as u32, named as u32 + 1);
        let step = |gate: &Gate| {
            let [d, a, b, c] = [gate.d, gate.a, gate.b, gate.c].map(u32::from);
            let [x, y, z, w] = match gate.op {
                GateOp::Xor => [a, b, ones, zeros],
                GateOp::And => [a, zeros, b, zeros],
                GateOp::AndXor => [a, zeros, b, c],
                GateOp::Mux => [a, b, c, a],
                GateOp::Not => [a, zeros, ones, ones],
                GateOp::Copy => [a, zeros, ones, zeros],
            };
            Step { d, x, y, z, w }
        };
        Netlist {
            steps: gates.iter().map(step).collect(),
            planes: named + 2,
        }
    }

    /// How many planes [`Netlist::run`] needs: those that the gates name, and two of its own after them.
    pub fn planes(&self) -> usize {
        self.planes
    }

    /// Runs the gates on one block. The last two of the [`Netlist::planes`] are overwritten.
    ///
    /// # Panics
    /// Where there are fewer planes than [`Netlist::planes`].
    pub fn run(&self, planes: &mut [Plane]) {
        self.run_with(isa(), planes);
    }

    /// [`Netlist::run`] with a chosen instruction set.
    ///
    /// # Panics
    /// As [`Netlist::run`].
    pub fn run_with(&self, isa: Isa, planes: &mut [Plane]) {
        assert!(
            planes.len() >= self.planes,
            "the gates need {} planes",
            self.planes
        );
        planes[self.planes - 2] = [0; 8];
        planes[self.planes - 1] = [u64::MAX; 8];
        // SAFETY: `new` made every number in the steps smaller than `self.planes`, and none can change;
        // `usable` has shown that the machine has the instructions.
        unsafe {
            match isa.usable() {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => avx512_steps(&self.steps, planes),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => avx2_steps(&self.steps, planes),
                _ => steps_body(&self.steps, planes),
            }
        }
    }
}

/// Planes that begin at a cache line, as gates like them: a plane that lies across two lines costs half as much
/// again. Any slice of planes is right, this one is fast.
pub struct PlaneBuffer {
    words: Vec<u64>,
    first: usize,
    planes: usize,
}

impl PlaneBuffer {
    /// So many planes of zeros.
    pub fn new(planes: usize) -> PlaneBuffer {
        let words = vec![0u64; planes * 8 + 7];
        // Words are aligned to 8 bytes, so that a line begins within the first eight of them.
        let first = words.as_ptr().align_offset(64).min(7);
        PlaneBuffer {
            words,
            first,
            planes,
        }
    }
}

impl std::fmt::Debug for PlaneBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PlaneBuffer({} planes)", self.planes)
    }
}

impl std::ops::Deref for PlaneBuffer {
    type Target = [Plane];
    fn deref(&self) -> &[Plane] {
        self.words[self.first..][..self.planes * 8].as_chunks().0
    }
}

impl std::ops::DerefMut for PlaneBuffer {
    fn deref_mut(&mut self) -> &mut [Plane] {
        self.words[self.first..][..self.planes * 8]
            .as_chunks_mut()
            .0
    }
}

fn planes_needed(gates: &[Gate]) -> usize {
    gates
        .iter()
        .map(|g| g.top() as usize + 1)
        .max()
        .unwrap_or(0)
}

/// Runs gates on one block; a [`Netlist`] saves the preparation where there are many.
///
/// # Panics
/// Where a gate names a plane that is not there.
pub fn run_gates(gates: &[Gate], regs: &mut [Plane]) {
    run_gates_with(isa(), gates, regs);
}

/// [`run_gates`] with a chosen instruction set.
///
/// # Panics
/// As [`run_gates`].
pub fn run_gates_with(isa: Isa, gates: &[Gate], regs: &mut [Plane]) {
    let named = planes_needed(gates);
    assert!(
        regs.len() >= named,
        "a gate names a plane that is not there"
    );
    let netlist = Netlist::new(gates);
    let mut planes = PlaneBuffer::new(netlist.planes());
    planes[..named].copy_from_slice(&regs[..named]);
    netlist.run_with(isa, &mut planes);
    regs[..named].copy_from_slice(&planes[..named]);
}

/// # Safety
/// Every number in the steps is below `planes.len()`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn avx2_steps(steps: &[Step], planes: &mut [Plane]) {
    // SAFETY: the caller's.
    unsafe { steps_body(steps, planes) }
}

/// # Safety
/// As [`avx2_steps`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
unsafe fn avx512_steps(steps: &[Step], planes: &mut [Plane]) {
    // SAFETY: the caller's.
    unsafe { steps_body(steps, planes) }
}

/// # Safety
/// As [`avx2_steps`].
#[inline(always)]
unsafe fn steps_body(steps: &[Step], planes: &mut [Plane]) {
    let planes = planes.as_mut_ptr();
    for step in steps {
        // SAFETY: the step's numbers are in bounds; operands are copied before `d` is written.
        unsafe {
            let read = |i: u32| -> Plane { *planes.add(i as usize) };
            let (x, y, z, w) = (read(step.x), read(step.y), read(step.z), read(step.w));
            let value: Plane = std::array::from_fn(|l| ((x[l] ^ y[l]) & z[l]) ^ w[l]);
            *planes.add(step.d as usize) = value;
        }
    }
}
