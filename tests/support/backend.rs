//! The CUDA backend on a device, against the CPU backend on the same numbers: operation by operation, and
//! whole models. Numbers are stored in 16 bits, so both begin with the same ones.

use std::fmt::{self, Debug, Display, Formatter};
use std::ops::ControlFlow;

use fastkv::backend::cpu::CpuBackend;
use fastkv::backend::cuda::CudaBackend;
use fastkv::backend::{Backend, BackendError, Bias, Columns, Select, Share, Visible};
use fastkv::cache::Cache;
use fastkv::engine::{
    Control, Engine, EngineError, GenerationOptions, MemoryEstimate, MemoryOptions, Prefill, PrefillOptions,
    Trace,
};
#[cfg(feature = "text")]
use fastkv::eval::{Dialect, NeedlePrompt};
use fastkv::kernels::{DType, MatrixProduct};
use fastkv::measure::{parameters, shape};
use fastkv::model::{Checkpoint, ModelDir, StoredTensor};
use fastkv::policy::{
    AdaKv, Budget, FastGen, FastKv, GemFilter, H2o, HeadKv, HeadScores, Keep, ModelShape, Plan, Policy,
    Pooling, PoolingKind, PyramidInfer, PyramidKv, Random, Settling, SnapKv, Steering, StreamingLlm,
    TokenClasses, Tsp,
};

use super::Check;
use super::probe::{Judged, Probe};
use super::tiny::{self, Rng, Stored, Tiny};

pub(crate) fn checks<D: MatrixProduct + Clone + Debug>() -> Vec<Check<D>> {
    vec![
        Check::hopper("backend_operations", operations),
        Check::hopper("backend_models", models),
        Check::portable("backend_bad_operands", bad_operands),
        Check::portable("backend_caches_are_its_own", |device, _| caches_are_its_own(device)),
        Check::portable("backend_weights_take_what_is_told", |device, _| weights(device)),
        Check::portable("backend_long_prompts_fit", |device, _| long_prompts_fit(device)),
    ]
}

/// A 16-bit type by its two names, and its unit roundoff.
pub(super) const TYPES: [(DType, Stored, f64); 2] =
    [(DType::BF16, Stored::Bf16, 1.0 / 256.0), (DType::F16, Stored::F16, 1.0 / 2048.0)];

/// The share of their size by which activations may be off behind four layers of some ten roundings each, which add up
/// as the root of their number, and grow where a softmax is sharp.
pub(super) fn activations_error(unit: f64) -> f64 {
    12.0 * unit
}

pub(super) fn cuda<D: MatrixProduct + Clone + Debug>(
    device: &D,
    dtype: DType,
) -> Result<CudaBackend<D>, String> {
    CudaBackend::new(device.clone(), "a device under test", dtype).map_err(|error| error.to_string())
}

pub(super) fn cpu() -> Result<CpuBackend, String> {
    CpuBackend::new(Some(1)).map_err(|error| error.to_string())
}

// ---------------------------------------------------------------------------------------------
// Operations

/// What an operation gave.
pub(super) struct Output {
    pub(super) what: &'static str,
    pub(super) numbers: Vec<f32>,
    /// Allowed differences: a share of the number, and a share of the largest of these numbers.
    pub(super) tolerance: [f64; 2],
}

/// The sizes of a scene.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) group: usize,
    pub(super) heads: usize,
    pub(super) head_dim: usize,
    pub(super) rows: usize,
    pub(super) keys: usize,
}

fn operations<D: MatrixProduct + Clone + Debug>(device: &D, seed: u64) -> Result<(), String> {
    let sizes = [
        Sizes { group: 2, heads: 2, head_dim: 64, rows: 19, keys: 90 },
        Sizes { group: 4, heads: 1, head_dim: 128, rows: 70, keys: 70 },
        Sizes { group: 1, heads: 2, head_dim: 96, rows: 8, keys: 33 },
    ];
    let (dtype, stored, unit) = TYPES[seed as usize % 2];
    let (cuda, cpu) = (cuda(device, dtype)?, cpu()?);
    for sizes in sizes {
        let scene = Scene { sizes, stored, unit, seed };
        let failed = |error: BackendError| format!("{sizes:?}, {dtype:?}: {error}");
        let found = scene.outputs(&cuda).map_err(failed)?;
        let expected = scene.outputs(&cpu).map_err(failed)?;
        for (found, expected) in found.iter().zip(&expected) {
            compare(found, expected).map_err(|error| format!("{sizes:?}, {dtype:?}: {error}"))?;
        }
        scene.choices(&cuda).map_err(failed)?;
    }
    match cuda.memory() {
        // The workspace of products, and frequencies.
        (live, peak) if live < peak => Ok(()),
        (live, peak) => Err(format!("{live} bytes in use at the end, {peak} at most: blocks do not go back")),
    }
}

pub(super) fn compare(found: &Output, expected: &Output) -> Result<(), String> {
    let (what, [share, of_largest]) = (expected.what, expected.tolerance);
    if found.numbers.len() != expected.numbers.len() {
        return Err(format!("{what}: {} numbers, not {}", found.numbers.len(), expected.numbers.len()));
    }
    let largest = expected.numbers.iter().fold(0.0, |most: f64, number| most.max(f64::from(number.abs())));
    for (at, (found, expected)) in found.numbers.iter().zip(&expected.numbers).enumerate() {
        let off = (f64::from(*found) - f64::from(*expected)).abs();
        let allowed = share * f64::from(expected.abs()) + of_largest * largest;
        if off.is_nan() || off > allowed {
            return Err(format!(
                "{what}[{at}] is {found:e}, not {expected:e}: off by {off:e} of {allowed:e}"
            ));
        }
    }
    Ok(())
}

/// Numbers to run operations on.
pub(super) struct Scene {
    pub(super) sizes: Sizes,
    pub(super) stored: Stored,
    pub(super) unit: f64,
    pub(super) seed: u64,
}

impl Scene {
    pub(super) fn weight<B: Backend>(
        &self,
        backend: &B,
        shape: &[usize],
        scale: f32,
        seed: u64,
    ) -> Result<B::Weight, BackendError> {
        let values = Rng::new(self.seed * 100 + seed).normals(shape.iter().product(), scale);
        backend.weight(&stored(shape, &values, self.stored))
    }

    /// Activations by way of an embedding; in the model's type where they stand for a product's.
    pub(super) fn rows<B: Backend>(
        &self,
        backend: &B,
        [rows, width]: [usize; 2],
        scale: f32,
        seed: u64,
        narrow: bool,
    ) -> Result<B::Tensor, BackendError> {
        let table = self.weight(backend, &[rows, width], scale, seed)?;
        let x = backend.embed(&table, &(0..rows as u32).collect::<Vec<_>>())?;
        if !narrow {
            return Ok(x);
        }
        let one = |at: usize| if at.is_multiple_of(width + 1) { 1.0 } else { 0.0 };
        let identity: Vec<f32> = (0..width * width).map(one).collect();
        backend.linear(&x, &backend.weight(&stored(&[width, width], &identity, self.stored))?, None)
    }

