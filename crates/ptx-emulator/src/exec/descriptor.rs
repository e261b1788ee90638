//! Where a matrix in shared memory lies, from the 64 bits that describe it to `wgmma`.
//!
//! Elements lie in chunks of 16 bytes, chunks in rows as long as the swizzle's span, eight rows one behind the
//! other. Where k comes first a row is one of the matrix, and groups of eight rows are a stride apart. Where
//! the other dimension comes first a row is one k, groups of eight k are a stride apart, and what does not fit
//! a row is a leading offset away. Without a swizzle the two offsets change their roles: rows have one
//! chunk, and along k chunks, or groups of eight k, are a leading offset apart.

use crate::tensor_map::Swizzle;

#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    start: u32,
    leading: u32,
    stride: u32,
    swizzle: Swizzle,
}

impl Layout {
    pub(super) fn decode(bits: u64) -> Result<Self, String> {
        let field = |at: u32| (bits >> at & 0x3fff) as u32 * 16;
        let base = bits >> 49 & 7;
        if base != 0 {
            return Err(format!("the descriptor {bits:#018x} has base offset {base}; only 0 is implemented"));
        }
        let swizzle = [Swizzle::None, Swizzle::Bytes128, Swizzle::Bytes64, Swizzle::Bytes32];
        let swizzle = swizzle[(bits >> 62) as usize];
        Ok(Self { start: field(0), leading: field(16), stride: field(32), swizzle })
    }

    /// Where 8 neighbouring elements begin: along k of row `mn` where k comes first, else along mn.
    pub(super) fn chunk(self, k_first: bool, mn: u32, k: u32) -> u32 {
        let row = self.swizzle.span();
        let elements = row / 2;
        let offset = match (k_first, self.swizzle) {
            (true, Swizzle::None) => mn / 8 * self.stride + mn % 8 * row + k / 8 * self.leading,
            (true, _) => mn / 8 * self.stride + mn % 8 * row + 2 * k,
            (false, Swizzle::None) => mn / 8 * self.stride + k / 8 * self.leading + k % 8 * row,
            (false, _) => {
                mn / elements * self.leading + k / 8 * self.stride + k % 8 * row + 2 * (mn % elements)
            }
        };
        self.swizzle.apply(self.start + offset)
    }
}
