//! Average pools: sums over windows, each times one divided by the number of its values.
//!
//! What of the border counts is the layer's ([`Layer::counts`]). Where all windows have as many values
//! there is one ratio, else one for each place; the error is that of a ratio, at most `2^-10` relative and
//! none for powers of two. The gradient passes the same factors and is spread: no rounds, no bytes,
//! unless a truncation makes room ([`with_room`]).

use trefoil_protocol::program::{BuildError, Builder, PoolSpec, Rounding, Val};

use super::Ratio;
use super::forward::{divide, pool_spec, with_room};
use crate::network::{Layer, Window};

/// An average pool's windows, and what their sums are multiplied with.
#[derive(Debug)]
pub(crate) struct Averages {
    spec: PoolSpec,
    /// One for all windows, or one for each place of a window.
    factors: Vec<i64>,
    /// Logarithm of their common denominator.
    shift: u8,
}

impl Averages {
    pub(crate) fn new(layer: &Layer, window: Window) -> Averages {
        let counts = layer.counts().into_iter();
        let ratios: Vec<Ratio> = counts.map(|n| Ratio::nearest(1.0 / n as f64)).collect();
        let shift = ratios.iter().map(|ratio| ratio.shift).max().unwrap_or(0);
        let mut factors: Vec<i64> = ratios
            .iter()
            .map(|ratio| ratio.factor << (shift - ratio.shift))
            .collect();
        if factors.iter().all(|factor| *factor == factors[0]) {
            factors.truncate(1);
        }
        Averages {
            spec: pool_spec(window),
            factors,
            shift,
        }
    }

    /// The averages of x.
    pub(crate) fn forward(
        &self,
        b: &mut Builder,
        x: Val,
        f: u8,
        rounding: Rounding,
    ) -> Result<Val, BuildError> {
        let sums = b.sum_pool(x, self.spec)?;
        self.divided(b, sums, f, rounding)
    }

    /// The gradient of x, whose shape this is, from that of the averages.
    pub(crate) fn gradient(
        &self,
        b: &mut Builder,
        g: Val,
        x_shape: &[usize],
        f: u8,
        rounding: Rounding,
    ) -> Result<Val, BuildError> {
        let g = self.divided(b, g, f, rounding)?;
        b.sum_pool_grad(g, x_shape, self.spec)
    }

    fn divided(
        &self,
        b: &mut Builder,
        x: Val,
        f: u8,
        rounding: Rounding,
    ) -> Result<Val, BuildError> {
        let shift = self.shift;
        if let [factor] = self.factors[..] {
            return divide(b, x, Ratio { factor, shift }, f, rounding);
        }
        let x = with_room(b, x, shift, f, rounding)?;
        let scaled = b.scale_each(x, &self.factors)?;
        let frac = b.ty(x).frac_bits + shift;
        b.rescale(scaled, frac)
    }
}
