//! Folders of the store.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::{StoreError, at};

/// Makes a folder that only this user may read.
pub(super) fn make_folder(path: &Path) -> Result<(), StoreError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path).map_err(at(path))
}

/// What lies in a folder, sorted.
pub(super) fn list(folder: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let entries = fs::read_dir(folder).map_err(at(folder))?;
    let mut paths = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(at(folder))?;
    paths.sort();
    Ok(paths)
}

/// Makes renames in a folder durable, where the platform can.
pub(super) fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    if cfg!(unix) {
        File::open(folder)
            .and_then(|folder| folder.sync_all())
            .map_err(at(folder))?;
    }
    Ok(())
}

/// What the files of a folder take; one that is removed meanwhile takes nothing.
pub(super) fn bytes(folder: &Path) -> Result<u64, StoreError> {
    let mut sum = 0;
    let files = match list(folder) {
        Ok(files) => files,
        Err(_) if !folder.exists() => return Ok(0),
        Err(err) => return Err(err),
    };
    for path in files {
        match fs::metadata(&path) {
            Ok(about) => sum += about.len(),
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => {}
            Err(err) => return Err(at(&path)(err)),
        }
    }
    Ok(sum)
}
