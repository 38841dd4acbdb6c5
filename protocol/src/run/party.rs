//! The party's loop over a Plan: local kernels, reveals, and the rounds of `open.rs` between them.

use std::borrow::Cow;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;

use bytes::Bytes;

use super::kernels::{self, Operand};
use super::opened::Opened;
use super::value::{Stream, Value};
use super::{StepError, frame};
use crate::op::dropout;
use crate::op::product::Product;
use crate::party::PartyId;
use crate::plan::{Class, Instr, Kernel, Plan, PlanOutput, Rep, VId};
use crate::prg::Prg;
use crate::program::Sink;
use crate::ring::Tensor;
use crate::ring::kernel::{Acc, BLOCK, Plane};
use crate::transport::{Corrections, Transport};

/// A party's keys of one session. They exist in memory only and die with the session.
pub struct PartyKeys {
    /// Shared with the dealer: all dealt randomness of this party.
    pub dealer: Prg,
    /// Shared with each of the two other parties (by index; the own entry is unused): sharings of
    /// zero for reveals.
    pub pairwise: [Option<Prg>; 3],
}

impl fmt::Debug for PartyKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PartyKeys(..)")
    }
}

/// What a party keeps between the steps of a session.
#[derive(Debug, Default)]
pub struct State {
    /// Additive shares by name; these alone may be written to a checkpoint.
    pub shares: BTreeMap<String, Tensor>,
    /// Openings and mask shares by name; for this session only.
    pub masked: BTreeMap<String, MaskedState>,
    /// Hash of everything opened in the session so far.
    pub opened: [u8; 32],
    /// Largest sum of tensors held at one time so far, in bytes: this state, inputs, values, frames.
    /// Counted where they are made; `plan/memory.rs` says it before.
    pub peak_bytes: u64,
}

impl State {
    /// Bytes of all shares, openings and mask shares.
    pub fn bytes(&self) -> u64 {
        let shares = self.shares.values().map(Tensor::len);
        let masked = self.masked.values();
        let masked = masked.map(|kept| kept.open.len() + kept.mask.len());
        8 * shares.chain(masked).sum::<usize>() as u64
    }
}

/// An opening kept within a session.
pub struct MaskedState {
    open: Vec<u64>,
    mask: Vec<u64>,
}

impl fmt::Debug for MaskedState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MaskedState[{}]", self.open.len())
    }
}

/// This party's share of a revealed result, refreshed by a sharing of zero. For the named
/// receiver only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputShare {
    /// The output's name.
    pub name: String,
    /// The share: additive, or XOR if `xor`.
    pub share: Tensor,
    /// How the three shares combine.
    pub xor: bool,
    /// Hash of all values opened in the session so far; equal at all parties unless the run diverged.
    pub opened: [u8; 16],
}

/// Combines the three shares of an output: the receiver's side.
pub fn reconstruct(shares: &[OutputShare; 3], ring_bits: u8) -> Result<Tensor, String> {
    let [a, b, c] = shares;
    if [b, c]
        .iter()
        .any(|o| o.name != a.name || o.share.shape() != a.share.shape() || o.xor != a.xor)
    {
        return Err(format!(
            "the parties' shares of {:?} do not belong together",
            a.name
        ));
    }
    if [b, c].iter().any(|o| o.opened != a.opened) {
        return Err(format!(
            "the parties opened different values before {:?}: the run diverged",
            a.name
        ));
    }
    let words = a
        .share
        .data()
        .iter()
        .zip(b.share.data())
        .zip(c.share.data());
    let data = words.map(|((a, b), c)| match shares[0].xor {
        true => a ^ b ^ c,
        false => sign_extend(a.wrapping_add(*b).wrapping_add(*c), ring_bits),
    });
    Ok(Tensor::new(a.share.shape().to_vec(), data.collect()))
}

/// The signed integer that a `ring_bits`-bit element stands for, as a 64-bit word.
pub fn sign_extend(word: u64, ring_bits: u8) -> u64 {
    let spare = 64 - u32::from(ring_bits);
    (((word << spare) as i64) >> spare) as u64
}

pub(super) struct Step<'a> {
    pub(super) plan: &'a Plan,
    pub(super) me: PartyId,
    pub(super) step: u64,
    keys: &'a PartyKeys,
    values: Vec<Option<Value<'a>>>,
    pub(super) opened: Opened,
    /// Bytes of tensors held now.
    held: u64,
    peak: Cell<u64>,
}

