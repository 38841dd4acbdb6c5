//! What outlives a session: where an interrupted job waits and for how long, what another session
//! takes up, and how a party that missed the end of a job hears of it.
//!
//! Files are `store/checkpoint.rs` and `store/results.rs`. Nothing of a session's keys is here: an
//! attempt has fresh ones, and everything it takes over are shares on this party's disk.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tracing::Instrument;
use trefoil_consortium::wire::{Event, Holds, ModelAbout};
use trefoil_consortium::{Attempt, Derived, Ending, JobDescription, JobId, Mark};
use trefoil_models::JobKind;
use trefoil_protocol::party::{PartyId, Peer};

use crate::consent;
use crate::daemon::{Party, PartyError};
use crate::desk::{JobRecord, JobState};
use crate::files::now_s;
use crate::follow::FOLLOWERS;
use crate::jobs::{FINISHED_MAX, Job};
use crate::lead;
use crate::members::on_files;
use crate::prepare::Prepared;
use crate::session;
use crate::store::{Checkpoint, Lease, NewModel, Results, StagedModel, StoreError, Stored};

/// How often a party is told that a job is done that it missed the end of.
const CONCLUDE_EVERY: Duration = Duration::from_secs(2);

/// Whether a job goes on after its session was interrupted.
pub(crate) fn lasts(party: &Party, job: &JobDescription) -> bool {
    !party.resume_wait.is_zero()
        && !matches!(job.kind, JobKind::Benchmark { .. } | JobKind::Serve(_))
}

/// One hash for all programs of a job.
pub(crate) fn programs_hash(derived: &Derived) -> [u8; 32] {
    let hash = Sha256::new().chain_update(b"trefoil programs v1\0");
    let hashes = derived.hashes.iter();
    hashes
        .fold(hash, |hash, program| hash.chain_update(program))
        .finalize()
        .into()
}

/// What this party has of a job's earlier sessions.
pub(crate) async fn holds(party: &Arc<Party>, job: &Job) -> Result<Holds, String> {
    let (store_of, id, attempts) = (party.clone(), job.id, job.attempts());
    let marks = match attempts {
        0 => Vec::new(),
        _ => on_files(move || store_of.store.marks(id)).await?,
    };
    Ok(Holds { attempts, marks })
}

/// The next attempt at a job, from what the three parties have.
pub(crate) fn next_attempt(holds: &[Holds; 3]) -> Attempt {
    let [own, others @ ..] = holds;
    let held = |mark: &&Mark| others.iter().all(|other| other.marks.contains(mark));
    Attempt {
        number: holds.iter().map(|holds| holds.attempts).max().unwrap_or(0),
        resume: own.marks.iter().filter(held).max().copied(),
    }
}

/// Puts the state of an attempt's checkpoint in the place of a fresh start's, and cuts the results
/// back to it.
pub(crate) fn take_up(
    party: &Party,
    job: JobId,
    attempt: Attempt,
    mut prepared: Prepared,
) -> Result<Prepared, Ending> {
    // It is not offered again, and an older one may do.
    let again = |err: StoreError| Ending::Interrupted(err.to_string());
    // From here on no earlier session writes.
    let lease = party.store.lease(job);
    let mut results_bytes = 0;
    if let Some(mark) = attempt.resume {
        let programs = programs_hash(&prepared.derived);
        let found = party.store.checkpoint(job, mark, programs);
        let found = found.map_err(again)?;
        let last = prepared.derived.schedule.steps.len() as u64;
        if mark.step > last || found.stats.is_some() != (mark.step == last) {
            return Err(Ending::Over(format!(
                "the checkpoint after step {} does not belong to a job of {last} steps",
                mark.step
            )));
        }
        prepared.initial = found.shares;
        prepared.validated = found.validated;
        results_bytes = found.results_bytes;
    }
    if prepared.keeps_results {
        let results = party.store.open_results(&lease, job, results_bytes);
        prepared.results = Some(results.map_err(again)?);
    }
    prepared.attempt = attempt;
    prepared.lease = lease;
    Ok(prepared)
}

