//! Max pool as a tournament of pairwise maxima, and the one-hot selectors for its backward pass.
//!
//! Maximum of x (the earlier) and y: open `d = x - y` under a fresh mask, `b = [d >= 0]`,
//! `max = y + b d` with the product local (`op/bits.rs`): 4 rounds, 64 + 27 + 6 + 1 bits opened and 57
//! bytes dealt for each comparison at k = 64. Ties go to the earlier, as in PyTorch.
//! Domain: `-2^(k-2) <= x < 2^(k-2)`.
//!
//! Where a window reaches into the border, its elements there are copies of the nearest ones in the image
//! ([`Linear::Window`]). Those are in the window too, and come in the same order, so that neither the
//! maximum nor which of equal ones is the first changes.
//!
//! Selector of an element: the AND of the comparison bits on its path (and of the ReLU's bit, if the
//! pool feeds one). These are open already, so their product needs no round: the dealer deals the
//! products of their masks; the selectors are then opened under masks of their own (1 round).

use super::bits::{bit_times, sign_bit};
use super::{OutOfRange, check_comparable, operands, require_bits, require_ring};
use crate::plan::{Lowering, MaskedBit, Repr};
use crate::program::{Kind, Linear, Node, PoolShape, Type};

/// Elements of a window, at most: the selectors' products grow with it.
const MAX_WINDOW: usize = 64;

/// Pairs compared, in order: indices below the window's length are its elements, `len + c` is the
/// winner of comparison `c`. Every pair has its earlier elements on the left.
fn tournament(len: usize) -> Vec<(usize, usize)> {
    let mut pairs = Vec::new();
    let mut level: Vec<usize> = (0..len).collect();
    while level.len() > 1 {
        level = level
            .chunks(2)
            .map(|pair| match pair {
                [left, right] => {
                    pairs.push((*left, *right));
                    len + pairs.len() - 1
                }
                alone => alone[0],
            })
            .collect();
    }
    pairs
}

/// Comparisons that element `q` must win: (comparison, whether as the left one).
fn path(len: usize, q: usize) -> Vec<(usize, bool)> {
    let mut at = q;
    let mut path = Vec::new();
    for (c, (left, right)) in tournament(len).iter().enumerate() {
        if *left == at || *right == at {
            path.push((c, *left == at));
            at = len + c;
        }
    }
    path
}

/// The maxima, and the comparison bits as planes.
pub fn infer(pool: &PoolShape, ins: &[&Type], shape: &[usize]) -> Result<Vec<Type>, String> {
    let [x] = operands(ins)?;
    require_ring(&x)?;
    if !(2..=MAX_WINDOW).contains(&pool.window_len()) {
        return Err(format!(
            "a window of {} elements; 2 to {MAX_WINDOW} are possible",
            pool.window_len()
        ));
    }
    if x.len() != pool.planes * pool.h * pool.w || crate::ring::elements(shape) != pool.windows() {
        return Err(format!("{:?} does not fit {pool:?} -> {shape:?}", x.shape));
    }
    let y = Type {
        shape: shape.to_vec(),
        ..x
    };
    let kind = Kind::Bits {
        planes: pool.window_len() as u16 - 1,
    };
    let bits = Type {
        kind,
        frac_bits: 0,
        bound_log2: 0,
        ..y.clone()
    };
    Ok(vec![y, bits])
}

/// One plane for each element of the window.
pub fn infer_select(pool: &PoolShape, ins: &[&Type]) -> Result<Vec<Type>, String> {
    let (bits, relu) = match ins {
        [bits] => (*bits, None),
        [bits, relu] => (*bits, Some(*relu)),
        _ => return Err(format!("needs one or two operands, has {}", ins.len())),
    };
    if usize::from(require_bits(bits)?) != pool.window_len() - 1 || bits.len() != pool.windows() {
        return Err(format!("{bits} are not the comparison bits of {pool:?}"));
    }
    if let Some(relu) = relu
        && (require_bits(relu)? != 1 || relu.shape != bits.shape)
    {
        return Err(format!("{relu} is not one bit for each window of {bits}"));
    }
    let kind = Kind::Bits {
        planes: pool.window_len() as u16,
    };
    Ok(vec![Type {
        kind,
        ..bits.clone()
    }])
}