/// Executes one step. `inputs` are this party's shares of the program's inputs. On success the
/// carried state is replaced; the revealed outputs are returned for their receivers.
///
/// # Errors
/// The network's errors, and missing or misshapen state. The session must then end: its randomness
/// is never used again.
#[allow(clippy::too_many_arguments)]
pub fn run_step(
    plan: &Plan,
    me: PartyId,
    step: u64,
    keys: &PartyKeys,
    state: &mut State,
    inputs: &BTreeMap<String, Tensor>,
    net: &mut dyn Transport,
    deal: &mut dyn Corrections,
) -> Result<Vec<OutputShare>, StepError> {
    let values = plan.slots.iter().map(|_| None).collect();
    let before = &*state;
    let mut run = Step {
        plan,
        me,
        step,
        keys,
        values,
        opened: Opened::after(&before.opened),
        held: before.bytes() + 8 * inputs.values().map(Tensor::len).sum::<usize>() as u64,
        peak: Cell::new(before.peak_bytes),
    };
    for (index, round) in plan.rounds.iter().enumerate() {
        for (instr, free) in &round.work {
            run.execute(instr, before, inputs, deal)?;
            run.free(free);
        }
        if !round.opens.is_empty() {
            run.open(round, index, net)?;
        }
        run.free(&round.free);
    }
    let outputs = run.reveals();
    let kept = run.keep();
    let revealed: usize = outputs.iter().map(|output| output.share.len()).sum();
    let left = kept.bytes() + 8 * revealed as u64;
    run.see(left);
    state.peak_bytes = run.peak.get();
    state.opened = kept.opened;
    state.shares.extend(kept.shares);
    state.masked.extend(kept.masked);
    Ok(outputs)
}

impl<'a> Step<'a> {
    fn one(&self) -> u64 {
        u64::from(self.me == PartyId::P0)
    }

