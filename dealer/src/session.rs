//! A session as the dealer sees it: P0 proposes, the dealer derives the same plans, takes the three
//! parties' keys, and deals all steps ahead of them.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tracing::Instrument;
use trefoil_consortium::config::simulation_coin_key;
use trefoil_consortium::follow::Following;
use trefoil_consortium::keys::KeyTray;
use trefoil_consortium::wire::{Acceptance, Proposal, by_peer, session_failure};
use trefoil_consortium::{
    Derived, NodeStats, SOFTWARE, SessionId, fresh_nonce, host, random_bytes,
};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_protocol::prg::Prg;
use trefoil_protocol::run::{DealerKeys, DealerState, deal_step};
use trefoil_transport::{AbortHandle, DealerNet, Link, MsgStream};

use crate::daemon::Dealer;

/// The dealer's place among the nonces.
const PLACE: usize = 3;

/// Answers a proposal of P0 and deals its session. An error is for the log.
pub(crate) async fn follow(dealer: &Arc<Dealer>, stream: MsgStream) -> Result<(), String> {
    let (mut following, proposal) = Following::receive(stream, dealer.wait()).await?;
    let span = tracing::error_span!("job", job = %proposal.job.id());
    async {
        match take_part(dealer, &proposal, &mut following).await {
            Ok(()) => {
                following.concluded().await;
                Ok(())
            }
            Err(Failure::Refused(reason)) => {
                following.refuse(&reason).await;
                Err(reason)
            }
            Err(Failure::Failed(reason)) => {
                following.failed(&reason).await;
                Err(reason)
            }
        }
    }
    .instrument(span)
    .await
}

enum Failure {
    Refused(String),
    Failed(String),
}

async fn take_part(
    dealer: &Arc<Dealer>,
    proposal: &Proposal,
    following: &mut Following,
) -> Result<(), Failure> {
    let refused = Failure::Refused;
    let Ok(_slot) = tokio::time::timeout(dealer.short_wait(), dealer.slot.lock()).await else {
        return Err(refused("the dealer is busy with another session".into()));
    };
    let job = proposal.job.clone();
    job.check().map_err(|err| refused(err.to_string()))?;
    let consortium = dealer.consortium.now();
    let ring_bits = consortium.core.ring_bits;
    if job.format().0 != ring_bits {
        let reason = format!(
            "the consortium's ring has {ring_bits} bits, the job's {}",
            job.format().0
        );
        return Err(refused(reason));
    }
    let id = job.id();
    let wall = Duration::from_secs(job.limits.wall_time_s);
    let derived = tokio::task::spawn_blocking(move || Derived::new(&job)).await;
    let derived = derived
        .map_err(|err| refused(format!("the dealer failed: {err}")))?
        .map_err(refused)?;
    let links = {
        let [a, b, c] = PartyId::ALL.map(|party| dealer.link(party));
        let (a, b, c) = tokio::try_join!(a, b, c).map_err(refused)?;
        [a, b, c]
    };
    let acceptance = Acceptance {
        software: SOFTWARE.into(),
        job: id,
        programs: derived.hashes.clone(),
        model: None,
        nonce: fresh_nonce().map_err(refused)?,
    };
    let failed = Failure::Failed;
    let session = following
        .accept(acceptance, &dealer.core_hash, &id, proposal.attempt, PLACE)
        .await
        .map_err(failed)?;
    let tray = dealer.keys.open(session);
    following.ready().await.map_err(failed)?;
    let stats = {
        let running = run(dealer, session, derived, links, tray, wall);
        tokio::pin!(running);
        tokio::select! {
            stats = &mut running => stats.map_err(failed)?,
            reason = following.abandoned() => {
                let abort = dealer.running.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if let Some(abort) = abort {
                    abort.abort(&reason);
                }
                return Err(failed(reason));
            }
        }
    };
    following.finished(stats, wall).await.map_err(failed)
}

