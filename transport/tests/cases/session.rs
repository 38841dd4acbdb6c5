//! Sessions of three parties and a dealer over real sockets.

use crate::common::{DEALER, World, hello, settings, watchful};
use bytes::Bytes;
use std::sync::Arc;
use std::time::{Duration, Instant};
use trefoil_protocol::party::{PartyId, Peer};
use trefoil_protocol::transport::{CorrectionSink, Corrections, NetError, Transport};
use trefoil_transport::{Hello, SessionNet, Settings, TransportError};

/// A frame whose bytes depend on who sends it to whom and when.
fn frame(from: PartyId, to: PartyId, round: usize, len: usize) -> Bytes {
    let start = from.index() * 83 + to.index() * 29 + round * 7;
    (0..len)
        .map(|at| (start + at * 131 + (at >> 8)) as u8)
        .collect::<Vec<u8>>()
        .into()
}

/// Every party posts a whole round before it receives.
fn exchange(me: PartyId, net: &mut SessionNet, sizes: &[usize]) {
    for (round, len) in sizes.iter().enumerate() {
        for to in me.others() {
            net.post(to, frame(me, to, round, *len)).unwrap();
        }
        for from in me.others() {
            assert_eq!(
                net.next(from).unwrap(),
                frame(from, me, round, *len),
                "round {round} {from} to {me}"
            );
        }
    }
}

#[test]
fn frames_from_nothing_to_forty_megabytes_cross_in_both_directions_at_once() {
    let world = Arc::new(World::new(settings()));
    let session = world.start();
    let sizes = [0, 1, 8, 1_000_000, 40_000_000, 0, 40_000_000, 1];
    let threads: Vec<_> = PartyId::ALL
        .into_iter()
        .zip(session.nets)
        .map(|(me, mut net)| {
            std::thread::spawn(move || {
                exchange(me, &mut net, &sizes);
                net.stats()
            })
        })
        .collect();
    let payload: usize = sizes.iter().sum();
    for (me, thread) in PartyId::ALL.into_iter().zip(threads) {
        let stats = thread.join().unwrap();
        assert_eq!(stats.rounds, sizes.len() as u64);
        for other in me.others() {
            assert_eq!(stats.payload_sent(Peer::Party(other)), payload as u64);
            assert_eq!(stats.payload_received(Peer::Party(other)), payload as u64);
            assert_eq!(
                stats.sent_bytes[other.index()],
                (payload + 8 * sizes.len()) as u64
            );
        }
        assert_eq!(stats.sent_bytes[me.index()], 0);
    }
    assert!(
        session.aborts.iter().all(|abort| abort.failure().is_none()),
        "{:?}",
        session.aborts
    );
}

#[test]
fn material_arrives_in_order_and_the_dealers_look_ahead_is_bounded() {
    // Half the look-ahead at each side, where one segment is always admitted. The window of the
    // stream between them does not count: the party says how far the dealer may go.
    const SEGMENT: usize = 100_000;
    let settings = Settings {
        look_ahead_bytes: 1 << 20,
        window_bytes: 1 << 20,
        look_ahead_timeout_ms: 500,
        ..settings()
    };
    let bound = settings.look_ahead_bytes as usize + 2 * SEGMENT;
    let world = Arc::new(World::new(settings));
    let mut session = world.start();
    let segment = |number: u8| Bytes::from(vec![number; SEGMENT]);

    let mut posted = 0u8;
    let err = loop {
        match session.dealer.post(PartyId::P1, segment(posted)) {
            Ok(()) => posted += 1,
            Err(err) => break err,
        }
    };
    assert_eq!(
        err,
        NetError::Timeout {
            peer: Peer::Party(PartyId::P1),
            waited_ms: 500
        }
    );
    let ahead = usize::from(posted) * SEGMENT;
    assert!(
        ahead >= 1 << 20 && ahead <= bound,
        "{ahead} bytes ahead, the bound is {bound}"
    );

    // The others are not held up, and P1 goes on where it takes what waits.
    session.dealer.post(PartyId::P0, segment(200)).unwrap();
    assert_eq!(session.materials[0].next().unwrap(), segment(200));
    for number in 0..posted {
        assert_eq!(session.materials[1].next().unwrap(), segment(number));
    }
    session.dealer.post(PartyId::P1, segment(posted)).unwrap();
    drop(session.dealer);
    assert_eq!(session.materials[1].next().unwrap(), segment(posted));
    let end = session.materials[1].next().unwrap_err();
    assert!(
        matches!(
            end,
            NetError::Closed {
                peer: Peer::Dealer,
                ..
            }
        ),
        "{end}"
    );
    assert!(session.dealer_abort.failure().is_none());
}

