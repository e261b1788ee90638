//! Cases of the operations that policies beyond windows of queries need; a backend may lack these.

use std::fmt::Debug;

use fastkv::backend::{Backend, BackendError, Bias, Columns, Select, Share, Visible};
use fastkv::policy::{Pooling, PoolingKind};
use proptest::prelude::*;

use super::{Bench, Scene, ok, random_scores, random_shapes, stepped, within};
use crate::oracle::{self, policies};
use crate::tiny::Rng;

/// Declares a test for every case, run on each bench of `$benches`.
macro_rules! policy_tests {
    ($benches:expr) => {
        policy_tests! { @ $benches;
            column_sums_at_random, column_sums_of_ragged_heads, biased_attention, counts_of_each_head,
            shared_counts, shared_ties, sums_gathers_and_raises, products_of_a_query, entries_kept_in_place,
            bad_operands_of_policies_are_errors,
        }
    };
    (@ $benches:expr; $($case:ident),* $(,)?) => {
        $(#[test]
        fn $case() {
            for bench in &$benches {
                $crate::cases::policies::$case(bench);
            }
        })*
    };
}
pub(crate) use policy_tests;

const EVERY: Columns = Columns { weight: 1.0, step: 0.0, band: None };

/// Holds column sums to the oracle. `entries` are the rows that each kv head still holds.
fn check_columns<B: Backend>(
    bench: &Bench<B>,
    what: &str,
    scene: &Scene,
    (queries, kv): (&B::Tensor, &B::Kv),
    entries: &[Vec<usize>],
    columns: Columns,
    bias: Option<&Bias<'_>>,
) {
    let sums = ok(bench.backend.column_sums(queries, kv, columns, bias));
    let sums = ok(bench.backend.read_scores(&sums));
    let longest = entries.iter().map(Vec::len).max().expect("a head");
    assert_eq!(sums.len(), scene.heads, "{what}");
    for (head, entries) in entries.iter().enumerate() {
        let keys: Vec<Vec<f64>> = entries.iter().map(|entry| scene.keys[head][*entry].clone()).collect();
        let (mut expected, mut tolerance) = (vec![0.0; longest], vec![1e-36; longest]);
        for query_head in head * scene.group..(head + 1) * scene.group {
            for row in 0..scene.rows() {
                let own = keys.len() - scene.rows() + row;
                let query = scene.query(row, query_head);
                let added = |entry: &usize| match bias {
                    Some(bias) if bias.heads[query_head] && bias.highlighted.get(*entry) == Some(&false) => {
                        f64::from(bias.amount)
                    }
                    _ => 0.0,
                };
                let added: Vec<f64> = entries[..=own].iter().map(added).collect();
                let shares = oracle::biased_probabilities(&query, &keys[..=own], &added);
                let weight = f64::from(columns.weight) + f64::from(columns.step) * row as f64;
                // The bias is one more term of a logit, and the logit's magnitude grows by it.
                let bias_error = bias.map_or(0.0, |bias| 8.0 * bench.unit * f64::from(bias.amount.abs()));
                let error = scene.weight_error(&query, &keys[..=own], bench.unit, bench.exp)
                    + bias_error
                    + (scene.rows() * scene.group + 4) as f64 * bench.unit;
                for (key, share) in shares.iter().enumerate() {
                    if columns.band.is_none_or(|band| own - key < band) {
                        expected[key] += weight * share;
                        tolerance[key] += error * weight.abs() * share;
                    }
                }
            }
        }
        within(&format!("{what}, head {head}"), &sums[head], &expected, &tolerance);
    }
}

