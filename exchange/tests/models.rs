//! Models of real exporters and in their forms (`scripts/make-torch-models.py` and `make-onnx-models.py`
//! made them): the floating-point twin gives the logits that PyTorch or onnxruntime gave, out and in again
//! changes nothing, and a broken file is an error.

use std::collections::BTreeMap;
use std::path::PathBuf;

use ndarray::Array2;
use serde::Deserialize;
use trefoil_exchange::onnx::{self, Understood};
use trefoil_exchange::{Weights, tensors};
use trefoil_models::float::Model;
use trefoil_models::job::{JobKind, PredictOutput};
use trefoil_models::network::Network;
use trefoil_models::plain_run::{self, Table, Tables};
use trefoil_models::{outcome, schedule};
use trefoil_protocol::Tensor;
use trefoil_protocol::fixed::encode;

/// Enough that rounding the weights is not seen.
const FRAC_BITS: u32 = 24;

#[derive(Deserialize)]
struct Recorded {
    shape: Vec<usize>,
    images: Vec<Vec<f32>>,
    logits: Vec<Vec<f32>>,
}

const FILES: [&str; 35] = [
    "torch-lenet",
    "torch-resnet",
    "torch-mobile",
    "forms",
    "pools",
    "binary",
    "keras-cnn",
    "keras-mobile",
    "torch/script-lenet-view",
    "torch/script-lenet-flatten",
    "torch/script-lenet-reshape",
    "torch/script-lenet-named",
    "torch/script-resnet",
    "torch/script-resnet-norms",
    "torch/script-mobile",
    "torch/script-mobile-clamp",
    "torch/script-dense",
    "torch/script-dense-folded",
    "torch/script-smooth",
    "torch/script-smooth-11",
    "torch/script-leaky",
    "torch/script-rows",
    "torch/script-words",
    "torch/dynamo-lenet-view",
    "torch/dynamo-lenet-reshape",
    "torch/dynamo-resnet",
    "torch/dynamo-resnet-norms",
    "torch/dynamo-mobile",
    "torch/dynamo-mobile-clamp",
    "torch/dynamo-dense",
    "torch/dynamo-smooth",
    "torch/dynamo-smooth-18",
    "torch/dynamo-leaky",
    "torch/dynamo-rows",
    "torch/dynamo-words",
];

/// What a file leaves open.
fn input(name: &str) -> Option<[usize; 3]> {
    (name == "binary").then_some([1, 8, 8])
}

