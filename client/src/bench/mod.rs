//! `trefoil bench`: how fast the system is on this machine, with real processes, held against the
//! least that its work can take here ([`floor`]).
//!
//! Three parties and a dealer run as processes on this machine, fresh ones for every case; a
//! session is held open and the case repeated in it. Seconds are those between two results as the
//! requester sees them; the dealer may be at most ten repetitions ahead (two in queues, eight or
//! 64 KiB on their way), so that its work is inside the clock. Start-up is reported apart. With
//! `--network` any network is run, once, and its results are held against the plain run.

mod cases;
mod floor;
mod report;
mod serve;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use indicatif::ProgressBar;
use trefoil_cluster::{Cluster, ClusterSpec, NodeName, Usage, usage_of};
use trefoil_consortium::{Derived, JobDescription, random_bytes};
use trefoil_models::memory::{Buffers, PartyBytes};
use trefoil_models::plain_run::{self, Tables};
use trefoil_models::{Benchmark, JobKind, Phase, Step};
use trefoil_protocol::party::PartyId;
use trefoil_protocol::plan::Cost;
use trefoil_protocol::prg::Prg;
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::run::{DealerKeys, DealerState, deal_step};
use trefoil_protocol::transport::{CorrectionSink, NetError};
use trefoil_transport::Settings;

use crate::cli::BenchArgs;
use crate::follow::bar;
use crate::local;
use crate::remote::{Event, Part, Revealed, Upload};
use cases::{Case, Work};
use floor::Rates;
use report::HEAD;
pub use report::{Machine, PartyMemory, Report, Row};

/// Times and figures of a case before the floor.
struct Measured {
    seconds: Vec<f64>,
    /// Of several clients at the same time.
    per_second: Option<f64>,
    startup_seconds: f64,
    cpu_seconds: f64,
    peak_rss_bytes: u64,
    rounds: u64,
    bytes_sent_per_party: u64,
    dealer_bytes: u64,
    floor_seconds: f64,
    party_memory: Option<PartyMemory>,
}

/// Runs the command.
pub fn run(args: &BenchArgs) -> Result<()> {
    let all = match &args.network {
        Some(network) => vec![cases::of_network(network, args.train, args.batch)?],
        None => cases::all()?,
    };
    if args.network.is_none() && args.repetitions.is_some_and(|repetitions| repetitions < 5) {
        bail!("--repetitions: at least 5 where no --network is given");
    }
    if args.list {
        for case in &all {
            println!("{}", case.name);
        }
        return Ok(());
    }
    let names = || all.iter().map(|case| case.name.as_str());
    if let Some(unknown) = args.cases.iter().find(|name| !names().any(|n| n == *name)) {
        let names: Vec<&str> = names().collect();
        bail!(
            "--case {unknown}: there is none of this name; there are {}",
            names.join(", ")
        );
    }
    // Opened before anything runs: a wrong path must not cost a whole run.
    let json = match &args.json {
        Some(path) => {
            Some(File::create(path).with_context(|| format!("cannot write {}", path.display()))?)
        }
        None => None,
    };
    let mut settings = local::settings(args.link, args.transport);
    settings.datagram_bytes = args.datagram_bytes.unwrap_or(settings.datagram_bytes);
    settings.check()?;
    let rates = Rates::measure(&settings)?;
    println!("{}", rates.describe());
    let bench = Bench {
        args,
        settings,
        rates,
    };
    println!("{HEAD}");
    let mut rows = Vec::new();
    let chosen = |case: &&Case| args.cases.is_empty() || args.cases.contains(&case.name);
    for case in all.iter().filter(chosen) {
        let row = bench
            .row(case)
            .with_context(|| format!("case {}", case.name))?;
        println!("{}", row.line());
        if let Some(memory) = row.party_memory {
            println!("{}", memory.line());
        }
        if let Some(line) = row.served_line() {
            println!("{line}");
        }
        rows.push(row);
    }
    if let Some(mut file) = json {
        let report = Report {
            machine: bench.machine(),
            cases: rows,
        };
        serde_json::to_writer_pretty(&mut file, &report)?;
        writeln!(file)?;
    }
    Ok(())
}

