//! What the secure run is held against: the plain fixed-point run of the same jobs, which it must
//! equal bit for bit, and the same training in ordinary floating point.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use ndarray::Array2;
use trefoil_models::job::JobKind;
use trefoil_models::outcome::Auc;
use trefoil_models::plain_run::{self, Tables};
use trefoil_models::schedule::Schedule;
use trefoil_models::{Network, TrainSpec, float, schedule};
use trefoil_protocol::Tensor;
use trefoil_protocol::prg::Prg;

use super::report::{Quality, quality};
use super::tables::{Holding, concatenated};
use crate::data::Preprocess;
use crate::follow::Revealed;
use crate::metrics::{Confusion, auc};

/// A plain run of one job.
#[derive(Debug)]
pub struct Plain {
    /// What it reveals.
    pub revealed: Revealed,
    /// Carried state at its end: the model.
    pub state: BTreeMap<String, Tensor>,
    /// Hash of the weights.
    pub weights_sha256: [u8; 32],
}

/// Runs a job in the clear; `progress` hears the steps done.
pub fn plain(
    job: &JobKind,
    tables: &Tables,
    model: Option<&BTreeMap<String, Tensor>>,
    coins: Option<&Prg>,
    mut progress: impl FnMut(usize),
) -> Result<Plain> {
    let plan = schedule(job)?;
    let run = plain_run::run(&plan, tables, model, coins, |done, _, _| progress(done))
        .context("the plaintext reference left the range of the number format")?;
    let revealed = run
        .outputs
        .into_iter()
        .enumerate()
        .filter(|(_, outputs)| !outputs.is_empty());
    Ok(Plain {
        revealed: revealed.collect(),
        state: run.state,
        weights_sha256: run.weights_sha256,
    })
}

/// Normalised images, one a row.
pub fn matrix(images: ndarray::Array4<u8>, preprocess: &Preprocess) -> Result<Array2<f32>> {
    let rows = images.shape()[0];
    let values = preprocess.to_float(images.view())?;
    let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
    Ok(Array2::from_shape_vec(
        (rows, values.len() / rows.max(1)),
        values,
    )?)
}

/// Trains in floating point as the job with this schedule does; mean loss of every epoch and quality at the end.
pub fn float(
    schedule: &Schedule,
    network: &Network,
    spec: &TrainSpec,
    holdings: &[&Holding],
    preprocess: &Preprocess,
    names: &[String],
    mut progress: impl FnMut(usize),
) -> Result<(Vec<f64>, Quality)> {
    let (labels, images) = concatenated(holdings, |h| &h.train)?;
    let images = matrix(images, preprocess)?;
    let data = float::Data {
        images: images.view(),
        labels: &labels,
    };
    let mut losses = Vec::new();
    let model = float::train(network, spec, data, schedule, |report, _| {
        losses.push(report.loss);
        progress(losses.len());
    })?;
    let (labels, images) = concatenated(holdings, |h| &h.test)?;
    let logits = model.logits(matrix(images, preprocess)?.view())?;
    let confusion = Confusion::new(&labels, &float::predictions(&logits), names)?;
    let auc = match network.classes {
        2 => auc(&float::scores(&logits), &labels)
            .ok()
            .map(|value| Auc { value, error: 0.0 }),
        _ => None,
    };
    Ok((losses, quality(&confusion, auc)))
}
