//! A TSP layer that is picked during prefill: plans, the choice, and that all else is as with a fixed one.

#![cfg(feature = "pipeline")]

mod oracle;
mod tiny;

#[path = "tiny/probe.rs"]
mod probe;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ops::Range;

use fastkv::backend::Backend;
use fastkv::backend::cpu::CpuBackend;
use fastkv::engine::{
    Control, Engine, EngineError, Overlap, Prefill, PrefillOptions, Progress, Prompt, Settled,
};
use fastkv::model::ModelDir;
use fastkv::policy::{
    AdaKv, Budget, FastKv, H2o, LayerPlan, ModelShape, Plan, Policy, PolicyError, Pooling, PoolingKind,
    PyramidKv, Saliency, Settling, Steering, Tsp,
};
use oracle::llama::{Model, Observation, Orders};
use oracle::plan as rules;
use oracle::{Pool, relative_distance};
use probe::Probe;
use serde_json::{Value, json};
use tempfile::TempDir;
use tiny::{Rng, Tiny};

/// See tests/engine.rs.
const CLOSE: f64 = 1e-5;
const NEAR_TIE: f64 = 1e-5;

const TRACED: PrefillOptions = PrefillOptions { exact_shortcuts: true, trace: true, slack: 0 };

// ---------------------------------------------------------------------------------------------
// Plans

/// Policies that propagate, at a TSP layer or a range of candidates.
fn policies(tsp_layer: Option<usize>, settling: Option<Settling>) -> Vec<Policy> {
    let (rate, tokens) = (Budget::Rate, Budget::Tokens);
    let saliency = Saliency { window: 4, pooling: Pooling { kind: PoolingKind::Max, kernel: 3 } };
    let fast = |retention, propagation| {
        Policy::FastKv(FastKv { saliency, retention, propagation, tsp_layer, settling })
    };
    let composed = |cache| {
        let propagation = rate(0.4);
        Policy::Tsp(Tsp { saliency, propagation, tsp_layer, settling, ..Tsp::with(cache) })
    };
    vec![
        fast(rate(0.1), rate(0.3)),
        fast(rate(0.7), rate(0.5)),
        fast(tokens(20), tokens(40)),
        fast(tokens(100), tokens(95)),
        fast(rate(0.2), rate(1.0)),
        composed(Policy::PyramidKv(PyramidKv { saliency, retention: rate(0.25), steepness: 20.0 })),
        composed(Policy::AdaKv(AdaKv { saliency, retention: rate(0.2), floor: 0.2 })),
        composed(Policy::H2o(H2o { window: 4, retention: tokens(30) })),
    ]
}

fn shape(layers: usize) -> ModelShape {
    ModelShape { layers, query_heads: 4, kv_heads: 2, head_dim: 8 }
}

fn settling(first: usize, overlap: f64) -> Option<Settling> {
    Some(Settling { first: Some(first), overlap })
}

#[test]
fn plans_are_those_of_the_layer_that_is_picked() {
    for (layers, n) in [(1, 100), (2, 100), (5, 100), (7, 30), (8, 250)] {
        let shape = shape(layers);
        for (first, last) in (0..layers).flat_map(|last| (0..=last).map(move |first| (first, last))) {
            let adaptive = policies(Some(last), settling(first, 0.5));
            for (index, policy) in adaptive.iter().enumerate() {
                let plan = policy.plan(shape, n).expect("a plan");
                let fixed = |layer| policies(Some(layer), None)[index].plan(shape, n).expect("a plan");
                assert_eq!(plan.layers, fixed(last).layers, "the last candidate is the worst case");
                for picked in first..=last {
                    let fixed = fixed(picked);
                    let rules: Vec<LayerPlan> =
                        (0..layers).map(|layer| plan.rules(layer, Some(picked)).into_owned()).collect();
                    assert_eq!(rules, fixed.layers, "{policy:?} at {picked} of {first}-{last}");
                    assert!(plan.kept_kv_bytes(2) >= fixed.kept_kv_bytes(2), "{policy:?}");
                    assert!(plan.peak_kv_bytes(2) >= fixed.peak_kv_bytes(2), "{policy:?}");
                }
                // Before that, candidates choose and all tokens go on.
                for layer in 0..=last {
                    let rules = plan.rules(layer, None);
                    assert_eq!((rules.rows, &rules.keep), (n, &plan.layers[layer].keep));
                    let chooses = plan.candidates.is_some() && (first..last).contains(&layer);
                    let handed_on = plan.layers[last].propagate;
                    assert_eq!(rules.propagate.is_some(), chooses || layer == last && handed_on.is_some());
                }
                let json = serde_json::to_string(&plan).expect("JSON");
                assert_eq!(serde_json::from_str::<Plan>(&json).expect("a plan"), plan);
                let speaks = plan.to_string().contains(&format!("one of {first}-{last}"));
                assert_eq!(speaks, plan.candidates.is_some(), "{plan}");
            }
        }
    }
}

