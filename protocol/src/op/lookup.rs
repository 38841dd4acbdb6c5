//! Public tables at a secret index: bits `[p, p + w)` of x.
//!
//! 1. `m = x + r mod 2^o` is open, `o >= p + w`; `M` and `R` are its and r's bits `[p, p + w)`.
//! 2. The borrow `c` of the bits below p, opened as `C = c ^ gamma` (none if p = 0). The index is
//!    `M - R - c mod 2^w`.
//! 3. The dealer deals the one-hot planes of `R + gamma` and of `R - gamma` mod `2^w`; C says which is
//!    right: `c = C ^ gamma`, so `R + c = C + (R + gamma)` if C = 0, `C + (R - gamma)` if C = 1.
//! 4. Table bits are XORs of one-hot planes: local. They become ring elements by opened masks
//!    (daBits, Rotaru and Wood 2019): `[y] = sum of 2^b (O_b + (1 - 2 O_b)[beta_b])`.
//!
//! Rounds: 1 + (p = 0: 0; p <= 4: 1; p <= 24: 2; else 3) + 1. Exact for every x: the index wraps.

use std::sync::Arc;

use super::{operands, require_ring};
use crate::plan::{Corr, Kernel, Lowering, Rep, Repr};
use crate::program::{Node, Type};

/// A public table of `2^width` values below `2^out_bits`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Table {
    /// Values by index.
    pub values: Vec<u64>,
    /// Bits of the largest value.
    pub out_bits: u8,
    /// Fraction bits that the values have.
    pub frac_bits: u8,
}

/// Which bits of the opened value are the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LookupSpec {
    /// Position of the lowest bit.
    pub position: u8,
    /// Number of bits.
    pub width: u8,
}

impl LookupSpec {
    /// The index bits of a word.
    pub fn index(&self, word: u64) -> u64 {
        word >> self.position & ((1 << self.width) - 1)
    }

    /// Planes of one one-hot (index 0 is implied).
    pub fn one_hot_planes(&self) -> usize {
        (1 << self.width) - 1
    }
}

/// One result for each table.
pub fn infer(
    position: u8,
    width: u8,
    open_bits: u8,
    tables: &[Arc<Table>],
    ins: &[&Type],
    ring_bits: u8,
) -> Result<Vec<Type>, String> {
    let [x] = operands(ins)?;
    require_ring(&x)?;
    if !(1..=10).contains(&width) || position + width > open_bits || open_bits > ring_bits {
        return Err(format!(
            "index bits {position}..{} of {open_bits} opened bits; width 1 to 10 inside the opened bits",
            position + width
        ));
    }
    for table in tables {
        let fits = table
            .values
            .iter()
            .all(|v| table.out_bits < ring_bits && *v < 1 << table.out_bits);
        if table.values.len() != 1 << width || !fits || table.out_bits == 0 {
            return Err(format!(
                "a table has {} values of {} bits; expected {} values",
                table.values.len(),
                table.out_bits,
                1 << width
            ));
        }
    }
    let ty = |table: &Arc<Table>| Type {
        frac_bits: table.frac_bits,
        bound_log2: table.out_bits,
        ..x.clone()
    };
    Ok(tables.iter().map(ty).collect())
}

/// The plain meaning.
pub fn plain(position: u8, width: u8, tables: &[Arc<Table>], x: &[u64]) -> Vec<Vec<u64>> {
    let spec = LookupSpec { position, width };
    tables
        .iter()
        .map(|t| {
            x.iter()
                .map(|v| t.values[spec.index(*v) as usize])
                .collect()
        })
        .collect()
}

/// The secure form.
pub fn lower(
    position: u8,
    width: u8,
    open_bits: u8,
    tables: &[Arc<Table>],
    node: &Node,
    cx: &mut Lowering<'_>,
) -> Vec<Repr> {
    let spec = LookupSpec { position, width };
    let x = cx.masked_low(node.ins[0], open_bits);
    let n = cx.plan.len(x.open);
    let mut operands = vec![x.open];
    let mut dealt_from = vec![x.mask];
    let mut planes = spec.one_hot_planes();
    if position > 0 {
        let borrow = cx.plan.borrow(x.open, 0, x.mask, &[position]);
        let c = cx.plan.open_bits(borrow);
        operands.push(c.open);
        dealt_from.push(c.mask);
        planes *= 2;
    }
    let one_hot = Rep::Bits {
        planes: planes as u16,
    };
    operands.push(cx.plan.deal(Corr::OneHot(spec), dealt_from, one_hot, n));
    let bits: usize = tables.iter().map(|t| usize::from(t.out_bits)).sum();
    let kernel = Kernel::Lookup {
        spec,
        tables: tables.to_vec(),
    };
    let found = cx.plan.local_bits(kernel, operands, bits, n);
    let opened = cx.plan.open_bits(found);
    let words = cx
        .plan
        .deal_ring(Corr::BitWords, vec![opened.mask], n * bits);
    let mut first = 0;
    tables
        .iter()
        .map(|table| {
            let kernel = Kernel::FromBits {
                first,
                count: u16::from(table.out_bits),
            };
            first += u16::from(table.out_bits);
            Repr::share(cx.plan.local_share(kernel, vec![opened.open, words], n))
        })
        .collect()
}
