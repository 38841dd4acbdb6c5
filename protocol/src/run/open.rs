//! A round: a party posts its masked shares of what is opened, takes its peers', adds the three and
//! hashes the sums; where one thread works, run by run while a run is in the core's own cache.

use bytes::Bytes;

use super::party::Step;
use super::value::{Value, block_len};
use super::{StepError, frame};
use crate::plan::{Instr, Rep, Round, VId};
use crate::ring::kernel::{BLOCK, Plane};
use crate::threads;
use crate::transport::Transport;

/// One opening of a round.
struct Open {
    src: VId,
    mask: VId,
    out: VId,
    rep: Rep,
    n: usize,
}

impl Open {
    fn bytes(&self) -> usize {
        self.rep.wire_bytes(self.n) as usize
    }
}

impl Step<'_> {
    /// Opens what round `index` opens.
    pub(super) fn open(
        &mut self,
        round: &Round,
        index: usize,
        net: &mut dyn Transport,
    ) -> Result<(), StepError> {
        let opens = round.opens.iter().filter_map(|open| match open {
            Instr::Open { src, mask, out } => {
                let slot = self.plan.slot(*out);
                Some(Open {
                    src: *src,
                    mask: *mask,
                    out: *out,
                    rep: slot.rep,
                    n: slot.n,
                })
            }
            _ => None,
        });
        let opens: Vec<Open> = opens.collect();
        let own = self.frame(&opens, index);
        for peer in self.me.others() {
            net.post(peer, own.clone())?;
        }
        let [p, q] = self.me.others();
        let p_frame = net.next(p)?;
        frame::check_header(&p_frame, &own, p)?;
        let q_frame = net.next(q)?;
        frame::check_header(&q_frame, &own, q)?;
        let frames = [own, p_frame, q_frame];
        let mut at = frame::HEADER_BYTES;
        for open in &opens {
            let parts = frames.each_ref().map(|frame| &frame[at..at + open.bytes()]);
            let value = self.combine(open, parts);
            self.set(open.out, value);
            at += open.bytes();
        }
        self.see(frames.iter().map(|frame| frame.len() as u64).sum());
        Ok(())
    }

    /// This party's frame: the header and the packed `src + mask` (XOR for bits) of each opening.
    fn frame(&self, opens: &[Open], index: usize) -> Bytes {
        let total: usize = opens.iter().map(Open::bytes).sum();
        let mut frame = Vec::with_capacity(frame::HEADER_BYTES + total);
        frame.extend(frame::header(self.step, index, &self.opened.short()));
        for open in opens {
            let (value, masks) = (self.operand(open.src), self.operand(open.mask));
            let block_bytes = open.rep.wire_bytes(BLOCK) as usize;
            let work = open.bytes() / 4;
            let pack = |mut block: usize, mut out: &mut [u8]| match open.rep {
                Rep::Ring { width } => {
                    let [mut x, mut r] = [[0u64; BLOCK]; 2];
                    while !out.is_empty() {
                        let len = block_len(open.n, block);
                        let x = value.ring(block, &mut x[..len]);
                        let r = masks.ring(block, &mut r[..len]);
                        let sum = x.iter().zip(r).map(|(x, r)| x.wrapping_add(*r));
                        out = frame::pack_ring(out, sum, width);
                        block += 1;
                    }
                }
                Rep::Bits { planes } => {
                    let mut x: Vec<Plane> = vec![[0; 8]; usize::from(planes)];
                    let mut r = x.clone();
                    while !out.is_empty() {
                        value.planes(block, 0, &mut x);
                        masks.planes(block, 0, &mut r);
                        for (x, r) in x.as_flattened_mut().iter_mut().zip(r.as_flattened()) {
                            *x ^= r;
                        }
                        out = frame::pack_planes(out, &x, block_len(open.n, block));
                        block += 1;
                    }
                }
            };
            threads::append(&mut frame, open.bytes(), block_bytes, work, pack, |_| {});
        }
        Bytes::from(frame)
    }

    /// The sum (XOR for bits) of the three packed shares, which is hashed as it is made.
    fn combine(&mut self, open: &Open, parts: [&[u8]; 3]) -> Value<'static> {
        let block_bytes = open.rep.wire_bytes(BLOCK) as usize;
        let hash = &mut self.opened;
        match open.rep {
            Rep::Ring { width } => Value::from(hash.made(open.n, BLOCK, open.n, |first, out| {
                let from = first * block_bytes;
                frame::unpack_ring_sum(parts.map(|part| &part[from..]), width, out)
            })),
            Rep::Bits { planes } => {
                let total = usize::from(planes);
                let len = open.n.div_ceil(BLOCK) * total;
                Value::Bits(hash.made(len, total, len * 10, |first, out| {
                    for (block, out) in out.chunks_mut(total).enumerate() {
                        let block = first + block;
                        for part in parts {
                            let from = &part[block * block_bytes..];
                            frame::xor_planes(from, block_len(open.n, block), out);
                        }
                    }
                }))
            }
        }
    }
}
