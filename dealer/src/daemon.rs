//! The process: one runtime on its own thread, links with the three parties, orderly end.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{Semaphore, mpsc, watch};
use tracing::Instrument;
use trefoil_consortium::host::Active;
use trefoil_consortium::identity;
use trefoil_consortium::keys::KeyDesk;
use trefoil_consortium::meeting::{self, Met, NodeInfo, NodeStatus, PeerStatus};
use trefoil_consortium::{
    Addresses, BindError, CONSORTIUM_RECORD, ConfigError, ConsortiumError, ConsortiumFile,
    DealerConfig, IdentityError, LiveConsortium, Role, SessionId, dialled_by_dealer, host, linked,
    logging,
};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::{AbortHandle, Link, MsgStream, Node, Pin, Settings};

use crate::serve::ServingPlace;
use crate::{dial, session};

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
    /// Its endpoint.
    #[error(transparent)]
    Bind(#[from] BindError),
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
    links: [watch::Sender<Option<(u64, Link)>>; 3],
    /// Links so far: each has a number of its own, so that the end of an old one clears no other.
    links_held: AtomicU64,
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

    /// The link to a party; waits for it at most the connection's time-out.
    pub(crate) async fn link(&self, party: PartyId) -> Result<(PartyId, Link), String> {
        let wait = Duration::from_millis(self.settings.connect_timeout_ms);
        let mut held = self.links[party.index()].subscribe();
        let waiting = async {
            let held = held.wait_for(Option::is_some).await;
            // The sender lives as long as the dealer.
            held.ok()
                .and_then(|held| held.as_ref().map(|(_, link)| (party, link.clone())))
        };
        match tokio::time::timeout(wait, waiting).await {
            Ok(Some(link)) => Ok(link),
            _ => Err(format!(
                "{party} has not connected to the dealer within {} ms",
                wait.as_millis()
            )),
        }
    }

    /// Whose keys may connect: the parties', and the dealer's own, so that its operator can look.
    fn allowed(file: &ConsortiumFile) -> BTreeSet<Pin> {
        let nodes = PartyId::ALL.map(Peer::Party).into_iter();
        let nodes = nodes.chain([Peer::Dealer]);
        nodes.map(|peer| file.node(peer).pin).collect()
    }

    /// How the dealer is, as it tells others.
    fn status(&self) -> NodeStatus {
        let peers = PartyId::ALL
            .into_iter()
            .zip(&self.links)
            .map(|(party, held)| {
                let link = held.borrow().as_ref().map(|(_, link)| link.clone());
                PeerStatus {
                    peer: party.to_string(),
                    rtt_us: link.as_ref().map(|link| link.rtt().as_micros() as u64),
                    trouble: None,
                }
            });
        NodeStatus {
            info: NodeInfo::of(&self.consortium.now()),
            uptime_s: self.started.elapsed().as_secs(),
            peers: peers.collect(),
            last_error: logging::last_trouble(),
            ..NodeStatus::default()
        }
    }

    async fn hold(&self, party: PartyId, link: Link) {
        let place = &self.links[party.index()];
        let number = self.links_held.fetch_add(1, Ordering::Relaxed);
        place.send_replace(Some((number, link.clone())));
        tracing::info!(peer = %party, addr = %link.remote_addr(), "{}", linked(&link));
        let reason = link.closed().await;
        tracing::info!(peer = %party, %reason, "link closed");
        place.send_if_modified(|held| {
            let mine = held.as_ref().is_some_and(|(held, _)| *held == number);
            if mine {
                *held = None;
            }
            mine
        });
    }
}

/// What a daemon is told from outside.
enum Command {
    /// At the end of a running job's step.
    Halt(String),
    /// At once.
    Stop(String),
    Vanish,
}

/// Ends a daemon from another thread.
#[derive(Clone)]
pub struct Stopper(mpsc::UnboundedSender<Command>);

impl std::fmt::Debug for Stopper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Stopper")
    }
}

impl Stopper {
    /// Ends it when the parties have done a running job's step and written it down. Returns at once.
    pub fn halt(&self, reason: &str) {
        // An error means that it has ended.
        let _ = self.0.send(Command::Halt(reason.into()));
    }

