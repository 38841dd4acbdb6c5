//! What a benchmark prints, also as JSON.

use serde::Serialize;

use super::floor::Rates;
use crate::plan::bytes;

/// Results of one case. Per repetition unless it says otherwise.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The case's name.
    pub case: String,
    /// Median.
    pub seconds: f64,
    /// Shortest.
    pub seconds_min: f64,
    /// Longest.
    pub seconds_max: f64,
    /// The latency that 95 of 100 requests stay below; of `serve-..` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_p95: Option<f64>,
    /// .. and 99 of 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_p99: Option<f64>,
    /// Predictions a second of all clients together; of `serve-..` alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predictions_per_second: Option<f64>,
    /// Repetitions behind these figures.
    pub repetitions: usize,
    /// From the first process's start to the first repetition's.
    pub startup_seconds: f64,
    /// Rounds among the parties.
    pub rounds: u64,
    /// Payload that a party sends to the two others; of `share-..` what the hospital sends to one.
    pub bytes_sent_per_party: u64,
    /// Payload on the dealer's three links.
    pub dealer_bytes: u64,
    /// CPU time of the three parties and the dealer; of `share-..` the hospital's as well.
    pub cpu_seconds: f64,
    /// Largest memory of any one process during the whole case.
    pub peak_rss_bytes: u64,
    /// The least that this work can take here.
    pub floor_seconds: f64,
    /// `seconds / floor_seconds`.
    pub floor_ratio: f64,
    /// With `--network`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub party_memory: Option<PartyMemory>,
}

/// What is written as JSON.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Where this was measured.
    pub machine: Machine,
    /// All cases.
    pub cases: Vec<Row>,
}

/// The machine, as far as it matters.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's name; empty where the platform does not say.
    pub processor: String,
    /// Cores that this process may use.
    pub cores: usize,
    /// Instruction set of the kernels.
    pub kernel: String,
    /// The links between the nodes.
    pub link: String,
    /// Ring bits.
    pub ring_bits: u8,
    /// What the floor is made of.
    #[serde(flatten)]
    pub rates: Rates,
}

/// Memory of a party, in bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PartyMemory {
    /// Largest of the three during the whole case.
    pub measured_bytes: u64,
    /// The process's, as `trefoil plan` says it.
    pub said_bytes: u64,
    /// Tensors alone.
    pub tensor_bytes: u64,
}

pub(super) const HEAD: &str = "case                    seconds       min       max  floor x  rounds  sent a party       dealt   CPU s     peak  start-up";

impl PartyMemory {
    pub(super) fn line(&self) -> String {
        format!(
            "secure result equals the plain run: yes; memory of a party: {} said, {} of it tensors; {} measured",
            bytes(self.said_bytes),
            bytes(self.tensor_bytes),
            bytes(self.measured_bytes),
        )
    }
}

impl Row {
    pub(super) fn line(&self) -> String {
        format!(
            "{:<21} {:>9.5} {:>9.5} {:>9.5} {:>8.2} {:>7} {:>13} {:>11} {:>7.3} {:>8} {:>7.2} s",
            self.case,
            self.seconds,
            self.seconds_min,
            self.seconds_max,
            self.floor_ratio,
            self.rounds,
            bytes(self.bytes_sent_per_party),
            bytes(self.dealer_bytes),
            self.cpu_seconds,
            bytes(self.peak_rss_bytes),
            self.startup_seconds,
        )
    }

    /// Latencies and rate of a case with clients.
    pub(super) fn served_line(&self) -> Option<String> {
        Some(format!(
            "{:<21} latency p50 {:.4} s, p95 {:.4} s, p99 {:.4} s; {:.0} predictions/s",
            "", self.seconds, self.seconds_p95?, self.seconds_p99?, self.predictions_per_second?
        ))
    }
}
