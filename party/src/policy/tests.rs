//! Which rule decides which job, and what is counted for the day.

use trefoil_models::job::DatasetRef;
use trefoil_models::{Benchmark, PredictOutput, TrainSpec};

use super::*;

const NETWORK: &str =
    "name = \"tiny\"\ninput = [1, 4, 4]\nclasses = 3\n[[layer]]\nkind = \"dense\"\n";
/// A minute before a midnight, UTC.
const EVENING: u64 = 20_000 * SECONDS_PER_DAY - 60;

fn job(kind: JobKind) -> JobDescription {
    JobDescription::new("job", Pin::from_bytes([1; 32]), kind).unwrap()
}

fn train(dataset: &str, metrics: bool, weights: bool) -> JobDescription {
    job(JobKind::Train {
        network: NETWORK.into(),
        spec: TrainSpec::default(),
        dataset: DatasetRef {
            name: dataset.into(),
            train_rows: 10,
            test_rows: 2,
            snapshot: [7; 32],
        },
        evaluate_each_epoch: metrics,
        save_as: "model".into(),
        reveal_weights: weights,
    })
}

fn predict(output: PredictOutput, rows: usize) -> JobDescription {
    job(JobKind::Predict {
        model: "model".into(),
        network: NETWORK.into(),
        frac_bits: 16,
        ring_bits: 64,
        rows,
        upload: "upload".into(),
        output,
    })
}

fn desk(home: &Path, rules: Vec<Rule>) -> PolicyDesk {
    let policy = Policy {
        requesters: vec!["anna".into(), "bernd".into()],
        rules,
        ..Policy::default()
    };
    policy.check().unwrap();
    PolicyDesk::open(home, policy, "P1 (west)".into()).unwrap()
}

fn rule(name: &str, verdict: Verdict, change: impl FnOnce(&mut Rule)) -> Rule {
    let mut rule = Rule::new(name, verdict);
    change(&mut rule);
    rule
}

/// `allow`, `ask` or the refusal.
fn says(desk: &PolicyDesk, job: &JobDescription, requester: &str) -> String {
    match desk.rule(job, requester, EVENING) {
        Ok(Ruling { ask: true, rule }) => format!("ask {rule}"),
        Ok(Ruling { ask: false, rule }) => format!("allow {rule}"),
        Err(refusal) => refusal,
    }
}

#[test]
fn naming_others_beside_it_loosens_no_served_members_bound() {
    let home = tempfile::tempdir().unwrap();
    let serve = |name, who: Option<&str>, rows| {
        rule(name, Verdict::Allow, |rule| {
            rule.kinds = Some(vec![Kind::Serve]);
            rule.requesters = who.map(|who| vec![who.to_owned()]);
            rule.rows_per_day = rows;
        })
    };
    let desk = desk(
        home.path(),
        vec![
            serve("anna", Some("anna"), Some(10)),
            serve("bernd", Some("bernd"), Some(70)),
            serve("all", None, None),
        ],
    );
    let job = job(JobKind::Serve(trefoil_models::ServeSpec {
        model: "model".into(),
        network: NETWORK.into(),
        frac_bits: 16,
        ring_bits: 64,
        members: vec![[1; 32], [2; 32]],
        output: PredictOutput::Class,
        max_batch: 4,
        max_wait_ms: 1,
        max_pending: 2,
        rows_per_day: 50,
        duration_s: 60,
    }));
    let limit = |requester, served: &[&str]| {
        let served: Vec<String> = served.iter().map(|name| (*name).to_owned()).collect();
        desk.served_rows(&job, requester, &served).unwrap()
    };
    assert_eq!(limit("anna", &["anna"]), 10);
    // Together they fit the rule without a bound alone.
    assert_eq!(limit("anna", &["anna", "bernd"]), 10);
    assert_eq!(limit("bernd", &["bernd", "anna"]), 10);
    assert_eq!(limit("bernd", &["bernd"]), 50, "the job's own");
}

#[test]
fn without_rules_a_listed_requester_is_held_others_are_refused_and_benchmarks_run() {
    let home = tempfile::tempdir().unwrap();
    let desk = desk(home.path(), vec![]);
    assert_eq!(
        says(&desk, &train("xray", true, false), "anna"),
        "ask no rule fits"
    );
    let refusal = says(&desk, &train("xray", true, false), "carla");
    assert!(refusal.contains("P1 (west): carla may not"), "{refusal}");
    let benchmark = job(JobKind::Benchmark {
        work: Benchmark::Relu { elements: 8 },
        repetitions: 1,
        frac_bits: 16,
        ring_bits: 64,
    });
    assert_eq!(
        says(&desk, &benchmark, "anna"),
        "allow benchmarks read no data"
    );
}

