//! Every kernel of every instruction set against a loop that can be seen to be right, at odd sizes.

use rand::rngs::StdRng;
use rand::{Rng, RngExt, SeedableRng};

use super::*;

/// A generator whose seed is printed, and can be set with `TREFOIL_TEST_SEED` to repeat a run.
fn rng() -> StdRng {
    let given = std::env::var("TREFOIL_TEST_SEED")
        .ok()
        .and_then(|s| s.parse().ok());
    let seed: u64 = given.unwrap_or_else(rand::random);
    println!("TREFOIL_TEST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

fn words(rng: &mut StdRng, len: usize) -> Vec<u64> {
    (0..len).map(|_| rng.next_u64()).collect()
}

const ACCS: [Acc; 3] = [Acc::Set, Acc::Add, Acc::Sub];

/// Joins a product to what was there, word by word.
fn joined(acc: Acc, old: &[u64], product: &[u64]) -> Vec<u64> {
    old.iter()
        .zip(product)
        .map(|(&o, &p)| acc.apply(o, p))
        .collect()
}

fn dot(a: &[u64], b: &[u64]) -> u64 {
    a.iter()
        .zip(b)
        .fold(0, |s, (&x, &y)| s.wrapping_add(x.wrapping_mul(y)))
}

fn naive_gemm(m: usize, k: usize, n: usize, a: &[u64], ta: bool, b: &[u64], tb: bool) -> Vec<u64> {
    let mut c = vec![0u64; m * n];
    for i in 0..m {
        for j in 0..n {
            for l in 0..k {
                let x = if ta { a[l * m + i] } else { a[i * k + l] };
                let y = if tb { b[j * k + l] } else { b[l * n + j] };
                c[i * n + j] = c[i * n + j].wrapping_add(x.wrapping_mul(y));
            }
        }
    }
    c
}

fn check_gemm(rng: &mut StdRng, [m, k, n]: [usize; 3]) {
    let (a, b, old) = (words(rng, m * k), words(rng, k * n), words(rng, m * n));
    for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
        let product = naive_gemm(m, k, n, &a, ta, &b, tb);
        for isa in Isa::ALL {
            for acc in ACCS {
                let mut c = old.clone();
                gemm_with(isa, acc, m, k, n, &a, ta, &b, tb, &mut c);
                let want = joined(acc, &old, &product);
                assert!(c == want, "{isa:?} {acc:?} {m}x{k}x{n} ta={ta} tb={tb}");
            }
        }
    }
}

#[test]
fn matrix_products_agree_with_three_loops_at_every_small_size() {
    let mut rng = rng();
    for m in [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 17] {
        for k in [0, 1, 3, 16, 33] {
            for n in [0, 1, 2, 4, 5, 8, 9, 10, 23, 24, 25, 50] {
                check_gemm(&mut rng, [m, k, n]);
            }
        }
    }
}

#[test]
fn matrix_products_agree_with_three_loops_beyond_every_block() {
    let mut rng = rng();
    for size in [
        [97, 257, 31],
        [101, 300, 577],
        [9, 513, 600],
        [3, 700, 70],
        [200, 40, 3],
        [1, 530, 1],
        [5, 259, 599],
        [193, 2, 9],
    ] {
        check_gemm(&mut rng, size);
    }
    for _ in 0..30 {
        let size = [
            rng.random_range(1..40),
            rng.random_range(1..400),
            rng.random_range(1..60),
        ];
        check_gemm(&mut rng, size);
    }
}

/// Large enough to be divided among three threads, with rows, images and channels that do not divide evenly.
#[test]
fn products_do_not_depend_on_the_number_of_threads() {
    let rng = &mut rng();
    let [m, k, n] = [173, 211, 181];
    let (a, b, old) = (words(rng, m * k), words(rng, k * n), words(rng, m * n));
    let s = ConvShape {
        n: 7,
        c_in: 9,
        h: 29,
        w: 31,
        c_out: 13,
        kh: 5,
        kw: 3,
        stride: [1, 1],
        pad: [1, 1],
    };
    let (x, w, y) = (
        words(rng, s.x_len()),
        words(rng, s.w_len()),
        words(rng, s.y_len()),
    );
    let all = |threads: usize| {
        crate::set_threads(threads);
        let mut out = Vec::new();
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let mut c = old.clone();
            gemm(Acc::Sub, m, k, n, &a, ta, &b, tb, &mut c);
            assert_eq!(
                c,
                joined(Acc::Sub, &old, &naive_gemm(m, k, n, &a, ta, &b, tb)),
                "{threads} threads, {ta} {tb}"
            );
        }
        for acc in ACCS {
            let (mut to_y, mut to_x, mut to_w) = (y.clone(), x.clone(), w.clone());
            conv2d(acc, &s, &x, &w, &mut to_y);
            conv2d_grad_input(acc, &s, &y, &w, &mut to_x);
            conv2d_grad_weight(acc, &s, &x, &y, &mut to_w);
            out.extend([to_y, to_x, to_w]);
        }
        out
    };
    let one = all(1);
    for threads in [2, 3, 8] {
        assert!(one == all(threads), "{threads} threads");
    }
    crate::set_threads(0);
}

