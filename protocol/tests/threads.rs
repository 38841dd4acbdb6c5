//! Every byte that is sent and every share that is kept is the same for any number of threads.

use std::collections::BTreeMap;
use std::thread;

use bytes::Bytes;
use sha2::{Digest, Sha256};
use trefoil_protocol::op::lookup::Table;
use trefoil_protocol::plan::Plan;
use trefoil_protocol::program::{Builder, ConvSpec, PoolSpec, Rounding, Sink};
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::run::memory::{test_dealer_keys, test_party_keys, test_shares};
use trefoil_protocol::run::{DealerState, State, deal_step, run_step};
use trefoil_protocol::transport::{
    CorrectionSink, MemoryNet, MemorySink, NetError, Transport, memory,
};
use trefoil_protocol::{PartyId, Program, set_threads};

struct Hashed<T>(T, Sha256);

impl Transport for Hashed<MemoryNet> {
    fn post(&mut self, to: PartyId, frame: Bytes) -> Result<(), NetError> {
        self.1.update(&frame);
        self.0.post(to, frame)
    }
    fn next(&mut self, from: PartyId) -> Result<Bytes, NetError> {
        self.0.next(from)
    }
}

impl CorrectionSink for Hashed<MemorySink> {
    fn post(&mut self, to: PartyId, segment: Bytes) -> Result<(), NetError> {
        self.1.update(&segment);
        self.0.post(to, segment)
    }
}

/// One of each kernel, on tensors that are worth several threads and end within a block.
fn program(ring_bits: u8) -> Program {
    let mut b = Builder::new("threads", ring_bits).expect("a ring");
    let n = 300_001;
    let mut build = || {
        let x = b.input("x", &[n], 16, 24)?;
        let (relu, bit) = b.relu_trunc(x, 8, Rounding::Nearest)?;
        let floor = b.trunc(x, 8, Rounding::Stochastic)?;
        let masked = b.bit_mul(bit, floor)?;
        let sum = b.add(relu, masked[0])?;
        b.output("sum", sum, Sink::CarryMasked)?;
        let values = (0..8).map(|v| v * v).collect();
        let table = Table {
            values,
            out_bits: 6,
            frac_bits: 0,
        };
        let found = b.lookup(x, 5, 3, 24, vec![table])?;
        b.output("found", found[0], Sink::Carry)?;
        let image = b.input("image", &[6, 8, 40, 40], 4, 10)?;
        let weight = b.input("weight", &[9, 8, 3, 3], 4, 10)?;
        let y = b.conv2d(image, weight, ConvSpec::default())?;
        let (y, won) = b.max_pool(
            y,
            PoolSpec {
                window: [2, 2],
                stride: [2, 2],
                pads: [0; 4],
            },
        )?;
        b.output("won", won, Sink::Reveal)?;
        b.output("pooled", y, Sink::Reveal)
    };
    build().expect("the program fits");
    b.finish()
}

/// A hash of everything that a run sends and leaves.
fn digest(plan: &Plan, inputs: &BTreeMap<String, Tensor>) -> Vec<u8> {
    let (nets, deals, sink) = memory();
    thread::scope(|scope| {
        let ends = PartyId::ALL.into_iter().zip(nets).zip(deals);
        let parties: Vec<_> = ends
            .map(|((me, net), mut deal)| {
                scope.spawn(move || {
                    let share = |(name, x): (&String, &Tensor)| {
                        (name.clone(), test_shares(x, 3, name)[me.index()].clone())
                    };
                    let inputs = inputs.iter().map(share).collect();
                    let (keys, mut state) = (test_party_keys(3, me), State::default());
                    let mut net = Hashed(net, Sha256::new());
                    let shares =
                        run_step(plan, me, 0, &keys, &mut state, &inputs, &mut net, &mut deal)
                            .expect("a step in memory");
                    let kept = state.shares.values().chain(shares.iter().map(|o| &o.share));
                    for word in kept.flat_map(|share| share.data()) {
                        net.1.update(word.to_le_bytes());
                    }
                    net.1.finalize().to_vec()
                })
            })
            .collect();
        let mut sink = Hashed(sink, Sha256::new());
        let mut state = DealerState::default();
        deal_step(plan, 0, &test_dealer_keys(3), &mut state, &mut sink).expect("dealt in memory");
        let mut all = sink.1.finalize().to_vec();
        for party in parties {
            all.extend(party.join().expect("a party's thread does not panic"));
        }
        all
    })
}

#[test]
fn nothing_that_is_sent_or_kept_depends_on_the_number_of_threads() {
    for ring_bits in [64, 48] {
        let program = program(ring_bits);
        let plan = Plan::new(&program);
        let input = |(name, ty): (&str, &trefoil_protocol::program::Type)| {
            let word = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) as i64 >> 54) as u64;
            let data = (0..ty.len() as u64).map(word).collect();
            (name.to_string(), Tensor::new(ty.shape.clone(), data))
        };
        let inputs = program.inputs().map(input).collect();
        set_threads(1);
        let one = digest(&plan, &inputs);
        for threads in [2, 3] {
            set_threads(threads);
            assert!(
                one == digest(&plan, &inputs),
                "{threads} threads, {ring_bits} bits"
            );
        }
    }
}
