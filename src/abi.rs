//! Parameter structs and constants shared with the kernels, generated from `kernels/abi.h`.

/// Bytes of one vector load or store; row sizes, strides and addresses are multiples of it.
pub const VECTOR_BYTES: i32 = 16;
/// Threads of a block of `fastkv_gather_kv`.
pub const GATHER_KV_THREADS: i32 = 128;
/// Rows that each thread of `fastkv_gather_kv` has in flight at once.
pub const GATHER_KV_ROWS: i32 = 4;
/// Pooling that takes the largest score in reach.
pub const POOLING_MAX: i32 = 0;
/// Pooling that takes the mean score in reach.
pub const POOLING_AVERAGE: i32 = 1;
/// Reduction over heads that adds their scores.
pub const REDUCTION_SUM: i32 = 0;
/// Reduction over heads that takes the largest score.
pub const REDUCTION_MAX: i32 = 1;
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
    /// i32 `[out_rows]`: receives the position of every row taken. 0: not wanted.
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
/// Parameters of `fastkv_gather_kv`: the kept rows of K and of V, moved to ragged caches.
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
    /// K, rows of `row_bytes`.
    pub k: Rows,
    /// V, rows of `row_bytes`.
    pub v: Rows,
    /// Receives rows of K, `[out_rows, d]`, dense.
    pub k_out: u64,
    /// Receives rows of V, `[out_rows, d]`, dense.
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
    ["Size of GatherKvParams"][::core::mem::size_of::<GatherKvParams>() - 184usize];
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
        "Offset of field: GatherKvParams::k_out",
    ][::core::mem::offset_of!(GatherKvParams, k_out) - 152usize];
    [
        "Offset of field: GatherKvParams::v_out",
    ][::core::mem::offset_of!(GatherKvParams, v_out) - 160usize];
    [
        "Offset of field: GatherKvParams::row_bytes",
    ][::core::mem::offset_of!(GatherKvParams, row_bytes) - 168usize];
    [
        "Offset of field: GatherKvParams::element_bytes",
    ][::core::mem::offset_of!(GatherKvParams, element_bytes) - 172usize];
    [
        "Offset of field: GatherKvParams::lane_shift",
    ][::core::mem::offset_of!(GatherKvParams, lane_shift) - 176usize];
    [
        "Offset of field: GatherKvParams::reserved",
    ][::core::mem::offset_of!(GatherKvParams, reserved) - 180usize];
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
