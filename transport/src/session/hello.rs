//! The agreement at the start of every session stream: both ends say what they
//! are about to compute, and compare.

use crate::stream::{Prefix, RawStream, write_message};
use crate::{HelloMismatch, Link, TransportError};
use serde::{Deserialize, Serialize};

/// Room for two thousand program hashes.
const HELLO_MAX_BYTES: u64 = 64 << 10;

/// What both ends of a session stream must agree on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Version of the wire format above this crate.
    pub wire_version: u32,
    /// The session.
    pub session: [u8; 32],
    /// Hashes of all programs of the job, in order.
    pub program_hashes: Vec<[u8; 32]>,
    /// Width of the ring.
    pub ring_bits: u8,
    /// Fraction bits.
    pub frac_bits: u8,
    /// Name and version of the software; named in errors, not compared.
    pub software: String,
}

impl Hello {
    /// The opening side: says its hello, then compares the answer.
    pub(super) async fn say_first(
        &self,
        stream: &mut RawStream,
        link: &Link,
        peer: &str,
    ) -> Result<(), TransportError> {
        self.send(stream, link).await?;
        self.compare(&receive(stream, link, peer).await?, peer)
    }

    /// The accepting side: always answers, so that both ends can name a difference.
    pub(super) async fn answer(
        &self,
        stream: &mut RawStream,
        link: &Link,
        peer: &str,
    ) -> Result<(), TransportError> {
        let theirs = receive(stream, link, peer).await?;
        self.send(stream, link).await?;
        self.compare(&theirs, peer)
    }

    async fn send(&self, stream: &mut RawStream, link: &Link) -> Result<(), TransportError> {
        let bytes = postcard::to_stdvec(self).map_err(|err| TransportError::Session {
            detail: err.to_string(),
        })?;
        write_message(&mut stream.send, bytes.into())
            .await
            .map_err(|err| link.message_error(err))
    }

    /// The first field in which the two differ, as an error.
    fn compare(&self, theirs: &Hello, peer: &str) -> Result<(), TransportError> {
        let programs = |hello: &Hello| format!("{} programs", hello.program_hashes.len());
        let differing = self
            .program_hashes
            .iter()
            .zip(&theirs.program_hashes)
            .position(|(ours, theirs)| ours != theirs);
        let (field, ours, theirs_text) = if self.wire_version != theirs.wire_version {
            (
                "wire version",
                self.wire_version.to_string(),
                theirs.wire_version.to_string(),
            )
        } else if self.session != theirs.session {
            ("session id", hex(&self.session), hex(&theirs.session))
        } else if self.ring_bits != theirs.ring_bits {
            (
                "ring bits",
                self.ring_bits.to_string(),
                theirs.ring_bits.to_string(),
            )
        } else if self.frac_bits != theirs.frac_bits {
            (
                "fraction bits",
                self.frac_bits.to_string(),
                theirs.frac_bits.to_string(),
            )
        } else if self.program_hashes.len() != theirs.program_hashes.len() {
            ("number of programs", programs(self), programs(theirs))
        } else if let Some(at) = differing {
            let name = |hello: &Hello| format!("program {at} {}", hex(&hello.program_hashes[at]));
            ("program hash", name(self), name(theirs))
        } else {
            return Ok(());
        };
        Err(TransportError::HelloMismatch(Box::new(HelloMismatch {
            peer: peer.to_owned(),
            field,
            ours,
            theirs: theirs_text,
            our_software: self.software.clone(),
            their_software: theirs.software.clone(),
        })))
    }
}

async fn receive(stream: &mut RawStream, link: &Link, peer: &str) -> Result<Hello, TransportError> {
    let bytes = stream
        .reader
        .next(Prefix::U32, HELLO_MAX_BYTES)
        .await
        .map_err(|err| link.frame_error(err))?;
    let bytes =
        bytes.ok_or_else(|| link.closed_error(format!("{peer} left before the session began")))?;
    postcard::from_bytes(&bytes).map_err(|err| TransportError::Malformed {
        addr: link.remote_addr(),
        detail: format!("hello of {peer}: {err}"),
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
