//! One op, one meaning: the list of cases that every backend runs. Each case computes an operation on
//! the backend and holds it to the oracle, within the rounding error derived beside the comparison.
//!
//! Below, u is the unit roundoff of the backend's arithmetic. A sum of n products, in any order, with or
//! without fused operations, is off by at most n·u·Σ|a·b| (to first order).

#![allow(dead_code, reason = "every test binary uses its own part")]

pub(crate) mod policies;

use std::fmt::Debug;
use std::ops::Range;

use fastkv::backend::{Backend, BackendError, Select, Visible};
use fastkv::model::{Checkpoint, StoredTensor};
use fastkv::policy::{Pooling, PoolingKind};
use proptest::prelude::*;
use proptest::test_runner::{TestCaseError, TestRunner};

use crate::oracle::{self, Matrix, Pool};
use crate::tiny::{self, Rng, Stored};

/// A backend under test and the unit roundoff of its arithmetic.
pub(crate) struct Bench<B: Backend> {
    pub(crate) backend: B,
    pub(crate) unit: f64,
    /// Relative error of an exponential.
    pub(crate) exp: f64,
}

/// Declares a test for every case, run on each bench of `$benches`.
macro_rules! backend_tests {
    ($benches:expr) => {
        backend_tests! { @ $benches;
            embed_reads_rows_of_every_dtype, rms_norm, linear, linear_of_stored_weights, swiglu, add_to_rows,
            rotary_embedding, attention_of_the_last_rows, attention_of_selected_rows, attention_of_ragged_heads,
            attention_of_extreme_scores, attention_at_random, window_scores, window_scores_at_random,
            attention_with_scores, pooling_and_group_sums, pooling_at_random, selection, selection_of_ties,
            selection_of_nan, selection_without_scored_keys, append_and_gather, slices_and_lists,
            bad_operands_are_errors,
        }
    };
    (@ $benches:expr; $($case:ident),* $(,)?) => {
        $(#[test]
        fn $case() {
            for bench in &$benches {
                $crate::cases::$case(bench);
            }
        })*
    };
}
pub(crate) use backend_tests;

fn ok<T>(result: Result<T, BackendError>) -> T {
    result.expect("operands that fit")
}

/// A tensor as it is found in a file.
fn stored(shape: &[usize], values: &[f32], stored: Stored, shift: usize) -> StoredTensor {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let name = "tensor".to_owned();
    let tensor = tiny::Tensor { name, stored, shape: shape.to_vec(), values: values.to_vec() };
    tiny::write_safetensors(directory.path(), &[tensor], shift);
    let checkpoint = Checkpoint::open(directory.path()).expect("a checkpoint");
    checkpoint.tensor("tensor", shape).expect("a tensor")
}

impl<B: Backend> Bench<B> {
    fn weight(&self, shape: &[usize], values: &[f32]) -> B::Weight {
        ok(self.backend.weight(&stored(shape, values, Stored::F32, 0)))
    }

    /// Activations, by way of an embedding.
    fn tensor(&self, width: usize, values: &[f32]) -> B::Tensor {
        let rows = values.len() / width;
        // A table of no rows is no tensor.
        let table = if rows == 0 { vec![0.0; width] } else { values.to_vec() };
        let table = self.weight(&[table.len() / width, width], &table);
        ok(self.backend.embed(&table, &(0..rows as u32).collect::<Vec<_>>()))
    }

    fn list(&self, list: impl IntoIterator<Item = usize>) -> B::Indices {
        ok(self.backend.indices(vec![list.into_iter().map(|number| number as u32).collect()]))
    }

    fn read(&self, x: &B::Tensor) -> Vec<f32> {
        ok(self.backend.read(x))
    }

    /// A store of keys and values `[rows, heads · head_dim]`, appended at positions 0, 1, …
    fn kv(&self, heads: usize, head_dim: usize, keys: &[f32], values: &[f32]) -> B::Kv {
        let width = heads * head_dim;
        let rows = keys.len() / width;
        let mut kv = ok(self.backend.new_kv(heads, head_dim, rows));
        if rows > 0 {
            let (keys, values) = (self.tensor(width, keys), self.tensor(width, values));
            ok(self.backend.append_kv(&mut kv, &keys, &values, &self.list(0..rows), 0));
        }
        kv
    }
}

/// Every number within its tolerance; both NaN is equal.
fn within(what: &str, actual: &[f32], expected: &[f64], tolerance: &[f64]) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (index, ((actual, expected), tolerance)) in actual.iter().zip(expected).zip(tolerance).enumerate() {
        let distance = (f64::from(*actual) - expected).abs();
        assert!(
            distance <= *tolerance || actual.is_nan() && expected.is_nan(),
            "{what}: element {index} is {actual:e}, not {expected:e}: off by {distance:e}, allowed {tolerance:e}"
        );
    }
}

fn random_shapes<S: Strategy>(cases: u32, strategy: S, case: impl Fn(S::Value))
where
    S::Value: Debug,
{
    let config = ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() };
    let run = |value| {
        case(value);
        Ok::<(), TestCaseError>(())
    };
    if let Err(error) = TestRunner::new(config).run(&strategy, run) {
        panic!("{error}");
    }
}

// ---------------------------------------------------------------------------------------------
// Rows

pub(crate) fn embed_reads_rows_of_every_dtype<B: Backend>(bench: &Bench<B>) {
    let mut rng = Rng::new(1);
    for kind in [Stored::F32, Stored::Bf16, Stored::F16] {
        for (shift, width) in [(0, 8), (1, 8), (2, 7), (3, 33)] {
            let mut values = rng.normals(11 * width, 3.0);
            values[..4].copy_from_slice(&[0.0, -0.0, 65504.0, 6.0e-8]);
            let table = ok(bench.backend.weight(&stored(&[11, width], &values, kind, shift)));
            let ids = [10, 0, 0, 3, 7];
            let rounded = kind.rounded(&values);
            let expected: Vec<f64> = ids
                .iter()
                .flat_map(|id| oracle::wide(&rounded[*id as usize * width..(*id as usize + 1) * width]))
                .collect();
            let x = ok(bench.backend.embed(&table, &ids));
            assert_eq!(bench.backend.rows(&x), ids.len());
            // Exact, but for the activations' own rounding.
            let tolerance: Vec<f64> = expected
                .iter()
                .map(|value| if bench.unit > 1e-7 { bench.unit * value.abs() } else { 0.0 })
                .collect();
            within(&format!("{kind:?} {shift} bytes off"), &bench.read(&x), &expected, &tolerance);
        }
    }
    let table = bench.weight(&[2, 4], &[1.0; 8]);
    assert!(bench.read(&ok(bench.backend.embed(&table, &[]))).is_empty());
}

