//! Evaluation and prediction: counts equal direct counting, and reveal nothing else.

mod common;

use common::{assert_secure_equals_plain, dataset, seed, synthetic};
use ndarray::ArrayView2;
use trefoil_models::float::{self, Model};
use trefoil_models::plain_run::Tables;
use trefoil_models::schedule::{PADDING_ROW, epoch_order, gather, inference_batches};
use trefoil_models::{
    HospitalRows, JobKind, Network, Phase, PredictOutput, outcome, schedule, weights,
};
use trefoil_protocol::fixed::decode;

const F: u32 = 16;

fn network(classes: usize) -> Network {
    let text = format!(
        "name = \"tiny\"\ninput = [1, 3, 3]\nclasses = {classes}\n\
         [[layer]]\nkind = \"dense\"\nunits = 5\n[[layer]]\nkind = \"relu\"\n[[layer]]\nkind = \"dense\"\n"
    );
    Network::parse(&text).expect("valid")
}

fn evaluate(network: &Network, rows: usize, auc: bool) -> JobKind {
    evaluate_with(network, rows, auc, false, &[])
}

/// `hospitals`: rows of each, in the order of their keys.
fn evaluate_with(
    network: &Network,
    rows: usize,
    auc: bool,
    calibration: bool,
    hospitals: &[usize],
) -> JobKind {
    JobKind::Evaluate {
        model: "m".into(),
        network: network.to_toml(),
        frac_bits: F as u8,
        ring_bits: 64,
        dataset: dataset(0, rows),
        auc,
        calibration,
        by_hospital: by_hospital(hospitals),
    }
}

fn by_hospital(rows: &[usize]) -> Vec<HospitalRows> {
    let each = rows.iter().enumerate().map(|(at, rows)| HospitalRows {
        hospital: [at as u8 + 1; 32],
        rows: *rows,
    });
    each.collect()
}

#[test]
fn evaluation_counts_what_direct_counting_counts() {
    let seed = seed();
    let network = network(4);
    let model = weights::initial(&network, seed, F);
    // More rows than one batch holds, and not a multiple of its size.
    let test = synthetic(&network, 131, 1.0, seed);
    let mut tables = Tables::new();
    test.tables("test", F as u8, &mut tables);
    let schedule = schedule(&evaluate(&network, test.rows(), false)).expect("valid");
    let run = assert_secure_equals_plain(&schedule, &tables, Some(&model), seed);
    let counts = outcome::confusion(&run.outputs[schedule.steps.len() - 1]).expect("revealed");
    let float = Model::from_weights(&network, &model, F).expect("fits");
    let images = ArrayView2::from_shape((test.rows(), test.row), &test.images).expect("rows");
    let guesses = float::predictions(&float.logits(images).expect("fits"));
    let mut expected = ndarray::Array2::<u64>::zeros((4, 4));
    for (label, guess) in test.labels.iter().zip(guesses) {
        expected[[usize::from(*label), usize::from(guess)]] += 1;
    }
    assert_eq!(counts, expected);
    let revealing = run
        .outputs
        .iter()
        .filter(|outputs| !outputs.is_empty())
        .count();
    assert_eq!(revealing, 1, "only the sums are revealed");
}

