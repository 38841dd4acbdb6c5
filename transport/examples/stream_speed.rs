//! How fast a session is on this machine: bulk throughput for several datagram
//! sizes, and the round trip of small frames, through real sockets on loopback.
//!
//! `cargo run --release -p trefoil-transport --example stream_speed [DATAGRAM_BYTES [SPIN_US]]`

use bytes::Bytes;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::runtime::{Builder, Handle};
use trefoil_protocol::party::PartyId;
use trefoil_protocol::transport::Transport;
use trefoil_transport::{DealerNet, Hello, Identity, Link, Node, SessionNet, Settings};

const SESSION: [u8; 32] = [1; 32];
const BULK_FRAME_BYTES: usize = 8 << 20;
const BULK_FRAMES: usize = 64;
const SMALL_FRAME_BYTES: usize = 64;
const SMALL_ROUNDS: usize = 5_000;

fn main() {
    // One size and spin only, where they are given.
    let mut given = std::env::args().skip(1).map(|arg| arg.parse::<u16>());
    let mut given = || given.next().transpose().expect("a number");
    let (size, spin) = (given(), given());
    for datagram_bytes in size.map_or(vec![1_452, 4_000, 6_400], |size| vec![size]) {
        for spin_us in spin.map_or(vec![0, 30], |spin| vec![spin.into()]) {
            measure(&Settings {
                datagram_bytes,
                spin_us,
                ..Settings::default()
            });
        }
    }
}

fn measure(settings: &Settings) {
    println!(
        "datagram {} bytes, spin {} us",
        settings.datagram_bytes, settings.spin_us
    );
    let (mut nets, links) = session(settings);

    let start = Instant::now();
    nets = together(nets, |me, net| {
        for _ in 0..BULK_FRAMES {
            match me {
                PartyId::P0 => net
                    .post(PartyId::P1, Bytes::from(vec![3; BULK_FRAME_BYTES]))
                    .expect("post"),
                PartyId::P1 => drop(net.next(PartyId::P0).expect("next")),
                PartyId::P2 => {}
            }
        }
    });
    report(
        "bulk P0 -> P1",
        BULK_FRAMES * BULK_FRAME_BYTES,
        start.elapsed(),
    );

    let start = Instant::now();
    nets = together(nets, |me, net| {
        for _ in 0..BULK_FRAMES / 4 {
            let frame = Bytes::from(vec![3; BULK_FRAME_BYTES]);
            for to in me.others() {
                net.post(to, frame.clone()).expect("post");
            }
            for from in me.others() {
                net.next(from).expect("next");
            }
        }
    });
    report(
        "bulk rounds, six directions",
        BULK_FRAMES / 4 * 6 * BULK_FRAME_BYTES,
        start.elapsed(),
    );

    let frame = Bytes::from(vec![3; SMALL_FRAME_BYTES]);
    let small = frame.clone();
    let start = Instant::now();
    nets = together(nets, move |me, net| {
        for _ in 0..SMALL_ROUNDS {
            match me {
                PartyId::P0 => {
                    net.post(PartyId::P1, small.clone()).expect("post");
                    net.next(PartyId::P1).expect("next");
                }
                PartyId::P1 => {
                    let ping = net.next(PartyId::P0).expect("next");
                    net.post(PartyId::P0, ping).expect("post");
                }
                PartyId::P2 => {}
            }
        }
    });
    println!(
        "  small frame there and back: {:.1} us",
        start.elapsed().as_secs_f64() * 1e6 / SMALL_ROUNDS as f64
    );

    let start = Instant::now();
    together(nets, move |me, net| {
        for _ in 0..SMALL_ROUNDS {
            for to in me.others() {
                net.post(to, frame.clone()).expect("post");
            }
            for from in me.others() {
                net.next(from).expect("next");
            }
        }
    });
    println!(
        "  small round of three parties: {:.1} us",
        start.elapsed().as_secs_f64() * 1e6 / SMALL_ROUNDS as f64
    );
    for link in links {
        let stats = link.stats();
        println!(
            "  link: {} datagrams of at most {} bytes sent, {} lost, window {} KiB, round trip {:?}",
            stats.sent_datagrams,
            stats.datagram_bytes,
            stats.lost_packets,
            stats.congestion_window_bytes >> 10,
            stats.rtt
        );
    }
}

