//! `fastkv profile tsp`.

use anyhow::{Result, bail};
use clap::Args;
use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use fastkv::backend::Backend;
use fastkv::engine::{Cancel, Control, Engine, EngineError, GenerationOptions, PrefillOptions, Trace};
use fastkv::policy::{Budget, FastKv, Plan, Policy, Settling};
use serde::Serialize;

use super::prompts::{Answer, Prompts, Questions};
use crate::device::on;
use crate::exit::Usage;
use crate::output;
use crate::progress;

/// Find the TSP layer and rate: for each, how far the final hidden state and the answers are those of the
/// full context, and what the prefill costs.
///
/// Every layer is tried, and `auto`, which picks one for each prompt. Caches are kept whole, so that only the
/// propagation is measured. The cheapest pair whose answers agree as often as asked for is recommended.
#[derive(Args, Debug)]
pub(super) struct Arguments {
    /// TSP rates to try
    #[arg(long, value_name = "RATE", value_delimiter = ',', num_args = 1.., default_values_t = [0.1, 0.2, 0.4])]
    rates: Vec<f64>,
    /// Share of answers that have to agree with those of the full context
    #[arg(long, value_name = "SHARE", default_value_t = 0.95)]
    agreement: f64,
    /// Print one JSON object instead of the table
    #[arg(long, help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    prompts: Prompts,
}

/// What one TSP layer and rate did to the prompts. Its fields are described in docs/json.md.
#[derive(Clone, Serialize)]
struct Candidate {
    /// `None`: picked for each prompt.
    tsp_layer: Option<usize>,
    propagation: f64,
    /// Rows read by all layers, over those of the full context; mean over prompts, and so below.
    cost: f64,
    /// Length of the difference of the last token's final hidden states, over the length of that of the
    /// full context.
    hidden_error: f64,
    /// Prompts with the answer of the full context.
    same_answers: u32,
    /// Prompts that were answered right.
    right_answers: u32,
}

/// The JSON object of `profile tsp`.
#[derive(Serialize)]
struct Calibration {
    samples: u32,
    /// Prompts that the full context answered right.
    right_answers: u32,
    candidates: Vec<Candidate>,
    recommended: Option<Candidate>,
}

impl Candidate {
    fn policy(&self) -> Policy {
        let (retention, propagation) = (Budget::Rate(1.0), Budget::Rate(self.propagation));
        let settling = self.tsp_layer.is_none().then(Settling::default);
        let tsp_layer = self.tsp_layer;
        Policy::FastKv(FastKv { retention, propagation, tsp_layer, settling, ..FastKv::proportional() })
    }

    /// As `--tsp-layer` takes it.
    fn layer(&self) -> String {
        self.tsp_layer.map_or_else(|| "auto".to_owned(), |layer| layer.to_string())
    }
}

pub(super) fn run(arguments: &Arguments, cancel: &Cancel) -> Result<()> {
    if !(0.0..=1.0).contains(&arguments.agreement) {
        bail!(Usage(format!("--agreement {}: give a share from 0 to 1", arguments.agreement)));
    }
    let (model, backend) = arguments.prompts.model.open()?;
    let questions = arguments.prompts.questions(&model, |_, _| Ok(()))?;
    on!(backend, backend => {
        let engine = arguments.prompts.load(&model, backend, &questions, cancel)?;
        try_layers(arguments, &engine, &model.generation.stop_tokens, &questions, cancel)
    })
}

