//! Clusters where UDP is blocked: all nodes over TCP, some of them, and a dealer that only dials
//! out. What they compute is what QUIC's clusters compute, and a silent node is noticed in time.

use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use trefoil_client::remote::Event;
use trefoil_cluster::{Cluster, ClusterError, ClusterSpec, Link, NodeName};
use trefoil_transport::{Protocol, Settings};

use crate::common::{experiment, run, trefoil};
use crate::faults::{connect, long_job, runtime, training};

fn spec() -> ClusterSpec {
    ClusterSpec::of(env!("CARGO_BIN_EXE_trefoil-under-test"))
}

fn over_tcp() -> ClusterSpec {
    ClusterSpec {
        settings: Settings {
            protocol: Protocol::Tcp,
            ..Settings::default()
        },
        ..spec()
    }
}

#[test]
fn an_experiment_over_tcp_gives_the_bits_of_the_plain_run_and_of_quic() {
    let folder = TempDir::new().expect("a temporary folder");
    let text = "network = \"mlp\"\n[data]\nsource = \"digits\"\nhospitals = 2\n\
                train_rows = 64\ntest_rows = 32\n[training]\nbatch = 16\nepochs = 1\nseed = 3\n\
                [predict]\nimages = 3\n";
    let file = experiment(&folder, "tiny.toml", text);
    let reports = ["quic", "tcp"].map(|transport| {
        let json = folder.path().join(transport);
        let (ok, stdout, stderr) = run(trefoil()
            .arg("simulate")
            .arg(&file)
            .arg("--json")
            .arg(&json)
            .args(["--transport", transport]));
        assert!(ok, "{stdout}\n{stderr}");
        assert_eq!(stdout.contains("over tcp"), transport == "tcp", "{stdout}");
        let report: Value =
            serde_json::from_slice(&std::fs::read(&json).expect("written")).expect("JSON");
        assert_eq!(report["bit_identical"], true);
        report
    });
    for same in [
        "weights_sha256",
        "rounds",
        "bytes_sent_per_party",
        "dealer_bytes",
    ] {
        assert!(!reports[0][same].is_null(), "{same}");
        assert_eq!(reports[0][same], reports[1][same], "{same}");
    }
}

/// Uploads, trains one epoch, and gives the weights and which links each node made over what.
fn trained(spec: &ClusterSpec) -> (Vec<Vec<u64>>, [String; 4]) {
    let cluster = Cluster::start(spec).expect("the cluster starts");
    let weights = runtime().block_on(async {
        let analyst = connect(&cluster, "analyst").await;
        let job = training(&cluster, &analyst, "one-epoch", "mlp", 1, true).await;
        let id = analyst.submit(job).await.expect("accepted");
        let mut ignore = |_| {};
        let watched = analyst.watch(id, &mut ignore);
        let result = tokio::time::timeout(Duration::from_secs(60), watched).await;
        let result = result.expect("the job ends").expect("the job succeeds");
        analyst.close().await;
        let tensors = result.outputs.iter().map(|output| &output.tensor);
        tensors.map(|tensor| tensor.data().to_vec()).collect()
    });
    let logs =
        NodeName::ALL.map(|node| std::fs::read_to_string(cluster.log_path(node)).expect("a log"));
    let exits = cluster.stop();
    assert!(exits.iter().all(|exit| !exit.killed), "{exits:?}");
    (weights, logs)
}

#[test]
fn one_party_over_tcp_and_a_dealer_that_only_dials_out_train_what_all_over_quic_train() {
    let mixed = ClusterSpec {
        over_tcp: vec![NodeName::P1],
        dials_out_only: Some(NodeName::Dealer),
        ..spec()
    };
    let (weights, logs) = trained(&mixed);
    let (expected, _) = trained(&spec());
    assert!(!weights.is_empty() && weights == expected);
    // Every pair with P1 in it uses TCP, and no other.
    let linked = |log: &str, peer: &str| {
        let lines = log
            .lines()
            .filter(|line| line.contains(&format!("peer={peer} ")));
        let words = lines
            .filter_map(|line| line.split_once("linked"))
            .map(|(_, rest)| rest);
        words
            .map(|rest| rest.starts_with(" over tcp"))
            .collect::<Vec<_>>()
    };
    let peers = ["P0", "P1", "P2", "dealer"];
    for (me, log) in logs.iter().enumerate() {
        for (other, name) in peers.iter().enumerate().filter(|(other, _)| *other != me) {
            assert_eq!(
                linked(log, name),
                [me == 1 || other == 1],
                "{} with {name}: {log}",
                peers[me]
            );
        }
    }
}

#[cfg(unix)]
#[test]
fn a_node_that_stands_still_ends_the_job_over_tcp_in_time_and_is_named() {
    let cluster = Cluster::start(&over_tcp()).expect("the cluster starts");
    let signal = |signal: &str| {
        let pid = cluster.pid(NodeName::P2).to_string();
        let sent = std::process::Command::new("kill")
            .arg(signal)
            .arg(pid)
            .status();
        assert!(sent.expect("kill runs").success());
    };
    let error = runtime().block_on(async {
        let analyst = connect(&cluster, "analyst").await;
        let job = long_job(&cluster, &analyst).await;
        let id = analyst.submit(job).await.expect("accepted");
        let mut stopped_at = None;
        let mut on_event = |event| {
            if let (Event::Progress(progress), None) = (event, stopped_at)
                && progress.step >= 2
            {
                // Its kernel goes on to take and confirm what the others send.
                signal("-STOP");
                stopped_at = Some(Instant::now());
            }
        };
        let watched = analyst.watch(id, &mut on_event);
        let ended = tokio::time::timeout(Duration::from_secs(60), watched).await;
        let error = ended.expect("the job ends").expect_err("the job fails");
        let waited = stopped_at.expect("the job ran").elapsed();
        assert!(
            waited < Duration::from_secs(12),
            "reported after {waited:?}"
        );
        error.to_string()
    });
    signal("-CONT");
    assert!(
        error.contains("P2") && error.contains("no sign of life"),
        "{error}"
    );
}

#[test]
fn an_emulated_link_carries_no_tcp_and_says_so() {
    let spec = ClusterSpec {
        link: Link::WAN,
        ..over_tcp()
    };
    let refused = Cluster::start(&spec).err();
    assert!(
        matches!(&refused, Some(ClusterError::Setup { detail, .. }) if detail.contains("UDP")),
        "{refused:?}"
    );
}
