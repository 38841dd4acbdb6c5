//! A bounded queue of frames between a plain thread and a task of the runtime.
//!
//! Exactly one side blocks (the protocol thread) and one side awaits (the task
//! that reads or writes the stream). The bound is in bytes; one frame is always
//! admitted, however long, so that a whole round never waits for itself.

use crate::link::Delivery;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use trefoil_protocol::transport::NetError;

/// How a queue ended.
#[derive(Clone, Debug)]
pub(crate) enum End {
    /// No more frames will be put in; those inside are still to be taken.
    Finished,
    /// Nobody takes frames any more.
    Abandoned,
    /// The session failed.
    Failed(NetError),
}

/// Why a blocking call did nothing.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The queue has ended.
    Ended(End),
    /// The deadline passed.
    Timeout,
}

pub(crate) struct FrameQueue {
    state: Mutex<State>,
    /// Wakes the blocking side.
    blocking: Condvar,
    /// Wakes the awaiting side, for frames, space and the end alike.
    awaiting: Notify,
    /// True where a blocking receive would return at once; what it spins on.
    ready: AtomicBool,
    limit_bytes: u64,
}

struct State {
    frames: VecDeque<Bytes>,
    bytes: u64,
    /// Taken by the awaiting side so far, in charges.
    sent: u64,
    /// The awaiting side takes a frame while it has taken less than this; `None`: always.
    credit: Option<u64>,
    end: Option<End>,
    /// The blocking side sleeps and must be woken.
    asleep: bool,
    /// The awaiting side waits for space and must be woken.
    wants_space: bool,
    /// Held until the last frame of a finished queue has been delivered.
    delivery: Option<Delivery>,
}

impl FrameQueue {
    pub(crate) fn new(limit_bytes: u64) -> FrameQueue {
        FrameQueue {
            state: Mutex::new(State {
                frames: VecDeque::new(),
                bytes: 0,
                sent: 0,
                credit: None,
                end: None,
                asleep: false,
                wants_space: false,
                delivery: None,
            }),
            blocking: Condvar::new(),
            awaiting: Notify::new(),
            ready: AtomicBool::new(false),
            limit_bytes,
        }
    }