#[test]
#[should_panic(expected = "b is k by n")]
fn a_matrix_of_the_wrong_length_is_refused() {
    gemm(
        Acc::Set,
        2,
        3,
        4,
        &[0; 6],
        false,
        &[0; 11],
        false,
        &mut [0; 8],
    );
}

/// Calls `f(x index, w index, out index)` for every product of the convolution.
fn each_product(s: &ConvShape, mut f: impl FnMut(usize, usize, usize)) {
    let (oh, ow) = (s.out_h(), s.out_w());
    for n in 0..s.n {
        for o in 0..s.c_out {
            for (y, x) in (0..oh).flat_map(|y| (0..ow).map(move |x| (y, x))) {
                for c in 0..s.c_in {
                    for (ky, kx) in (0..s.kh).flat_map(|ky| (0..s.kw).map(move |kx| (ky, kx))) {
                        let (iy, ix) = (y * s.stride[0] + ky, x * s.stride[1] + kx);
                        let inside = (s.pad[0]..s.h + s.pad[0]).contains(&iy)
                            && (s.pad[1]..s.w + s.pad[1]).contains(&ix);
                        if inside {
                            f(
                                ((n * s.c_in + c) * s.h + iy - s.pad[0]) * s.w + ix - s.pad[1],
                                ((o * s.c_in + c) * s.kh + ky) * s.kw + kx,
                                ((n * s.c_out + o) * oh + y) * ow + x,
                            );
                        }
                    }
                }
            }
        }
    }
}

fn shape(
    n: usize,
    c: [usize; 2],
    hw: [usize; 2],
    k: [usize; 2],
    stride: [usize; 2],
    pad: [usize; 2],
) -> ConvShape {
    ConvShape {
        n,
        c_in: c[0],
        c_out: c[1],
        h: hw[0],
        w: hw[1],
        kh: k[0],
        kw: k[1],
        stride,
        pad,
    }
}

fn shapes(rng: &mut StdRng) -> Vec<ConvShape> {
    let mut shapes = vec![
        shape(3, [1, 5], [28, 28], [5, 5], [2, 2], [2, 2]),
        shape(2, [3, 16], [12, 12], [5, 5], [1, 1], [0, 0]),
        shape(5, [16, 8], [4, 4], [3, 3], [1, 1], [1, 1]),
        shape(2, [8, 24], [8, 8], [1, 1], [1, 1], [0, 0]),
        shape(2, [8, 9], [9, 7], [1, 1], [2, 2], [0, 0]),
        shape(1, [2, 3], [7, 9], [1, 1], [3, 2], [2, 1]),
        shape(3, [30, 50], [5, 5], [3, 3], [1, 1], [0, 0]),
        shape(7, [4, 10], [1, 1], [1, 1], [1, 1], [0, 0]),
        shape(2, [3, 2], [2, 2], [5, 5], [1, 1], [2, 2]),
        shape(2, [3, 2], [2, 2], [4, 4], [1, 1], [0, 0]),
        shape(0, [3, 2], [4, 4], [2, 2], [1, 1], [0, 0]),
        shape(40, [16, 16], [10, 10], [3, 3], [1, 1], [1, 1]),
        shape(2, [70, 3], [9, 3], [3, 3], [2, 2], [1, 1]),
    ];
    for _ in 0..60 {
        let mut pick = |top: usize| rng.random_range(1..=top);
        let (h, w) = (pick(14), pick(14));
        let s = shape(
            pick(4),
            [pick(6), pick(12)],
            [h, w],
            [pick(5), pick(5)],
            [pick(3), pick(3)],
            [pick(4) - 1, pick(4) - 1],
        );
        shapes.push(s);
    }
    shapes
}

