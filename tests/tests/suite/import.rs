//! An ONNX model into a deployment of real processes and out again: the parties predict with it what
//! the plain run predicts, and what they reveal is what came in.

use std::path::PathBuf;

use trefoil_client::data::{Preprocess, embedded_digits, subset};
use trefoil_exchange::{onnx, tensors};
use trefoil_models::job::{JobKind, PredictOutput};
use trefoil_models::plain_run::{self, Table, Tables};
use trefoil_models::{outcome, schedule};
use trefoil_protocol::Tensor;
use trefoil_protocol::fixed::encode;

use crate::serve::{World, refused, succeeds};

const F: u8 = 16;
const ROWS: usize = 40;

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
    let some = subset(&digits, &(0..ROWS).collect::<Vec<_>>()).expect("the digits have them");
    let images = Preprocess::DIGITS.to_fixed(some.images.view(), F.into());
    let table = Table {
        row_words: model.network.input_len(),
        words: images.expect("pictures").data().to_vec(),
    };
    let tables = Tables::from([("upload/images".to_owned(), table)]);
    let weights = model.weights.iter().map(|(name, array)| {
        let bits = model.network.kept_frac_bits(name, F);
        let words = array.iter().map(|value| encode(*value, bits.into()));
        (
            name.clone(),
            Tensor::new(array.shape().to_vec(), words.collect()),
        )
    });
    let plan = schedule(&job).expect("a job");
    let run = plain_run::run(&plan, &tables, Some(&weights.collect()), None, |_, _, _| {});
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
    let files = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../exchange/tests/files");
    let path = files.join("torch-lenet.onnx");
    let original = onnx::read(&std::fs::read(&path).expect("a model"), None).expect("it is read");
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
