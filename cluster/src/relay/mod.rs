//! A datagram relay in user space: delay, rate, loss and cuts between real
//! processes on one host, without root.
//!
//! For every directed pair (who dials, who listens) there is one socket. What a
//! dialler sends to it goes on to the listener; each dialling address gets a
//! socket of its own towards the listener, so that replies find their way back.
//! The two directions are two lanes (`lane.rs`, where the model is), named by
//! their ends: two pairs that dial each other share them, as they would a cable.
//!
//! Two threads. One runs the sockets and hands arrivals to the lanes. The other
//! sends what is due: it sleeps on a condition variable because tokio's timers
//! have a resolution of one millisecond, which is 5 % of a 20 ms delay.
//!
//! It does not look into datagrams, and does not reorder or duplicate them.

mod lane;
mod port;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use quinn_udp::{Transmit, UdpSockRef};
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tracing::{debug, warn};

use crate::link::{LinkParseError, Shape};
use lane::{Departure, Lane};
use port::{NewPort, Way, bind_beside, run_ports};

pub use lane::LaneStats;

/// Departures sent before the lanes' lock is taken again.
const MAX_BATCH: usize = 256;

/// Why a relay could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The link's numbers are out of range.
    #[error(transparent)]
    Link(#[from] LinkParseError),
    /// The operating system refused.
    #[error("relay: {action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// The relay's own thread is gone.
    #[error("relay: its thread has ended")]
    Ended,
}

/// The relays of one cluster; ends its threads when dropped.
pub struct Relays {
    shared: Arc<Shared>,
    shape: Shape,
    ports: Option<mpsc::UnboundedSender<NewPort>>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Board {
    lanes: Vec<Lane<Way>>,
    names: Vec<(String, String)>,
    /// When the sending thread wakes by itself; `None`: only when told.
    wakes_at: Option<Instant>,
    send_failures: u64,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    board: Mutex<Board>,
    earlier: Condvar,
}

impl Shared {
    fn board(&self) -> MutexGuard<'_, Board> {
        // The board is valid after every statement; a panic elsewhere leaves it so.
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Board {
    fn next_due(&self) -> Option<Instant> {
        self.lanes.iter().filter_map(Lane::next_due).min()
    }

    /// Whether the sending thread must be told of a departure at `due`.
    fn is_earlier(&self, due: Option<Instant>) -> bool {
        due.is_some_and(|due| self.wakes_at.is_none_or(|at| due < at))
    }

    /// The lanes with this end or between these two ends, in both directions.
    fn select<'a>(
        &'a mut self,
        ends: Ends<'a>,
    ) -> impl Iterator<Item = (usize, &'a mut Lane<Way>)> {
        let names = &self.names;
        self.lanes
            .iter_mut()
            .enumerate()
            .filter(move |(at, _)| ends.include(&names[*at]))
    }
}

/// Which lanes a fault is for.
#[derive(Clone, Copy, Debug)]
pub enum Ends<'a> {
    /// Every lane.
    All,
    /// Every lane to and from this node.
    Of(&'a str),
    /// Both lanes between these two nodes.
    Between(&'a str, &'a str),
    /// Only the lane from the first to the second.
    FromTo(&'a str, &'a str),
}

impl Ends<'_> {
    fn include(&self, (from, to): &(String, String)) -> bool {
        match *self {
            Ends::All => true,
            Ends::Of(name) => from == name || to == name,
            Ends::Between(a, b) => (from == a && to == b) || (from == b && to == a),
            Ends::FromTo(a, b) => from == a && to == b,
        }
    }
}

impl Relays {
    /// Starts the relay's threads; every link will have this round trip and rate.
    pub fn start(rtt_ms: f64, mbit_per_s: f64) -> Result<Relays, RelayError> {
        let shape = Shape::new(rtt_ms, mbit_per_s)?;
        let shared = Arc::new(Shared::default());
        let (ports, new_ports) = mpsc::unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(|source| failed("start a runtime", source))?;
        let mut relays = Relays {
            shared: Arc::clone(&shared),
            shape,
            ports: Some(ports),
            threads: Vec::new(),
        };
        let sending = Arc::clone(&shared);
        relays.threads.push(spawn("trefoil-relay-send", move || {
            send_what_is_due(&sending);
        })?);
        relays.threads.push(spawn("trefoil-relay-read", move || {
            LocalSet::new().block_on(&runtime, run_ports(shared, new_ports));
        })?);
        Ok(relays)
    }

