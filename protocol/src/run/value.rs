//! Values at a party while a step runs, read block by block (512 elements).
//!
//! A dealt value is not stored: its two PRG shares are expanded where they are read, and the third
//! is the dealer's correction, which waits packed as it came. The receiver rotates by chunk.

use std::borrow::Cow;

use bytes::Bytes;

use super::frame::{self, CHUNK};
use crate::party::PartyId;
use crate::plan::Rep;
use crate::prg::{Domain, Pos, Prg};
use crate::ring::kernel::{BLOCK, Plane};
use crate::threads;

/// A dealt value: where its share comes from.
#[derive(Debug)]
pub(super) struct Stream {
    pub id: u32,
    pub step: u64,
    pub rep: Rep,
    /// The packed correction, if the value is a correlation; `None` for plain randomness.
    pub correction: Option<Bytes>,
    pub me: PartyId,
}

impl Stream {
    fn pos(&self) -> Pos {
        let domain = match self.rep {
            Rep::Ring { .. } => Domain::Ring,
            Rep::Bits { .. } => Domain::Bits,
        };
        Pos {
            step: self.step,
            id: self.id,
            domain,
        }
    }

    /// The packed correction from the start of this chunk on, if this party receives it.
    fn corrected(&self, chunk: usize) -> Option<&[u8]> {
        let bytes = self.correction.as_ref()?;
        (frame::receiver(self.id, chunk) == self.me)
            .then(|| &bytes[frame::ordinal(chunk) * self.rep.wire_bytes(CHUNK) as usize..])
    }
}

/// A value at a party.
#[derive(Debug)]
pub(super) enum Value<'a> {
    /// Ring elements: public, or a share. Borrowed if they lie in the state or in the inputs.
    Ring(Cow<'a, [u64]>),
    /// Planes, block after block: public, or a share.
    Bits(Vec<Plane>),
    /// A dealt value.
    Stream(Stream),
}

/// Elements of a block.
pub(super) fn block_len(n: usize, block: usize) -> usize {
    BLOCK.min(n - block * BLOCK)
}

impl From<Vec<u64>> for Value<'_> {
    fn from(data: Vec<u64>) -> Self {
        Value::Ring(Cow::Owned(data))
    }
}

impl Value<'_> {
    /// Bytes that it takes beside what it borrows.
    pub fn held_bytes(&self) -> u64 {
        match self {
            Value::Ring(Cow::Borrowed(_)) => 0,
            Value::Ring(Cow::Owned(data)) => 8 * data.len() as u64,
            Value::Bits(planes) => 64 * planes.len() as u64,
            Value::Stream(stream) => stream.correction.as_ref().map_or(0, |c| c.len() as u64),
        }
    }

    /// Ring elements of a block: a view of what is stored, or expanded into `scratch`.
    pub fn ring_block<'a>(&'a self, block: usize, prg: &Prg, scratch: &'a mut [u64]) -> &'a [u64] {
        let start = block * BLOCK;
        match self {
            Value::Ring(data) => &data[start..start + scratch.len()],
            Value::Stream(stream) => {
                let Rep::Ring { width } = stream.rep else {
                    unreachable!("kernels read rings as rings");
                };
                let chunk = start / CHUNK;
                match stream.corrected(chunk) {
                    Some(bytes) => {
                        let at = (start - chunk * CHUNK) * usize::from(width.div_ceil(8));
                        frame::unpack_ring(&bytes[at..], width, scratch);
                    }
                    None => prg.fill(stream.pos(), start as u64, scratch),
                }
                scratch
            }
            Value::Bits(_) => unreachable!("kernels read rings as rings"),
        }
    }

    /// Planes `first .. first + out.len()` of a block.
    pub fn planes(
        &self,
        total: usize,
        n: usize,
        block: usize,
        first: usize,
        prg: &Prg,
        out: &mut [Plane],
    ) {
        match self {
            Value::Bits(data) => {
                let at = block * total + first;
                out.copy_from_slice(&data[at..at + out.len()]);
            }
            Value::Stream(stream) => {
                let chunk = block * BLOCK / CHUNK;
                match stream.corrected(chunk) {
                    Some(bytes) => {
                        let size = block_len(n, block).div_ceil(8);
                        let before = (block - chunk * (CHUNK / BLOCK)) * total * 64;
                        frame::unpack_planes(
                            &bytes[before + first * size..],
                            block_len(n, block),
                            out,
                        );
                    }
                    None => prg.fill(
                        stream.pos(),
                        ((block * total + first) * 8) as u64,
                        out.as_flattened_mut(),
                    ),
                }
            }
            Value::Ring(_) => unreachable!("kernels read planes as planes"),
        }
    }

    /// All ring elements, expanded if need be.
    pub fn ring<'a>(&'a self, n: usize, prg: &Prg) -> Cow<'a, [u64]> {
        match self {
            Value::Ring(data) => Cow::Borrowed(data),
            _ => Cow::Owned(threads::made(n, BLOCK, n, |first, out| {
                for (block, out) in out.chunks_mut(BLOCK).enumerate() {
                    let _ = self.ring_block(first + block, prg, out);
                }
            })),
        }
    }
}
