//! `fastkv compare`.

use std::cell::Cell;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use fastkv::backend::Backend;
use fastkv::engine::{Bytes, Cancel, Engine, FinishReason, Progress};
use fastkv::messages::count;
use fastkv::model::ModelDir;
use fastkv::policy::{ModelShape, Plan, Policy};
use serde::Serialize;

use crate::answer::{Answer, AnswerOptions, Task};
use crate::device::on;
use crate::exit::Usage;
use crate::input::PromptOptions;
use crate::loading::{self, ModelOptions};
use crate::options::{PolicyName, PolicyOptions};
use crate::output::{self, OverwriteOptions};
use crate::steering::SteeringOptions;
use crate::{exit, progress};

/// Answer one prompt with several policies side by side.
///
/// Runs take turns, policy by policy, so that whatever slows the machine down hits all alike.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    prompt: PromptOptions,
    #[command(flatten)]
    model: ModelOptions,
    /// The policies; each takes those of the policy options that it has
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_values_t = [PolicyName::Full, PolicyName::Fastkv, PolicyName::Snapkv, PolicyName::Streamingllm],
        help_heading = "Policy options"
    )]
    policies: Vec<PolicyName>,
    #[command(flatten)]
    policy_options: PolicyOptions,
    #[command(flatten)]
    steering: SteeringOptions,
    #[command(flatten)]
    answer: AnswerOptions,
    /// Runs of each policy; times are medians
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = clap::value_parser!(u16).range(1..),
        help_heading = "Output"
    )]
    repeat: u16,
    /// Print one JSON object instead of the table
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Write the JSON object to a file as well
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,
    #[command(flatten)]
    overwrite: OverwriteOptions,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    model: &'a Path,
    device: &'a str,
    device_reason: &'a str,
    prompt_tokens: usize,
    question_tokens: usize,
    kv_full_bytes: u64,
    /// Whether Ctrl-C left policies or runs out.
    cancelled: bool,
    policies: Vec<Row<'a>>,
}

/// A policy's answer beside that of the full context.
#[derive(Serialize)]
struct Row<'a> {
    policy: String,
    runs: usize,
    /// The answer of the first run, times the medians of all.
    #[serde(flatten)]
    answer: Answer,
    ttft_speedup: Option<f64>,
    kv_kept_share: Option<f64>,
    agreement: Option<Agreement>,
    plan: &'a Plan,
}

/// How far an answer is that of the full context.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Agreement {
    /// Tokens before the first difference, as a share of the longer answer.
    equal_leading_tokens: f64,
    same_answer: bool,
}

/// Tokens that are read once, unmeasured, to page the weights in and wake the threads.
const WARM_UP_TOKENS: usize = 512;

pub(crate) fn run(arguments: &Arguments, cancel: &Cancel) -> Result<()> {
    let names = &arguments.policies;
    if let Some(twice) = names.iter().enumerate().find(|(index, name)| names[..*index].contains(name)) {
        bail!(Usage(format!("--policies names {} twice", twice.1.text())));
    }
    let mut policies = arguments.policy_options.policies(names)?;
    arguments.answer.sampling()?;
    let out = arguments.overwrite.prepare_if("--out", arguments.out.as_ref())?;
    let model = ModelDir::open(&arguments.model.model)?;
    let prompt = arguments.prompt.read(&model, arguments.answer.question.as_deref())?;
    let shape = ModelShape::from(&model.config);
    arguments.policy_options.complete(&mut policies, &model)?;
    let plan = |policy: &Policy| arguments.steering.apply(policy.plan(shape, prompt.ids.len())?, &prompt);
    let plans = policies.iter().map(plan).collect::<Result<Vec<_>>>()?;
    let exact_shortcuts = arguments.policy_options.exact_shortcuts();
    let task = Task::new(&model, &prompt, &arguments.answer, exact_shortcuts, cancel)?;
    let more_tokens = prompt.question.len().saturating_add(arguments.answer.max_tokens);
    let (backend, device_reason) = arguments.model.backend(&model)?;
    let (device, kv_full_bytes, runs) = on!(backend, backend => {
        let device = backend.name();
        let kv_full_bytes = loading::estimate(&model, &plans[0], 0, &backend).kv_full;
        let engine = arguments.model.load(&model, backend, &plans, more_tokens, arguments.json, cancel);
        let runs = match engine.and_then(|engine| measure(&task, &engine, names, &plans, arguments)) {
            Err(error) if exit::is_cancelled(&error) => vec![Vec::new(); plans.len()],
            runs => runs?,
        };
        (device, kv_full_bytes, runs)
    });
    let report = Report {
        model: &model.path,
        device: &device,
        device_reason: &device_reason,
        prompt_tokens: prompt.ids.len(),
        question_tokens: prompt.question.len(),
        kv_full_bytes,
        cancelled: cancel.is_cancelled(),
        policies: rows(names, &plans, &runs, kv_full_bytes),
    };
    let json = output::json(&report)?;
    if let Some(out) = out {
        out.write(&json)?;
    }
    output::print(&if arguments.json { json } else { readable(&report)?.into_bytes() })
}

