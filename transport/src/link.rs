//! One authenticated connection: its streams, its counters, and its orderly end.
//!
//! What the peer opens is sorted by `sorter.rs`, so a daemon's control loop and
//! any number of sessions share one connection without knowing each other.

use crate::carrier::{Connection, Lost, ReadError, SendStream, WriteError};
use crate::sorter::{CONTROL_BACKLOG, Registration, Sorter, sort_notices, sort_streams};
use crate::stream::{
    CODE_BAD_HEADER, CODE_UNCLAIMED, FrameError, FrameReader, MessageError, RawStream,
};
use crate::{MsgStream, Pin, Protocol, Settings, StreamKind, TransportError};
use quinn::VarInt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc};

/// One authenticated connection to a peer. Clones share it; it closes when the
/// last clone and the last stream are gone.
#[derive(Clone)]
pub struct Link(Arc<LinkInner>);

pub(crate) struct LinkInner {
    conn: Connection,
    peer: Pin,
    incoming: bool,
    settings: Arc<Settings>,
    runtime: Handle,
    control: tokio::sync::Mutex<mpsc::Receiver<([u8; 32], RawStream)>>,
    sorter: Arc<Sorter>,
    deliveries: Arc<Deliveries>,
}

impl Drop for LinkInner {
    fn drop(&mut self) {
        self.conn.close("the link is no longer used");
    }
}

/// Counters of a connection as they are on the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// Bytes in UDP or TCP payloads sent. Over TCP those that this node's system took.
    pub sent_bytes: u64,
    /// Bytes in UDP or TCP payloads received.
    pub received_bytes: u64,
    /// Datagrams sent; 0 over TCP, as all below but `rtt`.
    pub sent_datagrams: u64,
    /// Datagrams received.
    pub received_datagrams: u64,
    /// Packets this side sent that had to be sent again.
    pub lost_packets: u64,
    /// Bytes this side may have in flight.
    pub congestion_window_bytes: u64,
    /// UDP payload size in use on this path.
    pub datagram_bytes: u16,
    /// Smoothed round trip.
    pub rtt: Duration,
}

impl Link {
    /// Must run inside the runtime that drives the endpoint.
    pub(crate) fn new(
        conn: Connection,
        peer: Pin,
        incoming: bool,
        settings: Arc<Settings>,
    ) -> Link {
        let runtime = Handle::current();
        let sorter = Arc::new(Sorter::default());
        let (control_tx, control) = mpsc::channel(CONTROL_BACKLOG);
        let handshake = settings.handshake_timeout();
        runtime.spawn(sort_streams(
            conn.clone(),
            sorter.clone(),
            control_tx,
            handshake,
        ));
        runtime.spawn(sort_notices(conn.clone(), sorter.clone(), handshake));
        Link(Arc::new(LinkInner {
            conn,
            peer,
            incoming,
            settings,
            runtime,
            control: tokio::sync::Mutex::new(control),
            sorter,
            deliveries: Arc::default(),
        }))
    }

    /// The public key the peer proved to hold.
    pub fn peer(&self) -> Pin {
        self.0.peer
    }

    /// The peer's address.
    pub fn remote_addr(&self) -> SocketAddr {
        self.0.conn.remote_address()
    }

    /// Smoothed round trip.
    pub fn rtt(&self) -> Duration {
        self.0.conn.rtt()
    }

    /// Counters of the connection.
    pub fn stats(&self) -> LinkStats {
        self.0.conn.stats()
    }

    /// What it runs over.
    pub fn protocol(&self) -> Protocol {
        match self.0.conn {
            Connection::Quic(_) => Protocol::Quic,
            Connection::Tcp(_) => Protocol::Tcp,
        }
    }

    /// Opens a message stream. `session` may be zero for messages outside of one.
    pub async fn open(
        &self,
        kind: StreamKind,
        session: [u8; 32],
    ) -> Result<MsgStream, TransportError> {
        let raw = self.open_raw(kind, session).await?;
        Ok(MsgStream::new(raw, self.clone()))
    }

