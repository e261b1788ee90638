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

#[cfg(test)]
mod tests {
    use super::*;

    /// Why products count no bank conflicts: in every layout that a descriptor can say, the eight chunks of
    /// 16 bytes of a core matrix lie in different banks, so that all 32 serve one of them.
    #[test]
    fn core_matrices_have_no_bank_conflicts() {
        for (mode, span) in [(0_u64, 16_u32), (3, 32), (2, 64), (1, 128)] {
            // Steps along k move the start within a row.
            for start in (0..span).step_by(16).map(|within| 1024 + within) {
                for (leading, stride) in [(8 * span, 16 * span), (16 * span, 8 * span), (8 * 1024, 8 * span)]
                {
                    let field = |bytes: u32| u64::from(bytes / 16);
                    let bits = field(start) | field(leading) << 16 | field(stride) << 32 | mode << 62;
                    let layout = Layout::decode(bits).unwrap();
                    for k_first in [true, false] {
                        // A row must not run over its end.
                        let steps = if start % span == 0 { 4 } else { 1 };
                        for (mn, k) in (0..steps).flat_map(|mn| [(8 * mn, 0), (8 * mn, 8)]) {
                            if start % span != 0 && k > 0 {
                                continue;
                            }
                            let mut slots: Vec<u32> = (0..8)
                                .map(|row| if k_first { (mn + row, k) } else { (mn, k + row) })
                                .map(|(mn, k)| layout.chunk(k_first, mn, k) / 16 % 8)
                                .collect();
                            slots.sort_unstable();
                            assert_eq!(slots, [0, 1, 2, 3, 4, 5, 6, 7], "{layout:?} {k_first} {mn} {k}");
                        }
                    }
                }
            }
        }
    }
}
