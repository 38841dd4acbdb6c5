//! The follower's side of a session's state machine: proposal, acceptance, confirmation, start,
//! end. P1, P2 and the dealer go through it; P0's side is in the party's `lead.rs`.
//!
//! P0 orders the steps and has no other power: what it says is recomputed here.

use std::time::Duration;

use tokio::sync::{mpsc::UnboundedReceiver, watch};
use trefoil_transport::{MsgStream, TransportError};

use crate::host::told_to_stop;
use crate::session::{Attempt, Mark, SessionId, session_id};
use crate::wire::{
    Acceptance, CONTROL_MAX_BYTES, CONTROL_VERSION, Follow, Holds, Lead, NodeStats, Proposal,
    clip_reason, reported,
};
use crate::{Ending, Hex, JobId, SOFTWARE};

/// How long the word may take that says why P0 has ended a session.
const VERDICT_WAIT: Duration = Duration::from_secs(5);

/// What P0 says to a party's consent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Prepare this attempt.
    Prepare(Attempt),
    /// The job is done with the state of this mark.
    Keep(Mark),
    /// P0 will ask again.
    Later,
    /// P0 has given the job up.
    Over(String),
}

/// One proposal of P0 and the way from it to the session's end.
pub struct Following {
    stream: MsgStream,
    wait: Duration,
    /// Why this node wants to stop, once it does.
    stopping: watch::Receiver<Option<String>>,
    /// P0 has heard of it.
    stop_said: bool,
}

impl std::fmt::Debug for Following {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Following({})", self.stream.link().remote_addr())
    }
}

fn says(err: &TransportError) -> String {
    format!("P0: {err}")
}

impl Following {
    /// Reads the proposal that a stream of P0 begins with; every later wait is bounded by `wait`. P0
    /// hears of `stopping` while a session runs.
    pub async fn receive(
        mut stream: MsgStream,
        wait: Duration,
        stopping: watch::Receiver<Option<String>>,
    ) -> Result<(Following, Proposal), String> {
        let proposal =
            match tokio::time::timeout(wait, stream.recv::<Proposal>(CONTROL_MAX_BYTES)).await {
                Ok(Ok(Some(proposal))) => proposal,
                Ok(Ok(None)) => return Err("P0 opened a stream and proposed nothing".into()),
                Ok(Err(err)) => return Err(says(&err)),
                Err(_) => return Err("P0 opened a stream and proposed nothing in time".into()),
            };
        let mut following = Following {
            stream,
            wait,
            stopping,
            stop_said: false,
        };
        if proposal.version != CONTROL_VERSION {
            let reason = format!(
                "control version {} of P0 ({}), this node speaks {CONTROL_VERSION} ({SOFTWARE})",
                proposal.version, proposal.software
            );
            following.refuse(&reason).await;
            return Err(reason);
        }
        Ok((following, proposal))
    }

    /// Says no. Failure to say so does not matter: P0 hears nothing and gives up.
    pub async fn refuse(&mut self, reason: &str) {
        self.say_last(Follow::Refuse(clip_reason(reason))).await;
    }

    /// Says that this party cannot answer yet.
    pub async fn busy(&mut self, reason: &str) {
        self.say_last(Follow::Busy(clip_reason(reason))).await;
    }

    /// Says that this node's part has ended.
    pub async fn ended(&mut self, ending: &Ending) {
        let word = match ending {
            Ending::Interrupted(reason) => Follow::Interrupted(clip_reason(reason)),
            Ending::Over(reason) => Follow::Failed(clip_reason(reason)),
        };
        self.say_last(word).await;
    }

    /// After an interruption: P0's own word for it, where it comes soon. P0 may know that the job is
    /// over.
    pub async fn verdict(&mut self, own: Ending) -> Ending {
        let hearing = async {
            loop {
                match self.next().await {
                    // What P0 said before it knew.
                    Ok(_) => {}
                    Err(Ending::Over(reason)) => return Some(Ending::Over(reason)),
                    Err(Ending::Interrupted(_)) => return None,
                }
            }
        };
        let heard = tokio::time::timeout(VERDICT_WAIT, hearing).await;
        heard.ok().flatten().unwrap_or(own)
    }

    async fn say_last(&mut self, message: Follow) {
        if let Err(err) = self.say(&message).await {
            tracing::debug!(reason = err.reason(), "P0 could not be told");
        }
    }

    async fn say(&mut self, message: &Follow) -> Result<(), Ending> {
        let sent = match tokio::time::timeout(self.wait, self.stream.send(message)).await {
            Ok(sent) => sent.map_err(|err| says(&err)),
            Err(_) => Err("P0 takes no messages".into()),
        };
        sent.map_err(Ending::Interrupted)
    }

    /// What P0 says next; no deadline of its own.
    async fn next(&mut self) -> Result<Lead, Ending> {
        match self.stream.recv::<Lead>(CONTROL_MAX_BYTES).await {
            Ok(Some(Lead::Abandon(reason))) => {
                Err(Ending::Over(clip_reason(&reported("P0", &reason))))
            }
            Ok(Some(Lead::Pause(reason))) => {
                Err(Ending::Interrupted(clip_reason(&reported("P0", &reason))))
            }
            Ok(Some(lead)) => Ok(lead),
            Ok(None) => Err(Ending::Interrupted(
                "P0 ended the session's stream without a word".into(),
            )),
            Err(err) => Err(Ending::Interrupted(says(&err))),
        }
    }

