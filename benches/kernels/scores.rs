//! Scores by themselves: of a window, with and without its LSE, of keys in pages, and of all queries; and their pooling.

use anyhow::Result;
use fastkv::{
    abi::Pooling,
    kernels::{
        DType, Device,
        batch::{Lengths, Lse, ScoreHeads, ScoreRows, Scores, Window, default_scale},
        columns::{ColumnSums, column_sums},
        scores::{PoolScores, WindowScores, pool_scores, window_scores, window_scores_workspace},
    },
};

use crate::{
    Work,
    attention::{WINDOW, scores},
    memory::Memory,
    shape::Shape,
};

/// Whether LSE is given, and whether keys lie in pages.
#[derive(Clone, Copy)]
struct Variant {
    lse: bool,
    paged: bool,
}

const LSE_GIVEN: Variant = Variant { lse: true, paged: false };

pub(crate) fn works<'a, D: Device>(device: &'a D, shape: &Shape) -> Result<Vec<Work<'a>>> {
    let mut works = Vec::new();
    for tokens in [4096, 8192, 16_384, 32_768, 65_536, 131_072] {
        works.push(window(device, shape, tokens, LSE_GIVEN)?);
    }
    for tokens in [8192, 32_768, 131_072] {
        works.push(window(device, shape, tokens, Variant { paged: true, ..LSE_GIVEN })?);
        works.push(window(device, shape, tokens, Variant { lse: false, ..LSE_GIVEN })?);
        works.push(columns(device, shape, tokens, None)?);
        // FastGen's local keys.
        works.push(columns(device, shape, tokens, Some(0.3))?);
        works.push(pool(device, shape, tokens)?);
    }
    Ok(works)
}

/// Queries and keys of a prompt; an LSE where there is to be one.
fn described<D: Device>(
    memory: &Memory<'_, D>,
    shape: &Shape,
    tokens: u32,
    lse: bool,
    scores: Scores,
) -> Result<WindowScores> {
    let Shape { query_heads, kv_heads, head_dim, .. } = *shape;
    let lse_of_all = || memory.filled((query_heads * tokens) as usize * 4, 0);
    let mut work = WindowScores {
        q: memory.token_major([tokens, query_heads, head_dim], 1)?,
        k: memory.token_major([tokens, kv_heads, head_dim], 2)?,
        sequences: 1,
        query_heads,
        kv_heads,
        head_dim,
        dtype: DType::BF16,
        queries: Lengths::dense(tokens),
        keys: Lengths::dense(tokens),
        scale: default_scale(head_dim),
        lse: match lse {
            true => Some(Lse::head_major(lse_of_all()?, tokens)),
            false => None,
        },
        scores,
        ..Default::default()
    };
    work.workspace_bytes = window_scores_workspace(&work)?;
    work.workspace = memory.filled(work.workspace_bytes, 0)?;
    Ok(work)
}

/// As an engine wants them that has its own attention. With its LSE keys are read once, otherwise twice.
fn window<'a, D: Device>(
    device: &'a D,
    shape: &Shape,
    tokens: u32,
    Variant { lse, paged }: Variant,
) -> Result<Work<'a>> {
    let tokens = shape.length(tokens);
    let memory = Memory::new(device);
    let heads = (shape.query_heads, ScoreHeads::Query);
    let scores = scores(&memory, tokens, Window::Last(WINDOW), heads)?;
    let mut work = described(&memory, shape, tokens, lse, scores)?;
    if paged {
        let cache = shape.paged_cache(&memory, 1, tokens)?;
        (work.k, work.pages, work.lengths) = (cache.k, cache.pages, cache.lengths);
    }
    let (passes, words) = if lse { (1, "LSE given") } else { (2, "two passes") };
    let keys = f64::from(passes * 2) * shape.key_elements(tokens) as f64;
    let bytes = keys + 4.0 * f64::from(tokens * shape.query_heads);
    let flops = f64::from(passes * 2 * WINDOW) * shape.query_elements(tokens) as f64;
    // SAFETY: every address is a block of `memory`, of the size that its field states.
    let run = move || unsafe { window_scores(device, &work) };
    let pages = if paged { ", paged" } else { "" };
    let name = format!("window_scores/{tokens} tokens, {words}{pages}");
    Ok(Work::new(name, bytes, memory, run).with_flops(flops))
}

/// Sums over all queries, each of which counts on all keys that it sees, or on a share of the prompt.
fn columns<'a, D: Device>(device: &'a D, shape: &Shape, tokens: u32, share: Option<f64>) -> Result<Work<'a>> {
    let tokens = shape.length(tokens);
    let band = share.map(|share| (share * f64::from(tokens)) as u32);
    let memory = Memory::new(device);
    let heads = (shape.kv_heads, ScoreHeads::Group);
    let scores = scores(&memory, tokens, Window::All, heads)?;
    let work =
        ColumnSums { sums: described(&memory, shape, tokens, true, scores)?, weight: 1.0, step: 0.0, band };
    let words = band.map_or_else(String::new, |band| format!(", a band of {band}"));
    let name = format!("column_sums/{tokens} tokens{words}");
    // Q, K, LSE and sums.
    let elements = shape.query_elements(tokens) + shape.key_elements(tokens);
    let rows = tokens * (shape.query_heads + shape.kv_heads);
    let bytes = 2.0 * elements as f64 + 4.0 * f64::from(rows);
    // Q K^T: of a query with the keys of its band, of which the first queries see a part.
    let (n, band) = (f64::from(tokens), f64::from(band.unwrap_or(tokens)));
    let pairs = n * band - band * band / 2.0;
    let flops = 2.0 * pairs * f64::from(shape.query_heads * shape.head_dim);
    // SAFETY: as above.
    let run = move || unsafe { column_sums(device, &work) };
    Ok(Work::new(name, bytes, memory, run).with_flops(flops))
}

/// Groups and their sum, as ranks that share the heads want them.
fn pool<'a, D: Device>(device: &'a D, shape: &Shape, keys: u32) -> Result<Work<'a>> {
    let keys = shape.length(keys);
    let Shape { query_heads, kv_heads, .. } = *shape;
    let memory = Memory::new(device);
    let rows = |base, heads: u32| ScoreRows {
        base,
        sequence_stride: i64::from(heads * keys),
        head_stride: keys.into(),
    };
    let room = |heads: u32| memory.filled((heads * keys) as usize * 4, 0);
    let work = PoolScores {
        scores: rows(memory.uniform((query_heads * keys) as usize)?, query_heads),
        sequences: 1,
        query_heads,
        kv_heads,
        keys: Lengths::dense(keys),
        tail: WINDOW,
        pooling: Pooling::max(7),
        groups: Some(rows(room(kv_heads)?, kv_heads)),
        total: Some(rows(room(1)?, 1)),
        ..Default::default()
    };
    let bytes = 4.0 * f64::from((query_heads + kv_heads + 1) * (keys - WINDOW));
    // SAFETY: as above.
    let run = move || unsafe { pool_scores(device, &work) };
    Ok(Work::new(format!("pool_scores/{keys} keys, max pooling"), bytes, memory, run))
}
