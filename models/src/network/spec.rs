//! A layer as it is written in TOML, and what it becomes behind a given shape.

use serde::{Deserialize, Serialize};
use trefoil_protocol::program::Curve;

use super::fit::{self, Fit};
use super::{LayerKind, Window};

/// Values between two layers for one image, and weights of one layer, at most.
pub(super) const MAX_ELEMENTS: usize = 1 << 24;

/// One number for both directions, or height and width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Extent {
    /// The same down and right.
    Both(usize),
    /// Height, then width.
    Each([usize; 2]),
}

impl Extent {
    fn pair(self) -> [usize; 2] {
        match self {
            Extent::Both(length) => [length, length],
            Extent::Each(pair) => pair,
        }
    }
}

/// How far the windows of a pool reach over the edges of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Border {
    /// The same on all sides.
    All(usize),
    /// Above and below, then left and right.
    Each([usize; 2]),
    /// Top, left, bottom, right.
    Sides([usize; 4]),
}

impl Border {
    fn sides(self) -> [usize; 4] {
        match self {
            Border::All(width) => [width; 4],
            Border::Each([high, wide]) => [high, wide, high, wide],
            Border::Sides(sides) => sides,
        }
    }
}

/// Zeros around an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Padding {
    /// This many on each side.
    Zeros(Extent),
    /// As many as leave the size unchanged at stride 1 (odd kernels).
    Named(PaddingName),
}

/// A padding that follows from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PaddingName {
    /// `(kernel - 1) / 2` on each side, times the dilation.
    Same,
    /// None.
    Valid,
}

/// A layer as it is written in TOML.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum LayerSpec {
    /// Convolution with bias.
    Conv {
        /// Output channels.
        filters: usize,
        /// Window.
        kernel: Extent,
        /// Steps between windows; 1 unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stride: Option<Extent>,
        /// Zeros around the image; none unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        padding: Option<Padding>,
        /// Steps between the weights of a window; 1 unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        dilation: Option<Extent>,
        /// Groups of channels, each convolved for itself; 1 unless given. As many as there are channels:
        /// depthwise.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        groups: Option<usize>,
    },
    /// Fully connected, with bias; flattens its input.
    Dense {
        /// Outputs; one for each class unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        units: Option<usize>,
    },
    /// `max(0, x)`
    Relu {},
    /// `min(max(x, 0), 6)`
    Relu6 {},
    /// x where it is positive, `slope x` elsewhere.
    LeakyRelu {
        /// Between 0 and 1; 1/64 unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        slope: Option<f64>,
    },
    /// `1 / (1 + exp(-x))`
    Sigmoid {},
    /// The hyperbolic tangent.
    Tanh {},
    /// `x sigmoid(x)`
    Silu {},
    /// `x Phi(x)`, Phi the normal distribution function.
    Gelu {},
    /// Batch normalisation of every channel, with learnt scale and shift.
    BatchNorm {
        /// The part of a batch's statistics in the running ones; 1/8 unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        momentum: Option<f64>,
    },
    /// `x * x`
    Square {},
    /// `c_0 + c_1 x + .. + c_d x^d`, degree 2 to 4.
    Poly {
        /// From the constant upward.
        coefficients: Vec<f64>,
    },
    /// The polynomial that is closest to ReLU on an interval.
    ApproxRelu {
        /// 2 to 4.
        degree: usize,
        /// From below 0 to above 0; -4 to 4 unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        interval: Option<[f64; 2]>,
        /// What is made small: the mean square of the distance unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        fit: Option<Fit>,
        /// Whether each channel learns coefficients of its own, beginning with these; not unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        learnable: Option<bool>,
    },
    /// Maxima over windows.
    MaxPool {
        /// Window.
        window: Extent,
        /// Steps between windows; the window unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stride: Option<Extent>,
        /// Border that windows may reach into, which takes no part; none unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        padding: Option<Border>,
        /// Whether there is a last window where less than a step is left; not unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ceil_mode: Option<bool>,
    },
    /// Averages over windows.
    AvgPool {
        /// Window.
        window: Extent,
        /// Steps between windows; the window unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stride: Option<Extent>,
        /// Zeros around the image; none unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        padding: Option<Border>,
        /// Whether there is a last window where less than a step is left, for the average of what it has;
        /// not unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        ceil_mode: Option<bool>,
        /// Whether the zeros count; they do unless given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        count_include_pad: Option<bool>,
    },
    /// The average of every channel.
    GlobalAvgPool {},
    /// One axis instead of three; done before `dense` in any case.
    Flatten {},
    /// In training, this part of the values becomes 0, chosen anew in every step.
    Dropout {
        /// Between 0 and 1.
        rate: f64,
    },
    /// Probabilities of the classes; the last layer.
    Softmax {},
    /// Logarithms of the probabilities; the last layer.
    LogSoftmax {},
    /// The sum of the layers that `from` lists, of equal shapes.
    Add {},
    /// The channels of the layers that `from` lists, one after the other.
    Concat {},
}

