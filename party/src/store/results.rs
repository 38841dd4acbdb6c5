//! What a job has revealed so far: this party's output shares, for the job's requester alone, so
//! that a party that was started again can still send them.
//!
//! `home/results/JOB.log`: a header, then one sealed record after the other, each with its length and
//! the SHA-256 of the one before it and of itself. A record is sealed for its job and for what comes
//! before it: elsewhere it does not open. A write that was cut short is a torn end. A session
//! that takes a job up at a checkpoint cuts the log back to where it was then: what is left is of
//! one line of attempts, the same at all three parties.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use trefoil_consortium::wire::{EVENT_MAX_BYTES, WireOutput};
use trefoil_consortium::{JobId, NodeStats};

use super::{Lease, Store, StoreError, Vault, at, file};

const MAGIC: [u8; 8] = *b"TREFRES\0";
const VERSION: u32 = 2;
/// Records of this version are bound to their job and to no place in it; such a log is gone on with.
const UNPLACED_VERSION: u32 = 1;
/// Magic, version, job.
const HEADER_BYTES: u64 = 8 + 4 + 32;
const DIGEST_BYTES: usize = 32;
const EXTENSION: &str = "log";

/// One record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Stored {
    /// An output's share.
    Output {
        /// The attempt that it is of.
        attempt: u32,
        /// The step that revealed it.
        step: u64,
        /// The share.
        share: WireOutput,
    },
    /// The job is done.
    Done {
        /// What this party counted.
        stats: NodeStats,
        /// At P0: what the dealer counted.
        dealer: Option<NodeStats>,
    },
}

/// The results of a job that runs.
#[derive(Debug)]
pub(crate) struct Results {
    vault: Arc<Vault>,
    lease: Lease,
    job: JobId,
    path: PathBuf,
    file: File,
    version: u32,
    digest: [u8; DIGEST_BYTES],
    bytes: u64,
}

fn header(job: JobId, version: u32) -> Vec<u8> {
    [&MAGIC[..], &version.to_le_bytes(), &job.0].concat()
}

/// What a record is bound to beside its job: all that comes before it.
fn place(version: u32, before: &[u8; DIGEST_BYTES]) -> &[u8] {
    match version {
        UNPLACED_VERSION => &[],
        _ => before,
    }
}

fn chain(previous: &[u8; DIGEST_BYTES], payload: &[u8]) -> [u8; DIGEST_BYTES] {
    let hash = Sha256::new().chain_update(previous).chain_update(payload);
    hash.finalize().into()
}

/// The whole records at the beginning of a log.
struct Whole {
    version: u32,
    records: Vec<Stored>,
    bytes: u64,
    digest: [u8; DIGEST_BYTES],
    /// Bytes after them.
    left: u64,
}

/// Reads whole records, at most up to `limit` bytes of the log.
fn read(path: &Path, job: JobId, limit: u64, vault: &Vault) -> Result<Option<Whole>, StoreError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(err) => return Err(at(path)(err)),
    };
    let total = file.metadata().map_err(at(path))?.len();
    let mut reader = BufReader::new(file);
    let mut found = vec![0; HEADER_BYTES as usize];
    if total < HEADER_BYTES {
        return Ok(None);
    }
    reader.read_exact(&mut found).map_err(at(path))?;
    let mut versions = [VERSION, UNPLACED_VERSION].into_iter();
    let Some(version) = versions.find(|version| found == header(job, *version)) else {
        return Err(StoreError::Damaged {
            path: path.to_owned(),
            detail: format!("these are no results of job {job} in version {VERSION}"),
        });
    };
    let mut out = Whole {
        version,
        records: Vec::new(),
        bytes: HEADER_BYTES,
        digest: Sha256::digest(&found).into(),
        left: 0,
    };
    while out.bytes < limit.min(total) {
        let mut length = [0; 8];
        let room = total - out.bytes;
        if room < 8 || reader.read_exact(&mut length).is_err() {
            break;
        }
        let length = u64::from_le_bytes(length);
        let whole = length.saturating_add(8 + DIGEST_BYTES as u64);
        if whole > room || length > EVENT_MAX_BYTES as u64 {
            break;
        }
        let mut payload = vec![0; length as usize];
        let mut digest = [0; DIGEST_BYTES];
        reader
            .read_exact(&mut payload)
            .and_then(|()| reader.read_exact(&mut digest))
            .map_err(at(path))?;
        if chain(&out.digest, &payload) != digest {
            break;
        }
        let record = vault.open_record(&job.0, place(version, &out.digest), &payload);
        match record.and_then(|record| postcard::from_bytes(&record).ok()) {
            Some(record) => out.records.push(record),
            None => break,
        }
        out.bytes += whole;
        out.digest = digest;
    }
    out.left = total - out.bytes;
    Ok(Some(out))
}

