//! What two colluding parties see does not depend on the inputs.
//!
//! Exactly: for two inputs A and B there is a shift of the honest party's random words under which
//! the colluders' whole view in run B (every frame and every correction that they receive) is
//! byte-identical to run A. The shift is found round by round from the views alone; it exists only
//! if every opening has a mask of its own. Statistically: over many seeds every opened word, and
//! every difference of two, is uniform. Both tests must fail when a mask is deliberately reused.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::thread;

use bytes::Bytes;
use trefoil_protocol::party::PartyId;
use trefoil_protocol::plan::{Instr, Plan, Profile, Rep};
use trefoil_protocol::prg::{Prg, Shifts};
use trefoil_protocol::program::{
    Builder, ConvSpec, Curve, DropoutSpec, PoolSpec, Program, Rounding, Sink, Table,
};
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::run::dealer::{DealerKeys, DealerState, deal_step};
use trefoil_protocol::run::frame;
use trefoil_protocol::run::memory::{test_coins, test_key, test_party_keys, test_shares};
use trefoil_protocol::run::party::{PartyKeys, State, run_step};
use trefoil_protocol::transport::{CorrectionSink, Corrections, NetError, Transport, memory};

const SEED: u64 = 20_261_122;

/// Everything that one party received.
#[derive(Clone, Default, PartialEq, Eq)]
struct View {
    /// By round: the frames of the two peers, in canonical order.
    frames: Vec<(PartyId, Bytes)>,
    segments: Vec<Bytes>,
}

struct Recorder<T> {
    inner: T,
    view: Arc<Mutex<View>>,
}

impl<T: Transport> Transport for Recorder<T> {
    fn post(&mut self, to: PartyId, frame: Bytes) -> Result<(), NetError> {
        self.inner.post(to, frame)
    }
    fn next(&mut self, from: PartyId) -> Result<Bytes, NetError> {
        let frame = self.inner.next(from)?;
        self.view.lock().unwrap().frames.push((from, frame.clone()));
        Ok(frame)
    }
}

impl<T: Corrections> Corrections for Recorder<T> {
    fn next(&mut self) -> Result<Bytes, NetError> {
        let segment = self.inner.next()?;
        self.view.lock().unwrap().segments.push(segment.clone());
        Ok(segment)
    }
}

/// Runs one step; the honest party's words are shifted. `deltas` are added to its input shares, so
/// that the colluders' input shares are the same in every run.
fn views(
    plan: &Plan,
    inputs: &BTreeMap<String, Tensor>,
    deltas: &BTreeMap<String, Tensor>,
    honest: PartyId,
    shifts: &Arc<Shifts>,
    seed: u64,
) -> [View; 3] {
    let (nets, corrections, mut sink) = memory();
    let prg = |party: PartyId| {
        let key = test_key(seed, &format!("party {party}"));
        if party == honest {
            Prg::shifted(key, shifts.clone())
        } else {
            Prg::new(key)
        }
    };
    let logs: [Arc<Mutex<View>>; 3] = Default::default();
    thread::scope(|scope| {
        for ((me, net), deal) in PartyId::ALL.into_iter().zip(nets).zip(corrections) {
            let log = logs[me.index()].clone();
            let keys = PartyKeys {
                dealer: prg(me),
                ..test_party_keys(seed, me)
            };
            scope.spawn(move || {
                let mut shares = BTreeMap::new();
                for (name, tensor) in inputs {
                    let mut share = test_shares(tensor, seed, name)[me.index()].clone();
                    if me == honest {
                        let delta = deltas[name].data();
                        share
                            .data_mut()
                            .iter_mut()
                            .zip(delta)
                            .for_each(|(s, d)| *s = s.wrapping_add(*d));
                    }
                    shares.insert(name.clone(), share);
                }
                let mut net = Recorder {
                    inner: net,
                    view: log.clone(),
                };
                let mut deal = Recorder {
                    inner: deal,
                    view: log,
                };
                run_step(
                    plan,
                    me,
                    0,
                    &keys,
                    &mut State::default(),
                    &shares,
                    &mut net,
                    &mut deal,
                )
                .unwrap();
            });
        }
        let keys = DealerKeys {
            parties: PartyId::ALL.map(prg),
            coins: Some(test_coins(seed)),
        };
        deal_step(
            plan,
            0,
            &keys,
            &mut DealerState::default(),
            &mut sink as &mut dyn CorrectionSink,
        )
        .unwrap();
    });
    logs.map(|log| log.lock().unwrap().clone())
}

