//! The mathematics of Trefoil: ring tensors, shares, programs, plans, and the loops that run them.
//!
//! This crate has no sockets, clocks, files or asynchronous code, and is deterministic given its
//! inputs and keys. Read in this order: [`program`] (what is agreed), [`op`] (one file per
//! operation: its type rule, its plain meaning, its secure lowering), [`plan`] (what is executed),
//! [`run`] (the three small loops: plain, dealer, party). `docs/protocol.md` has the proofs.

pub mod fixed;
pub mod op;
pub mod party;
pub mod plan;
pub mod prg;
pub mod program;
pub mod ring;
pub mod run;
pub mod share;
pub mod threads;
pub mod transport;

pub use party::{PartyId, Peer};
pub use program::{Builder, Program};
pub use ring::Tensor;
pub use threads::set_threads;
