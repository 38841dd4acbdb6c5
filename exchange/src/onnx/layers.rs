//! The layers that a graph becomes, with their weights, until they are a network.

use std::collections::{BTreeMap, BTreeSet};

use ndarray::{ArrayD, Axis, IxDyn};
use trefoil_models::network::{
    Border, Extent, From, LayerEntry, LayerSpec, Network, Padding, VARIANCE_EPSILON_LOG2,
};
use trefoil_models::programs::Ratio;

use super::tensor::room;
use super::view::View;
use crate::{ExchangeError, Weights};

/// Layers, at most: what a network file may have.
const MAX_LAYERS: usize = 256;
/// Weights of all layers, at most.
const MAX_WEIGHTS: usize = 1 << 26;
/// Running statistics have at least 14 fraction bits in every number format.
const STATISTICS_GRID: f64 = 16384.0;

/// Weights of one layer.
#[derive(Clone, Debug)]
pub struct Held {
    /// As the layer has them: `[filters, channels, kernel]`, `[inputs, units]`, `[channels]`.
    pub weight: ArrayD<f64>,
    pub bias: Vec<f64>,
    /// Running mean and variance of a normalisation.
    pub statistics: Option<[Vec<f64>; 2]>,
}

#[derive(Debug)]
struct Entry {
    spec: LayerSpec,
    sources: Vec<Option<usize>>,
    shape: Vec<usize>,
    held: Option<Held>,
    hint: String,
    /// Whether its values are never negative.
    not_negative: bool,
}

/// A convolution's geometry as ONNX says it: zeros may differ from side to side.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    pub stride: [usize; 2],
    pub dilation: [usize; 2],
    /// Top, left, bottom, right.
    pub pads: [usize; 4],
    pub groups: usize,
}

/// Layers so far.
#[derive(Debug, Default)]
pub struct Layers {
    entries: Vec<Entry>,
    /// Weights of all layers so far.
    elements: usize,
    /// What was understood that its reader should know.
    pub notes: Vec<String>,
}

impl Layers {
    fn push(&mut self, entry: Entry, sole: bool) -> View {
        let shape = entry.shape.clone();
        self.entries.push(entry);
        View::plain(Some(self.entries.len() - 1), shape, sole)
    }

    /// The last layer so far.
    pub fn newest(&self) -> Option<usize> {
        self.entries.len().checked_sub(1)
    }

    /// A layer without weights.
    pub fn add(&mut self, spec: LayerSpec, inputs: &[&View], sole: bool) -> Result<View, String> {
        if self.entries.len() >= MAX_LAYERS {
            return Err(format!("more than {MAX_LAYERS} layers"));
        }
        let shapes: Vec<Vec<usize>> = inputs.iter().map(|view| view.shape.clone()).collect();
        let not_negative = match spec {
            LayerSpec::Relu {} | LayerSpec::Relu6 {} | LayerSpec::Square {} => true,
            LayerSpec::MaxPool { .. }
            | LayerSpec::AvgPool { .. }
            | LayerSpec::GlobalAvgPool {}
            | LayerSpec::Flatten {}
            | LayerSpec::Add {}
            | LayerSpec::Concat {} => inputs.iter().all(|view| self.not_negative(view.source)),
            _ => false,
        };
        let entry = Entry {
            shape: spec.output(&shapes)?,
            not_negative,
            spec,
            sources: inputs.iter().map(|view| view.source).collect(),
            held: None,
            hint: String::new(),
        };
        Ok(self.push(entry, sole))
    }

    /// A layer that changes each value for itself: the graph goes on to see it as before.
    pub fn elementwise(&mut self, spec: LayerSpec, on: &View, sole: bool) -> Result<View, String> {
        let made = self.add(spec, &[on], sole)?;
        Ok(View {
            axes: on.axes.clone(),
            ..made
        })
    }