pub(crate) fn rms_norm<B: Backend>(bench: &Bench<B>) {
    let epsilon = 1e-5_f32;
    let check = |rows: usize, width: usize, range: Range<usize>, scale: f32, seed: u64| {
        let mut rng = Rng::new(seed);
        let (values, weight) = (rng.normals(rows * width, scale), rng.normals(width, 1.0));
        let normed = ok(bench.backend.rms_norm(
            &bench.tensor(width, &values),
            range.clone(),
            &bench.weight(&[width], &weight),
            epsilon,
        ));
        assert_eq!(bench.backend.rows(&normed), range.len());
        let expected: Vec<f64> = oracle::matrix(&values, width)[range]
            .iter()
            .flat_map(|row| oracle::rms_norm(row, &oracle::wide(&weight), f64::from(epsilon)))
            .collect();
        // A sum of n squares is off by n·u of itself, half of that behind the root; then a division by
        // n, the epsilon, the root, its inverse and two products.
        let relative = (width as f64 / 2.0 + 6.0) * bench.unit;
        let tolerance: Vec<f64> = expected.iter().map(|value| relative * value.abs() + 1e-40).collect();
        within(&format!("{rows}×{width}, scale {scale}"), &bench.read(&normed), &expected, &tolerance);
    };
    for (rows, width) in [(1, 1), (1, 2), (3, 31), (2, 32), (5, 33), (17, 64), (40, 100), (33, 257)] {
        for scale in [1.0, 1e-4, 1e-12, 1e10] {
            check(rows, width, 0..rows, scale, width as u64);
        }
        check(rows, width, rows - 1..rows, 1.0, 7);
        check(rows, width, 0..0, 1.0, 7);
    }
    random_shapes(40, (1_usize..60, 1_usize..90, any::<u64>()), |(rows, width, seed)| {
        let mut rng = Rng::new(seed);
        let first = rng.below(rows);
        check(rows, width, first..first + 1 + rng.below(rows - first), 1.0, seed);
    });
    let zeros = bench.tensor(4, &[0.0; 8]);
    let weight = bench.weight(&[4], &[1.0; 4]);
    assert_eq!(bench.read(&ok(bench.backend.rms_norm(&zeros, 0..2, &weight, epsilon))), [0.0; 8]);
}

/// One product with a weight `[features, width]`, stored as told.
fn check_linear<B: Backend>(
    bench: &Bench<B>,
    (rows, width, features): (usize, usize, usize),
    bias: bool,
    kind: Stored,
    shift: usize,
    seed: u64,
) {
    let mut rng = Rng::new(seed);
    let values = rng.normals(rows * width, 1.0);
    let weight = rng.normals(features * width, 1.0);
    let bias = bias.then(|| rng.normals(features, 1.0));
    let on_backend =
        |shape: &[usize], values: &[f32]| ok(bench.backend.weight(&stored(shape, values, kind, shift)));
    let bias_weight = bias.as_ref().map(|bias| on_backend(&[features], bias));
    let weight_on = on_backend(&[features, width], &weight);
    let product = ok(bench.backend.linear(&bench.tensor(width, &values), &weight_on, bias_weight.as_ref()));
    assert_eq!(bench.backend.rows(&product), rows);
    let weight = oracle::matrix(&kind.rounded(&weight), width);
    let bias = bias.map(|bias| oracle::wide(&kind.rounded(&bias)));
    let mut expected = Vec::new();
    let mut tolerance = Vec::new();
    for row in &oracle::matrix(&values, width) {
        expected.extend(oracle::linear(row, &weight, bias.as_deref()));
        for feature in 0..features {
            let magnitude = oracle::dot_of_magnitudes(row, &weight[feature]);
            let bias = bias.as_ref().map_or(0.0, |bias| bias[feature].abs());
            // n products, the bias and the result's own rounding.
            tolerance.push((width as f64 + 2.0) * bench.unit * (magnitude + bias));
        }
    }
    within(&format!("{rows}×{width}→{features} {kind:?}"), &bench.read(&product), &expected, &tolerance);
}

pub(crate) fn linear<B: Backend>(bench: &Bench<B>) {
    for (index, dimensions) in [
        (1, 1, 1),
        (1, 8, 300),
        (1, 64, 257),
        (2, 33, 5),
        (7, 16, 256),
        (64, 17, 40),
        (513, 8, 260),
        (1100, 4, 9),
        (0, 8, 8),
    ]
    .into_iter()
    .enumerate()
    {
        check_linear(bench, dimensions, index % 2 == 0, Stored::F32, 0, index as u64);
    }
    let dimensions = (1_usize..70, 1_usize..70, 1_usize..90);
    random_shapes(30, (dimensions, any::<bool>(), any::<u64>()), |(dimensions, bias, seed)| {
        check_linear(bench, dimensions, bias, Stored::F32, 0, seed);
    });
}

pub(crate) fn linear_of_stored_weights<B: Backend>(bench: &Bench<B>) {
    for kind in [Stored::F32, Stored::Bf16, Stored::F16] {
        for shift in [0, 1, 2, 3] {
            for dimensions in [(1, 9, 300), (37, 16, 33)] {
                check_linear(bench, dimensions, true, kind, shift, 3);
            }
        }
    }
}

pub(crate) fn swiglu<B: Backend>(bench: &Bench<B>) {
    let check = |width: usize, gate: &[f32], up: &[f32]| {
        let out = ok(bench.backend.swiglu(bench.tensor(width, gate), &bench.tensor(width, up)));
        let expected = oracle::swiglu(&oracle::wide(gate), &oracle::wide(up));
        // The exponent carries u·|gate| of rounding twice, which is relative in the power; then four
        // operations. Below the smallest normal number nothing is promised.
        let tolerance: Vec<f64> = expected
            .iter()
            .zip(gate)
            .map(|(value, gate)| {
                let relative = (2.0 * f64::from(gate.abs()) + 5.0) * bench.unit + bench.exp;
                relative * value.abs() + 1e-36
            })
            .collect();
        within("swiglu", &bench.read(&out), &expected, &tolerance);
    };
    let edges = [0.0, -0.0, 1.0, -1.0, 20.0, -20.0, 87.0, -87.0, -88.5, -100.0, 1e4, -1e4, 3e-8, -3e-8];
    check(14, &edges, &[1.5; 14]);
    check(1, &edges, &[-2.0; 14]);
    for (rows, width) in [(1, 1), (3, 33), (40, 31), (200, 7)] {
        let mut rng = Rng::new(rows as u64);
        check(width, &rng.normals(rows * width, 4.0), &rng.normals(rows * width, 1.0));
    }
    random_shapes(30, (1_usize..80, 1_usize..80, any::<u64>()), |(rows, width, seed)| {
        let mut rng = Rng::new(seed);
        check(width, &rng.normals(rows * width, 9.0), &rng.normals(rows * width, 1.0));
    });
}

pub(crate) fn add_to_rows<B: Backend>(bench: &Bench<B>) {
    for (rows, width, first, count) in [
        (1, 1, 0, 1),
        (5, 3, 0, 5),
        (5, 3, 2, 2),
        (40, 33, 1, 39),
        (100, 8, 60, 40),
        (4, 2, 4, 0),
        (4, 2, 1, 0),
    ] {
        let mut rng = Rng::new(first as u64);
        let (mut values, added) = (rng.normals(rows * width, 1.0), rng.normals(count * width, 1.0));
        let mut x = bench.tensor(width, &values);
        ok(bench.backend.add(&mut x, first, &bench.tensor(width, &added)));
        let mut tolerance = vec![0.0; values.len()];
        for (index, added) in added.iter().enumerate() {
            let sum = &mut values[first * width + index];
            tolerance[first * width + index] = bench.unit * f64::from((*sum + added).abs());
            *sum += added;
        }
        within("sum", &bench.read(&x), &oracle::wide(&values), &tolerance);
    }
}

