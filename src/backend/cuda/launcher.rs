//! [`Device`] on the CUDA driver.

use std::{
    ffi::{c_uint, c_void},
    mem::MaybeUninit,
    ptr,
    sync::{Arc, PoisonError},
};

use cudarc::driver::{result, sys};

use super::{
    cublaslt,
    graph::{self, CudaGraph},
    loaded::{Failure, Loaded, check},
    probe::Unavailable,
};
use crate::{
    abi,
    kernels::{Device, Error, Graph, Launch, Launcher, Matmul, MatrixProduct, TensorMap},
};

/// One stream of one GPU, with every kernel loaded.
///
/// It works in the device's primary context, the one that PyTorch, candle and the CUDA runtime use: their
/// device addresses and streams are valid here. The calling thread's current context is left as found. In a context
/// of another kind, bring a [`Launcher`] instead.
///
/// Make one for each device, and clones of it [`on_stream`](Self::on_stream)s: kernels are loaded once, and all clones
/// may launch from any thread. Its [`Device::alloc`] takes memory from the device's current pool, which from then on
/// keeps what is freed; launches leave the pool alone.
///
/// Streams and events are CUDA's: what another stream has to wait for is an event that the caller records on
/// [`stream`](Self::stream). A stream that the caller captures takes launches into its graph.
#[derive(Clone, Debug)]
pub struct CudaLauncher {
    pub(super) loaded: Arc<Loaded>,
    pub(super) stream: sys::CUstream,
}

// SAFETY: the driver's handles may be used from any thread; every method makes the context current first.
unsafe impl Send for CudaLauncher {}
// SAFETY: as above; the driver serialises calls on a stream.
unsafe impl Sync for CudaLauncher {}

impl CudaLauncher {
    /// Opens a device with a stream of its own and loads the kernels.
    ///
    /// # Errors
    /// [`Unavailable`] says what is missing, and what would help.
    pub fn new(ordinal: u32) -> Result<Self, Unavailable> {
        let loaded = Loaded::open(ordinal)?;
        Ok(Self { stream: loaded.stream, loaded: Arc::new(loaded) })
    }

    /// The same device on a stream of the caller's, a `CUstream` or `cudaStream_t` (null is the default
    /// stream).
    ///
    /// # Safety
    /// `stream` belongs to the primary context of this device and outlives what is returned.
    pub unsafe fn on_stream(&self, stream: *mut c_void) -> Self {
        Self { loaded: Arc::clone(&self.loaded), stream: stream.cast() }
    }

    /// The stream that work is queued on, a `CUstream`.
    pub fn stream(&self) -> *mut c_void {
        self.stream.cast()
    }

    /// Whether the driver knows of this host memory, as it does of pinned memory.
    fn is_known(&self, host: *const c_void) -> Result<bool, Error> {
        let _current = self.loaded.enter()?;
        let mut kind: c_uint = 0;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        // The plural takes ordinary memory, for which the singular fails.
        let (mut attribute, mut answer) = (attribute, (&raw mut kind).cast::<c_void>());
        // SAFETY: one attribute and one place for it, which outlive the call; it reads nothing at the address.
        let asked = unsafe {
            sys::cuPointerGetAttributes(1, &mut attribute, &mut answer, host.addr() as sys::CUdeviceptr)
        };
        Ok(asked == sys::CUresult::CUDA_SUCCESS && kind != 0)
    }

    /// Where work is queued: on the stream, unless this thread captures it.
    pub(super) fn target(&self) -> sys::CUstream {
        graph::target(self.stream)
    }

    /// Calls the driver with the device's context current.
    pub(super) fn call(
        &self,
        operation: &'static str,
        f: impl FnOnce() -> sys::CUresult,
    ) -> Result<(), Error> {
        let _current = self.loaded.enter()?;
        check(operation, f()).map_err(Failure::into)
    }
}

