//! A member's connection to the three parties: shares data, asks for jobs, and puts the results
//! together that the parties reveal to this member.
//!
//! Secrets are split here and nowhere else; no party ever gets two shares of one. The state
//! machines of uploads and jobs are the parties' business (crate `trefoil-party`); the messages are
//! in `trefoil_consortium::wire`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use trefoil_consortium::receipt::{
    Schema, SignedReceipt, StagedReceipt, UploadId, check_receipts, chunk_rows,
};
use trefoil_consortium::wire::{
    self, Answer, Ask, CHUNK_MAX_BYTES, CONTROL_MAX_BYTES, CONTROL_VERSION, Chunk, Commit,
    EVENT_MAX_BYTES, Request, Share, UploadBegin,
};
use trefoil_consortium::{ConsortiumFile, JobDescription, SessionId, hex, random_bytes};
pub use trefoil_consortium::{DatasetInfo, JobId, NodeStats, Part, wire::Progress};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_protocol::ring::Tensor;
use trefoil_protocol::run::OutputShare;
use trefoil_protocol::run::party::reconstruct;
use trefoil_protocol::share::share;
use trefoil_transport::{Identity, Link, MsgStream, Node, Settings, StreamKind, TransportError};

/// A slower line than this is taken for a dead one, beyond the round's time-out.
const SLOWEST_BYTES_PER_S: u64 = 50_000;
/// Outputs that some but not all parties have sent, at most.
const PENDING_OUTPUTS_MAX: usize = 100_000;

/// Why something asked of the parties did not happen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// This member's own endpoint could not be made.
    #[error(transparent)]
    Endpoint(TransportError),
    /// The connection to a party.
    #[error("{party}: {source}")]
    Link {
        /// Which party.
        party: PartyId,
        /// What happened.
        source: TransportError,
    },
    /// A party's address leads nowhere.
    #[error("{party}: address {address:?} in the consortium file: {detail}")]
    Address {
        /// Which party.
        party: PartyId,
        /// Its address.
        address: String,
        /// What is wrong.
        detail: String,
    },
    /// A party said no.
    #[error("{party} refused {what}: {reason}")]
    Refused {
        /// Which party.
        party: PartyId,
        /// What was asked.
        what: String,
        /// Its reason.
        reason: String,
    },
    /// A party said something that does not belong here.
    #[error("{party} answered {what} with something else: {detail}")]
    Unexpected {
        /// Which party.
        party: PartyId,
        /// What was asked.
        what: String,
        /// What came.
        detail: String,
    },
    /// A party did not answer.
    #[error("{party} did not answer {what} within {waited_ms} ms")]
    Timeout {
        /// Which party.
        party: PartyId,
        /// What was asked.
        what: String,
        /// How long was waited.
        waited_ms: u64,
    },
    /// The three parties say different things.
    #[error("the parties disagree on {what}: {detail}")]
    Disagree {
        /// On what.
        what: String,
        /// What each says.
        detail: String,
    },
    /// What this member wants to share does not fit.
    #[error("{field}: {detail}")]
    Input {
        /// Which argument.
        field: &'static str,
        /// What is wrong with it.
        detail: String,
    },
    /// A job has failed.
    #[error("the job failed; {party} reports: {reason}")]
    Job {
        /// The party that said so first.
        party: PartyId,
        /// The reason, naming the node that is at fault.
        reason: String,
    },
    /// The operating system gives no randomness: nothing can be shared.
    #[error("{0}")]
    Random(String),
}

/// Rows to share.
pub struct Upload {
    /// The data set's name; ignored for [`Part::Predict`].
    pub dataset: String,
    /// Which rows.
    pub part: Part,
    /// Normalised images in fixed point, `[rows, words]`.
    pub images: Tensor,
    /// One-hot labels of value 1, `[rows, classes]`; none for [`Part::Predict`].
    pub labels: Option<Tensor>,
    /// Shape of one image: channels, height, width.
    pub shape: Vec<usize>,
}

impl std::fmt::Debug for Upload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Upload {{ {} {} {:?} }}",
            self.dataset,
            self.part,
            self.images.shape()
        )
    }
}

