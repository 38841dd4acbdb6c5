//! What a link runs over: one QUIC connection, or TLS connections over TCP (`tcp/`). The rest of
//! the crate sees streams in two directions, and does not see which.
//!
//! The methods are quinn's, as far as they are used, with the errors that both kinds have.

use crate::LinkStats;
use crate::sorter::{TAG_ABORT, clip};
use crate::stream::encode_header;
use crate::tcp::{TcpLink, TcpRecv, TcpSend};
use bytes::Bytes;
use quinn::{ConnectionError, VarInt};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// Why a connection is no more.
#[derive(Clone, Debug)]
pub(crate) enum Lost {
    /// Nothing was heard for too long.
    TimedOut,
    /// The peer closed it and said why.
    ByPeer(String),
    /// This node closed it.
    Locally,
    /// The peer knows nothing of it any more.
    Restarted,
    /// It broke.
    Broken(String),
}

impl From<ConnectionError> for Lost {
    fn from(err: ConnectionError) -> Lost {
        match err {
            ConnectionError::TimedOut => Lost::TimedOut,
            ConnectionError::ApplicationClosed(close) => {
                Lost::ByPeer(String::from_utf8_lossy(&close.reason).into_owned())
            }
            ConnectionError::LocallyClosed => Lost::Locally,
            ConnectionError::Reset => Lost::Restarted,
            other => Lost::Broken(other.to_string()),
        }
    }
}

/// Why a stream gives nothing more.
#[derive(Clone, Debug)]
pub(crate) enum ReadError {
    Connection(Lost),
    /// The peer ended it before its end, with QUIC's code.
    Reset(VarInt),
    /// The stream broke while its link went on.
    Broken(String),
}

impl From<quinn::ReadError> for ReadError {
    fn from(err: quinn::ReadError) -> ReadError {
        match err {
            quinn::ReadError::ConnectionLost(err) => ReadError::Connection(err.into()),
            quinn::ReadError::Reset(code) => ReadError::Reset(code),
            other => ReadError::Broken(other.to_string()),
        }
    }
}

/// Why a stream takes nothing more.
#[derive(Clone, Debug)]
pub(crate) enum WriteError {
    Connection(Lost),
    /// The peer reads no more, with QUIC's code. Over TCP it reads to the end without saying so.
    Stopped(VarInt),
    /// This node has ended it.
    Ended,
    /// The stream broke while its link went on.
    Broken(String),
}

impl From<quinn::WriteError> for WriteError {
    fn from(err: quinn::WriteError) -> WriteError {
        match err {
            quinn::WriteError::ConnectionLost(err) => WriteError::Connection(err.into()),
            quinn::WriteError::Stopped(code) => WriteError::Stopped(code),
            quinn::WriteError::ClosedStream => WriteError::Ended,
            other => WriteError::Broken(other.to_string()),
        }
    }
}

/// An authenticated connection.
#[derive(Clone)]
pub(crate) enum Connection {
    Quic(quinn::Connection),
    Tcp(Arc<TcpLink>),
}

impl Connection {
    pub(crate) fn remote_address(&self) -> SocketAddr {
        match self {
            Connection::Quic(conn) => conn.remote_address(),
            Connection::Tcp(link) => link.remote_address(),
        }
    }

    pub(crate) fn rtt(&self) -> Duration {
        match self {
            Connection::Quic(conn) => conn.rtt(),
            Connection::Tcp(link) => link.rtt(),
        }
    }

    pub(crate) fn stats(&self) -> LinkStats {
        match self {
            Connection::Quic(conn) => {
                let stats = conn.stats();
                LinkStats {
                    sent_bytes: stats.udp_tx.bytes,
                    received_bytes: stats.udp_rx.bytes,
                    sent_datagrams: stats.udp_tx.datagrams,
                    received_datagrams: stats.udp_rx.datagrams,
                    lost_packets: stats.path.lost_packets,
                    congestion_window_bytes: stats.path.cwnd,
                    datagram_bytes: stats.path.current_mtu,
                    rtt: stats.path.rtt,
                }
            }
            Connection::Tcp(link) => link.stats(),
        }
    }

    pub(crate) async fn open_bi(&self) -> Result<(SendStream, RecvStream), Lost> {
        match self {
            Connection::Quic(conn) => {
                let (send, recv) = conn.open_bi().await?;
                Ok((SendStream::Quic(send), RecvStream::Quic(recv)))
            }
            Connection::Tcp(link) => {
                let (send, recv) = link.open().await?;
                Ok((SendStream::Tcp(send), RecvStream::Tcp(recv)))
            }
        }
    }

    pub(crate) async fn accept_bi(&self) -> Result<(SendStream, RecvStream), Lost> {
        match self {
            Connection::Quic(conn) => {
                let (send, recv) = conn.accept_bi().await?;
                Ok((SendStream::Quic(send), RecvStream::Quic(recv)))
            }
            Connection::Tcp(link) => {
                let (send, recv) = link.accept().await?;
                Ok((SendStream::Tcp(send), RecvStream::Tcp(recv)))
            }
        }
    }

