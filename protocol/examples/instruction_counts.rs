//! One hot piece of work, once, for a count of its instructions: `scripts/instruction-counts` runs
//! this under callgrind and compares with recorded bounds. Times vary on a shared machine,
//! instructions hardly do. Without an argument it prints the names.

use std::collections::BTreeMap;
use std::hint::black_box;

use bytes::Bytes;
use trefoil_protocol::party::PartyId;
use trefoil_protocol::plan::Plan;
use trefoil_protocol::prg::{Domain, Pos, Prg};
use trefoil_protocol::program::{Builder, Rounding, Sink};
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::ring::kernel::{Acc, BLOCK, ConvShape, conv2d, gemm, to_planes};
use trefoil_protocol::run::memory::{MemoryStep, run, test_dealer_keys};
use trefoil_protocol::run::{DealerState, deal_step};
use trefoil_protocol::transport::{CorrectionSink, NetError};

/// The function whose instructions are counted, unless it is `run_step`.
#[inline(never)]
fn measured<T>(work: impl FnOnce() -> T) -> T {
    black_box(work())
}

struct Nowhere;

impl CorrectionSink for Nowhere {
    fn post(&mut self, _: PartyId, segment: Bytes) -> Result<(), NetError> {
        black_box(segment);
        Ok(())
    }
}

fn words(n: usize) -> Vec<u64> {
    let word = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..n as u64).map(word).collect()
}

fn matrix_product() {
    let n = 128;
    let (a, b, mut c) = (words(n * n), words(n * n), vec![0; n * n]);
    measured(|| gemm(Acc::Set, n, n, n, &a, false, &b, false, &mut c));
    black_box(c);
}

fn convolution() {
    let shape = ConvShape {
        n: 2,
        c_in: 20,
        h: 12,
        w: 12,
        c_out: 50,
        kh: 5,
        kw: 5,
        stride: [1, 1],
        pad: [0, 0],
    };
    let (x, w) = (words(shape.x_len()), words(shape.w_len()));
    let mut out = vec![0; shape.y_len()];
    measured(|| conv2d(Acc::Set, &shape, &x, &w, &mut out));
    black_box(out);
}

fn stream() {
    let prg = Prg::new([7; 16]);
    let pos = Pos {
        step: 1,
        id: 2,
        domain: Domain::Ring,
    };
    let mut out = vec![0; 1 << 16];
    measured(|| prg.fill(pos, 0, &mut out));
    black_box(out);
}

fn bit_planes() {
    let source = words(64 * BLOCK);
    let mut planes = [[0; 8]; 64];
    measured(|| {
        for block in source.chunks(BLOCK) {
            to_planes(block, 5, 0, &mut planes);
        }
    });
    black_box(planes);
}

fn relu() -> Plan {
    let mut b = Builder::new("relu", 64).expect("64 is a ring");
    let x = b.input("x", &[1 << 14], 32, 40).expect("it fits");
    let (y, _) = b.relu_trunc(x, 16, Rounding::Nearest).expect("it fits");
    b.output("y", y, Sink::Carry).expect("one output");
    Plan::new(&b.finish())
}

/// The dealer's part of a ReLU of 2^14 elements.
fn dealer_relu() {
    let plan = relu();
    let keys = test_dealer_keys(1);
    let mut state = DealerState::default();
    measured(|| deal_step(&plan, 0, &keys, &mut state, &mut Nowhere)).expect("nothing can fail");
}

/// The three parties' parts of the same, as threads: what is counted is `run_step`.
fn parties_relu() {
    let plan = relu();
    let inputs = BTreeMap::from([("x".into(), Tensor::new(vec![1 << 14], words(1 << 14)))]);
    let step = MemoryStep { plan: 0, inputs };
    run(&[plan], &[step], &BTreeMap::new(), 1).expect("threads run");
}

fn main() {
    let cases: [(&str, fn()); 6] = [
        ("matrix-product-128", matrix_product),
        ("convolution-2x20x12x12-50", convolution),
        ("stream-64k", stream),
        ("bit-planes-32k", bit_planes),
        ("dealer-relu-16k", dealer_relu),
        ("parties-relu-16k", parties_relu),
    ];
    let wanted = std::env::args().nth(1);
    for (name, work) in cases {
        match &wanted {
            None => println!("{name}"),
            Some(wanted) if wanted == name => work(),
            Some(_) => {}
        }
    }
}
