//! Every operation between three party processes and a dealer process over QUIC: what the parties
//! hold equals the plain run bit for bit, in both rings, and what was counted equals the plans.
//!
//! The programs are `tests/src/operations.rs`, the processes `trefoil-operations-node`. Certificates
//! are made fresh; everything else that is random comes from the seed that is printed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use trefoil_cluster::{Cluster, ClusterSpec, NodeName};
use trefoil_protocol::Tensor;
use trefoil_protocol::program::{Linear, Op, Product, Rounding, Sink};
use trefoil_protocol::run::memory::test_coins;
use trefoil_protocol::run::party::reconstruct;
use trefoil_protocol::run::plain;
use trefoil_tests::operations::{Case, SEED_VARIABLE, cases};
use trefoil_tests::report::{FILE, NodeReport, ShareReport};

const SEED: u64 = 20_261_122;
/// The four processes together.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn every_operation_over_quic_equals_the_plain_run_in_the_64_bit_ring() {
    secure_equals_plain(64);
}

#[test]
fn every_operation_over_quic_equals_the_plain_run_in_the_48_bit_ring() {
    secure_equals_plain(48);
}

fn secure_equals_plain(ring_bits: u8) {
    let seed = SEED ^ u64::from(ring_bits);
    println!("seed {seed}, ring {ring_bits}");
    let cases = cases(seed, ring_bits).expect("the programs are valid");
    let expected = plain_steps(&cases, seed);
    let reports = run(seed, ring_bits);

    let mut compared = 0;
    for (step, (case, expected)) in cases.iter().zip(&expected).enumerate() {
        let name = &case.program.name;
        let place = format!("seed {seed}, ring {ring_bits}, step {step} ({name})");
        let shares = [0, 1, 2].map(|party: usize| &reports[party].steps[step]);
        let revealed = combine(shares.map(|step| &step.revealed[..]), ring_bits, &place);
        let carried = combine(shares.map(|step| &step.carried[..]), ring_bits, &place);
        compared += compare(&revealed, &expected.revealed, &place);
        compared += compare(&carried, &expected.carried, &place);
    }
    println!("{} programs, {compared} elements compared", cases.len());
    // Every output of every program is among them: none is lost on both sides.
    let outputs = cases.iter().flat_map(|case| {
        let program = &case.program;
        program
            .outputs
            .iter()
            .map(|output| program.ty(output.val).len())
    });
    assert_eq!(compared, outputs.sum::<usize>());
    counted_equals_planned(&cases, &reports);
}

/// What a step should give.
struct Expected {
    revealed: BTreeMap<String, Tensor>,
    carried: BTreeMap<String, Tensor>,
}

fn plain_steps(cases: &[Case], seed: u64) -> Vec<Expected> {
    let coins = test_coins(seed);
    let mut state = BTreeMap::new();
    let mut one = |(step, case): (usize, &Case)| {
        let Case { program, .. } = case;
        state.extend(case.initial.clone());
        let revealed = plain::run(program, step as u64, &mut state, &case.inputs, Some(&coins));
        let revealed = revealed
            .unwrap_or_else(|error| panic!("seed {seed}, step {step} ({}): {error}", program.name));
        let carried = program
            .outputs
            .iter()
            .filter(|output| matches!(output.sink, Sink::Carry | Sink::CarryMasked))
            .map(|output| (output.name.clone(), state[&output.name].clone()))
            .collect();
        Expected { revealed, carried }
    };
    cases.iter().enumerate().map(&mut one).collect()
}

