//! Moves what a selection kept: rows of K and V into ragged caches, rows of hidden states into the
//! shorter sequence behind the TSP layer.
//!
//! Both read the lists, their lengths and the places they go to on the device, so a launch can be
//! captured in a CUDA graph and replayed for other selections. The kernels clip every list to what is
//! described here; a list can be wrong, but it cannot make them read or write elsewhere.

use std::ops::Range;

use super::{DType, Device, Error, Kernel, Launch};
use crate::abi::{self, GatherKvParams, GatherRowsParams, Kept, Rows};

/// The kept rows of K and of V for every (sequence, kv head): `k_out[start + i] = k[indices[i]]`, and
/// so for V.
#[derive(Clone, Copy, Debug)]
pub struct GatherKv {
    /// Which rows, and where they go.
    pub kept: Kept,
    /// K, `[sequence][head][token][head_dim]`.
    pub k: Rows,
    /// V, of the same shape; its strides may differ.
    pub v: Rows,
    /// Address of `[kept.out_rows, head_dim]` for K; does not overlap the sources.
    pub k_out: u64,
    /// Address of `[kept.out_rows, head_dim]` for V.
    pub v_out: u64,
    /// Elements of a row; a row is a multiple of 16 bytes.
    pub head_dim: u32,
    /// Element type of all four tensors.
    pub dtype: DType,
}

/// The kept rows of hidden states for every sequence: `out[start + i] = rows[indices[i]]`.
#[derive(Clone, Copy, Debug)]
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

