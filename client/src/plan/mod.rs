//! `trefoil plan`: what one step of a network costs, by layer and in total, before anything runs.

mod activations;

use std::time::Instant;

use anyhow::{Result, anyhow};
use serde::Serialize;
use trefoil_cluster::Link;
use trefoil_models::cost::{self, Work};
use trefoil_models::job::{PredictOutput, TrainSpec};
use trefoil_models::memory::PartyBytes;
use trefoil_models::neighbours::Queries;
use trefoil_models::programs::{self, Format};
use trefoil_models::{Benchmark, DatasetRef, JobKind, NeighbourSpec, Network, Schedule, schedule};
use trefoil_protocol::plan::{Cost, LayerCost, LinkProfile, Plan, Profile};
use trefoil_protocol::prg::{Domain, Pos, Prg};
use trefoil_protocol::ring::kernel::{Acc, gemm};

use trefoil_transport::Settings;

use crate::bench::buffers;
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
    #[serde(flatten)]
    session: Session,
    /// The same step if few bytes had been chosen, where few rounds were.
    #[serde(skip_serializing_if = "Option::is_none")]
    few_bytes: Option<Layer>,
}

/// A session of equal steps.
#[derive(Debug, Serialize)]
struct Session {
    /// For which values the plan saves rounds on this link; bytes for all others.
    profile: Profile,
    #[serde(flatten)]
    total: Layer,
    /// Bytes that opening the weights costs once in a session (predictions only).
    #[serde(skip_serializing_if = "Option::is_none")]
    setup_bytes_sent_per_party: Option<u64>,
    /// Largest memory of a party in a session of such steps, weights and their openings with it:
    /// tensors alone.
    party_tensor_bytes: u64,
    /// .. and the whole process, within a quarter.
    party_process_bytes: u64,
    layers: Vec<Layer>,
}

impl Session {
    fn of(step: &Plan, setup: Option<&Plan>, memory: PartyBytes, speeds: &Speeds) -> Session {
        let cost = step.cost();
        let total = speeds.layer(total(&cost));
        let layers = cost.layers.into_iter();
        Session {
            profile: step.profile,
            total,
            setup_bytes_sent_per_party: setup.map(|plan| plan.cost().bytes_sent_per_party),
            party_tensor_bytes: memory.tensors,
            party_process_bytes: memory.process,
            layers: layers.map(|layer| speeds.layer(layer)).collect(),
        }
    }
}

/// A layer's cost and its part of the time.
#[derive(Debug, Serialize)]
struct Layer {
    #[serde(flatten)]
    cost: LayerCost,
    estimated_seconds: f64,
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
    if args.compare_activations {
        return activations::compare(&network, &spec, work, args);
    }
    let link = args.link.profile();
    if let (Some(k), Some(train_rows)) = (args.knn, args.train_rows) {
        return neighbours(args, &network, k, train_rows);
    }
    let plan = cost::plan(&network, &spec, work, link)?;
    let setup = match work {
        Work::Train => None,
        _ => Some(cost::plan(&network, &spec, Work::Setup, link)?),
    };
    let speeds = Speeds::of(args.link);
    let few_bytes = if plan.profile == Profile::BYTES {
        None
    } else {
        let plan = cost::plan(&network, &spec, work, LinkProfile::default())?;
        Some(speeds.layer(total(&plan.cost())))
    };
    let memory = memory(&network, &spec, args.train, link)?;
    let report = Report {
        network: network.name.clone(),
        work: if args.train { "train" } else { "predict" },
        batch: args.batch,
        session: Session::of(&plan, setup.as_ref(), memory, &speeds),
        few_bytes,
    };
    show(&report, args)
}

/// What classifying a batch of images by their nearest rows costs.
fn neighbours(args: &PlanArgs, network: &Network, k: usize, train_rows: usize) -> Result<()> {
    let spec = NeighbourSpec {
        dataset: DatasetRef {
            name: "planned".into(),
            train_rows,
            test_rows: 0,
            snapshot: [0; 32],
        },
        input: network.input,
        classes: network.classes,
        k,
        frac_bits: args.frac_bits,
        ring_bits: args.ring_bits,
        queries: Queries::Upload {
            rows: args.batch,
            upload: "planned".into(),
        },
    };
    let schedule = schedule(&JobKind::Neighbours(spec))?;
    let link = args.link.profile();
    let plans = plans(&schedule, link);
    let memory = PartyBytes::of(&schedule, &plans, buffers(&Settings::default()));
    // The set-up, then batches of equal size.
    let (setup, batch) = (&plans[0], &plans[1]);
    let batches = schedule.steps.len() - 1;
    let report = Report {
        network: format!("{k} nearest of {train_rows} rows"),
        work: "knn",
        batch: args.batch.div_ceil(batches),
        session: Session::of(batch, Some(setup), memory, &Speeds::of(args.link)),
        few_bytes: None,
    };
    show(&report, args)
}

fn plans(schedule: &Schedule, link: LinkProfile) -> Vec<Plan> {
    let programs = schedule.programs.iter();
    programs
        .map(|program| Plan::for_link(program, link))
        .collect()
}

