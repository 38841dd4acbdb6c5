//! One node as a child process: started, spoken to, watched, ended.
//!
//! The attached protocol (`trefoil_consortium::host`), from this side: the node writes one line
//! `{"listening":"127.0.0.1:4711"}` to its standard output; it is given one line
//! `{"addresses":{"p0":..,"p1":..,"p2":..,"dealer":..}}` on its standard input;
//! it ends when that input closes, which the operating system sees to even when
//! this process is killed. Its standard error goes to a file.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tracing::debug;
use trefoil_consortium::host::{Listening, Peers};

use crate::error::LogTail;
use crate::{ClusterError, NodeAddresses, NodeName};

/// Longest line that is read from a node.
const MAX_LINE_BYTES: u64 = 64 << 10;
/// How much of a log's end is looked at, and how many lines of it are shown.
const TAIL_BYTES: u64 = 16 << 10;
const TAIL_LINES: usize = 20;
/// A node that has closed its output is given this long to have a status.
const END_GRACE: Duration = Duration::from_secs(1);
/// How often a child is asked whether it has ended; the standard library has no
/// wait with a deadline.
const POLL: Duration = Duration::from_millis(5);
/// The kernel counts CPU time for user space in hundredths of a second.
const TICKS_PER_S: f64 = 100.0;

/// glibc keeps what a node frees instead of returning it to the system at every step and clearing fresh
/// pages at the next (`docs/adr/0015-cost-of-a-step.md`). 32 MiB is the largest block size that every
/// version of glibc takes here. The units in `deploy/` say the same.
const ALLOCATOR: Option<(&str, &str)> = Some((
    "GLIBC_TUNABLES",
    "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=536870912:glibc.malloc.arena_max=1",
));

/// What a process has used so far, where the operating system tells.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Usage {
    /// CPU time of all its threads, user and system.
    pub cpu_s: f64,
    /// Largest resident memory it has had.
    pub peak_rss_bytes: u64,
}

/// How to start a node.
pub(crate) struct Start<'a> {
    pub(crate) name: NodeName,
    pub(crate) executable: &'a Path,
    pub(crate) config: &'a Path,
    pub(crate) log: PathBuf,
    pub(crate) env: &'a BTreeMap<String, String>,
}

/// A node that was started. Dropping it kills it if it still runs.
pub(crate) struct Process {
    name: NodeName,
    child: Child,
    stdin: Option<ChildStdin>,
    first_line: mpsc::Receiver<io::Result<String>>,
    log: PathBuf,
    /// Its end was asked for, by a signal or by closing its input.
    asked_to_end: bool,
    last_usage: Option<Usage>,
}

