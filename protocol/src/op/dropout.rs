//! Dropout: zeroes elements under a public mask, which follows from a public key and the step.
//!
//! Each party multiplies its share by 0 or 1: no rounds, no bytes, nothing dealt. A mask is public as batch
//! order is: it does not depend on data. The same operation on the gradient is the backward pass.
//!
//! Element i of step t stays if the low half of word i of the key's stream at t is below `keep`.

use super::{operands, require_ring};
use crate::plan::{Kernel, Lowering, Repr};
use crate::prg::{Domain, Pos, Prg};
use crate::program::{Node, Type};
use crate::threads;

/// Which elements stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DropoutSpec {
    /// Key of the masks of one layer; public.
    pub key: [u8; 16],
    /// The part that stays, times `2^32`.
    pub keep: u32,
}

/// Words drawn at a time.
const DRAWN: usize = 512;

/// Zeroes what the mask drops of elements `first ..` of step `step`.
pub fn apply<T: Default>(spec: &DropoutSpec, step: u64, first: usize, values: &mut [T]) {
    let prg = Prg::new(spec.key);
    let at = Pos {
        step,
        id: 0,
        domain: Domain::Coin,
    };
    let mut words = [0; DRAWN];
    for (chunk, values) in values.chunks_mut(DRAWN).enumerate() {
        let words = &mut words[..values.len()];
        prg.fill(at, (first + chunk * DRAWN) as u64, words);
        for (value, word) in values.iter_mut().zip(words) {
            if *word as u32 >= spec.keep {
                *value = T::default();
            }
        }
    }
}

/// One ring operand; its type stays.
pub fn infer(spec: &DropoutSpec, ins: &[&Type]) -> Result<Vec<Type>, String> {
    let [x] = operands(ins)?;
    require_ring(&x)?;
    if spec.keep == 0 {
        return Err("keeps nothing".into());
    }
    Ok(vec![x])
}

/// The plain meaning, and what a party does to its share.
pub fn masked(spec: &DropoutSpec, step: u64, x: &[u64]) -> Vec<u64> {
    let mut out = x.to_vec();
    // About 2 ns an element.
    threads::split(&mut out, DRAWN, 2 * x.len(), |first, out| {
        apply(spec, step, first * DRAWN, out);
    });
    out
}

/// The secure form.
pub fn lower(spec: &DropoutSpec, node: &Node, cx: &mut Lowering<'_>) -> Vec<Repr> {
    let x = cx.share(node.ins[0]);
    let n = cx.plan.len(x);
    let kernel = Kernel::Dropout(*spec);
    vec![Repr::share(cx.plan.local_share(kernel, vec![x], n))]
}
