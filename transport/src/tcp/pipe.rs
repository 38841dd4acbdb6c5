//! One TLS connection over TCP, as the two halves of a stream.
//!
//! A half ends like a half of a QUIC stream: finished with TLS's own end (close_notify, so that a
//! cut is never taken for an end), or reset without it. A receiver that wants no more reads on and
//! throws away, because a socket that is closed with something unread takes with it what was still
//! to be sent.

use super::TcpLink;
use crate::carrier::{Lost, ReadError, WriteError};
use bytes::{Buf, Bytes, BytesMut};
use socket2::SockRef;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio_rustls::TlsStream;

/// Read from the socket at once; TLS asks for less.
pub(super) const SOCKET_READ_BYTES: usize = 128 << 10;
/// Handed on at once, at the most.
const CHUNK_BYTES: usize = 64 << 10;
/// Parts written with one call.
const PARTS_AT_ONCE: usize = 8;
/// A stream that breaks may be the first sign of its link's end, whose reason is on its way.
const REASON_GRACE: Duration = Duration::from_millis(300);

/// Bytes of a link on the wire, TLS included.
#[derive(Debug, Default)]
pub(super) struct WireBytes {
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
}

/// A TCP socket that counts.
#[derive(Debug)]
pub(super) struct Socket {
    tcp: TcpStream,
    bytes: Arc<WireBytes>,
}

impl Socket {
    /// Nothing waits for more to send, and a middlebox sees the connection alive.
    pub(super) fn new(tcp: TcpStream, bytes: Arc<WireBytes>) -> io::Result<BufReader<Socket>> {
        tcp.set_nodelay(true)?;
        let alive = socket2::TcpKeepalive::new()
            .with_time(Duration::from_secs(30))
            .with_interval(Duration::from_secs(15));
        SockRef::from(&tcp).set_tcp_keepalive(&alive)?;
        let socket = Socket { tcp, bytes };
        Ok(BufReader::with_capacity(SOCKET_READ_BYTES, socket))
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.tcp).poll_read(cx, buf);
        let read = (buf.filled().len() - before) as u64;
        self.bytes.received.fetch_add(read, Ordering::Relaxed);
        polled
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.tcp).poll_write(cx, bytes);
        self.sent(polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.tcp).poll_write_vectored(cx, parts);
        self.sent(polled)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

impl Socket {
    fn sent(&self, polled: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(written)) = &polled {
            self.bytes
                .sent
                .fetch_add(*written as u64, Ordering::Relaxed);
        }
        polled
    }
}

pub(super) type Tls = TlsStream<BufReader<Socket>>;

/// A connection that its two halves share; it closes when both are gone.
pub(super) struct Pipe(Mutex<Tls>);

impl Pipe {
    pub(super) fn new(tls: Tls) -> Arc<Pipe> {
        Arc::new(Pipe(Mutex::new(tls)))
    }

    /// The two halves. Without a link (which is for a link's own first connection) a failure is
    /// said as the socket says it.
    pub(super) fn split(
        self: Arc<Pipe>,
        link: Option<Arc<TcpLink>>,
        runtime: &Handle,
    ) -> (TcpSend, TcpRecv) {
        let send = TcpSend {
            pipe: Some(self.clone()),
            link: link.clone(),
            runtime: runtime.clone(),
            finished: None,
        };
        let recv = TcpRecv {
            pipe: Some(self),
            link,
            runtime: runtime.clone(),
            buffer: BytesMut::new(),
        };
        (send, recv)
    }

