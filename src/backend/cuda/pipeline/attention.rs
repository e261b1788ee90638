//! Attention over a store, and what it tells of the keys.

use std::fmt::Debug;

use super::handles::Span;
use super::memory::Block;
use super::steering::Steered;
use super::{CudaBackend, Indices, Kv, Scores, Tensor, shape};
use crate::abi::Rows;
use crate::backend::{BackendError, Bias, Visible};
use crate::kernels::attention::{PrefillAttention, prefill_attention, prefill_attention_workspace};
use crate::kernels::batch::{self, Lengths, Lse, ScoreHeads, Window, default_scale};
use crate::kernels::decode::{Decode, MAX_TOKENS, decode, decode_workspace};
use crate::kernels::scores::{WindowScores, window_scores as window_scores_of, window_scores_workspace};
use crate::kernels::{Device, MatrixProduct};

/// What goes with attention beside queries and keys.
#[derive(Debug)]
pub(super) struct Beside<'a, D: Device> {
    pub(super) steered: Option<&'a Steered<D>>,
    /// Receives the LSE of every query head and row, `[query heads][rows]`, where it is wanted.
    pub(super) lse: Option<&'a Block<D>>,
}

impl<D: MatrixProduct + Debug> Beside<'_, D> {
    /// The heads that one launch can take.
    pub(super) fn spans(&self, kv: &Kv<D>) -> Vec<Span> {
        self.steered.map_or_else(|| kv.spans(), |_| Steered::spans(kv))
    }

    pub(super) fn bias(&self, span: Span, kv: &Kv<D>) -> Option<batch::Bias> {
        self.steered.and_then(|steered| steered.of_keys(span, kv))
    }

    /// The LSE of the query heads from `first` on.
    pub(super) fn lse(&self, first: usize, rows: usize) -> Option<Lse> {
        self.lse.map(|lse| Lse::head_major(lse.address() + 4 * (first * rows) as u64, rows as u32))
    }
}

pub(super) fn attention<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    queries: &Tensor<D>,
    kv: &Kv<D>,
    visible: Visible<'_, Indices<D>>,
    bias: Option<&Bias<'_>>,
) -> Result<Tensor<D>, BackendError> {
    let group = group("attention", queries, kv)?;
    let by_key = matches!(visible, Visible::Rows { .. }) || !is_decoding(queries);
    let steered = Steered::of(backend, "attention", bias, kv, group, by_key)?;
    attend(backend, queries, kv, visible, &Beside { steered: steered.as_ref(), lse: None })
}

pub(super) fn attend<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    queries: &Tensor<D>,
    kv: &Kv<D>,
    visible: Visible<'_, Indices<D>>,
    beside: &Beside<'_, D>,
) -> Result<Tensor<D>, BackendError> {
    let group = group("attention", queries, kv)?;
    let mut scratch = None;
    let queries = backend.narrow(queries, &mut scratch)?;
    let out = backend.tensor("attention", queries.rows, queries.width, queries.dtype)?;
    let positions = match visible {
        Visible::Rows { rows, first } => rows.from("attention", first, queries.rows)?,
        Visible::Aligned => {
            if let Some(list) = kv.lists.iter().find(|list| list.length < queries.rows) {
                let problem = format!("{} queries for the last of {} keys", queries.rows, list.length);
                return Err(shape("attention", problem));
            }
            if is_decoding(queries) {
                newest(backend, queries, kv, group, beside, &out)?;
                return Ok(out);
            }
            0
        }
    };
    for span in beside.spans(kv) {
        let bias = beside.bias(span, kv);
        let lse = beside.lse(span.first_head * group, queries.rows);
        let work = PrefillAttention { positions, bias, lse, ..prefill(queries, kv, span, group, &out) };
        launch(backend, work)?;
    }
    Ok(out)
}

/// Whether the kernel of decoding takes so few rows, where they are the newest: it splits long lists among the
/// blocks.
fn is_decoding<D: Device>(queries: &Tensor<D>) -> bool {
    (1..=MAX_TOKENS as usize).contains(&queries.rows)
}

