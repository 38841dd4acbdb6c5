//! How a network learns: loss, class weights, optimiser, step sizes. Part of a job's description.
//!
//! Everything here is public, so it enters the Programs as constants. A step size that changed with
//! every step would need a Program for each; it changes in at most [`MAX_STAIRS`] stairs instead.
//! Formulas, defaults and sources: `docs/training.md`.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::job::{TrainSpec, check_range, job_error};
use crate::{ModelError, Network};

/// Stairs of a smooth schedule: each is a Program that all nodes compile.
pub const MAX_STAIRS: usize = 32;
/// Different step sizes of one job, at most.
const MAX_RATES: usize = 64;
/// Smallest step size that is worth a step.
const MIN_RATE: f64 = 1e-9;
/// Fraction bits of class weights.
pub(crate) const CLASS_WEIGHT_FRAC: u8 = 8;
/// Largest exponent of the gradients' scale.
const MAX_GRADIENT_SCALE_LOG2: u8 = 12;

/// How the learning rate changes during training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum LrSchedule {
    /// It does not.
    #[default]
    Constant,
    /// Multiplied by `factor` after every `every_epochs` epochs.
    Step {
        /// Epochs between changes.
        every_epochs: usize,
        /// The factor, in (0, 1].
        factor: f64,
    },
    /// Half a cosine from the learning rate down to `end_factor` times it, in [`MAX_STAIRS`] stairs
    /// of equal length, each as high as the curve in its middle.
    Cosine {
        /// The end as a part of the learning rate, 0 to 1.
        end_factor: f64,
    },
}

/// What is made small.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// Cross-entropy of the softmax: one of several classes.
    #[default]
    SoftmaxCrossEntropy,
    /// Binary cross-entropy of each output's sigmoid, mean over outputs: each class against the rest.
    BinaryCrossEntropy,
    /// Mean over outputs of `(output - label)^2`, labels 0 and 1.
    MeanSquaredError,
}

impl Loss {
    /// Its name in files.
    pub fn name(self) -> &'static str {
        match self {
            Loss::SoftmaxCrossEntropy => "softmax_cross_entropy",
            Loss::BinaryCrossEntropy => "binary_cross_entropy",
            Loss::MeanSquaredError => "mean_squared_error",
        }
    }
}

/// How weights follow from gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimiser {
    /// Gradient descent, with momentum if there is one.
    #[default]
    Sgd,
    /// Steps of each weight in units of its gradient's usual size. Needs the 64-bit ring.
    Adam(AdamSpec),
}

/// Numerators of the parts that Adam's moments forget have at most this many bits.
pub(crate) const BETA_BITS: u8 = 10;
/// Adam's corrections for an octave of their value: each is a Program.
const CORRECTIONS_AN_OCTAVE: f64 = 8.0;

/// Adam's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdamSpec {
    /// Part of the first moment that is kept, 0.5 to 0.99; used as a multiple of 1/1024.
    pub beta1: f64,
    /// Part of the second moment that is kept, 0.9 to 0.999; used as a multiple of 1/1024.
    pub beta2: f64,
    /// Gradients count as at least about this large: `sqrt(v + epsilon^2)`; 2^-16 to 1.
    pub epsilon: f64,
    /// The second moment never shrinks (AMSGrad).
    pub amsgrad: bool,
}

impl Default for AdamSpec {
    fn default() -> AdamSpec {
        AdamSpec {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-4,
            amsgrad: false,
        }
    }
}

impl AdamSpec {
    /// The parts of the moments that a step forgets, times 1024.
    pub(crate) fn forgets(&self) -> (i64, i64) {
        let unit = f64::from(1u32 << BETA_BITS);
        let part = |beta: f64| (libm::round((1.0 - beta) * unit) as i64).max(1);
        (part(self.beta1), part(self.beta2))
    }

    /// The betas as they are used.
    pub(crate) fn betas(&self) -> (f64, f64) {
        let unit = f64::from(1u32 << BETA_BITS);
        let (one, two) = self.forgets();
        (1.0 - one as f64 / unit, 1.0 - two as f64 / unit)
    }

