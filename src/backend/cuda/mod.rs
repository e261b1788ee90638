//! NVIDIA GPUs through the CUDA driver, which is loaded at run time: the same binary starts where
//! there is none.
//!
//! [`probe::devices`] says what there is, without ever panicking; [`CudaLauncher`] runs kernels on one
//! device, and, with the feature `pipeline`, `CudaBackend` models on it.

mod cublaslt;
mod graph;
mod launcher;
mod loaded;
#[cfg(feature = "pipeline")]
pub mod pipeline;
pub mod probe;

pub use launcher::{CudaEvent, CudaLauncher};
#[cfg(feature = "pipeline")]
pub use pipeline::CudaBackend;
pub use probe::Unavailable;
