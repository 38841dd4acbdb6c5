//! The dealer's loop over a Plan: it knows every mask, computes what is dealt, and sends one
//! correction for each correlation. It receives nothing.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;

use super::frame::{self, CHUNK, low_mask};
use super::kernels::{self, CircuitRun, Operand};
use super::plain::Coins;
use super::value::{Value, block_len};
use super::{StepError, frame::receiver};
use crate::op::lookup::LookupSpec;
use crate::party::PartyId;
use crate::plan::{Class, Corr, Factor, Instr, Kernel, Plan, Rep, Slot, VId};
use crate::prg::{Domain, Pos, Prg};
use crate::program::Sink;
use crate::ring::kernel::{Acc, BLOCK, Plane, plane_to_words};
use crate::threads;
use crate::transport::CorrectionSink;

/// The keys that the three parties sent the dealer for one session, and the job's rounding key.
pub struct DealerKeys {
    /// By party index.
    pub parties: [Prg; 3],
    /// Coins of stochastic rounding.
    pub coins: Option<Prg>,
}

impl fmt::Debug for DealerKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DealerKeys(..)")
    }
}

/// Masks that the dealer keeps between the steps of a session.
#[derive(Default)]
pub struct DealerState {
    masks: BTreeMap<String, Vec<u64>>,
}

impl fmt::Debug for DealerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.masks.keys()).finish()
    }
}

struct Step<'a> {
    plan: &'a Plan,
    step: u64,
    keys: &'a DealerKeys,
    values: Vec<Option<Value<'a>>>,
    read: Vec<bool>,
}

/// Deals one step.
///
/// # Errors
/// The network's errors, and masks of carried openings that are missing.
pub fn deal_step(
    plan: &Plan,
    step: u64,
    keys: &DealerKeys,
    state: &mut DealerState,
    sink: &mut dyn CorrectionSink,
) -> Result<(), StepError> {
    let values = plan.slots.iter().map(|_| None).collect();
    let before = &*state;
    let mut run = Step {
        plan,
        step,
        keys,
        values,
        read: read_by_dealer(plan),
    };
    for round in &plan.rounds {
        for (instr, free) in &round.work {
            run.execute(instr, before, sink)?;
            free.iter().for_each(|id| run.values[id.index()] = None);
        }
        round
            .free
            .iter()
            .for_each(|id| run.values[id.index()] = None);
    }
    let mut kept = BTreeMap::new();
    for output in &plan.outputs {
        if let (Sink::CarryMasked, Some((_, mask))) = (&output.sink, output.masked)
            && let Some(Value::Ring(mask)) = &run.values[mask.index()]
        {
            kept.insert(output.name.clone(), mask.to_vec());
        }
    }
    state.masks.extend(kept);
    Ok(())
}

/// Which values the dealer must have in the clear.
fn read_by_dealer(plan: &Plan) -> Vec<bool> {
    let mut read = vec![false; plan.slots.len()];
    for (instr, _) in plan.rounds.iter().flat_map(|round| &round.work) {
        let dealt = matches!(instr, Instr::Deal { .. } | Instr::Derive { .. })
            || matches!(instr, Instr::Local { out, .. } if plan.dealer_has(*out));
        if dealt {
            instr.ins().iter().for_each(|id| read[id.index()] = true);
        }
    }
    for output in &plan.outputs {
        if let Some((_, mask)) = output.masked {
            read[mask.index()] = true;
        }
    }
    read
}

fn pos(step: u64, id: VId, rep: Rep) -> Pos {
    let domain = match rep {
        Rep::Ring { .. } => Domain::Ring,
        Rep::Bits { .. } => Domain::Bits,
    };
    Pos {
        step,
        id: id.0,
        domain,
    }
}

