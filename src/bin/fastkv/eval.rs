//! `fastkv eval`.

use std::path::Path;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use fastkv::backend::Backend;
use fastkv::engine::{Cancel, Control, Engine, EngineError, GenerationOptions, PrefillOptions};
use fastkv::eval::{Dialect, NeedlePrompt, NeedleTask, is_exact};
use fastkv::model::{ModelDir, Tokenizer};
use fastkv::policy::{ModelShape, Policy};
use serde::Serialize;

use crate::device::on;
use crate::loading::ModelOptions;
use crate::options::{PolicyName, PolicyOptions};
use crate::{output, progress};

/// Measure how often each policy answers needle prompts exactly.
///
/// The prompts are made from a seed in the sentences of the model's `dialect.json`. Every policy answers
/// the same ones.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelOptions,
    /// Which prompts, as far as the options below do not say: quick has fewer and shorter ones
    #[arg(long, value_enum, default_value_t = Suite::Full)]
    suite: Suite,
    /// Tasks of the dialect [default: single and multikey; quick: multikey and hard]
    #[arg(long, value_delimiter = ',', num_args = 1..)]
    tasks: Option<Vec<String>>,
    /// Tokens of a prompt and its answer at most [default: 2048; quick: 1024]
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Prompts of each task [default: 100; quick: 12]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    samples: Option<u32>,
    /// Seed of the prompts
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    prompt_seed: u64,
    /// Compress the context before the question is known, then read the question
    #[arg(long)]
    query_agnostic: bool,
    /// The policies, or all; each takes those of the policy options that it has
    #[arg(
        long,
        alias = "policy",
        value_parser = policies,
        value_delimiter = ',',
        num_args = 1..,
        default_value = "full,fastkv,snapkv,streamingllm,random",
        help_heading = "Policy options"
    )]
    policies: Vec<Policies>,
    #[command(flatten)]
    policy_options: PolicyOptions,
    /// Print one JSON object instead of the table
    #[arg(long, help_heading = "Output")]
    json: bool,
}

/// How much is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// Minutes to hours.
    Full,
    /// Some minutes on two cores, whatever the policies.
    Quick,
}

/// One policy, or all that are not composed of two.
#[derive(Clone, Debug)]
struct Policies(Vec<PolicyName>);

/// A policy's name, or `all`; of a wrong one the nearest are told.
fn policies(text: &str) -> Result<Policies, String> {
    if text == "all" {
        return Ok(Policies(PolicyName::singles()));
    }
    PolicyName::from_str(text, false).map(|name| Policies(vec![name])).map_err(|_| {
        let names: Vec<String> = PolicyName::value_variants().iter().map(|name| name.text()).collect();
        let nearest = nearest(text, &names).map_or(String::new(), |name| format!("; did you mean {name}?"));
        format!("there is no policy of that name{nearest} (all, {})", names.join(", "))
    })
}

/// The name with the fewest changes to a text, where half of it is right.
fn nearest<'a>(text: &str, names: &'a [String]) -> Option<&'a String> {
    let distance = |name: &String| {
        let name: Vec<char> = name.chars().collect();
        let mut row: Vec<usize> = (0..=name.len()).collect();
        for (above, a) in text.chars().enumerate() {
            let mut diagonal = row[0];
            row[0] = above + 1;
            for (index, b) in name.iter().enumerate() {
                let change = diagonal + usize::from(a != *b);
                diagonal = row[index + 1];
                row[index + 1] = change.min(diagonal + 1).min(row[index] + 1);
            }
        }
        row[name.len()]
    };
    let nearest = names.iter().min_by_key(|name| distance(name))?;
    (2 * distance(nearest) <= text.chars().count()).then_some(nearest)
}

impl Arguments {
    fn names(&self) -> Vec<PolicyName> {
        self.policies.iter().flat_map(|policies| policies.0.iter().copied()).collect()
    }

    fn tasks(&self) -> Vec<String> {
        let quick = self.suite == Suite::Quick;
        let default = if quick { ["multikey", "hard"] } else { ["single", "multikey"] };
        self.tasks.clone().unwrap_or_else(|| default.map(String::from).into())
    }

    fn tokens(&self) -> usize {
        self.tokens.unwrap_or(if self.suite == Suite::Quick { 1024 } else { 2048 })
    }