struct Bench<'a> {
    args: &'a BenchArgs,
    settings: Settings,
    rates: Rates,
}

impl Bench<'_> {
    fn machine(&self) -> Machine {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = cpuinfo.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == "model name").then(|| value.trim().to_owned())
        });
        Machine {
            processor: name.unwrap_or_default(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: format!("{:?}", trefoil_protocol::ring::kernel::isa()),
            link: self.args.link.to_string(),
            ring_bits: self.args.ring_bits,
            rates: self.rates.clone(),
        }
    }

    fn row(&self, case: &Case) -> Result<Row> {
        let repetitions = self.args.repetitions.map_or(case.repetitions, usize::from);
        let length = match case.work {
            Work::Serve(clients) => clients * repetitions,
            _ => 1 + repetitions,
        };
        let bar = bar(length as u64, "repetitions");
        bar.set_message(case.name.clone());
        let measured = match &case.work {
            Work::Job(work) => self.job(work, repetitions, case.check, &bar),
            Work::Share(images) => self.share(*images, repetitions, &bar),
            Work::Dealer(work) => self.dealer(work, repetitions, &bar),
            Work::Serve(clients) => self.serve(*clients, repetitions, &bar),
        };
        bar.finish_and_clear();
        let mut measured = measured?;
        measured.seconds.sort_by(f64::total_cmp);
        let [Some(min), Some(max)] = [measured.seconds.first(), measured.seconds.last()] else {
            bail!("nothing was measured");
        };
        let below = |percent: usize| measured.seconds[(measured.seconds.len() - 1) * percent / 100];
        let seconds = measured.seconds[measured.seconds.len() / 2];
        let served = measured.per_second.is_some();
        Ok(Row {
            case: case.name.clone(),
            seconds,
            seconds_min: *min,
            seconds_max: *max,
            seconds_p95: served.then(|| below(95)),
            seconds_p99: served.then(|| below(99)),
            predictions_per_second: measured.per_second,
            repetitions: measured.seconds.len(),
            startup_seconds: measured.startup_seconds,
            rounds: measured.rounds,
            bytes_sent_per_party: measured.bytes_sent_per_party,
            dealer_bytes: measured.dealer_bytes,
            cpu_seconds: measured.cpu_seconds,
            peak_rss_bytes: measured.peak_rss_bytes,
            floor_seconds: measured.floor_seconds,
            floor_ratio: seconds / measured.floor_seconds,
            party_memory: measured.party_memory,
        })
    }

    fn kind(&self, work: &Benchmark, repetitions: usize) -> JobKind {
        JobKind::Benchmark {
            work: work.clone(),
            repetitions,
            frac_bits: self.args.frac_bits,
            ring_bits: self.args.ring_bits,
        }
    }

    /// A job whose requester is still to be named.
    fn describe(&self, kind: JobKind) -> Result<JobDescription> {
        let nobody = trefoil_transport::Pin::from_bytes([0; 32]);
        let job = JobDescription::new("benchmark", nobody, kind);
        let mut job = job.map_err(|reason| anyhow!(reason))?;
        job.link = self.args.link.profile();
        Ok(job)
    }

    fn cluster(&self, look_ahead_bytes: u64) -> Result<(Cluster, Settings)> {
        self.cluster_for(look_ahead_bytes, vec!["hospital-1".into()])
    }

    fn cluster_for(
        &self,
        look_ahead_bytes: u64,
        hospitals: Vec<String>,
    ) -> Result<(Cluster, Settings)> {
        let mut settings = self.settings.clone();
        settings.look_ahead_bytes = settings.look_ahead_bytes.min(look_ahead_bytes.max(1));
        let spec = ClusterSpec {
            link: self.args.link,
            settings: settings.clone(),
            hospitals,
            ring_bits: self.args.ring_bits,
            ..ClusterSpec::new()?
        };
        Ok((Cluster::start(&spec)?, settings))
    }

    /// A job of one repetition that is not counted and `repetitions` that are.
    fn job(
        &self,
        work: &Benchmark,
        repetitions: usize,
        check: bool,
        bar: &ProgressBar,
    ) -> Result<Measured> {
        let kind = self.kind(work, 1 + repetitions);
        let job = self.describe(kind)?;
        let derived = derive(&job)?;
        let cost = repeated_cost(&derived)?;
        let start = Instant::now();
        let (cluster, settings) = self.cluster(2 * cost.dealer_bytes / 3)?;
        let done = inside(self.watch(&cluster, &settings, job, work, start, bar));
        let (mut measured, outputs) = done.map_err(|error| local::blame(&cluster, error))?;
        if check {
            measured.party_memory = Some(party_memory(&cluster, &derived, &settings));
        }
        cluster.stop();
        if check {
            bar.set_message("the plain run");
            equals_plain(&derived, &outputs)?;
        }
        measured.rounds = cost.rounds;
        measured.bytes_sent_per_party = cost.bytes_sent_per_party;
        measured.dealer_bytes = cost.dealer_bytes;
        measured.floor_seconds = self.rates.floor_seconds(&cost);
        Ok(measured)
    }

    async fn watch(
        &self,
        cluster: &Cluster,
        settings: &Settings,
        mut job: JobDescription,
        work: &Benchmark,
        start: Instant,
        bar: &ProgressBar,
    ) -> Result<(Measured, Vec<Revealed>)> {
        let remote = local::connect(cluster, "analyst", settings).await?;
        job.requester = cluster.member("analyst")?.identity.pin()?;
        let id = remote.submit(job).await?;
        let reveals = matches!(work, Benchmark::Infer { .. });
        let mut startup_seconds = 0.0;
        let mut ends = Vec::new();
        let mut before = None;
        let result = remote
            .watch(id, &mut |event| {
                let ended = match event {
                    Event::Held { .. }
                    | Event::Approved { .. }
                    | Event::Waits { .. }
                    | Event::Interrupted(_) => false,
                    Event::Started { .. } => {
                        startup_seconds = start.elapsed().as_secs_f64();
                        false
                    }
                    Event::Progress(progress) => progress.phase == "benchmark" && !reveals,
                    Event::Output(_) => reveals,
                };
                if ended {
                    if ends.is_empty() {
                        before = cpu_seconds(cluster);
                    }
                    ends.push(Instant::now());
                    bar.inc(1);
                }
            })
            .await?;
        let after = cpu_seconds(cluster);
        remote.close().await;
        let seconds: Vec<f64> = ends
            .windows(2)
            .map(|ends| (ends[1] - ends[0]).as_secs_f64())
            .collect();
        let cpu = after
            .zip(before)
            .map_or(f64::NAN, |(after, before)| after - before);
        let measured = Measured {
            startup_seconds,
            per_second: None,
            cpu_seconds: cpu / seconds.len() as f64,
            peak_rss_bytes: peak_rss_bytes(cluster),
            seconds,
            rounds: 0,
            bytes_sent_per_party: 0,
            dealer_bytes: 0,
            floor_seconds: 0.0,
            party_memory: None,
        };
        Ok((measured, result.outputs))
    }

    /// A hospital that shares images again and again, each time with a new data set.
    fn share(&self, images: usize, repetitions: usize, bar: &ProgressBar) -> Result<Measured> {
        let start = Instant::now();
        let (cluster, settings) = self.cluster(u64::MAX)?;
        let done = inside(async {
            let remote = local::connect(&cluster, "hospital-1", &settings).await?;
            let startup_seconds = start.elapsed().as_secs_f64();
            let sent = || -> u64 {
                remote
                    .links()
                    .iter()
                    .map(|link| link.stats().sent_bytes)
                    .sum()
            };
            let own = || usage_of(std::process::id()).map_or(0.0, |usage| usage.cpu_s);
            let mut measured = Measured {
                startup_seconds,
                per_second: None,
                cpu_seconds: 0.0,
                peak_rss_bytes: 0,
                seconds: Vec::new(),
                rounds: 0,
                bytes_sent_per_party: 0,
                dealer_bytes: 0,
                floor_seconds: 0.0,
                party_memory: None,
            };
            let shape = [1, 28, 28];
            let words = shape.iter().product::<usize>();
            let (mut cpu, mut bytes) = (0.0, 0);
            for repetition in 0..=repetitions {
                let upload = Upload {
                    dataset: format!("bench-{repetition}"),
                    part: Part::Train,
                    images: Tensor::zeros(&[images, words]),
                    labels: Some(Tensor::zeros(&[images, 10])),
                    shape: shape.to_vec(),
                };
                if repetition == 1 {
                    cpu = own() + cpu_seconds(&cluster).unwrap_or(f64::NAN);
                    bytes = sent();
                }
                let start = Instant::now();
                remote.upload(upload, &mut |_| {}).await?;
                if repetition > 0 {
                    measured.seconds.push(start.elapsed().as_secs_f64());
                }
                bar.inc(1);
            }
            let count = measured.seconds.len() as f64;
            let now = own() + cpu_seconds(&cluster).unwrap_or(f64::NAN);
            measured.cpu_seconds = (now - cpu) / count;
            let sent = (sent() - bytes) as f64 / count;
            measured.bytes_sent_per_party = (sent / 3.0) as u64;
            measured.peak_rss_bytes = peak_rss_bytes(&cluster);
            // Two of three shares are streams, expanded at the hospital and at a party.
            let expanded = 4 * 8 * images * (words + 10);
            measured.floor_seconds =
                self.rates.link_seconds(sent as u64) + expanded as f64 / self.rates.prg_bytes_per_s;
            remote.close().await;
            Ok(measured)
        });
        let measured = done.map_err(|error: anyhow::Error| local::blame(&cluster, error))?;
        cluster.stop();
        Ok(measured)
    }

    /// The dealer's steps, the material counted and dropped.
    fn dealer(&self, work: &Benchmark, repetitions: usize, bar: &ProgressBar) -> Result<Measured> {
        let start = Instant::now();
        let job = self.describe(self.kind(work, 1 + repetitions))?;
        let derived = derive(&job)?;
        let cost = repeated_cost(&derived)?;
        let key = || {
            random_bytes()
                .map(Prg::new)
                .map_err(|reason| anyhow!(reason))
        };
        let keys = DealerKeys {
            parties: [key()?, key()?, key()?],
            coins: Some(key()?),
        };
        let own = || usage_of(std::process::id());
        let (mut state, mut sink) = (DealerState::default(), Dropped::default());
        let startup_seconds = start.elapsed().as_secs_f64();
        let mut seconds = Vec::new();
        let (mut before, mut bytes_dealt) = (None, 0);
        for (index, step) in derived.schedule.steps.iter().enumerate() {
            sink.bytes = 0;
            let start = Instant::now();
            let plan = &derived.plans[step.program];
            deal_step(plan, index as u64, &keys, &mut state, &mut sink)?;
            if !repeated(step) {
                continue;
            }
            match before {
                None => before = own(),
                Some(_) => seconds.push(start.elapsed().as_secs_f64()),
            }
            bytes_dealt = sink.bytes;
            bar.inc(1);
        }
        let after = own();
        let cpu = after
            .zip(before)
            .map_or(f64::NAN, |(after, before)| after.cpu_s - before.cpu_s);
        let dealer = Cost {
            multiply_adds: 0,
            bytes_sent_per_party: 0,
            dealer_bytes: 0,
            // The floor counts parties and dealer alike.
            prg_words_per_party: cost.prg_words_per_party / 2,
            ..cost
        };
        Ok(Measured {
            startup_seconds,
            per_second: None,
            cpu_seconds: cpu / seconds.len() as f64,
            peak_rss_bytes: after.map_or(0, |usage| usage.peak_rss_bytes),
            seconds,
            rounds: 0,
            bytes_sent_per_party: 0,
            dealer_bytes: bytes_dealt,
            floor_seconds: self.rates.floor_seconds(&dealer),
            party_memory: None,
        })
    }
}

