//! The best keys of 8 kv heads, pooled and summed over the 4 query heads of each; and the TSP layer's one set.

use anyhow::Result;
use fastkv::{
    abi::Pooling,
    backend::cuda::CudaLauncher,
    kernels::select::{self, Reduction, SelectTopk},
};

use crate::{Memory, Work};

const KEPT: i32 = 2048;
const WINDOW: i32 = 8;

pub(crate) fn works(device: &CudaLauncher) -> Result<Vec<Work<'_>>> {
    let mut works = Vec::new();
    for keys in [8192, 32_768, 131_072, 1 << 20] {
        let plain = Pooling { kind: fastkv::abi::POOLING_NONE, kernel: 1 };
        let max = Pooling { kind: fastkv::abi::POOLING_MAX, kernel: 7 };
        works.push(topk(device, keys, 8, 1, plain, "8 rows")?);
        works.push(topk(device, keys, 8, 4, max, "8 rows of 4 heads, max pooling")?);
        works.push(topk(device, keys, 1, 32, max, "1 row of 32 heads, max pooling")?);
    }
    Ok(works)
}

fn topk<'a>(
    device: &'a CudaLauncher,
    keys: i32,
    heads: i32,
    group: i32,
    pooling: Pooling,
    words: &str,
) -> Result<Work<'a>> {
    let memory = Memory::new(device);
    let scores = (heads * group) as usize * keys as usize;
    let mut work = SelectTopk {
        scores: memory.uniform(scores)?,
        sequence_stride: scores as i64,
        head_stride: keys.into(),
        lengths: 0,
        cu_seqlens: 0,
        sequences: 1,
        heads,
        group,
        keys,
        window: WINDOW,
        tail: WINDOW,
        sinks: 0,
        pooling,
        reduction: Reduction::Sum,
        page: 1,
        count: KEPT,
        counts: 0,
        kept: memory.filled((heads * KEPT) as usize * 4, 0)?,
        kept_lengths: memory.filled(heads as usize * 4, 0)?,
        capacity: KEPT,
        workspace: 0,
        workspace_bytes: 0,
        form: None,
    };
    work.workspace_bytes = select::select_topk_workspace(device, &work)?;
    work.workspace = memory.filled(work.workspace_bytes.max(16), 0)?;
    Ok(Work {
        name: format!("select_topk/{keys} keys, {words}, {KEPT} kept"),
        bytes: 4.0 * (scores as f64 + f64::from(heads * KEPT)),
        flops: 0.0,
        run: Box::new(move || {
            let _alive = &memory;
            // SAFETY: every address is a block of `memory`, of the size that its field states.
            unsafe { select::select_topk(device, &work) }
        }),
    })
}
