//! Why a network, a job or a plain run is refused.

use thiserror::Error;
use trefoil_protocol::program::BuildError;
use trefoil_protocol::run::plain::PlainError;

/// What can be wrong with a network, a job or the tables that a job runs on.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ModelError {
    /// The network's text is not what it should be.
    #[error("network: {0}")]
    Text(String),
    /// A layer does not fit.
    #[error("network {network:?}, layer {layer}: {problem}")]
    Layer {
        /// The network's name.
        network: String,
        /// The layer's position and kind.
        layer: String,
        /// What does not fit, with both shapes.
        problem: String,
    },
    /// A network that is not shipped.
    #[error("no shipped network is called {name:?}; there are {known}")]
    Unknown {
        /// The name asked for.
        name: String,
        /// Names that exist.
        known: String,
    },
    /// A field of a job is out of its range.
    #[error("job: {field} = {found}: {problem}")]
    Job {
        /// The field.
        field: &'static str,
        /// Its value.
        found: String,
        /// What is possible.
        problem: String,
    },
    /// An operation cannot be built.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// A table that the schedule reads is missing or has another size.
    #[error("table {table:?}: {problem}")]
    Table {
        /// The table.
        table: String,
        /// What is wrong.
        problem: String,
    },
    /// Weights do not fit the network.
    #[error("weights {name:?}: {problem}")]
    Weights {
        /// The tensor.
        name: String,
        /// What is wrong, with both shapes.
        problem: String,
    },
    /// A step in the clear stopped.
    #[error("step {step}: {error}")]
    Plain {
        /// Index of the step in the schedule.
        step: usize,
        /// Why.
        error: PlainError,
    },
    /// A revealed result is not what the job reveals.
    #[error("result {name:?}: {problem}")]
    Outcome {
        /// The output.
        name: String,
        /// What is wrong.
        problem: String,
    },
}
