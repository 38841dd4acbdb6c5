//! The dealer's loop over a Plan: it knows every mask, computes what is dealt, and sends one
//! correction for each correlation. It receives nothing.

use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;

use super::frame::{self, CHUNK, low_mask};
use super::kernels::{self, Operand};
use super::plain::Coins;
use super::value::Value;
use super::{StepError, frame::receiver};
use crate::party::PartyId;
use crate::plan::{Class, Corr, Factor, Instr, Kernel, Plan, Rep, Slot, VId};
use crate::prg::{Domain, Pos, Prg};
use crate::program::Sink;
use crate::ring::kernel::{Acc, BLOCK, Plane, plane_to_words};
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
    values: Vec<Option<Value>>,
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
    let mut run = Step {
        plan,
        step,
        keys,
        values,
        read: read_by_dealer(plan),
    };
    for round in &plan.rounds {
        for (instr, free) in &round.work {
            run.execute(instr, state, sink)?;
            free.iter().for_each(|id| run.values[id.index()] = None);
        }
        round
            .free
            .iter()
            .for_each(|id| run.values[id.index()] = None);
    }
    for output in &plan.outputs {
        if let (Sink::CarryMasked, Some((_, mask))) = (&output.sink, output.masked)
            && let Some(Value::Ring(mask)) = &run.values[mask.index()]
        {
            state.masks.insert(output.name.clone(), mask.clone());
        }
    }
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

