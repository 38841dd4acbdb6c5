//! Which lowering serves a link best: few bytes, or few rounds, or something between.
//!
//! All compute the same values bit for bit and hide the same; what they open and when differs. The
//! link is part of what the nodes agree on (a field of the job), so that all of them choose alike;
//! the choice is made with integers.

use serde::{Deserialize, Serialize};

use super::{Cost, Plan};
use crate::program::Program;

/// How a program is lowered: values of up to so many elements with few rounds, larger ones with few
/// bytes.
///
/// Few bytes: comparisons by digits of 4 bits that combine over two levels. Few rounds: digits of up
/// to 7 bits that combine at once, and a max pool with the ReLU after it in one comparison of all
/// with all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Profile {
    /// Most elements of a value for which rounds are saved.
    pub few_rounds_up_to: usize,
}

impl Profile {
    /// Few bytes for all values.
    pub const BYTES: Profile = Profile {
        few_rounds_up_to: 0,
    };
    /// Few rounds for all values.
    pub const ROUNDS: Profile = Profile {
        few_rounds_up_to: usize::MAX,
    };
    /// What a link chooses from.
    const CHOICES: [Profile; 4] = [
        Profile::BYTES,
        Profile {
            few_rounds_up_to: 1 << 12,
        },
        Profile {
            few_rounds_up_to: 1 << 16,
        },
        Profile::ROUNDS,
    ];

    /// Whether rounds are saved for values of `n` elements.
    pub fn saves_rounds(self, n: usize) -> bool {
        n <= self.few_rounds_up_to
    }

    /// Bits of a comparison's digit, at most, for `n` elements.
    pub(super) fn digit_bits(self, n: usize) -> u8 {
        if self.saves_rounds(n) { 7 } else { 4 }
    }

    /// Digits that combine in one round, for `n` elements.
    pub(super) fn single_group(self, n: usize) -> usize {
        if self.saves_rounds(n) { 10 } else { 6 }
    }
}

impl std::fmt::Display for Profile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Profile::BYTES => f.write_str("few bytes"),
            Profile::ROUNDS => f.write_str("few rounds"),
            Profile { few_rounds_up_to } => {
                write!(f, "few rounds up to {few_rounds_up_to} elements")
            }
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
    /// Lowers a program for a link: of all choices the one whose frames are shortest on their way.
    pub fn for_link(program: &Program, link: LinkProfile) -> Plan {
        if link.rtt_us == 0 {
            return Plan::new(program);
        }
        let plans = Profile::CHOICES.map(|profile| Plan::lowered(program, profile));
        let [first, rest @ ..] = plans;
        rest.into_iter().fold(first, |best, plan| {
            if link.nanoseconds(&plan.cost()) < link.nanoseconds(&best.cost()) {
                plan
            } else {
                best
            }
        })
    }
}
