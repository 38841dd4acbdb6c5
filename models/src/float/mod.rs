//! The float twin: the same network, initial weights, batch order and optimiser in ordinary `f32`.
//!
//! It is what secure training is compared with, not a part of it: nothing here runs on shares. The
//! learning rate and the momentum are the real numbers, not the ratios that the Programs apply. The
//! layers are in `float/layers.rs`.

mod conv;
mod layers;
mod learnt;
mod loss;
mod norm;
mod update;

use std::collections::BTreeMap;
use std::thread;

use ndarray::{Array1, Array2, ArrayView2, Axis};
use trefoil_protocol::Tensor;
use trefoil_protocol::fixed::decode;

use crate::job::{Loss, TrainSpec};
use crate::network::{Layer, LayerKind, Network, statistics_frac_bits};
use crate::schedule::{Schedule, Update};
use crate::{ModelError, weights};
use layers::Use;

pub use norm::Statistics;

/// Rows in one forward pass outside training.
const CHUNK_ROWS: usize = 128;
/// Parts of a batch, each computed by a thread of its own and added in order: their number does not
/// depend on the machine, so that the sums do not either.
const PARTS: usize = 4;
/// Rows below which a batch is not worth splitting.
const MIN_PART_ROWS: usize = 8;

/// Images (one row each, channel after channel) and their classes.
#[derive(Clone, Copy, Debug)]
pub struct Data<'a> {
    /// `[rows, channels * height * width]`
    pub images: ArrayView2<'a, f32>,
    /// One class for each row.
    pub labels: &'a [u8],
}

/// Weights and bias of a layer, or a gradient of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    /// Convolution: `[filters, channels * kernel]`; dense: `[inputs, units]`.
    pub weight: Array2<f32>,
    /// One for each filter or unit.
    pub bias: Array1<f32>,
}

impl Parameters {
    fn zeros_like(other: &Parameters) -> Parameters {
        Parameters {
            weight: Array2::zeros(other.weight.dim()),
            bias: Array1::zeros(other.bias.dim()),
        }
    }
}

/// A network with its weights.
#[derive(Clone, Debug)]
pub struct Model {
    network: Network,
    /// For each layer of the network its parameters, if it has any.
    pub parameters: Vec<Option<Parameters>>,
    /// For each normalisation its running statistics.
    pub statistics: Vec<Option<Statistics>>,
    /// What the optimiser keeps: for each layer velocities, or Adam's moments.
    kept: Vec<[Option<Parameters>; 3]>,
    loss: Loss,
    class_weights: Vec<f64>,
    /// The job's public seed.
    seed: u64,
    /// The step of the job that gradients are for: dropout draws by it.
    pub step: u64,
}

/// A loss and its gradient for each layer.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// Mean loss of the batch.
    pub loss: f64,
    /// Gradients of the mean.
    pub layers: Vec<Option<Parameters>>,
    /// For each normalisation the batch's statistics.
    pub statistics: Vec<Option<Statistics>>,
}

/// What one epoch gave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EpochReport {
    /// Which epoch, from 0.
    pub epoch: usize,
    /// Mean loss over the epoch's batches.
    pub loss: f64,
}

impl Model {
    /// The network with weights given as ring tensors of `frac_bits` fraction bits; its loss is the
    /// default one.
    pub fn from_weights(
        network: &Network,
        weights: &BTreeMap<String, Tensor>,
        frac_bits: u32,
    ) -> Result<Model, ModelError> {
        let get = |name: String, expected: &[usize], frac_bits: u32| {
            let bad = |problem: String| ModelError::Weights {
                name: name.clone(),
                problem,
            };
            let tensor = weights.get(&name).ok_or_else(|| bad("is missing".into()))?;
            if tensor.shape() != expected {
                return Err(bad(format!(
                    "has shape {:?}, the network needs {expected:?}",
                    tensor.shape()
                )));
            }
            Ok(tensor
                .data()
                .iter()
                .map(|word| decode(*word, frac_bits) as f32)
                .collect::<Vec<f32>>())
        };
        let mut parameters = Vec::new();
        for layer in &network.layers {
            parameters.push(match (layer.weight_shape(), layer.bias_len()) {
                (Some(shape), Some(bias_len)) => {
                    let words = get(layer.weight_name(), &shape, frac_bits)?;
                    let cols: usize = shape[1..].iter().product();
                    let weight = Array2::from_shape_vec((shape[0], cols), words).map_err(|e| {
                        ModelError::Weights {
                            name: layer.weight_name(),
                            problem: e.to_string(),
                        }
                    })?;
                    Some(Parameters {
                        weight,
                        bias: get(layer.bias_name(), &[bias_len], frac_bits)?.into(),
                    })
                }
                _ => None,
            });
        }
        let s = u32::from(statistics_frac_bits(frac_bits as u8));
        let mut statistics = Vec::new();
        for layer in &network.layers {
            let channels = [layer.input[0]];
            statistics.push(match layer.is_norm() {
                true => Some(Statistics {
                    mean: get(layer.mean_name(), &channels, s)?.into(),
                    variance: get(layer.variance_name(), &channels, s)?.into(),
                }),
                false => None,
            });
        }
        let zeros = |p: &Option<Parameters>| p.as_ref().map(Parameters::zeros_like);
        let kept = parameters.iter().map(|p| [zeros(p), zeros(p), zeros(p)]);
        let kept = kept.collect();
        Ok(Model {
            network: network.clone(),
            parameters,
            statistics,
            kept,
            loss: Loss::default(),
            class_weights: Vec::new(),
            seed: 0,
            step: 0,
        })
    }

