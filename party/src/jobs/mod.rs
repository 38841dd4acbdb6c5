//! The jobs a party knows: held for approval, waiting, running, done. Each keeps what its requester
//! may still want to hear, until some more jobs have ended. Where a job stands is in `home/jobs/` too
//! (`desk.rs`), written by `consent.rs`; what it has revealed is in `home/results/` (`store/`).
//! Here is one job; `book.rs` has them all.

mod book;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use trefoil_consortium::wire::{Event, Withdrawal, clip_reason};
use trefoil_consortium::{Attempt, JobDescription, JobId, Mark};
use trefoil_transport::Pin;

use crate::desk::{JobRecord, JobState};

pub(crate) use book::{Due, FINISHED_MAX, Jobs, known_already};

/// Sessions in a row that may end without a step that no earlier one has done.
const STALLED_MAX: u32 = 10;
/// Events about progress that are kept for slow watchers.
const PROGRESS_MAX: usize = 4_096;
/// Longer than a job may wait to be led.
const SET_ASIDE: Duration = Duration::from_secs(365 * 24 * 3600);

/// One job and what has been said about it.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) id: JobId,
    pub(crate) description: JobDescription,
    inner: Mutex<Inner>,
    changed: watch::Sender<()>,
}

#[derive(Debug)]
struct Inner {
    /// What the home knows of it.
    record: JobRecord,
    events: VecDeque<(u64, Arc<Event>)>,
    next: u64,
    progress: usize,
    /// The operator's word that ends it, once it runs.
    cancelled: Option<String>,
    /// P0 asks the other parties not before this.
    ask_at: Option<Instant>,
    /// A party that is away does not end it: it has waited for a person somewhere.
    patient: bool,
    /// Its record is in the home: it may run.
    noted: bool,
    /// Its end is in the home.
    end_noted: bool,
    /// Its session was interrupted, and no new one has done anything: since when.
    paused: Option<Instant>,
    /// Most steps that any session has done.
    furthest: u64,
    /// Sessions since then.
    stalled: u32,
    /// Hospital and upload number of the rows that it reads, once it has been prepared.
    reads: Vec<(Pin, u64)>,
}

impl Inner {
    fn enter(&mut self, state: JobState, now_s: u64) {
        self.record.state = state;
        self.record.since_s = now_s;
    }

    fn push(&mut self, event: Event) {
        let next = self.next;
        self.next += 1;
        self.events.push_back((next, Arc::new(event)));
    }
}

