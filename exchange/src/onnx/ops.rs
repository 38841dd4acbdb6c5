//! Operations that become layers, one arm each, with the attribute forms that exporters write.

use ndarray::ArrayD;
use trefoil_models::network::LayerSpec;

use super::graph::{Reader, Value};
use super::layers::{Geometry, border, extent};
use super::proto::{Attribute, Node, Tensor};
use super::shapes::axes;
use super::tensor::MAX_AXES;
use super::view::View;

fn attribute<'a>(node: &'a Node, name: &str) -> Option<&'a Attribute> {
    node.attribute
        .iter()
        .find(|attribute| attribute.name == name)
}

/// An integer, or what the standard says where it is not given.
pub fn int(node: &Node, name: &str, usual: i64) -> i64 {
    attribute(node, name).map_or(usual, |attribute| attribute.i)
}

fn float(node: &Node, name: &str, usual: f64) -> f64 {
    attribute(node, name).map_or(usual, |attribute| f64::from(attribute.f))
}

/// Integers, if they are given.
pub fn attribute_ints<'a>(node: &'a Node, name: &str) -> Option<&'a [i64]> {
    attribute(node, name).map(|attribute| attribute.ints.as_slice())
}

/// A tensor, if it is given.
pub fn tensor_attribute<'a>(node: &'a Node, name: &str) -> Option<&'a Tensor> {
    attribute(node, name).and_then(|attribute| attribute.t.as_ref())
}

/// Values that a node reads, at most.
const MAX_OPERANDS: usize = 64;

/// What a node reads.
#[derive(Debug)]
pub struct Operands {
    values: Vec<Option<Value>>,
    names: Vec<String>,
    /// Whether one node alone reads its output.
    pub sole: bool,
}

impl Operands {
    /// Looks up what a node reads.
    pub fn new(reader: &mut Reader<'_>, node: &Node) -> Result<Operands, String> {
        if node.input.len() > MAX_OPERANDS {
            return Err(format!(
                "reads {} values; at most {MAX_OPERANDS}",
                node.input.len()
            ));
        }
        let mut value = |name: &String| match name.is_empty() {
            true => Ok(None),
            false => reader.value(name).map(Some),
        };
        Ok(Operands {
            values: node
                .input
                .iter()
                .map(&mut value)
                .collect::<Result<_, _>>()?,
            names: node.input.clone(),
            sole: node.output.first().is_none_or(|name| reader.sole(name)),
        })
    }

    /// Operand number so and so, if it is a layer's values.
    pub fn layer(&self, at: usize) -> Option<&View> {
        match self.values.get(at) {
            Some(Some(Value::Layer(view))) => Some(view),
            _ => None,
        }
    }

    /// Operand number so and so, if it is a constant.
    pub fn constant(&self, at: usize) -> Option<&ArrayD<f64>> {
        match self.values.get(at) {
            Some(Some(Value::Constant(constant))) => Some(constant),
            _ => None,
        }
    }

    /// Operand number so and so, if it is one number.
    fn number(&self, at: usize) -> Option<f64> {
        let constant = self.constant(at).filter(|constant| constant.len() == 1);
        constant.and_then(|constant| constant.first().copied())
    }

    /// All constants.
    pub fn constants(&self) -> impl Iterator<Item = &ArrayD<f64>> {
        (0..self.values.len()).filter_map(|at| self.constant(at))
    }

    /// Whether it reads nothing else.
    pub fn all_constant(&self) -> bool {
        !self
            .values
            .iter()
            .any(|value| matches!(value, Some(Value::Layer(_))))
    }

    /// Integers that newer operator sets give as an operand and older ones as an attribute.
    pub fn ints_or_attribute(
        &self,
        node: &Node,
        at: usize,
        name: &str,
    ) -> Result<Option<Vec<i64>>, String> {
        match (self.values.get(at), self.constant(at)) {
            (_, Some(constant)) if constant.len() > 2 * MAX_AXES => Err(format!(
                "{} {name}; at most {MAX_AXES} axes",
                constant.len()
            )),
            (_, Some(constant)) => Ok(Some(constant.iter().map(|value| *value as i64).collect())),
            (Some(Some(_)), None) => Err(format!("{name} are no constant")),
            _ => Ok(attribute_ints(node, name).map(<[i64]>::to_vec)),
        }
    }

