//! The `trefoil` command line. Results go to stdout, logs and progress to stderr.
//! Exit codes: 0 success, 1 failure (the reason is on stderr), 2 wrong usage, 141 nobody reads stdout
//! any more.

use std::any::Any;
use std::panic::{self, AssertUnwindSafe};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use trefoil_cluster::Link;
use trefoil_consortium::{DealerConfig, PartyConfig};
use trefoil_transport::Protocol;

use crate::{bench, consent, operate, plan, ranges, simulate};

/// Three institutions train and evaluate image classifiers on pictures that none of them may see.
#[derive(Debug, Parser)]
#[command(name = "trefoil", version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a whole experiment on this machine: three party processes and a dealer process on
    /// loopback, hospitals that share their images, training, evaluation, predictions.
    Simulate(SimulateArgs),
    /// Show what a network costs before anything runs: rounds, bytes, memory, time, by layer.
    Plan(PlanArgs),
    /// Run training steps in the clear on public or synthetic data, and show how near each layer comes
    /// to the bounds of the number format. Exit code 1 if a bound is broken.
    CheckRanges(ranges::RangesArgs),
    /// Measure this machine: seconds, rounds, bytes and memory of known pieces of work, with real
    /// nodes on loopback, and how near they are to the least that the work can take here.
    Bench(BenchArgs),
    /// Make a key, a configuration file and a public card for one institution.
    Init(operate::InitArgs),
    /// Make, change and show a consortium file: who takes part, and by which public key.
    Consortium(operate::ConsortiumArgs),
    /// Check keys, files, clock, port, disk and every node that this home has to do with.
    Doctor(operate::DoctorArgs),
    /// Show how the nodes are: round trips, links, jobs, disk, the last error.
    Status(operate::StatusArgs),
    /// At a party's host: let a job run that waits for approval there, or turn it down.
    Approve(consent::ApproveArgs),
    /// At a party's host: list the jobs that are held, wait, run or are over.
    Jobs(consent::JobsArgs),
    /// At a party's host: end a job, also while it runs.
    Cancel(consent::CancelArgs),
    /// Check a party's audit log.
    #[command(subcommand)]
    Audit(consent::AuditCommand),
    /// Run one computing party's node.
    Party(NodeArgs),
    /// Run the dealer's node.
    Dealer(NodeArgs),
    /// As a hospital: split images and labels into shares and give one to each party.
    Share(operate::ShareArgs),
    /// Show what the three parties hold of a data set.
    Dataset(operate::DatasetArgs),
    /// As a hospital: have the three parties delete what this hospital shared with a data set.
    Withdraw(operate::WithdrawArgs),
    /// As a party's operator: list what lies in its store, by hospital and upload.
    Store(operate::StoreArgs),
    /// Train a network on a shared data set; the parties keep shares of the weights.
    Train(Box<operate::TrainArgs>),
    /// Judge a kept model by a data set's test split.
    Evaluate(operate::EvaluateArgs),
    /// Share images and open their classes, as a CSV table.
    Predict(operate::PredictArgs),
    /// Classify images by the nearest rows of a shared data set (k-nearest-neighbour), or judge that by
    /// its test split. Nothing is trained and no model is kept.
    Knn(operate::KnnArgs),
    /// Keep a session open in which members have images classified at once.
    Serve(operate::ServeArgs),
    /// List the models that the parties keep, show what is known of one, or remove one.
    Models(operate::ModelsArgs),
    /// Open a kept model's WEIGHTS to this member.
    RevealModel(operate::RevealArgs),
    /// Share weights (.onnx, .npz, .safetensors) with the parties, who keep them as a model that none
    /// of them sees.
    ImportModel(operate::ImportArgs),
    /// Show an ONNX model as a network file and weights, on this machine alone.
    ConvertModel(operate::ConvertArgs),
    /// Follow a job that this member submitted, and show its result.
    Watch(operate::WatchArgs),
}

