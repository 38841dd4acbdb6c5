//! Operations on constants: shapes that exporters compute, weights that they transpose.

use ndarray::{ArrayD, Axis, IxDyn};

use super::ops::{Operands, attribute_ints, int, tensor_attribute};
use super::proto::Node;
use super::shapes::axes;
use super::tensor::{self, MAX_AXES, MAX_ELEMENTS, room};
use super::view::View;

fn vector(values: Vec<f64>) -> ArrayD<f64> {
    ndarray::Array1::from_vec(values).into_dyn()
}

fn as_floats(lengths: Vec<usize>) -> impl Iterator<Item = f64> {
    lengths.into_iter().map(|length| length as f64)
}

fn shaped(array: &ArrayD<f64>, shape: &[usize]) -> Result<ArrayD<f64>, String> {
    room(shape)?;
    let flat = array.as_standard_layout().into_owned();
    flat.into_shape_with_order(IxDyn(shape))
        .map_err(|error| format!("to {shape:?}: {error}"))
}

/// What a `Constant` holds.
pub fn constant(node: &Node) -> Result<ArrayD<f64>, String> {
    if let Some(stored) = tensor_attribute(node, "value") {
        return tensor::decode(stored).map_err(|error| error.to_string());
    }
    let attribute = node.attribute.first().ok_or("has no value")?;
    match attribute.name.as_str() {
        "value_int" => Ok(ArrayD::from_elem(IxDyn(&[]), attribute.i as f64)),
        "value_float" => Ok(ArrayD::from_elem(IxDyn(&[]), f64::from(attribute.f))),
        "value_ints" => Ok(vector(attribute.ints.iter().map(|i| *i as f64).collect())),
        "value_floats" => Ok(vector(
            attribute.floats.iter().map(|f| f64::from(*f)).collect(),
        )),
        other => Err(format!("a value given as {other}")),
    }
}

/// Parts of a constant: from, to, along which axes, in which steps.
fn slice(of: &ArrayD<f64>, operands: &Operands) -> Result<ArrayD<f64>, String> {
    let given = |at: usize| operands.constant(at).map(|values| values.iter());
    let (Some(starts), Some(ends)) = (given(1), given(2)) else {
        return Err("needs constants for start and end".into());
    };
    let count = starts.len();
    if count > of.ndim() {
        return Err(format!("{count} starts for {} axes", of.ndim()));
    }
    let usual: Vec<i64> = (0..count as i64).collect();
    let listed = given(3).map_or(usual, |axes| axes.map(|axis| *axis as i64).collect());
    let listed = axes(&listed, of.ndim())?;
    if (1..listed.len()).any(|at| listed[..at].contains(&listed[at])) {
        return Err("an axis twice".into());
    }
    let steps = given(4).map_or(vec![1; count], |steps| steps.map(|s| *s as i64).collect());
    if ends.len() != count || listed.len() != count || steps.len() != count {
        return Err(format!(
            "{count} starts, and another number of ends, axes or steps"
        ));
    }
    let mut made = of.clone();
    for (at, (start, end)) in starts.zip(ends).enumerate() {
        let (axis, step) = (Axis(listed[at]), steps[at]);
        let length = made.len_of(axis) as i64;
        let place = |value: &f64, low: i64, high: i64| match *value as i64 {
            value if value < 0 => value.saturating_add(length).clamp(low, high),
            value => value.clamp(low, high),
        };
        // Backwards, the end is the one before the first.
        let (mut from, to) = match step < 0 {
            true => (
                place(start, 0.min(length - 1), length - 1),
                place(end, -1, length - 1),
            ),
            false => (place(start, 0, length), place(end, 0, length)),
        };
        let mut places = Vec::new();
        while (step > 0 && from < to) || (step < 0 && from > to) {
            places.push(from as usize);
            from = from.saturating_add(step);
        }
        if step == 0 {
            return Err("steps of 0".into());
        }
        made = made.select(axis, &places);
    }
    Ok(made)
}

