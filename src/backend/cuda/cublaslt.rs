//! Matrix products by cuBLASLt, which is loaded at run time like the driver.
//!
//! cuBLASLt is column-major. Read so, a row-major `[rows, inner]` matrix is its own transpose, and
//! `out = x . weight^T` becomes `out^T = weight . x^T`: the weight first, transposed, then `x` as it lies.

use std::{
    collections::{HashMap, hash_map::Entry},
    env,
    ffi::{CStr, c_int, c_void},
    fs, mem,
    path::PathBuf,
    ptr,
    sync::{Mutex, PoisonError},
};

use libloading::Library;

use crate::{
    abi::Rows,
    kernels::{DType, Error, Matmul},
};

/// Shapes whose choice is remembered: those of a model's weights with many numbers of rows.
const PLANS: usize = 4096;

/// Bytes of scratch memory that let it use every algorithm it knows for Hopper.
pub(super) const WORKSPACE: usize = 32 << 20;

/// A loaded library with a handle for one device, and what it chose for each shape so far.
#[derive(Debug)]
pub(super) struct CublasLt {
    functions: Functions,
    handle: Handle,
    plans: Mutex<HashMap<Shape, Plan>>,
}

// SAFETY: the handle may be used from any thread, and the descriptors of plans only under their lock.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Sync for CublasLt {}

impl CublasLt {
    /// Loads the library. The device's context is current.
    pub(super) fn load() -> Result<Self, Error> {
        let (functions, handle) = open(&NAMES, &folders())?;
        Ok(Self { functions, handle, plans: Mutex::default() })
    }

    /// Queues a product that was checked.
    ///
    /// # Safety
    /// As for [`MatrixProduct::matmul`](crate::kernels::MatrixProduct::matmul); the device's context is
    /// current and `stream` belongs to it.
    pub(super) unsafe fn matmul(&self, work: &Matmul, stream: *mut c_void) -> Result<(), Error> {
        let shape = Shape::of(work);
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if plans.len() == PLANS && !plans.contains_key(&shape) {
            plans.clear();
        }
        let plan = match plans.entry(shape) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(self.plan(work)?),
        };
        if work.bias != 0 {
            set(self.functions.set_product, plan.product.descriptor, BIAS_POINTER, &work.bias)?;
        }
        let (alpha, beta) = (1.0_f32, if work.accumulate { 1.0_f32 } else { 0.0 });
        // SAFETY: descriptors of this plan, scalars in host memory as f32, and device memory as the caller
        // promises.
        let status = unsafe {
            (self.functions.matmul)(
                self.handle,
                plan.product.descriptor,
                (&raw const alpha).cast(),
                work.weight.base,
                plan.weight.descriptor,
                work.x.base,
                plan.x.descriptor,
                (&raw const beta).cast(),
                work.out.base,
                plan.out.descriptor,
                work.out.base,
                plan.out.descriptor,
                &plan.algorithm,
                work.workspace,
                workspace_bytes(work),
                stream,
            )
        };
        check("cublasLtMatmul", status)
    }

    /// Descriptors, and the algorithm that the library's own heuristic puts first.
    fn plan(&self, work: &Matmul) -> Result<Plan, Error> {
        let f = &self.functions;
        let product = Owned::new("cublasLtMatmulDescCreate", f.destroy_product, |place| {
            // SAFETY: the place outlives the call, here and below.
            unsafe { (f.create_product)(place, COMPUTE_F32, number(DType::F32)) }
        })?;
        set(f.set_product, product.descriptor, TRANSPOSE_A, &1_i32)?;
        if work.bias != 0 {
            set(f.set_product, product.descriptor, EPILOGUE, &EPILOGUE_BIAS)?;
            set(f.set_product, product.descriptor, BIAS_POINTER, &work.bias)?;
            set(f.set_product, product.descriptor, BIAS_TYPE, &number(work.out_dtype))?;
        }
        let (rows, columns, inner) = (work.rows, work.columns, work.inner);
        // A matrix of one row may have any stride; the library wants one that holds it, and 16 bytes that are whole.
        let layout = |matrix: &Rows, dtype, [height, width]: [u32; 2]| {
            let stride = if height == 1 { width.next_multiple_of(8).into() } else { matrix.token_stride };
            Owned::new("cublasLtMatrixLayoutCreate", f.destroy_layout, |place| {
                // SAFETY: as above.
                unsafe { (f.create_layout)(place, number(dtype), width.into(), height.into(), stride) }
            })
        };
        let weight = layout(&work.weight, work.dtype, [columns, inner])?;
        let x = layout(&work.x, work.dtype, [rows, inner])?;
        let out = layout(&work.out, work.out_dtype, [rows, columns])?;
        let preference = Owned::new("cublasLtMatmulPreferenceCreate", f.destroy_preference, |place| {
            // SAFETY: as above.
            unsafe { (f.create_preference)(place) }
        })?;
        set(f.set_preference, preference.descriptor, MAX_WORKSPACE, &workspace_bytes(work))?;
        set(f.set_preference, preference.descriptor, REDUCTION_SCHEMES, &REDUCTION_IN_COMPUTE_TYPE)?;
        for operand in MIN_ALIGNMENTS {
            set(f.set_preference, preference.descriptor, operand, &16_u32)?;
        }
        let mut found = 0;
        let mut result = Heuristic::default();
        // SAFETY: descriptors that live, and room for the one result that is asked for.
        let status = unsafe {
            (f.heuristic)(
                self.handle,
                product.descriptor,
                weight.descriptor,
                x.descriptor,
                out.descriptor,
                out.descriptor,
                preference.descriptor,
                1,
                &mut result,
                &mut found,
            )
        };
        check(
            "cublasLtMatmulAlgoGetHeuristic",
            if found == 0 && status == 0 { NOT_SUPPORTED } else { status },
        )?;
        Ok(Plan { product, weight, x, out, algorithm: result.algorithm })
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        self.plans.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        // SAFETY: ours, and nothing uses it any more. A failure leaves nothing to do.
        let _ = unsafe { (self.functions.destroy)(self.handle) };
    }
}