/// Rounds, frames and bytes that the transport counted, against the sums of all plans.
fn counted_equals_planned(cases: &[Case], reports: &[NodeReport; 4]) {
    let [parties @ .., dealer] = reports;
    let costs: Vec<_> = cases.iter().map(|case| case.plan().cost()).collect();
    let rounds: u64 = costs.iter().map(|cost| cost.rounds).sum();
    let sent: u64 = costs.iter().map(|cost| cost.bytes_sent_per_party).sum();
    let dealt: u64 = costs.iter().map(|cost| cost.dealer_bytes).sum();
    println!("{rounds} rounds, {sent} bytes sent by a party, {dealt} by the dealer");
    for (party, report) in parties.iter().enumerate() {
        let frames: u64 = report.sent_frames.iter().sum();
        let bytes: u64 = report.sent_bytes.iter().sum();
        assert_eq!(report.rounds, rounds, "rounds of party {party}");
        assert_eq!(frames, 2 * rounds, "frames that party {party} sent");
        assert_eq!(bytes, sent, "bytes that party {party} sent");
    }
    assert_eq!(dealer.sent_bytes.iter().sum::<u64>(), dealt, "dealer bytes");
    let taken: u64 = parties.iter().map(|report| report.received_bytes[3]).sum();
    assert_eq!(taken, dealt, "bytes that the parties took of the dealer");
}

/// Runs all cases between four processes; what the parties and the dealer wrote down.
fn run(seed: u64, ring_bits: u8) -> [NodeReport; 4] {
    let mut spec = ClusterSpec::of(env!("CARGO_BIN_EXE_trefoil-operations-node"));
    spec.ring_bits = ring_bits;
    spec.settings.round_timeout_ms = 20_000;
    spec.env.insert(SEED_VARIABLE.into(), seed.to_string());
    let cluster = Cluster::start(&spec).expect("the nodes start");
    let deadline = Instant::now() + LIMIT;
    let mut failed = Vec::new();
    for node in NodeName::ALL {
        let left = deadline.saturating_duration_since(Instant::now());
        match cluster.wait(node, left).expect("a child can be waited for") {
            Some(status) if status.success() => {}
            Some(status) => failed.push(format!(
                "{node} ended ({status})\n{}",
                cluster.log_tail(node)
            )),
            None => failed.push(format!("{node} runs on\n{}", cluster.log_tail(node))),
        }
    }
    assert!(failed.is_empty(), "seed {seed}: {}", failed.join("\n"));
    let report = |node| {
        let file = cluster.node_home(node).join(FILE);
        let bytes = std::fs::read(&file).unwrap_or_else(|error| panic!("{file:?}: {error}"));
        serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{file:?}: {error}"))
    };
    NodeName::ALL.map(report)
}

/// The values that three parties' shares stand for.
fn combine(shares: [&[ShareReport]; 3], ring_bits: u8, place: &str) -> BTreeMap<String, Tensor> {
    let [a, b, c] = shares;
    assert!(
        a.len() == b.len() && b.len() == c.len(),
        "{place}: one list is longer"
    );
    let value = |at: usize| {
        let outputs = [&a[at], &b[at], &c[at]].map(|share| {
            share
                .output()
                .unwrap_or_else(|error| panic!("{place}: {error}"))
        });
        let value = reconstruct(&outputs, ring_bits);
        let value = value.unwrap_or_else(|error| panic!("{place}: {error}"));
        (a[at].name.clone(), value)
    };
    (0..a.len()).map(value).collect()
}

/// Compares names, shapes and every element; the number of elements.
fn compare(
    got: &BTreeMap<String, Tensor>,
    expected: &BTreeMap<String, Tensor>,
    place: &str,
) -> usize {
    let names = |of: &BTreeMap<String, Tensor>| of.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(got), names(expected), "{place}");
    for (name, expected) in expected {
        let got = &got[name];
        assert_eq!(got.shape(), expected.shape(), "{place}, {name}");
        let wrong = (0..expected.len()).find(|i| got.data()[*i] != expected.data()[*i]);
        if let Some(i) = wrong {
            let (got, expected) = (got.data()[i] as i64, expected.data()[i] as i64);
            panic!("{place}, {name}, element {i}: secure {got}, plain {expected}");
        }
    }
    expected.values().map(Tensor::len).sum()
}

/// Names of all variants, and of the variant of a value. A variant that is missing here does not
/// compile, one that no case uses fails the test below.
macro_rules! variants {
    ($all:ident, $name:ident, $kind:ident: $($variant:ident)+) => {
        const $all: &[&str] = &[$(stringify!($variant)),+];
        fn $name(value: &$kind) -> &'static str {
            match value {
                $($kind::$variant { .. } => stringify!($variant)),+
            }
        }
    };
}

