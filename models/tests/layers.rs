//! Layers beyond the plain chain: a secure run equals the plain one bit for bit, a step's gradient is
//! that of the float twin, and the twin's own is that of finite differences (`float.rs`).

mod common;

use std::collections::BTreeMap;

use common::{gradients_agree, plain, secure_equals_plain, seed, synthetic, train_job};
use ndarray::{ArrayView2, Axis};
use trefoil_models::float::{self, Data, Model};
use trefoil_models::job::{JobKind, PredictOutput, TrainSpec};
use trefoil_models::plain_run::Tables;
use trefoil_models::schedule::{Phase, Schedule, epoch_order, schedule};
use trefoil_models::{Network, outcome};
use trefoil_protocol::Tensor;
use trefoil_protocol::fixed::decode;

fn network(text: &str) -> Network {
    Network::parse(text).expect("valid")
}

fn spec() -> TrainSpec {
    TrainSpec {
        batch: 4,
        learning_rate: 0.125,
        ..TrainSpec::default()
    }
}

/// A skip around a pool and its ReLU, a value that is read three times, channels put together.
const GRAPH: &str = r#"
name = "tiny-graph"
input = [2, 6, 6]
classes = 3
[[layer]]
name = "stem"
kind = "conv"
filters = 3
kernel = 3
padding = "same"
[[layer]]
kind = "relu"
[[layer]]
name = "branch"
kind = "conv"
filters = 3
kernel = 1
[[layer]]
kind = "add"
name = "sum"
from = ["stem", "branch", "stem"]
[[layer]]
name = "left"
kind = "max_pool"
window = 2
[[layer]]
kind = "relu"
name = "a"
[[layer]]
kind = "avg_pool"
from = "sum"
name = "b"
window = 2
[[layer]]
kind = "avg_pool"
from = "images"
name = "c"
window = 2
[[layer]]
kind = "concat"
from = ["a", "b", "c"]
[[layer]]
kind = "global_avg_pool"
[[layer]]
kind = "flatten"
[[layer]]
kind = "dense"
"#;

#[test]
fn a_graph_of_layers_is_exact_and_its_gradient_is_that_of_the_float_twin() {
    let network = network(GRAPH);
    secure_equals_plain(&network, &spec());
    gradients_agree(&network, 20, 0.01);
}

/// Pools whose windows reach over the edges: of values that may be negative, behind and before a ReLU,
/// sides that differ, last windows that are cut, averages with zeros and without.
const BORDERS: &str = r#"
name = "tiny-borders"
input = [2, 7, 6]
classes = 3
[[layer]]
name = "stem"
kind = "conv"
filters = 3
kernel = 3
padding = "same"
[[layer]]
kind = "max_pool"
window = 3
stride = 2
padding = 1
[[layer]]
kind = "conv"
filters = 4
kernel = 2
[[layer]]
kind = "relu"
[[layer]]
name = "maxima"
kind = "max_pool"
window = 2
stride = 1
padding = [0, 1, 1, 1]
[[layer]]
from = "stem"
kind = "max_pool"
window = [3, 2]
stride = 2
padding = [1, 0]
ceil_mode = true
[[layer]]
name = "averages"
kind = "avg_pool"
window = 3
stride = 2
padding = 1
ceil_mode = true
[[layer]]
from = "stem"
kind = "avg_pool"
window = [3, 4]
stride = [2, 3]
padding = [1, 2]
count_include_pad = false
[[layer]]
kind = "flatten"
[[layer]]
name = "a"
kind = "dense"
units = 5
[[layer]]
name = "b"
kind = "dense"
from = "maxima"
units = 5
[[layer]]
name = "c"
kind = "dense"
from = "averages"
units = 5
[[layer]]
kind = "add"
from = ["a", "b", "c"]
[[layer]]
kind = "dense"
"#;

