//! Which uploads may be staged, how a member finds its own again, and when they go.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use trefoil_consortium::Part;
use trefoil_consortium::receipt::UploadId;
use trefoil_consortium::wire::UploadBegin;
use trefoil_transport::Pin;

use super::super::upload::receipts;
use super::super::{Catalog, Entry, Store, StoreError, same_schema, upload_name};
use super::{Found, Key, Place, Staging, folder, rows_of};

/// Staged uploads are kept this long after their last change.
const STAGED_AGE_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Uploads that one member may work on at the same time: others shall get their turn.
const OPEN_MAX: usize = 2;
/// Uploads that one member may have staged at the same time.
pub(super) const STAGED_MAX: usize = 32;

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
    pub(in super::super) fn staged_folder(&self, key: &Key) -> PathBuf {
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
    pub(in super::super) fn sweep(&self, now: SystemTime) {
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

fn committed(dataset: &str, entry: &Entry) -> Found {
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
