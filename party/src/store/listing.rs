//! What lies in a party's store, for its operator: read from the files, beside a running party.

use std::path::{Path, PathBuf};

use trefoil_consortium::Part;
use trefoil_transport::Pin;

use super::{StoreError, Vault, file, staging, upload};

/// One upload in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredUpload {
    /// What became of it.
    pub state: StoredAs,
    /// Its data set; empty for images to predict.
    pub dataset: String,
    /// Whose it is.
    pub owner: Pin,
    /// Its number among the owner's.
    pub number: u64,
    /// Which rows.
    pub part: Part,
    /// How many.
    pub rows: u64,
    /// What its files take on the disk.
    pub bytes: u64,
}

/// What became of an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StoredAs {
    /// Part of a data set, or waiting for its prediction.
    Committed,
    /// Under way.
    Staged,
}

/// Lists a party's store by the party's home.
///
/// # Errors
/// There is no store, or it cannot be read with its key.
pub fn stored(home: &Path) -> Result<Vec<StoredUpload>, StoreError> {
    let datasets = home.join("datasets");
    if !datasets.is_dir() {
        let path = datasets;
        let source = std::io::ErrorKind::NotFound.into();
        return Err(StoreError::File { path, source });
    }
    let vault = Vault::open(home)?;
    let mut all = Vec::new();
    let mut folders: Vec<(String, PathBuf)> = Vec::new();
    for dataset in file::list(&datasets)? {
        let name = dataset.file_name().unwrap_or_default().to_string_lossy();
        let inside = file::list(&dataset)?;
        folders.extend(
            inside
                .into_iter()
                .map(|path| (name.clone().into_owned(), path)),
        );
    }
    let uploads = file::list(&home.join("uploads"))?;
    folders.extend(uploads.into_iter().map(|path| (String::new(), path)));
    for (dataset, folder) in folders {
        let entry = match upload::read_entry(&folder, &vault) {
            Ok(entry) => entry,
            // The party has removed it meanwhile.
            Err(_) if !folder.exists() => continue,
            Err(err) => return Err(err),
        };
        all.push(StoredUpload {
            state: StoredAs::Committed,
            dataset,
            owner: entry.contribution.hospital,
            number: entry.contribution.number,
            part: entry.contribution.part,
            rows: entry.contribution.rows,
            // In a bucket it takes as much there.
            bytes: match entry.is_whole() {
                true => file::bytes(&folder)?,
                false => entry.sealed_bytes(),
            },
        });
    }
    for folder in file::list(&home.join("staging"))? {
        let Some((owner, begin)) = staging::begun(&folder, &vault)? else {
            continue;
        };
        all.push(StoredUpload {
            state: StoredAs::Staged,
            dataset: begin.dataset,
            owner,
            number: begin.number,
            part: begin.part,
            rows: begin.rows,
            bytes: file::bytes(&folder)?,
        });
    }
    Ok(all)
}
