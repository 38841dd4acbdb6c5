//! What a party keeps: shares of data sets, of images to predict, and of models. Files only;
//! written under a temporary name, flushed, renamed; sealed under this party's store key.
//!
//! ```text
//! home/staging/MEMBER-UPLOAD/            begin.bin and chunks that are not committed, for 24 hours
//! home/staging/removed-COUNT/            an upload that is being removed; swept at start-up
//! home/datasets/NAME/HOSPITAL-NUMBER/    one contribution: commit.bin and chunks
//! home/uploads/UPLOAD/                   images to predict, until their job is over
//! home/models/NAME@JOB.model             shares of weights: the version is the job that made them
//! home/withdrawn/NAME/HOSPITAL.bin       upload numbers that were withdrawn and are spent
//! home/checkpoints/JOB/STEP.state        shares of a running job's state
//! home/results/JOB.log                   output shares of a job, for its requester
//! home/store.key                         the store key, unless the service manager has it
//! home/cache/HOSPITAL-NUMBER-UPLOAD/     copies of what lies in a bucket (`placement.rs`)
//! ```
//! `vault.rs` is the form of a file, `staging/` uploads on their way, `upload.rs` their commit,
//! `withdraw.rs` taking them back, `quota.rs` how much a member may bring, `listing.rs` what lies
//! here, `table.rs` reading rows, `tensors.rs` named shares, `model.rs` models, `checkpoint.rs` and `results.rs` what outlives
//! a session, `fence.rs` which session may write it, `placement.rs` and `bucket.rs` chunks in
//! S3-compatible storage.

#[cfg_attr(not(feature = "s3"), path = "no_bucket.rs")]
mod bucket;
mod checkpoint;
mod fence;
mod file;
mod listing;
mod model;
mod placement;
mod quota;
mod results;
mod staging;
mod table;
mod tensors;
mod upload;
mod vault;
mod withdraw;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};
use trefoil_consortium::config::StoreConfig;
use trefoil_consortium::receipt::{Schema, SharingId, UploadId};
use trefoil_consortium::wire::{Contribution, ModelInfo, UploadBegin};
use trefoil_consortium::{DatasetInfo, Part, check_name, hex};
use trefoil_models::HospitalRows;
use trefoil_transport::Pin;

pub(crate) use bucket::Bucket;
pub(crate) use checkpoint::{Checkpoint, Checkpoints};
pub(crate) use fence::Lease;
use fence::Leases;
pub use listing::{StoredAs, StoredUpload, stored};
pub(crate) use model::{NewModel, StagedModel};
pub use placement::probe_bucket;
pub(crate) use results::{Results, Stored};
pub(crate) use staging::{Found, Staging};
pub(crate) use table::Tables;
pub(crate) use vault::Vault;

/// Images to predict whose job never came are removed at the first start after this time.
const UPLOAD_AGE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Why the store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file that is damaged or of another version.
    #[error("{path}: {detail}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// Something asked for that cannot be.
    #[error("{0}")]
    Refused(String),
    /// Something that may be asked for again, later.
    #[error("busy: {0}")]
    Busy(String),
    /// The member has another upload of this number to the same data set.
    #[error("upload number {0} is taken: ask for the next number and upload again")]
    NumberTaken(u64),
}

/// Attaches a path to an error of the file system.
fn at(path: &Path) -> impl FnOnce(io::Error) -> StoreError + '_ {
    |source| StoreError::File {
        path: path.to_owned(),
        source,
    }
}

/// One contribution and where it lies.
#[derive(Clone, Debug)]
struct Entry {
    upload: UploadId,
    contribution: Contribution,
    schema: Schema,
    chunks: Vec<Chunk>,
    folder: PathBuf,
}

/// One chunk file: the images' shares, the labels' shares, the name of the sharing.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
struct Chunk {
    rows: u32,
    sharing: SharingId,
    /// Of all that the file holds.
    digest: [u8; 32],
}

