//! Convolution in groups and with dilation, and products along channels: each equals its definition
//! written as plain loops. That the secure form equals the plain one is tested with all other
//! operations (`tests/src/operations/arithmetic.rs`).

use trefoil_protocol::program::{ChannelPass, ChannelShape, ConvShape, GroupShape, Pass, Product};
use trefoil_protocol::ring::kernel::Acc;

fn words(n: usize, salt: u64) -> Vec<u64> {
    let word = |i: u64| {
        (i + salt)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .rotate_left(29)
            ^ salt
    };
    (0..n as u64).map(word).collect()
}

/// All products of one output with one input and one weight: `each(x, w, y)`.
fn each(s: &GroupShape, mut each: impl FnMut(usize, usize, usize)) {
    let g = &s.group;
    let (oh, ow) = (g.out_h(), g.out_w());
    let [kh, kw] = s.kernel;
    for n in 0..g.n {
        for o in 0..g.c_out * s.groups {
            let group = o / g.c_out;
            for c in 0..g.c_in {
                for (ky, kx) in (0..kh).flat_map(|ky| (0..kw).map(move |kx| (ky, kx))) {
                    for (oy, ox) in (0..oh).flat_map(|oy| (0..ow).map(move |ox| (oy, ox))) {
                        let y = (oy * g.stride[0] + ky * s.dilation[0]).checked_sub(g.pad[0]);
                        let x = (ox * g.stride[1] + kx * s.dilation[1]).checked_sub(g.pad[1]);
                        let (Some(y), Some(x)) = (y, x) else { continue };
                        if y >= g.h || x >= g.w {
                            continue;
                        }
                        let channel = n * g.c_in * s.groups + group * g.c_in + c;
                        each(
                            (channel * g.h + y) * g.w + x,
                            ((o * g.c_in + c) * kh + ky) * kw + kx,
                            ((n * g.c_out * s.groups + o) * oh + oy) * ow + ox,
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn grouped_and_dilated_convolutions_equal_their_definition() {
    for (groups, c_in, c_out, kernel, dilation, stride, pad) in [
        (1, 3, 2, [3, 3], [2, 2], [1, 1], [2, 2]),
        (2, 2, 3, [3, 2], [1, 1], [1, 1], [1, 0]),
        (5, 1, 1, [3, 3], [1, 1], [2, 2], [1, 1]),
        (3, 1, 2, [2, 3], [3, 1], [2, 1], [1, 2]),
        (4, 2, 1, [1, 1], [1, 1], [1, 1], [0, 0]),
    ] {
        let span = |i: usize| (kernel[i] - 1) * dilation[i] + 1;
        let s = GroupShape {
            group: ConvShape {
                n: 3,
                c_in,
                h: 9,
                w: 8,
                c_out,
                kh: span(0),
                kw: span(1),
                stride,
                pad,
            },
            groups,
            kernel,
            dilation,
        };
        let [x, w, y] = s.lens();
        let (xs, ws, ys) = (words(x, 1), words(w, 2), words(y, 3));
        for acc in [Acc::Set, Acc::Add, Acc::Sub] {
            for pass in [Pass::Forward, Pass::Input, Pass::Weight] {
                let (a, b, n) = match pass {
                    Pass::Forward => (&xs, &ws, y),
                    Pass::Input => (&ys, &ws, x),
                    Pass::Weight => (&xs, &ys, w),
                };
                let before = words(n, 4);
                let mut expected = if acc == Acc::Set {
                    vec![0; n]
                } else {
                    before.clone()
                };
                each(&s, |x, w, y| {
                    let (at, product) = match pass {
                        Pass::Forward => (y, xs[x].wrapping_mul(ws[w])),
                        Pass::Input => (x, ys[y].wrapping_mul(ws[w])),
                        Pass::Weight => (w, xs[x].wrapping_mul(ys[y])),
                    };
                    expected[at] = match acc {
                        Acc::Sub => expected[at].wrapping_sub(product),
                        _ => expected[at].wrapping_add(product),
                    };
                });
                let mut out = before;
                Product::Grouped(pass, s).apply(acc, a, b, &mut out);
                assert_eq!(out, expected, "{pass:?} {acc:?} {s:?}");
            }
        }
    }
}

#[test]
fn products_along_channels_equal_their_definition() {
    for (outer, channels, inner) in [(1, 1, 1), (3, 5, 7), (2, 300, 1), (40, 3, 100)] {
        let s = ChannelShape {
            outer,
            channels,
            inner,
        };
        let (xs, ys, factors) = (
            words(s.elements(), 1),
            words(s.elements(), 2),
            words(channels, 3),
        );
        for acc in [Acc::Set, Acc::Add, Acc::Sub] {
            let before = words(s.elements(), 4);
            let join = |old: u64, new: u64| match acc {
                Acc::Set => new,
                Acc::Add => old.wrapping_add(new),
                Acc::Sub => old.wrapping_sub(new),
            };
            let mut sums = vec![0u64; channels];
            let mut expected = before.clone();
            for (at, old) in expected.iter_mut().enumerate() {
                let m = at / inner % channels;
                *old = join(*old, xs[at].wrapping_mul(factors[m]));
                sums[m] = sums[m].wrapping_add(xs[at].wrapping_mul(ys[at]));
            }
            let mut out = before.clone();
            Product::Channel(ChannelPass::Scale, s).apply(acc, &xs, &factors, &mut out);
            assert_eq!(out, expected, "{acc:?} {s:?}");
            let expected: Vec<u64> = sums
                .iter()
                .zip(&before)
                .map(|(new, old)| join(*old, *new))
                .collect();
            let mut out = before[..channels].to_vec();
            Product::Channel(ChannelPass::Dot, s).apply(acc, &xs, &ys, &mut out);
            assert_eq!(out, expected, "{acc:?} {s:?}");
        }
    }
}
