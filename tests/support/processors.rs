//! A device that says it has another number of multiprocessors: results must not depend on it.

use fastkv::{
    abi,
    kernels::{Device, Error, Launch, Launcher, TensorMap},
};

use super::forward::forward;

pub(crate) struct Processors<'a, D> {
    pub(crate) device: &'a D,
    pub(crate) count: u32,
}

impl<D: Device> Launcher for Processors<'_, D> {
    forward! { device: fill launch tensor_map compute_capability }

    fn multiprocessors(&self) -> u32 {
        self.count
    }
}

impl<D: Device> Device for Processors<'_, D> {
    type Event = D::Event;

    forward! { device: alloc free upload download copy synchronize record elapsed_ms }
}
