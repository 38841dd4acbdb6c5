//! `1 / sqrt(x)` over many octaves: batch normalisation and adaptive optimisers divide by it.
//!
//! A composite like those of `composite.rs` (secure equals plain because its parts do). With T the bit
//! length of the largest x as an integer, and 6 octaves a segment:
//! 1. `t_i = [x >= 2^(T - 6i)]` for i = 1 .. s - 1, all from the one opening of x.
//! 2. `X = x 64^j` where j counts the thresholds that x missed: bits times x, local. Now
//!    `2^(T-6) <= X < 2^T`, unless x was below the last segment.
//! 3. The top 10 bits of X select a line `Y = a - b X`, at most `2^-12.4` from `1 / sqrt(X)`, relatively.
//! 4. `y = Y 8^j`: bits times Y, local.
//!
//! Where to read next: `docs/protocol.md`, section 18.

use super::composite::table;
use crate::program::{BuildError, Builder, Rounding, Val};

/// Octaves of a segment: even, so that a segment is a factor of 8 in the result.
const OCTAVES: u8 = 6;
/// Index bits of the tables: a segment's lowest cell has a relative width of `2^(6 - 10)`.
const INDEX_BITS: u8 = 10;
/// Bits of the smallest result, of which rounding takes half of the last.
const PRECISION: i32 = 15;

impl Builder {
    /// `1 / sqrt(x)` for `2^low_log2 <= x < 2^high_log2`, with `15 + ceil(high_log2 / 2)` fraction bits.
    ///
    /// Relative error below `2^-12`. Smaller x, down to zero, count as
    /// `2^(high_log2 - 6s)`, where s is the number of segments of 6 octaves that the range takes; so the
    /// result is at most `2^(3s - high_log2 / 2)`. For negative x and `x >= 2^high_log2` it means nothing.
    ///
    /// With f fraction bits of x: `-8 <= high_log2 <= 16`, `low_log2 >= -f`,
    /// `10 <= f + high_log2 <= k - 22` and `f + 1.5 high_log2 <= k - 17`. At most 15 rounds, 10 with one
    /// segment. Each further segment opens 34 bits for its threshold.
    pub fn inverse_sqrt(&mut self, x: Val, low_log2: i8, high_log2: i8) -> Result<Val, BuildError> {
        let frac = i32::from(self.ty(x).frac_bits);
        let (low, high) = (i32::from(low_log2), i32::from(high_log2));
        // Bits of the largest x.
        let top = frac + high;
        let slope_frac = PRECISION + (3 * high + 1).div_euclid(2);
        let wide = slope_frac + frac;
        let possible = (-8..=16).contains(&high)
            && low < high
            && low >= -frac
            && top >= i32::from(INDEX_BITS)
            && (wide + 2).max(top + PRECISION + 7) <= i32::from(self.ring_bits());
        if !possible {
            return Err(self.error(
                "inverse_sqrt",
                format!(
                    "range 2^{low} to 2^{high} with {frac} fraction bits; possible are an upper end of 2^-8 to \
                     2^16 that leaves {INDEX_BITS} bits below it and {} above, and a lower end of at least \
                     one unit",
                    PRECISION + 7
                ),
            ));
        }
        let octaves = i32::from(OCTAVES);
        let segments = (high - low + octaves - 1) / octaves;
        let mut missed = Vec::new();
        for i in 1..segments {
            missed.push(self.at_least(x, 1i64 << (top - octaves * i).max(0))?);
        }
        let normal = self.times_powers(x, &missed, u32::from(OCTAVES))?;
        let result_frac = PRECISION + (high + 1).div_euclid(2);
        let constant_frac = result_frac + 2;
        let unit = libm::exp2(f64::from(high));
        let cells = f64::from(1u32 << INDEX_BITS);
        let bottom = libm::exp2(-f64::from(octaves));
        // The tangent at a cell's centre c errs by 3/8 (h/c)^2 at its ends, h half its width, and not at
        // all at c: half of it added to the constant balances the error.
        let line = |j: usize| {
            let (from, to) = (j as f64 / cells, (j + 1) as f64 / cells);
            if to <= bottom {
                return (libm::pow(unit * bottom, -0.5), 0.0);
            }
            let (c, h) = (unit * (from + to) / 2.0, unit * (to - from) / 2.0);
            let y = 1.0 / libm::sqrt(c);
            let t = h / c;
            (y * (1.5 + 3.0 / 16.0 * t * t), y / (2.0 * c))
        };
        let indices = || 0..1usize << INDEX_BITS;
        let a = table(constant_frac as u8, indices().map(|j| line(j).0));
        let b = table(slope_frac as u8, indices().map(|j| line(j).1));
        let position = (top - i32::from(INDEX_BITS)) as u8;
        let ab = self.lookup(normal, position, INDEX_BITS, top as u8, vec![a, b])?;
        let slope = self.mul(ab[1], normal)?;
        let constant = self.scale(ab[0], 1i64 << (wide - constant_frac))?;
        let constant = self.rescale(constant, wide as u8)?;
        let y = self.sub(constant, slope)?;
        let y = self.trunc(y, (wide - result_frac) as u8, Rounding::Nearest)?;
        self.times_powers(y, &missed, u32::from(OCTAVES) / 2)
    }

    /// `x 2^(step j)` where j is the number of bits that are 0; if a bit is 1 then all after it are.
    fn times_powers(&mut self, x: Val, bits: &[Val], step: u32) -> Result<Val, BuildError> {
        let count = bits.len() as u32;
        let mut out = if count == 0 {
            x
        } else {
            self.scale(x, 1i64 << (step * count))?
        };
        // Where bit i is 1 the power is at most step (i): the differences telescope.
        for (i, bit) in bits.iter().enumerate() {
            let larger = 1i64 << (step * (i as u32 + 1));
            let smaller = 1i64 << (step * i as u32);
            let term = self.bit_mul(*bit, x)?[0];
            let term = self.scale(term, larger - smaller)?;
            out = self.sub(out, term)?;
        }
        Ok(out)
    }
}
