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
const HALF_OPEN_MAX: usize = 256;
/// .. of which one network (an IPv4 address, or 64 bits of an IPv6 address) may have so many, and at
/// most a share of those that are left: some are left for others, however many take what they can.
const HALF_OPEN_OF_ONE: usize = 32;
const SHARE_OF_FREE: usize = 8;
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
    /// Handshakes by network.
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
            let caller = Caller::new(&self, network(remote.ip()), half_open.available_permits());
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
        let left = "the peer left before it was welcomed";
        if probe {
            let said = say(&mut first.send, &Word::Welcome(id)).await;
            return said.map(|()| None).map_err(|()| left.into());
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
        {
            let mut links = self.links();
            links.retain(|_, link| link.strong_count() > 0);
            links.insert(id, Arc::downgrade(&link));
        }
        // After that: the peer's first stream may come before this task goes on.
        let said = link.say(Word::Welcome(id)).await;
        said.map_err(|_| left)?;
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

/// What handshakes are counted by: a whole IPv4 address, and of IPv6 the 64 bits that one customer of
/// a provider has.
fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
        ip => ip,
    }
}

/// How many handshakes one network may have where so many more are possible.
fn bound(free: usize) -> usize {
    free.div_ceil(SHARE_OF_FREE).min(HALF_OPEN_OF_ONE)
}

/// A handshake in progress, counted for its network.
struct Caller {
    listener: Arc<Listener>,
    ip: IpAddr,
}

impl Caller {
    fn new(listener: &Arc<Listener>, ip: IpAddr, free: usize) -> Option<Caller> {
        let mut callers = lock(&listener.callers);
        let count = callers.get(&ip).copied().unwrap_or_default();
        if count >= bound(free) {
            return None;
        }
        callers.insert(ip, count + 1);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_networks_cannot_hold_all_handshakes_and_an_ipv6_customer_is_one() {
        let mut free = HALF_OPEN_MAX;
        let mut networks = 0;
        while free > 0 {
            // Each takes one after the other, as many as it may.
            let mut own = 0;
            while free > 0 && own < bound(free) {
                (own, free) = (own + 1, free - 1);
            }
            assert!(own > 0, "nobody is shut out while there is room");
            networks += 1;
        }
        assert!(networks >= 20, "{networks}");
        let of = |ip: &str| network(ip.parse().unwrap());
        assert_eq!(of("2001:db8:1:2:3::4"), of("2001:db8:1:2:ffff::1"));
        assert_ne!(of("2001:db8:1:2::4"), of("2001:db8:1:3::4"));
        assert_eq!(of("::ffff:10.0.0.1"), of("10.0.0.1"));
        assert_ne!(of("10.0.0.1"), of("10.0.0.2"));
    }
}
