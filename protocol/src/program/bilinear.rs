//! The builder's convolutions, and its products along channels.

use super::builder::Built;
use super::{Builder, ChannelPass, ChannelShape, ConvShape, GroupShape, Pass, Product, Val};
use crate::ring::elements;

/// Stride, symmetric zero padding, dilation and groups of a convolution, height first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvSpec {
    /// Steps between windows.
    pub stride: [usize; 2],
    /// Zeros added on each side.
    pub pad: [usize; 2],
    /// Steps between the weights of a window.
    pub dilation: [usize; 2],
    /// Groups of channels, each convolved for itself.
    pub groups: usize,
}

impl Default for ConvSpec {
    fn default() -> ConvSpec {
        ConvSpec {
            stride: [1, 1],
            pad: [0, 0],
            dilation: [1, 1],
            groups: 1,
        }
    }
}

impl Builder {
    /// A convolution of `[n, c, h, w]` with `[o, c / groups, kh, kw]`, or a gradient of it, and the shape
    /// of its output.
    fn convolution(
        &self,
        pass: Pass,
        x: &[usize],
        w: &[usize],
        spec: ConvSpec,
    ) -> Built<(Product, [usize; 4])> {
        let ([n, c_in, h, width], [c_out, c, kh, kw]) = (x, w) else {
            return Err(self.error(
                "conv2d",
                format!("needs [n,c,h,w] and [o,c,kh,kw], has {x:?} and {w:?}"),
            ));
        };
        let groups = spec.groups;
        if groups == 0 || c_in % groups != 0 || c_out % groups != 0 || c_in / groups != *c {
            return Err(self.error(
                "conv2d",
                format!(
                    "input has {c_in} channels in {groups} groups, weights have {c} for {c_out} filters"
                ),
            ));
        }
        let ([sh, sw], [dh, dw]) = (spec.stride, spec.dilation);
        let fits = dh > 0 && dw > 0 && sh > 0 && sw > 0 && *kh > 0 && *kw > 0;
        let span = |k: usize, d: usize| (k.max(1) - 1) * d + 1;
        let window = [span(*kh, dh), span(*kw, dw)];
        if !fits || h + 2 * spec.pad[0] < window[0] || width + 2 * spec.pad[1] < window[1] {
            return Err(self.error(
                "conv2d",
                format!(
                    "window {kh}x{kw}, stride {sh}x{sw}, dilation {dh}x{dw}, padding {:?} does not fit \
                     {h}x{width}",
                    spec.pad
                ),
            ));
        }
        let group = ConvShape {
            n: *n,
            c_in: *c,
            h: *h,
            w: *width,
            c_out: c_out / groups,
            kh: window[0],
            kw: window[1],
            stride: spec.stride,
            pad: spec.pad,
        };
        let out = [*n, *c_out, group.out_h(), group.out_w()];
        let product = if groups == 1 && spec.dilation == [1, 1] {
            match pass {
                Pass::Forward => Product::Conv(group),
                Pass::Input => Product::ConvGradInput(group),
                Pass::Weight => Product::ConvGradWeight(group),
            }
        } else {
            let shape = GroupShape {
                group,
                groups,
                kernel: [*kh, *kw],
                dilation: spec.dilation,
            };
            Product::Grouped(pass, shape)
        };
        Ok((product, out))
    }

    /// Convolution of images `[n,c,h,w]` with weights `[o,c/groups,kh,kw]`.
    pub fn conv2d(&mut self, x: Val, w: Val, spec: ConvSpec) -> Built {
        let (xs, ws) = (self.shape(x), self.shape(w));
        let (product, out) = self.convolution(Pass::Forward, &xs, &ws, spec)?;
        self.product(product, x, w, &out)
    }

    /// Gradient of a convolution's input: `dy` is the output's gradient, `x_shape` the input's shape.
    pub fn conv2d_grad_input(
        &mut self,
        dy: Val,
        w: Val,
        x_shape: &[usize],
        spec: ConvSpec,
    ) -> Built {
        let ws = self.shape(w);
        let (product, _) = self.convolution(Pass::Input, x_shape, &ws, spec)?;
        self.product(product, dy, w, x_shape)
    }

    /// Gradient of a convolution's weights: `w_shape` is their shape.
    pub fn conv2d_grad_weight(
        &mut self,
        x: Val,
        dy: Val,
        w_shape: &[usize],
        spec: ConvSpec,
    ) -> Built {
        let xs = self.shape(x);
        let (product, _) = self.convolution(Pass::Weight, &xs, w_shape, spec)?;
        self.product(product, x, dy, w_shape)
    }

    fn channels(&self, x: Val, axis: usize) -> Built<ChannelShape> {
        let shape = self.shape(x);
        if axis >= shape.len() {
            return Err(self.error("channels", format!("{shape:?} has no axis {axis}")));
        }
        Ok(ChannelShape {
            outer: elements(&shape[..axis]),
            channels: shape[axis],
            inner: elements(&shape[axis + 1..]),
        })
    }

    /// x times a factor for each position of an axis; the factors are opened once, not broadcast.
    pub fn scale_channels(&mut self, x: Val, factors: Val, axis: usize) -> Built {
        let s = self.channels(x, axis)?;
        let shape = self.shape(x);
        self.product(Product::Channel(ChannelPass::Scale, s), x, factors, &shape)
    }

    /// For each position of an axis the sum of `x * y` over all other axes; same shapes.
    pub fn channel_dot(&mut self, x: Val, y: Val, axis: usize) -> Built {
        let s = self.channels(x, axis)?;
        self.product(Product::Channel(ChannelPass::Dot, s), x, y, &[s.channels])
    }
}