pub(crate) fn rotary_embedding<B: Backend>(bench: &Bench<B>) {
    let check = |heads: usize, head_dim: usize, positions: &[usize], first: usize, rows: usize, seed: u64| {
        let mut rng = Rng::new(seed);
        let half = head_dim / 2;
        let frequencies: Vec<f32> = (0..half).map(|i| 0.7_f32.powi(i as i32)).collect();
        let wide = oracle::wide(&frequencies);
        let width = heads * head_dim;
        let values = rng.normals(rows * width, 1.0);
        let mut x = bench.tensor(width, &values);
        let angles = ok(bench.backend.rotary(&frequencies, &bench.list(positions.iter().copied())));
        ok(bench.backend.rotate(&mut x, &angles, first));
        let mut expected = Vec::new();
        let mut tolerance = Vec::new();
        for (row, values) in oracle::matrix(&values, width).iter().enumerate() {
            let position = positions[first + row];
            for head in values.chunks(head_dim) {
                expected.extend(oracle::rope(head, position, &wide));
                for i in 0..head_dim {
                    let pair = head[i % half].abs() + head[i % half + half].abs();
                    // The angle is rounded once, in f32 (its frequencies are); sine and cosine to two
                    // units; two products and a sum.
                    let angle = position as f64 * wide[i % half] * f64::from(f32::EPSILON) / 2.0;
                    tolerance.push(pair * (angle + 5.0 * bench.unit));
                }
            }
        }
        within(&format!("{heads} heads of {head_dim}"), &bench.read(&x), &expected, &tolerance);
    };
    for head_dim in [2, 4, 8, 64, 128] {
        check(1, head_dim, &[0], 0, 1, 1);
        check(3, head_dim, &[0, 1, 5, 1000, 131_071], 0, 5, 2);
        check(2, head_dim, &[7, 9, 40, 41, 600], 3, 2, 3);
        check(2, head_dim, &[7, 9], 2, 0, 3);
    }
    let many: Vec<usize> = (0..90).map(|i| 3 * i + i % 2).collect();
    check(5, 8, &many, 13, 70, 4);
    random_shapes(25, (1_usize..6, 1_usize..20, 1_usize..50, any::<u64>()), |(heads, half, rows, seed)| {
        let mut rng = Rng::new(seed);
        let first = rng.below(9);
        let mut position = rng.below(100);
        let positions: Vec<usize> = (0..first + rows)
            .map(|_| {
                position += 1 + rng.below(30);
                position
            })
            .collect();
        check(heads, 2 * half, &positions, first, rows, seed);
    });
}

// ---------------------------------------------------------------------------------------------
// Attention and scores

/// Queries and a store, in the oracle's words.
struct Scene {
    group: usize,
    heads: usize,
    head_dim: usize,
    queries: Vec<f32>,
    /// `[kv head]`, rows of keys and values.
    keys: Vec<Matrix>,
    values: Vec<Matrix>,
}

fn split(values: &[f32], heads: usize, head_dim: usize) -> Vec<Matrix> {
    let rows = oracle::matrix(values, heads * head_dim);
    let head =
        |head: usize| rows.iter().map(|row| row[head * head_dim..(head + 1) * head_dim].to_vec()).collect();
    (0..heads).map(head).collect()
}

impl Scene {
    /// Rows of queries and of keys, and the store that holds them.
    fn new<B: Backend>(
        bench: &Bench<B>,
        (group, heads, head_dim): (usize, usize, usize),
        (rows, keys): (usize, usize),
        scale: f32,
        seed: u64,
    ) -> (Self, B::Tensor, B::Kv) {
        let mut rng = Rng::new(seed);
        let queries = rng.normals(rows * group * heads * head_dim, scale);
        let (k, v) = (rng.normals(keys * heads * head_dim, 1.0), rng.normals(keys * heads * head_dim, 1.0));
        Self::of(bench, (group, heads, head_dim), queries, &k, &v)
    }

    fn of<B: Backend>(
        bench: &Bench<B>,
        (group, heads, head_dim): (usize, usize, usize),
        queries: Vec<f32>,
        k: &[f32],
        v: &[f32],
    ) -> (Self, B::Tensor, B::Kv) {
        let tensor = bench.tensor(group * heads * head_dim, &queries);
        let kv = bench.kv(heads, head_dim, k, v);
        let (keys, values) = (split(k, heads, head_dim), split(v, heads, head_dim));
        (Self { group, heads, head_dim, queries, keys, values }, tensor, kv)
    }

    fn query(&self, row: usize, head: usize) -> Vec<f64> {
        let first = (row * self.group * self.heads + head) * self.head_dim;
        oracle::wide(&self.queries[first..first + self.head_dim])
    }

    fn rows(&self) -> usize {
        self.queries.len() / (self.group * self.heads * self.head_dim)
    }

    /// How far off a weight of the softmax may be, as a share of it: a score is a sum of d products, is
    /// scaled (two roundings), and has the maximum taken from it (one, of both magnitudes). That shift
    /// counts twice: in the weight and in the sum. The sum of m weights, the exponential and the division
    /// come on top.
    fn weight_error(&self, query: &[f64], keys: &[Vec<f64>], unit: f64, exp: f64) -> f64 {
        let scale = (self.head_dim as f64).sqrt();
        let largest =
            keys.iter().map(|key| oracle::dot_of_magnitudes(query, key)).fold(0.0, f64::max) / scale;
        let shift = (self.head_dim as f64 + 6.0) * unit * largest;
        // Weights are rescaled for every tile in which the maximum rises: an exponential and a product,
        // and no exponent is further off than `shift`.
        let tiles = keys.len().div_ceil(32) as f64;
        let rescaled = tiles.min(8.0) * (exp + 2.0 * unit);
        (2.0 * shift).exp_m1() + (keys.len() as f64 + 6.0) * unit + 2.0 * exp + 2.0 * rescaled
    }

    /// Holds attention to the oracle; `visible(kv head, row)` keys are seen.
    fn check_attention<B: Backend>(
        &self,
        bench: &Bench<B>,
        what: &str,
        out: &B::Tensor,
        visible: impl Fn(usize, usize) -> usize,
    ) {
        let mut expected = Vec::new();
        let mut tolerance = Vec::new();
        for row in 0..self.rows() {
            for head in 0..self.group * self.heads {
                let kv = head / self.group;
                let query = self.query(row, head);
                let seen = visible(kv, row);
                let (keys, values) = (&self.keys[kv][..seen], &self.values[kv][..seen]);
                expected.extend(oracle::attend(&query, keys, values, seen));
                let weights = oracle::probabilities(&query, keys, seen);
                let error = self.weight_error(&query, keys, bench.unit, bench.exp) + seen as f64 * bench.unit;
                for i in 0..self.head_dim {
                    let magnitude: f64 = weights.iter().zip(values).map(|(w, v)| w * v[i].abs()).sum();
                    let largest = values.iter().map(|value| value[i].abs()).fold(0.0, f64::max);
                    // Weights below the smallest normal number vanish.
                    tolerance.push(error * magnitude + 1e-36 * seen as f64 * largest);
                }
            }
        }
        within(what, &bench.read(out), &expected, &tolerance);
    }

