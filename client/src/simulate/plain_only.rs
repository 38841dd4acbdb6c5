//! The references alone, without nodes: the plaintext fixed-point run, which a secure run equals
//! bit for bit, and the floating-point twin. For choosing hyper-parameters on public data.

use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;
use trefoil_consortium::config::simulation_coin_key;
use trefoil_models::job::{DatasetRef, JobKind};
use trefoil_models::schedule::{Phase, Step, schedule};
use trefoil_protocol::prg::Prg;
use trefoil_protocol::program::Rounding;

use super::reference;
use super::report::{Quality, quality};
use super::tables::{self, Holding};
use super::{DATASET, MODEL, bar};
use crate::experiment::Loaded;
use crate::follow::confusions;

/// What the references alone give.
#[derive(Debug, Serialize)]
pub struct PlainReport {
    /// The network's name.
    network: String,
    /// The data's name.
    data: String,
    /// Training steps.
    steps: usize,
    /// On the rows that the model is judged by, in fixed point.
    plain: Quality,
    /// The same in floating point.
    float: Quality,
    /// Of the weights in fixed point; a secure run gives the same.
    weights_sha256: String,
    /// Seconds of the training in fixed point.
    seconds: f64,
}

/// Runs both and prints their qualities.
pub fn run(loaded: &Loaded) -> Result<PlainReport> {
    let spec = &loaded.experiment.training;
    let holdings = tables::holdings(&loaded.splits, 1, spec.seed)?;
    let holdings: Vec<&Holding> = holdings.iter().collect();
    let names = &loaded.splits.test.class_names;
    let tables = tables::tables(&holdings, &loaded.preprocess, spec.frac_bits)?;
    let coins =
        (spec.rounding == Rounding::Stochastic).then(|| Prg::new(simulation_coin_key(spec.seed)));
    let dataset = DatasetRef {
        name: DATASET.into(),
        train_rows: loaded.splits.train.len(),
        test_rows: loaded.splits.test.len(),
        snapshot: [0; 32],
    };
    let train = JobKind::Train {
        network: loaded.network.to_toml(),
        spec: spec.clone(),
        dataset: dataset.clone(),
        evaluate_each_epoch: true,
        save_as: MODEL.into(),
        reveal_weights: false,
    };
    let evaluate = JobKind::Evaluate {
        model: MODEL.into(),
        network: loaded.network.to_toml(),
        frac_bits: spec.frac_bits,
        ring_bits: spec.ring_bits,
        dataset,
        auc: loaded.wants_auc(),
        calibration: false,
        by_hospital: Vec::new(),
    };
    let (plan, plan_evaluate) = (schedule(&train)?, schedule(&evaluate)?);
    let steps = plan.steps.len() + plan_evaluate.steps.len() + spec.epochs;
    let progress = bar(steps as u64, "steps");
    progress.set_message("plaintext reference");
    let start = Instant::now();
    let plain = reference::plain(&train, &tables, None, coins.as_ref(), |_| progress.inc(1))?;
    let plain_seconds = start.elapsed().as_secs_f64();
    let evaluated = reference::plain(
        &evaluate,
        &tables,
        Some(&plain.state),
        coins.as_ref(),
        |_| {
            progress.inc(1);
        },
    )?;
    progress.set_message("floating point");
    let (losses, float) = reference::float(
        &plan,
        &loaded.network,
        spec,
        &holdings,
        &loaded.preprocess,
        names,
        |_| {
            progress.inc(1);
        },
    )?;
    progress.finish_and_clear();
    let epochs = confusions(&plan, &plain.revealed, names)?;
    for (epoch, ((confusion, _), loss)) in epochs.iter().zip(losses).enumerate() {
        let quality = quality(confusion, None);
        println!(
            "epoch {}: plain fixed point {quality} (float: mean loss {loss:.4})",
            epoch + 1
        );
    }
    let result = confusions(&plan_evaluate, &evaluated.revealed, names)?;
    let (confusion, auc) = result.last().context("the evaluation gave no result")?;
    let fixed = quality(confusion, *auc);
    println!("plain fixed point: {fixed}");
    println!("floating point:    {float}");
    let weights_sha256 = trefoil_consortium::hex(&plain.weights_sha256);
    println!("{plain_seconds:.1} s for the plain training; weights sha256 {weights_sha256}");
    let trained = |step: &&Step| matches!(step.phase, Phase::Train { .. });
    Ok(PlainReport {
        network: loaded.network.name.clone(),
        data: loaded.experiment.data.source.clone(),
        steps: plan.steps.iter().filter(trained).count(),
        plain: fixed,
        float,
        weights_sha256,
        seconds: plain_seconds,
    })
}
