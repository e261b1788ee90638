//! What a Llama forward needs beside attention and matrix products: for one token, as in decoding, and for the rows of
//! a prompt. The residual stream is f32, all else bf16.

use anyhow::Result;
use fastkv::{
    abi::{Draw, Rows},
    kernels::{
        DType, Device,
        activation::{Add, Convert, SiluMul, add, convert, silu_mul},
        embed::{Embed, embed},
        norm::{RmsNorm, rms_norm},
        rope::{Append, Rope, rope},
        sample::{Sample, sample},
    },
};

use crate::{Work, memory::Memory, random::Random, shape::Shape};

pub(crate) fn works<'a, D: Device>(device: &'a D, shape: &Shape) -> Result<Vec<Work<'a>>> {
    let mut works = Vec::new();
    for tokens in [1, 8192, 32_768].map(|tokens| shape.length(tokens)) {
        works.push(embedding(device, shape, tokens)?);
        works.push(norm(device, shape, tokens, false)?);
        works.push(norm(device, shape, tokens, true)?);
        works.push(rotation(device, shape, tokens)?);
        works.push(gate(device, shape, tokens)?);
        works.push(sum(device, shape, tokens)?);
        works.push(conversion(device, shape, tokens)?);
    }
    for rows in [1, 16] {
        works.push(token(device, shape, rows, None)?);
        works.push(token(device, shape, rows, Some(0.9))?);
    }
    Ok(works)
}

/// `[tokens, width]`.
fn matrix(base: u64, width: u32) -> Rows {
    Rows { base, token_stride: width.into(), ..Rows::default() }
}

/// Elements of `[tokens, width]`.
fn elements(tokens: u32, width: u32) -> usize {
    tokens as usize * width as usize
}

fn embedding<'a, D: Device>(device: &'a D, shape: &Shape, tokens: u32) -> Result<Work<'a>> {
    let Shape { hidden, vocabulary, .. } = *shape;
    let memory = Memory::new(device);
    let mut random = Random(5);
    let ids: Vec<u32> = (0..tokens).map(|_| random.below(vocabulary as usize)).collect();
    let work = Embed {
        table: memory.normal(elements(vocabulary, hidden), 1)?,
        ids: memory.put(&ids)?,
        out: memory.filled(elements(tokens, hidden) * 4, 0)?,
        fault: memory.filled(4, 0)?,
        rows: tokens,
        vocabulary,
        width: hidden,
        table_dtype: DType::BF16,
        out_dtype: DType::F32,
    };
    // SAFETY: every address is a block of `memory`, of the size that its field states.
    let run = move || unsafe { embed(device, &work) };
    let bytes = (2 + 4) as f64 * elements(tokens, hidden) as f64;
    Ok(Work::new(format!("embed/{tokens} tokens"), bytes, memory, run))
}

fn norm<'a, D: Device>(device: &'a D, shape: &Shape, tokens: u32, sum: bool) -> Result<Work<'a>> {
    let width = shape.hidden;
    let count = elements(tokens, width);
    let memory = Memory::new(device);
    let work = RmsNorm {
        x: matrix(memory.normal_f32(count, 1)?, width),
        added: if sum { Some(matrix(memory.normal(count, 2)?, width)) } else { None },
        out: matrix(memory.filled(count * 2, 0)?, width),
        weight: memory.normal(width as usize, 3)?,
        rows: tokens,
        width,
        x_dtype: DType::F32,
        dtype: DType::BF16,
        epsilon: 1e-5,
    };
    // SAFETY: as above.
    let run = move || unsafe { rms_norm(device, &work) };
    // The stream and what is made of it; with a sum, what is added, and the stream once more.
    let (bytes, words) = if sum { (4 + 2 + 2 + 4, ", with a sum") } else { (4 + 2, "") };
    Ok(Work::new(format!("rms_norm/{tokens} tokens{words}"), f64::from(bytes) * count as f64, memory, run))
}

