//! A session's streams: frames of rounds between the parties, material from the
//! dealer, and the abort that ends them everywhere.
//!
//! The protocol thread calls `post` and `next` and blocks; tasks of the runtime
//! move the frames, of which a party's thread polls the sending ones itself where
//! the frame is short (`inline.rs`). Incoming frames are drained to memory at all times and a
//! send queue admits at least one frame, so two parties may both post a round of
//! any size before they receive. `hello.rs` is the agreement at the start,
//! `state.rs` what the session's threads and tasks share, `pump.rs` the tasks.

mod hello;
mod pump;
mod state;

pub use hello::Hello;
pub use state::{AbortHandle, SessionStats};

use crate::inline::{self, inline};
use crate::queue::{End, FrameQueue, Refusal, charge};
use crate::stream::{RawStream, StreamKind};
use crate::{Link, Settings, TransportError};
use bytes::Bytes;
use pump::{read_frames, write_frames};
use state::{Direction, SessionState, slot};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_protocol::transport::{CorrectionSink, Corrections, NetError, Transport};

/// Bytes a frame has on its stream beside its payload.
const FRAME_HEADER_BYTES: u64 = 8;
/// How often a party tells the dealer how far it may go, while it takes as much as may be ahead.
const CREDITS_PER_WINDOW: u64 = 4;
/// Frames up to this length are encrypted and sent by the thread that posts them, which saves a
/// switch of threads; the work of longer ones is better left to the runtime's thread.
const INLINE_MAX_BYTES: usize = 32 << 10;

/// Frames to and from the two other parties. Dropping it ends the rounds in an
/// orderly way: what was posted is delivered first.
pub struct SessionNet {
    me: PartyId,
    state: Arc<SessionState>,
    /// By party; `None` at this party's own place.
    channels: [Option<Channel>; 3],
    max_frame_bytes: u64,
    round_timeout: Duration,
    spin: Duration,
}

struct Channel {
    link: Link,
    outgoing: Arc<FrameQueue>,
    incoming: Arc<FrameQueue>,
}

/// The dealer's material for this party, in plan order.
///
/// How far ahead the dealer may be is said in bytes, on the other half of its stream, and not by
/// leaving the stream unread: QUIC ends a connection on which too many short pieces lie unread.
pub struct MaterialReceiver {
    state: Arc<SessionState>,
    incoming: Arc<FrameQueue>,
    /// What the dealer is told: up to which byte it may send. Its end tells the dealer that
    /// this party is done, before the link's close could look like a failure.
    credits: Arc<FrameQueue>,
    dealer: Link,
    /// How far the dealer may be ahead of what was taken, in charges.
    window: u64,
    /// Taken so far, and taken when the dealer was told last.
    taken: u64,
    told_at: u64,
    round_timeout: Duration,
    spin: Duration,
}

/// The dealer's streams to the three parties, each with a bounded look-ahead.
/// Dropping it ends them in an orderly way: what was posted is delivered first.
pub struct DealerNet {
    state: Arc<SessionState>,
    channels: [(Link, Arc<FrameQueue>); 3],
    max_frame_bytes: u64,
    timeout: Duration,
}

