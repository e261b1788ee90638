//! `fastkv eval`: questions whose answers are known, asked under each policy.

mod arms;
mod asking;
mod results;
mod settings;
mod summary;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use fastkv::backend::Backend;
use fastkv::engine::Cancel;
use fastkv::eval::{Dialect, Prose, Task as Generated};
use fastkv::model::ModelDir;
use fastkv::policy::{Budget, ModelShape};

use self::arms::arms;
use self::asking::Run;
use self::results::{Header, Kept};
use self::summary::{Report, Row};
use crate::device::on;
use crate::exam::{self, Exam, Material};
use crate::exit::Usage;
use crate::input::Prompt;
use crate::loading::ModelOptions;
use crate::options::{PolicyName, PolicyOptions, budget};
use crate::output;
use crate::reading::Reader;
use crate::suggest::suggestion;

/// Measure how well each policy answers questions about long prompts.
///
/// The prompts are made from a seed: RULER-style tasks for any tokenizer, or for a small model with few
/// words those of its `dialect.json`; or they are read from a file. Every policy answers the same ones.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    model: ModelOptions,
    /// Which questions, as far as the options below do not say: quick has fewer and shorter ones
    #[arg(long, value_enum, default_value_t = Suite::Full)]
    suite: Suite,
    /// Tasks by name, or all [default: multikey and one or two more of the dialect; without one, for
    /// quick single_2, multikey_2 and multikey_3, else all but depth_map]
    #[arg(long, value_name = "TASK", value_delimiter = ',', num_args = 1..)]
    tasks: Vec<String>,
    /// Ask the questions of a file, a JSON object a line, with the answers; may be repeated
    #[arg(long, value_name = "FILE.jsonl")]
    task_file: Vec<PathBuf>,
    /// Tokens of a prompt and its answer at most; several lengths make several runs [default: 2048, quick
    /// 1024 in a dialect; else 4096, and in the full suite its doubles to 131072 that the context takes]
    #[arg(long, alias = "lengths", value_name = "N", value_delimiter = ',', num_args = 1..)]
    tokens: Vec<usize>,
    /// Prompts of each task and length, for depth_map also of each depth; of a file's tasks at most so
    /// many [default: 500, in a dialect 100; quick: 12; all of a file]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    samples: Option<u32>,
    /// depth_map: where the needle stands, shares of the context [default: 0 to 1 in tenths; quick: in
    /// quarters]
    #[arg(long, value_name = "SHARE", value_delimiter = ',', allow_negative_numbers = true)]
    depths: Vec<f64>,
    /// Seed of the prompts
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    prompt_seed: u64,
    /// Hide needles in this text instead of the one that comes with the program
    #[arg(long, value_name = "FILE")]
    haystack: Option<PathBuf>,
    /// Compress the context before the question is known, then read the question
    #[arg(long)]
    query_agnostic: bool,
    /// Do not use the model's chat template
    #[arg(long)]
    no_chat: bool,
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
    /// Ask under each of several retentions, where a policy has one
    #[arg(
        long,
        value_name = "RATE|TOKENS",
        value_parser = budget,
        value_delimiter = ',',
        allow_hyphen_values = true,
        conflicts_with = "retention",
        help_heading = "Policy options"
    )]
    budgets: Vec<Budget>,
    #[command(flatten)]
    policy_options: PolicyOptions,
    /// Write a line of settings and a line for each answer, as they come
    #[arg(long, value_name = "FILE.jsonl", help_heading = "Output")]
    out: Option<PathBuf>,
    /// Go on with the file of --out: answers that are in it are not asked for again
    #[arg(long, requires = "out", help_heading = "Output")]
    resume: bool,
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
        format!("there is no policy of that name{} (all, {})", suggestion(text, &names), names.join(", "))
    })
}

/// Lengths of the full suite; the quick one has the first.
const LENGTHS: [usize; 6] = [4096, 8192, 16_384, 32_768, 65_536, 131_072];

/// Tasks of the quick suite without a dialect: two that tell policies apart, and an easy one.
const QUICK: [&str; 3] = ["single_2", "multikey_2", "multikey_3"];

impl Arguments {
    fn quick(&self) -> bool {
        self.suite == Suite::Quick
    }

    fn names(&self) -> Vec<PolicyName> {
        self.policies.iter().flat_map(|policies| policies.0.iter().copied()).collect()
    }

    fn exams(&self, dialect: Option<&Dialect>) -> Result<Vec<Exam>> {
        let names: Vec<String> = match (self.tasks.as_slice(), dialect) {
            ([], _) if !self.task_file.is_empty() => Vec::new(),
            ([], Some(_)) if self.quick() => ["multikey", "hard"].map(String::from).into(),
            ([], Some(_)) => ["single", "multikey"].map(String::from).into(),
            ([], None) if self.quick() => QUICK.map(String::from).into(),
            ([], None) => {
                let tasks = Generated::ALL.into_iter().filter(|task| !task.has_depths());
                tasks.map(|task| task.name().to_owned()).collect()
            }
            ([all], Some(dialect)) if all == "all" => dialect.tasks().map(str::to_owned).collect(),
            ([all], None) if all == "all" => Generated::ALL.map(|task| task.name().to_owned()).into(),
            (names, _) => names.to_vec(),
        };
        let mut exams =
            names.iter().map(|name| Exam::from_name(name, dialect)).collect::<Result<Vec<_>>>()?;
        for file in &self.task_file {
            exams.extend(Exam::from_file(file, self.samples)?);
        }
        let twice = |index: usize| exams[..index].iter().any(|other| other.name == exams[index].name);
        match (0..exams.len()).find(|index| twice(*index)) {
            Some(index) => bail!(Usage(format!("the task {} is asked for twice", exams[index].name))),
            None => Ok(exams),
        }
    }

