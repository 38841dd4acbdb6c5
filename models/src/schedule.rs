//! The steps of a job, which every node derives from the job's description alone.
//!
//! Which rows meet in which batch is public and follows from the job's seed: a Fisher-Yates shuffle
//! drawn from ChaCha20, one for each epoch. Training drops the last partial batch; evaluation and
//! prediction pad it with rows of zero shares, whose zero labels count nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};
use trefoil_protocol::{Program, Tensor};

use crate::early_stop::Stopping;
use crate::job::{DatasetRef, JobKind, TrainSpec, check_format, check_range};
use crate::judging::{Asked, Evaluation, Validation};
use crate::programs::{self, Format};
use crate::{ModelError, Network, weights};

/// In [`StepInput::rows`]: a row of zero shares that exists in no table.
pub const PADDING_ROW: u32 = u32::MAX;
/// Images in one step of evaluation or prediction, at most.
pub const INFERENCE_ROWS: usize = 128;
/// Row indices in one schedule, at most: they are held in memory.
pub(crate) const MAX_SCHEDULED_ROWS: usize = 1 << 26;
/// Rows above which the AUC is computed by a histogram instead of by comparing all pairs.
pub const MAX_PAIRED_ROWS: usize = 2000;
/// Rows of an AUC, at most: products of counts have to fit the narrow ring.
pub const MAX_AUC_ROWS: usize = 1 << 22;

/// Training images.
pub const TRAIN_IMAGES: &str = "train/images";
/// Training labels, one-hot.
pub const TRAIN_LABELS: &str = "train/labels";
/// Test images.
pub const TEST_IMAGES: &str = "test/images";
/// Test labels, one-hot.
pub const TEST_LABELS: &str = "test/labels";
/// Images to be classified.
pub const UPLOAD_IMAGES: &str = "upload/images";

/// What a step is for. Counters start at 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Opens the weights under their masks for the steps that follow.
    Setup,
    /// One update of the weights.
    Train {
        /// Which pass over the data.
        epoch: usize,
        /// Which batch of the pass.
        batch: usize,
        /// Batches of a pass.
        of: usize,
    },
    /// One batch of the test split.
    Evaluate {
        /// After which epoch of this job.
        epoch: usize,
        /// Which batch.
        batch: usize,
        /// Batches in all.
        of: usize,
    },
    /// Reveals the counts of one hospital's rows.
    HospitalResult {
        /// Which of the job's hospitals.
        hospital: usize,
    },
    /// One batch of the training rows that an early stop sets aside.
    Validate {
        /// After which epoch.
        epoch: usize,
        /// Which batch.
        batch: usize,
        /// Batches in all.
        of: usize,
    },
    /// Opens how many of these rows are right: training may stop here.
    Validated {
        /// After which epoch.
        epoch: usize,
    },
    /// A block of score comparisons.
    Auc {
        /// Which block.
        block: usize,
        /// Blocks in all.
        of: usize,
    },
    /// One batch of uploaded images; reveals its predictions.
    Predict {
        /// Which batch.
        batch: usize,
        /// Batches in all.
        of: usize,
    },
    /// Reveals an evaluation's counts.
    Result {
        /// After which epoch of this job.
        epoch: usize,
    },
    /// Reveals the weights.
    RevealWeights,
    /// One repetition of what is measured.
    Benchmark {
        /// Which.
        repetition: usize,
        /// Repetitions in all.
        of: usize,
    },
}

impl fmt::Display for Phase {
    /// As people count: from 1.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Phase::Setup => f.write_str("set-up"),
            Phase::Train { epoch, batch, of } => {
                write!(f, "train epoch {}, batch {} of {of}", epoch + 1, batch + 1)
            }
            Phase::Evaluate { epoch, batch, of } => {
                write!(
                    f,
                    "evaluate after epoch {}, batch {} of {of}",
                    epoch + 1,
                    batch + 1
                )
            }
            Phase::HospitalResult { hospital } => {
                write!(f, "result of hospital {}", hospital + 1)
            }
            Phase::Validate { epoch, batch, of } => {
                write!(
                    f,
                    "validate after epoch {}, batch {} of {of}",
                    epoch + 1,
                    batch + 1
                )
            }
            Phase::Validated { epoch } => write!(f, "validation after epoch {}", epoch + 1),
            Phase::Auc { block, of } => write!(f, "AUC, block {} of {of}", block + 1),
            Phase::Predict { batch, of } => write!(f, "predict, batch {} of {of}", batch + 1),
            Phase::Result { epoch } => write!(f, "result after epoch {}", epoch + 1),
            Phase::RevealWeights => f.write_str("reveal weights"),
            Phase::Benchmark { repetition, of } => {
                write!(f, "benchmark, repetition {} of {of}", repetition + 1)
            }
        }
    }
}

