//! Stopping at the end of a step. A node that is told to stop tells P0 (`conduct.rs`); P0 asks the
//! three parties which step each would begin next and has not begun. All stop at the first place from
//! the latest of these on where the job can be taken up again: they write their state down before that
//! step, and the job goes on there in another session.
//!
//! The answer is given at once, not at the step's end: a party that waited with it while another one
//! waits for its frames would hold up both.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::mpsc::UnboundedSender;
use trefoil_consortium::wire::{Follow, Lead};

/// What the protocol thread of a session hears while it runs, and says.
#[derive(Debug)]
pub(crate) struct Halt {
    state: Mutex<State>,
    changed: Condvar,
    says: UnboundedSender<Follow>,
}

#[derive(Debug, Default)]
struct State {
    /// The next step that is not begun.
    next: u64,
    /// P0 has asked: it is not begun before P0's word.
    held: bool,
    /// No step from here on is begun.
    before: Option<u64>,
    /// The session has ended: nobody waits any more.
    over: bool,
}

impl Halt {
    /// Of a session whose first step is `from`; `says` goes to P0.
    pub(crate) fn new(from: u64, says: UnboundedSender<Follow>) -> Arc<Halt> {
        let state = State {
            next: from,
            ..State::default()
        };
        Arc::new(Halt {
            state: Mutex::new(state),
            changed: Condvar::new(),
            says,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says something to P0.
    pub(crate) fn say(&self, word: Follow) {
        // An error means that nobody waits for it any more.
        let _ = self.says.send(word);
    }

    /// Takes P0's word; whether it is about stopping.
    pub(crate) fn hear(&self, word: &Lead) -> bool {
        let mut state = self.lock();
        match word {
            Lead::Hold => {
                state.held = true;
                self.say(Follow::Holds(state.next));
            }
            Lead::StopBefore(step) => state.before = Some(*step),
            _ => return false,
        }
        drop(state);
        self.changed.notify_all();
        true
    }

    /// Called by the protocol thread before a step, or after the last one: whether to stop here. May
    /// wait for P0's word.
    pub(crate) fn stops_before(&self, step: u64) -> bool {
        let state = self.lock();
        let undecided = |state: &mut State| state.held && state.before.is_none() && !state.over;
        let waited = self.changed.wait_while(state, undecided);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        state.next = step + 1;
        state.before.is_some_and(|before| before <= step)
    }

    /// Called after the last step: there is none to stop before.
    pub(crate) fn no_more(&self, steps: u64) {
        self.lock().next = steps;
    }

    /// The protocol thread has written down what it could. Waits for the session's end: a party that
    /// left now would cut off frames that others still need.
    pub(crate) fn stopped(&self) {
        self.say(Follow::Stopped);
        let waited = self.changed.wait_while(self.lock(), |state| !state.over);
        drop(waited);
    }

    /// The session has ended.
    pub(crate) fn release(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }
}

/// P0's account of a session that is to stop.
#[derive(Debug, Default)]
pub(crate) struct Stopping {
    /// Why; none while nobody wants to.
    pub(crate) why: Option<String>,
    holds: [Option<u64>; 3],
    stopped: [bool; 3],
}

impl Stopping {
    /// A party holds before `step`: where all stop, once all three have said so.
    pub(crate) fn holds(&mut self, who: usize, step: u64) -> Option<u64> {
        let before = self.holds.iter().all(Option::is_some);
        *self.holds.get_mut(who)? = Some(step);
        let all: Option<Vec<u64>> = self.holds.iter().copied().collect();
        all.filter(|_| !before)?.into_iter().max()
    }

    /// A party has stopped: whether all have.
    pub(crate) fn stopped(&mut self, who: usize) -> bool {
        if let Some(stopped) = self.stopped.get_mut(who) {
            *stopped = true;
        }
        self.stopped == [true; 3]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn halt(from: u64) -> (Arc<Halt>, tokio::sync::mpsc::UnboundedReceiver<Follow>) {
        let (says, said) = tokio::sync::mpsc::unbounded_channel();
        (Halt::new(from, says), said)
    }

    #[test]
    fn parties_in_two_steps_stop_before_the_later_one_and_none_waits_for_another() {
        let (behind, mut said_behind) = halt(3);
        let (ahead, mut said_ahead) = halt(3);
        assert!(!behind.stops_before(3));
        assert!(!ahead.stops_before(3) && !ahead.stops_before(4));
        let mut stopping = Stopping::default();
        for (who, halt) in [(0, &behind), (1, &ahead)] {
            halt.hear(&Lead::Hold);
            let said = if who == 0 {
                &mut said_behind
            } else {
                &mut said_ahead
            };
            // Said at once, in the middle of a step.
            let Ok(Follow::Holds(step)) = said.try_recv() else {
                panic!("no answer")
            };
            assert_eq!(step, 4 + who as u64);
            assert_eq!(stopping.holds(who, step), None);
        }
        assert_eq!(stopping.holds(2, 4), Some(5));
        assert_eq!(stopping.holds(2, 4), None, "decided once");
        for halt in [&behind, &ahead] {
            halt.hear(&Lead::StopBefore(5));
        }
        assert!(!behind.stops_before(4), "one step more");
        assert!(behind.stops_before(5) && ahead.stops_before(5));
        assert!(!stopping.stopped(0) && !stopping.stopped(1) && stopping.stopped(2));
    }

    #[test]
    fn a_party_holds_until_the_word_and_the_end_of_the_session_frees_it() {
        let (halt, mut said) = halt(0);
        halt.hear(&Lead::Hold);
        assert!(matches!(said.try_recv(), Ok(Follow::Holds(0))));
        let waiting = {
            let halt = halt.clone();
            std::thread::spawn(move || halt.stops_before(0))
        };
        halt.hear(&Lead::StopBefore(0));
        assert!(waiting.join().expect("no panic"));
        let (halt, _said) = self::halt(0);
        halt.hear(&Lead::Hold);
        let waiting = {
            let halt = halt.clone();
            std::thread::spawn(move || {
                let stops = halt.stops_before(0);
                halt.stopped();
                stops
            })
        };
        halt.release();
        assert!(!waiting.join().expect("no panic"));
    }
}
