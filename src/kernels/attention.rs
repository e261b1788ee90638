//! Causal attention of a prompt, and in the same launch the softmax probabilities that a window of
//! queries gives every key: what FastKV, SnapKV and H2O rank keys by.
//!
//! Lengths and positions are read on the device, so a launch can be captured in a CUDA graph and replayed
//! for other batches within the same bounds. The kernel clips them to what is described here; they can be
//! wrong, but they cannot make it read or write elsewhere. Results are bit for bit the same in every run
//! and whatever else is in the batch.
//!
//! A chunk of a prompt attends to what a cache holds of the prompt so far: keys in pages, or in a cache with room to grow,
//! with their lengths on the device; the chunk's own keys are there too, and its queries are the last of the keys.

use std::ops::Range;

use super::{
    DType, Error, Kernel, Launch, Launcher, TensorMap,
    batch::{self, Bias, Lengths, Lse, Scores, Window},
    cache,
    check::{self, Presence, Shape, range},
    images,
};
use crate::abi::{self, Pages, PrefillAttentionParams, Rows, Sm90AttentionParams};

/// Causal attention of `sequences` x `query_heads`: query i of a sequence attends to its keys
/// `0..=positions[i]`. A query that sees no key, or only logits of -inf, has output 0 and LSE -inf.
///
/// A key that a query does not see adds nothing to its output, whatever the key and its value hold, NaN
/// included. What it sees spreads as IEEE arithmetic says. Products of queries and keys are above -2^99, or -inf.
#[derive(Clone, Copy, Debug, Default)]
pub struct PrefillAttention {
    /// Queries, `[sequence][query head][token][head_dim]`.
    pub q: Rows,
    /// Keys, `[sequence][kv head][token][head_dim]`, or `[page][kv head][slot][head_dim]` where they lie in pages.
    pub k: Rows,
    /// Values, of the shape of the keys, in the same pages.
    pub v: Rows,
    /// Where keys and values in pages lie; all zero where they do not. A key whose page is none, -1 by convention, is
    /// seen by no query and scores 0. Hopper's form takes pages of 128 slots, of multiples of that, and of 8, 16, 32
    /// or 64.
    pub pages: Pages,
    /// Receives the output, of the shape of the queries; overlaps nothing else.
    pub out: Rows,
    /// Sequences in the batch.
    pub sequences: u32,
    /// Query heads: 1 to 16 times `kv_heads`.
    pub query_heads: u32,
    /// Heads of keys and values.
    pub kv_heads: u32,
    /// 64, 96, 128 or 256.
    pub head_dim: u32,
    /// Element type of queries, keys, values and output: f16 or bf16.
    pub dtype: DType,
    /// How many queries each sequence has.
    pub queries: Lengths,
    /// How many keys each sequence has: [`Lengths::dense`] where they lie in pages.
    pub keys: Lengths,
    /// Address of i32 `[sequences]`: how many keys each sequence has, where `keys` only says how many it has at most,
    /// as for keys in pages and for caches with room to grow. 0: as `keys` says.
    pub lengths: u64,
    /// Address of i32, one for each query, sequence after sequence: the last key that the query sees,
    /// within its sequence, in any order; below 0 it sees none. 0: the queries are the last of the keys.
    pub positions: u64,
    /// Factor of the products of queries and keys, [`batch::default_scale`] as a rule.
    pub scale: f32,
    /// What is added to the logits of some keys for some heads.
    pub bias: Option<Bias>,
    /// Where the logarithm of each query's softmax denominator goes.
    pub lse: Option<Lse>,
    /// Which probabilities to sum, and where the sums go.
    pub scores: Option<Scores>,
    /// Address of [`prefill_attention_workspace`] bytes, a multiple of 256; contents do not matter.
    pub workspace: u64,
    /// Bytes there.
    pub workspace_bytes: usize,
    /// Which form of the kernel computes it; `None`: the fastest that can.
    pub form: Option<Form>,
}

/// The kernels that compute [`PrefillAttention`]. Their results agree up to rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// On every chip from Ampere on.
    Portable,
    /// On compute capability 9.0: `head_dim` 64 or 128, tensors that its copy engine can read, whose rows
    /// lie apart, and pages that make up tiles of keys.
    Hopper,
}

