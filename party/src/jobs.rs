//! The jobs a party knows: held for approval, waiting, running, done. Each keeps what its requester
//! may still want to hear, until some more jobs have ended. Where a job stands is in `home/jobs/` too
//! (`desk.rs`), written by `consent.rs`; what it has revealed is in `home/results/` (`store/`).

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use trefoil_consortium::wire::{Event, Withdrawal, clip_reason};
use trefoil_consortium::{Attempt, JobDescription, JobId, Mark};
use trefoil_transport::Pin;

use crate::desk::{JobRecord, JobState};
use crate::policy::Ruling;

/// Jobs that are not over and do not run, at the same time.
const WAITING_MAX: usize = 64;
/// Those of one requester among them.
const WAITING_PER_REQUESTER_MAX: usize = 8;
/// Finished jobs whose results are kept.
pub(crate) const FINISHED_MAX: usize = 16;
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

#[cfg(test)]
mod tests {
    use trefoil_models::JobKind;
    use trefoil_models::job::{DatasetRef, TrainSpec};

    use super::*;

    const NOW_S: u64 = 1_000_000;
    const TIMEOUT_S: u64 = 600;

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

    fn submit(jobs: &Jobs, requester: u8, ask: bool, now_s: u64) -> Result<Arc<Job>, String> {
        let rule = "test".into();
        let job = jobs.submit(
            description(requester),
            "st-anna",
            &Ruling { ask, rule },
            now_s,
        )?;
        job.noted();
        Ok(job)
    }

    #[test]
    fn a_requester_has_few_waiting_jobs_and_the_others_still_get_in() {
        let jobs = Jobs::default();
        for at in 0..WAITING_PER_REQUESTER_MAX {
            submit(&jobs, 1, at % 2 == 0, NOW_S).unwrap();
        }
        let err = submit(&jobs, 1, false, NOW_S).unwrap_err();
        assert!(err.contains("of this requester"), "{err}");
        submit(&jobs, 2, false, NOW_S).unwrap();
    }

    #[test]
    fn a_job_that_nobody_starts_is_given_up_but_not_while_another_runs() {
        let jobs = Jobs::default();
        let old = submit(&jobs, 1, false, NOW_S).unwrap();
        let held = submit(&jobs, 1, true, NOW_S + 1).unwrap();
        let running = submit(&jobs, 2, false, NOW_S).unwrap();
        assert!(running.begin(NOW_S));
        let ids = |now_s: u64| -> Vec<JobId> {
            jobs.expired(now_s, TIMEOUT_S)
                .iter()
                .map(|job| job.id)
                .collect()
        };
        assert_eq!(ids(NOW_S + TIMEOUT_S + 1), []);
        let late = NOW_S + TIMEOUT_S + 2;
        assert_eq!(ids(late), [held.id], "a held job waits for a person alone");
        running.fail("over");
        let now_s = running.record().since_s;
        assert!(
            !ids(now_s + TIMEOUT_S).contains(&old.id),
            "its turn has just come"
        );
        assert!(ids(now_s + TIMEOUT_S + 1).contains(&old.id));
    }

    #[test]
    fn p0_leads_jobs_in_order_and_never_a_held_one() {
        let jobs = Jobs::default();
        let held = submit(&jobs, 1, true, NOW_S).unwrap();
        let second = submit(&jobs, 1, false, NOW_S).unwrap();
        let now = Instant::now();
        let led = |jobs: &Jobs, at| match jobs.due(at) {
            Due::Now(job) => Some(job.id),
            _ => None,
        };
        assert_eq!(led(&jobs, now), Some(second.id));
        let later = now + Duration::from_secs(2);
        assert!(second.ask_again(later, "waiting for P1"));
        assert!(!second.ask_again(later, "waiting for P1"), "nothing new");
        assert!(matches!(jobs.due(now), Due::At(at) if at == later));
        assert_eq!(led(&jobs, later), Some(second.id));
        assert!(!held.begin(NOW_S));
        assert!(held.approve("operator", NOW_S) && !held.approve("operator", NOW_S));
        assert_eq!(led(&jobs, now), Some(held.id));
        assert!(held.begin(NOW_S) && second.end(JobState::Expired, "late"));
        assert!(matches!(jobs.due(later), Due::Nothing));
    }

    #[test]
    fn an_interrupted_job_waits_again_and_what_is_revealed_anew_is_dropped() {
        let jobs = Jobs::default();
        let job = submit(&jobs, 1, false, NOW_S).unwrap();
        let output = |step, attempt| {
            let (name, shape) = ("logits".into(), vec![0]);
            let words = trefoil_consortium::Words(Vec::new());
            let share = trefoil_consortium::wire::WireOutput {
                name,
                shape,
                words,
                xor: false,
                opened: [0; 16],
            };
            Event::Output {
                step,
                attempt,
                share,
            }
        };
        let outputs = || -> Vec<(u64, u32)> {
            let (events, _) = job.heard(0);
            let outputs = events.iter().filter_map(|(_, event)| match &**event {
                Event::Output { step, attempt, .. } => Some((*step, *attempt)),
                _ => None,
            });
            outputs.collect()
        };
        assert!(job.begin(NOW_S) && job.paused().is_none());
        job.attempted(&Attempt::default());
        for step in [2, 5] {
            job.say(output(step, 0));
            job.stepped(step + 1);
        }
        job.pause("P2 is gone", NOW_S).unwrap();
        assert!(job.paused().is_some() && job.attempts() == 1);
        assert!(jobs.withdraw(&job).is_err(), "it has run");
        assert!(job.begin(NOW_S), "it may run again");
        let resume = Some(Mark::of(&[1; 32], 4));
        job.attempted(&Attempt { number: 1, resume });
        assert_eq!(outputs(), [(2, 0)]);
        job.say(output(5, 1));
        assert_eq!(outputs(), [(2, 0), (5, 1)]);
        // Sessions that end again and again before anything new is done are not tried for ever.
        assert!(job.same_coins(Some([1; 32])) && job.same_coins(Some([1; 32])));
        assert!(!job.same_coins(Some([2; 32])) && !job.same_coins(None));
        for _ in 1..STALLED_MAX {
            job.pause("P2 is gone", NOW_S).unwrap();
            assert!(job.begin(NOW_S));
            job.attempted(&Attempt { number: 1, resume });
            job.stepped(6);
        }
        let err = job.pause("P2 is gone", NOW_S).unwrap_err();
        assert!(err.contains("P2 is gone; the last"), "{err}");
        job.stepped(7);
        job.pause("P2 is gone", NOW_S).unwrap();
        assert!(job.begin(NOW_S));
        job.cancel("enough");
        assert_eq!(job.pause("P2 is gone", NOW_S), Err("enough".into()));
    }