    /// Window scores and how far off they may be: `[query head][key]`.
    fn window_scores(&self, window: usize, unit: f64, exp: f64) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
        let mut scores = Vec::new();
        let mut tolerances = Vec::new();
        for head in 0..self.group * self.heads {
            let keys = &self.keys[head / self.group];
            let queries: Matrix =
                (self.rows() - window..self.rows()).map(|row| self.query(row, head)).collect();
            scores.push(oracle::window_scores(&queries, keys));
            let mut tolerance = vec![1e-36; keys.len()];
            for (row, query) in queries.iter().enumerate() {
                let seen = keys.len() - window + row + 1;
                let error = self.weight_error(query, &keys[..seen], unit, exp) + window as f64 * unit;
                for (key, weight) in oracle::probabilities(query, keys, seen).into_iter().enumerate() {
                    tolerance[key] += error * weight;
                }
            }
            tolerances.push(tolerance);
        }
        (scores, tolerances)
    }

    fn check_scores<B: Backend>(&self, bench: &Bench<B>, what: &str, window: usize, scores: &B::Scores) {
        let (expected, tolerance) = self.window_scores(window, bench.unit, bench.exp);
        let actual = ok(bench.backend.read_scores(scores));
        assert_eq!(actual.len(), expected.len(), "{what}: heads");
        for head in 0..expected.len() {
            within(&format!("{what}, head {head}"), &actual[head], &expected[head], &tolerance[head]);
        }
    }
}

fn check_aligned<B: Backend>(
    bench: &Bench<B>,
    shape: (usize, usize, usize),
    rows: usize,
    keys: usize,
    scale: f32,
    seed: u64,
) {
    let (scene, queries, kv) = Scene::new(bench, shape, (rows, keys), scale, seed);
    let out = ok(bench.backend.attention(&queries, &kv, Visible::Aligned));
    assert_eq!(bench.backend.rows(&out), rows);
    let what = format!("{shape:?}, {rows} rows of {keys} keys");
    scene.check_attention(bench, &what, &out, |_, row| keys - rows + row + 1);
}

pub(crate) fn attention_of_the_last_rows<B: Backend>(bench: &Bench<B>) {
    for (index, (shape, rows, keys)) in [
        ((1, 1, 2), 1, 1),
        ((1, 1, 8), 2, 2),
        ((4, 2, 8), 1, 255),
        ((4, 2, 8), 1, 256),
        ((4, 2, 8), 1, 257),
        ((2, 1, 8), 255, 255),
        ((2, 1, 8), 256, 256),
        ((2, 1, 8), 257, 257),
        ((1, 2, 64), 3, 513),
        ((3, 1, 128), 5, 300),
        ((16, 1, 8), 17, 40),
        ((16, 2, 4), 33, 260),
        ((8, 1, 2), 64, 700),
        ((5, 3, 6), 50, 50),
        ((1, 1, 8), 300, 1000),
        ((4, 2, 8), 0, 10),
        ((4, 2, 8), 0, 0),
    ]
    .into_iter()
    .enumerate()
    {
        check_aligned(bench, shape, rows, keys, 1.0, index as u64);
    }
}

pub(crate) fn attention_of_selected_rows<B: Backend>(bench: &Bench<B>) {
    for (shape, keys, selected, first) in [
        ((2, 2, 8), 1, vec![0], 0),
        ((2, 2, 8), 600, vec![0, 1, 255, 256, 257, 511, 512, 599], 0),
        ((2, 2, 8), 600, vec![0, 1, 255, 256, 257, 511, 512, 599], 3),
        ((16, 1, 4), 300, (0..300).step_by(7).collect(), 1),
        ((1, 1, 64), 520, (0..520).filter(|row| row % 3 != 1).collect(), 0),
        ((4, 2, 8), 700, vec![699], 0),
        ((4, 2, 8), 700, vec![3, 699], 2),
    ] {
        let rows = selected.len() - first;
        let (scene, queries, kv) = Scene::new(bench, shape, (rows, keys), 1.0, keys as u64);
        let list = bench.list(selected.iter().copied());
        let visible = Visible::Rows { rows: &list, first };
        let out = ok(bench.backend.attention(&queries, &kv, visible));
        let what = format!("{shape:?}, {rows} selected of {keys}");
        scene.check_attention(bench, &what, &out, |_, row| selected[first + row] + 1);
    }
}

/// A store whose heads hold different numbers of entries.
pub(crate) fn attention_of_ragged_heads<B: Backend>(bench: &Bench<B>) {
    let mut rng = Rng::new(5);
    for lengths in [vec![1, 300, 7], vec![257, 256, 1], vec![5, 5, 5]] {
        let heads = lengths.len();
        let shape = (2, heads, 8);
        let (mut scene, queries, kv) = Scene::new(bench, shape, (1, 400), 1.0, 3);
        let lists: Vec<Vec<u32>> = lengths
            .iter()
            .map(|length| {
                let mut rows: Vec<u32> = (0..400).collect();
                while rows.len() > *length {
                    rows.remove(rng.below(rows.len()));
                }
                rows
            })
            .collect();
        let kv = ok(bench.backend.gather_kv(&kv, &ok(bench.backend.indices(lists.clone())), 3));
        assert_eq!(bench.backend.kv_lengths(&kv), lengths);
        assert_eq!(ok(bench.backend.kv_positions(&kv)), lists);
        for (head, list) in lists.iter().enumerate() {
            let pick = |rows: &Matrix| list.iter().map(|row| rows[*row as usize].clone()).collect();
            scene.keys[head] = pick(&scene.keys[head]);
            scene.values[head] = pick(&scene.values[head]);
        }
        let out = ok(bench.backend.attention(&queries, &kv, Visible::Aligned));
        scene.check_attention(bench, "ragged", &out, |head, _| lengths[head]);
        let list = bench.list([0]);
        let out = ok(bench.backend.attention(&queries, &kv, Visible::Rows { rows: &list, first: 0 }));
        scene.check_attention(bench, "ragged, first key", &out, |_, _| 1);
    }
}

