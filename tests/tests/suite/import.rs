//! An ONNX model into a deployment of real processes and out again: the parties predict with it what
//! the plain run predicts, they train on from it to the weights of the plain run, and what they reveal
//! is what came in.

use std::collections::BTreeMap;
use std::path::PathBuf;

use trefoil_client::data::{Dataset, Preprocess, embedded_digits, subset};
use trefoil_exchange::{Weights, onnx, tensors};
use trefoil_models::job::{DatasetRef, JobKind, PredictOutput, TrainSpec};
use trefoil_models::plain_run::{self, Table, Tables};
use trefoil_models::{Network, outcome, schedule};
use trefoil_protocol::Tensor;
use trefoil_protocol::fixed::encode;

use crate::serve::{World, refused, succeeds};

const F: u8 = 16;
const ROWS: usize = 40;

fn lenet() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../exchange/tests/files/torch-lenet.onnx")
}

fn read(path: &PathBuf) -> onnx::Understood {
    onnx::read(&std::fs::read(path).expect("a model"), None).expect("it is read")
}

/// Weights in fixed point, as they are shared.
fn fixed(network: &Network, weights: &Weights) -> BTreeMap<String, Tensor> {
    let fixed = weights.iter().map(|(name, array)| {
        let bits = network.kept_frac_bits(name, F);
        let words = array.iter().map(|value| encode(*value, bits.into()));
        let tensor = Tensor::new(array.shape().to_vec(), words.collect());
        (name.clone(), tensor)
    });
    fixed.collect()
}

/// The first rows' images in fixed point, as they are shared.
fn images(digits: &Dataset, rows: usize) -> Table {
    let some = subset(digits, &(0..rows).collect::<Vec<_>>()).expect("the digits have them");
    let images = Preprocess::DIGITS.to_fixed(some.images.view(), F.into());
    let words = images.expect("pictures").data().to_vec();
    Table {
        row_words: words.len() / rows,
        words,
    }
}

/// The logits of the first digits by the plain fixed-point run, as the tool prints them.
fn plain(model: &onnx::Understood) -> Vec<String> {
    let job = JobKind::Predict {
        model: "m".into(),
        network: model.network.to_toml(),
        frac_bits: F,
        ring_bits: 64,
        rows: ROWS,
        upload: "u".into(),
        output: PredictOutput::Logits,
    };
    let digits = embedded_digits().expect("inside the program").test;
    let tables = Tables::from([("upload/images".to_owned(), images(&digits, ROWS))]);
    let weights = fixed(&model.network, &model.weights);
    let plan = schedule(&job).expect("a job");
    let run = plain_run::run(&plan, &tables, Some(&weights), None, |_, _, _| {});
    let outputs = run.expect("within the domains").outputs;
    let logits = outcome::rows(&outputs, "logits", ROWS, 2 * u32::from(F)).expect("revealed");
    let line = |row: ndarray::ArrayView1<'_, f64>| {
        let scores: Vec<String> = row.iter().map(|score| format!("{score:.6}")).collect();
        scores.join(",")
    };
    logits.rows().into_iter().map(line).collect()
}

#[test]
fn an_onnx_model_predicts_on_shares_what_it_predicts_in_the_clear_and_leaves_as_it_came() {
    let path = lenet();
    let original = read(&path);
    let world = World::start();

    // What is not understood is said, and nothing is sent.
    let broken = world.path("broken.onnx");
    let mut bytes = std::fs::read(&path).expect("a model");
    let places: Vec<usize> = (0..bytes.len() - 7)
        .filter(|at| bytes[*at..].starts_with(b"MaxPool"))
        .collect();
    assert!(!places.is_empty(), "it has one");
    for at in places {
        bytes[at..at + 7].copy_from_slice(b"LppPool");
    }
    std::fs::write(&broken, bytes).expect("it is written");
    let import = |path: &PathBuf| {
        let mut command = world.member("anna", &["import-model", "--save-as", "lenet"]);
        command
            .arg(path)
            .args(["--preprocess", "mean=0.1307,std=0.3081"]);
        command
    };
    refused(
        &mut import(&broken),
        "(LppPool): this operation is not supported",
    );
    let (none, _) = succeeds(&mut world.member("anna", &["models"]));
    assert!(none.contains("no models"), "{none}");

    let (kept, said) = succeeds(&mut import(&path));
    assert!(kept.contains("lenet, kept as shares"), "{kept}");
    assert!(said.contains("LogSoftmax at the end is left out"), "{said}");
    let (table, _) = succeeds(&mut world.predict("anna", "lenet", &[]));
    let found: Vec<&str> = table
        .lines()
        .skip(1)
        .filter_map(|line| line.splitn(3, ',').nth(2))
        .collect();
    assert_eq!(found, plain(&original));

    for name in ["out.safetensors", "out.onnx"] {
        let mut reveal = world.member("anna", &["reveal-model", "lenet", "--to"]);
        succeeds(reveal.arg(world.path(name)));
        let bytes = std::fs::read(world.path(name)).expect("it is written");
        let weights = match name {
            "out.onnx" => {
                let again = onnx::read(&bytes, None).expect("it is read");
                assert_eq!(again.network.kept(), original.network.kept());
                again.weights
            }
            _ => tensors::read(&bytes).expect("it is read"),
        };
        assert_eq!(weights.len(), original.weights.len());
        for (name, array) in &weights {
            let difference = array - &original.weights[name];
            // Half a unit of 16 fraction bits, and the 24 bits of a float.
            let bound = 1.0 / 131_072.0 + 1e-6;
            assert!(difference.iter().all(|d| d.abs() <= bound), "{name}");
        }
    }
    let mut wrong = world.member("anna", &["reveal-model", "lenet", "--to"]);
    refused(
        wrong.arg(world.path("out.bin")),
        "are written to .npz, .safetensors and .onnx",
    );
    world.cluster.stop();
}