#[test]
fn pools_with_borders_are_exact_and_train_as_the_float_twin() {
    let network = network(BORDERS);
    secure_equals_plain(&network, &spec());
    let narrow = TrainSpec {
        frac_bits: 13,
        ring_bits: 48,
        ..spec()
    };
    secure_equals_plain(&network, &narrow);
    gradients_agree(&network, 20, 0.01);
}

/// The averages themselves, behind a dense layer that copies them.
#[test]
fn averages_at_a_border_are_within_their_stated_error() {
    const F: u8 = 20;
    let seed = seed();
    for (pool, places) in [
        ("window = 3\nstride = 2\npadding = 1", 16),
        (
            "window = 3\nstride = 2\npadding = 1\ncount_include_pad = false",
            16,
        ),
        (
            "window = [5, 3]\nstride = 2\npadding = [3, 1, 0, 2]\ncount_include_pad = false",
            16,
        ),
        ("window = 3\nstride = [3, 2]\nceil_mode = true", 9),
        (
            "window = 4\nstride = 3\npadding = [2, 1]\nceil_mode = true",
            12,
        ),
    ] {
        let network = network(&format!(
            "name = \"n\"\ninput = [1, 8, 7]\nclasses = {places}\n[[layer]]\nkind = \"avg_pool\"\n{pool}\n\
             [[layer]]\nkind = \"dense\"\n"
        ));
        let mut copies = Tensor::zeros(&[places, places]);
        let diagonal = copies.data_mut().iter_mut().step_by(places + 1);
        diagonal.for_each(|weight| *weight = 1 << F);
        let weights = BTreeMap::from([
            ("dense1.weight".to_string(), copies),
            ("dense1.bias".to_string(), Tensor::zeros(&[places])),
        ]);
        let test = synthetic(&network, 6, 0.5, seed);
        let mut tables = Tables::new();
        test.tables("upload", F, &mut tables);
        let job = JobKind::Predict {
            model: "m".into(),
            network: network.to_toml(),
            frac_bits: F,
            ring_bits: 64,
            rows: test.rows(),
            upload: "u".into(),
            output: PredictOutput::Logits,
        };
        let schedule = schedule(&job).expect("valid");
        let run = plain(&schedule, &tables, Some(&weights), seed);
        let found = outcome::rows(&run.outputs, "logits", test.rows(), 2 * u32::from(F));
        let twin = Model::from_weights(&network, &weights, F.into()).expect("fits");
        let images = ArrayView2::from_shape((test.rows(), test.row), &test.images).expect("rows");
        let expected = twin.logits(images).expect("fits");
        let mut largest = 0f64;
        for (found, expected) in found.expect("revealed").iter().zip(&expected) {
            let expected = f64::from(*expected);
            let allowed = (-10f64).exp2() * expected.abs() + 4.0 * (-f64::from(F)).exp2();
            assert!(
                (found - expected).abs() <= allowed,
                "{pool:?}: {found} beside {expected}"
            );
            largest = largest.max(expected.abs());
        }
        assert!(largest > 0.25, "{pool:?}: averages too small to tell");
    }
}

/// Groups, a depthwise convolution with a stride, dilation with padding.
const GROUPS: &str = r#"
name = "tiny-groups"
input = [2, 7, 6]
classes = 3
[[layer]]
kind = "conv"
filters = 4
kernel = 3
groups = 2
[[layer]]
kind = "relu"
[[layer]]
kind = "conv"
filters = 4
kernel = 3
groups = 4
stride = [2, 1]
padding = "same"
[[layer]]
kind = "conv"
filters = 3
kernel = [3, 2]
dilation = [1, 2]
padding = [1, 0]
[[layer]]
kind = "relu"
[[layer]]
kind = "dense"
"#;

#[test]
fn grouped_and_dilated_convolutions_are_exact_and_train_as_the_float_twin() {
    let network = network(GROUPS);
    secure_equals_plain(&network, &spec());
    gradients_agree(&network, 20, 0.01);
}

