//! Jobs: asked for at all three parties, followed to their end, and their results put together.

use std::time::{Duration, Instant};

use trefoil_consortium::wire::{self, Answer, Ask, EVENT_MAX_BYTES};
use trefoil_consortium::{Core, JobDescription, JobId, NodeStats, SessionId, hex, wire::Progress};
use trefoil_protocol::party::PartyId;
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::run::OutputShare;
use trefoil_protocol::run::party::reconstruct;

use trefoil_transport::MsgStream;

use super::{Remote, RemoteError, unexpected};

/// Outputs that some but not all parties have sent, at most.
const PENDING_OUTPUTS_MAX: usize = 100_000;

/// How often a party is tried again whose link broke while a job waits for approval.
const WATCH_AGAIN_EVERY: Duration = Duration::from_millis(500);

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
    /// All parties have started the session.
    Started {
        /// Its id.
        session: SessionId,
        /// Its steps.
        steps: u64,
    },
    /// P0 has done a step.
    Progress(Progress),
    /// A result was revealed.
    Output(Revealed),
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

    /// Opens the report of a job anew; the party begins it from the start.
    async fn watch_again(&self, party: PartyId, ask: &Ask) -> Result<MsgStream, RemoteError> {
        let begun = Instant::now();
        loop {
            match self.open(party, ask).await {
                Err(err) if err.may_pass() && begun.elapsed() < self.resume_timeout => {
                    tokio::time::sleep(WATCH_AGAIN_EVERY).await;
                }
                opened => return opened,
            }
        }
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
        let [a, b, c] = PartyId::ALL.map(|party| self.open(party, &asks[party.index()]));
        let (a, b, c) = tokio::try_join!(a, b, c)?;
        let mut streams = [a, b, c];
        let mut gather = Gather::new(&self.consortium.core);
        while !gather.complete() {
            let [open_a, open_b, open_c] =
                PartyId::ALL.map(|party| gather.stats[party.index()].is_none());
            let [a, b, c] = &mut streams;
            let (party, message) = tokio::select! {
                message = a.recv::<Watched>(EVENT_MAX_BYTES), if open_a => (PartyId::P0, message),
                message = b.recv::<Watched>(EVENT_MAX_BYTES), if open_b => (PartyId::P1, message),
                message = c.recv::<Watched>(EVENT_MAX_BYTES), if open_c => (PartyId::P2, message),
            };
            let message = match message {
                Ok(message) => message,
                // Approval takes days: a link that breaks meanwhile ends nothing.
                Err(_) if gather.waits_for_approval() => {
                    let at = party.index();
                    streams[at] = self.watch_again(party, &asks[at]).await?;
                    continue;
                }
                Err(source) => return Err(RemoteError::Link { party, source }),
            };
            match message.unwrap_or(Watched::Failed(
                "it ended the report without a result".into(),
            )) {
                Watched::Failed(reason) => return Err(RemoteError::Job { party, reason }),
                event => gather.take(party, event, on_event)?,
            }
        }
        gather.finish()
    }
}

/// What a watched party sends: events, or at once a refusal.
type Watched = wire::Event;

/// The three parties' reports on one job.
struct Gather {
    /// The parties' institutions.
    names: [String; 3],
    /// Where the job waits for approval.
    held: [bool; 3],
    /// It has waited somewhere.
    patient: bool,
    /// The session that each party says it has started.
    started: [Option<(SessionId, u64)>; 3],
    pending: Vec<(u64, String, [Option<OutputShare>; 3])>,
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
            patient: false,
            started: [None; 3],
            pending: Vec::new(),
            outputs: Vec::new(),
            stats: [None, None, None],
            dealer: None,
            ring_bits: core.ring_bits,
        }
    }

    /// Whether the job has waited for a person and has not started.
    fn waits_for_approval(&self) -> bool {
        self.patient && self.started.iter().all(Option::is_none)
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
                self.patient = true;
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
            } => {
                let known = self.started.iter().flatten().next().copied();
                if ring_bits != self.ring_bits || known.is_some_and(|k| k != (session, steps)) {
                    return Err(RemoteError::Disagree {
                        what: "the session".into(),
                        detail: format!(
                            "{party} started {} with {steps} steps in a ring of {ring_bits} bits",
                            hex(&session[..8])
                        ),
                    });
                }
                self.started[party.index()] = Some((session, steps));
                if self.started.iter().all(Option::is_some) {
                    on_event(Event::Started { session, steps });
                }
            }
            wire::Event::Progress(progress) if party == PartyId::P0 => {
                on_event(Event::Progress(progress))
            }
            wire::Event::Progress(_) => {}
            wire::Event::Output { step, share } => self.output(party, step, share, on_event)?,
            wire::Event::Done { stats, dealer } => {
                self.stats[party.index()] = Some(stats);
                self.dealer = self.dealer.take().or(dealer);
            }
            wire::Event::Failed(reason) => return Err(RemoteError::Job { party, reason }),
        }
        Ok(())
    }

    fn output(
        &mut self,
        party: PartyId,
        step: u64,
        share: wire::WireOutput,
        on_event: &mut dyn FnMut(Event),
    ) -> Result<(), RemoteError> {
        let unexpected = |detail| RemoteError::Unexpected {
            party,
            what: "the job's results".into(),
            detail,
        };
        let share = share.into_share().map_err(unexpected)?;
        let known = self
            .pending
            .iter()
            .position(|(at, name, _)| *at == step && *name == share.name);
        let at = known.unwrap_or(self.pending.len());
        if known.is_none() {
            if self.pending.len() >= PENDING_OUTPUTS_MAX {
                return Err(unexpected(format!(
                    "more than {PENDING_OUTPUTS_MAX} results that other parties lack"
                )));
            }
            self.pending
                .push((step, share.name.clone(), [None, None, None]));
        }
        self.pending[at].2[party.index()] = Some(share);
        if self.pending[at].2.iter().any(Option::is_none) {
            return Ok(());
        }
        let (step, name, shares) = self.pending.swap_remove(at);
        let [Some(a), Some(b), Some(c)] = shares else {
            return Ok(());
        };
        let tensor =
            reconstruct(&[a, b, c], self.ring_bits).map_err(|detail| RemoteError::Disagree {
                what: format!("result {name:?} of step {step}"),
                detail,
            })?;
        let step = usize::try_from(step).map_err(|err| unexpected(err.to_string()))?;
        let revealed = Revealed { step, name, tensor };
        on_event(Event::Output(revealed.clone()));
        self.outputs.push(revealed);
        Ok(())
    }

    fn finish(mut self) -> Result<JobResult, RemoteError> {
        if let Some((step, name, shares)) = self.pending.first() {
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
