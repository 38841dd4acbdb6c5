//! Reads a model: which nodes its output needs, and what each of them gives.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bytes::Bytes;
use ndarray::ArrayD;
use prost::Message;
use trefoil_models::network::Network;

use super::layers::Layers;
use super::tensor::MAX_ELEMENTS;
use super::view::View;
use super::{OLDEST_OPSET, bounds, constants, fuse, ops, proto, shapes, tensor, usual};
use crate::{ExchangeError, Weights};

/// Elements of all constants that a graph reads or computes, at most.
const MAX_CONSTANTS: usize = 1 << 26;

/// Bytes of all files beside a model, at most: those constants, each of 64 bits.
const MAX_FILES_BYTES: usize = 8 * MAX_CONSTANTS;

/// A model that was understood.
#[derive(Clone, Debug)]
pub struct Understood {
    /// The network file's content.
    pub network: Network,
    /// Its weights, by the names that the network's carried state has.
    pub weights: Weights,
    /// What its reader should know: layers that stand for something else, operations left out.
    pub notes: Vec<String>,
}

/// Reads a file that lies beside the model, by its name.
pub type Beside<'a> = dyn Fn(&str) -> Result<Vec<u8>, String> + 'a;

/// What a name of the graph stands for.
#[derive(Clone, Debug)]
pub enum Value {
    /// Numbers that do not depend on the images.
    Constant(Rc<ArrayD<f64>>),
    /// Values of a layer, or the images.
    Layer(View),
}

/// Everything that was read so far.
pub struct Reader<'a> {
    values: BTreeMap<&'a str, Value>,
    tensors: BTreeMap<&'a str, &'a proto::Tensor>,
    beside: &'a Beside<'a>,
    /// Files beside the model so far.
    files: BTreeMap<String, Bytes>,
    /// How many nodes read each name.
    readers: BTreeMap<&'a str, usize>,
    /// Elements of all constants so far.
    elements: usize,
    /// The layers.
    pub layers: Layers,
}

impl<'a> Reader<'a> {
    /// What a name stands for.
    pub fn value(&mut self, name: &str) -> Result<Value, String> {
        if let Some(value) = self.values.get(name) {
            return Ok(value.clone());
        }
        let Some((name, stored)) = self.tensors.get_key_value(name) else {
            return Err(format!("reads {name:?}, which nothing before it gives"));
        };
        let (name, stored) = (*name, *stored);
        let array = match stored.data_location {
            1 => tensor::decode(&self.outside(stored)?),
            _ => tensor::decode(stored),
        };
        let value = self.constant(array.map_err(|error| error.to_string())?)?;
        self.values.insert(name, value.clone());
        Ok(value)
    }

    /// A tensor with its values, which are in another file.
    fn outside(&mut self, stored: &proto::Tensor) -> Result<proto::Tensor, String> {
        let refused = |problem: String| format!("tensor {:?}: {problem}", stored.name);
        let (name, range) = tensor::outside(stored).map_err(refused)?;
        if !self.files.contains_key(name) {
            let read = (self.beside)(name).map_err(refused)?;
            let held = self.files.values().map(Bytes::len).sum::<usize>();
            if held + read.len() > MAX_FILES_BYTES {
                return Err(refused(format!(
                    "files of more than {MAX_FILES_BYTES} bytes in all"
                )));
            }
            self.files.insert(name.to_owned(), Bytes::from(read));
        }
        let file = &self.files[name];
        // Without a length: to the end. A slice that is too short is refused by the tensor's shape.
        let end = range.end.min(file.len());
        Ok(proto::Tensor {
            raw_data: file.slice(range.start.min(end)..end),
            data_location: 0,
            ..stored.clone()
        })
    }

    /// A constant, if all of them together are not too large.
    fn constant(&mut self, array: ArrayD<f64>) -> Result<Value, String> {
        self.elements += array.len();
        match self.elements <= MAX_CONSTANTS {
            true => Ok(Value::Constant(Rc::new(array))),
            false => Err(format!(
                "constants of more than {MAX_CONSTANTS} elements in all"
            )),
        }
    }

