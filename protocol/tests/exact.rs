//! Every operation: three parties in memory equal the plain run bit for bit, on odd shapes and
//! edge values, in both rings and all rounding modes; rounds and bytes equal the plan's.

use std::collections::BTreeMap;

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use trefoil_protocol::PartyId;
use trefoil_protocol::plan::{LinkProfile, Plan, Profile};
use trefoil_protocol::program::{
    BuildError, Builder, ConvSpec, DropoutSpec, PoolSpec, Program, Rounding, Sink, Table, Val,
};
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::run::memory::{MemoryStep, run, test_coins};
use trefoil_protocol::run::plain;

const SEED: u64 = 20_261_122;

fn rng(test: u64) -> ChaCha20Rng {
    println!("seed {SEED}, test {test}");
    ChaCha20Rng::seed_from_u64(SEED ^ test)
}

/// Signed integers of up to `bits` bits, all sizes equally likely.
fn random(rng: &mut ChaCha20Rng, n: usize, bits: u32) -> Vec<u64> {
    (0..n)
        .map(|_| {
            let size = 1 + rng.next_u64() % u64::from(bits);
            ((rng.next_u64() as i64) >> (64 - size)) as u64
        })
        .collect()
}

fn inputs(named: &[(&str, &[usize], Vec<u64>)]) -> BTreeMap<String, Tensor> {
    let tensor = |shape: &[usize], data: &Vec<u64>| Tensor::new(shape.to_vec(), data.clone());
    named
        .iter()
        .map(|(name, shape, data)| (name.to_string(), tensor(shape, data)))
        .collect()
}

/// Runs one step in the clear and as each profile lowers it, and compares all outputs, carried
/// state, rounds and bytes.
fn check(program: &Program, inputs: &BTreeMap<String, Tensor>, initial: &BTreeMap<String, Tensor>) {
    for profile in [Profile::BYTES, Profile::ROUNDS] {
        check_plan(Plan::lowered(program, profile), program, inputs, initial);
    }
}

fn check_plan(
    plan: Plan,
    program: &Program,
    inputs: &BTreeMap<String, Tensor>,
    initial: &BTreeMap<String, Tensor>,
) {
    plan.check().unwrap();
    let cost = plan.cost();
    let step = MemoryStep {
        plan: 0,
        inputs: inputs.clone(),
    };
    let secure = run(std::slice::from_ref(&plan), &[step], initial, SEED).unwrap();
    let mut state = initial.clone();
    let expected = plain::run(program, 0, &mut state, inputs, Some(&test_coins(SEED))).unwrap();
    for (name, tensor) in &expected {
        let got = &secure.outputs[0][name];
        let wrong = got
            .data()
            .iter()
            .zip(tensor.data())
            .position(|(a, b)| a != b);
        assert_eq!(
            wrong,
            None,
            "{} {name}: {:?} != {:?}\n{program}",
            program.name,
            wrong.map(|i| got.data()[i] as i64),
            wrong.map(|i| tensor.data()[i] as i64)
        );
    }
    for (name, tensor) in &state {
        assert_eq!(
            secure.state[name].data(),
            tensor.data(),
            "{} carried {name}",
            program.name
        );
    }
    let given = initial.values().chain(inputs.values());
    let given = 8 * given.map(Tensor::len).sum::<usize>() as u64;
    for party in 0..3 {
        let held = given + plan.working_bytes(PartyId::ALL[party]);
        assert_eq!(secure.peak_bytes[party], held, "{} memory", program.name);
        assert_eq!(
            secure.sent_bytes[party], cost.bytes_sent_per_party,
            "{} bytes",
            program.name
        );
        assert_eq!(
            secure.sent_frames[party],
            2 * cost.rounds,
            "{} rounds",
            program.name
        );
    }
    assert_eq!(
        secure.dealer_bytes, cost.dealer_bytes,
        "{} dealer bytes",
        program.name
    );
}

fn unary(
    name: &str,
    ring: u8,
    frac: u8,
    data: Vec<u64>,
    build: impl Fn(&mut Builder, Val) -> Result<Vec<Val>, BuildError>,
) -> Program {
    let shape = [data.len()];
    let mut b = Builder::new(name, ring).unwrap();
    let x = b.input("x", &shape, frac, ring - 2).unwrap();
    for (i, out) in build(&mut b, x).unwrap().into_iter().enumerate() {
        b.output(&format!("out{i}"), out, Sink::Reveal).unwrap();
    }
    let program = b.finish();
    check(&program, &inputs(&[("x", &shape, data)]), &BTreeMap::new());
    program
}