#[test]
fn candidates_lie_from_a_quarter_to_13_16_of_the_depth() {
    for (layers, first, last) in [(32, 8, 25), (36, 9, 28), (40, 10, 31), (6, 1, 3), (4, 1, 2), (2, 0, 0)] {
        for policy in policies(None, Some(Settling::default())) {
            let plan = policy.plan(shape(layers), 100).expect("a plan");
            let Some(candidates) = plan.candidates else { continue };
            assert_eq!((candidates.first, candidates.last), (first, last), "{layers} layers");
            assert_eq!(candidates.overlap, 0.8);
        }
    }
    // A last candidate of its own pulls the first one along.
    let early = &policies(Some(2), Some(Settling::default()))[0];
    let candidates = early.plan(shape(32), 100).expect("a plan").candidates.expect("candidates");
    assert_eq!((candidates.first, candidates.last), (2, 2));
    // One layer has nothing to hand tokens on to.
    assert_eq!(
        policies(None, Some(Settling::default()))[0].plan(shape(1), 100).expect("a plan").candidates,
        None
    );
}

#[test]
fn bad_candidates_are_named() {
    let refused = |last, settling| policies(last, settling)[0].plan(shape(8), 100).expect_err("bad options");
    assert_eq!(refused(Some(3), settling(4, 0.5)), PolicyError::Candidates { first: 4, last: 3 });
    assert_eq!(
        refused(None, settling(usize::MAX, 0.5)),
        PolicyError::Candidates { first: usize::MAX, last: 5 }
    );
    assert_eq!(refused(Some(8), settling(1, 0.5)), PolicyError::TspLayer { layer: 8, last: 7 });
    for overlap in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
        let error = refused(None, settling(1, overlap)).to_string();
        assert!(error.starts_with(&format!("the overlap is {overlap}: ")), "{error}");
    }
}

// ---------------------------------------------------------------------------------------------
// Prefill

struct Rig<B: Backend> {
    directory: TempDir,
    engine: Engine<B>,
}

fn rig<B: Backend>(tiny: &Tiny, backend: B) -> Rig<B> {
    let directory = tiny.write();
    let model = ModelDir::open(directory.path()).expect("a model");
    let engine = Engine::load(backend, &model).expect("an engine");
    Rig { directory, engine }
}

fn cpu() -> CpuBackend {
    CpuBackend::new(Some(2)).expect("threads")
}

impl<B: Backend> Rig<B> {
    fn plan(&self, policy: &Policy, n: usize) -> Plan {
        policy.plan(self.engine.shape(), n).expect("a plan")
    }

    fn prefill(&self, ids: &[u32], plan: &Plan, options: &PrefillOptions) -> Prefill<B> {
        let prefill = self.engine.prefill(ids, plan, options, &Control::default()).expect("a prefill");
        assert!(prefill.peak_kv_bytes <= plan.peak_kv_bytes(4));
        assert!(prefill.cache.bytes(self.engine.backend()) <= plan.kept_kv_bytes(4));
        prefill
    }
}