fn try_layers<B: Backend>(
    arguments: &Arguments,
    engine: &Engine<B>,
    stop_tokens: &[u32],
    questions: &Questions,
    cancel: &Cancel,
) -> Result<()> {
    let shape = engine.shape();
    let layers = (0..shape.layers.saturating_sub(1)).map(Some).chain([None]);
    let pairs = arguments.rates.iter().flat_map(|rate| layers.clone().map(|layer| (layer, *rate)));
    let mut candidates: Vec<Candidate> = pairs
        .map(|(tsp_layer, propagation)| Candidate {
            tsp_layer,
            propagation,
            cost: 0.0,
            hidden_error: 0.0,
            same_answers: 0,
            right_answers: 0,
        })
        .collect();
    for candidate in &candidates {
        candidate.policy().plan(shape, questions.length)?;
    }
    let samples = arguments.prompts.samples;
    let steps = u64::from(samples) * (candidates.len() + 1) as u64;
    let mut right_answers = 0;
    let bar = progress::bar(arguments.json, steps, "trying TSP layers");
    for sample in 0..samples {
        let asked = questions.nth(sample)?;
        let ids = &asked.tokens.ids;
        let generation = GenerationOptions {
            max_tokens: questions.room(&asked)?,
            stop_tokens: stop_tokens.to_vec(),
            ..Default::default()
        };
        let answered = |policy: Policy| -> Result<(Trace, Answer)> {
            let plan = policy.plan(shape, ids.len())?;
            let (trace, written) = written(engine, ids, &plan, &generation, cancel)?;
            Ok((trace, questions.answer(&asked, written)?))
        };
        let (full, answer) = answered(Policy::Full)?;
        right_answers += u32::from(answer.right);
        let rows = |trace: &Trace| trace.layers.iter().map(|layer| layer.rows).sum::<usize>();
        let length = |state: &mut dyn Iterator<Item = f32>| {
            state.map(|element| f64::from(element).powi(2)).sum::<f64>().sqrt()
        };
        let size = length(&mut full.hidden.iter().copied());
        bar.inc(1);
        for candidate in &mut candidates {
            let (trace, other_answer) = answered(candidate.policy())?;
            let mut difference = full.hidden.iter().zip(&trace.hidden).map(|(a, b)| a - b);
            candidate.cost += rows(&trace) as f64 / rows(&full) as f64 / f64::from(samples);
            candidate.hidden_error += length(&mut difference) / size / f64::from(samples);
            candidate.same_answers += u32::from(answer == other_answer);
            candidate.right_answers += u32::from(other_answer.right);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let enough = |candidate: &&Candidate| {
        f64::from(candidate.same_answers) >= arguments.agreement * f64::from(samples)
    };
    let recommended = candidates
        .iter()
        .filter(enough)
        .min_by(|a, b| a.cost.total_cmp(&b.cost).then(a.hidden_error.total_cmp(&b.hidden_error)))
        .cloned();
    let calibration = Calibration { samples, right_answers, candidates, recommended };
    match arguments.json {
        true => output::print(&output::json(&calibration)?),
        false => output::print(calibration.text().as_bytes()),
    }
}

impl Calibration {
    fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED).set_header([
            "TSP layer",
            "rate",
            "cost",
            "hidden state error",
            "same answer",
            "right",
        ]);
        for candidate in &self.candidates {
            table.add_row([
                candidate.layer(),
                candidate.propagation.to_string(),
                format!("{:.0} %", 100.0 * candidate.cost),
                format!("{:.4}", candidate.hidden_error),
                format!("{} of {}", candidate.same_answers, self.samples),
                candidate.right_answers.to_string(),
            ]);
        }
        let verdict = match &self.recommended {
            Some(candidate) => format!(
                "recommended: --tsp-layer {} --propagation {:?}, which reads {:.0} % of the rows",
                candidate.layer(),
                candidate.propagation,
                100.0 * candidate.cost
            ),
            None => "no layer agrees that often: give higher --rates or a lower --agreement".to_owned(),
        };
        let full = format!("the full context answers {} of {} right", self.right_answers, self.samples);
        format!("{table}\n{full}\n{verdict}\n")
    }
}

/// What the layers did with a prompt, and what was written behind it.
fn written<B: Backend>(
    engine: &Engine<B>,
    ids: &[u32],
    plan: &Plan,
    generation: &GenerationOptions,
    cancel: &Cancel,
) -> Result<(Trace, Vec<u32>)> {
    let control = Control { cancel: Some(cancel), progress: None };
    let options = PrefillOptions { slack: generation.max_tokens, trace: true, ..Default::default() };
    let mut prefill = engine.prefill(ids, plan, &options, &control)?;
    let answer = engine.generate(&mut prefill.cache, prefill.logits, generation, &control, |_| ())?;
    if cancel.is_cancelled() {
        return Err(EngineError::Cancelled.into());
    }
    Ok((prefill.trace.unwrap_or_default(), answer.tokens))
}
