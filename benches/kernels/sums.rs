//! What becomes of sums of attention before a selection.

use anyhow::Result;
use fastkv::kernels::{
    Device,
    sums::{
        AddScores, GatherScores, MarkKeys, RaiseScores, ScoreTable, add_scores, gather_scores, mark_keys,
        raise_scores,
    },
};

use crate::{Work, memory::Memory, shape::Shape};

/// Keys that stay.
const KEPT: u32 = 2048;

pub(crate) fn works<'a, D: Device>(device: &'a D, shape: &Shape) -> Result<Vec<Work<'a>>> {
    let mut works = Vec::new();
    for keys in [8192, 32_768, 131_072] {
        works.push(add(device, shape, keys)?);
        works.push(gather(device, shape, keys)?);
        works.push(raise(device, shape, keys)?);
        works.push(mark(device, shape, keys)?);
    }
    Ok(works)
}

fn table<D: Device>(memory: &Memory<'_, D>, heads: u32, keys: u32) -> Result<ScoreTable> {
    let base = memory.uniform((heads * keys) as usize)?;
    Ok(ScoreTable { base, head_stride: keys.into(), keys })
}

fn add<'a, D: Device>(device: &'a D, shape: &Shape, keys: u32) -> Result<Work<'a>> {
    let (heads, keys) = (shape.kv_heads, shape.length(keys));
    let memory = Memory::new(device);
    let scores = || table(&memory, heads, keys);
    let work = AddScores { a: scores()?, b: scores()?, out: scores()?, heads };
    // SAFETY: every address is a block of `memory`, of the size that its field states.
    let run = move || unsafe { add_scores(device, &work) };
    let name = format!("add_scores/{keys} keys, {heads} heads");
    Ok(Work::new(name, 12.0 * f64::from(heads * keys), memory, run))
}

fn gather<'a, D: Device>(device: &'a D, shape: &Shape, keys: u32) -> Result<Work<'a>> {
    let (heads, keys, kept) = (shape.kv_heads, shape.length(keys), shape.length(KEPT));
    let memory = Memory::new(device);
    let entries: Vec<i32> = (0..kept).map(|i| (i * (keys / kept)) as i32).collect();
    let work = GatherScores {
        scores: table(&memory, heads, keys)?,
        out: table(&memory, heads, kept)?,
        entries: memory.put(&entries.repeat(heads as usize))?,
        entry_stride: kept.into(),
        heads,
    };
    // SAFETY: as above.
    let run = move || unsafe { gather_scores(device, &work) };
    let name = format!("gather_scores/{kept} of {keys} keys, {heads} heads");
    Ok(Work::new(name, 12.0 * f64::from(heads * kept), memory, run))
}

fn raise<'a, D: Device>(device: &'a D, shape: &Shape, keys: u32) -> Result<Work<'a>> {
    let (heads, keys) = (shape.kv_heads, shape.length(keys));
    let memory = Memory::new(device);
    let words = keys.div_ceil(32);
    let positions: Vec<i32> = (0..keys as i32).collect();
    let work = RaiseScores {
        scores: table(&memory, heads, keys)?,
        positions: memory.put(&positions)?,
        marked: memory.filled(words as usize * 4, 0x55)?,
        marked_positions: keys,
        heads,
    };
    // SAFETY: as above.
    let run = move || unsafe { raise_scores(device, &work) };
    let name = format!("raise_scores/half of {keys} keys, {heads} heads");
    // Positions, bits, and half of the scores.
    let bytes = 4.0 * f64::from(keys + words + heads * keys / 2);
    Ok(Work::new(name, bytes, memory, run))
}

/// The lists of a cache of a whole prompt, every other position marked.
fn mark<'a, D: Device>(device: &'a D, shape: &Shape, entries: u32) -> Result<Work<'a>> {
    let (lists, entries) = (shape.kv_heads, shape.length(entries));
    let memory = Memory::new(device);
    let words = entries.div_ceil(32);
    let positions: Vec<i32> = (0..entries as i32).collect();
    let starts: Vec<i64> = (0..lists).map(|list| i64::from(list * entries)).collect();
    let work = MarkKeys {
        positions: memory.put(&positions.repeat(lists as usize))?,
        starts: memory.put(&starts)?,
        lengths: memory.put(&vec![entries as i32; lists as usize])?,
        marked: memory.filled(words as usize * 4, 0x55)?,
        out: memory.filled((lists * words) as usize * 4, 0)?,
        rows: u64::from(lists * entries),
        marked_positions: entries,
        lists,
        words,
    };
    // SAFETY: as above.
    let run = move || unsafe { mark_keys(device, &work) };
    let name = format!("mark_keys/{entries} entries, {lists} lists");
    // Positions, bits of the lists and of the positions.
    let bytes = 4.0 * f64::from(lists * entries + lists * words + words);
    Ok(Work::new(name, bytes, memory, run))
}