    fn weights(&self, at: usize, what: &str) -> Result<ArrayD<f64>, String> {
        let constant = self.constant(at).cloned();
        constant.ok_or_else(|| format!("{what} that are no constant"))
    }

    fn name(&self, at: usize) -> &str {
        self.names.get(at).map_or("", String::as_str)
    }
}

fn pair(node: &Node, name: &str, usual: Option<[usize; 2]>) -> Result<[usize; 2], String> {
    let possible = |n: i64| {
        usize::try_from(n)
            .ok()
            .filter(|n| (1..=1 << 16).contains(n))
    };
    match (attribute_ints(node, name), usual) {
        (None, Some(usual)) => Ok(usual),
        (Some(&[a, b]), _) => possible(a)
            .zip(possible(b))
            .map(|(a, b)| [a, b])
            .ok_or_else(|| format!("{name} = {:?}", [a, b])),
        (found, _) => Err(format!(
            "{name} = {found:?}; two, for height and width, are possible"
        )),
    }
}

/// Top, left, bottom, right, from `pads` or `auto_pad`.
fn pads(
    node: &Node,
    image: [usize; 2],
    window: [usize; 2],
    stride: [usize; 2],
) -> Result<[usize; 4], String> {
    let auto = attribute(node, "auto_pad").map_or(&b"NOTSET"[..], |attribute| &attribute.s);
    let same = |more_first: bool| {
        let mut pads = [0; 4];
        for side in 0..2 {
            let out = image[side].div_ceil(stride[side]);
            let all = ((out - 1) * stride[side] + window[side]).saturating_sub(image[side]);
            let (less, more) = (all / 2, all - all / 2);
            (pads[side], pads[side + 2]) = if more_first {
                (more, less)
            } else {
                (less, more)
            };
        }
        Ok(pads)
    };
    match auto {
        b"" | b"NOTSET" => match attribute_ints(node, "pads") {
            None => Ok([0; 4]),
            Some(given) => four(given),
        },
        b"VALID" => Ok([0; 4]),
        b"SAME_UPPER" => same(false),
        b"SAME_LOWER" => same(true),
        other => Err(format!("auto_pad = {:?}", String::from_utf8_lossy(other))),
    }
}

fn four(given: &[i64]) -> Result<[usize; 4], String> {
    let possible = |n: &i64| usize::try_from(*n).ok().filter(|n| *n <= 1 << 16);
    let all: Option<Vec<usize>> = given.iter().map(possible).collect();
    all.and_then(|all| <[usize; 4]>::try_from(all).ok())
        .ok_or_else(|| format!("pads = {given:?}; four that are not negative are possible"))
}

fn sum(a: [usize; 4], b: [usize; 4]) -> [usize; 4] {
    [0, 1, 2, 3].map(|side| a[side] + b[side])
}

fn bias(operands: &Operands, at: usize, length: usize) -> Result<Vec<f64>, String> {
    match operands.values.get(at) {
        None | Some(None) => Ok(vec![0.0; length]),
        Some(Some(_)) => {
            let bias = operands.weights(at, "biases")?;
            match bias.len() {
                1 => Ok(vec![bias.iter().sum(); length]),
                n if n == length => Ok(bias.iter().copied().collect()),
                n => Err(format!("{n} biases for {length} outputs")),
            }
        }
    }
}