#[test]
fn a_different_program_is_refused_naming_field_and_peer_and_the_others_hear_of_it() {
    let world = Arc::new(World::new(settings()));
    let start = |me: PartyId, hello: Hello| {
        let world = world.clone();
        std::thread::spawn(move || world.start_party(me, hello).map(|_| ()))
    };
    let mut other = hello();
    other.program_hashes[1] = [0xAB; 32];
    other.software = "trefoil 0.2.0".into();
    let threads = [
        start(PartyId::P0, hello()),
        start(PartyId::P1, hello()),
        start(PartyId::P2, other),
    ];
    let dealer = world.start_dealer(hello()).map(|_| ()).unwrap_err();
    let errors = threads.map(|thread| thread.join().unwrap().unwrap_err());

    // P2 differs from all: it names one of them, its field and both values.
    let text = errors[2].to_string();
    assert!(
        matches!(&errors[2], TransportError::HelloMismatch(differs) if differs.field == "program hash"),
        "{text}"
    );
    assert!(
        text.contains("program 1 abab") && text.contains("program 1 0202"),
        "{text}"
    );
    assert!(
        text.contains("trefoil 0.1.0") && text.contains("trefoil 0.2.0"),
        "{text}"
    );
    // Each other one finds the difference itself or is told by who did.
    for err in [&errors[0], &errors[1], &dealer] {
        let text = err.to_string();
        assert!(
            text.contains("program hash differs") && text.contains("P2"),
            "{text}"
        );
    }
}

#[test]
fn an_abort_reaches_everyone_with_its_author_and_reason_even_before_a_close() {
    let mut world = World::new(settings());
    let session = {
        let shared = Arc::new(world);
        let session = shared.start();
        world = Arc::into_inner(shared).unwrap();
        session
    };
    let [mut net0, net1, mut net2] = session.nets;
    let [mut material0, ..] = session.materials;
    let waiting = [
        std::thread::spawn(move || net0.next(PartyId::P1).unwrap_err()),
        std::thread::spawn(move || net2.next(PartyId::P0).unwrap_err()),
        std::thread::spawn(move || material0.next().unwrap_err()),
    ];
    session.aborts[1].abort("the clinic withdrew its data");
    // P1 leaves at once; what it said must arrive before.
    world
        .runtime(1)
        .run(world.nodes[1].as_ref().unwrap().close("gone"));
    let told = |by: &str| NetError::Aborted {
        by: by.into(),
        reason: "the clinic withdrew its data".into(),
    };
    for thread in waiting {
        assert_eq!(thread.join().unwrap(), told("P1"));
    }
    assert_eq!(
        world.runtime(DEALER).run(session.dealer_abort.failed()),
        told("P1")
    );
    let mut dealer = session.dealer;
    assert_eq!(
        dealer.post(PartyId::P0, Bytes::new()).unwrap_err(),
        told("P1")
    );
    drop(net1);
}

#[test]
fn a_killed_peer_ends_the_session_at_all_others_naming_it() {
    for victim in [2, DEALER] {
        let mut world = World::new(watchful());
        let session = {
            let shared = Arc::new(world);
            let session = shared.start();
            world = Arc::into_inner(shared).unwrap();
            session
        };
        let [mut net0, mut net1, net2] = session.nets;
        let name = if victim == DEALER { "dealer" } else { "P2" };
        let start = Instant::now();
        // P0 waits for the victim or for somebody who waits for it.
        let waiting = [
            std::thread::spawn(move || net0.next(PartyId::P1).unwrap_err()),
            std::thread::spawn(move || net1.next(PartyId::P2).unwrap_err()),
        ];
        world.kill(victim);
        for thread in waiting {
            let err = thread.join().unwrap();
            assert!(err.to_string().contains(name), "{err}");
        }
        assert!(start.elapsed() < Duration::from_secs(10));
        drop(net2);
    }
}

#[test]
fn a_closed_link_fails_a_pending_receive_at_once_naming_the_peer() {
    let world = Arc::new(World::new(settings()));
    let session = world.start();
    let [mut net0, _net1, _net2] = session.nets;
    let waiting = std::thread::spawn(move || {
        let err = net0.next(PartyId::P2).unwrap_err();
        (err, net0.post(PartyId::P1, Bytes::new()).unwrap_err())
    });
    world.link(2, 0).close("operator stopped P2");
    let (err, later) = waiting.join().unwrap();
    let text = err.to_string();
    assert!(text.contains("P2"), "{text}");
    assert_eq!(err, later);
}

