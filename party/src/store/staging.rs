//! Uploads on their way. A staged upload is a folder with `begin.bin`, written first, and chunks,
//! each written whole or not at all. It outlives streams, links and this process, and is removed
//! when nothing has come for 24 hours. At any moment one stream at most works on it.
//!
//! A chunk may be replaced by another sharing of the same rows as long as the upload is not
//! committed. Nothing is lost when the process ends between two lines: what lies in the folder is
//! read again, and the receipts say which sharing each chunk is of. `upload.rs` is the commit.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

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
use super::{Catalog, Chunk, Store, StoreError, at, file, lock, same_schema, upload_name};

/// Start of the names of folders that are being removed.
pub(super) const REMOVED: &str = "removed-";
/// What was asked for, in a staged upload's folder.
const BEGIN_FILE: &str = "begin.bin";
/// Longest `begin.bin`.
const BEGIN_MAX_BYTES: u64 = 64 << 10;
/// Longest payload of a chunk file.
pub(super) const CHUNK_FILE_MAX_BYTES: u64 = 2 * CHUNK_BYTES_MAX as u64;
/// Staged uploads are kept this long after their last change.
const STAGED_AGE_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Uploads that one member may work on at the same time: others shall get their turn.
const OPEN_MAX: usize = 2;
/// Uploads that one member may have staged at the same time.
const STAGED_MAX: usize = 32;
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

impl Catalog {
    /// Whether a new upload may be staged.
    fn admit(&self, key: &Key, begin: &UploadBegin) -> Result<(), StoreError> {
        same_schema(self.datasets.get(&begin.dataset), begin)?;
        if self.is_withdrawn(&begin.dataset, key.0, begin.number) {
            return Err(StoreError::NumberTaken(begin.number));
        }
        let mut numbers = self.numbers(&begin.dataset, key.0);
        if begin.part != Part::Predict && numbers.any(|number| number == begin.number) {
            return Err(StoreError::NumberTaken(begin.number));
        }
        if self.places(key.0).count() >= STAGED_MAX {
            return Err(StoreError::Refused(format!(
                "{STAGED_MAX} uploads of this member are staged: finish one, or wait until they \
                 are removed, 24 hours after their last change"
            )));
        }
        Ok(())
    }

    fn places(&self, owner: Pin) -> impl Iterator<Item = &Place> {
        let own = self
            .staged
            .iter()
            .filter(move |((pin, _), _)| *pin == owner);
        own.map(|(_, place)| place)
    }
}

impl Store {
    pub(super) fn staged_folder(&self, key: &Key) -> PathBuf {
        folder(&self.home, key)
    }

    /// Begins an upload, or opens one that is staged and was begun alike.
    pub(crate) fn begin(&self, begin: UploadBegin, owner: Pin) -> Result<Found, StoreError> {
        let rows = rows_of(&begin)?;
        self.sweep(SystemTime::now());
        let key = (owner, begin.upload);
        let other = || {
            let detail = "an upload of this name was begun with other rows: choose another name";
            StoreError::Refused(detail.into())
        };
        let (staging, new) = {
            let mut catalog = self.lock();
            if let Some((dataset, entry)) = catalog.committed(owner, &begin.upload) {
                if entry.begin(dataset) != begin {
                    return Err(other());
                }
                return Ok(committed(dataset, entry));
            }
            let new = match catalog.staged.get(&key) {
                Some(place) if place.begin != begin => return Err(other()),
                Some(_) => false,
                None => {
                    catalog.admit(&key, &begin)?;
                    self.check_quota(&catalog, owner, &begin)?;
                    true
                }
            };
            if new {
                let place = Place {
                    begin,
                    chunks: Some(Vec::new()),
                    open: false,
                };
                catalog.staged.insert(key, place);
            }
            match self.open_place(&mut catalog, key, rows) {
                Ok(staging) => (staging, new),
                Err(err) => {
                    if new {
                        catalog.staged.remove(&key);
                    }
                    return Err(err);
                }
            }
        };
        if new {
            staging.write_begin()?;
        }
        self.found(staging)
    }