    /// Whether a name is known to stand for floats: of what is computed of constants no type is kept.
    fn floats(&self, name: &str) -> bool {
        let stored = self.tensors.get(name);
        let layer = matches!(self.values.get(name), Some(Value::Layer(_)));
        layer || stored.is_some_and(|tensor| tensor::FLOATS.contains(&tensor.data_type))
    }

    /// Whether one node alone reads a name.
    pub fn sole(&self, name: &str) -> bool {
        self.readers.get(name).is_none_or(|readers| *readers <= 1)
    }
}

fn place(number: usize, node: &proto::Node, problem: String) -> ExchangeError {
    let name = match node.name.is_empty() {
        true => String::new(),
        false => format!(" {:?}", node.name),
    };
    ExchangeError::Node {
        number: number + 1,
        name,
        op: node.op_type.clone(),
        problem,
    }
}

/// The nodes that a name needs, in the order of the file.
fn needed<'a>(
    all: &'a [(usize, Cow<'a, proto::Node>)],
    output: &'a str,
) -> Vec<(usize, &'a proto::Node)> {
    let mut wanted = BTreeSet::from([output]);
    let mut nodes = Vec::new();
    for (number, node) in all.iter().rev() {
        if node
            .output
            .iter()
            .any(|name| wanted.contains(name.as_str()))
        {
            wanted.extend(node.input.iter().map(String::as_str));
            nodes.push((*number, &**node));
        }
    }
    nodes.reverse();
    nodes
}

/// Whether a node at the end, before another that is left out, changes neither classes nor probabilities:
/// the softmax of logarithms of probabilities is these again, that of probabilities is something else.
fn is_left_out(node: &proto::Node, behind: Option<&str>) -> bool {
    let left_out = match node.op_type.as_str() {
        "Identity" => true,
        "ArgMax" | "Sigmoid" => behind.is_none(),
        "Softmax" => matches!(behind, None | Some("ArgMax")),
        "LogSoftmax" => behind != Some("Sigmoid"),
        _ => false,
    };
    left_out && usual(&node.domain)
}

/// Names whose values a node reads: who asks for a shape or a type reads none.
fn read_values(node: &proto::Node) -> &[String] {
    let values = match node.op_type.as_str() {
        "Shape" => 0,
        "CastLike" => 1,
        _ => node.input.len(),
    };
    &node.input[..values.min(node.input.len())]
}

