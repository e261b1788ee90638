//! Where the arithmetic happens. `Backend` is the list of operations that a Llama forward and a
//! policy need; `cpu` implements it, and every other backend means the same by each of them.

#[cfg(feature = "pipeline")]
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(feature = "pipeline")]
mod error;
#[cfg(feature = "pipeline")]
mod ops;

#[cfg(feature = "pipeline")]
pub use error::BackendError;
#[cfg(feature = "pipeline")]
pub use ops::{Backend, Bias, Columns, Select, Share, Visible};
