//! What lies at one party of a serving session: requests that wait, and where their answers go.
//! No input or output, no waiting.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::mpsc as blocking;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, mpsc, oneshot};
use trefoil_consortium::SessionId;
use trefoil_consortium::wire::{RequestKey, ServeBatch, WireOutput};
use trefoil_models::ServeSpec;
use trefoil_protocol::run::OutputShare;
use trefoil_transport::Pin;

use crate::files::now_s;
use crate::jobs::Job;

/// What a request hears: its batch and this party's share of its rows, or why there is none.
pub(crate) type Reply = Result<(u64, WireOutput), String>;

/// Why a request is not taken.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The same may be asked again.
    Busy(String),
    /// It may not.
    No(String),
}

/// What the protocol thread is told.
#[derive(Debug)]
pub(crate) enum Order {
    /// Run this.
    Batch(ServeBatch),
    /// There are no more.
    End,
}

/// What happens at the desk, for whoever leads or tells P0.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Happening {
    /// A request has come.
    Holds(RequestKey, u32),
    /// Its member has gone before it was answered.
    Gone(RequestKey),
    /// A batch is done.
    Done,
}

/// The desk of one session.
pub(crate) struct ServeDesk {
    pub(crate) job: Arc<Job>,
    pub(crate) session: SessionId,
    pub(crate) spec: ServeSpec,
    /// The session that the model's shares come from.
    pub(crate) model: SessionId,
    /// When it ends, by this party's clock.
    pub(crate) until_s: u64,
    /// Words of one image.
    pub(crate) row_words: usize,
    /// Images of one member a day.
    pub(crate) limit: u64,
    /// The requester ends it.
    pub(crate) stop: Notify,
    inner: Mutex<Inner>,
    happened: mpsc::UnboundedSender<Happening>,
    happenings: Mutex<Option<mpsc::UnboundedReceiver<Happening>>>,
}

struct Inner {
    pending: BTreeMap<RequestKey, Pending>,
    /// Why nothing is taken any more.
    over: Option<String>,
    orders: Option<blocking::Sender<Order>>,
}

struct Pending {
    rows: u32,
    words: Vec<u64>,
    answer: oneshot::Sender<Reply>,
}

/// A request of a batch that runs.
pub(super) struct Slot {
    pub(super) key: RequestKey,
    pub(super) rows: u32,
    /// `None` where the request is not here: its member has been told.
    pub(super) answer: Option<oneshot::Sender<Reply>>,
}

impl fmt::Debug for ServeDesk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ServeDesk({}, {})", self.spec.model, self.job.id)
    }
}