    fn lengths(&self, model: &ModelDir, dialect: bool) -> Result<Vec<usize>> {
        let limit = model.config.context_limit();
        let mut lengths = self.tokens.clone();
        if lengths.is_empty() {
            lengths = match (dialect, self.quick()) {
                _ if self.tasks.is_empty() && !self.task_file.is_empty() => vec![limit.tokens],
                (true, quick) => vec![if quick { 1024 } else { 2048 }],
                (false, true) => LENGTHS[..1].to_vec(),
                (false, false) => LENGTHS.to_vec(),
            };
            let shortest = lengths[0].min(limit.tokens);
            lengths.retain(|length| *length <= limit.tokens);
            if lengths.is_empty() {
                lengths.push(shortest);
            }
        }
        if let Some(length) = lengths.iter().find(|length| !(1..=limit.tokens).contains(*length)) {
            bail!(Usage(format!(
                "--tokens {length}: the model's context takes 1 to {} ({})",
                limit.tokens, limit.reason
            )));
        }
        if let Some(index) = (0..lengths.len()).find(|index| lengths[..*index].contains(&lengths[*index])) {
            bail!(Usage(format!("--tokens {} is given twice", lengths[index])));
        }
        Ok(lengths)
    }

    fn samples(&self, dialect: bool) -> u32 {
        self.samples.unwrap_or(match (self.quick(), dialect) {
            (true, _) => 12,
            (false, true) => 100,
            (false, false) => 500,
        })
    }

    fn depths(&self) -> Result<Vec<f64>> {
        let steps = if self.quick() { 4 } else { 10 };
        let depths = match self.depths.as_slice() {
            [] => (0..=steps).map(|step| f64::from(step) / f64::from(steps)).collect(),
            depths => depths.to_vec(),
        };
        match depths.iter().find(|depth| !(0.0..=1.0).contains(*depth)) {
            Some(depth) => bail!(Usage(format!("--depths {depth}: give shares of the context from 0 to 1"))),
            None => Ok(depths),
        }
    }
}

pub(crate) fn run(arguments: &Arguments, cancel: &Cancel) -> Result<()> {
    let depths = arguments.depths()?;
    if let Some(out) = &arguments.out {
        results::check(out, arguments.resume)?;
    }
    let prose = arguments.haystack.as_deref().map(Prose::from_file).transpose()?.unwrap_or_default();
    let model = ModelDir::open(&arguments.model.model)?;
    let arms = arms(&arguments.names(), &arguments.policy_options, &arguments.budgets, &model)?;
    let dialect = exam::dialect(&model)?;
    let exams = arguments.exams(dialect.as_ref())?;
    let lengths = arguments.lengths(&model, dialect.is_some())?;
    let samples = arguments.samples(dialect.is_some());
    let material = Material { dialect, prose, seed: arguments.prompt_seed, depths };
    let template = if arguments.no_chat { None } else { model.chat_template()? };
    let settings = arguments.settings(&model, &exams, &lengths, &material, &arms, template.is_some())?;
    let mut prompt = Prompt { ids: Vec::new(), question: Vec::new(), tokenizer: Some(model.tokenizer()?) };
    // Its tokenizer is its own, since the prompt changes with each question.
    let reader = Reader { tokenizer: model.tokenizer()?, template, query_agnostic: arguments.query_agnostic };

    let shape = ModelShape::from(&model.config);
    let answer_tokens = exams.iter().map(Exam::answer_tokens).max().unwrap_or(0);
    let mut plans = Vec::new();
    for length in &lengths {
        let longest =
            exams.iter().map(|exam| exam.longest(*length, &material, &reader)).collect::<Result<Vec<_>>>()?;
        let longest = longest.into_iter().max().unwrap_or(*length);
        plans.extend(arms.iter().map(|arm| arm.policy.plan(shape, longest)).collect::<Result<Vec<_>, _>>()?);
    }
    let (backend, _) = arguments.model.backend(&model)?;
    on!(backend, backend => {
        let device = backend.name();
        let header = Header {
            fastkv: "eval",
            version: env!("CARGO_PKG_VERSION"),
            model: &model.path,
            device: &device,
            settings: &settings,
        };
        // What is in a file is checked before the model is loaded, and nothing is written before it is.
        let kept = arguments.out.as_ref().map(|out| Kept::read(out, arguments.resume, &header)).transpose()?;
        let records = kept.as_ref().map_or(&[][..], |kept| &kept.records);
        let answered = asking::answered(records, &exams, &lengths, &arms, samples, &material)?;
        let engine = arguments.model.load(&model, backend, &plans, answer_tokens, arguments.json, cancel)?;
        let mut run = Run {
            model: &model,
            engine: &engine,
            exact_shortcuts: arguments.policy_options.exact_shortcuts(),
            reader: &reader,
            material: &material,
            samples,
            arms: &arms,
            rows: arms.iter().map(|arm| Row::new(arm, arguments.budgets.len() > 1)).collect(),
            answered,
            results: kept.map(Kept::go_on).transpose()?,
            cancel,
        };
        run.ask(&exams, &lengths, &mut prompt, arguments.json)?;
        let report = Report {
            model: &model.path,
            device: &device,
            lengths: &lengths,
            prompt_seed: arguments.prompt_seed,
            query_agnostic: arguments.query_agnostic,
            cancelled: cancel.is_cancelled(),
            policies: run.rows,
        };
        output::print(&if arguments.json { output::json(&report)? } else { summary::readable(&report).into_bytes() })
    })
}
