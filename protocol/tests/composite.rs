//! Composites: secure equals plain bit for bit, and plain is within the stated error of the real
//! function on the stated domain.

use std::collections::BTreeMap;

use trefoil_protocol::fixed::{decode, encode};
use trefoil_protocol::plan::Plan;
use trefoil_protocol::program::{Builder, Curve, Program, Rounding, Sink};
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::run::memory::{MemoryStep, run};
use trefoil_protocol::run::plain;

const SEED: u64 = 20_261_122;

#[test]
fn inverse_sqrt_is_within_two_to_the_minus_twelve_relative() {
    // Ring, fraction bits, range: one segment; many; a variance; a second moment; the narrow ring.
    for (ring, frac, low, high) in [
        (64, 16, 0, 6),
        (64, 20, -20, 8),
        (64, 16, -10, 7),
        (64, 32, -24, 4),
        (64, 20, -9, 14),
        (64, 30, -12, -8),
        (48, 16, -10, 4),
    ] {
        let segments = i32::from(high - low + 5) / 6;
        let floor = 2f64.powi(i32::from(high) - 6 * segments);
        let (from, to) = (2f64.powi(low.into()), 2f64.powi(high.into()));
        let unit = 2f64.powi(-frac);
        let mut x: Vec<f64> = (0..1400)
            .map(|i| from * (to / from).powf(f64::from(i) / 1400.0))
            .collect();
        // The borders of every octave, and what counts as the floor.
        for octave in low..high {
            let border = 2f64.powi(octave.into());
            x.extend([border, border - unit, border + unit]);
        }
        x.extend([to - unit, floor / 2.0, floor / 1024.0, 0.0]);
        let mut b = Builder::new("inverse sqrt", ring).unwrap();
        let v = b.input("x", &[x.len()], frac as u8, (frac + i32::from(high)) as u8);
        let y = b.inverse_sqrt(v.unwrap(), low, high).unwrap();
        let frac_out = u32::from(b.ty(y).frac_bits);
        assert_eq!(frac_out as i32, 15 + (i32::from(high) + 1).div_euclid(2));
        b.output("y", y, Sink::Reveal).unwrap();
        let program = b.finish();
        let rounds = Plan::new(&program).cost().rounds;
        assert!(rounds <= if segments == 1 { 10 } else { 15 }, "{rounds}");
        let y = both(&program, &x, &[x.len()], frac as u32, frac_out);
        let mut worst = 0.0f64;
        for (x, y) in x.iter().zip(y) {
            let seen = decode(encode(*x, frac as u32), frac as u32).max(floor);
            worst = worst.max((y * seen.sqrt() - 1.0).abs());
            assert!(
                (y * seen.sqrt() - 1.0).abs() < 1.0 / 4096.0,
                "1/sqrt({x}) = {y}, range 2^{low} to 2^{high}"
            );
        }
        println!(
            "ring {ring}, 2^{low} to 2^{high}: worst 2^{:.2}, {rounds} rounds",
            worst.log2()
        );
    }
}

/// On the whole domain: dense between the limits and around them, and out to its ends, at every number of
/// fraction bits that a layer meets.
#[test]
fn curves_are_within_their_stated_error_on_the_whole_domain() {
    for (ring, fracs) in [
        (64, &[10u8, 12, 16, 20, 24, 32, 40, 48][..]),
        (48, &[10, 13, 20, 26, 32]),
    ] {
        for (frac, curve) in fracs.iter().flat_map(|f| Curve::ALL.map(|c| (*f, c))) {
            let unit = 2f64.powi(-i32::from(frac));
            let end = 2f64.powi(i32::from(ring) - 2 - i32::from(frac.max(28))) - 17.0;
            let mut x: Vec<f64> = (-4500..4500).map(|i| f64::from(i) / 247.0).collect();
            for border in [-16.0, -8.0, -4.0, 0.0, 4.0, 8.0, 16.0, end, -end] {
                let near = [-2f64.powi(-15), -unit, 0.0, unit, 2f64.powi(-15)];
                x.extend(near.map(|by| (border + by).clamp(-end, end)));
            }
            x.extend([-1000.0, -100.0, -20.0, 20.0, 100.0, 1000.0]);
            let mut b = Builder::new("curve", ring).unwrap();
            let v = b.input("x", &[x.len()], frac, ring - 3).unwrap();
            let (y, slope) = b.piecewise(v, curve).unwrap();
            let slope = b.scale(slope, 1 << 14).unwrap();
            let slope = b.rescale(slope, 28).unwrap();
            let both_of = b.concat(&[y, slope], 0).unwrap();
            b.output("y", both_of, Sink::Reveal).unwrap();
            let program = b.finish();
            let rounds = Plan::new(&program).cost().rounds;
            assert!(rounds <= if frac > 38 { 10 } else { 9 }, "{rounds} rounds");
            let found = both(&program, &x, &[x.len()], frac.into(), 28);
            let (mut worst, mut worst_slope) = (0.0f64, 0.0f64);
            let bound = 2f64.powi(curve.error_log2().into());
            for (i, x) in x.iter().enumerate() {
                let seen = decode(encode(*x, frac.into()), frac.into());
                let error = (found[i] - curve.value(seen)).abs();
                worst = worst.max(error);
                assert!(error < bound, "{curve:?}({x}) = {}, f {frac}", found[i]);
                let slope = found[found.len() / 2 + i];
                let error = (slope - curve.slope(seen)).abs();
                worst_slope = worst_slope.max(error);
                assert!(error < 1.0 / 60.0, "slope of {curve:?}({x}) = {slope}");
            }
            println!(
                "ring {ring}, f {frac}, {curve:?}: worst 2^{:.2}, slope {worst_slope:.4}, {rounds} rounds",
                worst.log2()
            );
        }
    }
}

