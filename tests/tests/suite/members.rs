//! A consortium whose members change while its nodes run: separate processes, the tool's commands,
//! and nothing but the file handed from one folder to another.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use trefoil_client::remote::Remote;
use trefoil_consortium::{ConsortiumFile, MemberConfig, identity};

use crate::common::{output, trefoil};
use crate::world::{LIMIT, NODES, Running, World, await_line, ports, refused, succeeds};

const PREPROCESS: &str = "mean=0.1307,std=0.3081";
const PARTIES: [&str; 3] = ["north", "west", "east"];

/// A world with a running consortium.
pub struct Study {
    pub world: World,
    pub file: PathBuf,
    pub nodes: Vec<(Running, PathBuf)>,
}

impl Study {
    /// Keys of the four nodes and the members, and a file that all have signed.
    pub fn found(members: &[(&str, &str)]) -> Study {
        let root = tempfile::tempdir().expect("a temporary folder");
        let world = World { root };
        for ((role, who, name), port) in NODES.into_iter().zip(ports()) {
            let listen = format!("127.0.0.1:{port}");
            world.init(role, who, name, &["--listen", &listen]);
        }
        for (who, name) in members {
            world.init("hospital", who, name, &[]);
        }
        let file = world.root.path().join("consortium.toml");
        let study = Study {
            world,
            file,
            nodes: Vec::new(),
        };
        let who = NODES.iter().map(|(_, who, _)| *who);
        let who: Vec<&str> = who.chain(members.iter().map(|(who, _)| *who)).collect();
        study.create("Members", &study.file, &who);
        study.world.hand_out(&study.file, &who);
        study
    }

    /// Makes a file of cards, signed by all.
    pub fn create(&self, name: &str, file: &Path, who: &[&str]) {
        let mut create = trefoil();
        create.args(["consortium", "create", "--name", name, "--out"]);
        create.arg(file);
        succeeds(create.args(who.iter().map(|who| self.world.card(who))));
        for (_, who, _) in NODES {
            self.world.sign(file, who);
        }
    }

    pub fn start(&mut self) {
        self.nodes = NODES
            .iter()
            .map(|(role, who, _)| self.world.start(role, who))
            .collect();
        for (_, log) in &self.nodes {
            await_line(log, "listening");
        }
    }

    /// Changes the file with a command, has the parties sign it, hands it to the nodes and to
    /// `more`, and waits until all nodes have taken it.
    pub fn change(&self, args: &[&str], more: &[&str], number: u64) {
        let mut command = trefoil();
        command.args(["consortium", args[0]]).arg(&self.file);
        succeeds(command.args(&args[1..]));
        PARTIES
            .iter()
            .for_each(|who| drop(self.world.sign(&self.file, who)));
        self.world
            .hand_out(&self.file, &["north", "west", "east", "notary"]);
        self.world.hand_out(&self.file, more);
        for (_, log) in &self.nodes {
            await_line(log, &format!("took a new consortium file number={number}"));
        }
    }

    fn share(&self, who: &str, rows: &str) -> Command {
        let mut command = self.world.member(who, &["share", "--dataset", "digits"]);
        command.args([
            "--images",
            "digits",
            "--part",
            "train",
            "--preprocess",
            PREPROCESS,
        ]);
        command.args(["--rows", rows]);
        command
    }

    fn card(&self, who: &str) -> String {
        self.world.card(who).display().to_string()
    }
}

/// Connects as a member; how long after `meanwhile` a party has ended the connection, and its words.
fn held_open(study: &Study, who: &str, meanwhile: impl FnOnce() + Send) -> (Duration, String) {
    let home = study.world.dir(who);
    let config = MemberConfig::load(&home.join("member.toml")).expect("its configuration");
    let key = identity::load(&config.identity.certificate, &config.identity.key).expect("a key");
    let file = ConsortiumFile::load(&config.consortium).expect("the signed file");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let connecting = Remote::connect(&key, &file, None, &config.transport);
    let remote = runtime.block_on(connecting).expect("the parties know it");
    std::thread::scope(|threads| {
        let changing = threads.spawn(|| {
            meanwhile();
            Instant::now()
        });
        let closed = async { tokio::time::timeout(LIMIT, remote.links()[1].closed()).await };
        let reason = runtime.block_on(closed).expect("the party ends it");
        let ended = Instant::now();
        let changed = changing.join().expect("the change succeeds");
        (ended.saturating_duration_since(changed), reason)
    })
}