impl Process {
    pub(crate) fn start(start: Start<'_>) -> Result<Process, ClusterError> {
        // A node that is started again goes on with its log.
        let mut options = File::options();
        let log = options.append(true).create(true).open(&start.log);
        let log = log.map_err(|source| ClusterError::File {
            path: start.log.clone(),
            source,
        })?;
        let mut command = Command::new(start.executable);
        command
            .arg(start.name.command())
            .arg("--config")
            .arg(start.config)
            .arg("--attached")
            .envs(ALLOCATOR.filter(|(name, _)| std::env::var_os(name).is_none()))
            .envs(start.env)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log);
        // Ctrl-C in a terminal goes to a whole process group. The nodes are in one
        // of their own: whoever started the cluster decides when they end.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn().map_err(|source| ClusterError::Executable {
            node: start.name,
            executable: start.executable.to_owned(),
            source,
        })?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take();
        let (sender, first_line) = mpsc::sync_channel(1);
        let name = start.name;
        let mut process = Process {
            name,
            child,
            stdin,
            first_line,
            log: start.log,
            asked_to_end: false,
            last_usage: None,
        };
        // From here on a failure drops `process`, which ends the child.
        let reading = std::thread::Builder::new().name(format!("trefoil-{name}-stdout"));
        let spawned = match stdout {
            Some(stdout) => reading.spawn(move || read_lines(name, stdout, &sender)),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        };
        match spawned {
            Ok(_) => Ok(process),
            Err(error) => {
                process.asked_to_end = true;
                Err(process.start_error(format!("its output cannot be read: {error}")))
            }
        }
    }

    /// The address it says it listens at.
    pub(crate) fn listening(&mut self, deadline: Instant) -> Result<SocketAddr, ClusterError> {
        let began = Instant::now();
        let wait = deadline.saturating_duration_since(began);
        let line = match self.first_line.recv_timeout(wait) {
            Ok(Ok(line)) => line,
            Ok(Err(error)) => {
                return Err(self.start_error(format!("its output cannot be read: {error}")));
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let waited = began.elapsed().as_secs_f64();
                let detail = format!("it did not say within {waited:.1} s where it listens");
                return Err(self.start_error(detail));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let detail = match self.wait(Instant::now() + END_GRACE)? {
                    Some(status) => format!("it ended ({status})"),
                    None => "it closed its standard output".into(),
                };
                return Err(self.start_error(detail));
            }
        };
        match serde_json::from_str::<Listening>(&line) {
            Ok(said) => Ok(said.listening),
            Err(error) => Err(self.start_error(format!(
                "its first line should be {{\"listening\":\"ADDRESS\"}} and is {:?}: {error}",
                line.trim_end()
            ))),
        }
    }

    /// Tells it where the others are.
    pub(crate) fn greet(&mut self, addresses: NodeAddresses) -> Result<(), ClusterError> {
        let peers = Peers {
            addresses: addresses.to_wire(),
        };
        let sent = serde_json::to_string(&peers)
            .map_err(io::Error::other)
            .and_then(|line| match &mut self.stdin {
                Some(stdin) => writeln!(stdin, "{line}").and_then(|()| stdin.flush()),
                None => Err(io::ErrorKind::BrokenPipe.into()),
            });
        match sent {
            Ok(()) => Ok(()),
            Err(error) => Err(match self.wait(Instant::now() + END_GRACE)? {
                Some(status) => self.start_error(format!("it ended ({status})")),
                None => self.start_error(format!("it does not read its input: {error}")),
            }),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// An error if it has ended though nobody asked it to.
    pub(crate) fn check(&mut self) -> Result<(), ClusterError> {
        match self.status()? {
            Some(status) if !self.asked_to_end => Err(ClusterError::Ended {
                node: self.name,
                status: status.to_string(),
                log: self.tail(),
            }),
            _ => Ok(()),
        }
    }

    /// How it ended, if it has.
    pub(crate) fn status(&mut self) -> Result<Option<ExitStatus>, ClusterError> {
        let status = self.child.try_wait();
        status.map_err(|source| self.process_error("ask whether it has ended", source))
    }

    /// Waits until it has ended, at most until `deadline`.
    pub(crate) fn wait(&mut self, deadline: Instant) -> Result<Option<ExitStatus>, ClusterError> {
        loop {
            let status = self.status()?;
            if status.is_some() || Instant::now() >= deadline {
                return Ok(status);
            }
            std::thread::sleep(POLL);
        }
    }

    /// Asks it to end, by closing its input.
    pub(crate) fn close_input(&mut self) {
        self.usage();
        self.asked_to_end = true;
        self.stdin = None;
    }

    /// Kills it (SIGKILL) and waits for its end.
    pub(crate) fn kill(&mut self) -> Result<ExitStatus, ClusterError> {
        if let Some(status) = self.status()? {
            return Ok(status);
        }
        self.usage();
        self.asked_to_end = true;
        let killed = self.child.kill();
        killed.map_err(|source| self.process_error("kill", source))?;
        let status = self.child.wait();
        status.map_err(|source| self.process_error("wait for its end", source))
    }

    /// What it has used; what it had used when last asked if it has ended.
    pub(crate) fn usage(&mut self) -> Option<Usage> {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.last_usage = usage_of(self.child.id()).or(self.last_usage);
        }
        self.last_usage
    }

    /// The last lines of its log.
    pub(crate) fn tail(&self) -> LogTail {
        LogTail {
            path: self.log.clone(),
            lines: tail_of(&self.log)
                .unwrap_or_else(|error| vec![format!("(unreadable: {error})")]),
        }
    }

    fn start_error(&self, detail: String) -> ClusterError {
        ClusterError::Start {
            node: self.name,
            detail,
            log: self.tail(),
        }
    }

    fn process_error(&self, action: &'static str, source: io::Error) -> ClusterError {
        ClusterError::Process {
            node: self.name,
            action,
            source,
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            debug!(%error, "a node could not be ended");
        }
    }
}

