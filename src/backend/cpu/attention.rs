//! Softmax attention in tiles with a running maximum (FlashAttention's recurrence): memory is a tile
//! for each thread, whatever the prompt. The query heads of a GQA group share a tile, so that a key
//! is read once for all of them.

use rayon::prelude::*;

use super::gemm::{Matrix, multiply};
use super::simd;
use super::tensor::{Kv, KvHead, Tensor, zeros};
use crate::backend::{BackendError, Bias};

/// Rows of a tile: tokens × query heads of the group. 256 × 256 scores fit a core's L2.
const TILE_ROWS: usize = 256;
/// Keys of a tile.
const TILE_KEYS: usize = 256;

/// What is added to the logits of a kv head's keys for those heads of its group that are steered, in
/// the units of a dot product.
#[derive(Debug, Default)]
pub(super) struct Offsets {
    keys: Vec<f32>,
    members: Vec<bool>,
}

impl Offsets {
    /// Of the kv head with this number.
    pub(super) fn new(bias: Option<&Bias<'_>>, kv: &Kv, head: usize, group: usize) -> Self {
        let Some(Bias { heads, highlighted, amount }) = bias else { return Self::default() };
        let members = heads[head * group..(head + 1) * group].to_vec();
        if !members.contains(&true) {
            return Self::default();
        }
        let amount = amount * (kv.head_dim as f32).sqrt();
        let of_key = |position: &u32| match highlighted.get(*position as usize) {
            Some(false) => amount,
            _ => 0.0,
        };
        Self { keys: kv.heads[head].positions.iter().map(of_key).collect(), members }
    }

    /// Adds them to the logits of one row for the keys from `start`.
    pub(super) fn add(&self, logits: &mut [f32], member: usize, start: usize) {
        if self.members.get(member) == Some(&true) {
            let end = start + logits.len();
            simd::add_scaled(logits, &self.keys[start..end], 1.0);
        }
    }
}

/// `visible(length, row)` says how many of a head's keys a query row sees.
pub(super) fn attention(
    queries: &Tensor,
    kv: &Kv,
    bias: Option<&Bias<'_>>,
    visible: impl Fn(usize, usize) -> usize + Sync,
) -> Result<Tensor, BackendError> {
    let head_dim = kv.head_dim;
    let group_width = queries.width / kv.heads.len();
    let group = group_width / head_dim;
    let block = (TILE_ROWS / group).max(1);
    let blocks = queries.rows.div_ceil(block);

    let offsets: Vec<Offsets> = (0..kv.heads.len()).map(|head| Offsets::new(bias, kv, head, group)).collect();

    // The last rows see the most keys: begin with them, so that no long tile is left for the end.
    let tiles: Vec<(usize, usize)> =
        (0..blocks).rev().flat_map(|block| (0..kv.heads.len()).map(move |head| (block, head))).collect();
    let attended = tiles
        .into_par_iter()
        .with_max_len(1)
        .map(|(index, head)| {
            let first = index * block;
            let rows = block.min(queries.rows - first);
            let keys = &kv.heads[head];
            let visible: Vec<usize> = (first..first + rows).map(|row| visible(keys.len(), row)).collect();
            let packed = pack(queries, first, rows, head * group_width, group, head_dim)?;
            Ok((first, head, attend(&packed, group, keys, head_dim, &visible, &offsets[head])?))
        })
        .collect::<Result<Vec<_>, BackendError>>()?;

    let mut out = Tensor::zeros("attention output", queries.rows, queries.width)?;
    for (first, head, tile) in attended {
        let rows = tile.len() / group_width;
        for member in 0..group {
            for row in 0..rows {
                let to = (first + row) * out.width + head * group_width + member * head_dim;
                let from = (member * rows + row) * head_dim;
                out.data[to..to + head_dim].copy_from_slice(&tile[from..from + head_dim]);
            }
        }
    }
    Ok(out)
}

/// The queries of one group for `rows` tokens: `[group · rows, head_dim]`.
pub(super) fn pack(
    queries: &Tensor,
    first: usize,
    rows: usize,
    column: usize,
    group: usize,
    head_dim: usize,
) -> Result<Vec<f32>, BackendError> {
    let mut packed = zeros("a tile of queries", group * rows, head_dim)?;
    for (index, query) in packed.chunks_exact_mut(head_dim).enumerate() {
        let (member, row) = (index / rows, index % rows);
        let from = (first + row) * queries.width + column + member * head_dim;
        query.copy_from_slice(&queries.data[from..from + head_dim]);
    }
    Ok(packed)
}

/// Factor that turns a dot product into the exponent of 2 of its softmax weight.
pub(super) fn score_scale(head_dim: usize) -> f32 {
    std::f32::consts::LOG2_E / (head_dim as f32).sqrt()
}

/// One tile of queries over all keys of a head.
fn attend(
    queries: &[f32],
    group: usize,
    head: &KvHead,
    head_dim: usize,
    visible: &[usize],
    offsets: &Offsets,
) -> Result<Vec<f32>, BackendError> {
    let rows = group * visible.len();
    let scale = score_scale(head_dim);
    let end = visible.iter().copied().max().unwrap_or(0);
    let mut out = zeros("a tile of attention", rows, head_dim)?;
    let mut scores = zeros("a tile of scores", rows, TILE_KEYS.min(end))?;
    let mut maxima = vec![f32::NEG_INFINITY; rows];
    let mut sums = vec![0.0; rows];

    for start in (0..end).step_by(TILE_KEYS) {
        let keys = TILE_KEYS.min(end - start);
        let elements = start * head_dim..(start + keys) * head_dim;
        let tile_keys = Matrix::new(&head.keys[elements.clone()], keys, head_dim);
        multiply(&mut scores, Matrix::new(queries, rows, head_dim), tile_keys.transposed(), false);

        for row in 0..rows {
            let scores = &mut scores[row * keys..(row + 1) * keys];
            offsets.add(scores, row / visible.len(), start);
            let seen = visible[row % visible.len()].saturating_sub(start).min(keys);
            let (seen, hidden) = scores.split_at_mut(seen);
            hidden.fill(0.0);
            if seen.is_empty() {
                continue;
            }
            let (max, sum) = simd::softmax_step(seen, scale, maxima[row]);
            if max != maxima[row] {
                let shrink = if start == 0 { 0.0 } else { (maxima[row] - max).exp2() };
                sums[row] *= shrink;
                simd::scale(&mut out[row * head_dim..(row + 1) * head_dim], shrink);
                maxima[row] = max;
            }
            sums[row] += sum;
        }
        let values = Matrix::new(&head.values[elements], keys, head_dim);
        multiply(&mut out, Matrix::new(&scores, rows, keys), values, true);
    }

    for (out, sum) in out.chunks_exact_mut(head_dim).zip(&sums) {
        // A query that sees no key attends to nothing.
        simd::scale(out, if *sum == 0.0 { 0.0 } else { 1.0 / sum });
    }
    Ok(out)
}
