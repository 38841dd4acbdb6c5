//! Consent at this party: what the policy says of a job, the decisions of the operator, jobs that
//! nobody approves in time; and the word of all that in the home and in the audit log.
//!
//! What is approved is the job's hash under the consortium's core. Rules are in `policy/`, files in `desk.rs`; P0's asking for
//! the others' consent is in `lead.rs`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use trefoil_consortium::{Attempt, JobDescription, JobId, MemberEntry, SessionId, hex};
use trefoil_models::JobKind;
use trefoil_protocol::party::PartyId;

use crate::daemon::{Party, PartyError};
use crate::desk::{self, Choice, Decision, JobRecord, JobState};
use crate::files::now_s;
use crate::jobs::{Job, known_already};
use crate::{lead, resume, serve, session};

/// How often the party looks for decisions.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Where this party stands on a job.
pub(crate) enum Standing {
    /// It may run.
    Consents,
    /// It waits for a person.
    Waits,
    /// It may not, and why.
    Refuses(String),
}

/// Work on the home's files, away from the thread of the links.
async fn on_home<T: Send + 'static>(
    party: &Arc<Party>,
    work: impl FnOnce(&Party) -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let party = party.clone();
    let done = tokio::task::spawn_blocking(move || work(&party)).await;
    done.map_err(|err| format!("this node failed: {err}"))?
}

/// Writes where a job stands. Two of these at once: the later state stays.
fn keep_record(party: &Party, job: &Job) -> Result<(), String> {
    let _one = party
        .desk
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    desk::write_record(&party.home, &job.record()).map_err(|err| err.to_string())
}

/// Takes a job from its requester: policy, book, audit log, home, in this order.
pub(crate) async fn submit(
    party: &Arc<Party>,
    member: &MemberEntry,
    description: JobDescription,
) -> Result<JobId, String> {
    let ruling = serve::rule(party, &description, &member.name)?;
    let id = description.id();
    let past = on_home(party, move |party| {
        desk::record(&party.home, &id).map_err(|err| err.to_string())
    });
    // A withdrawn job has not run: it may come again.
    if past
        .await?
        .is_some_and(|past| past.state != JobState::Withdrawn)
    {
        return Err(known_already(&id));
    }
    let words = description.describe(&member.name);
    let job = party
        .jobs
        .submit(description, &member.name, &ruling, now_s())?;
    job.under(&party.core_hash);
    tracing::info!(job = %id, rule = %ruling.rule, held = ruling.ask, "submitted by {}:\n{words}", member.name);
    let noted = {
        let (job, name) = (job.clone(), member.name.clone());
        on_home(party, move |party| {
            let who = Some((name.as_str(), job.description.requester));
            let what = match ruling.ask {
                true => "job_held",
                false => "job_allowed",
            };
            let details =
                json!({"name": job.description.name, "rule": ruling.rule, "words": words});
            party
                .audit
                .append(what, who, Some(id), details)
                .map_err(|err| err.to_string())?;
            keep_record(party, &job)?;
            desk::prune(&party.home).map_err(|err| err.to_string())
        })
    };
    if let Err(reason) = noted.await {
        party.jobs.forget(&job);
        return Err(format!(
            "{}: the job could not be noted: {reason}",
            party.label
        ));
    }
    job.noted();
    party.wake.notify_one();
    Ok(id)
}

/// Whether a job may run here now.
pub(crate) fn standing(party: &Party, job: &Job) -> Standing {
    let record = job.record();
    if record.state == JobState::Running {
        return Standing::Refuses(format!("{}: job {} runs already", party.me, job.id));
    }
    if record.state.over() {
        return Standing::Refuses(format!(
            "{}: job {} runs or has run already: it is {}, {}",
            party.me, job.id, record.state, record.note
        ));
    }
    match permitted(party, job) {
        Ok(true) => Standing::Consents,
        Ok(false) => Standing::Waits,
        Err(reason) => Standing::Refuses(reason),
    }
}

/// What policy and operator say: `false` where a person still has to approve.
pub(crate) fn permitted(party: &Party, job: &Job) -> Result<bool, String> {
    let consortium = party.consortium.now();
    let Some(requester) = consortium.member(job.description.requester) else {
        return Err(format!(
            "requester {} is no member of the consortium",
            job.description.requester
        ));
    };
    let ruling = match job.attempts() {
        0 => serve::rule(party, &job.description, &requester.name)?,
        _ => party.policy.rule_again(&job.description, &requester.name)?,
    };
    Ok(!ruling.ask || job.approved())
}

/// Notes that a job starts, before anything of it can be revealed: audit log, day's predictions,
/// home.
pub(crate) async fn started(
    party: &Arc<Party>,
    job: &Arc<Job>,
    session: SessionId,
    attempt: Attempt,
) -> Result<(), String> {
    let job = job.clone();
    let noted = on_home(party, move |party| {
        let requester = job.requester();
        let who = Some((requester.as_str(), job.description.requester));
        let reveals = match job.description.kind {
            JobKind::Benchmark { .. } => "nothing but results on public numbers",
            _ => "what further entries say",
        };
        let mut details = json!({"session": hex(&session), "reveals": reveals});
        let first = job.attempts() == 0;
        if !first {
            details["attempt"] = attempt.number.into();
            details["from_step"] = attempt.from().into();
        }
        let written = party
            .audit
            .append("job_started", who, Some(job.id), details);
        written.map_err(|err| err.to_string())?;
        if first {
            let counted = party.policy.count(&job.description, now_s());
            counted.map_err(|err| err.to_string())?;
        }
        job.attempted(&attempt);
        keep_record(party, &job)
    });
    noted
        .await
        .map_err(|reason| format!("{}: {reason}", party.me))
}