/// Bytes of workspace that [`prefill_attention`] needs for a description.
///
/// # Errors
/// [`Error::Argument`] where the description makes no sense or needs more than there are addresses.
pub fn prefill_attention_workspace(work: &PrefillAttention) -> Result<usize, Error> {
    check_shape(work)?;
    let Workspace { queue, lse } = workspace(work);
    let bytes = queue + lse;
    usize::try_from(bytes).ok().filter(|bytes| *bytes < isize::MAX as usize).ok_or_else(|| {
        Error::argument("workspace", bytes, "a size that fits the address space: fewer sequences or heads")
    })
}

/// Queues the attention of a batch, and the scores of its keys. With no query it launches nothing and
/// writes nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is 0 where that is allowed, or device memory of the size its comment states,
/// until the kernel is done. Nothing else touches the outputs or the workspace meanwhile, and nothing
/// writes the inputs.
pub unsafe fn prefill_attention<D: Launcher + ?Sized>(
    device: &D,
    work: &PrefillAttention,
) -> Result<(), Error> {
    let needed = prefill_attention_workspace(work)?;
    if work.sequences == 0 || work.queries.tokens == 0 || work.queries.longest == 0 {
        return Ok(());
    }
    check_tensors(work, needed)?;
    let form = form(device, work)?;
    let traits = match form {
        Form::Portable => portable(work),
        Form::Hopper => hopper(work),
    };
    let Workspace { queue, lse } = workspace(work);
    let own_lse = || {
        let tokens = (lse / 4) as i64 / i64::from(work.query_heads);
        let base = work.workspace + queue as u64;
        Lse { base, head_stride: tokens, token_stride: 1, ..Lse::default() }
    };
    let items = items(work, &traits);
    let lse = work.lse.or_else(|| (lse > 0).then(own_lse)).unwrap_or_default();
    let bias = work.bias.unwrap_or_default();
    let scores = work.scores;
    let params = PrefillAttentionParams {
        q: work.q,
        k: work.k,
        v: work.v,
        out: work.out,
        pages: work.pages,
        cu_seqlens_q: work.queries.cu_seqlens,
        cu_seqlens_k: work.keys.cu_seqlens,
        k_lengths: work.lengths,
        positions: work.positions,
        lse: lse.into(),
        bias_heads: bias.heads,
        bias_keys: bias.keys,
        bias_key_stride: bias.key_stride,
        scores: scores.map_or(0, |scores| scores.base),
        score_sequence_stride: scores.map_or(0, |scores| scores.sequence_stride),
        score_head_stride: scores.map_or(0, |scores| scores.head_stride),
        queue: work.workspace,
        scale: work.scale,
        bias: bias.value,
        sequences: work.sequences as i32,
        query_heads: work.query_heads as i32,
        kv_heads: work.kv_heads as i32,
        q_tokens: work.queries.tokens as i32,
        k_tokens: work.keys.tokens as i32,
        max_q_tokens: work.queries.longest as i32,
        max_k_tokens: work.keys.longest as i32,
        window: scores.map_or(0, |scores| scores.window.queries(work.queries.longest)) as i32,
        score_heads: scores.map_or(0, |scores| scores.count(work.query_heads, work.kv_heads)) as i32,
        section_heads: section_heads(work) as i32,
        score_keys: traits.score_keys as i32,
        score_slots: traits.score_slots as i32,
    };
    let mapped;
    let params = match form {
        Form::Portable => bytemuck::bytes_of(&params),
        Form::Hopper => {
            let [q, k, v] = tensor_maps(work);
            mapped = Sm90AttentionParams {
                q: device.tensor_map(&q)?,
                k: device.tensor_map(&k)?,
                v: device.tensor_map(&v)?,
                attention: params,
                reserved: [0; 6],
            };
            bytemuck::bytes_of(&mapped)
        }
    };
    // SAFETY: the workspace has that many bytes, and the caller vouches for it.
    unsafe { device.fill(work.workspace, 0, queue as usize) }?;
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe {
        device.launch(&Launch {
            kernel: traits.kernel,
            // Blocks that find no room wait their turn; none waits for one that comes after it.
            grid: [items.min(device.multiprocessors().saturating_mul(traits.blocks)), 1, 1],
            cluster: [1, 1, 1],
            block: [traits.threads, 1, 1],
            shared_bytes: traits.shared_bytes,
            params,
        })
    }
}

/// Bytes of keys and values that are to stay in L2 while the queries of their heads pass.
const SECTION_BYTES: u64 = 32 << 20;

/// What a launch depends on besides the work.
struct Traits {
    kernel: Kernel,
    threads: u32,
    /// Blocks of a multiprocessor.
    blocks: u32,
    /// Queries of a tile, at least.
    tile_queries: u32,
    /// Keys of a score item: few enough to even out the end of a launch, enough that reading the queries is
    /// little beside reading the keys. Scores of all queries cost more for each key.
    score_keys: u32,
    /// Slots of 64 queries while keys are scored; more queries stream past the keys.
    score_slots: u32,
    shared_bytes: u32,
}