    /// Opens an upload that is staged or committed.
    pub(crate) fn reopen(&self, upload: &UploadId, owner: Pin) -> Result<Found, StoreError> {
        let key = (owner, *upload);
        let staging = {
            let mut catalog = self.lock();
            if let Some((dataset, entry)) = catalog.committed(owner, upload) {
                return Ok(committed(dataset, entry));
            }
            let Some(place) = catalog.staged.get(&key) else {
                return Err(StoreError::Refused(format!(
                    "there is no upload {} of this member: what is staged is removed 24 hours \
                     after its last change",
                    upload_name(upload)
                )));
            };
            let rows = rows_of(&place.begin)?;
            self.open_place(&mut catalog, key, rows)?
        };
        self.found(staging)
    }

    fn found(&self, mut staging: Staging) -> Result<Found, StoreError> {
        if !staging.read {
            staging.read_chunks()?;
        }
        Ok(Found::Staged(staging))
    }

    /// Takes the right to work on an upload that is in the catalog.
    fn open_place(
        &self,
        catalog: &mut Catalog,
        key: Key,
        rows: Vec<u32>,
    ) -> Result<Staging, StoreError> {
        let busy = |detail: &str| Err(StoreError::Busy(detail.into()));
        let open = catalog.places(key.0).filter(|place| place.open).count();
        let Some(place) = catalog.staged.get_mut(&key) else {
            return busy("this upload is being removed");
        };
        if place.open {
            return busy("another stream works on this upload");
        }
        if open >= OPEN_MAX {
            return busy("this member has other uploads under way");
        }
        place.open = true;
        let known = place.chunks.take();
        Ok(Staging {
            key,
            begin: place.begin.clone(),
            folder: folder(&self.home, &key),
            rows,
            read: known.is_some(),
            chunks: known.unwrap_or_default(),
            vault: self.vault.clone(),
            catalog: self.catalog.clone(),
        })
    }

    /// Removes staged uploads to which nothing has come for too long.
    pub(super) fn sweep(&self, now: SystemTime) {
        let mut aside = Vec::new();
        self.lock().staged.retain(|key, place| {
            let folder = folder(&self.home, key);
            if place.open || !expired(&folder, now) {
                return true;
            }
            match self.set_aside(&folder) {
                Ok(path) => {
                    tracing::info!(path = %folder.display(), "removed a staged upload that was not committed within 24 hours");
                    aside.push(path);
                    false
                }
                Err(err) => {
                    tracing::warn!(%err, "a staged upload could not be removed");
                    true
                }
            }
        });
        for path in aside {
            if let Err(err) = self.remove_folder(&path) {
                tracing::warn!(%err, "a staged upload could not be removed");
            }
        }
    }
}

fn committed(dataset: &str, entry: &super::Entry) -> Found {
    Found::Committed {
        receipts: receipts(&entry.begin(dataset), &entry.chunks),
        digest: entry.contribution.digest,
    }
}

