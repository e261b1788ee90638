//! Layouts of [`Rows`].

use crate::abi::Rows;

impl Rows {
    /// `[sequences, tokens, heads, width]`, dense.
    pub const fn token_major(base: u64, tokens: u32, heads: u32, width: u32) -> Self {
        let token_stride = heads as i64 * width as i64;
        Self {
            base,
            sequence_stride: token_stride.saturating_mul(tokens as i64),
            head_stride: width as i64,
            token_stride,
        }
    }

    /// `[tokens, heads, width]`, dense, with sequences packed along the token axis.
    pub const fn packed(base: u64, heads: u32, width: u32) -> Self {
        Self { sequence_stride: 0, ..Self::token_major(base, 0, heads, width) }
    }

    /// `[sequences, heads, tokens, width]`, dense.
    pub const fn head_major(base: u64, heads: u32, tokens: u32, width: u32) -> Self {
        let head_stride = tokens as i64 * width as i64;
        Self {
            base,
            sequence_stride: head_stride.saturating_mul(heads as i64),
            head_stride,
            token_stride: width as i64,
        }
    }
}
