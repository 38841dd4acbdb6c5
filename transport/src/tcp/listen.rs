//! The listening side: bounded handshakes, and connections on their way to their links.

use super::pipe::{Pipe, Socket, Tls, WireBytes};
use super::{First, LinkId, Made, TAG_LINK, TAG_STREAM, TcpLink, Word, say};
use crate::carrier::Connection;
use crate::node::Accepted;
use crate::stream::{HEADER_BYTES, decode_header};
use crate::tls::PROBE_ALPN;
use crate::{Link, Pin, Settings};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

/// Handshakes in progress at the same time.
const HALF_OPEN_MAX: usize = 64;
/// .. of which one address may have so many.
const HALF_OPEN_OF_ONE: usize = 32;
/// Connections of one public key at the same time, over all its links.
const CONNECTIONS_OF_ONE: usize = 512;
/// Connections that the kernel keeps until they are taken.
const BACKLOG: i32 = 128;
/// How long the listener pauses where the operating system gives no more connections.
const PAUSE: Duration = Duration::from_millis(50);
/// How long, and how much, is read from who was refused, so that it hears why.
const REFUSED_READ: Duration = Duration::from_secs(1);
const REFUSED_READ_BYTES: u64 = 64 << 10;

/// What the handshakes of a listener share.
pub(crate) struct Listener {
    tls: Arc<rustls::ServerConfig>,
    settings: Arc<Settings>,
    /// Links that others have made to this node.
    links: Mutex<HashMap<LinkId, Weak<TcpLink>>>,
    /// Handshakes by address.
    callers: Mutex<HashMap<IpAddr, usize>>,
}

/// A socket that listens, so far without a runtime.
pub(crate) fn bind(addr: SocketAddr) -> io::Result<std::net::TcpListener> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    if addr.is_ipv6() {
        // Serves IPv4 too where the system allows it.
        let _ = socket.set_only_v6(false);
    }
    // A restart does not wait for the connections of the process before. Elsewhere than on Unix
    // the option would let two programs share the port.
    #[cfg(unix)]
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

impl Listener {
    pub(crate) fn new(tls: rustls::ServerConfig, settings: Arc<Settings>) -> Listener {
        Listener {
            tls: Arc::new(tls),
            settings,
            links: Mutex::default(),
            callers: Mutex::default(),
        }
    }

