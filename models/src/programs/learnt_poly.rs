//! A polynomial whose coefficients are learnt, a set for each channel (for each value behind a dense layer).
//!
//! The powers of x come from one opening, are truncated to f fraction bits, and meet the coefficients in
//! products along channels. `dc_j = sum of g x^j`, `dx = g (c_1 + 2 c_2 x + ..)`: both from powers that are
//! open already.

use trefoil_protocol::op::polynomial::POLYNOMIAL_INTEGER_BITS;
use trefoil_protocol::program::{BuildError, Builder, Rounding, Val};

use super::forward::aligned;
use super::{at_most, exactly};

/// What the gradient needs.
#[derive(Debug)]
pub(crate) struct Kept {
    /// `x .. x^d`, at most f fraction bits each.
    powers: Vec<Val>,
    /// `[degree, channels]`: coefficients of these powers.
    pub weight: Val,
    /// `[channels]`: constants.
    pub bias: Val,
}

/// Gradients of the coefficients, and of x if it is wanted.
pub(crate) struct Gradient {
    pub weight: Val,
    pub bias: Val,
    pub x: Option<Val>,
}

/// The coefficients of `x^(j+1)`.
fn coefficients(b: &mut Builder, weight: Val, j: usize) -> Result<Val, BuildError> {
    let channels = b.shape(weight)[1];
    let row = b.slice(weight, 0, j, 1)?;
    b.reshape(row, &[channels])
}

/// A value for each channel, for every element of `like`.
fn spread(b: &mut Builder, per_channel: Val, like: Val) -> Result<Val, BuildError> {
    let shape = b.shape(like);
    b.broadcast(per_channel, &shape[..1], &shape[2..])
}

fn total(b: &mut Builder, terms: &[Val], rounding: Rounding) -> Result<Val, BuildError> {
    let terms = aligned(b, terms, rounding)?;
    let mut sum = terms[0];
    for term in &terms[1..] {
        sum = b.add(sum, *term)?;
    }
    Ok(sum)
}

/// `bias + weight_0 x + weight_1 x^2 + ..` for x `[rows, channels, ..]`, about 2f fraction bits.
pub(crate) fn forward(
    b: &mut Builder,
    x: Val,
    (weight, bias): (Val, Val),
    f: u8,
    rounding: Rounding,
) -> Result<(Val, Kept), BuildError> {
    let degree = b.shape(weight)[0] as u8;
    // So that |x| < 16 leaves the largest power in the ring.
    let t = ((b.ring_bits() - 2) / degree - POLYNOMIAL_INTEGER_BITS).min(f);
    let x = at_most(b, x, t, rounding)?;
    let mut powers = vec![x];
    for power in b.powers(x, degree)? {
        powers.push(at_most(b, power, f, rounding)?);
    }
    let mut terms = vec![spread(b, bias, x)?];
    for (j, power) in powers.iter().enumerate() {
        let c = coefficients(b, weight, j)?;
        terms.push(b.scale_channels(*power, c, 1)?);
    }
    let y = total(b, &terms, rounding)?;
    let kept = Kept {
        powers,
        weight,
        bias,
    };
    Ok((y, kept))
}

/// From the gradient g of the result.
pub(crate) fn gradient(
    b: &mut Builder,
    kept: &Kept,
    g: Val,
    wanted: bool,
    f: u8,
    rounding: Rounding,
) -> Result<Gradient, BuildError> {
    let g = at_most(b, g, f, rounding)?;
    let shape = b.shape(g);
    let bias = b.sum(g, 1, shape.len() - 2)?;
    let mut sums = Vec::new();
    for power in &kept.powers {
        let sum = b.channel_dot(*power, g, 1)?;
        sums.push(b.reshape(sum, &[1, shape[1]])?);
    }
    let sums = aligned(b, &sums, rounding)?;
    let weight = b.concat(&sums, 0)?;
    let x = if wanted {
        let first = coefficients(b, kept.weight, 0)?;
        let mut terms = vec![spread(b, first, g)?];
        for (j, power) in kept.powers.iter().enumerate().take(kept.powers.len() - 1) {
            let c = coefficients(b, kept.weight, j + 1)?;
            let term = b.scale_channels(*power, c, 1)?;
            terms.push(b.scale(term, j as i64 + 2)?);
        }
        let slope = total(b, &terms, rounding)?;
        let slope = exactly(b, slope, f, rounding)?;
        Some(b.mul(slope, g)?)
    } else {
        None
    };
    Ok(Gradient { weight, bias, x })
}
