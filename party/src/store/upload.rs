//! Staging and commit of an upload. A staged upload is a folder nobody reads; the commit writes
//! `commit.bin` into it and renames it to where it belongs: it is there whole or not at all.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use trefoil_consortium::receipt::{Schema, StagedReceipt, chunk_rows};
use trefoil_consortium::wire::{self, Contribution, UploadBegin};
use trefoil_consortium::{Part, Words, check_name};
use trefoil_protocol::share::CompressedShare;
use trefoil_transport::Pin;

use super::{Chunk, Entry, Store, StoreError, at, contribution_name, file, upload_name};

/// The commit's record in an upload's folder.
pub(super) const COMMIT_FILE: &str = "commit.bin";
/// Longest `commit.bin`.
const COMMIT_MAX_BYTES: u64 = 8 << 20;
/// Most rows in one upload: row numbers are 32 bits wide, one is taken.
const ROWS_MAX: u64 = 1 << 24;

/// What `commit.bin` holds.
#[derive(Serialize, Deserialize)]
struct CommitRecord {
    contribution: Contribution,
    schema: Schema,
    chunks: Vec<Chunk>,
}

/// An upload on its way. Dropping it removes what was staged.
pub(crate) struct Staging {
    begin: UploadBegin,
    owner: Pin,
    folder: PathBuf,
    rows: Vec<u32>,
    digests: Vec<[u8; 32]>,
}

/// A committed upload.
#[derive(Debug)]
pub(crate) struct Committed {
    pub(crate) digest: [u8; 32],
}

impl Staging {
    /// What a receipt for this upload's chunks says, chunk and digest left open.
    pub(crate) fn about(&self) -> StagedReceipt {
        StagedReceipt {
            upload: self.begin.upload,
            part: self.begin.part,
            dataset: self.begin.dataset.clone(),
            chunk: 0,
            rows: 0,
            digest: [0; 32],
            schema: self.begin.schema.hash(),
        }
    }

    /// Rows of each chunk.
    pub(crate) fn chunk_rows(&self) -> &[u32] {
        &self.rows
    }

    /// Chunks staged so far.
    pub(crate) fn staged(&self) -> usize {
        self.digests.len()
    }

    /// The digests of the chunks staged so far.
    pub(crate) fn digests(&self) -> &[[u8; 32]] {
        &self.digests
    }

    /// Expands and stages the next chunk; returns what the receipt says.
    pub(crate) fn stage(&mut self, chunk: wire::Chunk) -> Result<StagedReceipt, StoreError> {
        let number = self.digests.len();
        let refuse = |detail: String| Err(StoreError::Refused(detail));
        if number >= self.rows.len() || chunk.chunk as usize != number {
            return refuse(format!(
                "chunk {} came where {number} of {} was due",
                chunk.chunk,
                self.rows.len()
            ));
        }
        let rows = self.rows[number];
        let schema = &self.begin.schema;
        let image_words = schema.image_words().unwrap_or(0) * rows as usize;
        let label_words = schema.classes as usize * rows as usize;
        let Some(images) = CompressedShare::from(chunk.images).expand(image_words) else {
            return refuse(format!(
                "chunk {number}: the images' share is not {image_words} words long"
            ));
        };
        let labels = match (chunk.labels, label_words) {
            (None, 0) => Vec::new(),
            (Some(labels), 1..) => match CompressedShare::from(labels).expand(label_words) {
                Some(labels) => labels,
                None => {
                    return refuse(format!(
                        "chunk {number}: the labels' share is not {label_words} words long"
                    ));
                }
            },
            _ => {
                return refuse(format!(
                    "chunk {number}: labels and {} classes do not fit",
                    schema.classes
                ));
            }
        };
        let (images, labels) = (Words::to_bytes(&images), Words::to_bytes(&labels));
        let digest = Sha256::new()
            .chain_update(&images)
            .chain_update(&labels)
            .finalize()
            .into();
        file::write_new(&chunk_path(&self.folder, number), &[&images, &labels])?;
        self.digests.push(digest);
        Ok(StagedReceipt {
            chunk: number as u32,
            rows,
            digest,
            ..self.about()
        })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // A committed upload has been moved away.
        if self.folder.exists()
            && let Err(err) = std::fs::remove_dir_all(&self.folder)
        {
            tracing::warn!(path = %self.folder.display(), %err, "a staged upload could not be removed");
        }
    }
}

pub(super) fn chunk_path(folder: &Path, chunk: usize) -> PathBuf {
    folder.join(format!("chunk-{chunk:05}.bin"))
}

/// Reads a committed upload's record.
pub(super) fn read_entry(folder: &Path) -> Result<Entry, StoreError> {
    let path = folder.join(COMMIT_FILE);
    let damaged = |detail: String| StoreError::Damaged {
        path: path.clone(),
        detail,
    };
    let bytes = file::read(&path, COMMIT_MAX_BYTES)?;
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
    Ok(Entry {
        contribution: record.contribution,
        schema: record.schema,
        chunks: record.chunks,
        folder: folder.to_owned(),
    })
}