pub(super) fn attention_with_scores<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    queries: &Tensor<D>,
    kv: &Kv<D>,
    window: usize,
) -> Result<(Tensor<D>, Scores<D>), BackendError> {
    let group = group("attention_with_scores", queries, kv)?;
    let span = kv.common("attention_with_scores")?;
    check_window("attention_with_scores", window, queries.rows, span)?;
    let mut scratch = None;
    let queries = backend.narrow(queries, &mut scratch)?;
    let out = backend.tensor("attention", queries.rows, queries.width, queries.dtype)?;
    let scores = backend.scores(queries.width / kv.head_dim, span.list.length)?;
    let wanted = Some(summed(&scores, 0, window));
    launch(backend, PrefillAttention { scores: wanted, ..prefill(queries, kv, span, group, &out) })?;
    Ok((out, scores))
}

pub(super) fn window_scores<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    queries: &Tensor<D>,
    kv: &Kv<D>,
    bias: Option<&Bias<'_>>,
) -> Result<Scores<D>, BackendError> {
    let group = group("window_scores", queries, kv)?;
    let span = kv.common("window_scores")?;
    check_window("window_scores", queries.rows, queries.rows, span)?;
    let steered = Steered::of(backend, "window_scores", bias, kv, group, true)?;
    let beside = Beside { steered: steered.as_ref(), lse: None };
    let mut scratch = None;
    let queries = backend.narrow(queries, &mut scratch)?;
    let scores = backend.scores(queries.width / kv.head_dim, span.list.length)?;
    for span in beside.spans(kv) {
        let wanted = summed(&scores, span.first_head * group, queries.rows);
        let mut work =
            WindowScores { bias: beside.bias(span, kv), ..scored(queries, kv, span, group, wanted) };
        work.workspace_bytes = window_scores_workspace(&work)?;
        let workspace = backend.machine.block("the scratch memory of scores", work.workspace_bytes)?;
        work.workspace = workspace.address();
        // SAFETY: live blocks of the sizes stated, in stream order.
        unsafe { window_scores_of(backend.device(), &work) }?;
    }
    Ok(scores)
}

/// Scores of a span's keys, where the queries belong to the last of them.
pub(super) fn scored<D: Device>(
    queries: &Tensor<D>,
    kv: &Kv<D>,
    span: Span,
    group: usize,
    scores: batch::Scores,
) -> WindowScores {
    WindowScores {
        q: queries.heads(span.first_head * group, kv.head_dim),
        k: kv.tensor(&kv.keys, span),
        sequences: 1,
        query_heads: (span.heads * group) as u32,
        kv_heads: span.heads as u32,
        head_dim: kv.head_dim as u32,
        dtype: queries.dtype,
        queries: Lengths::dense(queries.rows as u32),
        keys: Lengths::dense(span.list.length as u32),
        scale: default_scale(kv.head_dim as u32),
        scores,
        ..Default::default()
    }
}

/// One product for each kv head: its group's queries with its keys.
pub(super) fn query_key_products<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    query: &Tensor<D>,
    kv: &Kv<D>,
) -> Result<Scores<D>, BackendError> {
    let group = group("query_key_products", query, kv)?;
    let length = kv.common("query_key_products")?.list.length;
    if query.rows != 1 {
        let problem = format!("{} rows, where one query is wanted", query.rows);
        return Err(shape("query_key_products", problem));
    }
    let mut scratch = None;
    let query = backend.narrow(query, &mut scratch)?;
    let scores = backend.scores(query.width / kv.head_dim, length)?;
    if length == 0 {
        return Ok(scores);
    }
    for span in kv.lists_apart() {
        let first = span.first_head * group;
        let matrix = |rows: Rows, token_stride: usize| Rows { token_stride: token_stride as i64, ..rows };
        let out = Rows { base: scores.row(first), ..Rows::default() };
        backend.multiply(
            matrix(query.heads(first, kv.head_dim), kv.head_dim),
            group,
            kv.tensor(&kv.keys, span),
            [length, kv.head_dim],
            0,
            (matrix(out, scores.stride), crate::kernels::DType::F32),
        )?;
    }
    Ok(scores)
}

