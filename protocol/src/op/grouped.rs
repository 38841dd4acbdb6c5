//! Convolution in groups of channels (depthwise: one channel a group) and with dilation, and its two
//! gradients: three bilinear maps for `product.rs`.
//!
//! Each group is an ordinary convolution of its channels, gathered from all images; a dilated window is
//! an ordinary one with zeros between its weights. So the kernels of [`crate::ring::kernel`] do the work.
//! What dilation d costs in multiply-adds beyond the useful ones is `((k-1)d + 1)^2 / k^2`.

use crate::ring::kernel::{Acc, ConvShape, conv2d, conv2d_grad_input, conv2d_grad_weight};

/// Which of the three maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Output from images x and weights y.
    Forward,
    /// Gradient of the input from the output's gradient x and weights y.
    Input,
    /// Gradient of the weights from images x and the output's gradient y.
    Weight,
}

/// The shape of a convolution in groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GroupShape {
    /// One group with the dilated window.
    pub group: ConvShape,
    /// Number of groups.
    pub groups: usize,
    /// Window height and width as the weights have it.
    pub kernel: [usize; 2],
    /// Steps between the weights of a window.
    pub dilation: [usize; 2],
}

impl GroupShape {
    /// Words of the input, the weights and the output.
    pub fn lens(&self) -> [usize; 3] {
        let s = &self.group;
        let weights = s.c_out * s.c_in * self.kernel[0] * self.kernel[1];
        [s.x_len(), weights, s.y_len()].map(|n| n * self.groups)
    }

    /// Multiply-adds, those with the zeros of a dilated window counted.
    pub fn multiply_adds(&self) -> u64 {
        let s = &self.group;
        (s.y_len() as u64) * (s.c_in * s.kh * s.kw) as u64 * self.groups as u64
    }

    /// Terms of one element's sum that are not zero, at most.
    pub fn terms(&self, pass: Pass) -> usize {
        let window = self.kernel[0] * self.kernel[1];
        match pass {
            Pass::Forward => self.group.c_in * window,
            Pass::Input => self.group.c_out * window,
            Pass::Weight => self.group.n * self.group.out_h() * self.group.out_w(),
        }
    }

    /// `out (acc)= x * y`
    pub fn apply(&self, pass: Pass, acc: Acc, x: &[u64], y: &[u64], out: &mut [u64]) {
        let s = &self.group;
        let image = |channels: usize, pixels: usize| Channels {
            images: s.n,
            group: channels * pixels,
            groups: self.groups,
        };
        let input = image(s.c_in, s.h * s.w);
        let output = image(s.c_out, s.out_h() * s.out_w());
        let weights = self.lens()[1] / self.groups;
        let window = |w: &[u64]| self.dilated(w);
        for g in 0..self.groups {
            let part = g * weights..(g + 1) * weights;
            match pass {
                Pass::Forward => {
                    let mut sum = output.gather(out, g);
                    conv2d(acc, s, &input.gather(x, g), &window(&y[part]), &mut sum);
                    output.scatter(&sum, g, out);
                }
                Pass::Input => {
                    let mut sum = input.gather(out, g);
                    let dy = output.gather(x, g);
                    conv2d_grad_input(acc, s, &dy, &window(&y[part]), &mut sum);
                    input.scatter(&sum, g, out);
                }
                Pass::Weight => {
                    let mut sum = self.dilated(&out[part.clone()]);
                    let dy = output.gather(y, g);
                    conv2d_grad_weight(acc, s, &input.gather(x, g), &dy, &mut sum);
                    self.for_weights(|at, dilated| out[part.start + at] = sum[dilated]);
                }
            }
        }
    }

    /// Calls `each(weight, place in the dilated window)` for the weights of one group.
    fn for_weights(&self, mut each: impl FnMut(usize, usize)) {
        let s = &self.group;
        let [kh, kw] = self.kernel;
        for pair in 0..s.c_out * s.c_in {
            for ky in 0..kh {
                for kx in 0..kw {
                    let row = pair * s.kh + ky * self.dilation[0];
                    each(
                        (pair * kh + ky) * kw + kx,
                        row * s.kw + kx * self.dilation[1],
                    );
                }
            }
        }
    }

    fn dilated(&self, weights: &[u64]) -> Vec<u64> {
        let mut out = vec![0; self.group.w_len()];
        self.for_weights(|at, dilated| out[dilated] = weights[at]);
        out
    }
}

/// The channels of one group within images of all groups.
struct Channels {
    images: usize,
    /// Words of a group in one image.
    group: usize,
    groups: usize,
}

impl Channels {
    fn gather(&self, all: &[u64], g: usize) -> Vec<u64> {
        let mut part = Vec::with_capacity(self.images * self.group);
        for image in all.chunks_exact(self.group * self.groups) {
            part.extend_from_slice(&image[g * self.group..(g + 1) * self.group]);
        }
        part
    }

    fn scatter(&self, part: &[u64], g: usize, all: &mut [u64]) {
        let images = all.chunks_exact_mut(self.group * self.groups);
        for (image, part) in images.zip(part.chunks_exact(self.group)) {
            image[g * self.group..(g + 1) * self.group].copy_from_slice(part);
        }
    }
}
