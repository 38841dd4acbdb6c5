//! A cluster on one machine: real node processes, and links between them.
//!
//! What it does: writes the homes of three parties, a dealer, and the members
//! (hospitals and an analyst), starts the nodes as processes ([`Cluster`]), puts
//! a datagram relay with delay, rate and faults between them where a link is
//! emulated ([`Relays`]), and leaves nothing running, whatever ends it.
//!
//! What it does not: it knows no job and no share. A node started here is the
//! node that a hospital runs; it only learns its peers' addresses on its
//! standard input instead of from a file, and ends when that input closes.
//!
//! Where to read next: `launcher.rs` for the whole, `process.rs` for one node
//! and the lines it exchanges, `homes.rs` for the files, `relay/` for links.

#![forbid(unsafe_code)]

mod error;
mod homes;
mod launcher;
mod link;
mod node;
mod process;
mod relay;

pub use error::{ClusterError, LogTail};
pub use homes::ClusterMember;
pub use launcher::{Cluster, ClusterSpec, Home, NodeExit};
pub use link::{Link, LinkParseError};
pub use node::{NodeAddresses, NodeName};
pub use process::{Usage, usage_of};
pub use relay::{Ends, LaneStats, RelayError, Relays};
