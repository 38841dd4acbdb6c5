//! Losses and optimisers: a secure step equals the plain one bit for bit, and the plain one goes where
//! the float twin goes.

mod common;

use common::{assert_secure_equals_plain, plain, seed, synthetic, train_job};
use ndarray::ArrayView2;
use trefoil_models::float::{self, Data, Model};
use trefoil_models::job::{AdamSpec, Loss, LrSchedule, Optimiser, TrainSpec};
use trefoil_models::plain_run::Tables;
use trefoil_models::recipe::MAX_STAIRS;
use trefoil_models::{Network, schedule};
use trefoil_protocol::program::Rounding;

fn mlp(classes: usize) -> Network {
    let text = format!(
        "name = \"tiny\"\ninput = [1, 3, 5]\nclasses = {classes}\n[[layer]]\nkind = \"dense\"\nunits = 7\n\
         [[layer]]\nkind = \"relu\"\n[[layer]]\nkind = \"dense\"\n"
    );
    Network::parse(&text).expect("valid")
}

fn secure_equals_plain(network: &Network, spec: &TrainSpec) {
    let seed = seed();
    let train = synthetic(network, 2 * spec.batch + 1, 0.5, seed);
    let mut tables = Tables::new();
    train.tables("train", spec.frac_bits, &mut tables);
    let schedule = schedule(&train_job(network, spec, train.rows(), 0)).expect("valid");
    assert_secure_equals_plain(&schedule, &tables, None, seed);
}

/// How far training in the clear ends from the float twin, as a part of the way that the twin went;
/// the largest of all layers' weights and biases.
fn apart(network: &Network, fixed: &TrainSpec, float: &TrainSpec) -> f64 {
    let seed = seed();
    let train = synthetic(network, 2 * fixed.batch, 0.5, seed);
    let mut tables = Tables::new();
    train.tables("train", fixed.frac_bits, &mut tables);
    let schedule = schedule(&train_job(network, fixed, train.rows(), 0)).expect("valid");
    let run = plain(&schedule, &tables, None, seed);
    let images = ArrayView2::from_shape((train.rows(), train.row), &train.images).expect("rows");
    let data = Data {
        images,
        labels: &train.labels,
    };
    let twin = float::train(network, float, data, &schedule, |_, _| {}).expect("trains");
    let before = Model::initial(network, fixed).expect("valid");
    let after = Model::from_weights(network, &run.state, u32::from(fixed.frac_bits)).expect("fits");
    let mut worst: f64 = 0.0;
    for at in 0..network.layers.len() {
        let parts = [&before, &after, &twin].map(|model| model.parameters[at].as_ref());
        let [Some(before), Some(after), Some(twin)] = parts else {
            continue;
        };
        let norm = |x: ndarray::ArrayViewD<'_, f32>, y: ndarray::ArrayViewD<'_, f32>| {
            f64::from((&x - &y).mapv(|x| x * x).sum().sqrt())
        };
        for (before, after, twin) in [
            (
                before.weight.view().into_dyn(),
                after.weight.view().into_dyn(),
                twin.weight.view().into_dyn(),
            ),
            (
                before.bias.view().into_dyn(),
                after.bias.view().into_dyn(),
                twin.bias.view().into_dyn(),
            ),
        ] {
            let moved = norm(twin.view(), before);
            worst = worst.max(norm(twin, after) / moved);
        }
    }
    println!("{}: apart {worst:.5} of the way", network.name);
    worst
}

fn follows_float(network: &Network, spec: &TrainSpec) {
    let apart = apart(network, spec, spec);
    assert!(apart <= 0.02, "{apart} of the way: {}", spec.describe());
}

fn steep() -> TrainSpec {
    TrainSpec {
        batch: 16,
        epochs: 4,
        learning_rate: 0.05,
        frac_bits: 20,
        ..TrainSpec::default()
    }
}

fn nesterov() -> TrainSpec {
    TrainSpec {
        momentum: 0.9,
        nesterov: true,
        ..steep()
    }
}

fn decay() -> TrainSpec {
    TrainSpec {
        weight_decay: 0.01,
        ..steep()
    }
}

fn cosine() -> TrainSpec {
    TrainSpec {
        schedule: LrSchedule::Cosine { end_factor: 0.1 },
        ..steep()
    }
}

fn weighted(loss: Loss) -> TrainSpec {
    TrainSpec {
        loss,
        class_weights: vec![0.5, 2.0, 1.25],
        ..steep()
    }
}

