//! A node of the operations test: a party or the dealer that runs every case of
//! `trefoil_tests::operations` as steps of one session, over QUIC, and writes its shares of the
//! results into its folder (`trefoil_tests::report`).
//!
//! FOR TESTS ONLY: every key of the session, every share and every input comes from the seed in
//! `TREFOIL_OPERATIONS_SEED`, which all four processes know. A real node draws its keys from the
//! operating system and sees no input. Certificates, links and frames are the real ones.
//!
//! It is started as a daemon is: `party|dealer --config FILE --attached`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use trefoil_consortium::config::IdentityFiles;
use trefoil_consortium::{
    Addresses, ConsortiumFile, DealerConfig, PartyConfig, Role, SOFTWARE, host, identity, logging,
};
use trefoil_protocol::Tensor;
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_protocol::program::{Output, Sink};
use trefoil_protocol::run::memory::{test_dealer_keys, test_party_keys};
use trefoil_protocol::run::{DealerState, OutputShare, State, deal_step, run_step};
use trefoil_tests::operations::{self, Case, SEED_VARIABLE, session_id, shares};
use trefoil_tests::report::{FILE, NodeReport, ShareReport, StepReport};
use trefoil_transport::{
    AbortHandle, DealerNet, Hello, Link, MaterialReceiver, Node, SessionNet, SessionStats,
    Settings, WIRE_VERSION,
};

/// What the configurations of a party and of the dealer have in common.
struct Config {
    listen: std::net::SocketAddr,
    log: String,
    consortium: PathBuf,
    identity: IdentityFiles,
    transport: Settings,
}

