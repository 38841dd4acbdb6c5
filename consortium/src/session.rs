//! Session ids: what four nodes, one job and one attempt have in common and nothing else has.

use rand::TryRng;
use rand::rngs::SysRng;
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

/// The id: every node has put a nonce in, so no single node's lost disk can repeat one.
pub fn session_id(
    core_hash: &[u8; 32],
    job: &JobId,
    attempt: u32,
    nonces: &[Nonce; 4],
) -> SessionId {
    let hash = Sha256::new()
        .chain_update(b"trefoil session v1\0")
        .chain_update(core_hash)
        .chain_update(job.0)
        .chain_update(attempt.to_le_bytes());
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
        let id = |core: u8, job: u8, attempt, nonces: &[Nonce; 4]| {
            session_id(&[core; 32], &JobId([job; 32]), attempt, nonces)
        };
        let first = id(0, 0, 0, &nonces);
        assert_eq!(first, id(0, 0, 0, &nonces));
        assert_ne!(first, id(1, 0, 0, &nonces));
        assert_ne!(first, id(0, 1, 0, &nonces));
        assert_ne!(first, id(0, 0, 1, &nonces));
        for at in 0..4 {
            let mut other = nonces;
            other[at][0] ^= 1;
            assert_ne!(first, id(0, 0, 0, &other));
        }
    }
}
