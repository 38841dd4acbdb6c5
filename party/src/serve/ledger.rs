//! P0's ledger of a serving session: which requests lie at which party, and which of them make the
//! next batch. Time is an argument; nothing waits here.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use trefoil_consortium::wire::{RequestKey, ServeBatch};
use trefoil_protocol::party::PartyId;

/// A request that all three parties do not have by then is given up.
const REQUEST_WAIT: Duration = Duration::from_secs(5);

/// What is known of a request that is not in a batch.
struct Entry {
    /// Its images, as each party says.
    rows: [Option<u32>; 3],
    since: Instant,
}

/// The ledger.
pub(super) struct Ledger {
    entries: BTreeMap<RequestKey, Entry>,
    /// Those that all three hold, in order of their completion, with the time of that.
    ready: VecDeque<(RequestKey, u32, Instant)>,
    max_batch: u32,
    max_wait: Duration,
    next: u64,
    /// A batch runs.
    busy: bool,
}

/// Requests that are given up, and why.
pub(super) type GivenUp = Vec<(Vec<RequestKey>, String)>;

impl Ledger {
    pub(super) fn new(max_batch: usize, max_wait: Duration) -> Ledger {
        Ledger {
            entries: BTreeMap::new(),
            ready: VecDeque::new(),
            max_batch: u32::try_from(max_batch).unwrap_or(u32::MAX),
            max_wait,
            next: 0,
            busy: false,
        }
    }

    /// A party says that a request is there. Returns why it is given up, if it is.
    pub(super) fn holds(
        &mut self,
        party: PartyId,
        key: RequestKey,
        rows: u32,
        now: Instant,
    ) -> Option<String> {
        let entry = self.entries.entry(key).or_insert(Entry {
            rows: [None; 3],
            since: now,
        });
        entry.rows[party.index()] = Some(rows);
        let [Some(a), Some(b), Some(c)] = entry.rows else {
            return None;
        };
        self.entries.remove(&key);
        if a != b || b != c || a == 0 || a > self.max_batch {
            return Some(format!(
                "the parties were given {a}, {b} and {c} images of one request"
            ));
        }
        self.ready.push_back((key, a, now));
        None
    }

    /// Its member has left P0: whether it was waiting.
    pub(super) fn gone(&mut self, key: &RequestKey) -> bool {
        let before = self.entries.len() + self.ready.len();
        self.entries.remove(key);
        self.ready.retain(|(ready, ..)| ready != key);
        self.entries.len() + self.ready.len() < before
    }

    /// The batch that ran is done.
    pub(super) fn done(&mut self) {
        self.busy = false;
    }

    /// Requests that some party has not got in time.
    pub(super) fn expired(&mut self, now: Instant) -> GivenUp {
        let late = |entry: &Entry| now.duration_since(entry.since) >= REQUEST_WAIT;
        let late = self.entries.iter().filter(|(_, entry)| late(entry));
        let given_up = late.map(|(key, entry)| {
            let missing = PartyId::ALL
                .into_iter()
                .filter(|party| entry.rows[party.index()].is_none())
                .map(|party| party.to_string());
            let missing: Vec<String> = missing.collect();
            let reason = format!(
                "{} has not received this request within {} s",
                missing.join(" and "),
                REQUEST_WAIT.as_secs()
            );
            (vec![*key], reason)
        });
        let given_up: GivenUp = given_up.collect();
        for (keys, _) in &given_up {
            for key in keys {
                self.entries.remove(key);
            }
        }
        given_up
    }

    /// When something has to be looked at again, if anything waits.
    pub(super) fn wake_at(&self) -> Option<Instant> {
        let late = self
            .entries
            .values()
            .map(|entry| entry.since + REQUEST_WAIT);
        let due = self.ready.front().filter(|_| !self.busy);
        let due = due.map(|(_, _, since)| *since + self.max_wait);
        late.chain(due).min()
    }

    /// The next batch, if it is time for one: in order of completion, as many as fit.
    pub(super) fn compose(&mut self, now: Instant) -> Option<ServeBatch> {
        let (_, _, since) = self.ready.front().filter(|_| !self.busy)?;
        let waiting: u32 = self.ready.iter().map(|(_, rows, _)| rows).sum();
        if waiting < self.max_batch && now.duration_since(*since) < self.max_wait {
            return None;
        }
        let mut requests = Vec::new();
        let mut sum = 0;
        while let Some((_, rows, _)) = self.ready.front()
            && sum + rows <= self.max_batch
            && let Some((key, rows, _)) = self.ready.pop_front()
        {
            sum += rows;
            requests.push((key, rows));
        }
        let number = self.next;
        self.next += 1;
        self.busy = true;
        Some(ServeBatch {
            number,
            rows: sum,
            requests,
        })
    }
}

#[cfg(test)]
mod tests {
    use trefoil_transport::Pin;

    use super::*;

    fn key(request: u8) -> RequestKey {
        RequestKey {
            member: Pin::from_bytes([1; 32]),
            request: [request; 16],
        }
    }

    fn hold(ledger: &mut Ledger, request: u8, rows: u32, now: Instant) {
        for party in PartyId::ALL {
            assert_eq!(ledger.holds(party, key(request), rows, now), None);
        }
    }

    #[test]
    fn a_batch_waits_for_others_and_then_takes_what_fits_in_order() {
        let start = Instant::now();
        let wait = Duration::from_millis(10);
        let mut ledger = Ledger::new(4, wait);
        assert_eq!(ledger.wake_at(), None);
        hold(&mut ledger, 1, 2, start);
        assert_eq!(ledger.compose(start), None);
        assert_eq!(ledger.wake_at(), Some(start + wait));
        hold(&mut ledger, 2, 1, start);
        let first = ledger.compose(start + wait).unwrap();
        assert_eq!((first.number, first.rows), (0, 3));
        assert_eq!(first.requests, [(key(1), 2), (key(2), 1)]);
        // A full batch does not wait, but for the one that runs.
        for request in 3..6 {
            hold(&mut ledger, request, 2, start);
        }
        assert_eq!(ledger.compose(start + wait), None);
        assert_eq!(ledger.wake_at(), None);
        ledger.done();
        let second = ledger.compose(start).unwrap();
        assert_eq!((second.number, second.rows), (1, 4));
        ledger.done();
        assert_eq!(ledger.compose(start), None, "one is left, which waits");
        assert!(ledger.gone(&key(5)) && !ledger.gone(&key(5)));
        assert_eq!(ledger.compose(start + wait), None);
    }

    #[test]
    fn a_request_that_a_party_lacks_or_has_otherwise_is_given_up() {
        let start = Instant::now();
        let mut ledger = Ledger::new(4, Duration::ZERO);
        assert_eq!(ledger.holds(PartyId::P1, key(1), 1, start), None);
        assert_eq!(ledger.holds(PartyId::P0, key(1), 1, start), None);
        assert_eq!(ledger.compose(start), None);
        assert!(ledger.expired(start).is_empty());
        let given_up = ledger.expired(start + REQUEST_WAIT);
        assert_eq!(given_up[0].0, [key(1)]);
        assert!(
            given_up[0].1.contains("P2 has not received"),
            "{given_up:?}"
        );
        assert_eq!(ledger.wake_at(), None);

        ledger.holds(PartyId::P0, key(2), 1, start);
        ledger.holds(PartyId::P1, key(2), 1, start);
        let reason = ledger.holds(PartyId::P2, key(2), 2, start).unwrap();
        assert!(reason.contains("1, 1 and 2 images"), "{reason}");
        assert_eq!(ledger.compose(start), None);
    }
}