/// Ends the session with its future: a dropped future must not leave a thread behind that waits.
struct Guard<'a> {
    dealer: &'a Dealer,
    abort: AbortHandle,
    done: bool,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        *self
            .dealer
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
        if !self.done {
            // Of no effect where the session has failed already.
            self.abort.abort("the dealer has left the session");
        }
    }
}

async fn run(
    dealer: &Dealer,
    session: SessionId,
    derived: Derived,
    links: [(PartyId, Link); 3],
    mut tray: KeyTray,
    wall: Duration,
) -> Result<NodeStats, String> {
    let consortium = dealer.consortium.now();
    let peers = PartyId::ALL
        .map(Peer::Party)
        .map(|peer| (peer, consortium.node(peer).pin));
    let keys = tray
        .take(&peers, dealer.short_wait())
        .await
        .map_err(|reason| format!("dealer: {reason}"))?;
    drop(tray);
    let mut parties = Vec::new();
    for (peer, pin) in &peers {
        let key = keys
            .get(pin)
            .ok_or_else(|| format!("dealer: no session key from {peer}"))?;
        parties.push(Prg::new(*key));
    }
    let parties: [Prg; 3] = parties
        .try_into()
        .map_err(|_| "dealer: three parties have three keys".to_owned())?;
    let coins = match dealer.coin_seed {
        Some(seed) => simulation_coin_key(seed),
        None => random_bytes()?,
    };
    let keys = DealerKeys {
        parties,
        coins: Some(Prg::new(coins)),
    };
    let started = DealerNet::start(session, derived.hello(session), links, &dealer.settings).await;
    let (net, abort) = started.map_err(|err| format!("dealer: {err}"))?;
    *dealer
        .running
        .lock()
        .unwrap_or_else(PoisonError::into_inner) = Some(abort.clone());
    let mut guard = Guard {
        dealer,
        abort: abort.clone(),
        done: false,
    };

    let (sender, receiver) = tokio::sync::oneshot::channel();
    let span = tracing::error_span!("session", session = %trefoil_consortium::hex(&session[..8]));
    let thread_abort = abort.clone();
    let body = move || {
        let _span = span.entered();
        // An error means that nobody waits any more.
        let _ = sender.send(deal(&derived, &keys, net, &thread_abort));
    };
    let thread = std::thread::Builder::new()
        .name("protocol-dealer".into())
        .spawn(body);
    thread.map_err(|err| format!("dealer: a thread cannot be started: {err}"))?;
    let dealt = match tokio::time::timeout(wall, receiver).await {
        Ok(Ok(dealt)) => dealt,
        Ok(Err(_)) => Err("dealer: the protocol thread failed".into()),
        Err(_) => Err(format!(
            "dealer: the job's wall time of {} s is over",
            wall.as_secs()
        )),
    };
    if let Err(reason) = &dealt {
        abort.abort(reason);
    }
    guard.done = dealt.is_ok();
    dealt
}

fn deal(
    derived: &Derived,
    keys: &DealerKeys,
    mut net: DealerNet,
    abort: &AbortHandle,
) -> Result<NodeStats, String> {
    let start = Instant::now();
    let mut state = DealerState::default();
    for (index, step) in derived.schedule.steps.iter().enumerate() {
        let _span = tracing::error_span!("step", step = index).entered();
        let plan = derived
            .plans
            .get(step.program)
            .ok_or("a step names a program that does not exist")?;
        if let Err(err) = deal_step(plan, index as u64, keys, &mut state, &mut net) {
            let reason = session_failure(Peer::Dealer, abort.failure(), &err.to_string());
            abort.abort(&reason);
            return Err(reason);
        }
    }
    let counted = net.stats();
    Ok(NodeStats {
        seconds: start.elapsed().as_secs_f64(),
        rounds: 0,
        steps: derived.schedule.steps.len() as u64,
        sent_bytes: by_peer(|peer| counted.payload_sent(peer)),
        received_bytes: by_peer(|peer| counted.payload_received(peer)),
        peak_memory_bytes: host::peak_memory_bytes(),
    })
}
