//! Stochastic gradient descent as PyTorch defines it: with momentum `mu`, weight decay `l` and the mean
//! gradient g, `v = mu v + g + l w`, `w = w - lr v`; Nesterov's `w = w - lr (g + l w + mu v)`.
//!
//! Without momentum, `lr / batch` and `lr l` are folded into the one truncation that brings the
//! gradient from 2f to f fraction bits: every update is rounded once. With momentum two truncations
//! are needed: the velocity's, to f + 8 fraction bits, and that of `lr v` to the weights' f. The eight
//! extra bits keep the rounding of the velocity, which is never fed to a product, below that of the
//! weights. Nesterov's step follows from the old and the new velocity without a truncation of its own.
//! Gradients that were computed `2^s` times too large (`gradient_scale_log2`) are divided by the
//! ratio that divides by the batch.
//!
//! Factors are applied as ratios `q / 2^s` with a q of at most 10 bits: exact for powers of two, else
//! within 0.1 %. Where 10 bits and 2f fraction bits leave fewer than 9 integer bits, q has down to 5
//! (1.6 %): above f = 21, and in the 48-bit ring above f = 13.

use trefoil_protocol::program::{BuildError, Builder, Rounding, Sink, Val};

use super::adam::{Adam, moment_names};
use crate::job::{Optimiser, TrainSpec};

/// Fraction bits of a velocity beyond those of its weight.
const VELOCITY_GUARD_BITS: u8 = 8;
/// Bits of a ratio's numerator, at most.
const FACTOR_BITS: u8 = 10;
/// Bits of a ratio's numerator where it takes room from the gradient.
const MIN_FACTOR_BITS: u8 = 5;

/// The carried name of a parameter's velocity.
fn velocity_name(parameter: &str) -> String {
    format!("{parameter}.velocity")
}

/// What the optimiser carries for a parameter beside it, by name; zeros at the start.
pub fn state_names(spec: &TrainSpec, parameter: &str) -> Vec<String> {
    match spec.optimiser {
        Optimiser::Adam(adam) => moment_names(parameter, adam.amsgrad),
        Optimiser::Sgd if spec.momentum > 0.0 => vec![velocity_name(parameter)],
        Optimiser::Sgd => Vec::new(),
    }
}

/// The update rule of one step.
#[derive(Debug)]
pub(crate) enum Update {
    Sgd(Sgd),
    Adam(Adam),
}

impl Update {
    pub(crate) fn new(b: &Builder, spec: &TrainSpec, rate: f64) -> Result<Update, BuildError> {
        Ok(match spec.optimiser {
            Optimiser::Sgd => Update::Sgd(Sgd::new(b, spec, rate)?),
            Optimiser::Adam(adam) => Update::Adam(Adam::new(b, spec, adam, rate)?),
        })
    }

    /// Carries the parameter after the step, and what the optimiser keeps. `gradient` is summed over
    /// the batch.
    pub(crate) fn apply(
        &self,
        b: &mut Builder,
        name: &str,
        value: Val,
        gradient: Val,
    ) -> Result<(), BuildError> {
        match self {
            Update::Sgd(sgd) => sgd.apply(b, name, value, gradient),
            Update::Adam(adam) => adam.apply(b, name, value, gradient),
        }
    }
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

