//! Uploads on their way. A staged upload is a folder with `begin.bin`, written first, and chunks,
//! each written whole or not at all. It outlives streams, links and this process, and is removed
//! when nothing has come for 24 hours. At any moment one stream at most works on it.
//!
//! A chunk may be replaced by another sharing of the same rows as long as the upload is not
//! committed. Nothing is lost when the process ends between two lines: what lies in the folder is
//! read again, and the receipts say which sharing each chunk is of. `upload.rs` is the commit.

mod places;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use trefoil_consortium::receipt::{
    CHUNK_BYTES_MAX, Schema, SharingId, StagedReceipt, UploadId, chunk_rows,
};
use trefoil_consortium::wire::{self, UploadBegin};
use trefoil_consortium::{Part, Words, check_name};
use trefoil_protocol::share::CompressedShare;
use trefoil_transport::Pin;

use super::upload::{chunk_path, receipt, receipts};
use super::vault::Vault;
use super::{Catalog, Chunk, StoreError, at, file, lock, upload_name};

/// Start of the names of folders that are being removed.
pub(super) const REMOVED: &str = "removed-";
/// What was asked for, in a staged upload's folder.
const BEGIN_FILE: &str = "begin.bin";
/// Longest `begin.bin`.
const BEGIN_MAX_BYTES: u64 = 64 << 10;
/// Longest payload of a chunk file.
pub(super) const CHUNK_FILE_MAX_BYTES: u64 = 2 * CHUNK_BYTES_MAX as u64;
/// Most rows in one upload: row numbers are 32 bits wide, one is taken.
const ROWS_MAX: u64 = 1 << 24;
/// Upload numbers stay below this.
pub(super) const NUMBERS_END: u64 = 1 << 32;

/// Owner and name of an upload. Another member's upload of the same name is another one.
pub(super) type Key = (Pin, UploadId);

/// A staged upload's entry in the catalog.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) begin: UploadBegin,
    /// What is staged, where this process knows it; else it is read from the folder.
    chunks: Option<Vec<Chunk>>,
    /// A stream works on it.
    open: bool,
}

/// What `begin.bin` holds.
#[derive(Serialize, Deserialize)]
struct BeginRecord {
    owner: Pin,
    begin: UploadBegin,
}

/// The right to work on a staged upload. Dropping it lets another stream have it; an upload without
/// any chunk goes with it.
pub(crate) struct Staging {
    key: Key,
    begin: UploadBegin,
    folder: PathBuf,
    rows: Vec<u32>,
    chunks: Vec<Chunk>,
    /// `chunks` is what the folder holds.
    read: bool,
    vault: Arc<Vault>,
    catalog: Arc<Mutex<Catalog>>,
}

impl fmt::Debug for Staging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = self.rows.len();
        write!(
            f,
            "Staging({}, {}/{of})",
            self.folder.display(),
            self.chunks.len()
        )
    }
}

/// An upload that was asked for.
#[derive(Debug)]
pub(crate) enum Found {
    /// It can be worked on.
    Staged(Staging),
    /// It is complete.
    Committed {
        /// What receipts for its chunks say.
        receipts: Vec<StagedReceipt>,
        /// The upload's digest as a whole.
        digest: [u8; 32],
    },
}

impl Staging {
    /// What was asked for.
    pub(crate) fn begin(&self) -> &UploadBegin {
        &self.begin
    }

    /// Rows of each chunk.
    pub(crate) fn chunk_rows(&self) -> &[u32] {
        &self.rows
    }

    /// What receipts for the chunks that are staged say.
    pub(crate) fn receipts(&self) -> Vec<StagedReceipt> {
        receipts(&self.begin, &self.chunks)
    }

    /// Fails unless all chunks are staged.
    pub(crate) fn check_complete(&self) -> Result<(), StoreError> {
        if self.chunks.len() == self.rows.len() {
            return Ok(());
        }
        Err(StoreError::Refused(format!(
            "{} of {} chunks are here: resume the upload",
            self.chunks.len(),
            self.rows.len()
        )))
    }

    pub(super) fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    pub(super) fn key(&self) -> Key {
        self.key
    }

