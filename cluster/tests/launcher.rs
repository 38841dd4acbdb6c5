//! The launcher, with a stand-in for the nodes (`src/bin/fake_node.rs`).
//! Nothing here waits for time to pass: every wait is for an event, with a
//! generous deadline.

use std::io::{BufRead, BufReader};
use std::net::UdpSocket;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use trefoil_cluster::{Cluster, ClusterError, ClusterSpec, Home, Link, NodeAddresses, NodeName};

const LONG: Duration = Duration::from_secs(20);

fn spec(home: &Path) -> ClusterSpec {
    let mut spec = ClusterSpec::of(env!("CARGO_BIN_EXE_trefoil-fake-node"));
    spec.home = Home::At(home.to_owned());
    // A cluster of stand-ins starts in no time, on a busy machine in little.
    spec.start_timeout = LONG;
    spec.stop_timeout = LONG;
    spec
}

fn faulty(home: &Path, fault: &str) -> ClusterSpec {
    let mut spec = spec(home);
    spec.env.insert("TREFOIL_FAKE_NODE".into(), fault.into());
    spec
}

fn start_error(spec: &ClusterSpec) -> String {
    Cluster::start(spec)
        .err()
        .expect("it must not start")
        .to_string()
}

/// What a node was told, once it has written it down.
fn introduced(cluster: &Cluster, node: NodeName) -> NodeAddresses {
    let path = cluster.node_home(node).join("introduced.json");
    let mut text = String::new();
    until(|| {
        text = std::fs::read_to_string(&path).unwrap_or_default();
        text.ends_with('\n')
    });
    let line: serde_json::Value = serde_json::from_str(&text).unwrap();
    serde_json::from_value(line["addresses"].clone()).unwrap()
}

fn until(mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < LONG, "waited too long");
        std::thread::yield_now();
    }
}

/// Processes with `folder` in their command line, where the system lists them.
fn running_with(folder: &Path) -> usize {
    let Ok(processes) = std::fs::read_dir("/proc") else {
        return 0;
    };
    let folder = folder.to_string_lossy().into_owned();
    processes
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .filter(|line| String::from_utf8_lossy(line).contains(&folder))
        .count()
}

#[test]
fn a_cluster_starts_introduces_its_nodes_and_ends_in_order() {
    let home = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&spec(home.path())).unwrap();
    for node in NodeName::ALL {
        assert_eq!(introduced(&cluster, node), cluster.addresses());
    }
    cluster.check().unwrap();
    assert!(cluster.relays().is_none());
    let analyst = cluster.member("analyst").unwrap();
    assert_eq!(analyst.parties, cluster.addresses().parties());
    if cfg!(target_os = "linux") {
        assert!(cluster.usage(NodeName::P0).unwrap().peak_rss_bytes > 0);
        assert_eq!(running_with(home.path()), 4);
    }
    for exit in cluster.stop() {
        assert!(exit.status.unwrap().success(), "{}{}", exit.node, exit.log);
        assert!(!exit.killed);
        assert!(home.path().join(exit.node.as_str()).join("ended").exists());
        assert!(exit.log.to_string().contains("introduced to"));
        assert_eq!(exit.usage.is_some(), cfg!(target_os = "linux"));
    }
}

#[test]
#[cfg(target_os = "linux")]
fn nodes_keep_their_memory_from_step_to_step_here_and_in_deployments() {
    let home = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&spec(home.path())).unwrap();
    let environ = format!("/proc/{}/environ", cluster.pid(NodeName::P0));
    let environ = String::from_utf8(std::fs::read(environ).unwrap()).unwrap();
    let set = environ
        .split('\0')
        .find(|variable| variable.starts_with("GLIBC_TUNABLES="));
    let set = set.expect("it is set").to_owned();
    cluster.stop();
    // A user's own setting stays.
    let own = std::env::var("GLIBC_TUNABLES").is_ok();
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    for file in [
        "Dockerfile",
        "systemd/trefoil-party.service",
        "systemd/trefoil-dealer.service",
    ] {
        let text = std::fs::read_to_string(deploy.join(file)).unwrap();
        assert!(own || text.contains(&set), "{file} does not say {set}");
    }
}

