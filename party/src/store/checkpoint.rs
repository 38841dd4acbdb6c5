//! Checkpoints: this party's shares of a job's carried state after some steps, refreshed by a
//! sharing of zero. Shares and nothing else: an opening, a mask or a key never lies on a disk.
//!
//! ```text
//! home/checkpoints/JOB/STEP.state      written whole or not at all, sealed (`vault.rs`)
//! home/checkpoints/JOB/STEP.damaged    set aside: it could not be read
//! ```
//! Kept are the newest that all three parties are known to have, and the two newest. The one after
//! the last step is what a job leaves: its model is made from it.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use trefoil_consortium::{JobId, Mark, NodeStats};
use trefoil_protocol::ring::Tensor;

use super::tensors::Tensors;
use super::{Lease, Store, StoreError, Vault, at, file};

/// Version of the content; the store's file form has its own.
const CHECKPOINT_VERSION: u32 = 2;
/// Largest file: weights and velocities of a large network.
const CHECKPOINT_MAX_BYTES: u64 = 32 << 30;
const KIND: [u8; 8] = *b"chkpoint";
const EXTENSION: &str = "state";

/// One checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Checkpoint {
    pub(crate) job: JobId,
    /// Hash of the job's programs.
    pub(crate) programs: [u8; 32],
    pub(crate) mark: Mark,
    /// Length of the job's results so far.
    pub(crate) results_bytes: u64,
    /// After the last step: what this party counted.
    pub(crate) stats: Option<NodeStats>,
    /// What the parties have opened for an early stop so far.
    pub(crate) validated: Vec<u64>,
    pub(crate) shares: BTreeMap<String, Tensor>,
}

#[derive(Serialize, Deserialize)]
struct Record {
    kind: [u8; 8],
    version: u32,
    job: JobId,
    programs: [u8; 32],
    mark: Mark,
    results_bytes: u64,
    stats: Option<NodeStats>,
    validated: Vec<u64>,
    tensors: Tensors,
}

/// What is known of the checkpoints on the disk.
#[derive(Debug, Default)]
pub(crate) struct Checkpoints(Mutex<BTreeMap<JobId, Known>>);

#[derive(Debug, Default)]
struct Known {
    /// Those that can be read, with the length of the results that belongs to each.
    marks: BTreeMap<Mark, u64>,
    /// The newest that all parties have.
    confirmed: Option<Mark>,
}

impl Checkpoints {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<JobId, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    fn checkpoint_folder(&self, job: JobId) -> PathBuf {
        self.home.join("checkpoints").join(job.to_string())
    }

    fn checkpoint_path(&self, job: JobId, step: u64) -> PathBuf {
        let name = format!("{step:012}.{EXTENSION}");
        self.checkpoint_folder(job).join(name)
    }

    /// Writes a checkpoint, and removes those that it makes needless. On an error nothing is left
    /// of it, and the older ones stay.
    pub(crate) fn write_checkpoint(
        &self,
        lease: &Lease,
        checkpoint: Checkpoint,
    ) -> Result<(), StoreError> {
        let _newest = lease.hold()?;
        let Checkpoint {
            job,
            mark,
            results_bytes,
            ..
        } = checkpoint;
        let record = Record {
            kind: KIND,
            version: CHECKPOINT_VERSION,
            job,
            programs: checkpoint.programs,
            mark,
            results_bytes,
            stats: checkpoint.stats,
            validated: checkpoint.validated,
            tensors: Tensors::of(checkpoint.shares),
        };
        let bytes =
            postcard::to_stdvec(&record).map_err(|err| StoreError::Refused(err.to_string()))?;
        drop(record);
        file::make_folder(&self.checkpoint_folder(job))?;
        let path = self.checkpoint_path(job, mark.step);
        let written = self.vault.write(&path, &[&bytes]);
        let mut known = self.checkpoints.lock();
        let known = known.entry(job).or_default();
        // What lay under this name is of another session, whether the writing succeeded or not.
        known.marks.retain(|old, _| old.step != mark.step);
        if let Err(err) = written {
            let temporary = path.with_extension("tmp");
            if let Err(left) = remove(&temporary) {
                tracing::warn!(%left, "a checkpoint that could not be written is left over");
            }
            // The rename may have failed, or what follows it.
            let _ = remove(&path);
            return Err(err);
        }
        known.marks.insert(mark, results_bytes);
        let kept: BTreeSet<Mark> = known
            .marks
            .keys()
            .rev()
            .take(2)
            .copied()
            .chain(known.confirmed)
            .collect();
        self.remove_marks(job, known, |old| kept.contains(old))
    }

