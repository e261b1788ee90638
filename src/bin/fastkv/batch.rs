//! `fastkv batch`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use fastkv::backend::Backend;
use fastkv::engine::{
    Cancel, Control, Engine, EngineError, FinishReason, Generation, GenerationOptions, MemoryEstimate,
    PrefillOptions, Progress, Prompt as Planned, Turn,
};
use fastkv::messages::{count, json_problem};
use fastkv::model::{LlamaConfig, ModelDir, ModelError, Tokenizer};
use fastkv::policy::{ModelShape, Plan};
use fastkv::utf8;
use serde::{Deserialize, Serialize};

use crate::answer::{AnswerOptions, AnswerText, generation};
use crate::device::on;
use crate::input::{Prompt, check_length, check_question, encode, text_of_stdin};
use crate::loading::{self, ModelOptions};
use crate::options::{PolicyName, PolicyOptions};
use crate::{output, progress};

/// Answer several prompts together: one prefill, one decode loop.
///
/// Each answer is what it would be alone, up to the rounding of matrix products; the weights are read once for all.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// JSON lines, `-` for stdin: {"prompt": "text"} or {"tokens": [ids]}, with a "question" and
    /// "max_tokens" of its own where wanted
    #[arg(value_name = "FILE.jsonl")]
    file: PathBuf,
    /// Give the prompts to the model's chat template as a user's messages
    #[arg(long)]
    chat: bool,
    #[command(flatten)]
    model: ModelOptions,
    /// What to keep of each prompt
    #[arg(long, value_enum, default_value_t = PolicyName::Fastkv, help_heading = "Policy options")]
    policy: PolicyName,
    #[command(flatten)]
    policy_options: PolicyOptions,
    #[command(flatten)]
    answer: AnswerOptions,
    /// Print one JSON object when done, and nothing else
    #[arg(long, help_heading = "Output")]
    json: bool,
}

/// A line of the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object such as {\"prompt\": \"text\"}")]
struct Line {
    prompt: Option<String>,
    tokens: Option<Vec<u32>>,
    question: Option<String>,
    max_tokens: Option<usize>,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    model: &'a Path,
    device: &'a str,
    device_reason: &'a str,
    policy: String,
    /// Seconds until every answer had its first token.
    ttft_s: Option<f64>,
    /// Of all answers together, behind their first tokens.
    decode_tokens_per_s: Option<f64>,
    answers: &'a [Answer],
}

#[derive(Serialize)]
struct Answer {
    prompt_tokens: usize,
    question_tokens: usize,
    tokens: Vec<u32>,
    text: Option<String>,
    finish: FinishReason,
    kv_full_bytes: u64,
    kv_kept_bytes: Option<usize>,
    kv_peak_bytes: Option<usize>,
}

/// All prompts, how they are read, and what is wanted of each.
struct Batch<'a> {
    prompts: Vec<Prompt>,
    plans: Vec<Plan>,
    wishes: Vec<GenerationOptions>,
    stop_texts: Vec<String>,
    tokenizer: Option<Tokenizer>,
    exact_shortcuts: bool,
    cancel: &'a Cancel,
}

/// When things happened, in seconds.
#[derive(Default)]
struct Times {
    ttft: Option<f64>,
    decode_tokens_per_s: Option<f64>,
}

pub(crate) fn run(arguments: &Arguments, cancel: &Cancel) -> Result<()> {
    let mut policies = arguments.policy_options.policies(&[arguments.policy])?;
    arguments.answer.sampling()?;
    check_question(arguments.answer.question.as_deref())?;
    let model = ModelDir::open(&arguments.model.model)?;
    arguments.policy_options.complete(&mut policies, &model)?;
    let mut batch = arguments.read(&model, cancel)?;
    let shape = ModelShape::from(&model.config);
    for prompt in &batch.prompts {
        batch.plans.push(policies[0].plan(shape, prompt.ids.len())?);
    }
    let (backend, device_reason) = arguments.model.backend(&model)?;
    let (device, answers, times) = on!(backend, backend => {
        let memory = loading::memory_options(&model, batch.slack(&model.config), &backend);
        let plans: Vec<&Plan> = batch.plans.iter().collect();
        let available = arguments.model.machine.available_memory(&backend);
        MemoryEstimate::together(&model.config, &plans, &memory).check(available)?;
        let device = backend.name();
        let engine = arguments.model.load(&model, backend, [], 0, arguments.json, cancel)?;
        let full: Vec<u64> =
            batch.plans.iter().map(|plan| loading::estimate(&model, plan, 0, engine.backend()).kv_full).collect();
        let (mut answers, times) = batch.answer(&engine, arguments.json)?;
        answers.iter_mut().zip(full).for_each(|(answer, full)| answer.kv_full_bytes = full);
        (device, answers, times)
    });
    if arguments.json {
        return output::print(&output::json(&Report {
            model: &model.path,
            device: &device,
            device_reason: &device_reason,
            policy: arguments.policy.text(),
            ttft_s: times.ttft,
            decode_tokens_per_s: times.decode_tokens_per_s,
            answers: &answers,
        })?);
    }
    for (number, answer) in answers.iter().enumerate() {
        let ids = || answer.tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
        let text = answer.text.clone().unwrap_or_else(ids);
        output::print(format!("[{}] {text}\n", number + 1).as_bytes())?;
    }
    eprintln!("{}", figures(&answers, &times));
    Ok(())
}

