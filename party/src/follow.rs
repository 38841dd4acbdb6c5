//! A session as P1 or P2 sees it: P0 proposes, this party checks everything itself.

use std::sync::Arc;
use std::time::Duration;

use tracing::Instrument;
use trefoil_consortium::follow::{Following, Next};
use trefoil_consortium::wire::{Acceptance, Lead, Proposal, attributed};
use trefoil_consortium::{Attempt, Ending, SOFTWARE, fresh_nonce};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::MsgStream;

use crate::consent::{self, Standing};
use crate::daemon::Party;
use crate::desk::{self, JobState};
use crate::files::now_s;
use crate::halt::Halt;
use crate::jobs::Job;
use crate::prepare::prepare;
use crate::resume;
use crate::serve;
use crate::session::{self, Session};

/// Answers a proposal and takes part in its session. An error is for the log.
pub(crate) async fn follow(party: &Arc<Party>, stream: MsgStream) -> Result<(), String> {
    if party.me == PartyId::P0 {
        return Err("P0 follows nobody".into());
    }
    let stopping = party.stopping.subscribe();
    let (mut following, proposal) = Following::receive(stream, party.wait(), stopping).await?;
    let id = proposal.job.id();
    let span = tracing::error_span!("job", job = %id);
    async {
        let Some(job) = party.jobs.get(&id) else {
            let reason = stranger(party, &proposal).await;
            following.refuse(&reason).await;
            return Err(reason);
        };
        if job.state() == JobState::Running && resume::lasts(party, &job.description) {
            // P0 has lost the session that still runs here, or has just ended it.
            let reason = format!("{}: an earlier session of the job is ending", party.me);
            session::abort_job(party, id, "P0 has begun the job anew");
            following.busy(&reason).await;
            return Err(reason);
        }
        let stopping = party.stopping.borrow().clone();
        if let Some(reason) = stopping {
            let reason = attributed(party.me, &reason);
            following.busy(&reason).await;
            return Err(reason);
        }
        let standing = consent::standing(party, &job);
        if let Standing::Refuses(reason) = standing {
            let reason = attributed(party.me, &reason);
            following.refuse(&reason).await;
            if matches!(job.state(), JobState::Held | JobState::Waiting) {
                job.fail(&reason);
                consent::ended(party, &job).await;
            }
            return Err(reason);
        }
        let holds = match standing {
            Standing::Consents => Some(resume::holds(party, &job).await?),
            _ => None,
        };
        let attempts = holds.as_ref().map_or(0, |holds| holds.attempts);
        let attempt = match following.consent(holds).await? {
            Next::Prepare(attempt) if attempt.number >= attempts => attempt,
            Next::Prepare(_) => {
                let reason = format!("{}: P0 proposes an attempt that was made", party.me);
                following.refuse(&reason).await;
                return Err(reason);
            }
            Next::Keep(mark) => {
                let kept = resume::keep_late(party, &job, mark).await;
                match kept {
                    Ok(()) => following.concluded().await,
                    Err(reason) => {
                        let reason = attributed(party.me, &reason);
                        following.ended(&Ending::Over(reason.clone())).await;
                        job.fail(&reason);
                    }
                }
                consent::ended(party, &job).await;
                return Ok(());
            }
            Next::Later => return Ok(()),
            Next::Over(reason) => {
                job.fail(&reason);
                consent::ended(party, &job).await;
                return Ok(());
            }
        };
        if !job.begin(now_s()) {
            let reason = format!("{}: job {id} runs or has run already", party.me);
            following.refuse(&reason).await;
            return Err(reason);
        }
        let _active = party.active.enter();
        let led = run(party, &job, attempt, following).await;
        consent::ended(party, &job).await;
        led
    }
    .instrument(span)
    .await
}

/// Why a job that this party does not know is refused.
async fn stranger(party: &Arc<Party>, proposal: &Proposal) -> String {
    let id = proposal.job.id();
    let home = party.home.clone();
    let past = tokio::task::spawn_blocking(move || desk::record(&home, &id));
    if let Ok(Ok(Some(past))) = past.await {
        return format!(
            "{}: job {id} is {} here: {}",
            party.me, past.state, past.note
        );
    }
    let requester = match party.consortium.now().member(proposal.job.requester) {
        Some(member) => member.name.clone(),
        None => proposal.job.requester.to_string(),
    };
    format!(
        "{} has not received job {id} from its requester {requester} itself",
        party.me
    )
}

