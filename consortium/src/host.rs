//! What both daemons share as processes: signals, and the attached mode in which a parent starts
//! them, learns their port, tells them where the others are, and takes them along when it ends.

use std::io::{self, BufRead, Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::Addresses;

/// Longest line that is read from a parent.
const LINE_MAX_BYTES: u64 = 64 << 10;
/// How long an attached node may take for its orderly end once its parent is gone.
const END_GRACE: Duration = Duration::from_secs(2);

/// The one line that an attached node prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listening {
    /// Where it listens, with the real port.
    pub listening: SocketAddr,
}

impl Listening {
    /// Reads the line.
    pub fn parse(line: &str) -> Result<Listening, String> {
        serde_json::from_str(line).map_err(|err| format!("{line:?} says no address: {err}"))
    }
}

/// The one line that an attached node reads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peers {
    /// Where the nodes are.
    pub addresses: Addresses,
}

impl Peers {
    /// The line that a parent writes.
    pub fn line(&self) -> String {
        serde_json::to_string(self).expect("texts have a JSON form")
    }
}

/// Prints where the node listens, as the only line on standard output.
pub fn announce(listening: SocketAddr) -> Result<(), String> {
    let line = serde_json::to_string(&Listening { listening }).map_err(|err| err.to_string())?;
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(|err| format!("standard output: {err}"))
}

/// Reads the parent's line from standard input.
pub fn read_peers() -> Result<Peers, String> {
    let mut line = String::new();
    let read = io::stdin().lock().take(LINE_MAX_BYTES).read_line(&mut line);
    if read.map_err(|err| format!("standard input: {err}"))? == 0 {
        return Err("standard input: the parent ended before it said where the others are".into());
    }
    serde_json::from_str(&line).map_err(|err| format!("standard input, line 1: {err}"))
}

/// Calls `end` when standard input ends, whatever ended the parent, and ends the process hard if
/// it is still there after two seconds.
pub fn end_with_parent(end: impl FnOnce() + Send + 'static) -> Result<(), String> {
    let watch = move || {
        let mut buffer = [0; 256];
        // Anything that arrives is ignored; an error is an end as well.
        while matches!(io::stdin().lock().read(&mut buffer), Ok(n) if n > 0) {}
        end();
        std::thread::sleep(END_GRACE);
        std::process::exit(1);
    };
    let thread = std::thread::Builder::new().name("parent".into());
    thread
        .spawn(watch)
        .map(drop)
        .map_err(|err| format!("a thread cannot be started: {err}"))
}

/// The process's largest resident memory so far; 0 where the platform does not say.
pub fn peak_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| {
        rest.trim()
            .trim_end_matches("kB")
            .trim()
            .parse::<u64>()
            .ok()
    });
    kib.unwrap_or(0) * 1024
}

/// Bytes that this user may still write where `path` is; none where the platform does not say.
pub fn disk_free_bytes(path: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let stat = rustix::fs::statvfs(path).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

/// Waits until a node is told to stop, and why.
pub async fn told_to_stop(mut stopping: watch::Receiver<Option<String>>) -> String {
    loop {
        let why = stopping.borrow_and_update().clone();
        if let Some(why) = why {
            return why;
        }
        if stopping.changed().await.is_err() {
            // Nobody can tell it any more.
            std::future::pending::<()>().await;
        }
    }
}

/// How many sessions are active; a node that stops waits for their ends.
#[derive(Debug)]
pub struct Active(watch::Sender<usize>);

impl Default for Active {
    fn default() -> Active {
        Active(watch::channel(0).0)
    }
}

impl Active {
    /// A session is active while the returned value lives.
    pub fn enter(&self) -> impl Drop + Send + use<> {
        self.0.send_modify(|count| *count += 1);
        Activity(self.0.clone())
    }

    /// Waits until none is, at most `wait`; says so in the log where it has to wait.
    pub async fn ended(&self, wait: Duration) {
        let mut count = self.0.subscribe();
        if *count.borrow_and_update() == 0 {
            return;
        }
        tracing::info!(
            "stopping at the end of the running job's step, in {} s at the latest; a second signal ends it at once",
            wait.as_secs()
        );
        let ended = count.wait_for(|count| *count == 0);
        if tokio::time::timeout(wait, ended).await.is_err() {
            tracing::warn!(
                "no end of the step within {} s (stop_wait_s): steps since the last checkpoint are done again",
                wait.as_secs()
            );
        }
    }
}

struct Activity(watch::Sender<usize>);

impl Drop for Activity {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Ctrl-C and, on Unix, `SIGTERM`: from here on they no longer end the process unnoticed. To be
/// taken before a node says that it listens.
pub fn interrupts() -> Result<Interrupts, String> {
    let failed = |err: io::Error| format!("signals cannot be handled: {err}");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    let signals = {
        let _inside = runtime.enter();
        Signals::listen().map_err(failed)?
    };
    Ok(Interrupts { runtime, signals })
}

/// Signals that are taken; see [`interrupts`].
#[derive(Debug)]
pub struct Interrupts {
    runtime: tokio::runtime::Runtime,
    signals: Signals,
}

impl Interrupts {
    /// Calls `end` at the first signal, one that has come already included; at the second the
    /// process ends at once.
    pub fn watch(self, end: impl Fn() + Send + 'static) -> Result<(), String> {
        let Interrupts {
            runtime,
            mut signals,
        } = self;
        let watch = move || {
            runtime.block_on(async {
                let mut interrupted = false;
                while signals.next().await.is_some() {
                    if interrupted {
                        std::process::exit(130);
                    }
                    interrupted = true;
                    end();
                }
            });
        };
        let thread = std::thread::Builder::new().name("signals".into());
        thread
            .spawn(watch)
            .map(drop)
            .map_err(|err| format!("signals cannot be handled: {err}"))
    }
}

#[cfg(unix)]
#[derive(Debug)]
struct Signals {
    ctrl_c: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn listen() -> io::Result<Signals> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Signals {
            ctrl_c: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> Option<()> {
        tokio::select! {
            signal = self.ctrl_c.recv() => signal,
            signal = self.terminate.recv() => signal,
        }
    }
}

#[cfg(windows)]
#[derive(Debug)]
struct Signals(tokio::signal::windows::CtrlC);

#[cfg(windows)]
impl Signals {
    fn listen() -> io::Result<Signals> {
        tokio::signal::windows::ctrl_c().map(Signals)
    }

    async fn next(&mut self) -> Option<()> {
        self.0.recv().await
    }
}