    /// The network with the initial weights that a job with this specification starts from.
    pub fn initial(network: &Network, spec: &TrainSpec) -> Result<Model, ModelError> {
        let frac_bits = u32::from(spec.frac_bits);
        let initial = weights::initial(network, spec.seed, frac_bits);
        Ok(Model {
            loss: spec.loss,
            class_weights: spec.class_weights.clone(),
            seed: spec.seed,
            ..Model::from_weights(network, &initial, frac_bits)?
        })
    }

    fn check(&self, images: &ArrayView2<'_, f32>) -> Result<(), ModelError> {
        if images.ncols() == self.network.input_len() {
            return Ok(());
        }
        Err(ModelError::Table {
            table: "images".into(),
            problem: format!(
                "{} values a row; the network reads {:?}",
                images.ncols(),
                self.network.input
            ),
        })
    }

    /// The last layer's outputs, `[rows, classes]`.
    pub fn logits(&self, images: ArrayView2<'_, f32>) -> Result<Array2<f32>, ModelError> {
        self.check(&images)?;
        let mut logits = Array2::zeros((images.nrows(), self.network.classes));
        let part = part_rows(images.nrows());
        thread::scope(|scope| {
            let parts = images
                .axis_chunks_iter(Axis(0), part)
                .zip(logits.axis_chunks_iter_mut(Axis(0), part));
            for (images, mut logits) in parts {
                scope.spawn(move || {
                    let chunks = images.axis_chunks_iter(Axis(0), CHUNK_ROWS);
                    for (chunk, mut out) in
                        chunks.zip(logits.axis_chunks_iter_mut(Axis(0), CHUNK_ROWS))
                    {
                        let tape = layers::forward(
                            &self.network,
                            &self.parameters,
                            Use::Inference(&self.statistics),
                            chunk.to_owned(),
                        );
                        out.assign(tape.logits());
                    }
                });
            }
        });
        Ok(logits)
    }