    /// A layer with weights; `hint` is the name of its weights in the graph.
    fn weighted(
        &mut self,
        spec: LayerSpec,
        on: &View,
        held: Held,
        hint: &str,
        sole: bool,
    ) -> Result<View, String> {
        self.elements += held.weight.len();
        if self.elements > MAX_WEIGHTS {
            return Err(format!("more than {MAX_WEIGHTS} weights in all"));
        }
        let view = self.add(spec, &[on], sole)?;
        if let Some(entry) = self.entries.last_mut() {
            entry.held = Some(held);
            entry.hint = hint.to_owned();
        }
        Ok(view)
    }

    /// A convolution. Zeros that differ from side to side become zero weights of a larger kernel, which
    /// is exact: the larger window starts where the zeros of both sides are equal.
    pub fn conv(
        &mut self,
        on: &View,
        mut weight: ArrayD<f64>,
        bias: Vec<f64>,
        geometry: Geometry,
        (hint, sole): (&str, bool),
    ) -> Result<View, String> {
        on.image()?;
        let Geometry {
            stride,
            dilation,
            pads,
            groups,
        } = geometry;
        if weight.ndim() != 4 || weight.shape()[0] != bias.len() {
            return Err(format!(
                "weights of shape {:?} and {} biases; a convolution over height and width has [filters, channels / groups, height, width]",
                weight.shape(),
                bias.len()
            ));
        }
        if groups == 0 || weight.shape()[1].saturating_mul(groups) != on.shape[0] {
            return Err(format!(
                "weights of shape {:?} in {groups} groups do not fit {} channels",
                weight.shape(),
                on.shape[0]
            ));
        }
        let mut padding = [0; 2];
        for side in 0..2 {
            let (before, behind) = (pads[side], pads[side + 2]);
            padding[side] = before.max(behind);
            let more = before.abs_diff(behind);
            if more == 0 {
                continue;
            }
            if dilation[side] == 0 || more % dilation[side] != 0 || more > 64 {
                return Err(format!(
                    "pads {pads:?} with dilations {dilation:?}: zeros that differ from side to side by no multiple of the dilation, or by more than 64, are not possible"
                ));
            }
            let mut shape = weight.shape().to_vec();
            shape[side + 2] = more / dilation[side];
            room(&shape)?;
            let zeros = ArrayD::zeros(IxDyn(&shape));
            let parts = match before < behind {
                true => [zeros.view(), weight.view()],
                false => [weight.view(), zeros.view()],
            };
            weight = ndarray::concatenate(Axis(side + 2), &parts).map_err(|e| e.to_string())?;
            self.notes.push(format!(
                "layer {}: zeros that differ from side to side are zero weights of a larger kernel",
                self.entries.len() + 1
            ));
        }
        let [filters, _, height, width] = [0, 1, 2, 3].map(|axis| weight.shape()[axis]);
        let other = |pair: [usize; 2], usual| (pair != [usual; 2]).then_some(extent(pair));
        let spec = LayerSpec::Conv {
            filters,
            kernel: extent([height, width]),
            stride: other(stride, 1),
            padding: other(padding, 0).map(Padding::Zeros),
            dilation: other(dilation, 1),
            groups: (groups != 1).then_some(groups),
        };
        let held = Held {
            weight,
            bias,
            statistics: None,
        };
        self.weighted(spec, on, held, hint, sole)
    }

    /// Zeros around an image: a depthwise convolution that copies each value.
    pub fn padded(&mut self, on: &View, pads: [usize; 4]) -> Result<View, String> {
        if pads == [0; 4] {
            return Ok(on.clone());
        }
        let [channels, ..] = on.image()?;
        let [top, left, bottom, right] = pads;
        if pads.iter().any(|zeros| *zeros > 64) {
            return Err(format!("pads {pads:?}; at most 64 are possible"));
        }
        let shape = [channels, 1, top + bottom + 1, left + right + 1];
        room(&shape)?;
        let mut weight = ArrayD::zeros(IxDyn(&shape));
        for channel in 0..channels {
            weight[[channel, 0, bottom, right]] = 1.0;
        }
        let geometry = Geometry {
            stride: [1; 2],
            dilation: [1; 2],
            pads: [top + bottom, left + right, top + bottom, left + right],
            groups: channels,
        };
        self.notes.push(format!(
            "layer {}: zeros around an image before a pool, as a convolution that copies each value",
            self.entries.len() + 1
        ));
        self.conv(on, weight, vec![0.0; channels], geometry, ("", true))
    }

