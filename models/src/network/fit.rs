//! Polynomials in the place of ReLU: the closest ones on an interval, by two measures of distance.
//!
//! Only sums, products and quotients of `f64`, and `libm`: the same coefficients on every platform, as the
//! Programs' hashes ask for. Sources: projection on Legendre polynomials for the mean square, the exchange
//! algorithm of Remez (1934) for the largest distance.

use serde::{Deserialize, Serialize};

/// What is made small.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fit {
    /// The mean square of the distance.
    #[default]
    LeastSquares,
    /// The largest distance.
    Minimax,
}

/// Points at which the exchange algorithm looks for the largest distance.
const GRID: usize = 8192;
/// Exchanges, at most; about 20 are needed.
const EXCHANGES: usize = 200;

/// Coefficients, from the constant upward, of the polynomial of this degree that is closest to ReLU
/// between `low < 0` and `high > 0`.
pub fn relu(fit: Fit, degree: usize, [low, high]: [f64; 2]) -> Vec<f64> {
    // ReLU at x = centre + half t, for t in [-1, 1].
    let (centre, half) = ((low + high) / 2.0, (high - low) / 2.0);
    let in_t = match fit {
        Fit::LeastSquares => least_squares(degree, centre, half),
        Fit::Minimax => minimax(degree, centre, half),
    };
    // t = (x - centre) / half, by Horner's rule on polynomials.
    let mut out = vec![0.0];
    for c in in_t.iter().rev() {
        out = multiply(&out, &[-centre / half, 1.0 / half]);
        out[0] += c;
    }
    out.truncate(degree + 1);
    out
}

fn multiply(a: &[f64], b: &[f64]) -> Vec<f64> {
    let mut out = vec![0.0; a.len() + b.len() - 1];
    for (i, a) in a.iter().enumerate() {
        for (j, b) in b.iter().enumerate() {
            out[i + j] += a * b;
        }
    }
    out
}

/// The value of a polynomial.
pub fn evaluate(coefficients: &[f64], x: f64) -> f64 {
    coefficients.iter().rev().fold(0.0, |sum, c| sum * x + c)
}

/// The integral of a polynomial.
fn integral(coefficients: &[f64], from: f64, to: f64) -> f64 {
    let terms = coefficients.iter().enumerate();
    let mut primitive = vec![0.0];
    primitive.extend(terms.map(|(j, c)| c / (j + 1) as f64));
    evaluate(&primitive, to) - evaluate(&primitive, from)
}

fn least_squares(degree: usize, centre: f64, half: f64) -> Vec<f64> {
    let kink = -centre / half;
    let mut sum = vec![0.0; degree + 1];
    let (mut before, mut legendre) = (vec![0.0], vec![1.0]);
    for n in 0..=degree {
        let above = integral(&multiply(&legendre, &[centre, half]), kink, 1.0);
        let part = (2 * n + 1) as f64 / 2.0 * above;
        legendre
            .iter()
            .zip(&mut sum)
            .for_each(|(l, s)| *s += part * l);
        // (n + 1) P_(n+1) = (2n + 1) t P_n - n P_(n-1)
        let mut next = multiply(&legendre, &[0.0, (2 * n + 1) as f64 / (n + 1) as f64]);
        let back = n as f64 / (n + 1) as f64;
        before
            .iter()
            .zip(&mut next)
            .for_each(|(b, x)| *x -= back * b);
        before = std::mem::replace(&mut legendre, next);
    }
    sum
}

/// One exchange after the other on a fine grid: the point of the largest distance takes the place of the
/// neighbour in the reference whose distance has its sign, which makes the reference's level grow.
fn minimax(degree: usize, centre: f64, half: f64) -> Vec<f64> {
    let relu = |t: f64| libm::fmax(0.0, centre + half * t);
    let mut points: Vec<f64> = (0..=GRID)
        .map(|i| 2.0 * i as f64 / GRID as f64 - 1.0)
        .collect();
    points.push(-centre / half);
    points.sort_by(f64::total_cmp);
    let n = degree + 2;
    // Not symmetric: on a symmetric interval the level of such a reference would be 0.
    let mut reference: Vec<f64> = (0..n)
        .map(|i| points[(3 * i + 1) * points.len() / (3 * n)])
        .collect();
    let mut best = Vec::new();
    for _ in 0..EXCHANGES {
        // p(t_i) + (-1)^i E = relu(t_i)
        let row = |(i, t): (usize, &f64)| {
            let mut row: Vec<f64> = vec![1.0];
            (1..=degree).for_each(|j| row.push(row[j - 1] * t));
            row.push(if i % 2 == 0 { 1.0 } else { -1.0 });
            row.push(relu(*t));
            row
        };
        let mut solution = solve(reference.iter().enumerate().map(row).collect());
        let level = solution.pop().unwrap_or(0.0);
        best = solution;
        let error = |t: f64| relu(t) - evaluate(&best, t);
        let mut far = points[0];
        for t in &points {
            if libm::fabs(error(*t)) > libm::fabs(error(far)) {
                far = *t;
            }
        }
        if libm::fabs(error(far)) <= libm::fabs(level) * (1.0 + 1e-12) {
            break;
        }
        let above = |i: usize| i.is_multiple_of(2) == (level > 0.0);
        let after = reference.iter().filter(|t| **t < far).count();
        let up = error(far) > 0.0;
        match after {
            0 if above(0) == up => reference[0] = far,
            0 => {
                reference.pop();
                reference.insert(0, far);
            }
            last if last == n && above(n - 1) != up => {
                reference.remove(0);
                reference.push(far);
            }
            i if i < n && above(i) == up => reference[i] = far,
            i => reference[i - 1] = far,
        }
    }
    best
}

