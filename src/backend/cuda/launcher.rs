//! [`Device`] on the CUDA driver.

use std::{
    cell::Cell,
    collections::HashMap,
    ffi::{CString, c_uint, c_void},
    mem::MaybeUninit,
    ptr,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use cudarc::driver::{result, sys};

use super::{
    cublaslt::{self, CublasLt},
    probe::{self, Unavailable},
};
use crate::{
    abi,
    kernels::{Device, Error, Graph, Kernel, Launch, Launcher, Matmul, MatrixProduct, TensorMap, images},
};

/// One stream of one GPU, with every kernel loaded.
///
/// It works in the device's primary context, the one that PyTorch, candle and the CUDA runtime use: their
/// device addresses and streams are valid here. The calling thread's current context is left as found. In a context
/// of another kind, bring a [`Launcher`] instead.
///
/// Make one for each device, and clones of it [`on_stream`](Self::on_stream)s: kernels are loaded once, and all clones
/// may launch from any thread. Its [`Device::alloc`] takes memory from the device's default pool, which from then on
/// keeps what is freed; launches leave the pool alone.
///
/// Streams and events are CUDA's: what another stream has to wait for is an event that the caller records on
/// [`stream`](Self::stream). A stream that the caller captures takes launches into its graph.
#[derive(Clone, Debug)]
pub struct CudaLauncher {
    loaded: Arc<Loaded>,
    stream: sys::CUstream,
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
        let built_by = images::nvcc_version().ok_or(Unavailable::NoKernels)?;
        let driver = probe::devices()?;
        let info = driver.device(ordinal, built_by)?;

        let mut device = 0;
        // SAFETY: `device` outlives the call; the driver is initialised, as the probe found.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut device, ordinal as i32) })?;
        let mut context = ptr::null_mut();
        // SAFETY: a device that exists; `Loaded` releases what is retained here.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) })?;
        let mut loaded = Loaded {
            device,
            context,
            stream: ptr::null_mut(),
            pool: OnceLock::new(),
            modules: Vec::new(),
            functions: Vec::new(),
            products: OnceLock::new(),
            tensor_maps: Mutex::default(),
            compute_capability: info.compute_capability,
            multiprocessors: info.multiprocessors,
            reads_host_memory: false,
        };
        loaded.load()?;
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
    fn target(&self) -> sys::CUstream {
        match CAPTURE.get() {
            Some((stream, side)) if stream == self.stream => side,
            _ => self.stream,
        }
    }

    /// Calls the driver with the device's context current.
    fn call(&self, operation: &'static str, f: impl FnOnce() -> sys::CUresult) -> Result<(), Error> {
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
        if self.loaded.idle_memory()? >= bytes as u64 {
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
        let _current = self.loaded.enter()?;
        // On a stream of its own, so that what other threads queue meanwhile is not captured too.
        let mut stream = ptr::null_mut();
        let non_blocking = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `stream` outlives the call.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut stream, non_blocking) })?;
        let _side = Side { stream, before: CAPTURE.replace(Some((self.stream, stream))) };
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream that nobody else knows.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(stream, mode) })?;
        let queued = work();
        let mut graph = ptr::null_mut();
        // SAFETY: the capture that was begun above; `graph` outlives the call.
        let ended = check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(stream, &mut graph) });
        let graph = Captured(graph);
        queued?;
        ended?;
        let mut executable = ptr::null_mut();
        // SAFETY: a graph that was just captured; `executable` outlives the call.
        check("cuGraphInstantiate", unsafe {
            sys::cuGraphInstantiateWithFlags(&mut executable, graph.0, 0)
        })?;
        Ok(Some(Box::new(CudaGraph { executable, launcher: self.clone() })))
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

/// The stream of a launcher, and the one that takes what this thread would queue on it.
type Capturing = Option<(sys::CUstream, sys::CUstream)>;

thread_local! {
    static CAPTURE: Cell<Capturing> = const { Cell::new(None) };
}

/// A stream to capture on, for as long as this lives.
struct Side {
    stream: sys::CUstream,
    before: Capturing,
}

impl Drop for Side {
    fn drop(&mut self) {
        CAPTURE.set(self.before);
        // SAFETY: ours; nothing was queued on it.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.stream) };
    }
}

/// A graph, or null where the capture failed.
struct Captured(sys::CUgraph);

impl Drop for Captured {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: ours; an executable made of it does not need it.
            let _ = unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}

