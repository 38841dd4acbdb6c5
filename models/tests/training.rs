//! Training: a secure run equals the plain one bit for bit, and the plain one learns like the float
//! twin does.

mod common;

use common::{
    assert_secure_equals_plain, gradients_agree, plain, secure_equals_plain, seed, synthetic,
    train_job,
};
use ndarray::ArrayView2;
use trefoil_models::float::{self, Data, Model};
use trefoil_models::job::{LrSchedule, TrainSpec};
use trefoil_models::plain_run::{PlainSession, Tables};
use trefoil_models::{Network, outcome, schedule};
use trefoil_protocol::program::Rounding;

const MLP: &str = r#"
name = "tiny-mlp"
input = [1, 3, 5]
classes = 3
[[layer]]
kind = "dense"
units = 7
[[layer]]
kind = "relu"
[[layer]]
kind = "dense"
units = 6
[[layer]]
kind = "relu"
[[layer]]
kind = "dense"
"#;

/// Every kind of layer, odd shapes: pool after ReLU, pool without ReLU, ReLU without pool, strides.
const CONV: &str = r#"
name = "tiny-conv"
input = [2, 11, 9]
classes = 3
[[layer]]
kind = "conv"
filters = 3
kernel = 3
padding = "same"
[[layer]]
kind = "relu"
[[layer]]
kind = "max_pool"
window = 2
[[layer]]
kind = "conv"
filters = 4
kernel = [3, 2]
stride = [1, 2]
padding = [1, 1]
[[layer]]
kind = "max_pool"
window = [2, 2]
stride = [1, 1]
[[layer]]
kind = "dense"
units = 6
[[layer]]
kind = "relu"
[[layer]]
kind = "dense"
"#;

const SMOOTH: &str = r#"
name = "tiny-smooth"
input = [1, 8, 8]
classes = 2
[[layer]]
kind = "avg_pool"
window = [2, 1]
[[layer]]
kind = "conv"
filters = 3
kernel = 3
[[layer]]
kind = "POLY"
[[layer]]
kind = "avg_pool"
window = [2, 3]
[[layer]]
kind = "conv"
filters = 4
kernel = 1
[[layer]]
kind = "square"
[[layer]]
kind = "global_avg_pool"
[[layer]]
kind = "flatten"
[[layer]]
kind = "dense"
"#;

fn network(text: &str) -> Network {
    Network::parse(text).expect("valid")
}

fn smooth(coefficients: &str) -> Network {
    network(&SMOOTH.replace(
        "kind = \"POLY\"",
        &format!("kind = \"poly\"\ncoefficients = {coefficients}"),
    ))
}

#[test]
fn secure_training_of_a_dense_network_equals_plain() {
    let spec = TrainSpec {
        batch: 4,
        epochs: 2,
        learning_rate: 0.25,
        ..TrainSpec::default()
    };
    secure_equals_plain(&network(MLP), &spec);
}

#[test]
fn secure_training_of_a_convolutional_network_with_momentum_equals_plain() {
    let spec = TrainSpec {
        batch: 3,
        epochs: 2,
        learning_rate: 0.1,
        momentum: 0.9,
        schedule: LrSchedule::Step {
            every_epochs: 1,
            factor: 0.3,
        },
        ..TrainSpec::default()
    };
    secure_equals_plain(&network(CONV), &spec);
}

#[test]
fn secure_training_with_stochastic_rounding_equals_plain() {
    let spec = TrainSpec {
        batch: 3,
        rounding: Rounding::Stochastic,
        ..TrainSpec::default()
    };
    secure_equals_plain(&network(CONV), &spec);
}

#[test]
fn secure_training_in_the_48_bit_ring_and_rounding_down_equals_plain() {
    let spec = TrainSpec {
        batch: 3,
        ring_bits: 48,
        frac_bits: 14,
        rounding: Rounding::Floor,
        ..TrainSpec::default()
    };
    secure_equals_plain(&network(CONV), &spec);
}

#[test]
fn secure_training_with_polynomials_and_average_pools_equals_plain() {
    let spec = TrainSpec {
        batch: 3,
        learning_rate: 0.03,
        momentum: 0.5,
        ..TrainSpec::default()
    };
    secure_equals_plain(&smooth("[0.1, 0.5, 0.25]"), &spec);
    secure_equals_plain(&smooth("[0.1, 0.5, 0.25, -0.0625]"), &spec);
    let narrow = TrainSpec {
        ring_bits: 48,
        frac_bits: 12,
        ..spec
    };
    secure_equals_plain(&smooth("[0.1, 0.5, 0.25, 0.03, -0.01]"), &narrow);
}

