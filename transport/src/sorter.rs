//! What a peer opens on a link, on its way to whom it is meant for.
//!
//! Two tasks per link accept streams, read their headers (bounded in time and
//! number) and hand them on: control streams to the link's backlog, session
//! streams to the session that claims them, aborts to the session they name.
//! What comes before its session has started here waits, bounded in number.

use crate::StreamKind;
use crate::carrier::Connection;
use crate::stream::{
    CODE_BAD_HEADER, CODE_UNCLAIMED, FrameReader, HEADER_BYTES, RawStream, decode_header,
    encode_header,
};
use quinn::{ConnectionError, RecvStream, WriteError};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};

/// Control streams that wait for `Link::accept`.
pub(crate) const CONTROL_BACKLOG: usize = 64;
/// Session streams, and aborts, that came before their session started here.
pub(crate) const PARKED_MAX: usize = 64;
/// Longest reason of an abort on the wire.
pub(crate) const REASON_MAX_BYTES: usize = 4 << 10;

/// Tags of unidirectional streams.
pub(crate) const TAG_GREETING: u8 = 0;
pub(crate) const TAG_ABORT: u8 = 1;

/// At most [`REASON_MAX_BYTES`], cut between characters.
pub(crate) fn clip(reason: &str) -> &str {
    let mut end = reason.len().min(REASON_MAX_BYTES);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}

/// Told the reason when a peer aborts a session.
pub(crate) type TellAbort = dyn Fn(String) + Send + Sync;

/// Streams and aborts on their way to whom they are meant for.
#[derive(Default)]
pub(crate) struct Sorter {
    state: Mutex<SorterState>,
    pub(crate) arrived: Notify,
}

#[derive(Default)]
struct SorterState {
    parked: VecDeque<(StreamKind, [u8; 32], RawStream)>,
    aborts: VecDeque<([u8; 32], String)>,
    sessions: HashMap<[u8; 32], Arc<TellAbort>>,
}

impl Sorter {
    pub(crate) fn register(
        self: &Arc<Self>,
        session: [u8; 32],
        tell: Arc<TellAbort>,
    ) -> Registration {
        let early = {
            let mut state = self.lock();
            state.sessions.insert(session, tell.clone());
            let early = state.aborts.iter().position(|(id, _)| *id == session);
            early.and_then(|at| state.aborts.remove(at))
        };
        if let Some((_, reason)) = early {
            tell(reason);
        }
        Registration {
            sorter: self.clone(),
            session,
        }
    }

    fn lock(&self) -> MutexGuard<'_, SorterState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn take(&self, kind: StreamKind, session: [u8; 32]) -> Option<RawStream> {
        let mut state = self.lock();
        let at = state
            .parked
            .iter()
            .position(|(k, s, _)| *k == kind && *s == session)?;
        state.parked.remove(at).map(|(_, _, raw)| raw)
    }

    fn park(&self, kind: StreamKind, session: [u8; 32], raw: RawStream) {
        let evicted = {
            let mut state = self.lock();
            state.parked.push_back((kind, session, raw));
            if state.parked.len() > PARKED_MAX {
                state.parked.pop_front()
            } else {
                None
            }
        };
        if let Some((_, _, mut raw)) = evicted {
            raw.send.reset(CODE_UNCLAIMED);
            raw.reader.stop(CODE_UNCLAIMED);
        }
        self.arrived.notify_waiters();
    }

    fn abort(&self, session: [u8; 32], reason: String) {
        let tell = {
            let mut state = self.lock();
            let tell = state.sessions.get(&session).cloned();
            if tell.is_none() {
                state.aborts.push_back((session, reason.clone()));
                if state.aborts.len() > PARKED_MAX {
                    state.aborts.pop_front();
                }
            }
            tell
        };
        if let Some(tell) = tell {
            tell(reason);
        }
    }
}

