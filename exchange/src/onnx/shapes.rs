//! Operations that move no value, but say how the graph sees it.

use ndarray::ArrayD;

use super::ops::{Operands, attribute_ints, int};
use super::proto::Node;
use super::tensor::{FLOATS, MAX_AXES};
use super::view::View;

/// Axes counted from the end made counted from the front.
pub fn axes(given: &[i64], rank: usize) -> Result<Vec<usize>, String> {
    let axis = |axis: &i64| {
        let from_the_front = match *axis < 0 {
            true => axis.checked_add(rank as i64),
            false => Some(*axis),
        };
        let axis = from_the_front.and_then(|axis| usize::try_from(axis).ok());
        axis.filter(|axis| *axis < rank)
            .ok_or_else(|| format!("axes {given:?} of {rank} axes"))
    };
    given.iter().map(axis).collect()
}

/// Lengths behind the batch that a `Reshape` asks for.
fn lengths(view: &View, target: &ArrayD<f64>, allow_zero: bool) -> Result<Vec<usize>, String> {
    if target.len() > MAX_AXES {
        return Err(format!("to {} axes; at most {MAX_AXES}", target.len()));
    }
    let target: Vec<i64> = target.iter().map(|length| *length as i64).collect();
    let refused = |why: &str| Err(format!("to {target:?}: {why}"));
    let seen = view.lengths();
    let Some((_, rest)) = target.split_first() else {
        return refused("no axis for the batch");
    };
    let mut lengths = Vec::new();
    let mut open = None;
    for (at, length) in rest.iter().enumerate() {
        lengths.push(match *length {
            0 if allow_zero => return refused("an axis without values"),
            0 => match seen.get(at) {
                Some(length) => *length,
                None => return refused("a 0 that stands for no axis"),
            },
            -1 if open.is_none() => {
                open = Some(at);
                1
            }
            length if (1..=1 << 26).contains(&length) => length as usize,
            _ => return refused("a length that is not possible"),
        });
    }
    let product = lengths
        .iter()
        .try_fold(1usize, |all, length| all.checked_mul(*length));
    let product = product.filter(|product| *product != 0);
    match (open, product) {
        (Some(at), Some(product)) if view.len().is_multiple_of(product) => {
            lengths[at] = view.len() / product;
            Ok(lengths)
        }
        // The first axis, whatever it says, is then the batch: as many values behind it as an image has.
        (None, Some(product)) if product == view.len() => Ok(lengths),
        _ => refused(&format!("an image has {} values here", view.len())),
    }
}

/// The other view that a node gives, if that is what it does.
pub fn view(node: &Node, operands: &Operands) -> Result<Option<View>, String> {
    let Some(view) = operands.layer(0) else {
        return Ok(None);
    };
    let nothing = ["Identity", "Dropout", "Cast", "CastLike"].contains(&node.op_type.as_str());
    if view.pads != [0; 4] && !nothing {
        return Ok(None);
    }
    let rank = view.axes.len() + 1;
    let listed = || operands.ints_or_attribute(node, 1, "axes");
    let made = match node.op_type.as_str() {
        "Cast" if !i32::try_from(int(node, "to", 1)).is_ok_and(|to| FLOATS.contains(&to)) => {
            return Err("to something else than floats".into());
        }
        _ if nothing => view.clone(),
        "Reshape" => {
            let target = operands.constant(1).ok_or("needs a constant shape")?;
            let lengths = lengths(view, target, int(node, "allowzero", 0) != 0)?;
            view.clone().reshape(&lengths)?
        }
        "Flatten" => match axes(&[int(node, "axis", 1)], rank)?[0] {
            1 => view.clone().reshape(&[view.len()])?,
            axis => return Err(format!("axis {axis}; 1, behind the batch, is possible")),
        },
        "Transpose" => {
            let usual: Vec<i64> = (0..rank as i64).rev().collect();
            let order = axes(attribute_ints(node, "perm").unwrap_or(&usual), rank)?;
            match order.split_first() {
                Some((0, rest)) => {
                    let rest: Vec<usize> = rest.iter().map(|axis| axis - 1).collect();
                    view.clone().transpose(&rest)?
                }
                _ => return Err("moves the batch axis".into()),
            }
        }
        "Squeeze" => {
            let lengths = view.lengths();
            let gone = match listed()? {
                Some(given) => axes(&given, rank)?,
                None => (1..rank).filter(|axis| lengths[axis - 1] == 1).collect(),
            };
            if gone.iter().any(|axis| *axis == 0 || lengths[axis - 1] != 1) {
                return Err(format!("axes {gone:?} of {lengths:?} behind the batch"));
            }
            let kept = (1..rank).filter(|axis| !gone.contains(axis));
            let kept: Vec<usize> = kept.map(|axis| lengths[axis - 1]).collect();
            view.clone().reshape(&kept)?
        }
        "Unsqueeze" => {
            let given = listed()?.ok_or("names no axes")?;
            let rank = rank + given.len();
            let new = axes(&given, rank)?;
            if new.contains(&0) {
                return Err("an axis before the batch".into());
            }
            let mut old = view.lengths().into_iter();
            let lengths: Vec<usize> = (1..rank)
                .map(|axis| match new.contains(&axis) {
                    true => 1,
                    false => old.next().unwrap_or(1),
                })
                .collect();
            view.clone().reshape(&lengths)?
        }
        _ => return Ok(None),
    };
    Ok(Some(View {
        sole: view.sole && operands.sole,
        ..made
    }))
}
