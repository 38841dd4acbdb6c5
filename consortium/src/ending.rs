//! How a node's part in a session ends before its time: for good, or so that the job can be taken up
//! again in another session.
//!
//! Every node judges what it has seen itself. A node that another one has ended takes the session
//! for interrupted: where the other has a better reason, it refuses the next session and says why.

use trefoil_protocol::run::StepError;
use trefoil_protocol::transport::NetError;
use trefoil_transport::TransportError;

/// Why a session has ended here, in words that name the node at fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// A peer, a link or time was missing: another session may succeed.
    Interrupted(String),
    /// No other session will do better, or none is wanted.
    Over(String),
}

impl Ending {
    /// The reason.
    pub fn reason(&self) -> &str {
        match self {
            Ending::Interrupted(reason) | Ending::Over(reason) => reason,
        }
    }

    /// The same ending with other words.
    pub fn map(self, words: impl FnOnce(&str) -> String) -> Ending {
        match self {
            Ending::Interrupted(reason) => Ending::Interrupted(words(&reason)),
            Ending::Over(reason) => Ending::Over(words(&reason)),
        }
    }

    /// The ending that a failed step is.
    pub fn of_step(err: &StepError) -> Ending {
        let reason = err.to_string();
        match err {
            StepError::Net(
                NetError::Timeout { .. } | NetError::Closed { .. } | NetError::Aborted { .. },
            ) => Ending::Interrupted(reason),
            StepError::Net(NetError::Protocol { .. }) | StepError::State { .. } => {
                Ending::Over(reason)
            }
        }
    }

    /// The ending that a session is which could not be set up.
    pub fn of_start(err: &TransportError) -> Ending {
        let reason = err.to_string();
        match err {
            TransportError::HelloMismatch(_)
            | TransportError::Malformed { .. }
            | TransportError::Setting { .. } => Ending::Over(reason),
            _ => Ending::Interrupted(reason),
        }
    }
}

#[cfg(test)]
mod tests {
    use trefoil_protocol::party::{PartyId, Peer};

    use super::*;

    #[test]
    fn a_lost_peer_interrupts_and_a_peer_that_breaks_the_protocol_ends() {
        let peer = Peer::Party(PartyId::P2);
        let reason = "gone".to_owned();
        let lost = StepError::Net(NetError::Closed { peer, reason });
        assert!(matches!(Ending::of_step(&lost), Ending::Interrupted(why) if why.contains("P2")));
        let detail = "opened other values".into();
        let broken = StepError::Net(NetError::Protocol { peer, detail });
        assert!(matches!(Ending::of_step(&broken), Ending::Over(why) if why.contains("P2")));
    }
}