/// A folder changes with every file that is written in it. A time in the future counts as now.
fn expired(folder: &Path, now: SystemTime) -> bool {
    let modified = std::fs::metadata(folder).and_then(|about| about.modified());
    modified.is_ok_and(|modified| now.duration_since(modified).unwrap_or_default() > STAGED_AGE_MAX)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use trefoil_consortium::wire::Share;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);
    const HOUR: Duration = Duration::from_secs(60 * 60);

    pub(in super::super) fn anna() -> Pin {
        Pin::from_bytes([1; 32])
    }

    pub(in super::super) fn bernd() -> Pin {
        Pin::from_bytes([2; 32])
    }

    /// Three chunks.
    pub(in super::super) fn begin(name: u8, number: u64) -> UploadBegin {
        UploadBegin {
            upload: [name; 16],
            dataset: "shapes".into(),
            part: Part::Train,
            schema: Schema {
                shape: vec![1, 2, 2],
                classes: 2,
            },
            rows: 2_500,
            number,
        }
    }

    pub(in super::super) fn chunk(number: u32, sharing: u8) -> wire::Chunk {
        wire::Chunk {
            chunk: number,
            sharing: [sharing; 16],
            images: Share::Seed([sharing; 16]),
            labels: Some(Share::Seed([sharing + 1; 16])),
        }
    }

    fn staging(found: Result<Found, StoreError>) -> Staging {
        match found.unwrap() {
            Found::Staged(staging) => staging,
            other => panic!("{other:?}"),
        }
    }

    /// The first chunks of an upload, each with a sharing of its own.
    pub(in super::super) fn stage(
        store: &Store,
        begin: UploadBegin,
        chunks: u32,
    ) -> Vec<StagedReceipt> {
        let mut staging = staging(store.begin(begin, anna()));
        let all = (0..chunks).map(|number| staging.stage(chunk(number, 10 * number as u8)));
        all.collect::<Result<_, _>>().unwrap()
    }

    /// A complete upload, committed.
    pub(in super::super) fn commit(store: &Store, begin: UploadBegin, owner: Pin) {
        let mut staging = staging(store.begin(begin, owner));
        for number in 0..3 {
            staging.stage(chunk(number, 40 + number as u8)).unwrap();
        }
        store.commit(&staging, [7; 32]).unwrap();
    }

    fn home() -> (tempfile::TempDir, Store) {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        (home, store)
    }

    fn refused(found: Result<Found, StoreError>) -> String {
        match found {
            Err(StoreError::Refused(reason)) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_staged_outlives_the_stream_and_the_process() {
        let (home, store) = home();
        let receipts = stage(&store, begin(1, 1), 2);
        assert_eq!(receipts[1].sharing, [10; 16]);
        assert_ne!(receipts[0].digest, receipts[1].digest);
        let again = staging(store.begin(begin(1, 1), anna()));
        assert_eq!(again.receipts(), receipts);
        drop((again, store));

        // A file that was being written when the process was killed.
        let folder = folder(home.path(), &(anna(), [1; 16]));
        std::fs::write(folder.join("chunk-00002.tmp"), b"half").unwrap();
        let store = Store::open(home.path()).unwrap();
        let mut again = staging(store.reopen(&[1; 16], anna()));
        assert_eq!(again.receipts(), receipts);
        assert_eq!(again.stage(chunk(2, 20)).unwrap().rows, 500);
        drop((again, store));

        let damaged = chunk_path(&folder, 1);
        let mut bytes = std::fs::read(&damaged).unwrap();
        bytes[1_000] ^= 1;
        std::fs::write(&damaged, bytes).unwrap();
        let store = Store::open(home.path()).unwrap();
        let again = staging(store.begin(begin(1, 1), anna()));
        assert_eq!(again.receipts(), receipts[..1]);
    }

    #[test]
    fn a_chunk_is_replaced_and_those_after_it_are_forgotten() {
        let (_home, store) = home();
        let receipts = stage(&store, begin(1, 1), 2);
        let mut staging = staging(store.begin(begin(1, 1), anna()));
        let anew = staging.stage(chunk(1, 99)).unwrap();
        assert_eq!((anew.chunk, anew.sharing), (1, [99; 16]));
        assert_ne!(anew.digest, receipts[1].digest);
        assert_eq!(staging.receipts(), [receipts[0].clone(), anew]);
        let first = staging.stage(chunk(0, 98)).unwrap();
        assert_eq!(staging.receipts(), [first]);
        let err = staging.stage(chunk(2, 97)).unwrap_err().to_string();
        assert!(err.contains("chunk 2 came where 1 of 3"), "{err}");
    }

    #[test]
    fn another_sharing_of_equal_shares_has_another_digest() {
        let (_home, store) = home();
        let mut staging = staging(store.begin(begin(1, 1), anna()));
        let one = staging.stage(chunk(0, 5)).unwrap();
        let mut other = chunk(0, 5);
        other.sharing = [6; 16];
        assert_ne!(staging.stage(other).unwrap().digest, one.digest);
    }

    #[test]
    fn what_nobody_commits_is_removed_a_day_after_its_last_change() {
        let (home, store) = home();
        let now = SystemTime::now();
        stage(&store, begin(1, 1), 3);
        store.sweep(now + DAY - HOUR);
        let open = staging(store.begin(begin(1, 1), anna()));
        store.sweep(now + DAY + HOUR);
        assert_eq!(open.receipts().len(), 3, "a stream works on it");
        drop(open);
        drop(staging(store.reopen(&[1; 16], anna())));
        store.sweep(now + DAY + HOUR);
        let reason = refused(store.reopen(&[1; 16], anna()));
        assert!(reason.contains("24 hours"), "{reason}");
        let left = || file::list(&home.path().join("staging")).unwrap().len();
        assert_eq!(left(), 0);

        stage(&store, begin(2, 1), 1);
        drop(store);
        let folder = folder(home.path(), &(anna(), [2; 16]));
        let about = std::fs::File::open(&folder).unwrap();
        about.set_modified(now - DAY + HOUR).unwrap();
        drop(Store::open(home.path()).unwrap());
        assert_eq!(left(), 1);
        about.set_modified(now - DAY - HOUR).unwrap();
        drop(Store::open(home.path()).unwrap());
        assert_eq!(left(), 0);
    }

    #[test]
    fn a_commit_is_found_again_by_its_owner_and_takes_no_more_chunks() {
        let (home, store) = home();
        let receipts = stage(&store, begin(1, 1), 3);
        let part = stage(&store, begin(2, 2), 2);
        let open = staging(store.reopen(&[2; 16], anna()));
        assert!(store.commit(&open, [7; 32]).is_err(), "a chunk is missing");
        assert_eq!(open.receipts(), part);
        drop(open);

        // Killed after the record was written and before the folder was renamed.
        let folder = folder(home.path(), &(anna(), [1; 16]));
        std::fs::write(folder.join(super::super::upload::COMMIT_FILE), b"half").unwrap();
        drop(store);
        let store = Store::open(home.path()).unwrap();
        let open = staging(store.reopen(&[1; 16], anna()));
        store.commit(&open, [7; 32]).unwrap();
        drop(open);
        let snapshot = store.dataset("shapes").unwrap();
        assert_eq!(snapshot.train_rows, 2_500);

        for store in [store, Store::open(home.path()).unwrap()] {
            for found in [
                store.reopen(&[1; 16], anna()),
                store.begin(begin(1, 1), anna()),
            ] {
                let Found::Committed {
                    receipts: theirs,
                    digest,
                } = found.unwrap()
                else {
                    panic!("it is staged");
                };
                assert_eq!((theirs, digest), (receipts.clone(), [7; 32]));
            }
            refused(store.begin(begin(1, 2), anna()));
            refused(store.reopen(&[1; 16], bernd()));
            assert_eq!(store.dataset("shapes").unwrap(), snapshot);
        }
    }

    #[test]
    fn a_members_upload_is_unknown_to_others() {
        let (_home, store) = home();
        let receipts = stage(&store, begin(1, 1), 2);
        let known = refused(store.reopen(&[1; 16], bernd())).replace(&"01".repeat(16), "X");
        let unknown = refused(store.reopen(&[3; 16], bernd())).replace(&"03".repeat(16), "X");
        assert_eq!(known, unknown);
        // The same name is another upload.
        let theirs = staging(store.begin(begin(1, 1), bernd()));
        assert_eq!(theirs.receipts(), []);
        drop(theirs);
        let own = staging(store.begin(begin(1, 1), anna()));
        assert_eq!(own.receipts(), receipts);
        drop(own);
        refused(store.begin(begin(1, 2), anna()));
    }

    #[test]
    fn images_to_predict_are_found_by_their_owner_only() {
        let (_home, store) = home();
        let mut begin = begin(1, 1);
        (begin.part, begin.dataset, begin.schema.classes) = (Part::Predict, String::new(), 0);
        begin.rows = 10;
        let mut open = staging(store.begin(begin.clone(), anna()));
        let mut images = chunk(0, 1);
        images.labels = None;
        open.stage(images).unwrap();
        store.commit(&open, [7; 32]).unwrap();
        drop(open);
        let found = store.begin(begin.clone(), anna()).unwrap();
        assert!(matches!(found, Found::Committed { .. }), "{found:?}");
        refused(store.reopen(&[1; 16], bernd()));
        begin.number = 2;
        refused(store.begin(begin, anna()));
    }

    #[test]
    fn no_two_uploads_of_one_hospital_to_one_data_set_have_one_number() {
        let (home, store) = home();
        let next = |store: &Store, pin| store.next_number("shapes", pin).unwrap();
        assert_eq!(next(&store, anna()), 1);
        stage(&store, begin(1, 1), 3);
        assert_eq!((next(&store, anna()), next(&store, bernd())), (2, 1));
        let taken = |store: &Store, number| {
            let err = store.begin(begin(2, number), anna()).unwrap_err();
            assert!(matches!(err, StoreError::NumberTaken(_)), "{err}");
        };
        taken(&store, 1);
        stage(&store, begin(3, 5), 1);
        drop(store);
        let store = Store::open(home.path()).unwrap();
        assert_eq!(next(&store, anna()), 6);
        taken(&store, 5);
        let open = staging(store.reopen(&[1; 16], anna()));
        store.commit(&open, [7; 32]).unwrap();
        drop(open);
        taken(&store, 1);
        drop(staging(store.begin(begin(1, 1), bernd())));
        refused(store.begin(begin(4, 0), anna()));
        refused(store.begin(begin(4, NUMBERS_END), anna()));
    }

    #[test]
    fn an_upload_without_a_chunk_leaves_nothing() {
        let (home, store) = home();
        drop(staging(store.begin(begin(1, 1), anna())));
        let folder = folder(home.path(), &(anna(), [1; 16]));
        assert!(!folder.exists());
        assert_eq!(store.next_number("shapes", anna()).unwrap(), 1);
        // Killed before the first chunk.
        std::mem::forget(staging(store.begin(begin(1, 1), anna())));
        assert!(folder.join(BEGIN_FILE).exists());
        let store = Store::open(home.path()).unwrap();
        assert!(!folder.exists());
        assert_eq!(store.next_number("shapes", anna()).unwrap(), 1);
    }

    #[test]
    fn one_stream_works_on_an_upload_and_a_member_on_two() {
        let (_home, store) = home();
        let busy = |found| match found {
            Err(StoreError::Busy(reason)) => reason,
            other => panic!("{other:?}"),
        };
        let one = staging(store.begin(begin(1, 1), anna()));
        let reason = busy(store.begin(begin(1, 1), anna()));
        assert!(reason.contains("another stream"), "{reason}");
        busy(store.reopen(&[1; 16], anna()));
        let _two = staging(store.begin(begin(2, 2), anna()));
        let reason = busy(store.begin(begin(3, 3), anna()));
        assert!(reason.contains("under way"), "{reason}");
        assert_eq!(store.next_number("shapes", anna()).unwrap(), 3);
        drop(staging(store.begin(begin(1, 1), bernd())));
        drop(one);
        drop(staging(store.begin(begin(3, 3), anna())));
    }

    #[test]
    fn a_member_may_have_some_uploads_staged_and_no_more() {
        let (_home, store) = home();
        for number in 1..=STAGED_MAX as u8 {
            stage(&store, begin(number, number.into()), 1);
        }
        let reason = refused(store.begin(begin(200, 200), anna()));
        assert!(reason.contains("are staged"), "{reason}");
        stage(&store, begin(1, 1), 3);
        let open = staging(store.reopen(&[1; 16], anna()));
        store.commit(&open, [7; 32]).unwrap();
        drop(open);
        stage(&store, begin(200, 200), 1);
    }
}
