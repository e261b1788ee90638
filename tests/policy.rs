//! Plans, held to the oracle's arithmetic.

#![cfg(feature = "pipeline")]

mod oracle;
mod tiny;

use std::collections::BTreeSet;

use fastkv::backend::cpu::CpuBackend;
use fastkv::engine::{Control, Engine, PrefillOptions};
use fastkv::model::ModelDir;
use fastkv::policy::{
    AdaKv, Budget, FastGen, FastKv, GemFilter, H2o, HeadKv, HeadScores, HeadScoresError, Keep, LayerPlan,
    MAX_POOLING, MAX_WINDOW, ModelShape, Plan, Policy, PolicyError, Pooling, PoolingKind, Propagate,
    PyramidInfer, PyramidKv, Random, Restart, Saliency, SnapKv, Steering, StreamingLlm, Tsp,
};
use oracle::plan as expected;
use proptest::prelude::*;
use tiny::Tiny;

const LLAMA_8B: ModelShape = ModelShape { layers: 32, query_heads: 32, kv_heads: 8, head_dim: 128 };

fn shape(layers: usize) -> ModelShape {
    ModelShape { layers, ..LLAMA_8B }
}

fn fast(window: usize, retention: Budget, propagation: Budget, tsp_layer: Option<usize>) -> FastKv {
    let saliency = Saliency { window, pooling: Pooling { kind: PoolingKind::Max, kernel: 7 } };
    FastKv { saliency, retention, propagation, tsp_layer, settling: None }
}

fn budget(budget: Budget) -> expected::Budget {
    match budget {
        Budget::Tokens(tokens) => expected::Budget::Tokens(tokens),
        Budget::Rate(rate) => expected::Budget::Rate(rate),
    }
}

/// What the oracle makes of a policy.
fn expectation(policy: &Policy, shape: ModelShape, n: usize) -> Option<Vec<expected::Layer>> {
    let layers = shape.layers;
    let legal = |saliency: &Saliency| expected::is_observation(saliency.window, saliency.pooling.kernel);
    match policy {
        Policy::Full => (n > 0).then(|| expected::full(layers, n)),
        Policy::FastKv(FastKv { saliency, retention, propagation, tsp_layer, .. }) => expected::fastkv(
            layers,
            n,
            (saliency.window, saliency.pooling.kernel),
            budget(*retention),
            budget(*propagation),
            *tsp_layer,
        ),
        Policy::SnapKv(SnapKv { saliency, retention }) => {
            let plan = expected::uniform(layers, n, saliency.window, budget(*retention));
            plan.filter(|_| legal(saliency))
        }
        Policy::PyramidKv(PyramidKv { saliency, retention, steepness }) => {
            let plan = expected::pyramid(layers, n, saliency.window, budget(*retention), *steepness);
            plan.filter(|_| legal(saliency))
        }
        Policy::AdaKv(AdaKv { saliency, retention, floor }) => {
            let plan = expected::shared(layers, n, saliency.window, budget(*retention), *floor);
            plan.filter(|_| legal(saliency))
        }
        Policy::HeadKv(HeadKv { saliency, retention, pooled, heads }) => {
            let scores = means(heads, shape)?;
            let retention = budget(*retention);
            let plan = expected::by_head(&scores, shape.kv_heads, n, saliency.window, retention, *pooled);
            plan.filter(|_| legal(saliency))
        }
        Policy::H2o(H2o { window, retention }) => expected::heavy(layers, n, *window, budget(*retention)),
        Policy::FastGen(FastGen { recovery, local, frequent, .. }) => {
            expected::recovered(layers, n, (*recovery, *local, *frequent))
        }
        Policy::GemFilter(GemFilter { filter_layer, retention, pooling }) => {
            let plan = expected::gemfilter(layers, n, *filter_layer, budget(*retention), pooling.kernel);
            plan.map(|(_, plan)| plan)
        }
        Policy::PyramidInfer(PyramidInfer { recent, decay }) => {
            expected::pyramid_infer(layers, n, *recent, *decay)
        }
        Policy::StreamingLlm(StreamingLlm { sinks, retention }) => {
            expected::streaming(layers, n, *sinks, budget(*retention))
        }
        Policy::Tsp(Tsp { saliency, propagation, tsp_layer, cache, .. }) => {
            let tsp_layer = tsp_layer.unwrap_or(expected::half_depth(layers));
            if !legal(saliency) || tsp_layer >= layers {
                return None;
            }
            let t = expected::propagated(budget(*propagation), n, saliency.window)?;
            let early = expectation(cache, shape, n)?;
            let late = expectation(&behind_tsp(cache, *propagation), shape, t)?;
            Some(expected::composed(&early, &late, tsp_layer, t))
        }
        Policy::Random(Random { window, retention, .. }) => {
            expected::uniform(layers, n, *window, budget(*retention))
        }
    }
}

/// A policy of caches with the rate it has behind the TSP layer.
fn behind_tsp(cache: &Policy, propagation: Budget) -> Policy {
    let mut value = serde_json::to_value(cache).expect("JSON");
    if let Ok(retention) = serde_json::from_value::<Budget>(value["retention"].clone()) {
        let late = match expected::late_rate(budget(retention), budget(propagation)) {
            expected::Budget::Rate(rate) => Budget::Rate(rate),
            expected::Budget::Tokens(tokens) => Budget::Tokens(tokens),
        };
        value["retention"] = serde_json::to_value(late).expect("JSON");
    }
    serde_json::from_value(value).expect("a policy")
}

/// Mean scores `[layer][query head]`, read from the file's form; `None`: not of this model.
fn means(heads: &HeadScores, shape: ModelShape) -> Option<Vec<Vec<f64>>> {
    let file = serde_json::to_value(heads).expect("JSON");
    let file = file.as_object().expect("an object");
    let mean = |layer: usize, head: usize| {
        let scores = file.get(&format!("{layer}-{head}"))?.as_array()?;
        let scores: Vec<f64> = scores.iter().map(|score| score.as_f64().expect("a number")).collect();
        Some(scores.iter().sum::<f64>() / scores.len() as f64)
    };
    if file.len() != shape.layers * shape.query_heads {
        return None;
    }
    (0..shape.layers).map(|layer| (0..shape.query_heads).map(|head| mean(layer, head)).collect()).collect()
}

