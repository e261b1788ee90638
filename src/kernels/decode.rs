//! Attention of the newest tokens of each sequence over a compact cache, which takes them in at the same
//! time.
//!
//! Lengths are read and advanced on the device, so a launch can be captured in a CUDA graph and replayed
//! for every step. A list is split by its own length alone and merged in a fixed order: its output is the
//! same bit for bit, whatever else is in the batch and whatever the device.

use super::{
    DType, Error, Kernel, Launch, Launcher,
    batch::{self, Bias, Lengths, Lse},
    cache,
    check::{self, Presence, Shape, apart, each_apart, range},
};
use crate::abi::{self, Cache, DecodeParams, Rows};

/// New tokens of a sequence that one launch takes, at most.
pub const MAX_TOKENS: u32 = 8;

/// Blocks of an SM: with two tiles of keys and values each, enough bytes in flight.
const BLOCKS: u32 = 3;

/// One step of decoding: `out = softmax(scale * q k^T + bias) v` over each list of the cache and the new
/// tokens, which are appended. A query sees its own key and those before it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Decode {
    /// The lists. K and V may be views of one tensor. In a paged cache the heads of a sequence share pages and length:
    /// where each is to have its own, every head is described as a sequence with one kv head, and `q`, `k_new`, `v_new`
    /// and `out` are dense, so that one stride leads from head to head and on to the next sequence, `positions_new` has
    /// a number for each kv head, and `bias.heads` bits for a group, the same for all. Places of a captured batch that
    /// hold no sequence have a length below 0.
    pub cache: Cache,
    /// Queries, `[sequence][query head][token][head_dim]`.
    pub q: Rows,
    /// Keys of the new tokens, rotated, `[sequence][kv head][token][head_dim]`. With base 0 nothing is
    /// appended: the last `tokens` entries of every list are the new ones.
    pub k_new: Rows,
    /// Values of the new tokens, of the same shape.
    pub v_new: Rows,
    /// Receives the output, `[sequence][query head][token][head_dim]`.
    pub out: Rows,
    /// Address of i32 `[sequences, tokens]`: positions of the new tokens; 0 where the cache keeps none.
    pub positions_new: u64,
    /// Where the logarithm of each query's sum of exponentials goes, if it is wanted. The LSE of a list without
    /// entries is -∞.
    pub lse: Option<Lse>,
    /// Address of an i32 that is set to 1 where a list has no room for the new tokens. They are seen all the
    /// same, but such a list stays as it is: which one, its length tells. Nobody sets it back. Needed where
    /// something is appended.
    pub full: u64,
    /// Added to some of the products; its keys are original positions.
    pub bias: Option<Bias>,
    /// Positions with a bit in `bias`, the prompt's as a rule; entries behind them are not biased.
    pub bias_positions: u32,
    /// Factor of the products, `1 / sqrt(head_dim)` as a rule; above 0.
    pub scale: f32,
    /// A multiple of `cache.heads`, up to 16 times as many.
    pub query_heads: u32,
    /// New tokens of each sequence, 1 to [`MAX_TOKENS`].
    pub tokens: u32,
    /// 64, 96, 128 or 256.
    pub head_dim: u32,
    /// Element type of the tensors: f16 or bf16.
    pub dtype: DType,
    /// Address of u32 [`decode_counters`], zeros before the first launch that uses them; a launch leaves them zeros.
    /// Launches with the same counters follow one another. 0: they lie in the workspace, and every launch begins with
    /// a memset.
    pub counters: u64,
    /// Address of scratch memory, a multiple of 256. What it holds does not matter. May be 0 where none is needed.
    pub workspace: u64,
    /// Its size, at least [`decode_workspace`].
    pub workspace_bytes: usize,
}

/// Bytes of scratch memory that [`decode`] needs: what grows is 4 bytes x `head_dim` for each query row and
/// each of up to 64 chunks of a list. None where [`Decode::counters`] are given and every list is one chunk.
///
/// # Errors
/// [`Error::Argument`] for sizes that cannot be right.
pub fn decode_workspace(work: &Decode) -> Result<usize, Error> {
    Ok(Split::of(work)?.workspace(work).bytes)
}

/// Counters that a launch of [`decode`] needs, 4 bytes each: one for every list and 16 of its query rows, and one more.
///
/// # Errors
/// [`Error::Argument`] for sizes that cannot be right.
pub fn decode_counters(work: &Decode) -> Result<usize, Error> {
    Ok(Split::of(work)?.counters() as usize)
}