impl Arguments {
    /// Every line, with its number in what is said of it.
    fn read<'a>(&self, model: &ModelDir, cancel: &'a Cancel) -> Result<Batch<'a>> {
        let name = self.file.display().to_string();
        let text = match name.as_str() {
            "-" => text_of_stdin(),
            _ => utf8::read(&self.file).map_err(Into::into),
        };
        let text = text.with_context(|| name.clone())?;
        let mut lines = Vec::new();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let wrong = |error| anyhow!("{name}, line {}: {}", number + 1, json_problem(&error));
            let line: Line = serde_json::from_str(line).map_err(wrong)?;
            if line.question.as_ref().is_some_and(|question| question.trim().is_empty()) {
                bail!("{name}, line {}: \"question\" is empty: leave it out, or ask something", number + 1);
            }
            lines.push((number + 1, line));
        }
        if lines.is_empty() {
            bail!("{name}: no prompts; a line such as {{\"prompt\": \"text\"}} is wanted");
        }
        let needs_text = self.answer.question.is_some()
            || lines.iter().any(|(_, line)| line.prompt.is_some() || line.question.is_some());
        let tokenizer = match model.tokenizer() {
            Err(ModelError::FileMissing { .. }) if !needs_text => None,
            other => Some(other?),
        };
        let (wish, stop_texts) = generation(model, tokenizer.as_ref(), &self.answer)?;
        let (mut prompts, mut wishes) = (Vec::new(), Vec::new());
        for (number, line) in lines {
            let max_tokens = line.max_tokens.unwrap_or(wish.max_tokens);
            wishes.push(GenerationOptions { max_tokens, ..wish.clone() });
            let prompt = self.prompt(model, tokenizer.as_ref(), line);
            prompts.push(prompt.with_context(|| format!("{name}, line {number}"))?);
        }
        let exact_shortcuts = self.policy_options.exact_shortcuts();
        Ok(Batch { prompts, plans: Vec::new(), wishes, stop_texts, tokenizer, exact_shortcuts, cancel })
    }

    fn prompt(&self, model: &ModelDir, tokenizer: Option<&Tokenizer>, line: Line) -> Result<Prompt> {
        let question = line.question.as_deref().or(self.answer.question.as_deref());
        let (ids, question) = match (line.prompt, line.tokens, tokenizer) {
            (Some(text), None, Some(tokenizer)) => encode(model, tokenizer, text, question, self.chat)?,
            (None, Some(ids), tokenizer) => {
                let question = question.zip(tokenizer).map(|(text, tokenizer)| tokenizer.encode(text, false));
                (ids, question.transpose()?.unwrap_or_default())
            }
            _ => bail!("either \"prompt\" or \"tokens\" is wanted"),
        };
        check_length(model, &ids, &question)?;
        Ok(Prompt { ids, question, tokenizer: None })
    }
}