    fn lock(&self) -> MutexGuard<'_, Tls> {
        // A panic inside TLS leaves a connection that fails by itself.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends what has come; leaves the buffer as it is at the end.
    fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut BytesMut) -> Poll<io::Result<()>> {
        let mut tls = self.lock();
        let before = buffer.len();
        loop {
            let mut pinned = Pin::new(&mut *tls);
            match pinned.as_mut().poll_fill_buf(cx) {
                Poll::Ready(Ok([])) => return Poll::Ready(Ok(())),
                Poll::Ready(Ok(bytes)) => {
                    let taken = bytes.len();
                    buffer.extend_from_slice(bytes);
                    pinned.consume(taken);
                    if buffer.len() - before >= CHUNK_BYTES {
                        return Poll::Ready(Ok(()));
                    }
                }
                // What came before is handed on first; the same comes again.
                Poll::Pending | Poll::Ready(Err(_)) if buffer.len() > before => {
                    return Poll::Ready(Ok(()));
                }
                Poll::Ready(Err(err)) => return Poll::Ready(Err(err)),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Writes all parts, and what TLS made of them.
    fn poll_write(&self, cx: &mut Context<'_>, parts: &mut [Bytes]) -> Poll<io::Result<()>> {
        loop {
            // For one call: the other half has its turn in between.
            let mut tls = self.lock();
            let left = parts.iter().position(|part| !part.is_empty());
            let Some(left) = left.map(|at| &mut parts[at..]) else {
                return Pin::new(&mut *tls).poll_flush(cx);
            };
            let mut slices = [IoSlice::new(&[]); PARTS_AT_ONCE];
            let count = left.len().min(PARTS_AT_ONCE);
            for (slice, part) in slices.iter_mut().zip(left.iter()) {
                *slice = IoSlice::new(part);
            }
            let mut written =
                ready!(Pin::new(&mut *tls).poll_write_vectored(cx, &slices[..count]))?;
            for part in left {
                let here = written.min(part.len());
                part.advance(here);
                written -= here;
            }
        }
    }

    fn poll_shutdown(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.lock()).poll_shutdown(cx)
    }

    /// Ends the socket in these directions, without TLS's end.
    pub(super) fn cut(&self, how: Shutdown) {
        let tls = self.lock();
        // Fails only where it is cut already.
        let _ = SockRef::from(&tls.get_ref().0.get_ref().tcp).shutdown(how);
    }
}

/// The sending half of a stream over TCP.
pub(crate) struct TcpSend {
    /// `None` once it is finished or reset.
    pipe: Option<Arc<Pipe>>,
    link: Option<Arc<TcpLink>>,
    runtime: Handle,
    /// Says when all has gone.
    finished: Option<oneshot::Receiver<()>>,
}

impl TcpSend {
    pub(crate) async fn write_all_chunks(&mut self, parts: &mut [Bytes]) -> Result<(), WriteError> {
        let Some(pipe) = &self.pipe else {
            return Err(WriteError::Ended);
        };
        match poll_fn(|cx| pipe.poll_write(cx, parts)).await {
            Ok(()) => Ok(()),
            Err(err) => match reason(self.link.as_deref()).await {
                Some(lost) => Err(WriteError::Connection(lost)),
                None => Err(WriteError::Broken(describe(&err))),
            },
        }
    }

    pub(crate) fn finish(&mut self) -> bool {
        let Some(pipe) = self.pipe.take() else {
            return false;
        };
        let (done, finished) = oneshot::channel();
        self.finished = Some(finished);
        // Ends with the link at the latest, which cuts its connections.
        self.runtime.spawn(async move {
            if poll_fn(|cx| pipe.poll_shutdown(cx)).await.is_ok() {
                // An error means that nobody waits.
                let _ = done.send(());
            }
        });
        true
    }

    pub(crate) async fn stopped(&mut self) -> Result<(), Lost> {
        let Some(finished) = &mut self.finished else {
            return Err(Lost::Broken("the stream is not finished".into()));
        };
        if finished.await.is_ok() {
            return Ok(());
        }
        let lost = reason(self.link.as_deref()).await;
        Err(lost.unwrap_or_else(|| Lost::Broken("the stream broke".into())))
    }

    pub(crate) fn reset(&mut self) {
        if let Some(pipe) = self.pipe.take() {
            pipe.cut(Shutdown::Write);
        }
    }
}

impl Drop for TcpSend {
    fn drop(&mut self) {
        self.finish();
    }
}

/// The receiving half of a stream over TCP.
pub(crate) struct TcpRecv {
    /// `None` once nothing more comes or is wanted.
    pipe: Option<Arc<Pipe>>,
    link: Option<Arc<TcpLink>>,
    runtime: Handle,
    buffer: BytesMut,
}

impl TcpRecv {
    /// Reads until something has come; false at the end.
    async fn fill(&mut self) -> Result<bool, ReadError> {
        let Some(pipe) = &self.pipe else {
            return Ok(!self.buffer.is_empty());
        };
        self.buffer.reserve(CHUNK_BYTES);
        let before = self.buffer.len();
        match poll_fn(|cx| pipe.poll_read(cx, &mut self.buffer)).await {
            Ok(()) => {
                if let Some(link) = &self.link {
                    link.hear();
                }
                if self.buffer.len() == before {
                    self.pipe = None;
                }
                Ok(!self.buffer.is_empty())
            }
            Err(err) => match reason(self.link.as_deref()).await {
                Some(lost) => Err(ReadError::Connection(lost)),
                None => Err(ReadError::Broken(describe(&err))),
            },
        }
    }

    pub(crate) async fn read_chunks(
        &mut self,
        chunks: &mut [Bytes],
    ) -> Result<Option<usize>, ReadError> {
        if self.buffer.is_empty() && !self.fill().await? {
            return Ok(None);
        }
        chunks[0] = self.buffer.split().freeze();
        Ok(Some(1))
    }

    pub(crate) async fn read_exact(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        while self.buffer.len() < bytes.len() {
            let before = self.buffer.len();
            let more = self.fill().await.map_err(|err| format!("{err:?}"))?;
            if !more || self.buffer.len() == before {
                return Err("the stream ended early".into());
            }
        }
        self.buffer.split_to(bytes.len()).copy_to_slice(bytes);
        Ok(())
    }

    pub(crate) fn stop(&mut self) {
        self.buffer.clear();
        if let Some(pipe) = self.pipe.take() {
            // Ends with the peer's end or with the link, which cuts its connections.
            let unlinked = self.link.is_none();
            self.runtime.spawn(async move {
                match unlinked {
                    // No link would cut it: a peer that never ends must not hold the connection.
                    true => {
                        let _ = tokio::time::timeout(UNLINKED_GRACE, discard(pipe.clone())).await;
                        pipe.cut(Shutdown::Both);
                    }
                    false => discard(pipe).await,
                }
            });
        }
    }
}

impl Drop for TcpRecv {
    fn drop(&mut self) {
        self.stop();
    }
}

/// How long a connection that belongs to no link may go on sending after it was given up.
const UNLINKED_GRACE: std::time::Duration = std::time::Duration::from_secs(2);

/// Reads and drops everything up to the end.
async fn discard(pipe: Arc<Pipe>) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.clear();
        let read = poll_fn(|cx| pipe.poll_read(cx, &mut buffer)).await;
        if read.is_err() || buffer.is_empty() {
            return;
        }
    }
}

/// Why the link is closed, if it is or is about to be.
async fn reason(link: Option<&TcpLink>) -> Option<Lost> {
    let closed = tokio::time::timeout(REASON_GRACE, link?.closed());
    closed.await.ok()
}

pub(super) fn describe(err: &io::Error) -> String {
    match err.kind() {
        io::ErrorKind::UnexpectedEof
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::BrokenPipe => "the peer ended the connection".into(),
        _ => err.to_string(),
    }
}
