//! A device that takes the time of what is queued on it, by stage.

use std::cell::RefCell;
use std::fmt;

use fastkv::abi;
use fastkv::kernels::{Device, Error, Graph, Launch, Launcher, Matmul, MatrixProduct, TensorMap};

use forward::forward;

#[path = "../../../tests/support/forward.rs"]
mod forward;

pub(crate) const STAGES: [&str; 4] = ["attention", "products", "selection", "rest"];

/// Passes everything on; where it was [`start`](Self::start)ed with stages, an event follows every launch.
pub(crate) struct Staged<D: Device> {
    device: D,
    events: RefCell<Option<Events<D>>>,
}

/// Each with the stage of what it follows.
type Events<D> = Vec<(usize, <D as Device>::Event)>;

impl<D: Device + fmt::Debug> fmt::Debug for Staged<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.device.fmt(f)
    }
}

impl<D: Device> Staged<D> {
    pub(crate) fn new(device: D) -> Self {
        Self { device, events: RefCell::default() }
    }

    pub(crate) fn start(&self, stages: bool) {
        *self.events.borrow_mut() = stages.then(Vec::new);
    }

    /// Milliseconds of each stage since the first launch. What stands between two launches, such as a copy,
    /// counts with the second.
    pub(crate) fn stop(&self) -> Result<Option<[f64; STAGES.len()]>, Error> {
        let Some(events) = self.events.take() else { return Ok(None) };
        let mut sums = [0.0; STAGES.len()];
        for pair in events.windows(2) {
            sums[pair[1].0] += f64::from(self.device.elapsed_ms(&pair[0].1, &pair[1].1)?);
        }
        Ok(Some(sums))
    }

    fn mark(&self, stage: usize) -> Result<(), Error> {
        if let Some(events) = &mut *self.events.borrow_mut() {
            events.push((stage, self.device.record()?));
        }
        Ok(())
    }
}

impl<D: Device> Launcher for Staged<D> {
    forward! { device: fill tensor_map compute_capability multiprocessors }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.device.launch(launch) }?;
        self.mark(match launch.kernel.image().trim_start_matches("sm90_") {
            "attention" => 0,
            "scores" | "columns" | "sums" | "select" | "share" | "gather" => 2,
            _ => 3,
        })
    }
}

impl<D: Device> Device for Staged<D> {
    type Event = D::Event;

    forward! { device: alloc free upload download copy synchronize record elapsed_ms free_memory reserve }

    unsafe fn capture(
        &self,
        work: &mut dyn FnMut() -> Result<(), Error>,
    ) -> Result<Option<Box<dyn Graph>>, Error> {
        // What is queued as one piece has no stages.
        if self.events.borrow().is_some() {
            return Ok(None);
        }
        // SAFETY: the caller's promise.
        unsafe { self.device.capture(work) }
    }
}

impl<D: MatrixProduct> MatrixProduct for Staged<D> {
    forward! { device: matmul_workspace }

    unsafe fn matmul(&self, work: &Matmul) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.device.matmul(work) }?;
        self.mark(1)
    }
}
