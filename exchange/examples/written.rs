//! Writes shipped networks, and one with every kind of layer, as ONNX models with weights of a fixed seed,
//! and beside each the logits of the floating-point twin, for `scripts/check-onnx.py`:
//!
//! ```sh
//! cargo run -p trefoil-exchange --example written -- FOLDER
//! ```

use std::error::Error;
use std::path::PathBuf;

use ndarray::{Array2, ArrayD};
use trefoil_exchange::{Weights, onnx};
use trefoil_models::float::Model;
use trefoil_models::network::Network;
use trefoil_models::weights;
use trefoil_protocol::fixed::decode;

const FRAC_BITS: u32 = 24;
const ROWS: usize = 3;

const ALL: &str = r#"
name = "all"
input = [2, 12, 12]
classes = 3
[[layer]]
kind = "conv"
filters = 4
kernel = [3, 2]
stride = [1, 2]
padding = [1, 0]
groups = 2
[[layer]]
kind = "batch_norm"
[[layer]]
name = "a"
kind = "relu"
[[layer]]
kind = "conv"
filters = 4
kernel = 3
dilation = 2
padding = 2
[[layer]]
name = "b"
kind = "leaky_relu"
slope = 0.01
[[layer]]
kind = "add"
from = ["a", "b", "a"]
[[layer]]
name = "c"
kind = "relu6"
[[layer]]
kind = "silu"
from = "a"
[[layer]]
kind = "gelu"
[[layer]]
kind = "tanh"
[[layer]]
name = "d"
kind = "sigmoid"
[[layer]]
kind = "concat"
from = ["c", "d"]
[[layer]]
kind = "max_pool"
window = 2
[[layer]]
kind = "avg_pool"
window = [2, 1]
stride = 1
[[layer]]
kind = "approx_relu"
degree = 2
learnable = true
[[layer]]
kind = "conv"
filters = 6
kernel = 1
[[layer]]
kind = "square"
[[layer]]
kind = "poly"
coefficients = [0.5, 0.25, -0.125, 0.0625]
[[layer]]
kind = "global_avg_pool"
[[layer]]
kind = "flatten"
[[layer]]
kind = "dropout"
rate = 0.25
[[layer]]
kind = "dense"
units = 5
[[layer]]
kind = "approx_relu"
degree = 3
learnable = true
[[layer]]
kind = "dense"
[[layer]]
kind = "log_softmax"
"#;

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).ok_or("names no folder")?;
    let folder = PathBuf::from(folder);
    std::fs::create_dir_all(&folder)?;
    let mut networks = vec![Network::parse(ALL)?];
    for name in Network::shipped() {
        networks.push(Network::builtin(name)?);
    }
    for network in networks {
        let kept = network.kept();
        let values = kept
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>());
        if values.sum::<usize>() > 1 << 20 {
            continue;
        }
        let words = weights::initial(&network, 1, FRAC_BITS);
        let mut reals = Weights::new();
        for (name, tensor) in &words {
            let bits = u32::from(network.kept_frac_bits(name, FRAC_BITS as u8));
            let values = tensor.data().iter().map(|word| decode(*word, bits));
            let array = ArrayD::from_shape_vec(tensor.shape(), values.collect())?;
            reals.insert(name.clone(), array);
        }
        let images = Array2::from_shape_fn((ROWS, network.input_len()), |(row, at)| {
            ((row * 31 + at * 7) % 41) as f32 / 20.0 - 1.0
        });
        let logits = Model::from_weights(&network, &words, FRAC_BITS)?.logits(images.view())?;
        let rows = |array: &Array2<f32>| -> Vec<Vec<f32>> {
            array.rows().into_iter().map(|row| row.to_vec()).collect()
        };
        let recorded = serde_json::json!({
            "shape": network.input,
            "images": rows(&images),
            "logits": rows(&logits),
        });
        let path = folder.join(format!("{}.onnx", network.name));
        std::fs::write(&path, onnx::write(&network, &reals)?)?;
        std::fs::write(path.with_extension("json"), recorded.to_string())?;
        println!("{}", path.display());
    }
    Ok(())
}
