//! Activations that exporters write as several nodes: SiLU as `x sigmoid(x)`, GELU as
//! `x (1 + erf(x / sqrt(2))) / 2`. Each becomes the one node that newer operator sets have for it.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::proto::{Graph, Node};
use super::{constants, tensor, usual};

/// Factors deep, at most: `x`, the gate, and a half that may stand anywhere.
const DEPTH: usize = 3;
/// A constant of 16 bits is within this of the number it stands for, relatively.
const NEAR: f64 = 1.0 / 2048.0;

fn near(value: f64, wanted: f64) -> bool {
    (value / wanted - 1.0).abs() < NEAR
}

/// What makes a product an activation: `op` of `on` is `factor * on * (this)`.
struct Gate<'a> {
    on: &'a str,
    op: &'static str,
    factor: f64,
}

/// How often a product has what is activated and the gate, and its constant factor.
struct Product {
    on: usize,
    gate: usize,
    factor: f64,
}

struct Names<'a> {
    /// The node that gives a name.
    nodes: BTreeMap<&'a str, &'a Node>,
    /// Constants of one element.
    scalars: BTreeMap<&'a str, f64>,
}

impl<'a> Names<'a> {
    fn new(graph: &'a Graph) -> Names<'a> {
        let nodes = graph.node.iter();
        let nodes = nodes.filter_map(|node| Some((node.output.first()?.as_str(), node)));
        let mut names = Names {
            nodes: nodes.collect(),
            scalars: BTreeMap::new(),
        };
        let one = |dims: &[i64]| dims.iter().all(|length| *length == 1);
        let stored = graph.initializer.iter().filter(|t| one(&t.dims));
        let stored = stored.map(|t| (t.name.as_str(), tensor::decode(t).ok()));
        let constant = names.nodes.keys().filter_map(|name| {
            let node = names.node(name, &["Constant"])?;
            Some((*name, constants::constant(node).ok()))
        });
        let scalars = stored.chain(constant).filter_map(|(name, array)| {
            let array = array.filter(|array| array.len() == 1)?;
            Some((name, *array.first()?))
        });
        names.scalars = scalars.collect();
        names
    }

    fn node(&self, name: &str, ops: &[&str]) -> Option<&'a Node> {
        let node = self.nodes.get(name).copied();
        node.filter(|node| usual(&node.domain) && ops.contains(&node.op_type.as_str()))
    }

    /// The operands of a node of two.
    fn two(node: &'a Node) -> Option<[&'a str; 2]> {
        match node.input.as_slice() {
            [a, b] => Some([a.as_str(), b.as_str()]),
            _ => None,
        }
    }

    /// The operand beside a constant of this value, of a node whose operands can change places.
    fn beside(&self, node: &'a Node, wanted: f64) -> Option<&'a str> {
        let [a, b] = Self::two(node)?;
        let is = |name| self.scalars.get(name).is_some_and(|x| near(*x, wanted));
        match (is(a), is(b)) {
            (_, true) => Some(a),
            (true, _) => Some(b),
            _ => None,
        }
    }

    fn gate(&self, name: &str) -> Option<Gate<'a>> {
        if let Some(sigmoid) = self.node(name, &["Sigmoid"]) {
            return Some(Gate {
                on: sigmoid.input.first()?,
                op: "Swish",
                factor: 1.0,
            });
        }
        let error = self.beside(self.node(name, &["Add"])?, 1.0)?;
        let scaled = self.node(error, &["Erf"])?.input.first()?;
        let scaled = self.node(scaled, &["Mul", "Div"])?;
        let on = match scaled.op_type.as_str() {
            "Mul" => self.beside(scaled, std::f64::consts::FRAC_1_SQRT_2)?,
            _ => {
                let [on, by] = Self::two(scaled)?;
                let by = self.scalars.get(by)?;
                near(*by, std::f64::consts::SQRT_2).then_some(on)?
            }
        };
        Some(Gate {
            on,
            op: "Gelu",
            factor: 0.5,
        })
    }

    /// All names that a product is made of, itself included.
    fn inside(&self, name: &'a str, depth: usize, names: &mut Vec<&'a str>) {
        names.push(name);
        let node = self.node(name, &["Mul", "Div"]).and_then(Self::two);
        for factor in node.filter(|_| depth > 0).into_iter().flatten() {
            self.inside(factor, depth - 1, names);
        }
    }

    fn product(&self, name: &str, on: &str, gate: &str, depth: usize) -> Option<Product> {
        let one = Product {
            on: usize::from(name == on),
            gate: usize::from(name == gate),
            factor: 1.0,
        };
        if one.on + one.gate > 0 {
            return Some(one);
        }
        if let Some(factor) = self.scalars.get(name).copied() {
            return Some(Product { factor, ..one });
        }
        let node = self.node(name, &["Mul", "Div"]).filter(|_| depth > 0)?;
        let [a, b] = Self::two(node)?.map(|name| self.product(name, on, gate, depth - 1));
        let (a, b) = (a?, b?);
        match node.op_type.as_str() {
            "Div" if b.on + b.gate > 0 => None,
            "Div" => Some(Product {
                factor: a.factor / b.factor,
                ..a
            }),
            _ => Some(Product {
                on: a.on + b.on,
                gate: a.gate + b.gate,
                factor: a.factor * b.factor,
            }),
        }
    }

    /// The activation that a product is, of what.
    fn activation(&self, name: &'a str) -> Option<Gate<'a>> {
        self.node(name, &["Mul", "Div"])?;
        let mut names = Vec::new();
        self.inside(name, DEPTH, &mut names);
        names.into_iter().find_map(|inside| {
            let gate = self.gate(inside)?;
            let product = self.product(name, gate.on, inside, DEPTH)?;
            let all = product.on == 1 && product.gate == 1 && near(product.factor, gate.factor);
            all.then_some(gate)
        })
    }
}

/// The nodes of a graph with their numbers, such products replaced. What they were made of stays, and is
/// left out like every node that the output does not need.
pub fn fused<'a>(graph: &'a Graph) -> Vec<(usize, Cow<'a, Node>)> {
    let names = Names::new(graph);
    let replaced = |node: &'a Node| {
        let gate = node.output.first().and_then(|name| names.activation(name));
        gate.map_or(Cow::Borrowed(node), |gate| {
            Cow::Owned(Node {
                input: vec![gate.on.to_owned()],
                op_type: gate.op.to_owned(),
                attribute: vec![],
                ..node.clone()
            })
        })
    };
    graph.node.iter().map(replaced).enumerate().collect()
}
