//! Models: this party's shares of weights, with the session they come from. The three parties'
//! shares belong together exactly if that session is the same.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use trefoil_consortium::{JobId, SessionId, Words, check_name};
use trefoil_protocol::ring::Tensor;
use trefoil_transport::Pin;

use super::{Store, StoreError, at, file};

/// Largest model file.
const MODEL_MAX_BYTES: u64 = 16 << 30;

/// Shares of a model.
#[derive(Debug)]
pub(crate) struct Model {
    /// The training session.
    pub(crate) source: SessionId,
    /// By carried name.
    pub(crate) shares: BTreeMap<String, Tensor>,
}

#[derive(Serialize, Deserialize)]
struct Record {
    source: SessionId,
    job: JobId,
    owner: Pin,
    ring_bits: u8,
    frac_bits: u8,
    tensors: Vec<(String, Vec<u64>, Words)>,
}

/// A model that is written and not yet kept. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct StagedModel {
    temporary: PathBuf,
    path: PathBuf,
}

impl StagedModel {
    /// Makes the model the one of its name.
    pub(crate) fn keep(self) -> Result<(), StoreError> {
        std::fs::rename(&self.temporary, &self.path).map_err(at(&self.path))?;
        file::sync_folder(self.path.parent().unwrap_or(&self.path))
    }
}

impl Drop for StagedModel {
    fn drop(&mut self) {
        // After `keep` there is nothing under the temporary name.
        let _ = std::fs::remove_file(&self.temporary);
    }
}

/// What a staged model is made of.
pub(crate) struct NewModel<'a> {
    pub(crate) name: &'a str,
    pub(crate) source: SessionId,
    pub(crate) job: JobId,
    pub(crate) owner: Pin,
    pub(crate) ring_bits: u8,
    pub(crate) frac_bits: u8,
    pub(crate) shares: Vec<(String, Tensor)>,
}

impl Store {
    fn model_path(&self, name: &str) -> Result<PathBuf, StoreError> {
        check_name(name).map_err(StoreError::Refused)?;
        Ok(self.home.join("models").join(format!("{name}.model")))
    }

    fn read_model(&self, name: &str) -> Result<Option<Record>, StoreError> {
        let path = self.model_path(name)?;
        if !path.exists() {
            return Ok(None);
        }
        let bytes = self.vault.read(&path, MODEL_MAX_BYTES)?;
        let record = postcard::from_bytes(&bytes);
        record.map(Some).map_err(|err| StoreError::Damaged {
            path,
            detail: err.to_string(),
        })
    }

    /// Whether a job of `owner` may keep a model under `name`: it is free, or the owner's.
    pub(crate) fn may_save(&self, name: &str, owner: Pin) -> Result<(), StoreError> {
        match self.read_model(name)? {
            Some(record) if record.owner != owner => Err(StoreError::Refused(format!(
                "model {name} belongs to another member: choose another name"
            ))),
            _ => Ok(()),
        }
    }

    /// The shares of a model.
    pub(crate) fn model(
        &self,
        name: &str,
        ring_bits: u8,
        frac_bits: u8,
    ) -> Result<Model, StoreError> {
        let record = self.read_model(name)?;
        let record =
            record.ok_or_else(|| StoreError::Refused(format!("there is no model {name}")))?;
        if (record.ring_bits, record.frac_bits) != (ring_bits, frac_bits) {
            return Err(StoreError::Refused(format!(
                "model {name} has {} ring and {} fraction bits, the job says {ring_bits} and {frac_bits}",
                record.ring_bits, record.frac_bits
            )));
        }
        let damaged = |name: &str| StoreError::Refused(format!("model tensor {name} is damaged"));
        let mut shares = BTreeMap::new();
        for (name, shape, words) in record.tensors {
            let shape: Vec<usize> = shape.iter().map(|side| *side as usize).collect();
            let len = shape
                .iter()
                .try_fold(1usize, |len, side| len.checked_mul(*side));
            if len != Some(words.0.len()) {
                return Err(damaged(&name));
            }
            shares.insert(name, Tensor::new(shape, words.0));
        }
        Ok(Model {
            source: record.source,
            shares,
        })
    }

    /// Writes a model beside its name, to be kept or dropped when the session ends.
    pub(crate) fn stage_model(&self, model: NewModel<'_>) -> Result<StagedModel, StoreError> {
        let path = self.model_path(model.name)?;
        let temporary = self.home.join("models").join(format!(
            "{}.{}.tmp",
            model.name,
            trefoil_consortium::hex(&model.source[..8])
        ));
        let staged = StagedModel { temporary, path };
        let shape = |tensor: &Tensor| tensor.shape().iter().map(|side| *side as u64).collect();
        let tensors = model
            .shares
            .into_iter()
            .map(|(name, tensor)| (name, shape(&tensor), Words(tensor.into_data())));
        let record = Record {
            source: model.source,
            job: model.job,
            owner: model.owner,
            ring_bits: model.ring_bits,
            frac_bits: model.frac_bits,
            tensors: tensors.collect(),
        };
        let bytes =
            postcard::to_stdvec(&record).map_err(|err| StoreError::Refused(err.to_string()))?;
        self.vault.write_new(&staged.temporary, &[&bytes])?;
        Ok(staged)
    }
}
