//! Checks that every device runs, each kernel family against an oracle of its own, and devices to run
//! them on. Each test program uses its share of this.
#![allow(dead_code)]

pub(crate) mod attention;
#[cfg(feature = "pipeline")]
pub(crate) mod backend;
#[cfg(feature = "pipeline")]
pub(crate) mod batch;
pub(crate) mod captured;
pub(crate) mod decode;
pub(crate) mod emulator;
pub(crate) mod example;
pub(crate) mod example_pages;
#[cfg(feature = "pipeline")]
pub(crate) mod faults;
#[cfg(feature = "pipeline")]
pub(crate) mod fixtures;
pub(crate) mod forward;
pub(crate) mod gather;
pub(crate) mod llama;
pub(crate) mod lse;
pub(crate) mod matmul;
pub(crate) mod memory;
pub(crate) mod number;
#[path = "../oracle/mod.rs"]
pub(crate) mod oracle;
pub(crate) mod pages;
pub(crate) mod pooling;
#[cfg(feature = "pipeline")]
#[path = "../tiny/probe.rs"]
pub(crate) mod probe;
pub(crate) mod processors;
pub(crate) mod random;
pub(crate) mod recorder;
pub(crate) mod replayed;
#[cfg(feature = "pipeline")]
pub(crate) mod reserve;
pub(crate) mod scores;
pub(crate) mod select;
pub(crate) mod share;
pub(crate) mod sums;
#[cfg(feature = "pipeline")]
#[path = "../tiny/mod.rs"]
pub(crate) mod tiny;
#[cfg(feature = "pipeline")]
pub(crate) mod waits;

use fastkv::kernels::MatrixProduct;

/// Something to be found true of a kernel on a device.
pub(crate) struct Check<D> {
    /// Family and what is checked, as `gather_kv_edges`.
    pub(crate) name: &'static str,
    /// Whether it is of a kernel that compute capability 9.0 alone has.
    pub(crate) hopper: bool,
    /// Bytes of device memory that it may take, where these are many.
    pub(crate) room: u64,
    /// Takes a seed, for checks that draw shapes and contents.
    pub(crate) run: fn(&D, u64) -> Result<(), String>,
}

impl<D> Check<D> {
    /// A check of a kernel that every chip has.
    pub(crate) fn portable(name: &'static str, run: fn(&D, u64) -> Result<(), String>) -> Self {
        Self { name, hopper: false, room: 0, run }
    }

    /// A check of a kernel that Hopper alone has.
    pub(crate) fn hopper(name: &'static str, run: fn(&D, u64) -> Result<(), String>) -> Self {
        Self { name, hopper: true, room: 0, run }
    }

    /// The same with tensors that lie far apart.
    pub(crate) fn far(self) -> Self {
        Self { room: memory::FAR_ROOM, ..self }
    }
}

/// Every check that is small enough for the emulator.
pub(crate) fn checks<D: MatrixProduct + Clone + std::fmt::Debug>() -> Vec<Check<D>> {
    [
        #[cfg(feature = "pipeline")]
        backend::checks(),
        #[cfg(feature = "pipeline")]
        batch::checks(),
        #[cfg(feature = "pipeline")]
        faults::checks(),
        #[cfg(feature = "pipeline")]
        fixtures::checks(),
        #[cfg(feature = "pipeline")]
        reserve::checks(),
        #[cfg(feature = "pipeline")]
        waits::checks(),
        attention::checks(),
        captured::checks(),
        decode::checks(),
        example::checks(),
        example_pages::checks(),
        gather::checks(),
        llama::checks(),
        matmul::checks(),
        pooling::checks(),
        replayed::checks(),
        scores::checks(),
        select::checks(),
        share::checks(),
        sums::checks(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Runs a check on cases, and names the first that fails.
pub(crate) fn all<C: std::fmt::Debug>(
    cases: impl IntoIterator<Item = C>,
    check: impl Fn(&C) -> Result<(), String>,
) -> Result<(), String> {
    cases.into_iter().try_for_each(|case| check(&case).map_err(|error| format!("{error}\n{case:?}")))
}