    /// Keys and values at every third position, in two pieces.
    pub(super) fn store<B: Backend>(&self, backend: &B) -> Result<B::Kv, BackendError> {
        let Sizes { heads, head_dim, keys, .. } = self.sizes;
        let width = heads * head_dim;
        let positions = backend.indices(vec![(0..keys as u32).map(|row| 3 * row + 1).collect()])?;
        let mut kv = backend.new_kv(heads, head_dim, keys / 2)?;
        let first = keys / 3;
        for (at, rows, seed) in [(0, first, 20), (first, keys - first, 22)] {
            let k = self.rows(backend, [rows, width], 1.0, seed, true)?;
            let v = self.rows(backend, [rows, width], 1.0, seed + 1, true)?;
            backend.append_kv(&mut kv, &k, &v, &positions, at)?;
        }
        Ok(kv)
    }

    pub(super) fn queries<B: Backend>(&self, backend: &B, rows: usize) -> Result<B::Tensor, BackendError> {
        let Sizes { group, heads, head_dim, .. } = self.sizes;
        self.rows(backend, [rows, group * heads * head_dim], 1.5, 30, true)
    }

    /// Every operation whose results are numbers.
    fn outputs<B: Backend>(&self, backend: &B) -> Result<Vec<Output>, BackendError> {
        let Sizes { group, heads, head_dim, rows, keys } = self.sizes;
        let width = heads * head_dim;
        let unit = self.unit;
        let mut outputs = Vec::new();
        let mut put = |what, tolerance, numbers| outputs.push(Output { what, numbers, tolerance });
        // A sum of some hundred products in f32, and one rounding of the result.
        let product = [unit, 1e-5];

        let x = self.rows(backend, [rows, width], 1.0, 1, false)?;
        put("embed", [0.0; 2], backend.read(&x)?);
        let norm = self.weight(backend, &[width], 1.0, 2)?;
        put("rms_norm", product, backend.read(&backend.rms_norm(&x, 0..rows, &norm, 1e-5)?)?);
        put(
            "rms_norm of the last",
            product,
            backend.read(&backend.rms_norm(&x, rows - 1..rows, &norm, 1e-5)?)?,
        );
        let matrix = self.weight(backend, &[72, width], 0.1, 3)?;
        let bias = self.weight(backend, &[72], 1.0, 4)?;
        put("linear", product, backend.read(&backend.linear(&x, &matrix, None)?)?);
        put("linear with a bias", product, backend.read(&backend.linear(&x, &matrix, Some(&bias))?)?);
        for (what, vocabulary) in [("logits", 72), ("logits of an odd vocabulary", 73)] {
            let head = self.weight(backend, &[vocabulary, width], 0.1, 3)?;
            put(what, [0.0, 1e-5], backend.read(&backend.logits(&x, &head)?)?);
            put(what, [0.0, 1e-5], backend.read(&backend.logits(&backend.last_rows(&x, 1)?, &head)?)?);
        }
        let gate = self.rows(backend, [rows, width], 3.0, 5, true)?;
        put("swiglu", [2.0 * unit, 1e-5], backend.read(&backend.swiglu(gate, &x)?)?);
        let mut sum = self.rows(backend, [rows, width], 1.0, 6, false)?;
        let added = self.rows(backend, [rows - 3, width], 1.0, 7, true)?;
        backend.add(&mut sum, 2, &added)?;
        put("add", [1e-6; 2], backend.read(&sum)?);
        put("add_norm", product, backend.read(&backend.add_norm(&mut sum, 3, &added, &norm, 1e-5)?)?);
        put("add_norm's sum", [1e-6; 2], backend.read(&sum)?);
        put("last_rows", [0.0; 2], backend.read(&backend.last_rows(&x, 3)?)?);
        let some = backend.indices(vec![vec![1, 3, rows as u32 - 1]])?;
        put("gather_rows", [0.0; 2], backend.read(&backend.gather_rows(&x, &some)?)?);

        let frequencies: Vec<f32> = (0..head_dim / 2).map(|i| 0.8_f32.powi(i as i32)).collect();
        let positions = backend.indices(vec![(0..rows as u32 + 5).map(|row| 3 * row + row % 2).collect()])?;
        let angles = backend.rotary(&frequencies, &positions)?;
        let mut turned = self.rows(backend, [rows, width], 1.0, 8, true)?;
        backend.rotate(&mut turned, &angles, 5)?;
        // An angle of some hundred radians is off by 1e-5 of them.
        put("rotate", [unit, 1e-4], backend.read(&turned)?);
        let gathered = backend.gather_indices(&positions, &some)?;
        put("gather_indices", [0.0; 2], flat(&backend.read_indices(&gathered)?));

        // Probabilities are rounded before they meet the values, and so is the result; its magnitude is at
        // most that of the values.
        let attended = [unit, 2.0 * unit];
        let scored = [2e-3, 1e-6];
        let kv = self.store(backend)?;
        put("kv_positions", [0.0; 2], flat(&backend.kv_positions(&kv)?));
        let queries = self.queries(backend, rows)?;
        put("attention", attended, backend.read(&backend.attention(&queries, &kv, Visible::Aligned)?)?);
        let last = backend.last_rows(&queries, 1)?;
        put("attention of one", attended, backend.read(&backend.attention(&last, &kv, Visible::Aligned)?)?);
        let seen: Vec<u32> = (0..rows as u32).map(|row| (row + 1) * keys as u32 / rows as u32 - 1).collect();
        let seen = backend.indices(vec![[&[0, 0][..], &seen].concat()])?;
        let of_rows = backend.attention(&queries, &kv, Visible::Rows { rows: &seen, first: 2 })?;
        put("attention of selected rows", attended, backend.read(&of_rows)?);
        let window = backend.last_rows(&queries, rows.min(8))?;
        put("window_scores", scored, backend.read_scores(&backend.window_scores(&window, &kv)?)?.concat());
        let (out, scores) = backend.attention_with_scores(&queries, &kv, rows.min(8))?;
        put("attention, scored", attended, backend.read(&out)?);
        put("scores of attention", scored, backend.read_scores(&scores)?.concat());
        let products = backend.query_key_products(&last, &kv)?;
        put("query_key_products", [0.0, 1e-5], backend.read_scores(&products)?.concat());
        for (kind, kernel) in [(PoolingKind::Max, 7), (PoolingKind::Average, 5), (PoolingKind::Max, 1)] {
            let pooled = backend.pool_groups(&scores, heads, keys - 8, Pooling { kind, kernel })?;
            put("pool_groups", scored, backend.read_scores(&pooled)?.concat());
            put("sum_heads", scored, backend.read_scores(&backend.sum_heads(&pooled)?)?.concat());
        }

        // Lists of different lengths, appended to and cut back.
        let list = |head: usize| (0..keys as u32).filter(|row| row % (head as u32 + 2) != 1).collect();
        let lists: Vec<Vec<u32>> = (0..heads).map(list).collect();
        let mut kept = backend.gather_kv(&kv, &backend.indices(lists)?, 2)?;
        put("gather_kv", [0.0; 2], flat(&backend.kv_positions(&kept)?));
        put(
            "attention of ragged heads",
            attended,
            backend.read(&backend.attention(&last, &kept, Visible::Aligned)?)?,
        );
        for round in 0..2 {
            let more = self.rows(backend, [2, width], 1.0, 40, true)?;
            let at = backend.indices(vec![vec![0, 7000, 7001]])?;
            backend.append_kv(&mut kept, &more, &more, &at, 1)?;
            let two = self.rows(backend, [2, group * width], 1.0, 41, true)?;
            put(
                "attention of two",
                attended,
                backend.read(&backend.attention(&two, &kept, Visible::Aligned)?)?,
            );
            put("positions", [0.0; 2], flat(&backend.kv_positions(&kept)?));
            if round == 0 {
                let lengths: Vec<usize> = backend.kv_lengths(&kept).iter().map(|length| length - 1).collect();
                backend.truncate_kv(&mut kept, &lengths)?;
            }
        }
        self.sums(backend, &kv, &kept, &mut put)?;
        let regathered: Vec<Vec<u32>> = (0..heads).map(|head| vec![0, 2, 3 + head as u32]).collect();
        let kept = backend.gather_kv(&kept, &backend.indices(regathered)?, 0)?;
        put("gather_kv of ragged heads", [0.0; 2], flat(&backend.kv_positions(&kept)?));
        put(
            "attention of what is left",
            attended,
            backend.read(&backend.attention(&last, &kept, Visible::Aligned)?)?,
        );
        Ok(outputs)
    }