impl SessionNet {
    /// Opens this party's streams of a session and compares `hello` with every
    /// peer. The lower of two parties opens the stream between them, the dealer
    /// opens the material's. A failure is told to the other nodes.
    pub async fn start(
        me: PartyId,
        session: [u8; 32],
        hello: Hello,
        peers: [(PartyId, Link); 2],
        dealer: Link,
        settings: &Settings,
    ) -> Result<(SessionNet, MaterialReceiver, AbortHandle), TransportError> {
        settings.check()?;
        let others = me.others();
        let [a, b] = peers;
        let (a, b) = if a.0 == others[0] { (a, b) } else { (b, a) };
        if [a.0, b.0] != others {
            let detail = format!(
                "{me} needs links to {} and {}, got {} and {}",
                others[0], others[1], a.0, b.0
            );
            return Err(TransportError::Session { detail });
        }
        let links = vec![
            (Peer::Party(a.0), a.1.clone()),
            (Peer::Party(b.0), b.1.clone()),
            (Peer::Dealer, dealer.clone()),
        ];
        let state = SessionState::new(me.to_string(), session, links);
        let streams = async {
            tokio::try_join!(
                round_stream(&state, me, a.0, &a.1, &hello),
                round_stream(&state, me, b.0, &b.1, &hello),
                answer(&state, StreamKind::Material, Peer::Dealer, &dealer, &hello),
            )
        };
        let (stream_a, stream_b, material) = state.set_up(settings, streams).await?;

        let mut channels = [const { None }; 3];
        for (party, link, stream) in [(a.0, a.1, stream_a), (b.0, b.1, stream_b)] {
            let outgoing = FrameQueue::new(settings.send_queue_bytes);
            let outgoing = state.queue(Direction::Outgoing, outgoing);
            let incoming = FrameQueue::new(settings.receive_queue_bytes);
            let incoming = state.queue(Direction::Incoming, incoming);
            let peer = Peer::Party(party);
            let max = settings.max_frame_bytes;
            let writing = write_frames(
                state.clone(),
                peer,
                link.clone(),
                stream.send,
                outgoing.clone(),
            );
            inline::spawn(&Handle::current(), writing);
            tokio::spawn(read_frames(
                state.clone(),
                peer,
                link.clone(),
                stream.reader,
                incoming.clone(),
                max,
            ));
            channels[party.index()] = Some(Channel {
                link,
                outgoing,
                incoming,
            });
        }
        let window = settings.look_ahead_bytes.div_ceil(2);
        // A dealer within its credit never finds this full; another one waits.
        let incoming = state.queue(Direction::Incoming, FrameQueue::new(window));
        // Bounded by the window: each credit is for a part of it.
        let credits = state.queue(Direction::Outgoing, FrameQueue::new(u64::MAX));
        credits.push(credit_frame(window));
        let max = settings.max_frame_bytes;
        tokio::spawn(read_frames(
            state.clone(),
            Peer::Dealer,
            dealer.clone(),
            material.reader,
            incoming.clone(),
            max,
        ));
        tokio::spawn(write_frames(
            state.clone(),
            Peer::Dealer,
            dealer.clone(),
            material.send,
            credits.clone(),
        ));

        let round_timeout = Duration::from_millis(settings.round_timeout_ms);
        let spin = Duration::from_micros(settings.spin_us.into());
        let abort = AbortHandle::new(state.clone());
        let receiver = MaterialReceiver {
            state: state.clone(),
            incoming,
            credits,
            dealer,
            window,
            taken: 0,
            told_at: 0,
            round_timeout,
            spin,
        };
        Ok((
            SessionNet {
                me,
                state,
                channels,
                max_frame_bytes: settings.max_frame_bytes,
                round_timeout,
                spin,
            },
            receiver,
            abort,
        ))
    }

    /// The counters so far.
    pub fn stats(&self) -> SessionStats {
        self.state.stats()
    }

    fn channel(&self, party: PartyId) -> Result<&Channel, NetError> {
        self.channels[party.index()]
            .as_ref()
            .ok_or_else(|| NetError::Protocol {
                peer: Peer::Party(party),
                detail: format!("{} has no link to itself", self.me),
            })
    }
}

impl Transport for SessionNet {
    fn post(&mut self, to: PartyId, frame: Bytes) -> Result<(), NetError> {
        let peer = Peer::Party(to);
        let bytes = check_length(peer, &frame, self.max_frame_bytes)? + FRAME_HEADER_BYTES;
        let pushed = push(&self.channel(to)?.outgoing, frame, self.round_timeout);
        pushed.map_err(|refusal| self.state.explain(peer, refusal, self.round_timeout))?;
        self.state.counters.sent(slot(peer), bytes);
        Ok(())
    }

