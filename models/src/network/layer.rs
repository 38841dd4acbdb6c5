//! A layer with every parameter resolved, and what it carries between steps.

use trefoil_protocol::program::Curve;

/// What a normalisation adds to a variance, as a power of two.
pub const VARIANCE_EPSILON_LOG2: i8 = -10;

/// Fraction bits of running means and variances, for f of weights.
pub fn statistics_frac_bits(frac_bits: u8) -> u8 {
    (frac_bits + 4).min(18)
}

/// What a layer does, every parameter resolved.
#[derive(Clone, Debug, PartialEq)]
pub enum LayerKind {
    /// Convolution with bias: weights `[filters, channels / groups, kernel]`.
    Conv {
        /// Output channels.
        filters: usize,
        /// Window, height first.
        kernel: [usize; 2],
        /// Steps between windows.
        stride: [usize; 2],
        /// Zeros on each side.
        padding: [usize; 2],
        /// Steps between the weights of a window.
        dilation: [usize; 2],
        /// Groups of channels.
        groups: usize,
    },
    /// Fully connected with bias: weights `[inputs, units]`.
    Dense {
        /// Outputs.
        units: usize,
    },
    /// `max(0, x)`
    Relu,
    /// `min(max(x, 0), 6)`
    Relu6,
    /// x where it is positive, this fraction of it elsewhere.
    LeakyRelu(f64),
    /// A sigmoid or one of its kind.
    Smooth(Curve),
    /// Every channel to mean beta and deviation gamma.
    BatchNorm {
        /// The part of a batch's statistics in the running ones.
        momentum: f64,
    },
    /// `x * x`
    Square,
    /// A polynomial, from the constant upward.
    Poly(Vec<f64>),
    /// A polynomial whose coefficients are learnt for each channel; these are its first ones.
    LearntPoly(Vec<f64>),
    /// Maxima over windows.
    MaxPool(Window),
    /// Averages over windows.
    AvgPool {
        /// The windows.
        window: Window,
        /// What of their border counts as zeros; the rest is left out of an average.
        counted: [usize; 4],
    },
    /// One axis.
    Flatten,
    /// In training, this part of the values becomes 0 and the others grow to make up for it.
    Dropout(f64),
    /// The probabilities of the classes, at the network's end: the loss and the outputs compute them.
    Softmax,
    /// The sum of its inputs.
    Add,
    /// Its inputs' channels one after the other.
    Concat,
}

/// The windows of a pooling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Height and width.
    pub size: [usize; 2],
    /// Steps between windows.
    pub stride: [usize; 2],
    /// Border that windows may reach into, less wide than they: top, left, bottom, right.
    pub pads: [usize; 4],
}

/// A layer between two known shapes (of one image, without the batch).
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// As given; else `conv1`, `relu2`, ..: kind and a number that counts the layers of this kind.
    pub name: String,
    /// What it does.
    pub kind: LayerKind,
    /// Layers that it reads, by index; `None` are the images.
    pub sources: Vec<Option<usize>>,
    /// Shape of its (first) input.
    pub input: Vec<usize>,
    /// Shape of its output.
    pub output: Vec<usize>,
}

impl Layer {
    /// Shape of the weights, if the layer has any.
    pub fn weight_shape(&self) -> Option<Vec<usize>> {
        match self.kind {
            LayerKind::Conv {
                filters,
                kernel: [kh, kw],
                groups,
                ..
            } => Some(vec![filters, self.input[0] / groups, kh, kw]),
            LayerKind::Dense { units } => Some(vec![self.input.iter().product(), units]),
            LayerKind::BatchNorm { .. } => Some(vec![self.input[0]]),
            LayerKind::LearntPoly(ref first) => Some(vec![first.len() - 1, self.input[0]]),
            _ => None,
        }
    }

    /// Length of the bias, if the layer has one.
    pub fn bias_len(&self) -> Option<usize> {
        match self.kind {
            LayerKind::Conv { filters, .. } => Some(filters),
            LayerKind::Dense { units } => Some(units),
            LayerKind::BatchNorm { .. } | LayerKind::LearntPoly(_) => Some(self.input[0]),
            _ => None,
        }
    }

    /// For each place of an average pool's windows the number of values by which a sum is divided, row by
    /// row; nothing for other layers.
    pub fn counts(&self) -> Vec<usize> {
        let LayerKind::AvgPool { window, counted } = self.kind else {
            return Vec::new();
        };
        let along = |axis: usize| {
            // From the border's beginning.
            let first = window.pads[axis] - counted[axis];
            let end = window.pads[axis] + self.input[axis + 1] + counted[axis + 2];
            let count = move |at: usize| {
                let start = at * window.stride[axis];
                (start + window.size[axis]).min(end) - start.max(first)
            };
            (0..self.output[axis + 1]).map(count)
        };
        along(0)
            .flat_map(|high| along(1).map(move |wide| high * wide))
            .collect()
    }

    /// Whether it is a batch normalisation.
    pub fn is_norm(&self) -> bool {
        matches!(self.kind, LayerKind::BatchNorm { .. })
    }

    /// Inputs that meet in one output.
    pub fn fan_in(&self) -> usize {
        match self.kind {
            LayerKind::Conv {
                kernel: [kh, kw],
                groups,
                ..
            } => self.input[0] / groups * kh * kw,
            _ => self.input.iter().product(),
        }
    }

    /// The name of its weights among the carried state.
    pub fn weight_name(&self) -> String {
        format!("{}.weight", self.name)
    }

    /// The name of its running mean among the carried state, if it is a normalisation.
    pub fn mean_name(&self) -> String {
        format!("{}.mean", self.name)
    }

    /// The name of its running variance among the carried state, if it is a normalisation.
    pub fn variance_name(&self) -> String {
        format!("{}.variance", self.name)
    }

    /// The name of its bias among the carried state.
    pub fn bias_name(&self) -> String {
        format!("{}.bias", self.name)
    }
}