    fn samples(&self) -> u32 {
        self.samples.unwrap_or(if self.suite == Suite::Quick { 12 } else { 100 })
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    model: &'a Path,
    device: &'a str,
    tokens: usize,
    prompt_seed: u64,
    query_agnostic: bool,
    /// Whether Ctrl-C left prompts out.
    cancelled: bool,
    policies: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    policy: String,
    options: Policy,
    tasks: Vec<Score>,
}

/// Answers to the prompts of a task.
#[derive(Clone, Debug, Serialize)]
struct Score {
    task: String,
    samples: u32,
    /// Answers that were exactly right.
    exact: u32,
}

/// Tokens that an answer may take; those of the dialect are shorter.
const ANSWER_TOKENS: usize = 8;

pub(crate) fn run(arguments: &Arguments, cancel: &Cancel) -> Result<()> {
    let (names, tokens) = (arguments.names(), arguments.tokens());
    let mut policies = arguments.policy_options.policies(&names)?;
    let model = ModelDir::open(&arguments.model.model)?;
    let dialect = Dialect::from_directory(&model.path)?;
    let tasks = arguments.tasks().iter().map(|name| dialect.task(name)).collect::<Result<Vec<_>, _>>()?;
    let shape = ModelShape::from(&model.config);
    arguments.policy_options.complete(&mut policies, &model)?;
    let plans = policies.iter().map(|policy| policy.plan(shape, tokens)).collect::<Result<Vec<_>, _>>()?;
    let (backend, _) = arguments.model.backend(&model)?;
    on!(backend, backend => {
        let device = backend.name();
        let engine = arguments.model.load(&model, backend, &plans, ANSWER_TOKENS, arguments.json, cancel)?;

        let examinee = Examinee {
            engine: &engine,
            tokenizer: model.tokenizer()?,
            generation: GenerationOptions {
                max_tokens: ANSWER_TOKENS,
                stop_tokens: model.generation.stop_tokens.clone(),
                ..Default::default()
            },
            prefill: PrefillOptions {
                exact_shortcuts: arguments.policy_options.exact_shortcuts(),
                slack: ANSWER_TOKENS,
                ..Default::default()
            },
            query_agnostic: arguments.query_agnostic,
            cancel,
        };
        let report = Report {
            model: &model.path,
            device: &device,
            tokens,
            prompt_seed: arguments.prompt_seed,
            query_agnostic: arguments.query_agnostic,
            policies: examine(&examinee, &dialect, &tasks, &policies, arguments)?,
            cancelled: cancel.is_cancelled(),
        };
        output::print(&if arguments.json { output::json(&report)? } else { readable(&report).into_bytes() })
    })
}

fn examine<B: Backend>(
    examinee: &Examinee<'_, B>,
    dialect: &Dialect,
    tasks: &[NeedleTask],
    policies: &[Policy],
    arguments: &Arguments,
) -> Result<Vec<Row>> {
    let (names, samples) = (arguments.tasks(), arguments.samples());
    let score = |task: &String| Score { task: task.clone(), samples: 0, exact: 0 };
    let mut rows: Vec<Row> = arguments
        .names()
        .iter()
        .zip(policies)
        .map(|(name, policy)| Row {
            policy: name.text(),
            options: policy.clone(),
            tasks: names.iter().map(score).collect(),
        })
        .collect();
    let answers = u64::from(samples) * (tasks.len() * policies.len()) as u64;
    let bar = progress::bar(arguments.json, answers, "answering");
    for (index, task) in tasks.iter().enumerate() {
        bar.set_message(names[index].clone());
        for sample in 0..samples {
            let seed = arguments.prompt_seed.wrapping_mul(1 << 32).wrapping_add(u64::from(sample));
            let room = arguments.tokens().saturating_sub(ANSWER_TOKENS + 1);
            let prompt = NeedlePrompt::generate(dialect, *task, room, seed)?;
            for (row, policy) in rows.iter_mut().zip(policies) {
                let Some(answer) = examinee.answer(&prompt, policy)? else {
                    bar.finish_and_clear();
                    return Ok(rows);
                };
                let score = &mut row.tasks[index];
                score.samples += 1;
                score.exact += u32::from(is_exact(&answer, &prompt.answer));
                bar.inc(1);
            }
        }
    }
    bar.finish_and_clear();
    Ok(rows)
}

/// Who answers, and how.
struct Examinee<'a, B: Backend> {
    engine: &'a Engine<B>,
    tokenizer: Tokenizer,
    generation: GenerationOptions,
    prefill: PrefillOptions,
    query_agnostic: bool,
    cancel: &'a Cancel,
}

impl<B: Backend> Examinee<'_, B> {
    /// The answer under a policy; `None` after Ctrl-C.
    fn answer(&self, prompt: &NeedlePrompt, policy: &Policy) -> Result<Option<String>> {
        let (text, question) = if self.query_agnostic {
            (prompt.context.clone(), self.encode(&prompt.question, false)?)
        } else {
            (prompt.text(), Vec::new())
        };
        let ids = self.encode(&text, true)?;
        let plan = policy.plan(self.engine.shape(), ids.len())?;
        let control = Control { cancel: Some(self.cancel), progress: None };
        let answered = self.engine.prefill(&ids, &plan, &self.prefill, &control).and_then(|mut prefill| {
            let logits = if question.is_empty() {
                prefill.logits
            } else {
                self.engine.append(&mut prefill.cache, &question, &control)?
            };
            self.engine.generate(&mut prefill.cache, logits, &self.generation, &control, |_| ())
        });
        match answered {
            Err(EngineError::Cancelled) => Ok(None),
            _ if self.cancel.is_cancelled() => Ok(None),
            answered => Ok(Some(self.tokenizer.decode(&answered?.tokens, true)?)),
        }
    }

    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode(text, special)?;
        if let Some(unknown) = self.tokenizer.token_id("<unk>")
            && ids.contains(&unknown)
        {
            bail!("the tokenizer does not know every word of the dialect: they belong to different models");
        }
        Ok(ids)
    }
}

fn readable(report: &Report<'_>) -> String {
    let mut table = Table::new();
    let tasks = report.policies.first().map_or(&[][..], |row| &row.tasks);
    let header = tasks.iter().map(|score| format!("{} (n = {})", score.task, score.samples));
    table.load_style(UTF8_FULL_CONDENSED).set_header(["policy".to_owned()].into_iter().chain(header));
    for row in &report.policies {
        let share =
            |score: &Score| format!("{:.0} %", 100.0 * f64::from(score.exact) / f64::from(score.samples));
        table.add_row([row.policy.clone()].into_iter().chain(row.tasks.iter().map(share)));
    }
    let setting =
        if report.query_agnostic { "compressed before the question" } else { "question in the prompt" };
    let cut = if report.cancelled { "cancelled: what was measured by then\n" } else { "" };
    format!("exact answers at {} tokens, {setting}, on {}\n{table}\n{cut}", report.tokens, report.device)
}
