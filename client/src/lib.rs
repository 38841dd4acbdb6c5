//! The `trefoil` tool as a library: the command line ([`cli`]), data sets ([`data`]), what a
//! classifier is judged by ([`metrics`]), a member's calls to the parties ([`remote`]), the commands
//! of a deployment ([`operate`]), and the other commands. Start reading at [`cli`].

pub mod bench;
pub mod cli;
pub mod consent;
pub mod data;
pub mod experiment;
mod follow;
mod local;
pub mod metrics;
pub mod operate;
pub mod plan;
pub mod ranges;
pub mod remote;
mod rows;
pub mod simulate;