/// The runs of each policy; fewer where Ctrl-C came in between.
fn measure<B: Backend>(
    task: &Task<'_>,
    engine: &Engine<B>,
    names: &[PolicyName],
    plans: &[Plan],
    arguments: &Arguments,
) -> Result<Vec<Vec<Answer>>> {
    const STEPS: u64 = 1000;
    let repeat = usize::from(arguments.repeat);
    let bar = progress::bar(arguments.json, (repeat * plans.len()) as u64 * STEPS, "warming up");
    warm_up(task, engine, plans)?;
    let mut runs = vec![Vec::new(); plans.len()];
    let done = Cell::new(0);
    let report = |Progress { done: rows, total }: Progress| {
        bar.set_position(done.get() * STEPS + STEPS * rows as u64 / total.max(1) as u64);
    };
    for turn in 1..=repeat {
        for ((name, plan), runs) in names.iter().zip(plans).zip(&mut runs) {
            if task.cancel.is_cancelled() {
                break;
            }
            let turn = if repeat > 1 { format!(" {turn}/{repeat}") } else { String::new() };
            bar.set_message(format!("{}{turn}", name.text()));
            runs.push(task.run(engine, plan, &report, &mut |_| Ok(()))?);
            done.set(done.get() + 1);
        }
    }
    bar.finish_and_clear();
    Ok(runs)
}

fn warm_up<B: Backend>(task: &Task<'_>, engine: &Engine<B>, plans: &[Plan]) -> Result<()> {
    let ids = &task.prompt.ids[..task.prompt.ids.len().min(WARM_UP_TOKENS)];
    let plan = Policy::Full.plan(plans[0].shape, ids.len())?;
    let control = fastkv::engine::Control { cancel: Some(task.cancel), progress: None };
    engine.prefill(ids, &plan, &Default::default(), &control)?;
    Ok(())
}

fn rows<'a>(
    names: &[PolicyName],
    plans: &'a [Plan],
    runs: &[Vec<Answer>],
    kv_full_bytes: u64,
) -> Vec<Row<'a>> {
    let answers: Vec<Option<Answer>> = runs.iter().map(|runs| summary(runs)).collect();
    let full = names.iter().position(|name| *name == PolicyName::Full);
    let full = full.and_then(|index| answers[index].clone());
    let row = |index: usize| {
        let answer = answers[index].clone()?;
        Some(Row {
            policy: names[index].text(),
            runs: runs[index].len(),
            ttft_speedup: full.as_ref().and_then(|full| Some(full.ttft_s? / answer.ttft_s?)),
            kv_kept_share: answer.kv_kept_bytes.map(|bytes| bytes as f64 / kv_full_bytes as f64),
            agreement: full.as_ref().and_then(|full| Agreement::of(&answer, full)),
            answer,
            plan: &plans[index],
        })
    };
    (0..names.len()).filter_map(row).collect()
}

/// The first answer with the median times of all runs.
fn summary(runs: &[Answer]) -> Option<Answer> {
    let median = |time: fn(&Answer) -> Option<f64>| {
        let times: Vec<f64> = runs.iter().filter_map(time).collect();
        fastkv::measure::median(&times)
    };
    Some(Answer {
        ttft_s: median(|answer| answer.ttft_s),
        decode_tokens_per_s: median(|answer| answer.decode_tokens_per_s),
        ..runs.first()?.clone()
    })
}

