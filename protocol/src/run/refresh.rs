//! Sharings of zero: of every two parties the lower adds what the higher subtracts, from a key that
//! the two share. Nothing is sent. What a party gives away or writes down is refreshed with one, so
//! that it says nothing about the session's masks.

use super::frame::low_mask;
use super::party::{PartyKeys, State};
use crate::party::PartyId;
use crate::prg::{Domain, Pos};

/// Positions of refreshed state, beside those of a step's outputs, which are far fewer.
const FIRST_STATE_ID: u32 = 1 << 31;

impl PartyKeys {
    /// Adds (for bits: XORs) this party's part of the sharing of zero at a position.
    pub(super) fn add_zero(&self, me: PartyId, step: u64, id: u32, xor: bool, words: &mut [u64]) {
        let at = Pos {
            step,
            id,
            domain: Domain::Zero,
        };
        for peer in me.others() {
            if let Some(key) = &self.pairwise[peer.index()] {
                match (xor, me < peer) {
                    (true, _) => key.xor(at, 0, words),
                    (false, true) => key.add(at, 0, words),
                    (false, false) => key.sub(at, 0, words),
                }
            }
        }
    }
}

impl State {
    /// Adds a sharing of zero to every carried share: what they stand for stays, and the shares
    /// themselves are as fresh as the session's keys. All three parties do it after the same `step`,
    /// once; no round, no byte.
    pub fn refresh(&mut self, me: PartyId, step: u64, keys: &PartyKeys, ring_bits: u8) {
        let mask = low_mask(ring_bits);
        for (id, share) in (FIRST_STATE_ID..).zip(self.shares.values_mut()) {
            let words = share.data_mut();
            keys.add_zero(me, step, id, false, words);
            words.iter_mut().for_each(|word| *word &= mask);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::prg::Prg;
    use crate::ring::Tensor;
    use crate::run::memory::{test_key, test_shares};
    use crate::run::party::sign_extend;

    fn keys(seed: u64) -> [PartyKeys; 3] {
        let key = |a: usize, b: usize| {
            let (low, high) = (a.min(b), a.max(b));
            Some(Prg::new(test_key(seed, &format!("{low} {high}"))))
        };
        [0, 1, 2].map(|me: usize| PartyKeys {
            dealer: Prg::new(test_key(seed, &format!("dealer {me}"))),
            pairwise: [0, 1, 2].map(|peer| (peer != me).then(|| key(me, peer)).flatten()),
        })
    }

    /// The shares of two tensors after a refresh at a step, by party.
    fn refreshed(seed: u64, step: u64, ring_bits: u8) -> [Vec<u64>; 3] {
        let secret = |first: u64| Tensor::new(vec![40], (first..first + 40).collect());
        let (a, b) = (
            test_shares(&secret(7), 1, "a"),
            test_shares(&secret(900), 1, "b"),
        );
        let keys = keys(seed);
        [0, 1, 2].map(|me: usize| {
            let mut state = State {
                shares: BTreeMap::from([("a".into(), a[me].clone()), ("b".into(), b[me].clone())]),
                ..State::default()
            };
            state.refresh(PartyId::ALL[me], step, &keys[me], ring_bits);
            state
                .shares
                .into_values()
                .flat_map(Tensor::into_data)
                .collect()
        })
    }

    #[test]
    fn refreshed_shares_stand_for_the_same_and_are_others_for_every_step_and_session() {
        for ring_bits in [64, 48] {
            let known = refreshed(1, 5, ring_bits);
            for (seed, step) in [(1, 5), (1, 6), (2, 5)] {
                let shares = refreshed(seed, step, ring_bits);
                for at in 0..80 {
                    let sum = shares.iter().fold(0u64, |sum, s| sum.wrapping_add(s[at]));
                    let expected = if at < 40 { 7 + at } else { 860 + at } as u64;
                    assert_eq!(sign_extend(sum, ring_bits), expected);
                    assert!(
                        shares
                            .iter()
                            .all(|s| ring_bits == 64 || s[at] >> ring_bits == 0)
                    );
                    if (seed, step) != (1, 5) {
                        assert!((0..3).all(|me: usize| shares[me][at] != known[me][at]));
                    }
                }
            }
        }
    }
}