    /// All three parties have a checkpoint: older ones go.
    pub(crate) fn confirm_checkpoint(&self, job: JobId, mark: Mark) -> Result<(), StoreError> {
        let mut known = self.checkpoints.lock();
        let Some(known) = known.get_mut(&job) else {
            return Ok(());
        };
        if !known.marks.contains_key(&mark) {
            return Ok(());
        }
        known.confirmed = Some(mark);
        self.remove_marks(job, known, |old| *old >= mark)
    }

    /// A session takes the job up at a checkpoint, or begins anew: what earlier ones wrote down beyond
    /// it is of no use any more.
    pub(crate) fn abandon_checkpoints(
        &self,
        lease: &Lease,
        job: JobId,
        resume: Option<Mark>,
    ) -> Result<(), StoreError> {
        let _newest = lease.hold()?;
        // What lies there without having been looked at counts too.
        self.marks(job)?;
        let mut known = self.checkpoints.lock();
        let known = known.entry(job).or_default();
        known.confirmed = resume;
        self.remove_marks(job, known, |old| {
            resume.is_some_and(|mark| *old == mark || old.step < mark.step)
        })
    }

    fn remove_marks(
        &self,
        job: JobId,
        known: &mut Known,
        keep: impl Fn(&Mark) -> bool,
    ) -> Result<(), StoreError> {
        let old: Vec<Mark> = known
            .marks
            .keys()
            .filter(|mark| !keep(mark))
            .copied()
            .collect();
        for mark in old {
            known.marks.remove(&mark);
            remove(&self.checkpoint_path(job, mark.step))?;
        }
        Ok(())
    }

