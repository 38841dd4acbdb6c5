//! Shares of named tensors, as the files of models and checkpoints hold them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use trefoil_consortium::Words;
use trefoil_protocol::ring::Tensor;

/// Name, shape and words of each.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Tensors(pub(super) Vec<(String, Vec<u64>, Words)>);

impl Tensors {
    pub(super) fn of(shares: impl IntoIterator<Item = (String, Tensor)>) -> Tensors {
        let shape = |tensor: &Tensor| tensor.shape().iter().map(|side| *side as u64).collect();
        let shares = shares.into_iter();
        let entries = shares.map(|(name, share)| (name, shape(&share), Words(share.into_data())));
        Tensors(entries.collect())
    }

    /// The shares, or the name of a tensor and how many words it has, where its shape says otherwise.
    pub(super) fn shares(self) -> Result<BTreeMap<String, Tensor>, (String, usize)> {
        let mut shares = BTreeMap::new();
        for (name, shape, Words(words)) in self.0 {
            let shape: Vec<usize> = shape.iter().map(|side| *side as usize).collect();
            let mut sides = shape.iter();
            if sides.try_fold(1usize, |len, side| len.checked_mul(*side)) != Some(words.len()) {
                return Err((name, words.len()));
            }
            shares.insert(name, Tensor::new(shape, words));
        }
        Ok(shares)
    }
}