    /// The gradient of the mean loss of a batch.
    pub fn gradients(&self, data: Data<'_>) -> Result<Gradients, ModelError> {
        self.check(&data.images)?;
        check_labels(&data, self.network.classes)?;
        let rows = data.labels.len();
        // Statistics are those of the whole batch.
        let whole = self.network.layers.iter().any(Layer::is_norm);
        let part = if whole { rows.max(1) } else { part_rows(rows) };
        let parts: Vec<Gradients> = thread::scope(|scope| {
            let parts = data
                .images
                .axis_chunks_iter(Axis(0), part)
                .zip(data.labels.chunks(part));
            let threads: Vec<_> = parts
                .enumerate()
                .map(|(at, (images, labels))| {
                    scope.spawn(move || self.part_gradients(images, labels, at * part, rows))
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("shapes and labels are checked"))
                .collect()
        });
        let mut sum = Gradients {
            loss: 0.0,
            layers: vec![None; self.parameters.len()],
            statistics: Vec::new(),
        };
        for part in parts {
            sum.loss += part.loss;
            sum.statistics = part.statistics;
            for (sum, part) in sum.layers.iter_mut().zip(part.layers) {
                match (sum.as_mut(), part) {
                    (Some(sum), Some(part)) => {
                        sum.weight += &part.weight;
                        sum.bias += &part.bias;
                    }
                    (None, part) => *sum = part,
                    (Some(_), None) => {}
                }
            }
        }
        Ok(sum)
    }

    /// What rows from `first_row` of a batch of `rows` contribute to its mean.
    fn part_gradients(
        &self,
        images: ArrayView2<'_, f32>,
        labels: &[u8],
        first_row: usize,
        rows: usize,
    ) -> Gradients {
        let wanted = Use::Training {
            seed: self.seed,
            step: self.step,
            first_row,
        };
        let tape = layers::forward(&self.network, &self.parameters, wanted, images.to_owned());
        let logits = tape.logits();
        let (loss, dz) = loss::gradient(self.loss, &self.class_weights, logits, labels, rows);
        Gradients {
            loss,
            layers: layers::backward(&self.network, &self.parameters, &tape, dz),
            statistics: tape.statistics,
        }
    }

    /// One step of the optimiser with this learning rate.
    pub fn update(&mut self, gradients: &Gradients, spec: &TrainSpec, rate: f64) {
        let layers = self
            .parameters
            .iter_mut()
            .zip(&mut self.kept)
            .zip(&gradients.layers);
        for ((parameters, kept), gradient) in layers {
            if let (Some(p), [Some(a), Some(b), Some(c)], Some(g)) = (parameters, kept, gradient) {
                let weights = [&mut a.weight, &mut b.weight, &mut c.weight];
                update::apply(&mut p.weight, weights, &g.weight, spec, rate);
                let biases = [&mut a.bias, &mut b.bias, &mut c.bias];
                update::apply(&mut p.bias, biases, &g.bias, spec, rate);
            }
        }
        let statistics = self.statistics.iter_mut().zip(&gradients.statistics);
        for (layer, (running, batch)) in self.network.layers.iter().zip(statistics) {
            if let (LayerKind::BatchNorm { momentum }, Some(running), Some(batch)) =
                (&layer.kind, running, batch)
            {
                running.follow(batch, *momentum);
            }
        }
    }
}

fn check_labels(data: &Data<'_>, classes: usize) -> Result<(), ModelError> {
    let problem = if data.labels.len() != data.images.nrows() {
        format!(
            "{} labels for {} images",
            data.labels.len(),
            data.images.nrows()
        )
    } else if let Some(row) = data
        .labels
        .iter()
        .position(|label| usize::from(*label) >= classes)
    {
        format!(
            "row {row} has class {}, but there are {classes} classes",
            data.labels[row]
        )
    } else {
        return Ok(());
    };
    Err(ModelError::Table {
        table: "labels".into(),
        problem,
    })
}

fn part_rows(rows: usize) -> usize {
    rows.div_ceil(PARTS).max(MIN_PART_ROWS)
}

/// The most probable class of each row (ties: the first).
pub fn predictions(logits: &Array2<f32>) -> Vec<u8> {
    let best = |row: ndarray::ArrayView1<'_, f32>| {
        let mut best = 0;
        for (i, x) in row.iter().enumerate() {
            if *x > row[best] {
                best = i;
            }
        }
        best as u8
    };
    logits.rows().into_iter().map(best).collect()
}

/// The score of class 1 over class 0 for each row: what the AUC ranks.
pub fn scores(logits: &Array2<f32>) -> Vec<f64> {
    let score = |row: ndarray::ArrayView1<'_, f32>| f64::from(row[1]) - f64::from(row[0]);
    logits
        .rows()
        .into_iter()
        .filter(|row| row.len() == 2)
        .map(score)
        .collect()
}

/// Trains as the job with this schedule would, update for update. `progress` is called after every epoch
/// with its loss and the model as it is then.
///
/// # Errors
/// The schedule reads rows that `data` lacks; `spec` or `data` do not fit the network.
pub fn train(
    network: &Network,
    spec: &TrainSpec,
    data: Data<'_>,
    schedule: &Schedule,
    mut progress: impl FnMut(EpochReport, &Model),
) -> Result<Model, ModelError> {
    spec.check_for(network)?;
    check_labels(&data, network.classes)?;
    let updates = schedule.updates();
    let read = updates.iter().flat_map(|update| update.rows).max();
    if let Some(row) = read.filter(|row| **row as usize >= data.labels.len()) {
        return Err(ModelError::Table {
            table: "images".into(),
            problem: format!("has {} rows; the job reads row {row}", data.labels.len()),
        });
    }
    let mut model = Model::initial(network, spec)?;
    for updates in updates.chunk_by(|a, b| a.epoch == b.epoch) {
        let mut loss = 0.0;
        for update in updates {
            let rows: Vec<usize> = update.rows.iter().map(|row| *row as usize).collect();
            let images = data.images.select(Axis(0), &rows);
            let labels: Vec<u8> = rows.iter().map(|row| data.labels[*row]).collect();
            model.step = update.number;
            let gradients = model.gradients(Data {
                images: images.view(),
                labels: &labels,
            })?;
            let Update {
                epoch, batch, of, ..
            } = *update;
            model.update(&gradients, spec, spec.rate_at(epoch * of + batch, of));
            loss += gradients.loss;
        }
        let report = EpochReport {
            epoch: updates[0].epoch,
            loss: loss / updates.len() as f64,
        };
        progress(report, &model);
    }
    Ok(model)
}