variants!(OPS, op_name, Op:
    Input Carried CarriedMasked Const Linear AddConst Rescale Reshape Dropout Product Powers Trunc
    ReluTrunc BitTrunc NonNegative AtLeast BitMul BitDot BitToRing MaxPool PoolSelect ArgMax Lookup);
variants!(LINEAR, linear_name, Linear:
    Add Sub AddEach Scale ScaleEach Transpose Sum Broadcast Slice Concat Window Scatter SumPool SumPoolGrad Pairs);
variants!(PRODUCTS, product_name, Product: MatMul Conv ConvGradInput ConvGradWeight Mul Grouped Channel);
variants!(SINKS, sink_name, Sink: Carry CarryMasked Reveal RevealIndex);
variants!(ROUNDINGS, rounding_name, Rounding: Floor Nearest Stochastic);

/// Maps that only plans have: every maximum and every argmax is made of them.
const OF_PLANS: [&str; 2] = ["Window", "Pairs"];

fn used(cases: &[Case]) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    for case in cases {
        for output in &case.program.outputs {
            used.insert(format!("sink {}", sink_name(&output.sink)));
        }
        for node in &case.program.nodes {
            let name = op_name(&node.op);
            used.insert(format!("operation {name}"));
            match &node.op {
                Op::Linear(map) => used.insert(format!("linear {}", linear_name(map))),
                Op::Product(product) => used.insert(format!("product {}", product_name(product))),
                Op::Trunc { rounding, .. }
                | Op::ReluTrunc { rounding, .. }
                | Op::BitTrunc { rounding, .. } => {
                    used.insert(format!("{name} {}", rounding_name(rounding)))
                }
                _ => false,
            };
        }
    }
    used
}

#[test]
fn no_operation_rounding_or_sink_is_left_out() {
    let names = |kind: &str, all: &[&str]| {
        let name = |name: &&str| format!("{kind} {name}");
        all.iter().map(name).collect::<BTreeSet<String>>()
    };
    let mut all = names("operation", OPS);
    all.extend(names("linear", LINEAR));
    all.extend(names("product", PRODUCTS));
    all.extend(names("sink", SINKS));
    for rounded in ["Trunc", "ReluTrunc", "BitTrunc"] {
        all.extend(names(rounded, ROUNDINGS));
    }
    for name in names("linear", &OF_PLANS) {
        assert!(all.remove(&name), "{name}");
    }
    for ring_bits in [64, 48] {
        let used = used(&cases(SEED, ring_bits).expect("the programs are valid"));
        let missing: Vec<_> = all.difference(&used).collect();
        assert!(
            missing.is_empty(),
            "ring {ring_bits}: no case has {missing:?}"
        );
    }
}

/// Composites leave no name in a program, so their names are looked for in the text of the cases.
#[test]
fn no_method_of_the_builder_is_left_out() {
    let builder = [
        include_str!("../../../protocol/src/program/builder.rs"),
        include_str!("../../../protocol/src/program/bilinear.rs"),
        include_str!("../../../protocol/src/op/composite.rs"),
        include_str!("../../../protocol/src/op/inverse_sqrt.rs"),
    ];
    let cases = [
        include_str!("../../src/operations.rs"),
        include_str!("../../src/operations/arithmetic.rs"),
        include_str!("../../src/operations/selection.rs"),
        include_str!("../../src/operations/composites.rs"),
    ]
    .concat();
    let methods: Vec<&str> = builder
        .iter()
        .flat_map(|text| text.split("pub fn ").skip(1))
        .filter(|text| {
            let arguments = text.split_once('(').map_or("", |(_, rest)| rest);
            arguments.trim_start().starts_with("&mut self")
        })
        .filter_map(|text| text.split('(').next())
        .collect();
    for known in ["matmul", "lookup", "softmax"] {
        assert!(methods.contains(&known), "{known} is not among {methods:?}");
    }
    let missing: Vec<_> = methods
        .iter()
        .filter(|method| !cases.contains(&format!("b.{method}(")))
        .collect();
    assert!(missing.is_empty(), "no case calls {missing:?}");
}