/// Arguments of `trefoil simulate`.
#[derive(Debug, Args)]
pub struct SimulateArgs {
    /// The experiment file; without one the shipped quickstart (configs/quickstart.toml).
    pub experiment: Option<PathBuf>,
    /// Where the experiment's data is (IDX folder, .npz file, or folder of pictures).
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Train this network instead: a shipped name or a network file.
    #[arg(long, value_name = "NAME|FILE")]
    pub network: Option<String>,
    /// Train nothing: classify by the K nearest training rows, on the same data.
    #[arg(long, value_name = "K", conflicts_with_all = ["plain_only", "epochs", "json"])]
    pub knn: Option<usize>,
    /// The links between the nodes: lan (as fast as loopback is), wan (40 ms round trip,
    /// 300 Mbit/s), or rtt_ms=40,mbit_per_s=300.
    #[arg(long, default_value = "lan", value_name = "LINK")]
    pub link: Link,
    /// What the links run over: quic, or tcp, as where a network lets no UDP through.
    #[arg(long, default_value = "quic", value_name = "quic|tcp")]
    pub transport: Protocol,
    /// Write what was printed as one JSON object.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Seed of initial weights, batch order and the split among hospitals.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Number of epochs.
    #[arg(long)]
    pub epochs: Option<usize>,
    /// End training after this many steps, in whichever epoch that is.
    #[arg(long, value_name = "STEPS")]
    pub max_steps: Option<usize>,
    /// Run only the plaintext fixed-point reference and the floating-point twin: no nodes, no
    /// shares. For choosing hyper-parameters on public data.
    #[arg(long, conflicts_with_all = ["home", "link"])]
    pub plain_only: bool,
    /// Keep the nodes' folders (keys, logs, shares) here instead of a temporary folder.
    #[arg(long, value_name = "DIR")]
    pub home: Option<PathBuf>,
}

/// Arguments of `trefoil plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// A shipped network's name or a network file.
    #[arg(long, value_name = "NAME|FILE")]
    pub network: String,
    /// Images in a step.
    #[arg(long, default_value_t = 1)]
    pub batch: usize,
    /// A training step instead of a prediction.
    #[arg(long)]
    pub train: bool,
    /// Compare exact ReLU and its approximations in the place of the network's activations.
    #[arg(long, conflicts_with = "text")]
    pub compare_activations: bool,
    /// Classification by the K nearest rows instead of a prediction by the network, of which only the
    /// images' shape and the number of classes count.
    #[arg(long, value_name = "K", requires = "train_rows", conflicts_with_all = ["train", "momentum", "output", "text"])]
    pub knn: Option<usize>,
    /// With --knn: training rows of the data set.
    #[arg(long, value_name = "N", requires = "knn")]
    pub train_rows: Option<usize>,
    /// Momentum of the training step.
    #[arg(long, default_value_t = 0.0)]
    pub momentum: f64,
    /// What a prediction reveals: class, probabilities or logits.
    #[arg(long, default_value = "logits", value_parser = plan::parse_output)]
    pub output: trefoil_models::job::PredictOutput,
    /// The links, for the time estimate: lan, wan, or rtt_ms=40,mbit_per_s=300.
    #[arg(long, default_value = "lan", value_name = "LINK")]
    pub link: Link,
    /// Fraction bits.
    #[arg(long, default_value_t = 16)]
    pub frac_bits: u8,
    /// Ring bits: 64 or 48.
    #[arg(long, default_value_t = 64)]
    pub ring_bits: u8,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    /// Print the program that all nodes agree on instead of its cost.
    #[arg(long)]
    pub text: bool,
}

