//! What `trefoil bench` measures, as steps of a session like any other job's. No data set is read:
//! images, labels, weights and other operands are public numbers from a seed, carried by the session
//! like a state. The protocol's work depends on shapes alone, and who asked can compute in the clear
//! what must come out.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use trefoil_protocol::program::{BuildError, Builder, Op, Rounding, Sink};
use trefoil_protocol::{Program, Tensor};

use crate::job::{PredictOutput, TrainSpec, check_format, check_range};
use crate::programs::{self, Format};
use crate::schedule::{Phase, Schedule, Step, below, stream};
use crate::{InitialState, ModelError, Network, weights};

/// Learning rate of a training step that is measured: 2^-5.
const LEARNING_RATE: f64 = 1.0 / 32.0;
/// Elements of one operand, at most.
const ELEMENTS_MAX: usize = 1 << 24;
/// Repetitions in one session, at most.
const REPETITIONS_MAX: usize = 1 << 16;

/// What one repetition does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Benchmark {
    /// `max(0, round(x / 2^f))` of a vector.
    Relu {
        /// Its length.
        elements: usize,
    },
    /// The products of two vectors' elements, not truncated.
    Multiply {
        /// Their length.
        elements: usize,
    },
    /// `round(x / 2^f)` of a vector.
    Truncate {
        /// Its length.
        elements: usize,
    },
    /// A matrix product, not truncated: `[rows, inner] x [inner, columns]`.
    MatMul {
        /// Rows of the left operand.
        rows: usize,
        /// Columns of the left operand.
        inner: usize,
        /// Columns of the right operand.
        columns: usize,
    },
    /// Logits of a batch of images, revealed to the requester; the weights are opened under their
    /// masks before the first repetition.
    Infer {
        /// The network, TOML text.
        network: String,
        /// Images in one repetition.
        batch: usize,
    },
    /// One step of plain gradient descent, learning rate 2^-5; the weights are revealed after the last
    /// repetition.
    Train {
        /// The network, TOML text.
        network: String,
        /// Images in one repetition.
        batch: usize,
    },
}

/// Public operands: small numbers of both signs with `frac_bits` fraction bits.
fn operand(shape: &[usize], frac_bits: u8) -> Tensor {
    let n: usize = shape.iter().product();
    let value = |i: usize| ((i % 1001) as i64 - 500) << (frac_bits - 6);
    Tensor::new(shape.to_vec(), (0..n).map(|i| value(i) as u64).collect())
}

/// The program with its images and labels carried instead of given, and public values for them:
/// noise of mean 0 and deviation 1, as normalised pixels have, and one class after the other.
fn carry_inputs(mut program: Program, initial: &mut BTreeMap<String, Tensor>) -> Program {
    let inputs: Vec<_> = program
        .inputs()
        .map(|(name, ty)| (name.to_owned(), ty.clone()))
        .collect();
    for (name, ty) in inputs {
        let data = if name == "labels" {
            let classes = ty.shape[1];
            let one_hot = |i: usize| u64::from(i / classes % classes == i % classes);
            (0..ty.len()).map(one_hot).collect()
        } else {
            // Uniform in [-sqrt 3, sqrt 3].
            let bound = (3u64 << (2 * ty.frac_bits)).isqrt();
            let mut rng = stream(1, &name);
            let value = |_| below(&mut rng, 2 * bound + 1).wrapping_sub(bound);
            (0..ty.len()).map(value).collect()
        };
        initial.insert(name, Tensor::new(ty.shape, data));
    }
    for node in &mut program.nodes {
        if let Op::Input(name) = &node.op {
            node.op = Op::Carried(name.clone());
        }
    }
    program
}