impl ServeDesk {
    /// A desk, and where its protocol thread takes orders from.
    pub(super) fn new(
        job: Arc<Job>,
        session: SessionId,
        model: SessionId,
        row_words: usize,
        limit: u64,
    ) -> (ServeDesk, blocking::Receiver<Order>) {
        let (orders, receiver) = blocking::channel();
        let (happened, happenings) = mpsc::unbounded_channel();
        let spec = job.description.serves().cloned();
        let spec = spec.expect("a desk is opened for a job that serves");
        let desk = ServeDesk {
            until_s: now_s().saturating_add(spec.duration_s),
            job,
            session,
            spec,
            model,
            row_words,
            limit,
            stop: Notify::new(),
            inner: Mutex::new(Inner {
                pending: BTreeMap::new(),
                over: None,
                orders: Some(orders),
            }),
            happened,
            happenings: Mutex::new(Some(happenings)),
        };
        (desk, receiver)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why a request would be refused as one too many now, if it would.
    pub(crate) fn busy(&self) -> Option<String> {
        let full = self.lock().pending.len() >= self.spec.max_pending;
        full.then(|| self.too_many())
    }

    fn too_many(&self) -> String {
        format!("{} requests are waiting already", self.spec.max_pending)
    }

    /// Whether a member may ask.
    pub(crate) fn serves(&self, member: Pin) -> bool {
        self.spec.members.contains(member.as_bytes())
    }

    /// What a member is told of the session: who else may ask is not its business.
    pub(crate) fn shown_spec(&self, member: Pin) -> ServeSpec {
        ServeSpec {
            members: vec![*member.as_bytes()],
            ..self.spec.clone()
        }
    }

    /// Why nothing is taken any more, if it is not.
    pub(crate) fn over(&self) -> Option<String> {
        self.lock().over.clone()
    }

    /// Takes a request. `count` counts its images against the member's bound; it is asked last.
    pub(crate) fn admit(
        &self,
        key: RequestKey,
        rows: u32,
        words: Vec<u64>,
        count: impl FnOnce() -> Result<(), String>,
    ) -> Result<oneshot::Receiver<Reply>, Refusal> {
        let (answer, receiver) = oneshot::channel();
        let mut inner = self.lock();
        if let Some(over) = &inner.over {
            return Err(Refusal::No(over.clone()));
        }
        if inner.pending.contains_key(&key) {
            let reason = "a request of this name is under way: each one needs its own";
            return Err(Refusal::No(reason.into()));
        }
        if inner.pending.len() >= self.spec.max_pending {
            return Err(Refusal::Busy(self.too_many()));
        }
        count().map_err(Refusal::No)?;
        let pending = Pending {
            rows,
            words,
            answer,
        };
        inner.pending.insert(key, pending);
        drop(inner);
        self.happen(Happening::Holds(key, rows));
        Ok(receiver)
    }

    pub(super) fn happen(&self, happening: Happening) {
        // An error means that nobody leads any more.
        let _ = self.happened.send(happening);
    }

    /// A request's member has gone. Its images stay until P0 says what becomes of them.
    pub(crate) fn leave(&self, key: RequestKey) {
        self.happen(Happening::Gone(key));
    }

    /// What happens here; for one taker.
    pub(super) fn happenings(&self) -> Option<mpsc::UnboundedReceiver<Happening>> {
        let mut held = self
            .happenings
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        held.take()
    }

    /// Gives requests up and says why.
    pub(super) fn drop_requests(&self, keys: &[RequestKey], reason: &str) {
        let mut inner = self.lock();
        for key in keys {
            if let Some(pending) = inner.pending.remove(key) {
                // An error means that its member has gone.
                let _ = pending.answer.send(Err(reason.into()));
            }
        }
    }

    /// Tells the protocol thread something.
    pub(super) fn order(&self, order: Order) {
        if let Some(orders) = &self.lock().orders {
            // An error means that the thread has ended.
            let _ = orders.send(order);
        }
    }

    /// Takes nothing any more, and lets the protocol thread go: the first reason counts.
    pub(super) fn close(&self, reason: &str) {
        let pending = {
            let mut inner = self.lock();
            inner.over.get_or_insert_with(|| reason.into());
            inner.orders = None;
            std::mem::take(&mut inner.pending)
        };
        for pending in pending.into_values() {
            let _ = pending.answer.send(Err(reason.into()));
        }
    }

    /// The images of a batch of `size`, padded with zeros, and where the answers go. A request that
    /// is not here counts as zeros: then the three shares of its rows are of nothing, and nobody
    /// gets them all.
    pub(super) fn take(&self, batch: &ServeBatch, size: usize) -> (Vec<u64>, Vec<Slot>) {
        let mut words = Vec::with_capacity(size * self.row_words);
        let mut inner = self.lock();
        let slots = batch.requests.iter().map(|(key, rows)| {
            let pending = inner.pending.remove(key);
            let pending = pending.filter(|pending| pending.rows == *rows);
            let own = *rows as usize * self.row_words;
            let answer = match pending {
                Some(pending) => {
                    words.extend(pending.words);
                    Some(pending.answer)
                }
                None => {
                    tracing::warn!(member = %key.member, "a request of a batch is not here");
                    words.resize(words.len() + own, 0);
                    None
                }
            };
            Slot {
                key: *key,
                rows: *rows,
                answer,
            }
        });
        let slots = slots.collect();
        words.resize(size * self.row_words, 0);
        (words, slots)
    }
}

/// The rows of each request, in order, cut out of an output of `size` rows.
pub(super) fn cut(output: &OutputShare, size: usize, rows: &[u32]) -> Vec<WireOutput> {
    let data = output.share.data();
    let width = data.len() / size.max(1);
    let mut at = 0;
    let cut = rows.iter().map(|rows| {
        let from = at * width;
        at += *rows as usize;
        let mut shape = output.share.shape().iter().map(|side| *side as u64);
        let inner = shape.by_ref().skip(1);
        WireOutput {
            name: output.name.clone(),
            shape: std::iter::once(u64::from(*rows)).chain(inner).collect(),
            words: trefoil_consortium::Words(data[from..at * width].to_vec()),
            xor: output.xor,
            opened: output.opened,
        }
    });
    cut.collect()
}

#[cfg(test)]
mod tests {
    use trefoil_consortium::JobDescription;
    use trefoil_models::{JobKind, PredictOutput};
    use trefoil_protocol::ring::Tensor;