    /// What policies need beyond windows of queries, and steering: over a store of the whole prompt and a
    /// compacted one.
    fn sums<B: Backend>(
        &self,
        backend: &B,
        kv: &B::Kv,
        ragged: &B::Kv,
        put: &mut impl FnMut(&'static str, [f64; 2], Vec<f32>),
    ) -> Result<(), BackendError> {
        let Sizes { group, heads, rows, keys, .. } = self.sizes;
        let (attended, scored) = ([self.unit, 2.0 * self.unit], [3e-3, 1e-5]);
        let steered: Vec<bool> = (0..group * heads).map(|head| head % 3 != 1).collect();
        let highlighted: Vec<bool> = (0..3 * keys - 20).map(|position| position % 7 < 3).collect();
        let bias = Bias { heads: &steered, highlighted: &highlighted, amount: -1.5 };
        let queries = self.queries(backend, rows)?;
        let one = backend.last_rows(&queries, 1)?;
        let window = backend.last_rows(&queries, 8)?;
        // More than the kernel of decoding takes.
        let nine = self.queries(backend, 9)?;

        let steer = |queries: &B::Tensor, kv: &B::Kv| {
            backend.read(&backend.biased_attention(queries, kv, Visible::Aligned, &bias)?)
        };
        put("steered attention", attended, steer(&queries, kv)?);
        put("steered attention of one", attended, steer(&one, kv)?);
        put("steered attention of ragged heads", attended, steer(&nine, ragged)?);
        put("steered attention of one, ragged", attended, steer(&one, ragged)?);
        let seen: Vec<u32> = (0..rows as u32).map(|row| (row + 1) * keys as u32 / rows as u32 - 1).collect();
        let visible = Visible::Rows { rows: &backend.indices(vec![seen])?, first: 0 };
        let of_rows = backend.biased_attention(&queries, kv, visible, &bias)?;
        put("steered attention of selected rows", attended, backend.read(&of_rows)?);
        let nobody = Bias { heads: &vec![false; group * heads], ..bias };
        let plain = backend.biased_attention(&queries, kv, Visible::Aligned, &nobody)?;
        put("attention with no head steered", attended, backend.read(&plain)?);
        let scores = |kv: &B::Kv| backend.read_scores(&backend.biased_window_scores(&window, kv, &bias)?);
        put("steered scores", scored, scores(kv)?.concat());
        // As many of each head, but others.
        let lists: Vec<Vec<u32>> =
            (0..heads).map(|head| (0..30).map(|entry| entry + head as u32 % 3).collect()).collect();
        let alike = backend.gather_kv(kv, &backend.indices(lists)?, 0)?;
        put("steered scores of other tokens", scored, scores(&alike)?.concat());

        let every = Columns { weight: 1.0, step: 0.0, band: None };
        let ways = [
            every,
            Columns { band: Some(0), ..every },
            Columns { band: Some(7), ..every },
            Columns { weight: 0.5, step: 0.01, band: None },
            Columns { band: Some(usize::MAX), ..every },
        ];
        for (at, columns) in ways.into_iter().enumerate() {
            for bias in [None, Some(&bias)].into_iter().skip(at % 2) {
                let sums = backend.column_sums(&queries, kv, columns, bias)?;
                put("column_sums", scored, backend.read_scores(&sums)?.concat());
            }
        }
        for queries in [&one, &nine] {
            for bias in [None, Some(&bias)] {
                let sums = backend.column_sums(queries, ragged, every, bias)?;
                put("column_sums of ragged heads", scored, backend.read_scores(&sums)?.concat());
            }
        }
        let none = backend.column_sums(&backend.last_rows(&queries, 0)?, kv, every, None)?;
        put("column_sums of no query", [0.0; 2], backend.read_scores(&none)?.concat());
        let (out, both) = backend.attention_with_columns(&queries, kv, &ways[1..4], Some(&bias))?;
        put("attention with columns", attended, backend.read(&out)?);
        for sums in &both {
            put("columns of attention", scored, backend.read_scores(sums)?.concat());
        }

        let [long, short] = [kv, ragged].map(|kv| backend.column_sums(&one, kv, every, None));
        let (long, short) = (long?, short?);
        for (a, b) in [(&long, &short), (&short, &long), (&long, &long)] {
            let sum = backend.add_scores(a, b)?;
            put("add_scores", scored, backend.read_scores(&sum)?.concat());
        }
        let list = |head: usize| (0..keys as u32 / 2).step_by(head + 2).collect();
        let lists = backend.indices((0..heads).map(list).collect())?;
        let mut gathered = backend.gather_scores(&long, &lists)?;
        put("gather_scores", scored, backend.read_scores(&gathered)?.concat());
        let positions = (0..keys as u32).map(|key| if key % 9 == 4 { 1000 } else { 2 * key }).collect();
        let highlighted: Vec<bool> = (0..2 * keys).map(|position| [2, 8, 10].contains(&position)).collect();
        backend.raise_scores(&mut gathered, &backend.indices(vec![positions])?, &highlighted)?;
        let kept = backend.select(&gathered, Select { count: 2, tail: 0 })?;
        put("raise_scores", [0.0; 2], flat(&backend.read_indices(&kept)?));
        // Lists of a selection, of different lengths.
        let counts: Vec<usize> = (0..heads).map(|head| 5 - head % 3).collect();
        let chosen = backend.select_each(&gathered, &counts, 0)?;
        let gathered = backend.gather_scores(&long, &chosen)?;
        put("gather_scores of a selection", scored, backend.read_scores(&gathered)?.concat());

        let mut store = self.store(backend)?;
        // As many of each head, but others.
        let list =
            |head: usize| (0..keys as u32 / 3 * 3).filter(|entry| (entry + head as u32) % 3 != 1).collect();
        backend.retain_kv(&mut store, &backend.indices((0..heads).map(list).collect())?)?;
        put("retain_kv", [0.0; 2], flat(&backend.kv_positions(&store)?));
        put("attention of the retained", attended, steer(&one, &store)?);
        put("attention of nine to the retained", attended, steer(&nine, &store)?);
        let more = self.rows(backend, [2, heads * self.sizes.head_dim], 1.0, 50, true)?;
        backend.append_kv(&mut store, &more, &more, &backend.indices(vec![vec![900, 901]])?, 0)?;
        let lists = (0..heads as u32).map(|head| vec![head, 5, 9 + head]).collect();
        backend.retain_kv(&mut store, &backend.indices(lists)?)?;
        put("retain_kv again", [0.0; 2], flat(&backend.kv_positions(&store)?));
        backend.retain_kv(&mut store, &backend.indices(vec![vec![]; heads])?)?;
        put("retain_kv of nothing", [0.0; 2], backend.kv_lengths(&store).iter().map(|n| *n as f32).collect());
        Ok(())
    }

    /// Selection, held to what sorting chooses on the very scores that the backend ranks.
    fn choices<B: Backend>(&self, backend: &B) -> Result<(), BackendError> {
        let Sizes { heads, keys, .. } = self.sizes;
        let window = 8;
        let scored = keys - window;
        let store = self.store(backend)?;
        let scores = backend.window_scores(&self.queries(backend, window)?, &store)?;
        let pooling = Pooling { kind: PoolingKind::Max, kernel: 7 };
        let groups = backend.pool_groups(&scores, heads, scored, pooling)?;
        let numbers = backend.read_scores(&groups)?;
        let expected = |counts: &[usize], tail: usize| -> Vec<Vec<u32>> {
            let of_head = |(numbers, count): (&Vec<f32>, &usize)| best(numbers, *count, tail);
            numbers.iter().zip(counts).map(of_head).collect()
        };
        for count in [0, 1, 5, scored - 1, scored, scored + 9] {
            let found = backend.read_indices(&backend.select(&groups, Select { count, tail: window })?)?;
            assert_eq!(found, expected(&vec![count; heads], window), "{count} of {numbers:?}");
        }
        let counts: Vec<usize> = (0..heads).map(|head| 3 + 4 * head).collect();
        let found = backend.read_indices(&backend.select_each(&groups, &counts, window)?)?;
        assert_eq!(found, expected(&counts, window), "{counts:?} of {numbers:?}");

        let share = Share { mean: 6, assured: 1, floor: 0.2, tail: window };
        let kept = backend.count_kv(backend.gather_kv_shared(&store, &groups, share, 3)?)?;
        let all = best(&numbers.concat(), 6 * heads, 0);
        let of_head = |head: usize| {
            let picks = all.iter().filter(|key| **key as usize / scored == head).count();
            let sure = picks.min(1);
            sure + ((picks - sure) as f64 * 0.8 + 1.0).round_ties_even() as usize
        };
        let counts: Vec<usize> = (0..heads).map(of_head).collect();
        let lists = expected(&counts, window);
        let copy = backend.gather_kv(&store, &backend.indices(lists)?, 3)?;
        assert_eq!(backend.kv_lengths(&kept), backend.kv_lengths(&copy), "{counts:?} of {numbers:?}");
        assert_eq!(backend.kv_positions(&kept)?, backend.kv_positions(&copy)?, "{counts:?} of {numbers:?}");
        let query = self.queries(backend, 1)?;
        let attention = |kv: &B::Kv| backend.read(&backend.attention(&query, kv, Visible::Aligned)?);
        assert_eq!(attention(&kept)?, attention(&copy)?, "the entries themselves");
        Ok(())
    }
}

/// The best keys and those of the tail, ascending; ties go to the lower key.
fn best(numbers: &[f32], count: usize, tail: usize) -> Vec<u32> {
    let mut keys: Vec<usize> = (0..numbers.len()).collect();
    keys.sort_by(|a, b| numbers[*b].total_cmp(&numbers[*a]).then(a.cmp(b)));
    keys.truncate(count);
    keys.sort_unstable();
    keys.into_iter().chain(numbers.len()..numbers.len() + tail).map(|key| key as u32).collect()
}

pub(super) fn flat(lists: &[Vec<u32>]) -> Vec<f32> {
    lists.iter().flatten().map(|number| *number as f32).collect()
}

/// A tensor as it is found in a file.
fn stored(shape: &[usize], values: &[f32], stored: Stored) -> StoredTensor {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let tensor =
        tiny::Tensor { name: "tensor".to_owned(), stored, shape: shape.to_vec(), values: values.to_vec() };
    tiny::write_safetensors(directory.path(), &[tensor], 0);
    Checkpoint::open(directory.path()).expect("a checkpoint").tensor("tensor", shape).expect("a tensor")
}

/// What does not fit is an error that names the operation; what is missing, one that names it.
fn bad_operands<D: MatrixProduct + Clone + Debug>(device: &D, _: u64) -> Result<(), String> {
    fn refused<T: Debug>(operation: &str, result: Result<T, BackendError>) -> Result<(), String> {
        match result {
            Err(error) if error.to_string().contains(operation) => Ok(()),
            Err(error) => Err(format!("{operation}: {error}")),
            Ok(value) => Err(format!("{operation} took it: {value:?}")),
        }
    }
    let error = CudaBackend::new(device.clone(), "", DType::F32).err().ok_or("products in f32")?;
    refused("F32", Err::<(), _>(error))?;
    let backend = cuda(device, DType::BF16)?;
    let sizes = Sizes { group: 1, heads: 2, head_dim: 64, rows: 3, keys: 12 };
    let scene = Scene { sizes, stored: Stored::Bf16, unit: 0.0, seed: 1 };
    let run = || -> Result<_, BackendError> {
        let x = scene.rows(&backend, [3, 128], 1.0, 1, true)?;
        let narrow = scene.rows(&backend, [3, 64], 1.0, 2, true)?;
        let matrix = scene.weight(&backend, &[72, 128], 1.0, 3)?;
        let vector = scene.weight(&backend, &[128], 1.0, 3)?;
        Ok((x, narrow, matrix, vector, scene.store(&backend)?))
    };
    let (mut x, narrow, matrix, vector, mut kv) = run().map_err(|error| error.to_string())?;
    refused("embed", backend.embed(&matrix, &[72]))?;
    refused("rms_norm", backend.rms_norm(&x, 0..4, &vector, 1e-5))?;
    refused("rms_norm", backend.rms_norm(&narrow, 0..1, &vector, 1e-5))?;
    refused("linear", backend.linear(&narrow, &matrix, None))?;
    refused("linear", backend.linear(&x, &vector, None))?;
    refused("linear", backend.linear(&x, &matrix, Some(&vector)))?;
    refused(
        "swiglu",
        backend.swiglu(scene.rows(&backend, [3, 64], 1.0, 2, true).map_err(|error| error.to_string())?, &x),
    )?;
    refused("add", backend.add(&mut x, 0, &narrow))?;
    refused("add", backend.add(&mut x, usize::MAX, &narrow))?;
    refused("add_norm", backend.add_norm(&mut x, 0, &narrow, &vector, 1e-5))?;
    let stream = scene.rows(&backend, [3, 128], 1.0, 1, false).map_err(|error| error.to_string())?;
    refused("add_norm", backend.add_norm(&mut x, 0, &stream, &vector, 1e-5))?;
    refused("add_norm", backend.add_norm(&mut x, 1, &stream, &vector, 1e-5))?;
    refused("new_kv", backend.new_kv(0, 64, 1))?;
    let lists = |lists: Vec<Vec<u32>>| backend.indices(lists).map_err(|error| error.to_string());
    refused("append_kv", backend.append_kv(&mut kv, &x, &narrow, &lists(vec![vec![0, 1, 2]])?, 0))?;
    refused("append_kv", backend.append_kv(&mut kv, &x, &x, &lists(vec![vec![0, 1, 2]])?, 1))?;
    refused("attention", backend.attention(&narrow, &kv, Visible::Aligned))?;
    let rows = lists(vec![vec![0, 1]])?;
    refused("attention", backend.attention(&x, &kv, Visible::Rows { rows: &rows, first: 0 }))?;
    refused("last_rows", backend.last_rows(&x, 4))?;
    refused("gather_kv", backend.gather_kv(&kv, &rows, 0))?;
    refused("truncate_kv", backend.truncate_kv(&mut kv, &[1]))?;
    let every = Columns { weight: 1.0, step: 0.0, band: None };
    let bias = Bias { heads: &[true; 3], highlighted: &[], amount: -1.0 };
    refused("attention", backend.biased_attention(&x, &kv, Visible::Aligned, &bias))?;
    refused("window_scores", backend.biased_window_scores(&x, &kv, &bias))?;
    refused("column_sums", backend.column_sums(&x, &kv, every, Some(&bias)))?;
    refused("column_sums", backend.column_sums(&narrow, &kv, every, None))?;
    refused("weight", backend.column_sums(&x, &kv, Columns { weight: f32::NAN, ..every }, None))?;
    let endless = Bias { heads: &[true; 2], highlighted: &[false], amount: f32::NEG_INFINITY };
    refused("bias.value", backend.biased_attention(&x, &kv, Visible::Aligned, &endless))?;
    refused("retain_kv", backend.retain_kv(&mut kv, &rows))?;
    refused("retain_kv", backend.retain_kv(&mut kv, &lists(vec![vec![0; 13]; 2])?))?;
    let mut scores = backend.window_scores(&x, &kv).map_err(|error| error.to_string())?;
    let total = backend.sum_heads(&scores).map_err(|error| error.to_string())?;
    refused("add_scores", backend.add_scores(&scores, &total))?;
    refused("gather_scores", backend.gather_scores(&scores, &rows))?;
    refused("raise_scores", backend.raise_scores(&mut scores, &lists(vec![vec![0; 20]; 2])?, &[true]))?;
    refused("raise_scores", backend.raise_scores(&mut scores, &lists(vec![vec![0; 2]])?, &[true]))?;
    let share = Share { mean: 1, assured: 0, floor: 0.5, tail: 3 };
    refused("gather_kv_shared", backend.gather_kv_shared(&kv, &scores, share, 0))?;
    refused("gather_kv_shared", backend.gather_kv_shared(&kv, &scores, Share { floor: 1.5, ..share }, 0))?;
    let pooling = Pooling { kind: PoolingKind::Max, kernel: 7 };
    refused("pool_groups", backend.pool_groups(&scores, 2, 13, pooling))?;
    refused("select", backend.select(&scores, Select { count: 1, tail: usize::MAX }))
}

// ---------------------------------------------------------------------------------------------
// Models

/// A random model with heads that there are kernels for.
pub(super) fn model(stored: Stored) -> Tiny {
    Tiny {
        layers: 4,
        hidden: 64,
        intermediate: 96,
        query_heads: 2,
        kv_heads: 1,
        head_dim: 64,
        vocabulary: 72,
        bias: stored == Stored::F16,
        stored,
        ..Tiny::default()
    }
}

/// A policy, and whether heads are steered.
type Reading = (Policy, bool);

/// Scores of heads that differ.
pub(super) fn head_scores(shape: ModelShape) -> HeadScores {
    let mut scores = HeadScores::default();
    for layer in 0..shape.layers {
        for head in 0..shape.query_heads {
            scores.add(layer, head, (1 + layer + 2 * head) as f64);
        }
    }
    scores
}

/// Every policy, every composition, and some of them steered.
fn readings(shape: ModelShape) -> Vec<Reading> {
    let (keep, half) = (Budget::Rate(0.25), Budget::Rate(0.5));
    let heads = head_scores(shape);
    let classes = TokenClasses { special: [0, 1].into(), punctuation: (2..9).collect() };
    let caches = [
        Policy::SnapKv(SnapKv { retention: half, ..SnapKv::default() }),
        Policy::PyramidKv(PyramidKv { retention: half, ..PyramidKv::default() }),
        Policy::AdaKv(AdaKv { retention: half, ..AdaKv::default() }),
        Policy::HeadKv(HeadKv { retention: half, heads, ..HeadKv::default() }),
        Policy::H2o(H2o { window: 8, retention: keep }),
        Policy::FastGen(FastGen { recovery: 0.7, local: 0.5, frequent: 0.0, classes }),
        Policy::StreamingLlm(StreamingLlm { retention: keep, ..StreamingLlm::default() }),
        Policy::Random(Random { retention: keep, ..Random::default() }),
    ];
    let compose = |cache: &Policy| Policy::Tsp(Tsp { propagation: half, ..Tsp::with(cache.clone()) });
    let mut policies: Vec<Policy> = caches.iter().map(compose).collect();
    policies.extend([
        Policy::FastKv(FastKv { retention: keep, propagation: half, ..FastKv::proportional() }),
        Policy::GemFilter(GemFilter { retention: half, ..GemFilter::default() }),
        Policy::PyramidInfer(PyramidInfer { recent: 0.1, ..PyramidInfer::default() }),
        Policy::FastGen(FastGen { recovery: 0.8, ..FastGen::default() }),
    ]);
    policies.extend(caches);
    let steered: Vec<Policy> = policies.iter().step_by(4).chain(&policies[9..11]).cloned().collect();
    let plain = policies.into_iter().map(|policy| (policy, false));
    plain.chain(steered.into_iter().map(|policy| (policy, true))).collect()
}

fn models<D: MatrixProduct + Clone + Debug>(device: &D, seed: u64) -> Result<(), String> {
    let kv_heads = 1 + seed as usize / 2 % 2;
    let tiny = Tiny { seed: seed + 1, kv_heads, ..model(TYPES[seed as usize % 2].1) };
    let shape = ModelShape { layers: tiny.layers, query_heads: 2, kv_heads, head_dim: tiny.head_dim };
    // Seeds share the policies, which take the emulator a second each.
    let own = readings(shape).into_iter().skip(seed as usize % 4).step_by(4);
    let readings: Vec<Reading> = [(Policy::Full, false)].into_iter().chain(own).collect();
    // Chunks of 64 rows: the prompt takes two.
    read_prompts(device, seed, &tiny, [100, 64], &readings)?;
    if seed == 0 { settles(device, &tiny) } else { Ok(()) }
}

/// The cache of another backend lies in memory of another device, however alike the two are.
fn caches_are_its_own<D: MatrixProduct + Clone + Debug>(device: &D) -> Result<(), String> {
    let directory = model(Stored::Bf16).write();
    let model = ModelDir::open(directory.path()).map_err(|error| error.to_string())?;
    let engine = || Engine::load(cuda(device, DType::BF16)?, &model).map_err(|error| error.to_string());
    let (own, other) = (engine()?, engine()?);
    let control = Control::default();
    let plan = Policy::Full.plan(own.shape(), 3).map_err(|error| error.to_string())?;
    let read = own.prefill(&[1, 2, 3], &plan, &PrefillOptions::default(), &control);
    let Prefill { mut cache, logits, .. } = read.map_err(|error| error.to_string())?;
    let options = GenerationOptions { max_tokens: 2, ..GenerationOptions::default() };
    let appended = other.append(&mut cache, &[4], &control).map(|_| ());
    let generated = other.generate(&mut cache, logits.clone(), &options, &control, |_| ()).map(|_| ());
    for refused in [appended, generated] {
        match refused {
            Err(EngineError::ForeignCache { .. }) => {}
            other => return Err(format!("another backend's cache: {other:?}")),
        }
    }
    own.append(&mut cache, &[4], &control).map(|_| ()).map_err(|error| format!("its own: {error}"))
}

/// Weights take as many bytes as are told before they are loaded: a tied output projection none, f32 half.
fn weights<D: MatrixProduct + Clone + Debug>(device: &D) -> Result<(), String> {
    for (tied, stored, dtype) in [
        (true, Stored::Bf16, DType::BF16),
        (false, Stored::F16, DType::F16),
        (true, Stored::F32, DType::BF16),
    ] {
        let directory = Tiny { tied, stored, ..Tiny::default() }.write();
        let model = ModelDir::open(directory.path()).map_err(|error| error.to_string())?;
        let backend = cuda(device, dtype)?;
        let before = backend.memory().0;
        let told: u64 = model.weights.tensors().map(|tensor| backend.weight_bytes(tensor)).sum();
        let mut heard = Vec::new();
        let engine = Engine::load_with(backend, &model, |done, total| {
            heard.push(done);
            if total == model.weights.total_bytes() {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        });
        let engine = engine.map_err(|error| error.to_string())?;
        let taken = (engine.backend().memory().0 - before) as u64;
        if taken != told || told != 2 * model.weights.tensors().map(|tensor| tensor.len() as u64).sum::<u64>()
        {
            return Err(format!("tied: {tied}, {stored:?}: {taken} bytes, where {told} were told"));
        }
        if !heard.is_sorted() || heard.last() != Some(&model.weights.total_bytes()) {
            return Err(format!("the bar of progress went {heard:?}"));
        }
        let cancelled = Engine::load_with(cuda(device, dtype)?, &model, |_, _| ControlFlow::Break(()));
        if !matches!(cancelled, Err(EngineError::Cancelled)) {
            return Err("loaded although it was cancelled".into());
        }
    }
    Ok(())
}

/// 128K tokens of Llama 3.1 8B fit into 80 GB with full context: they take half, of which a chunk's temporaries are
/// little. With FastKV they take less by almost all of the keys and values, which are 17 GB.
fn long_prompts_fit<D: MatrixProduct + Clone + Debug>(device: &D) -> Result<(), String> {
    let config = shape("llama-3.1-8b").ok_or("a shape")?;
    let options = MemoryOptions::new(&cuda(device, DType::BF16)?, 2 * parameters(&config), 1000);
    let needed = |policy: Policy| {
        let plan = policy.plan(ModelShape::from(&config), 131_072).map_err(|error| error.to_string())?;
        Ok::<_, String>(MemoryEstimate::new(&config, &plan, &options))
    };
    let (full, fastkv) = (needed(Policy::Full)?, needed(Policy::FastKv(FastKv::proportional()))?);
    if full.check(40_000_000_000).is_err() || fastkv.total() + 14_000_000_000 > full.total() {
        return Err(format!("full context takes {full}, FastKV {fastkv}"));
    }
    Ok(())
}

/// The TSP layer is picked on the device, and all else is as with one that is fixed there.
fn settles<D: MatrixProduct + Clone + Debug>(device: &D, tiny: &Tiny) -> Result<(), String> {
    let (dtype, _, unit) = TYPES[0];
    let directory = tiny.write();
    let model = ModelDir::open(directory.path()).map_err(|error| error.to_string())?;
    let error = |error: EngineError| error.to_string();
    let cuda = Engine::load(cuda(device, dtype)?.with_chunk_rows(64), &model).map_err(error)?;
    let ids = Rng::new(8).ids(100, tiny.vocabulary);
    let read = |tsp_layer, settling, exact_shortcuts| {
        let (retention, propagation) = (Budget::Rate(0.25), Budget::Rate(0.5));
        let policy =
            FastKv { retention, propagation, tsp_layer: Some(tsp_layer), settling, ..FastKv::proportional() };
        let plan = Policy::FastKv(policy).plan(cuda.shape(), 100).map_err(|error| error.to_string())?;
        let options = PrefillOptions { exact_shortcuts, trace: true, slack: 0 };
        let prefill = cuda.prefill(&ids, &plan, &options, &Control::default()).map_err(error)?;
        let trace = prefill.trace.ok_or("no trace")?;
        Ok::<_, String>((trace.layers, trace.settled, prefill.logits))
    };
    // Sets of two layers share about half of their tokens by chance.
    let settling = Some(Settling { first: Some(0), overlap: 0.3 });
    let (layers, found, logits) = read(2, settling, false)?;
    let picked = found.and_then(|found| found.layer).ok_or("no layer was picked")?;
    let (expected, _, expected_logits) = read(picked, None, false)?;
    if picked != 1 || layers != expected || logits != expected_logits {
        return Err(format!("picked layer {picked}, and it is not as if that were fixed"));
    }
    let (_, found, shortcut) = read(2, settling, true)?;
    if found.and_then(|found| found.layer) != Some(picked) {
        return Err("another layer is picked where scores come before attention".into());
    }
    near("logits", &shortcut, &logits, activations_error(unit))
}

/// Layers of a width, and a prompt of a length, that only a GPU has the time for.
pub(crate) fn llama<D: MatrixProduct + Clone + Debug>(device: &D) -> Result<(), String> {
    let shape = Tiny {
        layers: 3,
        hidden: 1024,
        intermediate: 2048,
        query_heads: 8,
        kv_heads: 2,
        head_dim: 128,
        vocabulary: 1000,
        ..Tiny::default()
    };
    let policies = [
        Policy::Full,
        Policy::FastKv(FastKv::proportional()),
        Policy::SnapKv(SnapKv::default()),
        Policy::H2o(H2o::default()),
        Policy::PyramidInfer(PyramidInfer::default()),
    ];
    let readings = policies.map(|policy| (policy, false));
    for (seed, (_, stored, _)) in TYPES.into_iter().enumerate() {
        let tiny = Tiny { stored, ..shape.clone() };
        read_prompts(device, seed as u64, &tiny, [3000, 1024], &readings)?;
    }
    Ok(())
}

fn read_prompts<D: MatrixProduct + Clone + Debug>(
    device: &D,
    seed: u64,
    tiny: &Tiny,
    [tokens, chunk_rows]: [usize; 2],
    readings: &[Reading],
) -> Result<(), String> {
    let (dtype, _, unit) = TYPES[seed as usize % 2];
    let directory = tiny.write();
    let model = ModelDir::open(directory.path()).map_err(|error| error.to_string())?;
    let error = |error: EngineError| error.to_string();
    let cuda = Engine::load(cuda(device, dtype)?.with_chunk_rows(chunk_rows), &model).map_err(error)?;
    let mut probe = Probe::new(chunk_rows);
    probe.inner = CpuBackend::new(None).map_err(|error| error.to_string())?;
    let cpu = Engine::load(probe, &model).map_err(error)?;
    let ids = Rng::new(seed + 7).ids(tokens, tiny.vocabulary);
    let mut agreement = Agreement::default();
    for (at, (policy, steered)) in readings.iter().enumerate() {
        let plan = policy.plan(cpu.shape(), ids.len());
        let plan = plan.and_then(|plan| if *steered { plan.steer(steering(cpu.shape())) } else { Ok(plan) });
        let plan = plan.map_err(|error| error.to_string())?;
        // The baseline in both ways, the others by turns.
        let ways = if at == 0 { vec![true, false] } else { vec![at % 2 == 0] };
        for exact_shortcuts in ways {
            let options = PrefillOptions { exact_shortcuts, trace: true, slack: 1 };
            agree(&cuda, &cpu, &ids, &plan, &options, unit, &mut agreement).map_err(|error| {
                format!("{}, steered: {steered}, {dtype:?}, {options:?}: {error}", policy.name())
            })?;
        }
    }
    eprintln!("{tokens} tokens, {dtype:?}, {} readings: {agreement}", readings.len());
    Ok(())
}

/// A head of each layer looks at two spans.
fn steering(shape: ModelShape) -> Steering {
    let heads = (0..shape.layers).map(|layer| (layer, layer % shape.query_heads)).collect();
    Steering { spans: vec![10..14, 60..61], heads, alpha: 0.05 }
}

/// The shipped model finds in a prompt of its own words what it finds on the CPU.
#[cfg(feature = "text")]
pub(crate) fn needle<D: MatrixProduct + Clone + Debug>(device: &D) -> Result<(), String> {
    let run = || -> Result<(), Box<dyn std::error::Error>> {
        let model = ModelDir::open("models/needle")?;
        let tokenizer = model.tokenizer()?;
        let dialect = Dialect::from_directory(&model.path)?;
        let task = dialect.task("multikey")?;
        let cuda = Engine::load(cuda(device, DType::BF16)?, &model)?;
        let cpu = Engine::load(CpuBackend::new(None)?, &model)?;
        for seed in 0..4 {
            let prompt = NeedlePrompt::generate(&dialect, task, 2000, seed)?;
            let ids = tokenizer.encode(&prompt.text(), true)?;
            for policy in [Policy::Full, Policy::FastKv(FastKv::proportional())] {
                let plan = policy.plan(cpu.shape(), ids.len())?;
                let (found, expected) = (answer(&cuda, &ids, &plan)?, answer(&cpu, &ids, &plan)?);
                if found != expected {
                    let [found, expected] = [found, expected].map(|tokens| tokenizer.decode(&tokens, true));
                    let (found, expected) = (found?, expected?);
                    return Err(
                        format!("{}: {found:?}, where the cpu says {expected:?}", policy.name()).into()
                    );
                }
            }
        }
        Ok(())
    };
    run().map_err(|error| error.to_string())
}

/// Three tokens behind a prompt.
#[cfg(feature = "text")]
fn answer<B: Backend>(engine: &Engine<B>, ids: &[u32], plan: &Plan) -> Result<Vec<u32>, EngineError> {
    let control = Control::default();
    let mut prefill = engine.prefill(ids, plan, &PrefillOptions::default(), &control)?;
    let options = GenerationOptions { max_tokens: 3, ..GenerationOptions::default() };
    Ok(engine.generate(&mut prefill.cache, prefill.logits, &options, &control, |_| ())?.tokens)
}

/// How well two backends agree, at worst.
#[derive(Clone, Copy, Debug)]
struct Agreement {
    /// Share of the tokens of a layer that both keep, each by itself.
    overlap: f64,
    /// Difference of the attention that a head keeps, where both keep the same.
    mass: f64,
    /// How far a kept key may lie below one that is not, as by the error of a logit, in shares of what is allowed.
    choice: f64,
    /// Selections, and those that are not in the order of the CPU's scores.
    selections: usize,
    differing: usize,
}

impl Default for Agreement {
    fn default() -> Self {
        Self { overlap: 1.0, mass: 0.0, choice: 0.0, selections: 0, differing: 0 }
    }
}

impl Display for Agreement {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Self { overlap, mass, choice, selections, differing } = self;
        write!(
            f,
            "{differing} of {selections} selections differ, by {choice:.3} of the allowed error at most; \
             {overlap:.3} of the tokens of a layer are the same at least, with {mass:.4} of the attention of a head \
             more or less at most"
        )
    }
}

impl Agreement {
    /// Takes in an overlap; an error where that is little.
    fn overlap(&mut self, layer: usize, found: &[u32], expected: &[u32]) -> Result<(), String> {
        let alike = overlap(found, expected);
        self.overlap = self.overlap.min(alike);
        if alike < 0.75 {
            return Err(format!("layer {layer} keeps or hands on only {alike} of the same tokens"));
        }
        Ok(())
    }