impl<'a> Step<'a> {
    fn execute(
        &mut self,
        instr: &'a Instr,
        state: &'a DealerState,
        sink: &mut dyn CorrectionSink,
    ) -> Result<(), StepError> {
        match instr {
            Instr::Rand { out } if self.read[out.index()] => {
                let value = self.random(*out);
                self.values[out.index()] = Some(value);
            }
            Instr::CarriedMasked { name, mask, .. } => {
                let kept = state
                    .masks
                    .get(name)
                    .filter(|kept| kept.len() == self.plan.slot(*mask).n);
                let Some(kept) = kept else {
                    return Err(StepError::State {
                        what: "carried opening",
                        name: name.clone(),
                        problem: "has no mask in this session".into(),
                    });
                };
                self.values[mask.index()] = Some(Value::Ring(Cow::Borrowed(kept)));
            }
            Instr::Derive { corr, ins, out } => {
                let value = self.compute(corr, ins, *out);
                self.values[out.index()] = Some(value);
            }
            Instr::Deal { corr, ins, out } => {
                self.values[out.index()] = self.deal(corr, ins, *out, sink)?;
            }
            Instr::Local {
                kernel: Kernel::Linear(map),
                ins,
                out,
            } if self.plan.slot(*out).class == Class::Dealt => {
                let ins: Vec<&[u64]> = ins.iter().map(|id| self.ring(*id)).collect();
                let data = map.apply(&ins);
                self.values[out.index()] = Some(Value::from(data));
            }
            _ => {}
        }
        Ok(())
    }