/// Arguments of `trefoil bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Measure this case only; may be given several times.
    #[arg(long = "case", value_name = "NAME")]
    pub cases: Vec<String>,
    /// Measure inference of this network instead: a shipped name or a network file. Images and
    /// weights are public noise; what comes out is held against the plain run, and the largest memory
    /// of a party against what `plan` says.
    #[arg(long, value_name = "NAME|FILE", conflicts_with_all = ["cases", "list"])]
    pub network: Option<String>,
    /// With --network: training steps instead.
    #[arg(long, requires = "network")]
    pub train: bool,
    /// With --network: images in one repetition.
    #[arg(long, requires = "network", default_value_t = 1)]
    pub batch: usize,
    /// Print the names of all cases, and do nothing else.
    #[arg(long)]
    pub list: bool,
    /// Write the figures as one JSON object.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// The links between the nodes: lan (as fast as loopback is), wan (40 ms round trip,
    /// 300 Mbit/s), or rtt_ms=40,mbit_per_s=300.
    #[arg(long, default_value = "lan", value_name = "LINK")]
    pub link: Link,
    /// What the links run over: quic or tcp.
    #[arg(long, default_value = "quic", value_name = "quic|tcp")]
    pub transport: Protocol,
    /// Largest UDP payload: 1200 to 6400. 4000 on loopback, 1452 on a link, where nothing is said.
    #[arg(long, value_name = "BYTES")]
    pub datagram_bytes: Option<u16>,
    /// Measured repetitions of every case, instead of each case's own number (1 with --network, where
    /// fewer than 5 are possible).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub repetitions: Option<u16>,
    /// Fraction bits.
    #[arg(long, default_value_t = 16)]
    pub frac_bits: u8,
    /// Ring bits: 64 or 48.
    #[arg(long, default_value_t = 64)]
    pub ring_bits: u8,
}

#[derive(Debug, Args)]
struct NodeArgs {
    /// The node's configuration file.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Started by another program: print the address bound, read the peers' addresses from
    /// standard input, and end when standard input ends.
    #[arg(long)]
    attached: bool,
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Simulate(args) => {
            simulate::run(&args)?;
            Ok(())
        }
        Command::Plan(args) => plan::run(&args),
        Command::CheckRanges(args) => ranges::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Init(args) => operate::init(&args),
        Command::Consortium(args) => operate::consortium(&args),
        Command::Doctor(args) => operate::doctor(&args),
        Command::Status(args) => operate::status(&args),
        Command::Share(args) => operate::share(&args),
        Command::Dataset(args) => operate::dataset(&args),
        Command::Withdraw(args) => operate::withdraw(&args),
        Command::Store(args) => operate::store(&args),
        Command::Train(args) => operate::train(&args),
        Command::Evaluate(args) => operate::evaluate(&args),
        Command::Predict(args) => operate::predict(&args),
        Command::Knn(args) => operate::knn(&args),
        Command::Serve(args) => operate::serve(&args),
        Command::Models(args) => operate::models(&args),
        Command::RevealModel(args) => operate::reveal_model(&args),
        Command::ImportModel(args) => operate::import_model(&args),
        Command::ConvertModel(args) => operate::convert_model(&args),
        Command::Watch(args) => operate::watch(&args),
        Command::Approve(args) => consent::approve(&args),
        Command::Jobs(args) => consent::jobs(&args),
        Command::Cancel(args) => consent::cancel(&args),
        Command::Audit(command) => consent::audit(&command),
        Command::Party(args) => trefoil_party::run(PartyConfig::load(&args.config)?, args.attached),
        Command::Dealer(args) => {
            trefoil_dealer::run(DealerConfig::load(&args.config)?, args.attached)
        }
    }
}

/// The exit code of a tool that SIGPIPE ends, as a shell shows it.
const STDOUT_CLOSED: u8 = 141;

/// Whether a panic is that of `println!` because whoever read stdout has ended, as in `trefoil plan |
/// head`. The standard library says it in these words alone.
fn is_stdout_closed(payload: &(dyn Any + Send)) -> bool {
    payload.downcast_ref::<String>().is_some_and(|said| {
        said.starts_with("failed printing to stdout") && said.contains("Broken pipe")
    })
}

/// Runs a command, which ends quietly where nobody reads stdout any more: what it started is ended and
/// cleared away as with any other end.
fn run_until_unread(command: Command) -> Option<Result<()>> {
    let loud = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !is_stdout_closed(info.payload()) {
            loud(info);
        }
    }));
    match panic::catch_unwind(AssertUnwindSafe(|| run(command))) {
        Ok(done) => Some(done),
        Err(payload) if is_stdout_closed(&*payload) => None,
        Err(payload) => panic::resume_unwind(payload),
    }
}

/// The tool's entry: parses the command line, runs the command, reports an error in one place.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run_until_unread(cli.command) {
        Some(Ok(())) => ExitCode::SUCCESS,
        Some(Err(error)) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
        None => STDOUT_CLOSED.into(),
    }
}
