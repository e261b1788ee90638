//! `fastkv profile selection`.

use anyhow::{Result, bail};
use clap::Args;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use fastkv::backend::Backend;
use fastkv::backend::cpu::CpuBackend;
use fastkv::engine::{Cancel, EngineError};
use fastkv::eval::{OutputError, Scene};
use fastkv::messages::count;
use fastkv::policy::{Budget, MAX_POOLING, MAX_WINDOW, Pooling, PoolingKind};
use serde::Serialize;

use crate::exit::Usage;
use crate::loading::MachineOptions;
use crate::options::budget;
use crate::{output, progress};

/// Measure selection on random numbers, without a model.
///
/// How many planted keys each budget keeps, by the pooling of scores; and how far attention over what is
/// kept is from attention over everything, on heavy-tailed scores, with its bound
/// 2 (1 − mass) · max‖v‖.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    #[command(flatten)]
    machine: MachineOptions,
    /// Tokens of the layer
    #[arg(long, value_name = "N", default_value_t = 4096)]
    tokens: usize,
    /// Queries that observe
    #[arg(long, value_name = "TOKENS", default_value_t = 8)]
    window: usize,
    /// Key/value heads
    #[arg(long, value_name = "N", default_value_t = 4)]
    kv_heads: usize,
    /// Query heads to a kv head
    #[arg(long, value_name = "N", default_value_t = 4)]
    group: usize,
    /// Elements of a head
    #[arg(long, value_name = "N", default_value_t = 64)]
    head_dim: usize,
    /// Keys to plant
    #[arg(long, value_name = "N", default_value_t = 16)]
    planted: usize,
    /// What is added to the scores of planted keys, in deviations of the others
    #[arg(long, value_name = "NUMBER", default_value_t = 1.5)]
    raise: f32,
    /// Width of the pooling kernels, odd
    #[arg(long, value_name = "WIDTH", default_value_t = 7)]
    kernel: usize,
    /// Budgets: rates or numbers of tokens, the window included
    #[arg(
        long,
        value_name = "RATE|TOKENS",
        value_parser = budget,
        value_delimiter = ',',
        default_value = "0.5,0.25,0.125,0.0625,0.03125,0.015625"
    )]
    budgets: Vec<Budget>,
    /// Scenes to take the mean of
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,
    /// Seed of the numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object instead of the table
    #[arg(long, help_heading = "Output")]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    device: String,
    scene: Scene,
    planted: usize,
    raise: f32,
    samples: u32,
    seed: u64,
    recall: Vec<Recall>,
    output: Vec<Output>,
}

/// Planted keys found by a way to pool.
#[derive(Serialize)]
struct Recall {
    pooling: String,
    tokens: usize,
    /// Over all heads and scenes.
    mean: f64,
    /// By kv head, over scenes.
    heads: Vec<f64>,
}

/// Attention over what a budget keeps.
#[derive(Serialize)]
struct Output {
    tokens: usize,
    /// Mean attention on kept keys.
    mass: f64,
    /// Mean of ‖o_full − o_kept‖ / ‖o_full‖.
    relative_error: f64,
    /// The largest share of its bound that an error had.
    of_bound: f64,
    /// Whether every error was within its bound.
    bounded: bool,
}

pub(crate) fn run(arguments: &Arguments, cancel: &Cancel) -> Result<()> {
    let (scene, mut budgets) = arguments.scene()?;
    budgets.sort_unstable();
    budgets.dedup();
    let backend = arguments.machine.cpu()?;
    let bar = progress::bar(arguments.json, 2 * u64::from(arguments.samples), "selecting");
    let poolings = [
        Pooling { kind: PoolingKind::Max, kernel: 1 },
        Pooling { kind: PoolingKind::Max, kernel: arguments.kernel },
        Pooling { kind: PoolingKind::Average, kernel: arguments.kernel },
    ];
    let mut found = vec![vec![vec![0.0; scene.kv_heads]; budgets.len()]; poolings.len()];
    let mut errors: Vec<Vec<OutputError>> = vec![Vec::new(); budgets.len()];
    for sample in 0..arguments.samples {
        let seed = arguments.seed.wrapping_mul(1 << 32).wrapping_add(u64::from(sample));
        let numbers = scene.planted(arguments.planted, arguments.raise, seed);
        for (pooling, found) in poolings.iter().zip(&mut found) {
            go_on(cancel)?;
            let recall = scene.recall(&backend, &numbers, *pooling, &budgets)?;
            for (found, recall) in found.iter_mut().flatten().zip(recall.iter().flatten()) {
                *found += recall / f64::from(arguments.samples);
            }
        }
        bar.inc(1);
        go_on(cancel)?;
        let numbers = scene.heavy_tailed(seed);
        let of_scene = scene.output_errors(&backend, &numbers, poolings[0], &budgets)?;
        check(&of_scene)?;
        errors.iter_mut().zip(of_scene).for_each(|(errors, of_scene)| errors.extend(of_scene));
        bar.inc(1);
    }
    bar.finish_and_clear();
    let mut recall = Vec::new();
    for (pooling, found) in poolings.iter().zip(found) {
        for (tokens, heads) in budgets.iter().zip(found) {
            let mean = heads.iter().sum::<f64>() / heads.len() as f64;
            recall.push(Recall { pooling: pooling.to_string(), tokens: *tokens, mean, heads });
        }
    }
    let report = Report {
        device: CpuBackend::name(&backend),
        scene,
        planted: arguments.planted,
        raise: arguments.raise,
        samples: arguments.samples,
        seed: arguments.seed,
        recall,
        output: budgets.iter().zip(&errors).map(|(tokens, errors)| Output::new(*tokens, errors)).collect(),
    };
    output::print(&if arguments.json { output::json(&report)? } else { readable(&report).into_bytes() })
}