impl Job {
    fn new(description: JobDescription, record: JobRecord, restored: bool) -> Job {
        let (changed, _) = watch::channel(());
        let record_held = record.state == JobState::Held;
        let interrupted = record.attempts > 0 && !record.state.over();
        let over = record.state.over();
        let mut inner = Inner {
            record,
            events: VecDeque::new(),
            next: 0,
            progress: 0,
            cancelled: None,
            ask_at: None,
            patient: restored || record_held,
            noted: restored,
            end_noted: over,
            paused: interrupted.then(Instant::now),
            furthest: 0,
            stalled: 0,
            reads: Vec::new(),
        };
        if record_held {
            inner.push(Event::Held);
        }
        Job {
            id: description.id(),
            description,
            inner: Mutex::new(inner),
            changed,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(crate) fn for_tests(description: JobDescription) -> Arc<Job> {
        let record = JobRecord::new(&description, "test", 0, JobState::Running, "test");
        Arc::new(Job::new(description, record, false))
    }

    pub(crate) fn state(&self) -> JobState {
        self.lock().record.state
    }

    /// What the home should know of it.
    pub(crate) fn record(&self) -> JobRecord {
        self.lock().record.clone()
    }

    pub(crate) fn requester(&self) -> String {
        self.lock().record.requester.clone()
    }

    /// Whether a person has approved it here.
    pub(crate) fn approved(&self) -> bool {
        !self.lock().record.approved_by.is_empty()
    }

    /// Notes the consortium's core under which it is taken.
    pub(crate) fn under(&self, core: &[u8; 32]) {
        self.lock().record.under(core);
    }

    /// Lets a held job run; `false` where it is not held.
    pub(crate) fn approve(&self, by: &str, now_s: u64) -> bool {
        {
            let mut inner = self.lock();
            if inner.record.state != JobState::Held {
                return false;
            }
            inner.record.approved_by = by.into();
            inner.patient = true;
            inner.enter(JobState::Waiting, now_s);
            inner.push(Event::Approved);
        }
        self.changed.send_replace(());
        true
    }

    /// Takes the job for a session; `false` where it is not waiting.
    pub(crate) fn begin(&self, now_s: u64) -> bool {
        let mut inner = self.lock();
        let waiting = inner.noted && inner.record.state == JobState::Waiting;
        if waiting {
            inner.record.note.clear();
            inner.enter(JobState::Running, now_s);
        }
        waiting
    }

    /// P0 asks the others again at `at`; `why` is for people. Whether it says something new.
    pub(crate) fn ask_again(&self, at: Instant, why: &str) -> bool {
        let new = {
            let mut inner = self.lock();
            inner.ask_at = Some(at);
            inner.patient = true;
            let new = inner.record.note != why;
            inner.record.note = why.into();
            if new && inner.paused.is_some() {
                inner.push(Event::Interrupted(clip_reason(why)));
            }
            new
        };
        self.changed.send_replace(());
        new
    }

    /// Sessions that were begun here.
    pub(crate) fn attempts(&self) -> u32 {
        self.lock().record.attempts
    }

    /// A session begins. What earlier ones revealed from its first step on counts no more.
    pub(crate) fn attempted(&self, attempt: &Attempt) {
        let mut inner = self.lock();
        inner.record.attempts = attempt.number.saturating_add(1);
        inner.stalled += 1;
        let from = attempt.from();
        let counts = |event: &Event| !matches!(event, Event::Output { step, .. } if *step >= from);
        inner.events.retain(|(_, event)| counts(event));
    }

    /// So many steps of a session are done.
    pub(crate) fn stepped(&self, steps: u64) {
        let mut inner = self.lock();
        inner.paused = None;
        if steps > inner.furthest {
            inner.furthest = steps;
            inner.stalled = 0;
        }
    }

    /// The session was interrupted: the job waits for another one. An error where it may not, and
    /// why.
    pub(crate) fn pause(&self, why: &str, now_s: u64) -> Result<(), String> {
        {
            let mut inner = self.lock();
            if let Some(reason) = &inner.cancelled {
                return Err(reason.clone());
            }
            if inner.record.state != JobState::Running {
                return Err(format!("the job is {}", inner.record.state));
            }
            if inner.stalled >= STALLED_MAX {
                return Err(format!(
                    "{why}; the last {STALLED_MAX} sessions of the job did no step that was not done before"
                ));
            }
            inner.patient = true;
            inner.paused.get_or_insert_with(Instant::now);
            inner.record.note = why.into();
            inner.enter(JobState::Waiting, now_s);
            inner.push(Event::Interrupted(clip_reason(why)));
        }
        self.changed.send_replace(());
        Ok(())
    }

    /// Since when it waits for another session, if it does.
    pub(crate) fn paused(&self) -> Option<Instant> {
        let inner = self.lock();
        inner
            .paused
            .filter(|_| inner.record.state == JobState::Waiting)
    }

    /// Whether it runs and others wait for its end: a serving session runs beside them.
    fn holds_up(&self) -> bool {
        self.state() == JobState::Running && self.description.serves().is_none()
    }

    /// The wait for another session, if it waits for one, counts from now.
    fn pause_anew(&self) {
        let mut inner = self.lock();
        if inner.record.state == JobState::Waiting
            && let Some(paused) = &mut inner.paused
        {
            *paused = Instant::now();
        }
    }

    /// At P0: notes the dealer's coins; `false` where earlier sessions of the job had others.
    pub(crate) fn same_coins(&self, coins: Option<[u8; 32]>) -> bool {
        let mut inner = self.lock();
        let same = inner.record.coins.is_none() || inner.record.coins == coins;
        inner.record.coins = inner.record.coins.or(coins);
        same
    }

    /// At P0: which state another party may have to keep that does not know that the job is done.
    pub(crate) fn set_unconcluded(&self, mark: Option<Mark>) {
        self.lock().record.unconcluded = mark;
    }

    /// What an earlier run of this party revealed.
    pub(crate) fn remember(&self, events: Vec<Event>) {
        let mut inner = self.lock();
        events.into_iter().for_each(|event| inner.push(event));
    }

    /// Takes a waiting job out of what is due until [`Job::ask_again`]: somebody leads it.
    pub(crate) fn set_aside(&self, now: Instant) {
        self.lock().ask_at = Some(now + SET_ASIDE);
    }

    /// Whether a party that is away leaves it waiting.
    pub(crate) fn patient(&self) -> bool {
        self.lock().patient
    }

    /// Its record is in the home; before that it does not start.
    pub(crate) fn noted(&self) {
        self.lock().noted = true;
    }

    /// Whether it is over and nobody has noted that: then the caller does.
    pub(crate) fn take_end(&self) -> bool {
        let mut inner = self.lock();
        let take = inner.record.state.over() && !inner.end_noted;
        inner.end_noted |= take;
        take
    }

    /// Notes which contributions it reads.
    pub(crate) fn note_reads(&self, contributions: &[(Pin, u64)]) {
        self.lock().reads = contributions.to_vec();
    }

    /// Whether it reads one of these uploads of a hospital.
    pub(crate) fn reads(&self, hospital: Pin, what: Withdrawal) -> bool {
        let inner = self.lock();
        let mut reads = inner.reads.iter();
        reads.any(|(pin, number)| *pin == hospital && what.covers(*number))
    }

    /// Marks a running job as ended by this party's operator, or by a hospital that took back rows.
    pub(crate) fn cancel(&self, reason: &str) {
        self.lock().cancelled = Some(reason.into());
    }

    /// The operator's word that ends it.
    pub(crate) fn cancelled(&self) -> Option<String> {
        self.lock().cancelled.clone()
    }

    /// Says something to the requester.
    pub(crate) fn say(&self, event: Event) {
        {
            let mut inner = self.lock();
            if inner.record.state.over() {
                return;
            }
            match &event {
                Event::Done { .. } => inner.enter(JobState::Done, crate::files::now_s()),
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
                Event::Held
                | Event::Approved
                | Event::Started { .. }
                | Event::Interrupted(_)
                | Event::Output { .. }
                | Event::Waits(_)
                | Event::Failed(_) => {}
            }
            inner.push(event);
        }
        self.changed.send_replace(());
    }

    /// Ends the job with an error.
    pub(crate) fn fail(&self, reason: &str) {
        self.end(JobState::Failed, reason);
    }

    /// Ends the job without its results; `false` where it is over already.
    pub(crate) fn end(&self, how: JobState, reason: &str) -> bool {
        let reason = clip_reason(reason);
        {
            let mut inner = self.lock();
            if inner.record.state.over() {
                return false;
            }
            let how = match (&inner.cancelled, how) {
                (Some(_), JobState::Failed) => JobState::Cancelled,
                _ => how,
            };
            inner.record.note.clone_from(&reason);
            inner.enter(how, crate::files::now_s());
            // A session that began meanwhile looks for the word.
            inner.cancelled.get_or_insert_with(|| reason.clone());
            // A failed job has no results.
            inner.events.retain(|(_, event)| {
                matches!(
                    **event,
                    Event::Held | Event::Approved | Event::Started { .. }
                )
            });
            inner.push(Event::Failed(reason));
        }
        self.changed.send_replace(());
        true
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
            inner.record.state.over(),
        )
    }
}

#[cfg(test)]
mod tests;
