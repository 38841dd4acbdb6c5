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

/// The header of a round's frame.
pub fn header(step: u64, round: usize, opened: &[u8; 16]) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&step.to_le_bytes());
    header[8..12].copy_from_slice(&(round as u32).to_le_bytes());
    header[16..].copy_from_slice(opened);
    header
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

/// The header of a dealer's segment.
pub fn segment_header(step: u64, id: u32) -> [u8; SEGMENT_HEADER_BYTES] {
    let mut header = [0; SEGMENT_HEADER_BYTES];
    header[..8].copy_from_slice(&step.to_le_bytes());
    header[8..12].copy_from_slice(&id.to_le_bytes());
    header
}

/// Checks a segment's header and length; gives the payload.
pub fn segment_payload(
    segment: Bytes,
    step: u64,
    id: u32,
    payload: usize,
) -> Result<Bytes, NetError> {
    if segment.len() != SEGMENT_HEADER_BYTES + payload
        || segment[..SEGMENT_HEADER_BYTES] != segment_header(step, id)
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

/// Writes ring elements of `width` bits to the start of `out`; gives what is left of it.
///
/// # Panics
/// Where `out` is too short.
pub fn pack_ring(
    out: &mut [u8],
    words: impl ExactSizeIterator<Item = u64>,
    width: u8,
) -> &mut [u8] {
    let (bytes, rest) = out.split_at_mut(words.len() * usize::from(width.div_ceil(8)));
    let mask = low_mask(width);
    match width.div_ceil(8) {
        8 => put::<8>(bytes, words),
        7 => put::<7>(bytes, words.map(|word| word & mask)),
        6 => put::<6>(bytes, words.map(|word| word & mask)),
        5 => put::<5>(bytes, words.map(|word| word & mask)),
        4 => put::<4>(bytes, words.map(|word| word & mask)),
        3 => put::<3>(bytes, words.map(|word| word & mask)),
        2 => put::<2>(bytes, words.map(|word| word & mask)),
        _ => put::<1>(bytes, words.map(|word| word & mask)),
    }
    rest
}

/// The low `SIZE` bytes of each word. A size known to the compiler spares a call for each element.
#[inline(always)]
fn put<const SIZE: usize>(out: &mut [u8], words: impl Iterator<Item = u64>) {
    for (bytes, word) in out.as_chunks_mut::<SIZE>().0.iter_mut().zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes()[..SIZE]);
    }
}

/// Reads ring elements of `width` bits.
pub fn unpack_ring(bytes: &[u8], width: u8, out: &mut [u64]) {
    unpack_sum([bytes], width, u64::MAX, out);
}

/// Reads the sums of three parts, each with as many ring elements of `width` bits as `out`.
pub fn unpack_ring_sum(parts: [&[u8]; 3], width: u8, out: &mut [u64]) {
    unpack_sum(parts, width, low_mask(width), out);
}

#[inline(always)]
fn unpack_sum<const PARTS: usize>(parts: [&[u8]; PARTS], width: u8, mask: u64, out: &mut [u64]) {
    match width.div_ceil(8) {
        8 => get::<8, PARTS>(parts, mask, out),
        7 => get::<7, PARTS>(parts, mask, out),
        6 => get::<6, PARTS>(parts, mask, out),
        5 => get::<5, PARTS>(parts, mask, out),
        4 => get::<4, PARTS>(parts, mask, out),
        3 => get::<3, PARTS>(parts, mask, out),
        2 => get::<2, PARTS>(parts, mask, out),
        _ => get::<1, PARTS>(parts, mask, out),
    }
}

/// Sums of words of `SIZE` bytes.
#[inline(always)]
fn get<const SIZE: usize, const PARTS: usize>(parts: [&[u8]; PARTS], mask: u64, out: &mut [u64]) {
    let parts = parts.map(|part| &part.as_chunks::<SIZE>().0[..out.len()]);
    for (e, word) in out.iter_mut().enumerate() {
        let sum = parts.iter().fold(0u64, |sum, part| {
            let mut le = [0; 8];
            le[..SIZE].copy_from_slice(&part[e]);
            sum.wrapping_add(u64::from_le_bytes(le))
        });
        *word = sum & mask;
    }
}

/// The low `width` bits.
pub fn low_mask(width: u8) -> u64 {
    u64::MAX >> (64 - width)
}

/// Writes the planes of one block of `len` elements to the start of `out`; gives what is left of it.
///
/// # Panics
/// Where `out` is too short.
pub fn pack_planes<'a>(out: &'a mut [u8], planes: &[Plane], len: usize) -> &'a mut [u8] {
    let size = len.div_ceil(8);
    let (bytes, rest) = out.split_at_mut(planes.len() * size);
    if size == 64 {
        put::<8>(bytes, planes.as_flattened().iter().copied());
        return rest;
    }
    for (out, plane) in bytes.chunks_exact_mut(size).zip(planes) {
        let mut full = [0; 64];
        put::<8>(&mut full, plane.iter().copied());
        out.copy_from_slice(&full[..size]);
    }
    rest
}

/// Reads the planes of one block of `len` elements.
pub fn unpack_planes(bytes: &[u8], len: usize, planes: &mut [Plane]) {
    planes.fill([0; 8]);
    xor_planes(bytes, len, planes);
}

/// XORs the planes of one block of `len` elements into `planes`.
pub fn xor_planes(bytes: &[u8], len: usize, planes: &mut [Plane]) {
    let size = len.div_ceil(8);
    let xor = |words: &mut [u64], bytes: &[u8]| {
        for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *word ^= u64::from_le_bytes(*bytes);
        }
    };
    if size == 64 {
        return xor(planes.as_flattened_mut(), bytes);
    }
    for (plane, bytes) in planes.iter_mut().zip(bytes.chunks_exact(size)) {
        let mut full = [0; 64];
        full[..size].copy_from_slice(bytes);
        xor(plane, &full);
    }
}
