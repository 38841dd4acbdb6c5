//! A consortium on loopback with fresh keys and stores.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use trefoil_client::remote::{Event, JobResult, Part, Remote, RemoteError, Upload};
use trefoil_consortium::config::{IdentityFiles, Policy, Rule, Verdict};
use trefoil_consortium::receipt::Schema;
use trefoil_consortium::wire::{Answer, Ask, CONTROL_VERSION, Request, UploadBegin};
use trefoil_consortium::{
    Addresses, ConsortiumFile, Core, DatasetInfo, DealerConfig, Member, MemberEntry, MemberRole,
    PartyConfig, identity,
};
use trefoil_models::{JobKind, TrainSpec, plain_run};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::run::memory::test_key;
use trefoil_transport::{Identity, MsgStream, Pin, Settings, StreamKind};

/// A network that trains in no time.
pub const NETWORK: &str = r#"
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

/// All randomness of a test's data, printed so that a failure can be repeated.
pub fn seed() -> u64 {
    let seed = match std::env::var("TREFOIL_TEST_SEED") {
        Ok(text) => text.parse().expect("TREFOIL_TEST_SEED is a number"),
        Err(_) => u64::from_le_bytes(trefoil_consortium::random_bytes().unwrap()),
    };
    println!("TREFOIL_TEST_SEED={seed}");
    seed >> 8
}

fn number(seed: u64, at: usize) -> u64 {
    let key = test_key(seed, &format!("number {at}"));
    u64::from_le_bytes(key[..8].try_into().unwrap())
}

/// Images of values in [0, 1) with 16 fraction bits.
pub fn images(seed: u64, rows: usize) -> Tensor {
    Tensor::new(
        vec![rows, 16],
        (0..rows * 16).map(|at| number(seed, at) & 0xffff).collect(),
    )
}

/// One-hot labels of three classes.
pub fn labels(seed: u64, rows: usize) -> Tensor {
    let mut labels = Tensor::zeros(&[rows, 3]);
    for row in 0..rows {
        labels.data_mut()[3 * row + (number(seed, 1_000_000 + row) % 3) as usize] = 1;
    }
    labels
}

pub fn upload(dataset: &str, part: Part, images: &Tensor, labels: Option<&Tensor>) -> Upload {
    Upload {
        dataset: dataset.into(),
        part,
        images: images.clone(),
        labels: labels.cloned(),
        shape: vec![1, 4, 4],
    }
}

/// A table in the clear, of tensors one after the other.
pub fn table<'a>(parts: impl Iterator<Item = &'a Tensor>) -> plain_run::Table {
    let mut table = plain_run::Table {
        row_words: 0,
        words: Vec::new(),
    };
    for part in parts {
        table.row_words = part.shape()[1];
        table.words.extend_from_slice(part.data());
    }
    table
}

/// A small training job: batch 8, one epoch, everything revealed.
pub fn train(info: &DatasetInfo, save_as: &str) -> JobKind {
    JobKind::Train {
        network: NETWORK.into(),
        spec: TrainSpec {
            batch: 8,
            epochs: 1,
            momentum: 0.5,
            ..TrainSpec::default()
        },
        dataset: info.reference("shapes"),
        evaluate_each_epoch: true,
        save_as: save_as.into(),
        reveal_weights: true,
    }
}

/// Short enough for a test, long enough for a loaded machine.
pub fn settings() -> Settings {
    Settings {
        keep_alive_ms: 500,
        idle_timeout_ms: 3_000,
        // Otherwise the dealer is done with a small job when its first step is.
        look_ahead_bytes: 64 << 10,
        window_bytes: 64 << 10,
        ..Settings::default()
    }
}

pub struct World {
    folder: tempfile::TempDir,
    pub consortium: ConsortiumFile,
    identities: BTreeMap<String, Identity>,
    pub parties: [Option<trefoil_party::Daemon>; 3],
    pub dealer: Option<trefoil_dealer::Daemon>,
    policies: [Policy; 3],
    /// Takes effect when a party is started again.
    pub resume_wait_s: u64,
    runtime: Arc<tokio::runtime::Runtime>,
}

fn files(folder: &Path) -> IdentityFiles {
    IdentityFiles {
        certificate: folder.join("cert.der"),
        key: folder.join("key.der"),
    }
}

/// The policy of a party that consents to everything that two hospitals ask for.
pub fn allow_all() -> Policy {
    with_rules(vec![Rule::new("all", Verdict::Allow)])
}

/// A policy for the jobs of two hospitals.
pub fn with_rules(rules: Vec<Rule>) -> Policy {
    Policy {
        requesters: vec!["st-anna".into(), "st-bernd".into()],
        rules,
        ..Policy::default()
    }
}

