//! What lies between two nodes: nothing, or an emulated wide-area link.
//!
//! Only the description and its text form; `relay/` does the emulating.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use trefoil_protocol::plan::LinkProfile;

const MAX_RTT_MS: f64 = 10_000.0;
const MIN_MBIT_PER_S: f64 = 0.01;
const MAX_MBIT_PER_S: f64 = 100_000.0;

/// The link between every two nodes of a cluster.
///
/// As text (on the command line and in files): `lan`, `wan`, or
/// `rtt_ms=40,mbit_per_s=300`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Link {
    /// The host's own loopback, nothing in between (`lan`).
    #[default]
    Loopback,
    /// A relay with a delay and a rate.
    Emulated {
        /// Round trip; half of it is added in each direction.
        rtt_ms: f64,
        /// Rate of each directed link, counted in UDP payload.
        mbit_per_s: f64,
    },
}

impl Link {
    /// `wan`: 40 ms round trip, 300 Mbit/s in each direction.
    pub const WAN: Link = Link::Emulated {
        rtt_ms: 40.0,
        mbit_per_s: 300.0,
    };

    /// As a job states it.
    pub fn profile(self) -> LinkProfile {
        match self {
            Link::Loopback => LinkProfile::default(),
            Link::Emulated { rtt_ms, mbit_per_s } => LinkProfile {
                rtt_us: (rtt_ms * 1e3) as u32,
                kbit_per_s: (mbit_per_s * 1e3) as u32,
            },
        }
    }

    /// A checked emulated link.
    pub fn emulated(rtt_ms: f64, mbit_per_s: f64) -> Result<Link, LinkParseError> {
        within("rtt_ms", rtt_ms, 0.0, MAX_RTT_MS)?;
        within("mbit_per_s", mbit_per_s, MIN_MBIT_PER_S, MAX_MBIT_PER_S)?;
        Ok(Link::Emulated { rtt_ms, mbit_per_s })
    }
}

/// One direction of an emulated link, in the relay's terms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) delay: Duration,
    pub(crate) bytes_per_s: f64,
    /// Longest backlog before the bottleneck; what comes beyond it is dropped.
    pub(crate) queue_bytes: u64,
}

impl Shape {
    /// The shape of each direction of a link with this round trip and rate.
    pub(crate) fn new(rtt_ms: f64, mbit_per_s: f64) -> Result<Shape, LinkParseError> {
        Link::emulated(rtt_ms, mbit_per_s)?;
        let bytes_per_s = mbit_per_s * 1e6 / 8.0;
        let in_flight = bytes_per_s * rtt_ms / 1e3;
        Ok(Shape {
            delay: Duration::from_secs_f64(rtt_ms / 2e3),
            bytes_per_s,
            // Two bandwidth-delay products let a sender's window oscillate
            // without loss; 4 MiB keeps a burst of a fast short link whole.
            queue_bytes: ((2.0 * in_flight) as u64).max(4 << 20),
        })
    }
}

/// Why a text is not a link.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum LinkParseError {
    /// Neither a name nor `key=value` pairs.
    #[error("link {text:?} is none of: lan, wan, rtt_ms=40,mbit_per_s=300")]
    Form {
        /// What was given.
        text: String,
    },
    /// A key that a link does not have.
    #[error("link has no {key:?}; its keys are rtt_ms and mbit_per_s")]
    Key {
        /// The key as given.
        key: String,
    },
    /// A key that is given twice.
    #[error("link gives {key} twice")]
    Twice {
        /// The key.
        key: &'static str,
    },
    /// A key that is not given.
    #[error("link lacks {key}; an example: rtt_ms=40,mbit_per_s=300")]
    Missing {
        /// The key.
        key: &'static str,
    },
    /// A value that is no number.
    #[error("link's {key} is {text:?}, which is not a number")]
    Number {
        /// The key.
        key: &'static str,
        /// The value as given.
        text: String,
    },
    /// A value out of range.
    #[error("link's {key} is {value}, outside {low} to {high}")]
    Range {
        /// The key.
        key: &'static str,
        /// The value as given.
        value: f64,
        /// Smallest value.
        low: f64,
        /// Largest value.
        high: f64,
    },
}

