//! Kept models as things: versions, starting from one, who may remove one; and evaluations that reveal
//! more than a matrix, where every party's policy lets them.

mod common;

use std::collections::BTreeMap;

use common::{NETWORK, World, allow_all, images, labels, table, with_rules};
use trefoil_client::remote::{JobResult, Part, Remote, RemoteError};
use trefoil_consortium::config::{Kind, Output, Policy, Rule, Verdict};
use trefoil_consortium::{DatasetInfo, JobDescription, JobId, ModelRef};
use trefoil_models::job::Preparation;
use trefoil_models::{HospitalRows, JobKind, outcome, plain_run, schedule};
use trefoil_protocol::ring::Tensor;

type Weights = BTreeMap<String, Tensor>;

async fn run(
    world: &World,
    who: &str,
    remote: &Remote,
    kind: JobKind,
) -> Result<(JobId, JobResult), RemoteError> {
    let job = JobDescription::new("job", world.member(who).1, kind).unwrap();
    let id = remote.submit(job).await?;
    Ok((id, remote.watch(id, &mut |_| {}).await?))
}

/// The two hospitals' test rows lie in the order of their keys.
async fn share(world: &World, seed: u64, test_rows: [usize; 2]) -> plain_run::Tables {
    let mut hospitals = ["st-anna", "st-bernd"];
    hospitals.sort_by_key(|who| world.member(who).1);
    let (x, y) = (images(seed, 24), labels(seed, 24));
    let mut test = Vec::new();
    for (at, (who, rows)) in hospitals.into_iter().zip(test_rows).enumerate() {
        let remote = world.connect(who).await.unwrap();
        if at == 0 {
            let upload = common::upload("shapes", Part::Train, &x, Some(&y));
            remote.upload(upload, &mut |_| {}).await.unwrap();
        }
        let seed = seed + 10 + at as u64;
        let own = (images(seed, rows), labels(seed, rows));
        let upload = common::upload("shapes", Part::Test, &own.0, Some(&own.1));
        remote.upload(upload, &mut |_| {}).await.unwrap();
        test.push(own);
        remote.close().await;
    }
    BTreeMap::from([
        ("train/images".to_owned(), table([&x].into_iter())),
        ("train/labels".to_owned(), table([&y].into_iter())),
        (
            "test/images".to_owned(),
            table(test.iter().map(|own| &own.0)),
        ),
        (
            "test/labels".to_owned(),
            table(test.iter().map(|own| &own.1)),
        ),
    ])
}

/// Training as in `common`, from a model if one is given.
fn train(info: &DatasetInfo, start_from: Option<String>, network: &str) -> JobKind {
    let mut kind = common::train(info, "model");
    if let JobKind::Train {
        spec, network: own, ..
    } = &mut kind
    {
        spec.start_from = start_from;
        *own = network.into();
    }
    kind
}

fn revealed(result: &JobResult, kind: &JobKind) -> Weights {
    let plan = schedule(kind).unwrap();
    let outputs = result.outputs.iter();
    let weights = outputs.filter(|output| plan.save.contains(&output.name));
    weights
        .map(|output| (output.name.clone(), output.tensor.clone()))
        .collect()
}

#[test]
fn training_starts_from_a_version_and_equals_the_plain_run() {
    let seed = common::seed();
    let world = World::start(seed);
    world.run(async {
        let tables = share(&world, seed, [4, 5]).await;
        let anna = world.connect("st-anna").await.unwrap();
        let info = anna.dataset("shapes").await.unwrap();
        let first = train(&info, None, NETWORK);
        let (base, result) = run(&world, "st-anna", &anna, first.clone()).await.unwrap();
        let weights = revealed(&result, &first);
        // A second version: the first one is still there.
        let (newer, _) = run(&world, "st-anna", &anna, first).await.unwrap();
        assert_ne!(base, newer);

        let base = ModelRef::text("model", &base);
        let second = train(&info, Some(base.clone()), NETWORK);
        let (third, result) = run(&world, "st-anna", &anna, second.clone()).await.unwrap();
        let plan = schedule(&second).unwrap();
        let plain = plain_run::run(&plan, &tables, Some(&weights), None, |_, _, _| {}).unwrap();
        let trained = revealed(&result, &second);
        assert_eq!(Some(&trained), plain.outputs.last());
        assert_ne!(trained, weights);

        let held = anna.models().await.unwrap();
        assert!(held.iter().all(|model| model.missing().is_empty()));
        let from: Vec<_> = held
            .iter()
            .map(|model| model.info.started_from.clone())
            .collect();
        assert_eq!(held.len(), 3);
        let made = held
            .iter()
            .position(|model| model.info.job == third)
            .unwrap();
        assert_eq!(from[made], Some(base.clone()));
        assert_eq!(from.iter().flatten().count(), 1);

        // What does not fit is refused, and what differs is said.
        let refusal = async |kind: JobKind| {
            let refused = run(&world, "st-anna", &anna, kind).await;
            refused.unwrap_err().to_string()
        };
        let wide = NETWORK.replace("units = 8", "units = 9");
        let said = refusal(train(&info, Some(base.clone()), &wide)).await;
        assert!(
            said.contains("layer dense1 is") && said.contains("units: 8"),
            "{said}"
        );
        let gone = "model@0123456789abcdef".to_owned();
        let said = refusal(train(&info, Some(gone.clone()), NETWORK)).await;
        assert!(
            said.contains("there is no model") && said.contains(&gone),
            "{said}"
        );
        let mut finer = train(&info, Some(base), NETWORK);
        if let JobKind::Train { spec, .. } = &mut finer {
            spec.frac_bits = 18;
        }
        let said = refusal(finer).await;
        assert!(said.contains("16 fraction bits"), "{said}");
        anna.close().await;
    });
}