impl Results {
    /// Adds records; they are on the disk when it returns.
    pub(crate) fn append(&mut self, records: &[Stored]) -> Result<(), StoreError> {
        let _newest = self.lease.hold()?;
        let mut bytes = Vec::new();
        let mut digest = self.digest;
        for record in records {
            let payload =
                postcard::to_stdvec(record).map_err(|err| StoreError::Refused(err.to_string()))?;
            let place = place(self.version, &digest);
            let payload = self.vault.seal_record(&self.job.0, place, payload)?;
            digest = chain(&digest, &payload);
            bytes.extend_from_slice(&(payload.len() as u64).to_le_bytes());
            bytes.extend_from_slice(&payload);
            bytes.extend_from_slice(&digest);
        }
        let written = self
            .file
            .write_all(&bytes)
            .and_then(|()| self.file.sync_data());
        if let Err(err) = written {
            // No half of a record stays; where even that fails it is a torn end.
            let _ = self.file.set_len(self.bytes);
            let _ = self.file.seek(SeekFrom::Start(self.bytes));
            return Err(at(&self.path)(err));
        }
        self.digest = digest;
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Length of the log.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Store {
    fn results_path(&self, job: JobId) -> PathBuf {
        let name = format!("{job}.{EXTENSION}");
        self.home.join("results").join(name)
    }

    /// Length of the part of a job's results that can be read.
    pub(super) fn results_bytes(&self, job: JobId) -> Result<u64, StoreError> {
        let path = self.results_path(job);
        match read(&path, job, u64::MAX, &self.vault) {
            Ok(found) => Ok(found.map_or(0, |found| found.bytes)),
            Err(err @ StoreError::Damaged { .. }) => {
                tracing::error!(%err, "results cannot be read");
                Ok(0)
            }
            Err(err) => Err(err),
        }
    }

    /// Begins a job's results, or goes on with the first `bytes` of them. What comes after is
    /// removed: it was revealed again, or will be.
    pub(crate) fn open_results(
        &self,
        lease: &Lease,
        job: JobId,
        bytes: u64,
    ) -> Result<Results, StoreError> {
        let _newest = lease.hold()?;
        let path = self.results_path(job);
        let known = match bytes {
            0 => None,
            _ => read(&path, job, bytes, &self.vault)?,
        };
        let (version, bytes, digest) = match known {
            Some(known) if known.bytes == bytes => (known.version, known.bytes, known.digest),
            _ if bytes > 0 => {
                return Err(StoreError::Damaged {
                    path,
                    detail: format!("less than the {bytes} bytes of results can be read"),
                });
            }
            _ => {
                let header = header(job, VERSION);
                let new = path.with_extension("tmp");
                fs::write(&new, &header).map_err(at(&new))?;
                fs::rename(&new, &path).map_err(at(&path))?;
                file::sync_folder(path.parent().unwrap_or(&path))?;
                (VERSION, HEADER_BYTES, Sha256::digest(&header).into())
            }
        };
        let mut options = OpenOptions::new();
        options.write(true);
        let mut file = options.open(&path).map_err(at(&path))?;
        #[cfg(unix)]
        {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            file.set_permissions(mode).map_err(at(&path))?;
        }
        file.set_len(bytes)
            .and_then(|()| file.sync_all())
            .and_then(|()| file.seek(SeekFrom::Start(bytes)).map(drop))
            .map_err(at(&path))?;
        Ok(Results {
            vault: self.vault.clone(),
            lease: lease.clone(),
            job,
            path,
            file,
            version,
            digest,
            bytes,
        })
    }

    /// A job's results; a torn or damaged end is left out, and logged.
    pub(crate) fn results(&self, job: JobId) -> Result<Vec<Stored>, StoreError> {
        let path = self.results_path(job);
        let Some(found) = read(&path, job, u64::MAX, &self.vault)? else {
            return Ok(Vec::new());
        };
        if found.left > 0 {
            tracing::warn!(path = %path.display(), bytes = found.left, "the end of a job's results cannot be read");
        }
        Ok(found.records)
    }

    /// Removes a job's results.
    pub(crate) fn forget_results(&self, job: JobId) -> Result<(), StoreError> {
        let path = self.results_path(job);
        match fs::remove_file(&path) {
            Err(err) if err.kind() != std::io::ErrorKind::NotFound => Err(at(&path)(err)),
            _ => Ok(()),
        }
    }

    /// At start-up: removes results of jobs that nobody asks for any more.
    pub(crate) fn sweep_results(&self, wanted: &BTreeSet<JobId>) -> Result<(), StoreError> {
        for path in file::list(&self.home.join("results"))? {
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            let whole = path.extension().is_some_and(|ext| ext == EXTENSION);
            if !whole || !wanted.iter().any(|job| job.to_string() == stem) {
                tracing::info!(path = %path.display(), "removed results of an earlier job");
                fs::remove_file(&path).map_err(at(&path))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use trefoil_consortium::Words;

    use super::*;

    const JOB: JobId = JobId([3; 32]);

    fn output(step: u64, attempt: u32) -> Stored {
        let share = WireOutput {
            name: "confusion".into(),
            shape: vec![2],
            words: Words(vec![step, 7]),
            xor: false,
            opened: [1; 16],
        };
        Stored::Output {
            attempt,
            step,
            share,
        }
    }

    #[test]
    fn results_are_cut_back_to_a_checkpoint_and_read_after_a_restart() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let mut log = store.open_results(&store.lease(JOB), JOB, 0).unwrap();
        log.append(&[output(4, 0), output(5, 0)]).unwrap();
        let mark = log.bytes();
        log.append(&[output(9, 0)]).unwrap();
        drop(log);
        let store = Store::open(home.path()).unwrap();
        let mut log = store.open_results(&store.lease(JOB), JOB, mark).unwrap();
        log.append(&[output(9, 1)]).unwrap();
        let bytes = fs::read(store.results_path(JOB)).unwrap();
        let name = b"confusion";
        assert!(
            !bytes.windows(name.len()).any(|bytes| bytes == name),
            "sealed"
        );
        let all = store.results(JOB).unwrap();
        assert_eq!(all, [output(4, 0), output(5, 0), output(9, 1)]);
        assert!(
            store
                .open_results(&store.lease(JOB), JOB, mark + 1)
                .is_err()
        );
        drop(store.open_results(&store.lease(JOB), JOB, 0).unwrap());
        assert_eq!(store.results(JOB).unwrap(), [], "begun anew");
        store.forget_results(JOB).unwrap();
        assert_eq!(store.results(JOB).unwrap(), []);
    }

    #[test]
    fn a_damaged_or_torn_log_gives_only_what_is_whole() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let mut log = store.open_results(&store.lease(JOB), JOB, 0).unwrap();
        log.append(&[output(4, 0)]).unwrap();
        let first = log.bytes();
        log.append(&[output(5, 0)]).unwrap();
        let path = store.results_path(JOB);
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            let read = store.results_bytes(JOB).unwrap();
            let at = at as u64;
            let whole = match at {
                _ if at < HEADER_BYTES => 0,
                _ if at < first => HEADER_BYTES,
                _ => first,
            };
            assert_eq!(read, whole, "byte {at}");
            // A checkpoint that needs more is not taken up, with an error.
            assert!(
                store
                    .open_results(&store.lease(JOB), JOB, good.len() as u64)
                    .is_err()
            );
        }
        for len in 0..good.len() {
            fs::write(&path, &good[..len]).unwrap();
            assert!(store.results_bytes(JOB).unwrap() < good.len() as u64);
        }
        fs::write(&path, &good).unwrap();
        assert_eq!(store.results(JOB).unwrap(), [output(4, 0), output(5, 0)]);
    }

    /// Puts records into a log with lengths and a chain that fit, as whoever can write the file may.
    fn forge(job: JobId, version: u32, sealed: &[&[u8]]) -> Vec<u8> {
        let mut bytes = header(job, version);
        let mut digest: [u8; DIGEST_BYTES] = Sha256::digest(&bytes).into();
        for sealed in sealed {
            digest = chain(&digest, sealed);
            bytes.extend_from_slice(&(sealed.len() as u64).to_le_bytes());
            bytes.extend_from_slice(sealed);
            bytes.extend_from_slice(&digest);
        }
        bytes
    }

    #[test]
    fn a_record_of_another_place_or_job_is_not_taken_and_a_log_of_the_version_before_is() {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        let other = JobId([4; 32]);
        let sealed = |job| {
            let mut log = store.open_results(&store.lease(job), job, 0).unwrap();
            log.append(&[output(4, 0)]).unwrap();
            let first = log.bytes() as usize;
            log.append(&[output(5, 0)]).unwrap();
            let bytes = fs::read(store.results_path(job)).unwrap();
            let record = |from: usize, to: usize| bytes[from + 8..to - DIGEST_BYTES].to_vec();
            [
                record(HEADER_BYTES as usize, first),
                record(first, bytes.len()),
            ]
        };
        let (foreign, own) = (sealed(other), sealed(JOB));
        let read = |records: &[&[u8]]| {
            fs::write(store.results_path(JOB), forge(JOB, VERSION, records)).unwrap();
            assert_eq!(
                store.results_bytes(JOB).unwrap() > HEADER_BYTES,
                !store.results(JOB).unwrap().is_empty()
            );
            store.results(JOB).unwrap()
        };
        assert_eq!(
            read(&[&own[0], &own[1]]),
            [output(4, 0), output(5, 0)],
            "as written"
        );
        assert_eq!(read(&[&own[1], &own[0]]), [], "another order");
        assert_eq!(read(&[&own[1]]), [], "the first is left out");
        assert_eq!(read(&[&own[0], &own[0]]), [output(4, 0)], "one twice");
        assert_eq!(read(&[&foreign[0]]), [], "of another job");
        let unplaced = postcard::to_stdvec(&output(4, 0)).unwrap();
        let unplaced = store.vault.seal_record(&JOB.0, &[], unplaced).unwrap();
        let old = forge(JOB, UNPLACED_VERSION, &[&unplaced]);
        fs::write(store.results_path(JOB), &old).unwrap();
        let mut log = store
            .open_results(&store.lease(JOB), JOB, old.len() as u64)
            .unwrap();
        log.append(&[output(5, 1)]).unwrap();
        assert_eq!(store.results(JOB).unwrap(), [output(4, 0), output(5, 1)]);
    }
}
