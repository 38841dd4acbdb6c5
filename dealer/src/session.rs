//! A session as the dealer sees it: P0 proposes, the dealer derives the same plans, takes the three
//! parties' keys, and deals all steps ahead of them.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tracing::Instrument;
use trefoil_consortium::config::{coin_key, coin_name, simulation_coin_key};
use trefoil_consortium::follow::Following;
use trefoil_consortium::keys::KeyTray;
use trefoil_consortium::wire::{Acceptance, Lead, Proposal, by_peer, session_failure};
use trefoil_consortium::{Derived, Ending, NodeStats, SOFTWARE, SessionId, fresh_nonce, host};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_protocol::prg::Prg;
use trefoil_protocol::run::{DealerKeys, DealerState, deal_step};
use trefoil_transport::{AbortHandle, DealerNet, Link, MsgStream};

use crate::daemon::Dealer;
use crate::serve::Orders;

/// How often a thread that waits for P0's word looks whether the session still runs.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// The dealer's place among the nonces.
const PLACE: usize = 3;

/// Answers a proposal of P0 and deals its session. An error is for the log.
pub(crate) async fn follow(dealer: &Arc<Dealer>, stream: MsgStream) -> Result<(), String> {
    let stopping = dealer.stopping.subscribe();
    let (mut following, proposal) = Following::receive(stream, dealer.wait(), stopping).await?;
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
            Err(Failure::Ended(ending)) => {
                following.ended(&ending).await;
                Err(ending.reason().to_owned())
            }
        }
    }
    .instrument(span)
    .await
}

enum Failure {
    Refused(String),
    Ended(Ending),
}

async fn take_part(
    dealer: &Arc<Dealer>,
    proposal: &Proposal,
    following: &mut Following,
) -> Result<(), Failure> {
    let refused = Failure::Refused;
    let stopping = dealer.stopping.borrow().clone();
    if let Some(reason) = stopping {
        return Err(Failure::Ended(Ending::Interrupted(reason)));
    }
    // A serving session has no step to wait for.
    let _active = match proposal.job.serves() {
        Some(_) => None,
        None => Some(dealer.active.enter()),
    };
    let job = proposal.job.clone();
    let slot = match job.serves() {
        Some(_) => &dealer.serving.slot,
        None => &dealer.slot,
    };
    let Ok(_slot) = tokio::time::timeout(dealer.short_wait(), slot.lock()).await else {
        // It may be an earlier session of this very job, whose end is not known here yet.
        let reason = "the dealer is busy with another session";
        return Err(Failure::Ended(Ending::Interrupted(reason.into())));
    };
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
    let serves = job.serves().cloned();
    let wall = Duration::from_secs(job.limits.wall_time_s);
    let derived = tokio::task::spawn_blocking(move || Derived::new(&job)).await;
    let derived = derived
        .map_err(|err| refused(format!("the dealer failed: {err}")))?
        .map_err(refused)?;
    let links = {
        let wait = Duration::from_millis(dealer.settings.connect_timeout_ms);
        let link = async |party| {
            let link = dealer.mesh.wait(Peer::Party(party), wait).await?;
            Ok((party, link))
        };
        let [a, b, c] = PartyId::ALL.map(link);
        let missing = |reason| Failure::Ended(Ending::Interrupted(reason));
        let (a, b, c) = tokio::try_join!(a, b, c).map_err(missing)?;
        [a, b, c]
    };
    let coins = match dealer.coin_seed {
        Some(seed) => simulation_coin_key(seed),
        None => coin_key(&dealer.secret, &id),
    };
    let acceptance = Acceptance {
        software: SOFTWARE.into(),
        job: id,
        programs: derived.hashes.clone(),
        model: None,
        coins: Some(coin_name(&coins)),
        nonce: fresh_nonce().map_err(refused)?,
    };
    let failed = Failure::Ended;
    let from = proposal.attempt.from();
    if from > derived.schedule.steps.len() as u64 {
        let steps = derived.schedule.steps.len();
        return Err(refused(format!(
            "the job has {steps} steps and cannot be taken up after {from}"
        )));
    }
    let session = following
        .accept(acceptance, &dealer.core_hash, &id, &proposal.attempt, PLACE)
        .await
        .map_err(failed)?;
    let tray = dealer.keys.open(session);
    following.ready().await.map_err(failed)?;
    // The dealer keeps no state of a job.
    let (_silent, mut nothing) = tokio::sync::mpsc::unbounded_channel();
    let (decided, decisions) = channel();
    let hears = |lead: &Lead| match lead {
        Lead::GoOn { step, next } => {
            // An error means that the thread has ended.
            let _ = decided.send((*step, *next));
            true
        }
        _ => false,
    };
    let stats = {
        let job = RunningJob {
            derived,
            coins,
            from,
            wall,
            decisions,
            orders: serves.map(|spec| dealer.serving.open(&session, spec)),
        };
        let running = run(dealer, session, job, links, tray);
        tokio::pin!(running);
        tokio::select! {
            stats = &mut running => stats.map_err(failed)?,
            ending = following.abandoned(&mut nothing, hears) => {
                let running = dealer.running.lock().unwrap_or_else(PoisonError::into_inner).clone();
                for (_, abort) in running.iter().filter(|(running, _)| *running == session) {
                    abort.abort(ending.reason());
                }
                return Err(failed(ending));
            }
        }
    };
    let concluded = following.finished(stats, wall, &mut nothing, hears);
    concluded.await.map_err(failed)
}