/// The images as the graph sees them: `[batch, channels, height, width]`, or with the channels last if
/// the graph begins with their transposition.
fn images(
    graph: &proto::Graph,
    nodes: &[(usize, &proto::Node)],
    given: Option<[usize; 3]>,
) -> Result<(String, View), ExchangeError> {
    let file = |problem: String| ExchangeError::File { problem };
    let stored: BTreeSet<&str> = graph.initializer.iter().map(|t| t.name.as_str()).collect();
    let inputs: Vec<&proto::ValueInfo> = graph
        .input
        .iter()
        .filter(|input| !stored.contains(input.name.as_str()))
        .collect();
    let [input] = inputs.as_slice() else {
        return Err(file(format!(
            "{} inputs; one, the images, is possible",
            inputs.len()
        )));
    };
    let shape = input.ty.as_ref().and_then(|ty| ty.tensor.as_ref());
    let shape = shape.and_then(|tensor| tensor.shape.as_ref());
    let lengths: Vec<Option<usize>> = shape.map_or(Vec::new(), |shape| {
        let length = |dim: &proto::Dimension| usize::try_from(dim.value).ok().filter(|n| *n != 0);
        shape.dim.iter().map(length).collect()
    });
    let first = nodes
        .iter()
        .find(|(_, node)| node.input.contains(&input.name));
    // The channels of one are brought to the front by a Reshape as well as by a Transpose.
    let one_last = matches!(lengths[..], [_, Some(2..), _, Some(1)]);
    let last = first.is_some_and(|(_, node)| match node.op_type.as_str() {
        "Transpose" => ops::attribute_ints(node, "perm") == Some(&[0, 3, 1, 2][..]),
        "Reshape" => one_last,
        _ => false,
    });
    let unknown = || {
        file(format!(
            "the input {:?} has the shape {lengths:?}: say the images' shape, as --input CHANNELS,HEIGHT,WIDTH",
            input.name
        ))
    };
    let known: Option<Vec<usize>> = lengths.iter().skip(1).copied().collect();
    let shape = match (given, known.as_deref()) {
        (Some(given), _) => given,
        (None, Some(&[h, w, c])) if last => [c, h, w],
        (None, Some(&[c, h, w])) => [c, h, w],
        (None, Some(&[h, w])) => [1, h, w],
        _ => return Err(unknown()),
    };
    let values = shape.iter().try_fold(1usize, |all, n| all.checked_mul(*n));
    if values.is_none_or(|values| values > MAX_ELEMENTS) {
        return Err(file(format!(
            "images of {shape:?}: more than {MAX_ELEMENTS} values"
        )));
    }
    let plain = View::plain(None, shape.to_vec(), first.is_none() || nodes.len() == 1);
    let lengths_now = match (lengths.len(), last) {
        (4, true) => vec![shape[1], shape[2], shape[0]],
        (3, _) if shape[0] == 1 => vec![shape[1], shape[2]],
        (2, _) => vec![plain.len()],
        _ => shape.to_vec(),
    };
    let agrees = lengths.len() == lengths_now.len() + 1
        && (lengths.iter().skip(1).zip(&lengths_now)).all(|(l, n)| l.is_none_or(|l| l == *n));
    if shape.contains(&0) || !agrees {
        return Err(unknown());
    }
    let view = match last {
        true => plain.transpose(&[1, 2, 0]),
        false => plain.reshape(&lengths_now),
    };
    Ok((input.name.clone(), view.map_err(file)?))
}

/// Reads an ONNX file. `input` are channels, height and width of the images, where the file leaves them
/// open.
///
/// A file that is not understood is an error that names the node, and nothing is guessed. Weights in
/// another file are for [`read_with`].
pub fn read(file: &[u8], input: Option<[usize; 3]>) -> Result<Understood, ExchangeError> {
    let none = |name: &str| Err(format!("its values are in another file, {name:?}"));
    read_with(file, &none, input)
}