#[test]
fn the_area_under_the_curve_equals_the_direct_statistic_with_ties() {
    let seed = seed();
    let network = network(2);
    let model = weights::initial(&network, seed, F);
    let mut test = synthetic(&network, 150, 3.0, seed);
    // Equal images give equal scores: across classes, within a block and across blocks.
    for row in [3, 40, 41, 120, 149] {
        test.images.copy_within(0..test.row, row * test.row);
    }
    let mut tables = Tables::new();
    test.tables("test", F as u8, &mut tables);
    let schedule = schedule(&evaluate(&network, test.rows(), true)).expect("valid");
    let run = assert_secure_equals_plain(&schedule, &tables, Some(&model), seed);
    let outputs = &run.outputs[schedule.steps.len() - 1];
    let auc = outcome::auc(outputs)
        .expect("revealed")
        .expect("both classes occur");

    let predict = predict_job(&network, test.rows(), PredictOutput::Logits);
    let mut uploads = Tables::new();
    uploads.insert("upload/images".into(), tables["test/images"].clone());
    let predicted = common::plain(&predict, &uploads, Some(&model), seed);
    let logits = outcome::rows(&predicted.outputs, "logits", test.rows(), 2 * F).expect("revealed");
    let scores: Vec<f64> = logits
        .rows()
        .into_iter()
        .map(|row| row[1] - row[0])
        .collect();
    let positive: Vec<bool> = test.labels.iter().map(|label| *label == 1).collect();
    let expected = auc_of_scores(&scores, &positive).expect("both classes occur");
    assert!(
        (auc.value - expected).abs() < 1e-12 && auc.error == 0.0,
        "secure {auc:?}, direct {expected}"
    );
    assert_eq!(
        outputs.keys().collect::<Vec<_>>(),
        ["auc_balance", "confusion"]
    );
}

#[test]
fn above_two_thousand_rows_a_histogram_states_its_error_and_keeps_it() {
    let seed = seed();
    let network = network(2);
    let model = weights::initial(&network, seed, F);
    let test = synthetic(&network, 2010, 3.0, seed);
    let mut tables = Tables::new();
    test.tables("test", F as u8, &mut tables);
    let plan = schedule(&evaluate(&network, test.rows(), true)).expect("valid");
    assert!(
        !plan
            .steps
            .iter()
            .any(|step| matches!(step.phase, Phase::Auc { .. }))
    );
    let run = common::plain(&plan, &tables, Some(&model), seed);
    let outputs = &run.outputs[plan.steps.len() - 1];
    assert_eq!(
        outputs.keys().collect::<Vec<_>>(),
        ["auc_balance", "auc_ties", "confusion"]
    );
    let auc = outcome::auc(outputs)
        .expect("revealed")
        .expect("both classes occur");

    let float = Model::from_weights(&network, &model, F).expect("fits");
    let images = ArrayView2::from_shape((test.rows(), test.row), &test.images).expect("rows");
    let scores = float::scores(&float.logits(images).expect("fits"));
    let positive: Vec<bool> = test.labels.iter().map(|label| *label == 1).collect();
    let exact = auc_of_scores(&scores, &positive).expect("both classes occur");
    println!("histogram {auc:?}, exact {exact}");
    // Scores are rounded, too: a few pairs of millions.
    assert!(
        (auc.value - exact).abs() <= auc.error + 1e-4,
        "{auc:?}, exact {exact}"
    );
    assert!(auc.error > 0.0 && auc.error < 0.05, "{auc:?}");
}

#[test]
fn a_secure_histogram_equals_the_plain_one() {
    let seed = seed();
    let network = network(2);
    let model = weights::initial(&network, seed, F);
    let test = synthetic(&network, 2010, 3.0, seed);
    let mut tables = Tables::new();
    test.tables("test", F as u8, &mut tables);
    let mut plan = schedule(&evaluate(&network, test.rows(), true)).expect("valid");
    // The set-up, the first batch, the last, which is padded, and the result.
    let batches = plan.steps.len() - 2;
    plan.steps.drain(2..batches);
    let run = assert_secure_equals_plain(&plan, &tables, Some(&model), seed);
    assert!(run.outputs.last().expect("steps").contains_key("auc_ties"));
}

/// Classes, whether they are right, and the probability of the predicted class, as a prediction job
/// reveals them.
fn predictions(
    network: &Network,
    model: &std::collections::BTreeMap<String, trefoil_protocol::Tensor>,
    tables: &Tables,
    labels: &[u8],
    seed: u64,
) -> Vec<(usize, bool, f64)> {
    let rows = labels.len();
    let mut uploads = Tables::new();
    uploads.insert("upload/images".into(), tables["test/images"].clone());
    let run = |output| {
        let plan = predict_job(network, rows, output);
        common::plain(&plan, &uploads, Some(model), seed).outputs
    };
    let classes = outcome::classes(&run(PredictOutput::Class), rows).expect("revealed");
    let p = run(PredictOutput::Probabilities);
    let p = outcome::rows(&p, "probabilities", rows, 16).expect("revealed");
    let each = classes.iter().zip(labels).enumerate();
    each.map(|(row, (class, label))| (*class, *class == usize::from(*label), p[[row, *class]]))
        .collect()
}

