//! What a party holds while it runs a plan, in bytes of tensors: derived before anything runs. The
//! party's loop counts what it really holds (`run/party.rs`, `run/open.rs`), and tests compare the two.
//!
//! Counted are the inputs and the carried state that the step reads, all values it makes, the frames
//! of a round, operands that a kernel expands from streams, and what it leaves. Not counted are a
//! kernel's panels, which do not grow with the tensors, and what lies in queues of the transport.

use super::{Instr, Kernel, Plan, PlanOutput, Round, VId};
use crate::party::PartyId;
use crate::program::Sink;
use crate::run::frame;

impl Plan {
    /// Largest sum of tensors that `me` holds beside the inputs and the carried state, in bytes.
    pub fn working_bytes(&self, me: PartyId) -> u64 {
        let mut peak = 0;
        self.walk_memory(me, &mut |_, held| peak = peak.max(held));
        peak
    }

    /// Bytes of the inputs and of the carried state that the step reads.
    pub fn read_bytes(&self) -> u64 {
        let words = |instr: &Instr| -> usize {
            match instr {
                Instr::Input { .. } | Instr::Carried { .. } | Instr::CarriedMasked { .. } => {
                    instr.outs().iter().map(|id| self.slot(*id).n).sum()
                }
                _ => 0,
            }
        };
        let work = self.rounds.iter().flat_map(|round| &round.work);
        8 * work.map(|(instr, _)| words(instr)).sum::<usize>() as u64
    }

    /// Bytes of the largest frame that a party sends to each peer.
    pub fn largest_frame_bytes(&self) -> u64 {
        let frame = |round: &Round| {
            let outs = round.opens.iter().flat_map(Instr::outs);
            let wire = outs.map(|id| self.slot(id).rep.wire_bytes(self.slot(id).n));
            frame::HEADER_BYTES as u64 + wire.sum::<u64>()
        };
        self.rounds.iter().map(frame).max().unwrap_or(0)
    }

    /// Tells `see` the scope and the bytes held, wherever they may be most.
    pub(super) fn walk_memory(&self, me: PartyId, see: &mut dyn FnMut(u16, u64)) {
        let values = vec![Held::default(); self.slots.len()];
        let mut walk = Walk {
            plan: self,
            me,
            values,
            live: 0,
        };
        for round in &self.rounds {
            for (instr, free) in &round.work {
                walk.make(instr);
                let now = walk.live + walk.expanded_bytes(instr);
                let outs = instr.outs();
                outs.iter().for_each(|id| see(self.slot(*id).scope, now));
                walk.free(free);
            }
            let outs: Vec<VId> = round.opens.iter().flat_map(Instr::outs).collect();
            round.opens.iter().for_each(|open| walk.make(open));
            let wire = |id: &VId| self.slot(*id).rep.wire_bytes(self.slot(*id).n);
            let frame = frame::HEADER_BYTES as u64 + outs.iter().map(wire).sum::<u64>();
            for id in &outs {
                // The own one and those of the two peers.
                see(self.slot(*id).scope, walk.live + 3 * frame);
            }
            walk.free(&round.free);
        }
        let now = walk.live + walk.left_bytes();
        let outputs = self.outputs.iter();
        outputs.for_each(|output| see(self.slot(output.share).scope, now));
    }
}

/// What one value takes.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    bytes: u64,
    /// Whether it is dealt or random, and expanded where it is read.
    stream: bool,
}

struct Walk<'a> {
    plan: &'a Plan,
    me: PartyId,
    values: Vec<Held>,
    live: u64,
}

impl Walk<'_> {
    fn make(&mut self, instr: &Instr) {
        let stream = matches!(instr, Instr::Rand { .. } | Instr::Deal { .. });
        for id in instr.outs() {
            let slot = self.plan.slot(id);
            let bytes = match instr {
                // Read where they lie.
                Instr::Input { .. } | Instr::Carried { .. } | Instr::CarriedMasked { .. } => 0,
                Instr::Const { .. } if self.me == PartyId::P0 => 0,
                Instr::Rand { .. } | Instr::Derive { .. } => 0,
                Instr::Deal { .. } => {
                    frame::correction_bytes(id.0, slot.rep, slot.n, self.me) as u64
                }
                Instr::Const { .. } | Instr::Local { .. } | Instr::Open { .. } => {
                    slot.rep.memory_bytes(slot.n)
                }
            };
            self.values[id.index()] = Held { bytes, stream };
            self.live += bytes;
        }
    }

    fn free(&mut self, ids: &[VId]) {
        for id in ids {
            self.live -= std::mem::take(&mut self.values[id.index()].bytes);
        }
    }

    fn words_bytes(&self, id: VId) -> u64 {
        8 * self.plan.slot(id).n as u64
    }

    fn expanded(&self, id: VId) -> u64 {
        match self.values[id.index()].stream {
            true => self.words_bytes(id),
            false => 0,
        }
    }

    /// Bytes of operands that a kernel expands as a whole, at most at one time.
    fn expanded_bytes(&self, instr: &Instr) -> u64 {
        let Instr::Local { kernel, ins, .. } = instr else {
            return 0;
        };
        match (kernel, &ins[..]) {
            (Kernel::Linear(_), ins) => ins.iter().map(|id| self.expanded(*id)).sum(),
            (Kernel::FromBits { .. }, [_, beta]) => self.expanded(*beta),
            (Kernel::Bilinear(_), [_, a, _, b, _]) => {
                // P0 works on a copy of b in any case.
                let b = match self.me {
                    PartyId::P0 => self.words_bytes(*b),
                    _ => self.expanded(*b),
                };
                b.max(self.expanded(*a))
            }
            _ => 0,
        }
    }

    /// Bytes of copies that the step's outputs need beside what is held: what nobody else reads is
    /// moved.
    fn left_bytes(&self) -> u64 {
        let keeps = |output: &&PlanOutput| matches!(output.sink, Sink::Carry | Sink::CarryMasked);
        let ids = |output: &PlanOutput| {
            let masked = output.masked.map(|(open, mask)| [open, mask]);
            std::iter::once(output.share).chain(masked.into_iter().flatten())
        };
        let outputs = || self.plan.outputs.iter();
        let revealed = outputs().filter(|output| !keeps(output));
        let mut bytes: u64 = revealed.map(|output| self.words_bytes(output.share)).sum();
        let mut kept: Vec<VId> = outputs().filter(keeps).flat_map(ids).collect();
        kept.sort_unstable();
        for (at, id) in kept.iter().enumerate() {
            let Held {
                bytes: held,
                stream,
            } = self.values[id.index()];
            if stream || held == 0 || kept.get(at + 1) == Some(id) {
                bytes += self.words_bytes(*id);
            }
        }
        bytes
    }
}
