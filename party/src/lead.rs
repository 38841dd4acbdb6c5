//! P0's side of a session: proposes it to the other nodes, confirms it when all accept, starts it,
//! and tells everybody how it ended. It has no power beyond the order of jobs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::Instrument;
use trefoil_consortium::wire::{
    Acceptance, CONTROL_MAX_BYTES, CONTROL_VERSION, Event, Follow, Holds, Lead, NodeStats,
    Proposal, attributed, clip_reason, reported,
};
use trefoil_consortium::{
    Attempt, Ending, Mark, Nonce, SOFTWARE, SessionId, fresh_nonce, session_id,
};
use trefoil_models::JobKind;
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_protocol::program::Rounding;
use trefoil_transport::{MsgReceiver, MsgSender, StreamKind};

use crate::conduct::conduct;
use crate::consent;
use crate::daemon::Party;
use crate::files::now_s;
use crate::follow::FOLLOWERS;
use crate::halt::Halt;
use crate::jobs::{Due, Job};
use crate::prepare::{Prepared, prepare};
use crate::resume;
use crate::serve;
use crate::session::{self, Outcome, Session};

/// When a party is asked again whose operator has not decided.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// How long the others' words may take that say how a session has ended at them.
const SETTLE: Duration = Duration::from_secs(2);

/// One follower's stream.
pub(crate) struct Follower {
    peer: Peer,
    pub(crate) sender: MsgSender,
    pub(crate) receiver: MsgReceiver,
    wait: Duration,
}

