//! Layers beyond the plain chain: a secure run equals the plain one bit for bit, a step's gradient is
//! that of the float twin, and the twin's own is that of finite differences (`float.rs`).

mod common;

use common::{gradients_agree, secure_equals_plain};
use trefoil_models::Network;
use trefoil_models::job::TrainSpec;

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
