//! Multi-input AND of XOR-shared bits in one round.
//!
//! For variables `v_1 .. v_n` with masks `s_1 .. s_n`: open `O_j = v_j ^ s_j`; the dealer deals
//! `<prod of s_j over S>` for the subsets S that occur; then every polynomial of the variables is
//! local: `prod over t of (O_j ^ s_j) = XOR over S of (prod over t \ S of O_j) & <prod over S of s_j>`
//! (masked multi-input AND; Beaver's trick for more than two factors, as in Ohata and Nuida 2020).
//! A term of one variable needs no opening.

use std::collections::{BTreeMap, BTreeSet};

use super::{BitRef, Circuit, CircuitBuilder, CircuitInput, PlanBuilder, VId, Wire};

/// A variable: a bit plane, possibly complemented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Literal {
    /// The plane.
    pub bit: BitRef,
    /// Whether it is complemented.
    pub negate: bool,
}

impl From<BitRef> for Literal {
    fn from(bit: BitRef) -> Literal {
        Literal { bit, negate: false }
    }
}

/// A product of variables, by index, ascending. A polynomial is an XOR of terms.
pub type Term = Vec<usize>;

/// All subsets of `term` with at least `least` members.
fn subsets(term: &[usize], least: usize) -> impl Iterator<Item = Vec<usize>> + '_ {
    (0u32..1 << term.len())
        .filter(move |pick| pick.count_ones() as usize >= least)
        .map(|pick| {
            let chosen = term.iter().enumerate().filter(|(i, _)| pick >> i & 1 == 1);
            chosen.map(|(_, v)| *v).collect()
        })
}

/// For each term's expansion: subset of masks -> public coefficient, as wires.
fn expand(
    circuit: &mut CircuitBuilder,
    term: &[usize],
    open: &BTreeMap<usize, Wire>,
    into: &mut BTreeMap<Vec<usize>, Wire>,
) {
    for subset in subsets(term, 0) {
        let mut coefficient = Wire::ONE;
        for v in term.iter().filter(|v| !subset.contains(v)) {
            coefficient = circuit.and(coefficient, open[v]);
        }
        let sum = into.entry(subset).or_insert(Wire::ZERO);
        *sum = circuit.xor(*sum, coefficient);
    }
}

/// XOR over subsets of coefficient AND share of the subset's product.
fn accumulate(
    circuit: &mut CircuitBuilder,
    mut sum: Wire,
    coefficients: &BTreeMap<Vec<usize>, Wire>,
    share: impl Fn(&[usize]) -> Wire,
) -> Wire {
    for (subset, coefficient) in coefficients {
        let share = if subset.is_empty() {
            Wire::ONE_SHARE
        } else {
            share(subset)
        };
        let product = circuit.and(*coefficient, share);
        sum = circuit.xor(sum, product);
    }
    sum
}

/// The circuit with which the dealer makes the products of mask planes over `sets`.
fn monomial_circuit(
    inputs: Vec<CircuitInput>,
    variables: &[usize],
    sets: &BTreeSet<Vec<usize>>,
) -> Circuit {
    let (mut circuit, wires) = CircuitBuilder::new(inputs);
    let planes: Vec<Wire> = wires.concat();
    let place = |v: &usize| planes[variables.iter().position(|u| u == v).unwrap_or(0)];
    let outs: Vec<Wire> = sets
        .iter()
        .map(|set| {
            set.iter()
                .fold(Wire::ONE, |product, v| circuit.and(product, place(v)))
        })
        .collect();
    circuit.finish(&outs)
}

fn bits_input(count: usize) -> CircuitInput {
    CircuitInput::Bits {
        first: 0,
        count: count as u16,
    }
}

/// Operand list and inputs for a list of single planes.
pub(super) fn plane_inputs(bits: &[BitRef]) -> (Vec<VId>, Vec<CircuitInput>) {
    let input = |bit: &BitRef| CircuitInput::Bits {
        first: bit.plane,
        count: 1,
    };
    (
        bits.iter().map(|bit| bit.id).collect(),
        bits.iter().map(input).collect(),
    )
}