impl Agreement {
    /// None where one of the answers was cut short.
    fn of(answer: &Answer, full: &Answer) -> Option<Self> {
        if [answer.finish, full.finish].contains(&FinishReason::Cancelled) {
            return None;
        }
        let equal = answer.tokens.iter().zip(&full.tokens).take_while(|(a, b)| a == b).count();
        let longer = answer.tokens.len().max(full.tokens.len());
        Some(Self {
            equal_leading_tokens: if longer == 0 { 1.0 } else { equal as f64 / longer as f64 },
            same_answer: answer.tokens == full.tokens,
        })
    }
}

fn readable(report: &Report<'_>) -> Result<String> {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header([
        "policy",
        "TTFT",
        "speed-up",
        "decode",
        "KV kept",
        "of full",
        "KV peak",
        "agreement",
    ]);
    for row in &report.policies {
        let bytes = |bytes: Option<usize>| bytes.map(|bytes| Bytes(bytes as u64).to_string());
        let agreement = row.agreement.map(|agreement| match agreement.same_answer {
            true => "same answer".to_owned(),
            false => format!("{:.0} % of tokens", 100.0 * agreement.equal_leading_tokens),
        });
        let cells = [
            Some(row.policy.clone()),
            row.answer.ttft_s.map(|seconds| format!("{seconds:.3} s")),
            row.ttft_speedup.map(|speedup| format!("{speedup:.2} ×")),
            row.answer.decode_tokens_per_s.map(|rate| format!("{rate:.1} tok/s")),
            bytes(row.answer.kv_kept_bytes),
            row.kv_kept_share.map(|share| format!("{:.1} %", 100.0 * share)),
            bytes(row.answer.kv_peak_bytes),
            agreement,
        ];
        table.add_row(cells.map(|cell| cell.unwrap_or_else(|| "–".to_owned())));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let mut text = format!("{} on {}\n{table}\n", count(report.prompt_tokens, "token"), report.device);
    for Row { policy, answer, .. } in &report.policies {
        let cut = if answer.finish == FinishReason::Cancelled { " (cancelled)" } else { "" };
        let words = match &answer.text {
            Some(text) => text.trim().to_owned(),
            None => format!("{:?}", answer.tokens),
        };
        writeln!(text, "{policy}{cut}: {words}")?;
    }
    if report.cancelled {
        writeln!(text, "cancelled: what was measured by then")?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(tokens: &[u32], ttft: f64) -> Answer {
        Answer {
            tokens: tokens.to_vec(),
            text: None,
            finish: FinishReason::MaxTokens,
            ttft_s: Some(ttft),
            decode_tokens_per_s: None,
            kv_kept_bytes: None,
            kv_peak_bytes: None,
        }
    }

    #[test]
    fn agreement_counts_what_leads_and_is_equal() {
        let of = |a: &[u32], b: &[u32]| Agreement::of(&answer(a, 1.0), &answer(b, 1.0)).expect("complete");
        assert_eq!(of(&[1, 2, 3, 4], &[1, 2, 9, 4]).equal_leading_tokens, 0.5);
        assert_eq!(of(&[1], &[1, 2]), Agreement { equal_leading_tokens: 0.5, same_answer: false });
        assert_eq!(of(&[], &[]), Agreement { equal_leading_tokens: 1.0, same_answer: true });
        let cut = Answer { finish: FinishReason::Cancelled, ..answer(&[1], 1.0) };
        assert_eq!(Agreement::of(&cut, &answer(&[1], 1.0)), None);
    }

    #[test]
    fn times_are_medians_and_the_answer_is_the_first() {
        let of = |times: &[f64]| {
            let runs: Vec<Answer> =
                times.iter().enumerate().map(|(run, time)| answer(&[run as u32], *time)).collect();
            summary(&runs).map(|summary| (summary.ttft_s, summary.tokens))
        };
        assert_eq!(of(&[5.0, 1.0, 3.0]), Some((Some(3.0), vec![0])));
        assert_eq!(of(&[4.0, 2.0]), Some((Some(3.0), vec![0])));
        assert_eq!(of(&[]), None);
    }
}