    fn value(&self, id: VId) -> &Value<'a> {
        self.values[id.index()]
            .as_ref()
            .expect("the schedule makes values before they are read")
    }

    fn ring(&self, id: VId) -> &[u64] {
        match self.value(id) {
            Value::Ring(data) => data,
            _ => unreachable!("correlations read rings as rings"),
        }
    }

    fn operand(&self, id: VId) -> Operand<'_> {
        Operand {
            value: self.value(id),
            slot: self.plan.slot(id),
            prg: &self.keys.parties[0],
        }
    }

    /// The sum (XOR) of the three parties' streams.
    fn random(&self, id: VId) -> Value<'a> {
        let Slot { rep, n, .. } = *self.plan.slot(id);
        let at = pos(self.step, id, rep);
        let [a, b, c] = &self.keys.parties;
        match rep {
            Rep::Ring { width } => {
                let mask = low_mask(width);
                Value::from(threads::made(n, BLOCK, 2 * n, |start, out| {
                    for (block, out) in out.chunks_mut(BLOCK).enumerate() {
                        let first = ((start + block) * BLOCK) as u64;
                        a.fill(at, first, out);
                        b.add(at, first, out);
                        c.add(at, first, out);
                        if width < 64 {
                            out.iter_mut().for_each(|word| *word &= mask);
                        }
                    }
                }))
            }
            Rep::Bits { planes } => {
                let len = n.div_ceil(BLOCK) * usize::from(planes);
                Value::Bits(threads::made(
                    len,
                    BLOCK,
                    16 * len,
                    |start, out: &mut [Plane]| {
                        for (part, out) in out.chunks_mut(BLOCK).enumerate() {
                            let first = ((start + part) * 8 * BLOCK) as u64;
                            let out = out.as_flattened_mut();
                            a.fill(at, first, out);
                            b.xor(at, first, out);
                            c.xor(at, first, out);
                        }
                    },
                ))
            }
        }
    }

    /// Computes a correlation and sends `value - two streams` to the receiver of each chunk. Gives
    /// the value back if something else at the dealer reads it.
    fn deal(
        &self,
        corr: &Corr,
        ins: &[VId],
        id: VId,
        sink: &mut dyn CorrectionSink,
    ) -> Result<Option<Value<'a>>, StepError> {
        let Slot { rep, n, .. } = *self.plan.slot(id);
        // Without another reader a value that is made block by block is never stored.
        let by_blocks = self.blocks(corr, ins).filter(|_| !self.read[id.index()]);
        let whole = match by_blocks {
            Some(_) => None,
            None => Some(self.compute(corr, ins, id)),
        };
        let blocks = match (&whole, by_blocks) {
            (Some(Value::Ring(data)), _) => Blocks::Ring(data),
            (Some(Value::Bits(data)), _) => Blocks::Bits(data),
            (_, Some(blocks)) => blocks,
            _ => unreachable!("the dealer has values in the clear"),
        };
        let mut segments = PartyId::ALL.map(|to| {
            let bytes = frame::correction_bytes(id.0, rep, n, to);
            if bytes == 0 {
                return Vec::new();
            }
            let mut segment = vec![0; frame::SEGMENT_HEADER_BYTES + bytes];
            let header = frame::segment_header(self.step, id.0);
            segment[..frame::SEGMENT_HEADER_BYTES].copy_from_slice(&header);
            segment
        });
        // The places of the chunks, in order.
        let mut places: Vec<&mut [u8]> = Vec::with_capacity(n.div_ceil(CHUNK));
        let mut rest = segments.each_mut().map(|segment| {
            segment
                .get_mut(frame::SEGMENT_HEADER_BYTES..)
                .unwrap_or_default()
        });
        for chunk in 0..n.div_ceil(CHUNK) {
            let to = receiver(id.0, chunk).index();
            let bytes = rep.wire_bytes(CHUNK.min(n - chunk * CHUNK)) as usize;
            let (place, after) = std::mem::take(&mut rest[to]).split_at_mut(bytes);
            places.push(place);
            rest[to] = after;
        }
        let work = rep.memory_bytes(n) as usize / 2;
        threads::split(&mut places, 1, work, |first, places| {
            let mut blocks = blocks.clone();
            for (chunk, place) in places.iter_mut().enumerate() {
                self.correct(id, first + chunk, &mut blocks, std::mem::take(place));
            }
        });
        for (to, segment) in PartyId::ALL.into_iter().zip(segments) {
            if !segment.is_empty() {
                sink.post(to, Bytes::from(segment))?;
            }
        }
        Ok(whole.filter(|_| self.read[id.index()]))
    }

    /// Writes `value - two streams` for a chunk of a correlation.
    fn correct(&self, id: VId, chunk: usize, source: &mut Blocks<'_>, mut out: &mut [u8]) {
        let Slot { rep, n, .. } = *self.plan.slot(id);
        let at = pos(self.step, id, rep);
        let others = receiver(id.0, chunk).others();
        let [p, q] = others.map(|other| &self.keys.parties[other.index()]);
        let blocks = chunk * (CHUNK / BLOCK)..((chunk + 1) * CHUNK).min(n).div_ceil(BLOCK);
        match rep {
            Rep::Ring { width } => {
                let mut words = [0; BLOCK];
                for block in blocks {
                    let words = &mut words[..block_len(n, block)];
                    source.ring(self, block, words);
                    let first = (block * BLOCK) as u64;
                    p.sub(at, first, words);
                    q.sub(at, first, words);
                    out = frame::pack_ring(out, words.iter().copied(), width);
                }
            }
            Rep::Bits { planes } => {
                let total = usize::from(planes);
                let mut words: Vec<Plane> = vec![[0; 8]; total];
                for block in blocks {
                    source.bits(self, block, block_len(n, block), &mut words);
                    let first = (block * total * 8) as u64;
                    p.xor(at, first, words.as_flattened_mut());
                    q.xor(at, first, words.as_flattened_mut());
                    out = frame::pack_planes(out, &words, block_len(n, block));
                }
            }
        }
    }

    /// How to make a correlation block by block, if that is possible.
    fn blocks<'b>(&'b self, corr: &'b Corr, ins: &'b [VId]) -> Option<Blocks<'b>> {
        let operands = || ins.iter().map(|id| self.operand(*id)).collect();
        match corr {
            Corr::Circuit(circuit) | Corr::Digits(circuit) => Some(Blocks::Circuit(
                Box::new(CircuitRun::new(circuit, true)),
                operands(),
            )),
            Corr::Power(j) => Some(Blocks::Power(u32::from(*j), ins[0])),
            Corr::Term { factor, bits } => Some(Blocks::Term(*factor, bits, ins)),
            Corr::OneHot(spec) => Some(Blocks::OneHot(*spec, ins)),
            Corr::Product(_) | Corr::Linear(_) | Corr::SubtractCoins { .. } | Corr::BitWords => {
                None
            }
        }
    }

    /// The whole value of a correlation.
    fn compute(&self, corr: &Corr, ins: &[VId], out: VId) -> Value<'a> {
        let Slot { rep, n, .. } = *self.plan.slot(out);
        let ring_mask = low_mask(self.plan.ring_bits);
        match corr {
            Corr::Circuit(circuit) | Corr::Digits(circuit) => {
                let operands: Vec<Operand<'_>> = ins.iter().map(|id| self.operand(*id)).collect();
                kernels::circuit(circuit, &operands, true, n)
            }
            Corr::Product(product) => {
                let mut data = vec![0; n];
                product.apply(Acc::Set, self.ring(ins[0]), self.ring(ins[1]), &mut data);
                Value::from(data)
            }
            Corr::Linear(map) => {
                let ins: Vec<&[u64]> = ins.iter().map(|id| self.ring(*id)).collect();
                let mut data = map.apply(&ins);
                if self.plan.ring_bits < 64 {
                    data.iter_mut().for_each(|word| *word &= ring_mask);
                }
                Value::from(data)
            }
            Corr::SubtractCoins { shift, coins } => {
                let coins = Coins {
                    key: self.keys.coins.as_ref(),
                    step: self.step,
                    val: *coins,
                };
                let mut data = coins.draw(n, *shift);
                for (word, v) in data.iter_mut().zip(self.ring(ins[0])) {
                    *word = v.wrapping_sub(*word) & ring_mask;
                }
                Value::from(data)
            }
            Corr::BitWords => {
                let slot = self.plan.slot(ins[0]);
                let Rep::Bits { planes } = slot.rep else {
                    unreachable!("bit words are made of bits")
                };
                let mut data = vec![0; n];
                for (plane, data) in data
                    .chunks_mut(slot.n)
                    .enumerate()
                    .take(usize::from(planes))
                {
                    for (block, words) in data.chunks_mut(BLOCK).enumerate() {
                        self.plane(ins[0], plane as u16, block, words);
                    }
                }
                Value::from(data)
            }
            Corr::Power(_) | Corr::Term { .. } | Corr::OneHot(_) => {
                let blocks = self
                    .blocks(corr, ins)
                    .expect("these are made block by block");
                match rep {
                    Rep::Ring { .. } => {
                        Value::from(threads::made(n, BLOCK, 2 * n, |first, data| {
                            let mut blocks = blocks.clone();
                            for (block, out) in data.chunks_mut(BLOCK).enumerate() {
                                blocks.ring(self, first + block, out);
                            }
                        }))
                    }
                    Rep::Bits { planes } => {
                        let total = usize::from(planes);
                        let len = n.div_ceil(BLOCK) * total;
                        Value::Bits(threads::made(len, total, 2 * n, |first, data| {
                            let mut blocks = blocks.clone();
                            for (block, out) in data.chunks_mut(total).enumerate() {
                                let block = first + block;
                                blocks.bits(self, block, block_len(n, block), out);
                            }
                        }))
                    }
                }
            }
        }
    }

    fn plane(&self, id: VId, plane: u16, block: usize, out: &mut [u64]) {
        let Rep::Bits { planes } = self.plan.slot(id).rep else {
            unreachable!("planes belong to bits")
        };
        match self.value(id) {
            Value::Bits(data) => {
                plane_to_words(&data[block * usize::from(planes) + usize::from(plane)], out)
            }
            _ => unreachable!("planes belong to bits"),
        }
    }

    /// A block of a product of a ring factor and single bits.
    fn term(&self, factor: Factor, bits: &[u16], ins: &[VId], block: usize, out: &mut [u64]) {
        let ring = |shift: u8, out: &mut [u64]| {
            let ring = &self.ring(ins[0])[block * BLOCK..];
            out.iter_mut()
                .zip(ring)
                .for_each(|(out, r)| *out = r >> shift);
        };
        match factor {
            Factor::One => out.fill(1),
            Factor::Raw => ring(0, out),
            Factor::Shr(shift) => ring(shift, out),
            Factor::Msb => ring(self.plan.ring_bits - 1, out),
        }
        let bit_ins = &ins[usize::from(factor != Factor::One)..];
        let mut words = [0; BLOCK];
        for (id, plane) in bit_ins.iter().zip(bits) {
            self.plane(*id, *plane, block, &mut words[..out.len()]);
            out.iter_mut()
                .zip(&words)
                .for_each(|(d, b)| *d &= b.wrapping_neg());
        }
    }

    /// A block of one-hot planes of `(index +- bit) mod 2^width`.
    fn one_hot(&self, spec: LookupSpec, ins: &[VId], block: usize, len: usize, out: &mut [Plane]) {
        let planes = spec.one_hot_planes();
        out.fill([0; 8]);
        let mut gamma = [0; BLOCK];
        if let Some(mask) = ins.get(1) {
            self.plane(*mask, 0, block, &mut gamma[..len]);
        }
        let ring = &self.ring(ins[0])[block * BLOCK..][..len];
        for (e, r) in ring.iter().enumerate() {
            let index = spec.index(*r);
            let sets = [index.wrapping_add(gamma[e]), index.wrapping_sub(gamma[e])];
            for (set, hot) in sets.iter().take(ins.len()).enumerate() {
                let hot = (hot & planes as u64) as usize;
                if hot > 0 {
                    out[set * planes + hot - 1][e / 64] |= 1 << (e % 64);
                }
            }
        }
    }
}

