//! Where the work runs.

#[cfg(feature = "cuda")]
pub mod cuda;
