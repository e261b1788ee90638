//! What a policy reads off attention: window scores, pooling, sums over heads, selection.

use rayon::prelude::*;

use super::attention::{Offsets, pack, score_scale};
use super::gemm::{Matrix, multiply};
use super::simd;
use super::tensor::{Indices, Kv, KvHead, Scores, Tensor, zeros};
use crate::backend::{BackendError, Bias, Share};
use crate::policy::{Pooling, PoolingKind};

/// Softmax probabilities of the queries, which belong to the last keys, summed over the queries.
pub(super) fn window_scores(
    queries: &Tensor,
    kv: &Kv,
    bias: Option<&Bias<'_>>,
) -> Result<Scores, BackendError> {
    let head_dim = kv.head_dim;
    let group = queries.width / (kv.heads.len() * head_dim);
    let keys = common_length("window_scores", queries, kv)?;
    let mut scores = Scores::zeros(kv.heads.len() * group, keys)?;
    scores
        .data
        .par_chunks_mut(keys.max(1))
        .enumerate()
        .try_for_each(|(query_head, sums)| {
            let offsets = Offsets::new(bias, kv, query_head / group, group);
            let mut probabilities = products(queries, kv, query_head, group)?;
            for (row, probabilities) in probabilities.chunks_exact_mut(keys).enumerate() {
                offsets.add(probabilities, query_head % group, 0);
                let seen = &mut probabilities[..keys - queries.rows + row + 1];
                let (_, sum) = simd::softmax_step(seen, score_scale(head_dim), f32::NEG_INFINITY);
                simd::add_scaled(sums, seen, 1.0 / sum);
            }
            Ok(())
        })
        .map(|()| scores)
}

/// Dot products of one query of every head with all keys.
pub(super) fn query_key_products(query: &Tensor, kv: &Kv) -> Result<Scores, BackendError> {
    let group = query.width / (kv.heads.len() * kv.head_dim);
    let keys = common_length("query_key_products", query, kv)?;
    if query.rows != 1 {
        let problem = format!("{} rows, where one query is wanted", query.rows);
        return Err(BackendError::Shape { operation: "query_key_products", problem });
    }
    let heads = kv.heads.len() * group;
    let mut scores = Scores::zeros(heads, keys)?;
    for (head, row) in scores.data.chunks_exact_mut(keys).enumerate() {
        row.copy_from_slice(&products(query, kv, head, group)?);
    }
    Ok(scores)
}

/// `Q · Kᵀ` of one query head: `[queries, keys]`.
fn products(queries: &Tensor, kv: &Kv, query_head: usize, group: usize) -> Result<Vec<f32>, BackendError> {
    let head_dim = kv.head_dim;
    let head = &kv.heads[query_head / group];
    let packed = pack(queries, 0, queries.rows, query_head * head_dim, 1, head_dim)?;
    let mut products = zeros("window scores", queries.rows, head.len())?;
    let keys = Matrix::new(&head.keys, head.len(), head_dim);
    multiply(&mut products, Matrix::new(&packed, queries.rows, head_dim), keys.transposed(), false);
    Ok(products)
}

/// The length that all heads have.
fn common_length(operation: &'static str, queries: &Tensor, kv: &Kv) -> Result<usize, BackendError> {
    let keys = kv.heads[0].len();
    if kv.heads.iter().any(|head| head.len() != keys) || queries.rows > keys {
        return Err(BackendError::Shape {
            operation,
            problem: format!(
                "{} queries need every head to hold the same keys, at least as many; the heads hold {:?}",
                queries.rows,
                kv.heads.iter().map(KvHead::len).collect::<Vec<_>>()
            ),
        });
    }
    Ok(keys)
}

/// Pools per query head, then sums over each group.
pub(super) fn pool_groups(
    scores: &Scores,
    kv_heads: usize,
    keys: usize,
    pooling: Pooling,
) -> Result<Scores, BackendError> {
    let query_heads: Vec<&[f32]> = scores.heads().collect();
    if keys > scores.keys || !query_heads.len().is_multiple_of(kv_heads) {
        return Err(BackendError::Shape {
            operation: "pool_groups",
            problem: format!(
                "{keys} keys of {kv_heads} kv heads from {} keys of {} query heads",
                scores.keys,
                query_heads.len()
            ),
        });
    }
    if pooling.kernel.is_multiple_of(2) {
        return Err(BackendError::Shape {
            operation: "pool_groups",
            problem: format!("a pooling kernel of {} has no middle", pooling.kernel),
        });
    }
    let group = query_heads.len() / kv_heads;
    let mut pooled = Scores::zeros(kv_heads, keys)?;
    if keys > 0 {
        pooled.data.par_chunks_mut(keys).enumerate().for_each(|(head, sums)| {
            for scores in &query_heads[head * group..(head + 1) * group] {
                add_pooled(sums, &scores[..keys], pooling);
            }
        });
    }
    Ok(pooled)
}