const ROUNDINGS: [Rounding; 3] = [Rounding::Floor, Rounding::Nearest, Rounding::Stochastic];

#[test]
fn truncation_is_exact_on_its_whole_domain() {
    let mut rng = rng(1);
    for ring in [64, 48] {
        for shift in [1u8, 3, 4, 8, 13, 16, 20, 24, 28, 44] {
            for rounding in ROUNDINGS {
                let limit = 1i64 << (ring - 2);
                let (low, high) = match rounding {
                    Rounding::Floor => (-limit, limit),
                    Rounding::Nearest => (-limit - (1 << (shift - 1)), limit - (1 << (shift - 1))),
                    Rounding::Stochastic => (-limit, limit - (1 << shift)),
                };
                let mut x = vec![
                    0,
                    1,
                    u64::MAX,
                    low as u64,
                    (low + 1) as u64,
                    high as u64,
                    (high - 1) as u64,
                ];
                x.extend(
                    [
                        1i64 << shift,
                        -(1i64 << shift),
                        (1i64 << (shift - 1)),
                        -(1i64 << (shift - 1)),
                    ]
                    .map(|v| v as u64),
                );
                x.extend(random(&mut rng, 517, u32::from(ring) - 2));
                unary(
                    &format!("trunc {shift} {rounding:?}"),
                    ring,
                    shift + 1,
                    x,
                    |b, x| Ok(vec![b.trunc(x, shift, rounding)?]),
                );
            }
        }
    }
}

#[test]
fn relu_with_truncation_is_exact_and_its_bit_is_the_derivative() {
    let mut rng = rng(2);
    for ring in [64u8, 48] {
        for shift in [8u8, 12, 13, 16, 20, 24] {
            for rounding in ROUNDINGS {
                let top = i64::MAX >> (64 - ring);
                let half = if rounding == Rounding::Nearest {
                    1i64 << (shift - 1)
                } else {
                    0
                };
                let coin = if rounding == Rounding::Stochastic {
                    1i64 << shift
                } else {
                    0
                };
                let edges = [
                    0,
                    1,
                    -1,
                    half,
                    half - 1,
                    -half,
                    -top - 1 + half,
                    top - coin,
                    1i64 << (ring - 2),
                    -(1i64 << (ring - 2)),
                ];
                let mut x: Vec<u64> = edges.map(|v| v as u64).to_vec();
                x.extend(random(&mut rng, 700, u32::from(ring) - 2));
                let program = unary(
                    &format!("relu {shift} {rounding:?}"),
                    ring,
                    shift,
                    x,
                    |b, x| {
                        let (y, bit) = b.relu_trunc(x, shift, rounding)?;
                        let bit = b.bit_to_ring(bit)?;
                        Ok(vec![y, bit])
                    },
                );
                if shift == 16 && ring == 64 {
                    assert_eq!(Plan::new(&program).cost().rounds, 4);
                }
            }
        }
    }
}

#[test]
fn relu_and_truncation_cost_what_the_protocol_says() {
    let n = 1 << 16;
    let build = |relu: bool| {
        let mut b = Builder::new("cost", 64).unwrap();
        let x = b.input("x", &[n], 32, 40).unwrap();
        let y = if relu {
            b.relu_trunc(x, 16, Rounding::Nearest).unwrap().0
        } else {
            b.trunc(x, 16, Rounding::Nearest).unwrap()
        };
        b.output("y", y, Sink::Reveal).unwrap();
        Plan::new(&b.finish()).cost()
    };
    let per = |bytes: u64| bytes as f64 / n as f64;
    let relu = build(true);
    assert_eq!(relu.rounds, 4);
    assert!(
        (per(relu.bytes_sent_per_party) - 99.0 / 4.0).abs() < 0.01,
        "{}",
        per(relu.bytes_sent_per_party)
    );
    assert!(
        (per(relu.dealer_bytes) - 85.0).abs() < 0.1,
        "{}",
        per(relu.dealer_bytes)
    );
    let trunc = build(false);
    assert_eq!(trunc.rounds, 3);
    assert!(
        (per(trunc.bytes_sent_per_party) - 71.0 / 4.0).abs() < 0.01,
        "{}",
        per(trunc.bytes_sent_per_party)
    );
    assert!(
        (per(trunc.dealer_bytes) - 27.4).abs() < 0.1,
        "{}",
        per(trunc.dealer_bytes)
    );
}

