//! What the threads and tasks of one session share: its failure, its queues, its
//! counters, and the way to tell everybody that it is over.

use crate::queue::FrameQueue;
use crate::sorter::Registration;
use crate::{Link, Settings, TransportError};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use trefoil_protocol::party::Peer;
use trefoil_protocol::transport::NetError;

/// A stream that breaks may have an abort on its way that says why, from this
/// peer or from a third that knew first. This long it may take on a loaded host.
pub(super) const ABORT_GRACE: Duration = Duration::from_millis(1_000);

/// Place of a peer in arrays of counters: the parties, then the dealer.
pub(super) fn slot(peer: Peer) -> usize {
    match peer {
        Peer::Party(party) => party.index(),
        Peer::Dealer => 3,
    }
}

pub(super) struct SessionState {
    role: String,
    pub(super) session: [u8; 32],
    links: Vec<(Peer, Link)>,
    inner: Mutex<Inner>,
    failed: Notify,
    pub(super) counters: Counters,
}

/// Which way a queue's frames go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Outgoing,
    Incoming,
}

/// Who learns of a failure from this node.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tell {
    /// Every peer of the session, with the reason.
    Peers,
    /// Nobody: the author of the abort has told all.
    Nobody,
}

#[derive(Default)]
struct Inner {
    failure: Option<NetError>,
    queues: Vec<(Direction, Arc<FrameQueue>)>,
    registrations: Vec<Registration>,
}

impl SessionState {
    pub(super) fn new(
        role: String,
        session: [u8; 32],
        links: Vec<(Peer, Link)>,
    ) -> Arc<SessionState> {
        let state = Arc::new(SessionState {
            role,
            session,
            links,
            inner: Mutex::default(),
            failed: Notify::new(),
            counters: Counters::default(),
        });
        for (peer, link) in &state.links {
            let (weak, by) = (Arc::downgrade(&state), peer.to_string());
            let registration = link.on_abort(session, move |reason| {
                if let Some(state) = weak.upgrade() {
                    let by = by.clone();
                    state.fail(NetError::Aborted { by, reason }, Tell::Nobody);
                }
            });
            state.lock().registrations.push(registration);
        }
        state
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A queue that fails with the session.
    pub(super) fn queue(&self, direction: Direction, queue: FrameQueue) -> Arc<FrameQueue> {
        let queue = Arc::new(queue);
        let failure = {
            let mut inner = self.lock();
            inner.queues.push((direction, queue.clone()));
            inner.failure.clone()
        };
        if let Some(err) = failure {
            queue.fail(err, true);
        }
        queue
    }

    /// Ends the session with an error, of which only the first counts. What peers
    /// sent before may still be taken, unless it is an abort.
    pub(super) fn fail(&self, err: NetError, tell: Tell) {
        let aborted = matches!(err, NetError::Aborted { .. });
        let queues = {
            let mut inner = self.lock();
            if inner.failure.is_some() {
                return;
            }
            inner.failure = Some(err.clone());
            inner.queues.clone()
        };
        tracing::debug!(role = %self.role, %err, "session failed");
        // Before the streams break, so that a peer learns why they do.
        if tell == Tell::Peers {
            let reason = match &err {
                NetError::Aborted { reason, .. } => reason.clone(),
                other => other.to_string(),
            };
            for (_, link) in &self.links {
                link.send_abort(self.session, &reason);
            }
        }
        for (direction, queue) in queues {
            queue.fail(err.clone(), aborted || direction == Direction::Outgoing);
        }
        self.failed.notify_waiters();
    }

    pub(super) fn failure(&self) -> Option<NetError> {
        self.lock().failure.clone()
    }

    pub(super) async fn failed(&self) -> NetError {
        loop {
            let failed = self.failed.notified();
            tokio::pin!(failed);
            failed.as_mut().enable();
            if let Some(err) = self.failure() {
                return err;
            }
            failed.await;
        }
    }

    /// A stream or link of `peer` broke: fails the session, with the abort that
    /// explains it if one arrives.
    pub(super) async fn lost(&self, peer: Peer, link: &Link, reason: String) {
        // A peer that fell silent has nothing on its way.
        let grace = if link.fell_silent() {
            Duration::ZERO
        } else {
            ABORT_GRACE
        };
        if tokio::time::timeout(grace, self.failed()).await.is_err() {
            self.fail(NetError::Closed { peer, reason }, Tell::Peers);
        }
    }

    /// Runs the setting-up of the streams: bounded in time, ended by an abort,
    /// and its own failure told to the other nodes.
    pub(super) async fn set_up<T>(
        &self,
        settings: &Settings,
        streams: impl Future<Output = Result<T, TransportError>>,
    ) -> Result<T, TransportError> {
        let waited_ms = settings.handshake_timeout_ms;
        let result = tokio::select! {
            biased;
            result = tokio::time::timeout(settings.handshake_timeout(), streams) => match result {
                Ok(result) => result,
                Err(_) => Err(TransportError::Timeout { what: "starting the session with all peers".into(), waited_ms }),
            },
            err = self.failed() => Err(as_transport_error(err)),
        };
        let err = match result {
            Ok(streams) => return Ok(streams),
            Err(err) => err,
        };
        if matches!(err, TransportError::Closed { .. })
            && let Ok(cause) = tokio::time::timeout(ABORT_GRACE, self.failed()).await
        {
            return Err(as_transport_error(cause));
        }
        if !matches!(err, TransportError::Aborted { .. }) {
            let reason = err.to_string();
            // To all, the peer that differs included: whoever hears of the failure
            // first leaves, and must not leave the others without the reason.
            for (_, link) in &self.links {
                link.send_abort(self.session, &reason);
            }
        }
        Err(err)
    }

    pub(super) fn stats(&self) -> SessionStats {
        let read = |counters: &[AtomicU64; 4]| {
            counters
                .each_ref()
                .map(|counter| counter.load(Ordering::Relaxed))
        };
        let counters = &self.counters;
        let (sent_frames, received_frames) =
            (read(&counters.sent_frames), read(&counters.received_frames));
        SessionStats {
            sent_bytes: read(&counters.sent_bytes),
            received_bytes: read(&counters.received_bytes),
            sent_frames,
            received_frames,
            rounds: received_frames[..3].iter().copied().max().unwrap_or(0),
        }
    }
}

fn as_transport_error(err: NetError) -> TransportError {
    match err {
        NetError::Aborted { by, reason } => TransportError::Aborted { by, reason },
        other => TransportError::Session {
            detail: other.to_string(),
        },
    }
}

/// Counted where the protocol posts and takes, not where QUIC sends: a frame
/// counts once, however often its packets travel.
#[derive(Default)]
pub(super) struct Counters {
    sent_bytes: [AtomicU64; 4],
    received_bytes: [AtomicU64; 4],
    sent_frames: [AtomicU64; 4],
    received_frames: [AtomicU64; 4],
}

impl Counters {
    pub(super) fn sent(&self, slot: usize, bytes: u64) {
        self.sent_bytes[slot].fetch_add(bytes, Ordering::Relaxed);
        self.sent_frames[slot].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn received(&self, slot: usize, bytes: u64) {
        self.received_bytes[slot].fetch_add(bytes, Ordering::Relaxed);
        self.received_frames[slot].fetch_add(1, Ordering::Relaxed);
    }
}

/// What a session has sent and received: payloads with 8 bytes of header a
/// frame. Indexed by peer: P0, P1, P2, dealer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionStats {
    /// Bytes posted to each peer.
    pub sent_bytes: [u64; 4],
    /// Bytes taken from each peer.
    pub received_bytes: [u64; 4],
    /// Frames posted to each peer.
    pub sent_frames: [u64; 4],
    /// Frames taken from each peer.
    pub received_frames: [u64; 4],
    /// Rounds: the most frames taken from one other party.
    pub rounds: u64,
}

impl SessionStats {
    /// Payload bytes posted to `peer`, without the frames' headers.
    pub fn payload_sent(&self, peer: Peer) -> u64 {
        self.sent_bytes[slot(peer)] - super::FRAME_HEADER_BYTES * self.sent_frames[slot(peer)]
    }

