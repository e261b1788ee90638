//! A Llama of the shape of Llama 3.1 8B with random weights, in bf16 on a GPU.
//!
//! `FASTKV_TTFT=8192,32768` measures these lengths, `FASTKV_TTFT_POLICIES=full,fastkv` these policies;
//! `FASTKV_BENCH_JSON=file` writes the figures for programs.

mod staged;

use anyhow::{Context, Result, bail};
use fastkv::backend::cuda::{CudaBackend, CudaLauncher, probe};
use fastkv::engine::{Control, Engine, PrefillOptions, Prompt};
use fastkv::kernels::DType;
use fastkv::measure::{decode, prefill, prefill_flops, random_engine, random_tokens, shape};
use fastkv::policy::{FastKv, GemFilter, Policy, SnapKv};
use serde::Serialize;

use staged::{STAGES, Staged};

const LENGTHS: [usize; 5] = [8192, 16_384, 32_768, 65_536, 131_072];
const POLICIES: [&str; 5] = ["full", "fastkv", "fastkv-constant", "snapkv", "gemfilter"];
/// Policies whose decoding is measured: the others decode over caches like these.
const DECODED: [&str; 2] = ["full", "fastkv"];
const ANSWER: usize = 32;
/// From this length on, events between launches are lost in the noise, and tell the time by stage.
const STAGED: usize = 32_768;

const SHAPE: &str = "llama-3.1-8b";

type Gpu = CudaBackend<Staged>;

/// What was measured of a policy at a length.
#[derive(Serialize)]
struct Measured {
    policy: &'static str,
    tokens: usize,
    ttft_s: f64,
    runs_s: Vec<f64>,
    /// Full context's time over this one.
    speed_up: Option<f64>,
    /// Full context's products over this one's: what the speed-up could be at the same rate.
    flop_bound: f64,
    flops: f64,
    peak_bytes: usize,
    kv_peak_bytes: usize,
    decode_tokens_per_s: Option<f64>,
    /// Milliseconds by stage, in the order of `stages`.
    stages_ms: Option<[f64; STAGES.len()]>,
}