    async fn next_in_time(&mut self, what: &str) -> Result<Lead, Ending> {
        let wait = self.wait;
        match tokio::time::timeout(wait, self.next()).await {
            Ok(lead) => lead,
            Err(_) => Err(Ending::Interrupted(format!(
                "P0 did not send {what} within {} ms",
                wait.as_millis()
            ))),
        }
    }

    /// P1 or P2 says whether it consents to the proposed job, with what it has of earlier sessions,
    /// and hears what becomes of it.
    ///
    /// # Errors
    /// P0 is gone, and the job goes on waiting.
    pub async fn consent(&mut self, consents: Option<Holds>) -> Result<Next, String> {
        let consented = consents.is_some();
        let answer = consents.map_or(Follow::Waiting, Follow::Consent);
        let gone = |ending: Ending| ending.reason().to_owned();
        self.say(&answer).await.map_err(gone)?;
        match self.next_in_time("what becomes of the job").await {
            Ok(Lead::Prepare(attempt)) if consented => Ok(Next::Prepare(attempt)),
            Ok(Lead::Keep(mark)) if consented => Ok(Next::Keep(mark)),
            Ok(Lead::Later) => Ok(Next::Later),
            Ok(other) => Err(format!("P0 sent {other:?} after this party's consent")),
            Err(Ending::Over(reason)) => Ok(Next::Over(reason)),
            Err(Ending::Interrupted(reason)) => Err(reason),
        }
    }

    /// Accepts, and checks the confirmation: the id must follow from what this node knows, with
    /// its own nonce at its own place.
    pub async fn accept(
        &mut self,
        acceptance: Acceptance,
        core_hash: &[u8; 32],
        job: &JobId,
        attempt: &Attempt,
        my_place: usize,
    ) -> Result<SessionId, Ending> {
        let nonce = acceptance.nonce;
        self.say(&Follow::Accept(acceptance)).await?;
        let lead = self.next_in_time("a confirmation").await?;
        let Lead::Confirm { nonces, session } = lead else {
            return Err(Ending::Over(format!(
                "P0 sent {lead:?} where a confirmation belongs"
            )));
        };
        if nonces.get(my_place) != Some(&nonce) {
            return Err(Ending::Over(
                "P0 confirmed a session with another nonce than this node's".into(),
            ));
        }
        let expected = session_id(core_hash, job, attempt, &nonces);
        if session != expected {
            return Err(Ending::Over(format!(
                "P0 confirmed session {}, here it is {}",
                Hex(&session),
                Hex(&expected)
            )));
        }
        Ok(session)
    }

    /// Says that this node knows the session, and waits until all do.
    pub async fn ready(&mut self) -> Result<(), Ending> {
        self.say(&Follow::Ready).await?;
        match self.next_in_time("the start").await? {
            Lead::Go => Ok(()),
            other => Err(Ending::Over(format!(
                "P0 sent {other:?} where the start belongs"
            ))),
        }
    }

    /// Waits until P0 ends the running session, or says something that does not belong there.
    /// Meanwhile passes on what this node `says`; `hears` is told what P0 says: it says whether that
    /// belongs there.
    pub async fn abandoned(
        &mut self,
        says: &mut UnboundedReceiver<Follow>,
        mut hears: impl FnMut(&Lead) -> bool,
    ) -> Ending {
        loop {
            match self.meanwhile(says).await {
                Ok(Some(lead)) if hears(&lead) => {}
                Ok(Some(other)) => {
                    return Ending::Over(format!("P0 sent {other:?} during the session"));
                }
                Ok(None) => {}
                Err(ending) => return ending,
            }
        }
    }

    /// P0's next word, if it comes before this node has one for P0, which is sent.
    async fn meanwhile(
        &mut self,
        says: &mut UnboundedReceiver<Follow>,
    ) -> Result<Option<Lead>, Ending> {
        let (stopping, said) = (self.stopping.clone(), self.stop_said);
        let stop = told_to_stop(stopping);
        let word = tokio::select! {
            lead = self.next() => return lead.map(Some),
            Some(word) = says.recv() => word,
            why = stop, if !said => {
                self.stop_said = true;
                Follow::Stop(clip_reason(&why))
            }
        };
        self.say(&word).await.map(|()| None)
    }

    /// Says that this node has executed all steps, and waits for the word to keep the results: at
    /// most `wall`, because the dealer is long done when the slowest party is.
    pub async fn finished(
        &mut self,
        stats: NodeStats,
        wall: Duration,
        says: &mut UnboundedReceiver<Follow>,
        mut hears: impl FnMut(&Lead) -> bool,
    ) -> Result<(), Ending> {
        self.say(&Follow::Finished(stats)).await?;
        let waiting = async {
            loop {
                match self.meanwhile(says).await? {
                    Some(lead) if hears(&lead) => {}
                    Some(lead) => return Ok(lead),
                    None => {}
                }
            }
        };
        let lead = match tokio::time::timeout(wall, waiting).await {
            Ok(lead) => lead?,
            Err(_) => {
                return Err(Ending::Interrupted(format!(
                    "P0 did not send the conclusion within {} s",
                    wall.as_secs()
                )));
            }
        };
        match lead {
            Lead::Conclude => Ok(()),
            other => Err(Ending::Over(format!(
                "P0 sent {other:?} where the conclusion belongs"
            ))),
        }
    }

    /// Says that everything is kept: the last word.
    pub async fn concluded(mut self) {
        self.say_last(Follow::Concluded).await;
        // P0 has what it waits for; how the stream ends does not matter.
        let _ = self.stream.finish().await;
    }
}
