//! Nodes that only dial out, and the question whether a node could connect.

use crate::common::{Runtime, any_port, identity, settings};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;
use trefoil_transport::{Node, StreamKind, TransportError};

#[test]
fn a_node_that_only_dials_out_opens_streams_and_is_reached_by_streams() {
    let runtime = Runtime::new();
    let (a_id, b_id) = (identity(), identity());
    let a = runtime.run(async { Node::dial_only(&a_id, Ipv4Addr::LOCALHOST.into(), &settings()) });
    let b = runtime.run(async { Node::bind(&b_id, any_port(), &settings()) });
    let (a, b) = (a.unwrap(), b.unwrap());
    b.set_allowed(BTreeSet::from([a_id.pin().unwrap()]));
    runtime.run(async {
        let (to_b, to_a) = tokio::join!(a.connect(b.local_addr(), b_id.pin().unwrap()), b.accept());
        let (to_b, to_a) = (to_b.unwrap(), to_a.unwrap());
        for (from, to) in [(&to_b, &to_a), (&to_a, &to_b)] {
            for number in 0..20u8 {
                let mut asking = from.open(StreamKind::Control, [number; 32]).await.unwrap();
                asking.send(&number).await.unwrap();
                let (_, session, mut answering) = to.accept().await.unwrap();
                assert_eq!(session, [number; 32]);
                assert_eq!(answering.recv::<u8>(16).await.unwrap(), Some(number));
            }
        }
        // Nobody can be taken in, and the node does not take that for its end.
        let nobody = tokio::time::timeout(Duration::from_millis(50), a.accept()).await;
        assert!(nobody.is_err());
        a.close("done").await;
        assert!(a.accept().await.is_none());
        assert!(to_a.closed().await.contains("done"));
    });
}

#[test]
fn a_probe_says_whether_a_node_would_get_in_and_makes_no_link() {
    let runtime = Runtime::new();
    let (a_id, b_id) = (identity(), identity());
    let bind = |identity| {
        runtime
            .run(async { Node::bind(identity, any_port(), &settings()) })
            .unwrap()
    };
    let (a, b) = (bind(&a_id), bind(&b_id));
    let (addr, pin) = (b.local_addr(), b_id.pin().unwrap());
    let probe = |pin| runtime.run(a.probe(crate::PROTOCOL, addr, pin));
    let refused = probe(pin).unwrap_err();
    assert!(
        matches!(&refused, TransportError::Refused { detail, .. } if detail.contains("not allowed")),
        "{refused}"
    );
    b.set_allowed(BTreeSet::from([a_id.pin().unwrap()]));
    let wrong = probe(identity().pin().unwrap()).unwrap_err();
    assert!(
        matches!(wrong, TransportError::WrongCertificate { .. }),
        "{wrong}"
    );
    assert!(probe(pin).unwrap() < Duration::from_secs(10));
    // What comes out of `accept` is the link alone.
    runtime.run(async {
        let link = a.connect(addr, pin).await.unwrap();
        let accepted = b.accept().await.unwrap();
        let mut stream = link.open(StreamKind::Control, [5; 32]).await.unwrap();
        stream.send(&5u8).await.unwrap();
        let (_, session, _) = accepted.accept().await.unwrap();
        assert_eq!(session, [5; 32]);
        let more = tokio::time::timeout(Duration::from_millis(50), b.accept()).await;
        assert!(more.is_err());
    });
}
