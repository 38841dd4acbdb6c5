//! Batch normalisation and its gradient in `f32`.

use ndarray::{Array1, Array2};

use super::Parameters;
use crate::network::VARIANCE_EPSILON_LOG2;

/// Mean and (biased) variance of every channel.
#[derive(Clone, Debug, PartialEq)]
pub struct Statistics {
    /// Mean.
    pub mean: Array1<f32>,
    /// Variance, without the epsilon.
    pub variance: Array1<f32>,
}

impl Statistics {
    /// Those of a batch `[rows, channels * values]`.
    pub(super) fn of(x: &Array2<f32>, channels: usize) -> Statistics {
        let values = (x.len() / channels.max(1)) as f64;
        let inner = x.ncols() / channels;
        let sum = |each: &dyn Fn(usize, f64) -> f64| {
            let mut sums = vec![0.0f64; channels];
            for row in x.rows() {
                for (at, x) in row.iter().enumerate() {
                    sums[at / inner] += each(at / inner, f64::from(*x));
                }
            }
            sums
        };
        let mean: Vec<f64> = sum(&|_, x| x).iter().map(|s| s / values).collect();
        let squares = sum(&|c, x| (x - mean[c]) * (x - mean[c]));
        Statistics {
            mean: mean.iter().map(|m| *m as f32).collect(),
            variance: squares.iter().map(|s| (s / values) as f32).collect(),
        }
    }

    /// `r + momentum (batch - r)`.
    pub(super) fn follow(&mut self, batch: &Statistics, momentum: f64) {
        let by = momentum as f32;
        self.mean
            .zip_mut_with(&batch.mean, |r, v| *r += by * (v - *r));
        self.variance
            .zip_mut_with(&batch.variance, |r, v| *r += by * (v - *r));
    }

    fn inverse(&self, channel: usize) -> f32 {
        let epsilon = f32::powi(2.0, i32::from(VARIANCE_EPSILON_LOG2));
        1.0 / (self.variance[channel] + epsilon).sqrt()
    }
}

/// `gamma (x - mean) / sqrt(variance + eps) + beta`
pub(super) fn normalise(x: &Array2<f32>, p: &Parameters, by: &Statistics) -> Array2<f32> {
    let inner = x.ncols() / p.bias.len();
    let mut y = x.clone();
    for ((_, at), y) in y.indexed_iter_mut() {
        let c = at / inner;
        *y = p.weight[[c, 0]] * (*y - by.mean[c]) * by.inverse(c) + p.bias[c];
    }
    y
}

/// Gradients of gamma and beta, and of x.
pub(super) fn backward(
    x: &Array2<f32>,
    p: &Parameters,
    by: &Statistics,
    g: &Array2<f32>,
) -> (Parameters, Array2<f32>) {
    let inner = x.ncols() / p.bias.len();
    let values = (x.nrows() * inner) as f32;
    let mut gradient = Parameters::zeros_like(p);
    let normal = |at: usize, x: f32| (x - by.mean[at / inner]) * by.inverse(at / inner);
    for ((row, at), g) in g.indexed_iter() {
        gradient.bias[at / inner] += g;
        gradient.weight[[at / inner, 0]] += g * normal(at, x[[row, at]]);
    }
    let mut dx = g.clone();
    for ((row, at), dx) in dx.indexed_iter_mut() {
        let c = at / inner;
        let along = gradient.weight[[c, 0]] * normal(at, x[[row, at]]);
        let centred = *dx - (gradient.bias[c] + along) / values;
        *dx = p.weight[[c, 0]] * by.inverse(c) * centred;
    }
    (gradient, dx)
}
