//! Sigmoid, tanh, SiLU and GELU as lines between points: a composite like those of `composite.rs`, so that
//! secure equals plain because its parts do.
//!
//! With B the curve's limit, `t = 14` and `2^w` cells between -B and B:
//! 1. `u = relu(x + B)` truncated to t fraction bits, and `h = [x >= B]` with `e = h (x - B)`, truncated
//!    alike, from the same opening. `v = u - e` is x + B cut to `[0, 2B)`.
//! 2. v is opened. Its top w bits select intercept a and slope s; `y = a + s (v - B)`.
//! 3. SiLU and GELU go on as x beyond B: plus e. Below -B they are 0.
//!
//! The slope is opened for the product, and is the derivative that the backward pass multiplies with: the
//! exact derivative of what was computed. Where to read next: `docs/protocol.md`, section 18.

use super::composite::table;
use crate::program::{BuildError, Builder, Rounding, Table, Val};

/// Fraction bits of the argument between the limits.
const ARGUMENT_FRAC: u8 = 14;
/// Fraction bits of slopes.
const SLOPE_FRAC: u8 = 14;
/// Fraction bits of intercepts.
const INTERCEPT_FRAC: u8 = 16;
/// Fraction bits of the result.
const VALUE_FRAC: u8 = ARGUMENT_FRAC + SLOPE_FRAC;

/// A smooth activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Curve {
    /// `1 / (1 + exp(-x))`
    Sigmoid,
    /// The hyperbolic tangent.
    Tanh,
    /// `x sigmoid(x)` (Elfwing, Uchibe and Doya 2017), also called swish.
    Silu,
    /// `x Phi(x)` with the normal distribution function, not its tanh approximation (Hendrycks and
    /// Gimpel 2016).
    Gelu,
}

/// How a curve is cut.
struct Cut {
    /// Logarithm of the limit B.
    limit_log2: u8,
    /// Index bits.
    width: u8,
    /// Added to intercepts and slopes, so that no table value is negative.
    lifts: [f64; 2],
    /// Whether the curve goes on as x beyond its limit, instead of staying where it is.
    rises: bool,
}

impl Curve {
    /// All of them.
    pub const ALL: [Curve; 4] = [Curve::Sigmoid, Curve::Tanh, Curve::Silu, Curve::Gelu];

    /// The real function.
    pub fn value(self, x: f64) -> f64 {
        match self {
            Curve::Sigmoid => 1.0 / (1.0 + libm::exp(-x)),
            Curve::Tanh => libm::tanh(x),
            Curve::Silu => x * Curve::Sigmoid.value(x),
            Curve::Gelu => x * normal(x),
        }
    }

    /// Its derivative.
    pub fn slope(self, x: f64) -> f64 {
        match self {
            Curve::Sigmoid => {
                let s = self.value(x);
                s * (1.0 - s)
            }
            Curve::Tanh => 1.0 - self.value(x) * self.value(x),
            Curve::Silu => Curve::Sigmoid.value(x) + x * Curve::Sigmoid.slope(x),
            Curve::Gelu => {
                let density = libm::exp(-x * x / 2.0) / libm::sqrt(2.0 * std::f64::consts::PI);
                normal(x) + x * density
            }
        }
    }

    /// The absolute error of [`Builder::piecewise`] is below `2^this` on the whole domain.
    pub fn error_log2(self) -> i8 {
        match self {
            Curve::Sigmoid => -11,
            Curve::Tanh => -10,
            Curve::Silu | Curve::Gelu => -12,
        }
    }

    /// Limit and width make the ends (sigmoid(-8) = 2^-11.5, 1 - tanh(4) = 2^-10.5, 4 (1 - Phi(4)) = 2^-12.9,
    /// 16 sigmoid(-16) = 2^-19) about as good as the lines, which err by `c^2 max|y''| / 16` on cells of c.
    fn cut(self) -> Cut {
        let (limit_log2, width, lifts, rises) = match self {
            Curve::Sigmoid => (3, 8, [0.0, 0.0], false),
            Curve::Tanh => (2, 8, [1.0, 0.0], false),
            Curve::Silu => (4, 9, [0.5, 0.25], true),
            Curve::Gelu => (2, 8, [0.5, 0.25], true),
        };
        Cut {
            limit_log2,
            width,
            lifts,
            rises,
        }
    }

