//! Models: this party's shares of weights, with the session they come from. The three parties'
//! shares belong together exactly if that session is the same.
//!
//! A name has a version for each job that made one under it, and the job's hash is the version: all
//! parties know it without agreeing on a number. A file never changes under its name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use serde::{Deserialize, Serialize};
use trefoil_consortium::wire::{ModelAbout, ModelInfo};
use trefoil_consortium::{JobId, ModelRef, SessionId, check_name};
use trefoil_protocol::ring::Tensor;
use trefoil_transport::Pin;

use super::tensors::Tensors;
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
    tensors: Tensors,
}

/// A record and what follows it in the file. Files of older releases end with the record, or with what
/// the model was made as.
struct Found {
    record: Record,
    about: Option<ModelAbout>,
    started_from: Option<String>,
}

impl Found {
    fn info(self, name: &str) -> ModelInfo {
        let Found {
            record,
            about,
            started_from,
        } = self;
        ModelInfo {
            name: name.into(),
            owner: record.owner,
            source: record.source,
            job: record.job,
            ring_bits: record.ring_bits,
            frac_bits: record.frac_bits,
            about,
            started_from,
        }
    }
}

/// When a model was made, for an order of versions.
fn made_s(info: &ModelInfo) -> u64 {
    info.about.as_ref().map_or(0, |about| about.made_s)
}

/// Name and version in the name of a model's file.
fn named(path: &Path) -> Option<(String, Option<String>)> {
    path.extension().filter(|ext| *ext == "model")?;
    let stem = path.file_stem()?.to_string_lossy().into_owned();
    Some(match stem.rsplit_once('@') {
        Some((name, version)) => (name.into(), Some(version.into())),
        None => (stem, None),
    })
}

/// A model that is written and not yet kept. Dropping it removes it.
#[derive(Debug)]
pub(crate) struct StagedModel {
    temporary: PathBuf,
    path: PathBuf,
}

impl StagedModel {
    /// Makes the model the newest of its name.
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
    pub(crate) started_from: Option<String>,
    pub(crate) shares: Vec<(String, Tensor)>,
}

impl Store {
    fn model_path(&self, name: &str, job: &JobId) -> Result<PathBuf, StoreError> {
        check_name(name).map_err(StoreError::Refused)?;
        let file = format!("{name}@{job}.model");
        Ok(self.home.join("models").join(file))
    }

    fn read_model(&self, path: &Path) -> Result<Option<Found>, StoreError> {
        if !path.exists() {
            return Ok(None);
        }
        let bytes = self.vault.read(path, MODEL_MAX_BYTES)?;
        let read = || -> Result<Found, postcard::Error> {
            let (record, rest) = postcard::take_from_bytes(&bytes)?;
            let mut found = Found {
                record,
                about: None,
                started_from: None,
            };
            if !rest.is_empty() {
                let (about, rest) = postcard::take_from_bytes(rest)?;
                found.about = Some(about);
                if !rest.is_empty() {
                    found.started_from = postcard::from_bytes(rest)?;
                }
            }
            Ok(found)
        };
        read().map(Some).map_err(|err| StoreError::Damaged {
            path: path.to_owned(),
            detail: err.to_string(),
        })
    }

    /// At start-up: older releases kept one model a name, in a file without a version.
    pub(super) fn name_versions(&self) -> Result<(), StoreError> {
        let folder = self.home.join("models");
        for path in file::list(&folder)? {
            if let Some((name, None)) = named(&path)
                && let Some(found) = self.read_model(&path)?
            {
                let new = self.model_path(&name, &found.record.job)?;
                std::fs::rename(&path, &new).map_err(at(&new))?;
                tracing::info!(path = %new.display(), "a model of an older release has a version now");
            }
        }
        file::sync_folder(&folder)
    }

    /// What is public about the kept models, by name, the newest version of each last. A file is read
    /// once as long as this process runs.
    pub(crate) fn models(&self) -> Result<Vec<ModelInfo>, StoreError> {
        let mut known = self.models.lock().unwrap_or_else(PoisonError::into_inner);
        let mut infos = std::collections::BTreeMap::new();
        for path in file::list(&self.home.join("models"))? {
            let Some((name, _)) = named(&path) else {
                continue;
            };
            let info = match known.remove(&path) {
                Some(info) => Some(info),
                // One that is removed meanwhile is none.
                None => self.read_model(&path)?.map(|found| found.info(&name)),
            };
            infos.extend(info.map(|info| (path, info)));
        }
        // Those that are gone are forgotten.
        known.clone_from(&infos);
        let mut infos: Vec<ModelInfo> = infos.into_values().collect();
        infos.sort_by(|a, b| (&a.name, made_s(a), a.job).cmp(&(&b.name, made_s(b), b.job)));
        Ok(infos)
    }

