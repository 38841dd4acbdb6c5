//! Linear maps, products, powers, truncations, and what is carried from step to step.

use trefoil_protocol::Tensor;
use trefoil_protocol::program::{BuildError, ConvSpec, DropoutSpec, PoolSpec, Rounding, Sink};

use super::{Cases, ROUNDINGS};

type Done = Result<(), BuildError>;

pub(super) fn add(cases: &mut Cases) -> Done {
    linear(cases)?;
    products(cases)?;
    convolutions(cases)?;
    grouped(cases)?;
    powers(cases)?;
    truncations(cases)?;
    carried(cases)
}

fn linear(cases: &mut Cases) -> Done {
    cases.add("linear maps", |d| {
        let x = d.input_bits(&[3, 4, 5], 8, 30)?;
        let y = d.input_bits(&[3, 4, 5], 8, 30)?;
        let row = d.input_bits(&[4], 8, 30)?;
        d.b.scope("sums");
        let sum = d.b.add(x, y)?;
        let difference = d.b.sub(x, y)?;
        let scaled = d.b.scale(x, -7)?;
        let each = d.b.scale_each(x, &[1, -3, 0, 1 << 12, -7])?;
        let biased = d.b.add_each(x, row, 1, 1)?;
        let real = d.b.scale_real(y, -0.3125, 5)?;
        let shifted = d.b.add_const(x, -12_345)?;
        let renamed = d.b.rescale(y, 3)?;
        d.b.scope("shapes");
        let flat = d.b.reshape(x, &[5, 12])?;
        let transposed = d.b.transpose(x)?;
        let middle = d.b.sum(x, 1, 1)?;
        let wide = d.b.broadcast(row, &[3], &[5])?;
        let slice = d.b.slice(x, 1, 1, 2)?;
        let concat = d.b.concat(&[x, slice, y], 1)?;
        d.b.scope("constants");
        let tensor = Tensor::new(
            vec![3, 4, 5],
            (0..60u64).map(|v| v.wrapping_sub(7)).collect(),
        );
        let constant = d.b.constant(tensor, 8)?;
        let moved = d.b.sub(constant, x)?;
        d.reveal(&[
            x, sum, difference, scaled, each, biased, real, shifted, renamed, flat,
        ])?;
        d.reveal(&[transposed, middle, wide, slice, concat, moved])
    })?;
    cases.add("sums over windows", |d| {
        for (shape, window, stride, pads) in [
            ([2, 3, 5, 7], [2, 2], [2, 2], [0; 4]),
            ([1, 2, 5, 4], [3, 2], [1, 3], [0; 4]),
            ([1, 2, 5, 4], [3, 2], [2, 1], [2, 0, 1, 1]),
        ] {
            let spec = PoolSpec {
                window,
                stride,
                pads,
            };
            let x = d.input_bits(&shape, 8, 30)?;
            let pooled = d.b.sum_pool(x, spec)?;
            let back = d.b.sum_pool_grad(pooled, &shape, spec)?;
            d.reveal(&[pooled, back])?;
        }
        Ok(())
    })?;
    cases.add("dropout", |d| {
        let x = d.input_bits(&[3, 345], 8, 30)?;
        let spec = DropoutSpec {
            key: [5; 16],
            keep: 3 << 30,
        };
        let kept = d.b.dropout(x, spec)?;
        d.reveal(&[kept])
    })?;
    // Sums wrap where the ring ends: shares do so all the time.
    cases.add("ends of the ring", |d| {
        let (low, high) = d.ends();
        let x = d.input(&[9], 0, low, high)?;
        // The lowest has no opposite.
        let y = d.input(&[9], 0, low + 1, high)?;
        let one = d.input(&[9], 0, -1, 1)?;
        let product = d.b.mul(y, one)?;
        d.reveal(&[x, product])
    })
}