/// Attention of the newest rows, which are in the store, over lists of any lengths.
fn newest<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    queries: &Tensor<D>,
    kv: &Kv<D>,
    group: usize,
    beside: &Beside<'_, D>,
    out: &Tensor<D>,
) -> Result<(), BackendError> {
    let bias = beside.steered.map(Steered::of_positions);
    let query_heads = (group * kv.lists.len()) as u32;
    let work = Decode {
        cache: kv.cache(),
        q: queries.heads(0, kv.head_dim),
        k_new: Rows::default(),
        v_new: Rows::default(),
        out: out.heads(0, kv.head_dim),
        positions_new: 0,
        lse: beside.lse.map(|lse| Lse::padded(lse.address(), query_heads, queries.rows as u32)),
        full: 0,
        bias: bias.map(|(bias, _)| bias),
        bias_positions: bias.map_or(0, |(_, positions)| positions),
        scale: default_scale(kv.head_dim as u32),
        query_heads,
        tokens: queries.rows as u32,
        head_dim: kv.head_dim as u32,
        dtype: queries.dtype,
        counters: 0,
        workspace: 0,
        workspace_bytes: 0,
    };
    step(backend, work)
}

/// Queues a step of decoding, whose workspace is added here.
pub(super) fn step<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    mut work: Decode,
) -> Result<(), BackendError> {
    work.workspace_bytes = decode_workspace(&work)?;
    let workspace = backend.machine.block("the scratch memory of attention", work.workspace_bytes)?;
    work.workspace = workspace.address();
    // SAFETY: live blocks of the sizes stated, in stream order; no two lists share rows.
    Ok(unsafe { decode(backend.device(), &work) }?)
}

/// Attention of a span's heads, where the queries belong to the last keys.
fn prefill<D: Device>(
    queries: &Tensor<D>,
    kv: &Kv<D>,
    span: Span,
    group: usize,
    out: &Tensor<D>,
) -> PrefillAttention {
    let first = span.first_head * group;
    PrefillAttention {
        q: queries.heads(first, kv.head_dim),
        k: kv.tensor(&kv.keys, span),
        v: kv.tensor(&kv.values, span),
        out: out.heads(first, kv.head_dim),
        sequences: 1,
        query_heads: (span.heads * group) as u32,
        kv_heads: span.heads as u32,
        head_dim: kv.head_dim as u32,
        dtype: queries.dtype,
        queries: Lengths::dense(queries.rows as u32),
        keys: Lengths::dense(span.list.length as u32),
        scale: default_scale(kv.head_dim as u32),
        ..Default::default()
    }
}

fn launch<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    mut work: PrefillAttention,
) -> Result<(), BackendError> {
    work.workspace_bytes = prefill_attention_workspace(&work)?;
    let workspace = backend.machine.block("the scratch memory of attention", work.workspace_bytes)?;
    work.workspace = workspace.address();
    // SAFETY: live blocks of the sizes stated, in stream order.
    Ok(unsafe { prefill_attention(backend.device(), &work) }?)
}

/// Sums over the last queries, for every query head from `first` on.
fn summed<D: Device>(scores: &Scores<D>, first: usize, window: usize) -> batch::Scores {
    batch::Scores {
        base: scores.row(first),
        sequence_stride: 0,
        head_stride: scores.stride as i64,
        window: Window::Last(window as u32),
        heads: ScoreHeads::Query,
    }
}

/// Query heads of each kv head.
pub(super) fn group<D: Device>(
    operation: &'static str,
    queries: &Tensor<D>,
    kv: &Kv<D>,
) -> Result<usize, BackendError> {
    let width = kv.lists.len() * kv.head_dim;
    if queries.width == 0 || !queries.width.is_multiple_of(width) {
        let problem = format!(
            "queries of {} elements are no whole groups of {} kv heads of {}",
            queries.width,
            kv.lists.len(),
            kv.head_dim
        );
        return Err(shape(operation, problem));
    }
    Ok(queries.width / width)
}

fn check_window(
    operation: &'static str,
    window: usize,
    queries: usize,
    span: Span,
) -> Result<(), BackendError> {
    let keys = span.list.length;
    if window > queries || queries > keys {
        let problem = format!("a window of {window} in {queries} queries for the last of {keys} keys");
        return Err(shape(operation, problem));
    }
    Ok(())
}
