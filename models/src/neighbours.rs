//! Classes of images by the k nearest training rows of a data set (k-nearest-neighbour): what is
//! agreed on, and the steps. What is computed is in `programs/neighbours.rs`.
//!
//! There is no model and nothing is trained: a session opens the training rows under masks once, and
//! each batch of images is compared with all of them.

use serde::{Deserialize, Serialize};

use crate::ModelError;
use crate::job::{DatasetRef, check_format, check_range, job_error};
use crate::programs::neighbours as programs;
use crate::schedule::{
    InitialState, Phase, Schedule, Step, TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS,
    UPLOAD_IMAGES, empty, input, padded,
};

/// Neighbours that may vote.
pub const MAX_NEIGHBOURS: usize = 15;
/// Values of all training rows together, at most: they are open under masks at once, 24 bytes each.
pub const MAX_VALUES: usize = 1 << 24;
/// Distances of one step, at most.
const STEP_DISTANCES: usize = 1 << 18;
/// Images of one step, at most.
const STEP_ROWS: usize = 64;

/// Which images are classified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Queries {
    /// Those that the requester has shared; each one's class is revealed.
    Upload {
        /// Their number.
        rows: usize,
        /// Name of the upload that holds them.
        upload: String,
    },
    /// The data set's test rows; their confusion matrix is revealed.
    Test,
}

/// A k-nearest-neighbour job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NeighbourSpec {
    /// The data set whose training rows are the neighbours.
    pub dataset: DatasetRef,
    /// Channels, height and width of its images.
    pub input: [usize; 3],
    /// Its classes.
    pub classes: usize,
    /// Neighbours that vote: 1 to [`MAX_NEIGHBOURS`].
    pub k: usize,
    /// Fraction bits of the images.
    pub frac_bits: u8,
    /// Ring bits: 64 or 48.
    pub ring_bits: u8,
    /// What is classified.
    pub queries: Queries,
}

impl NeighbourSpec {
    /// Values of one image.
    pub fn values(&self) -> usize {
        self.input
            .iter()
            .fold(1, |n, length| n.saturating_mul(*length))
    }

    fn rows(&self) -> usize {
        match self.queries {
            Queries::Upload { rows, .. } => rows,
            Queries::Test => self.dataset.test_rows,
        }
    }

    /// Checks every field's range.
    ///
    /// # Errors
    /// A field out of range; too many training values; distances that do not fit the ring.
    pub fn check(&self) -> Result<(), ModelError> {
        check_format(self.frac_bits, self.ring_bits)?;
        check_range("classes", self.classes, 2..=100)?;
        check_range("rows", self.rows(), 1..=1 << 26)?;
        let (rows, values) = (self.dataset.train_rows, self.values());
        check_range("input", values, 1..=MAX_VALUES)?;
        check_range("dataset.train_rows", rows, 1..=MAX_VALUES / values)?;
        check_range("k", self.k, 1..=MAX_NEIGHBOURS.min(rows))?;
        if programs::distance_bits(values, self.frac_bits) > self.ring_bits - 3 {
            let problem = format!(
                "distances of {values} values do not fit into {} bits: fewer fraction bits are needed",
                self.ring_bits
            );
            return Err(job_error("frac_bits", self.frac_bits, problem));
        }
        Ok(())
    }

    /// The job's steps.
    pub(crate) fn schedule(&self) -> Result<Schedule, ModelError> {
        self.check()?;
        let train_rows = self.dataset.train_rows;
        let largest = (STEP_DISTANCES / train_rows).clamp(1, STEP_ROWS);
        let of = self.rows().div_ceil(largest);
        let size = self.rows().div_ceil(of);
        let mut schedule = empty(InitialState::Public(Default::default()));
        schedule.programs = vec![programs::setup(self)?, programs::nearest(self, size)?];
        let all = || (0..train_rows as u32).collect();
        schedule.steps.push(Step {
            program: 0,
            phase: Phase::Setup,
            inputs: vec![
                input("images", TRAIN_IMAGES, all()),
                input("labels", TRAIN_LABELS, all()),
            ],
        });
        let numbers: Vec<u32> = (0..self.rows() as u32).collect();
        for (batch, rows) in padded(&numbers, size).into_iter().enumerate() {
            let (phase, inputs) = match self.queries {
                Queries::Upload { .. } => (
                    Phase::Predict { batch, of },
                    vec![input("images", UPLOAD_IMAGES, rows)],
                ),
                Queries::Test => (
                    Phase::Evaluate {
                        epoch: 0,
                        batch,
                        of,
                    },
                    vec![
                        input("images", TEST_IMAGES, rows.clone()),
                        input("labels", TEST_LABELS, rows),
                    ],
                ),
            };
            schedule.steps.push(Step {
                program: 1,
                phase,
                inputs,
            });
        }
        if self.queries == Queries::Test {
            schedule.programs.push(programs::result(self)?);
            schedule.steps.push(Step {
                program: 2,
                phase: Phase::Result { epoch: 0 },
                inputs: Vec::new(),
            });
        }
        Ok(schedule)
    }
}
