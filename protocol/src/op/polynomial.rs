//! Polynomials of degree 2 to 4 with public coefficients, such as approximate ReLU: a composite like those
//! of `composite.rs`.
//!
//! 1. x is truncated to t fraction bits and opened; all powers come from that opening (`powers.rs`).
//! 2. The powers, each with its `j t` fraction bits, times coefficients that fill up to a common scale are
//!    added and truncated: once for the value, once for the derivative.
//!
//! Where to read next: `docs/protocol.md`, section 18.

use crate::fixed::encode;
use crate::program::{BuildError, Builder, Rounding, Val};

/// Integer bits of x.
pub const POLYNOMIAL_INTEGER_BITS: u8 = 4;
/// Fraction bits of the leading coefficient, at most.
const COEFFICIENT_FRAC: i32 = 24;

/// `m` with `sum of |c_j| 16^j <= 2^m`.
fn magnitude_log2(coefficients: &[f64]) -> i32 {
    let end = libm::exp2(f64::from(POLYNOMIAL_INTEGER_BITS));
    let sum = coefficients
        .iter()
        .rev()
        .fold(0.0, |sum, c| sum * end + libm::fabs(*c));
    if sum > 0.0 { libm::ilogb(sum) + 1 } else { 0 }
}

/// Fraction bits t of the argument and g of the leading coefficient: what the ring has beside the largest
/// value, spread so that both round about as badly at |x| = 4.
fn precision(ring_bits: u8, coefficients: &[f64], frac_bits: u8) -> (u8, i32) {
    let degree = coefficients.len() as i32 - 1;
    let room = i32::from(ring_bits) - 3 - magnitude_log2(coefficients);
    let powers = (i32::from(ring_bits) - 2) / degree - i32::from(POLYNOMIAL_INTEGER_BITS);
    let t = ((room - 2 * degree) / (degree + 1)).min(powers);
    let t = t.clamp(1, i32::from(frac_bits));
    (t as u8, (room - degree * t).clamp(0, COEFFICIENT_FRAC))
}

impl Builder {
    /// `c_0 + c_1 x + .. + c_d x^d`, degree d from 2 to 4, and its derivative if asked for, with
    /// `frac_bits` fraction bits f.
    ///
    /// Domain: `|x| < 16`. Error at `|x| <= X`, with t and g as in [`precision`]: below `2^-(t+1) max|p'|`
    /// for the truncated argument, `2^-(g+1) sum of X^j` for coefficients, `2^-(f+1)` for the result. With
    /// the fits of ReLU to [-4, 4] at f = 16 in the 64-bit ring that is below 2^-14 (degree 2), 2^-11 (3)
    /// and 2^-8 (4). 7 rounds with the truncations of argument and result; the derivative adds none.
    pub fn polynomial(
        &mut self,
        x: Val,
        coefficients: &[f64],
        frac_bits: u8,
        rounding: Rounding,
        derivative: bool,
    ) -> Result<(Val, Option<Val>), BuildError> {
        let degree = coefficients.len().saturating_sub(1) as u8;
        if !(2..=4).contains(&degree) {
            return Err(self.error(
                "polynomial",
                format!("degree {degree}; 2 to 4 are possible"),
            ));
        }
        let frac = self.ty(x).frac_bits;
        let (t, _) = precision(self.ring_bits(), coefficients, frac_bits);
        let t = t.min(frac);
        let x = if frac > t {
            self.trunc(x, frac - t, rounding)?
        } else {
            x
        };
        let mut powers = vec![x];
        powers.extend(self.powers(x, degree)?);
        let y = self.weighted_powers(&powers, coefficients, frac_bits, rounding)?;
        if !derivative {
            return Ok((y, None));
        }
        let terms = coefficients.iter().enumerate().skip(1);
        let slopes: Vec<f64> = terms.map(|(j, c)| j as f64 * c).collect();
        let slope = self.weighted_powers(&powers, &slopes, frac_bits, rounding)?;
        Ok((y, Some(slope)))
    }

    /// The polynomial of powers that exist, x first, with `frac_bits` fraction bits.
    fn weighted_powers(
        &mut self,
        powers: &[Val],
        coefficients: &[f64],
        frac_bits: u8,
        rounding: Rounding,
    ) -> Result<Val, BuildError> {
        let t = i32::from(self.ty(powers[0]).frac_bits);
        let degree = coefficients.len() as i32 - 1;
        let room = i32::from(self.ring_bits()) - 3 - magnitude_log2(coefficients) - degree * t;
        let scale = degree * t + room.clamp(0, COEFFICIENT_FRAC);
        // With few fraction bits the sum gets what the result needs.
        let scale = scale.max(i32::from(frac_bits));
        let mut sum: Option<Val> = None;
        for (j, (power, c)) in (1..).zip(powers.iter().zip(&coefficients[1..])) {
            let term = self.scale(*power, encode(*c, (scale - j * t) as u32) as i64)?;
            let term = self.rescale(term, scale as u8)?;
            sum = Some(match sum {
                Some(sum) => self.add(sum, term)?,
                None => term,
            });
        }
        let sum = sum.ok_or_else(|| self.error("polynomial", "has no terms"))?;
        let sum = self.add_const(sum, encode(coefficients[0], scale as u32) as i64)?;
        match scale as u8 - frac_bits {
            0 => Ok(sum),
            shift => self.trunc(sum, shift, rounding),
        }
    }
}