/// Writes a checkpoint. One that cannot be written is left out: the job goes on, and the older ones
/// stay.
pub(crate) fn write_down(party: &Party, lease: &Lease, checkpoint: Checkpoint) -> Option<Mark> {
    let mark = checkpoint.mark;
    match party.store.write_checkpoint(lease, checkpoint) {
        Ok(()) => Some(mark),
        Err(err) => {
            tracing::error!(%err, step = mark.step, "no checkpoint: the job goes on without it");
            None
        }
    }
}

/// All three parties have a checkpoint.
pub(crate) fn written_by_all(party: &Arc<Party>, job: JobId, mark: Mark) {
    let party = party.clone();
    tokio::task::spawn_blocking(move || {
        if let Err(err) = party.store.confirm_checkpoint(job, mark) {
            tracing::warn!(%err, "an old checkpoint could not be removed");
        }
    });
}

/// The model that a job leaves, made from its last state, which gives it its name: the three
/// parties' shares belong together.
pub(crate) fn stage(
    party: &Party,
    job: &JobDescription,
    derived: &Derived,
    last: &Checkpoint,
) -> Result<Option<StagedModel>, String> {
    let Some(save_as) = job.save_as() else {
        return Ok(None);
    };
    let preparation = match &job.kind {
        JobKind::Train { spec, .. } => spec.preparation,
        JobKind::ImportModel { preparation, .. } => *preparation,
        _ => None,
    };
    let dataset = job.dataset();
    let about = ModelAbout {
        network: job.network().unwrap_or_default().into(),
        preparation,
        dataset: dataset.map(|set| (set.name.clone(), set.snapshot)),
        made_s: party
            .store
            .next_made_s(save_as, now_s())
            .map_err(|err| err.to_string())?,
    };
    let mut shares = Vec::new();
    for name in &derived.schedule.save {
        let share = last.shares.get(name).cloned();
        shares.push((
            name.clone(),
            share.ok_or_else(|| format!("the job left no {name} to keep"))?,
        ));
    }
    let model = NewModel {
        name: save_as,
        source: last.mark.id,
        job: last.job,
        owner: job.requester,
        ring_bits: derived.ring_bits,
        frac_bits: derived.frac_bits,
        about,
        started_from: match &job.kind {
            JobKind::Train { spec, .. } => spec.start_from.clone(),
            _ => None,
        },
        shares,
    };
    let staged = party.store.stage_model(model);
    staged.map(Some).map_err(|err| err.to_string())
}

/// A job's session has ended before its time: it waits for another one, or is over.
pub(crate) async fn session_ended(party: &Arc<Party>, job: &Arc<Job>, ending: &Ending) {
    let paused = match ending {
        Ending::Interrupted(reason) if lasts(party, &job.description) && job.attempts() > 0 => {
            let step = newest_step(party, job).await;
            let why = format!("{reason}; resumes from step {step} in a new session");
            job.pause(&why, now_s())
        }
        ending => Err(ending.reason().to_owned()),
    };
    match paused {
        Ok(()) => {
            tracing::warn!(reason = ending.reason(), "the session was interrupted");
            consent::paused(party, job).await;
            party.wake.notify_one();
        }
        Err(reason) => {
            tracing::warn!(%reason, "the job failed");
            job.fail(&reason);
        }
    }
}

/// Where a job would be taken up, as far as this party knows.
async fn newest_step(party: &Arc<Party>, job: &Job) -> u64 {
    let holds = holds(party, job).await.unwrap_or_default();
    holds.marks.last().map_or(0, |mark| mark.step)
}

