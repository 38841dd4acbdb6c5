//! What `trefoil bench` measures, as steps of a session like any other job's. No data set is read:
//! images are zeros and other operands public numbers, because the protocol's work depends on
//! shapes alone.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use trefoil_protocol::program::{BuildError, Builder, Rounding, Sink};
use trefoil_protocol::{Program, Tensor};

use crate::job::{PredictOutput, TrainSpec, check_format, check_range};
use crate::programs::{self, Format};
use crate::schedule::{PADDING_ROW, Phase, Schedule, Step, StepInput, ZEROS};
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
    /// One step of plain gradient descent, learning rate 2^-5.
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
    /// are weights to open. The last program is the repetition's.
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
        let (programs, initial) = match self {
            Benchmark::Train { network, batch } => {
                let network = Network::parse(network)?;
                let spec = TrainSpec {
                    batch: *batch,
                    learning_rate: LEARNING_RATE,
                    frac_bits,
                    ring_bits,
                    ..TrainSpec::default()
                };
                let program = programs::train(&network, &spec, LEARNING_RATE)?;
                (vec![program], initial(&network))
            }
            Benchmark::Infer { network, batch } => {
                let network = Network::parse(network)?;
                let setup = programs::setup(&network, format)?;
                let output = PredictOutput::Logits;
                let program = programs::predict(&network, format, *batch, output)?;
                (vec![setup, program], initial(&network))
            }
            _ => {
                let (program, initial) = primitive(self, format)?;
                (vec![program], initial)
            }
        };
        let program = programs.len() - 1;
        let inputs: Vec<StepInput> = programs[program]
            .inputs()
            .map(|(name, ty)| StepInput {
                name: name.into(),
                table: ZEROS.into(),
                // One list for all repetitions.
                rows: vec![PADDING_ROW; ty.len()].into(),
            })
            .collect();
        let setup = (0..program).map(|program| Step {
            program,
            phase: Phase::Setup,
            inputs: Vec::new(),
        });
        let repeated = (0..repetitions).map(|repetition| Step {
            program,
            phase: Phase::Benchmark {
                repetition,
                of: repetitions,
            },
            inputs: inputs.clone(),
        });
        let steps = setup.chain(repeated).collect();
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
            } => format!("inference of {} on {batch} images of zeros", network(toml)),
            Benchmark::Train {
                network: toml,
                batch,
            } => format!("training of {} on {batch} images of zeros", network(toml)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
                let InitialState::Public(mut state) = schedule.initial.clone() else {
                    panic!("{work:?}: operands are public");
                };
                for (index, step) in schedule.steps.iter().enumerate() {
                    let program = &schedule.programs[step.program];
                    let inputs = step.inputs.iter().zip(program.inputs());
                    let inputs = inputs.map(|(input, (name, ty))| {
                        assert_eq!((input.rows.len(), &*input.name), (ty.len(), name));
                        (input.name.clone(), Tensor::zeros(&ty.shape))
                    });
                    let inputs = inputs.collect();
                    let step = index as u64;
                    trefoil_protocol::run::plain::run(program, step, &mut state, &inputs, None)
                        .unwrap_or_else(|err| panic!("{work:?}: {err}"));
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