/// A score for every head.
fn scores_of(shape: ModelShape) -> HeadScores {
    let mut scores = HeadScores::default();
    for layer in 0..shape.layers {
        for head in 0..shape.query_heads {
            scores.add(layer, head, ((7 * layer + 5 * head) % 11) as f64);
        }
    }
    scores
}

/// The plan in the oracle's words.
fn spoken(layer: &LayerPlan) -> expected::Layer {
    expected::Layer {
        rows: layer.rows,
        keep: match &layer.keep {
            Keep::All => expected::Keep::All,
            Keep::Ends { sinks, recent } => expected::Keep::Ends(*sinks, *recent),
            Keep::Top { count, .. } | Keep::Random { count, .. } => expected::Keep::Chosen(*count),
            Keep::Each { counts, .. } => expected::Keep::Each(counts.clone()),
            Keep::Shared { count, floor, .. } => expected::Keep::Shared(*count, *floor),
            Keep::Heavy { count, window } => expected::Keep::Heavy(*count, *window),
            Keep::Recovered { recovery, local, frequent } => {
                expected::Keep::Recovered(*recovery, *local, *frequent)
            }
        },
        hands_on: layer.propagate.map(|propagate| propagate.count()),
        recent: match layer.propagate {
            Some(Propagate::Recent { recent, .. }) => Some(recent),
            _ => None,
        },
    }
}

/// Plans, and holds the plan to the oracle.
fn planned(policy: &Policy, shape: ModelShape, n: usize) -> Option<Plan> {
    let plan = policy.plan(shape, n);
    let expected = expectation(policy, shape, n);
    match (plan, expected) {
        (Ok(plan), Some(expected)) => {
            let spoken: Vec<_> = plan.layers.iter().map(spoken).collect();
            assert_eq!(spoken, expected, "{policy:?}, {n} tokens");
            assert_eq!((plan.shape, plan.prompt_tokens), (shape, n));
            assert_eq!(plan.policy, *policy);
            Some(plan)
        }
        (Err(_), None) => None,
        (plan, expected) => panic!("{policy:?}, {n} tokens: {plan:?}\nexpected {expected:?}"),
    }
}

fn fastkv_layers(options: FastKv, layers: usize, n: usize) -> Vec<(usize, usize, Option<usize>)> {
    let plan = planned(&Policy::FastKv(options), shape(layers), n).expect("a plan");
    plan.layers.iter().map(|layer| (layer.rows, layer.kept(), layer.propagate.map(|p| p.count()))).collect()
}

#[test]
fn proportional_preset_is_the_latest_papers() {
    let FastKv { saliency, retention, propagation, tsp_layer, settling } = FastKv::default();
    assert_eq!(settling, None);
    assert_eq!(saliency.window, 8);
    assert_eq!(saliency.pooling, Pooling { kind: PoolingKind::Max, kernel: 7 });
    assert_eq!((retention, propagation, tsp_layer), (Budget::Rate(0.1), Budget::Rate(0.2), None));

    let layers = fastkv_layers(FastKv::proportional(), 32, 131_072);
    assert!(layers[..15].iter().all(|layer| *layer == (131_072, 13_107, None)));
    assert_eq!(layers[15], (131_072, 13_107, Some(26_214)));
    assert!(layers[16..].iter().all(|layer| *layer == (26_214, 13_107, None)));
}

#[test]
fn constant_preset_is_that_of_versions_1_and_2() {
    let FastKv { saliency, .. } = FastKv::constant();
    assert_eq!(saliency.window, 8);
    assert_eq!(saliency.pooling, Pooling { kind: PoolingKind::Average, kernel: 7 });
    let layers = fastkv_layers(FastKv::constant(), 32, 32_768);
    assert!(layers[..15].iter().all(|layer| *layer == (32_768, 512, None)));
    assert_eq!(layers[15], (32_768, 512, Some(2048)));
    assert!(layers[16..].iter().all(|layer| *layer == (2048, 512, None)));
}

#[test]
fn tsp_layer_is_at_half_depth() {
    for (layers, tsp_layer) in [(32, 15), (36, 17), (40, 19), (2, 0), (3, 0), (5, 1), (7, 2)] {
        let plan = fastkv_layers(FastKv::default(), layers, 1000);
        let handing: Vec<_> = (0..layers).filter(|layer| plan[*layer].2.is_some()).collect();
        assert_eq!(handing, [tsp_layer], "{layers} layers");
    }
}

