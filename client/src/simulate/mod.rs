//! `trefoil simulate`: a whole experiment with real processes on this machine.
//!
//! Three parties and a dealer run as processes of their own (`trefoil-cluster`); the hospitals and
//! the analyst are clients in this process, with the calls that a deployment uses
//! ([`crate::remote`]). At the end the result is held against the plaintext reference.

mod neighbours;
mod plain_only;
mod reference;
pub mod report;
pub(crate) mod tables;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use trefoil_cluster::{Cluster, ClusterSpec, Home};
use trefoil_consortium::JobDescription;
use trefoil_consortium::config::simulation_coin_key;
use trefoil_models::job::{DatasetRef, JobKind};
use trefoil_models::plain_run::{Table, Tables};
use trefoil_models::{schedule, weights};
use trefoil_protocol::plan::LinkProfile;
use trefoil_protocol::prg::Prg;
use trefoil_protocol::program::Rounding;
use trefoil_transport::{Protocol, Settings};

use crate::cli::SimulateArgs;
use crate::data;
use crate::experiment::{Experiment, Loaded};
use crate::follow::{Finished, bar, confusions, follow};
use crate::local;
use crate::remote::{JobResult, NodeStats, Part, Remote, Upload};
use crate::rows;
use report::{Epoch, LinkBytes, PredictFigures, Report, TrainFigures, quality};
use tables::Holding;

/// The data set's name at the parties.
const DATASET: &str = "simulated";
/// The model's name at the parties.
const MODEL: &str = "simulated";

/// Runs the command: prints the report, writes the JSON. An error if the secure result differs
/// from the reference. There is no report if only the references ran.
pub fn run(args: &SimulateArgs) -> Result<Option<Report>> {
    let start = Instant::now();
    let mut experiment = Experiment::read(args.experiment.as_deref())?;
    if let Some(network) = &args.network {
        experiment.network = network.clone();
    }
    experiment.training.seed = args.seed.unwrap_or(experiment.training.seed);
    experiment.training.epochs = args.epochs.unwrap_or(experiment.training.epochs);
    experiment.training.max_steps = args.max_steps.or(experiment.training.max_steps);
    experiment.training.check()?;
    let loaded = experiment.load(args.data.as_deref())?;
    for warning in &loaded.warnings {
        eprintln!("note: {warning}");
    }
    // Opened before anything runs: a wrong path must not cost a whole run.
    let json = args.json.as_deref().map(create).transpose()?;
    if args.plain_only {
        let report = plain_only::run(&loaded)?;
        return write(json, &report).map(|()| None);
    }
    let hospitals = loaded.experiment.data.hospitals;
    let spec = ClusterSpec {
        link: args.link,
        settings: local::settings(args.link, args.transport),
        hospitals: (1..=hospitals).map(|n| format!("hospital-{n}")).collect(),
        ring_bits: loaded.experiment.training.ring_bits,
        simulation_coin_seed: Some(loaded.experiment.training.seed),
        home: args.home.clone().map_or(Home::Temporary, Home::At),
        ..ClusterSpec::new()?
    };
    println!(
        "{} on {}: {} training and {} test images held by {hospitals} hospitals; three parties and a dealer on {}{}",
        match args.knn {
            None => loaded.network.name.clone(),
            Some(k) => format!("{k} nearest rows"),
        },
        loaded.experiment.data.source,
        loaded.splits.train.len(),
        loaded.splits.test.len(),
        args.link,
        match args.transport {
            Protocol::Quic => "",
            Protocol::Tcp => " over tcp",
        }
    );
    let cluster = Cluster::start(&spec)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let simulation = Simulation {
        loaded: &loaded,
        cluster: &cluster,
        settings: &spec.settings,
        link: args.link.profile(),
    };
    if let Some(k) = args.knn {
        let done = runtime.block_on(simulation.neighbours(k));
        let done = done.map_err(|error| local::blame(&cluster, error))?;
        simulation.print_neighbours(k, &done, start)?;
        cluster.stop();
        return Ok(None);
    }
    let done = runtime.block_on(simulation.run());
    let done = done.map_err(|error| local::blame(&cluster, error));
    cluster.stop();
    let done = done?;
    let (report, confusion) = finish(&loaded, args, done, start)?;
    report.print(&confusion);
    write(json, &report)?;
    if !report.bit_identical {
        bail!(
            "the secure result differs from the plaintext reference: this is a defect, please report it"
        );
    }
    Ok(Some(report))
}