type Handle = *mut c_void;
type Descriptor = *mut c_void;
type Status = c_int;
type SetAttribute = unsafe extern "C" fn(Descriptor, c_int, *const c_void, usize) -> Status;
type Destroy = unsafe extern "C" fn(Descriptor) -> Status;

/// `cublasLtMatmulAlgo_t`.
type Algorithm = [u64; 8];

/// What cublasLt.h declares.
#[derive(Debug)]
struct Functions {
    create: unsafe extern "C" fn(*mut Handle) -> Status,
    destroy: unsafe extern "C" fn(Handle) -> Status,
    create_product: unsafe extern "C" fn(*mut Descriptor, c_int, c_int) -> Status,
    set_product: SetAttribute,
    destroy_product: Destroy,
    create_layout: unsafe extern "C" fn(*mut Descriptor, c_int, u64, u64, i64) -> Status,
    destroy_layout: Destroy,
    create_preference: unsafe extern "C" fn(*mut Descriptor) -> Status,
    set_preference: SetAttribute,
    destroy_preference: Destroy,
    heuristic: unsafe extern "C" fn(
        Handle,
        Descriptor,
        Descriptor,
        Descriptor,
        Descriptor,
        Descriptor,
        Descriptor,
        c_int,
        *mut Heuristic,
        *mut c_int,
    ) -> Status,
    matmul: unsafe extern "C" fn(
        Handle,
        Descriptor,
        *const c_void,
        u64,
        Descriptor,
        u64,
        Descriptor,
        *const c_void,
        u64,
        Descriptor,
        u64,
        Descriptor,
        *const Algorithm,
        u64,
        usize,
        *mut c_void,
    ) -> Status,
}

