//! The next token of each row of logits.

use super::{
    DType, Error, Kernel, Launch, Launcher,
    check::{Presence, apart, count, matrix, range},
};
use crate::abi::{self, Rows, SampleParams};

/// A token for each row: the most likely one, or a draw with temperature, top-k and top-p; see
/// [`abi::Draw`].
///
/// A draw goes through the tokens from the most likely one down and takes the one at which the sum of
/// probabilities passes the uniform number. Of equal logits the lower token comes first. NaN is never
/// taken, nor is a logit of -inf drawn unless all are, whatever the temperature: an infinite one gives all others the
/// same probability. A temperature of 0 or less, or NaN, takes the most likely token. The same logits and draws give the
/// same tokens, whatever else is in the batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample {
    /// `[rows, vocabulary]`; `sequence_stride` and `head_stride` are not used.
    pub logits: Rows,
    /// Address of `[rows]` of [`abi::Draw`]. 0: the most likely token of every row.
    pub draws: u64,
    /// Address of i32 `[rows]`: receives the tokens; -1 where every logit is NaN. Apart from the rest.
    pub tokens: u64,
    /// Rows of logits.
    pub rows: u32,
    /// Logits of a row, at most [`MAX_VOCABULARY`].
    pub vocabulary: u32,
    /// Element type of the logits.
    pub dtype: DType,
}

/// Probabilities are integers of up to 2^40, and their sum has 64 bits.
pub const MAX_VOCABULARY: u32 = 1 << 22;

/// Queues the choice. With no rows it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is 0 where that is allowed, or device memory of the size its comment states,
/// until the kernel is done. Nothing else touches `tokens` meanwhile, and nothing writes the rest.
pub unsafe fn sample<D: Launcher + ?Sized>(device: &D, work: &Sample) -> Result<(), Error> {
    let Sample { logits, draws, tokens, rows, vocabulary, dtype } = *work;
    if vocabulary == 0 || vocabulary > MAX_VOCABULARY {
        return Err(Error::argument("vocabulary", vocabulary, format!("from 1 to {MAX_VOCABULARY}")));
    }
    if count("rows", rows)? == 0 {
        return Ok(());
    }
    let mut inputs = vec![("logits", matrix("logits", &logits, [rows, vocabulary], dtype)?)];
    if draws != 0 {
        // A draw is one vector.
        inputs.push(("draws", range("draws", draws, i128::from(rows) * 4, 4, Presence::Vectors)?));
    }
    apart(&[("tokens", range("tokens", tokens, rows.into(), 4, Presence::Needed)?)], &inputs)?;
    let params = SampleParams { logits, draws, tokens, vocabulary: vocabulary as i32, dtype: dtype.number() };
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe {
        device.launch(&Launch {
            kernel: Kernel::Sample,
            grid: [rows, 1, 1],
            cluster: [1, 1, 1],
            block: [abi::SAMPLE_THREADS as u32, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
        })
    }
}