/// What an interrupted job waits for, in words.
pub(crate) async fn waits_for(party: &Arc<Party>, job: &Job, reason: &str) -> String {
    let step = newest_step(party, job).await;
    let mut missing = Vec::new();
    for peer in FOLLOWERS {
        if party.mesh.wait(peer, Duration::ZERO).await.is_err() {
            missing.push(party.name(peer));
        }
    }
    match missing.is_empty() {
        true => format!("{reason}; resumes from step {step}"),
        false => format!(
            "waits for {}, resumes from step {step}",
            missing.join(" and ")
        ),
    }
}

/// Interrupted jobs that have waited for too long, and why they fail.
pub(crate) fn given_up(party: &Party) -> Vec<(Arc<Job>, String)> {
    let given_up = party.jobs.given_up(party.resume_wait).into_iter();
    let reason = |job: &Job| {
        format!(
            "{}: the job was interrupted and could not go on within {} s (resume_wait_s): {}",
            party.label,
            party.resume_wait.as_secs(),
            job.record().note
        )
    };
    given_up.map(|job| (job.clone(), reason(&job))).collect()
}

/// Removes what a job that is over leaves beside its results; and results of jobs that ended long
/// ago.
pub(crate) fn clear(party: &Party, record: &JobRecord, job: JobId) -> Result<(), String> {
    let text = |err: StoreError| err.to_string();
    party.store.forget_checkpoints(job).map_err(text)?;
    if record.state != JobState::Done {
        party.store.forget_results(job).map_err(text)?;
    }
    for old in party.jobs.take_dropped() {
        party.store.forget_results(old).map_err(text)?;
    }
    Ok(())
}

/// Results on the disk, as their requester hears them.
pub(crate) fn heard(party: &Party, job: JobId) -> Result<Vec<Event>, StoreError> {
    let stored = match party.store.results(job) {
        Ok(stored) => stored,
        Err(err @ StoreError::Damaged { .. }) => {
            tracing::error!(%err, "results cannot be read");
            Vec::new()
        }
        Err(err) => return Err(err),
    };
    let events = stored.into_iter().map(|stored| match stored {
        Stored::Output {
            attempt,
            step,
            share,
        } => Event::Output {
            step,
            attempt,
            share,
        },
        Stored::Done { stats, dealer } => Event::Done { stats, dealer },
    });
    Ok(events.collect())
}

/// At start-up: jobs of earlier runs that are done and whose results are still here.
pub(crate) fn restore_done(party: &Party, records: &[JobRecord]) -> Result<(), PartyError> {
    let mut done: Vec<&JobRecord> = records
        .iter()
        .filter(|record| record.state == JobState::Done && record.attempts > 0)
        .collect();
    done.sort_by_key(|record| record.since_s);
    for record in done.iter().rev().take(FINISHED_MAX).rev() {
        let Ok(description) = record.description() else {
            tracing::warn!(job = %record.job, "a job of an earlier release is done; its results are not shown");
            continue;
        };
        let events = heard(party, description.id())?;
        let whole = matches!(events.last(), Some(Event::Done { .. }));
        if whole {
            let job = party.jobs.restore(description, (*record).clone());
            job.remember(events);
        }
    }
    Ok(())
}

/// At start-up: removes what belongs to no job any more.
pub(crate) fn sweep(party: &Party) -> Result<(), PartyError> {
    let jobs = party.jobs.all();
    let going_on = jobs.iter().filter(|job| !job.state().over());
    let going_on: BTreeSet<JobId> = going_on.map(|job| job.id).collect();
    let wanted: BTreeSet<JobId> = jobs.iter().map(|job| job.id).collect();
    party.store.sweep_checkpoints(&going_on)?;
    party.store.sweep_results(&wanted)?;
    Ok(())
}

/// Ends a job well: notes its results' end, and tells its requester.
pub(crate) fn done(
    results: Option<Results>,
    stats: trefoil_consortium::NodeStats,
    dealer: Option<trefoil_consortium::NodeStats>,
) -> Event {
    if let Some(mut results) = results {
        let end = Stored::Done {
            stats: stats.clone(),
            dealer: dealer.clone(),
        };
        if let Err(err) = results.append(&[end]) {
            tracing::error!(%err, "the results of a job are lost with this process");
        }
    }
    Event::Done { stats, dealer }
}

