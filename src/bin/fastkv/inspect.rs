//! `fastkv inspect`.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use fastkv::backend::Backend;
use fastkv::engine::{
    Bytes, Cancel, Control, Engine, FinishReason, GenerationOptions, PrefillOptions, Progress, Sampling,
    Settled, Trace,
};
use fastkv::messages::count;
use fastkv::model::ModelDir;
use fastkv::policy::{ModelShape, Plan, Policy};
use fastkv::report::{KeptPicture, describe};
use serde::Serialize;

use crate::device::on;
use crate::exit::Usage;
use crate::input::{Prompt, PromptOptions};
use crate::loading::{self, ModelOptions};
use crate::options::{PolicyName, PolicyOptions};
use crate::output::{self, Output, OverwriteOptions};
use crate::progress;
use crate::steering::SteeringOptions;

/// Show what a policy keeps: positions, score mass, logits.
///
/// Prints one JSON object; docs/json.md names its fields.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    prompt: PromptOptions,
    #[command(flatten)]
    model: ModelOptions,
    /// What to keep of the prompt
    #[arg(long, value_enum, default_value_t = PolicyName::Fastkv, help_heading = "Policy options")]
    policy: PolicyName,
    #[command(flatten)]
    policy_options: PolicyOptions,
    #[command(flatten)]
    steering: SteeringOptions,
    /// Add this many tokens of greedy continuation; stop tokens do not end it
    #[arg(long = "continue", value_name = "N", help_heading = "Output")]
    continuation: Option<usize>,
    /// Draw the kept tokens over the prompt; HTML has the text of the prompt as well
    #[arg(long, value_name = "FILE.svg|FILE.html", help_heading = "Output")]
    picture: Option<PathBuf>,
    /// Write the JSON object to a file, and a table to stdout
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,
    /// Print the JSON object to stdout, which is the default, even with --out
    #[arg(long, help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    overwrite: OverwriteOptions,
}

/// The JSON object. Its fields are described in docs/json.md.
#[derive(Serialize)]
#[serde(tag = "fastkv", rename = "inspect")]
struct Report<'a> {
    version: &'static str,
    model: &'a Path,
    device: &'a str,
    device_reason: &'a str,
    policy: String,
    prompt_tokens: usize,
    tokens: &'a [u32],
    kv_full_bytes: u64,
    kv_kept_bytes: usize,
    kv_peak_bytes: usize,
    rows: Vec<usize>,
    kept: Vec<&'a [Vec<u32>]>,
    propagated: Vec<Option<&'a [u32]>>,
    mass: Vec<&'a [f32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    settled: Option<&'a Settled>,
    logits: &'a [f32],
    #[serde(flatten)]
    continuation: Option<Continuation>,
    plan: &'a Plan,
}

#[derive(Serialize)]
struct Continuation {
    continuation: Vec<u32>,
    continuation_text: Option<String>,
    continuation_finish: FinishReason,
}

/// A file that a picture goes to.
struct Picture {
    output: Output,
    html: bool,
}

pub(crate) fn run(arguments: &Arguments, cancel: &Cancel) -> Result<()> {
    let mut policies = arguments.policy_options.policies(&[arguments.policy])?;
    output::check_apart(arguments.out.as_ref(), arguments.picture.as_ref())?;
    let picture = arguments.picture.as_deref().map(|path| Picture::prepare(path, arguments.overwrite));
    let picture = picture.transpose()?;
    let out = arguments.overwrite.prepare_if("--out", arguments.out.as_ref())?;
    let model = ModelDir::open(&arguments.model.model)?;
    let prompt = arguments.prompt.read(&model, None)?;
    arguments.policy_options.complete(&mut policies, &model)?;
    let policy = policies.remove(0);
    let plan = policy.plan(ModelShape::from(&model.config), prompt.ids.len())?;
    let plan = arguments.steering.apply(plan, &prompt)?;
    let hide_progress = out.is_none() || arguments.json;
    let more_tokens = arguments.continuation.unwrap_or(0);
    let (backend, device_reason) = arguments.model.backend(&model)?;
    on!(backend, backend => {
        let device = backend.name();
        let kv_full_bytes = loading::estimate(&model, &plan, 0, &backend).kv_full;
        let engine = arguments.model.load(&model, backend, [&plan], more_tokens, hide_progress, cancel)?;

        let bar = progress::bar(hide_progress, 1, "reading the prompt");
        let report = |progress: Progress| {
            bar.set_length(progress.total as u64);
            bar.set_position(progress.done as u64);
        };
        let control = Control { cancel: Some(cancel), progress: Some(&report) };
        let options = PrefillOptions {
            exact_shortcuts: arguments.policy_options.exact_shortcuts(),
            trace: true,
            slack: more_tokens.min(model.config.context_limit().tokens),
        };
        let mut prefill = engine.prefill(&prompt.ids, &plan, &options, &control)?;
        bar.finish_and_clear();
        let kv_kept_bytes = prefill.cache.bytes(engine.backend());
        let logits = prefill.logits.clone();
        let continuation = match arguments.continuation {
            Some(count) => {
                Some(Continuation::generate(count, &engine, &mut prefill.cache, prefill.logits, &prompt, cancel)?)
            }
            None => None,
        };
        let trace = prefill.trace.unwrap_or_default();
        let report = Report {
            version: env!("CARGO_PKG_VERSION"),
            model: &model.path,
            device: &device,
            device_reason: &device_reason,
            policy: arguments.policy.text(),
            prompt_tokens: prompt.ids.len(),
            tokens: &prompt.ids,
            kv_full_bytes,
            kv_kept_bytes,
            kv_peak_bytes: prefill.peak_kv_bytes,
            rows: trace.layers.iter().map(|layer| layer.rows).collect(),
            kept: trace.layers.iter().map(|layer| layer.kept.as_slice()).collect(),
            propagated: trace.layers.iter().map(|layer| layer.propagated.as_deref()).collect(),
            mass: trace.layers.iter().map(|layer| layer.mass.as_slice()).collect(),
            settled: trace.settled.as_ref(),
            logits: &logits,
            continuation,
            plan: &plan,
        };
        if let Some(picture) = picture {
            picture.write(&report, &policy, &trace, &prompt)?;
        }
        let json = output::json(&report)?;
        if let Some(out) = &out {
            out.write(&json)?;
        }
        output::print(&if out.is_none() || arguments.json { json } else { table(&report).into_bytes() })
    })
}