    /// What makes up for moments that started at 0, after `steps` steps: to the nearest eighth of an
    /// octave.
    fn correction(&self, steps: usize) -> f64 {
        let (one, two) = self.betas();
        let left = |beta: f64| 1.0 - libm::pow(beta, steps as f64);
        let exact = libm::sqrt(left(two)) / left(one);
        libm::exp2(libm::round(libm::log2(exact) * CORRECTIONS_AN_OCTAVE) / CORRECTIONS_AN_OCTAVE)
    }
}

impl TrainSpec {
    /// Checks every field's range, and that there are as many class weights as classes.
    pub fn check_for(&self, network: &Network) -> Result<(), ModelError> {
        self.check()?;
        if network.gives_probabilities() && self.loss != Loss::SoftmaxCrossEntropy {
            return Err(job_error(
                "loss",
                self.loss.name(),
                "a network that ends in a softmax needs softmax_cross_entropy; leave the layer out for \
                 another loss",
            ));
        }
        let found = self.class_weights.len();
        if found == 0 || found == network.classes {
            return Ok(());
        }
        Err(job_error(
            "class_weights",
            format!("{found} weights"),
            format!("one for each of {} classes, or none", network.classes),
        ))
    }

    /// Checks what this file is about.
    pub(crate) fn check_recipe(&self) -> Result<(), ModelError> {
        let between = |field, found: f64, low: f64, high: f64| {
            if found.is_finite() && (low..=high).contains(&found) {
                return Ok(());
            }
            Err(job_error(
                field,
                found,
                format!("{low} to {high} are possible"),
            ))
        };
        between("learning_rate", self.learning_rate, MIN_RATE, 64.0)?;
        if self.momentum != 0.0 {
            between("momentum", self.momentum, 0.001, 0.999)
                .map_err(|_| job_error("momentum", self.momentum, "0, or 0.001 to 0.999"))?;
        }
        if self.nesterov && self.momentum == 0.0 {
            return Err(job_error("nesterov", true, "it needs a momentum"));
        }
        if self.weight_decay != 0.0 {
            between("weight_decay", self.weight_decay, 1e-6, 0.5)
                .map_err(|_| job_error("weight_decay", self.weight_decay, "0, or 1e-6 to 0.5"))?;
        }
        let scale = usize::from(self.gradient_scale_log2);
        check_range(
            "gradient_scale_log2",
            scale,
            0..=usize::from(MAX_GRADIENT_SCALE_LOG2),
        )?;
        for weight in &self.class_weights {
            between("class_weights", *weight, 1.0 / 64.0, 64.0)?;
        }
        if let Optimiser::Adam(adam) = self.optimiser {
            between("optimiser.adam.beta1", adam.beta1, 0.5, 0.99)?;
            between("optimiser.adam.beta2", adam.beta2, 0.9, 0.999)?;
            between("optimiser.adam.epsilon", adam.epsilon, 1.0 / 65536.0, 1.0)?;
            if self.ring_bits != 64 {
                return Err(job_error("optimiser", "adam", "it needs ring_bits = 64"));
            }
            if self.momentum != 0.0 {
                return Err(job_error(
                    "momentum",
                    self.momentum,
                    "0 with Adam, whose momentum is beta1",
                ));
            }
        }
        self.check_schedule()
    }