fn conv(
    reader: &mut Reader<'_>,
    node: &Node,
    operands: &Operands,
    on: &View,
) -> Result<View, String> {
    let [_, h, w] = on.image()?;
    let weight = operands.weights(1, "weights")?;
    let &[filters, _, height, width] = weight.shape() else {
        return Err(format!(
            "weights of shape {:?}; convolutions over height and width are possible",
            weight.shape()
        ));
    };
    let kernel = pair(node, "kernel_shape", Some([height, width]))?;
    if kernel != [height, width] || height * width == 0 {
        return Err(format!(
            "kernel_shape {kernel:?}, but weights of shape {:?}",
            weight.shape()
        ));
    }
    let stride = pair(node, "strides", Some([1; 2]))?;
    let dilation = pair(node, "dilations", Some([1; 2]))?;
    let window = [0, 1].map(|side| (kernel[side] - 1) * dilation[side] + 1);
    let seen = [h + on.pads[0] + on.pads[2], w + on.pads[1] + on.pads[3]];
    let geometry = Geometry {
        stride,
        dilation,
        pads: sum(pads(node, seen, window, stride)?, on.pads),
        groups: usize::try_from(int(node, "group", 1)).unwrap_or(0),
    };
    let bias = bias(operands, 2, filters)?;
    let hint = (operands.name(1), operands.sole);
    reader.layers.conv(on, weight, bias, geometry, hint)
}

fn pool(
    reader: &mut Reader<'_>,
    node: &Node,
    operands: &Operands,
    on: &View,
) -> Result<View, String> {
    let [_, h, w] = on.image()?;
    let average = node.op_type == "AveragePool";
    let window = pair(node, "kernel_shape", None)?;
    let stride = pair(node, "strides", Some([1; 2]))?;
    if pair(node, "dilations", Some([1; 2]))? != [1; 2] {
        return Err("dilations of a pool".into());
    }
    if node
        .output
        .get(1)
        .is_some_and(|name| !name.is_empty() && !reader.sole(name))
    {
        return Err("the places of maxima are asked for".into());
    }
    let seen = [h + on.pads[0] + on.pads[2], w + on.pads[1] + on.pads[3]];
    let own = pads(node, seen, window, stride)?;
    let ceil = int(node, "ceil_mode", 0) != 0;
    let counted = average && int(node, "count_include_pad", 0) != 0;
    // Zeros of a Pad are values: they count in averages, and a maximum they are where all others are
    // negative. Where they make no difference to a border of the pool's own, that takes them up.
    let together = sum(own, on.pads);
    let alike = match average {
        true => counted || own == [0; 4],
        false => reader.layers.not_negative(on.source),
    };
    let fits = (0..4).all(|at| together[at] < window[at % 2] && together[at] <= [h, w][at % 2]);
    let (on, own, counted) = match on.pads == [0; 4] || (alike && fits && !ceil) {
        true => (unpadded(on), together, counted || on.pads != [0; 4]),
        false => (reader.layers.padded(&unpadded(on), on.pads)?, own, counted),
    };
    if window == [1; 2] && stride == [1; 2] && own == [0; 4] {
        return Ok(View {
            sole: on.sole && operands.sole,
            ..on
        });
    }
    let (window, stride) = (extent(window), (stride != window).then_some(extent(stride)));
    let padding = (own != [0; 4]).then(|| border(own));
    let ceil_mode = ceil.then_some(true);
    let spec = match average {
        true => LayerSpec::AvgPool {
            window,
            stride,
            padding,
            ceil_mode,
            count_include_pad: (padding.is_some() && !counted).then_some(false),
        },
        false => LayerSpec::MaxPool {
            window,
            stride,
            padding,
            ceil_mode,
        },
    };
    reader.layers.add(spec, &[&on], operands.sole)
}

fn unpadded(view: &View) -> View {
    View {
        pads: [0; 4],
        ..view.clone()
    }
}