#[test]
fn operations_are_exact_across_blocks_and_chunks_of_corrections() {
    let mut rng = rng(12);
    for n in [511usize, 512, 513, 8191, 8192, 8193, 3 * 8192 + 777] {
        let x = random(&mut rng, n, 60);
        unary("across chunks", 64, 20, x, |b, x| {
            let (y, bit) = b.relu_trunc(x, 16, Rounding::Nearest)?;
            let g = b.bit_trunc(bit, x, 12, Rounding::Stochastic)?;
            let sign = b.non_negative(x)?;
            let table = Table {
                values: (0..16).collect(),
                out_bits: 4,
                frac_bits: 0,
            };
            let found = b.lookup(x, 8, 4, 12, vec![table])?;
            Ok(vec![y, g[0], b.bit_to_ring(sign)?, found[0]])
        });
    }
}

#[test]
fn products_are_exact_in_all_orientations() {
    let mut rng = rng(3);
    for (m, k, n) in [(1, 1, 1), (3, 17, 5), (33, 9, 65)] {
        for (ta, tb) in [(false, false), (true, false), (false, true), (true, true)] {
            let xs = if ta { [k, m] } else { [m, k] };
            let ys = if tb { [n, k] } else { [k, n] };
            let mut b = Builder::new("matmul", 64).unwrap();
            let x = b.input("x", &xs, 8, 20).unwrap();
            let y = b.input("y", &ys, 8, 20).unwrap();
            let z = b.matmul(x, y, ta, tb).unwrap();
            b.output("z", z, Sink::Reveal).unwrap();
            let data = inputs(&[
                ("x", &xs, random(&mut rng, m * k, 20)),
                ("y", &ys, random(&mut rng, k * n, 20)),
            ]);
            check(&b.finish(), &data, &BTreeMap::new());
        }
    }
}

#[test]
fn convolution_and_its_gradients_are_exact() {
    let mut rng = rng(4);
    for (stride, pad) in [([1, 1], [0, 0]), ([2, 2], [2, 2]), ([2, 1], [0, 1])] {
        let spec = ConvSpec {
            stride,
            pad,
            ..ConvSpec::default()
        };
        let (xs, ws) = ([2, 3, 9, 7], [5, 3, 4, 3]);
        let mut b = Builder::new("conv", 64).unwrap();
        let x = b.input("x", &xs, 8, 20).unwrap();
        let w = b.input("w", &ws, 8, 20).unwrap();
        let y = b.conv2d(x, w, spec).unwrap();
        let ys = b.shape(y);
        let dy = b.input("dy", &ys, 8, 20).unwrap();
        let dx = b.conv2d_grad_input(dy, w, &xs, spec).unwrap();
        let dw = b.conv2d_grad_weight(x, dy, &ws, spec).unwrap();
        for (name, val) in [("y", y), ("dx", dx), ("dw", dw)] {
            b.output(name, val, Sink::Reveal).unwrap();
        }
        let n = |s: &[usize]| s.iter().product::<usize>();
        let data = inputs(&[
            ("x", &xs, random(&mut rng, n(&xs), 20)),
            ("w", &ws, random(&mut rng, n(&ws), 20)),
            ("dy", &ys, random(&mut rng, n(&ys), 20)),
        ]);
        check(&b.finish(), &data, &BTreeMap::new());
    }
}