    /// Intercepts and slopes of all cells, lifted.
    fn tables(self, cut: &Cut) -> Vec<Table> {
        let limit = libm::exp2(f64::from(cut.limit_log2));
        let cell = 2.0 * limit / libm::exp2(f64::from(cut.width));
        let unit = libm::exp2(f64::from(SLOPE_FRAC));
        let line = |j: usize| {
            let low = j as f64 * cell - limit;
            let (mid, high) = (low + cell / 2.0, low + cell);
            let [left, centre, right] = [low, mid, high].map(|x| self.value(x));
            // As it will be rounded, so that the intercept makes up for the rounding in the middle.
            let slope = libm::round((right - left) / cell * unit) / unit;
            // The chord errs at the middle by its distance from the curve; half of it balances the error.
            let height = (left + right) / 4.0 + centre / 2.0;
            [height - slope * mid + cut.lifts[0], slope + cut.lifts[1]]
        };
        let cells = || 0..1usize << cut.width;
        vec![
            table(INTERCEPT_FRAC, cells().map(|j| line(j)[0])),
            table(SLOPE_FRAC, cells().map(|j| line(j)[1])),
        ]
    }
}

/// The standard normal distribution function.
fn normal(x: f64) -> f64 {
    libm::erfc(-x / std::f64::consts::SQRT_2) / 2.0
}

impl Builder {
    /// The curve at x with 28 fraction bits, and its slope there with 14.
    ///
    /// The value's absolute error is below [`Curve::error_log2`], the slope's below 1/60. x may have any
    /// number of fraction bits F; `|x| < 2^(k-2-max(F, 28)) - 16`. Beyond the limits -B and B (8 for sigmoid,
    /// 4 for tanh and GELU, 16 for SiLU) the result stays what it is there, or goes on as x.
    ///
    /// 9 rounds (10 where F is above 38), and for F = 32, k = 64 opens 141 bits of x, 64 of v, 64 of the
    /// slope and about 40 of the lookup.
    pub fn piecewise(&mut self, x: Val, curve: Curve) -> Result<(Val, Val), BuildError> {
        let cut = curve.cut();
        let limit = 1i64 << cut.limit_log2;
        // The operations truncate: a value that has few fraction bits gets more first.
        let frac = self.ty(x).frac_bits.max(ARGUMENT_FRAC + 1);
        let by = frac - self.ty(x).frac_bits;
        let x = if by > 0 { self.scale(x, 1 << by)? } else { x };
        let x = self.rescale(x, frac)?;
        let shift = frac - ARGUMENT_FRAC;
        let z = self.add_const(x, limit << frac)?;
        let (u, _) = self.relu_trunc(z, shift, Rounding::Nearest)?;
        // From here on z rounds to 2B or more.
        let above = self.at_least(z, ((2 * limit) << frac) - (1 << (shift - 1)))?;
        let over = self.bit_trunc(above, z, shift, Rounding::Nearest)?[0];
        let last = ((2 * limit) << ARGUMENT_FRAC) - 1;
        let capped = self.bit_to_ring(above)?;
        let capped = self.scale(capped, last)?;
        let capped = self.rescale(capped, ARGUMENT_FRAC)?;
        let excess = self.sub(over, capped)?;
        let v = self.sub(u, excess)?;
        let position = ARGUMENT_FRAC + cut.limit_log2 + 1 - cut.width;
        // The product opens v in full: the lookup reads that opening.
        let whole = self.ring_bits();
        let found = self.lookup(v, position, cut.width, whole, curve.tables(&cut))?;
        let lift = |real: f64, frac: u8| -(libm::scalbn(real, i32::from(frac)) as i64);
        let slope = self.add_const(found[1], lift(cut.lifts[1], SLOPE_FRAC))?;
        let rise = self.mul(slope, v)?;
        let start = self.scale(slope, limit << ARGUMENT_FRAC)?;
        let start = self.rescale(start, VALUE_FRAC)?;
        let intercept = self.scale(found[0], 1 << (VALUE_FRAC - INTERCEPT_FRAC))?;
        let intercept = self.rescale(intercept, VALUE_FRAC)?;
        let y = self.sub(rise, start)?;
        let y = self.add(y, intercept)?;
        let mut y = self.add_const(y, lift(cut.lifts[0], VALUE_FRAC))?;
        if cut.rises {
            let excess = self.scale(excess, 1 << SLOPE_FRAC)?;
            let excess = self.rescale(excess, VALUE_FRAC)?;
            y = self.add(y, excess)?;
        }
        Ok((y, slope))
    }
}
