//! What entries are let go by, and how they go: sums carried from step to step, and compaction in place.

use std::fmt::Debug;

use super::{CudaBackend, Indices, Kv, Scores, shape};
use crate::backend::BackendError;
use crate::kernels::MatrixProduct;
use crate::kernels::gather::{Compact, compact};
use crate::kernels::sums::{AddScores, GatherScores, add_scores as add, gather_scores as gather};

pub(super) fn add_scores<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    a: &Scores<D>,
    b: &Scores<D>,
) -> Result<Scores<D>, BackendError> {
    if a.heads != b.heads {
        return Err(shape("add_scores", format!("{} heads and {} heads", a.heads, b.heads)));
    }
    let out = backend.scores(a.heads, a.keys.max(b.keys))?;
    let work = AddScores { a: a.table(), b: b.table(), out: out.table(), heads: a.heads as u32 };
    // SAFETY: live blocks of the sizes stated, in stream order.
    unsafe { add(backend.device(), &work) }?;
    Ok(out)
}

/// An entry that is not there scores 0.
pub(super) fn gather_scores<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    scores: &Scores<D>,
    entries: &Indices<D>,
) -> Result<Scores<D>, BackendError> {
    if entries.lengths.len() != scores.heads {
        let problem = format!("{} lists for {} heads", entries.lengths.len(), scores.heads);
        return Err(shape("gather_scores", problem));
    }
    let out = backend.scores(scores.heads, entries.capacity)?;
    let work = GatherScores {
        scores: scores.table(),
        out: out.table(),
        entries: entries.block.address(),
        entry_stride: entries.capacity as i64,
        heads: scores.heads as u32,
    };
    // SAFETY: live blocks of the sizes stated, in stream order.
    unsafe { gather(backend.device(), &work) }?;
    Ok(out)
}

/// Takes no memory: an eviction that began is carried through.
pub(super) fn retain_kv<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    kv: &mut Kv<D>,
    entries: &Indices<D>,
) -> Result<(), BackendError> {
    if entries.lengths.len() != kv.lists.len() {
        let problem = format!("{} lists for {} kv heads", entries.lengths.len(), kv.lists.len());
        return Err(shape("retain_kv", problem));
    }
    if let Some((list, kept)) =
        kv.lists.iter().zip(&entries.lengths).find(|(list, kept)| **kept > list.length)
    {
        return Err(shape("retain_kv", format!("{kept} entries of {}", list.length)));
    }
    let work = Compact {
        cache: kv.cache(),
        indices: entries.block.address(),
        index_sequence_stride: 0,
        index_head_stride: entries.capacity as i64,
        index_capacity: entries.capacity as u32,
        // A list ends at its first -1.
        kept: 0,
        lengths_out: kv.lengths_address(!kv.second_half),
        head_dim: kv.head_dim as u32,
        dtype: backend.dtype,
    };
    // SAFETY: live blocks of the sizes stated, in stream order.
    unsafe { compact(backend.device(), &work) }?;
    kv.second_half = !kv.second_half;
    kv.lists.iter_mut().zip(&entries.lengths).for_each(|(list, kept)| list.length = *kept);
    kv.shared = false;
    Ok(())
}
