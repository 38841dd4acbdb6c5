//! The form of every file that holds shares: sealed under this party's store key with AES-256-GCM,
//! in segments, so that a row is read without the rest of its file.
//!
//! ```text
//! magic 8 | version 4 | payload's length 8 | key's name 8 | salt 32 | segment | segment | ..
//! ```
//! Each file has a key of its own, HMAC-SHA256(store key, header): whatever is changed in the header
//! fails the first tag. A segment is 8 KiB of the payload (the last one less) and its 16-byte tag;
//! its nonce is its number and whether it is the last (STREAM: Hoang, Reyhanitabar, Rogaway, Vizár,
//! "Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance", CRYPTO 2015), so that
//! segments cannot be moved, left out or cut off.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::{hmac, rand};
use sha2::{Digest, Sha256};

use super::{StoreError, at, file};

const MAGIC: [u8; 8] = *b"TREFOIL\0";
/// Version of the store's files. 3: sealed.
const VERSION: u32 = 3;
const HEADER_BYTES: usize = 8 + 4 + 8 + KEY_NAME_BYTES + SALT_BYTES;
const KEY_NAME_BYTES: usize = 8;
const SALT_BYTES: usize = 32;
/// Payload bytes of a segment.
const SEGMENT: usize = 8 << 10;
const TAG: usize = 16;
/// Segments that are read or written at a time.
const BATCH: usize = 64;
const KEY_BYTES: usize = 32;
/// Folders of the home whose files are sealed.
const SEALED: [&str; 7] = [
    "datasets",
    "models",
    "uploads",
    "staging",
    "withdrawn",
    "checkpoints",
    "results",
];
/// The store key in the home.
const KEY_FILE: &str = "store.key";
/// The store key as a credential of the service manager, which goes before the one in the home.
const CREDENTIAL: &str = "trefoil-store-key";

/// What seals and opens this party's files.
pub(crate) struct Vault {
    key: hmac::Key,
    name: [u8; KEY_NAME_BYTES],
}

impl fmt::Debug for Vault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vault({})", trefoil_consortium::hex(&self.name))
    }
}

fn damaged(path: &Path, detail: impl Into<String>) -> StoreError {
    StoreError::Damaged {
        path: path.to_owned(),
        detail: detail.into(),
    }
}

impl Vault {
    /// The vault of a home: its key is the service manager's credential `trefoil-store-key`, else
    /// `store.key` in the home, which is made where the home holds nothing yet.
    ///
    /// # Errors
    /// The key is readable by others, has another length, or is missing where files need it.
    pub(crate) fn open(home: &Path) -> Result<Vault, StoreError> {
        let credential = std::env::var_os("CREDENTIALS_DIRECTORY")
            .map(|folder| PathBuf::from(folder).join(CREDENTIAL))
            .filter(|path| path.exists());
        let path = credential.unwrap_or_else(|| home.join(KEY_FILE));
        if !path.exists() {
            if let Some(holds) = SEALED.into_iter().find(|folder| {
                fs::read_dir(home.join(folder)).is_ok_and(|mut files| files.next().is_some())
            }) {
                return Err(damaged(
                    &path,
                    format!(
                        "the store's key is missing, without which nothing in {holds} can be read: put it back from a copy, or give this party a new home"
                    ),
                ));
            }
            let mut key = [0; KEY_BYTES];
            rand::fill(&mut key).map_err(|_| {
                StoreError::Refused("the system gives no random numbers for a key".into())
            })?;
            write_private(&path, |out| out.write_all(&key))?;
            file::sync_folder(home)?;
        }
        #[cfg(unix)]
        {
            let about = fs::metadata(&path).map_err(at(&path))?;
            let mode = std::os::unix::fs::MetadataExt::mode(&about) & 0o777;
            // A credential's folder is the service's own.
            if mode & 0o077 != 0 && path.starts_with(home) {
                return Err(damaged(
                    &path,
                    format!(
                        "mode {mode:03o} lets others read the store's key; run: chmod 600 {}",
                        path.display()
                    ),
                ));
            }
        }
        let key = fs::read(&path).map_err(at(&path))?;
        if key.len() != KEY_BYTES {
            let found = key.len();
            return Err(damaged(
                &path,
                format!("a store key has {KEY_BYTES} bytes, this file {found}"),
            ));
        }
        let mut name = [0; KEY_NAME_BYTES];
        let hash = Sha256::new().chain_update(b"trefoil store key\0");
        name.copy_from_slice(&hash.chain_update(&key).finalize()[..KEY_NAME_BYTES]);
        Ok(Vault {
            key: hmac::Key::new(hmac::HMAC_SHA256, &key),
            name,
        })
    }

