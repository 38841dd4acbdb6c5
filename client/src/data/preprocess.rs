//! From bytes to the numbers a network sees: `(pixel / 255 - mean) / std`, as
//! fixed point for the ring and as floating point for the reference.
//!
//! A byte has 256 values, so the whole of it is one table. Its entries come
//! from a division, a subtraction, a division and one rounding, which IEEE 754
//! defines to the last bit: every platform makes the same table, and all that
//! follows is integers.

use ndarray::ArrayView4;
use serde::{Deserialize, Serialize};
use trefoil_protocol::{Tensor, fixed};

use super::{DataError, Dataset};

/// The mean and standard deviation of pixels, in units of full brightness. They
/// are public and part of the model: images for a prediction go through the
/// same ones.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preprocess {
    /// Subtracted; from 0 to 1.
    pub mean: f64,
    /// Divided by; above 0.
    pub std: f64,
}

impl Preprocess {
    /// MNIST's usual numbers; `data/digits` is part of MNIST.
    pub const DIGITS: Preprocess = Preprocess {
        mean: 0.1307,
        std: 0.3081,
    };
    /// PneumoniaMNIST's, as published with it.
    pub const PNEUMONIA: Preprocess = Preprocess {
        mean: 0.5719,
        std: 0.1684,
    };

    /// Checks the numbers. They are data, so this is not left to the caller.
    pub fn check(&self) -> Result<(), DataError> {
        if !(0.0..=1.0).contains(&self.mean) {
            return Err(DataError::setting(
                "mean of the pixels",
                "0 to 1",
                self.mean,
            ));
        }
        // A standard deviation of numbers between 0 and 1 is at most 1/2; below
        // one step of a pixel it would blow noise up to signal.
        if !(1.0 / 255.0..=1.0).contains(&self.std) {
            let expected = "1/255 to 1";
            return Err(DataError::setting(
                "standard deviation of the pixels",
                expected,
                self.std,
            ));
        }
        Ok(())
    }

    /// Measures the mean and standard deviation of a data set. In a consortium
    /// nobody sees all the images: there these are agreed upon beforehand.
    pub fn measure(data: &Dataset) -> Result<Preprocess, DataError> {
        let (mut sum, mut squares) = (0u64, 0u64);
        for &pixel in &data.images {
            sum += u64::from(pixel);
            squares += u64::from(pixel) * u64::from(pixel);
        }
        Preprocess::of_sums(sum, squares, data.images.len() as u64)
    }

    /// The mean and standard deviation of `count` pixels with this sum and sum of squares.
    pub(super) fn of_sums(sum: u64, squares: u64, count: u64) -> Result<Preprocess, DataError> {
        let count = count as f64;
        // Integers below 2^53 are exact as f64: 2^31 pixels times 255^2 is 2^47.
        let mean = sum as f64 / count / 255.0;
        let variance = squares as f64 / count / (255.0 * 255.0) - mean * mean;
        let measured = Preprocess {
            mean,
            std: variance.max(0.0).sqrt(),
        };
        measured.check()?;
        Ok(measured)
    }

    /// What a pixel of each value becomes.
    pub fn float_table(&self) -> Result<[f64; 256], DataError> {
        self.check()?;
        Ok(std::array::from_fn(|pixel| {
            (pixel as f64 / 255.0 - self.mean) / self.std
        }))
    }

    /// What a pixel of each value becomes, in fixed point.
    pub fn fixed_table(&self, frac_bits: u32) -> Result<[u64; 256], DataError> {
        // Values are below 255 = 2^8 in size: 40 fraction bits keep them far
        // inside the range 2^62 that the protocol's comparisons need.
        if frac_bits > 40 {
            return Err(DataError::setting(
                "fraction bits of the images",
                "at most 40",
                frac_bits,
            ));
        }
        Ok(self
            .float_table()?
            .map(|value| fixed::encode(value, frac_bits)))
    }

    /// Images as ring elements, in the images' own order and shape.
    pub fn to_fixed(&self, images: ArrayView4<u8>, frac_bits: u32) -> Result<Tensor, DataError> {
        let table = self.fixed_table(frac_bits)?;
        let data = images
            .iter()
            .map(|&pixel| table[usize::from(pixel)])
            .collect();
        Ok(Tensor::new(images.shape().to_vec(), data))
    }

    /// Images as floating point, in the images' own order.
    pub fn to_float(&self, images: ArrayView4<u8>) -> Result<Vec<f64>, DataError> {
        let table = self.float_table()?;
        Ok(images
            .iter()
            .map(|&pixel| table[usize::from(pixel)])
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array4;

    use super::*;

    #[test]
    fn the_table_is_the_same_on_every_platform() {
        let table = Preprocess::DIGITS.fixed_table(16).unwrap();
        // (0 - .1307) / .3081 * 65536 = -27801.2..., (1 - .1307) / .3081 * 65536 = 184908.9...
        assert_eq!(table[0] as i64, -27_801);
        assert_eq!(table[255] as i64, 184_909);
        let sum = table
            .iter()
            .fold(0u64, |sum, word| sum.rotate_left(7) ^ word);
        assert_eq!(
            sum, 0xe488_62d2_d017_1db0,
            "a table that differs trains another network"
        );
    }

    #[test]
    fn fixed_point_is_within_half_a_step_of_floating_point() {
        for frac_bits in [0, 8, 16, 20, 40] {
            let set = Preprocess::PNEUMONIA;
            let (fixed, float) = (
                set.fixed_table(frac_bits).unwrap(),
                set.float_table().unwrap(),
            );
            for (word, value) in fixed.iter().zip(float) {
                let step = (1u64 << frac_bits) as f64;
                assert!(((*word as i64) as f64 - value * step).abs() <= 0.5);
            }
        }
    }

    #[test]
    fn images_keep_their_order() {
        let images = Array4::from_shape_vec((2, 1, 1, 2), vec![0u8, 255, 128, 0]).unwrap();
        let set = Preprocess {
            mean: 0.0,
            std: 1.0,
        };
        let tensor = set.to_fixed(images.view(), 8).unwrap();
        assert_eq!(tensor.shape(), [2, 1, 1, 2]);
        assert_eq!(tensor.data(), [0, 256, 129, 0]); // 128/255*256 = 128.5...
        assert_eq!(set.to_float(images.view()).unwrap()[1], 1.0);
    }

    #[test]
    fn numbers_that_make_no_sense_are_refused() {
        for (mean, std) in [
            (f64::NAN, 0.3),
            (-0.1, 0.3),
            (0.1, 0.0),
            (0.1, f64::INFINITY),
            (0.1, -1.0),
        ] {
            Preprocess { mean, std }.fixed_table(16).unwrap_err();
        }
        Preprocess::DIGITS.fixed_table(41).unwrap_err();
    }
}
