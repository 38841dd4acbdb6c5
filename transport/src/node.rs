//! A node's endpoint: one port, UDP and TCP, that both listens and connects.
//!
//! Handshakes of incoming connections run beside each other, bounded in number
//! and time; only connections whose certificate was checked come out of
//! [`Node::accept`]. A node that only dials out listens nowhere.

use crate::carrier::Connection;
use crate::link::LinkInner;
use crate::quic::{self, Configs, identity_error};
use crate::tcp::{self, Dialler, Listener};
use crate::tls::{self, ALPN, Allowed, PROBE_ALPN, Seen};
use crate::{Identity, Link, Pin, Protocol, Settings, TransportError};
use quinn::{Endpoint, VarInt};
use rustls::sign::CertifiedKey;
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Accepted links that nobody has taken yet.
const ACCEPTED_MAX: usize = 64;
/// Ports tried until one is free for UDP and TCP.
const PORTS_TRIED: usize = 16;

/// A bound endpoint with its own identity.
pub struct Node {
    endpoint: Endpoint,
    local_addr: SocketAddr,
    key: Arc<CertifiedKey>,
    allowed: Allowed,
    settings: Arc<Settings>,
    incoming: tokio::sync::Mutex<mpsc::Receiver<Link>>,
    /// Keeps `incoming` open where nothing listens.
    open: Mutex<Option<mpsc::Sender<Link>>>,
    links: LinkList,
    acceptors: Vec<JoinHandle<()>>,
}

/// How a peer can be reached, or what stands in the way; see [`Node::probe`].
#[derive(Debug)]
pub struct Reach {
    /// Over QUIC: how long it took.
    pub quic: Result<Duration, TransportError>,
    /// Over TCP.
    pub tcp: Result<Duration, TransportError>,
}

/// The links that are alive, for the orderly close.
type LinkList = Arc<Mutex<Vec<Weak<LinkInner>>>>;

/// Where the acceptors leave new links.
#[derive(Clone)]
pub(crate) struct Accepted {
    links: LinkList,
    taken: mpsc::Sender<Link>,
}

impl Accepted {
    pub(crate) async fn put(&self, link: Link) {
        remember(&self.links, &link);
        // An error means that the node is gone.
        let _ = self.taken.send(link).await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.acceptors.iter().for_each(JoinHandle::abort);
    }
}

impl Node {
    /// Binds to `listen`, UDP and TCP (port 0 picks a free one). Nobody may connect before
    /// [`Node::set_allowed`].
    ///
    /// # Panics
    /// Outside of a tokio runtime with its network and time drivers.
    pub fn bind(
        identity: &Identity,
        listen: SocketAddr,
        settings: &Settings,
    ) -> Result<Node, TransportError> {
        settings.check()?;
        let key = tls::certified_key(identity, &tls::provider())?;
        let allowed = Allowed::default();
        let configs = Configs::new(key.clone(), allowed.clone(), settings)?;
        let tls = tls::server_config(key.clone(), allowed.clone()).map_err(identity_error)?;
        let bind_error = |source| bind_error(listen, source);
        let (endpoint, socket) = both(listen, &configs, settings).map_err(bind_error)?;
        let socket = tokio::net::TcpListener::from_std(socket).map_err(bind_error)?;
        let local_addr = endpoint.local_addr().map_err(bind_error)?;

        let settings = Arc::new(settings.clone());
        let (tx, incoming) = mpsc::channel(ACCEPTED_MAX);
        let accepted = Accepted {
            links: LinkList::default(),
            taken: tx.clone(),
        };
        let links = accepted.links.clone();
        let listener = Arc::new(Listener::new(tls, settings.clone()));
        let acceptors = vec![
            tokio::spawn(listener.accept_all(socket, accepted.clone())),
            tokio::spawn(quic::accept_all(
                endpoint.clone(),
                configs,
                settings.clone(),
                accepted,
            )),
        ];
        Ok(Node {
            endpoint,
            local_addr,
            key,
            allowed,
            settings,
            incoming: tokio::sync::Mutex::new(incoming),
            open: Mutex::new(Some(tx)),
            links,
            acceptors,
        })
    }

