//! Scores of keys by themselves, for engines that bring their own attention; and pooling by itself, for
//! ranks of a tensor-parallel group, which add their scores before they select.
//!
//! Lengths and positions are read on the device, so a launch can be captured in a CUDA graph and replayed
//! for other batches within the same bounds. The kernels clip them to what is described here; they can be
//! wrong, but they cannot make a kernel read or write elsewhere. A score depends on its own sequence and
//! heads alone, to the bit, and is what attention with scores in the same launch gives for the same LSE.
//!
//! A prompt that is read in chunks is scored behind its last one: all keys are there then, and with the same LSE the
//! scores are those of the prompt in one piece. The queries that observe have to be there too: a last chunk has the
//! window's or more, or comes with queries and LSE of the one before it. Of fewer queries only these are summed.
//!
//! The example is what an engine does behind attention of its own that reads a paged cache and leaves LSE as FlashInfer
//! does: scores of keys where they lie, one choice for all heads, and what is kept moved to pages of its own. The tests of
//! this crate run it as it stands.
//!
//! ```
#![doc = include_str!("example_pages.rs")]
//! ```

use super::{
    DType, Error, Kernel, Launch, Launcher,
    batch::{self, Bias, Lengths, Lse, ScoreRows, Scores, Window},
    cache,
    check::{self, MAX_GRID_YZ, Presence, Shape, apart, range},
};
use crate::abi::{self, Pages, PoolScoresParams, Pooling, Rows, WindowScoresParams};

/// Softmax probabilities of the last queries of every sequence, summed over these queries, for every key
/// of `sequences` x `kv_heads`. Query i of a sequence sees keys `0..=positions[i]`, and its softmax is over
/// all of them. A key that no query sees, or whose sequence has no queries, scores 0.
///
/// NaN reaches the scores of those keys alone whose products with a query that sees them, or whose
/// query's LSE, are NaN.
#[derive(Clone, Copy, Debug, Default)]
pub struct WindowScores {
    /// Queries, `[sequence][query head][token][head_dim]`. The window's are enough where no LSE is given; else those
    /// that have one.
    pub q: Rows,
    /// Keys, `[sequence][kv head][token][head_dim]`, or `[page][kv head][slot][head_dim]` where they lie in pages.
    pub k: Rows,
    /// Where keys in pages lie; all zero where they are not. A key whose page is none, -1 by convention, is seen by
    /// no query and scores 0. It may be chosen all the same, as a neighbour of a key that pooling spreads, or in the
    /// window: where something is chosen by these scores, every page has to be there.
    pub pages: Pages,
    /// Sequences in the batch.
    pub sequences: u32,
    /// Query heads: 1 to 16 times `kv_heads`.
    pub query_heads: u32,
    /// Heads of keys.
    pub kv_heads: u32,
    /// 64, 96, 128 or 256.
    pub head_dim: u32,
    /// Element type of queries and keys: f16 or bf16.
    pub dtype: DType,
    /// How many queries each sequence has.
    pub queries: Lengths,
    /// How many keys each sequence has: [`Lengths::dense`] where they lie in pages.
    pub keys: Lengths,
    /// Address of i32 `[sequences]`: how many keys each sequence has, where `keys` only says how many it has at most,
    /// as for keys in pages. 0: as `keys` says.
    pub lengths: u64,
    /// Address of i32, one for each query, sequence after sequence: the last key that the query sees,
    /// within its sequence, in any order; below 0 it sees none. 0: the queries are the last of the keys.
    pub positions: u64,
    /// Factor of the products of queries and keys, [`batch::default_scale`] as a rule.
    pub scale: f32,
    /// What is added to the logits of some keys for some heads.
    pub bias: Option<Bias>,
    /// The logarithm of each query's softmax denominator, read; a query whose LSE is -inf or +inf adds nothing.
    /// `None`: a pass over the keys finds those of the window first. All queries need it.
    pub lse: Option<Lse>,
    /// Which probabilities to sum, and where the sums go.
    pub scores: Scores,
    /// Address of [`window_scores_workspace`] bytes, a multiple of 256; contents do not matter. May be 0
    /// where none are needed.
    pub workspace: u64,
    /// Bytes there.
    pub workspace_bytes: usize,
}

