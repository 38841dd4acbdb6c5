//! Seconds of a training step with three parties and a dealer as threads in memory, and of the same
//! step in the clear. `cargo run --release -p trefoil-models --example training_speed -- lenet 128 3`

use std::collections::BTreeMap;
use std::time::Instant;

use trefoil_models::job::TrainSpec;
use trefoil_models::{Network, programs, weights};
use trefoil_protocol::Tensor;
use trefoil_protocol::plan::Plan;
use trefoil_protocol::run::memory::{MemoryStep, run};
use trefoil_protocol::run::plain;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let name = args.get(1).map_or("lenet", String::as_str);
    let batch: usize = args.get(2).map_or(Ok(128), |arg| arg.parse())?;
    let steps: usize = args.get(3).map_or(Ok(3), |arg| arg.parse())?;
    let network = Network::builtin(name)?;
    let spec = TrainSpec {
        batch,
        learning_rate: 1.0 / 32.0,
        ..TrainSpec::default()
    };
    let program = programs::train(&network, &spec, spec.learning_rate)?;
    let plan = Plan::new(&program);
    let initial = weights::initial(&network, 1, u32::from(spec.frac_bits));
    let mut inputs = BTreeMap::new();
    for (name, ty) in program.inputs() {
        let data = (0..ty.len() as u64).map(|i| {
            let word = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48;
            if ty.frac_bits == 0 {
                u64::from(i % network.classes as u64 == 0)
            } else {
                word
            }
        });
        inputs.insert(
            name.to_string(),
            Tensor::new(ty.shape.clone(), data.collect()),
        );
    }
    let start = Instant::now();
    let mut state = initial.clone();
    for step in 0..steps {
        plain::run(&program, step as u64, &mut state, &inputs, None)?;
    }
    println!(
        "{name} train {batch}: plain {:.3} s a step",
        start.elapsed().as_secs_f64() / steps as f64
    );
    let steps: Vec<MemoryStep> = (0..steps)
        .map(|_| MemoryStep {
            plan: 0,
            inputs: inputs.clone(),
        })
        .collect();
    let start = Instant::now();
    let secure = run(std::slice::from_ref(&plan), &steps, &initial, 1)?;
    println!(
        "secure {:.3} s a step, equal: {}",
        start.elapsed().as_secs_f64() / steps.len() as f64,
        secure.state == state
    );
    Ok(())
}
