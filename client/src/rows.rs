//! From a hospital's rows to what is shared of them: fixed-point images and one-hot labels.

use std::sync::Arc;

use anyhow::Result;
use ndarray::ArrayView4;
use trefoil_protocol::Tensor;

use crate::data::rows::Rows;
use crate::data::{Dataset, Preprocess};
use crate::remote::{LazyUpload, Part, Upload};

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

/// As [`upload`], of rows that are read when their turn comes.
pub fn lazy_upload(
    dataset: &str,
    part: Part,
    rows: Arc<Rows>,
    preprocess: &Preprocess,
    frac_bits: u8,
) -> Result<LazyUpload> {
    let table = preprocess.fixed_table(u32::from(frac_bits))?;
    let (shape, classes, count) = (rows.shape(), rows.classes(), rows.len());
    let read = move |range| {
        let (images, labels) = rows.read(range).map_err(|err| err.to_string())?;
        let images = images.iter().map(|pixel| table[usize::from(*pixel)]);
        let mut one_hot = vec![0; labels.len() * classes];
        for (row, label) in labels.iter().enumerate() {
            one_hot[row * classes + usize::from(*label)] = 1;
        }
        Ok((images.collect(), one_hot))
    };
    Ok(LazyUpload {
        dataset: dataset.into(),
        part,
        shape,
        classes,
        rows: count,
        read: Arc::new(read),
    })
}