    /// The checkpoints of a job that can be taken up here: readable, with the results that were
    /// revealed before them. Reads all of them the first time.
    pub(crate) fn marks(&self, job: JobId) -> Result<Vec<Mark>, StoreError> {
        let mut all = self.checkpoints.lock();
        let known = match all.entry(job) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(self.read_known(job)?),
        };
        let marks = known.marks.clone();
        drop(all);
        if marks.is_empty() {
            return Ok(Vec::new());
        }
        let results_bytes = self.results_bytes(job)?;
        let whole = marks
            .into_iter()
            .filter(|(_, needed)| *needed <= results_bytes);
        Ok(whole.map(|(mark, _)| mark).collect())
    }

    fn read_known(&self, job: JobId) -> Result<Known, StoreError> {
        let mut known = Known::default();
        let folder = self.checkpoint_folder(job);
        let paths = match folder.is_dir() {
            true => file::list(&folder)?,
            false => Vec::new(),
        };
        for path in paths {
            let state = path.extension().is_some_and(|ext| ext == EXTENSION);
            if state && let Some(found) = self.read_or_set_aside(job, &path)? {
                known.marks.insert(found.mark, found.results_bytes);
            }
        }
        Ok(known)
    }

    /// Reads the checkpoint of a mark for programs with this hash.
    ///
    /// # Errors
    /// It is not there, damaged (then it is not offered again), or of other programs.
    pub(crate) fn checkpoint(
        &self,
        job: JobId,
        mark: Mark,
        programs: [u8; 32],
    ) -> Result<Checkpoint, StoreError> {
        let path = self.checkpoint_path(job, mark.step);
        let found = self.read_or_set_aside(job, &path)?;
        let found = found.filter(|found| found.mark == mark);
        let Some(found) = found else {
            self.forget_mark(job, mark);
            return Err(StoreError::Refused(format!(
                "{}: there is no readable checkpoint of this session any more",
                path.display()
            )));
        };
        if found.programs != programs {
            self.forget_mark(job, mark);
            return Err(StoreError::Refused(format!(
                "{}: the checkpoint is of other programs than this software makes of the job",
                path.display()
            )));
        }
        Ok(found)
    }

    fn forget_mark(&self, job: JobId, mark: Mark) {
        if let Some(known) = self.checkpoints.lock().get_mut(&job) {
            known.marks.remove(&mark);
        }
    }

    /// Reads a checkpoint's file. One that cannot be read is logged and set aside.
    fn read_or_set_aside(&self, job: JobId, path: &Path) -> Result<Option<Checkpoint>, StoreError> {
        match read(&self.vault, job, path) {
            Ok(found) => Ok(Some(found)),
            Err(StoreError::File { source, .. })
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                Ok(None)
            }
            Err(err) => {
                tracing::error!(%err, "a checkpoint cannot be read and is not used; an older one is, if there is one");
                std::fs::rename(path, path.with_extension("damaged")).map_err(at(path))?;
                Ok(None)
            }
        }
    }

    /// Removes what a job that is over has left.
    pub(crate) fn forget_checkpoints(&self, job: JobId) -> Result<(), StoreError> {
        self.end_leases(job);
        self.checkpoints.lock().remove(&job);
        let folder = self.checkpoint_folder(job);
        match folder.is_dir() {
            true => std::fs::remove_dir_all(&folder).map_err(at(&folder)),
            false => Ok(()),
        }
    }

    /// At start-up: removes checkpoints of jobs that will not go on, and files that were not
    /// written to their end.
    pub(crate) fn sweep_checkpoints(&self, going_on: &BTreeSet<JobId>) -> Result<(), StoreError> {
        let root = self.home.join("checkpoints");
        for folder in file::list(&root)? {
            let name = folder.file_name().unwrap_or_default().to_string_lossy();
            if !going_on.iter().any(|job| job.to_string() == name) {
                tracing::info!(path = %folder.display(), "removed checkpoints of a job that is over");
                std::fs::remove_dir_all(&folder).map_err(at(&folder))?;
                continue;
            }
            for path in file::list(&folder)? {
                if path.extension().is_some_and(|extension| extension == "tmp") {
                    tracing::info!(path = %path.display(), "removed an unfinished checkpoint");
                    remove(&path)?;
                }
            }
        }
        Ok(())
    }
}

/// Removes a file that may be gone.
fn remove(path: &Path) -> Result<(), StoreError> {
    match std::fs::remove_file(path) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => Err(at(path)(err)),
        _ => Ok(()),
    }
}

