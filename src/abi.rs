//! Parameter structs and constants shared with the kernels, generated from `kernels/abi.h`.

/// Bytes of one vector load or store; row sizes, strides and addresses are multiples of it.
pub const VECTOR_BYTES: i32 = 16;
/// Threads of a block of `fastkv_prefill_attention_*`.
pub const ATTENTION_THREADS: i32 = 128;
/// Threads of a block of `fastkv_sm90_attention_*`.
pub const SM90_ATTENTION_THREADS: i32 = 384;
/// Queries, and keys, of a tile of `fastkv_sm90_attention_*`.
pub const SM90_ATTENTION_ROWS: i32 = 128;
/// Keys of a decode block, the unit in which lists are split.
pub const DECODE_BLOCK_KEYS: i32 = 64;
/// Chunks that `fastkv_decode_*` splits a list into, at most.
pub const DECODE_CHUNKS: i32 = 64;
/// Query rows (new tokens x heads of a GQA group) that one pass over a list serves, at most.
pub const DECODE_QUERIES: i32 = 16;
/// Keys of a list that each warp of `fastkv_decode_*` works on at a time.
pub const DECODE_WARP_KEYS: i32 = 16;
/// Threads of a block of `fastkv_gather_indices`.
pub const GATHER_INDICES_THREADS: i32 = 256;
/// Threads of a block of `fastkv_gather_kv`.
pub const GATHER_KV_THREADS: i32 = 128;
/// Threads of a block of `fastkv_compact`.
pub const COMPACT_THREADS: i32 = 512;
/// Rows that each thread of `fastkv_gather_kv` and `fastkv_compact` has in flight at once.
pub const GATHER_KV_ROWS: i32 = 4;
/// Pooling that takes the largest score in reach.
pub const POOLING_MAX: i32 = 0;
/// Pooling that takes the mean score in reach.
pub const POOLING_AVERAGE: i32 = 1;
/// Reduction over groups of heads that adds their scores.
pub const REDUCTION_SUM: i32 = 0;
/// Reduction over groups of heads that takes the largest score.
pub const REDUCTION_MAX: i32 = 1;
/// LSE as natural logarithms.
pub const LOGARITHM_NATURAL: i32 = 0;
/// LSE as logarithms of base 2.
pub const LOGARITHM_BINARY: i32 = 1;
/// Threads of a block of `fastkv_window_scores_*`, `fastkv_window_partials_*` and `fastkv_column_sums_*`.
pub const SCORES_THREADS: i32 = 128;
/// Threads of a block of `fastkv_add_scores`, `fastkv_gather_scores`, `fastkv_raise_scores` and `fastkv_mark_keys`.
pub const SUMS_THREADS: i32 = 256;
/// Keys of a block of `fastkv_window_partials_*`.
pub const PARTIAL_KEYS: i32 = 512;
/// Threads of a block of `fastkv_pool_scores`.
pub const POOL_THREADS: i32 = 256;
/// Keys of a block of `fastkv_pool_scores`.
pub const POOL_KEYS: i32 = 128;
/// Threads of a block of the selection kernels.
pub const SELECT_THREADS: i32 = 512;
/// Bins of a histogram of the selection kernels: as many as a digit of a rank has values.
pub const SELECT_BINS: i32 = 2048;
/// Items that a block of the selection in several launches takes at most.
pub const SELECT_CHUNK: i32 = 4096;
/// Bytes for each row that the selection in several launches needs zeroed.
pub const SELECT_STATE_BYTES: i32 = 24608;
/// Shared memory of `fastkv_select_block` beside 4 bytes for each item.
pub const SELECT_BLOCK_BYTES: i32 = 8528;
/// Blocks of a cluster of `fastkv_select_cluster`.
pub const SELECT_CLUSTER: i32 = 8;
/// Shared memory of a block of `fastkv_select_cluster` beside 4 bytes for each item.
pub const SELECT_CLUSTER_BYTES: i32 = 25424;
/** Which rows to take and where they go: for each (sequence, head) a list of token indices, its
 length, and the place of its first row in a ragged destination `[out_rows, ...]`. The lists,
 lengths and starts live on the device, so that nothing has to come back to the host to launch.

 An index outside the sequence (-1 by convention) skips its row, which keeps what it held. Lengths
 are clipped to `capacity`, rows past `out_rows` are dropped, and so are lists with a negative start:
 no list can make a kernel touch memory outside the tensors described here.*/
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct Kept {
    /// i32: token indices within the sequence, `capacity` of them for each (sequence, head).
    pub indices: u64,
    /// Elements of `indices` from one sequence to the next.
    pub index_sequence_stride: i64,
    /// Elements of `indices` from one head to the next; 0 where all heads share one list.
    pub index_head_stride: i64,
    /// i32 `[sequences, heads]`: indices in use. 0: `capacity` for every head.
    pub lengths: u64,
    /// i64 `[sequences, heads]`: destination row of the first index. 0: lists stand `capacity` apart.
    pub starts: u64,
    /** i32 `[sequences + 1]`: first token of each sequence where sequences are packed along the token
 axis. 0: sequences have a stride and `tokens` tokens each.*/
    pub cu_seqlens: u64,
    /** i32: position of every source token, `[sequences, tokens]`, or `[tokens]` where sequences are
 packed. 0: a token's position is its index.*/
    pub positions: u64,
    /** i32 `[out_rows]`, or `[slots, heads]`, or `[slots]` where a page belongs to one head: receives the position of
 every row taken. 0: not wanted.*/
    pub positions_out: u64,
    /// Rows that the destination holds.
    pub out_rows: i64,
    /// Sequences in the batch.
    pub sequences: i32,
    /// Index lists per sequence: the kv heads, or 1.
    pub heads: i32,
    /// Tokens of each sequence, or of all together where sequences are packed.
    pub tokens: i32,
    /// Room for indices in each list.
    pub capacity: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Kept"][::core::mem::size_of::<Kept>() - 88usize];
    ["Alignment of Kept"][::core::mem::align_of::<Kept>() - 8usize];
    ["Offset of field: Kept::indices"][::core::mem::offset_of!(Kept, indices) - 0usize];
    [
        "Offset of field: Kept::index_sequence_stride",
    ][::core::mem::offset_of!(Kept, index_sequence_stride) - 8usize];
    [
        "Offset of field: Kept::index_head_stride",
    ][::core::mem::offset_of!(Kept, index_head_stride) - 16usize];
    ["Offset of field: Kept::lengths"][::core::mem::offset_of!(Kept, lengths) - 24usize];
    ["Offset of field: Kept::starts"][::core::mem::offset_of!(Kept, starts) - 32usize];
    [
        "Offset of field: Kept::cu_seqlens",
    ][::core::mem::offset_of!(Kept, cu_seqlens) - 40usize];
    [
        "Offset of field: Kept::positions",
    ][::core::mem::offset_of!(Kept, positions) - 48usize];
    [
        "Offset of field: Kept::positions_out",
    ][::core::mem::offset_of!(Kept, positions_out) - 56usize];
    [
        "Offset of field: Kept::out_rows",
    ][::core::mem::offset_of!(Kept, out_rows) - 64usize];
    [
        "Offset of field: Kept::sequences",
    ][::core::mem::offset_of!(Kept, sequences) - 72usize];
    ["Offset of field: Kept::heads"][::core::mem::offset_of!(Kept, heads) - 76usize];
    ["Offset of field: Kept::tokens"][::core::mem::offset_of!(Kept, tokens) - 80usize];
    [
        "Offset of field: Kept::capacity",
    ][::core::mem::offset_of!(Kept, capacity) - 84usize];
};
/** A tensor of rows read where it lies: element `[sequence][head][token][i]` stands at
 `base + sequence * sequence_stride + head * head_stride + token * token_stride + i`. Token-major,
 head-major and packed QKV tensors differ in the strides alone.*/
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct Rows {
    /// Address of the first element, a multiple of 16 bytes.
    pub base: u64,
    /// Elements from one sequence to the next; 0 where sequences are packed along the token axis.
    pub sequence_stride: i64,
    /// Elements from one head to the next.
    pub head_stride: i64,
    /// Elements from one token to the next.
    pub token_stride: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Rows"][::core::mem::size_of::<Rows>() - 32usize];
    ["Alignment of Rows"][::core::mem::align_of::<Rows>() - 8usize];
    ["Offset of field: Rows::base"][::core::mem::offset_of!(Rows, base) - 0usize];
    [
        "Offset of field: Rows::sequence_stride",
    ][::core::mem::offset_of!(Rows, sequence_stride) - 8usize];
    [
        "Offset of field: Rows::head_stride",
    ][::core::mem::offset_of!(Rows, head_stride) - 16usize];
    [
        "Offset of field: Rows::token_stride",
    ][::core::mem::offset_of!(Rows, token_stride) - 24usize];
};
/** Where the logarithms of the softmax denominators of queries lie (LSE), f32: query i of a sequence and a head
 at `base + sequence * sequence_stride + head * head_stride + i * token_stride`. Where `sequence_stride` is 0
 all sequences stand in one row, and i is the query's place on the token axis.*/
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct Lse {
    /// Address of the first; 0: there are none.
    pub base: u64,
    /// Elements from one sequence to the next, or 0.
    pub sequence_stride: i64,
    /// Elements from one query head to the next.
    pub head_stride: i64,
    /// Elements from one query to the next.
    pub token_stride: i64,
    /// `FASTKV_LOGARITHM_NATURAL` or `FASTKV_LOGARITHM_BINARY`.
    pub logarithm: i32,
    /// Always 0.
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Lse"][::core::mem::size_of::<Lse>() - 40usize];
    ["Alignment of Lse"][::core::mem::align_of::<Lse>() - 8usize];
    ["Offset of field: Lse::base"][::core::mem::offset_of!(Lse, base) - 0usize];
    [
        "Offset of field: Lse::sequence_stride",
    ][::core::mem::offset_of!(Lse, sequence_stride) - 8usize];
    [
        "Offset of field: Lse::head_stride",
    ][::core::mem::offset_of!(Lse, head_stride) - 16usize];
    [
        "Offset of field: Lse::token_stride",
    ][::core::mem::offset_of!(Lse, token_stride) - 24usize];
    [
        "Offset of field: Lse::logarithm",
    ][::core::mem::offset_of!(Lse, logarithm) - 32usize];
    ["Offset of field: Lse::reserved"][::core::mem::offset_of!(Lse, reserved) - 36usize];
};
/// Parameters of `fastkv_gather_indices`: `out[i] = list[rows[i]]`, and -1 for a row outside the list.
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct GatherIndicesParams {
    /// i32 `[length]`.
    pub list: u64,
    /// i32 `[count]`.
    pub rows: u64,
    /// Receives i32 `[count]`.
    pub out: u64,
    /// Numbers in the list.
    pub length: i32,
    /// Numbers wanted.
    pub count: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    [
        "Size of GatherIndicesParams",
    ][::core::mem::size_of::<GatherIndicesParams>() - 32usize];
    [
        "Alignment of GatherIndicesParams",
    ][::core::mem::align_of::<GatherIndicesParams>() - 8usize];
    [
        "Offset of field: GatherIndicesParams::list",
    ][::core::mem::offset_of!(GatherIndicesParams, list) - 0usize];
    [
        "Offset of field: GatherIndicesParams::rows",
    ][::core::mem::offset_of!(GatherIndicesParams, rows) - 8usize];
    [
        "Offset of field: GatherIndicesParams::out",
    ][::core::mem::offset_of!(GatherIndicesParams, out) - 16usize];
    [
        "Offset of field: GatherIndicesParams::length",
    ][::core::mem::offset_of!(GatherIndicesParams, length) - 24usize];
    [
        "Offset of field: GatherIndicesParams::count",
    ][::core::mem::offset_of!(GatherIndicesParams, count) - 28usize];
};
/// Pooling of scores along the keys: stride 1, padded by half the kernel.
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct Pooling {
    /// `FASTKV_POOLING_MAX`, whose padding is -inf, or `FASTKV_POOLING_AVERAGE`, whose zeros count.
    pub kind: i32,
    /// Keys in reach, odd, 1 to 63; 1 leaves scores as they are.
    pub kernel: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Pooling"][::core::mem::size_of::<Pooling>() - 8usize];
    ["Alignment of Pooling"][::core::mem::align_of::<Pooling>() - 4usize];
    ["Offset of field: Pooling::kind"][::core::mem::offset_of!(Pooling, kind) - 0usize];
    [
        "Offset of field: Pooling::kernel",
    ][::core::mem::offset_of!(Pooling, kernel) - 4usize];
};
/** Pages that sequences are spread over: token i of a sequence is slot `i % page_size` of page
 `table[sequence][i / page_size]`. What is not in `[0, pages)`, -1 by convention, is no page: nobody
 reads or writes the tokens there.*/
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct Pages {
    /// i32 `[sequences, table_pages]`. 0: there are no pages.
    pub table: u64,
    /// Pages of a sequence in `table`.
    pub table_pages: i32,
    /// Pages of the tensors.
    pub pages: i32,
    /// Slots of a page.
    pub page_size: i32,
    /// Always 0.
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Pages"][::core::mem::size_of::<Pages>() - 24usize];
    ["Alignment of Pages"][::core::mem::align_of::<Pages>() - 8usize];
    ["Offset of field: Pages::table"][::core::mem::offset_of!(Pages, table) - 0usize];
    [
        "Offset of field: Pages::table_pages",
    ][::core::mem::offset_of!(Pages, table_pages) - 8usize];
    ["Offset of field: Pages::pages"][::core::mem::offset_of!(Pages, pages) - 12usize];
    [
        "Offset of field: Pages::page_size",
    ][::core::mem::offset_of!(Pages, page_size) - 16usize];
    [
        "Offset of field: Pages::reserved",
    ][::core::mem::offset_of!(Pages, reserved) - 20usize];
};
/** Parameters of `fastkv_prefill_attention_*` and `fastkv_paged_attention_*`: causal attention of every (sequence, query head), and the
 softmax probabilities of each sequence's last queries summed per key.

 Query i of a sequence sees keys `0..=positions[i]` of it. Lengths and positions are clipped to what is
 described here. A query that sees no key has output 0 and LSE -inf.*/
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct PrefillAttentionParams {
    /// Queries, `[sequence][query head][token][d]`.
    pub q: Rows,
    /// Keys, `[sequence][kv head][token][d]`, or `[page][kv head][slot][d]` where they lie in pages.
    pub k: Rows,
    /// Values, as the keys.
    pub v: Rows,
    /// Receives the output, as the queries.
    pub out: Rows,
    /** Where keys and values in pages lie; a key without a page is seen by nobody. Table 0: there are no pages, as
 always for `fastkv_prefill_attention_*`, and never for `fastkv_paged_attention_*`.*/
    pub pages: Pages,
    /// i32 `[sequences + 1]`: first query of each sequence on the token axis. 0: `q_tokens` each.
    pub cu_seqlens_q: u64,
    /// i32 `[sequences + 1]`: first key of each sequence on the token axis. 0: `k_tokens` each. Pages: 0.
    pub cu_seqlens_k: u64,
    /// i32 `[sequences]`: keys of each sequence, at most those described above. 0: as many.
    pub k_lengths: u64,
    /** i32, one for each query, sequence after sequence: the last key that it sees, within its sequence,
 in any order; below 0 it sees none. 0: the queries are the last of the keys.*/
    pub positions: u64,
    /// Receives LSE. Base 0: not wanted.
    pub lse: Lse,
    /// u32 words, a bit for each query head, lowest bit first: heads that are biased. 0: none.
    pub bias_heads: u64,
    /// u32 words, a bit for each key of a sequence, lowest bit first: keys that are biased. 0: none.
    pub bias_keys: u64,
    /// Words of `bias_keys` from one sequence to the next.
    pub bias_key_stride: i64,
    /// Receives f32 `[sequence][score head][key]`: probabilities summed over the window. 0: not wanted.
    pub scores: u64,
    /// Elements of `scores` from one sequence to the next.
    pub score_sequence_stride: i64,
    /// Elements of `scores` from one head to the next.
    pub score_head_stride: i64,
    /// i32 zeros: `[0]` next item of work, then finished window tiles of each (sequence, kv head).
    pub queue: u64,
    /// Factor of the products of queries and keys.
    pub scale: f32,
    /// Added to the scaled product where the query head and the key are biased.
    pub bias: f32,
    /// Sequences in the batch.
    pub sequences: i32,
    /// Query heads, a multiple of `kv_heads`.
    pub query_heads: i32,
    /// Heads of keys and values.
    pub kv_heads: i32,
    /// Queries of each sequence, or of all together where `cu_seqlens_q` packs them.
    pub q_tokens: i32,
    /// Keys of each sequence, or of all together where `cu_seqlens_k` packs them.
    pub k_tokens: i32,
    /// Queries of the longest sequence, or more.
    pub max_q_tokens: i32,
    /// Keys of the longest sequence, or more.
    pub max_k_tokens: i32,
    /// Last queries of each sequence whose probabilities are summed; all where there are fewer.
    pub window: i32,
    /// `query_heads`, or `kv_heads` where scores are summed over the GQA group.
    pub score_heads: i32,
    /// kv heads whose tiles come before those of other heads, so that their keys and values stay in L2.
    pub section_heads: i32,
    /// Keys of a score item, a multiple of 32.
    pub score_keys: i32,
    /// Room for queries in shared memory, in slots of 64, while keys are scored; two or more.
    pub score_slots: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    [
        "Size of PrefillAttentionParams",
    ][::core::mem::size_of::<PrefillAttentionParams>() - 336usize];
    [
        "Alignment of PrefillAttentionParams",
    ][::core::mem::align_of::<PrefillAttentionParams>() - 8usize];
    [
        "Offset of field: PrefillAttentionParams::q",
    ][::core::mem::offset_of!(PrefillAttentionParams, q) - 0usize];
    [
        "Offset of field: PrefillAttentionParams::k",
    ][::core::mem::offset_of!(PrefillAttentionParams, k) - 32usize];
    [
        "Offset of field: PrefillAttentionParams::v",
    ][::core::mem::offset_of!(PrefillAttentionParams, v) - 64usize];
    [
        "Offset of field: PrefillAttentionParams::out",
    ][::core::mem::offset_of!(PrefillAttentionParams, out) - 96usize];
    [
        "Offset of field: PrefillAttentionParams::pages",
    ][::core::mem::offset_of!(PrefillAttentionParams, pages) - 128usize];
    [
        "Offset of field: PrefillAttentionParams::cu_seqlens_q",
    ][::core::mem::offset_of!(PrefillAttentionParams, cu_seqlens_q) - 152usize];
    [
        "Offset of field: PrefillAttentionParams::cu_seqlens_k",
    ][::core::mem::offset_of!(PrefillAttentionParams, cu_seqlens_k) - 160usize];
    [
        "Offset of field: PrefillAttentionParams::k_lengths",
    ][::core::mem::offset_of!(PrefillAttentionParams, k_lengths) - 168usize];
    [
        "Offset of field: PrefillAttentionParams::positions",
    ][::core::mem::offset_of!(PrefillAttentionParams, positions) - 176usize];
    [
        "Offset of field: PrefillAttentionParams::lse",
    ][::core::mem::offset_of!(PrefillAttentionParams, lse) - 184usize];
    [
        "Offset of field: PrefillAttentionParams::bias_heads",
    ][::core::mem::offset_of!(PrefillAttentionParams, bias_heads) - 224usize];
    [
        "Offset of field: PrefillAttentionParams::bias_keys",
    ][::core::mem::offset_of!(PrefillAttentionParams, bias_keys) - 232usize];
    [
        "Offset of field: PrefillAttentionParams::bias_key_stride",
    ][::core::mem::offset_of!(PrefillAttentionParams, bias_key_stride) - 240usize];
    [
        "Offset of field: PrefillAttentionParams::scores",
    ][::core::mem::offset_of!(PrefillAttentionParams, scores) - 248usize];
    [
        "Offset of field: PrefillAttentionParams::score_sequence_stride",
    ][::core::mem::offset_of!(PrefillAttentionParams, score_sequence_stride) - 256usize];
    [
        "Offset of field: PrefillAttentionParams::score_head_stride",
    ][::core::mem::offset_of!(PrefillAttentionParams, score_head_stride) - 264usize];
    [
        "Offset of field: PrefillAttentionParams::queue",
    ][::core::mem::offset_of!(PrefillAttentionParams, queue) - 272usize];
    [
        "Offset of field: PrefillAttentionParams::scale",
    ][::core::mem::offset_of!(PrefillAttentionParams, scale) - 280usize];
    [
        "Offset of field: PrefillAttentionParams::bias",
    ][::core::mem::offset_of!(PrefillAttentionParams, bias) - 284usize];
    [
        "Offset of field: PrefillAttentionParams::sequences",
    ][::core::mem::offset_of!(PrefillAttentionParams, sequences) - 288usize];
    [
        "Offset of field: PrefillAttentionParams::query_heads",
    ][::core::mem::offset_of!(PrefillAttentionParams, query_heads) - 292usize];
    [
        "Offset of field: PrefillAttentionParams::kv_heads",
    ][::core::mem::offset_of!(PrefillAttentionParams, kv_heads) - 296usize];
    [
        "Offset of field: PrefillAttentionParams::q_tokens",
    ][::core::mem::offset_of!(PrefillAttentionParams, q_tokens) - 300usize];
    [
        "Offset of field: PrefillAttentionParams::k_tokens",
    ][::core::mem::offset_of!(PrefillAttentionParams, k_tokens) - 304usize];
    [
        "Offset of field: PrefillAttentionParams::max_q_tokens",
    ][::core::mem::offset_of!(PrefillAttentionParams, max_q_tokens) - 308usize];
    [
        "Offset of field: PrefillAttentionParams::max_k_tokens",
    ][::core::mem::offset_of!(PrefillAttentionParams, max_k_tokens) - 312usize];
    [
        "Offset of field: PrefillAttentionParams::window",
    ][::core::mem::offset_of!(PrefillAttentionParams, window) - 316usize];
    [
        "Offset of field: PrefillAttentionParams::score_heads",
    ][::core::mem::offset_of!(PrefillAttentionParams, score_heads) - 320usize];
    [
        "Offset of field: PrefillAttentionParams::section_heads",
    ][::core::mem::offset_of!(PrefillAttentionParams, section_heads) - 324usize];
    [
        "Offset of field: PrefillAttentionParams::score_keys",
    ][::core::mem::offset_of!(PrefillAttentionParams, score_keys) - 328usize];
    [
        "Offset of field: PrefillAttentionParams::score_slots",
    ][::core::mem::offset_of!(PrefillAttentionParams, score_slots) - 332usize];
};
/// A `CUtensorMap`, which the copy engine of Hopper reads.
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct TensorMap {
    /// What `cuTensorMapEncodeTiled` wrote.
    pub words: [u64; 16usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of TensorMap"][::core::mem::size_of::<TensorMap>() - 128usize];
    ["Alignment of TensorMap"][::core::mem::align_of::<TensorMap>() - 8usize];
    [
        "Offset of field: TensorMap::words",
    ][::core::mem::offset_of!(TensorMap, words) - 0usize];
};
/** Parameters of `fastkv_sm90_attention_*`: what the portable form takes, and maps of the tensors that come
 by the copy engine, as {64 elements, token, d / 64, head, sequence} in boxes of 128 tokens of a head. Keys and
 values in pages: {64 elements, slot, d / 64, head, page} in boxes of 64 elements of a page's slots, of 128 where
 it has more. Pages are 128 slots, a part of that which is a multiple of 8, or a multiple of it. Aligned to 64 bytes.*/
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Sm90AttentionParams {
    /// Queries.
    pub q: TensorMap,
    /// Keys.
    pub k: TensorMap,
    /// Values.
    pub v: TensorMap,
    /// The rest.
    pub attention: PrefillAttentionParams,
    /// Zeros.
    pub reserved: [u64; 6usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    [
        "Size of Sm90AttentionParams",
    ][::core::mem::size_of::<Sm90AttentionParams>() - 768usize];
    [
        "Alignment of Sm90AttentionParams",
    ][::core::mem::align_of::<Sm90AttentionParams>() - 8usize];
    [
        "Offset of field: Sm90AttentionParams::q",
    ][::core::mem::offset_of!(Sm90AttentionParams, q) - 0usize];
    [
        "Offset of field: Sm90AttentionParams::k",
    ][::core::mem::offset_of!(Sm90AttentionParams, k) - 128usize];
    [
        "Offset of field: Sm90AttentionParams::v",
    ][::core::mem::offset_of!(Sm90AttentionParams, v) - 256usize];
    [
        "Offset of field: Sm90AttentionParams::attention",
    ][::core::mem::offset_of!(Sm90AttentionParams, attention) - 384usize];
    [
        "Offset of field: Sm90AttentionParams::reserved",
    ][::core::mem::offset_of!(Sm90AttentionParams, reserved) - 720usize];
};
/** A KV cache of lists, one for each (sequence, kv head), each with a length of its own on the device.

 Ragged, where there are no pages: entry i of a list is row `start + i` of `k` and `v`. Paged: entry i
 is token i of its sequence, whose lists share pages and length, and an entry without a page is absent:
 nobody sees it.

 Lengths are clipped to `capacity`, to the list's own room, and to `rows`; lists with a negative start
 are empty: no list can make a kernel touch memory outside the tensors described here.*/
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct Cache {
    /** Keys, rotated. Ragged: `token_stride` from one row to the next, the rest unused. Paged:
 `sequence_stride` from one page to the next, `token_stride` from one slot to the next.*/
    pub k: Rows,
    /// Values, as the keys.
    pub v: Rows,
    /// i64 `[sequences, heads]`: row of a list's first entry. 0: lists stand `capacity` apart.
    pub starts: u64,
    /** i32 `[sequences, heads]`, paged `[sequences]`: entries in use. Below 0: a place of the batch that is not in
 use; it has no entries, nothing is appended, and it is not full.*/
    pub lengths: u64,
    /// i32 `[sequences, heads]`: rows that belong to a list. 0: `capacity` for every list.
    pub capacities: u64,
    /// i32: original position of every entry, `[rows]`, or `[pages, page_size, heads]`. 0: not kept.
    pub positions: u64,
    /// Where the entries of a paged cache lie.
    pub pages: Pages,
    /// Rows of `k` and `v` where the cache is ragged.
    pub rows: i64,
    /// Entries that a list can have, at most.
    pub capacity: i32,
    /// Sequences in the batch.
    pub sequences: i32,
    /// kv heads.
    pub heads: i32,
    /// Always 0.
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Cache"][::core::mem::size_of::<Cache>() - 144usize];
    ["Alignment of Cache"][::core::mem::align_of::<Cache>() - 8usize];
    ["Offset of field: Cache::k"][::core::mem::offset_of!(Cache, k) - 0usize];
    ["Offset of field: Cache::v"][::core::mem::offset_of!(Cache, v) - 32usize];
    ["Offset of field: Cache::starts"][::core::mem::offset_of!(Cache, starts) - 64usize];
    [
        "Offset of field: Cache::lengths",
    ][::core::mem::offset_of!(Cache, lengths) - 72usize];
    [
        "Offset of field: Cache::capacities",
    ][::core::mem::offset_of!(Cache, capacities) - 80usize];
    [
        "Offset of field: Cache::positions",
    ][::core::mem::offset_of!(Cache, positions) - 88usize];
    ["Offset of field: Cache::pages"][::core::mem::offset_of!(Cache, pages) - 96usize];
    ["Offset of field: Cache::rows"][::core::mem::offset_of!(Cache, rows) - 120usize];
    [
        "Offset of field: Cache::capacity",
    ][::core::mem::offset_of!(Cache, capacity) - 128usize];
    [
        "Offset of field: Cache::sequences",
    ][::core::mem::offset_of!(Cache, sequences) - 132usize];
    ["Offset of field: Cache::heads"][::core::mem::offset_of!(Cache, heads) - 136usize];
    [
        "Offset of field: Cache::reserved",
    ][::core::mem::offset_of!(Cache, reserved) - 140usize];
};
/** Parameters of `fastkv_decode_*`: attention of the newest tokens of each sequence over its lists.

 Where `k_new` is given, the tokens' own keys and values are seen too and are appended to the lists,
 whose lengths grow; a list without room for all of them stays as it is, and `full` says so. Where it
 is 0 the last `tokens` entries of each list are the queries' own. A query sees the keys up to its
 own. A query that sees none has output 0 and LSE -inf.*/
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct DecodeParams {
    /// The lists; `lengths` and `positions` grow where something is appended.
    pub cache: Cache,
    /// Queries, `[sequence][query head][token][d]`.
    pub q: Rows,
    /// Keys of the new tokens, rotated, `[sequence][kv head][token][d]`. Base 0: nothing is appended.
    pub k_new: Rows,
    /// Values of the new tokens, as their keys.
    pub v_new: Rows,
    /// Receives the output, as the queries.
    pub out: Rows,
    /// i32 `[sequences, tokens]`: positions of the new tokens. 0 where none are kept.
    pub positions_new: u64,
    /// Receives the LSE of the queries; token i of sequence s is number `s * tokens + i` of a row. Base 0: none.
    pub lse: Lse,
    /// i32: set to 1 where a list had no room; left alone otherwise.
    pub full: u64,
    /// u32 words, a bit for each query head, lowest bit first: heads that are biased. 0: none.
    pub bias_heads: u64,
    /// u32 words, a bit for each position of a sequence, lowest bit first: keys that are biased.
    pub bias_keys: u64,
    /// Words of `bias_keys` from one sequence to the next.
    pub bias_key_stride: i64,
    /// f32 `[lists, query tiles, chunks, queries, d]`: what a chunk adds to an output.
    pub partials: u64,
    /// f32 `[lists, query tiles, chunks, queries, 2]`: maximum and sum of each row of a chunk.
    pub statistics: u64,
    /** i32 zeros, and zeros again afterwards: finished chunks of each (list, query tile), then finished blocks of the
 grid.*/
    pub finished: u64,
    /// Factor of the products of queries and keys.
    pub scale: f32,
    /// Added to the scaled product where the query head and the key's position are biased.
    pub bias: f32,
    /// Positions that have a bit in `bias_keys`; those behind are not biased.
    pub bias_positions: i32,
    /// Query heads of a kv head.
    pub group: i32,
    /// New tokens of each sequence.
    pub tokens: i32,
    /// Query rows of a list, `group * tokens`, in tiles of `queries`.
    pub query_tiles: i32,
    /// Rows of a query tile, 8 or 16.
    pub queries: i32,
    /// Chunks that a list can have, at most FASTKV_DECODE_CHUNKS.
    pub chunks: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of DecodeParams"][::core::mem::size_of::<DecodeParams>() - 408usize];
    ["Alignment of DecodeParams"][::core::mem::align_of::<DecodeParams>() - 8usize];
    [
        "Offset of field: DecodeParams::cache",
    ][::core::mem::offset_of!(DecodeParams, cache) - 0usize];
    [
        "Offset of field: DecodeParams::q",
    ][::core::mem::offset_of!(DecodeParams, q) - 144usize];
    [
        "Offset of field: DecodeParams::k_new",
    ][::core::mem::offset_of!(DecodeParams, k_new) - 176usize];
    [
        "Offset of field: DecodeParams::v_new",
    ][::core::mem::offset_of!(DecodeParams, v_new) - 208usize];
    [
        "Offset of field: DecodeParams::out",
    ][::core::mem::offset_of!(DecodeParams, out) - 240usize];
    [
        "Offset of field: DecodeParams::positions_new",
    ][::core::mem::offset_of!(DecodeParams, positions_new) - 272usize];
    [
        "Offset of field: DecodeParams::lse",
    ][::core::mem::offset_of!(DecodeParams, lse) - 280usize];
    [
        "Offset of field: DecodeParams::full",
    ][::core::mem::offset_of!(DecodeParams, full) - 320usize];
    [
        "Offset of field: DecodeParams::bias_heads",
    ][::core::mem::offset_of!(DecodeParams, bias_heads) - 328usize];
    [
        "Offset of field: DecodeParams::bias_keys",
    ][::core::mem::offset_of!(DecodeParams, bias_keys) - 336usize];
    [
        "Offset of field: DecodeParams::bias_key_stride",
    ][::core::mem::offset_of!(DecodeParams, bias_key_stride) - 344usize];
    [
        "Offset of field: DecodeParams::partials",
    ][::core::mem::offset_of!(DecodeParams, partials) - 352usize];
    [
        "Offset of field: DecodeParams::statistics",
    ][::core::mem::offset_of!(DecodeParams, statistics) - 360usize];
    [
        "Offset of field: DecodeParams::finished",
    ][::core::mem::offset_of!(DecodeParams, finished) - 368usize];
    [
        "Offset of field: DecodeParams::scale",
    ][::core::mem::offset_of!(DecodeParams, scale) - 376usize];
    [
        "Offset of field: DecodeParams::bias",
    ][::core::mem::offset_of!(DecodeParams, bias) - 380usize];
    [
        "Offset of field: DecodeParams::bias_positions",
    ][::core::mem::offset_of!(DecodeParams, bias_positions) - 384usize];
    [
        "Offset of field: DecodeParams::group",
    ][::core::mem::offset_of!(DecodeParams, group) - 388usize];
    [
        "Offset of field: DecodeParams::tokens",
    ][::core::mem::offset_of!(DecodeParams, tokens) - 392usize];
    [
        "Offset of field: DecodeParams::query_tiles",
    ][::core::mem::offset_of!(DecodeParams, query_tiles) - 396usize];
    [
        "Offset of field: DecodeParams::queries",
    ][::core::mem::offset_of!(DecodeParams, queries) - 400usize];
    [
        "Offset of field: DecodeParams::chunks",
    ][::core::mem::offset_of!(DecodeParams, chunks) - 404usize];
};
/** Parameters of `fastkv_compact`: entries of a cache moved to the front of their lists, in place.

 Indices ascend, so no row is overwritten before it was read. A list ends where it stops to ascend, or
 leaves the entries of the cache.*/
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct CompactParams {
    /// The lists.
    pub cache: Cache,
    /// i32: ascending indices of the entries kept, `index_capacity` of them for each list.
    pub indices: u64,
    /// Elements of `indices` from one sequence to the next.
    pub index_sequence_stride: i64,
    /// Elements of `indices` from one head to the next; 0 where all heads share one list.
    pub index_head_stride: i64,
    /// i32 `[sequences, heads]`: indices in use. 0: `index_capacity` for every list.
    pub kept: u64,
    /// Receives i32 `[sequences, heads]`: entries that were kept.
    pub lengths_out: u64,
    /// Room for indices in each list.
    pub index_capacity: i32,
    /// Bytes of a row: head size times element size.
    pub row_bytes: i32,
    /// Bytes of an element, the unit of the strides.
    pub element_bytes: i32,
    /// log2 of the lanes that share a row: the smallest power of two that covers it, at most 32.
    pub lane_shift: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of CompactParams"][::core::mem::size_of::<CompactParams>() - 200usize];
    ["Alignment of CompactParams"][::core::mem::align_of::<CompactParams>() - 8usize];
    [
        "Offset of field: CompactParams::cache",
    ][::core::mem::offset_of!(CompactParams, cache) - 0usize];
    [
        "Offset of field: CompactParams::indices",
    ][::core::mem::offset_of!(CompactParams, indices) - 144usize];
    [
        "Offset of field: CompactParams::index_sequence_stride",
    ][::core::mem::offset_of!(CompactParams, index_sequence_stride) - 152usize];
    [
        "Offset of field: CompactParams::index_head_stride",
    ][::core::mem::offset_of!(CompactParams, index_head_stride) - 160usize];
    [
        "Offset of field: CompactParams::kept",
    ][::core::mem::offset_of!(CompactParams, kept) - 168usize];
    [
        "Offset of field: CompactParams::lengths_out",
    ][::core::mem::offset_of!(CompactParams, lengths_out) - 176usize];
    [
        "Offset of field: CompactParams::index_capacity",
    ][::core::mem::offset_of!(CompactParams, index_capacity) - 184usize];
    [
        "Offset of field: CompactParams::row_bytes",
    ][::core::mem::offset_of!(CompactParams, row_bytes) - 188usize];
    [
        "Offset of field: CompactParams::element_bytes",
    ][::core::mem::offset_of!(CompactParams, element_bytes) - 192usize];
    [
        "Offset of field: CompactParams::lane_shift",
    ][::core::mem::offset_of!(CompactParams, lane_shift) - 196usize];
};
/// Where rows of a destination go that is paged, one by one.
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct Slots {
    /// i64 `[out_rows]`: slot of each row, counted over all pages; -1 skips the row. 0: rows are dense.
    pub slots: u64,
    /// Elements from one page to the next.
    pub page_stride: i64,
    /// Elements from one head to the next; 0 where a page belongs to one head.
    pub head_stride: i64,
    /// Elements from one slot of a page to the next.
    pub slot_stride: i64,
    /// Pages of the destination.
    pub pages: i32,
    /// Slots of a page.
    pub page_size: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Slots"][::core::mem::size_of::<Slots>() - 40usize];
    ["Alignment of Slots"][::core::mem::align_of::<Slots>() - 8usize];
    ["Offset of field: Slots::slots"][::core::mem::offset_of!(Slots, slots) - 0usize];
    [
        "Offset of field: Slots::page_stride",
    ][::core::mem::offset_of!(Slots, page_stride) - 8usize];
    [
        "Offset of field: Slots::head_stride",
    ][::core::mem::offset_of!(Slots, head_stride) - 16usize];
    [
        "Offset of field: Slots::slot_stride",
    ][::core::mem::offset_of!(Slots, slot_stride) - 24usize];
    ["Offset of field: Slots::pages"][::core::mem::offset_of!(Slots, pages) - 32usize];
    [
        "Offset of field: Slots::page_size",
    ][::core::mem::offset_of!(Slots, page_size) - 36usize];
};
/// Parameters of `fastkv_gather_kv`: the kept rows of K and of V, moved to ragged or paged caches.
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct GatherKvParams {
    /// Which rows, for each (sequence, kv head).
    pub kept: Kept,
    /// K, rows of `row_bytes`; where it is paged `sequence_stride` leads from page to page.
    pub k: Rows,
    /// V, rows of `row_bytes`, as K.
    pub v: Rows,
    /// Where the tokens of paged sources lie.
    pub pages: Pages,
    /// Where the rows of paged destinations go.
    pub slots: Slots,
    /// Receives rows of K: `[out_rows, d]`, dense, or the first page.
    pub k_out: u64,
    /// Receives rows of V, as K.
    pub v_out: u64,
    /// Bytes of a row: head size times element size.
    pub row_bytes: i32,
    /// Bytes of an element, the unit of the strides.
    pub element_bytes: i32,
    /// log2 of the lanes that share a row: the smallest power of two that covers it, at most 32.
    pub lane_shift: i32,
    /// Always 0.
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of GatherKvParams"][::core::mem::size_of::<GatherKvParams>() - 248usize];
    ["Alignment of GatherKvParams"][::core::mem::align_of::<GatherKvParams>() - 8usize];
    [
        "Offset of field: GatherKvParams::kept",
    ][::core::mem::offset_of!(GatherKvParams, kept) - 0usize];
    [
        "Offset of field: GatherKvParams::k",
    ][::core::mem::offset_of!(GatherKvParams, k) - 88usize];
    [
        "Offset of field: GatherKvParams::v",
    ][::core::mem::offset_of!(GatherKvParams, v) - 120usize];
    [
        "Offset of field: GatherKvParams::pages",
    ][::core::mem::offset_of!(GatherKvParams, pages) - 152usize];
    [
        "Offset of field: GatherKvParams::slots",
    ][::core::mem::offset_of!(GatherKvParams, slots) - 176usize];
    [
        "Offset of field: GatherKvParams::k_out",
    ][::core::mem::offset_of!(GatherKvParams, k_out) - 216usize];
    [
        "Offset of field: GatherKvParams::v_out",
    ][::core::mem::offset_of!(GatherKvParams, v_out) - 224usize];
    [
        "Offset of field: GatherKvParams::row_bytes",
    ][::core::mem::offset_of!(GatherKvParams, row_bytes) - 232usize];
    [
        "Offset of field: GatherKvParams::element_bytes",
    ][::core::mem::offset_of!(GatherKvParams, element_bytes) - 236usize];
    [
        "Offset of field: GatherKvParams::lane_shift",
    ][::core::mem::offset_of!(GatherKvParams, lane_shift) - 240usize];
    [
        "Offset of field: GatherKvParams::reserved",
    ][::core::mem::offset_of!(GatherKvParams, reserved) - 244usize];
};
/// Parameters of `fastkv_gather_rows`: whole rows of hidden states, moved to a dense tensor.
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct GatherRowsParams {
    /// Which rows, for each sequence; `heads` is 1.
    pub kept: Kept,
    /// Hidden states `[tokens, row]`; `head_stride` is not used.
    pub rows: Rows,
    /// Receives the rows, `[out_rows, row]`, dense.
    pub out: u64,
    /// Bytes of a row: hidden size times element size.
    pub row_bytes: i32,
    /// Bytes of an element, the unit of the strides.
    pub element_bytes: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of GatherRowsParams"][::core::mem::size_of::<GatherRowsParams>() - 136usize];
    [
        "Alignment of GatherRowsParams",
    ][::core::mem::align_of::<GatherRowsParams>() - 8usize];
    [
        "Offset of field: GatherRowsParams::kept",
    ][::core::mem::offset_of!(GatherRowsParams, kept) - 0usize];
    [
        "Offset of field: GatherRowsParams::rows",
    ][::core::mem::offset_of!(GatherRowsParams, rows) - 88usize];
    [
        "Offset of field: GatherRowsParams::out",
    ][::core::mem::offset_of!(GatherRowsParams, out) - 120usize];
    [
        "Offset of field: GatherRowsParams::row_bytes",
    ][::core::mem::offset_of!(GatherRowsParams, row_bytes) - 128usize];
    [
        "Offset of field: GatherRowsParams::element_bytes",
    ][::core::mem::offset_of!(GatherRowsParams, element_bytes) - 132usize];
};
/// Element types, as the `dtype` fields of parameter structs name them: IEEE half precision.
pub const DTYPE_F16: i32 = 0;
/// bfloat16.
pub const DTYPE_BF16: i32 = 1;
/// IEEE single precision.
pub const DTYPE_F32: i32 = 2;
/// Elements that a thread of the llama kernels moves at once, of any type; widths are multiples of it.
pub const PIECE: i32 = 8;
/// Threads of a block of `fastkv_add`, `fastkv_convert`, `fastkv_rope` and `fastkv_silu_mul`.
pub const LLAMA_THREADS: i32 = 256;
/// Most threads of a block of `fastkv_rms_norm`.
pub const NORM_THREADS: i32 = 512;
/// Most pieces of a row that each thread of `fastkv_rms_norm` holds.
pub const NORM_PIECES: i32 = 4;
/// Tokens of a block of `fastkv_rope`.
pub const ROPE_TOKENS: i32 = 4;
/// The largest head that `fastkv_rope` turns.
pub const ROPE_HEAD_DIM: i32 = 256;
/// Threads of a block of `fastkv_sample`.
pub const SAMPLE_THREADS: i32 = 1024;
/// Parameters of `fastkv_add`: `x += y`, each sum rounded once.
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct AddParams {
    /// `[rows, width]`; `sequence_stride` and `head_stride` are not used, here and below.
    pub x: Rows,
    /// Of the same shape.
    pub y: Rows,
    /// Elements of a row.
    pub width: i32,
    /// Element type of `x`.
    pub x_dtype: i32,
    /// Element type of `y`.
    pub y_dtype: i32,
    /// Always 0.
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AddParams"][::core::mem::size_of::<AddParams>() - 80usize];
    ["Alignment of AddParams"][::core::mem::align_of::<AddParams>() - 8usize];
    ["Offset of field: AddParams::x"][::core::mem::offset_of!(AddParams, x) - 0usize];
    ["Offset of field: AddParams::y"][::core::mem::offset_of!(AddParams, y) - 32usize];
    [
        "Offset of field: AddParams::width",
    ][::core::mem::offset_of!(AddParams, width) - 64usize];
    [
        "Offset of field: AddParams::x_dtype",
    ][::core::mem::offset_of!(AddParams, x_dtype) - 68usize];
    [
        "Offset of field: AddParams::y_dtype",
    ][::core::mem::offset_of!(AddParams, y_dtype) - 72usize];
    [
        "Offset of field: AddParams::reserved",
    ][::core::mem::offset_of!(AddParams, reserved) - 76usize];
};
/// Parameters of `fastkv_convert`: `out = x` in another element type.
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct ConvertParams {
    /// `[rows, width]`.
    pub x: Rows,
    /// Of the same shape.
    pub out: Rows,
    /// Elements of a row.
    pub width: i32,
    /// Element type of `x`.
    pub x_dtype: i32,
    /// Element type of `out`.
    pub out_dtype: i32,
    /// Always 0.
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ConvertParams"][::core::mem::size_of::<ConvertParams>() - 80usize];
    ["Alignment of ConvertParams"][::core::mem::align_of::<ConvertParams>() - 8usize];
    [
        "Offset of field: ConvertParams::x",
    ][::core::mem::offset_of!(ConvertParams, x) - 0usize];
    [
        "Offset of field: ConvertParams::out",
    ][::core::mem::offset_of!(ConvertParams, out) - 32usize];
    [
        "Offset of field: ConvertParams::width",
    ][::core::mem::offset_of!(ConvertParams, width) - 64usize];
    [
        "Offset of field: ConvertParams::x_dtype",
    ][::core::mem::offset_of!(ConvertParams, x_dtype) - 68usize];
    [
        "Offset of field: ConvertParams::out_dtype",
    ][::core::mem::offset_of!(ConvertParams, out_dtype) - 72usize];
    [
        "Offset of field: ConvertParams::reserved",
    ][::core::mem::offset_of!(ConvertParams, reserved) - 76usize];
};
/// Parameters of `fastkv_embed`: rows of an embedding table.
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct EmbedParams {
    /// `[vocabulary, width]`, dense.
    pub table: u64,
    /// i32 `[rows]`: row of the table for each row of `out`. One outside the table gives zeros.
    pub ids: u64,
    /// Receives the rows, `[rows, width]`, dense.
    pub out: u64,
    /** i32: becomes the largest i + 1 of an `ids[i]` outside the table, if that is more than it holds.
 0: not wanted.*/
    pub fault: u64,
    /// Rows of the table.
    pub vocabulary: i32,
    /// Elements of a row.
    pub width: i32,
    /// Element type of the table.
    pub table_dtype: i32,
    /// Element type of `out`.
    pub out_dtype: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of EmbedParams"][::core::mem::size_of::<EmbedParams>() - 48usize];
    ["Alignment of EmbedParams"][::core::mem::align_of::<EmbedParams>() - 8usize];
    [
        "Offset of field: EmbedParams::table",
    ][::core::mem::offset_of!(EmbedParams, table) - 0usize];
    [
        "Offset of field: EmbedParams::ids",
    ][::core::mem::offset_of!(EmbedParams, ids) - 8usize];
    [
        "Offset of field: EmbedParams::out",
    ][::core::mem::offset_of!(EmbedParams, out) - 16usize];
    [
        "Offset of field: EmbedParams::fault",
    ][::core::mem::offset_of!(EmbedParams, fault) - 24usize];
    [
        "Offset of field: EmbedParams::vocabulary",
    ][::core::mem::offset_of!(EmbedParams, vocabulary) - 32usize];
    [
        "Offset of field: EmbedParams::width",
    ][::core::mem::offset_of!(EmbedParams, width) - 36usize];
    [
        "Offset of field: EmbedParams::table_dtype",
    ][::core::mem::offset_of!(EmbedParams, table_dtype) - 40usize];
    [
        "Offset of field: EmbedParams::out_dtype",
    ][::core::mem::offset_of!(EmbedParams, out_dtype) - 44usize];
};
/** Parameters of `fastkv_rms_norm`: `out = x / sqrt(mean(x^2) + epsilon) * weight`, of `x += added`
 where something is to be added first.*/
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct RmsNormParams {
    /// `[rows, width]`; written where `added` is there, its sums rounded once.
    pub x: Rows,
    /// `[rows, width]` of `dtype`; base 0: nothing to add.
    pub added: Rows,
    /// Receives the normed rows, `[rows, width]` of `dtype`.
    pub out: Rows,
    /// `[width]` of `dtype`.
    pub weight: u64,
    /// Elements of a row.
    pub width: i32,
    /// Element type of `x`.
    pub x_dtype: i32,
    /// Element type of all else.
    pub dtype: i32,
    /// What keeps a row of zeros from a division by zero.
    pub epsilon: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RmsNormParams"][::core::mem::size_of::<RmsNormParams>() - 120usize];
    ["Alignment of RmsNormParams"][::core::mem::align_of::<RmsNormParams>() - 8usize];
    [
        "Offset of field: RmsNormParams::x",
    ][::core::mem::offset_of!(RmsNormParams, x) - 0usize];
    [
        "Offset of field: RmsNormParams::added",
    ][::core::mem::offset_of!(RmsNormParams, added) - 32usize];
    [
        "Offset of field: RmsNormParams::out",
    ][::core::mem::offset_of!(RmsNormParams, out) - 64usize];
    [
        "Offset of field: RmsNormParams::weight",
    ][::core::mem::offset_of!(RmsNormParams, weight) - 96usize];
    [
        "Offset of field: RmsNormParams::width",
    ][::core::mem::offset_of!(RmsNormParams, width) - 104usize];
    [
        "Offset of field: RmsNormParams::x_dtype",
    ][::core::mem::offset_of!(RmsNormParams, x_dtype) - 108usize];
    [
        "Offset of field: RmsNormParams::dtype",
    ][::core::mem::offset_of!(RmsNormParams, dtype) - 112usize];
    [
        "Offset of field: RmsNormParams::epsilon",
    ][::core::mem::offset_of!(RmsNormParams, epsilon) - 116usize];
};
/** Parameters of `fastkv_rope`: rotates heads of Q and K, pairs (i, i + d/2) by
 `position * inverse_frequencies[i]`, and appends K and V to a ragged cache.

 Token i of a sequence goes to row `starts + lengths + i` of each kv head. Rows outside `[0, out_rows)`
 are dropped, and so are those of a negative start or length.*/
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct RopeParams {
    /// Queries `[sequence][query head][token][d]`.
    pub q: Rows,
    /// Receives them rotated; may be `q` itself.
    pub q_out: Rows,
    /// Keys `[sequence][kv head][token][d]`.
    pub k: Rows,
    /// Values, of the same shape.
    pub v: Rows,
    /// Receives rotated keys, `[out_rows, d]`, dense.
    pub k_out: u64,
    /// Receives values, `[out_rows, d]`, dense.
    pub v_out: u64,
    /// i64 `[sequences, kv_heads]`: first row of each cache.
    pub starts: u64,
    /// i32 `[sequences, kv_heads]`: entries in each cache so far. 0: none.
    pub lengths: u64,
    /// i32 `[sequences, kv_heads]`: receives the lengths with the new entries; not `lengths`. 0: not wanted.
    pub lengths_out: u64,
    /// i32 `[out_rows]`: receives the position of every row appended. 0: not wanted.
    pub positions_out: u64,
    /// i32 `[sequences, tokens]`, or `[total_tokens]` where sequences are packed.
    pub positions: u64,
    /// f32 `[d / 2]`. 0: nothing is turned; keys are appended as they are.
    pub inverse_frequencies: u64,
    /// i32 `[sequences + 1]`: first token of each sequence on a packed token axis. 0: not packed.
    pub cu_seqlens: u64,
    /// Rows that the caches hold together.
    pub out_rows: i64,
    /// Sequences in the batch.
    pub sequences: i32,
    /// Tokens of each sequence; where they are packed, no sequence has more.
    pub tokens: i32,
    /// Tokens of all sequences where they are packed.
    pub total_tokens: i32,
    /// Heads of Q; may be 0.
    pub query_heads: i32,
    /// Heads of K and of V; 0: nothing is appended.
    pub kv_heads: i32,
    /// d.
    pub head_dim: i32,
    /// Element type of all tensors.
    pub dtype: i32,
    /// Always 0.
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RopeParams"][::core::mem::size_of::<RopeParams>() - 240usize];
    ["Alignment of RopeParams"][::core::mem::align_of::<RopeParams>() - 8usize];
    ["Offset of field: RopeParams::q"][::core::mem::offset_of!(RopeParams, q) - 0usize];
    [
        "Offset of field: RopeParams::q_out",
    ][::core::mem::offset_of!(RopeParams, q_out) - 32usize];
    ["Offset of field: RopeParams::k"][::core::mem::offset_of!(RopeParams, k) - 64usize];
    ["Offset of field: RopeParams::v"][::core::mem::offset_of!(RopeParams, v) - 96usize];
    [
        "Offset of field: RopeParams::k_out",
    ][::core::mem::offset_of!(RopeParams, k_out) - 128usize];
    [
        "Offset of field: RopeParams::v_out",
    ][::core::mem::offset_of!(RopeParams, v_out) - 136usize];
    [
        "Offset of field: RopeParams::starts",
    ][::core::mem::offset_of!(RopeParams, starts) - 144usize];
    [
        "Offset of field: RopeParams::lengths",
    ][::core::mem::offset_of!(RopeParams, lengths) - 152usize];
    [
        "Offset of field: RopeParams::lengths_out",
    ][::core::mem::offset_of!(RopeParams, lengths_out) - 160usize];
    [
        "Offset of field: RopeParams::positions_out",
    ][::core::mem::offset_of!(RopeParams, positions_out) - 168usize];
    [
        "Offset of field: RopeParams::positions",
    ][::core::mem::offset_of!(RopeParams, positions) - 176usize];
    [
        "Offset of field: RopeParams::inverse_frequencies",
    ][::core::mem::offset_of!(RopeParams, inverse_frequencies) - 184usize];
    [
        "Offset of field: RopeParams::cu_seqlens",
    ][::core::mem::offset_of!(RopeParams, cu_seqlens) - 192usize];
    [
        "Offset of field: RopeParams::out_rows",
    ][::core::mem::offset_of!(RopeParams, out_rows) - 200usize];
    [
        "Offset of field: RopeParams::sequences",
    ][::core::mem::offset_of!(RopeParams, sequences) - 208usize];
    [
        "Offset of field: RopeParams::tokens",
    ][::core::mem::offset_of!(RopeParams, tokens) - 212usize];
    [
        "Offset of field: RopeParams::total_tokens",
    ][::core::mem::offset_of!(RopeParams, total_tokens) - 216usize];
    [
        "Offset of field: RopeParams::query_heads",
    ][::core::mem::offset_of!(RopeParams, query_heads) - 220usize];
    [
        "Offset of field: RopeParams::kv_heads",
    ][::core::mem::offset_of!(RopeParams, kv_heads) - 224usize];
    [
        "Offset of field: RopeParams::head_dim",
    ][::core::mem::offset_of!(RopeParams, head_dim) - 228usize];
    [
        "Offset of field: RopeParams::dtype",
    ][::core::mem::offset_of!(RopeParams, dtype) - 232usize];
    [
        "Offset of field: RopeParams::reserved",
    ][::core::mem::offset_of!(RopeParams, reserved) - 236usize];
};
/// How the next token of a row is drawn.
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Draw {
    /// Softmax temperature; 0 or less, or NaN, takes the most likely token.
    pub temperature: f32,
    /// Only the fewest most likely tokens whose probabilities sum up to it; 1 or more for all.
    pub top_p: f32,
    /// Uniform random number in [0, 1).
    pub uniform: f32,
    /// Only so many of the most likely tokens; 0 or less for all. Comes before `top_p`.
    pub top_k: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of Draw"][::core::mem::size_of::<Draw>() - 16usize];
    ["Alignment of Draw"][::core::mem::align_of::<Draw>() - 4usize];
    [
        "Offset of field: Draw::temperature",
    ][::core::mem::offset_of!(Draw, temperature) - 0usize];
    ["Offset of field: Draw::top_p"][::core::mem::offset_of!(Draw, top_p) - 4usize];
    ["Offset of field: Draw::uniform"][::core::mem::offset_of!(Draw, uniform) - 8usize];
    ["Offset of field: Draw::top_k"][::core::mem::offset_of!(Draw, top_k) - 12usize];
};
/// Parameters of `fastkv_sample`: a token for each row of logits.
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct SampleParams {
    /// `[rows, vocabulary]`.
    pub logits: Rows,
    /// `fastkv_draw` for each row. 0: the most likely token of every row.
    pub draws: u64,
    /// i32 `[rows]`: receives the tokens; -1 where every logit is NaN.
    pub tokens: u64,
    /// Logits of a row.
    pub vocabulary: i32,
    /// Element type of the logits.
    pub dtype: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SampleParams"][::core::mem::size_of::<SampleParams>() - 56usize];
    ["Alignment of SampleParams"][::core::mem::align_of::<SampleParams>() - 8usize];
    [
        "Offset of field: SampleParams::logits",
    ][::core::mem::offset_of!(SampleParams, logits) - 0usize];
    [
        "Offset of field: SampleParams::draws",
    ][::core::mem::offset_of!(SampleParams, draws) - 32usize];
    [
        "Offset of field: SampleParams::tokens",
    ][::core::mem::offset_of!(SampleParams, tokens) - 40usize];
    [
        "Offset of field: SampleParams::vocabulary",
    ][::core::mem::offset_of!(SampleParams, vocabulary) - 48usize];
    [
        "Offset of field: SampleParams::dtype",
    ][::core::mem::offset_of!(SampleParams, dtype) - 52usize];
};
/// Parameters of `fastkv_silu_mul`: `out = gate / (1 + exp(-gate)) * up`.
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct SiluMulParams {
    /// `[rows, width]`.
    pub gate: Rows,
    /// Of the same shape.
    pub up: Rows,
    /// Receives the products; may be `gate` or `up` itself.
    pub out: Rows,
    /// Elements of a row.
    pub width: i32,
    /// Element type of all three.
    pub dtype: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SiluMulParams"][::core::mem::size_of::<SiluMulParams>() - 104usize];
    ["Alignment of SiluMulParams"][::core::mem::align_of::<SiluMulParams>() - 8usize];
    [
        "Offset of field: SiluMulParams::gate",
    ][::core::mem::offset_of!(SiluMulParams, gate) - 0usize];
    [
        "Offset of field: SiluMulParams::up",
    ][::core::mem::offset_of!(SiluMulParams, up) - 32usize];
    [
        "Offset of field: SiluMulParams::out",
    ][::core::mem::offset_of!(SiluMulParams, out) - 64usize];
    [
        "Offset of field: SiluMulParams::width",
    ][::core::mem::offset_of!(SiluMulParams, width) - 96usize];
    [
        "Offset of field: SiluMulParams::dtype",
    ][::core::mem::offset_of!(SiluMulParams, dtype) - 100usize];
};
/** Parameters of `fastkv_window_scores_*`: the softmax probabilities of each sequence's last queries,
 summed per key. Where there is no LSE, `fastkv_window_partials_*` and `fastkv_window_lse`, which take
 the same parameters, make one of the window before.

 Query i of a sequence sees keys `0..=positions[i]` of it. Lengths are clipped to what is described here.*/
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct WindowScoresParams {
    /// Queries, `[sequence][query head][token][d]`.
    pub q: Rows,
    /// Keys, `[sequence][kv head][token][d]`, or `[page][kv head][slot][d]` where they lie in pages.
    pub k: Rows,
    /// Where keys in pages lie; a key without a page is seen by nobody. Table 0: there are no pages.
    pub pages: Pages,
    /// i32 `[sequences + 1]`: first query of each sequence on the token axis. 0: `q_tokens` each.
    pub cu_seqlens_q: u64,
    /// i32 `[sequences + 1]`: first key of each sequence on the token axis. 0: `k_tokens` each. Pages: 0.
    pub cu_seqlens_k: u64,
    /// i32 `[sequences]`: keys of each sequence, at most those described above. 0: as many.
    pub k_lengths: u64,
    /** i32, one for each query, sequence after sequence: the last key that it sees, within its sequence,
 in any order; below 0 it sees none. 0: the queries are the last of the keys.*/
    pub positions: u64,
    /** Of all queries; -inf, or +inf: the query has no probabilities. With `partials` of the queries of each
 window alone, which `fastkv_window_lse` writes.*/
    pub lse: Lse,
    /// u32 words, a bit for each query head, lowest bit first: heads that are biased. 0: none.
    pub bias_heads: u64,
    /// u32 words, a bit for each key of a sequence, lowest bit first: keys that are biased. 0: none.
    pub bias_keys: u64,
    /// Words of `bias_keys` from one sequence to the next.
    pub bias_key_stride: i64,
    /// Receives f32 `[sequence][score head][key]`; what lies behind a sequence's keys stays as it is.
    pub scores: u64,
    /// Elements of `scores` from one sequence to the next.
    pub score_sequence_stride: i64,
    /// Elements of `scores` from one head to the next.
    pub score_head_stride: i64,
    /** f32 pairs `[sequence][kv head][FASTKV_PARTIAL_KEYS keys][partial_columns]`: largest logit, in powers
 of two, and sum of exponentials relative to it. 0: `lse` is the caller's.*/
    pub partials: u64,
    /// Factor of the products of queries and keys.
    pub scale: f32,
    /// Added to the scaled product where the query head and the key are biased.
    pub bias: f32,
    /// Sequences in the batch.
    pub sequences: i32,
    /// Query heads, a multiple of `kv_heads`.
    pub query_heads: i32,
    /// Heads of keys.
    pub kv_heads: i32,
    /// Queries of each sequence, or of all together where `cu_seqlens_q` packs them.
    pub q_tokens: i32,
    /// Keys of each sequence, or of all together where `cu_seqlens_k` packs them.
    pub k_tokens: i32,
    /// Queries of the longest sequence, or more.
    pub max_q_tokens: i32,
    /// Keys of the longest sequence, or more.
    pub max_k_tokens: i32,
    /// Last queries of each sequence whose probabilities are summed; all where there are fewer.
    pub window: i32,
    /// `query_heads`, or `kv_heads` where scores are summed over the GQA group.
    pub score_heads: i32,
    /// Keys of a block of `fastkv_window_scores_*`, a multiple of 32.
    pub block_keys: i32,
    /// Room for queries in shared memory, in slots of 64; two or more.
    pub slots: i32,
    /// Queries of a group's heads, each head's window padded to a multiple of 8.
    pub partial_columns: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    [
        "Size of WindowScoresParams",
    ][::core::mem::size_of::<WindowScoresParams>() - 272usize];
    [
        "Alignment of WindowScoresParams",
    ][::core::mem::align_of::<WindowScoresParams>() - 8usize];
    [
        "Offset of field: WindowScoresParams::q",
    ][::core::mem::offset_of!(WindowScoresParams, q) - 0usize];
    [
        "Offset of field: WindowScoresParams::k",
    ][::core::mem::offset_of!(WindowScoresParams, k) - 32usize];
    [
        "Offset of field: WindowScoresParams::pages",
    ][::core::mem::offset_of!(WindowScoresParams, pages) - 64usize];
    [
        "Offset of field: WindowScoresParams::cu_seqlens_q",
    ][::core::mem::offset_of!(WindowScoresParams, cu_seqlens_q) - 88usize];
    [
        "Offset of field: WindowScoresParams::cu_seqlens_k",
    ][::core::mem::offset_of!(WindowScoresParams, cu_seqlens_k) - 96usize];
    [
        "Offset of field: WindowScoresParams::k_lengths",
    ][::core::mem::offset_of!(WindowScoresParams, k_lengths) - 104usize];
    [
        "Offset of field: WindowScoresParams::positions",
    ][::core::mem::offset_of!(WindowScoresParams, positions) - 112usize];
    [
        "Offset of field: WindowScoresParams::lse",
    ][::core::mem::offset_of!(WindowScoresParams, lse) - 120usize];
    [
        "Offset of field: WindowScoresParams::bias_heads",
    ][::core::mem::offset_of!(WindowScoresParams, bias_heads) - 160usize];
    [
        "Offset of field: WindowScoresParams::bias_keys",
    ][::core::mem::offset_of!(WindowScoresParams, bias_keys) - 168usize];
    [
        "Offset of field: WindowScoresParams::bias_key_stride",
    ][::core::mem::offset_of!(WindowScoresParams, bias_key_stride) - 176usize];
    [
        "Offset of field: WindowScoresParams::scores",
    ][::core::mem::offset_of!(WindowScoresParams, scores) - 184usize];
    [
        "Offset of field: WindowScoresParams::score_sequence_stride",
    ][::core::mem::offset_of!(WindowScoresParams, score_sequence_stride) - 192usize];
    [
        "Offset of field: WindowScoresParams::score_head_stride",
    ][::core::mem::offset_of!(WindowScoresParams, score_head_stride) - 200usize];
    [
        "Offset of field: WindowScoresParams::partials",
    ][::core::mem::offset_of!(WindowScoresParams, partials) - 208usize];
    [
        "Offset of field: WindowScoresParams::scale",
    ][::core::mem::offset_of!(WindowScoresParams, scale) - 216usize];
    [
        "Offset of field: WindowScoresParams::bias",
    ][::core::mem::offset_of!(WindowScoresParams, bias) - 220usize];
    [
        "Offset of field: WindowScoresParams::sequences",
    ][::core::mem::offset_of!(WindowScoresParams, sequences) - 224usize];
    [
        "Offset of field: WindowScoresParams::query_heads",
    ][::core::mem::offset_of!(WindowScoresParams, query_heads) - 228usize];
    [
        "Offset of field: WindowScoresParams::kv_heads",
    ][::core::mem::offset_of!(WindowScoresParams, kv_heads) - 232usize];
    [
        "Offset of field: WindowScoresParams::q_tokens",
    ][::core::mem::offset_of!(WindowScoresParams, q_tokens) - 236usize];
    [
        "Offset of field: WindowScoresParams::k_tokens",
    ][::core::mem::offset_of!(WindowScoresParams, k_tokens) - 240usize];
    [
        "Offset of field: WindowScoresParams::max_q_tokens",
    ][::core::mem::offset_of!(WindowScoresParams, max_q_tokens) - 244usize];
    [
        "Offset of field: WindowScoresParams::max_k_tokens",
    ][::core::mem::offset_of!(WindowScoresParams, max_k_tokens) - 248usize];
    [
        "Offset of field: WindowScoresParams::window",
    ][::core::mem::offset_of!(WindowScoresParams, window) - 252usize];
    [
        "Offset of field: WindowScoresParams::score_heads",
    ][::core::mem::offset_of!(WindowScoresParams, score_heads) - 256usize];
    [
        "Offset of field: WindowScoresParams::block_keys",
    ][::core::mem::offset_of!(WindowScoresParams, block_keys) - 260usize];
    [
        "Offset of field: WindowScoresParams::slots",
    ][::core::mem::offset_of!(WindowScoresParams, slots) - 264usize];
    [
        "Offset of field: WindowScoresParams::partial_columns",
    ][::core::mem::offset_of!(WindowScoresParams, partial_columns) - 268usize];
};
/** Parameters of `fastkv_column_sums_*`: probabilities of all queries, which are the last of the keys, summed
 with weights over the queries and the GQA group.*/
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct ColumnSumsParams {
    /** What to sum: `window` holds all queries, `score_heads` is `kv_heads`, `lse` is the caller's, and
 `positions` and `partials` are 0.*/
    pub sums: WindowScoresParams,
    /// What the first query of a sequence counts.
    pub weight: f32,
    /// What each next one counts more.
    pub step: f32,
    /// Keys that a query counts on, its own and those before it; 0 to 2^30.
    pub band: i32,
    /// Always 0.
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ColumnSumsParams"][::core::mem::size_of::<ColumnSumsParams>() - 288usize];
    [
        "Alignment of ColumnSumsParams",
    ][::core::mem::align_of::<ColumnSumsParams>() - 8usize];
    [
        "Offset of field: ColumnSumsParams::sums",
    ][::core::mem::offset_of!(ColumnSumsParams, sums) - 0usize];
    [
        "Offset of field: ColumnSumsParams::weight",
    ][::core::mem::offset_of!(ColumnSumsParams, weight) - 272usize];
    [
        "Offset of field: ColumnSumsParams::step",
    ][::core::mem::offset_of!(ColumnSumsParams, step) - 276usize];
    [
        "Offset of field: ColumnSumsParams::band",
    ][::core::mem::offset_of!(ColumnSumsParams, band) - 280usize];
    [
        "Offset of field: ColumnSumsParams::reserved",
    ][::core::mem::offset_of!(ColumnSumsParams, reserved) - 284usize];
};
/// Scores of keys, f32 `[head][key]`.
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct ScoreTable {
    /// The first.
    pub base: u64,
    /// Elements from one head to the next.
    pub head_stride: i64,
    /// Keys of each head.
    pub keys: i32,
    /// Always 0.
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ScoreTable"][::core::mem::size_of::<ScoreTable>() - 24usize];
    ["Alignment of ScoreTable"][::core::mem::align_of::<ScoreTable>() - 8usize];
    [
        "Offset of field: ScoreTable::base",
    ][::core::mem::offset_of!(ScoreTable, base) - 0usize];
    [
        "Offset of field: ScoreTable::head_stride",
    ][::core::mem::offset_of!(ScoreTable, head_stride) - 8usize];
    [
        "Offset of field: ScoreTable::keys",
    ][::core::mem::offset_of!(ScoreTable, keys) - 16usize];
    [
        "Offset of field: ScoreTable::reserved",
    ][::core::mem::offset_of!(ScoreTable, reserved) - 20usize];
};
/// Parameters of `fastkv_add_scores`: `out = a + b`, where keys that one lacks count 0.
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct AddScoresParams {
    /// One summand.
    pub a: ScoreTable,
    /// The other.
    pub b: ScoreTable,
    /// Receives the sums.
    pub out: ScoreTable,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AddScoresParams"][::core::mem::size_of::<AddScoresParams>() - 72usize];
    [
        "Alignment of AddScoresParams",
    ][::core::mem::align_of::<AddScoresParams>() - 8usize];
    [
        "Offset of field: AddScoresParams::a",
    ][::core::mem::offset_of!(AddScoresParams, a) - 0usize];
    [
        "Offset of field: AddScoresParams::b",
    ][::core::mem::offset_of!(AddScoresParams, b) - 24usize];
    [
        "Offset of field: AddScoresParams::out",
    ][::core::mem::offset_of!(AddScoresParams, out) - 48usize];
};
/// Parameters of `fastkv_gather_scores`: `out[i] = scores[entries[i]]` for each head.
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct GatherScoresParams {
    /// What is gathered; an entry outside it, -1 by convention, gives 0.
    pub scores: ScoreTable,
    /// Receives the scores.
    pub out: ScoreTable,
    /// i32, `out.keys` keys for each head.
    pub entries: u64,
    /// Elements of `entries` from one head to the next.
    pub entry_stride: i64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    [
        "Size of GatherScoresParams",
    ][::core::mem::size_of::<GatherScoresParams>() - 64usize];
    [
        "Alignment of GatherScoresParams",
    ][::core::mem::align_of::<GatherScoresParams>() - 8usize];
    [
        "Offset of field: GatherScoresParams::scores",
    ][::core::mem::offset_of!(GatherScoresParams, scores) - 0usize];
    [
        "Offset of field: GatherScoresParams::out",
    ][::core::mem::offset_of!(GatherScoresParams, out) - 24usize];
    [
        "Offset of field: GatherScoresParams::entries",
    ][::core::mem::offset_of!(GatherScoresParams, entries) - 48usize];
    [
        "Offset of field: GatherScoresParams::entry_stride",
    ][::core::mem::offset_of!(GatherScoresParams, entry_stride) - 56usize];
};
/** Parameters of `fastkv_raise_scores`: `scores[head][key] = +inf` for every head, where the position of the key
 has a bit that is not set: what a bias of the same bits leaves alone.*/
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct RaiseScoresParams {
    /// Scores of all heads.
    pub scores: ScoreTable,
    /// i32, a position for each key.
    pub positions: u64,
    /// u32 words, a bit for each of `marked_positions` positions, lowest bit first.
    pub marked: u64,
    /// Positions that have a bit; no key at a later one is raised.
    pub marked_positions: i32,
    /// Always 0.
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RaiseScoresParams"][::core::mem::size_of::<RaiseScoresParams>() - 48usize];
    [
        "Alignment of RaiseScoresParams",
    ][::core::mem::align_of::<RaiseScoresParams>() - 8usize];
    [
        "Offset of field: RaiseScoresParams::scores",
    ][::core::mem::offset_of!(RaiseScoresParams, scores) - 0usize];
    [
        "Offset of field: RaiseScoresParams::positions",
    ][::core::mem::offset_of!(RaiseScoresParams, positions) - 24usize];
    [
        "Offset of field: RaiseScoresParams::marked",
    ][::core::mem::offset_of!(RaiseScoresParams, marked) - 32usize];
    [
        "Offset of field: RaiseScoresParams::marked_positions",
    ][::core::mem::offset_of!(RaiseScoresParams, marked_positions) - 40usize];
    [
        "Offset of field: RaiseScoresParams::reserved",
    ][::core::mem::offset_of!(RaiseScoresParams, reserved) - 44usize];
};
/** Parameters of `fastkv_share_keys`: how many keys each head keeps where all share a number of them, and where its
 list begins in a store of all lists, one behind the other. A head with `picks` of the best keys keeps
 `min(sure + round((picks - sure) * share + every), keys) + tail`, where `sure` is `min(assured, picks)`, rounded in
 f64, half to even.*/
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct ShareKeysParams {
    /// i32 `[count]`, ascending: the best keys of all heads together, `head * keys + key`.
    pub best: u64,
    /// Receives i32 `[heads]`.
    pub counts: u64,
    /// Receives i64 `[heads]`: the first row of each list.
    pub starts: u64,
    /// What a pick is worth.
    pub share: f64,
    /// Best keys.
    pub count: i32,
    /// Heads that share.
    pub heads: i32,
    /// Keys of each head.
    pub keys: i32,
    /// Picks that a head keeps beside its share.
    pub assured: i32,
    /// Keys that every head gets without a pick.
    pub every: i32,
    /// Keys behind those, which every head keeps.
    pub tail: i32,
    /// Rows between a list and the next.
    pub slack: i32,
    /// Zero.
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ShareKeysParams"][::core::mem::size_of::<ShareKeysParams>() - 64usize];
    [
        "Alignment of ShareKeysParams",
    ][::core::mem::align_of::<ShareKeysParams>() - 8usize];
    [
        "Offset of field: ShareKeysParams::best",
    ][::core::mem::offset_of!(ShareKeysParams, best) - 0usize];
    [
        "Offset of field: ShareKeysParams::counts",
    ][::core::mem::offset_of!(ShareKeysParams, counts) - 8usize];
    [
        "Offset of field: ShareKeysParams::starts",
    ][::core::mem::offset_of!(ShareKeysParams, starts) - 16usize];
    [
        "Offset of field: ShareKeysParams::share",
    ][::core::mem::offset_of!(ShareKeysParams, share) - 24usize];
    [
        "Offset of field: ShareKeysParams::count",
    ][::core::mem::offset_of!(ShareKeysParams, count) - 32usize];
    [
        "Offset of field: ShareKeysParams::heads",
    ][::core::mem::offset_of!(ShareKeysParams, heads) - 36usize];
    [
        "Offset of field: ShareKeysParams::keys",
    ][::core::mem::offset_of!(ShareKeysParams, keys) - 40usize];
    [
        "Offset of field: ShareKeysParams::assured",
    ][::core::mem::offset_of!(ShareKeysParams, assured) - 44usize];
    [
        "Offset of field: ShareKeysParams::every",
    ][::core::mem::offset_of!(ShareKeysParams, every) - 48usize];
    [
        "Offset of field: ShareKeysParams::tail",
    ][::core::mem::offset_of!(ShareKeysParams, tail) - 52usize];
    [
        "Offset of field: ShareKeysParams::slack",
    ][::core::mem::offset_of!(ShareKeysParams, slack) - 56usize];
    [
        "Offset of field: ShareKeysParams::reserved",
    ][::core::mem::offset_of!(ShareKeysParams, reserved) - 60usize];
};
/** Parameters of `fastkv_mark_keys`: a bit for each entry of the lists of a ragged cache, set where the bit of
 its position is.*/
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct MarkKeysParams {
    /// i32 `[rows]`: positions of all entries.
    pub positions: u64,
    /// i64 `[lists]`: first row of each list.
    pub starts: u64,
    /// i32 `[lists]`: entries of each list.
    pub lengths: u64,
    /// u32 words, a bit for each of `marked_positions` positions, lowest bit first.
    pub marked: u64,
    /// Receives u32 `[lists][words]`, a bit for each entry, lowest bit first; those behind a list are 0.
    pub out: u64,
    /// Entries of all lists.
    pub rows: i64,
    /// Positions that have a bit; no later one is marked.
    pub marked_positions: i32,
    /// Words for each list.
    pub words: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of MarkKeysParams"][::core::mem::size_of::<MarkKeysParams>() - 56usize];
    ["Alignment of MarkKeysParams"][::core::mem::align_of::<MarkKeysParams>() - 8usize];
    [
        "Offset of field: MarkKeysParams::positions",
    ][::core::mem::offset_of!(MarkKeysParams, positions) - 0usize];
    [
        "Offset of field: MarkKeysParams::starts",
    ][::core::mem::offset_of!(MarkKeysParams, starts) - 8usize];
    [
        "Offset of field: MarkKeysParams::lengths",
    ][::core::mem::offset_of!(MarkKeysParams, lengths) - 16usize];
    [
        "Offset of field: MarkKeysParams::marked",
    ][::core::mem::offset_of!(MarkKeysParams, marked) - 24usize];
    [
        "Offset of field: MarkKeysParams::out",
    ][::core::mem::offset_of!(MarkKeysParams, out) - 32usize];
    [
        "Offset of field: MarkKeysParams::rows",
    ][::core::mem::offset_of!(MarkKeysParams, rows) - 40usize];
    [
        "Offset of field: MarkKeysParams::marked_positions",
    ][::core::mem::offset_of!(MarkKeysParams, marked_positions) - 48usize];
    [
        "Offset of field: MarkKeysParams::words",
    ][::core::mem::offset_of!(MarkKeysParams, words) - 52usize];
};
/** Parameters of `fastkv_pool_scores`: scores pooled along the keys per query head, then summed over the
 query heads of each kv head, and these over the kv heads.*/
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct PoolScoresParams {
    /// f32 `[sequence][query head][key]`.
    pub scores: u64,
    /// Elements of `scores` from one sequence to the next.
    pub sequence_stride: i64,
    /// Elements of `scores` from one head to the next.
    pub head_stride: i64,
    /// i32 `[sequences + 1]`: first key of each sequence on the token axis. 0: `tokens` each.
    pub cu_seqlens: u64,
    /// i32 `[sequences]`: keys of each sequence, at most those described above. 0: as many.
    pub lengths: u64,
    /// Receives f32 `[sequence][kv head][key]`, sums over groups. 0: not wanted.
    pub groups: u64,
    /// Elements of `groups` from one sequence to the next.
    pub group_sequence_stride: i64,
    /// Elements of `groups` from one head to the next.
    pub group_head_stride: i64,
    /// Receives f32 `[sequence][key]`, the sum over all heads. 0: not wanted.
    pub total: u64,
    /// Elements of `total` from one sequence to the next.
    pub total_sequence_stride: i64,
    /// How scores are pooled.
    pub pooling: Pooling,
    /// Sequences in the batch.
    pub sequences: i32,
    /// Query heads, a multiple of `kv_heads`.
    pub query_heads: i32,
    /// Groups of query heads.
    pub kv_heads: i32,
    /// Keys of each sequence, or of all together where sequences are packed.
    pub tokens: i32,
    /// Keys of the longest sequence, or more.
    pub max_tokens: i32,
    /// Last keys of each sequence that are left out, as the window's are: nothing is read or written there.
    pub tail: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PoolScoresParams"][::core::mem::size_of::<PoolScoresParams>() - 112usize];
    [
        "Alignment of PoolScoresParams",
    ][::core::mem::align_of::<PoolScoresParams>() - 8usize];
    [
        "Offset of field: PoolScoresParams::scores",
    ][::core::mem::offset_of!(PoolScoresParams, scores) - 0usize];
    [
        "Offset of field: PoolScoresParams::sequence_stride",
    ][::core::mem::offset_of!(PoolScoresParams, sequence_stride) - 8usize];
    [
        "Offset of field: PoolScoresParams::head_stride",
    ][::core::mem::offset_of!(PoolScoresParams, head_stride) - 16usize];
    [
        "Offset of field: PoolScoresParams::cu_seqlens",
    ][::core::mem::offset_of!(PoolScoresParams, cu_seqlens) - 24usize];
    [
        "Offset of field: PoolScoresParams::lengths",
    ][::core::mem::offset_of!(PoolScoresParams, lengths) - 32usize];
    [
        "Offset of field: PoolScoresParams::groups",
    ][::core::mem::offset_of!(PoolScoresParams, groups) - 40usize];
    [
        "Offset of field: PoolScoresParams::group_sequence_stride",
    ][::core::mem::offset_of!(PoolScoresParams, group_sequence_stride) - 48usize];
    [
        "Offset of field: PoolScoresParams::group_head_stride",
    ][::core::mem::offset_of!(PoolScoresParams, group_head_stride) - 56usize];
    [
        "Offset of field: PoolScoresParams::total",
    ][::core::mem::offset_of!(PoolScoresParams, total) - 64usize];
    [
        "Offset of field: PoolScoresParams::total_sequence_stride",
    ][::core::mem::offset_of!(PoolScoresParams, total_sequence_stride) - 72usize];
    [
        "Offset of field: PoolScoresParams::pooling",
    ][::core::mem::offset_of!(PoolScoresParams, pooling) - 80usize];
    [
        "Offset of field: PoolScoresParams::sequences",
    ][::core::mem::offset_of!(PoolScoresParams, sequences) - 88usize];
    [
        "Offset of field: PoolScoresParams::query_heads",
    ][::core::mem::offset_of!(PoolScoresParams, query_heads) - 92usize];
    [
        "Offset of field: PoolScoresParams::kv_heads",
    ][::core::mem::offset_of!(PoolScoresParams, kv_heads) - 96usize];
    [
        "Offset of field: PoolScoresParams::tokens",
    ][::core::mem::offset_of!(PoolScoresParams, tokens) - 100usize];
    [
        "Offset of field: PoolScoresParams::max_tokens",
    ][::core::mem::offset_of!(PoolScoresParams, max_tokens) - 104usize];
    [
        "Offset of field: PoolScoresParams::tail",
    ][::core::mem::offset_of!(PoolScoresParams, tail) - 108usize];
};
/** Parameters of the selection kernels. Each sequence has `rows` rows, whose items are the keys of the
 sequence, or pages of them. Of a sequence's keys the last `window` have no score, and of those the
 first `tail` are always kept; what is behind them is not there for a selection.

 Lengths are clipped to `keys`, counts to the items there are and to `capacity`.*/
#[repr(C)]
#[derive(
    Debug,
    Default,
    Copy,
    Clone,
    Hash,
    PartialEq,
    Eq,
    bytemuck::Pod,
    bytemuck::Zeroable
)]
pub struct SelectParams {
    /// f32 `[sequence][(row * groups + group) * heads + head][key]`, by the strides below.
    pub scores: u64,
    /// Elements of `scores` from one sequence to the next.
    pub sequence_stride: i64,
    /// Elements of `scores` from one score head to the next.
    pub head_stride: i64,
    /// i32 `[sequences]`: keys of each sequence. 0: see `cu_seqlens`.
    pub lengths: u64,
    /// i32 `[sequences + 1]`: where sequences begin in a packed batch. 0: `keys` keys each.
    pub cu_seqlens: u64,
    /// i32 `[sequences, rows]`: items to keep. 0: `count` in every row.
    pub counts: u64,
    /// i32 `[sequences, rows, capacity]`: receives the kept items, ascending, and -1 behind them.
    pub kept: u64,
    /// i32 `[sequences, rows]`: receives how many were kept.
    pub kept_lengths: u64,
    /// Selection in several launches: `FASTKV_SELECT_STATE_BYTES` for each row, zero at first.
    pub states: u64,
    /// Selection in several launches: u32 ranks, `rank_stride` for each row.
    pub ranks: u64,
    /// Selection in several launches: two u32 for each block of each row.
    pub splits: u64,
    /// Elements of `ranks` from one row to the next, a multiple of 4.
    pub rank_stride: i64,
    /// The most keys of a sequence.
    pub keys: i32,
    /// Keys at the end of a sequence that have no score.
    pub window: i32,
    /// Of those, how many are kept.
    pub tail: i32,
    /// Keys at the beginning of a sequence that are kept.
    pub sinks: i32,
    /// Rows of each sequence.
    pub rows: i32,
    /// Groups of score heads of each row.
    pub groups: i32,
    /// Score heads of each group, which are summed.
    pub heads: i32,
    /// `FASTKV_REDUCTION_SUM` or `FASTKV_REDUCTION_MAX` over the groups of a row.
    pub reduction: i32,
    /// Pooling of the scores of each score head.
    pub pooling: Pooling,
    /// Keys of a page; 1 selects keys.
    pub page: i32,
    /// Items to keep.
    pub count: i32,
    /// Room for items in each row of `kept`.
    pub capacity: i32,
    /// Selection in several launches: items of a block, a multiple of 4.
    pub chunk: i32,
    /// `fastkv_select_digit`: which digit of the ranks, 1 or 2.
    pub digit: i32,
    /// Always 0.
    pub reserved: i32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SelectParams"][::core::mem::size_of::<SelectParams>() - 160usize];
    ["Alignment of SelectParams"][::core::mem::align_of::<SelectParams>() - 8usize];
    [
        "Offset of field: SelectParams::scores",
    ][::core::mem::offset_of!(SelectParams, scores) - 0usize];
    [
        "Offset of field: SelectParams::sequence_stride",
    ][::core::mem::offset_of!(SelectParams, sequence_stride) - 8usize];
    [
        "Offset of field: SelectParams::head_stride",
    ][::core::mem::offset_of!(SelectParams, head_stride) - 16usize];
    [
        "Offset of field: SelectParams::lengths",
    ][::core::mem::offset_of!(SelectParams, lengths) - 24usize];
    [
        "Offset of field: SelectParams::cu_seqlens",
    ][::core::mem::offset_of!(SelectParams, cu_seqlens) - 32usize];
    [
        "Offset of field: SelectParams::counts",
    ][::core::mem::offset_of!(SelectParams, counts) - 40usize];
    [
        "Offset of field: SelectParams::kept",
    ][::core::mem::offset_of!(SelectParams, kept) - 48usize];
    [
        "Offset of field: SelectParams::kept_lengths",
    ][::core::mem::offset_of!(SelectParams, kept_lengths) - 56usize];
    [
        "Offset of field: SelectParams::states",
    ][::core::mem::offset_of!(SelectParams, states) - 64usize];
    [
        "Offset of field: SelectParams::ranks",
    ][::core::mem::offset_of!(SelectParams, ranks) - 72usize];
    [
        "Offset of field: SelectParams::splits",
    ][::core::mem::offset_of!(SelectParams, splits) - 80usize];
    [
        "Offset of field: SelectParams::rank_stride",
    ][::core::mem::offset_of!(SelectParams, rank_stride) - 88usize];
    [
        "Offset of field: SelectParams::keys",
    ][::core::mem::offset_of!(SelectParams, keys) - 96usize];
    [
        "Offset of field: SelectParams::window",
    ][::core::mem::offset_of!(SelectParams, window) - 100usize];
    [
        "Offset of field: SelectParams::tail",
    ][::core::mem::offset_of!(SelectParams, tail) - 104usize];
    [
        "Offset of field: SelectParams::sinks",
    ][::core::mem::offset_of!(SelectParams, sinks) - 108usize];
    [
        "Offset of field: SelectParams::rows",
    ][::core::mem::offset_of!(SelectParams, rows) - 112usize];
    [
        "Offset of field: SelectParams::groups",
    ][::core::mem::offset_of!(SelectParams, groups) - 116usize];
    [
        "Offset of field: SelectParams::heads",
    ][::core::mem::offset_of!(SelectParams, heads) - 120usize];
    [
        "Offset of field: SelectParams::reduction",
    ][::core::mem::offset_of!(SelectParams, reduction) - 124usize];
    [
        "Offset of field: SelectParams::pooling",
    ][::core::mem::offset_of!(SelectParams, pooling) - 128usize];
    [
        "Offset of field: SelectParams::page",
    ][::core::mem::offset_of!(SelectParams, page) - 136usize];
    [
        "Offset of field: SelectParams::count",
    ][::core::mem::offset_of!(SelectParams, count) - 140usize];
    [
        "Offset of field: SelectParams::capacity",
    ][::core::mem::offset_of!(SelectParams, capacity) - 144usize];
    [
        "Offset of field: SelectParams::chunk",
    ][::core::mem::offset_of!(SelectParams, chunk) - 148usize];
    [
        "Offset of field: SelectParams::digit",
    ][::core::mem::offset_of!(SelectParams, digit) - 152usize];
    [
        "Offset of field: SelectParams::reserved",
    ][::core::mem::offset_of!(SelectParams, reserved) - 156usize];
};
