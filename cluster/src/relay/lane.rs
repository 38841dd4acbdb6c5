//! One directed link as arithmetic: when a datagram leaves it, or why it does not.
//!
//! No sockets and no clock: the caller says what time it is, so the model is
//! tested in simulated time. `mod.rs` beside this moves the real datagrams.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

use crate::link::Shape;

/// What one directed link has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LaneStats {
    /// Datagrams that left at the far end.
    pub forwarded: u64,
    /// Their UDP payload.
    pub forwarded_bytes: u64,
    /// Datagrams that found the queue full.
    pub dropped_full: u64,
    /// Datagrams lost by the emulated loss.
    pub dropped_loss: u64,
    /// Datagrams that met a cut link.
    pub dropped_cut: u64,
}

/// Datagrams of equal size (the last may be shorter) that travel together.
#[derive(Debug)]
pub(crate) struct Departure<T> {
    pub(crate) due: Instant,
    pub(crate) bytes: Box<[u8]>,
    pub(crate) segment_bytes: usize,
    pub(crate) way: T,
}

impl<T> Departure<T> {
    pub(crate) fn datagrams(&self) -> u64 {
        self.bytes.len().div_ceil(self.segment_bytes) as u64
    }
}

/// A directed link: a bottleneck that serialises, then a constant delay.
///
/// Because the delay is constant, datagrams leave in the order they came, and a
/// queue is all the timer there is.
pub(crate) struct Lane<T> {
    shape: Shape,
    queue: VecDeque<Departure<T>>,
    /// When the bottleneck has sent everything it was given.
    free_at: Instant,
    cut: Option<Cut>,
    loss: Option<(f64, StdRng)>,
    pub(crate) stats: LaneStats,
}

#[derive(Clone, Copy)]
enum Cut {
    Until(Instant),
    Open,
}

/// Serialisation finer than this is not worth a system call of its own.
const CHUNK_TIME: Duration = Duration::from_micros(200);

impl<T: Clone> Lane<T> {
    pub(crate) fn new(shape: Shape, now: Instant) -> Lane<T> {
        Lane {
            shape,
            queue: VecDeque::new(),
            free_at: now,
            cut: None,
            loss: None,
            stats: LaneStats::default(),
        }
    }

    /// Takes datagrams in that arrived together, each `segment_bytes` long but the last.
    pub(crate) fn offer(&mut self, now: Instant, bytes: &[u8], segment_bytes: usize, way: T) {
        let segment_bytes = segment_bytes.clamp(1, bytes.len().max(1));
        if self.is_cut(now) {
            self.stats.dropped_cut += bytes.len().div_ceil(segment_bytes) as u64;
            return;
        }
        let per_chunk = match self.loss {
            Some(_) => 1,
            None => {
                let each = self.serialisation(segment_bytes).as_nanos().max(1);
                (CHUNK_TIME.as_nanos() / each).clamp(1, 64) as usize
            }
        };
        for chunk in bytes.chunks(per_chunk * segment_bytes) {
            self.offer_chunk(now, chunk, segment_bytes, way.clone());
        }
    }

    fn offer_chunk(&mut self, now: Instant, chunk: &[u8], segment_bytes: usize, way: T) {
        let datagrams = chunk.len().div_ceil(segment_bytes) as u64;
        if let Some((rate, rng)) = &mut self.loss
            && rng.random::<f64>() < *rate
        {
            self.stats.dropped_loss += datagrams;
            return;
        }
        let start = self.free_at.max(now);
        let backlog = (start - now).as_secs_f64() * self.shape.bytes_per_s;
        if backlog + chunk.len() as f64 > self.shape.queue_bytes as f64 {
            self.stats.dropped_full += datagrams;
            return;
        }
        self.free_at = start + self.serialisation(chunk.len());
        self.queue.push_back(Departure {
            due: self.free_at + self.shape.delay,
            bytes: chunk.into(),
            segment_bytes: segment_bytes.min(chunk.len()),
            way,
        });
    }

    /// The next departure that is due, if there is one.
    pub(crate) fn take_due(&mut self, now: Instant) -> Option<Departure<T>> {
        while self.queue.front().is_some_and(|first| first.due <= now) {
            let departure = self.queue.pop_front()?;
            if !self.is_cut(now) {
                self.stats.forwarded += departure.datagrams();
                self.stats.forwarded_bytes += departure.bytes.len() as u64;
                return Some(departure);
            }
            self.stats.dropped_cut += departure.datagrams();
        }
        None
    }