#[test]
fn linear_maps_are_exact() {
    let mut rng = rng(5);
    let mut b = Builder::new("linear", 64).unwrap();
    let x = b.input("x", &[3, 4, 5], 8, 20).unwrap();
    let y = b.input("y", &[3, 4, 5], 8, 20).unwrap();
    let row = b.input("row", &[4], 8, 20).unwrap();
    let sum = b.add(x, y).unwrap();
    let difference = b.sub(x, y).unwrap();
    let scaled = b.scale(x, -7).unwrap();
    let shifted = b.add_const(x, 12345).unwrap();
    let transposed = b.transpose(x).unwrap();
    let middle = b.sum(x, 1, 1).unwrap();
    let wide = b.broadcast(row, &[3], &[5]).unwrap();
    let each_row = b.add_each(x, row, 1, 1).unwrap();
    let said = b.add_each(x, row, 2, 0).unwrap_err().to_string();
    assert!(said.contains("[4] is added to [5] of [3, 4, 5]"), "{said}");
    let slice = b.slice(x, 1, 1, 2).unwrap();
    let concat = b.concat(&[x, slice, y], 1).unwrap();
    let flat = b.reshape(x, &[60]).unwrap();
    let each = b.scale_each(x, &[1, -3, 0, 1 << 20, -7]).unwrap();
    let mut outs = vec![
        sum, difference, scaled, shifted, transposed, middle, wide, each_row, slice, concat, flat,
        each,
    ];
    for pads in [[0; 4], [1, 0, 1, 2]] {
        let spec = PoolSpec {
            window: [2, 3],
            stride: [1, 2],
            pads,
        };
        let pooled = b.sum_pool(x, spec).unwrap();
        outs.extend([pooled, b.sum_pool_grad(pooled, &[3, 4, 5], spec).unwrap()]);
    }
    for (i, val) in outs.into_iter().enumerate() {
        b.output(&format!("out{i}"), val, Sink::Reveal).unwrap();
    }
    let data = inputs(&[
        ("x", &[3, 4, 5], random(&mut rng, 60, 20)),
        ("y", &[3, 4, 5], random(&mut rng, 60, 20)),
        ("row", &[4], random(&mut rng, 4, 20)),
    ]);
    let program = b.finish();
    check(&program, &data, &BTreeMap::new());
    assert_eq!(Plan::new(&program).cost().rounds, 0);
}

#[test]
fn comparison_and_selection_are_exact_at_the_edges() {
    let mut rng = rng(6);
    for ring in [64u8, 48] {
        let top = i64::MAX >> (64 - ring);
        let mut x: Vec<u64> = [0, 1, -1, top, -top - 1, top - 1, -top]
            .map(|v| v as u64)
            .to_vec();
        x.extend(random(&mut rng, 1030, u32::from(ring)));
        unary("sign", ring, 8, x, |b, x| {
            let bit = b.non_negative(x)?;
            let product = b.bit_mul(bit, x)?;
            Ok(vec![bit, product[0]])
        });
        for c in [0, 1, -1, 77, -top, top] {
            // x - c must not wrap.
            let fits = |v: &i64| {
                v.checked_sub(c)
                    .is_some_and(|d| (-top - 1..=top).contains(&d))
            };
            let mut x: Vec<i64> = vec![c, c.saturating_add(1).min(top), c - 1, 0, top, -top - 1];
            x.extend(random(&mut rng, 50, 40).iter().map(|v| *v as i64));
            let x = x.into_iter().filter(fits).map(|v| v as u64).collect();
            let program = unary("threshold", ring, 8, x, |b, x| {
                let bit = b.at_least(x, c)?;
                let other = b.at_least(x, c)?;
                Ok(vec![bit, b.bit_mul(other, x)?[0]])
            });
            // One opening of x serves both: 4 rounds for both bits.
            assert_eq!(Plan::new(&program).cost().rounds, 4);
        }
    }
    let limit = (1i64 << 62) - 1;
    let edge = |a: i64, c: i64| (a as u64, c as u64);
    let pairs = [
        edge(limit, -limit),
        edge(-limit - 1, limit),
        edge(5, 5),
        edge(-1, 0),
    ];
    let mut b = Builder::new("select", 64).unwrap();
    let x = b.input("x", &[4], 8, 62).unwrap();
    let y = b.input("y", &[4], 8, 62).unwrap();
    let bit = b.greater_equal(x, y).unwrap();
    let larger = b.select(bit, x, y).unwrap();
    b.output("bit", bit, Sink::Reveal).unwrap();
    b.output("larger", larger, Sink::Reveal).unwrap();
    let data = inputs(&[
        ("x", &[4], pairs.map(|p| p.0).to_vec()),
        ("y", &[4], pairs.map(|p| p.1).to_vec()),
    ]);
    check(&b.finish(), &data, &BTreeMap::new());
}

