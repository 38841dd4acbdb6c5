//! A link over TCP, for networks that let no UDP out: the same keys, the same handshake (TLS 1.3)
//! and the same frames as over QUIC.
//!
//! A link's first connection carries nothing but words about the link ([`Word`]): signs of life,
//! aborts, the close. Every stream is a connection of its own, so nothing is multiplexed here and a
//! stream's window is TCP's. All connections go the same way, from who dialled to who listens: the
//! listening side asks with [`Word::Open`] where it wants a stream, so that a node which only dials
//! out can be reached by all. What joins them is the link's id, which the listening side draws at
//! random, and the public key that each connection's handshake proves.
//!
//! `dial.rs` and `listen.rs` make connections, `pipe.rs` is a stream.

mod dial;
mod listen;
mod pipe;
#[cfg(test)]
mod tests;

pub(crate) use dial::Dialler;
pub(crate) use listen::{Listener, bind};
pub(crate) use pipe::{TcpRecv, TcpSend};

use crate::carrier::{Lost, RecvStream, SendStream};
use crate::sorter::REASON_MAX_BYTES;
use crate::stream::{FrameError, FrameReader, Prefix, write_message};
use crate::{LinkStats, Pin, Settings};
use bytes::Bytes;
use pipe::{Pipe, WireBytes};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

/// Streams of a link at the same time, as over QUIC.
const STREAMS_MAX: usize = 256;
/// Streams that are being opened at the request of the other side.
const OPENING_MAX: usize = 64;
/// Words on their way to the peer.
const WORDS_MAX: usize = 64;
/// Longest word: an abort with its reason.
const WORD_MAX_BYTES: u64 = REASON_MAX_BYTES as u64 + 256;

/// What joins the connections of one link.
pub(crate) type LinkId = [u8; 24];

/// Tags of a connection's first bytes, which have the form of a stream's header. Then follow, for a
/// link's first connection, zeros; for a stream, the link's id and the number of the request that it
/// answers, or 0.
const TAG_LINK: u8 = 16;
const TAG_STREAM: u8 = 17;

/// What is said on a link's first connection.
#[derive(Debug, Serialize, Deserialize)]
enum Word {
    /// The listening side's first: it has checked the other's key.
    Welcome(LinkId),
    /// A sign of life, to be answered.
    Ping(u64),
    /// The answer.
    Pong(u64),
    /// The listening side needs a stream with this number.
    Open(u64),
    /// It cannot have it.
    CannotOpen(u64, String),
    /// A session is over.
    Abort([u8; 32], String),
    /// The link is.
    Close(String),
}

/// Streams that this side has asked for, by number.
type Awaited = HashMap<u64, oneshot::Sender<Result<Arc<Pipe>, String>>>;

/// A word, and who waits until it has been said.
type Spoken = (Word, Option<oneshot::Sender<()>>);

/// A link over TCP. Its two tasks hold it until it is closed.
pub(crate) struct TcpLink {
    id: LinkId,
    peer: Pin,
    remote: SocketAddr,
    /// At the side that dialled.
    dialler: Option<Dialler>,
    settings: Arc<Settings>,
    runtime: Handle,
    words: mpsc::Sender<Spoken>,
    /// Why it is closed, and what the peer is told.
    closed: watch::Sender<Option<(Lost, String)>>,
    /// The first connection has ended in both directions, or was given up.
    gone: watch::Sender<bool>,
    first: Arc<Pipe>,
    /// Connections of streams, to be cut with the link.
    pipes: Mutex<Vec<Weak<Pipe>>>,
    /// Streams that this side has asked for.
    awaited: Mutex<Awaited>,
    last_number: AtomicU64,
    /// Bounds what this side asks for at once, or opens at the other's request.
    opening: Arc<Semaphore>,
    opened: Inbox<Arc<Pipe>>,
    aborts: Inbox<([u8; 32], String)>,
    start: Instant,
    heard_ms: AtomicU64,
    rtt_us: AtomicU64,
    bytes: Arc<WireBytes>,
}

struct Inbox<T> {
    sender: mpsc::Sender<T>,
    receiver: tokio::sync::Mutex<mpsc::Receiver<T>>,
}

impl<T> Inbox<T> {
    fn new(places: usize) -> Inbox<T> {
        let (sender, receiver) = mpsc::channel(places);
        let receiver = tokio::sync::Mutex::new(receiver);
        Inbox { sender, receiver }
    }

    async fn next(&self) -> Option<T> {
        self.receiver.lock().await.recv().await
    }
}

/// What a link is made of.
struct Made {
    id: LinkId,
    peer: Pin,
    remote: SocketAddr,
    dialler: Option<Dialler>,
    settings: Arc<Settings>,
    rtt: Duration,
    bytes: Arc<WireBytes>,
}

