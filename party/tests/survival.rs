//! Jobs that outlive their sessions: nodes are killed at chosen moments and started again alone, and
//! the result is, bit for bit, that of a run in the clear that nothing disturbed.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use common::{NETWORK, World, images, labels, table};
use trefoil_client::remote::{Event, JobResult, Part, Revealed};
use trefoil_consortium::wire::{self, Ask, CONTROL_VERSION, Request};
use trefoil_consortium::{JobDescription, JobId};
use trefoil_models::early_stop::VALIDATION_RIGHT;
use trefoil_models::{EarlyStop, JobKind, TrainSpec, plain_run};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_protocol::program::Rounding;
use trefoil_protocol::ring::Tensor;
use trefoil_transport::StreamKind;

const LIMIT: Duration = Duration::from_secs(60);

/// A consortium whose jobs wait for lost nodes, with a data set.
fn world(seed: u64, resume_wait_s: u64) -> (World, plain_run::Tables) {
    let mut world = World::start(seed);
    world.resume_wait_s = resume_wait_s;
    world.restart();
    let (x, y) = (images(seed, 24), labels(seed, 24));
    let (test_x, test_y) = (images(seed + 7, 5), labels(seed + 7, 5));
    world.run(async {
        let anna = world.connect("st-anna").await.unwrap();
        for (part, x, y) in [(Part::Train, &x, &y), (Part::Test, &test_x, &test_y)] {
            let upload = common::upload("shapes", part, x, Some(y));
            anna.upload(upload, &mut |_| {}).await.unwrap();
        }
        anna.close().await;
    });
    let one = |tensor: &Tensor| table([tensor].into_iter());
    let tables = BTreeMap::from([
        ("train/images".to_owned(), one(&x)),
        ("train/labels".to_owned(), one(&y)),
        ("test/images".to_owned(), one(&test_x)),
        ("test/labels".to_owned(), one(&test_y)),
    ]);
    (world, tables)
}

/// Submits a training of so many epochs: three batches, then set-up, one batch and the result of an
/// evaluation, each epoch; the weights are revealed at the end.
fn submit(world: &World, epochs: usize, every: u64, rounding: Rounding) -> (JobId, JobKind) {
    let spec = TrainSpec {
        epochs,
        rounding,
        ..TrainSpec::default()
    };
    submit_spec(world, spec, every)
}

/// The same with more said of it.
fn submit_spec(world: &World, spec: TrainSpec, every: u64) -> (JobId, JobKind) {
    submit_network(world, NETWORK, spec, every)
}

/// The same of another network.
fn submit_network(world: &World, network: &str, spec: TrainSpec, every: u64) -> (JobId, JobKind) {
    world.run(async {
        let anna = world.connect("st-anna").await.unwrap();
        let info = anna.dataset("shapes").await.unwrap();
        let kind = JobKind::Train {
            network: network.into(),
            spec: TrainSpec {
                batch: 8,
                momentum: 0.5,
                ..spec
            },
            dataset: info.reference("shapes"),
            evaluate_each_epoch: true,
            save_as: "lasting".into(),
            reveal_weights: true,
        };
        let pin = world.member("st-anna").1;
        let mut job = JobDescription::new("lasting", pin, kind.clone()).unwrap();
        job.checkpoint_every = every;
        let id = anna.submit(job).await.unwrap();
        anna.close().await;
        (id, kind)
    })
}

fn assert_equals_plain(kind: &JobKind, tables: &plain_run::Tables, result: &JobResult) {
    let schedule = trefoil_models::schedule(kind).unwrap();
    let plain = plain_run::run(&schedule, tables, None, None, |_, _, _| {}).unwrap();
    let expected = plain.outputs.iter().enumerate().flat_map(|(step, named)| {
        named.iter().map(move |(name, tensor)| Revealed {
            step,
            name: name.clone(),
            tensor: tensor.clone(),
        })
    });
    let expected: Vec<Revealed> = expected.collect();
    let mut found = result.outputs.clone();
    found.sort_by(|a, b| (a.step, &a.name).cmp(&(b.step, &b.name)));
    assert_eq!(found, expected);
}

