//! Who may write a job's checkpoints and results: the newest attempt at it, and nobody once it is over.
//!
//! A session that is aborted leaves its protocol thread in the middle of what it does. Such a thread
//! may come to a write when a new attempt has begun; its lease is refused then. Taking a lease waits
//! for a write under an older one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use trefoil_consortium::JobId;

use super::{Store, StoreError};

/// The number of the lease that is valid.
type Place = Arc<Mutex<u64>>;

/// The valid leases of all jobs.
#[derive(Debug, Default)]
pub(crate) struct Leases(Mutex<BTreeMap<JobId, Place>>);

/// One attempt's right to write.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    place: Place,
    number: u64,
}

impl Lease {
    /// Keeps every newer attempt from beginning while the returned value lives.
    ///
    /// # Errors
    /// A newer one has begun, or the job is over.
    pub(crate) fn hold(&self) -> Result<MutexGuard<'_, u64>, StoreError> {
        let valid = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        match *valid == self.number {
            true => Ok(valid),
            false => Err(StoreError::Refused(
                "this session of the job has ended: nothing of it is written any more".into(),
            )),
        }
    }
}

impl Store {
    fn lease_place(&self, job: JobId) -> Place {
        let mut leases = self.leases.0.lock().unwrap_or_else(PoisonError::into_inner);
        leases.entry(job).or_default().clone()
    }

    /// Ends all earlier leases of a job and gives a new one.
    pub(crate) fn lease(&self, job: JobId) -> Lease {
        let place = self.lease_place(job);
        let number = {
            let mut valid = place.lock().unwrap_or_else(PoisonError::into_inner);
            *valid += 1;
            *valid
        };
        Lease { place, number }
    }

    /// Ends all leases of a job that is over.
    pub(crate) fn end_leases(&self, job: JobId) {
        // A thread that has one keeps its place alive, with a number that is not its own.
        drop(self.lease(job));
        let mut leases = self.leases.0.lock().unwrap_or_else(PoisonError::into_inner);
        leases.remove(&job);
    }
}