#[test]
fn edges_of_fastkv() {
    let (rate, tokens) = (Budget::Rate, Budget::Tokens);
    // A prompt shorter than the window, as long as it, and one longer.
    for n in 1..12 {
        let layers = fastkv_layers(fast(8, rate(0.1), rate(0.2), None), 4, n);
        let t = n.min(8);
        let handed = (t < n).then_some(t);
        assert_eq!(layers[0], (n, n, None).min((n, 9, None)));
        assert_eq!(layers[1], (n, n.min(9), handed));
        assert_eq!(layers[2..], [(t, t, None); 2], "no more than it reads, C = W + 1 or not");
    }
    // n ≤ C: left alone, and TSP happens all the same.
    let layers = fastkv_layers(fast(8, tokens(100), tokens(60), None), 4, 100);
    assert_eq!(layers, [(100, 100, None), (100, 100, Some(60)), (60, 60, None), (60, 60, None)]);
    // T = n: nothing is narrowed.
    let layers = fastkv_layers(fast(8, tokens(20), tokens(100), None), 4, 100);
    assert_eq!(layers, [(100, 20, None); 4]);
    assert_eq!(fastkv_layers(fast(8, tokens(20), tokens(5000), None), 4, 100), layers);
    // T = W, C = W + 1: the least.
    let layers = fastkv_layers(fast(8, tokens(9), tokens(8), Some(0)), 3, 100);
    assert_eq!(layers, [(100, 9, Some(8)), (8, 8, None), (8, 8, None)]);
    // r ≥ ρ: no compression behind the TSP layer.
    for (r, rho) in [(0.2, 0.2), (0.5, 0.2), (1.0, 0.3)] {
        let layers = fastkv_layers(fast(8, rate(r), rate(rho), Some(1)), 4, 1000);
        let t = (1000.0 * rho) as usize;
        assert_eq!(layers[2..], [(t, t, None); 2], "r = {r}, ρ = {rho}");
    }
    // r = ρ = 1 is the full context; ρ = 1 is SnapKV.
    assert_eq!(fastkv_layers(fast(8, rate(1.0), rate(1.0), None), 4, 77), [(77, 77, None); 4]);
    assert_eq!(fastkv_layers(fast(8, rate(0.5), rate(1.0), None), 4, 100), [(100, 50, None); 4]);
    // The rate r/ρ comes first, then int(): 0.3/0.7 of 70 is 30 in real numbers, 29 or 30 in f64.
    let late = fastkv_layers(fast(4, rate(0.3), rate(0.7), None), 2, 100)[1];
    assert_eq!(late, (70, (70.0 * (0.3 / 0.7)) as usize, None));
    // int(n · rate) in f64: 0.29 · 100 is 28.999…
    assert_eq!(fastkv_layers(fast(4, rate(0.29), rate(1.0), None), 1, 100)[0].1, 28);
    // One layer: it is the first, the TSP layer and the last; nothing is handed on.
    assert_eq!(fastkv_layers(fast(8, rate(0.1), rate(0.2), None), 1, 1000), [(1000, 100, None)]);
    // The TSP layer first and last.
    let layers = fastkv_layers(fast(8, rate(0.1), rate(0.2), Some(0)), 3, 1000);
    assert_eq!(layers, [(1000, 100, Some(200)), (200, 100, None), (200, 100, None)]);
    let layers = fastkv_layers(fast(8, rate(0.1), rate(0.2), Some(2)), 3, 1000);
    assert_eq!(layers, [(1000, 100, None); 3]);
    // Rates beside constants.
    let layers = fastkv_layers(fast(8, tokens(50), rate(0.2), None), 2, 1000);
    assert_eq!(layers, [(1000, 50, Some(200)), (200, 50, None)]);
    let layers = fastkv_layers(fast(8, rate(0.1), tokens(300), None), 2, 1000);
    assert_eq!(layers, [(1000, 100, Some(300)), (300, 100, None)]);
}

#[test]
fn edges_of_the_others() {
    let one = |policy: &Policy, n| planned(policy, shape(3), n).expect("a plan").layers.swap_remove(0);
    let snap = Policy::SnapKv(SnapKv::default());
    assert_eq!(one(&snap, 1).keep, Keep::All);
    assert_eq!(one(&snap, 33).keep, Keep::All);
    assert_eq!(one(&snap, 34).kept(), 33);
    assert_eq!(one(&snap, 1000).kept(), 100);
    let streaming = |sinks, retention| Policy::StreamingLlm(StreamingLlm { sinks, retention });
    assert_eq!(one(&streaming(4, Budget::Tokens(64)), 1000).keep, Keep::Ends { sinks: 4, recent: 60 });
    assert_eq!(one(&streaming(0, Budget::Tokens(64)), 1000).keep, Keep::Ends { sinks: 0, recent: 64 });
    assert_eq!(one(&streaming(4, Budget::Rate(0.1)), 50).keep, Keep::Ends { sinks: 4, recent: 5 });
    assert_eq!(one(&streaming(4, Budget::Tokens(64)), 64).keep, Keep::All);
    let random = Policy::Random(Random { window: 4, retention: Budget::Tokens(5), seed: 9 });
    assert_eq!(one(&random, 1000).keep, Keep::Random { count: 5, window: 4, seed: 9 });
    assert_eq!(one(&random, 5).keep, Keep::All);
}

