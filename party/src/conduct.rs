//! P0's part while a session runs: hears the other nodes, says which states all three parties have
//! written down, and has all stop at one step where a node wants to leave (`halt.rs`).

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use trefoil_consortium::host::told_to_stop;
use trefoil_consortium::wire::{Follow, Lead, NodeStats, attributed, clip_reason};
use trefoil_consortium::{Ending, Mark};
use trefoil_protocol::party::Peer;
use trefoil_transport::{MsgReceiver, MsgSender};

use crate::daemon::Party;
use crate::follow::FOLLOWERS;
use crate::halt::{Halt, Stopping};
use crate::lead::{Follower, misplaced, next};
use crate::resume;
use crate::session::{self, Outcome, Session};

/// The dealer's place after the three parties.
const DEALER: usize = 3;

/// From the start to the last step at all nodes: what is to be kept here, and what the dealer
/// counted. `own` is what this party's session says, `decisions` with which step it goes on after one
/// that an early stop decides.
pub(crate) async fn conduct(
    party: &Arc<Party>,
    session: Session,
    mut own: UnboundedReceiver<Follow>,
    mut decisions: UnboundedReceiver<(u64, u64)>,
    followers: &mut [Follower; 3],
) -> Result<(Outcome, NodeStats), Ending> {
    let job = session.job.id;
    let halt = session.halt.clone();
    let every = session.job.description.checkpoint_every;
    let schedule = session.prepared.derived.schedule.clone();
    let (sender, mut said) = unbounded_channel();
    let [p1, p2, dealer] = followers;
    let mut to = Voices {
        halt,
        senders: [&mut p1.sender, &mut p2.sender],
        wait: party.wait(),
    };
    let listening = async {
        tokio::select! {
            ending = listen(1, &mut p1.receiver, &sender) => ending,
            ending = listen(2, &mut p2.receiver, &sender) => ending,
            ending = listen(DEALER, &mut dealer.receiver, &sender) => ending,
        }
    };
    let running = session::run(party, session);
    tokio::pin!(running, listening);
    let late = tokio::time::sleep(Duration::MAX);
    tokio::pin!(late);
    let (mut outcome, mut finished) = (None, [None, None, None]);
    let (mut written, mut stopping) = (Written::default(), Stopping::default());
    loop {
        let (who, word) = tokio::select! {
            ended = &mut running, if outcome.is_none() => {
                outcome = Some(ended?);
                late.as_mut().reset(tokio::time::Instant::now() + party.wait());
                (0, None)
            }
            ending = &mut listening => {
                session::abort_job(party, job, ending.reason());
                return Err(ending);
            }
            Some(word) = own.recv() => (0, Some(word)),
            Some((step, next)) = decisions.recv() => {
                let word = Lead::GoOn { step, next };
                // A link that is gone ends the session anyway.
                let _ = tokio::time::timeout(party.wait(), dealer.sender.send(&word)).await;
                (0, None)
            }
            Some((who, word)) = said.recv() => (who, Some(word)),
            why = told_to_stop(party.stopping.subscribe()), if stopping.why.is_none() => {
                (0, Some(Follow::Stop(why)))
            }
            () = &mut late, if outcome.is_some() => {
                let waited_ms = party.wait().as_millis();
                let reason = format!("not all nodes finished within {waited_ms} ms");
                return Err(Ending::Interrupted(reason));
            }
        };
        match word {
            Some(Follow::Finished(stats)) if who > 0 => finished[who - 1] = Some(stats),
            Some(Follow::Written(mark)) => {
                if let Some(mark) = written.all(who, mark) {
                    resume::written_by_all(party, job, mark);
                    to.say(&Lead::Written(mark)).await;
                }
            }
            Some(Follow::Stop(why)) if stopping.why.is_none() => {
                let why = clip_reason(&attributed(node(who), &why));
                tracing::info!("{why}: the session stops at the end of a step");
                stopping.why = Some(why);
                to.say(&Lead::Hold).await;
            }
            Some(Follow::Holds(step)) => {
                if let Some(next) = stopping.holds(who, step) {
                    let step = schedule.stop_before(every, next);
                    to.say(&Lead::StopBefore(step)).await;
                }
            }
            Some(Follow::Stopped) if stopping.stopped(who) => {
                return Err(Ending::Interrupted(stopping.why.unwrap_or_default()));
            }
            _ => {}
        }
        if finished.iter().all(Option::is_some)
            && let Some(outcome) = outcome.take()
            && let Some(dealt) = finished[DEALER - 1].take()
        {
            return Ok((outcome, dealt));
        }
    }
}

/// The ways to all three parties.
struct Voices<'a> {
    halt: Arc<Halt>,
    senders: [&'a mut MsgSender; 2],
    wait: Duration,
}

impl Voices<'_> {
    async fn say(&mut self, word: &Lead) {
        self.halt.hear(word);
        for sender in &mut self.senders {
            // A link that is gone ends the session anyway.
            let _ = tokio::time::timeout(self.wait, sender.send(word)).await;
        }
    }
}

fn node(who: usize) -> Peer {
    match who.checked_sub(1) {
        Some(at) => FOLLOWERS[at.min(DEALER - 1)],
        None => Peer::Party(trefoil_protocol::party::PartyId::P0),
    }
}

/// Passes on what a node says as long as the session runs; returns how it ended there. A node that
/// has finished may be lost: what it has to keep it hears of later.
async fn listen(
    who: usize,
    receiver: &mut MsgReceiver,
    pass: &UnboundedSender<(usize, Follow)>,
) -> Ending {
    let peer = node(who);
    let mut finished = false;
    loop {
        let word = match next(peer, receiver).await {
            Ok(word) => word,
            Err(_) if finished => std::future::pending().await,
            Err(ending) => return ending,
        };
        let party = peer != Peer::Dealer;
        match &word {
            Follow::Finished(_) => finished = true,
            Follow::Stop(_) => {}
            Follow::Written(_) | Follow::Holds(_) | Follow::Stopped if party => {}
            other => return misplaced(peer, other, "during the session"),
        }
        // An error means that nobody counts any more.
        let _ = pass.send((who, word));
    }
}

/// Who has written the newest state down.
#[derive(Default)]
struct Written {
    mark: Option<Mark>,
    by: [bool; 3],
}

impl Written {
    /// Notes that a party has a state; the mark where all three have it now.
    fn all(&mut self, who: usize, mark: Mark) -> Option<Mark> {
        // Within one session all have the same ones, one after the other.
        if self.mark.is_none_or(|newest| newest.step < mark.step) {
            *self = Written {
                mark: Some(mark),
                by: [false; 3],
            };
        }
        if self.mark != Some(mark) {
            return None;
        }
        *self.by.get_mut(who)? = true;
        (self.by == [true; 3]).then_some(mark)
    }
}
