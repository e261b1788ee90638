//! `fastkv profile`.

mod tsp;

use std::ops::Range;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use fastkv::backend::Backend;
use fastkv::engine::{Cancel, Control, Engine, EngineError, PrefillOptions, Trace};
use fastkv::eval::{Dialect, HeadScoring, NeedlePrompt, NeedleTask, is_exact};
use fastkv::model::{ModelDir, Tokenizer};
use fastkv::policy::{HeadScores, ModelShape, Plan, Policy};

use crate::device::on;
use crate::exit::Usage;
use crate::input::PromptOptions;
use crate::loading::ModelOptions;
use crate::options::{PolicyName, PolicyOptions};
use crate::output::{self, Output};
use crate::{progress, selection};

/// Measure a model, to choose a policy's options by.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Heads(Heads),
    Fastgen(Box<FastGen>),
    Tsp(tsp::Arguments),
    Selection(selection::Arguments),
}

/// Score the heads by how they find facts: the file that `--policy headkv --heads` takes.
///
/// Only prompts that are answered right count. The file has a list of scores for each "layer-head".
#[derive(Args, Debug)]
struct Heads {
    #[command(flatten)]
    prompts: Prompts,
    /// How heads are scored
    #[arg(long, value_enum, default_value_t = Scoring::Reasoning)]
    scoring: Scoring,
    /// Write the scores to a file, and a table of the best heads to stdout
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,
}

/// Show the set of tokens that FastGen gives each head of a prompt, and the attention each set recovers.
#[derive(Args, Debug)]
struct FastGen {
    #[command(flatten)]
    prompt: PromptOptions,
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    policy_options: PolicyOptions,
    /// Print one JSON object instead of the table
    #[arg(long, help_heading = "Output")]
    json: bool,
}

/// Prompts in the model's own words.
#[derive(Args, Debug)]
struct Prompts {
    #[command(flatten)]
    model: ModelOptions,
    /// Task of the model's dialect
    #[arg(long, default_value = "multikey")]
    task: String,
    /// Tokens of a prompt and its answer at most
    #[arg(long, value_name = "N", default_value_t = 1024)]
    tokens: usize,
    /// Prompts
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,
    /// Seed of the prompts
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    prompt_seed: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Scoring {
    Retrieval,
    Reasoning,
}

/// Tokens that an answer may take.
const ANSWER_TOKENS: usize = 8;

pub(crate) fn run(arguments: &Arguments, cancel: &Cancel) -> Result<()> {
    match &arguments.command {
        Command::Heads(arguments) => heads(arguments, cancel),
        Command::Fastgen(arguments) => fastgen(arguments, cancel),
        Command::Tsp(arguments) => tsp::run(arguments, cancel),
        Command::Selection(arguments) => selection::run(arguments, cancel),
    }
}

/// A model and the prompts it answers.
struct Bench<B: Backend> {
    model: ModelDir,
    tokenizer: Tokenizer,
    engine: Engine<B>,
    dialect: Dialect,
    task: NeedleTask,
}

impl Prompts {
    fn open<B: Backend>(&self, model: ModelDir, backend: B, cancel: &Cancel) -> Result<Bench<B>> {
        let limit = model.config.context_limit();
        if self.tokens > limit.tokens {
            bail!(Usage(format!(
                "--tokens {}: give at most {} ({})",
                self.tokens, limit.tokens, limit.reason
            )));
        }
        let dialect = Dialect::from_directory(&model.path)?;
        let task = dialect.task(&self.task)?;
        let plan = Policy::Full.plan(ModelShape::from(&model.config), self.tokens)?;
        let engine = self.model.load(&model, backend, [&plan], ANSWER_TOKENS, false, cancel)?;
        Ok(Bench { tokenizer: model.tokenizer()?, model, engine, dialect, task })
    }