impl Batch<'_> {
    fn more_tokens(&self, member: usize) -> usize {
        self.prompts[member].question.len().saturating_add(self.wishes[member].max_tokens)
    }

    /// Room for every member, which is the same for all.
    fn slack(&self, config: &LlamaConfig) -> usize {
        let most = (0..self.prompts.len()).map(|member| self.more_tokens(member)).max().unwrap_or(0);
        most.min(config.context_limit().tokens)
    }

    fn answer<B: Backend>(&self, engine: &Engine<B>, quiet: bool) -> Result<(Vec<Answer>, Times)> {
        let mut times = Times::default();
        let bar = progress::bar(quiet, 1, "reading the prompts");
        let report = |progress: Progress| {
            bar.set_length(progress.total as u64);
            bar.set_position(progress.done as u64);
        };
        let control = Control { cancel: Some(self.cancel), progress: Some(&report) };
        let prompts: Vec<_> = self
            .prompts
            .iter()
            .zip(&self.plans)
            .map(|(prompt, plan)| Planned { ids: &prompt.ids, plan })
            .collect();
        let slack = self.slack(engine.config());
        let options = PrefillOptions { exact_shortcuts: self.exact_shortcuts, trace: false, slack };
        let start = Instant::now();
        let mut members = match engine.prefill_batch(&prompts, &options, &control) {
            Err(EngineError::Cancelled) => return Ok((self.cancelled(), times)),
            members => members?,
        };
        let sizes: Vec<_> = members
            .iter()
            .map(|prefill| (prefill.cache.bytes(engine.backend()), prefill.peak_kv_bytes))
            .collect();
        for (prefill, prompt) in members.iter_mut().zip(&self.prompts) {
            if !prompt.question.is_empty() {
                let quiet = Control { progress: None, ..control };
                prefill.logits = match engine.append(&mut prefill.cache, &prompt.question, &quiet) {
                    Err(EngineError::Cancelled) => return Ok((self.cancelled(), times)),
                    logits => logits?,
                };
            }
        }
        bar.finish_and_clear();

        let bar = progress::bar(quiet, 1, "answering");
        let report = |progress: Progress| {
            bar.set_length(progress.total as u64);
            bar.set_position(progress.done as u64);
        };
        let control = Control { cancel: Some(self.cancel), progress: Some(&report) };
        let turns = members.iter_mut().zip(&self.wishes).map(|(prefill, options)| Turn {
            cache: &mut prefill.cache,
            logits: std::mem::take(&mut prefill.logits),
            options,
        });
        let mut written = vec![0; self.prompts.len()];
        let mut first = None;
        let answers = engine.generate_batch(turns.collect(), &control, |member, _| {
            written[member] += 1;
            // A second token of anybody comes when everybody has had a first one.
            if written[member] == 1 {
                first = Some(start.elapsed().as_secs_f64());
            }
        })?;
        let all = start.elapsed().as_secs_f64();
        bar.finish_and_clear();
        times.ttft = first;
        let behind: usize = written.iter().map(|count: &usize| count.saturating_sub(1)).sum();
        times.decode_tokens_per_s = first.filter(|_| behind > 0).map(|first| behind as f64 / (all - first));
        let answers = answers.into_iter().zip(&self.prompts).zip(sizes);
        let answers = answers.map(|((generation, prompt), (kept, peak))| {
            self.shown(prompt, generation, Some(kept), Some(peak))
        });
        Ok((answers.collect::<Result<_>>()?, times))
    }

    /// The answer up to a stop text.
    fn shown(
        &self,
        prompt: &Prompt,
        generation: Generation,
        kv_kept_bytes: Option<usize>,
        kv_peak_bytes: Option<usize>,
    ) -> Result<Answer> {
        let Generation { mut tokens, mut finish } = generation;
        let mut text = AnswerText::new(self.tokenizer.as_ref(), &self.stop_texts);
        for index in 0..tokens.len() {
            text.push(tokens[index])?;
            if text.stopped {
                tokens.truncate(index + 1);
                finish = FinishReason::Stop;
                break;
            }
        }
        text.finish()?;
        Ok(Answer {
            prompt_tokens: prompt.ids.len(),
            question_tokens: prompt.question.len(),
            text: self.tokenizer.is_some().then_some(text.text),
            tokens,
            finish,
            kv_full_bytes: 0,
            kv_kept_bytes,
            kv_peak_bytes,
        })
    }

    /// The answers of a run that was stopped before it wrote any.
    fn cancelled(&self) -> Vec<Answer> {
        let none = |prompt: &Prompt| Answer {
            prompt_tokens: prompt.ids.len(),
            question_tokens: prompt.question.len(),
            tokens: Vec::new(),
            text: self.tokenizer.is_some().then(String::new),
            finish: FinishReason::Cancelled,
            kv_full_bytes: 0,
            kv_kept_bytes: None,
            kv_peak_bytes: None,
        };
        self.prompts.iter().map(none).collect()
    }
}

/// The figures in a line.
fn figures(answers: &[Answer], times: &Times) -> String {
    let read: usize = answers.iter().map(|answer| answer.prompt_tokens + answer.question_tokens).sum();
    let written: usize = answers.iter().map(|answer| answer.tokens.len()).sum();
    let mut parts = vec![format!(
        "{} of {} read, {} written",
        count(answers.len(), "prompt"),
        count(read, "token"),
        count(written, "token")
    )];
    if let Some(seconds) = times.ttft {
        parts.push(format!("TTFT {seconds:.3} s"));
    }
    if let Some(rate) = times.decode_tokens_per_s {
        parts.push(format!("{rate:.1} tokens/s"));
    }
    if answers.iter().any(|answer| answer.finish == FinishReason::Cancelled) {
        parts.push("cancelled".to_owned());
    }
    parts.join("; ")
}
