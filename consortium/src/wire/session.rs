//! What the nodes say to each other about a session: P0 proposes and leads, the others follow.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::NodeStats;
use crate::session::{Attempt, Mark, Nonce, SessionId};
use crate::{JobDescription, JobId};

/// The first message of a stream that P0 opens for a session.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Proposal {
    /// [`CONTROL_VERSION`].
    pub version: u32,
    /// The proposer's software.
    pub software: String,
    /// What to compute.
    pub job: JobDescription,
    /// To the dealer: which attempt. P1 and P2 hear it with [`Lead::Prepare`].
    pub attempt: Attempt,
    /// P0's nonce.
    pub nonce: Nonce,
}

/// What P0 says after a proposal.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Lead {
    /// To P1 and P2: all three parties consent, prepare this attempt at the job.
    Prepare(Attempt),
    /// To P1 or P2 instead: the job is done, with the state of this mark; keep what there is to keep.
    Keep(Mark),
    /// To P1 and P2: not all parties consent yet; P0 will ask again.
    Later,
    /// All have accepted: the nonces of P0, P1, P2 and the dealer, and the session's id.
    Confirm {
        /// In order of the nodes.
        nonces: [Nonce; 4],
        /// The id that follows.
        session: SessionId,
    },
    /// All know the session: exchange keys and start.
    Go,
    /// All have finished: keep what there is to keep.
    Conclude,
    /// All three parties have written this state down: older ones may go.
    Written(Mark),
    /// To the dealer: the parties go on from one step with another, which an early stop decides.
    GoOn {
        /// The step that decided it.
        step: u64,
        /// The next one.
        next: u64,
    },
    /// It is over.
    Abandon(String),
    /// The session is over, the job is not: it waits for another session.
    Pause(String),
    /// To P1 and P2: a node wants to stop. Answer [`Follow::Holds`], and begin no step from there on
    /// before [`Lead::StopBefore`].
    Hold,
    /// To P1 and P2: write the state before this step down, answer [`Follow::Stopped`], and begin no
    /// step more.
    StopBefore(u64),
}

/// What the other nodes answer P0.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Follow {
    /// P1 or P2 consents to the job: its policy allows it, or a person there has approved it.
    Consent(Holds),
    /// P1 or P2 cannot say yet, and why: an earlier session of the job still ends there.
    Busy(String),
    /// The job waits for approval at P1 or P2.
    Waiting,
    /// The node has derived the same job and will take part.
    Accept(Acceptance),
    /// It will not, and why.
    Refuse(String),
    /// It knows the session.
    Ready,
    /// It has executed all steps.
    Finished(NodeStats),
    /// It has kept what there was to keep.
    Concluded,
    /// P1 or P2 has written this state down.
    Written(Mark),
    /// It has failed.
    Failed(String),
    /// Its part has ended for want of a peer, a link or time: it would take part in another session.
    Interrupted(String),
    /// It is told to stop, and why: it would like to leave at the end of a step.
    Stop(String),
    /// P1 or P2 does not begin this step before P0 has named the last one.
    Holds(u64),
    /// P1 or P2 has written down what it could, and begins no step more.
    Stopped,
}

/// What a party has of a job's earlier sessions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holds {
    /// Sessions that were begun here.
    pub attempts: u32,
    /// States that are written down here and can be read.
    pub marks: Vec<Mark>,
}

/// What an accepting node has found on its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acceptance {
    /// Its software.
    pub software: String,
    /// The job hash as it computes it.
    pub job: JobId,
    /// Its programs' hashes.
    pub programs: Vec<[u8; 32]>,
    /// The training session that its shares of the job's model come from.
    pub model: Option<SessionId>,
    /// The dealer's: a name of the key of the rounding coins, see
    /// [`coin_name`](crate::config::coin_name).
    pub coins: Option<[u8; 32]>,
    /// Its nonce.
    pub nonce: Nonce,
}

/// The one message of a key stream: a party's key to the dealer, or the lower party's to the
/// higher. Kept in memory only.
#[derive(Serialize, Deserialize)]
pub struct SessionKey(pub [u8; 16]);

impl fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionKey(..)")
    }
}

/// The receiver's word that a key has arrived.
#[derive(Debug, Serialize, Deserialize)]
pub struct KeyReceived;