    /// A dense layer: weights `[inputs, units]`, inputs in the order in which the graph sees them.
    pub fn dense(
        &mut self,
        on: &View,
        weight: ArrayD<f64>,
        bias: Vec<f64>,
        (hint, sole): (&str, bool),
    ) -> Result<View, String> {
        if on.axes.len() != 1 || weight.ndim() != 2 || weight.shape()[0] != on.len() {
            return Err(format!(
                "weights of shape {:?} on {:?} behind the batch",
                weight.shape(),
                on.lengths()
            ));
        }
        let units = weight.shape()[1];
        if bias.len() != units {
            return Err(format!("{} biases for {units} units", bias.len()));
        }
        // From the graph's order of inputs to the layer's.
        let order = on.flat_order();
        let mut shape: Vec<usize> = order.iter().map(|axis| on.shape[*axis]).collect();
        shape.push(units);
        let mut back: Vec<usize> = (0..order.len()).collect();
        back.sort_by_key(|at| order[*at]);
        back.push(order.len());
        let ordered = weight
            .as_standard_layout()
            .into_owned()
            .into_shape_with_order(IxDyn(&shape))
            .map_err(|error| error.to_string())?
            .permuted_axes(IxDyn(&back))
            .as_standard_layout()
            .into_owned()
            .into_shape_with_order(IxDyn(&[on.len(), units]))
            .map_err(|error| error.to_string())?;
        let held = Held {
            weight: ordered,
            bias,
            statistics: None,
        };
        let spec = LayerSpec::Dense { units: Some(units) };
        self.weighted(spec, on, held, hint, sole)
    }

    /// A normalisation with these running statistics, whose epsilon is this.
    pub fn batch_norm(
        &mut self,
        on: &View,
        [mut scale, mut shift, mut mean, mut variance]: [Vec<f64>; 4],
        epsilon: f64,
        (hint, sole): (&str, bool),
    ) -> Result<View, String> {
        let channels = on.shape[0];
        if [&scale, &shift, &mean, &variance]
            .iter()
            .any(|v| v.len() != channels)
            || on
                .long_axes()
                .first()
                .is_none_or(|axes| axes.iter().any(|axis| *axis != 0))
        {
            return Err(format!(
                "statistics of {} channels; its input has {:?} behind the batch",
                mean.len(),
                on.lengths()
            ));
        }
        // Our own epsilon is 2^-10: the variance takes up the difference, and where it cannot, the scale.
        // Statistics have few fraction bits, and a small variance is a large factor: they are put on a
        // grid that every number format has, and scale and shift take up what that changes.
        let own = f64::from(VARIANCE_EPSILON_LOG2).exp2();
        let grid = |x: f64| (x * STATISTICS_GRID).round() / STATISTICS_GRID;
        let parameters = scale.iter_mut().zip(&mut shift);
        for ((scale, shift), (mean, variance)) in parameters.zip(mean.iter_mut().zip(&mut variance))
        {
            let sum = *variance + epsilon;
            if sum.is_nan() || sum <= 0.0 {
                return Err(format!("a variance of {variance} with epsilon {epsilon}"));
            }
            let possible = grid((sum - own).clamp(0.0, 255.0));
            let near = grid(*mean);
            *shift += *scale * (near - *mean) / sum.sqrt();
            *mean = near;
            *scale *= ((possible + own) / sum).sqrt();
            *variance = possible;
        }
        let held = Held {
            weight: ArrayD::from_shape_vec(IxDyn(&[channels]), scale).map_err(|e| e.to_string())?,
            bias: shift,
            statistics: Some([mean, variance]),
        };
        let spec = LayerSpec::BatchNorm { momentum: None };
        let made = self.weighted(spec, on, held, hint, sole)?;
        Ok(View {
            axes: on.axes.clone(),
            ..made
        })
    }