fn adam(amsgrad: bool) -> TrainSpec {
    TrainSpec {
        learning_rate: 0.01,
        epochs: 8,
        optimiser: Optimiser::Adam(AdamSpec {
            amsgrad,
            ..AdamSpec::default()
        }),
        ..steep()
    }
}

#[test]
fn adam_follows_the_float_twin() {
    let network = mlp(3);
    for spec in [
        adam(false),
        adam(true),
        TrainSpec {
            frac_bits: 16,
            weight_decay: 0.01,
            gradient_scale_log2: 3,
            ..adam(false)
        },
    ] {
        let apart = apart(&network, &spec, &spec);
        assert!(apart <= 0.03, "{apart} of the way: {}", spec.describe());
    }
    // The measure tells the two apart where gradients shrink.
    let quick = |amsgrad| TrainSpec {
        optimiser: Optimiser::Adam(AdamSpec {
            beta2: 0.9,
            amsgrad,
            ..AdamSpec::default()
        }),
        epochs: 40,
        ..adam(amsgrad)
    };
    let apart = apart(&network, &quick(false), &quick(true));
    assert!(apart > 0.05, "{apart} of the way");
}

#[test]
fn secure_steps_of_adam_equal_plain_and_need_few_programs() {
    let network = mlp(3);
    for spec in [
        adam(true),
        TrainSpec {
            weight_decay: 0.01,
            rounding: Rounding::Stochastic,
            ..adam(false)
        },
    ] {
        let spec = TrainSpec {
            batch: 3,
            epochs: 2,
            frac_bits: 16,
            ..spec
        };
        secure_equals_plain(&network, &spec);
    }
    let long = TrainSpec {
        epochs: 500,
        schedule: LrSchedule::Cosine { end_factor: 0.1 },
        ..adam(false)
    };
    let plan = schedule(&train_job(&network, &long, 160, 0)).expect("valid");
    assert_eq!(plan.steps.len(), 5000);
    assert!(plan.programs.len() < 96, "{}", plan.programs.len());
}

#[test]
fn every_option_follows_the_float_twin() {
    let network = mlp(3);
    follows_float(&network, &nesterov());
    follows_float(&network, &decay());
    follows_float(
        &network,
        &TrainSpec {
            weight_decay: 0.003,
            ..nesterov()
        },
    );
    follows_float(&network, &cosine());
    for loss in [
        Loss::SoftmaxCrossEntropy,
        Loss::BinaryCrossEntropy,
        Loss::MeanSquaredError,
    ] {
        follows_float(&network, &TrainSpec { loss, ..steep() });
        follows_float(&network, &weighted(loss));
    }
    follows_float(
        &network,
        &TrainSpec {
            gradient_scale_log2: 6,
            frac_bits: 16,
            ..nesterov()
        },
    );
}

#[test]
fn an_option_that_is_left_out_is_seen_by_that_measure() {
    let network = mlp(3);
    for spec in [
        nesterov(),
        decay(),
        cosine(),
        weighted(Loss::SoftmaxCrossEntropy),
        weighted(Loss::BinaryCrossEntropy),
        weighted(Loss::MeanSquaredError),
    ] {
        let without = TrainSpec {
            momentum: spec.momentum,
            ..steep()
        };
        let apart = apart(&network, &without, &spec);
        assert!(apart > 0.025, "{apart} of the way: {}", spec.describe());
    }
}

#[test]
fn secure_steps_with_every_option_equal_plain() {
    let network = mlp(3);
    let small = |spec: TrainSpec| TrainSpec {
        batch: 3,
        epochs: 2,
        frac_bits: 16,
        ..spec
    };
    for spec in [
        TrainSpec {
            weight_decay: 0.003,
            ..nesterov()
        },
        decay(),
        cosine(),
        weighted(Loss::SoftmaxCrossEntropy),
        TrainSpec {
            gradient_scale_log2: 4,
            rounding: Rounding::Stochastic,
            ..weighted(Loss::BinaryCrossEntropy)
        },
        weighted(Loss::MeanSquaredError),
    ] {
        secure_equals_plain(&network, &small(spec.clone()));
        let narrow = TrainSpec {
            ring_bits: 48,
            frac_bits: 14,
            ..small(spec)
        };
        secure_equals_plain(&network, &narrow);
    }
}

