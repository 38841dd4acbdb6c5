//! What is on the wire: frame and segment headers, and the packing of rings and planes.
//!
//! Rings take whole bytes an element (8 at k = 64, 6 at k = 48, 2 for a 16-bit term); planes take
//! whole bytes for each plane of a block of 512 elements. Everything is little-endian.

use bytes::Bytes;

use crate::party::{PartyId, Peer};
use crate::plan::Rep;
use crate::ring::kernel::{BLOCK, Plane};
use crate::transport::NetError;

/// Step (8), round (4), zero (4), hash of everything opened before (16).
pub const HEADER_BYTES: usize = 32;
/// Step (8), correlation id (4), zero (4).
pub const SEGMENT_HEADER_BYTES: usize = 16;
/// Elements whose correction goes to one receiver before it rotates; a multiple of [`BLOCK`].
pub const CHUNK: usize = 16 * BLOCK;

/// How many parties receive a correction for `n` elements.
pub fn receivers(n: usize) -> u64 {
    n.div_ceil(CHUNK).min(3) as u64
}

/// The party that receives the correction of a chunk.
pub fn receiver(id: u32, chunk: usize) -> PartyId {
    PartyId::ALL[(id as usize + chunk) % 3]
}

/// Where chunk `chunk` stands among those of its receiver.
pub fn ordinal(chunk: usize) -> usize {
    chunk / 3
}

/// Bytes of the correction that `to` receives for value `id`.
pub fn correction_bytes(id: u32, rep: Rep, n: usize, to: PartyId) -> usize {
    (0..n.div_ceil(CHUNK))
        .filter(|chunk| receiver(id, *chunk) == to)
        .map(|chunk| rep.wire_bytes(CHUNK.min(n - chunk * CHUNK)) as usize)
        .sum()
}

/// Writes the header of a round's frame.
pub fn put_header(frame: &mut Vec<u8>, step: u64, round: usize, opened: &[u8; 16]) {
    frame.extend_from_slice(&step.to_le_bytes());
    frame.extend_from_slice(&(round as u32).to_le_bytes());
    frame.extend_from_slice(&[0; 4]);
    frame.extend_from_slice(opened);
}

/// Checks a frame's header and length against what this party expects.
pub fn check_header(frame: &[u8], own: &[u8], from: PartyId) -> Result<(), NetError> {
    let broken = |detail: String| NetError::Protocol {
        peer: Peer::Party(from),
        detail,
    };
    if frame.len() != own.len() {
        return Err(broken(format!(
            "a frame of {} bytes, expected {}",
            frame.len(),
            own.len()
        )));
    }
    if frame[..16] != own[..16] {
        let number = |f: &[u8]| {
            let mut step = [0; 8];
            step.copy_from_slice(&f[..8]);
            (
                u64::from_le_bytes(step),
                u32::from_le_bytes([f[8], f[9], f[10], f[11]]),
            )
        };
        return Err(broken(format!(
            "a frame for (step, round) {:?}, expected {:?}",
            number(frame),
            number(own)
        )));
    }
    if frame[16..HEADER_BYTES] != own[16..HEADER_BYTES] {
        return Err(broken(
            "it has seen other opened values than this party (the run diverged)".into(),
        ));
    }
    Ok(())
}

/// Writes the header of a dealer's segment.
pub fn put_segment_header(segment: &mut Vec<u8>, step: u64, id: u32) {
    segment.extend_from_slice(&step.to_le_bytes());
    segment.extend_from_slice(&id.to_le_bytes());
    segment.extend_from_slice(&[0; 4]);
}

/// Checks a segment's header and length; gives the payload.
pub fn segment_payload(
    segment: Bytes,
    step: u64,
    id: u32,
    payload: usize,
) -> Result<Bytes, NetError> {
    let mut expected = Vec::with_capacity(SEGMENT_HEADER_BYTES);
    put_segment_header(&mut expected, step, id);
    if segment.len() != SEGMENT_HEADER_BYTES + payload
        || segment[..SEGMENT_HEADER_BYTES] != expected[..]
    {
        return Err(NetError::Protocol {
            peer: Peer::Dealer,
            detail: format!(
                "a segment of {} bytes that is not correlation {id} of step {step}",
                segment.len()
            ),
        });
    }
    Ok(segment.slice(SEGMENT_HEADER_BYTES..))
}

/// Appends ring elements of `width` bits.
pub fn pack_ring(out: &mut Vec<u8>, words: &[u64], width: u8) {
    let bytes = usize::from(width.div_ceil(8));
    if bytes == 8 {
        let at = out.len();
        out.resize(at + words.len() * 8, 0);
        for (chunk, word) in out[at..].chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        return;
    }
    let mask = low_mask(width);
    for word in words {
        out.extend_from_slice(&(word & mask).to_le_bytes()[..bytes]);
    }
}

/// Reads ring elements of `width` bits.
pub fn unpack_ring(bytes: &[u8], width: u8, out: &mut [u64]) {
    let size = usize::from(width.div_ceil(8));
    if size == 8 {
        for (word, chunk) in out.iter_mut().zip(bytes.chunks_exact(8)) {
            let mut le = [0; 8];
            le.copy_from_slice(chunk);
            *word = u64::from_le_bytes(le);
        }
        return;
    }
    for (word, chunk) in out.iter_mut().zip(bytes.chunks_exact(size)) {
        let mut le = [0; 8];
        le[..size].copy_from_slice(chunk);
        *word = u64::from_le_bytes(le);
    }
}

/// The low `width` bits.
pub fn low_mask(width: u8) -> u64 {
    u64::MAX >> (64 - width)
}

/// Appends the planes of one block of `len` elements.
pub fn pack_planes(out: &mut Vec<u8>, planes: &[Plane], len: usize) {
    let size = len.div_ceil(8);
    for plane in planes {
        let mut bytes = [0; 64];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(plane) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&bytes[..size]);
    }
}

/// Reads the planes of one block of `len` elements.
pub fn unpack_planes(bytes: &[u8], len: usize, planes: &mut [Plane]) {
    let size = len.div_ceil(8);
    for (plane, source) in planes.iter_mut().zip(bytes.chunks_exact(size)) {
        let mut full = [0; 64];
        full[..size].copy_from_slice(source);
        for (word, chunk) in plane.iter_mut().zip(full.chunks_exact(8)) {
            let mut le = [0; 8];
            le.copy_from_slice(chunk);
            *word = u64::from_le_bytes(le);
        }
    }
}
