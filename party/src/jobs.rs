//! The jobs a party knows: submitted, running, done. Each keeps what its requester may still want
//! to hear, in memory only: results vanish with the process or after some more jobs.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use trefoil_consortium::wire::{Event, clip_reason};
use trefoil_consortium::{JobDescription, JobId};

/// Jobs that wait at the same time.
const WAITING_MAX: usize = 64;
/// Those of one requester among them.
const WAITING_PER_REQUESTER_MAX: usize = 8;
/// How long a job waits while no other runs: P0 may have given it up without a word to this party.
const WAITING_AGE_MAX: Duration = Duration::from_secs(10 * 60);
/// Finished jobs whose results are kept.
const FINISHED_MAX: usize = 16;
/// Events about progress that are kept for slow watchers.
const PROGRESS_MAX: usize = 4_096;

/// One job and what has been said about it.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) id: JobId,
    pub(crate) description: JobDescription,
    submitted: Instant,
    inner: Mutex<Inner>,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Inner {
    state: State,
    events: VecDeque<(u64, Arc<Event>)>,
    next: u64,
    progress: usize,
    /// When it was over.
    ended: Option<Instant>,
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
            if inner.state == State::Finished {
                inner.ended = Some(Instant::now());
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

impl Book {
    /// Ends the jobs that have waited too long. Time in which a job runs does not count: the
    /// others wait for its end.
    fn give_up_old(&self, now: Instant) {
        let jobs = || self.jobs.values();
        if jobs().any(|job| job.state() == State::Running) {
            return;
        }
        let idle_since = jobs().filter_map(|job| job.lock().ended).max();
        for job in jobs() {
            let since = idle_since.map_or(job.submitted, |idle| idle.max(job.submitted));
            let old = now.saturating_duration_since(since) > WAITING_AGE_MAX;
            if old && job.begin() {
                job.fail(&format!(
                    "P0 has not started the job within {} s",
                    WAITING_AGE_MAX.as_secs()
                ));
            }
        }
    }
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a job that its requester submitted.
    pub(crate) fn submit(&self, description: JobDescription) -> Result<Arc<Job>, String> {
        self.submit_at(description, Instant::now())
    }

    fn submit_at(&self, description: JobDescription, now: Instant) -> Result<Arc<Job>, String> {
        let id = description.id();
        let mut book = self.lock();
        if book.jobs.contains_key(&id) {
            return Err(format!(
                "job {id} is known already: a repeated job needs a new nonce"
            ));
        }
        book.give_up_old(now);
        let waiting = book.jobs.values().filter(|job| {
            job.description.requester == description.requester && job.state() == State::Waiting
        });
        if waiting.count() >= WAITING_PER_REQUESTER_MAX {
            return Err(format!(
                "busy: {WAITING_PER_REQUESTER_MAX} jobs of this requester are waiting already"
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
            submitted: now,
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

#[cfg(test)]
mod tests {
    use trefoil_models::JobKind;
    use trefoil_models::job::{DatasetRef, TrainSpec};
    use trefoil_transport::Pin;

    use super::*;

    fn description(requester: u8) -> JobDescription {
        let kind = JobKind::Train {
            network: "name = \"mlp\"".into(),
            spec: TrainSpec::default(),
            dataset: DatasetRef {
                name: "digits".into(),
                train_rows: 10,
                test_rows: 2,
                snapshot: [7; 32],
            },
            evaluate_each_epoch: true,
            save_as: "digits-mlp".into(),
            reveal_weights: true,
        };
        JobDescription::new("job", Pin::from_bytes([requester; 32]), kind).unwrap()
    }

    #[test]
    fn a_requester_has_few_waiting_jobs_and_the_others_still_get_in() {
        let jobs = Jobs::default();
        for _ in 0..WAITING_PER_REQUESTER_MAX {
            jobs.submit(description(1)).unwrap();
        }
        let err = jobs.submit(description(1)).unwrap_err();
        assert!(err.contains("of this requester"), "{err}");
        jobs.submit(description(2)).unwrap();
    }

    #[test]
    fn a_job_that_nobody_starts_is_given_up_but_not_while_another_runs() {
        let jobs = Jobs::default();
        let old = jobs.submit(description(1)).unwrap();
        let late = || Instant::now() + WAITING_AGE_MAX + Duration::from_secs(1);
        let running = jobs.submit(description(2)).unwrap();
        assert!(running.begin());
        jobs.submit_at(description(3), late()).unwrap();
        assert_eq!(old.state(), State::Waiting, "another job runs");
        running.fail("over");
        jobs.submit_at(description(4), Instant::now()).unwrap();
        assert_eq!(old.state(), State::Waiting, "its turn has just come");
        let young = jobs.submit_at(description(5), late()).unwrap();
        assert_eq!(old.state(), State::Finished);
        assert_eq!(young.state(), State::Waiting);
    }
}