#[test]
fn max_pool_and_its_gradient_are_exact() {
    let mut rng = rng(7);
    for (shape, window, stride, pads) in [
        ([2, 3, 8, 6], [2, 2], [2, 2], [0; 4]),
        ([1, 2, 7, 9], [3, 3], [2, 2], [1; 4]),
        ([2, 1, 5, 4], [1, 3], [1, 1], [0, 0, 0, 2]),
        ([3, 1, 1, 2], [3, 3], [1, 2], [2, 1, 1, 2]),
    ] {
        for ring in [64u8, 48] {
            for fused in [false, true] {
                let spec = PoolSpec {
                    window,
                    stride,
                    pads,
                };
                let mut b = Builder::new("pool", ring).unwrap();
                let x = b.input("x", &shape, 16, ring - 2).unwrap();
                let (y, bits) = b.max_pool(x, spec).unwrap();
                let ys = b.shape(y);
                let (a, relu) = b.relu_trunc(y, 8, Rounding::Nearest).unwrap();
                let selectors = b
                    .pool_select(bits, fused.then_some(relu), &shape, spec)
                    .unwrap();
                let g = b.input("g", &ys, 16, 40).unwrap();
                let dx = b
                    .max_pool_grad(selectors, g, 8, Rounding::Nearest, &shape, spec)
                    .unwrap();
                for (name, val) in [("y", y), ("a", a), ("selectors", selectors), ("dx", dx)] {
                    b.output(name, val, Sink::Reveal).unwrap();
                }
                let n = |s: &[usize]| s.iter().product::<usize>();
                let mut data = random(&mut rng, n(&shape), u32::from(ring) - 2);
                data.iter_mut().step_by(3).for_each(|v| *v = 7);
                data[0] = ((1i64 << (ring - 2)) - 1) as u64;
                data[1] = -(1i64 << (ring - 2)) as u64;
                let data = inputs(&[
                    ("x", &shape, data),
                    ("g", &ys, random(&mut rng, n(&ys), 40)),
                ]);
                check(&b.finish(), &data, &BTreeMap::new());
            }
        }
    }
}

/// Negative values, so that a zero in the border would be seen; and of equal ones the first in the image
/// gets the gradient.
#[test]
fn a_border_changes_no_maximum_and_gets_no_gradient() {
    let signed = |values: &[i64]| values.iter().map(|v| *v as u64).collect::<Vec<_>>();
    let spec = PoolSpec {
        window: [3, 2],
        stride: [2, 2],
        pads: [1, 1, 2, 1],
    };
    let mut b = Builder::new("border", 64).unwrap();
    let x = b.input("x", &[1, 3, 3], 8, 20).unwrap();
    let (y, bits) = b.max_pool(x, spec).unwrap();
    let selectors = b.pool_select(bits, None, &[1, 3, 3], spec).unwrap();
    let g = b.input("g", &[1, 2, 2], 8, 20).unwrap();
    let dx = b
        .max_pool_grad(selectors, g, 1, Rounding::Nearest, &[1, 3, 3], spec)
        .unwrap();
    let total = b.sum_pool(x, spec).unwrap();
    for (name, val) in [("y", y), ("dx", dx), ("total", total)] {
        b.output(name, val, Sink::Reveal).unwrap();
    }
    let x = signed(&[-9, -5, -5, -9, -7, -5, -4, -4, -8]);
    let data = inputs(&[
        ("x", &[1, 3, 3], x),
        ("g", &[1, 2, 2], signed(&[2, 4, 6, 8])),
    ]);
    let program = b.finish();
    check(&program, &data, &BTreeMap::new());
    let run = plain::run(&program, 0, &mut BTreeMap::new(), &data, None).unwrap();
    // Rows -1 .. 1 and 1 .. 3, columns -1 .. 0 and 1 .. 2.
    assert_eq!(run["y"].data(), signed(&[-9, -5, -4, -4]));
    let dx = signed(&[1, 2, 0, 0, 0, 0, 3, 4, 0]);
    assert_eq!(run["dx"].data(), dx);
    assert_eq!(run["total"].data(), signed(&[-18, -22, -13, -24]));
}