/// Words of a packed value: ring elements, or planes block after block.
fn unpack(rep: Rep, n: usize, bytes: &[u8]) -> Vec<u64> {
    match rep {
        Rep::Ring { width } => {
            let mut words = vec![0; n];
            frame::unpack_ring(bytes, width, &mut words);
            words
        }
        Rep::Bits { planes } => {
            let mut out = Vec::new();
            let mut at = 0;
            for block in 0..n.div_ceil(512) {
                let len = (n - block * 512).min(512);
                let mut words = vec![[0u64; 8]; usize::from(planes)];
                let size = usize::from(planes) * len.div_ceil(8);
                frame::unpack_planes(&bytes[at..at + size], len, &mut words);
                at += size;
                out.extend(words.into_iter().flatten());
            }
            out
        }
    }
}

fn difference(rep: Rep, a: u64, b: u64) -> u64 {
    match rep {
        Rep::Ring { .. } => a.wrapping_sub(b),
        Rep::Bits { .. } => a ^ b,
    }
}

/// Adds `(a - b)` to the shift of a value.
fn shift(shifts: &mut Shifts, id: u32, rep: Rep, at: usize, n: usize, a: &[u64], b: &[u64]) {
    let words = match rep {
        Rep::Ring { .. } => n,
        Rep::Bits { planes } => n.div_ceil(512) * usize::from(planes) * 8,
    };
    let entry = shifts.entry((0, id)).or_insert_with(|| vec![0; words]);
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        let add = difference(rep, *a, *b);
        entry[at + i] = match rep {
            Rep::Ring { .. } => entry[at + i].wrapping_add(add),
            Rep::Bits { .. } => entry[at + i] ^ add,
        };
    }
}

/// Tries to find the shift that makes run B look like run A to the colluders; true if it exists.
fn indistinguishable(
    plan: &Plan,
    a: &BTreeMap<String, Tensor>,
    b: &BTreeMap<String, Tensor>,
    honest: PartyId,
) -> bool {
    let zero = a
        .iter()
        .map(|(name, t)| (name.clone(), Tensor::zeros(t.shape())))
        .collect();
    let deltas = a.iter().map(|(name, t)| {
        let words = b[name]
            .data()
            .iter()
            .zip(t.data())
            .map(|(b, a)| b.wrapping_sub(*a))
            .collect();
        (name.clone(), Tensor::new(t.shape().to_vec(), words))
    });
    let deltas: BTreeMap<String, Tensor> = deltas.collect();
    let mut shifts = Shifts::new();
    let target = views(plan, a, &zero, honest, &Arc::new(Shifts::new()), SEED);
    let colluders = honest.others();
    let rounds: Vec<usize> = (0..plan.rounds.len())
        .filter(|r| !plan.rounds[*r].opens.is_empty())
        .collect();
    for _ in 0..2 * rounds.len() + 2 {
        let seen = views(plan, a, &deltas, honest, &Arc::new(shifts.clone()), SEED);
        if colluders
            .iter()
            .all(|c| seen[c.index()] == target[c.index()])
        {
            return true;
        }
        // Corrections that a colluder received, in plan order.
        let mut next = [0usize; 3];
        for (instr, _) in plan.rounds.iter().flat_map(|round| &round.work) {
            let Instr::Deal { out, .. } = instr else {
                continue;
            };
            let slot = plan.slot(*out);
            let id = out.index() as u32;
            for to in PartyId::ALL {
                if frame::correction_bytes(id, slot.rep, slot.n, to) == 0 {
                    continue;
                }
                let at = next[to.index()];
                next[to.index()] += 1;
                if to == honest {
                    continue;
                }
                let payload =
                    |v: &[View; 3]| v[to.index()].segments[at].slice(frame::SEGMENT_HEADER_BYTES..);
                let (now, then) = (payload(&seen), payload(&target));
                let mut byte = 0;
                for chunk in 0..slot.n.div_ceil(frame::CHUNK) {
                    if frame::receiver(id, chunk) != to {
                        continue;
                    }
                    let start = chunk * frame::CHUNK;
                    let len = frame::CHUNK.min(slot.n - start);
                    let bytes = slot.rep.wire_bytes(len) as usize;
                    let [now, then] =
                        [&now, &then].map(|p| unpack(slot.rep, len, &p[byte..byte + bytes]));
                    let word = match slot.rep {
                        Rep::Ring { .. } => start,
                        Rep::Bits { planes } => start / 512 * usize::from(planes) * 8,
                    };
                    shift(&mut shifts, id, slot.rep, word, slot.n, &now, &then);
                    byte += bytes;
                }
            }
        }
        // Masks of openings: the honest party's frame differs by what the mask must make up.
        let frame_of = |v: &[View; 3], round: usize| {
            let from = |(peer, _): &&(PartyId, Bytes)| *peer == honest;
            v[colluders[0].index()]
                .frames
                .iter()
                .filter(from)
                .nth(round)
                .unwrap()
                .1
                .clone()
        };
        for (order, round) in rounds.iter().enumerate() {
            let [now, then] = [&seen, &target].map(|v| frame_of(v, order));
            let mut at = frame::HEADER_BYTES;
            for open in &plan.rounds[*round].opens {
                let Instr::Open { mask, out, .. } = open else {
                    continue;
                };
                let slot = plan.slot(*out);
                let bytes = slot.rep.wire_bytes(slot.n) as usize;
                let [now, then] =
                    [&now, &then].map(|f| unpack(slot.rep, slot.n, &f[at..at + bytes]));
                shift(
                    &mut shifts,
                    mask.index() as u32,
                    slot.rep,
                    0,
                    slot.n,
                    &then,
                    &now,
                );
                at += bytes;
            }
            // Later rounds depend on this one: mend it first.
            if now[frame::HEADER_BYTES..] != then[frame::HEADER_BYTES..] {
                break;
            }
        }
    }
    false
}

