//! The form of every file: magic, version, length, payload, SHA-256 of all before it.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{StoreError, at};

const MAGIC: [u8; 8] = *b"TREFOIL\0";
/// Version of the store's files. 2: uploads' names and numbers in commit records, sharings in chunks.
const VERSION: u32 = 2;
/// Bytes before the payload: magic, version, length.
pub(super) const HEADER_BYTES: u64 = 8 + 4 + 8;
const DIGEST_BYTES: u64 = 32;

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

/// Writes a file whole: temporary name, flush, rename. Mode 0600.
pub(super) fn write(path: &Path, payload: &[&[u8]]) -> Result<(), StoreError> {
    let temporary = path.with_extension("tmp");
    write_new(&temporary, payload)?;
    fs::rename(&temporary, path).map_err(at(path))?;
    sync_folder(path.parent().unwrap_or(path))
}

/// Writes and flushes a file under its own name, which must be one that nobody reads yet.
pub(super) fn write_new(path: &Path, payload: &[&[u8]]) -> Result<(), StoreError> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.open(path).map_err(at(path))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let length: u64 = payload.iter().map(|part| part.len() as u64).sum();
    let header = [&MAGIC[..], &VERSION.to_le_bytes(), &length.to_le_bytes()].concat();
    let mut hash = Sha256::new();
    for part in [&header[..]].iter().chain(payload) {
        hash.update(part);
        out.write_all(part).map_err(at(path))?;
    }
    out.write_all(&hash.finalize()).map_err(at(path))?;
    let file = out.into_inner().map_err(|err| at(path)(err.into_error()))?;
    file.sync_all().map_err(at(path))
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

/// Opens a file and checks its form; returns it with its header and the length of its payload,
/// which starts at [`HEADER_BYTES`]. The payload itself is not read.
pub(super) fn open(
    path: &Path,
    max_bytes: u64,
) -> Result<(File, [u8; HEADER_BYTES as usize], u64), StoreError> {
    let damaged = |detail: String| StoreError::Damaged {
        path: path.to_owned(),
        detail,
    };
    let mut file = File::open(path).map_err(at(path))?;
    let total = file.metadata().map_err(at(path))?.len();
    let mut header = [0; HEADER_BYTES as usize];
    if total < HEADER_BYTES + DIGEST_BYTES {
        return Err(damaged(format!("{total} bytes are too few")));
    }
    file.read_exact(&mut header).map_err(at(path))?;
    let (magic, rest) = header.split_at(8);
    let (version, length) = rest.split_at(4);
    let version = version
        .iter()
        .rev()
        .fold(0u32, |value, byte| value << 8 | u32::from(*byte));
    let length = length
        .iter()
        .rev()
        .fold(0u64, |value, byte| value << 8 | u64::from(*byte));
    if magic != MAGIC {
        return Err(damaged("this is no file of a Trefoil store".into()));
    }
    if version != VERSION {
        return Err(damaged(format!(
            "store version {version}, this software reads {VERSION}: run the release that wrote this \
             home, or give this one a new home"
        )));
    }
    if length != total - HEADER_BYTES - DIGEST_BYTES || length > max_bytes {
        return Err(damaged(format!(
            "a payload of {length} bytes in a file of {total}"
        )));
    }
    Ok((file, header, length))
}

/// Hashes the payload of a file that [`open`] has returned, piece by piece.
pub(super) fn hash_payload(
    file: &mut File,
    path: &Path,
    length: u64,
    mut hash: Sha256,
) -> Result<Sha256, StoreError> {
    file.seek(SeekFrom::Start(HEADER_BYTES)).map_err(at(path))?;
    let mut buffer = vec![0; 1 << 20];
    let mut left = length;
    while left > 0 {
        let part = left.min(buffer.len() as u64) as usize;
        file.read_exact(&mut buffer[..part]).map_err(at(path))?;
        hash.update(&buffer[..part]);
        left -= part as u64;
    }
    Ok(hash)
}

/// Reads a file's whole payload and checks its checksum.
pub(super) fn read(path: &Path, max_bytes: u64) -> Result<Vec<u8>, StoreError> {
    let (mut file, header, length) = open(path, max_bytes)?;
    let mut payload = vec![0; length as usize];
    let mut digest = [0; DIGEST_BYTES as usize];
    file.read_exact(&mut payload)
        .and_then(|()| file.read_exact(&mut digest))
        .map_err(at(path))?;
    let hash = Sha256::new().chain_update(header).chain_update(&payload);
    if hash.finalize().as_slice() != digest {
        let detail = "the checksum does not fit: the file is damaged".into();
        return Err(StoreError::Damaged {
            path: path.to_owned(),
            detail,
        });
    }
    Ok(payload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_as_written_and_every_damaged_byte_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file.bin");
        write(&path, &[b"one", b"", b"two"]).unwrap();
        assert_eq!(read(&path, 100).unwrap(), b"onetwo");
        assert!(read(&path, 5).is_err(), "longer than allowed");
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, bad).unwrap();
            assert!(read(&path, 100).is_err(), "byte {at}");
        }
        fs::write(&path, &good[..good.len() - 1]).unwrap();
        assert!(read(&path, 100).is_err(), "truncated");
    }
}
