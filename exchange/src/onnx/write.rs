//! A network with revealed weights as an ONNX model: input `images` `[N, channels, height, width]`,
//! output `logits` `[N, classes]`, 32-bit floats. What a job computes in fixed point is here in floating
//! point, like the floating-point twin; each layer is one node or two.

use bytes::Bytes;
use ndarray::ArrayD;
use prost::Message;
use trefoil_models::network::{Curve, Layer, LayerKind, Network, VARIANCE_EPSILON_LOG2, Window};

use super::proto::{
    Attribute, Dimension, FLOAT, Graph, Model, Node, Opset, Shape, Tensor, TensorType, Type,
    ValueInfo,
};
use crate::{ExchangeError, Weights};

/// Read by everything since 2020, and enough for these operations.
const OPSET: i64 = 13;
/// The file format that came with it.
const IR_VERSION: i64 = 7;

struct Writer<'a> {
    weights: &'a Weights,
    nodes: Vec<Node>,
    tensors: Vec<Tensor>,
}

fn ints(name: &str, values: &[usize]) -> Attribute {
    Attribute {
        name: name.into(),
        ints: values.iter().map(|value| *value as i64).collect(),
        kind: 7,
        ..Attribute::default()
    }
}

fn int(name: &str, value: usize) -> Attribute {
    Attribute {
        name: name.into(),
        i: value as i64,
        kind: 2,
        ..Attribute::default()
    }
}

fn float(name: &str, value: f64) -> Attribute {
    Attribute {
        name: name.into(),
        f: value as f32,
        kind: 1,
        ..Attribute::default()
    }
}

fn windows(window: &Window, pads: [usize; 4]) -> Vec<Attribute> {
    vec![
        ints("kernel_shape", &window.size),
        ints("strides", &window.stride),
        ints("pads", &pads),
    ]
}

fn info(name: &str, shape: &[usize]) -> ValueInfo {
    let batch = Dimension {
        value: 0,
        param: "N".into(),
    };
    let fixed = shape.iter().map(|length| Dimension {
        value: *length as i64,
        param: String::new(),
    });
    let tensor = TensorType {
        elem_type: FLOAT,
        shape: Some(Shape {
            dim: std::iter::once(batch).chain(fixed).collect(),
        }),
    };
    ValueInfo {
        name: name.into(),
        ty: Some(Type {
            tensor: Some(tensor),
        }),
    }
}