/// Rows of a table that a program's input is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepInput {
    /// The program's input.
    pub name: String,
    /// The table, such as [`TRAIN_IMAGES`].
    pub table: String,
    /// Its rows in order; [`PADDING_ROW`] is a row of zeros.
    pub rows: Arc<[u32]>,
}

/// One run of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Index in [`Schedule::programs`].
    pub program: usize,
    /// What it is for.
    pub phase: Phase,
    /// Its inputs.
    pub inputs: Vec<StepInput>,
}

/// Carried state at the session's start.
#[derive(Clone, Debug, PartialEq)]
pub enum InitialState {
    /// Public values: P0 holds them, the others hold zeros.
    Public(BTreeMap<String, Tensor>),
    /// Shares that the parties kept under this model name.
    Model(String),
    /// The same, and zeros of these shapes: what training keeps beside the weights.
    StartFrom {
        /// The model, `NAME` or `NAME@VERSION`.
        model: String,
        /// By carried name.
        zeros: BTreeMap<String, Tensor>,
    },
    /// The job's upload: parameters one after the other, see [`import_words`].
    Upload,
}

/// Everything that a job does.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Programs, each compiled once.
    pub programs: Vec<Program>,
    /// Carried state at the start.
    pub initial: InitialState,
    /// Steps in order; a step's index is its number in the protocol.
    pub steps: Vec<Step>,
    /// Carried names that make up the model to keep; empty if nothing is kept.
    pub save: Vec<String>,
    /// Where it may end before its last epoch.
    pub stopping: Option<Stopping>,
}

impl Schedule {
    /// Where it may stop, if step `step` is one that decides it.
    pub fn decides(&self, step: usize) -> Option<&Stopping> {
        let phase = self.steps.get(step).map(|step| step.phase);
        let validated = matches!(phase, Some(Phase::Validated { .. }));
        self.stopping.as_ref().filter(|_| validated)
    }

    /// The updates of the weights with their numbers in the protocol, by which dropout draws.
    pub(crate) fn updates(&self) -> Vec<Update<'_>> {
        let steps = self.steps.iter().enumerate();
        let updates = steps.filter_map(|(number, step)| match (step.phase, &step.inputs[..]) {
            (Phase::Train { epoch, batch, of }, [input, ..]) => Some(Update {
                number: number as u64,
                epoch,
                batch,
                of,
                rows: &input.rows,
            }),
            _ => None,
        });
        updates.collect()
    }
}

/// One update of the weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Update<'a> {
    /// The step's number in the protocol.
    pub(crate) number: u64,
    /// Which pass over the data.
    pub(crate) epoch: usize,
    /// Which batch of the pass.
    pub(crate) batch: usize,
    /// Batches of a whole pass.
    pub(crate) of: usize,
    /// The rows of the batch.
    pub(crate) rows: &'a [u32],
}

/// The rows of one table that a step reads, gathered: what an input's tensor holds. `None` if the
/// table has no such row.
pub fn gather(table: &[u64], row_words: usize, rows: &[u32]) -> Option<Vec<u64>> {
    let mut out = Vec::with_capacity(rows.len() * row_words);
    for row in rows {
        if *row == PADDING_ROW {
            out.resize(out.len() + row_words, 0);
            continue;
        }
        let at = (*row as usize).checked_mul(row_words)?;
        out.extend_from_slice(table.get(at..at.checked_add(row_words)?)?);
    }
    Some(out)
}

