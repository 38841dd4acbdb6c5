//! A look at a run's ranges tells how near it came to its bounds, and when one is broken.

mod common;

use common::{seed, synthetic, train_job};
use trefoil_models::job::TrainSpec;
use trefoil_models::plain_run::Tables;
use trefoil_models::ranges::{Part, Report, check};
use trefoil_models::{Network, schedule};

const NETWORK: &str = r#"
name = "tiny"
input = [1, 2, 2]
classes = 2
[[layer]]
kind = "dense"
units = 3
[[layer]]
kind = "relu"
[[layer]]
kind = "dense"
"#;

/// Training on images whose pixels are `factor` times as large as usual.
fn report(spec: &TrainSpec, factor: f32, steps: usize) -> Report {
    let network = Network::parse(NETWORK).expect("valid");
    let mut train = synthetic(&network, 4 * spec.batch, 0.1, seed());
    train.images.iter_mut().for_each(|x| *x *= factor);
    let mut tables = Tables::new();
    train.tables("train", spec.frac_bits, &mut tables);
    let schedule = schedule(&train_job(&network, spec, train.rows(), 0)).expect("valid");
    check(&schedule, &tables, None, steps, |_| {}).expect("tables fit")
}

fn spec() -> TrainSpec {
    TrainSpec {
        batch: 4,
        epochs: 3,
        momentum: 0.5,
        ..TrainSpec::default()
    }
}

#[test]
fn every_layer_is_reported_with_what_it_needs() {
    let report = report(&spec(), 1.0, 5);
    assert!(!report.is_broken() && report.steps == 5);
    for (layer, part) in [
        ("input", Part::Input),
        ("dense1", Part::State),
        ("dense1", Part::Forward),
        ("dense1", Part::Backward),
        ("relu1", Part::Forward),
        ("relu1", Part::Backward),
        ("dense2", Part::Forward),
        ("softmax", Part::Backward),
    ] {
        let row = report
            .rows
            .iter()
            .find(|row| row.layer == layer && row.part == part);
        let row = row.unwrap_or_else(|| panic!("{layer} {part:?} is missing"));
        let spare = (row.bound / row.largest).log2();
        assert!((spare - row.spare_bits).abs() < 1e-6, "{row:?}");
        assert!(row.spare_bits > 0.0, "{row:?}");
    }
    // Pixels reach 1.1 and may reach 8.
    let input = &report.rows[0];
    assert!(input.layer == "input" && input.bound == 8.0, "{input:?}");
    assert!(input.largest > 0.5 && input.largest < 1.2, "{input:?}");
}

#[test]
fn a_larger_input_leaves_fewer_bits_and_a_broken_bound_is_named() {
    let forward = |factor: f32| {
        let report = report(&spec(), factor, 1);
        let row = report
            .rows
            .iter()
            .find(|row| row.layer == "dense1" && row.part == Part::Forward);
        row.expect("reported").spare_bits
    };
    let lost = forward(1.0) - forward(4.0);
    assert!((1.0..2.5).contains(&lost), "{lost}");
    // More than 8, which the program presumes.
    let broken = report(&spec(), 10.0, 1);
    let input = broken
        .rows
        .iter()
        .find(|row| row.part == Part::Input)
        .expect("reported");
    assert!(broken.is_broken() && input.spare_bits < 0.0, "{input:?}");
}

#[test]
fn an_operation_that_refuses_its_operand_ends_the_run_and_is_reported() {
    let wild = TrainSpec {
        learning_rate: 64.0,
        momentum: 0.0,
        frac_bits: 24,
        epochs: 20,
        ..spec()
    };
    let report = report(&wild, 7.0, 80);
    assert!(report.is_broken());
    let worst = report
        .rows
        .iter()
        .map(|row| row.spare_bits)
        .fold(f64::INFINITY, f64::min);
    assert!(worst < 0.0, "{:?}", report.rows);
}