fn create(path: &Path) -> Result<File> {
    File::create(path).with_context(|| format!("cannot write {}", path.display()))
}

/// Writes a report as one JSON object, where one is wanted.
fn write(file: Option<File>, report: &impl Serialize) -> Result<()> {
    if let Some(mut file) = file {
        serde_json::to_writer_pretty(&mut file, report)?;
        writeln!(file)?;
    }
    Ok(())
}

/// What the cluster was needed for.
struct Done {
    /// Hospitals' rows in the order in which the parties keep them.
    holdings: Vec<Holding>,
    share_seconds: f64,
    train: Finished,
    evaluate: Finished,
    predict: Finished,
    predict_rows: data::Dataset,
    predict_seconds: f64,
}

struct Simulation<'a> {
    loaded: &'a Loaded,
    cluster: &'a Cluster,
    settings: &'a Settings,
    link: LinkProfile,
}

impl Simulation<'_> {
    async fn remote(&self, member: &str) -> Result<Remote> {
        local::connect(self.cluster, member, self.settings).await
    }

    async fn run(&self) -> Result<Done> {
        let spec = &self.loaded.experiment.training;
        let count = self.loaded.experiment.data.hospitals;
        let holdings = tables::holdings(&self.loaded.splits, count, spec.seed)?;
        let start = Instant::now();
        self.share(&holdings).await?;
        let share_seconds = start.elapsed().as_secs_f64();

        let analyst = self.remote("analyst").await?;
        let info = analyst.dataset(DATASET).await?;
        let dataset = DatasetRef {
            name: DATASET.into(),
            train_rows: info.train_rows as usize,
            test_rows: info.test_rows as usize,
            snapshot: info.snapshot,
        };
        let network = self.loaded.network.to_toml();
        let train = JobKind::Train {
            network: network.clone(),
            spec: spec.clone(),
            dataset: dataset.clone(),
            evaluate_each_epoch: true,
            save_as: MODEL.into(),
            // Only a simulation does this without being asked: it compares them.
            reveal_weights: true,
        };
        let train = self.job(&analyst, "analyst", "training", train).await?;
        let evaluate = JobKind::Evaluate {
            model: MODEL.into(),
            network: network.clone(),
            frac_bits: spec.frac_bits,
            ring_bits: spec.ring_bits,
            dataset,
            auc: self.loaded.wants_auc(),
            calibration: false,
            by_hospital: Vec::new(),
        };
        let evaluate = self
            .job(&analyst, "analyst", "evaluating", evaluate)
            .await?;
        analyst.close().await;

        let section = &self.loaded.experiment.predict;
        let rows: Vec<usize> = (0..section.images.max(1)).collect();
        let predict_rows = data::subset(&self.loaded.splits.test, &rows)?;
        let start = Instant::now();
        let hospital = self.remote("hospital-1").await?;
        let receipt = hospital
            .upload(self.upload(Part::Predict, &predict_rows)?, &mut |_| {})
            .await?;
        let predict = JobKind::Predict {
            model: MODEL.into(),
            network,
            frac_bits: spec.frac_bits,
            ring_bits: spec.ring_bits,
            rows: receipt.rows,
            upload: receipt.upload,
            output: section.output,
        };
        let predict = self
            .job(&hospital, "hospital-1", "predicting", predict)
            .await?;
        let predict_seconds = start.elapsed().as_secs_f64();
        hospital.close().await;
        Ok(Done {
            holdings,
            share_seconds,
            train,
            evaluate,
            predict,
            predict_rows,
            predict_seconds,
        })
    }

    fn upload(&self, part: Part, rows: &data::Dataset) -> Result<Upload> {
        let frac_bits = self.loaded.experiment.training.frac_bits;
        rows::upload(DATASET, part, rows, &self.loaded.preprocess, frac_bits)
    }

    async fn share(&self, holdings: &[Holding]) -> Result<()> {
        let total: usize = holdings.iter().map(|h| h.train.len() + h.test.len()).sum();
        let bar = bar(total as u64, "images");
        let names = self.hospitals_in_order(holdings.len())?;
        for (name, holding) in names.iter().zip(holdings) {
            bar.set_message(format!("{name} shares its images"));
            let remote = self.remote(name).await?;
            for (part, rows) in [(Part::Train, &holding.train), (Part::Test, &holding.test)] {
                if rows.is_empty() {
                    continue;
                }
                let before = bar.position();
                let upload = self.upload(part, rows)?;
                remote
                    .upload(upload, &mut |done| bar.set_position(before + done as u64))
                    .await?;
            }
            remote.close().await;
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// The parties keep contributions in the order of the hospitals' public keys, which are fresh in
    /// every simulation. Parts go to hospitals in that order, so that the rows' order, and with it
    /// the trained weights, follow from the seed alone.
    fn hospitals_in_order(&self, count: usize) -> Result<Vec<String>> {
        let mut order = Vec::new();
        for h in 1..=count {
            let name = format!("hospital-{h}");
            let pin = self.cluster.member(&name)?.identity.pin()?;
            order.push((*pin.as_bytes(), name));
        }
        order.sort();
        Ok(order.into_iter().map(|(_, name)| name).collect())
    }

    async fn job(
        &self,
        remote: &Remote,
        member: &str,
        message: &str,
        kind: JobKind,
    ) -> Result<Finished> {
        let pin = self.cluster.member(member)?.identity.pin()?;
        let mut description =
            JobDescription::new(message, pin, kind).map_err(|problem| anyhow::anyhow!(problem))?;
        description.link = self.link;
        let plan = schedule(&description.kind)?;
        let id = remote.submit(description.clone()).await?;
        follow(remote, id, description.kind, plan, message)
            .await
            .with_context(|| format!("{message} failed"))
    }
}

/// Sums over the sessions of all jobs.
fn totals(jobs: &[&Finished]) -> (u64, u64, u64, Vec<LinkBytes>) {
    let all: Vec<&JobResult> = jobs.iter().map(|job| &job.result).collect();
    let rounds = all.iter().map(|r| r.parties[0].rounds).sum();
    let sent = |p: usize| {
        all.iter()
            .map(|r| r.parties[p].sent_to_parties())
            .sum::<u64>()
    };
    let per_party = (0..3).map(sent).max().unwrap_or(0);
    let name = |i: usize| ["P0", "P1", "P2", "dealer"][i].to_string();
    let mut links = Vec::new();
    let mut add = |from: usize, stats: fn(&JobResult, usize) -> &NodeStats| {
        for to in (0..4).filter(|to| *to != from) {
            let bytes = all.iter().map(|r| stats(r, from).sent_bytes[to]).sum();
            if bytes > 0 {
                links.push(LinkBytes {
                    from: name(from),
                    to: name(to),
                    bytes,
                });
            }
        }
    };
    for party in 0..3 {
        add(party, |r, p| &r.parties[p]);
    }
    add(3, |r, _| &r.dealer);
    let dealer = all
        .iter()
        .map(|r| r.dealer.sent_bytes[..3].iter().sum::<u64>())
        .sum();
    (rounds, per_party, dealer, links)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// The part after the cluster has ended: references and figures.
fn finish(
    loaded: &Loaded,
    args: &SimulateArgs,
    done: Done,
    start: Instant,
) -> Result<(Report, crate::metrics::Confusion)> {
    let spec = &loaded.experiment.training;
    let holdings: Vec<&Holding> = done.holdings.iter().collect();
    let names = loaded.splits.test.class_names.clone();
    let coins =
        (spec.rounding == Rounding::Stochastic).then(|| Prg::new(simulation_coin_key(spec.seed)));

    let jobs = [&done.train, &done.evaluate, &done.predict];
    let steps: usize = jobs.iter().map(|job| job.plan.steps.len()).sum();
    let bar_ = bar((steps + spec.epochs) as u64, "steps");
    bar_.set_message("checking: plaintext reference");
    let mut plain_tables = tables::tables(&holdings, &loaded.preprocess, spec.frac_bits)?;
    let plain = reference::plain(&done.train.kind, &plain_tables, None, coins.as_ref(), |n| {
        bar_.set_position(n as u64)
    })?;
    let evaluated = reference::plain(
        &done.evaluate.kind,
        &plain_tables,
        Some(&plain.state),
        coins.as_ref(),
        |_| {
            bar_.inc(1);
        },
    )?;
    let images = rows::images(
        done.predict_rows.images.view(),
        &loaded.preprocess,
        spec.frac_bits,
    )?;
    plain_tables = Tables::from([(
        trefoil_models::schedule::UPLOAD_IMAGES.to_string(),
        Table {
            row_words: images.shape()[1],
            words: images.into_data(),
        },
    )]);
    let predicted = reference::plain(
        &done.predict.kind,
        &plain_tables,
        Some(&plain.state),
        coins.as_ref(),
        |_| {},
    )?;
    bar_.set_message("checking: floating point");
    let (losses, float) = reference::float(
        &done.train.plan,
        &loaded.network,
        spec,
        &holdings,
        &loaded.preprocess,
        &names,
        |_| bar_.inc(1),
    )?;
    bar_.finish_and_clear();

    let secure_weights = weights::sha256(&done.train.weights()?);
    let bit_identical = secure_weights == plain.weights_sha256
        && done.train.revealed == plain.revealed
        && done.evaluate.revealed == evaluated.revealed
        && done.predict.revealed == predicted.revealed;
    let epochs = done.train.confusions(&names)?;
    let mut result = done.evaluate.confusions(&names)?;
    let (confusion, auc) = result
        .pop()
        .context("the evaluation revealed no confusion matrix")?;
    let plain_confusion = confusions(&done.evaluate.plan, &evaluated.revealed, &names)?;
    let secure = quality(&confusion, auc);
    let (rounds, bytes_sent_per_party, dealer_bytes, links) = totals(&jobs);
    let train_steps: Vec<_> = done
        .train
        .steps
        .iter()
        .filter(|s| s.phase == "train")
        .collect();
    let classes = done.predict.predictions()?.classes;
    let report = Report {
        network: loaded.network.name.clone(),
        data: loaded.experiment.data.source.clone(),
        link: args.link.to_string(),
        hospitals: holdings.len(),
        train_rows: loaded.splits.train.len(),
        test_rows: loaded.splits.test.len(),
        share_seconds: done.share_seconds,
        epochs: epochs
            .iter()
            .zip(&losses)
            .enumerate()
            .map(|(epoch, ((confusion, _), loss))| Epoch {
                epoch: epoch + 1,
                accuracy: confusion.accuracy().unwrap_or(0.0),
                float_loss: *loss,
            })
            .collect(),
        accuracy: secure.accuracy,
        balanced_accuracy: secure.balanced_accuracy,
        auc: secure.auc,
        confusion: confusion
            .counts()
            .rows()
            .into_iter()
            .map(|row| row.to_vec())
            .collect(),
        class_names: names,
        plain_accuracy: plain_confusion
            .last()
            .and_then(|(c, _)| c.accuracy())
            .unwrap_or(0.0),
        float_accuracy: float.accuracy,
        float,
        bit_identical,
        weights_sha256: trefoil_consortium::hex(&secure_weights),
        train: TrainFigures {
            steps: train_steps.len() as u64,
            seconds_per_step: median(train_steps.iter().map(|s| s.seconds).collect()),
            rounds_per_step: train_steps.first().map_or(0, |s| s.rounds),
            bytes_per_step: train_steps.first().map_or(0, |s| s.sent_bytes),
            seconds: done.train.seconds,
        },
        predict: PredictFigures {
            images: done.predict_rows.len(),
            seconds_per_image: done.predict_seconds / done.predict_rows.len().max(1) as f64,
            predicted: classes,
            actual: done
                .predict_rows
                .labels
                .iter()
                .map(|label| usize::from(*label))
                .collect(),
        },
        rounds,
        bytes_sent_per_party,
        dealer_bytes,
        links,
        seconds: start.elapsed().as_secs_f64(),
    };
    Ok((report, confusion))
}
