//! `trefoil watch`: a job that was submitted from this home, followed from another process; and how
//! results are shown, whoever waited for them. The parties keep results in memory for a while.

use std::fmt::Display;

use anyhow::{Context, Result, bail};
use clap::Args;
use trefoil_consortium::Hex;
use trefoil_models::Network;
use trefoil_models::early_stop::{EarlyStop, Validated};
use trefoil_models::job::JobKind;
use trefoil_models::neighbours::Queries;
use trefoil_models::outcome::{self, Auc, Bin};
use trefoil_models::schedule;
use trefoil_protocol::fixed::decode;

use super::record::{Record, Show};
use super::{HomeArgs, Member, block_on, figures, lost, weights, write_new};
use crate::follow::{Finished, Predictions, follow};
use crate::simulate::report::quality;

/// Arguments of `trefoil watch`.
#[derive(Debug, Args)]
pub struct WatchArgs {
    #[command(flatten)]
    home: HomeArgs,
    /// The job: the first digits of its hash, eight or more.
    job: String,
}

/// Follows a job to its end and shows its result.
pub fn watch(args: &WatchArgs) -> Result<()> {
    let member = Member::load(&args.home)?;
    let Record { job, show } = Record::find(&member.home, &args.job)?;
    eprint!("{}", job.describe(member.name()));
    let id = job.id();
    let plan = schedule(&job.kind)?;
    let name = job.name.clone();
    let done = block_on(async {
        let remote = member.connect().await?;
        let done = follow(&remote, id, job.kind, plan, &name).await;
        remote.close().await;
        done.map_err(|err| lost(err, &id))
    })?;
    figures::note(&member.home, &name, id, &done, &show);
    present(&done, &show)
}

fn line(name: &str, value: impl Display) {
    println!("{name:<20} {value}");
}

/// Prints a finished job's results, or writes them where they are wanted.
pub fn present(done: &Finished, show: &Show) -> Result<()> {
    match &done.kind {
        JobKind::Train { save_as, .. } => trained(done, show, save_as),
        JobKind::Evaluate { .. } => judged(done, show),
        JobKind::Predict { .. } => predicted(&done.predictions()?, show),
        JobKind::RevealModel { frac_bits, .. } => revealed(done, show, *frac_bits),
        JobKind::ImportModel { save_as, .. } => {
            kept(save_as);
            Ok(())
        }
        JobKind::Neighbours(spec) => match spec.queries {
            Queries::Upload { .. } => predicted(&done.predictions()?, show),
            Queries::Test => judged(done, show),
        },
        JobKind::Serve(_) => {
            let last = done.steps.last();
            line("images served", last.map_or(0, |last| last.batches));
            line("batches", last.map_or(0, |last| last.batch + 1));
            line("seconds", format!("{:.1}", done.result.parties[0].seconds));
            Ok(())
        }
        JobKind::Benchmark { .. } => bail!("a benchmark shows nothing here: see trefoil bench"),
    }
}

fn trained(done: &Finished, show: &Show, save_as: &str) -> Result<()> {
    let JobKind::Train {
        spec,
        evaluate_each_epoch,
        reveal_weights,
        ..
    } = &done.kind
    else {
        return Ok(());
    };
    if *evaluate_each_epoch {
        for (epoch, (confusion, auc)) in done.confusions(&show.class_names)?.iter().enumerate() {
            line(&format!("epoch {}", epoch + 1), quality(confusion, *auc));
        }
    }
    if let Some(rule) = &spec.early_stop {
        let right = done.validated();
        for (epoch, right) in right.iter().enumerate() {
            let words = format!("{right} of {} rows right", rule.validation_rows);
            line(&format!("validation {}", epoch + 1), words);
        }
        let kept = kept_epoch(rule, &right);
        line(
            "epochs",
            format!(
                "{} of {}, the model is of epoch {kept}",
                right.len(),
                spec.epochs
            ),
        );
    }
    let steps = done.steps.iter().filter(|step| step.phase == "train");
    line("training steps", steps.count());
    line("seconds", format!("{:.1}", done.seconds));
    kept(save_as);
    match *reveal_weights {
        true => revealed(done, show, spec.frac_bits),
        false => Ok(()),
    }
}

/// The epoch, from 1, whose weights an early stop keeps.
fn kept_epoch(rule: &EarlyStop, right: &[u64]) -> usize {
    (1..=right.len())
        .rev()
        .find(|epoch| Validated::after(rule, &right[..*epoch]).is_best())
        .unwrap_or(0)
}

fn kept(save_as: &str) {
    line(
        "model",
        format!("{save_as}, kept as shares by the three parties"),
    );
}