#[test]
fn a_pool_with_the_relu_after_it_is_exact_and_takes_four_rounds_where_rounds_are_dear() {
    let mut rng = rng(17);
    for (shape, window, stride, pads) in [
        ([2, 3, 8, 6], [2, 2], [2, 2], [0; 4]),
        ([1, 2, 7, 9], [2, 2], [1, 1], [1; 4]),
        ([2, 1, 5, 6], [1, 3], [1, 2], [0, 1, 0, 0]),
        ([1, 1, 40, 60], [2, 2], [2, 2], [0; 4]),
    ] {
        for (ring, rounding) in [
            (64u8, Rounding::Nearest),
            (64, Rounding::Floor),
            (48, Rounding::Nearest),
        ] {
            let spec = PoolSpec {
                window,
                stride,
                pads,
            };
            let mut b = Builder::new("pooled relu", ring).unwrap();
            let x = b.input("x", &shape, 16, ring - 2).unwrap();
            let (y, bits) = b.max_pool(x, spec).unwrap();
            let ys = b.shape(y);
            let flat = b.reshape(y, &[ys.iter().product()]).unwrap();
            let y = b.reshape(flat, &ys).unwrap();
            let (a, relu) = b.relu_trunc(y, 8, rounding).unwrap();
            let selectors = b.pool_select(bits, Some(relu), &shape, spec).unwrap();
            let g = b.input("g", &ys, 16, 40).unwrap();
            let dx = b
                .max_pool_grad(selectors, g, 8, Rounding::Nearest, &shape, spec)
                .unwrap();
            b.output("a", a, Sink::Reveal).unwrap();
            b.output("dx", dx, Sink::Reveal).unwrap();
            let n = |s: &[usize]| s.iter().product::<usize>();
            let mut data = random(&mut rng, n(&shape), u32::from(ring) - 2);
            data.iter_mut().step_by(3).for_each(|v| *v = 700);
            data.iter_mut().skip(1).step_by(5).for_each(|v| *v = 128);
            data[0] = ((1i64 << (ring - 2)) - 1) as u64;
            data[1] = -(1i64 << (ring - 2)) as u64;
            let data = inputs(&[
                ("x", &shape, data),
                ("g", &ys, random(&mut rng, n(&ys), 40)),
            ]);
            let program = b.finish();
            check(&program, &data, &BTreeMap::new());
            let cost = Plan::lowered(&program, Profile::ROUNDS).cost();
            assert_eq!(cost.rounds, 4);
        }
    }
}

#[test]
fn a_pool_whose_maxima_are_read_elsewhere_or_rounded_with_coins_is_lowered_alone() {
    let rounds = |rounding: Rounding, keep: bool| {
        let spec = PoolSpec {
            window: [2, 2],
            stride: [2, 2],
            pads: [0; 4],
        };
        let mut b = Builder::new("alone", 64).unwrap();
        let x = b.input("x", &[1, 1, 4, 4], 16, 60).unwrap();
        let (y, _) = b.max_pool(x, spec).unwrap();
        let (a, _) = b.relu_trunc(y, 8, rounding).unwrap();
        b.output("a", a, Sink::Reveal).unwrap();
        if keep {
            b.output("y", y, Sink::Reveal).unwrap();
        }
        let program = b.finish();
        let x = (0..16u64)
            .map(|v| v.wrapping_mul(77).wrapping_sub(500))
            .collect();
        check(
            &program,
            &inputs(&[("x", &[1, 1, 4, 4], x)]),
            &BTreeMap::new(),
        );
        Plan::lowered(&program, Profile::ROUNDS).cost().rounds
    };
    assert_eq!(rounds(Rounding::Nearest, false), 4);
    assert_eq!(rounds(Rounding::Nearest, true), 9);
    assert_eq!(rounds(Rounding::Stochastic, false), 9);
}

#[test]
fn a_link_decides_what_a_plan_saves() {
    let mut b = Builder::new("relu", 64).unwrap();
    let x = b.input("x", &[4096], 32, 40).unwrap();
    let (y, _) = b.relu_trunc(x, 16, Rounding::Nearest).unwrap();
    b.output("y", y, Sink::Reveal).unwrap();
    let program = b.finish();
    let rounds = |rtt_us: u32, kbit_per_s: u32| {
        let link = LinkProfile { rtt_us, kbit_per_s };
        Plan::for_link(&program, link).cost().rounds
    };
    assert_eq!(rounds(0, 2_000_000), 4);
    assert_eq!(rounds(40_000, 300_000), 3);
    assert_eq!(rounds(40_000, 1_000), 4);
}