/// A program on carried operands `x` (and `y`) whose result is carried as `z`.
fn primitive(
    work: &Benchmark,
    format: Format,
) -> Result<(Program, BTreeMap<String, Tensor>), BuildError> {
    let Format {
        frac_bits,
        ring_bits,
    } = format;
    let mut b = Builder::new("benchmark", ring_bits)?;
    let mut initial = BTreeMap::new();
    let mut carried = |b: &mut Builder, name: &str, shape: &[usize], frac_bits: u8, bound: u8| {
        initial.insert(name.to_owned(), operand(shape, frac_bits));
        b.carried(name, shape, frac_bits, bound)
    };
    let product_bits = 2 * frac_bits;
    let z = match *work {
        Benchmark::Relu { elements } => {
            let x = carried(&mut b, "x", &[elements], product_bits, ring_bits - 2)?;
            b.relu_trunc(x, frac_bits, Rounding::Nearest)?.0
        }
        Benchmark::Truncate { elements } => {
            let x = carried(&mut b, "x", &[elements], product_bits, ring_bits - 3)?;
            b.trunc(x, frac_bits, Rounding::Nearest)?
        }
        Benchmark::Multiply { elements } => {
            let x = carried(&mut b, "x", &[elements], frac_bits, frac_bits + 4)?;
            let y = carried(&mut b, "y", &[elements], frac_bits, frac_bits + 4)?;
            b.mul(x, y)?
        }
        Benchmark::MatMul {
            rows,
            inner,
            columns,
        } => {
            let x = carried(&mut b, "x", &[rows, inner], frac_bits, frac_bits + 4)?;
            let y = carried(&mut b, "y", &[inner, columns], frac_bits, frac_bits + 4)?;
            b.matmul(x, y, false, false)?
        }
        Benchmark::Infer { .. } | Benchmark::Train { .. } => {
            return Err(b.error("benchmark", "a network is no primitive"));
        }
    };
    b.output("z", z, Sink::Carry)?;
    Ok((b.finish(), initial))
}

impl Benchmark {
    fn check(&self) -> Result<(), ModelError> {
        match *self {
            Benchmark::Relu { elements }
            | Benchmark::Multiply { elements }
            | Benchmark::Truncate { elements } => {
                check_range("elements", elements, 1..=ELEMENTS_MAX)
            }
            Benchmark::MatMul {
                rows,
                inner,
                columns,
            } => {
                for side in [rows, inner, columns] {
                    check_range("matmul side", side, 1..=1 << 16)?;
                }
                let largest = (rows * inner).max(inner * columns).max(rows * columns);
                check_range("matmul operand", largest, 1..=ELEMENTS_MAX)
            }
            Benchmark::Infer { batch, .. } | Benchmark::Train { batch, .. } => {
                check_range("batch", batch, 1..=4096)
            }
        }
    }

    /// The session's steps: `repetitions` of [`Phase::Benchmark`], a set-up before them where there
    /// are weights to open, and the weights' reveal behind them where they were trained.
    pub(crate) fn schedule(
        &self,
        repetitions: usize,
        frac_bits: u8,
        ring_bits: u8,
    ) -> Result<Schedule, ModelError> {
        self.check()?;
        check_format(frac_bits, ring_bits)?;
        check_range("repetitions", repetitions, 1..=REPETITIONS_MAX)?;
        let format = Format {
            frac_bits,
            ring_bits,
        };
        let initial = |network: &Network| weights::initial(network, 1, u32::from(frac_bits));
        let (programs, repeated, mut initial) = match self {
            Benchmark::Train { network, batch } => {
                let network = Network::parse(network)?;
                let spec = TrainSpec {
                    batch: *batch,
                    learning_rate: LEARNING_RATE,
                    frac_bits,
                    ring_bits,
                    ..TrainSpec::default()
                };
                let train = programs::train(&network, &spec, LEARNING_RATE)?;
                let reveal = programs::reveal_weights(&network, format)?;
                (vec![train, reveal], 0, initial(&network))
            }
            Benchmark::Infer { network, batch } => {
                let network = Network::parse(network)?;
                let setup = programs::setup(&network, format)?;
                let output = PredictOutput::Logits;
                let predict = programs::predict(&network, format, *batch, output)?;
                (vec![setup, predict], 1, initial(&network))
            }
            _ => {
                let (program, initial) = primitive(self, format)?;
                (vec![program], 0, initial)
            }
        };
        let programs: Vec<Program> = programs
            .into_iter()
            .map(|program| carry_inputs(program, &mut initial))
            .collect();
        let step = |program, phase| Step {
            program,
            phase,
            inputs: Vec::new(),
        };
        let of = repetitions;
        let mut steps: Vec<Step> = (0..repeated)
            .map(|program| step(program, Phase::Setup))
            .collect();
        let phase = |repetition| Phase::Benchmark { repetition, of };
        steps.extend((0..of).map(|repetition| step(repeated, phase(repetition))));
        let rest = repeated + 1..programs.len();
        steps.extend(rest.map(|program| step(program, Phase::RevealWeights)));
        Ok(Schedule {
            stopping: None,
            programs,
            initial: InitialState::Public(initial),
            steps,
            save: Vec::new(),
        })
    }