#[test]
fn the_first_rule_that_fits_decides_and_every_condition_counts() {
    let home = tempfile::tempdir().unwrap();
    let list = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
    let rules = vec![
        rule("no-ct", Verdict::Refuse, |r| r.datasets = list(&["ct"])),
        rule("anna-xray", Verdict::Allow, |r| {
            r.requesters = list(&["anna"]);
            r.kinds = Some(vec![Kind::Train]);
            r.datasets = list(&["xray"]);
            r.networks = list(&["tiny"]);
            r.models = list(&["model"]);
        }),
        rule("all-ct", Verdict::Allow, |r| r.datasets = list(&["ct"])),
    ];
    let desk = desk(home.path(), rules.clone());
    let job = train("xray", true, true);
    assert_eq!(says(&desk, &job, "anna"), "allow anna-xray");
    assert_eq!(says(&desk, &job, "bernd"), "ask no rule fits");
    let refusal = says(&desk, &train("ct", true, false), "anna");
    for words in ["P1 (west)", "\"no-ct\"", "data set ct", "operator"] {
        assert!(refusal.contains(words), "{refusal}");
    }
    // A prediction reads no data set: a rule for one does not fit.
    assert_eq!(
        says(&desk, &predict(PredictOutput::Class, 1), "anna"),
        "ask no rule fits"
    );
    // Each condition alone takes the job out of the rule.
    let changes: [fn(&mut Rule); 5] = [
        |r| r.requesters = Some(vec!["bernd".into()]),
        |r| r.kinds = Some(vec![Kind::Evaluate]),
        |r| r.datasets = Some(vec!["mri".into()]),
        |r| r.networks = Some(vec!["large".into()]),
        |r| r.models = Some(vec!["other".into()]),
    ];
    for change in changes {
        let home = tempfile::tempdir().unwrap();
        let mut rules = rules.clone();
        change(&mut rules[1]);
        let desk = self::desk(home.path(), rules);
        assert_eq!(says(&desk, &job, "anna"), "ask no rule fits");
    }
}

fn starting(model: &str) -> JobDescription {
    let mut job = train("xray", false, false);
    if let JobKind::Train { spec, .. } = &mut job.kind {
        spec.start_from = Some(format!("{model}@0123456789abcdef"));
    }
    job
}

#[test]
fn a_permission_covers_every_model_that_is_made_or_read_and_a_restriction_any() {
    let list = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
    let says_of = |verdict, models: &[&str], job: &JobDescription| {
        let home = tempfile::tempdir().unwrap();
        let rule = rule("rule", verdict, |r| r.models = list(models));
        says(&desk(home.path(), vec![rule]), job, "anna")
    };
    let job = starting("base");
    assert_eq!(
        says_of(Verdict::Allow, &["model"], &job),
        "ask no rule fits"
    );
    assert_eq!(says_of(Verdict::Allow, &["base"], &job), "ask no rule fits");
    assert_eq!(
        says_of(Verdict::Allow, &["base", "model"], &job),
        "allow rule"
    );
    assert_eq!(says_of(Verdict::Ask, &["base"], &job), "ask rule");
    let refusal = says_of(Verdict::Refuse, &["base"], &job);
    assert!(refusal.contains("with model model and base"), "{refusal}");
}

#[test]
fn an_early_stop_is_an_output_of_its_own() {
    let home = tempfile::tempdir().unwrap();
    let rules = vec![rule("metrics", Verdict::Allow, |r| {
        r.outputs = Some(vec![Output::Metrics]);
    })];
    let desk = desk(home.path(), rules);
    let mut job = train("xray", true, false);
    assert_eq!(says(&desk, &job, "anna"), "allow metrics");
    if let JobKind::Train { spec, .. } = &mut job.kind {
        spec.early_stop = Some(trefoil_models::EarlyStop {
            patience: 1,
            min_delta: 0.0,
            validation_rows: 5,
        });
    }
    assert_eq!(says(&desk, &job, "anna"), "ask no rule fits");
}