fn file(name: &str, ending: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/files");
    let path = folder.join(format!("{name}.{ending}"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn recorded(name: &str) -> Recorded {
    serde_json::from_slice(&file(name, "json")).expect("it is JSON")
}

/// The model of a file, with the weights that lie beside it.
fn understood(name: &str) -> Understood {
    let beside = |data: &str| {
        let model = data.strip_suffix(".onnx.data").ok_or("another name")?;
        assert!(name.ends_with(model), "{data} beside {name}");
        Ok(file(name, "onnx.data"))
    };
    onnx::read_with(&file(name, "onnx"), &beside, input(name))
        .unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn fixed(network: &Network, weights: &Weights, frac_bits: u32) -> BTreeMap<String, Tensor> {
    weights
        .iter()
        .map(|(name, array)| {
            let bits = network.kept_frac_bits(name, frac_bits as u8);
            let words = array.iter().map(|value| encode(*value, u32::from(bits)));
            (
                name.clone(),
                Tensor::new(array.shape().to_vec(), words.collect()),
            )
        })
        .collect()
}

/// The recorded images as the network reads them: channels first.
fn images(recorded: &Recorded, network: &Network) -> Array2<f32> {
    let [c, h, w] = network.input;
    let last = recorded.shape == [h, w, c];
    let row = |row: &Vec<f32>| -> Vec<f32> {
        let at = |i: usize| match last {
            true => row[i % (h * w) * c + i / (h * w)],
            false => row[i],
        };
        (0..c * h * w).map(at).collect()
    };
    let values: Vec<f32> = recorded.images.iter().flat_map(row).collect();
    Array2::from_shape_vec((recorded.images.len(), c * h * w), values).expect("the rows are whole")
}

fn logits(model: &Understood, images: &Array2<f32>) -> Array2<f32> {
    let weights = fixed(&model.network, &model.weights, FRAC_BITS);
    let twin = Model::from_weights(&model.network, &weights, FRAC_BITS).expect("the weights fit");
    twin.logits(images.view()).expect("the images fit")
}

/// The largest difference; one recorded logit z stands for 0 and z.
fn difference(found: &Array2<f32>, recorded: &Recorded) -> f32 {
    let mut largest = 0f32;
    for (found, recorded) in found.rows().into_iter().zip(&recorded.logits) {
        let recorded = match recorded.as_slice() {
            [z] => vec![0.0, *z],
            several => several.to_vec(),
        };
        assert_eq!(found.len(), recorded.len());
        for (a, b) in found.iter().zip(recorded) {
            largest = largest.max((a - b).abs());
        }
    }
    largest
}

#[test]
fn the_twin_of_an_imported_model_gives_the_logits_of_pytorch_or_onnxruntime() {
    for name in FILES {
        let (model, recorded) = (understood(name), recorded(name));
        let found = logits(&model, &images(&recorded, &model.network));
        let difference = difference(&found, &recorded);
        println!(
            "{name}: {difference}, {:?}\n{}",
            model.notes,
            model.network.to_toml()
        );
        assert!(difference < 1e-4, "{name}: {difference}");
        let spread = recorded
            .logits
            .iter()
            .flatten()
            .fold(0f32, |a, b| a.max(b.abs()));
        assert!(spread > 0.05, "{name}: logits too small to tell");
        // The network file is the network.
        assert_eq!(
            Network::parse(&model.network.to_toml()).expect("a network file"),
            model.network
        );
        let kept: Vec<String> = model
            .network
            .kept()
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        assert_eq!(kept.len(), model.weights.len());
        assert!(
            kept.iter().all(|name| model.weights.contains_key(name)),
            "{kept:?}"
        );
    }
}

#[test]
fn predictions_in_fixed_point_are_near_the_logits_of_pytorch_or_onnxruntime() {
    const F: u32 = 16;
    for name in FILES {
        let (model, recorded) = (understood(name), recorded(name));
        let images = images(&recorded, &model.network);
        let job = JobKind::Predict {
            model: "m".into(),
            network: model.network.to_toml(),
            frac_bits: F as u8,
            ring_bits: 64,
            rows: images.nrows(),
            upload: "u".into(),
            output: PredictOutput::Logits,
        };
        let plan = schedule(&job).expect("a job");
        let table = Table {
            row_words: images.ncols(),
            words: images.iter().map(|x| encode(f64::from(*x), F)).collect(),
        };
        let tables = Tables::from([("upload/images".to_owned(), table)]);
        let weights = fixed(&model.network, &model.weights, F);
        let run = plain_run::run(&plan, &tables, Some(&weights), None, |_, _, _| {})
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let found = outcome::rows(&run.outputs, "logits", images.nrows(), 2 * F).expect("revealed");
        let difference = difference(&found.mapv(|value| value as f32), &recorded);
        println!("{name}: {difference}");
        // A few units of 2^-16 for each layer. A normalisation's inverse square root is within 2^-12 of
        // its value, so that the error grows with the values: "torch-resnet" has a channel whose
        // variance is a thousandth of the others'.
        let recorded = recorded.logits.iter().flatten();
        let largest = recorded.fold(0f32, |a, b| a.max(b.abs()));
        assert!(
            difference < 2e-3 * largest.max(1.0),
            "{name}: {difference} of {largest}"
        );
    }
}

#[test]
fn a_model_that_goes_out_and_in_again_is_the_same() {
    for name in FILES {
        let (model, recorded) = (understood(name), recorded(name));
        let out = onnx::write(&model.network, &model.weights).expect("it is written");
        let again = onnx::read(&out, None).unwrap_or_else(|error| panic!("{name}: {error}"));
        let images = images(&recorded, &model.network);
        let pair = (logits(&model, &images), logits(&again, &images));
        let difference = (&pair.0 - &pair.1).iter().fold(0f32, |a, b| a.max(b.abs()));
        assert!(difference < 1e-4, "{name}: {difference}");
        let kinds = |network: &Network| -> Vec<String> {
            network
                .layers
                .iter()
                .map(|layer| format!("{:?}", layer.kind))
                .collect()
        };
        let flatten = |kinds: Vec<String>| {
            kinds
                .into_iter()
                .filter(|k| k != "Flatten")
                .collect::<Vec<_>>()
        };
        assert_eq!(
            flatten(kinds(&model.network)),
            flatten(kinds(&again.network)),
            "{name}"
        );
        // Safetensors: floats of 32 bits.
        let narrow = |weights: &Weights| -> Weights {
            weights
                .iter()
                .map(|(n, a)| (n.clone(), a.mapv(|v| f64::from(v as f32))))
                .collect()
        };
        let file = tensors::write(&model.weights).expect("they are written");
        assert_eq!(
            tensors::read(&file).expect("they are read"),
            narrow(&model.weights)
        );
    }
}

#[test]
fn shipped_networks_and_one_with_dropout_and_softmax_go_out() {
    let ended = "name = \"ended\"\ninput = [1, 3, 3]\nclasses = 3\n\
        [[layer]]\nkind = \"dropout\"\nrate = 0.25\n[[layer]]\nkind = \"dense\"\n\
        [[layer]]\nkind = \"softmax\"\n";
    let shipped = Network::shipped().map(|name| Network::builtin(name).expect("shipped"));
    for network in shipped.chain([Network::parse(ended).expect("valid")]) {
        let name = &network.name;
        if network
            .kept()
            .iter()
            .map(|(_, s)| s.iter().product::<usize>())
            .sum::<usize>()
            > 1 << 20
        {
            continue;
        }
        let words = trefoil_models::weights::initial(&network, 1, FRAC_BITS);
        let weights: Weights = words
            .iter()
            .map(|(name, tensor)| {
                let bits = u32::from(network.kept_frac_bits(name, FRAC_BITS as u8));
                let values = tensor
                    .data()
                    .iter()
                    .map(|word| trefoil_protocol::fixed::decode(*word, bits));
                let values: Vec<f64> = values.collect();
                (
                    name.clone(),
                    ndarray::ArrayD::from_shape_vec(tensor.shape(), values).expect("its shape"),
                )
            })
            .collect();
        let out = onnx::write(&network, &weights).unwrap_or_else(|error| panic!("{name}: {error}"));
        let again = onnx::read(&out, None).unwrap_or_else(|error| panic!("{name}: {error}"));
        let model = Understood {
            network: network.clone(),
            weights,
            notes: vec![],
        };
        let images = Array2::from_shape_fn((2, network.input_len()), |(row, at)| {
            ((row + at) % 7) as f32 / 7.0
        });
        let difference = (logits(&model, &images) - logits(&again, &images))
            .iter()
            .fold(0f32, |a, b| a.max(b.abs()));
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

#[test]
fn broken_files_are_errors_and_never_a_panic() {
    // A small generator of its own: the same places every time.
    let mut seed = 0x1234_5678_9abc_def1u64;
    let mut random = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % below as u64) as usize
    };
    let mut refused = 0;
    for name in FILES {
        let (whole, input) = (file(name, "onnx"), input(name));
        for _ in 0..150 {
            let length = random(whole.len());
            refused += usize::from(onnx::read(&whole[..length], input).is_err());
            let mut changed = whole.clone();
            for _ in 0..1 + random(4) {
                let at = random(changed.len());
                changed[at] ^= 1 << random(8);
            }
            // Whether it still is a model depends on where; nothing but an answer is asked for.
            let _ = onnx::read(&changed, input);
        }
    }
    assert!(refused > 5000, "{refused} of 5100 cut files refused");
    // A megabyte of messages without content, which would take a hundred in memory.
    let mut graph = vec![];
    for _ in 0..1 << 21 {
        graph.extend([0x0a, 0]);
    }
    let mut bomb = vec![0x3a];
    let mut length = graph.len();
    while length > 127 {
        bomb.push((length & 127) as u8 | 128);
        length >>= 7;
    }
    bomb.push(length as u8);
    bomb.extend(graph);
    let said = onnx::read(&bomb, None).unwrap_err().to_string();
    assert!(said.contains("fields"), "{said}");
}