    /// Takes connections for ever; new links go to `accepted`.
    pub(crate) async fn accept_all(self: Arc<Self>, socket: TcpListener, accepted: Accepted) {
        let half_open = Arc::new(Semaphore::new(HALF_OPEN_MAX));
        loop {
            let (tcp, remote) = match socket.accept().await {
                Ok(taken) => taken,
                Err(err) => {
                    tracing::debug!(%err, "no connection could be taken");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let caller = Caller::new(&self, remote.ip().to_canonical());
            let (Ok(permit), Some(caller)) = (half_open.clone().try_acquire_owned(), caller) else {
                continue;
            };
            let (listener, accepted) = (self.clone(), accepted.clone());
            tokio::spawn(async move {
                let waited = listener.settings.handshake_timeout();
                match tokio::time::timeout(waited, listener.take(tcp, remote)).await {
                    Ok(Ok(Some((link, pin)))) => {
                        let settings = listener.settings.clone();
                        let link = Link::new(Connection::Tcp(link), pin, true, settings);
                        accepted.put(link).await;
                    }
                    Ok(Ok(None)) => {}
                    Ok(Err(detail)) => {
                        tracing::warn!(peer = %remote, %detail, "a connection was not accepted");
                    }
                    Err(_) => {
                        tracing::warn!(peer = %remote, "a handshake was not finished in time");
                    }
                }
                drop((permit, caller));
            });
        }
    }

    /// A new link, or none where the connection belongs to one that is there.
    async fn take(
        &self,
        tcp: TcpStream,
        remote: SocketAddr,
    ) -> Result<Option<(Arc<TcpLink>, Pin)>, String> {
        let bytes = Arc::<WireBytes>::default();
        let socket = Socket::new(tcp, bytes.clone()).map_err(|err| err.to_string())?;
        let accepting = TlsAcceptor::from(self.tls.clone()).accept(socket);
        let tls = match accepting.into_fallible().await {
            Ok(tls) => tls,
            Err((err, socket)) => {
                let_hear(socket).await;
                return Err(err.to_string());
            }
        };
        let state = tls.get_ref().1;
        let certs = state.peer_certificates();
        let cert = certs.and_then(|certs| certs.first());
        let cert = cert.ok_or("the peer showed no certificate")?;
        let pin = Pin::of_certificate(cert).map_err(|err| err.to_string())?;
        let probe = state.alpn_protocol() == Some(PROBE_ALPN);
        let mut tls = Tls::from(tls);
        let mut header = [0; HEADER_BYTES];
        let read = tls.read_exact(&mut header).await;
        read.map_err(|err| format!("no word what the connection is for: {err}"))?;
        match decode_header(&header) {
            Ok((TAG_LINK, _)) => self.take_link(tls, pin, remote, bytes, probe).await,
            Ok((TAG_STREAM, body)) if !probe => self.take_stream(tls, pin, &body).map(|()| None),
            Ok((tag, _)) => Err(format!("unknown kind of connection {tag}")),
            Err(detail) => {
                let reason = Word::Close(detail.clone());
                // The peer may have gone; it is refused anyway.
                let _ = say(&mut First::new(tls).send, &reason).await;
                Err(detail)
            }
        }
    }

    async fn take_link(
        &self,
        tls: Tls,
        pin: Pin,
        remote: SocketAddr,
        bytes: Arc<WireBytes>,
        probe: bool,
    ) -> Result<Option<(Arc<TcpLink>, Pin)>, String> {
        let mut first = First::new(tls);
        if self.connections(pin) >= CONNECTIONS_OF_ONE {
            let reason = Word::Close("this public key has too many connections here".into());
            // The peer may have gone; it is refused anyway.
            let _ = say(&mut first.send, &reason).await;
            return Err(format!("{pin} has too many connections"));
        }
        let mut id = LinkId::default();
        let random = self.tls.crypto_provider().secure_random;
        random
            .fill(&mut id)
            .map_err(|_| "the operating system gives no random bytes")?;
        let said = say(&mut first.send, &Word::Welcome(id)).await;
        said.map_err(|()| "the peer left before it was welcomed")?;
        if probe {
            return Ok(None);
        }
        let made = Made {
            id,
            peer: pin,
            remote,
            dialler: None,
            settings: self.settings.clone(),
            rtt: Duration::ZERO,
            bytes,
        };
        let link = TcpLink::start(made, first);
        let mut links = self.links();
        links.retain(|_, link| link.strong_count() > 0);
        links.insert(id, Arc::downgrade(&link));
        Ok(Some((link, pin)))
    }

    fn take_stream(&self, tls: Tls, pin: Pin, body: &[u8; 32]) -> Result<(), String> {
        let (mut id, mut number) = (LinkId::default(), [0; 8]);
        id.copy_from_slice(&body[..24]);
        number.copy_from_slice(&body[24..]);
        let link = self.links().get(&id).and_then(Weak::upgrade);
        let link = link.filter(|link| link.peer == pin);
        let link = link.ok_or("a stream for a link that does not exist (any more)")?;
        if self.connections(pin) >= CONNECTIONS_OF_ONE {
            return Err(format!("{pin} has too many connections"));
        }
        link.take_stream(Pipe::new(tls), u64::from_le_bytes(number))?;
        Ok(())
    }

    fn links(&self) -> MutexGuard<'_, HashMap<LinkId, Weak<TcpLink>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many connections a key has on this node.
    fn connections(&self, pin: Pin) -> usize {
        let links: Vec<_> = self.links().values().filter_map(Weak::upgrade).collect();
        let its = links.iter().filter(|link| link.peer == pin);
        its.map(|link| 1 + link.streams()).sum()
    }
}

/// A handshake in progress, counted for its address.
struct Caller {
    listener: Arc<Listener>,
    ip: IpAddr,
}

impl Caller {
    fn new(listener: &Arc<Listener>, ip: IpAddr) -> Option<Caller> {
        let mut callers = lock(&listener.callers);
        let count = callers.entry(ip).or_default();
        if *count >= HALF_OPEN_OF_ONE {
            return None;
        }
        *count += 1;
        Some(Caller {
            listener: listener.clone(),
            ip,
        })
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let mut callers = lock(&self.listener.callers);
        if let Some(count) = callers.get_mut(&self.ip) {
            *count -= 1;
            if *count == 0 {
                callers.remove(&self.ip);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A socket that is closed with something unread takes TLS's alert with it.
async fn let_hear(socket: impl AsyncRead + Unpin) {
    let (mut rest, mut nowhere) = (socket.take(REFUSED_READ_BYTES), tokio::io::sink());
    let reading = tokio::io::copy(&mut rest, &mut nowhere);
    let _ = tokio::time::timeout(REFUSED_READ, reading).await;
}