    /// Adds a relay from the dialler `from` to the listener `to` at `listener`.
    /// Returns the address that the dialler uses instead of the listener's own.
    pub fn add(
        &self,
        from: &str,
        to: &str,
        listener: SocketAddr,
    ) -> Result<SocketAddr, RelayError> {
        let socket = bind_beside(listener).map_err(|source| failed("bind a socket", source))?;
        let address = socket
            .local_addr()
            .map_err(|source| failed("read a socket's address", source))?;
        let (forward, back) = (self.lane(from, to), self.lane(to, from));
        self.ports
            .as_ref()
            .and_then(|ports| {
                let port = NewPort {
                    socket,
                    listener,
                    forward,
                    back,
                };
                ports.send(port).ok()
            })
            .ok_or(RelayError::Ended)?;
        Ok(address)
    }

    /// Drops everything on these lanes, also what is under way, for `duration`,
    /// or without one until [`Relays::restore`].
    pub fn cut(&self, ends: Ends<'_>, duration: Option<Duration>) {
        let now = Instant::now();
        for (_, lane) in self.shared.board().select(ends) {
            lane.cut(now, duration);
        }
    }

    /// Ends a cut.
    pub fn restore(&self, ends: Ends<'_>) {
        for (_, lane) in self.shared.board().select(ends) {
            lane.restore();
        }
    }

    /// Loses each datagram on these lanes with this probability (0 to 1), chosen
    /// by a generator with this seed and the lane's number.
    pub fn set_loss(&self, ends: Ends<'_>, probability: f64, seed: u64) {
        for (at, lane) in self.shared.board().select(ends) {
            lane.set_loss(probability, seed.wrapping_add(at as u64));
        }
    }

    /// What every lane has done, by (from, to).
    pub fn stats(&self) -> BTreeMap<(String, String), LaneStats> {
        let board = self.shared.board();
        let stats = board.lanes.iter().map(|lane| lane.stats);
        board.names.iter().cloned().zip(stats).collect()
    }

    /// The lane between these ends, made when it is new.
    fn lane(&self, from: &str, to: &str) -> usize {
        let mut board = self.shared.board();
        let known = board.names.iter().position(|(a, b)| a == from && b == to);
        known.unwrap_or_else(|| {
            board.lanes.push(Lane::new(self.shape, Instant::now()));
            board.names.push((from.into(), to.into()));
            board.lanes.len() - 1
        })
    }
}

impl Drop for Relays {
    fn drop(&mut self) {
        self.ports = None;
        self.shared.board().stop = true;
        self.shared.earlier.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                warn!("a thread of the relay panicked");
            }
        }
        let board = self.shared.board();
        if board.send_failures > 0 {
            debug!(datagrams = board.send_failures, "relay could not send");
        }
    }
}

/// The sending thread: sleeps until the first departure, sends all that is due.
fn send_what_is_due(shared: &Shared) {
    let mut batch: Vec<Departure<Way>> = Vec::with_capacity(MAX_BATCH);
    let mut board = shared.board();
    while !board.stop {
        let now = Instant::now();
        for lane in &mut board.lanes {
            while batch.len() < MAX_BATCH {
                let Some(departure) = lane.take_due(now) else {
                    break;
                };
                batch.push(departure);
            }
        }
        if !batch.is_empty() {
            // Awake already: whoever offers meanwhile need not wake this thread.
            board.wakes_at = Some(now);
            drop(board);
            let failed: u64 = batch.drain(..).map(|departure| send(&departure)).sum();
            board = shared.board();
            board.send_failures += failed;
            continue;
        }
        let due = board.next_due();
        board.wakes_at = due;
        board = match due {
            Some(due) => {
                let wait = due.saturating_duration_since(now);
                let waited = shared.earlier.wait_timeout(board, wait);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => {
                let waited = shared.earlier.wait(board);
                waited.unwrap_or_else(PoisonError::into_inner)
            }
        };
    }
}

/// Sends one departure; returns how many datagrams did not go.
fn send(departure: &Departure<Way>) -> u64 {
    let Way { socket, to, ecn } = &departure.way;
    let at_once = socket.offload.max_gso_segments().max(1) * departure.segment_bytes;
    let mut failed = 0;
    for part in departure.bytes.chunks(at_once) {
        let transmit = Transmit {
            destination: *to,
            ecn: *ecn,
            contents: part,
            segment_size: (part.len() > departure.segment_bytes).then_some(departure.segment_bytes),
            src_ip: None,
        };
        // A full socket buffer is a drop, as on any router.
        if socket
            .offload
            .send(UdpSockRef::from(&socket.io), &transmit)
            .is_err()
        {
            failed += part.len().div_ceil(departure.segment_bytes) as u64;
        }
    }
    failed
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, RelayError> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(|source| failed("start a thread", source))
}

fn failed(action: &str, source: io::Error) -> RelayError {
    RelayError::Io {
        action: action.into(),
        source,
    }
}