/// Scores of ±10⁴ and more, that rise or fall from tile to tile, or are all equal.
pub(crate) fn attention_of_extreme_scores<B: Backend>(bench: &Bench<B>) {
    let keys = 600;
    let ramp = |key: usize| key as f32 / keys as f32;
    let shapes: [(&str, &dyn Fn(usize) -> f32); 7] = [
        ("rising", &|key| 1e4 * ramp(key)),
        ("falling", &|key| -1e4 * ramp(key)),
        ("far below zero", &|key| -1e4 - ramp(key)),
        ("far above zero", &|key| 1e4 + ramp(key)),
        ("equal", &|_| 3.0),
        ("zero", &|_| 0.0),
        ("one peak in the second tile", &|key| if key == 300 { 1e4 } else { -1e4 }),
    ];
    for (what, score) in shapes {
        // d = 2 with one element at work: q = √2, so that the score is the key's element.
        let mut rng = Rng::new(8);
        let k: Vec<f32> = (0..keys).flat_map(|key| [score(key), 0.0]).collect();
        let queries = [2.0_f32.sqrt(), 0.0].repeat(40);
        let (scene, queries, kv) = Scene::of(bench, (1, 1, 2), queries, &k, &rng.normals(keys * 2, 1.0));
        let out = ok(bench.backend.attention(&queries, &kv, Visible::Aligned));
        scene.check_attention(bench, what, &out, |_, row| keys - 40 + row + 1);
        let list = bench.list((0..40).map(|row| row * 15));
        let out = ok(bench.backend.attention(&queries, &kv, Visible::Rows { rows: &list, first: 0 }));
        scene.check_attention(bench, what, &out, |_, row| row * 15 + 1);
        let scores = ok(bench.backend.window_scores(&queries, &kv));
        scene.check_scores(bench, what, 40, &scores);
    }
    // A key of −∞ against a positive query is never seen; the rest is as if it were not there.
    let mut k: Vec<f32> = (0..keys).flat_map(|key| [ramp(key), 0.0]).collect();
    for hidden in [0, 5, 255, 256, 400] {
        k[2 * hidden] = f32::NEG_INFINITY;
    }
    let v = Rng::new(2).normals(keys * 2, 1.0);
    let (_, queries, kv) = Scene::of(bench, (1, 1, 2), vec![1.0, 0.0], &k, &v);
    let out = bench.read(&ok(bench.backend.attention(&queries, &kv, Visible::Aligned)));
    let kept = |values: &[f32]| -> Vec<f32> {
        let rows = values.chunks(2).zip(k.chunks(2)).filter(|(_, key)| key[0].is_finite());
        rows.flat_map(|(row, _)| row.to_vec()).collect()
    };
    let (scene, _, _) = Scene::of(bench, (1, 1, 2), vec![1.0, 0.0], &kept(&k), &kept(&v));
    let seen = scene.keys[0].len();
    let expected = oracle::attend(&scene.query(0, 0), &scene.keys[0], &scene.values[0], seen);
    within("keys of −∞", &out, &expected, &[1e-4 * seen as f64 * bench.unit.max(6e-8) / 6e-8; 2]);
    // NaN in a query is NaN in its row and nowhere else.
    let mut q = vec![1.0_f32; 6];
    q[2] = f32::NAN;
    let (_, queries, kv) = Scene::of(bench, (1, 1, 2), q, &[1.0; 20], &v[..20]);
    let out = bench.read(&ok(bench.backend.attention(&queries, &kv, Visible::Aligned)));
    let nan: Vec<bool> = out.iter().map(|value| value.is_nan()).collect();
    assert_eq!(nan, [false, false, true, true, false, false], "{out:?}");
}

pub(crate) fn attention_at_random<B: Backend>(bench: &Bench<B>) {
    let shape = (1_usize..17, 1_usize..4, 1_usize..12);
    let strategy = (shape, 1_usize..80, 0_usize..400, 0.1_f32..6.0, any::<u64>());
    random_shapes(40, strategy, |((group, heads, half), rows, before, scale, seed)| {
        check_aligned(bench, (group, heads, 2 * half), rows, rows + before, scale, seed);
    });
}

fn check_window<B: Backend>(
    bench: &Bench<B>,
    shape: (usize, usize, usize),
    window: usize,
    keys: usize,
    scale: f32,
    seed: u64,
) {
    let (scene, queries, kv) = Scene::new(bench, shape, (window, keys), scale, seed);
    let scores = ok(bench.backend.window_scores(&queries, &kv));
    scene.check_scores(bench, &format!("{shape:?}, window {window} of {keys}"), window, &scores);
}

pub(crate) fn window_scores<B: Backend>(bench: &Bench<B>) {
    for (index, (shape, window, keys)) in [
        ((1, 1, 2), 1, 1),
        ((4, 2, 8), 8, 8),
        ((4, 2, 8), 8, 9),
        ((1, 1, 8), 8, 255),
        ((2, 1, 8), 8, 256),
        ((2, 1, 64), 8, 257),
        ((16, 1, 4), 32, 600),
        ((1, 3, 128), 64, 70),
        ((5, 1, 6), 64, 64),
    ]
    .into_iter()
    .enumerate()
    {
        check_window(bench, shape, window, keys, 1.5, index as u64);
    }
}

pub(crate) fn window_scores_at_random<B: Backend>(bench: &Bench<B>) {
    let shape = (1_usize..17, 1_usize..4, 1_usize..12);
    let strategy = (shape, 1_usize..65, 0_usize..300, 0.1_f32..6.0, any::<u64>());
    random_shapes(40, strategy, |((group, heads, half), window, before, scale, seed)| {
        check_window(bench, (group, heads, 2 * half), window, window + before, scale, seed);
    });
}

pub(crate) fn attention_with_scores<B: Backend>(bench: &Bench<B>) {
    for (rows, keys, window) in [(1, 1, 1), (8, 8, 8), (40, 300, 8), (300, 300, 32), (257, 513, 1)] {
        let (scene, queries, kv) = Scene::new(bench, (2, 2, 8), (rows, keys), 1.5, rows as u64);
        let (out, scores) = ok(bench.backend.attention_with_scores(&queries, &kv, window));
        scene.check_attention(bench, "with scores", &out, |_, row| keys - rows + row + 1);
        scene.check_scores(bench, "with attention", window, &scores);
    }
}

// ---------------------------------------------------------------------------------------------
// Pooling, sums, selection

fn pool(kind: PoolingKind) -> Pool {
    match kind {
        PoolingKind::Max => Pool::Max,
        PoolingKind::Average => Pool::Average,
    }
}

/// Scores to work on, and their numbers as the backend has them.
fn random_scores<B: Backend>(
    bench: &Bench<B>,
    shape: (usize, usize, usize),
    window: usize,
    keys: usize,
    seed: u64,
) -> (B::Scores, Vec<Vec<f64>>) {
    let (_, queries, kv) = Scene::new(bench, shape, (window, keys), 2.0, seed);
    let scores = ok(bench.backend.window_scores(&queries, &kv));
    let numbers = ok(bench.backend.read_scores(&scores)).iter().map(|head| oracle::wide(head)).collect();
    (scores, numbers)
}

fn check_pooling<B: Backend>(
    bench: &Bench<B>,
    (group, heads): (usize, usize),
    (window, keys): (usize, usize),
    pooling: Pooling,
    seed: u64,
) {
    let (scores, numbers) = random_scores(bench, (group, heads, 4), window, keys, seed);
    let scored = keys - window;
    let pooled = ok(bench.backend.pool_groups(&scores, heads, scored, pooling));
    let actual = ok(bench.backend.read_scores(&pooled));
    assert_eq!(actual.len(), heads);
    let of_head = |scores: &Vec<f64>| oracle::pool(&scores[..scored], pool(pooling.kind), pooling.kernel);
    let each: Vec<Vec<f64>> = numbers.iter().map(of_head).collect();
    let groups: Vec<Vec<f64>> = each.chunks(group).map(oracle::sum_lists).collect();
    // Scores are positive, so a pooled one is as large as the magnitudes it was made of. An average is a
    // sum of `kernel` numbers and a division; the group's sum follows.
    let terms = match pooling.kind {
        PoolingKind::Max => group,
        PoolingKind::Average => group + pooling.kernel + 1,
    };
    let what = format!("{pooling:?}, {heads} groups of {group}, {scored} keys");
    for head in 0..heads {
        let tolerance: Vec<f64> =
            groups[head].iter().map(|value| terms as f64 * bench.unit * value + 1e-40).collect();
        within(&what, &actual[head], &groups[head], &tolerance);
    }
    let sum = ok(bench.backend.read_scores(&ok(bench.backend.sum_heads(&pooled))));
    assert_eq!(sum.len(), 1);
    let actual: Vec<Vec<f64>> = actual.iter().map(|head| oracle::wide(head)).collect();
    let expected = oracle::sum_lists(&actual);
    let tolerance: Vec<f64> =
        expected.iter().map(|value| heads as f64 * bench.unit * value + 1e-40).collect();
    within("sum over heads", &sum[0], &expected, &tolerance);
}

