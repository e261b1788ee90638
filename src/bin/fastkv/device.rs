//! Where to compute.

use anyhow::Result;
use clap::ValueEnum;
use fastkv::backend::cpu::CpuBackend;

use crate::exit::Usage;

/// The devices that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Device {
    /// A GPU where there is one that this version can use, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA GPU, or an error.
    Cuda,
}

/// The backend to use, and why that one.
pub(crate) fn backend(device: Device, threads: Option<usize>) -> Result<(CpuBackend, String)> {
    let reason = match device {
        Device::Cpu => "asked for".to_owned(),
        Device::Auto => format!("no CUDA: {}", without_cuda()),
        Device::Cuda => return Err(Usage(format!("--device cuda: {}", without_cuda())).into()),
    };
    Ok((CpuBackend::new(threads)?, reason))
}

/// Why nothing runs on a CUDA device.
pub(crate) fn without_cuda() -> String {
    "this version has no CUDA pipeline yet; the CPU does everything".to_owned()
}
