//! Jobs that outlive machines and links, with real processes: every node is killed (SIGKILL) at
//! random moments and started again alone, a link is cut for longer than any time-out of a session.
//! The result equals, bit for bit, that of an undisturbed run in the clear.
//!
//! The moments follow from a printed seed; `TREFOIL_TEST_SEED` repeats them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use trefoil_client::remote::{Event, JobResult, Part, Remote, RemoteError, Revealed, Upload};
use trefoil_cluster::{Cluster, ClusterSpec, Ends, Link, NodeName};
use trefoil_consortium::{JobDescription, JobId, identity, random_bytes};
use trefoil_models::job::{JobKind, TrainSpec};
use trefoil_models::{plain_run, schedule};
use trefoil_protocol::Tensor;
use trefoil_transport::Settings;

/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(60);
const NETWORK: &str = r#"
name = "tiny"
input = [1, 4, 4]
classes = 3

[[layer]]
kind = "dense"
units = 8

[[layer]]
kind = "relu"

[[layer]]
kind = "dense"
"#;

/// Numbers that follow from a seed (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn printed() -> Numbers {
        let seed = match std::env::var("TREFOIL_TEST_SEED") {
            Ok(text) => text.parse().expect("TREFOIL_TEST_SEED is a number"),
            Err(_) => u64::from_le_bytes(random_bytes().expect("random bytes")),
        };
        println!("TREFOIL_TEST_SEED={seed}");
        Numbers(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

fn settings() -> Settings {
    Settings {
        keep_alive_ms: 500,
        idle_timeout_ms: 3_000,
        // Otherwise the dealer is done with a small job when its first step is.
        look_ahead_bytes: 64 << 10,
        window_bytes: 64 << 10,
        ..Settings::default()
    }
}

fn cluster(link: Link) -> Cluster {
    let spec = ClusterSpec {
        link,
        settings: settings(),
        resume_wait_s: 90,
        ..ClusterSpec::of(env!("CARGO_BIN_EXE_trefoil-under-test"))
    };
    Cluster::start(&spec).expect("the cluster starts")
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

async fn connect(cluster: &Cluster, name: &str) -> Remote {
    let member = cluster.member(name).expect("a member");
    Remote::connect(
        &member.identity,
        cluster.consortium(),
        Some(member.parties),
        &settings(),
    )
    .await
    .expect("the parties are reachable")
}

fn rows(n: usize, part: Part) -> Upload {
    let pixel = |i: usize| (i as u64).wrapping_mul(0x9e37_79b9) >> 17 & 0xffff;
    let label = |i: usize| u64::from(i % 3 == (i / 3) % 3);
    Upload {
        dataset: "shapes".into(),
        part,
        images: Tensor::new(vec![n, 16], (0..16 * n).map(pixel).collect()),
        labels: Some(Tensor::new(vec![n, 3], (0..3 * n).map(label).collect())),
        shape: vec![1, 4, 4],
    }
}

/// Shares a small data set; its rows in the clear.
fn share(cluster: &Cluster) -> plain_run::Tables {
    let mut tables = plain_run::Tables::new();
    runtime().block_on(async {
        let hospital = connect(cluster, "hospital-1").await;
        for (part, name, n) in [(Part::Train, "train", 24), (Part::Test, "test", 5)] {
            let upload = rows(n, part);
            let table = |tensor: &Tensor| plain_run::Table {
                row_words: tensor.shape()[1],
                words: tensor.data().to_vec(),
            };
            tables.insert(format!("{name}/images"), table(&upload.images));
            let labels = upload.labels.as_ref().expect("labelled");
            tables.insert(format!("{name}/labels"), table(labels));
            hospital.upload(upload, &mut |_| {}).await.expect("shared");
        }
        hospital.close().await;
    });
    tables
}

/// A job that is followed on a thread of its own.
struct Running {
    kind: JobKind,
    events: Receiver<Event>,
    watching: JoinHandle<Result<JobResult, RemoteError>>,
}

/// Submits a training: an epoch is three batches and an evaluation of three steps; a checkpoint
/// after every `every` steps. The weights are revealed by the last step.
fn train(cluster: &Cluster, epochs: usize, every: u64, save_as: &str) -> Running {
    let (kind, id) = runtime().block_on(async {
        let analyst = connect(cluster, "analyst").await;
        let info = analyst.dataset("shapes").await.expect("known");
        let kind = JobKind::Train {
            network: NETWORK.into(),
            spec: TrainSpec {
                batch: 8,
                epochs,
                momentum: 0.5,
                ..TrainSpec::default()
            },
            dataset: info.reference("shapes"),
            evaluate_each_epoch: true,
            save_as: save_as.into(),
            reveal_weights: true,
        };
        let member = cluster.member("analyst").expect("a member");
        let pin = identity::pin(&member.identity).expect("a pin");
        let mut job = JobDescription::new(save_as, pin, kind.clone()).expect("a valid job");
        job.checkpoint_every = every;
        let id = analyst.submit(job).await.expect("accepted");
        analyst.close().await;
        (kind, id)
    });
    let (watching, events) = watch(cluster, id);
    Running {
        kind,
        events,
        watching,
    }
}

fn watch(
    cluster: &Cluster,
    id: JobId,
) -> (JoinHandle<Result<JobResult, RemoteError>>, Receiver<Event>) {
    let (sender, events) = mpsc::channel();
    let member = cluster.member("analyst").expect("a member").clone();
    let consortium = cluster.consortium().clone();
    let watching = std::thread::spawn(move || {
        runtime().block_on(async {
            let parties = Some(member.parties);
            let remote =
                Remote::connect(&member.identity, &consortium, parties, &settings()).await?;
            // An error means that the test has seen enough.
            let mut tell = |event| drop(sender.send(event));
            let limit = Duration::from_secs(220);
            tokio::time::timeout(limit, remote.watch(id, &mut tell))
                .await
                .expect("the job ends")
        })
    });
    (watching, events)
}

impl Running {
    fn until<T>(&self, what: &str, fits: impl Fn(Event) -> Option<T>) -> T {
        let begun = Instant::now();
        loop {
            let left = LIMIT.saturating_sub(begun.elapsed());
            let event = self.events.recv_timeout(left);
            let event = event.unwrap_or_else(|err| panic!("{what}: {err}"));
            if let Some(found) = fits(event) {
                return found;
            }
        }
    }

    fn step_after(&self, step: u64) -> u64 {
        self.until("a step", |event| match event {
            Event::Progress(progress) => (progress.step >= step).then_some(progress.step),
            _ => None,
        })
    }

    /// The first step of the next session.
    fn taken_up(&self) -> u64 {
        self.until("the next session", |event| match event {
            Event::Started { from, .. } => Some(from),
            _ => None,
        })
    }

    /// Waits for the end, and compares with a run in the clear.
    fn equals_plain(self, tables: &plain_run::Tables) {
        let result = match self.watching.join().expect("no panic") {
            Ok(result) => result,
            Err(err) => panic!("{err}"),
        };
        let schedule = schedule(&self.kind).expect("valid");
        let plain = plain_run::run(&schedule, tables, None, None, |_, _, _| {}).expect("runs");
        let expected = plain.outputs.iter().enumerate();
        let expected: Vec<Revealed> = expected
            .flat_map(|(step, named)| {
                named.iter().map(move |(name, tensor)| Revealed {
                    step,
                    name: name.clone(),
                    tensor: tensor.clone(),
                })
            })
            .collect();
        let mut found = result.outputs;
        found.sort_by(|a, b| (a.step, &a.name).cmp(&(b.step, &b.name)));
        assert!(found == expected, "the results are others");
        let weights: BTreeMap<_, _> = found
            .into_iter()
            .filter(|output| schedule.save.contains(&output.name))
            .map(|output| (output.name, output.tensor))
            .collect();
        let sha256 = plain_run::weights_sha256(&schedule.save, &weights);
        assert_eq!(sha256, plain.weights_sha256);
    }
}

/// Prints what the nodes have logged where a test fails.
struct Logs<'a>(&'a Cluster);

impl Drop for Logs<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in NodeName::ALL {
                let log = std::fs::read_to_string(self.0.log_path(node)).unwrap_or_default();
                println!("--- {node}\n{log}");
            }
        }
    }
}

