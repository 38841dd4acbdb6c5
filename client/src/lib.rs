//! The `trefoil` tool as a library: the command line ([`cli`]), data sets ([`data`]), what a
//! classifier is judged by ([`metrics`]), a member's calls to the parties ([`remote`]), and the
//! commands. Start reading at [`cli`].

pub mod bench;
pub mod cli;
pub mod consent;
pub mod data;
pub mod experiment;
pub mod metrics;
pub mod plan;
pub mod remote;
pub mod simulate;
