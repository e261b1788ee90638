//! RMSNorm (arXiv 1910.07467), and the residual sum before it.

use super::{
    DType, Error, Kernel, Launch, Launcher,
    check::{Presence, count, disjoint, matrix, pieces, range},
};
use crate::abi::{self, RmsNormParams, Rows};

/// `out = x / sqrt(mean(x^2) + epsilon) * weight`, of `x += added` where something is to be added.
///
/// `x` is a residual stream, best kept in f32: the 64 sums of 32 layers, each rounded to bf16 by up to 2^-8,
/// come to an error of about one percent, and some checkpoints have channels that overflow f16. By
/// arithmetic the wider stream costs Llama 3.1 8B about 10 bytes an element and layer, 1.6 % of the time of
/// its matrix products.
#[derive(Clone, Copy, Debug, Default)]
pub struct RmsNorm {
    /// `[rows, width]`; written where `added` is there. `sequence_stride` and `head_stride` of matrices
    /// are not used.
    pub x: Rows,
    /// `[rows, width]` of `dtype`, added to `x` first.
    pub added: Option<Rows>,
    /// Receives the normed rows, `[rows, width]` of `dtype`; does not overlap the rest.
    pub out: Rows,
    /// Address of `[width]` of `dtype`.
    pub weight: u64,
    /// Rows of the matrices.
    pub rows: u32,
    /// Elements of a row, a multiple of 8, at most [`MAX_WIDTH`].
    pub width: u32,
    /// Element type of `x`.
    pub x_dtype: DType,
    /// Element type of all else.
    pub dtype: DType,
    /// What keeps a row of zeros from a division by zero: 0 or more.
    pub epsilon: f32,
}

/// The widest row: a block holds all of it in registers.
pub const MAX_WIDTH: u32 = (abi::NORM_THREADS * abi::NORM_PIECES * abi::PIECE) as u32;

/// Queues the norm. With no rows it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is device memory of the size that is described until the kernel is done.
/// Nothing else writes them, or reads what is written, meanwhile.
pub unsafe fn rms_norm<D: Launcher + ?Sized>(device: &D, work: &RmsNorm) -> Result<(), Error> {
    let RmsNorm { x, added, out, weight, rows, width, x_dtype, dtype, epsilon } = *work;
    let columns = pieces("width", width)?;
    if width > MAX_WIDTH {
        return Err(Error::argument("width", width, format!("at most {MAX_WIDTH}")));
    }
    if !(epsilon >= 0.0 && epsilon.is_finite()) {
        return Err(Error::argument("epsilon", epsilon, "a number from 0 up"));
    }
    if count("rows", rows)? == 0 {
        return Ok(());
    }
    let stream = matrix("x", &x, [rows, width], x_dtype)?;
    let normed = matrix("out", &out, [rows, width], dtype)?;
    let weights = range("weight", weight, width.into(), dtype.bytes(), Presence::Vectors)?;
    disjoint("out", &normed, "x", &stream)?;
    disjoint("out", &normed, "weight", &weights)?;
    if let Some(added) = &added {
        let added = matrix("added", added, [rows, width], dtype)?;
        disjoint("out", &normed, "added", &added)?;
        disjoint("x", &stream, "added", &added)?;
        disjoint("x", &stream, "weight", &weights)?;
    }
    let params = RmsNormParams {
        x,
        added: added.unwrap_or_default(),
        out,
        weight,
        width: columns,
        x_dtype: x_dtype.number(),
        dtype: dtype.number(),
        epsilon,
    };
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe {
        device.launch(&Launch {
            kernel: Kernel::RmsNorm,
            grid: [rows, 1, 1],
            cluster: [1, 1, 1],
            block: [threads(width), 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
        })
    }
}

/// Two pieces a thread keep enough bytes in flight; more only where the block cannot grow.
fn threads(width: u32) -> u32 {
    (width / abi::PIECE as u32).div_ceil(2).next_multiple_of(32).min(abi::NORM_THREADS as u32)
}