pub(crate) fn pooling_and_group_sums<B: Backend>(bench: &Bench<B>) {
    for kind in [PoolingKind::Max, PoolingKind::Average] {
        for kernel in [1, 3, 5, 7, 13, 31, 63] {
            for (shape, window, keys) in
                [((1, 1), 1, 2), ((4, 2), 8, 11), ((1, 3), 8, 40), ((16, 1), 4, 300), ((3, 2), 2, 32)]
            {
                check_pooling(bench, shape, (window, keys), Pooling { kind, kernel }, kernel as u64);
            }
        }
    }
}

pub(crate) fn pooling_at_random<B: Backend>(bench: &Bench<B>) {
    let kind = prop_oneof![Just(PoolingKind::Max), Just(PoolingKind::Average)];
    let strategy = ((1_usize..17, 1_usize..4), 1_usize..20, 1_usize..200, kind, 0_usize..32, any::<u64>());
    random_shapes(40, strategy, |(shape, window, scored, kind, half, seed)| {
        check_pooling(bench, shape, (window, window + scored), Pooling { kind, kernel: 2 * half + 1 }, seed);
    });
}

const PLAIN: Pooling = Pooling { kind: PoolingKind::Max, kernel: 1 };

/// Selects on the scores of the first `scored` keys, and holds the lists to the oracle's choice on the
/// very numbers that the backend ranks: nothing is left to rounding.
fn check_selection<B: Backend>(bench: &Bench<B>, scores: &B::Scores, counts: &[usize], tail: usize) {
    let numbers = ok(bench.backend.read_scores(scores));
    for count in counts {
        let lists = ok(bench.backend.select(scores, Select { count: *count, tail }));
        let lists = ok(bench.backend.read_indices(&lists));
        assert_eq!(lists.len(), numbers.len());
        for (list, numbers) in lists.iter().zip(&numbers) {
            let mut expected = oracle::top(&oracle::wide(numbers), *count);
            expected.extend(numbers.len()..numbers.len() + tail);
            let expected: Vec<u32> = expected.into_iter().map(|key| key as u32).collect();
            assert_eq!(*list, expected, "{count} of {numbers:?}, tail {tail}");
        }
    }
}

pub(crate) fn selection<B: Backend>(bench: &Bench<B>) {
    for (shape, window, keys) in [((1, 1, 4), 1, 2), ((2, 2, 4), 8, 40), ((4, 1, 4), 4, 300)] {
        let scored = keys - window;
        let (scores, _) = random_scores(bench, shape, window, keys, keys as u64);
        for pooling in [PLAIN, Pooling { kind: PoolingKind::Max, kernel: 7 }] {
            let pooled = ok(bench.backend.pool_groups(&scores, shape.1, scored, pooling));
            let counts = [0, 1, 2, scored / 2, scored - 1, scored, scored + 1, 10 * scored];
            for tail in [0, window] {
                check_selection(bench, &pooled, &counts, tail);
            }
            check_selection(bench, &ok(bench.backend.sum_heads(&pooled)), &counts, window);
        }
    }
    let strategy = (1_usize..4, 1_usize..4, 1_usize..120, 0_usize..130, 0_usize..20, any::<u64>());
    random_shapes(40, strategy, |(group, heads, scored, count, tail, seed)| {
        let (scores, _) = random_scores(bench, (group, heads, 2), 3, scored + 3, seed);
        let pooling = Pooling { kind: PoolingKind::Average, kernel: 3 };
        let pooled = ok(bench.backend.pool_groups(&scores, heads, scored, pooling));
        check_selection(bench, &pooled, &[count], tail);
    });
}

/// Scores in steps: the key's element is the logarithm of the wanted weight.
fn stepped<B: Backend>(bench: &Bench<B>, steps: &[f32]) -> B::Scores {
    let k: Vec<f32> = steps.iter().flat_map(|step| [*step, 0.0]).collect();
    let (_, queries, kv) = Scene::of(bench, (1, 1, 2), vec![1.0, 0.0], &k, &vec![0.0; k.len()]);
    ok(bench.backend.window_scores(&queries, &kv))
}

pub(crate) fn selection_of_ties<B: Backend>(bench: &Bench<B>) {
    let mut rng = Rng::new(4);
    let steps: Vec<f32> = (0..500).map(|_| rng.below(5) as f32).collect();
    let scores = stepped(bench, &steps);
    let numbers = &ok(bench.backend.read_scores(&scores))[0];
    let distinct: std::collections::BTreeSet<u32> = numbers.iter().map(|score| score.to_bits()).collect();
    assert_eq!(distinct.len(), 5, "ties are what this is about");
    check_selection(bench, &scores, &[0, 1, 50, 99, 100, 101, 250, 499, 500], 8);

    // Neighbours in f32 are no ties.
    let steps: Vec<f32> = (0..300).map(|key| (key * 7 % 300) as f32 * 1.2e-7).collect();
    let scores = stepped(bench, &steps);
    let mut bits: Vec<u32> =
        ok(bench.backend.read_scores(&scores))[0].iter().map(|score| score.to_bits()).collect();
    bits.sort_unstable();
    if bits.windows(2).any(|pair| pair[1] == pair[0] + 1) {
        check_selection(bench, &scores, &(0..300).collect::<Vec<_>>(), 0);
    } else {
        assert!(bench.unit > 1e-7, "f32 tells these apart: {bits:?}");
    }

    let equal = stepped(bench, &[2.0; 70]);
    check_selection(bench, &equal, &[0, 1, 8, 69, 70], 0);
    // Weights that vanish are ties at zero.
    let mut steps = vec![-1e4; 40];
    steps[30] = 0.0;
    let scores = stepped(bench, &steps);
    assert_eq!(ok(bench.backend.read_scores(&scores))[0][3], 0.0);
    check_selection(bench, &scores, &[1, 2, 10], 2);
}