    /// Tells the peer, ahead of everything else, that a session is over. Returns when the peer's
    /// transport has it (QUIC) or this host's kernel (TCP, which delivers it after a close too).
    pub(crate) async fn send_abort(&self, session: [u8; 32], reason: &str) -> Result<(), Lost> {
        let reason = clip(reason);
        match self {
            Connection::Quic(conn) => {
                let mut notice = encode_header(TAG_ABORT, &session).to_vec();
                notice.extend_from_slice(reason.as_bytes());
                let mut send = conn.open_uni().await?;
                // Only a closed stream has no priority; the write reports it.
                let _ = send.set_priority(i32::MAX);
                if send.write_all(&notice).await.is_ok() && send.finish().is_ok() {
                    let _ = send.stopped().await;
                }
                Ok(())
            }
            Connection::Tcp(link) => link.send_abort(session, reason).await,
        }
    }

    pub(crate) fn close(&self, reason: &str) {
        match self {
            Connection::Quic(conn) => conn.close(VarInt::from_u32(0), clip(reason).as_bytes()),
            Connection::Tcp(link) => link.close(clip(reason)),
        }
    }

    pub(crate) async fn closed(&self) -> Lost {
        match self {
            Connection::Quic(conn) => conn.closed().await.into(),
            Connection::Tcp(link) => link.closed().await,
        }
    }

    pub(crate) fn close_reason(&self) -> Option<Lost> {
        match self {
            Connection::Quic(conn) => conn.close_reason().map(Lost::from),
            Connection::Tcp(link) => link.close_reason(),
        }
    }
}

/// The sending half of a stream. Dropped without a reset, it is finished.
pub(crate) enum SendStream {
    Quic(quinn::SendStream),
    Tcp(TcpSend),
}

impl SendStream {
    /// Streams of TCP have connections of their own, and no priorities.
    pub(crate) fn set_priority(&self, priority: i32) {
        if let SendStream::Quic(send) = self {
            // Fails only on a stream that is over, which its next use reports.
            let _ = send.set_priority(priority);
        }
    }

    pub(crate) async fn write_all(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        match self {
            SendStream::Quic(send) => Ok(send.write_all(bytes).await?),
            SendStream::Tcp(send) => {
                let mut parts = [Bytes::copy_from_slice(bytes)];
                send.write_all_chunks(&mut parts).await
            }
        }
    }

    pub(crate) async fn write_all_chunks(&mut self, parts: &mut [Bytes]) -> Result<(), WriteError> {
        match self {
            SendStream::Quic(send) => Ok(send.write_all_chunks(parts).await?),
            SendStream::Tcp(send) => send.write_all_chunks(parts).await,
        }
    }

    /// Says that no more comes; false where the stream is over already.
    pub(crate) fn finish(&mut self) -> bool {
        match self {
            SendStream::Quic(send) => send.finish().is_ok(),
            SendStream::Tcp(send) => send.finish(),
        }
    }

    /// Waits until the peer has all that a finished stream has sent, or reads no more; over TCP
    /// until this host's kernel has it, see [`Connection::send_abort`].
    pub(crate) async fn stopped(&mut self) -> Result<(), Lost> {
        match self {
            SendStream::Quic(send) => match send.stopped().await {
                Ok(_) => Ok(()),
                Err(quinn::StoppedError::ConnectionLost(err)) => Err(err.into()),
                Err(err) => Err(Lost::Broken(err.to_string())),
            },
            SendStream::Tcp(send) => send.stopped().await,
        }
    }

    /// Ends the stream so that the peer sees that something is missing.
    pub(crate) fn reset(&mut self, code: VarInt) {
        match self {
            // Fails only on a stream that is over already.
            SendStream::Quic(send) => drop(send.reset(code)),
            SendStream::Tcp(send) => send.reset(),
        }
    }
}

/// The receiving half of a stream. Dropped before its end, the rest is not wanted.
pub(crate) enum RecvStream {
    Quic(quinn::RecvStream),
    Tcp(TcpRecv),
}

impl RecvStream {
    pub(crate) async fn read_exact(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        match self {
            RecvStream::Quic(recv) => recv.read_exact(bytes).await.map_err(|err| err.to_string()),
            RecvStream::Tcp(recv) => recv.read_exact(bytes).await,
        }
    }

    /// How many of `chunks` are filled, at least one; `None` at the stream's end.
    pub(crate) async fn read_chunks(
        &mut self,
        chunks: &mut [Bytes],
    ) -> Result<Option<usize>, ReadError> {
        match self {
            RecvStream::Quic(recv) => Ok(recv.read_chunks(chunks).await?),
            RecvStream::Tcp(recv) => recv.read_chunks(chunks).await,
        }
    }

    pub(crate) fn stop(&mut self, code: VarInt) {
        match self {
            // Fails only where the stream is over already.
            RecvStream::Quic(recv) => drop(recv.stop(code)),
            RecvStream::Tcp(recv) => recv.stop(),
        }
    }
}