/// A graph that was captured.
#[derive(Debug)]
struct CudaGraph {
    executable: sys::CUgraphExec,
    launcher: CudaLauncher,
}

impl Graph for CudaGraph {
    unsafe fn launch(&self) -> Result<(), Error> {
        let stream = self.launcher.target();
        // SAFETY: both handles are alive, and the caller vouches for the addresses.
        self.launcher.call("cuGraphLaunch", || unsafe { sys::cuGraphLaunch(self.executable, stream) })
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        if let Ok(_current) = self.launcher.loaded.enter() {
            // SAFETY: nobody else has the handle; the driver lets launches that are under way finish.
            let _ = unsafe { sys::cuGraphExecDestroy(self.executable) };
        }
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

/// Tensor maps that are remembered: those of the layers and chunks of some prompts. A map is 128 bytes.
const TENSOR_MAPS: usize = 4096;

/// A `CUtensorMap`, aligned as the driver wants it.
#[repr(C, align(128))]
struct CuTensorMap([u64; 16]);

#[derive(Debug)]
struct Loaded {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// The device's own, where all memory comes from. Looked up when first asked for: whoever brings memory of its own
    /// finds the pool as it was.
    pool: OnceLock<sys::CUmemoryPool>,
    modules: Vec<sys::CUmodule>,
    /// By `Kernel as usize`; none where the image has no code for this chip.
    functions: Vec<Option<Function>>,
    /// Loaded when first asked for: kernels do without.
    products: OnceLock<Result<CublasLt, Error>>,
    /// A map is a function of what it describes, whatever lies at the address.
    tensor_maps: Mutex<HashMap<TensorMap, abi::TensorMap>>,
    compute_capability: (u32, u32),
    multiprocessors: u32,
    /// Through the host's own page tables, so that the driver need not stage what it copies.
    reads_host_memory: bool,
}

#[derive(Clone, Copy, Debug)]
struct Function(sys::CUfunction);

// SAFETY: driver handles, usable from any thread with the context current; written only before sharing.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Loaded {
    /// Fills in the stream, the modules and the functions. What it leaves half done, `drop` undoes.
    fn load(&mut self) -> Result<(), Unavailable> {
        let context = self.context;
        let _current = Current::enter(context)?;
        let non_blocking = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `stream` outlives the call.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut self.stream, non_blocking) })?;
        self.functions = vec![None; Kernel::ALL.len()];
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as SHARED_BYTES,
            CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES as HOST_PAGES,
        };
        let shared_bytes = self.attribute(SHARED_BYTES)?;
        self.reads_host_memory = self.attribute(HOST_PAGES)? != 0;
        for image in images::images() {
            let mut module = ptr::null_mut();
            // SAFETY: a complete fatbin, in static memory.
            let loading = unsafe { sys::cuModuleLoadData(&mut module, image.fatbin.as_ptr().cast()) };
            match check("cuModuleLoadData", loading) {
                Ok(()) => self.modules.push(module),
                // A Hopper image on another chip: the portable kernels do its work.
                Err(Failure { code: 209, .. }) if image.name.starts_with("sm90_") => continue,
                Err(Failure { code: 209, .. }) => {
                    return Err(Unavailable::NoImage { compute_capability: self.compute_capability });
                }
                Err(failure) => return Err(failure.into()),
            }
            for kernel in Kernel::ALL.iter().filter(|kernel| kernel.image() == image.name) {
                let name = CString::new(kernel.entry()).expect("the names of kernels hold no zero");
                let mut function = ptr::null_mut();
                // SAFETY: a module just loaded and a C string; both outlive the call.
                let found = unsafe { sys::cuModuleGetFunction(&mut function, module, name.as_ptr()) };
                check("cuModuleGetFunction", found)?;
                allow_all_shared_memory(function, shared_bytes)?;
                self.functions[*kernel as usize] = Some(Function(function));
            }
        }
        Ok(())
    }

    /// Freed memory stays in the pool from now on: to give it back at every wait and map it anew costs far more
    /// than it frees.
    fn pool(&self) -> Result<sys::CUmemoryPool, Error> {
        if let Some(pool) = self.pool.get() {
            return Ok(*pool);
        }
        let _current = self.enter()?;
        let mut pool = ptr::null_mut();
        // SAFETY: `pool` outlives the call.
        check("cuDeviceGetDefaultMemPool", unsafe {
            sys::cuDeviceGetDefaultMemPool(&mut pool, self.device)
        })?;
        let mut threshold = u64::MAX;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: a pool that lives as long as the device, and a value of the attribute's type.
        check("cuMemPoolSetAttribute", unsafe {
            sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast())
        })?;
        Ok(*self.pool.get_or_init(|| pool))
    }

    /// Bytes that the pool keeps and nobody uses.
    fn idle_memory(&self) -> Result<u64, Error> {
        use sys::CUmemPool_attribute::{
            CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT as RESERVED, CU_MEMPOOL_ATTR_USED_MEM_CURRENT as USED,
        };
        let pool = self.pool()?;
        let _current = self.enter()?;
        let bytes = |attribute| {
            let mut value = 0_u64;
            // SAFETY: a pool that lives as long as the device, and a place of the attribute's type.
            let asked = unsafe { sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut value).cast()) };
            check("cuMemPoolGetAttribute", asked).map(|()| value)
        };
        Ok(bytes(RESERVED)?.saturating_sub(bytes(USED)?))
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<i32, Failure> {
        let mut value = 0;
        // SAFETY: `value` outlives the call.
        check("cuDeviceGetAttribute", unsafe {
            sys::cuDeviceGetAttribute(&mut value, attribute, self.device)
        })?;
        Ok(value)
    }

    fn products(&self) -> Result<&CublasLt, Error> {
        let _current = self.enter()?;
        self.products.get_or_init(CublasLt::load).as_ref().map_err(Clone::clone)
    }

    fn enter(&self) -> Result<Current, Error> {
        Current::enter(self.context).map_err(Failure::into)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // Failures leave nothing to do: the process is ending, or the context is lost already.
        if let Ok(_current) = Current::enter(self.context) {
            self.products.take();
            for module in &self.modules {
                // SAFETY: nothing can launch from it any more.
                let _ = unsafe { sys::cuModuleUnload(*module) };
            }
            if !self.stream.is_null() {
                // SAFETY: ours; the driver lets queued work finish first.
                let _ = unsafe { sys::cuStreamDestroy_v2(self.stream) };
            }
        }
        // SAFETY: retained once, in `CudaLauncher::new`.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// Keeps a context current on this thread, and puts back what was.
struct Current {
    pushed: bool,
}

impl Current {
    fn enter(context: sys::CUcontext) -> Result<Self, Failure> {
        let mut current = ptr::null_mut();
        // SAFETY: `current` outlives the call.
        check("cuCtxGetCurrent", unsafe { sys::cuCtxGetCurrent(&mut current) })?;
        if current == context {
            return Ok(Self { pushed: false });
        }
        // SAFETY: a context that `Loaded` retains.
        check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(context) })?;
        Ok(Self { pushed: true })
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        if self.pushed {
            let mut popped = ptr::null_mut();
            // SAFETY: undoes the push on this same thread: the guard is neither cloned nor sent.
            let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut popped) };
        }
    }
}