impl Writer<'_> {
    fn node(&mut self, op: &str, reads: &[&str], gives: &str, attribute: Vec<Attribute>) {
        self.nodes.push(Node {
            input: reads.iter().map(|name| (*name).into()).collect(),
            output: vec![gives.into()],
            name: format!("{gives}/{op}"),
            op_type: op.into(),
            attribute,
            domain: String::new(),
        });
    }

    fn tensor(&mut self, name: &str, shape: &[usize], values: impl Iterator<Item = f64>) -> String {
        let bytes: Vec<u8> = values
            .flat_map(|value| (value as f32).to_le_bytes())
            .collect();
        self.tensors.push(Tensor {
            dims: shape.iter().map(|length| *length as i64).collect(),
            data_type: FLOAT,
            name: name.into(),
            raw_data: Bytes::from(bytes),
            ..Tensor::default()
        });
        name.to_owned()
    }

    /// What the array of a name holds.
    fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f64>, ExchangeError> {
        let refuse = |problem: String| ExchangeError::Tensor {
            name: name.to_owned(),
            problem,
        };
        let array: &ArrayD<f64> = self
            .weights
            .get(name)
            .ok_or_else(|| refuse("is missing".into()))?;
        if array.shape() != shape {
            return Err(refuse(format!(
                "has shape {:?}, the network has {shape:?}",
                array.shape()
            )));
        }
        Ok(array.iter().copied().collect())
    }

    /// The array of a name, as an initialiser of that name.
    fn held(&mut self, name: String, shape: &[usize]) -> Result<String, ExchangeError> {
        let values = self.values(&name, shape)?;
        Ok(self.tensor(&name, shape, values.into_iter()))
    }

    fn constant(&mut self, gives: &str, what: &str, value: f64) -> String {
        self.tensor(&format!("{gives}/{what}"), &[], std::iter::once(value))
    }

    fn weighted(&mut self, layer: &Layer) -> Result<[String; 2], ExchangeError> {
        let shape = layer.weight_shape().unwrap_or_default();
        let weight = self.held(layer.weight_name(), &shape)?;
        let bias = self.held(layer.bias_name(), &[layer.bias_len().unwrap_or(0)])?;
        Ok([weight, bias])
    }

    /// `c_0 + x (c_1 + x (c_2 + ..))`; each coefficient for all channels or one for each.
    fn polynomial(&mut self, on: &str, gives: &str, shape: &[usize], coefficients: &[Vec<f64>]) {
        let mut sum = String::new();
        for (at, values) in coefficients.iter().enumerate().rev() {
            let name = format!("{gives}/c{at}");
            let constant = self.tensor(&name, shape, values.iter().copied());
            if sum.is_empty() {
                sum = constant;
                continue;
            }
            let product = format!("{gives}/product{at}");
            self.node("Mul", &[on, &sum], &product, vec![]);
            sum = match at {
                0 => gives.to_owned(),
                _ => format!("{gives}/sum{at}"),
            };
            self.node("Add", &[&product, &constant], &sum, vec![]);
        }
    }

    /// As [`Writer::polynomial`], with the layer's own coefficients.
    fn learnt(&mut self, layer: &Layer, on: &str, gives: &str) -> Result<(), ExchangeError> {
        let channels = layer.input[0];
        let shape = layer.weight_shape().unwrap_or_default();
        let mut coefficients = vec![self.values(&layer.bias_name(), &[channels])?];
        let weight = self.values(&layer.weight_name(), &shape)?;
        coefficients.extend(weight.chunks(channels).map(<[f64]>::to_vec));
        let mut shape = vec![1; layer.input.len() + 1];
        shape[1] = channels;
        self.polynomial(on, gives, &shape, &coefficients);
        Ok(())
    }

    /// The function that the layer's lines approximate.
    fn curve(&mut self, curve: Curve, on: &str, gives: &str) {
        match curve {
            Curve::Sigmoid => self.node("Sigmoid", &[on], gives, vec![]),
            Curve::Tanh => self.node("Tanh", &[on], gives, vec![]),
            Curve::Silu => {
                let gate = format!("{gives}/gate");
                self.node("Sigmoid", &[on], &gate, vec![]);
                self.node("Mul", &[on, &gate], gives, vec![]);
            }
            // x Phi(x) = x / 2 (1 + erf(x / sqrt(2)))
            Curve::Gelu => {
                let names =
                    ["scaled", "erf", "twice", "product"].map(|part| format!("{gives}/{part}"));
                let [scaled, erf, twice, product] = names.each_ref().map(String::as_str);
                let unit = self.constant(gives, "unit", std::f64::consts::FRAC_1_SQRT_2);
                self.node("Mul", &[on, &unit], scaled, vec![]);
                self.node("Erf", &[scaled], erf, vec![]);
                let one = self.constant(gives, "one", 1.0);
                self.node("Add", &[erf, &one], twice, vec![]);
                self.node("Mul", &[on, twice], product, vec![]);
                let half = self.constant(gives, "half", 0.5);
                self.node("Mul", &[product, &half], gives, vec![]);
            }
        }
    }

    fn layer(&mut self, layer: &Layer, reads: &[&str], gives: &str) -> Result<(), ExchangeError> {
        let on = reads[0];
        match &layer.kind {
            LayerKind::Conv {
                kernel,
                stride,
                padding: [down, right],
                dilation,
                groups,
                ..
            } => {
                let [weight, bias] = self.weighted(layer)?;
                let attributes = vec![
                    ints("kernel_shape", kernel),
                    ints("strides", stride),
                    ints("pads", &[*down, *right, *down, *right]),
                    ints("dilations", dilation),
                    int("group", *groups),
                ];
                self.node("Conv", &[on, &weight, &bias], gives, attributes);
            }
            LayerKind::Dense { .. } => {
                let [weight, bias] = self.weighted(layer)?;
                let flat = format!("{gives}/flat");
                let on = match layer.input.len() {
                    1 => on,
                    _ => {
                        self.node("Flatten", &[on], &flat, vec![int("axis", 1)]);
                        &flat
                    }
                };
                self.node("Gemm", &[on, &weight, &bias], gives, vec![]);
            }
            LayerKind::BatchNorm { .. } => {
                let [scale, shift] = self.weighted(layer)?;
                let channels = [layer.input[0]];
                let mean = self.held(layer.mean_name(), &channels)?;
                let variance = self.held(layer.variance_name(), &channels)?;
                let epsilon = float("epsilon", f64::from(VARIANCE_EPSILON_LOG2).exp2());
                let reads = [on, &scale, &shift, &mean, &variance];
                self.node("BatchNormalization", &reads, gives, vec![epsilon]);
            }
            LayerKind::Relu => self.node("Relu", &[on], gives, vec![]),
            LayerKind::Relu6 => {
                let low = self.constant(gives, "min", 0.0);
                let high = self.constant(gives, "max", 6.0);
                self.node("Clip", &[on, &low, &high], gives, vec![]);
            }
            LayerKind::LeakyRelu(slope) => {
                self.node("LeakyRelu", &[on], gives, vec![float("alpha", *slope)]);
            }
            LayerKind::Smooth(curve) => self.curve(*curve, on, gives),
            LayerKind::LearntPoly(_) => self.learnt(layer, on, gives)?,
            LayerKind::Square => self.node("Mul", &[on, on], gives, vec![]),
            LayerKind::Poly(coefficients) => {
                let coefficients: Vec<Vec<f64>> = coefficients.iter().map(|c| vec![*c]).collect();
                self.polynomial(on, gives, &[], &coefficients);
            }
            LayerKind::MaxPool(window) => {
                self.node("MaxPool", &[on], gives, windows(window, window.pads));
            }
            LayerKind::AvgPool { window, counted } => {
                // Where only a part of the border counts, the rest is what cut windows have behind it.
                let all = *counted == window.pads || *counted == [0; 4];
                let pads = if all { window.pads } else { *counted };
                let mut attributes = windows(window, pads);
                attributes.push(int("ceil_mode", usize::from(!all)));
                let counts = usize::from(*counted != [0; 4]);
                attributes.push(int("count_include_pad", counts));
                self.node("AveragePool", &[on], gives, attributes);
            }
            LayerKind::Flatten => self.node("Flatten", &[on], gives, vec![int("axis", 1)]),
            LayerKind::Dropout(rate) => {
                let ratio = self.constant(gives, "ratio", *rate);
                self.node("Dropout", &[on, &ratio], gives, vec![]);
            }
            // The model gives logits.
            LayerKind::Softmax => self.node("Identity", &[on], gives, vec![]),
            LayerKind::Add => self.node("Sum", reads, gives, vec![]),
            LayerKind::Concat => self.node("Concat", reads, gives, vec![int("axis", 1)]),
        }
        Ok(())
    }
}