    /// Payload bytes taken from `peer`, without the frames' headers.
    pub fn payload_received(&self, peer: Peer) -> u64 {
        self.received_bytes[slot(peer)]
            - super::FRAME_HEADER_BYTES * self.received_frames[slot(peer)]
    }
}

/// Ends a session from outside the protocol thread, and watches it.
#[derive(Clone)]
pub struct AbortHandle {
    state: Arc<SessionState>,
}

impl AbortHandle {
    pub(super) fn new(state: Arc<SessionState>) -> AbortHandle {
        AbortHandle { state }
    }

    /// Ends the session here and at every peer: all pending and later `post` and
    /// `next` fail with who aborted and why. Returns at once; an orderly close of
    /// the links or the node waits until the peers have the reason. Does nothing
    /// in a session that has failed already: the peers have been told then.
    pub fn abort(&self, reason: &str) {
        let by = self.state.role.clone();
        self.state.fail(
            NetError::Aborted {
                by,
                reason: reason.to_owned(),
            },
            Tell::Peers,
        );
    }

    /// Why the session has failed, if it has.
    pub fn failure(&self) -> Option<NetError> {
        self.state.failure()
    }

    /// Waits until the session fails. A session that ends well never does.
    pub async fn failed(&self) -> NetError {
        self.state.failed().await
    }

    /// The session's counters so far.
    pub fn stats(&self) -> SessionStats {
        self.state.stats()
    }
}

impl std::fmt::Debug for AbortHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "AbortHandle {{ role: {}, failure: {:?} }}",
            self.state.role,
            self.failure()
        )
    }
}