    /// A node that only dials out, over UDP from the local address `from`. Nothing listens.
    ///
    /// # Panics
    /// See [`Node::bind`].
    pub fn dial_only(
        identity: &Identity,
        from: IpAddr,
        settings: &Settings,
    ) -> Result<Node, TransportError> {
        settings.check()?;
        let from = SocketAddr::new(from, 0);
        let bind_error = |source| bind_error(from, source);
        let endpoint = quic::endpoint(from, None, settings).map_err(bind_error)?;
        let (tx, incoming) = mpsc::channel(ACCEPTED_MAX);
        Ok(Node {
            local_addr: endpoint.local_addr().map_err(bind_error)?,
            endpoint,
            key: tls::certified_key(identity, &tls::provider())?,
            allowed: Allowed::default(),
            settings: Arc::new(settings.clone()),
            incoming: tokio::sync::Mutex::new(incoming),
            open: Mutex::new(Some(tx)),
            links: LinkList::default(),
            acceptors: Vec::new(),
        })
    }

    /// The address bound to, with the real port.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Says who may connect from now on. Connections that others opened and
    /// whose key is no longer in the set are closed.
    pub fn set_allowed(&self, pins: BTreeSet<Pin>) {
        self.allowed.set(pins);
        for link in live(&self.links) {
            if link.is_incoming() && !self.allowed.contains(&link.peer()) {
                link.close_now("this public key is no longer allowed");
            }
        }
    }

    /// Connects to the node at `addr` that holds the key `expect`, over what the settings say, and
    /// waits until it has accepted this node as well.
    pub async fn connect(&self, addr: SocketAddr, expect: Pin) -> Result<Link, TransportError> {
        self.connect_over(self.settings.protocol, addr, expect)
            .await
    }

    /// As [`Node::connect`], over what this node and one that uses `theirs` have in common.
    pub async fn connect_to(
        &self,
        theirs: Protocol,
        addr: SocketAddr,
        expect: Pin,
    ) -> Result<Link, TransportError> {
        let protocol = self.settings.protocol.with(theirs);
        self.connect_over(protocol, addr, expect).await
    }

    /// As [`Node::connect`], over this protocol.
    pub async fn connect_over(
        &self,
        protocol: Protocol,
        addr: SocketAddr,
        expect: Pin,
    ) -> Result<Link, TransportError> {
        let (seen, tls) = self.client(expect, ALPN)?;
        let settings = self.settings.clone();
        let conn = match protocol {
            Protocol::Quic => {
                let conn =
                    quic::connect(&self.endpoint, tls, &seen, addr, expect, &settings).await?;
                Connection::Quic(conn)
            }
            Protocol::Tcp => {
                let dialler = Dialler::new(addr, expect, seen, tls, settings.clone());
                Connection::Tcp(dialler.link().await?)
            }
        };
        let link = Link::new(conn, expect, false, settings);
        remember(&self.links, &link);
        Ok(link)
    }

    /// Whether this node could connect to the node at `addr` that holds the key `expect`, and how
    /// long that took. Makes no link: the other side shows it to nobody, so that a node's own links
    /// go on beside it. Bounded by `connect_timeout_ms` and `handshake_timeout_ms`.
    ///
    /// # Errors
    /// As of [`Node::connect`]: [`TransportError::Unreachable`] where nothing answers (over QUIC:
    /// UDP may be blocked), [`TransportError::NothingListens`], [`TransportError::WrongCertificate`],
    /// [`TransportError::Refused`] where this node's key is not allowed there.
    pub async fn probe(
        &self,
        protocol: Protocol,
        addr: SocketAddr,
        expect: Pin,
    ) -> Result<Duration, TransportError> {
        let start = Instant::now();
        let (seen, tls) = self.client(expect, PROBE_ALPN)?;
        let settings = &self.settings;
        match protocol {
            Protocol::Quic => {
                let conn =
                    quic::connect(&self.endpoint, tls, &seen, addr, expect, settings).await?;
                conn.close(VarInt::from_u32(0), b"that was all");
            }
            Protocol::Tcp => {
                let dialler = Dialler::new(addr, expect, seen, tls, settings.clone());
                dialler.probe().await?;
            }
        }
        Ok(start.elapsed())
    }

