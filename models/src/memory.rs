//! What a party holds while it runs a job, in bytes of tensors: the largest sum at one time of
//! carried state, inputs, values, frames and outputs. A party's loop counts the same
//! ([`State::peak_bytes`](trefoil_protocol::run::State)), and tests compare the two.

use std::collections::BTreeMap;

use trefoil_protocol::party::PartyId;
use trefoil_protocol::plan::Plan;
use trefoil_protocol::program::Sink;
use trefoil_protocol::{Program, Tensor};

use crate::{InitialState, Schedule};

/// Largest sum of tensors at `me` during a session without interruption; `plans` are those of the
/// schedule's programs, in order.
pub fn tensor_bytes(schedule: &Schedule, plans: &[Plan], me: PartyId) -> u64 {
    let working: Vec<u64> = plans.iter().map(|plan| plan.working_bytes(me)).collect();
    let mut state = Kept::default();
    if let InitialState::Public(values) = &schedule.initial {
        for (name, value) in values {
            state.shares.insert(name.clone(), 8 * value.len() as u64);
        }
    } else {
        read_first(schedule, &mut state);
    }
    let mut peak = 0;
    for step in &schedule.steps {
        let program = &schedule.programs[step.program];
        let inputs: u64 = program.inputs().map(|(_, ty)| 8 * ty.len() as u64).sum();
        peak = peak.max(state.bytes() + inputs + working[step.program]);
        state.after(program);
    }
    peak
}

/// Program, threads, TLS and buffers of the links before the first step, measured at idle parties
/// on Linux: 24 to 27 MB.
const IDLE_BYTES: u64 = 26_000_000;

/// What of a link's settings takes memory beside the tensors.
#[derive(Clone, Copy, Debug)]
pub struct Buffers {
    /// How far the dealer may be ahead.
    pub look_ahead_bytes: u64,
    /// What a peer may send of a frame before this party takes it.
    pub window_bytes: u64,
}

/// What a party's memory is said to be, in bytes, at the party that needs most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartyBytes {
    /// Tensors alone: [`tensor_bytes`].
    pub tensors: u64,
    /// The whole process at its peak, within a quarter: an idle one, tensors, the public initial values
    /// that every node derives and P0 shares a copy of, what the dealer is ahead, and what of the
    /// largest round lies in the windows of the two peers.
    pub process: u64,
}

impl PartyBytes {
    /// Of a job.
    pub fn of(schedule: &Schedule, plans: &[Plan], buffers: Buffers) -> PartyBytes {
        let tensors = PartyId::ALL.map(|me| tensor_bytes(schedule, plans, me));
        let tensors = tensors.into_iter().max().unwrap_or(0);
        let derived = match &schedule.initial {
            InitialState::Public(values) => {
                8 * values.values().map(Tensor::len).sum::<usize>() as u64
            }
            _ => 0,
        };
        let dealt: Vec<u64> = plans
            .iter()
            .map(|plan| plan.cost().dealer_bytes / 3)
            .collect();
        let dealt = schedule.steps.iter().map(|step| dealt[step.program]).sum();
        let frame = plans
            .iter()
            .map(Plan::largest_frame_bytes)
            .max()
            .unwrap_or(0);
        let buffered = buffers.look_ahead_bytes.min(dealt) + 2 * buffers.window_bytes.min(frame);
        PartyBytes {
            tensors,
            process: IDLE_BYTES + tensors + derived + buffered,
        }
    }
}

/// Bytes of carried state by name.
#[derive(Default)]
struct Kept {
    shares: BTreeMap<String, u64>,
    /// Openings and mask shares.
    masked: BTreeMap<String, u64>,
}

impl Kept {
    fn bytes(&self) -> u64 {
        self.shares.values().chain(self.masked.values()).sum()
    }

    fn after(&mut self, program: &Program) {
        for output in &program.outputs {
            let bytes = 8 * program.ty(output.val).len() as u64;
            let name = || output.name.clone();
            match output.sink {
                Sink::Carry => drop(self.shares.insert(name(), bytes)),
                Sink::CarryMasked => {
                    self.shares.insert(name(), bytes);
                    self.masked.insert(name(), 2 * bytes);
                }
                Sink::Reveal | Sink::RevealIndex => {}
            }
        }
    }
}

/// A kept model's tensors: what the steps read and none before them has made.
fn read_first(schedule: &Schedule, state: &mut Kept) {
    let mut made = Kept::default();
    for step in &schedule.steps {
        let program = &schedule.programs[step.program];
        for (name, ty) in program.carried() {
            if !made.shares.contains_key(name) {
                state.shares.insert(name.into(), 8 * ty.len() as u64);
            }
        }
        made.after(program);
    }
}
