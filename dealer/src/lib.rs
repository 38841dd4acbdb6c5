//! The daemon of the dealer: derives every job's plans on its own, draws what the parties'
//! correlations need, and sends corrections ahead of them. It receives keys and proposals, and
//! nothing that depends on data.
//!
//! What it does not: it keeps nothing on disk, knows no member, and has no say in what is computed
//! beyond refusing what it derives differently. WHOEVER RUNS IT MUST NOT COLLUDE WITH A PARTY.
//!
//! Where to read next: `daemon.rs` (threads and links), `session.rs` (a session).

#![forbid(unsafe_code)]

mod daemon;
mod serve;
mod session;

pub use daemon::{DealerError, run, start};
pub use trefoil_consortium::config::simulation_coin_key;
pub use trefoil_consortium::daemon::{Daemon, Stopper};