fn pad(node: &Node, operands: &Operands, on: &View) -> Result<View, String> {
    let mode = attribute(node, "mode").map_or(&b"constant"[..], |attribute| &attribute.s);
    let value = operands.constant(2).and_then(|value| value.first());
    if !matches!(mode, b"" | b"constant") || value.is_some_and(|value| *value != 0.0) {
        return Err("other values than zeros around an image".into());
    }
    let given = operands
        .ints_or_attribute(node, 1, "pads")?
        .ok_or("names no pads")?;
    let rank = on.axes.len() + 1;
    // An image of the graph's axes, wherever height and width stand.
    let mut all = vec![[0i64; 2]; rank];
    let named = operands.ints_or_attribute(node, 3, "axes")?;
    let named = axes(&named.unwrap_or((0..rank as i64).collect()), rank)?;
    if given.len() != 2 * named.len() {
        return Err(format!("pads {given:?} on {rank} axes"));
    }
    for (at, axis) in named.iter().enumerate() {
        all[*axis] = [given[at], given[at + named.len()]];
    }
    let mut sides = [0; 4];
    for (axis, zeros) in all
        .iter()
        .enumerate()
        .filter(|(_, zeros)| **zeros != [0, 0])
    {
        let own = axis.checked_sub(1).map(|axis| on.axes[axis].as_slice());
        let side = match own {
            Some([1]) if on.shape.len() == 3 => 0,
            Some([2]) if on.shape.len() == 3 => 1,
            _ => {
                return Err(format!(
                    "pads {given:?}: height and width alone can have zeros around them"
                ));
            }
        };
        (sides[side], sides[side + 2]) = (zeros[0], zeros[1]);
    }
    Ok(View {
        pads: sum(four(&sides)?, on.pads),
        sole: on.sole && operands.sole,
        ..on.clone()
    })
}

fn gemm(
    reader: &mut Reader<'_>,
    node: &Node,
    operands: &Operands,
    on: &View,
) -> Result<View, String> {
    let weight = operands.weights(1, "weights")?;
    if weight.ndim() != 2 {
        return Err(format!("weights of shape {:?}", weight.shape()));
    }
    let (mut weight, mut alpha, mut beta) = (weight, 1.0, 1.0);
    if node.op_type == "Gemm" {
        if int(node, "transA", 0) != 0 {
            return Err("transA = 1".into());
        }
        if int(node, "transB", 0) != 0 {
            weight = weight.reversed_axes();
        }
        (alpha, beta) = (float(node, "alpha", 1.0), float(node, "beta", 1.0));
    }
    let units = weight.shape()[1];
    let mut bias = bias(operands, 2, units)?;
    bias.iter_mut().for_each(|value| *value *= beta);
    let weight = weight.mapv(|value| value * alpha);
    reader
        .layers
        .dense(on, weight, bias, (operands.name(1), operands.sole))
}

/// What stands behind a Pad and cannot.
const BEHIND_PAD: &str = "behind Pad; convolutions and pools take up zeros around an image";

fn clip(node: &Node, operands: &Operands) -> Result<LayerSpec, String> {
    let bound = |at: usize, name: &str, usual: f64| {
        if operands.layer(at).is_some() {
            return Err(format!("{name} is no constant"));
        }
        let operand = operands.constant(at).and_then(|value| value.first());
        Ok(operand.copied().unwrap_or(float(node, name, usual)))
    };
    let (low, high) = (
        bound(1, "min", f64::NEG_INFINITY)?,
        bound(2, "max", f64::INFINITY)?,
    );
    match (low == 0.0, high) {
        (true, 6.0) => Ok(LayerSpec::Relu6 {}),
        (true, high) if high >= f64::from(f32::MAX) => Ok(LayerSpec::Relu {}),
        _ => Err(format!(
            "from {low} to {high}; 0 to 6 (relu6), or 0 without an upper bound (relu), are possible"
        )),
    }
}