#[test]
fn rows_that_are_prepared_otherwise_are_no_rows_to_go_on_with() {
    let seed = common::seed();
    let world = World::start(seed);
    world.run(async {
        share(&world, seed, [4, 5]).await;
        let anna = world.connect("st-anna").await.unwrap();
        let info = anna.dataset("shapes").await.unwrap();
        let prepared = |start_from, mean| {
            let mut kind = train(&info, start_from, NETWORK);
            if let JobKind::Train { spec, .. } = &mut kind {
                spec.preparation = Some(Preparation { mean, std: 0.5 });
            }
            kind
        };
        let (base, _) = run(&world, "st-anna", &anna, prepared(None, 0.25))
            .await
            .unwrap();
        let base = ModelRef::text("model", &base);
        let other = prepared(Some(base.clone()), 0.5);
        let said = run(&world, "st-anna", &anna, other)
            .await
            .unwrap_err()
            .to_string();
        assert!(
            said.contains("mean=0.25,std=0.5, the job's are by mean=0.5"),
            "{said}"
        );
        let alike = prepared(Some(base), 0.25);
        run(&world, "st-anna", &anna, alike).await.unwrap();
        anna.close().await;
    });
}

fn rule(name: &str, verdict: Verdict, change: impl FnOnce(&mut Rule)) -> Rule {
    let mut rule = Rule::new(name, verdict);
    change(&mut rule);
    rule
}

/// Everything is allowed, and after that what `rules` say of removals.
fn removals(rules: Vec<Rule>) -> Policy {
    let jobs = rule("jobs", Verdict::Allow, |rule| {
        rule.kinds = Some(vec![Kind::Train, Kind::Evaluate]);
    });
    with_rules([vec![jobs], rules].concat())
}

#[test]
fn a_party_keeps_a_model_that_its_policy_keeps_and_then_the_others_do_too() {
    let seed = common::seed();
    let keeps = rule("retention", Verdict::Refuse, |rule| {
        rule.kinds = Some(vec![Kind::Remove]);
        rule.models = Some(vec!["model".into()]);
    });
    // P2 keeps it from everybody.
    let mut policies = [removals(vec![]), removals(vec![]), removals(vec![keeps])];
    policies[0].requesters.push("analyst".into());
    let world = World::with_policies(policies);
    world.run(async {
        share(&world, seed, [4, 5]).await;
        let anna = world.connect("st-anna").await.unwrap();
        let info = anna.dataset("shapes").await.unwrap();
        let kind = train(&info, None, NETWORK);
        run(&world, "st-anna", &anna, kind).await.unwrap();
        let held = anna.models().await.unwrap();
        let said = anna
            .remove_model(&held[0].info)
            .await
            .unwrap_err()
            .to_string();
        assert!(said.contains("P2") && said.contains("retention"), "{said}");
        let held = anna.models().await.unwrap();
        assert_eq!(held[0].at, [true; 3], "nobody has removed it");
        anna.close().await;
    });
}

