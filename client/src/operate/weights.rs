//! Files of weights, by their ending: `.npz`, `.safetensors`, and out `.onnx`.

use std::fs::File;
use std::io::Read;
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

/// A whole file, if it is not too large, whatever length its folder says it has.
pub fn content(path: &Path) -> Result<Vec<u8>> {
    let place = || format!("cannot read {}", path.display());
    let file = File::open(path).with_context(place)?;
    let mut read = Vec::new();
    file.take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut read)
        .with_context(place)?;
    if read.len() as u64 > MAX_FILE_BYTES {
        bail!(
            "{}: more than {MAX_FILE_BYTES} bytes; at most so many are read",
            path.display()
        );
    }
    Ok(read)
}

/// A file that a model names and that lies beside it: not a link, which could lead anywhere, nor a device
/// or a pipe.
pub fn beside(model: &Path, name: &str) -> Result<Vec<u8>> {
    let path = model.with_file_name(name);
    let place = || format!("cannot read {}", path.display());
    if !path.symlink_metadata().with_context(place)?.is_file() {
        bail!(
            "{}: a link, or no file; the file itself beside the model is possible",
            path.display()
        );
    }
    content(&path)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(unix)]
    fn what_lies_beside_a_model_is_a_file_and_leads_nowhere() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("model");
        std::fs::create_dir_all(folder.join("folder")).unwrap();
        std::fs::write(folder.join("w.data"), [1, 2]).unwrap();
        std::fs::write(home.path().join("secret"), [3]).unwrap();
        let model = folder.join("model.onnx");
        for (name, to) in [
            ("out", "../secret"),
            ("in", "w.data"),
            ("zeros", "/dev/zero"),
        ] {
            std::os::unix::fs::symlink(to, folder.join(name)).unwrap();
        }
        assert_eq!(beside(&model, "w.data").unwrap(), [1, 2]);
        for name in ["out", "in", "zeros", "folder"] {
            let said = format!("{:#}", beside(&model, name).unwrap_err());
            assert!(said.contains("a link, or no file"), "{said}");
        }
        let said = format!("{:#}", beside(&model, "nothing").unwrap_err());
        assert!(said.contains("cannot read"), "{said}");
        // A model itself may be behind a link, whose length says nothing.
        let said = content(&folder.join("zeros")).unwrap_err().to_string();
        assert!(said.contains("more than 536870912 bytes"), "{said}");
    }
}
