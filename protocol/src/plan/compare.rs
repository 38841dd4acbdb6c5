//! Comparison of an opened value with its mask: `[m mod 2^h < r mod 2^h]`, XOR-shared.
//!
//! 1. The dealer deals the one-hot form of every digit (at most 4 bits) of r: 15 bits a digit.
//! 2. With public digit `m_d`: `lt_d = XOR of e_j over j > m_d`, `eq_d = e_{m_d}`, both local.
//! 3. Digits combine from the top: `lt = lt_n ^ eq_n lt_{n-1} ^ eq_n eq_{n-1} lt_{n-2} ^ ..`, four
//!    digits to a group in one round of [`PlanBuilder::combine`], then the groups in another.
//!
//! Borrows over several ranges that end at digit boundaries come out of the same rounds. Where rounds
//! are dear ([`super::Profile`]) digits have up to 7 bits and combine all at once.

use std::sync::Arc;

use super::{
    BitRef, Circuit, CircuitBuilder, CircuitInput, Corr, Literal, PlanBuilder, Rep, Term, VId, Wire,
};

/// Digits of a group when there are several groups.
const GROUP: usize = 4;

/// Digits of one range, of at most `most` bits: (position, bits).
fn digits(lo: u8, hi: u8, most: u8) -> Vec<(u8, u8)> {
    (lo..hi)
        .step_by(usize::from(most))
        .map(|p| (p, most.min(hi - p)))
        .collect()
}

/// Sizes of `count` things in as few nearly equal groups of at most `most` as possible.
fn even(count: usize, most: usize) -> Vec<usize> {
    let groups = count.div_ceil(most);
    (0..groups)
        .map(|i| count / groups + usize::from(i < count % groups))
        .collect()
}

/// `lt` of digits given lowest first: digit i decides if all higher ones are equal.
fn less_than(lt: &[usize], eq: &[Option<usize>]) -> Vec<Term> {
    let term = |i: usize| {
        let mut term: Term = eq[i + 1..].iter().flatten().copied().collect();
        term.push(lt[i]);
        term.sort_unstable();
        term
    };
    (0..lt.len()).map(term).collect()
}

/// The wires of each digit, out of the wires of the bits from 0 up.
fn digit_wires(bits: &[Wire], digits: &[(u8, u8)]) -> Vec<Vec<Wire>> {
    let slice = |(lo, count): &(u8, u8)| bits[usize::from(*lo)..usize::from(lo + count)].to_vec();
    digits.iter().map(slice).collect()
}

fn ring_bits(digits: &[(u8, u8)], offset: u64) -> CircuitInput {
    let count = digits.last().map_or(0, |(lo, count)| lo + count);
    CircuitInput::Ring {
        offset,
        lo: 0,
        count,
    }
}

/// The dealer's circuit: one-hot planes `e_1 .. e_{2^w - 1}` of every digit of r.
fn one_hot_circuit(digits: &[(u8, u8)]) -> Circuit {
    let (mut circuit, wires) = CircuitBuilder::new(vec![ring_bits(digits, 0)]);
    let mut outs = Vec::new();
    for bits in digit_wires(&wires[0], digits) {
        let mut products = vec![Wire::ONE];
        for bit in bits.iter().rev() {
            // From the top bit down: the product over a longer prefix of the index.
            let not = circuit.xor(*bit, Wire::ONE);
            products = products
                .iter()
                .flat_map(|p| [circuit.and(*p, not), circuit.and(*p, *bit)])
                .collect();
        }
        outs.extend_from_slice(&products[1..]);
    }
    circuit.finish(&outs)
}

