//! From the layers as written to layers that know what they read.
//!
//! Without `from` a layer reads the one before it; `from = "name"` reads a named one and
//! `from = ["a", "b"]` several (`add`, `concat`). Layers stand behind what they read, so that the order
//! of the file is an order of computation. `"images"` is the network's input.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::spec::resolve;
use super::{Layer, LayerSpec, Network};
use crate::ModelError;
use crate::programs::Ratio;

/// The name of the network's input in a `from`.
const IMAGES: &str = "images";

/// What a layer reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum From {
    /// One layer.
    One(String),
    /// Several, in order.
    Many(Vec<String>),
}

impl From {
    fn names(&self) -> &[String] {
        match self {
            From::One(name) => std::slice::from_ref(name),
            From::Many(names) => names,
        }
    }
}

/// A layer as it is written in TOML: what it does, and where it stands.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerEntry {
    /// A name to be read by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it reads; the layer before unless given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<From>,
    /// What it does.
    #[serde(flatten)]
    pub spec: LayerSpec,
}

impl LayerEntry {
    /// From a table of TOML.
    pub(super) fn parse(table: toml::Value) -> Result<LayerEntry, String> {
        let problem = |error: toml::de::Error| error.to_string().trim_end().to_string();
        let mut table: toml::Table = table.try_into().map_err(problem)?;
        let name: Option<String> = match table.remove("name") {
            Some(name) => Some(name.try_into().map_err(problem)?),
            None => None,
        };
        let from: Option<From> = match table.remove("from") {
            Some(from) => Some(
                from.try_into()
                    .map_err(|_| "from is the name of a layer, or a list of names".to_string())?,
            ),
            None => None,
        };
        let possible = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
        if let Some(name) = &name
            && (name.is_empty() || name.len() > 32 || !name.chars().all(possible) || name == IMAGES)
        {
            return Err(format!(
                "name {name:?}; 1 to 32 letters, digits, - and _ are possible, and not {IMAGES:?}"
            ));
        }
        let spec = table.try_into().map_err(problem)?;
        Ok(LayerEntry { name, from, spec })
    }
}

/// One layer on its way: where it stood in the file, and what it reads.
struct Node<'a> {
    position: usize,
    entry: &'a LayerEntry,
    sources: Vec<Option<usize>>,
}

fn refused(network: &Network, position: usize, spec: &LayerSpec, problem: String) -> ModelError {
    ModelError::Layer {
        network: network.name.clone(),
        layer: format!("{} ({})", position + 1, spec.kind()),
        problem,
    }
}

fn nodes(network: &Network) -> Result<Vec<Node<'_>>, ModelError> {
    let mut named: BTreeMap<&str, Option<usize>> = BTreeMap::from([(IMAGES, None)]);
    let mut nodes: Vec<Node<'_>> = Vec::new();
    for (position, entry) in network.entries.iter().enumerate() {
        let error = |problem| refused(network, position, &entry.spec, problem);
        let sources = match &entry.from {
            None => vec![position.checked_sub(1)],
            Some(from) => {
                let source = |name: &String| {
                    named.get(name.as_str()).copied().ok_or_else(|| {
                        error(format!(
                            "reads {name:?}, but no layer before it has that name"
                        ))
                    })
                };
                from.names().iter().map(source).collect::<Result<_, _>>()?
            }
        };
        let several = matches!(entry.spec, LayerSpec::Add {} | LayerSpec::Concat {});
        if (several && sources.len() < 2) || (!several && sources.len() != 1) || sources.len() > 64
        {
            let expected = if several { "2 to 64 are" } else { "one is" };
            return Err(error(format!(
                "reads {} layers; {expected} possible",
                sources.len()
            )));
        }
        if let Some(name) = &entry.name
            && named.insert(name, Some(position)).is_some()
        {
            return Err(error(format!("a layer before it is called {name:?} too")));
        }
        nodes.push(Node {
            position,
            entry,
            sources,
        });
    }
    Ok(nodes)
}

/// Resolves all layers, in the order in which they are computed.
pub(super) fn layers(network: &Network) -> Result<Vec<Layer>, ModelError> {
    let mut nodes = nodes(network)?;
    let last = nodes.len() - 1;
    let readers: Vec<usize> = (0..nodes.len())
        .map(|at| {
            let reads = |node: &Node<'_>| node.sources.iter().filter(|s| **s == Some(at)).count();
            nodes.iter().map(reads).sum()
        })
        .collect();
    if let Some(at) = readers[..last].iter().position(|readers| *readers == 0) {
        let problem = "nobody reads it; name it, and read it by that name".to_string();
        return Err(refused(network, at, &nodes[at].entry.spec, problem));
    }
    let last_only = |node: &Node<'_>| {
        matches!(
            node.entry.spec,
            LayerSpec::Softmax {} | LayerSpec::LogSoftmax {}
        )
    };
    if let Some(at) = nodes[..last].iter().position(last_only) {
        let problem = "is possible as the last layer only".to_string();
        return Err(refused(network, at, &nodes[at].entry.spec, problem));
    }
    // Pool before ReLU, through chains of both: what the two do is exchanged, who reads whom stays.
    // Dropout too where its factor adds fraction bits, which the ReLU's truncation then takes away.
    let mut at = 0;
    while at + 1 < nodes.len() {
        let pair = (&nodes[at].entry.spec, &nodes[at + 1].entry.spec);
        let alone = readers[at] == 1 && nodes[at + 1].sources == [Some(at)];
        let first = match pair {
            (LayerSpec::Relu {}, LayerSpec::MaxPool { .. }) => true,
            (LayerSpec::Relu {}, LayerSpec::Dropout { rate }) => {
                Ratio::nearest(1.0 / (1.0 - rate)).shift > 0
            }
            _ => false,
        };
        if alone && first {
            let (left, right) = nodes.split_at_mut(at + 1);
            std::mem::swap(&mut left[at].entry, &mut right[0].entry);
            std::mem::swap(&mut left[at].position, &mut right[0].position);
            at = at.saturating_sub(1);
        } else {
            at += 1;
        }
    }
    let mut layers: Vec<Layer> = Vec::new();
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for node in nodes {
        let spec = &node.entry.spec;
        let shape = |source: &Option<usize>| match source {
            Some(layer) => layers[*layer].output.clone(),
            None => network.input.to_vec(),
        };
        let inputs: Vec<Vec<usize>> = node.sources.iter().map(shape).collect();
        let (kind, output) = resolve(spec, &inputs, network.classes)
            .map_err(|problem| refused(network, node.position, spec, problem))?;
        let stem = spec.kind().replace('_', "");
        let count = counts.entry(stem.clone()).or_default();
        let name = node.entry.name.clone().unwrap_or_else(|| {
            *count += 1;
            format!("{stem}{count}")
        });
        if layers.iter().any(|layer| layer.name == name) {
            let problem = format!("a layer before it is called {name:?} too");
            return Err(refused(network, node.position, spec, problem));
        }
        layers.push(Layer {
            name,
            kind,
            sources: node.sources,
            input: inputs.into_iter().next().unwrap_or_default(),
            output,
        });
    }
    Ok(layers)
}
