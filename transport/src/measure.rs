//! How fast QUIC itself is on this machine: one bare stream between two nodes on loopback, each
//! with a runtime and a thread of its own. What a session's rounds are held against.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::{Identity, Node, Pin, Settings, StreamKind, TransportError};

/// What is written at once.
const PIECE_BYTES: usize = 1 << 20;
const SESSION: [u8; 32] = [1; 32];

/// Bytes a second of one stream in one direction, measured for about `duration`; no frames, no
/// queues, no protocol thread.
///
/// # Errors
/// The two identities, sockets and connections; a thread that cannot be started.
pub fn stream_goodput(
    identities: &[Identity; 2],
    settings: &Settings,
    duration: Duration,
) -> Result<f64, TransportError> {
    let failed = |detail: String| TransportError::Session { detail };
    let [sender, receiver] = identities.clone();
    let [from, to] = [sender.pin()?, receiver.pin()?];
    let (address, listening) = mpsc::channel();
    let far = settings.clone();
    let thread = std::thread::Builder::new().name("goodput".into());
    let receiving = thread
        .spawn(move || receive(&receiver, &far, from, &address))
        .map_err(|err| failed(format!("a thread cannot be started: {err}")))?;
    let sent = match listening.recv() {
        Ok(address) => runtime()?.block_on(send(&sender, settings, address, to, duration)),
        // The receiver has ended with the reason.
        Err(_) => Ok(()),
    };
    let received = receiving
        .join()
        .map_err(|_| failed("the receiver failed".into()))?;
    sent.and(received)
}

fn runtime() -> Result<tokio::runtime::Runtime, TransportError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|err| TransportError::Session {
            detail: format!("a runtime cannot be made: {err}"),
        })
}

async fn send(
    identity: &Identity,
    settings: &Settings,
    address: SocketAddr,
    to: Pin,
    duration: Duration,
) -> Result<(), TransportError> {
    let node = Node::bind(identity, (Ipv4Addr::LOCALHOST, 0).into(), settings)?;
    let link = node.connect(address, to).await?;
    let mut stream = link.open_raw(StreamKind::Material, SESSION).await?;
    let piece = Bytes::from(vec![0x5a; PIECE_BYTES]);
    let start = Instant::now();
    while start.elapsed() < duration {
        let written = stream.send.write_all_chunks(&mut [piece.clone()]).await;
        written.map_err(|err| link.closed_error(link.describe_write(&err)))?;
    }
    if stream.send.finish() {
        // The receiver counts until here; a failure shows there.
        let _ = stream.send.stopped().await;
    }
    node.close("measured").await;
    Ok(())
}

fn receive(
    identity: &Identity,
    settings: &Settings,
    from: Pin,
    address: &mpsc::Sender<SocketAddr>,
) -> Result<f64, TransportError> {
    runtime()?.block_on(async {
        let node = Node::bind(identity, (Ipv4Addr::LOCALHOST, 0).into(), settings)?;
        node.set_allowed(BTreeSet::from([from]));
        // An error means that the sender is gone; the wait below ends then.
        let _ = address.send(node.local_addr());
        let waited = Duration::from_millis(settings.connect_timeout_ms);
        let timeout = || TransportError::Timeout {
            what: "the other end of the measurement".into(),
            waited_ms: settings.connect_timeout_ms,
        };
        let link = tokio::time::timeout(waited, node.accept()).await;
        let link = link.ok().flatten().ok_or_else(timeout)?;
        let mut stream = link.claim(StreamKind::Material, SESSION).await?;
        let start = Instant::now();
        let bytes = stream.reader.discard().await;
        let bytes = bytes.map_err(|err| link.closed_error(link.describe_read(&err)))?;
        let seconds = start.elapsed().as_secs_f64();
        node.close("measured").await;
        Ok(bytes as f64 / seconds)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_stream_has_a_rate() {
        let identities = [0; 2].map(|_| {
            let made = rcgen::generate_simple_self_signed(vec!["node".into()]).unwrap();
            Identity {
                cert_der: made.cert.der().to_vec(),
                key_der: made.signing_key.serialize_der(),
            }
        });
        let settings = Settings::default();
        let rate = stream_goodput(&identities, &settings, Duration::from_millis(50)).unwrap();
        assert!(rate > 1e6, "{rate}");
    }
}
