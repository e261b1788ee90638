//! The best keys of every kv head, pooled and summed over its query heads; and the TSP layer's one set.

use anyhow::Result;
use fastkv::{
    abi::Pooling,
    kernels::{
        Device,
        batch::{Lengths, ScoreRows},
        select::{self, Form, Reduction, SelectTopk},
        share::{ShareKeys, share_keys},
    },
};

use crate::{Work, attention::WINDOW, memory::Memory, shape::Shape};

const KEPT: u32 = 2048;

pub(crate) fn works<'a, D: Device>(device: &'a D, shape: &Shape) -> Result<Vec<Work<'a>>> {
    let (heads, group) = (shape.kv_heads, shape.group());
    let mut works = Vec::new();
    for keys in [8192, 32_768, 131_072, 1 << 20] {
        works.push(topk(device, shape, keys, [heads, 1, 1], Pooling::NONE, None)?);
        works.push(topk(device, shape, keys, [heads, 1, group], Pooling::max(7), None)?);
        works.push(topk(device, shape, keys, [1, heads, group], Pooling::max(7), None)?);
    }
    works.push(share(device, shape)?);
    // A length that every form can do: the driver's choice should be the fastest.
    let forms = [Form::Block, Form::Cluster, Form::Grid];
    let has = |form: &Form| *form != Form::Cluster || device.compute_capability() == (9, 0);
    for form in forms.into_iter().filter(has) {
        works.push(topk(device, shape, 8192, [heads, 1, 1], Pooling::NONE, Some(form))?);
    }
    Ok(works)
}

/// Heads that share what each would keep.
fn share<'a, D: Device>(device: &'a D, shape: &Shape) -> Result<Work<'a>> {
    let (heads, kept) = (shape.kv_heads, shape.length(KEPT));
    let keys = 8 * kept;
    let memory = Memory::new(device);
    let best: Vec<i32> = (0..(heads * kept) as i32).map(|at| 8 * at).collect();
    let work = ShareKeys {
        best: memory.put(&best)?,
        count: heads * kept,
        heads,
        keys,
        mean: kept,
        assured: 0,
        floor: 0.2,
        tail: WINDOW,
        slack: 0,
        counts: memory.filled(4 * heads as usize, 0)?,
        starts: memory.filled(8 * heads as usize, 0)?,
    };
    // SAFETY: every address is a block of `memory`, of the size that its field states.
    let run = move || unsafe { share_keys(device, &work) };
    let name = format!("share_keys/{heads} heads, {kept} each");
    // Counts and starts; a search reads a few of the best.
    Ok(Work::new(name, 12.0 * f64::from(heads), memory, run))
}

fn topk<'a, D: Device>(
    device: &'a D,
    shape: &Shape,
    keys: u32,
    [rows, groups, heads]: [u32; 3],
    pooling: Pooling,
    form: Option<Form>,
) -> Result<Work<'a>> {
    let (keys, kept) = (shape.length(keys), shape.length(KEPT));
    let memory = Memory::new(device);
    let scores = (rows * groups * heads) as usize * keys as usize;
    let mut work = SelectTopk {
        scores: ScoreRows {
            base: memory.uniform(scores)?,
            sequence_stride: scores as i64,
            head_stride: keys.into(),
        },
        sequences: 1,
        rows,
        groups,
        heads,
        keys: Lengths::dense(keys),
        lengths: 0,
        window: WINDOW,
        tail: WINDOW,
        sinks: 0,
        pooling,
        reduction: Reduction::Sum,
        page: 1,
        count: kept,
        counts: 0,
        kept: memory.filled((rows * kept) as usize * 4, 0)?,
        kept_lengths: memory.filled(rows as usize * 4, 0)?,
        capacity: kept,
        workspace: 0,
        workspace_bytes: 0,
        form,
    };
    work.workspace_bytes = select::select_topk_workspace(device, &work)?;
    work.workspace = memory.filled(work.workspace_bytes.max(16), 0)?;
    let words = match (rows, groups * heads) {
        (rows, 1) => format!("{rows} rows"),
        (1, heads) => format!("1 row of {heads} heads, max pooling"),
        (rows, heads) => format!("{rows} rows of {heads} heads, max pooling"),
    };
    let form = form.map_or_else(String::new, |form| format!(", {form:?}").to_lowercase());
    let name = format!("select_topk/{keys} keys, {words}, {kept} kept{form}");
    let bytes = 4.0 * (scores as f64 + f64::from(rows * kept));
    // SAFETY: every address is a block of `memory`, of the size that its field states.
    let run = move || unsafe { select::select_topk(device, &work) };
    Ok(Work::new(name, bytes, memory, run))
}