    /// `scale x + shift` for every channel: into the weights before it, else a depthwise convolution.
    pub fn affine(
        &mut self,
        on: &View,
        scale: Vec<f64>,
        shift: Vec<f64>,
        sole: bool,
    ) -> Result<View, String> {
        let held = on.source.filter(|_| on.sole && on.pads == [0; 4]);
        let held = held.and_then(|at| {
            let linear = matches!(
                self.entries[at].spec,
                LayerSpec::Conv { .. } | LayerSpec::Dense { .. }
            );
            self.entries[at].held.as_mut().filter(|_| linear)
        });
        if let Some(held) = held {
            // Filters are the first axis of a convolution's weights, units the last of a dense layer's.
            let axis = if held.weight.ndim() == 4 { 0 } else { 1 };
            for (mut part, factor) in held.weight.axis_iter_mut(Axis(axis)).zip(&scale) {
                part.mapv_inplace(|value| value * factor);
            }
            for ((bias, factor), term) in held.bias.iter_mut().zip(&scale).zip(&shift) {
                *bias = *bias * factor + term;
            }
            return Ok(View { sole, ..on.clone() });
        }
        let image = View::plain(on.source, on.shape.clone(), on.sole);
        if on.shape.len() != 3 || on.pads != [0; 4] {
            return Err(
                "a constant that no convolution or dense layer before it can take up".into(),
            );
        }
        let channels = on.shape[0];
        let weight = ArrayD::from_shape_vec(IxDyn(&[channels, 1, 1, 1]), scale);
        let geometry = Geometry {
            stride: [1; 2],
            dilation: [1; 2],
            pads: [0; 4],
            groups: channels,
        };
        let weight = weight.map_err(|error| error.to_string())?;
        let made = self.conv(&image, weight, shift, geometry, ("", sole))?;
        Ok(View {
            axes: on.axes.clone(),
            ..made
        })
    }

    /// Makes a ReLU that nobody else reads a ReLU6, if that is what this is of.
    pub fn cap(&mut self, on: &View) -> bool {
        let entry = on
            .source
            .filter(|_| on.sole)
            .map(|at| &mut self.entries[at]);
        match entry {
            Some(entry) if matches!(entry.spec, LayerSpec::Relu {}) => {
                entry.spec = LayerSpec::Relu6 {};
                true
            }
            _ => false,
        }
    }

    /// Says of the newest layer if its slope is not held exactly.
    pub fn slope(&mut self, slope: f64) {
        let held = Ratio::nearest(slope);
        if held.value() != slope {
            let Ratio { factor, shift } = held;
            self.notes.push(format!(
                "layer {}: the slope {slope} is held as {factor} / 2^{shift}",
                self.entries.len()
            ));
        }
    }

    /// Whether a layer's values are never negative, so that a zero beside them is no maximum.
    pub fn not_negative(&self, source: Option<usize>) -> bool {
        source.is_some_and(|at| self.entries[at].not_negative)
    }

    /// One logit z becomes two, 0 and z: their softmax is the sigmoid of z.
    pub fn two_classes(&mut self) -> Result<(), String> {
        let entry = self.entries.last_mut();
        let Some((LayerSpec::Dense { units }, Some(held), shape)) =
            entry.map(|entry| (&mut entry.spec, entry.held.as_mut(), &mut entry.shape))
        else {
            return Err(
                "one output, and not of a dense layer; two classes and more are possible".into(),
            );
        };
        let zeros = ArrayD::zeros(held.weight.raw_dim());
        held.weight = ndarray::concatenate(Axis(1), &[zeros.view(), held.weight.view()])
            .map_err(|error| error.to_string())?;
        held.bias.insert(0, 0.0);
        (*units, *shape) = (Some(2), vec![2]);
        self.notes.push(
            "one output z: two classes with logits 0 and z, whose softmax is the sigmoid of z"
                .into(),
        );
        Ok(())
    }

