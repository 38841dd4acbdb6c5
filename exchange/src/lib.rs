//! Models in other people's formats: ONNX in and out, safetensors in and out.
//!
//! It knows networks and their weights, and neither shares nor nodes: the `trefoil` tool shares what is
//! read here, and writes here what was revealed. What is supported is in `docs/import.md`. Start at
//! [`onnx::read`]; weights are [`Weights`] in real numbers everywhere.

pub mod onnx;
pub mod tensors;

use std::collections::BTreeMap;

use ndarray::ArrayD;

/// Arrays by the names that a network's carried state has (`conv1.weight`, `norm1.variance`, ..).
pub type Weights = BTreeMap<String, ArrayD<f64>>;

/// Why a file is not read or written.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// It is not what it should be.
    #[error("not an ONNX model: {0}")]
    Onnx(#[from] prost::DecodeError),
    /// It is not what it should be.
    #[error("not a safetensors file: {0}")]
    SafeTensors(#[from] safetensors::SafeTensorError),
    /// Something about the file as a whole.
    #[error("{problem}")]
    File {
        /// What.
        problem: String,
    },
    /// A node of a graph that is not understood.
    #[error("node {number}{name} ({op}): {problem}")]
    Node {
        /// Which node, from 1, in the order of the file.
        number: usize,
        /// ` "name"`, or nothing.
        name: String,
        /// Its operation.
        op: String,
        /// What is not understood.
        problem: String,
    },
    /// A tensor that is not understood.
    #[error("tensor {name:?}: {problem}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is not understood.
        problem: String,
    },
    /// The network that comes of it is not possible.
    #[error(transparent)]
    Network(#[from] trefoil_models::ModelError),
}
