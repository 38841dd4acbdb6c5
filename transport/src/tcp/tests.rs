//! What joins a link, and what ends one.

use super::*;
use crate::carrier::ReadError;
use crate::tls::{self, ALPN, Seen};
use crate::{Identity, Node, Protocol};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

fn identity() -> Identity {
    let made = rcgen::generate_simple_self_signed(vec!["node".into()]).unwrap();
    Identity {
        cert_der: made.cert.der().to_vec(),
        key_der: made.signing_key.serialize_der(),
    }
}

fn listening(allowed: &[&Identity]) -> (Node, Pin) {
    let identity = identity();
    let listen = (Ipv4Addr::LOCALHOST, 0).into();
    let node = Node::bind(&identity, listen, &Settings::default()).unwrap();
    node.set_allowed(
        allowed
            .iter()
            .map(|id| id.pin().unwrap())
            .collect::<BTreeSet<_>>(),
    );
    (node, identity.pin().unwrap())
}

fn dialler(me: &Identity, node: &Node, pin: Pin) -> Dialler {
    let (key, seen) = (
        tls::certified_key(me, &tls::provider()).unwrap(),
        Seen::default(),
    );
    let mut config = tls::client_config(key, pin, seen.clone()).unwrap();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let settings = Arc::new(Settings::default());
    Dialler::new(node.local_addr(), pin, seen, config, settings)
}

/// Whether the connection ends without a word.
async fn refused(pipe: Result<Arc<Pipe>, String>) -> bool {
    let Ok(pipe) = pipe else {
        return true;
    };
    let (_send, mut recv) = pipe.split(None, &Handle::current());
    let mut chunks = [Bytes::new()];
    let read = recv.read_chunks(&mut chunks);
    let read = tokio::time::timeout(Duration::from_secs(20), read).await;
    matches!(read, Ok(Err(ReadError::Broken(_)) | Ok(None)))
}

#[tokio::test]
async fn a_stream_joins_the_living_link_of_its_own_key_and_no_other() {
    let (a, other) = (identity(), identity());
    let (node, pin) = listening(&[&a, &other]);
    let link = dialler(&a, &node, pin).link().await.unwrap();
    let accepted = node.accept().await.unwrap();
    assert_eq!(accepted.protocol(), Protocol::Tcp);

    // With the right id and another key that may connect here.
    let stranger = dialler(&other, &node, pin);
    assert!(refused(stranger.stream(&link.id, 0).await).await);
    // With the right key: an id that was never drawn, and a request that was never made.
    let mine = dialler(&a, &node, pin);
    assert!(refused(mine.stream(&[9; 24], 0).await).await);
    assert!(refused(mine.stream(&link.id, 77).await).await);
    // The link itself is unharmed.
    let (mut send, _recv) = link.open().await.unwrap();
    let header = crate::stream::encode_header(1, &[4; 32]);
    let mut parts = [Bytes::copy_from_slice(&header)];
    let sent = send.write_all_chunks(&mut parts);
    sent.await.unwrap();
    assert_eq!(accepted.accept().await.unwrap().1, [4; 32]);

    // A stream of an earlier link does not join a later one, nor the end of its own.
    let earlier = link.id;
    link.close("over");
    accepted.closed().await;
    let later = dialler(&a, &node, pin).link().await.unwrap();
    assert_ne!(later.id, earlier);
    drop(accepted);
    assert!(refused(mine.stream(&earlier, 0).await).await);
}

#[tokio::test]
async fn words_that_no_peer_says_end_the_link() {
    let a = identity();
    let (node, pin) = listening(&[&a]);
    let words: [&[u8]; 3] = [
        // A length beyond any word, a word of no kind, and a request that only a listener makes.
        &u32::MAX.to_le_bytes(),
        &[1, 0, 0, 0, 250],
        &[2, 0, 0, 0, 3, 1],
    ];
    for word in words {
        let tls = dialler(&a, &node, pin).first().await.unwrap();
        let accepted = node.accept().await.unwrap();
        let (mut send, _recv) = Pipe::new(tls).split(None, &Handle::current());
        let mut parts = [Bytes::copy_from_slice(word)];
        let sent = send.write_all_chunks(&mut parts);
        sent.await.unwrap();
        let closed = tokio::time::timeout(Duration::from_secs(5), accepted.closed());
        let reason = closed.await.unwrap();
        assert!(reason.contains("the peer"), "{reason}");
    }
}
