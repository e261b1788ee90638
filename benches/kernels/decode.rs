//! A step of decoding over caches of these lengths: one sequence and sixteen, ragged and paged, one token and four.

use anyhow::Result;
use fastkv::{
    abi::Rows,
    kernels::{
        DType, Device,
        batch::default_scale,
        decode::{self, Decode},
    },
};

use crate::{Work, memory::Memory, shape::Shape};

pub(crate) fn works<'a, D: Device>(device: &'a D, shape: &Shape) -> Result<Vec<Work<'a>>> {
    let mut works = Vec::new();
    for (sequences, entries) in
        [(1, 512), (1, 2048), (1, 8192), (1, 32_768), (1, 131_072), (16, 512), (16, 2048), (16, 8192)]
    {
        works.push(step(device, shape, [sequences, entries, 1], false)?);
    }
    for (sequences, entries) in [(1, 8192), (1, 131_072), (16, 2048)] {
        works.push(step(device, shape, [sequences, entries, 1], true)?);
    }
    works.push(step(device, shape, [1, 8192, 4], false)?);
    Ok(works)
}

/// The caches hold the new tokens already: every step of a measurement sees the same lengths.
fn step<'a, D: Device>(
    device: &'a D,
    shape: &Shape,
    [sequences, entries, tokens]: [u32; 3],
    paged: bool,
) -> Result<Work<'a>> {
    let Shape { query_heads, head_dim, .. } = *shape;
    let entries = shape.length(entries);
    let memory = Memory::new(device);
    let outputs = shape.query_elements(sequences * tokens);
    let queries = |base| Rows::token_major(base, tokens, query_heads, head_dim);
    let mut work = Decode {
        cache: match paged {
            true => shape.paged_cache(&memory, sequences, entries)?,
            false => shape.cache(&memory, sequences, entries)?,
        },
        q: queries(memory.normal(outputs, 3)?),
        k_new: Rows::default(),
        v_new: Rows::default(),
        out: queries(memory.filled(outputs * 2, 0)?),
        positions_new: 0,
        lse: None,
        full: 0,
        bias: None,
        bias_positions: 0,
        scale: default_scale(head_dim),
        query_heads,
        tokens,
        head_dim,
        dtype: DType::BF16,
        counters: 0,
        workspace: 0,
        workspace_bytes: 0,
    };
    work.counters = memory.filled(4 * decode::decode_counters(&work)?, 0)?;
    work.workspace_bytes = decode::decode_workspace(&work)?;
    work.workspace = memory.filled(work.workspace_bytes, 0)?;
    let new = if tokens > 1 { format!(", {tokens} tokens") } else { String::new() };
    let pages = if paged { ", paged" } else { "" };
    let name = format!("decode/{entries} entries, {sequences} sequences{new}{pages}");
    // K and V, queries and output.
    let bytes = 4.0 * (shape.key_elements(sequences * entries) + outputs) as f64;
    // SAFETY: every address is a block of `memory`, of the size that its field states.
    let run = move || unsafe { decode::decode(device, &work) };
    Ok(Work::new(name, bytes, memory, run))
}
