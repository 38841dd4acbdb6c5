//! The process: one runtime on its own thread, links with the three parties, orderly end.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::Instrument;
use trefoil_consortium::daemon::{Daemon, End, Seat, StartError, answer_streams};
use trefoil_consortium::host::Active;
use trefoil_consortium::identity;
use trefoil_consortium::keys::KeyDesk;
use trefoil_consortium::meeting::{self, Met, NodeInfo, NodeStatus};
use trefoil_consortium::{
    CONSORTIUM_RECORD, ConfigError, ConsortiumError, ConsortiumFile, DealerConfig, IdentityError,
    LiveConsortium, Mesh, Role, SessionId, host, logging,
};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::{AbortHandle, Link, MsgStream, Node, Pin, Settings};

use crate::serve::ServingPlace;
use crate::session;

/// Exchanges with one party at the same time.
const STREAMS_PER_LINK: usize = 16;

/// Why the dealer cannot run.
#[derive(Debug, thiserror::Error)]
pub enum DealerError {
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The consortium file.
    #[error(transparent)]
    Consortium(#[from] ConsortiumError),
    /// Its key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Its endpoint, runtime or thread.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Something that does not fit.
    #[error("{0}")]
    Setup(String),
}

/// Everything that the tasks of the dealer share.
pub(crate) struct Dealer {
    pub(crate) consortium: Arc<LiveConsortium>,
    pub(crate) core_hash: [u8; 32],
    started: Instant,
    pub(crate) settings: Settings,
    pub(crate) mesh: Mesh,
    pub(crate) keys: KeyDesk,
    pub(crate) coin_seed: Option<u64>,
    /// What the coins of stochastic rounding follow from: known to this node alone.
    pub(crate) secret: Vec<u8>,
    /// One session at a time.
    pub(crate) slot: tokio::sync::Mutex<()>,
    /// .. and one that serves predictions beside it.
    pub(crate) serving: ServingPlace,
    pub(crate) running: Mutex<Vec<(SessionId, AbortHandle)>>,
    /// Why this node stops, once it is told to: it begins no session any more.
    pub(crate) stopping: watch::Sender<Option<String>>,
    /// Sessions whose steps a stop waits for.
    pub(crate) active: Active,
    stop_wait: Duration,
}

impl Dealer {
    /// How long one answer of another node may take.
    pub(crate) fn wait(&self) -> Duration {
        Duration::from_millis(self.settings.round_timeout_ms)
    }

    /// How long links and keys may take.
    pub(crate) fn short_wait(&self) -> Duration {
        Duration::from_millis(self.settings.handshake_timeout_ms)
    }

    /// Whose keys may connect: the parties', and the dealer's own, so that its operator can look.
    fn allowed(file: &ConsortiumFile) -> BTreeSet<Pin> {
        let nodes = PartyId::ALL.map(Peer::Party).into_iter();
        let nodes = nodes.chain([Peer::Dealer]);
        nodes.map(|peer| file.node(peer).pin).collect()
    }