const N: usize = 77;

fn one_input(
    name: &str,
    build: impl Fn(&mut Builder, trefoil_protocol::program::Val) -> Vec<trefoil_protocol::program::Val>,
) -> Program {
    let mut b = Builder::new(name, 64).unwrap();
    let x = b.input("x", &[N], 30, 60).unwrap();
    for (i, out) in build(&mut b, x).into_iter().enumerate() {
        b.output(&format!("out{i}"), out, Sink::Carry).unwrap();
    }
    b.finish()
}

/// A program for each operation.
fn programs() -> Vec<Program> {
    let mut all = vec![
        one_input("trunc", |b, x| {
            vec![b.trunc(x, 16, Rounding::Nearest).unwrap()]
        }),
        one_input("trunc two levels", |b, x| {
            vec![b.trunc(x, 28, Rounding::Floor).unwrap()]
        }),
        one_input("trunc stochastic", |b, x| {
            vec![b.trunc(x, 16, Rounding::Stochastic).unwrap()]
        }),
        one_input("relu and backward", |b, x| {
            let (y, bit) = b.relu_trunc(x, 16, Rounding::Nearest).unwrap();
            let g = b.bit_trunc(bit, x, 12, Rounding::Nearest).unwrap();
            vec![y, g[0]]
        }),
        one_input("sign and product", |b, x| {
            let bit = b.non_negative(x).unwrap();
            b.bit_mul(bit, x).unwrap()
        }),
        one_input("thresholds", |b, x| {
            let low = b.at_least(x, -5).unwrap();
            let high = b.at_least(x, 1 << 30).unwrap();
            let low = b.bit_mul(low, x).unwrap();
            [low, b.bit_mul(high, x).unwrap()].concat()
        }),
        one_input("powers", |b, x| {
            let x = b.rescale(x, 10).unwrap();
            b.powers(x, 4).unwrap()
        }),
        one_input("square", |b, x| vec![b.mul(x, x).unwrap()]),
        one_input("dropout", |b, x| {
            let spec = DropoutSpec {
                key: [7; 16],
                keep: 1 << 31,
            };
            let kept = b.dropout(x, spec).unwrap();
            let y = b.trunc(kept, 16, Rounding::Nearest).unwrap();
            vec![b.dropout(y, spec).unwrap()]
        }),
        one_input("lookup", |b, x| {
            let table = Table {
                values: (0..256).map(|v| v * 3).collect(),
                out_bits: 10,
                frac_bits: 0,
            };
            b.lookup(x, 8, 8, 16, vec![table]).unwrap()
        }),
        one_input("argmax", |b, x| {
            let x = b.reshape(x, &[11, 7]).unwrap();
            let best = b.argmax(x).unwrap();
            vec![b.bit_dot(best, x).unwrap()]
        }),
    ];
    all.push(one_input("products", |b, x| {
        let x = b.rescale(x, 10).unwrap();
        let a = b.reshape(x, &[7, 11]).unwrap();
        let square = b.matmul(a, a, false, true).unwrap();
        let image = b.reshape(x, &[1, 1, 7, 11]).unwrap();
        let w = b.slice(x, 0, 3, 6).unwrap();
        let w = b.reshape(w, &[1, 1, 2, 3]).unwrap();
        let y = b.conv2d(image, w, ConvSpec::default()).unwrap();
        let dw = b
            .conv2d_grad_weight(image, y, &[1, 1, 2, 3], ConvSpec::default())
            .unwrap();
        let dx = b
            .conv2d_grad_input(y, w, &[1, 1, 7, 11], ConvSpec::default())
            .unwrap();
        let spec = ConvSpec {
            groups: 1,
            dilation: [2, 3],
            ..ConvSpec::default()
        };
        let dilated = b.conv2d(image, w, spec).unwrap();
        let factors = b.slice(x, 0, 3, 7).unwrap();
        let scaled = b.scale_channels(a, factors, 0).unwrap();
        let dot = b.channel_dot(a, a, 1).unwrap();
        vec![square, y, dw, dx, dilated, scaled, dot]
    }));
    all.push(one_input("select and bits as numbers", |b, x| {
        let y = b.scale(x, -3).unwrap();
        let bit = b.greater_equal(x, y).unwrap();
        let larger = b.select(bit, x, y).unwrap();
        vec![larger, b.bit_to_ring(bit).unwrap()]
    }));
    let mut b = Builder::new("relu in the 48-bit ring", 48).unwrap();
    let x = b.input("x", &[N], 20, 44).unwrap();
    let (y, bit) = b.relu_trunc(x, 12, Rounding::Nearest).unwrap();
    let g = b.bit_trunc(bit, x, 12, Rounding::Stochastic).unwrap();
    b.output("y", y, Sink::Carry).unwrap();
    b.output("g", g[0], Sink::Carry).unwrap();
    all.push(b.finish());
    // With a border, above and on the right.
    let spec = PoolSpec {
        window: [2, 2],
        stride: [2, 2],
        pads: [1, 0, 0, 1],
    };
    let mut b = Builder::new("pool", 64).unwrap();
    let x = b.input("x", &[3, 6, 4], 20, 60).unwrap();
    let (y, bits) = b.max_pool(x, spec).unwrap();
    let (a, relu) = b.relu_trunc(y, 8, Rounding::Nearest).unwrap();
    let select = b.pool_select(bits, Some(relu), &[3, 6, 4], spec).unwrap();
    let g = b
        .max_pool_grad(select, y, 8, Rounding::Nearest, &[3, 6, 4], spec)
        .unwrap();
    b.output("a", a, Sink::Carry).unwrap();
    b.output("g", g, Sink::Carry).unwrap();
    all.push(b.finish());
    let mut b = Builder::new("pooled relu", 64).unwrap();
    let x = b.input("x", &[3, 6, 4], 20, 60).unwrap();
    let (y, bits) = b.max_pool(x, spec).unwrap();
    let (a, relu) = b.relu_trunc(y, 8, Rounding::Nearest).unwrap();
    let select = b.pool_select(bits, Some(relu), &[3, 6, 4], spec).unwrap();
    let g = b
        .max_pool_grad(select, a, 8, Rounding::Nearest, &[3, 6, 4], spec)
        .unwrap();
    b.output("g", g, Sink::Carry).unwrap();
    all.push(b.finish());
    let mut b = Builder::new("inverse sqrt", 64).unwrap();
    let x = b.input("x", &[9], 20, 26).unwrap();
    let y = b.inverse_sqrt(x, -8, 6).unwrap();
    b.output("y", y, Sink::Carry).unwrap();
    all.push(b.finish());
    let mut b = Builder::new("piecewise", 64).unwrap();
    let x = b.input("x", &[9], 20, 26).unwrap();
    let (y, slope) = b.piecewise(x, Curve::Silu).unwrap();
    b.output("y", y, Sink::Carry).unwrap();
    b.output("slope", slope, Sink::Carry).unwrap();
    all.push(b.finish());
    let mut b = Builder::new("softmax", 64).unwrap();
    let x = b.input("x", &[5, 3], 32, 50).unwrap();
    let p = b.softmax(x).unwrap();
    b.output("p", p, Sink::Carry).unwrap();
    all.push(b.finish());
    all
}

