//! Kinds of [`Pooling`].

use super::Error;
use crate::abi::{self, Pooling};

impl Pooling {
    /// Scores as they are.
    pub const NONE: Self = Self::max(1);

    /// The largest score among `kernel` keys, an odd number from 1 to 63; padding is -inf.
    pub const fn max(kernel: i32) -> Self {
        Self { kind: abi::POOLING_MAX, kernel }
    }

    /// The mean score among `kernel` keys, an odd number from 1 to 63; the zeros of the padding count.
    pub const fn average(kernel: i32) -> Self {
        Self { kind: abi::POOLING_AVERAGE, kernel }
    }

    /// That kernels know it.
    pub(super) fn check(&self, name: &str) -> Result<(), Error> {
        if ![abi::POOLING_MAX, abi::POOLING_AVERAGE].contains(&self.kind) {
            return Err(Error::argument(format!("{name}.kind"), self.kind, "0 for max or 1 for average"));
        }
        if self.kernel % 2 != 1 || !(1..=63).contains(&self.kernel) {
            return Err(Error::argument(format!("{name}.kernel"), self.kernel, "an odd number from 1 to 63"));
        }
        Ok(())
    }
}