/// The store under one home folder.
#[derive(Debug)]
pub(crate) struct Store {
    home: PathBuf,
    vault: Arc<Vault>,
    /// Uploads on their way hold it too, to give their places back.
    catalog: Arc<Mutex<Catalog>>,
    /// Folders removed so far, for names that nothing else has.
    removed: AtomicU64,
    checkpoints: Checkpoints,
    leases: Leases,
    /// What is public about models that were read: they never change under their names.
    models: Mutex<BTreeMap<PathBuf, ModelInfo>>,
    /// Bytes that one member's uploads may take.
    quota_bytes: Option<u64>,
    /// Where committed chunks lie; in the home without one.
    bucket: Option<Bucket>,
    /// Bound of the bucket's copies in the home.
    cache_bytes: u64,
    /// Shared with all tables that are open.
    reads: Arc<()>,
}

#[derive(Debug, Default)]
struct Catalog {
    /// By data set, in order of (hospital, number).
    datasets: BTreeMap<String, BTreeMap<(Pin, u64), Entry>>,
    /// Images to predict, by upload.
    uploads: BTreeMap<String, Entry>,
    /// What is staged and not committed.
    staged: BTreeMap<staging::Key, staging::Place>,
    /// Upload numbers that are spent.
    withdrawn: withdraw::AllWithdrawn,
}

impl Store {
    /// A store in this home, without bounds.
    #[cfg(test)]
    pub(crate) fn open(home: &Path) -> Result<Store, StoreError> {
        Store::open_with(home, None, 0)
    }

    /// A store as a party's configuration says.
    pub(crate) fn open_for(
        home: &Path,
        config: &StoreConfig,
        me: Pin,
    ) -> Result<Store, StoreError> {
        let bucket = Bucket::open(config, me)?;
        let cache_bytes = config.cache_mb.saturating_mul(quota::MEGABYTE);
        Ok(Store {
            quota_bytes: config
                .quota_mb_per_hospital
                .map(|megabytes| megabytes.saturating_mul(quota::MEGABYTE)),
            ..Store::open_with(home, bucket, cache_bytes)?
        })
    }

    /// Opens the store, removes what an earlier run left unfinished and nobody can resume, and reads
    /// its catalog.
    /// Committed chunks lie in the bucket, if there is one, with copies of at most so many bytes.
    pub(crate) fn open_with(
        home: &Path,
        bucket: Option<Bucket>,
        cache_bytes: u64,
    ) -> Result<Store, StoreError> {
        file::make_folder(home)?;
        let store = Store {
            home: home.to_owned(),
            vault: Arc::new(Vault::open(home)?),
            catalog: Arc::default(),
            removed: AtomicU64::new(0),
            checkpoints: Checkpoints::default(),
            leases: Leases::default(),
            models: Mutex::default(),
            quota_bytes: None,
            bucket,
            cache_bytes,
            reads: Arc::default(),
        };
        for folder in [
            placement::CACHE,
            "staging",
            "datasets",
            "uploads",
            "models",
            "withdrawn",
            "checkpoints",
            "results",
        ] {
            file::make_folder(&home.join(folder))?;
        }
        let mut catalog = Catalog {
            staged: staging::read_all(home, &store.vault)?,
            withdrawn: withdraw::read_all(home, &store.vault)?,
            ..Catalog::default()
        };
        for left in file::list(&home.join("models"))? {
            if left.extension().is_some_and(|ext| ext == "tmp") {
                tracing::info!(path = %left.display(), "removed a model of an unfinished job");
                std::fs::remove_file(&left).map_err(at(&left))?;
            }
        }
        for dataset in file::list(&home.join("datasets"))? {
            let name = dataset
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let entries = catalog.datasets.entry(name).or_default();
            for folder in file::list(&dataset)? {
                let entry = upload::read_entry(&folder, &store.vault)?;
                entries.insert(
                    (entry.contribution.hospital, entry.contribution.number),
                    entry,
                );
            }
        }
        for folder in file::list(&home.join("uploads"))? {
            if let Some(why) = useless(&folder, SystemTime::now())? {
                tracing::info!(path = %folder.display(), "removed images to predict: {why}");
                store.discard(&folder)?;
                continue;
            }
            let name = folder
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            catalog
                .uploads
                .insert(name, upload::read_entry(&folder, &store.vault)?);
        }
        store.name_versions()?;
        *store.lock() = catalog;
        store.finish_withdrawals()?;
        store.sweep(SystemTime::now());
        Ok(store)
    }

