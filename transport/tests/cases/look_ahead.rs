//! A dealer that is far ahead of a party that is slow.

use crate::common::{World, settings};
use bytes::Bytes;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use trefoil_protocol::party::PartyId;
use trefoil_protocol::transport::{CorrectionSink, Corrections};
use trefoil_transport::Settings;

const SEGMENTS: usize = 9_000;

/// Short pieces of mixed lengths, each a datagram of its own, which QUIC keeps apart as long as they
/// are not read: with more than 2,048 of them quinn ends the connection.
fn segment(at: usize) -> Bytes {
    Bytes::from(vec![
        at as u8;
        if at.is_multiple_of(3) { 3_500 } else { 100 }
    ])
}

#[test]
fn thousands_of_short_segments_wait_for_a_party_that_is_slow_and_all_arrive() {
    const LOOK_AHEAD: usize = 16_000;
    let world = Arc::new(World::new(Settings {
        look_ahead_bytes: LOOK_AHEAD as u64,
        datagram_bytes: 4_000,
        ..settings()
    }));
    let mut session = world.start();
    let posted = Arc::new(AtomicUsize::new(0));
    let posting = {
        let (mut dealer, posted) = (session.dealer, posted.clone());
        std::thread::spawn(move || {
            for at in 0..SEGMENTS {
                dealer.post(PartyId::P1, segment(at)).unwrap();
                posted.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_micros(150));
            }
            dealer
        })
    };
    // Until all is posted, or nothing more is.
    let start = Instant::now();
    let mut last = (0, Instant::now());
    while last.0 < SEGMENTS && last.1.elapsed() < Duration::from_millis(500) {
        assert!(start.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(10));
        let now = posted.load(Ordering::Relaxed);
        if now > last.0 {
            last = (now, Instant::now());
        }
    }
    // The bound holds in bytes, whatever the stream's window is. At each side one is always admitted.
    let ahead: usize = (0..last.0).map(|at| segment(at).len()).sum();
    assert!(
        ahead > LOOK_AHEAD / 2 && ahead < LOOK_AHEAD + 2 * 3_500,
        "{ahead} bytes are ahead"
    );
    for at in 0..SEGMENTS {
        let got = session.materials[1].next();
        assert_eq!(got.unwrap_or_else(|err| panic!("{at}: {err}")), segment(at));
    }
    drop(posting.join().unwrap());
    assert!(session.aborts[1].failure().is_none());
}

#[test]
fn a_dealer_learns_that_a_party_takes_no_more() {
    let world = Arc::new(World::new(Settings {
        look_ahead_bytes: 16_000,
        look_ahead_timeout_ms: 20_000,
        ..settings()
    }));
    let mut session = world.start();
    let [_, material, _] = session.materials;
    drop(material);
    let refused = (0..SEGMENTS).find_map(|at| session.dealer.post(PartyId::P1, segment(at)).err());
    let refused = refused.expect("the party takes nothing").to_string();
    assert!(
        refused.contains("P1") && refused.contains("ended its side"),
        "{refused}"
    );
}
