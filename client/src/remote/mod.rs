//! A member's connection to the three parties: shares data, asks for jobs, and puts the results
//! together that the parties reveal to this member.
//!
//! Secrets are split in `upload.rs` and nowhere else; no party ever gets two shares of one. The
//! state machines of uploads and jobs are the parties' business (crate `trefoil-party`); the
//! messages are in `trefoil_consortium::wire`. Here: links, requests and errors; `jobs.rs`: jobs.

mod jobs;
mod served;
mod upload;
mod withdraw;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use trefoil_consortium::meeting::{self, NodeInfo};
use trefoil_consortium::wire::{Answer, Ask, CONTROL_MAX_BYTES, CONTROL_VERSION, Request};
use trefoil_consortium::{ConsortiumFile, hex};
pub use trefoil_consortium::{DatasetInfo, JobId, NodeStats, Part, wire::Progress};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::{Identity, Link, MsgStream, Node, Settings, StreamKind, TransportError};

pub use jobs::{Event, JobResult, Revealed};
pub use served::HeldModel;
pub use upload::{LazyUpload, PendingUpload, ReadRows, Receipt, Upload};
pub use withdraw::{Answers, Withdrawer};

/// How long an upload that does not go forward is tried, unless [`Remote::set_resume_timeout`] says
/// otherwise.
pub const RESUME_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a party may be away while one of its jobs is watched, unless
/// [`Remote::set_watch_timeout`] says otherwise.
pub const WATCH_TIMEOUT: Duration = Duration::from_secs(60);
/// A slower line than this is taken for a dead one, beyond the round's time-out.
const SLOWEST_BYTES_PER_S: u64 = 50_000;

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
    /// A party of another consortium, or with other software.
    #[error("{0}")]
    Consortium(String),
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
    /// A party cannot do it now; the same may be asked again.
    #[error("{party} is busy with other work than {what}: {reason}")]
    Busy {
        /// Which party.
        party: PartyId,
        /// What was asked.
        what: String,
        /// Its reason.
        reason: String,
    },
    /// Another upload of this member has the number.
    #[error("{party}: upload number {number} is taken by another upload of this member")]
    NumberTaken {
        /// Which party.
        party: PartyId,
        /// The number.
        number: u64,
    },
    /// An upload has begun and is not complete at all parties.
    #[error(
        "upload {pending} is not complete: {source}; the parties keep what is staged for 24 hours: \
         resume it with the same rows"
    )]
    Unfinished {
        /// What [`Remote::resume`] needs.
        pending: PendingUpload,
        /// What went wrong last, with the party's name.
        source: Box<RemoteError>,
    },
}

impl RemoteError {
    /// Whether the same may succeed a little later: a link broke, or a party has no time.
    fn may_pass(&self) -> bool {
        match self {
            RemoteError::Link { source, .. } => matches!(
                source,
                TransportError::Unreachable { .. }
                    | TransportError::NothingListens { .. }
                    | TransportError::Connect { .. }
                    | TransportError::Closed { .. }
                    | TransportError::Timeout { .. }
            ),
            RemoteError::Address { .. }
            | RemoteError::Timeout { .. }
            | RemoteError::Busy { .. } => true,
            _ => false,
        }
    }
}

