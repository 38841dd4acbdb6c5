//! The hospital's side of Trefoil: data sets, and what a trained classifier is judged by.

pub mod data;
pub mod metrics;
pub mod remote;
