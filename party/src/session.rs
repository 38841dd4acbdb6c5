//! A confirmed session at one party: keys, streams, the protocol thread, and what is kept.
//!
//! Keys are drawn from the operating system, travel once, and are in memory only: a crash destroys
//! them, so nothing can be rewound.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::sync::mpsc::UnboundedSender;
use trefoil_consortium::keys::{KeyTray, send_key};
use trefoil_consortium::wire::{Event, Follow, Progress, by_peer, session_failure};
use trefoil_consortium::{Ending, JobId, Mark, NodeStats, SessionId, host, random_bytes};
use trefoil_models::early_stop::{VALIDATION_RIGHT, Validated};
use trefoil_models::{JobKind, PADDING_ROW, Phase, Step};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_protocol::prg::Prg;
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::run::{OutputShare, PartyKeys, State, publish, run_step};
use trefoil_transport::{AbortHandle, Link, MaterialReceiver, SessionNet, SessionStats};

use crate::consent;
use crate::daemon::Party;
use crate::halt::Halt;
use crate::jobs::Job;
use crate::members::on_files;
use crate::prepare::Prepared;
use crate::resume;
use crate::serve::{self, Seat};
use crate::store::{Checkpoint, Results, StagedModel, Stored};

/// Links to the three other nodes.
#[derive(Clone)]
pub(crate) struct Links {
    parties: [(PartyId, Link); 2],
    dealer: Link,
}

impl Links {
    /// The link to a peer. This party's own place holds the dealer's, which nobody asks for.
    pub(crate) fn of(&self, peer: Peer) -> &Link {
        let party = self
            .parties
            .iter()
            .find(|(party, _)| Peer::Party(*party) == peer);
        party.map_or(&self.dealer, |(_, link)| link)
    }
}

/// All links, or which is missing.
pub(crate) async fn links(party: &Party) -> Result<Links, String> {
    let wait = Duration::from_millis(party.settings.connect_timeout_ms);
    let [a, b] = party.me.others();
    let (link_a, link_b, dealer) = tokio::try_join!(
        party.mesh.wait(Peer::Party(a), wait),
        party.mesh.wait(Peer::Party(b), wait),
        party.mesh.wait(Peer::Dealer, wait),
    )?;
    Ok(Links {
        parties: [(a, link_a), (b, link_b)],
        dealer,
    })
}

/// A session that all four nodes have confirmed.
pub(crate) struct Session {
    pub(crate) id: SessionId,
    pub(crate) job: Arc<Job>,
    pub(crate) prepared: Prepared,
    pub(crate) links: Links,
    pub(crate) tray: KeyTray,
    /// Says to P0 what is written down; says to the protocol thread where to stop.
    pub(crate) halt: Arc<Halt>,
    /// Hears with which step the session goes on after one that an early stop decides.
    pub(crate) decided: UnboundedSender<(u64, u64)>,
}

/// A session that ran to its end here.
pub(crate) struct Outcome {
    pub(crate) stats: NodeStats,
    pub(crate) model: Option<StagedModel>,
    pub(crate) results: Option<Results>,
    /// The state that the job leaves; none of a benchmark.
    pub(crate) last: Option<Mark>,
}

/// Ends this job's session if it runs, telling the peers.
pub(crate) fn abort_job(party: &Party, job: JobId, reason: &str) {
    let running = party.running.lock().unwrap_or_else(PoisonError::into_inner);
    for (_, abort) in running.iter().filter(|(running, _)| *running == job) {
        abort.abort(reason);
    }
}

/// An error where this party's operator has cancelled the job.
fn not_cancelled(job: &Job) -> Result<(), String> {
    job.cancelled().map_or(Ok(()), Err)
}

/// Ends the session with its future, whatever ends that: a dropped future must not leave a
/// protocol thread behind that waits for its peers.
struct Guard<'a> {
    party: &'a Party,
    job: JobId,
    abort: AbortHandle,
    halt: Arc<Halt>,
    done: bool,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.halt.release();
        self.party
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|(job, _)| *job != self.job);
        if !self.done {
            // Of no effect where the session has failed already.
            self.abort
                .abort(&format!("{} has left the session", self.party.me));
        }
    }
}