#[test]
fn a_rule_lets_another_member_remove_a_model_and_without_one_its_owner_alone_may() {
    let seed = common::seed();
    let allows = || {
        rule("bernd-clears", Verdict::Allow, |rule| {
            rule.kinds = Some(vec![Kind::Remove]);
            rule.requesters = Some(vec!["st-bernd".into()]);
        })
    };
    let world = World::with_policies([0, 1, 2].map(|_| removals(vec![allows()])));
    world.run(async {
        share(&world, seed, [4, 5]).await;
        let anna = world.connect("st-anna").await.unwrap();
        let info = anna.dataset("shapes").await.unwrap();
        for _ in 0..2 {
            let kind = train(&info, None, NETWORK);
            run(&world, "st-anna", &anna, kind).await.unwrap();
        }
        let held = anna.models().await.unwrap();
        let analyst = world.connect("analyst").await.unwrap();
        let said = analyst.remove_model(&held[0].info).await.unwrap_err();
        assert!(said.to_string().contains("another member"), "{said}");
        let bernd = world.connect("st-bernd").await.unwrap();
        bernd.remove_model(&held[0].info).await.unwrap();
        anna.remove_model(&held[1].info).await.unwrap();
        assert!(anna.models().await.unwrap().is_empty());
    });
}

fn evaluate(model: &str, info: &DatasetInfo, by_hospital: Vec<HospitalRows>) -> JobKind {
    JobKind::Evaluate {
        model: model.into(),
        network: NETWORK.into(),
        frac_bits: 16,
        ring_bits: 64,
        dataset: info.reference("shapes"),
        auc: false,
        calibration: true,
        by_hospital,
    }
}

/// A policy that lets figures by hospital out.
fn named(least: u64) -> Policy {
    let outputs = [
        Output::Metrics,
        Output::Calibration,
        Output::Hospitals,
        Output::Weights,
        Output::Validation,
    ];
    let rule = rule("named", Verdict::Allow, |rule| {
        rule.outputs = Some(outputs.into());
    });
    Policy {
        hospital_rows_min: least,
        ..with_rules(vec![rule])
    }
}

#[test]
fn figures_by_hospital_and_bins_equal_the_plain_run() {
    let seed = common::seed();
    let world = World::with_policies([0, 1, 2].map(|_| named(10)));
    world.run(async {
        let tables = share(&world, seed, [11, 17]).await;
        let anna = world.connect("st-anna").await.unwrap();
        let info = anna.dataset("shapes").await.unwrap();
        let kind = train(&info, None, NETWORK);
        let (_, result) = run(&world, "st-anna", &anna, kind.clone()).await.unwrap();
        let weights = revealed(&result, &kind);
        let kind = evaluate("model", &info, info.by_hospital());
        let (_, result) = run(&world, "st-anna", &anna, kind.clone()).await.unwrap();
        let plan = schedule(&kind).unwrap();
        let plain = plain_run::run(&plan, &tables, Some(&weights), None, |_, _, _| {}).unwrap();
        let expected =
            plain.outputs.iter().enumerate().flat_map(|(step, named)| {
                named.iter().map(move |(name, tensor)| (step, name, tensor))
            });
        let found = result.outputs.iter();
        let found = found.map(|output| (output.step, &output.name, &output.tensor));
        let mut found: Vec<_> = found.collect();
        found.sort_by_key(|(step, name, _)| (*step, (*name).clone()));
        assert_eq!(found, expected.collect::<Vec<_>>());
        let hospitals = plain.outputs.iter().filter_map(|outputs| {
            let counts = outcome::hospital_confusion(outputs).ok()?;
            Some(counts.sum())
        });
        assert_eq!(hospitals.collect::<Vec<_>>(), [11, 17]);

        // Rows that are not those that the hospitals have shared.
        let mut moved = info.by_hospital();
        moved[0].rows += 1;
        moved[1].rows -= 1;
        let kind = evaluate("model", &info, moved);
        let said = run(&world, "st-anna", &anna, kind)
            .await
            .unwrap_err()
            .to_string();
        assert!(said.contains("other hospitals"), "{said}");
        anna.close().await;
    });
}

#[test]
fn figures_by_hospital_need_every_partys_word_and_enough_rows() {
    let seed = common::seed();
    let said = |policies: [Policy; 3]| {
        let world = World::with_policies(policies);
        world.run(async {
            share(&world, seed, [11, 17]).await;
            let anna = world.connect("st-anna").await.unwrap();
            let info = anna.dataset("shapes").await.unwrap();
            let kind = evaluate("model", &info, info.by_hospital());
            run(&world, "st-anna", &anna, kind)
                .await
                .unwrap_err()
                .to_string()
        })
    };
    // A rule that allows everything does not name them.
    let words = said([named(10), allow_all(), named(10)]);
    assert!(
        words.contains("P1") && words.contains("not let out here"),
        "{words}"
    );
    let words = said([named(10), named(10), named(12)]);
    let part = "needs 12 test rows (hospital_rows_min), one has 11";
    assert!(words.contains("P2") && words.contains(part), "{words}");
}
