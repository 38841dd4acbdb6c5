//! A network: its layers, the shapes between them, and its TOML form.
//!
//! Parsing checks everything that can be checked without data: unknown keys, sizes, and that each
//! layer fits what the layer before gives. ReLU before a max pool is moved behind it: the result is
//! the same, because ReLU is monotone, and there are fewer values to compare. How a layer is
//! computed is in [`crate::programs`].

mod spec;

use serde::{Deserialize, Serialize};

pub use spec::{Extent, LayerSpec, Padding, PaddingName};
use spec::{MAX_ELEMENTS, elements, resolve};

use crate::ModelError;

/// Bytes of a network's text, at most.
const MAX_TEXT_BYTES: usize = 64 << 10;
/// Layers, at most.
const MAX_LAYERS: usize = 128;
/// Classes, at most: the limit of the protocol's argmax.
const MAX_CLASSES: usize = 100;

/// Networks that come with the software.
const SHIPPED: [(&str, &str); 7] = [
    ("mlp", include_str!("../../../configs/networks/mlp.toml")),
    (
        "minionn",
        include_str!("../../../configs/networks/minionn.toml"),
    ),
    (
        "lenet",
        include_str!("../../../configs/networks/lenet.toml"),
    ),
    (
        "chameleon",
        include_str!("../../../configs/networks/chameleon.toml"),
    ),
    (
        "fentec",
        include_str!("../../../configs/networks/fentec.toml"),
    ),
    (
        "logistic",
        include_str!("../../../configs/networks/logistic.toml"),
    ),
    ("xray", include_str!("../../../configs/networks/xray.toml")),
];

/// What a layer does, every parameter resolved.
#[derive(Clone, Debug, PartialEq)]
pub enum LayerKind {
    /// Convolution with bias: weights `[filters, channels, kernel]`.
    Conv {
        /// Output channels.
        filters: usize,
        /// Window, height first.
        kernel: [usize; 2],
        /// Steps between windows.
        stride: [usize; 2],
        /// Zeros on each side.
        padding: [usize; 2],
    },
    /// Fully connected with bias: weights `[inputs, units]`.
    Dense {
        /// Outputs.
        units: usize,
    },
    /// `max(0, x)`
    Relu,
    /// `x * x`
    Square,
    /// A polynomial, from the constant upward.
    Poly(Vec<f64>),
    /// Maxima over windows.
    MaxPool(Window),
    /// Averages over windows.
    AvgPool(Window),
    /// One axis.
    Flatten,
}

/// A pooling window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Height and width.
    pub size: [usize; 2],
    /// Steps between windows.
    pub stride: [usize; 2],
}

/// A layer between two known shapes (of one image, without the batch).
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// `conv1`, `relu2`, ..: kind and a number that counts the layers of this kind.
    pub name: String,
    /// What it does.
    pub kind: LayerKind,
    /// Shape of its input.
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
                ..
            } => Some(vec![filters, self.input[0], kh, kw]),
            LayerKind::Dense { units } => Some(vec![self.input.iter().product(), units]),
            _ => None,
        }
    }

    /// Length of the bias, if the layer has one.
    pub fn bias_len(&self) -> Option<usize> {
        match self.kind {
            LayerKind::Conv { filters, .. } => Some(filters),
            LayerKind::Dense { units } => Some(units),
            _ => None,
        }
    }

    /// Inputs that meet in one output.
    pub fn fan_in(&self) -> usize {
        match self.kind {
            LayerKind::Conv {
                kernel: [kh, kw], ..
            } => self.input[0] * kh * kw,
            _ => self.input.iter().product(),
        }
    }

    /// The name of its weights among the carried state.
    pub fn weight_name(&self) -> String {
        format!("{}.weight", self.name)
    }

    /// The name of its bias among the carried state.
    pub fn bias_name(&self) -> String {
        format!("{}.bias", self.name)
    }
}

/// A checked network.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Channels, height, width.
    pub input: [usize; 3],
    /// Number of classes, which is the number of outputs.
    pub classes: usize,
    /// Layers in the order in which they are computed.
    pub layers: Vec<Layer>,
    specs: Vec<LayerSpec>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    name: String,
    input: [usize; 3],
    classes: usize,
    layer: Vec<toml::Spanned<toml::Value>>,
}

#[derive(Serialize)]
struct Canonical<'a> {
    name: &'a str,
    input: [usize; 3],
    classes: usize,
    layer: &'a [LayerSpec],
}

