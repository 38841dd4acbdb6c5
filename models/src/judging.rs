//! The steps that judge a model: an evaluation on the test split, for all rows or hospital by hospital,
//! and the validation of an early stop. What their Programs compute is in `programs/evaluation.rs`.

use trefoil_protocol::Program;

use crate::job::{DatasetRef, HospitalRows, check_range, job_error};
use crate::programs::{self, AucBy, Figures, Format};
use crate::schedule::{
    MAX_AUC_ROWS, MAX_PAIRED_ROWS, MAX_SCHEDULED_ROWS, Phase, Schedule, Step, StepInput,
    TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, inference_batches, input, padded,
};
use crate::{ModelError, Network};

/// Hospitals with figures of their own, at most.
const MAX_HOSPITALS: usize = 1024;

/// Where an evaluation's programs are in the schedule.
pub(crate) struct Evaluation {
    setup: usize,
    /// Rows of each group of rows that are counted together: hospitals', or all.
    groups: Vec<usize>,
    /// Images in a step.
    size: usize,
    /// The program that compares a block of scores.
    block: Option<usize>,
    /// The program that reveals a hospital's counts.
    hospital: Option<usize>,
}

impl Evaluation {
    pub(crate) fn new(
        schedule: &mut Schedule,
        network: &Network,
        format: Format,
        dataset: &DatasetRef,
        asked: Asked<'_>,
    ) -> Result<Evaluation, ModelError> {
        let rows = dataset.test_rows;
        let most = match asked.auc || asked.calibration {
            true => MAX_AUC_ROWS,
            false => MAX_SCHEDULED_ROWS,
        };
        check_range("dataset.test_rows", rows, 1..=most)?;
        if asked.auc && network.classes != 2 {
            return Err(job_error(
                "auc",
                format!("{} classes", network.classes),
                "the area under the ROC curve needs 2 classes",
            ));
        }
        let groups = groups(asked.by_hospital, rows)?;
        let (_, size) = inference_batches(groups.iter().copied().max().unwrap_or(rows));
        let batches: usize = groups.iter().map(|rows| rows.div_ceil(size)).sum();
        // Padding at the end of each hospital's rows is compared like rows.
        let paired = rows <= MAX_PAIRED_ROWS && batches * size <= 2 * MAX_PAIRED_ROWS;
        let auc = asked.auc.then_some(match paired {
            true => AucBy::Pairs {
                scores: batches * size,
            },
            false => AucBy::Histogram,
        });
        let figures = Figures {
            auc,
            calibration: asked.calibration,
            by_hospital: !asked.by_hospital.is_empty(),
        };
        let setup = schedule.programs.len();
        let mut push = |program: Program| {
            schedule.programs.push(program);
            schedule.programs.len() - 1
        };
        push(programs::evaluation_setup(network, format, figures)?);
        push(programs::evaluate(network, format, size, figures)?);
        push(programs::evaluation_result(network, format, figures)?);
        let block = match auc {
            Some(AucBy::Pairs { scores }) => Some(push(programs::auc_block(format, size, scores)?)),
            _ => None,
        };
        let hospital = match figures.by_hospital {
            true => Some(push(programs::hospital_result(network, format)?)),
            false => None,
        };
        Ok(Evaluation {
            setup,
            groups,
            size,
            block,
            hospital,
        })
    }

    pub(crate) fn steps(&self, schedule: &mut Schedule, epoch: usize) {
        let of = self
            .groups
            .iter()
            .map(|rows| rows.div_ceil(self.size))
            .sum();
        let mut push = |program: usize, phase: Phase, inputs: Vec<StepInput>| {
            schedule.steps.push(Step {
                program,
                phase,
                inputs,
            });
        };
        push(self.setup, Phase::Setup, Vec::new());
        let (mut batch, mut first) = (0, 0);
        for (group, rows) in self.groups.iter().enumerate() {
            let numbers: Vec<u32> = (first..first + rows).map(|row| row as u32).collect();
            for rows in padded(&numbers, self.size) {
                let inputs = vec![
                    input("images", TEST_IMAGES, rows.clone()),
                    input("labels", TEST_LABELS, rows),
                ];
                push(self.setup + 1, Phase::Evaluate { epoch, batch, of }, inputs);
                batch += 1;
            }
            first += rows;
            if let Some(program) = self.hospital {
                push(
                    program,
                    Phase::HospitalResult { hospital: group },
                    Vec::new(),
                );
            }
        }
        if let Some(program) = self.block {
            for block in 0..of {
                push(program, Phase::Auc { block, of }, Vec::new());
            }
        }
        push(self.setup + 2, Phase::Result { epoch }, Vec::new());
    }
}

/// What an evaluation is asked for beside its confusion matrix.
#[derive(Clone, Copy, Default)]
pub(crate) struct Asked<'a> {
    pub(crate) auc: bool,
    pub(crate) calibration: bool,
    pub(crate) by_hospital: &'a [HospitalRows],
}

/// Rows of each group that is counted together.
fn groups(by_hospital: &[HospitalRows], rows: usize) -> Result<Vec<usize>, ModelError> {
    if by_hospital.is_empty() {
        return Ok(vec![rows]);
    }
    let wrong = |problem: &str| {
        let found = format!("{} hospitals", by_hospital.len());
        Err(job_error("by_hospital", found, problem))
    };
    if by_hospital.len() > MAX_HOSPITALS {
        return wrong("at most 1024 are possible");
    }
    if !by_hospital.is_sorted_by(|a, b| a.hospital < b.hospital) {
        return wrong("each one once, in the order of their keys");
    }
    let groups: Vec<usize> = by_hospital.iter().map(|each| each.rows).collect();
    let sum = groups.iter().try_fold(0usize, |sum, n| sum.checked_add(*n));
    if groups.contains(&0) || sum != Some(rows) {
        return wrong("each has rows, and all together are the test rows");
    }
    Ok(groups)
}

/// The steps that open the accuracy on rows set aside, after an epoch.
pub(crate) struct Validation {
    setup: usize,
    rows: Vec<u32>,
}

impl Validation {
    pub(crate) fn new(
        schedule: &mut Schedule,
        network: &Network,
        format: Format,
        rows: Vec<u32>,
    ) -> Result<Validation, ModelError> {
        let setup = schedule.programs.len();
        let (_, size) = inference_batches(rows.len());
        schedule.programs.extend([
            programs::validation_setup(network, format)?,
            programs::validate(network, format, size)?,
            programs::validation_result(network, format)?,
        ]);
        Ok(Validation { setup, rows })
    }

    pub(crate) fn steps(&self, schedule: &mut Schedule, epoch: usize) {
        let (of, size) = inference_batches(self.rows.len());
        let mut push = |program: usize, phase: Phase, inputs: Vec<StepInput>| {
            schedule.steps.push(Step {
                program: self.setup + program,
                phase,
                inputs,
            });
        };
        push(0, Phase::Setup, Vec::new());
        for (batch, rows) in padded(&self.rows, size).into_iter().enumerate() {
            let inputs = vec![
                input("images", TRAIN_IMAGES, rows.clone()),
                input("labels", TRAIN_LABELS, rows),
            ];
            push(1, Phase::Validate { epoch, batch, of }, inputs);
        }
        push(2, Phase::Validated { epoch }, Vec::new());
    }
}
