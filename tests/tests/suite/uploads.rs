//! Uploads through faults, with real processes: a party that is killed and started again while it
//! stages or commits, a link that breaks during the commits, a hospital that ends and comes back.
//! In the end all three parties hold the same rows, once.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use trefoil_client::remote::{Part, Receipt, Remote, RemoteError, Upload};
use trefoil_cluster::{Cluster, ClusterSpec, Ends, Link, NodeName};
use trefoil_consortium::Addresses;
use trefoil_consortium::host::{Listening, Peers};
use trefoil_protocol::Tensor;
use trefoil_transport::Settings;

const EXECUTABLE: &str = env!("CARGO_BIN_EXE_trefoil-under-test");
/// What is waited for happens by then, or never.
const LIMIT: Duration = Duration::from_secs(60);
/// Three chunks.
const ROWS: usize = 2_500;
const DATASET: &str = "shapes";

/// A broken link is noticed soon.
fn settings() -> Settings {
    Settings {
        keep_alive_ms: 500,
        idle_timeout_ms: 3_000,
        connect_timeout_ms: 5_000,
        ..Settings::default()
    }
}

fn cluster(link: Link) -> Cluster {
    let spec = ClusterSpec {
        link,
        settings: settings(),
        ..ClusterSpec::of(EXECUTABLE)
    };
    Cluster::start(&spec).expect("the cluster starts")
}

fn run<T>(doing: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let ended = tokio::time::timeout(2 * LIMIT, doing).await;
        ended.expect("the test hangs")
    })
}

async fn connect(cluster: &Cluster, name: &str) -> Remote {
    let member = cluster.member(name).expect("a member");
    let (places, settings) = (Some(member.parties), settings());
    let connected = Remote::connect(&member.identity, cluster.consortium(), places, &settings);
    connected.await.expect("the parties are reachable")
}

fn rows() -> Upload {
    let images = (0..ROWS * 16).map(|at| (at as u64 * 31) & 0xffff).collect();
    let labels = (0..ROWS * 3)
        .map(|at| u64::from(at % 3 == at / 3 % 3))
        .collect();
    Upload {
        dataset: DATASET.into(),
        part: Part::Train,
        images: Tensor::new(vec![ROWS, 16], images),
        labels: Some(Tensor::new(vec![ROWS, 3], labels)),
        shape: vec![1, 4, 4],
    }
}

/// All three parties hold the rows of so many uploads; [`Remote::dataset`] compares their snapshots.
async fn check(remote: &Remote, uploads: u64) {
    let info = remote.dataset(DATASET).await.expect("the parties agree");
    assert_eq!(info.train_rows, uploads * ROWS as u64);
}

fn poll(done: impl Fn() -> bool, what: &str) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Where a party keeps the data set.
fn shelf(cluster: &Cluster, node: NodeName) -> PathBuf {
    cluster.node_home(node).join("store/datasets").join(DATASET)
}

fn has_committed(shelf: &Path) -> bool {
    std::fs::read_dir(shelf).is_ok_and(|mut entries| entries.next().is_some())
}

/// A party that is started once more, with the same store and at the same address.
struct Again {
    config: PathBuf,
    log: PathBuf,
    greeting: String,
    address: String,
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; both are for a process that was started here.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Again {
    fn of(cluster: &Cluster, node: NodeName) -> Again {
        let nodes = cluster.addresses();
        let addresses = Addresses::of(nodes.parties(), nodes.of(NodeName::Dealer));
        Again {
            config: cluster.node_home(node).join("party.toml"),
            log: cluster.log_path(node),
            greeting: Peers { addresses }.line(),
            address: nodes.of(node).to_string(),
        }
    }

    fn start(&self) -> Running {
        let text = std::fs::read_to_string(&self.config).expect("a configuration");
        let fixed = format!("\"{}\"", self.address);
        let text = text.replace("\"127.0.0.1:0\"", &fixed);
        assert!(text.contains(&fixed), "{text}");
        std::fs::write(&self.config, text).expect("written");
        let log = std::fs::File::options().append(true).open(&self.log);
        let mut child = Command::new(EXECUTABLE)
            .arg("party")
            .arg("--config")
            .arg(&self.config)
            .arg("--attached")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log.expect("a log"))
            .spawn()
            .expect("the tool starts");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("piped");
        let mut running = Running(child);
        let read = BufReader::new(stdout).read_line(&mut line);
        read.expect("the party says where it is");
        let listening = Listening::parse(&line).expect("the party starts");
        assert_eq!(listening.listening.to_string(), self.address);
        let stdin = running.0.stdin.as_mut().expect("piped");
        writeln!(stdin, "{}", self.greeting).expect("the party reads");
        running
    }
}

