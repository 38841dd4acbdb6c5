//! The daemon of one computing party: takes shares from hospitals, runs jobs with its peers, and
//! gives results to their requester alone.
//!
//! What it does not: it never sees a secret whole, and decides nothing for the other parties.
//! Messages, identities and the consortium file are `trefoil-consortium`'s; the mathematics is
//! `trefoil-protocol`'s.
//!
//! Where to read next: `daemon.rs` (threads, links, orderly end), `members.rs` (what hospitals ask),
//! `store/` (what is kept), `consent.rs` (what may run; `policy/`, `desk.rs`, `audit.rs`), `lead.rs` and `follow.rs` (a session's agreement), `session.rs` (its run), `resume.rs` (what outlives it).

#![forbid(unsafe_code)]

pub mod audit;
mod conduct;
mod consent;
mod daemon;
pub mod desk;
mod files;
mod follow;
mod halt;
mod jobs;
mod lead;
mod members;
mod policy;
mod prepare;
mod resume;
mod serve;
mod session;
mod store;

pub use daemon::{PartyError, run, start};
pub use files::{FileError, now_s, time_text};
pub use store::{StoreError, StoredAs, StoredUpload, probe_bucket, stored};
pub use trefoil_consortium::daemon::{Daemon, Stopper};