/// Proof that an upload is complete at all three parties.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt {
    /// The upload's name, as a prediction job refers to it.
    pub upload: String,
    /// Rows.
    pub rows: usize,
    /// The number among this member's uploads to the data set.
    pub number: u64,
    /// Digest of what the three parties hold.
    pub digest: [u8; 32],
}

/// What happens while a job is watched.
#[derive(Debug)]
pub enum Event {
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

/// One member's authenticated connection to the three parties. Use it inside one tokio runtime.
#[derive(Debug)]
pub struct Remote {
    node: Node,
    links: [Link; 3],
    consortium: ConsortiumFile,
    settings: Settings,
    /// Upload numbers are taken one after the other.
    uploading: tokio::sync::Mutex<()>,
}

impl Remote {
    /// Connects to the three parties; `addresses` go before the consortium file's.
    pub async fn connect(
        identity: &Identity,
        consortium: &ConsortiumFile,
        addresses: Option<[SocketAddr; 3]>,
        settings: &Settings,
    ) -> Result<Remote, RemoteError> {
        let addresses = match addresses {
            Some(addresses) => addresses,
            None => {
                let [a, b, c] = PartyId::ALL.map(|party| resolve(party, consortium, settings));
                let (a, b, c) = tokio::try_join!(a, b, c)?;
                [a, b, c]
            }
        };
        let local = addresses.iter().all(|addr| addr.ip().is_loopback());
        let ip: IpAddr = match (local, addresses.iter().any(SocketAddr::is_ipv6)) {
            (true, false) => Ipv4Addr::LOCALHOST.into(),
            (false, false) => Ipv4Addr::UNSPECIFIED.into(),
            (_, true) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let node = Node::bind(identity, (ip, 0).into(), settings).map_err(RemoteError::Endpoint)?;
        let connect = |party: PartyId| {
            let pin = consortium.node(Peer::Party(party)).pin;
            let connecting = node.connect(addresses[party.index()], pin);
            async move {
                connecting
                    .await
                    .map_err(|source| RemoteError::Link { party, source })
            }
        };
        let (a, b, c) = tokio::try_join!(
            connect(PartyId::P0),
            connect(PartyId::P1),
            connect(PartyId::P2)
        )?;
        Ok(Remote {
            node,
            links: [a, b, c],
            consortium: consortium.clone(),
            settings: settings.clone(),
            uploading: tokio::sync::Mutex::default(),
        })
    }

    /// Says good-bye to the parties.
    pub async fn close(self) {
        self.node.close("the member has finished").await;
    }

    /// The links, for their counters: P0, P1, P2.
    pub fn links(&self) -> &[Link; 3] {
        &self.links
    }

    /// Shares rows with the parties: chunks with fresh seeds, staged at each party, committed only
    /// with the receipts of all three. `progress` hears how many rows are staged.
    pub async fn upload(
        &self,
        upload: Upload,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Receipt, RemoteError> {
        let (schema, rows) = check_upload(&upload)?;
        let chunks = chunk_rows(rows, &schema).ok_or_else(|| RemoteError::Input {
            field: "images",
            detail: format!(
                "{rows} rows of shape {:?} are too few or too many for one upload",
                upload.shape
            ),
        })?;
        let _one_at_a_time = self.uploading.lock().await;
        let id: UploadId = random_bytes().map_err(RemoteError::Random)?;
        let predict = upload.part == Part::Predict;
        let begin = UploadBegin {
            upload: id,
            dataset: if predict {
                String::new()
            } else {
                upload.dataset.clone()
            },
            part: upload.part,
            schema: schema.clone(),
            rows: rows as u64,
        };
        let mut streams = self.open_all(&Ask::Upload(begin.clone())).await?;
        let mut number = 1;
        let ready = self
            .receive_all(&mut streams, "the upload", CONTROL_MAX_BYTES, 0)
            .await?;
        for (party, answer) in PartyId::ALL.into_iter().zip(ready) {
            match answer {
                Answer::Ready { next_number } => number = number.max(next_number),
                other => return Err(unexpected(party, "the upload", other)),
            }
        }
        let about = StagedReceipt {
            upload: id,
            part: begin.part,
            dataset: begin.dataset.clone(),
            chunk: 0,
            rows: 0,
            digest: [0; 32],
            schema: schema.hash(),
        };
        let mut receipts: [Vec<SignedReceipt>; 3] = Default::default();
        let mut done = 0;
        for (chunk, chunk_rows) in chunks.iter().enumerate() {
            let range = done..done + *chunk_rows as usize;
            let full_to = PartyId::ALL[chunk % 3];
            let [a, b, c] = split(&upload.images, range.clone(), full_to)?;
            let [label_a, label_b, label_c] = match &upload.labels {
                Some(labels) => split(labels, range.clone(), full_to)?.map(Some),
                None => [None, None, None],
            };
            let messages =
                [(a, label_a), (b, label_b), (c, label_c)].map(|(images, labels)| Chunk {
                    chunk: chunk as u32,
                    images,
                    labels,
                });
            let bytes = 8 * range.len() * schema.row_words().unwrap_or(0);
            self.send_all(&mut streams, &messages, "a chunk", bytes as u64)
                .await?;
            let staged = self
                .receive_all(&mut streams, "a chunk", CONTROL_MAX_BYTES, bytes as u64)
                .await?;
            for (party, answer) in PartyId::ALL.into_iter().zip(staged) {
                match answer {
                    Answer::Staged(receipt) => receipts[party.index()].push(receipt),
                    other => return Err(unexpected(party, "a chunk", other)),
                }
            }
            done = range.end;
            progress(done);
        }
        // The parties check them too; a wrong one is found before anybody commits.
        let digest =
            check_receipts(&self.consortium, &about, &chunks, &receipts).map_err(|detail| {
                RemoteError::Disagree {
                    what: "the upload's receipts".into(),
                    detail,
                }
            })?;
        let commit = Commit { number, receipts };
        let commits = [commit.clone(), commit.clone(), commit];
        self.send_all(&mut streams, &commits, "the commit", 0)
            .await?;
        for (party, answer) in PartyId::ALL.into_iter().zip(
            self.receive_all(&mut streams, "the commit", CONTROL_MAX_BYTES, 0)
                .await?,
        ) {
            match answer {
                Answer::Committed { digest: theirs } if theirs == digest => {}
                other => return Err(unexpected(party, "the commit", other)),
            }
        }
        finish_all(streams).await;
        Ok(Receipt {
            upload: hex(&id),
            rows,
            number,
            digest,
        })
    }

    /// What a data set holds: asked from all three parties, who must agree.
    pub async fn dataset(&self, name: &str) -> Result<DatasetInfo, RemoteError> {
        let what = format!("data set {name}");
        let mut streams = self.open_all(&Ask::Dataset(name.into())).await?;
        let mut infos = Vec::new();
        for (party, answer) in PartyId::ALL.into_iter().zip(
            self.receive_all(&mut streams, &what, CONTROL_MAX_BYTES, 0)
                .await?,
        ) {
            match answer {
                Answer::Dataset(info) => infos.push(info),
                other => return Err(unexpected(party, &what, other)),
            }
        }
        finish_all(streams).await;
        if infos.iter().any(|info| *info != infos[0]) {
            let say = |(party, info): (PartyId, &DatasetInfo)| {
                format!(
                    "{party} has {} training and {} test rows, snapshot {}",
                    info.train_rows,
                    info.test_rows,
                    hex(&info.snapshot[..8])
                )
            };
            let detail: Vec<String> = PartyId::ALL.into_iter().zip(&infos).map(say).collect();
            return Err(RemoteError::Disagree {
                what,
                detail: detail.join("; "),
            });
        }
        Ok(infos.swap_remove(0))
    }

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
            let asked = self.ask_one(party, &Ask::Submit(job), "the job").await;
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

    /// As [`Remote::watch`], after [`Remote::submit_each`].
    #[doc(hidden)]
    pub async fn watch_each(
        &self,
        jobs: [JobId; 3],
        on_event: &mut dyn FnMut(Event),
    ) -> Result<JobResult, RemoteError> {
        let asks = jobs.map(Ask::Watch);
        let [a, b, c] = PartyId::ALL.map(|party| self.open(party, &asks[party.index()]));
        let (mut a, mut b, mut c) = tokio::try_join!(a, b, c)?;
        let mut gather = Gather::new(self.consortium.core.ring_bits);
        while !gather.complete() {
            let [open_a, open_b, open_c] =
                PartyId::ALL.map(|party| gather.stats[party.index()].is_none());
            let (party, message) = tokio::select! {
                message = a.recv::<Watched>(EVENT_MAX_BYTES), if open_a => (PartyId::P0, message),
                message = b.recv::<Watched>(EVENT_MAX_BYTES), if open_b => (PartyId::P1, message),
                message = c.recv::<Watched>(EVENT_MAX_BYTES), if open_c => (PartyId::P2, message),
            };
            let message = message.map_err(|source| RemoteError::Link { party, source })?;
            match message.unwrap_or(Watched::Failed(
                "it ended the report without a result".into(),
            )) {
                Watched::Failed(reason) => return Err(RemoteError::Job { party, reason }),
                event => gather.take(party, event, on_event)?,
            }
        }
        gather.finish()
    }

    async fn open_all(&self, ask: &Ask) -> Result<[MsgStream; 3], RemoteError> {
        let [a, b, c] = PartyId::ALL.map(|party| self.open(party, ask));
        let (a, b, c) = tokio::try_join!(a, b, c)?;
        Ok([a, b, c])
    }

    async fn open(&self, party: PartyId, ask: &Ask) -> Result<MsgStream, RemoteError> {
        let link = &self.links[party.index()];
        let opening = async {
            let mut stream = link.open(StreamKind::Control, [0; 32]).await?;
            stream
                .send(&Request {
                    version: CONTROL_VERSION,
                    ask: ask.clone(),
                })
                .await?;
            Ok(stream)
        };
        self.within(party, "a request", 0, opening).await
    }

    async fn ask_one(&self, party: PartyId, ask: &Ask, what: &str) -> Result<Answer, RemoteError> {
        let mut stream = self.open(party, ask).await?;
        self.receive(party, &mut stream, what, CONTROL_MAX_BYTES, 0)
            .await
    }

    async fn send_all<T: serde::Serialize>(
        &self,
        streams: &mut [MsgStream; 3],
        messages: &[T; 3],
        what: &str,
        bytes: u64,
    ) -> Result<(), RemoteError> {
        let [a, b, c] = streams;
        tokio::try_join!(
            self.within(PartyId::P0, what, bytes, a.send(&messages[0])),
            self.within(PartyId::P1, what, bytes, b.send(&messages[1])),
            self.within(PartyId::P2, what, bytes, c.send(&messages[2])),
        )?;
        Ok(())
    }

    async fn receive_all(
        &self,
        streams: &mut [MsgStream; 3],
        what: &str,
        max: usize,
        bytes: u64,
    ) -> Result<[Answer; 3], RemoteError> {
        let [a, b, c] = streams;
        let (a, b, c) = tokio::try_join!(
            self.receive(PartyId::P0, a, what, max, bytes),
            self.receive(PartyId::P1, b, what, max, bytes),
            self.receive(PartyId::P2, c, what, max, bytes),
        )?;
        Ok([a, b, c])
    }

    async fn receive(
        &self,
        party: PartyId,
        stream: &mut MsgStream,
        what: &str,
        max: usize,
        bytes: u64,
    ) -> Result<Answer, RemoteError> {
        let answer = self
            .within(party, what, bytes, stream.recv::<Answer>(max))
            .await?;
        match answer {
            Some(Answer::Refused(reason)) => Err(RemoteError::Refused {
                party,
                what: what.into(),
                reason,
            }),
            Some(answer) => Ok(answer),
            None => {
                let detail = "the end of the stream".into();
                Err(RemoteError::Unexpected {
                    party,
                    what: what.into(),
                    detail,
                })
            }
        }
    }

    /// Waits at most a round's time-out, and longer where many bytes are on their way.
    async fn within<T>(
        &self,
        party: PartyId,
        what: &str,
        bytes: u64,
        doing: impl Future<Output = Result<T, TransportError>>,
    ) -> Result<T, RemoteError> {
        let waited_ms = self.settings.round_timeout_ms + 1_000 * bytes / SLOWEST_BYTES_PER_S;
        match tokio::time::timeout(Duration::from_millis(waited_ms), doing).await {
            Ok(result) => result.map_err(|source| RemoteError::Link { party, source }),
            Err(_) => Err(RemoteError::Timeout {
                party,
                what: what.into(),
                waited_ms,
            }),
        }
    }
}

/// What a watched party sends: events, or at once a refusal.
type Watched = wire::Event;

/// The three parties' reports on one job.
struct Gather {
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
    fn new(ring_bits: u8) -> Gather {
        Gather {
            started: [None; 3],
            pending: Vec::new(),
            outputs: Vec::new(),
            stats: [None, None, None],
            dealer: None,
            ring_bits,
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
        match event {
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

async fn resolve(
    party: PartyId,
    consortium: &ConsortiumFile,
    settings: &Settings,
) -> Result<SocketAddr, RemoteError> {
    let address = consortium.node(Peer::Party(party)).address.clone();
    let waited = Duration::from_millis(settings.connect_timeout_ms);
    let found = match tokio::time::timeout(waited, tokio::net::lookup_host(&address)).await {
        Ok(Ok(mut found)) => found.next().ok_or_else(|| "has no address".to_owned()),
        Ok(Err(err)) => Err(err.to_string()),
        Err(_) => Err(format!(
            "was not found within {} ms",
            settings.connect_timeout_ms
        )),
    };
    found.map_err(|detail| RemoteError::Address {
        party,
        address,
        detail,
    })
}

fn unexpected(party: PartyId, what: &str, answer: Answer) -> RemoteError {
    RemoteError::Unexpected {
        party,
        what: what.into(),
        detail: format!("{answer:?}"),
    }
}

async fn finish_all(streams: [MsgStream; 3]) {
    for stream in streams {
        // All answers are here; how the stream ends does not matter any more.
        let _ = stream.finish().await;
    }
}

fn check_upload(upload: &Upload) -> Result<(Schema, usize), RemoteError> {
    let input = |field, detail| RemoteError::Input { field, detail };
    let side = |side: &usize| u32::try_from(*side).map_err(|err| input("shape", err.to_string()));
    let shape = upload
        .shape
        .iter()
        .map(side)
        .collect::<Result<Vec<u32>, _>>()?;
    let &[rows, words] = upload.images.shape() else {
        return Err(input(
            "images",
            format!(
                "expected shape [rows, words], found {:?}",
                upload.images.shape()
            ),
        ));
    };
    let classes = match (&upload.labels, upload.part) {
        (None, Part::Predict) => 0,
        (Some(_), Part::Predict) => {
            return Err(input("labels", "images to predict have no labels".into()));
        }
        (None, part) => {
            return Err(input(
                "labels",
                format!("rows of the {part} part need labels"),
            ));
        }
        (Some(labels), _) => match labels.shape() {
            &[labelled, classes] if labelled == rows => classes,
            other => {
                return Err(input(
                    "labels",
                    format!("expected shape [{rows}, classes], found {other:?}"),
                ));
            }
        },
    };
    let classes = u32::try_from(classes).map_err(|err| input("labels", err.to_string()))?;
    let schema = Schema { shape, classes };
    match schema.image_words() {
        Some(expected) if expected == words => Ok((schema, rows)),
        _ => Err(input(
            "shape",
            format!("{:?} does not fit images of {words} words", upload.shape),
        )),
    }
}

fn split(
    tensor: &Tensor,
    rows: std::ops::Range<usize>,
    full_to: PartyId,
) -> Result<[Share; 3], RemoteError> {
    let words = tensor.len() / tensor.shape()[0].max(1);
    let seeds = [
        random_bytes().map_err(RemoteError::Random)?,
        random_bytes().map_err(RemoteError::Random)?,
    ];
    Ok(share(
        &tensor.data()[rows.start * words..rows.end * words],
        seeds,
        full_to,
    )
    .map(Share::from))
}

// A chunk's bound at the parties covers what is sent here.
const _: () = assert!(CHUNK_MAX_BYTES > trefoil_consortium::receipt::CHUNK_BYTES_MAX);