#[test]
fn convolution_and_both_transposes_agree_with_direct_loops() {
    let mut rng = rng();
    for s in shapes(&mut rng) {
        let x = words(&mut rng, s.x_len());
        let w = words(&mut rng, s.w_len());
        let dy = words(&mut rng, s.y_len());
        let (mut y, mut dx, mut dw) = (
            vec![0u64; dy.len()],
            vec![0u64; x.len()],
            vec![0u64; w.len()],
        );
        each_product(&s, |xi, wi, yi| {
            y[yi] = y[yi].wrapping_add(x[xi].wrapping_mul(w[wi]));
            dx[xi] = dx[xi].wrapping_add(dy[yi].wrapping_mul(w[wi]));
            dw[wi] = dw[wi].wrapping_add(dy[yi].wrapping_mul(x[xi]));
        });
        for isa in Isa::ALL {
            for acc in ACCS {
                let mut got = dy.clone();
                conv2d_with(isa, acc, &s, &x, &w, &mut got);
                assert!(got == joined(acc, &dy, &y), "conv2d {isa:?} {acc:?} {s:?}");
                let mut got = x.clone();
                conv2d_grad_input_with(isa, acc, &s, &dy, &w, &mut got);
                assert!(
                    got == joined(acc, &x, &dx),
                    "grad_input {isa:?} {acc:?} {s:?}"
                );
                let mut got = w.clone();
                conv2d_grad_weight_with(isa, acc, &s, &x, &dy, &mut got);
                assert!(
                    got == joined(acc, &w, &dw),
                    "grad_weight {isa:?} {acc:?} {s:?}"
                );
            }
        }
    }
}

#[test]
fn the_three_convolutions_are_adjoint() {
    let mut rng = rng();
    for s in shapes(&mut rng) {
        let x = words(&mut rng, s.x_len());
        let w = words(&mut rng, s.w_len());
        let dy = words(&mut rng, s.y_len());
        let (mut y, mut dx, mut dw) = (vec![0; dy.len()], vec![0; x.len()], vec![0; w.len()]);
        conv2d(Acc::Set, &s, &x, &w, &mut y);
        conv2d_grad_input(Acc::Set, &s, &dy, &w, &mut dx);
        conv2d_grad_weight(Acc::Set, &s, &x, &dy, &mut dw);
        let form = dot(&y, &dy);
        assert_eq!(
            form,
            dot(&dx, &x),
            "<conv(x,w), dy> = <x, grad_input(dy,w)> for {s:?}"
        );
        assert_eq!(
            form,
            dot(&dw, &w),
            "<conv(x,w), dy> = <w, grad_weight(x,dy)> for {s:?}"
        );
    }
}

#[test]
fn the_peak_loops_sum_what_they_say() {
    let mut rng = rng();
    for turns in [0, 1, 2, 1000] {
        let (a, b) = (rng.next_u64(), rng.next_u64());
        let products = u64::from(turns) * PEAK_TURN as u64;
        let want = products.wrapping_mul(a).wrapping_mul(b);
        for isa in Isa::ALL {
            assert_eq!(peak_with(isa, turns, a, b), want, "{isa:?} {turns}");
        }
    }
}

