//! The relay with real sockets. Time is only bounded from below (and by a
//! generous time-out), because a busy machine may always be late; the exact
//! model is tested in simulated time beside it.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use trefoil_cluster::{Ends, LaneStats, Relays};

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    socket
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes[..4].try_into().unwrap())
}

fn stats(relays: &Relays, from: &str, to: &str) -> LaneStats {
    relays.stats()[&(from.to_owned(), to.to_owned())]
}

/// Sends one datagram there and waits for it to arrive; returns its source.
fn carry(from: &UdpSocket, to: SocketAddr, at: &UdpSocket, tag: u32) -> SocketAddr {
    from.send_to(&tag.to_le_bytes(), to).unwrap();
    let mut buffer = [0; 2048];
    let (len, source) = at.recv_from(&mut buffer).unwrap();
    assert_eq!((len, number(&buffer)), (4, tag));
    source
}

#[test]
fn a_round_trip_takes_at_least_the_links_round_trip() {
    let relays = Relays::start(40.0, 300.0).unwrap();
    let (dialler, listener) = (socket(), socket());
    let relay = relays
        .add("p0", "p1", listener.local_addr().unwrap())
        .unwrap();
    let began = Instant::now();
    let seen = carry(&dialler, relay, &listener, 1);
    assert_ne!(
        seen,
        dialler.local_addr().unwrap(),
        "the relay is in between"
    );
    let back = carry(&listener, seen, &dialler, 2);
    assert_eq!(
        back, relay,
        "replies come from the address that was dialled"
    );
    assert!(began.elapsed() >= Duration::from_millis(40));
}

#[test]
fn many_datagrams_arrive_whole_in_order_and_not_faster_than_the_rate() {
    // 400 datagrams of 1,250 bytes at 40 Mbit/s: 4,000 of them a second.
    let relays = Relays::start(0.0, 40.0).unwrap();
    let (dialler, listener) = (socket(), socket());
    let relay = relays
        .add("p0", "p1", listener.local_addr().unwrap())
        .unwrap();
    let began = Instant::now();
    let (mut sent, mut received) = (0u32, 0u32);
    while received < 400 {
        // Few in flight, so that no socket buffer of any system overflows.
        while sent < 400 && sent - received < 40 {
            let mut datagram = vec![sent as u8; 1250];
            datagram[..4].copy_from_slice(&sent.to_le_bytes());
            dialler.send_to(&datagram, relay).unwrap();
            sent += 1;
        }
        let mut buffer = [0; 2048];
        let len = listener.recv(&mut buffer).unwrap();
        assert_eq!((len, number(&buffer)), (1250, received));
        assert!(buffer[4..1250].iter().all(|byte| *byte == received as u8));
        received += 1;
    }
    assert!(began.elapsed() >= Duration::from_millis(100));
    let lane = stats(&relays, "p0", "p1");
    assert_eq!((lane.forwarded, lane.forwarded_bytes), (400, 500_000));
}

#[test]
fn every_dialling_address_gets_its_own_replies() {
    let relays = Relays::start(1.0, 1000.0).unwrap();
    let listener = socket();
    let relay = relays
        .add("hospital", "p1", listener.local_addr().unwrap())
        .unwrap();
    let diallers: Vec<UdpSocket> = (0..5).map(|_| socket()).collect();
    let seen: Vec<SocketAddr> = (0..5)
        .map(|at| carry(&diallers[at], relay, &listener, at as u32))
        .collect();
    for at in (0..5).rev() {
        carry(&listener, seen[at], &diallers[at], 100 + at as u32);
    }
    let lane = stats(&relays, "p1", "hospital");
    assert_eq!(lane.forwarded, 5);
}

#[test]
fn a_cut_link_carries_nothing_until_it_is_restored_and_others_go_on() {
    let relays = Relays::start(1.0, 1000.0).unwrap();
    let (dialler, near, far) = (socket(), socket(), socket());
    let to_near = relays.add("p0", "p1", near.local_addr().unwrap()).unwrap();
    let to_far = relays.add("p0", "p2", far.local_addr().unwrap()).unwrap();
    carry(&dialler, to_near, &near, 1);
    relays.cut(Ends::Between("p1", "p0"), None);
    dialler.send_to(&2u32.to_le_bytes(), to_near).unwrap();
    carry(&dialler, to_far, &far, 3);
    let began = Instant::now();
    while stats(&relays, "p0", "p1").dropped_cut < 1 {
        assert!(began.elapsed() < Duration::from_secs(20));
        std::thread::yield_now();
    }
    relays.restore(Ends::Of("p1"));
    // The next to arrive is the one sent after the cut.
    carry(&dialler, to_near, &near, 4);
    let lane = stats(&relays, "p0", "p1");
    assert_eq!((lane.forwarded, lane.dropped_cut), (2, 1));
}

#[test]
fn a_relay_outlives_a_listener_that_is_gone() {
    let relays = Relays::start(0.0, 1000.0).unwrap();
    let (dialler, listener) = (socket(), socket());
    let address = listener.local_addr().unwrap();
    let relay = relays.add("p0", "p1", address).unwrap();
    carry(&dialler, relay, &listener, 1);
    drop(listener);
    dialler.send_to(&2u32.to_le_bytes(), relay).unwrap();
    let began = Instant::now();
    while stats(&relays, "p0", "p1").forwarded < 2 {
        assert!(began.elapsed() < Duration::from_secs(20));
        std::thread::yield_now();
    }
    let listener = UdpSocket::bind(address).unwrap();
    listener
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    dialler.send_to(&3u32.to_le_bytes(), relay).unwrap();
    let mut buffer = [0; 2048];
    let mut next = || {
        let (len, _) = listener.recv_from(&mut buffer).unwrap();
        (len, number(&buffer))
    };
    // The second is counted just before it is sent: it may meet the new listener.
    let first = next();
    let third = if first == (4, 2) { next() } else { first };
    assert_eq!(third, (4, 3));
}

#[test]
fn links_out_of_range_are_refused() {
    let error = Relays::start(40.0, 0.0).err().unwrap().to_string();
    assert!(error.contains("mbit_per_s"), "{error}");
}