/// Q in place, K and V to a cache. Its lengths stay, so that every launch appends to the same rows.
fn rotation<'a, D: Device>(device: &'a D, shape: &Shape, tokens: u32) -> Result<Work<'a>> {
    let Shape { query_heads, kv_heads, head_dim, .. } = *shape;
    let memory = Memory::new(device);
    let q = memory.token_major([tokens, query_heads, head_dim], 1)?;
    let starts: Vec<i64> = (0..kv_heads).map(|list| i64::from(list * tokens)).collect();
    let positions: Vec<i32> = (0..tokens as i32).collect();
    let frequency = |pair: u32| 500_000_f32.powf(-2.0 * pair as f32 / head_dim as f32);
    let frequencies: Vec<f32> = (0..head_dim / 2).map(frequency).collect();
    let room = || memory.filled(shape.key_elements(tokens) * 2, 0);
    let work = Rope {
        q,
        q_out: q,
        query_heads,
        append: Some(Append {
            k: memory.token_major([tokens, kv_heads, head_dim], 2)?,
            v: memory.token_major([tokens, kv_heads, head_dim], 3)?,
            k_out: room()?,
            v_out: room()?,
            starts: memory.put(&starts)?,
            lengths: memory.filled(kv_heads as usize * 4, 0)?,
            lengths_out: memory.filled(kv_heads as usize * 4, 0)?,
            positions_out: memory.filled((kv_heads * tokens) as usize * 4, 0)?,
            out_rows: u64::from(kv_heads * tokens),
            kv_heads,
        }),
        positions: memory.put(&positions)?,
        inverse_frequencies: memory.put(&frequencies)?,
        cu_seqlens: 0,
        sequences: 1,
        tokens,
        total_tokens: tokens,
        head_dim,
        dtype: DType::BF16,
    };
    // SAFETY: as above.
    let run = move || unsafe { rope(device, &work) };
    // Q, K and V, read and written.
    let bytes = 4.0 * (shape.query_elements(tokens) + 2 * shape.key_elements(tokens)) as f64;
    Ok(Work::new(format!("rope/{tokens} tokens, K and V appended"), bytes, memory, run))
}

/// Not in place, where the numbers would shrink from launch to launch.
fn gate<'a, D: Device>(device: &'a D, shape: &Shape, tokens: u32) -> Result<Work<'a>> {
    let width = shape.mlp;
    let count = elements(tokens, width);
    let memory = Memory::new(device);
    let work = SiluMul {
        gate: matrix(memory.normal(count, 1)?, width),
        up: matrix(memory.normal(count, 2)?, width),
        out: matrix(memory.filled(count * 2, 0)?, width),
        rows: tokens,
        width,
        dtype: DType::BF16,
    };
    // SAFETY: as above.
    let run = move || unsafe { silu_mul(device, &work) };
    Ok(Work::new(format!("silu_mul/{tokens} tokens"), 3.0 * 2.0 * count as f64, memory, run))
}

/// A projection joins the stream.
fn sum<'a, D: Device>(device: &'a D, shape: &Shape, tokens: u32) -> Result<Work<'a>> {
    let width = shape.hidden;
    let count = elements(tokens, width);
    let memory = Memory::new(device);
    let work = Add {
        x: matrix(memory.normal_f32(count, 1)?, width),
        y: matrix(memory.normal(count, 2)?, width),
        rows: tokens,
        width,
        x_dtype: DType::F32,
        y_dtype: DType::BF16,
    };
    // SAFETY: as above.
    let run = move || unsafe { add(device, &work) };
    Ok(Work::new(format!("add/{tokens} tokens"), (4 + 2 + 4) as f64 * count as f64, memory, run))
}

fn conversion<'a, D: Device>(device: &'a D, shape: &Shape, tokens: u32) -> Result<Work<'a>> {
    let width = shape.hidden;
    let count = elements(tokens, width);
    let memory = Memory::new(device);
    let work = Convert {
        x: matrix(memory.normal_f32(count, 1)?, width),
        out: matrix(memory.filled(count * 2, 0)?, width),
        rows: tokens,
        width,
        x_dtype: DType::F32,
        out_dtype: DType::BF16,
    };
    // SAFETY: as above.
    let run = move || unsafe { convert(device, &work) };
    Ok(Work::new(format!("convert/{tokens} tokens"), (4 + 2) as f64 * count as f64, memory, run))
}

/// The most likely token of each row, or a draw by top-p.
fn token<'a, D: Device>(device: &'a D, shape: &Shape, rows: u32, top_p: Option<f32>) -> Result<Work<'a>> {
    let vocabulary = shape.vocabulary;
    let count = elements(rows, vocabulary);
    let memory = Memory::new(device);
    let draw = |top_p| Draw { temperature: 1.0, top_p, uniform: 0.5, top_k: 0 };
    let work = Sample {
        logits: matrix(memory.normal_f32(count, 1)?, vocabulary),
        draws: top_p.map_or(Ok(0), |top_p| memory.put(&vec![draw(top_p); rows as usize]))?,
        tokens: memory.filled(rows as usize * 4, 0)?,
        rows,
        vocabulary,
        dtype: DType::F32,
    };
    // SAFETY: as above.
    let run = move || unsafe { sample(device, &work) };
    let words = top_p.map_or("the most likely".into(), |top_p| format!("top-p {top_p}"));
    // Once; what a draw looks at again is in L2.
    Ok(Work::new(format!("sample/{rows} rows of {vocabulary}, {words}"), 4.0 * count as f64, memory, run))
}
