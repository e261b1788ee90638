//! `fastkv info`.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use fastkv::backend::Backend;
use fastkv::engine::{Bytes, MemoryEstimate};
use fastkv::messages::count;
use fastkv::model::{LlamaConfig, ModelDir, ModelError};
use fastkv::policy::ModelShape;
use serde::Serialize;

use crate::device::{self, Cuda, on};
use crate::exit::Usage;
use crate::loading::{self, MachineOptions};
use crate::options::{PolicyName, PolicyOptions};
use crate::output;

/// Show devices, kernels, a model, and the memory a prompt will need.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Directory of a Llama or Mistral model as Hugging Face publishes it
    #[arg(long, value_name = "DIR", env = "FASTKV_MODEL", help_heading = "Model and machine")]
    model: Option<PathBuf>,
    #[command(flatten)]
    machine: MachineOptions,
    /// Tokens of the prompt that memory is told for [default: 4096, or the model's context]
    #[arg(long, value_name = "N", requires = "model")]
    tokens: Option<usize>,
    #[command(flatten)]
    policy_options: PolicyOptions,
    /// Print one JSON object
    #[arg(long, help_heading = "Output")]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    version: &'static str,
    device: String,
    device_reason: String,
    cpu_threads: usize,
    cuda: Cuda,
    memory_available_bytes: u64,
    model: Option<Model<'a>>,
    /// For each policy.
    memory: Vec<Memory>,
}

#[derive(Serialize)]
struct Model<'a> {
    path: &'a Path,
    config: &'a LlamaConfig,
    parameters: u64,
    weights_bytes: u64,
    dtypes: BTreeSet<String>,
    context_tokens: usize,
    context_reason: String,
    stop_tokens: &'a [u32],
    tokenizer: String,
    chat_template: String,
}

#[derive(Serialize)]
struct Memory {
    policy: String,
    prompt_tokens: usize,
    #[serde(flatten)]
    estimate: MemoryEstimate,
    total_bytes: u64,
    fits: bool,
}

const DEFAULT_TOKENS: usize = 4096;

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let model = arguments.model.as_ref().map(ModelDir::open).transpose()?;
    let (backend, device_reason) = arguments.machine.backend(model.as_ref().map(Into::into))?;
    let cpu_threads = arguments.machine.threads()?;
    let (device, available, memory) = on!(backend, backend => {
        let available = arguments.machine.available_memory(&backend);
        let memory = match &model {
            Some(model) => memory(arguments, model, &backend, available)?,
            None => Vec::new(),
        };
        (backend.name(), available, memory)
    });
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        device,
        device_reason,
        cpu_threads,
        cuda: device::cuda(),
        memory_available_bytes: available,
        model: model.as_ref().map(Model::of),
        memory,
    };
    output::print(&if arguments.json { output::json(&report)? } else { readable(&report)?.into_bytes() })
}

fn memory(
    arguments: &Arguments,
    model: &ModelDir,
    backend: &impl Backend,
    available: u64,
) -> Result<Vec<Memory>> {
    let limit = model.config.context_limit();
    let tokens = arguments.tokens.unwrap_or(DEFAULT_TOKENS.min(limit.tokens));
    if !(1..=limit.tokens).contains(&tokens) {
        bail!(Usage(format!("--tokens {tokens}: give 1 to {} ({})", limit.tokens, limit.reason)));
    }
    let shape = ModelShape::from(&model.config);
    // Budgets from head scores need those, and come to the same in all.
    let singles = PolicyName::singles().into_iter();
    let names: Vec<PolicyName> = singles.filter(|name| *name != PolicyName::Headkv).collect();
    let policies = arguments.policy_options.policies(&names)?;
    let row = |(name, policy): (PolicyName, fastkv::policy::Policy)| {
        let estimate = loading::estimate(model, &policy.plan(shape, tokens)?, 0, backend);
        Ok(Memory {
            policy: name.text(),
            prompt_tokens: tokens,
            estimate,
            total_bytes: estimate.total(),
            fits: estimate.check(available).is_ok(),
        })
    };
    names.into_iter().zip(policies).map(row).collect()
}

