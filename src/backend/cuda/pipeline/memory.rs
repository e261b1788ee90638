//! Device memory that gives itself back, and the books on it.

use std::fmt;
use std::mem;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use crate::backend::BackendError;
use crate::kernels::{Device, Error};

/// A device, and how much of its memory is in use.
pub(super) struct Machine<D: Device> {
    pub(super) device: D,
    live: AtomicUsize,
    peak: AtomicUsize,
    /// Threads that do work which repeats.
    repeating: Mutex<Vec<Repeating<D>>>,
}

/// A thread at work that repeats.
struct Repeating<D: Device> {
    thread: ThreadId,
    /// Where its blocks come from.
    pool: Arc<Pool<D>>,
    /// Blocks that the work shares with others.
    held: Vec<Arc<Block<D>>>,
}

/// A block of device memory. It goes back once the work queued so far is done with it.
pub(super) struct Block<D: Device> {
    machine: Arc<Machine<D>>,
    address: u64,
    bytes: usize,
    pool: Option<Arc<Pool<D>>>,
}

/// Memory of work that repeats: what is given back is kept, so that the same work finds the same blocks.
pub(super) struct Pool<D: Device> {
    machine: Arc<Machine<D>>,
    /// Bytes and addresses.
    spare: Mutex<Vec<(usize, u64)>>,
    /// Whether work is being captured: it has to do with the blocks there are, and without the host's memory.
    pub(super) captures: AtomicBool,
}

impl<D: Device> Machine<D> {
    pub(super) fn new(device: D) -> Self {
        Self { device, live: AtomicUsize::new(0), peak: AtomicUsize::new(0), repeating: Mutex::default() }
    }

    /// A block with undefined contents.
    pub(super) fn block(
        self: &Arc<Self>,
        what: &'static str,
        bytes: usize,
    ) -> Result<Block<D>, BackendError> {
        let pool = self.pool();
        if let Some(pool) = &pool {
            if let Some(address) = pool.take(bytes) {
                return Ok(Block { machine: Arc::clone(self), address, bytes, pool: Some(Arc::clone(pool)) });
            }
            if pool.captures.load(Relaxed) {
                return Err(not_captured(format!("{bytes} bytes for {what}, which it did not need before")));
            }
        }
        let address = self.device.alloc(bytes).map_err(|error| match error {
            error if error.is_out_of_memory() => BackendError::OutOfMemory { what, bytes },
            error => error.into(),
        })?;
        let live = self.live.fetch_add(bytes, Relaxed) + bytes;
        self.peak.fetch_max(live, Relaxed);
        Ok(Block { machine: Arc::clone(self), address, bytes, pool })
    }

    /// Does `work` with the blocks of a pool; also returns what it [holds](Self::hold).
    pub(super) fn with_pool<T>(
        &self,
        pool: &Arc<Pool<D>>,
        work: impl FnOnce() -> T,
    ) -> (T, Vec<Arc<Block<D>>>) {
        /// Even where `work` panics.
        struct Entered<'a, D: Device>(&'a Machine<D>);
        impl<D: Device> Drop for Entered<'_, D> {
            fn drop(&mut self) {
                let this = thread::current().id();
                self.0.repeating().retain(|repeating| repeating.thread != this);
            }
        }
        let _entered = Entered(self);
        let (thread, pool) = (thread::current().id(), Arc::clone(pool));
        self.repeating().push(Repeating { thread, pool, held: Vec::new() });
        let done = work();
        (done, self.of_thread(|repeating| mem::take(&mut repeating.held)).unwrap_or_default())
    }

    /// Keeps a block for as long as the work of this thread can be repeated, where that is what it does.
    pub(super) fn hold(&self, block: &Arc<Block<D>>) {
        self.of_thread(|repeating| repeating.held.push(Arc::clone(block)));
    }

    fn repeating(&self) -> MutexGuard<'_, Vec<Repeating<D>>> {
        self.repeating.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What there is to know of this thread, where it does work that repeats.
    fn of_thread<T>(&self, look: impl FnOnce(&mut Repeating<D>) -> T) -> Option<T> {
        let this = thread::current().id();
        self.repeating().iter_mut().find(|repeating| repeating.thread == this).map(look)
    }

    /// The pool of this thread.
    fn pool(&self) -> Option<Arc<Pool<D>>> {
        self.of_thread(|repeating| Arc::clone(&repeating.pool))
    }

    /// Copies from and to the host take place once, so they are no part of work that repeats.
    fn check_host(&self) -> Result<(), BackendError> {
        match self.pool() {
            Some(pool) if pool.captures.load(Relaxed) => Err(not_captured("memory of the host".to_owned())),
            _ => Ok(()),
        }
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
    pub(super) fn is_of(&self, machine: &Arc<Machine<D>>) -> bool {
        Arc::ptr_eq(&self.machine, machine)
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// Copies host bytes to a place in the block.
    pub(super) fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), BackendError> {
        self.check(offset, bytes.len());
        self.machine.check_host()?;
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
        self.machine.check_host()?;
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

impl<D: Device> Pool<D> {
    pub(super) fn new(machine: &Arc<Machine<D>>) -> Self {
        Self { machine: Arc::clone(machine), spare: Mutex::default(), captures: AtomicBool::new(false) }
    }

    /// A spare block of this size.
    fn take(&self, bytes: usize) -> Option<u64> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let index = spare.iter().rposition(|(size, _)| *size == bytes)?;
        Some(spare.remove(index).1)
    }
}

impl<D: Device> Machine<D> {
    fn free(&self, bytes: usize, address: u64) {
        self.live.fetch_sub(bytes, Relaxed);
        // SAFETY: from `alloc`, once; handles queue nothing after they are dropped. A device that fails here
        // has failed before.
        let _ = unsafe { self.device.free(address) };
    }
}

impl<D: Device> Drop for Block<D> {
    fn drop(&mut self) {
        match &self.pool {
            Some(pool) => {
                let mut spare = pool.spare.lock().unwrap_or_else(PoisonError::into_inner);
                spare.push((self.bytes, self.address));
            }
            None => self.machine.free(self.bytes, self.address),
        }
    }
}

impl<D: Device> Drop for Pool<D> {
    fn drop(&mut self) {
        let spare = self.spare.get_mut().unwrap_or_else(PoisonError::into_inner);
        spare.iter().for_each(|(bytes, address)| self.machine.free(*bytes, *address));
    }
}

impl<D: Device + fmt::Debug> fmt::Debug for Machine<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("device", &self.device)
            .field("live", &self.live)
            .finish_non_exhaustive()
    }
}

impl<D: Device> fmt::Debug for Pool<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("spare", &self.spare).finish_non_exhaustive()
    }
}

impl<D: Device> fmt::Debug for Block<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:#x}", self.bytes, self.address)
    }
}

/// Work asked for what a captured piece cannot have.
fn not_captured(what: String) -> BackendError {
    BackendError::Device(Error::Device {
        operation: "to capture a step",
        reason: format!("it asks for {what}"),
    })
}
