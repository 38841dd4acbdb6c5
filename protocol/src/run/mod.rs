//! The loops: [`plain`] over a Program (the oracle), [`party`] and [`dealer`] over a Plan, and
//! [`memory`], which runs three parties and a dealer as threads.

pub mod dealer;
pub mod frame;
mod kernels;
pub mod memory;
mod open;
mod opened;
pub mod party;
pub mod plain;
mod publish;
mod refresh;
mod value;

use thiserror::Error;

pub use dealer::{DealerKeys, DealerState, deal_step};
pub use party::{OutputShare, PartyKeys, State, run_step};
pub use publish::publish;

use crate::transport::NetError;

/// Why a step could not be executed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum StepError {
    /// The network failed.
    #[error(transparent)]
    Net(#[from] NetError),
    /// An input or a part of the carried state is missing or has another size.
    #[error("{what} {name:?} {problem}")]
    State {
        /// `input`, `carried state` or `carried opening`.
        what: &'static str,
        /// Its name.
        name: String,
        /// What is wrong.
        problem: String,
    },
}
