//! A device that says it has another number of multiprocessors: results must not depend on it.

use fastkv::{
    abi,
    kernels::{Device, Error, Launch, TensorMap},
};

pub(crate) struct Processors<'a, D> {
    pub(crate) device: &'a D,
    pub(crate) count: u32,
}

impl<D: Device> Device for Processors<'_, D> {
    type Event = D::Event;

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        self.device.alloc(bytes)
    }

    unsafe fn free(&self, address: u64) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.device.free(address) }
    }

    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.device.upload(to, from) }
    }

    unsafe fn download(&self, to: &mut [u8], from: u64) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.device.download(to, from) }
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.device.copy(to, from, bytes) }
    }

    unsafe fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.device.fill(to, value, bytes) }
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.device.launch(launch) }
    }

    fn tensor_map(&self, tensor: &TensorMap) -> Result<abi::TensorMap, Error> {
        self.device.tensor_map(tensor)
    }

    fn synchronize(&self) -> Result<(), Error> {
        self.device.synchronize()
    }

    fn record(&self) -> Result<D::Event, Error> {
        self.device.record()
    }

    fn elapsed_ms(&self, from: &D::Event, to: &D::Event) -> Result<f32, Error> {
        self.device.elapsed_ms(from, to)
    }

    fn compute_capability(&self) -> (u32, u32) {
        self.device.compute_capability()
    }

    fn multiprocessors(&self) -> u32 {
        self.count
    }
}