/// Runs a session to its end.
pub(crate) async fn run(party: &Arc<Party>, session: Session) -> Result<Outcome, Ending> {
    let Session {
        id,
        job,
        prepared,
        links,
        mut tray,
        halt,
        decided,
    } = session;
    let over = Ending::Over;
    not_cancelled(&job).map_err(over)?;
    let started = consent::started(party, &job, id, prepared.attempt).await;
    started.map_err(over)?;
    let hello = prepared.derived.hello(id);
    let wall = Duration::from_secs(job.description.limits.wall_time_s);
    // Before the streams of the session, so that P0's word finds it.
    let seat = serve::open(party, &job, id, prepared.model).map_err(over)?;
    let keys = exchange_keys(party, id, &links, &mut tray).await;
    let keys = keys.map_err(Ending::Interrupted)?;
    drop(tray);
    let leading = seat.as_ref().map(|_| links.clone());
    let Links { parties, dealer } = links;
    let started = SessionNet::start(party.me, id, hello, parties, dealer, &party.settings).await;
    let (net, material, abort) = started.map_err(|err| Ending::of_start(&err))?;
    party
        .running
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push((job.id, abort.clone()));
    let mut guard = Guard {
        party,
        job: job.id,
        abort: abort.clone(),
        halt: halt.clone(),
        done: false,
    };
    if let Err(reason) = not_cancelled(&job) {
        abort.abort(&reason);
        return Err(over(reason));
    }
    let _serving = match (&seat, leading) {
        (Some(seat), Some(links)) => Some(serve::lead(party, seat, links, abort.clone())),
        _ => None,
    };
    let steps = prepared.derived.schedule.steps.len() as u64;
    job.say(Event::Started {
        session: id,
        steps,
        ring_bits: prepared.derived.ring_bits,
        attempt: prepared.attempt.number,
        from: prepared.attempt.from(),
    });

    let (sender, receiver) = tokio::sync::oneshot::channel();
    let me = party.me;
    let span = tracing::error_span!("session", session = %trefoil_consortium::hex(&id[..8]));
    let work = Work {
        party: party.clone(),
        id,
        job,
        prepared,
        keys,
        net,
        material,
        abort: abort.clone(),
        halt: halt.clone(),
        decided,
        validated: Validated::default(),
        steps: 0,
        seat,
    };
    let body = move || {
        let _span = span.entered();
        // An error means that nobody waits any more; the result is dropped then.
        let _ = sender.send(work.execute());
    };
    let thread = std::thread::Builder::new()
        .name(format!("protocol-{me}"))
        .spawn(body);
    thread.map_err(|err| over(format!("{me}: a thread cannot be started: {err}")))?;
    let waiting = async {
        tokio::pin!(receiver);
        tokio::select! {
            ended = &mut receiver => ended,
            _ = abort.failed() => {
                // The thread may wait for a word of P0 that never comes.
                halt.release();
                receiver.await
            }
        }
    };
    let outcome = match tokio::time::timeout(wall, waiting).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => Err(over(format!("{me}: the protocol thread failed"))),
        Err(_) => Err(over(format!(
            "{me}: the job's wall time of {} s is over",
            wall.as_secs()
        ))),
    };
    if let Err(ending) = &outcome {
        abort.abort(ending.reason());
    }
    guard.done = outcome.is_ok();
    outcome
}

/// Sends this party's key to the dealer, and exchanges those of the sharings of zero.
async fn exchange_keys(
    party: &Party,
    session: SessionId,
    links: &Links,
    tray: &mut KeyTray,
) -> Result<PartyKeys, String> {
    let wait = party.short_wait();
    let me = party.me;
    let dealer: [u8; 16] = random_bytes()?;
    let mut pairwise: [Option<[u8; 16]>; 3] = [None; 3];
    for higher in me.others().into_iter().filter(|other| *other > me) {
        pairwise[higher.index()] = Some(random_bytes()?);
    }
    let lower: Vec<_> = me
        .others()
        .into_iter()
        .filter(|other| *other < me)
        .map(Peer::Party)
        .collect();
    let lower: Vec<_> = lower
        .into_iter()
        .map(|peer| (peer, party.pin(peer)))
        .collect();
    let send_pairwise = async {
        for higher in me.others() {
            if let Some(key) = pairwise[higher.index()] {
                let peer = Peer::Party(higher);
                send_key(peer, links.of(peer), session, key, wait).await?;
            }
        }
        Ok(())
    };
    let (_, (), received) = tokio::try_join!(
        send_key(Peer::Dealer, links.of(Peer::Dealer), session, dealer, wait),
        send_pairwise,
        tray.take(&lower, wait),
    )?;
    for (peer, pin) in lower {
        if let Peer::Party(other) = peer {
            pairwise[other.index()] = received.get(&pin).copied();
        }
    }
    Ok(PartyKeys {
        dealer: Prg::new(dealer),
        pairwise: pairwise.map(|key| key.map(Prg::new)),
    })
}