/// What all four nodes agree on.
struct Session {
    seed: u64,
    ring_bits: u8,
    cases: Vec<Case>,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("operations node: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (config, file) = match arguments[..] {
        ["party", "--config", file, "--attached"] => {
            let party = PartyConfig::load(Path::new(file))?;
            let config = Config {
                listen: party.listen,
                log: party.log,
                consortium: party.consortium,
                identity: party.identity,
                transport: party.transport,
            };
            (config, Path::new(file))
        }
        ["dealer", "--config", file, "--attached"] => {
            let dealer = DealerConfig::load(Path::new(file))?;
            let config = Config {
                listen: dealer.listen,
                log: dealer.log,
                consortium: dealer.consortium,
                identity: dealer.identity,
                transport: dealer.transport,
            };
            (config, Path::new(file))
        }
        _ => bail!("arguments {arguments:?}; expected party|dealer --config FILE --attached"),
    };
    logging::init(&config.log).map_err(anyhow::Error::msg)?;
    let seed = std::env::var(SEED_VARIABLE).with_context(|| SEED_VARIABLE)?;
    let seed = seed.parse().with_context(|| SEED_VARIABLE)?;
    let consortium = ConsortiumFile::load(&config.consortium)?;
    let ring_bits = consortium.core.ring_bits;
    let session = Session {
        seed,
        ring_bits,
        cases: operations::cases(seed, ring_bits)?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let report = runtime.block_on(serve(&config, &consortium, session))?;
    let folder = file.parent().unwrap_or(Path::new("."));
    std::fs::write(folder.join(FILE), serde_json::to_vec(&report)?)?;
    Ok(())
}

/// The whole life of the node.
async fn serve(
    config: &Config,
    consortium: &ConsortiumFile,
    session: Session,
) -> anyhow::Result<NodeReport> {
    let identity = identity::load(&config.identity.certificate, &config.identity.key)?;
    let Some(Role::Node(me)) = consortium.role(identity::pin(&identity)?) else {
        bail!("this certificate is no node's in the consortium file");
    };
    let node = Node::bind(&identity, config.listen, &config.transport)?;
    let peers = PartyId::ALL.map(Peer::Party).into_iter();
    let peers: Vec<Peer> = peers
        .chain([Peer::Dealer])
        .filter(|peer| *peer != me)
        .collect();
    let pins: BTreeSet<_> = peers
        .iter()
        .map(|peer| consortium.node(*peer).pin)
        .collect();
    node.set_allowed(pins);
    host::announce(node.local_addr()).map_err(anyhow::Error::msg)?;
    let addresses = host::read_peers().map_err(anyhow::Error::msg)?.addresses;
    host::end_with_parent(|| std::process::exit(1)).map_err(anyhow::Error::msg)?;

    let done = take_part(&node, me, &peers, config, consortium, &addresses, session).await;
    // After a failure too: the others hear of it before this process is gone.
    let reason = match &done {
        Ok(_) => "finished",
        Err(_) => "failed",
    };
    node.close(reason).await;
    done
}

/// Links, the session, and for the dealer the wait for the others' end.
async fn take_part(
    node: &Node,
    me: Peer,
    peers: &[Peer],
    config: &Config,
    consortium: &ConsortiumFile,
    addresses: &Addresses,
    session: Session,
) -> anyhow::Result<NodeReport> {
    let wait = Duration::from_millis(config.transport.connect_timeout_ms);
    let linking = link_all(node, me, peers, consortium, addresses);
    let links = tokio::time::timeout(wait, linking)
        .await
        .map_err(|_| anyhow!("no link to every other node within {} ms", wait.as_millis()))??;
    if let Peer::Party(me) = me {
        return party(me, &links, session, &config.transport).await;
    }
    let report = dealer(&links, session, &config.transport).await?;
    // The dealer runs ahead. It leaves last, so that no party is left without a segment.
    for (peer, link) in &links {
        let wait = Duration::from_millis(config.transport.round_timeout_ms);
        if tokio::time::timeout(wait, link.closed()).await.is_err() {
            bail!("{peer} did not end within {} ms", wait.as_millis());
        }
    }
    Ok(report)
}

/// Links to all peers: of two parties the higher dials, parties dial the dealer. Everybody listens
/// already, or the addresses would not be known.
async fn link_all(
    node: &Node,
    me: Peer,
    peers: &[Peer],
    consortium: &ConsortiumFile,
    addresses: &Addresses,
) -> anyhow::Result<BTreeMap<Peer, Link>> {
    let mut links = BTreeMap::new();
    for peer in peers {
        let dials = me != Peer::Dealer && (*peer < me || *peer == Peer::Dealer);
        if dials {
            let address = addresses.resolve(*peer, consortium);
            let address = address.parse().with_context(|| address.clone())?;
            let link = node.connect(address, consortium.node(*peer).pin).await?;
            links.insert(*peer, link);
        }
    }
    while links.len() < peers.len() {
        let link = node.accept().await.context("the endpoint has closed")?;
        match consortium.role(link.peer()) {
            Some(Role::Node(peer)) if !links.contains_key(&peer) => links.insert(peer, link),
            role => bail!("a link that nobody expects, from {role:?}"),
        };
    }
    Ok(links)
}

fn link(links: &BTreeMap<Peer, Link>, peer: Peer) -> anyhow::Result<Link> {
    links
        .get(&peer)
        .cloned()
        .with_context(|| format!("no link to {peer}"))
}

fn hello(session: &Session) -> Hello {
    Hello {
        wire_version: WIRE_VERSION,
        session: session_id(session.seed, session.ring_bits),
        program_hashes: session
            .cases
            .iter()
            .map(|case| case.program.hash())
            .collect(),
        ring_bits: session.ring_bits,
        // Every case has its own.
        frac_bits: 0,
        software: SOFTWARE.into(),
    }
}

async fn party(
    me: PartyId,
    links: &BTreeMap<Peer, Link>,
    session: Session,
    settings: &Settings,
) -> anyhow::Result<NodeReport> {
    let [a, b] = me.others();
    let peers = [
        (a, link(links, Peer::Party(a))?),
        (b, link(links, Peer::Party(b))?),
    ];
    let hello = hello(&session);
    let (net, material, abort) = SessionNet::start(
        me,
        hello.session,
        hello,
        peers,
        link(links, Peer::Dealer)?,
        settings,
    )
    .await?;
    // Protocol code blocks: it has a thread of its own.
    tokio::task::spawn_blocking(move || party_steps(me, &session, net, material, &abort)).await?
}

fn party_steps(
    me: PartyId,
    session: &Session,
    mut net: SessionNet,
    mut material: MaterialReceiver,
    abort: &AbortHandle,
) -> anyhow::Result<NodeReport> {
    let keys = test_party_keys(session.seed, me);
    let mut state = State::default();
    let mut report = NodeReport::default();
    for (step, case) in session.cases.iter().enumerate() {
        let own = |named, kind| own_shares(me, named, session.seed, step, kind);
        state.shares.extend(own(&case.initial, "initial"));
        let inputs = own(&case.inputs, "input");
        let plan = case.plan();
        let done = run_step(
            &plan,
            me,
            step as u64,
            &keys,
            &mut state,
            &inputs,
            &mut net,
            &mut material,
        );
        let outputs = done
            .inspect_err(|error| abort.abort(&error.to_string()))
            .with_context(|| format!("step {step}, {}", case.program.name))?;
        report
            .steps
            .push(step_report(&case.program.outputs, &outputs, &state)?);
    }
    Ok(counted(report, &net.stats()))
}

/// This party's shares of named values; the test's stand-in for what a hospital sends.
fn own_shares(
    me: PartyId,
    named: &BTreeMap<String, Tensor>,
    seed: u64,
    step: usize,
    kind: &str,
) -> BTreeMap<String, Tensor> {
    let own = |(name, tensor): (&String, &Tensor)| {
        let shares = shares(tensor, seed, step, kind, name);
        (name.clone(), shares[me.index()].clone())
    };
    named.iter().map(own).collect()
}

/// The shares that a step revealed and carried on.
fn step_report(
    declared: &[Output],
    revealed: &[OutputShare],
    state: &State,
) -> anyhow::Result<StepReport> {
    let mut opened = [0; 16];
    opened.copy_from_slice(&state.opened[..16]);
    let carried = declared
        .iter()
        .filter(|output| matches!(output.sink, Sink::Carry | Sink::CarryMasked));
    let share = |output: &Output| {
        let kept = state.shares.get(&output.name);
        let kept = kept.with_context(|| format!("{:?} was not carried on", output.name))?;
        Ok(ShareReport {
            name: output.name.clone(),
            shape: kept.shape().to_vec(),
            words: kept.data().to_vec(),
            xor: false,
            opened,
        })
    };
    Ok(StepReport {
        revealed: revealed.iter().map(ShareReport::from).collect(),
        carried: carried.map(share).collect::<anyhow::Result<_>>()?,
    })
}

async fn dealer(
    links: &BTreeMap<Peer, Link>,
    session: Session,
    settings: &Settings,
) -> anyhow::Result<NodeReport> {
    let to = |party| link(links, Peer::Party(party)).map(|link| (party, link));
    let parties = [to(PartyId::P0)?, to(PartyId::P1)?, to(PartyId::P2)?];
    let hello = hello(&session);
    let (net, abort) = DealerNet::start(hello.session, hello, parties, settings).await?;
    tokio::task::spawn_blocking(move || dealer_steps(&session, net, &abort)).await?
}

fn dealer_steps(
    session: &Session,
    mut net: DealerNet,
    abort: &AbortHandle,
) -> anyhow::Result<NodeReport> {
    let keys = test_dealer_keys(session.seed);
    let mut state = DealerState::default();
    for (step, case) in session.cases.iter().enumerate() {
        let plan = case.plan();
        deal_step(&plan, step as u64, &keys, &mut state, &mut net)
            .inspect_err(|error| abort.abort(&error.to_string()))
            .with_context(|| format!("step {step}, {}", case.program.name))?;
    }
    Ok(counted(NodeReport::default(), &net.stats()))
}

fn counted(report: NodeReport, stats: &SessionStats) -> NodeReport {
    let [p0, p1, p2] = PartyId::ALL.map(Peer::Party);
    let peers = [p0, p1, p2, Peer::Dealer];
    NodeReport {
        rounds: stats.rounds,
        sent_frames: stats.sent_frames,
        sent_bytes: peers.map(|peer| stats.payload_sent(peer)),
        received_bytes: peers.map(|peer| stats.payload_received(peer)),
        ..report
    }
}
