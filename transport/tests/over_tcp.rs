//! Links over TLS on TCP: what holds over QUIC too, and what is TCP's own.

mod cases;
mod common;

use common::{Runtime, any_port, identity, settings, watchful};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use trefoil_transport::{Identity, Node, Protocol, Settings, StreamKind, TransportError};

const PROTOCOL: Protocol = Protocol::Tcp;

fn bind(runtime: &Runtime, identity: &Identity, settings: &Settings) -> Node {
    let listen = any_port();
    runtime
        .run(async { Node::bind(identity, listen, settings) })
        .unwrap()
}

/// Carries bytes both ways until it is told to swallow them, as a network does that breaks
/// without a word. Its threads end with their connections.
fn relay(to: SocketAddr, swallow: Arc<AtomicBool>) -> SocketAddr {
    let listener = TcpListener::bind(any_port()).unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        while let Ok((near, _)) = listener.accept() {
            let Ok(far) = TcpStream::connect(to) else {
                return;
            };
            for (from, to) in [(&near, &far), (&far, &near)] {
                let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                let swallow = swallow.clone();
                std::thread::spawn(move || {
                    let mut bytes = vec![0; 64 << 10];
                    while let Ok(read @ 1..) = from.read(&mut bytes) {
                        if !swallow.load(Ordering::Relaxed) && to.write_all(&bytes[..read]).is_err()
                        {
                            return;
                        }
                    }
                    if !swallow.load(Ordering::Relaxed) {
                        let _ = to.shutdown(std::net::Shutdown::Write);
                    }
                });
            }
        }
    });
    addr
}

#[test]
fn a_peer_that_falls_silent_is_noticed_at_both_ends_in_time() {
    let runtime = Runtime::new();
    let (a_id, b_id) = (identity(), identity());
    let (a, b) = (
        bind(&runtime, &a_id, &watchful()),
        bind(&runtime, &b_id, &watchful()),
    );
    b.set_allowed(BTreeSet::from([a_id.pin().unwrap()]));
    let silent = Arc::new(AtomicBool::new(false));
    let addr = relay(b.local_addr(), silent.clone());
    runtime.run(async {
        let (to_b, to_a) = tokio::join!(a.connect(addr, b_id.pin().unwrap()), b.accept());
        let (to_b, to_a) = (to_b.unwrap(), to_a.unwrap());
        // The listening side opens one too, through the relay.
        let mut from_b = to_a.open(StreamKind::Control, [3; 32]).await.unwrap();
        from_b.send(&7u8).await.unwrap();
        let (_, _, mut at_a) = to_b.accept().await.unwrap();
        assert_eq!(at_a.recv::<u8>(16).await.unwrap(), Some(7));
        // Signs of life keep a quiet link longer than the limit.
        let idle = Duration::from_millis(watchful().idle_timeout_ms);
        let quiet = tokio::time::timeout(idle + idle / 2, to_b.closed()).await;
        assert!(quiet.is_err(), "{quiet:?}");

        silent.store(true, Ordering::Relaxed);
        let start = Instant::now();
        let (at_a_end, at_b_end, read) =
            tokio::join!(to_b.closed(), to_a.closed(), at_a.recv::<u8>(16));
        assert!(start.elapsed() < idle + Duration::from_secs(2));
        for reason in [at_a_end, at_b_end, read.unwrap_err().to_string()] {
            assert!(reason.contains("no sign of life for 3000 ms"), "{reason}");
        }
    });
}

