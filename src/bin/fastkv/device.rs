//! Where to compute.

use anyhow::{Result, bail};
use clap::ValueEnum;
use fastkv::backend::cpu::CpuBackend;
use serde::Serialize;

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

/// What there is of CUDA.
#[derive(Debug, Serialize)]
pub(crate) struct Cuda {
    /// Why it is not used.
    pub(crate) reason: String,
    /// CUDA version of the driver.
    pub(crate) driver: Option<(u32, u32)>,
    pub(crate) devices: Vec<Gpu>,
    pub(crate) kernels: Vec<Kernels>,
}

/// A GPU.
#[derive(Debug, Serialize)]
pub(crate) struct Gpu {
    pub(crate) name: String,
    pub(crate) compute_capability: (u32, u32),
    pub(crate) memory_bytes: u64,
}

/// A compiled kernel source.
#[derive(Debug, Serialize)]
pub(crate) struct Kernels {
    pub(crate) name: &'static str,
    /// With machine code of their own, such as `sm_90`.
    pub(crate) architectures: &'static [&'static str],
}

/// The backend to use, and why that one.
pub(crate) fn backend(device: Device, threads: Option<usize>) -> Result<(CpuBackend, String)> {
    let reason = match device {
        Device::Cpu => "asked for".to_owned(),
        Device::Auto => format!("no CUDA: {}", cuda().reason),
        Device::Cuda => bail!("--device cuda: {}", cuda().reason),
    };
    Ok((CpuBackend::new(threads)?, reason))
}

/// Looks for GPUs and kernels.
#[cfg(feature = "cuda")]
pub(crate) fn cuda() -> Cuda {
    use fastkv::backend::cuda::{Unavailable, probe};
    use fastkv::kernels::images;

    let compiled = images::images().iter();
    let kernels = compiled.map(|image| Kernels { name: image.name, architectures: image.archs }).collect();
    match probe::devices() {
        Err(unavailable) => {
            Cuda { reason: unavailable.to_string(), driver: None, devices: Vec::new(), kernels }
        }
        Ok(driver) => Cuda {
            reason: if images::built() { NO_PIPELINE.to_owned() } else { Unavailable::NoKernels.to_string() },
            driver: Some(driver.cuda_version),
            devices: driver
                .devices
                .into_iter()
                .map(|device| Gpu {
                    name: device.name,
                    compute_capability: device.compute_capability,
                    memory_bytes: device.memory,
                })
                .collect(),
            kernels,
        },
    }
}

/// There is none in a build without the feature.
#[cfg(not(feature = "cuda"))]
pub(crate) fn cuda() -> Cuda {
    let reason = "this program was built without the feature `cuda`".to_owned();
    Cuda { reason, driver: None, devices: Vec::new(), kernels: Vec::new() }
}

#[cfg(feature = "cuda")]
const NO_PIPELINE: &str = "this version has kernels, but runs models on the CPU only";