/// Solves a system of linear equations, each row with its right side last, by elimination with pivots.
fn solve(mut rows: Vec<Vec<f64>>) -> Vec<f64> {
    let n = rows.len();
    for column in 0..n {
        let size = |row: &usize| libm::fabs(rows[*row][column]);
        let pivot = (column..n)
            .max_by(|a, b| size(a).total_cmp(&size(b)))
            .unwrap_or(column);
        rows.swap(column, pivot);
        let chosen = rows[column].clone();
        for (at, row) in rows.iter_mut().enumerate() {
            if at != column {
                let factor = row[column] / chosen[column];
                row.iter_mut()
                    .zip(&chosen)
                    .for_each(|(x, c)| *x -= factor * c);
            }
        }
    }
    (0..n).map(|at| rows[at][n] / rows[at][at]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn largest(coefficients: &[f64], [low, high]: [f64; 2]) -> f64 {
        (0..=20_000)
            .map(|i| low + (high - low) * f64::from(i) / 20_000.0)
            .map(|x| (evaluate(coefficients, x) - x.max(0.0)).abs())
            .fold(0.0, f64::max)
    }

    fn mean_square(coefficients: &[f64], [low, high]: [f64; 2]) -> f64 {
        let n = 20_000;
        let error = |i: i32| {
            let x = low + (high - low) * (f64::from(i) + 0.5) / f64::from(n);
            (evaluate(coefficients, x) - x.max(0.0)).powi(2)
        };
        (0..n).map(error).sum::<f64>() / f64::from(n)
    }

    #[test]
    fn known_polynomials_come_out() {
        // |x| on [-1, 1]: x^2 + 1/8 is the closest of degree 2 and 3; 3/16 + 15/16 x^2 the closest in the
        // mean. ReLU is half of it and x / 2.
        let close = |found: Vec<f64>, known: &[f64]| {
            assert_eq!(found.len(), known.len());
            for (f, k) in found.iter().zip(known) {
                assert!((f - k).abs() < 1e-7, "{found:?}, not {known:?}");
            }
        };
        close(relu(Fit::Minimax, 2, [-1.0, 1.0]), &[0.0625, 0.5, 0.5]);
        close(relu(Fit::Minimax, 3, [-1.0, 1.0]), &[0.0625, 0.5, 0.5, 0.0]);
        let squares = [3.0 / 32.0, 0.5, 15.0 / 32.0];
        close(relu(Fit::LeastSquares, 2, [-1.0, 1.0]), &squares);
        // Scaled: p_4(x) = 4 p_1(x / 4).
        close(relu(Fit::Minimax, 2, [-4.0, 4.0]), &[0.25, 0.5, 0.125]);
        close(
            relu(Fit::LeastSquares, 4, [-1.0, 1.0]),
            &[15.0 / 256.0, 0.5, 105.0 / 128.0, 0.0, -105.0 / 256.0],
        );
    }

    /// No small change of a coefficient makes the measure smaller, on intervals with the kink anywhere.
    #[test]
    fn each_fit_is_the_best_by_its_measure() {
        for interval in [[-4.0, 4.0], [-3.0, 5.0], [-6.0, 2.0], [-1.0, 8.0]] {
            for degree in 2..=4 {
                let squares = relu(Fit::LeastSquares, degree, interval);
                let minimax = relu(Fit::Minimax, degree, interval);
                assert!(largest(&minimax, interval) < largest(&squares, interval));
                assert!(mean_square(&squares, interval) < mean_square(&minimax, interval));
                for j in 0..=degree {
                    for by in [1e-3, -1e-3] {
                        let mut moved = [squares.clone(), minimax.clone()];
                        moved
                            .iter_mut()
                            .for_each(|m| m[j] += by / 4f64.powi(j as i32));
                        let [s, m] = moved;
                        assert!(mean_square(&s, interval) > mean_square(&squares, interval));
                        assert!(
                            largest(&m, interval) > largest(&minimax, interval) - 1e-9,
                            "degree {degree} on {interval:?}, coefficient {j}"
                        );
                    }
                }
                println!(
                    "degree {degree} on {interval:?}: minimax {:.4}, least squares {:.4}",
                    largest(&minimax, interval),
                    largest(&squares, interval)
                );
            }
        }
    }
}