/// Everything that the protocol thread works with.
struct Work {
    party: Arc<Party>,
    id: SessionId,
    job: Arc<Job>,
    prepared: Prepared,
    keys: PartyKeys,
    net: SessionNet,
    material: MaterialReceiver,
    abort: AbortHandle,
    halt: Arc<Halt>,
    decided: UnboundedSender<(u64, u64)>,
    /// What was opened for an early stop.
    validated: Validated,
    /// Steps done in this session.
    steps: u64,
    /// Where a serving job's batches come from.
    seat: Option<Seat>,
}

impl Work {
    /// All steps, then the last checkpoint and the model's file.
    fn execute(mut self) -> Result<Outcome, Ending> {
        let start = Instant::now();
        let me = self.party.me;
        let resume = self.prepared.attempt.resume;
        let abandoned =
            self.party
                .store
                .abandon_checkpoints(&self.prepared.lease, self.job.id, resume);
        abandoned.map_err(|err| Ending::Over(format!("{me}: {err}")))?;
        let shares = std::mem::take(&mut self.prepared.initial);
        let mut state = State {
            shares,
            ..State::default()
        };
        let done = match self.steps(&mut state) {
            Ok(()) => self.serve(&mut state),
            failed => failed,
        };
        if let Err(ending) = done {
            // The others hear the first reason, whoever had it.
            let ending = ending.map(|own| session_failure(me, self.abort.failure(), own));
            self.abort.abort(ending.reason());
            return Err(ending);
        }
        let counted = self.net.stats();
        let stats = NodeStats {
            seconds: start.elapsed().as_secs_f64(),
            rounds: counted.rounds,
            steps: self.steps,
            sent_bytes: by_peer(|peer| counted.payload_sent(peer)),
            received_bytes: by_peer(|peer| counted.payload_received(peer)),
            peak_memory_bytes: host::peak_memory_bytes(),
        };
        let left = self
            .leave(&mut state, &stats)
            .map_err(|reason| Ending::Over(format!("{me}: {reason}")))?;
        let (last, model) = left.unzip();
        Ok(Outcome {
            stats,
            model: model.flatten(),
            results: self.prepared.results.take(),
            last,
        })
    }

    /// Batches until serving is over; nothing for other jobs.
    fn serve(&mut self, state: &mut State) -> Result<(), Ending> {
        let Some(seat) = self.seat.take() else {
            return Ok(());
        };
        let mut run = |batch: u64, program: usize, inputs: &BTreeMap<String, Tensor>| {
            let plan = self.prepared.derived.plans.get(program);
            let plan = plan.ok_or("a batch names a program that does not exist")?;
            let outputs = run_step(
                plan,
                self.party.me,
                batch + 1,
                &self.keys,
                state,
                inputs,
                &mut self.net,
                &mut self.material,
            );
            outputs.map_err(|err| err.to_string())
        };
        seat.batches(&mut run).map_err(Ending::Over)
    }

    fn steps(&mut self, state: &mut State) -> Result<(), Ending> {
        let checkpoints = self
            .prepared
            .derived
            .schedule
            .checkpoints(self.job.description.checkpoint_every);
        // Where a stop may write the state down besides.
        let places = match self.job.description.checkpoint_every {
            0 => BTreeSet::new(),
            _ => self.prepared.derived.schedule.checkpoints(1),
        };
        let from = usize::try_from(self.prepared.attempt.from()).unwrap_or(usize::MAX);
        let schedule = &self.prepared.derived.schedule;
        let count = schedule.steps.len();
        if let Some(stopping) = &schedule.stopping {
            self.validated = Validated::after(&stopping.rule, &self.prepared.validated);
        }
        let mut before = self.net.stats();
        let mut index = from;
        while index < count {
            let stop = self.halt.stops_before(index as u64);
            if index > from && (checkpoints.contains(&index) || stop && places.contains(&index)) {
                self.write_down(state, index);
            }
            if stop {
                self.halt.stopped();
                return Err(Ending::Interrupted(format!("stopped before step {index}")));
            }
            (before, index) = self.step(state, index, &before)?;
            self.steps += 1;
            self.job.stepped(index as u64);
        }
        self.halt.no_more(count as u64);
        Ok(())
    }

