//! Measures of selection that need no model: whether planted keys are found, and how far attention over
//! what is kept is from attention over everything.

use serde::Serialize;

use crate::backend::{Backend, BackendError, Select, Visible};
use crate::model::{ModelError, StoredTensor};
use crate::policy::Pooling;
use crate::random::SplitMix64;

/// Why a measure could not be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SelectionError {
    /// The backend failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// There is no memory for the numbers.
    #[error(transparent)]
    Numbers(#[from] ModelError),
}

/// One layer's attention, of random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Scene {
    /// Keys and values; the window's are the last.
    pub tokens: usize,
    /// Queries that observe.
    pub window: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Query heads to a kv head.
    pub group: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

/// The numbers of a [`Scene`], rows of all heads side by side.
#[derive(Clone, Debug, PartialEq)]
pub struct Numbers {
    /// Queries `[window, kv heads · group · head_dim]`, of the last tokens.
    pub queries: Vec<f32>,
    /// Keys `[tokens, kv heads · head_dim]`.
    pub keys: Vec<f32>,
    /// Values `[tokens, kv heads · head_dim]`.
    pub values: Vec<f32>,
    /// The planted keys, ascending positions before the window.
    pub planted: Vec<u32>,
}

/// What a query head's attention loses by a budget.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct OutputError {
    /// Attention that falls on kept keys, of 1.
    pub mass: f64,
    /// ‖o_full − o_kept‖.
    pub error: f64,
    /// 2 (1 − mass) · max‖v‖, which the error cannot exceed.
    pub bound: f64,
    /// ‖o_full‖.
    pub norm: f64,
    /// max‖v‖.
    pub longest_value: f64,
}

impl OutputError {
    /// Whether the error is within its bound, but for rounding in f32.
    pub fn is_bounded(&self) -> bool {
        self.error <= self.bound + 1e-4 * self.longest_value
    }
}

/// Index of the tail of Pareto's distribution that stretches keys.
const TAIL: f64 = 3.0;

impl Scene {
    /// Normal queries and keys, whose scores are about normal; those of `planted` random keys are raised
    /// by `raise`, in every query and head.
    pub fn planted(&self, planted: usize, raise: f32, seed: u64) -> Numbers {
        let random = &mut SplitMix64::new(seed);
        let mut numbers = self.numbers(random);
        let before = self.tokens.saturating_sub(self.window);
        let mut places: Vec<u32> = (0..before as u32).collect();
        for index in 0..planted.min(before) {
            places.swap(index, index + random.below(before - index));
        }
        places.truncate(planted);
        places.sort_unstable();
        // With √d in every query, what a key has there is added to its score.
        let scale = (self.head_dim as f32).sqrt();
        numbers.queries.chunks_exact_mut(self.head_dim).for_each(|head| head[0] = scale);
        for (token, row) in numbers.keys.chunks_exact_mut(self.kv_heads * self.head_dim).enumerate() {
            let raised = places.binary_search(&(token as u32)).is_ok();
            row.chunks_exact_mut(self.head_dim).for_each(|head| head[0] = if raised { raise } else { 0.0 });
        }
        numbers.planted = places;
        numbers
    }

    /// Normal queries and values, and normal keys stretched by Pareto's distribution, so that some scores
    /// are far above the others.
    pub fn heavy_tailed(&self, seed: u64) -> Numbers {
        let random = &mut SplitMix64::new(seed);
        let mut numbers = self.numbers(random);
        for key in numbers.keys.chunks_exact_mut(self.head_dim) {
            let stretch = (1.0 - random.unit()).powf(-1.0 / TAIL) as f32;
            key.iter_mut().for_each(|value| *value *= stretch);
        }
        numbers
    }

    fn numbers(&self, random: &mut SplitMix64) -> Numbers {
        let width = self.kv_heads * self.head_dim;
        let mut normals = |count: usize| (0..count).map(|_| normal(random)).collect();
        Numbers {
            queries: normals(self.window * self.group * width),
            keys: normals(self.tokens * width),
            values: normals(self.tokens * width),
            planted: Vec::new(),
        }
    }

    /// The share of planted keys that each budget keeps, for each kv head: `[budget][kv head]`. A budget
    /// counts the window's keys too.
    ///
    /// # Errors
    /// No memory, or what the backend says.
    pub fn recall<B: Backend>(
        &self,
        backend: &B,
        numbers: &Numbers,
        pooling: Pooling,
        budgets: &[usize],
    ) -> Result<Vec<Vec<f64>>, SelectionError> {
        let Attention { queries, kv } = self.attention(backend, numbers)?;
        let Numbers { planted, .. } = numbers;
        let recall = |kept: &Vec<u32>| {
            let found = planted.iter().filter(|key| kept.binary_search(key).is_ok());
            found.count() as f64 / planted.len().max(1) as f64
        };
        let kept = self.kept(backend, &queries, &kv, pooling, budgets)?;
        Ok(kept.iter().map(|heads| heads.iter().map(recall).collect()).collect())
    }

