//! What a driver needs of a device, and what whoever also keeps memory there needs beside.

use super::{DType, Error, Kernel};
use crate::abi;

/// One stream of one device, as a driver sees it: all that it calls. What is queued runs in the order of the calls,
/// after the call has returned; nothing here waits.
///
/// `backend::cuda::CudaLauncher` is one on the primary context of a GPU, and on any stream of it.
/// An engine with another context, or with bindings that are to launch, implements these five methods.
pub trait Launcher {
    /// Queues a kernel: of the module that [`Kernel::image`](Kernel::image) names in
    /// [`images`](super::images::images), the function [`Kernel::entry`](Kernel::entry).
    ///
    /// * Its only parameter is a struct, `launch.params`, which is copied before the call returns.
    /// * Kernels ask for up to what a block can have of dynamic shared memory. So each function is first, once, allowed
    ///   that much: `cuFuncSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)` with the device's
    ///   `CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN` less the function's own
    ///   `CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES`. With the whole of the first it fails where a kernel has static memory.
    /// * A cluster other than `[1, 1, 1]` is `CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION` of `cuLaunchKernelEx`.
    ///
    /// Kernels of images whose names begin with `sm90_` are asked for on compute capability 9.0 alone; on other chips
    /// these images [do not load](super::images).
    ///
    /// # Errors
    /// [`Launch::failed`] where the driver refuses; [`Error::Missing`] where there is no such function.
    ///
    /// # Safety
    /// `launch.params` is the kernel's own struct from [`abi`](crate::abi), and every address in it holds
    /// what the struct's comments say until the kernel is done.
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error>;

    /// Sets every byte of a range to `value`.
    ///
    /// # Safety
    /// `to..to + bytes` is device memory that the caller may write.
    unsafe fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<(), Error>;

    /// Describes a tensor to the copy engine that chips from Hopper on have: what `cuTensorMapEncodeTiled` writes, to a
    /// place aligned to 64 bytes, which [`abi::TensorMap`] itself need not be.
    ///
    /// Its arguments are the five dimensions, the base, sizes, strides and box of `tensor`, and beside these
    /// `CU_TENSOR_MAP_DATA_TYPE_UINT16` for either type, element strides of 1, `CU_TENSOR_MAP_INTERLEAVE_NONE`,
    /// `CU_TENSOR_MAP_SWIZZLE_128B` and `CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE`, which fills with zeros what lies outside.
    /// Promotion in L2 is a matter of speed: `CU_TENSOR_MAP_L2_PROMOTION_L2_256B` here.
    ///
    /// Asked for three times at each launch of Hopper's attention, and nowhere else. A map depends on `tensor` alone, so
    /// whoever wants short launches keeps those that were made.
    ///
    /// # Errors
    /// What the device says of a tensor that it cannot describe, or where it describes none: before compute capability
    /// 9.0, where nobody asks.
    fn tensor_map(&self, tensor: &TensorMap) -> Result<abi::TensorMap, Error>;

    /// Major and minor compute capability: what decides which form of a kernel runs.
    fn compute_capability(&self) -> (u32, u32);

    /// Streaming multiprocessors: what a persistent grid is sized by.
    fn multiprocessors(&self) -> u32;
}

/// A [`Launcher`] that also has memory and can be waited for: what the CUDA backend and tests work on.
/// [`download`](Self::download), [`synchronize`](Self::synchronize) and [`elapsed_ms`](Self::elapsed_ms) wait;
/// [`reserve`](Self::reserve) and [`upload`](Self::upload) may.
///
/// Memory is a plain address: whoever allocates keeps the books. Safe code that calls a driver relies
/// on its caller's promise about those addresses, which is why every method that takes one is unsafe.
pub trait Device: Launcher {
    /// A point in the stream's time.
    type Event;

    /// Reserves `bytes` of device memory, aligned to 256 bytes, contents undefined.
    ///
    /// # Errors
    /// What the device says: where it has no room, what [`is_out_of_memory`](Error::is_out_of_memory), which callers tell
    /// apart.
    fn alloc(&self, bytes: usize) -> Result<u64, Error>;

    /// Bytes that [`alloc`](Self::alloc) could still give; `None` where the device does not say.
    fn free_memory(&self) -> Option<u64> {
        None
    }

