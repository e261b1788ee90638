//! What the machine has. cudarc panics at its first call where libcuda or one of its symbols is
//! missing, so this looks first, with a loader of its own, and nothing touches cudarc before it said
//! yes.

use std::{
    ffi::{CStr, c_char, c_int, c_uint},
    mem,
};

use libloading::Library;

use crate::kernels::cuda_error_name;

/// Why there is no CUDA here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// Built without nvcc, or with `FASTKV_CUDA=off`.
    #[error(
        "this build has no CUDA kernels; build it where there is an nvcc, that of the CUDA toolkit or the one that NVCC \
         names"
    )]
    NoKernels,
    /// No libcuda on the loader's path.
    #[error("there is no NVIDIA driver: libcuda cannot be loaded")]
    NoDriver,
    /// There is a libcuda and it does not start.
    #[error(
        "the NVIDIA driver does not start: CUDA error {0} ({name}){hint}",
        name = cuda_error_name(*.0),
        hint = if *.0 == 34 { "; this libcuda is the toolkit's stub, put the driver's before it" } else { "" }
    )]
    Init(u32),
    /// The driver works and sees no GPU.
    #[error("the NVIDIA driver sees no GPU (CUDA_VISIBLE_DEVICES may hide it)")]
    NoDevice,
    /// There are fewer devices than that.
    #[error("there is no CUDA device {ordinal}; the driver sees {count}")]
    NoSuchDevice {
        /// The device asked for.
        ordinal: u32,
        /// How many there are.
        count: u32,
    },
    /// The driver lacks functions that are called, or the kernels were compiled by a newer CUDA than it knows.
    #[error(
        "the NVIDIA driver is made for CUDA {}.{}, and {} {}.{} or newer: update the driver{}",
        driver.0, driver.1, who_needs(*needs), needs.0, needs.1, release_hint(*needs)
    )]
    DriverTooOld {
        /// CUDA version of the driver.
        driver: (u32, u32),
        /// The least that would do.
        needs: (u32, u32),
    },
    /// No image holds code for this chip.
    #[error(
        "the kernels were not built for compute capability {}.{}{}",
        compute_capability.0, compute_capability.1, chip_hint(*compute_capability)
    )]
    NoImage {
        /// What the device has.
        compute_capability: (u32, u32),
    },
    /// A driver function failed on the way to a working device.
    #[error("{operation} failed: CUDA error {code} ({})", cuda_error_name(*code))]
    Failed {
        /// The driver function.
        operation: &'static str,
        /// Its `CUresult`.
        code: u32,
    },
}

fn chip_hint((major, minor): (u32, u32)) -> String {
    match major {
        0..=7 => "; they need 8.0 (Ampere) or newer".into(),
        _ => format!("; rebuild with FASTKV_COMPUTE_CAP={major}{minor}"),
    }
}

fn who_needs(cuda_version: (u32, u32)) -> &'static str {
    if cuda_version == OLDEST_DRIVER { "this program needs" } else { "its kernels need" }
}

/// The first release of the driver that is made for a version of CUDA.
fn release_hint(cuda_version: (u32, u32)) -> &'static str {
    match cuda_version {
        (12, 8) => " to release 570 or newer",
        (13, 0) => " to release 580 or newer",
        _ => "",
    }
}

/// A working driver and its devices, at least one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Driver {
    /// The newest CUDA version it knows, as `(13, 0)`.
    pub cuda_version: (u32, u32),
    /// Its devices, by ordinal.
    pub devices: Vec<DeviceInfo>,
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As the driver calls it.
    pub name: String,
    /// Major and minor compute capability.
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Memory in bytes.
    pub memory: u64,
}

/// Asks the driver what there is. Never panics, whatever the machine lacks.
///
/// # Errors
/// [`Unavailable`] says what is missing.
pub fn devices() -> Result<Driver, Unavailable> {
    devices_of(&LIBRARIES)
}

impl Driver {
    /// A device that kernels of this nvcc, by its version, can run on.
    ///
    /// # Errors
    /// A driver older than that, or fewer devices.
    pub(super) fn device(&self, ordinal: u32, built_by: (u32, u32)) -> Result<&DeviceInfo, Unavailable> {
        let needs = (built_by.0, 0).max(OLDEST_DRIVER);
        if self.cuda_version < needs {
            return Err(Unavailable::DriverTooOld { driver: self.cuda_version, needs });
        }
        let count = self.devices.len() as u32;
        self.devices.get(ordinal as usize).ok_or(Unavailable::NoSuchDevice { ordinal, count })
    }
}

/// Below it some driver functions that cudarc calls are missing, and it panics.
const OLDEST_DRIVER: (u32, u32) = (12, 8);

/// The names that cudarc tries, in its order: a yes here means that it finds the same library.
const LIBRARIES: [&str; 3] = ["libcuda.so", "libcuda.so.1", "nvcuda.dll"];

// CUdevice_attribute of cuda.h.
const MULTIPROCESSORS: c_int = 16;
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;