    fn prompt<B: Backend>(&self, bench: &Bench<B>, sample: u32) -> Result<(NeedlePrompt, Vec<u32>)> {
        let seed = self.prompt_seed.wrapping_mul(1 << 32).wrapping_add(u64::from(sample));
        // The tokenizer's first token, and the answer.
        let beside = ANSWER_TOKENS + 1;
        let prompt =
            NeedlePrompt::generate(&bench.dialect, bench.task, self.tokens.saturating_sub(beside), seed)
                .map_err(|error| error.among(self.tokens, beside))?;
        let ids = bench.tokenizer.encode(&prompt.text(), true)?;
        Ok((prompt, ids))
    }
}

fn heads(arguments: &Heads, cancel: &Cancel) -> Result<()> {
    let out = Output::prepare_if(arguments.out.as_ref())?;
    let (model, backend) = arguments.prompts.model.open()?;
    on!(backend, backend => {
        score_heads(arguments, &arguments.prompts.open(model, backend, cancel)?, out, cancel)
    })
}

fn score_heads<B: Backend>(
    arguments: &Heads,
    bench: &Bench<B>,
    out: Option<Output>,
    cancel: &Cancel,
) -> Result<()> {
    let scoring = match arguments.scoring {
        Scoring::Retrieval => HeadScoring::Retrieval,
        Scoring::Reasoning => HeadScoring::Reasoning,
    };
    let samples = arguments.prompts.samples;
    let bar = progress::bar(false, u64::from(samples), "scoring heads");
    let mut scores = HeadScores::default();
    let mut right = 0;
    for sample in 0..samples {
        let (prompt, ids) = arguments.prompts.prompt(bench, sample)?;
        let needle = needle(&bench.tokenizer, &prompt, &ids)?;
        let (answer, gains) = observed_answer(bench, &ids, &needle, scoring, cancel)?;
        if is_exact(&answer, &prompt.answer) {
            right += 1;
            for (layer, heads) in gains.iter().enumerate() {
                heads.iter().enumerate().for_each(|(head, gain)| scores.add(layer, head, *gain));
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if right == 0 {
        bail!("none of {samples} prompts was answered right, so that no head can be scored");
    }
    let json = output::json(&scores)?;
    let Some(out) = out else { return output::print(&json) };
    out.write(&json)?;
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(["layer-head", "score"]);
    for ((layer, head), score) in scores.ranking().into_iter().take(10) {
        table.add_row([format!("{layer}-{head}"), format!("{score:.4}")]);
    }
    output::print(
        format!("{right} of {samples} prompts answered right; the best heads\n{table}\n").as_bytes(),
    )
}

/// Where the value that is asked for stands.
fn needle(tokenizer: &Tokenizer, prompt: &NeedlePrompt, ids: &[u32]) -> Result<Range<usize>> {
    let value = tokenizer.encode(&prompt.answer, false)?;
    let asked =
        prompt.facts.iter().find(|fact| fact.value == prompt.answer && prompt.question.contains(&fact.key));
    // Tokens that the tokenizer puts in front of the words.
    let front = ids.len().saturating_sub(prompt.text().split_whitespace().count());
    let first = asked.map_or(0, |fact| fact.word + front);
    let found = ids.get(first..).and_then(|ids| ids.windows(value.len()).position(|window| window == value));
    let start = first + found.context("the fact that is asked for is not in the prompt")?;
    Ok(start..start + value.len())
}

/// The answer, and what each head gained by it: `[layer][query head]`.
fn observed_answer<B: Backend>(
    bench: &Bench<B>,
    ids: &[u32],
    needle: &Range<usize>,
    scoring: HeadScoring,
    cancel: &Cancel,
) -> Result<(String, Vec<Vec<f64>>)> {
    let Bench { engine, model, tokenizer, .. } = bench;
    let shape = engine.shape();
    let control = Control { cancel: Some(cancel), progress: None };
    let Some((last, context)) = ids.split_last() else { return Err(EngineError::NoTokens.into()) };
    let plan = Policy::Full.plan(shape, context.len())?;
    let options = PrefillOptions { slack: ANSWER_TOKENS + 1, ..Default::default() };
    let mut cache = engine.prefill(context, &plan, &options, &control)?.cache;
    let mut gains = vec![vec![0.0; shape.query_heads]; shape.layers];
    let (mut token, mut answer) = (*last, Vec::new());
    for _ in 0..ANSWER_TOKENS {
        let (logits, attention) = engine.append_observed(&mut cache, token, &control)?;
        let best = |best: usize, next: usize| if logits[next] > logits[best] { next } else { best };
        token = (0..logits.len()).reduce(best).unwrap_or(0) as u32;
        if model.generation.stop_tokens.contains(&token) {
            break;
        }
        for (gains, attention) in gains.iter_mut().zip(&attention) {
            for (gain, attention) in gains.iter_mut().zip(attention) {
                *gain += scoring.gain(attention, ids, needle, token);
            }
        }
        answer.push(token);
    }
    Ok((tokenizer.decode(&answer, true)?, gains))
}

fn fastgen(arguments: &FastGen, cancel: &Cancel) -> Result<()> {
    let mut policies = arguments.policy_options.policies(&[PolicyName::Fastgen])?;
    let model = ModelDir::open(&arguments.model.model)?;
    let prompt = arguments.prompt.read(&model, None)?;
    arguments.policy_options.complete(&mut policies, &model)?;
    let plan = policies[0].plan(ModelShape::from(&model.config), prompt.ids.len())?;
    let (backend, _) = arguments.model.backend(&model)?;
    on!(backend, backend => {
        let engine = arguments.model.load(&model, backend, [&plan], 0, arguments.json, cancel)?;
        show_sets(arguments, &engine, &prompt.ids, &plan, cancel)
    })
}

fn show_sets<B: Backend>(
    arguments: &FastGen,
    engine: &Engine<B>,
    ids: &[u32],
    plan: &Plan,
    cancel: &Cancel,
) -> Result<()> {
    let control = Control { cancel: Some(cancel), progress: None };
    let options = PrefillOptions { trace: true, ..Default::default() };
    let prefill = engine.prefill(ids, plan, &options, &control)?;
    let share = prefill.cache.bytes(engine.backend()) as f64
        / plan.kept_kv_bytes(engine.backend().kv_element_bytes()) as f64;
    let trace = prefill.trace.unwrap_or_default();
    if arguments.json {
        return output::print(&output::json(&trace)?);
    }
    let text = format!("{}\nthe cache is {:.1} % of the full one\n", sets(&trace), 100.0 * share);
    output::print(text.as_bytes())
}

fn sets(trace: &Trace) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header([
        "layer",
        "kv head",
        "set",
        "kept",
        "special",
        "+ punctuation",
        "+ frequent",
        "+ local",
    ]);
    for (layer, rules) in trace.layers.iter().enumerate() {
        for (head, set) in rules.sets.iter().flatten().enumerate() {
            let cells = [
                layer.to_string(),
                head.to_string(),
                format!("{:?}", set.set).to_lowercase(),
                format!("{} of {}", rules.kept[head].len(), rules.rows),
            ];
            table.add_row(cells.into_iter().chain(set.recovered.map(|recovered| format!("{recovered:.3}"))));
        }
    }
    table
}
