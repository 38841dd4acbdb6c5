//! Session ids: what four nodes, one job and one attempt have in common and nothing else has.

use rand::TryRng;
use rand::rngs::SysRng;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::JobId;

/// A session's name on the wire.
pub type SessionId = [u8; 32];
/// What a node contributes to a session's id: fresh for every attempt.
pub type Nonce = [u8; 32];

/// Fresh bytes from the operating system.
///
/// # Errors
/// The operating system's, as text: a node without randomness must not go on.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], String> {
    let mut bytes = [0; N];
    SysRng
        .try_fill_bytes(&mut bytes)
        .map_err(|err| format!("the operating system gives no random bytes: {err}"))?;
    Ok(bytes)
}

/// A nonce from the operating system.
///
/// # Errors
/// See [`random_bytes`].
pub fn fresh_nonce() -> Result<Nonce, String> {
    random_bytes()
}

/// A state of a job that the parties have written down: the number of steps done, and a name that
/// only the shares of one session have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Mark {
    /// Steps that are done.
    pub step: u64,
    /// See [`Mark::of`].
    pub id: [u8; 32],
}

impl Mark {
    /// The mark of a session after so many steps.
    pub fn of(session: &SessionId, step: u64) -> Mark {
        let hash = Sha256::new()
            .chain_update(b"trefoil checkpoint v1\0")
            .chain_update(session)
            .chain_update(step.to_le_bytes());
        Mark {
            step,
            id: hash.finalize().into(),
        }
    }
}

/// One try at a job: a session of its own, with keys of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// Sessions of the job before this one.
    pub number: u32,
    /// Where it is taken up; from the beginning without it.
    pub resume: Option<Mark>,
}

impl Attempt {
    /// The first step of the attempt.
    pub fn from(&self) -> u64 {
        self.resume.map_or(0, |mark| mark.step)
    }
}

/// The id: every node has put a nonce in, so no single node's lost disk can repeat one. Nodes that
/// mean another attempt, or another state to take the job up from, have another id.
pub fn session_id(
    core_hash: &[u8; 32],
    job: &JobId,
    attempt: &Attempt,
    nonces: &[Nonce; 4],
) -> SessionId {
    let mut hash = Sha256::new()
        .chain_update(b"trefoil session v2\0")
        .chain_update(core_hash)
        .chain_update(job.0)
        .chain_update(attempt.number.to_le_bytes());
    match attempt.resume {
        None => hash.update([0]),
        Some(mark) => {
            hash.update([1]);
            hash.update(mark.step.to_le_bytes());
            hash.update(mark.id);
        }
    }
    nonces
        .iter()
        .fold(hash, |hash, nonce| hash.chain_update(nonce))
        .finalize()
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_a_session_changes_its_id() {
        let nonces = [[1; 32], [2; 32], [3; 32], [4; 32]];
        let id = |core: u8, job: u8, number, resume, nonces: &[Nonce; 4]| {
            let attempt = Attempt { number, resume };
            session_id(&[core; 32], &JobId([job; 32]), &attempt, nonces)
        };
        let first = id(0, 0, 0, None, &nonces);
        assert_eq!(first, id(0, 0, 0, None, &nonces));
        assert_ne!(first, id(1, 0, 0, None, &nonces));
        assert_ne!(first, id(0, 1, 0, None, &nonces));
        assert_ne!(first, id(0, 0, 1, None, &nonces));
        let mark = Mark::of(&first, 7);
        let resumed = id(0, 0, 1, Some(mark), &nonces);
        assert_ne!(resumed, id(0, 0, 1, None, &nonces));
        let other = Mark { step: 8, ..mark };
        assert_ne!(resumed, id(0, 0, 1, Some(other), &nonces));
        let other = Mark::of(&resumed, 7);
        assert_ne!(mark, other, "another session's state of the same step");
        assert_ne!(resumed, id(0, 0, 1, Some(other), &nonces));
        for at in 0..4 {
            let mut other = nonces;
            other[at][0] ^= 1;
            assert_ne!(first, id(0, 0, 0, None, &other));
        }
    }
}
