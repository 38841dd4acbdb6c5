//! Faults with real processes: a killed node, a wrong certificate, an unreachable party, a port in
//! use, a parent that is killed. Every failure names the peer, in time, and leaves nothing running.

use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::common::{experiment, run, trefoil};
use tempfile::TempDir;
use trefoil_client::remote::{Event, Part, Remote, Upload};
use trefoil_cluster::{Cluster, ClusterSpec, Home, NodeName};
use trefoil_consortium::{JobDescription, identity};
use trefoil_models::Network;
use trefoil_models::job::{DatasetRef, JobKind, TrainSpec};
use trefoil_protocol::Tensor;

/// The others must have ended the session by then.
const LIMIT: Duration = Duration::from_secs(10);

fn cluster() -> Cluster {
    let spec = ClusterSpec::of(env!("CARGO_BIN_EXE_trefoil-under-test"));
    Cluster::start(&spec).expect("the cluster starts")
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

pub(crate) async fn connect(cluster: &Cluster, name: &str) -> Remote {
    let member = cluster.member(name).expect("a member");
    let settings = ClusterSpec::of("").settings;
    Remote::connect(
        &member.identity,
        cluster.consortium(),
        Some(member.parties),
        &settings,
    )
    .await
    .expect("the parties are reachable")
}

pub(crate) fn rows(n: usize, part: Part) -> Upload {
    let images = (0..n * 784)
        .map(|i| (i as u64).wrapping_mul(0x9e37_79b9) >> 17 & 0xffff)
        .collect();
    let labels = (0..n * 10)
        .map(|i| u64::from(i % 10 == (i / 10) % 10))
        .collect();
    Upload {
        dataset: "faults".into(),
        part,
        images: Tensor::new(vec![n, 784], images),
        labels: Some(Tensor::new(vec![n, 10], labels)),
        shape: vec![1, 28, 28],
    }
}

/// Shares rows, and describes a training on them.
pub(crate) async fn training(
    cluster: &Cluster,
    analyst: &Remote,
    name: &str,
    network: &str,
    epochs: usize,
    reveal_weights: bool,
) -> JobDescription {
    let hospital = connect(cluster, "hospital-1").await;
    for (n, part) in [(64, Part::Train), (16, Part::Test)] {
        let uploaded = hospital.upload(rows(n, part), &mut |_| {}).await;
        uploaded.expect("shared");
    }
    hospital.close().await;
    let info = analyst.dataset("faults").await.expect("known");
    let kind = JobKind::Train {
        network: Network::builtin(network).expect("shipped").to_toml(),
        spec: TrainSpec {
            batch: 32,
            epochs,
            ..TrainSpec::default()
        },
        dataset: DatasetRef {
            name: "faults".into(),
            train_rows: info.train_rows as usize,
            test_rows: info.test_rows as usize,
            snapshot: info.snapshot,
        },
        evaluate_each_epoch: false,
        save_as: name.into(),
        reveal_weights,
    };
    let pin = identity::pin(&cluster.member("analyst").expect("a member").identity).expect("a pin");
    JobDescription::new(name, pin, kind).expect("a valid job")
}

/// A training job that would take minutes.
pub(crate) async fn long_job(cluster: &Cluster, analyst: &Remote) -> JobDescription {
    training(cluster, analyst, "long", "chameleon", 5000, false).await
}

/// Kills a node in mid-run; the requester must hear in time, and hear which node.
fn killed(victim: NodeName, name: &str) {
    let cluster = cluster();
    let error = runtime().block_on(async {
        let analyst = connect(&cluster, "analyst").await;
        let job = long_job(&cluster, &analyst).await;
        let id = analyst.submit(job).await.expect("accepted");
        let mut killed_at = None;
        let mut on_event = |event| {
            if let (Event::Progress(progress), None) = (event, killed_at)
                && progress.step >= 2
            {
                cluster.kill(victim).expect("killed");
                killed_at = Some(Instant::now());
            }
        };
        let watched = analyst.watch(id, &mut on_event);
        let limit = Duration::from_secs(60);
        let error = tokio::time::timeout(limit, watched)
            .await
            .expect("the job ends")
            .expect_err("the job fails");
        let waited = killed_at.expect("the job ran").elapsed();
        assert!(waited < LIMIT, "{name}: reported after {waited:?}");
        error.to_string()
    });
    assert!(error.contains(name), "{name} is not named: {error}");
    for node in NodeName::ALL.into_iter().filter(|node| *node != victim) {
        assert!(cluster.usage(node).is_some(), "{node} has ended too");
    }
    let exits = cluster.stop();
    assert!(
        exits.iter().all(|exit| !exit.killed),
        "a surviving node had to be killed: {exits:?}"
    );
}

#[test]
fn a_killed_dealer_ends_the_job_in_time_and_is_named() {
    killed(NodeName::Dealer, "dealer");
}

#[test]
fn a_killed_follower_ends_the_job_in_time_and_is_named() {
    killed(NodeName::P2, "P2");
}

#[test]
fn a_killed_leader_ends_the_job_in_time_and_is_named() {
    killed(NodeName::P0, "P0");
}

#[test]
fn a_stranger_is_refused_by_every_party() {
    let cluster = cluster();
    let stranger = identity::generate("stranger").expect("an identity");
    let parties = cluster.addresses().parties();
    let settings = ClusterSpec::of("").settings;
    let refused = runtime().block_on(Remote::connect(
        &stranger,
        cluster.consortium(),
        Some(parties),
        &settings,
    ));
    let error = refused.expect_err("a stranger gets in").to_string();
    assert!(error.contains('P'), "{error}");
}

#[test]
fn a_party_with_another_certificate_is_refused_with_both_pins() {
    let cluster = cluster();
    let member = cluster.member("analyst").expect("a member");
    let mut consortium = cluster.consortium().clone();
    let other = identity::pin(&identity::generate("other").expect("an identity")).expect("a pin");
    let found = consortium.core.parties[1].pin;
    consortium.core.parties[1].pin = other;
    let settings = ClusterSpec::of("").settings;
    // The file's core is another one too, and P0 may be the first to say so.
    let connect = || {
        let refused = runtime().block_on(Remote::connect(
            &member.identity,
            &consortium,
            Some(member.parties),
            &settings,
        ));
        let error = refused.expect_err("another certificate is taken");
        error.to_string()
    };
    let error = (0..50)
        .map(|_| connect())
        .find(|error| !error.contains("another consortium"))
        .expect("P1's certificate is looked at");
    for part in ["P1".to_string(), other.to_string(), found.to_string()] {
        assert!(error.contains(&part), "{part} is not in: {error}");
    }
}

#[test]
fn an_unreachable_party_is_named_with_its_address() {
    let cluster = cluster();
    let member = cluster.member("analyst").expect("a member");
    // Bound and silent: nothing answers, and nobody else can take the port.
    let silent = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let mut parties = member.parties;
    parties[2] = silent.local_addr().expect("an address");
    let settings = trefoil_transport::Settings {
        connect_timeout_ms: 1_500,
        ..ClusterSpec::of("").settings
    };
    let refused = runtime().block_on(Remote::connect(
        &member.identity,
        cluster.consortium(),
        Some(parties),
        &settings,
    ));
    let error = refused.expect_err("nobody answers").to_string();
    assert!(
        error.contains("P2") && error.contains(&parties[2].to_string()),
        "{error}"
    );
}

/// Homes of nodes with valid keys and configurations, of a cluster that has ended.
fn written_homes(folder: &TempDir) -> PathBuf {
    let home = folder.path().join("home");
    let spec = ClusterSpec {
        home: Home::At(home.clone()),
        ..ClusterSpec::of(env!("CARGO_BIN_EXE_trefoil-under-test"))
    };
    Cluster::start(&spec).expect("the cluster starts").stop();
    home
}

#[test]
fn a_port_in_use_is_an_error_that_names_the_address() {
    let folder = TempDir::new().expect("a temporary folder");
    let home = written_homes(&folder);
    let taken = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let config = home.join("p1/party.toml");
    let text = std::fs::read_to_string(&config).expect("a configuration");
    let text = text.replace("127.0.0.1:0", &address);
    std::fs::write(&config, text).expect("written");
    let (ok, _, stderr) = run(trefoil().arg("party").arg("--config").arg(&config));
    assert!(
        !ok && stderr.contains(&address) && stderr.contains("in use"),
        "{stderr}"
    );
}

#[cfg(unix)]
#[test]
fn a_node_ends_orderly_on_ctrl_c() {
    use std::io::{BufRead, BufReader};
    let folder = TempDir::new().expect("a temporary folder");
    let home = written_homes(&folder);
    let mut node = trefoil()
        .arg("dealer")
        .arg("--config")
        .arg(home.join("dealer/dealer.toml"))
        .env("RUST_LOG", "info")
        .stderr(Stdio::piped())
        .spawn()
        .expect("the tool starts");
    // Its first log line says where it listens.
    let mut line = String::new();
    let stderr = node.stderr.take().expect("piped");
    BufReader::new(stderr)
        .read_line(&mut line)
        .expect("a log line");
    assert!(line.contains("127.0.0.1"), "{line}");
    let killed = std::process::Command::new("kill")
        .arg("-INT")
        .arg(node.id().to_string())
        .status();
    assert!(killed.expect("kill runs").success());
    let start = Instant::now();
    let status = loop {
        if let Some(status) = node.try_wait().expect("a child") {
            break status;
        }
        assert!(start.elapsed() < LIMIT, "it did not end");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
}

/// Processes whose command line mentions a path.
#[cfg(target_os = "linux")]
fn processes(mention: &Path) -> usize {
    let mention = mention.display().to_string();
    let all = std::fs::read_dir("/proc").expect("the process table");
    all.filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok())
        .filter(|line| String::from_utf8_lossy(line).contains(&mention))
        .count()
}

#[cfg(target_os = "linux")]
#[test]
fn simulated_nodes_end_with_their_parent_whatever_ends_it() {
    let folder = TempDir::new().expect("a temporary folder");
    let home = folder.path().join("home");
    let text = "network = \"chameleon\"\n[data]\nsource = \"digits\"\n[training]\nepochs = 500\n";
    let file = experiment(&folder, "long.toml", text);
    let mut parent = trefoil()
        .arg("simulate")
        .arg(&file)
        .arg("--home")
        .arg(&home)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the tool starts");
    let until = |done: &dyn Fn() -> bool, what: &str| {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(20), "{what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    // The parent's own command line mentions the folder too.
    until(&|| processes(&home) == 5, "the nodes did not start");
    parent.kill().expect("killed");
    parent.wait().expect("reaped");
    until(&|| processes(&home) == 0, "nodes outlive their parent");
}