/// One member's authenticated connection to the three parties. Use it inside one tokio runtime. A
/// link that has broken is made anew when the next request needs it.
#[derive(Debug)]
pub struct Remote {
    node: Node,
    links: Mutex<[Link; 3]>,
    consortium: ConsortiumFile,
    /// Addresses that go before the consortium file's.
    addresses: Option<[SocketAddr; 3]>,
    settings: Settings,
    resume_timeout: Duration,
    watch_timeout: Duration,
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
        let place = |party| resolve(party, consortium, addresses, settings);
        let [a, b, c] = PartyId::ALL.map(place);
        let (a, b, c) = tokio::try_join!(a, b, c)?;
        let places = [a, b, c];
        let node =
            Node::dial_only(identity, own_ip(&places), settings).map_err(RemoteError::Endpoint)?;
        let wait = Duration::from_millis(settings.handshake_timeout_ms);
        let connect = |party: PartyId| dial(&node, party, consortium, places[party.index()], wait);
        let (a, b, c) = tokio::try_join!(
            connect(PartyId::P0),
            connect(PartyId::P1),
            connect(PartyId::P2)
        )?;
        Ok(Remote {
            node,
            links: Mutex::new([a, b, c]),
            consortium: consortium.clone(),
            addresses,
            settings: settings.clone(),
            resume_timeout: RESUME_TIMEOUT,
            watch_timeout: WATCH_TIMEOUT,
            uploading: tokio::sync::Mutex::default(),
        })
    }

    /// Says good-bye to the parties.
    pub async fn close(self) {
        self.node.close("the member has finished").await;
    }

    /// How long an upload is tried while nothing of it goes forward, beyond the wait that is under
    /// way then.
    pub fn set_resume_timeout(&mut self, timeout: Duration) {
        self.resume_timeout = timeout;
    }

    /// How long a party may be away while one of its jobs is watched.
    pub fn set_watch_timeout(&mut self, timeout: Duration) {
        self.watch_timeout = timeout;
    }

    /// The links as they are now, for their counters: P0, P1, P2.
    pub fn links(&self) -> [Link; 3] {
        self.current().clone()
    }

    fn current(&self) -> MutexGuard<'_, [Link; 3]> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The link to a party, made anew where it has broken.
    async fn live(&self, party: PartyId) -> Result<Link, RemoteError> {
        let link = self.current()[party.index()].clone();
        // A closed link says so at once.
        if tokio::time::timeout(Duration::ZERO, link.closed())
            .await
            .is_err()
        {
            return Ok(link);
        }
        let place = resolve(party, &self.consortium, self.addresses, &self.settings).await?;
        let wait = Duration::from_millis(self.settings.handshake_timeout_ms);
        let link = dial(&self.node, party, &self.consortium, place, wait).await?;
        self.current()[party.index()] = link.clone();
        Ok(link)
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
            let mut detail: Vec<String> = PartyId::ALL.into_iter().zip(&infos).map(say).collect();
            detail.extend(self.partial(&infos));
            return Err(RemoteError::Disagree {
                what,
                detail: detail.join("; "),
            });
        }
        Ok(infos.swap_remove(0))
    }

    /// The contributions that some parties lack.
    fn partial(&self, infos: &[DatasetInfo]) -> Vec<String> {
        let mut all: Vec<_> = infos.iter().flat_map(|info| &info.contributions).collect();
        all.sort_by_key(|contribution| (contribution.hospital, contribution.number));
        all.dedup();
        let mut said = Vec::new();
        for contribution in all {
            let has = |info: &DatasetInfo| info.contributions.contains(contribution);
            let places = PartyId::ALL.into_iter().zip(infos);
            let places = places.filter(|(_, info)| has(info));
            let places: Vec<String> = places.map(|(party, _)| party.to_string()).collect();
            if places.len() < infos.len() {
                let members = self.consortium.members.iter();
                let mut owner = members.filter(|member| member.pin == contribution.hospital);
                let owner = owner.next().map_or_else(
                    || contribution.hospital.to_string(),
                    |member| member.name.clone(),
                );
                said.push(format!(
                    "upload {} of {owner} is at {} only: its hospital finishes it with `trefoil share` \
                     or takes it back with `trefoil withdraw`",
                    contribution.number,
                    places.join(" and ")
                ));
            }
        }
        said
    }

    async fn open_all(&self, ask: &Ask) -> Result<[MsgStream; 3], RemoteError> {
        let [a, b, c] = PartyId::ALL.map(|party| self.open(party, ask));
        let (a, b, c) = tokio::try_join!(a, b, c)?;
        Ok([a, b, c])
    }

    async fn open(&self, party: PartyId, ask: &Ask) -> Result<MsgStream, RemoteError> {
        let link = self.live(party).await?;
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
            Some(Answer::Busy(reason)) => Err(RemoteError::Busy {
                party,
                what: what.into(),
                reason,
            }),
            Some(answer) => Ok(answer),
            None => Err(RemoteError::Link {
                party,
                source: TransportError::Closed {
                    addr: stream.link().remote_addr(),
                    reason: format!("it ended the stream instead of answering {what}"),
                },
            }),
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

/// The address to bind for dialling these.
fn own_ip(places: &[SocketAddr]) -> IpAddr {
    let local = places.iter().all(|addr| addr.ip().is_loopback());
    match (local, places.iter().any(SocketAddr::is_ipv6)) {
        (true, false) => Ipv4Addr::LOCALHOST.into(),
        (false, false) => Ipv4Addr::UNSPECIFIED.into(),
        (_, true) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

async fn dial(
    node: &Node,
    party: PartyId,
    consortium: &ConsortiumFile,
    place: SocketAddr,
    wait: Duration,
) -> Result<Link, RemoteError> {
    let entry = consortium.node(Peer::Party(party));
    let dialled = node.connect_to(entry.transport, place, entry.pin).await;
    let link = dialled.map_err(|source| RemoteError::Link { party, source })?;
    // The dealer is in the core: a party that works with another one gets no share.
    let ours = NodeInfo::of(consortium);
    let name = format!("{party} ({})", entry.name);
    let status = meeting::look(&link, &ours, &name, wait).await;
    let status = status.map_err(|reason| {
        let addr = link.remote_addr();
        let source = TransportError::Closed { addr, reason };
        RemoteError::Link { party, source }
    })?;
    let fits = status.info.differs_from(&ours, &name);
    fits.map(|()| link).map_err(RemoteError::Consortium)
}

async fn resolve(
    party: PartyId,
    consortium: &ConsortiumFile,
    addresses: Option<[SocketAddr; 3]>,
    settings: &Settings,
) -> Result<SocketAddr, RemoteError> {
    if let Some(addresses) = addresses {
        return Ok(addresses[party.index()]);
    }
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
