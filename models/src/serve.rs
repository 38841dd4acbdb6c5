//! A serving job: the weights are opened under their masks once, then batches of few fixed sizes run
//! for as long as members ask. Which batch runs when is not known before; its programs are.

use serde::{Deserialize, Serialize};

use crate::job::{PredictOutput, check_format, check_range};
use crate::programs::{self, Format};
use crate::schedule::{InitialState, Phase, Schedule, Step, empty};
use crate::{ModelError, Network};

/// Longest session that serves: thirty days less an hour, below the longest wall time of a job.
pub const DURATION_MAX_S: u64 = 30 * 24 * 3600 - 3600;
/// Members that one session serves, at most.
pub const MEMBERS_MAX: usize = 1024;
/// How much larger one compiled batch is than the next smaller one.
const SIZE_STEP: usize = 4;

/// What a serving job does; all of it is in the job's hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeSpec {
    /// The model's name.
    pub model: String,
    /// The network, TOML text.
    pub network: String,
    /// Fraction bits of the model.
    pub frac_bits: u8,
    /// Ring bits of the model.
    pub ring_bits: u8,
    /// Public keys (pins) of the members who may ask, sorted.
    pub members: Vec<[u8; 32]>,
    /// What each of them learns of its own images.
    pub output: PredictOutput,
    /// Images in one step, and in one request, at most.
    pub max_batch: usize,
    /// How long the first request of a batch waits for others, in milliseconds.
    pub max_wait_ms: u64,
    /// Requests that wait at a party, at most; further ones are refused as busy.
    pub max_pending: usize,
    /// Images of one member on one day (UTC), at most; 0 for no bound but the parties' own.
    pub rows_per_day: u64,
    /// How long it serves, in seconds from its session's start.
    pub duration_s: u64,
}

impl ServeSpec {
    /// Checks every field's range.
    pub fn check(&self) -> Result<(), ModelError> {
        check_format(self.frac_bits, self.ring_bits)?;
        check_range("members", self.members.len(), 1..=MEMBERS_MAX)?;
        if !self.members.is_sorted_by(|a, b| a < b) {
            return Err(ModelError::Job {
                field: "members",
                found: format!("{} keys", self.members.len()),
                problem: "each one once, in order".into(),
            });
        }
        check_range("max_batch", self.max_batch, 1..=1024)?;
        check_range("max_wait_ms", self.max_wait_ms as usize, 0..=60_000)?;
        check_range("max_pending", self.max_pending, 1..=65_536)?;
        let longest = DURATION_MAX_S as usize;
        check_range("duration_s", self.duration_s as usize, 1..=longest)
    }

    /// The sizes of batches for which there is a program, from 1 to `max_batch`.
    pub fn sizes(&self) -> Vec<usize> {
        let mut sizes = Vec::new();
        let mut size = 1;
        while size < self.max_batch {
            sizes.push(size);
            size *= SIZE_STEP;
        }
        sizes.push(self.max_batch);
        sizes
    }

    /// The program for so many images, and its size: an index into [`Schedule::programs`]. `None`
    /// where they are too many.
    pub fn program(&self, rows: usize) -> Option<(usize, usize)> {
        let sizes = self.sizes();
        let at = sizes.partition_point(|size| *size < rows);
        // Program 0 opens the weights.
        sizes.get(at).map(|size| (1 + at, *size))
    }

    /// The set-up as the only step; programs for every size after it.
    pub(crate) fn schedule(&self) -> Result<Schedule, ModelError> {
        self.check()?;
        let network = Network::parse(&self.network)?;
        let format = Format {
            frac_bits: self.frac_bits,
            ring_bits: self.ring_bits,
        };
        let mut schedule = empty(InitialState::Model(self.model.clone()));
        schedule.programs.push(programs::setup(&network, format)?);
        for size in self.sizes() {
            let program = programs::predict(&network, format, size, self.output)?;
            schedule.programs.push(program);
        }
        schedule.steps.push(Step {
            program: 0,
            phase: Phase::Setup,
            inputs: Vec::new(),
        });
        Ok(schedule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::JobKind;

    fn spec(max_batch: usize) -> ServeSpec {
        ServeSpec {
            model: "m".into(),
            network: include_str!("../../configs/networks/mlp.toml").into(),
            frac_bits: 16,
            ring_bits: 64,
            members: vec![[1; 32], [2; 32]],
            output: PredictOutput::Class,
            max_batch,
            max_wait_ms: 2,
            max_pending: 8,
            rows_per_day: 0,
            duration_s: 60,
        }
    }

    #[test]
    fn every_number_of_rows_has_the_smallest_program_that_holds_it() {
        assert_eq!(spec(1).sizes(), [1]);
        assert_eq!(spec(4).sizes(), [1, 4]);
        assert_eq!(spec(20).sizes(), [1, 4, 16, 20]);
        let spec = spec(20);
        let schedule = crate::schedule(&JobKind::Serve(spec.clone())).unwrap();
        for rows in 1..=20 {
            let (program, size) = spec.program(rows).unwrap();
            let (_, ty) = schedule.programs[program].inputs().next().unwrap();
            assert_eq!(ty.shape[0], size);
            assert!(size >= rows && (size == 1 || spec.sizes()[program - 2] < rows));
        }
        assert_eq!(spec.program(21), None);
        assert_eq!(schedule.steps.len(), 1);
    }

    #[test]
    fn a_spec_without_sense_is_refused() {
        let wrong: [fn(&mut ServeSpec); 7] = [
            |s| s.members.clear(),
            |s| s.members.reverse(),
            |s| s.members = vec![[1; 32]; 2],
            |s| s.max_batch = 0,
            |s| s.max_pending = 0,
            |s| s.duration_s = DURATION_MAX_S + 1,
            |s| s.frac_bits = 40,
        ];
        for (at, change) in wrong.into_iter().enumerate() {
            let mut spec = spec(4);
            change(&mut spec);
            assert!(spec.check().is_err(), "{at}");
        }
    }
}
