//! How near a run comes to the bounds of its number format, layer by layer.
//!
//! Outside its domain a secure operation is silently wrong, so this is found out beforehand, in the
//! clear, on public or synthetic data: the plain interpreter runs the very steps of a job, and the
//! value of each layer with the fewest bits to spare is kept. Another data set may be larger; that is
//! what bits to spare are for.

use std::collections::BTreeMap;

use serde::Serialize;
use trefoil_protocol::Program;
use trefoil_protocol::fixed::decode;
use trefoil_protocol::prg::Prg;
use trefoil_protocol::program::{Kind, Linear, Node, Op, Val};
use trefoil_protocol::run::plain::PlainError;

use crate::ModelError;
use crate::plain_run::{PlainSession, Tables};
use crate::programs::LOSS_SCOPES;
use crate::schedule::Schedule;

/// Fewer bits to spare than this are a warning.
pub const SPARE_BITS: f64 = 2.0;

/// What a value is to its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// An input of the step.
    Input,
    /// Kept from step to step: weights and what the optimiser keeps.
    State,
    /// On the way to the loss.
    Forward,
    /// On the way back, and in the update.
    Backward,
}

/// A value beside its bound.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The layer.
    pub layer: String,
    /// Which of its values.
    pub part: Part,
    /// The operation that gives or reads it.
    pub operation: String,
    /// Its largest magnitude as a real number.
    pub largest: f64,
    /// The bound as a real number.
    pub bound: f64,
    /// Bits between the two; negative if the bound is broken.
    pub spare_bits: f64,
    /// In which step (from 0) that was.
    pub step: usize,
}

/// What a look at a run gave.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The tightest value of each layer and part, in the order of the first step.
    pub rows: Vec<Row>,
    /// Steps that were run.
    pub steps: usize,
    /// Why the run could not go on, if an operation refused its operand.
    pub stopped: Option<String>,
}

impl Report {
    /// Whether a bound is broken: a secure run of these steps would be wrong.
    pub fn is_broken(&self) -> bool {
        self.stopped.is_some() || self.rows.iter().any(|row| row.spare_bits < 0.0)
    }
}

/// The tightest value of a layer's part while it is looked for.
struct Watch<'a> {
    program: &'a Program,
    /// The first value of the loss; later ones in the layers' scopes are of the backward pass.
    loss_at: usize,
    step: usize,
    canonical: Vec<Val>,
    /// Results of linear maps that do not fit a word, as real numbers.
    wrapped: BTreeMap<usize, Vec<f64>>,
    rows: &'a mut Vec<Row>,
}

impl Watch<'_> {
    fn part(&self, node: &Node) -> Part {
        match node.op {
            Op::Input(_) | Op::Const(_) => Part::Input,
            Op::Carried(_) | Op::CarriedMasked(_) => Part::State,
            _ if node.outs[0].index() >= self.loss_at => Part::Backward,
            _ => Part::Forward,
        }
    }

    fn note(&mut self, node: &Node, magnitude: f64, frac_bits: u8, bound_log2: f64) {
        let unit = (-f64::from(frac_bits)).exp2();
        let layer = &self.program.scopes[usize::from(node.scope)];
        let row = Row {
            layer: layer.clone(),
            part: self.part(node),
            operation: node.op.to_string(),
            largest: magnitude * unit,
            bound: bound_log2.exp2() * unit,
            spare_bits: bound_log2 - magnitude.max(1.0).log2(),
            step: self.step,
        };
        let same = |known: &&mut Row| known.layer == row.layer && known.part == row.part;
        match self.rows.iter_mut().find(same) {
            None => self.rows.push(row),
            Some(known) if row.spare_bits < known.spare_bits => *known = row,
            Some(_) => {}
        }
    }

    fn see(&mut self, node: &Node, ins: &[&[u64]], outs: &[Vec<u64>]) {
        let bound = f64::from(self.program.ring_bits) - 2.0;
        match &node.op {
            Op::Linear(map) => return self.follow(node, map, ins),
            // What it gives is noted where it is read.
            Op::AddConst(_) => {
                let operand = self.canonical[node.ins[0].index()].index();
                if let Some(exact) = self.wrapped.get(&operand).cloned() {
                    self.wrapped.insert(node.outs[0].index(), exact);
                }
                return;
            }
            Op::Const(_) => return,
            // Nothing else tells that x was outside the tables: the index wraps. A full table has no
            // bits to spare and needs none.
            Op::Lookup { open_bits, .. } => {
                let negative = ins[0].iter().any(|x| (*x as i64) < 0);
                let bound = f64::from(*open_bits) - if negative { 1.0 } else { 0.0 };
                let found = largest(ins[0]);
                if found > bound.exp2() || !negative && found == bound.exp2() {
                    self.note(node, found, self.program.ty(node.ins[0]).frac_bits, bound);
                }
                return;
            }
            _ => {}
        }
        for (val, values) in node.ins.iter().zip(ins) {
            let ty = self.program.ty(*val);
            if ty.kind == Kind::Ring {
                let wrapped = self.wrapped.get(&self.canonical[val.index()].index());
                let found = wrapped.map_or_else(|| largest(values), |exact| magnitude(exact));
                self.note(node, found, ty.frac_bits, bound);
            }
        }
        for (out, values) in node.outs.iter().zip(outs) {
            let ty = self.program.ty(*out);
            match &node.op {
                // One-hot labels fill their bound, always.
                Op::Input(_) if ty.frac_bits == 0 => {}
                _ if ty.kind != Kind::Ring => {}
                // What the program presumes of its operands.
                Op::Input(_) | Op::Carried(_) | Op::CarriedMasked(_) => {
                    self.note(
                        node,
                        largest(values),
                        ty.frac_bits,
                        f64::from(ty.bound_log2),
                    );
                }
                _ => self.note(node, largest(values), ty.frac_bits, bound),
            }
        }
    }

    /// A linear map may leave the ring and come back, so nothing is noted before another operation
    /// reads what it gives; until then real numbers stand in for words that wrapped.
    fn follow(&mut self, node: &Node, map: &Linear, ins: &[&[u64]]) {
        let limit = f64::from(self.program.ring_bits - 2).exp2();
        let operands: Vec<Vec<f64>> = node
            .ins
            .iter()
            .zip(ins)
            .map(|(val, values)| {
                let wrapped = self.wrapped.get(&self.canonical[val.index()].index());
                let real = || values.iter().map(|v| *v as i64 as f64).collect();
                wrapped.cloned().unwrap_or_else(real)
            })
            .collect();
        let most = operands.iter().map(|x| magnitude(x)).fold(0.0, f64::max);
        if most * f64::from(map.growth()).exp2() < limit {
            return;
        }
        let exact: Vec<f64> = match (map, &operands[..]) {
            (Linear::Scale(by), [x]) => x.iter().map(|x| x * *by as f64).collect(),
            (Linear::ScaleEach(by), [x]) => {
                let factors = by.iter().cycle();
                x.iter()
                    .zip(factors)
                    .map(|(x, by)| x * *by as f64)
                    .collect()
            }
            (Linear::Add, [x, y]) => x.iter().zip(y).map(|(x, y)| x + y).collect(),
            (Linear::Sub, [x, y]) => x.iter().zip(y).map(|(x, y)| x - y).collect(),
            (Linear::AddEach { inner, .. }, [x, y]) => {
                let runs = x.chunks(*inner).zip(y.iter().cycle());
                runs.flat_map(|(run, y)| run.iter().map(move |x| x + y))
                    .collect()
            }
            // Whatever element it is: no less than this may have been left.
            _ => vec![most],
        };
        if magnitude(&exact) >= limit {
            self.wrapped.insert(node.outs[0].index(), exact);
        }
    }
}

