//! Roles: the three computing parties and the dealer, as closed enums.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One of the three computing parties.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PartyId {
    /// The first party; it adds public constants and coordinates sessions.
    P0,
    /// The second party.
    P1,
    /// The third party.
    P2,
}

impl PartyId {
    /// All parties in canonical order.
    pub const ALL: [PartyId; 3] = [PartyId::P0, PartyId::P1, PartyId::P2];

    /// 0, 1 or 2.
    pub fn index(self) -> usize {
        self as usize
    }

    /// The party with this index, if it is 0, 1 or 2.
    pub fn from_index(index: usize) -> Option<PartyId> {
        PartyId::ALL.get(index).copied()
    }

    /// The two other parties, in canonical order.
    pub fn others(self) -> [PartyId; 2] {
        match self {
            PartyId::P0 => [PartyId::P1, PartyId::P2],
            PartyId::P1 => [PartyId::P0, PartyId::P2],
            PartyId::P2 => [PartyId::P0, PartyId::P1],
        }
    }
}

impl fmt::Display for PartyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "P{}", self.index())
    }
}

/// Who stands at the other end of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Peer {
    /// A computing party.
    Party(PartyId),
    /// The dealer of correlated randomness.
    Dealer,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Party(party) => party.fmt(f),
            Peer::Dealer => f.write_str("dealer"),
        }
    }
}