    /// [`Node::probe`] over both protocols at once: what a person wants to know of a peer that does
    /// not answer.
    pub async fn reach(&self, addr: SocketAddr, expect: Pin) -> Reach {
        let (quic, tcp) = tokio::join!(
            self.probe(Protocol::Quic, addr, expect),
            self.probe(Protocol::Tcp, addr, expect)
        );
        Reach { quic, tcp }
    }

    /// TLS of a client that expects this key, and what it will have seen.
    fn client(
        &self,
        expect: Pin,
        alpn: &[u8],
    ) -> Result<(Seen, rustls::ClientConfig), TransportError> {
        let seen = Seen::default();
        let tls = tls::client_config(self.key.clone(), expect, seen.clone());
        let mut tls = tls.map_err(identity_error)?;
        tls.alpn_protocols = vec![alpn.to_vec()];
        Ok((seen, tls))
    }

    /// The next authenticated connection from outside; `None` after [`Node::close`].
    pub async fn accept(&self) -> Option<Link> {
        self.incoming.lock().await.recv().await
    }

    /// Orderly end: takes no new connections, lets the last messages of finished
    /// sessions and of aborts arrive, then closes every connection with `reason`
    /// and waits for the peers to hear it. Bounded by `close_timeout_ms`, twice.
    pub async fn close(&self, reason: &str) {
        self.endpoint.set_server_config(None);
        self.acceptors.iter().for_each(JoinHandle::abort);
        drop(
            self.open
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take(),
        );
        let links = live(&self.links);
        let draining: Vec<_> = links
            .iter()
            .cloned()
            .map(|link| tokio::spawn(async move { link.drain().await }))
            .collect();
        for task in draining {
            // A drain cannot panic; a cancelled one means that the runtime ends.
            let _ = task.await;
        }
        links.iter().for_each(|link| link.close_now(reason));
        self.endpoint.close(VarInt::from_u32(0), reason.as_bytes());
        let heard = async {
            self.endpoint.wait_idle().await;
            for link in &links {
                link.gone().await;
            }
        };
        let heard = tokio::time::timeout(self.settings.close_timeout(), heard);
        if heard.await.is_err() {
            tracing::debug!("some peers did not confirm the close");
        }
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Node {{ addr: {} }}", self.local_addr)
    }
}

fn bind_error(addr: SocketAddr, source: io::Error) -> TransportError {
    match source.kind() {
        io::ErrorKind::AddrInUse => TransportError::AddressInUse { addr },
        _ => TransportError::Bind { addr, source },
    }
}

/// UDP and TCP on one port.
fn both(
    listen: SocketAddr,
    configs: &Configs,
    settings: &Settings,
) -> io::Result<(Endpoint, std::net::TcpListener)> {
    let mut tries = PORTS_TRIED;
    loop {
        let endpoint = quic::endpoint(listen, Some(configs), settings)?;
        match tcp::bind(endpoint.local_addr()?) {
            Ok(socket) => return Ok((endpoint, socket)),
            // The port was free for UDP alone.
            Err(err)
                if listen.port() == 0 && err.kind() == io::ErrorKind::AddrInUse && tries > 1 =>
            {
                tries -= 1;
            }
            Err(err) => return Err(err),
        }
    }
}

fn live(links: &LinkList) -> Vec<Link> {
    links
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .iter()
        .filter_map(Link::upgrade)
        .collect()
}

fn remember(links: &LinkList, link: &Link) {
    let mut links = links.lock().unwrap_or_else(PoisonError::into_inner);
    links.retain(|link| link.strong_count() > 0);
    links.push(link.downgrade());
}

#[cfg(test)]
mod tests {
    use super::*;
    use quinn::ServerConfig;
    use quinn::crypto::rustls::QuicServerConfig;
    use rustls::pki_types::CertificateDer;
    use std::net::Ipv4Addr;

