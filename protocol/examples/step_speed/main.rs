//! Seconds of single operations with three parties and a dealer as threads in memory: what the
//! protocol costs without a network; then of one party alone and of the dealer alone. `cargo run --release -p trefoil-protocol --example step_speed`

mod alone;

use std::collections::BTreeMap;
use std::time::Instant;

use trefoil_protocol::plan::Plan;
use trefoil_protocol::program::{BuildError, Builder, ConvSpec, Rounding, Sink, Val};
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::run::memory::{MemoryStep, run};

fn case(name: &str, shape: &[usize], build: impl Fn(&mut Builder, Val) -> Result<Val, BuildError>) {
    let mut b = Builder::new(name, 64).expect("64 is a ring");
    let x = b.input("x", shape, 32, 40).expect("the input fits");
    let y = build(&mut b, x).expect("the program fits");
    b.output("y", y, Sink::Carry).expect("one output");
    let plan = Plan::new(&b.finish());
    let cost = plan.cost();
    let n: usize = shape.iter().product();
    let data = (0..n as u64)
        .map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 24)
        .collect();
    let inputs = BTreeMap::from([("x".to_string(), Tensor::new(shape.to_vec(), data))]);
    let step = MemoryStep { plan: 0, inputs };
    let mut seconds = Vec::new();
    for _ in 0..3 {
        let start = Instant::now();
        run(
            std::slice::from_ref(&plan),
            std::slice::from_ref(&step),
            &BTreeMap::new(),
            1,
        )
        .expect("threads run");
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    println!(
        "{name}: median {:.3} s, {} rounds, {:.1} MB a party, {:.1} MB dealt",
        seconds[1],
        cost.rounds,
        cost.bytes_sent_per_party as f64 / 1e6,
        cost.dealer_bytes as f64 / 1e6
    );
    let [party, dealer] = alone::seconds(&plan, &step.inputs, &BTreeMap::new(), 5);
    println!("  a party alone {party:.4} s, the dealer alone {dealer:.4} s");
}

fn main() {
    let million = [1usize << 20];
    case("relu-1m", &million, |b, x| {
        Ok(b.relu_trunc(x, 16, Rounding::Nearest)?.0)
    });
    case("truncate-1m", &million, |b, x| {
        b.trunc(x, 16, Rounding::Nearest)
    });
    case("mul-1m", &million, |b, x| {
        let x = b.rescale(x, 16)?;
        b.mul(x, x)
    });
    case("matmul-256x1024x256", &[256, 1024], |b, x| {
        let x = b.rescale(x, 16)?;
        let y = b.reshape(x, &[1024, 256])?;
        let y = b.add(y, y)?;
        b.matmul(x, y, false, false)
    });
    case("conv 128x20x12x12 5x5x50", &[128, 20, 12, 12], |b, x| {
        let x = b.rescale(x, 16)?;
        let w = b.constant(Tensor::zeros(&[50, 20, 5, 5]), 16)?;
        b.conv2d(x, w, ConvSpec::default())
    });
}
