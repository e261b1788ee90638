//! From scores of keys to lists of them.

use std::fmt::Debug;
use std::sync::Arc;

use super::handles::List;
use super::memory::Block;
use super::{CudaBackend, Indices, Kv, Scores, UncountedKv, shape};
use crate::abi;
use crate::backend::{BackendError, Share};
use crate::kernels::MatrixProduct;
use crate::kernels::batch::{Lengths, ScoreRows};
use crate::kernels::scores::{PoolScores, pool_scores};
use crate::kernels::select::{Reduction, SelectTopk, select_topk, select_topk_workspace};
use crate::kernels::share::{ShareKeys, share_keys};
use crate::policy::{Pooling, PoolingKind};

impl<D: MatrixProduct + Debug> CudaBackend<D> {
    /// Room for scores, a head's on a boundary that reads well.
    pub(super) fn scores(&self, heads: usize, keys: usize) -> Result<Scores<D>, BackendError> {
        let stride = keys.next_multiple_of(4);
        let block = self.machine.array("scores", heads.saturating_mul(stride), 4)?;
        Ok(Scores { block, heads, keys, stride })
    }
}

pub(super) fn pool_groups<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    scores: &Scores<D>,
    kv_heads: usize,
    keys: usize,
    pooling: Pooling,
) -> Result<Scores<D>, BackendError> {
    if keys > scores.keys || kv_heads == 0 || !scores.heads.is_multiple_of(kv_heads) {
        let problem =
            format!("{keys} keys of {kv_heads} kv heads from {} keys of {} heads", scores.keys, scores.heads);
        return Err(shape("pool_groups", problem));
    }
    let kernel = i32::try_from(pooling.kernel).unwrap_or(i32::MAX);
    let pooling = match pooling.kind {
        PoolingKind::Max => abi::Pooling::max(kernel),
        PoolingKind::Average => abi::Pooling::average(kernel),
    };
    let out = backend.scores(kv_heads, keys)?;
    pool(backend, scores, pooling, &out)?;
    Ok(out)
}

pub(super) fn sum_heads<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    scores: &Scores<D>,
) -> Result<Scores<D>, BackendError> {
    let out = backend.scores(1, scores.keys)?;
    pool(backend, scores, abi::Pooling::NONE, &out)?;
    Ok(out)
}

/// The keys of `out` of each group of heads.
fn pool<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    scores: &Scores<D>,
    pooling: abi::Pooling,
    out: &Scores<D>,
) -> Result<(), BackendError> {
    let work = PoolScores {
        scores: scores.rows(),
        sequences: 1,
        query_heads: scores.heads as u32,
        kv_heads: out.heads as u32,
        keys: Lengths::dense(out.keys as u32),
        pooling,
        groups: Some(out.rows()),
        ..Default::default()
    };
    // SAFETY: live blocks of the sizes stated, in stream order.
    Ok(unsafe { pool_scores(backend.device(), &work) }?)
}

/// The best keys of each head, as many as its count says, and the tail behind them.
pub(super) fn select<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    scores: &Scores<D>,
    counts: &[usize],
    tail: usize,
) -> Result<Indices<D>, BackendError> {
    if counts.len() != scores.heads {
        return Err(shape("select", format!("{} counts for {} heads", counts.len(), scores.heads)));
    }
    let end = scores.keys.checked_add(tail).filter(|end| u32::try_from(*end).is_ok());
    let end = end.ok_or_else(|| shape("select", format!("a tail of {tail} keys behind {}", scores.keys)))?;
    let lengths: Vec<usize> = counts.iter().map(|count| count.min(&scores.keys) + tail).collect();
    let capacity = lengths.iter().copied().max().unwrap_or(0);
    let counts = match lengths.iter().all(|length| *length == capacity) {
        true => None,
        false => {
            let counts: Vec<i32> = lengths.iter().map(|length| *length as i32).collect();
            Some(backend.machine.upload("numbers of keys to keep", &counts)?)
        }
    };
    let counts = counts.as_ref().map_or(0, |counts| counts.address());
    let block = topk(backend, scores.rows(), [scores.heads, end], (capacity, counts), tail)?;
    Ok(Indices { block: Arc::new(block), lengths, capacity })
}