/// A residual block with normalisation: one folded into a convolution, one into a dense layer, one
/// behind a sum, where nothing can be folded.
const RESIDUAL: &str = r#"
name = "tiny-residual"
input = [2, 6, 6]
classes = 3
[[layer]]
name = "stem"
kind = "conv"
filters = 4
kernel = 3
padding = "same"
[[layer]]
kind = "batch_norm"
[[layer]]
name = "skip"
kind = "relu"
[[layer]]
kind = "conv"
filters = 4
kernel = 3
padding = "same"
[[layer]]
kind = "batch_norm"
[[layer]]
kind = "relu"
[[layer]]
kind = "conv"
filters = 4
kernel = 3
padding = "same"
[[layer]]
name = "block"
kind = "batch_norm"
momentum = 0.5
[[layer]]
kind = "add"
from = ["block", "skip"]
[[layer]]
kind = "batch_norm"
[[layer]]
kind = "relu"
[[layer]]
kind = "global_avg_pool"
[[layer]]
kind = "dense"
units = 5
[[layer]]
kind = "batch_norm"
[[layer]]
kind = "relu"
[[layer]]
kind = "dense"
"#;

#[test]
fn a_residual_network_with_normalisation_is_exact() {
    secure_equals_plain(&network(RESIDUAL), &spec());
    let narrow = TrainSpec {
        frac_bits: 13,
        ring_bits: 48,
        momentum: 0.5,
        ..spec()
    };
    secure_equals_plain(&network(RESIDUAL), &narrow);
}

#[test]
fn the_gradient_of_a_normalised_network_is_that_of_the_float_twin() {
    gradients_agree(&network(RESIDUAL), 20, 0.02);
    gradients_agree(&network(RESIDUAL), 16, 0.03);
}

/// After some steps the running statistics are those of the float twin, and the set-up's folded weights
/// predict as the twin does, which folds nothing.
#[test]
fn running_statistics_and_folded_weights_follow_the_float_twin() {
    let seed = seed();
    let network = network(RESIDUAL);
    let spec = TrainSpec {
        batch: 32,
        epochs: 2,
        learning_rate: 0.0625,
        ..TrainSpec::default()
    };
    let train = synthetic(&network, 6 * spec.batch, 0.5, seed);
    let test = synthetic(&network, 96, 0.5, seed + 1);
    let mut tables = Tables::new();
    train.tables("train", spec.frac_bits, &mut tables);
    test.tables("test", spec.frac_bits, &mut tables);
    let job = train_job(&network, &spec, train.rows(), test.rows());
    let schedule = schedule(&job).expect("valid");
    let fixed = plain(&schedule, &tables, None, seed);
    let view = |rows: &'_ common::Synthetic| {
        let shape = (rows.rows(), rows.row);
        ArrayView2::from_shape(shape, &rows.images)
            .expect("rows")
            .to_owned()
    };
    let (images, unseen) = (view(&train), view(&test));
    let mut model = Model::initial(&network, &spec).expect("valid");
    for epoch in 0..spec.epochs {
        for rows in epoch_order(spec.seed, epoch, train.rows()).chunks_exact(spec.batch) {
            let rows: Vec<usize> = rows.iter().map(|row| *row as usize).collect();
            let batch = images.select(Axis(0), &rows);
            let labels: Vec<u8> = rows.iter().map(|row| train.labels[*row]).collect();
            let data = Data {
                images: batch.view(),
                labels: &labels,
            };
            let gradients = model.gradients(data).expect("valid");
            model.update(&gradients, &spec, spec.learning_rate);
        }
    }
    for (at, layer) in network
        .layers
        .iter()
        .enumerate()
        .filter(|(_, layer)| layer.is_norm())
    {
        let twin = model.statistics[at]
            .as_ref()
            .expect("a normalisation has statistics");
        for (name, twin) in [
            (layer.mean_name(), &twin.mean),
            (layer.variance_name(), &twin.variance),
        ] {
            for (word, twin) in fixed.state[&name].data().iter().zip(twin) {
                let own = decode(*word, 18);
                let twin = f64::from(*twin);
                assert!(
                    (own - twin).abs() < 0.01 + 0.02 * twin.abs(),
                    "{name}: {own} beside {twin}"
                );
            }
        }
    }
    let logits = model.logits(unseen.view()).expect("valid");
    let right = |(row, label): (ndarray::ArrayView1<'_, f32>, &u8)| {
        let best = (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b]));
        best == Some(usize::from(*label))
    };
    let twin = logits
        .rows()
        .into_iter()
        .zip(&test.labels)
        .filter(|pair| right((pair.0, pair.1)))
        .count();
    let last = schedule.steps.len() - 1;
    assert!(matches!(schedule.steps[last].phase, Phase::Result { .. }));
    let counts = outcome::confusion(&fixed.outputs[last]).expect("revealed");
    let own = counts.diag().sum() as usize;
    // By chance 32 of 96.
    println!("right of {}: fixed point {own}, twin {twin}", test.rows());
    assert!(own > 40 && own.abs_diff(twin) <= 4, "{own}, {twin}");
}

