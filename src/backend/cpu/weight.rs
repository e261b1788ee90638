//! Weights of the CPU backend: the stored bytes, and the widening of them.

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;

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
        let mut weight = Self { stored: stored.clone(), vector: Vec::new() };
        if let [length] = stored.shape()[..] {
            let mut vector = Vec::new();
            weight.widened(0..length, &mut vector).to_vec().clone_into(&mut weight.vector);
        }
        weight
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
        let size = self.stored.dtype().size();
        let bytes = &self.stored.bytes()[elements.start * size..elements.end * size];
        if self.stored.dtype() == Dtype::F32
            && let Ok(floats) = bytemuck::try_cast_slice(bytes)
        {
            return floats;
        }
        scratch.resize(elements.len().max(scratch.len()), 0.0);
        let wide = &mut scratch[..elements.len()];
        match self.stored.dtype() {
            Dtype::Bf16 => simd::widen_bf16(bytes.as_chunks().0, wide),
            Dtype::F16 => match bytemuck::try_cast_slice::<u8, f16>(bytes) {
                Ok(narrow) => narrow.convert_to_f32_slice(wide),
                Err(_) => widen_unaligned(bytes, wide, |pair| f16::from_le_bytes(pair).to_f32()),
            },
            Dtype::F32 => widen_unaligned(bytes, wide, f32::from_le_bytes),
        }
        wide
    }

    fn misfit(&self, operation: &'static str, problem: String) -> BackendError {
        BackendError::Shape { operation, problem: format!("{}: {problem}", self.stored.name()) }
    }
}

fn widen_unaligned<const N: usize>(bytes: &[u8], wide: &mut [f32], widen: impl Fn([u8; N]) -> f32) {
    for (wide, narrow) in wide.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *wide = widen(*narrow);
    }
}
