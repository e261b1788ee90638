//! `fastkv generate`.

use std::path::Path;

use anyhow::Result;
use clap::Args;
use fastkv::backend::Backend;
use fastkv::engine::{Bytes, Cancel, Engine, FinishReason, Progress};
use fastkv::messages::count;
use fastkv::model::ModelDir;
use fastkv::policy::{ModelShape, Plan};
use serde::Serialize;

use crate::answer::{Answer, AnswerOptions, Task};
use crate::device::on;
use crate::input::PromptOptions;
use crate::loading::{self, ModelOptions};
use crate::options::{PolicyName, PolicyOptions};
use crate::steering::SteeringOptions;
use crate::{exit, output, progress};

/// Answer a prompt.
///
/// The answer goes to stdout as it comes, figures go to stderr.
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
    #[command(flatten)]
    answer: AnswerOptions,
    /// Print one JSON object when done, and nothing else
    #[arg(long, help_heading = "Output")]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    model: &'a Path,
    device: &'a str,
    device_reason: &'a str,
    policy: String,
    prompt_tokens: usize,
    question_tokens: usize,
    kv_full_bytes: u64,
    #[serde(flatten)]
    answer: &'a Answer,
    plan: &'a Plan,
}

pub(crate) fn run(arguments: &Arguments, cancel: &Cancel) -> Result<()> {
    let mut policies = arguments.policy_options.policies(&[arguments.policy])?;
    arguments.answer.sampling()?;
    let model = ModelDir::open(&arguments.model.model)?;
    let prompt = arguments.prompt.read(&model, arguments.answer.question.as_deref())?;
    arguments.policy_options.complete(&mut policies, &model)?;
    let plan = policies[0].plan(ModelShape::from(&model.config), prompt.ids.len())?;
    let plan = arguments.steering.apply(plan, &prompt)?;
    let task =
        Task::new(&model, &prompt, &arguments.answer, arguments.policy_options.exact_shortcuts(), cancel)?;
    let more_tokens = prompt.question.len().saturating_add(arguments.answer.max_tokens);
    let (backend, device_reason) = arguments.model.backend(&model)?;
    let (device, kv_full_bytes, answer) = on!(backend, backend => {
        let device = backend.name();
        let kv_full_bytes = loading::estimate(&model, &plan, 0, &backend).kv_full;
        let engine = arguments.model.load(&model, backend, [&plan], more_tokens, arguments.json, cancel);
        let answer = match engine {
            Err(error) if exit::is_cancelled(&error) => task.cancelled(),
            engine => answer(&task, &engine?, &plan, arguments.json)?,
        };
        (device, kv_full_bytes, answer)
    });
    if arguments.json {
        output::print(&output::json(&Report {
            model: &model.path,
            device: &device,
            device_reason: &device_reason,
            policy: arguments.policy.text(),
            prompt_tokens: prompt.ids.len(),
            question_tokens: prompt.question.len(),
            kv_full_bytes,
            answer: &answer,
            plan: &plan,
        })?)
    } else {
        eprintln!("{}", figures(&answer, prompt.ids.len(), kv_full_bytes));
        Ok(())
    }
}

fn answer<B: Backend>(task: &Task<'_>, engine: &Engine<B>, plan: &Plan, quiet: bool) -> Result<Answer> {
    let bar = progress::bar(quiet, 1, "reading the prompt");
    let report = |progress: Progress| {
        bar.set_length(progress.total as u64);
        bar.set_position(progress.done as u64);
    };
    let mut show = |piece: &str| {
        bar.finish_and_clear();
        if quiet { Ok(()) } else { output::print(piece.as_bytes()) }
    };
    let answer = task.run(engine, plan, &report, &mut show)?;
    show("\n")?;
    Ok(answer)
}

/// The figures in a line.
fn figures(answer: &Answer, prompt_tokens: usize, kv_full_bytes: u64) -> String {
    let finish = match answer.finish {
        FinishReason::Stop => "stopped by itself",
        FinishReason::MaxTokens => "stopped at --max-tokens",
        FinishReason::ContextFull => "the model's context is full",
        FinishReason::Cancelled => "cancelled",
    };
    let mut parts = vec![format!("{} read, {} written", count(prompt_tokens, "token"), answer.tokens.len())];
    if let Some(seconds) = answer.ttft_s {
        parts.push(format!("TTFT {seconds:.3} s"));
    }
    if let Some(rate) = answer.decode_tokens_per_s {
        parts.push(format!("{rate:.1} tokens/s"));
    }
    if let (Some(kept), Some(peak)) = (answer.kv_kept_bytes, answer.kv_peak_bytes) {
        let [kept, full, peak] = [kept as u64, kv_full_bytes, peak as u64].map(Bytes);
        parts.push(format!("KV cache {kept} of {full}, peak {peak}"));
    }
    parts.push(finish.to_owned());
    parts.join("; ")
}
