//! A Llama with random weights in bf16 on a GPU: that of Llama 3.1 8B, prompts alone and several at once.
//!
//! `FASTKV_TTFT=8192,4x32768` measures a prompt of 8192 tokens and four of 32768 that are read together,
//! `FASTKV_TTFT_POLICIES=full,fastkv` these policies; `FASTKV_BENCH_JSON=file` writes the figures for programs.

pub(crate) mod emulated;

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use fastkv::backend::Backend;
use fastkv::backend::cuda::{CudaBackend, CudaLauncher, probe};
use fastkv::engine::{Control, Engine, EngineError, MemoryEstimate, MemoryOptions, PrefillOptions, Prompt};
use fastkv::kernels::{DType, MatrixProduct};
use fastkv::measure::{
    Measurable, StageSeconds, Staged, decode, median, prefill_by_stage, prefill_flops, random_engine,
    random_prompts, shape,
};
use fastkv::policy::{FastKv, GemFilter, Plan, Policy, SnapKv};
use serde::Serialize;

const CASES: &str = "8192,16384,32768,65536,131072,4x8192,2x32768";
const POLICIES: [&str; 5] = ["full", "fastkv", "fastkv-constant", "snapkv", "gemfilter"];
/// Policies whose decoding is measured: the others decode over caches like these.
const DECODED: [&str; 2] = ["full", "fastkv"];

type Gpu<D> = Staged<CudaBackend<D>>;

/// A model, what it reads, and by which policies.
struct Setting {
    shape: &'static str,
    cases: Vec<Case>,
    policies: Vec<&'static str>,
    /// Tokens of an answer.
    answer: usize,
    /// From so many tokens on, events behind every operation tell the time by stage.
    staged: usize,
}

/// Prompts of one length that are read together.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Case {
    batch: usize,
    tokens: usize,
}

/// What was measured of a policy and prompts.
#[derive(Serialize)]
struct Measured {
    policy: &'static str,
    batch: usize,
    /// Of each prompt.
    tokens: usize,
    ttft_s: f64,
    runs_s: Vec<f64>,
    /// Full context's time over this one.
    speed_up: Option<f64>,
    /// Full context's products over this one's: what the speed-up could be at the same rate.
    flop_bound: f64,
    /// Of all prompts.
    flops: f64,
    peak_bytes: usize,
    kv_peak_bytes: usize,
    /// Of all prompts together.
    decode_tokens_per_s: Option<f64>,
    /// Of the last run.
    stages_s: Option<StageSeconds>,
}

#[derive(Serialize)]
struct Report {
    device: String,
    weight_bytes: usize,
    measured: Vec<Measured>,
    skipped: Vec<Skipped>,
}

/// What does not fit into memory.
#[derive(Serialize)]
struct Skipped {
    policy: &'static str,
    batch: usize,
    tokens: usize,
    reason: String,
}

impl Case {
    /// Tokens of all prompts.
    fn rows(self) -> usize {
        self.batch * self.tokens
    }
}

impl FromStr for Case {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (batch, tokens) = text.trim().split_once('x').unwrap_or(("1", text));
        match (batch.trim().parse(), tokens.trim().parse()) {
            (Ok(batch), Ok(tokens)) if batch > 0 && tokens > 0 => Ok(Self { batch, tokens }),
            _ => bail!("{text}: give tokens such as 8192, or 4x8192 for four prompts together"),
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x {} tokens", self.batch, self.tokens)
    }
}

impl Setting {
    /// Llama 3.1 8B, and what the environment asks for.
    fn from_environment() -> Result<Self> {
        let variable = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
        let cases = variable("FASTKV_TTFT", CASES);
        let cases = cases.split(',').map(str::parse).collect::<Result<_>>().context("FASTKV_TTFT")?;
        let chosen = variable("FASTKV_TTFT_POLICIES", &POLICIES.join(","));
        let chosen: Vec<&str> = chosen.split(',').map(str::trim).collect();
        if let Some(unknown) = chosen.iter().find(|name| !POLICIES.contains(name)) {
            bail!("FASTKV_TTFT_POLICIES names {unknown}: there are {}", POLICIES.join(", "));
        }
        let policies = POLICIES.into_iter().filter(|name| chosen.contains(name)).collect();
        Ok(Self {
            shape: "llama-3.1-8b",
            cases,
            policies,
            answer: 32,
            staged: Gpu::<CudaLauncher>::MARKED_ROWS,
        })
    }
}

pub(crate) fn measure(device: CudaLauncher) -> Result<()> {
    let setting = Setting::from_environment()?;
    let name = probe::devices()?.devices.swap_remove(0).name;
    let path = std::env::var_os("FASTKV_BENCH_JSON");
    measure_all(device, name, &setting, |report| match &path {
        Some(path) => std::fs::write(path, serde_json::to_string_pretty(report)?)
            .with_context(|| format!("{}", Path::new(path).display())),
        None => Ok(()),
    })?;
    Ok(())
}