/// Ends the session with its future: a dropped future must not leave a thread behind that waits.
struct Guard<'a> {
    dealer: &'a Dealer,
    session: SessionId,
    abort: AbortHandle,
    done: bool,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.dealer
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|(session, _)| *session != self.session);
        // Its thread may wait for a batch that never comes.
        self.dealer.serving.close(&self.session);
        if !self.done {
            // Of no effect where the session has failed already.
            self.abort.abort("the dealer has left the session");
        }
    }
}

/// What is dealt.
struct RunningJob {
    derived: Derived,
    /// The key of the rounding coins.
    coins: [u8; 16],
    /// The first step.
    from: u64,
    wall: Duration,
    /// The parties' decisions whether training goes on.
    decisions: Receiver<(u64, u64)>,
    /// The batches of a job that serves.
    orders: Option<Orders>,
}

async fn run(
    dealer: &Dealer,
    session: SessionId,
    job: RunningJob,
    links: [(PartyId, Link); 3],
    mut tray: KeyTray,
) -> Result<NodeStats, Ending> {
    let RunningJob {
        derived,
        coins,
        from,
        wall,
        decisions,
        orders,
    } = job;
    let over = |reason: String| Ending::Over(reason);
    let consortium = dealer.consortium.now();
    let peers = PartyId::ALL
        .map(Peer::Party)
        .map(|peer| (peer, consortium.node(peer).pin));
    let keys = tray
        .take(&peers, dealer.short_wait())
        .await
        .map_err(|reason| Ending::Interrupted(format!("dealer: {reason}")))?;
    drop(tray);
    let mut parties = Vec::new();
    for (peer, pin) in &peers {
        let key = keys
            .get(pin)
            .ok_or_else(|| over(format!("dealer: no session key from {peer}")))?;
        parties.push(Prg::new(*key));
    }
    let parties: [Prg; 3] = parties
        .try_into()
        .map_err(|_| over("dealer: three parties have three keys".into()))?;
    let keys = DealerKeys {
        parties,
        coins: Some(Prg::new(coins)),
    };
    let started = DealerNet::start(session, derived.hello(session), links, &dealer.settings).await;
    let (net, abort) =
        started.map_err(|err| Ending::of_start(&err).map(|reason| format!("dealer: {reason}")))?;
    dealer
        .running
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push((session, abort.clone()));
    let mut guard = Guard {
        dealer,
        session,
        abort: abort.clone(),
        done: false,
    };

    let (sender, receiver) = tokio::sync::oneshot::channel();
    let span = tracing::error_span!("session", session = %trefoil_consortium::hex(&session[..8]));
    let thread_abort = abort.clone();
    let body = move || {
        let _span = span.entered();
        // An error means that nobody waits any more.
        let dealt = deal(
            &derived,
            from,
            &keys,
            net,
            &thread_abort,
            &decisions,
            orders,
        );
        let _ = sender.send(dealt);
    };
    let thread = std::thread::Builder::new()
        .name("protocol-dealer".into())
        .spawn(body);
    thread.map_err(|err| over(format!("dealer: a thread cannot be started: {err}")))?;
    let waiting = async {
        tokio::pin!(receiver);
        tokio::select! {
            dealt = &mut receiver => dealt,
            _ = abort.failed() => {
                // The thread may wait for a batch that never comes.
                dealer.serving.close(&session);
                receiver.await
            }
        }
    };
    let dealt = match tokio::time::timeout(wall, waiting).await {
        Ok(Ok(dealt)) => dealt,
        Ok(Err(_)) => Err(over("dealer: the protocol thread failed".into())),
        Err(_) => Err(over(format!(
            "dealer: the job's wall time of {} s is over",
            wall.as_secs()
        ))),
    };
    if let Err(ending) = &dealt {
        abort.abort(ending.reason());
    }
    guard.done = dealt.is_ok();
    dealt
}

