//! The four nodes of a cluster by name, and where each of them is reached.

use std::fmt;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// One of the four nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeName {
    /// The first party, which coordinates.
    P0,
    /// The second party.
    P1,
    /// The third party.
    P2,
    /// The dealer.
    Dealer,
}

impl NodeName {
    /// All nodes in the order in which they are started.
    pub const ALL: [NodeName; 4] = [NodeName::P0, NodeName::P1, NodeName::P2, NodeName::Dealer];

    /// The parties alone.
    pub const PARTIES: [NodeName; 3] = [NodeName::P0, NodeName::P1, NodeName::P2];

    /// Place in [`NodeName::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// The name in files, folders and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            NodeName::P0 => "p0",
            NodeName::P1 => "p1",
            NodeName::P2 => "p2",
            NodeName::Dealer => "dealer",
        }
    }

    /// The subcommand that starts such a node.
    pub(crate) fn command(self) -> &'static str {
        match self {
            NodeName::Dealer => "dealer",
            _ => "party",
        }
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Where the four nodes are reached, from one place: behind a relay, every
/// dialler has addresses of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeAddresses {
    /// The first party.
    pub p0: SocketAddr,
    /// The second party.
    pub p1: SocketAddr,
    /// The third party.
    pub p2: SocketAddr,
    /// The dealer.
    pub dealer: SocketAddr,
}

impl NodeAddresses {
    /// The address of one node.
    pub fn of(&self, node: NodeName) -> SocketAddr {
        match node {
            NodeName::P0 => self.p0,
            NodeName::P1 => self.p1,
            NodeName::P2 => self.p2,
            NodeName::Dealer => self.dealer,
        }
    }

    /// The addresses of the parties.
    pub fn parties(&self) -> [SocketAddr; 3] {
        [self.p0, self.p1, self.p2]
    }

    /// The addresses as a node is told them.
    pub(crate) fn to_wire(self) -> trefoil_consortium::Addresses {
        trefoil_consortium::Addresses::of(self.parties(), self.dealer)
    }
}
