//! The compiled kernels inside this library: one image per source file under `kernels/`, each a fatbin for
//! `cuModuleLoadData`.
//!
//! Images whose names begin with `sm90_` hold code for compute capability 9.0 (`sm_90a`), and no PTX, since their
//! instructions exist nowhere else. On any other chip loading one fails with CUDA error 209
//! (`CUDA_ERROR_NO_BINARY_FOR_GPU`), so skip them there: portable kernels do the same work. A build whose
//! `FASTKV_COMPUTE_CAP` leaves 90 out has none of them.

/// A compiled source file.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Image {
    /// Name of the source file without `.cu`.
    pub name: &'static str,
    /// Architectures with machine code of their own, as `sm_90`; other chips, from the first of them on, compile the PTX
    /// inside, which all have but those of `sm90_*`.
    pub archs: &'static [&'static str],
    /// What the driver loads.
    pub fatbin: &'static [u8],
}

/// Every image, sorted by name; none where the library was built without nvcc.
pub fn images() -> &'static [Image] {
    IMAGES
}

/// Whether there are kernels in this build.
pub fn built() -> bool {
    !IMAGES.is_empty()
}

/// Release of the nvcc that compiled them, as `(13, 0)`.
pub fn nvcc_version() -> Option<(u32, u32)> {
    NVCC
}

/// The PTX of an image for one of its [architectures](Image::archs), for those who read or interpret it: in a build with
/// `FASTKV_PTX=1` alone. A program that never asks does not carry it.
pub fn ptx(image: &str, arch: &str) -> Option<&'static str> {
    PTX.iter().find(|(name, of, _)| (*name, *of) == (image, arch)).map(|(.., text)| *text)
}

#[cfg(fastkv_kernels)]
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

#[cfg(not(fastkv_kernels))]
const NVCC: Option<(u32, u32)> = None;
#[cfg(not(fastkv_kernels))]
static IMAGES: &[Image] = &[];
#[cfg(not(fastkv_kernels))]
static PTX: &[(&str, &str, &str)] = &[];

/// Puts the bytes of an image where a driver that reads words finds them aligned.
#[cfg(fastkv_kernels)]
#[repr(C, align(16))]
struct Aligned<T>(T);