#[test]
fn a_reliability_histogram_counts_what_direct_counting_counts() {
    let seed = seed();
    let network = network(4);
    // Large weights: probabilities all over the range.
    let mut model = weights::initial(&network, seed, F);
    for tensor in model.values_mut() {
        tensor
            .data_mut()
            .iter_mut()
            .for_each(|word| *word = word.wrapping_mul(4));
    }
    let test = synthetic(&network, 131, 1.0, seed);
    let mut tables = Tables::new();
    test.tables("test", F as u8, &mut tables);
    let job = evaluate_with(&network, test.rows(), false, true, &[]);
    let plan = schedule(&job).expect("valid");
    let run = assert_secure_equals_plain(&plan, &tables, Some(&model), seed);
    let outputs = &run.outputs[plan.steps.len() - 1];
    assert_eq!(
        outputs.keys().collect::<Vec<_>>(),
        ["calibration", "confusion"],
        "only sums are revealed"
    );
    let bins = outcome::calibration(outputs).expect("revealed");

    let mut expected = vec![(0u64, 0u64, 0.0f64); 10];
    for (_, right, p) in predictions(&network, &model, &tables, &test.labels, seed) {
        let bin = (0..10).rev().find(|bin| p >= *bin as f64 / 10.0);
        let bin = &mut expected[bin.expect("a probability")];
        *bin = (bin.0 + 1, bin.1 + u64::from(right), bin.2 + p);
    }
    println!("{bins:?}");
    for (found, (rows, right, sum)) in bins.iter().zip(&expected) {
        assert_eq!((found.rows, found.right), (*rows, *right));
        let mean = (*rows > 0).then(|| sum / *rows as f64);
        let apart = found.confidence.zip(mean).map(|(a, b)| (a - b).abs());
        assert!(
            apart.is_none_or(|apart| apart < 1e-9),
            "{found:?}, {mean:?}"
        );
        assert_eq!(found.confidence.is_some(), *rows > 0);
    }
    assert!(
        bins.iter().filter(|bin| bin.rows > 0).count() > 4,
        "{bins:?}"
    );
    let gap: f64 = expected
        .iter()
        .map(|(_, right, sum)| (*right as f64 - sum).abs())
        .sum();
    let found = outcome::calibration_error(&bins).expect("rows");
    assert!((found - gap / 131.0).abs() < 1e-9, "{found}");
}

#[test]
fn the_stated_error_of_the_mean_confidence_is_kept() {
    let seed = seed();
    let network = network(4);
    let model = weights::initial(&network, seed, F);
    let test = synthetic(&network, 300, 1.0, seed);
    let mut tables = Tables::new();
    test.tables("test", F as u8, &mut tables);
    let job = evaluate_with(&network, test.rows(), false, true, &[]);
    let plan = schedule(&job).expect("valid");
    let run = common::plain(&plan, &tables, Some(&model), seed);
    let bins = outcome::calibration(&run.outputs[plan.steps.len() - 1]).expect("revealed");
    let float = Model::from_weights(&network, &model, F).expect("fits");
    let images = ArrayView2::from_shape((test.rows(), test.row), &test.images).expect("rows");
    let logits = float.logits(images).expect("fits");
    let sure = logits.rows().into_iter().map(|z| {
        let max = z.iter().fold(f64::MIN, |max, z| max.max(f64::from(*z)));
        let sum: f64 = z.iter().map(|z| (f64::from(*z) - max).exp()).sum();
        1.0 / sum
    });
    let exact: f64 = sure.sum();
    let found = bins
        .iter()
        .filter_map(|bin| Some(bin.confidence? * bin.rows as f64));
    let found: f64 = found.sum();
    // Over all rows, so that no row's bin matters: within 2^-10 a row, and what rounded weights and
    // pixels make of a logit.
    let apart = (found - exact).abs() / test.rows() as f64;
    println!("mean confidence within {apart:.6}");
    assert!(apart < 1.0 / 1024.0 + 1e-4, "{apart}");
}