    pub(super) fn owner(&self) -> Pin {
        self.key.0
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Expands and stages a chunk, the next one or an earlier one anew, and forgets those after it;
    /// returns what the receipt says.
    pub(crate) fn stage(&mut self, chunk: wire::Chunk) -> Result<StagedReceipt, StoreError> {
        let number = chunk.chunk as usize;
        let refuse = |detail: String| Err(StoreError::Refused(detail));
        if number > self.chunks.len() || number >= self.rows.len() {
            return refuse(format!(
                "chunk {number} came where {} of {} was due",
                self.chunks.len(),
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
        self.check_wanted()?;
        let (images, labels) = (Words::to_bytes(&images), Words::to_bytes(&labels));
        let payload: [&[u8]; 3] = [&images, &labels, &chunk.sharing];
        let mut hash = Sha256::new();
        payload.iter().for_each(|part| hash.update(part));
        self.vault
            .write(&chunk_path(&self.folder, number), &payload)?;
        // It may have been withdrawn while it was written.
        self.check_wanted()?;
        let staged = Chunk {
            rows,
            sharing: chunk.sharing,
            digest: hash.finalize().into(),
        };
        let receipt = receipt(self.begin.receipt(), number, &staged);
        self.chunks.truncate(number);
        self.chunks.push(staged);
        Ok(receipt)
    }

    /// Fails where the upload was withdrawn; nothing of it stays then, whatever was written
    /// meanwhile.
    pub(super) fn check_wanted(&self) -> Result<(), StoreError> {
        if lock(&self.catalog).staged.contains_key(&self.key) {
            return Ok(());
        }
        match std::fs::remove_dir_all(&self.folder) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => Err(at(&self.folder)(err)),
            _ => Err(StoreError::Refused(format!(
                "upload {} of data set {} was withdrawn",
                self.begin.number, self.begin.dataset
            ))),
        }
    }

    /// Writes what the upload is, before its first chunk.
    fn write_begin(&self) -> Result<(), StoreError> {
        let record = BeginRecord {
            owner: self.key.0,
            begin: self.begin.clone(),
        };
        let bytes =
            postcard::to_stdvec(&record).map_err(|err| StoreError::Refused(err.to_string()))?;
        file::make_folder(&self.folder)?;
        file::sync_folder(self.folder.parent().unwrap_or(&self.folder))?;
        self.vault.write(&self.folder.join(BEGIN_FILE), &[&bytes])?;
        self.check_wanted()
    }

    /// Reads what an earlier run has staged. A chunk that is damaged, and all after it, must be
    /// shared anew.
    fn read_chunks(&mut self) -> Result<(), StoreError> {
        for (number, rows) in self.rows.iter().enumerate() {
            let path = chunk_path(&self.folder, number);
            match read_chunk(&self.vault, &path, &self.begin.schema, *rows) {
                Ok(chunk) => self.chunks.push(chunk),
                Err(StoreError::File { source, .. })
                    if source.kind() == io::ErrorKind::NotFound =>
                {
                    break;
                }
                Err(err @ StoreError::Damaged { .. }) => {
                    tracing::warn!(%err, "a staged chunk is of no use");
                    break;
                }
                Err(err) => return Err(err),
            }
        }
        self.read = true;
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let catalog = self.catalog.clone();
        let mut catalog = lock(&catalog);
        // A committed upload has left the catalog of staged ones, and its folder.
        let Some(place) = catalog.staged.get_mut(&self.key) else {
            return;
        };
        if !self.read || !self.chunks.is_empty() {
            place.open = false;
            place.chunks = self.read.then(|| std::mem::take(&mut self.chunks));
            return;
        }
        // Nobody has a receipt for it, so nobody misses it.
        catalog.staged.remove(&self.key);
        match std::fs::remove_dir_all(&self.folder) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.folder.display(), %err, "an empty upload could not be removed");
            }
            _ => {}
        }
    }
}

/// Bytes of a chunk's shares and its sharing's name.
pub(super) fn chunk_bytes(schema: &Schema, rows: u32) -> u64 {
    let words = u64::from(rows) * schema.row_words().unwrap_or(0) as u64;
    8 * words + size_of::<SharingId>() as u64
}