    /// The network, and its weights by name.
    pub fn finish(
        self,
        name: String,
        input: [usize; 3],
    ) -> Result<(Network, Weights, Vec<String>), ExchangeError> {
        let classes = self
            .entries
            .last()
            .map_or(0, |entry| entry.shape.iter().product());
        let names = self.names();
        let label =
            |source: &Option<usize>| source.map_or("images".into(), |at| names[at].1.clone());
        let (mut entries, mut weights) = (Vec::new(), BTreeMap::new());
        for (at, (entry, (named, name))) in self.entries.iter().zip(&names).enumerate() {
            let from = match entry.sources.as_slice() {
                [source] if *source == at.checked_sub(1) => None,
                [source] => Some(From::One(label(source))),
                several => Some(From::Many(several.iter().map(label).collect())),
            };
            entries.push(LayerEntry {
                name: named.then(|| name.clone()),
                from,
                spec: entry.spec.clone(),
            });
            let Some(held) = &entry.held else {
                continue;
            };
            let vector = |values: &[f64]| ndarray::Array1::from_vec(values.to_vec()).into_dyn();
            weights.insert(format!("{name}.weight"), held.weight.clone());
            weights.insert(format!("{name}.bias"), vector(&held.bias));
            if let Some([mean, variance]) = &held.statistics {
                weights.insert(format!("{name}.mean"), vector(mean));
                weights.insert(format!("{name}.variance"), vector(variance));
            }
        }
        let network = Network::new(name, input, classes, entries)?;
        Ok((network, weights, self.notes))
    }

    /// For each layer whether the network file names it, and the name. Layers with weights are called as
    /// the graph calls their weights (`layer1.0.conv1.weight`: `layer1_0_conv1`), else by kind.
    fn names(&self) -> Vec<(bool, String)> {
        let (mut names, mut taken) = (Vec::new(), BTreeSet::new());
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for (at, entry) in self.entries.iter().enumerate() {
            let reads = |other: usize| self.entries[other].sources.contains(&Some(at));
            let elsewhere = (at + 2..self.entries.len()).any(reads)
                || self
                    .entries
                    .get(at + 1)
                    .is_some_and(|next| next.sources.len() > 1);
            let count = counts.entry(entry.spec.kind()).or_default();
            *count += 1;
            // Not what an unnamed layer of this kind could be called: those have no underscore.
            let usual = format!("{}_{count}", entry.spec.kind());
            let hint = entry.hint.strip_suffix(".weight").unwrap_or_default();
            let possible = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
            let own = (1..=32).contains(&hint.len()) && hint.chars().all(possible);
            let hint = hint.replace('.', "_");
            let name = match own && hint != "images" && !taken.contains(&hint) {
                true => hint,
                false => (0..)
                    .map(|n| match n {
                        0 => usual.clone(),
                        n => format!("{usual}_{n}"),
                    })
                    .find(|name| !taken.contains(name))
                    .unwrap_or(usual),
            };
            taken.insert(name.clone());
            names.push((elsewhere || entry.held.is_some(), name));
        }
        names
    }
}

/// The shortest way to say top, left, bottom, right.
pub fn border(sides: [usize; 4]) -> Border {
    let [top, left, bottom, right] = sides;
    match (top, left) == (bottom, right) {
        true if top == left => Border::All(top),
        true => Border::Each([top, left]),
        false => Border::Sides(sides),
    }
}

/// One number where both directions have it.
pub fn extent(pair: [usize; 2]) -> Extent {
    match pair[0] == pair[1] {
        true => Extent::Both(pair[0]),
        false => Extent::Each(pair),
    }
}