impl Launcher for CudaLauncher {
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        let function = self.loaded.functions[launch.kernel as usize];
        let function = function.ok_or(Error::Missing(launch.kernel.entry()))?;
        let mut attributes = [cluster_attribute(launch.cluster)];
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block[0],
            blockDimY: launch.block[1],
            blockDimZ: launch.block[2],
            sharedMemBytes: launch.shared_bytes,
            hStream: self.target(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: if launch.cluster == [1, 1, 1] { 0 } else { 1 },
        };
        let mut params = [launch.params.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: every kernel takes one parameter, the struct whose bytes these are; the driver copies them
        // before it returns, and reads nothing else of what is borrowed here afterwards.
        let launched = self.call("cuLaunchKernelEx", || unsafe {
            sys::cuLaunchKernelEx(&config, function.0, params.as_mut_ptr(), ptr::null_mut())
        });
        launched.map_err(|error| match error {
            Error::Driver { operation: "cuLaunchKernelEx", code } => launch.failed(code),
            error => error,
        })
    }

    unsafe fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        self.call("cuMemsetD8Async", || unsafe { sys::cuMemsetD8Async(to, value, bytes, self.target()) })
    }

    fn tensor_map(&self, tensor: &TensorMap) -> Result<abi::TensorMap, Error> {
        let mut known = self.loaded.tensor_maps.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(map) = known.get(tensor) {
            return Ok(*map);
        }
        let mut map = CuTensorMap([0; 16]);
        let ones = [1_u32; 5];
        // SAFETY: arrays of as many numbers as there are dimensions, less one for strides, and room for a map.
        self.call("cuTensorMapEncodeTiled", || unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
                tensor.sizes.len() as u32,
                tensor.base as *mut c_void,
                tensor.sizes.as_ptr(),
                tensor.strides.as_ptr(),
                tensor.box_sizes.as_ptr(),
                ones.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        })?;
        let map = abi::TensorMap { words: map.0 };
        if known.len() == TENSOR_MAPS {
            known.clear();
        }
        known.insert(*tensor, map);
        Ok(map)
    }

    fn compute_capability(&self) -> (u32, u32) {
        self.loaded.compute_capability
    }

    fn multiprocessors(&self) -> u32 {
        self.loaded.multiprocessors
    }
}