    /// The time to note for a new version under a name: now, but later than all versions that there
    /// are, so that two within a second, or after a clock was set back, have an order.
    pub(crate) fn next_made_s(&self, name: &str, now_s: u64) -> Result<u64, StoreError> {
        let models = self.models()?;
        let same = models.iter().filter(|info| info.name == name);
        Ok(same.map(|info| made_s(info) + 1).fold(now_s, u64::max))
    }

    /// The model that is meant: of a name without a version the newest.
    fn find_model(&self, text: &str) -> Result<ModelInfo, StoreError> {
        let wanted = ModelRef::parse(text).map_err(StoreError::Refused)?;
        let mut found = self.models()?;
        found.retain(|info| wanted.means(&info.name, &info.job));
        if wanted.version.is_some() && found.len() > 1 {
            return Err(StoreError::Refused(format!(
                "{} versions begin like {text}: give more digits",
                found.len()
            )));
        }
        let newest = found.pop();
        newest.ok_or_else(|| StoreError::Refused(format!("there is no model {text}")))
    }

    /// The model that a job made under a name from the session `source`, if it is here.
    pub(crate) fn made_by(
        &self,
        name: &str,
        job: &JobId,
        source: SessionId,
    ) -> Result<Option<ModelInfo>, StoreError> {
        check_name(name).map_err(StoreError::Refused)?;
        let mut models = self.models()?.into_iter();
        Ok(models.find(|info| info.name == name && info.job == *job && info.source == source))
    }

    /// Removes a model.
    pub(crate) fn remove_model(&self, info: &ModelInfo) -> Result<(), StoreError> {
        let path = self.model_path(&info.name, &info.job)?;
        match std::fs::remove_file(&path) {
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => {}
            removed => removed.map_err(at(&path))?,
        }
        file::sync_folder(path.parent().unwrap_or(&path))
    }

    /// Whether a job of `owner` may keep a model under `name`: it is free, or the owner's.
    pub(crate) fn may_save(&self, name: &str, owner: Pin) -> Result<(), StoreError> {
        let models = self.models()?;
        let mut versions = models.iter().filter(|info| info.name == name);
        match versions.any(|info| info.owner != owner) {
            true => Err(StoreError::Refused(format!(
                "model {name} belongs to another member: choose another name"
            ))),
            false => Ok(()),
        }
    }

    /// The shares of a model, `NAME` or `NAME@VERSION`.
    pub(crate) fn model(
        &self,
        name: &str,
        ring_bits: u8,
        frac_bits: u8,
    ) -> Result<Model, StoreError> {
        let meant = self.find_model(name)?;
        let found = self.read_model(&self.model_path(&meant.name, &meant.job)?)?;
        let Found { record, about, .. } =
            found.ok_or_else(|| StoreError::Refused(format!("there is no model {name}")))?;
        if (record.ring_bits, record.frac_bits) != (ring_bits, frac_bits) {
            return Err(StoreError::Refused(format!(
                "model {name} has {} ring and {} fraction bits, the job says {ring_bits} and {frac_bits}",
                record.ring_bits, record.frac_bits
            )));
        }
        let damaged = |(name, _)| StoreError::Refused(format!("model tensor {name} is damaged"));
        let shares = record.tensors.shares().map_err(damaged)?;
        Ok(Model {
            source: record.source,
            about,
            shares,
        })
    }

    /// Writes a model beside its name, to be kept or dropped when the session ends.
    pub(crate) fn stage_model(&self, model: NewModel<'_>) -> Result<StagedModel, StoreError> {
        let path = self.model_path(model.name, &model.job)?;
        let temporary = self.home.join("models").join(format!(
            "{}.{}.tmp",
            model.name,
            trefoil_consortium::hex(&model.source[..8])
        ));
        let staged = StagedModel { temporary, path };
        let record = Record {
            source: model.source,
            job: model.job,
            owner: model.owner,
            ring_bits: model.ring_bits,
            frac_bits: model.frac_bits,
            tensors: Tensors::of(model.shares),
        };
        let bytes =
            postcard::to_stdvec(&record).map_err(|err| StoreError::Refused(err.to_string()))?;
        let about = postcard::to_stdvec(&model.about)
            .map_err(|err| StoreError::Refused(err.to_string()))?;
        let started_from = postcard::to_stdvec(&model.started_from)
            .map_err(|err| StoreError::Refused(err.to_string()))?;
        let parts = [&bytes[..], &about, &started_from];
        self.vault.write_new(&staged.temporary, &parts)?;
        Ok(staged)
    }
}

#[cfg(test)]
mod tests {
    use trefoil_consortium::Words;

    use super::*;

    const OWNER: [u8; 32] = [1; 32];