#[test]
fn argmax_is_exact_with_ties_to_the_first() {
    let mut rng = rng(8);
    for n in [2usize, 3, 4, 10, 25] {
        for rows in [1usize, 7, 70] {
            let mut b = Builder::new("argmax", 64).unwrap();
            let x = b.input("x", &[rows, n], 8, 62).unwrap();
            let best = b.argmax(x).unwrap();
            let max = b.bit_dot(best, x).unwrap();
            let ring = b.bit_to_ring(best).unwrap();
            b.output("index", best, Sink::RevealIndex).unwrap();
            b.output("one hot", ring, Sink::Reveal).unwrap();
            b.output("max", max, Sink::Reveal).unwrap();
            let mut data = random(&mut rng, rows * n, 62);
            data.iter_mut()
                .take(rows * n / 2)
                .for_each(|v| *v = (*v % 3).wrapping_sub(1));
            let program = b.finish();
            check(
                &program,
                &inputs(&[("x", &[rows, n], data)]),
                &BTreeMap::new(),
            );
        }
    }
}

#[test]
fn powers_are_exact() {
    let mut rng = rng(9);
    let x = random(&mut rng, 531, 14);
    unary("powers", 64, 10, x, |b, x| b.powers(x, 4));
}

#[test]
fn lookup_is_exact_at_every_position() {
    let mut rng = rng(10);
    for position in [0u8, 4, 8, 16, 20, 28] {
        for width in [1u8, 5, 8, 10] {
            let values = |bits: u64, rng: &mut ChaCha20Rng| {
                (0..1 << width)
                    .map(|_| rng.next_u64() % (1 << bits))
                    .collect()
            };
            let tables = vec![
                Table {
                    values: values(20, &mut rng),
                    out_bits: 20,
                    frac_bits: 16,
                },
                Table {
                    values: values(3, &mut rng),
                    out_bits: 3,
                    frac_bits: 0,
                },
            ];
            let x = random(&mut rng, 600, 63);
            unary("lookup", 64, 8, x, |b, x| {
                b.lookup(x, position, width, position + width + 2, tables.clone())
            });
        }
    }
}

#[test]
fn carried_state_and_masked_carried_state_survive_steps() {
    let mut rng = rng(11);
    let mut b = Builder::new("setup", 64).unwrap();
    let w = b.carried("w", &[6, 5], 8, 20).unwrap();
    b.output("w", w, Sink::CarryMasked).unwrap();
    let setup = b.finish();
    let mut b = Builder::new("request", 64).unwrap();
    let w = b.carried_masked("w", &[6, 5], 8, 20).unwrap();
    let count = b.carried("count", &[1], 0, 20).unwrap();
    let x = b.input("x", &[4, 6], 8, 20).unwrap();
    let y = b.matmul(x, w, false, false).unwrap();
    let (y, _) = b.relu_trunc(y, 8, Rounding::Nearest).unwrap();
    let count = b.add_const(count, 1).unwrap();
    b.output("y", y, Sink::Reveal).unwrap();
    b.output("count", count, Sink::Carry).unwrap();
    let request = b.finish();
    let plans = [Plan::new(&setup), Plan::new(&request)];
    let initial = inputs(&[
        ("w", &[6, 5], random(&mut rng, 30, 20)),
        ("count", &[1], vec![0]),
    ]);
    let step = |rng: &mut ChaCha20Rng| MemoryStep {
        plan: 1,
        inputs: inputs(&[("x", &[4, 6], random(rng, 24, 20))]),
    };
    let steps = [
        MemoryStep {
            plan: 0,
            inputs: BTreeMap::new(),
        },
        step(&mut rng),
        step(&mut rng),
    ];
    let secure = run(&plans, &steps, &initial, SEED).unwrap();
    let mut state = initial.clone();
    for (i, step) in steps.iter().enumerate().skip(1) {
        let expected = plain::run(&request, i as u64, &mut state, &step.inputs, None).unwrap();
        assert_eq!(secure.outputs[i], expected);
    }
    assert_eq!(secure.state["count"].data(), [2]);
    let sent = plans[1].cost().bytes_sent_per_party;
    assert!(
        sent < plans[0].cost().bytes_sent_per_party + 3000,
        "weights are not opened again: {sent}"
    );
}

