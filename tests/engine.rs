//! The engine on tiny models, held to the oracle.

// Steering takes a list of ranges, often of one.
#![allow(clippy::single_range_in_vec_init)]
#![cfg(feature = "pipeline")]

mod oracle;
mod tiny;

#[path = "engine/batches.rs"]
mod batches;
#[path = "tiny/probe.rs"]
mod probe;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::path::Path;

use fastkv::backend::cpu::CpuBackend;
use fastkv::backend::{Backend, BackendError};
use fastkv::engine::{
    Cancel, Control, Engine, EngineError, FinishReason, Generation, GenerationOptions, MemoryEstimate,
    MemoryOptions, Prefill, PrefillOptions, Progress, Prompt, Sampler, Sampling, Trace, Turn,
};
use fastkv::model::ModelDir;
use fastkv::policy::{
    AdaKv, Budget, FastGen, FastKv, GemFilter, H2o, HeadKv, HeadScores, Keep, LayerPlan, ModelShape, Plan,
    Policy, Pooling, PoolingKind, Propagate, PyramidInfer, PyramidKv, Random, Saliency, SnapKv, Steering,
    StreamingLlm, TokenClasses, Tsp,
};
use oracle::llama::{Model, Observation, Orders, Sequence};
use oracle::plan as rules;
use oracle::policies::Classes;
use oracle::{Pool, relative_distance};
use probe::Probe;
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;
use tiny::{Rng, Stored, Tiny};

/// Largest difference of logits over the largest logit. Through a layer a rounding error of u = 6·10⁻⁸
/// grows with the sums it passes (tens of terms) and the sharpness of its softmax (scores of tens): some
/// 10 u to 50 u in these models.
const CLOSE: f64 = 1e-5;

/// A choice nearer than this (see `oracle::margin`) may fall either way: scores are sums of up to 1000
/// probabilities of hidden states that are off by `CLOSE` at most.
const NEAR_TIE: f64 = 1e-5;

struct Rig<B: Backend> {
    _directory: TempDir,
    engine: Engine<B>,
    oracle: Model,
}

fn load<B: Backend>(directory: &Path, backend: B) -> Engine<B> {
    let model = ModelDir::open(directory).expect("a model");
    Engine::load(backend, &model).expect("an engine")
}

fn rig_on<B: Backend>(tiny: &Tiny, backend: B) -> Rig<B> {
    let directory = tiny.write();
    let engine = load(directory.path(), backend);
    Rig { engine, oracle: Model::open(directory.path()), _directory: directory }
}

fn cpu(threads: usize) -> CpuBackend {
    CpuBackend::new(Some(threads)).expect("threads")
}

fn rig(tiny: &Tiny) -> Rig<CpuBackend> {
    rig_on(tiny, cpu(2))
}

const TRACED: PrefillOptions = PrefillOptions { exact_shortcuts: true, trace: true, slack: 0 };

impl<B: Backend> Rig<B> {
    fn plan(&self, policy: &Policy, n: usize) -> Plan {
        policy.plan(self.engine.shape(), n).expect("a plan")
    }

    fn prefill(&self, ids: &[u32], policy: &Policy, options: &PrefillOptions) -> Prefill<B> {
        let plan = self.plan(policy, ids.len());
        let prefill = self.engine.prefill(ids, &plan, options, &Control::default()).expect("a prefill");
        assert!(prefill.peak_kv_bytes <= plan.peak_kv_bytes(4));
        let bytes = prefill.cache.bytes(self.engine.backend());
        match policy {
            // What heads share is rounded head by head.
            Policy::AdaKv(_) | Policy::FastGen(_) | Policy::Tsp(_) => assert!(bytes <= plan.kept_kv_bytes(4)),
            _ => assert_eq!(bytes, plan.kept_kv_bytes(4)),
        }
        let tokens = plan.restart.map_or(ids.len(), |restart| restart.count);
        assert_eq!(prefill.cache.logical_length(), tokens);
        prefill
    }

    fn append(&self, prefill: &mut Prefill<B>, ids: &[u32]) -> Vec<f32> {
        self.engine.append(&mut prefill.cache, ids, &Control::default()).expect("logits")
    }

    fn positions(&self, prefill: &Prefill<B>) -> Vec<Vec<Vec<u32>>> {
        prefill.cache.positions(self.engine.backend()).expect("positions")
    }
}

