//! Adam and AMSGrad (Kingma and Ba 2015; Reddi, Kale and Kumar 2018) with decoupled weight decay
//! (Loshchilov and Hutter 2019). Why these formats: `docs/adr/0012-optimisers.md`.
//!
//! 1. `g`: the batch's mean gradient, 19 fraction bits; magnitude below 4.
//! 2. `m = b1 m + (1 - b1) g`, 24 fraction bits; `v = b2 v + (1 - b2) g^2`, 38: g squared has them.
//! 3. AMSGrad: `s = max(s, v)`; Adam: `s = v`.
//! 4. `w = w - lr (m / sqrt(s + e^2) + l w)`: one secure inverse square root, one product, and one
//!    truncation. The correction of the moments' start at 0 is part of the learning rate.

use trefoil_protocol::fixed::encode;
use trefoil_protocol::program::{BuildError, Builder, Rounding, Sink, Val};

use super::exactly;
use super::update::{Ratio, combined, factor_bits, scaled};
use crate::job::TrainSpec;
use crate::recipe::{AdamSpec, BETA_BITS};

/// Fraction bits of the mean gradient.
const GRADIENT_FRAC: u8 = 19;
/// Fraction bits of the second moment.
const SQUARE_FRAC: u8 = 2 * GRADIENT_FRAC;
/// Second moments are below `2^SQUARE_HIGH`, gradients below the root of that.
const SQUARE_HIGH: i8 = 4;
/// Fraction bits of the first moment.
const MOMENT_FRAC: u8 = 24;

/// The carried names of a parameter's moments.
pub fn moment_names(parameter: &str, amsgrad: bool) -> Vec<String> {
    let kinds: &[&str] = if amsgrad {
        &["moment1", "moment2", "moment2_max"]
    } else {
        &["moment1", "moment2"]
    };
    let name = |kind: &&str| format!("{parameter}.{kind}");
    kinds.iter().map(name).collect()
}

/// The update rule of one step.
#[derive(Debug)]
pub(crate) struct Adam {
    spec: AdamSpec,
    rounding: Rounding,
    frac_bits: u8,
    /// 1 / (batch 2^s)
    mean: Ratio,
    rate: Ratio,
    /// Weight decay times the learning rate.
    decay: Option<Ratio>,
}

impl Adam {
    pub(crate) fn new(
        b: &Builder,
        spec: &TrainSpec,
        adam: AdamSpec,
        rate: f64,
    ) -> Result<Adam, BuildError> {
        let bits = factor_bits(b.ring_bits(), spec.frac_bits);
        let sum = libm::scalbn(spec.batch as f64, i32::from(spec.gradient_scale_log2));
        let shrink = rate * spec.weight_decay;
        Ok(Adam {
            spec: adam,
            rounding: spec.rounding,
            frac_bits: spec.frac_bits,
            mean: Ratio::with_bits(1.0 / sum, bits),
            rate: Ratio::with_bits(rate, bits),
            decay: (shrink > 0.0).then(|| Ratio::with_bits(shrink, bits)),
        })
    }

    /// Carries `value - update` and the moments. `gradient` is summed over the batch.
    pub(crate) fn apply(
        &self,
        b: &mut Builder,
        name: &str,
        value: Val,
        gradient: Val,
    ) -> Result<(), BuildError> {
        let names = moment_names(name, self.spec.amsgrad);
        let g = scaled(b, gradient, self.mean, None)?;
        let g = exactly(b, g, GRADIENT_FRAC, self.rounding)?;
        let (one, two) = self.spec.forgets();
        let m = self.average(b, &names[0], g, MOMENT_FRAC, one)?;
        let square = b.powers(g, 2)?[0];
        let v = self.average(b, &names[1], square, SQUARE_FRAC, two)?;
        let size = match names.get(2) {
            None => v,
            Some(name) => {
                let shape = b.shape(v);
                let bound = SQUARE_FRAC + SQUARE_HIGH as u8;
                let most = b.carried(name, &shape, SQUARE_FRAC, bound)?;
                let grows = b.greater_equal(v, most)?;
                let most = b.select(grows, v, most)?;
                b.output(name, most, Sink::Carry)?;
                most
            }
        };
        let floor = self.spec.epsilon * self.spec.epsilon;
        let size = b.add_const(size, encode(floor, u32::from(SQUARE_FRAC)).max(1) as i64)?;
        let low = libm::floor(libm::log2(floor)).max(-f64::from(SQUARE_FRAC)) as i8;
        let inverse = b.inverse_sqrt(size, low, SQUARE_HIGH)?;
        let step = b.mul(m, inverse)?;
        let delta = combined(b, (step, self.rate), self.decay.map(|decay| (value, decay)))?;
        let delta = exactly(b, delta, self.frac_bits, self.rounding)?;
        let updated = b.sub(value, delta)?;
        b.output(name, updated, Sink::Carry)
    }

    /// Carries `(1 - q / 2^10) old + q / 2^10 new` under the name.
    fn average(
        &self,
        b: &mut Builder,
        name: &str,
        new: Val,
        frac_bits: u8,
        q: i64,
    ) -> Result<Val, BuildError> {
        let shape = b.shape(new);
        let old = b.carried(name, &shape, frac_bits, frac_bits + SQUARE_HIGH as u8)?;
        let part = |factor| Ratio {
            factor,
            shift: BETA_BITS,
        };
        let kept = (old, part((1 << BETA_BITS) - q));
        let sum = combined(b, kept, Some((new, part(q))))?;
        let average = exactly(b, sum, frac_bits, self.rounding)?;
        b.output(name, average, Sink::Carry)?;
        Ok(average)
    }
}
