//! The dialling side: a TCP connection, its TLS handshake, and what it is for.

use super::pipe::{Pipe, Socket, Tls, WireBytes, describe};
use super::{First, LinkId, Made, TAG_LINK, TAG_STREAM, TcpLink, Word, next_word};
use crate::stream::{HEADER_BYTES, encode_header};
use crate::tls::{self, Seen};
use crate::{Pin, Settings, TransportError};
use rustls::AlertDescription;
use rustls::pki_types::ServerName;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Makes a link's connections.
#[derive(Clone)]
pub(crate) struct Dialler {
    addr: SocketAddr,
    expect: Pin,
    seen: Seen,
    tls: Arc<rustls::ClientConfig>,
    settings: Arc<Settings>,
    bytes: Arc<WireBytes>,
}

impl Dialler {
    /// `tls` expects the key `expect` and notes what it has seen in `seen`.
    pub(crate) fn new(
        addr: SocketAddr,
        expect: Pin,
        seen: Seen,
        tls: rustls::ClientConfig,
        settings: Arc<Settings>,
    ) -> Dialler {
        Dialler {
            addr,
            expect,
            seen,
            tls: Arc::new(tls),
            settings,
            bytes: Arc::default(),
        }
    }

    /// Connects, and waits until the other side has accepted this node.
    pub(crate) async fn link(self) -> Result<Arc<TcpLink>, TransportError> {
        let start = Instant::now();
        let (first, id) = self.welcomed().await?;
        let made = Made {
            id,
            peer: self.expect,
            remote: self.addr,
            settings: self.settings.clone(),
            // One for the connection, one for TLS, and part of one for the welcome.
            rtt: start.elapsed() / 3,
            bytes: self.bytes.clone(),
            dialler: Some(self),
        };
        Ok(TcpLink::start(made, first))
    }

    /// Connects, waits until the other side has accepted this node, and goes.
    pub(crate) async fn probe(self) -> Result<(), TransportError> {
        let (mut first, _) = self.welcomed().await?;
        first.send.finish();
        // Its end; what it says meanwhile does not matter.
        let end = tokio::time::timeout(self.settings.close_timeout(), first.reader.discard());
        let _ = end.await;
        Ok(())
    }

    async fn welcomed(&self) -> Result<(First, LinkId), TransportError> {
        let mut first = First::new(self.first().await?);
        let welcome = self.in_time(async {
            match next_word(&mut first.reader).await {
                Ok(Some(Word::Welcome(id))) => Ok(id),
                Ok(Some(Word::Close(detail))) => Err(self.refused(detail)),
                Ok(Some(_)) => Err(self.refused("it did not answer as it should".into())),
                Ok(None) => Err(self.refused("it ended the connection".into())),
                // TLS lets a client begin before the server has looked at its key.
                Err(detail) if detail.contains(ACCESS_DENIED) => Err(self.denied()),
                Err(detail) => Err(self.refused(detail)),
            }
        });
        let id = welcome.await?;
        Ok((first, id))
    }

    /// A link's first connection, before the other side has said anything.
    pub(super) async fn first(&self) -> Result<Tls, TransportError> {
        self.connect(encode_header(TAG_LINK, &[0; 32])).await
    }

    /// A connection for a stream of a link: a new one, or the one with this number that the other
    /// side asked for.
    pub(super) async fn stream(&self, id: &LinkId, number: u64) -> Result<Arc<Pipe>, String> {
        let mut body = [0; 32];
        body[..id.len()].copy_from_slice(id);
        body[id.len()..].copy_from_slice(&number.to_le_bytes());
        let tls = self.connect(encode_header(TAG_STREAM, &body)).await;
        tls.map(Pipe::new).map_err(|err| err.to_string())
    }

    async fn connect(&self, header: [u8; HEADER_BYTES]) -> Result<Tls, TransportError> {
        let addr = self.addr;
        let waited_ms = self.settings.connect_timeout_ms;
        let connecting = TcpStream::connect(addr);
        let connected = tokio::time::timeout(Duration::from_millis(waited_ms), connecting).await;
        let tcp = match connected {
            Ok(Ok(tcp)) => tcp,
            Ok(Err(err)) if err.kind() == io::ErrorKind::ConnectionRefused => {
                return Err(TransportError::NothingListens { addr });
            }
            Ok(Err(err)) if err.kind() == io::ErrorKind::TimedOut => {
                return Err(TransportError::Unreachable { addr, waited_ms });
            }
            Ok(Err(err)) => return Err(self.failed(err.to_string())),
            Err(_) => return Err(TransportError::Unreachable { addr, waited_ms }),
        };
        let socket = Socket::new(tcp, self.bytes.clone());
        let socket = socket.map_err(|err| self.failed(err.to_string()))?;
        let name =
            ServerName::try_from(tls::SERVER_NAME).map_err(|err| self.failed(err.to_string()))?;
        self.in_time(async {
            let connector = TlsConnector::from(self.tls.clone());
            let shaken = connector.connect(name, socket).await;
            let mut tls = shaken.map_err(|err| self.explain(&err))?;
            let said = async {
                tls.write_all(&header).await?;
                tls.flush().await
            };
            said.await.map_err(|err| self.explain(&err))?;
            Ok(tls.into())
        })
        .await
    }

    async fn in_time<T>(
        &self,
        handshake: impl Future<Output = Result<T, TransportError>>,
    ) -> Result<T, TransportError> {
        let waited = self.settings.handshake_timeout();
        let done = tokio::time::timeout(waited, handshake).await;
        done.unwrap_or_else(|_| {
            Err(TransportError::Timeout {
                what: format!("the handshake with {}", self.addr),
                waited_ms: self.settings.handshake_timeout_ms,
            })
        })
    }

    fn failed(&self, detail: String) -> TransportError {
        TransportError::Connect {
            addr: self.addr,
            detail,
        }
    }

    fn refused(&self, detail: String) -> TransportError {
        TransportError::Refused {
            addr: self.addr,
            detail,
        }
    }

    fn denied(&self) -> TransportError {
        self.refused("this node's public key is not allowed there".into())
    }

    /// Turns the failure of a handshake into one that names what a person can act on.
    fn explain(&self, err: &io::Error) -> TransportError {
        let (addr, expected) = (self.addr, self.expect);
        let tls = err
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match (tls, self.seen.pin()) {
            (Some(rustls::Error::AlertReceived(AlertDescription::AccessDenied)), _) => {
                self.denied()
            }
            (Some(rustls::Error::AlertReceived(alert)), _) => self.refused(format!("{alert:?}")),
            (Some(_), Some(found)) if found != expected => TransportError::WrongCertificate {
                addr,
                expected,
                found,
            },
            // The certificate was the right one, so what failed is the proof of its key.
            (Some(rustls::Error::InvalidCertificate(_)), Some(_)) => {
                TransportError::BadSignature { addr }
            }
            (Some(err), _) => self.failed(err.to_string()),
            (None, _) => self.failed(describe(err)),
        }
    }
}

/// How rustls says what the check of the key answers with.
const ACCESS_DENIED: &str = "AccessDenied";
