//! Three parties and a dealer as threads over the in-memory network: real frames, no sockets.
//!
//! Tests and quick experiments use it; everything random comes from one seed, so that a run can be
//! repeated. A deployment never does this: each party draws its own keys.

use std::collections::BTreeMap;
use std::thread;

use sha2::{Digest, Sha256};

use super::party::{OutputShare, PartyKeys, State, reconstruct, run_step, sign_extend};
use super::{DealerKeys, DealerState, StepError, deal_step};
use crate::party::PartyId;
use crate::plan::Plan;
use crate::prg::Prg;
use crate::ring::Tensor;
use crate::share::share;
use crate::transport::{Corrections, Transport, memory};

/// One step: which plan, on which inputs (in the clear; they are shared here).
#[derive(Clone, Debug)]
pub struct MemoryStep {
    /// Index of the plan.
    pub plan: usize,
    /// Inputs by name.
    pub inputs: BTreeMap<String, Tensor>,
}

/// What came out, reconstructed, and what was counted.
#[derive(Debug, Default)]
pub struct MemoryRun {
    /// Revealed outputs of every step.
    pub outputs: Vec<BTreeMap<String, Tensor>>,
    /// Carried state after the last step.
    pub state: BTreeMap<String, Tensor>,
    /// Bytes that each party sent to its two peers.
    pub sent_bytes: [u64; 3],
    /// Frames that each party sent to its two peers.
    pub sent_frames: [u64; 3],
    /// Bytes that the dealer sent.
    pub dealer_bytes: u64,
    /// Largest sum of tensors that each party held.
    pub peak_bytes: [u64; 3],
}

/// A 16-byte key named by a seed and a purpose.
pub fn test_key(seed: u64, purpose: &str) -> [u8; 16] {
    let hash = Sha256::new()
        .chain_update(seed.to_le_bytes())
        .chain_update(purpose)
        .finalize();
    let mut key = [0; 16];
    key.copy_from_slice(&hash[..16]);
    key
}

/// The keys of party `me` under a test seed.
pub fn test_party_keys(seed: u64, me: PartyId) -> PartyKeys {
    let pair = |other: PartyId| {
        let (low, high) = (me.min(other), me.max(other));
        (me != other).then(|| Prg::new(test_key(seed, &format!("pair {low} {high}"))))
    };
    PartyKeys {
        dealer: Prg::new(test_key(seed, &format!("party {me}"))),
        pairwise: PartyId::ALL.map(pair),
    }
}

/// The dealer's keys under a test seed; the rounding key is [`test_coins`].
pub fn test_dealer_keys(seed: u64) -> DealerKeys {
    DealerKeys {
        parties: PartyId::ALL.map(|party| Prg::new(test_key(seed, &format!("party {party}")))),
        coins: Some(test_coins(seed)),
    }
}

/// The rounding key under a test seed.
pub fn test_coins(seed: u64) -> Prg {
    Prg::new(test_key(seed, "coins"))
}

/// The three shares of a tensor under a test seed.
pub fn test_shares(x: &Tensor, seed: u64, purpose: &str) -> [Tensor; 3] {
    let seeds = [
        test_key(seed, &format!("{purpose} a")),
        test_key(seed, &format!("{purpose} b")),
    ];
    let shares = share(x.data(), seeds, PartyId::P2);
    shares.map(|share| {
        Tensor::new(
            x.shape().to_vec(),
            share.expand(x.len()).unwrap_or_default(),
        )
    })
}

struct PartyRun {
    outputs: Vec<Vec<OutputShare>>,
    state: State,
}

fn party(
    me: PartyId,
    plans: &[Plan],
    steps: &[(usize, BTreeMap<String, Tensor>)],
    mut state: State,
    keys: &PartyKeys,
    net: &mut dyn Transport,
    deal: &mut dyn Corrections,
) -> Result<PartyRun, StepError> {
    let mut outputs = Vec::new();
    for (step, (plan, inputs)) in steps.iter().enumerate() {
        outputs.push(run_step(
            &plans[*plan],
            me,
            step as u64,
            keys,
            &mut state,
            inputs,
            net,
            deal,
        )?);
    }
    Ok(PartyRun { outputs, state })
}

