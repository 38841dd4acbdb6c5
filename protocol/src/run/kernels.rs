//! The parties' local kernels over blocks of 512 elements. Formulas are those of the operations'
//! files; here they only meet the representation.

use std::borrow::Cow;

use super::frame::low_mask;
use super::value::{Value, block_len};
use crate::op::lookup::{LookupSpec, Table};
use crate::plan::{Circuit, CircuitInput, Rep, Slot, TruncOut};
use crate::prg::Prg;
use crate::ring::kernel::{BLOCK, Plane, PlaneBuffer, plane_to_words, to_planes};
use crate::threads;

/// An operand: its value and what the plan says of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand<'a> {
    pub value: &'a Value<'a>,
    pub slot: &'a Slot,
    pub prg: &'a Prg,
}

impl Operand<'_> {
    fn planes_total(&self) -> usize {
        match self.slot.rep {
            Rep::Bits { planes } => usize::from(planes),
            Rep::Ring { .. } => 0,
        }
    }

    /// All ring elements.
    pub fn whole(&self) -> Cow<'_, [u64]> {
        self.value.ring(self.slot.n, self.prg)
    }

    pub fn ring<'a>(&'a self, block: usize, scratch: &'a mut [u64]) -> &'a [u64] {
        self.value.ring_block(block, self.prg, scratch)
    }

    pub fn planes(&self, block: usize, first: usize, out: &mut [Plane]) {
        self.value.planes(
            self.planes_total(),
            self.slot.n,
            block,
            first,
            self.prg,
            out,
        );
    }

    /// One plane as words 0 and 1.
    fn plane_words(&self, block: usize, plane: u16, out: &mut [u64]) {
        let mut bits = [[0; 8]];
        self.planes(block, usize::from(plane), &mut bits);
        plane_to_words(&bits[0], out);
    }
}

type Words = [u64; BLOCK];

/// Runs `each(scratch, block, out)` over the blocks of a result of `n` ring elements, with `SCRATCH`
/// blocks to expand operands into. The work is about `SCRATCH` nanoseconds an element.
fn by_block<const SCRATCH: usize>(
    n: usize,
    each: impl Fn(&mut [Words; SCRATCH], usize, &mut [u64]) + Sync,
) -> Value<'static> {
    Value::from(threads::made(n, BLOCK, SCRATCH * n, |first, out| {
        let mut scratch = [[0; BLOCK]; SCRATCH];
        for (block, out) in out.chunks_mut(BLOCK).enumerate() {
            each(&mut scratch, first + block, out);
        }
    }))
}

/// A bit circuit; `one_share` is the constant 1 as this party's share.
pub(super) fn circuit(
    circuit: &Circuit,
    ins: &[Operand<'_>],
    one_share: bool,
    n: usize,
) -> Value<'static> {
    let planes = circuit.outs.len();
    let blocks = n.div_ceil(BLOCK);
    // About 2 ns a plane and block.
    let work = blocks * circuit.registers * 4;
    Value::Bits(threads::made(
        blocks * planes,
        planes,
        work,
        |first, out| {
            let mut run = CircuitRun::new(circuit, one_share);
            for (block, out) in out.chunks_mut(planes).enumerate() {
                run.block(ins, first + block, block_len(n, first + block), out);
            }
        },
    ))
}

/// A circuit made ready for one block after the other.
pub(super) struct CircuitRun<'a> {
    circuit: &'a Circuit,
    one_share: bool,
    registers: PlaneBuffer,
    words: Words,
}

impl Clone for CircuitRun<'_> {
    /// Ready again: registers mean nothing between blocks.
    fn clone(&self) -> Self {
        CircuitRun::new(self.circuit, self.one_share)
    }
}