/// The weights after a training on the first `rows` digits that starts from these, by the plain run.
fn plainly_trained(
    model: &onnx::Understood,
    rows: usize,
    spec: TrainSpec,
) -> BTreeMap<String, Tensor> {
    let digits = embedded_digits().expect("inside the program").train;
    let mut labels = vec![0; rows * model.network.classes];
    for (row, label) in digits.labels[..rows].iter().enumerate() {
        labels[row * model.network.classes + usize::from(*label)] = 1;
    }
    let labels = Table {
        row_words: model.network.classes,
        words: labels,
    };
    let tables = Tables::from([
        ("train/images".to_owned(), images(&digits, rows)),
        ("train/labels".to_owned(), labels),
    ]);
    let job = JobKind::Train {
        network: model.network.to_toml(),
        spec: TrainSpec {
            start_from: Some("m".into()),
            ..spec
        },
        dataset: DatasetRef {
            name: "digits".into(),
            train_rows: rows,
            test_rows: 0,
            snapshot: [0; 32],
        },
        evaluate_each_epoch: false,
        save_as: "further".into(),
        reveal_weights: true,
    };
    let weights = fixed(&model.network, &model.weights);
    let plan = schedule(&job).expect("a job");
    let run = plain_run::run(&plan, &tables, Some(&weights), None, |_, _, _| {});
    let trained = run
        .expect("within the domains")
        .outputs
        .pop()
        .expect("the weights");
    assert!(
        weights
            .iter()
            .all(|(name, before)| trained[name] != *before)
    );
    trained
}

#[test]
fn training_goes_on_from_an_imported_model_of_any_format_as_the_plain_run_does() {
    const TRAIN_ROWS: usize = 48;
    let path = lenet();
    let original = read(&path);
    let expected = plainly_trained(
        &original,
        TRAIN_ROWS,
        TrainSpec {
            batch: 16,
            learning_rate: 0.03125,
            momentum: 0.5,
            ..TrainSpec::default()
        },
    );
    let world = World::start();
    const PREPROCESS: [&str; 2] = ["--preprocess", "mean=0.1307,std=0.3081"];
    let mut share = world.member("berta", &["share", "--dataset", "digits"]);
    share.args(["--images", "digits", "--part", "train", "--rows"]);
    succeeds(share.arg(format!("0..{TRAIN_ROWS}")).args(PREPROCESS));

    // The owner has the model as it was exported, or its weights beside a network file.
    let network = world.path("lenet.toml");
    for (format, weights) in [
        ("onnx", None),
        ("npz", Some("w.npz")),
        ("safetensors", Some("w.safetensors")),
    ] {
        let mut import = world.member("anna", &["import-model", "--save-as", format]);
        match weights.map(|name| world.path(name)) {
            None => import.arg(&path),
            Some(weights) => {
                let mut convert = world.member("anna", &["convert-model"]);
                convert.arg(&path).arg("--weights").arg(&weights);
                if !network.exists() {
                    convert.arg("--network").arg(&network);
                }
                succeeds(&mut convert);
                import
                    .arg("--network")
                    .arg(&network)
                    .arg("--weights")
                    .arg(weights)
            }
        };
        succeeds(import.args(PREPROCESS));

        // Network and preparation are the model's.
        let revealed = world.path(&format!("{format}-trained.safetensors"));
        let mut train = world.member("analyst", &["train", "--dataset", "digits"]);
        train.args(["--start-from", format, "--save-as", "further"]);
        train.args([
            "--batch",
            "16",
            "--learning-rate",
            "0.03125",
            "--momentum",
            "0.5",
        ]);
        let (_, said) = succeeds(train.arg("--reveal-weights").arg(&revealed));
        assert!(
            said.contains(&format!("from the kept weights of model {format}@")),
            "{said}"
        );
        let found = tensors::read(&std::fs::read(&revealed).expect("it is written"));
        // A float of 32 bits holds weights below 2^8 of 16 fraction bits to the last bit.
        let found = fixed(&original.network, &found.expect("it is read"));
        assert_eq!(found, expected, "from {format}");
    }
    world.cluster.stop();
}
