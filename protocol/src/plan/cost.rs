//! What a plan costs, derived before anything runs: rounds, bytes, dealer bytes, multiply-adds,
//! comparisons, peak memory, in total and by layer. The measured figures come from counters in the
//! transport, so that the comparison can fail.

use serde::Serialize;

use super::{Corr, Instr, Kernel, Plan, Rep};
use crate::party::PartyId;
use crate::program::Sink;
use crate::run::frame;

/// Cost of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LayerCost {
    /// The layer's name.
    pub name: String,
    /// Rounds in which it opens something (layers may share rounds).
    pub rounds: u64,
    /// Payload bytes that each party sends to its two peers together.
    pub bytes_sent_per_party: u64,
    /// Payload bytes of corrections on the dealer's three links together.
    pub dealer_bytes: u64,
    /// Multiply-adds of bilinear maps: of one party (two products).
    pub multiply_adds: u64,
    /// Exact comparisons of secrets.
    pub comparisons: u64,
    /// Words of pseudo-random stream that one party expands.
    pub prg_words_per_party: u64,
    /// Largest sum of tensors at a party while the layer works, with what the step reads.
    pub peak_memory_bytes: u64,
}

/// Cost of one step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Cost {
    /// Communication rounds among the parties.
    pub rounds: u64,
    /// Bytes that each party sends to its two peers together, frame headers included.
    pub bytes_sent_per_party: u64,
    /// Bytes of reveals that each party sends to receivers.
    pub reveal_bytes_per_party: u64,
    /// Bytes on the dealer's three links together, segment headers included.
    pub dealer_bytes: u64,
    /// Multiply-adds of one party.
    pub multiply_adds: u64,
    /// Multiply-adds of the dealer.
    pub dealer_multiply_adds: u64,
    /// Exact comparisons of secrets.
    pub comparisons: u64,
    /// Largest sum of tensors at a party, with the inputs and the carried state that the step reads.
    pub peak_memory_bytes: u64,
    /// Words of pseudo-random stream that one party expands.
    pub prg_words_per_party: u64,
    /// By layer.
    pub layers: Vec<LayerCost>,
}

impl Cost {
    fn see_memory(&mut self, scope: u16, live: u64) {
        let layer = &mut self.layers[usize::from(scope)];
        layer.peak_memory_bytes = layer.peak_memory_bytes.max(live);
        self.peak_memory_bytes = self.peak_memory_bytes.max(live);
    }
}

impl Plan {
    /// Adds up the plan.
    pub fn cost(&self) -> Cost {
        let layer = |name: &String| LayerCost {
            name: name.clone(),
            ..LayerCost::default()
        };
        let mut cost = Cost {
            layers: self.scopes.iter().map(layer).collect(),
            ..Cost::default()
        };
        for round in &self.rounds {
            for (instr, _) in &round.work {
                self.instr_cost(instr, &mut cost);
            }
            if !round.opens.is_empty() {
                self.round_cost(round, &mut cost);
            }
        }
        let read = self.read_bytes();
        for me in PartyId::ALL {
            self.walk_memory(me, &mut |scope, held| cost.see_memory(scope, read + held));
        }
        for output in &self.outputs {
            if matches!(output.sink, Sink::Reveal | Sink::RevealIndex) {
                let slot = self.slot(output.share);
                // Receivers get words.
                cost.reveal_bytes_per_party += 8 * slot.n as u64;
            }
        }
        cost.layers.retain(|layer| layer.peak_memory_bytes > 0);
        cost
    }

    fn open_bytes(&self, open: &Instr) -> u64 {
        let slot = self.slot(open.outs()[0]);
        slot.rep.wire_bytes(slot.n)
    }

    fn round_cost(&self, round: &super::Round, cost: &mut Cost) {
        cost.rounds += 1;
        cost.bytes_sent_per_party += 2 * frame::HEADER_BYTES as u64;
        let mut scopes: Vec<u16> = Vec::new();
        for open in &round.opens {
            let bytes = 2 * self.open_bytes(open);
            let scope = self.slot(open.outs()[0]).scope;
            cost.bytes_sent_per_party += bytes;
            cost.layers[usize::from(scope)].bytes_sent_per_party += bytes;
            scopes.push(scope);
        }
        scopes.sort_unstable();
        scopes.dedup();
        for scope in scopes {
            cost.layers[usize::from(scope)].rounds += 1;
        }
    }

    fn instr_cost(&self, instr: &Instr, cost: &mut Cost) {
        for out in instr.outs() {
            let slot = self.slot(out);
            let words = match slot.rep {
                Rep::Ring { .. } => slot.n as u64,
                Rep::Bits { planes } => u64::from(planes) * 8 * slot.n.div_ceil(512) as u64,
            };
            let layer = &mut cost.layers[usize::from(slot.scope)];
            match instr {
                Instr::Rand { .. } => {
                    layer.prg_words_per_party += words;
                    cost.prg_words_per_party += words;
                }
                Instr::Deal { corr, .. } => {
                    layer.prg_words_per_party += words * 2 / 3;
                    cost.prg_words_per_party += words * 2 / 3;
                    let bytes = slot.rep.wire_bytes(slot.n);
                    layer.dealer_bytes += bytes;
                    cost.dealer_bytes +=
                        bytes + frame::SEGMENT_HEADER_BYTES as u64 * frame::receivers(slot.n);
                    if let Corr::Product(product) = corr {
                        cost.dealer_multiply_adds += product.multiply_adds();
                    }
                }
                Instr::Local {
                    kernel: Kernel::Bilinear(product),
                    ..
                } => {
                    layer.multiply_adds += 2 * product.multiply_adds();
                    cost.multiply_adds += 2 * product.multiply_adds();
                }
                _ => {}
            }
            if let Instr::Deal {
                corr: Corr::Digits(_),
                ..
            } = instr
            {
                layer.comparisons += slot.n as u64;
                cost.comparisons += slot.n as u64;
            }
        }
    }
}
