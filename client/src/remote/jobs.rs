//! Jobs: asked for at all three parties, followed to their end, and their results put together.

use std::time::{Duration, Instant};

use trefoil_consortium::wire::{self, Answer, Ask, EVENT_MAX_BYTES};
use trefoil_consortium::{Core, JobDescription, JobId, NodeStats, SessionId, hex, wire::Progress};
use trefoil_protocol::party::PartyId;
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::run::OutputShare;
use trefoil_protocol::run::party::reconstruct;

use tokio::sync::mpsc;
use trefoil_transport::TransportError;

use super::{Remote, RemoteError, unexpected};

/// Outputs that some but not all parties have sent, at most.
const PENDING_OUTPUTS_MAX: usize = 100_000;

/// How often a party is tried again whose link broke.
const WATCH_AGAIN_EVERY: Duration = Duration::from_millis(500);
/// Events of one party that wait for the others'.
const EVENTS_AHEAD: usize = 16;

/// What happens while a job is watched.
#[derive(Debug)]
pub enum Event {
    /// The job waits for approval at a party.
    Held {
        /// Which party.
        party: PartyId,
        /// Which, with its institution's name.
        at: String,
    },
    /// A party has approved it.
    Approved {
        /// Which party.
        party: PartyId,
        /// Which, with its institution's name.
        at: String,
    },
    /// A session was interrupted; the job goes on in another one. In P0's words: what it waits for.
    Interrupted(String),
    /// All parties have started the session.
    Started {
        /// Its id.
        session: SessionId,
        /// Steps of the job.
        steps: u64,
        /// Its first step: the one before which an interrupted job is taken up.
        from: u64,
    },
    /// P0 has done a step.
    Progress(Progress),
    /// A result was revealed.
    Output(Revealed),
    /// What the job waits for, in a party's words.
    Waits {
        /// Which party.
        party: PartyId,
        /// For what.
        reason: String,
    },
}

/// A result, opened here and nowhere else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revealed {
    /// The step that revealed it: an index into the job's schedule.
    pub step: usize,
    /// The output's name in the step's program.
    pub name: String,
    /// Its value.
    pub tensor: Tensor,
}

/// A finished job.
#[derive(Debug)]
pub struct JobResult {
    /// Everything that was revealed, in order of steps.
    pub outputs: Vec<Revealed>,
    /// What P0, P1 and P2 counted.
    pub parties: [NodeStats; 3],
    /// What the dealer counted.
    pub dealer: NodeStats,
}

impl Remote {
    /// Asks all three parties to run a job.
    pub async fn submit(&self, job: JobDescription) -> Result<JobId, RemoteError> {
        self.submit_each([job.clone(), job.clone(), job]).await
    }

    /// As [`Remote::submit`], with a description for each party. Parties refuse each other's
    /// proposals where they differ; only a test has a use for that.
    #[doc(hidden)]
    pub async fn submit_each(&self, jobs: [JobDescription; 3]) -> Result<JobId, RemoteError> {
        let id = jobs[0].id();
        // P0 proposes as soon as it has the job, so the others hear of it first.
        for party in [PartyId::P1, PartyId::P2, PartyId::P0] {
            let job = jobs[party.index()].clone();
            let expected = job.id();
            let asked = self
                .ask_one(party, &Ask::Submit(Box::new(job)), "the job")
                .await;
            match asked {
                Ok(Answer::Submitted(theirs)) if theirs == expected => {}
                Ok(other) => return Err(unexpected(party, "the job", other)),
                Err(err) => {
                    for party in PartyId::ALL {
                        // What a party has not got, it cannot give back.
                        let _ = self
                            .ask_one(
                                party,
                                &Ask::Withdraw(jobs[party.index()].id()),
                                "the withdrawal",
                            )
                            .await;
                    }
                    return Err(err);
                }
            }
        }
        Ok(id)
    }

    /// Follows a job to its end. Revealed results are put together as soon as the shares of all
    /// three parties are here.
    pub async fn watch(
        &self,
        job: JobId,
        on_event: &mut dyn FnMut(Event),
    ) -> Result<JobResult, RemoteError> {
        self.watch_each([job; 3], on_event).await
    }

    /// Takes a job back that has not started; at P0 first, so that none starts meanwhile.
    ///
    /// # Errors
    /// The first party's that still has the job, after all were asked: it runs, or is over.
    pub async fn withdraw(&self, job: JobId) -> Result<(), RemoteError> {
        let mut result = Ok(());
        for party in PartyId::ALL {
            let what = "the withdrawal";
            let answer = self.ask_one(party, &Ask::Withdraw(job), what).await;
            let withdrawn = match answer {
                Ok(Answer::Withdrawn) => Ok(()),
                Ok(other) => Err(unexpected(party, what, other)),
                Err(err) => Err(err),
            };
            result = result.and(withdrawn);
        }
        result
    }