fn two_inputs(program: &Program) -> [BTreeMap<String, Tensor>; 2] {
    let (_, ty) = program.inputs().next().unwrap();
    let tensor = |f: &dyn Fn(u64) -> u64| {
        let data = (0..ty.len() as u64).map(f).collect();
        BTreeMap::from([("x".to_string(), Tensor::new(ty.shape.clone(), data))])
    };
    [
        tensor(&|i| i.wrapping_mul(0x1234_5678_9abc_def1) >> 20),
        tensor(&|i| {
            (i.wrapping_mul(0xfedc_ba98_7654_3211) >> 8).wrapping_neg() >> 3 & 0x0fff_ffff_ffff
        }),
    ]
}

#[test]
fn colluders_see_the_same_bytes_for_any_input_under_shifted_randomness() {
    println!("seed {SEED}");
    for program in programs() {
        let [a, b] = two_inputs(&program);
        for profile in [Profile::BYTES, Profile::ROUNDS] {
            let plan = Plan::lowered(&program, profile);
            for honest in PartyId::ALL {
                assert!(
                    indistinguishable(&plan, &a, &b, honest),
                    "{} with honest {honest}, {profile:?}",
                    program.name
                );
            }
        }
    }
}

#[test]
fn the_same_holds_where_corrections_rotate_among_the_parties() {
    println!("seed {SEED}");
    let n = 3 * frame::CHUNK + 777;
    let mut b = Builder::new("relu over four chunks", 64).unwrap();
    let x = b.input("x", &[n], 20, 60).unwrap();
    let (y, _) = b.relu_trunc(x, 16, Rounding::Nearest).unwrap();
    b.output("y", y, Sink::Carry).unwrap();
    let program = b.finish();
    let plan = Plan::new(&program);
    let [a, b] = two_inputs(&program);
    for honest in PartyId::ALL {
        assert!(indistinguishable(&plan, &a, &b, honest), "honest {honest}");
    }
}