/// ReLU6 before and behind a convolution, leaky ReLU with a slope that is no power of two, wide values.
const GATES: &str = r#"
name = "tiny-gates"
input = [1, 5, 5]
classes = 3
[[layer]]
kind = "relu6"
[[layer]]
kind = "conv"
filters = 3
kernel = 3
[[layer]]
kind = "batch_norm"
[[layer]]
kind = "leaky_relu"
slope = 0.01
[[layer]]
kind = "dense"
units = 6
[[layer]]
kind = "relu6"
[[layer]]
kind = "leaky_relu"
[[layer]]
kind = "dense"
"#;

#[test]
fn relu6_and_leaky_relu_are_exact_and_train_as_the_float_twin() {
    secure_equals_plain(&network(GATES), &spec());
    let narrow = TrainSpec {
        frac_bits: 13,
        ring_bits: 48,
        ..spec()
    };
    secure_equals_plain(&network(GATES), &narrow);
    gradients_agree(&network(GATES), 20, 0.02);
}

/// Every curve, behind a convolution (2f fraction bits), another curve, a pool and a normalisation.
const SMOOTH: &str = r#"
name = "tiny-smooth"
input = [1, 5, 5]
classes = 3
[[layer]]
kind = "silu"
[[layer]]
kind = "conv"
filters = 3
kernel = 3
[[layer]]
kind = "gelu"
[[layer]]
kind = "max_pool"
window = 2
stride = 1
[[layer]]
kind = "tanh"
[[layer]]
kind = "batch_norm"
[[layer]]
kind = "silu"
[[layer]]
kind = "dense"
units = 6
[[layer]]
kind = "sigmoid"
[[layer]]
kind = "dense"
"#;

#[test]
fn smooth_activations_are_exact_and_train_as_the_float_twin() {
    for (frac_bits, ring_bits) in [(16, 64), (10, 64), (24, 64), (13, 48)] {
        let spec = TrainSpec {
            frac_bits,
            ring_bits,
            ..spec()
        };
        secure_equals_plain(&network(SMOOTH), &spec);
    }
    gradients_agree(&network(SMOOTH), 20, 0.03);
    gradients_agree(&network(SMOOTH), 16, 0.03);
}

/// Approximate ReLU of every degree, fixed and learnt, behind a convolution and behind a dense layer.
const APPROXIMATE: &str = r#"
name = "tiny-approximate"
input = [1, 5, 5]
classes = 3
[[layer]]
kind = "approx_relu"
degree = 2
learnable = true
[[layer]]
kind = "conv"
filters = 3
kernel = 3
[[layer]]
kind = "approx_relu"
degree = 2
fit = "minimax"
interval = [-3, 5]
[[layer]]
kind = "avg_pool"
window = 2
stride = 1
[[layer]]
kind = "approx_relu"
degree = 4
learnable = true
[[layer]]
kind = "dense"
units = 6
[[layer]]
kind = "approx_relu"
degree = 3
interval = [-2.5, 4]
learnable = true
[[layer]]
kind = "approx_relu"
degree = 4
[[layer]]
kind = "dense"
"#;