#[test]
fn each_hospitals_counts_are_its_own_rows_and_add_up() {
    let seed = seed();
    let network = network(2);
    let model = weights::initial(&network, seed, F);
    // The second one's rows begin and end inside what would be batches of all rows.
    let hospitals = [60, 131, 9];
    let test = synthetic(&network, 200, 1.0, seed);
    let mut tables = Tables::new();
    test.tables("test", F as u8, &mut tables);
    let job = evaluate_with(&network, 200, true, true, &hospitals);
    let plan = schedule(&job).expect("valid");
    let run = assert_secure_equals_plain(&plan, &tables, Some(&model), seed);
    let predicted = predictions(&network, &model, &tables, &test.labels, seed);
    let (mut first, mut sum) = (0, ndarray::Array2::<u64>::zeros((2, 2)));
    let own = plan.steps.iter().zip(&run.outputs);
    let own = own.filter(|(step, _)| matches!(step.phase, Phase::HospitalResult { .. }));
    let own: Vec<_> = own.map(|(_, outputs)| outputs).collect();
    assert_eq!(own.len(), hospitals.len());
    for (outputs, rows) in own.into_iter().zip(hospitals) {
        assert_eq!(outputs.keys().collect::<Vec<_>>(), ["hospital_confusion"]);
        let found = outcome::hospital_confusion(outputs).expect("revealed");
        let mut expected = ndarray::Array2::<u64>::zeros((2, 2));
        for row in first..first + rows {
            expected[[usize::from(test.labels[row]), predicted[row].0]] += 1;
        }
        assert_eq!(found, expected);
        sum += &found;
        first += rows;
    }
    let all = &run.outputs[plan.steps.len() - 1];
    assert_eq!(outcome::confusion(all).expect("revealed"), sum);
    // The other figures are those of an evaluation without hospitals.
    let whole = schedule(&evaluate_with(&network, 200, true, true, &[])).expect("valid");
    let whole = common::plain(&whole, &tables, Some(&model), seed);
    assert_eq!(Some(all), whole.outputs.last());
}

#[test]
fn hospitals_that_do_not_make_up_the_test_rows_are_refused() {
    let of = |hospitals: &[usize]| evaluate_with(&network(2), 100, false, false, hospitals);
    schedule(&of(&[40, 60])).expect("they do");
    for wrong in [&[40, 61][..], &[100, 0], &[usize::MAX, 101]] {
        let error = schedule(&of(wrong)).expect_err("they do not").to_string();
        assert!(error.contains("by_hospital"), "{error}");
    }
    let mut job = of(&[40, 60]);
    if let JobKind::Evaluate { by_hospital, .. } = &mut job {
        by_hospital.reverse();
    }
    assert!(schedule(&job).is_err(), "another order");
}

fn predict_job(network: &Network, rows: usize, output: PredictOutput) -> trefoil_models::Schedule {
    let job = JobKind::Predict {
        model: "m".into(),
        network: network.to_toml(),
        frac_bits: F as u8,
        ring_bits: 64,
        rows,
        upload: "u".into(),
        output,
    };
    schedule(&job).expect("valid")
}

