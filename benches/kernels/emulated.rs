//! `--test` without a GPU: every work runs once on the PTX emulator, small, and is described to a device that
//! does nothing, at the sizes that are measured.

#[path = "../../tests/support/emulator.rs"]
mod emulator;
#[path = "../../tests/support/forward.rs"]
mod forward;
#[allow(dead_code)]
#[path = "../../tests/support/number.rs"]
mod number;
#[allow(dead_code)]
#[path = "../../tests/support/recorder.rs"]
mod recorder;

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
};

use anyhow::{Context, Result, ensure};
use fastkv::{
    abi,
    kernels::{Device, Error, Kernel, Launch, Launcher, TensorMap},
};
use ptx_emulator::Schedule;

use crate::{families, shape::Shape};
use emulator::Emulator;
use forward::forward;
use recorder::Recorder;

/// Fails where a description is wrong, a kernel stops, a floor is above what a kernel moves, or a kernel has no work.
pub(crate) fn check() -> Result<()> {
    let described = Described { launches: Recorder::hopper(), ..Described::default() };
    let mut names = BTreeSet::new();
    for works in families() {
        for work in works(&described, &Shape::LLAMA_3_1_8B)? {
            (work.run)().with_context(|| work.name.clone())?;
            ensure!(names.insert(work.name.clone()), "two works are called {}", work.name);
        }
    }
    let most = described.most.get();
    ensure!(most < MOST_BYTES, "a family takes {most} bytes of device memory, where {MOST_BYTES} should do");

    let observed = Observed::new();
    for works in families() {
        for work in works(&observed, &Shape::SMALL)? {
            let moved = observed.moved(|| (work.run)()).with_context(|| work.name.clone())?;
            let floor = work.bytes;
            ensure!(floor <= moved, "{}: its floor is of {floor} bytes, it moves {moved}", work.name);
        }
    }
    let launched = observed.launched.into_inner();
    let all: BTreeSet<_> = Kernel::ALL.iter().map(|kernel| family(*kernel)).collect();
    let missing: Vec<_> = all.difference(&launched).collect();
    ensure!(missing.is_empty(), "nothing launches {missing:?}");
    println!("{} works ran small, on the emulator; at full size drivers accept them", names.len());
    Ok(())
}

/// What the smallest GPU has that these benches are meant for.
const MOST_BYTES: u64 = 40 << 30;

/// A kernel's name without element type and head size.
fn family(kernel: Kernel) -> &'static str {
    let entry = kernel.entry();
    let end = ["_f16_", "_bf16_"].iter().find_map(|dtype| entry.find(dtype));
    &entry[..end.unwrap_or(entry.len())]
}

/// A Hopper that notes what runs on it, and how much of its memory that touches.
struct Observed {
    device: Emulator,
    launched: RefCell<BTreeSet<&'static str>>,
    sectors: Cell<u64>,
}

impl Observed {
    fn new() -> Self {
        let device = Emulator::new(Schedule::Eager, (9, 0));
        Self { device, launched: RefCell::default(), sectors: Cell::default() }
    }

    /// Bytes of the sectors that are read and written.
    fn moved(&self, run: impl FnOnce() -> Result<(), Error>) -> Result<f64, Error> {
        self.sectors.set(0);
        run()?;
        Ok(32.0 * self.sectors.get() as f64)
    }
}

impl Launcher for Observed {
    forward! { device: fill tensor_map compute_capability multiprocessors }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.device.launch(launch) }?;
        self.launched.borrow_mut().insert(family(launch.kernel));
        let counters = self.device.counters();
        self.sectors.set(self.sectors.get() + counters.global_sectors + counters.bulk_sectors);
        Ok(())
    }
}

impl Device for Observed {
    type Event = <Emulator as Device>::Event;

    forward! { device: alloc free upload download copy synchronize record elapsed_ms }
}

/// Hands out addresses, writes nothing there, and launches nothing.
#[derive(Default)]
struct Described {
    launches: Recorder,
    end: Cell<u64>,
    blocks: Cell<usize>,
    /// Bytes of all blocks of a family.
    most: Cell<u64>,
}

impl Launcher for Described {
    forward! { launches: fill launch tensor_map compute_capability multiprocessors }
}

impl Device for Described {
    type Event = ();

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        let begin = self.end.get() + 256;
        self.end.set((begin + bytes as u64).next_multiple_of(256));
        self.blocks.set(self.blocks.get() + 1);
        self.most.set(self.most.get().max(self.end.get()));
        Ok(begin)
    }

    unsafe fn free(&self, _: u64) -> Result<(), Error> {
        self.blocks.set(self.blocks.get() - 1);
        if self.blocks.get() == 0 {
            self.end.set(0);
        }
        Ok(())
    }

    unsafe fn upload(&self, _: u64, _: &[u8]) -> Result<(), Error> {
        Ok(())
    }

    unsafe fn download(&self, to: &mut [u8], _: u64) -> Result<(), Error> {
        unreachable!("{} bytes: a bench reads nothing back", to.len())
    }

    unsafe fn copy(&self, _: u64, _: u64, _: usize) -> Result<(), Error> {
        Ok(())
    }

    fn synchronize(&self) -> Result<(), Error> {
        unreachable!("a bench waits by events")
    }

    fn record(&self) -> Result<(), Error> {
        Ok(())
    }

    fn elapsed_ms(&self, _: &(), _: &()) -> Result<f32, Error> {
        unreachable!("nothing is measured here")
    }
}
