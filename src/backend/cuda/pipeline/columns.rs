//! Sums of attention over many queries: attention leaves each query's LSE, and a pass over the keys sums
//! probabilities tile by tile.

use std::fmt::Debug;

use super::attention::{Beside, attend, group, scored};
use super::steering::Steered;
use super::{CudaBackend, Kv, Scores, Tensor};
use crate::backend::{BackendError, Bias, Columns, Visible};
use crate::kernels::MatrixProduct;
use crate::kernels::batch::{self, ScoreHeads, Window};
use crate::kernels::columns::{ColumnSums, column_sums as sum_columns};
use crate::kernels::scores::WindowScores;

/// The attention goes to waste: what asks for both takes [`attention_with_columns`].
pub(super) fn column_sums<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    queries: &Tensor<D>,
    kv: &Kv<D>,
    columns: Columns,
    bias: Option<&Bias<'_>>,
) -> Result<Scores<D>, BackendError> {
    observed(backend, queries, kv, bias, |_, sums| sums(columns))
}

pub(super) fn attention_with_columns<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    queries: &Tensor<D>,
    kv: &Kv<D>,
    columns: &[Columns],
    bias: Option<&Bias<'_>>,
) -> Result<(Tensor<D>, Vec<Scores<D>>), BackendError> {
    observed(backend, queries, kv, bias, |attended, sums| {
        let sums = columns.iter().map(|columns| sums(*columns));
        Ok((attended, sums.collect::<Result<_, _>>()?))
    })
}

/// Hands on the attention, and what makes sums of its probabilities.
fn observed<D: MatrixProduct + Debug, T>(
    backend: &CudaBackend<D>,
    queries: &Tensor<D>,
    kv: &Kv<D>,
    bias: Option<&Bias<'_>>,
    take: impl FnOnce(Tensor<D>, &dyn Fn(Columns) -> Result<Scores<D>, BackendError>) -> Result<T, BackendError>,
) -> Result<T, BackendError> {
    let group = group("column_sums", queries, kv)?;
    let steered = Steered::of(backend, "column_sums", bias, kv, group, true)?;
    let mut scratch = None;
    let queries = backend.narrow(queries, &mut scratch)?;
    let lse = backend.machine.array("normalisers of attention", kv.lists.len() * group * queries.rows, 4)?;
    let beside = Beside { steered: steered.as_ref(), lse: Some(&lse) };
    let attended = attend(backend, queries, kv, Visible::Aligned, &beside)?;
    take(attended, &|columns| sums(backend, queries, kv, group, columns, &beside))
}

/// The sums of queries whose LSE is there.
fn sums<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    queries: &Tensor<D>,
    kv: &Kv<D>,
    group: usize,
    Columns { weight, step, band }: Columns,
    beside: &Beside<'_, D>,
) -> Result<Scores<D>, BackendError> {
    let longest = kv.lists.iter().map(|list| list.length).max().unwrap_or(0);
    let out = backend.scores(kv.lists.len(), longest)?;
    if queries.rows == 0 || kv.lists.iter().any(|list| list.length < longest) {
        out.block.fill(0)?;
    }
    // Without queries there are no sums.
    for span in beside.spans(kv).into_iter().filter(|_| queries.rows > 0) {
        let wanted = batch::Scores {
            base: out.row(span.first_head),
            sequence_stride: 0,
            head_stride: out.stride as i64,
            window: Window::All,
            heads: ScoreHeads::Group,
        };
        let work = ColumnSums {
            sums: WindowScores {
                bias: beside.bias(span, kv),
                lse: beside.lse(span.first_head * group, queries.rows),
                ..scored(queries, kv, span, group, wanted)
            },
            weight,
            step,
            band: band.map(|band| u32::try_from(band).unwrap_or(u32::MAX)),
        };
        // SAFETY: live blocks of the sizes stated, in stream order.
        unsafe { sum_columns(backend.device(), &work) }?;
    }
    Ok(out)
}
