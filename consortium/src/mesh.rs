//! The links to the other nodes; who dials whom follows from the consortium file. A link that breaks
//! is made again; who is at the other end is the certificate's word alone.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_transport::{Link, Node, Pin, Settings};

use crate::meeting::{self, NodeInfo, PeerStatus};
use crate::reach::linked;
use crate::{Addresses, ConsortiumFile, LiveConsortium};

/// First wait before a broken link is dialled again.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest wait.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Links to the three other nodes of the consortium.
pub struct Mesh {
    places: Vec<Place>,
}

struct Place {
    peer: Peer,
    pin: Pin,
    dials: bool,
    link: watch::Sender<Option<(u64, Link)>>,
    /// Links so far: each has a number of its own, so that the end of an old one clears no other.
    links: AtomicU64,
    trouble: Mutex<Option<String>>,
}

impl Mesh {
    /// No links yet, of the node `me`.
    pub fn new(me: Peer, consortium: &ConsortiumFile) -> Mesh {
        let nodes = PartyId::ALL.map(Peer::Party).into_iter();
        let others = nodes.chain([Peer::Dealer]).filter(|peer| *peer != me);
        let places = others.map(|peer| Place {
            peer,
            pin: consortium.node(peer).pin,
            dials: consortium.dials(me, peer),
            link: watch::channel(None).0,
            links: AtomicU64::new(0),
            trouble: Mutex::default(),
        });
        Mesh {
            places: places.collect(),
        }
    }

    fn place(&self, peer: Peer) -> Option<&Place> {
        self.places.iter().find(|place| place.peer == peer)
    }

    /// The peers that this node dials.
    pub fn dialled(&self) -> impl Iterator<Item = Peer> + '_ {
        self.places
            .iter()
            .filter(|place| place.dials)
            .map(|place| place.peer)
    }

    /// The links as they are now.
    pub fn status(&self) -> Vec<PeerStatus> {
        let status = |place: &Place| {
            let link = place.link.borrow().as_ref().map(|(_, link)| link.clone());
            let trouble = place.trouble.lock().unwrap_or_else(PoisonError::into_inner);
            PeerStatus {
                peer: place.peer.to_string(),
                rtt_us: link.as_ref().map(|link| link.rtt().as_micros() as u64),
                trouble: link.is_none().then(|| trouble.clone()).flatten(),
            }
        };
        self.places.iter().map(status).collect()
    }

    /// Puts a link in its place until it closes.
    pub async fn hold(&self, peer: Peer, link: Link) {
        let Some(place) = self.place(peer) else {
            return;
        };
        let number = place.links.fetch_add(1, Ordering::Relaxed);
        place.link.send_replace(Some((number, link.clone())));
        tracing::info!(%peer, addr = %link.remote_addr(), "{}", linked(&link));
        let reason = link.closed().await;
        tracing::info!(%peer, %reason, "link closed");
        place.note(reason);
        place.link.send_if_modified(|held| {
            let mine = held.as_ref().is_some_and(|(held, _)| *held == number);
            if mine {
                *held = None;
            }
            mine
        });
    }

    /// The link to a peer; waits for it at most the connection's time-out.
    pub async fn wait(&self, peer: Peer, wait: Duration) -> Result<Link, String> {
        let Some(place) = self.place(peer) else {
            return Err(format!("this node has no link to {peer}"));
        };
        let mut held = place.link.subscribe();
        let waiting = async {
            let held = held.wait_for(Option::is_some).await;
            // The sender lives as long as the mesh.
            held.ok()
                .and_then(|held| held.as_ref().map(|(_, link)| link.clone()))
        };
        if let Ok(Some(link)) = tokio::time::timeout(wait, waiting).await {
            return Ok(link);
        }
        let trouble = place
            .trouble
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let trouble = trouble.unwrap_or_else(|| match place.dials {
            true => "no connection yet".into(),
            false => format!("{peer} has not connected to this node"),
        });
        Err(format!(
            "{peer} is not connected after {} ms: {trouble}",
            wait.as_millis()
        ))
    }

    /// Dials a peer for ever; `serve` takes every new link and returns when it has closed.
    pub async fn dial<F: Future<Output = ()>>(
        &self,
        peer: Peer,
        node: &Node,
        consortium: &LiveConsortium,
        mut addresses: watch::Receiver<Option<Addresses>>,
        settings: &Settings,
        serve: impl Fn(Link) -> F,
    ) {
        let Some(place) = self.place(peer) else {
            return;
        };
        let mut pause = FIRST_PAUSE;
        loop {
            let overrides = match addresses.wait_for(Option::is_some).await {
                Ok(overrides) => overrides.clone().unwrap_or_default(),
                Err(_) => return,
            };
            let address = overrides.resolve(peer, &consortium.now());
            let found = tokio::time::timeout(
                Duration::from_millis(settings.connect_timeout_ms),
                tokio::net::lookup_host(&address),
            );
            let found = match found.await {
                Ok(Ok(mut found)) => found
                    .next()
                    .ok_or_else(|| format!("{address} has no address")),
                Ok(Err(err)) => Err(format!("{address}: {err}")),
                Err(_) => Err(format!("{address} was not found in time")),
            };
            let connected = match found {
                Ok(addr) => place.meet(node, addr, consortium, settings).await,
                Err(reason) => Err(reason),
            };
            match connected {
                Ok(link) => {
                    pause = FIRST_PAUSE;
                    serve(link).await;
                }
                Err(reason) => place.note(reason),
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
    }
}

impl Place {
    /// Connects and introduces this node; a node of another consortium is none.
    async fn meet(
        &self,
        node: &Node,
        addr: SocketAddr,
        consortium: &LiveConsortium,
        settings: &Settings,
    ) -> Result<Link, String> {
        let file = consortium.now();
        let transport = file.node(self.peer).transport;
        let link = node.connect_to(transport, addr, self.pin).await;
        let link = link.map_err(|err| err.to_string())?;
        let ours = NodeInfo::of(&file);
        let wait = Duration::from_millis(settings.handshake_timeout_ms);
        match meeting::introduce(&link, &ours, &self.peer.to_string(), wait).await {
            Ok(theirs) => {
                if theirs.members_number != ours.members_number {
                    tracing::warn!(
                        peer = %self.peer, there = theirs.members_number, here = ours.members_number,
                        "the members' numbers differ: hand the newest consortium file to every node"
                    );
                }
                Ok(link)
            }
            Err(reason) => {
                link.close(&reason);
                Err(reason)
            }
        }
    }

    fn note(&self, reason: String) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if trouble.as_ref() != Some(&reason) {
            tracing::warn!(peer = %self.peer, %reason, "not connected");
            *trouble = Some(reason);
        }
    }
}