/// Of the portable form, for an element type and a head size that [`check_shape`] has found to exist.
fn portable(work: &PrefillAttention) -> Traits {
    use Kernel::*;
    let kernels = match (work.dtype, in_pages(work)) {
        (DType::BF16, false) => [
            PrefillAttentionBf16D64,
            PrefillAttentionBf16D96,
            PrefillAttentionBf16D128,
            PrefillAttentionBf16D256,
        ],
        (_, false) => {
            [PrefillAttentionF16D64, PrefillAttentionF16D96, PrefillAttentionF16D128, PrefillAttentionF16D256]
        }
        (DType::BF16, true) => {
            [PagedAttentionBf16D64, PagedAttentionBf16D96, PagedAttentionBf16D128, PagedAttentionBf16D256]
        }
        (_, true) => {
            [PagedAttentionF16D64, PagedAttentionF16D96, PagedAttentionF16D128, PagedAttentionF16D256]
        }
    };
    let (kernel, queries) = match work.head_dim {
        64 => (kernels[0], 128),
        96 => (kernels[1], 128),
        128 => (kernels[2], 128),
        _ => (kernels[3], 64),
    };
    // As few slots as scoring can do with, 32 queries of 4 heads: more would leave room for one block.
    let score_slots = 2;
    // One tile of queries, one block of keys, one of values; where they lie in pages, 8 bytes for the place of each key
    // and value of two blocks.
    const KEYS: u32 = 64;
    let places = if in_pages(work) { 2 * 2 * 8 * KEYS } else { 0 };
    let attention = (queries + 2 * KEYS) * 2 * work.head_dim + places;
    let step_keys = if work.head_dim == 256 { 64 } else { 128 };
    Traits {
        kernel,
        threads: abi::ATTENTION_THREADS as u32,
        // Registers allow as many.
        blocks: 2,
        // Code for chips from Hopper on has half as many where d = 128.
        tile_queries: if work.head_dim == 128 { 64 } else { queries },
        score_keys: if scores_all(work) { 128 } else { 512 },
        score_slots,
        shared_bytes: attention.max(score_bytes(work, step_keys, score_slots)),
    }
}

fn hopper(work: &PrefillAttention) -> Traits {
    use Kernel::*;
    let kernel = match (work.dtype, work.head_dim) {
        (DType::BF16, 64) => Sm90AttentionBf16D64,
        (DType::BF16, _) => Sm90AttentionBf16D128,
        (_, 64) => Sm90AttentionF16D64,
        _ => Sm90AttentionF16D128,
    };
    let tile_queries = abi::SM90_ATTENTION_ROWS as u32;
    let score_slots = 4;
    // Two tiles each of queries, of keys and of values; 1 KiB to align them.
    let attention = 6 * tile_queries * 2 * work.head_dim + 1024;
    Traits {
        kernel,
        threads: abi::SM90_ATTENTION_THREADS as u32,
        blocks: 1,
        tile_queries,
        score_keys: if scores_all(work) { 256 } else { 512 },
        score_slots,
        shared_bytes: attention.max(score_bytes(work, 256, score_slots) + 1024),
    }
}

fn in_pages(work: &PrefillAttention) -> bool {
    work.pages.table != 0
}

fn scores_all(work: &PrefillAttention) -> bool {
    matches!(work.scores, Some(Scores { window: Window::All, .. }))
}

/// Shared memory to score with: the keys of a step; queries, LSE, and the last key that each sees.
fn score_bytes(work: &PrefillAttention, step_keys: u32, slots: u32) -> u32 {
    let row_bytes = 2 * work.head_dim;
    if work.scores.is_some() { step_keys * row_bytes + slots * 64 * (row_bytes + 8) } else { 0 }
}

/// The form that was asked for, if it can do the work, or the fastest that can.
fn form<D: Launcher + ?Sized>(device: &D, work: &PrefillAttention) -> Result<Form, Error> {
    let why_not = why_not_hopper(device, work);
    match (work.form, why_not) {
        (Some(Form::Hopper), Some(why)) => {
            Err(Error::argument("form", "Hopper", format!("Portable: Hopper's {why}")))
        }
        (Some(form), _) => Ok(form),
        (None, Some(_)) => Ok(Form::Portable),
        (None, None) => Ok(Form::Hopper),
    }
}