/// Notes once that a job is over; does nothing for one that is not.
pub(crate) async fn ended(party: &Arc<Party>, job: &Arc<Job>) {
    if !job.take_end() {
        return;
    }
    if job.attempts() > 0 {
        session::forget_upload(party, job).await;
    }
    let noted = {
        let job = job.clone();
        on_home(party, move |party| {
            let record = job.record();
            let who = Some((record.requester.as_str(), record.pin));
            let details = json!({"state": record.state, "note": record.note});
            let written = party.audit.append("job_ended", who, Some(job.id), details);
            // The home must know that it is over even where the log cannot say so.
            let kept = keep_record(party, &job).and(written.map_err(|err| err.to_string()));
            kept.and(resume::clear(party, &record, job.id))
        })
    };
    if let Err(reason) = noted.await {
        tracing::error!(job = %job.id, %reason, "the end of a job could not be noted");
    }
}

/// Notes that a job's session was interrupted, and that it waits for another one.
pub(crate) async fn paused(party: &Arc<Party>, job: &Arc<Job>) {
    let job = job.clone();
    let noted = on_home(party, move |party| {
        let record = job.record();
        let who = Some((record.requester.as_str(), record.pin));
        let details = json!({"note": record.note});
        let written = party
            .audit
            .append("job_interrupted", who, Some(job.id), details);
        keep_record(party, &job).and(written.map_err(|err| err.to_string()))
    });
    if let Err(reason) = noted.await {
        tracing::error!(%reason, "that a job was interrupted could not be noted");
    }
}

/// Notes a change of what a job waits for.
pub(crate) async fn noted(party: &Arc<Party>, job: &Arc<Job>) {
    let job = job.clone();
    if let Err(reason) = on_home(party, move |party| keep_record(party, &job)).await {
        tracing::warn!(%reason, "what a job waits for could not be noted");
    }
}

/// Takes up the jobs of an earlier run that were not over. The keys of one that ran are gone: it
/// goes on in another session, or is over.
pub(crate) fn restore(party: &Party) -> Result<(), PartyError> {
    desk::open(&party.home)?;
    let records = desk::records(&party.home)?;
    resume::restore_done(party, &records)?;
    for mut record in records {
        if record.state.over() {
            continue;
        }
        let failed = |detail: String| PartyError::Setup(detail);
        let description = record.description().map_err(failed)?;
        let consortium = party.consortium.now();
        let member = consortium.member(description.requester);
        let member = member.map(|member| member.name.clone());
        let begun = record.state == JobState::Running || record.attempts > 0;
        let ruling = match &member {
            _ if begun && !resume::lasts(party, &description) => {
                Err(format!("{} ended while the job ran", party.label))
            }
            None => Err(format!("{} is no member any more", record.requester)),
            Some(name) if begun => party.policy.rule_again(&description, name),
            Some(name) => serve::rule(party, &description, name),
        };
        match ruling {
            Ok(ruling) => {
                let void = record.under(&party.core_hash);
                record.state = match ruling.ask && record.approved_by.is_empty() {
                    true => JobState::Held,
                    false => JobState::Waiting,
                };
                record.rule = ruling.rule;
                if begun {
                    record.note = format!("{} was started again", party.label);
                }
                if void {
                    record.note =
                        "it was approved under another core of the consortium: look at it again"
                            .into();
                }
                tracing::info!(job = %record.job, state = %record.state, "a job of an earlier run");
                desk::write_record(&party.home, &record)?;
                let job = party.jobs.restore(description, record);
                if begun {
                    job.remember(resume::heard(party, job.id)?);
                }
            }
            Err(reason) => bury(party, &mut record, description.id(), reason)?,
        }
    }
    resume::sweep(party)
}

/// Ends a job of an earlier run.
fn bury(
    party: &Party,
    record: &mut JobRecord,
    id: JobId,
    reason: String,
) -> Result<(), PartyError> {
    tracing::info!(job = %record.job, %reason, "a job of an earlier run is over");
    let who = Some((record.requester.as_str(), record.pin));
    let details = json!({"state": JobState::Failed, "note": reason});
    party.audit.append("job_ended", who, Some(id), details)?;
    record.state = JobState::Failed;
    record.since_s = now_s();
    record.note = reason;
    Ok(desk::write_record(&party.home, record)?)
}

