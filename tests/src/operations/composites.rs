//! Exponential, reciprocal, softmax, polynomials: on the ends of their stated domains.

use trefoil_protocol::fixed::encode;
use trefoil_protocol::program::BuildError;

use super::{Cases, ROUNDINGS};

type Done = Result<(), BuildError>;

pub(super) fn add(cases: &mut Cases) -> Done {
    exponentials(cases)?;
    reciprocals(cases)?;
    inverse_roots(cases)?;
    softmax(cases)?;
    polynomials(cases)
}

fn fixed(values: &[f64], frac: u8) -> Vec<i64> {
    let integer = |v: &f64| encode(*v, u32::from(frac)) as i64;
    values.iter().map(integer).collect()
}

fn exponentials(cases: &mut Cases) -> Done {
    for frac in [13, 20, 32] {
        cases.add(&format!("exponential with {frac} fraction bits"), |d| {
            let mut values = fixed(&[0.0, 0.1, 1.0, 15.9, 15.9999, 16.0, 16.1, 700.0], frac);
            values.extend([1, (1 << frac) - 1, 16 << frac, (16 << frac) - 1]);
            values.extend(d.integers(15, 0, 1 << (frac + 5)));
            let x = d.input_of(&[3, 9], frac, &values)?;
            let y = d.b.exp_neg(x)?;
            d.reveal(&[y])
        })?;
    }
    Ok(())
}

fn reciprocals(cases: &mut Cases) -> Done {
    // From 6 integer bits on with Newton steps; from 8 on they need more than 48 bits.
    for integer_bits in [1, 4, 7, 11] {
        if integer_bits > 4 && cases.ring < 64 {
            continue;
        }
        cases.add(&format!("reciprocal of {integer_bits} integer bits"), |d| {
            let (one, top) = (1 << 16, (1 << (16 + integer_bits)) - 1);
            let mut values = vec![one, one + 1, top, top - 1];
            values.extend(d.integers(21, one, top));
            let x = d.input_of(&[5, 5], 16, &values)?;
            let y = d.b.reciprocal(x, integer_bits)?;
            d.reveal(&[y])
        })?;
    }
    Ok(())
}

fn inverse_roots(cases: &mut Cases) -> Done {
    for (frac, low, high) in [(16, 0, 6), (16, -10, 4), (14, -14, 8)] {
        cases.add(&format!("inverse root from 2^{low} to 2^{high}"), |d| {
            let top = 1i64 << (frac + high);
            let mut values = vec![0, 1, 2, top - 1, top / 64, top / 64 - 1, top / 4096];
            values.extend(d.integers(20, 0, top - 1));
            let x = d.input_of(&[3, 9], frac as u8, &values)?;
            let y = d.b.inverse_sqrt(x, low, high as i8)?;
            d.reveal(&[y])
        })?;
    }
    Ok(())
}

fn softmax(cases: &mut Cases) -> Done {
    for (rows, n) in [(3, 2), (5, 3), (2, 11)] {
        cases.add(&format!("softmax of {n}"), |d| {
            let largest = (1 << (d.ring - 3)) - 1;
            let mut values = d.integers(rows * n, -(3 << 16), 3 << 16);
            values[0] = largest;
            values[1] = -largest;
            // A row of equals.
            values[n..2 * n].fill(-(1 << 15));
            let x = d.input_of(&[rows, n], 16, &values)?;
            let y = d.b.softmax(x)?;
            d.reveal(&[y])
        })?;
    }
    Ok(())
}

fn polynomials(cases: &mut Cases) -> Done {
    const COEFFICIENTS: [f64; 5] = [0.119, 0.5, 0.147, -0.002, 0.0005];
    for rounding in ROUNDINGS {
        cases.add(&format!("polynomials {rounding:?}"), |d| {
            for degree in [2, 3, 4] {
                // So that the powers, with 12 more bits of the coefficients, fit the ring.
                let frac = if d.ring == 64 { 16 } else { 16 - 3 * degree };
                let values = fixed(&[0.0, -0.0001, 0.0001, 1.0, -1.0, 1.999, -2.0], frac as u8);
                let x = d.input_of(&[7], frac as u8, &values)?;
                let of = &COEFFICIENTS[..=degree];
                let (y, slope) = d.b.polynomial(x, of, frac as u8, rounding, true)?;
                d.reveal(&[y])?;
                if let Some(slope) = slope {
                    d.reveal(&[slope])?;
                }
            }
            let bits = (d.ring - 4) / 2;
            let x = d.input_bits(&[2, 7], 10, bits)?;
            let y = d.b.square(x, rounding)?;
            d.reveal(&[y])
        })?;
    }
    Ok(())
}
