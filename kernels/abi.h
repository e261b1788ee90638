/*
 * Everything that a kernel and the Rust side both know: one plain parameter struct per kernel and the
 * constants that a grid depends on. The only file both sides read. bindgen turns it into src/abi.rs.
 *
 * Conventions. Addresses are device addresses; 0 means "absent" where the comment allows it. Strides
 * count elements. Indices and lengths are i32, offsets i64. Every field is named, sized and aligned
 * so that no struct has padding: the Rust side is `Pod` and travels to the device as bytes.
 */
#ifndef FASTKV_ABI_H
#define FASTKV_ABI_H

#include <stdint.h>

/** Bytes of one vector load or store; row sizes, strides and addresses are multiples of it. */
static const int32_t FASTKV_VECTOR_BYTES = 16;

/** Threads of a block of `fastkv_gather_kv`. */
static const int32_t FASTKV_GATHER_KV_THREADS = 128;

/** Rows that each thread of `fastkv_gather_kv` has in flight at once. */
static const int32_t FASTKV_GATHER_KV_ROWS = 4;

/** Pooling that takes the largest score in reach. */
static const int32_t FASTKV_POOLING_MAX = 0;

/** Pooling that takes the mean score in reach. */
static const int32_t FASTKV_POOLING_AVERAGE = 1;

/** Reduction over heads that adds their scores. */
static const int32_t FASTKV_REDUCTION_SUM = 0;

/** Reduction over heads that takes the largest score. */
static const int32_t FASTKV_REDUCTION_MAX = 1;

/**
 * Which rows to take and where they go: for each (sequence, head) a list of token indices, its
 * length, and the place of its first row in a ragged destination `[out_rows, ...]`. The lists,
 * lengths and starts live on the device, so that nothing has to come back to the host to launch.
 *
 * An index outside the sequence (-1 by convention) skips its row, which keeps what it held. Lengths
 * are clipped to `capacity`, rows past `out_rows` are dropped, and so are lists with a negative start:
 * no list can make a kernel touch memory outside the tensors described here.
 */
typedef struct fastkv_kept {
    /** i32: token indices within the sequence, `capacity` of them for each (sequence, head). */
    uint64_t indices;
    /** Elements of `indices` from one sequence to the next. */
    int64_t index_sequence_stride;
    /** Elements of `indices` from one head to the next; 0 where all heads share one list. */
    int64_t index_head_stride;
    /** i32 `[sequences, heads]`: indices in use. 0: `capacity` for every head. */
    uint64_t lengths;
    /** i64 `[sequences, heads]`: destination row of the first index. 0: lists stand `capacity` apart. */
    uint64_t starts;
    /**
     * i32 `[sequences + 1]`: first token of each sequence where sequences are packed along the token
     * axis. 0: sequences have a stride and `tokens` tokens each.
     */
    uint64_t cu_seqlens;
    /**
     * i32: position of every source token, `[sequences, tokens]`, or `[tokens]` where sequences are
     * packed. 0: a token's position is its index.
     */
    uint64_t positions;
    /** i32 `[out_rows]`: receives the position of every row taken. 0: not wanted. */
    uint64_t positions_out;
    /** Rows that the destination holds. */
    int64_t out_rows;
    /** Sequences in the batch. */
    int32_t sequences;
    /** Index lists per sequence: the kv heads, or 1. */
    int32_t heads;
    /** Tokens of each sequence, or of all together where sequences are packed. */
    int32_t tokens;
    /** Room for indices in each list. */
    int32_t capacity;
} fastkv_kept;

/**
 * A tensor of rows read where it lies: element `[sequence][head][token][i]` stands at
 * `base + sequence * sequence_stride + head * head_stride + token * token_stride + i`. Token-major,
 * head-major and packed QKV tensors differ in the strides alone.
 */
typedef struct fastkv_rows {
    /** Address of the first element, a multiple of 16 bytes. */
    uint64_t base;
    /** Elements from one sequence to the next; 0 where sequences are packed along the token axis. */
    int64_t sequence_stride;
    /** Elements from one head to the next. */
    int64_t head_stride;
    /** Elements from one token to the next. */
    int64_t token_stride;
} fastkv_rows;

/** Pooling of scores along the keys: stride 1, padded by half the kernel. */
typedef struct fastkv_pooling {
    /** `FASTKV_POOLING_MAX`, whose padding is -inf, or `FASTKV_POOLING_AVERAGE`, whose zeros count. */
    int32_t kind;
    /** Keys in reach, odd, 1 to 63; 1 leaves scores as they are. */
    int32_t kernel;
} fastkv_pooling;

/** Parameters of `fastkv_gather_kv`: the kept rows of K and of V, moved to ragged caches. */
typedef struct fastkv_gather_kv_params {
    /** Which rows, for each (sequence, kv head). */
    fastkv_kept kept;
    /** K, rows of `row_bytes`. */
    fastkv_rows k;
    /** V, rows of `row_bytes`. */
    fastkv_rows v;
    /** Receives rows of K, `[out_rows, d]`, dense. */
    uint64_t k_out;
    /** Receives rows of V, `[out_rows, d]`, dense. */
    uint64_t v_out;
    /** Bytes of a row: head size times element size. */
    int32_t row_bytes;
    /** Bytes of an element, the unit of the strides. */
    int32_t element_bytes;
    /** log2 of the lanes that share a row: the smallest power of two that covers it, at most 32. */
    int32_t lane_shift;
    /** Always 0. */
    int32_t reserved;
} fastkv_gather_kv_params;

/** Parameters of `fastkv_gather_rows`: whole rows of hidden states, moved to a dense tensor. */
typedef struct fastkv_gather_rows_params {
    /** Which rows, for each sequence; `heads` is 1. */
    fastkv_kept kept;
    /** Hidden states `[tokens, row]`; `head_stride` is not used. */
    fastkv_rows rows;
    /** Receives the rows, `[out_rows, row]`, dense. */
    uint64_t out;
    /** Bytes of a row: hidden size times element size. */
    int32_t row_bytes;
    /** Bytes of an element, the unit of the strides. */
    int32_t element_bytes;
} fastkv_gather_rows_params;

#endif