/// A link's first connection.
struct First {
    pipe: Arc<Pipe>,
    send: SendStream,
    reader: FrameReader,
}

impl First {
    fn new(tls: pipe::Tls) -> First {
        let pipe = Pipe::new(tls);
        let (send, recv) = pipe.clone().split(None, &Handle::current());
        First {
            pipe,
            send: SendStream::Tcp(send),
            reader: FrameReader::new(RecvStream::Tcp(recv)),
        }
    }
}

impl TcpLink {
    /// Starts the link's two tasks on its first connection. Where the other side has made it, its
    /// welcome is the first word.
    fn start(made: Made, first: First) -> Arc<TcpLink> {
        let runtime = Handle::current();
        let (words, spoken) = mpsc::channel(WORDS_MAX);
        let link = Arc::new(TcpLink {
            id: made.id,
            peer: made.peer,
            remote: made.remote,
            dialler: made.dialler,
            settings: made.settings,
            runtime: runtime.clone(),
            words,
            closed: watch::channel(None).0,
            gone: watch::channel(false).0,
            first: first.pipe,
            pipes: Mutex::default(),
            awaited: Mutex::default(),
            last_number: AtomicU64::new(0),
            opening: Arc::new(Semaphore::new(OPENING_MAX)),
            opened: Inbox::new(STREAMS_MAX),
            aborts: Inbox::new(WORDS_MAX),
            start: Instant::now(),
            heard_ms: AtomicU64::new(0),
            rtt_us: AtomicU64::new(made.rtt.as_micros() as u64),
            bytes: made.bytes,
        });
        runtime.spawn(speak(link.clone(), first.send, spoken));
        runtime.spawn(hear_all(link.clone(), first.reader));
        link
    }

    pub(crate) fn remote_address(&self) -> SocketAddr {
        self.remote
    }

    pub(crate) fn rtt(&self) -> Duration {
        Duration::from_micros(self.rtt_us.load(Ordering::Relaxed))
    }

    pub(crate) fn stats(&self) -> LinkStats {
        LinkStats {
            sent_bytes: self.bytes.sent.load(Ordering::Relaxed),
            received_bytes: self.bytes.received.load(Ordering::Relaxed),
            rtt: self.rtt(),
            ..LinkStats::default()
        }
    }

    /// A stream to the peer.
    pub(crate) async fn open(self: &Arc<Self>) -> Result<(TcpSend, TcpRecv), Lost> {
        let permit = self.opening.acquire().await;
        let opening = async {
            match &self.dialler {
                Some(dialler) => dialler.stream(&self.id, 0).await.map_err(Lost::Broken),
                None => self.ask().await,
            }
        };
        let pipe = tokio::select! {
            biased;
            lost = self.closed() => return Err(lost),
            pipe = opening => pipe?,
        };
        drop(permit);
        self.register(&pipe);
        Ok(pipe.split(Some(self.clone()), &self.runtime))
    }

    /// Has the other side open a connection for a stream.
    async fn ask(&self) -> Result<Arc<Pipe>, Lost> {
        let number = 1 + self.last_number.fetch_add(1, Ordering::Relaxed);
        let (opened, opening) = oneshot::channel();
        self.awaited().insert(number, opened);
        // Also where the caller gives up.
        let _forget = Forget { link: self, number };
        self.say(Word::Open(number)).await?;
        match opening.await {
            Ok(Ok(pipe)) => Ok(pipe),
            Ok(Err(reason)) => Err(Lost::Broken(format!(
                "the peer could not open a connection for a stream: {reason}"
            ))),
            Err(_) => Err(self.closed().await),
        }
    }

    /// The next stream of the peer.
    pub(crate) async fn accept(self: &Arc<Self>) -> Result<(TcpSend, TcpRecv), Lost> {
        tokio::select! {
            biased;
            pipe = self.opened.next() => match pipe {
                Some(pipe) => Ok(pipe.split(Some(self.clone()), &self.runtime)),
                None => Err(self.closed().await),
            },
            lost = self.closed() => Err(lost),
        }
    }

    /// The next session that the peer has aborted, with its reason; `None` at the link's end.
    pub(crate) async fn next_abort(&self) -> Option<([u8; 32], String)> {
        tokio::select! {
            biased;
            abort = self.aborts.next() => abort,
            _ = self.closed() => None,
        }
    }

    pub(crate) async fn send_abort(&self, session: [u8; 32], reason: &str) -> Result<(), Lost> {
        self.say(Word::Abort(session, reason.into())).await
    }

