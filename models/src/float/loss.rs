//! Losses and their gradients by the logits, in `f32`.

use ndarray::{Array2, ArrayViewMut1};

use crate::job::Loss;

/// Loss and gradient of some rows of a batch of `rows`, both divided by `rows`.
pub(super) fn gradient(
    loss: Loss,
    class_weights: &[f64],
    logits: &Array2<f32>,
    labels: &[u8],
    rows: usize,
) -> (f64, Array2<f32>) {
    let mut gradient = logits.clone();
    let mut sum = 0.0;
    for (mut row, label) in gradient.rows_mut().into_iter().zip(labels) {
        let label = usize::from(*label);
        let of_row = match loss {
            Loss::SoftmaxCrossEntropy => softmax(&mut row, label),
            Loss::BinaryCrossEntropy => binary(&mut row, label),
            Loss::MeanSquaredError => squares(&mut row, label),
        };
        let weight = class_weights
            .get(label)
            .map_or(1.0, |weight| *weight as f32);
        row.mapv_inplace(|g| g * (weight / rows as f32));
        sum += f64::from(of_row * weight);
    }
    (sum / rows as f64, gradient)
}

/// Cross-entropy; the row becomes `softmax(z) - y`.
fn softmax(row: &mut ArrayViewMut1<'_, f32>, label: usize) -> f32 {
    let max = row.fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let target = row[label] - max;
    row.mapv_inplace(|x| (x - max).exp());
    let sum = row.sum();
    row.mapv_inplace(|e| e / sum);
    row[label] -= 1.0;
    sum.ln() - target
}

/// Mean over outputs of the binary cross-entropy with logits.
fn binary(row: &mut ArrayViewMut1<'_, f32>, label: usize) -> f32 {
    let classes = row.len() as f32;
    let mut loss = 0.0;
    for (class, z) in row.iter_mut().enumerate() {
        let y = f32::from(u8::from(class == label));
        // log(1 + e^z) - y z, without overflow.
        loss += z.max(0.0) - y * *z + (-z.abs()).exp().ln_1p();
        *z = (1.0 / (1.0 + (-*z).exp()) - y) / classes;
    }
    loss / classes
}

/// Mean over outputs of the squared difference.
fn squares(row: &mut ArrayViewMut1<'_, f32>, label: usize) -> f32 {
    let classes = row.len() as f32;
    row[label] -= 1.0;
    let loss = row.dot(row) / classes;
    row.mapv_inplace(|d| 2.0 * d / classes);
    loss
}
