//! Consent on a whole consortium: what runs, what waits, what is refused, and what the homes say of
//! it afterwards.

mod common;

use std::time::Duration;

use common::{NETWORK, World, allow_all, images, labels, train, with_rules};
use trefoil_client::consent::{self as operator, ApproveArgs, JobsArgs, VerifyArgs};
use trefoil_client::remote::{Event, Part, Remote, RemoteError};
use trefoil_consortium::config::{Kind, Output, Policy, Rule, Verdict};
use trefoil_consortium::{JobDescription, JobId};
use trefoil_models::{JobKind, PredictOutput};
use trefoil_party::audit::{self, AUDIT_FILE};
use trefoil_party::desk::{self, Choice, Decision, JobRecord, JobState};
use trefoil_protocol::party::PartyId;

/// A party that holds every job for a person.
fn asks() -> Policy {
    with_rules(vec![])
}

/// A job that trains in no time, and a hospital that may ask for it.
async fn with_job(world: &World, seed: u64) -> (Remote, JobDescription) {
    let anna = world.connect("st-anna").await.unwrap();
    for (part, rows) in [(Part::Train, 16), (Part::Test, 4)] {
        let (x, y) = (images(seed, rows), labels(seed, rows));
        let upload = common::upload("shapes", part, &x, Some(&y));
        anna.upload(upload, &mut |_| {}).await.unwrap();
    }
    let info = anna.dataset("shapes").await.unwrap();
    let job = JobDescription::new("job", world.member("st-anna").1, train(&info, "model")).unwrap();
    (anna, job)
}

fn record(world: &World, party: PartyId, id: JobId) -> JobRecord {
    desk::find(&world.home(party), &id.to_string()).unwrap()
}

/// Waits until a party's home says something of a job.
async fn until(world: &World, party: PartyId, id: JobId, says: impl Fn(&JobRecord) -> bool) {
    let waiting = async {
        while !says(&record(world, party, id)) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(30), waiting).await;
    waited.unwrap_or_else(|_| panic!("{party} has {:?}", record(world, party, id)));
}

