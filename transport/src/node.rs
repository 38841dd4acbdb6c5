//! A node's endpoint: one UDP socket that both listens and connects.
//!
//! Handshakes of incoming connections run beside each other, bounded in number
//! and time; only connections whose certificate was checked come out of
//! [`Node::accept`].

use crate::inline::InlineRuntime;
use crate::link::LinkInner;
use crate::sorter::await_greeting;
use crate::tls::{self, Allowed, Seen};
use crate::{Identity, Link, Pin, Settings, TransportError};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ConnectionError, Endpoint, EndpointConfig, Incoming, ServerConfig, VarInt};
use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;
use socket2::{Domain, Protocol, Socket, Type};
use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc};

/// Handshakes in progress at the same time.
const HALF_OPEN_MAX: usize = 64;
/// From here on a caller must first prove that its address is its own.
const HALF_OPEN_TRUSTING: usize = 32;
/// TLS alert `access_denied`: what the pin check answers with.
const ALERT_ACCESS_DENIED: u8 = 49;

/// A bound endpoint, server and client, with its own identity.
pub struct Node {
    endpoint: Endpoint,
    local_addr: SocketAddr,
    key: Arc<CertifiedKey>,
    allowed: Allowed,
    settings: Arc<Settings>,
    incoming: tokio::sync::Mutex<mpsc::Receiver<Link>>,
    links: LinkList,
    acceptor: tokio::task::JoinHandle<()>,
}

/// The links that are alive, for the orderly close.
type LinkList = Arc<Mutex<Vec<Weak<LinkInner>>>>;

impl Drop for Node {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

impl Node {
    /// Binds to `listen` (port 0 picks a free one). Nobody may connect before
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
        let config = tls::server_config(key.clone(), allowed.clone()).map_err(identity_error)?;
        let crypto = Arc::new(QuicServerConfig::try_from(config).map_err(identity_error)?);
        let server = |remote: IpAddr| {
            let mut config = ServerConfig::with_crypto(crypto.clone());
            config.transport_config(Arc::new(settings.transport_config(remote)));
            // Roaming is for phones; an address that changes here is an error.
            config.migration(false);
            config.max_incoming(4 * HALF_OPEN_MAX);
            Arc::new(config)
        };
        // Any address that is not this host's stands for a real path.
        let configs = Configs {
            near: server(Ipv4Addr::LOCALHOST.into()),
            far: server(Ipv4Addr::new(192, 0, 2, 1).into()),
        };

        let socket = bind_socket(listen, settings.socket_buffer_bytes).map_err(|source| {
            match source.kind() {
                io::ErrorKind::AddrInUse => TransportError::AddressInUse { addr: listen },
                _ => TransportError::Bind {
                    addr: listen,
                    source,
                },
            }
        })?;
        let bind_error = |source| TransportError::Bind {
            addr: listen,
            source,
        };
        let mut endpoint_config = EndpointConfig::default();
        // 1472 is what any node accepts, whatever it sends itself.
        endpoint_config
            .max_udp_payload_size(settings.datagram_bytes.max(1_472))
            .map_err(|err| bind_error(io::Error::other(err.to_string())))?;
        let server_config = Some((*configs.far).clone());
        let endpoint = Endpoint::new(
            endpoint_config,
            server_config,
            socket,
            Arc::new(InlineRuntime(Handle::current())),
        )
        .map_err(bind_error)?;
        let local_addr = endpoint.local_addr().map_err(bind_error)?;