/// Counts material and drops it.
#[derive(Default)]
struct Dropped {
    bytes: u64,
}

impl CorrectionSink for Dropped {
    fn post(&mut self, _: PartyId, segment: Bytes) -> Result<(), NetError> {
        self.bytes += segment.len() as u64;
        Ok(())
    }
}

fn derive(job: &JobDescription) -> Result<Derived> {
    Derived::new(job).map_err(|reason| anyhow!(reason))
}

/// What one repetition of a job costs.
fn repeated_cost(derived: &Derived) -> Result<Cost> {
    let mut steps = derived.schedule.steps.iter();
    let step = steps
        .find(|step| repeated(step))
        .context("a job without steps")?;
    Ok(derived.plans[step.program].cost())
}

fn repeated(step: &Step) -> bool {
    matches!(step.phase, Phase::Benchmark { .. })
}

/// An error that names the first output which differs from the plain run's.
fn equals_plain(derived: &Derived, outputs: &[Revealed]) -> Result<()> {
    let plain = plain_run::run(&derived.schedule, &Tables::new(), None, None, |_, _, _| {})?;
    let expected: usize = plain.outputs.iter().map(BTreeMap::len).sum();
    if outputs.len() != expected || expected == 0 {
        bail!(
            "{} results were revealed, the plain run has {expected}",
            outputs.len()
        );
    }
    for output in outputs {
        let (step, name) = (output.step, &output.name);
        let plain = plain.outputs.get(step).and_then(|step| step.get(name));
        if plain != Some(&output.tensor) {
            bail!("{name} of step {step} is not what the plain run gives");
        }
    }
    Ok(())
}

