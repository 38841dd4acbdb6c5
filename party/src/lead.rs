//! P0's side of a session: proposes it to the other nodes, confirms it when all accept, starts it,
//! and tells everybody how it ended. It has no power beyond the order of jobs.

use std::sync::Arc;
use std::time::Duration;

use tracing::Instrument;
use trefoil_consortium::wire::{
    Acceptance, CONTROL_MAX_BYTES, CONTROL_VERSION, Event, Follow, Lead, NodeStats, Proposal,
    attributed, clip_reason, reported,
};
use trefoil_consortium::{Nonce, SOFTWARE, SessionId, fresh_nonce, session_id};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::{MsgStream, StreamKind};

use crate::daemon::Party;
use crate::follow::FOLLOWERS;
use crate::jobs::Job;
use crate::prepare::{Prepared, prepare};
use crate::session::{self, Session};

/// One follower's stream.
struct Follower {
    peer: Peer,
    stream: MsgStream,
    wait: Duration,
}

/// Leads one job to its end.
pub(crate) async fn lead(party: &Arc<Party>, job: Arc<Job>) {
    if !job.begin() {
        return;
    }
    let span = tracing::error_span!("job", job = %job.id);
    async {
        let _slot = party.slot.lock().await;
        if let Err(reason) = try_lead(party, &job).await {
            tracing::warn!(%reason, "the job failed");
            job.fail(&reason);
        }
    }
    .instrument(span)
    .await;
}

async fn try_lead(party: &Arc<Party>, job: &Arc<Job>) -> Result<(), String> {
    let prepared = prepare(party, &job.description)
        .await
        .map_err(|reason| format!("{}: {reason}", party.me))?;
    let led = propose(party, job, prepared).await;
    if led.is_err() {
        session::forget_upload(party, job).await;
    }
    led
}

/// Proposes a prepared job to the followers and takes it to its end.
async fn propose(party: &Arc<Party>, job: &Arc<Job>, prepared: Prepared) -> Result<(), String> {
    let links = session::links(party).await?;
    let nonce = fresh_nonce()?;
    let proposal = Proposal {
        version: CONTROL_VERSION,
        software: SOFTWARE.into(),
        job: job.description.clone(),
        attempt: 0,
        nonce,
    };
    let [p1, p2, dealer] =
        FOLLOWERS.map(|peer| Follower::open(party, peer, links.of(peer), &proposal));
    let mut followers = match tokio::join!(p1, p2, dealer) {
        (Ok(p1), Ok(p2), Ok(dealer)) => [p1, p2, dealer],
        (p1, p2, dealer) => {
            let mut reasons = Vec::new();
            let mut opened = Vec::new();
            for follower in [p1, p2, dealer] {
                match follower {
                    Ok(follower) => opened.push(follower),
                    Err(reason) => reasons.push(reason),
                }
            }
            let reason = reasons.join("; ");
            abandon(&mut opened, &reason).await;
            return Err(reason);
        }
    };
    let led = agree_and_run(party, job, prepared, links, nonce, &mut followers).await;
    match led {
        Ok(outcome) => {
            for follower in &mut followers {
                // It has kept what it has; only the word about it is missing.
                if let Err(reason) = follower.expect_concluded().await {
                    tracing::warn!(peer = %follower.peer, %reason, "no word of its conclusion");
                }
            }
            job.say(outcome);
            Ok(())
        }
        Err(reason) => {
            abandon(&mut followers, &reason).await;
            Err(reason)
        }
    }
}

/// From the acceptances to the conclusion; returns the last event.
async fn agree_and_run(
    party: &Arc<Party>,
    job: &Arc<Job>,
    prepared: Prepared,
    links: session::Links,
    nonce: Nonce,
    followers: &mut [Follower; 3],
) -> Result<Event, String> {
    let mut nonces = [nonce; 4];
    {
        let [p1, p2, dealer] = &mut *followers;
        let answers = tokio::try_join!(p1.accepted(), p2.accepted(), dealer.accepted())?;
        for (place, (peer, answer)) in FOLLOWERS
            .into_iter()
            .zip([answers.0, answers.1, answers.2])
            .enumerate()
        {
            check_acceptance(job, &prepared, peer, &answer)?;
            nonces[place + 1] = answer.nonce;
        }
    }
    let id = session_id(&party.core_hash, &job.id, 0, &nonces);
    let tray = party.keys.open(id);
    everybody(
        followers,
        &Lead::Confirm {
            nonces,
            session: id,
        },
    )
    .await?;
    for follower in followers.iter_mut() {
        follower.expect_ready().await?;
    }
    everybody(followers, &Lead::Go).await?;
    let session = Session {
        id,
        job: job.clone(),
        prepared,
        links,
        tray,
    };
    let running = session::run(party, session);
    tokio::pin!(running);
    let (outcome, reports) = {
        let [p1, p2, dealer] = &mut *followers;
        let reports = async { tokio::try_join!(p1.report(), p2.report(), dealer.report()) };
        tokio::pin!(reports);
        tokio::select! {
            outcome = &mut running => {
                let outcome = outcome?;
                let late = |_| format!("not all nodes finished within {} ms", party.wait().as_millis());
                (outcome, tokio::time::timeout(party.wait(), reports).await.map_err(late)??)
            }
            reports = &mut reports => match reports {
                Ok(reports) => (running.await?, reports),
                Err(reason) => {
                    session::abort(party, &reason);
                    return Err(reason);
                }
            },
        }
    };
    session::keep(party, job, outcome.model).await?;
    everybody(followers, &Lead::Conclude).await?;
    Ok(Event::Done {
        stats: outcome.stats,
        dealer: Some(reports.2),
    })
}