/// A driver function that failed, before it becomes one of the two public errors.
struct Failure {
    operation: &'static str,
    code: u32,
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::Driver { operation: failure.operation, code: failure.code }
    }
}

impl From<Failure> for Unavailable {
    fn from(failure: Failure) -> Self {
        Self::Failed { operation: failure.operation, code: failure.code }
    }
}

fn check(operation: &'static str, result: sys::CUresult) -> Result<(), Failure> {
    match result as u32 {
        0 => Ok(()),
        code => Err(Failure { operation, code }),
    }
}

/// Lets a kernel have dynamic shared memory up to what a block can have on this chip. Without asking, static
/// and dynamic together stop at 48 KiB. How much a launch gets is still its own choice.
fn allow_all_shared_memory(function: sys::CUfunction, of_block: i32) -> Result<(), Failure> {
    use sys::CUfunction_attribute::{
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as DYNAMIC,
        CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES as STATIC,
    };
    let mut fixed = 0;
    // SAFETY: a function of a loaded module, and a place that outlives the call.
    check("cuFuncGetAttribute", unsafe { sys::cuFuncGetAttribute(&mut fixed, STATIC, function) })?;
    // SAFETY: a function of a loaded module.
    check("cuFuncSetAttribute", unsafe { sys::cuFuncSetAttribute(function, DYNAMIC, of_block - fixed) })
}

fn cluster_attribute([x, y, z]: [u32; 3]) -> sys::CUlaunchAttribute {
    // SAFETY: plain integers and a union of such: all zeros is a value of it.
    let mut attribute: sys::CUlaunchAttribute = unsafe { MaybeUninit::zeroed().assume_init() };
    attribute.id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z };
    attribute
}