/// What of a node's settings takes memory beside the tensors.
pub(crate) fn buffers(settings: &Settings) -> Buffers {
    Buffers {
        look_ahead_bytes: settings.look_ahead_bytes,
        window_bytes: settings.window_bytes.into(),
    }
}

fn party_memory(cluster: &Cluster, derived: &Derived, settings: &Settings) -> PartyMemory {
    let parties = [NodeName::P0, NodeName::P1, NodeName::P2];
    let measured = parties.into_iter().filter_map(|party| cluster.usage(party));
    let measured = measured.map(|usage| usage.peak_rss_bytes);
    let said = PartyBytes::of(&derived.schedule, &derived.plans, buffers(settings));
    PartyMemory {
        measured_bytes: measured.max().unwrap_or(0),
        said_bytes: said.process,
        tensor_bytes: said.tensors,
    }
}

fn inside<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

fn usages(cluster: &Cluster) -> impl Iterator<Item = Option<Usage>> {
    NodeName::ALL.into_iter().map(|node| cluster.usage(node))
}

/// CPU time of all nodes so far; `None` where the platform does not say.
fn cpu_seconds(cluster: &Cluster) -> Option<f64> {
    usages(cluster)
        .map(|usage| usage.map(|usage| usage.cpu_s))
        .sum()
}

fn peak_rss_bytes(cluster: &Cluster) -> u64 {
    usages(cluster)
        .flatten()
        .map(|usage| usage.peak_rss_bytes)
        .max()
        .unwrap_or(0)
}
