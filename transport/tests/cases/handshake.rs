//! Who gets in, and what a refused node is told.

use crate::common::{Runtime, any_port, identity, settings};
use std::collections::BTreeSet;
use trefoil_transport::{Node, StreamKind, TransportError};

fn bind(runtime: &Runtime, identity: &trefoil_transport::Identity) -> Node {
    runtime
        .run(async { Node::bind(identity, any_port(), &settings()) })
        .unwrap()
}

#[test]
fn two_pinned_nodes_exchange_messages_and_close_in_an_orderly_way() {
    let runtime = Runtime::new();
    let (a_id, b_id) = (identity(), identity());
    let (a, b) = (bind(&runtime, &a_id), bind(&runtime, &b_id));
    b.set_allowed(BTreeSet::from([a_id.pin().unwrap()]));
    runtime.run(async {
        let (to_b, to_a) = tokio::join!(a.connect(b.local_addr(), b_id.pin().unwrap()), b.accept());
        let (to_b, to_a) = (to_b.unwrap(), to_a.unwrap());
        assert_eq!(to_b.peer(), b_id.pin().unwrap());
        assert_eq!(to_a.peer(), a_id.pin().unwrap());

        let mut asking = to_b.open(StreamKind::Control, [9; 32]).await.unwrap();
        asking.send(&("question".to_owned(), 42u64)).await.unwrap();
        let (kind, session, mut answering) = to_a.accept().await.unwrap();
        assert_eq!((kind, session), (StreamKind::Control, [9; 32]));
        let question: (String, u64) = answering.recv(1 << 10).await.unwrap().unwrap();
        assert_eq!(question, ("question".to_owned(), 42));
        answering.send_bytes(vec![5; 3 << 20].into()).await.unwrap();
        let answer = asking.recv_bytes(4 << 20).await.unwrap().unwrap();
        assert!(answer.len() == 3 << 20 && answer.iter().all(|byte| *byte == 5));

        answering.send(&"too long").await.unwrap();
        match asking.recv::<String>(4).await {
            Err(TransportError::TooLong { len: 9, max: 4, .. }) => {}
            other => panic!("{other:?}"),
        }

        assert!(to_b.stats().sent_bytes > 0 && to_b.stats().received_bytes > 3 << 20);
        let (_, reason) = tokio::join!(a.close("maintenance tonight"), to_a.closed());
        assert!(reason.contains("maintenance tonight"), "{reason}");
        assert!(a.accept().await.is_none());
    });
}

#[test]
fn a_wrong_pin_is_refused_naming_address_expected_and_found() {
    let runtime = Runtime::new();
    let (a_id, b_id, other) = (identity(), identity(), identity());
    let (a, b) = (bind(&runtime, &a_id), bind(&runtime, &b_id));
    b.set_allowed(BTreeSet::from([a_id.pin().unwrap()]));
    let (addr, expect, is) = (b.local_addr(), other.pin().unwrap(), b_id.pin().unwrap());
    let err = runtime.run(a.connect(addr, expect)).unwrap_err();
    match err {
        TransportError::WrongCertificate {
            addr: at,
            expected,
            found,
        } => {
            assert_eq!((at, expected, found), (addr, expect, is));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_client_that_is_not_allowed_is_refused_and_told_so_until_it_is_allowed() {
    let runtime = Runtime::new();
    let (a_id, b_id) = (identity(), identity());
    let (a, b) = (bind(&runtime, &a_id), bind(&runtime, &b_id));
    let (addr, pin) = (b.local_addr(), b_id.pin().unwrap());
    let err = runtime.run(a.connect(addr, pin)).unwrap_err();
    match &err {
        TransportError::Refused { addr: at, detail } => {
            assert!(*at == addr && detail.contains("not allowed"), "{err}");
        }
        other => panic!("{other:?}"),
    }

    b.set_allowed(BTreeSet::from([a_id.pin().unwrap()]));
    let link = runtime.run(a.connect(addr, pin)).unwrap();
    b.set_allowed(BTreeSet::new());
    let reason = runtime.run(link.closed());
    assert!(reason.contains("no longer allowed"), "{reason}");
}

#[test]
fn a_port_in_use_is_a_clear_error_naming_the_address() {
    let runtime = Runtime::new();
    let a = bind(&runtime, &identity());
    let err = runtime
        .run(async { Node::bind(&identity(), a.local_addr(), &settings()) })
        .unwrap_err();
    assert!(matches!(err, TransportError::AddressInUse { addr } if addr == a.local_addr()));
    assert!(err.to_string().contains("in use"), "{err}");
}

#[test]
fn a_message_sent_just_before_the_close_arrives() {
    let runtime = Runtime::new();
    let (a_id, b_id) = (identity(), identity());
    let (a, b) = (bind(&runtime, &a_id), bind(&runtime, &b_id));
    b.set_allowed(BTreeSet::from([a_id.pin().unwrap()]));
    runtime.run(async {
        let (to_b, to_a) = tokio::join!(a.connect(b.local_addr(), b_id.pin().unwrap()), b.accept());
        let (to_b, to_a) = (to_b.unwrap(), to_a.unwrap());
        let mut last = to_b.open(StreamKind::Control, [0; 32]).await.unwrap();
        last.send(&"goodbye").await.unwrap();
        last.finish().await.unwrap();
        a.close("done").await;
        let (_, _, mut stream) = to_a.accept().await.unwrap();
        assert_eq!(
            stream.recv::<String>(64).await.unwrap().as_deref(),
            Some("goodbye")
        );
        assert!(stream.recv::<String>(64).await.unwrap().is_none());
    });
}