/// The stream of public random words for one purpose.
pub(crate) fn stream(seed: u64, purpose: &str) -> ChaCha20Rng {
    let hash = Sha256::new()
        .chain_update(b"trefoil ")
        .chain_update(seed.to_le_bytes())
        .chain_update(purpose);
    ChaCha20Rng::from_seed(hash.finalize().into())
}

/// A number below `n`; its distance from uniform is below `n / 2^64`.
pub(crate) fn below(rng: &mut ChaCha20Rng, n: u64) -> u64 {
    ((u128::from(rng.next_u64()) * u128::from(n)) >> 64) as u64
}

/// The order of the training rows in an epoch.
pub fn epoch_order(seed: u64, epoch: usize, rows: usize) -> Vec<u32> {
    shuffled(seed, &format!("order {epoch}"), rows)
}

fn shuffled(seed: u64, purpose: &str, rows: usize) -> Vec<u32> {
    let mut rng = stream(seed, purpose);
    let mut order: Vec<u32> = (0..rows as u32).collect();
    for i in (1..rows).rev() {
        order.swap(i, below(&mut rng, i as u64 + 1) as usize);
    }
    order
}

/// The rows that are trained on, and those that an early stop sets aside: the last ones of a shuffle
/// of their own, in order.
fn set_aside(spec: &TrainSpec, rows: usize) -> (Vec<u32>, Vec<u32>) {
    let Some(rule) = &spec.early_stop else {
        return ((0..rows as u32).collect(), Vec::new());
    };
    let mut trained = shuffled(spec.seed, "validation rows", rows);
    let mut validated = trained.split_off(rows.saturating_sub(rule.validation_rows));
    trained.sort_unstable();
    validated.sort_unstable();
    (trained, validated)
}

/// The batches of a training on so many rows, epoch by epoch.
fn training_batches(spec: &TrainSpec, rows: usize) -> impl Iterator<Item = (usize, Vec<Vec<u32>>)> {
    let (trained, _) = set_aside(spec, rows);
    let a_pass = trained.len() / spec.batch;
    (0..spec.epochs).map_while(move |epoch| {
        let left = spec
            .max_steps
            .map_or(a_pass, |steps| steps.saturating_sub(epoch * a_pass));
        let order = (left > 0).then(|| epoch_order(spec.seed, epoch, trained.len()))?;
        let order: Vec<u32> = order.iter().map(|at| trained[*at as usize]).collect();
        let batches = order.chunks_exact(spec.batch).take(left);
        Some((epoch, batches.map(<[u32]>::to_vec).collect()))
    })
}

/// Batches of equal size that hold `rows` rows, the last one padded: number and size.
pub fn inference_batches(rows: usize) -> (usize, usize) {
    let batches = rows.div_ceil(INFERENCE_ROWS).max(1);
    (batches, rows.div_ceil(batches))
}

/// Rows in batches of one size; the last one is filled up.
pub(crate) fn padded(rows: &[u32], size: usize) -> Vec<Vec<u32>> {
    let batches = rows.chunks(size).map(|rows| {
        let mut batch = rows.to_vec();
        batch.resize(size, PADDING_ROW);
        batch
    });
    batches.collect()
}

pub(crate) fn input(name: &str, table: &str, rows: Vec<u32>) -> StepInput {
    StepInput {
        name: name.into(),
        table: table.into(),
        rows: rows.into(),
    }
}

