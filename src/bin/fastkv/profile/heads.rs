//! `fastkv profile heads`.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use fastkv::backend::Backend;
use fastkv::engine::{Cancel, Control, Engine, EngineError, PrefillOptions};
use fastkv::eval::{Dialect, HeadScoring, Task};
use fastkv::policy::{HeadScores, Policy};

use super::prompts::{Prompts, Questions};
use crate::device::on;
use crate::exam::Exam;
use crate::exit::Usage;
use crate::output::{self, Output, OverwriteOptions};
use crate::progress;

/// Score the heads by how they find facts: the file that `--policy headkv --heads` takes.
///
/// Heads gain by their attention to the tokens that say the answer; only prompts that are answered right
/// count. The file has a list of scores for each "layer-head".
#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// How heads are scored
    #[arg(long, value_enum, default_value_t = Scoring::Reasoning)]
    scoring: Scoring,
    /// Write the scores to a file, and a table of the best heads to stdout
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    out: Option<PathBuf>,
    #[command(flatten)]
    overwrite: OverwriteOptions,
    #[command(flatten)]
    prompts: Prompts,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Scoring {
    Retrieval,
    Reasoning,
}

/// What each head gained in a step: `[layer][query head]`.
type Gains = Vec<Vec<f64>>;

pub(super) fn run(arguments: &Arguments, cancel: &Cancel) -> Result<()> {
    let out = arguments.overwrite.prepare_if("--out", arguments.out.as_ref())?;
    let (model, backend) = arguments.prompts.model.open()?;
    let questions = arguments.prompts.questions(&model, check_needle)?;
    on!(backend, backend => {
        let engine = arguments.prompts.load(&model, backend, &questions, cancel)?;
        score(arguments, &engine, &model.generation.stop_tokens, &questions, out, cancel)
    })
}

/// Heads are scored by how they look at the place that says the answer.
fn check_needle(exam: &Exam, dialect: Option<&Dialect>) -> Result<()> {
    if exam.has_needle() {
        return Ok(());
    }
    let of_dialect = dialect.into_iter().flat_map(Dialect::tasks);
    let of_any = Task::ALL.into_iter().filter(|task| task.has_needle()).map(|task| -> &str { task.name() });
    let names: Vec<&str> = of_dialect.chain(of_any).collect();
    bail!(Usage(format!(
        "--task {}: its answer is not said in one place, by which heads could be scored; give one of {}",
        exam.name,
        names.join(", ")
    )))
}

fn score<B: Backend>(
    arguments: &Arguments,
    engine: &Engine<B>,
    stop_tokens: &[u32],
    questions: &Questions,
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
        let asked = questions.nth(sample)?;
        let needle = questions.exam.needle(&asked, &questions.reader)?;
        let gain =
            |attention: &[f32], produced: u32| scoring.gain(attention, &asked.tokens.ids, &needle, produced);
        let room = questions.room(&asked)?;
        let (written, gains) = observed(engine, &asked.tokens.ids, stop_tokens, room, &gain, cancel)?;
        let answer = questions.answer(&asked, written)?;
        if answer.right {
            right += 1;
            let gains = &gains[..answer.tokens.len()];
            let shape = engine.shape();
            for layer in 0..shape.layers {
                for head in 0..shape.query_heads {
                    // A sum of nothing but -0 is -0, which no file should say.
                    let gain = gains.iter().fold(0.0, |sum, step| sum + step[layer][head]);
                    scores.add(layer, head, gain);
                }
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    if right == 0 {
        bail!(
            "none of {samples} prompts was answered right, so that no head can be scored: \
             an easier --task or fewer --tokens may help"
        );
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

/// At most `room` tokens written behind a prompt, and what each head gained by each.
fn observed<B: Backend>(
    engine: &Engine<B>,
    ids: &[u32],
    stop_tokens: &[u32],
    room: usize,
    gain: &dyn Fn(&[f32], u32) -> f64,
    cancel: &Cancel,
) -> Result<(Vec<u32>, Vec<Gains>)> {
    let control = Control { cancel: Some(cancel), progress: None };
    let Some((last, context)) = ids.split_last() else { return Err(EngineError::NoTokens.into()) };
    let plan = Policy::Full.plan(engine.shape(), context.len())?;
    let options = PrefillOptions { slack: room + 1, ..Default::default() };
    let mut cache = engine.prefill(context, &plan, &options, &control)?.cache;
    let (mut token, mut written, mut gains) = (*last, Vec::new(), Vec::new());
    for _ in 0..room {
        let (logits, attention) = engine.append_observed(&mut cache, token, &control)?;
        let best = |best: usize, next: usize| if logits[next] > logits[best] { next } else { best };
        token = (0..logits.len()).reduce(best).unwrap_or(0) as u32;
        if stop_tokens.contains(&token) {
            break;
        }
        let of_layer =
            |heads: &fastkv::engine::HeadScores| heads.iter().map(|head| gain(head, token)).collect();
        gains.push(attention.iter().map(of_layer).collect());
        written.push(token);
    }
    Ok((written, gains))
}