    /// In words.
    pub fn describe(&self) -> String {
        let network = |toml: &str| {
            Network::parse(toml).map_or("a network".to_owned(), |network| {
                format!("network {}", network.name)
            })
        };
        match self {
            Benchmark::Relu { elements } => format!("ReLU of {elements} numbers"),
            Benchmark::Multiply { elements } => format!("{elements} products"),
            Benchmark::Truncate { elements } => format!("truncation of {elements} numbers"),
            Benchmark::MatMul {
                rows,
                inner,
                columns,
            } => format!("matrix product {rows}x{inner}x{columns}"),
            Benchmark::Infer {
                network: toml,
                batch,
            } => format!("inference of {} on {batch} images of noise", network(toml)),
            Benchmark::Train {
                network: toml,
                batch,
            } => format!("training of {} on {batch} images of noise", network(toml)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plain_run::Tables;

    const MLP: &str = include_str!("../../configs/networks/mlp.toml");

    #[test]
    fn every_benchmark_has_a_schedule_whose_inputs_fit_and_whose_operands_are_in_the_domain() {
        let network = || MLP.to_owned();
        let all = [
            Benchmark::Relu { elements: 100 },
            Benchmark::Multiply { elements: 100 },
            Benchmark::Truncate { elements: 100 },
            Benchmark::MatMul {
                rows: 3,
                inner: 5,
                columns: 7,
            },
            Benchmark::Infer {
                network: network(),
                batch: 2,
            },
            Benchmark::Train {
                network: network(),
                batch: 2,
            },
        ];
        for work in all {
            for (frac_bits, ring_bits) in [(16, 64), (13, 48)] {
                let schedule = work.schedule(2, frac_bits, ring_bits).unwrap();
                let run =
                    crate::plain_run::run(&schedule, &Tables::new(), None, None, |_, _, _| {});
                let run = run.unwrap_or_else(|err| panic!("{work:?}: {err}"));
                // What a network gives is no trivial number, so that a comparison can fail.
                for (name, value) in run.outputs.last().into_iter().flatten() {
                    let other = value.data().iter().any(|word| *word != value.data()[0]);
                    assert!(other || name.ends_with(".bias"), "{work:?} {name}");
                }
            }
        }
    }

    #[test]
    fn sizes_without_sense_are_refused() {
        for work in [
            Benchmark::Relu { elements: 0 },
            Benchmark::Multiply {
                elements: ELEMENTS_MAX + 1,
            },
            Benchmark::MatMul {
                rows: 1 << 16,
                inner: 1 << 16,
                columns: 1,
            },
            Benchmark::Infer {
                network: MLP.into(),
                batch: 0,
            },
        ] {
            assert!(work.schedule(1, 16, 64).is_err(), "{work:?}");
        }
        let one = Benchmark::Relu { elements: 1 };
        assert!(one.schedule(0, 16, 64).is_err());
        assert!(one.schedule(1, 16, 32).is_err());
    }
}
