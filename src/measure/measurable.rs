//! What a backend needs to be measured: weights that no file holds, a clock, and memory that can be looked at.

use std::time::Instant;

use super::random::Normals;
use crate::backend::cpu::{CpuBackend, Weight};
use crate::backend::{Backend, BackendError};
use crate::model::StoredTensor;

#[cfg(feature = "cuda")]
pub use cuda::Blocks;

/// A backend that makes weights from random numbers, and whose clock and memory can be looked at.
pub trait Measurable: Backend {
    /// Where its random numbers come from.
    type Source;
    /// A moment between operations that were asked for.
    type Mark;

    /// Bytes of an element of a random weight.
    const WEIGHT_ELEMENT_BYTES: usize;

    /// From so many rows of prompts on, marks behind every operation are lost in the noise of its time.
    const MARKED_ROWS: usize;

    /// Random numbers; a seed always gives the same ones.
    fn source(&self, seed: u64) -> Self::Source;

    /// A matrix of normal numbers whose deviation is 1 over the square root of `fan_in`, or a vector of ones.
    ///
    /// # Errors
    /// Where there is no room for it.
    fn random_weight(
        &self,
        source: &mut Self::Source,
        shape: &[usize],
        fan_in: usize,
    ) -> Result<Self::Weight, BackendError>;

    /// Waits until all that was asked for is done.
    ///
    /// # Errors
    /// Where that failed.
    fn finish(&self) -> Result<(), BackendError> {
        Ok(())
    }

    /// Marks the moment when all that was asked for is done.
    ///
    /// # Errors
    /// Where the device fails.
    fn mark(&self) -> Result<Self::Mark, BackendError>;

    /// Seconds from one mark to a later one, by the device's clock. Waits for the later one.
    ///
    /// # Errors
    /// Where the device fails.
    fn seconds(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64, BackendError>;

    /// Begins to look for the most memory in use anew.
    fn forget_memory_peak(&self) {}

    /// The most bytes of the device's memory in use at once since then; `None` where it shares the machine's.
    fn memory_peak(&self) -> Option<usize> {
        None
    }
}

impl Measurable for CpuBackend {
    type Source = Normals;
    type Mark = Instant;

    const WEIGHT_ELEMENT_BYTES: usize = size_of::<f32>();
    const MARKED_ROWS: usize = 0;

    fn source(&self, seed: u64) -> Normals {
        Normals::new(seed)
    }

    fn random_weight(
        &self,
        source: &mut Normals,
        shape: &[usize],
        fan_in: usize,
    ) -> Result<Weight, BackendError> {
        let count = shape.iter().product();
        let numbers: Vec<f32> = match shape {
            [_] => vec![1.0; count],
            _ => source.take(count).map(|number| number / (fan_in as f32).sqrt()).collect(),
        };
        let stored = StoredTensor::from_f32("random", shape, &numbers);
        let out_of_memory = BackendError::OutOfMemory { what: "a weight", bytes: size_of_val(&numbers[..]) };
        self.weight(&stored.map_err(|_| out_of_memory)?)
    }

    fn mark(&self) -> Result<Instant, BackendError> {
        Ok(Instant::now())
    }

    fn seconds(&self, from: &Instant, to: &Instant) -> Result<f64, BackendError> {
        Ok(to.duration_since(*from).as_secs_f64())
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::collections::HashMap;
    use std::collections::hash_map::Entry;
    use std::fmt::Debug;

    use half::{bf16, f16};

    use super::{Measurable, Normals};
    use crate::backend::BackendError;
    use crate::backend::cuda::CudaBackend;
    use crate::backend::cuda::pipeline::Weight;
    use crate::kernels::{DType, Device, MatrixProduct};

    /// Random numbers on the device, by the deviation they have. A weight is cut from them, each from another place
    /// on: making billions of numbers, and sending them, would take minutes.
    #[derive(Debug)]
    pub struct Blocks<D: Device> {
        normal: Vec<f32>,
        by_fan_in: HashMap<usize, Weight<D>>,
        next: usize,
    }

    /// Numbers of a block: no multiple of a row, so that rows differ, and of pieces of 16 bytes.
    const BLOCK: usize = (16 << 20) - 8 * 1237;

    impl<D: MatrixProduct + Debug> CudaBackend<D> {
        fn narrow_bits(&self, numbers: impl Iterator<Item = f32>) -> Vec<u16> {
            match self.dtype() {
                DType::F16 => numbers.map(|number| f16::from_f32(number).to_bits()).collect(),
                _ => numbers.map(|number| bf16::from_f32(number).to_bits()).collect(),
            }
        }

        fn upload(
            &self,
            shape: &[usize],
            numbers: impl Iterator<Item = f32>,
        ) -> Result<Weight<D>, BackendError> {
            let bits = self.narrow_bits(numbers);
            // SAFETY: the address is of so many elements, which the callers count.
            self.weight_with(shape, |device, to| unsafe { device.upload(to, bytemuck::cast_slice(&bits)) })
        }
    }

    impl<D: MatrixProduct + Debug> Measurable for CudaBackend<D> {
        type Source = Blocks<D>;
        type Mark = D::Event;

        const WEIGHT_ELEMENT_BYTES: usize = 2;
        const MARKED_ROWS: usize = 32_768;

        fn source(&self, seed: u64) -> Blocks<D> {
            let normal = Normals::new(seed).take(BLOCK).collect();
            Blocks { normal, by_fan_in: HashMap::new(), next: 0 }
        }

        fn random_weight(
            &self,
            source: &mut Blocks<D>,
            shape: &[usize],
            fan_in: usize,
        ) -> Result<Weight<D>, BackendError> {
            if let [width] = *shape {
                return self.upload(shape, std::iter::repeat_n(1.0, width));
            }
            let Blocks { normal, by_fan_in, next } = source;
            let block = match by_fan_in.entry(fan_in) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(place) => {
                    let scale = 1.0 / (fan_in as f32).sqrt();
                    place.insert(self.upload(&[BLOCK], normal.iter().map(|number| number * scale))?)
                }
            };
            let from = block.address();
            let elements: usize = shape.iter().product();
            self.weight_with(shape, |device, to| {
                let mut done = 0;
                while done < elements {
                    let count = (elements - done).min(BLOCK - *next);
                    // SAFETY: `count` elements of the block from `next` on, to where so many are left.
                    unsafe { device.copy(to + 2 * done as u64, from + 2 * *next as u64, 2 * count) }?;
                    done += count;
                    *next = (*next + count) % BLOCK;
                }
                // Pieces of 16 bytes.
                *next = (*next + 8 * 4099) / 8 * 8 % BLOCK;
                Ok(())
            })
        }

        fn finish(&self) -> Result<(), BackendError> {
            Ok(self.device().synchronize()?)
        }

        fn mark(&self) -> Result<D::Event, BackendError> {
            Ok(self.device().record()?)
        }

        fn seconds(&self, from: &D::Event, to: &D::Event) -> Result<f64, BackendError> {
            Ok(f64::from(self.device().elapsed_ms(from, to)?) / 1e3)
        }

        fn forget_memory_peak(&self) {
            self.forget_peak();
        }

        fn memory_peak(&self) -> Option<usize> {
            Some(self.memory().1)
        }
    }
}