fn why_not_hopper<D: Launcher + ?Sized>(device: &D, work: &PrefillAttention) -> Option<&'static str> {
    let image = Kernel::Sm90AttentionBf16D128.image();
    if device.compute_capability() != (9, 0) || !images::images().iter().any(|other| other.name == image) {
        return Some("kernel is for compute capability 9.0, and built for it");
    }
    if !matches!(work.head_dim, 64 | 128) {
        return Some("head_dim is 64 or 128");
    }
    let size = work.pages.page_size;
    if in_pages(work) && !(size % abi::SM90_ATTENTION_ROWS == 0 || [8, 16, 32, 64].contains(&size)) {
        return Some("pages have 8, 16, 32, 64 or a multiple of 128 slots");
    }
    let strides_fit = |map: &TensorMap| {
        let mut dimensions = map.sizes[1..].iter().zip(&map.strides);
        map.sizes.iter().all(|size| *size > 0) && dimensions.all(|(_, stride)| (1..1 << 40).contains(stride))
    };
    if !tensor_maps(work).iter().all(strides_fit) {
        return Some("copy engine takes tensors with keys whose strides are neither 0 nor 2^40 bytes");
    }
    None
}

/// Queries, keys and values as {64 elements, token, d / 64, head, sequence}, in boxes of a tile; keys and values in
/// pages as {64 elements, slot, d / 64, head, page}, in boxes of 64 elements of a page's slots in a tile.
fn tensor_maps(work: &PrefillAttention) -> [TensorMap; 3] {
    const TILE: u32 = abi::SM90_ATTENTION_ROWS as u32;
    let halves = work.head_dim / 64;
    let map = |rows: &Rows, heads: u32, tokens: u32, sequences: u32, box_rows: u32, box_halves: u32| {
        // Along a dimension of one element no stride is used, and none may be 0.
        let stride = |elements: i64, size: u32| if size == 1 { 16 } else { 2 * elements as u64 };
        TensorMap {
            base: rows.base,
            sizes: [64, tokens, halves, heads, sequences].map(u64::from),
            strides: [
                stride(rows.token_stride, tokens),
                stride(64, halves),
                stride(rows.head_stride, heads),
                stride(rows.sequence_stride, sequences),
            ],
            box_sizes: [64, box_rows, box_halves, 1, 1],
            dtype: work.dtype,
        }
    };
    let of_sequences = |rows, heads, lengths: Lengths| {
        let sequences = if lengths.cu_seqlens == 0 { work.sequences } else { 1 };
        map(rows, heads, lengths.tokens, sequences, TILE, halves)
    };
    let of_keys = |rows| {
        if in_pages(work) {
            let [slots, pages] = [work.pages.page_size, work.pages.pages].map(|size| size as u32);
            map(rows, work.kv_heads, slots, pages, slots.min(TILE), 1)
        } else {
            of_sequences(rows, work.kv_heads, work.keys)
        }
    };
    [of_sequences(&work.q, work.query_heads, work.queries), of_keys(&work.k), of_keys(&work.v)]
}

/// An upper bound of the items of work; at least 1.
fn items(work: &PrefillAttention, traits: &Traits) -> u32 {
    let query_tiles = tiles(work.sequences, work.queries, traits.tile_queries) * u64::from(work.query_heads);
    let score_items = tiles(work.sequences, work.keys, traits.score_keys) * u64::from(work.kv_heads);
    u32::try_from(query_tiles + if work.scores.is_some() { score_items } else { 0 }).unwrap_or(u32::MAX)
}

/// The most tiles of `size` that sequences can have.
fn tiles(sequences: u32, lengths: Lengths, size: u32) -> u64 {
    u64::from(sequences) * u64::from(lengths.longest.div_ceil(size))
}

/// kv heads of a sequence whose keys and values fit a section.
fn section_heads(work: &PrefillAttention) -> u32 {
    let head = u64::from(work.keys.longest.max(1)) * u64::from(work.head_dim) * 4;
    (SECTION_BYTES / head).clamp(1, work.kv_heads.into()) as u32
}

/// Bytes of the parts of the workspace, in their order, each a multiple of 256.
struct Workspace {
    /// The next item, and what is done of the windows: zeros at the start.
    queue: u128,
    /// LSE, where scores need it and the caller does not.
    lse: u128,
}