impl Arguments {
    /// The scene, and the budgets in tokens.
    fn scene(&self) -> Result<(Scene, Vec<usize>)> {
        let Self { tokens, window, kv_heads, group, head_dim, planted, kernel, .. } = *self;
        let check = |fits: bool, message: String| if fits { Ok(()) } else { Err(Usage(message)) };
        check(
            (1..=MAX_WINDOW).contains(&window),
            format!("--window {window}: give 1 to {MAX_WINDOW} tokens"),
        )?;
        let most = 1 << 20;
        check(
            (window + 1..=most).contains(&tokens),
            format!("--tokens {tokens}: give {} to {most}, more than the window", window + 1),
        )?;
        for (name, value) in [("kv-heads", kv_heads), ("group", group)] {
            check((1..=256).contains(&value), format!("--{name} {value}: give 1 to 256"))?;
        }
        check((2..=1024).contains(&head_dim), format!("--head-dim {head_dim}: give 2 to 1024"))?;
        let before = tokens - window;
        check(
            (1..=before).contains(&planted),
            format!("--planted {planted}: 1 to {before} keys can be raised"),
        )?;
        check(self.raise.is_finite(), format!("--raise {}: give a number", self.raise))?;
        check(
            kernel % 2 == 1 && kernel <= MAX_POOLING,
            format!("--kernel {kernel}: give an odd number from 1 to {MAX_POOLING}"),
        )?;
        let budget = |budget: &Budget| {
            let (count, fits) = match *budget {
                Budget::Rate(rate) => ((tokens as f64 * rate) as usize, rate > 0.0 && rate <= 1.0),
                Budget::Tokens(count) => (count, (window + 1..=tokens).contains(&count)),
            };
            let shown = match *budget {
                Budget::Rate(rate) => rate.to_string(),
                Budget::Tokens(count) => count.to_string(),
            };
            let least = window + 1;
            check(
                fits,
                format!("--budgets {shown}: give rates above 0 and at most 1, or {least} to {tokens} tokens"),
            )?;
            Ok::<_, Usage>(count.max(least))
        };
        let budgets = self.budgets.iter().map(budget).collect::<Result<_, _>>()?;
        Ok((Scene { tokens, window, kv_heads, group, head_dim }, budgets))
    }
}

/// Stops after Ctrl-C.
fn go_on(cancel: &Cancel) -> Result<()> {
    if cancel.is_cancelled() { Err(EngineError::Cancelled.into()) } else { Ok(()) }
}

/// Holds a scene to what is true of any attention: errors within their bounds, and a mass that never falls
/// as budgets rise.
fn check(errors: &[Vec<OutputError>]) -> Result<()> {
    if let Some(error) = errors.iter().flatten().find(|error| !error.is_bounded()) {
        bail!(
            "an error of {} is beyond its bound of {}: attention or selection is broken",
            error.error,
            error.bound
        );
    }
    for pair in errors.windows(2) {
        if let Some((less, more)) =
            pair[0].iter().zip(&pair[1]).find(|(less, more)| more.mass < less.mass - 1e-5)
        {
            bail!(
                "the attention kept falls from {} to {} as the budget rises: selection is broken",
                less.mass,
                more.mass
            );
        }
    }
    Ok(())
}

impl Output {
    fn new(tokens: usize, errors: &[OutputError]) -> Self {
        let mean = |of: fn(&OutputError) -> f64| errors.iter().map(of).sum::<f64>() / errors.len() as f64;
        // Of a bound that rounds to nothing no share can be told.
        let share = |error: &OutputError| {
            if error.bound > 1e-4 * error.longest_value { error.error / error.bound } else { 0.0 }
        };
        Self {
            tokens,
            mass: mean(|error| error.mass),
            relative_error: mean(|error| error.error / error.norm),
            of_bound: errors.iter().map(share).fold(0.0, f64::max),
            bounded: errors.iter().all(OutputError::is_bounded),
        }
    }
}

fn readable(report: &Report) -> String {
    let mut table = Table::new();
    let mut poolings: Vec<&str> = report.recall.iter().map(|recall| recall.pooling.as_str()).collect();
    poolings.dedup();
    let columns = poolings.iter().map(|pooling| format!("found, {pooling}"));
    let header = ["budget".to_owned()].into_iter().chain(columns);
    table
        .load_style(UTF8_FULL_CONDENSED)
        .set_header(header.chain(["mass", "error", "of its bound"].map(String::from)));
    for (index, output) in report.output.iter().enumerate() {
        let found = report.recall.iter().skip(index).step_by(report.output.len());
        let found = found.map(|recall| format!("{:.1} %", 100.0 * recall.mean));
        let [mass, error, share] = [output.mass, output.relative_error, output.of_bound]
            .map(|share| format!("{:.1} %", 100.0 * share));
        table.add_row([output.tokens.to_string()].into_iter().chain(found).chain([mass, error, share]));
    }
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let Scene { tokens, window, kv_heads, group, head_dim } = report.scene;
    format!(
        "{tokens} tokens, {kv_heads} kv heads of {group} query heads, {head_dim} wide, window {window}; {} planted {} \
         deviations up; {}\n{table}\n",
        count(report.planted, "key"),
        report.raise,
        count(report.samples as usize, "scene")
    )
}
