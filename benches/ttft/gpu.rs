//! A Llama of the shape of Llama 3.1 8B with random weights, in bf16 on a GPU.
//!
//! `FASTKV_TTFT=8192,32768` measures these lengths, `FASTKV_TTFT_POLICIES=full,fastkv` these policies;
//! `FASTKV_BENCH_JSON=file` writes the figures for programs.

#[path = "../support/random.rs"]
mod random;
mod staged;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use fastkv::backend::BackendError;
use fastkv::backend::cuda::{CudaBackend, CudaLauncher, pipeline, probe};
use fastkv::engine::{Control, Engine, PrefillOptions};
use fastkv::kernels::{DType, Device};
use fastkv::model::LlamaConfig;
use fastkv::policy::{FastKv, GemFilter, Plan, Policy, SnapKv};
use serde::Serialize;

use random::Random;
use staged::{STAGES, Staged};

const LENGTHS: [usize; 5] = [8192, 16_384, 32_768, 65_536, 131_072];
const POLICIES: [&str; 5] = ["full", "fastkv", "fastkv-constant", "snapkv", "gemfilter"];
/// Policies whose decoding is measured: the others decode over caches like these.
const DECODED: [&str; 2] = ["full", "fastkv"];
const ANSWER: usize = 32;
/// From this length on, events between launches are lost in the noise, and tell the time by stage.
const STAGED: usize = 32_768;

const LLAMA_3_1_8B: &str = r#"{
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131136, "rms_norm_eps": 1e-5, "rope_theta": 500000.0
}"#;

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
    let mut random = Random(tokens as u64);
    let ids: Vec<u32> = (0..tokens).map(|_| random.below(engine.config().vocab_size)).collect();
    let options = PrefillOptions { slack: ANSWER, ..PrefillOptions::default() };
    let control = Control::default();
    let prefill = || -> Result<_> {
        let begin = Instant::now();
        // The logits lie on the host when it returns.
        let prefill = engine.prefill(&ids, &plan, &options, &control)?;
        Ok((prefill, begin.elapsed().as_secs_f64()))
    };
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
    let kv_peak_bytes = last.peak_kv_bytes;
    let decode_tokens_per_s = match DECODED.contains(&name) {
        false => None,
        true => {
            let mut begin = Instant::now();
            for step in 0..ANSWER {
                // The first step asks for what the others find prepared.
                if step == 1 {
                    begin = Instant::now();
                }
                last.logits = engine.append(&mut last.cache, &[greatest(&last.logits)], &control)?;
            }
            Some((ANSWER - 1) as f64 / begin.elapsed().as_secs_f64())
        }
    };
    let flops = flops(engine.config(), &plan);
    let full = flops_of_full(engine.config(), tokens)?;
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

fn greatest(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
    best.unwrap_or(0) as u32
}

fn flops_of_full(config: &LlamaConfig, tokens: usize) -> Result<f64> {
    Ok(flops(config, &Policy::Full.plan(config.into(), tokens)?))
}

/// Products of a prefill with the exact shortcuts, multiplications and additions.
fn flops(config: &LlamaConfig, plan: &Plan) -> f64 {
    let hidden = config.hidden_size as f64;
    let queries = (config.query_heads * config.head_dim) as f64;
    let keys = (config.kv_heads * config.head_dim) as f64;
    // K and V of every row; Q, output projection and MLP of the rows that go on.
    let of_keys = |rows: f64| 2.0 * rows * 2.0 * keys * hidden;
    let of_rows =
        |rows: f64| 2.0 * rows * (2.0 * queries * hidden + 3.0 * config.intermediate_size as f64 * hidden);
    // Rows that stand among the keys evenly see half of them.
    let attention = |rows: f64, keys: f64, seen: f64| 4.0 * rows * keys * seen * queries;
    let mut sum = 2.0 * hidden * config.vocab_size as f64;
    if let Some(restart) = plan.restart {
        let rows = plan.prompt_tokens as f64;
        sum += restart.layer as f64 * (of_keys(rows) + of_rows(rows) + attention(rows, rows, 0.5))
            + of_keys(rows);
    }
    for (index, layer) in plan.layers.iter().enumerate() {
        let rows = layer.rows as f64;
        let (going_on, seen) = match layer.propagate {
            Some(propagate) => (propagate.count() as f64, 0.5),
            None if index + 1 == plan.layers.len() => (1.0, 1.0),
            None => (rows, 0.5),
        };
        sum += of_keys(rows) + of_rows(going_on) + attention(going_on, rows, seen);
    }
    sum
}

/// Weights that no file holds. Each is cut from a block of random numbers, from another place on.
fn engine(device: CudaLauncher, name: &str) -> Result<Engine<Gpu>> {
    let backend = CudaBackend::new(Staged::new(device), name, DType::BF16)?;
    let config = LlamaConfig::from_json(LLAMA_3_1_8B)?;
    // No multiple of a row, so that rows differ.
    const BLOCK: usize = (16 << 20) - 8 * 1237;
    let mut random = Random(1);
    let normal: Vec<f32> = (0..BLOCK).map(|_| random.normal()).collect();
    let mut blocks: HashMap<usize, pipeline::Weight<Staged>> = HashMap::new();
    let mut next = 0;
    let engine = Engine::with_weights(backend, config, |backend, name, shape| {
        let elements: usize = shape.iter().product();
        if let [width] = *shape {
            let ones = vec![half::bf16::ONE; width];
            // SAFETY: the address is of so many elements.
            return backend
                .weight_with(shape, |device, to| unsafe { device.upload(to, bytemuck::cast_slice(&ones)) });
        }
        // Activations of about one, and embeddings that are no smaller than what the layers add.
        let fan_in = if name.contains("embed") { 1 } else { shape[1] };
        let block = match blocks.entry(fan_in) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                let scale = 1.0 / (fan_in as f32).sqrt();
                let scaled: Vec<_> =
                    normal.iter().map(|number| half::bf16::from_f32(number * scale)).collect();
                place.insert(backend.weight_with(&[BLOCK], |device, to| {
                    // SAFETY: the address is of so many elements.
                    unsafe { device.upload(to, bytemuck::cast_slice(&scaled)) }
                })?)
            }
        };
        let from = block.address();
        backend.weight_with(shape, |device, to| {
            let mut done = 0;
            while done < elements {
                let count = (elements - done).min(BLOCK - next);
                // SAFETY: `count` elements of the block from `next` on, to where so many are left.
                unsafe { device.copy(to + 2 * done as u64, from + 2 * next as u64, 2 * count) }?;
                done += count;
                next = (next + count) % BLOCK;
            }
            // Pieces of 16 bytes.
            next = (next + 8 * 4099) / 8 * 8 % BLOCK;
            Ok(())
        })
    })?;
    engine.backend().device().synchronize().map_err(BackendError::from)?;
    Ok(engine)
}

fn gib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