    use super::*;

    fn desk() -> (ServeDesk, blocking::Receiver<Order>) {
        let spec = ServeSpec {
            model: "m".into(),
            network: "name = \"m\"".into(),
            frac_bits: 16,
            ring_bits: 64,
            members: vec![[1; 32], [2; 32]],
            output: PredictOutput::Class,
            max_batch: 4,
            max_wait_ms: 1,
            max_pending: 2,
            rows_per_day: 0,
            duration_s: 60,
        };
        let mut job =
            JobDescription::new("serve", Pin::from_bytes([9; 32]), JobKind::Serve(spec)).unwrap();
        job.limits.wall_time_s = 3600;
        ServeDesk::new(Job::for_tests(job), [1; 32], [2; 32], 2, 10)
    }

    fn key(member: u8, request: u8) -> RequestKey {
        RequestKey {
            member: Pin::from_bytes([member; 32]),
            request: [request; 16],
        }
    }

    #[test]
    fn a_full_desk_is_busy_and_counts_nothing() {
        let (desk, _orders) = desk();
        let admit = |key| desk.admit(key, 1, vec![5, 6], || Ok(()));
        let _a = admit(key(1, 1)).unwrap();
        let twice = admit(key(1, 1)).unwrap_err();
        assert!(matches!(twice, Refusal::No(reason) if reason.contains("under way")));
        // Another member's request of the same name is another one.
        let _b = admit(key(2, 1)).unwrap();
        // Known before the images of a request are received and its seeds expanded.
        assert!(
            desk.busy()
                .is_some_and(|reason| reason.contains("2 requests"))
        );
        let full = desk.admit(key(1, 2), 1, vec![1, 2], || panic!("counted"));
        assert!(
            matches!(full.unwrap_err(), Refusal::Busy(reason) if reason.contains("2 requests"))
        );
        desk.drop_requests(&[key(2, 1)], "gone");
        assert_eq!(desk.busy(), None);
        let over = desk.admit(key(1, 2), 1, vec![1, 2], || Err("10 a day".into()));
        assert_eq!(over.unwrap_err(), Refusal::No("10 a day".into()));
    }

    #[test]
    fn a_batch_has_its_requests_rows_in_order_and_zeros_for_one_that_is_missing() {
        let (desk, _orders) = desk();
        let mut one = desk.admit(key(1, 1), 1, vec![5, 6], || Ok(())).unwrap();
        let _two = desk
            .admit(key(2, 1), 2, vec![7, 8, 9, 10], || Ok(()))
            .unwrap();
        let batch = ServeBatch {
            number: 0,
            rows: 4,
            requests: vec![(key(2, 1), 2), (key(1, 7), 1), (key(1, 1), 1)],
        };
        let (words, slots) = desk.take(&batch, 5);
        assert_eq!(words, [7, 8, 9, 10, 0, 0, 5, 6, 0, 0]);
        let here: Vec<bool> = slots.iter().map(|slot| slot.answer.is_some()).collect();
        assert_eq!(here, [true, false, true]);
        desk.close("it is over");
        assert_eq!(desk.over(), Some("it is over".into()));
        drop(slots);
        assert!(one.try_recv().is_err());
        let refused = desk.admit(key(1, 9), 1, vec![0, 0], || Ok(()));
        assert_eq!(refused.unwrap_err(), Refusal::No("it is over".into()));
    }

    #[test]
    fn an_output_is_cut_into_the_rows_of_each_request() {
        let output = OutputShare {
            name: "logits".into(),
            share: Tensor::new(vec![4, 2], (0..8).collect()),
            xor: false,
            opened: [3; 16],
        };
        let cut = cut(&output, 4, &[1, 2]);
        let words: Vec<&[u64]> = cut.iter().map(|cut| &cut.words.0[..]).collect();
        assert_eq!(words, [&[0, 1][..], &[2, 3, 4, 5][..]]);
        assert_eq!(
            (cut[1].shape.as_slice(), cut[1].opened),
            (&[2, 2][..], [3; 16])
        );
    }
}