pub(crate) fn selection_of_nan<B: Backend>(bench: &Bench<B>) {
    // The window's first query is NaN: it spoils the keys it sees and leaves those behind them.
    let (window, keys) = (6, 20);
    let mut rng = Rng::new(6);
    let mut queries = rng.normals(window * 2, 1.0);
    queries[0] = f32::NAN;
    let (_, queries, kv) =
        Scene::of(bench, (1, 1, 2), queries, &rng.normals(keys * 2, 1.0), &rng.normals(keys * 2, 1.0));
    let scores = ok(bench.backend.window_scores(&queries, &kv));
    let numbers = &ok(bench.backend.read_scores(&scores))[0];
    assert_eq!(numbers.iter().filter(|score| score.is_nan()).count(), keys - window + 1);
    check_selection(bench, &scores, &[0, 1, 4, 5, 6, 7, 19, 20], 3);
    // All NaN: the lowest keys.
    let (_, queries, kv) = Scene::of(bench, (2, 1, 2), vec![f32::NAN; 4], &[1.0; 24], &[1.0; 24]);
    let scores = ok(bench.backend.window_scores(&queries, &kv));
    for kind in [PoolingKind::Max, PoolingKind::Average] {
        let pooled = ok(bench.backend.pool_groups(&scores, 1, 11, Pooling { kind, kernel: 3 }));
        let lists = ok(bench.backend.select(&pooled, Select { count: 4, tail: 1 }));
        assert_eq!(ok(bench.backend.read_indices(&lists)), [[0, 1, 2, 3, 11]]);
    }
}

/// A window as long as the prompt: no key is scored, and the window is kept.
pub(crate) fn selection_without_scored_keys<B: Backend>(bench: &Bench<B>) {
    let (scores, _) = random_scores(bench, (2, 3, 4), 5, 5, 1);
    let pooled = ok(bench.backend.pool_groups(&scores, 3, 0, PLAIN));
    assert_eq!(ok(bench.backend.read_scores(&pooled)), [const { Vec::<f32>::new() }; 3]);
    let lists = ok(bench.backend.select(&pooled, Select { count: 2, tail: 5 }));
    assert_eq!(ok(bench.backend.read_indices(&lists)), [[0, 1, 2, 3, 4]; 3]);
    let lists = ok(bench.backend.select(&ok(bench.backend.sum_heads(&pooled)), Select { count: 0, tail: 5 }));
    assert_eq!(ok(bench.backend.read_indices(&lists)), [[0, 1, 2, 3, 4]]);
}

// ---------------------------------------------------------------------------------------------
// The store and lists

pub(crate) fn append_and_gather<B: Backend>(bench: &Bench<B>) {
    let backend = &bench.backend;
    let (heads, head_dim) = (2, 4);
    let shape = (2, heads, head_dim);
    let mut rng = Rng::new(9);
    let width = heads * head_dim;
    let (k, v) = (rng.normals(30 * width, 1.0), rng.normals(30 * width, 1.0));
    // In three pieces, the positions taken from the middle of a longer list with gaps.
    let positions: Vec<usize> = (0..40).map(|i| 3 * i + 1).collect();
    let list = bench.list(positions.iter().copied());
    let mut kv = ok(backend.new_kv(heads, head_dim, 5));
    assert_eq!(backend.kv_lengths(&kv), [0, 0]);
    for rows in [0..1, 1..1, 1..20, 20..30] {
        let part = |values: &[f32]| bench.tensor(width, &values[rows.start * width..rows.end * width]);
        ok(backend.append_kv(&mut kv, &part(&k), &part(&v), &list, 10 + rows.start));
    }
    assert_eq!(backend.kv_lengths(&kv), [30, 30]);
    let expected: Vec<u32> = positions[10..].iter().map(|position| *position as u32).collect();
    assert_eq!(ok(backend.kv_positions(&kv)), [expected.clone(), expected.clone()]);
    let queries = rng.normals(3 * 2 * width, 1.0);
    let (mut scene, queries, _) = Scene::of(bench, shape, queries, &k, &v);
    let out = ok(backend.attention(&queries, &kv, Visible::Aligned));
    scene.check_attention(bench, "appended", &out, |_, row| 28 + row);

    // Cut back to where the first pieces ended, and appended to again: nothing has changed.
    ok(backend.truncate_kv(&mut kv, &[20, 99]));
    assert_eq!(backend.kv_lengths(&kv), [20, 30]);
    ok(backend.truncate_kv(&mut kv, &[20, 20]));
    let last = |values: &[f32]| bench.tensor(width, &values[20 * width..]);
    ok(backend.append_kv(&mut kv, &last(&k), &last(&v), &list, 30));
    assert_eq!(ok(backend.kv_positions(&kv)), [expected.clone(), expected.clone()]);
    let out = ok(backend.attention(&queries, &kv, Visible::Aligned));
    scene.check_attention(bench, "cut back", &out, |_, row| 28 + row);
    assert!(backend.truncate_kv(&mut kv, &[1]).is_err(), "a length for each head");

    // Gathered, and appended to behind that.
    let lists: [Vec<u32>; 2] = [vec![0, 7, 8, 29], vec![1, 2, 3, 28]];
    let mut kv = ok(backend.gather_kv(&kv, &ok(backend.indices(lists.to_vec())), 2));
    let kept = |list: &[u32]| list.iter().map(|row| expected[*row as usize]).collect::<Vec<_>>();
    assert_eq!(ok(backend.kv_positions(&kv)), [kept(&lists[0]), kept(&lists[1])]);
    let more = rng.normals(2 * width, 1.0);
    let rows = bench.tensor(width, &more);
    ok(backend.append_kv(&mut kv, &rows, &rows, &bench.list([500, 501]), 0));
    assert_eq!(backend.kv_lengths(&kv), [6, 6]);
    let more = split(&more, heads, head_dim);
    for head in 0..heads {
        let pick = |rows: &Matrix| -> Matrix {
            lists[head].iter().map(|row| rows[*row as usize].clone()).chain(more[head].clone()).collect()
        };
        scene.keys[head] = pick(&scene.keys[head]);
        scene.values[head] = pick(&scene.values[head]);
    }
    let out = ok(backend.attention(&queries, &kv, Visible::Aligned));
    scene.check_attention(bench, "gathered", &out, |_, row| 4 + row);
    // A gathered store of nothing can be appended to.
    let empty = ok(backend.gather_kv(&kv, &ok(backend.indices(vec![vec![], vec![]])), 0));
    assert_eq!(backend.kv_lengths(&empty), [0, 0]);
}

pub(crate) fn slices_and_lists<B: Backend>(bench: &Bench<B>) {
    let backend = &bench.backend;
    let values: Vec<f32> = (0..35).map(|number| number as f32).collect();
    let x = bench.tensor(5, &values);
    assert_eq!(backend.rows(&x), 7);
    for count in [0, 1, 3, 7] {
        let last = ok(backend.last_rows(&x, count));
        assert_eq!(bench.read(&last), values[5 * (7 - count)..]);
    }
    let rows = bench.list([0, 2, 6]);
    let gathered = ok(backend.gather_rows(&x, &rows));
    assert_eq!(bench.read(&gathered), [&values[..5], &values[10..15], &values[30..]].concat());
    assert!(bench.read(&ok(backend.gather_rows(&x, &bench.list([])))).is_empty());
    let positions = bench.list([10, 20, 30, 40, 50, 60, 70]);
    let gathered = ok(backend.gather_indices(&positions, &rows));
    assert_eq!(ok(backend.read_indices(&gathered)), [[10, 30, 70]]);
    let lists = vec![vec![1, 5], vec![], vec![7]];
    assert_eq!(ok(backend.read_indices(&ok(backend.indices(lists.clone())))), lists);
    assert!(backend.kv_element_bytes() > 0 && backend.chunk_rows() >= 64 && !backend.name().is_empty());
}