fn settled<B: Backend>(prefill: &Prefill<B>) -> Settled {
    prefill.trace.as_ref().and_then(|trace| trace.settled.clone()).expect("candidates")
}

/// Both left the same: what was kept, what went on, logits, also behind more tokens.
fn same<B: Backend>(rig: &Rig<B>, what: &str, mut a: Prefill<B>, mut b: Prefill<B>) {
    let backend = rig.engine.backend();
    let layers = |prefill: &Prefill<B>| prefill.trace.as_ref().expect("a trace").layers.clone();
    for (layer, (a, b)) in layers(&a).into_iter().zip(layers(&b)).enumerate() {
        assert_eq!(
            (a.rows, &a.kept, &a.propagated),
            (b.rows, &b.kept, &b.propagated),
            "{what}, layer {layer}"
        );
    }
    assert_eq!(
        a.cache.positions(backend).expect("positions"),
        b.cache.positions(backend).expect("positions")
    );
    let distance = relative_distance(&a.logits, &oracle::wide(&b.logits));
    assert!(distance < CLOSE, "{what}: {distance:e}");
    let more = |prefill: &mut Prefill<B>| {
        rig.engine.append(&mut prefill.cache, &[1, 2, 3], &Control::default()).expect("logits")
    };
    let distance = relative_distance(&more(&mut a), &oracle::wide(&more(&mut b)));
    assert!(distance < CLOSE, "{what}, decoded: {distance:e}");
}

#[test]
fn tokens_go_on_where_hand_made_sets_settle() {
    let tiny = Tiny { layers: 6, ..Tiny::default() };
    let rig = rig(&tiny, Probe::new(64));
    let ids = Rng::new(3).ids(40, tiny.vocabulary);
    // Caches are kept whole, so that a layer selects for propagation alone: the window of 4, and 8 of 36.
    let policy = |tsp_layer, settling| {
        let saliency = Saliency { window: 4, pooling: Pooling { kind: PoolingKind::Max, kernel: 3 } };
        let (retention, propagation) = (Budget::Rate(1.0), Budget::Tokens(12));
        Policy::FastKv(FastKv { saliency, retention, propagation, tsp_layer: Some(tsp_layer), settling })
    };
    // How many of the 8 are those of the layer before: 4, 6, 8 in layers 2, 3, 4.
    let sets = [
        vec![0, 1, 2, 3, 4, 5, 6, 7],
        vec![0, 1, 2, 3, 14, 15, 16, 17],
        vec![0, 1, 2, 3, 14, 15, 26, 27],
        vec![0, 1, 2, 3, 14, 15, 26, 27],
    ];
    let forced = sets.map(|set: Vec<u32>| vec![set.into_iter().chain(36..40).collect::<Vec<u32>>()]);
    for (overlap, picked) in [(0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4), (1.0, 4)] {
        for exact_shortcuts in [true, false] {
            let options = PrefillOptions { exact_shortcuts, ..TRACED };
            let plan = rig.plan(&policy(4, settling(1, overlap)), 40);
            rig.engine.backend().force(forced.to_vec());
            let adaptive = rig.prefill(&ids, &plan, &options);
            assert_eq!(rig.engine.backend().forced(), 4 - picked, "no layer behind it chooses");
            let found = settled(&adaptive);
            assert_eq!(found.layer, Some(picked));
            let shares = [(2, 0.5), (3, 0.75), (4, 1.0)].map(|(layer, share)| Overlap { layer, share });
            assert_eq!(found.overlaps, shares[..picked - 1]);

            rig.engine.backend().force(vec![forced[picked - 1].clone()]);
            let fixed = rig.prefill(&ids, &rig.plan(&policy(picked, None), 40), &options);
            assert_eq!(adaptive.peak_kv_bytes, fixed.peak_kv_bytes);
            same(&rig, &format!("overlap {overlap}"), adaptive, fixed);
        }
    }
    // Sets that never agree: the last candidate, or none where that is the model's last layer.
    for (last, picked) in [(3, Some(3)), (5, None)] {
        let plan = rig.plan(&policy(last, settling(1, 1.0)), 40);
        let mut forced = forced.to_vec();
        forced[3] = forced[0].clone();
        rig.engine.backend().force(forced);
        let adaptive = rig.prefill(&ids, &plan, &TRACED);
        rig.engine.backend().force(Vec::new());
        assert_eq!(settled(&adaptive).layer, picked);
        assert_eq!(settled(&adaptive).overlaps.len(), last.min(4) - 1);
    }
}

