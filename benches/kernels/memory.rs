//! What the kernels work on.

use std::cell::RefCell;

use fastkv::{
    abi::Rows,
    kernels::{Device, Error},
};
use half::bf16;

use crate::random::Random;

/// Device memory for the length of a run.
pub(crate) struct Memory<'a, D: Device> {
    device: &'a D,
    blocks: RefCell<Vec<u64>>,
}

impl<'a, D: Device> Memory<'a, D> {
    pub(crate) fn new(device: &'a D) -> Self {
        Self { device, blocks: RefCell::default() }
    }

    pub(crate) fn filled(&self, bytes: usize, value: u8) -> Result<u64, Error> {
        let address = self.reserve(bytes)?;
        // SAFETY: a block of that size, just reserved.
        unsafe { self.device.fill(address, value, bytes) }?;
        Ok(address)
    }

    pub(crate) fn put<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<u64, Error> {
        self.repeated(values, values.len())
    }

    /// Normal numbers in bf16, as activations are spread: the chip draws the power that real numbers take.
    pub(crate) fn normal(&self, elements: usize, seed: u64) -> Result<u64, Error> {
        let mut random = Random(seed);
        self.drawn(elements, || bf16::from_f32(random.normal()))
    }

    /// Normal numbers in f32.
    pub(crate) fn normal_f32(&self, elements: usize, seed: u64) -> Result<u64, Error> {
        let mut random = Random(seed);
        self.drawn(elements, || random.normal())
    }

    /// f32 in [0, 1), as scores are positive.
    pub(crate) fn uniform(&self, elements: usize) -> Result<u64, Error> {
        let mut random = Random(4);
        self.drawn(elements, || random.unit())
    }

    /// bf16 `[tokens, heads, width]` of normal numbers.
    pub(crate) fn token_major(&self, [tokens, heads, width]: [u32; 3], seed: u64) -> Result<Rows, Error> {
        let elements = tokens as usize * (heads * width) as usize;
        Ok(Rows::token_major(self.normal(elements, seed)?, tokens, heads, width))
    }

    /// A block of numbers, again and again: the chip does not notice.
    fn drawn<T: bytemuck::NoUninit>(
        &self,
        elements: usize,
        mut draw: impl FnMut() -> T,
    ) -> Result<u64, Error> {
        let block: Vec<T> = (0..elements.min(1 << 20)).map(|_| draw()).collect();
        self.repeated(&block, elements)
    }

    fn repeated<T: bytemuck::NoUninit>(&self, block: &[T], elements: usize) -> Result<u64, Error> {
        let address = self.reserve(elements * size_of::<T>())?;
        for first in (0..elements).step_by(block.len().max(1)) {
            let bytes = bytemuck::cast_slice(&block[..block.len().min(elements - first)]);
            // SAFETY: within the block just reserved.
            unsafe { self.device.upload(address + (first * size_of::<T>()) as u64, bytes) }?;
        }
        Ok(address)
    }

    fn reserve(&self, bytes: usize) -> Result<u64, Error> {
        let address = self.device.alloc(bytes)?;
        self.blocks.borrow_mut().push(address);
        Ok(address)
    }
}

impl<D: Device> Drop for Memory<'_, D> {
    fn drop(&mut self) {
        for address in self.blocks.borrow_mut().drain(..) {
            // SAFETY: from `alloc`, once. A device that fails here has failed before.
            let _ = unsafe { self.device.free(address) };
        }
    }
}
