//! The jobs a party knows: submitted, running, done. Each keeps what its requester may still want
//! to hear, in memory only: results vanish with the process or after some more jobs.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use trefoil_consortium::wire::{Event, clip_reason};
use trefoil_consortium::{JobDescription, JobId};

/// Jobs that wait at the same time.
const WAITING_MAX: usize = 64;
/// Finished jobs whose results are kept.
const FINISHED_MAX: usize = 16;
/// Events about progress that are kept for slow watchers.
const PROGRESS_MAX: usize = 4_096;

/// One job and what has been said about it.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) id: JobId,
    pub(crate) description: JobDescription,
    inner: Mutex<Inner>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Inner {
    state: State,
    events: VecDeque<(u64, Arc<Event>)>,
    next: u64,
    progress: usize,
}

/// Where a job is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum State {
    /// Submitted here.
    #[default]
    Waiting,
    /// A session runs.
    Running,
    /// Over, well or not.
    Finished,
}

impl Job {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn state(&self) -> State {
        self.lock().state
    }

    /// Takes the job for a session; `false` where it is not waiting.
    pub(crate) fn begin(&self) -> bool {
        let mut inner = self.lock();
        let waiting = inner.state == State::Waiting;
        if waiting {
            inner.state = State::Running;
        }
        waiting
    }

    /// Says something to the requester.
    pub(crate) fn say(&self, event: Event) {
        {
            let mut inner = self.lock();
            if inner.state == State::Finished {
                return;
            }
            match &event {
                Event::Done { .. } => inner.state = State::Finished,
                Event::Failed(_) => {
                    inner.state = State::Finished;
                    // A failed job has no results.
                    inner
                        .events
                        .retain(|(_, event)| matches!(**event, Event::Started { .. }));
                }
                Event::Progress(_) => {
                    inner.progress += 1;
                    if inner.progress > PROGRESS_MAX {
                        let oldest = inner
                            .events
                            .iter()
                            .position(|(_, e)| matches!(**e, Event::Progress(_)));
                        if let Some(oldest) = oldest {
                            inner.events.remove(oldest);
                        }
                        inner.progress -= 1;
                    }
                }
                Event::Started { .. } | Event::Output { .. } => {}
            }
            let next = inner.next;
            inner.next += 1;
            inner.events.push_back((next, Arc::new(event)));
        }
        self.changed.send_replace(());
    }

    /// Ends the job with an error.
    pub(crate) fn fail(&self, reason: &str) {
        self.say(Event::Failed(clip_reason(reason)));
    }

    /// Called before looking, so that nothing is missed between looking and waiting.
    pub(crate) fn subscribe(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// What was said from `next` on, and whether it is all.
    pub(crate) fn heard(&self, next: u64) -> (Vec<(u64, Arc<Event>)>, bool) {
        let inner = self.lock();
        let from = inner.events.partition_point(|(number, _)| *number < next);
        (
            inner.events.range(from..).cloned().collect(),
            inner.state == State::Finished,
        )
    }
}

/// All jobs of a party.
#[derive(Debug, Default)]
pub(crate) struct Jobs(Mutex<Book>);

#[derive(Debug, Default)]
struct Book {
    jobs: BTreeMap<JobId, Arc<Job>>,
    order: VecDeque<JobId>,
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a job that its requester submitted.
    pub(crate) fn submit(&self, description: JobDescription) -> Result<Arc<Job>, String> {
        let id = description.id();
        let mut book = self.lock();
        if book.jobs.contains_key(&id) {
            return Err(format!(
                "job {id} is known already: a repeated job needs a new nonce"
            ));
        }
        let finished: Vec<JobId> = book
            .order
            .iter()
            .filter(|id| {
                book.jobs
                    .get(id)
                    .is_none_or(|job| job.state() == State::Finished)
            })
            .copied()
            .collect();
        if book.order.len() - finished.len() >= WAITING_MAX {
            return Err(format!("busy: {WAITING_MAX} jobs are waiting already"));
        }
        for old in finished
            .iter()
            .take((finished.len() + 1).saturating_sub(FINISHED_MAX))
        {
            book.jobs.remove(old);
            book.order.retain(|id| id != old);
        }
        let (changed, _) = watch::channel(());
        let job = Arc::new(Job {
            id,
            description,
            inner: Mutex::default(),
            changed,
        });
        book.jobs.insert(id, job.clone());
        book.order.push_back(id);
        Ok(job)
    }

    /// The job, if it is known.
    pub(crate) fn get(&self, id: &JobId) -> Option<Arc<Job>> {
        self.lock().jobs.get(id).cloned()
    }

    /// Forgets a job that waits.
    pub(crate) fn withdraw(&self, job: &Job) -> Result<(), String> {
        if !job.begin() {
            return Err("the job has started already".into());
        }
        job.fail("the job was withdrawn by its requester");
        let mut book = self.lock();
        book.jobs.remove(&job.id);
        book.order.retain(|id| *id != job.id);
        Ok(())
    }

    /// Ends all jobs with a reason.
    pub(crate) fn fail_all(&self, reason: &str) {
        let jobs: Vec<Arc<Job>> = self.lock().jobs.values().cloned().collect();
        jobs.iter().for_each(|job| job.fail(reason));
    }
}
