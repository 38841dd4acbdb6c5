//! Opens a result to the three parties: each sends its refreshed share of an output to the other two.
//!
//! The shares are those that [`run_step`](super::run_step) gives for a receiver. A sharing of zero has
//! made them as fresh as the session's keys, so that two parties who see all three learn the value and
//! nothing else of what it was computed from. One round, 8 bytes an element to each peer. What parties
//! do with the value is theirs; the dealer does not learn it.

use bytes::Bytes;

use super::opened::Opened;
use super::party::{OutputShare, State, reconstruct};
use super::{StepError, frame};
use crate::party::PartyId;
use crate::ring::Tensor;
use crate::transport::{NetError, Transport};

/// In the frame's header where a plan's rounds have their number.
const ROUND: usize = u32::MAX as usize;

/// Opens an additively shared output of step `step`, the last one that was run, to all parties.
///
/// # Errors
/// The network's, and a peer whose frame does not belong here: it has opened other values before, or
/// says something else. The session must then end.
pub fn publish(
    me: PartyId,
    step: u64,
    output: &OutputShare,
    ring_bits: u8,
    state: &mut State,
    net: &mut dyn Transport,
) -> Result<Tensor, StepError> {
    if output.xor {
        return Err(StepError::State {
            what: "output",
            name: output.name.clone(),
            problem: "is of bits, which are not opened to the parties".into(),
        });
    }
    let mut own = frame::header(step, ROUND, &output.opened).to_vec();
    own.extend(output.share.data().iter().flat_map(|w| w.to_le_bytes()));
    let own = Bytes::from(own);
    for peer in me.others() {
        net.post(peer, own.clone())?;
    }
    let mut shares = vec![output.clone()];
    for peer in me.others() {
        let theirs = net.next(peer)?;
        frame::check_header(&theirs, &own, peer)?;
        let mut words = vec![0; output.share.len()];
        frame::unpack_ring(&theirs[frame::HEADER_BYTES..], 64, &mut words);
        shares.push(OutputShare {
            share: Tensor::new(output.share.shape().to_vec(), words),
            ..output.clone()
        });
    }
    let broken = |detail: String| NetError::Protocol {
        peer: crate::party::Peer::Party(me.others()[0]),
        detail,
    };
    let shares = <[OutputShare; 3]>::try_from(shares).expect("three parties have three shares");
    let value = reconstruct(&shares, ring_bits).map_err(broken)?;
    // Parties that saw other values part here: the next frame says so.
    let mut opened = Opened::after(&state.opened);
    opened.add(value.data());
    state.opened = opened.hash();
    Ok(value)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::run::memory::{test_party_keys, test_shares};
    use crate::transport::memory;

    /// What each party learns of a value whose shares were refreshed under a seed's keys.
    fn published(
        value: &Tensor,
        seed: u64,
        ring_bits: u8,
        opened: [[u8; 16]; 3],
    ) -> [Result<(Tensor, [u8; 32]), StepError>; 3] {
        let (nets, _deals, _sink) = memory();
        let shares = test_shares(value, seed, "value");
        let parties = PartyId::ALL.into_iter().zip(nets).zip(shares);
        let mut threads = parties.map(|((me, mut net), share)| {
            let mut words = share.into_data();
            test_party_keys(seed, me).add_zero(me, 3, 0, false, &mut words);
            let mask = frame::low_mask(ring_bits);
            words.iter_mut().for_each(|word| *word &= mask);
            let output = OutputShare {
                name: "count".into(),
                share: Tensor::new(value.shape().to_vec(), words),
                xor: false,
                opened: opened[me.index()],
            };
            thread::spawn(move || {
                let mut state = State::default();
                let value = publish(me, 3, &output, ring_bits, &mut state, &mut net)?;
                Ok((value, state.opened))
            })
        });
        let [a, b, c] = std::array::from_fn(|_| threads.next().expect("three"));
        [a, b, c].map(|thread| thread.join().expect("no panic"))
    }

    #[test]
    fn all_three_parties_learn_the_value_in_both_rings() {
        let value = Tensor::new(vec![3], vec![0, 12_345, -7i64 as u64]);
        for ring_bits in [64, 48] {
            let learnt = published(&value, 5, ring_bits, [[1; 16]; 3]);
            let first = learnt[0].clone().expect("it is opened");
            assert_eq!(first.0, value);
            assert_ne!(first.1, [0; 32], "it counts among what was opened");
            assert!(learnt.iter().all(|each| each.as_ref() == Ok(&first)));
        }
    }

    #[test]
    fn a_party_that_saw_other_openings_is_found_out() {
        let value = Tensor::new(vec![1], vec![9]);
        let learnt = published(&value, 5, 64, [[1; 16], [1; 16], [2; 16]]);
        for each in learnt {
            let said = each.expect_err("they diverged").to_string();
            assert!(said.contains("other opened values"), "{said}");
        }
    }
}
