//! A step of decoding of Llama 3.1 8B over caches of these lengths, one sequence and sixteen.

use anyhow::Result;
use fastkv::{
    abi::{Cache, Rows},
    backend::cuda::CudaLauncher,
    kernels::{
        DType,
        batch::default_scale,
        decode::{self, Decode},
    },
};

use crate::{Memory, Work};

const QUERY_HEADS: u32 = 32;
const KV_HEADS: u32 = 8;
const HEAD_DIM: u32 = 128;

pub(crate) fn works(device: &CudaLauncher) -> Result<Vec<Work<'_>>> {
    let mut works = Vec::new();
    for (sequences, entries) in
        [(1, 512), (1, 2048), (1, 8192), (1, 32_768), (1, 131_072), (16, 512), (16, 2048), (16, 8192)]
    {
        works.push(step(device, sequences, entries)?);
    }
    Ok(works)
}

/// The caches hold the new tokens already: every step of a measurement sees the same lengths.
fn step(device: &CudaLauncher, sequences: u32, entries: u32) -> Result<Work<'_>> {
    let memory = Memory::new(device);
    let lists = sequences * KV_HEADS;
    let rows = u64::from(lists) * u64::from(entries);
    let elements = rows as usize * HEAD_DIM as usize;
    let dense = |base: u64| Rows { base, token_stride: HEAD_DIM.into(), ..Rows::default() };
    let queries = |base: u64| Rows::token_major(base, 1, QUERY_HEADS, HEAD_DIM);
    let outputs = (sequences * QUERY_HEADS * HEAD_DIM) as usize;
    let mut work = Decode {
        cache: Cache {
            k: dense(memory.normal(elements, 1)?),
            v: dense(memory.normal(elements, 2)?),
            lengths: memory.put(&vec![entries as i32; lists as usize])?,
            rows: rows as i64,
            capacity: entries as i32,
            sequences: sequences as i32,
            heads: KV_HEADS as i32,
            ..Cache::default()
        },
        q: queries(memory.normal(outputs, 3)?),
        k_new: Rows::default(),
        v_new: Rows::default(),
        out: queries(memory.filled(outputs * 2, 0)?),
        positions_new: 0,
        lse: 0,
        full: 0,
        bias: None,
        scale: default_scale(HEAD_DIM),
        query_heads: QUERY_HEADS,
        tokens: 1,
        head_dim: HEAD_DIM,
        dtype: DType::BF16,
        workspace: 0,
        workspace_bytes: 0,
    };
    work.workspace_bytes = decode::decode_workspace(&work)?;
    work.workspace = memory.filled(work.workspace_bytes, 0)?;
    Ok(Work {
        name: format!("decode/{entries} entries, {sequences} sequences"),
        bytes: 4.0 * (elements + outputs) as f64,
        flops: 0.0,
        run: Box::new(move || {
            let _alive = &memory;
            // SAFETY: every address is a block of `memory`, of the size that its field states.
            unsafe { decode::decode(device, &work) }
        }),
    })
}
