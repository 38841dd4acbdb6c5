//! `trefoil plan --compare-activations`: the same network with exact ReLU and with each approximation.

use anyhow::Result;
use serde::Serialize;
use trefoil_models::Network;
use trefoil_models::cost::{self, Work};
use trefoil_models::job::TrainSpec;
use trefoil_models::network::LayerSpec;

use super::{Layer, Speeds, estimate_note, table, total};
use crate::cli::PlanArgs;

/// What is printed, also as JSON.
#[derive(Debug, Serialize)]
struct Comparison {
    network: String,
    work: &'static str,
    batch: usize,
    activations: Vec<Layer>,
}

/// What is compared, by the name in the table. How coefficients are fitted changes no cost.
fn candidates() -> Vec<(String, LayerSpec)> {
    let approximate = |degree: usize, learnt: bool| {
        let name = format!("degree {degree}{}", if learnt { ", l." } else { "" });
        let spec = LayerSpec::ApproxRelu {
            degree,
            interval: None,
            fit: None,
            learnable: learnt.then_some(true),
        };
        (name, spec)
    };
    let mut all = vec![
        ("relu".to_string(), LayerSpec::Relu {}),
        ("square".to_string(), LayerSpec::Square {}),
    ];
    all.extend((2..=4).map(|degree| approximate(degree, false)));
    all.extend((2..=4).map(|degree| approximate(degree, true)));
    all
}

/// Plans the step with each activation and prints them side by side.
pub(super) fn compare(
    network: &Network,
    spec: &TrainSpec,
    work: Work,
    args: &PlanArgs,
) -> Result<()> {
    let speeds = Speeds::of(args.link);
    let mut activations = Vec::new();
    for (name, activation) in candidates() {
        let network = network.with_activation(&activation)?;
        let plan = cost::plan(&network, spec, work, args.link.profile())?;
        let mut layer = speeds.layer(total(&plan.cost()));
        layer.cost.name = name;
        activations.push(layer);
    }
    let comparison = Comparison {
        network: network.name.clone(),
        work: if work == Work::Train {
            "train"
        } else {
            "predict"
        },
        batch: spec.batch,
        activations,
    };
    if args.json {
        println!("{}", serde_json::to_string(&comparison)?);
        return Ok(());
    }
    println!(
        "{} {}, {} image(s) a step",
        comparison.network, comparison.work, comparison.batch
    );
    table("activation", comparison.activations.iter());
    println!("l.: coefficients are learnt for each channel");
    estimate_note(args.link);
    Ok(())
}