#[derive(Serialize)]
struct Report {
    device: String,
    weight_bytes: usize,
    stages: [&'static str; STAGES.len()],
    measured: Vec<Measured>,
}

pub(crate) fn measure(device: CudaLauncher) -> Result<()> {
    let lengths = match std::env::var("FASTKV_TTFT") {
        Ok(list) => list
            .split(',')
            .map(|length| length.trim().parse())
            .collect::<Result<Vec<usize>, _>>()
            .with_context(|| format!("FASTKV_TTFT={list}: lengths such as 8192,32768"))?,
        Err(_) => LENGTHS.to_vec(),
    };
    let chosen = std::env::var("FASTKV_TTFT_POLICIES").unwrap_or_else(|_| POLICIES.join(","));
    if let Some(unknown) = chosen.split(',').find(|name| !POLICIES.contains(name)) {
        bail!("FASTKV_TTFT_POLICIES names {unknown}: there are {}", POLICIES.join(", "));
    }
    let name = probe::devices()?.devices.swap_remove(0).name;
    let engine = engine(device, &name)?;
    let weight_bytes = engine.backend().memory().0;
    println!("{name}: Llama 3.1 8B, random bf16 weights of {:.1} GiB, batch 1", gib(weight_bytes));
    println!(
        "{:>7} {:16} {:>9} {:>8} {:>6} {:>9} {:>9} {:>9}  {}",
        "tokens",
        "policy",
        "TTFT",
        "speed-up",
        "bound",
        "TFLOP/s",
        "peak GiB",
        "decode/s",
        STAGES.join(" / ")
    );
    let mut measured = Vec::new();
    for tokens in lengths {
        let mut full_s = None;
        for policy in POLICIES.into_iter().filter(|name| chosen.split(',').any(|chosen| chosen == *name)) {
            let line = measure_policy(&engine, policy, tokens, full_s)
                .with_context(|| format!("{policy} at {tokens} tokens"))?;
            if policy == "full" {
                full_s = Some(line.ttft_s);
            }
            print(&line);
            measured.push(line);
        }
    }
    if let Some(path) = std::env::var_os("FASTKV_BENCH_JSON") {
        let report = Report { device: name, weight_bytes, stages: STAGES, measured };
        std::fs::write(&path, serde_json::to_string_pretty(&report)?).with_context(|| format!("{path:?}"))?;
    }
    Ok(())
}

fn print(line: &Measured) {
    let or_dash =
        |number: Option<f64>, digits| number.map_or("-".into(), |number| format!("{number:.digits$}"));
    let stages = line
        .stages_ms
        .map_or_else(String::new, |stages| stages.map(|ms| format!("{ms:.0}")).join(" / ") + " ms");
    println!(
        "{:7} {:16} {:7.3} s {:>8} {:6.2} {:9.0} {:9.1} {:>9}  {stages}",
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

fn measure_policy(
    engine: &Engine<Gpu>,
    name: &'static str,
    tokens: usize,
    full_s: Option<f64>,
) -> Result<Measured> {
    let policy = match name {
        "fastkv" => Policy::FastKv(FastKv::proportional()),
        "fastkv-constant" => Policy::FastKv(FastKv::constant()),
        "snapkv" => Policy::SnapKv(SnapKv::default()),
        "gemfilter" => Policy::GemFilter(GemFilter::default()),
        _ => Policy::Full,
    };
    let plan = policy.plan(engine.shape(), tokens)?;
    let backend = engine.backend();
    let ids = random_tokens(tokens, engine.config().vocab_size, tokens as u64);
    let options = PrefillOptions { slack: ANSWER, ..PrefillOptions::default() };
    let control = Control::default();
    let prompts = [Prompt { ids: &ids, plan: &plan }];
    let prefill = || prefill(engine, &prompts, &options, &control);
    // Long prompts take their time; what a first run has to do beside is little there.
    if tokens <= 32_768 || name == "full" {
        prefill()?;
    }
    let runs = match tokens {
        ..=32_768 => 3,
        32_769..=65_536 => 2,
        _ => 1,
    };
    let stages = tokens >= STAGED;
    let (mut runs_s, mut stages_ms) = (Vec::new(), None);
    let mut last = None;
    backend.forget_peak();
    for _ in 0..runs {
        // One cache at a time.
        drop(last.take());
        backend.device().start(stages);
        let (prefill, seconds) = prefill()?;
        stages_ms = backend.device().stop()?;
        runs_s.push(seconds);
        last = Some(prefill);
    }
    let peak_bytes = backend.memory().1;
    let mut sorted = runs_s.clone();
    sorted.sort_by(f64::total_cmp);
    let ttft_s = sorted[sorted.len() / 2];

    let mut last = last.context("a run")?;
    let kv_peak_bytes = last.iter().map(|prefill| prefill.peak_kv_bytes).sum();
    let decode_tokens_per_s = match DECODED.contains(&name) {
        false => None,
        true => decode(engine, &mut last, ANSWER, &control)?,
    };
    let flops = prefill_flops(engine.config(), &plan, true);
    let full = prefill_flops(engine.config(), &Policy::Full.plan(engine.shape(), tokens)?, true);
    Ok(Measured {
        policy: name,
        tokens,
        ttft_s,
        runs_s,
        speed_up: full_s.map(|full| full / ttft_s),
        flop_bound: full / flops,
        flops,
        peak_bytes,
        kv_peak_bytes,
        decode_tokens_per_s,
        stages_ms,
    })
}

fn engine(device: CudaLauncher, name: &str) -> Result<Engine<Gpu>> {
    let backend = CudaBackend::new(Staged::new(device), name, DType::BF16)?;
    Ok(random_engine(backend, shape(SHAPE).context(SHAPE)?, 1, |_| ())?)
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
