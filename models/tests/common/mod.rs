//! Small networks, small data, and a secure run in memory beside a plain one.
#![allow(dead_code)] // every test file uses a part

use std::collections::BTreeMap;

use ndarray::{ArrayView2, Axis};
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use trefoil_models::float::{Data, Model};
use trefoil_models::job::TrainSpec;
use trefoil_models::plain_run::{self, PlainRun, Table, Tables};
use trefoil_models::schedule::{self, Schedule};
use trefoil_models::{DatasetRef, JobKind, Network, outcome};
use trefoil_protocol::Tensor;
use trefoil_protocol::fixed::{decode, encode};
use trefoil_protocol::party::PartyId;
use trefoil_protocol::plan::Plan;
use trefoil_protocol::run::memory::{self, MemoryRun, MemoryStep};

/// The seed of all randomness of a test, printed; `TREFOIL_TEST_SEED` sets another.
pub fn seed() -> u64 {
    let seed = std::env::var("TREFOIL_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(20_261_122);
    println!("TREFOIL_TEST_SEED={seed}");
    seed
}

/// Labelled images whose classes differ by a pattern of their own, plus noise.
pub struct Synthetic {
    pub images: Vec<f32>,
    pub labels: Vec<u8>,
    pub row: usize,
    pub classes: usize,
}

/// A number in [-1, 1].
pub fn uniform(rng: &mut ChaCha20Rng) -> f32 {
    (rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0
}

pub fn synthetic(network: &Network, rows: usize, noise: f32, seed: u64) -> Synthetic {
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    let (row, classes) = (network.input_len(), network.classes);
    // The patterns belong to the task, not to the sample: they do not depend on the seed.
    let mut fixed = ChaCha20Rng::seed_from_u64(1);
    let patterns: Vec<f32> = (0..classes * row).map(|_| uniform(&mut fixed)).collect();
    let mut images = Vec::new();
    let mut labels = Vec::new();
    for _ in 0..rows {
        let label = (rng.next_u32() as usize) % classes;
        images.extend(
            patterns[label * row..][..row]
                .iter()
                .map(|p| p + noise * uniform(&mut rng)),
        );
        labels.push(label as u8);
    }
    Synthetic {
        images,
        labels,
        row,
        classes,
    }
}

impl Synthetic {
    pub fn rows(&self) -> usize {
        self.labels.len()
    }

    pub fn tables(&self, split: &str, frac_bits: u8, tables: &mut Tables) {
        let words = self
            .images
            .iter()
            .map(|x| encode(f64::from(*x), u32::from(frac_bits)))
            .collect();
        tables.insert(
            format!("{split}/images"),
            Table {
                row_words: self.row,
                words,
            },
        );
        let mut words = vec![0; self.rows() * self.classes];
        self.labels
            .iter()
            .enumerate()
            .for_each(|(row, label)| words[row * self.classes + usize::from(*label)] = 1);
        tables.insert(
            format!("{split}/labels"),
            Table {
                row_words: self.classes,
                words,
            },
        );
    }
}

pub fn dataset(train_rows: usize, test_rows: usize) -> DatasetRef {
    DatasetRef {
        name: "synthetic".into(),
        train_rows,
        test_rows,
        snapshot: [0; 32],
    }
}

pub fn train_job(
    network: &Network,
    spec: &TrainSpec,
    train_rows: usize,
    test_rows: usize,
) -> JobKind {
    JobKind::Train {
        network: network.to_toml(),
        spec: spec.clone(),
        dataset: dataset(train_rows, test_rows),
        evaluate_each_epoch: test_rows > 0,
        save_as: "model".into(),
        reveal_weights: false,
    }
}

pub fn plain(
    schedule: &Schedule,
    tables: &Tables,
    model: Option<&BTreeMap<String, Tensor>>,
    seed: u64,
) -> PlainRun {
    let coins = memory::test_coins(seed);
    plain_run::run(schedule, tables, model, Some(&coins), |_, _, _| {})
        .expect("the plain run stays in range")
}

/// The schedule by three parties and a dealer as threads.
pub fn secure(
    schedule: &Schedule,
    tables: &Tables,
    model: Option<&BTreeMap<String, Tensor>>,
    seed: u64,
) -> MemoryRun {
    let plans: Vec<Plan> = schedule.programs.iter().map(Plan::new).collect();
    for plan in &plans {
        plan.check().expect("masks are used once");
    }
    let steps: Vec<MemoryStep> = schedule
        .steps
        .iter()
        .map(|step| {
            let inputs = plain_run::step_inputs(&schedule.programs[step.program], step, tables);
            MemoryStep {
                plan: step.program,
                inputs: inputs.expect("tables fit"),
            }
        })
        .collect();
    let session = plain_run::PlainSession::new(schedule, tables, model, None);
    let initial = session.expect("the model is given").state;
    let run = memory::run(&plans, &steps, &initial, seed).expect("the secure run ends");
    for (party, counted) in PartyId::ALL.into_iter().zip(run.peak_bytes) {
        let said = trefoil_models::memory::tensor_bytes(schedule, &plans, party);
        assert_eq!(counted, said, "bytes of tensors at {party}");
    }
    run
}

/// Runs both ways and asserts that everything revealed and everything carried is the same.
pub fn assert_secure_equals_plain(
    schedule: &Schedule,
    tables: &Tables,
    model: Option<&BTreeMap<String, Tensor>>,
    seed: u64,
) -> PlainRun {
    let plain = plain(schedule, tables, model, seed);
    let secure = secure(schedule, tables, model, seed);
    for (step, (p, s)) in plain.outputs.iter().zip(&secure.outputs).enumerate() {
        assert!(
            p == s,
            "step {step} ({:?}) reveals something else",
            schedule.steps[step].phase
        );
    }
    assert_eq!(
        plain.state.keys().collect::<Vec<_>>(),
        secure.state.keys().collect::<Vec<_>>()
    );
    for (name, tensor) in &plain.state {
        assert!(
            tensor == &secure.state[name],
            "carried {name:?} differs after {} steps",
            schedule.steps.len()
        );
    }
    plain
}

/// Two epochs with an evaluation after each, by three parties and in the clear.
pub fn secure_equals_plain(network: &Network, spec: &TrainSpec) {
    let seed = seed();
    let train = synthetic(network, 2 * spec.batch + 1, 0.5, seed);
    let test = synthetic(network, 5, 0.5, seed + 1);
    let mut tables = Tables::new();
    train.tables("train", spec.frac_bits, &mut tables);
    test.tables("test", spec.frac_bits, &mut tables);
    let schedule =
        schedule::schedule(&train_job(network, spec, train.rows(), test.rows())).expect("valid");
    let run = assert_secure_equals_plain(&schedule, &tables, None, seed);
    let counted = outcome::confusion(&run.outputs[schedule.steps.len() - 1]).expect("revealed");
    assert_eq!(counted.sum(), test.rows() as u64);
}

/// One step from the same weights on the same batch: the difference of the weights is the gradient
/// times the learning rate.
pub fn gradients_agree(network: &Network, frac_bits: u8, tolerance: f64) {
    let seed = seed();
    let spec = TrainSpec {
        batch: 16,
        learning_rate: 1.0,
        frac_bits,
        ..TrainSpec::default()
    };
    let train = synthetic(network, spec.batch, 0.5, seed);
    let mut tables = Tables::new();
    train.tables("train", frac_bits, &mut tables);
    let schedule = schedule::schedule(&train_job(network, &spec, spec.batch, 0)).expect("valid");
    let fixed = plain(&schedule, &tables, None, seed);
    let model = Model::initial(network, &spec).expect("valid");
    let images = ArrayView2::from_shape((train.rows(), train.row), &train.images).expect("rows");
    // In the job's order: a dropout's mask is by the place in the batch.
    let order = schedule.steps[0].inputs[0].rows.iter();
    let order: Vec<usize> = order.map(|row| *row as usize).collect();
    let labels: Vec<u8> = order.iter().map(|row| train.labels[*row]).collect();
    let gradients = model
        .gradients(Data {
            images: images.select(Axis(0), &order).view(),
            labels: &labels,
        })
        .expect("valid");
    for (at, layer) in network.layers.iter().enumerate() {
        let (Some(before), Some(gradient)) = (&model.parameters[at], &gradients.layers[at]) else {
            continue;
        };
        let pairs = [
            (
                layer.weight_name(),
                before
                    .weight
                    .iter()
                    .zip(&gradient.weight)
                    .collect::<Vec<_>>(),
            ),
            (
                layer.bias_name(),
                before.bias.iter().zip(&gradient.bias).collect(),
            ),
        ];
        for (name, pairs) in pairs {
            let after = fixed.state[&name].data();
            let (mut error, mut norm) = (0.0, 0.0);
            for (word, (before, gradient)) in after.iter().zip(pairs) {
                let step = f64::from(*before) - decode(*word, u32::from(frac_bits));
                error += (step - f64::from(*gradient)).powi(2);
                norm += f64::from(*gradient).powi(2);
            }
            println!(
                "{}: {name}: relative error {:.5}",
                network.name,
                (error / norm).sqrt()
            );
            // And a unit of the last place for each element, and what the softmax may err (below 2^-10).
            let unit = (after.len() as f64).sqrt() * (-f64::from(frac_bits)).exp2() + 1.0 / 2048.0;
            assert!(
                error.sqrt() <= tolerance * norm.sqrt() + unit,
                "{name}: {error} beside {norm}"
            );
        }
    }
}