#[test]
fn the_files_of_a_cluster_are_those_that_nodes_read() {
    let home = tempfile::tempdir().unwrap();
    let mut spec = spec(home.path());
    spec.hospitals = vec!["st-anna".into()];
    spec.settings.round_timeout_ms = 1234;
    spec.simulation_coin_seed = Some(7);
    let cluster = Cluster::start(&spec).unwrap();
    let consortium = trefoil_consortium::ConsortiumFile::load(&cluster.consortium_path()).unwrap();
    assert_eq!(&consortium, cluster.consortium());
    for node in NodeName::PARTIES {
        let path = cluster.node_home(node).join("party.toml");
        let party = trefoil_consortium::PartyConfig::load(&path).unwrap();
        assert_eq!(party.transport.round_timeout_ms, 1234);
        assert_eq!(party.policy.requesters, ["st-anna", "analyst"]);
        let files = &party.identity;
        let identity = trefoil_consortium::identity::load(&files.certificate, &files.key).unwrap();
        let pin = identity.pin().unwrap();
        assert_eq!(pin, consortium.core.parties[node.index()].pin);
    }
    let path = cluster.node_home(NodeName::Dealer).join("dealer.toml");
    let dealer = trefoil_consortium::DealerConfig::load(&path).unwrap();
    assert_eq!(dealer.simulation_coin_seed, Some(7));
    for member in cluster.members() {
        let pin = member.identity.pin().unwrap();
        let entry = consortium.members.iter().find(|entry| entry.pin == pin);
        assert_eq!(entry.unwrap().name, member.name);
    }
}

#[test]
fn behind_an_emulated_link_every_dialler_has_its_own_way_to_every_listener() {
    let home = tempfile::tempdir().unwrap();
    let mut spec = spec(home.path());
    spec.link = Link::emulated(40.0, 300.0).unwrap();
    let cluster = Cluster::start(&spec).unwrap();
    let direct = cluster.addresses();
    let mut relayed = Vec::new();
    for dialler in NodeName::ALL {
        let seen = introduced(&cluster, dialler);
        for listener in NodeName::ALL {
            if dialler == listener {
                assert_eq!(seen.of(listener), direct.of(listener));
            } else {
                relayed.push(seen.of(listener));
            }
        }
    }
    relayed.extend(cluster.members().iter().flat_map(|member| member.parties));
    let distinct: std::collections::BTreeSet<_> = relayed.iter().collect();
    assert_eq!(distinct.len(), 4 * 3 + 4 * 3);
    assert!(
        NodeName::ALL
            .iter()
            .all(|node| !relayed.contains(&direct.of(*node)))
    );

    // The stand-ins answer with what they get.
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    let hospital = cluster.member("hospital-1").unwrap();
    let began = Instant::now();
    socket.send_to(b"shares", hospital.parties[1]).unwrap();
    let mut buffer = [0; 64];
    let (len, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!(
        (&buffer[..len], from),
        (&b"shares"[..], hospital.parties[1])
    );
    assert!(began.elapsed() >= Duration::from_millis(40));
    let stats = cluster.relays().unwrap().stats();
    assert_eq!(stats.len(), 4 * 3 + 4 * 6, "a lane in each direction");
    let lane = stats[&("hospital-1".to_owned(), "p1".to_owned())];
    assert_eq!((lane.forwarded, lane.forwarded_bytes), (1, 6));
}

#[test]
fn a_node_that_dies_at_its_start_is_named_with_its_log_and_nothing_is_left() {
    let home = tempfile::tempdir().unwrap();
    let error = start_error(&faulty(home.path(), "dealer:die"));
    assert!(
        error.starts_with("dealer did not start: it ended (exit status: 3)"),
        "{error}"
    );
    assert!(error.contains("the port is taken by the cat"), "{error}");
    assert_eq!(running_with(home.path()), 0);
}

#[test]
fn a_node_that_says_nothing_or_nonsense_is_named() {
    let home = tempfile::tempdir().unwrap();
    // The first node in order, so that a slow start of another is not named instead.
    let mut silent = faulty(home.path(), "p0:silent");
    silent.start_timeout = Duration::from_millis(500);
    let error = start_error(&silent);
    assert!(
        error.starts_with("p0 did not start: it did not say within 0.5 s"),
        "{error}"
    );

    let other = tempfile::tempdir().unwrap();
    let error = start_error(&faulty(other.path(), "p1:babble"));
    assert!(
        error.contains("p1 did not start") && error.contains("hello"),
        "{error}"
    );
}

#[test]
fn an_executable_that_is_not_there_is_named() {
    let home = tempfile::tempdir().unwrap();
    let mut spec = spec(home.path());
    spec.executable = home.path().join("no-such-node");
    let error = start_error(&spec);
    assert!(
        error.contains("p0: cannot run") && error.contains("no-such-node"),
        "{error}"
    );
}

#[test]
fn a_node_that_ends_unexpectedly_is_named_with_its_log() {
    let home = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&faulty(home.path(), "p1:fail")).unwrap();
    let status = cluster.wait(NodeName::P1, LONG).unwrap().unwrap();
    assert_eq!(status.code(), Some(3));
    let error = cluster.check().unwrap_err();
    assert!(matches!(
        error,
        ClusterError::Ended {
            node: NodeName::P1,
            ..
        }
    ));
    assert!(
        error.to_string().contains("the share store is full"),
        "{error}"
    );
}

