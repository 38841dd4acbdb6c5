//! One role of a step alone on the calling thread: the others' frames are recorded first and played
//! back, so that the time is that of one party's, or the dealer's, own work.

use std::collections::{BTreeMap, VecDeque};
use std::thread;
use std::time::Instant;

use bytes::Bytes;
use trefoil_protocol::party::PartyId;
use trefoil_protocol::plan::Plan;
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::run::memory::{test_dealer_keys, test_party_keys, test_shares};
use trefoil_protocol::run::{DealerState, State, deal_step, run_step};
use trefoil_protocol::transport::{CorrectionSink, Corrections, NetError, Transport, memory};

type Named = BTreeMap<String, Tensor>;

/// Everything that party 0 receives, in order.
#[derive(Clone, Default)]
struct Record {
    frames: [VecDeque<Bytes>; 3],
    segments: VecDeque<Bytes>,
}

struct RecordNet<'a, T>(T, &'a mut Record);

impl<T: Transport> Transport for RecordNet<'_, T> {
    fn post(&mut self, to: PartyId, frame: Bytes) -> Result<(), NetError> {
        self.0.post(to, frame)
    }
    fn next(&mut self, from: PartyId) -> Result<Bytes, NetError> {
        let frame = self.0.next(from)?;
        self.1.frames[from.index()].push_back(frame.clone());
        Ok(frame)
    }
}

struct Frames([VecDeque<Bytes>; 3]);

impl Transport for Frames {
    fn post(&mut self, _: PartyId, _: Bytes) -> Result<(), NetError> {
        Ok(())
    }
    fn next(&mut self, from: PartyId) -> Result<Bytes, NetError> {
        Ok(self.0[from.index()].pop_front().expect("one frame a round"))
    }
}

struct Segments(VecDeque<Bytes>);

impl Corrections for Segments {
    fn next(&mut self) -> Result<Bytes, NetError> {
        Ok(self.0.pop_front().expect("one segment a correlation"))
    }
}

struct Nowhere;

impl CorrectionSink for Nowhere {
    fn post(&mut self, _: PartyId, _: Bytes) -> Result<(), NetError> {
        Ok(())
    }
}

struct Keep<'a, S>(S, &'a mut VecDeque<Bytes>);

impl<S: CorrectionSink> CorrectionSink for Keep<'_, S> {
    fn post(&mut self, to: PartyId, segment: Bytes) -> Result<(), NetError> {
        if to == PartyId::P0 {
            self.1.push_back(segment.clone());
        }
        self.0.post(to, segment)
    }
}

fn shares(named: &Named, me: PartyId) -> Named {
    let share = |(name, tensor): (&String, &Tensor)| {
        let share = test_shares(tensor, 1, name)[me.index()].clone();
        (name.clone(), share)
    };
    named.iter().map(share).collect()
}

fn state(initial: &Named, me: PartyId) -> State {
    State {
        shares: shares(initial, me),
        ..State::default()
    }
}

fn median(repetitions: usize, mut each: impl FnMut() -> f64) -> f64 {
    let mut seconds: Vec<f64> = (0..repetitions).map(|_| each()).collect();
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Median seconds of party 0 alone and of the dealer alone for the first step of `plan`.
pub fn seconds(plan: &Plan, inputs: &Named, initial: &Named, repetitions: usize) -> [f64; 2] {
    let (nets, deals, sink) = memory();
    let mut record = Record::default();
    let mut segments = VecDeque::new();
    thread::scope(|scope| {
        let mut record = Some(&mut record);
        for ((me, mut net), mut deal) in PartyId::ALL.into_iter().zip(nets).zip(deals) {
            let record = record.take();
            scope.spawn(move || {
                let (keys, inputs) = (test_party_keys(1, me), shares(inputs, me));
                let mut state = state(initial, me);
                let mut run = |net: &mut dyn Transport| {
                    run_step(plan, me, 0, &keys, &mut state, &inputs, net, &mut deal)
                        .expect("a step in memory");
                };
                match record {
                    Some(record) => run(&mut RecordNet(net, record)),
                    None => run(&mut net),
                }
            });
        }
        let mut state = DealerState::default();
        let mut keep = Keep(sink, &mut segments);
        deal_step(plan, 0, &test_dealer_keys(1), &mut state, &mut keep).expect("a step in memory");
    });
    record.segments = segments;

    let me = PartyId::P0;
    let (keys, inputs) = (test_party_keys(1, me), shares(inputs, me));
    let party = median(repetitions, || {
        let mut state = state(initial, me);
        let Record { frames, segments } = record.clone();
        let (mut net, mut deal) = (Frames(frames), Segments(segments));
        let start = Instant::now();
        run_step(plan, me, 0, &keys, &mut state, &inputs, &mut net, &mut deal)
            .expect("the record is whole");
        start.elapsed().as_secs_f64()
    });
    let keys = test_dealer_keys(1);
    let dealer = median(repetitions, || {
        let mut state = DealerState::default();
        let start = Instant::now();
        deal_step(plan, 0, &keys, &mut state, &mut Nowhere).expect("nothing can fail");
        start.elapsed().as_secs_f64()
    });
    [party, dealer]
}
