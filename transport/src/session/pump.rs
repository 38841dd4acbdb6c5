//! The tasks that move frames between queues and streams.
//!
//! Each ends with its stream or its session. A task that is dropped because the
//! runtime ends still fails its queue, so that no thread waits for it.

use super::state::{ABORT_GRACE, SessionState, Tell};
use crate::Link;
use crate::carrier::{SendStream, WriteError};
use crate::queue::{End, FrameQueue};
use crate::stream::{CODE_FAILED, FrameError, FrameReader, Prefix};
use bytes::Bytes;
use std::sync::Arc;
use tokio::task::JoinHandle;
use trefoil_protocol::party::Peer;
use trefoil_protocol::transport::NetError;

/// Fails the session if its task vanishes without an end.
struct Lifeline {
    state: Arc<SessionState>,
    peer: Peer,
    ended: bool,
}

impl Drop for Lifeline {
    fn drop(&mut self) {
        if !self.ended {
            let reason = "the network runtime of this node has stopped".into();
            self.state.fail(
                NetError::Closed {
                    peer: self.peer,
                    reason,
                },
                Tell::Peers,
            );
        }
    }
}

/// Writes what the protocol posts, one frame after the other.
pub(super) async fn write_frames(
    state: Arc<SessionState>,
    peer: Peer,
    link: Link,
    mut send: SendStream,
    queue: Arc<FrameQueue>,
) {
    let mut lifeline = Lifeline {
        state: state.clone(),
        peer,
        ended: false,
    };
    let end = loop {
        let frame = match queue.pop().await {
            Ok(frame) => frame,
            Err(end) => break end,
        };
        let mut parts = [
            Bytes::copy_from_slice(&(frame.len() as u64).to_le_bytes()),
            frame,
        ];
        let written = tokio::select! {
            biased;
            written = send.write_all_chunks(&mut parts) => written,
            end = queue.broken() => break end,
        };
        match written {
            Ok(()) => {}
            // The peer has what it needs of the session; only a later post is an error.
            Err(WriteError::Stopped(_)) => {
                // It may have stopped because of an abort that is on its way here too.
                let _ = tokio::time::timeout(ABORT_GRACE, queue.broken()).await;
                lifeline.ended = true;
                queue.abandon();
                return;
            }
            Err(err) => {
                state.lost(peer, &link, link.describe_write(&err)).await;
                lifeline.ended = true;
                return;
            }
        }
    };
    lifeline.ended = true;
    match end {
        End::Finished => {
            let delivery = queue.take_delivery();
            if send.finish() {
                // Bounded; a peer that has gone needs nothing more.
                let _ = tokio::time::timeout(link.settings().close_timeout(), send.stopped()).await;
            }
            drop(delivery);
        }
        End::Abandoned | End::Failed(_) => {
            send.reset(CODE_FAILED);
        }
    }
}

/// Drains what the peer sends into memory, up to the queue's bound.
pub(super) async fn read_frames(
    state: Arc<SessionState>,
    peer: Peer,
    link: Link,
    mut reader: FrameReader,
    queue: Arc<FrameQueue>,
    max_frame_bytes: u64,
) {
    let mut lifeline = Lifeline {
        state: state.clone(),
        peer,
        ended: false,
    };
    loop {
        let frame = tokio::select! {
            biased;
            // First, so that the close of a link after the end of the rounds is
            // not taken for a failure.
            _ = queue.broken() => break,
            frame = reader.next(Prefix::U64, max_frame_bytes) => frame,
        };
        match frame {
            Ok(Some(frame)) => {
                let admitted = tokio::select! {
                    biased;
                    admitted = queue.space() => admitted,
                    reason = link.closed() => {
                        lost_unless_broken(&state, peer, &link, reason, &queue).await;
                        break;
                    }
                };
                if admitted.is_err() {
                    break;
                }
                queue.push(frame);
            }
            Ok(None) => {
                queue.finish(None);
                break;
            }
            Err(FrameError::Read(err)) => {
                let reason = link.describe_read(&err);
                lost_unless_broken(&state, peer, &link, reason, &queue).await;
                break;
            }
            Err(FrameError::Truncated) => {
                let detail = "its stream ended inside a frame".into();
                state.fail(NetError::Protocol { peer, detail }, Tell::Peers);
                break;
            }
            Err(FrameError::TooLong { len, max }) => {
                let detail = format!("announced a frame of {len} bytes, the limit is {max}");
                state.fail(NetError::Protocol { peer, detail }, Tell::Peers);
                break;
            }
        }
    }
    lifeline.ended = true;
    reader.stop(CODE_FAILED);
}

/// A stream broke while its frames were wanted; while waiting for the reason,
/// they may have stopped being so.
async fn lost_unless_broken(
    state: &SessionState,
    peer: Peer,
    link: &Link,
    reason: String,
    queue: &FrameQueue,
) {
    tokio::select! {
        biased;
        _ = queue.broken() => {}
        () = state.lost(peer, link, reason) => {}
    }
}

/// The dealer's side of the other half of a material stream: the party says how far the writer may
/// go, and its end, or the loss of the link, is noticed while nothing is being sent. Ends with the
/// writer.
pub(super) async fn read_credits(
    state: Arc<SessionState>,
    peer: Peer,
    link: Link,
    mut reader: FrameReader,
    queue: Arc<FrameQueue>,
    writer: JoinHandle<()>,
) {
    let reading = async {
        loop {
            match reader.next(Prefix::U64, size_of::<u64>() as u64).await {
                Ok(Some(frame)) => match <[u8; size_of::<u64>()]>::try_from(&frame[..]) {
                    Ok(total) => queue.grant(u64::from_le_bytes(total)),
                    Err(_) => {
                        let detail = "its word on the dealer's look-ahead is no number".into();
                        return state.fail(NetError::Protocol { peer, detail }, Tell::Peers);
                    }
                },
                Ok(None) => {
                    // It takes no more, because it is done or because of an abort on its way here.
                    let _ = tokio::time::timeout(ABORT_GRACE, state.failed()).await;
                    return queue.abandon();
                }
                Err(FrameError::Read(err)) => {
                    return state.lost(peer, &link, link.describe_read(&err)).await;
                }
                Err(_) => {
                    let detail = "it sent something on the dealer's stream".into();
                    return state.fail(NetError::Protocol { peer, detail }, Tell::Peers);
                }
            }
        }
    };
    tokio::select! {
        biased;
        // A vanished writer has failed the session itself.
        _ = writer => {}
        () = reading => {}
    }
}
