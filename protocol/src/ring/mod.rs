//! Tensors over the ring `Z_2^64`.
//!
//! Elements are `u64` with wrapping arithmetic; a secret of the 48-bit profile uses the low 48
//! bits. The fast loops are in [`kernel`]; this file holds the container only.

pub mod kernel;

use std::fmt;

/// A dense row-major tensor of ring elements. `Debug` shows the shape only.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Vec<u64>,
}

impl Tensor {
    /// A tensor of this shape over `data` in row-major order.
    ///
    /// # Panics
    /// If `data` does not have as many elements as `shape` says: shapes are checked where they
    /// enter (builder, store, wire), so a mismatch here is a defect of the caller.
    pub fn new(shape: Vec<usize>, data: Vec<u64>) -> Tensor {
        assert_eq!(
            elements(&shape),
            data.len(),
            "tensor data does not fit shape {shape:?}"
        );
        Tensor { shape, data }
    }

    /// All zeros.
    pub fn zeros(shape: &[usize]) -> Tensor {
        Tensor {
            shape: shape.to_vec(),
            data: vec![0; elements(shape)],
        }
    }

    /// The lengths of the axes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements in row-major order.
    pub fn data(&self) -> &[u64] {
        &self.data
    }

    /// The elements in row-major order, writable.
    pub fn data_mut(&mut self) -> &mut [u64] {
        &mut self.data
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// The elements, without the shape.
    pub fn into_data(self) -> Vec<u64> {
        self.data
    }

    /// The same elements under another shape of equal size.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn reshaped(mut self, shape: &[usize]) -> Tensor {
        assert_eq!(elements(shape), self.data.len(), "reshape changes the size");
        self.shape = shape.to_vec();
        self
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor{:?}", self.shape)
    }
}

/// Number of elements of a shape.
pub fn elements(shape: &[usize]) -> usize {
    shape.iter().product()
}