/// Scores pooled along the keys for each query head, then summed over the query heads of each kv head: what
/// a layer ranks its keys by. And the sum of these over the kv heads: what the TSP layer ranks tokens by.
#[derive(Clone, Copy, Debug, Default)]
pub struct PoolScores {
    /// Scores of every query head. Strides that are multiples of 4 are read faster.
    pub scores: ScoreRows,
    /// Sequences in the batch.
    pub sequences: u32,
    /// Query heads, a multiple of `kv_heads`.
    pub query_heads: u32,
    /// Groups of query heads.
    pub kv_heads: u32,
    /// How many keys each sequence has.
    pub keys: Lengths,
    /// Address of i32 `[sequences]`: how many keys each sequence has, where `keys` only says how many it has at most.
    /// 0: as `keys` says.
    pub lengths: u64,
    /// Last keys of each sequence to leave out, neither read nor written: the window, as
    /// [`SelectTopk::window`](super::select::SelectTopk::window) counts it.
    pub tail: u32,
    /// How scores are pooled.
    pub pooling: Pooling,
    /// Receives the sums over groups, for every kv head.
    pub groups: Option<ScoreRows>,
    /// Receives the sum over all heads; `head_stride` is not used.
    pub total: Option<ScoreRows>,
}

/// Bytes of workspace that [`window_scores`] needs for a description: none where LSE is given.
///
/// # Errors
/// [`Error::Argument`] where the description makes no sense or needs more than there are addresses.
pub fn window_scores_workspace(work: &WindowScores) -> Result<usize, Error> {
    check_shape(work)?;
    let Workspace { partials, lse } = workspace(work);
    let bytes = partials + lse;
    usize::try_from(bytes).ok().filter(|bytes| *bytes < isize::MAX as usize).ok_or_else(|| {
        Error::argument("workspace", bytes, "a size that fits the address space: fewer sequences or heads")
    })
}

/// Queues the scores of a batch: one launch where LSE is given, three where it is not. With no key it
/// launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is 0 where that is allowed, or device memory of the size its comment states,
/// until the kernels are done. Nothing else touches the scores or the workspace meanwhile, and nothing
/// writes the inputs.
pub unsafe fn window_scores<D: Launcher + ?Sized>(device: &D, work: &WindowScores) -> Result<(), Error> {
    let Some(prepared) = prepare(work)? else { return Ok(()) };
    let Prepared { params, form, .. } = &prepared;
    let longest = work.keys.longest;
    let bytes = bytemuck::bytes_of(params);
    if work.lse.is_none() {
        let columns = params.partial_columns as u32;
        let parts = columns.div_ceil(form.partial_slots * SLOT_COLUMNS);
        let chunks = longest.div_ceil(abi::PARTIAL_KEYS as u32);
        let state = form.partial_slots * SLOT_COLUMNS * abi::SCORES_THREADS as u32 / 32 * PARTIAL_BYTES;
        let shared_bytes = form.key_bytes() + form.partial_slots * form.slot_bytes() + state;
        let threads = columns.div_ceil(abi::SCORES_THREADS as u32);
        let launch = |kernel, blocks, shared_bytes| Launch {
            params: bytes,
            ..launch(work, kernel, blocks, shared_bytes)
        };
        // SAFETY: the struct is these kernels', and the caller vouches for the addresses in it.
        unsafe {
            device.launch(&launch(form.partials, chunks * parts, shared_bytes))?;
            device.launch(&launch(Kernel::WindowLse, threads, 0))?;
        }
    }
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe { device.launch(&Launch { params: bytes, ..prepared.launch(work, form.scores) }) }
}

/// A description that was checked, as the kernels take it.
pub(super) struct Prepared {
    pub(super) params: WindowScoresParams,
    form: Form,
}

impl Prepared {
    /// The launch that sums probabilities; its parameters are still to be given.
    pub(super) fn launch(&self, work: &WindowScores, kernel: Kernel) -> Launch<'static> {
        let WindowScoresParams { block_keys, slots, .. } = self.params;
        let shared_bytes = self.form.key_bytes() + slots as u32 * self.form.slot_bytes();
        launch(work, kernel, work.keys.longest.div_ceil(block_keys as u32), shared_bytes)
    }
}

fn launch(work: &WindowScores, kernel: Kernel, blocks: u32, shared_bytes: u32) -> Launch<'static> {
    Launch {
        kernel,
        grid: [blocks, work.kv_heads, work.sequences],
        cluster: [1, 1, 1],
        block: [abi::SCORES_THREADS as u32, 1, 1],
        shared_bytes,
        params: &[],
    }
}