impl PlanBuilder {
    /// Evaluates polynomials of shared bits in one round (none if all terms are single).
    /// Returns a value with one XOR-shared plane for each polynomial.
    pub fn combine(&mut self, variables: &[Literal], polynomials: &[Vec<Term>]) -> VId {
        let n = self.len(variables[0].bit.id);
        let long = || polynomials.iter().flatten().filter(|term| term.len() > 1);
        let used: Vec<usize> = long()
            .flatten()
            .copied()
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        let sets: BTreeSet<Vec<usize>> = long().flat_map(|term| subsets(term, 2)).collect();

        let single: Vec<usize> = {
            let singles = polynomials.iter().flatten().filter(|term| term.len() == 1);
            singles
                .map(|term| term[0])
                .collect::<BTreeSet<_>>()
                .into_iter()
                .collect()
        };
        let single_bits: Vec<BitRef> = single.iter().map(|v| variables[*v].bit).collect();
        let (mut operands, mut inputs) = plane_inputs(&single_bits);
        if !used.is_empty() {
            let opened = self.open_literals(variables, &used);
            let monomials = monomial_circuit(vec![bits_input(used.len())], &used, &sets);
            let dealt = self.deal_circuit(monomials, vec![opened.mask], n);
            operands.extend([opened.open, opened.mask, dealt]);
            inputs.extend([
                bits_input(used.len()),
                bits_input(used.len()),
                bits_input(sets.len()),
            ]);
        }
        let (mut circuit, wires) = CircuitBuilder::new(inputs);
        let negated = |circuit: &mut CircuitBuilder, v: usize, wire: Wire| {
            if variables[v].negate {
                circuit.xor(wire, Wire::ONE_SHARE)
            } else {
                wire
            }
        };
        let raw: BTreeMap<usize, Wire> =
            single.iter().zip(&wires).map(|(v, w)| (*v, w[0])).collect();
        let after = &wires[single.len()..];
        let planes = |i: usize| after.get(i).cloned().unwrap_or_default();
        let open: BTreeMap<usize, Wire> = used.iter().copied().zip(planes(0)).collect();
        let masks: BTreeMap<usize, Wire> = used.iter().copied().zip(planes(1)).collect();
        let products: BTreeMap<&Vec<usize>, Wire> = sets.iter().zip(planes(2)).collect();
        let share = |set: &[usize]| match set {
            [v] => masks[v],
            set => products[&set.to_vec()],
        };
        let mut outs = Vec::new();
        for polynomial in polynomials {
            let mut sum = Wire::ZERO;
            let mut coefficients = BTreeMap::new();
            for term in polynomial {
                if let [v] = term[..] {
                    let literal = negated(&mut circuit, v, raw[&v]);
                    sum = circuit.xor(sum, literal);
                } else {
                    expand(&mut circuit, term, &open, &mut coefficients);
                }
            }
            outs.push(accumulate(&mut circuit, sum, &coefficients, share));
        }
        let circuit = circuit.finish(&outs);
        self.circuit(circuit, operands, n)
    }

    /// Gathers the chosen literals into one value and opens it under fresh masks.
    fn open_literals(&mut self, variables: &[Literal], used: &[usize]) -> super::Masked {
        let bits: Vec<BitRef> = used.iter().map(|v| variables[*v].bit).collect();
        let n = self.len(bits[0].id);
        let (operands, inputs) = plane_inputs(&bits);
        let (mut circuit, wires) = CircuitBuilder::new(inputs);
        let outs: Vec<Wire> = used
            .iter()
            .zip(wires)
            .map(|(v, wire)| {
                let flip = if variables[*v].negate {
                    Wire::ONE_SHARE
                } else {
                    Wire::ZERO
                };
                circuit.xor(wire[0], flip)
            })
            .collect();
        let circuit = circuit.finish(&outs);
        let gathered = self.circuit(circuit, operands, n);
        self.open_bits(gathered)
    }

    /// Polynomials of bits that are open already (`O_j`, with masks the dealer knows): no round.
    /// `negate` complements a literal; returns one XOR-shared plane for each polynomial.
    pub fn combine_opened(
        &mut self,
        variables: &[super::MaskedBit],
        polynomials: &[Vec<Vec<(usize, bool)>>],
    ) -> VId {
        let n = self.len(variables[0].open.id);
        let plain = |term: &Vec<(usize, bool)>| term.iter().map(|(v, _)| *v).collect::<Vec<_>>();
        let terms = || polynomials.iter().flatten();
        let sets: BTreeSet<Vec<usize>> = terms()
            .flat_map(|term| subsets(&plain(term), 1).collect::<Vec<_>>())
            .collect();
        let all: Vec<usize> = (0..variables.len()).collect();

        let masks: Vec<BitRef> = variables.iter().map(|bit| bit.beta).collect();
        let (mask_operands, mask_inputs) = plane_inputs(&masks);
        let dealt = self.deal_circuit(monomial_circuit(mask_inputs, &all, &sets), mask_operands, n);

        let opens: Vec<BitRef> = variables.iter().map(|bit| bit.open).collect();
        let (mut operands, mut inputs) = plane_inputs(&opens);
        operands.push(dealt);
        inputs.push(bits_input(sets.len()));
        let (mut circuit, wires) = CircuitBuilder::new(inputs);
        let products: BTreeMap<&Vec<usize>, Wire> =
            sets.iter().zip(wires[all.len()].clone()).collect();
        let mut outs = Vec::new();
        for polynomial in polynomials {
            let mut coefficients = BTreeMap::new();
            for term in polynomial {
                let mut open = BTreeMap::new();
                for (v, negate) in term {
                    let flip = if *negate { Wire::ONE } else { Wire::ZERO };
                    open.insert(*v, circuit.xor(wires[*v][0], flip));
                }
                expand(&mut circuit, &plain(term), &open, &mut coefficients);
            }
            let share = |set: &[usize]| products[&set.to_vec()];
            outs.push(accumulate(&mut circuit, Wire::ZERO, &coefficients, share));
        }
        let circuit = circuit.finish(&outs);
        self.circuit(circuit, operands, n)
    }
}
