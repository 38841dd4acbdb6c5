//! The daemon of one computing party: takes shares from hospitals, runs jobs with its peers, and
//! gives results to their requester alone.
//!
//! What it does not: it never sees a secret whole, and decides nothing for the other parties.
//! Messages, identities and the consortium file are `trefoil-consortium`'s; the mathematics is
//! `trefoil-protocol`'s.
//!
//! Where to read next: `daemon.rs` (threads, links, orderly end), `members.rs` (what hospitals ask),
//! `store/` (what is kept), `lead.rs` and `follow.rs` (a session's agreement), `session.rs` (its run).

#![forbid(unsafe_code)]

mod daemon;
mod follow;
mod jobs;
mod lead;
mod members;
mod mesh;
mod prepare;
mod session;
mod store;

pub use daemon::{Daemon, PartyError, Stopper, run};
pub use store::StoreError;