    /// One step, and what it reveals; which one is next.
    fn step(
        &mut self,
        state: &mut State,
        index: usize,
        before: &SessionStats,
    ) -> Result<(SessionStats, usize), Ending> {
        let Work {
            party,
            job,
            prepared,
            keys,
            net,
            material,
            decided,
            validated,
            ..
        } = self;
        let Prepared {
            derived,
            tables,
            results,
            attempt,
            ..
        } = prepared;
        let over = |reason: String| Ending::Over(reason);
        let steps = &derived.schedule.steps;
        let step = &steps[index];
        party.serving.give_way();
        let start = Instant::now();
        let _span = tracing::error_span!("step", step = index).entered();
        let mut inputs = BTreeMap::new();
        for input in &step.inputs {
            let data = tables
                .gather(&input.table, &input.rows)
                .map_err(|err| over(err.to_string()))?;
            inputs.insert(input.name.clone(), Tensor::new(vec![data.len()], data));
        }
        let plan = derived
            .plans
            .get(step.program)
            .ok_or_else(|| over("a step names a program that does not exist".into()))?;
        let outputs = run_step(
            plan,
            party.me,
            index as u64,
            keys,
            state,
            &inputs,
            net,
            material,
        );
        let outputs = outputs.map_err(|err| Ending::of_step(&err))?;
        note_outputs(party, job, index, step, &outputs).map_err(over)?;
        let mut next = index + 1;
        if let Some(stopping) = derived.schedule.decides(index) {
            let figure = outputs
                .iter()
                .find(|output| output.name == VALIDATION_RIGHT);
            let figure = figure.ok_or_else(|| over("a validation has no figure".into()))?;
            let ring_bits = derived.ring_bits;
            let right = publish(party.me, index as u64, figure, ring_bits, state, net)
                .map_err(|err| Ending::of_step(&err))?;
            let right = right.data().first().copied().unwrap_or(0);
            let save = &derived.schedule.save;
            next = validated.next(stopping, index, right, save, &mut state.shares);
            tracing::info!(right, stops = next > index + 1, "validated");
            // An error means that nobody leads here.
            let _ = decided.send((index as u64, next as u64));
        }
        let revealed: Vec<Stored> = outputs
            .into_iter()
            .map(|output| Stored::Output {
                attempt: attempt.number,
                step: index as u64,
                share: output.into(),
            })
            .collect();
        if let (Some(results), false) = (results, revealed.is_empty()) {
            results
                .append(&revealed)
                .map_err(|err| over(format!("nothing is revealed: {err}")))?;
        }
        for stored in revealed {
            if let Stored::Output {
                attempt,
                step,
                share,
            } = stored
            {
                job.say(Event::Output {
                    step,
                    attempt,
                    share,
                });
            }
        }
        let now = net.stats();
        let seconds = start.elapsed().as_secs_f64();
        tracing::debug!(seconds, "step done");
        job.say(Event::Progress(progress(
            step.phase,
            index,
            steps.len(),
            seconds,
            before,
            &now,
        )));
        Ok((now, next))
    }

    /// A checkpoint of the state, of which `index` steps are done.
    fn checkpoint(&self, state: &State, index: usize) -> Checkpoint {
        Checkpoint {
            job: self.job.id,
            programs: resume::programs_hash(&self.prepared.derived),
            mark: Mark::of(&self.id, index as u64),
            results_bytes: self.prepared.results.as_ref().map_or(0, Results::bytes),
            stats: None,
            validated: self.validated.history().to_vec(),
            shares: state.shares.clone(),
        }
    }

    /// Refreshes the carried state and writes it down. All three parties refresh at the same steps,
    /// whether they can write or not.
    fn write_down(&self, state: &mut State, index: usize) {
        let ring_bits = self.prepared.derived.ring_bits;
        state.refresh(self.party.me, index as u64 - 1, &self.keys, ring_bits);
        let checkpoint = self.checkpoint(state, index);
        if let Some(mark) = resume::write_down(&self.party, &self.prepared.lease, checkpoint) {
            self.halt.say(Follow::Written(mark));
        }
    }