    fn value(&self, id: VId) -> &Value<'a> {
        self.values[id.index()]
            .as_ref()
            .expect("the schedule makes values before they are read")
    }

    pub(super) fn operand(&self, id: VId) -> Operand<'_> {
        Operand {
            value: self.value(id),
            slot: self.plan.slot(id),
            prg: &self.keys.dealer,
        }
    }

    pub(super) fn set(&mut self, id: VId, value: Value<'a>) {
        self.held += value.held_bytes();
        self.see(0);
        self.values[id.index()] = Some(value);
    }

    fn take(&mut self, id: VId) -> Option<Value<'a>> {
        let value = self.values[id.index()].take();
        self.held -= value.as_ref().map_or(0, Value::held_bytes);
        value
    }

    fn free(&mut self, ids: &[VId]) {
        ids.iter().for_each(|id| drop(self.take(*id)));
    }

    /// Notes that `more` bytes are held for a while beside the values.
    pub(super) fn see(&self, more: u64) {
        self.peak.set(self.peak.get().max(self.held + more));
    }

    fn stream(&self, id: VId, correction: Option<Bytes>) -> Value<'a> {
        let slot = self.plan.slot(id);
        Value::Stream(Stream {
            id: id.0,
            step: self.step,
            rep: slot.rep,
            correction,
            me: self.me,
        })
    }

    fn execute(
        &mut self,
        instr: &'a Instr,
        state: &'a State,
        inputs: &'a BTreeMap<String, Tensor>,
        deal: &mut dyn Corrections,
    ) -> Result<(), StepError> {
        match instr {
            Instr::Input { name, out } => {
                let value = self.source("input", name, *out, inputs.get(name).map(Tensor::data))?;
                self.set(*out, value);
            }
            Instr::Carried { name, out } => {
                let value = self.source(
                    "carried state",
                    name,
                    *out,
                    state.shares.get(name).map(Tensor::data),
                )?;
                self.set(*out, value);
            }
            Instr::CarriedMasked { name, open, mask } => {
                let kept = state.masked.get(name);
                let value = self.source(
                    "carried opening",
                    name,
                    *open,
                    kept.map(|kept| &kept.open[..]),
                )?;
                self.set(*open, value);
                let value = self.source(
                    "carried opening",
                    name,
                    *mask,
                    kept.map(|kept| &kept.mask[..]),
                )?;
                self.set(*mask, value);
            }
            Instr::Const { tensor, out } => {
                let data = match self.me {
                    PartyId::P0 => Cow::Borrowed(tensor.data()),
                    _ => Cow::Owned(vec![0; tensor.len()]),
                };
                self.set(*out, Value::Ring(data));
            }
            Instr::Rand { out } => {
                let value = self.stream(*out, None);
                self.set(*out, value);
            }
            Instr::Deal { out, .. } => {
                let slot = self.plan.slot(*out);
                let bytes = frame::correction_bytes(out.0, slot.rep, slot.n, self.me);
                let correction = match bytes {
                    0 => Bytes::new(),
                    _ => frame::segment_payload(deal.next()?, self.step, out.0, bytes)?,
                };
                let value = self.stream(*out, Some(correction));
                self.set(*out, value);
            }
            Instr::Derive { .. } => {}
            Instr::Local { kernel, ins, out } => {
                let value = self.local(kernel, ins, *out);
                self.set(*out, value);
            }
            Instr::Open { .. } => unreachable!("openings stand in their round's list"),
        }
        Ok(())
    }

    fn source(
        &self,
        what: &'static str,
        name: &str,
        out: VId,
        data: Option<&'a [u64]>,
    ) -> Result<Value<'a>, StepError> {
        let expected = self.plan.slot(out).n;
        match data {
            Some(data) if data.len() == expected => Ok(Value::Ring(Cow::Borrowed(data))),
            Some(data) => Err(StepError::State {
                what,
                name: name.into(),
                problem: format!("has {} elements, expected {expected}", data.len()),
            }),
            None => Err(StepError::State {
                what,
                name: name.into(),
                problem: "is missing".into(),
            }),
        }
    }

    fn local(&self, kernel: &Kernel, ins: &[VId], out: VId) -> Value<'static> {
        let slot = self.plan.slot(out);
        let n = slot.n;
        let operands: Vec<Operand<'_>> = ins.iter().map(|id| self.operand(*id)).collect();
        // A circuit on public planes is evaluated in the clear by all three.
        let one_share = self.me == PartyId::P0 || slot.class == Class::Public;
        match kernel {
            Kernel::Circuit(circuit) => kernels::circuit(circuit, &operands, one_share, n),
            Kernel::BitSlice { start, take } => kernels::bit_slice(operands[0], *start, *take),
            Kernel::TruncOut(spec) => kernels::trunc_out(*spec, &operands, self.one(), n),
            Kernel::BitTruncOut {
                trunc,
                c_plane,
                b_plane,
                plus_one,
            } => kernels::bit_trunc_out(
                *trunc,
                *c_plane,
                *b_plane,
                *plus_one,
                &operands,
                self.one(),
                n,
            ),
            Kernel::BitMulOut { b_plane } => {
                kernels::bit_mul_out(*b_plane, &operands, self.one(), n)
            }
            Kernel::BitToRing { b_plane } => {
                kernels::bit_to_ring(*b_plane, &operands, self.one(), n)
            }
            Kernel::Power(degree) => kernels::power(*degree, &operands, self.one(), n),
            Kernel::Lookup { spec, tables } => {
                kernels::lookup(*spec, tables, &operands, one_share, n)
            }
            Kernel::FromBits { first, count } => {
                let beta = operands[1].whole();
                let value = kernels::from_bits(*first, *count, operands[0], &beta, self.one(), n);
                self.see(owned_bytes(&[beta]) + value.held_bytes());
                value
            }
            Kernel::AddConst(c) => kernels::add_const(c.wrapping_mul(self.one()), &operands, n),
            Kernel::Dropout(spec) => {
                let x = operands[0].whole();
                Value::from(dropout::masked(spec, self.step, &x))
            }
            Kernel::Unmask => kernels::unmask(&operands, self.one(), n),
            Kernel::Linear(map) => {
                let whole: Vec<Cow<'_, [u64]>> = operands.iter().map(Operand::whole).collect();
                let expanded = owned_bytes(&whole);
                let whole: Vec<&[u64]> = whole.iter().map(|data| &data[..]).collect();
                let value = Value::from(map.apply(&whole));
                self.see(expanded + value.held_bytes());
                value
            }
            Kernel::Bilinear(product) => Value::from(self.bilinear(product, &operands)),
        }
    }

    /// `X * ([me = 0] Y - [b]) - [a] * Y + [ab]`
    fn bilinear(&self, product: &Product, operands: &[Operand<'_>]) -> Vec<u64> {
        let [x, a, y, b, ab] = operands else {
            unreachable!("a bilinear kernel has five operands")
        };
        let mut out = ab.whole().into_owned();
        let (x, y) = (x.whole(), y.whole());
        let mut b = b.whole();
        if self.me == PartyId::P0 {
            for (b, y) in b.to_mut().iter_mut().zip(&y[..]) {
                *b = y.wrapping_sub(*b);
            }
            product.apply(Acc::Add, &x, &b, &mut out);
        } else {
            product.apply(Acc::Sub, &x, &b, &mut out);
        }
        let result = 8 * out.len() as u64;
        self.see(result + owned_bytes(&[b]));
        let a = a.whole();
        product.apply(Acc::Sub, &a, &y, &mut out);
        self.see(result + owned_bytes(&[a]));
        out
    }

    /// Shares of revealed outputs.
    fn reveals(&self) -> Vec<OutputShare> {
        let opened = self.opened.short();
        let outputs = self.plan.outputs.iter().enumerate();
        outputs
            .filter(|(_, output)| matches!(output.sink, Sink::Reveal | Sink::RevealIndex))
            .map(|(index, output)| self.reveal(index as u32, output, opened))
            .collect()
    }

    /// What the step leaves for the next one.
    fn keep(&mut self) -> State {
        let plan = self.plan;
        let mut kept = State {
            opened: self.opened.hash(),
            ..State::default()
        };
        // Two outputs may name one value; the last one may move it out.
        let carried = |output: &&PlanOutput| matches!(output.sink, Sink::Carry | Sink::CarryMasked);
        let mut readers: BTreeMap<VId, usize> = BTreeMap::new();
        let ids = |output: &PlanOutput| {
            let masked = output
                .masked
                .into_iter()
                .flat_map(|(open, mask)| [open, mask]);
            std::iter::once(output.share).chain(masked)
        };
        for id in plan.outputs.iter().filter(carried).flat_map(ids) {
            *readers.entry(id).or_default() += 1;
        }
        let mut whole = |id: VId| {
            let left = readers.entry(id).or_default();
            *left = left.saturating_sub(1);
            if *left == 0
                && matches!(self.value(id), Value::Ring(Cow::Owned(_)))
                && let Some(Value::Ring(data)) = self.take(id)
            {
                return data.into_owned();
            }
            self.operand(id).whole().into_owned()
        };
        for output in plan.outputs.iter().filter(carried) {
            let share = Tensor::new(output.shape.clone(), whole(output.share));
            kept.shares.insert(output.name.clone(), share);
            if let Some((open, mask)) = output.masked {
                let masked = MaskedState {
                    open: whole(open),
                    mask: whole(mask),
                };
                kept.masked.insert(output.name.clone(), masked);
            }
        }
        kept
    }

    fn reveal(&self, index: u32, output: &PlanOutput, opened: [u8; 16]) -> OutputShare {
        let slot = self.plan.slot(output.share);
        let (mut words, xor) = match slot.rep {
            Rep::Ring { .. } => (self.operand(output.share).whole().into_owned(), false),
            Rep::Bits { planes } => (
                self.plane_words(output.share, usize::from(planes), slot.n),
                true,
            ),
        };
        self.keys
            .add_zero(self.me, self.step, index, xor, &mut words);
        if let Rep::Ring { width } = slot.rep {
            // Words are sums of three only modulo the ring: carries above it say more.
            let mask = frame::low_mask(width);
            words.iter_mut().for_each(|word| *word &= mask);
        }
        OutputShare {
            name: output.name.clone(),
            share: Tensor::new(output.shape.clone(), words),
            xor,
            opened,
        }
    }

    /// All planes of each element as one word.
    fn plane_words(&self, id: VId, total: usize, n: usize) -> Vec<u64> {
        let mut words = vec![0; n];
        let mut planes: Vec<Plane> = vec![[0; 8]; total];
        for (block, words) in words.chunks_mut(BLOCK).enumerate() {
            self.value(id)
                .planes(total, n, block, 0, &self.keys.dealer, &mut planes);
            for (e, word) in words.iter_mut().enumerate() {
                for (p, plane) in planes.iter().enumerate() {
                    *word |= (plane[e / 64] >> (e % 64) & 1) << p;
                }
            }
        }
        words
    }
}

/// Bytes of what had to be expanded or copied.
fn owned_bytes(operands: &[Cow<'_, [u64]>]) -> u64 {
    let owned = operands.iter().filter(|data| matches!(data, Cow::Owned(_)));
    8 * owned.map(|data| data.len()).sum::<usize>() as u64
}