/// Operands that do not fit are errors that name the operation.
pub(crate) fn bad_operands_are_errors<B: Backend>(bench: &Bench<B>) {
    fn refused<T: Debug>(operation: &str, result: Result<T, BackendError>) {
        let error = result.expect_err(operation);
        assert!(matches!(error, BackendError::Shape { .. }), "{operation}: {error}");
        let message = error.to_string();
        assert!(message.contains(operation), "{operation}: {message}");
        assert!(message.contains(|c: char| c.is_ascii_digit()), "no numbers: {message}");
    }
    let backend = &bench.backend;
    let x = bench.tensor(8, &[1.0; 24]);
    let narrow = bench.tensor(4, &[1.0; 12]);
    let matrix = bench.weight(&[6, 8], &[1.0; 48]);
    let vector = bench.weight(&[8], &[1.0; 8]);
    let short = bench.weight(&[5], &[1.0; 5]);
    let far = usize::MAX;

    refused("embed", backend.embed(&matrix, &[0, 6]));
    refused("embed", backend.embed(&matrix, &[u32::MAX]));
    refused("embed", backend.embed(&vector, &[0]));
    refused("rms_norm", backend.rms_norm(&x, 0..4, &vector, 1e-5));
    refused("rms_norm", backend.rms_norm(&x, Range { start: 2, end: 1 }, &vector, 1e-5));
    refused("rms_norm", backend.rms_norm(&x, 0..far, &vector, 1e-5));
    refused("rms_norm", backend.rms_norm(&x, 0..1, &short, 1e-5));
    refused("rms_norm", backend.rms_norm(&x, 0..1, &matrix, 1e-5));
    refused("linear", backend.linear(&narrow, &matrix, None));
    refused("linear", backend.linear(&x, &vector, None));
    refused("linear", backend.linear(&x, &matrix, Some(&short)));
    refused("linear", backend.linear(&x, &matrix, Some(&matrix)));
    refused("swiglu", backend.swiglu(bench.tensor(8, &[1.0; 24]), &narrow));
    refused("swiglu", backend.swiglu(bench.tensor(8, &[1.0; 16]), &x));
    let mut sum = bench.tensor(8, &[1.0; 24]);
    refused("add", backend.add(&mut sum, 1, &x));
    refused("add", backend.add(&mut sum, far, &x));
    refused("add", backend.add(&mut sum, 0, &narrow));

    refused("rotary", backend.rotary(&[1.0], &ok(backend.indices(vec![vec![1], vec![2]]))));
    refused("rotary", backend.rotary(&[1.0], &ok(backend.indices(vec![]))));
    refused("rotary", backend.rotary(&[], &bench.list([1])));
    let angles = ok(backend.rotary(&[1.0, 0.5], &bench.list([0, 1, 2])));
    let mut turned = bench.tensor(8, &[1.0; 24]);
    refused("rotate", backend.rotate(&mut turned, &angles, 1));
    refused("rotate", backend.rotate(&mut turned, &angles, far));
    refused("rotate", backend.rotate(&mut bench.tensor(6, &[1.0; 6]), &angles, 0));

    refused("new_kv", backend.new_kv(2, 0, 4));
    refused("new_kv", backend.new_kv(0, 4, 4));
    let mut kv = ok(backend.new_kv(2, 4, 4));
    refused("append_kv", backend.append_kv(&mut kv, &x, &narrow, &bench.list(0..3), 0));
    refused("append_kv", backend.append_kv(&mut kv, &narrow, &narrow, &bench.list(0..3), 0));
    refused("append_kv", backend.append_kv(&mut kv, &x, &bench.tensor(8, &[1.0; 16]), &bench.list(0..3), 0));
    refused("append_kv", backend.append_kv(&mut kv, &x, &x, &bench.list(0..3), 1));
    refused("append_kv", backend.append_kv(&mut kv, &x, &x, &bench.list(0..3), far));
    refused("append_kv", backend.append_kv(&mut kv, &x, &x, &ok(backend.indices(vec![vec![0]; 2])), 0));
    assert_eq!(backend.kv_lengths(&kv), [0, 0], "nothing half-written");
    ok(backend.append_kv(&mut kv, &x, &x, &bench.list(0..3), 0));

    refused("attention", backend.attention(&narrow, &kv, Visible::Aligned));
    refused("attention", backend.attention(&bench.tensor(12, &[1.0; 12]), &kv, Visible::Aligned));
    refused("attention", backend.attention(&bench.tensor(8, &[1.0; 32]), &kv, Visible::Aligned));
    let rows = bench.list([0, 1, 3]);
    refused("attention", backend.attention(&x, &kv, Visible::Rows { rows: &rows, first: 0 }));
    let rows = bench.list([0, 1, 2]);
    refused("attention", backend.attention(&x, &kv, Visible::Rows { rows: &rows, first: 1 }));
    refused("attention", backend.attention(&x, &kv, Visible::Rows { rows: &rows, first: far }));
    let two = ok(backend.indices(vec![vec![0, 1, 2]; 2]));
    refused("attention", backend.attention(&x, &kv, Visible::Rows { rows: &two, first: 0 }));
    refused("window_scores", backend.window_scores(&narrow, &kv));
    refused("window_scores", backend.window_scores(&bench.tensor(8, &[1.0; 32]), &kv));
    let ragged = ok(backend.gather_kv(&kv, &ok(backend.indices(vec![vec![0], vec![1, 2]])), 0));
    refused("window_scores", backend.window_scores(&bench.tensor(8, &[1.0; 8]), &ragged));
    refused("attention", backend.attention(&bench.tensor(8, &[1.0; 16]), &ragged, Visible::Aligned));
    refused("last_rows", backend.attention_with_scores(&x, &kv, 4));
    refused("last_rows", backend.last_rows(&x, 4));

    let (scores, _) = random_scores(bench, (2, 2, 4), 2, 9, 1);
    refused("pool_groups", backend.pool_groups(&scores, 2, 10, PLAIN));
    refused("pool_groups", backend.pool_groups(&scores, 3, 9, PLAIN));
    refused("pool_groups", backend.pool_groups(&scores, 0, 9, PLAIN));
    for kernel in [0, 2, 8] {
        for kind in [PoolingKind::Max, PoolingKind::Average] {
            refused("pool_groups", backend.pool_groups(&scores, 2, 9, Pooling { kind, kernel }));
        }
    }
    refused("select", backend.select(&scores, Select { count: 1, tail: far }));

    refused("gather_rows", backend.gather_rows(&x, &bench.list([3])));
    refused("gather_rows", backend.gather_rows(&x, &two));
    refused("gather_indices", backend.gather_indices(&bench.list([5]), &bench.list([1])));
    refused("gather_indices", backend.gather_indices(&two, &bench.list([1])));
    refused("gather_indices", backend.gather_indices(&bench.list([1]), &two));
    refused("gather_kv", backend.gather_kv(&kv, &bench.list([0]), 0));
    refused("gather_kv", backend.gather_kv(&kv, &ok(backend.indices(vec![vec![0], vec![3]])), 0));
}
