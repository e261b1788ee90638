//! Sums of attention probabilities over queries, in two passes over Q·Kᵀ: the first finds every query's
//! maximum and normaliser, the second adds up tile by tile. Memory is a tile for each thread.

use rayon::prelude::*;

use super::attention::{Offsets, pack, score_scale};
use super::gemm::{Matrix, multiply};
use super::simd;
use super::tensor::{Kv, KvHead, Scores, Tensor, zeros};
use crate::backend::{BackendError, Bias, Columns};

/// Rows of a tile: tokens × query heads of the group.
const TILE_ROWS: usize = 256;
/// Keys of a tile.
const TILE_KEYS: usize = 256;

/// Queries of one kv head's group for some of the tokens.
struct Block {
    /// `[group · rows, head_dim]`.
    queries: Vec<f32>,
    /// The first of its rows.
    first: usize,
    rows: usize,
    /// Maximum and sum of each row's softmax, in powers of 2.
    normalisers: Vec<(f32, f32)>,
}

/// See [`Backend::column_sums`](crate::backend::Backend::column_sums).
pub(super) fn column_sums(
    queries: &Tensor,
    kv: &Kv,
    columns: Columns,
    bias: Option<&Bias<'_>>,
) -> Result<Scores, BackendError> {
    let group = queries.width / (kv.heads.len() * kv.head_dim);
    let longest = kv.heads.iter().map(KvHead::len).max().unwrap_or(0);
    let mut sums = Scores::zeros(kv.heads.len(), longest)?;
    for (head, sums) in sums.data.chunks_exact_mut(longest.max(1)).enumerate() {
        let offsets = Offsets::new(bias, kv, head, group);
        let of_head = Head { keys: &kv.heads[head], head_dim: kv.head_dim, queries: queries.rows, offsets };
        let block = (TILE_ROWS / group).max(1);
        let starts: Vec<usize> = (0..queries.rows).step_by(block).collect();
        let blocks = starts
            .into_par_iter()
            .map(|first| {
                let rows = block.min(queries.rows - first);
                let column = head * group * kv.head_dim;
                let queries = pack(queries, first, rows, column, group, kv.head_dim)?;
                of_head.normalised(Block { queries, first, rows, normalisers: Vec::new() })
            })
            .collect::<Result<Vec<_>, BackendError>>()?;
        let length = kv.heads[head].len();
        sums[..length].par_chunks_mut(TILE_KEYS).enumerate().try_for_each(|(tile, sums)| {
            blocks.iter().try_for_each(|block| of_head.add(block, tile * TILE_KEYS, sums, columns))
        })?;
    }
    Ok(sums)
}

/// One kv head and what its queries have in common.
struct Head<'a> {
    keys: &'a KvHead,
    head_dim: usize,
    queries: usize,
    offsets: Offsets,
}

impl Head<'_> {
    /// The key that query `row` belongs to.
    fn own_key(&self, row: usize) -> usize {
        self.keys.len() - self.queries + row
    }

    /// Logits of a block for the keys of a tile, as dot products: `[group · rows, keys]`.
    fn logits(&self, block: &Block, start: usize, keys: usize) -> Result<Vec<f32>, BackendError> {
        let rows = block.queries.len() / self.head_dim;
        let mut logits = zeros("a tile of scores", rows, keys)?;
        let elements = start * self.head_dim..(start + keys) * self.head_dim;
        let tile = Matrix::new(&self.keys.keys[elements], keys, self.head_dim);
        multiply(&mut logits, Matrix::new(&block.queries, rows, self.head_dim), tile.transposed(), false);
        for (row, logits) in logits.chunks_exact_mut(keys).enumerate() {
            self.offsets.add(logits, row / block.rows, start);
        }
        Ok(logits)
    }

    /// The first pass.
    fn normalised(&self, mut block: Block) -> Result<Block, BackendError> {
        let scale = score_scale(self.head_dim);
        let mut normalisers = vec![(f32::NEG_INFINITY, 0.0); block.queries.len() / self.head_dim];
        let end = self.own_key(block.first + block.rows - 1) + 1;
        for start in (0..end).step_by(TILE_KEYS) {
            let keys = TILE_KEYS.min(end - start);
            let mut logits = self.logits(&block, start, keys)?;
            for (row, (logits, normaliser)) in logits.chunks_exact_mut(keys).zip(&mut normalisers).enumerate()
            {
                let own = self.own_key(block.first + row % block.rows);
                let seen = &mut logits[..(own + 1).saturating_sub(start).min(keys)];
                if !seen.is_empty() {
                    let (before, sum) = *normaliser;
                    let (max, more) = simd::softmax_step(seen, scale, before);
                    let shrink = if before == f32::NEG_INFINITY { 0.0 } else { (before - max).exp2() };
                    *normaliser = (max, sum * shrink + more);
                }
            }
        }
        block.normalisers = normalisers;
        Ok(block)
    }

    /// The second pass, for the keys from `start`.
    fn add(
        &self,
        block: &Block,
        start: usize,
        sums: &mut [f32],
        columns: Columns,
    ) -> Result<(), BackendError> {
        let Columns { weight, step, band } = columns;
        let keys = sums.len();
        let reach = |row: usize| {
            let own = self.own_key(block.first + row);
            let first = band.map_or(0, |band| (own + 1).saturating_sub(band));
            let within = |key: usize| key.saturating_sub(start).min(keys);
            (within(first), within(own + 1))
        };
        if (0..block.rows).all(|row| matches!(reach(row), (first, end) if first >= end)) {
            return Ok(());
        }
        let mut logits = self.logits(block, start, keys)?;
        for (row, logits) in logits.chunks_exact_mut(keys).enumerate() {
            let (max, sum) = block.normalisers[row];
            let row = row % block.rows;
            let (first, end) = reach(row);
            if first < end {
                let seen = &mut logits[first..end];
                simd::softmax_step(seen, score_scale(self.head_dim), max);
                let weight = weight + step * (block.first + row) as f32;
                simd::add_scaled(&mut sums[first..end], seen, weight / sum);
            }
        }
        Ok(())
    }
}
