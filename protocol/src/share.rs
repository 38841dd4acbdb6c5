//! Sharing and reconstruction outside the protocol: what a data owner does.
//!
//! A tensor is split into two seeds and one full share: two parties expand their seed, the third
//! receives `x - PRG(seed_a) - PRG(seed_b)`. The receiver of the full share rotates, so that the
//! three links carry the same load.

use std::fmt;

use crate::party::PartyId;
use crate::prg::{Domain, Pos, Prg};
use crate::ring::Tensor;

/// What one party receives for one shared tensor.
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum CompressedShare {
    /// Expand this seed.
    Seed([u8; 16]),
    /// The full share.
    Full(Vec<u64>),
}

impl fmt::Debug for CompressedShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CompressedShare::Seed(_) => f.write_str("Seed(..)"),
            CompressedShare::Full(words) => write!(f, "Full[{}]", words.len()),
        }
    }
}

const SEED_POS: Pos = Pos {
    step: 0,
    id: 0,
    domain: Domain::Seed,
};

impl CompressedShare {
    /// The share of `n` elements; `None` if a full share has another length.
    pub fn expand(self, n: usize) -> Option<Vec<u64>> {
        match self {
            CompressedShare::Seed(seed) => {
                let mut words = vec![0; n];
                Prg::new(seed).fill(SEED_POS, 0, &mut words);
                Some(words)
            }
            CompressedShare::Full(words) => (words.len() == n).then_some(words),
        }
    }
}

/// Splits `x` for the three parties. Both seeds must be fresh from the operating system and used
/// for this tensor only.
pub fn share(x: &[u64], seeds: [[u8; 16]; 2], full_to: PartyId) -> [CompressedShare; 3] {
    let mut rest = x.to_vec();
    for seed in seeds {
        Prg::new(seed).sub(SEED_POS, 0, &mut rest);
    }
    let [a, b] = seeds;
    let [first, _] = full_to.others();
    PartyId::ALL.map(|party| match party {
        party if party == full_to => CompressedShare::Full(std::mem::take(&mut rest)),
        party if party == first => CompressedShare::Seed(a),
        _ => CompressedShare::Seed(b),
    })
}

/// The sum of three additive shares.
///
/// # Panics
/// If the shares differ in size: they come from one sharing.
pub fn reconstruct(shares: [&Tensor; 3]) -> Tensor {
    let [a, b, c] = shares;
    assert!(
        a.len() == b.len() && b.len() == c.len(),
        "shares of one value have one size"
    );
    let words = a.data().iter().zip(b.data()).zip(c.data());
    let data = words
        .map(|((a, b), c)| a.wrapping_add(*b).wrapping_add(*c))
        .collect();
    Tensor::new(a.shape().to_vec(), data)
}