#[test]
fn a_hospital_comes_and_goes_while_the_nodes_run() {
    let mut study = Study::found(&[("anna", "St. Anna")]);
    study.start();
    let world = &study.world;
    world.init("hospital", "berta", "Berta Hospital", &[]);

    study.change(&["add", &study.card("berta")], &["berta"], 2);
    let shared = succeeds(&mut study.share("berta", "0..20"));
    assert!(shared.contains("upload 1 of berta-hospital"), "{shared}");
    // A hangup is a wish to look at the file, no end.
    let pid = study.nodes[0].0.0.id().to_string();
    let hangup = Command::new("kill").args(["-HUP", &pid]).status();
    assert!(hangup.expect("kill runs").success());

    let with_berta = std::fs::read(&study.file).expect("the file");
    let (took, reason) = held_open(&study, "berta", || {
        study.change(&["remove", "berta-hospital"], &[], 3);
    });
    assert!(reason.contains("no longer allowed"), "{reason}");
    assert!(
        took < Duration::from_secs(5),
        "ended {took:?} after the node took the file"
    );
    // Berta's own file still has it; the parties' do not.
    let refusal = ["does not know this member's public key"];
    refused(&mut study.share("berta", "20..40"), &refusal);

    // The old file brings nobody back, now or at the next start.
    let north = world.dir("north").join("consortium.toml");
    std::fs::write(&north, &with_berta).expect("it is written");
    let said = await_line(&study.nodes[0].1, "was not taken");
    for part in ["ERROR", "members number 2", "used number 3"] {
        assert!(said.contains(part), "{said}");
    }
    refused(&mut study.share("berta", "20..40"), &refusal);
    drop(study.nodes.remove(0));
    let mut party = trefoil();
    party.args(["party", "--config"]);
    refused(
        party.arg(world.dir("north").join("party.toml")),
        &["used number 3"],
    );
    std::fs::copy(&study.file, &north).expect("it is copied");
    let (_north, log) = world.start("party", "north");
    await_line(&log, "listening");
    succeeds(&mut world.member("anna", &["dataset", "digits"]));
}

#[test]
fn a_hospital_rotates_its_key_and_stays_who_it_is() {
    let mut study = Study::found(&[("anna", "St. Anna")]);
    study.start();
    let world = &study.world;
    let shared = succeeds(&mut study.share("anna", "0..10"));
    assert!(shared.contains("upload 1 of st-anna"), "{shared}");

    world.init("hospital", "anna-new", "St. Anna", &[]);
    let ask = ["dataset", "digits"];
    world.hand_out(&study.file, &["anna-new"]);
    refused(
        &mut world.member("anna-new", &ask),
        &["no member has the public key"],
    );
    study.change(
        &["rotate", &study.card("anna-new")],
        &["anna", "anna-new"],
        2,
    );
    // Both keys, and one member: numbers go on.
    for (who, rows, number) in [("anna", "10..20", 2), ("anna-new", "20..30", 3)] {
        let shared = succeeds(&mut study.share(who, rows));
        assert!(
            shared.contains(&format!("upload {number} of st-anna")),
            "{shared}"
        );
    }
    study.change(&["rotate", "--finish", "st-anna"], &["anna-new"], 3);
    refused(
        &mut world.member("anna", &ask),
        &["does not know this member's public key"],
    );
    let shared = succeeds(&mut study.share("anna-new", "30..40"));
    assert!(shared.contains("upload 4 of st-anna"), "{shared}");
    world.hand_out(&study.file, &["anna"]);
    refused(
        &mut world.member("anna", &ask),
        &["no member has the public key"],
    );
}

#[test]
fn a_node_with_another_core_is_refused_by_name() {
    let mut study = Study::found(&[("anna", "St. Anna")]);
    let other = study.world.root.path().join("other.toml");
    study.create(
        "Others",
        &other,
        &["north", "west", "east", "notary", "anna"],
    );
    study.world.hand_out(&other, &["east"]);
    study.start();
    let hash = |file: &Path| {
        let (_, shown, _) = output(trefoil().args(["consortium", "show"]).arg(file));
        let line = shown.lines().find(|line| line.starts_with("core hash"));
        line.expect("the hash").replace("core hash ", "")
    };
    let (theirs, ours) = (hash(&other), hash(&study.file));
    // East dials, north is called: both say it.
    for (at, names) in [(2, "P0"), (0, "P2 (east-ministry)")] {
        let said = await_line(&study.nodes[at].1, &format!("{names} belongs to another"));
        assert!(said.contains(&ours) && said.contains(&theirs), "{said}");
    }
    // A hospital gives nothing to a party that works with another dealer or ring.
    refused(
        &mut study.world.member("anna", &["dataset", "digits"]),
        &["P2 (east-ministry) belongs to another consortium"],
    );
    // With the right file it is one of them.
    drop(study.nodes.remove(2));
    study.world.hand_out(&study.file, &["east"]);
    let (_east, log) = study.world.start("party", "east");
    await_line(&log, "linked");
    succeeds(&mut study.world.member("anna", &["dataset", "digits"]));
}
