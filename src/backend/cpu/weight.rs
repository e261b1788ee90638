//! Weights of the CPU backend: the stored bytes, and the widening of them.

use std::ops::Range;

use super::simd;
use crate::backend::BackendError;
use crate::model::{Dtype, StoredTensor};

/// A stored tensor; vectors are widened at once.
#[derive(Debug)]
pub struct Weight {
    stored: StoredTensor,
    vector: Vec<f32>,
}

impl Weight {
    pub(super) fn new(stored: &StoredTensor) -> Self {
        let vector = if stored.shape().len() == 1 { stored.to_f32() } else { Vec::new() };
        Self { stored: stored.clone(), vector }
    }

    /// Rows and columns of a matrix.
    pub(super) fn matrix(&self, operation: &'static str) -> Result<(usize, usize), BackendError> {
        match self.stored.shape() {
            [rows, columns] => Ok((*rows, *columns)),
            shape => Err(self.misfit(operation, format!("a matrix is wanted, not {shape:?}"))),
        }
    }

    /// A vector of this length.
    pub(super) fn vector(&self, operation: &'static str, length: usize) -> Result<&[f32], BackendError> {
        if self.vector.len() == length {
            Ok(&self.vector)
        } else {
            let shape = self.stored.shape();
            Err(self.misfit(operation, format!("a vector of {length} is wanted, not {shape:?}")))
        }
    }

    /// The elements of a range in f32; `scratch` holds them unless they are stored so.
    pub(super) fn widened<'a>(&'a self, elements: Range<usize>, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        let tensor = &self.stored;
        if tensor.dtype() == Dtype::F32
            && let Ok(floats) = bytemuck::try_cast_slice::<u8, f32>(tensor.bytes())
        {
            return &floats[elements];
        }
        scratch.resize(elements.len().max(scratch.len()), 0.0);
        let wide = &mut scratch[..elements.len()];
        if tensor.dtype() == Dtype::Bf16 {
            simd::widen_bf16(tensor.bytes()[2 * elements.start..2 * elements.end].as_chunks().0, wide);
        } else {
            tensor.read_f32(elements.start, wide);
        }
        wide
    }

    fn misfit(&self, operation: &'static str, problem: String) -> BackendError {
        BackendError::Shape { operation, problem: format!("{}: {problem}", self.stored.name()) }
    }
}