/// The model's bytes. `weights` are the network's carried state by name, which must be whole.
pub fn write(network: &Network, weights: &Weights) -> Result<Vec<u8>, ExchangeError> {
    let mut writer = Writer {
        weights,
        nodes: Vec::new(),
        tensors: Vec::new(),
    };
    let name = |source: &Option<usize>| source.map_or("images", |at| &network.layers[at].name);
    for layer in &network.layers {
        let reads: Vec<&str> = layer.sources.iter().map(name).collect();
        writer.layer(layer, &reads, &layer.name)?;
    }
    let last = network.layers.last().map_or("images", |layer| &layer.name);
    // A layer may have that name; no layer has one with a slash.
    let taken = network.layers.iter().any(|layer| layer.name == "logits");
    let output = if taken { "logits/output" } else { "logits" };
    writer.node("Flatten", &[last], output, vec![int("axis", 1)]);
    let model = Model {
        ir_version: IR_VERSION,
        producer_name: "trefoil".into(),
        producer_version: env!("CARGO_PKG_VERSION").into(),
        opset_import: vec![Opset {
            domain: String::new(),
            version: OPSET,
        }],
        graph: Some(Graph {
            node: writer.nodes,
            name: network.name.clone(),
            initializer: writer.tensors,
            input: vec![info("images", &network.input)],
            output: vec![info(output, &[network.classes])],
        }),
    };
    Ok(model.encode_to_vec())
}
