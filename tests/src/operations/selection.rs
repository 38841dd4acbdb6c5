//! Comparisons, bits, ReLU, max pool, argmax, tables.

use trefoil_protocol::program::{BuildError, PoolSpec, Rounding, Sink, Table};
use trefoil_protocol::ring::elements;

use super::{Cases, Draft, ROUNDINGS};

type Done = Result<(), BuildError>;

pub(super) fn add(cases: &mut Cases) -> Done {
    comparisons(cases)?;
    relu(cases)?;
    bit_truncations(cases)?;
    pools(cases)?;
    argmax(cases)?;
    lookups(cases)?;
    long(cases)
}

fn comparisons(cases: &mut Cases) -> Done {
    cases.add("signs", |d| {
        let (low, high) = d.ends();
        let x = d.input(&[3, 7], 8, low, high)?;
        let g = d.input(&[3, 7], 8, low, high)?;
        let bit = d.b.non_negative(x)?;
        let kept = d.b.bit_mul(bit, x)?[0];
        let passed = d.b.bit_mul(bit, g)?[0];
        let ring = d.b.bit_to_ring(bit)?;
        d.reveal(&[bit, kept, passed, ring])
    })?;
    cases.add("thresholds", |d| {
        let (low, high) = d.ends();
        let x = d.input(&[3, 7], 8, low / 2, high / 2)?;
        let mut outs = Vec::new();
        for c in [0, 1, -1, 300, high / 2, low / 2] {
            let bit = d.b.at_least(x, c)?;
            outs.push(bit);
            outs.extend(d.b.bit_mul(bit, x)?);
        }
        d.reveal(&outs)
    })?;
    cases.add("greater or equal", |d| {
        let limit = d.limit();
        let pairs = [
            (limit - 1, -limit),
            (-limit, limit - 1),
            (5, 5),
            (-1, 0),
            (0, -1),
            (-limit, -limit),
            (limit - 1, limit - 1),
        ];
        let x = d.input_of(&[7], 8, &pairs.map(|pair| pair.0))?;
        let y = d.input_of(&[7], 8, &pairs.map(|pair| pair.1))?;
        let bit = d.b.greater_equal(x, y)?;
        let larger = d.b.select(bit, x, y)?;
        let smaller = d.b.select(bit, y, x)?;
        d.reveal(&[bit, larger, smaller])
    })
}