    /// Has memory ready, so that blocks of so many bytes in all, which [`alloc`](Self::alloc) gives later, cost little
    /// each. What is in use stays where it is; where there is not so much to spare nothing changes.
    ///
    /// # Errors
    /// What the device says. Blocks can be had as before.
    fn reserve(&self, bytes: usize) -> Result<(), Error> {
        let _ = bytes;
        Ok(())
    }

    /// Gives memory back once the work queued so far is done with it.
    ///
    /// # Safety
    /// `address` came from [`alloc`](Self::alloc) of this device and is not used by anything queued later.
    unsafe fn free(&self, address: u64) -> Result<(), Error>;

    /// Copies host bytes to the device. `from` may be reused when the call returns.
    ///
    /// # Safety
    /// `to..to + from.len()` is device memory that the caller may write.
    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), Error>;

    /// Waits for the work queued so far and copies device bytes to the host.
    ///
    /// # Safety
    /// `from..from + to.len()` is initialised device memory.
    unsafe fn download(&self, to: &mut [u8], from: u64) -> Result<(), Error>;

    /// Copies within the device; the ranges do not overlap.
    ///
    /// # Safety
    /// Both ranges are device memory, and the caller may write the one at `to`.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error>;

    /// Keeps what `work` queues as one piece, to be queued as often as wanted, instead of queueing it. `work` calls
    /// [`launch`](Launcher::launch), [`copy`](Self::copy), [`fill`](Launcher::fill) and matrix products, and nothing
    /// else of this device. `None` from a device that keeps no such pieces: then `work` was not called.
    ///
    /// # Errors
    /// Those of `work`, and what the device says where it fails; nothing is queued or kept then.
    ///
    /// # Safety
    /// As for what `work` calls, whenever the piece is queued.
    unsafe fn capture(
        &self,
        work: &mut dyn FnMut() -> Result<(), Error>,
    ) -> Result<Option<Box<dyn Graph>>, Error> {
        let _ = work;
        Ok(None)
    }

    /// Waits for the work queued so far.
    ///
    /// # Errors
    /// The failure of any earlier work on the device.
    fn synchronize(&self) -> Result<(), Error>;

    /// Marks the present end of the queue.
    ///
    /// # Errors
    /// What the device says where it fails.
    fn record(&self) -> Result<Self::Event, Error>;

    /// Milliseconds of device time between two events; waits for the later one.
    ///
    /// # Errors
    /// What the device says where it fails.
    fn elapsed_ms(&self, from: &Self::Event, to: &Self::Event) -> Result<f32, Error>;
}

/// Work that a device [captured](Device::capture).
pub trait Graph: std::fmt::Debug {
    /// Queues all of it on the stream that it was captured from.
    ///
    /// # Errors
    /// What the device says.
    ///
    /// # Safety
    /// Every address in it holds what it held, or was to hold, when it was captured.
    unsafe fn launch(&self) -> Result<(), Error>;
}

/// A tensor of 16-bit elements in five dimensions, innermost first, and the box of it that one copy moves to
/// shared memory: rows of 128 bytes, with a swizzle of 128 bytes. What lies outside the tensor reads as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TensorMap {
    /// Device address, a multiple of 16.
    pub base: u64,
    /// Elements along each dimension, at least 1.
    pub sizes: [u64; 5],
    /// Bytes from one to the next along each dimension but the innermost, multiples of 16 below 2^40.
    pub strides: [u64; 4],
    /// Elements of the box along each dimension: 64, then 1 to 256.
    pub box_sizes: [u32; 5],
    /// F16 or BF16, which move alike.
    pub dtype: DType,
}

/// A kernel and how to start it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch<'a> {
    /// Which kernel.
    pub kernel: Kernel,
    /// Blocks along x, y, z; none is 0.
    pub grid: [u32; 3],
    /// Blocks of a cluster along x, y, z; `[1, 1, 1]` for none.
    pub cluster: [u32; 3],
    /// Threads of a block along x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block in bytes.
    pub shared_bytes: u32,
    /// The bytes of the kernel's parameter struct.
    pub params: &'a [u8],
}

impl Launch<'_> {
    /// The error that says that the driver refused it with a `CUresult`.
    pub fn failed(&self, code: u32) -> Error {
        let Self { kernel, grid, cluster, block, shared_bytes, params } = *self;
        let (kernel, params) = (kernel.entry(), kernel.describe(params));
        Error::Launch { kernel, grid, cluster, block, shared_bytes, params, code }
    }
}
