//! P0's side of a session: proposes it to the other nodes, confirms it when all accept, starts it,
//! and tells everybody how it ended. It has no power beyond the order of jobs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::Instrument;
use trefoil_consortium::wire::{
    Acceptance, CONTROL_MAX_BYTES, CONTROL_VERSION, Event, Follow, Lead, NodeStats, Proposal,
    attributed, clip_reason, reported,
};
use trefoil_consortium::{Nonce, SOFTWARE, SessionId, fresh_nonce, session_id};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::{MsgStream, StreamKind};

use crate::consent;
use crate::daemon::Party;
use crate::files::now_s;
use crate::follow::FOLLOWERS;
use crate::jobs::{Due, Job};
use crate::prepare::{Prepared, prepare};
use crate::serve;
use crate::session::{self, Session};

/// When a party is asked again whose operator has not decided.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// One follower's stream.
struct Follower {
    peer: Peer,
    stream: MsgStream,
    wait: Duration,
}

/// What P1 or P2 says of a job.
enum Said {
    Consents,
    Waits,
    Refuses(String),
    /// It says nothing.
    Away(String),
}

/// A job that all parties consent to.
struct Consenting {
    links: session::Links,
    /// P0's, in its proposals.
    nonce: Nonce,
    followers: [Follower; 2],
}

/// Where the other parties stand on a job.
enum Asked {
    /// They consent; their streams wait for what comes.
    All(Box<Consenting>),
    /// To be asked again; for what it waits.
    Later(String),
    /// It will not run.
    Over(String),
}

/// Leads the jobs that may run here, in the order of their submission, for ever. A job that waits
/// for another party's approval holds up no other.
pub(crate) async fn lead_all(party: &Arc<Party>) {
    loop {
        match party.jobs.due(Instant::now()) {
            Due::Now(job) => {
                let span = tracing::error_span!("job", job = %job.id);
                if job.description.serves().is_none() {
                    lead(party, &job).instrument(span).await;
                    continue;
                }
                // It runs beside other jobs.
                job.set_aside(Instant::now());
                let party = party.clone();
                let leading = async move {
                    lead(&party, &job).await;
                    party.wake.notify_one();
                };
                tokio::spawn(leading.instrument(span));
            }
            Due::At(at) => tokio::select! {
                () = tokio::time::sleep_until(at.into()) => {}
                () = party.wake.notified() => {}
            },
            Due::Nothing => party.wake.notified().await,
        }
    }
}

/// Asks for the others' consent to one job, and leads it to its end if they give it.
async fn lead(party: &Arc<Party>, job: &Arc<Job>) {
    let _slot = match serve::slot(party, job) {
        Ok(slot) => slot.lock().await,
        Err(busy) => {
            if job.ask_again(Instant::now() + ASK_AGAIN, &busy) {
                job.say(Event::Waits(busy));
                consent::noted(party, job).await;
            }
            return;
        }
    };
    match ask_all(party, job).await {
        Asked::All(mut all) => {
            if job.begin(now_s()) {
                if let Err(reason) = try_lead(party, job, *all).await {
                    tracing::warn!(%reason, "the job failed");
                    job.fail(&reason);
                }
            } else {
                abandon(&mut all.followers, &format!("P0: {}", job.record().note)).await;
            }
        }
        Asked::Later(why) => {
            if job.ask_again(Instant::now() + ASK_AGAIN, &why) {
                tracing::info!("{why}");
                consent::noted(party, job).await;
            }
        }
        Asked::Over(reason) => {
            tracing::warn!(%reason, "the job failed");
            job.fail(&reason);
        }
    }
    consent::ended(party, job).await;
}

/// Asks P1 and P2 whether they consent, and tells them what follows from both answers.
async fn ask_all(party: &Arc<Party>, job: &Arc<Job>) -> Asked {
    let away = |reason: String| match job.patient() {
        true => Asked::Later(reason),
        false => Asked::Over(reason),
    };
    let links = match session::links(party).await {
        Ok(links) => links,
        Err(reason) => return away(reason),
    };
    let proposal = match propose(job) {
        Ok(proposal) => proposal,
        Err(reason) => return Asked::Over(reason),
    };
    let [p1, p2] = [FOLLOWERS[0], FOLLOWERS[1]]
        .map(|peer| Follower::ask(party, peer, links.of(peer), &proposal));
    let (p1, p2) = tokio::join!(p1, p2);
    let mut followers = Vec::new();
    let (mut refusals, mut absences, mut waits) = (Vec::new(), Vec::new(), Vec::new());
    for (peer, (follower, said)) in FOLLOWERS.into_iter().zip([p1, p2]) {
        followers.extend(follower);
        match said {
            Said::Consents => {}
            Said::Waits => waits.push(party.name(peer)),
            Said::Refuses(reason) => refusals.push(reason),
            Said::Away(reason) => absences.push(reason),
        }
    }
    if !refusals.is_empty() {
        let reason = refusals.join("; ");
        abandon(&mut followers, &reason).await;
        return Asked::Over(reason);
    }
    if !waits.is_empty() {
        absences.insert(
            0,
            format!("waiting for approval at {}", waits.join(" and ")),
        );
    }
    if !absences.is_empty() {
        let why = absences.join("; ");
        if waits.is_empty() && !job.patient() {
            abandon(&mut followers, &why).await;
            return Asked::Over(why);
        }
        for follower in &mut followers {
            // One that is gone by now is asked again as well.
            let _ = follower.say(&Lead::Later).await;
        }
        return Asked::Later(why);
    }
    match <[Follower; 2]>::try_from(followers) {
        Ok(followers) => Asked::All(Box::new(Consenting {
            links,
            nonce: proposal.nonce,
            followers,
        })),
        Err(_) => Asked::Over("a party consented without a stream".into()),
    }
}

