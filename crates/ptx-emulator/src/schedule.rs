//! In which order threads and copies get on.

/// An order that a GPU could take. A correct kernel does the same in all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Schedule {
    /// Each warp as far as it gets; copies are done when they are issued.
    #[default]
    Eager,
    /// As eager, but copies read and arrive as late as they may.
    Delayed,
    /// Warps and parts of warps in an order drawn from this seed, preempted anywhere. The same seed
    /// gives the same run.
    Random(u64),
}

impl Schedule {
    pub(crate) const fn seed(self) -> u64 {
        match self {
            Self::Eager | Self::Delayed => 0,
            Self::Random(seed) => seed,
        }
    }
}

/// SplitMix64.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}