fn products(cases: &mut Cases) -> Done {
    for (m, k, n) in [(1, 1, 1), (3, 17, 5), (2, 9, 65)] {
        cases.add("matrix products", |d| {
            let bits = (d.ring - 8) / 2;
            for (ta, tb) in [(false, false), (true, false), (false, true), (true, true)] {
                let xs = if ta { [k, m] } else { [m, k] };
                let ys = if tb { [n, k] } else { [k, n] };
                let x = d.input_bits(&xs, 8, bits)?;
                let y = d.input_bits(&ys, 8, bits)?;
                let z = d.b.matmul(x, y, ta, tb)?;
                d.reveal(&[z])?;
            }
            Ok(())
        })?;
    }
    cases.add("products of one opened value", |d| {
        let bits = (d.ring - 8) / 2;
        let x = d.input_bits(&[7, 6], 8, bits)?;
        let square = d.b.mul(x, x)?;
        let gram = d.b.matmul(x, x, true, false)?;
        // A part, and a turned copy, of what is open already.
        let part = d.b.slice(x, 0, 2, 3)?;
        let turned = d.b.transpose(x)?;
        let product = d.b.matmul(part, turned, false, false)?;
        let flat = d.b.reshape(x, &[42])?;
        let cube = d.input_bits(&[42], 8, bits)?;
        let cube = d.b.mul(flat, cube)?;
        d.reveal(&[square, gram, product, cube])
    })
}

fn convolutions(cases: &mut Cases) -> Done {
    for (stride, pad) in [([1, 1], [0, 0]), ([2, 2], [2, 2]), ([2, 1], [0, 1])] {
        cases.add("convolution and its two gradients", |d| {
            let spec = ConvSpec {
                stride,
                pad,
                ..ConvSpec::default()
            };
            let (xs, ws) = ([2, 3, 6, 5], [4, 3, 3, 2]);
            let bits = (d.ring - 10) / 2;
            let x = d.input_bits(&xs, 8, bits)?;
            let w = d.input_bits(&ws, 8, bits)?;
            let y = d.b.conv2d(x, w, spec)?;
            let ys = d.b.shape(y);
            let dy = d.input_bits(&ys, 8, bits)?;
            let dx = d.b.conv2d_grad_input(dy, w, &xs, spec)?;
            let dw = d.b.conv2d_grad_weight(x, dy, &ws, spec)?;
            d.reveal(&[y, dx, dw])
        })?;
    }
    Ok(())
}

fn grouped(cases: &mut Cases) -> Done {
    // Groups with several filters each, depthwise with a stride, dilation alone, all of them.
    for (filters, groups, stride, dilation, pad) in [
        (6, 2, [1, 1], [1, 1], [1, 1]),
        (4, 4, [2, 1], [1, 1], [1, 0]),
        (3, 1, [1, 1], [2, 3], [2, 1]),
        (8, 4, [2, 2], [2, 1], [2, 1]),
    ] {
        cases.add("convolution in groups and its two gradients", |d| {
            let spec = ConvSpec {
                stride,
                pad,
                dilation,
                groups,
            };
            let (xs, ws) = ([2, 4, 7, 6], [filters, 4 / groups, 3, 2]);
            let bits = (d.ring - 10) / 2;
            let x = d.input_bits(&xs, 8, bits)?;
            let w = d.input_bits(&ws, 8, bits)?;
            let y = d.b.conv2d(x, w, spec)?;
            let ys = d.b.shape(y);
            let dy = d.input_bits(&ys, 8, bits)?;
            let dx = d.b.conv2d_grad_input(dy, w, &xs, spec)?;
            let dw = d.b.conv2d_grad_weight(x, dy, &ws, spec)?;
            d.reveal(&[y, dx, dw])
        })?;
    }
    for (shape, axis) in [
        (&[3, 5, 2, 3][..], 1),
        (&[7, 3], 1),
        (&[1, 4], 0),
        (&[9], 0),
    ] {
        cases.add("products along channels", |d| {
            let bits = (d.ring - 10) / 2;
            let x = d.input_bits(shape, 8, bits)?;
            let y = d.input_bits(shape, 8, bits)?;
            let factors = d.input_bits(&[shape[axis]], 8, bits)?;
            let scaled = d.b.scale_channels(x, factors, axis)?;
            let dot = d.b.channel_dot(x, y, axis)?;
            let square = d.b.channel_dot(x, x, axis)?;
            d.reveal(&[scaled, dot, square])
        })?;
    }
    Ok(())
}