    /// Writes down what the job leaves, so that not even the loss of this process loses it, and the
    /// model that it keeps, beside its name.
    fn leave(
        &self,
        state: &mut State,
        stats: &NodeStats,
    ) -> Result<Option<(Mark, Option<StagedModel>)>, String> {
        let prepared = &self.prepared;
        if !prepared.keeps_results {
            return Ok(None);
        }
        let steps = prepared.derived.schedule.steps.len();
        let save = &prepared.derived.schedule.save;
        state.shares.retain(|name, _| save.contains(name));
        let resumed = prepared.attempt.resume;
        let mut last = self.checkpoint(state, steps);
        last.stats = Some(stats.clone());
        match resumed.filter(|mark| mark.step == steps as u64) {
            // Nothing was left to do.
            Some(mark) => last.mark = mark,
            None => {
                if let Some(index) = (steps as u64).checked_sub(1) {
                    let ring_bits = prepared.derived.ring_bits;
                    state.refresh(self.party.me, index, &self.keys, ring_bits);
                    last.shares.clone_from(&state.shares);
                }
                let written = self
                    .party
                    .store
                    .write_checkpoint(&prepared.lease, last.clone());
                written.map_err(|err| err.to_string())?;
            }
        }
        let description = &self.job.description;
        let model = resume::stage(&self.party, description, &prepared.derived, &last)?;
        Ok(Some((last.mark, model)))
    }
}

/// Notes what a step reveals, before it leaves. A benchmark's results on public numbers are noted with its
/// start: flushing the log is no part of what it measures.
fn note_outputs(
    party: &Party,
    job: &Job,
    index: usize,
    step: &Step,
    outputs: &[OutputShare],
) -> Result<(), String> {
    let description = &job.description;
    if outputs.is_empty() || matches!(description.kind, JobKind::Benchmark { .. }) {
        return Ok(());
    }
    let names = outputs.iter().map(|output| {
        let values = output.share.len();
        json!({"name": output.name, "values": values})
    });
    let names: Vec<_> = names.collect();
    let mut details = json!({"step": index, "outputs": names});
    if let Phase::Predict { .. } = step.phase {
        let rows = step.inputs.iter().flat_map(|input| input.rows.iter());
        details["rows"] = rows.filter(|row| **row != PADDING_ROW).count().into();
    }
    if let Phase::Validated { .. } = step.phase {
        details["also_to"] = "the three parties".into();
    }
    let requester = job.requester();
    let who = Some((requester.as_str(), description.requester));
    let written = party
        .audit
        .append("outputs_revealed", who, Some(job.id), details);
    written.map_err(|err| format!("{}: nothing is revealed: {err}", party.me))
}

fn progress(
    phase: Phase,
    step: usize,
    steps: usize,
    seconds: f64,
    before: &SessionStats,
    now: &SessionStats,
) -> Progress {
    let (phase, epoch, batch, batches) = match phase {
        Phase::Setup => ("setup", 0, 0, 1),
        Phase::Train { epoch, batch, of } => ("train", epoch, batch, of),
        Phase::Evaluate { epoch, batch, of } => ("evaluate", epoch, batch, of),
        Phase::HospitalResult { hospital } => ("hospital_result", 0, hospital, 1),
        Phase::Validate { epoch, batch, of } => ("validate", epoch, batch, of),
        Phase::Validated { epoch } => ("validated", epoch, 0, 1),
        Phase::Auc { block, of } => ("auc", 0, block, of),
        Phase::Predict { batch, of } => ("predict", 0, batch, of),
        Phase::Result { epoch } => ("result", epoch, 0, 1),
        Phase::RevealWeights => ("reveal_weights", 0, 0, 1),
        Phase::Benchmark { repetition, of } => ("benchmark", 0, repetition, of),
    };
    let sent = |stats: &SessionStats| by_peer(|peer| stats.payload_sent(peer)).iter().sum::<u64>();
    let dealt = |stats: &SessionStats| stats.payload_received(Peer::Dealer);
    Progress {
        step: step as u64,
        steps: steps as u64,
        phase: phase.into(),
        epoch: epoch as u64,
        batch: batch as u64,
        batches: batches as u64,
        seconds,
        rounds: now.rounds - before.rounds,
        sent_bytes: sent(now) - sent(before),
        dealer_bytes: dealt(now) - dealt(before),
    }
}

/// Keeps what a finished session leaves: the model, and no images whose predictions are done. That
/// images could not be removed is no reason to fail a job that is done.
pub(crate) async fn keep(
    party: &Arc<Party>,
    job: &Arc<Job>,
    model: Option<StagedModel>,
) -> Result<(), String> {
    if let Some(model) = model {
        on_files(move || model.keep()).await?;
    }
    forget_upload(party, job).await;
    Ok(())
}

/// Removes the images of a job that this party has accepted and that is over, well or not.
pub(crate) async fn forget_upload(party: &Arc<Party>, job: &Job) {
    let Some(upload) = job.description.upload().map(str::to_owned) else {
        return;
    };
    let party = party.clone();
    if let Err(reason) = on_files(move || party.store.remove_upload(&upload)).await {
        tracing::warn!(%reason, "images to predict could not be removed");
    }
}