fn kill_and_restart(cluster: &Cluster, node: NodeName) {
    cluster.kill(node).expect("killed");
    cluster.restart(node).expect("started again");
}

#[test]
fn each_node_is_killed_at_three_random_moments_and_the_weights_are_those_of_an_undisturbed_run() {
    let mut numbers = Numbers::printed();
    let cluster = cluster(Link::Loopback);
    let _logs = Logs(&cluster);
    let tables = share(&cluster);
    let mut victims: Vec<NodeName> = NodeName::ALL.iter().copied().cycle().take(12).collect();
    for at in (1..victims.len()).rev() {
        victims.swap(at, numbers.below(at as u64 + 1) as usize);
    }
    let job = train(&cluster, 600, 1, "survivor");
    let mut step = job.taken_up();
    for node in victims {
        step = job.step_after(step + numbers.below(12));
        let delay = Duration::from_micros(numbers.below(30_000));
        std::thread::sleep(delay);
        kill_and_restart(&cluster, node);
        let from = job.taken_up();
        println!("{node} killed {delay:?} after step {step}, taken up at {from}");
        step = from;
    }
    job.equals_plain(&tables);
}

#[test]
fn each_node_is_killed_while_a_checkpoint_is_written_and_around_the_last_step() {
    let mut numbers = Numbers::printed();
    let cluster = cluster(Link::Loopback);
    let _logs = Logs(&cluster);
    let tables = share(&cluster);
    for node in NodeName::PARTIES {
        let job = train(&cluster, 8, 1, &format!("half-{node}"));
        job.step_after(3);
        let folder = cluster.node_home(node).join("store/checkpoints");
        let begun = Instant::now();
        let half = loop {
            match half_written(&folder) {
                false if begun.elapsed() < Duration::from_secs(1) => {}
                half => break half,
            }
        };
        kill_and_restart(&cluster, node);
        println!("{node} killed, a checkpoint was half written: {half}");
        job.equals_plain(&tables);
    }
    for node in NodeName::ALL {
        let job = train(&cluster, 8, 1, &format!("late-{node}"));
        let last = 8 * 6;
        job.step_after(last);
        let delay = Duration::from_micros(numbers.below(6_000));
        std::thread::sleep(delay);
        kill_and_restart(&cluster, node);
        println!("{node} killed {delay:?} after the last step");
        job.equals_plain(&tables);
        judge(&cluster, &tables, &format!("late-{node}"));
    }
}

