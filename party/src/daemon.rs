//! The process: one runtime on its own thread, links to the peers, streams of members, orderly end.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore, watch};
use tracing::Instrument;
use trefoil_consortium::daemon::{Daemon, End, Seat, StartError, answer_streams};
use trefoil_consortium::host::Active;
use trefoil_consortium::identity::{self, Signer};
use trefoil_consortium::keys::KeyDesk;
use trefoil_consortium::meeting::{self, MEETING, Met, NodeInfo, NodeStatus};
use trefoil_consortium::{
    CONSORTIUM_RECORD, ConfigError, ConsortiumError, ConsortiumFile, IdentityError, JobId,
    LiveConsortium, Mesh, PartyConfig, Role, host, logging,
};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::{AbortHandle, Link, MsgStream, Node, Pin, Settings};

use crate::audit::{Audit, AuditError};
use crate::desk::JobState;
use crate::files::FileError;
use crate::jobs::{Job, Jobs};
use crate::policy::PolicyDesk;
use crate::serve::ServingPlace;
use crate::store::{Store, StoreError};
use crate::{consent, follow, lead, members, resume};

/// Exchanges with one peer or member at the same time.
const STREAMS_PER_LINK: usize = 32;
/// Uploads at the same time: each holds a chunk in memory.
const UPLOADS_MAX: usize = 8;