fn propose(job: &Job) -> Result<Proposal, String> {
    Ok(Proposal {
        version: CONTROL_VERSION,
        software: SOFTWARE.into(),
        job: job.description.clone(),
        attempt: 0,
        nonce: fresh_nonce()?,
    })
}

/// Tells P1 and P2 that a job is over which has not started here. A party that is away goes on
/// waiting until the job expires there, or its requester takes it back.
pub(crate) async fn tell_over(party: &Arc<Party>, job: &Job, reason: &str) {
    let Ok(proposal) = propose(job) else {
        return;
    };
    for peer in [FOLLOWERS[0], FOLLOWERS[1]] {
        let Ok(link) = party.mesh.wait(peer, party.short_wait()).await else {
            continue;
        };
        let (mut follower, _) = Follower::ask(party, peer, &link, &proposal).await;
        abandon(follower.as_mut_slice(), reason).await;
    }
}

/// Takes a job that all parties consent to from its preparation to its end.
async fn try_lead(party: &Arc<Party>, job: &Arc<Job>, all: Consenting) -> Result<(), String> {
    let Consenting {
        links,
        nonce,
        followers,
    } = all;
    let mut followers = Vec::from(followers);
    let prepared = async {
        everybody(&mut followers, &Lead::Prepare).await?;
        let prepared = prepare(party, job)
            .await
            .map_err(|reason| attributed(party.me, &reason))?;
        let proposal = Proposal {
            nonce,
            ..propose(job)?
        };
        let peer = Peer::Dealer;
        let dealer = Follower::open(party, peer, links.of(peer), &proposal).await?;
        Ok::<_, String>((prepared, dealer))
    };
    let (prepared, dealer) = match prepared.await {
        Ok(prepared) => prepared,
        Err(reason) => {
            abandon(&mut followers, &reason).await;
            return Err(reason);
        }
    };
    followers.push(dealer);
    let mut followers = <[Follower; 3]>::try_from(followers)
        .map_err(|_| "P0 has other streams than to P1, P2 and the dealer".to_owned())?;
    let led = conclude(party, job, prepared, links, nonce, &mut followers).await;
    if led.is_err() {
        session::forget_upload(party, job).await;
    }
    led
}

/// Runs a job and hears the last words about it.
async fn conclude(
    party: &Arc<Party>,
    job: &Arc<Job>,
    prepared: Prepared,
    links: session::Links,
    nonce: Nonce,
    followers: &mut [Follower; 3],
) -> Result<(), String> {
    let led = agree_and_run(party, job, prepared, links, nonce, followers).await;
    match led {
        Ok(outcome) => {
            for follower in followers {
                // It has kept what it has; only the word about it is missing.
                if let Err(reason) = follower.expect_concluded().await {
                    tracing::warn!(peer = %follower.peer, %reason, "no word of its conclusion");
                }
            }
            job.say(outcome);
            Ok(())
        }
        Err(reason) => {
            abandon(followers, &reason).await;
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
                    session::abort_job(party, job.id, &reason);
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

async fn everybody(followers: &mut [Follower], message: &Lead) -> Result<(), String> {
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
    /// Proposes a job to P1 or P2 and hears whether it consents.
    async fn ask(
        party: &Party,
        peer: Peer,
        link: &trefoil_transport::Link,
        proposal: &Proposal,
    ) -> (Option<Follower>, Said) {
        let mut follower = match Follower::open(party, peer, link, proposal).await {
            Ok(follower) => follower,
            Err(reason) => return (None, Said::Away(reason)),
        };
        let answer = follower.stream.recv::<Follow>(CONTROL_MAX_BYTES);
        let said = match tokio::time::timeout(follower.wait, answer).await {
            Ok(Ok(Some(Follow::Consent))) => Said::Consents,
            Ok(Ok(Some(Follow::Waiting))) => Said::Waits,
            Ok(Ok(Some(Follow::Refuse(reason)))) => {
                let reason = attributed(peer, &clip_reason(&reason));
                return (None, Said::Refuses(format!("refused by {reason}")));
            }
            Ok(Ok(Some(other))) => {
                let reason = format!("{peer} sent {other:?} where its consent belongs");
                Said::Refuses(reason)
            }
            Ok(Ok(None)) => Said::Away(format!("{peer} ended the stream without a word")),
            Ok(Err(err)) => Said::Away(format!("{peer}: {err}")),
            Err(_) => Said::Away(format!(
                "{peer} did not say within {} ms whether it consents",
                follower.wait.as_millis()
            )),
        };
        (Some(follower), said)
    }

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