    pub(super) fn with_bits(x: f64, factor_bits: u8) -> Ratio {
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

/// Gradient descent, with momentum or without.
#[derive(Debug)]
pub(crate) struct Sgd {
    rounding: Rounding,
    frac_bits: u8,
    /// lr / (batch 2^s) without momentum, lr with it.
    rate: Ratio,
    /// Weight decay; without momentum times lr.
    decay: Option<Ratio>,
    momentum: Option<Momentum>,
}

#[derive(Clone, Copy, Debug)]
struct Momentum {
    mu: Ratio,
    /// 1 / (batch 2^s)
    mean: Ratio,
    nesterov: bool,
}

impl Sgd {
    pub(crate) fn new(b: &Builder, spec: &TrainSpec, rate: f64) -> Result<Sgd, BuildError> {
        let bits = factor_bits(b.ring_bits(), spec.frac_bits);
        let sum = libm::scalbn(spec.batch as f64, i32::from(spec.gradient_scale_log2));
        let momentum = (spec.momentum > 0.0).then(|| Momentum {
            mu: Ratio::with_bits(spec.momentum, bits),
            mean: Ratio::with_bits(1.0 / sum, bits),
            nesterov: spec.nesterov,
        });
        let (of_gradient, of_value) = match momentum {
            Some(_) => (rate, spec.weight_decay),
            None => (rate / sum, rate * spec.weight_decay),
        };
        let rate = Ratio::with_bits(of_gradient, bits);
        let decay = (of_value > 0.0).then(|| Ratio::with_bits(of_value, bits));
        let largest = b.ring_bits() - 3 - spec.frac_bits;
        if rate.shift > largest {
            return Err(b.error(
                "update",
                format!("a learning rate of {} is too small to apply", rate.value()),
            ));
        }
        // A decay has f fraction bits less than a gradient, so that many more fit.
        if let Some(decay) = decay.filter(|decay| decay.shift > b.ring_bits() - 3) {
            return Err(b.error(
                "update",
                format!("a weight decay of {} is too small to apply", decay.value()),
            ));
        }
        Ok(Sgd {
            rounding: spec.rounding,
            frac_bits: spec.frac_bits,
            rate,
            decay,
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
        let delta = match self.momentum {
            None => {
                let decay = self.decay.map(|decay| (value, decay));
                combined(b, (gradient, self.rate), decay)?
            }
            Some(momentum) => {
                let step = self.velocity(b, name, value, gradient, momentum)?;
                scaled(b, step, self.rate, None)?
            }
        };
        let delta = super::exactly(b, delta, self.frac_bits, self.rounding)?;
        let updated = b.sub(value, delta)?;
        b.output(name, updated, Sink::Carry)
    }

    /// Carries the new velocity, and gives what the learning rate is multiplied with.
    fn velocity(
        &self,
        b: &mut Builder,
        name: &str,
        value: Val,
        gradient: Val,
        momentum: Momentum,
    ) -> Result<Val, BuildError> {
        let frac = self.frac_bits + VELOCITY_GUARD_BITS;
        let name = velocity_name(name);
        let shape = b.shape(gradient);
        let old = b.carried(&name, &shape, frac, frac + super::WEIGHT_INTEGER_BITS)?;
        let decay = self.decay.map(|decay| (value, decay));
        let mean = combined(b, (gradient, momentum.mean), decay)?;
        let common = (frac + momentum.mu.shift).max(b.ty(mean).frac_bits);
        let kept = scaled(b, old, momentum.mu, Some(common))?;
        let mean = aligned(b, mean, common)?;
        let sum = b.add(kept, mean)?;
        let v = super::exactly(b, sum, frac, self.rounding)?;
        b.output(&name, v, Sink::Carry)?;
        if !momentum.nesterov {
            return Ok(v);
        }
        // g + mu v with g = v - mu v_old: nothing is left to truncate.
        let change = b.sub(v, old)?;
        let change = scaled(b, change, momentum.mu, None)?;
        let frac = b.ty(change).frac_bits;
        let v = aligned(b, v, frac)?;
        b.add(v, change)
    }
}

/// Bits of a ratio's numerator: 9 integer bits beside 2f fraction bits are kept for gradients.
pub(super) fn factor_bits(ring_bits: u8, frac_bits: u8) -> u8 {
    let room = ring_bits - 2 - 9;
    room.saturating_sub(2 * frac_bits)
        .clamp(MIN_FACTOR_BITS, FACTOR_BITS)
}

/// The sum of values times ratios, exactly, with the fraction bits that this takes.
pub(super) fn combined(
    b: &mut Builder,
    (x, of_x): (Val, Ratio),
    more: Option<(Val, Ratio)>,
) -> Result<Val, BuildError> {
    let Some((y, of_y)) = more else {
        return scaled(b, x, of_x, None);
    };
    let common = (b.ty(x).frac_bits + of_x.shift).max(b.ty(y).frac_bits + of_y.shift);
    let x = scaled(b, x, of_x, Some(common))?;
    let y = scaled(b, y, of_y, Some(common))?;
    b.add(x, y)
}

/// The same value with more fraction bits.
fn aligned(b: &mut Builder, x: Val, frac_bits: u8) -> Result<Val, BuildError> {
    scaled(
        b,
        x,
        Ratio {
            factor: 1,
            shift: 0,
        },
        Some(frac_bits),
    )
}

/// `ratio * x`, exactly, with the fraction bits that this takes or with `frac_bits`.
pub(super) fn scaled(
    b: &mut Builder,
    x: Val,
    ratio: Ratio,
    frac_bits: Option<u8>,
) -> Result<Val, BuildError> {
    let natural = b.ty(x).frac_bits + ratio.shift;
    let frac = frac_bits.unwrap_or(natural);
    let more = frac.saturating_sub(natural);
    if more >= b.ring_bits() - 2 - FACTOR_BITS {
        return Err(b.error(
            "update",
            format!(
                "a factor of {} needs {more} fraction bits more than the ring has; \
                 make learning rate, momentum and weight decay less different",
                ratio.value()
            ),
        ));
    }
    let factor = ratio.factor << more;
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