/// Sums, differences, products with constants; sums of layers.
fn arithmetic(reader: &mut Reader<'_>, node: &Node, operands: &Operands) -> Result<View, String> {
    let op = node.op_type.as_str();
    let mut read = (0..operands.values.len()).filter_map(|at| operands.layer(at));
    if read.any(|view| view.pads != [0; 4]) {
        return Err(BEHIND_PAD.into());
    }
    let (on, constant, first) = match (operands.layer(0), operands.layer(1)) {
        (Some(a), Some(b)) if op == "Add" => {
            return join(reader, operands, &[a, b], LayerSpec::Add {});
        }
        (Some(a), Some(b)) if op == "Mul" && a == b => {
            return reader
                .layers
                .elementwise(LayerSpec::Square {}, a, operands.sole);
        }
        (Some(on), None) => (on, operands.weights(1, "values")?, true),
        (None, Some(on)) => (on, operands.weights(0, "values")?, false),
        _ => return Err(format!("{op} of two layers is not supported")),
    };
    let values = on.per_channel(&constant)?;
    let (ones, zeros) = (vec![1.0; values.len()], vec![0.0; values.len()]);
    let map = |change: fn(f64) -> f64| values.iter().copied().map(change).collect();
    let (scale, shift) = match (op, first) {
        ("Add", _) => (ones, values),
        ("Sub", true) => (ones, map(|value| -value)),
        ("Sub", false) => (vec![-1.0; values.len()], values),
        ("Mul", _) => (values, zeros),
        ("Div", true) => (map(|value| 1.0 / value), zeros),
        _ => return Err("a constant divided by a layer is not supported".into()),
    };
    reader.layers.affine(on, scale, shift, operands.sole)
}

/// Layers that meet.
fn join(
    reader: &mut Reader<'_>,
    operands: &Operands,
    on: &[&View],
    spec: LayerSpec,
) -> Result<View, String> {
    let Some((first, rest)) = on.split_first() else {
        return Err("reads nothing".into());
    };
    if rest.is_empty() {
        return Ok(View {
            sole: first.sole && operands.sole,
            ..(*first).clone()
        });
    }
    for other in rest {
        let alike =
            other.shape.len() == first.shape.len() && other.long_axes() == first.long_axes();
        if !alike || other.pads != [0; 4] || first.pads != [0; 4] {
            return Err(format!(
                "reads {:?} and {:?} behind the batch, with axes in different orders",
                first.lengths(),
                other.lengths()
            ));
        }
    }
    let made = reader.layers.add(spec, on, operands.sole)?;
    Ok(View {
        axes: first.axes.clone(),
        ..made
    })
}