/// Measures every case that fits, and hands over what there is after each: the next one may end the program.
fn measure_all<D: MatrixProduct + fmt::Debug>(
    device: D,
    name: String,
    setting: &Setting,
    mut save: impl FnMut(&Report) -> Result<()>,
) -> Result<Report> {
    let backend = Staged::new(CudaBackend::new(device, &*name, DType::BF16)?);
    let config = shape(setting.shape).context(setting.shape)?;
    let engine = random_engine(backend, config, 1, |_| ())?;
    let weight_bytes = engine.backend().inner().memory().0;
    println!("{name}: {}, random bf16 weights of {:.1} GiB", setting.shape, gib(weight_bytes));
    println!(
        "{:>5} {:>7} {:16} {:>9} {:>8} {:>6} {:>9} {:>9} {:>9}  {}",
        "batch",
        "tokens",
        "policy",
        "TTFT",
        "speed-up",
        "bound",
        "TFLOP/s",
        "peak GiB",
        "decode/s",
        StageSeconds::default().named().map(|(name, _)| name).join(" / ")
    );
    let mut report = Report { device: name, weight_bytes, measured: Vec::new(), skipped: Vec::new() };
    for case in &setting.cases {
        let mut full_s = None;
        for name in &setting.policies {
            let plan = policy(name).plan(engine.shape(), case.tokens)?;
            if let Err(reason) = fits(&engine, weight_bytes, setting, *case, &plan) {
                println!("{:5} {:7} {name:16} skipped: {reason}", case.batch, case.tokens);
                let reason = reason.to_string();
                report.skipped.push(Skipped { policy: name, batch: case.batch, tokens: case.tokens, reason });
                continue;
            }
            let line = measure_policy(&engine, setting, name, *case, &plan, full_s)
                .with_context(|| format!("{name}, {case}"))?;
            if *name == "full" {
                full_s = Some(line.ttft_s);
            }
            print(&line);
            report.measured.push(line);
            save(&report)?;
        }
    }
    save(&report)?;
    Ok(report)
}

/// Whether there is room for a case beside the weights, which are there.
fn fits<D: MatrixProduct + fmt::Debug>(
    engine: &Engine<Gpu<D>>,
    weight_bytes: usize,
    setting: &Setting,
    case: Case,
    plan: &Plan,
) -> Result<(), EngineError> {
    let backend = engine.backend();
    let options = MemoryOptions::new(backend, weight_bytes as u64, setting.answer);
    let estimate = MemoryEstimate::together(engine.config(), &vec![plan; case.batch], &options);
    let free = backend.free_memory().unwrap_or(u64::MAX);
    estimate.check(free.saturating_add(weight_bytes as u64))
}

fn policy(name: &str) -> Policy {
    match name {
        "fastkv" => Policy::FastKv(FastKv::proportional()),
        "fastkv-constant" => Policy::FastKv(FastKv::constant()),
        "snapkv" => Policy::SnapKv(SnapKv::default()),
        "gemfilter" => Policy::GemFilter(GemFilter::default()),
        _ => Policy::Full,
    }
}

fn print(line: &Measured) {
    let or_dash =
        |number: Option<f64>, digits| number.map_or("-".into(), |number| format!("{number:.digits$}"));
    let stages = line
        .stages_s
        .map(|stages| stages.named().map(|(_, seconds)| format!("{:.1}", 1e3 * seconds)).join(" / ") + " ms")
        .unwrap_or_default();
    println!(
        "{:5} {:7} {:16} {:7.3} s {:>8} {:6.2} {:9.0} {:9.1} {:>9}  {stages}",
        line.batch,
        line.tokens,
        line.policy,
        line.ttft_s,
        or_dash(line.speed_up, 2),
        line.flop_bound,
        line.flops / line.ttft_s / 1e12,
        gib(line.peak_bytes),
        or_dash(line.decode_tokens_per_s, 1),
    );
}

fn measure_policy<D: MatrixProduct + fmt::Debug>(
    engine: &Engine<Gpu<D>>,
    setting: &Setting,
    name: &'static str,
    case: Case,
    plan: &Plan,
    full_s: Option<f64>,
) -> Result<Measured> {
    let Case { batch, tokens } = case;
    let backend = engine.backend();
    let ids = random_prompts(batch, tokens, engine.config().vocab_size, tokens as u64);
    let options = PrefillOptions { slack: setting.answer, ..PrefillOptions::default() };
    let control = Control::default();
    let prompts: Vec<Prompt<'_>> = ids.iter().map(|ids| Prompt { ids, plan }).collect();
    let prefill = || prefill_by_stage(engine, &prompts, &options, &control, setting.staged);
    // Long prompts take their time; what a first run has to do beside is little there.
    if case.rows() <= 32_768 || name == "full" {
        prefill()?;
    }
    let runs = match case.rows() {
        ..=32_768 => 3,
        32_769..=65_536 => 2,
        _ => 1,
    };
    let (mut runs_s, mut stages_s) = (Vec::new(), None);
    let mut last = None;
    backend.forget_memory_peak();
    for _ in 0..runs {
        // One cache at a time.
        drop(last.take());
        let read = prefill()?;
        stages_s = read.stages;
        runs_s.push(read.seconds);
        last = Some(read.prefills);
    }
    let peak_bytes = backend.inner().memory().1;
    let ttft_s = median(&runs_s).context("a run")?;

    let mut last = last.context("a run")?;
    let kv_peak_bytes = last.iter().map(|prefill| prefill.peak_kv_bytes).sum();
    let decode_tokens_per_s = match DECODED.contains(&name) {
        false => None,
        true => decode(engine, &mut last, setting.answer, &control)?,
    };
    let full_plan = Policy::Full.plan(engine.shape(), tokens)?;
    let [flops, of_full] = [plan, &full_plan].map(|plan| prefill_flops(engine.config(), plan, None, true));
    Ok(Measured {
        policy: name,
        batch,
        tokens,
        ttft_s,
        runs_s,
        speed_up: full_s.map(|full| full / ttft_s),
        flop_bound: of_full / flops,
        flops: batch as f64 * flops,
        peak_bytes,
        kv_peak_bytes,
        decode_tokens_per_s,
        stages_s,
    })
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