/// Starts a node. One that has vanished holds its address until the last of its threads has ended.
fn once_free<T, E: std::fmt::Display>(start: impl Fn() -> Result<T, E>) -> T {
    let begun = std::time::Instant::now();
    loop {
        match start() {
            Ok(started) => return started,
            Err(err) if err.to_string().contains("in use") && begun.elapsed().as_secs() < 10 => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(err) => panic!("{err}"),
        }
    }
}

impl World {
    pub fn start(seed: u64) -> World {
        let _ = seed;
        World::with_policies([allow_all(), allow_all(), allow_all()])
    }

    /// A consortium whose parties have policies of their own.
    pub fn with_policies(policies: [Policy; 3]) -> World {
        if std::env::var("RUST_LOG").is_ok() {
            trefoil_consortium::logging::init("info").unwrap();
        }
        let folder = tempfile::tempdir().unwrap();
        let mut identities = BTreeMap::new();
        for name in [
            "p0", "p1", "p2", "centre", "st-anna", "st-bernd", "analyst", "stranger",
        ] {
            let made = identity::generate(name).unwrap();
            let home = folder.path().join(name);
            std::fs::create_dir(&home).unwrap();
            let files = files(&home);
            identity::save(&made, &files.certificate, &files.key).unwrap();
            identities.insert(name.to_owned(), made);
        }
        let pin = |name: &str| identity::pin(&identities[name]).unwrap();
        let node = |name: &str| Member {
            name: name.into(),
            pin: pin(name),
            address: "127.0.0.1:1".into(),
            transport: Default::default(),
        };
        let member = |name: &str, role| MemberEntry::new(name, role, pin(name));
        let core = Core {
            name: "test".into(),
            ring_bits: 64,
            parties: [node("p0"), node("p1"), node("p2")],
            dealer: node("centre"),
        };
        let members = vec![
            member("st-anna", MemberRole::Hospital),
            member("st-bernd", MemberRole::Hospital),
            member("analyst", MemberRole::Analyst),
        ];
        let consortium = ConsortiumFile::new(core, members)
            .signed_by(identities.values())
            .unwrap();
        std::fs::write(folder.path().join("consortium.toml"), consortium.to_toml()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let mut world = World {
            folder,
            consortium,
            identities,
            parties: [None, None, None],
            dealer: None,
            policies,
            resume_wait_s: 0,
            runtime: Arc::new(runtime),
        };
        world.restart();
        world
    }

    /// Ends all nodes and starts them again on their stores.
    pub fn restart(&mut self) {
        self.parties = [None, None, None];
        self.dealer = None;
        let any: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
        self.start_dealer(any);
        PartyId::ALL
            .into_iter()
            .for_each(|party| self.start_party(party, any));
        let addresses = self.addresses();
        let parties = self.parties.iter().flatten();
        parties.for_each(|party| party.set_addresses(addresses.clone()));
    }

    fn addresses(&self) -> Addresses {
        let parties = self.parties.each_ref();
        let parties = parties.map(|party| party.as_ref().expect("it runs").local_addr());
        Addresses::of(parties, self.dealer.as_ref().expect("it runs").local_addr())
    }

    fn start_dealer(&mut self, listen: SocketAddr) {
        let dealer = DealerConfig {
            listen,
            dial_out_only: false,
            peers: Addresses::default(),
            consortium: self.consortium_path(),
            log: "info".into(),
            threads: 0,
            stop_wait_s: 60,
            identity: files(&self.folder.path().join("centre")),
            transport: settings(),
            simulation_coin_seed: None,
        };
        self.dealer = Some(once_free(|| trefoil_dealer::start(&dealer, true)));
    }

    fn start_party(&mut self, party: PartyId, listen: SocketAddr) {
        let home = self.folder.path().join(format!("p{}", party.index()));
        let config = PartyConfig {
            listen,
            dial_out_only: false,
            home: home.join("home"),
            consortium: self.consortium_path(),
            log: "info".into(),
            threads: 0,
            resume_wait_s: self.resume_wait_s,
            stop_wait_s: 60,
            identity: files(&home),
            peers: Addresses::default(),
            store: Default::default(),
            policy: self.policies[party.index()].clone(),
            transport: settings(),
        };
        std::fs::write(self.config(party), config.to_toml()).unwrap();
        let daemon = once_free(|| trefoil_party::start(&config, true));
        self.parties[party.index()] = Some(daemon);
    }

    /// Ends one node as if its process were killed, does something, and starts it again where it
    /// was.
    pub fn kill_and_restart(&mut self, peer: Peer, meanwhile: impl FnOnce(&World)) {
        let addresses = self.addresses();
        match peer {
            Peer::Dealer => {
                let dealer = self.dealer.take().expect("it runs");
                let listen = dealer.local_addr();
                dealer.vanish();
                meanwhile(self);
                self.start_dealer(listen);
            }
            Peer::Party(party) => {
                let daemon = self.parties[party.index()].take().expect("it runs");
                let listen = daemon.local_addr();
                daemon.vanish();
                self.await_end(party);
                meanwhile(self);
                self.start_party(party, listen);
                let daemon = self.parties[party.index()].as_ref().expect("it runs");
                daemon.set_addresses(addresses);
            }
        }
    }

    /// Waits until nothing of a party that has vanished runs any more: unlike a process it has
    /// threads that work on with what they have. The last of them lets go of the audit log.
    pub fn await_end(&self, party: PartyId) {
        let log = std::fs::File::open(self.home(party).join("audit.log")).unwrap();
        let begun = std::time::Instant::now();
        while log.try_lock().is_err() {
            assert!(begun.elapsed() < Duration::from_secs(10), "{party} lives");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Follows a job on a thread of its own; events come as they happen.
    pub fn watch(
        &self,
        name: &str,
        job: trefoil_consortium::JobId,
    ) -> (
        std::thread::JoinHandle<Result<JobResult, RemoteError>>,
        std::sync::mpsc::Receiver<Event>,
    ) {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (identity, consortium) = (self.member(name).0.clone(), self.consortium.clone());
        let parties = self.parties.each_ref();
        let parties = parties.map(|party| party.as_ref().expect("it runs").local_addr());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let remote =
                    Remote::connect(&identity, &consortium, Some(parties), &settings()).await?;
                // An error means that the test has seen enough.
                let mut tell = |event| drop(sender.send(event));
                let watched = remote.watch(job, &mut tell);
                let limit = Duration::from_secs(120);
                tokio::time::timeout(limit, watched)
                    .await
                    .expect("the job hangs")
            })
        });
        (thread, receiver)
    }

    /// The home of a party.
    pub fn home(&self, party: PartyId) -> PathBuf {
        self.folder.path().join(format!("p{}/home", party.index()))
    }

    /// The configuration file of a party.
    pub fn config(&self, party: PartyId) -> PathBuf {
        self.folder
            .path()
            .join(format!("p{}/party.toml", party.index()))
    }

    fn consortium_path(&self) -> PathBuf {
        self.folder.path().join("consortium.toml")
    }

    pub fn runtime(&self) -> Arc<tokio::runtime::Runtime> {
        self.runtime.clone()
    }

    pub fn run<T>(&self, doing: impl Future<Output = T>) -> T {
        self.runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(120), doing)
                .await
                .expect("the test hangs")
        })
    }

    pub fn member(&self, name: &str) -> (&Identity, Pin) {
        let identity = &self.identities[name];
        (identity, identity::pin(identity).unwrap())
    }

    pub async fn connect(&self, name: &str) -> Result<Remote, RemoteError> {
        let addresses = self
            .parties
            .each_ref()
            .map(|party| party.as_ref().expect("the party runs").local_addr());
        Remote::connect(
            self.member(name).0,
            &self.consortium,
            Some(addresses),
            &settings(),
        )
        .await
    }

    /// Begins an upload of a hundred rows at P0 and stops there.
    pub async fn begin_upload(&self, remote: &Remote) -> MsgStream {
        let begin = UploadBegin {
            upload: trefoil_consortium::random_bytes().unwrap(),
            dataset: "shapes".into(),
            part: Part::Train,
            schema: Schema {
                shape: vec![1, 4, 4],
                classes: 3,
            },
            rows: 100,
            number: 7,
        };
        let mut stream = remote.links()[0]
            .open(StreamKind::Control, [0; 32])
            .await
            .unwrap();
        stream
            .send(&Request {
                version: CONTROL_VERSION,
                ask: Ask::Upload(begin),
            })
            .await
            .unwrap();
        let answer = stream.recv::<Answer>(1 << 20).await.unwrap();
        assert!(matches!(answer, Some(Answer::Ready { .. })), "{answer:?}");
        stream
    }

    /// A chunk of the training rows at a party.
    pub fn chunk(&self, party: PartyId) -> PathBuf {
        let dataset = self
            .folder
            .path()
            .join(format!("p{}/home/datasets/shapes", party.index()));
        let mut folders: Vec<PathBuf> = std::fs::read_dir(dataset)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        folders.sort();
        folders[0].join("chunk-00000.bin")
    }

    /// Staged uploads at all parties together.
    pub fn staged(&self) -> usize {
        let folder = |party: PartyId| {
            self.folder
                .path()
                .join(format!("p{}/home/staging", party.index()))
        };
        PartyId::ALL
            .into_iter()
            .map(|party| std::fs::read_dir(folder(party)).unwrap().count())
            .sum()
    }
}
