//! Networks, training and inference: what the nodes compute, said in terms of [`trefoil_protocol`].
//!
//! Read in this order: [`network`] (layers and shapes, from TOML), [`job`] (what a job is; how it learns in
//! [`recipe`]),
//! [`mod@schedule`] (the steps that every node derives from a job), [`programs`] (forward, backward and
//! update as protocol Programs), [`weights`] (initial values, hashes). [`plain_run`] runs a schedule
//! in the clear and is the reference that a secure run equals bit for bit; [`float`] is the same
//! training in ordinary floating point; [`ranges`] says how near it comes to
//! the bounds of the number format, [`memory`] what a party holds. [`outcome`] reads what a job
//! reveals. No input or output here.

pub mod benchmark;
mod checkpoints;
pub mod cost;
pub mod early_stop;
mod error;
pub mod float;
pub mod job;
mod judging;
pub mod memory;
pub mod neighbours;
pub mod network;
pub mod outcome;
pub mod plain_run;
pub mod programs;
pub mod ranges;
pub mod recipe;
pub mod schedule;
pub mod serve;
pub mod weights;

pub use benchmark::Benchmark;
pub use early_stop::EarlyStop;
pub use error::ModelError;
pub use job::{
    DatasetRef, HospitalRows, JobKind, Loss, LrSchedule, Optimiser, PredictOutput, Preparation,
    TrainSpec,
};
pub use neighbours::NeighbourSpec;
pub use network::Network;
pub use schedule::{
    InitialState, PADDING_ROW, Phase, Schedule, Step, StepInput, import_tensors, import_words,
    schedule,
};
pub use serve::ServeSpec;
