//! Work that is captured, and queued again as one piece.

use std::{cell::Cell, ptr, thread};

use cudarc::driver::sys;

use super::{
    launcher::CudaLauncher,
    loaded::{Failure, check},
};
use crate::kernels::{Error, Graph};

/// The stream of a launcher, and the one that takes what this thread would queue on it.
type Capturing = Option<(sys::CUstream, sys::CUstream)>;

thread_local! {
    static CAPTURE: Cell<Capturing> = const { Cell::new(None) };
}

/// Where this thread queues what is meant for a stream: there, unless it captures it.
pub(super) fn target(stream: sys::CUstream) -> sys::CUstream {
    match CAPTURE.get() {
        Some((captured, side)) if captured == stream => side,
        _ => stream,
    }
}

/// A stream to capture on, for as long as this lives.
struct Side {
    stream: sys::CUstream,
    before: Capturing,
}

impl Drop for Side {
    fn drop(&mut self) {
        CAPTURE.set(self.before);
        // Where work panicked: this thread could do little else while it captures.
        if thread::panicking() {
            // SAFETY: the capture that this thread began; a stream that captures nothing says so.
            drop(unsafe { end(self.stream) });
        }
        // SAFETY: ours; nothing was queued on it.
        let _ = unsafe { sys::cuStreamDestroy_v2(self.stream) };
    }
}

/// Ends a capture.
///
/// # Safety
/// `stream` is alive.
unsafe fn end(stream: sys::CUstream) -> Result<Captured, Failure> {
    let mut graph = ptr::null_mut();
    // SAFETY: the caller's promise; `graph` outlives the call.
    let ended = check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(stream, &mut graph) });
    let graph = Captured(graph);
    ended.map(|()| graph)
}

/// A graph, or null where the capture failed.
struct Captured(sys::CUgraph);

impl Drop for Captured {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: ours; an executable made of it does not need it.
            let _ = unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}

/// A graph that was captured.
#[derive(Debug)]
pub(super) struct CudaGraph {
    executable: sys::CUgraphExec,
    launcher: CudaLauncher,
}

impl CudaGraph {
    /// See [`Device::capture`](crate::kernels::Device::capture).
    pub(super) fn capture(
        launcher: &CudaLauncher,
        work: &mut dyn FnMut() -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let _current = launcher.loaded.enter()?;
        // On a stream of its own, so that what other threads queue meanwhile is not captured too.
        let mut stream = ptr::null_mut();
        let non_blocking = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `stream` outlives the call.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut stream, non_blocking) })?;
        let _side = Side { stream, before: CAPTURE.replace(Some((launcher.stream, stream))) };
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream that nobody else knows.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(stream, mode) })?;
        let queued = work();
        // SAFETY: the stream on which a capture was begun above.
        let ended = unsafe { end(stream) };
        queued?;
        let graph = ended?;
        let mut executable = ptr::null_mut();
        // SAFETY: a graph that was just captured; `executable` outlives the call.
        check("cuGraphInstantiate", unsafe {
            sys::cuGraphInstantiateWithFlags(&mut executable, graph.0, 0)
        })?;
        Ok(Self { executable, launcher: launcher.clone() })
    }
}

impl Graph for CudaGraph {
    unsafe fn launch(&self) -> Result<(), Error> {
        let stream = self.launcher.target();
        // SAFETY: both handles are alive, and the caller vouches for the addresses.
        self.launcher.call("cuGraphLaunch", || unsafe { sys::cuGraphLaunch(self.executable, stream) })
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        if let Ok(_current) = self.launcher.loaded.enter() {
            // SAFETY: nobody else has the handle; the driver lets launches that are under way finish.
            let _ = unsafe { sys::cuGraphExecDestroy(self.executable) };
        }
    }
}