impl Step<'_> {
    fn execute(
        &mut self,
        instr: &Instr,
        state: &DealerState,
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
                self.values[mask.index()] = Some(Value::Ring(kept.clone()));
            }
            Instr::Derive { corr, ins, out } => {
                let value = self.compute(corr, ins, *out);
                self.values[out.index()] = Some(value);
            }
            Instr::Deal { corr, ins, out } => {
                let value = self.compute(corr, ins, *out);
                self.correct(*out, &value, sink)?;
                if self.read[out.index()] {
                    self.values[out.index()] = Some(value);
                }
            }
            Instr::Local {
                kernel: Kernel::Linear(map),
                ins,
                out,
            } if self.plan.slot(*out).class == Class::Dealt => {
                let ins: Vec<&[u64]> = ins.iter().map(|id| self.ring(*id)).collect();
                let data = map.apply(&ins);
                self.values[out.index()] = Some(Value::Ring(data));
            }
            _ => {}
        }
        Ok(())
    }

    fn value(&self, id: VId) -> &Value {
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
    fn random(&self, id: VId) -> Value {
        let Slot { rep, n, .. } = *self.plan.slot(id);
        let at = pos(self.step, id, rep);
        let [a, b, c] = &self.keys.parties;
        match rep {
            Rep::Ring { width } => {
                let mut out = vec![0; n];
                let mask = low_mask(width);
                for (block, out) in out.chunks_mut(BLOCK).enumerate() {
                    let first = (block * BLOCK) as u64;
                    a.fill(at, first, out);
                    b.add(at, first, out);
                    c.add(at, first, out);
                    out.iter_mut().for_each(|word| *word &= mask);
                }
                Value::Ring(out)
            }
            Rep::Bits { planes } => {
                let mut out: Vec<Plane> = vec![[0; 8]; n.div_ceil(BLOCK) * usize::from(planes)];
                for (part, out) in out.as_flattened_mut().chunks_mut(8 * BLOCK).enumerate() {
                    let first = (part * 8 * BLOCK) as u64;
                    a.fill(at, first, out);
                    b.xor(at, first, out);
                    c.xor(at, first, out);
                }
                Value::Bits(out)
            }
        }
    }

    /// Sends `value - two streams` to the receiver of each chunk.
    fn correct(
        &self,
        id: VId,
        value: &Value,
        sink: &mut dyn CorrectionSink,
    ) -> Result<(), StepError> {
        let Slot { rep, n, .. } = *self.plan.slot(id);
        let at = pos(self.step, id, rep);
        let mut segments = PartyId::ALL.map(|to| {
            let bytes = frame::correction_bytes(id.0, rep, n, to);
            let mut segment = Vec::with_capacity(if bytes > 0 {
                frame::SEGMENT_HEADER_BYTES + bytes
            } else {
                0
            });
            if bytes > 0 {
                frame::put_segment_header(&mut segment, self.step, id.0);
            }
            segment
        });
        for chunk in 0..n.div_ceil(CHUNK) {
            let to = receiver(id.0, chunk);
            let [p, q] = to.others().map(|other| &self.keys.parties[other.index()]);
            let segment = &mut segments[to.index()];
            let start = chunk * CHUNK;
            let len = CHUNK.min(n - start);
            match (rep, value) {
                (Rep::Ring { width }, Value::Ring(data)) => {
                    let mut words = [0; BLOCK];
                    for (block, data) in data[start..start + len].chunks(BLOCK).enumerate() {
                        let words = &mut words[..data.len()];
                        words.copy_from_slice(data);
                        let first = (start + block * BLOCK) as u64;
                        p.sub(at, first, words);
                        q.sub(at, first, words);
                        frame::pack_ring(segment, words, width);
                    }
                }
                (Rep::Bits { planes }, Value::Bits(data)) => {
                    let total = usize::from(planes);
                    let mut block_planes: Vec<Plane> = vec![[0; 8]; total];
                    for block in start / BLOCK..(start + len).div_ceil(BLOCK) {
                        block_planes.copy_from_slice(&data[block * total..(block + 1) * total]);
                        let first = (block * total * 8) as u64;
                        p.xor(at, first, block_planes.as_flattened_mut());
                        q.xor(at, first, block_planes.as_flattened_mut());
                        frame::pack_planes(
                            segment,
                            &block_planes,
                            super::value::block_len(n, block),
                        );
                    }
                }
                _ => unreachable!("a correlation has the representation of its slot"),
            }
        }
        for (to, segment) in PartyId::ALL.into_iter().zip(segments) {
            if !segment.is_empty() {
                sink.post(to, Bytes::from(segment))?;
            }
        }
        Ok(())
    }

    fn compute(&self, corr: &Corr, ins: &[VId], out: VId) -> Value {
        let n = self.plan.slot(out).n;
        let ring_mask = low_mask(self.plan.ring_bits);
        match corr {
            Corr::Circuit(circuit) | Corr::Digits(circuit) => {
                let operands: Vec<Operand<'_>> = ins.iter().map(|id| self.operand(*id)).collect();
                kernels::circuit(circuit, &operands, true, n)
            }
            Corr::Product(product) => {
                let mut data = vec![0; n];
                product.apply(Acc::Set, self.ring(ins[0]), self.ring(ins[1]), &mut data);
                Value::Ring(data)
            }
            Corr::Power(j) => Value::Ring(
                self.ring(ins[0])
                    .iter()
                    .map(|a| a.wrapping_pow(u32::from(*j)))
                    .collect(),
            ),
            Corr::Linear(map) => {
                let ins: Vec<&[u64]> = ins.iter().map(|id| self.ring(*id)).collect();
                let mut data = map.apply(&ins);
                data.iter_mut().for_each(|word| *word &= ring_mask);
                Value::Ring(data)
            }
            Corr::SubtractCoins { shift, coins } => {
                let coins = Coins {
                    key: self.keys.coins.as_ref(),
                    step: self.step,
                    val: *coins,
                };
                let drawn = coins.draw(n, *shift);
                let masked = self
                    .ring(ins[0])
                    .iter()
                    .zip(drawn)
                    .map(|(v, u)| v.wrapping_sub(u) & ring_mask);
                Value::Ring(masked.collect())
            }
            Corr::Term { factor, bits } => self.term(*factor, bits, ins, n),
            Corr::OneHot(spec) => {
                let planes = spec.one_hot_planes();
                let total = planes * ins.len();
                let mut out: Vec<Plane> = vec![[0; 8]; n.div_ceil(BLOCK) * total];
                let mut gamma = [0; BLOCK];
                for (block, r) in self.ring(ins[0]).chunks(BLOCK).enumerate() {
                    if let Some(mask) = ins.get(1) {
                        self.plane(*mask, 0, block, &mut gamma[..r.len()]);
                    }
                    for (e, r) in r.iter().enumerate() {
                        let index = spec.index(*r);
                        let sets = [index.wrapping_add(gamma[e]), index.wrapping_sub(gamma[e])];
                        for (set, hot) in sets.iter().take(ins.len()).enumerate() {
                            let hot = (hot & planes as u64) as usize;
                            if hot > 0 {
                                out[block * total + set * planes + hot - 1][e / 64] |=
                                    1 << (e % 64);
                            }
                        }
                    }
                }
                Value::Bits(out)
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
                Value::Ring(data)
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

    fn term(&self, factor: Factor, bits: &[u16], ins: &[VId], n: usize) -> Value {
        let k = self.plan.ring_bits;
        let (ring, bit_ins) = match factor {
            Factor::One => (None, ins),
            _ => (Some(self.ring(ins[0])), &ins[1..]),
        };
        let mut data = vec![1; n];
        let mut words = [0; BLOCK];
        for (block, data) in data.chunks_mut(BLOCK).enumerate() {
            let start = block * BLOCK;
            if let Some(ring) = ring {
                let ring = &ring[start..start + data.len()];
                let shift = match factor {
                    Factor::One | Factor::Raw => 0,
                    Factor::Shr(shift) => shift,
                    Factor::Msb => k - 1,
                };
                data.iter_mut().zip(ring).for_each(|(d, r)| *d = r >> shift);
            }
            for (id, plane) in bit_ins.iter().zip(bits) {
                self.plane(*id, *plane, block, &mut words[..data.len()]);
                data.iter_mut()
                    .zip(&words)
                    .for_each(|(d, b)| *d &= b.wrapping_neg());
            }
        }
        Value::Ring(data)
    }
}