/// Two openings of which the second uses the first one's mask.
fn reused_mask() -> Plan {
    let mut b = Builder::new("reuse", 64).unwrap();
    let x = b.input("x", &[N], 20, 60).unwrap();
    let y = b.input("y", &[N], 20, 60).unwrap();
    let x2 = b.mul(x, x).unwrap();
    let y2 = b.mul(y, y).unwrap();
    b.output("x2", x2, Sink::Carry).unwrap();
    b.output("y2", y2, Sink::Carry).unwrap();
    let mut plan = Plan::new(&b.finish());
    let masks: Vec<_> = plan
        .rounds
        .iter()
        .flat_map(|r| &r.opens)
        .map(|o| o.ins()[1])
        .collect();
    for round in &mut plan.rounds {
        for open in &mut round.opens {
            if let Instr::Open { mask, .. } = open {
                *mask = masks[0];
            }
        }
    }
    plan
}

#[test]
fn a_reused_mask_is_found_by_the_static_check_and_by_the_view_test() {
    let plan = reused_mask();
    assert!(plan.check().unwrap_err().contains("opens two values"));
    let tensor = |f: u64| {
        Tensor::new(
            vec![N],
            (0..N as u64).map(|i| i.wrapping_mul(f) >> 9).collect(),
        )
    };
    let inputs = |x: u64, y: u64| {
        BTreeMap::from([("x".to_string(), tensor(x)), ("y".to_string(), tensor(y))])
    };
    let (a, b) = (
        inputs(0x1234_5678_9abc_def1, 77),
        inputs(3, 0x9999_8888_7777_6661),
    );
    assert!(!indistinguishable(&plan, &a, &b, PartyId::P1));
}

