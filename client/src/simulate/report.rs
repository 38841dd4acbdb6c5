//! What a simulation found: printed for people, and the same as one JSON object.

use std::fmt;

use serde::{Deserialize, Serialize};
use trefoil_models::outcome::Auc;

use crate::metrics::Confusion;
use crate::plan::bytes;

/// Quality on the test split.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Fraction of rows classified right.
    pub accuracy: f64,
    /// Mean of the classes' recalls.
    pub balanced_accuracy: f64,
    /// Area under the ROC curve; two classes only.
    pub auc: Option<f64>,
    /// How far the true area may be from it; 0 where all pairs were compared.
    pub auc_error: Option<f64>,
}

/// A training run's costs.
#[derive(Clone, Debug, Default, Serialize)]
pub struct TrainFigures {
    /// Training steps.
    pub steps: u64,
    /// Median seconds of a step.
    pub seconds_per_step: f64,
    /// Rounds among the parties in a step.
    pub rounds_per_step: u64,
    /// Bytes that P0 sent to the other parties in a step.
    pub bytes_per_step: u64,
    /// Seconds from the start of the session to its end, evaluations included.
    pub seconds: f64,
}

/// The prediction at the end.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PredictFigures {
    /// Images classified.
    pub images: usize,
    /// Seconds of an image: upload, session, result.
    pub seconds_per_image: f64,
    /// The classes that the hospital opened.
    pub predicted: Vec<usize>,
    /// The classes that the pictures have.
    pub actual: Vec<usize>,
}

/// Bytes on one directed link over the whole simulation.
#[derive(Clone, Debug, Serialize)]
pub struct LinkBytes {
    /// Sender.
    pub from: String,
    /// Receiver.
    pub to: String,
    /// Payload bytes: frames with their headers.
    pub bytes: u64,
}

/// One epoch.
#[derive(Clone, Debug, Serialize)]
pub struct Epoch {
    /// From 1.
    pub epoch: usize,
    /// Accuracy on the test split after it.
    pub accuracy: f64,
    /// Mean loss of the same epoch in ordinary floating point.
    pub float_loss: f64,
}

/// Everything that a simulation prints.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The network's name.
    pub network: String,
    /// Where the data came from.
    pub data: String,
    /// The link.
    pub link: String,
    /// Hospitals that shared data.
    pub hospitals: usize,
    /// Training and test rows.
    pub train_rows: usize,
    /// Test rows.
    pub test_rows: usize,
    /// Seconds that all hospitals took to share all rows.
    pub share_seconds: f64,
    /// Epoch by epoch.
    pub epochs: Vec<Epoch>,
    /// Accuracy on the test split, of the secure run.
    pub accuracy: f64,
    /// Balanced accuracy of the secure run.
    pub balanced_accuracy: f64,
    /// Area under the ROC curve of the secure run; two classes only.
    pub auc: Option<f64>,
    /// Counts by true class (rows) and predicted class.
    pub confusion: Vec<Vec<u64>>,
    /// Class names in order.
    pub class_names: Vec<String>,
    /// Accuracy of the plaintext fixed-point reference.
    pub plain_accuracy: f64,
    /// Accuracy of the same network in ordinary floating point with the same seed.
    pub float_accuracy: f64,
    /// All qualities of the floating-point run.
    pub float: Quality,
    /// Whether every revealed value and the weights equal the reference bit for bit.
    pub bit_identical: bool,
    /// Hash of the trained weights.
    pub weights_sha256: String,
    /// Training.
    pub train: TrainFigures,
    /// Prediction.
    pub predict: PredictFigures,
    /// Rounds of all sessions.
    pub rounds: u64,
    /// Payload bytes that each party sent to the two others, in all sessions (the largest).
    pub bytes_sent_per_party: u64,
    /// Payload bytes that the dealer sent, all three links, all sessions.
    pub dealer_bytes: u64,
    /// By directed link.
    pub links: Vec<LinkBytes>,
    /// Seconds of the whole simulation.
    pub seconds: f64,
}

/// Accuracy, balanced accuracy and AUC of a confusion matrix.
pub fn quality(confusion: &Confusion, auc: Option<Auc>) -> Quality {
    Quality {
        accuracy: confusion.accuracy().unwrap_or(0.0),
        balanced_accuracy: confusion.balanced_accuracy().unwrap_or(0.0),
        auc: auc.map(|auc| auc.value),
        auc_error: auc.map(|auc| auc.error),
    }
}

impl fmt::Display for Quality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (accuracy, balanced) = (Percent(self.accuracy), Percent(self.balanced_accuracy));
        write!(f, "accuracy {accuracy}, balanced {balanced}")?;
        let Some(auc) = self.auc else { return Ok(()) };
        write!(f, ", AUC {auc:.4}")?;
        match self.auc_error {
            Some(error) if error > 0.0 => write!(f, " (within {error:.4})"),
            _ => Ok(()),
        }
    }
}

struct Percent(f64);

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} %", 100.0 * self.0)
    }
}

fn line(name: &str, value: impl fmt::Display) {
    println!("{name:<28} {value}");
}

impl Report {
    /// Prints the results to stdout.
    pub fn print(&self, confusion: &Confusion) {
        for epoch in &self.epochs {
            line(
                &format!("epoch {}", epoch.epoch),
                format!(
                    "test accuracy {} (float: mean loss {:.4})",
                    Percent(epoch.accuracy),
                    epoch.float_loss
                ),
            );
        }
        println!();
        line("test accuracy", Percent(self.accuracy));
        line("balanced accuracy", Percent(self.balanced_accuracy));
        if let Some(auc) = self.auc {
            line("AUC", format!("{auc:.4}"));
        }
        line("same seed in floating point", &self.float);
        println!("\n{confusion}");
        line("training steps", self.train.steps);
        line(
            "seconds per step",
            format!("{:.3}", self.train.seconds_per_step),
        );
        line("rounds per step", self.train.rounds_per_step);
        line("bytes per step and party", bytes(self.train.bytes_per_step));
        line(
            "seconds per prediction",
            format!("{:.3}", self.predict.seconds_per_image),
        );
        line("rounds in all", self.rounds);
        line("bytes sent per party", bytes(self.bytes_sent_per_party));
        line("dealer bytes", bytes(self.dealer_bytes));
        for link in &self.links {
            line(
                &format!("  {} to {}", link.from, link.to),
                bytes(link.bytes),
            );
        }
        println!();
        let right = self
            .predict
            .predicted
            .iter()
            .zip(&self.predict.actual)
            .filter(|(p, a)| p == a)
            .count();
        line(
            "predicted for hospital-1",
            format!("{:?}", self.predict.predicted),
        );
        line(
            "what the pictures show",
            format!(
                "{:?} ({right} of {} right)",
                self.predict.actual, self.predict.images
            ),
        );
        println!();
        println!(
            "secure result equals the plaintext reference: {} (weights sha256 {})",
            if self.bit_identical { "yes" } else { "NO" },
            self.weights_sha256
        );
        line("seconds in all", format!("{:.1}", self.seconds));
    }
}
