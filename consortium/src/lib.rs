//! What all nodes of a consortium agree on: identities, the consortium file, job descriptions,
//! session ids, the messages of the control plane, and the nodes' configuration files.
//!
//! What every node does alike is here too: its thread, and its links to the other nodes.
//!
//! What it does not: it runs no job and decides nothing for a node.
//!
//! Where to read next: `file.rs` (who takes part), `live.rs` (how a node follows it), `daemon.rs`
//! and `mesh.rs` (a node's thread and links), `job/` (what is computed, in words), `wire/` (what
//! the nodes say to each other), `receipt.rs` (what makes an upload complete).

#![forbid(unsafe_code)]

mod bytes;
pub mod card;
mod changes;
pub mod config;
mod config_member;
pub mod daemon;
mod derived;
mod ending;
mod file;
pub mod follow;
pub mod host;
pub mod identity;
mod job;
pub mod keys;
mod line;
mod live;
pub mod logging;
pub mod meeting;
mod mesh;
mod model_ref;
mod reach;
pub mod receipt;
mod session;
pub mod signature;
pub mod wire;

pub use bytes::{Hex, Words, hex};
pub use card::{Card, CardError, CardRole};
pub use config::{Addresses, ConfigError, DealerConfig, PartyConfig, StoreConfig};
pub use config_member::MemberConfig;
pub use derived::Derived;
pub use ending::Ending;
pub use file::{ConsortiumError, ConsortiumFile, Core, Member, MemberEntry, MemberRole, Role};
pub use identity::IdentityError;
pub use job::{JobDescription, JobError, JobId, Limits, SERVE_MARGIN_S, check_name};
pub use live::{CONSORTIUM_RECORD, LiveConsortium, Reloaded};
pub use mesh::Mesh;
pub use model_ref::ModelRef;
pub use reach::BindError;
pub use session::{Attempt, Mark, Nonce, SessionId, fresh_nonce, random_bytes, session_id};
pub use wire::{DatasetInfo, NodeStats, Part};

/// The software's name and version, as named in handshakes and errors.
pub const SOFTWARE: &str = concat!("trefoil ", env!("CARGO_PKG_VERSION"));
