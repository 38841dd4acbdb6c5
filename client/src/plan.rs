//! `trefoil plan`: what one step of a network costs, by layer and in total, before anything runs.

use std::time::Instant;

use anyhow::{Result, anyhow};
use serde::Serialize;
use trefoil_cluster::Link;
use trefoil_models::cost::{self, Work};
use trefoil_models::job::{PredictOutput, TrainSpec};
use trefoil_models::programs::{self, Format};
use trefoil_protocol::plan::{Cost, LayerCost};
use trefoil_protocol::prg::{Domain, Pos, Prg};
use trefoil_protocol::ring::kernel::{Acc, gemm};

use crate::cli::PlanArgs;
use crate::experiment::read_network;

/// Loopback's goodput for one of several connections on one machine, in bytes a second; only for
/// the estimate under `--link lan`.
const LAN_BYTES_PER_S: f64 = 0.25e9;
/// A round's cost beside the link's round trip: wake-ups and system calls, in seconds.
const ROUND_S: f64 = 150e-6;

/// What is printed, also as JSON.
#[derive(Debug, Serialize)]
pub struct Report {
    network: String,
    work: &'static str,
    batch: usize,
    rounds: u64,
    bytes_sent_per_party: u64,
    dealer_bytes: u64,
    multiply_adds: u64,
    comparisons: u64,
    peak_memory_bytes: u64,
    estimated_seconds: f64,
    /// Bytes that opening the weights costs once in a session (predictions only).
    #[serde(skip_serializing_if = "Option::is_none")]
    setup_bytes_sent_per_party: Option<u64>,
    layers: Vec<LayerCost>,
}

/// Parses what a prediction reveals.
pub fn parse_output(text: &str) -> Result<PredictOutput, String> {
    match text {
        "class" => Ok(PredictOutput::Class),
        "probabilities" => Ok(PredictOutput::Probabilities),
        "logits" => Ok(PredictOutput::Logits),
        other => Err(format!("{other:?} is none of class, probabilities, logits")),
    }
}

/// Runs the command.
pub fn run(args: &PlanArgs) -> Result<()> {
    let network = read_network(&args.network)?;
    let spec = TrainSpec {
        batch: args.batch,
        momentum: args.momentum,
        learning_rate: 1.0 / 32.0,
        frac_bits: args.frac_bits,
        ring_bits: args.ring_bits,
        ..TrainSpec::default()
    };
    let work = if args.train {
        Work::Train
    } else {
        Work::Predict(args.output)
    };
    if args.text {
        let format = Format {
            frac_bits: spec.frac_bits,
            ring_bits: spec.ring_bits,
        };
        let program = match work {
            Work::Train => programs::train(&network, &spec, spec.learning_rate),
            _ => programs::predict(&network, format, spec.batch, args.output),
        };
        print!("{}", program.map_err(|error| anyhow!(error))?);
        return Ok(());
    }
    let total = cost::report(&network, &spec, work)?;
    let setup = match work {
        Work::Train => None,
        _ => Some(cost::report(&network, &spec, Work::Setup)?.bytes_sent_per_party),
    };
    let report = Report {
        network: network.name.clone(),
        work: if args.train { "train" } else { "predict" },
        batch: args.batch,
        rounds: total.rounds,
        bytes_sent_per_party: total.bytes_sent_per_party,
        dealer_bytes: total.dealer_bytes,
        multiply_adds: total.multiply_adds,
        comparisons: total.comparisons,
        peak_memory_bytes: total.peak_memory_bytes,
        estimated_seconds: estimate(&total, args.link),
        setup_bytes_sent_per_party: setup,
        layers: total.layers,
    };
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print(&report, args.link);
    }
    Ok(())
}

/// Seconds of one step if every party has a core like this one: compute, bytes and round trips
/// one after the other, which is what a step does without overlap.
fn estimate(cost: &Cost, link: Link) -> f64 {
    let (rtt_s, bytes_per_s) = match link {
        Link::Loopback => (0.0, LAN_BYTES_PER_S),
        Link::Emulated { rtt_ms, mbit_per_s } => (rtt_ms / 1e3, mbit_per_s * 1e6 / 8.0),
    };
    let (macs_per_s, words_per_s) = speeds();
    let compute =
        cost.multiply_adds as f64 / macs_per_s + cost.prg_words_per_party as f64 / words_per_s;
    // Each party sends half of its bytes on each of its two links; one way is half a round trip.
    let bytes = cost.bytes_sent_per_party as f64 / 2.0 / bytes_per_s;
    let dealt = cost.dealer_bytes as f64 / 3.0 / bytes_per_s;
    compute + bytes.max(dealt) + cost.rounds as f64 * (rtt_s / 2.0 + ROUND_S)
}

/// Multiply-adds and stream words a second of one core here.
fn speeds() -> (f64, f64) {
    let n = 192;
    let (a, b) = (vec![3u64; n * n], vec![5u64; n * n]);
    let mut c = vec![0u64; n * n];
    gemm(Acc::Set, n, n, n, &a, false, &b, false, &mut c);
    let start = Instant::now();
    for _ in 0..4 {
        gemm(Acc::Set, n, n, n, &a, false, &b, false, &mut c);
    }
    let macs = 4.0 * (n * n * n) as f64 / start.elapsed().as_secs_f64();
    let mut words = vec![0u64; 1 << 18];
    let start = Instant::now();
    Prg::new([0; 16]).fill(
        Pos {
            step: 0,
            id: 0,
            domain: Domain::Ring,
        },
        0,
        &mut words,
    );
    (macs, words.len() as f64 / start.elapsed().as_secs_f64())
}

/// A number of bytes for people.
pub fn bytes(n: u64) -> String {
    match n {
        0..1_000 => format!("{n} B"),
        1_000..1_000_000 => format!("{:.1} kB", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}

fn print(report: &Report, link: Link) {
    println!(
        "{} {}, {} image(s) a step",
        report.network, report.work, report.batch
    );
    println!(
        "{:<16} {:>7} {:>14} {:>12} {:>16} {:>12}",
        "layer", "rounds", "sent a party", "dealt", "multiply-adds", "comparisons"
    );
    for layer in &report.layers {
        println!(
            "{:<16} {:>7} {:>14} {:>12} {:>16} {:>12}",
            layer.name,
            layer.rounds,
            bytes(layer.bytes_sent_per_party),
            bytes(layer.dealer_bytes),
            layer.multiply_adds,
            layer.comparisons
        );
    }
    println!(
        "{:<16} {:>7} {:>14} {:>12} {:>16} {:>12}",
        "total",
        report.rounds,
        bytes(report.bytes_sent_per_party),
        bytes(report.dealer_bytes),
        report.multiply_adds,
        report.comparisons
    );
    println!("layers share rounds: the total is not their sum");
    if let Some(setup) = report.setup_bytes_sent_per_party {
        println!(
            "opening the weights, once in a session: {} sent a party",
            bytes(setup)
        );
    }
    println!(
        "peak memory of tensors at a party: {}",
        bytes(report.peak_memory_bytes)
    );
    println!(
        "estimated time on {link}: {:.3} s",
        report.estimated_seconds
    );
}