/// A job that all parties consent to, from its preparation to its end.
async fn run(
    party: &Arc<Party>,
    job: &Arc<Job>,
    attempt: Attempt,
    mut following: Following,
) -> Result<(), String> {
    match take_part(party, job, attempt, &mut following).await {
        Ok(()) => {
            consent::ended(party, job).await;
            following.concluded().await;
            Ok(())
        }
        Err(Failure::Refused(reason)) => {
            let reason = attributed(party.me, &reason);
            following.refuse(&reason).await;
            resume::session_ended(party, job, &Ending::Over(reason.clone())).await;
            Err(reason)
        }
        Err(Failure::Ended(ending)) => {
            following.ended(&ending).await;
            let ending = match ending {
                Ending::Interrupted(_) if resume::lasts(party, &job.description) => {
                    following.verdict(ending).await
                }
                ending => ending,
            };
            resume::session_ended(party, job, &ending).await;
            Err(ending.reason().to_owned())
        }
    }
}

enum Failure {
    /// Nothing has begun.
    Refused(String),
    Ended(Ending),
}

async fn take_part(
    party: &Arc<Party>,
    job: &Arc<Job>,
    attempt: Attempt,
    following: &mut Following,
) -> Result<(), Failure> {
    let ended = Failure::Ended;
    // What is missing now may be there later; a job that has not begun yet ends as it always did.
    let missing = |reason: String| match job.attempts() {
        0 => Failure::Refused(reason),
        _ => Failure::Ended(Ending::Interrupted(attributed(party.me, &reason))),
    };
    let slot = serve::slot(party, job).map_err(Failure::Refused)?;
    let Ok(_slot) = tokio::time::timeout(party.short_wait(), slot.lock()).await else {
        return Err(missing("busy with another session".into()));
    };
    let prepared = match prepare(party, job, attempt).await {
        Ok(prepared) => prepared,
        Err(Ending::Over(reason)) => return Err(Failure::Refused(reason)),
        Err(Ending::Interrupted(reason)) => return Err(missing(reason)),
    };
    let links = session::links(party).await.map_err(missing)?;
    let acceptance = Acceptance {
        software: SOFTWARE.into(),
        job: job.id,
        programs: prepared.derived.hashes.clone(),
        model: prepared.model,
        coins: None,
        nonce: fresh_nonce().map_err(Failure::Refused)?,
    };
    let id = following
        .accept(
            acceptance,
            &party.core_hash,
            &job.id,
            &attempt,
            party.me.index(),
        )
        .await
        .map_err(ended)?;
    let tray = party.keys.open(id);
    following.ready().await.map_err(ended)?;
    let wall = Duration::from_secs(job.description.limits.wall_time_s);
    let (says, mut said) = tokio::sync::mpsc::unbounded_channel();
    let halt = Halt::new(attempt.from(), says);
    // The dealer hears from P0 alone how the parties have decided.
    let (decided, _) = tokio::sync::mpsc::unbounded_channel();
    let session = Session {
        id,
        job: job.clone(),
        prepared,
        links,
        tray,
        halt: halt.clone(),
        decided,
    };
    let hears = |lead: &Lead| match lead {
        Lead::Written(mark) => {
            resume::written_by_all(party, job.id, *mark);
            true
        }
        lead => halt.hear(lead),
    };
    let outcome = {
        let running = session::run(party, session);
        tokio::pin!(running);
        tokio::select! {
            outcome = &mut running => outcome.map_err(ended)?,
            ending = following.abandoned(&mut said, hears) => {
                session::abort_job(party, job.id, ending.reason());
                return Err(ended(ending));
            }
        }
    };
    following
        .finished(outcome.stats.clone(), wall, &mut said, hears)
        .await
        .map_err(ended)?;
    session::keep(party, job, outcome.model)
        .await
        .map_err(|reason| ended(Ending::Over(reason)))?;
    job.say(resume::done(outcome.results, outcome.stats, None));
    Ok(())
}

/// Which peer a session's stream of P0 goes to.
pub(crate) const FOLLOWERS: [Peer; 3] = [
    Peer::Party(PartyId::P1),
    Peer::Party(PartyId::P2),
    Peer::Dealer,
];