    #[test]
    fn an_interrupted_job_is_given_up_beside_a_serving_session_and_not_beside_another() {
        let jobs = Jobs::default();
        let job = submit(&jobs, 1, false, NOW_S).unwrap();
        assert!(job.begin(NOW_S));
        job.pause("P2 is gone", NOW_S).unwrap();
        let given_up = |wait| -> Vec<JobId> {
            let given_up = jobs.given_up(wait);
            given_up.iter().map(|job| job.id).collect()
        };
        // Until the clock has moved on at all.
        let passed = || while job.paused().unwrap().elapsed().is_zero() {};
        let other = submit(&jobs, 2, false, NOW_S).unwrap();
        assert!(other.begin(NOW_S));
        passed();
        let since = job.paused().unwrap();
        assert_eq!(given_up(Duration::ZERO), []);
        assert!(job.paused().unwrap() > since, "the wait counts anew");
        other.fail("over");

        let serve = JobKind::Serve(trefoil_models::ServeSpec {
            model: "model@01234567".into(),
            network: String::new(),
            frac_bits: 16,
            ring_bits: 64,
            members: vec![[3; 32]],
            output: trefoil_models::PredictOutput::Class,
            max_batch: 4,
            max_wait_ms: 1,
            max_pending: 2,
            rows_per_day: 0,
            duration_s: 60,
        });
        let description = JobDescription::new("serve", Pin::from_bytes([3; 32]), serve).unwrap();
        let rule = "test".into();
        let ruling = Ruling { ask: false, rule };
        let serving = jobs.submit(description, "office", &ruling, NOW_S).unwrap();
        serving.noted();
        assert!(serving.begin(NOW_S));
        passed();
        assert_eq!(given_up(Duration::from_secs(3_600)), []);
        assert_eq!(given_up(Duration::ZERO), [job.id]);
        assert_eq!(serving.state(), JobState::Running);
    }

    /// A withdrawal that failed at its deletion has taken the rows out of the catalog: the next
    /// attempt finds the jobs by what they read.
    #[test]
    fn a_running_job_is_found_by_the_uploads_that_it_reads() {
        let jobs = Jobs::default();
        let job = submit(&jobs, 1, false, NOW_S).unwrap();
        let [anna, bernd] = [1, 2].map(|byte| Pin::from_bytes([byte; 32]));
        job.note_reads(&[(anna, 2), (anna, 5), (bernd, 1)]);
        assert!(job.reads(anna, Withdrawal::One(5)) && job.reads(anna, Withdrawal::Below(3)));
        assert!(!job.reads(anna, Withdrawal::One(1)) && !job.reads(anna, Withdrawal::Below(2)));
        assert!(job.reads(bernd, Withdrawal::One(1)) && !job.reads(bernd, Withdrawal::One(5)));
    }

    #[test]
    fn a_cancel_leaves_its_word_to_a_session_that_began_meanwhile_and_loses_to_an_end() {
        let jobs = Jobs::default();
        let job = submit(&jobs, 1, false, NOW_S).unwrap();
        // While the decision was written down.
        assert!(job.begin(NOW_S) && job.cancelled().is_none());
        assert!(job.end(JobState::Cancelled, "P1: enough"));
        assert_eq!(job.cancelled().as_deref(), Some("P1: enough"));
        assert_eq!(job.pause("P2 is gone", NOW_S), Err("P1: enough".into()));
        assert!(!job.begin(NOW_S));

        let over = submit(&jobs, 2, false, NOW_S).unwrap();
        assert!(over.begin(NOW_S));
        over.fail("P2: no disk");
        assert!(!over.end(JobState::Cancelled, "P1: enough"));
        let record = over.record();
        assert_eq!(
            (record.state, record.note.as_str()),
            (JobState::Failed, "P2: no disk")
        );
    }

    #[test]
    fn a_cancelled_job_that_fails_counts_as_cancelled() {
        let jobs = Jobs::default();
        let job = submit(&jobs, 1, false, NOW_S).unwrap();
        assert!(job.begin(NOW_S));
        assert!(jobs.withdraw(&job).is_err(), "it runs");
        job.cancel("P1: enough");
        job.fail("P1: enough");
        assert_eq!(job.state(), JobState::Cancelled);
        assert!(!job.end(JobState::Failed, "late"));
        let (events, all) = job.heard(0);
        assert!(all && matches!(&*events[0].1, Event::Failed(reason) if reason == "P1: enough"));
    }
}