    /// The key of the file with this header.
    fn file_key(&self, header: &[u8; HEADER_BYTES]) -> LessSafeKey {
        let key = hmac::sign(&self.key, header);
        let key = UnboundKey::new(&AES_256_GCM, key.as_ref());
        LessSafeKey::new(key.expect("HMAC-SHA256 is as long as a key of AES-256"))
    }

    fn record_key(&self, log: &[u8; 32]) -> LessSafeKey {
        let mut about = hmac::Context::with_key(&self.key);
        about.update(b"trefoil records v1\0");
        about.update(log);
        let key = UnboundKey::new(&AES_256_GCM, about.sign().as_ref());
        LessSafeKey::new(key.expect("HMAC-SHA256 is as long as a key of AES-256"))
    }

    /// Seals one record of a log that grows; the nonce is random and comes first. It opens at its
    /// `place` alone.
    pub(crate) fn seal_record(
        &self,
        log: &[u8; 32],
        place: &[u8],
        record: Vec<u8>,
    ) -> Result<Vec<u8>, StoreError> {
        let failed = |_| StoreError::Refused("a record cannot be sealed".into());
        let mut nonce = [0; NONCE_LEN];
        rand::fill(&mut nonce).map_err(failed)?;
        let mut sealed = record;
        let unique = Nonce::assume_unique_for_key(nonce);
        self.record_key(log)
            .seal_in_place_append_tag(unique, Aad::from(place), &mut sealed)
            .map_err(failed)?;
        Ok([&nonce[..], &sealed].concat())
    }

    /// Opens one record; `None` where it was changed, or sealed for another log or place.
    pub(crate) fn open_record(
        &self,
        log: &[u8; 32],
        place: &[u8],
        sealed: &[u8],
    ) -> Option<Vec<u8>> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_LEN>()?;
        let mut record = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let opened = self
            .record_key(log)
            .open_in_place(nonce, Aad::from(place), &mut record);
        let length = opened.ok()?.len();
        record.truncate(length);
        Some(record)
    }

    /// Writes a file whole: temporary name, flush, rename. Mode 0600.
    pub(crate) fn write(&self, path: &Path, payload: &[&[u8]]) -> Result<(), StoreError> {
        let temporary = path.with_extension("tmp");
        let written = self.write_new(&temporary, payload).and_then(|()| {
            fs::rename(&temporary, path).map_err(at(path))?;
            file::sync_folder(path.parent().unwrap_or(path))
        });
        // On a full disk every byte counts.
        written.inspect_err(|_| drop(fs::remove_file(&temporary)))
    }

    /// Writes and flushes a file under its own name, which must be one that nobody reads yet.
    pub(crate) fn write_new(&self, path: &Path, payload: &[&[u8]]) -> Result<(), StoreError> {
        let length: usize = payload.iter().map(|part| part.len()).sum();
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..20].copy_from_slice(&(length as u64).to_le_bytes());
        header[20..28].copy_from_slice(&self.name);
        rand::fill(&mut header[28..]).map_err(|_| {
            StoreError::Refused("the system gives no random numbers to seal a file".into())
        })?;
        let key = self.file_key(&header);
        let segments = segments(length as u64);
        write_private(path, |out| {
            out.write_all(&header)?;
            let mut bytes = payload.iter().flat_map(|part| part.chunks(SEGMENT));
            let (mut rest, mut segment) = (&[][..], Vec::with_capacity(SEGMENT));
            for number in 0..segments {
                let wanted = SEGMENT.min(length - number as usize * SEGMENT);
                segment.clear();
                while segment.len() < wanted {
                    if rest.is_empty() {
                        rest = bytes.next().unwrap_or_default();
                        continue;
                    }
                    let (part, after) = rest.split_at(rest.len().min(wanted - segment.len()));
                    segment.extend_from_slice(part);
                    rest = after;
                }
                let nonce = nonce(number, number + 1 == segments);
                let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut segment);
                let tag = tag.map_err(|_| std::io::Error::other("a segment cannot be sealed"))?;
                out.write_all(&segment)?;
                out.write_all(tag.as_ref())?;
            }
            Ok(())
        })
    }

    /// Opens a file and checks its form; of the payload nothing is read.
    pub(crate) fn open_file(&self, path: &Path, max_bytes: u64) -> Result<Sealed, StoreError> {
        let mut file = File::open(path).map_err(at(path))?;
        let total = file.metadata().map_err(at(path))?.len();
        let mut header = [0; HEADER_BYTES];
        if total < HEADER_BYTES as u64 {
            return Err(damaged(path, format!("damaged: {total} bytes are too few")));
        }
        file.read_exact(&mut header).map_err(at(path))?;
        let number = |range: std::ops::Range<usize>| {
            let bytes = header[range].iter().rev();
            bytes.fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        if header[..8] != MAGIC {
            return Err(damaged(path, "damaged: this is no file of a Trefoil store"));
        }
        let version = number(8..12);
        if version != u64::from(VERSION) {
            return Err(damaged(
                path,
                format!(
                    "store version {version}, this software reads {VERSION}: run the release that \
                     wrote this home, or give this one a new home"
                ),
            ));
        }
        if header[20..28] != self.name {
            return Err(damaged(
                path,
                format!(
                    "sealed with the store key {}, this party's is {}: put the right key back",
                    trefoil_consortium::hex(&header[20..28]),
                    trefoil_consortium::hex(&self.name)
                ),
            ));
        }
        let length = number(12..20);
        let sealed = segments(length)
            .checked_mul(TAG as u64)
            .and_then(|tags| tags.checked_add(length)?.checked_add(HEADER_BYTES as u64));
        if sealed != Some(total) || length > max_bytes {
            return Err(damaged(
                path,
                format!("damaged: a payload of {length} bytes in a file of {total}"),
            ));
        }
        Ok(Sealed {
            key: self.file_key(&header),
            path: path.to_owned(),
            file,
            length,
            scratch: Vec::new(),
        })
    }

    /// Reads a file's whole payload.
    pub(crate) fn read(&self, path: &Path, max_bytes: u64) -> Result<Vec<u8>, StoreError> {
        let mut sealed = self.open_file(path, max_bytes)?;
        let mut payload = vec![0; sealed.length as usize];
        sealed.read_at(0, &mut payload)?;
        Ok(payload)
    }
}