/// Models that differ in everything a configuration can say.
fn models() -> Vec<(&'static str, Tiny)> {
    let llama3 = json!({ "rope_theta": 10000.0, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }});
    let tiny = Tiny::default();
    vec![
        ("two queries a key", tiny.clone()),
        (
            "sixteen queries a key, tied",
            Tiny { query_heads: 16, kv_heads: 1, head_dim: 4, tied: true, ..tiny.clone() },
        ),
        (
            "one query a key, biases, bf16",
            Tiny { kv_heads: 4, bias: true, stored: Stored::Bf16, ..tiny.clone() },
        ),
        (
            "linear positions, f16, misaligned",
            Tiny {
                stored: Stored::F16,
                shift: 1,
                rope: json!({ "rope_scaling": { "type": "linear", "factor": 4.0 } }),
                ..tiny.clone()
            },
        ),
        ("llama3 positions", Tiny { rope: llama3, head_dim: 16, ..tiny.clone() }),
        (
            "dynamic positions",
            Tiny {
                context: 48,
                rope: json!({ "rope_parameters": { "rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0 } }),
                ..tiny.clone()
            },
        ),
        (
            "heads of two, one layer",
            Tiny { layers: 1, head_dim: 2, hidden: 6, query_heads: 3, kv_heads: 3, ..tiny.clone() },
        ),
        (
            "heads of 128, misaligned, seven layers",
            Tiny { layers: 7, head_dim: 128, query_heads: 3, kv_heads: 1, shift: 3, sharpness: 1.0, ..tiny },
        ),
    ]
}

// ---------------------------------------------------------------------------------------------
// The full context

#[test]
fn full_context_is_the_oracles() {
    for (name, tiny) in models() {
        let rig = rig(&tiny);
        let ids = Rng::new(tiny.seed).ids(70, tiny.vocabulary);
        for n in [1, 2, 9, 48, 70] {
            let expected = rig.oracle.forward(&ids[..n]);
            for exact_shortcuts in [true, false] {
                let options = PrefillOptions { exact_shortcuts, ..PrefillOptions::default() };
                let prefill = rig.prefill(&ids[..n], &Policy::Full, &options);
                let distance = relative_distance(&prefill.logits, &expected[n - 1]);
                assert!(distance < CLOSE, "{name}, {n} tokens: {distance:e}");
            }
        }
    }
}

#[test]
fn tokens_one_by_one_and_several_at_once_are_the_prompt() {
    for (name, tiny) in models() {
        let rig = rig(&tiny);
        let ids = Rng::new(3).ids(60, tiny.vocabulary);
        let is_dynamic = name == "dynamic positions";
        let forward = rig.oracle.forward(&ids);
        for step in [1, 7, 59] {
            let mut prefill = rig.prefill(&ids[..1], &Policy::Full, &PrefillOptions::default());
            let mut expected = rig.oracle.prefill(&ids[..1], &rules::full(tiny.layers, 1), None, None);
            let mut read = 1;
            for part in ids[1..].chunks(step) {
                let logits = rig.append(&mut prefill, part);
                read += part.len();
                assert_eq!(prefill.cache.logical_length(), read);
                let distance = relative_distance(&logits, expected.append(part));
                assert!(distance < CLOSE, "{name}, {step} at once, {read} read: {distance:e}");
                // Where positions turn by the length reached, earlier keys keep the turn they got.
                if !is_dynamic || read <= tiny.context {
                    let forward = if is_dynamic { &rig.oracle.forward(&ids[..read]) } else { &forward };
                    let distance = relative_distance(&logits, &forward[read - 1]);
                    assert!(distance < CLOSE, "{name}, {step} at once, {read} as a prompt: {distance:e}");
                }
            }
            let all: Vec<u32> = (0..60).collect();
            for heads in rig.positions(&prefill) {
                assert!(heads.iter().all(|positions| *positions == all));
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Policies

fn saliency(window: usize, kind: PoolingKind, kernel: usize) -> Saliency {
    Saliency { window, pooling: Pooling { kind, kernel } }
}

fn spoken(budget: Budget) -> rules::Budget {
    match budget {
        Budget::Tokens(tokens) => rules::Budget::Tokens(tokens),
        Budget::Rate(rate) => rules::Budget::Rate(rate),
    }
}

/// The oracle's run of a policy. `kept` is what the engine chose where that is left to chance.
fn run<'a>(
    model: &'a Model,
    layers: usize,
    ids: &[u32],
    policy: &Policy,
    kept: &[Vec<Vec<u32>>],
) -> Sequence<'a> {
    model.run(ids, &orders(model, layers, ids.len(), policy, kept))
}

/// A policy of caches with the rate it has behind the TSP layer.
fn behind_tsp(cache: &Policy, propagation: Budget) -> Policy {
    let mut value = serde_json::to_value(cache).expect("JSON");
    if let Ok(retention) = serde_json::from_value::<Budget>(value["retention"].clone())
        && let rules::Budget::Rate(rate) = rules::late_rate(spoken(retention), spoken(propagation))
    {
        value["retention"] = json!({ "rate": rate });
    }
    serde_json::from_value(value).expect("a policy")
}

/// A policy in the oracle's words.
fn orders(model: &Model, layers: usize, n: usize, policy: &Policy, kept: &[Vec<Vec<u32>>]) -> Orders {
    let observation = |saliency: &Saliency| {
        let kind = match saliency.pooling.kind {
            PoolingKind::Max => Pool::Max,
            PoolingKind::Average => Pool::Average,
        };
        Observation { window: saliency.window, kind, kernel: saliency.pooling.kernel }
    };
    let mut found = Orders { given: Some(kept.to_vec()), ..Orders::default() };
    let (plan, observation) = match policy {
        Policy::Full => (rules::full(layers, n), None),
        Policy::FastKv(FastKv { saliency, retention, propagation, tsp_layer, .. }) => {
            let observed = (saliency.window, saliency.pooling.kernel);
            let plan =
                rules::fastkv(layers, n, observed, spoken(*retention), spoken(*propagation), *tsp_layer);
            (plan.expect("a plan"), Some(observation(saliency)))
        }
        Policy::SnapKv(SnapKv { saliency, retention }) => {
            let plan = rules::uniform(layers, n, saliency.window, spoken(*retention));
            (plan.expect("a plan"), Some(observation(saliency)))
        }
        Policy::PyramidKv(PyramidKv { saliency, retention, steepness }) => {
            let plan = rules::pyramid(layers, n, saliency.window, spoken(*retention), *steepness);
            (plan.expect("a plan"), Some(observation(saliency)))
        }
        Policy::AdaKv(AdaKv { saliency, retention, floor }) => {
            let plan = rules::shared(layers, n, saliency.window, spoken(*retention), *floor);
            (plan.expect("a plan"), Some(observation(saliency)))
        }
        Policy::HeadKv(HeadKv { saliency, retention, pooled, .. }) => {
            let (_, scores) = head_scores(layers, model.query_heads);
            let (retention, heads) = (spoken(*retention), model.kv_heads);
            let plan = rules::by_head(&scores, heads, n, saliency.window, retention, *pooled);
            (plan.expect("a plan"), Some(observation(saliency)))
        }
        Policy::StreamingLlm(StreamingLlm { sinks, retention }) => {
            (rules::streaming(layers, n, *sinks, spoken(*retention)).expect("a plan"), None)
        }
        Policy::Random(Random { window, retention, .. }) => {
            (rules::uniform(layers, n, *window, spoken(*retention)).expect("a plan"), None)
        }
        Policy::H2o(H2o { window, retention }) => {
            (rules::heavy(layers, n, *window, spoken(*retention)).expect("a plan"), None)
        }
        Policy::FastGen(FastGen { recovery, local, frequent, classes }) => {
            let list = |ids: &BTreeSet<u32>| ids.iter().copied().collect();
            let (special, punctuation) = (list(&classes.special), list(&classes.punctuation));
            found.classes = Classes { special, punctuation };
            (rules::recovered(layers, n, (*recovery, *local, *frequent)).expect("a plan"), None)
        }
        Policy::GemFilter(GemFilter { filter_layer, retention, pooling }) => {
            let (restart, plan) =
                rules::gemfilter(layers, n, *filter_layer, spoken(*retention), pooling.kernel)
                    .expect("a plan");
            found.restart = restart.map(|(layer, count)| (layer, count, pooling.kernel));
            (plan, None)
        }
        Policy::Tsp(Tsp { saliency, propagation, tsp_layer, cache, .. }) => {
            let t = rules::propagated(spoken(*propagation), n, saliency.window).expect("a plan");
            let early = orders(model, layers, n, cache, kept);
            let late = orders(model, layers, t, &behind_tsp(cache, *propagation), kept);
            let tsp_layer = tsp_layer.unwrap_or(rules::half_depth(layers));
            return Orders {
                rules: rules::composed(&early.rules, &late.rules, tsp_layer, t),
                hands_on_by: Some(observation(saliency)),
                ..early
            };
        }
        Policy::PyramidInfer(PyramidInfer { recent, decay }) => {
            (rules::pyramid_infer(layers, n, *recent, *decay).expect("a plan"), None)
        }
    };
    (found.rules, found.keeps_by, found.hands_on_by) = (plan, observation, observation);
    found
}

/// Holds a prefill and six decoded tokens to the oracle: which tokens each layer read, kept and handed
/// on, the mass on them, logits, positions. False where a choice was too near to call.
fn agrees<B: Backend>(
    rig: &Rig<B>,
    what: &str,
    ids: &[u32],
    policy: &Policy,
    options: &PrefillOptions,
) -> bool {
    let layers = rig.engine.shape().layers;
    let mut prefill = rig.prefill(ids, policy, options);
    let kept = rig.positions(&prefill);
    let mut expected = run(&rig.oracle, layers, ids, policy, &kept);
    if expected.margin() < NEAR_TIE {
        return false;
    }
    let what = format!("{what}, {} of {}, {options:?}", policy.name(), ids.len());
    assert_eq!(kept, expected.positions(), "{what}");
    if options.trace {
        let trace = prefill.trace.as_ref().expect("a trace");
        assert_eq!(trace.layers.len(), layers);
        let expected_restart = expected.restarted.clone();
        let restarted = trace.restarted.as_ref();
        let restarted = restarted.map(|tokens| tokens.iter().map(|token| *token as usize).collect());
        assert_eq!(restarted, expected_restart, "{what}");
        for (index, (trace, expected)) in trace.layers.iter().zip(&expected.layers).enumerate() {
            assert_eq!(trace.rows, expected.read.len(), "{what}, layer {index}");
            let original = |position: &u32| match &expected_restart {
                Some(restarted) => restarted[*position as usize] as u32,
                None => *position,
            };
            let kept: Vec<Vec<u32>> =
                kept[index].iter().map(|head| head.iter().map(original).collect()).collect();
            assert_eq!(trace.kept, kept, "{what}, layer {index}");
            let recovered: Vec<f32> = trace
                .sets
                .iter()
                .flatten()
                .flat_map(|head| head.recovered)
                .map(|recovered| recovered as f32)
                .collect();
            if !recovered.is_empty() {
                let distance = relative_distance(&recovered, &expected.recovered);
                assert!(distance < CLOSE, "{what}, recovered in layer {index}: {distance:e}");
            }
            let sets = trace.sets.as_ref().map(|sets| sets.iter().map(|head| head.set as usize).collect());
            assert_eq!(sets.unwrap_or_else(Vec::new), expected.sets, "{what}, layer {index}");
            let hands_on = expected.hands_on.as_ref();
            let hands_on: Option<Vec<u32>> =
                hands_on.map(|positions| positions.iter().map(|position| *position as u32).collect());
            assert_eq!(trace.propagated, hands_on, "{what}, layer {index}");
            // A layer that scores nothing observes through the trace's own window of 8, and so does the
            // oracle; a policy with a window that leaves a layer alone is not comparable there.
            let observes = !rig.plan(policy, ids.len()).layers.iter().all(|layer| layer.windows().is_empty());
            let scored = !observes || expected.cache.iter().any(|cache| cache.len() < expected.read.len());
            if scored {
                let distance = relative_distance(&trace.mass, &expected.mass);
                assert!(distance < CLOSE, "{what}, mass of layer {index}: {distance:e}");
            }
        }
    } else {
        assert!(prefill.trace.is_none());
    }
    let distance = relative_distance(&prefill.logits, &expected.logits);
    assert!(distance < CLOSE, "{what}: {distance:e}");
    for (step, part) in [&[1_u32][..], &[5, 3], &[0, 2, 4]].into_iter().enumerate() {
        let logits = rig.append(&mut prefill, part);
        let expected_logits = expected.append(part).to_vec();
        let distance = relative_distance(&logits, &expected_logits);
        if expected.margin() < NEAR_TIE {
            return false;
        }
        assert!(distance < CLOSE, "{what}, step {step} of decoding: {distance:e}");
    }
    assert_eq!(rig.positions(&prefill), expected.positions(), "{what}, decoded");
    let lengths: Vec<Vec<usize>> =
        expected.positions().iter().map(|layer| layer.iter().map(Vec::len).collect()).collect();
    assert_eq!(prefill.cache.physical_lengths(rig.engine.backend()), lengths);
    true
}

/// Scores of two samples for each query head, in the file's form and as means.
fn head_scores(layers: usize, query_heads: usize) -> (HeadScores, Vec<Vec<f64>>) {
    let mut rng = Rng::new(77);
    let mut scores = HeadScores::default();
    let mut means = vec![vec![0.0; query_heads]; layers];
    for (layer, means) in means.iter_mut().enumerate() {
        for (head, mean) in means.iter_mut().enumerate() {
            for _ in 0..2 {
                let score = rng.unit().powi(3);
                scores.add(layer, head, score);
                *mean += score / 2.0;
            }
        }
    }
    (scores, means)
}

/// Policies for a model of this shape.
fn policies_of(shape: ModelShape) -> Vec<Policy> {
    let mut policies = policies();
    let (heads, _) = head_scores(shape.layers, shape.query_heads);
    policies.push(Policy::HeadKv(HeadKv {
        saliency: saliency(6, PoolingKind::Max, 5),
        retention: Budget::Tokens(20),
        pooled: 1.2,
        heads: heads.clone(),
    }));
    policies.push(Policy::HeadKv(HeadKv {
        saliency: saliency(8, PoolingKind::Average, 3),
        retention: Budget::Rate(0.6),
        pooled: 1.0,
        heads,
    }));
    // Windows of the two may differ.
    for cache in [
        Policy::AdaKv(AdaKv {
            saliency: saliency(6, PoolingKind::Max, 3),
            retention: Budget::Rate(0.2),
            floor: 0.2,
        }),
        Policy::H2o(H2o { window: 4, retention: Budget::Rate(0.2) }),
        Policy::FastGen(FastGen { recovery: 0.6, classes: classes(), ..FastGen::default() }),
        Policy::Random(Random { window: 3, retention: Budget::Tokens(12), seed: 1 }),
        policies[policies.len() - 1].clone(),
    ] {
        let tsp = Tsp::with(cache);
        let saliency = saliency(8, PoolingKind::Average, 5);
        policies.push(Policy::Tsp(Tsp { saliency, propagation: Budget::Rate(0.5), ..tsp }));
    }
    policies
}

const UNPOOLED: Pooling = Pooling { kind: PoolingKind::Average, kernel: 1 };

/// Tokens that FastGen tells apart: of the 64 there are, 2 are special and 6 are punctuation.
fn classes() -> TokenClasses {
    TokenClasses { special: BTreeSet::from([3, 60]), punctuation: (10..16).collect() }
}

fn policies() -> Vec<Policy> {
    use PoolingKind::{Average, Max};
    let (rate, tokens) = (Budget::Rate, Budget::Tokens);
    let fast = |saliency, retention, propagation, tsp_layer| {
        Policy::FastKv(FastKv { saliency, retention, propagation, tsp_layer, settling: None })
    };
    vec![
        fast(saliency(8, Max, 7), rate(0.1), rate(0.2), None),
        fast(saliency(8, Average, 7), tokens(16), tokens(40), None),
        fast(saliency(1, Max, 1), rate(0.3), rate(0.5), Some(0)),
        fast(saliency(3, Average, 63), tokens(5), tokens(3), None),
        fast(saliency(4, Max, 3), rate(0.6), rate(0.3), None),
        fast(saliency(4, Average, 5), tokens(500), tokens(25), None),
        fast(saliency(4, Max, 5), rate(0.2), rate(1.0), None),
        Policy::SnapKv(SnapKv { saliency: saliency(32, Max, 7), retention: rate(0.4) }),
        Policy::SnapKv(SnapKv { saliency: saliency(2, Average, 3), retention: tokens(11) }),
        Policy::PyramidKv(PyramidKv {
            saliency: saliency(8, Max, 7),
            retention: tokens(20),
            steepness: 20.0,
        }),
        Policy::PyramidKv(PyramidKv {
            saliency: saliency(2, Average, 3),
            retention: rate(0.5),
            steepness: 1.0,
        }),
        Policy::AdaKv(AdaKv { saliency: saliency(8, Max, 7), retention: tokens(21), floor: 0.2 }),
        Policy::AdaKv(AdaKv { saliency: saliency(2, Max, 1), retention: rate(0.4), floor: 0.0 }),
        Policy::H2o(H2o { window: 8, retention: tokens(20) }),
        Policy::H2o(H2o { window: 2, retention: rate(0.3) }),
        Policy::FastGen(FastGen { recovery: 0.7, local: 0.3, frequent: 0.3, classes: classes() }),
        Policy::FastGen(FastGen { recovery: 0.45, local: 0.1, frequent: 0.2, classes: classes() }),
        Policy::GemFilter(GemFilter { retention: tokens(20), ..GemFilter::default() }),
        Policy::GemFilter(GemFilter { filter_layer: Some(0), retention: rate(0.5), pooling: UNPOOLED }),
        Policy::PyramidInfer(PyramidInfer { recent: 0.05, decay: 0.7 }),
        Policy::StreamingLlm(StreamingLlm { sinks: 4, retention: tokens(20) }),
        Policy::StreamingLlm(StreamingLlm { sinks: 0, retention: rate(0.3) }),
        Policy::Random(Random { window: 8, retention: tokens(20), seed: 7 }),
    ]
}

#[test]
fn policies_are_the_oracles() {
    let (mut samples, mut near) = (0, 0);
    for (name, tiny) in models() {
        let rig = rig(&tiny);
        let mut rng = Rng::new(11);
        for policy in policies_of(rig.engine.shape()) {
            // Prompts shorter than a window, about as long, and longer.
            for n in [2, 9 + rng.below(30), 60 + rng.below(60)] {
                let ids = rng.ids(n, tiny.vocabulary);
                for exact_shortcuts in [true, false] {
                    let options = PrefillOptions { exact_shortcuts, ..TRACED };
                    samples += 1;
                    near += usize::from(!agrees(&rig, name, &ids, &policy, &options));
                }
            }
        }
        let ids = rng.ids(50, tiny.vocabulary);
        let quiet = PrefillOptions { slack: 10, ..PrefillOptions::default() };
        for policy in policies_of(rig.engine.shape()) {
            agrees(&rig, name, &ids, &policy, &quiet);
        }
    }
    assert!(near * 20 <= samples, "{near} of {samples} choices were too near to call");
}

/// Steers a policy's plan, and holds it and six decoded tokens to the oracle. False where a choice was
/// too near to call.
fn steered_agrees(rig: &Rig<CpuBackend>, ids: &[u32], policy: &Policy, exact_shortcuts: bool) -> bool {
    let shape = rig.engine.shape();
    let n = ids.len();
    // Two spans that overlap and one apart; in every layer but one some heads are steered.
    let spans = vec![10..14, 12..17, n / 2..n / 2 + 3];
    let heads: Vec<(usize, usize)> = (1..shape.layers)
        .flat_map(|layer| [(layer, 0), (layer, shape.query_heads - 1 - layer % 2)])
        .collect();
    let steering = Steering { spans: spans.clone(), heads: heads.clone(), alpha: 0.05 };
    let plan = rig.plan(policy, n).steer(steering).expect("a plan");
    let options = PrefillOptions { exact_shortcuts, ..TRACED };
    let mut prefill = rig.engine.prefill(ids, &plan, &options, &Control::default()).expect("a prefill");
    let what = format!("{}, {n} tokens, {exact_shortcuts}", policy.name());
    assert!(prefill.peak_kv_bytes <= plan.peak_kv_bytes(4), "{what}");
    assert!(prefill.cache.bytes(rig.engine.backend()) <= plan.kept_kv_bytes(4), "{what}");

    let kept = rig.positions(&prefill);
    let mut orders = orders(&rig.oracle, shape.layers, n, policy, &kept);
    let highlighted: Vec<bool> = (0..n).map(|token| spans.iter().any(|span| span.contains(&token))).collect();
    let forced = highlighted.iter().filter(|is| **is).count();
    orders.steer(n, forced);
    orders.steering = Some(oracle::llama::Steering { alpha: 0.05, heads, highlighted });
    let mut expected = rig.oracle.run(ids, &orders);
    if expected.margin() < NEAR_TIE {
        return false;
    }
    assert_eq!(kept, expected.positions(), "{what}");
    let trace = prefill.trace.take().expect("a trace");
    for layer in &trace.layers {
        for head in &layer.kept {
            let all = spans.iter().cloned().flatten().all(|token| head.contains(&(token as u32)));
            assert!(all, "{what}: highlighted tokens stay");
        }
    }
    let distance = relative_distance(&prefill.logits, &expected.logits);
    assert!(distance < CLOSE, "{what}: {distance:e}");
    for part in [&[1_u32][..], &[5, 3], &[0, 2, 4]] {
        let logits = rig.append(&mut prefill, part);
        let expected_logits = expected.append(part).to_vec();
        if expected.margin() < NEAR_TIE {
            return false;
        }
        let distance = relative_distance(&logits, &expected_logits);
        assert!(distance < CLOSE, "{what}, decoding: {distance:e}");
    }
    assert_eq!(rig.positions(&prefill), expected.positions(), "{what}, decoded");
    true
}

#[test]
fn steered_heads_are_the_oracles_and_highlighted_tokens_stay() {
    let (mut samples, mut seen) = (0, 0);
    for (name, tiny) in models() {
        if tiny.layers == 1 || tiny.head_dim == 128 {
            continue;
        }
        let rig = rig(&tiny);
        let mut rng = Rng::new(name.len() as u64);
        for policy in policies_of(rig.engine.shape()).into_iter().chain([Policy::Full]) {
            let n = 70 + rng.below(40);
            let ids = rng.ids(n, tiny.vocabulary);
            for exact_shortcuts in [true, false] {
                samples += 1;
                seen += usize::from(steered_agrees(&rig, &ids, &policy, exact_shortcuts));
            }
        }
    }
    assert!(seen * 20 >= samples * 18, "{seen} of {samples}");
}

/// However small the budgets are, and however many are highlighted.
#[test]
fn highlighted_tokens_stay_where_budgets_are_small() {
    let tiny = Tiny { layers: 6, ..Tiny::default() };
    let rig = rig(&tiny);
    let ids = Rng::new(3).ids(200, tiny.vocabulary);
    let adakv = AdaKv { retention: Budget::Tokens(33), ..AdaKv::default() };
    let policies = [
        // One token before the window, for which all heads vie, and a floor of 0.2 of it.
        Policy::AdaKv(adakv),
        Policy::AdaKv(AdaKv { retention: Budget::Tokens(33), floor: 0.01, ..adakv }),
        Policy::PyramidInfer(PyramidInfer::default()),
    ];
    for policy in &policies {
        for span in [20..23, 50..150, 20..150, 0..6, 20..75, 180..200] {
            let heads = vec![(0, 0), (1, 1)];
            let steering = Steering { spans: vec![span.clone()], heads, alpha: 0.01 };
            let plan = rig.plan(policy, ids.len()).steer(steering).expect("a plan");
            let prefill = rig.engine.prefill(&ids, &plan, &TRACED, &Control::default()).expect("a prefill");
            assert!(prefill.cache.bytes(rig.engine.backend()) <= plan.kept_kv_bytes(4), "{span:?}");
            for (layer, heads) in rig.positions(&prefill).iter().enumerate() {
                for (head, kept) in heads.iter().enumerate() {
                    let missing: Vec<_> =
                        span.clone().filter(|token| !kept.contains(&(*token as u32))).collect();
                    let what = policy.name();
                    assert!(
                        missing.is_empty(),
                        "{what}, layer {layer}, head {head}: {missing:?} of {span:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn steering_moves_attention_to_what_is_highlighted() {
    let tiny = Tiny::default();
    let rig = rig(&tiny);
    let ids = Rng::new(6).ids(40, tiny.vocabulary);
    let heads: Vec<(usize, usize)> = (0..4).flat_map(|layer| (0..4).map(move |head| (layer, head))).collect();
    let logits = |alpha: f64| {
        let steering = Steering { spans: vec![0..40], heads: heads.clone(), alpha };
        let plan = rig.plan(&Policy::Full, 40).steer(steering).expect("a plan");
        let control = Control::default();
        rig.engine.prefill(&ids, &plan, &PrefillOptions::default(), &control).expect("a prefill").logits
    };
    // Everything highlighted is nothing highlighted.
    let full = rig.prefill(&ids, &Policy::Full, &PrefillOptions::default()).logits;
    assert!(relative_distance(&logits(0.01), &oracle::wide(&full)) < CLOSE);
    for (spans, heads, alpha, parts) in [
        (vec![3..3], vec![(0, 0)], 0.1, vec!["3..3", "40 tokens"]),
        (vec![30..41], vec![(0, 0)], 0.1, vec!["30..41"]),
        (vec![], vec![(0, 0)], 0.1, vec!["at least one span"]),
        (vec![0..3], vec![], 0.1, vec!["one head"]),
        (vec![0..3], vec![(4, 0)], 0.1, vec!["4-0", "4 layers of 4 query heads"]),
        (vec![0..3], vec![(0, 4)], 0.1, vec!["0-4"]),
        (vec![0..3], vec![(0, 0)], 0.0, vec!["alpha is 0"]),
        (vec![0..3], vec![(0, 0)], 1.5, vec!["alpha is 1.5"]),
        (vec![0..3], vec![(0, 0)], f64::NAN, vec!["alpha is NaN"]),
    ] {
        let steering = Steering { spans, heads, alpha };
        let plan = rig.plan(&Policy::Full, 40);
        let error = plan.clone().steer(steering.clone()).expect_err("bad input").to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        // The same in a plan from a file.
        let edited = Plan { steering: Some(steering), ..plan };
        let error = prefill_error(&rig, &ids, &edited);
        assert!(matches!(error, EngineError::Steering(_)), "{error}");
    }
}

/// What is seen of a steered head is what it attends by.
#[test]
fn observed_attention_is_steered() {
    let tiny = Tiny { layers: 2, ..Tiny::default() };
    let rig = rig(&tiny);
    let ids = Rng::new(7).ids(30, tiny.vocabulary);
    let control = Control::default();
    let observed = |plan: &Plan| {
        let options = PrefillOptions::default();
        let mut prefill = rig.engine.prefill(&ids, plan, &options, &control).expect("a prefill");
        rig.engine.append_observed(&mut prefill.cache, 5, &control).expect("attention").1.swap_remove(0)
    };
    let plan = rig.plan(&Policy::Full, 30);
    let (alpha, spans) = (0.05, vec![4..9]);
    let plain = observed(&plan);
    let steered = observed(&plan.steer(Steering { spans, heads: vec![(0, 1)], alpha }).expect("a plan"));
    assert_eq!(steered[0], plain[0]);
    // Tokens behind the prompt are left alone.
    let weight = |token: usize| if (4..9).contains(&token) || token >= 30 { 1.0 } else { alpha };
    let weighted: Vec<f64> = plain[1].iter().enumerate().map(|(n, p)| f64::from(*p) * weight(n)).collect();
    let sum: f64 = weighted.iter().sum();
    let expected: Vec<f64> = weighted.iter().map(|weighted| weighted / sum).collect();
    assert!(relative_distance(&steered[1], &expected) < CLOSE, "{:?} {expected:?}", steered[1]);
}

#[test]
fn every_tsp_layer_hands_on() {
    let tiny = Tiny { layers: 5, ..Tiny::default() };
    let rig = rig(&tiny);
    let mut seen = 0;
    for tsp_layer in 0..5 {
        let policy = Policy::FastKv(FastKv {
            saliency: saliency(4, PoolingKind::Max, 3),
            retention: Budget::Tokens(12),
            propagation: Budget::Tokens(30),
            tsp_layer: Some(tsp_layer),
            settling: None,
        });
        for seed in 0..3 {
            let ids = Rng::new(seed).ids(80, tiny.vocabulary);
            for exact_shortcuts in [true, false] {
                let options = PrefillOptions { exact_shortcuts, ..TRACED };
                seen += usize::from(agrees(&rig, &format!("layer {tsp_layer}"), &ids, &policy, &options));
            }
        }
    }
    assert!(seen >= 28, "{seen} of 30");
}

/// A rule that goes by what tokens are goes by those that are read anew, in decoding too.
#[test]
fn sets_of_tokens_are_of_the_tokens_read_anew() {
    let tiny = Tiny { layers: 4, ..Tiny::default() };
    let rig = rig(&tiny);
    let n = 90;
    let policy = Policy::GemFilter(GemFilter { retention: Budget::Tokens(40), ..GemFilter::default() });
    let (recovery, local, frequent) = (0.3, 0.1, 0.2);
    let mut seen = 0;
    for seed in 0..6 {
        let ids = Rng::new(seed).ids(n, tiny.vocabulary);
        // Some of the vocabulary, so that sets differ by which tokens were picked.
        let special: Vec<u32> = (0..tiny.vocabulary as u32).step_by(7).collect();
        let mut plan = rig.plan(&policy, n);
        plan.classes.special = special.iter().copied().collect();
        for layer in &mut plan.layers {
            layer.keep = Keep::Recovered { recovery, local, frequent };
        }
        let mut orders = orders(&rig.oracle, 4, n, &policy, &[]);
        orders.classes = Classes { special, punctuation: Vec::new() };
        for rules in &mut orders.rules {
            rules.keep = rules::Keep::Recovered(recovery, local, frequent);
        }
        let control = Control::default();
        let options = PrefillOptions { trace: seed % 2 == 0, ..TRACED };
        let mut prefill = rig.engine.prefill(&ids, &plan, &options, &control).expect("a prefill");
        let mut expected = rig.oracle.run(&ids, &orders);
        for part in [&[1_u32][..], &[5, 3, 4]] {
            rig.append(&mut prefill, part);
            expected.append(part);
        }
        if expected.margin() >= NEAR_TIE {
            assert_eq!(rig.positions(&prefill), expected.positions(), "seed {seed}");
            seen += 1;
        }
    }
    assert!(seen >= 4, "{seen} of 6");
}

#[test]
fn kept_and_handed_on_tokens_may_be_pooled_differently() {
    let tiny = Tiny::default();
    let rig = rig(&tiny);
    let ids = Rng::new(4).ids(100, tiny.vocabulary);
    let pooled = |kind, kernel| {
        let (retention, propagation) = (Budget::Tokens(20), Budget::Tokens(30));
        let saliency = saliency(4, kind, kernel);
        rig.plan(&Policy::FastKv(FastKv { saliency, retention, propagation, ..FastKv::default() }), 100)
    };
    let chosen = |plan: &Plan| {
        let prefill = rig.engine.prefill(&ids, plan, &TRACED, &Control::default()).expect("a prefill");
        let layer = prefill.trace.expect("a trace").layers.swap_remove(1);
        (layer.kept, layer.propagated.expect("a TSP layer"))
    };
    let (narrow, wide) = (pooled(PoolingKind::Max, 1), pooled(PoolingKind::Average, 9));
    let mut mixed = narrow.clone();
    mixed.layers[1].propagate = wide.layers[1].propagate;
    let (narrow, wide) = (chosen(&narrow), chosen(&wide));
    assert!(narrow.0 != wide.0 && narrow.1 != wide.1);
    assert_eq!(chosen(&mixed), (narrow.0, wide.1));
}

#[test]
fn shortcuts_leave_the_result_alone() {
    let mut compared = 0;
    for seed in 0..12 {
        let tiny = Tiny { seed, layers: 2 + seed as usize % 4, ..Tiny::default() };
        let rig = rig(&tiny);
        let ids = Rng::new(seed).ids(90, tiny.vocabulary);
        for policy in policies_of(rig.engine.shape()) {
            let with = rig.prefill(&ids, &policy, &TRACED);
            let without = rig.prefill(&ids, &policy, &PrefillOptions { exact_shortcuts: false, ..TRACED });
            let sets = |trace: &Option<Trace>| -> Vec<_> {
                let layers = &trace.as_ref().expect("a trace").layers;
                layers
                    .iter()
                    .map(|layer| (layer.rows, layer.kept.clone(), layer.propagated.clone()))
                    .collect()
            };
            if sets(&with.trace) != sets(&without.trace) {
                continue;
            }
            compared += 1;
            let distance = relative_distance(&with.logits, &oracle::wide(&without.logits));
            assert!(distance < CLOSE, "{policy:?}: {distance:e}");
            assert_eq!(with.peak_kv_bytes, without.peak_kv_bytes);
        }
    }
    assert!(
        compared
            >= 12 * policies_of(ModelShape { layers: 1, query_heads: 1, kv_heads: 1, head_dim: 1 }).len() - 3,
        "{compared}"
    );
}

#[test]
fn budgets_that_hold_everything_are_the_full_context() {
    let tiny = Tiny::default();
    let rig = rig(&tiny);
    let ids = Rng::new(8).ids(77, tiny.vocabulary);
    let full = rig.prefill(&ids, &Policy::Full, &TRACED);
    for (retention, propagation) in [
        (Budget::Tokens(77), Budget::Tokens(77)),
        (Budget::Tokens(5000), Budget::Tokens(100)),
        (Budget::Rate(1.0), Budget::Rate(1.0)),
    ] {
        let fast = Policy::FastKv(FastKv { retention, propagation, ..FastKv::default() });
        let snap = Policy::SnapKv(SnapKv { retention, ..SnapKv::default() });
        let streaming = Policy::StreamingLlm(StreamingLlm { retention, ..StreamingLlm::default() });
        let random = Policy::Random(Random { retention, ..Random::default() });
        for policy in [fast, snap, streaming, random] {
            let prefill = rig.prefill(&ids, &policy, &TRACED);
            assert_eq!(prefill.logits, full.logits, "{policy:?}");
            assert_eq!(prefill.trace, full.trace, "{policy:?}");
            assert_eq!(prefill.peak_kv_bytes, full.peak_kv_bytes);
        }
    }
    // ρ = 1 reads everything in every layer: dense logits, whatever is kept.
    for retention in [Budget::Rate(0.1), Budget::Tokens(9)] {
        let propagation = Budget::Rate(1.0);
        let policy = Policy::FastKv(FastKv { retention, propagation, ..FastKv::default() });
        let prefill = rig.prefill(&ids, &policy, &PrefillOptions::default());
        let distance = relative_distance(&prefill.logits, &oracle::wide(&full.logits));
        assert!(distance < CLOSE, "{distance:e}");
        assert!(prefill.cache.bytes(rig.engine.backend()) < full.cache.bytes(rig.engine.backend()));
    }
}

#[test]
fn budgets_by_layer_and_head_that_hold_everything_are_the_full_context() {
    let tiny = Tiny::default();
    let rig = rig(&tiny);
    let ids = Rng::new(9).ids(71, tiny.vocabulary);
    let full = rig.prefill(&ids, &Policy::Full, &TRACED);
    let (heads, _) = head_scores(tiny.layers, tiny.query_heads);
    // Room for everything even in the layer or head that gets the least.
    let retention = Budget::Tokens(100_000);
    for policy in [
        Policy::PyramidKv(PyramidKv { retention, ..PyramidKv::default() }),
        Policy::AdaKv(AdaKv { retention, ..AdaKv::default() }),
        Policy::HeadKv(HeadKv { retention, heads, ..HeadKv::default() }),
        Policy::H2o(H2o { retention, ..H2o::default() }),
        Policy::GemFilter(GemFilter { retention, ..GemFilter::default() }),
        Policy::Tsp(Tsp {
            propagation: Budget::Rate(1.0),
            ..Tsp::with(Policy::AdaKv(AdaKv { retention, ..AdaKv::default() }))
        }),
    ] {
        let prefill = rig.prefill(&ids, &policy, &TRACED);
        let distance = relative_distance(&prefill.logits, &oracle::wide(&full.logits));
        assert!(distance < CLOSE, "{policy:?}: {distance:e}");
        assert_eq!(
            prefill.cache.bytes(rig.engine.backend()),
            full.cache.bytes(rig.engine.backend()),
            "{policy:?}"
        );
        let kept = |trace: Option<Trace>| {
            trace.map(|trace| trace.layers.into_iter().map(|layer| layer.kept).collect::<Vec<_>>())
        };
        assert_eq!(kept(prefill.trace), kept(full.trace.clone()), "{policy:?}");
    }
}

#[test]
fn chunks_of_rows_leave_the_result_alone() {
    let tiny = Tiny::default();
    let mut seen = 0;
    // The window fits the chunk; the last chunk is full, whatever the length.
    for chunk_rows in [8, 9, 32, 59, 60, 61, 1000] {
        let rig = rig_on(&tiny, Probe::new(chunk_rows));
        let mut rng = Rng::new(5);
        for n in [7, 8, 9, 60, 61, 95] {
            let ids = rng.ids(n, tiny.vocabulary);
            for window in [1, 8] {
                let policy = Policy::FastKv(FastKv {
                    saliency: saliency(window, PoolingKind::Max, 5),
                    retention: Budget::Tokens(12),
                    propagation: Budget::Tokens(n.max(26) / 2),
                    ..FastKv::default()
                });
                for exact_shortcuts in [true, false] {
                    let options = PrefillOptions { exact_shortcuts, ..TRACED };
                    seen += usize::from(agrees(
                        &rig,
                        &format!("chunks of {chunk_rows}"),
                        &ids,
                        &policy,
                        &options,
                    ));
                }
            }
            // Chunks of appended tokens.
            let mut prefill = rig.prefill(&ids[..1], &Policy::Full, &PrefillOptions::default());
            let logits = rig.append(&mut prefill, &ids[1..]);
            let expected = rig.oracle.forward(&ids);
            assert!(relative_distance(&logits, &expected[n - 1]) < CLOSE);
        }
    }
    assert!(seen >= 160, "{seen} of 168");
}

/// Sums over many queries come chunk by chunk, in prefill and in appends of several chunks.
#[test]
fn chunks_of_rows_leave_sums_alone() {
    let tiny = Tiny::default();
    let (mut samples, mut seen) = (0, 0);
    for chunk_rows in [8, 33, 100] {
        let rig = rig_on(&tiny, Probe::new(chunk_rows));
        let mut rng = Rng::new(12);
        for policy in policies_of(rig.engine.shape()) {
            let n = 90 + rng.below(40);
            let ids = rng.ids(n, tiny.vocabulary);
            let plan = rig.plan(&policy, n);
            let wide =
                plan.layers.iter().any(|layer| layer.windows().iter().any(|window| *window > chunk_rows));
            if wide || !plan.layers.iter().any(LayerPlan::sums_columns) {
                continue;
            }
            for exact_shortcuts in [true, false] {
                samples += 1;
                let options = PrefillOptions { exact_shortcuts, ..TRACED };
                if !agrees(&rig, &format!("chunks of {chunk_rows}"), &ids, &policy, &options) {
                    continue;
                }
                let mut prefill = rig.prefill(&ids, &policy, &options);
                let kept = rig.positions(&prefill);
                let mut expected = run(&rig.oracle, tiny.layers, &ids, &policy, &kept);
                let more = rng.ids(40, tiny.vocabulary);
                let logits = rig.append(&mut prefill, &more);
                let expected_logits = expected.append(&more).to_vec();
                // What was evicted shows in the step behind.
                let next = rig.append(&mut prefill, &[1]);
                let expected_next = expected.append(&[1]).to_vec();
                if expected.margin() < NEAR_TIE {
                    continue;
                }
                seen += 1;
                let what = format!("chunks of {chunk_rows}, {}", policy.name());
                assert!(relative_distance(&logits, &expected_logits) < CLOSE, "{what}");
                assert!(relative_distance(&next, &expected_next) < CLOSE, "{what}");
                assert_eq!(rig.positions(&prefill), expected.positions(), "{what}");
            }
        }
    }
    assert!(samples >= 30 && seen * 10 >= samples * 8, "{seen} of {samples}");
}

#[test]
fn long_prompts_in_chunks_are_the_oracles() {
    let tiny = Tiny {
        layers: 3,
        hidden: 8,
        intermediate: 8,
        query_heads: 2,
        kv_heads: 1,
        head_dim: 4,
        ..Tiny::default()
    };
    let policy = Policy::FastKv(FastKv {
        saliency: saliency(8, PoolingKind::Max, 7),
        retention: Budget::Rate(0.1),
        propagation: Budget::Tokens(1500),
        ..FastKv::default()
    });
    let mut seen = 0;
    for (threads, n) in [(1, 2600), (2, 1025), (5, 2600)] {
        let rig = rig_on(&tiny, cpu(threads));
        assert!(rig.engine.backend().chunk_rows() < n, "several chunks");
        let ids = Rng::new(n as u64).ids(n, tiny.vocabulary);
        seen += usize::from(agrees(&rig, &format!("{threads} threads"), &ids, &policy, &TRACED));
        let full = rig.prefill(&ids, &Policy::Full, &PrefillOptions::default());
        let mut appended = rig.prefill(&ids[..10], &Policy::Full, &PrefillOptions::default());
        let logits = rig.append(&mut appended, &ids[10..]);
        let distance = relative_distance(&logits, &oracle::wide(&full.logits));
        assert!(distance < CLOSE, "{distance:e}");
    }
    assert!(seen >= 2, "{seen} of 3");
}

// ---------------------------------------------------------------------------------------------
// Memory

#[test]
fn peak_memory_is_one_layer_in_full_and_the_compacted_caches() {
    // A token of a layer: K and V of 2 heads of 8 floats.
    let token = 2 * 2 * 8 * 4;
    let tiny = Tiny { layers: 6, ..Tiny::default() };
    let ids = Rng::new(1).ids(100, tiny.vocabulary);
    let snap =
        Policy::SnapKv(SnapKv { saliency: saliency(8, PoolingKind::Max, 7), retention: Budget::Tokens(20) });
    let fast = Policy::FastKv(FastKv {
        retention: Budget::Tokens(20),
        propagation: Budget::Tokens(40),
        tsp_layer: Some(1),
        ..FastKv::default()
    });
    for (policy, entries) in [
        (Policy::Full, 600),
        // Five compacted layers, the sixth in full and its copy.
        (snap, 5 * 20 + 100 + 20),
        // The last: five compacted, 40 tokens and 20 of them. More than at the TSP layer: 20 + 100 + 20.
        (fast, 5 * 20 + 40 + 20),
        (Policy::StreamingLlm(StreamingLlm { sinks: 4, retention: Budget::Tokens(20) }), 5 * 20 + 100 + 20),
    ] {
        for exact_shortcuts in [true, false] {
            // In truth: what is alive in the backend.
            let rig = rig_on(&tiny, Probe::new(64));
            let options = PrefillOptions { exact_shortcuts, ..PrefillOptions::default() };
            let prefill = rig.prefill(&ids, &policy, &options);
            let probe = rig.engine.backend();
            assert_eq!(prefill.peak_kv_bytes, entries * token, "{}", policy.name());
            assert_eq!(probe.peak(), 2 * entries, "{}: entries of both heads", policy.name());
            assert_eq!(probe.now() * token / 2, prefill.cache.bytes(probe), "nothing else is left");
            assert_eq!(rig.plan(&policy, 100).peak_kv_bytes(4), entries * token);
            drop(prefill);
            assert_eq!(probe.now(), 0);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Control

#[test]
fn progress_rises_to_its_total() {
    let tiny = Tiny::default();
    let rig = rig_on(&tiny, Probe::new(16));
    let ids = Rng::new(1).ids(100, tiny.vocabulary);
    for policy in policies_of(rig.engine.shape()) {
        for exact_shortcuts in [true, false] {
            let reports = RefCell::new(Vec::new());
            let progress = |progress: Progress| reports.borrow_mut().push(progress);
            let control = Control { cancel: None, progress: Some(&progress) };
            let plan = rig.plan(&policy, ids.len());
            if plan.layers.iter().any(|layer| layer.windows().iter().any(|window| *window > 16)) {
                continue;
            }
            let options = PrefillOptions { exact_shortcuts, ..PrefillOptions::default() };
            let mut prefill = rig.engine.prefill(&ids, &plan, &options, &control).expect("a prefill");
            let first_pass = plan.restart.map_or(0, |restart| (restart.layer + 1) * ids.len());
            let rows: usize = plan.layers.iter().map(|layer| layer.rows).sum();
            rises(&reports.borrow(), first_pass + rows);
            assert!(reports.borrow().len() >= tiny.layers);
            reports.borrow_mut().clear();
            rig.engine.append(&mut prefill.cache, &[1, 2, 3], &control).expect("logits");
            rises(&reports.borrow(), 3 * tiny.layers);
        }
    }
}

fn rises(reports: &[Progress], total: usize) {
    assert!(reports.iter().all(|report| report.total == total && report.done <= total), "{reports:?}");
    assert!(reports.windows(2).all(|pair| pair[0].done <= pair[1].done), "{reports:?}");
    assert_eq!(reports.last().expect("a report").done, total);
}

#[test]
fn cancellation_stops_midway() {
    let tiny = Tiny::default();
    let rig = rig_on(&tiny, Probe::new(16));
    let ids = Rng::new(1).ids(100, tiny.vocabulary);
    let plan = rig.plan(&policies()[0], 100);
    for after in [0, 1, 3] {
        for exact_shortcuts in [true, false] {
            let cancel = Cancel::default();
            let reports = Cell::new(0);
            let progress = |_| {
                reports.set(reports.get() + 1);
                if reports.get() == after {
                    cancel.cancel();
                }
            };
            if after == 0 {
                cancel.cancel();
            }
            let control = Control { cancel: Some(&cancel), progress: Some(&progress) };
            let options = PrefillOptions { exact_shortcuts, ..PrefillOptions::default() };
            let error = rig.engine.prefill(&ids, &plan, &options, &control).expect_err("cancelled");
            assert!(matches!(error, EngineError::Cancelled), "{error}");
            assert_eq!(reports.get(), after, "no step after the one that cancelled");
            assert_eq!(rig.engine.backend().now(), 0, "nothing is left");
        }
    }
}

#[test]
fn a_cancelled_append_leaves_the_cache_as_it_was() {
    let tiny = Tiny::default();
    let rig = rig_on(&tiny, Probe::new(16));
    let ids = Rng::new(1).ids(100, tiny.vocabulary);
    let mut cache = rig.prefill(&ids, &policies()[1], &PrefillOptions::default()).cache;
    let mut untouched = rig.prefill(&ids, &policies()[1], &PrefillOptions::default()).cache;
    let cancel = Cancel::default();
    let progress = |_| cancel.cancel();
    let control = Control { cancel: Some(&cancel), progress: Some(&progress) };
    let error = rig.engine.append(&mut cache, &[1, 2], &control).expect_err("cancelled");
    assert!(matches!(error, EngineError::Cancelled));
    assert!(cancel.is_cancelled() && cancel.clone().is_cancelled());

    let backend = rig.engine.backend();
    assert_eq!(cache.logical_length(), 100);
    assert_eq!(cache.positions(backend).expect("lists"), untouched.positions(backend).expect("lists"));
    let again = rig.engine.append(&mut cache, &[1, 2], &Control::default()).expect("a cache as it was");
    let once = rig.engine.append(&mut untouched, &[1, 2], &Control::default()).expect("a cache");
    assert_eq!(again, once);
}

// ---------------------------------------------------------------------------------------------
// Generation

/// Generates, and returns the streamed tokens beside the result.
fn generated(
    rig: &Rig<CpuBackend>,
    ids: &[u32],
    options: &GenerationOptions,
) -> (Vec<u32>, FinishReason, usize) {
    let Prefill { mut cache, logits, .. } = rig.prefill(ids, &Policy::Full, &PrefillOptions::default());
    let mut streamed = Vec::new();
    let generation = rig
        .engine
        .generate(&mut cache, logits, options, &Control::default(), |token| streamed.push(token))
        .expect("an answer");
    assert_eq!(generation.tokens, streamed);
    (streamed, generation.finish, cache.logical_length())
}

/// The oracle's greedy answer.
fn greedy(rig: &Rig<CpuBackend>, ids: &[u32], count: usize) -> Vec<u32> {
    let mut sequence =
        rig.oracle.prefill(ids, &rules::full(rig.engine.shape().layers, ids.len()), None, None);
    let mut tokens = Vec::new();
    for _ in 0..count {
        let best = oracle::ranking(&sequence.logits)[0] as u32;
        tokens.push(best);
        sequence.append(&[best]);
    }
    tokens
}

#[test]
fn generation_stops_where_it_should() {
    let tiny = Tiny { context: 40, ..Tiny::default() };
    let rig = rig(&tiny);
    let ids = Rng::new(2).ids(30, tiny.vocabulary);
    let answer = greedy(&rig, &ids, 10);
    let options = |max_tokens, stop_tokens: &[u32]| GenerationOptions {
        max_tokens,
        stop_tokens: stop_tokens.to_vec(),
        ..GenerationOptions::default()
    };

    assert_eq!(generated(&rig, &ids, &options(0, &[])), (vec![], FinishReason::MaxTokens, 30));
    assert_eq!(
        generated(&rig, &ids, &options(1, &[])),
        (answer[..1].to_vec(), FinishReason::MaxTokens, 30),
        "the last token is not read"
    );
    assert_eq!(generated(&rig, &ids, &options(6, &[])), (answer[..6].to_vec(), FinishReason::MaxTokens, 35));
    // A stop token, the first of several, is not part of the answer.
    let stop = answer[4];
    let until = answer.iter().position(|token| *token == stop).expect("it comes");
    let (tokens, finish, length) = generated(&rig, &ids, &options(10, &[stop, 63]));
    assert_eq!((tokens, finish, length), (answer[..until].to_vec(), FinishReason::Stop, 30 + until));
    let (tokens, finish, _) = generated(&rig, &ids, &options(10, &[answer[0]]));
    assert_eq!((tokens, finish), (vec![], FinishReason::Stop));
    // The context holds 40 tokens: ten more are read, and one may follow them.
    let (tokens, finish, length) = generated(&rig, &ids, &options(100, &[]));
    assert_eq!((tokens.len(), finish, length), (11, FinishReason::ContextFull, 40));
    assert_eq!(tokens[..10], answer);
    let full = Rng::new(2).ids(40, tiny.vocabulary);
    let (tokens, finish, length) = generated(&rig, &full, &options(5, &[]));
    assert_eq!((tokens.len(), finish, length), (1, FinishReason::ContextFull, 40));
}

#[test]
fn cancelled_generation_keeps_what_there_is() {
    let tiny = Tiny::default();
    let rig = rig(&tiny);
    let ids = Rng::new(2).ids(30, tiny.vocabulary);
    let answer = greedy(&rig, &ids, 10);
    for after in [0, 1, 4] {
        let Prefill { mut cache, logits, .. } = rig.prefill(&ids, &Policy::Full, &PrefillOptions::default());
        let cancel = Cancel::default();
        if after == 0 {
            cancel.cancel();
        }
        let options = GenerationOptions { max_tokens: 10, ..GenerationOptions::default() };
        let control = Control { cancel: Some(&cancel), progress: None };
        let mut count = 0;
        let generation = rig.engine.generate(&mut cache, logits, &options, &control, |_| {
            count += 1;
            if count == after {
                cancel.cancel();
            }
        });
        let generation = generation.expect("no error");
        assert_eq!(generation.finish, FinishReason::Cancelled);
        assert_eq!(generation.tokens, answer[..after]);
    }
}

#[test]
fn generation_reports_its_tokens() {
    let tiny = Tiny::default();
    let rig = rig(&tiny);
    let Prefill { mut cache, logits, .. } =
        rig.prefill(&[1, 2, 3], &Policy::Full, &PrefillOptions::default());
    let reports = RefCell::new(Vec::new());
    let progress = |progress: Progress| reports.borrow_mut().push(progress);
    let control = Control { cancel: None, progress: Some(&progress) };
    let options = GenerationOptions { max_tokens: 5, ..GenerationOptions::default() };
    rig.engine.generate(&mut cache, logits, &options, &control, |_| ()).expect("an answer");
    let reports: Vec<usize> = reports.into_inner().iter().map(|report| report.done).collect();
    assert_eq!(reports, [1, 2, 3, 4, 5]);
}

#[test]
fn sampling_repeats_with_its_seed_and_follows_the_softmax() {
    let tiny = Tiny::default();
    let rig = rig(&tiny);
    let ids = Rng::new(2).ids(30, tiny.vocabulary);
    let options = |temperature, top_p, seed| GenerationOptions {
        max_tokens: 12,
        sampling: Sampling { temperature, top_p, seed },
        stop_tokens: Vec::new(),
    };
    let answers: Vec<Vec<u32>> =
        (0..8).map(|seed| generated(&rig, &ids, &options(1.5, 0.95, seed)).0).collect();
    for (seed, answer) in answers.iter().enumerate() {
        assert_eq!(generated(&rig, &ids, &options(1.5, 0.95, seed as u64)).0, *answer);
    }
    assert!(answers.iter().any(|answer| *answer != answers[0]), "seeds differ");
    // Cold or narrow sampling is greedy.
    let expected = greedy(&rig, &ids, 12);
    assert_eq!(generated(&rig, &ids, &options(0.0, 1.0, 3)).0, expected);
    assert_eq!(generated(&rig, &ids, &options(1e-4, 1.0, 3)).0, expected);
    assert_eq!(generated(&rig, &ids, &options(1.0, 1e-6, 3)).0, expected);
}

// ---------------------------------------------------------------------------------------------
// Errors

fn prefill_error<B: Backend>(rig: &Rig<B>, ids: &[u32], plan: &Plan) -> EngineError {
    rig.engine
        .prefill(ids, plan, &PrefillOptions::default(), &Control::default())
        .map(|_| ())
        .expect_err("bad input")
}

#[test]
fn tokens_that_cannot_be_read_are_errors() {
    let tiny = Tiny { context: 20, ..Tiny::default() };
    let rig = rig(&tiny);
    let plan = rig.plan(&Policy::Full, 3);
    let error = prefill_error(&rig, &[], &plan);
    assert!(matches!(error, EngineError::NoTokens), "{error}");
    let error = prefill_error(&rig, &[1, 64, 2], &plan);
    assert!(matches!(error, EngineError::TokenOutOfRange { id: 64, position: 1, vocabulary: 64 }), "{error}");
    let error = prefill_error(&rig, &[1; 21], &rig.plan(&Policy::Full, 21));
    assert!(matches!(error, EngineError::ContextExceeded { tokens: 21, limit: 20, .. }), "{error}");
    assert!(error.to_string().contains("max_position_embeddings = 20"), "{error}");

    let mut prefill = rig.prefill(&[1; 18], &Policy::Full, &PrefillOptions::default());
    let mut refused = |ids: &[u32]| {
        let error = rig.engine.append(&mut prefill.cache, ids, &Control::default()).expect_err("bad input");
        assert_eq!(prefill.cache.logical_length(), 18, "nothing was read");
        error
    };
    assert!(matches!(refused(&[]), EngineError::NoTokens));
    let error = refused(&[1, u32::MAX]);
    assert!(matches!(error, EngineError::TokenOutOfRange { id: u32::MAX, position: 19, .. }), "{error}");
    let error = refused(&[1; 3]);
    assert!(matches!(error, EngineError::ContextExceeded { tokens: 21, limit: 20, .. }), "{error}");
    // What was refused left the cache as it was.
    let logits = rig.append(&mut prefill, &[1, 1]);
    let expected = rig.oracle.forward(&[1; 20]);
    assert!(relative_distance(&logits, &expected[19]) < CLOSE);
}

#[test]
fn stretched_contexts_have_their_limits() {
    for (rope, limit) in [
        (json!({ "rope_scaling": { "type": "linear", "factor": 4.0 } }), 80),
        (json!({ "rope_scaling": { "rope_type": "dynamic", "factor": 2.0 } }), 40),
    ] {
        let rig = rig(&Tiny { context: 20, rope, ..Tiny::default() });
        rig.prefill(&vec![1; limit], &Policy::Full, &PrefillOptions::default());
        let error = prefill_error(&rig, &vec![1; limit + 1], &rig.plan(&Policy::Full, limit + 1));
        assert!(matches!(error, EngineError::ContextExceeded { limit: l, .. } if l == limit), "{error}");
    }
}

#[test]
fn plans_for_something_else_are_errors() {
    let rig = rig(&Tiny::default());
    let shape = rig.engine.shape();
    for (shape, n) in [
        (shape, 9),
        (shape, 11),
        (ModelShape { layers: 5, ..shape }, 10),
        (ModelShape { kv_heads: 4, ..shape }, 10),
        (ModelShape { query_heads: 2, ..shape }, 10),
        (ModelShape { head_dim: 4, ..shape }, 10),
    ] {
        for policy in policies() {
            let error = prefill_error(&rig, &[1; 10], &policy.plan(shape, n).expect("a plan"));
            assert!(matches!(error, EngineError::WrongPlan { .. }), "{error}");
        }
    }
    let mut plan = rig.plan(&Policy::Full, 10);
    plan.layers.pop();
    assert!(matches!(prefill_error(&rig, &[1; 10], &plan), EngineError::WrongPlan { .. }));
}

#[test]
fn broken_plans_are_errors_that_name_the_layer() {
    let rig = rig(&Tiny::default());
    let n = 60;
    let policy = Policy::FastKv(FastKv {
        retention: Budget::Tokens(20),
        propagation: Budget::Tokens(30),
        ..FastKv::default()
    });
    let plan = serde_json::to_value(rig.plan(&policy, n)).expect("JSON");
    let broken = |layer: usize, pointer: &str, value: Value| {
        let mut plan = plan.clone();
        let pointer = format!("/layers/{layer}{pointer}");
        *plan.pointer_mut(&pointer).expect("a field") = value;
        let plan: Plan = serde_json::from_value(plan).expect("a plan still");
        let error = prefill_error(&rig, &vec![1; n], &plan);
        let EngineError::BrokenPlan { layer: named, .. } = &error else { panic!("{pointer}: {error}") };
        assert!(error.to_string().contains(&format!("layer {named}")), "{error}");
        assert!(*named == layer || *named == layer + 1, "{pointer}: {error}");
    };
    let huge = json!(usize::MAX);
    for rows in [json!(0), json!(59), json!(61), huge.clone()] {
        broken(0, "/rows", rows.clone());
        broken(3, "/rows", rows);
    }
    for count in [json!(0), json!(7), json!(61), huge.clone()] {
        broken(0, "/keep/count", count.clone());
        broken(1, "/propagate/count", count);
    }
    broken(3, "/keep/count", json!(31));
    for window in [json!(0), json!(21), json!(65), huge.clone()] {
        broken(0, "/keep/saliency/window", window.clone());
        broken(1, "/keep/saliency/window", window);
    }
    for window in [json!(0), json!(31), huge.clone()] {
        broken(1, "/propagate/saliency/window", window);
    }
    for kernel in [json!(0), json!(2), json!(65), huge.clone()] {
        broken(0, "/keep/saliency/pooling/kernel", kernel.clone());
        broken(1, "/propagate/saliency/pooling/kernel", kernel);
    }
    for (sinks, recent) in [(json!(30), json!(31)), (huge.clone(), json!(1)), (huge.clone(), huge.clone())] {
        broken(0, "/keep", json!({ "rule": "ends", "sinks": sinks, "recent": recent }));
    }
    for (count, window) in
        [(json!(61), json!(8)), (json!(7), json!(8)), (huge.clone(), json!(8)), (json!(9), huge)]
    {
        broken(0, "/keep", json!({ "rule": "random", "count": count, "window": window, "seed": 1 }));
    }
}

/// Every number in a JSON value.
fn numbers(value: &Value, path: String, found: &mut Vec<String>) {
    match value {
        Value::Number(_) => found.push(path),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(key, value)| numbers(value, format!("{path}/{key}"), found));
        }
        Value::Object(map) => {
            map.iter().for_each(|(key, value)| numbers(value, format!("{path}/{key}"), found));
        }
        _ => {}
    }
}

/// Changes a plan in one place or more, at random.
fn edited(plan: &Plan, rng: &mut Rng) -> Option<Plan> {
    let n = plan.prompt_tokens;
    let mut value = serde_json::to_value(plan).expect("JSON");
    for _ in 0..1 + rng.below(3) {
        let layer = rng.below(plan.layers.len());
        let any = |rng: &mut Rng| {
            let near = rng.below(2 * n);
            let values = [0, 1, 7, 8, 9, 64, 65, n - 1, n, n + 1, near, usize::MAX, 1 << 32];
            json!(values[rng.below(values.len())])
        };
        let propagate = |rng: &mut Rng| {
            let pooling = json!({ "kind": "max", "kernel": any(rng) });
            json!({ "rule": "top", "count": any(rng), "saliency": { "window": any(rng), "pooling": pooling } })
        };
        match rng.below(8) {
            0 => value["layers"][layer]["propagate"] = Value::Null,
            1 if rng.below(3) == 0 => {
                let recent = json!({ "rule": "recent", "count": any(rng), "recent": any(rng) });
                value["layers"][layer]["propagate"] = recent;
            }
            1 => value["layers"][layer]["propagate"] = propagate(rng),
            2 => {
                let counts = [any(rng), any(rng)];
                let mut shared = propagate(rng);
                (shared["rule"], shared["floor"]) = (json!("shared"), json!(rng.unit() * 1.2 - 0.1));
                let keeps = [
                    json!({ "rule": "all" }),
                    json!({ "rule": "heavy", "count": any(rng), "window": any(rng) }),
                    json!({ "rule": "recovered", "recovery": 0.5, "local": rng.unit() * 1.2, "frequent": 0.3 }),
                    json!({ "rule": "each", "counts": counts, "saliency": shared["saliency"] }),
                    shared,
                    json!({ "rule": "ends", "sinks": any(rng), "recent": any(rng) }),
                    json!({ "rule": "random", "count": any(rng), "window": any(rng), "seed": any(rng) }),
                ];
                value["layers"][layer]["keep"] = keeps[rng.below(7)].clone();
            }
            3 => {
                let mut keep = propagate(rng);
                keep["rule"] = json!("top");
                value["layers"][layer]["keep"] = keep;
            }
            _ => {
                let mut found = Vec::new();
                numbers(&value["layers"], "/layers".to_owned(), &mut found);
                numbers(&value["restart"], "/restart".to_owned(), &mut found);
                numbers(&value["shape"], "/shape".to_owned(), &mut found);
                found.push("/prompt_tokens".to_owned());
                let path = &found[rng.below(found.len())];
                *value.pointer_mut(path).expect("a number") = any(rng);
            }
        }
    }
    serde_json::from_value(value).ok()
}

/// Whether a plan's numbers fit together.
fn is_consistent(plan: &Plan) -> bool {
    let scores = |saliency: &Saliency| rules::is_observation(saliency.window, saliency.pooling.kernel);
    let mut rows = plan.prompt_tokens;
    if let Some(restart) = &plan.restart {
        let pooled = rules::is_observation(1, restart.pooling.kernel);
        if restart.layer >= plan.layers.len() || !(1..=rows).contains(&restart.count) || !pooled {
            return false;
        }
        rows = restart.count;
    }
    plan.layers.iter().all(|layer| {
        let kept = match &layer.keep {
            Keep::All => true,
            Keep::Ends { sinks, recent } => *sinks <= rows && *recent <= rows - *sinks,
            Keep::Top { count, saliency } => *count <= rows && saliency.window <= *count && scores(saliency),
            Keep::Each { counts, saliency } => {
                counts.len() == plan.shape.kv_heads
                    && counts.iter().all(|count| *count <= rows && saliency.window <= *count)
                    && scores(saliency)
            }
            Keep::Shared { count, floor, saliency } => {
                *count <= rows && saliency.window <= *count && scores(saliency) && (0.0..=1.0).contains(floor)
            }
            Keep::Random { count, window, .. } => *count <= rows && window <= count,
            Keep::Heavy { count, window } => *window > 0 && window <= count,
            Keep::Recovered { recovery, local, frequent } => {
                [recovery, local, frequent].iter().all(|share| (0.0..=1.0).contains(*share))
            }
        };
        let fits = kept && layer.rows == rows;
        let Some(propagate) = &layer.propagate else { return fits };
        let (count, newest, scored) = match propagate {
            Propagate::Top { count, saliency } => (*count, saliency.window, scores(saliency)),
            Propagate::Recent { count, recent } => (*count, *recent, *recent > 0),
        };
        let handed_on = count <= rows && count >= newest && scored;
        rows = count;
        fits && handed_on
    })
}

#[test]
fn edited_plans_do_what_they_say_or_are_errors() {
    let rig = rig(&Tiny { hidden: 8, intermediate: 8, head_dim: 4, ..Tiny::default() });
    let n = 70;
    let ids = Rng::new(1).ids(n, 64);
    let plans: Vec<Plan> = policies_of(rig.engine.shape()).iter().map(|policy| rig.plan(policy, n)).collect();
    let (ran, refused) = (Cell::new(0), Cell::new(0));
    let config = ProptestConfig { cases: 800, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(seed in any::<u64>(), which in 0..plans.len(), exact_shortcuts in any::<bool>())| {
        let Some(plan) = edited(&plans[which], &mut Rng::new(seed)) else { return Ok(()) };
        let options = PrefillOptions { exact_shortcuts, ..TRACED };
        match rig.engine.prefill(&ids, &plan, &options, &Control::default()) {
            Ok(mut prefill) => {
                ran.set(ran.get() + 1);
                prop_assert!(is_consistent(&plan), "ran: {:?}", plan);
                let trace = prefill.trace.take().expect("a trace");
                for (trace, rules) in trace.layers.iter().zip(&plan.layers) {
                    prop_assert_eq!(trace.rows, rules.rows);
                    let entries: usize = trace.kept.iter().map(Vec::len).sum();
                    let exact = !matches!(rules.keep, Keep::Shared { .. } | Keep::Recovered { .. });
                    let bound = rules.entries(plan.shape.kv_heads);
                    prop_assert!(entries == bound || !exact && entries < bound, "{:?}", plan);
                    prop_assert!(trace.kept.iter().all(|kept| kept.len() <= rules.kept()), "{:?}", plan);
                    let handed_on = trace.propagated.as_ref().map(Vec::len);
                    prop_assert_eq!(handed_on, rules.propagate.map(|propagate| propagate.count()));
                }
                let logits = rig.engine.append(&mut prefill.cache, &[1, 2], &Control::default());
                prop_assert!(logits.is_ok(), "{:?}", logits);
            }
            Err(EngineError::WrongPlan { .. } | EngineError::BrokenPlan { .. }) => {
                refused.set(refused.get() + 1);
                let fits = plan.shape == rig.engine.shape() && plan.prompt_tokens == n && is_consistent(&plan);
                prop_assert!(!fits, "refused: {:?}", plan);
            }
            Err(other) => prop_assert!(false, "{}: {:?}", other, plan),
        }
    });
    assert!(ran.get() > 50 && refused.get() > 50, "{} ran, {} refused", ran.get(), refused.get());
}

#[test]
fn sampling_out_of_range_is_an_error() {
    let rig = rig(&Tiny::default());
    for (temperature, top_p, option) in [
        (-1.0, 1.0, "temperature"),
        (f32::NAN, 1.0, "temperature"),
        (f32::INFINITY, 1.0, "temperature"),
        (1.0, 0.0, "top-p"),
        (1.0, 1.5, "top-p"),
        (1.0, f32::NAN, "top-p"),
    ] {
        let Prefill { mut cache, logits, .. } = rig.prefill(&[1], &Policy::Full, &PrefillOptions::default());
        let sampling = Sampling { temperature, top_p, seed: 0 };
        let options = GenerationOptions { max_tokens: 3, sampling, stop_tokens: Vec::new() };
        let error = rig.engine.generate(&mut cache, logits, &options, &Control::default(), |_| ());
        let error = error.expect_err("out of range");
        assert!(matches!(error, EngineError::Sampling { option: named, .. } if named == option), "{error}");
    }
}

#[test]
fn logits_that_are_no_numbers_are_an_error() {
    for (name, poison) in [
        ("lm_head.weight", f32::NAN),
        ("model.norm.weight", f32::INFINITY),
        ("model.layers.0.mlp.down_proj.weight", 3e38),
    ] {
        let tiny = Tiny::default();
        let mut tensors = tiny.tensors();
        let tensor = tensors.iter_mut().find(|tensor| tensor.name == name).expect("a tensor");
        if name == "lm_head.weight" {
            tensor.values[5 * tiny.hidden] = poison;
        } else {
            tensor.values.fill(poison);
        }
        let directory = tiny.write_with(&tensors);
        let engine = load(directory.path(), cpu(1));
        let plan = Policy::Full.plan(engine.shape(), 4).expect("a plan");
        let error = engine.prefill(&[1, 2, 3, 4], &plan, &PrefillOptions::default(), &Control::default());
        let error = error.map(|_| ()).expect_err("no numbers");
        let EngineError::NotFinite { value, token } = error else { panic!("{name}: {error}") };
        assert!(!value.is_finite());
        if name == "lm_head.weight" {
            assert_eq!(token, 5);
        }
    }
}

#[test]
fn logits_from_elsewhere_are_an_error() {
    let rig = rig(&Tiny::default());
    for (logits, temperature) in [
        (vec![], 0.0),
        (vec![], 1.0),
        (vec![0.0; 63], 0.0),
        (vec![0.0; 65], 1.0),
        (vec![f32::NAN; 64], 0.0),
        (vec![f32::NAN; 64], 1.0),
        (vec![f32::NEG_INFINITY; 64], 1.0),
    ] {
        let Prefill { mut cache, .. } = rig.prefill(&[1], &Policy::Full, &PrefillOptions::default());
        let sampling = Sampling { temperature, ..Sampling::default() };
        let options = GenerationOptions { max_tokens: 3, sampling, stop_tokens: Vec::new() };
        assert_eq!(Sampler::new(sampling).expect("in range").choose(&[]), 0);
        let what = format!("{} of {:?}", logits.len(), logits.first());
        let result = rig.engine.generate(&mut cache, logits, &options, &Control::default(), |_| ());
        assert!(result.is_err(), "{what}: {result:?}");
    }
}

#[test]
fn caches_from_elsewhere_are_errors() {
    let rig = rig(&Tiny::default());
    let others = [
        Tiny { layers: 2, ..Tiny::default() },
        Tiny { layers: 6, ..Tiny::default() },
        Tiny { kv_heads: 1, ..Tiny::default() },
        Tiny { head_dim: 16, ..Tiny::default() },
    ];
    for other in others {
        let elsewhere = self::rig(&other);
        let mut prefill = elsewhere.prefill(&[1, 2, 3], &Policy::Full, &PrefillOptions::default());
        let error = rig.engine.append(&mut prefill.cache, &[1], &Control::default());
        let error = error.expect_err("another model's cache");
        assert_eq!(prefill.cache.logical_length(), 3);
        assert!(elsewhere.positions(&prefill).iter().flatten().all(|head| head.len() == 3), "{error}");
    }
}

#[test]
fn memory_that_cannot_be_had_is_an_error() {
    let rig = rig(&Tiny::default());
    let ids = [1; 30];
    for policy in [Policy::Full, policies().remove(0)] {
        for slack in [usize::MAX, usize::MAX / 2, 1 << 50] {
            let options = PrefillOptions { slack, ..PrefillOptions::default() };
            let error = rig.engine.prefill(&ids, &rig.plan(&policy, 30), &options, &Control::default());
            let error = error.map(|_| ()).expect_err("too much");
            assert!(matches!(error, EngineError::Backend(BackendError::OutOfMemory { .. })), "{error}");
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Conformance

/// Every fixture made with the transformers library: `expected.json` beside the model.
#[test]
fn fixtures_give_the_logits_of_transformers() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models");
    let Ok(entries) = std::fs::read_dir(&fixtures) else {
        // A package from the registry comes without them.
        return;
    };
    let mut models = 0;
    for entry in entries {
        let directory = entry.expect("an entry").path();
        if !directory.join("expected.json").exists() {
            continue;
        }
        models += 1;
        conforms(&directory);
    }
    assert!(models >= 8, "{models} models");
}

fn conforms(directory: &Path) {
    let name = directory.file_name().expect("a name").to_string_lossy();
    let expected = oracle::checkpoint::json(&directory.join("expected.json"));
    let oracle = Model::open(directory);
    let engine = load(directory, cpu(2));
    let is_dynamic = directory.join("config.json");
    let is_dynamic = std::fs::read_to_string(is_dynamic).expect("a configuration").contains("dynamic");
    let list = |value: &Value| -> Vec<u32> {
        value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
    };
    for prompt in expected["prompts"].as_array().expect("prompts") {
        let ids = list(&prompt["ids"]);
        let forward = oracle.forward(&ids);
        let rows = prompt["logits"].as_array().expect("logits");
        for (position, row) in list(&prompt["positions"]).into_iter().zip(rows) {
            let position = position as usize;
            let row: Vec<f64> =
                row.as_array().expect("a row").iter().map(|logit| logit.as_f64().expect("a logit")).collect();
            let narrow: Vec<f32> = forward[position].iter().map(|logit| *logit as f32).collect();
            let distance = relative_distance(&narrow, &row);
            assert!(distance < 1e-4, "{name}, position {position}: the oracle is off by {distance:e}");
            // A prompt cut short is turned otherwise where the length decides.
            if is_dynamic && position + 1 < ids.len() {
                continue;
            }
            let plan = Policy::Full.plan(engine.shape(), position + 1).expect("a plan");
            let Prefill { mut cache, logits, .. } = engine
                .prefill(&ids[..=position], &plan, &PrefillOptions::default(), &Control::default())
                .expect("a prefill");
            let distance = relative_distance(&logits, &row);
            assert!(distance < 1e-4, "{name}, position {position}: off by {distance:e}");
            if position + 1 == ids.len() {
                let greedy = list(&prompt["greedy"]);
                let options = GenerationOptions { max_tokens: greedy.len(), ..GenerationOptions::default() };
                let generation = engine
                    .generate(&mut cache, logits, &options, &Control::default(), |_| ())
                    .expect("an answer");
                assert_eq!(generation.tokens, greedy, "{name}");
            }
        }
    }
}
