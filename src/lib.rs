//! FastKV for Llama models: the early layers read the whole prompt, one layer picks the tokens that
//! matter, the deeper layers prefill only those, and every layer keeps a small KV cache chosen per
//! GQA group (arXiv 2502.01068).
//!
//! Three ways in, from the metal up:
//! * [`kernels`]: the CUDA kernels and their drivers, for engines that bring their own model;
//! * [`policy`]: what to keep, as a pure function from shapes and options to a [`policy::Plan`];
//! * `engine`: the whole job on token ids, over a `backend` (feature `pipeline`).

// Laid out by bindgen, and compared with its output by tests/bindings.rs.
#[rustfmt::skip]
pub mod abi;
pub mod backend;
#[cfg(feature = "pipeline")]
pub mod cache;
#[cfg(feature = "pipeline")]
pub mod engine;
#[cfg(feature = "pipeline")]
pub mod eval;
pub mod kernels;
#[cfg(feature = "pipeline")]
pub mod measure;
#[doc(hidden)]
pub mod messages;
pub mod policy;
mod random;
#[cfg(feature = "cli")]
pub mod report;

#[cfg(feature = "pipeline")]
pub mod model;
#[cfg(feature = "pipeline")]
#[doc(hidden)]
pub mod utf8;

/// The README's examples have to compile, and that on the CPU to run.
#[cfg(all(doctest, feature = "cuda", feature = "text"))]
#[doc = include_str!("../README.md")]
struct Readme;
