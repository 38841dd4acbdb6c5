//! Institutions of a test: a folder and a key each, commands, nodes as processes.

use std::net::{TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use crate::common::{output, trefoil};

/// What is waited for happens by then, or never.
pub const LIMIT: Duration = Duration::from_secs(60);
/// The four nodes: role, folder, name.
pub const NODES: [(&str, &str, &str); 4] = [
    ("party", "north", "North Clinic"),
    ("party", "west", "West University"),
    ("party", "east", "East Ministry"),
    ("dealer", "notary", "Notary"),
];

/// A node that was started here and ends with the test.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; both are for a process that was started here.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Institutions, each with a folder.
pub struct World {
    pub root: tempfile::TempDir,
}

impl World {
    pub fn dir(&self, who: &str) -> PathBuf {
        self.root.path().join(who)
    }

    pub fn card(&self, who: &str) -> PathBuf {
        self.dir(who).join("card")
    }

    pub fn init(&self, role: &str, who: &str, name: &str, more: &[&str]) {
        let card = succeeds(
            trefoil()
                .args(["init", role, "--name", name, "--dir"])
                .arg(self.dir(who))
                .args(more),
        );
        assert_eq!(card.lines().count(), 1, "{card}");
        let kept = std::fs::read_to_string(self.card(who)).expect("the card is kept too");
        assert_eq!(kept, card);
    }

    /// A member's command, at its home.
    pub fn member(&self, who: &str, args: &[&str]) -> Command {
        let mut command = trefoil();
        command.args(args).env("TREFOIL_HOME", self.dir(who));
        command
    }

    /// A command of a party's operator.
    pub fn operator(&self, who: &str, args: &[&str]) -> Command {
        let mut command = trefoil();
        command.args(args).arg("--config");
        command.arg(self.dir(who).join("party.toml"));
        command
    }

    /// Signs a file with a node's key; the lines that are printed.
    pub fn sign(&self, file: &Path, who: &str) -> String {
        let mut command = trefoil();
        command.args(["consortium", "sign"]).arg(file);
        succeeds(command.arg("--home").arg(self.dir(who)))
    }

    pub fn hand_out(&self, file: &Path, to: &[&str]) {
        for who in to {
            std::fs::copy(file, self.dir(who).join("consortium.toml")).expect("a file is copied");
        }
    }

    pub fn start(&self, role: &str, who: &str) -> (Running, PathBuf) {
        let log = self.dir(who).join("log");
        let file = std::fs::File::create(&log).expect("a log is made");
        let child = trefoil()
            .args([role, "--config"])
            .arg(self.dir(who).join(format!("{role}.toml")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .expect("the node starts");
        (Running(child), log)
    }
}

pub fn succeeds(command: &mut Command) -> String {
    let (code, stdout, stderr) = output(command);
    assert_eq!(code, Some(0), "{command:?}:\n{stdout}\n{stderr}");
    stdout
}

/// Fails with exit code 1, prints no result, and says all of `parts`.
pub fn refused(command: &mut Command, parts: &[&str]) {
    let (code, stdout, stderr) = output(command);
    assert_eq!(code, Some(1), "{command:?}:\n{stdout}\n{stderr}");
    assert_eq!(stdout, "", "{command:?}");
    for part in parts {
        assert!(
            stderr.contains(part),
            "{command:?}: {part:?} is not in:\n{stderr}"
        );
    }
}

/// Ports that were free a moment ago, for UDP and TCP, below those that systems give to outgoing
/// connections: nobody takes one before its node listens.
pub fn ports() -> [u16; 4] {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = std::process::id() % 10_000;
    std::array::from_fn(|_| {
        loop {
            let next = u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
            let port = 20_000 + ((first + next) % 10_000) as u16;
            let free = UdpSocket::bind(("127.0.0.1", port)).is_ok()
                && TcpListener::bind(("127.0.0.1", port)).is_ok();
            if free {
                return port;
            }
        }
    })
}

pub fn await_line(log: &Path, part: &str) -> String {
    let start = Instant::now();
    loop {
        let text = std::fs::read_to_string(log).expect("the log is readable");
        if let Some(line) = text.lines().find(|line| line.contains(part)) {
            return line.into();
        }
        assert!(start.elapsed() < LIMIT, "{part:?} is not in:\n{text}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
