//! Activations made of comparisons of one opened value: ReLU6 and leaky ReLU, and their gradients.
//!
//! `relu6(x) = [x >= 0] x - [x >= 6] (x - 6)`; `leaky(x) = s x + (1 - s) [x >= 0] x`. Both thresholds
//! share the opening of x, and the bits serve the backward pass.

use trefoil_protocol::program::{BuildError, Builder, Rounding, Val};

use super::forward::with_room;
use super::{Ratio, at_most};

/// The upper end of ReLU6.
const TOP: i64 = 6;

/// What the gradient needs: it passes where the first bit is set and the second is not, and times the
/// slope elsewhere.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gates {
    positive: Val,
    above: Option<Val>,
    slope: Option<Ratio>,
}

/// `min(max(x, 0), 6)`
pub(crate) fn relu6(b: &mut Builder, x: Val) -> Result<(Val, Gates), BuildError> {
    let frac = b.ty(x).frac_bits;
    let top = TOP << frac;
    let positive = b.at_least(x, 0)?;
    let above = b.at_least(x, top)?;
    let kept = b.bit_mul(positive, x)?[0];
    let over = b.bit_mul(above, x)?[0];
    let cap = b.bit_to_ring(above)?;
    let cap = b.scale(cap, top)?;
    let cap = b.rescale(cap, frac)?;
    let y = b.sub(kept, over)?;
    let y = b.add(y, cap)?;
    let gates = Gates {
        positive,
        above: Some(above),
        slope: None,
    };
    Ok((y, gates))
}

/// `s x + (1 - s) b x` with the slope's fraction bits added.
fn lean(b: &mut Builder, x: Val, passed: Val, slope: Ratio) -> Result<Val, BuildError> {
    let low = b.scale(x, slope.factor)?;
    let high = b.scale(passed, (1i64 << slope.shift) - slope.factor)?;
    let y = b.add(low, high)?;
    let frac = b.ty(x).frac_bits + slope.shift;
    b.rescale(y, frac)
}

/// x where it is positive, a fraction of it elsewhere.
pub(crate) fn leaky_relu(
    b: &mut Builder,
    x: Val,
    slope: f64,
    f: u8,
    rounding: Rounding,
) -> Result<(Val, Gates), BuildError> {
    let slope = Ratio::nearest(slope);
    let x = with_room(b, x, slope.shift, f, rounding)?;
    let positive = b.non_negative(x)?;
    let passed = b.bit_mul(positive, x)?[0];
    let y = lean(b, x, passed, slope)?;
    let gates = Gates {
        positive,
        above: None,
        slope: Some(slope),
    };
    Ok((y, gates))
}

/// The gradient of either, f fraction bits (more by the slope's).
pub(crate) fn gradient(
    b: &mut Builder,
    gates: &Gates,
    g: Val,
    f: u8,
    rounding: Rounding,
) -> Result<Val, BuildError> {
    if let Some(slope) = gates.slope {
        let g = at_most(b, g, f, rounding)?;
        let passed = b.bit_mul(gates.positive, g)?[0];
        return lean(b, g, passed, slope);
    }
    let gated = |b: &mut Builder, bit: Val| match b.ty(g).frac_bits.checked_sub(f) {
        None | Some(0) => Ok(b.bit_mul(bit, g)?[0]),
        Some(shift) => Ok::<Val, BuildError>(b.bit_trunc(bit, g, shift, rounding)?[0]),
    };
    let passed = gated(b, gates.positive)?;
    match gates.above {
        Some(above) => {
            let stopped = gated(b, above)?;
            b.sub(passed, stopped)
        }
        None => Ok(passed),
    }
}