/// Why a party cannot run.
#[derive(Debug, thiserror::Error)]
pub enum PartyError {
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The consortium file.
    #[error(transparent)]
    Consortium(#[from] ConsortiumError),
    /// Its key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Its store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its audit log.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// Another file of its home.
    #[error(transparent)]
    Home(#[from] FileError),
    /// Its endpoint, runtime or thread.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Something that does not fit.
    #[error("{0}")]
    Setup(String),
}

/// Everything that the tasks of one party share.
pub(crate) struct Party {
    pub(crate) me: PartyId,
    /// With its institution's name, as people know it.
    pub(crate) label: String,
    pub(crate) home: PathBuf,
    pub(crate) consortium: Arc<LiveConsortium>,
    pub(crate) core_hash: [u8; 32],
    started: Instant,
    pub(crate) policy: PolicyDesk,
    pub(crate) audit: Audit,
    /// Held while a job's record is written.
    pub(crate) desk: Mutex<()>,
    pub(crate) settings: Settings,
    /// How long a job waits for another session; zero: its first one is its last.
    pub(crate) resume_wait: Duration,
    pub(crate) signer: Signer,
    pub(crate) mesh: Mesh,
    pub(crate) store: Store,
    pub(crate) jobs: Jobs,
    pub(crate) keys: KeyDesk,
    /// One session at a time.
    pub(crate) slot: tokio::sync::Mutex<()>,
    /// .. and one that serves predictions beside it.
    pub(crate) serving: ServingPlace,
    pub(crate) uploads: Semaphore,
    /// Says to P0's leader that there may be something to do.
    pub(crate) wake: Notify,
    /// The sessions that run and their jobs, to be ended with the process.
    pub(crate) running: Mutex<Vec<(JobId, AbortHandle)>>,
    /// Why this node stops, once it is told to: it begins no session any more.
    pub(crate) stopping: watch::Sender<Option<String>>,
    /// Sessions whose end is not noted yet.
    pub(crate) active: Active,
    stop_wait: Duration,
}

impl Party {
    /// How long one answer of another node may take.
    pub(crate) fn wait(&self) -> Duration {
        Duration::from_millis(self.settings.round_timeout_ms)
    }

    /// How long links and keys may take.
    pub(crate) fn short_wait(&self) -> Duration {
        Duration::from_millis(self.settings.handshake_timeout_ms)
    }

    /// A node with its institution's name, as people know it.
    pub(crate) fn name(&self, peer: Peer) -> String {
        format!("{peer} ({})", self.consortium.now().node(peer).name)
    }

    pub(crate) fn pin(&self, peer: Peer) -> Pin {
        self.consortium.now().node(peer).pin
    }

    /// Whose keys may connect. The party's own is among them, so that its operator can look.
    fn allowed(file: &ConsortiumFile) -> BTreeSet<Pin> {
        let nodes = PartyId::ALL.map(Peer::Party).into_iter();
        let nodes = nodes.chain([Peer::Dealer]).map(|peer| file.node(peer).pin);
        nodes.chain(file.member_pins()).collect()
    }

    /// How this party is, as it tells the other nodes.
    fn status(&self) -> NodeStatus {
        let jobs = self.jobs.all();
        let count = |states: &[JobState]| {
            let among = jobs.iter().filter(|job| states.contains(&job.state()));
            among.count() as u64
        };
        NodeStatus {
            info: NodeInfo::of(&self.consortium.now()),
            uptime_s: self.started.elapsed().as_secs(),
            peers: self.mesh.status(),
            jobs_waiting: count(&[JobState::Held, JobState::Waiting]),
            jobs_running: count(&[JobState::Running]),
            disk_free_bytes: host::disk_free_bytes(&self.home),
            last_error: logging::last_trouble(),
        }
    }
}

/// Starts the party on a thread of its own. With `await_addresses` it dials nobody before
/// [`Daemon::set_addresses`].
pub fn start(config: &PartyConfig, await_addresses: bool) -> Result<Daemon, PartyError> {
    let consortium = ConsortiumFile::load(&config.consortium)?;
    let identity = identity::load(&config.identity.certificate, &config.identity.key)?;
    let pin = identity::pin(&identity)?;
    let me = match consortium.role(pin) {
        Some(Role::Node(Peer::Party(me))) => me,
        _ => {
            return Err(PartyError::Setup(format!(
                "{}: public key {pin} belongs to none of the three parties in {}",
                config.identity.certificate.display(),
                config.consortium.display()
            )));
        }
    };
    // Not an error: members come and go, and a node has to start all the same.
    for name in &config.policy.requesters {
        if !consortium.members.iter().any(|member| member.name == *name) {
            let file = config.consortium.display();
            tracing::warn!("policy.requesters: {name:?} is no member in {file}");
        }
    }
    let label = format!("{me} ({})", consortium.core.parties[me.index()].name);
    let store = Store::open_for(&config.home, &config.store, pin)?;
    let record = config.home.join(CONSORTIUM_RECORD);
    let live = Arc::new(LiveConsortium::open(&config.consortium, &record)?);
    let audit = Audit::open(&config.home, &label)?;
    let policy = PolicyDesk::open(&config.home, config.policy.clone(), label.clone())?;
    let party = Arc::new(Party {
        me,
        core_hash: consortium.core_hash(),
        started: Instant::now(),
        label,
        home: config.home.clone(),
        policy,
        audit,
        desk: Mutex::default(),
        settings: config.transport.clone(),
        resume_wait: Duration::from_secs(config.resume_wait_s),
        signer: Signer::new(&identity)?,
        mesh: Mesh::new(Peer::Party(me), &consortium),
        consortium: live,
        store,
        jobs: Jobs::default(),
        keys: KeyDesk::default(),
        slot: tokio::sync::Mutex::default(),
        serving: ServingPlace::default(),
        uploads: Semaphore::new(UPLOADS_MAX),
        wake: Notify::new(),
        running: Mutex::default(),
        stopping: watch::channel(None).0,
        active: Active::default(),
        stop_wait: Duration::from_secs(config.stop_wait_s),
    });
    consent::restore(&party)?;
    let bind = || {
        let (file, listen) = (party.consortium.now(), config.listen);
        let (out, settings) = (config.dial_out_only, &config.transport);
        let node = file.bind(Peer::Party(me), &identity, listen, out, settings)?;
        node.set_allowed(Party::allowed(&file));
        Ok(node)
    };
    let serve = {
        let party = party.clone();
        move |seat| serve(party, seat)
    };
    Ok(Daemon::start(
        format!("party-{me}"),
        tracing::error_span!("party", node = %me),
        party.core_hash,
        bind,
        (!await_addresses).then(|| config.peers.clone()),
        serve,
    )?)
}

/// Runs a party as a process: logs to standard error, ends orderly on Ctrl-C. `attached`: see
/// [`trefoil_consortium::host`].
pub fn run(config: PartyConfig, attached: bool) -> anyhow::Result<()> {
    logging::init(&config.log).map_err(anyhow::Error::msg)?;
    trefoil_protocol::set_threads(config.threads);
    let interrupts = host::interrupts().map_err(anyhow::Error::msg)?;
    let daemon = start(&config, attached)?;
    let attending = daemon.attend(interrupts, attached, &config.peers);
    attending.map_err(anyhow::Error::msg)
}

async fn serve(party: Arc<Party>, mut seat: Seat) -> String {
    let span = tracing::Span::current();
    let node = seat.node.clone();
    let mut dialling = tokio::task::JoinSet::new();
    for peer in party.mesh.dialled() {
        let (party, node, addresses) = (party.clone(), node.clone(), seat.addresses.clone());
        let dial = async move {
            let serve = |link| hold_peer(party.clone(), peer, link);
            let (file, settings) = (&party.consortium, &party.settings);
            party
                .mesh
                .dial(peer, &node, file, addresses, settings, serve)
                .await;
        };
        dialling.spawn(dial.instrument(span.clone()));
    }
    if party.me == PartyId::P0 {
        resume::conclude_all(&party);
        let party = party.clone();
        let leading = async move { lead::lead_all(&party).await };
        tokio::spawn(leading.instrument(span.clone()));
    }
    let watching = {
        let party = party.clone();
        async move { consent::watch_desk(&party).await }
    };
    tokio::spawn(watching.instrument(span.clone()));
    let following = party
        .consortium
        .clone()
        .follow(node.clone(), Party::allowed);
    tokio::spawn(following.instrument(span.clone()));
    let take = |link: Link| match party.consortium.now().role(link.peer()) {
        Some(Role::Node(peer)) => {
            tokio::spawn(meet_peer(party.clone(), peer, link).instrument(span.clone()));
        }
        Some(Role::Member(member)) => {
            tracing::info!(member = %member.name, addr = %link.remote_addr(), "connected");
            tokio::spawn(serve_member(party.clone(), link).instrument(span.clone()));
        }
        None => link.close("this public key belongs to no member"),
    };
    let end = seat.take_links(&party.stopping, quiet(&party), take).await;
    dialling.abort_all();
    match end {
        End::Orderly(reason) => stop(&party, &node, &reason).await,
        End::Sudden(how) => how.into(),
    }
}

/// Waits until this party is told to stop, and then until the sessions that can be taken up again
/// have ended with a step, at most `stop_wait_s`. Why it stops.
async fn quiet(party: &Party) -> String {
    let reason = host::told_to_stop(party.stopping.subscribe()).await;
    let running = party
        .running
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    for (id, abort) in running {
        let lasts = party.jobs.get(&id);
        if !lasts.is_some_and(|job| resume::lasts(party, &job.description)) {
            abort.abort(&format!("{}: {reason}", party.me));
        }
    }
    party.active.ended(party.stop_wait).await;
    reason
}

async fn stop(party: &Party, node: &Node, reason: &str) -> String {
    let reason = format!("{}: {reason}", party.me);
    let running = party
        .running
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    for (_, abort) in running {
        abort.abort(&reason);
    }
    let lasting = |job: &Job| resume::lasts(party, &job.description);
    party.jobs.fail_running(lasting, &reason);
    // Lets the tasks that tell members and P0 run once before the links go.
    tokio::task::yield_now().await;
    node.close(&reason).await;
    format!("ended: {reason}")
}

/// Meets a node that has connected, and keeps the link where it came to stay.
async fn meet_peer(party: Arc<Party>, peer: Peer, link: Link) {
    let name = party.name(peer);
    match meeting::meet(&link, &name, party.short_wait(), || party.status()).await {
        Ok(Met::Stays(_)) if peer != Peer::Party(party.me) => hold_peer(party, peer, link).await,
        Ok(Met::Stays(_)) => link.close("a node has no link to itself"),
        // Whoever looked leaves by itself, and the link with this task.
        Ok(Met::Looked) => {
            let _ = tokio::time::timeout(party.short_wait(), link.closed()).await;
        }
        Err(reason) => {
            tracing::warn!(%peer, %reason, "a link was not taken");
            link.close(&reason);
        }
    }
}

/// Keeps a link to another node and answers what it opens, until it closes.
async fn hold_peer(party: Arc<Party>, peer: Peer, link: Link) {
    let streams = {
        let party = party.clone();
        let answer = move |session, stream| {
            let party = party.clone();
            async move { serve_peer(&party, peer, session, stream).await }
        };
        answer_streams(link.clone(), STREAMS_PER_LINK, answer)
    };
    tokio::join!(party.mesh.hold(peer, link), streams);
}

/// Answers a hospital or analyst. Who it is and what it may do is looked up for every stream: the
/// list of members may change while the link is open.
async fn serve_member(party: Arc<Party>, link: Link) {
    let key = link.peer();
    let answer = move |name, stream| {
        let party = party.clone();
        async move {
            let Some(Role::Member(member)) = party.consortium.now().role(key) else {
                return;
            };
            let done = match name == MEETING {
                true => {
                    // What went wrong here may name files and other members.
                    let status = || NodeStatus {
                        last_error: None,
                        ..party.status()
                    };
                    let answering = meeting::answer(stream, None, status);
                    let answered = tokio::time::timeout(party.short_wait(), answering).await;
                    let late = || Err("it asked nothing in time".into());
                    answered.unwrap_or_else(|_| late()).map(drop)
                }
                false => members::answer(&party, &member, stream).await,
            };
            if let Err(reason) = done {
                tracing::info!(member = %member.name, %reason, "a request ended early");
            }
        }
    };
    answer_streams(link, STREAMS_PER_LINK, answer).await;
}

async fn serve_peer(party: &Arc<Party>, peer: Peer, session: [u8; 32], stream: MsgStream) {
    let done = if let Some(desk) = party.serving.of_stream(&session) {
        desk.follow(party, peer, stream).await
    } else if session != [0; 32] {
        party
            .keys
            .deliver(session, stream, party.short_wait())
            .await
    } else if peer == Peer::Party(PartyId::P0) {
        follow::follow(party, stream).await
    } else {
        Err("only P0 proposes sessions".into())
    };
    if let Err(reason) = done {
        tracing::warn!(%peer, %reason, "a peer's stream ended early");
    }
}
