//! A layer reading a prompt: attention, and attention with the scores of its last queries.

use anyhow::Result;
use fastkv::{
    abi::Rows,
    kernels::{
        DType, Device,
        attention::{self, Form, PrefillAttention},
        batch::{Bias, Lengths, ScoreHeads, Scores, Window, default_scale},
    },
};

use crate::{Work, memory::Memory, shape::Shape};

/// Queries of the observation window.
pub(crate) const WINDOW: u32 = 8;

/// What attention does besides, and how.
#[derive(Clone, Copy, Default)]
struct Variant {
    window: Option<Window>,
    /// A bias on every key but the first 64, for every head.
    steered: bool,
    /// Whether keys and values lie in pages.
    paged: bool,
    form: Option<Form>,
}

const SCORED: Variant =
    Variant { window: Some(Window::Last(WINDOW)), steered: false, paged: false, form: None };

pub(crate) fn works<'a, D: Device>(device: &'a D, shape: &Shape) -> Result<Vec<Work<'a>>> {
    let mut works = Vec::new();
    for tokens in [4096, 8192, 16_384, 32_768, 65_536, 131_072] {
        works.push(prefill(device, shape, tokens, Variant::default())?);
        works.push(prefill(device, shape, tokens, SCORED)?);
    }
    works.push(prefill(device, shape, 8192, Variant { window: Some(Window::All), ..Variant::default() })?);
    for tokens in [8192, 32_768] {
        let portable = Variant { form: Some(Form::Portable), ..Variant::default() };
        for form in [Variant::default(), portable] {
            works.push(prefill(device, shape, tokens, Variant { steered: true, ..form })?);
            works.push(prefill(device, shape, tokens, Variant { paged: true, ..form })?);
        }
        works.push(prefill(device, shape, tokens, portable)?);
    }
    Ok(works)
}

/// Attention without and with the scores of the last queries, at several lengths.
pub(crate) fn scoring<'a, D: Device>(
    device: &'a D,
    shape: &Shape,
) -> Result<Vec<(String, Work<'a>, Work<'a>)>> {
    let pair = |tokens| {
        let without = prefill(device, shape, tokens, Variant::default())?;
        let with = prefill(device, shape, tokens, SCORED)?;
        Ok((format!("scores_in_attention/{tokens} tokens"), without, with))
    };
    [8192, 32_768, 131_072].into_iter().map(pair).collect()
}

/// Room for a score of every key for each of `heads`.
pub(crate) fn scores<D: Device>(
    memory: &Memory<'_, D>,
    tokens: u32,
    window: Window,
    heads: (u32, ScoreHeads),
) -> Result<Scores> {
    let (count, heads) = heads;
    Ok(Scores {
        base: memory.filled((count * tokens) as usize * 4, 0)?,
        sequence_stride: i64::from(count * tokens),
        head_stride: tokens.into(),
        window,
        heads,
    })
}

fn prefill<'a, D: Device>(
    device: &'a D,
    shape: &Shape,
    tokens: u32,
    Variant { window, steered, paged, form }: Variant,
) -> Result<Work<'a>> {
    let tokens = shape.length(tokens);
    let Shape { query_heads, kv_heads, head_dim, .. } = *shape;
    let memory = Memory::new(device);
    let q = memory.token_major([tokens, query_heads, head_dim], 1)?;
    let bias = || -> Result<Bias> {
        let keys = [vec![0; 2], vec![!0_u32; tokens.div_ceil(32) as usize]].concat();
        let heads = memory.put(&vec![!0_u32; query_heads.div_ceil(32) as usize])?;
        Ok(Bias { heads, keys: memory.put(&keys)?, key_stride: keys.len() as i64, value: -4.6 })
    };
    let of_heads = |window| scores(&memory, tokens, window, (query_heads, ScoreHeads::Query));
    let mut work = PrefillAttention {
        q,
        k: memory.token_major([tokens, kv_heads, head_dim], 2)?,
        v: memory.token_major([tokens, kv_heads, head_dim], 3)?,
        out: Rows { base: memory.filled(shape.query_elements(tokens) * 2, 0)?, ..q },
        sequences: 1,
        query_heads,
        kv_heads,
        head_dim,
        dtype: DType::BF16,
        queries: Lengths::dense(tokens),
        keys: Lengths::dense(tokens),
        scale: default_scale(head_dim),
        bias: steered.then(bias).transpose()?,
        scores: window.map(of_heads).transpose()?,
        form,
        ..Default::default()
    };
    if paged {
        let cache = shape.paged_cache(&memory, 1, tokens)?;
        (work.k, work.v, work.pages, work.lengths) = (cache.k, cache.v, cache.pages, cache.lengths);
    }
    work.workspace_bytes = attention::prefill_attention_workspace(&work)?;
    work.workspace = memory.filled(work.workspace_bytes, 0)?;
    let scored = match window {
        None => String::new(),
        Some(Window::Last(queries)) => format!(", scores of the last {queries}"),
        Some(Window::All) => ", scores of all".into(),
    };
    let steered = if steered { ", steered" } else { "" };
    let paged = if paged { ", paged" } else { "" };
    let portable = if form == Some(Form::Portable) { ", portable form" } else { "" };
    let name = format!("prefill_attention/{tokens} tokens{scored}{steered}{paged}{portable}");
    // Q, K, V and the output.
    let bytes = 2.0 * 2.0 * (shape.query_elements(tokens) + shape.key_elements(tokens)) as f64;
    // Q K^T and P V over half the square; what is scored besides is not part of the floor.
    let flops = 2.0 * f64::from(tokens) * shape.query_elements(tokens) as f64;
    // SAFETY: every address is a block of `memory`, of the size that its field states.
    let run = move || unsafe { attention::prefill_attention(device, &work) };
    Ok(Work::new(name, bytes, memory, run).with_flops(flops))
}
