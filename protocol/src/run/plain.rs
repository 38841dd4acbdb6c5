//! The plain interpreter over a Program: the meaning that a secure run equals bit for bit.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::op::{self, RangeError};
use crate::prg::{Domain, Pos, Prg};
use crate::program::{Kind, Node, Op, Program, Sink};
use crate::ring::Tensor;

/// The rounding coins of one operation: from the job's rounding key, addressed by step, value and
/// element, so that a resumed run draws the same.
#[derive(Debug)]
pub struct Coins<'a> {
    /// The job's rounding key; without one all coins are 0.
    pub key: Option<&'a Prg>,
    /// The step.
    pub step: u64,
    /// The program value that is rounded.
    pub val: u32,
}

impl Coins<'_> {
    /// `n` coins of `bits` bits.
    pub fn draw(&self, n: usize, bits: u8) -> Vec<u64> {
        let mut coins = vec![0; n];
        if let Some(key) = self.key {
            key.fill(
                Pos {
                    step: self.step,
                    id: self.val,
                    domain: Domain::Coin,
                },
                0,
                &mut coins,
            );
        }
        let mask = super::frame::low_mask(bits);
        coins.iter_mut().for_each(|coin| *coin &= mask);
        coins
    }
}

/// Why a plain run stopped.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum PlainError {
    /// A value left the domain of the secure operation.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// An input or carried value is missing or has another size.
    #[error("{0:?} is missing or has another shape")]
    Missing(String),
}

/// Results of a plain step that are not carried: by name.
pub type PlainOutputs = BTreeMap<String, Tensor>;

/// Sees an operation of a plain run: the node, its operands, its results (bits as 0 and 1).
pub type Watch<'a> = dyn FnMut(&Node, &[&[u64]], &[Vec<u64>]) + 'a;

/// Runs one step in the clear: reads and updates `state`, returns what the step reveals.
pub fn run(
    program: &Program,
    step: u64,
    state: &mut BTreeMap<String, Tensor>,
    inputs: &BTreeMap<String, Tensor>,
    coins: Option<&Prg>,
) -> Result<PlainOutputs, PlainError> {
    run_watched(program, step, state, inputs, coins, &mut |_, _, _| {})
}

/// As [`run`]; `watch` sees every operation but reshapes and rescalings. An operation that is out of
/// range is not seen.
pub fn run_watched(
    program: &Program,
    step: u64,
    state: &mut BTreeMap<String, Tensor>,
    inputs: &BTreeMap<String, Tensor>,
    coins: Option<&Prg>,
    watch: &mut Watch<'_>,
) -> Result<PlainOutputs, PlainError> {
    let canonical = program.canonical();
    let last = last_uses(program);
    let mut values: Vec<Option<Vec<u64>>> = vec![None; program.types.len()];
    for (at, node) in program.nodes.iter().enumerate() {
        let outs = match &node.op {
            Op::Input(name) => vec![source(program, node.outs[0], inputs, name)?],
            Op::Carried(name) | Op::CarriedMasked(name) => {
                vec![source(program, node.outs[0], state, name)?]
            }
            Op::Const(tensor) => vec![tensor.data().to_vec()],
            // The array moves on if nobody reads the original any more.
            Op::Rescale | Op::Reshape if last[node.ins[0].index()] == at => {
                vec![values[node.ins[0].index()].take().unwrap_or_default()]
            }
            operation => {
                let ins: Vec<&[u64]> = node
                    .ins
                    .iter()
                    .map(|val| values[val.index()].as_deref().unwrap_or_default())
                    .collect();
                let types: Vec<_> = node.ins.iter().map(|val| program.ty(*val)).collect();
                let rounded = node
                    .ins
                    .last()
                    .map_or(0, |val| canonical[val.index()].index() as u32);
                let coins = Coins {
                    key: coins,
                    step,
                    val: rounded,
                };
                op::plain(operation, &ins, &types, program.ring_bits, &coins).map_err(|range| {
                    RangeError {
                        scope: program.scopes[usize::from(node.scope)].clone(),
                        operation: operation.to_string(),
                        val: node.ins.last().map_or(0, |val| val.index()),
                        index: range.index,
                        magnitude_log2: range.magnitude_log2,
                        limit_log2: range.limit_log2,
                    }
                })?
            }
        };
        if !matches!(node.op, Op::Rescale | Op::Reshape) {
            let ins: Vec<&[u64]> = node
                .ins
                .iter()
                .map(|val| values[val.index()].as_deref().unwrap_or_default())
                .collect();
            watch(node, &ins, &outs);
        }
        for (out, value) in node.outs.iter().zip(outs) {
            values[out.index()] = Some(value);
        }
        for val in &node.ins {
            if last[val.index()] == at {
                values[val.index()] = None;
            }
        }
    }
    let mut outputs = BTreeMap::new();
    for output in &program.outputs {
        let ty = program.ty(output.val);
        let data = values[output.val.index()].clone().unwrap_or_default();
        let tensor = match (ty.kind, &output.sink) {
            (Kind::Ring, _) => Tensor::new(ty.shape.clone(), data),
            (Kind::Bits { planes }, sink) => {
                let n = ty.len();
                let index = *sink == Sink::RevealIndex;
                let weight = |p: usize| if index { p as u64 } else { 1 << p };
                let word = |e: usize| {
                    (0..usize::from(planes))
                        .map(|p| data[p * n + e] * weight(p))
                        .sum()
                };
                Tensor::new(ty.shape.clone(), (0..n).map(word).collect())
            }
        };
        match output.sink {
            Sink::Carry | Sink::CarryMasked => state.insert(output.name.clone(), tensor),
            Sink::Reveal | Sink::RevealIndex => outputs.insert(output.name.clone(), tensor),
        };
    }
    Ok(outputs)
}

fn source(
    program: &Program,
    out: crate::program::Val,
    from: &BTreeMap<String, Tensor>,
    name: &str,
) -> Result<Vec<u64>, PlainError> {
    match from.get(name) {
        Some(tensor) if tensor.len() == program.ty(out).len() => Ok(tensor.data().to_vec()),
        _ => Err(PlainError::Missing(name.into())),
    }
}

/// For every value the node that reads it last; outputs are read at the end.
fn last_uses(program: &Program) -> Vec<usize> {
    let mut last = vec![0; program.types.len()];
    for (at, node) in program.nodes.iter().enumerate() {
        for val in &node.ins {
            last[val.index()] = at;
        }
    }
    for output in &program.outputs {
        last[output.val.index()] = usize::MAX;
    }
    last
}