#[test]
fn every_error_names_what_is_wrong() {
    let refused = |policy: Policy, shape: ModelShape, n: usize| {
        let error = policy.plan(shape, n).expect_err("bad options");
        (error.to_string(), error)
    };
    let (rate, tokens) = (Budget::Rate, Budget::Tokens);
    let saliency =
        |window, kernel| Saliency { window, pooling: Pooling { kind: PoolingKind::Average, kernel } };
    let fast = |retention, propagation| Policy::FastKv(fast(8, retention, propagation, None));
    let snap =
        |window, kernel, retention| Policy::SnapKv(SnapKv { saliency: saliency(window, kernel), retention });

    for policy in every_policy() {
        assert_eq!(refused(policy.clone(), LLAMA_8B, 0).1, PolicyError::EmptyPrompt);
        for bad in [
            ModelShape { layers: 0, ..LLAMA_8B },
            ModelShape { query_heads: 0, ..LLAMA_8B },
            ModelShape { kv_heads: 0, ..LLAMA_8B },
            ModelShape { head_dim: 0, ..LLAMA_8B },
            ModelShape { kv_heads: 5, ..LLAMA_8B },
            ModelShape { kv_heads: 64, ..LLAMA_8B },
        ] {
            let (message, error) = refused(policy.clone(), bad, 100);
            assert_eq!(error, PolicyError::Shape(bad));
            assert!(message.contains(&format!("kv_heads: {}", bad.kv_heads)), "{message}");
        }
    }
    for bad in [0.0, -0.1, 1.000_001, f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -0.0] {
        for (option, policy) in [
            ("retention", fast(rate(bad), rate(0.2))),
            ("propagation", fast(rate(0.1), rate(bad))),
            ("retention", snap(8, 7, rate(bad))),
            ("retention", Policy::StreamingLlm(StreamingLlm { sinks: 4, retention: rate(bad) })),
            ("retention", Policy::Random(Random { retention: rate(bad), ..Random::default() })),
        ] {
            let (message, error) = refused(policy, LLAMA_8B, 100);
            assert!(message.contains(option) && message.contains(&bad.to_string()), "{message}");
            assert!(matches!(error, PolicyError::Rate { option: named, .. } if named == option));
        }
    }
    for (option, policy, value, reserved, least) in [
        ("retention", fast(tokens(8), rate(0.2)), 8, 8, 9),
        ("retention", fast(tokens(0), rate(0.2)), 0, 8, 9),
        ("propagation", fast(rate(0.1), tokens(7)), 7, 8, 8),
        ("retention", snap(32, 7, tokens(32)), 32, 32, 33),
        ("retention", Policy::StreamingLlm(StreamingLlm { sinks: 12, retention: tokens(12) }), 12, 12, 13),
        ("retention", Policy::StreamingLlm(StreamingLlm { sinks: 4, retention: tokens(8) }), 8, 8, 9),
        ("retention", Policy::Random(Random { retention: tokens(8), ..Random::default() }), 8, 8, 9),
    ] {
        let (message, error) = refused(policy, LLAMA_8B, 100);
        let PolicyError::Budget { option: o, value: v, reserved: r, least: l, .. } = error else {
            panic!("{error:?}");
        };
        assert_eq!((o, v, r, l), (option, value, reserved, least));
        assert!(message.contains(option) && message.contains(&format!("at least {least}")), "{message}");
    }
    for bad in [0, MAX_WINDOW + 1, usize::MAX] {
        for policy in [
            snap(bad, 7, rate(0.1)),
            Policy::FastKv(FastKv { saliency: saliency(bad, 7), ..FastKv::default() }),
            Policy::Random(Random { window: bad, ..Random::default() }),
        ] {
            assert_eq!(refused(policy, LLAMA_8B, 100).1, PolicyError::Window(bad));
        }
    }
    for bad in [0, 2, 62, MAX_POOLING + 1, MAX_POOLING + 2, usize::MAX] {
        let policy = Policy::FastKv(FastKv { saliency: saliency(8, bad), ..FastKv::default() });
        assert_eq!(refused(policy, LLAMA_8B, 100).1, PolicyError::PoolingKernel(bad));
        assert_eq!(refused(snap(8, bad, rate(0.1)), LLAMA_8B, 100).1, PolicyError::PoolingKernel(bad));
    }
    for (layers, layer) in [(32, 32), (1, 1), (4, usize::MAX)] {
        let policy = Policy::FastKv(FastKv { tsp_layer: Some(layer), ..FastKv::default() });
        let error = refused(policy, shape(layers), 100).1;
        assert_eq!(error, PolicyError::TspLayer { layer, last: layers - 1 });
    }
}

#[test]
fn absurd_numbers_are_errors_or_plans_but_no_panic() {
    for huge in [usize::MAX, usize::MAX - 1, usize::MAX / 2] {
        for retention in [Budget::Rate(1.0), Budget::Rate(1e-300), Budget::Tokens(huge), Budget::Tokens(1)] {
            for n in [1, 100, huge] {
                let streaming = StreamingLlm { sinks: huge, retention };
                drop(Policy::StreamingLlm(streaming).plan(shape(2), n));
                drop(Policy::FastKv(fast(8, retention, Budget::Tokens(huge), None)).plan(shape(2), n));
                drop(Policy::SnapKv(SnapKv { retention, ..SnapKv::default() }).plan(shape(2), n));
            }
        }
    }
}

#[test]
fn names_and_defaults_read_back() {
    for policy in every_policy() {
        let mut value = serde_json::json!({ "name": policy.name() });
        if let Policy::HeadKv(options) = &policy {
            value["heads"] = serde_json::to_value(&options.heads).expect("JSON");
        }
        let text = value.to_string();
        assert_eq!(serde_json::from_str::<Policy>(&text).expect("a policy"), policy);
    }
    for bad in [r#"{"name":"snapvk"}"#, r#"{"name":"fastkv","retention":3}"#, "{}"] {
        assert!(serde_json::from_str::<Policy>(bad).is_err(), "{bad}");
    }
}

fn every_policy() -> Vec<Policy> {
    vec![
        Policy::Full,
        Policy::FastKv(FastKv::default()),
        Policy::SnapKv(SnapKv::default()),
        Policy::PyramidKv(PyramidKv::default()),
        Policy::AdaKv(AdaKv::default()),
        Policy::HeadKv(HeadKv { heads: scores_of(LLAMA_8B), ..HeadKv::default() }),
        Policy::H2o(H2o::default()),
        Policy::FastGen(FastGen::default()),
        Policy::GemFilter(GemFilter::default()),
        Policy::PyramidInfer(PyramidInfer::default()),
        Policy::StreamingLlm(StreamingLlm::default()),
        Policy::Random(Random::default()),
    ]
}

fn any_budget() -> impl Strategy<Value = Budget> {
    prop_oneof![
        (0_usize..300).prop_map(Budget::Tokens),
        (-0.05_f64..1.1).prop_map(Budget::Rate),
        Just(Budget::Rate(1.0)),
        Just(Budget::Rate(0.2)),
    ]
}

fn any_saliency() -> impl Strategy<Value = Saliency> {
    let kind = prop_oneof![Just(PoolingKind::Max), Just(PoolingKind::Average)];
    let kernel = prop_oneof![4 => (0_usize..32).prop_map(|half| 2 * half + 1), 1 => 0_usize..70];
    let window = prop_oneof![4 => 1_usize..20, 1 => 0_usize..70];
    (window, kind, kernel)
        .prop_map(|(window, kind, kernel)| Saliency { window, pooling: Pooling { kind, kernel } })
}

