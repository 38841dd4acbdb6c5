//! Uploads and jobs on a whole consortium: three parties, a dealer and members, each with its own
//! key, runtime and store, over QUIC on loopback.

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::{NETWORK, World, images, labels, table, train};
use trefoil_client::remote::{Event, Part, Remote, RemoteError};
use trefoil_consortium::JobDescription;
use trefoil_consortium::wire::Answer;
use trefoil_models::plain_run;
use trefoil_models::{JobKind, PredictOutput};
use trefoil_protocol::party::PartyId;
use trefoil_protocol::ring::Tensor;

#[test]
fn two_hospitals_share_a_model_is_trained_evaluated_and_predicts_exactly_as_in_the_clear() {
    let seed = common::seed();
    let world = World::start(seed);
    world.run(async {
        let anna = world.connect("st-anna").await.unwrap();
        let bernd = world.connect("st-bernd").await.unwrap();
        let own = [world.member("st-anna"), world.member("st-bernd")];
        let mut train_rows = BTreeMap::new();
        for (at, (remote, rows)) in [(&anna, 13), (&bernd, 11)].into_iter().enumerate() {
            let (x, y) = (
                images(seed + at as u64, rows),
                labels(seed + at as u64, rows),
            );
            let mut staged = 0;
            let upload = common::upload("shapes", Part::Train, &x, Some(&y));
            let receipt = remote
                .upload(upload, &mut |rows| staged = rows)
                .await
                .unwrap();
            assert_eq!((receipt.rows, receipt.number, staged), (rows, 1, rows));
            train_rows.insert(own[at].1, (x, y));
        }
        let (x, y) = (images(seed + 7, 5), labels(seed + 7, 5));
        anna.upload(
            common::upload("shapes", Part::Test, &x, Some(&y)),
            &mut |_| {},
        )
        .await
        .unwrap();
        let info = bernd.dataset("shapes").await.unwrap();
        assert_eq!((info.train_rows, info.test_rows), (24, 5));

        let kind = train(&info, "shapes-mlp");
        let job = JobDescription::new("first", own[0].1, kind.clone()).unwrap();
        let id = anna.submit(job).await.unwrap();
        let mut steps = 0;
        let watched = anna
            .watch(id, &mut |event| {
                steps += usize::from(matches!(event, Event::Progress(_)))
            })
            .await;
        let result = watched.unwrap();

        // The parties order contributions by the hospitals' keys.
        let rows: Vec<&(Tensor, Tensor)> = train_rows.values().collect();
        let mut tables = plain_run::Tables::new();
        tables.insert("train/images".into(), table(rows.iter().map(|(x, _)| x)));
        tables.insert("train/labels".into(), table(rows.iter().map(|(_, y)| y)));
        tables.insert("test/images".into(), table([&x].into_iter()));
        tables.insert("test/labels".into(), table([&y].into_iter()));
        let schedule = trefoil_models::schedule(&kind).unwrap();
        assert_eq!(steps, schedule.steps.len());
        let plain = plain_run::run(&schedule, &tables, None, None, |_, _, _| {}).unwrap();
        compare(&plain.outputs, &result.outputs);
        for (party, stats) in PartyId::ALL.into_iter().zip(&result.parties) {
            assert_eq!(stats.sent_bytes[party.index()], 0);
            assert_eq!(stats.steps, schedule.steps.len() as u64);
            assert_eq!(
                stats.received_bytes[3],
                result.dealer.sent_bytes[party.index()]
            );
            let cost: u64 = schedule
                .steps
                .iter()
                .map(|step| {
                    trefoil_protocol::plan::Plan::new(&schedule.programs[step.program])
                        .cost()
                        .rounds as u64
                })
                .sum();
            assert_eq!(stats.rounds, cost);
        }

        // Somebody else's job is unknown to him.
        let err = bernd.watch(id, &mut |_| {}).await.unwrap_err();
        assert!(err.to_string().contains("knows no job"), "{err}");

        let upload = common::upload("", Part::Predict, &x, None);
        let receipt = bernd.upload(upload, &mut |_| {}).await.unwrap();
        let predict = |upload: &str| JobKind::Predict {
            model: "shapes-mlp".into(),
            network: NETWORK.into(),
            frac_bits: 16,
            ring_bits: 64,
            rows: 5,
            upload: upload.into(),
            output: PredictOutput::Class,
        };
        // The images are bernd's: anna cannot have them classified for herself.
        let stolen = JobDescription::new("stolen", own[0].1, predict(&receipt.upload)).unwrap();
        let id = anna.submit(stolen).await.unwrap();
        let err = anna.watch(id, &mut |_| {}).await.unwrap_err();
        assert!(err.to_string().contains("there is no upload"), "{err}");

        let job = JobDescription::new("predict", own[1].1, predict(&receipt.upload)).unwrap();
        let id = bernd.submit(job).await.unwrap();
        let result = bernd.watch(id, &mut |_| {}).await.unwrap();
        let schedule = trefoil_models::schedule(&predict("x")).unwrap();
        let mut tables = plain_run::Tables::new();
        tables.insert("upload/images".into(), table([&x].into_iter()));
        let predicted =
            plain_run::run(&schedule, &tables, Some(&plain.state), None, |_, _, _| {}).unwrap();
        compare(&predicted.outputs, &result.outputs);

        // The images are gone with their predictions.
        let job = JobDescription::new("again", own[1].1, predict(&receipt.upload)).unwrap();
        let id = bernd.submit(job).await.unwrap();
        assert!(bernd.watch(id, &mut |_| {}).await.is_err());
        anna.close().await;
        bernd.close().await;
    });
}

