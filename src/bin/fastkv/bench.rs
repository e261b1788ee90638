//! `fastkv bench`.

use std::cell::Cell;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use clap::builder::PossibleValuesParser;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use fastkv::backend::{Backend, BackendError};
use fastkv::engine::{
    Bytes, Cancel, Control, Engine, EngineError, MemoryEstimate, MemoryOptions, Prefill, PrefillOptions,
    Progress, Prompt,
};
use fastkv::measure::{
    Measurable, SHAPES, StageSeconds, Staged, TimedPrefill, decode, median, parameters, prefill_by_stage,
    prefill_flops, random_engine, random_prompts, shape,
};
use fastkv::messages::count;
use fastkv::model::{ContextLimit, Dtype, LlamaConfig, ModelDir};
use fastkv::policy::{ModelShape, Plan, Policy};
use fastkv::report::{Bench, BenchSettings, Measured, Skipped};

use crate::device::{Needs, on};
use crate::exit::Usage;
use crate::loading::{self, MachineOptions};
use crate::options::{PolicyName, PolicyOptions};
use crate::output::{self, OverwriteOptions};
use crate::{exit, progress};

/// Measure time to first token, decoding and memory on this machine.
///
/// Prompts are random tokens. Policies take turns, so that whatever slows the machine down hits all alike.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Directory of a Llama or Mistral model as Hugging Face publishes it [env: FASTKV_MODEL]
    #[arg(long, value_name = "DIR", conflicts_with = "shape", help_heading = "Model and machine")]
    model: Option<PathBuf>,
    /// Random weights in the shape of this model; small and tiny are for a CPU
    #[arg(long, value_parser = shapes(), help_heading = "Model and machine")]
    shape: Option<String>,
    #[command(flatten)]
    machine: MachineOptions,
    /// Lengths of the context [default: from 8192 to 131072 on a GPU, from 1024 to 8192 on a CPU, as far as the model
    /// takes them]
    #[arg(long, value_name = "N", value_delimiter = ',', num_args = 1..)]
    tokens: Vec<usize>,
    /// Prompts that are read and answered together
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    batch: u16,
    /// Tokens that each answer has; below 4 decoding is not measured
    #[arg(long, value_name = "N", default_value_t = 32)]
    decode: usize,
    /// Seed of the prompts and of random weights
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    prompt_seed: u64,
    /// The policies; each takes those of the policy options that it has
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        num_args = 1..,
        default_values_t = [PolicyName::Full, PolicyName::Fastkv, PolicyName::Snapkv],
        help_heading = "Policy options"
    )]
    policies: Vec<PolicyName>,
    #[command(flatten)]
    policy_options: PolicyOptions,
    /// Runs of each policy and length; times are medians
    #[arg(
        long,
        value_name = "N",
        default_value_t = 3,
        value_parser = clap::value_parser!(u16).range(1..),
        help_heading = "Output"
    )]
    repeat: u16,
    /// Runs of each policy and length before those that count
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Output")]
    warm_up: u16,
    /// Print one JSON object instead of the table
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Write the JSON object to a file as well
    #[arg(long, value_name = "FILE.json", help_heading = "Output")]
    out: Option<PathBuf>,
    /// Draw time to first token, speed-up and decoding over the length
    #[arg(long, value_name = "FILE.svg", help_heading = "Output")]
    picture: Option<PathBuf>,
    #[command(flatten)]
    overwrite: OverwriteOptions,
}

fn shapes() -> PossibleValuesParser {
    SHAPES.map(|(name, _)| name).into()
}

/// Lengths without `--tokens`: on a device with a memory of its own, and elsewhere.
const LENGTHS: [&[usize]; 2] = [&[8192, 16_384, 32_768, 65_536, 131_072], &[1024, 2048, 4096, 8192]];

/// What is measured: a model, or random weights of a shape.
enum Subject {
    Model(Box<ModelDir>),
    Shape(String, Box<LlamaConfig>),
}

/// A policy at a length.
struct Job {
    name: PolicyName,
    plan: Plan,
    /// Keys and values of all prompts in every layer.
    kv_full_bytes: u64,
    runs: Vec<Run>,
    /// Why it cannot be run, once that is known.
    skipped: Option<String>,
}

