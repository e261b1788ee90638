//! From the path of a model to an engine that is ready to read.

use std::ops::ControlFlow;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use fastkv::backend::Backend;
use fastkv::backend::cpu::CpuBackend;
use fastkv::engine::{Cancel, Engine, MemoryEstimate, MemoryOptions};
use fastkv::model::ModelDir;
use fastkv::policy::Plan;

use crate::device::{self, Chosen, Device, Needs};
use crate::progress;

/// The model and the machine.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model and machine")]
pub(crate) struct ModelOptions {
    /// Directory of a Llama or Mistral model as Hugging Face publishes it
    #[arg(long, value_name = "DIR", env = "FASTKV_MODEL")]
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) machine: MachineOptions,
}

/// The machine.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Model and machine")]
pub(crate) struct MachineOptions {
    /// Where to compute
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    device: Device,
    /// Worker threads of the CPU [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// Memory to stay within, such as 8GiB [default: what the machine has free]
    #[arg(long, value_name = "SIZE", value_parser = bytes, allow_hyphen_values = true)]
    memory_limit: Option<u64>,
}

impl ModelOptions {
    /// The backend for the model, and why that one.
    pub(crate) fn backend(&self, model: &ModelDir) -> Result<(Chosen, String)> {
        self.machine.backend(Some(model.into()))
    }

    /// The model's directory, and where it is to run.
    pub(crate) fn open(&self) -> Result<(ModelDir, Chosen)> {
        let model = ModelDir::open(&self.model)?;
        let (backend, _) = self.backend(&model)?;
        Ok((model, backend))
    }

    /// Loads the model, once it is clear that the plans fit into memory with as many tokens behind
    /// the prompt, and that the weights are numbers.
    pub(crate) fn load<'a, B: Backend>(
        &self,
        model: &ModelDir,
        backend: B,
        plans: impl IntoIterator<Item = &'a Plan>,
        more_tokens: usize,
        hide_progress: bool,
        cancel: &Cancel,
    ) -> Result<Engine<B>> {
        for plan in plans {
            estimate(model, plan, more_tokens, &backend).check(self.machine.available_memory(&backend))?;
        }
        self.machine.load(model, backend, hide_progress, cancel)
    }
}

impl MachineOptions {
    /// The backend, and why that one.
    pub(crate) fn backend(&self, model: Option<Needs<'_>>) -> Result<(Chosen, String)> {
        device::backend(self.device, self.threads.map(usize::from), model)
    }

    /// Loads a model that is known to fit, once it is clear that its weights are numbers.
    pub(crate) fn load<B: Backend>(
        &self,
        model: &ModelDir,
        backend: B,
        hide_progress: bool,
        cancel: &Cancel,
    ) -> Result<Engine<B>> {
        check_weights(model, self.threads.map_or(0, usize::from), hide_progress, cancel)?;
        let bar = progress::bar(hide_progress, model.weights.total_bytes(), "loading weights");
        let engine = Engine::load_with(backend, model, |done, _| {
            bar.set_position(done);
            if cancel.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        bar.finish_and_clear();
        Ok(engine?)
    }

    /// The CPU, where a GPU would bring nothing.
    pub(crate) fn cpu(&self) -> Result<CpuBackend> {
        if self.device == Device::Cuda {
            bail!("--device cuda: this runs on the cpu only");
        }
        Ok(CpuBackend::new(self.threads.map(usize::from))?)
    }

    /// Worker threads of the CPU.
    pub(crate) fn threads(&self) -> Result<usize> {
        Ok(CpuBackend::new(self.threads.map(usize::from))?.threads())
    }

    /// Bytes of memory that a run may take: what is free on the device, or here within the limits of a
    /// container.
    pub(crate) fn available_memory(&self, backend: &impl Backend) -> u64 {
        if let Some(bytes) = self.memory_limit.or_else(|| backend.free_memory()) {
            return bytes;
        }
        // A machine that does not say is not held to be full.
        let Ok(mut system) = sysinfo::System::new() else { return u64::MAX };
        system.refresh_memory();
        // Not its free memory: that leaves out the file cache, which gives way.
        let container = system.cgroup_limits().map(|limits| limits.total_memory.saturating_sub(limits.rss));
        system.available_memory().min(container.unwrap_or(u64::MAX))
    }
}

/// What a plan will take.
pub(crate) fn estimate(
    model: &ModelDir,
    plan: &Plan,
    more_tokens: usize,
    backend: &impl Backend,
) -> MemoryEstimate {
    MemoryEstimate::new(&model.config, plan, &memory_options(model, more_tokens, backend))
}

/// What a run of the model takes besides its plan; no more tokens follow than its context takes.
pub(crate) fn memory_options(model: &ModelDir, more_tokens: usize, backend: &impl Backend) -> MemoryOptions {
    let more_tokens = more_tokens.min(model.config.context_limit().tokens);
    MemoryOptions::new(backend, weight_bytes(model, backend), more_tokens)
}

/// Bytes of the weights as the backend holds them.
pub(crate) fn weight_bytes(model: &ModelDir, backend: &impl Backend) -> u64 {
    model.weights.tensors().map(|tensor| backend.weight_bytes(tensor)).sum()
}

fn check_weights(model: &ModelDir, threads: usize, hide_progress: bool, cancel: &Cancel) -> Result<()> {
    let bar = progress::bar(hide_progress, model.weights.total_bytes(), "reading weights");
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let report = |done, _| {
        bar.set_position(done);
        if cancel.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let checked = pool.install(|| model.weights.check_finite(report));
    bar.finish_and_clear();
    Ok(checked?)
}

/// A size such as `8GiB`, `500 MB`, `2g` (GiB) or a number of bytes.
fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || "give a size such as 8GiB, 500MB or a number of bytes".to_owned();
    let digits = text.find(|char: char| !(char.is_ascii_digit() || char == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(wrong()),
    };
    Ok((number * factor as f64) as u64)
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn sizes_are_read() {
        assert_eq!(bytes("8GiB"), Ok(8 << 30));
        assert_eq!(bytes("0.5 g"), Ok(1 << 29));
        assert_eq!(bytes("500MB"), Ok(500_000_000));
        assert_eq!(bytes("4096"), Ok(4096));
        for wrong in ["", "GiB", "8 bananas", "-1", "1.2.3"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
