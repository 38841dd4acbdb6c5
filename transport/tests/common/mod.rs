//! Nodes on loopback with fresh certificates, driven as in production: one
//! current-thread runtime on its own thread, blocking calls from the test's.

#![allow(dead_code)]

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use trefoil_protocol::party::PartyId;
use trefoil_transport::{
    AbortHandle, DealerNet, Hello, Identity, Link, MaterialReceiver, Node, Pin, SessionNet,
    Settings, TransportError,
};

/// A runtime on its own thread; ends with its value.
pub struct Runtime {
    pub handle: Handle,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Runtime {
    pub fn new() -> Runtime {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let handle = runtime.handle().clone();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let _ = runtime.block_on(stopped);
        });
        Runtime {
            handle,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    pub fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.handle.block_on(async {
            tokio::time::timeout(Duration::from_secs(120), future)
                .await
                .expect("the test hangs")
        })
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub fn identity() -> Identity {
    let made = rcgen::generate_simple_self_signed(vec!["node".into()]).unwrap();
    Identity {
        cert_der: made.cert.der().to_vec(),
        key_der: made.signing_key.serialize_der(),
    }
}

pub fn any_port() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

/// As shipped, but no test waits a minute for a frame.
pub fn settings() -> Settings {
    Settings {
        protocol: crate::PROTOCOL,
        round_timeout_ms: 30_000,
        ..Settings::default()
    }
}

/// Notices a silent peer sooner than the default, for tests that kill one.
pub fn watchful() -> Settings {
    Settings {
        keep_alive_ms: 300,
        idle_timeout_ms: 3_000,
        ..settings()
    }
}

pub const SESSION: [u8; 32] = [7; 32];

pub fn hello() -> Hello {
    Hello {
        wire_version: 1,
        session: SESSION,
        program_hashes: vec![[1; 32], [2; 32]],
        ring_bits: 64,
        frac_bits: 16,
        software: "trefoil 0.1.0".into(),
    }
}

/// P0, P1, P2 and the dealer, every pair of them linked. Each has its own
/// runtime, so that one can be killed.
pub struct World {
    pub nodes: [Option<Node>; 4],
    /// What each node starts its session with.
    pub settings: [Settings; 4],
    links: Vec<Vec<Option<Link>>>,
    pub runtimes: [Option<Runtime>; 4],
}

pub const DEALER: usize = 3;

impl World {
    pub fn new(settings: Settings) -> World {
        let runtimes = [0; 4].map(|_| Runtime::new());
        let identities = [0; 4].map(|_| identity());
        let pins: [Pin; 4] = identities
            .each_ref()
            .map(|identity| identity.pin().unwrap());
        let mut nodes = Vec::new();
        for (identity, runtime) in identities.iter().zip(&runtimes) {
            let node = runtime
                .run(async { Node::bind(identity, any_port(), &settings) })
                .unwrap();
            node.set_allowed(BTreeSet::from(pins));
            nodes.push(Some(node));
        }
        let mut links: Vec<Vec<Option<Link>>> = (0..4).map(|_| vec![None; 4]).collect();
        for low in 0..4 {
            for high in low + 1..4 {
                let (a, b) = (nodes[low].as_ref().unwrap(), nodes[high].as_ref().unwrap());
                let outgoing = runtimes[low]
                    .run(a.connect(b.local_addr(), pins[high]))
                    .unwrap();
                let incoming = runtimes[high].run(b.accept()).unwrap();
                assert_eq!(incoming.peer(), pins[low]);
                links[low][high] = Some(outgoing);
                links[high][low] = Some(incoming);
            }
        }
        let nodes = nodes.try_into().unwrap();
        World {
            nodes,
            settings: [0; 4].map(|_| settings.clone()),
            links,
            runtimes: runtimes.map(Some),
        }
    }

    pub fn link(&self, from: usize, to: usize) -> Link {
        self.links[from][to].clone().unwrap()
    }

    pub fn runtime(&self, at: usize) -> &Runtime {
        self.runtimes[at].as_ref().unwrap()
    }

    pub fn start_party(
        &self,
        me: PartyId,
        hello: Hello,
    ) -> Result<(SessionNet, MaterialReceiver, AbortHandle), TransportError> {
        let peers = me
            .others()
            .map(|other| (other, self.link(me.index(), other.index())));
        let dealer = self.link(me.index(), DEALER);
        self.runtime(me.index()).run(SessionNet::start(
            me,
            SESSION,
            hello,
            peers,
            dealer,
            &self.settings[me.index()],
        ))
    }

    pub fn start_dealer(&self, hello: Hello) -> Result<(DealerNet, AbortHandle), TransportError> {
        let parties = PartyId::ALL.map(|party| (party, self.link(DEALER, party.index())));
        self.runtime(DEALER).run(DealerNet::start(
            SESSION,
            hello,
            parties,
            &self.settings[DEALER],
        ))
    }

    /// Starts the session at all four nodes, each from its own thread.
    pub fn start(self: &Arc<Self>) -> Session {
        let parties = PartyId::ALL.map(|me| {
            let world = self.clone();
            std::thread::spawn(move || world.start_party(me, hello()).unwrap())
        });
        let (dealer, dealer_abort) = self.start_dealer(hello()).unwrap();
        let parties = parties.map(|thread| thread.join().unwrap());
        let aborts = parties.each_ref().map(|(_, _, abort)| abort.clone());
        let mut nets = Vec::new();
        let mut materials = Vec::new();
        for (net, material, _) in parties {
            nets.push(net);
            materials.push(material);
        }
        Session {
            nets: nets.try_into().ok().unwrap(),
            materials: materials.try_into().ok().unwrap(),
            aborts,
            dealer,
            dealer_abort,
        }
    }

    /// The node vanishes without a word, as if its process were killed: its
    /// runtime stops, nothing is sent any more.
    pub fn kill(&mut self, at: usize) {
        drop(self.runtimes[at].take());
    }
}

pub struct Session {
    pub nets: [SessionNet; 3],
    pub materials: [MaterialReceiver; 3],
    pub aborts: [AbortHandle; 3],
    pub dealer: DealerNet,
    pub dealer_abort: AbortHandle,
}
