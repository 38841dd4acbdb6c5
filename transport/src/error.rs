//! Everything that can go wrong before and beside the rounds of a session.
//!
//! Failures inside a running session are `protocol::NetError`, because the
//! protocol thread sees them through the `Transport` trait.

use crate::Pin;
use std::net::SocketAddr;

/// A failure of an endpoint, a connection, a message stream or a session start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// Another process holds the address this node shall listen on.
    #[error("cannot listen on {addr}: the port is in use by another program")]
    AddressInUse {
        /// The address asked for.
        addr: SocketAddr,
    },
    /// The socket could not be made for another reason.
    #[error("cannot listen on {addr}: {source}")]
    Bind {
        /// The address asked for.
        addr: SocketAddr,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The node's own certificate or private key cannot be used.
    #[error("this node's identity cannot be used: {detail}")]
    Identity {
        /// What is wrong with it.
        detail: String,
    },
    /// A certificate could not be parsed.
    #[error("certificate cannot be read: {detail}")]
    Certificate {
        /// What the parser said.
        detail: String,
    },
    /// A setting is outside its range.
    #[error("setting {field} = {value}: {detail}")]
    Setting {
        /// Name of the setting.
        field: &'static str,
        /// The value given.
        value: u64,
        /// The range that is allowed.
        detail: &'static str,
    },
    /// Nobody answered at the address.
    #[error("no answer from {addr} within {waited_ms} ms: is the node running and reachable?")]
    Unreachable {
        /// Where the connection was tried.
        addr: SocketAddr,
        /// How long.
        waited_ms: u64,
    },
    /// The host at the address says that nothing listens there (TCP).
    #[error("nothing listens at {addr} (TCP): is the node running, and is this its port?")]
    NothingListens {
        /// Where the connection was tried.
        addr: SocketAddr,
    },
    /// The node at the address has another public key than the one pinned.
    #[error("wrong certificate at {addr}: expected public key {expected}, found {found}")]
    WrongCertificate {
        /// Where the connection was tried.
        addr: SocketAddr,
        /// The pinned key.
        expected: Pin,
        /// The key that was presented.
        found: Pin,
    },
    /// The peer's handshake signature does not belong to the certificate it showed.
    #[error("{addr} does not hold the private key of the certificate it presented")]
    BadSignature {
        /// Where the connection was tried.
        addr: SocketAddr,
    },
    /// The peer does not accept this node.
    #[error("{addr} refused this node: {detail}")]
    Refused {
        /// Where the connection was tried.
        addr: SocketAddr,
        /// Why, as far as the peer said.
        detail: String,
    },
    /// The connection could not be made for another reason.
    #[error("cannot connect to {addr}: {detail}")]
    Connect {
        /// Where the connection was tried.
        addr: SocketAddr,
        /// What happened.
        detail: String,
    },
    /// The connection or stream ended while something was expected on it.
    #[error("connection to {addr} closed: {reason}")]
    Closed {
        /// The peer's address.
        addr: SocketAddr,
        /// Who closed it and why.
        reason: String,
    },
    /// A message is longer than the receiver allows.
    #[error("message of {len} bytes from {addr} exceeds the limit of {max}")]
    TooLong {
        /// The peer's address.
        addr: SocketAddr,
        /// Announced length.
        len: u64,
        /// Limit at this place.
        max: u64,
    },
    /// Bytes that are not the message expected here.
    #[error("message from {addr} cannot be understood: {detail}")]
    Malformed {
        /// The peer's address.
        addr: SocketAddr,
        /// What was wrong.
        detail: String,
    },
    /// A wait reached its deadline.
    #[error("{what} took longer than {waited_ms} ms")]
    Timeout {
        /// What was waited for, with the peer's name.
        what: String,
        /// How long.
        waited_ms: u64,
    },
    /// The two ends of a session stream do not agree on what they will compute.
    #[error(transparent)]
    HelloMismatch(Box<HelloMismatch>),
    /// The session was aborted while it was being set up.
    #[error("session aborted by {by}: {reason}")]
    Aborted {
        /// Who aborted it.
        by: String,
        /// Why.
        reason: String,
    },
    /// The caller named links that do not make a session.
    #[error("session cannot start: {detail}")]
    Session {
        /// What was wrong.
        detail: String,
    },
}

/// The first field in which the hellos of two nodes differ.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "session refused: {field} differs between this node and {peer}: here {ours}, there {theirs} \
     (software here {our_software}, there {their_software})"
)]
pub struct HelloMismatch {
    /// The peer's role.
    pub peer: String,
    /// The field.
    pub field: &'static str,
    /// This node's value.
    pub ours: String,
    /// The peer's value.
    pub theirs: String,
    /// This node's software version.
    pub our_software: String,
    /// The peer's software version.
    pub their_software: String,
}
