//! ONNX: a graph of operations with its weights, as PyTorch, Keras and others write it.
//!
//! [`read`] makes a network file and weights of a model, [`write`] a model of a network and weights.
//! The journey in: `bounds` (no file takes gigabytes), `proto` (messages), `tensor` (constants),
//! `graph` (which nodes count, in which order), `fuse` (several that are one activation), `ops` and `shapes` (a node becomes layers, or another
//! view of a layer's values: `view`), `layers` (what the network file will say).

mod bounds;
mod constants;
mod fuse;
mod graph;
mod layers;
mod ops;
pub mod proto;
mod shapes;
mod tensor;
mod view;
mod write;

pub use graph::{Beside, Understood, read, read_with};
pub use write::write;

/// The oldest operator set that is read.
pub const OLDEST_OPSET: i64 = 11;

/// Whether operations of a domain are those of the standard.
fn usual(domain: &str) -> bool {
    matches!(domain, "" | "ai.onnx")
}