    /// A queue whose frames the awaiting side takes as far as [`FrameQueue::grant`] lets it.
    pub(crate) fn on_credit(self) -> FrameQueue {
        self.lock().credit = Some(0);
        self
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the awaiting side take frames until what it has taken, in [`charge`]s since the
    /// beginning, reaches `total`. The frame that reaches it may exceed it. Never takes back.
    pub(crate) fn grant(&self, total: u64) {
        let mut state = self.lock();
        if let Some(credit) = &mut state.credit {
            *credit = total.max(*credit);
            self.wake(state);
        }
    }

    /// Blocking side: puts a frame in, waiting for space at most `timeout`.
    pub(crate) fn push_blocking(&self, frame: Bytes, timeout: Duration) -> Result<(), Refusal> {
        let mut state = self.lock();
        let mut deadline = None;
        loop {
            if let Some(end) = &state.end {
                return Err(Refusal::Ended(end.clone()));
            }
            if state.admits(self.limit_bytes) {
                state.put(frame);
                drop(state);
                self.awaiting.notify_one();
                return Ok(());
            }
            state = self.sleep(
                state,
                *deadline.get_or_insert_with(|| Instant::now() + timeout),
            )?;
        }
    }

    /// Blocking side: takes the next frame, waiting at most `timeout`, of which
    /// at most `spin` without sleeping.
    pub(crate) fn pop_blocking(&self, timeout: Duration, spin: Duration) -> Result<Bytes, Refusal> {
        if !spin.is_zero() && !self.ready.load(Ordering::Acquire) {
            let start = Instant::now();
            while !self.ready.load(Ordering::Acquire) && start.elapsed() < spin {
                (0..32).for_each(|_| std::hint::spin_loop());
            }
        }
        let mut state = self.lock();
        let mut deadline = None;
        loop {
            if let Some(frame) = state.take() {
                self.ready.store(state.is_ready(), Ordering::Release);
                let wanted = state.wants_space && state.admits(self.limit_bytes);
                state.wants_space &= !wanted;
                drop(state);
                // A wake of the runtime's thread costs more than the rest of this.
                if wanted {
                    self.awaiting.notify_one();
                }
                return Ok(frame);
            }
            if let Some(end) = &state.end {
                return Err(Refusal::Ended(end.clone()));
            }
            state = self.sleep(
                state,
                *deadline.get_or_insert_with(|| Instant::now() + timeout),
            )?;
        }
    }

    fn sleep<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        deadline: Instant,
    ) -> Result<MutexGuard<'a, State>, Refusal> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Refusal::Timeout);
        }
        state.asleep = true;
        let (mut state, _) = self
            .blocking
            .wait_timeout(state, left)
            .unwrap_or_else(PoisonError::into_inner);
        state.asleep = false;
        Ok(state)
    }

    /// Awaiting side: waits until a frame may be put in.
    pub(crate) async fn space(&self) -> Result<(), End> {
        loop {
            {
                let mut state = self.lock();
                if let Some(end) = &state.end {
                    return Err(end.clone());
                }
                if state.admits(self.limit_bytes) {
                    return Ok(());
                }
                state.wants_space = true;
            }
            self.awaiting.notified().await;
        }
    }

    /// Awaiting side: puts a frame in; call after [`FrameQueue::space`].
    pub(crate) fn push(&self, frame: Bytes) {
        let mut state = self.lock();
        if state.end.is_none() {
            state.put(frame);
            self.wake(state);
        }
    }

    /// Awaiting side: the next frame, or how the queue ended once it is empty.
    pub(crate) async fn pop(&self) -> Result<Bytes, End> {
        loop {
            {
                let mut state = self.lock();
                if state.may_send()
                    && let Some(frame) = state.take()
                {
                    state.sent = state.sent.saturating_add(charge(&frame));
                    self.wake(state);
                    return Ok(frame);
                }
                if let Some(end) = &state.end
                    && state.frames.is_empty()
                {
                    return Err(end.clone());
                }
            }
            self.awaiting.notified().await;
        }
    }

    /// Awaiting side: waits until nobody wants the frames any more. A finished
    /// queue is not broken: what is in it is still wanted.
    pub(crate) async fn broken(&self) -> End {
        loop {
            match &self.lock().end {
                Some(End::Finished) | None => {}
                Some(end) => return end.clone(),
            }
            self.awaiting.notified().await;
        }
    }

    /// Ends the queue after the frames in it. `delivery` is kept until they are out.
    pub(crate) fn finish(&self, delivery: Option<Delivery>) {
        let mut state = self.lock();
        if state.end.is_none() {
            state.end = Some(End::Finished);
            state.delivery = delivery;
            self.wake(state);
        }
    }

    /// The guard given to [`FrameQueue::finish`], for who delivers the frames.
    pub(crate) fn take_delivery(&self) -> Option<Delivery> {
        self.lock().delivery.take()
    }

    /// Ends the queue and drops the frames: nobody will take them.
    pub(crate) fn abandon(&self) {
        let mut state = self.lock();
        state.clear();
        state.end.get_or_insert(End::Abandoned);
        self.wake(state);
    }

    /// Ends the queue with an error. What a peer sent before it was lost may
    /// still be taken, unless `at_once`.
    pub(crate) fn fail(&self, err: NetError, at_once: bool) {
        let mut state = self.lock();
        if at_once {
            state.clear();
        }
        if !matches!(state.end, Some(End::Abandoned | End::Failed(_))) {
            state.end = Some(End::Failed(err));
            state.delivery = None;
        }
        self.wake(state);
    }

    fn wake(&self, state: MutexGuard<'_, State>) {
        let asleep = state.asleep;
        self.ready.store(state.is_ready(), Ordering::Release);
        drop(state);
        if asleep {
            self.blocking.notify_one();
        }
        self.awaiting.notify_one();
    }
}

/// What a frame takes of the bound: small ones cost their place in the queue too, so that a flood of
/// empty frames is bounded. Both ends of a stream on credit count with it.
pub(crate) fn charge(frame: &Bytes) -> u64 {
    frame.len() as u64 + 64
}

impl State {
    fn admits(&self, limit_bytes: u64) -> bool {
        self.frames.is_empty() || self.bytes < limit_bytes
    }

    fn may_send(&self) -> bool {
        self.credit.is_none_or(|credit| self.sent < credit)
    }

    fn is_ready(&self) -> bool {
        !self.frames.is_empty() || self.end.is_some()
    }