    fn identity() -> Identity {
        let made = rcgen::generate_simple_self_signed(vec!["node".into()]).unwrap();
        Identity {
            cert_der: made.cert.der().to_vec(),
            key_der: made.signing_key.serialize_der(),
        }
    }

    fn bind(identity: &Identity) -> Node {
        Node::bind(
            identity,
            (Ipv4Addr::LOCALHOST, 0).into(),
            &Settings::default(),
        )
        .unwrap()
    }

    /// The certificate of one node with the private key of another.
    fn stolen(cert: &Identity, key: &Identity) -> Arc<CertifiedKey> {
        let key = tls::certified_key(key, &tls::provider()).unwrap();
        let cert = CertificateDer::from(cert.cert_der.clone());
        Arc::new(CertifiedKey::new(vec![cert], key.key.clone()))
    }

    #[tokio::test]
    async fn a_server_with_the_right_certificate_and_another_key_is_named_as_such() {
        let (me, peer, thief) = (identity(), identity(), identity());
        let allowed = Allowed::default();
        allowed.set(BTreeSet::from([me.pin().unwrap()]));
        let config = tls::server_config(stolen(&peer, &thief), allowed).unwrap();
        let crypto = Arc::new(QuicServerConfig::try_from(config).unwrap());
        let listen = (Ipv4Addr::LOCALHOST, 0).into();
        let impostor = Endpoint::server(ServerConfig::with_crypto(crypto), listen).unwrap();
        let accepting = tokio::spawn({
            let impostor = impostor.clone();
            async move { impostor.accept().await.unwrap().await.map(|_| ()) }
        });
        let addr = impostor.local_addr().unwrap();
        let err = bind(&me)
            .connect(addr, peer.pin().unwrap())
            .await
            .unwrap_err();
        assert!(
            matches!(err, TransportError::BadSignature { addr: at } if at == addr),
            "{err}"
        );
        assert!(accepting.await.unwrap().is_err());
    }

    #[tokio::test]
    async fn over_tcp_too_a_server_with_another_key_is_named_as_such() {
        let (me, peer, thief) = (identity(), identity(), identity());
        let allowed = Allowed::default();
        allowed.set(BTreeSet::from([me.pin().unwrap()]));
        let config = tls::server_config(stolen(&peer, &thief), allowed).unwrap();
        let listen: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
        let impostor = tokio::net::TcpListener::bind(listen).await.unwrap();
        let addr = impostor.local_addr().unwrap();
        let accepting = tokio::spawn(async move {
            let (tcp, _) = impostor.accept().await.unwrap();
            let tls = tokio_rustls::TlsAcceptor::from(Arc::new(config));
            tls.accept(tcp).await.map(drop)
        });
        let node = bind(&me);
        let connecting = node.connect_over(Protocol::Tcp, addr, peer.pin().unwrap());
        let err = connecting.await.unwrap_err();
        assert!(
            matches!(err, TransportError::BadSignature { addr: at } if at == addr),
            "{err}"
        );
        assert!(accepting.await.unwrap().is_err());
    }

    #[tokio::test]
    async fn a_client_with_an_allowed_certificate_and_another_key_does_not_get_in() {
        for protocol in [Protocol::Quic, Protocol::Tcp] {
            let (me, thief, friend) = (identity(), identity(), identity());
            let node = bind(&me);
            node.set_allowed(BTreeSet::from([friend.pin().unwrap()]));
            let mut impostor = bind(&thief);
            impostor.key = stolen(&friend, &thief);
            let (addr, pin) = (node.local_addr(), me.pin().unwrap());
            let err = impostor.connect_over(protocol, addr, pin).await;
            let err = err.unwrap_err();
            assert!(matches!(err, TransportError::Refused { .. }), "{err}");
            // Only the real one comes out of `accept`.
            let friend_node = bind(&friend);
            let connected = friend_node.connect_over(protocol, addr, pin).await;
            assert_eq!(connected.unwrap().protocol(), protocol);
            assert_eq!(node.accept().await.unwrap().peer(), friend.pin().unwrap());
        }
    }
}