impl Device for CudaLauncher {
    type Event = CudaEvent;

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        self.loaded.pool()?;
        let mut address = 0;
        // SAFETY: `address` outlives the call. The driver refuses 0 bytes.
        self.call("cuMemAllocAsync", || unsafe {
            sys::cuMemAllocAsync(&mut address, bytes.max(1), self.stream)
        })?;
        Ok(address)
    }

    fn free_memory(&self) -> Option<u64> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both outlive the call.
        self.call("cuMemGetInfo", || unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }).ok()?;
        Some(free as u64 + self.loaded.idle_memory().ok()?)
    }

    fn reserve(&self, bytes: usize) -> Result<(), Error> {
        // To have the rest when it is asked for, where no more than half is missing, is less work than what follows.
        if self.loaded.idle_memory()? >= bytes as u64 / 2 {
            return Ok(());
        }
        let with_libraries = (bytes as u64).saturating_add(OF_LIBRARIES);
        if self.free_memory().is_some_and(|free| free < with_libraries) {
            return Ok(());
        }
        // What lies idle in pieces goes back first, or the pool would end up larger than what is wanted.
        let pool = self.loaded.pool()?;
        self.synchronize()?;
        // SAFETY: a pool that lives as long as the device; memory in use stays.
        self.call("cuMemPoolTrimTo", || unsafe { sys::cuMemPoolTrimTo(pool, 0) })?;
        let address = self.alloc(bytes)?;
        // SAFETY: allocated above, and used by nobody.
        unsafe { self.free(address) }
    }

    unsafe fn free(&self, address: u64) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        self.call("cuMemFreeAsync", || unsafe { sys::cuMemFreeAsync(address, self.stream) })
    }

    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), Error> {
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: `from` is readable for its length, the caller vouches for `to`, and the driver is done with
        // `from` when we return: it stages memory that it has to, and otherwise we wait.
        self.call("cuMemcpyHtoDAsync", || unsafe {
            sys::cuMemcpyHtoDAsync_v2(to, from.as_ptr().cast(), from.len(), self.stream)
        })?;
        let waits = self.loaded.reads_host_memory || self.is_known(from.as_ptr().cast())?;
        if waits { self.synchronize() } else { Ok(()) }
    }

    unsafe fn download(&self, to: &mut [u8], from: u64) -> Result<(), Error> {
        if to.is_empty() {
            return Ok(());
        }
        // SAFETY: `to` is writable for its length until the wait below is over, the caller vouches for `from`.
        self.call("cuMemcpyDtoHAsync", || unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from, to.len(), self.stream)
        })?;
        self.synchronize()
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        self.call("cuMemcpyDtoDAsync", || unsafe {
            sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.target())
        })
    }

    unsafe fn capture(
        &self,
        work: &mut dyn FnMut() -> Result<(), Error>,
    ) -> Result<Option<Box<dyn Graph>>, Error> {
        Ok(Some(Box::new(CudaGraph::capture(self, work)?)))
    }

    fn synchronize(&self) -> Result<(), Error> {
        // SAFETY: the stream is alive: ours, or the caller's by the promise of `on_stream`.
        self.call("cuStreamSynchronize", || unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    fn record(&self) -> Result<CudaEvent, Error> {
        let mut event = ptr::null_mut();
        // SAFETY: `event` outlives the call; flags of 0 keep the time.
        self.call("cuEventCreate", || unsafe { sys::cuEventCreate(&mut event, 0) })?;
        let event = CudaEvent { event, loaded: Arc::clone(&self.loaded) };
        // SAFETY: both handles are alive.
        self.call("cuEventRecord", || unsafe { sys::cuEventRecord(event.event, self.stream) })?;
        Ok(event)
    }

    fn elapsed_ms(&self, from: &CudaEvent, to: &CudaEvent) -> Result<f32, Error> {
        // SAFETY: the event is alive.
        self.call("cuEventSynchronize", || unsafe { sys::cuEventSynchronize(to.event) })?;
        let _current = self.loaded.enter()?;
        // SAFETY: both events are alive and recorded; this picks the symbol that the driver has.
        unsafe { result::event::elapsed(from.event, to.event) }
            .map_err(|error| Error::Driver { operation: "cuEventElapsedTime", code: error.0 as u32 })
    }
}

impl MatrixProduct for CudaLauncher {
    fn matmul_workspace(&self) -> Result<usize, Error> {
        self.loaded.products()?;
        Ok(cublaslt::WORKSPACE)
    }

    unsafe fn matmul(&self, work: &Matmul) -> Result<(), Error> {
        if !work.check()? {
            return Ok(());
        }
        let products = self.loaded.products()?;
        let _current = self.loaded.enter()?;
        // SAFETY: the caller's promise; the context is current and the stream is of it.
        unsafe { products.matmul(work, self.target().cast()) }.map_err(|error| match error {
            Error::Device { operation, reason } => {
                let Matmul { rows, columns, inner, dtype, out_dtype, .. } = work;
                let of = format!("[{rows}, {inner}] x [{columns}, {inner}]^T, {dtype:?} to {out_dtype:?}");
                Error::Device { operation, reason: format!("{reason}; {of}") }
            }
            error => error,
        })
    }
}

/// A point in the time of a stream.
#[derive(Debug)]
pub struct CudaEvent {
    event: sys::CUevent,
    loaded: Arc<Loaded>,
}

// SAFETY: as for `CudaLauncher`.
unsafe impl Send for CudaEvent {}
// SAFETY: as for `CudaLauncher`.
unsafe impl Sync for CudaEvent {}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        if let Ok(_current) = self.loaded.enter() {
            // SAFETY: nobody else has the handle. A failure leaves nothing to do.
            let _ = unsafe { sys::cuEventDestroy_v2(self.event) };
        }
    }
}

/// Bytes that are not had ready: libraries load kernels when they first need them, and graphs take memory too.
const OF_LIBRARIES: u64 = 512 << 20;

/// Tensor maps that are remembered: those of the layers and chunks of some prompts. A map is 128 bytes.
const TENSOR_MAPS: usize = 4096;

/// A `CUtensorMap`, aligned as the driver wants it.
#[repr(C, align(128))]
struct CuTensorMap([u64; 16]);

fn cluster_attribute([x, y, z]: [u32; 3]) -> sys::CUlaunchAttribute {
    // SAFETY: plain integers and a union of such: all zeros is a value of it.
    let mut attribute: sys::CUlaunchAttribute = unsafe { MaybeUninit::zeroed().assume_init() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z };
    attribute
}