impl<'a> Model<'a> {
    fn of(model: &'a ModelDir) -> Self {
        let limit = model.config.context_limit();
        let tensors = || model.weights.tensors();
        let found = |error: Option<ModelError>| match error {
            None => "yes".to_owned(),
            Some(ModelError::FileMissing { .. }) => "none".to_owned(),
            Some(error) => format!("unusable: {error}"),
        };
        Self {
            path: &model.path,
            config: &model.config,
            parameters: tensors().map(|tensor| tensor.shape().iter().product::<usize>() as u64).sum(),
            weights_bytes: model.weights.total_bytes(),
            dtypes: tensors().map(|tensor| tensor.dtype().to_string()).collect(),
            context_tokens: limit.tokens,
            context_reason: limit.reason,
            stop_tokens: &model.generation.stop_tokens,
            tokenizer: found(model.tokenizer().err()),
            chat_template: match model.chat_template() {
                Ok(None) => "none".to_owned(),
                other => found(other.err()),
            },
        }
    }
}

fn readable(report: &Report<'_>) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "fastkv {}", report.version)?;
    writeln!(text, "device     {} ({})", report.device, report.device_reason)?;
    for (index, gpu) in report.cuda.devices.iter().enumerate() {
        let (major, minor) = gpu.compute_capability;
        let memory = Bytes(gpu.memory_bytes);
        writeln!(text, "cuda {index}     {}, compute capability {major}.{minor}, {memory}", gpu.name)?;
    }
    if let Some(reason) = &report.cuda.reason {
        writeln!(text, "cuda       not used: {reason}")?;
    }
    let kernels = report.cuda.kernels.iter();
    let kernels: Vec<String> =
        kernels.map(|image| format!("{} ({})", image.name, image.architectures.join(", "))).collect();
    let kernels = if kernels.is_empty() { "none in this build".to_owned() } else { kernels.join("; ") };
    writeln!(text, "kernels    {kernels}")?;
    writeln!(text, "memory     {} available", Bytes(report.memory_available_bytes))?;
    let Some(model) = &report.model else {
        writeln!(text, "model      none given (--model DIR)")?;
        return Ok(text);
    };
    let config = model.config;
    let dtypes: Vec<&str> = model.dtypes.iter().map(String::as_str).collect();
    writeln!(text, "model      {}", model.path.display())?;
    writeln!(
        text,
        "           {} layers of {} query heads over {} kv heads of {}, width {}, MLP {}, vocabulary {}",
        config.num_layers,
        config.query_heads,
        config.kv_heads,
        config.head_dim,
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size
    )?;
    writeln!(
        text,
        "           {:.1} million parameters, {} in {}",
        model.parameters as f64 / 1e6,
        Bytes(model.weights_bytes),
        dtypes.join(", ")
    )?;
    writeln!(text, "           context {} tokens ({})", model.context_tokens, model.context_reason)?;
    writeln!(text, "           tokenizer: {}; chat template: {}", model.tokenizer, model.chat_template)?;
    let tokens = count(report.memory.first().map_or(0, |row| row.prompt_tokens), "token");
    writeln!(text, "\nmemory for a prompt of {tokens}, at most\n{}", memory_table(&report.memory))?;
    Ok(text)
}

fn memory_table(rows: &[Memory]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header([
        "policy",
        "weights",
        "KV full",
        "KV kept",
        "KV peak",
        "activations",
        "in all",
        "fits",
    ]);
    for row in rows {
        let MemoryEstimate { weights, kv_full, kv_kept, kv_peak, activations, .. } = row.estimate;
        let bytes = [weights, kv_full, kv_kept, kv_peak, activations, row.total_bytes];
        let bytes = bytes.map(|bytes| Bytes(bytes).to_string());
        let fits = if row.fits { "yes" } else { "no" };
        let cells: Vec<String> =
            [row.policy.clone()].into_iter().chain(bytes).chain([fits.to_owned()]).collect();
        table.add_row(cells);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