fn workspace(work: &PrefillAttention) -> Workspace {
    let counters =
        if work.scores.is_some() { u128::from(work.sequences) * u128::from(work.kv_heads) } else { 0 };
    let lse = if work.scores.is_some() && work.lse.is_none() {
        (work.queries.rows(work.sequences) as u128).next_multiple_of(64) * u128::from(work.query_heads)
    } else {
        0
    };
    Workspace { queue: (4 * (1 + counters)).next_multiple_of(256), lse: 4 * lse }
}

/// Everything about a description but its addresses.
fn check_shape(work: &PrefillAttention) -> Result<(), Error> {
    batch::check_head_dim(work.head_dim)?;
    if !matches!(work.dtype, DType::F16 | DType::BF16) {
        return Err(Error::argument("dtype", format_args!("{:?}", work.dtype), "F16 or BF16"));
    }
    batch::check_heads(work.query_heads, work.kv_heads)?;
    work.queries.check("queries")?;
    work.keys.check("keys")?;
    batch::check_scale(work.scale)?;
    if let Some(scores) = work.scores {
        scores.window.check()?;
    }
    // The portable form has tiles as small as any.
    let Traits { tile_queries, score_keys, .. } = portable(work);
    let of_keys = tiles(work.sequences, work.keys, score_keys);
    let tiles = tiles(work.sequences, work.queries, tile_queries).max(of_keys);
    if tiles.saturating_mul(work.query_heads.into()) >= 1 << 30 {
        return Err(Error::argument(
            "sequences",
            work.sequences,
            format!("fewer: {tiles} tiles of {} heads are 2^30 or more", work.query_heads),
        ));
    }
    Ok(())
}

/// Every address of a description that has queries.
fn check_tensors(work: &PrefillAttention, workspace_bytes: usize) -> Result<(), Error> {
    let PrefillAttention { sequences, query_heads, kv_heads, queries, keys, .. } = *work;
    let shape = |heads, lengths: Lengths| Shape {
        sequences: sequences as i32,
        heads: heads as i32,
        tokens: lengths.tokens as i32,
        width: work.head_dim,
        dtype: work.dtype,
        packed: lengths.cu_seqlens != 0,
    };
    let mut inputs = vec![("q", check_rows("q", &work.q, shape(query_heads, queries))?)];
    if keys.tokens > 0 || in_pages(work) {
        let mut stored = shape(kv_heads, keys);
        if in_pages(work) {
            let names = ["keys.tokens", "keys.cu_seqlens"];
            let table;
            (stored, table) = cache::in_pages(&work.pages, stored, names, keys.cu_seqlens)?;
            inputs.push(("pages.table", table));
        }
        inputs.push(("k", check_rows("k", &work.k, stored)?));
        inputs.push(("v", check_rows("v", &work.v, stored)?));
    }
    inputs.push(("lengths", range("lengths", work.lengths, sequences.into(), 4, Presence::Optional)?));
    let query_rows = queries.rows(sequences);
    inputs.push(("queries.cu_seqlens", queries.check_starts("queries", sequences)?));
    inputs.push(("keys.cu_seqlens", keys.check_starts("keys", sequences)?));
    inputs.push(("positions", range("positions", work.positions, query_rows, 4, Presence::Optional)?));
    if let Some(bias) = work.bias {
        let [of_heads, of_keys] = bias.check(sequences, query_heads, keys, work.scale)?;
        inputs.extend([("bias.heads", of_heads), ("bias.keys", of_keys)]);
    }

    check_strides("out", &work.out)?;
    let mut outputs = vec![("out", check::rows_apart("out", &work.out, shape(query_heads, queries))?)];
    if let Some(lse) = work.lse {
        outputs.push(("lse", lse.check(sequences, query_heads, queries)?));
    }
    if let Some(scores) = work.scores {
        outputs.push(("scores", scores.check(sequences, scores.count(query_heads, kv_heads), keys)?));
    }
    let says = "prefill_attention_workspace";
    let workspace = check::workspace(work.workspace, work.workspace_bytes, workspace_bytes, says)?;
    outputs.push(("workspace", workspace));

    check::apart(&outputs, &inputs)
}

/// A tensor whose rows the kernel finds with 32-bit strides in bytes.
fn check_rows(name: &str, rows: &Rows, shape: Shape) -> Result<Range<u64>, Error> {
    check_strides(name, rows)?;
    check::rows(name, rows, shape)
}

fn check_strides(name: &str, rows: &Rows) -> Result<(), Error> {
    const MOST: i64 = (1 << 30) - 1;
    if rows.token_stride > MOST {
        let expected = format!("at most {MOST}");
        return Err(Error::argument(format!("{name}.token_stride"), rows.token_stride, expected));
    }
    Ok(())
}
