//! What can go wrong between a description of work and its launch.

/// Why a driver did not launch, or a device did not do as it was told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The description makes no sense; nothing was launched.
    #[error("{what} is {value}; it must be {expected}")]
    Argument {
        /// The field, by the name it has in the description.
        what: String,
        /// What it holds.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// The CUDA driver refused.
    #[error("{operation} failed: CUDA error {code} ({})", cuda_error_name(*code))]
    Driver {
        /// The driver function.
        operation: &'static str,
        /// Its `CUresult`.
        code: u32,
    },
    /// The CUDA driver did not launch a kernel.
    #[error(
        "launching {kernel} failed: CUDA error {code} ({name}); grid {grid:?}, cluster {cluster:?}, block \
         {block:?}, {shared_bytes} bytes of shared memory, {params}",
        name = cuda_error_name(*code)
    )]
    Launch {
        /// Its name.
        kernel: &'static str,
        /// Blocks along x, y, z.
        grid: [u32; 3],
        /// Blocks of a cluster.
        cluster: [u32; 3],
        /// Threads of a block.
        block: [u32; 3],
        /// Dynamic shared memory of a block in bytes.
        shared_bytes: u32,
        /// Its parameters, by name.
        params: String,
        /// The driver's `CUresult`.
        code: u32,
    },
    /// What is not the CUDA driver refused: a library of the toolkit, or a device of another kind.
    #[error("{operation} failed: {reason}")]
    Device {
        /// What was asked of it.
        operation: &'static str,
        /// Its own words.
        reason: String,
    },
    /// A library of the CUDA toolkit that this machine lacks.
    #[error(
        "{name} cannot be loaded: not on the loader's path{}; install the CUDA toolkit's libraries, or put \
         their folder into LD_LIBRARY_PATH",
        if folders.is_empty() { String::new() } else { format!(", not in {}", folders.join(", ")) }
    )]
    Library {
        /// The library that was sought first.
        name: String,
        /// Where else it was sought.
        folders: Vec<String>,
    },
    /// This build or this chip has no machine code for a kernel.
    #[error(
        "the kernel {0} was not built for this device; rebuild with its compute capability in FASTKV_COMPUTE_CAP"
    )]
    Missing(&'static str),
}

impl Error {
    /// Whether the device has no room for what was asked of it.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::Driver { code: OUT_OF_MEMORY, .. })
    }

    pub(crate) fn argument(
        what: impl Into<String>,
        value: impl std::fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        Self::Argument { what: what.into(), value: value.to_string(), expected: expected.into() }
    }
}

/// `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: u32 = 2;

/// The name that cuda.h gives a `CUresult`, from a table of our own: asking the driver for it takes a
/// driver.
pub const fn cuda_error_name(code: u32) -> &'static str {
    match code {
        0 => "SUCCESS",
        1 => "INVALID_VALUE",
        OUT_OF_MEMORY => "OUT_OF_MEMORY",
        3 => "NOT_INITIALIZED",
        4 => "DEINITIALIZED",
        34 => "STUB_LIBRARY",
        46 => "DEVICE_UNAVAILABLE",
        100 => "NO_DEVICE",
        101 => "INVALID_DEVICE",
        102 => "DEVICE_NOT_LICENSED",
        200 => "INVALID_IMAGE",
        201 => "INVALID_CONTEXT",
        209 => "NO_BINARY_FOR_GPU",
        218 => "INVALID_PTX",
        221 => "JIT_COMPILER_NOT_FOUND",
        222 => "UNSUPPORTED_PTX_VERSION",
        300 => "INVALID_SOURCE",
        400 => "INVALID_HANDLE",
        401 => "ILLEGAL_STATE",
        500 => "NOT_FOUND",
        600 => "NOT_READY",
        700 => "ILLEGAL_ADDRESS",
        701 => "LAUNCH_OUT_OF_RESOURCES",
        702 => "LAUNCH_TIMEOUT",
        709 => "CONTEXT_IS_DESTROYED",
        710 => "ASSERT",
        714 => "HARDWARE_STACK_ERROR",
        715 => "ILLEGAL_INSTRUCTION",
        716 => "MISALIGNED_ADDRESS",
        717 => "INVALID_ADDRESS_SPACE",
        718 => "INVALID_PC",
        719 => "LAUNCH_FAILED",
        800 => "NOT_PERMITTED",
        801 => "NOT_SUPPORTED",
        802 => "SYSTEM_NOT_READY",
        803 => "SYSTEM_DRIVER_MISMATCH",
        804 => "COMPAT_NOT_SUPPORTED_ON_DEVICE",
        900 => "STREAM_CAPTURE_UNSUPPORTED",
        901 => "STREAM_CAPTURE_INVALIDATED",
        912 => "INVALID_CLUSTER_SIZE",
        999 => "UNKNOWN",
        _ => "no name known here",
    }
}
