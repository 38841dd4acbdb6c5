//! Length-prefixed messages on one stream, and the header every stream starts with.
//!
//! Control streams carry small typed messages (postcard, `u32` length prefix).
//! Session streams use the same reader with a `u64` prefix, see `session/`.
//! Lengths are checked before anything is reserved, and memory that is used grows
//! with the bytes that arrive, not with the length that was promised.

use crate::carrier::{ReadError, RecvStream, SendStream, WriteError};
use crate::{Link, TransportError};
use bytes::{Bytes, BytesMut};
use quinn::VarInt;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;

/// Version of the layout of headers and messages in this crate.
pub const WIRE_VERSION: u32 = 2;

/// A stream of a session that ended by an abort or a failure is reset with this code.
pub(crate) const CODE_FAILED: VarInt = VarInt::from_u32(1);
/// A stream whose header could not be understood is refused with this code.
pub(crate) const CODE_BAD_HEADER: VarInt = VarInt::from_u32(2);
/// A stream for a session that nobody here waits for is refused with this code.
pub(crate) const CODE_UNCLAIMED: VarInt = VarInt::from_u32(3);

/// What a stream is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StreamKind {
    /// Typed messages between daemons and tools.
    Control,
    /// Frames of the rounds between two parties of a session.
    Rounds,
    /// Dealer material of a session.
    Material,
}

impl StreamKind {
    fn to_wire(self) -> u8 {
        match self {
            StreamKind::Control => 1,
            StreamKind::Rounds => 2,
            StreamKind::Material => 3,
        }
    }

    fn from_wire(byte: u8) -> Option<StreamKind> {
        [
            StreamKind::Control,
            StreamKind::Rounds,
            StreamKind::Material,
        ]
        .into_iter()
        .find(|kind| kind.to_wire() == byte)
    }

    /// Control goes before rounds, rounds before material dealt ahead.
    pub(crate) fn priority(self) -> i32 {
        match self {
            StreamKind::Control => 2,
            StreamKind::Rounds => 1,
            StreamKind::Material => 0,
        }
    }
}

/// wire version (u32), kind (u8), session (32 bytes), little-endian.
pub(crate) const HEADER_BYTES: usize = 4 + 1 + 32;

pub(crate) fn encode_header(tag: u8, session: &[u8; 32]) -> [u8; HEADER_BYTES] {
    let mut header = [0u8; HEADER_BYTES];
    header[..4].copy_from_slice(&WIRE_VERSION.to_le_bytes());
    header[4] = tag;
    header[5..].copy_from_slice(session);
    header
}

/// Tag and session of a header, or what is wrong with it.
pub(crate) fn decode_header(header: &[u8; HEADER_BYTES]) -> Result<(u8, [u8; 32]), String> {
    let (mut version, mut session) = ([0u8; 4], [0u8; 32]);
    version.copy_from_slice(&header[..4]);
    session.copy_from_slice(&header[5..]);
    let version = u32::from_le_bytes(version);
    if version == WIRE_VERSION {
        Ok((header[4], session))
    } else {
        Err(format!(
            "wire version {version}, this node speaks {WIRE_VERSION}"
        ))
    }
}

/// A bidirectional stream whose header has been read or written.
pub(crate) struct RawStream {
    pub(crate) send: SendStream,
    pub(crate) reader: FrameReader,
}

impl RawStream {
    pub(crate) async fn write_header(
        send: &mut SendStream,
        kind: StreamKind,
        session: &[u8; 32],
    ) -> Result<(), WriteError> {
        send.set_priority(kind.priority());
        send.write_all(&encode_header(kind.to_wire(), session))
            .await
    }

    pub(crate) async fn read_header(
        recv: &mut RecvStream,
    ) -> Result<(StreamKind, [u8; 32]), String> {
        let mut header = [0u8; HEADER_BYTES];
        recv.read_exact(&mut header).await?;
        let (tag, session) = decode_header(&header)?;
        let kind =
            StreamKind::from_wire(tag).ok_or_else(|| format!("unknown stream kind {tag}"))?;
        Ok((kind, session))
    }
}

/// The width of a length prefix.
#[derive(Clone, Copy)]
pub(crate) enum Prefix {
    U32,
    U64,
}

impl Prefix {
    fn bytes(self) -> usize {
        match self {
            Prefix::U32 => 4,
            Prefix::U64 => 8,
        }
    }

