//! What a node of the operations test writes down for the test: its shares of every result, and
//! what it counted.

use serde::{Deserialize, Serialize};
use trefoil_protocol::Tensor;
use trefoil_protocol::run::OutputShare;

/// The file in a node's folder.
pub const FILE: &str = "report.json";

/// One node's whole session. The dealer has no shares.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeReport {
    /// By step.
    pub steps: Vec<StepReport>,
    /// Rounds that the transport counted.
    pub rounds: u64,
    /// Frames posted: to P0, P1, P2, the dealer.
    pub sent_frames: [u64; 4],
    /// Payload bytes posted, in the same order.
    pub sent_bytes: [u64; 4],
    /// Payload bytes taken, in the same order.
    pub received_bytes: [u64; 4],
}

/// A party's shares after one step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepReport {
    /// What was revealed, in the order of the program's outputs.
    pub revealed: Vec<ShareReport>,
    /// What the step carried on, in the order of the program's outputs.
    pub carried: Vec<ShareReport>,
}

/// One share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareReport {
    /// The output's name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its elements.
    pub words: Vec<u64>,
    /// Whether the shares combine by XOR.
    pub xor: bool,
    /// Hash of all values opened so far, as the party saw them.
    pub opened: [u8; 16],
}

impl From<&OutputShare> for ShareReport {
    fn from(output: &OutputShare) -> ShareReport {
        ShareReport {
            name: output.name.clone(),
            shape: output.share.shape().to_vec(),
            words: output.share.data().to_vec(),
            xor: output.xor,
            opened: output.opened,
        }
    }
}

impl ShareReport {
    /// The share as the protocol has it.
    ///
    /// # Errors
    /// If the words do not fit the shape.
    pub fn output(&self) -> Result<OutputShare, String> {
        let expected: usize = self.shape.iter().product();
        if expected != self.words.len() {
            return Err(format!(
                "{:?} has {} words, its shape {:?} asks for {expected}",
                self.name,
                self.words.len(),
                self.shape
            ));
        }
        Ok(OutputShare {
            name: self.name.clone(),
            share: Tensor::new(self.shape.clone(), self.words.clone()),
            xor: self.xor,
            opened: self.opened,
        })
    }
}
