//! `trefoil convert-model`: an ONNX model as a network file and weights, on this machine alone. It shows
//! what `import-model` would understand, and makes the files for `plan`, `check-ranges` and `train`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use trefoil_exchange::onnx::{self, Understood};

use super::train::check_new;
use super::{weights, write_new};

/// Arguments of `trefoil convert-model`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// The ONNX model.
    #[arg(value_name = "MODEL.ONNX")]
    model: PathBuf,
    /// Write the network file here; without it, it is printed.
    #[arg(long, value_name = "FILE.TOML")]
    network: Option<PathBuf>,
    /// Write the weights here: .npz, .safetensors, or .onnx with the network as it was understood.
    #[arg(long, value_name = "FILE")]
    weights: Option<PathBuf>,
    /// Channels, height and width of the images, where the model leaves them open.
    #[arg(long, value_name = "C,H,W", value_parser = parse_input)]
    input: Option<Input>,
}

/// Channels, height, width.
#[derive(Clone, Copy, Debug)]
pub struct Input(pub [usize; 3]);

/// From `3,224,224`.
pub fn parse_input(text: &str) -> Result<Input, String> {
    let numbers: Result<Vec<usize>, _> = text.split(',').map(|part| part.trim().parse()).collect();
    match numbers.as_deref() {
        Ok(&[c, h, w]) if c * h * w > 0 => Ok(Input([c, h, w])),
        _ => Err("channels, height and width, such as 3,224,224".into()),
    }
}

/// Reads an ONNX model and says on stderr what its owner should know.
pub fn understand(path: &Path, input: Option<Input>) -> Result<Understood> {
    let place = || path.display().to_string();
    let beside = |name: &str| weights::beside(path, name).map_err(|e| format!("{e:#}"));
    let input = input.map(|Input(shape)| shape);
    let model = onnx::read_with(&weights::content(path)?, &beside, input).with_context(place)?;
    for note in &model.notes {
        eprintln!("{}: {note}", path.display());
    }
    Ok(model)
}

/// Writes what an ONNX model is here.
pub fn convert_model(args: &ConvertArgs) -> Result<()> {
    check_new(args.network.as_deref(), "--network")?;
    check_new(args.weights.as_deref(), "--weights")?;
    if let Some(path) = &args.weights {
        weights::check_ending(path, "--weights")?;
    }
    let model = understand(&args.model, args.input)?;
    let text = model.network.to_toml();
    match &args.network {
        Some(path) => write_new(path, text.as_bytes(), false)?,
        None => print!("{text}"),
    }
    if let Some(path) = &args.weights {
        let arrays: Vec<_> = model
            .weights
            .iter()
            .map(|(name, array)| {
                (
                    name.clone(),
                    array.shape().to_vec(),
                    array.iter().copied().collect(),
                )
            })
            .collect();
        write_new(path, &weights::write(path, &model.network, &arrays)?, true)?;
    }
    let values: usize = model.weights.values().map(|array| array.len()).sum();
    eprintln!(
        "{}: {} layers, {values} weights, images of {:?}, {} classes",
        args.model.display(),
        model.network.layers.len(),
        model.network.input,
        model.network.classes
    );
    Ok(())
}
