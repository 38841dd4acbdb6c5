//! Constants of a graph: tensors of numbers, whatever their type in the file.

use std::ops::Range;

use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn};

use super::proto;
use crate::ExchangeError;

/// Elements of one constant, at most: what a layer of a network may have.
pub const MAX_ELEMENTS: usize = 1 << 24;

/// Types of elements that are floats, of several widths.
pub const FLOATS: [i32; 4] = [1, 10, 11, 16];
/// Axes of a constant or of a layer's values, at most.
pub const MAX_AXES: usize = 8;

/// Refuses a constant that is too large, before it takes memory. An axis without values is no reason for
/// others to be long: their lengths are added and multiplied too.
pub fn room(shape: &[usize]) -> Result<(), String> {
    if shape.len() > MAX_AXES {
        return Err(format!("{} axes; at most {MAX_AXES}", shape.len()));
    }
    let elements = shape
        .iter()
        .fold(1usize, |all, length| all.saturating_mul(*length.max(&1)));
    match elements <= MAX_ELEMENTS {
        true => Ok(()),
        false => Err(format!("{shape:?} are more than {MAX_ELEMENTS} elements")),
    }
}

fn chunks<const N: usize>(bytes: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
    bytes.chunks_exact(N).map(|chunk| {
        let mut value = [0; N];
        value.copy_from_slice(chunk);
        value
    })
}

/// Where the values of a tensor are that are in another file: its name, and which bytes of it.
pub fn outside(tensor: &proto::Tensor) -> Result<(&str, Range<usize>), String> {
    let entry = |key: &str| {
        let entry = tensor.external_data.iter().find(|entry| entry.key == key);
        entry.map(|entry| entry.value.as_str())
    };
    let number = |key: &str| match entry(key) {
        None => Ok(None),
        Some(text) => match text.parse::<usize>() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(format!("its values are in another file, {key} {text:?}")),
        },
    };
    let name = entry("location").unwrap_or_default();
    // A model is never a reason to read files elsewhere.
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', ':']) {
        return Err(format!(
            "its values are in the file {name:?}: a file beside the model is possible"
        ));
    }
    let start = number("offset")?.unwrap_or(0);
    let end = number("length")?.map_or(usize::MAX, |length| start.saturating_add(length));
    Ok((name, start..end))
}

/// The numbers of a tensor of the file. Integers are exact up to 2^53; shapes and axes are smaller.
pub fn decode(tensor: &proto::Tensor) -> Result<ArrayD<f64>, ExchangeError> {
    let refuse = |problem: String| {
        Err(ExchangeError::Tensor {
            name: tensor.name.clone(),
            problem,
        })
    };
    if tensor.data_location == 1 {
        return refuse("its values are in another file, and it is no initialiser".into());
    }
    let length = |length: &i64| usize::try_from(*length).unwrap_or(usize::MAX);
    let shape: Vec<usize> = tensor.dims.iter().map(length).collect();
    if room(&shape).is_err() {
        return refuse(format!("shape {:?} is not possible", tensor.dims));
    }
    let elements: usize = shape.iter().product();
    let raw = &tensor.raw_data[..];
    let small = || tensor.int32_data.iter().map(|bits| *bits as u16);
    let floats = || tensor.float_data.iter().map(|value| f64::from(*value));
    let width = match tensor.data_type {
        1 | 6 => 4,
        7 | 11 => 8,
        10 | 16 => 2,
        2 | 3 | 9 => 1,
        other => {
            return refuse(format!(
                "elements of type {other} are no numbers for weights"
            ));
        }
    };
    if !raw.is_empty() && raw.len() != elements * width {
        return refuse(format!(
            "{} bytes, but shape {shape:?} of elements of {width} bytes",
            raw.len()
        ));
    }
    let values: Vec<f64> = match (tensor.data_type, raw.is_empty()) {
        (1, true) => floats().collect(),
        (1, false) => chunks(raw)
            .map(|b| f64::from(f32::from_le_bytes(b)))
            .collect(),
        (11, true) => tensor.double_data.clone(),
        (11, false) => chunks(raw).map(f64::from_le_bytes).collect(),
        (7, true) => tensor
            .int64_data
            .iter()
            .map(|value| *value as f64)
            .collect(),
        (7, false) => chunks(raw).map(|b| i64::from_le_bytes(b) as f64).collect(),
        (6, false) => chunks(raw)
            .map(|b| f64::from(i32::from_le_bytes(b)))
            .collect(),
        (10, true) => small().map(|bits| f16::from_bits(bits).to_f64()).collect(),
        (10, false) => chunks(raw)
            .map(|b| f16::from_le_bytes(b).to_f64())
            .collect(),
        (16, true) => small().map(|bits| bf16::from_bits(bits).to_f64()).collect(),
        (16, false) => chunks(raw)
            .map(|b| bf16::from_le_bytes(b).to_f64())
            .collect(),
        (3, false) => raw.iter().map(|b| f64::from(*b as i8)).collect(),
        (_, false) => raw.iter().map(|b| f64::from(*b)).collect(),
        (_, true) => tensor
            .int32_data
            .iter()
            .map(|value| f64::from(*value))
            .collect(),
    };
    let found = values.len();
    match ArrayD::from_shape_vec(IxDyn(&shape), values) {
        Ok(array) => Ok(array),
        Err(_) => refuse(format!("{found} elements, but shape {shape:?}")),
    }
}