    /// When the next departure is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.queue.front().map(|first| first.due)
    }

    /// Drops everything for `duration`, or until `restore`.
    pub(crate) fn cut(&mut self, now: Instant, duration: Option<Duration>) {
        self.cut = Some(match duration.and_then(|time| now.checked_add(time)) {
            Some(end) => Cut::Until(end),
            None => Cut::Open,
        });
        self.stats.dropped_cut += self.queue.iter().map(Departure::datagrams).sum::<u64>();
        self.queue.clear();
        self.free_at = now;
    }

    pub(crate) fn restore(&mut self) {
        self.cut = None;
    }

    /// Loses each datagram with this probability; 0 ends it.
    pub(crate) fn set_loss(&mut self, rate: f64, seed: u64) {
        self.loss = (rate > 0.0).then(|| (rate, StdRng::seed_from_u64(seed)));
    }

    fn is_cut(&mut self, now: Instant) -> bool {
        match self.cut {
            Some(Cut::Open) => true,
            Some(Cut::Until(end)) if now < end => true,
            _ => {
                self.cut = None;
                false
            }
        }
    }

    fn serialisation(&self, bytes: usize) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.shape.bytes_per_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(rtt_ms: f64, mbit_per_s: f64) -> (Lane<u32>, Instant) {
        let now = Instant::now();
        let shape = Shape::new(rtt_ms, mbit_per_s).unwrap();
        (Lane::new(shape, now), now)
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_datagram_leaves_after_its_serialisation_and_half_the_round_trip() {
        // 1,000 bytes at 8 Mbit/s are 1 ms.
        let (mut lane, t0) = lane(40.0, 8.0);
        lane.offer(t0, &[1; 1000], 1000, 7);
        assert_eq!(lane.next_due(), Some(t0 + ms(21)));
        assert!(
            lane.take_due(t0 + ms(21) - Duration::from_nanos(1))
                .is_none()
        );
        let departure = lane.take_due(t0 + ms(21)).unwrap();
        assert_eq!((departure.bytes.len(), departure.way), (1000, 7));
        assert_eq!(lane.next_due(), None);
    }

    #[test]
    fn datagrams_that_come_together_leave_at_the_rate_of_the_link() {
        let (mut lane, t0) = lane(40.0, 8.0);
        // Ten datagrams in one read, the last of them shorter.
        lane.offer(t0, &[1; 9_500], 1000, 0);
        let dues: Vec<_> = std::iter::from_fn(|| lane.take_due(t0 + ms(1000)))
            .map(|departure| departure.due - t0)
            .collect();
        let mut expected: Vec<_> = (1..10).map(|at| ms(20 + at)).collect();
        expected.push(ms(29) + Duration::from_micros(500));
        assert_eq!(dues, expected);
        assert_eq!(lane.stats.forwarded, 10);
        assert_eq!(lane.stats.forwarded_bytes, 9_500);
    }

    #[test]
    fn a_fast_link_keeps_a_burst_in_few_pieces() {
        let (mut lane, t0) = lane(40.0, 1000.0);
        lane.offer(t0, &[1; 14_520], 1452, 0);
        let departure = lane.take_due(t0 + ms(1000)).unwrap();
        assert_eq!((departure.datagrams(), departure.segment_bytes), (10, 1452));
        assert!(lane.take_due(t0 + ms(1000)).is_none());
    }

    #[test]
    fn an_idle_link_saves_up_no_rate() {
        let (mut lane, t0) = lane(0.0, 8.0);
        lane.offer(t0 + ms(500), &[1; 1000], 1000, 0);
        lane.offer(t0 + ms(500), &[1; 1000], 1000, 0);
        let dues: Vec<_> = std::iter::from_fn(|| lane.take_due(t0 + ms(1000)))
            .map(|departure| departure.due - t0)
            .collect();
        assert_eq!(dues, [ms(501), ms(502)]);
    }

    #[test]
    fn a_full_queue_drops_and_counts() {
        // The queue holds 4 MiB: 4,194 datagrams of 1,000 bytes.
        let (mut lane, t0) = lane(10.0, 8.0);
        for _ in 0..5_000 {
            lane.offer(t0, &[0; 1000], 1000, 0);
        }
        assert_eq!(lane.stats.dropped_full, 5_000 - 4_194);
        while lane.take_due(t0 + ms(10_000)).is_some() {}
        assert_eq!(lane.stats.forwarded, 4_194);
    }

    #[test]
    fn a_cut_link_drops_what_is_under_way_and_what_comes_until_it_is_over() {
        let (mut lane, t0) = lane(40.0, 8.0);
        lane.offer(t0, &[0; 100], 100, 0);
        lane.cut(t0 + ms(1), Some(ms(100)));
        lane.offer(t0 + ms(100), &[0; 100], 100, 0);
        assert!(lane.take_due(t0 + ms(100)).is_none());
        lane.offer(t0 + ms(101), &[0; 100], 100, 0);
        assert!(lane.take_due(t0 + ms(200)).is_some());
        assert_eq!((lane.stats.dropped_cut, lane.stats.forwarded), (2, 1));
    }

    #[test]
    fn a_cut_without_end_lasts_until_it_is_restored() {
        let (mut lane, t0) = lane(0.0, 8.0);
        lane.cut(t0, None);
        lane.offer(t0 + ms(1_000_000), &[0; 100], 100, 0);
        lane.restore();
        lane.offer(t0 + ms(1_000_001), &[0; 100], 100, 0);
        assert!(lane.take_due(t0 + ms(1_000_002)).is_some());
        assert_eq!((lane.stats.dropped_cut, lane.stats.forwarded), (1, 1));
    }

    #[test]
    fn loss_takes_about_its_share_and_the_same_datagrams_for_the_same_seed() {
        let run = |seed| {
            let (mut lane, t0) = lane(0.0, 1000.0);
            lane.set_loss(0.1, seed);
            lane.offer(t0, &[0; 1_000_000], 1000, 0);
            while lane.take_due(t0 + ms(1000)).is_some() {}
            assert_eq!(lane.stats.forwarded + lane.stats.dropped_loss, 1_000);
            lane.stats
        };
        assert_eq!(run(1), run(1));
        assert!((50..150).contains(&run(1).dropped_loss));
    }
}