/// Kills a party when so many rows are staged; starts it again when `then` has returned. Returns the
/// receipt, and how many rows were staged after each step.
fn killed_and_started_again(
    victim: NodeName,
    at: usize,
    then: impl FnOnce(&Cluster) + Send,
) -> (Receipt, Vec<usize>) {
    let cluster = cluster(Link::Loopback);
    let again = Again::of(&cluster, victim);
    let (killed, was_killed) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let (cluster, again) = (&cluster, &again);
        let starting = scope.spawn(move || {
            was_killed.recv_timeout(LIMIT).expect("it was killed");
            then(cluster);
            again.start()
        });
        run(async {
            let hospital = connect(cluster, "hospital-1").await;
            let mut heard = Vec::new();
            let mut progress = |done| {
                heard.push(done);
                if done == at && heard.len() == at.div_ceil(1_000) {
                    cluster.kill(victim).expect("killed");
                    killed.send(()).expect("somebody waits for it");
                }
            };
            let receipt = hospital.upload(rows(), &mut progress).await;
            let receipt = receipt.expect("the upload is completed");
            let _running = starting.join().expect("the party is started again");
            check(&hospital, 1).await;
            hospital.close().await;
            (receipt, heard)
        })
    })
}

#[test]
fn a_party_killed_between_staging_and_commit_has_the_upload_in_the_end() {
    let (receipt, heard) = killed_and_started_again(NodeName::P1, ROWS, |cluster| {
        // The others commit first: this is the state that must not last.
        for node in [NodeName::P0, NodeName::P2] {
            let shelf = shelf(cluster, node);
            poll(|| has_committed(&shelf), "the others commit on their own");
        }
        assert!(!has_committed(&shelf(cluster, NodeName::P1)));
    });
    assert_eq!((receipt.rows, receipt.number), (ROWS, 1));
    assert_eq!(heard, [1_000, 2_000, ROWS], "nothing was shared twice");
}

#[test]
fn a_party_killed_while_chunks_are_staged_goes_on_where_it_was() {
    let (receipt, heard) = killed_and_started_again(NodeName::P2, 2_000, |_| {});
    assert_eq!((receipt.rows, receipt.number), (ROWS, 1));
    assert_eq!(heard, [1_000, 2_000, 2_000, ROWS]);
}

#[test]
fn a_link_that_breaks_during_the_commits_and_comes_back_ends_with_all_three_alike() {
    let link = Link::emulated(2.0, 1_000.0).expect("a link");
    let cluster = cluster(link);
    let relays = cluster.relays().expect("an emulated link");
    let lane = Ends::Between("hospital-1", "p1");
    run(async {
        let hospital = connect(&cluster, "hospital-1").await;
        let before = hospital.links()[1].clone();
        let shelves = [NodeName::P0, NodeName::P2].map(|node| shelf(&cluster, node));
        let mut progress = |done| {
            if done == ROWS {
                relays.cut(lane, None);
            }
        };
        let broken_for_a_while = async {
            println!("{}", before.closed().await);
            for shelf in &shelves {
                assert!(has_committed(shelf), "the others commit on their own");
            }
            assert!(!has_committed(&shelf(&cluster, NodeName::P1)));
            relays.restore(lane);
        };
        let uploading = hospital.upload(rows(), &mut progress);
        let (receipt, ()) = tokio::join!(uploading, broken_for_a_while);
        assert_eq!(receipt.expect("the upload is completed").number, 1);
        check(&hospital, 1).await;
        hospital.close().await;
    });
}

#[test]
fn an_upload_that_was_given_up_is_resumed_by_its_hospital_and_by_nobody_else() {
    let cluster = cluster(Link::Loopback);
    let again = Again::of(&cluster, NodeName::P1);
    let _running = run(async {
        let mut hospital = connect(&cluster, "hospital-1").await;
        hospital.set_resume_timeout(Duration::from_millis(500));
        let mut progress = |done| {
            if done == 2_000 {
                cluster.kill(NodeName::P1).expect("killed");
            }
        };
        let err = hospital.upload(rows(), &mut progress).await;
        let err = err.expect_err("P1 is gone");
        let text = err.to_string();
        assert!(text.contains("P1") && text.contains("24 hours"), "{text}");
        let RemoteError::Unfinished { pending, .. } = err else {
            panic!("{err:?}");
        };
        hospital.close().await;

        let running = again.start();
        let other = connect(&cluster, "hospital-2").await;
        // The name alone gives nobody the rows that are staged.
        let heard = RefCell::new(Vec::new());
        let mut progress = |done| heard.borrow_mut().push(done);
        let theirs = other.resume(pending, rows(), &mut progress).await;
        assert_eq!(theirs.expect("an upload of its own").number, 1);
        assert_eq!(heard.take(), [1_000, 2_000, ROWS]);

        let hospital = connect(&cluster, "hospital-1").await;
        let receipt = hospital.resume(pending, rows(), &mut progress).await;
        let receipt = receipt.expect("the upload is completed");
        assert_eq!(heard.take(), [2_000, ROWS], "what is staged stays");
        assert_eq!(receipt.number, pending.number);
        check(&hospital, 2).await;

        let once_more = hospital.resume(pending, rows(), &mut progress).await;
        assert_eq!(once_more.expect("it is complete"), receipt);
        check(&hospital, 2).await;
        let next = hospital.upload(rows(), &mut progress).await;
        assert_eq!(next.expect("another upload").number, 2);
        check(&hospital, 3).await;
        hospital.close().await;
        running
    });
}