/// A policy for this shape, which may be told things that make no sense.
fn any_policy_of(shape: ModelShape) -> BoxedStrategy<Policy> {
    let number = prop_oneof![4 => 1.0_f64..30.0, 1 => -1.0_f64..2.0];
    let share = prop_oneof![4 => 0.0_f64..1.0, 1 => -0.1_f64..1.1, 1 => Just(0.5)];
    prop_oneof![
        4 => any_policy(),
        1 => (any_saliency(), any_budget(), number.clone()).prop_map(|(saliency, retention, steepness)| {
            Policy::PyramidKv(PyramidKv { saliency, retention, steepness })
        }),
        1 => (any_saliency(), any_budget(), share.clone())
            .prop_map(|(saliency, retention, floor)| Policy::AdaKv(AdaKv { saliency, retention, floor })),
        1 => (0_usize..70, any_budget()).prop_map(|(window, retention)| Policy::H2o(H2o { window, retention })),
        1 => (share.clone(), share.clone(), share.clone()).prop_map(|(recovery, local, frequent)| {
            Policy::FastGen(FastGen { recovery, local, frequent, ..FastGen::default() })
        }),
        1 => (prop::option::of(0_usize..12), any_budget(), any_saliency()).prop_map(
            |(filter_layer, retention, Saliency { pooling, .. })| {
                Policy::GemFilter(GemFilter { filter_layer, retention, pooling })
            }
        ),
        1 => (share.clone(), share.clone())
            .prop_map(|(recent, decay)| Policy::PyramidInfer(PyramidInfer { recent, decay })),
        1 => (any_saliency(), any_budget(), number).prop_map(move |(saliency, retention, pooled)| {
            let heads = scores_of(shape);
            let (heads, pooled) = if shape.layers * shape.query_heads == 1 {
                // The only score there is may be 0.
                let mut one = HeadScores::default();
                one.add(0, 0, 0.5);
                (one, pooled)
            } else {
                (heads, pooled)
            };
            Policy::HeadKv(HeadKv { saliency, retention, pooled, heads })
        }),
    ]
    .boxed()
}

/// A policy with TSP in front of it, where it goes with that.
fn any_composed(shape: ModelShape) -> BoxedStrategy<Policy> {
    let tsp = (any_saliency(), any_budget(), prop::option::of(0_usize..12));
    (any_policy_of(shape), tsp)
        .prop_map(|(cache, (saliency, propagation, tsp_layer))| match cache {
            Policy::Full | Policy::FastKv(_) | Policy::GemFilter(_) | Policy::PyramidInfer(_) => cache,
            cache => {
                Policy::Tsp(Tsp { saliency, propagation, tsp_layer, settling: None, cache: Box::new(cache) })
            }
        })
        .boxed()
}

fn any_case() -> BoxedStrategy<(ModelShape, Policy)> {
    any_shape()
        .prop_flat_map(|shape| {
            (Just(shape), prop_oneof![3 => any_policy_of(shape), 1 => any_composed(shape)])
        })
        .boxed()
}

#[test]
fn tsp_goes_with_policies_of_caches_alone() {
    for policy in every_policy() {
        let composed = Policy::Tsp(Tsp::with(policy.clone()));
        let plan = composed.plan(LLAMA_8B, 1000);
        match policy {
            Policy::Full | Policy::FastKv(_) | Policy::GemFilter(_) | Policy::PyramidInfer(_) => {
                assert_eq!(plan, Err(PolicyError::Composition(policy.name())));
            }
            _ => {
                assert_eq!(composed.name(), format!("fastkv+{}", policy.name()));
                let plan = plan.expect("a plan");
                assert_eq!(plan.layers[15].propagate.expect("TSP").count(), 200);
                assert!(plan.layers[..16].iter().all(|layer| layer.rows == 1000));
                assert!(plan.layers[16..].iter().all(|layer| layer.rows == 200));
                let json = serde_json::to_string(&plan).expect("JSON");
                assert_eq!(serde_json::from_str::<Plan>(&json).expect("a plan"), plan);
            }
        }
        let twice = Policy::Tsp(Tsp::with(Policy::Tsp(Tsp::with(policy))));
        assert!(matches!(twice.plan(LLAMA_8B, 1000), Err(PolicyError::Composition(_))));
    }
}

fn any_policy() -> BoxedStrategy<Policy> {
    prop_oneof![
        1 => Just(Policy::Full),
        6 => (any_saliency(), any_budget(), any_budget(), prop::option::of(0_usize..12)).prop_map(
            |(saliency, retention, propagation, tsp_layer)| {
                Policy::FastKv(FastKv { saliency, retention, propagation, tsp_layer, settling: None })
            }
        ),
        2 => (any_saliency(), any_budget())
            .prop_map(|(saliency, retention)| Policy::SnapKv(SnapKv { saliency, retention })),
        2 => (0_usize..40, any_budget())
            .prop_map(|(sinks, retention)| Policy::StreamingLlm(StreamingLlm { sinks, retention })),
        1 => (0_usize..70, any_budget(), any::<u64>())
            .prop_map(|(window, retention, seed)| Policy::Random(Random { window, retention, seed })),
    ]
    .boxed()
}

fn any_shape() -> impl Strategy<Value = ModelShape> {
    (1_usize..12, 1_usize..9, 1_usize..5, 1_usize..65).prop_map(|(layers, group, kv_heads, head_dim)| {
        ModelShape { layers, query_heads: group * kv_heads, kv_heads, head_dim }
    })
}

/// Layers that `Display` speaks of.
fn layers_in(text: &str) -> BTreeSet<usize> {
    let mut layers = BTreeSet::new();
    for line in text.lines().filter(|line| line.trim().starts_with("layer")) {
        let name = line.trim().split(':').next().expect("a name");
        let numbers: Vec<usize> =
            name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect();
        layers.extend(numbers[0]..=*numbers.last().expect("a number"));
    }
    layers
}

