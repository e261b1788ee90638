//! Selection on random numbers, held to the oracle.

use fastkv::backend::cpu::CpuBackend;
use fastkv::eval::{Numbers, Scene};
use fastkv::policy::{Pooling, PoolingKind};

use crate::oracle::{self, Matrix, Pool};

const SCENE: Scene = Scene { tokens: 300, window: 6, kv_heads: 2, group: 3, head_dim: 16 };
const BUDGETS: [usize; 5] = [8, 20, 60, 150, 300];
const POOLING: Pooling = Pooling { kind: PoolingKind::Max, kernel: 5 };
const UNPOOLED: Pooling = Pooling { kind: PoolingKind::Max, kernel: 1 };

/// Rows of a head.
fn head(numbers: &[f32], heads: usize, head: usize) -> Matrix {
    let width = SCENE.head_dim;
    let rows = numbers.chunks_exact(heads * width);
    rows.map(|row| row[head * width..(head + 1) * width].iter().map(|value| f64::from(*value)).collect())
        .collect()
}

/// What the oracle keeps for a kv head.
fn kept(numbers: &Numbers, kv_head: usize, pool: Pool, kernel: usize, budget: usize) -> Vec<usize> {
    let Scene { tokens, window, kv_heads, group, .. } = SCENE;
    let keys = head(&numbers.keys, kv_heads, kv_head);
    let mut scores = vec![0.0; tokens - window];
    for query_head in kv_head * group..(kv_head + 1) * group {
        let mut sums = vec![0.0; tokens];
        for (index, query) in head(&numbers.queries, kv_heads * group, query_head).iter().enumerate() {
            let probabilities = oracle::probabilities(query, &keys, tokens - window + index + 1);
            probabilities.iter().zip(&mut sums).for_each(|(probability, sum)| *sum += probability);
        }
        let pooled = oracle::pool(&sums[..tokens - window], pool, kernel);
        pooled.iter().zip(&mut scores).for_each(|(pooled, score)| *score += pooled);
    }
    let mut kept = oracle::top(&scores, budget.min(tokens) - window);
    kept.extend(tokens - window..tokens);
    kept
}

#[test]
fn recall_is_the_oracles() {
    let backend = CpuBackend::new(Some(1)).expect("a thread");
    for seed in 0..4 {
        let numbers = SCENE.planted(10, 2.0, seed);
        assert_eq!(numbers.planted.len(), 10);
        assert!(numbers.planted.windows(2).all(|pair| pair[0] < pair[1]) && numbers.planted[9] < 294);
        for (pooling, pool) in [
            (UNPOOLED, Pool::Max),
            (POOLING, Pool::Max),
            (Pooling { kind: PoolingKind::Average, kernel: 5 }, Pool::Average),
        ] {
            let recall = SCENE.recall(&backend, &numbers, pooling, &BUDGETS).expect("a measure");
            for (budget, recall) in BUDGETS.iter().zip(recall) {
                for (kv_head, recall) in recall.into_iter().enumerate() {
                    let kept = kept(&numbers, kv_head, pool, pooling.kernel, *budget);
                    let found = numbers.planted.iter().filter(|key| kept.contains(&(**key as usize))).count();
                    assert!(
                        (recall - found as f64 / 10.0).abs() < 1e-12,
                        "{pooling} {budget}: {recall}, {found}"
                    );
                }
            }
        }
    }
}

#[test]
fn planted_keys_are_found_once_they_stand_out() {
    let backend = CpuBackend::new(Some(1)).expect("a thread");
    let recall = |raise: f32, budget: usize| {
        let numbers = SCENE.planted(10, raise, 1);
        SCENE.recall(&backend, &numbers, UNPOOLED, &[budget]).expect("a measure")[0].clone()
    };
    assert_eq!(recall(20.0, 16), [1.0, 1.0], "as many as there is room for");
    assert_eq!(recall(20.0, 11), [0.5, 0.5]);
    let chance: f64 = recall(0.0, 60).iter().sum::<f64>() / 2.0;
    assert!(chance < 0.6, "{chance}");
}

#[test]
fn output_errors_are_the_oracles_and_within_their_bounds() {
    let backend = CpuBackend::new(Some(1)).expect("a thread");
    let Scene { tokens, kv_heads, group, .. } = SCENE;
    for seed in 0..4 {
        let numbers = SCENE.heavy_tailed(seed);
        let errors = SCENE.output_errors(&backend, &numbers, UNPOOLED, &BUDGETS).expect("a measure");
        for (budget, errors) in BUDGETS.iter().zip(&errors) {
            for (query_head, error) in errors.iter().enumerate() {
                let kv_head = query_head / group;
                let kept = kept(&numbers, kv_head, Pool::Max, 1, *budget);
                let pick = |rows: Matrix| kept.iter().map(|row| rows[*row].clone()).collect::<Matrix>();
                let (keys, values) =
                    (head(&numbers.keys, kv_heads, kv_head), head(&numbers.values, kv_heads, kv_head));
                let query = head(&numbers.queries, kv_heads * group, query_head).pop().expect("a query");
                let mass: f64 = {
                    let probabilities = oracle::probabilities(&query, &keys, tokens);
                    kept.iter().map(|key| probabilities[*key]).sum()
                };
                let longest = values.iter().map(|value| oracle::dot(value, value).sqrt()).fold(0.0, f64::max);
                let full = oracle::attend(&query, &keys, &values, tokens);
                let compressed = oracle::attend(&query, &pick(keys), &pick(values), kept.len());
                let difference: Vec<f64> = full.iter().zip(&compressed).map(|(a, b)| a - b).collect();
                let distance = oracle::dot(&difference, &difference).sqrt();
                let close = |found: f64, expected: f64| (found - expected).abs() < 1e-4;
                assert!(
                    close(error.mass, mass) && close(error.error, distance),
                    "{error:?}, {mass}, {distance}"
                );
                assert!(
                    close(error.longest_value, longest) && close(error.bound, 2.0 * (1.0 - mass) * longest)
                );
                assert!(close(error.norm, oracle::dot(&full, &full).sqrt()));
                assert!(error.is_bounded() && distance <= 2.0 * (1.0 - mass) * longest + 1e-9);
            }
        }
        // The mass never falls as budgets rise, and everything is no error.
        for pair in errors.windows(2) {
            assert!(pair[0].iter().zip(&pair[1]).all(|(less, more)| more.mass >= less.mass - 1e-6));
        }
        assert!(errors[4].iter().all(|error| error.error < 1e-5 && (error.mass - 1.0).abs() < 1e-5));
        assert!(errors[0].iter().any(|error| error.mass < 0.9), "something is lost at all");
    }
}