/// Decides as an operator does, and waits until the party has acted.
async fn decide(world: &World, party: PartyId, id: JobId, choice: Choice, reason: &str) {
    let home = world.home(party);
    let found = record(world, party, id);
    desk::decide(&home, &Decision::new(&found, choice, "op", reason)).unwrap();
    let taking = async {
        while desk::undecided(&home, &found.job) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let taken = tokio::time::timeout(Duration::from_secs(30), taking).await;
    taken.expect("the party takes the decision");
}

fn log(world: &World, party: PartyId) -> String {
    let path = world.home(party).join(AUDIT_FILE);
    audit::verify(&path, &mut |_| {}).unwrap();
    std::fs::read_to_string(path).unwrap()
}

/// Places of these texts in a log, each after the one before.
fn in_order(log: &str, texts: &[&str]) {
    let mut at = 0;
    for text in texts {
        let found = log[at..].find(text);
        at += found.unwrap_or_else(|| panic!("no {text} after byte {at} of\n{log}"));
    }
}

#[test]
fn a_held_job_runs_when_all_three_have_approved_its_hash_and_another_hash_stays_held() {
    let seed = common::seed();
    let world = World::with_policies([asks(), asks(), asks()]);
    world.run(async {
        let (anna, job) = with_job(&world, seed).await;
        let mut other = job.clone();
        other.nonce[0] ^= 1;
        let id = anna.submit(job).await.unwrap();
        let other = anna.submit(other).await.unwrap();
        for party in PartyId::ALL {
            assert_eq!(record(&world, party, id).state, JobState::Held);
        }
        let mut heard = Vec::new();
        let watching = async {
            let mut on_event = |event| match event {
                Event::Held { at, .. } => heard.push(format!("held at {at}")),
                Event::Approved { at, .. } => heard.push(format!("approved at {at}")),
                Event::Started { .. } => heard.push("started".into()),
                Event::Interrupted(_)
                | Event::Progress(_)
                | Event::Output(_)
                | Event::Waits { .. } => {}
            };
            anna.watch(id, &mut on_event).await
        };
        let deciding = async {
            // As an operator types it.
            let args = ApproveArgs {
                job: id.to_string()[..8].to_uppercase(),
                config: world.config(PartyId::P1),
                deny: false,
                reason: String::new(),
                network: true,
                yes: true,
            };
            let approving = {
                let args = args.clone();
                tokio::task::spawn_blocking(move || operator::approve(&args))
            };
            approving.await.unwrap().unwrap();
            assert_eq!(record(&world, PartyId::P1, id).state, JobState::Waiting);
            let err = operator::approve(&args).unwrap_err().to_string();
            assert!(
                err.contains("it is waiting"),
                "a job is approved once: {err}"
            );
            assert_eq!(record(&world, PartyId::P0, id).state, JobState::Held);
            decide(&world, PartyId::P0, id, Choice::Approve, "").await;
            // P0 has asked, and P2 has not consented.
            let waits = |record: &JobRecord| record.note == "waiting for approval at P2 (p2)";
            until(&world, PartyId::P0, id, waits).await;
            assert_eq!(record(&world, PartyId::P2, id).state, JobState::Held);
            decide(&world, PartyId::P2, id, Choice::Approve, "").await;
        };
        let (watched, ()) = tokio::join!(watching, deciding);
        watched.unwrap();
        for party in PartyId::ALL {
            until(&world, party, id, |record| record.state == JobState::Done).await;
            let label = format!("{party} (p{})", party.index());
            let places = [
                format!("held at {label}"),
                format!("approved at {label}"),
                "started".into(),
            ];
            let places = places.map(|text| heard.iter().position(|words| *words == text).unwrap());
            assert!(places.is_sorted(), "{heard:?}");
            assert_eq!(
                record(&world, party, other).state,
                JobState::Held,
                "approved is a hash"
            );
        }
    });
    let config = world.config(PartyId::P2);
    let jobs = JobsArgs {
        config: config.clone(),
        all: false,
        json: false,
    };
    operator::jobs(&jobs).unwrap();
    let verify = |head: Option<String>| {
        let config = Some(config.clone());
        operator::audit(&operator::AuditCommand::Verify(VerifyArgs {
            config,
            file: None,
            head,
            json: false,
        }))
    };
    let mut heads = Vec::new();
    let path = world.home(PartyId::P2).join(AUDIT_FILE);
    audit::verify(&path, &mut |head| heads.push(head.to_owned())).unwrap();
    verify(None).unwrap();
    verify(Some(heads[2].to_uppercase())).unwrap();
    let err = verify(Some("0".repeat(64))).unwrap_err().to_string();
    assert!(err.contains("no entry has the noted hash"), "{err}");
    // In each log: who approved, and outputs after that, named, with their receiver.
    for party in PartyId::ALL {
        in_order(
            &log(&world, party),
            &[
                "\"what\":\"upload_committed\",\"who\":\"st-anna\"",
                "\"what\":\"job_held\"",
                "THE TRAINED WEIGHTS",
                "\"what\":\"job_approved\",\"who\":\"operator ",
                "\"what\":\"job_started\"",
                "\"what\":\"outputs_revealed\",\"who\":\"st-anna\"",
                "\"name\":\"confusion\"",
                "\"what\":\"job_ended\"",
                "\"state\":\"done\"",
            ],
        );
    }
}

#[test]
fn a_denial_reaches_the_requester_with_the_party_and_the_reason_and_ends_the_job_everywhere() {
    let seed = common::seed();
    let world = World::with_policies([allow_all(), asks(), allow_all()]);
    world.run(async {
        let (anna, job) = with_job(&world, seed).await;
        let id = anna.submit(job.clone()).await.unwrap();
        let link = anna.links()[1].clone();
        let mut held = 0;
        let mut on_event = |event| {
            // The link breaks while the job waits: the requester comes back and hears the end.
            if matches!(event, Event::Held { .. }) {
                held += 1;
                link.close("broken by the test");
            }
        };
        let deciding = async {
            link.closed().await;
            decide(&world, PartyId::P1, id, Choice::Deny, "ask the board first").await;
        };
        let (watched, ()) = tokio::join!(anna.watch(id, &mut on_event), deciding);
        assert_eq!(held, 1);
        let err = watched.unwrap_err().to_string();
        let expected = "P1 (p1): denied by its operator: ask the board first";
        assert!(err.contains(expected), "{err}");
        for party in PartyId::ALL {
            until(&world, party, id, |record| record.state.over()).await;
        }
        assert_eq!(record(&world, PartyId::P1, id).state, JobState::Denied);
        // The same hash does not come again.
        let err = anna.submit(job).await.unwrap_err().to_string();
        assert!(err.contains("known already"), "{err}");
    });
}

#[test]
fn what_is_held_and_approved_survives_a_restart_of_all_parties() {
    let seed = common::seed();
    let mut world = World::with_policies([allow_all(), asks(), asks()]);
    let id = world.run(async {
        let (anna, job) = with_job(&world, seed).await;
        let id = anna.submit(job).await.unwrap();
        decide(&world, PartyId::P1, id, Choice::Approve, "").await;
        anna.close().await;
        id
    });
    world.restart();
    world.run(async {
        let anna = world.connect("st-anna").await.unwrap();
        let approved = record(&world, PartyId::P1, id);
        assert_eq!(approved.state, JobState::Waiting);
        assert!(
            approved.approved_by.starts_with("operator op"),
            "{approved:?}"
        );
        assert_eq!(record(&world, PartyId::P2, id).state, JobState::Held);
        let deciding = decide(&world, PartyId::P2, id, Choice::Approve, "");
        let mut ignore = |_| {};
        let (watched, ()) = tokio::join!(anna.watch(id, &mut ignore), deciding);
        watched.unwrap();
    });
}

#[test]
fn a_job_that_nobody_approves_in_time_expires_there_and_ends_at_p0() {
    let seed = common::seed();
    let hurried = Policy {
        approval_timeout_s: 1,
        ..asks()
    };
    let world = World::with_policies([allow_all(), hurried, allow_all()]);
    world.run(async {
        let (anna, job) = with_job(&world, seed).await;
        let id = anna.submit(job).await.unwrap();
        let err = anna.watch(id, &mut |_| {}).await.unwrap_err().to_string();
        assert!(
            err.contains("P1 (p1): nobody approved the job within 1 s"),
            "{err}"
        );
        // The requester hears of it before it is written down.
        until(&world, PartyId::P1, id, |record| {
            record.state == JobState::Expired
        })
        .await;
        // P0 hears of it when it asks again.
        until(&world, PartyId::P0, id, |record| record.state.over()).await;
    });
}

#[test]
fn a_job_that_ran_when_its_party_was_killed_is_over_after_the_restart() {
    let seed = common::seed();
    let mut world = World::start(seed);
    let id = world.run(async {
        let (anna, mut job) = with_job(&world, seed).await;
        if let JobKind::Train { spec, .. } = &mut job.kind {
            spec.epochs = 5_000;
        }
        let id = anna.submit(job).await.unwrap();
        until(&world, PartyId::P1, id, |record| {
            record.state == JobState::Running
        })
        .await;
        id
    });
    world.parties[1].take().unwrap().vanish();
    assert_eq!(record(&world, PartyId::P1, id).state, JobState::Running);
    world.restart();
    let record = record(&world, PartyId::P1, id);
    assert_eq!(record.state, JobState::Failed);
    assert!(
        record.note.contains("P1 (p1) ended while the job ran"),
        "{record:?}"
    );
    in_order(
        &log(&world, PartyId::P1),
        &["\"job_started\"", "\"party_started\"", "\"job_ended\""],
    );
}

fn predict(output: PredictOutput) -> JobKind {
    JobKind::Predict {
        model: "model".into(),
        network: NETWORK.into(),
        frac_bits: 16,
        ring_bits: 64,
        rows: 5,
        upload: "upload".into(),
        output,
    }
}

#[test]
fn a_policy_lets_one_job_run_and_refuses_another_by_rule_party_and_output() {
    let seed = common::seed();
    let mut trainings = Rule::new("trainings", Verdict::Allow);
    trainings.kinds = Some(vec![Kind::Train]);
    let mut classes = Rule::new("classes", Verdict::Allow);
    classes.kinds = Some(vec![Kind::Predict]);
    classes.outputs = Some(vec![Output::Class]);
    classes.rows_per_day = Some(9);
    let strict = with_rules(vec![
        trainings,
        classes,
        Rule::new("nothing-else", Verdict::Refuse),
    ]);
    let world = World::with_policies([allow_all(), allow_all(), strict]);
    world.run(async {
        let (anna, job) = with_job(&world, seed).await;
        let pin = world.member("st-anna").1;
        let id = anna.submit(job).await.unwrap();
        anna.watch(id, &mut |_| {}).await.unwrap();

        let logits = JobDescription::new("logits", pin, predict(PredictOutput::Logits)).unwrap();
        let err = anna.submit(logits).await.unwrap_err();
        let RemoteError::Refused { party, reason, .. } = &err else {
            panic!("{err}");
        };
        assert_eq!(*party, PartyId::P2);
        for words in ["P2 (p2)", "\"nothing-else\"", "logits", "operator"] {
            assert!(reason.contains(words), "{reason}");
        }

        // Five images and no more than nine a day; the count is the party's own.
        let receipts = async {
            let x = images(seed, 5);
            let upload = common::upload("", Part::Predict, &x, None);
            anna.upload(upload, &mut |_| {}).await.unwrap().upload
        };
        let mut kind = predict(PredictOutput::Class);
        if let JobKind::Predict { upload, .. } = &mut kind {
            *upload = receipts.await;
        }
        let classes = JobDescription::new("classes", pin, kind.clone()).unwrap();
        let id = anna.submit(classes).await.unwrap();
        anna.watch(id, &mut |_| {}).await.unwrap();
        let again = JobDescription::new("again", pin, kind).unwrap();
        let err = anna.submit(again).await.unwrap_err().to_string();
        assert!(
            err.contains("9 predictions a day (UTC), 5 are used"),
            "{err}"
        );
    });
    in_order(
        &log(&world, PartyId::P2),
        &[
            "\"name\":\"classes\"",
            "\"what\":\"outputs_revealed\"",
            "\"rows\":5",
        ],
    );
}

#[test]
fn a_running_job_that_one_operator_cancels_ends_at_all_parties_with_the_reason() {
    let seed = common::seed();
    let world = World::start(seed);
    world.run(async {
        let (anna, mut job) = with_job(&world, seed).await;
        if let JobKind::Train { spec, .. } = &mut job.kind {
            spec.epochs = 5_000;
        }
        let id = anna.submit(job.clone()).await.unwrap();
        let deciding = async {
            until(&world, PartyId::P2, id, |record| {
                record.state == JobState::Running
            })
            .await;
            decide(
                &world,
                PartyId::P2,
                id,
                Choice::Cancel,
                "we need the machine",
            )
            .await;
        };
        let mut ignore = |_| {};
        let (watched, ()) = tokio::join!(anna.watch(id, &mut ignore), deciding);
        let err = watched.unwrap_err().to_string();
        let expected = "P2 (p2): cancelled by its operator: we need the machine";
        assert!(err.contains(expected), "{err}");
        for party in PartyId::ALL {
            until(&world, party, id, |record| record.state.over()).await;
            let record = record(&world, party, id);
            assert!(record.note.contains(expected), "{record:?}");
        }
        assert_eq!(record(&world, PartyId::P2, id).state, JobState::Cancelled);

        // The parties are free for the next one.
        if let JobKind::Train { spec, .. } = &mut job.kind {
            spec.epochs = 1;
        }
        let id = anna.submit(job).await.unwrap();
        anna.watch(id, &mut |_| {}).await.unwrap();
    });
}

#[test]
fn a_job_that_waits_elsewhere_can_be_cancelled_at_p0_and_withdrawn_by_its_requester() {
    let seed = common::seed();
    let world = World::with_policies([allow_all(), asks(), allow_all()]);
    world.run(async {
        let (anna, job) = with_job(&world, seed).await;
        let mut other = job.clone();
        other.nonce[0] ^= 1;
        let id = anna.submit(job).await.unwrap();
        decide(&world, PartyId::P0, id, Choice::Cancel, "").await;
        for party in [PartyId::P1, PartyId::P2] {
            until(&world, party, id, |record| record.state.over()).await;
            let record = record(&world, party, id);
            assert!(
                record.note.contains("P0 (p0): cancelled by its operator"),
                "{record:?}"
            );
        }
        let id = anna.submit(other).await.unwrap();
        anna.withdraw(id).await.unwrap();
        for party in PartyId::ALL {
            assert_eq!(record(&world, party, id).state, JobState::Withdrawn);
        }
    });
}
