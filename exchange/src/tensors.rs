//! Weights as safetensors: arrays by name in one file, which cannot hold code. Read: floats of 16, 32
//! and 64 bits; written: 32 bits.

use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::{ExchangeError, Weights};

fn elements<const N: usize>(bytes: &[u8], value: fn([u8; N]) -> f64) -> Vec<f64> {
    let (chunks, _) = bytes.as_chunks::<N>();
    chunks.iter().map(|chunk| value(*chunk)).collect()
}

/// The arrays of a file.
pub fn read(file: &[u8]) -> Result<Weights, ExchangeError> {
    let mut weights = Weights::new();
    for (name, view) in SafeTensors::deserialize(file)?.tensors() {
        let bytes = view.data();
        let values = match view.dtype() {
            Dtype::F64 => elements(bytes, f64::from_le_bytes),
            Dtype::F32 => elements(bytes, |b| f32::from_le_bytes(b).into()),
            Dtype::F16 => elements(bytes, |b| f16::from_le_bytes(b).to_f64()),
            Dtype::BF16 => elements(bytes, |b| bf16::from_le_bytes(b).to_f64()),
            other => {
                return Err(ExchangeError::Tensor {
                    name,
                    problem: format!(
                        "elements of type {other:?}; F16, BF16, F32, F64 are possible"
                    ),
                });
            }
        };
        let array = ArrayD::from_shape_vec(IxDyn(view.shape()), values);
        let array = array.map_err(|error| ExchangeError::Tensor {
            name: name.clone(),
            problem: error.to_string(),
        })?;
        weights.insert(name, array);
    }
    Ok(weights)
}

/// A file's content, in the names' order; values become floats of 32 bits.
pub fn write(weights: &Weights) -> Result<Vec<u8>, ExchangeError> {
    let narrow = |array: &ArrayD<f64>| -> Vec<u8> {
        let values = array.iter();
        values
            .flat_map(|value| (*value as f32).to_le_bytes())
            .collect()
    };
    let bytes: Vec<_> = weights
        .iter()
        .map(|(name, array)| (name, array.shape().to_vec(), narrow(array)))
        .collect();
    let mut views = Vec::new();
    for (name, shape, bytes) in &bytes {
        views.push((
            name.as_str(),
            TensorView::new(Dtype::F32, shape.clone(), bytes)?,
        ));
    }
    Ok(safetensors::serialize(views, None)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_is_read_and_a_broken_file_is_an_error() {
        let two = |bytes: &[u8], dtype| {
            let view = TensorView::new(dtype, vec![2], bytes).expect("it fits");
            safetensors::serialize([("a.bias", view)], None).expect("it is written")
        };
        let expected = [0.5, -1.25];
        let bytes =
            |f: fn(f64) -> Vec<u8>| expected.iter().flat_map(|v| f(*v)).collect::<Vec<u8>>();
        let files = [
            two(&bytes(|v| v.to_le_bytes().to_vec()), Dtype::F64),
            two(&bytes(|v| (v as f32).to_le_bytes().to_vec()), Dtype::F32),
            two(
                &bytes(|v| f16::from_f64(v).to_le_bytes().to_vec()),
                Dtype::F16,
            ),
            two(
                &bytes(|v| bf16::from_f64(v).to_le_bytes().to_vec()),
                Dtype::BF16,
            ),
        ];
        for file in &files {
            let read = read(file).expect("it is read");
            assert_eq!(read["a.bias"].iter().copied().collect::<Vec<_>>(), expected);
        }
        assert_eq!(
            read(&write(&read(&files[0]).unwrap()).unwrap()).unwrap(),
            read(&files[1]).unwrap()
        );
        let integers = two(&[0; 16], Dtype::I64);
        let said = read(&integers).unwrap_err().to_string();
        assert!(said.contains("a.bias") && said.contains("I64"), "{said}");
        for length in 0..files[1].len() {
            assert!(read(&files[1][..length]).is_err(), "cut at {length}");
        }
    }
}