/// One run.
struct Run {
    ttft_s: f64,
    flops: f64,
    stages_s: Option<StageSeconds>,
    decode_tokens_per_s: Option<f64>,
    kv_kept_bytes: usize,
    kv_peak_bytes: usize,
    memory_peak_bytes: Option<usize>,
}

pub(crate) fn run(arguments: &Arguments, cancel: &Cancel) -> Result<()> {
    let names = &arguments.policies;
    if let Some(twice) = names.iter().enumerate().find(|(index, name)| names[..*index].contains(name)) {
        bail!(Usage(format!("--policies names {} twice", twice.1.text())));
    }
    let lengths = &arguments.tokens;
    if let Some(length) = lengths
        .iter()
        .enumerate()
        .find_map(|(index, length)| (*length == 0 || lengths[..index].contains(length)).then_some(length))
    {
        bail!(Usage(format!("--tokens {length}: give lengths of at least one token, each once")));
    }
    let mut policies = arguments.policy_options.policies(names)?;
    output::check_apart(arguments.out.as_ref(), arguments.picture.as_ref())?;
    let out = arguments.overwrite.prepare_if("--out", arguments.out.as_ref())?;
    let picture = arguments.picture.as_ref().map(|path| match path.extension() {
        Some(extension) if extension == "svg" => arguments.overwrite.prepare("--picture", path),
        _ => bail!(Usage(format!("--picture {}: the name must end in .svg", path.display()))),
    });
    let picture = picture.transpose()?;
    let subject = arguments.subject()?;
    subject.complete(arguments, &mut policies)?;
    let (backend, device_reason) = arguments.machine.backend(Some(subject.needs()))?;
    let report = on!(backend, backend => {
        measure(arguments, &subject, Staged::new(backend), &policies, device_reason, cancel)?
    });
    let json = output::json(&report)?;
    if let Some(out) = out {
        out.write(&json)?;
    }
    if let Some(picture) = picture {
        picture.write(report.picture().svg().as_bytes())?;
    }
    output::print(&if arguments.json { json } else { readable(&report).into_bytes() })?;
    if report.measured.is_empty() && !report.cancelled {
        bail!("nothing could be measured: {}", report.skipped.first().map_or("", |skipped| &skipped.reason));
    }
    Ok(())
}

impl Arguments {
    fn subject(&self) -> Result<Subject> {
        let environment = || std::env::var_os("FASTKV_MODEL").map(PathBuf::from);
        match &self.shape {
            Some(name) => Ok(Subject::Shape(
                name.clone(),
                Box::new(shape(name).with_context(|| format!("--shape {name}"))?),
            )),
            None => match self.model.clone().or_else(environment) {
                Some(model) => Ok(Subject::Model(Box::new(ModelDir::open(&model)?))),
                None => {
                    let names = SHAPES.map(|(name, _)| name).join(", ");
                    bail!(Usage(format!(
                        "give a model with --model DIR, or random weights with --shape ({names})"
                    )))
                }
            },
        }
    }
}

impl Subject {
    fn config(&self) -> &LlamaConfig {
        match self {
            Self::Model(model) => &model.config,
            Self::Shape(_, config) => config,
        }
    }

    fn needs(&self) -> Needs<'_> {
        match self {
            Self::Model(model) => (&**model).into(),
            Self::Shape(_, config) => Needs { config, dtype: Dtype::Bf16 },
        }
    }

    /// Tells the policies what only a model knows.
    fn complete(&self, arguments: &Arguments, policies: &mut [Policy]) -> Result<()> {
        match self {
            Self::Model(model) => arguments.policy_options.complete(policies, model),
            Self::Shape(..) => {
                let lacks =
                    |policy: &mut Policy| policy.head_scores_mut().is_some_and(|scores| scores.is_empty());
                match policies.iter_mut().any(lacks) {
                    true => bail!(Usage(
                        "headkv needs --heads FILE: random weights have no measured heads".into()
                    )),
                    false => Ok(()),
                }
            }
        }
    }

    fn weight_bytes<B: Measurable>(&self, backend: &B) -> u64 {
        match self {
            Self::Model(model) => loading::weight_bytes(model, backend),
            Self::Shape(_, config) => parameters(config) * B::WEIGHT_ELEMENT_BYTES as u64,
        }
    }

    fn engine<B: Measurable>(&self, arguments: &Arguments, backend: B, cancel: &Cancel) -> Result<Engine<B>> {
        match self {
            Self::Model(model) => arguments.machine.load(model, backend, arguments.json, cancel),
            Self::Shape(_, config) => {
                let bar = progress::bar(arguments.json, parameters(config), "making weights");
                let engine = random_engine(backend, (**config).clone(), arguments.prompt_seed, |made| {
                    bar.inc(made as u64)
                })?;
                bar.finish_and_clear();
                Ok(engine)
            }
        }
    }
}