        let settings = Arc::new(settings.clone());
        let links = LinkList::default();
        let (tx, incoming) = mpsc::channel(HALF_OPEN_MAX);
        let acceptor = tokio::spawn(accept_all(
            endpoint.clone(),
            configs,
            settings.clone(),
            links.clone(),
            tx,
        ));
        Ok(Node {
            endpoint,
            local_addr,
            key,
            allowed,
            settings,
            incoming: tokio::sync::Mutex::new(incoming),
            links,
            acceptor,
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

    /// Connects to the node at `addr` that holds the key `expect`, and waits
    /// until it has accepted this node as well.
    pub async fn connect(&self, addr: SocketAddr, expect: Pin) -> Result<Link, TransportError> {
        let failed = |detail: String| TransportError::Connect { addr, detail };
        let seen = Seen::default();
        let config =
            tls::client_config(self.key.clone(), expect, seen.clone()).map_err(identity_error)?;
        let crypto = QuicClientConfig::try_from(config).map_err(identity_error)?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(self.settings.transport_config(addr.ip())));
        let connecting = self
            .endpoint
            .connect_with(config, addr, tls::SERVER_NAME)
            .map_err(|err| failed(err.to_string()))?;

        let waited_ms = self.settings.connect_timeout_ms;
        let conn = match tokio::time::timeout(Duration::from_millis(waited_ms), connecting).await {
            Ok(Ok(conn)) => conn,
            Ok(Err(err)) => return Err(self.explain(err, addr, expect, &seen)),
            Err(_) => return Err(TransportError::Unreachable { addr, waited_ms }),
        };
        let greeting =
            tokio::time::timeout(self.settings.handshake_timeout(), await_greeting(&conn));
        match greeting.await {
            Ok(Ok(())) => {}
            Ok(Err(err)) => return Err(self.explain(err, addr, expect, &seen)),
            Err(_) => {
                return Err(TransportError::Timeout {
                    what: format!("the handshake with {addr}"),
                    waited_ms: self.settings.handshake_timeout_ms,
                });
            }
        }
        let link = Link::new(conn, expect, false, self.settings.clone());
        remember(&self.links, &link);
        Ok(link)
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
        self.acceptor.abort();
        let links = live(&self.links);
        let draining: Vec<_> = links
            .into_iter()
            .map(|link| tokio::spawn(async move { link.drain().await }))
            .collect();
        for task in draining {
            // A drain cannot panic; a cancelled one means that the runtime ends.
            let _ = task.await;
        }
        self.endpoint.close(VarInt::from_u32(0), reason.as_bytes());
        let idle = tokio::time::timeout(self.settings.close_timeout(), self.endpoint.wait_idle());
        if idle.await.is_err() {
            tracing::debug!("some peers did not confirm the close");
        }
    }

    /// Turns QUIC's error into one that names what a person can act on.
    fn explain(
        &self,
        err: ConnectionError,
        addr: SocketAddr,
        expected: Pin,
        seen: &Seen,
    ) -> TransportError {
        match (&err, seen.pin()) {
            (ConnectionError::TransportError(_), Some(found)) if found != expected => {
                TransportError::WrongCertificate {
                    addr,
                    expected,
                    found,
                }
            }
            // The certificate was the right one, so what failed is the proof of its key.
            (ConnectionError::TransportError(_), Some(_)) => TransportError::BadSignature { addr },
            (ConnectionError::ConnectionClosed(close), _) => TransportError::Refused {
                addr,
                detail: if close.error_code
                    == quinn::TransportErrorCode::crypto(ALERT_ACCESS_DENIED)
                {
                    "this node's public key is not allowed there".into()
                } else {
                    close.to_string()
                },
            },
            (ConnectionError::ApplicationClosed(close), _) => TransportError::Refused {
                addr,
                detail: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            (ConnectionError::TimedOut, _) => TransportError::Unreachable {
                addr,
                waited_ms: self.settings.idle_timeout_ms,
            },
            _ => TransportError::Connect {
                addr,
                detail: err.to_string(),
            },
        }
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Node {{ addr: {} }}", self.local_addr)
    }
}

fn identity_error(err: impl std::fmt::Display) -> TransportError {
    TransportError::Identity {
        detail: err.to_string(),
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

/// A UDP socket with the largest buffers the operating system grants.
fn bind_socket(listen: SocketAddr, buffer_bytes: u32) -> io::Result<std::net::UdpSocket> {
    let socket = Socket::new(
        Domain::for_address(listen),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    if listen.is_ipv6() {
        // Serves IPv4 too where the system allows it.
        let _ = socket.set_only_v6(false);
    }
    // Linux grants what its limit allows without an error, others refuse.
    let mut wanted = buffer_bytes as usize;
    while wanted >= 64 << 10 && socket.set_recv_buffer_size(wanted).is_err() {
        wanted /= 2;
    }
    wanted = buffer_bytes as usize;
    while wanted >= 64 << 10 && socket.set_send_buffer_size(wanted).is_err() {
        wanted /= 2;
    }
    tracing::debug!(
        receive_bytes = socket.recv_buffer_size().unwrap_or(0),
        send_bytes = socket.send_buffer_size().unwrap_or(0),
        "socket buffers granted"
    );
    socket.bind(&listen.into())?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// QUIC's parameters for callers on this host and for all others.
struct Configs {
    near: Arc<ServerConfig>,
    far: Arc<ServerConfig>,
}

async fn accept_all(
    endpoint: Endpoint,
    configs: Configs,
    settings: Arc<Settings>,
    links: LinkList,
    accepted: mpsc::Sender<Link>,
) {
    let half_open = Arc::new(Semaphore::new(HALF_OPEN_MAX));
    while let Some(incoming) = endpoint.accept().await {
        let busy = HALF_OPEN_MAX - half_open.available_permits();
        if busy >= HALF_OPEN_TRUSTING && incoming.may_retry() {
            // An error means that the caller proved its address meanwhile.
            let _ = incoming.retry();
            continue;
        }
        let Ok(permit) = half_open.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let near = incoming.remote_address().ip().to_canonical().is_loopback();
        let config = if near {
            configs.near.clone()
        } else {
            configs.far.clone()
        };
        let (settings, links, accepted) = (settings.clone(), links.clone(), accepted.clone());
        tokio::spawn(async move {
            let remote = incoming.remote_address();
            let handshake = complete(incoming, config, settings.clone());
            match tokio::time::timeout(settings.handshake_timeout(), handshake).await {
                Ok(Ok(link)) => {
                    remember(&links, &link);
                    // An error means that the node is gone.
                    let _ = accepted.send(link).await;
                }
                Ok(Err(detail)) => {
                    tracing::warn!(peer = %remote, %detail, "a connection was not accepted")
                }
                Err(_) => tracing::warn!(peer = %remote, "a handshake was not finished in time"),
            }
            drop(permit);
        });
    }
}

async fn complete(
    incoming: Incoming,
    config: Arc<ServerConfig>,
    settings: Arc<Settings>,
) -> Result<Link, String> {
    let connecting = incoming
        .accept_with(config)
        .map_err(|err| err.to_string())?;
    let conn = connecting.await.map_err(|err| err.to_string())?;
    let identity = conn
        .peer_identity()
        .ok_or("the peer showed no certificate")?;
    let certs = identity
        .downcast::<Vec<CertificateDer<'static>>>()
        .map_err(|_| "unexpected kind of identity")?;
    let cert = certs.first().ok_or("the peer showed no certificate")?;
    let pin = Pin::of_certificate(cert).map_err(|err| err.to_string())?;
    let link = Link::new(conn, pin, true, settings);
    link.greet().await.map_err(|err| err.to_string())?;
    Ok(link)
}

#[cfg(test)]
mod tests {
    use super::*;

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
    async fn a_client_with_an_allowed_certificate_and_another_key_does_not_get_in() {
        let (me, thief, friend) = (identity(), identity(), identity());
        let node = bind(&me);
        node.set_allowed(BTreeSet::from([friend.pin().unwrap()]));
        let mut impostor = bind(&thief);
        impostor.key = stolen(&friend, &thief);
        let err = impostor
            .connect(node.local_addr(), me.pin().unwrap())
            .await
            .unwrap_err();
        assert!(matches!(err, TransportError::Refused { .. }), "{err}");
        // Only the real one comes out of `accept`.
        let friend_node = bind(&friend);
        friend_node
            .connect(node.local_addr(), me.pin().unwrap())
            .await
            .unwrap();
        assert_eq!(node.accept().await.unwrap().peer(), friend.pin().unwrap());
    }
}