/// Checks a description; `None` where there is nothing to score.
pub(super) fn prepare(work: &WindowScores) -> Result<Option<Prepared>, Error> {
    let workspace_bytes = window_scores_workspace(work)?;
    if work.sequences == 0 || work.keys.longest == 0 {
        return Ok(None);
    }
    check_addresses(work, workspace_bytes)?;

    let form = form(work);
    let window = work.scores.window.queries(work.queries.longest);
    let columns = columns(work);
    let slots = form.slots(columns);
    let fits = columns <= slots * SLOT_COLUMNS;
    let block_keys = if fits { resident_block_keys(work) } else { form.step_keys };
    let bias = work.bias.unwrap_or_default();
    // Found here, it is of the windows alone.
    let own_lse = || Lse::padded(work.workspace + workspace(work).partials as u64, work.query_heads, window);
    let lse = work.lse.unwrap_or_else(own_lse);
    let params = WindowScoresParams {
        q: work.q,
        k: work.k,
        pages: work.pages,
        cu_seqlens_q: work.queries.cu_seqlens,
        cu_seqlens_k: work.keys.cu_seqlens,
        k_lengths: work.lengths,
        positions: work.positions,
        lse: lse.into(),
        bias_heads: bias.heads,
        bias_keys: bias.keys,
        bias_key_stride: bias.key_stride,
        scores: work.scores.base,
        score_sequence_stride: work.scores.sequence_stride,
        score_head_stride: work.scores.head_stride,
        partials: if work.lse.is_none() { work.workspace } else { 0 },
        scale: work.scale,
        bias: bias.value,
        sequences: work.sequences as i32,
        query_heads: work.query_heads as i32,
        kv_heads: work.kv_heads as i32,
        q_tokens: work.queries.tokens as i32,
        k_tokens: work.keys.tokens as i32,
        max_q_tokens: work.queries.longest as i32,
        max_k_tokens: work.keys.longest as i32,
        window: window as i32,
        score_heads: work.scores.count(work.query_heads, work.kv_heads) as i32,
        block_keys: block_keys as i32,
        slots: slots as i32,
        partial_columns: columns as i32,
    };
    Ok(Some(Prepared { params, form }))
}

/// Queues the pooling. With no key, or nothing wanted, it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is 0 where that is allowed, or device memory of the size its comment states,
/// until the kernel is done. Nothing else touches the outputs meanwhile, and nothing writes the inputs.
pub unsafe fn pool_scores<D: Launcher + ?Sized>(device: &D, work: &PoolScores) -> Result<(), Error> {
    check_pooling(work)?;
    let keys = work.keys.longest.saturating_sub(work.tail);
    if work.sequences == 0 || keys == 0 || work.groups.is_none() && work.total.is_none() {
        return Ok(());
    }
    check_pool_addresses(work)?;
    let unwanted = ScoreRows { base: 0, sequence_stride: 0, head_stride: 0 };
    let groups = work.groups.unwrap_or(unwanted);
    let total = work.total.unwrap_or(unwanted);
    let params = PoolScoresParams {
        scores: work.scores.base,
        sequence_stride: work.scores.sequence_stride,
        head_stride: work.scores.head_stride,
        cu_seqlens: work.keys.cu_seqlens,
        lengths: work.lengths,
        groups: groups.base,
        group_sequence_stride: groups.sequence_stride,
        group_head_stride: groups.head_stride,
        total: total.base,
        total_sequence_stride: total.sequence_stride,
        pooling: work.pooling,
        sequences: work.sequences as i32,
        query_heads: work.query_heads as i32,
        kv_heads: work.kv_heads as i32,
        tokens: work.keys.tokens as i32,
        max_tokens: work.keys.longest as i32,
        tail: work.tail as i32,
    };
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe {
        device.launch(&Launch {
            kernel: Kernel::PoolScores,
            grid: [keys.div_ceil(abi::POOL_KEYS as u32), work.sequences, 1],
            cluster: [1, 1, 1],
            block: [abi::POOL_THREADS as u32, 1, 1],
            shared_bytes: 0,
            params: bytemuck::bytes_of(&params),
        })
    }
}

/// Keys of a block that holds all queries of the window: enough that reading the queries is little beside reading the
/// keys, and fewer where long blocks would be one to a multiprocessor, or would leave most idle at the end.
fn resident_block_keys(work: &WindowScores) -> u32 {
    let keys = u64::from(work.keys.longest) * u64::from(work.kv_heads) * u64::from(work.sequences);
    if keys <= 512 << 10 { 256 } else { 512 }
}

