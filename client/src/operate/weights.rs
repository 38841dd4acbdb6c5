//! Files of weights, by their ending: `.npz`, `.safetensors`, and out `.onnx`.

use std::path::Path;

use anyhow::{Context, Result, bail};
use ndarray::{ArrayD, IxDyn};
use ndarray_npy::ReadNpyExt;
use trefoil_exchange::{Weights, onnx, tensors};
use trefoil_models::Network;

use super::npz;
use crate::data::npz::members;

/// Bytes of a file of weights that is read as a whole, at most.
const MAX_FILE_BYTES: u64 = 512 << 20;

/// What a path ends in.
fn ending(path: &Path) -> &str {
    let ending = path.extension().and_then(|ending| ending.to_str());
    ending.unwrap_or_default()
}

/// A whole file, if it is not too large.
pub fn content(path: &Path) -> Result<Vec<u8>> {
    let place = || format!("cannot read {}", path.display());
    let length = path.metadata().with_context(place)?.len();
    if length > MAX_FILE_BYTES {
        bail!(
            "{}: {length} bytes; at most {MAX_FILE_BYTES} are read",
            path.display()
        );
    }
    std::fs::read(path).with_context(place)
}

/// The arrays of an `.npz` or `.safetensors` file.
pub fn read(path: &Path) -> Result<Weights> {
    match ending(path) {
        "safetensors" => tensors::read(&content(path)?).with_context(|| path.display().to_string()),
        "npz" => {
            let mut arrays = Weights::new();
            for (name, bytes) in members(path)? {
                let name = name.strip_suffix(".npy").unwrap_or(&name).to_owned();
                let array = ArrayD::<f64>::read_npy(bytes.as_slice()).or_else(|_| {
                    let narrow = ArrayD::<f32>::read_npy(bytes.as_slice());
                    narrow.map(|array| array.mapv(f64::from))
                });
                let array = array.with_context(|| {
                    format!("{}: array {name} holds no numbers", path.display())
                })?;
                arrays.insert(name, array);
            }
            Ok(arrays)
        }
        _ => bail!(
            "{}: weights are read from .npz and .safetensors files",
            path.display()
        ),
    }
}

/// Refuses a file that weights cannot be written to, before anything is opened.
pub fn check_ending(path: &Path, option: &str) -> Result<()> {
    match ending(path) {
        "npz" | "safetensors" | "onnx" => Ok(()),
        _ => bail!(
            "{option}: {}: weights are written to .npz, .safetensors and .onnx files",
            path.display()
        ),
    }
}

/// The content of a file of this ending.
pub fn write(
    path: &Path,
    network: &Network,
    arrays: &[(String, Vec<usize>, Vec<f64>)],
) -> Result<Vec<u8>> {
    let weights = || -> Result<Weights> {
        let array = |(name, shape, values): &(String, Vec<usize>, Vec<f64>)| {
            let array = ArrayD::from_shape_vec(IxDyn(shape), values.clone())?;
            Ok((name.clone(), array))
        };
        arrays.iter().map(array).collect()
    };
    match ending(path) {
        "safetensors" => Ok(tensors::write(&weights()?)?),
        "onnx" => Ok(onnx::write(network, &weights()?)?),
        _ => npz::archive(arrays),
    }
}