fn compare(expected: &[BTreeMap<String, Tensor>], found: &[trefoil_client::remote::Revealed]) {
    let mut count = 0;
    for (step, outputs) in expected.iter().enumerate() {
        for (name, tensor) in outputs {
            let revealed = found
                .iter()
                .find(|output| output.step == step && output.name == *name);
            let revealed = revealed.unwrap_or_else(|| panic!("step {step} revealed no {name}"));
            assert_eq!(revealed.tensor.data(), tensor.data(), "step {step}, {name}");
            count += 1;
        }
    }
    assert_eq!(found.len(), count);
}

async fn with_data(world: &World, seed: u64) -> (Remote, JobDescription) {
    let anna = world.connect("st-anna").await.unwrap();
    for (part, rows) in [(Part::Train, 16), (Part::Test, 4)] {
        let (x, y) = (images(seed, rows), labels(seed, rows));
        anna.upload(common::upload("shapes", part, &x, Some(&y)), &mut |_| {})
            .await
            .unwrap();
    }
    let info = anna.dataset("shapes").await.unwrap();
    let job = JobDescription::new("job", world.member("st-anna").1, train(&info, "model")).unwrap();
    (anna, job)
}

#[test]
fn a_party_that_was_told_another_job_refuses_by_name_and_the_next_job_runs() {
    let seed = common::seed();
    let world = World::start(seed);
    world.run(async {
        let (anna, job) = with_data(&world, seed).await;
        let mut other = job.clone();
        other.name = "other".into();
        let ids = [job.id(), job.id(), other.id()];
        anna.submit_each([job.clone(), job.clone(), other])
            .await
            .unwrap();
        let err = anna
            .watch_each(ids, &mut |_| {})
            .await
            .unwrap_err()
            .to_string();
        let expected = format!(
            "P2 has not received job {} from its requester st-anna",
            ids[0]
        );
        assert!(err.contains(&expected), "{err}");

        let mut next = job.clone();
        next.nonce[0] ^= 1;
        let id = anna.submit(next).await.unwrap();
        anna.watch(id, &mut |_| {}).await.unwrap();
    });
}

#[test]
fn strangers_and_members_without_permission_are_refused() {
    let seed = common::seed();
    let world = World::start(seed);
    world.run(async {
        let err = world.connect("stranger").await.unwrap_err();
        assert!(err.to_string().contains("not allowed"), "{err}");

        let (_anna, mut job) = with_data(&world, seed).await;
        let analyst = world.connect("analyst").await.unwrap();
        let err = analyst.submit(job.clone()).await.unwrap_err();
        assert!(err.to_string().contains("as its requester"), "{err}");
        job.requester = world.member("analyst").1;
        let err = analyst.submit(job).await.unwrap_err();
        assert!(
            matches!(err, RemoteError::Refused { .. }) && err.to_string().contains("requesters"),
            "{err}"
        );
        let (x, y) = (images(seed, 3), labels(seed, 3));
        let err = analyst
            .upload(
                common::upload("shapes", Part::Train, &x, Some(&y)),
                &mut |_| {},
            )
            .await
            .unwrap_err();
        assert!(err.to_string().contains("no hospital"), "{err}");
    });
}