    /// Attention of the last query over what each budget keeps, against attention over everything:
    /// `[budget][query head]`.
    ///
    /// # Errors
    /// As for [`recall`](Self::recall).
    pub fn output_errors<B: Backend>(
        &self,
        backend: &B,
        numbers: &Numbers,
        pooling: Pooling,
        budgets: &[usize],
    ) -> Result<Vec<Vec<OutputError>>, SelectionError> {
        let Attention { queries, kv } = self.attention(backend, numbers)?;
        let last = backend.last_rows(&queries, 1)?;
        let full = backend.read(&backend.attention(&last, &kv, Visible::Aligned)?)?;
        let probabilities = backend.read_scores(&backend.window_scores(&last, &kv)?)?;
        let mut budgeted = Vec::new();
        for kept in self.kept(backend, &queries, &kv, pooling, budgets)? {
            let store = backend.gather_kv(&kv, &backend.indices(kept.clone())?, 0)?;
            let attended = backend.read(&backend.attention(&last, &store, Visible::Aligned)?)?;
            let error = |query_head: usize| {
                let head = query_head / self.group;
                let columns = query_head * self.head_dim..(query_head + 1) * self.head_dim;
                let (full, attended) = (&full[columns.clone()], &attended[columns]);
                let difference: Vec<f32> =
                    full.iter().zip(attended).map(|(full, kept)| full - kept).collect();
                let probability = |key: &u32| f64::from(probabilities[query_head][*key as usize]);
                let mass: f64 = kept[head].iter().map(probability).sum();
                let longest_value = self.longest_value(numbers, head);
                OutputError {
                    mass,
                    error: norm(&difference),
                    bound: 2.0 * (1.0 - mass).max(0.0) * longest_value,
                    norm: norm(full),
                    longest_value,
                }
            };
            budgeted.push((0..self.kv_heads * self.group).map(error).collect());
        }
        Ok(budgeted)
    }

    /// What each budget keeps: `[budget][kv head]`, ascending positions.
    fn kept<B: Backend>(
        &self,
        backend: &B,
        queries: &B::Tensor,
        kv: &B::Kv,
        pooling: Pooling,
        budgets: &[usize],
    ) -> Result<Vec<Vec<Vec<u32>>>, BackendError> {
        let window = self.window;
        let scores = backend.window_scores(queries, kv)?;
        let pooled =
            backend.pool_groups(&scores, self.kv_heads, self.tokens.saturating_sub(window), pooling)?;
        let chosen = budgets.iter().map(|budget| {
            let select = Select { count: budget.saturating_sub(window), tail: window };
            backend.read_indices(&backend.select(&pooled, select)?)
        });
        chosen.collect()
    }

    fn attention<B: Backend>(&self, backend: &B, numbers: &Numbers) -> Result<Attention<B>, SelectionError> {
        // An embedding of all rows of a table is the table.
        let tensor = |name: &str, rows: usize, numbers: &[f32]| {
            let stored = StoredTensor::from_f32(name, &[rows, numbers.len() / rows], numbers)?;
            let rows: Vec<u32> = (0..rows as u32).collect();
            Ok::<_, SelectionError>(backend.embed(&backend.weight(&stored)?, &rows)?)
        };
        let queries = tensor("queries", self.window, &numbers.queries)?;
        let keys = tensor("keys", self.tokens, &numbers.keys)?;
        let values = tensor("values", self.tokens, &numbers.values)?;
        let positions = backend.indices(vec![(0..self.tokens as u32).collect()])?;
        let mut kv = backend.new_kv(self.kv_heads, self.head_dim, self.tokens)?;
        backend.append_kv(&mut kv, &keys, &values, &positions, 0)?;
        Ok(Attention { queries, kv })
    }

    fn longest_value(&self, numbers: &Numbers, head: usize) -> f64 {
        let columns = head * self.head_dim..(head + 1) * self.head_dim;
        let rows = numbers.values.chunks_exact(self.kv_heads * self.head_dim);
        rows.map(|row| norm(&row[columns.clone()])).fold(0.0, f64::max)
    }
}

struct Attention<B: Backend> {
    queries: B::Tensor,
    kv: B::Kv,
}

fn norm(vector: &[f32]) -> f64 {
    vector.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}

/// Mean 0, deviation 1 (Box and Muller).
fn normal(random: &mut SplitMix64) -> f32 {
    let radius = (-2.0 * (1.0 - random.unit()).ln()).sqrt();
    (radius * (std::f64::consts::TAU * random.unit()).cos()) as f32
}