    fn check_schedule(&self) -> Result<(), ModelError> {
        match self.schedule {
            LrSchedule::Constant => {}
            LrSchedule::Step {
                every_epochs,
                factor,
            } => {
                check_range("schedule.every_epochs", every_epochs, 1..=10_000)?;
                if !(factor.is_finite() && factor > 0.0 && factor <= 1.0) {
                    return Err(job_error(
                        "schedule.factor",
                        factor,
                        "more than 0, at most 1",
                    ));
                }
                let rates = (self.epochs - 1) / every_epochs + 1;
                if factor < 1.0 && rates > MAX_RATES {
                    return Err(job_error(
                        "schedule.every_epochs",
                        every_epochs,
                        format!(
                            "{rates} learning rates in {} epochs, at most {MAX_RATES} are possible; change it less often",
                            self.epochs
                        ),
                    ));
                }
            }
            LrSchedule::Cosine { end_factor } => {
                if !(0.0..=1.0).contains(&end_factor) {
                    return Err(job_error("schedule.end_factor", end_factor, "0 to 1"));
                }
            }
        }
        // All schedules fall, and no run has more stairs than this.
        let last = self.rate_at(self.epochs * MAX_STAIRS - 1, MAX_STAIRS);
        if last < MIN_RATE {
            return Err(job_error(
                "schedule",
                last,
                format!("the last learning rate; at least {MIN_RATE} is possible"),
            ));
        }
        Ok(())
    }

    /// The learning rate of a step (from 0) where an epoch has `of` steps; with Adam times the
    /// correction of its moments.
    pub fn rate_at(&self, step: usize, of: usize) -> f64 {
        let rate = self.scheduled(step, of);
        match self.optimiser {
            Optimiser::Sgd => rate,
            Optimiser::Adam(adam) => rate * adam.correction(step + 1),
        }
    }

    fn scheduled(&self, step: usize, of: usize) -> f64 {
        match self.schedule {
            LrSchedule::Constant => self.learning_rate,
            LrSchedule::Step {
                every_epochs,
                factor,
            } => {
                let epoch = step / of.max(1);
                self.learning_rate * libm::pow(factor, (epoch / every_epochs.max(1)) as f64)
            }
            LrSchedule::Cosine { end_factor } => {
                let steps = (self.epochs * of).max(1);
                let stairs = steps.min(MAX_STAIRS);
                let stair = (step.min(steps - 1) as u128 * stairs as u128 / steps as u128) as f64;
                let way = (stair + 0.5) / stairs as f64;
                let height = (1.0 + libm::cos(std::f64::consts::PI * way)) / 2.0;
                self.learning_rate * (end_factor + (1.0 - end_factor) * height)
            }
        }
    }

    /// The hyper-parameters in words, for those who decide on a job.
    pub fn describe(&self) -> String {
        let ended = self
            .max_steps
            .map_or(String::new(), |steps| format!(" but {steps} steps at most"));
        let mut text = format!(
            "batch {}, {} epochs{ended}, learning rate {}",
            self.batch, self.epochs, self.learning_rate
        );
        // Writing to a String cannot fail.
        let _ = match self.schedule {
            LrSchedule::Constant => Ok(()),
            LrSchedule::Step {
                every_epochs,
                factor,
            } => write!(text, " (times {factor} after every {every_epochs} epochs)"),
            LrSchedule::Cosine { end_factor } => {
                write!(text, " (along a cosine to {end_factor} of it)")
            }
        };
        if let Optimiser::Adam(adam) = self.optimiser {
            let name = if adam.amsgrad { "AMSGrad" } else { "Adam" };
            let _ = write!(
                text,
                ", {name} (beta {} and {}, epsilon {})",
                adam.beta1, adam.beta2, adam.epsilon
            );
        }
        let nesterov = if self.nesterov { "Nesterov " } else { "" };
        let _ = write!(
            text,
            ", {nesterov}momentum {}, weight decay {}, loss {}",
            self.momentum,
            self.weight_decay,
            self.loss.name()
        );
        if !self.class_weights.is_empty() {
            let _ = write!(text, ", class weights {:?}", self.class_weights);
        }
        if let Some(rule) = &self.early_stop {
            let _ = write!(text, ", {rule}");
        }
        if self.gradient_scale_log2 > 0 {
            let _ = write!(text, ", gradients scaled by 2^{}", self.gradient_scale_log2);
        }
        let _ = write!(
            text,
            ", seed {}, {:?} rounding, {} fraction bits of {}",
            self.seed, self.rounding, self.frac_bits, self.ring_bits
        );
        text
    }
}
