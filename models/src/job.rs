//! A job: everything that decides what is computed, in one value that all nodes agree on.
//!
//! These types are serialised, hashed and compared; the steps that follow from them are derived by
//! every node on its own ([`crate::schedule()`]). Who may start a job is not decided here.

use serde::{Deserialize, Serialize};
use trefoil_protocol::program::Rounding;

use crate::early_stop::EarlyStop;
use crate::neighbours::NeighbourSpec;
pub use crate::recipe::{AdamSpec, Loss, LrSchedule, Optimiser};
use crate::serve::ServeSpec;
use crate::{Benchmark, ModelError};

/// Hyper-parameters and number formats of a training run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainSpec {
    /// Images in one step.
    pub batch: usize,
    /// Passes over the training set.
    pub epochs: usize,
    /// Step size, used as the nearest fraction with a numerator of at most 10 bits.
    pub learning_rate: f64,
    /// Momentum as in PyTorch; 0 for none.
    pub momentum: f64,
    /// How the step size changes.
    pub schedule: LrSchedule,
    /// Seed of initial weights and batch order; public.
    pub seed: u64,
    /// How training rounds. Evaluation and prediction round to nearest.
    pub rounding: Rounding,
    /// Fraction bits f.
    pub frac_bits: u8,
    /// Ring bits k: 64 or 48.
    pub ring_bits: u8,
    /// How the rows were prepared, kept with the model; nothing is computed from it.
    pub preparation: Option<Preparation>,
    /// What is made small.
    pub loss: Loss,
    /// A factor for each class on the loss of its rows, 1/64 to 64, used with 8 fraction bits; all 1
    /// if empty.
    pub class_weights: Vec<f64>,
    /// Nesterov's momentum as in PyTorch.
    pub nesterov: bool,
    /// Added to the gradient as this times the parameter; 0 for none.
    pub weight_decay: f64,
    /// The backward pass computes `2^this` times the gradients, which keeps small ones from being
    /// rounded away; the update divides by it.
    pub gradient_scale_log2: u8,
    /// How weights follow from gradients.
    pub optimiser: Optimiser,
    /// Training ends after this many steps, in whichever epoch that is; none: after all epochs.
    pub max_steps: Option<usize>,
    /// The kept model whose weights training starts from, `NAME` or `NAME@VERSION`; seeded weights
    /// without it. What the optimiser keeps starts at zero either way.
    pub start_from: Option<String>,
    /// When to stop before the last epoch.
    pub early_stop: Option<EarlyStop>,
}

impl Default for TrainSpec {
    fn default() -> TrainSpec {
        TrainSpec {
            batch: 128,
            epochs: 1,
            learning_rate: 0.0625,
            momentum: 0.0,
            schedule: LrSchedule::Constant,
            seed: 1,
            rounding: Rounding::Nearest,
            frac_bits: 16,
            ring_bits: 64,
            preparation: None,
            loss: Loss::default(),
            class_weights: Vec::new(),
            nesterov: false,
            weight_decay: 0.0,
            gradient_scale_log2: 0,
            optimiser: Optimiser::default(),
            max_steps: None,
            start_from: None,
            early_stop: None,
        }
    }
}

/// How pixels between 0 and 1 became numbers: `(pixel - mean) / std`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preparation {
    /// Subtracted; from 0 to 1.
    pub mean: f64,
    /// Divided by; above 0.
    pub std: f64,
}

impl std::fmt::Display for Preparation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "mean={},std={}", self.mean, self.std)
    }
}

/// A data set by name, with what is public about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DatasetRef {
    /// Its name.
    pub name: String,
    /// Rows of the training split.
    pub train_rows: usize,
    /// Rows of the test split.
    pub test_rows: usize,
    /// Hash of what was uploaded.
    pub snapshot: [u8; 32],
}

/// A hospital's rows of the test split: they lie together, in the order of the public keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HospitalRows {
    /// The hospital's public key (pin).
    pub hospital: [u8; 32],
    /// How many.
    pub rows: usize,
}

/// What a prediction reveals to the requester.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PredictOutput {
    /// The most probable class, nothing else.
    #[default]
    Class,
    /// The last layer's outputs.
    Logits,
    /// A probability for each class.
    Probabilities,
}