/// The plain meaning.
pub fn plain(pool: &PoolShape, x: &[u64], ring_bits: u8) -> Result<Vec<Vec<u64>>, OutOfRange> {
    check_comparable(x, ring_bits)?;
    let mut values: Vec<Vec<u64>> = (0..pool.window_len())
        .map(|q| Linear::Window(*pool, q).apply(&[x]))
        .collect();
    let mut bits = Vec::new();
    for (left, right) in tournament(pool.window_len()) {
        let wins = |(l, r): (&u64, &u64)| *l as i64 >= *r as i64;
        let pairs = || values[left].iter().zip(&values[right]);
        let winner: Vec<u64> = pairs()
            .map(|(l, r)| if wins((l, r)) { *l } else { *r })
            .collect();
        bits.extend(pairs().map(|pair| u64::from(wins(pair))));
        values.push(winner);
    }
    let y = values.pop().unwrap_or_default();
    Ok(vec![y, bits])
}

/// The plain selectors.
pub fn plain_select(pool: &PoolShape, ins: &[&[u64]]) -> Vec<Vec<u64>> {
    let n = pool.windows();
    let mut out = Vec::with_capacity(n * pool.window_len());
    for q in 0..pool.window_len() {
        let path = path(pool.window_len(), q);
        out.extend((0..n).map(|e| {
            let wins = path
                .iter()
                .all(|(c, left)| (ins[0][c * n + e] == 1) == *left);
            u64::from(wins) & ins.get(1).map_or(1, |relu| relu[e])
        }));
    }
    vec![out]
}

/// The secure form of the maxima.
pub fn lower(pool: &PoolShape, node: &Node, cx: &mut Lowering<'_>) -> Vec<Repr> {
    let x = cx.share(node.ins[0]);
    let mut values: Vec<_> = (0..pool.window_len())
        .map(|q| cx.plan.local_linear(Linear::Window(*pool, q), vec![x]))
        .collect();
    let mut bits = Vec::new();
    let k = cx.ring_bits();
    for (left, right) in tournament(pool.window_len()) {
        let d = cx
            .plan
            .local_linear(Linear::Sub, vec![values[left], values[right]]);
        let masked = cx.plan.open_ring(d, k);
        let bit = sign_bit(masked.open, 0, masked.mask, cx);
        let gain = bit_times(bit, masked, cx);
        values.push(cx.plan.local_linear(Linear::Add, vec![values[right], gain]));
        bits.push(bit);
    }
    let y = values[values.len() - 1];
    vec![Repr::share(y), Repr::bits(bits)]
}

/// The secure form of the selectors.
pub fn lower_select(pool: &PoolShape, node: &Node, cx: &mut Lowering<'_>) -> Repr {
    let mut bits: Vec<MaskedBit> = cx.bits(node.ins[0]);
    let relu = node.ins.get(1).map(|val| cx.bits(*val)[0]);
    let relu_index = bits.len();
    bits.extend(relu);
    let polynomials: Vec<Vec<Vec<(usize, bool)>>> = (0..pool.window_len())
        .map(|q| {
            let mut term: Vec<(usize, bool)> = path(pool.window_len(), q)
                .into_iter()
                .map(|(c, left)| (c, !left))
                .collect();
            if relu.is_some() {
                term.push((relu_index, false));
            }
            vec![term]
        })
        .collect();
    let selectors = cx.plan.combine_opened(&bits, &polynomials);
    Repr {
        xor: Some(selectors),
        ..Repr::default()
    }
}