/// The parties' circuit: `lt` and `eq` of every digit from public m and the dealt one-hots.
fn select_circuit(digits: &[(u8, u8)], offset: u64) -> Circuit {
    let one_hots: u16 = digits.iter().map(|(_, w)| (1 << w) - 1).sum();
    let inputs = vec![
        ring_bits(digits, offset),
        CircuitInput::Bits {
            first: 0,
            count: one_hots,
        },
    ];
    let (mut circuit, wires) = CircuitBuilder::new(inputs);
    let mut dealt = &wires[1][..];
    let mut outs = Vec::new();
    for bits in digit_wires(&wires[0], digits) {
        let (own, rest) = dealt.split_at((1 << bits.len()) - 1);
        dealt = rest;
        // greater[j] = XOR of e_i over i > j, from the top down.
        let mut greater = vec![Wire::ZERO; own.len() + 1];
        for j in (0..own.len()).rev() {
            greater[j] = circuit.xor(greater[j + 1], own[j]);
        }
        let zero = circuit.xor(greater[0], Wire::ONE_SHARE);
        let equal: Vec<Wire> = std::iter::once(zero).chain(own.iter().copied()).collect();
        outs.push(circuit.select(&bits, &greater));
        outs.push(circuit.select(&bits, &equal));
    }
    circuit.finish(&outs)
}

impl PlanBuilder {
    /// Whether so many digits combine at once: a few more monomials, one round instead of two.
    fn in_one_round(&self, n: usize, digits: usize, ranges: usize) -> bool {
        digits <= self.profile.single_group(n) && (ranges == 1 || self.profile.saves_rounds(n))
    }

    /// For ascending digit boundaries `ends`: planes `i` of the result are
    /// `[(m + offset) mod 2^ends[i] < r mod 2^ends[i]]`, XOR-shared. At most two rounds.
    pub fn borrow(&mut self, m: VId, offset: u64, r: VId, ends: &[u8]) -> VId {
        let n = self.len(m);
        let mut all = Vec::new();
        let mut counts = Vec::new();
        let mut lo = 0;
        for hi in ends {
            let range = digits(lo, *hi, self.profile.digit_bits(n));
            counts.push(range.len());
            all.extend(range);
            lo = *hi;
        }
        let digits = one_hot_circuit(&all);
        let planes = digits.outs.len() as u16;
        let corr = Corr::Digits(Arc::new(digits));
        let dealt = self.deal(corr, vec![r], Rep::Bits { planes }, n);
        let selected = self.circuit(select_circuit(&all, offset), vec![m, dealt], n);
        let plane = |i: usize| {
            Literal::from(BitRef {
                id: selected,
                plane: i as u16,
            })
        };

        let variables: Vec<Literal> = (0..2 * all.len()).map(plane).collect();
        if self.in_one_round(n, all.len(), ends.len()) {
            let lt: Vec<usize> = (0..all.len()).map(|d| 2 * d).collect();
            let eq: Vec<Option<usize>> = (0..all.len()).map(|d| Some(2 * d + 1)).collect();
            let upto = counts.iter().scan(0, |upto, count| {
                *upto += count;
                Some(*upto)
            });
            let polynomials: Vec<Vec<Term>> = upto
                .map(|upto| less_than(&lt[..upto], &eq[..upto]))
                .collect();
            return self.combine(&variables, &polynomials);
        }
        // Groups of digits, none across a boundary.
        let sizes: Vec<Vec<usize>> = counts.iter().map(|count| even(*count, GROUP)).collect();
        let groups: usize = sizes.iter().map(Vec::len).sum();
        let mut polynomials = Vec::new();
        let mut digit = 0;
        for (group, size) in sizes.iter().flatten().enumerate() {
            let lt: Vec<usize> = (digit..digit + size).map(|d| 2 * d).collect();
            let eq: Vec<Option<usize>> = (digit..digit + size).map(|d| Some(2 * d + 1)).collect();
            polynomials.push(less_than(&lt, &eq));
            if group > 0 {
                polynomials.push(vec![eq.iter().flatten().copied().collect()]);
            }
            digit += size;
        }
        let first = self.combine(&variables, &polynomials);
        let variables: Vec<Literal> = (0..polynomials.len())
            .map(|i| {
                BitRef {
                    id: first,
                    plane: i as u16,
                }
                .into()
            })
            .collect();
        let lt: Vec<usize> = (0..groups)
            .map(|g| if g == 0 { 0 } else { 2 * g - 1 })
            .collect();
        let eq: Vec<Option<usize>> = (0..groups).map(|g| (g > 0).then_some(2 * g)).collect();
        let mut polynomials = Vec::new();
        let mut upto = 0;
        for range in &sizes {
            upto += range.len();
            polynomials.push(less_than(&lt[..upto], &eq[..upto]));
        }
        self.combine(&variables, &polynomials)
    }
}