    /// As [`Remote::watch`], after [`Remote::submit_each`].
    #[doc(hidden)]
    pub async fn watch_each(
        &self,
        jobs: [JobId; 3],
        on_event: &mut dyn FnMut(Event),
    ) -> Result<JobResult, RemoteError> {
        let asks = jobs.map(Ask::Watch);
        let (sender, mut heard) = mpsc::channel(EVENTS_AHEAD);
        let feeding = async {
            let [a, b, c] =
                PartyId::ALL.map(|party| self.feed(party, &asks[party.index()], sender.clone()));
            drop(sender);
            tokio::join!(a, b, c);
        };
        let mut gather = Gather::new(&self.consortium.core);
        let gathering = async {
            while !gather.complete() {
                let Some((party, event)) = heard.recv().await else {
                    break;
                };
                gather.take(party, event?, on_event)?;
            }
            Ok(())
        };
        let gathered = async {
            tokio::pin!(gathering);
            tokio::select! {
                biased;
                gathered = &mut gathering => gathered,
                // What they have heard is still to be taken.
                () = feeding => gathering.await,
            }
        };
        gathered.await?;
        gather.finish()
    }

    /// Passes on what a party says of a job until it has said all, or is away for too long. A link
    /// that breaks is made anew: the party begins its report from the start.
    async fn feed(
        &self,
        party: PartyId,
        ask: &Ask,
        sender: mpsc::Sender<(PartyId, Result<Watched, RemoteError>)>,
    ) {
        let mut away: Option<Instant> = None;
        loop {
            let err = match self.open(party, ask).await {
                Ok(mut stream) => loop {
                    match stream.recv::<Watched>(EVENT_MAX_BYTES).await {
                        Ok(Some(event)) => {
                            away = None;
                            let last = matches!(event, Watched::Done { .. } | Watched::Failed(_));
                            // Nobody hears any more once the job is over.
                            if sender.send((party, Ok(event))).await.is_err() || last {
                                return;
                            }
                        }
                        Ok(None) => {
                            let addr = stream.link().remote_addr();
                            let reason = "it ended the report without a result".into();
                            let source = TransportError::Closed { addr, reason };
                            break RemoteError::Link { party, source };
                        }
                        Err(source) => break RemoteError::Link { party, source },
                    }
                },
                Err(err) => err,
            };
            let since = *away.get_or_insert_with(Instant::now);
            if !err.may_pass() || since.elapsed() > self.watch_timeout {
                // Nobody hears any more once the job is over.
                let _ = sender.send((party, Err(err))).await;
                return;
            }
            tokio::time::sleep(WATCH_AGAIN_EVERY).await;
        }
    }
}

/// What a watched party sends: events, or at once a refusal.
type Watched = wire::Event;

/// One session of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Session {
    attempt: u32,
    from: u64,
    id: SessionId,
    steps: u64,
}

impl Session {
    /// Whether what an attempt revealed at a step counts no more: this session reveals it anew.
    fn replaces(&self, attempt: u32, step: u64) -> bool {
        attempt < self.attempt && step >= self.from
    }
}

/// An output of which some shares are missing. Shares of two attempts do not belong together.
struct Pending {
    attempt: u32,
    step: u64,
    name: String,
    shares: [Option<OutputShare>; 3],
}

/// The three parties' reports on one job.
struct Gather {
    /// The parties' institutions.
    names: [String; 3],
    /// Where the job waits for approval.
    held: [bool; 3],
    /// The newest session that each party says it has started.
    started: [Option<Session>; 3],
    /// What P0 has last said that the job waits for.
    waits: String,
    pending: Vec<Pending>,
    outputs: Vec<Revealed>,
    stats: [Option<NodeStats>; 3],
    dealer: Option<NodeStats>,
    /// The consortium's ring, in which additive shares combine.
    ring_bits: u8,
}

impl Gather {
    fn new(core: &Core) -> Gather {
        Gather {
            names: core.parties.each_ref().map(|party| party.name.clone()),
            held: [false; 3],
            waits: String::new(),
            started: [None; 3],
            pending: Vec::new(),
            outputs: Vec::new(),
            stats: [None, None, None],
            dealer: None,
            ring_bits: core.ring_bits,
        }
    }

    fn complete(&self) -> bool {
        self.stats.iter().all(Option::is_some)
    }

