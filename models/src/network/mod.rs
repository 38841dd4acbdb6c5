//! A network: its layers, the shapes between them, and its TOML form.
//!
//! Parsing checks everything that can be checked without data: unknown keys, sizes, and that each
//! layer fits what it reads: the layer before, or those that its `from` names. ReLU before a max pool
//! is moved behind it: the result is the same, because ReLU is monotone, and there are fewer values to
//! compare. How a layer is computed is in [`crate::programs`].

pub mod fit;
mod graph;
mod layer;
mod spec;

use serde::{Deserialize, Serialize};

pub use graph::{From, LayerEntry};
pub use layer::{Layer, LayerKind, VARIANCE_EPSILON_LOG2, Window, statistics_frac_bits};
pub use spec::{Border, Extent, LayerSpec, Padding, PaddingName};
use spec::{MAX_ELEMENTS, elements};
pub use trefoil_protocol::program::Curve;

use crate::ModelError;

/// Bytes of a network's text, at most.
const MAX_TEXT_BYTES: usize = 64 << 10;
/// Layers, at most.
const MAX_LAYERS: usize = 256;
/// Classes, at most: the limit of the protocol's argmax.
const MAX_CLASSES: usize = 100;

/// Networks that come with the software.
const SHIPPED: [(&str, &str); 15] = [
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
    (
        "logistic-10",
        include_str!("../../../configs/networks/logistic-10.toml"),
    ),
    ("xray", include_str!("../../../configs/networks/xray.toml")),
    (
        "resnet18",
        include_str!("../../../configs/networks/resnet18.toml"),
    ),
    (
        "mobilenet",
        include_str!("../../../configs/networks/mobilenet.toml"),
    ),
    (
        "vgg16",
        include_str!("../../../configs/networks/vgg16.toml"),
    ),
    (
        "alexnet",
        include_str!("../../../configs/networks/alexnet.toml"),
    ),
    (
        "resnet18-224",
        include_str!("../../../configs/networks/resnet18-224.toml"),
    ),
    (
        "carenet-96",
        include_str!("../../../configs/networks/carenet-96.toml"),
    ),
    (
        "carenet-256",
        include_str!("../../../configs/networks/carenet-256.toml"),
    ),
];