impl LayerSpec {
    /// The shape of the output, of one image, behind inputs of these shapes.
    pub fn output(&self, inputs: &[Vec<usize>]) -> Result<Vec<usize>, String> {
        // Units that are left open are as many as there are classes, which only the network knows.
        match (self, inputs) {
            (LayerSpec::Dense { units: None }, _) => Err("its units are not said".into()),
            (_, []) => Err("reads nothing".into()),
            _ => resolve(self, inputs, 0).map(|(_, output)| output),
        }
    }

    /// Whether it is a non-linear function of each value alone, which another can take the place of.
    pub fn is_activation(&self) -> bool {
        matches!(
            self,
            LayerSpec::Relu {}
                | LayerSpec::Relu6 {}
                | LayerSpec::LeakyRelu { .. }
                | LayerSpec::Sigmoid {}
                | LayerSpec::Tanh {}
                | LayerSpec::Silu {}
                | LayerSpec::Gelu {}
                | LayerSpec::Square {}
                | LayerSpec::Poly { .. }
                | LayerSpec::ApproxRelu { .. }
        )
    }

    /// How the network file calls it.
    pub fn kind(&self) -> &'static str {
        match self {
            LayerSpec::Conv { .. } => "conv",
            LayerSpec::Dense { .. } => "dense",
            LayerSpec::Relu {} => "relu",
            LayerSpec::Relu6 {} => "relu6",
            LayerSpec::LeakyRelu { .. } => "leaky_relu",
            LayerSpec::Sigmoid {} => "sigmoid",
            LayerSpec::Tanh {} => "tanh",
            LayerSpec::Silu {} => "silu",
            LayerSpec::Gelu {} => "gelu",
            LayerSpec::BatchNorm { .. } => "batch_norm",
            LayerSpec::Square {} => "square",
            LayerSpec::Poly { .. } => "poly",
            LayerSpec::ApproxRelu { .. } => "approx_relu",
            LayerSpec::MaxPool { .. } => "max_pool",
            LayerSpec::AvgPool { .. } => "avg_pool",
            LayerSpec::GlobalAvgPool {} => "global_avg_pool",
            LayerSpec::Flatten {} => "flatten",
            LayerSpec::Dropout { .. } => "dropout",
            LayerSpec::Softmax {} => "softmax",
            LayerSpec::LogSoftmax {} => "log_softmax",
            LayerSpec::Add {} => "add",
            LayerSpec::Concat {} => "concat",
        }
    }
}

/// The number of elements, if it is within the limit.
pub(super) fn elements(shape: &[usize]) -> Option<usize> {
    shape
        .iter()
        .try_fold(1usize, |product, length| product.checked_mul(*length))
        .filter(|product| *product <= MAX_ELEMENTS)
}