    fn take(
        &mut self,
        party: PartyId,
        event: wire::Event,
        on_event: &mut dyn FnMut(Event),
    ) -> Result<(), RemoteError> {
        let at = || format!("{party} ({})", self.names[party.index()]);
        match event {
            // A party that was started again says it again.
            wire::Event::Held => {
                if !std::mem::replace(&mut self.held[party.index()], true) {
                    on_event(Event::Held { party, at: at() });
                }
            }
            wire::Event::Approved => {
                if std::mem::replace(&mut self.held[party.index()], false) {
                    on_event(Event::Approved { party, at: at() });
                }
            }
            wire::Event::Started {
                session,
                steps,
                ring_bits,
                attempt,
                from,
            } => {
                let new = Session {
                    attempt,
                    from,
                    id: session,
                    steps,
                };
                let mut known = self.started.iter().flatten();
                let differs = known.any(|known| known.attempt == attempt && *known != new);
                if ring_bits != self.ring_bits || differs {
                    return Err(RemoteError::Disagree {
                        what: "the session".into(),
                        detail: format!(
                            "{party} started {} with {steps} steps in a ring of {ring_bits} bits",
                            hex(&session[..8])
                        ),
                    });
                }
                // A report that begins anew names all sessions again.
                let own = &mut self.started[party.index()];
                if own.is_some_and(|own| own.attempt >= attempt) {
                    return Ok(());
                }
                *own = Some(new);
                self.pending
                    .retain(|pending| !new.replaces(pending.attempt, pending.step));
                if self.started.iter().all(|other| *other == Some(new)) {
                    self.waits.clear();
                    on_event(Event::Started {
                        session,
                        steps,
                        from,
                    });
                }
            }
            wire::Event::Interrupted(waits) => {
                if party == PartyId::P0 && self.waits != waits {
                    self.waits.clone_from(&waits);
                    on_event(Event::Interrupted(waits));
                }
            }
            wire::Event::Progress(progress) if party == PartyId::P0 => {
                on_event(Event::Progress(progress))
            }
            wire::Event::Progress(_) => {}
            wire::Event::Output {
                step,
                attempt,
                share,
            } => self.output(party, (attempt, step), share, on_event)?,
            wire::Event::Done { stats, dealer } => {
                self.stats[party.index()] = Some(stats);
                self.dealer = self.dealer.take().or(dealer);
            }
            wire::Event::Waits(reason) => on_event(Event::Waits { party, reason }),
            wire::Event::Failed(reason) => return Err(RemoteError::Job { party, reason }),
        }
        Ok(())
    }

    fn output(
        &mut self,
        party: PartyId,
        (attempt, step): (u32, u64),
        share: wire::WireOutput,
        on_event: &mut dyn FnMut(Event),
    ) -> Result<(), RemoteError> {
        let unexpected = |detail| RemoteError::Unexpected {
            party,
            what: "the job's results".into(),
            detail,
        };
        let share = share.into_share().map_err(unexpected)?;
        let mut sessions = self.started.iter().flatten();
        if sessions.any(|session| session.replaces(attempt, step)) {
            return Ok(());
        }
        let known = self.pending.iter().position(|pending| {
            (pending.attempt, pending.step) == (attempt, step) && pending.name == share.name
        });
        let at = known.unwrap_or(self.pending.len());
        if known.is_none() {
            if self.pending.len() >= PENDING_OUTPUTS_MAX {
                return Err(unexpected(format!(
                    "more than {PENDING_OUTPUTS_MAX} results that other parties lack"
                )));
            }
            self.pending.push(Pending {
                attempt,
                step,
                name: share.name.clone(),
                shares: [None, None, None],
            });
        }
        self.pending[at].shares[party.index()] = Some(share);
        if self.pending[at].shares.iter().any(Option::is_none) {
            return Ok(());
        }
        let Pending {
            step, name, shares, ..
        } = self.pending.swap_remove(at);
        let [Some(a), Some(b), Some(c)] = shares else {
            return Ok(());
        };
        let disagree = |detail| RemoteError::Disagree {
            what: format!("result {name:?} of step {step}"),
            detail,
        };
        let tensor = reconstruct(&[a, b, c], self.ring_bits).map_err(disagree)?;
        let step = usize::try_from(step).map_err(|err| unexpected(err.to_string()))?;
        let mut known = self.outputs.iter();
        if let Some(known) = known.find(|known| known.step == step && known.name == name) {
            // Revealed again by a session that took the job up, or reported again.
            if known.tensor != tensor {
                let detail = "two sessions of the job revealed different values";
                return Err(disagree(detail.into()));
            }
            return Ok(());
        }
        let revealed = Revealed { step, name, tensor };
        on_event(Event::Output(revealed.clone()));
        self.outputs.push(revealed);
        Ok(())
    }

    fn finish(mut self) -> Result<JobResult, RemoteError> {
        // A report that began anew repeats what the three have sent.
        let outputs = &self.outputs;
        self.pending.retain(|pending| {
            let known = |output: &Revealed| {
                output.step as u64 == pending.step && output.name == pending.name
            };
            !outputs.iter().any(known)
        });
        if let Some(Pending {
            step, name, shares, ..
        }) = self.pending.first()
        {
            let missing: Vec<String> = PartyId::ALL
                .into_iter()
                .filter(|party| shares[party.index()].is_none())
                .map(|party| party.to_string())
                .collect();
            let detail = format!("no share from {}", missing.join(" and "));
            return Err(RemoteError::Disagree {
                what: format!("result {name:?} of step {step}"),
                detail,
            });
        }
        self.outputs.sort_by_key(|output| output.step);
        Ok(JobResult {
            outputs: self.outputs,
            parties: self.stats.map(Option::unwrap_or_default),
            dealer: self.dealer.unwrap_or_default(),
        })
    }
}
