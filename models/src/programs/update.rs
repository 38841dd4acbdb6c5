//! Stochastic gradient descent with momentum, as PyTorch defines it: `v = mu v + g`, `w = w - lr v`.
//!
//! Without momentum, `lr / batch` is folded into the one truncation that brings the gradient from 2f to
//! f fraction bits: every update is rounded once. With momentum two truncations are needed: `mu v + g`
//! (1/batch folded in) to the velocity's f + 8 fraction bits, and `lr v` to the weights' f. The eight
//! extra bits keep the rounding of the velocity, which is never fed to a product, below that of the
//! weights.
//!
//! Rates and momentum are applied as ratios `q / 2^s` with a q of at most 10 bits (5 in
//! the 48-bit ring, where q takes room from the gradient): exact for powers of two, else within
//! 0.1 % (1.6 %).

use trefoil_protocol::program::{BuildError, Builder, Rounding, Sink, Val};

use crate::job::TrainSpec;

/// Fraction bits of a velocity beyond those of its weight.
const VELOCITY_GUARD_BITS: u8 = 8;
/// Bits of a ratio's numerator.
const FACTOR_BITS: u8 = 10;
/// Bits of a ratio's numerator in the 48-bit ring.
const NARROW_FACTOR_BITS: u8 = 5;

/// The carried name of a parameter's velocity.
pub fn velocity_name(parameter: &str) -> String {
    format!("{parameter}.velocity")
}

/// `factor / 2^shift`: a public real number as the operations can apply it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ratio {
    /// Numerator.
    pub factor: i64,
    /// Logarithm of the denominator.
    pub shift: u8,
}

impl Ratio {
    /// The nearest ratio to `x > 0` whose numerator has at most 10 bits (relative error at most
    /// `2^-10`; none for powers of two).
    pub fn nearest(x: f64) -> Ratio {
        Ratio::with_bits(x, FACTOR_BITS)
    }

    fn with_bits(x: f64, factor_bits: u8) -> Ratio {
        let exponent = libm::ilogb(x);
        let mut shift = i32::from(factor_bits) - 1 - exponent;
        let mut factor = libm::round(libm::scalbn(x, shift)) as i64;
        while shift > 0 && factor % 2 == 0 && factor > 0 {
            factor /= 2;
            shift -= 1;
        }
        if shift < 0 {
            factor <<= -shift.max(-32);
            shift = 0;
        }
        Ratio {
            factor,
            shift: shift.min(255) as u8,
        }
    }

    /// The real number that it stands for.
    pub fn value(self) -> f64 {
        libm::scalbn(self.factor as f64, -i32::from(self.shift))
    }
}

/// The update rule of one step.
#[derive(Debug)]
pub(crate) struct Sgd {
    rounding: Rounding,
    frac_bits: u8,
    /// lr / batch without momentum, lr with it.
    rate: Ratio,
    momentum: Option<Momentum>,
}

#[derive(Clone, Copy, Debug)]
struct Momentum {
    mu: Ratio,
    per_batch: Ratio,
}

impl Sgd {
    pub(crate) fn new(b: &Builder, spec: &TrainSpec, rate: f64) -> Result<Sgd, BuildError> {
        let batch = spec.batch as f64;
        let factor_bits = if b.ring_bits() == 48 {
            NARROW_FACTOR_BITS
        } else {
            FACTOR_BITS
        };
        let momentum = (spec.momentum > 0.0).then(|| Momentum {
            mu: Ratio::with_bits(spec.momentum, factor_bits),
            per_batch: Ratio::with_bits(1.0 / batch, factor_bits),
        });
        let rate = Ratio::with_bits(
            if momentum.is_some() {
                rate
            } else {
                rate / batch
            },
            factor_bits,
        );
        let largest = b.ring_bits() - 3 - spec.frac_bits;
        if rate.shift > largest {
            return Err(b.error(
                "update",
                format!("a learning rate of {} is too small to apply", rate.value()),
            ));
        }
        Ok(Sgd {
            rounding: spec.rounding,
            frac_bits: spec.frac_bits,
            rate,
            momentum,
        })
    }

    /// Carries `value - update` under the parameter's name. `gradient` is summed over the batch.
    pub(crate) fn apply(
        &self,
        b: &mut Builder,
        name: &str,
        value: Val,
        gradient: Val,
    ) -> Result<(), BuildError> {
        let step = match self.momentum {
            None => gradient,
            Some(momentum) => self.velocity(b, name, gradient, momentum)?,
        };
        let delta = scaled(b, step, self.rate, None)?;
        let delta = super::exactly(b, delta, self.frac_bits, self.rounding)?;
        let updated = b.sub(value, delta)?;
        b.output(name, updated, Sink::Carry)
    }

    fn velocity(
        &self,
        b: &mut Builder,
        name: &str,
        gradient: Val,
        momentum: Momentum,
    ) -> Result<Val, BuildError> {
        let frac = self.frac_bits + VELOCITY_GUARD_BITS;
        let name = velocity_name(name);
        let shape = b.shape(gradient);
        let v = b.carried(&name, &shape, frac, frac + super::WEIGHT_INTEGER_BITS)?;
        let common =
            (frac + momentum.mu.shift).max(b.ty(gradient).frac_bits + momentum.per_batch.shift);
        let kept = scaled(b, v, momentum.mu, Some(common))?;
        let mean = scaled(b, gradient, momentum.per_batch, Some(common))?;
        let sum = b.add(kept, mean)?;
        let v = super::exactly(b, sum, frac, self.rounding)?;
        b.output(&name, v, Sink::Carry)?;
        Ok(v)
    }
}

/// `ratio * x`, exactly, with the fraction bits that this takes or with `frac_bits`.
fn scaled(b: &mut Builder, x: Val, ratio: Ratio, frac_bits: Option<u8>) -> Result<Val, BuildError> {
    let natural = b.ty(x).frac_bits + ratio.shift;
    let frac = frac_bits.unwrap_or(natural);
    let factor = ratio.factor << (frac - natural);
    let x = if factor == 1 { x } else { b.scale(x, factor)? };
    b.rescale(x, frac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_exact_for_powers_of_two_and_close_elsewhere() {
        assert_eq!(
            Ratio::nearest(1.0),
            Ratio {
                factor: 1,
                shift: 0
            }
        );
        assert_eq!(
            Ratio::nearest(0.0625 / 128.0),
            Ratio {
                factor: 1,
                shift: 11
            }
        );
        assert_eq!(
            Ratio::nearest(4.0),
            Ratio {
                factor: 4,
                shift: 0
            }
        );
        for x in [0.9, 0.1 / 100.0, 1.0 / 49.0, 3.7, 0.001 / 4096.0, 700.25] {
            let ratio = Ratio::nearest(x);
            assert!(ratio.factor <= 1 << FACTOR_BITS, "{ratio:?}");
            assert!(
                (ratio.value() / x - 1.0).abs() <= 1.0 / 1024.0,
                "{x} became {ratio:?}"
            );
        }
    }
}