#[test]
fn pyramids_fall_and_keep_their_total() {
    let counts = |steepness, retention, layers: usize, n: usize| -> Vec<usize> {
        let saliency = Saliency { window: 8, pooling: Pooling { kind: PoolingKind::Max, kernel: 7 } };
        let policy = Policy::PyramidKv(PyramidKv { saliency, retention, steepness });
        planned(&policy, shape(layers), n).expect("a plan").layers.iter().map(LayerPlan::kept).collect()
    };
    // C' = 100: from 195 to 5 in steps of 190/3, the window beside them.
    assert_eq!(counts(20.0, Budget::Tokens(108), 4, 4000), [203, 140, 76, 13]);
    assert_eq!(counts(1.0, Budget::Tokens(108), 4, 4000), [108; 4]);
    // 195 do not fit 150 − 8 tokens: 142 and 58 do.
    assert_eq!(counts(20.0, Budget::Tokens(79), 3, 150)[..], [8 + 139, 8 + 71, 8 + 3]);
    assert_eq!(counts(20.0, Budget::Tokens(108), 2, 208), [8 + 195, 13]);
    assert_eq!(counts(20.0, Budget::Tokens(108), 2, 202), [202, 8 + 6]);
    // Below 2·C' tokens every layer gets C'.
    assert_eq!(counts(20.0, Budget::Tokens(108), 2, 199), [108; 2]);
    assert_eq!(counts(20.0, Budget::Tokens(108), 1, 1000), [108]);
    assert_eq!(counts(20.0, Budget::Tokens(108), 2, 108), [108; 2]);
}

