//! One-hot of the largest element of the last axis (ties: the first).
//!
//! 1. All n values are open under their masks; the mask of a difference is the difference of masks,
//!    so every pair is compared at once: two rounds after the opening (`plan/compare.rs`).
//! 2. Class i wins if `[x_i >= x_j]` for j after it and not `[x_j >= x_i]` for j before it: the n - 1
//!    literals meet in a tree of 4-ary ANDs, ceil(log4(n - 1)) rounds.
//!
//! Rounds 3 + ceil(log4(n-1)); the result is XOR-shared planes, opened under fresh masks only if an
//! operation needs bits times values. Domain: `-2^(k-2) <= x < 2^(k-2)`.

use super::{OutOfRange, check_comparable, operands, require_ring};
use crate::plan::{
    BitRef, CircuitBuilder, CircuitInput, Corr, Kernel, Literal, Lowering, Repr, VId, Wire,
};
use crate::program::{Kind, Linear, Node, Type, Val};

/// Elements compared, at most: all pairs of all classes meet in one circuit.
const MAX_CLASSES: usize = 100;

/// The last axis becomes planes.
pub fn infer(ins: &[&Type]) -> Result<Vec<Type>, String> {
    let [x] = operands(ins)?;
    require_ring(&x)?;
    let mut shape = x.shape;
    let n = shape.pop().unwrap_or(0);
    if !(2..=MAX_CLASSES).contains(&n) {
        return Err(format!(
            "argmax over {n} elements; 2 to {MAX_CLASSES} are possible"
        ));
    }
    Ok(vec![Type {
        kind: Kind::Bits { planes: n as u16 },
        shape,
        frac_bits: 0,
        bound_log2: 0,
    }])
}

/// The plain meaning: planes of the one-hot.
pub fn plain(x: &[u64], ty: &Type, ring_bits: u8) -> Result<Vec<u64>, OutOfRange> {
    check_comparable(x, ring_bits)?;
    let n = ty.shape.last().copied().unwrap_or(1);
    let rows = x.len() / n;
    let mut out = vec![0; x.len()];
    for (row, values) in x.chunks(n).enumerate() {
        let mut best = 0;
        for i in 1..n {
            if values[i] as i64 > values[best] as i64 {
                best = i;
            }
        }
        out[best * rows + row] = 1;
    }
    Ok(out)
}

/// The secure form.
pub fn lower(node: &Node, cx: &mut Lowering<'_>) -> Repr {
    let k = cx.ring_bits();
    let n = cx.ty(node.ins[0]).shape.last().copied().unwrap_or(1);
    let rows = cx.ty(node.ins[0]).len() / n;
    let x = cx.masked(node.ins[0]);
    let pairs = Linear::Pairs { rows, n };
    let count = pairs.out_len(rows * n);
    let m = cx.plan.local_linear(pairs.clone(), vec![x.open]);
    let r = cx
        .plan
        .derive_ring(Corr::Linear(pairs), vec![x.mask], count);

    // b = 1 ^ msb(m) ^ rho ^ lt for every pair.
    let lt = cx.plan.borrow(m, 0, r, &[k - 1]);
    let top = CircuitInput::Ring {
        offset: 0,
        lo: k - 1,
        count: 1,
    };
    let (rho, wires) = CircuitBuilder::new(vec![top]);
    let rho = rho.finish(&[wires[0][0]]);
    let rho = cx.plan.deal_circuit(rho, vec![r], count);
    let bit = CircuitInput::Bits { first: 0, count: 1 };
    let (mut circuit, wires) = CircuitBuilder::new(vec![top, bit, bit]);
    let public = circuit.and(wires[0][0], Wire::ONE_SHARE);
    let mut b = circuit.xor(Wire::ONE_SHARE, public);
    b = circuit.xor(b, wires[1][0]);
    b = circuit.xor(b, wires[2][0]);
    let circuit = circuit.finish(&[b]);
    let b = cx.plan.circuit(circuit, vec![m, lt, rho], count);
    let slices: Vec<VId> = (0..n * (n - 1) / 2)
        .map(|pair| {
            let kernel = Kernel::BitSlice {
                start: pair * rows,
                take: rows,
            };
            cx.plan.local_bits(kernel, vec![b], 1, rows)
        })
        .collect();
    let pair = |i: usize, j: usize| i * (2 * n - i - 1) / 2 + (j - i - 1);
    let mut classes: Vec<Vec<Literal>> = (0..n)
        .map(|i| {
            let literal = |j: usize| {
                let id = slices[if i < j { pair(i, j) } else { pair(j, i) }];
                Literal {
                    bit: BitRef { id, plane: 0 },
                    negate: i > j,
                }
            };
            (0..n).filter(|j| *j != i).map(literal).collect()
        })
        .collect();
    while classes[0].len() > 1 {
        classes = and_level(&classes, cx);
    }
    // All classes' results are planes of one value already if there was an AND level.
    let planes: Vec<Literal> = classes.into_iter().map(|class| class[0]).collect();
    let terms: Vec<Vec<Vec<usize>>> = (0..n).map(|i| vec![vec![i]]).collect();
    let one_hot = cx.plan.combine(&planes, &terms);
    Repr {
        xor: Some(one_hot),
        ..Repr::default()
    }
}

/// One level of the AND trees of all classes: groups of at most four literals, one round.
fn and_level(classes: &[Vec<Literal>], cx: &mut Lowering<'_>) -> Vec<Vec<Literal>> {
    let count = classes[0].len();
    let groups = count.div_ceil(4);
    let mut variables = Vec::new();
    let mut terms = Vec::new();
    for class in classes {
        let mut rest = &class[..];
        for g in 0..groups {
            let (group, after) = rest.split_at(count / groups + usize::from(g < count % groups));
            rest = after;
            let first = variables.len();
            variables.extend_from_slice(group);
            terms.push(vec![(first..variables.len()).collect()]);
        }
    }
    let out = cx.plan.combine(&variables, &terms);
    let literal = |i: usize| {
        Literal::from(BitRef {
            id: out,
            plane: i as u16,
        })
    };
    (0..classes.len())
        .map(|c| (0..groups).map(|g| literal(c * groups + g)).collect())
        .collect()
}

/// The index of the set plane of a one-hot value, as XOR-shared planes: local.
pub(crate) fn index_planes(val: Val, cx: &mut Lowering<'_>) -> VId {
    let xor = match cx.repr(val).xor {
        Some(xor) => xor,
        None => super::bits::xor_share(val, cx),
    };
    let Kind::Bits { planes } = cx.ty(val).kind else {
        unreachable!("the builder reveals indices of bit values only");
    };
    let n = cx.plan.len(xor);
    let (mut circuit, wires) = CircuitBuilder::new(vec![CircuitInput::Bits {
        first: 0,
        count: planes,
    }]);
    let bits = usize::from(planes)
        .next_power_of_two()
        .trailing_zeros()
        .max(1);
    let outs: Vec<Wire> = (0..bits)
        .map(|bit| {
            let set = wires[0]
                .iter()
                .enumerate()
                .filter(|(i, _)| i >> bit & 1 == 1);
            set.fold(Wire::ZERO, |sum, (_, wire)| circuit.xor(sum, *wire))
        })
        .collect();
    let circuit = circuit.finish(&outs);
    cx.plan.circuit(circuit, vec![xor], n)
}
