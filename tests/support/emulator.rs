//! The PTX emulator as a device: drivers run the kernels that ship, without a GPU.

use std::cell::RefCell;

use fastkv::kernels::{Device, Error, Launch, images};
use ptx_emulator::Schedule;

pub(crate) struct Emulator {
    device: RefCell<ptx_emulator::Device>,
    compute_capability: (u32, u32),
    /// Images that were loaded, each before its first launch.
    loaded: RefCell<Vec<&'static str>>,
}

impl Emulator {
    /// A device that claims a compute capability, in a build that has kernels.
    pub(crate) fn new(schedule: Schedule, compute_capability: (u32, u32)) -> Self {
        let mut device = ptx_emulator::Device::new();
        device.set_schedule(schedule);
        // Tests run side by side.
        device.set_cores(1);
        Self { device: RefCell::new(device), compute_capability, loaded: RefCell::default() }
    }

    fn load(&self, image: &'static str) {
        if !self.loaded.borrow().contains(&image) {
            let ptx = images::ptx(image).expect("a build with kernels has their PTX");
            self.device.borrow_mut().load(ptx).unwrap_or_else(|error| panic!("{image}.ptx: {error}"));
            self.loaded.borrow_mut().push(image);
        }
    }
}

fn failed(operation: &'static str) -> impl Fn(ptx_emulator::Error) -> Error {
    move |error| Error::Device { operation, reason: error.to_string() }
}

impl Device for Emulator {
    type Event = ();

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        Ok(self.device.borrow_mut().alloc(bytes))
    }

    unsafe fn free(&self, address: u64) -> Result<(), Error> {
        self.device.borrow_mut().free(address).map_err(failed("free"))
    }

    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), Error> {
        self.device.borrow_mut().write(to, from).map_err(failed("upload"))
    }

    unsafe fn download(&self, to: &mut [u8], from: u64) -> Result<(), Error> {
        let bytes = self.device.borrow().read(from, to.len()).map_err(failed("download"))?;
        to.copy_from_slice(&bytes);
        Ok(())
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        let mut device = self.device.borrow_mut();
        let read = device.read(from, bytes).map_err(failed("copy"))?;
        device.write(to, &read).map_err(failed("copy"))
    }

    unsafe fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<(), Error> {
        self.device.borrow_mut().fill(to, value, bytes).map_err(failed("fill"))
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        let Launch { kernel, grid, cluster, block, shared_bytes, params } = *launch;
        self.load(kernel.image());
        let launch =
            ptx_emulator::Launch { kernel: kernel.entry(), grid, cluster, block, shared_bytes, params };
        self.device.borrow_mut().launch(&launch).map(drop).map_err(failed("launch"))
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(())
    }

    fn record(&self) -> Result<(), Error> {
        Ok(())
    }

    fn elapsed_ms(&self, _: &(), _: &()) -> Result<f32, Error> {
        Ok(0.0)
    }

    fn compute_capability(&self) -> (u32, u32) {
        self.compute_capability
    }

    fn multiprocessors(&self) -> u32 {
        4
    }
}
