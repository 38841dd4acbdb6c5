//! What one step of a network costs, before anything runs.

use trefoil_protocol::plan::{LinkProfile, Plan};

use crate::job::{PredictOutput, TrainSpec, check_format, check_range};
use crate::programs::{self, Format};
use crate::{ModelError, Network};

/// Which step to report on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// One training step.
    Train,
    /// One inference step, weights opened before.
    Predict(PredictOutput),
    /// Opening the weights, once in a session.
    Setup,
}

/// The plan of one step over a link. Batch, learning rate, rounding and number format are taken from `spec`.
pub fn plan(
    network: &Network,
    spec: &TrainSpec,
    work: Work,
    link: LinkProfile,
) -> Result<Plan, ModelError> {
    let format = Format {
        frac_bits: spec.frac_bits,
        ring_bits: spec.ring_bits,
    };
    check_format(spec.frac_bits, spec.ring_bits)?;
    check_range("batch", spec.batch, 1..=4096)?;
    let program = match work {
        Work::Train => {
            spec.check()?;
            programs::train(network, spec, spec.learning_rate)?
        }
        Work::Predict(output) => programs::predict(network, format, spec.batch, output)?,
        Work::Setup => programs::setup(network, format)?,
    };
    Ok(Plan::for_link(&program, link))
}