    /// Takes in forced selections; an error where keys are kept that lie further below others than the error of scores
    /// explains, with activations off by a share `error`.
    fn choices(&mut self, judged: Vec<Judged>, error: f64) -> Result<(), String> {
        for Judged { off, reach } in judged {
            let share = if off == 0.0 { 0.0 } else { off / logit_error(error, reach) };
            self.selections += 1;
            self.differing += usize::from(off > 0.0);
            self.choice = self.choice.max(share);
            if share.is_nan() || share > 1.0 {
                return Err(format!(
                    "a key is kept although another is better by {share} of what may be off"
                ));
            }
        }
        Ok(())
    }
}

/// What a logit may be off, with activations off by a share `error`. Errors of queries and of keys are in no relation
/// with each other, nor with what they belong to: of d products, each off by both, the sum is off by
/// `√2 error |q| |k| / √d`, and the logit by `1 / √d` of that. This is how far it strays as a rule; that it may stray
/// further now and then is in the share.
fn logit_error(error: f64, reach: f64) -> f64 {
    2_f64.sqrt() * error * reach
}

/// Prefill and two appends on both. What a device chooses is near what the CPU chooses by itself; and when the
/// CPU is made to choose the same, masses and answers are the same.
fn agree<A: Backend>(
    cuda: &Engine<A>,
    cpu: &Engine<Probe>,
    ids: &[u32],
    plan: &Plan,
    options: &PrefillOptions,
    unit: f64,
    agreement: &mut Agreement,
) -> Result<(), String> {
    let allowed = activations_error(unit);
    let error = |error: EngineError| error.to_string();
    let control = Control::default();
    let mut found = cuda.prefill(ids, plan, options, &control).map_err(error)?;
    let trace = found.trace.as_ref().ok_or("no trace")?;

    let mut free = cpu.prefill(ids, plan, options, &control).map_err(error)?;
    let free_trace = free.trace.as_ref().ok_or("no trace")?;
    for (layer, (found, free)) in trace.layers.iter().zip(&free_trace.layers).enumerate() {
        let handed_on = found.propagated.iter().flatten().copied().collect::<Vec<_>>();
        let of_free = free.propagated.iter().flatten().copied().collect::<Vec<_>>();
        agreement.overlap(layer, &found.kept.concat(), &free.kept.concat())?;
        agreement.overlap(layer, &handed_on, &of_free)?;
    }

    cpu.backend().forget_scores();
    cpu.backend().force(selections(plan, trace));
    let mut expected = cpu.prefill(ids, plan, options, &control).map_err(error)?;
    if cpu.backend().forced() > 0 {
        return Err("fewer selections than the plan has".into());
    }
    let judged = cpu.backend().judged();
    // Logits that are off by e change the odds of what is kept by a factor of e^2e.
    let reach = judged.iter().map(|judged| judged.reach).fold(0.0, f64::max);
    let of_mass = if judged.is_empty() { 0.05 } else { (logit_error(allowed, reach) / 2.0).min(0.05) };
    agreement.choices(judged, allowed)?;
    let expected_trace = expected.trace.as_ref().ok_or("no trace")?;
    for (layer, (found, expected)) in trace.layers.iter().zip(&expected_trace.layers).enumerate() {
        // The most attended tokens that no selection chooses: what is near by is near.
        let loose = matches!(plan.layers[layer].keep, Keep::Recovered { frequent, .. } if frequent > 0.0);
        let same = (found.rows, &found.propagated) == (expected.rows, &expected.propagated);
        if !same || !loose && found.kept != expected.kept {
            return Err(format!("layer {layer} keeps other tokens than were chosen"));
        }
        for (found, expected) in found.mass.iter().zip(&expected.mass) {
            let off = f64::from((found - expected).abs());
            agreement.mass = agreement.mass.max(off);
            if off.is_nan() || off > of_mass {
                return Err(format!("layer {layer} keeps {found} of the attention, not {expected}"));
            }
        }
    }
    near("logits of the prompt", &found.logits, &expected.logits, allowed)?;
    let positions = |cache: &Cache<A>| cache.positions(cuda.backend()).map_err(|error| error.to_string());
    for step in [&[1_u32][..], &[5, 3]] {
        let mut before = positions(&found.cache)?;
        let new = found.cache.logical_length() as u32..(found.cache.logical_length() + step.len()) as u32;
        before.iter_mut().flatten().for_each(|list| list.extend(new.clone()));
        let logits = cuda.append(&mut found.cache, step, &control).map_err(error)?;
        cpu.append(&mut free.cache, step, &control).map_err(error)?;
        cpu.backend().force(evictions(plan, &before, &positions(&found.cache)?));
        let expected = cpu.append(&mut expected.cache, step, &control).map_err(error)?;
        if cpu.backend().forced() > 0 {
            return Err("fewer evictions than the plan has".into());
        }
        agreement.choices(cpu.backend().judged(), allowed)?;
        near("logits of a step", &logits, &expected, allowed)?;
    }
    let kept = positions(&found.cache)?;
    let of_free = free.cache.positions(cpu.backend()).map_err(|error| error.to_string())?;
    let of_expected = expected.cache.positions(cpu.backend()).map_err(|error| error.to_string())?;
    let loose = plan
        .layers
        .iter()
        .any(|layer| matches!(layer.keep, Keep::Recovered { frequent, .. } if frequent > 0.0));
    let alike = overlap(&kept.concat().concat(), &of_free.concat().concat());
    if !loose && kept != of_expected || alike < 0.75 {
        return Err(format!("the cache holds {kept:?}, {alike} of what it should"));
    }
    Ok(())
}

/// The selections by which layers let go of entries behind a step, in their order.
fn evictions(plan: &Plan, before: &[Vec<Vec<u32>>], after: &[Vec<Vec<u32>>]) -> Vec<Vec<Vec<u32>>> {
    let layers = plan.layers.iter().zip(before.iter().zip(after));
    let evicting = layers.filter(
        |(rules, (before, _))| matches!(rules.keep, Keep::Heavy { count, .. } if before[0].len() > count),
    );
    let of_head = |(before, after): (&Vec<u32>, &Vec<u32>)| -> Vec<u32> {
        let entry = |position: &u32| before.binary_search(position).expect("an entry of before") as u32;
        after.iter().map(entry).collect()
    };
    evicting.map(|(_, (before, after))| before.iter().zip(after).map(of_head).collect()).collect()
}

/// The selections that led to a trace, in their order: rows of a layer, where the trace has positions.
fn selections(plan: &Plan, trace: &Trace) -> Vec<Vec<Vec<u32>>> {
    let mut selections: Vec<_> = trace.restarted.iter().map(|chosen| vec![chosen.clone()]).collect();
    let mut rows: Vec<u32> = match &trace.restarted {
        Some(chosen) => chosen.clone(),
        None => (0..plan.prompt_tokens as u32).collect(),
    };
    for (rules, layer) in plan.layers.iter().zip(&trace.layers) {
        let row_of = |position: &u32| rows.binary_search(position).expect("a row of the layer") as u32;
        let heavy = matches!(rules.keep, Keep::Heavy { count, .. } if count < rules.rows);
        let kept = (heavy || rules.saliency().is_some())
            .then(|| layer.kept.iter().map(|kept| kept.iter().map(row_of).collect()).collect());
        let going_on = layer.propagated.iter().map(|rows| vec![rows.iter().map(row_of).collect()]);
        if let Keep::Shared { .. } = rules.keep {
            // Chosen and gathered in one, when rows have gone on.
            selections.extend(going_on.chain(kept));
        } else {
            selections.extend(kept.into_iter().chain(going_on));
        }
        if let Some(going_on) = &layer.propagated {
            rows = going_on.clone();
        }
    }
    selections
}

/// The share of the expected numbers that is there.
fn overlap(found: &[u32], expected: &[u32]) -> f64 {
    let there = expected.iter().filter(|number| found.contains(number)).count();
    if expected.is_empty() && found.is_empty() { 1.0 } else { there as f64 / expected.len().max(1) as f64 }
}

/// No number is further off than that share of the largest.
pub(super) fn near(what: &str, found: &[f32], expected: &[f32], allowed: f64) -> Result<(), String> {
    let largest = expected.iter().fold(0.0, |most: f64, number| most.max(f64::from(number.abs())));
    let off = found.iter().zip(expected).map(|(found, expected)| f64::from((found - expected).abs()));
    let off = off.fold(0.0, f64::max) / largest;
    if found.len() != expected.len() || off.is_nan() || off > allowed {
        return Err(format!("{what} are off by {off:.4} of the largest, more than {allowed:.4}"));
    }
    Ok(())
}