#[test]
fn a_kill_ends_one_node_and_no_other() {
    let home = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&spec(home.path())).unwrap();
    cluster.kill(NodeName::Dealer).unwrap();
    assert!(cluster.wait(NodeName::Dealer, LONG).unwrap().is_some());
    cluster.check().unwrap();
    for node in NodeName::PARTIES {
        assert!(cluster.wait(node, Duration::ZERO).unwrap().is_none());
    }
    let exits = cluster.stop();
    assert!(!exits[NodeName::Dealer.index()].status.unwrap().success());
    assert!(exits[0].status.unwrap().success());
}

#[test]
fn a_node_that_does_not_end_is_killed() {
    let home = tempfile::tempdir().unwrap();
    let mut spec = faulty(home.path(), "p0:stay");
    spec.stop_timeout = Duration::from_millis(300);
    let cluster = Cluster::start(&spec).unwrap();
    introduced(&cluster, NodeName::P0);
    let exits = cluster.stop();
    assert!(exits[0].killed);
    assert_eq!(running_with(home.path()), 0);
}

#[test]
fn dropping_a_cluster_ends_it_and_takes_its_temporary_home_along() {
    let mut spec = spec(Path::new("/"));
    spec.home = Home::Temporary;
    let cluster = Cluster::start(&spec).unwrap();
    let home = cluster.home().to_owned();
    assert!(home.join("consortium.toml").exists());
    drop(cluster);
    assert!(!home.exists());
    assert_eq!(running_with(&home), 0);
}

#[test]
fn a_folder_that_holds_something_is_no_home_and_a_bad_name_no_member() {
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("thesis.txt"), "").unwrap();
    assert!(start_error(&spec(home.path())).contains("is not empty"));

    let home = tempfile::tempdir().unwrap();
    let mut spec = spec(home.path());
    spec.hospitals = vec!["../st-anna".into()];
    assert!(start_error(&spec).contains("../st-anna"));
}

#[test]
fn the_nodes_end_when_their_parent_is_killed() {
    let home = tempfile::tempdir().unwrap();
    let mut parent = Command::new(env!("CARGO_BIN_EXE_trefoil-fake-node"))
        .arg("cluster")
        .arg(home.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let output = parent.stdout.take().unwrap();
    BufReader::new(output).read_line(&mut line).unwrap();
    assert_eq!(line, "started\n");
    // They have read all they are told, and wait for the end of their input.
    let wrote = |node: NodeName, file| home.path().join(node.as_str()).join(file).exists();
    until(|| {
        NodeName::ALL
            .iter()
            .all(|node| wrote(*node, "introduced.json"))
    });
    parent.kill().unwrap();
    parent.wait().unwrap();
    until(|| NodeName::ALL.iter().all(|node| wrote(*node, "ended")));
    until(|| running_with(home.path()) == 0);
}