/// All scores as one list of keys tell how many each head gets, and the host is not told.
pub(super) fn gather_kv_shared<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    kv: &Kv<D>,
    scores: &Scores<D>,
    Share { mean, assured, floor, tail }: Share,
    slack: usize,
) -> Result<UncountedKv<D>, BackendError> {
    let Scores { heads, keys, .. } = *scores;
    if heads != kv.lists.len() || kv.lists.iter().any(|list| list.length != keys.saturating_add(tail)) {
        let lengths: Vec<_> = kv.lists.iter().map(|list| list.length).collect();
        let problem = format!("lists of {lengths:?} for {heads} heads of {keys} scores and a tail of {tail}");
        return Err(shape("gather_kv_shared", problem));
    }
    if !(0.0..=1.0).contains(&floor) {
        return Err(shape("gather_kv_shared", format!("a floor of {floor}, no share")));
    }
    let flat = backend.machine.array("scores of all heads", heads * keys, 4)?;
    for head in 0..heads {
        flat.copy(4 * head * keys, &scores.block, 4 * head * scores.stride, 4 * keys)?;
    }
    let all = heads * keys;
    let best_count = mean.saturating_mul(heads).min(all);
    let rows = ScoreRows { base: flat.address(), sequence_stride: 0, head_stride: all as i64 };
    let best = topk(backend, rows, [1, all], (best_count, 0), 0)?;

    let mut work = ShareKeys {
        best: best.address(),
        count: best_count as u32,
        heads: heads as u32,
        keys: keys as u32,
        mean: u32::try_from(mean).unwrap_or(u32::MAX),
        assured: u32::try_from(assured).unwrap_or(u32::MAX),
        floor,
        tail: tail as u32,
        slack: u32::try_from(slack).unwrap_or(u32::MAX),
        counts: 0,
        starts: 0,
    };
    let rows = usize::try_from(work.most_rows()).unwrap_or(usize::MAX);
    let out = backend.blank(kv.head_dim, heads, rows)?;
    work.counts = out.lengths_address(false);
    work.starts = out.starts.address();
    // SAFETY: live blocks of the sizes stated, in stream order, here and below.
    unsafe { share_keys(backend.device(), &work) }?;
    let capacity = work.most_of_head() as usize;
    let kept = topk(backend, scores.rows(), [heads, keys + tail], (capacity, work.counts), tail)?;
    backend.gather_into(&out, rows, kv, kept.address(), capacity)?;
    Ok(UncountedKv { kv: out, heads, slack })
}

pub(super) fn count_kv<D: MatrixProduct + Debug>(
    UncountedKv { mut kv, heads, slack }: UncountedKv<D>,
) -> Result<Kv<D>, BackendError> {
    let mut start = 0;
    for length in kv.lengths.read::<i32>(0, heads)? {
        let length = length as usize;
        let list = List { start, length, capacity: length + slack };
        start += list.capacity;
        kv.lists.push(list);
    }
    Ok(kv)
}

/// The best of `keys` keys of each row, of which the last `tail` have no scores and stay: as many as `counts` says on
/// the device, or `capacity` where it is 0. Lists `[rows][capacity]`, with -1 behind each.
fn topk<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    scores: ScoreRows,
    [rows, keys]: [usize; 2],
    (capacity, counts): (usize, u64),
    tail: usize,
) -> Result<Block<D>, BackendError> {
    let kept = backend.machine.array("kept keys", rows * capacity, 4)?;
    let kept_lengths = backend.machine.array("numbers of kept keys", rows, 4)?;
    let mut work = SelectTopk {
        scores,
        sequences: 1,
        rows: rows as u32,
        groups: 1,
        heads: 1,
        keys: Lengths::dense(keys as u32),
        lengths: 0,
        window: tail as u32,
        tail: tail as u32,
        sinks: 0,
        pooling: abi::Pooling::NONE,
        reduction: Reduction::Sum,
        page: 1,
        count: capacity as u32,
        counts,
        kept: kept.address(),
        kept_lengths: kept_lengths.address(),
        capacity: capacity as u32,
        workspace: 0,
        workspace_bytes: 0,
        form: None,
    };
    work.workspace_bytes = select_topk_workspace(backend.device(), &work)?;
    let workspace = backend.machine.block("the scratch memory of selection", work.workspace_bytes)?;
    work.workspace = workspace.address();
    // SAFETY: live blocks of the sizes stated, in stream order.
    unsafe { select_topk(backend.device(), &work) }?;
    Ok(kept)
}