    /// The next control stream the peer opened. Streams of rounds and material
    /// do not come here: the session they name takes them.
    pub async fn accept(&self) -> Result<(StreamKind, [u8; 32], MsgStream), TransportError> {
        let next = self.0.control.lock().await.recv().await;
        match next {
            Some((session, raw)) => Ok((
                StreamKind::Control,
                session,
                MsgStream::new(raw, self.clone()),
            )),
            None => Err(self.closed_error(self.closed().await)),
        }
    }

    /// Closes the connection after the last messages of finished sessions and of
    /// aborts have arrived (bounded by `close_timeout_ms`). Returns at once.
    pub fn close(&self, reason: &str) {
        let (link, reason) = (self.clone(), reason.to_owned());
        self.0.runtime.spawn(async move {
            link.drain().await;
            link.close_now(&reason);
        });
    }

    /// Waits until the connection is closed, by whomever, and says why.
    pub async fn closed(&self) -> String {
        self.describe(&self.0.conn.closed().await)
    }

    pub(crate) fn close_now(&self, reason: &str) {
        self.0.conn.close(reason);
    }

    /// Where the link runs over TCP: waits, bounded, until the peer has heard the close.
    pub(crate) async fn gone(&self) {
        if let Connection::Tcp(link) = &self.0.conn {
            link.gone().await;
        }
    }

    /// Waits, bounded, for the last messages to be acknowledged.
    pub(crate) async fn drain(&self) {
        let done = self.0.deliveries.idle();
        if tokio::time::timeout(self.0.settings.close_timeout(), done)
            .await
            .is_err()
        {
            tracing::warn!(peer = %self.remote_addr(), "closing before the last messages were acknowledged");
        }
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.0.settings
    }

    pub(crate) fn is_incoming(&self) -> bool {
        self.0.incoming
    }

    /// Closed because nothing was heard, not because the peer said so.
    pub(crate) fn fell_silent(&self) -> bool {
        matches!(self.0.conn.close_reason(), Some(Lost::TimedOut))
    }

    pub(crate) fn downgrade(&self) -> Weak<LinkInner> {
        Arc::downgrade(&self.0)
    }

    pub(crate) fn upgrade(weak: &Weak<LinkInner>) -> Option<Link> {
        weak.upgrade().map(Link)
    }

    /// While the guard lives, [`Link::close`] waits.
    pub(crate) fn delivery(&self) -> Delivery {
        self.0.deliveries.count.fetch_add(1, Ordering::AcqRel);
        Delivery(self.0.deliveries.clone())
    }

    pub(crate) async fn open_raw(
        &self,
        kind: StreamKind,
        session: [u8; 32],
    ) -> Result<RawStream, TransportError> {
        let waited = self.0.settings.handshake_timeout();
        let opening = async {
            let (mut send, recv) = self
                .0
                .conn
                .open_bi()
                .await
                .map_err(|err| self.closed_error(self.describe(&err)))?;
            RawStream::write_header(&mut send, kind, &session)
                .await
                .map_err(|err| self.closed_error(self.describe_write(&err)))?;
            Ok(RawStream {
                send,
                reader: FrameReader::new(recv),
            })
        };
        match tokio::time::timeout(waited, opening).await {
            Ok(result) => result,
            Err(_) => Err(TransportError::Timeout {
                what: format!("opening a stream to {}", self.remote_addr()),
                waited_ms: waited.as_millis() as u64,
            }),
        }
    }

    /// Waits for the stream of this kind and session, or the end of the link.
    pub(crate) async fn claim(
        &self,
        kind: StreamKind,
        session: [u8; 32],
    ) -> Result<RawStream, TransportError> {
        loop {
            let arrived = self.0.sorter.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            if let Some(raw) = self.0.sorter.take(kind, session) {
                return Ok(raw);
            }
            tokio::select! {
                () = arrived => {}
                err = self.0.conn.closed() => return Err(self.closed_error(self.describe(&err))),
            }
        }
    }

    /// Calls `tell` when the peer aborts `session`, now if it already has.
    pub(crate) fn on_abort(
        &self,
        session: [u8; 32],
        tell: impl Fn(String) + Send + Sync + 'static,
    ) -> Registration {
        self.0.sorter.register(session, Arc::new(tell))
    }