/// Twenty whole steps of a shipped network, batch 8.
fn twenty_steps(name: &str) {
    let seed = seed();
    let network = Network::builtin(name).expect("shipped");
    let spec = TrainSpec {
        batch: 8,
        epochs: 20,
        learning_rate: 0.0625,
        momentum: 0.5,
        ..TrainSpec::default()
    };
    let train = synthetic(&network, 8, 1.0, seed);
    let mut tables = Tables::new();
    train.tables("train", spec.frac_bits, &mut tables);
    let schedule = schedule(&train_job(&network, &spec, train.rows(), 0)).expect("valid");
    assert_eq!(schedule.steps.len(), 20);
    assert_secure_equals_plain(&schedule, &tables, None, seed);
}

#[test]
fn twenty_secure_steps_of_lenet_equal_plain() {
    twenty_steps("lenet");
}

#[test]
fn twenty_secure_steps_of_xray_equal_plain() {
    twenty_steps("xray");
}

#[test]
fn the_gradient_of_a_step_is_that_of_the_float_twin() {
    gradients_agree(&network(MLP), 20, 0.01);
    gradients_agree(&network(CONV), 20, 0.01);
    // Polynomials read few fraction bits of their input, and these gradients are small beside the
    // error of the softmax.
    gradients_agree(&smooth("[0.1, 0.5, 0.25]"), 18, 0.05);
    gradients_agree(&smooth("[0.1, 0.5, 0.25, -0.0625]"), 18, 0.05);
    gradients_agree(&smooth("[0.1, 0.5, 0.25, 0.03, -0.01]"), 18, 0.05);
}

#[test]
fn momentum_and_the_learning_rate_schedule_follow_the_float_twin() {
    let seed = seed();
    let network = network(MLP);
    let spec = TrainSpec {
        batch: 16,
        epochs: 3,
        learning_rate: 0.05,
        momentum: 0.9,
        schedule: LrSchedule::Step {
            every_epochs: 1,
            factor: 0.5,
        },
        frac_bits: 20,
        ..TrainSpec::default()
    };
    let train = synthetic(&network, 2 * spec.batch, 0.5, seed);
    let mut tables = Tables::new();
    train.tables("train", spec.frac_bits, &mut tables);
    let schedule = schedule(&train_job(&network, &spec, train.rows(), 0)).expect("valid");
    let fixed = plain(&schedule, &tables, None, seed);
    let images = ArrayView2::from_shape((train.rows(), train.row), &train.images).expect("rows");
    let model = float::train(
        &network,
        &spec,
        Data {
            images,
            labels: &train.labels,
        },
        &schedule,
        |_, _| {},
    )
    .expect("trains");
    let before = Model::initial(&network, &spec).expect("valid");
    let fixed =
        Model::from_weights(&network, &fixed.state, u32::from(spec.frac_bits)).expect("fits");
    for at in 0..network.layers.len() {
        let weights =
            [&before, &fixed, &model].map(|model| model.parameters[at].as_ref().map(|p| &p.weight));
        let [Some(before), Some(fixed), Some(float)] = weights else {
            continue;
        };
        let norm = |x: ndarray::Array2<f32>| x.mapv(|x| x * x).sum().sqrt();
        let (moved, apart) = (norm(float - before), norm(float - fixed));
        println!("{}: moved {moved}, apart {apart}", network.layers[at].name);
        assert!(
            apart <= 0.01 * moved,
            "{}: moved {moved}, apart {apart}",
            network.layers[at].name
        );
    }
}

/// Plain fixed point and float, same order: both must learn, and give about the same answers.
fn learns(network: &Network, spec: &TrainSpec, at_least: f64) {
    let seed = seed();
    let train = synthetic(network, 320, 1.0, seed);
    let test = synthetic(network, 200, 1.0, seed + 1);
    let mut tables = Tables::new();
    train.tables("train", spec.frac_bits, &mut tables);
    test.tables("test", spec.frac_bits, &mut tables);
    let schedule = schedule(&train_job(network, spec, train.rows(), test.rows())).expect("valid");
    let run = plain(&schedule, &tables, None, seed);
    let accuracies: Vec<f64> = run
        .outputs
        .iter()
        .filter(|outputs| outputs.contains_key("confusion"))
        .map(|outputs| outcome::confusion(outputs).expect("square"))
        .map(|counts| counts.diag().sum() as f64 / counts.sum() as f64)
        .collect();
    let view = |images| ArrayView2::from_shape((test.rows(), test.row), images).expect("rows");
    let data = Data {
        images: ArrayView2::from_shape((train.rows(), train.row), &train.images).expect("rows"),
        labels: &train.labels,
    };
    let mut losses = Vec::new();
    let model = float::train(network, spec, data, &schedule, |report, _| {
        losses.push(report.loss)
    })
    .expect("trains");
    let guesses = float::predictions(&model.logits(view(&test.images)).expect("fits"));
    let right = guesses
        .iter()
        .zip(&test.labels)
        .filter(|(a, b)| a == b)
        .count();
    let float_accuracy = right as f64 / test.rows() as f64;
    println!(
        "{}: plain {accuracies:?}, float {float_accuracy}, float losses {losses:?}",
        network.name
    );
    let last = accuracies[accuracies.len() - 1];
    assert!(last >= at_least, "{}: plain reaches {last}", network.name);
    assert!(
        (last - float_accuracy).abs() <= 0.05,
        "{}: plain {last}, float {float_accuracy}",
        network.name
    );
    assert!(losses[losses.len() - 1] < losses[0]);
}