#[test]
fn a_value_outside_the_domain_is_a_range_error_that_names_it() {
    let mut b = Builder::new("range", 64).unwrap();
    b.scope("conv1");
    let x = b.input("x", &[3], 20, 62).unwrap();
    let y = b.trunc(x, 16, Rounding::Floor).unwrap();
    b.output("y", y, Sink::Reveal).unwrap();
    let program = b.finish();
    let data = inputs(&[("x", &[3], vec![0, 1, (1 << 62) + 1])]);
    let error = plain::run(&program, 0, &mut BTreeMap::new(), &data, None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("conv1") && error.contains("element 2"),
        "{error}"
    );
}

#[test]
fn build_errors_name_layer_operation_and_both_sides() {
    let mut b = Builder::new("bad", 64).unwrap();
    b.scope("dense2");
    let x = b.input("x", &[4, 6], 16, 20).unwrap();
    let y = b.input("y", &[5, 3], 16, 20).unwrap();
    let error = b.matmul(x, y, false, false).unwrap_err().to_string();
    assert!(
        error.contains("dense2") && error.contains('6') && error.contains('5'),
        "{error}"
    );
    let z = b.input("z", &[4, 6], 8, 20).unwrap();
    let error = b.add(x, z).unwrap_err().to_string();
    assert!(error.contains("fraction bits"), "{error}");
    assert!(b.trunc(x, 63, Rounding::Floor).is_err());
    assert!(Builder::new("bad", 32).is_err());
}

#[test]
fn an_overflowing_product_is_a_range_error_in_both_rings() {
    for (ring, ok, bad) in [(64u8, 1u64 << 30, 1u64 << 31), (48, 1 << 22, 1 << 23)] {
        let mut b = Builder::new("overflow", ring).unwrap();
        let x = b.input("x", &[3], 8, 40).unwrap();
        let y = b.mul(x, x).unwrap();
        b.output("y", y, Sink::Reveal).unwrap();
        let program = b.finish();
        let run = |v: u64| {
            let data = inputs(&[("x", &[3], vec![1, v, v * 2 - 1])]);
            plain::run(&program, 0, &mut BTreeMap::new(), &data, None)
        };
        assert!(run(ok).is_ok(), "ring {ring}");
        let error = run(bad * 2).unwrap_err().to_string();
        assert!(error.contains("element 1"), "ring {ring}: {error}");
    }
}

#[test]
fn dropout_is_exact_costs_nothing_and_has_a_mask_for_each_step_and_layer() {
    let n = 1543;
    let spec = |key: u8, keep: f64| DropoutSpec {
        key: [key; 16],
        keep: (keep * 4294967296.0) as u32,
    };
    let program = |of: DropoutSpec| {
        let mut b = Builder::new("dropout", 64).unwrap();
        let x = b.input("x", &[n], 16, 60).unwrap();
        let y = b.dropout(x, of).unwrap();
        b.output("y", y, Sink::Reveal).unwrap();
        b.finish()
    };
    let x = random(&mut rng(71), n, 60);
    let x = x.iter().map(|v| v | 1).collect();
    let given = inputs(&[("x", &[n], x)]);
    let kept = |of: DropoutSpec, step: u64| {
        let out = plain::run(&program(of), step, &mut BTreeMap::new(), &given, None).unwrap();
        let pairs = out["y"].data().iter().zip(given["x"].data());
        let kept = pairs.map(|(y, x)| {
            assert!(y == x || *y == 0);
            *y != 0
        });
        kept.collect::<Vec<bool>>()
    };
    for keep in [0.5, 0.8, 0.1] {
        let program = program(spec(1, keep));
        let cost = Plan::new(&program).cost();
        assert_eq!(
            (cost.rounds, cost.bytes_sent_per_party, cost.dealer_bytes),
            (0, 0, 0)
        );
        check(&program, &given, &BTreeMap::new());
        let part = kept(spec(1, keep), 0).iter().filter(|k| **k).count() as f64 / n as f64;
        // Five standard deviations.
        let deviation = (keep * (1.0 - keep) / n as f64).sqrt();
        assert!((part - keep).abs() < 5.0 * deviation, "{part} of {keep}");
    }
    let mask = kept(spec(1, 0.5), 0);
    assert_eq!(mask, kept(spec(1, 0.5), 0));
    // Independent masks agree in half of the places.
    for other in [kept(spec(1, 0.5), 1), kept(spec(2, 0.5), 0)] {
        let same = mask.iter().zip(&other).filter(|(a, b)| a == b).count();
        assert!((n * 2 / 5..n * 3 / 5).contains(&same), "{same} of {n}");
    }
}