#[test]
fn figures_by_hospital_need_a_rule_that_names_them_whoever_approves() {
    let evaluate = |rows: &[usize]| {
        let each = rows
            .iter()
            .enumerate()
            .map(|(at, rows)| trefoil_models::HospitalRows {
                hospital: [at as u8; 32],
                rows: *rows,
            });
        job(JobKind::Evaluate {
            model: "model".into(),
            network: NETWORK.into(),
            frac_bits: 16,
            ring_bits: 64,
            dataset: DatasetRef {
                name: "xray".into(),
                train_rows: 0,
                test_rows: rows.iter().sum(),
                snapshot: [7; 32],
            },
            auc: false,
            calibration: false,
            by_hospital: each.collect(),
        })
    };
    let says_of = |rules: Vec<Rule>, rows: &[usize]| {
        let home = tempfile::tempdir().unwrap();
        says(&desk(home.path(), rules), &evaluate(rows), "anna")
    };
    let refused = |words: String| assert!(words.contains("not let out here"), "{words}");
    refused(says_of(vec![], &[200, 100]));
    refused(says_of(
        vec![rule("all", Verdict::Allow, |_| {})],
        &[200, 100],
    ));
    refused(says_of(
        vec![rule("all", Verdict::Ask, |_| {})],
        &[200, 100],
    ));
    let named = |verdict| {
        vec![rule("named", verdict, |r| {
            r.outputs = Some(vec![Output::Metrics, Output::Hospitals]);
        })]
    };
    assert_eq!(says_of(named(Verdict::Allow), &[200, 100]), "allow named");
    assert_eq!(says_of(named(Verdict::Ask), &[200, 100]), "ask named");
    let few = says_of(named(Verdict::Allow), &[200, 99]);
    assert!(
        few.contains("needs 100 test rows") && few.contains("one has 99"),
        "{few}"
    );
    // Without such figures the same evaluation is as ever.
    assert_eq!(says_of(named(Verdict::Allow), &[]), "allow named");
}

#[test]
fn a_permission_covers_all_outputs_and_a_restriction_any() {
    let home = tempfile::tempdir().unwrap();
    let only = |outputs: &[Output]| Some(outputs.to_vec());
    let rules = vec![
        rule("weights-ask", Verdict::Ask, |r| {
            r.outputs = only(&[Output::Weights])
        }),
        rule("metrics", Verdict::Allow, |r| {
            r.outputs = only(&[Output::Metrics, Output::Class])
        }),
        rule("rest", Verdict::Refuse, |_| {}),
    ];
    let desk = desk(home.path(), rules);
    assert_eq!(
        says(&desk, &train("x", true, true), "anna"),
        "ask weights-ask"
    );
    assert_eq!(
        says(&desk, &train("x", true, false), "anna"),
        "allow metrics"
    );
    assert_eq!(
        says(&desk, &train("x", false, false), "anna"),
        "allow metrics"
    );
    assert_eq!(
        says(&desk, &predict(PredictOutput::Class, 3), "anna"),
        "allow metrics"
    );
    for output in [PredictOutput::Logits, PredictOutput::Probabilities] {
        let refusal = says(&desk, &predict(output, 3), "anna");
        assert!(
            refusal.contains("\"rest\" refuses a prediction of anna"),
            "{refusal}"
        );
    }
}

#[test]
fn rows_of_a_day_are_counted_by_requester_over_restarts_and_begin_anew_at_midnight() {
    let home = tempfile::tempdir().unwrap();
    let limited = rule("classes", Verdict::Allow, |r| {
        r.kinds = Some(vec![Kind::Predict]);
        r.rows_per_day = Some(10);
    });
    let open = || desk(home.path(), vec![limited.clone()]);
    let desk = open();
    let six = predict(PredictOutput::Class, 6);
    desk.rule(&six, "anna", EVENING).unwrap();
    desk.count(&six, EVENING).unwrap();
    for desk in [&desk, &open()] {
        let refusal = desk.rule(&six, "anna", EVENING).unwrap_err();
        for words in ["\"classes\"", "10 predictions", "6 are used", "asks for 6"] {
            assert!(refusal.contains(words), "{refusal}");
        }
        let four = predict(PredictOutput::Class, 4);
        desk.rule(&four, "anna", EVENING).unwrap();
        let mut other = six.clone();
        other.requester = Pin::from_bytes([2; 32]);
        desk.rule(&other, "bernd", EVENING).unwrap();
    }
    let desk = open();
    let morning = EVENING + 60;
    desk.rule(&six, "anna", morning).unwrap();
    desk.count(&six, morning).unwrap();
    assert!(desk.rule(&six, "anna", morning).is_err());
    assert!(
        desk.rule(&six, "anna", EVENING).is_err(),
        "a clock that goes back begins no new day"
    );
    // Other kinds are not counted.
    desk.count(&train("x", true, false), morning).unwrap();
    assert_eq!(desk.used(six.requester, morning), 6);
}

