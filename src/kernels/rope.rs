//! Rotary position embedding (arXiv 2104.09864), fused with the append of K and V to a ragged cache.

use std::ops::Range;

use super::{
    DType, Error, Kernel, Launch, Launcher,
    check::{self, MAX_GRID_YZ, Presence, Shape, apart, count, range},
};
use crate::abi::{self, RopeParams, Rows};

/// Rotates heads of Q and K as Hugging Face stores Llama: the pair `(x[i], x[i + d/2])` turns by
/// `position * inverse_frequencies[i]`, rounded to f32.
///
/// Queries go to `q_out`. Keys, rotated, and values go to a ragged cache; see [`Append`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Rope {
    /// Queries, `[sequence][query head][token][head_dim]`.
    pub q: Rows,
    /// Receives them: `q` itself, or something apart from everything.
    pub q_out: Rows,
    /// Heads of Q; with 0, nothing is read of it.
    pub query_heads: u32,
    /// Keys and values to append.
    pub append: Option<Append>,
    /// Address of i32 `[sequences, tokens]`, or `[total_tokens]` where sequences are packed.
    pub positions: u64,
    /// Address of f32 `[head_dim / 2]`. 0: nothing is turned; keys are appended as they are.
    pub inverse_frequencies: u64,
    /// Address of i32 `[sequences + 1]`: first token of each sequence on a packed token axis. 0: each
    /// sequence has `tokens` tokens, a stride apart.
    pub cu_seqlens: u64,
    /// Sequences in the batch.
    pub sequences: u32,
    /// Tokens of each sequence; where they are packed, no sequence has more.
    pub tokens: u32,
    /// Tokens of all sequences together, where they are packed.
    pub total_tokens: u32,
    /// d, a multiple of 16, at most [`MAX_HEAD_DIM`].
    pub head_dim: u32,
    /// Element type of all tensors.
    pub dtype: DType,
}

/// Keys and values that join a ragged cache: token i of a sequence goes to row `starts + lengths + i` of
/// each kv head. A row outside the cache is dropped.
#[derive(Clone, Copy, Debug, Default)]
pub struct Append {
    /// Keys, `[sequence][kv head][token][head_dim]`.
    pub k: Rows,
    /// Values, of the same shape.
    pub v: Rows,
    /// Address of `[out_rows, head_dim]` for rotated keys, dense.
    pub k_out: u64,
    /// Address of `[out_rows, head_dim]` for values.
    pub v_out: u64,
    /// Address of i64 `[sequences, kv_heads]`: first row of each cache.
    pub starts: u64,
    /// Address of i32 `[sequences, kv_heads]`: entries in each cache so far. Below 0, a place of the batch is not in use,
    /// and nothing is appended there. 0: none.
    pub lengths: u64,
    /// Address of i32 `[sequences, kv_heads]`: receives the lengths with the new entries; apart from
    /// `lengths`, which other blocks may yet have to read. A length below 0 stays as it is. 0: not wanted.
    pub lengths_out: u64,
    /// Address of i32 `[out_rows]`: receives the position of every row appended. 0: not wanted.
    pub positions_out: u64,
    /// Rows that the caches hold together.
    pub out_rows: u64,
    /// Heads of K and V.
    pub kv_heads: u32,
}

/// The largest head.
pub const MAX_HEAD_DIM: u32 = abi::ROPE_HEAD_DIM as u32;