/// The resolved layer and its output's shape.
pub(super) fn resolve(
    spec: &LayerSpec,
    inputs: &[Vec<usize>],
    classes: usize,
) -> Result<(LayerKind, Vec<usize>), String> {
    let shape = &inputs[0][..];
    let image = || match shape {
        [c, h, w] => Ok([*c, *h, *w]),
        _ => Err(format!("needs [channels, height, width], has {shape:?}")),
    };
    let positive = |what: &str, pair: [usize; 2]| match pair {
        [0, _] | [_, 0] => Err(format!("{what} = {pair:?}; at least 1")),
        _ => Ok(pair),
    };
    let pool = |window: &Extent, stride: &Option<Extent>, border: [usize; 4], ceil: bool| {
        let mut out = image()?;
        let size = positive("window", window.pair())?;
        let stride = positive("stride", stride.unwrap_or(*window).pair())?;
        let mut pads = border;
        for side in 0..2 {
            let (length, before, behind) = (out[side + 1], border[side], border[side + 2]);
            if before.max(behind) >= size[side] || before.max(behind) > length {
                return Err(format!(
                    "padding {border:?} is not smaller than the window {size:?}, or larger than {shape:?}"
                ));
            }
            let Some(way) = (before + length + behind).checked_sub(size[side]) else {
                return Err(format!(
                    "window {size:?} does not fit into {shape:?} with padding {border:?}"
                ));
            };
            let mut steps = way / stride[side];
            // A last window begins in the image, or in the border before it.
            if ceil && steps * stride[side] < way && (steps + 1) * stride[side] < before + length {
                steps += 1;
                pads[side + 2] += steps * stride[side] - way;
            }
            out[side + 1] = steps + 1;
        }
        let window = Window { size, stride, pads };
        Ok((window, out.to_vec()))
    };
    let sides = |padding: &Option<Border>| padding.map_or([0; 4], Border::sides);
    let (kind, output) = match spec {
        LayerSpec::Conv {
            filters,
            kernel,
            stride,
            padding,
            dilation,
            groups,
        } => {
            let [c, h, w] = image()?;
            let kernel = positive("kernel", kernel.pair())?;
            let stride = positive("stride", stride.unwrap_or(Extent::Both(1)).pair())?;
            let dilation = positive("dilation", dilation.unwrap_or(Extent::Both(1)).pair())?;
            if *filters == 0 {
                return Err("filters = 0; at least 1".into());
            }
            let groups = groups.unwrap_or(1);
            if groups == 0 || c % groups != 0 || filters % groups != 0 {
                return Err(format!(
                    "groups = {groups} does not divide {c} channels and {filters} filters"
                ));
            }
            let span = |i: usize| {
                (kernel[i] - 1)
                    .saturating_mul(dilation[i])
                    .saturating_add(1)
            };
            let window = [span(0), span(1)];
            let padding = match padding {
                None | Some(Padding::Named(PaddingName::Valid)) => [0, 0],
                Some(Padding::Zeros(zeros)) => zeros.pair(),
                Some(Padding::Named(PaddingName::Same)) if kernel.iter().all(|k| k % 2 == 1) => {
                    [(window[0] - 1) / 2, (window[1] - 1) / 2]
                }
                Some(Padding::Named(PaddingName::Same)) => {
                    return Err(format!(
                        "padding \"same\" needs an odd kernel, has {kernel:?}"
                    ));
                }
            };
            if padding[0] >= window[0] || padding[1] >= window[1] {
                return Err(format!(
                    "padding {padding:?} is not smaller than the kernel {window:?}"
                ));
            }
            if window[0] > h + 2 * padding[0] || window[1] > w + 2 * padding[1] {
                return Err(format!(
                    "kernel {window:?} does not fit into {shape:?} with padding {padding:?}"
                ));
            }
            if elements(&[*filters, c / groups, kernel[0], kernel[1]]).is_none() {
                return Err(format!(
                    "{filters} filters of {c}x{kernel:?}: more than {MAX_ELEMENTS} weights"
                ));
            }
            let out =
                |i: usize, length: usize| (length + 2 * padding[i] - window[i]) / stride[i] + 1;
            (
                LayerKind::Conv {
                    filters: *filters,
                    kernel,
                    stride,
                    padding,
                    dilation,
                    groups,
                },
                vec![*filters, out(0, h), out(1, w)],
            )
        }
        LayerSpec::Dense { units } => {
            let units = units.unwrap_or(classes);
            let inputs: usize = shape.iter().product();
            if units == 0 || elements(&[inputs, units]).is_none() {
                return Err(format!(
                    "{inputs} inputs, {units} units; 1 to {MAX_ELEMENTS} weights are possible"
                ));
            }
            (LayerKind::Dense { units }, vec![units])
        }
        LayerSpec::Relu {} => (LayerKind::Relu, shape.to_vec()),
        LayerSpec::Relu6 {} => (LayerKind::Relu6, shape.to_vec()),
        LayerSpec::LeakyRelu { slope } => {
            let slope = slope.unwrap_or(1.0 / 64.0);
            if !(0.001..=0.999).contains(&slope) {
                return Err(format!("slope = {slope}; 0.001 to 0.999 are possible"));
            }
            (LayerKind::LeakyRelu(slope), shape.to_vec())
        }
        LayerSpec::Sigmoid {} => (LayerKind::Smooth(Curve::Sigmoid), shape.to_vec()),
        LayerSpec::Tanh {} => (LayerKind::Smooth(Curve::Tanh), shape.to_vec()),
        LayerSpec::Silu {} => (LayerKind::Smooth(Curve::Silu), shape.to_vec()),
        LayerSpec::Gelu {} => (LayerKind::Smooth(Curve::Gelu), shape.to_vec()),
        LayerSpec::BatchNorm { momentum } => {
            let momentum = momentum.unwrap_or(0.125);
            if !(0.001..=1.0).contains(&momentum) {
                return Err(format!("momentum = {momentum}; 0.001 to 1 are possible"));
            }
            (LayerKind::BatchNorm { momentum }, shape.to_vec())
        }
        LayerSpec::Square {} => (LayerKind::Square, shape.to_vec()),
        LayerSpec::Poly { coefficients } => {
            if !(3..=5).contains(&coefficients.len()) {
                return Err(format!(
                    "{} coefficients; 3 to 5 (degree 2 to 4) are possible",
                    coefficients.len()
                ));
            }
            if coefficients
                .iter()
                .any(|c| !c.is_finite() || c.abs() > 16.0)
            {
                return Err(format!(
                    "coefficients {coefficients:?}; -16 to 16 are possible"
                ));
            }
            (LayerKind::Poly(coefficients.clone()), shape.to_vec())
        }
        LayerSpec::ApproxRelu {
            degree,
            interval,
            fit,
            learnable,
        } => {
            if !(2..=4).contains(degree) {
                return Err(format!("degree = {degree}; 2 to 4 are possible"));
            }
            let interval = interval.unwrap_or([-4.0, 4.0]);
            if !(-16.0..=-0.5).contains(&interval[0]) || !(0.5..=16.0).contains(&interval[1]) {
                return Err(format!(
                    "interval = {interval:?}; from -16 to -0.5 up to 0.5 to 16 is possible"
                ));
            }
            let coefficients = fit::relu(fit.unwrap_or_default(), *degree, interval);
            let kind = match learnable {
                Some(true) => LayerKind::LearntPoly(coefficients),
                _ => LayerKind::Poly(coefficients),
            };
            (kind, shape.to_vec())
        }
        LayerSpec::MaxPool {
            window,
            stride,
            padding,
            ceil_mode,
        } => {
            let ceil = ceil_mode.unwrap_or(false);
            let (window, out) = pool(window, stride, sides(padding), ceil)?;
            if window.size == [1, 1] {
                return Err("a window of 1x1 has nothing to compare".into());
            }
            (LayerKind::MaxPool(window), out)
        }
        LayerSpec::AvgPool {
            window,
            stride,
            padding,
            ceil_mode,
            count_include_pad,
        } => {
            let ceil = ceil_mode.unwrap_or(false);
            let (window, out) = pool(window, stride, sides(padding), ceil)?;
            let counted = match count_include_pad {
                Some(false) => [0; 4],
                _ => sides(padding),
            };
            (LayerKind::AvgPool { window, counted }, out)
        }
        LayerSpec::GlobalAvgPool {} => {
            let [c, h, w] = image()?;
            (
                LayerKind::AvgPool {
                    window: Window {
                        size: [h, w],
                        stride: [1, 1],
                        pads: [0; 4],
                    },
                    counted: [0; 4],
                },
                vec![c, 1, 1],
            )
        }
        LayerSpec::Flatten {} => (LayerKind::Flatten, vec![shape.iter().product()]),
        LayerSpec::Dropout { rate } => {
            if !(0.001..=0.999).contains(rate) {
                return Err(format!("rate = {rate}; 0.001 to 0.999 are possible"));
            }
            (LayerKind::Dropout(*rate), shape.to_vec())
        }
        LayerSpec::Softmax {} | LayerSpec::LogSoftmax {} => (LayerKind::Softmax, shape.to_vec()),
        LayerSpec::Add {} => match inputs.iter().find(|other| other[..] != *shape) {
            Some(other) => return Err(format!("cannot add {other:?} to {shape:?}")),
            None => (LayerKind::Add, shape.to_vec()),
        },
        LayerSpec::Concat {} => {
            let mut output = shape.to_vec();
            output[0] = inputs.iter().map(|input| input[0]).sum();
            match inputs.iter().find(|other| other[1..] != shape[1..]) {
                Some(other) => return Err(format!("cannot put {other:?} behind {shape:?}")),
                None => (LayerKind::Concat, output),
            }
        }
    };
    if elements(&output).is_none() {
        return Err(format!(
            "{shape:?} becomes {output:?}: more than {MAX_ELEMENTS} values"
        ));
    }
    Ok((kind, output))
}