#[test]
fn planes_hold_the_bits_of_the_words() {
    let mut rng = rng();
    for len in [0, 1, 63, 64, 65, 200, 511, 512] {
        for (lo, count) in [(0, 64), (0, 1), (63, 1), (5, 40), (64, 0)] {
            let src = words(&mut rng, len);
            let offset = rng.next_u64();
            for isa in Isa::ALL {
                let mut planes = vec![[0x5555; 8]; count];
                to_planes_with(isa, &src, offset, lo, &mut planes);
                for (i, plane) in planes.iter().enumerate() {
                    for j in 0..BLOCK {
                        let word = src.get(j).map_or(0, |w| w.wrapping_add(offset));
                        let want = word >> (lo as usize + i) & 1;
                        assert_eq!(
                            plane[j / 64] >> (j % 64) & 1,
                            want,
                            "{isa:?} {len} bit {i} of {j}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_plane_becomes_words_and_a_plane_again() {
    let mut rng = rng();
    for len in [0, 1, 63, 64, 65, 300, 511, 512] {
        let plane: Plane = std::array::from_fn(|_| rng.next_u64());
        for isa in Isa::ALL {
            let mut bits = vec![7; len];
            plane_to_words_with(isa, &plane, &mut bits);
            for (j, &bit) in bits.iter().enumerate() {
                assert_eq!(
                    bit,
                    plane[j / 64] >> (j % 64) & 1,
                    "{isa:?} {len} element {j}"
                );
            }
            // Upper bits of a word do not count.
            let noisy: Vec<u64> = bits.iter().map(|b| b | rng.next_u64() << 1).collect();
            let back = words_to_plane_with(isa, &noisy);
            for j in 0..BLOCK {
                let want = bits.get(j).copied().unwrap_or(0);
                assert_eq!(
                    back[j / 64] >> (j % 64) & 1,
                    want,
                    "{isa:?} {len} element {j}"
                );
            }
        }
    }
}

fn some_gates(rng: &mut StdRng, count: usize, regs: u16) -> Vec<Gate> {
    let ops = [
        GateOp::Xor,
        GateOp::And,
        GateOp::AndXor,
        GateOp::Mux,
        GateOp::Not,
        GateOp::Copy,
    ];
    (0..count)
        .map(|_| {
            let mut pick = || rng.random_range(0..regs);
            let (d, a, b, c) = (pick(), pick(), pick(), pick());
            Gate {
                op: ops[rng.random_range(0..ops.len())],
                d,
                a,
                b,
                c,
            }
        })
        .collect()
}

#[test]
fn circuits_agree_with_bits_one_by_one() {
    let mut rng = rng();
    for regs in [1u16, 2, 7, 90] {
        let gates = some_gates(&mut rng, 150, regs);
        let start: Vec<Plane> = (0..regs)
            .map(|_| std::array::from_fn(|_| rng.next_u64()))
            .collect();
        let mut want = start.clone();
        for j in 0..BLOCK {
            let mut bits: Vec<bool> = start
                .iter()
                .map(|p| p[j / 64] >> (j % 64) & 1 == 1)
                .collect();
            for g in &gates {
                let (a, b, c) = (bits[g.a as usize], bits[g.b as usize], bits[g.c as usize]);
                bits[g.d as usize] = match g.op {
                    GateOp::Xor => a != b,
                    GateOp::And => a && b,
                    GateOp::AndXor => c != (a && b),
                    GateOp::Mux => {
                        if c {
                            b
                        } else {
                            a
                        }
                    }
                    GateOp::Not => !a,
                    GateOp::Copy => a,
                };
            }
            for (plane, bit) in want.iter_mut().zip(bits) {
                plane[j / 64] = plane[j / 64] & !(1 << (j % 64)) | (bit as u64) << (j % 64);
            }
        }
        let netlist = Netlist::new(&gates);
        assert!(netlist.planes() <= regs as usize + 2);
        for isa in Isa::ALL {
            let mut got = start.clone();
            run_gates_with(isa, &gates, &mut got);
            assert_eq!(got, want, "{isa:?} {regs}");
            let mut got = start.clone();
            got.resize(regs as usize + 2, [0; 8]);
            netlist.run_with(isa, &mut got);
            // The two planes after the named ones are the netlist's own.
            let named = netlist.planes() - 2;
            assert_eq!(got[..named], want[..named], "{isa:?} {regs}");
        }
    }
}

#[test]
#[should_panic(expected = "a plane that is not there")]
fn a_gate_beyond_the_planes_is_refused() {
    let gate = Gate {
        op: GateOp::Not,
        d: 2,
        a: 0,
        b: 0,
        c: 0,
    };
    run_gates(&[gate], &mut [[0; 8]; 2]);
}

#[test]
#[should_panic(expected = "the gates need 5 planes")]
fn a_netlist_beyond_the_planes_is_refused() {
    let gate = Gate {
        op: GateOp::Xor,
        d: 0,
        a: 0,
        b: 2,
        c: 0,
    };
    Netlist::new(&[gate]).run(&mut [[0; 8]; 4]);
}

#[test]
fn a_forced_instruction_set_is_taken_where_the_machine_has_it() {
    assert_eq!(forced(Some("portable")).usable(), Isa::Portable);
    assert_eq!(forced(Some("avx2")).usable(), Isa::Avx2.min(Isa::best()));
    assert_eq!(forced(Some("avx512")).usable(), Isa::best());
    assert_eq!(forced(Some("no such")).usable(), Isa::best());
    assert_eq!(forced(None).usable(), Isa::best());
}
