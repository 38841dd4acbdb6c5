//! Institutions that have been set up and run: three parties, a dealer, two hospitals and an analyst,
//! with the commands of `world.rs`.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use crate::common::trefoil;
use crate::world::{LIMIT, NODES, Running, World, await_line, ports, succeeds};

/// The parties' folders, in order.
pub const PARTIES: [&str; 3] = ["north", "west", "east"];

/// A world whose nodes run.
pub struct Deployment {
    pub world: World,
    nodes: Vec<(&'static str, Running)>,
}

impl Deployment {
    /// Sets everything up and starts the nodes; the analyst may start jobs.
    pub fn start() -> Deployment {
        Deployment::start_with("", "")
    }

    /// As [`Deployment::start`], with something replaced in each party's configuration; `{who}` in it
    /// is the party's folder.
    pub fn start_with(replaced: &str, by: &str) -> Deployment {
        let root = tempfile::tempdir().expect("a temporary folder");
        let world = World { root };
        let listen = ports().map(|port| format!("127.0.0.1:{port}"));
        for ((role, who, name), listen) in NODES.into_iter().zip(&listen) {
            world.init(role, who, name, &["--listen", listen]);
        }
        world.init("hospital", "anna", "St. Anna", &[]);
        world.init("hospital", "berta", "Berta", &[]);
        world.init("analyst", "office", "Statistics Office", &[]);
        let everybody = ["north", "west", "east", "notary", "anna", "berta", "office"];
        let file = world.root.path().join("consortium.toml");
        let mut create = trefoil();
        create.args(["consortium", "create", "--name", "Two hospitals", "--out"]);
        create.arg(&file);
        succeeds(create.args(everybody.map(|who| world.card(who))));
        for (_, who, _) in NODES {
            world.sign(&file, who);
        }
        for (_, who, _) in NODES {
            world.sign(&file, who);
        }
        world.hand_out(&file, &everybody);
        for who in PARTIES {
            let path = world.dir(who).join("party.toml");
            let text = std::fs::read_to_string(&path).expect("the configuration is there");
            let named = "requesters = [\"statistics-office\"]";
            let changed = text.replace("requesters = []", named);
            assert_ne!(changed, text);
            assert!(changed.contains(replaced), "{replaced} is not in {changed}");
            std::fs::write(
                &path,
                changed.replacen(replaced, &by.replace("{who}", who), 1),
            )
            .expect("it is written");
        }
        let mut deployment = Deployment {
            world,
            nodes: Vec::new(),
        };
        for (role, who, _) in NODES {
            deployment.start_node(role, who);
        }
        deployment
    }

    /// Starts a node and waits until it listens.
    pub fn start_node(&mut self, role: &str, who: &'static str) {
        let (running, log) = self.world.start(role, who);
        await_line(&log, "listening");
        self.nodes.push((who, running));
    }

    /// Starts a party whose store is a file system of its own, of `size` as mount takes it. Returns
    /// where its view of the files begins.
    pub fn start_in(&mut self, who: &'static str, store: &Path, size: &str) -> PathBuf {
        let log = self.world.dir(who).join("log");
        let file = std::fs::File::create(&log).expect("a log is made");
        let tool = trefoil();
        let script = "mount -t tmpfs -o mode=0700,size=\"$1\" none \"$2\" && exec \"$3\" party --config \"$4\"";
        let child = std::process::Command::new("unshare")
            .args([
                "--user",
                "--map-root-user",
                "--mount",
                "sh",
                "-c",
                script,
                "sh",
            ])
            .arg(size)
            .arg(store)
            .arg(tool.get_program())
            .arg(self.world.dir(who).join("party.toml"))
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(file)
            .spawn()
            .expect("unshare starts");
        let inside = PathBuf::from(format!("/proc/{}/root", child.id()));
        self.nodes.push((who, Running(child)));
        await_line(&log, "listening");
        inside
    }

    /// Ends a node without warning.
    pub fn kill(&mut self, who: &str) {
        let before = self.nodes.len();
        self.nodes.retain(|(name, _)| *name != who);
        assert_eq!(self.nodes.len() + 1, before, "{who} was running");
    }

    /// A party's store.
    pub fn store(&self, who: &str) -> PathBuf {
        self.world.dir(who).join("store")
    }
}

/// Files below a folder.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(folder) = open.pop() {
        // A folder may go while it is looked at.
        let Ok(entries) = std::fs::read_dir(&folder) else {
            continue;
        };
        for path in entries.flatten().map(|entry| entry.path()) {
            match path.is_dir() {
                true => open.push(path),
                false => found.push(path),
            }
        }
    }
    found.sort();
    found
}

/// Waits until something is so.
pub fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !so() {
        assert!(start.elapsed() < LIMIT, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits for a process and returns its largest resident memory, in bytes.
pub fn peak_of(child: &mut Child) -> u64 {
    let path = format!("/proc/{}/status", child.id());
    let start = Instant::now();
    let mut peak = 0;
    while child.try_wait().expect("it was started here").is_none() {
        let status = std::fs::read_to_string(&path).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        peak = peak.max(1024 * kib.unwrap_or(0));
        assert!(start.elapsed() < 10 * LIMIT, "it does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
    peak
}
