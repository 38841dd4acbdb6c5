//! Polynomials with learnt coefficients, and their gradient, in `f32`.

use ndarray::{Array2, Zip};

use super::Parameters;

/// `bias + weight_0 x + weight_1 x^2 + ..` with the coefficients of each channel.
pub(super) fn forward(p: &Parameters, x: &Array2<f32>) -> Array2<f32> {
    let inner = x.ncols() / p.bias.len();
    let mut y = x.clone();
    for ((_, at), y) in y.indexed_iter_mut() {
        let c = at / inner;
        let column = p.weight.column(c);
        *y = column.iter().rev().fold(0.0, |sum, w| (sum + w) * *y) + p.bias[c];
    }
    y
}

/// Gradients of the coefficients, and of x.
pub(super) fn backward(
    p: &Parameters,
    x: &Array2<f32>,
    g: &Array2<f32>,
) -> (Parameters, Array2<f32>) {
    let inner = x.ncols() / p.bias.len();
    let mut gradient = Parameters::zeros_like(p);
    let mut dx = g.clone();
    Zip::indexed(&mut dx).and(x).for_each(|(_, at), dx, x| {
        let (c, g) = (at / inner, *dx);
        gradient.bias[c] += g;
        let (mut power, mut slope) = (1.0, 0.0);
        for (j, w) in p.weight.column(c).iter().enumerate() {
            slope += (j + 1) as f32 * w * power;
            power *= x;
            gradient.weight[[j, c]] += g * power;
        }
        *dx = g * slope;
    });
    (gradient, dx)
}