fn devices_of(libraries: &[&str]) -> Result<Driver, Unavailable> {
    // SAFETY: the driver's library may be loaded at any time; its initialisers are the vendor's.
    let library = libraries.iter().find_map(|name| unsafe { Library::new(*name) }.ok());
    let library = Libcuda(library.ok_or(Unavailable::NoDriver)?);
    let driver = library.driver();
    // Unloading a driver that started threads is not safe, and cudarc is about to load it again.
    mem::forget(library);
    driver
}

struct Libcuda(Library);

impl Libcuda {
    fn driver(&self) -> Result<Driver, Unavailable> {
        // SAFETY: the signature is cuda.h's, as for every `symbol` below.
        let init: unsafe extern "C" fn(c_uint) -> c_uint = unsafe { self.symbol("cuInit", c"cuInit")? };
        // SAFETY: cuInit takes flags, which must be 0.
        match unsafe { init(0) } {
            0 => {}
            100 => return Err(Unavailable::NoDevice),
            code => return Err(Unavailable::Init(code)),
        }
        let version = self.number("cuDriverGetVersion", c"cuDriverGetVersion")?;
        let count = self.number("cuDeviceGetCount", c"cuDeviceGetCount")?;
        if count == 0 {
            return Err(Unavailable::NoDevice);
        }
        let devices = (0..count).map(|ordinal| self.device(ordinal)).collect::<Result<_, _>>()?;
        Ok(Driver { cuda_version: (version / 1000, version % 1000 / 10), devices })
    }

    fn device(&self, ordinal: u32) -> Result<DeviceInfo, Unavailable> {
        type Get = unsafe extern "C" fn(*mut c_int, c_int) -> c_uint;
        type GetName = unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_uint;
        type GetAttribute = unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_uint;
        type TotalMem = unsafe extern "C" fn(*mut usize, c_int) -> c_uint;

        // SAFETY: cuda.h's signatures.
        let (get, get_name, get_attribute, total_mem): (Get, GetName, GetAttribute, TotalMem) = unsafe {
            (
                self.symbol("cuDeviceGet", c"cuDeviceGet")?,
                self.symbol("cuDeviceGetName", c"cuDeviceGetName")?,
                self.symbol("cuDeviceGetAttribute", c"cuDeviceGetAttribute")?,
                self.symbol("cuDeviceTotalMem_v2", c"cuDeviceTotalMem_v2")?,
            )
        };
        let mut device: c_int = 0;
        // SAFETY: `device` outlives the call.
        check("cuDeviceGet", unsafe { get(&mut device, ordinal as c_int) })?;
        let mut name: [c_char; 256] = [0; 256];
        // SAFETY: the driver writes at most the length given, terminator included.
        check("cuDeviceGetName", unsafe { get_name(name.as_mut_ptr(), 255, device) })?;
        let attribute = |which: c_int| -> Result<u32, Unavailable> {
            let mut value: c_int = 0;
            // SAFETY: `value` outlives the call.
            check("cuDeviceGetAttribute", unsafe { get_attribute(&mut value, which, device) })?;
            Ok(value.max(0) as u32)
        };
        let mut memory = 0;
        // SAFETY: `memory` outlives the call.
        check("cuDeviceTotalMem", unsafe { total_mem(&mut memory, device) })?;
        // SAFETY: the last of the 256 bytes was left 0.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        Ok(DeviceInfo {
            name,
            compute_capability: (attribute(CAPABILITY_MAJOR)?, attribute(CAPABILITY_MINOR)?),
            multiprocessors: attribute(MULTIPROCESSORS)?,
            memory: memory as u64,
        })
    }

    /// Calls a function that answers with one number.
    fn number(&self, name: &'static str, symbol: &CStr) -> Result<u32, Unavailable> {
        // SAFETY: cuda.h's signature of the two functions asked for.
        let function: unsafe extern "C" fn(*mut c_int) -> c_uint = unsafe { self.symbol(name, symbol)? };
        let mut value: c_int = 0;
        // SAFETY: `value` outlives the call.
        check(name, unsafe { function(&mut value) })?;
        Ok(value.max(0) as u32)
    }

    /// # Safety
    /// `F` is the function's type, and it is not called after the library is closed.
    unsafe fn symbol<F: Copy>(&self, name: &'static str, symbol: &CStr) -> Result<F, Unavailable> {
        // SAFETY: the caller's promise.
        let found = unsafe { self.0.get::<F>(symbol.to_bytes_with_nul()) };
        // 500 is the driver's own word for a symbol it does not have.
        found.map(|function| *function).map_err(|_| Unavailable::Failed { operation: name, code: 500 })
    }
}

