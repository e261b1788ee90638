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

/** Threads of a block of `fastkv_window_scores_*` and of `fastkv_window_partials_*`. */
static const int32_t FASTKV_SCORES_THREADS = 128;

/** Keys of a block of `fastkv_window_partials_*`. */
static const int32_t FASTKV_PARTIAL_KEYS = 512;

/** Threads of a block of `fastkv_pool_scores`. */
static const int32_t FASTKV_POOL_THREADS = 256;

/** Keys of a block of `fastkv_pool_scores`. */
static const int32_t FASTKV_POOL_KEYS = 128;

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

/**
 * Parameters of `fastkv_window_scores_*`: the softmax probabilities of each sequence's last queries,
 * summed per key. Where there is no LSE, `fastkv_window_partials_*` and `fastkv_window_lse`, which take
 * the same parameters, make one of the window before.
 *
 * Query i of a sequence sees keys 0..=positions[i] of it. Lengths are clipped to what is described here.
 */
typedef struct fastkv_window_scores_params {
    /** Queries, `[sequence][query head][token][d]`. */
    fastkv_rows q;
    /** Keys, `[sequence][kv head][token][d]`. */
    fastkv_rows k;
    /** i32 `[sequences + 1]`: first query of each sequence on the token axis. 0: `q_tokens` each. */
    uint64_t cu_seqlens_q;
    /** i32 `[sequences + 1]`: first key of each sequence on the token axis. 0: `k_tokens` each. */
    uint64_t cu_seqlens_k;
    /**
     * i32, one for each query, sequence after sequence: the last key that it sees, within its sequence,
     * in any order; below 0 it sees none. 0: the queries are the last of the keys.
     */
    uint64_t positions;
    /**
     * f32, natural log; -inf: the query has no probabilities. `[query head][lse_stride]`, queries sequence
     * after sequence; with `partials`, `window` for each sequence, which `fastkv_window_lse` writes.
     */
    uint64_t lse;
    /** Elements of `lse` from one head to the next. */
    int64_t lse_stride;
    /** u32 words, a bit for each query head, lowest bit first: heads that are biased. 0: none. */
    uint64_t bias_heads;
    /** u32 words, a bit for each key of a sequence, lowest bit first: keys that are biased. 0: none. */
    uint64_t bias_keys;
    /** Words of `bias_keys` from one sequence to the next. */
    int64_t bias_key_stride;
    /** Receives f32 `[sequence][score head][key]`; what lies behind a sequence's keys stays as it is. */
    uint64_t scores;
    /** Elements of `scores` from one sequence to the next. */
    int64_t score_sequence_stride;
    /** Elements of `scores` from one head to the next. */
    int64_t score_head_stride;
    /**
     * f32 pairs `[sequence][kv head][FASTKV_PARTIAL_KEYS keys][partial_columns]`: largest logit, in powers
     * of two, and sum of exponentials relative to it. 0: `lse` is the caller's.
     */
    uint64_t partials;
    /** Factor of the products of queries and keys. */
    float scale;
    /** Added to the scaled product where the query head and the key are biased. */
    float bias;
    /** Sequences in the batch. */
    int32_t sequences;
    /** Query heads, a multiple of `kv_heads`. */
    int32_t query_heads;
    /** Heads of keys. */
    int32_t kv_heads;
    /** Queries of each sequence, or of all together where `cu_seqlens_q` packs them. */
    int32_t q_tokens;
    /** Keys of each sequence, or of all together where `cu_seqlens_k` packs them. */
    int32_t k_tokens;
    /** Queries of the longest sequence, or more. */
    int32_t max_q_tokens;
    /** Keys of the longest sequence, or more. */
    int32_t max_k_tokens;
    /** Last queries of each sequence whose probabilities are summed; all where there are fewer. */
    int32_t window;
    /** `query_heads`, or `kv_heads` where scores are summed over the GQA group. */
    int32_t score_heads;
    /** Keys of a block of `fastkv_window_scores_*`, a multiple of 32. */
    int32_t block_keys;
    /** Room for queries in shared memory, in slots of 64; two or more. */
    int32_t slots;
    /** Queries of a group's heads, each head's window padded to a multiple of 8. */
    int32_t partial_columns;
} fastkv_window_scores_params;

/**
 * Parameters of `fastkv_pool_scores`: scores pooled along the keys per query head, then summed over the
 * query heads of each kv head, and these over the kv heads.
 */
typedef struct fastkv_pool_scores_params {
    /** f32 `[sequence][query head][key]`. */
    uint64_t scores;
    /** Elements of `scores` from one sequence to the next. */
    int64_t sequence_stride;
    /** Elements of `scores` from one head to the next. */
    int64_t head_stride;
    /** i32 `[sequences + 1]`: first key of each sequence on the token axis. 0: `tokens` each. */
    uint64_t cu_seqlens;
    /** Receives f32 `[sequence][kv head][key]`, sums over groups. 0: not wanted. */
    uint64_t groups;
    /** Elements of `groups` from one sequence to the next. */
    int64_t group_sequence_stride;
    /** Elements of `groups` from one head to the next. */
    int64_t group_head_stride;
    /** Receives f32 `[sequence][key]`, the sum over all heads. 0: not wanted. */
    uint64_t total;
    /** Elements of `total` from one sequence to the next. */
    int64_t total_sequence_stride;
    /** How scores are pooled. */
    fastkv_pooling pooling;
    /** Sequences in the batch. */
    int32_t sequences;
    /** Query heads, a multiple of `kv_heads`. */
    int32_t query_heads;
    /** Groups of query heads. */
    int32_t kv_heads;
    /** Keys of each sequence, or of all together where sequences are packed. */
    int32_t tokens;
    /** Keys of the longest sequence, or more. */
    int32_t max_tokens;
    /** Last keys of each sequence that are left out, as the window's are: nothing is read or written there. */
    int32_t tail;
} fastkv_pool_scores_params;

#endif