#[test]
fn a_curve_costs_what_the_protocol_says() {
    let n = 1 << 14;
    for (curve, bits, dealt) in [
        (Curve::Sigmoid, 306, 488),
        (Curve::Tanh, 309, 512),
        (Curve::Silu, 309, 576),
        (Curve::Gelu, 308, 504),
    ] {
        let mut b = Builder::new("curve", 64).unwrap();
        let x = b.input("x", &[n], 32, 40).unwrap();
        let (y, slope) = b.piecewise(x, curve).unwrap();
        b.output("y", y, Sink::Carry).unwrap();
        b.output("slope", slope, Sink::Carry).unwrap();
        let cost = Plan::new(&b.finish()).cost();
        let opened = cost.bytes_sent_per_party as usize * 8 / 2 / n;
        let found = (opened, cost.dealer_bytes as usize / n);
        assert_eq!(found, (bits, dealt), "{curve:?}");
    }
}

/// Runs plain and secure; gives the output as real numbers.
fn both(program: &Program, x: &[f64], shape: &[usize], frac_in: u32, frac_out: u32) -> Vec<f64> {
    println!("seed {SEED}");
    let data = x.iter().map(|v| encode(*v, frac_in)).collect();
    let inputs: BTreeMap<String, Tensor> =
        [("x".to_string(), Tensor::new(shape.to_vec(), data))].into();
    let expected = plain::run(program, 0, &mut BTreeMap::new(), &inputs, None).unwrap();
    let step = MemoryStep { plan: 0, inputs };
    let secure = run(&[Plan::new(program)], &[step], &BTreeMap::new(), SEED).unwrap();
    assert_eq!(secure.outputs[0]["y"], expected["y"]);
    expected["y"]
        .data()
        .iter()
        .map(|v| decode(*v, frac_out))
        .collect()
}

#[test]
fn exp_is_within_two_to_the_minus_twelve() {
    let x: Vec<f64> = (0..4000).map(|i| i as f64 * 0.005).collect();
    let mut b = Builder::new("exp", 64).unwrap();
    let v = b.input("x", &[x.len()], 32, 40).unwrap();
    let y = b.exp_neg(v).unwrap();
    b.output("y", y, Sink::Reveal).unwrap();
    let y = both(&b.finish(), &x, &[x.len()], 32, 16);
    for (x, y) in x.iter().zip(y) {
        assert!((y - (-x).exp()).abs() < 1.0 / 4096.0, "exp(-{x}) = {y}");
    }
}

#[test]
fn reciprocal_is_within_two_to_the_minus_twelve_relative() {
    for integer_bits in [1u8, 2, 4, 7, 10] {
        let top = f64::from(1u32 << integer_bits);
        let x: Vec<f64> = (0..1500)
            .map(|i| 1.0 + (top - 1.0) * f64::from(i) / 1500.0)
            .collect();
        let mut b = Builder::new("reciprocal", 64).unwrap();
        let v = b.input("x", &[x.len()], 16, 16 + integer_bits).unwrap();
        let y = b.reciprocal(v, integer_bits).unwrap();
        b.output("y", y, Sink::Reveal).unwrap();
        let y = both(&b.finish(), &x, &[x.len()], 16, 24);
        for (x, y) in x.iter().zip(y) {
            let x = decode(encode(*x, 16), 16);
            assert!(
                (y * x - 1.0).abs() < 1.0 / 4096.0,
                "1/{x} = {y} ({integer_bits} bits)"
            );
        }
    }
}