/// Writes and flushes a file that only this user may read.
fn write_private(
    path: &Path,
    content: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
) -> Result<(), StoreError> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.open(path).map_err(at(path))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    content(&mut out).map_err(at(path))?;
    let file = out.into_inner().map_err(|err| at(path)(err.into_error()))?;
    file.sync_all().map_err(at(path))
}

/// Segments of a payload; an empty one has one, so that its header is checked too.
fn segments(length: u64) -> u64 {
    length.div_ceil(SEGMENT as u64).max(1)
}

fn nonce(segment: u64, last: bool) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[..8].copy_from_slice(&segment.to_le_bytes());
    nonce[NONCE_LEN - 1] = u8::from(last);
    Nonce::assume_unique_for_key(nonce)
}

/// An open file.
pub(crate) struct Sealed {
    key: LessSafeKey,
    path: PathBuf,
    file: File,
    length: u64,
    scratch: Vec<u8>,
}

impl fmt::Debug for Sealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sealed({}, {} bytes)", self.path.display(), self.length)
    }
}

impl Sealed {
    /// Bytes of the payload.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Reads the payload from `offset` on, as much as `out` takes.
    ///
    /// # Errors
    /// The file system's; a segment that was changed; a range that goes beyond the end.
    pub(crate) fn read_at(&mut self, offset: u64, out: &mut [u8]) -> Result<(), StoreError> {
        let end = offset.checked_add(out.len() as u64);
        if end.is_none_or(|end| end > self.length) {
            let detail = format!("bytes {offset} and on go beyond its {}", self.length);
            return Err(damaged(&self.path, detail));
        }
        let count = segments(self.length);
        let last = match out.is_empty() {
            true => offset / SEGMENT as u64,
            false => (offset + out.len() as u64 - 1) / SEGMENT as u64,
        };
        let mut segment = (offset / SEGMENT as u64).min(count - 1);
        let mut skip = (offset - segment * SEGMENT as u64) as usize;
        let mut done = 0;
        while segment <= last.min(count - 1) {
            let batch = (last.min(count - 1) + 1 - segment).min(BATCH as u64);
            let from = segment * SEGMENT as u64;
            let plain = (batch * SEGMENT as u64).min(self.length - from) as usize;
            self.scratch.resize(plain + batch as usize * TAG, 0);
            let place = HEADER_BYTES as u64 + segment * (SEGMENT + TAG) as u64;
            self.file
                .seek(SeekFrom::Start(place))
                .and_then(|_| self.file.read_exact(&mut self.scratch))
                .map_err(at(&self.path))?;
            for sealed in self.scratch.chunks_mut(SEGMENT + TAG) {
                let nonce = nonce(segment, segment + 1 == count);
                let Ok(plain) = self.key.open_in_place(nonce, Aad::empty(), sealed) else {
                    let detail = "damaged: it was changed since this party wrote it";
                    return Err(damaged(&self.path, detail));
                };
                let part = &plain[skip.min(plain.len())..];
                let part = &part[..part.len().min(out.len() - done)];
                out[done..done + part.len()].copy_from_slice(part);
                done += part.len();
                (skip, segment) = (0, segment + 1);
            }
        }
        Ok(())
    }