fn knn(queries: Queries) -> JobDescription {
    job(JobKind::Neighbours(NeighbourSpec {
        dataset: DatasetRef {
            name: "xray".into(),
            train_rows: 10,
            test_rows: 2,
            snapshot: [7; 32],
        },
        input: [1, 4, 4],
        classes: 3,
        k: 1,
        frac_bits: 13,
        ring_bits: 64,
        queries,
    }))
}

fn of_images(rows: usize) -> JobDescription {
    let upload = "upload".into();
    knn(Queries::Upload { rows, upload })
}

#[test]
fn nearest_rows_run_only_where_a_rule_lets_them() {
    let list = |name: &str| Some(vec![name.to_owned()]);
    let says_of = |verdict, job: &JobDescription, change: &dyn Fn(&mut Rule)| {
        let home = tempfile::tempdir().unwrap();
        let rules = vec![
            rule("rule", verdict, change),
            rule("rest", Verdict::Refuse, |_| {}),
        ];
        says(&desk(home.path(), rules), job, "anna")
    };
    let refused = "\"rest\" refuses a classification by nearest rows of anna on data set xray";
    let (images, test) = (of_images(3), knn(Queries::Test));
    for job in [&images, &test] {
        let home = tempfile::tempdir().unwrap();
        let bare = desk(home.path(), vec![]);
        assert_eq!(says(&bare, job, "anna"), "ask no rule fits");
        assert!(says(&bare, job, "carla").contains("carla may not"));

        let allows: [&dyn Fn(&mut Rule); 3] = [
            &|r| r.kinds = Some(vec![Kind::Knn]),
            &|r| r.datasets = list("xray"),
            &|r| r.outputs = Some(vec![Output::Class, Output::Metrics]),
        ];
        for change in allows {
            assert_eq!(says_of(Verdict::Allow, job, change), "allow rule");
        }
        // It has no network and no model, and is neither a prediction nor an evaluation.
        let others: [&dyn Fn(&mut Rule); 5] = [
            &|r| {
                r.kinds = Some(vec![
                    Kind::Predict,
                    Kind::Serve,
                    Kind::Evaluate,
                    Kind::Train,
                ])
            },
            &|r| r.datasets = list("mri"),
            &|r| r.networks = list("tiny"),
            &|r| r.models = list("model"),
            &|r| r.outputs = Some(vec![Output::Probabilities, Output::Weights]),
        ];
        for change in others {
            let refusal = says_of(Verdict::Allow, job, change);
            assert!(refusal.contains(refused), "{refusal}");
        }
    }

    // What comes out of the test rows is another output than the classes of images.
    let only = |output| move |r: &mut Rule| r.outputs = Some(vec![output]);
    let class = only(Output::Class);
    let metrics = only(Output::Metrics);
    assert_eq!(says_of(Verdict::Allow, &images, &class), "allow rule");
    assert_eq!(says_of(Verdict::Allow, &test, &metrics), "allow rule");
    let refusal = says_of(Verdict::Allow, &images, &metrics);
    assert!(refusal.contains("that reveals class"), "{refusal}");
    let refusal = says_of(Verdict::Allow, &test, &class);
    assert!(refusal.contains("that reveals metrics"), "{refusal}");
}

#[test]
fn images_classified_by_nearest_rows_count_as_predictions_of_the_day() {
    let home = tempfile::tempdir().unwrap();
    let desk = desk(
        home.path(),
        vec![rule("predictions", Verdict::Allow, |r| {
            r.kinds = Some(vec![Kind::Predict, Kind::Knn]);
            r.rows_per_day = Some(10);
        })],
    );
    let six = of_images(6);
    assert_eq!(says(&desk, &six, "anna"), "allow predictions");
    desk.count(&six, EVENING).unwrap();
    let refusal = says(&desk, &six, "anna");
    assert!(
        refusal.contains("6 are used and this job asks for 6"),
        "{refusal}"
    );
    let four = predict(PredictOutput::Class, 4);
    assert_eq!(says(&desk, &four, "anna"), "allow predictions");
    desk.count(&four, EVENING).unwrap();
    assert!(says(&desk, &of_images(1), "anna").contains("10 are used"));
    // A matrix of the test rows is no prediction.
    assert_eq!(
        says(&desk, &knn(Queries::Test), "anna"),
        "allow predictions"
    );
    desk.count(&knn(Queries::Test), EVENING).unwrap();
    assert_eq!(desk.used(six.requester, EVENING), 10);
}

#[test]
fn damaged_counts_are_named() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("predictions.json"), "{\"day\": 1").unwrap();
    let err = PolicyDesk::open(home.path(), Policy::default(), "P1".into()).unwrap_err();
    let err = err.to_string();
    assert!(
        err.contains("predictions.json") && err.contains("remove it"),
        "{err}"
    );
}