/// Queues the gather of K and V. With nothing to move it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is 0 where that is allowed, or device memory of the size its comment states,
/// until the kernel is done. Nothing else writes `k_out`, `v_out` or `positions_out` meanwhile, and
/// nothing writes the sources.
pub unsafe fn gather_kv<D: Device + ?Sized>(device: &D, work: &GatherKv) -> Result<(), Error> {
    let kept = &work.kept;
    let row_bytes = row_bytes("head_dim", work.head_dim, work.dtype)?;
    let lists = check_sizes(kept)?;
    if is_empty(kept) {
        return Ok(());
    }
    check_lists(kept)?;
    let sources = [
        ("k", check_rows("k", &work.k, kept, work.head_dim, work.dtype)?),
        ("v", check_rows("v", &work.v, kept, work.head_dim, work.dtype)?),
    ];
    let k_out = check_out("k_out", work.k_out, kept, row_bytes)?;
    let v_out = check_out("v_out", work.v_out, kept, row_bytes)?;
    for (name, source) in sources {
        disjoint("k_out", &k_out, name, &source)?;
        disjoint("v_out", &v_out, name, &source)?;
    }
    disjoint("v_out", &v_out, "k_out", &k_out)?;

    let lane_shift = lane_shift(row_bytes);
    let groups = abi::GATHER_KV_THREADS as u32 >> lane_shift;
    let tiles = (kept.capacity as u32).div_ceil(groups * abi::GATHER_KV_ROWS as u32);
    let params = GatherKvParams {
        kept: *kept,
        k: work.k,
        v: work.v,
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
pub unsafe fn gather_rows<D: Device + ?Sized>(device: &D, work: &GatherRows) -> Result<(), Error> {
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
    check_lists(kept)?;
    let rows = check_rows("rows", &work.rows, kept, work.width, work.dtype)?;
    let out = check_out("out", work.out, kept, row_bytes)?;
    disjoint("out", &out, "rows", &rows)?;

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

impl Rows {
    /// `[sequences, tokens, heads, width]`, dense.
    pub const fn token_major(base: u64, tokens: u32, heads: u32, width: u32) -> Self {
        let token_stride = heads as i64 * width as i64;
        Self {
            base,
            sequence_stride: token_stride.saturating_mul(tokens as i64),
            head_stride: width as i64,
            token_stride,
        }
    }

    /// `[tokens, heads, width]`, dense, with sequences packed along the token axis.
    pub const fn packed(base: u64, heads: u32, width: u32) -> Self {
        Self { sequence_stride: 0, ..Self::token_major(base, 0, heads, width) }
    }

    /// `[sequences, heads, tokens, width]`, dense.
    pub const fn head_major(base: u64, heads: u32, tokens: u32, width: u32) -> Self {
        let head_stride = tokens as i64 * width as i64;
        Self {
            base,
            sequence_stride: head_stride.saturating_mul(heads as i64),
            head_stride,
            token_stride: width as i64,
        }
    }
}

const VECTOR: u64 = abi::VECTOR_BYTES as u64;
/// What CUDA allows a grid along y and z.
const MAX_GRID_YZ: u32 = 65_535;
/// Above every model there is, and low enough that a kernel counts the bytes of a row in 32 bits.
const MAX_ROW_BYTES: u64 = 1 << 30;

fn row_bytes(what: &'static str, elements: u32, dtype: DType) -> Result<i32, Error> {
    let bytes = u64::from(elements) * u64::from(dtype.bytes());
    if bytes == 0 || !bytes.is_multiple_of(VECTOR) || bytes > MAX_ROW_BYTES {
        let unit = VECTOR / u64::from(dtype.bytes());
        let most = MAX_ROW_BYTES / u64::from(dtype.bytes());
        return Err(Error::argument(
            what,
            elements,
            format!("a multiple of {unit} from {unit} to {most} for {dtype:?}"),
        ));
    }
    Ok(bytes as i32)
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
    let lists = i64::from(kept.sequences) * i64::from(kept.heads);
    if lists > i64::from(i32::MAX) {
        return Err(Error::argument("kept.sequences * kept.heads", lists, format!("at most {}", i32::MAX)));
    }
    Ok(lists as u32)
}

fn is_empty(kept: &Kept) -> bool {
    kept.sequences == 0 || kept.heads == 0 || kept.tokens == 0 || kept.capacity == 0 || kept.out_rows == 0
}

fn check_lists(kept: &Kept) -> Result<(), Error> {
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
    range("kept.indices", kept.indices, indices, 4, Presence::Needed)?;
    range("kept.lengths", kept.lengths, lists, 4, Presence::Optional)?;
    range("kept.starts", kept.starts, lists, 8, Presence::Optional)?;
    range("kept.cu_seqlens", kept.cu_seqlens, i128::from(kept.sequences) + 1, 4, Presence::Optional)?;
    range("kept.positions", kept.positions, positions, 4, Presence::Optional)?;
    range("kept.positions_out", kept.positions_out, kept.out_rows.into(), 4, Presence::Optional)?;
    if kept.starts == 0 && i128::from(kept.out_rows) < lists * capacity {
        return Err(Error::argument(
            "kept.out_rows",
            kept.out_rows,
            format!("sequences * heads * capacity = {} or more where starts is absent", lists * capacity),
        ));
    }
    Ok(())
}

/// Checks one source and returns the addresses it spans.
fn check_rows(
    name: &'static str,
    rows: &Rows,
    kept: &Kept,
    width: u32,
    dtype: DType,
) -> Result<Range<u64>, Error> {
    let field = |field: &str| -> &'static str {
        match (name, field) {
            ("k", "sequence_stride") => "k.sequence_stride",
            ("k", "head_stride") => "k.head_stride",
            ("k", _) => "k.token_stride",
            ("v", "sequence_stride") => "v.sequence_stride",
            ("v", "head_stride") => "v.head_stride",
            ("v", _) => "v.token_stride",
            (_, "sequence_stride") => "rows.sequence_stride",
            (_, "head_stride") => "rows.head_stride",
            _ => "rows.token_stride",
        }
    };
    let unit = VECTOR as i64 / i64::from(dtype.bytes());
    for (what, stride) in [
        ("sequence_stride", rows.sequence_stride),
        ("head_stride", rows.head_stride),
        ("token_stride", rows.token_stride),
    ] {
        if stride < 0 || stride % unit != 0 {
            let expected = format!("0 or a positive multiple of {unit} for {dtype:?} (16 bytes)");
            return Err(Error::argument(field(what), stride, expected));
        }
    }
    if kept.cu_seqlens != 0 && rows.sequence_stride != 0 {
        let expected = "0 where cu_seqlens packs the sequences along the token axis";
        return Err(Error::argument(field("sequence_stride"), rows.sequence_stride, expected));
    }
    if kept.tokens > 1 && rows.token_stride < i64::from(width) {
        let expected = format!("{width} or more: rows must not overlap");
        return Err(Error::argument(field("token_stride"), rows.token_stride, expected));
    }
    let elements = last(kept.sequences, rows.sequence_stride)
        + last(kept.heads, rows.head_stride)
        + last(kept.tokens, rows.token_stride)
        + i128::from(width);
    range(name, rows.base, elements, dtype.bytes(), Presence::Vectors)
}

fn check_out(name: &'static str, base: u64, kept: &Kept, row_bytes: i32) -> Result<Range<u64>, Error> {
    range(name, base, i128::from(kept.out_rows) * i128::from(row_bytes), 1, Presence::Vectors)
}

/// Offset of the last step along an axis.
fn last(size: i32, stride: i64) -> i128 {
    i128::from(size - 1) * i128::from(stride)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Presence {
    /// May be 0; aligned to its element otherwise.
    Optional,
    /// Not 0, aligned to its element.
    Needed,
    /// Not 0, aligned for vector accesses.
    Vectors,
}

/// Checks an address and returns what `elements` from there on span. Kernels compute offsets in i64.
fn range(
    what: &'static str,
    base: u64,
    elements: i128,
    bytes: u32,
    presence: Presence,
) -> Result<Range<u64>, Error> {
    let align = if presence == Presence::Vectors { VECTOR } else { bytes.into() };
    if base == 0 && presence == Presence::Optional {
        return Ok(0..0);
    }
    if base == 0 || !base.is_multiple_of(align) {
        let expected = format!("a device address, a multiple of {align}");
        return Err(Error::argument(what, format_args!("{base:#x}"), expected));
    }
    let end = i128::from(base) + elements * i128::from(bytes);
    if end > i128::from(i64::MAX) {
        let expected = format!("{elements} elements of {bytes} bytes below 2^63");
        return Err(Error::argument(what, format_args!("{base:#x}"), expected));
    }
    Ok(base..end as u64)
}

fn disjoint(
    what: &'static str,
    range: &Range<u64>,
    other_name: &str,
    other: &Range<u64>,
) -> Result<(), Error> {
    if range.start < other.end && other.start < range.end {
        let value = format!("{:#x}..{:#x}", range.start, range.end);
        let expected = format!("apart from {other_name}, {:#x}..{:#x}", other.start, other.end);
        return Err(Error::argument(what, value, expected));
    }
    Ok(())
}