#[test]
fn ten_to_twenty_four_fraction_bits_train() {
    let network = mlp(3);
    for frac_bits in [10, 12, 22, 24] {
        let spec = TrainSpec {
            batch: 4,
            epochs: 2,
            frac_bits,
            ..nesterov()
        };
        secure_equals_plain(&network, &spec);
    }
    let fine = TrainSpec {
        frac_bits: 24,
        learning_rate: 0.0625,
        momentum: 0.5,
        ..steep()
    };
    follows_float(&network, &fine);
}

#[test]
fn scaled_gradients_lose_less_of_small_gradients() {
    let network = mlp(3);
    // One large step: what is lost is the gradient's, not the update's.
    let coarse = TrainSpec {
        frac_bits: 12,
        epochs: 1,
        batch: 32,
        learning_rate: 4.0,
        rounding: Rounding::Floor,
        ..steep()
    };
    let scaled = TrainSpec {
        gradient_scale_log2: 8,
        ..coarse.clone()
    };
    let [without, with] = [coarse, scaled].map(|spec| apart(&network, &spec, &spec));
    assert!(1.5 * with < without, "{with} scaled, {without} as they are");
}

#[test]
fn a_cosine_falls_in_few_stairs_and_each_is_one_program() {
    let network = mlp(2);
    let spec = TrainSpec {
        batch: 2,
        epochs: 50,
        ..cosine()
    };
    let plan = schedule(&train_job(&network, &spec, 8, 0)).expect("valid");
    assert_eq!(plan.steps.len(), 200);
    assert_eq!(plan.programs.len(), MAX_STAIRS);
    let rates: Vec<f64> = (0..200).map(|step| spec.rate_at(step, 4)).collect();
    assert!(rates.is_sorted_by(|a, b| a >= b));
    let mean = rates.iter().sum::<f64>() / 200.0;
    // Half a cosine is as long above its middle as below.
    assert!((mean / (0.05 * 1.1 / 2.0) - 1.0).abs() < 0.02, "{mean}");
    assert!(rates[0] < 0.05 && rates[0] > 0.049, "{}", rates[0]);
    assert!(rates[199] > 0.005 && rates[199] < 0.0052, "{}", rates[199]);
    let hash = |program: usize| plan.programs[program].hash();
    assert_ne!(hash(plan.steps[0].program), hash(plan.steps[199].program));
    // A step at a time where there are fewer steps than stairs.
    let short = TrainSpec { epochs: 1, ..spec };
    let plan = schedule(&train_job(&network, &short, 8, 0)).expect("valid");
    assert_eq!(plan.programs.len(), 4);
}

#[test]
fn an_option_out_of_range_is_refused_by_its_field() {
    let network = mlp(3);
    let refused = |spec: TrainSpec, field: &str| {
        let error = schedule(&train_job(&network, &spec, 500, 0))
            .expect_err(field)
            .to_string();
        assert!(error.contains(field), "{error:?} lacks {field:?}");
    };
    let spec = TrainSpec::default;
    refused(
        TrainSpec {
            nesterov: true,
            ..spec()
        },
        "nesterov",
    );
    for weight_decay in [-0.1, 1e-9, f64::NAN, 0.7] {
        refused(
            TrainSpec {
                weight_decay,
                ..spec()
            },
            "weight_decay",
        );
    }
    for class_weights in [vec![1.0, 2.0], vec![1.0, 0.0, 1.0], vec![1.0, 65.0, 1.0]] {
        refused(
            TrainSpec {
                class_weights,
                ..spec()
            },
            "class_weights",
        );
    }
    refused(
        TrainSpec {
            gradient_scale_log2: 13,
            ..spec()
        },
        "gradient_scale_log2",
    );
    refused(
        TrainSpec {
            schedule: LrSchedule::Cosine { end_factor: 1.5 },
            ..spec()
        },
        "end_factor",
    );
    refused(
        TrainSpec {
            epochs: 1000,
            schedule: LrSchedule::Step {
                every_epochs: 1,
                factor: 0.999,
            },
            ..spec()
        },
        "every_epochs",
    );
    let narrow = TrainSpec {
        ring_bits: 48,
        frac_bits: 14,
        ..adam(false)
    };
    refused(narrow, "optimiser");
    let epsilon = Optimiser::Adam(AdamSpec {
        epsilon: 1e-8,
        ..AdamSpec::default()
    });
    refused(
        TrainSpec {
            optimiser: epsilon,
            ..spec()
        },
        "epsilon",
    );
    refused(
        TrainSpec {
            momentum: 0.9,
            ..adam(false)
        },
        "momentum",
    );
    refused(
        TrainSpec {
            frac_bits: 9,
            ..spec()
        },
        "frac_bits",
    );
}
