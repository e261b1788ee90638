//! Sums of attention over many queries: what policies rank by that look beyond a window (H2O, FastGen,
//! PyramidInfer).
//!
//! As for scores of a window, lengths are read on the device, and a sum depends on its own sequence and heads
//! alone, to the bit.

use super::{
    DType, Error, Kernel, Launch, Launcher,
    batch::{ScoreHeads, Window},
    scores::{WindowScores, prepare},
};
use crate::abi::ColumnSumsParams;

/// Softmax probabilities of all queries of every sequence, which are the last of its keys, summed for every key
/// over these queries and over the query heads of its kv head. Query i counts `weight + i * step`, and on the
/// last `band` of the keys that it sees; its softmax is over all of them.
#[derive(Clone, Copy, Debug, Default)]
pub struct ColumnSums {
    /// The queries and keys, and where the sums go: all queries, summed over groups, with LSE and without
    /// positions.
    pub sums: WindowScores,
    /// What the first query of a sequence counts.
    pub weight: f32,
    /// What each next one counts more.
    pub step: f32,
    /// Keys that a query counts on, its own included. `None`: all that it sees.
    pub band: Option<u32>,
}

/// Queues the sums. With no key it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// As for [`window_scores`](super::scores::window_scores).
pub unsafe fn column_sums<D: Launcher + ?Sized>(device: &D, work: &ColumnSums) -> Result<(), Error> {
    let ColumnSums { sums, weight, step, band } = work;
    check(work)?;
    let Some(prepared) = prepare(sums)? else { return Ok(()) };
    let params = ColumnSumsParams {
        sums: prepared.params,
        weight: *weight,
        step: *step,
        // No query sees more keys than there are.
        band: band.unwrap_or(u32::MAX).min(sums.keys.longest) as i32,
        reserved: 0,
    };
    let launch = prepared.launch(sums, kernel(sums));
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe { device.launch(&Launch { params: bytemuck::bytes_of(&params), ..launch }) }
}

/// The kernel for an element type and a head size that a description was found to have.
fn kernel(sums: &WindowScores) -> Kernel {
    match (sums.dtype, sums.head_dim) {
        (DType::BF16, 64) => Kernel::ColumnSumsBf16D64,
        (DType::BF16, 96) => Kernel::ColumnSumsBf16D96,
        (DType::BF16, 128) => Kernel::ColumnSumsBf16D128,
        (DType::BF16, _) => Kernel::ColumnSumsBf16D256,
        (_, 64) => Kernel::ColumnSumsF16D64,
        (_, 96) => Kernel::ColumnSumsF16D96,
        (_, 128) => Kernel::ColumnSumsF16D128,
        (_, _) => Kernel::ColumnSumsF16D256,
    }
}

fn check(work: &ColumnSums) -> Result<(), Error> {
    let ColumnSums { sums, weight, step, .. } = work;
    if sums.scores.window != Window::All {
        let window = format!("{:?}", sums.scores.window);
        return Err(Error::argument("sums.scores.window", window, "All"));
    }
    if sums.scores.heads != ScoreHeads::Group {
        return Err(Error::argument("sums.scores.heads", "Query", "Group"));
    }
    if sums.positions != 0 {
        let positions = format_args!("{:#x}", sums.positions);
        return Err(Error::argument("sums.positions", positions, "0: the queries are the last of the keys"));
    }
    for (what, value) in [("weight", weight), ("step", step)] {
        if !value.is_finite() {
            return Err(Error::argument(what, value, "a finite number"));
        }
    }
    Ok(())
}