    /// Tells the peer, ahead of everything else, that the session is over.
    pub(crate) fn send_abort(&self, session: [u8; 32], reason: &str) {
        let guard = self.delivery();
        let (link, waited) = (self.clone(), self.0.settings.close_timeout());
        let reason = reason.to_owned();
        self.0.runtime.spawn(async move {
            let sending = link.0.conn.send_abort(session, &reason);
            if !matches!(tokio::time::timeout(waited, sending).await, Ok(Ok(()))) {
                tracing::debug!(peer = %link.remote_addr(), "an abort could not be delivered");
            }
            drop(guard);
        });
    }

    /// Finishes a stream in the background; the link's close waits for it.
    pub(crate) fn finish_in_background(&self, mut send: SendStream) {
        let (guard, waited) = (self.delivery(), self.0.settings.close_timeout());
        self.0.runtime.spawn(async move {
            if send.finish() {
                let _ = tokio::time::timeout(waited, send.stopped()).await;
            }
            drop(guard);
        });
    }

    pub(crate) fn closed_error(&self, reason: String) -> TransportError {
        TransportError::Closed {
            addr: self.remote_addr(),
            reason,
        }
    }

    pub(crate) fn frame_error(&self, err: FrameError) -> TransportError {
        let addr = self.remote_addr();
        match err {
            FrameError::Read(err) => self.closed_error(self.describe_read(&err)),
            FrameError::Truncated => TransportError::Malformed {
                addr,
                detail: "the stream ended inside a message".into(),
            },
            FrameError::TooLong { len, max } => TransportError::TooLong { addr, len, max },
        }
    }

    pub(crate) fn message_error(&self, err: MessageError) -> TransportError {
        match err {
            MessageError::TooLong(len) => TransportError::TooLong {
                addr: self.remote_addr(),
                len,
                max: u32::MAX.into(),
            },
            MessageError::Write(err) => self.closed_error(self.describe_write(&err)),
        }
    }

    pub(crate) fn describe(&self, lost: &Lost) -> String {
        match lost {
            Lost::TimedOut => {
                format!("no sign of life for {} ms", self.0.settings.idle_timeout_ms)
            }
            Lost::ByPeer(reason) => format!("closed by the peer: {reason}"),
            Lost::Locally => "closed by this node".into(),
            Lost::Restarted => "the peer has restarted".into(),
            Lost::Broken(detail) => detail.clone(),
        }
    }

    pub(crate) fn describe_read(&self, err: &ReadError) -> String {
        match err {
            ReadError::Connection(lost) => self.describe(lost),
            ReadError::Reset(code) => describe_code(*code),
            ReadError::Broken(detail) => detail.clone(),
        }
    }

    pub(crate) fn describe_write(&self, err: &WriteError) -> String {
        match err {
            WriteError::Connection(lost) => self.describe(lost),
            WriteError::Stopped(code) => describe_code(*code),
            WriteError::Ended => "this node has ended the stream".into(),
            WriteError::Broken(detail) => detail.clone(),
        }
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Link {{ peer: {}, addr: {} }}",
            self.peer(),
            self.remote_addr()
        )
    }
}

fn describe_code(code: VarInt) -> String {
    if code == CODE_BAD_HEADER {
        format!(
            "the peer does not understand this node's streams (wire version here {})",
            crate::WIRE_VERSION
        )
    } else if code == CODE_UNCLAIMED {
        "the peer knows no such session".into()
    } else if code == crate::stream::CODE_FAILED {
        "the peer's side of the session failed".into()
    } else {
        "the peer ended the stream".into()
    }
}

/// Messages that a close waits for.
#[derive(Default)]
struct Deliveries {
    count: AtomicUsize,
    zero: Notify,
}

impl Deliveries {
    async fn idle(&self) {
        loop {
            let zero = self.zero.notified();
            tokio::pin!(zero);
            zero.as_mut().enable();
            if self.count.load(Ordering::Acquire) == 0 {
                return;
            }
            zero.await;
        }
    }
}

/// One message, or the end of one stream, on its way.
pub(crate) struct Delivery(Arc<Deliveries>);

impl Drop for Delivery {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.zero.notify_waiters();
        }
    }
}