    /// Says a word; returns once the kernel has it.
    async fn say(&self, word: Word) -> Result<(), Lost> {
        let (done, said) = oneshot::channel();
        // An error, as one of `said`, means that the link has ended.
        let _ = self.words.send((word, Some(done))).await;
        match said.await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.closed().await),
        }
    }

    /// Cuts all streams and tells the peer why.
    pub(crate) fn close(&self, reason: &str) {
        self.end(Lost::Locally, reason);
        self.cut();
    }

    pub(crate) async fn closed(&self) -> Lost {
        let mut closed = self.closed.subscribe();
        let lost = match closed.wait_for(Option::is_some).await {
            Ok(closed) => closed.as_ref().map(|(lost, _)| lost.clone()),
            Err(_) => None,
        };
        // The sender lives as long as this link.
        lost.unwrap_or(Lost::Locally)
    }

    pub(crate) fn close_reason(&self) -> Option<Lost> {
        self.closed.borrow().as_ref().map(|(lost, _)| lost.clone())
    }

    /// Waits until a closed link's first connection has ended; bounded by `close_timeout_ms`, twice.
    pub(crate) async fn gone(&self) {
        // The sender lives as long as this link.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }

    /// The first end is the one that counts.
    fn end(&self, lost: Lost, say: &str) {
        self.closed.send_if_modified(|closed| {
            let first = closed.is_none();
            if first {
                *closed = Some((lost, say.to_owned()));
            }
            first
        });
    }

    fn pipes(&self) -> MutexGuard<'_, Vec<Weak<Pipe>>> {
        self.pipes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn awaited(&self) -> MutexGuard<'_, Awaited> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many streams there are.
    fn streams(&self) -> usize {
        let mut pipes = self.pipes();
        pipes.retain(|pipe| pipe.strong_count() > 0);
        pipes.len()
    }

    fn register(&self, pipe: &Arc<Pipe>) {
        self.pipes().push(Arc::downgrade(pipe));
        // Looked at after the push: a close either finds the stream or is found here.
        if self
            .close_reason()
            .is_some_and(|lost| !matches!(lost, Lost::ByPeer(_)))
        {
            pipe.cut(Shutdown::Both);
        }
    }

    fn cut(&self) {
        let pipes: Vec<_> = self.pipes().iter().filter_map(Weak::upgrade).collect();
        pipes.iter().for_each(|pipe| pipe.cut(Shutdown::Both));
    }

    /// Takes a connection that the peer has made for a stream; refuses it by dropping it.
    fn take_stream(&self, pipe: Arc<Pipe>, number: u64) -> Result<(), &'static str> {
        if self.streams() >= STREAMS_MAX {
            return Err("the link has too many streams");
        }
        if number == 0 {
            self.register(&pipe);
            let taken = self.opened.sender.try_send(pipe);
            return taken.map_err(|_| "the link's streams are not taken");
        }
        let awaited = self.awaited().remove(&number);
        let opening = awaited.ok_or("nobody waits for this stream")?;
        let taken = opening.send(Ok(pipe));
        taken.map_err(|_| "nobody waits for this stream any more")
    }

    /// A sign of the peer.
    fn hear(&self) {
        let now = self.start.elapsed().as_millis() as u64;
        self.heard_ms.store(now, Ordering::Relaxed);
    }

    /// When the link ends unless something is heard.
    fn patience(&self) -> Instant {
        let heard = self.heard_ms.load(Ordering::Relaxed);
        self.start + Duration::from_millis(heard + self.settings.idle_timeout_ms)
    }

    /// Does what a word asks for. An error ends the link.
    async fn obey(self: &Arc<Self>, word: Word) -> Result<(), Lost> {
        match word {
            // Lost where the peer takes no answers: it will be silent then, too.
            Word::Ping(token) => drop(self.words.try_send((Word::Pong(token), None))),
            Word::Pong(token) => {
                let now = self.start.elapsed().as_micros() as u64;
                let sample = now.saturating_sub(token);
                let smoothed = match self.rtt_us.load(Ordering::Relaxed) {
                    0 => sample,
                    before => before - before / 8 + sample / 8,
                };
                self.rtt_us.store(smoothed, Ordering::Relaxed);
            }
            Word::Open(number) => self.open_for_peer(number)?,
            Word::CannotOpen(number, reason) => {
                let awaited = self.awaited().remove(&number);
                if let Some(awaited) = awaited {
                    // An error means that the caller has given up.
                    let _ = awaited.send(Err(reason));
                }
            }
            // Waits for this node's own sorter alone.
            Word::Abort(session, reason) => {
                let _ = self.aborts.sender.send((session, reason)).await;
            }
            Word::Close(reason) => return Err(Lost::ByPeer(reason)),
            Word::Welcome(_) => return Err(Lost::Broken("the peer welcomed twice".into())),
        }
        Ok(())
    }

    fn open_for_peer(self: &Arc<Self>, number: u64) -> Result<(), Lost> {
        let permit = self.opening.clone().try_acquire_owned();
        let (Some(dialler), Ok(permit)) = (self.dialler.clone(), permit) else {
            let detail = "the peer asked for more streams than it may";
            return Err(Lost::Broken(detail.into()));
        };
        let link = self.clone();
        self.runtime.spawn(async move {
            let opening = async {
                let pipe = dialler.stream(&link.id, number).await?;
                link.take_stream(pipe, 0).map_err(str::to_owned)
            };
            let opened = tokio::select! {
                biased;
                _ = link.closed() => return,
                opened = opening => opened,
            };
            if let Err(reason) = opened {
                tracing::debug!(peer = %link.remote, %reason, "a stream could not be opened");
                // An error means that the link has ended.
                let _ = link.say(Word::CannotOpen(number, reason)).await;
            }
            drop(permit);
        });
        Ok(())
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        self.cut();
    }
}