    fn next(&mut self, from: PartyId) -> Result<Bytes, NetError> {
        let peer = Peer::Party(from);
        let popped = self
            .channel(from)?
            .incoming
            .pop_blocking(self.round_timeout, self.spin);
        let frame =
            popped.map_err(|refusal| self.state.explain(peer, refusal, self.round_timeout))?;
        self.state
            .counters
            .received(slot(peer), frame.len() as u64 + FRAME_HEADER_BYTES);
        Ok(frame)
    }
}

impl Drop for SessionNet {
    fn drop(&mut self) {
        for channel in self.channels.iter().flatten() {
            channel.outgoing.finish(Some(channel.link.delivery()));
            channel.incoming.abandon();
        }
    }
}

impl Corrections for MaterialReceiver {
    fn next(&mut self) -> Result<Bytes, NetError> {
        let popped = self.incoming.pop_blocking(self.round_timeout, self.spin);
        let segment = popped.map_err(|refusal| {
            self.state
                .explain(Peer::Dealer, refusal, self.round_timeout)
        })?;
        self.state.counters.received(
            slot(Peer::Dealer),
            segment.len() as u64 + FRAME_HEADER_BYTES,
        );
        self.taken += charge(&segment);
        // Seldom, because every word wakes another thread; early enough that the dealer goes on.
        if self.taken - self.told_at >= self.window.div_ceil(CREDITS_PER_WINDOW) {
            self.told_at = self.taken;
            self.credits.push(credit_frame(self.taken + self.window));
        }
        Ok(segment)
    }
}

impl Drop for MaterialReceiver {
    fn drop(&mut self) {
        self.incoming.abandon();
        self.credits.finish(Some(self.dealer.delivery()));
    }
}

/// What a party tells the dealer: the byte, counted in charges from the first segment, up to which
/// it may send.
fn credit_frame(total: u64) -> Bytes {
    Bytes::copy_from_slice(&total.to_le_bytes())
}

impl DealerNet {
    /// Opens the material stream to each party and compares `hello` with it.
    /// A failure is told to the other nodes.
    pub async fn start(
        session: [u8; 32],
        hello: Hello,
        parties: [(PartyId, Link); 3],
        settings: &Settings,
    ) -> Result<(DealerNet, AbortHandle), TransportError> {
        settings.check()?;
        let mut parties = parties;
        parties.sort_by_key(|(party, _)| *party);
        let named = parties.each_ref().map(|(party, _)| *party);
        if named != PartyId::ALL {
            let detail = format!("the dealer needs links to P0, P1 and P2, got {named:?}");
            return Err(TransportError::Session { detail });
        }
        let links = parties
            .iter()
            .map(|(party, link)| (Peer::Party(*party), link.clone()))
            .collect();
        let state = SessionState::new(Peer::Dealer.to_string(), session, links);
        let [p0, p1, p2] = parties.each_ref().map(|(party, link)| {
            open(
                &state,
                StreamKind::Material,
                Peer::Party(*party),
                link,
                &hello,
            )
        });
        let (s0, s1, s2) = state
            .set_up(settings, async { tokio::try_join!(p0, p1, p2) })
            .await?;

        let mut streams = [Some(s0), Some(s1), Some(s2)];
        let channels = parties.map(|(party, link)| {
            let outgoing = FrameQueue::new(settings.look_ahead_bytes.div_ceil(2)).on_credit();
            let outgoing = state.queue(Direction::Outgoing, outgoing);
            if let Some(stream) = streams[party.index()].take() {
                let peer = Peer::Party(party);
                let writing = write_frames(
                    state.clone(),
                    peer,
                    link.clone(),
                    stream.send,
                    outgoing.clone(),
                );
                let writer = tokio::spawn(writing);
                tokio::spawn(pump::read_credits(
                    state.clone(),
                    peer,
                    link.clone(),
                    stream.reader,
                    outgoing.clone(),
                    writer,
                ));
            }
            (link, outgoing)
        });
        let timeout = Duration::from_millis(settings.look_ahead_timeout_ms);
        let abort = AbortHandle::new(state.clone());
        Ok((
            DealerNet {
                state,
                channels,
                max_frame_bytes: settings.max_frame_bytes,
                timeout,
            },
            abort,
        ))
    }

