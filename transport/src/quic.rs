//! QUIC's part of a node: its socket, its handshakes, and what their errors mean.

use crate::carrier::Connection;
use crate::inline::InlineRuntime;
use crate::node::Accepted;
use crate::sorter::{await_greeting, greet};
use crate::tls::{self, Allowed, PROBE_ALPN, Seen};
use crate::{Link, Pin, Settings, TransportError};
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn::{ConnectionError, Endpoint, EndpointConfig, Incoming, ServerConfig};
use rustls::pki_types::CertificateDer;
use rustls::sign::CertifiedKey;
use socket2::{Domain, Protocol, Socket, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

/// Handshakes in progress at the same time.
const HALF_OPEN_MAX: usize = 64;
/// From here on a caller must first prove that its address is its own.
const HALF_OPEN_TRUSTING: usize = 32;
/// TLS alert `access_denied`: what the pin check answers with.
const ALERT_ACCESS_DENIED: u8 = 49;

/// QUIC's parameters for callers on this host and for all others.
pub(crate) struct Configs {
    near: Arc<ServerConfig>,
    far: Arc<ServerConfig>,
}

impl Configs {
    pub(crate) fn new(
        key: Arc<CertifiedKey>,
        allowed: Allowed,
        settings: &Settings,
    ) -> Result<Configs, TransportError> {
        let config = tls::server_config(key, allowed).map_err(identity_error)?;
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
        Ok(Configs {
            near: server(Ipv4Addr::LOCALHOST.into()),
            far: server(Ipv4Addr::new(192, 0, 2, 1).into()),
        })
    }
}

pub(crate) fn identity_error(err: impl std::fmt::Display) -> TransportError {
    TransportError::Identity {
        detail: err.to_string(),
    }
}

/// An endpoint on a socket bound to `listen`, which takes connections where it has `configs`.
pub(crate) fn endpoint(
    listen: SocketAddr,
    configs: Option<&Configs>,
    settings: &Settings,
) -> io::Result<Endpoint> {
    let socket = bind_socket(listen, settings.socket_buffer_bytes)?;
    let mut config = EndpointConfig::default();
    // 1472 is what any node accepts, whatever it sends itself.
    config
        .max_udp_payload_size(settings.datagram_bytes.max(1_472))
        .map_err(|err| io::Error::other(err.to_string()))?;
    let server = configs.map(|configs| (*configs.far).clone());
    let runtime = Arc::new(InlineRuntime(Handle::current()));
    Endpoint::new(config, server, socket, runtime)
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

/// A connection to the node at `addr` that holds the key `expect`, once it has accepted this node.
pub(crate) async fn connect(
    endpoint: &Endpoint,
    tls: rustls::ClientConfig,
    seen: &Seen,
    addr: SocketAddr,
    expect: Pin,
    settings: &Settings,
) -> Result<quinn::Connection, TransportError> {
    let failed = |detail: String| TransportError::Connect { addr, detail };
    let crypto = QuicClientConfig::try_from(tls).map_err(identity_error)?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(settings.transport_config(addr.ip())));
    let connecting = endpoint
        .connect_with(config, addr, tls::SERVER_NAME)
        .map_err(|err| failed(err.to_string()))?;

    let explain = |err| explain(err, addr, expect, seen, settings);
    let waited_ms = settings.connect_timeout_ms;
    let conn = match tokio::time::timeout(Duration::from_millis(waited_ms), connecting).await {
        Ok(Ok(conn)) => conn,
        Ok(Err(err)) => return Err(explain(err)),
        Err(_) => return Err(TransportError::Unreachable { addr, waited_ms }),
    };
    let greeting = tokio::time::timeout(settings.handshake_timeout(), await_greeting(&conn));
    match greeting.await {
        Ok(Ok(())) => Ok(conn),
        Ok(Err(err)) => Err(explain(err)),
        Err(_) => Err(TransportError::Timeout {
            what: format!("the handshake with {addr}"),
            waited_ms: settings.handshake_timeout_ms,
        }),
    }
}

/// Turns QUIC's error into one that names what a person can act on.
fn explain(
    err: ConnectionError,
    addr: SocketAddr,
    expected: Pin,
    seen: &Seen,
    settings: &Settings,
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
            detail: if close.error_code == quinn::TransportErrorCode::crypto(ALERT_ACCESS_DENIED) {
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
            waited_ms: settings.idle_timeout_ms,
        },
        _ => TransportError::Connect {
            addr,
            detail: err.to_string(),
        },
    }
}

/// Takes connections until the endpoint closes; new links go to `accepted`.
pub(crate) async fn accept_all(
    endpoint: Endpoint,
    configs: Configs,
    settings: Arc<Settings>,
    accepted: Accepted,
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
        let (settings, accepted) = (settings.clone(), accepted.clone());
        tokio::spawn(async move {
            let remote = incoming.remote_address();
            let handshake = complete(incoming, config, settings.clone());
            match tokio::time::timeout(settings.handshake_timeout(), handshake).await {
                Ok(Ok(Some(link))) => accepted.put(link).await,
                Ok(Ok(None)) => {}
                Ok(Err(detail)) => {
                    tracing::warn!(peer = %remote, %detail, "a connection was not accepted")
                }
                Err(_) => tracing::warn!(peer = %remote, "a handshake was not finished in time"),
            }
            drop(permit);
        });
    }
}

/// A new link; none where the peer only asked whether it would get one.
async fn complete(
    incoming: Incoming,
    config: Arc<ServerConfig>,
    settings: Arc<Settings>,
) -> Result<Option<Link>, String> {
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
    greet(&conn).await.map_err(|err| err.to_string())?;
    let agreed = conn
        .handshake_data()
        .and_then(|data| data.downcast::<HandshakeData>().ok());
    if agreed.is_some_and(|data| data.protocol.as_deref() == Some(PROBE_ALPN)) {
        // It closes; the bound is this handshake's.
        conn.closed().await;
        return Ok(None);
    }
    Ok(Some(Link::new(Connection::Quic(conn), pin, true, settings)))
}
