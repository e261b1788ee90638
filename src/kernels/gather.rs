//! Moves what a selection kept: rows of K and V into ragged or paged caches, or to the front of the lists
//! of the cache they are in, rows of hidden states into the shorter sequence behind the TSP layer.
//!
//! All read the lists, their lengths and the places they go to on the device, so a launch can be
//! captured in a CUDA graph and replayed for other selections. The kernels clip every list to what is
//! described here; a list can be wrong, but it cannot make them read or write elsewhere.

use std::ops::Range;

use super::{
    DType, Error, Kernel, Launch, Launcher, cache,
    check::{self, MAX_GRID_YZ, Presence, Shape, apart, count, disjoint, each_apart, last, range, row_bytes},
};
use crate::abi::{
    self, Cache, CompactParams, GatherIndicesParams, GatherKvParams, GatherRowsParams, Kept, Pages, Rows,
    Slots,
};

/// The kept rows of K and of V for every (sequence, kv head): `k_out[start + i] = k[indices[i]]`, and
/// so for V. A list that all heads share has one length and not one for each: 0 for `kept.lengths` does without, as -1
/// behind the indices skips.
#[derive(Clone, Copy, Debug, Default)]
pub struct GatherKv {
    /// Which rows, and where they go.
    pub kept: Kept,
    /// K, `[sequence][head][token][head_dim]`, or `[page][head][slot][head_dim]` where it is paged.
    pub k: Rows,
    /// V, of the same shape; its strides may differ.
    pub v: Rows,
    /// Where the tokens of paged sources lie; all zero where they are not.
    pub pages: Pages,
    /// Where the rows of paged destinations go; all zero where they are dense.
    pub slots: Slots,
    /// Address of `[kept.out_rows, head_dim]`, or of the first page, for K; does not overlap the sources. Where
    /// both are paged they may be one pool, as long as no slot that is written lies in a page that is read.
    pub k_out: u64,
    /// The same for V, which does not overlap K's unless both are paged.
    pub v_out: u64,
    /// Elements of a row; a row is a multiple of 16 bytes.
    pub head_dim: u32,
    /// Element type of all four tensors.
    pub dtype: DType,
}

/// The kept rows of hidden states for every sequence: `out[start + i] = rows[indices[i]]`.
#[derive(Clone, Copy, Debug, Default)]
pub struct GatherRows {
    /// Which rows, and where they go; `heads` is 1.
    pub kept: Kept,
    /// Hidden states, `[sequence][token][width]`; `head_stride` is not used.
    pub rows: Rows,
    /// Address of `[kept.out_rows, width]`; does not overlap the source.
    pub out: u64,
    /// Elements of a row; a row is a multiple of 16 bytes.
    pub width: u32,
    /// Element type of both tensors.
    pub dtype: DType,
}

/// Entries of a cache that stay, moved to the front of their lists: `k[i] = k[indices[i]]`, and so for V and
/// positions.
#[derive(Clone, Copy, Debug, Default)]
pub struct Compact {
    /// The lists. Their lengths are read, not changed.
    pub cache: Cache,
    /// Address of i32 indices, ascending within each list. A list ends where it stops to ascend or leaves
    /// the entries of the cache.
    pub indices: u64,
    /// Elements of `indices` from one sequence to the next.
    pub index_sequence_stride: i64,
    /// Elements of `indices` from one head to the next; 0 where all heads share one list.
    pub index_head_stride: i64,
    /// Room for indices in each list.
    pub index_capacity: u32,
    /// Address of i32 `[sequences, heads]`: indices in use. 0: all of them, to the first -1.
    pub kept: u64,
    /// Address that receives i32 `[sequences, heads]`: entries that were kept, the lists' lengths from now
    /// on; apart from `cache.lengths`. A length below 0 stays as it is. The heads of a sequence share a length where
    /// the cache is paged: they are to keep as many each, and one of their numbers is the sequence's.
    pub lengths_out: u64,
    /// Elements of a row; a row is a multiple of 16 bytes.
    pub head_dim: u32,
    /// Element type of K and V.
    pub dtype: DType,
}