/// The first library that works of those that the loader finds by name and those in the folders: one that is newer
/// than the driver does not.
fn open(names: &[&str], folders: &[PathBuf]) -> Result<(Functions, Handle), Error> {
    let in_folders = folders.iter().flat_map(|folder| names.iter().map(|name| folder.join(name)));
    let mut first_error = None;
    for place in names.iter().map(PathBuf::from).chain(in_folders) {
        // SAFETY: the vendor's library, whose initialisers may run at any time.
        let Ok(library) = (unsafe { Library::new(place) }) else { continue };
        let opened = Functions::of(&library).and_then(|functions| {
            let mut handle = ptr::null_mut();
            // SAFETY: `handle` outlives the call.
            check("cublasLtCreate", unsafe { (functions.create)(&mut handle) })?;
            Ok((functions, handle))
        });
        // Its threads and its handles go on using it.
        mem::forget(library);
        match opened {
            Ok(opened) => return Ok(opened),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    Err(first_error.unwrap_or_else(|| Error::Library {
        name: names[0].to_owned(),
        folders: folders.iter().map(|folder| folder.display().to_string()).collect(),
    }))
}

impl Functions {
    fn of(library: &Library) -> Result<Self, Error> {
        // SAFETY: the signatures are those of cublasLt.h, unchanged from 11.0 to 13.
        unsafe {
            Ok(Self {
                create: symbol(library, c"cublasLtCreate")?,
                destroy: symbol(library, c"cublasLtDestroy")?,
                create_product: symbol(library, c"cublasLtMatmulDescCreate")?,
                set_product: symbol(library, c"cublasLtMatmulDescSetAttribute")?,
                destroy_product: symbol(library, c"cublasLtMatmulDescDestroy")?,
                create_layout: symbol(library, c"cublasLtMatrixLayoutCreate")?,
                destroy_layout: symbol(library, c"cublasLtMatrixLayoutDestroy")?,
                create_preference: symbol(library, c"cublasLtMatmulPreferenceCreate")?,
                set_preference: symbol(library, c"cublasLtMatmulPreferenceSetAttribute")?,
                destroy_preference: symbol(library, c"cublasLtMatmulPreferenceDestroy")?,
                heuristic: symbol(library, c"cublasLtMatmulAlgoGetHeuristic")?,
                matmul: symbol(library, c"cublasLtMatmul")?,
            })
        }
    }
}

/// A function of the library.
///
/// # Safety
/// `T` is the type that it has.
unsafe fn symbol<T: Copy>(library: &Library, name: &'static CStr) -> Result<T, Error> {
    // SAFETY: the caller's promise; the library stays loaded.
    match unsafe { library.get::<T>(name) } {
        Ok(symbol) => Ok(*symbol),
        Err(error) => Err(Error::Device { operation: "cublasLtCreate", reason: error.to_string() }),
    }
}

/// `cublasLtMatmulHeuristicResult_t`.
#[derive(Default)]
#[repr(C)]
struct Heuristic {
    algorithm: Algorithm,
    workspace: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

/// What a choice of algorithm depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    sizes: [u32; 3],
    strides: [i64; 3],
    dtypes: (DType, DType),
    bias: bool,
    workspace_bytes: usize,
}

impl Shape {
    fn of(work: &Matmul) -> Self {
        Self {
            sizes: [work.rows, work.columns, work.inner],
            strides: [work.x.token_stride, work.weight.token_stride, work.out.token_stride],
            dtypes: (work.dtype, work.out_dtype),
            bias: work.bias != 0,
            workspace_bytes: workspace_bytes(work),
        }
    }
}

fn workspace_bytes(work: &Matmul) -> usize {
    if work.workspace == 0 { 0 } else { work.workspace_bytes }
}

/// How a shape is computed.
#[derive(Debug)]
struct Plan {
    product: Owned,
    weight: Owned,
    x: Owned,
    out: Owned,
    algorithm: Algorithm,
}

/// A descriptor that is destroyed when it is dropped.
#[derive(Debug)]
struct Owned {
    descriptor: Descriptor,
    destroy: Destroy,
}

impl Owned {
    fn new(
        operation: &'static str,
        destroy: Destroy,
        create: impl FnOnce(&mut Descriptor) -> Status,
    ) -> Result<Self, Error> {
        let mut descriptor = ptr::null_mut();
        check(operation, create(&mut descriptor))?;
        Ok(Self { descriptor, destroy })
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: created by the library that this function is of. A failure leaves nothing to do.
        let _ = unsafe { (self.destroy)(self.descriptor) };
    }
}

fn set<T>(function: SetAttribute, descriptor: Descriptor, attribute: c_int, value: &T) -> Result<(), Error> {
    // SAFETY: a descriptor that lives, and a value of the attribute's type, which is copied.
    let status = unsafe { function(descriptor, attribute, ptr::from_ref(value).cast(), size_of::<T>()) };
    check("cublasLtSetAttribute", status)
}

fn check(operation: &'static str, status: Status) -> Result<(), Error> {
    let name = match status {
        0 => return Ok(()),
        1 => "NOT_INITIALIZED",
        3 => "ALLOC_FAILED",
        7 => "INVALID_VALUE",
        8 => "ARCH_MISMATCH",
        11 => "MAPPING_ERROR",
        13 => "EXECUTION_FAILED",
        14 => "INTERNAL_ERROR",
        NOT_SUPPORTED => "NOT_SUPPORTED",
        16 => "LICENSE_ERROR",
        _ => "no name known here",
    };
    Err(Error::Device { operation, reason: format!("cuBLAS error {status} ({name})") })
}

/// `cudaDataType`.
const fn number(dtype: DType) -> c_int {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 2,
        DType::BF16 => 14,
    }
}

// Of cublasLt.h: cublasComputeType_t, cublasLtMatmulDescAttributes_t, cublasLtEpilogue_t,
// cublasLtMatmulPreferenceAttributes_t (the last for A, B, C and D), cublasStatus_t.
const COMPUTE_F32: c_int = 68;
const TRANSPOSE_A: c_int = 3;
const EPILOGUE: c_int = 7;
const BIAS_POINTER: c_int = 8;
const BIAS_TYPE: c_int = 26;
const EPILOGUE_BIAS: c_int = 4;
const MAX_WORKSPACE: c_int = 1;
const REDUCTION_SCHEMES: c_int = 3;
/// Parts of a sum that is split are added in f32.
const REDUCTION_IN_COMPUTE_TYPE: u32 = 2;
const MIN_ALIGNMENTS: [c_int; 4] = [5, 6, 7, 8];
const NOT_SUPPORTED: Status = 15;

const NAMES: [&str; 4] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so", "cublasLt64_13.dll"];

/// Where the library lies when the loader does not know: a toolkit, or the wheels of the Python that is
/// active.
fn folders() -> Vec<PathBuf> {
    let of = |variable| env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let mut folders = Vec::new();
    for toolkit in ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(of) {
        folders.extend(["lib64", "lib", "bin"].map(|folder| toolkit.join(folder)));
    }
    folders.push("/usr/local/cuda/lib64".into());
    for python in ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(of) {
        let versions = fs::read_dir(python.join("lib")).into_iter().flatten().flatten();
        for packages in versions.map(|version| version.path().join("site-packages/nvidia")) {
            folders.extend(["cu13", "cublas"].map(|wheel| packages.join(wheel).join("lib")));
        }
        folders.push(python.join("lib"));
    }
    folders.retain(|folder| folder.is_dir());
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_says_where_it_was_sought() {
        let folder = PathBuf::from("/no/such/folder");
        let error = open(&["libno-such.so.13"], &[folder]).expect_err("no library");
        let message = error.to_string();
        assert!(message.contains("libno-such.so.13") && message.contains("/no/such/folder"), "{message}");
    }

    #[test]
    fn another_library_is_an_error_that_names_the_function() {
        let error = open(&["libc.so.6", "libno-such.so.13"], &[]).expect_err("no cuBLASLt");
        assert!(error.to_string().contains("cublasLtCreate"), "{error}");
    }
}