impl FromStr for Link {
    type Err = LinkParseError;

    fn from_str(text: &str) -> Result<Link, LinkParseError> {
        match text.trim() {
            "lan" => return Ok(Link::Loopback),
            "wan" => return Ok(Link::WAN),
            _ => {}
        }
        let (mut rtt_ms, mut mbit_per_s) = (None, None);
        for part in text.split(',') {
            let Some((key, value)) = part.split_once('=') else {
                return Err(LinkParseError::Form { text: text.into() });
            };
            let (key, slot) = match key.trim() {
                "rtt_ms" => ("rtt_ms", &mut rtt_ms),
                "mbit_per_s" => ("mbit_per_s", &mut mbit_per_s),
                other => return Err(LinkParseError::Key { key: other.into() }),
            };
            let number: f64 = value.trim().parse().map_err(|_| LinkParseError::Number {
                key,
                text: value.trim().into(),
            })?;
            if slot.replace(number).is_some() {
                return Err(LinkParseError::Twice { key });
            }
        }
        Link::emulated(
            rtt_ms.ok_or(LinkParseError::Missing { key: "rtt_ms" })?,
            mbit_per_s.ok_or(LinkParseError::Missing { key: "mbit_per_s" })?,
        )
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Link::Loopback => f.write_str("lan"),
            Link::Emulated { rtt_ms, mbit_per_s } => {
                write!(f, "rtt_ms={rtt_ms},mbit_per_s={mbit_per_s}")
            }
        }
    }
}

impl Serialize for Link {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Link {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Link, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// Refuses what is outside the range; a NaN is inside no range.
fn within(key: &'static str, value: f64, low: f64, high: f64) -> Result<(), LinkParseError> {
    if (low..=high).contains(&value) {
        Ok(())
    } else {
        Err(LinkParseError::Range {
            key,
            value,
            low,
            high,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        text.parse::<Link>().unwrap_err().to_string()
    }

    #[test]
    fn a_link_reads_back_what_it_prints() {
        for link in [
            Link::Loopback,
            Link::WAN,
            Link::emulated(0.5, 1000.0).unwrap(),
        ] {
            assert_eq!(link.to_string().parse::<Link>(), Ok(link));
            let json = serde_json::to_string(&link).unwrap();
            assert_eq!(serde_json::from_str::<Link>(&json).unwrap(), link);
        }
    }

    #[test]
    fn wan_is_forty_milliseconds_and_three_hundred_megabits() {
        assert_eq!("wan".parse::<Link>(), Ok(Link::WAN));
        assert_eq!(
            " mbit_per_s = 300 , rtt_ms = 40 ".parse::<Link>(),
            Ok(Link::WAN)
        );
        assert_eq!("lan".parse::<Link>(), Ok(Link::Loopback));
    }

    #[test]
    fn a_wrong_link_is_told_what_is_wrong() {
        assert!(error("dsl").contains("lan, wan, rtt_ms=40,mbit_per_s=300"));
        assert!(error("rtt_ms=40,loss=1").contains("\"loss\""));
        assert!(error("rtt_ms=40").contains("lacks mbit_per_s"));
        assert!(error("rtt_ms=40,rtt_ms=50,mbit_per_s=1").contains("rtt_ms twice"));
        assert!(error("rtt_ms=fast,mbit_per_s=1").contains("\"fast\""));
        assert!(error("rtt_ms=40,mbit_per_s=0").contains("outside 0.01"));
        assert!(error("rtt_ms=-1,mbit_per_s=300").contains("rtt_ms is -1"));
        assert!(error("rtt_ms=NaN,mbit_per_s=300").contains("outside"));
    }
}
