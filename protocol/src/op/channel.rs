//! Products along one axis, the channels: a factor for each, and sums of products for each. Normalisation
//! and learnable coefficients are made of them.
//!
//! Two bilinear maps for `product.rs` that are each other's gradients. A factor is opened once for its
//! channel and not once for each element, and a sum is dealt once for its channel.

use crate::ring::kernel::Acc;
use crate::threads;

/// Which map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChannelPass {
    /// `out[o, m, i] = x[o, m, i] y[m]`
    Scale,
    /// `out[m] = sum over o, i of x[o, m, i] y[o, m, i]`
    Dot,
}

/// Lengths of the axes around the channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChannelShape {
    /// Elements of the axes before.
    pub outer: usize,
    /// Channels.
    pub channels: usize,
    /// Elements of the axes after.
    pub inner: usize,
}

impl ChannelShape {
    /// Elements in all.
    pub fn elements(&self) -> usize {
        self.outer * self.channels * self.inner
    }

    /// `out (acc)= x * y`
    pub fn apply(&self, pass: ChannelPass, acc: Acc, x: &[u64], y: &[u64], out: &mut [u64]) {
        let join = |o: &mut u64, v: u64| {
            *o = match acc {
                Acc::Set => v,
                Acc::Add => o.wrapping_add(v),
                Acc::Sub => o.wrapping_sub(v),
            }
        };
        let row = self.channels * self.inner;
        match pass {
            // About a nanosecond an element.
            ChannelPass::Scale => threads::split(out, row, self.elements(), |first, out| {
                let x = &x[first * row..];
                for (at, out) in out.chunks_exact_mut(self.inner).enumerate() {
                    let factor = y[at % self.channels];
                    for (o, x) in out.iter_mut().zip(&x[at * self.inner..]) {
                        join(o, x.wrapping_mul(factor));
                    }
                }
            }),
            ChannelPass::Dot => threads::split(out, 1, self.elements(), |first, out| {
                for (m, out) in out.iter_mut().enumerate() {
                    let mut sum = 0u64;
                    for o in 0..self.outer {
                        let at = (o * self.channels + first + m) * self.inner;
                        let pairs = x[at..at + self.inner].iter().zip(&y[at..]);
                        sum = pairs.fold(sum, |sum, (x, y)| sum.wrapping_add(x.wrapping_mul(*y)));
                    }
                    join(out, sum);
                }
            }),
        }
    }
}
