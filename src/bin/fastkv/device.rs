//! Where to compute.

use anyhow::Result;
use clap::ValueEnum;
use fastkv::backend::cpu::CpuBackend;
#[cfg(feature = "cuda")]
use fastkv::backend::cuda::{CudaBackend, Unavailable};
use fastkv::model::{Dtype, LlamaConfig, ModelDir};
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
    /// Why it cannot be used, where it cannot.
    pub(crate) reason: Option<String>,
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

/// A backend of either kind; [`on`](crate::device::on) makes it one of its own type.
pub(crate) enum Chosen {
    Cpu(CpuBackend),
    #[cfg(feature = "cuda")]
    Cuda(CudaBackend),
}

/// An expression with the backend that was chosen.
macro_rules! on {
    ($chosen:expr, $backend:ident => $body:expr) => {
        match $chosen {
            $crate::device::Chosen::Cpu($backend) => $body,
            #[cfg(feature = "cuda")]
            $crate::device::Chosen::Cuda($backend) => $body,
        }
    };
}
pub(crate) use on;

/// What a model asks of a GPU.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct Needs<'a> {
    pub(crate) config: &'a LlamaConfig,
    pub(crate) dtype: Dtype,
}

impl<'a> From<&'a ModelDir> for Needs<'a> {
    fn from(model: &'a ModelDir) -> Self {
        Self { config: &model.config, dtype: model.weights.embedding.dtype() }
    }
}

/// The backend to run a model on, and why that one.
pub(crate) fn backend(
    device: Device,
    threads: Option<usize>,
    model: Option<Needs<'_>>,
) -> Result<(Chosen, String)> {
    let reason = match device {
        Device::Cpu => "asked for".to_owned(),
        Device::Auto => match cuda_backend(model) {
            Ok(backend) => return Ok((backend, "a GPU is there".to_owned())),
            Err(error) => {
                // Who has a GPU expects it to be used.
                if !cuda().devices.is_empty() {
                    eprintln!("note: this runs on the CPU, and not on the GPU: {error:#}");
                }
                format!("no CUDA: {error:#}")
            }
        },
        Device::Cuda => {
            let backend = cuda_backend(model).map_err(|error| anyhow::anyhow!("--device cuda: {error:#}"))?;
            return Ok((backend, "asked for".to_owned()));
        }
    };
    Ok((Chosen::Cpu(CpuBackend::new(threads)?), reason))
}

#[cfg(feature = "cuda")]
fn cuda_backend(model: Option<Needs<'_>>) -> Result<Chosen> {
    use fastkv::backend::cuda::{CudaLauncher, pipeline::check_model, probe};
    use fastkv::kernels::DType;

    let mut dtype = DType::BF16;
    if let Some(model) = model {
        check_model(model.config)?;
        if model.dtype == Dtype::F16 {
            dtype = DType::F16;
        }
    }
    let device = CudaLauncher::new(0)?;
    let name = probe::devices()?.devices.swap_remove(0).name;
    Ok(Chosen::Cuda(CudaBackend::new(device, name, dtype)?))
}

/// There is none in a build without the feature.
#[cfg(not(feature = "cuda"))]
fn cuda_backend(_: Option<Needs<'_>>) -> Result<Chosen> {
    anyhow::bail!(NOT_BUILT)
}

/// Looks for GPUs and kernels.
#[cfg(feature = "cuda")]
pub(crate) fn cuda() -> Cuda {
    use fastkv::backend::cuda::{CudaLauncher, probe};
    use fastkv::kernels::images;

    let compiled = images::images().iter();
    let kernels = compiled.map(|image| Kernels { name: image.name, architectures: image.archs }).collect();
    match probe::devices() {
        Err(unavailable) => Cuda {
            reason: Some(without_driver(&unavailable, images::built())),
            driver: None,
            devices: Vec::new(),
            kernels,
        },
        Ok(driver) => Cuda {
            reason: CudaLauncher::new(0).err().map(|unavailable| unavailable.to_string()),
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

/// What is missing beside a driver or a GPU: who is told of these alone gets them, and is no further without kernels.
#[cfg(feature = "cuda")]
fn without_driver(unavailable: &Unavailable, kernels: bool) -> String {
    match kernels {
        true => unavailable.to_string(),
        false => format!("{}; and {unavailable}", Unavailable::NoKernels),
    }
}

/// There is none in a build without the feature.
#[cfg(not(feature = "cuda"))]
pub(crate) fn cuda() -> Cuda {
    Cuda { reason: Some(NOT_BUILT.to_owned()), driver: None, devices: Vec::new(), kernels: Vec::new() }
}

#[cfg(not(feature = "cuda"))]
const NOT_BUILT: &str = "this program was built without the feature `cuda`";

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_missing_is_told() {
        let none = Unavailable::NoDriver;
        assert_eq!(without_driver(&none, true), none.to_string());
        let said = without_driver(&none, false);
        assert!(said.starts_with(&Unavailable::NoKernels.to_string()) && said.ends_with(&none.to_string()));
    }
}