fn check(operation: &'static str, code: c_uint) -> Result<(), Unavailable> {
    if code == 0 { Ok(()) } else { Err(Unavailable::Failed { operation, code }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, process::Command};

    /// Asks a shared library made from `source` in the driver's place.
    fn ask(source: &str) -> Result<Driver, Unavailable> {
        let folder = tempfile::tempdir().unwrap();
        let (c, library) = (folder.path().join("fake.c"), folder.path().join("libfake.so"));
        fs::write(&c, source).unwrap();
        let cc = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &c]).status().unwrap();
        assert!(cc.success());
        devices_of(&["libthere-is-none.so", library.to_str().unwrap()])
    }

    #[test]
    fn no_library() {
        assert_eq!(devices_of(&["libthere-is-none.so"]), Err(Unavailable::NoDriver));
    }

    #[test]
    fn driver_without_device() {
        assert_eq!(ask("int cuInit(unsigned f) { return 100; }"), Err(Unavailable::NoDevice));
    }

    #[test]
    fn stub_of_the_toolkit() {
        let error = ask("int cuInit(unsigned f) { return 34; }").unwrap_err();
        assert_eq!(error, Unavailable::Init(34));
        assert!(error.to_string().contains("34 (STUB_LIBRARY); this libcuda is the toolkit's stub"));
    }

    #[test]
    fn count_of_zero() {
        let source = "int cuInit(unsigned f) { return 0; }
            int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
            int cuDeviceGetCount(int *n) { *n = 0; return 0; }";
        assert_eq!(ask(source), Err(Unavailable::NoDevice));
    }

    #[test]
    fn library_of_another_kind() {
        let error = Unavailable::Failed { operation: "cuInit", code: 500 };
        assert_eq!(ask("int other(void) { return 0; }"), Err(error));
    }

    #[test]
    fn failure_on_the_way() {
        let source = "int cuInit(unsigned f) { return 0; }
            int cuDriverGetVersion(int *v) { *v = 13000; return 0; }
            int cuDeviceGetCount(int *n) { return 999; }";
        let error = ask(source).unwrap_err();
        assert_eq!(error.to_string(), "cuDeviceGetCount failed: CUDA error 999 (UNKNOWN)");
    }

    #[test]
    fn two_devices() {
        let source = r#"
            #include <string.h>
            int cuInit(unsigned f) { return f; }
            int cuDriverGetVersion(int *v) { *v = 12080; return 0; }
            int cuDeviceGetCount(int *n) { *n = 2; return 0; }
            int cuDeviceGet(int *d, int i) { *d = i + 7; return 0; }
            int cuDeviceGetName(char *s, int n, int d) { memset(s, 'a' + d, n); return 0; }
            int cuDeviceGetAttribute(int *v, int a, int d) {
                *v = a == 16 ? 132 : a == 75 ? 9 : a == 76 ? 0 : -1; return 0; }
            int cuDeviceTotalMem_v2(unsigned long *b, int d) { *b = 1ul << 37; return 0; }"#;
        let driver = ask(source).unwrap();
        assert_eq!(driver.cuda_version, (12, 8));
        let device = |letter: &str| DeviceInfo {
            name: letter.repeat(255),
            compute_capability: (9, 0),
            multiprocessors: 132,
            memory: 1 << 37,
        };
        assert_eq!(driver.devices, [device("h"), device("i")]);
    }

    #[test]
    fn chip_without_an_image() {
        let message = |compute_capability| Unavailable::NoImage { compute_capability }.to_string();
        let built = "the kernels were not built for compute capability";
        assert_eq!(message((8, 6)), format!("{built} 8.6; rebuild with FASTKV_COMPUTE_CAP=86"));
        assert_eq!(message((7, 5)), format!("{built} 7.5; they need 8.0 (Ampere) or newer"));
    }

    #[test]
    fn driver_too_old_or_too_few_devices() {
        let driver = |cuda_version| Driver {
            cuda_version,
            devices: vec![DeviceInfo {
                name: "one".into(),
                compute_capability: (9, 0),
                multiprocessors: 132,
                memory: 1 << 37,
            }],
        };
        // The major version of the compiler counts.
        assert_eq!(driver((13, 0)).device(0, (13, 2)).unwrap().name, "one");
        let error = driver((12, 9)).device(0, (13, 0)).unwrap_err();
        assert_eq!(error, Unavailable::DriverTooOld { driver: (12, 9), needs: (13, 0) });
        let message = |error: &Unavailable| error.to_string();
        let parts =
            "made for CUDA 12.9, and its kernels need 13.0 or newer: update the driver to release 580 or";
        assert!(message(&error).contains(parts), "{error}");
        let error = driver((12, 7)).device(0, (12, 0)).unwrap_err();
        assert_eq!(error, Unavailable::DriverTooOld { driver: (12, 7), needs: (12, 8) });
        let parts =
            "made for CUDA 12.7, and this program needs 12.8 or newer: update the driver to release 570 or";
        assert!(message(&error).contains(parts), "{error}");
        let error = driver((13, 0)).device(1, (13, 0)).unwrap_err();
        assert_eq!(error.to_string(), "there is no CUDA device 1; the driver sees 1");
    }
}