/// Runs all steps of one session.
pub fn run(
    plans: &[Plan],
    steps: &[MemoryStep],
    initial: &BTreeMap<String, Tensor>,
    seed: u64,
) -> Result<MemoryRun, StepError> {
    let (nets, deals, mut sink) = memory();
    let shared_steps: Vec<Vec<(usize, BTreeMap<String, Tensor>)>> = split_steps(steps, seed);
    let states = split(initial, seed, "initial");
    let results = thread::scope(|scope| {
        let parties: Vec<_> = PartyId::ALL
            .into_iter()
            .zip(nets)
            .zip(deals)
            .zip(states)
            .map(|(((me, mut net), mut deal), shares)| {
                let steps = &shared_steps[me.index()];
                scope.spawn(move || {
                    let keys = test_party_keys(seed, me);
                    let state = State {
                        shares,
                        ..State::default()
                    };
                    let run = party(me, plans, steps, state, &keys, &mut net, &mut deal)?;
                    Ok::<_, StepError>((run, net.sent_bytes, net.sent_frames))
                })
            })
            .collect();
        let keys = test_dealer_keys(seed);
        let mut state = DealerState::default();
        let dealt: Result<(), StepError> =
            steps
                .iter()
                .enumerate()
                .try_for_each(|(step, memory_step)| {
                    deal_step(
                        &plans[memory_step.plan],
                        step as u64,
                        &keys,
                        &mut state,
                        &mut sink,
                    )
                });
        let mut done = Vec::new();
        for party in parties {
            done.push(party.join().expect("a party's thread does not panic")?);
        }
        dealt?;
        Ok::<_, StepError>((done, sink.sent_bytes))
    });
    let (done, dealer_bytes) = results?;
    let ring_bits = plans.first().map_or(64, |plan| plan.ring_bits);
    let mut out = MemoryRun {
        dealer_bytes,
        ..MemoryRun::default()
    };
    for (i, (_, bytes, frames)) in done.iter().enumerate() {
        out.sent_bytes[i] = *bytes;
        out.peak_bytes[i] = done[i].0.state.peak_bytes;
        out.sent_frames[i] = *frames;
    }
    for step in 0..steps.len() {
        let mut named = BTreeMap::new();
        for output in 0..done[0].0.outputs[step].len() {
            let shares = [0, 1, 2].map(|p: usize| done[p].0.outputs[step][output].clone());
            let tensor = reconstruct(&shares, ring_bits).expect("threads of one run agree");
            named.insert(shares[0].name.clone(), tensor);
        }
        out.outputs.push(named);
    }
    for name in done[0].0.state.shares.keys() {
        let shares = [0, 1, 2].map(|p: usize| &done[p].0.state.shares[name]);
        let mut tensor = crate::share::reconstruct(shares);
        tensor
            .data_mut()
            .iter_mut()
            .for_each(|word| *word = sign_extend(*word, ring_bits));
        out.state.insert(name.clone(), tensor);
    }
    Ok(out)
}

fn split(
    named: &BTreeMap<String, Tensor>,
    seed: u64,
    purpose: &str,
) -> [BTreeMap<String, Tensor>; 3] {
    let mut out: [BTreeMap<String, Tensor>; 3] = Default::default();
    for (name, tensor) in named {
        let shares = test_shares(tensor, seed, &format!("{purpose} {name}"));
        for (out, share) in out.iter_mut().zip(shares) {
            out.insert(name.clone(), share);
        }
    }
    out
}

fn split_steps(steps: &[MemoryStep], seed: u64) -> Vec<Vec<(usize, BTreeMap<String, Tensor>)>> {
    let mut out = vec![Vec::new(); 3];
    for (index, step) in steps.iter().enumerate() {
        let shares = split(&step.inputs, seed, &format!("step {index}"));
        for (out, inputs) in out.iter_mut().zip(shares) {
            out.push((step.plan, inputs));
        }
    }
    out
}