/// A checked network.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Channels, height, width.
    pub input: [usize; 3],
    /// Number of classes, which is the number of outputs.
    pub classes: usize,
    /// Layers in the order in which they are computed; the last one gives the logits.
    pub layers: Vec<Layer>,
    entries: Vec<LayerEntry>,
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
    layer: &'a [LayerEntry],
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
        let mut entries = Vec::new();
        for (index, spanned) in parsed.layer.into_iter().enumerate() {
            let before = text.as_bytes().iter().take(spanned.span().start);
            let line = 1 + before.filter(|byte| **byte == b'\n').count();
            let table = spanned.into_inner();
            let kind = table
                .get("kind")
                .and_then(|kind| kind.as_str())
                .unwrap_or("no kind")
                .to_string();
            let entry = LayerEntry::parse(table).map_err(|problem| ModelError::Layer {
                network: parsed.name.clone(),
                layer: format!("{} ({kind}), line {line}", index + 1),
                problem,
            })?;
            entries.push(entry);
        }
        Network::new(parsed.name, parsed.input, parsed.classes, entries)
    }

    /// A network from its layers.
    pub fn new(
        name: String,
        input: [usize; 3],
        classes: usize,
        entries: Vec<LayerEntry>,
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
        if entries.is_empty() || entries.len() > MAX_LAYERS {
            return text(format!(
                "{} layers; 1 to {MAX_LAYERS} are possible",
                entries.len()
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
            entries,
        };
        network.layers = graph::layers(&network)?;
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
        Network::new(self.name.clone(), self.input, classes, self.entries.clone())
    }

    /// The same network with this activation in the place of each of its own.
    pub fn with_activation(&self, activation: &LayerSpec) -> Result<Network, ModelError> {
        let refused = |problem: String| Err(ModelError::Text(problem));
        if !activation.is_activation() {
            return refused(format!("{} is not an activation", activation.kind()));
        }
        let mut entries = self.entries.clone();
        let mut replaced = entries
            .iter_mut()
            .filter(|entry| entry.spec.is_activation());
        if replaced
            .by_ref()
            .map(|entry| entry.spec = activation.clone())
            .count()
            == 0
        {
            return refused(format!("{} has no activation to replace", self.name));
        }
        Network::new(self.name.clone(), self.input, self.classes, entries)
    }

    /// The canonical TOML text: what a job carries and the nodes hash.
    pub fn to_toml(&self) -> String {
        let canonical = Canonical {
            name: &self.name,
            input: self.input,
            classes: self.classes,
            layer: &self.entries,
        };
        toml::to_string(&canonical).expect("names, integers and finite numbers have a TOML form")
    }

    /// Layers with weights, in order.
    pub fn weighted(&self) -> impl Iterator<Item = &Layer> {
        self.layers
            .iter()
            .filter(|layer| layer.weight_shape().is_some())
    }

    /// What first tells this network from another one, in words; names of networks do not count.
    /// `None` where a model of one is a model of the other.
    pub fn difference(&self, other: &Network) -> Option<String> {
        if (self.input, self.classes) != (other.input, other.classes) {
            return Some(format!(
                "one reads {:?} and tells {} classes apart, the other {:?} and {}",
                self.input, self.classes, other.input, other.classes
            ));
        }
        if self.layers.len() != other.layers.len() {
            let (a, b) = (self.layers.len(), other.layers.len());
            return Some(format!("one has {a} layers, the other {b}"));
        }
        let mut pairs = self.layers.iter().zip(&other.layers);
        let (a, b) = pairs.find(|(a, b)| a != b)?;
        match (a.name == b.name, &a.kind, &b.kind) {
            (false, ..) => Some(format!(
                "a layer is named {}, in the other {}",
                a.name, b.name
            )),
            (true, a_kind, b_kind) if a_kind != b_kind => Some(format!(
                "layer {} is {a_kind:?}, in the other {b_kind:?}",
                a.name
            )),
            _ => Some(format!("layer {} reads another layer in the other", a.name)),
        }
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

    /// Names and shapes of all running statistics, in order: carried, but not trained.
    pub fn statistics(&self) -> Vec<(String, Vec<usize>)> {
        let norms = self.layers.iter().filter(|layer| layer.is_norm());
        norms
            .flat_map(|layer| {
                [layer.mean_name(), layer.variance_name()].map(|name| (name, vec![layer.input[0]]))
            })
            .collect()
    }

    /// Names and shapes of all that a model consists of: parameters, then running statistics.
    pub fn kept(&self) -> Vec<(String, Vec<usize>)> {
        let mut kept = self.parameters();
        kept.extend(self.statistics());
        kept
    }

    /// Fraction bits of one of them, in a model of `frac_bits`.
    pub fn kept_frac_bits(&self, name: &str, frac_bits: u8) -> u8 {
        match self.statistics().iter().any(|(known, _)| known == name) {
            true => layer::statistics_frac_bits(frac_bits),
            false => frac_bits,
        }
    }

    /// The linear layer that a normalisation is folded into at inference: the one before it, if nobody
    /// else reads that.
    pub fn folded_into(&self, norm: usize) -> Option<usize> {
        let layer = self.layers.get(norm).filter(|layer| layer.is_norm())?;
        let linear = layer.sources[0]?;
        let kind = &self.layers[linear].kind;
        let fits = matches!(kind, LayerKind::Conv { .. } | LayerKind::Dense { .. });
        (fits && self.readers(linear) == 1).then_some(linear)
    }

    /// Whether it ends in a softmax, so that it is a loss of its logits that is meant.
    pub fn gives_probabilities(&self) -> bool {
        let last = self.layers.last();
        last.is_some_and(|layer| layer.kind == LayerKind::Softmax)
    }

    /// Values of one image.
    pub fn input_len(&self) -> usize {
        self.input.iter().product()
    }

    /// How many layers read the output of a layer.
    pub fn readers(&self, layer: usize) -> usize {
        let read = |other: &Layer| other.sources.iter().filter(|s| **s == Some(layer)).count();
        self.layers.iter().map(read).sum()
    }

    /// For each layer whether weights depend on it: whether it has some or reads a layer that does.
    pub fn trained(&self) -> Vec<bool> {
        let mut trained: Vec<bool> = Vec::new();
        for layer in &self.layers {
            let above = layer
                .sources
                .iter()
                .flatten()
                .any(|source| trained[*source]);
            trained.push(above || layer.weight_shape().is_some());
        }
        trained
    }
}