#[test]
fn a_reciprocal_for_which_the_ring_has_no_room_is_refused_and_the_others_are_right() {
    for integer_bits in 1..=11u8 {
        let top = f64::from(1u32 << integer_bits);
        let x: Vec<f64> = (0..300)
            .map(|i| 1.0 + (top - 1.0) * f64::from(i) / 300.0)
            .collect();
        let mut b = Builder::new("reciprocal", 48).unwrap();
        let v = b.input("x", &[x.len()], 16, 16 + integer_bits).unwrap();
        let y = b.reciprocal(v, integer_bits);
        if integer_bits > 5 {
            let err = y.unwrap_err().to_string();
            assert!(err.contains("1 to 5") && err.contains("48-bit"), "{err}");
            continue;
        }
        b.output("y", y.unwrap(), Sink::Reveal).unwrap();
        let y = both(&b.finish(), &x, &[x.len()], 16, 24);
        for (x, y) in x.iter().zip(y) {
            let x = decode(encode(*x, 16), 16);
            assert!((y * x - 1.0).abs() < 1.0 / 4096.0, "1/{x} = {y}");
        }
    }
}

#[test]
fn softmax_is_within_two_to_the_minus_ten() {
    for n in [2usize, 3, 10, 20] {
        let rows = 40;
        let x: Vec<f64> = (0..rows * n)
            .map(|i| ((i * 7919 % 1000) as f64 / 1000.0 - 0.5) * (i % 23) as f64)
            .collect();
        let mut b = Builder::new("softmax", 64).unwrap();
        let v = b.input("x", &[rows, n], 32, 40).unwrap();
        let y = b.softmax(v).unwrap();
        b.output("y", y, Sink::Reveal).unwrap();
        let y = both(&b.finish(), &x, &[rows, n], 32, 16);
        for (x, y) in x.chunks(n).zip(y.chunks(n)) {
            let max = x.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = x.iter().map(|v| (v - max).exp()).sum();
            for (x, y) in x.iter().zip(y) {
                assert!((y - (x - max).exp() / sum).abs() < 1.0 / 1024.0, "{y}");
            }
        }
    }
}

#[test]
fn polynomials_follow_their_real_twins() {
    // ReLU on [-4, 4] in the mean, degree 2 and 4; a cubic.
    let fits = [
        (&[0.375, 0.5, 0.1171875][..], 14.0),
        (&[0.4, 0.5, 0.11, 0.02], 11.0),
        (&[0.234375, 0.5, 0.205078125, 0.0, -0.00640869140625], 8.0),
    ];
    for (coefficients, bits) in fits {
        let degree = coefficients.len() - 1;
        let slopes: Vec<f64> = (1..=degree).map(|j| j as f64 * coefficients[j]).collect();
        let at = |of: &[f64], x: f64| of.iter().rev().fold(0.0, |sum, c| sum * x + c);
        for (ring, frac) in [(64, 10u8), (64, 12), (64, 16), (64, 20), (64, 24), (48, 13)] {
            // On [-4, 4], and the ends of the domain, which must not leave the ring.
            let mut x: Vec<f64> = (0..=800).map(|i| f64::from(i) * 0.01 - 4.0).collect();
            x.extend([-15.99, 15.99]);
            let mut b = Builder::new("polynomial", ring).unwrap();
            let v = b.input("x", &[x.len()], 2 * frac, 2 * frac + 4).unwrap();
            let rounding = Rounding::Nearest;
            let (y, slope) = b.polynomial(v, coefficients, frac, rounding, true).unwrap();
            let both_of = b.concat(&[y, slope.unwrap()], 0).unwrap();
            b.output("y", both_of, Sink::Reveal).unwrap();
            let found = both(&b.finish(), &x, &[x.len()], (2 * frac).into(), frac.into());
            let (mut worst, mut worst_slope) = (0.0f64, 0.0f64);
            for (i, x) in x.iter().enumerate().take(801) {
                worst = worst.max((found[i] - at(coefficients, *x)).abs());
                let slope = found[found.len() / 2 + i];
                worst_slope = worst_slope.max((slope - at(&slopes, *x)).abs());
            }
            println!(
                "ring {ring}, f {frac}, degree {degree}: 2^{:.2}, slope 2^{:.2}",
                worst.log2(),
                worst_slope.log2()
            );
            // Few fraction bits are the larger error, and the narrow ring has room for fewer.
            let bits = f64::min(bits, f64::from(frac) - 1.0) - if ring == 48 { 4.0 } else { 0.0 };
            assert!(worst < (-bits).exp2(), "degree {degree}, f {frac}");
            assert!(
                worst_slope < (-bits).exp2(),
                "slope, degree {degree}, f {frac}"
            );
        }
    }
    let x = [-3.0, -0.5, 0.0, 1.25, 100.0];
    let mut b = Builder::new("square", 64).unwrap();
    let v = b.input("x", &[5], 16, 24).unwrap();
    let y = b.square(v, Rounding::Nearest).unwrap();
    b.output("y", y, Sink::Reveal).unwrap();
    assert_eq!(both(&b.finish(), &x, &[5], 16, 16), x.map(|v| v * v));
}