impl Continuation {
    fn generate<B: Backend>(
        count: usize,
        engine: &Engine<B>,
        cache: &mut fastkv::cache::Cache<B>,
        logits: Vec<f32>,
        prompt: &Prompt,
        cancel: &Cancel,
    ) -> Result<Self> {
        let options =
            GenerationOptions { max_tokens: count, sampling: Sampling::default(), stop_tokens: Vec::new() };
        let control = Control { cancel: Some(cancel), progress: None };
        let generated = engine.generate(cache, logits, &options, &control, |_| {})?;
        let text = prompt.tokenizer.as_ref().map(|tokenizer| tokenizer.decode(&generated.tokens, true));
        Ok(Self {
            continuation_text: text.transpose()?,
            continuation: generated.tokens,
            continuation_finish: generated.finish,
        })
    }
}

impl Picture {
    fn prepare(path: &Path, overwrite: OverwriteOptions) -> Result<Self> {
        let html = match path.extension().and_then(|extension| extension.to_str()) {
            Some("svg") => false,
            Some("html" | "htm") => true,
            _ => bail!(Usage(format!(
                "--picture {}: the name must end in .svg or .html, which says what to draw",
                path.display()
            ))),
        };
        Ok(Self { output: overwrite.prepare("--picture", path)?, html })
    }

    fn write(&self, report: &Report<'_>, policy: &Policy, trace: &Trace, prompt: &Prompt) -> Result<()> {
        let subtitle = format!(
            "{}, {}; {}",
            report.model.file_name().unwrap_or(report.model.as_os_str()).to_string_lossy(),
            count(report.prompt_tokens, "token"),
            cache_figures(report)
        );
        let picture = KeptPicture {
            title: &describe(policy),
            subtitle: &subtitle,
            prompt_tokens: report.prompt_tokens,
            trace,
        };
        let text = if self.html { picture.html(&prompt.pieces()?) } else { picture.svg() };
        self.output.write(text.as_bytes())
    }
}

fn cache_figures(report: &Report<'_>) -> String {
    let [kept, full, peak] =
        [report.kv_kept_bytes as u64, report.kv_full_bytes, report.kv_peak_bytes as u64].map(Bytes);
    let share = 100.0 * report.kv_kept_bytes as f64 / report.kv_full_bytes as f64;
    format!("KV cache {kept} of {full} ({share:.1} %), peak {peak}")
}

/// What there is to see at a glance.
fn table(report: &Report<'_>) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header([
        "layer",
        "reads",
        "kept per kv head",
        "mass per kv head",
        "go on",
    ]);
    let list = |items: Vec<String>| match items.as_slice() {
        [first, rest @ ..] if rest.iter().all(|item| item == first) => first.clone(),
        _ => items.join(" "),
    };
    for (layer, rows) in report.rows.iter().enumerate() {
        table.add_row([
            layer.to_string(),
            rows.to_string(),
            list(report.kept[layer].iter().map(|kept| kept.len().to_string()).collect()),
            list(report.mass[layer].iter().map(|mass| format!("{mass:.3}")).collect()),
            report.propagated[layer].map_or_else(String::new, |positions| positions.len().to_string()),
        ]);
    }
    let settled = report.settled.map_or_else(String::new, settled);
    format!("{}\n{table}\n{settled}{}\n", describe(&report.plan.policy), cache_figures(report))
}

/// Where tokens went on, and why.
fn settled(settled: &Settled) -> String {
    let overlaps = settled.overlaps.iter().map(|overlap| format!("{} {:.2}", overlap.layer, overlap.share));
    let overlaps: Vec<String> = overlaps.collect();
    let from = settled.layer.map_or_else(|| "no layer".to_owned(), |layer| format!("layer {layer}"));
    format!("tokens go on from {from}; overlap with the layer before: {}\n", overlaps.join(", "))
}