fn read_chunk(vault: &Vault, path: &Path, schema: &Schema, rows: u32) -> Result<Chunk, StoreError> {
    let payload = vault.read(path, CHUNK_FILE_MAX_BYTES)?;
    let expected = chunk_bytes(schema, rows);
    match payload.last_chunk::<{ size_of::<SharingId>() }>() {
        Some(sharing) if payload.len() as u64 == expected => Ok(Chunk {
            rows,
            sharing: *sharing,
            digest: Sha256::digest(&payload).into(),
        }),
        _ => Err(StoreError::Damaged {
            path: path.to_owned(),
            detail: format!(
                "expected a chunk of {expected} bytes, found {}",
                payload.len()
            ),
        }),
    }
}

fn folder(home: &Path, key: &Key) -> PathBuf {
    home.join("staging")
        .join(format!("{}-{}", key.0, upload_name(&key.1)))
}

/// Whose upload lies in a folder, and what was asked for; `None` where it is being begun or removed.
pub(super) fn begun(
    folder: &Path,
    vault: &Vault,
) -> Result<Option<(Pin, UploadBegin)>, StoreError> {
    let path = folder.join(BEGIN_FILE);
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    if name.starts_with(REMOVED) || !path.try_exists().map_err(at(&path))? {
        return Ok(None);
    }
    let bytes = match vault.read(&path, BEGIN_MAX_BYTES) {
        Ok(bytes) => bytes,
        // It was removed or committed meanwhile.
        Err(_) if !path.exists() => return Ok(None),
        Err(err) => return Err(err),
    };
    let record: BeginRecord = postcard::from_bytes(&bytes).map_err(|err| StoreError::Damaged {
        path,
        detail: err.to_string(),
    })?;
    Ok(Some((record.owner, record.begin)))
}

/// What an earlier run has staged. Removes folders that nobody can resume.
pub(super) fn read_all(home: &Path, vault: &Vault) -> Result<BTreeMap<Key, Place>, StoreError> {
    let mut staged = BTreeMap::new();
    for path in file::list(&home.join("staging"))? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let begun = path.join(BEGIN_FILE);
        let here = |path: &Path| path.try_exists().map_err(at(path));
        if name.starts_with(REMOVED) {
            continue; // `Store::remove_aside` knows what else there is of it
        }
        if !here(&begun)? || !here(&chunk_path(&path, 0))? {
            tracing::info!(path = %path.display(), "removed an upload that nobody can resume");
            std::fs::remove_dir_all(&path).map_err(at(&path))?;
            continue;
        }
        let damaged = |detail: String| StoreError::Damaged {
            path: begun.clone(),
            detail: format!("{detail}: remove this upload's folder to give it up"),
        };
        let bytes = vault.read(&begun, BEGIN_MAX_BYTES)?;
        let record: BeginRecord =
            postcard::from_bytes(&bytes).map_err(|err| damaged(err.to_string()))?;
        let key = (record.owner, record.begin.upload);
        if folder(home, &key) != path {
            return Err(damaged("it belongs to another folder".into()));
        }
        rows_of(&record.begin).map_err(|err| damaged(err.to_string()))?;
        tracing::info!(path = %path.display(), "found an upload that can be resumed");
        let place = Place {
            begin: record.begin,
            chunks: None,
            open: false,
        };
        staged.insert(key, place);
    }
    Ok(staged)
}

/// Checks what does not depend on what is stored; returns the rows of each chunk.
pub(super) fn rows_of(begin: &UploadBegin) -> Result<Vec<u32>, StoreError> {
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
    let numbers = if predict { 1..2 } else { 1..NUMBERS_END };
    if !numbers.contains(&begin.number) {
        return refuse(format!(
            "upload number {} is not between 1 and {}",
            begin.number,
            numbers.end - 1
        ));
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
    match chunk_rows(begin.rows as usize, &begin.schema) {
        Some(rows) => Ok(rows),
        None => refuse(format!(
            "{} rows are too few or too many for one upload",
            begin.rows
        )),
    }
}

#[cfg(test)]
pub(super) mod tests;
