//! What a device passes on that stands before another.

/// Methods of `Device` and `MatrixProduct`, by name, for an `impl` block: each calls the same of the field that
/// is named first. With `after METHOD` it calls that method of its own before, with its name, and fails as
/// that does.
macro_rules! forward {
    ($device:ident $(after $gate:ident)?: $($method:ident)*) => {
        forward! { @each [$device $($gate)?] $($method)* }
    };
    (@each $to:tt $($method:ident)*) => { $(forward! { @$method $to })* };
    (@alloc [$device:ident $($gate:ident)?]) => {
        fn alloc(&self, bytes: usize) -> Result<u64, Error> {
            $(self.$gate("alloc")?;)?
            self.$device.alloc(bytes)
        }
    };
    (@free [$device:ident $($gate:ident)?]) => {
        unsafe fn free(&self, address: u64) -> Result<(), Error> {
            $(self.$gate("free")?;)?
            // SAFETY: the caller's promise, here and in all that follow.
            unsafe { self.$device.free(address) }
        }
    };
    (@upload [$device:ident $($gate:ident)?]) => {
        unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), Error> {
            $(self.$gate("upload")?;)?
            // SAFETY: as above.
            unsafe { self.$device.upload(to, from) }
        }
    };
    (@download [$device:ident $($gate:ident)?]) => {
        unsafe fn download(&self, to: &mut [u8], from: u64) -> Result<(), Error> {
            $(self.$gate("download")?;)?
            // SAFETY: as above.
            unsafe { self.$device.download(to, from) }
        }
    };
    (@copy [$device:ident $($gate:ident)?]) => {
        unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
            $(self.$gate("copy")?;)?
            // SAFETY: as above.
            unsafe { self.$device.copy(to, from, bytes) }
        }
    };
    (@fill [$device:ident $($gate:ident)?]) => {
        unsafe fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<(), Error> {
            $(self.$gate("fill")?;)?
            // SAFETY: as above.
            unsafe { self.$device.fill(to, value, bytes) }
        }
    };
    (@launch [$device:ident $($gate:ident)?]) => {
        unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
            $(self.$gate("launch")?;)?
            // SAFETY: as above.
            unsafe { self.$device.launch(launch) }
        }
    };
    (@tensor_map [$device:ident $($gate:ident)?]) => {
        fn tensor_map(&self, tensor: &TensorMap) -> Result<abi::TensorMap, Error> {
            $(self.$gate("tensor_map")?;)?
            self.$device.tensor_map(tensor)
        }
    };
    (@synchronize [$device:ident $($gate:ident)?]) => {
        fn synchronize(&self) -> Result<(), Error> {
            $(self.$gate("synchronize")?;)?
            self.$device.synchronize()
        }
    };
    (@record [$device:ident $($gate:ident)?]) => {
        fn record(&self) -> Result<Self::Event, Error> {
            $(self.$gate("record")?;)?
            self.$device.record()
        }
    };
    (@elapsed_ms [$device:ident $($gate:ident)?]) => {
        fn elapsed_ms(&self, from: &Self::Event, to: &Self::Event) -> Result<f32, Error> {
            $(self.$gate("elapsed_ms")?;)?
            self.$device.elapsed_ms(from, to)
        }
    };
    (@reserve [$device:ident $($gate:ident)?]) => {
        fn reserve(&self, bytes: usize) -> Result<(), Error> {
            $(self.$gate("reserve")?;)?
            self.$device.reserve(bytes)
        }
    };
    (@free_memory [$device:ident]) => {
        fn free_memory(&self) -> Option<u64> {
            self.$device.free_memory()
        }
    };
    (@compute_capability [$device:ident]) => {
        fn compute_capability(&self) -> (u32, u32) {
            self.$device.compute_capability()
        }
    };
    (@multiprocessors [$device:ident]) => {
        fn multiprocessors(&self) -> u32 {
            self.$device.multiprocessors()
        }
    };
    (@matmul_workspace [$device:ident $($gate:ident)?]) => {
        fn matmul_workspace(&self) -> Result<usize, Error> {
            $(self.$gate("matmul_workspace")?;)?
            self.$device.matmul_workspace()
        }
    };
    (@matmul [$device:ident $($gate:ident)?]) => {
        unsafe fn matmul(&self, work: &Matmul) -> Result<(), Error> {
            $(self.$gate("matmul")?;)?
            // SAFETY: as above.
            unsafe { self.$device.matmul(work) }
        }
    };
}
pub(crate) use forward;
