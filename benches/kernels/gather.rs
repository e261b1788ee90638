//! The rows that a layer keeps of a prompt of 32K tokens: taken from it, or moved to the front of where they are.

use anyhow::Result;
use fastkv::{
    abi::{Kept, Pages, Rows, Slots},
    kernels::{
        DType, Device,
        gather::{self, Compact, GatherIndices, GatherKv, GatherRows},
    },
};

use crate::{
    Work,
    memory::Memory,
    shape::{PAGE, Shape},
};

const TOKENS: u32 = 32_768;

pub(crate) fn works<'a, D: Device>(device: &'a D, shape: &Shape) -> Result<Vec<Work<'a>>> {
    let mut works = Vec::new();
    for kept in [512, 2048, 8192, 16_384] {
        works.push(kv(device, shape, kept, false)?);
        works.push(hidden(device, shape, kept)?);
        works.push(compact(device, shape, kept)?);
    }
    for kept in [2048, 16_384] {
        works.push(kv(device, shape, kept, true)?);
        works.push(indices(device, shape, kept)?);
    }
    Ok(works)
}

/// Ascending indices, evenly spread: the last of each stretch of tokens, so that none is where it goes.
fn spread(tokens: u32, kept: u32) -> Vec<i32> {
    let end = |i: u32| u64::from(i + 1) * u64::from(tokens) / u64::from(kept);
    (0..kept).map(|i| end(i) as i32 - 1).collect()
}

fn lists<D: Device>(memory: &Memory<'_, D>, heads: u32, tokens: u32, kept: u32) -> Result<Kept> {
    Ok(Kept {
        indices: memory.put(&spread(tokens, kept).repeat(heads as usize))?,
        index_sequence_stride: i64::from(heads * kept),
        index_head_stride: kept.into(),
        out_rows: i64::from(heads * kept),
        sequences: 1,
        heads: heads as i32,
        tokens: tokens as i32,
        capacity: kept as i32,
        ..Kept::default()
    })
}

/// From a prompt's K and V to dense caches, or from pages to pages.
fn kv<'a, D: Device>(device: &'a D, shape: &Shape, kept: u32, paged: bool) -> Result<Work<'a>> {
    let Shape { kv_heads: heads, head_dim, .. } = *shape;
    let (tokens, kept) = (shape.length(TOKENS), shape.length(kept));
    let memory = Memory::new(device);
    let (k, v, pages, slots) = if paged {
        let cache = shape.paged_cache(&memory, 1, tokens)?;
        let slots: Vec<i64> = (0..i64::from(kept)).collect();
        let to = Rows::token_major(0, PAGE, heads, head_dim);
        let slots = Slots {
            slots: memory.put(&slots.repeat(heads as usize))?,
            page_stride: to.sequence_stride,
            head_stride: to.head_stride,
            slot_stride: to.token_stride,
            pages: kept.div_ceil(PAGE) as i32,
            page_size: PAGE as i32,
        };
        (cache.k, cache.v, cache.pages, slots)
    } else {
        let source = |seed| memory.token_major([tokens, heads, head_dim], seed);
        (source(1)?, source(2)?, Pages::default(), Slots::default())
    };
    let room = shape.key_elements(kept.next_multiple_of(PAGE)) * 2;
    let work = GatherKv {
        kept: lists(&memory, heads, tokens, kept)?,
        k,
        v,
        pages,
        slots,
        k_out: memory.filled(room, 0)?,
        v_out: memory.filled(room, 0)?,
        head_dim,
        dtype: DType::BF16,
    };
    let pages = if paged { ", paged" } else { "" };
    let name = format!("gather_kv/{kept} of {tokens}, {heads} heads of {head_dim}{pages}");
    // K and V, read and written.
    let bytes = 8.0 * shape.key_elements(kept) as f64;
    // SAFETY: every address is a block of `memory`, of the size that its field states.
    let run = move || unsafe { gather::gather_kv(device, &work) };
    Ok(Work::new(name, bytes, memory, run))
}

fn hidden<'a, D: Device>(device: &'a D, shape: &Shape, kept: u32) -> Result<Work<'a>> {
    let width = shape.hidden;
    let (tokens, kept) = (shape.length(TOKENS), shape.length(kept));
    let memory = Memory::new(device);
    let out = (kept * width) as usize * 2;
    let work = GatherRows {
        kept: lists(&memory, 1, tokens, kept)?,
        rows: memory.token_major([tokens, 1, width], 1)?,
        out: memory.filled(out, 0)?,
        width,
        dtype: DType::BF16,
    };
    // SAFETY: as above.
    let run = move || unsafe { gather::gather_rows(device, &work) };
    let name = format!("gather_rows/{kept} of {tokens}, {width} wide");
    Ok(Work::new(name, 2.0 * out as f64, memory, run))
}

/// Within a cache. Its lengths stay, so that every launch moves the same entries.
fn compact<'a, D: Device>(device: &'a D, shape: &Shape, kept: u32) -> Result<Work<'a>> {
    let Shape { kv_heads: heads, head_dim, .. } = *shape;
    let (tokens, kept) = (shape.length(TOKENS), shape.length(kept));
    let memory = Memory::new(device);
    let mut cache = shape.cache(&memory, 1, tokens)?;
    cache.positions = memory.filled(cache.rows as usize * 4, 0)?;
    let work = Compact {
        cache,
        indices: memory.put(&spread(tokens, kept))?,
        index_sequence_stride: 0,
        index_head_stride: 0,
        index_capacity: kept,
        kept: 0,
        lengths_out: memory.filled(heads as usize * 4, 0)?,
        head_dim,
        dtype: DType::BF16,
    };
    // SAFETY: as above.
    let run = move || unsafe { gather::compact(device, &work) };
    let name = format!("compact/{kept} of {tokens}, {heads} heads of {head_dim}");
    Ok(Work::new(name, 8.0 * shape.key_elements(kept) as f64, memory, run))
}

fn indices<'a, D: Device>(device: &'a D, shape: &Shape, kept: u32) -> Result<Work<'a>> {
    let (tokens, kept) = (shape.length(TOKENS), shape.length(kept));
    let memory = Memory::new(device);
    let work = GatherIndices {
        list: memory.filled(tokens as usize * 4, 0)?,
        rows: memory.put(&spread(tokens, kept))?,
        out: memory.filled(kept as usize * 4, 0)?,
        length: tokens,
        count: kept,
    };
    // SAFETY: as above.
    let run = move || unsafe { gather::gather_indices(device, &work) };
    Ok(Work::new(format!("gather_indices/{kept} of {tokens}"), 12.0 * f64::from(kept), memory, run))
}
