//! All jobs of a party: which may come in, which is next, and which are given up.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use trefoil_consortium::{JobDescription, JobId};

use super::Job;
use crate::desk::{JobRecord, JobState};
use crate::policy::Ruling;

/// Jobs that are not over and do not run, at the same time.
const WAITING_MAX: usize = 64;
/// Those of one requester among them.
pub(super) const WAITING_PER_REQUESTER_MAX: usize = 8;
/// Finished jobs whose results are kept.
pub(crate) const FINISHED_MAX: usize = 16;

/// What P0 has to do next.
#[derive(Debug)]
pub(crate) enum Due {
    /// Ask the other parties for this job.
    Now(Arc<Job>),
    /// Nothing before this.
    At(Instant),
    /// Nothing before something changes.
    Nothing,
}

/// All jobs of a party.
#[derive(Debug, Default)]
pub(crate) struct Jobs(Mutex<Book>);

#[derive(Debug, Default)]
struct Book {
    jobs: BTreeMap<JobId, Arc<Job>>,
    order: VecDeque<JobId>,
    /// Jobs whose results are kept no more.
    dropped: Vec<JobId>,
}

impl Book {
    fn insert(&mut self, job: Job) -> Arc<Job> {
        let job = Arc::new(job);
        self.jobs.insert(job.id, job.clone());
        self.order.push_back(job.id);
        job
    }

    fn in_order(&self) -> impl Iterator<Item = &Arc<Job>> {
        self.order.iter().filter_map(|id| self.jobs.get(id))
    }
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a job that its requester submitted.
    pub(crate) fn submit(
        &self,
        description: JobDescription,
        requester: &str,
        ruling: &Ruling,
        now_s: u64,
    ) -> Result<Arc<Job>, String> {
        let id = description.id();
        let mut book = self.lock();
        if book.jobs.contains_key(&id) {
            return Err(known_already(&id));
        }
        let waits = |job: &Job| matches!(job.state(), JobState::Held | JobState::Waiting);
        let waiting = book.jobs.values();
        let waiting =
            waiting.filter(|job| job.description.requester == description.requester && waits(job));
        if waiting.count() >= WAITING_PER_REQUESTER_MAX {
            return Err(format!(
                "busy: {WAITING_PER_REQUESTER_MAX} jobs of this requester are waiting already"
            ));
        }
        let over = book.in_order().filter(|job| job.state().over());
        let over: Vec<JobId> = over.map(|job| job.id).collect();
        if book.order.len() - over.len() >= WAITING_MAX {
            return Err(format!("busy: {WAITING_MAX} jobs are waiting already"));
        }
        for old in over
            .iter()
            .take((over.len() + 1).saturating_sub(FINISHED_MAX))
        {
            book.jobs.remove(old);
            book.order.retain(|id| id != old);
            book.dropped.push(*old);
        }
        let state = match ruling.ask {
            true => JobState::Held,
            false => JobState::Waiting,
        };
        let record = JobRecord::new(&description, requester, now_s, state, &ruling.rule);
        Ok(book.insert(Job::new(description, record, false)))
    }

    /// Takes up a job of an earlier run of this party.
    pub(crate) fn restore(&self, description: JobDescription, record: JobRecord) -> Arc<Job> {
        self.lock().insert(Job::new(description, record, true))
    }

    /// The job, if it is known.
    pub(crate) fn get(&self, id: &JobId) -> Option<Arc<Job>> {
        self.lock().jobs.get(id).cloned()
    }

    /// Jobs whose results are kept no more, once.
    pub(crate) fn take_dropped(&self) -> Vec<JobId> {
        std::mem::take(&mut self.lock().dropped)
    }

    /// Forgets a job that has not started.
    pub(crate) fn withdraw(&self, job: &Job) -> Result<(), String> {
        if job.state() == JobState::Running
            || job.attempts() > 0
            || !job.end(
                JobState::Withdrawn,
                "the job was withdrawn by its requester",
            )
        {
            return Err("the job has started already".into());
        }
        self.forget(job);
        Ok(())
    }

    /// Forgets a job.
    pub(crate) fn forget(&self, job: &Job) {
        let mut book = self.lock();
        book.jobs.remove(&job.id);
        book.order.retain(|id| *id != job.id);
    }

    /// All jobs, in no order that means anything.
    pub(crate) fn all(&self) -> Vec<Arc<Job>> {
        self.lock().jobs.values().cloned().collect()
    }

    /// The first job that P0 may lead now.
    pub(crate) fn due(&self, now: Instant) -> Due {
        let book = self.lock();
        let mut next = Due::Nothing;
        for job in book.in_order() {
            let inner = job.lock();
            if inner.record.state != JobState::Waiting || !inner.noted {
                continue;
            }
            match (inner.ask_at, &next) {
                (Some(at), Due::At(earliest)) if at > now => next = Due::At(at.min(*earliest)),
                (Some(at), _) if at > now => next = Due::At(at),
                _ => return Due::Now(job.clone()),
            }
        }
        next
    }

    /// The jobs that have waited for longer than `timeout_s`. For those that this party holds up, it
    /// counts from their submission; for others the time in which a job runs does not count: they
    /// may have waited for its end.
    pub(crate) fn expired(&self, now_s: u64, timeout_s: u64) -> Vec<Arc<Job>> {
        let book = self.lock();
        let jobs = || book.jobs.values();
        let running = jobs().any(|job| job.holds_up());
        let over = jobs()
            .map(|job| job.record())
            .filter(|record| record.state.over());
        let idle_since = over.map(|record| record.since_s).max().unwrap_or(0);
        let old = |job: &&Arc<Job>| {
            let record = job.record();
            if record.attempts > 0 {
                return false;
            }
            let since = match record.state {
                JobState::Held => record.submitted_s,
                JobState::Waiting if !running => record.submitted_s.max(idle_since),
                _ => return false,
            };
            now_s.saturating_sub(since) > timeout_s
        };
        jobs().filter(old).cloned().collect()
    }

    /// The interrupted jobs that have waited for longer than `wait`. While another job holds them up,
    /// that does not count: they do not wait for a node.
    pub(crate) fn given_up(&self, wait: Duration) -> Vec<Arc<Job>> {
        let mut jobs = self.all();
        if jobs.iter().any(|job| job.holds_up()) {
            jobs.iter().for_each(|job| job.pause_anew());
            return Vec::new();
        }
        jobs.retain(|job| job.paused().is_some_and(|since| since.elapsed() > wait));
        jobs
    }

    /// Ends the jobs that run and that `lasting` does not name, with a reason; all others go on after
    /// a restart.
    pub(crate) fn fail_running(&self, lasting: impl Fn(&Job) -> bool, reason: &str) {
        let jobs = self.all();
        let running = jobs.iter().filter(|job| job.state() == JobState::Running);
        let ending = running.filter(|job| !lasting(job));
        ending.for_each(|job| job.fail(reason));
    }
}

/// A job is named by its hash, and runs once.
pub(crate) fn known_already(id: &JobId) -> String {
    format!("job {id} is known already: a repeated job needs a new nonce")
}