/// Rows that every candidate has to choose say nothing of whether sets settle.
#[test]
fn highlighted_rows_are_no_agreement() {
    let tiny = Tiny { layers: 6, ..Tiny::default() };
    let rig = rig(&tiny, Probe::new(64));
    let ids = Rng::new(3).ids(40, tiny.vocabulary);
    let saliency = Saliency { window: 4, pooling: Pooling { kind: PoolingKind::Max, kernel: 3 } };
    let (retention, propagation) = (Budget::Rate(1.0), Budget::Tokens(12));
    let options = FastKv { saliency, retention, propagation, tsp_layer: Some(4), settling: settling(1, 0.5) };
    // Six of the 8 rows beside the window of 4, and two rows within the window.
    let spans = vec![Range { start: 20, end: 26 }, Range { start: 37, end: 39 }];
    let steering = Steering { spans, heads: vec![(1, 0)], alpha: 0.01 };
    let plan = rig.plan(&Policy::FastKv(options), 40).steer(steering).expect("spans and heads");
    // Of the other two: none, one, two are those of the layer before.
    let sets = [[0, 1], [2, 3], [3, 4], [3, 4]];
    let forced = sets.map(|set| vec![set.into_iter().chain(20..26).chain(36..40).collect::<Vec<u32>>()]);
    rig.engine.backend().force(forced.to_vec());
    let found = settled(&rig.prefill(&ids, &plan, &TRACED));
    rig.engine.backend().force(Vec::new());
    assert_eq!(found.layer, Some(3));
    assert_eq!(found.overlaps, [(2, 0.0), (3, 0.5)].map(|(layer, share)| Overlap { layer, share }));
}

/// The oracle's sets of a layer with this TSP layer, and how near that was.
fn oracles_set(
    model: &Model,
    layers: usize,
    ids: &[u32],
    policy: &FastKv,
    tsp_layer: usize,
) -> (Vec<usize>, f64) {
    let observation = Observation { window: 4, kind: Pool::Max, kernel: 3 };
    let (Budget::Rate(r), Budget::Rate(rho)) = (policy.retention, policy.propagation) else {
        panic!("rates")
    };
    let (r, rho) = (rules::Budget::Rate(r), rules::Budget::Rate(rho));
    let plan = rules::fastkv(layers, ids.len(), (4, 3), r, rho, Some(tsp_layer)).expect("a plan");
    let observation = Some(observation);
    let orders = Orders { rules: plan, keeps_by: observation, hands_on_by: observation, ..Orders::default() };
    let run = model.run(ids, &orders);
    (run.layers[tsp_layer].hands_on.clone().expect("a TSP layer"), run.margin())
}

