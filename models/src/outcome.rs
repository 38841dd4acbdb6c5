//! Reads what a job reveals: ring tensors become counts, classes, scores.
//!
//! What follows from a confusion matrix (accuracy and so on) is a matter of the tool that prints it.

use std::collections::BTreeMap;

use ndarray::Array2;
use trefoil_protocol::Tensor;
use trefoil_protocol::fixed::decode;

use crate::ModelError;
use crate::programs::CONFIDENCE_BITS;

fn named<'a>(outputs: &'a BTreeMap<String, Tensor>, name: &str) -> Result<&'a Tensor, ModelError> {
    outputs
        .get(name)
        .ok_or_else(|| bad(name, "was not revealed".into()))
}

fn bad(name: &str, problem: String) -> ModelError {
    ModelError::Outcome {
        name: name.into(),
        problem,
    }
}

/// The confusion matrix of a result step: rows are labels, columns predictions.
pub fn confusion(outputs: &BTreeMap<String, Tensor>) -> Result<Array2<u64>, ModelError> {
    counts(outputs, "confusion")
}

/// The confusion matrix of a hospital's result step.
pub fn hospital_confusion(outputs: &BTreeMap<String, Tensor>) -> Result<Array2<u64>, ModelError> {
    counts(outputs, "hospital_confusion")
}

fn counts(outputs: &BTreeMap<String, Tensor>, name: &str) -> Result<Array2<u64>, ModelError> {
    let tensor = named(outputs, name)?;
    match tensor.shape() {
        [rows, cols] if rows == cols => {
            Array2::from_shape_vec((*rows, *cols), tensor.data().to_vec())
                .map_err(|error| bad(name, error.to_string()))
        }
        shape => Err(bad(name, format!("has shape {shape:?}, not a square"))),
    }
}

/// An area under the ROC curve.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Auc {
    /// 0 to 1.
    pub value: f64,
    /// The true area is at most this far: 0 where all pairs were compared.
    pub error: f64,
}

/// The area under the ROC curve of a result step (class 1 is the positive one); `None` if the rows
/// are all of one class.
pub fn auc(outputs: &BTreeMap<String, Tensor>) -> Result<Option<Auc>, ModelError> {
    let counts = confusion(outputs)?;
    let balance = named(outputs, "auc_balance")?;
    let ([balance], (2, 2)) = (balance.data(), counts.dim()) else {
        return Err(bad(
            "auc_balance",
            "needs one number and two classes".into(),
        ));
    };
    let ties = match outputs.get("auc_ties").map(Tensor::data) {
        None => 0,
        Some([ties]) => *ties,
        Some(_) => return Err(bad("auc_ties", "needs one number".into())),
    };
    let pairs = counts.row(0).sum() as f64 * counts.row(1).sum() as f64;
    Ok((pairs > 0.0).then(|| Auc {
        value: (1.0 + *balance as i64 as f64 / pairs) / 2.0,
        error: ties as f64 / pairs / 2.0,
    }))
}

/// A bin of a reliability histogram.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bin {
    /// Rows whose predicted class has a probability in the bin.
    pub rows: u64,
    /// Those of them that are predicted right.
    pub right: u64,
    /// The mean of these probabilities, within 2^-10; `None` without rows.
    pub confidence: Option<f64>,
}

/// The reliability histogram of a result step: bins of equal width from 0 to 1.
pub fn calibration(outputs: &BTreeMap<String, Tensor>) -> Result<Vec<Bin>, ModelError> {
    let tensor = named(outputs, "calibration")?;
    let [3, bins] = *tensor.shape() else {
        let problem = format!("has shape {:?}, not three rows", tensor.shape());
        return Err(bad("calibration", problem));
    };
    let (rows, rest) = tensor.data().split_at(bins);
    let (right, sums) = rest.split_at(bins);
    let bins = rows.iter().zip(right).zip(sums);
    let bins = bins.map(|((rows, right), sum)| Bin {
        rows: *rows,
        right: *right,
        confidence: (*rows > 0).then(|| decode(*sum, u32::from(CONFIDENCE_BITS)) / *rows as f64),
    });
    Ok(bins.collect())
}

/// The expected calibration error: the mean over rows of how far a bin's mean confidence is from the
/// part of it that is right (Naeini, Cooper and Hauskrecht 2015); `None` without rows.
pub fn calibration_error(bins: &[Bin]) -> Option<f64> {
    let total: u64 = bins.iter().map(|bin| bin.rows).sum();
    let gaps = bins.iter().filter_map(|bin| {
        let confidence = bin.confidence?;
        Some((bin.right as f64 - confidence * bin.rows as f64).abs())
    });
    let gap: f64 = gaps.sum();
    (total > 0).then(|| gap / total as f64)
}

/// Predicted classes of all prediction steps, one after the other, without the padding.
pub fn classes(steps: &[BTreeMap<String, Tensor>], rows: usize) -> Result<Vec<usize>, ModelError> {
    let words = collected(steps, "class", rows)?;
    Ok(words.into_iter().map(|word| word as usize).collect())
}

/// Logits (`frac_bits` = 2f) or probabilities (16) of all prediction steps, without the padding.
pub fn rows(
    steps: &[BTreeMap<String, Tensor>],
    name: &str,
    rows: usize,
    frac_bits: u32,
) -> Result<Array2<f64>, ModelError> {
    let words = collected(steps, name, rows)?;
    let values: Vec<f64> = words
        .into_iter()
        .map(|word| decode(word, frac_bits))
        .collect();
    let width = values.len() / rows.max(1);
    Array2::from_shape_vec((rows, width), values).map_err(|error| bad(name, error.to_string()))
}

fn collected(
    steps: &[BTreeMap<String, Tensor>],
    name: &str,
    rows: usize,
) -> Result<Vec<u64>, ModelError> {
    let (mut words, mut width) = (Vec::new(), 1);
    for tensor in steps.iter().filter_map(|outputs| outputs.get(name)) {
        width = tensor.shape().iter().skip(1).product();
        words.extend_from_slice(tensor.data());
    }
    if words.len() < rows * width {
        return Err(bad(
            name,
            format!("has {} rows, expected {rows}", words.len() / width.max(1)),
        ));
    }
    words.truncate(rows * width);
    Ok(words)
}