/// Queries of a slot of shared memory.
const SLOT_COLUMNS: u32 = 64;

/// Shared memory of a block that every chip from Ampere on has.
const SHARED_BYTES: u32 = 99 << 10;

/// A maximum and a sum.
const PARTIAL_BYTES: u32 = 8;

/// What depends on the element type and the head size.
struct Form {
    scores: Kernel,
    partials: Kernel,
    head_dim: u32,
    /// Keys that a block has in registers at a time.
    step_keys: u32,
    /// Slots of a block of the first pass.
    partial_slots: u32,
}

impl Form {
    fn key_bytes(&self) -> u32 {
        self.step_keys * self.head_dim * 2
    }

    /// Queries, LSE, and the last key that each sees.
    fn slot_bytes(&self) -> u32 {
        SLOT_COLUMNS * (self.head_dim * 2 + 8)
    }

    /// Slots that hold so many columns; where there is no room for them two, of which one is filled while
    /// the other is used.
    fn slots(&self, columns: u32) -> u32 {
        let slots = columns.div_ceil(SLOT_COLUMNS);
        let room = (SHARED_BYTES - self.key_bytes()) / self.slot_bytes();
        if slots <= room { slots } else { 2 }
    }
}

/// The form for an element type and a head size, which [`check_shape`] has found to exist.
fn form(work: &WindowScores) -> Form {
    use Kernel::*;
    let [scores, partials] = match (work.dtype, work.head_dim) {
        (DType::BF16, 64) => [WindowScoresBf16D64, WindowPartialsBf16D64],
        (DType::BF16, 96) => [WindowScoresBf16D96, WindowPartialsBf16D96],
        (DType::BF16, 128) => [WindowScoresBf16D128, WindowPartialsBf16D128],
        (DType::BF16, _) => [WindowScoresBf16D256, WindowPartialsBf16D256],
        (_, 64) => [WindowScoresF16D64, WindowPartialsF16D64],
        (_, 96) => [WindowScoresF16D96, WindowPartialsF16D96],
        (_, 128) => [WindowScoresF16D128, WindowPartialsF16D128],
        (_, _) => [WindowScoresF16D256, WindowPartialsF16D256],
    };
    let (step_keys, partial_slots) = if work.head_dim == 256 { (64, 1) } else { (128, 2) };
    Form { scores, partials, head_dim: work.head_dim, step_keys, partial_slots }
}

/// Queries of a group, each head's padded to whole tiles of 8.
fn columns(work: &WindowScores) -> u32 {
    let window = work.scores.window.queries(work.queries.longest);
    work.query_heads / work.kv_heads * window.max(1).next_multiple_of(8)
}

/// Bytes of the parts of the workspace, in their order, each a multiple of 256.
struct Workspace {
    /// What each block of the first pass finds.
    partials: u128,
    /// LSE of the windows.
    lse: u128,
}

fn workspace(work: &WindowScores) -> Workspace {
    if work.lse.is_some() {
        return Workspace { partials: 0, lse: 0 };
    }
    let chunks = work.keys.longest.div_ceil(abi::PARTIAL_KEYS as u32);
    let blocks = u128::from(work.sequences) * u128::from(work.kv_heads) * u128::from(chunks);
    let partials = blocks * u128::from(columns(work)) * u128::from(PARTIAL_BYTES);
    let window = work.scores.window.queries(work.queries.longest);
    let queries = u128::from(work.sequences) * u128::from(work.query_heads) * u128::from(window);
    Workspace { partials: partials.next_multiple_of(256), lse: (4 * queries).next_multiple_of(256) }
}

/// Everything about a description but its addresses.
fn check_shape(work: &WindowScores) -> Result<(), Error> {
    batch::check_head_dim(work.head_dim)?;
    if !matches!(work.dtype, DType::F16 | DType::BF16) {
        return Err(Error::argument("dtype", format_args!("{:?}", work.dtype), "F16 or BF16"));
    }
    batch::check_heads(work.query_heads, work.kv_heads)?;
    for (what, size) in [("sequences", work.sequences), ("kv_heads", work.kv_heads)] {
        if size > MAX_GRID_YZ {
            return Err(Error::argument(what, size, format!("at most {MAX_GRID_YZ}")));
        }
    }
    work.queries.check("queries")?;
    work.keys.check("keys")?;
    batch::check_scale(work.scale)?;
    work.scores.window.check()?;
    if work.scores.window == Window::All {
        if work.lse.is_none() {
            return Err(Error::argument("lse", "None", "given where scores.window is All"));
        }
        let group = work.query_heads / work.kv_heads;
        let most = (1 << 30) / group;
        if work.queries.longest > most {
            let expected = format!("at most {most} where {group} heads share keys and scores.window is All");
            return Err(Error::argument("queries.longest", work.queries.longest, expected));
        }
    }
    Ok(())
}