/// `out[i] = list[rows[i]]`, and -1 for a row outside the list: the positions of selected rows.
#[derive(Clone, Copy, Debug, Default)]
pub struct GatherIndices {
    /// Address of i32 `[length]`.
    pub list: u64,
    /// Address of i32 `[count]`.
    pub rows: u64,
    /// Address of i32 `[count]`; does not overlap the rest.
    pub out: u64,
    /// Numbers in the list.
    pub length: u32,
    /// Numbers wanted.
    pub count: u32,
}

/// Queues the gather of numbers. With none to move it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is device memory of the size its comment states until the kernel is done.
/// Nothing else writes them or reads `out` meanwhile.
pub unsafe fn gather_indices<D: Launcher + ?Sized>(device: &D, work: &GatherIndices) -> Result<(), Error> {
    let params = GatherIndicesParams {
        list: work.list,
        rows: work.rows,
        out: work.out,
        length: count("length", work.length)?,
        count: count("count", work.count)?,
    };
    if work.count == 0 {
        return Ok(());
    }
    let presence = if work.length == 0 { Presence::Optional } else { Presence::Needed };
    let list = range("list", work.list, work.length.into(), 4, presence)?;
    let rows = range("rows", work.rows, work.count.into(), 4, Presence::Needed)?;
    let out = range("out", work.out, work.count.into(), 4, Presence::Needed)?;
    disjoint("out", &out, "list", &list)?;
    disjoint("out", &out, "rows", &rows)?;
    let threads = abi::GATHER_INDICES_THREADS as u32;
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe {
        device.launch(&Launch {
            kernel: Kernel::GatherIndices,
            grid: [work.count.div_ceil(threads), 1, 1],
            cluster: [1, 1, 1],
            block: [threads, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
        })
    }
}

/// Queues the gather of K and V. With nothing to move it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is 0 where that is allowed, or device memory of the size its comment states,
/// until the kernel is done. Nothing else writes `k_out`, `v_out` or `positions_out` meanwhile, and
/// nothing writes the sources, pages of the pool apart that are not read.
pub unsafe fn gather_kv<D: Launcher + ?Sized>(device: &D, work: &GatherKv) -> Result<(), Error> {
    let kept = &work.kept;
    let row_bytes = row_bytes("head_dim", work.head_dim, work.dtype)?;
    let lists = check_sizes(kept)?;
    if is_empty(kept) {
        return Ok(());
    }
    let mut inputs = check_lists(kept)?;
    let (shape, table) = kv_source_shape(work)?;
    inputs.push(("pages.table", table));
    let sources = [("k", check::rows("k", &work.k, shape)?), ("v", check::rows("v", &work.v, shape)?)];
    inputs.push(("slots.slots", check_slots(work)?));
    let outputs = [
        ("k_out", check_kv_out("k_out", work.k_out, work, row_bytes)?),
        ("v_out", check_kv_out("v_out", work.v_out, work, row_bytes)?),
    ];
    // Which pages of a pool are whose is on the device.
    let one_pool = work.pages.table != 0 && work.slots.slots != 0;
    if !one_pool {
        each_apart(&outputs, &sources)?;
    }
    if work.slots.slots == 0 {
        disjoint("v_out", &outputs[1].1, "k_out", &outputs[0].1)?;
    }
    each_apart(&outputs, &inputs)?;
    inputs.extend(sources);
    inputs.extend(outputs);
    apart(&[check_positions_out(kept, positions_out_places(work))?], &inputs)?;

    let lane_shift = lane_shift(row_bytes);
    let groups = abi::GATHER_KV_THREADS as u32 >> lane_shift;
    let tiles = (kept.capacity as u32).div_ceil(groups * abi::GATHER_KV_ROWS as u32);
    let params = GatherKvParams {
        kept: *kept,
        k: work.k,
        v: work.v,
        pages: work.pages,
        slots: work.slots,
        k_out: work.k_out,
        v_out: work.v_out,
        row_bytes,
        element_bytes: work.dtype.bytes() as i32,
        lane_shift: lane_shift as i32,
        reserved: 0,
    };
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe {
        device.launch(&Launch {
            kernel: Kernel::GatherKv,
            // Blocks walk over further tiles where a grid cannot be that high.
            grid: [lists, tiles.min(MAX_GRID_YZ), 2],
            cluster: [1, 1, 1],
            block: [abi::GATHER_KV_THREADS as u32, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
        })
    }
}

/// Queues the gather of hidden states. With nothing to move it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is 0 where that is allowed, or device memory of the size its comment states,
/// until the kernel is done. Nothing else writes `out` or `positions_out` meanwhile, and nothing writes
/// the source.
pub unsafe fn gather_rows<D: Launcher + ?Sized>(device: &D, work: &GatherRows) -> Result<(), Error> {
    let kept = &work.kept;
    let row_bytes = row_bytes("width", work.width, work.dtype)?;
    if kept.heads != 1 {
        return Err(Error::argument("kept.heads", kept.heads, "1: hidden states have no heads"));
    }
    let sequences = check_sizes(kept)?;
    if sequences > MAX_GRID_YZ {
        return Err(Error::argument("kept.sequences", sequences, format!("at most {MAX_GRID_YZ}")));
    }
    if is_empty(kept) {
        return Ok(());
    }
    let lists = check_lists(kept)?;
    let mut inputs =
        vec![("rows", check::rows("rows", &work.rows, source_shape(kept, work.width, work.dtype))?)];
    inputs.extend(lists);
    let out = check_out("out", work.out, kept, row_bytes)?;
    apart(&[("out", out), check_positions_out(kept, kept.out_rows.into())?], &inputs)?;

    let params = GatherRowsParams {
        kept: *kept,
        rows: work.rows,
        out: work.out,
        row_bytes,
        element_bytes: work.dtype.bytes() as i32,
    };
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe {
        device.launch(&Launch {
            kernel: Kernel::GatherRows,
            grid: [kept.capacity as u32, sequences, 1],
            cluster: [1, 1, 1],
            block: [row_threads(row_bytes), 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
        })
    }
}

/// Queues the compaction of a cache. With nothing in it it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is 0 where that is allowed, or device memory of the size its comment states,
/// until the kernel is done. Nothing else reads or writes K, V and `cache.positions`, or writes the rest
/// meanwhile, and no two lists share an entry.
pub unsafe fn compact<D: Launcher + ?Sized>(device: &D, work: &Compact) -> Result<(), Error> {
    let row_bytes = row_bytes("head_dim", work.head_dim, work.dtype)?;
    let lists = cache::lists(&work.cache)?;
    if lists == 0 {
        return Ok(());
    }
    check::entries("index_capacity", work.index_capacity.into())?;
    let Cache { sequences, heads, .. } = work.cache;
    let strides = [work.index_sequence_stride, work.index_head_stride];
    for (what, stride) in ["index_sequence_stride", "index_head_stride"].into_iter().zip(strides) {
        if stride < 0 {
            return Err(Error::argument(what, stride, "0 or more"));
        }
    }
    let indices = last(sequences, strides[0]) + last(heads, strides[1]) + i128::from(work.index_capacity);
    let presence = if work.index_capacity == 0 { Presence::Optional } else { Presence::Needed };
    let mut inputs = vec![
        ("indices", range("indices", work.indices, indices, 4, presence)?),
        ("kept", range("kept", work.kept, lists.into(), 4, Presence::Optional)?),
    ];
    let lengths_out = range("lengths_out", work.lengths_out, lists.into(), 4, Presence::Needed)?;
    let cache::Spans { entries, state, places } = cache::check(&work.cache, work.head_dim, work.dtype, true)?;
    let [lengths, positions] = state;
    inputs.push(lengths);
    inputs.extend(places);
    each_apart(&entries, &inputs)?;
    apart(std::slice::from_ref(&positions), &inputs)?;
    inputs.push(positions);
    inputs.extend(entries);
    apart(&[("lengths_out", lengths_out)], &inputs)?;

    let params = CompactParams {
        cache: work.cache,
        indices: work.indices,
        index_sequence_stride: work.index_sequence_stride,
        index_head_stride: work.index_head_stride,
        kept: work.kept,
        lengths_out: work.lengths_out,
        index_capacity: work.index_capacity as i32,
        row_bytes,
        element_bytes: work.dtype.bytes() as i32,
        lane_shift: lane_shift(row_bytes) as i32,
    };
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe {
        device.launch(&Launch {
            kernel: Kernel::Compact,
            grid: [lists, 2, 1],
            cluster: [1, 1, 1],
            block: [abi::COMPACT_THREADS as u32, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
        })
    }
}

/// The smallest power of two of lanes that covers a row with one vector each, at most a warp.
fn lane_shift(row_bytes: i32) -> u32 {
    (row_bytes as u32 / abi::VECTOR_BYTES as u32).next_power_of_two().min(32).ilog2()
}

/// Threads of the block that moves a row with four vectors each, in whole warps.
fn row_threads(row_bytes: i32) -> u32 {
    (row_bytes as u32 / abi::VECTOR_BYTES as u32).div_ceil(4).next_multiple_of(32).min(256)
}

/// Returns the number of lists.
fn check_sizes(kept: &Kept) -> Result<u32, Error> {
    for (what, size) in [
        ("kept.sequences", kept.sequences.into()),
        ("kept.heads", kept.heads.into()),
        ("kept.tokens", kept.tokens.into()),
        ("kept.capacity", kept.capacity.into()),
        ("kept.out_rows", kept.out_rows),
    ] {
        if size < 0 {
            return Err(Error::argument(what, size, "0 or more"));
        }
    }
    check::entries("kept.capacity", kept.capacity.into())?;
    let lists = i64::from(kept.sequences) * i64::from(kept.heads);
    if lists > i64::from(i32::MAX) {
        return Err(Error::argument("kept.sequences * kept.heads", lists, format!("at most {}", i32::MAX)));
    }
    Ok(lists as u32)
}

fn is_empty(kept: &Kept) -> bool {
    kept.sequences == 0 || kept.heads == 0 || kept.tokens == 0 || kept.capacity == 0 || kept.out_rows == 0
}

/// Checks the lists of what is kept, and returns what they span and what else is read of them.
fn check_lists(kept: &Kept) -> Result<Vec<(&'static str, Range<u64>)>, Error> {
    let lists = i128::from(kept.sequences) * i128::from(kept.heads);
    let capacity = i128::from(kept.capacity);
    for (what, stride) in [
        ("kept.index_sequence_stride", kept.index_sequence_stride),
        ("kept.index_head_stride", kept.index_head_stride),
    ] {
        if stride < 0 {
            return Err(Error::argument(what, stride, "0 or more"));
        }
    }
    let indices = last(kept.sequences, kept.index_sequence_stride)
        + last(kept.heads, kept.index_head_stride)
        + capacity;
    let tokens = i128::from(kept.tokens);
    let positions = if kept.cu_seqlens == 0 { tokens * i128::from(kept.sequences) } else { tokens };
    let starts_of_sequences = i128::from(kept.sequences) + 1;
    let read = vec![
        ("kept.indices", range("kept.indices", kept.indices, indices, 4, Presence::Needed)?),
        ("kept.lengths", range("kept.lengths", kept.lengths, lists, 4, Presence::Optional)?),
        ("kept.starts", range("kept.starts", kept.starts, lists, 8, Presence::Optional)?),
        (
            "kept.cu_seqlens",
            range("kept.cu_seqlens", kept.cu_seqlens, starts_of_sequences, 4, Presence::Optional)?,
        ),
        ("kept.positions", range("kept.positions", kept.positions, positions, 4, Presence::Optional)?),
    ];
    if kept.starts == 0 && i128::from(kept.out_rows) < lists * capacity {
        return Err(Error::argument(
            "kept.out_rows",
            kept.out_rows,
            format!("sequences * heads * capacity = {} or more where starts is absent", lists * capacity),
        ));
    }
    Ok(read)
}

/// What receives so many positions.
fn check_positions_out(kept: &Kept, places: i128) -> Result<(&'static str, Range<u64>), Error> {
    let name = "kept.positions_out";
    Ok((name, range(name, kept.positions_out, places, 4, Presence::Optional)?))
}

fn source_shape(kept: &Kept, width: u32, dtype: DType) -> Shape {
    let Kept { sequences, heads, tokens, .. } = *kept;
    Shape { sequences, heads, tokens, width, dtype, packed: kept.cu_seqlens != 0 }
}

/// The shape of K and V as they are stored, and the addresses of the table of their pages.
fn kv_source_shape(work: &GatherKv) -> Result<(Shape, Range<u64>), Error> {
    let GatherKv { kept, pages, .. } = work;
    let shape = source_shape(kept, work.head_dim, work.dtype);
    if pages.table == 0 {
        return Ok((shape, 0..0));
    }
    let names = ["kept.tokens", "kept.cu_seqlens"];
    cache::in_pages(pages, shape, names, kept.cu_seqlens)
}

/// Checks where rows of paged destinations go, and returns the addresses that say so.
fn check_slots(GatherKv { kept, slots, .. }: &GatherKv) -> Result<Range<u64>, Error> {
    if slots.slots == 0 {
        return Ok(0..0);
    }
    for (what, size) in [("slots.pages", slots.pages), ("slots.page_size", slots.page_size)] {
        if size <= 0 {
            return Err(Error::argument(what, size, "1 or more where destinations are paged"));
        }
    }
    cache::slots("slots", slots.pages, slots.page_size)?;
    range("slots.slots", slots.slots, kept.out_rows.into(), 8, Presence::Needed)
}

/// Heads of a page of a destination.
fn page_heads(GatherKv { kept, slots, .. }: &GatherKv) -> i32 {
    if slots.head_stride == 0 { 1 } else { kept.heads }
}

/// Positions of all places that destinations have.
fn positions_out_places(work: &GatherKv) -> i128 {
    let Slots { slots, pages, page_size, .. } = work.slots;
    if slots == 0 {
        return work.kept.out_rows.into();
    }
    i128::from(pages) * i128::from(page_size) * i128::from(page_heads(work))
}

fn check_kv_out(name: &str, base: u64, work: &GatherKv, row_bytes: i32) -> Result<Range<u64>, Error> {
    let GatherKv { kept, slots, .. } = work;
    if slots.slots == 0 {
        return check_out(name, base, kept, row_bytes);
    }
    let rows = Rows {
        base,
        sequence_stride: slots.page_stride,
        head_stride: slots.head_stride,
        token_stride: slots.slot_stride,
    };
    let shape = Shape {
        sequences: slots.pages,
        heads: page_heads(work),
        tokens: slots.page_size,
        packed: false,
        ..source_shape(kept, work.head_dim, work.dtype)
    };
    check::rows_apart(name, &rows, shape)
}

fn check_out(name: &str, base: u64, kept: &Kept, row_bytes: i32) -> Result<Range<u64>, Error> {
    range(name, base, i128::from(kept.out_rows) * i128::from(row_bytes), 1, Presence::Vectors)
}
