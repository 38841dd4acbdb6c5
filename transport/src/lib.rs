//! Links between nodes: QUIC, or TLS over TCP, with pinned public keys; message
//! streams for control, and the blocking frames a protocol thread works with.
//!
//! What it does: binds an endpoint ([`Node`]), proves who is at the other end
//! of a connection ([`Link`]), carries small typed messages ([`MsgStream`]) and
//! the frames of a session ([`SessionNet`], [`MaterialReceiver`],
//! [`DealerNet`]), counts them, and brings an abort to everybody.
//!
//! What it does not: it knows no job, no program and no share; it never decides
//! who is allowed (the consortium file does) and never retries a session.
//!
//! Where to read next: `tls.rs` for the trust decisions, `node.rs` for the
//! endpoint, `link.rs` for one connection, `carrier.rs` and `tcp/` for what it runs
//! over, `session/` for rounds and material.

#![forbid(unsafe_code)]

mod carrier;
mod error;
mod identity;
mod inline;
mod link;
mod measure;
mod node;
mod queue;
mod quic;
mod session;
mod settings;
mod socket;
mod sorter;
mod stream;
mod tcp;
mod tls;

pub use error::{HelloMismatch, TransportError};
pub use identity::{Identity, Pin, PinParseError};
pub use link::{Link, LinkStats};
pub use measure::stream_goodput;
pub use node::{Node, Reach};
pub use session::{AbortHandle, DealerNet, Hello, MaterialReceiver, SessionNet, SessionStats};
pub use settings::{Protocol, Settings};
pub use stream::{MsgReceiver, MsgSender, MsgStream, StreamKind, WIRE_VERSION};