fn report(what: &str, bytes: usize, took: Duration) {
    println!(
        "  {what}: {:.2} GB/s",
        bytes as f64 / took.as_secs_f64() / 1e9
    );
}

/// Runs the three parties on a thread each and returns their ends.
fn together(
    nets: [SessionNet; 3],
    work: impl Fn(PartyId, &mut SessionNet) + Send + Sync + 'static,
) -> [SessionNet; 3] {
    let work = Arc::new(work);
    let mut parties = PartyId::ALL.into_iter();
    let threads: [JoinHandle<SessionNet>; 3] = nets.map(|mut net| {
        let (work, me) = (work.clone(), parties.next().expect("three parties"));
        std::thread::spawn(move || {
            work(me, &mut net);
            net
        })
    });
    threads.map(|thread| thread.join().expect("a party failed"))
}

/// A runtime with one thread, as every node has it. It lives as long as the process.
fn runtime() -> Handle {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime");
    let handle = runtime.handle().clone();
    std::thread::spawn(move || runtime.block_on(std::future::pending::<()>()));
    handle
}

fn session(settings: &Settings) -> ([SessionNet; 3], Vec<Link>) {
    let runtimes = [0; 4].map(|_| runtime());
    let identities = [0; 4].map(|_| {
        let made = rcgen::generate_simple_self_signed(vec!["node".into()]).expect("certificate");
        Identity {
            cert_der: made.cert.der().to_vec(),
            key_der: made.signing_key.serialize_der(),
        }
    });
    let pins = identities
        .each_ref()
        .map(|identity| identity.pin().expect("pin"));
    let nodes: Vec<Node> = identities
        .iter()
        .zip(&runtimes)
        .map(|(identity, runtime)| {
            let listen = (Ipv4Addr::LOCALHOST, 0).into();
            let node = runtime
                .block_on(async { Node::bind(identity, listen, settings) })
                .expect("bind");
            node.set_allowed(BTreeSet::from(pins));
            node
        })
        .collect();
    let mut links = vec![vec![None; 4]; 4];
    for low in 0..4 {
        for high in low + 1..4 {
            let connecting = nodes[low].connect(nodes[high].local_addr(), pins[high]);
            links[low][high] = Some(runtimes[low].block_on(connecting).expect("connect"));
            links[high][low] = runtimes[high].block_on(nodes[high].accept());
        }
    }
    let hello = Hello {
        wire_version: 1,
        session: SESSION,
        program_hashes: vec![],
        ring_bits: 64,
        frac_bits: 16,
        software: "stream_speed".into(),
    };
    let link = |from: usize, to: usize| -> Link { links[from][to].clone().expect("linked") };
    let starting = PartyId::ALL.map(|me| {
        let peers = me
            .others()
            .map(|other| (other, link(me.index(), other.index())));
        let (dealer, hello, settings) = (link(me.index(), 3), hello.clone(), settings.clone());
        let runtime = runtimes[me.index()].clone();
        std::thread::spawn(move || {
            runtime
                .block_on(SessionNet::start(
                    me, SESSION, hello, peers, dealer, &settings,
                ))
                .expect("session")
        })
    });
    let parties = PartyId::ALL.map(|party| (party, link(3, party.index())));
    runtimes[3]
        .block_on(DealerNet::start(SESSION, hello, parties, settings))
        .expect("dealer");
    let nets = starting.map(|thread| thread.join().expect("a party failed").0);
    // The nodes must outlive the measurement; the process ends soon.
    std::mem::forget(nodes);
    (nets, vec![link(0, 1), link(1, 0)])
}
