//! Small programs that together use every operation, every composite of the builder, every rounding
//! and every way in which a value leaves a step, on odd shapes with the ends of their domains as
//! values. `tests/suite/operations.rs` runs them between real processes and compares with the plain
//! run; it also checks that nothing is left out.
//!
//! Everything random here comes from one seed that the test prints: FOR TESTS ONLY.
//!
//! Where to read next: `arithmetic.rs`, `selection.rs`, `composites.rs` (the programs).

mod arithmetic;
mod composites;
mod selection;

use std::collections::BTreeMap;

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use trefoil_protocol::Tensor;
use trefoil_protocol::plan::{Plan, Profile};
use trefoil_protocol::program::{BuildError, Builder, Program, Rounding, Sink, Val};
use trefoil_protocol::ring::elements;
use trefoil_protocol::run::memory::{test_key, test_shares};

/// The environment variable that tells a node the seed.
pub const SEED_VARIABLE: &str = "TREFOIL_OPERATIONS_SEED";

const ROUNDINGS: [Rounding; 3] = [Rounding::Floor, Rounding::Nearest, Rounding::Stochastic];

/// One step of the session.
#[derive(Clone, Debug)]
pub struct Case {
    /// What is computed.
    pub program: Program,
    /// Its inputs, in the clear.
    pub inputs: BTreeMap<String, Tensor>,
    /// State, in the clear, that is put in place before the step.
    pub initial: BTreeMap<String, Tensor>,
}

impl Case {
    /// The plan of the step: few bytes in the ring of 64 bits, few rounds in that of 48.
    pub fn plan(&self) -> Plan {
        let profile = match self.program.ring_bits {
            64 => Profile::BYTES,
            _ => Profile::ROUNDS,
        };
        Plan::lowered(&self.program, profile)
    }
}

/// All cases, to be run in this order as the steps of one session.
///
/// # Errors
/// A program that the builder refuses.
pub fn cases(seed: u64, ring_bits: u8) -> Result<Vec<Case>, BuildError> {
    let mut cases = Cases {
        ring: ring_bits,
        rng: ChaCha20Rng::seed_from_u64(seed),
        list: Vec::new(),
    };
    arithmetic::add(&mut cases)?;
    selection::add(&mut cases)?;
    composites::add(&mut cases)?;
    Ok(cases.list)
}

/// The name of the session under a test's seed.
pub fn session_id(seed: u64, ring_bits: u8) -> [u8; 32] {
    let mut id = [0; 32];
    id[..16].copy_from_slice(&test_key(seed, "session"));
    id[16] = ring_bits;
    id
}

/// The three shares of a case's value.
pub fn shares(x: &Tensor, seed: u64, step: usize, kind: &str, name: &str) -> [Tensor; 3] {
    test_shares(x, seed, &format!("{kind} {step} {name}"))
}

/// The cases so far.
struct Cases {
    ring: u8,
    rng: ChaCha20Rng,
    list: Vec<Case>,
}

impl Cases {
    /// Adds one program; `build` declares its inputs with their values.
    fn add(
        &mut self,
        name: &str,
        build: impl FnOnce(&mut Draft<'_>) -> Result<(), BuildError>,
    ) -> Result<(), BuildError> {
        let mut draft = Draft {
            ring: self.ring,
            b: Builder::new(name, self.ring)?,
            rng: &mut self.rng,
            inputs: BTreeMap::new(),
            initial: BTreeMap::new(),
            outputs: 0,
        };
        build(&mut draft)?;
        self.list.push(Case {
            inputs: draft.inputs,
            initial: draft.initial,
            program: draft.b.finish(),
        });
        Ok(())
    }
}

/// A program in the making, with its inputs.
struct Draft<'a> {
    ring: u8,
    b: Builder,
    rng: &'a mut ChaCha20Rng,
    inputs: BTreeMap<String, Tensor>,
    initial: BTreeMap<String, Tensor>,
    outputs: usize,
}

impl Draft<'_> {
    /// The largest and the smallest integer of the ring.
    fn ends(&self) -> (i64, i64) {
        let top = i64::MAX >> (64 - self.ring);
        (-top - 1, top)
    }

    /// `2^(k-2)`: where truncation and comparison of two values end.
    fn limit(&self) -> i64 {
        1 << (self.ring - 2)
    }

    /// `n` integers in `low ..= high`: first the ends and what lies around them and around zero, then
    /// random ones of all sizes.
    fn integers(&mut self, n: usize, low: i64, high: i64) -> Vec<i64> {
        let edges = [low, high, 0, -1, 1, low.saturating_add(1), high - 1];
        let mut values: Vec<i64> = edges
            .into_iter()
            .filter(|v| (low..=high).contains(v))
            .collect();
        while values.len() < n {
            let size = 1 + self.rng.next_u64() % 64;
            let v = (self.rng.next_u64() as i64) >> (64 - size);
            if (low..=high).contains(&v) {
                values.push(v);
            }
        }
        values.truncate(n);
        values
    }

    /// An input with these values.
    fn input_of(&mut self, shape: &[usize], frac: u8, data: &[i64]) -> Result<Val, BuildError> {
        let name = format!("in{}", self.inputs.len());
        let words = data.iter().map(|v| *v as u64).collect();
        self.inputs
            .insert(name.clone(), Tensor::new(shape.to_vec(), words));
        self.b.input(&name, shape, frac, self.ring - 2)
    }

    /// An input with values in `low ..= high`; see [`Draft::integers`].
    fn input(&mut self, shape: &[usize], frac: u8, low: i64, high: i64) -> Result<Val, BuildError> {
        let data = self.integers(elements(shape), low, high);
        self.input_of(shape, frac, &data)
    }

    /// An input of magnitude at most `2^bits`.
    fn input_bits(&mut self, shape: &[usize], frac: u8, bits: u8) -> Result<Val, BuildError> {
        self.input(shape, frac, -(1 << bits), 1 << bits)
    }

    /// Reveals values under the next names.
    fn reveal(&mut self, vals: &[Val]) -> Result<(), BuildError> {
        vals.iter().try_for_each(|val| self.out(*val, Sink::Reveal))
    }

    /// Lets a value out under the next name.
    fn out(&mut self, val: Val, sink: Sink) -> Result<(), BuildError> {
        let name = format!("out{}", self.outputs);
        self.outputs += 1;
        self.b.output(&name, val, sink)
    }
}