#[test]
fn predictions_reveal_what_was_asked_for() {
    let seed = seed();
    let network = network(4);
    let model = weights::initial(&network, seed, F);
    let test = synthetic(&network, 130, 1.0, seed);
    let mut tables = Tables::new();
    test.tables("upload", F as u8, &mut tables);
    let run = |output| {
        let schedule = predict_job(&network, test.rows(), output);
        assert_secure_equals_plain(&schedule, &tables, Some(&model), seed).outputs
    };
    let float = Model::from_weights(&network, &model, F).expect("fits");
    let images = ArrayView2::from_shape((test.rows(), test.row), &test.images).expect("rows");
    let expected = float.logits(images).expect("fits");

    let classes = outcome::classes(&run(PredictOutput::Class), test.rows()).expect("revealed");
    let guesses: Vec<usize> = float::predictions(&expected)
        .into_iter()
        .map(usize::from)
        .collect();
    assert_eq!(classes, guesses);

    let logits =
        outcome::rows(&run(PredictOutput::Logits), "logits", test.rows(), 2 * F).expect("revealed");
    assert!(
        logits
            .iter()
            .zip(&expected)
            .all(|(a, b)| (a - f64::from(*b)).abs() < 1e-3)
    );

    let p = outcome::rows(
        &run(PredictOutput::Probabilities),
        "probabilities",
        test.rows(),
        16,
    )
    .expect("revealed");
    for (p, z) in p.rows().into_iter().zip(expected.rows()) {
        let sum: f64 = z.iter().map(|z| f64::from(*z).exp()).sum();
        assert!(
            p.iter()
                .zip(&z)
                .all(|(p, z)| (p - f64::from(*z).exp() / sum).abs() < 2e-3)
        );
    }
}

#[test]
fn an_auc_needs_two_classes_and_a_bounded_number_of_rows() {
    let error = schedule(&evaluate(&network(4), 10, true))
        .expect_err("four classes")
        .to_string();
    assert!(error.contains("4 classes"), "{error}");
    let error = schedule(&evaluate(&network(2), 5_000_000, true))
        .expect_err("too many rows")
        .to_string();
    assert!(
        error.contains("test_rows") && error.contains("4194304"),
        "{error}"
    );
}

#[test]
fn batches_cover_every_row_once() {
    for rows in [1, 127, 128, 129, 1000, 10_000] {
        let (batches, size) = inference_batches(rows);
        assert!(
            batches * size >= rows && (batches - 1) * size < rows && size <= 128,
            "{rows}: {batches} x {size}"
        );
    }
    let order = epoch_order(3, 1, 1000);
    let mut sorted = order.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, (0..1000).collect::<Vec<u32>>());
    assert_ne!(
        order,
        epoch_order(3, 2, 1000),
        "every epoch has its own order"
    );
    assert_eq!(order, epoch_order(3, 1, 1000));
}

#[test]
fn gathering_pads_with_zeros_and_refuses_rows_that_do_not_exist() {
    let table: Vec<u64> = (0..6).map(|i| decode(i << 16, 16) as u64).collect();
    assert_eq!(
        gather(&table, 2, &[2, PADDING_ROW, 0]),
        Some(vec![4, 5, 0, 0, 0, 1])
    );
    assert_eq!(gather(&table, 2, &[3]), None);
}

/// The area under the ROC curve of known scores: the Mann-Whitney statistic, ties count one half.
fn auc_of_scores(scores: &[f64], positive: &[bool]) -> Option<f64> {
    let mut order: Vec<usize> = (0..scores.len().min(positive.len())).collect();
    order.sort_by(|i, j| scores[*i].total_cmp(&scores[*j]));
    let total = order.iter().filter(|i| positive[**i]).count();
    let pairs = total as f64 * (order.len() - total) as f64;
    let (mut won, mut below) = (0.0, 0usize);
    for tied in order.chunk_by(|i, j| scores[*i] == scores[*j]) {
        let positives = tied.iter().filter(|i| positive[**i]).count();
        let negatives = tied.len() - positives;
        won += positives as f64 * (below as f64 + negatives as f64 / 2.0);
        below += negatives;
    }
    (pairs > 0.0).then(|| won / pairs)
}

#[test]
fn ties_count_one_half() {
    let positive = [false, false, true, true];
    assert_eq!(auc_of_scores(&[0.1, 0.2, 0.3, 0.4], &positive), Some(1.0));
    assert_eq!(auc_of_scores(&[0.1, 0.3, 0.3, 0.4], &positive), Some(0.875));
    assert_eq!(auc_of_scores(&[0.5; 4], &positive), Some(0.5));
    assert_eq!(auc_of_scores(&[0.5; 2], &[true, true]), None);
}