    /// Most that is reserved for a message before any of it is here. Frames of a session's few
    /// streams get the address space of a usual round at once: growing in steps would copy each
    /// twice. Its pages are used as bytes arrive.
    fn first_reserve_bytes(self) -> usize {
        match self {
            Prefix::U32 => 256 << 10,
            Prefix::U64 => 16 << 20,
        }
    }
}

/// Why no frame came.
#[derive(Debug)]
pub(crate) enum FrameError {
    Read(ReadError),
    /// The stream ended inside a frame.
    Truncated,
    TooLong {
        len: u64,
        max: u64,
    },
}

/// Reads frames; a dropped `next` loses nothing, the following one goes on.
pub(crate) struct FrameReader {
    stream: RecvStream,
    chunks: VecDeque<Bytes>,
    scratch: Vec<Bytes>,
    prefix: BytesMut,
    body: Option<(usize, Vec<u8>)>,
}

/// Chunks taken with one lock of the connection.
const CHUNKS_AT_ONCE: usize = 64;

impl FrameReader {
    pub(crate) fn new(stream: RecvStream) -> FrameReader {
        FrameReader {
            stream,
            chunks: VecDeque::new(),
            scratch: vec![Bytes::new(); CHUNKS_AT_ONCE],
            prefix: BytesMut::new(),
            body: None,
        }
    }

    /// The next frame, or `None` where the peer finished the stream between frames.
    pub(crate) async fn next(
        &mut self,
        prefix: Prefix,
        max: u64,
    ) -> Result<Option<Bytes>, FrameError> {
        loop {
            while let Some(front) = self.chunks.front_mut() {
                if self.body.is_none() {
                    let missing = prefix.bytes() - self.prefix.len();
                    let part = front.split_to(missing.min(front.len()));
                    self.prefix.extend_from_slice(&part);
                    if self.prefix.len() == prefix.bytes() {
                        let len = self
                            .prefix
                            .iter()
                            .rev()
                            .fold(0u64, |len, byte| len << 8 | u64::from(*byte));
                        self.prefix.clear();
                        let fits = usize::try_from(len).ok().filter(|_| len <= max);
                        let len = fits.ok_or(FrameError::TooLong { len, max })?;
                        self.body = Some((
                            len,
                            Vec::with_capacity(len.min(prefix.first_reserve_bytes())),
                        ));
                    }
                }
                if let Some((len, body)) = &mut self.body {
                    let part = front.split_to((*len - body.len()).min(front.len()));
                    if body.capacity() - body.len() < part.len() {
                        // Doubles, and ends exactly at the length.
                        body.reserve_exact(body.capacity().min(*len - body.len()).max(part.len()));
                    }
                    body.extend_from_slice(&part);
                    if body.len() == *len {
                        let body = Bytes::from(std::mem::take(body));
                        self.body = None;
                        return Ok(Some(body));
                    }
                }
                if front.is_empty() {
                    self.chunks.pop_front();
                }
            }
            match self
                .stream
                .read_chunks(&mut self.scratch)
                .await
                .map_err(FrameError::Read)?
            {
                Some(count) => self
                    .chunks
                    .extend(self.scratch[..count].iter_mut().map(std::mem::take)),
                None if self.body.is_none() && self.prefix.is_empty() => return Ok(None),
                None => return Err(FrameError::Truncated),
            }
        }
    }

    /// Reads and drops everything up to the stream's end; says how many bytes that were.
    pub(crate) async fn discard(&mut self) -> Result<u64, ReadError> {
        let mut bytes: u64 = self.chunks.drain(..).map(|chunk| chunk.len() as u64).sum();
        while let Some(count) = self.stream.read_chunks(&mut self.scratch).await? {
            let taken = self.scratch[..count].iter_mut().map(std::mem::take);
            bytes += taken.map(|chunk| chunk.len() as u64).sum::<u64>();
        }
        Ok(bytes)
    }

    pub(crate) fn stop(&mut self, code: VarInt) {
        self.stream.stop(code);
    }
}

/// Writes one message with its `u32` length.
pub(crate) async fn write_message(
    send: &mut SendStream,
    message: Bytes,
) -> Result<(), MessageError> {
    let len =
        u32::try_from(message.len()).map_err(|_| MessageError::TooLong(message.len() as u64))?;
    let mut parts = [Bytes::copy_from_slice(&len.to_le_bytes()), message];
    send.write_all_chunks(&mut parts)
        .await
        .map_err(MessageError::Write)
}

pub(crate) enum MessageError {
    TooLong(u64),
    Write(WriteError),
}

