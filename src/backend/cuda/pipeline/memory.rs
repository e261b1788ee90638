//! Device memory that gives itself back, and the books on it.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::backend::BackendError;
use crate::kernels::{Device, Error};

/// A device, and how much of its memory is in use.
#[derive(Debug)]
pub(super) struct Machine<D> {
    pub(super) device: D,
    live: AtomicUsize,
    peak: AtomicUsize,
}

/// A block of device memory. It goes back once the work queued so far is done with it.
pub(super) struct Block<D: Device> {
    machine: Arc<Machine<D>>,
    address: u64,
    bytes: usize,
}

impl<D: Device> Machine<D> {
    pub(super) fn new(device: D) -> Self {
        Self { device, live: AtomicUsize::new(0), peak: AtomicUsize::new(0) }
    }

    /// A block with undefined contents.
    pub(super) fn block(
        self: &Arc<Self>,
        what: &'static str,
        bytes: usize,
    ) -> Result<Block<D>, BackendError> {
        let address = self.device.alloc(bytes).map_err(|error| match error {
            Error::Driver { code: OUT_OF_MEMORY, .. } => BackendError::OutOfMemory { what, bytes },
            error => error.into(),
        })?;
        let live = self.live.fetch_add(bytes, Relaxed) + bytes;
        self.peak.fetch_max(live, Relaxed);
        Ok(Block { machine: Arc::clone(self), address, bytes })
    }

    /// A block for `count` elements of `width` bytes each.
    pub(super) fn array(
        self: &Arc<Self>,
        what: &'static str,
        count: usize,
        width: usize,
    ) -> Result<Block<D>, BackendError> {
        self.block(what, count.saturating_mul(width))
    }

    /// A block that holds these numbers.
    pub(super) fn upload<T: bytemuck::NoUninit>(
        self: &Arc<Self>,
        what: &'static str,
        values: &[T],
    ) -> Result<Block<D>, BackendError> {
        let block = self.array(what, values.len(), size_of::<T>())?;
        block.write(0, bytemuck::cast_slice(values))?;
        Ok(block)
    }

    /// Bytes in use now, and the most since [`forget_peak`](Self::forget_peak).
    pub(super) fn used(&self) -> (usize, usize) {
        (self.live.load(Relaxed), self.peak.load(Relaxed))
    }

    pub(super) fn forget_peak(&self) {
        self.peak.store(self.live.load(Relaxed), Relaxed);
    }
}

impl<D: Device> Block<D> {
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Copies host bytes to a place in the block.
    pub(super) fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), BackendError> {
        self.check(offset, bytes.len());
        // SAFETY: the range lies in this block, which nothing else writes while it is borrowed.
        Ok(unsafe { self.machine.device.upload(self.address + offset as u64, bytes) }?)
    }

    /// Sets every byte.
    pub(super) fn fill(&self, value: u8) -> Result<(), BackendError> {
        // SAFETY: this block, which nothing else writes while it is borrowed.
        Ok(unsafe { self.machine.device.fill(self.address, value, self.bytes) }?)
    }

    /// Waits, and reads numbers from a place in the block, all of which were written.
    pub(super) fn read<T: bytemuck::AnyBitPattern + bytemuck::NoUninit + Default>(
        &self,
        offset: usize,
        count: usize,
    ) -> Result<Vec<T>, BackendError> {
        self.check(offset, count * size_of::<T>());
        let mut values = vec![T::default(); count];
        let bytes = bytemuck::cast_slice_mut(&mut values);
        // SAFETY: the range lies in this block, and the caller knows it to be written.
        unsafe { self.machine.device.download(bytes, self.address + offset as u64) }?;
        Ok(values)
    }

    /// Copies bytes of another block here.
    pub(super) fn copy(
        &self,
        offset: usize,
        from: &Self,
        from_offset: usize,
        bytes: usize,
    ) -> Result<(), BackendError> {
        self.check(offset, bytes);
        from.check(from_offset, bytes);
        let (to, from) = (self.address + offset as u64, from.address + from_offset as u64);
        // SAFETY: both ranges lie in their blocks, and the blocks are two.
        Ok(unsafe { self.machine.device.copy(to, from, bytes) }?)
    }

    fn check(&self, offset: usize, bytes: usize) {
        assert!(offset.checked_add(bytes).is_some_and(|end| end <= self.bytes), "inside the block");
    }
}

impl<D: Device> Drop for Block<D> {
    fn drop(&mut self) {
        self.machine.live.fetch_sub(self.bytes, Relaxed);
        // SAFETY: from `alloc`, once; handles queue nothing after they are dropped. A device that fails here
        // has failed before.
        let _ = unsafe { self.machine.device.free(self.address) };
    }
}

impl<D: Device> fmt::Debug for Block<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:#x}", self.bytes, self.address)
    }
}

/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: u32 = 2;