fn measure<B: Measurable>(
    arguments: &Arguments,
    subject: &Subject,
    backend: Staged<B>,
    policies: &[Policy],
    device_reason: String,
    cancel: &Cancel,
) -> Result<Bench> {
    let config = subject.config();
    let limit = config.context_limit();
    let mut lengths = arguments.tokens.clone();
    if lengths.is_empty() {
        let most = limit.tokens.saturating_sub(arguments.decode);
        if most == 0 {
            let ContextLimit { tokens, reason } = &limit;
            bail!(Usage(format!(
                "--decode {}: the model's context takes {tokens} tokens ({reason}), so give at most {}",
                arguments.decode,
                tokens - 1
            )));
        }
        let own_memory = backend.free_memory().is_some();
        lengths = LENGTHS[usize::from(!own_memory)].to_vec();
        lengths.retain(|length| *length <= most);
        if lengths.is_empty() {
            lengths.push(most);
        }
    }
    let (model, shape) = match subject {
        Subject::Model(model) => (Some(model.path.to_string_lossy().into_owned()), None),
        Subject::Shape(name, _) => (None, Some(name.clone())),
    };
    let weights_bytes = subject.weight_bytes(&backend);
    let mut report = Bench {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        model,
        shape,
        device: backend.name(),
        device_reason,
        settings: BenchSettings {
            lengths: lengths.clone(),
            policies: arguments.policies.iter().map(|name| name.text()).collect(),
            batch: arguments.batch.into(),
            repeat: arguments.repeat.into(),
            warm_up: arguments.warm_up.into(),
            decode_tokens: arguments.decode,
            exact_shortcuts: arguments.policy_options.exact_shortcuts(),
            seed: arguments.prompt_seed,
        },
        weights_bytes,
        cancelled: false,
        measured: Vec::new(),
        skipped: Vec::new(),
    };
    let available = arguments.machine.available_memory(&backend);
    let mut jobs: Vec<Job> = Vec::new();
    for length in &lengths {
        for (name, policy) in arguments.policies.iter().zip(policies) {
            let plan = policy.plan(ModelShape::from(config), *length)?;
            let estimate = || {
                let options = MemoryOptions::new(&backend, weights_bytes, arguments.decode);
                MemoryEstimate::together(config, &vec![&plan; arguments.batch.into()], &options)
            };
            let skipped = match length.saturating_add(arguments.decode) > limit.tokens {
                true => Some(format!("the model's context takes {} tokens ({})", limit.tokens, limit.reason)),
                false => estimate().check(available).err().map(|error| error.to_string()),
            };
            let token = plan.shape.kv_elements() * plan.layers.len() * backend.kv_element_bytes();
            let kv_full_bytes = (usize::from(arguments.batch) * token).saturating_mul(*length) as u64;
            jobs.push(Job { name: *name, plan, kv_full_bytes, runs: Vec::new(), skipped });
        }
    }
    if jobs.iter().any(|job| job.skipped.is_none()) {
        let run = |engine: Engine<Staged<B>>| run_all(arguments, &engine, &mut jobs, cancel);
        match subject.engine(arguments, backend, cancel).and_then(run) {
            Err(error) if exit::is_cancelled(&error) => {}
            done => done?,
        }
    }
    report.cancelled = cancel.is_cancelled();
    summarise(arguments, config, &jobs, &mut report)?;
    Ok(report)
}

