//! The follower's side of a session's state machine: proposal, acceptance, confirmation, start,
//! end. P1, P2 and the dealer go through it; P0's side is in the party's `lead.rs`.
//!
//! P0 orders the steps and has no other power: what it says is recomputed here.

use std::time::Duration;

use trefoil_transport::{MsgStream, TransportError};

use crate::session::{SessionId, session_id};
use crate::wire::{
    Acceptance, CONTROL_MAX_BYTES, CONTROL_VERSION, Follow, Lead, NodeStats, Proposal, clip_reason,
    reported,
};
use crate::{Hex, JobId, SOFTWARE};

/// One proposal of P0 and the way from it to the session's end.
pub struct Following {
    stream: MsgStream,
    wait: Duration,
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
    /// Reads the proposal that a stream of P0 begins with; every later wait is bounded by `wait`.
    pub async fn receive(
        mut stream: MsgStream,
        wait: Duration,
    ) -> Result<(Following, Proposal), String> {
        let proposal =
            match tokio::time::timeout(wait, stream.recv::<Proposal>(CONTROL_MAX_BYTES)).await {
                Ok(Ok(Some(proposal))) => proposal,
                Ok(Ok(None)) => return Err("P0 opened a stream and proposed nothing".into()),
                Ok(Err(err)) => return Err(says(&err)),
                Err(_) => return Err("P0 opened a stream and proposed nothing in time".into()),
            };
        let mut following = Following { stream, wait };
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

    /// Says that this node's part has failed.
    pub async fn failed(&mut self, reason: &str) {
        self.say_last(Follow::Failed(clip_reason(reason))).await;
    }

    async fn say_last(&mut self, message: Follow) {
        if let Err(err) = self.say(&message).await {
            tracing::debug!(%err, "P0 could not be told");
        }
    }

    async fn say(&mut self, message: &Follow) -> Result<(), String> {
        match tokio::time::timeout(self.wait, self.stream.send(message)).await {
            Ok(sent) => sent.map_err(|err| says(&err)),
            Err(_) => Err("P0 takes no messages".into()),
        }
    }

    /// What P0 says next; no deadline of its own.
    async fn next(&mut self) -> Result<Lead, String> {
        match self.stream.recv::<Lead>(CONTROL_MAX_BYTES).await {
            Ok(Some(Lead::Abandon(reason))) => Err(clip_reason(&reported("P0", &reason))),
            Ok(Some(lead)) => Ok(lead),
            Ok(None) => Err("P0 ended the session's stream without a word".into()),
            Err(err) => Err(says(&err)),
        }
    }

    async fn next_in_time(&mut self, what: &str) -> Result<Lead, String> {
        let wait = self.wait;
        match tokio::time::timeout(wait, self.next()).await {
            Ok(lead) => lead,
            Err(_) => Err(format!(
                "P0 did not send {what} within {} ms",
                wait.as_millis()
            )),
        }
    }

    /// P1 or P2 says whether it consents to the proposed job, and hears what becomes of it: `true`
    /// for its preparation, `false` where P0 will ask again. The error is why P0 has given it up.
    ///
    /// # Errors
    /// The outer one: P0 is gone, and the job goes on waiting.
    pub async fn consent(&mut self, consents: bool) -> Result<Result<bool, String>, String> {
        let answer = match consents {
            true => Follow::Consent,
            false => Follow::Waiting,
        };
        self.say(&answer).await?;
        let wait = self.wait;
        let lead = tokio::time::timeout(wait, self.stream.recv::<Lead>(CONTROL_MAX_BYTES)).await;
        match lead {
            Ok(Ok(Some(Lead::Prepare))) if consents => Ok(Ok(true)),
            Ok(Ok(Some(Lead::Later))) => Ok(Ok(false)),
            Ok(Ok(Some(Lead::Abandon(reason)))) => Ok(Err(clip_reason(&reported("P0", &reason)))),
            Ok(Ok(Some(other))) => Err(format!("P0 sent {other:?} after this party's consent")),
            Ok(Ok(None)) => Err("P0 ended the stream after this party's consent".into()),
            Ok(Err(err)) => Err(says(&err)),
            Err(_) => Err(format!(
                "P0 did not say within {} ms what becomes of the job",
                wait.as_millis()
            )),
        }
    }

    /// Accepts, and checks the confirmation: the id must follow from what this node knows, with
    /// its own nonce at its own place.
    pub async fn accept(
        &mut self,
        acceptance: Acceptance,
        core_hash: &[u8; 32],
        job: &JobId,
        attempt: u32,
        my_place: usize,
    ) -> Result<SessionId, String> {
        let nonce = acceptance.nonce;
        self.say(&Follow::Accept(acceptance)).await?;
        let lead = self.next_in_time("a confirmation").await?;
        let Lead::Confirm { nonces, session } = lead else {
            return Err(format!("P0 sent {lead:?} where a confirmation belongs"));
        };
        if nonces.get(my_place) != Some(&nonce) {
            return Err("P0 confirmed a session with another nonce than this node's".into());
        }
        let expected = session_id(core_hash, job, attempt, &nonces);
        if session != expected {
            return Err(format!(
                "P0 confirmed session {}, here it is {}",
                Hex(&session),
                Hex(&expected)
            ));
        }
        Ok(session)
    }

    /// Says that this node knows the session, and waits until all do.
    pub async fn ready(&mut self) -> Result<(), String> {
        self.say(&Follow::Ready).await?;
        match self.next_in_time("the start").await? {
            Lead::Go => Ok(()),
            other => Err(format!("P0 sent {other:?} where the start belongs")),
        }
    }

    /// Waits until P0 abandons the running session, or says anything else.
    pub async fn abandoned(&mut self) -> String {
        match self.next().await {
            Ok(other) => format!("P0 sent {other:?} during the session"),
            Err(reason) => reason,
        }
    }

    /// Says that this node has executed all steps, and waits for the word to keep the results: at
    /// most `wall`, because the dealer is long done when the slowest party is.
    pub async fn finished(&mut self, stats: NodeStats, wall: Duration) -> Result<(), String> {
        self.say(&Follow::Finished(stats)).await?;
        let lead = match tokio::time::timeout(wall, self.next()).await {
            Ok(lead) => lead?,
            Err(_) => {
                return Err(format!(
                    "P0 did not send the conclusion within {} s",
                    wall.as_secs()
                ));
            }
        };
        match lead {
            Lead::Conclude => Ok(()),
            other => Err(format!("P0 sent {other:?} where the conclusion belongs")),
        }
    }

    /// Says that everything is kept: the last word.
    pub async fn concluded(mut self) {
        self.say_last(Follow::Concluded).await;
        // P0 has what it waits for; how the stream ends does not matter.
        let _ = self.stream.finish().await;
    }
}
