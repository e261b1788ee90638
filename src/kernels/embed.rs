//! Rows of the embedding table.

use super::{
    DType, Error, Kernel, Launch, Launcher,
    check::{Presence, apart, count, pieces, range},
};
use crate::abi::{self, EmbedParams};

/// `out[i] = table[ids[i]]`. An id outside the table gives a row of zeros and raises `fault`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Embed {
    /// Address of `[vocabulary, width]`, dense.
    pub table: u64,
    /// Address of `[rows]` ids, i32 or u32.
    pub ids: u64,
    /// Address of `[rows, width]`, dense; does not overlap the table.
    pub out: u64,
    /// Address of an i32 that becomes the largest i + 1 of an `ids[i]` outside the table, if that is more
    /// than it holds. 0: not wanted.
    pub fault: u64,
    /// Rows to take.
    pub rows: u32,
    /// Rows of the table.
    pub vocabulary: u32,
    /// Elements of a row, a multiple of 8.
    pub width: u32,
    /// Element type of the table.
    pub table_dtype: DType,
    /// Element type of `out`.
    pub out_dtype: DType,
}

/// Queues the look-up. With no rows it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is 0 where that is allowed, or device memory of the size its comment states,
/// until the kernel is done. Nothing else touches `out` or `fault` meanwhile, and nothing writes the rest.
pub unsafe fn embed<D: Launcher + ?Sized>(device: &D, work: &Embed) -> Result<(), Error> {
    let Embed { rows, vocabulary, table_dtype, out_dtype, .. } = *work;
    let width = pieces("width", work.width)?;
    let vocabulary = count("vocabulary", vocabulary)?;
    if count("rows", rows)? == 0 {
        return Ok(());
    }
    let elements = |rows: u32| i128::from(rows) * i128::from(width);
    let vectors =
        |what, base, rows, dtype: DType| range(what, base, elements(rows), dtype.bytes(), Presence::Vectors);
    let table = vectors("table", work.table, work.vocabulary, table_dtype)?;
    let out = vectors("out", work.out, rows, out_dtype)?;
    let ids = range("ids", work.ids, rows.into(), 4, Presence::Needed)?;
    let fault = range("fault", work.fault, 1, 4, Presence::Optional)?;
    apart(&[("out", out), ("fault", fault)], &[("table", table), ("ids", ids)])?;
    let params = EmbedParams {
        table: work.table,
        ids: work.ids,
        out: work.out,
        fault: work.fault,
        vocabulary,
        width,
        table_dtype: table_dtype.number(),
        out_dtype: out_dtype.number(),
    };
    let threads = (work.width / abi::PIECE as u32).next_multiple_of(32).min(abi::LLAMA_THREADS as u32);
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe {
        device.launch(&Launch {
            kernel: Kernel::Embed,
            grid: [rows, 1, 1],
            cluster: [1, 1, 1],
            block: [threads, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
        })
    }
}