pub(crate) fn column_sums_at_random<B: Backend>(bench: &Bench<B>) {
    let fixed =
        [((2, 2, 8), 3, 600, 1), ((1, 1, 2), 1, 1, 2), ((4, 2, 4), 300, 300, 3), ((1, 2, 4), 257, 513, 4)];
    for (shape, rows, keys, seed) in fixed {
        let (scene, queries, kv) = Scene::new(bench, shape, (rows, keys), 2.0, seed);
        let entries = vec![(0..keys).collect::<Vec<_>>(); shape.1];
        for columns in [
            EVERY,
            Columns { band: Some(0), ..EVERY },
            Columns { band: Some(1), ..EVERY },
            Columns { band: Some(keys / 3 + 1), ..EVERY },
            Columns { band: Some(usize::MAX), ..EVERY },
            Columns { weight: 1.0, step: 0.25, band: Some(40) },
        ] {
            let what = format!("{shape:?}, {rows} rows of {keys}, {columns:?}");
            check_columns(bench, &what, &scene, (&queries, &kv), &entries, columns, None);
        }
    }
    let strategy =
        ((1_usize..4, 1_usize..3, 1_usize..5), 1_usize..40, 0_usize..300, 0_usize..60, any::<u64>());
    random_shapes(30, strategy, |((group, heads, half), rows, more, band, seed)| {
        let keys = rows + more;
        let (scene, queries, kv) = Scene::new(bench, (group, heads, 2 * half), (rows, keys), 1.0, seed);
        let mut rng = Rng::new(seed);
        let steered: Vec<bool> = (0..group * heads).map(|_| rng.below(2) == 0).collect();
        let highlighted: Vec<bool> = (0..keys / 2).map(|_| rng.below(3) == 0).collect();
        let bias = Bias { heads: &steered, highlighted: &highlighted, amount: -3.0 };
        let entries = vec![(0..keys).collect::<Vec<_>>(); heads];
        let columns = Columns { weight: 0.5, step: 0.125, band: (band > 0).then_some(band) };
        check_columns(bench, "at random", &scene, (&queries, &kv), &entries, columns, Some(&bias));
    });
}

/// The heads of a compacted cache have lengths of their own; behind shorter ones the sums are 0.
pub(crate) fn column_sums_of_ragged_heads<B: Backend>(bench: &Bench<B>) {
    let (scene, queries, kv) = Scene::new(bench, (2, 3, 4), (4, 50), 1.0, 9);
    let entries: Vec<Vec<usize>> =
        vec![(0..50).collect(), (0..50).step_by(3).collect(), vec![3, 9, 20, 21, 22, 48, 49]];
    let lists = entries.iter().map(|list| list.iter().map(|entry| *entry as u32).collect()).collect();
    let kv = ok(bench.backend.gather_kv(&kv, &ok(bench.backend.indices(lists)), 0));
    let heads = [true, false, false, true, true, true];
    let highlighted: Vec<bool> = (0..45).map(|position| position % 4 == 1).collect();
    let bias = Bias { heads: &heads, highlighted: &highlighted, amount: -4.6 };
    for bias in [None, Some(&bias)] {
        check_columns(bench, "ragged", &scene, (&queries, &kv), &entries, EVERY, bias);
    }
}

/// Attention and window scores of steered heads; with no head steered they are those without a bias.
pub(crate) fn biased_attention<B: Backend>(bench: &Bench<B>) {
    let backend = &bench.backend;
    for (shape, rows, keys, seed) in [((2, 2, 4), 5, 30, 1), ((1, 3, 8), 300, 300, 2), ((4, 1, 2), 1, 700, 3)]
    {
        let (scene, queries, kv) = Scene::new(bench, shape, (rows, keys), 1.0, seed);
        let (group, heads, head_dim) = shape;
        let steered: Vec<bool> = (0..group * heads).map(|head| head % 2 == 0).collect();
        let highlighted: Vec<bool> = (0..keys - keys / 4).map(|position| position % 5 < 2).collect();
        let bias = Bias { heads: &steered, highlighted: &highlighted, amount: -2.5 };
        let out = ok(backend.biased_attention(&queries, &kv, Visible::Aligned, &bias));
        let window = rows.min(4);
        let observers = ok(backend.last_rows(&queries, window));
        let scores = ok(backend.read_scores(&ok(backend.biased_window_scores(&observers, &kv, &bias))));
        let (mut expected, mut tolerance) = (Vec::new(), Vec::new());
        let mut sums = vec![vec![0.0; keys]; group * heads];
        let mut sums_tolerance = vec![vec![1e-36; keys]; group * heads];
        for row in 0..rows {
            for head in 0..group * heads {
                let (query, seen) = (scene.query(row, head), keys - rows + row + 1);
                let k = &scene.keys[head / group][..seen];
                let added: Vec<f64> = (0..seen)
                    .map(|key| if steered[head] && highlighted.get(key) == Some(&false) { -2.5 } else { 0.0 })
                    .collect();
                let shares = oracle::biased_probabilities(&query, k, &added);
                let error = scene.weight_error(&query, k, bench.unit, bench.exp)
                    + (8.0 * 2.5 + (seen + window) as f64) * bench.unit;
                let values = &scene.values[head / group];
                expected.extend(oracle::weighted(&shares, values));
                for i in 0..head_dim {
                    let magnitude: f64 = shares.iter().zip(values).map(|(w, v)| w * v[i].abs()).sum();
                    tolerance.push(error * magnitude + 1e-33);
                }
                if row >= rows - window {
                    for (key, share) in shares.iter().enumerate() {
                        sums[head][key] += share;
                        sums_tolerance[head][key] += error * share;
                    }
                }
            }
        }
        within("biased attention", &bench.read(&out), &expected, &tolerance);
        for head in 0..group * heads {
            within("biased scores", &scores[head], &sums[head], &sums_tolerance[head]);
        }
        let none = vec![false; group * heads];
        let bias = Bias { heads: &none, ..bias };
        let out = ok(backend.biased_attention(&queries, &kv, Visible::Aligned, &bias));
        let plain = ok(backend.attention(&queries, &kv, Visible::Aligned));
        assert_eq!(bench.read(&out), bench.read(&plain));
    }
}