impl<'a> CircuitRun<'a> {
    pub fn new(circuit: &'a Circuit, one_share: bool) -> CircuitRun<'a> {
        CircuitRun {
            circuit,
            one_share,
            registers: PlaneBuffer::new(circuit.registers),
            words: [0; BLOCK],
        }
    }

    /// The output planes of a block of `len` elements.
    pub fn block(&mut self, ins: &[Operand<'_>], block: usize, len: usize, out: &mut [Plane]) {
        let registers = &mut self.registers[..];
        registers[0] = [if self.one_share { u64::MAX } else { 0 }; 8];
        registers[1] = [u64::MAX; 8];
        let mut at = 2;
        for (input, operand) in self.circuit.inputs.iter().zip(ins) {
            let target = &mut registers[at..at + input.count()];
            match input {
                CircuitInput::Ring { offset, lo, .. } => {
                    let words = operand.ring(block, &mut self.words[..len]);
                    to_planes(words, *offset, u32::from(*lo), target);
                }
                CircuitInput::Bits { first, .. } => {
                    operand.planes(block, usize::from(*first), target)
                }
            }
            at += input.count();
        }
        self.circuit.gates.run(registers);
        for (out, register) in out.iter_mut().zip(&self.circuit.outs) {
            *out = registers[usize::from(*register)];
        }
    }
}

/// Elements `start .. start + take` of every plane.
pub(super) fn bit_slice(operand: Operand<'_>, start: usize, take: usize) -> Value<'static> {
    let total = operand.planes_total();
    let mut out = Vec::with_capacity(take.div_ceil(BLOCK) * total);
    for block in 0..take.div_ceil(BLOCK) {
        let from = start + block * BLOCK;
        let (first, shift) = (from / BLOCK, from % BLOCK);
        let last = operand.slot.n.div_ceil(BLOCK);
        for plane in 0..total {
            let mut pair = [[0; 8]; 2];
            operand.planes(first, plane, &mut pair[..1]);
            if first + 1 < last {
                operand.planes(first + 1, plane, &mut pair[1..]);
            }
            let words = pair.as_flattened();
            let word = |i: usize| {
                let (at, bit) = ((shift + 64 * i) / 64, shift % 64);
                let high = if bit == 0 {
                    0
                } else {
                    words.get(at + 1).copied().unwrap_or(0) << (64 - bit)
                };
                words[at] >> bit | high
            };
            out.push(std::array::from_fn(word));
        }
    }
    Value::Bits(out)
}

/// `[0](M - offset') - ..`: the public part of a truncation for one element.
struct Trunc {
    spec: TruncOut,
    ring: u64,
    lift: u32,
}

impl Trunc {
    fn new(spec: TruncOut) -> Trunc {
        Trunc {
            spec,
            ring: low_mask(spec.ring_bits),
            lift: u32::from(spec.ring_bits - spec.shift),
        }
    }

    /// `M - offset >> f`, and the mask that keeps `2^(k-f) rho` where `msb(m') = 0`.
    #[inline(always)]
    fn public(&self, m: u64) -> (u64, u64) {
        let spec = &self.spec;
        let m = m.wrapping_add(spec.add).wrapping_add(spec.offset) & self.ring;
        let high = (m >> spec.shift).wrapping_sub(spec.offset >> spec.shift);
        (high, (m >> (spec.ring_bits - 1)).wrapping_sub(1))
    }
}

/// Adds `v` if `flip` is 0, subtracts it if 1: `(1 - 2 flip) v`.
#[inline(always)]
fn signed(flip: u64, v: u64) -> u64 {
    (v ^ flip.wrapping_neg()).wrapping_add(flip)
}

/// Operand x: `x + c`.
pub(super) fn add_const(c: u64, ins: &[Operand<'_>], n: usize) -> Value<'static> {
    by_block(n, |[x], block, out| {
        let x = ins[0].ring(block, &mut x[..out.len()]);
        for (out, x) in out.iter_mut().zip(x) {
            *out = x.wrapping_add(c);
        }
    })
}

/// Operands open, mask: `open - mask`.
pub(super) fn unmask(ins: &[Operand<'_>], one: u64, n: usize) -> Value<'static> {
    by_block(n, |[open, mask], block, out| {
        let len = out.len();
        let open = ins[0].ring(block, &mut open[..len]);
        let mask = ins[1].ring(block, &mut mask[..len]);
        for ((out, open), mask) in out.iter_mut().zip(open).zip(mask) {
            *out = open.wrapping_mul(one).wrapping_sub(*mask);
        }
    })
}

/// Operands m, C, [R], [rho], [gamma].
pub(super) fn trunc_out(spec: TruncOut, ins: &[Operand<'_>], one: u64, n: usize) -> Value<'static> {
    let trunc = Trunc::new(spec);
    by_block(n, |[m, c, r, rho, gamma], block, out| {
        let len = out.len();
        let m = ins[0].ring(block, &mut m[..len]);
        ins[1].plane_words(block, 0, &mut c[..len]);
        let r = ins[2].ring(block, &mut r[..len]);
        let rho = ins[3].ring(block, &mut rho[..len]);
        let gamma = ins[4].ring(block, &mut gamma[..len]);
        for e in 0..len {
            let (high, keep) = trunc.public(m[e]);
            let public = high.wrapping_sub(c[e]).wrapping_mul(one);
            out[e] = public
                .wrapping_sub(r[e])
                .wrapping_add((rho[e] << trunc.lift) & keep)
                .wrapping_sub(signed(c[e], gamma[e]));
        }
    })
}

/// Operands m, C, B, [R], [rho], [gamma], [beta], [beta R], [beta rho], [beta gamma].
pub(super) fn bit_trunc_out(
    spec: TruncOut,
    c_plane: u16,
    b_plane: u16,
    plus_one: bool,
    ins: &[Operand<'_>],
    one: u64,
    n: usize,
) -> Value<'static> {
    let trunc = Trunc::new(spec);
    let plus = u64::from(plus_one);
    by_block(n, |[m, c, b, dealt @ ..]: &mut [Words; 10], block, out| {
        let len = out.len();
        let m = ins[0].ring(block, &mut m[..len]);
        ins[1].plane_words(block, c_plane, &mut c[..len]);
        ins[2].plane_words(block, b_plane, &mut b[..len]);
        let mut buffers = dealt.iter_mut();
        let [r, rho, gamma, beta, beta_r, beta_rho, beta_gamma] = std::array::from_fn(|i| {
            let buffer = buffers.next().expect("seven buffers for seven operands");
            ins[3 + i].ring(block, &mut buffer[..len])
        });
        for e in 0..len {
            let (high, keep) = trunc.public(m[e]);
            let public = high.wrapping_sub(c[e]).wrapping_add(plus);
            let t = public
                .wrapping_mul(one)
                .wrapping_sub(r[e])
                .wrapping_add((rho[e] << trunc.lift) & keep)
                .wrapping_sub(signed(c[e], gamma[e]));
            let bt = public
                .wrapping_mul(beta[e])
                .wrapping_sub(beta_r[e])
                .wrapping_add((beta_rho[e] << trunc.lift) & keep)
                .wrapping_sub(signed(c[e], beta_gamma[e]));
            out[e] = (t & b[e].wrapping_neg()).wrapping_add(signed(b[e], bt));
        }
    })
}

/// Operands m, [r], B, [beta], [beta r].
pub(super) fn bit_mul_out(b_plane: u16, ins: &[Operand<'_>], one: u64, n: usize) -> Value<'static> {
    by_block(n, |[m, r, b, beta, beta_r], block, out| {
        let len = out.len();
        let m = ins[0].ring(block, &mut m[..len]);
        let r = ins[1].ring(block, &mut r[..len]);
        ins[2].plane_words(block, b_plane, &mut b[..len]);
        let beta = ins[3].ring(block, &mut beta[..len]);
        let beta_r = ins[4].ring(block, &mut beta_r[..len]);
        for e in 0..len {
            let x = m[e].wrapping_mul(one).wrapping_sub(r[e]);
            let masked = m[e].wrapping_mul(beta[e]).wrapping_sub(beta_r[e]);
            out[e] = (x & b[e].wrapping_neg()).wrapping_add(signed(b[e], masked));
        }
    })
}

/// Operands B, [beta].
pub(super) fn bit_to_ring(b_plane: u16, ins: &[Operand<'_>], one: u64, n: usize) -> Value<'static> {
    by_block(n, |[b, beta], block, out| {
        let len = out.len();
        ins[0].plane_words(block, b_plane, &mut b[..len]);
        let beta = ins[1].ring(block, &mut beta[..len]);
        for e in 0..len {
            out[e] = (b[e] & one.wrapping_neg()).wrapping_add(signed(b[e], beta[e]));
        }
    })
}

/// Operands X, [a], [a^2], ..
pub(super) fn power(degree: u8, ins: &[Operand<'_>], one: u64, n: usize) -> Value<'static> {
    let degree = usize::from(degree);
    // binom(degree, j) (-1)^j
    let mut coefficients = vec![1u64];
    for j in 1..=degree {
        let previous = coefficients[j - 1] as i64;
        coefficients.push((-previous * (degree - j + 1) as i64 / j as i64) as u64);
    }
    by_block(n, |[x, mask], block, out| {
        let len = out.len();
        let x = ins[0].ring(block, &mut x[..len]);
        for (out, x) in out.iter_mut().zip(x) {
            *out = x.wrapping_pow(degree as u32).wrapping_mul(one);
        }
        for j in 1..=degree {
            let mask = ins[j].ring(block, &mut mask[..len]);
            for ((out, x), mask) in out.iter_mut().zip(x).zip(mask) {
                let public = x
                    .wrapping_pow((degree - j) as u32)
                    .wrapping_mul(coefficients[j]);
                *out = out.wrapping_add(public.wrapping_mul(*mask));
            }
        }
    })
}

/// Operands m, (C), one-hot planes: XOR-shared planes of all tables' values.
pub(super) fn lookup(
    spec: LookupSpec,
    tables: &[std::sync::Arc<Table>],
    ins: &[Operand<'_>],
    one_share: bool,
    n: usize,
) -> Value<'static> {
    let set = spec.one_hot_planes();
    let bits: usize = tables.iter().map(|t| usize::from(t.out_bits)).sum();
    let one_hot = ins[ins.len() - 1];
    let len = n.div_ceil(BLOCK) * bits;
    // Every element reads its whole one-hot for each table.
    let work = n * set * tables.len();
    Value::Bits(threads::made(
        len,
        bits,
        work,
        |first_block, out: &mut [Plane]| {
            let mut planes = vec![[0u64; 8]; one_hot.planes_total()];
            let (mut m, mut c) = ([0; BLOCK], [0; BLOCK]);
            for (block, out) in out.chunks_mut(bits).enumerate() {
                let block = first_block + block;
                let len = block_len(n, block);
                let m = ins[0].ring(block, &mut m[..len]);
                if ins.len() == 3 {
                    ins[1].plane_words(block, 0, &mut c[..len]);
                }
                one_hot.planes(block, 0, &mut planes);
                for e in 0..len {
                    let (word, bit) = (e / 64, e % 64);
                    // Public: which of the two one-hots is right, and where the table starts.
                    let hot = &planes[c[e] as usize * set..][..set];
                    let base = spec.index(m[e]).wrapping_sub(c[e]);
                    let entry = |t: &Table, j: usize| {
                        t.values[(base.wrapping_sub(j as u64) & set as u64) as usize]
                    };
                    let mut first = 0;
                    for table in tables {
                        // e_0 = 1 ^ (XOR of all others).
                        let zero = entry(table, 0);
                        let mut sum = if one_share { zero } else { 0 };
                        for (j, plane) in hot.iter().enumerate() {
                            let share = (plane[word] >> bit & 1).wrapping_neg();
                            sum ^= (entry(table, j + 1) ^ zero) & share;
                        }
                        for b in 0..usize::from(table.out_bits) {
                            out[first + b][word] |= (sum >> b & 1) << bit;
                        }
                        first += usize::from(table.out_bits);
                    }
                }
            }
        },
    ))
}

/// Operands opened planes, [beta words]: `sum of 2^b (O_b + (1 - 2 O_b) beta_b)`.
pub(super) fn from_bits(
    first: u16,
    count: u16,
    opened: Operand<'_>,
    beta: &[u64],
    one: u64,
    n: usize,
) -> Value<'static> {
    by_block(n, |[open], block, out| {
        let len = out.len();
        for b in 0..count {
            opened.plane_words(block, first + b, &mut open[..len]);
            let beta = &beta[usize::from(first + b) * n + block * BLOCK..][..len];
            for e in 0..len {
                let bit = (open[e] & one.wrapping_neg()).wrapping_add(signed(open[e], beta[e]));
                out[e] = out[e].wrapping_add(bit << b);
            }
        }
    })
}