/// Queues the rotation. With no sequences, or no heads, or no tokens, it launches nothing; with no tokens it
/// still writes `lengths_out`.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is 0 where that is allowed, or device memory of the size its comment states,
/// until the kernel is done. Nothing else writes them, or reads what is written, meanwhile.
pub unsafe fn rope<D: Launcher + ?Sized>(device: &D, work: &Rope) -> Result<(), Error> {
    let Rope { q, q_out, query_heads, head_dim, dtype, .. } = *work;
    let unit = 2 * abi::PIECE as u32;
    if head_dim == 0 || !head_dim.is_multiple_of(unit) || head_dim > MAX_HEAD_DIM {
        let expected = format!("a multiple of {unit} from {unit} to {MAX_HEAD_DIM}");
        return Err(Error::argument("head_dim", head_dim, expected));
    }
    if work.sequences > MAX_GRID_YZ {
        return Err(Error::argument("sequences", work.sequences, format!("at most {MAX_GRID_YZ}")));
    }
    let sequences = count("sequences", work.sequences)?;
    let tokens = count("tokens", work.tokens)?;
    let total_tokens = count("total_tokens", work.total_tokens)?;
    let kv_heads = work.append.map_or(0, |append| append.kv_heads);
    for (what, heads) in [("query_heads", query_heads), ("kv_heads", kv_heads)] {
        if heads > MAX_HEADS {
            return Err(Error::argument(what, heads, format!("at most {MAX_HEADS}")));
        }
    }
    let packed = work.cu_seqlens != 0;
    let all_tokens = if packed { total_tokens } else { tokens };
    if sequences == 0 || query_heads + kv_heads == 0 {
        return Ok(());
    }
    let mut params = RopeParams {
        q,
        q_out,
        positions: work.positions,
        inverse_frequencies: work.inverse_frequencies,
        cu_seqlens: work.cu_seqlens,
        sequences,
        tokens,
        total_tokens,
        query_heads: query_heads as i32,
        kv_heads: kv_heads as i32,
        head_dim: head_dim as i32,
        dtype: dtype.number(),
        ..RopeParams::default()
    };
    let shape = |heads: u32| Shape {
        sequences,
        heads: heads as i32,
        tokens: all_tokens,
        width: head_dim,
        dtype,
        packed,
    };
    let positions = i128::from(all_tokens) * if packed { 1 } else { i128::from(sequences) };
    let mut spans = Spans::default();
    let starts = i128::from(sequences) + 1;
    spans.read("cu_seqlens", range("cu_seqlens", work.cu_seqlens, starts, 4, Presence::Optional)?);
    if all_tokens > 0 {
        spans.read("positions", range("positions", work.positions, positions, 4, Presence::Needed)?);
        let (frequencies, count) = (work.inverse_frequencies, i128::from(head_dim / 2));
        let frequencies = range("inverse_frequencies", frequencies, count, 4, Presence::Optional)?;
        spans.read("inverse_frequencies", frequencies);
    }
    // In place, a thread reads its own elements before it writes them, and keys may lie between the queries.
    let in_place = q == q_out;
    if query_heads > 0 && all_tokens > 0 {
        spans.written.push(("q_out", check::rows_apart("q_out", &q_out, shape(query_heads))?));
        if !in_place {
            spans.read("q", check::rows("q", &q, shape(query_heads))?);
        }
    }
    if let Some(append) = work.append.filter(|append| append.kv_heads > 0) {
        check_append(&append, shape(kv_heads), sequences, &mut spans)?;
        params = RopeParams {
            k: append.k,
            v: append.v,
            k_out: append.k_out,
            v_out: append.v_out,
            starts: append.starts,
            lengths: append.lengths,
            lengths_out: append.lengths_out,
            positions_out: append.positions_out,
            out_rows: append.out_rows as i64,
            ..params
        };
    }
    if all_tokens == 0 && params.lengths_out == 0 {
        return Ok(());
    }
    spans.apart(in_place)?;
    let tiles = work.tokens.div_ceil(abi::ROPE_TOKENS as u32).max(1);
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe {
        device.launch(&Launch {
            kernel: Kernel::Rope,
            grid: [tiles, work.sequences, 1],
            cluster: [1, 1, 1],
            block: [abi::LLAMA_THREADS as u32, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
        })
    }
}

/// Above every model there is, and low enough that a kernel counts the pieces of a tile in 32 bits.
const MAX_HEADS: u32 = 1 << 16;

/// What a rotation reads, its keys and values apart, and what it writes.
#[derive(Default)]
struct Spans {
    read: Vec<(&'static str, Range<u64>)>,
    entries: Vec<(&'static str, Range<u64>)>,
    written: Vec<(&'static str, Range<u64>)>,
}

impl Spans {
    fn read(&mut self, name: &'static str, span: Range<u64>) {
        self.read.push((name, span));
    }

    /// That nothing written overlaps anything else, queries in place among keys and values excepted.
    fn apart(self, in_place: bool) -> Result<(), Error> {
        let Self { read, entries, written } = self;
        apart(&written, &read)?;
        let reaches_entries = |name: &str| !(in_place && name == "q_out");
        let beside: Vec<_> = written.into_iter().filter(|(name, _)| reaches_entries(name)).collect();
        apart(&beside, &entries)
    }
}

fn check_append(append: &Append, shape: Shape, sequences: i32, spans: &mut Spans) -> Result<(), Error> {
    let lists = i128::from(sequences) * i128::from(shape.heads);
    spans.read("starts", range("starts", append.starts, lists, 8, Presence::Needed)?);
    spans.read("lengths", range("lengths", append.lengths, lists, 4, Presence::Optional)?);
    let lengths_out = range("lengths_out", append.lengths_out, lists, 4, Presence::Optional)?;
    spans.written.push(("lengths_out", lengths_out));
    if i64::try_from(append.out_rows).is_err() {
        return Err(Error::argument("out_rows", append.out_rows, format!("at most {}", i64::MAX)));
    }
    let rows = append.out_rows.into();
    let positions_out = range("positions_out", append.positions_out, rows, 4, Presence::Optional)?;
    spans.written.push(("positions_out", positions_out));
    if shape.tokens == 0 || append.out_rows == 0 {
        return Ok(());
    }
    let elements = i128::from(append.out_rows) * i128::from(shape.width);
    let cache = |what, base| range(what, base, elements, shape.dtype.bytes(), Presence::Vectors);
    spans
        .written
        .extend([("k_out", cache("k_out", append.k_out)?), ("v_out", cache("v_out", append.v_out)?)]);
    spans.entries =
        vec![("k", check::rows("k", &append.k, shape)?), ("v", check::rows("v", &append.v, shape)?)];
    Ok(())
}