/// A bidirectional stream of messages. Keeps its connection alive.
pub struct MsgStream {
    sender: MsgSender,
    receiver: MsgReceiver,
}

/// The sending half of a [`MsgStream`].
pub struct MsgSender {
    send: SendStream,
    link: Link,
}

/// The receiving half of a [`MsgStream`].
pub struct MsgReceiver {
    reader: FrameReader,
    link: Link,
}

impl MsgStream {
    pub(crate) fn new(raw: RawStream, link: Link) -> MsgStream {
        MsgStream {
            sender: MsgSender {
                send: raw.send,
                link: link.clone(),
            },
            receiver: MsgReceiver {
                reader: raw.reader,
                link,
            },
        }
    }

    /// The connection this stream belongs to.
    pub fn link(&self) -> &Link {
        &self.sender.link
    }

    /// Sends one message.
    pub async fn send<T: Serialize>(&mut self, message: &T) -> Result<(), TransportError> {
        self.sender.send(message).await
    }

    /// Sends one message of raw bytes, without copying them.
    pub async fn send_bytes(&mut self, message: Bytes) -> Result<(), TransportError> {
        self.sender.send_bytes(message).await
    }

    /// Receives one message of at most `max_bytes`; `None` where the peer finished.
    /// Waits as long as the link lives; dropping the future loses nothing.
    pub async fn recv<T: DeserializeOwned>(
        &mut self,
        max_bytes: usize,
    ) -> Result<Option<T>, TransportError> {
        self.receiver.recv(max_bytes).await
    }

    /// Receives one message of raw bytes, see [`MsgStream::recv`].
    pub async fn recv_bytes(&mut self, max_bytes: usize) -> Result<Option<Bytes>, TransportError> {
        self.receiver.recv_bytes(max_bytes).await
    }

    /// The two halves, for use from two tasks.
    pub fn split(self) -> (MsgSender, MsgReceiver) {
        (self.sender, self.receiver)
    }

    /// Says that no more messages come, and waits (bounded) until the peer's
    /// transport has all of them.
    pub async fn finish(self) -> Result<(), TransportError> {
        self.sender.finish().await
    }
}

impl MsgSender {
    /// Sends one message.
    pub async fn send<T: Serialize>(&mut self, message: &T) -> Result<(), TransportError> {
        let bytes = postcard::to_stdvec(message).map_err(|err| TransportError::Malformed {
            addr: self.link.remote_addr(),
            detail: format!("a message of this node cannot be encoded: {err}"),
        })?;
        self.send_bytes(bytes.into()).await
    }

    /// Sends one message of raw bytes, without copying them.
    pub async fn send_bytes(&mut self, message: Bytes) -> Result<(), TransportError> {
        write_message(&mut self.send, message)
            .await
            .map_err(|err| self.link.message_error(err))
    }

    /// See [`MsgStream::finish`].
    pub async fn finish(mut self) -> Result<(), TransportError> {
        let waited = self.link.settings().close_timeout();
        if !self.send.finish() {
            return Ok(());
        }
        match tokio::time::timeout(waited, self.send.stopped()).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(lost)) => Err(self.link.closed_error(self.link.describe(&lost))),
            Err(_) => Err(TransportError::Timeout {
                what: format!(
                    "delivering the last messages to {}",
                    self.link.remote_addr()
                ),
                waited_ms: waited.as_millis() as u64,
            }),
        }
    }
}

impl MsgReceiver {
    /// See [`MsgStream::recv`].
    pub async fn recv<T: DeserializeOwned>(
        &mut self,
        max_bytes: usize,
    ) -> Result<Option<T>, TransportError> {
        let Some(bytes) = self.recv_bytes(max_bytes).await? else {
            return Ok(None);
        };
        match postcard::take_from_bytes(&bytes) {
            Ok((message, [])) => Ok(Some(message)),
            Ok((_, rest)) => Err(self.malformed(format!("{} bytes after its end", rest.len()))),
            Err(err) => Err(self.malformed(err.to_string())),
        }
    }

    /// See [`MsgStream::recv`].
    pub async fn recv_bytes(&mut self, max_bytes: usize) -> Result<Option<Bytes>, TransportError> {
        self.reader
            .next(Prefix::U32, max_bytes as u64)
            .await
            .map_err(|err| self.link.frame_error(err))
    }

    fn malformed(&self, detail: String) -> TransportError {
        TransportError::Malformed {
            addr: self.link.remote_addr(),
            detail,
        }
    }
}