pub(crate) fn counts_of_each_head<B: Backend>(bench: &Bench<B>) {
    let backend = &bench.backend;
    let (scores, _) = random_scores(bench, (2, 3, 4), 4, 40, 5);
    let pooled = ok(backend.pool_groups(&scores, 3, 36, Pooling { kind: PoolingKind::Max, kernel: 3 }));
    let numbers = ok(backend.read_scores(&pooled));
    for counts in [[0, 5, 36], [1, 1, 1], [36, 40, 0]] {
        let lists = ok(backend.read_indices(&ok(backend.select_each(&pooled, &counts, 4))));
        for ((list, numbers), count) in lists.iter().zip(&numbers).zip(counts) {
            let mut expected = oracle::top(&oracle::wide(numbers), count);
            expected.extend(36..40);
            assert_eq!(*list, expected.iter().map(|key| *key as u32).collect::<Vec<_>>());
        }
    }
}

pub(crate) fn shared_counts<B: Backend>(bench: &Bench<B>) {
    let backend = &bench.backend;
    let strategy = (1_usize..5, 1_usize..60, 0_usize..70, 0_usize..30, 0_usize..11, any::<u64>());
    random_shapes(40, strategy, |(heads, scored, mean, assured, tenths, seed)| {
        let (_, queries, kv) = Scene::new(bench, (1, heads, 2), (3, scored + 3), 2.0, seed);
        let scores = ok(backend.window_scores(&queries, &kv));
        let pooling = Pooling { kind: PoolingKind::Max, kernel: 1 };
        let pooled = ok(backend.pool_groups(&scores, heads, scored, pooling));
        let numbers: Vec<Vec<f64>> =
            ok(backend.read_scores(&pooled)).iter().map(|numbers| oracle::wide(numbers)).collect();
        let floor = tenths as f64 / 10.0;
        let counts = policies::shared_counts(&numbers, mean, assured, floor);
        let share = Share { mean, assured, floor, tail: 3 };
        let kept = ok(backend.count_kv(ok(backend.gather_kv_shared(&kv, &pooled, share, 2))));
        let mut lists = Vec::new();
        for (numbers, count) in numbers.iter().zip(counts) {
            let mut expected = oracle::top(numbers, count);
            expected.extend(scored..scored + 3);
            lists.push(expected.iter().map(|key| *key as u32).collect::<Vec<_>>());
        }
        assert_eq!(ok(backend.kv_positions(&kept)), lists);
        assert_eq!(backend.kv_lengths(&kept), lists.iter().map(Vec::len).collect::<Vec<_>>());
        // The entries themselves are those that lists of the host gather.
        let copy = ok(backend.gather_kv(&kv, &ok(backend.indices(lists)), 2));
        let query = bench.tensor(2 * heads, &vec![0.5; 2 * heads]);
        let attention = |kv: &B::Kv| bench.read(&ok(backend.attention(&query, kv, Visible::Aligned)));
        assert_eq!(attention(&kept), attention(&copy));
    });
}