impl Store {
    /// Begins an upload: makes its staging folder.
    pub(crate) fn begin(&self, begin: UploadBegin, owner: Pin) -> Result<Staging, StoreError> {
        let refuse = |detail: String| Err(StoreError::Refused(detail));
        let predict = begin.part == Part::Predict;
        if predict != begin.dataset.is_empty() || predict != (begin.schema.classes == 0) {
            return refuse(
                "images to predict have neither data set nor labels, all others have both".into(),
            );
        }
        if !predict {
            check_name(&begin.dataset).map_err(StoreError::Refused)?;
        }
        if begin.schema.classes > 1 << 16
            || begin.schema.image_words().is_none()
            || begin.rows > ROWS_MAX
        {
            return refuse(format!(
                "{} rows of {:?} cannot be stored",
                begin.rows, begin.schema
            ));
        }
        if let Some(schema) = self.schema(&begin.dataset)
            && schema != begin.schema
        {
            return refuse(format!(
                "data set {} holds {schema:?}, these rows are {:?}",
                begin.dataset, begin.schema
            ));
        }
        let Some(rows) = chunk_rows(begin.rows as usize, &begin.schema) else {
            return refuse(format!(
                "{} rows are too few or too many for one upload",
                begin.rows
            ));
        };
        let folder = self.home.join("staging").join(upload_name(&begin.upload));
        if folder.exists() {
            return refuse("an upload of this name is under way".into());
        }
        file::make_folder(&folder)?;
        Ok(Staging {
            begin,
            owner,
            folder,
            rows,
            digests: Vec::new(),
        })
    }

    /// Commits an upload whose receipts have been checked. `digest` is the upload's as a whole.
    pub(crate) fn commit(
        &self,
        staging: &Staging,
        number: u64,
        digest: [u8; 32],
    ) -> Result<Committed, StoreError> {
        let begin = &staging.begin;
        if staging.digests.len() != staging.rows.len() {
            let detail = format!(
                "{} of {} chunks are here",
                staging.digests.len(),
                staging.rows.len()
            );
            return Err(StoreError::Refused(detail));
        }
        let contribution = Contribution {
            hospital: staging.owner,
            number,
            part: begin.part,
            rows: begin.rows,
            digest,
        };
        let chunks = staging
            .rows
            .iter()
            .zip(&staging.digests)
            .map(|(rows, digest)| Chunk {
                rows: *rows,
                digest: *digest,
            });
        let record = CommitRecord {
            contribution,
            schema: begin.schema.clone(),
            chunks: chunks.collect(),
        };
        let bytes =
            postcard::to_stdvec(&record).map_err(|err| StoreError::Refused(err.to_string()))?;
        file::write(&staging.folder.join(COMMIT_FILE), &[&bytes])?;

        // From here on other commits wait, so that number and schema stay true.
        let mut catalog = self.lock();
        let predict = begin.part == Part::Predict;
        let parent = if predict {
            self.home.join("uploads")
        } else {
            self.home.join("datasets").join(&begin.dataset)
        };
        let name = upload_name(&begin.upload);
        let (taken, schema) = match catalog.datasets.get(&begin.dataset) {
            Some(entries) if !predict => (
                entries.contains_key(&(staging.owner, number)),
                entries
                    .values()
                    .next()
                    .is_some_and(|entry| entry.schema != begin.schema),
            ),
            _ => (predict && catalog.uploads.contains_key(&name), false),
        };
        if taken || schema {
            let what = if taken {
                "number is taken"
            } else {
                "schema has changed"
            };
            return Err(StoreError::Refused(format!(
                "the upload's {what} meanwhile: upload again"
            )));
        }
        file::make_folder(&parent)?;
        let folder = parent.join(if predict {
            name.clone()
        } else {
            contribution_name(staging.owner, number)
        });
        std::fs::rename(&staging.folder, &folder).map_err(at(&folder))?;
        file::sync_folder(&parent)?;
        let CommitRecord {
            contribution,
            schema,
            chunks,
        } = record;
        let entry = Entry {
            contribution,
            schema,
            chunks,
            folder,
        };
        if predict {
            catalog.uploads.insert(name, entry);
        } else {
            catalog
                .datasets
                .entry(begin.dataset.clone())
                .or_default()
                .insert((staging.owner, number), entry);
        }
        Ok(Committed { digest })
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::super::{UPLOAD_AGE_MAX, useless};
    use super::*;

    /// A committed upload without rows.
    fn committed(home: &Path, name: &str) -> PathBuf {
        let folder = home.join("uploads").join(name);
        file::make_folder(&folder).unwrap();
        let record = CommitRecord {
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
        file::write(&folder.join(COMMIT_FILE), &[&bytes]).unwrap();
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