    /// Ends it in an orderly way, without waiting for a step: a running session hears the reason.
    /// Returns at once.
    pub fn stop(&self, reason: &str) {
        // An error means that it has ended.
        let _ = self.0.send(Command::Stop(reason.into()));
    }
}

/// A running dealer. Dropping it ends it in an orderly way.
#[derive(Debug)]
pub struct Daemon {
    local_addr: SocketAddr,
    addresses: watch::Sender<Option<Addresses>>,
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
}

impl Daemon {
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
            consortium: live,
            settings: config.transport.clone(),
            keys: KeyDesk::default(),
            coin_seed: config.simulation_coin_seed,
            secret: identity.key_der.clone(),
            slot: tokio::sync::Mutex::default(),
            serving: ServingPlace::default(),
            running: Mutex::default(),
            stopping: watch::channel(None).0,
            active: Active::default(),
            stop_wait: Duration::from_secs(config.stop_wait_s),
            links: std::array::from_fn(|_| watch::channel(None).0),
            links_held: AtomicU64::new(0),
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|err| DealerError::Setup(format!("the runtime cannot be started: {err}")))?;
        let node = {
            let _inside = runtime.enter();
            let (listen, out) = (config.listen, config.dial_out_only);
            let (file, settings) = (dealer.consortium.now(), &config.transport);
            Arc::new(file.bind(Peer::Dealer, &identity, listen, out, settings)?)
        };
        node.set_allowed(Dealer::allowed(&dealer.consortium.now()));
        let local_addr = node.local_addr();
        let (commands, receiver) = mpsc::unbounded_channel();
        let addresses = watch::channel((!await_addresses).then(|| config.peers.clone())).0;
        let overrides = addresses.subscribe();
        let consortium = trefoil_consortium::hex(&dealer.core_hash);
        let span = tracing::error_span!("dealer", node = "dealer");
        let body = move || {
            let _span = span.clone().entered();
            let kernel = trefoil_protocol::ring::kernel::isa();
            tracing::info!(addr = %local_addr, %consortium, ?kernel, "listening");
            let serving = serve(dealer, node, overrides, receiver);
            let how = runtime.block_on(serving.instrument(span.clone()));
            tracing::info!("{how}");
            runtime.shutdown_timeout(Duration::from_millis(200));
        };
        let thread = std::thread::Builder::new()
            .name("dealer".into())
            .spawn(body);
        let thread = thread
            .map_err(|err| DealerError::Setup(format!("a thread cannot be started: {err}")))?;
        Ok(Daemon {
            local_addr,
            addresses,
            stopper: Stopper(commands),
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Says where the parties are; goes before configuration and consortium file.
    pub fn set_addresses(&self, addresses: Addresses) {
        self.addresses.send_replace(Some(addresses));
    }

    /// Ends it from another thread.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Waits until it has ended.
    pub fn wait(mut self) {
        self.join();
    }

    /// Ends it as if its process were killed: nobody is told. For tests.
    pub fn vanish(mut self) {
        // An error means that it has ended.
        let _ = self.stopper.0.send(Command::Vanish);
        self.join();
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic there has been reported there.
            let _ = thread.join();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stopper.stop("this node is stopping");
        self.join();
    }
}

/// Runs the dealer as a process: logs to standard error, ends orderly on Ctrl-C. `attached`: see
/// [`trefoil_consortium::host`].
pub fn run(config: DealerConfig, attached: bool) -> anyhow::Result<()> {
    logging::init(&config.log).map_err(anyhow::Error::msg)?;
    trefoil_protocol::set_threads(config.threads);
    let interrupts = host::interrupts().map_err(anyhow::Error::msg)?;
    let daemon = Daemon::start(&config, attached)?;
    let stopper = daemon.stopper();
    let interrupted = {
        let stopper = stopper.clone();
        move || stopper.halt("this node was told to stop")
    };
    interrupts.watch(interrupted).map_err(anyhow::Error::msg)?;
    if attached {
        host::announce(daemon.local_addr()).map_err(anyhow::Error::msg)?;
        let peers = host::read_peers().map_err(anyhow::Error::msg)?;
        daemon.set_addresses(peers.addresses.or(&config.peers));
        host::end_with_parent(move || stopper.stop("its parent has ended"))
            .map_err(anyhow::Error::msg)?;
    }
    daemon.wait();
    Ok(())
}

async fn serve(
    dealer: Arc<Dealer>,
    node: Arc<Node>,
    addresses: watch::Receiver<Option<Addresses>>,
    mut commands: mpsc::UnboundedReceiver<Command>,
) -> String {
    let span = tracing::Span::current();
    let following = dealer
        .consortium
        .clone()
        .follow(node.clone(), Dealer::allowed);
    tokio::spawn(following.instrument(span.clone()));
    let mut dialling = tokio::task::JoinSet::new();
    for party in dialled_by_dealer(&dealer.consortium.now()) {
        let dial = dial::dial(dealer.clone(), party, node.clone(), addresses.clone());
        dialling.spawn(dial.instrument(span.clone()));
    }
    let quiet = quiet(&dealer);
    tokio::pin!(quiet);
    loop {
        let link = tokio::select! {
            link = node.accept() => link,
            reason = &mut quiet => {
                dialling.abort_all();
                return stop(&dealer, &node, &reason).await;
            }
            command = commands.recv() => match command {
                Some(Command::Vanish) => return "vanished".into(),
                Some(Command::Halt(reason)) => {
                    dealer.stopping.send_replace(Some(reason));
                    continue;
                }
                Some(Command::Stop(reason)) => {
                    dialling.abort_all();
                    return stop(&dealer, &node, &reason).await;
                }
                None => return "nobody can stop this node any more".into(),
            },
        };
        let Some(link) = link else {
            return "the endpoint has closed".into();
        };
        match dealer.consortium.now().role(link.peer()) {
            Some(Role::Node(peer)) => {
                tokio::spawn(meet_peer(dealer.clone(), peer, link).instrument(span.clone()));
            }
            _ => link.close("the dealer serves the three parties alone"),
        }
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
    let met = meeting::meet(&link, &name, dealer.short_wait(), || dealer.status()).await;
    match (met, peer) {
        (Ok(Met::Stays(_)), Peer::Party(party)) => serve_party(dealer, party, link).await,
        (Ok(Met::Stays(_)), Peer::Dealer) => link.close("a node has no link to itself"),
        // Whoever looked leaves by itself, and the link with this task.
        (Ok(Met::Looked), _) => {
            let _ = tokio::time::timeout(dealer.short_wait(), link.closed()).await;
        }
        (Err(reason), _) => {
            tracing::warn!(%peer, %reason, "a link was not taken");
            link.close(&reason);
        }
    }
}

/// Keeps a link to a party and answers what it opens, until it closes.
pub(crate) async fn serve_party(dealer: Arc<Dealer>, party: PartyId, link: Link) {
    let streams = async {
        let permits = Arc::new(Semaphore::new(STREAMS_PER_LINK));
        while let Ok(permit) = permits.clone().acquire_owned().await {
            let Ok((_, id, stream)) = link.accept().await else {
                return;
            };
            let dealer = dealer.clone();
            let answering = async move {
                if let Err(reason) = answer(&dealer, party, id, stream).await {
                    tracing::warn!(peer = %party, %reason, "a party's stream ended early");
                }
                drop(permit);
            };
            tokio::spawn(answering.instrument(tracing::Span::current()));
        }
    };
    tokio::join!(dealer.hold(party, link.clone()), streams);
}

async fn answer(
    dealer: &Arc<Dealer>,
    party: PartyId,
    id: [u8; 32],
    stream: MsgStream,
) -> Result<(), String> {
    if party == PartyId::P0 && dealer.serving.expects(&id) {
        dealer.serving.follow(id, stream).await
    } else if id != [0; 32] {
        dealer.keys.deliver(id, stream, dealer.short_wait()).await
    } else if party == PartyId::P0 {
        session::follow(dealer, stream).await
    } else {
        Err("only P0 proposes sessions".into())
    }
}