/// The layers that a node becomes.
pub fn layer(reader: &mut Reader<'_>, node: &Node, operands: &Operands) -> Result<View, String> {
    let op = node.op_type.as_str();
    if matches!(op, "Add" | "Sub" | "Mul" | "Div") {
        return arithmetic(reader, node, operands);
    }
    // A maximum has no order.
    let on = operands
        .layer(0)
        .or_else(|| operands.layer(1).filter(|_| op == "Max"))
        .ok_or("reads a constant where a layer is expected")?;
    match op {
        "Conv" => return conv(reader, node, operands, on),
        "MaxPool" | "AveragePool" => return pool(reader, node, operands, on),
        "Pad" => return pad(node, operands, on),
        _ if on.pads != [0; 4] => {
            return Err(BEHIND_PAD.into());
        }
        _ => {}
    }
    let sole = operands.sole;
    match op {
        "Gemm" | "MatMul" => gemm(reader, node, operands, on),
        "Relu" => reader.layers.elementwise(LayerSpec::Relu {}, on, sole),
        "Sigmoid" => reader.layers.elementwise(LayerSpec::Sigmoid {}, on, sole),
        "Tanh" => reader.layers.elementwise(LayerSpec::Tanh {}, on, sole),
        "Swish" if float(node, "alpha", 1.0) != 1.0 => Err("alpha other than 1".into()),
        "Swish" => reader.layers.elementwise(LayerSpec::Silu {}, on, sole),
        "Gelu" => match attribute(node, "approximate").map_or(&b"none"[..], |by| &by.s) {
            b"none" | b"" => reader.layers.elementwise(LayerSpec::Gelu {}, on, sole),
            other => Err(format!(
                "approximate = {:?}; \"none\", by erf, is possible",
                String::from_utf8_lossy(other)
            )),
        },
        "Clip" => match clip(node, operands)? {
            LayerSpec::Relu6 {} if reader.layers.cap(on) => Ok(View { sole, ..on.clone() }),
            spec => reader.layers.elementwise(spec, on, sole),
        },
        "Max" => match operands.number(0).or(operands.number(1)) {
            Some(0.0) if operands.values.len() == 2 => {
                reader.layers.elementwise(LayerSpec::Relu {}, on, sole)
            }
            _ => Err("of something else than a layer and 0".into()),
        },
        "Pow" => match operands.number(1) {
            Some(2.0) => reader.layers.elementwise(LayerSpec::Square {}, on, sole),
            _ => Err("other powers than 2".into()),
        },
        "LeakyRelu" | "PRelu" => {
            let slope = match (op, operands.constant(1)) {
                ("PRelu", Some(slope)) if slope.len() == 1 => slope.iter().sum(),
                ("PRelu", _) => return Err("one slope for all channels is possible".into()),
                _ => float(node, "alpha", 0.01),
            };
            // As the file means it, and not as a float of 32 bits happens to lie.
            let slope = (slope * 1e6).round() / 1e6;
            let spec = LayerSpec::LeakyRelu { slope: Some(slope) };
            let made = reader.layers.elementwise(spec, on, sole)?;
            reader.layers.slope(slope);
            Ok(made)
        }
        "BatchNormalization" => {
            if int(node, "training_mode", 0) != 0 {
                return Err("training_mode = 1: export the model for inference".into());
            }
            let vector = |at| {
                operands
                    .weights(at, "statistics")
                    .map(|v| v.iter().copied().collect())
            };
            let statistics = [vector(1)?, vector(2)?, vector(3)?, vector(4)?];
            let epsilon = float(node, "epsilon", 1e-5);
            reader
                .layers
                .batch_norm(on, statistics, epsilon, (operands.name(1), sole))
        }
        "GlobalAveragePool" => {
            on.image()?;
            reader.layers.add(LayerSpec::GlobalAvgPool {}, &[on], sole)
        }
        "GlobalMaxPool" => {
            let [_, h, w] = on.image()?;
            reader.layers.add(global_max_pool([h, w]), &[on], sole)
        }
        "ReduceMean" | "ReduceMax" => {
            let rank = on.axes.len() + 1;
            let given = operands
                .ints_or_attribute(node, 1, "axes")?
                .ok_or("names no axes")?;
            let given = axes(&given, rank)?;
            let mut gone: Vec<usize> = given
                .iter()
                .filter(|axis| **axis > 0)
                .flat_map(|axis| on.axes[axis - 1].clone())
                .collect();
            gone.sort_unstable();
            if given.contains(&0) || gone != [1, 2] || on.shape.len() != 3 {
                return Err("over other axes than height and width".into());
            }
            let spec = match op {
                "ReduceMean" => LayerSpec::GlobalAvgPool {},
                _ => global_max_pool([on.shape[1], on.shape[2]]),
            };
            let made = reader.layers.add(spec, &[on], sole)?;
            let keep = int(node, "keepdims", 1) != 0;
            let kept = (1..rank).filter(|axis| keep || !given.contains(axis));
            let axes = kept.map(|axis| on.axes[axis - 1].clone()).collect();
            Ok(View { axes, ..made })
        }
        "Concat" => {
            let axis = axes(&[int(node, "axis", 1)], on.axes.len() + 1)?[0];
            let channels = axis.checked_sub(1).map(|axis| on.axes[axis].as_slice());
            if channels != Some(&[0])
                || !operands
                    .values
                    .iter()
                    .all(|v| matches!(v, Some(Value::Layer(_))))
            {
                return Err("of something else than layers, along their channels".into());
            }
            let layers: Vec<&View> = (0..operands.values.len())
                .filter_map(|at| operands.layer(at))
                .collect();
            join(reader, operands, &layers, LayerSpec::Concat {})
        }
        "Sum" => {
            let layers: Vec<&View> = (0..operands.values.len())
                .filter_map(|at| operands.layer(at))
                .collect();
            match layers.len() == operands.values.len() {
                true => join(reader, operands, &layers, LayerSpec::Add {}),
                false => Err("of a layer and a constant".into()),
            }
        }
        _ => Err("this operation is not supported".into()),
    }
}

/// The largest of each whole plane.
fn global_max_pool(plane: [usize; 2]) -> LayerSpec {
    LayerSpec::MaxPool {
        window: extent(plane),
        stride: None,
        padding: None,
        ceil_mode: None,
    }
}
