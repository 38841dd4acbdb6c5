//! What this machine needs at the least for a piece of work: the rates of its multipliers, its
//! pseudo-random stream and its links, measured in the same run as what is held against them. The
//! multipliers count at what registers alone reach, not at what our kernels make of them.

use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use serde::Serialize;
use trefoil_consortium::identity;
use trefoil_protocol::plan::Cost;
use trefoil_protocol::prg::{Domain, Pos, Prg};
use trefoil_protocol::ring::kernel::{self, Acc, PEAK_TURN, gemm, peak};
use trefoil_transport::{Identity, Settings, stream_goodput};

/// Cores that the floor is for.
const CORES: usize = 2;
/// Time for each rate of a core.
const DURATION: Duration = Duration::from_millis(600);
/// The stream's rate is the median of so many, for so long each: from one second to the next it varies by
/// a quarter, and the cases' seconds that it is held against are medians too.
const STREAMS: usize = 7;
const STREAM_DURATION: Duration = Duration::from_millis(250);

/// Rates of this machine.
#[derive(Clone, Debug, Serialize)]
pub struct Rates {
    /// Wrapping 64-bit multiply-adds a second of the registers alone, two cores: the processor's peak with the
    /// kernels' instruction set.
    pub multiply_adds_per_s: f64,
    /// Multiply-adds a second of the kernel's 256x1024x256 matrix product, two cores. The floor does not count it.
    pub kernel_multiply_adds_per_s: f64,
    /// Bytes of pseudo-random stream a second, two cores.
    pub prg_bytes_per_s: f64,
    /// Bytes a second of one bare stream on loopback, both ends on this machine.
    pub stream_bytes_per_s: f64,
    /// Largest UDP payload of that stream.
    pub datagram_bytes: u16,
}

impl Rates {
    /// Measures them.
    pub fn measure(settings: &Settings) -> Result<Rates> {
        let node = |name: &str| identity::generate(name).map_err(|err| anyhow!(err));
        let ends = [node("sender")?, node("receiver")?];
        Ok(Rates {
            multiply_adds_per_s: on_all_cores(peak_multiply_adds)?,
            kernel_multiply_adds_per_s: on_all_cores(kernel_multiply_adds)?,
            prg_bytes_per_s: on_all_cores(prg_bytes)?,
            stream_bytes_per_s: stream_bytes(&ends, settings)?,
            datagram_bytes: settings.datagram_bytes,
        })
    }

    /// Seconds that a step's work takes at these rates if nothing else costs anything: the sum of
    /// the four nodes' multiply-adds and stream bytes, and the payload of all links.
    pub fn floor_seconds(&self, cost: &Cost) -> f64 {
        let multiply_adds = 3 * cost.multiply_adds + cost.dealer_multiply_adds;
        // The dealer expands what the three parties expand.
        let prg_bytes = 2 * 3 * 8 * cost.prg_words_per_party;
        let link_bytes = 3 * cost.bytes_sent_per_party + cost.dealer_bytes;
        multiply_adds as f64 / self.multiply_adds_per_s
            + prg_bytes as f64 / self.prg_bytes_per_s
            + self.link_seconds(link_bytes)
    }

    /// Seconds that a number of bytes takes on one bare stream.
    pub fn link_seconds(&self, bytes: u64) -> f64 {
        bytes as f64 / self.stream_bytes_per_s
    }

    /// In one line.
    pub fn describe(&self) -> String {
        format!(
            "kernel {:?}; two cores: {:.1} G multiply-adds/s on registers alone, {:.1} in a matrix product ({:.0} %), {:.1} GB/s of stream; one bare QUIC stream: {:.2} GB/s in datagrams of {} bytes",
            kernel::isa(),
            self.multiply_adds_per_s / 1e9,
            self.kernel_multiply_adds_per_s / 1e9,
            100.0 * self.kernel_multiply_adds_per_s / self.multiply_adds_per_s,
            self.prg_bytes_per_s / 1e9,
            self.stream_bytes_per_s / 1e9,
            self.datagram_bytes,
        )
    }
}

/// Bytes a second of a bare stream.
fn stream_bytes(ends: &[Identity; 2], settings: &Settings) -> Result<f64> {
    let mut rates = Vec::with_capacity(STREAMS);
    for _ in 0..STREAMS {
        rates.push(stream_goodput(ends, settings, STREAM_DURATION)?);
    }
    rates.sort_by(f64::total_cmp);
    Ok(rates[STREAMS / 2])
}

/// Units a second of `work` on each core, summed.
fn on_all_cores(work: fn(Duration) -> f64) -> Result<f64> {
    let threads: Vec<_> = (0..CORES)
        .map(|_| thread::spawn(move || work(DURATION)))
        .collect();
    let rates: Result<Vec<f64>> = threads
        .into_iter()
        .map(|thread| thread.join().map_err(|_| anyhow!("a measurement failed")))
        .collect();
    Ok(rates?.iter().sum())
}

/// The multipliers alone.
fn peak_multiply_adds(duration: Duration) -> f64 {
    const TURNS: u32 = 4096;
    let mut word = 3;
    let rate = repeat(duration, f64::from(TURNS) * PEAK_TURN as f64, || {
        word = peak(TURNS, word, 5);
    });
    black_box(word);
    rate
}

/// The matrix product of the case `matmul-256x1024x256`.
fn kernel_multiply_adds(duration: Duration) -> f64 {
    let [m, k, n] = [256, 1024, 256];
    let (a, b) = (vec![3u64; m * k], vec![5u64; k * n]);
    let mut c = vec![0u64; m * n];
    repeat(duration, (m * k * n) as f64, || {
        gemm(Acc::Add, m, k, n, &a, false, &b, false, &mut c);
    })
}

fn prg_bytes(duration: Duration) -> f64 {
    let prg = Prg::new([7; 16]);
    let pos = Pos {
        step: 0,
        id: 0,
        domain: Domain::Ring,
    };
    let mut words = vec![0u64; 2048];
    repeat(duration, 8.0 * words.len() as f64, || {
        prg.fill(pos, 0, &mut words);
    })
}

fn repeat(duration: Duration, units: f64, mut work: impl FnMut()) -> f64 {
    work();
    let start = Instant::now();
    let mut done = 0.0;
    while start.elapsed() < duration {
        (0..16).for_each(|_| work());
        done += 16.0 * units;
    }
    done / start.elapsed().as_secs_f64()
}
