//! What stands between the matrix products of a layer element by element.

use super::{
    DType, Error, Kernel, Launch, Launcher,
    check::{count, disjoint, matrix, pieces},
};
use crate::abi::{self, AddParams, ConvertParams, Rows, SiluMulParams};

/// `x += y`, for `[rows, width]`; each sum is rounded once.
#[derive(Clone, Copy, Debug, Default)]
pub struct Add {
    /// What is added to; `sequence_stride` and `head_stride` of matrices are not used.
    pub x: Rows,
    /// What is added; does not overlap `x`.
    pub y: Rows,
    /// Rows of both.
    pub rows: u32,
    /// Elements of a row, a multiple of 8.
    pub width: u32,
    /// Element type of `x`.
    pub x_dtype: DType,
    /// Element type of `y`.
    pub y_dtype: DType,
}

/// `out = x` in another element type, for `[rows, width]`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Convert {
    /// What is converted.
    pub x: Rows,
    /// Receives it; does not overlap `x`.
    pub out: Rows,
    /// Rows of both.
    pub rows: u32,
    /// Elements of a row, a multiple of 8.
    pub width: u32,
    /// Element type of `x`.
    pub x_dtype: DType,
    /// Element type of `out`.
    pub out_dtype: DType,
}

/// `out = silu(gate) * up`, for `[rows, width]`, with `silu(g) = g / (1 + exp(-g))`.
#[derive(Clone, Copy, Debug, Default)]
pub struct SiluMul {
    /// The gate.
    pub gate: Rows,
    /// What is let through.
    pub up: Rows,
    /// Receives the products: `gate` or `up` itself, or something apart from both.
    pub out: Rows,
    /// Rows of all three.
    pub rows: u32,
    /// Elements of a row, a multiple of 8.
    pub width: u32,
    /// Element type of all three.
    pub dtype: DType,
}

/// Queues the sum. With no rows it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Both matrices are device memory of the size that is described until the kernel is done. Nothing else
/// writes them or reads `x` meanwhile.
pub unsafe fn add<D: Launcher + ?Sized>(device: &D, work: &Add) -> Result<(), Error> {
    let Add { x, y, rows, width, x_dtype, y_dtype } = *work;
    let columns = pieces("width", width)?;
    if count("rows", rows)? == 0 {
        return Ok(());
    }
    let sums = matrix("x", &x, [rows, width], x_dtype)?;
    let added = matrix("y", &y, [rows, width], y_dtype)?;
    disjoint("x", &sums, "y", &added)?;
    let params =
        AddParams { x, y, width: columns, x_dtype: x_dtype.number(), y_dtype: y_dtype.number(), reserved: 0 };
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe { device.launch(&elementwise(Kernel::Add, rows, width, bytemuck::bytes_of(&params))) }
}

/// Queues the conversion. With no rows it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Both matrices are device memory of the size that is described until the kernel is done. Nothing else
/// writes them or reads `out` meanwhile.
pub unsafe fn convert<D: Launcher + ?Sized>(device: &D, work: &Convert) -> Result<(), Error> {
    let Convert { x, out, rows, width, x_dtype, out_dtype } = *work;
    let columns = pieces("width", width)?;
    if count("rows", rows)? == 0 {
        return Ok(());
    }
    let converted = matrix("out", &out, [rows, width], out_dtype)?;
    disjoint("out", &converted, "x", &matrix("x", &x, [rows, width], x_dtype)?)?;
    let params = ConvertParams {
        x,
        out,
        width: columns,
        x_dtype: x_dtype.number(),
        out_dtype: out_dtype.number(),
        reserved: 0,
    };
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe { device.launch(&elementwise(Kernel::Convert, rows, width, bytemuck::bytes_of(&params))) }
}

/// Queues the gated activation. With no rows it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// The matrices are device memory of the size that is described until the kernel is done. Nothing else
/// writes them or reads `out` meanwhile.
pub unsafe fn silu_mul<D: Launcher + ?Sized>(device: &D, work: &SiluMul) -> Result<(), Error> {
    let SiluMul { gate, up, out, rows, width, dtype } = *work;
    let columns = pieces("width", width)?;
    if count("rows", rows)? == 0 {
        return Ok(());
    }
    let products = matrix("out", &out, [rows, width], dtype)?;
    for (name, source) in [("gate", &gate), ("up", &up)] {
        let range = matrix(name, source, [rows, width], dtype)?;
        // In place, a thread reads its own elements before it writes them.
        if source != &out {
            disjoint("out", &products, name, &range)?;
        }
    }
    let params = SiluMulParams { gate, up, out, width: columns, dtype: dtype.number() };
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe { device.launch(&elementwise(Kernel::SiluMul, rows, width, bytemuck::bytes_of(&params))) }
}

/// One piece of a row for each thread.
fn elementwise(kernel: Kernel, rows: u32, width: u32, params: &[u8]) -> Launch<'_> {
    let threads = abi::LLAMA_THREADS as u32;
    Launch {
        kernel,
        grid: [rows, width.div_ceil(threads * abi::PIECE as u32), 1],
        cluster: [1, 1, 1],
        block: [threads, 1, 1],
        shared_bytes: 0,
        params,
    }
}