async fn everybody(followers: &mut [Follower; 3], message: &Lead) -> Result<(), String> {
    for follower in followers {
        follower.say(message).await?;
    }
    Ok(())
}

async fn abandon(followers: &mut [Follower], reason: &str) {
    for follower in followers {
        // A follower that is gone needs no telling.
        let _ = follower.say(&Lead::Abandon(clip_reason(reason))).await;
    }
}

/// What another node derived against what this one did.
fn check_acceptance(
    job: &Job,
    prepared: &Prepared,
    peer: Peer,
    theirs: &Acceptance,
) -> Result<(), String> {
    let versions = || format!("(software here {SOFTWARE}, at {peer} {})", theirs.software);
    if theirs.job != job.id {
        return Err(format!(
            "{peer} computes job hash {}, P0 {} {}",
            theirs.job,
            job.id,
            versions()
        ));
    }
    let ours = &prepared.derived.hashes;
    if theirs.programs != *ours {
        let at = ours.iter().zip(&theirs.programs).position(|(a, b)| a != b);
        let what = at.map_or(
            format!("{} programs, P0 {}", theirs.programs.len(), ours.len()),
            |at| {
                let hash = |hashes: &[[u8; 32]]| trefoil_consortium::hex(&hashes[at]);
                format!(
                    "hash {} for program {at}, P0 {}",
                    hash(&theirs.programs),
                    hash(ours)
                )
            },
        );
        return Err(format!("{peer} derives {what} {}", versions()));
    }
    // The dealer holds no model.
    let differs = peer != Peer::Dealer && theirs.model != prepared.model;
    if differs {
        let name = |session: &Option<SessionId>| match session {
            Some(session) => format!("session {}", trefoil_consortium::hex(&session[..8])),
            None => "none".into(),
        };
        return Err(format!(
            "{peer}'s shares of model {} come from {}, P0's from {}: train it again",
            job.description.model().unwrap_or_default(),
            name(&theirs.model),
            name(&prepared.model)
        ));
    }
    Ok(())
}

impl Follower {
    async fn open(
        party: &Party,
        peer: Peer,
        link: &trefoil_transport::Link,
        proposal: &Proposal,
    ) -> Result<Follower, String> {
        let opening = async {
            let mut stream = link.open(StreamKind::Control, [0; 32]).await?;
            stream.send(proposal).await?;
            Ok::<_, trefoil_transport::TransportError>(stream)
        };
        match tokio::time::timeout(party.wait(), opening).await {
            Ok(Ok(stream)) => Ok(Follower {
                peer,
                stream,
                wait: party.wait(),
            }),
            Ok(Err(err)) => Err(format!("{peer}: {err}")),
            Err(_) => Err(format!("{peer} takes no proposals")),
        }
    }

    async fn say(&mut self, message: &Lead) -> Result<(), String> {
        match tokio::time::timeout(self.wait, self.stream.send(message)).await {
            Ok(sent) => sent.map_err(|err| format!("{}: {err}", self.peer)),
            Err(_) => Err(format!("{} takes no messages", self.peer)),
        }
    }

    /// The next answer; no deadline of its own.
    async fn next(&mut self) -> Result<Follow, String> {
        let peer = self.peer;
        match self.stream.recv::<Follow>(CONTROL_MAX_BYTES).await {
            Ok(Some(Follow::Refuse(reason))) => Err(format!(
                "refused by {}",
                attributed(peer, &clip_reason(&reason))
            )),
            // It may pass on what another node said: that is its word, not the other's.
            Ok(Some(Follow::Failed(reason))) => Err(clip_reason(&reported(peer, &reason))),
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(format!("{peer} ended the session's stream without a word")),
            Err(err) => Err(format!("{peer}: {err}")),
        }
    }

    async fn next_in_time(&mut self, what: &str) -> Result<Follow, String> {
        let (peer, wait) = (self.peer, self.wait);
        match tokio::time::timeout(wait, self.next()).await {
            Ok(answer) => answer,
            Err(_) => Err(format!(
                "{peer} did not send {what} within {} ms",
                wait.as_millis()
            )),
        }
    }

    async fn accepted(&mut self) -> Result<Acceptance, String> {
        match self.next_in_time("its acceptance").await? {
            Follow::Accept(acceptance) => Ok(acceptance),
            other => Err(format!(
                "{} sent {other:?} where its acceptance belongs",
                self.peer
            )),
        }
    }

    async fn expect_ready(&mut self) -> Result<(), String> {
        match self.next_in_time("its readiness").await? {
            Follow::Ready => Ok(()),
            other => Err(format!(
                "{} sent {other:?} where its readiness belongs",
                self.peer
            )),
        }
    }

    /// Waits as long as the session runs.
    async fn report(&mut self) -> Result<NodeStats, String> {
        match self.next().await? {
            Follow::Finished(stats) => Ok(stats),
            other => Err(format!("{} sent {other:?} during the session", self.peer)),
        }
    }

    async fn expect_concluded(&mut self) -> Result<(), String> {
        match self.next_in_time("its conclusion").await? {
            Follow::Concluded => Ok(()),
            other => Err(format!(
                "{} sent {other:?} where its conclusion belongs",
                self.peer
            )),
        }
    }
}

/// P0 leads; the constant keeps the places of nonces and followers in one order.
const _: () = assert!(matches!(FOLLOWERS[0], Peer::Party(PartyId::P1)));