    /// The counters so far.
    pub fn stats(&self) -> SessionStats {
        self.state.stats()
    }
}

impl CorrectionSink for DealerNet {
    fn post(&mut self, to: PartyId, segment: Bytes) -> Result<(), NetError> {
        let peer = Peer::Party(to);
        let bytes = check_length(peer, &segment, self.max_frame_bytes)? + FRAME_HEADER_BYTES;
        // Never sent from this thread: it is ahead of its parties, and what its writer finds
        // waiting together travels in fewer datagrams.
        let pushed = self.channels[to.index()]
            .1
            .push_blocking(segment, self.timeout);
        pushed.map_err(|refusal| self.state.explain(peer, refusal, self.timeout))?;
        self.state.counters.sent(slot(peer), bytes);
        Ok(())
    }
}

impl Drop for DealerNet {
    fn drop(&mut self) {
        for (link, outgoing) in &self.channels {
            outgoing.finish(Some(link.delivery()));
        }
    }
}

/// Queues a frame; a short one is on its way when this returns, unless others go before it.
fn push(queue: &FrameQueue, frame: Bytes, timeout: Duration) -> Result<(), Refusal> {
    if frame.len() <= INLINE_MAX_BYTES {
        inline(|| queue.push_blocking(frame, timeout))
    } else {
        queue.push_blocking(frame, timeout)
    }
}

/// The length of a frame that a peer with the same settings will accept.
fn check_length(peer: Peer, frame: &Bytes, max: u64) -> Result<u64, NetError> {
    let len = frame.len() as u64;
    if len <= max {
        return Ok(len);
    }
    let detail = format!("a frame of {len} bytes for it exceeds max_frame_bytes = {max}");
    Err(NetError::Protocol { peer, detail })
}

impl SessionState {
    /// What a refused `post` or `next` means for the protocol.
    fn explain(&self, peer: Peer, refusal: Refusal, waited: Duration) -> NetError {
        match refusal {
            Refusal::Timeout => NetError::Timeout {
                peer,
                waited_ms: waited.as_millis() as u64,
            },
            Refusal::Ended(End::Failed(err)) => err,
            Refusal::Ended(End::Finished | End::Abandoned) => NetError::Closed {
                peer,
                reason: "it has ended its side of the session".into(),
            },
        }
    }
}

async fn round_stream(
    state: &SessionState,
    me: PartyId,
    peer: PartyId,
    link: &Link,
    hello: &Hello,
) -> Result<RawStream, TransportError> {
    if me < peer {
        open(state, StreamKind::Rounds, Peer::Party(peer), link, hello).await
    } else {
        answer(state, StreamKind::Rounds, Peer::Party(peer), link, hello).await
    }
}

async fn open(
    state: &SessionState,
    kind: StreamKind,
    peer: Peer,
    link: &Link,
    hello: &Hello,
) -> Result<RawStream, TransportError> {
    let mut stream = link.open_raw(kind, state.session).await?;
    hello
        .say_first(&mut stream, link, &peer.to_string())
        .await
        .map(|()| stream)
}

async fn answer(
    state: &SessionState,
    kind: StreamKind,
    peer: Peer,
    link: &Link,
    hello: &Hello,
) -> Result<RawStream, TransportError> {
    let mut stream = link.claim(kind, state.session).await?;
    match hello.answer(&mut stream, link, &peer.to_string()).await {
        Ok(()) => Ok(stream),
        Err(err) => {
            // The peer gets this node's hello, so that it can name the field too.
            link.finish_in_background(stream.send);
            Err(err)
        }
    }
}
