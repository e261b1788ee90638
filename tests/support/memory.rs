//! Blocks of device memory that are given back together.

use fastkv::kernels::Device;

/// What a destination holds where a kernel is not to write.
pub(crate) const UNTOUCHED: u8 = 0xEE;

pub(crate) struct Memory<'a, D: Device> {
    device: &'a D,
    blocks: Vec<u64>,
}

impl<'a, D: Device> Memory<'a, D> {
    pub(crate) fn new(device: &'a D) -> Self {
        Self { device, blocks: Vec::new() }
    }

    /// A block that nothing has written to.
    pub(crate) fn reserve(&mut self, bytes: usize) -> u64 {
        let address = self.device.alloc(bytes).expect("room on the device");
        self.blocks.push(address);
        address
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) -> u64 {
        let address = self.reserve(bytes.len());
        // SAFETY: a block of that size, just reserved.
        unsafe { self.device.upload(address, bytes) }.expect("an upload");
        address
    }

    /// A block of [`UNTOUCHED`] bytes.
    pub(crate) fn untouched(&mut self, bytes: usize) -> u64 {
        self.put(&vec![UNTOUCHED; bytes])
    }

    /// The bytes of a block.
    pub(crate) fn get(&self, address: u64, bytes: usize) -> Result<Vec<u8>, String> {
        let mut found = vec![0; bytes];
        // SAFETY: a block of this memory of at least that size.
        unsafe { self.device.download(&mut found, address) }.map_err(|error| error.to_string())?;
        Ok(found)
    }

    /// The numbers of a block.
    pub(crate) fn floats(&self, address: u64, count: usize) -> Result<Vec<f32>, String> {
        let bytes = self.get(address, count * 4)?;
        Ok(bytes
            .chunks_exact(4)
            .map(|bytes| f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            .collect())
    }

    pub(crate) fn expect(&self, what: &str, address: u64, expected: &[u8]) -> Result<(), String> {
        let found = self.get(address, expected.len())?;
        match found.iter().zip(expected).position(|(found, expected)| found != expected) {
            None => Ok(()),
            Some(at) => Err(format!("{what}: byte {at} is {:#04x}, not {:#04x}", found[at], expected[at])),
        }
    }
}

impl<D: Device> Drop for Memory<'_, D> {
    fn drop(&mut self) {
        for address in self.blocks.drain(..) {
            // SAFETY: from `alloc`, once; a device that failed fails again here, which tells nothing new.
            let _ = unsafe { self.device.free(address) };
        }
    }
}