    /// SHA-256 of the payload.
    pub(crate) fn digest(&mut self) -> Result<[u8; 32], StoreError> {
        let mut hash = Sha256::new();
        let mut buffer = vec![0; BATCH * SEGMENT];
        let mut offset = 0;
        while offset < self.length {
            let part = (self.length - offset).min(buffer.len() as u64) as usize;
            self.read_at(offset, &mut buffer[..part])?;
            hash.update(&buffer[..part]);
            offset += part as u64;
        }
        Ok(hash.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vault() -> (tempfile::TempDir, Vault) {
        let home = tempfile::tempdir().unwrap();
        let vault = Vault::open(home.path()).unwrap();
        (home, vault)
    }

    #[test]
    fn a_file_is_read_as_written_and_every_damaged_byte_is_found() {
        let (home, vault) = vault();
        let path = home.path().join("file.bin");
        vault.write(&path, &[b"one", b"", b"two"]).unwrap();
        assert_eq!(vault.read(&path, 100).unwrap(), b"onetwo");
        assert!(vault.read(&path, 5).is_err(), "longer than allowed");
        let good = fs::read(&path).unwrap();
        assert!(
            !good.windows(3).any(|bytes| bytes == b"one"),
            "in the clear"
        );
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, bad).unwrap();
            assert!(vault.read(&path, 100).is_err(), "byte {at}");
        }
        for length in 0..good.len() {
            fs::write(&path, &good[..length]).unwrap();
            assert!(vault.read(&path, 100).is_err(), "cut to {length}");
        }
        vault.write(&path, &[]).unwrap();
        assert_eq!(vault.read(&path, 0).unwrap(), b"");
    }

    #[test]
    fn any_part_of_a_long_file_is_read_and_segments_stay_in_their_places() {
        let (home, vault) = vault();
        let path = home.path().join("file.bin");
        for length in [SEGMENT - 1, SEGMENT, SEGMENT + 1, (BATCH + 2) * SEGMENT + 5] {
            let payload: Vec<u8> = (0..length).map(|at| (at * 31 + at / 251) as u8).collect();
            let (a, b) = payload.split_at(length / 3);
            vault.write(&path, &[a, b]).unwrap();
            assert_eq!(vault.read(&path, u64::MAX).unwrap(), payload);
            let mut file = vault.open_file(&path, u64::MAX).unwrap();
            let hash: [u8; 32] = Sha256::digest(&payload).into();
            assert_eq!(file.digest().unwrap(), hash);
            for offset in (0..length).step_by(length / 40) {
                for len in [0, 1, 784, SEGMENT, length] {
                    let end = (offset + len).min(length);
                    let mut out = vec![0; end - offset];
                    file.read_at(offset as u64, &mut out).unwrap();
                    assert_eq!(out, payload[offset..end], "{offset}..{end} of {length}");
                }
            }
            let beyond = file.read_at(length as u64 - 1, &mut [0; 2]);
            assert!(beyond.is_err());
        }
        // Two whole segments changed places; both have valid tags for the other's number.
        let mut bytes = fs::read(&path).unwrap();
        let (first, second) = bytes[HEADER_BYTES..].split_at_mut(SEGMENT + TAG);
        first.swap_with_slice(&mut second[..SEGMENT + TAG]);
        fs::write(&path, bytes).unwrap();
        assert!(vault.read(&path, u64::MAX).is_err());
    }

    #[test]
    fn the_key_is_kept_private_and_missed_where_files_need_it() {
        let (home, vault) = vault();
        let key = home.path().join(KEY_FILE);
        let path = home.path().join("file.bin");
        vault.write(&path, &[b"share"]).unwrap();
        let again = Vault::open(home.path()).unwrap();
        assert_eq!(again.read(&path, 100).unwrap(), b"share");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = |mode| fs::set_permissions(&key, fs::Permissions::from_mode(mode)).unwrap();
            mode(0o640);
            let err = Vault::open(home.path()).unwrap_err().to_string();
            assert!(err.contains("chmod 600"), "{err}");
            mode(0o600);
        }
        fs::remove_file(&key).unwrap();
        let other = Vault::open(home.path()).unwrap();
        let err = other.read(&path, 100).unwrap_err().to_string();
        assert!(err.contains("put the right key back"), "{err}");
        fs::remove_file(&key).unwrap();
        fs::create_dir_all(home.path().join("datasets/digits")).unwrap();
        let err = Vault::open(home.path()).unwrap_err().to_string();
        assert!(err.contains("missing"), "{err}");
        fs::write(&key, b"short").unwrap();
        assert!(Vault::open(home.path()).is_err());
    }
}