/// A kept model is whole: the three parties' shares of it are of one session, and it judges the test
/// rows.
fn judge(cluster: &Cluster, tables: &plain_run::Tables, model: &str) {
    runtime().block_on(async {
        let analyst = connect(cluster, "analyst").await;
        let info = analyst.dataset("shapes").await.expect("known");
        let kind = JobKind::Evaluate {
            model: model.into(),
            network: NETWORK.into(),
            frac_bits: 16,
            ring_bits: 64,
            dataset: info.reference("shapes"),
            auc: false,
            calibration: false,
            by_hospital: Vec::new(),
        };
        let member = cluster.member("analyst").expect("a member");
        let pin = identity::pin(&member.identity).expect("a pin");
        // A job that begins while a link is dead and not yet found so ends; the next one does not.
        let mut tries = 0;
        let judged = loop {
            tries += 1;
            let name = format!("judge-{tries}");
            let job = JobDescription::new(&name, pin, kind.clone()).expect("a valid job");
            let id = analyst.submit(job).await.expect("accepted");
            match analyst.watch(id, &mut |_| {}).await {
                Err(err) if tries < 3 && err.to_string().contains("no sign of life") => {}
                judged => break judged.expect("judged"),
            }
        };
        let rows: u64 = judged.outputs[0].tensor.data().iter().sum();
        let labels = &tables["test/labels"];
        assert_eq!(rows as usize, labels.words.len() / labels.row_words);
        analyst.close().await;
    });
}