#[test]
fn the_layer_is_the_one_where_the_oracles_sets_settle() {
    let (mut seen, mut picks) = (0, [0; 6]);
    for seed in 0..6 {
        let tiny = Tiny { layers: 6, seed, ..Tiny::default() };
        let rig = rig(&tiny, cpu());
        let model = Model::open(rig.directory.path());
        let ids = Rng::new(seed).ids(80, tiny.vocabulary);
        for (first, last) in [(0, 4), (1, 3), (2, 2)] {
            for overlap in [0.0, 0.3, 0.4, 0.5, 0.6, 1.0] {
                let saliency = Saliency { window: 4, pooling: Pooling { kind: PoolingKind::Max, kernel: 3 } };
                let options = FastKv {
                    saliency,
                    retention: Budget::Rate(0.2),
                    propagation: Budget::Rate(0.5),
                    tsp_layer: Some(last),
                    settling: settling(first, overlap),
                };
                let sets: Vec<_> =
                    (first..=last).map(|layer| oracles_set(&model, 6, &ids, &options, layer)).collect();
                if sets.iter().any(|(_, margin)| *margin < NEAR_TIE) {
                    continue;
                }
                // 40 tokens of which 4 are the window.
                let shares = sets.windows(2).map(|pair| {
                    let common = pair[1].0.iter().filter(|token| pair[0].0.contains(token)).count();
                    (common - 4) as f64 / 36.0
                });
                let shares: Vec<f64> = shares.collect();
                let enough = shares.iter().position(|share| *share >= overlap);
                let picked = enough.map_or(last, |index| first + 1 + index);

                let plan = rig.plan(&Policy::FastKv(options), 80);
                let fixed = FastKv { tsp_layer: Some(picked), settling: None, ..options };
                let fixed = rig.plan(&Policy::FastKv(fixed), 80);
                for exact_shortcuts in [true, false] {
                    let options = PrefillOptions { exact_shortcuts, ..TRACED };
                    let adaptive = rig.prefill(&ids, &plan, &options);
                    let found = settled(&adaptive);
                    assert_eq!(found.layer, Some(picked), "{shares:?}, overlap {overlap}");
                    let expected: Vec<Overlap> = (first + 1..=picked)
                        .zip(&shares)
                        .map(|(layer, share)| Overlap { layer, share: *share })
                        .collect();
                    assert_eq!(found.overlaps, expected);
                    let what = format!("seed {seed}, layer {picked}");
                    same(&rig, &what, adaptive, rig.prefill(&ids, &fixed, &options));
                }
                seen += 1;
                picks[picked] += 1;
            }
        }
    }
    assert!(seen >= 90, "{seen} of 108");
    assert!(picks.iter().filter(|picks| **picks > 3).count() >= 3, "{picks:?}");
}

#[test]
fn other_caches_and_steering_go_with_it() {
    let tiny = Tiny { layers: 6, ..Tiny::default() };
    let rig = rig(&tiny, cpu());
    let ids = Rng::new(5).ids(100, tiny.vocabulary);
    let steering =
        Steering { spans: vec![Range { start: 20, end: 70 }], heads: vec![(1, 0), (3, 2)], alpha: 0.01 };
    let mut picks = BTreeSet::new();
    for steered in [false, true] {
        let plan = |policy: &Policy| {
            let plan = rig.plan(policy, 100);
            if steered { plan.steer(steering.clone()).expect("spans and heads") } else { plan }
        };
        for overlap in [0.2, 0.5, 1.0] {
            for (index, policy) in policies(Some(4), settling(1, overlap)).iter().enumerate() {
                let plan_of_candidates = plan(policy);
                if plan_of_candidates.candidates.is_none() {
                    continue;
                }
                let adaptive = rig.prefill(&ids, &plan_of_candidates, &TRACED);
                let picked = settled(&adaptive).layer.expect("no later than the last candidate");
                picks.insert(picked);
                let fixed = plan(&policies(Some(picked), None)[index]);
                same(&rig, policy.name(), adaptive, rig.prefill(&ids, &fixed, &TRACED));
            }
        }
    }
    assert!(picks.len() >= 2, "{picks:?}");
}

#[test]
fn prompts_that_are_read_together_settle_each_for_itself() {
    let tiny = Tiny { layers: 6, ..Tiny::default() };
    let rig = rig(&tiny, cpu());
    let policies: Vec<Policy> = [0.0, 0.4, 1.0]
        .iter()
        .map(|overlap| policies(Some(4), settling(1, *overlap)).swap_remove(0))
        .collect();
    let prompts: Vec<(Vec<u32>, Plan)> = [70, 90, 50, 90]
        .iter()
        .zip(policies.iter().chain([&Policy::Full]))
        .map(|(n, policy)| (Rng::new(*n as u64).ids(*n, tiny.vocabulary), rig.plan(policy, *n)))
        .collect();
    let batch: Vec<Prompt<'_>> = prompts.iter().map(|(ids, plan)| Prompt { ids, plan }).collect();
    let together = rig.engine.prefill_batch(&batch, &TRACED, &Control::default()).expect("prefills");
    for (together, (ids, plan)) in together.into_iter().zip(&prompts) {
        let alone = rig.prefill(ids, plan, &TRACED);
        let found = |prefill: &Prefill<_>| prefill.trace.as_ref().expect("a trace").settled.clone();
        assert_eq!(found(&together), found(&alone));
        same(&rig, plan.policy.name(), together, alone);
    }
}