/// Equal scores go to the lower head first.
pub(crate) fn shared_ties<B: Backend>(bench: &Bench<B>) {
    let backend = &bench.backend;
    let (_, queries, kv) = Scene::of(bench, (1, 3, 2), vec![0.0; 6], &[1.0; 60], &[1.0; 60]);
    let scores = ok(backend.window_scores(&queries, &kv));
    let select_beside = |mean, assured, floor| {
        let share = Share { mean, assured, floor, tail: 0 };
        backend.kv_lengths(&ok(backend.count_kv(ok(backend.gather_kv_shared(&kv, &scores, share, 0)))))
    };
    let select = |mean, floor| select_beside(mean, 0, floor);
    assert_eq!(select(4, 0.0), [10, 2, 0]);
    // 10 · 0.5 + 2, 2 · 0.5 + 2 and 2.
    assert_eq!(select(4, 0.5), [7, 3, 2]);
    assert_eq!(select(4, 1.0), [4, 4, 4]);
    // Halves go to the even number: 10 · 0.75 + 0 and 2 · 0.75, 1.5, to 8 and 2.
    assert_eq!(select(4, 0.25), [8, 2, 1]);
    assert_eq!(select(100, 0.0), [10, 10, 10]);
    // 3 + 7 · 0.5 + int(1 · 0.5), 2 + 0 and 0.
    assert_eq!(select_beside(4, 3, 0.5), [7, 2, 0]);
    assert_eq!(select_beside(4, 9, 1.0), [9, 2, 0]);
}

pub(crate) fn sums_gathers_and_raises<B: Backend>(bench: &Bench<B>) {
    let backend = &bench.backend;
    let (long, short) = (stepped(bench, &[0.0, 1.0, 2.0, 0.5, 0.25]), stepped(bench, &[3.0, 1.0]));
    let read = |scores: &B::Scores| ok(backend.read_scores(scores)).remove(0);
    let (a, b) = (read(&long), read(&short));
    let expected: Vec<f32> =
        a.iter().enumerate().map(|(key, a)| a + b.get(key).copied().unwrap_or(0.0)).collect();
    assert_eq!(read(&ok(backend.add_scores(&long, &short))), expected);
    assert_eq!(read(&ok(backend.add_scores(&short, &long))), expected);

    let (two, _) = random_scores(bench, (1, 2, 2), 1, 6, 3);
    let numbers = ok(backend.read_scores(&two));
    let lists = ok(backend.indices(vec![vec![1, 4, 5], vec![2]]));
    let gathered = ok(backend.read_scores(&ok(backend.gather_scores(&two, &lists))));
    let first = vec![numbers[0][1], numbers[0][4], numbers[0][5]];
    assert_eq!(gathered, [first, vec![numbers[1][2], 0.0, 0.0]]);

    // Positions of six keys and one behind them; 9 and 40 are no tokens of the prompt.
    let mut raised = two;
    let positions = bench.list([2, 40, 1, 5, 0, 9, 5]);
    ok(backend.raise_scores(&mut raised, &positions, &[false, false, true, false, false, true]));
    for (raised, numbers) in ok(backend.read_scores(&raised)).iter().zip(&numbers) {
        let expected = (0..6).map(|key| if [0, 3].contains(&key) { f32::INFINITY } else { numbers[key] });
        assert_eq!(*raised, expected.collect::<Vec<_>>());
    }
    ok(backend.raise_scores(&mut raised, &positions, &[]));
    let lists = ok(backend.select(&raised, Select { count: 2, tail: 0 }));
    assert_eq!(ok(backend.read_indices(&lists)), [[0, 3], [0, 3]]);
}

pub(crate) fn products_of_a_query<B: Backend>(bench: &Bench<B>) {
    for (shape, keys) in [((1, 1, 2), 1), ((3, 2, 8), 40), ((1, 2, 16), 300)] {
        let (scene, query, kv) = Scene::new(bench, shape, (1, keys), 1.0, keys as u64);
        let products = ok(bench.backend.query_key_products(&query, &kv));
        for (head, products) in ok(bench.backend.read_scores(&products)).iter().enumerate() {
            let (query, keys) = (scene.query(0, head), &scene.keys[head / shape.0]);
            let expected: Vec<f64> = keys.iter().map(|key| oracle::dot(&query, key)).collect();
            let error = |key: &Vec<f64>| shape.2 as f64 * bench.unit * oracle::dot_of_magnitudes(&query, key);
            let tolerance: Vec<f64> = keys.iter().map(error).collect();
            within("products", products, &expected, &tolerance);
        }
    }
}