fn largest(values: &[u64]) -> f64 {
    let magnitude = |v: &u64| (*v as i64).unsigned_abs();
    values.iter().map(magnitude).max().unwrap_or(0) as f64
}

fn magnitude(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |most, v| most.max(v.abs()))
}

/// Runs the first `steps` steps of a schedule in the clear. `progress` hears the steps done.
///
/// # Errors
/// Tables that do not fit the schedule. A broken bound is no error but the report's.
pub fn check(
    schedule: &Schedule,
    tables: &Tables,
    coins: Option<&Prg>,
    steps: usize,
    mut progress: impl FnMut(usize),
) -> Result<Report, ModelError> {
    let mut session = PlainSession::new(schedule, tables, None, coins)?;
    let mut report = Report {
        rows: Vec::new(),
        steps: 0,
        stopped: None,
    };
    let mut loss_at = BTreeMap::new();
    for (step, of) in schedule.steps.iter().enumerate().take(steps) {
        let program = &schedule.programs[of.program];
        let loss_at = *loss_at.entry(of.program).or_insert_with(|| {
            let is_loss = |node: &&Node| {
                let scope = &program.scopes[usize::from(node.scope)];
                LOSS_SCOPES.contains(&scope.as_str())
            };
            let first = program.nodes.iter().find(is_loss);
            first.map_or(usize::MAX, |node| node.outs[0].index())
        });
        let mut watch = Watch {
            program,
            loss_at,
            step,
            canonical: program.canonical(),
            wrapped: BTreeMap::new(),
            rows: &mut report.rows,
        };
        let done = session.step_watched(&mut |node, ins, outs| watch.see(node, ins, outs));
        match done {
            None => break,
            Some(Ok(_)) => {}
            Some(Err(ModelError::Plain {
                error: PlainError::Range(range),
                ..
            })) => {
                report.stopped = Some(format!("step {step}: {range}"));
                let part = match range.val >= loss_at {
                    true => Part::Backward,
                    false => Part::Forward,
                };
                let frac_bits = program.types.get(range.val).map_or(0, |ty| ty.frac_bits);
                let bits = |log2: u32| f64::from(log2);
                report
                    .rows
                    .retain(|row| row.layer != range.scope || row.part != part);
                report.rows.push(Row {
                    layer: range.scope,
                    part,
                    operation: range.operation,
                    largest: decode(1, u32::from(frac_bits)) * bits(range.magnitude_log2).exp2(),
                    bound: decode(1, u32::from(frac_bits)) * bits(range.limit_log2).exp2(),
                    spare_bits: bits(range.limit_log2) - bits(range.magnitude_log2),
                    step,
                });
                break;
            }
            Some(Err(error)) => return Err(error),
        }
        report.steps = step + 1;
        progress(report.steps);
    }
    Ok(report)
}