#[test]
fn progress_ends_at_its_total_wherever_sets_settle() {
    let tiny = Tiny { layers: 6, ..Tiny::default() };
    let rig = rig(&tiny, Probe::new(16));
    let ids = Rng::new(2).ids(60, tiny.vocabulary);
    for overlap in [0.0, 0.5, 1.0] {
        let policy = policies(Some(4), settling(0, overlap)).swap_remove(0);
        for exact_shortcuts in [true, false] {
            let reports = RefCell::new(Vec::new());
            let progress = |progress: Progress| reports.borrow_mut().push(progress);
            let control = Control { cancel: None, progress: Some(&progress) };
            let options = PrefillOptions { exact_shortcuts, ..TRACED };
            let plan = rig.plan(&policy, 60);
            let prefill = rig.engine.prefill(&ids, &plan, &options, &control).expect("a prefill");
            let rows: usize = prefill.trace.expect("a trace").layers.iter().map(|layer| layer.rows).sum();
            let reports = reports.into_inner();
            assert!(reports.iter().all(|report| report.done <= report.total), "{reports:?}");
            assert!(reports.windows(2).all(|pair| pair[0].done <= pair[1].done), "{reports:?}");
            let last = reports.last().expect("a report");
            assert_eq!((last.done, last.total), (rows, rows));
        }
    }
}

#[test]
fn broken_candidates_are_errors() {
    let tiny = Tiny { layers: 6, ..Tiny::default() };
    let rig = rig(&tiny, cpu());
    let ids = Rng::new(2).ids(100, tiny.vocabulary);
    let policy = policies(Some(4), settling(1, 0.5)).swap_remove(0);
    let plan = serde_json::to_value(rig.plan(&policy, 100)).expect("JSON");
    let edited = |pointer: &str, value: Value| {
        let mut plan = plan.clone();
        *plan.pointer_mut(pointer).expect("a field") = value;
        let plan: Plan = serde_json::from_value(plan).expect("a plan still");
        rig.engine.prefill(&ids, &plan, &TRACED, &Control::default())
    };
    assert!(edited("/candidates/overlap", json!(0.7)).is_ok());
    let propagate = plan.pointer("/candidates/propagate").expect("a rule").clone();
    let late = plan.pointer("/candidates/late/0").expect("a layer").clone();
    for (pointer, value) in [
        ("/candidates/first", json!(0)),
        ("/candidates/first", json!(2)),
        ("/candidates/first", json!(5)),
        ("/candidates/first", json!(usize::MAX)),
        ("/candidates/last", json!(3)),
        ("/candidates/last", json!(5)),
        ("/candidates/last", json!(usize::MAX)),
        ("/candidates/overlap", json!(1.5)),
        ("/candidates/late", json!([])),
        ("/candidates/late", json!([late, late])),
        ("/candidates/late/1/rows", json!(31)),
        ("/candidates/late/2/keep/count", json!(31)),
        ("/candidates/propagate/count", json!(29)),
        ("/candidates/propagate/count", json!(101)),
        ("/candidates/propagate/saliency/window", json!(0)),
        ("/candidates/propagate/saliency/pooling/kernel", json!(4)),
        ("/layers/2/propagate", propagate),
    ] {
        let Err(error) = edited(pointer, value.clone()) else { panic!("{pointer} {value}: ran") };
        assert!(matches!(error, EngineError::BrokenPlan { .. }), "{pointer} {value}: {error}");
        assert!(error.to_string().contains("layer"), "{error}");
    }
}