/// What P1 or P2 says of a job.
enum Said {
    Consents(Holds),
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
    attempt: Attempt,
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
        if party.stopping.borrow().is_some() {
            return;
        }
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
    // Until its end is noted.
    let _active;
    match ask_all(party, job).await {
        Asked::All(mut all) => {
            if job.begin(now_s()) {
                _active = Some(party.active.enter());
                if let Err(ending) = try_lead(party, job, *all).await {
                    resume::session_ended(party, job, &ending).await;
                }
            } else {
                abandon(&mut all.followers, &format!("P0: {}", job.record().note)).await;
            }
        }
        Asked::Later(why) => {
            let why = match job.paused() {
                Some(_) => resume::waits_for(party, job, &why).await,
                None => why,
            };
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
    let proposal = match propose(job, Attempt::default()) {
        Ok(proposal) => proposal,
        Err(reason) => return Asked::Over(reason),
    };
    let mut holds = match resume::holds(party, job).await {
        Ok(own) => vec![own],
        Err(reason) => return away(reason),
    };
    let [p1, p2] = [FOLLOWERS[0], FOLLOWERS[1]]
        .map(|peer| Follower::ask(party, peer, links.of(peer), &proposal));
    let (p1, p2) = tokio::join!(p1, p2);
    let mut followers = Vec::new();
    let (mut refusals, mut absences, mut waits) = (Vec::new(), Vec::new(), Vec::new());
    for (peer, (follower, said)) in FOLLOWERS.into_iter().zip([p1, p2]) {
        followers.extend(follower);
        match said {
            Said::Consents(theirs) => holds.push(theirs),
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
    match (
        <[Follower; 2]>::try_from(followers),
        <[Holds; 3]>::try_from(holds),
    ) {
        (Ok(followers), Ok(holds)) => Asked::All(Box::new(Consenting {
            links,
            nonce: proposal.nonce,
            attempt: resume::next_attempt(&holds),
            followers,
        })),
        _ => Asked::Over("a party consented without a stream".into()),
    }
}

fn propose(job: &Job, attempt: Attempt) -> Result<Proposal, String> {
    Ok(Proposal {
        version: CONTROL_VERSION,
        software: SOFTWARE.into(),
        job: job.description.clone(),
        attempt,
        nonce: fresh_nonce()?,
    })
}

/// Tells P1 and P2 that a job is over which has not started here. A party that is away goes on
/// waiting until the job expires there, or its requester takes it back.
pub(crate) async fn tell_over(party: &Arc<Party>, job: &Job, reason: &str) {
    let Ok(proposal) = propose(job, Attempt::default()) else {
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

/// Tells P1 or P2 that a job is done, which it may not know.
pub(crate) async fn tell_done(
    party: &Arc<Party>,
    job: &Job,
    peer: Peer,
    mark: Mark,
) -> Result<(), String> {
    let link = party.mesh.wait(peer, party.short_wait()).await?;
    let proposal = propose(job, Attempt::default())?;
    let (follower, said) = Follower::ask(party, peer, &link, &proposal).await;
    match (follower, said) {
        (Some(mut follower), Said::Consents(_)) => {
            let told = follower.say(&Lead::Keep(mark)).await;
            let kept = async { told.and(follower.expect_concluded().await) };
            match kept.await {
                // It could not, and has said so to its operator and the requester.
                Err(Ending::Over(reason)) => {
                    tracing::error!(%peer, %reason, "has not kept the results of a job");
                    Ok(())
                }
                kept => kept.map_err(|ending| ending.reason().to_owned()),
            }
        }
        // The job is over there.
        (_, Said::Refuses(_)) => Ok(()),
        (_, Said::Away(reason)) => Err(reason),
        _ => Err(format!("{peer} does not consent to it")),
    }
}

/// Takes a job that all parties consent to from its preparation to its end.
async fn try_lead(party: &Arc<Party>, job: &Arc<Job>, all: Consenting) -> Result<(), Ending> {
    let Consenting {
        links,
        nonce,
        attempt,
        followers,
    } = all;
    let mut followers = Vec::from(followers);
    let prepared = async {
        everybody(&mut followers, &Lead::Prepare(attempt)).await?;
        let prepared = prepare(party, job, attempt).await;
        let prepared =
            prepared.map_err(|ending| ending.map(|reason| attributed(party.me, reason)))?;
        let proposal = Proposal {
            nonce,
            ..propose(job, attempt).map_err(Ending::Over)?
        };
        let peer = Peer::Dealer;
        let dealer = Follower::open(party, peer, links.of(peer), &proposal).await;
        Ok::<_, Ending>((prepared, dealer.map_err(Ending::Interrupted)?))
    };
    let (prepared, dealer) = match prepared.await {
        Ok(prepared) => prepared,
        Err(ending) => return Err(settle(party, job, &mut followers, ending).await),
    };
    followers.push(dealer);
    let mut followers = <[Follower; 3]>::try_from(followers)
        .map_err(|_| Ending::Over("P0 has other streams than to P1, P2 and the dealer".into()))?;
    let led = agree_and_run(party, job, prepared, links, nonce, &mut followers).await;
    match led {
        Ok((outcome, dealer)) => conclude(party, job, outcome, dealer, followers)
            .await
            .map_err(Ending::Over),
        Err(ending) => Err(settle(party, job, &mut followers, ending).await),
    }
}

/// Keeps what a job leaves, and has the others keep it. What P0 has noted as done is done: a party
/// that is lost now hears of it later.
async fn conclude(
    party: &Arc<Party>,
    job: &Arc<Job>,
    outcome: Outcome,
    dealer: NodeStats,
    mut followers: [Follower; 3],
) -> Result<(), String> {
    if let Err(reason) = session::keep(party, job, outcome.model).await {
        abandon(&mut followers, &reason).await;
        return Err(reason);
    }
    job.set_unconcluded(outcome.last);
    job.say(resume::done(outcome.results, outcome.stats, Some(dealer)));
    consent::ended(party, job).await;
    let mut left = Vec::new();
    for follower in &mut followers {
        let told = follower.say(&Lead::Conclude).await;
        if told.is_err() && follower.peer != Peer::Dealer {
            left.push(follower.peer);
        }
    }
    for follower in &mut followers {
        if left.contains(&follower.peer) {
            continue;
        }
        if let Err(ending) = follower.expect_concluded().await {
            let reason = ending.reason();
            tracing::warn!(peer = %follower.peer, %reason, "no word of its conclusion");
            let lost = matches!(ending, Ending::Interrupted(_));
            if lost && follower.peer != Peer::Dealer {
                left.push(follower.peer);
            }
        }
    }
    match outcome.last {
        Some(mark) if !left.is_empty() && resume::lasts(party, &job.description) => {
            resume::conclude_late(party, job, mark, left);
        }
        _ => {
            job.set_unconcluded(None);
            consent::noted(party, job).await;
        }
    }
    Ok(())
}

/// From the acceptances to the last step at all nodes; returns what is to be kept here, and what
/// the dealer counted.
async fn agree_and_run(
    party: &Arc<Party>,
    job: &Arc<Job>,
    prepared: Prepared,
    links: session::Links,
    nonce: Nonce,
    followers: &mut [Follower; 3],
) -> Result<(Outcome, NodeStats), Ending> {
    let mut nonces = [nonce; 4];
    {
        let [p1, p2, dealer] = &mut *followers;
        let answers = tokio::try_join!(p1.accepted(), p2.accepted(), dealer.accepted())?;
        for (place, (peer, answer)) in FOLLOWERS
            .into_iter()
            .zip([answers.0, answers.1, answers.2])
            .enumerate()
        {
            check_acceptance(job, &prepared, peer, &answer).map_err(Ending::Over)?;
            if peer == Peer::Dealer && !job.same_coins(answer.coins) && rounds_by_coins(job) {
                let reason = "the dealer has another key than when the job began, and would round otherwise: submit the job again";
                return Err(Ending::Over(reason.into()));
            }
            nonces[place + 1] = answer.nonce;
        }
    }
    let id = session_id(&party.core_hash, &job.id, &prepared.attempt, &nonces);
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
    let (says, own) = mpsc::unbounded_channel();
    let (decided, decisions) = mpsc::unbounded_channel();
    let session = Session {
        id,
        job: job.clone(),
        halt: Halt::new(prepared.attempt.from(), says),
        prepared,
        links,
        tray,
        decided,
    };
    conduct(party, session, own, decisions, followers).await
}

fn rounds_by_coins(job: &Job) -> bool {
    matches!(&job.description.kind, JobKind::Train { spec, .. } if spec.rounding == Rounding::Stochastic)
}

async fn everybody(followers: &mut [Follower], message: &Lead) -> Result<(), Ending> {
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

/// After a session has ended here: what the others know may be worse. Then tells all of them how it
/// has ended.
async fn settle(party: &Party, job: &Job, followers: &mut [Follower], own: Ending) -> Ending {
    let lasts = resume::lasts(party, &job.description) && job.attempts() > 0;
    let mut ending = match own {
        Ending::Interrupted(reason) if !lasts => Ending::Over(reason),
        own => own,
    };
    if let Ending::Interrupted(_) = ending {
        let deadline = tokio::time::Instant::now() + SETTLE;
        for follower in &mut *followers {
            let hearing = async {
                loop {
                    if let Err(ending) = follower.next().await {
                        return ending;
                    }
                }
            };
            if let Ok(worse @ Ending::Over(_)) = tokio::time::timeout_at(deadline, hearing).await {
                ending = worse;
                break;
            }
        }
    }
    let word = match &ending {
        Ending::Interrupted(reason) => Lead::Pause(clip_reason(reason)),
        Ending::Over(reason) => Lead::Abandon(clip_reason(reason)),
    };
    for follower in followers {
        // A follower that is gone needs no telling.
        let _ = follower.say(&word).await;
    }
    ending
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
        let answer = follower.receiver.recv::<Follow>(CONTROL_MAX_BYTES);
        let said = match tokio::time::timeout(follower.wait, answer).await {
            Ok(Ok(Some(Follow::Consent(holds)))) => Said::Consents(holds),
            Ok(Ok(Some(Follow::Busy(reason)))) => {
                Said::Away(attributed(peer, &clip_reason(&reason)))
            }
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
            Ok(Ok(stream)) => {
                let (sender, receiver) = stream.split();
                Ok(Follower {
                    peer,
                    sender,
                    receiver,
                    wait: party.wait(),
                })
            }
            Ok(Err(err)) => Err(format!("{peer}: {err}")),
            Err(_) => Err(format!("{peer} takes no proposals")),
        }
    }

    async fn say(&mut self, message: &Lead) -> Result<(), Ending> {
        let sent = match tokio::time::timeout(self.wait, self.sender.send(message)).await {
            Ok(sent) => sent.map_err(|err| format!("{}: {err}", self.peer)),
            Err(_) => Err(format!("{} takes no messages", self.peer)),
        };
        sent.map_err(Ending::Interrupted)
    }

    /// The next answer; no deadline of its own.
    async fn next(&mut self) -> Result<Follow, Ending> {
        next(self.peer, &mut self.receiver).await
    }

    async fn next_in_time(&mut self, what: &str) -> Result<Follow, Ending> {
        let (peer, wait) = (self.peer, self.wait);
        let answer = async {
            loop {
                match self.next().await {
                    // It hears in any case how the session ends.
                    Ok(Follow::Stop(_)) => {}
                    answer => return answer,
                }
            }
        };
        match tokio::time::timeout(wait, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(Ending::Interrupted(format!(
                "{peer} did not send {what} within {} ms",
                wait.as_millis()
            ))),
        }
    }

    async fn accepted(&mut self) -> Result<Acceptance, Ending> {
        match self.next_in_time("its acceptance").await? {
            Follow::Accept(acceptance) => Ok(acceptance),
            other => Err(misplaced(self.peer, &other, "where its acceptance belongs")),
        }
    }

    async fn expect_ready(&mut self) -> Result<(), Ending> {
        match self.next_in_time("its readiness").await? {
            Follow::Ready => Ok(()),
            other => Err(misplaced(self.peer, &other, "where its readiness belongs")),
        }
    }

    async fn expect_concluded(&mut self) -> Result<(), Ending> {
        match self.next_in_time("its conclusion").await? {
            Follow::Concluded => Ok(()),
            other => Err(misplaced(self.peer, &other, "where its conclusion belongs")),
        }
    }
}

pub(crate) fn misplaced(peer: Peer, what: &Follow, place: &str) -> Ending {
    Ending::Over(format!("{peer} sent {what:?} {place}"))
}

/// A follower's next answer; no deadline of its own.
pub(crate) async fn next(peer: Peer, receiver: &mut MsgReceiver) -> Result<Follow, Ending> {
    match receiver.recv::<Follow>(CONTROL_MAX_BYTES).await {
        Ok(Some(Follow::Refuse(reason))) => Err(Ending::Over(format!(
            "refused by {}",
            attributed(peer, &clip_reason(&reason))
        ))),
        // It may pass on what another node said: that is its word, not the other's.
        Ok(Some(Follow::Failed(reason))) => {
            Err(Ending::Over(clip_reason(&reported(peer, &reason))))
        }
        Ok(Some(Follow::Interrupted(reason))) => {
            Err(Ending::Interrupted(clip_reason(&reported(peer, &reason))))
        }
        Ok(Some(answer)) => Ok(answer),
        Ok(None) => Err(Ending::Interrupted(format!(
            "{peer} ended the session's stream without a word"
        ))),
        Err(err) => Err(Ending::Interrupted(format!("{peer}: {err}"))),
    }
}

/// P0 leads; the constant keeps the places of nonces and followers in one order.
const _: () = assert!(matches!(FOLLOWERS[0], Peer::Party(PartyId::P1)));