fn powers(cases: &mut Cases) -> Done {
    for degree in [2, 3, 4] {
        cases.add("powers", |d| {
            let bits = (d.ring - 2) / degree;
            let x = d.input_bits(&[3, 11], 8, bits)?;
            let powers = d.b.powers(x, degree)?;
            d.reveal(&powers)
        })?;
    }
    Ok(())
}

fn truncations(cases: &mut Cases) -> Done {
    for rounding in ROUNDINGS {
        cases.add(&format!("truncations {rounding:?}"), |d| {
            let limit = d.limit();
            for shift in [1, 3, 4, 5, 13, 16, 24, 25, d.ring - 3] {
                let (low, high) = match rounding {
                    Rounding::Floor => (-limit, limit),
                    Rounding::Nearest => (-limit - (1 << (shift - 1)), limit - (1 << (shift - 1))),
                    Rounding::Stochastic => (-limit, limit - (1 << shift)),
                };
                let mut data = d.integers(29, low, high);
                let (unit, half) = (1i64 << shift, 1i64 << (shift - 1));
                let around = [unit, -unit, half, -half, half - 1, -half - 1];
                data.extend(around.into_iter().filter(|v| (low..=high).contains(v)));
                let x = d.input_of(&[data.len()], shift, &data)?;
                let y = d.b.trunc(x, shift, rounding)?;
                d.reveal(&[y])?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// A weight that is kept, opened once under a mask, used twice, changed, and opened again; and a
/// count that every use raises.
fn carried(cases: &mut Cases) -> Done {
    const WEIGHT: [usize; 2] = [6, 5];
    let set_up = |cases: &mut Cases, first: bool| {
        cases.add("set-up", |d| {
            if first {
                for (name, shape) in [("weight", &WEIGHT[..]), ("count", &[1])] {
                    let data = d.integers(shape.iter().product(), -(1 << 18), 1 << 18);
                    let words = data.iter().map(|v| *v as u64).collect();
                    d.initial
                        .insert(name.into(), Tensor::new(shape.to_vec(), words));
                }
            }
            let w = d.b.carried("weight", &WEIGHT, 8, 20)?;
            d.b.output("weight", w, Sink::CarryMasked)
        })
    };
    let request = |cases: &mut Cases| {
        cases.add("request", |d| {
            let w = d.b.carried_masked("weight", &WEIGHT, 8, 20)?;
            let count = d.b.carried("count", &[1], 0, 20)?;
            let x = d.input_bits(&[3, 6], 8, 18)?;
            let y = d.b.matmul(x, w, false, false)?;
            let (y, _) = d.b.relu_trunc(y, 8, Rounding::Stochastic)?;
            let half = d.b.trunc(w, 1, Rounding::Nearest)?;
            let rows = d.b.slice(w, 0, 1, 3)?;
            let turned = d.b.transpose(rows)?;
            let square = d.b.matmul(rows, turned, false, false)?;
            let count = d.b.add_const(count, 1)?;
            d.b.output("count", count, Sink::Carry)?;
            d.reveal(&[y, half, square, w, count])
        })
    };
    set_up(cases, true)?;
    request(cases)?;
    request(cases)?;
    cases.add("update", |d| {
        let w = d.b.carried("weight", &WEIGHT, 8, 20)?;
        let gradient = d.input_bits(&WEIGHT, 16, 24)?;
        let gradient = d.b.trunc(gradient, 8, Rounding::Stochastic)?;
        let w = d.b.sub(w, gradient)?;
        // One value under two names, one of them revealed.
        d.b.output("weight", w, Sink::Carry)?;
        d.b.output("copy", w, Sink::CarryMasked)?;
        d.reveal(&[w])
    })?;
    set_up(cases, false)?;
    request(cases)?;
    cases.add("copy", |d| {
        let w = d.b.carried_masked("copy", &WEIGHT, 8, 20)?;
        let positive = d.b.non_negative(w)?;
        let kept = d.b.bit_mul(positive, w)?;
        d.reveal(&kept)
    })
}