/// A correlation block by block: made so, or read from the whole.
#[derive(Clone)]
enum Blocks<'b> {
    Ring(&'b [u64]),
    Bits(&'b [Plane]),
    Circuit(Box<CircuitRun<'b>>, Vec<Operand<'b>>),
    Power(u32, VId),
    Term(Factor, &'b [u16], &'b [VId]),
    OneHot(LookupSpec, &'b [VId]),
}

impl Blocks<'_> {
    fn ring(&mut self, step: &Step<'_>, block: usize, out: &mut [u64]) {
        match self {
            Blocks::Power(degree, id) => {
                let ring = &step.ring(*id)[block * BLOCK..];
                out.iter_mut()
                    .zip(ring)
                    .for_each(|(out, a)| *out = a.wrapping_pow(*degree));
            }
            Blocks::Term(factor, bits, ins) => step.term(*factor, bits, ins, block, out),
            Blocks::Ring(data) => out.copy_from_slice(&data[block * BLOCK..][..out.len()]),
            Blocks::Bits(_) | Blocks::Circuit(..) | Blocks::OneHot(..) => {
                unreachable!("these are bits")
            }
        }
    }

    fn bits(&mut self, step: &Step<'_>, block: usize, len: usize, out: &mut [Plane]) {
        match self {
            Blocks::Circuit(run, operands) => run.block(operands, block, len, out),
            Blocks::OneHot(spec, ins) => step.one_hot(*spec, ins, block, len, out),
            Blocks::Bits(data) => out.copy_from_slice(&data[block * out.len()..][..out.len()]),
            Blocks::Ring(_) | Blocks::Power(..) | Blocks::Term(..) => {
                unreachable!("these are rings")
            }
        }
    }
}