/// The constant that a node gives, if it reads constants alone, or the shape of something.
pub fn fold(node: &Node, operands: &Operands) -> Result<Option<ArrayD<f64>>, String> {
    match node.op_type.as_str() {
        "Constant" => return constant(node).map(Some),
        "Shape" => {
            // The batch is open: -1, which is what a `Reshape` says of it too.
            let of_layer = |view: &View| std::iter::once(-1.0).chain(as_floats(view.lengths()));
            let all: Vec<f64> = match (operands.layer(0), operands.constant(0)) {
                (Some(view), _) => of_layer(view).collect(),
                (None, Some(array)) => as_floats(array.shape().to_vec()).collect(),
                (None, None) => return Err("reads nothing".into()),
            };
            let rank = all.len() as i64;
            let bound = |value: i64| value + if value < 0 { rank } else { 0 };
            let start = bound(int(node, "start", 0).clamp(-rank, rank)) as usize;
            let end = bound(int(node, "end", rank).clamp(-rank, rank)) as usize;
            return Ok(Some(vector(all[start..end.max(start)].to_vec())));
        }
        // What it reads second says the type alone, which is floats.
        "CastLike" => return Ok(operands.constant(0).cloned()),
        _ => {}
    }
    let Some(first) = operands.constant(0).filter(|_| operands.all_constant()) else {
        return Ok(None);
    };
    let rank = first.ndim();
    let listed = || operands.ints_or_attribute(node, 1, "axes");
    let made = match node.op_type.as_str() {
        "Identity" => first.clone(),
        // Integers of several widths: the fraction goes.
        "Cast" if matches!(int(node, "to", 1), 2..=7 | 12 | 13) => first.mapv(f64::trunc),
        "Cast" => first.clone(),
        "Expand" => {
            let shape = operands.constant(1).ok_or("needs a shape")?;
            let shape: Vec<usize> = shape.iter().map(|length| *length as usize).collect();
            // Either may have the longer axis.
            let rank = rank.max(shape.len());
            if rank > MAX_AXES {
                return Err(format!("to {rank} axes"));
            }
            let whole = |shape: &[usize]| [&vec![1; rank - shape.len()], shape].concat();
            let (own, other) = (whole(first.shape()), whole(&shape));
            let shape: Vec<usize> = own.iter().zip(&other).map(|(a, b)| *a.max(b)).collect();
            room(&shape)?;
            let array = first.broadcast(IxDyn(&shape));
            array.ok_or_else(|| format!("to {shape:?}"))?.to_owned()
        }
        "Transpose" => {
            let usual: Vec<i64> = (0..rank as i64).rev().collect();
            let order = axes(attribute_ints(node, "perm").unwrap_or(&usual), rank)?;
            let mut sorted = order.clone();
            sorted.sort_unstable();
            sorted.dedup();
            if sorted.len() != rank {
                return Err(format!("perm {order:?} of {rank} axes"));
            }
            first.clone().permuted_axes(IxDyn(&order))
        }
        "Reshape" => {
            let target = operands.constant(1).ok_or("needs a shape")?;
            let target: Vec<i64> = target.iter().map(|length| *length as i64).collect();
            let known: usize = target
                .iter()
                .filter(|l| **l > 0)
                .fold(1, |all, l| all.saturating_mul(*l as usize));
            let length = |length: &i64| match *length {
                -1 => first.len() / known.max(1),
                length => length.max(0) as usize,
            };
            shaped(first, &target.iter().map(length).collect::<Vec<_>>())?
        }
        "Unsqueeze" => {
            let given = listed()?.ok_or("names no axes")?;
            let mut new = axes(&given, rank + given.len())?;
            new.sort_unstable();
            let mut shape = first.shape().to_vec();
            for axis in new {
                shape.insert(axis.min(shape.len()), 1);
            }
            shaped(first, &shape)?
        }
        "Squeeze" => {
            let gone = match listed()? {
                Some(given) => axes(&given, rank)?,
                None => (0..rank).filter(|axis| first.shape()[*axis] == 1).collect(),
            };
            let kept = (0..rank).filter(|axis| !gone.contains(axis));
            shaped(
                first,
                &kept.map(|axis| first.shape()[axis]).collect::<Vec<_>>(),
            )?
        }
        "Gather" => {
            let axis = axes(&[int(node, "axis", 0)], rank)?[0];
            let picked = operands.constant(1).ok_or("needs indices")?;
            if picked.len().saturating_mul(first.len()) > MAX_ELEMENTS {
                return Err(format!("{} of {} elements", picked.len(), first.len()));
            }
            let indices: Vec<i64> = picked.iter().map(|index| *index as i64).collect();
            let chosen = first.select(Axis(axis), &axes(&indices, first.shape()[axis])?);
            match picked.ndim() {
                0 => chosen.index_axis_move(Axis(axis), 0),
                _ => chosen,
            }
        }
        "Concat" => {
            let axis = axes(&[int(node, "axis", 0)], rank)?[0];
            if operands.constants().map(ArrayD::len).sum::<usize>() > MAX_ELEMENTS {
                return Err(format!("more than {MAX_ELEMENTS} elements"));
            }
            if operands.constants().any(|part| part.ndim() != rank) {
                return Err("constants of different numbers of axes".into());
            }
            let parts: Vec<_> = operands.constants().map(|part| part.view()).collect();
            ndarray::concatenate(Axis(axis), &parts).map_err(|error| error.to_string())?
        }
        "Slice" => slice(first, operands)?,
        "ConstantOfShape" => {
            let shape: Vec<usize> = first.iter().map(|length| *length as usize).collect();
            room(&shape)?;
            let value = tensor_attribute(node, "value").map(tensor::decode);
            let value = value.transpose().map_err(|error| error.to_string())?;
            let value = value.and_then(|value| value.first().copied());
            ArrayD::from_elem(IxDyn(&shape), value.unwrap_or(0.0))
        }
        "Add" | "Sub" | "Mul" | "Div" => {
            let second = operands.constant(1).ok_or("reads one value")?;
            if first.shape() != second.shape() && first.len() != 1 && second.len() != 1 {
                return Err(format!(
                    "constants of shapes {:?} and {:?}",
                    first.shape(),
                    second.shape()
                ));
            }
            match node.op_type.as_str() {
                "Add" => first + second,
                "Sub" => first - second,
                "Mul" => first * second,
                _ => first / second,
            }
        }
        _ => return Err("is not supported on constants".into()),
    };
    Ok(Some(made.as_standard_layout().into_owned()))
}
