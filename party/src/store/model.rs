//! Models: this party's shares of weights, with the session they come from. The three parties'
//! shares belong together exactly if that session is the same.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use trefoil_consortium::wire::{ModelAbout, ModelInfo};
use trefoil_consortium::{JobId, SessionId, Words, check_name};
use trefoil_protocol::ring::Tensor;
use trefoil_transport::Pin;

use super::{Store, StoreError, at, file};

/// Largest model file.
const MODEL_MAX_BYTES: u64 = 16 << 30;

/// Shares of a model.
#[derive(Debug)]
pub(crate) struct Model {
    /// The session that they come from.
    pub(crate) source: SessionId,
    /// What it was made as.
    pub(crate) about: Option<ModelAbout>,
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

/// A record and what follows it in the file. Files of older releases end with the record.
struct Found {
    record: Record,
    about: Option<ModelAbout>,
}

impl Found {
    fn info(self, name: &str) -> ModelInfo {
        let Found { record, about } = self;
        ModelInfo {
            name: name.into(),
            owner: record.owner,
            source: record.source,
            job: record.job,
            ring_bits: record.ring_bits,
            frac_bits: record.frac_bits,
            about,
        }
    }
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
    pub(crate) about: ModelAbout,
    pub(crate) shares: Vec<(String, Tensor)>,
}

impl Store {
    fn model_path(&self, name: &str) -> Result<PathBuf, StoreError> {
        check_name(name).map_err(StoreError::Refused)?;
        Ok(self.home.join("models").join(format!("{name}.model")))
    }

    fn read_model(&self, name: &str) -> Result<Option<Found>, StoreError> {
        let path = self.model_path(name)?;
        if !path.exists() {
            return Ok(None);
        }
        let bytes = self.vault.read(&path, MODEL_MAX_BYTES)?;
        let read = || -> Result<Found, postcard::Error> {
            let (record, rest) = postcard::take_from_bytes(&bytes)?;
            let about = match rest.is_empty() {
                true => None,
                false => Some(postcard::from_bytes(rest)?),
            };
            Ok(Found { record, about })
        };
        read().map(Some).map_err(|err| StoreError::Damaged {
            path,
            detail: err.to_string(),
        })
    }

    /// What is public about the kept models, by name.
    pub(crate) fn models(&self) -> Result<Vec<ModelInfo>, StoreError> {
        let mut infos = Vec::new();
        for path in file::list(&self.home.join("models"))? {
            if path.extension().is_none_or(|ext| ext != "model") {
                continue;
            }
            let name = path.file_stem().unwrap_or_default().to_string_lossy();
            // One that is removed meanwhile is none.
            infos.extend(self.read_model(&name)?.map(|found| found.info(&name)));
        }
        Ok(infos)
    }

    /// Removes a model of `owner` that comes from the session `source`; whether there was one.
    pub(crate) fn remove_model(
        &self,
        name: &str,
        owner: Pin,
        source: SessionId,
    ) -> Result<bool, StoreError> {
        let Some(Found { record, .. }) = self.read_model(name)? else {
            return Ok(false);
        };
        if record.owner != owner {
            return Err(StoreError::Refused(format!(
                "model {name} belongs to another member, who alone may remove it"
            )));
        }
        if record.source != source {
            return Err(StoreError::Refused(format!(
                "model {name} was made anew meanwhile: look at `trefoil models` again"
            )));
        }
        let path = self.model_path(name)?;
        std::fs::remove_file(&path).map_err(at(&path))?;
        file::sync_folder(path.parent().unwrap_or(&path))?;
        Ok(true)
    }

    /// Whether a job of `owner` may keep a model under `name`: it is free, or the owner's.
    pub(crate) fn may_save(&self, name: &str, owner: Pin) -> Result<(), StoreError> {
        match self.read_model(name)? {
            Some(found) if found.record.owner != owner => Err(StoreError::Refused(format!(
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
        let found = self.read_model(name)?;
        let Found { record, about } =
            found.ok_or_else(|| StoreError::Refused(format!("there is no model {name}")))?;
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
            about,
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
        let about = postcard::to_stdvec(&model.about)
            .map_err(|err| StoreError::Refused(err.to_string()))?;
        self.vault.write_new(&staged.temporary, &[&bytes, &about])?;
        Ok(staged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about() -> ModelAbout {
        ModelAbout {
            network: "name = \"tiny\"".into(),
            preparation: None,
            dataset: Some(("digits".into(), [3; 32])),
            made_s: 7,
        }
    }

    fn keep(store: &Store, name: &str, source: u8) {
        let model = NewModel {
            name,
            source: [source; 32],
            job: JobId([9; 32]),
            owner: Pin::from_bytes([1; 32]),
            ring_bits: 64,
            frac_bits: 16,
            about: about(),
            shares: vec![("a.weight".into(), Tensor::new(vec![2], vec![5, 6]))],
        };
        store.stage_model(model).unwrap().keep().unwrap();
    }

    #[test]
    fn a_model_says_what_it_is_and_its_owner_alone_removes_it() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        keep(&store, "one", 1);
        keep(&store, "two", 2);
        let infos = store.models().unwrap();
        let names: Vec<&str> = infos.iter().map(|info| info.name.as_str()).collect();
        assert_eq!(names, ["one", "two"]);
        assert_eq!(infos[0].about, Some(about()));
        let (owner, other) = (Pin::from_bytes([1; 32]), Pin::from_bytes([2; 32]));
        let refused = |owner, source| store.remove_model("one", owner, source).unwrap_err();
        assert!(
            refused(other, [1; 32])
                .to_string()
                .contains("another member")
        );
        assert!(refused(owner, [2; 32]).to_string().contains("made anew"));
        assert!(store.remove_model("one", owner, [1; 32]).unwrap());
        assert!(!store.remove_model("one", owner, [1; 32]).unwrap());
        assert_eq!(store.models().unwrap().len(), 1);
    }

    #[test]
    fn a_model_of_an_older_release_is_read_without_what_it_was_made_as() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let record = Record {
            source: [1; 32],
            job: JobId([9; 32]),
            owner: Pin::from_bytes([1; 32]),
            ring_bits: 64,
            frac_bits: 16,
            tensors: vec![("a.weight".into(), vec![2], Words(vec![5, 6]))],
        };
        let bytes = postcard::to_stdvec(&record).unwrap();
        let path = store.model_path("old").unwrap();
        store.vault.write_new(&path, &[&bytes]).unwrap();
        let model = store.model("old", 64, 16).unwrap();
        assert_eq!(
            (model.about, model.shares["a.weight"].data()),
            (None, &[5u64, 6][..])
        );
    }
}