    fn about(made_s: u64) -> ModelAbout {
        ModelAbout {
            network: "name = \"tiny\"".into(),
            preparation: None,
            dataset: Some(("digits".into(), [3; 32])),
            made_s,
        }
    }

    /// Keeps a model that a job made at a time; its weight is the job's number.
    fn keep(store: &Store, name: &str, job: u8, made_s: u64) {
        let model = NewModel {
            name,
            source: [job; 32],
            job: JobId([job; 32]),
            owner: Pin::from_bytes(OWNER),
            ring_bits: 64,
            frac_bits: 16,
            about: about(made_s),
            started_from: Some("base@01234567".into()),
            shares: vec![(
                "a.weight".into(),
                Tensor::new(vec![1], vec![u64::from(job)]),
            )],
        };
        store.stage_model(model).unwrap().keep().unwrap();
    }

    fn weight(store: &Store, text: &str) -> Result<u64, String> {
        let model = store.model(text, 64, 16).map_err(|err| err.to_string())?;
        Ok(model.shares["a.weight"].data()[0])
    }

    #[test]
    fn a_name_has_versions_and_means_the_newest() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        keep(&store, "one", 0x22, 7);
        keep(&store, "one", 0x11, 9);
        keep(&store, "two", 0x33, 8);
        let infos = store.models().unwrap();
        let jobs: Vec<u8> = infos.iter().map(|info| info.job.0[0]).collect();
        assert_eq!(jobs, [0x22, 0x11, 0x33]);
        assert_eq!(infos[0].about, Some(about(7)));
        assert_eq!(infos[0].started_from.as_deref(), Some("base@01234567"));
        assert_eq!(weight(&store, "one"), Ok(0x11));
        assert_eq!(weight(&store, "one@22222222"), Ok(0x22));
        assert!(
            weight(&store, "one@33333333")
                .unwrap_err()
                .contains("no model")
        );
        assert!(
            weight(&store, "one@2222")
                .unwrap_err()
                .contains("no version")
        );
        // Two versions whose hashes begin alike.
        let mut job = [0x22; 32];
        job[31] = 0;
        let twin = NewModel {
            name: "one",
            source: job,
            job: JobId(job),
            owner: Pin::from_bytes(OWNER),
            ring_bits: 64,
            frac_bits: 16,
            about: about(1),
            started_from: None,
            shares: Vec::new(),
        };
        store.stage_model(twin).unwrap().keep().unwrap();
        assert!(
            weight(&store, "one@22222222")
                .unwrap_err()
                .contains("more digits")
        );
        // And after a start.
        drop(store);
        let store = Store::open(home.path()).unwrap();
        assert_eq!(weight(&store, "one"), Ok(0x11));
    }

    #[test]
    fn one_version_is_removed_and_a_name_belongs_to_one_member() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        keep(&store, "one", 1, 7);
        keep(&store, "one", 2, 8);
        let other = Pin::from_bytes([9; 32]);
        assert!(store.may_save("one", other).is_err());
        store.may_save("one", Pin::from_bytes(OWNER)).unwrap();
        store.may_save("two", other).unwrap();
        let job = JobId([2; 32]);
        assert_eq!(store.made_by("one", &job, [1; 32]).unwrap(), None);
        let found = store.made_by("one", &job, [2; 32]).unwrap().unwrap();
        store.remove_model(&found).unwrap();
        store.remove_model(&found).unwrap();
        assert_eq!(store.made_by("one", &job, [2; 32]).unwrap(), None);
        assert_eq!(weight(&store, "one"), Ok(1));
    }

    #[test]
    fn the_newest_version_is_the_last_one_made_whatever_the_clock_says() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        // All in one second, then with a clock that was set back.
        for (job, now_s) in [(9, 100), (5, 100), (7, 40)] {
            let made_s = store.next_made_s("one", now_s).unwrap();
            keep(&store, "one", job, made_s);
            assert_eq!(store.find_model("one").unwrap().job, JobId([job; 32]));
        }
        assert_eq!(store.next_made_s("two", 40).unwrap(), 40);
    }

    #[test]
    fn a_model_of_an_older_release_is_read_and_has_a_version() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let record = Record {
            source: [1; 32],
            job: JobId([9; 32]),
            owner: Pin::from_bytes(OWNER),
            ring_bits: 64,
            frac_bits: 16,
            tensors: Tensors(vec![("a.weight".into(), vec![1], Words(vec![5]))]),
        };
        let bytes = postcard::to_stdvec(&record).unwrap();
        let path = home.path().join("models/old.model");
        store.vault.write_new(&path, &[&bytes]).unwrap();
        drop(store);
        let store = Store::open(home.path()).unwrap();
        assert_eq!(store.models().unwrap()[0].about, None);
        assert_eq!(weight(&store, "old@09090909"), Ok(5));
    }
}