#[test]
fn plain_training_learns_as_well_as_float() {
    let spec = TrainSpec {
        batch: 16,
        epochs: 6,
        learning_rate: 0.125,
        ..TrainSpec::default()
    };
    learns(&network(MLP), &spec, 0.9);
    learns(
        &network(CONV),
        &TrainSpec {
            learning_rate: 0.01,
            momentum: 0.9,
            ..spec.clone()
        },
        0.9,
    );
    learns(
        &smooth("[0.0, 0.5, 0.25]"),
        &TrainSpec {
            learning_rate: 0.1,
            epochs: 20,
            ..spec
        },
        0.6,
    );
}

#[test]
fn a_job_out_of_range_is_refused_by_its_field() {
    let network = network(MLP);
    let refused = |spec: TrainSpec, rows: usize, field: &str| {
        let error = schedule(&train_job(&network, &spec, rows, 0))
            .expect_err(field)
            .to_string();
        assert!(error.contains(field), "{error:?} lacks {field:?}");
    };
    let spec = TrainSpec::default;
    refused(TrainSpec { batch: 0, ..spec() }, 500, "batch");
    refused(spec(), 127, "dataset.train_rows");
    refused(
        TrainSpec {
            epochs: 0,
            ..spec()
        },
        500,
        "epochs",
    );
    refused(
        TrainSpec {
            learning_rate: f64::NAN,
            ..spec()
        },
        500,
        "learning_rate",
    );
    refused(
        TrainSpec {
            momentum: 1.0,
            ..spec()
        },
        500,
        "momentum",
    );
    refused(
        TrainSpec {
            ring_bits: 32,
            ..spec()
        },
        500,
        "ring_bits",
    );
    refused(
        TrainSpec {
            frac_bits: 30,
            ..spec()
        },
        500,
        "frac_bits",
    );
    refused(
        TrainSpec {
            learning_rate: 1e-9,
            batch: 4096,
            ..spec()
        },
        5000,
        "learning rate",
    );
}

#[test]
fn a_bounded_run_is_the_first_steps_of_the_whole_one() {
    let seed = seed();
    let network = network(MLP);
    let spec = TrainSpec {
        batch: 8,
        epochs: 3,
        schedule: LrSchedule::Cosine { end_factor: 0.1 },
        ..TrainSpec::default()
    };
    let train = synthetic(&network, 2 * spec.batch, 0.5, seed);
    let mut tables = Tables::new();
    train.tables("train", spec.frac_bits, &mut tables);
    train.tables("test", spec.frac_bits, &mut tables);
    let scheduled = |max_steps, test_rows| {
        let spec = TrainSpec {
            max_steps,
            ..spec.clone()
        };
        schedule(&train_job(&network, &spec, train.rows(), test_rows)).expect("valid")
    };
    let whole = scheduled(None, 0);
    let mut run = PlainSession::new(&whole, &tables, None, None).expect("starts");
    for (steps, epochs) in [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (6, 3)] {
        run.step().expect("a step").expect("in range");
        let bounded = scheduled(Some(steps), 0);
        assert_eq!(bounded.steps, whole.steps[..steps]);
        let state = plain(&bounded, &tables, None, seed).state;
        assert_eq!(state, run.state, "after {steps} steps");
        // Each epoch that has begun is judged, the last one where it ends.
        let judged = plain(&scheduled(Some(steps), 8), &tables, None, seed);
        let results = judged.outputs.iter().filter(|out| !out.is_empty());
        assert_eq!(results.count(), epochs);
    }
    assert_eq!(scheduled(Some(1000), 0).steps, whole.steps);
    let none = TrainSpec {
        max_steps: Some(0),
        ..spec.clone()
    };
    assert!(schedule(&train_job(&network, &none, train.rows(), 0)).is_err());
}