/// Derives the steps of a job; deterministic.
pub fn schedule(job: &JobKind) -> Result<Schedule, ModelError> {
    match job {
        JobKind::Train {
            network,
            spec,
            dataset,
            evaluate_each_epoch,
            reveal_weights,
            ..
        } => {
            let network = Network::parse(network)?;
            train(
                &network,
                spec,
                dataset,
                *evaluate_each_epoch,
                *reveal_weights,
            )
        }
        JobKind::Evaluate {
            model,
            network,
            frac_bits,
            ring_bits,
            dataset,
            auc,
            calibration,
            by_hospital,
        } => {
            let network = Network::parse(network)?;
            let format = format_of(*frac_bits, *ring_bits)?;
            let mut schedule = empty(InitialState::Model(model.clone()));
            let asked = Asked {
                auc: *auc,
                calibration: *calibration,
                by_hospital,
            };
            let evaluation = Evaluation::new(&mut schedule, &network, format, dataset, asked)?;
            evaluation.steps(&mut schedule, 0);
            Ok(schedule)
        }
        JobKind::Predict {
            model,
            network,
            frac_bits,
            ring_bits,
            rows,
            output,
            ..
        } => {
            let network = Network::parse(network)?;
            check_format(*frac_bits, *ring_bits)?;
            check_range("rows", *rows, 1..=MAX_SCHEDULED_ROWS)?;
            let format = Format {
                frac_bits: *frac_bits,
                ring_bits: *ring_bits,
            };
            let (batches, size) = inference_batches(*rows);
            let mut schedule = empty(InitialState::Model(model.clone()));
            schedule.programs.push(programs::setup(&network, format)?);
            schedule
                .programs
                .push(programs::predict(&network, format, size, *output)?);
            schedule.steps.push(Step {
                program: 0,
                phase: Phase::Setup,
                inputs: Vec::new(),
            });
            let numbers: Vec<u32> = (0..*rows as u32).collect();
            for (batch, rows) in padded(&numbers, size).into_iter().enumerate() {
                let images = input("images", UPLOAD_IMAGES, rows);
                let phase = Phase::Predict { batch, of: batches };
                schedule.steps.push(Step {
                    program: 1,
                    phase,
                    inputs: vec![images],
                });
            }
            Ok(schedule)
        }
        JobKind::Benchmark {
            work,
            repetitions,
            frac_bits,
            ring_bits,
        } => work.schedule(*repetitions, *frac_bits, *ring_bits),
        JobKind::RevealModel {
            model,
            network,
            frac_bits,
            ring_bits,
        } => {
            let network = Network::parse(network)?;
            let format = format_of(*frac_bits, *ring_bits)?;
            let mut schedule = empty(InitialState::Model(model.clone()));
            schedule
                .programs
                .push(programs::reveal_weights(&network, format)?);
            schedule.steps.push(Step {
                program: 0,
                phase: Phase::RevealWeights,
                inputs: Vec::new(),
            });
            schedule.save = names(&network);
            Ok(schedule)
        }
        JobKind::ImportModel {
            network,
            frac_bits,
            ring_bits,
            ..
        } => {
            let network = Network::parse(network)?;
            check_format(*frac_bits, *ring_bits)?;
            let mut schedule = empty(InitialState::Upload);
            schedule.save = names(&network);
            Ok(schedule)
        }
        JobKind::Serve(spec) => spec.schedule(),
        JobKind::Neighbours(spec) => spec.schedule(),
    }
}

/// Words of a row of an upload of weights.
pub const IMPORT_ROW_WORDS: usize = 1024;

/// What an upload of weights holds: all that a model consists of ([`Network::kept`]), in order, one after the other,
/// in rows of [`IMPORT_ROW_WORDS`], the last one filled up with zeros.
///
/// # Errors
/// A parameter is missing or has another shape.
pub fn import_words(
    network: &Network,
    weights: &BTreeMap<String, Tensor>,
) -> Result<Vec<u64>, ModelError> {
    let mut words = Vec::new();
    for (name, shape) in network.kept() {
        let bad = |problem: String| ModelError::Weights {
            name: name.clone(),
            problem,
        };
        let found = weights.get(&name).ok_or_else(|| bad("is missing".into()))?;
        if found.shape() != shape {
            let problem = format!("has shape {:?}, the network {shape:?}", found.shape());
            return Err(bad(problem));
        }
        words.extend_from_slice(found.data());
    }
    words.resize(words.len().next_multiple_of(IMPORT_ROW_WORDS), 0);
    Ok(words)
}

/// The inverse of [`import_words`]; `None` where the number of words is another.
pub fn import_tensors(network: &Network, mut words: &[u64]) -> Option<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    let total = words.len();
    for (name, shape) in network.kept() {
        let (own, rest) = words.split_at_checked(shape.iter().product())?;
        tensors.insert(name, Tensor::new(shape, own.to_vec()));
        words = rest;
    }
    let used = total - words.len();
    (used.next_multiple_of(IMPORT_ROW_WORDS) == total).then_some(tensors)
}