/// As [`read`]; `beside` reads the files in which large weights are ("external data"): a name without a
/// folder, as the model says it.
pub fn read_with(
    file: &[u8],
    beside: &Beside<'_>,
    input: Option<[usize; 3]>,
) -> Result<Understood, ExchangeError> {
    let problem = |problem: String| ExchangeError::File { problem };
    bounds::check(file)?;
    // The large fields of the decoded model are slices of this copy.
    let model = proto::Model::decode(bytes::Bytes::copy_from_slice(file))?;
    let opset = model.opset_import.iter().find(|set| usual(&set.domain));
    let Some(opset) = opset.map(|set| set.version) else {
        return Err(problem(
            "no operator set of ONNX is named: not an ONNX model".into(),
        ));
    };
    if opset < OLDEST_OPSET {
        return Err(problem(format!(
            "operator set {opset}; {OLDEST_OPSET} and newer are read: export it anew"
        )));
    }
    let graph = model.graph.unwrap_or_default();
    let [output] = graph.output.as_slice() else {
        return Err(problem(format!(
            "{} outputs; one, a value for each class, is possible",
            graph.output.len()
        )));
    };
    let all = fuse::fused(&graph);
    let mut nodes = needed(&all, &output.name);
    let mut notes = Vec::new();
    // What an own output of the parties does anyway: probabilities or classes of logits.
    let mut end = output.name.as_str();
    let mut ends: Vec<(usize, &proto::Node)> = Vec::new();
    while let Some((number, node)) = nodes.last().copied()
        && is_left_out(node, ends.last().map(|(_, node)| node.op_type.as_str()))
        && node.output.first().is_some_and(|name| name == end)
        && let Some(before) = node.input.first()
    {
        if node.op_type != "Identity" {
            notes.push(format!(
                "{} at the end is left out: a job says whether it reveals classes, probabilities or logits",
                node.op_type
            ));
            ends.push((number, node));
        }
        end = before;
        nodes.pop();
    }
    let (name, view) = images(&graph, &nodes, input)?;
    let shape = [view.shape[0], view.shape[1], view.shape[2]];
    let mut reader = Reader {
        values: BTreeMap::from([(name.as_str(), Value::Layer(view))]),
        tensors: graph
            .initializer
            .iter()
            .map(|t| (t.name.as_str(), t))
            .collect(),
        beside,
        files: BTreeMap::new(),
        readers: BTreeMap::new(),
        elements: 0,
        layers: Layers::default(),
    };
    for name in nodes.iter().flat_map(|(_, node)| read_values(node)) {
        *reader.readers.entry(name.as_str()).or_default() += 1;
    }
    for (number, node) in nodes {
        let error = |problem: String| place(number, node, problem);
        if !usual(&node.domain) {
            return Err(error(format!(
                "operations of {:?} are not supported",
                node.domain
            )));
        }
        let Some(output) = node.output.first() else {
            return Err(error("has no output".into()));
        };
        let value = step(&mut reader, node).map_err(error)?;
        let twice = reader.values.insert(output, value).is_some();
        if twice || reader.tensors.contains_key(output.as_str()) {
            return Err(error(format!("gives {output:?} for the second time")));
        }
    }
    let Value::Layer(last) = reader.value(end).map_err(problem)? else {
        return Err(problem("the output does not depend on the images".into()));
    };
    let long = last
        .long_axes()
        .iter()
        .filter(|axes| !axes.is_empty())
        .count();
    if last.source.is_none() || last.pads != [0; 4] || long > 1 {
        return Err(problem(format!(
            "the output {end:?} has {:?} values behind the batch; one axis, the classes, is possible",
            last.lengths()
        )));
    }
    if last.source != reader.layers.newest() {
        return Err(problem(format!(
            "the output {end:?} is not of the last layer: something is computed that it does not depend on"
        )));
    }
    for (number, node) in &ends {
        let usual = match node.op_type.as_str() {
            "Sigmoid" => continue,
            "ArgMax" => 0,
            _ if opset < 13 => 1,
            _ => -1,
        };
        let error = |problem: String| place(*number, node, problem);
        let given = [ops::int(node, "axis", usual)];
        let axis = shapes::axes(&given, last.axes.len() + 1).map_err(error)?[0];
        if axis == 0 || last.long_axes()[axis - 1].is_empty() {
            return Err(error(format!(
                "along axis {axis}, which has no several classes"
            )));
        }
    }
    let sigmoid = ends.iter().any(|(_, node)| node.op_type == "Sigmoid");
    let mut layers = reader.layers;
    match last.len() {
        1 => layers.two_classes().map_err(problem)?,
        _ if sigmoid => {
            return Err(problem(
                "Sigmoid at the end of several outputs: classes that exclude one another are possible".into(),
            ));
        }
        _ => {}
    }
    layers.notes.splice(0..0, notes);
    let title: String = graph
        .name
        .chars()
        .filter(|c| !c.is_control())
        .take(64)
        .collect();
    let title = if title.is_empty() {
        "imported".into()
    } else {
        title
    };
    let (network, weights, notes) = layers.finish(title, shape)?;
    Ok(Understood {
        network,
        weights,
        notes,
    })
}

/// What a node gives: from constants alone, another view, or layers.
fn step(reader: &mut Reader<'_>, node: &proto::Node) -> Result<Value, String> {
    let operands = ops::Operands::new(reader, node)?;
    if node.op_type == "CastLike" && node.input.get(1).is_none_or(|like| !reader.floats(like)) {
        return Err("to something else than floats".into());
    }
    if let Some(constant) = constants::fold(node, &operands)? {
        return reader.constant(constant);
    }
    if let Some(view) = shapes::view(node, &operands)? {
        return Ok(Value::Layer(view));
    }
    ops::layer(reader, node, &operands).map(Value::Layer)
}
