//! Composites: functions on the builder made of primitive operations, so that secure equals plain
//! without further proof. Tables and coefficients come from the `libm` crate: the same on every
//! platform. Each states its domain and error bound; `protocol/tests/composite.rs` tests them.

use crate::fixed::encode;
use crate::program::{BuildError, Builder, Rounding, Table, Val};

/// Fraction bits of the exponent inside [`Builder::exp_neg`]: 4 integer bits and these fill 16.
const EXPONENT_FRAC: u8 = 12;
/// Fraction bits of exponentials and probabilities.
pub const PROBABILITY_FRAC: u8 = 16;
/// Fraction bits of reciprocals.
const RECIPROCAL_FRAC: u8 = 24;
/// Smallest ring in which a product of two values with 24 fraction bits each has room.
const NEWTON_RING_BITS: u8 = 64;
/// Index bits of the reciprocal's tables.
const RECIPROCAL_INDEX: u8 = 10;

pub(super) fn table(frac_bits: u8, values: impl Iterator<Item = f64>) -> Table {
    let values: Vec<u64> = values.map(|v| encode(v, u32::from(frac_bits))).collect();
    let largest = values.iter().copied().max().unwrap_or(0).max(1);
    Table {
        out_bits: (64 - largest.leading_zeros()) as u8,
        values,
        frac_bits,
    }
}

impl Builder {
    /// `exp(-d)` for `d >= 0`, 16 fraction bits; 0 up to rounding for d above 16.
    ///
    /// 1. `u = relu(16 - 2^-12 - d)` truncated to 12 fraction bits: 16 bits.
    /// 2. `exp(-d) = H[u >> 8] * L[u mod 256]`, both tables at most 1, truncated.
    ///
    /// d needs at least 13 fraction bits. Absolute error below `2^-12`. 4 + 4 + 4 rounds.
    pub fn exp_neg(&mut self, d: Val) -> Result<Val, BuildError> {
        let frac = self.ty(d).frac_bits;
        if frac <= EXPONENT_FRAC {
            return Err(self.error(
                "exp",
                format!("{frac} fraction bits; needs at least {}", EXPONENT_FRAC + 1),
            ));
        }
        let shift = frac - EXPONENT_FRAC;
        let top = (16i64 << frac) - (1 << shift);
        let negated = self.scale(d, -1)?;
        let flipped = self.add_const(negated, top)?;
        let (u, _) = self.relu_trunc(flipped, shift, Rounding::Nearest)?;
        let step = |distance: usize, unit: f64| libm::exp(-(distance as f64) * unit);
        let high = table(
            PROBABILITY_FRAC,
            (0..256).map(|h| step(255 - h, 1.0 / 16.0)),
        );
        let low = table(
            PROBABILITY_FRAC,
            (0..256).map(|l| step(255 - l, 1.0 / 4096.0)),
        );
        let high = self.lookup(u, 8, 8, 16, vec![high])?[0];
        let low = self.lookup(u, 0, 8, 16, vec![low])?[0];
        let product = self.mul(high, low)?;
        self.trunc(product, PROBABILITY_FRAC, Rounding::Nearest)
    }

