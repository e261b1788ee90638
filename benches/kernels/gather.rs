//! The rows that a layer of Llama 3.1 8B keeps of a prompt of 32K tokens.

use anyhow::Result;
use fastkv::{
    abi::{Kept, Rows},
    backend::cuda::CudaLauncher,
    kernels::{DType, gather},
};

use crate::{Memory, Work};

const TOKENS: u32 = 32_768;
const HEADS: u32 = 8;
const HEAD_DIM: u32 = 128;
const HIDDEN: u32 = 4096;

pub(crate) fn works(device: &CudaLauncher) -> Result<Vec<Work<'_>>> {
    let mut works = Vec::new();
    for kept in [512, 2048, 8192, 16_384] {
        works.push(kv(device, kept)?);
        works.push(hidden(device, kept)?);
    }
    Ok(works)
}

/// Ascending indices, evenly spread.
fn lists(memory: &Memory<'_>, heads: u32, kept: u32) -> Result<Kept> {
    let list = (0..kept).map(|i| (u64::from(i) * u64::from(TOKENS) / u64::from(kept)) as i32);
    let indices: Vec<i32> = (0..heads).flat_map(|_| list.clone()).collect();
    Ok(Kept {
        indices: memory.put(&indices)?,
        index_sequence_stride: i64::from(heads * kept),
        index_head_stride: kept.into(),
        out_rows: i64::from(heads * kept),
        sequences: 1,
        heads: heads as i32,
        tokens: TOKENS as i32,
        capacity: kept as i32,
        ..Kept::default()
    })
}

fn kv(device: &CudaLauncher, kept: u32) -> Result<Work<'_>> {
    let memory = Memory::new(device);
    let source = (TOKENS * HEADS * HEAD_DIM) as usize * 2;
    let out = (kept * HEADS * HEAD_DIM) as usize * 2;
    let work = gather::GatherKv {
        kept: lists(&memory, HEADS, kept)?,
        k: Rows::token_major(memory.filled(source, 1)?, TOKENS, HEADS, HEAD_DIM),
        v: Rows::token_major(memory.filled(source, 2)?, TOKENS, HEADS, HEAD_DIM),
        k_out: memory.filled(out, 0)?,
        v_out: memory.filled(out, 0)?,
        head_dim: HEAD_DIM,
        dtype: DType::BF16,
    };
    Ok(Work {
        name: format!("gather_kv/{kept} of {TOKENS}, {HEADS} heads of {HEAD_DIM}"),
        bytes: 4.0 * out as f64,
        flops: 0.0,
        run: Box::new(move || {
            let _alive = &memory;
            // SAFETY: every address is a block of `memory`, of the size that its field states.
            unsafe { gather::gather_kv(device, &work) }
        }),
    })
}

fn hidden(device: &CudaLauncher, kept: u32) -> Result<Work<'_>> {
    let memory = Memory::new(device);
    let out = (kept * HIDDEN) as usize * 2;
    let work = gather::GatherRows {
        kept: lists(&memory, 1, kept)?,
        rows: Rows::token_major(memory.filled((TOKENS * HIDDEN) as usize * 2, 1)?, TOKENS, 1, HIDDEN),
        out: memory.filled(out, 0)?,
        width: HIDDEN,
        dtype: DType::BF16,
    };
    Ok(Work {
        name: format!("gather_rows/{kept} of {TOKENS}, {HIDDEN} wide"),
        bytes: 2.0 * out as f64,
        flops: 0.0,
        run: Box::new(move || {
            let _alive = &memory;
            // SAFETY: every address is a block of `memory`, of the size that its field states.
            unsafe { gather::gather_rows(device, &work) }
        }),
    })
}
