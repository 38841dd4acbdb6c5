//! Committed uploads: the commit writes `commit.bin` into the staged folder and renames that to
//! where it belongs: it is there whole or not at all. `staging/` is what comes before.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use trefoil_consortium::Part;
use trefoil_consortium::receipt::{Schema, StagedReceipt, UploadId};
use trefoil_consortium::wire::{Contribution, UploadBegin};
use trefoil_transport::Pin;

use super::vault::Vault;
use super::{Catalog, Chunk, Entry, Staging, Store, StoreError, at, contribution_name, file};
use super::{same_schema, upload_name};

/// The commit's record in an upload's folder.
pub(super) const COMMIT_FILE: &str = "commit.bin";
/// Longest `commit.bin`.
const COMMIT_MAX_BYTES: u64 = 8 << 20;

/// What `commit.bin` holds.
#[derive(Serialize, Deserialize)]
struct CommitRecord {
    upload: UploadId,
    contribution: Contribution,
    schema: Schema,
    chunks: Vec<Chunk>,
}

impl CommitRecord {
    fn entry(self, folder: PathBuf) -> Entry {
        Entry {
            upload: self.upload,
            contribution: self.contribution,
            schema: self.schema,
            chunks: self.chunks,
            folder,
        }
    }
}

pub(super) fn chunk_path(folder: &Path, chunk: usize) -> PathBuf {
    folder.join(format!("chunk-{chunk:05}.bin"))
}

/// Reads a committed upload's record.
pub(super) fn read_entry(folder: &Path, vault: &Vault) -> Result<Entry, StoreError> {
    let path = folder.join(COMMIT_FILE);
    let damaged = |detail: String| StoreError::Damaged {
        path: path.clone(),
        detail,
    };
    let bytes = vault.read(&path, COMMIT_MAX_BYTES)?;
    let record: CommitRecord =
        postcard::from_bytes(&bytes).map_err(|err| damaged(err.to_string()))?;
    let rows: u64 = record
        .chunks
        .iter()
        .map(|chunk| u64::from(chunk.rows))
        .sum();
    if rows != record.contribution.rows || record.schema.image_words().is_none() {
        return Err(damaged("its numbers do not fit together".into()));
    }
    Ok(record.entry(folder.to_owned()))
}

impl Entry {
    /// What was asked for when this upload began. `dataset` is where it lies.
    pub(super) fn begin(&self, dataset: &str) -> UploadBegin {
        UploadBegin {
            upload: self.upload,
            dataset: dataset.into(),
            part: self.contribution.part,
            schema: self.schema.clone(),
            rows: self.contribution.rows,
            number: self.contribution.number,
        }
    }
}

impl Catalog {
    /// A member's committed upload, and the data set it is in; none for images to predict.
    pub(super) fn committed(&self, owner: Pin, upload: &UploadId) -> Option<(&str, &Entry)> {
        let predict = self.uploads.get(&upload_name(upload)).into_iter();
        let entries = self.datasets.iter().flat_map(|(name, entries)| {
            let first = (owner, 0);
            entries
                .range(first..=(owner, u64::MAX))
                .map(move |(_, entry)| (name.as_str(), entry))
        });
        predict
            .map(|entry| ("", entry))
            .chain(entries)
            .find(|(_, entry)| entry.upload == *upload && entry.contribution.hospital == owner)
    }
}

/// What receipts for an upload's chunks say.
pub(super) fn receipts(begin: &UploadBegin, chunks: &[Chunk]) -> Vec<StagedReceipt> {
    let about = begin.receipt();
    let chunks = chunks.iter().enumerate();
    chunks
        .map(|(number, chunk)| receipt(about.clone(), number, chunk))
        .collect()
}

/// What the receipt for one chunk says. `about`: see [`UploadBegin::receipt`].
pub(super) fn receipt(about: StagedReceipt, number: usize, chunk: &Chunk) -> StagedReceipt {
    StagedReceipt {
        chunk: number as u32,
        rows: chunk.rows,
        sharing: chunk.sharing,
        digest: chunk.digest,
        ..about
    }
}

impl Store {
    /// Commits an upload whose receipts have been checked. `digest` is the upload's as a whole.
    pub(crate) fn commit(&self, staging: &Staging, digest: [u8; 32]) -> Result<(), StoreError> {
        let begin = staging.begin();
        staging.check_complete()?;
        staging.check_wanted()?;
        let record = CommitRecord {
            upload: begin.upload,
            contribution: Contribution {
                hospital: staging.owner(),
                number: begin.number,
                part: begin.part,
                rows: begin.rows,
                digest,
            },
            schema: begin.schema.clone(),
            chunks: staging.chunks().to_vec(),
        };
        let bytes =
            postcard::to_stdvec(&record).map_err(|err| StoreError::Refused(err.to_string()))?;
        self.vault
            .write(&staging.folder().join(COMMIT_FILE), &[&bytes])?;

        // Before it is there for anybody. What is put and then not committed is deleted again.
        let put = self.put_committed(staging);
        let settled = put.and_then(|()| self.settle(staging, record));
        let entry = settled.inspect_err(|_| self.take_back(staging))?;
        self.drop_local(&entry);
        file::sync_folder(entry.folder.parent().unwrap_or(&entry.folder))
    }