    /// `1 / s` for `1 <= s < 2^integer_bits` with 16 fraction bits; the result has 24.
    ///
    /// 1. Index: the top 10 bits of s. Tables of `a` and `b` with `1/s` about `a - b s` on the cell.
    /// 2. Newton steps `y (2 - s y)` while the cell's relative width asks for them (none up to 5 integer
    ///    bits). Their product has 48 fraction bits: in the 48-bit ring there is no room for it, and more
    ///    than 5 integer bits are refused.
    ///
    /// Relative error below `2^-12`. 4 + 4 rounds, and 8 for each Newton step.
    pub fn reciprocal(&mut self, s: Val, integer_bits: u8) -> Result<Val, BuildError> {
        if self.ty(s).frac_bits != PROBABILITY_FRAC || !(1..=11).contains(&integer_bits) {
            return Err(self.error(
                "reciprocal",
                "needs 16 fraction bits and 1 to 11 integer bits",
            ));
        }
        let position = PROBABILITY_FRAC + integer_bits - RECIPROCAL_INDEX;
        let cell = libm::exp2(f64::from(position) - f64::from(PROBABILITY_FRAC));
        // On a cell with centre c and half width h the tangent errs by (h/c)^2 at most; half of it
        // added to the constant term balances the error.
        let line = |j: usize| {
            let low = (j as f64 * cell).max(1.0);
            let high = (j + 1) as f64 * cell;
            let (c, h) = ((low + high) / 2.0, (high - low) / 2.0);
            if high <= 1.0 {
                (0.0, 0.0)
            } else {
                (2.0 / c + h * h / (2.0 * c * c * c), 1.0 / (c * c))
            }
        };
        let indices = || 0..1usize << RECIPROCAL_INDEX;
        let a = table(RECIPROCAL_FRAC, indices().map(|j| line(j).0));
        let b = table(RECIPROCAL_FRAC, indices().map(|j| line(j).1));
        let open_bits = position + RECIPROCAL_INDEX;
        let ab = self.lookup(s, position, RECIPROCAL_INDEX, open_bits, vec![a, b])?;
        let slope = self.mul(ab[1], s)?;
        let constant = self.scale(ab[0], 1 << PROBABILITY_FRAC)?;
        let constant = self.rescale(constant, RECIPROCAL_FRAC + PROBABILITY_FRAC)?;
        let difference = self.sub(constant, slope)?;
        let mut y = self.trunc(difference, PROBABILITY_FRAC, Rounding::Nearest)?;
        // Relative error on the worst cell, at 1.
        let mut error = (cell.min(1.0) / 2.0) * (cell.min(1.0) / 2.0) / 2.0;
        let newton = |error: f64| error > libm::exp2(-13.0);
        if newton(error) && self.ring_bits() < NEWTON_RING_BITS {
            let ring = self.ring_bits();
            return Err(self.error(
                "reciprocal",
                format!("{integer_bits} integer bits; in the {ring}-bit ring 1 to 5 are possible: a Newton step needs the 64-bit one"),
            ));
        }
        while newton(error) {
            let product = self.mul(s, y)?;
            let product = self.trunc(product, PROBABILITY_FRAC, Rounding::Nearest)?;
            let negated = self.scale(product, -1)?;
            let correction = self.add_const(negated, 2 << RECIPROCAL_FRAC)?;
            let next = self.mul(y, correction)?;
            y = self.trunc(next, RECIPROCAL_FRAC, Rounding::Nearest)?;
            error *= error;
        }
        Ok(y)
    }

    /// Softmax over the last axis of `[rows, n]`, n at most 100, 16 fraction bits. Absolute error
    /// below `2^-10` for n up to 20; beyond, errors of the n exponentials add up in the sum.
    ///
    /// 1. The maximum by argmax and selection; `d = max - x >= 0`.
    /// 2. `e = exp(-d)`, `S = sum of e` in `[1, n]`, `p = e / S`.
    ///
    /// Logits need at least 13 fraction bits and magnitude below `2^(k-3)` as integers.
    pub fn softmax(&mut self, logits: Val) -> Result<Val, BuildError> {
        let shape = self.shape(logits);
        let [_, n] = shape[..] else {
            return Err(self.error("softmax", format!("needs [rows, classes], has {shape:?}")));
        };
        let best = self.argmax(logits)?;
        let max = self.bit_dot(best, logits)?;
        let max = self.broadcast(max, &[], &[n])?;
        let distance = self.sub(max, logits)?;
        let e = self.exp_neg(distance)?;
        let sum = self.sum(e, 0, 1)?;
        // n as an integer below 2^integer_bits; the sum can exceed n by rounding, never 2^integer_bits.
        let integer_bits = (usize::BITS - n.leading_zeros()) as u8;
        let inverse = self.reciprocal(sum, integer_bits)?;
        let inverse = self.broadcast(inverse, &[], &[n])?;
        let p = self.mul(e, inverse)?;
        self.trunc(p, RECIPROCAL_FRAC, Rounding::Nearest)
    }

    /// `x^2` truncated back to the fraction bits of x.
    pub fn square(&mut self, x: Val, rounding: Rounding) -> Result<Val, BuildError> {
        let frac = self.ty(x).frac_bits;
        let square = self.powers(x, 2)?[0];
        self.trunc(square, frac, rounding)
    }
}
