//! Training that starts from a kept model, and training that stops early: exact, and reproducible
//! from what is public.

mod common;

use common::{assert_secure_equals_plain, dataset, plain, seed, synthetic};
use trefoil_models::early_stop::VALIDATION_RIGHT;
use trefoil_models::plain_run::Tables;
use trefoil_models::schedule::TRAIN_IMAGES;
use trefoil_models::{
    EarlyStop, InitialState, JobKind, Network, Optimiser, Phase, TrainSpec, outcome, schedule,
};

fn network() -> Network {
    let text = "name = \"tiny\"\ninput = [1, 3, 3]\nclasses = 3\n\
         [[layer]]\nkind = \"dense\"\nunits = 5\n[[layer]]\nkind = \"relu\"\n[[layer]]\nkind = \"dense\"\n";
    Network::parse(text).expect("valid")
}

fn tables(network: &Network, rows: usize, seed: u64) -> Tables {
    let mut tables = Tables::new();
    synthetic(network, rows, 1.5, seed).tables("train", 16, &mut tables);
    synthetic(network, 20, 1.5, seed + 1).tables("test", 16, &mut tables);
    tables
}

fn job(network: &Network, spec: &TrainSpec, rows: usize, reveal_weights: bool) -> JobKind {
    JobKind::Train {
        network: network.to_toml(),
        spec: spec.clone(),
        dataset: dataset(rows, 20),
        evaluate_each_epoch: true,
        save_as: "model".into(),
        reveal_weights,
    }
}

#[test]
fn training_from_a_model_equals_the_plain_run_and_goes_on_where_it_was() {
    let (seed, network) = (seed(), network());
    let tables = tables(&network, 40, seed);
    let optimisers = [
        Optimiser::Sgd,
        Optimiser::Adam(trefoil_models::job::AdamSpec::default()),
    ];
    for optimiser in optimisers {
        let first = TrainSpec {
            batch: 8,
            learning_rate: 0.01,
            optimiser,
            ..TrainSpec::default()
        };
        let plan = schedule(&job(&network, &first, 40, false)).expect("valid");
        let run = plain(&plan, &tables, None, seed);
        let kept = plan.save.iter();
        let model = kept
            .map(|name| (name.clone(), run.state[name].clone()))
            .collect();

        let second = TrainSpec {
            start_from: Some("model".into()),
            ..first
        };
        let plan = schedule(&job(&network, &second, 40, false)).expect("valid");
        assert!(matches!(&plan.initial, InitialState::StartFrom { model, .. } if model == "model"));
        let run = assert_secure_equals_plain(&plan, &tables, Some(&model), seed);
        for (name, before) in &model {
            assert_ne!(before, &run.state[name], "{name} is trained");
        }
        let moments = run.state.keys().filter(|name| name.contains("moment"));
        let adam = matches!(second.optimiser, Optimiser::Adam(_));
        assert_eq!(moments.count() > 0, adam);
    }
}

const RULE: EarlyStop = EarlyStop {
    patience: 2,
    min_delta: 0.0,
    validation_rows: 15,
};

fn stopping(network: &Network, rows: usize, epochs: usize) -> JobKind {
    let spec = TrainSpec {
        batch: 8,
        epochs,
        learning_rate: 0.25,
        early_stop: Some(RULE),
        ..TrainSpec::default()
    };
    job(network, &spec, rows, true)
}

#[test]
fn rows_that_are_set_aside_are_validated_by_and_never_trained_on() {
    let network = network();
    let plan = schedule(&stopping(&network, 64, 2)).expect("valid");
    let rows = |wanted: fn(&Phase) -> bool| {
        let steps = plan.steps.iter().filter(|step| wanted(&step.phase));
        let inputs = steps.flat_map(|step| &step.inputs);
        let images = inputs.filter(|input| input.table == TRAIN_IMAGES);
        let mut rows: Vec<u32> = images.flat_map(|input| input.rows.to_vec()).collect();
        rows.sort_unstable();
        rows
    };
    let trained = rows(|phase| matches!(phase, Phase::Train { .. }));
    let mut validated = rows(|phase| matches!(phase, Phase::Validate { .. }));
    validated.dedup();
    assert_eq!(validated.len(), 15);
    assert!(trained.iter().all(|row| !validated.contains(row)));
    // 49 rows are 6 batches of 8.
    assert_eq!(trained.len(), 2 * 48);
}

#[test]
fn an_early_stop_leaves_the_model_of_the_best_epoch() {
    let (seed, network) = (seed(), network());
    let tables = tables(&network, 64, seed);
    let plan = schedule(&stopping(&network, 64, 40)).expect("valid");
    let run = plain(&plan, &tables, None, seed);
    let figures: Vec<(usize, u64)> = run
        .outputs
        .iter()
        .enumerate()
        .filter_map(|(step, outputs)| Some((step, outputs.get(VALIDATION_RIGHT)?.data()[0])))
        .collect();
    println!("{figures:?}");
    let best = figures
        .iter()
        .map(|(_, right)| *right)
        .max()
        .expect("epochs");
    let (step, _) = *figures
        .iter()
        .find(|(_, right)| *right == best)
        .expect("it is one");
    let epoch = figures
        .iter()
        .position(|(_, right)| *right == best)
        .expect("it is one");
    assert_eq!(
        figures.len(),
        epoch + 1 + RULE.patience,
        "it stops after its patience"
    );
    assert!(figures.len() < 40);
    let last = run.outputs.last().expect("the weights");
    assert!(!last.is_empty() && run.state.keys().all(|name| !name.contains('/')));
    let results = run
        .outputs
        .iter()
        .filter(|outputs| outputs.contains_key("confusion"));
    assert_eq!(results.count(), figures.len());

    // The same steps without a rule, by three parties and in the clear, up to the best epoch.
    let mut until = plan.clone();
    until.stopping = None;
    until.steps.truncate(step + 1);
    let secure = assert_secure_equals_plain(&until, &tables, None, seed);
    for name in &plan.save {
        assert_eq!(run.state[name], secure.state[name], "{name}");
        assert_eq!(last[name], secure.state[name], "{name} is revealed");
    }
    let outputs = &secure.outputs[step];
    assert_eq!(outputs.keys().collect::<Vec<_>>(), [VALIDATION_RIGHT]);
    outcome::confusion(&secure.outputs[step - 3]).expect("the evaluation before it");
}

#[test]
fn an_early_stop_needs_rows_to_train_on() {
    let error = schedule(&stopping(&network(), 22, 2))
        .expect_err("too few")
        .to_string();
    assert!(
        error.contains("early_stop") && error.contains('7'),
        "{error}"
    );
    schedule(&stopping(&network(), 23, 2)).expect("a batch is left");
}