    /// Moves a staged upload to where it belongs, if nothing speaks against it.
    fn settle(&self, staging: &Staging, record: CommitRecord) -> Result<Entry, StoreError> {
        let begin = staging.begin();
        let predict = begin.part == Part::Predict;
        let name = upload_name(&begin.upload);
        let key = (staging.owner(), begin.number);
        let (parent, folder) = if predict {
            (self.home.join("uploads"), name.clone())
        } else {
            let parent = self.home.join("datasets").join(&begin.dataset);
            (parent, contribution_name(key.0, key.1))
        };
        let folder = parent.join(folder);

        // From here on other commits wait, so that number and schema stay true.
        let mut catalog = self.lock();
        if !catalog.staged.contains_key(&staging.key()) {
            let (number, dataset) = (begin.number, &begin.dataset);
            return Err(StoreError::Refused(format!(
                "upload {number} of data set {dataset} was withdrawn"
            )));
        }
        let known = catalog.datasets.get(&begin.dataset);
        if !predict && known.is_some_and(|entries| entries.contains_key(&key)) {
            return Err(StoreError::NumberTaken(begin.number));
        }
        if !predict {
            same_schema(known, begin)?;
        }
        if predict && catalog.uploads.contains_key(&name) {
            let detail = "this upload cannot be committed: upload again under another name";
            return Err(StoreError::Refused(detail.into()));
        }
        file::make_folder(&parent)?;
        file::sync_folder(parent.parent().unwrap_or(&parent))?;
        std::fs::rename(staging.folder(), &folder).map_err(at(&folder))?;
        let entry = record.entry(folder);
        if predict {
            catalog.uploads.insert(name, entry.clone());
        } else {
            let dataset = catalog.datasets.entry(begin.dataset.clone()).or_default();
            dataset.insert(key, entry.clone());
        }
        catalog.staged.remove(&staging.key());
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::super::{UPLOAD_AGE_MAX, useless};
    use super::*;

    /// A committed upload without rows.
    fn committed(home: &Path, name: &str) -> PathBuf {
        let vault = Vault::open(home).unwrap();
        let folder = home.join("uploads").join(name);
        file::make_folder(&folder).unwrap();
        let record = CommitRecord {
            upload: [0; 16],
            contribution: Contribution {
                hospital: Pin::from_bytes([1; 32]),
                number: 1,
                part: Part::Predict,
                rows: 0,
                digest: [0; 32],
            },
            schema: Schema {
                shape: vec![1, 2, 2],
                classes: 0,
            },
            chunks: Vec::new(),
        };
        let bytes = postcard::to_stdvec(&record).unwrap();
        vault.write(&folder.join(COMMIT_FILE), &[&bytes]).unwrap();
        folder
    }

    #[test]
    fn a_removal_that_was_interrupted_is_finished_and_nothing_committed_is_dropped() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path();
        let whole = committed(home, "whole");
        let half = committed(home, "half");
        std::fs::remove_file(half.join(COMMIT_FILE)).unwrap();
        std::fs::write(chunk_path(&half, 0), b"what is left").unwrap();
        let aside = home.join("staging").join("removed-0");
        file::make_folder(&aside).unwrap();
        std::fs::write(chunk_path(&aside, 1), b"what is left").unwrap();
        let store = Store::open(home).unwrap();
        assert!(!half.exists() && !aside.exists());
        assert!(store.upload("half").is_none() && store.upload("whole").is_some());

        store.remove_upload("whole").unwrap();
        store.remove_upload("whole").unwrap();
        assert!(!whole.exists() && store.upload("whole").is_none());
        assert_eq!(file::list(&home.join("staging")).unwrap().len(), 0);

        let damaged = committed(home, "damaged").join(COMMIT_FILE);
        std::fs::write(&damaged, b"something else").unwrap();
        let err = Store::open(home).unwrap_err().to_string();
        assert!(err.contains("damaged") && damaged.exists(), "{err}");
    }

    #[test]
    fn images_that_no_job_has_used_are_of_no_use_after_a_day() {
        let home = tempfile::tempdir().unwrap();
        let folder = committed(home.path(), "upload");
        let now = SystemTime::now();
        assert_eq!(useless(&folder, now).unwrap(), None);
        let later = now + UPLOAD_AGE_MAX + Duration::from_secs(60);
        assert!(useless(&folder, later).unwrap().is_some());
    }
}