/// Takes a request for a stream back.
struct Forget<'a> {
    link: &'a TcpLink,
    number: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.link.awaited().remove(&self.number);
    }
}

/// Says words, and signs of life, until the link is closed, and then that it is.
async fn speak(link: Arc<TcpLink>, mut send: SendStream, mut words: mpsc::Receiver<Spoken>) {
    let mut alive = tokio::time::interval(Duration::from_millis(link.settings.keep_alive_ms));
    alive.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let close = link.settings.close_timeout();
    let given_up = async {
        link.closed().await;
        tokio::time::sleep(close).await;
    };
    let saying = async {
        loop {
            let (word, done) = tokio::select! {
                biased;
                // What was to be said before the close is said before it.
                Some(spoken) = words.recv() => spoken,
                lost = link.closed() => match lost {
                    Lost::Locally => break,
                    _ => return,
                },
                _ = alive.tick() => {
                    (Word::Ping(link.start.elapsed().as_micros() as u64), None)
                }
            };
            // `hear_all` notices a broken connection and says why.
            if say(&mut send, &word).await.is_err() {
                return;
            }
            if let Some(done) = done {
                // An error means that nobody waits.
                let _ = done.send(());
            }
        }
        words.close();
        let reason = link.closed.borrow().as_ref().map(|(_, say)| say.clone());
        if say(&mut send, &Word::Close(reason.unwrap_or_default()))
            .await
            .is_ok()
            && send.finish()
        {
            let _ = send.stopped().await;
        }
    };
    tokio::select! {
        biased;
        () = saying => {}
        () = given_up => tracing::debug!(peer = %link.remote, "the close could not be said"),
    }
}

async fn say(send: &mut SendStream, word: &Word) -> Result<(), ()> {
    let bytes = postcard::to_stdvec(word).map_err(|_| ())?;
    write_message(send, Bytes::from(bytes))
        .await
        .map_err(|_| ())
}

/// The next word; `None` where the peer ended its side.
async fn next_word(reader: &mut FrameReader) -> Result<Option<Word>, String> {
    match reader.next(Prefix::U32, WORD_MAX_BYTES).await {
        Ok(Some(bytes)) => postcard::from_bytes(&bytes)
            .map(Some)
            .map_err(|err| format!("the peer said something that is not understood: {err}")),
        Ok(None) => Ok(None),
        Err(FrameError::TooLong { len, .. }) => Err(format!("the peer said {len} bytes at once")),
        Err(FrameError::Truncated) => Err("the connection ended inside a word".into()),
        Err(FrameError::Read(err)) => Err(match err {
            crate::carrier::ReadError::Broken(reason) => reason,
            other => format!("{other:?}"),
        }),
    }
}

/// Hears words until the link ends, and notices where none come.
async fn hear_all(link: Arc<TcpLink>, mut reader: FrameReader) {
    let hearing = async {
        loop {
            let patience = tokio::time::Instant::from_std(link.patience());
            let word = tokio::select! {
                biased;
                word = next_word(&mut reader) => word,
                () = tokio::time::sleep_until(patience) => {
                    if Instant::now() >= link.patience() {
                        return Lost::TimedOut;
                    }
                    continue;
                }
            };
            match word {
                Ok(Some(word)) => {
                    link.hear();
                    if let Err(lost) = link.obey(word).await {
                        return lost;
                    }
                }
                Ok(None) => return Lost::Broken("the peer ended the connection".into()),
                Err(detail) => return Lost::Broken(detail),
            }
        }
    };
    let close = link.settings.close_timeout();
    let given_up = async {
        link.closed().await;
        tokio::time::sleep(close).await;
    };
    let lost = tokio::select! {
        lost = hearing => lost,
        () = given_up => Lost::Locally,
    };
    link.end(lost, "");
    if let Some(Lost::ByPeer(_)) = link.close_reason() {
        // What it sent before on other connections may still be on its way.
        let until = tokio::time::Instant::now() + close;
        while link.streams() > 0 && tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    link.cut();
    link.first.cut(Shutdown::Both);
    link.gone.send_replace(true);
}