impl Network {
    /// Names of the shipped networks.
    pub fn shipped() -> impl Iterator<Item = &'static str> {
        SHIPPED.iter().map(|(name, _)| *name)
    }

    /// The TOML text of a shipped network.
    pub fn shipped_text(name: &str) -> Option<&'static str> {
        SHIPPED
            .iter()
            .find(|(shipped, _)| *shipped == name)
            .map(|(_, text)| *text)
    }

    /// A shipped network.
    pub fn builtin(name: &str) -> Result<Network, ModelError> {
        let known = || Network::shipped().collect::<Vec<_>>().join(", ");
        let text = Network::shipped_text(name).ok_or_else(|| ModelError::Unknown {
            name: name.into(),
            known: known(),
        })?;
        Network::parse(text)
    }

    /// A network from TOML. Errors name line, layer and both shapes.
    pub fn parse(text: &str) -> Result<Network, ModelError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(ModelError::Text(format!(
                "{} bytes; at most {MAX_TEXT_BYTES}",
                text.len()
            )));
        }
        let parsed: Text =
            toml::from_str(text).map_err(|error| ModelError::Text(error.to_string()))?;
        let mut specs = Vec::new();
        for (index, spanned) in parsed.layer.into_iter().enumerate() {
            let before = text.as_bytes().iter().take(spanned.span().start);
            let line = 1 + before.filter(|byte| **byte == b'\n').count();
            let table = spanned.into_inner();
            let kind = table
                .get("kind")
                .and_then(|kind| kind.as_str())
                .unwrap_or("no kind")
                .to_string();
            let spec = table.try_into().map_err(|error| ModelError::Layer {
                network: parsed.name.clone(),
                layer: format!("{} ({kind}), line {line}", index + 1),
                problem: error.to_string().trim_end().to_string(),
            })?;
            specs.push(spec);
        }
        Network::new(parsed.name, parsed.input, parsed.classes, specs)
    }

    /// A network from its layers.
    pub fn new(
        name: String,
        input: [usize; 3],
        classes: usize,
        specs: Vec<LayerSpec>,
    ) -> Result<Network, ModelError> {
        let text = |problem: String| Err(ModelError::Text(problem));
        if name.is_empty() || name.len() > 64 || name.chars().any(char::is_control) {
            return text(format!(
                "name {name:?}; 1 to 64 printable characters are possible"
            ));
        }
        if !(2..=MAX_CLASSES).contains(&classes) {
            return text(format!(
                "classes = {classes}; 2 to {MAX_CLASSES} are possible"
            ));
        }
        if specs.is_empty() || specs.len() > MAX_LAYERS {
            return text(format!(
                "{} layers; 1 to {MAX_LAYERS} are possible",
                specs.len()
            ));
        }
        if elements(&input).is_none_or(|n| n == 0) {
            return text(format!(
                "input = {input:?}; 1 to {MAX_ELEMENTS} values are possible"
            ));
        }
        let mut network = Network {
            name,
            input,
            classes,
            layers: Vec::new(),
            specs,
        };
        network.layers = network.infer()?;
        let last = &network.layers[network.layers.len() - 1];
        if last.output.iter().product::<usize>() != classes {
            return Err(ModelError::Layer {
                network: network.name.clone(),
                layer: last.name.clone(),
                problem: format!("gives {:?}, but there are {classes} classes", last.output),
            });
        }
        if network
            .layers
            .iter()
            .all(|layer| layer.weight_shape().is_none())
        {
            return text("has no layer with weights".into());
        }
        Ok(network)
    }

    /// The same network for another number of classes (where the last layer leaves its units open).
    pub fn with_classes(&self, classes: usize) -> Result<Network, ModelError> {
        Network::new(self.name.clone(), self.input, classes, self.specs.clone())
    }

    /// The canonical TOML text: what a job carries and the nodes hash.
    pub fn to_toml(&self) -> String {
        let canonical = Canonical {
            name: &self.name,
            input: self.input,
            classes: self.classes,
            layer: &self.specs,
        };
        toml::to_string(&canonical).expect("names, integers and finite numbers have a TOML form")
    }

    /// Layers with weights, in order.
    pub fn weighted(&self) -> impl Iterator<Item = &Layer> {
        self.layers
            .iter()
            .filter(|layer| layer.weight_shape().is_some())
    }

    /// Names and shapes of all weights and biases, in order.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let mut parameters = Vec::new();
        for layer in &self.layers {
            if let (Some(weight), Some(bias)) = (layer.weight_shape(), layer.bias_len()) {
                parameters.push((layer.weight_name(), weight));
                parameters.push((layer.bias_name(), vec![bias]));
            }
        }
        parameters
    }

    /// Values of one image.
    pub fn input_len(&self) -> usize {
        self.input.iter().product()
    }

    fn infer(&self) -> Result<Vec<Layer>, ModelError> {
        let mut order: Vec<(usize, &LayerSpec)> = self.specs.iter().enumerate().collect();
        // Pool before ReLU, through chains of both.
        let mut at = 0;
        while at + 1 < order.len() {
            if matches!(
                (order[at].1, order[at + 1].1),
                (LayerSpec::Relu {}, LayerSpec::MaxPool { .. })
            ) {
                order.swap(at, at + 1);
                at = at.saturating_sub(1);
            } else {
                at += 1;
            }
        }
        let mut shape = self.input.to_vec();
        let mut layers: Vec<Layer> = Vec::new();
        for (index, spec) in order {
            let kind = spec.kind();
            let (resolved, output) =
                resolve(spec, &shape, self.classes).map_err(|problem| ModelError::Layer {
                    network: self.name.clone(),
                    layer: format!("{} ({kind})", index + 1),
                    problem,
                })?;
            let stem = kind.replace('_', "");
            let number = 1 + layers
                .iter()
                .filter(|layer| layer.name.trim_end_matches(char::is_numeric) == stem)
                .count();
            let name = format!("{stem}{number}");
            layers.push(Layer {
                name,
                kind: resolved,
                input: shape,
                output: output.clone(),
            });
            shape = output;
        }
        Ok(layers)
    }
}
