//! What the protocol needs of a network, and an in-memory network with the same frames.
//!
//! The traits are blocking: protocol code is plain sequential code on its own thread. Deadlines
//! belong to the implementation (this crate has no clock); every call must end in bounded time.

use std::sync::mpsc::{Receiver, Sender, channel};

use bytes::Bytes;
use thiserror::Error;

use crate::party::{PartyId, Peer};

/// Why a frame could not be sent or received.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum NetError {
    /// Nothing came in time.
    #[error("{peer} sent nothing for {waited_ms} ms")]
    Timeout {
        /// The silent peer.
        peer: Peer,
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    },
    /// The link to the peer is gone.
    #[error("the link to {peer} is closed: {reason}")]
    Closed {
        /// The peer that is gone.
        peer: Peer,
        /// What the link reported.
        reason: String,
    },
    /// A node ended the session on purpose.
    #[error("the session was ended by {by}: {reason}")]
    Aborted {
        /// The node that ended it.
        by: String,
        /// Its reason.
        reason: String,
    },
    /// The peer sent something that the protocol does not allow.
    #[error("{peer} broke the protocol: {detail}")]
    Protocol {
        /// The offending peer.
        peer: Peer,
        /// What was wrong.
        detail: String,
    },
}

/// Party to party: one logical frame per round and peer.
pub trait Transport: Send {
    /// Queues a frame for `to`; returns once queued. The queue admits at least one whole round.
    fn post(&mut self, to: PartyId, frame: Bytes) -> Result<(), NetError>;
    /// The next whole frame from `from`.
    fn next(&mut self, from: PartyId) -> Result<Bytes, NetError>;
}

/// The party's side of the dealer's stream: segments in plan order.
pub trait Corrections: Send {
    /// The next segment of dealt material.
    fn next(&mut self) -> Result<Bytes, NetError>;
}

/// The dealer's side: segments to each party, in plan order, with bounded look-ahead.
pub trait CorrectionSink: Send {
    /// Queues a segment for `to`; blocks while the bounded look-ahead is full.
    fn post(&mut self, to: PartyId, segment: Bytes) -> Result<(), NetError>;
}

/// One party's end of an in-memory network.
#[derive(Debug)]
pub struct MemoryNet {
    me: PartyId,
    to: [Option<Sender<Bytes>>; 3],
    from: [Option<Receiver<Bytes>>; 3],
    /// Bytes posted so far, to both peers together.
    pub sent_bytes: u64,
    /// Frames posted so far, to both peers together.
    pub sent_frames: u64,
}

/// One party's end of an in-memory dealer stream.
#[derive(Debug)]
pub struct MemoryCorrections(Receiver<Bytes>);

/// The dealer's end of the in-memory streams.
#[derive(Debug)]
pub struct MemorySink {
    to: [Sender<Bytes>; 3],
    /// Bytes posted so far, to all parties together.
    pub sent_bytes: u64,
}

/// A complete in-memory network: three party ends, their dealer streams, and the dealer's end.
pub fn memory() -> ([MemoryNet; 3], [MemoryCorrections; 3], MemorySink) {
    let mut nets = PartyId::ALL.map(|me| MemoryNet {
        me,
        to: [None, None, None],
        from: [None, None, None],
        sent_bytes: 0,
        sent_frames: 0,
    });
    for a in 0..3 {
        for b in 0..3 {
            if a != b {
                let (sender, receiver) = channel();
                nets[a].to[b] = Some(sender);
                nets[b].from[a] = Some(receiver);
            }
        }
    }
    let streams = PartyId::ALL.map(|_| channel());
    let sink = MemorySink {
        to: streams.each_ref().map(|(sender, _)| sender.clone()),
        sent_bytes: 0,
    };
    let corrections = streams.map(|(_, receiver)| MemoryCorrections(receiver));
    (nets, corrections, sink)
}

fn gone(peer: Peer) -> NetError {
    NetError::Closed {
        peer,
        reason: "its thread ended".into(),
    }
}

impl Transport for MemoryNet {
    fn post(&mut self, to: PartyId, frame: Bytes) -> Result<(), NetError> {
        self.sent_bytes += frame.len() as u64;
        self.sent_frames += 1;
        let peer = Peer::Party(to);
        match &self.to[to.index()] {
            Some(sender) => sender.send(frame).map_err(|_| gone(peer)),
            None => Err(NetError::Protocol {
                peer,
                detail: format!("{} posts to itself", self.me),
            }),
        }
    }

    fn next(&mut self, from: PartyId) -> Result<Bytes, NetError> {
        let peer = Peer::Party(from);
        match &self.from[from.index()] {
            Some(receiver) => receiver.recv().map_err(|_| gone(peer)),
            None => Err(NetError::Protocol {
                peer,
                detail: format!("{} reads from itself", self.me),
            }),
        }
    }
}

impl Corrections for MemoryCorrections {
    fn next(&mut self) -> Result<Bytes, NetError> {
        self.0.recv().map_err(|_| gone(Peer::Dealer))
    }
}

impl CorrectionSink for MemorySink {
    fn post(&mut self, to: PartyId, segment: Bytes) -> Result<(), NetError> {
        self.sent_bytes += segment.len() as u64;
        self.to[to.index()]
            .send(segment)
            .map_err(|_| gone(Peer::Party(to)))
    }
}
