//! A session as P1 or P2 sees it: P0 proposes, this party checks everything itself.

use std::sync::Arc;
use std::time::Duration;

use tracing::Instrument;
use trefoil_consortium::follow::Following;
use trefoil_consortium::wire::{Acceptance, Event, Proposal, attributed};
use trefoil_consortium::{SOFTWARE, fresh_nonce};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::MsgStream;

use crate::consent::{self, Standing};
use crate::daemon::Party;
use crate::desk::{self, JobState};
use crate::files::now_s;
use crate::jobs::Job;
use crate::prepare::prepare;
use crate::session::{self, Session};

/// Answers a proposal and takes part in its session. An error is for the log.
pub(crate) async fn follow(party: &Arc<Party>, stream: MsgStream) -> Result<(), String> {
    if party.me == PartyId::P0 {
        return Err("P0 follows nobody".into());
    }
    let (mut following, proposal) = Following::receive(stream, party.wait()).await?;
    let id = proposal.job.id();
    let span = tracing::error_span!("job", job = %id);
    async {
        let Some(job) = party.jobs.get(&id) else {
            let reason = stranger(party, &proposal).await;
            following.refuse(&reason).await;
            return Err(reason);
        };
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
        let consents = matches!(standing, Standing::Consents);
        match following.consent(consents).await? {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(reason) => {
                job.fail(&reason);
                consent::ended(party, &job).await;
                return Ok(());
            }
        }
        if !job.begin(now_s()) {
            let reason = format!("{}: job {id} runs or has run already", party.me);
            following.refuse(&reason).await;
            return Err(reason);
        }
        let led = run(party, &job, &proposal, following).await;
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
    proposal: &Proposal,
    mut following: Following,
) -> Result<(), String> {
    match take_part(party, job, proposal, &mut following).await {
        Ok(()) => {
            following.concluded().await;
            Ok(())
        }
        Err(Failure::Refused(reason)) => {
            let reason = attributed(party.me, &reason);
            following.refuse(&reason).await;
            job.fail(&reason);
            Err(reason)
        }
        Err(Failure::Failed(reason)) => {
            following.failed(&reason).await;
            session::forget_upload(party, job).await;
            job.fail(&reason);
            Err(reason)
        }
    }
}

enum Failure {
    Refused(String),
    Failed(String),
}

async fn take_part(
    party: &Arc<Party>,
    job: &Arc<Job>,
    proposal: &Proposal,
    following: &mut Following,
) -> Result<(), Failure> {
    let refused = Failure::Refused;
    let Ok(_slot) = tokio::time::timeout(party.short_wait(), party.slot.lock()).await else {
        return Err(refused("busy with another session".into()));
    };
    let prepared = prepare(party, job).await.map_err(refused)?;
    let links = session::links(party).await.map_err(refused)?;
    let acceptance = Acceptance {
        software: SOFTWARE.into(),
        job: job.id,
        programs: prepared.derived.hashes.clone(),
        model: prepared.model,
        nonce: fresh_nonce().map_err(refused)?,
    };
    let failed = Failure::Failed;
    let id = following
        .accept(
            acceptance,
            &party.core_hash,
            &job.id,
            proposal.attempt,
            party.me.index(),
        )
        .await
        .map_err(failed)?;
    let tray = party.keys.open(id);
    following.ready().await.map_err(failed)?;
    let wall = Duration::from_secs(job.description.limits.wall_time_s);
    let session = Session {
        id,
        job: job.clone(),
        prepared,
        links,
        tray,
    };
    let outcome = {
        let running = session::run(party, session);
        tokio::pin!(running);
        tokio::select! {
            outcome = &mut running => outcome.map_err(failed)?,
            reason = following.abandoned() => {
                session::abort(party, &reason);
                return Err(failed(reason));
            }
        }
    };
    following
        .finished(outcome.stats.clone(), wall)
        .await
        .map_err(failed)?;
    session::keep(party, job, outcome.model)
        .await
        .map_err(failed)?;
    job.say(Event::Done {
        stats: outcome.stats,
        dealer: None,
    });
    Ok(())
}

/// Which peer a session's stream of P0 goes to.
pub(crate) const FOLLOWERS: [Peer; 3] = [
    Peer::Party(PartyId::P1),
    Peer::Party(PartyId::P2),
    Peer::Dealer,
];