    fn lock(&self) -> MutexGuard<'_, Catalog> {
        lock(&self.catalog)
    }

    /// What a data set holds; an unknown one is empty.
    pub(crate) fn dataset(&self, name: &str) -> Result<DatasetInfo, StoreError> {
        check_name(name).map_err(StoreError::Refused)?;
        Ok(self.lock().info(name))
    }

    /// Each hospital's test rows in a data set, in the order in which they lie there.
    pub(crate) fn test_rows(&self, name: &str) -> Vec<HospitalRows> {
        let info = self.lock().info(name);
        info.by_hospital()
    }

    /// The upload number of a hospital from which on all are free; staged uploads have theirs.
    pub(crate) fn next_number(&self, dataset: &str, hospital: Pin) -> Result<u64, StoreError> {
        if dataset.is_empty() {
            return Ok(1);
        }
        check_name(dataset).map_err(StoreError::Refused)?;
        let numbers = self.lock().numbers(dataset, hospital).max();
        Ok(numbers.map_or(1, |number| number.saturating_add(1)))
    }

    /// The owner of images to predict, and their number.
    pub(crate) fn upload(&self, upload: &str) -> Option<(Pin, u64)> {
        self.lock()
            .uploads
            .get(upload)
            .map(|entry| (entry.contribution.hospital, entry.contribution.rows))
    }

    /// Removes images whose job is over; does nothing where they are gone already.
    pub(crate) fn remove_upload(&self, upload: &str) -> Result<(), StoreError> {
        let entry = self.lock().uploads.remove(upload);
        entry.map_or(Ok(()), |entry| self.discard(&entry.folder))
    }

    /// Removes a folder. It goes to `staging/` first: whatever interrupts the removal,
    /// no half of it stays where committed ones are looked for.
    fn discard(&self, folder: &Path) -> Result<(), StoreError> {
        let aside = self.set_aside(folder)?;
        self.remove_folder(&aside)
    }

    /// Moves a folder to where nobody looks for it; returns where it is.
    fn set_aside(&self, folder: &Path) -> Result<PathBuf, StoreError> {
        // What an earlier run has set aside may still be there.
        let aside = loop {
            let number = self.removed.fetch_add(1, Ordering::Relaxed);
            let name = format!("{}{number}", staging::REMOVED);
            let aside = self.home.join("staging").join(name);
            if !aside.try_exists().map_err(at(&aside))? {
                break aside;
            }
        };
        std::fs::rename(folder, &aside).map_err(at(folder))?;
        file::sync_folder(folder.parent().unwrap_or(folder))?;
        Ok(aside)
    }

    /// Opens the tables of a data set or of an upload, checking every chunk's checksum.
    pub(crate) fn tables(
        &self,
        dataset: Option<&str>,
        upload: Option<&str>,
    ) -> Result<Tables, StoreError> {
        let (entries, uploaded) = {
            let catalog = self.lock();
            let entries = dataset.and_then(|name| catalog.datasets.get(name));
            let entries: Vec<Entry> = entries
                .into_iter()
                .flat_map(BTreeMap::values)
                .cloned()
                .collect();
            (
                entries,
                upload
                    .and_then(|upload| catalog.uploads.get(upload))
                    .cloned(),
            )
        };
        let entries: Vec<&Entry> = entries.iter().chain(&uploaded).collect();
        let mut tables = Tables::new(self.vault.clone(), self.reads.clone());
        self.make_room(&entries)?;
        for entry in entries {
            let files = self.files(entry)?;
            let appended = tables.append(entry, &files.chunks);
            appended.map_err(|err| self.about_object(entry, &files, err))?;
        }
        Ok(tables)
    }
}

