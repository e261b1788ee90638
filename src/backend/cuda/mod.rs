//! NVIDIA GPUs through the CUDA driver, which is loaded at run time: the same binary starts where
//! there is none.
//!
//! [`probe::devices`] says what there is, without ever panicking; [`CudaLauncher`] runs kernels on one
//! device.

mod cublaslt;
mod launcher;
pub mod probe;

pub use launcher::{CudaEvent, CudaLauncher};
pub use probe::Unavailable;
