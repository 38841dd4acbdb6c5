//! What both daemons share as processes: logging, and the attached mode in which a parent starts
//! them, learns their port, tells them where the others are, and takes them along when it ends.

use std::io::{self, BufRead, IsTerminal, Read, Write};
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

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

/// Logs to standard error; `RUST_LOG` goes before `filter`. Only the first call counts.
pub fn init_logging(filter: &str) -> Result<(), String> {
    let filter = match std::env::var("RUST_LOG") {
        Ok(text) if !text.is_empty() => {
            EnvFilter::try_new(text).map_err(|err| format!("RUST_LOG: {err}"))
        }
        _ => EnvFilter::try_new(filter).map_err(|err| format!("log = {filter:?}: {err}")),
    }?;
    // An error means that the process logs already.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .try_init();
    Ok(())
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

/// Calls `end` at the first Ctrl-C (or, on Unix, `SIGTERM`); at the second the process ends at once.
pub fn on_interrupt(end: impl Fn() + Send + 'static) -> Result<(), String> {
    let failed = |err: io::Error| format!("signals cannot be handled: {err}");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    let watch = move || {
        runtime.block_on(async {
            let mut interrupted = false;
            while interrupt().await.is_ok() {
                if interrupted {
                    std::process::exit(130);
                }
                interrupted = true;
                end();
            }
        });
    };
    let thread = std::thread::Builder::new().name("signals".into());
    thread.spawn(watch).map(drop).map_err(failed)
}

async fn interrupt() -> io::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            done = tokio::signal::ctrl_c() => done,
            _ = terminate.recv() => Ok(()),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}
