//! From a hospital's rows to what is shared of them: fixed-point images and one-hot labels.

use anyhow::Result;
use ndarray::ArrayView4;
use trefoil_protocol::Tensor;

use crate::data::{Dataset, Preprocess};
use crate::remote::{Part, Upload};

/// Normalised images in fixed point, `[rows, words]`.
pub fn images(
    pixels: ArrayView4<'_, u8>,
    preprocess: &Preprocess,
    frac_bits: u8,
) -> Result<Tensor> {
    let tensor = preprocess.to_fixed(pixels, u32::from(frac_bits))?;
    let rows = pixels.shape()[0];
    let words = pixels.shape()[1..].iter().product();
    Ok(tensor.reshaped(&[rows, words]))
}

/// One-hot labels, `[rows, classes]`.
pub fn labels(data: &Dataset) -> Tensor {
    Tensor::new(vec![data.len(), data.classes], data.one_hot())
}

/// All rows of `data` as one upload.
pub fn upload(
    dataset: &str,
    part: Part,
    data: &Dataset,
    preprocess: &Preprocess,
    frac_bits: u8,
) -> Result<Upload> {
    Ok(Upload {
        dataset: dataset.into(),
        part,
        images: images(data.images.view(), preprocess, frac_bits)?,
        labels: (part != Part::Predict).then(|| labels(data)),
        shape: data.shape().to_vec(),
    })
}