/// A session's entry in a link's sorter; dropping it removes the entry.
pub(crate) struct Registration {
    sorter: Arc<Sorter>,
    session: [u8; 32],
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.sorter.lock().sessions.remove(&self.session);
    }
}

pub(crate) async fn sort_streams(
    conn: Connection,
    sorter: Arc<Sorter>,
    control: mpsc::Sender<([u8; 32], RawStream)>,
    header_timeout: Duration,
) {
    while let Ok((mut send, mut recv)) = conn.accept_bi().await {
        let (sorter, control) = (sorter.clone(), control.clone());
        // One task a stream, bounded by the connection's stream limit: a slow header
        // holds up nobody else.
        tokio::spawn(async move {
            let header =
                match tokio::time::timeout(header_timeout, RawStream::read_header(&mut recv)).await
                {
                    Ok(Ok(header)) => Ok(header),
                    Ok(Err(detail)) => Err(detail),
                    Err(_) => Err("no header in time".into()),
                };
            let (kind, session) = match header {
                Ok(header) => header,
                Err(detail) => {
                    tracing::debug!(%detail, "refused a stream");
                    send.reset(CODE_BAD_HEADER);
                    recv.stop(CODE_BAD_HEADER);
                    return;
                }
            };
            send.set_priority(kind.priority());
            let raw = RawStream {
                send,
                reader: FrameReader::new(recv),
            };
            if kind == StreamKind::Control {
                // Waits while the backlog is full; an error means that the link is gone.
                let _ = control.send((session, raw)).await;
            } else {
                sorter.park(kind, session, raw);
            }
        });
    }
}

pub(crate) async fn sort_notices(conn: Connection, sorter: Arc<Sorter>, timeout: Duration) {
    let conn = match conn {
        Connection::Quic(conn) => conn,
        Connection::Tcp(link) => {
            while let Some((session, reason)) = link.next_abort().await {
                sorter.abort(session, reason);
            }
            return;
        }
    };
    while let Ok(mut recv) = conn.accept_uni().await {
        let sorter = sorter.clone();
        tokio::spawn(async move {
            match tokio::time::timeout(timeout, read_notice(&mut recv)).await {
                Ok(Ok((TAG_ABORT, session, reason))) => sorter.abort(session, reason),
                Ok(Ok((tag, _, _))) => tracing::debug!(tag, "ignored an unknown notice"),
                Ok(Err(detail)) => tracing::debug!(%detail, "ignored a notice"),
                Err(_) => tracing::debug!("ignored a notice that did not end"),
            }
        });
    }
}

async fn read_notice(recv: &mut RecvStream) -> Result<(u8, [u8; 32], String), String> {
    let bytes = recv
        .read_to_end(HEADER_BYTES + REASON_MAX_BYTES)
        .await
        .map_err(|err| err.to_string())?;
    let header = bytes.first_chunk::<HEADER_BYTES>().ok_or("too short")?;
    let (tag, session) = decode_header(header)?;
    Ok((
        tag,
        session,
        String::from_utf8_lossy(&bytes[HEADER_BYTES..]).into_owned(),
    ))
}

/// Waits for the word by which the listening side says that it has checked this
/// node's certificate; TLS alone leaves the client in doubt.
pub(crate) async fn await_greeting(conn: &quinn::Connection) -> Result<(), ConnectionError> {
    let mut recv = conn.accept_uni().await?;
    match read_notice(&mut recv).await {
        Ok((TAG_GREETING, _, _)) => Ok(()),
        _ => Err(conn
            .close_reason()
            .unwrap_or(ConnectionError::VersionMismatch)),
    }
}

/// The listening side's part of [`await_greeting`].
pub(crate) async fn greet(conn: &quinn::Connection) -> Result<(), WriteError> {
    let mut send = conn.open_uni().await?;
    send.write_all(&encode_header(TAG_GREETING, &[0; 32]))
        .await?;
    send.finish().map_err(|_| WriteError::ClosedStream)
}
