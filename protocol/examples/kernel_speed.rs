//! Prints how fast the kernels are on this machine: G multiply-adds a second, GB a second, ns a gate.
//!
//! `cargo run --release -p trefoil-protocol --example kernel_speed`; all instruction sets that the machine has, on
//! one core.

use std::hint::black_box;
use std::time::Instant;

use trefoil_protocol::prg::{Domain, Pos, Prg};
use trefoil_protocol::ring::kernel::{
    Acc, BLOCK, ConvShape, Gate, GateOp, Isa, Netlist, PEAK_TURN, PlaneBuffer,
    conv2d_grad_input_with, conv2d_grad_weight_with, conv2d_with, gemm_with, peak_with,
    plane_to_words_with, to_planes_with, words_to_plane_with,
};

/// Seconds of one call: the best of several batches that take some milliseconds each.
fn seconds(mut call: impl FnMut()) -> f64 {
    let start = Instant::now();
    call();
    let once = start.elapsed().as_secs_f64();
    let calls = (0.01 / once.max(1e-9)).clamp(1.0, 1e6) as u32;
    let mut best = f64::MAX;
    for _ in 0..7 {
        let start = Instant::now();
        for _ in 0..calls {
            call();
        }
        best = best.min(start.elapsed().as_secs_f64() / calls as f64);
    }
    best
}

fn words(seed: u64, len: usize) -> Vec<u64> {
    let mut out = vec![0; len];
    let at = Pos {
        step: seed,
        id: 0,
        domain: Domain::Ring,
    };
    Prg::new([1; 16]).fill(at, 0, &mut out);
    out
}

fn gemms(isa: Isa) {
    let sizes = [
        (512, 512, 512, false, false),
        (128, 784, 128, false, false),
        (784, 128, 128, true, false),
        (128, 128, 784, false, true),
        (128, 128, 10, false, false),
        (128, 800, 500, false, false),
        (256, 1024, 256, false, false),
        (128, 500, 800, false, true),
        (800, 128, 500, true, false),
        (1, 784, 128, false, false),
        (1, 1024, 1024, false, false),
        (1, 1024, 1024, false, true),
        (1024, 1024, 1, false, false),
        (8, 800, 500, false, false),
        (10, 128, 128, false, false),
    ];
    for (m, k, n, ta, tb) in sizes {
        let (a, b, mut c) = (words(1, m * k), words(2, k * n), vec![0; m * n]);
        let t = seconds(|| gemm_with(isa, Acc::Set, m, k, n, &a, ta, &b, tb, black_box(&mut c)));
        let name = format!(
            "gemm {m}x{k}x{n}{}{}",
            if ta { " ta" } else { "" },
            if tb { " tb" } else { "" }
        );
        println!("  {name:<34} {:8.2} G mac/s", (m * k * n) as f64 / t / 1e9);
    }
}

fn convs(isa: Isa) {
    let shapes = [
        ("lenet 1", 32, [1, 20], 28, 5, 1, 0),
        ("lenet 2", 32, [20, 50], 12, 5, 1, 0),
        ("minionn 2", 32, [16, 16], 12, 5, 1, 0),
        ("chameleon", 32, [1, 5], 28, 5, 2, 2),
        ("3x3 8>16 28", 32, [8, 16], 28, 3, 1, 1),
        ("3x3 16>32 14", 32, [16, 32], 14, 3, 1, 1),
        ("3x3 32>32 7", 32, [32, 32], 7, 3, 1, 1),
        ("3x3 16>32 28 s2", 32, [16, 32], 28, 3, 2, 1),
        ("1x1 32>64 14", 32, [32, 64], 14, 1, 1, 0),
    ];
    for (name, n, [c_in, c_out], side, kernel, stride, pad) in shapes {
        let s = ConvShape {
            n,
            c_in,
            h: side,
            w: side,
            c_out,
            kh: kernel,
            kw: kernel,
            stride: [stride; 2],
            pad: [pad; 2],
        };
        let (x, w, dy) = (
            words(1, s.x_len()),
            words(2, s.w_len()),
            words(3, s.y_len()),
        );
        let (mut y, mut dx, mut dw) = (dy.clone(), x.clone(), w.clone());
        let macs = (s.y_len() * c_in * kernel * kernel) as f64 / 1e9;
        let forward = seconds(|| conv2d_with(isa, Acc::Set, &s, &x, &w, black_box(&mut y)));
        let input =
            seconds(|| conv2d_grad_input_with(isa, Acc::Set, &s, &dy, &w, black_box(&mut dx)));
        let weight =
            seconds(|| conv2d_grad_weight_with(isa, Acc::Set, &s, &x, &dy, black_box(&mut dw)));
        println!(
            "  conv {name:<18} forward {:6.2}  grad_input {:6.2}  grad_weight {:6.2} G mac/s",
            macs / forward,
            macs / input,
            macs / weight
        );
    }
}