#[test]
fn where_nothing_listens_and_where_nothing_answers_are_told_apart() {
    let runtime = Runtime::new();
    let quick = Settings {
        handshake_timeout_ms: 300,
        ..settings()
    };
    let a = bind(&runtime, &identity(), &quick);
    let free = TcpListener::bind(any_port()).unwrap();
    let addr = free.local_addr().unwrap();
    let pin = identity().pin().unwrap();
    // The kernel takes the connection, and nobody says a word.
    let err = runtime.run(a.connect(addr, pin)).unwrap_err();
    assert!(matches!(err, TransportError::Timeout { .. }), "{err}");
    assert!(err.to_string().contains(&addr.to_string()), "{err}");
    drop(free);
    let err = runtime.run(a.connect(addr, pin)).unwrap_err();
    assert!(
        matches!(err, TransportError::NothingListens { addr: at } if at == addr),
        "{err}"
    );
}

/// A caller that opens connections and says nothing holds places only for its own address.
#[cfg(target_os = "linux")]
#[test]
fn silent_callers_are_bounded_and_keep_nobody_else_out() {
    let runtime = Runtime::new();
    let (a_id, b_id) = (identity(), identity());
    let (a, b) = (
        bind(&runtime, &a_id, &settings()),
        bind(&runtime, &b_id, &settings()),
    );
    b.set_allowed(BTreeSet::from([a_id.pin().unwrap()]));
    let from: SocketAddr = "127.0.0.2:0".parse().unwrap();
    let silent: Vec<TcpStream> = (0..100)
        .map(|_| {
            let socket =
                socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
            socket.bind(&from.into()).unwrap();
            socket.connect(&b.local_addr().into()).unwrap();
            socket.into()
        })
        .collect();
    let link = runtime.run(a.connect(b.local_addr(), b_id.pin().unwrap()));
    link.unwrap();
    // Those beyond the bound were closed at once.
    let closed = silent.iter().filter(|socket| {
        socket.set_nonblocking(true).unwrap();
        let mut socket: &TcpStream = socket;
        match socket.read(&mut [0]) {
            Ok(read) => read == 0,
            Err(err) => err.kind() == std::io::ErrorKind::ConnectionReset,
        }
    });
    // Of 256 places one network gets an eighth of what is free: 29 leave 227.
    assert_eq!(closed.count(), 100 - 29);
}

/// As behind a firewall that lets no UDP through: the peer is there, and only TCP reaches it.
#[test]
fn what_stands_in_the_way_is_said_for_each_protocol() {
    let runtime = Runtime::new();
    let (a_id, b_id) = (identity(), identity());
    let quick = Settings {
        connect_timeout_ms: 500,
        ..settings()
    };
    let (a, b) = (
        bind(&runtime, &a_id, &quick),
        bind(&runtime, &b_id, &settings()),
    );
    b.set_allowed(BTreeSet::from([a_id.pin().unwrap()]));
    let blocked = relay(b.local_addr(), Arc::default());
    let reach = |addr| runtime.run(a.reach(addr, b_id.pin().unwrap()));
    let found = reach(blocked);
    assert!(
        matches!(found.quic, Err(TransportError::Unreachable { addr, .. }) if addr == blocked),
        "{found:?}"
    );
    assert!(found.tcp.is_ok(), "{found:?}");
    let found = reach(b.local_addr());
    assert!(found.quic.is_ok() && found.tcp.is_ok(), "{found:?}");
}

#[test]
fn what_is_no_handshake_is_refused_and_the_node_goes_on() {
    let runtime = Runtime::new();
    let (a_id, b_id) = (identity(), identity());
    let (a, b) = (
        bind(&runtime, &a_id, &settings()),
        bind(&runtime, &b_id, &settings()),
    );
    b.set_allowed(BTreeSet::from([a_id.pin().unwrap()]));
    let mut browser = TcpStream::connect(b.local_addr()).unwrap();
    browser
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    browser
        .write_all(b"GET / HTTP/1.1\r\nHost: trefoil\r\n\r\n")
        .unwrap();
    let mut answer = Vec::new();
    // TLS's alert, and the end.
    let _ = browser.read_to_end(&mut answer);
    assert!(answer.len() < 64, "{answer:?}");
    runtime
        .run(a.connect(b.local_addr(), b_id.pin().unwrap()))
        .unwrap();
}