/// What is to be done.
#[expect(clippy::large_enum_variant, reason = "a node holds few jobs")]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum JobKind {
    /// Train from seeded initial weights, or from a kept model's.
    Train {
        /// The network, TOML text.
        network: String,
        /// Hyper-parameters.
        spec: TrainSpec,
        /// What to train on.
        dataset: DatasetRef,
        /// Reveal the confusion matrix on the test split after every epoch.
        evaluate_each_epoch: bool,
        /// The parties keep shares of the weights under this name.
        save_as: String,
        /// Reveal the trained weights to the requester: they are no secret any more.
        reveal_weights: bool,
    },
    /// Confusion matrix (and, for two classes, AUC) of a kept model on the test split.
    Evaluate {
        /// The model's name.
        model: String,
        /// The network, TOML text.
        network: String,
        /// Fraction bits of the model.
        frac_bits: u8,
        /// Ring bits of the model.
        ring_bits: u8,
        /// What to evaluate on.
        dataset: DatasetRef,
        /// Whether to compute the area under the ROC curve too.
        auc: bool,
        /// Whether to compute a reliability histogram of the predicted classes' probabilities too.
        calibration: bool,
        /// Reveal a confusion matrix of each hospital's rows too: all hospitals with test rows, in
        /// the order of their keys; empty for no such figures.
        by_hospital: Vec<HospitalRows>,
    },
    /// Predictions of a kept model for uploaded images.
    Predict {
        /// The model's name.
        model: String,
        /// The network, TOML text.
        network: String,
        /// Fraction bits of the model.
        frac_bits: u8,
        /// Ring bits of the model.
        ring_bits: u8,
        /// Number of images.
        rows: usize,
        /// Name of the upload that holds them.
        upload: String,
        /// What is revealed.
        output: PredictOutput,
    },
    /// Repetitions of one piece of work on public numbers, to be timed.
    Benchmark {
        /// What is repeated.
        work: Benchmark,
        /// How often.
        repetitions: usize,
        /// Fraction bits.
        frac_bits: u8,
        /// Ring bits: 64 or 48.
        ring_bits: u8,
    },
    /// Opens a kept model's weights to the requester: they are no secret any more.
    RevealModel {
        /// The model's name.
        model: String,
        /// The network, TOML text.
        network: String,
        /// Fraction bits of the model.
        frac_bits: u8,
        /// Ring bits of the model.
        ring_bits: u8,
    },
    /// Keeps weights that their owner has shared as a model.
    ImportModel {
        /// The network, TOML text.
        network: String,
        /// Fraction bits of the weights.
        frac_bits: u8,
        /// Ring bits: 64 or 48.
        ring_bits: u8,
        /// Name of the upload that holds the weights, see [`crate::import_words`].
        upload: String,
        /// The parties keep shares of the weights under this name.
        save_as: String,
        /// How images for this model are prepared, if the owner says so.
        preparation: Option<Preparation>,
    },
    /// Keeps a session open in which members ask for predictions of a kept model.
    Serve(ServeSpec),
    /// Classes of images by the nearest training rows of a data set.
    Neighbours(NeighbourSpec),
}

pub(crate) fn job_error(
    field: &'static str,
    found: impl ToString,
    problem: impl Into<String>,
) -> ModelError {
    ModelError::Job {
        field,
        found: found.to_string(),
        problem: problem.into(),
    }
}

pub(crate) fn check_range(
    field: &'static str,
    found: usize,
    range: std::ops::RangeInclusive<usize>,
) -> Result<(), ModelError> {
    if range.contains(&found) {
        return Ok(());
    }
    Err(job_error(
        field,
        found,
        format!("{} to {} are possible", range.start(), range.end()),
    ))
}

/// Checks the number format of a job.
pub(crate) fn check_format(frac_bits: u8, ring_bits: u8) -> Result<(), ModelError> {
    if ![48, 64].contains(&ring_bits) {
        return Err(job_error("ring_bits", ring_bits, "48 and 64 are possible"));
    }
    // The softmax needs 13 fraction bits of 2f; products need room for integers above 2f.
    let largest = if ring_bits == 64 { 24 } else { 16 };
    check_range("frac_bits", usize::from(frac_bits), 10..=largest)
}

impl TrainSpec {
    /// Checks every field's range.
    pub fn check(&self) -> Result<(), ModelError> {
        check_range("batch", self.batch, 1..=4096)?;
        check_range("epochs", self.epochs, 1..=10_000)?;
        if let Some(steps) = self.max_steps {
            check_range("max_steps", steps, 1..=usize::MAX)?;
        }
        self.check_recipe()?;
        self.early_stop.as_ref().map_or(Ok(()), EarlyStop::check)?;
        check_format(self.frac_bits, self.ring_bits)
    }
}