fn lock(catalog: &Mutex<Catalog>) -> MutexGuard<'_, Catalog> {
    catalog.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Catalog {
    /// A hospital's upload numbers in a data set, committed and staged.
    fn numbers(&self, dataset: &str, hospital: Pin) -> impl Iterator<Item = u64> {
        let committed = self.datasets.get(dataset).into_iter();
        let committed = committed
            .flat_map(BTreeMap::keys)
            .filter(move |(pin, _)| *pin == hospital)
            .map(|(_, number)| *number);
        let staged = self.staged.iter();
        let staged = staged
            .filter(move |((pin, _), place)| *pin == hospital && place.begin.dataset == dataset)
            .map(|(_, place)| place.begin.number);
        let withdrawn = self.withdrawn.get(&(dataset.to_owned(), hospital));
        let withdrawn = withdrawn.and_then(withdraw::Withdrawn::last);
        committed.chain(staged).chain(withdrawn)
    }
}

/// New contributions to a data set must have its schema.
fn same_schema(
    known: Option<&BTreeMap<(Pin, u64), Entry>>,
    begin: &UploadBegin,
) -> Result<(), StoreError> {
    let known = known.and_then(|entries| entries.values().next());
    let Some(schema) = known.map(|entry| &entry.schema) else {
        return Ok(());
    };
    let mut differs = Vec::new();
    if schema.shape != begin.schema.shape {
        let sides = |shape: &[u32]| {
            let sides: Vec<String> = shape.iter().map(u32::to_string).collect();
            sides.join(" x ")
        };
        let (held, new) = (sides(&schema.shape), sides(&begin.schema.shape));
        differs.push(format!("images of {held}, these are {new}"));
    }
    if schema.classes != begin.schema.classes {
        let (held, new) = (schema.classes, begin.schema.classes);
        differs.push(format!("{held} classes, these rows have {new}"));
    }
    if differs.is_empty() {
        return Ok(());
    }
    let (name, differs) = (&begin.dataset, differs.join("; "));
    Err(StoreError::Refused(format!(
        "data set {name} holds {differs}"
    )))
}

/// Why a folder of images to predict may be removed at start-up. One with a commit record is kept
/// until it is too old, readable or not.
fn useless(folder: &Path, now: SystemTime) -> Result<Option<&'static str>, StoreError> {
    let record = folder.join(upload::COMMIT_FILE);
    if !record.try_exists().map_err(at(&record))? {
        return Ok(Some("their removal was interrupted"));
    }
    let modified = std::fs::metadata(folder).and_then(|about| about.modified());
    let modified = modified.map_err(at(folder))?;
    // A time in the future counts as now.
    let age = now.duration_since(modified).unwrap_or_default();
    Ok((age > UPLOAD_AGE_MAX).then_some("no job has used them for too long"))
}

fn info(entries: &[&Entry]) -> DatasetInfo {
    let rows = |part: Part| {
        entries
            .iter()
            .map(|entry| &entry.contribution)
            .filter(|c| c.part == part)
            .map(|c| c.rows)
            .sum::<u64>()
    };
    let mut hash = Sha256::new().chain_update(b"trefoil snapshot v1\0");
    for entry in entries {
        let contribution = &entry.contribution;
        hash.update(entry.schema.hash());
        hash.update(contribution.hospital.as_bytes());
        hash.update(contribution.number.to_le_bytes());
        hash.update([contribution.part as u8]);
        hash.update(contribution.rows.to_le_bytes());
        hash.update(contribution.digest);
    }
    DatasetInfo {
        schema: entries.first().map(|entry| entry.schema.clone()),
        train_rows: rows(Part::Train),
        test_rows: rows(Part::Test),
        snapshot: hash.finalize().into(),
        contributions: entries
            .iter()
            .map(|entry| entry.contribution.clone())
            .collect(),
    }
}

/// A contribution's folder: hospitals first, then upload numbers.
fn contribution_name(hospital: Pin, number: u64) -> String {
    format!("{hospital}-{number:020}")
}

/// An upload's name.
pub(crate) fn upload_name(upload: &[u8]) -> String {
    hex(upload)
}