    /// How the dealer is, as it tells others.
    fn status(&self) -> NodeStatus {
        NodeStatus {
            info: NodeInfo::of(&self.consortium.now()),
            uptime_s: self.started.elapsed().as_secs(),
            peers: self.mesh.status(),
            last_error: logging::last_trouble(),
            ..NodeStatus::default()
        }
    }
}

/// Starts the dealer on a thread of its own. With `await_addresses` it dials nobody before
/// [`Daemon::set_addresses`]; it dials only where it listens nowhere.
pub fn start(config: &DealerConfig, await_addresses: bool) -> Result<Daemon, DealerError> {
    let consortium = ConsortiumFile::load(&config.consortium)?;
    let identity = identity::load(&config.identity.certificate, &config.identity.key)?;
    let pin = identity::pin(&identity)?;
    if consortium.role(pin) != Some(Role::Node(Peer::Dealer)) {
        return Err(DealerError::Setup(format!(
            "{}: public key {pin} is not the dealer's in {}",
            config.identity.certificate.display(),
            config.consortium.display()
        )));
    }
    if config.simulation_coin_seed.is_some() {
        tracing::warn!(
            "simulation_coin_seed is set: the coins of stochastic rounding are no secret"
        );
    }
    let record = config.identity.key.with_file_name(CONSORTIUM_RECORD);
    let live = Arc::new(LiveConsortium::open(&config.consortium, &record)?);
    let dealer = Arc::new(Dealer {
        core_hash: consortium.core_hash(),
        started: Instant::now(),
        settings: config.transport.clone(),
        mesh: Mesh::new(Peer::Dealer, &consortium),
        consortium: live,
        keys: KeyDesk::default(),
        coin_seed: config.simulation_coin_seed,
        secret: identity.key_der.clone(),
        slot: tokio::sync::Mutex::default(),
        serving: ServingPlace::default(),
        running: Mutex::default(),
        stopping: watch::channel(None).0,
        active: Active::default(),
        stop_wait: Duration::from_secs(config.stop_wait_s),
    });
    let bind = || {
        let (file, listen) = (dealer.consortium.now(), config.listen);
        let (out, settings) = (config.dial_out_only, &config.transport);
        let node = file.bind(Peer::Dealer, &identity, listen, out, settings)?;
        node.set_allowed(Dealer::allowed(&file));
        Ok(node)
    };
    let serve = {
        let dealer = dealer.clone();
        move |seat| serve(dealer, seat)
    };
    Ok(Daemon::start(
        "dealer".into(),
        tracing::error_span!("dealer", node = "dealer"),
        dealer.core_hash,
        bind,
        (!await_addresses).then(|| config.peers.clone()),
        serve,
    )?)
}

/// Runs the dealer as a process: logs to standard error, ends orderly on Ctrl-C. `attached`: see
/// [`trefoil_consortium::host`].
pub fn run(config: DealerConfig, attached: bool) -> anyhow::Result<()> {
    logging::init(&config.log).map_err(anyhow::Error::msg)?;
    trefoil_protocol::set_threads(config.threads);
    let interrupts = host::interrupts().map_err(anyhow::Error::msg)?;
    let daemon = start(&config, attached)?;
    let attending = daemon.attend(interrupts, attached, &config.peers);
    attending.map_err(anyhow::Error::msg)
}

async fn serve(dealer: Arc<Dealer>, mut seat: Seat) -> String {
    let span = tracing::Span::current();
    let node = seat.node.clone();
    let following = dealer
        .consortium
        .clone()
        .follow(node.clone(), Dealer::allowed);
    tokio::spawn(following.instrument(span.clone()));
    let mut dialling = tokio::task::JoinSet::new();
    for peer in dealer.mesh.dialled() {
        let (dealer, node, addresses) = (dealer.clone(), node.clone(), seat.addresses.clone());
        let dial = async move {
            let serve = |link| hold_party(dealer.clone(), peer, link);
            let (file, settings) = (&dealer.consortium, &dealer.settings);
            dealer
                .mesh
                .dial(peer, &node, file, addresses, settings, serve)
                .await;
        };
        dialling.spawn(dial.instrument(span.clone()));
    }
    let take = |link: Link| match dealer.consortium.now().role(link.peer()) {
        Some(Role::Node(peer)) => {
            tokio::spawn(meet_peer(dealer.clone(), peer, link).instrument(span.clone()));
        }
        _ => link.close("the dealer serves the three parties alone"),
    };
    let end = seat
        .take_links(&dealer.stopping, quiet(&dealer), take)
        .await;
    dialling.abort_all();
    match end {
        End::Orderly(reason) => stop(&dealer, &node, &reason).await,
        End::Sudden(how) => how.into(),
    }
}

/// Waits until the dealer is told to stop, and then until its session has ended with a step, at most
/// `stop_wait_s`. Why it stops.
async fn quiet(dealer: &Dealer) -> String {
    let reason = host::told_to_stop(dealer.stopping.subscribe()).await;
    dealer.active.ended(dealer.stop_wait).await;
    reason
}

async fn stop(dealer: &Dealer, node: &Node, reason: &str) -> String {
    let reason = format!("dealer: {reason}");
    let running = dealer
        .running
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    for (_, abort) in running {
        abort.abort(&reason);
    }
    node.close(&reason).await;
    format!("ended: {reason}")
}

/// Meets a node that has connected, and keeps the link where a party came to stay.
async fn meet_peer(dealer: Arc<Dealer>, peer: Peer, link: Link) {
    let name = format!("{peer} ({})", dealer.consortium.now().node(peer).name);
    match meeting::meet(&link, &name, dealer.short_wait(), || dealer.status()).await {
        Ok(Met::Stays(_)) if peer != Peer::Dealer => hold_party(dealer, peer, link).await,
        Ok(Met::Stays(_)) => link.close("a node has no link to itself"),
        // Whoever looked leaves by itself, and the link with this task.
        Ok(Met::Looked) => {
            let _ = tokio::time::timeout(dealer.short_wait(), link.closed()).await;
        }
        Err(reason) => {
            tracing::warn!(%peer, %reason, "a link was not taken");
            link.close(&reason);
        }
    }
}

/// Keeps a link to a party and answers what it opens, until it closes.
async fn hold_party(dealer: Arc<Dealer>, peer: Peer, link: Link) {
    let streams = {
        let dealer = dealer.clone();
        let answer = move |session, stream| {
            let dealer = dealer.clone();
            async move { serve_party(&dealer, peer, session, stream).await }
        };
        answer_streams(link.clone(), STREAMS_PER_LINK, answer)
    };
    tokio::join!(dealer.mesh.hold(peer, link), streams);
}

async fn serve_party(dealer: &Arc<Dealer>, peer: Peer, session: [u8; 32], stream: MsgStream) {
    let leads = peer == Peer::Party(PartyId::P0);
    let done = if leads && dealer.serving.expects(&session) {
        dealer.serving.follow(session, stream).await
    } else if session != [0; 32] {
        dealer
            .keys
            .deliver(session, stream, dealer.short_wait())
            .await
    } else if leads {
        session::follow(dealer, stream).await
    } else {
        Err("only P0 proposes sessions".into())
    };
    if let Err(reason) = done {
        tracing::warn!(%peer, %reason, "a party's stream ended early");
    }
}