/// A party's memory in a session: set-up and a step, or a training step, from initial weights.
fn memory(
    network: &Network,
    spec: &TrainSpec,
    train: bool,
    link: LinkProfile,
) -> Result<PartyBytes> {
    let (batch, network) = (spec.batch, network.to_toml());
    let work = match train {
        true => Benchmark::Train { network, batch },
        false => Benchmark::Infer { network, batch },
    };
    let schedule = schedule(&JobKind::Benchmark {
        work,
        repetitions: 1,
        frac_bits: spec.frac_bits,
        ring_bits: spec.ring_bits,
    })?;
    let plans = plans(&schedule, link);
    Ok(PartyBytes::of(
        &schedule,
        &plans,
        buffers(&Settings::default()),
    ))
}

/// About how long one run of a plan takes, in seconds.
pub fn estimated_seconds(cost: &Cost, link: Link) -> f64 {
    Speeds::of(link).layer(total(cost)).estimated_seconds
}

/// What the estimate multiplies with.
struct Speeds {
    rtt_s: f64,
    bytes_per_s: f64,
    macs_per_s: f64,
    words_per_s: f64,
}

impl Speeds {
    fn of(link: Link) -> Speeds {
        let (rtt_s, bytes_per_s) = match link {
            Link::Loopback => (0.0, LAN_BYTES_PER_S),
            Link::Emulated { rtt_ms, mbit_per_s } => (rtt_ms / 1e3, mbit_per_s * 1e6 / 8.0),
        };
        let (macs_per_s, words_per_s) = speeds();
        Speeds {
            rtt_s,
            bytes_per_s,
            macs_per_s,
            words_per_s,
        }
    }

    /// Seconds if every party has a core like this one: compute, bytes and round trips one after
    /// the other, which is what a step does without overlap.
    fn seconds(&self, macs: u64, words: u64, sent: u64, dealt: u64, rounds: u64) -> f64 {
        let compute = macs as f64 / self.macs_per_s + words as f64 / self.words_per_s;
        // Each party sends half of its bytes on each of its two links; one way is half a round trip.
        let sent = sent as f64 / 2.0 / self.bytes_per_s;
        let dealt = dealt as f64 / 3.0 / self.bytes_per_s;
        compute + sent.max(dealt) + rounds as f64 * (self.rtt_s / 2.0 + ROUND_S)
    }

    fn layer(&self, cost: LayerCost) -> Layer {
        let estimated_seconds = self.seconds(
            cost.multiply_adds,
            cost.prg_words_per_party,
            cost.bytes_sent_per_party,
            cost.dealer_bytes,
            cost.rounds,
        );
        Layer {
            cost,
            estimated_seconds,
        }
    }
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

/// A whole step as one layer.
fn total(cost: &Cost) -> LayerCost {
    LayerCost {
        name: "total".into(),
        rounds: cost.rounds,
        bytes_sent_per_party: cost.bytes_sent_per_party,
        dealer_bytes: cost.dealer_bytes,
        multiply_adds: cost.multiply_adds,
        comparisons: cost.comparisons,
        prg_words_per_party: cost.prg_words_per_party,
        peak_memory_bytes: cost.peak_memory_bytes,
    }
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

/// A line for each layer, under `head`.
fn table<'a>(head: &str, layers: impl Iterator<Item = &'a Layer>) {
    let row = |name: &str, columns: [String; 7]| {
        print!("{name:<12}");
        for (column, width) in columns.iter().zip([7, 13, 11, 15, 12, 11, 9]) {
            print!(" {column:>width$}");
        }
        println!();
    };
    let heads = [
        "rounds",
        "sent a party",
        "dealt",
        "multiply-adds",
        "comparisons",
        "peak",
        "seconds",
    ];
    row(head, heads.map(String::from));
    for Layer {
        cost,
        estimated_seconds,
    } in layers
    {
        row(
            &cost.name,
            [
                cost.rounds.to_string(),
                bytes(cost.bytes_sent_per_party),
                bytes(cost.dealer_bytes),
                cost.multiply_adds.to_string(),
                cost.comparisons.to_string(),
                bytes(cost.peak_memory_bytes),
                format!("{estimated_seconds:.3}"),
            ],
        );
    }
}

/// How seconds are to be read.
fn estimate_note(link: Link) {
    println!("seconds are an estimate for the link {link}, every party on a core like this one");
}

fn show(report: &Report, args: &PlanArgs) -> Result<()> {
    match args.json {
        true => println!("{}", serde_json::to_string(report)?),
        false => print(report, args.link),
    }
    Ok(())
}

fn print(report: &Report, link: Link) {
    let session = &report.session;
    println!(
        "{} {}, {} image(s) a step",
        report.network, report.work, report.batch
    );
    table("layer", session.layers.iter().chain([&session.total]));
    println!("layers share rounds and memory: the total is not their sum");
    if let Some(setup) = session.setup_bytes_sent_per_party {
        println!(
            "opening the weights (or rows), once in a session: {} sent a party",
            bytes(setup)
        );
    }
    println!(
        "memory of a party: {} of tensors, weights and their openings with them; {} the whole process, within a quarter",
        bytes(session.party_tensor_bytes),
        bytes(session.party_process_bytes)
    );
    if let Some(few_bytes) = &report.few_bytes {
        println!(
            "lowered for {} on this link; for few bytes: {} rounds, {} sent a party, {} dealt, {:.3} s",
            session.profile,
            few_bytes.cost.rounds,
            bytes(few_bytes.cost.bytes_sent_per_party),
            bytes(few_bytes.cost.dealer_bytes),
            few_bytes.estimated_seconds,
        );
    }
    estimate_note(link);
}