/// Every address of a description that has keys.
fn check_addresses(work: &WindowScores, workspace_bytes: usize) -> Result<(), Error> {
    let WindowScores { sequences, query_heads, kv_heads, queries, keys, .. } = *work;
    let shape = |heads, lengths: Lengths| Shape {
        sequences: sequences as i32,
        heads: heads as i32,
        tokens: lengths.tokens as i32,
        width: work.head_dim,
        dtype: work.dtype,
        packed: lengths.cu_seqlens != 0,
    };
    let mut inputs = vec![
        ("lengths", range("lengths", work.lengths, sequences.into(), 4, Presence::Optional)?),
        ("queries.cu_seqlens", queries.check_starts("queries", sequences)?),
        ("keys.cu_seqlens", keys.check_starts("keys", sequences)?),
    ];
    let key_shape = shape(kv_heads, keys);
    let stored = if work.pages.table == 0 {
        key_shape
    } else {
        let names = ["keys.tokens", "keys.cu_seqlens"];
        let (stored, table) = cache::in_pages(&work.pages, key_shape, names, keys.cu_seqlens)?;
        inputs.push(("pages.table", table));
        stored
    };
    inputs.push(("k", check::rows("k", &work.k, stored)?));
    let rows = queries.rows(sequences);
    if rows > 0 {
        inputs.push(("q", check::rows("q", &work.q, shape(query_heads, queries))?));
        inputs.push(("positions", range("positions", work.positions, rows, 4, Presence::Optional)?));
    }
    if let Some(lse) = work.lse.filter(|_| rows > 0) {
        inputs.push(("lse", lse.check(sequences, query_heads, queries)?));
    }
    if let Some(bias) = work.bias {
        let [heads, keys] = bias.check(sequences, query_heads, keys, work.scale)?;
        inputs.extend([("bias.heads", heads), ("bias.keys", keys)]);
    }

    let heads = work.scores.count(query_heads, kv_heads);
    let says = "window_scores_workspace";
    let workspace = check::workspace(work.workspace, work.workspace_bytes, workspace_bytes, says)?;
    let scores = work.scores.check(sequences, heads, keys)?;
    apart(&[("scores", scores), ("workspace", workspace)], &inputs)
}

/// Everything about a pooling but its addresses.
fn check_pooling(work: &PoolScores) -> Result<(), Error> {
    let PoolScores { query_heads, kv_heads, .. } = *work;
    if kv_heads == 0 {
        return Err(Error::argument("kv_heads", 0, "1 or more"));
    }
    if query_heads == 0 || !query_heads.is_multiple_of(kv_heads) || query_heads > i32::MAX as u32 {
        let expected = format!("a multiple of kv_heads = {kv_heads} from there to {}", i32::MAX);
        return Err(Error::argument("query_heads", query_heads, expected));
    }
    if work.sequences > MAX_GRID_YZ {
        return Err(Error::argument("sequences", work.sequences, format!("at most {MAX_GRID_YZ}")));
    }
    work.keys.check("keys")?;
    if work.tail > i32::MAX as u32 {
        return Err(Error::argument("tail", work.tail, format!("at most {}", i32::MAX)));
    }
    work.pooling.check("pooling")
}

/// Every address of a pooling that has keys.
fn check_pool_addresses(work: &PoolScores) -> Result<(), Error> {
    let PoolScores { sequences, query_heads, kv_heads, keys, .. } = *work;
    let inputs = [
        ("scores", work.scores.check("scores", sequences, query_heads, keys)?),
        ("lengths", range("lengths", work.lengths, sequences.into(), 4, Presence::Optional)?),
        ("keys.cu_seqlens", keys.check_starts("keys", sequences)?),
    ];
    let mut outputs = Vec::new();
    if let Some(groups) = work.groups {
        outputs.push(("groups", groups.check("groups", sequences, kv_heads, keys)?));
    }
    if let Some(total) = work.total {
        let total = ScoreRows { head_stride: keys.longest.into(), ..total };
        outputs.push(("total", total.check("total", sequences, 1, keys)?));
    }
    apart(&outputs, &inputs)
}