/// Queues one step.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is 0 where that is allowed, or device memory of the size its comment states,
/// until the kernel is done. Nothing else writes any of it meanwhile, and where something is appended
/// no two lists share the rows behind their ends.
pub unsafe fn decode<D: Launcher + ?Sized>(device: &D, work: &Decode) -> Result<(), Error> {
    let split = Split::of(work)?;
    let cache = &work.cache;
    if split.lists == 0 {
        return Ok(());
    }
    let Workspace { statistics, partials, bytes } = split.workspace(work);
    check_tensors(work, &split, bytes)?;

    let bias = work.bias.unwrap_or_default();
    let params = DecodeParams {
        cache: *cache,
        q: work.q,
        k_new: work.k_new,
        v_new: work.v_new,
        out: work.out,
        positions_new: work.positions_new,
        lse: work.lse.unwrap_or_default().into(),
        full: work.full,
        bias_heads: bias.heads,
        bias_keys: bias.keys,
        bias_key_stride: bias.key_stride,
        partials: work.workspace + partials,
        statistics: work.workspace + statistics,
        finished: if work.counters == 0 { work.workspace } else { work.counters },
        scale: work.scale,
        bias: bias.value,
        bias_positions: work.bias_positions as i32,
        group: split.group as i32,
        tokens: work.tokens as i32,
        query_tiles: split.query_tiles as i32,
        queries: split.queries as i32,
        chunks: split.chunks as i32,
    };
    let shape = BlockShape::of(work.head_dim, split.queries);
    let blocks = BLOCKS.min(shared_bytes_of_sm(device.compute_capability()) / (shape.shared_bytes + 1024));
    let blocks = device.multiprocessors().saturating_mul(blocks.max(1));
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe {
        if work.counters == 0 {
            device.fill(params.finished, 0, 4 * split.counters() as usize)?;
        }
        device.launch(&Launch {
            kernel: kernel(work.dtype, work.head_dim, split.queries),
            grid: [blocks.min(split.items()), 1, 1],
            cluster: [1, 1, 1],
            block: [shape.threads, 1, 1],
            shared_bytes: shape.shared_bytes,
            params: bytemuck::bytes_of(&params),
        })
    }
}

/// How the work is cut.
struct Split {
    lists: u32,
    group: u32,
    /// Rows of a query tile, padded: 8 or 16.
    queries: u32,
    query_tiles: u32,
    /// Chunks of the longest list.
    chunks: u32,
    head_dim: u32,
}

struct Workspace {
    statistics: u64,
    partials: u64,
    bytes: usize,
}

impl Split {
    fn of(work: &Decode) -> Result<Self, Error> {
        let cache = &work.cache;
        let lists = cache::lists(cache)?;
        let group = match lists {
            0 => 1,
            _ => {
                batch::check_heads(work.query_heads, cache.heads as u32)?;
                work.query_heads / cache.heads as u32
            }
        };
        if !(1..=MAX_TOKENS).contains(&work.tokens) {
            return Err(Error::argument("tokens", work.tokens, format!("from 1 to {MAX_TOKENS}")));
        }
        batch::check_head_dim(work.head_dim)?;
        if work.dtype == DType::F32 {
            return Err(Error::argument("dtype", "F32", "F16 or BF16"));
        }
        let rows = group * work.tokens;
        let queries = if rows <= 8 { 8 } else { abi::DECODE_QUERIES as u32 };
        let query_tiles = rows.div_ceil(queries);
        let keys = cache.capacity as u32 + work.tokens;
        let chunks = keys.div_ceil(abi::DECODE_BLOCK_KEYS as u32).min(abi::DECODE_CHUNKS as u32);
        let most = i32::MAX as u32 / (query_tiles * chunks);
        if lists > most {
            return Err(Error::argument("cache.sequences * cache.heads", lists, format!("at most {most}")));
        }
        Ok(Self { lists, group, queries, query_tiles, chunks, head_dim: work.head_dim })
    }

    /// Pieces of work, at most.
    fn items(&self) -> u32 {
        self.lists * self.query_tiles * self.chunks
    }

    fn counters(&self) -> u64 {
        u64::from(self.lists) * u64::from(self.query_tiles) + 1
    }

    fn workspace(&self, work: &Decode) -> Workspace {
        // A list of one chunk is written out at once.
        let rows = if self.chunks > 1 { u64::from(self.items()) * u64::from(self.queries) } else { 0 };
        let counters = if work.counters == 0 { self.counters() } else { 0 };
        let statistics = (4 * counters).next_multiple_of(check::WORKSPACE_ALIGNMENT);
        let partials = statistics + (8 * rows).next_multiple_of(check::WORKSPACE_ALIGNMENT);
        let bytes =
            partials + (4 * rows * u64::from(self.head_dim)).next_multiple_of(check::WORKSPACE_ALIGNMENT);
        Workspace { statistics, partials, bytes: bytes as usize }
    }
}