#[test]
fn what_was_posted_before_an_orderly_end_is_delivered() {
    let world = Arc::new(World::new(settings()));
    let session = world.start();
    let [mut net0, mut net1, net2] = session.nets;
    let big = frame(PartyId::P0, PartyId::P1, 0, 20_000_000);
    net0.post(PartyId::P1, big.clone()).unwrap();
    net0.post(PartyId::P1, Bytes::from_static(b"last")).unwrap();
    let [material0, ..] = session.materials;
    drop((net0, material0));
    world
        .runtime(0)
        .run(world.nodes[0].as_ref().unwrap().close("finished"));
    assert_eq!(net1.next(PartyId::P0).unwrap(), big);
    assert_eq!(&net1.next(PartyId::P0).unwrap()[..], b"last");
    let end = net1.next(PartyId::P0).unwrap_err();
    assert!(
        matches!(
            end,
            NetError::Closed {
                peer: Peer::Party(PartyId::P0),
                ..
            }
        ),
        "{end}"
    );
    drop(net2);
}

#[test]
fn a_silent_peer_is_a_time_out_naming_it() {
    let world = Arc::new(World::new(Settings {
        round_timeout_ms: 50,
        ..settings()
    }));
    let session = world.start();
    let [mut net0, ..] = session.nets;
    let err = net0.next(PartyId::P2).unwrap_err();
    assert_eq!(
        err,
        NetError::Timeout {
            peer: Peer::Party(PartyId::P2),
            waited_ms: 50
        }
    );
    assert!(matches!(
        net0.next(PartyId::P0),
        Err(NetError::Protocol { .. })
    ));
}

#[test]
fn a_frame_over_the_limit_is_refused_by_its_sender_and_ends_the_session_at_its_receiver() {
    let mut world = World::new(settings());
    world.settings[0].max_frame_bytes = 1_000;
    let world = Arc::new(world);
    let session = world.start();
    let [mut net0, mut net1, mut net2] = session.nets;
    let err = net0
        .post(PartyId::P1, Bytes::from(vec![0; 1_001]))
        .unwrap_err();
    assert!(err.to_string().contains("1001"), "{err}");

    net1.post(PartyId::P0, Bytes::from(vec![0; 1_001])).unwrap();
    let err = net0.next(PartyId::P1).unwrap_err();
    assert!(
        matches!(
            err,
            NetError::Protocol {
                peer: Peer::Party(PartyId::P1),
                ..
            }
        ),
        "{err}"
    );
    // The others hear from P0 who broke the rule.
    let err = net2.next(PartyId::P1).unwrap_err();
    assert!(
        matches!(&err, NetError::Aborted { by, reason } if by == "P0" && reason.contains("P1 broke")),
        "{err}"
    );
}

/// Short frames that the posting thread sends itself, against a window that one of them fills.
#[test]
fn short_frames_that_find_the_window_full_are_delivered_in_order_or_end_with_an_abort() {
    const FRAMES: usize = 60;
    const LEN: usize = 30_000;
    let world = Arc::new(World::new(Settings {
        window_bytes: 64 << 10,
        receive_queue_bytes: 1,
        send_queue_bytes: (FRAMES * LEN) as u64,
        ..settings()
    }));
    let session = world.start();
    let [mut net0, mut net1, net2] = session.nets;
    let round = |at| frame(PartyId::P0, PartyId::P1, at, LEN);
    for at in 0..FRAMES {
        net0.post(PartyId::P1, round(at)).unwrap();
    }
    for at in 0..FRAMES {
        assert_eq!(net1.next(PartyId::P0).unwrap(), round(at), "frame {at}");
    }

    let posting = std::thread::spawn(move || {
        // Ends when the queue is full and the abort comes; bounded if it never does.
        (0..10 * FRAMES).find_map(|at| net0.post(PartyId::P1, round(at)).err())
    });
    let start = Instant::now();
    while session.aborts[0].stats().sent_frames[1] < 2 * FRAMES as u64 {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "the posts do not go on"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    session.aborts[2].abort("enough");
    let told = NetError::Aborted {
        by: "P2".into(),
        reason: "enough".into(),
    };
    assert_eq!(posting.join().unwrap(), Some(told));
    drop((net1, net2));
}
