//! The CUDA kernels and their drivers: what an engine takes that brings its own model.
//!
//! A driver takes a description of the work, checks it, and launches. It never allocates, never
//! waits, and never calls CUDA itself: it talks to a [`Launcher`], which is the CUDA driver in
//! `backend::cuda` and something simpler in tests. Addresses are plain `u64` device addresses, so that
//! any CUDA binding can call.
//!
//! * [`attention`]: causal attention of a prompt, and the scores of its keys in the same launch.
//! * [`decode`]: attention of the newest tokens over a compact cache, which takes them in.
//! * [`gather`]: moves kept rows of K and V, also within a cache, and of hidden states.
//! * [`scores`]: scores of keys by a window of queries, and their pooling.
//! * [`columns`]: scores of keys by all queries.
//! * [`sums`]: such scores added up, gathered and raised; keys marked by position.
//! * [`select`]: the best keys of every row, from pooled scores.
//! * [`batch`]: descriptions that attention and scores share.
//! * [`images`]: the compiled kernels inside this library.
//! * [`embed`], [`norm`], [`rope`], [`activation`], [`sample`]: what a Llama forward needs beside attention and
//!   matrix products, which are a library's ([`MatrixProduct`]).

pub mod activation;
pub mod attention;
pub mod batch;
mod cache;
mod check;
pub mod columns;
pub mod decode;
mod device;
pub mod embed;
mod error;
pub mod gather;
pub mod images;
mod kernel;
mod matmul;
pub mod norm;
mod pooling;
pub mod rope;
mod rows;
pub mod sample;
pub mod scores;
pub mod select;
pub mod sums;

pub use device::{Device, Graph, Launch, Launcher, TensorMap};
pub use error::{Error, cuda_error_name};
pub use kernel::Kernel;
pub use matmul::{Matmul, MatrixProduct};

use crate::abi;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE half precision, 2 bytes.
    F16,
    /// bfloat16, 2 bytes.
    BF16,
    /// IEEE single precision, 4 bytes.
    F32,
}

impl DType {
    /// Bytes of an element.
    pub const fn bytes(self) -> u32 {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
        }
    }

    /// Its name in parameter structs.
    const fn number(self) -> i32 {
        match self {
            Self::F16 => abi::DTYPE_F16,
            Self::BF16 => abi::DTYPE_BF16,
            Self::F32 => abi::DTYPE_F32,
        }
    }
}
