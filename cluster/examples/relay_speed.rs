//! What the relay makes of QUIC traffic on this machine: throughput, round trip
//! and the processor time it takes, for several links.
//!
//! `cargo run --release -p trefoil-cluster --example relay_speed`

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use bytes::Bytes;
use trefoil_cluster::Relays;
use trefoil_consortium::identity;
use trefoil_transport::{MsgStream, Node, Settings, StreamKind};

const BULK_BYTES: usize = 4 << 20;
const BULK_MESSAGES: usize = 32;
const PINGS: usize = 20;

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        measure("no relay", None).await;
        for (rtt_ms, mbit_per_s) in [(40.0, 300.0), (1.0, 300.0), (1.0, 1000.0), (0.0, 100_000.0)] {
            let label = format!("{rtt_ms} ms, {mbit_per_s} Mbit/s");
            let relays = Relays::start(rtt_ms, mbit_per_s).expect("relays");
            measure(&label, Some(&relays)).await;
        }
    });
}

async fn measure(label: &str, relays: Option<&Relays>) {
    let settings = Settings::default();
    let node = |name| {
        let identity = identity::generate(name).expect("an identity");
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let node = Node::bind(&identity, listen, &settings).expect("a node");
        (node, identity::pin(&identity).expect("a pin"))
    };
    let ((dialler, dialler_pin), (listener, listener_pin)) = (node("p0"), node("p1"));
    listener.set_allowed(BTreeSet::from([dialler_pin]));
    let address = match relays {
        Some(relays) => relays
            .add("p0", "p1", listener.local_addr())
            .expect("a relay"),
        None => listener.local_addr(),
    };
    let (link, other) = tokio::join!(dialler.connect(address, listener_pin), listener.accept());
    let (link, other) = (link.expect("connected"), other.expect("accepted"));
    let (here, there) = tokio::join!(link.open(StreamKind::Control, [0; 32]), other.accept());
    let (mut here, (_, _, mut there)): (MsgStream, _) = (here.expect("open"), there.expect("open"));

    let cpu = cpu_s();
    let start = Instant::now();
    let sending = async {
        for _ in 0..BULK_MESSAGES {
            let message = Bytes::from(vec![3; BULK_BYTES]);
            here.send_bytes(message).await.expect("sent");
        }
    };
    let receiving = async {
        for _ in 0..BULK_MESSAGES {
            there.recv_bytes(BULK_BYTES).await.expect("received");
        }
    };
    tokio::join!(sending, receiving);
    let (wall, cpu) = (start.elapsed().as_secs_f64(), cpu_s() - cpu);
    let rate = (BULK_MESSAGES * BULK_BYTES) as f64 * 8e-6 / wall;

    let start = Instant::now();
    for _ in 0..PINGS {
        here.send_bytes(Bytes::from_static(b"ping"))
            .await
            .expect("sent");
        there.recv_bytes(16).await.expect("received");
        there
            .send_bytes(Bytes::from_static(b"pong"))
            .await
            .expect("sent");
        here.recv_bytes(16).await.expect("received");
    }
    let ping_ms = start.elapsed().as_secs_f64() * 1e3 / PINGS as f64;
    println!(
        "{label}: {rate:.0} Mbit/s, round trip {ping_ms:.2} ms, {:.2} cores",
        cpu / wall
    );
    if let Some(relays) = relays {
        for ((from, to), stats) in relays.stats() {
            println!("  {from} -> {to}: {stats:?}");
        }
    }
    tokio::join!(dialler.close("done"), listener.close("done"));
}

/// Processor time of this whole process so far; 0 where the system does not say.
fn cpu_s() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace();
    let ticks = fields
        .skip(11)
        .take(2)
        .filter_map(|f| f.parse::<f64>().ok());
    ticks.sum::<f64>() / 100.0
}