fn relu(cases: &mut Cases) -> Done {
    for rounding in ROUNDINGS {
        cases.add(&format!("relu {rounding:?}"), |d| {
            let (bottom, top) = d.ends();
            for shift in [1, 8, 13, 16, 24] {
                let half = 1i64 << (shift - 1);
                let (low, high) = match rounding {
                    Rounding::Floor => (bottom, top),
                    Rounding::Nearest => (bottom + half, top),
                    Rounding::Stochastic => (bottom, top - (1 << shift)),
                };
                let mut data = d.integers(31, low, high);
                data.extend([half, half - 1, -half, 2 * half, -2 * half]);
                let x = d.input_of(&[4, 9], shift, &data)?;
                let (y, bit) = d.b.relu_trunc(x, shift, rounding)?;
                let ring = d.b.bit_to_ring(bit)?;
                d.reveal(&[y, bit, ring])?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn bit_truncations(cases: &mut Cases) -> Done {
    for rounding in ROUNDINGS {
        cases.add(&format!("bits times truncated {rounding:?}"), |d| {
            let limit = d.limit();
            let x = d.input(&[11, 3], 8, -limit, limit - 1)?;
            let planes = d.b.argmax(x)?;
            for shift in [1, 8, 24] {
                let g = d.input(&[11], shift, -limit, limit - (1 << shift))?;
                let parts = d.b.bit_trunc(planes, g, shift, rounding)?;
                let sign = d.b.non_negative(g)?;
                let one = d.b.bit_trunc(sign, g, shift, rounding)?;
                let all = d.b.bit_mul(planes, g)?;
                d.reveal(&[&parts[..], &one, &all].concat())?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Values for a pool: the ends, and many that are equal.
fn with_ties(d: &mut Draft<'_>, n: usize) -> Vec<i64> {
    let limit = d.limit();
    let mut data = d.integers(n, -limit, limit - 1);
    data.iter_mut().skip(2).step_by(3).for_each(|v| *v = 7);
    data
}

fn pools(cases: &mut Cases) -> Done {
    for (at, (shape, window, stride, pads)) in [
        ([2, 3, 4, 6], [2, 2], [2, 2], [0; 4]),
        ([1, 2, 7, 5], [3, 3], [2, 2], [1; 4]),
        ([2, 1, 5, 4], [1, 3], [1, 1], [0, 0, 0, 2]),
    ]
    .into_iter()
    .enumerate()
    {
        for fused in [false, true] {
            let rounding = ROUNDINGS[(2 * at + usize::from(fused)) % 3];
            cases.add(&format!("max pool and its gradient {rounding:?}"), |d| {
                let spec = PoolSpec {
                    window,
                    stride,
                    pads,
                };
                let data = with_ties(d, elements(&shape));
                let x = d.input_of(&shape, 16, &data)?;
                let (y, bits) = d.b.max_pool(x, spec)?;
                let ys = d.b.shape(y);
                let (a, relu) = d.b.relu_trunc(y, 8, Rounding::Nearest)?;
                let relu = fused.then_some(relu);
                let selectors = d.b.pool_select(bits, relu, &shape, spec)?;
                let bits_of_gradient = d.ring - 10;
                let g = d.input_bits(&ys, 16, bits_of_gradient)?;
                let dx = d.b.max_pool_grad(selectors, g, 8, rounding, &shape, spec)?;
                d.reveal(&[y, bits, a, selectors, dx])
            })?;
        }
    }
    // The windows of a value that is open already.
    cases.add("max pool of an opened value", |d| {
        let x = d.input_bits(&[1, 4, 5], 8, 20)?;
        let square = d.b.mul(x, x)?;
        let spec = PoolSpec {
            window: [2, 2],
            stride: [1, 2],
            pads: [0, 1, 0, 0],
        };
        let (y, _) = d.b.max_pool(x, spec)?;
        d.reveal(&[square, y])
    })
}

fn argmax(cases: &mut Cases) -> Done {
    for (rows, n) in [(7, 2), (1, 3), (9, 5), (3, 10), (2, 25)] {
        cases.add(&format!("argmax of {n}"), |d| {
            let data = with_ties(d, rows * n);
            let x = d.input_of(&[rows, n], 8, &data)?;
            let best = d.b.argmax(x)?;
            let max = d.b.bit_dot(best, x)?;
            let ring = d.b.bit_to_ring(best)?;
            d.out(best, Sink::RevealIndex)?;
            d.reveal(&[best, max, ring])
        })?;
    }
    // Only the one-hot: its planes are never opened. More planes than a word has bits.
    cases.add("index alone", |d| {
        let x = d.input_bits(&[2, 2, 6], 8, 20)?;
        let few = d.b.argmax(x)?;
        d.out(few, Sink::RevealIndex)?;
        let x = d.input_bits(&[2, 65], 8, 20)?;
        let many = d.b.argmax(x)?;
        d.out(many, Sink::RevealIndex)
    })
}

fn table(width: u8, out_bits: u8, frac_bits: u8) -> Table {
    let value = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - out_bits);
    Table {
        values: (1..=1 << width).map(value).collect(),
        out_bits,
        frac_bits,
    }
}

fn lookups(cases: &mut Cases) -> Done {
    for width in [1, 5, 8, 10] {
        cases.add(&format!("tables of {width} bits"), |d| {
            let (low, high) = d.ends();
            let x = d.input(&[5, 7], 8, low, high)?;
            for position in [0, 3, 8, 20, d.ring - width] {
                let open_bits = (position + width + 2).min(d.ring);
                let tables = vec![table(width, 20, 16), table(width, 3, 0)];
                let found = d.b.lookup(x, position, width, open_bits, tables)?;
                d.reveal(&found)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// Around the sizes at which kernels and corrections go on to the next block and chunk; the frames
/// are larger than a datagram.
fn long(cases: &mut Cases) -> Done {
    for n in [511, 513, 8193] {
        cases.add(&format!("{n} elements"), |d| {
            let limit = d.limit();
            let x = d.input(&[n], 20, -limit, limit - (1 << 16))?;
            let (y, bit) = d.b.relu_trunc(x, 16, Rounding::Nearest)?;
            let g = d.b.bit_trunc(bit, x, 12, Rounding::Stochastic)?[0];
            let sign = d.b.non_negative(x)?;
            let found = d.b.lookup(x, 8, 4, 12, vec![table(4, 7, 0)])?[0];
            d.reveal(&[y, g, sign, found])
        })?;
    }
    Ok(())
}
