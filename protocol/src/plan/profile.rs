//! Which of two lowerings serves a link best: few bytes, or few rounds.
//!
//! Both compute the same values bit for bit and hide the same; what they open and when differs. The
//! link is part of what the nodes agree on (a field of the job), so that all of them choose alike;
//! the choice is made with integers.

use serde::{Deserialize, Serialize};

use super::{Cost, Plan};
use crate::program::Program;

/// How a program is lowered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// As few bytes as possible: digits of 4 bits, combined over two levels.
    #[default]
    Bytes,
    /// As few rounds as possible: digits of up to 7 bits, combined at once; a max pool and the ReLU
    /// after it in one comparison of all with all.
    Rounds,
}

impl std::fmt::Display for Profile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Profile::Bytes => "few bytes",
            Profile::Rounds => "few rounds",
        })
    }
}

impl Profile {
    /// Bits of a comparison's digit, at most.
    pub(super) fn digit_bits(self) -> u8 {
        match self {
            Profile::Bytes => 4,
            Profile::Rounds => 7,
        }
    }

    /// Digits of a comparison that are combined in one round.
    pub(super) fn single_group(self) -> usize {
        match self {
            Profile::Bytes => 6,
            Profile::Rounds => 10,
        }
    }
}

/// A link between two nodes, as a job states it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkProfile {
    /// Round trip in microseconds.
    pub rtt_us: u32,
    /// Rate of each direction in kilobits a second.
    pub kbit_per_s: u32,
}

impl Default for LinkProfile {
    /// Nodes in one room, or on one machine: a round trip costs less than what avoids it.
    fn default() -> LinkProfile {
        LinkProfile {
            rtt_us: 0,
            kbit_per_s: 1_000_000,
        }
    }
}

impl LinkProfile {
    /// Nanoseconds that a step's frames are on their way: half a round trip a round, and the bytes
    /// of the busiest link, of which a party has one to each peer and one from the dealer.
    pub fn nanoseconds(self, cost: &Cost) -> u128 {
        let bytes = (cost.bytes_sent_per_party / 2).max(cost.dealer_bytes / 3);
        let on_the_way = u128::from(cost.rounds) * u128::from(self.rtt_us) * 500;
        on_the_way + u128::from(bytes) * 8_000_000 / u128::from(self.kbit_per_s.max(1))
    }
}

impl Plan {
    /// Lowers a program for a link: of both profiles the one whose frames are shorter on their way.
    pub fn for_link(program: &Program, link: LinkProfile) -> Plan {
        let bytes = Plan::lowered(program, Profile::Bytes);
        if link.rtt_us == 0 {
            return bytes;
        }
        let rounds = Plan::lowered(program, Profile::Rounds);
        if link.nanoseconds(&rounds.cost()) < link.nanoseconds(&bytes.cost()) {
            rounds
        } else {
            bytes
        }
    }
}
