//! Measures of selection that need no model: whether planted keys are found, and how far attention over
//! what is kept is from attention over everything.

use std::ops::Range;

use serde::Serialize;

use crate::backend::{Backend, BackendError, Select, Visible};
use crate::policy::Saliency;

/// The share of planted keys among those that are kept, for each kv head: `[budget][kv head]`.
///
/// `queries` are those of the window, and belong to the last keys. A budget counts the window's keys too,
/// and is larger than it. `planted` are positions before the window.
///
/// # Errors
/// What the backend says.
pub fn planted_recall<B: Backend>(
    backend: &B,
    queries: &B::Tensor,
    kv: &B::Kv,
    saliency: Saliency,
    planted: &[u32],
    budgets: &[usize],
) -> Result<Vec<Vec<f64>>, BackendError> {
    let kept = kept(backend, queries, kv, saliency, budgets)?;
    let recall = |kept: &Vec<u32>| {
        planted.iter().filter(|key| kept.binary_search(key).is_ok()).count() as f64
            / planted.len().max(1) as f64
    };
    Ok(kept.iter().map(|heads| heads.iter().map(recall).collect()).collect())
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
}

/// Attention of the last query over what a budget keeps, against attention over everything:
/// `[budget][query head]`.
///
/// # Errors
/// What the backend says.
pub fn output_errors<B: Backend>(
    backend: &B,
    queries: &B::Tensor,
    kv: &B::Kv,
    values: &[f32],
    head_dim: usize,
    saliency: Saliency,
    budgets: &[usize],
) -> Result<Vec<Vec<OutputError>>, BackendError> {
    let last = backend.last_rows(queries, 1)?;
    let full = backend.read(&backend.attention(&last, kv, Visible::Aligned)?)?;
    let probabilities = backend.read_scores(&backend.window_scores(&last, kv)?)?;
    let heads = backend.kv_lengths(kv).len();
    let group = probabilities.len() / heads;
    let longest: Vec<f64> = (0..heads)
        .map(|head| longest_value(values, head * head_dim..(head + 1) * head_dim, heads * head_dim))
        .collect();
    let mut budgeted = Vec::new();
    for kept in kept(backend, queries, kv, saliency, budgets)? {
        let store = backend.gather_kv(kv, &backend.indices(kept.clone())?, 0)?;
        let attended = backend.read(&backend.attention(&last, &store, Visible::Aligned)?)?;
        let errors = probabilities.iter().enumerate().map(|(query_head, probabilities)| {
            let head = query_head / group;
            let columns = query_head * head_dim..(query_head + 1) * head_dim;
            let difference: Vec<f32> = full[columns.clone()]
                .iter()
                .zip(&attended[columns.clone()])
                .map(|(full, kept)| full - kept)
                .collect();
            let mass: f64 = kept[head].iter().map(|key| f64::from(probabilities[*key as usize])).sum();
            OutputError {
                mass,
                error: norm(&difference),
                bound: 2.0 * (1.0 - mass).max(0.0) * longest[head],
                norm: norm(&full[columns]),
            }
        });
        budgeted.push(errors.collect());
    }
    Ok(budgeted)
}

/// What each budget keeps: `[budget][kv head]`, ascending positions.
fn kept<B: Backend>(
    backend: &B,
    queries: &B::Tensor,
    kv: &B::Kv,
    saliency: Saliency,
    budgets: &[usize],
) -> Result<Vec<Vec<Vec<u32>>>, BackendError> {
    let lengths = backend.kv_lengths(kv);
    let tail = saliency.window;
    let scores = backend.window_scores(&backend.last_rows(queries, tail)?, kv)?;
    let pooled = backend.pool_groups(&scores, lengths.len(), lengths[0] - tail, saliency.pooling)?;
    let chosen = budgets.iter().map(|budget| {
        let select = Select { count: budget.saturating_sub(tail), tail };
        backend.read_indices(&backend.select(&pooled, select)?)
    });
    chosen.collect()
}

/// The length of the longest of a head's values, `[tokens, width]`.
fn longest_value(values: &[f32], columns: Range<usize>, width: usize) -> f64 {
    values.chunks_exact(width).map(|row| norm(&row[columns.clone()])).fold(0.0, f64::max)
}

fn norm(vector: &[f32]) -> f64 {
    vector.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}