fn bits(isa: Isa) {
    let src = words(4, BLOCK);
    let mut planes = vec![[0u64; 8]; 64];
    for count in [64, 48, 16] {
        let out = &mut planes[..count];
        let t = seconds(|| to_planes_with(isa, black_box(&src), 3, 0, black_box(&mut *out)));
        println!(
            "  to_planes, {count} planes             {:8.2} ns/element",
            t * 1e9 / BLOCK as f64
        );
    }
    let mut bits = vec![0; BLOCK];
    let t = seconds(|| plane_to_words_with(isa, black_box(&planes[3]), black_box(&mut bits)));
    println!(
        "  plane_to_words                    {:8.2} ns/element",
        t * 1e9 / BLOCK as f64
    );
    let t = seconds(|| {
        black_box(words_to_plane_with(isa, black_box(&bits)));
    });
    println!(
        "  words_to_plane                    {:8.2} ns/element",
        t * 1e9 / BLOCK as f64
    );
    let ops = [GateOp::Xor, GateOp::And, GateOp::AndXor, GateOp::Mux];
    let choice = words(5, 700);
    let gates: Vec<Gate> = choice
        .iter()
        .map(|&r| {
            let reg = |shift: u32| ((r >> shift) % 200) as u16;
            Gate {
                op: ops[(r >> 60) as usize % 4],
                d: reg(0),
                a: reg(10),
                b: reg(20),
                c: reg(30),
            }
        })
        .collect();
    let netlist = Netlist::new(&gates);
    let mut regs = PlaneBuffer::new(netlist.planes());
    regs.fill([0x1234_5678_9abc_def0; 8]);
    let t = seconds(|| netlist.run_with(isa, black_box(&mut regs)));
    println!(
        "  gates (700, mixed)                {:8.2} ns/gate",
        t * 1e9 / 700.0
    );
}

fn main() {
    for isa in Isa::ALL.into_iter().filter(|&isa| isa <= Isa::best()) {
        let t = seconds(|| {
            black_box(peak_with(isa, 4096, black_box(3), black_box(5)));
        });
        let peak = (4096 * PEAK_TURN) as f64 / t / 1e9;
        println!("{isa:?}, on registers alone {peak:.2} G mac/s");
        gemms(isa);
        convs(isa);
        bits(isa);
    }
    println!("prg");
    let prg = Prg::new([9; 16]);
    let at = Pos {
        step: 1,
        id: 2,
        domain: Domain::Ring,
    };
    for len in [64usize, 4096, 1 << 20] {
        let mut out = vec![0u64; len];
        let rate = |t: f64| (len * 8) as f64 / t / 1e9;
        let fill = rate(seconds(|| prg.fill(at, 0, black_box(&mut out))));
        let add = rate(seconds(|| prg.add(at, 0, black_box(&mut out))));
        let odd = rate(seconds(|| prg.xor(at, 1, black_box(&mut out))));
        println!(
            "  {len:>8} words: fill {fill:6.2}  add {add:6.2}  xor from an odd word {odd:6.2} GB/s"
        );
    }
}
