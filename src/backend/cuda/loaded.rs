//! What is opened once for a device, and closed with the last that uses it: context, stream, kernels, memory pool.

use std::{
    collections::HashMap,
    ffi::CString,
    ptr,
    sync::{Mutex, OnceLock},
};

use cudarc::driver::sys;

use super::{
    cublaslt::CublasLt,
    probe::{self, Unavailable},
};
use crate::{
    abi,
    kernels::{Error, Kernel, TensorMap, images},
};

/// A device's primary context, retained, with a stream and every kernel that runs there.
#[derive(Debug)]
pub(super) struct Loaded {
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub(super) stream: sys::CUstream,
    /// The device's current one, where all memory comes from. Looked up when first asked for: whoever brings memory of
    /// its own finds the pool as it was.
    pool: OnceLock<sys::CUmemoryPool>,
    modules: Vec<sys::CUmodule>,
    /// By `Kernel as usize`; none where the image has no code for this chip.
    pub(super) functions: Vec<Option<Function>>,
    /// Loaded when first asked for: kernels do without.
    products: OnceLock<CublasLt>,
    /// A map is a function of what it describes, whatever lies at the address.
    pub(super) tensor_maps: Mutex<HashMap<TensorMap, abi::TensorMap>>,
    pub(super) compute_capability: (u32, u32),
    pub(super) multiprocessors: u32,
    /// Through the host's own page tables, so that the driver need not stage what it copies.
    pub(super) reads_host_memory: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Function(pub(super) sys::CUfunction);

// SAFETY: driver handles, usable from any thread with the context current; written only before sharing.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Loaded {
    /// Opens a device and loads what it runs.
    pub(super) fn open(ordinal: u32) -> Result<Self, Unavailable> {
        let built_by = images::nvcc_version().ok_or(Unavailable::NoKernels)?;
        let driver = probe::devices()?;
        let info = driver.device(ordinal, built_by)?;

        let mut device = 0;
        // SAFETY: `device` outlives the call; the driver is initialised, as the probe found.
        check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut device, ordinal as i32) })?;
        let mut context = ptr::null_mut();
        // SAFETY: a device that exists; `drop` releases what is retained here.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) })?;
        let mut loaded = Self {
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
        loaded.load().map_err(|failure| match failure {
            // Of a chip newer than all machine code here, whose PTX the driver is to compile and is too old for.
            Unavailable::Failed { code: 222, .. } => {
                Unavailable::DriverTooOld { driver: driver.cuda_version, needs: built_by }
            }
            other => other,
        })?;
        Ok(loaded)
    }

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
    pub(super) fn pool(&self) -> Result<sys::CUmemoryPool, Error> {
        if let Some(pool) = self.pool.get() {
            return Ok(*pool);
        }
        let _current = self.enter()?;
        let mut pool = ptr::null_mut();
        // SAFETY: `pool` outlives the call.
        check("cuDeviceGetMemPool", unsafe { sys::cuDeviceGetMemPool(&mut pool, self.device) })?;
        let mut threshold = u64::MAX;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: a pool that lives as long as the device, and a value of the attribute's type.
        check("cuMemPoolSetAttribute", unsafe {
            sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast())
        })?;
        Ok(*self.pool.get_or_init(|| pool))
    }

    /// Bytes that the pool keeps and nobody uses.
    pub(super) fn idle_memory(&self) -> Result<u64, Error> {
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

    pub(super) fn products(&self) -> Result<&CublasLt, Error> {
        if let Some(products) = self.products.get() {
            return Ok(products);
        }
        let _current = self.enter()?;
        let products = CublasLt::load()?;
        // Another thread may have been faster.
        Ok(self.products.get_or_init(|| products))
    }

    pub(super) fn enter(&self) -> Result<Current, Error> {
        Current::enter(self.context).map_err(Failure::into)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // Failures leave nothing to do: the process is ending, or the context is lost already.
        if let Ok(_current) = Current::enter(self.context) {
            // On streams that others brought, too: code that runs must not be unloaded.
            // SAFETY: waits in a context that is current.
            let _ = unsafe { sys::cuCtxSynchronize() };
            self.products.take();
            for module in &self.modules {
                // SAFETY: nothing runs from it, and nothing can launch from it any more.
                let _ = unsafe { sys::cuModuleUnload(*module) };
            }
            if !self.stream.is_null() {
                // SAFETY: ours, and done.
                let _ = unsafe { sys::cuStreamDestroy_v2(self.stream) };
            }
            // The pool is the device's and stays: what lies idle there goes to whoever wants it.
            if let Some(pool) = self.pool.get() {
                // SAFETY: a pool that lives as long as the device; memory in use stays.
                let _ = unsafe { sys::cuMemPoolTrimTo(*pool, 0) };
            }
        }
        // SAFETY: retained once, in `open`.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// Keeps a context current on this thread, and puts back what was.
pub(super) struct Current {
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
pub(super) struct Failure {
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

pub(super) fn check(operation: &'static str, result: sys::CUresult) -> Result<(), Failure> {
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