/// Writes weights where they are wanted.
fn revealed(done: &Finished, show: &Show, frac_bits: u8) -> Result<()> {
    let to = show
        .to
        .as_ref()
        .context("there is no file for the weights")?;
    let (JobKind::Train { network, .. } | JobKind::RevealModel { network, .. }) = &done.kind else {
        bail!("this job reveals no weights");
    };
    let network = Network::parse(network)?;
    let arrays: Vec<_> = done
        .weights()?
        .into_iter()
        .map(|(name, tensor)| {
            let own_bits = u32::from(network.kept_frac_bits(&name, frac_bits));
            let values = tensor.data().iter().map(|word| decode(*word, own_bits));
            (name, tensor.shape().to_vec(), values.collect())
        })
        .collect();
    write_new(to, &weights::write(to, &network, &arrays)?, true)?;
    line("REVEALED WEIGHTS", to.display());
    Ok(())
}

fn judged(done: &Finished, show: &Show) -> Result<()> {
    let mut results = done.confusions(&show.class_names)?;
    let (confusion, auc) = results
        .pop()
        .context("the evaluation revealed no confusion matrix")?;
    let percent = |value: Option<f64>| {
        value.map_or("no rows".to_owned(), |value| {
            format!("{:.2} %", 100.0 * value)
        })
    };
    line("test rows", confusion.total());
    line("accuracy", percent(confusion.accuracy()));
    line("balanced accuracy", percent(confusion.balanced_accuracy()));
    if let JobKind::Evaluate { auc: true, .. } = done.kind {
        let none = || "no rows of one of the classes".to_owned();
        let words = |auc: Auc| match auc.error > 0.0 {
            true => format!("{:.4} (by a histogram, within {:.4})", auc.value, auc.error),
            false => format!("{:.4}", auc.value),
        };
        line("AUC", auc.map_or_else(none, words));
    }
    println!("\n{confusion}");
    if let JobKind::Evaluate {
        calibration: true, ..
    } = done.kind
    {
        reliability(&done.calibration()?);
    }
    for (hospital, confusion) in done.by_hospital(&show.class_names)? {
        let name = show.hospitals.get(&Hex(&hospital).to_string());
        let name = name.cloned().unwrap_or_else(|| Hex(&hospital).to_string());
        println!("\n{name}: {}", quality(&confusion, None));
        println!("{confusion}");
    }
    Ok(())
}

fn reliability(bins: &[Bin]) {
    println!("\nprobability    rows  mean probability  right");
    for (at, bin) in bins.iter().enumerate() {
        let [low, high] = [at, at + 1].map(|end| end as f64 / bins.len() as f64);
        let (mean, right) = match bin.confidence {
            None => ("-".to_owned(), "-".to_owned()),
            Some(mean) => {
                let right = bin.right as f64 / bin.rows as f64;
                let percent = |part: f64| format!("{:.1} %", 100.0 * part);
                (percent(mean), percent(right))
            }
        };
        println!(
            "{low:.1} to {high:.1} {:>8} {mean:>17} {right:>6}",
            bin.rows
        );
    }
    if let Some(error) = outcome::calibration_error(bins) {
        line("\ncalibration error", format!("{error:.4}"));
    }
}

/// Prints predictions as a table, or writes it where it is wanted.
pub fn predicted(predictions: &Predictions, show: &Show) -> Result<()> {
    let table = table(predictions, show)?;
    match &show.to {
        None => print!("{}", String::from_utf8_lossy(&table)),
        Some(path) => {
            write_new(path, &table, true)?;
            eprintln!("wrote {}", path.display());
        }
    }
    Ok(())
}

/// `file,class[,score of each class]`.
fn table(predictions: &Predictions, show: &Show) -> Result<Vec<u8>> {
    if predictions.classes.len() != show.images.len() {
        bail!(
            "the job tells {} classes, {} images were shared",
            predictions.classes.len(),
            show.images.len()
        );
    }
    let mut table = csv::Writer::from_writer(Vec::new());
    let mut heading = vec!["file".to_owned(), "class".to_owned()];
    if predictions.scores.is_some() {
        heading.extend(show.class_names.iter().cloned());
    }
    table.write_record(&heading)?;
    for (row, (image, class)) in show.images.iter().zip(&predictions.classes).enumerate() {
        let name = show.class_names.get(*class);
        let name = name.with_context(|| format!("{image}: there is no class {class}"))?;
        let mut record = vec![image.clone(), name.clone()];
        if let Some(scores) = &predictions.scores {
            record.extend(scores.row(row).iter().map(|score| format!("{score:.6}")));
        }
        table.write_record(&record)?;
    }
    Ok(table.into_inner()?)
}
