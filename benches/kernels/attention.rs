//! A layer of Llama 3.1 8B reading a prompt: attention, and attention with the scores of its last queries.

use anyhow::Result;
use fastkv::{
    abi::Rows,
    backend::cuda::CudaLauncher,
    kernels::{
        DType,
        attention::{self, PrefillAttention},
        batch::{Lengths, Lse, ScoreHeads, Scores, Window, default_scale},
        scores::{WindowScores, window_scores},
    },
};

use crate::{Memory, Work};

const QUERY_HEADS: u32 = 32;
const KV_HEADS: u32 = 8;
const HEAD_DIM: u32 = 128;
const WINDOW: u32 = 8;

pub(crate) fn works(device: &CudaLauncher) -> Result<Vec<Work<'_>>> {
    let mut works = Vec::new();
    for tokens in [4096, 8192, 16_384, 32_768, 65_536, 131_072] {
        works.push(prefill(device, tokens, None)?);
        works.push(prefill(device, tokens, Some(Window::Last(WINDOW)))?);
        works.push(window(device, tokens)?);
    }
    works.push(prefill(device, 8192, Some(Window::All))?);
    Ok(works)
}

/// Attention without and with the scores of the last queries, at several lengths.
pub(crate) fn scoring(device: &CudaLauncher) -> Result<Vec<(String, Work<'_>, Work<'_>)>> {
    let pair = |tokens| {
        let scored = prefill(device, tokens, Some(Window::Last(WINDOW)))?;
        Ok((format!("scores_in_attention/{tokens} tokens"), prefill(device, tokens, None)?, scored))
    };
    [8192, 32_768, 131_072].into_iter().map(pair).collect()
}

/// Queries, keys and values of a prompt. Random, so that the chip draws the power that real numbers take.
struct Tensors {
    q: Rows,
    k: Rows,
    v: Rows,
    out: Rows,
}

fn tensors(memory: &Memory<'_>, tokens: u32) -> Result<Tensors> {
    let elements = |heads: u32| tokens as usize * (heads * HEAD_DIM) as usize;
    let rows = |base: u64, heads: u32| Rows::token_major(base, tokens, heads, HEAD_DIM);
    Ok(Tensors {
        q: rows(memory.normal(elements(QUERY_HEADS), 1)?, QUERY_HEADS),
        k: rows(memory.normal(elements(KV_HEADS), 2)?, KV_HEADS),
        v: rows(memory.normal(elements(KV_HEADS), 3)?, KV_HEADS),
        out: rows(memory.filled(elements(QUERY_HEADS) * 2, 0)?, QUERY_HEADS),
    })
}

/// Scores of every query head.
fn scores(memory: &Memory<'_>, tokens: u32, window: Window) -> Result<Scores> {
    Ok(Scores {
        base: memory.filled((QUERY_HEADS * tokens) as usize * 4, 0)?,
        sequence_stride: i64::from(QUERY_HEADS * tokens),
        head_stride: tokens.into(),
        window,
        heads: ScoreHeads::Query,
    })
}

fn prefill(device: &CudaLauncher, tokens: u32, window: Option<Window>) -> Result<Work<'_>> {
    let memory = Memory::new(device);
    let Tensors { q, k, v, out } = tensors(&memory, tokens)?;
    let mut work = PrefillAttention {
        q,
        k,
        v,
        out,
        sequences: 1,
        query_heads: QUERY_HEADS,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        dtype: DType::BF16,
        queries: Lengths::dense(tokens),
        keys: Lengths::dense(tokens),
        positions: 0,
        scale: default_scale(HEAD_DIM),
        bias: None,
        lse: None,
        scores: window.map(|window| scores(&memory, tokens, window)).transpose()?,
        workspace: 0,
        workspace_bytes: 0,
        form: None,
    };
    work.workspace_bytes = attention::prefill_attention_workspace(&work)?;
    work.workspace = memory.filled(work.workspace_bytes, 0)?;
    let scored = match window {
        None => String::new(),
        Some(Window::Last(queries)) => format!(", scores of the last {queries}"),
        Some(Window::All) => ", scores of all".into(),
    };
    let (n, width) = (f64::from(tokens), f64::from(HEAD_DIM));
    // Q K^T and P V over half the square; what is scored besides is not part of the floor.
    let flops = 2.0 * n * n * width * f64::from(QUERY_HEADS);
    Ok(Work {
        name: format!("prefill_attention/{tokens} tokens{scored}"),
        bytes: 2.0 * n * width * f64::from(2 * QUERY_HEADS + 2 * KV_HEADS),
        flops,
        run: Box::new(move || {
            let _alive = &memory;
            // SAFETY: every address is a block of `memory`, of the size that its field states.
            unsafe { attention::prefill_attention(device, &work) }
        }),
    })
}

/// Scores alone, as an engine wants them that has its own attention and its LSE.
fn window(device: &CudaLauncher, tokens: u32) -> Result<Work<'_>> {
    let memory = Memory::new(device);
    let Tensors { q, k, .. } = tensors(&memory, tokens)?;
    let work = WindowScores {
        q,
        k,
        sequences: 1,
        query_heads: QUERY_HEADS,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        dtype: DType::BF16,
        queries: Lengths::dense(tokens),
        keys: Lengths::dense(tokens),
        positions: 0,
        scale: default_scale(HEAD_DIM),
        bias: None,
        lse: Some(Lse {
            base: memory.filled((QUERY_HEADS * tokens) as usize * 4, 0)?,
            stride: tokens.into(),
        }),
        scores: scores(&memory, tokens, Window::Last(WINDOW))?,
        workspace: 0,
        workspace_bytes: 0,
    };
    let n = f64::from(tokens);
    Ok(Work {
        name: format!("window_scores/{tokens} tokens, LSE given"),
        bytes: n * f64::from(2 * KV_HEADS * HEAD_DIM + 4 * QUERY_HEADS),
        flops: 2.0 * n * f64::from(WINDOW * QUERY_HEADS * HEAD_DIM),
        run: Box::new(move || {
            let _alive = &memory;
            // SAFETY: every address is a block of `memory`, of the size that its field states.
            unsafe { window_scores(device, &work) }
        }),
    })
}