/// Whether a checkpoint is not whole yet.
fn half_written(folder: &Path) -> bool {
    let jobs = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let files = jobs.flat_map(|job| std::fs::read_dir(job.path())).flatten();
    let mut files = files.flatten().map(|file| file.path());
    files.any(|path| path.extension().is_some_and(|extension| extension == "tmp"))
}

fn signal(cluster: &Cluster, node: NodeName, signals: &[&str]) {
    let pid = cluster.pid(node).to_string();
    for signal in signals {
        let sent = std::process::Command::new("kill")
            .args([signal, pid.as_str()])
            .status();
        assert!(sent.expect("kill runs").success(), "{signal} to {node}");
    }
}

#[test]
fn a_node_that_is_told_to_stop_ends_with_the_step_and_no_step_is_done_twice() {
    let cluster = cluster(Link::Loopback);
    let _logs = Logs(&cluster);
    let tables = share(&cluster);
    // No checkpoint but those of the stops.
    let job = train(&cluster, 300, 1_000_000, "stopped");
    assert_eq!(job.taken_up(), 0);
    let mut from = 0;
    for (node, how) in NodeName::ALL
        .into_iter()
        .zip(["-TERM", "-INT", "-TERM", "-INT"])
    {
        let seen = job.step_after(from + 3);
        signal(&cluster, node, &[how]);
        let ended = cluster.wait(node, LIMIT).expect("a node");
        assert!(
            ended.is_some_and(|status| status.success()),
            "{node}: {ended:?}"
        );
        for party in NodeName::PARTIES {
            let folder = cluster.node_home(party).join("store/checkpoints");
            let jobs = std::fs::read_dir(folder).into_iter().flatten().flatten();
            let states = jobs.flat_map(|job| std::fs::read_dir(job.path())).flatten();
            assert!(states.count() > 0, "{party} has written its state down");
        }
        // Before the node is back no step of another session can be heard of.
        let heard = job.events.try_iter().filter_map(|event| match event {
            Event::Progress(progress) => Some(progress.step),
            _ => None,
        });
        let last = heard.fold(seen, u64::max);
        cluster.restart(node).expect("started again");
        from = job.taken_up();
        println!("{node} told to stop after step {seen}, heard of {last}, taken up at {from}");
        assert!(from > last, "{node}: step {last} is done again: {from}");
    }
    job.equals_plain(&tables);
}

#[test]
fn a_node_that_is_told_twice_ends_at_once_and_the_job_goes_on_from_a_checkpoint() {
    let cluster = cluster(Link::Loopback);
    let _logs = Logs(&cluster);
    let tables = share(&cluster);
    let job = train(&cluster, 100, 1, "twice");
    job.step_after(9);
    let node = NodeName::PARTIES[1];
    // It hears both at the same moment.
    signal(&cluster, node, &["-STOP", "-INT", "-TERM", "-CONT"]);
    let ended = cluster.wait(node, LIMIT).expect("a node");
    assert_eq!(ended.and_then(|status| status.code()), Some(130));
    cluster.restart(node).expect("started again");
    job.equals_plain(&tables);
}

#[test]
fn a_link_that_is_cut_for_twenty_seconds_delays_a_job_and_changes_nothing() {
    let cluster = cluster(Link::emulated(2.0, 1_000.0).expect("a link"));
    let _logs = Logs(&cluster);
    let tables = share(&cluster);
    let job = train(&cluster, 12, 1, "cut");
    let step = job.step_after(9);
    let relays = cluster.relays().expect("emulated links");
    let cut = Duration::from_secs(20);
    let begun = Instant::now();
    relays.cut(Ends::Between("p1", "p2"), Some(cut));
    let waits = job.until("the interruption", |event| match event {
        Event::Interrupted(waits) => Some(waits),
        _ => None,
    });
    assert!(waits.contains("resumes from step"), "{waits}");
    let from = job.taken_up();
    println!("cut after step {step}, taken up at {from}: {waits}");
    assert!(from > 0 && begun.elapsed() >= cut, "{from}");
    job.equals_plain(&tables);
}