/// Opened words of one run: the sum (XOR) of the three parties' frames, opening by opening.
fn opened(plan: &Plan, inputs: &BTreeMap<String, Tensor>, seed: u64) -> Vec<(Rep, Vec<u64>)> {
    let zero = inputs
        .iter()
        .map(|(name, t)| (name.clone(), Tensor::zeros(t.shape())))
        .collect();
    let views = views(
        plan,
        inputs,
        &zero,
        PartyId::P0,
        &Arc::new(Shifts::new()),
        seed,
    );
    let frame_of = |viewer: usize, from: PartyId, round: usize| {
        views[viewer]
            .frames
            .iter()
            .filter(|(peer, _)| *peer == from)
            .nth(round)
            .unwrap()
            .1
            .clone()
    };
    let mut out = Vec::new();
    let rounds = plan.rounds.iter().filter(|round| !round.opens.is_empty());
    for (order, round) in rounds.enumerate() {
        let frames = [
            frame_of(1, PartyId::P0, order),
            frame_of(0, PartyId::P1, order),
            frame_of(0, PartyId::P2, order),
        ];
        let mut at = frame::HEADER_BYTES;
        for open in &round.opens {
            let slot = plan.slot(open.outs()[0]);
            let bytes = slot.rep.wire_bytes(slot.n) as usize;
            let parts = frames
                .each_ref()
                .map(|f| unpack(slot.rep, slot.n, &f[at..at + bytes]));
            let sum = parts[0]
                .iter()
                .zip(&parts[1])
                .zip(&parts[2])
                .map(|((a, b), c)| match slot.rep {
                    Rep::Ring { width } => {
                        a.wrapping_add(*b).wrapping_add(*c) & frame::low_mask(width)
                    }
                    Rep::Bits { .. } => a ^ b ^ c,
                });
            out.push((slot.rep, sum.collect()));
            at += bytes;
        }
    }
    out
}

/// The largest deviation, in standard deviations, of the frequency of ones of any bit of the first
/// element of any opened value, or of the difference of any two of equal kind, over many seeds.
fn deviation(plan: &Plan, inputs: &BTreeMap<String, Tensor>, runs: u64) -> f64 {
    let mut counts: Vec<[u32; 64]> = Vec::new();
    let mut widths: Vec<u32> = Vec::new();
    for seed in 0..runs {
        let opened = opened(plan, inputs, SEED + 1 + seed);
        let mut words = Vec::new();
        for (i, (rep, value)) in opened.iter().enumerate() {
            let width = match rep {
                Rep::Ring { width } => u32::from(*width),
                Rep::Bits { .. } => 8,
            };
            words.push((value[0], width));
            for (other, before) in &opened[..i] {
                if other == rep {
                    words.push((difference(*rep, value[0], before[0]), width));
                }
            }
        }
        counts.resize(words.len(), [0; 64]);
        widths = words.iter().map(|(_, width)| *width).collect();
        for (count, (word, _)) in counts.iter_mut().zip(&words) {
            for (bit, count) in count.iter_mut().enumerate() {
                *count += (word >> bit & 1) as u32;
            }
        }
    }
    let sigma = (runs as f64).sqrt() / 2.0;
    let bits = counts
        .iter()
        .zip(&widths)
        .flat_map(|(count, width)| &count[..*width as usize]);
    bits.map(|count| (f64::from(*count) - runs as f64 / 2.0).abs() / sigma)
        .fold(0.0, f64::max)
}

#[test]
fn opened_values_are_uniform_over_many_seeds_and_a_reused_mask_is_not() {
    println!("seeds from {SEED}");
    const RUNS: u64 = 400;
    // Some 10,000 bits are looked at: 6 standard deviations happen once in 50,000 such tests.
    const LIMIT: f64 = 6.0;
    for program in programs().iter().filter(|p| {
        ["relu and backward", "lookup", "pool", "pooled relu"].contains(&p.name.as_str())
    }) {
        let profile = match program.name.as_str() {
            "pooled relu" => Profile::ROUNDS,
            _ => Profile::BYTES,
        };
        let plan = Plan::lowered(program, profile);
        for inputs in two_inputs(program) {
            let worst = deviation(&plan, &inputs, RUNS);
            assert!(
                worst < LIMIT,
                "{}: {worst} standard deviations",
                program.name
            );
        }
    }
    let tensor = Tensor::new(vec![N], (0..N as u64).collect());
    let inputs = BTreeMap::from([("x".to_string(), tensor.clone()), ("y".to_string(), tensor)]);
    let worst = deviation(&reused_mask(), &inputs, RUNS);
    assert!(
        worst > LIMIT,
        "a reused mask was not seen: {worst} standard deviations"
    );
}
