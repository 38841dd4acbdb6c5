//! Reasons on their way from node to node: bounded, and with the name of whoever gave them.

use std::fmt;

use trefoil_protocol::transport::NetError;

/// Longest reason that is passed on.
pub const REASON_MAX_CHARS: usize = 2_000;

/// At most [`REASON_MAX_CHARS`] of a reason, without control characters.
pub fn clip_reason(reason: &str) -> String {
    reason
        .chars()
        .take(REASON_MAX_CHARS)
        .map(|c| if c.is_control() && c != '\n' { ' ' } else { c })
        .collect()
}

/// A reason with the name of the node that gave it, once.
pub fn attributed(node: impl fmt::Display, reason: &str) -> String {
    let node = node.to_string();
    if reason.starts_with(&node) {
        reason.into()
    } else {
        format!("{node}: {reason}")
    }
}

/// A reason that a node gave and that may be about another node: it says whose word it is, once.
pub fn reported(node: impl fmt::Display, reason: &str) -> String {
    let node = node.to_string();
    if reason.starts_with(&node) {
        reason.into()
    } else {
        format!("{node} reports: {reason}")
    }
}

/// Why a node's part of a session failed: in the words of whoever ended it, where somebody did.
pub fn session_failure(me: impl fmt::Display, failure: Option<NetError>, own: &str) -> String {
    match failure {
        Some(NetError::Aborted { by, reason }) => attributed(by, &reason),
        _ => attributed(me, own),
    }
}

#[cfg(test)]
mod tests {
    use trefoil_protocol::party::{PartyId, Peer};

    use super::*;

    #[test]
    fn a_reported_reason_says_once_whose_word_it_is() {
        let p1 = Peer::Party(PartyId::P1);
        assert_eq!(
            reported(p1, "the dealer is late"),
            "P1 reports: the dealer is late"
        );
        assert_eq!(reported(p1, "P1: no disk"), "P1: no disk");
    }
}