/// Waits for an event that fits; all others are passed over.
fn until<T>(events: &Receiver<Event>, what: &str, fits: impl Fn(Event) -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        let left = LIMIT.saturating_sub(begun.elapsed());
        let event = events.recv_timeout(left);
        let event = event.unwrap_or_else(|err| panic!("{what}: {err}"));
        if let Some(found) = fits(event) {
            return found;
        }
    }
}

fn step_after(events: &Receiver<Event>, step: u64) -> u64 {
    until(events, "a step", |event| match event {
        Event::Progress(progress) => (progress.step >= step).then_some(progress.step),
        _ => None,
    })
}

/// The first step of the next session.
fn taken_up(events: &Receiver<Event>) -> u64 {
    until(events, "the next session", |event| match event {
        Event::Started { from, .. } => Some(from),
        _ => None,
    })
}

fn checkpoints(world: &World, party: PartyId, job: JobId) -> Vec<PathBuf> {
    let folder = world.home(party).join(format!("checkpoints/{job}"));
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut states: Vec<PathBuf> = paths
        .filter(|path| path.extension().is_some_and(|ext| ext == "state"))
        .collect();
    states.sort();
    states
}

/// The requester hears of a job's end a moment before it is noted.
fn await_no_checkpoints(world: &World, party: PartyId, job: JobId) {
    let begun = Instant::now();
    while !checkpoints(world, party, job).is_empty() {
        assert!(begun.elapsed() < LIMIT, "checkpoints are left at {party}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn step_of(path: &Path) -> u64 {
    let stem = path.file_stem().unwrap().to_string_lossy();
    stem.parse().unwrap()
}

#[test]
fn every_node_may_be_killed_and_the_weights_are_those_of_an_undisturbed_run() {
    let seed = common::seed();
    let (mut world, tables) = world(seed, 60);
    let (id, kind) = submit(&world, 400, 2, Rounding::Nearest);
    let (watching, events) = world.watch("st-anna", id);
    assert_eq!(taken_up(&events), 0);
    let mut step = 5;
    for peer in [
        Peer::Party(PartyId::P2),
        Peer::Dealer,
        Peer::Party(PartyId::P1),
        Peer::Party(PartyId::P0),
    ] {
        step = step_after(&events, step + 8);
        world.kill_and_restart(peer, |_| {});
        let from = taken_up(&events);
        println!("{peer} was killed after step {step}, the job went on from {from}");
        assert!(from > 0, "{from} after {step}");
    }
    let result = watching.join().unwrap().unwrap();
    assert_equals_plain(&kind, &tables, &result);
    for party in PartyId::ALL {
        await_no_checkpoints(&world, party, id);
        let log = std::fs::read_to_string(world.home(party).join("audit.log")).unwrap();
        let entries = |what: &str| log.matches(&format!("\"what\":\"{what}\"")).count();
        assert_eq!(entries("job_ended"), 1, "{party}");
        assert!(entries("job_started") >= 5, "{party}");
    }
    // Parties that were all started again still have the results, and the model is whole.
    world.restart();
    let (watching, _) = world.watch("st-anna", id);
    let again = watching.join().unwrap().unwrap();
    assert_equals_plain(&kind, &tables, &again);
    world.run(async {
        let anna = world.connect("st-anna").await.unwrap();
        let info = anna.dataset("shapes").await.unwrap();
        let evaluate = JobKind::Evaluate {
            model: "lasting".into(),
            network: NETWORK.into(),
            frac_bits: 16,
            ring_bits: 64,
            dataset: info.reference("shapes"),
            auc: false,
            calibration: false,
            by_hospital: Vec::new(),
        };
        let pin = world.member("st-anna").1;
        let job = JobDescription::new("check", pin, evaluate).unwrap();
        let id = anna.submit(job).await.unwrap();
        let judged = anna.watch(id, &mut |_| {}).await.unwrap();
        let last = result.outputs.iter().rev();
        let mut last = last.filter(|output| output.name == "confusion");
        assert_eq!(judged.outputs[0].tensor, last.next().unwrap().tensor);
    });
}

/// Sessions of a job begin at later steps, and what a step drops out follows from its number in the
/// job: with masks of its number in the session the weights would be others.
#[test]
fn dropout_goes_on_with_the_masks_of_its_steps() {
    let network = NETWORK.replace(
        "kind = \"relu\"\n",
        "kind = \"relu\"\n\n[[layer]]\nkind = \"dropout\"\nrate = 0.5\n",
    );
    assert_ne!(network, NETWORK);
    let seed = common::seed();
    let (mut world, tables) = world(seed, 60);
    let spec = TrainSpec {
        epochs: 200,
        ..TrainSpec::default()
    };
    let (id, kind) = submit_network(&world, &network, spec, 2);
    let (watching, events) = world.watch("st-anna", id);
    assert_eq!(taken_up(&events), 0);
    let mut step = 5;
    for party in [PartyId::P2, PartyId::P0] {
        step = step_after(&events, step + 8);
        world.kill_and_restart(Peer::Party(party), |_| {});
        let from = taken_up(&events);
        println!("{party} was killed after step {step}, the job went on from {from}");
        assert!(from > 0, "{from} after {step}");
    }
    let result = watching.join().unwrap().unwrap();
    assert_equals_plain(&kind, &tables, &result);
}

#[test]
fn an_early_stop_is_decided_alike_by_all_also_after_kills() {
    let seed = common::seed();
    let (mut world, tables) = world(seed, 60);
    // An epoch is two batches, an evaluation of three steps and a validation of three. The patience
    // spans the kills, so that what was opened before them decides.
    let spec = TrainSpec {
        epochs: 900,
        early_stop: Some(EarlyStop {
            patience: 200,
            min_delta: 0.0,
            validation_rows: 8,
        }),
        ..TrainSpec::default()
    };
    let (id, kind) = submit_spec(&world, spec, 1);
    let (watching, events) = world.watch("st-anna", id);
    assert_eq!(taken_up(&events), 0);
    let mut step = 10;
    for peer in [
        Peer::Dealer,
        Peer::Party(PartyId::P1),
        Peer::Party(PartyId::P0),
    ] {
        step = step_after(&events, step + 20);
        world.kill_and_restart(peer, |_| {});
        let from = taken_up(&events);
        println!("{peer} was killed after step {step}, the job went on from {from}");
        assert!(from > 0);
    }
    let result = watching.join().unwrap().unwrap();
    assert_equals_plain(&kind, &tables, &result);
    let schedule = trefoil_models::schedule(&kind).unwrap();
    let epochs = result.outputs.iter();
    let epochs = epochs
        .filter(|output| output.name == VALIDATION_RIGHT)
        .count();
    println!("{epochs} epochs");
    assert!((201..900).contains(&epochs), "{epochs}");
    assert_eq!(
        result.outputs.iter().map(|output| output.step).max(),
        Some(schedule.steps.len() - 1)
    );
    for party in PartyId::ALL {
        await_no_checkpoints(&world, party, id);
        let log = std::fs::read_to_string(world.home(party).join("audit.log")).unwrap();
        assert!(log.contains("\"also_to\":\"the three parties\""), "{party}");
    }
    let dealt = result.dealer.steps;
    assert!(
        dealt <= 8 * epochs as u64 + 1,
        "{dealt} steps were dealt in the last session"
    );
    // All three hold the model of the best epoch.
    world.run(async {
        let anna = world.connect("st-anna").await.unwrap();
        let held = anna.models().await.unwrap();
        assert_eq!(held[0].at, [true; 3]);
    });
}

#[test]
fn stochastic_rounding_goes_on_with_the_same_coins() {
    let seed = common::seed();
    let (mut world, _) = world(seed, 60);
    let (id, _) = submit(&world, 60, 1_000, Rounding::Stochastic);
    let (watching, events) = world.watch("st-anna", id);
    // An epoch's result is revealed, and again after its checkpoint is lost: with other coins the
    // two would differ, and the requester's tool would say so.
    until(&events, "a result", |event| match event {
        Event::Output(output) if output.step > 20 => Some(()),
        _ => None,
    });
    world.kill_and_restart(Peer::Dealer, |world| {
        for path in checkpoints(world, PartyId::P1, id) {
            std::fs::remove_file(path).unwrap();
        }
    });
    // P1 does not know yet that its files are gone: it hears of it when it needs them.
    taken_up(&events);
    watching.join().unwrap().unwrap();
}

#[test]
fn a_damaged_checkpoint_is_set_aside_and_an_older_one_taken() {
    let seed = common::seed();
    let (mut world, tables) = world(seed, 60);
    let (id, kind) = submit(&world, 40, 3, Rounding::Nearest);
    let (watching, events) = world.watch("st-anna", id);
    step_after(&events, 20);
    let mut steps = Vec::new();
    world.kill_and_restart(Peer::Party(PartyId::P1), |world| {
        let found = checkpoints(world, PartyId::P1, id);
        steps = found.iter().map(|path| step_of(path)).collect();
        let newest = found.last().unwrap();
        let mut bytes = std::fs::read(newest).unwrap();
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        std::fs::write(newest, bytes).unwrap();
    });
    let from = taken_up(&events);
    println!("checkpoints {steps:?}, taken up at {from}");
    assert!(from < *steps.last().unwrap());
    let result = watching.join().unwrap().unwrap();
    assert_equals_plain(&kind, &tables, &result);
}

#[test]
fn a_job_whose_node_stays_away_fails_in_time_and_names_it() {
    let seed = common::seed();
    let (mut world, _) = world(seed, 3);
    let (id, _) = submit(&world, 500, 3, Rounding::Nearest);
    let (watching, events) = world.watch("st-anna", id);
    step_after(&events, 5);
    world.parties[2].take().unwrap().vanish();
    let waits = until(&events, "the wait", |event| match event {
        Event::Interrupted(waits) => Some(waits),
        _ => None,
    });
    assert!(
        waits.contains("P2") && waits.contains("resumes from step"),
        "{waits}"
    );
    let gone = Instant::now();
    let err = watching.join().unwrap().unwrap_err().to_string();
    println!("{err}");
    assert!(err.contains("P2") && err.contains("resume_wait_s"), "{err}");
    assert!(gone.elapsed() < Duration::from_secs(40));
    await_no_checkpoints(&world, PartyId::P0, id);
}

#[test]
fn two_sessions_of_a_job_share_no_randomness() {
    let seed = common::seed();
    let (mut world, tables) = world(seed, 60);
    let (id, kind) = submit(&world, 60, 1_000, Rounding::Nearest);
    let (watching, events) = world.watch("st-anna", id);
    // The same result of the same weights, revealed by two sessions: were a key the same, so would
    // be P0's share of it.
    let heard = std::cell::RefCell::new(BTreeMap::new());
    let first_share = |world: &World, wanted: u32| {
        let heard = &heard;
        world.run(async {
            let anna = world.connect("st-anna").await.unwrap();
            let kind = StreamKind::Control;
            let mut stream = anna.links()[0].open(kind, [0; 32]).await.unwrap();
            let version = CONTROL_VERSION;
            let ask = Ask::Watch(id);
            stream.send(&Request { version, ask }).await.unwrap();
            loop {
                let event = stream.recv::<wire::Event>(1 << 20).await.unwrap();
                if let wire::Event::Output {
                    step: 5,
                    attempt,
                    share,
                } = event.expect("it is revealed")
                {
                    heard.borrow_mut().insert(attempt, share.words.0);
                    if attempt >= wanted {
                        return;
                    }
                }
            }
        });
    };
    step_after(&events, 8);
    first_share(&world, 0);
    world.kill_and_restart(Peer::Party(PartyId::P2), |world| {
        let store = world.home(PartyId::P2).join("checkpoints");
        std::fs::remove_dir_all(store).unwrap();
    });
    assert_eq!(taken_up(&events), 0, "P2 has lost its checkpoints");
    first_share(&world, 1);
    let heard = heard.into_inner();
    let (old, new) = (&heard[&0], &heard[heard.keys().last().unwrap()]);
    assert!(old.len() == 9 && heard.len() == 2, "{heard:?}");
    assert!(old.iter().zip(new).all(|(a, b)| a != b), "{heard:?}");
    let result = watching.join().unwrap().unwrap();
    assert_equals_plain(&kind, &tables, &result);
}