#[test]
fn approximate_relus_are_exact_and_train_as_the_float_twin() {
    for (frac_bits, ring_bits) in [(16, 64), (10, 64), (24, 64), (13, 48)] {
        let spec = TrainSpec {
            frac_bits,
            ring_bits,
            ..spec()
        };
        secure_equals_plain(&network(APPROXIMATE), &spec);
    }
    gradients_agree(&network(APPROXIMATE), 20, 0.02);
    gradients_agree(&network(APPROXIMATE), 16, 0.02);
}

/// Dropout behind a ReLU with a factor that adds fraction bits (it moves before), behind a flatten, and
/// with a factor of 2.
const DROPOUT: &str = r#"
name = "tiny-dropout"
input = [1, 6, 6]
classes = 3
[[layer]]
kind = "conv"
filters = 4
kernel = 3
[[layer]]
kind = "relu"
[[layer]]
kind = "dropout"
rate = 0.3
[[layer]]
kind = "flatten"
[[layer]]
kind = "dropout"
rate = 0.1
[[layer]]
kind = "dense"
units = 16
[[layer]]
kind = "relu"
[[layer]]
kind = "dropout"
rate = 0.5
[[layer]]
kind = "dense"
[[layer]]
kind = "softmax"
"#;

#[test]
fn dropout_is_exact_and_drops_what_the_float_twin_drops() {
    let seed = seed();
    let network = network(DROPOUT);
    for (frac_bits, ring_bits) in [(16, 64), (13, 48)] {
        let spec = TrainSpec {
            frac_bits,
            ring_bits,
            ..spec()
        };
        secure_equals_plain(&network, &spec);
    }
    gradients_agree(&network, 20, 0.01);
    // Two epochs with an evaluation between them, whose steps count too: other masks would lead
    // elsewhere.
    let spec = TrainSpec {
        batch: 16,
        epochs: 2,
        frac_bits: 20,
        ..spec()
    };
    let train = synthetic(&network, 3 * spec.batch, 0.5, seed);
    let test = synthetic(&network, 5, 0.5, seed + 1);
    let mut tables = Tables::new();
    train.tables("train", spec.frac_bits, &mut tables);
    test.tables("test", spec.frac_bits, &mut tables);
    let steps = |test_rows: usize| {
        let job = train_job(&network, &spec, train.rows(), test_rows);
        schedule(&job).expect("valid")
    };
    let evaluated = steps(test.rows());
    let fixed = plain(&evaluated, &tables, None, seed);
    let fixed = Model::from_weights(&network, &fixed.state, 20).expect("fits");
    let before = Model::initial(&network, &spec).expect("valid");
    let data = Data {
        images: ArrayView2::from_shape((train.rows(), train.row), &train.images).expect("rows"),
        labels: &train.labels,
    };
    let apart = |steps: &Schedule| {
        let twin = float::train(&network, &spec, data, steps, |_, _| {});
        let twin = twin.expect("trains");
        let distance = |a: &Model, b: &Model| {
            let layers = a.parameters.iter().zip(&b.parameters);
            let parts = layers.filter_map(|(a, b)| Some(&a.as_ref()?.weight - &b.as_ref()?.weight));
            parts.map(|d| d.mapv(|d| d * d).sum()).sum::<f32>().sqrt()
        };
        distance(&twin, &fixed) / distance(&twin, &before)
    };
    let (own, other) = (apart(&evaluated), apart(&steps(0)));
    println!("apart by {own} of the way, with other masks in the second epoch {other}");
    assert!(own < 0.01 && other > 0.1, "{own}, {other}");
}