/// The step after one at which training may stop: P0 says which, the dealer does not see why.
fn decided(
    step: usize,
    end: usize,
    decisions: &Receiver<(u64, u64)>,
    abort: &AbortHandle,
) -> Result<usize, Ending> {
    loop {
        match decisions.recv_timeout(LOOK_EVERY) {
            Ok((at, next)) => {
                let possible = [step + 1, end];
                let next = possible.into_iter().find(|known| *known as u64 == next);
                let next = next.filter(|_| at == step as u64);
                return next.ok_or_else(|| {
                    Ending::Over(format!("P0 went on from step {at}, the dealer from {step}"))
                });
            }
            Err(RecvTimeoutError::Timeout) if abort.failure().is_none() => {}
            Err(_) => {
                let reason = "no word whether training goes on";
                return Err(Ending::Interrupted(reason.into()));
            }
        }
    }
}

fn deal(
    derived: &Derived,
    from: u64,
    keys: &DealerKeys,
    mut net: DealerNet,
    abort: &AbortHandle,
    decisions: &Receiver<(u64, u64)>,
    orders: Option<Orders>,
) -> Result<NodeStats, Ending> {
    let start = Instant::now();
    let mut state = DealerState::default();
    let (mut dealt, mut steps) = (0, derived.schedule.steps.len() as u64);
    let mut deal = |index: u64, program: usize| {
        let _span = tracing::error_span!("step", step = index).entered();
        let plan = derived.plans.get(program);
        let unknown = || Ending::Over("a step names a program that does not exist".into());
        let plan = plan.ok_or_else(unknown)?;
        deal_step(plan, index, keys, &mut state, &mut net).map_err(|err| Ending::of_step(&err))
    };
    let mut all = || {
        let mut index = usize::try_from(from).unwrap_or(usize::MAX);
        while let Some(step) = derived.schedule.steps.get(index) {
            deal(index as u64, step.program)?;
            dealt += 1;
            index = match derived.schedule.decides(index) {
                Some(stopping) => decided(index, stopping.end, decisions, abort)?,
                None => index + 1,
            };
        }
        for order in orders.iter().flat_map(Orders::batches) {
            deal(steps, order.map_err(Ending::Over)?)?;
            steps += 1;
            dealt += 1;
        }
        Ok::<(), Ending>(())
    };
    if let Err(ending) = all() {
        let ending = ending.map(|reason| session_failure(Peer::Dealer, abort.failure(), reason));
        abort.abort(ending.reason());
        return Err(ending);
    }
    let counted = net.stats();
    Ok(NodeStats {
        seconds: start.elapsed().as_secs_f64(),
        rounds: 0,
        steps: dealt,
        sent_bytes: by_peer(|peer| counted.payload_sent(peer)),
        received_bytes: by_peer(|peer| counted.payload_received(peer)),
        peak_memory_bytes: host::peak_memory_bytes(),
    })
}