/// Looks for decisions and for jobs that have waited too long, for ever.
pub(crate) async fn watch_desk(party: &Arc<Party>) {
    let mut troubled = String::new();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        for job in party
            .jobs
            .expired(now_s(), party.policy.approval_timeout_s())
        {
            let waited_s = party.policy.approval_timeout_s();
            let reason = match job.state() {
                JobState::Held => format!(
                    "{}: nobody approved the job within {waited_s} s",
                    party.label
                ),
                _ => format!(
                    "{}: P0 has not started the job within {waited_s} s: not all parties consent to it",
                    party.label
                ),
            };
            end(party, &job, JobState::Expired, &reason).await;
        }
        for (job, reason) in resume::given_up(party) {
            end(party, &job, JobState::Failed, &reason).await;
        }
        let found = on_home(party, |party| {
            desk::decisions(&party.home).map_err(|err| err.to_string())
        });
        let mut trouble = String::new();
        match found.await {
            Ok(decisions) => {
                for (path, decision, who) in decisions {
                    if let Err(reason) = take(party, path, decision, who).await {
                        trouble = reason;
                    }
                }
            }
            Err(reason) => trouble = reason,
        }
        // The same trouble comes every second.
        if !trouble.is_empty() && trouble != troubled {
            tracing::error!(reason = %trouble, "decisions cannot be taken; trying again every second");
        }
        troubled = trouble;
    }
}

/// Does what an operator has decided. An error leaves the decision for later.
async fn take(
    party: &Arc<Party>,
    path: PathBuf,
    decision: Decision,
    who: String,
) -> Result<(), String> {
    let jobs = party.jobs.all();
    let job = jobs
        .into_iter()
        .find(|job| job.id.to_string() == decision.job);
    let state = job.as_ref().map(|job| job.state());
    match (job, state, decision.choice) {
        (Some(job), Some(JobState::Held), Choice::Approve)
            if decision.core != hex(&party.core_hash) =>
        {
            tracing::warn!(job = %job.id, by = %who, "an approval under another core of the consortium is without effect");
        }
        (Some(job), Some(JobState::Held), Choice::Approve) => {
            log_decision(party, "job_approved", &job, &decision, &who).await?;
            job.approve(&who, now_s());
            tracing::info!(job = %job.id, by = %who, "approved");
            let keep = job.clone();
            on_home(party, move |party| keep_record(party, &keep)).await?;
            party.wake.notify_one();
        }
        (Some(job), Some(JobState::Waiting), Choice::Approve) if job.approved() => {
            // The file was left because the home could not be written.
            on_home(party, move |party| keep_record(party, &job)).await?;
        }
        (Some(job), Some(JobState::Held), Choice::Deny) => {
            log_decision(party, "job_denied", &job, &decision, &who).await?;
            let reason = words(party, "denied", &decision.reason);
            end(party, &job, JobState::Denied, &reason).await;
        }
        (Some(job), Some(JobState::Held | JobState::Waiting), Choice::Cancel) => {
            log_decision(party, "job_cancelled", &job, &decision, &who).await?;
            let reason = words(party, "cancelled", &decision.reason);
            end(party, &job, JobState::Cancelled, &reason).await;
        }
        (Some(job), Some(JobState::Running), Choice::Cancel) => {
            log_decision(party, "job_cancelled", &job, &decision, &who).await?;
            let reason = words(party, "cancelled", &decision.reason);
            tracing::info!(job = %job.id, %reason, "cancelled while it runs");
            // The order counts: a session that begins now looks for the word after it can be ended.
            job.cancel(&reason);
            session::abort_job(party, job.id, &reason);
        }
        (_, state, choice) => {
            let state = state.map_or("unknown".into(), |state| state.to_string());
            tracing::warn!(job = %decision.job, ?choice, %state, by = %who, "a decision without effect");
        }
    }
    on_home(party, move |_| {
        desk::taken(&path).map_err(|err| err.to_string())
    })
    .await
}

async fn log_decision(
    party: &Arc<Party>,
    what: &'static str,
    job: &Job,
    decision: &Decision,
    who: &str,
) -> Result<(), String> {
    let (id, who, reason) = (job.id, who.to_owned(), decision.reason.clone());
    on_home(party, move |party| {
        let who = Some((who.as_str(), party.signer.pin()));
        let written = party
            .audit
            .append(what, who, Some(id), json!({"reason": reason}));
        written.map_err(|err| err.to_string())
    })
    .await
}

/// `P1 (west): denied by its operator: REASON`.
fn words(party: &Party, what: &str, reason: &str) -> String {
    let colon = if reason.is_empty() { "" } else { ": " };
    format!("{}: {what} by its operator{colon}{reason}", party.label)
}

/// Ends a job that has not started; P0 tells the other parties.
pub(crate) async fn end(party: &Arc<Party>, job: &Arc<Job>, how: JobState, reason: &str) {
    if !job.end(how, reason) {
        return;
    }
    // It may have begun while the decision was written down: then its session ends too.
    session::abort_job(party, job.id, reason);
    tracing::info!(job = %job.id, state = %how, %reason, "a job ended while it waited");
    ended(party, job).await;
    if party.me == PartyId::P0 {
        let (party, job, reason) = (party.clone(), job.clone(), reason.to_owned());
        tokio::spawn(async move { lead::tell_over(&party, &job, &reason).await });
    }
}