/// Runs of all jobs, length by length, the policies of a length by turns.
fn run_all<B: Measurable>(
    arguments: &Arguments,
    engine: &Engine<Staged<B>>,
    jobs: &mut [Job],
    cancel: &Cancel,
) -> Result<()> {
    const STEPS: u64 = 1000;
    let turns = u64::from(arguments.warm_up) + u64::from(arguments.repeat);
    let bar = progress::bar(arguments.json, jobs.len() as u64 * turns * STEPS, "");
    let done = Cell::new(0);
    let report = |Progress { done: rows, total }: Progress| {
        bar.set_position(done.get() * STEPS + STEPS * rows as u64 / total.max(1) as u64);
    };
    let control = Control { cancel: Some(cancel), progress: Some(&report) };
    for jobs in jobs.chunk_by_mut(|a, b| a.plan.prompt_tokens == b.plan.prompt_tokens) {
        if jobs.iter().all(|job| job.skipped.is_some()) {
            done.set(done.get() + turns * jobs.len() as u64);
            continue;
        }
        let length = jobs[0].plan.prompt_tokens;
        let vocabulary = engine.config().vocab_size;
        let ids = random_prompts(arguments.batch.into(), length, vocabulary, arguments.prompt_seed);
        for turn in 0..turns {
            for job in &mut *jobs {
                bar.set_message(format!("{} {length}", job.name.text()));
                if job.skipped.is_none() {
                    match run_once(arguments, engine, &ids, &job.plan, &control) {
                        Ok(_) if turn < u64::from(arguments.warm_up) => {}
                        Ok(run) => job.runs.push(run),
                        Err(EngineError::Backend(error @ BackendError::OutOfMemory { .. })) => {
                            job.skipped = Some(error.to_string())
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
                done.set(done.get() + 1);
            }
        }
    }
    bar.finish_and_clear();
    Ok(())
}

fn run_once<B: Measurable>(
    arguments: &Arguments,
    engine: &Engine<Staged<B>>,
    ids: &[Vec<u32>],
    plan: &Plan,
    control: &Control<'_>,
) -> Result<Run, EngineError> {
    let backend = engine.backend();
    let options = PrefillOptions {
        exact_shortcuts: arguments.policy_options.exact_shortcuts(),
        slack: arguments.decode,
        ..PrefillOptions::default()
    };
    let prompts: Vec<Prompt<'_>> = ids.iter().map(|ids| Prompt { ids, plan }).collect();
    backend.forget_memory_peak();
    let TimedPrefill { mut prefills, seconds: ttft_s, stages: stages_s } =
        prefill_by_stage(engine, &prompts, &options, control, B::MARKED_ROWS)?;
    let exact_shortcuts = options.exact_shortcuts;
    let flops =
        |prefill: &Prefill<_>| prefill_flops(engine.config(), plan, prefill.tsp_layer, exact_shortcuts);
    let flops = prefills.iter().map(flops).sum();
    let kv_kept_bytes = prefills.iter().map(|prefill| prefill.cache.bytes(backend)).sum();
    // Its progress is that of the prompt again.
    let quiet = Control { progress: None, ..*control };
    let decode_tokens_per_s = match arguments.decode {
        ..4 => None,
        tokens => decode(engine, &mut prefills, tokens, &quiet)?,
    };
    Ok(Run {
        ttft_s,
        flops,
        stages_s,
        decode_tokens_per_s,
        kv_kept_bytes,
        kv_peak_bytes: prefills.iter().map(|prefill| prefill.peak_kv_bytes).sum(),
        memory_peak_bytes: backend.memory_peak(),
    })
}

/// Rows of the report, from runs.
fn summarise(arguments: &Arguments, config: &LlamaConfig, jobs: &[Job], report: &mut Bench) -> Result<()> {
    let batch = f64::from(arguments.batch);
    let exact_shortcuts = arguments.policy_options.exact_shortcuts();
    let ttft = |job: &Job| median(&job.runs.iter().map(|run| run.ttft_s).collect::<Vec<_>>());
    for job in jobs {
        let Job { name, plan, kv_full_bytes, runs, skipped } = job;
        let tokens = plan.prompt_tokens;
        if let Some(reason) = skipped {
            report.skipped.push(Skipped { policy: name.text(), tokens, reason: reason.clone() });
            continue;
        }
        let (Some(ttft_s), Some(last)) = (ttft(job), runs.last()) else { continue };
        let at_length = |other: &&Job| other.name == PolicyName::Full && other.plan.prompt_tokens == tokens;
        let full = jobs.iter().find(at_length).and_then(ttft);
        let full_plan = Policy::Full.plan(plan.shape, tokens)?;
        let of_full = batch * prefill_flops(config, &full_plan, None, exact_shortcuts);
        let rates: Vec<f64> = runs.iter().filter_map(|run| run.decode_tokens_per_s).collect();
        report.measured.push(Measured {
            policy: name.text(),
            options: serde_json::to_value(&plan.policy)?,
            tokens,
            ttft_s,
            ttft_runs_s: runs.iter().map(|run| run.ttft_s).collect(),
            ttft_speedup: full.map(|full| full / ttft_s),
            stages_s: last.stages_s,
            flops: last.flops,
            flop_bound: of_full / last.flops,
            decode_tokens_per_s: median(&rates),
            decode_runs_tokens_per_s: rates,
            kv_full_bytes: *kv_full_bytes,
            kv_kept_bytes: last.kv_kept_bytes as u64,
            kv_peak_bytes: last.kv_peak_bytes as u64,
            memory_peak_bytes: runs
                .iter()
                .filter_map(|run| run.memory_peak_bytes)
                .max()
                .map(|bytes| bytes as u64),
        });
    }
    Ok(())
}

fn readable(report: &Bench) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header([
        "tokens",
        "policy",
        "TTFT",
        "least to most",
        "speed-up",
        "bound",
        "decode",
        "KV kept",
        "KV peak",
        "device",
    ]);
    for row in &report.measured {
        let least = row.ttft_runs_s.iter().copied().fold(f64::INFINITY, f64::min);
        let most = row.ttft_runs_s.iter().copied().fold(0.0, f64::max);
        let cells = [
            Some(row.tokens.to_string()),
            Some(row.policy.clone()),
            Some(format!("{:.3} s", row.ttft_s)),
            Some(format!("{least:.3} to {most:.3}")),
            row.ttft_speedup.map(|ratio| format!("{ratio:.2} ×")),
            Some(format!("{:.2} ×", row.flop_bound)),
            row.decode_tokens_per_s.map(|rate| format!("{rate:.1} tok/s")),
            Some(Bytes(row.kv_kept_bytes).to_string()),
            Some(Bytes(row.kv_peak_bytes).to_string()),
            row.memory_peak_bytes.map(|bytes| Bytes(bytes).to_string()),
        ];
        table.add_row(cells.map(|cell| cell.unwrap_or_else(|| "–".to_owned())));
    }
    align(&mut table);
    let subject = match (&report.model, &report.shape) {
        (Some(model), _) => model.clone(),
        (None, shape) => format!("random weights of the shape {}", shape.as_deref().unwrap_or_default()),
    };
    let mut text = format!(
        "{subject}, {} of weights, batch {}, on {}\n",
        Bytes(report.weights_bytes),
        report.settings.batch,
        report.device
    );
    if !report.measured.is_empty() {
        text += &format!("{table}\n");
    }
    if let Some(stages) = stages(&report.measured) {
        text += &format!("Seconds of a prefill by stage:\n{stages}\n");
    }
    for Skipped { policy, tokens, reason } in &report.skipped {
        text += &format!("{policy} at {} was not measured: {reason}\n", count(*tokens, "token"));
    }
    if report.cancelled {
        text += "cancelled: what was measured by then\n";
    }
    text
}

/// What the last run of each spent where, if that was taken.
fn stages(measured: &[Measured]) -> Option<Table> {
    let mut table = Table::new();
    let names = StageSeconds::default().named().map(|(name, _)| name);
    table.load_style(UTF8_FULL_CONDENSED).set_header(["tokens", "policy"].iter().chain(&names));
    for Measured { tokens, policy, stages_s, .. } in measured {
        if let Some(stages) = stages_s {
            let seconds = stages.named().map(|(_, seconds)| format!("{seconds:.4}"));
            table.add_row([tokens.to_string(), policy.clone()].into_iter().chain(seconds));
        }
    }
    align(&mut table);
    (!table.is_empty()).then_some(table)
}

/// Numbers to the right; the policy is in the second column.
fn align(table: &mut Table) {
    for (_, column) in table.column_iter_mut().enumerate().filter(|(index, _)| *index != 1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}