fn read(vault: &Vault, job: JobId, path: &Path) -> Result<Checkpoint, StoreError> {
    let bytes = vault.read(path, CHECKPOINT_MAX_BYTES)?;
    let damaged = |detail: String| StoreError::Damaged {
        path: path.to_owned(),
        detail,
    };
    let record: Record = match postcard::take_from_bytes(&bytes) {
        Ok((record, [])) => record,
        Ok(_) => return Err(damaged("bytes after its end".into())),
        Err(err) => return Err(damaged(format!("this is no checkpoint: {err}"))),
    };
    if record.kind != KIND || record.version != CHECKPOINT_VERSION {
        return Err(damaged(format!(
            "no checkpoint of version {CHECKPOINT_VERSION}: it has version {}",
            record.version
        )));
    }
    let named = format!("{:012}.{EXTENSION}", record.mark.step);
    if record.job != job || path.file_name().is_none_or(|name| *name != *named) {
        return Err(damaged(format!(
            "holds step {} of job {}",
            record.mark.step, record.job
        )));
    }
    let broken = |(name, words)| damaged(format!("{name} has {words} words"));
    let shares = record.tensors.shares().map_err(broken)?;
    Ok(Checkpoint {
        job: record.job,
        programs: record.programs,
        mark: record.mark,
        results_bytes: record.results_bytes,
        stats: record.stats,
        validated: record.validated,
        shares,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: JobId = JobId([9; 32]);

    fn checkpoint(step: u64) -> Checkpoint {
        let tensor = Tensor::new(vec![2, 3], (0..6).map(|word| word * 977 + step).collect());
        Checkpoint {
            job: JOB,
            programs: [4; 32],
            mark: Mark::of(&[1; 32], step),
            results_bytes: 0,
            stats: None,
            validated: vec![3, 4],
            shares: BTreeMap::from([("fc.weight".into(), tensor)]),
        }
    }

    fn steps(store: &Store) -> Vec<u64> {
        let marks = store.marks(JOB).unwrap();
        marks.iter().map(|mark| mark.step).collect()
    }

    fn write(store: &Store, checkpoint: Checkpoint) -> Result<(), StoreError> {
        store.write_checkpoint(&store.lease(JOB), checkpoint)
    }

    fn abandon(store: &Store, resume: Option<Mark>) -> Result<(), StoreError> {
        store.abandon_checkpoints(&store.lease(JOB), JOB, resume)
    }

    fn reopen(home: &tempfile::TempDir) -> Store {
        Store::open(home.path()).unwrap()
    }

    #[test]
    fn the_two_newest_are_kept_and_the_newest_that_all_have() {
        let home = tempfile::tempdir().unwrap();
        let store = reopen(&home);
        for step in [10, 20, 30] {
            write(&store, checkpoint(step)).unwrap();
        }
        assert_eq!(steps(&store), [20, 30]);
        store.confirm_checkpoint(JOB, checkpoint(20).mark).unwrap();
        for step in [40, 50, 60] {
            write(&store, checkpoint(step)).unwrap();
        }
        assert_eq!(steps(&store), [20, 50, 60], "others may have 20 alone");
        assert_eq!(steps(&reopen(&home)), [20, 50, 60]);
        store.confirm_checkpoint(JOB, checkpoint(60).mark).unwrap();
        assert_eq!(steps(&store), [60]);
        // A resumed session writes the same step anew.
        let mut other = checkpoint(60);
        other.mark = Mark::of(&[2; 32], 60);
        write(&store, other.clone()).unwrap();
        assert!(store.checkpoint(JOB, checkpoint(60).mark, [4; 32]).is_err());
        assert_eq!(steps(&reopen(&home)), [60]);
        let store = reopen(&home);
        let read = store.checkpoint(JOB, other.mark, [4; 32]).unwrap();
        assert_eq!(read, other);
        let err = store.checkpoint(JOB, other.mark, [5; 32]).unwrap_err();
        assert!(err.to_string().contains("other programs"), "{err}");
        store.forget_checkpoints(JOB).unwrap();
        assert!(steps(&reopen(&home)).is_empty());
    }

    #[test]
    fn what_was_written_beyond_the_point_of_resumption_gives_way() {
        let home = tempfile::tempdir().unwrap();
        let store = reopen(&home);
        for step in [10, 20, 30] {
            write(&store, checkpoint(step)).unwrap();
        }
        let store = reopen(&home);
        let resume = Some(checkpoint(20).mark);
        abandon(&store, resume).unwrap();
        assert_eq!(steps(&store), [20]);
        write(&store, checkpoint(25)).unwrap();
        assert_eq!(steps(&store), [20, 25]);
        abandon(&store, None).unwrap();
        write(&store, checkpoint(5)).unwrap();
        assert_eq!(steps(&store), [5]);
    }

    #[test]
    fn every_flipped_byte_and_every_cut_is_found_and_the_older_one_offered() {
        let home = tempfile::tempdir().unwrap();
        let store = reopen(&home);
        write(&store, checkpoint(10)).unwrap();
        write(&store, checkpoint(20)).unwrap();
        let path = store.checkpoint_path(JOB, 20);
        let good = std::fs::read(&path).unwrap();
        let check = |bytes: &[u8], what: &str| {
            std::fs::write(&path, bytes).unwrap();
            let store = reopen(&home);
            assert_eq!(steps(&store), [10], "{what}");
            assert!(path.with_extension("damaged").exists(), "{what}");
        };
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            check(&bad, &format!("byte {at}"));
        }
        for len in 0..good.len() {
            check(&good[..len], &format!("{len} bytes"));
        }
        // A whole file under another name, and another kind of file under this one.
        let older = std::fs::read(store.checkpoint_path(JOB, 10)).unwrap();
        check(&older, "step 10 in the place of step 20");
        store.vault.write(&path, &[b"a model"]).unwrap();
        assert_eq!(steps(&reopen(&home)), [10]);
        // One that is damaged after it was offered is refused when it is needed.
        std::fs::write(&path, &good).unwrap();
        let store = reopen(&home);
        assert_eq!(steps(&store), [10, 20]);
        std::fs::write(&path, &good[1..]).unwrap();
        assert!(store.checkpoint(JOB, checkpoint(20).mark, [4; 32]).is_err());
        assert_eq!(steps(&store), [10]);
    }

    #[test]
    fn a_checkpoint_that_cannot_be_written_leaves_nothing_and_the_older_ones() {
        let home = tempfile::tempdir().unwrap();
        let store = reopen(&home);
        write(&store, checkpoint(10)).unwrap();
        // A folder in the place of the temporary file: as if the disk were full.
        let blocked = store.checkpoint_path(JOB, 20).with_extension("tmp");
        std::fs::create_dir(&blocked).unwrap();
        let err = write(&store, checkpoint(20)).unwrap_err();
        assert!(err.to_string().contains("000000000020"), "{err}");
        assert_eq!(steps(&store), [10]);
        std::fs::remove_dir(&blocked).unwrap();
        assert_eq!(steps(&reopen(&home)), [10]);
        write(&store, checkpoint(30)).unwrap();
        assert_eq!(steps(&store), [10, 30]);
    }

    #[test]
    fn the_sweep_takes_jobs_that_are_over_and_unfinished_files() {
        let home = tempfile::tempdir().unwrap();
        let store = reopen(&home);
        write(&store, checkpoint(10)).unwrap();
        let half = store.checkpoint_path(JOB, 20).with_extension("tmp");
        std::fs::write(&half, b"half").unwrap();
        store.sweep_checkpoints(&BTreeSet::from([JOB])).unwrap();
        assert!(!half.exists());
        assert_eq!(steps(&store), [10]);
        store.sweep_checkpoints(&BTreeSet::new()).unwrap();
        assert!(steps(&reopen(&home)).is_empty());
    }

    #[test]
    fn a_session_that_was_aborted_writes_nothing_once_a_new_attempt_has_begun() {
        let home = tempfile::tempdir().unwrap();
        let store = reopen(&home);
        let old = store.lease(JOB);
        store.write_checkpoint(&old, checkpoint(10)).unwrap();
        let mut old_results = store.open_results(&old, JOB, 0).unwrap();
        let new = store.lease(JOB);
        let results = store.open_results(&new, JOB, 0).unwrap();
        let err = store.write_checkpoint(&old, checkpoint(20)).unwrap_err();
        assert!(err.to_string().contains("has ended"), "{err}");
        assert!(store.abandon_checkpoints(&old, JOB, None).is_err());
        assert!(store.open_results(&old, JOB, 0).is_err());
        assert!(old_results.append(&[]).is_err());
        assert_eq!(steps(&store), [10]);
        store.write_checkpoint(&new, checkpoint(30)).unwrap();
        assert_eq!(steps(&store), [10, 30]);
        drop(results);
        // Nor does anything appear again of a job that is over.
        store.forget_checkpoints(JOB).unwrap();
        assert!(store.write_checkpoint(&new, checkpoint(40)).is_err());
        assert!(!store.checkpoint_folder(JOB).exists());
        let again = store.lease(JOB);
        assert!(new.hold().is_err() && again.hold().is_ok());
    }
}