/// A number format that is possible.
fn format_of(frac_bits: u8, ring_bits: u8) -> Result<Format, ModelError> {
    check_format(frac_bits, ring_bits)?;
    Ok(Format {
        frac_bits,
        ring_bits,
    })
}

fn names(network: &Network) -> Vec<String> {
    let kept = network.kept().into_iter();
    kept.map(|(name, _)| name).collect()
}

pub(crate) fn empty(initial: InitialState) -> Schedule {
    Schedule {
        programs: Vec::new(),
        initial,
        steps: Vec::new(),
        save: Vec::new(),
        stopping: None,
    }
}

/// What training carries before its first step.
fn initial_state(network: &Network, spec: &TrainSpec) -> InitialState {
    let mut zeros = BTreeMap::new();
    for (name, shape) in network.parameters() {
        let kept = programs::state_names(spec, &name).into_iter();
        zeros.extend(kept.map(|name| (name, Tensor::zeros(&shape))));
    }
    if let Some(model) = spec.start_from.clone() {
        return InitialState::StartFrom { model, zeros };
    }
    let mut state = weights::initial(network, spec.seed, u32::from(spec.frac_bits));
    state.extend(zeros);
    InitialState::Public(state)
}

fn train(
    network: &Network,
    spec: &TrainSpec,
    dataset: &DatasetRef,
    evaluate_each_epoch: bool,
    reveal_weights: bool,
) -> Result<Schedule, ModelError> {
    let rows = dataset.train_rows;
    spec.check_for(network)?;
    check_range("dataset.train_rows", rows, spec.batch..=MAX_SCHEDULED_ROWS)?;
    check_range(
        "epochs * train_rows",
        spec.epochs.saturating_mul(rows),
        1..=MAX_SCHEDULED_ROWS,
    )?;
    let format = Format {
        frac_bits: spec.frac_bits,
        ring_bits: spec.ring_bits,
    };
    let mut schedule = empty(initial_state(network, spec));
    schedule.save = names(network);
    let evaluation = match evaluate_each_epoch {
        true => {
            let asked = Asked::default();
            let evaluation = Evaluation::new(&mut schedule, network, format, dataset, asked);
            Some(evaluation?)
        }
        false => None,
    };
    let (trained, validated) = set_aside(spec, rows);
    check_range(
        "early_stop: rows that are left",
        trained.len(),
        spec.batch..=rows,
    )?;
    let validation = match validated.is_empty() {
        true => None,
        false => Some(Validation::new(&mut schedule, network, format, validated)?),
    };
    let of = trained.len() / spec.batch;
    let mut rates: Vec<(f64, usize)> = Vec::new();
    for (epoch, batches) in training_batches(spec, rows) {
        for (batch, rows) in batches.into_iter().enumerate() {
            let rate = spec.rate_at(epoch * of + batch, of);
            let program = match rates.iter().find(|(known, _)| *known == rate) {
                Some((_, program)) => *program,
                None => {
                    let program = programs::train(network, spec, rate)?;
                    schedule.programs.push(program);
                    rates.push((rate, schedule.programs.len() - 1));
                    schedule.programs.len() - 1
                }
            };
            let inputs = vec![
                input("images", TRAIN_IMAGES, rows.clone()),
                input("labels", TRAIN_LABELS, rows),
            ];
            schedule.steps.push(Step {
                program,
                phase: Phase::Train { epoch, batch, of },
                inputs,
            });
        }
        if let Some(evaluation) = &evaluation {
            evaluation.steps(&mut schedule, epoch);
        }
        if let Some(validation) = &validation {
            validation.steps(&mut schedule, epoch);
        }
    }
    let end = schedule.steps.len();
    schedule.stopping = spec.early_stop.map(|rule| Stopping { rule, end });
    if reveal_weights {
        schedule
            .programs
            .push(programs::reveal_weights(network, format)?);
        let program = schedule.programs.len() - 1;
        schedule.steps.push(Step {
            program,
            phase: Phase::RevealWeights,
            inputs: Vec::new(),
        });
    }
    Ok(schedule)
}