/// Threads and shared memory of a block: what `Shape` in kernels/decode.cu lays out.
struct BlockShape {
    threads: u32,
    shared_bytes: u32,
}

impl BlockShape {
    fn of(head_dim: u32, queries: u32) -> Self {
        let warps = if head_dim > 128 { 2 } else { 4 };
        let row = 2 * head_dim + abi::VECTOR_BYTES as u32;
        let keys = 2 * warps * abi::DECODE_WARP_KEYS as u32;
        Self { threads: 32 * warps, shared_bytes: row * (2 * keys + 2 * queries) }
    }
}

/// Shared memory of an SM, from the table of compute capabilities in the CUDA programming guide.
const fn shared_bytes_of_sm(compute_capability: (u32, u32)) -> u32 {
    let kib = match compute_capability {
        (8, 0 | 7) => 164,
        (9..=11, _) => 228,
        _ => 100,
    };
    kib << 10
}

fn kernel(dtype: DType, head_dim: u32, queries: u32) -> Kernel {
    match (dtype, head_dim, queries) {
        (DType::F16, 64, 8) => Kernel::DecodeF16D64Q8,
        (DType::F16, 64, _) => Kernel::DecodeF16D64Q16,
        (DType::F16, 96, 8) => Kernel::DecodeF16D96Q8,
        (DType::F16, 96, _) => Kernel::DecodeF16D96Q16,
        (DType::F16, 128, 8) => Kernel::DecodeF16D128Q8,
        (DType::F16, 128, _) => Kernel::DecodeF16D128Q16,
        (DType::F16, _, 8) => Kernel::DecodeF16D256Q8,
        (DType::F16, ..) => Kernel::DecodeF16D256Q16,
        (_, 64, 8) => Kernel::DecodeBf16D64Q8,
        (_, 64, _) => Kernel::DecodeBf16D64Q16,
        (_, 96, 8) => Kernel::DecodeBf16D96Q8,
        (_, 96, _) => Kernel::DecodeBf16D96Q16,
        (_, 128, 8) => Kernel::DecodeBf16D128Q8,
        (_, 128, _) => Kernel::DecodeBf16D128Q16,
        (_, _, 8) => Kernel::DecodeBf16D256Q8,
        _ => Kernel::DecodeBf16D256Q16,
    }
}

fn check_tensors(work: &Decode, split: &Split, workspace_bytes: usize) -> Result<(), Error> {
    let cache = &work.cache;
    let Decode { head_dim: width, dtype, tokens, .. } = *work;
    let (sequences, tokens) = (cache.sequences, tokens as i32);
    let query_shape =
        Shape { sequences, heads: work.query_heads as i32, tokens, width, dtype, packed: false };
    let new_shape = Shape { heads: cache.heads, ..query_shape };
    let appends = work.k_new.base != 0;

    let mut inputs = vec![("q", check::rows("q", &work.q, query_shape)?)];
    let mut outputs = vec![("out", check::rows_apart("out", &work.out, query_shape)?)];
    if appends {
        inputs.push(("k_new", check::rows("k_new", &work.k_new, new_shape)?));
        inputs.push(("v_new", check::rows("v_new", &work.v_new, new_shape)?));
        outputs.push(("full", range("full", work.full, 1, 4, Presence::Needed)?));
        let news = i128::from(sequences) * i128::from(tokens);
        let presence = if cache.positions == 0 { Presence::Optional } else { Presence::Needed };
        inputs.push(("positions_new", range("positions_new", work.positions_new, news, 4, presence)?));
    }
    let cache::Spans { entries, state, places } = cache::check(cache, width, dtype, appends)?;
    inputs.extend(places);
    if let Some(lse) = work.lse {
        let queries = Lengths::dense(work.tokens);
        outputs.push(("lse", lse.check(sequences as u32, work.query_heads, queries)?));
    }
    batch::check_scale(work.scale)?;
    if let Some(bias) = work.bias {
        let keys = Lengths::dense(work.bias_positions);
        keys.check("bias_positions")?;
        let [of_heads, of_keys] = bias.check(sequences as u32, work.query_heads, keys, work.scale)?;
        inputs.extend([("bias.heads", of_heads), ("bias.keys", of_keys)]);
    }
    let counters = range("counters", work.counters, split.counters().into(), 4, Presence::Optional)?;
    let workspace =
        check::workspace(work.workspace, work.workspace_bytes, workspace_bytes, "decode_workspace")?;
    outputs.extend([("counters", counters), ("workspace", workspace)]);
    if appends {
        each_apart(&entries, &inputs)?;
        outputs.extend(state);
    } else {
        inputs.extend(state);
    }
    inputs.extend(entries);
    apart(&outputs, &inputs)
}