/// Hands the first line over and throws the others away, so that a node that
/// writes more never blocks on a full pipe.
fn read_lines(name: NodeName, stdout: ChildStdout, first: &mpsc::SyncSender<io::Result<String>>) {
    let mut lines = BufReader::new(stdout);
    let mut is_first = true;
    loop {
        let mut line = Vec::new();
        match (&mut lines)
            .take(MAX_LINE_BYTES)
            .read_until(b'\n', &mut line)
        {
            Ok(0) => return,
            Ok(_) => {
                let line = String::from_utf8_lossy(&line).into_owned();
                if std::mem::take(&mut is_first) {
                    // Nobody listens any more after an error elsewhere.
                    first.send(Ok(line)).ok();
                } else {
                    debug!(node = %name, line = line.trim_end(), "standard output");
                }
            }
            Err(error) => {
                if is_first {
                    first.send(Err(error)).ok();
                }
                return;
            }
        }
    }
}

fn tail_of(path: &Path) -> io::Result<Vec<String>> {
    let mut file = File::open(path)?;
    let from = file.metadata()?.len().saturating_sub(TAIL_BYTES);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    if from > 0 && lines.len() > 1 {
        // The first is only the end of a line.
        lines.remove(0);
    }
    lines.drain(..lines.len().saturating_sub(TAIL_LINES));
    Ok(lines)
}

/// What a process has used so far; `None` where the operating system does not tell.
pub fn usage_of(pid: u32) -> Option<Usage> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    parse_usage(&stat, &status)
}

/// `man 5 proc`: utime and stime are fields 14 and 15 of stat, the second field
/// is the command in brackets and may hold anything; VmHWM is in kB.
fn parse_usage(stat: &str, status: &str) -> Option<Usage> {
    let mut fields = stat
        .get(stat.rfind(')')? + 1..)?
        .split_whitespace()
        .skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    let ticks = ticks()?.checked_add(ticks()?)?;
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let peak_kib: u64 = peak.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Usage {
        cpu_s: ticks as f64 / TICKS_PER_S,
        peak_rss_bytes: peak_kib.checked_mul(1024)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_read_past_a_command_with_brackets_in_it() {
        let stat = "71 (a ) b) S 1 71 71 0 -1 4194560 900 0 0 0 150 25 0 0 20 0 1 0 9 1 1";
        let status = "Name:\ta\nVmPeak:\t  9 kB\nVmHWM:\t    2048 kB\n";
        assert_eq!(
            parse_usage(stat, status),
            Some(Usage {
                cpu_s: 1.75,
                peak_rss_bytes: 2 << 20
            })
        );
        assert_eq!(parse_usage("71 (a", status), None);
        assert_eq!(parse_usage(stat, ""), None);
    }

    #[test]
    fn the_tail_of_a_long_log_is_its_last_whole_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let text: String = (0..5_000).map(|line| format!("line {line}\n")).collect();
        std::fs::write(&path, text).unwrap();
        let lines = tail_of(&path).unwrap();
        let expected: Vec<String> = (4_980..5_000).map(|line| format!("line {line}")).collect();
        assert_eq!(lines, expected);
    }
}
