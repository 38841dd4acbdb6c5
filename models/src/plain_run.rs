//! Runs a schedule in the clear: the reference that a secure run equals bit for bit.
//!
//! It takes whole tables of ring words, such as a simulation or a test has; real nodes never hold
//! them. Stochastic rounding needs the job's rounding key to draw the same coins.

use std::collections::BTreeMap;

use trefoil_protocol::prg::Prg;
use trefoil_protocol::run::plain;
use trefoil_protocol::{Program, Tensor};

use crate::early_stop::{VALIDATION_RIGHT, Validated};
use crate::schedule::{InitialState, Schedule, Step, gather};
use crate::{ModelError, weights};

/// A table in the clear: rows of ring words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// Words of one row.
    pub row_words: usize,
    /// All rows, one after the other.
    pub words: Vec<u64>,
}

/// Tables by the names that a schedule uses.
pub type Tables = BTreeMap<String, Table>;

/// A run that can be stopped after any step.
#[derive(Debug)]
pub struct PlainSession<'a> {
    schedule: &'a Schedule,
    tables: &'a Tables,
    coins: Option<&'a Prg>,
    /// Carried state after the steps so far.
    pub state: BTreeMap<String, Tensor>,
    next: usize,
    validated: Validated,
}

/// What a whole run leaves.
#[derive(Debug)]
pub struct PlainRun {
    /// What every step revealed; nothing for those that an early stop left out.
    pub outputs: Vec<BTreeMap<String, Tensor>>,
    /// Carried state after the last step.
    pub state: BTreeMap<String, Tensor>,
    /// SHA-256 of the kept model; of nothing if the schedule keeps none.
    pub weights_sha256: [u8; 32],
}

/// The inputs of a step, gathered from tables.
pub fn step_inputs(
    program: &Program,
    step: &Step,
    tables: &Tables,
) -> Result<BTreeMap<String, Tensor>, ModelError> {
    let mut inputs = BTreeMap::new();
    for input in &step.inputs {
        let bad = |problem: String| ModelError::Table {
            table: input.table.clone(),
            problem,
        };
        let table = tables
            .get(&input.table)
            .ok_or_else(|| bad("is missing".into()))?;
        let (_, ty) = program
            .inputs()
            .find(|(name, _)| *name == input.name)
            .ok_or_else(|| bad(format!("the program has no input {:?}", input.name)))?;
        let expected: usize = ty.shape.iter().skip(1).product();
        if table.row_words != expected || ty.shape.first() != Some(&input.rows.len()) {
            return Err(bad(format!(
                "{} rows of {} words; the program reads {:?}",
                input.rows.len(),
                table.row_words,
                ty.shape
            )));
        }
        let words = gather(&table.words, table.row_words, &input.rows).ok_or_else(|| {
            bad(format!(
                "has {} rows; the step reads a later one",
                table.words.len() / expected
            ))
        })?;
        inputs.insert(input.name.clone(), Tensor::new(ty.shape.clone(), words));
    }
    Ok(inputs)
}

impl<'a> PlainSession<'a> {
    /// A session before its first step. `model` is the carried state where the schedule names a kept
    /// model instead of giving public initial values.
    pub fn new(
        schedule: &'a Schedule,
        tables: &'a Tables,
        model: Option<&BTreeMap<String, Tensor>>,
        coins: Option<&'a Prg>,
    ) -> Result<PlainSession<'a>, ModelError> {
        let state = match (&schedule.initial, model) {
            (InitialState::Public(initial), _) => initial.clone(),
            (InitialState::Model(_) | InitialState::Upload, Some(model)) => model.clone(),
            (InitialState::StartFrom { zeros, .. }, Some(model)) => {
                let mut state = model.clone();
                state.extend(zeros.clone());
                state
            }
            (initial, None) => {
                let name = match initial {
                    InitialState::Model(name) | InitialState::StartFrom { model: name, .. } => {
                        name.clone()
                    }
                    _ => "the uploaded model".into(),
                };
                let problem = "the model is not given".into();
                return Err(ModelError::Weights { name, problem });
            }
        };
        Ok(PlainSession {
            schedule,
            tables,
            coins,
            state,
            next: 0,
            validated: Validated::default(),
        })
    }

    /// Runs the next step; `None` after the last.
    pub fn step(&mut self) -> Option<Result<BTreeMap<String, Tensor>, ModelError>> {
        self.step_watched(&mut |_, _, _| {})
    }

    /// As [`PlainSession::step`], with a look at every operation ([`plain::run_watched`]).
    pub fn step_watched(
        &mut self,
        watch: &mut plain::Watch<'_>,
    ) -> Option<Result<BTreeMap<String, Tensor>, ModelError>> {
        let index = self.next;
        let step = self.schedule.steps.get(index)?;
        self.next += 1;
        let program = &self.schedule.programs[step.program];
        let revealed = step_inputs(program, step, self.tables).and_then(|inputs| {
            plain::run_watched(
                program,
                index as u64,
                &mut self.state,
                &inputs,
                self.coins,
                watch,
            )
            .map_err(|error| ModelError::Plain { step: index, error })
        });
        if let (Some(stopping), Ok(outputs)) = (self.schedule.decides(index), &revealed) {
            let right = outputs.get(VALIDATION_RIGHT).map(Tensor::data);
            let right = right.and_then(|data| data.first()).copied();
            let (save, state) = (&self.schedule.save, &mut self.state);
            let right = right.unwrap_or(0);
            self.next = self.validated.next(stopping, index, right, save, state);
        }
        Some(revealed)
    }

    /// SHA-256 of the model as it is now.
    pub fn weights_sha256(&self) -> [u8; 32] {
        weights_sha256(&self.schedule.save, &self.state)
    }
}

/// SHA-256 of the named part of a carried state.
pub fn weights_sha256(names: &[String], state: &BTreeMap<String, Tensor>) -> [u8; 32] {
    let kept = names
        .iter()
        .filter_map(|name| Some((name.clone(), state.get(name)?.clone())))
        .collect();
    weights::sha256(&kept)
}

/// Runs all steps. `progress` is called after each with the number of steps done, the step, and what
/// it revealed.
pub fn run(
    schedule: &Schedule,
    tables: &Tables,
    model: Option<&BTreeMap<String, Tensor>>,
    coins: Option<&Prg>,
    mut progress: impl FnMut(usize, &Step, &BTreeMap<String, Tensor>),
) -> Result<PlainRun, ModelError> {
    let mut session = PlainSession::new(schedule, tables, model, coins)?;
    let mut outputs = Vec::with_capacity(schedule.steps.len());
    loop {
        let index = session.next;
        let Some(revealed) = session.step() else {
            break;
        };
        let revealed = revealed?;
        outputs.resize_with(index, BTreeMap::new);
        progress(index + 1, &schedule.steps[index], &revealed);
        outputs.push(revealed);
    }
    outputs.resize_with(schedule.steps.len(), BTreeMap::new);
    let weights_sha256 = session.weights_sha256();
    Ok(PlainRun {
        outputs,
        state: session.state,
        weights_sha256,
    })
}