#[test]
fn heads_get_what_they_scored() {
    let shape = ModelShape { layers: 2, query_heads: 4, kv_heads: 2, head_dim: 8 };
    let saliency = Saliency { window: 8, pooling: Pooling { kind: PoolingKind::Max, kernel: 7 } };
    let headkv = |file: &str, n| {
        let heads = serde_json::from_str(file).expect("scores");
        let retention = Budget::Tokens(20);
        let policy = Policy::HeadKv(HeadKv { saliency, retention, pooled: 1.2, heads });
        planned(&policy, shape, n).expect("a plan").layers
    };
    // b = 12: 10 of each go into the pool of 40, 2 are everyone's. Means 1, 1, 0, 2, 0, 0, 0, 4 of 8.
    let file = r#"{"0-0": [1], "0-1": [0, 2], "0-2": [0], "0-3": [2], "1-0": [0], "1-1": [0], "1-2": [0, 0], "1-3": [4]}"#;
    let counts =
        |layers: Vec<LayerPlan>| -> Vec<Keep> { layers.into_iter().map(|layer| layer.keep).collect() };
    let each = |counts: [usize; 2]| Keep::Each { counts: counts.to_vec(), saliency };
    assert_eq!(counts(headkv(file, 100)), [each([20, 20]), each([10, 30])]);
    // No head gets more than there is.
    assert_eq!(counts(headkv(file, 25)), [each([20, 20]), each([10, 25])]);
    assert_eq!(counts(headkv(file, 20)), [Keep::All, Keep::All]);

    let refused = |file: &str| {
        let heads = serde_json::from_str(file).expect("scores");
        let policy = Policy::HeadKv(HeadKv { heads, ..HeadKv::default() });
        policy.plan(shape, 100).expect_err("another model's").to_string()
    };
    for (file, parts) in [
        ("{}", vec!["there are none"]),
        (r#"{"0-0": [1]}"#, vec!["head 0-1 has no scores", "2 layers of 4 query heads"]),
        (&file.replace("1-3", "2-3"), vec!["head 2-3 is of another model", "2 layers of 4 query heads"]),
        (&file.replace("1-3", "1-4"), vec!["head 1-4 is of another model"]),
        (&file.replace("[4]", "[-4]"), vec!["head 1-3 scores -4"]),
        (&file.replace("[4]", "[]"), vec!["head 1-3 has no scores"]),
        (
            r#"{"0-0":[0],"0-1":[0],"0-2":[0],"0-3":[0],"1-0":[0],"1-1":[0],"1-2":[0],"1-3":[0]}"#,
            vec!["every score is 0"],
        ),
    ] {
        let message = refused(file);
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
    for bad in [r#"{"0": [1]}"#, r#"{"a-b": [1]}"#, r#"{"0-0": 1}"#, r#"{"-1-0": [1]}"#, "[]"] {
        assert!(serde_json::from_str::<HeadScores>(bad).is_err(), "{bad}");
    }
    let error = HeadScores::try_from(std::collections::BTreeMap::from([("x".to_owned(), vec![1.0])]));
    assert_eq!(error, Err(HeadScoresError::Name("x".to_owned())));
}

#[test]
fn shares_out_of_range_are_named() {
    for (policy, option) in [
        (Policy::PyramidKv(PyramidKv { steepness: 0.5, ..PyramidKv::default() }), "steepness"),
        (Policy::PyramidKv(PyramidKv { steepness: f64::NAN, ..PyramidKv::default() }), "steepness"),
        (Policy::AdaKv(AdaKv { floor: -0.1, ..AdaKv::default() }), "floor"),
        (Policy::AdaKv(AdaKv { floor: 1.1, ..AdaKv::default() }), "floor"),
        (Policy::HeadKv(HeadKv { pooled: 0.9, heads: scores_of(LLAMA_8B), ..HeadKv::default() }), "pooled"),
    ] {
        let error = policy.plan(LLAMA_8B, 100).expect_err("out of range");
        assert!(error.to_string().starts_with(option), "{error}");
        assert!(matches!(error, PolicyError::Share { .. }));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn plans_are_consistent((shape, policy) in any_case(), n in 0_usize..600) {
        let Some(plan) = planned(&policy, shape, n) else { return Ok(()) };

        let mut rows = n;
        if let Some(Restart { layer, count, .. }) = plan.restart {
            prop_assert!(layer < shape.layers && count >= 1 && count < n);
            rows = count;
        }
        for layer in &plan.layers {
            prop_assert_eq!(layer.rows, rows);
            prop_assert!(layer.kept() >= 1 && layer.kept() <= rows);
            let by_data = matches!(layer.keep, Keep::Shared { .. } | Keep::Heavy { .. } | Keep::Recovered { .. });
            if !by_data && !matches!(layer.keep, Keep::Each { .. }) {
                prop_assert_eq!(layer.keep == Keep::All, layer.kept() == rows);
            }
            // A cache holds the window it is scored by; that of what goes on is none of its business.
            if let Some(Saliency { window, .. }) = layer.saliency() {
                prop_assert!(layer.kept() >= window.min(rows));
            }
            if let Some(propagate) = layer.propagate {
                prop_assert!(propagate.count() < rows && propagate.count() >= propagate.reserved());
                rows = propagate.count();
            }
        }
        prop_assert!(plan.layers[shape.layers - 1].propagate.is_none());

        // Bounds of memory.
        let entry = 2 * shape.head_dim * 4;
        let expected: Vec<_> = plan.layers.iter().map(spoken).collect();
        let first_pass = if plan.restart.is_some() { n * shape.kv_heads * entry } else { 0 };
        let peak = oracle::plan::peak_kv_bytes(&expected, shape.kv_heads, entry);
        prop_assert_eq!(plan.peak_kv_bytes(4), peak.max(first_pass));
        let kept: usize = expected.iter().map(|layer| layer.entries(shape.kv_heads)).sum();
        prop_assert_eq!(plan.kept_kv_bytes(4), kept * entry);
        prop_assert_eq!(plan.kept_kv_bytes(4), 2 * plan.kept_kv_bytes(2));
        prop_assert!(plan.peak_kv_bytes(4) >= plan.kept_kv_bytes(4));
        let full = Policy::Full.plan(shape, n).expect("a plan");
        prop_assert!(plan.kept_kv_bytes(4) <= full.kept_kv_bytes(4));

        // Print, write, read.
        let text = plan.to_string();
        prop_assert_eq!(layers_in(&text), (0..shape.layers).collect::<BTreeSet<_>>(), "{}", text);
        prop_assert!(text.contains(policy.name()) && text.contains(&n.to_string()));
        let json = serde_json::to_string(&plan).expect("JSON");
        prop_assert_eq!(serde_json::from_str::<Plan>(&json).expect("a plan"), plan.clone());
        prop_assert_eq!(policy.plan(shape, n).expect("a plan"), plan);
    }

    #[test]
    fn more_budget_never_takes_less_memory(
        shape in any_shape(),
        n in 1_usize..600,
        (low, high) in (0.001_f64..1.0, 0.001_f64..1.0).prop_map(|(a, b)| (a.min(b), a.max(b))),
        rho in 0.001_f64..1.0,
    ) {
        let kept = |retention, propagation| {
            let policy = Policy::FastKv(fast(8, retention, propagation, None));
            let plan = planned(&policy, shape, n).expect("a plan");
            let token = shape.kv_elements() * 2;
            // The peak is no monotone bound: a layer that keeps all needs no copy. Between these it lies.
            let peak = plan.peak_kv_bytes(2);
            assert!(peak >= n * token && peak <= plan.kept_kv_bytes(2) + n * token);
            plan.kept_kv_bytes(2)
        };
        let tokens = |rate: f64| Budget::Tokens(9 + (rate * 500.0) as usize);
        prop_assert!(kept(Budget::Rate(low), Budget::Rate(rho)) <= kept(Budget::Rate(high), Budget::Rate(rho)));
        prop_assert!(kept(tokens(low), tokens(rho)) <= kept(tokens(high), tokens(rho)));
        prop_assert!(kept(tokens(rho), tokens(low)) <= kept(tokens(rho), tokens(high)));
    }

    #[test]
    fn a_longer_prompt_never_takes_less_memory(shape in any_shape(), n in 1_usize..600, policy in any_policy()) {
        let (Some(short), Some(long)) = (planned(&policy, shape, n), planned(&policy, shape, n + 1)) else {
            return Ok(());
        };
        prop_assert!(short.kept_kv_bytes(2) <= long.kept_kv_bytes(2));
    }
}

/// Sets that the random policy keeps, by layer and kv head, with the window.
fn random_sets(engine: &Engine<CpuBackend>, n: usize, count: usize, seed: u64) -> Vec<Vec<Vec<u32>>> {
    let policy = Policy::Random(Random { window: 4, retention: Budget::Tokens(count), seed });
    let plan = policy.plan(engine.shape(), n).expect("a plan");
    let ids = vec![1; n];
    let options = PrefillOptions { trace: true, ..PrefillOptions::default() };
    let prefill = engine.prefill(&ids, &plan, &options, &Control::default()).expect("a prefill");
    let kept: Vec<_> = prefill.trace.expect("a trace").layers.into_iter().map(|layer| layer.kept).collect();
    assert_eq!(prefill.cache.positions(engine.backend()).expect("positions"), kept);
    kept
}

#[test]
fn random_sets_are_uniform_seeded_and_unlike_each_other() {
    let tiny = Tiny { layers: 3, hidden: 4, intermediate: 4, head_dim: 2, ..Tiny::default() };
    let directory = tiny.write();
    let model = ModelDir::open(directory.path()).expect("a model");
    let engine = Engine::load(CpuBackend::new(Some(1)).expect("a backend"), &model).expect("an engine");

    let (n, count, seeds) = (44, 14, 200);
    let mut hits = vec![0_u32; n - 4];
    let mut sets = BTreeSet::new();
    let mut shared = 0;
    for seed in 0..seeds {
        let kept = random_sets(&engine, n, count, seed);
        for layer in &kept {
            for set in layer {
                assert_eq!(set.len(), count);
                assert!(set.windows(2).all(|pair| pair[0] < pair[1]), "{set:?}");
                assert_eq!(set[count - 4..], [40, 41, 42, 43], "the window");
                for position in &set[..count - 4] {
                    hits[*position as usize] += 1;
                }
                sets.insert(set.clone());
            }
            shared += layer[0].iter().filter(|position| layer[1].contains(position)).count() - 4;
        }
        if seed < 20 {
            assert_eq!(random_sets(&engine, n, count, seed), kept, "the same seed");
        }
    }
    // 1200 sets of 10 of 40: each position is in a quarter of them, ± 15 by chance; no two alike.
    let draws = 200 * 3 * 2;
    assert_eq!(sets.len(), draws);
    for (position, hits) in hits.iter().enumerate() {
        let deviation = (f64::from(*hits) - draws as f64 / 4.0) / (draws as f64 * 3.0 / 16.0).sqrt();
        assert!(deviation.abs() < 4.5, "position {position}: {deviation} deviations");
    }
    // Two heads of a layer share 10 · 10/40 positions by chance: 2.5 ± 1.2 for one pair, 600 pairs.
    let mean = shared as f64 / 600.0;
    assert!((mean - 2.5).abs() < 0.3, "{mean} positions shared on average");
}

/// Caches keep as many tokens more as are highlighted, what goes on only what it must.
#[test]
fn steered_budgets_grow_by_what_is_highlighted() {
    let shape = ModelShape { layers: 4, query_heads: 4, kv_heads: 2, head_dim: 8 };
    // 10 tokens, of two spans that overlap.
    let steering = Steering { spans: vec![20..28, 24..30], heads: vec![(0, 1)], alpha: 0.1 };
    let steered = |policy: Policy| {
        policy.plan(shape, 100).expect("a plan").steer(steering.clone()).expect("spans and heads")
    };
    let saliency = Saliency { window: 8, pooling: Pooling { kind: PoolingKind::Max, kernel: 7 } };
    let top = |retention| Policy::SnapKv(SnapKv { saliency, retention: Budget::Tokens(retention) });
    let keeps =
        |policy: Policy| steered(policy).layers.into_iter().map(|layer| layer.keep).collect::<Vec<_>>();
    assert_eq!(keeps(top(20)), vec![Keep::Top { count: 30, saliency }; 4]);
    assert_eq!(keeps(top(95)), vec![Keep::Top { count: 100, saliency }; 4], "no more than there are");
    assert_eq!(keeps(top(100)), vec![Keep::All; 4]);
    let retention = Budget::Tokens(20);
    let shared = Policy::AdaKv(AdaKv { saliency, retention, floor: 0.2 });
    assert_eq!(keeps(shared), vec![Keep::Shared { count: 30, floor: 0.2, saliency }; 4]);
    let heavy = Policy::H2o(H2o { window: 8, retention });
    assert_eq!(keeps(heavy), vec![Keep::Heavy { count: 30, window: 8 }; 4]);
    let endless = Policy::H2o(H2o { window: 8, retention: Budget::Tokens(usize::MAX) });
    assert_eq!(keeps(endless), vec![Keep::Heavy { count: usize::MAX, window: 8 }; 4]);
    let ends = steered(Policy::StreamingLlm(StreamingLlm { retention, ..StreamingLlm::default() }));
    assert_eq!(ends.layers[0].keep, Keep::Ends { sinks: 4, recent: 16 });
    // Entries of 2 heads in 4 layers, K and V of 8 elements of 2 bytes.
    assert_eq!(ends.kept_kv_bytes(2), 30 * 2 * 4 * 2 * 8 * 2, "the highlighted beside them");
    assert_eq!(steered(top(20)).kept_kv_bytes(2), ends.kept_kv_bytes(2));

    let behind = |propagation| {
        let policy = FastKv { tsp_layer: Some(1), ..fast(8, retention, Budget::Tokens(propagation), None) };
        let plan = steered(Policy::FastKv(policy));
        let going_on = plan.layers[1].propagate.as_ref().map(Propagate::count);
        (going_on, plan.layers[2].rows, plan.layers[2].keep.clone())
    };
    assert_eq!(behind(50), (Some(50), 50, Keep::Top { count: 30, saliency }));
    assert_eq!(behind(25), (Some(25), 25, Keep::Top { count: 25, saliency }));
    assert_eq!(behind(12), (Some(18), 18, Keep::All), "the window and the highlighted");
    // The newest 11 of 100 and the first 4 are as sure as the 70 that are highlighted.
    let pyramid = Policy::PyramidInfer(PyramidInfer { recent: 0.1, ..PyramidInfer::default() });
    let many = Steering { spans: vec![10..40, 40..80], ..steering.clone() };
    let plan = pyramid.plan(shape, 100).expect("a plan").steer(many).expect("a span");
    let going_on: Vec<_> =
        plan.layers.iter().filter_map(|layer| layer.propagate.as_ref().map(Propagate::count)).collect();
    assert_eq!(going_on.last(), Some(&85), "{going_on:?}");
    let gemfilter = steered(Policy::GemFilter(GemFilter {
        filter_layer: Some(1),
        retention: Budget::Tokens(5),
        ..GemFilter::default()
    }));
    assert_eq!(gemfilter.restart.map(|restart| restart.count), Some(10));
}

/// Sizes that no machine has are told as the largest number there is.
#[test]
fn absurd_sizes_do_not_wrap() {
    let policies = [
        Policy::Full,
        Policy::PyramidInfer(PyramidInfer { recent: 1.0, decay: 0.7 }),
        Policy::SnapKv(SnapKv::default()),
        Policy::AdaKv(AdaKv::default()),
        Policy::GemFilter(GemFilter::default()),
        Policy::FastKv(FastKv::default()),
    ];
    for policy in policies {
        let plan = policy.plan(LLAMA_8B, usize::MAX).expect("a plan");
        assert_eq!(plan.peak_kv_bytes(4), usize::MAX, "{}", policy.name());
        let mut plan = policy.plan(LLAMA_8B, 1000).expect("a plan");
        plan.shape.kv_heads = usize::MAX;
        assert_eq!(plan.kept_kv_bytes(4), usize::MAX, "{}", policy.name());
        for layer in &mut plan.layers {
            let saliency = SnapKv::default().saliency;
            layer.keep = Keep::Each { counts: vec![usize::MAX; 2], saliency };
        }
        assert_eq!(plan.kept_kv_bytes(4), usize::MAX, "{}", policy.name());
    }
}