#[test]
fn a_damaged_chunk_is_found_before_the_session_and_named() {
    let seed = common::seed();
    let world = World::start(seed);
    world.run(async {
        let (anna, job) = with_data(&world, seed).await;
        let path = world.chunk(PartyId::P1);
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let id = anna.submit(job).await.unwrap();
        let err = anna.watch(id, &mut |_| {}).await.unwrap_err().to_string();
        let name = path.to_string_lossy().into_owned();
        assert!(err.contains("P1: ") && err.contains(&name), "{err}");
    });
}

#[test]
fn an_upload_that_ends_before_its_first_chunk_leaves_nothing_and_a_restarted_party_has_what_was_committed()
 {
    let seed = common::seed();
    let mut world = World::start(seed);
    let (before, folders) = world.run(async {
        let (anna, _) = with_data(&world, seed).await;
        let info = anna.dataset("shapes").await.unwrap();
        let (x, y) = (images(seed, 4), labels(seed, 4));
        let mut other = common::upload("shapes", Part::Train, &x, Some(&y));
        other.shape = vec![1, 2, 8];
        let err = anna.upload(other, &mut |_| {}).await.unwrap_err();
        assert!(err.to_string().contains("data set shapes holds"), "{err}");
        let begun = world.begin_upload(&anna).await;
        assert_eq!(world.staged(), 1);
        let (sender, mut receiver) = begun.split();
        sender.finish().await.unwrap();
        // The party ends the stream when it has cleaned up.
        assert!(!matches!(
            receiver.recv::<Answer>(1 << 20).await,
            Ok(Some(_))
        ));
        anna.close().await;
        (info, world.staged())
    });
    assert_eq!(folders, 0);
    world.restart();
    world.run(async {
        let anna = world.connect("st-anna").await.unwrap();
        assert_eq!(anna.dataset("shapes").await.unwrap(), before);
    });
}

/// Runs a job, ends a node in its midst, and returns what the requester hears and when.
fn end_in_midst(end: impl FnOnce(&mut World)) -> (String, Duration) {
    let seed = common::seed();
    let mut world = World::start(seed);
    let (sender, receiver) = std::sync::mpsc::channel();
    let runtime = world.runtime();
    let connected = world.run(async {
        let (anna, mut job) = with_data(&world, seed).await;
        if let JobKind::Train { spec, .. } = &mut job.kind {
            spec.epochs = 5_000;
        }
        let id = anna.submit(job).await.unwrap();
        (anna, id)
    });
    let watching = std::thread::spawn(move || {
        let (anna, id) = connected;
        runtime.block_on(async {
            let mut on_event = |event| {
                if matches!(event, Event::Progress(_)) {
                    // Only the first is waited for.
                    let _ = sender.send(());
                }
            };
            let err = anna.watch(id, &mut on_event).await.unwrap_err();
            (err.to_string(), Instant::now())
        })
    });
    receiver
        .recv_timeout(Duration::from_secs(60))
        .expect("the job starts");
    let ended = Instant::now();
    end(&mut world);
    let (err, heard) = watching.join().unwrap();
    println!("{err}");
    (err, heard.duration_since(ended))
}

#[test]
fn a_dealer_that_stops_in_mid_run_is_named() {
    let (err, after) = end_in_midst(|world| drop(world.dealer.take()));
    assert!(
        err.contains("dealer") && after < Duration::from_secs(10),
        "{err} after {after:?}"
    );
}

#[test]
fn a_dealer_that_vanishes_in_mid_run_is_named() {
    let (err, after) = end_in_midst(|world| world.dealer.take().unwrap().vanish());
    assert!(
        err.contains("dealer") && after < Duration::from_secs(10),
        "{err} after {after:?}"
    );
}

#[test]
fn a_party_that_vanishes_in_mid_run_is_named() {
    let (err, after) = end_in_midst(|world| world.parties[1].take().unwrap().vanish());
    assert!(
        err.contains("P1") && after < Duration::from_secs(10),
        "{err} after {after:?}"
    );
}