/// A party that missed the end of a job: keeps what the job has left, from its last checkpoint.
pub(crate) async fn keep_late(
    party: &Arc<Party>,
    job: &Arc<Job>,
    mark: Mark,
) -> Result<(), String> {
    let (work_of, description, id) = (party.clone(), job.description.clone(), job.id);
    let work = move || -> Result<_, String> {
        let derived = Derived::new(&description)?;
        let programs = programs_hash(&derived);
        let text = |err: StoreError| err.to_string();
        let last = work_of.store.checkpoint(id, mark, programs).map_err(text)?;
        let stats = last
            .stats
            .clone()
            .ok_or("P0 says that the job is done, but steps are missing here")?;
        if let Some(model) = stage(&work_of, &description, &derived, &last)? {
            model.keep().map_err(text)?;
        }
        let results = work_of
            .store
            .open_results(&work_of.store.lease(id), id, last.results_bytes);
        Ok((results.map_err(text)?, stats))
    };
    let kept = tokio::task::spawn_blocking(work).await;
    let (results, stats) = kept.map_err(|err| format!("this node failed: {err}"))??;
    session::forget_upload(party, job).await;
    job.say(done(Some(results), stats, None));
    Ok(())
}

/// P0 after a start: jobs that another party may not know to be done.
pub(crate) fn conclude_all(party: &Arc<Party>) {
    for job in party.jobs.all() {
        if let Some(mark) = job.record().unconcluded {
            conclude_late(party, &job, mark, [FOLLOWERS[0], FOLLOWERS[1]].into());
        }
    }
}

/// Tells P1 or P2 that a job is done, until it has said that it knows or this process ends.
pub(crate) fn conclude_late(party: &Arc<Party>, job: &Arc<Job>, mark: Mark, mut left: Vec<Peer>) {
    let (party, job) = (party.clone(), job.clone());
    let span = tracing::error_span!("job", job = %job.id);
    let telling = async move {
        while !left.is_empty() {
            let mut still = Vec::new();
            for peer in left {
                match lead::tell_done(&party, &job, peer, mark).await {
                    Ok(()) => tracing::info!(%peer, "has kept the results of a job that is done"),
                    Err(reason) => {
                        tracing::debug!(%peer, %reason, "does not know yet that a job is done");
                        still.push(peer);
                    }
                }
            }
            left = still;
            if !left.is_empty() {
                tokio::time::sleep(CONCLUDE_EVERY).await;
            }
        }
        job.set_unconcluded(None);
        consent::noted(&party, &job).await;
    };
    tokio::spawn(telling.instrument(span));
}

/// P0 alone leads, concludes and asks for what the others hold.
const _: () = assert!(matches!(FOLLOWERS[1], Peer::Party(PartyId::P2)));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_takes_up_the_newest_state_that_all_three_hold() {
        let mark = |session: u8, step| Mark::of(&[session; 32], step);
        let holds = |attempts, marks: &[Mark]| Holds {
            attempts,
            marks: marks.into(),
        };
        let (old, new, newest) = (mark(1, 10), mark(1, 20), mark(1, 30));
        let all = [
            holds(1, &[old, new, newest]),
            holds(2, &[old, new]),
            holds(1, &[new, newest]),
        ];
        let next = next_attempt(&all);
        assert_eq!((next.number, next.resume), (2, Some(new)));
        // The same step of two sessions: the shares do not belong together.
        let other = mark(2, 20);
        let none = [holds(2, &[new]), holds(2, &[other]), holds(2, &[new])];
        let next = next_attempt(&none);
        assert_eq!((next.number, next.resume, next.from()), (2, None, 0));
    }
}