fn add_pooled(sums: &mut [f32], scores: &[f32], pooling: Pooling) {
    let reach = pooling.kernel / 2;
    for (key, sum) in sums.iter_mut().enumerate() {
        let near = &scores[key.saturating_sub(reach)..(key + reach + 1).min(scores.len())];
        *sum += match pooling.kind {
            PoolingKind::Max => near.iter().copied().fold(f32::NEG_INFINITY, f32::max),
            PoolingKind::Average => near.iter().sum::<f32>() / pooling.kernel as f32,
        };
    }
}

/// Scores summed over heads.
pub(super) fn sum_heads(scores: &Scores) -> Result<Scores, BackendError> {
    let mut sum = Scores::zeros(1, scores.keys)?;
    if scores.keys > 0 {
        for head in scores.heads() {
            simd::add_scaled(&mut sum.data, head, 1.0);
        }
    }
    Ok(sum)
}

/// `a + b`; keys that one lacks count 0.
pub(super) fn add(a: &Scores, b: &Scores) -> Result<Scores, BackendError> {
    let heads = a.heads().count();
    if heads != b.heads().count() {
        let problem = format!("{heads} heads and {} heads", b.heads().count());
        return Err(BackendError::Shape { operation: "add_scores", problem });
    }
    let keys = a.keys.max(b.keys);
    let mut sum = Scores::zeros(heads, keys)?;
    for (head, (a, b)) in a.heads().zip(b.heads()).enumerate() {
        let sum = &mut sum.data[head * keys..(head + 1) * keys];
        sum[..a.len()].copy_from_slice(a);
        simd::add_scaled(&mut sum[..b.len()], b, 1.0);
    }
    Ok(sum)
}

/// The scores that lists name.
pub(super) fn gather(scores: &Scores, entries: &Indices) -> Result<Scores, BackendError> {
    let shape = |problem| BackendError::Shape { operation: "gather_scores", problem };
    let heads = scores.heads().count();
    if entries.lists.len() != heads {
        return Err(shape(format!("{} lists for {heads} heads", entries.lists.len())));
    }
    let keys = entries.lists.iter().map(Vec::len).max().unwrap_or(0);
    let mut gathered = Scores::zeros(heads, keys)?;
    for (head, (scores, list)) in scores.heads().zip(&entries.lists).enumerate() {
        for (to, &entry) in gathered.data[head * keys..].iter_mut().zip(list) {
            let score = scores.get(entry as usize);
            *to = *score.ok_or_else(|| shape(format!("key {entry} of {}", scores.len())))?;
        }
    }
    Ok(gathered)
}

/// Makes the scores of highlighted keys the best there are. Every key has a position.
pub(super) fn raise(scores: &mut Scores, positions: &[u32], highlighted: &[bool]) {
    for head in scores.data.chunks_exact_mut(scores.keys.max(1)) {
        for (score, position) in head.iter_mut().zip(positions) {
            if highlighted.get(*position as usize) == Some(&true) {
                *score = f32::INFINITY;
            }
        }
    }
}

/// The best keys of each head, as many as its count says, and the tail behind them.
pub(super) fn select(scores: &Scores, counts: &[usize], tail: usize) -> Result<Indices, BackendError> {
    let shape = |problem| BackendError::Shape { operation: "select", problem };
    let keys = scores.keys as u32;
    let Some(end) = u32::try_from(tail).ok().and_then(|tail| keys.checked_add(tail)) else {
        return Err(shape(format!("a tail of {tail} keys behind {keys}")));
    };
    let heads = scores.heads().count();
    if counts.len() != heads {
        return Err(shape(format!("{} counts for {heads} heads", counts.len())));
    }
    let lists = scores.heads().zip(counts).map(|(scores, &count)| {
        let mut chosen: Vec<u32> = (0..keys).collect();
        if count < scores.len() {
            chosen.select_nth_unstable_by_key(count, |&key| (!rank(scores[key as usize]), key));
            chosen.truncate(count);
            chosen.sort_unstable();
        }
        chosen.extend(keys..end);
        chosen
    });
    Ok(Indices { lists: lists.collect() })
}

/// How many keys each head gets of those that all share.
pub(super) fn shared_counts(scores: &Scores, Share { mean, assured, floor, .. }: Share) -> Vec<usize> {
    let heads = scores.heads().count();
    let mut ranked: Vec<(u32, usize)> = scores
        .heads()
        .enumerate()
        .flat_map(|(head, scores)| scores.iter().map(move |&score| (!rank(score), head)))
        .collect();
    let shared = mean.saturating_mul(heads);
    if shared < ranked.len() {
        ranked.select_nth_unstable(shared);
        ranked.truncate(shared);
    }
    let mut picks = vec![0_usize; heads];
    ranked.into_iter().for_each(|(_, head)| picks[head] += 1);
    let every = (mean.saturating_sub(assured) as f64 * floor).floor();
    let count = |picks: usize| {
        let sure = picks.min(assured);
        sure + ((picks - sure) as f64 * (1.0 - floor) + every).round_ties_even() as usize
    };
    picks.into_iter().map(count).collect()
}

/// Scores in an order of integers: larger is better, −0 equals +0, NaN is worst.
fn rank(score: f32) -> u32 {
    if score.is_nan() {
        return 0;
    }
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}