    fn put(&mut self, frame: Bytes) {
        self.bytes += charge(&frame);
        self.frames.push_back(frame);
    }

    fn take(&mut self) -> Option<Bytes> {
        let frame = self.frames.pop_front()?;
        self.bytes -= charge(&frame);
        Some(frame)
    }

    fn clear(&mut self) {
        self.frames.clear();
        self.bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use trefoil_protocol::party::Peer;

    const SOON: Duration = Duration::from_millis(1);

    #[test]
    fn one_frame_is_always_admitted_and_then_the_bound_holds() {
        let queue = FrameQueue::new(10);
        queue
            .push_blocking(Bytes::from(vec![0; 1000]), SOON)
            .unwrap();
        assert!(matches!(
            queue.push_blocking(Bytes::from_static(b"x"), SOON),
            Err(Refusal::Timeout)
        ));
        assert_eq!(
            queue.pop_blocking(SOON, Duration::ZERO).unwrap().len(),
            1000
        );
        queue.push_blocking(Bytes::new(), SOON).unwrap();
        assert!(matches!(
            queue.push_blocking(Bytes::new(), SOON),
            Err(Refusal::Timeout)
        ));
    }

    #[test]
    fn frames_before_a_lost_link_are_still_taken_but_not_before_an_abort() {
        let closed = NetError::Closed {
            peer: Peer::Dealer,
            reason: "gone".into(),
        };
        for at_once in [false, true] {
            let queue = FrameQueue::new(10);
            queue.push_blocking(Bytes::from_static(b"x"), SOON).unwrap();
            queue.fail(closed.clone(), at_once);
            assert_eq!(queue.pop_blocking(SOON, SOON).is_ok(), !at_once);
            match queue.pop_blocking(SOON, SOON) {
                Err(Refusal::Ended(End::Failed(err))) => assert_eq!(err, closed),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_sleeping_receiver_is_woken_by_a_frame_and_by_a_failure() {
        let queue = std::sync::Arc::new(FrameQueue::new(10));
        let receiver = {
            let queue = queue.clone();
            std::thread::spawn(move || {
                let long = Duration::from_secs(60);
                let first = queue.pop_blocking(long, Duration::ZERO).unwrap();
                (first, queue.pop_blocking(long, Duration::ZERO))
            })
        };
        queue.push(Bytes::from_static(b"frame"));
        queue.fail(
            NetError::Aborted {
                by: "P1".into(),
                reason: "enough".into(),
            },
            false,
        );
        let (first, second) = receiver.join().unwrap();
        assert_eq!(&first[..], b"frame");
        assert!(matches!(
            second,
            Err(Refusal::Ended(End::Failed(NetError::Aborted { .. })))
        ));
    }

    #[test]
    fn on_credit_a_frame_goes_while_less_has_gone_than_was_granted() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let queue = FrameQueue::new(1 << 20).on_credit();
        for _ in 0..3 {
            queue.push_blocking(Bytes::from(vec![0; 36]), SOON).unwrap();
        }
        let pop = || runtime.block_on(async { tokio::time::timeout(SOON, queue.pop()).await });
        assert!(pop().is_err());
        // A frame of 36 bytes counts 100: the second reaches 150 and exceeds it.
        queue.grant(150);
        assert!(matches!(pop(), Ok(Ok(_))));
        assert!(matches!(pop(), Ok(Ok(_))));
        queue.grant(1);
        queue.finish(None);
        assert!(pop().is_err(), "what is left waits for credit");
        queue.grant(201);
        assert!(matches!(pop(), Ok(Ok(_))));
        assert!(matches!(pop(), Ok(Err(End::Finished))));
    }

    #[test]
    fn who_waits_for_space_is_woken_when_there_is_some() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let queue = std::sync::Arc::new(FrameQueue::new(10));
        for _ in 0..2 {
            queue.push(Bytes::from(vec![0; 1000]));
        }
        let taking = {
            let queue = queue.clone();
            std::thread::spawn(move || {
                for _ in 0..2 {
                    // The other side waits by then.
                    std::thread::sleep(Duration::from_millis(20));
                    queue.pop_blocking(SOON, Duration::ZERO).unwrap();
                }
            })
        };
        let space = async { tokio::time::timeout(Duration::from_secs(20), queue.space()).await };
        assert!(matches!(runtime.block_on(space), Ok(Ok(()))));
        taking.join().unwrap();
    }
}
