//! The CUDA kernels and their drivers: what an engine takes that brings its own model.
//!
//! A driver takes a description of the work, checks it, and launches. It never allocates, never
//! waits, and never calls CUDA itself: it talks to a [`Launcher`], which is the CUDA driver in
//! `backend::cuda` and something simpler in tests. Addresses are plain `u64` device addresses, so that
//! any CUDA binding can call. Parts of descriptions that kernels read as they are lie in [`abi`]:
//! [`Rows`](abi::Rows), [`Cache`](abi::Cache), [`Kept`](abi::Kept), [`Pages`](abi::Pages), [`Slots`](abi::Slots),
//! [`Pooling`](abi::Pooling).
//!
//! * [`attention`]: causal attention of a prompt, and the scores of its keys in the same launch.
//! * [`decode`]: attention of the newest tokens over a compact cache, which takes them in.
//! * [`gather`]: moves kept rows of K and V, also within a cache, and of hidden states.
//! * [`scores`]: scores of keys by a window of queries, and their pooling.
//! * [`columns`]: scores of keys by all queries.
//! * [`sums`]: such scores added up, gathered and raised; keys marked by position.
//! * [`select`]: the best keys of every row, from pooled scores.
//! * [`share`]: how many keys each head keeps where heads share a budget.
//! * [`batch`]: descriptions that attention and scores share.
//! * [`images`]: the compiled kernels inside this library.
//! * [`embed`], [`norm`], [`rope`], [`activation`], [`sample`]: what a Llama forward needs beside attention and
//!   matrix products, which are a library's ([`MatrixProduct`]).
//!
//! # In an engine
//!
//! * **Where it runs.** `backend::cuda::CudaLauncher` launches on streams of the engine's in a device's primary context,
//!   and its `new` says what is missing where it cannot: kernels in this build, a driver, a chip that they run on. That is
//!   compute capability 8.0 or newer; what is newer than what they were built for compiles their PTX when they are
//!   loaded. In a context of another kind, or through other bindings, the engine implements [`Launcher`].
//! * **Descriptions** are plain structs. What a call does not need comes from `..Default::default()`: addresses of 0,
//!   which are absent where that is allowed and refused where it is not, numbers of 0 and bf16. A field that a later
//!   version adds stands there for what was before, so that literals which end like this go on to compile. Sequences,
//!   tokens and rows may be 0: then there is nothing to do, and nothing is launched.
//! * **Tensors** are an address in bytes and strides in elements, the last dimension dense. Addresses and strides of rows
//!   are multiples of 16 bytes, workspaces of 256.
//! * **Lengths** and counts that change from batch to batch lie on the device. What a description says of them is a
//!   bound, which memory must have room for. Sequences of no tokens are legal.
//! * **Workspaces** are the caller's, and need not be cleared. `*_workspace` looks at sizes alone, so addresses may be 0
//!   (but for [`counters`](decode::Decode::counters) of decoding: where they are the caller's, it needs less), and the
//!   largest description that is to come needs the most.
//! * **Order.** Everything is queued on the stream, nothing waits and nothing is allocated. What one call wrote, or used as
//!   a workspace, the next call on the same stream may use; calls on two streams at a time need workspaces of their own.
//! * **Graphs.** Calls queue kernels and memory sets alone, so a stream may be captured around them. Addresses, strides,
//!   bounds and scalars become part of the graph; what lies on the device is read at each launch.
//! * **Results** are the same bits in every run, whatever else is in the batch. What is wrong in a description is an
//!   [`Error::Argument`] before anything is launched; what is wrong on the device, such as a length, is clipped.
//! * **What there is not**: pages by lists and offsets instead of a table, sliding windows, attention sinks, caps of logits,
//!   8-bit caches, head sizes other than 64, 96, 128 and 256, values of another size than keys, more than 16 query heads of
//!   a kv head, windows of scores of more than 64 queries, different numbers of new tokens in a step of decoding, rotation
//!   of a part of a head or of neighbours, forms of their own for compute capability 10 and 12, which run what Ampere does.
//! * **Keys are rotated** when they come, and keep the rotation of their original position; the position of a new token
//!   counts what was read, not what was kept.
//!
//! The example is a layer of an engine with packed prompts and a paged cache, in which every kv head keeps keys and pages
//! of its own: attention with scores, selection and gather, the hidden states that go on behind the TSP layer, and
//! decoding. An engine that has attention of its own, over a paged cache, finds its example in [`scores`]. The tests of
//! this crate run both as they stand.
//!
//! ```
#![doc = include_str!("example.rs")]
//! ```

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
pub mod share;
pub mod sums;

pub use device::{Device, Graph, Launch, Launcher, TensorMap};
pub use error::{Error, cuda_error_name};
pub use kernel::Kernel;
pub use matmul::{Matmul, MatrixProduct};

use crate::abi;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE half precision, 2 bytes.
    F16,
    /// bfloat16, 2 bytes.
    #[default]
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