/// What is kept in place is what is kept in a copy.
pub(crate) fn entries_kept_in_place<B: Backend>(bench: &Bench<B>) {
    let backend = &bench.backend;
    let (_, queries, mut kv) = Scene::new(bench, (2, 2, 4), (1, 20), 1.0, 8);
    let lists = vec![vec![0, 1, 7, 19], vec![2, 3, 4, 5, 18, 19]];
    let entries = ok(backend.indices(lists.clone()));
    let copy = ok(backend.gather_kv(&kv, &entries, 0));
    ok(backend.retain_kv(&mut kv, &entries));
    assert_eq!(backend.kv_lengths(&kv), [4, 6]);
    assert_eq!(ok(backend.kv_positions(&kv)), lists);
    let attention = |kv: &B::Kv| bench.read(&ok(backend.attention(&queries, kv, Visible::Aligned)));
    assert_eq!(attention(&kv), attention(&copy));
    ok(backend.retain_kv(&mut kv, &ok(backend.indices(vec![vec![], vec![5]]))));
    assert_eq!(ok(backend.kv_positions(&kv)), [vec![], vec![19]]);
}

pub(crate) fn bad_operands_of_policies_are_errors<B: Backend>(bench: &Bench<B>) {
    fn refused<T: Debug>(result: Result<T, BackendError>) {
        let error = result.expect_err("bad operands");
        assert!(matches!(error, BackendError::Shape { .. }), "{error}");
        assert!(error.to_string().contains(|c: char| c.is_ascii_digit()), "no numbers: {error}");
    }
    let backend = &bench.backend;
    let (_, queries, mut kv) = Scene::new(bench, (2, 2, 4), (3, 5), 1.0, 8);
    let (scores, _) = random_scores(bench, (1, 2, 4), 1, 5, 1);
    let (three, _) = random_scores(bench, (1, 3, 4), 1, 5, 1);
    let bias = Bias { heads: &[true; 3], highlighted: &[], amount: -1.0 };
    refused(backend.biased_attention(&queries, &kv, Visible::Aligned, &bias));
    refused(backend.biased_window_scores(&queries, &kv, &bias));
    refused(backend.column_sums(&queries, &kv, EVERY, Some(&bias)));
    refused(backend.column_sums(&bench.tensor(16, &[1.0; 96]), &kv, EVERY, None));
    refused(backend.column_sums(&bench.tensor(12, &[1.0; 12]), &kv, EVERY, None));
    refused(backend.query_key_products(&queries, &kv));
    refused(backend.add_scores(&scores, &three));
    refused(backend.gather_scores(&scores, &bench.list([0])));
    refused(backend.gather_scores(&scores, &ok(backend.indices(vec![vec![0], vec![5]]))));
    let mut raised = random_scores(bench, (1, 2, 4), 1, 5, 1).0;
    refused(backend.raise_scores(&mut raised, &ok(backend.indices(vec![vec![]; 2])), &[true]));
    refused(backend.raise_scores(&mut raised, &bench.list([0; 4]), &[true]));
    refused(backend.select_each(&scores, &[1], 0));
    for floor in [-0.1, 1.1, f64::NAN] {
        let error = backend.gather_kv_shared(&kv, &scores, Share { mean: 1, assured: 0, floor, tail: 0 }, 0);
        assert!(error.expect_err("no share").to_string().contains("floor"));
    }
    for (scores, tail) in [(&three, 0), (&scores, 1)] {
        refused(backend.gather_kv_shared(&kv, scores, Share { mean: 1, assured: 0, floor: 0.5, tail }, 0));
    }
    for lists in [vec![vec![0]], vec![vec![0], vec![5]], vec![vec![1, 0], vec![0]], vec![vec![1, 1], vec![0]]]
    {
        refused(backend.retain_kv(&mut kv, &ok(backend.indices(lists))));
    }
    assert_eq!(backend.kv_lengths(&kv), [5, 5], "nothing half-done");
}
