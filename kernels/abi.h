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

/** Threads of a block of `fastkv_prefill_attention_*`. */
static const int32_t FASTKV_ATTENTION_THREADS = 128;

/** Threads of a block of `fastkv_sm90_attention_*`. */
static const int32_t FASTKV_SM90_ATTENTION_THREADS = 384;

/** Queries, and keys, of a tile of `fastkv_sm90_attention_*`. */
static const int32_t FASTKV_SM90_ATTENTION_ROWS = 128;

/** Keys of a decode block, the unit in which lists are split. */
static const int32_t FASTKV_DECODE_BLOCK_KEYS = 64;

/** Chunks that `fastkv_decode_*` splits a list into, at most. */
static const int32_t FASTKV_DECODE_CHUNKS = 64;

/** Query rows (new tokens x heads of a GQA group) that one pass over a list serves, at most. */
static const int32_t FASTKV_DECODE_QUERIES = 16;

/** Keys of a list that each warp of `fastkv_decode_*` works on at a time. */
static const int32_t FASTKV_DECODE_WARP_KEYS = 16;

/** Threads of a block of `fastkv_gather_indices`. */
static const int32_t FASTKV_GATHER_INDICES_THREADS = 256;

/** Threads of a block of `fastkv_gather_kv`. */
static const int32_t FASTKV_GATHER_KV_THREADS = 128;

/** Threads of a block of `fastkv_compact`. */
static const int32_t FASTKV_COMPACT_THREADS = 512;

/** Rows that each thread of `fastkv_gather_kv` and `fastkv_compact` has in flight at once. */
static const int32_t FASTKV_GATHER_KV_ROWS = 4;

/** Pooling that takes the largest score in reach. */
static const int32_t FASTKV_POOLING_MAX = 0;

/** Pooling that takes the mean score in reach. */
static const int32_t FASTKV_POOLING_AVERAGE = 1;

/** Reduction over groups of heads that adds their scores. */
static const int32_t FASTKV_REDUCTION_SUM = 0;

/** Reduction over groups of heads that takes the largest score. */
static const int32_t FASTKV_REDUCTION_MAX = 1;

/** LSE as natural logarithms. */
static const int32_t FASTKV_LOGARITHM_NATURAL = 0;

/** LSE as logarithms of base 2. */
static const int32_t FASTKV_LOGARITHM_BINARY = 1;

/** Threads of a block of `fastkv_window_scores_*`, `fastkv_window_partials_*` and `fastkv_column_sums_*`. */
static const int32_t FASTKV_SCORES_THREADS = 128;

/** Threads of a block of `fastkv_add_scores`, `fastkv_gather_scores`, `fastkv_raise_scores` and `fastkv_mark_keys`. */
static const int32_t FASTKV_SUMS_THREADS = 256;

/** Keys of a block of `fastkv_window_partials_*`. */
static const int32_t FASTKV_PARTIAL_KEYS = 512;

/** Threads of a block of `fastkv_pool_scores`. */
static const int32_t FASTKV_POOL_THREADS = 256;

/** Keys of a block of `fastkv_pool_scores`. */
static const int32_t FASTKV_POOL_KEYS = 128;

/** Threads of a block of the selection kernels. */
static const int32_t FASTKV_SELECT_THREADS = 512;

/** Bins of a histogram of the selection kernels: as many as a digit of a rank has values. */
static const int32_t FASTKV_SELECT_BINS = 2048;

/** Items that a block of the selection in several launches takes at most. */
static const int32_t FASTKV_SELECT_CHUNK = 4096;

/** Bytes for each row that the selection in several launches needs zeroed. */
static const int32_t FASTKV_SELECT_STATE_BYTES = 24608;

/** Shared memory of `fastkv_select_block` beside 4 bytes for each item. */
static const int32_t FASTKV_SELECT_BLOCK_BYTES = 8528;

/** Blocks of a cluster of `fastkv_select_cluster`. */
static const int32_t FASTKV_SELECT_CLUSTER = 8;

/** Shared memory of a block of `fastkv_select_cluster` beside 4 bytes for each item. */
static const int32_t FASTKV_SELECT_CLUSTER_BYTES = 25424;

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
    /**
     * i32 `[out_rows]`, or `[slots, heads]`, or `[slots]` where a page belongs to one head: receives the position of
     * every row taken. 0: not wanted.
     */
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

/**
 * Where the logarithms of the softmax denominators of queries lie (LSE), f32: query i of a sequence and a head
 * at `base + sequence * sequence_stride + head * head_stride + i * token_stride`. Where `sequence_stride` is 0
 * all sequences stand in one row, and i is the query's place on the token axis.
 */
typedef struct fastkv_lse {
    /** Address of the first; 0: there are none. */
    uint64_t base;
    /** Elements from one sequence to the next, or 0. */
    int64_t sequence_stride;
    /** Elements from one query head to the next. */
    int64_t head_stride;
    /** Elements from one query to the next. */
    int64_t token_stride;
    /** `FASTKV_LOGARITHM_NATURAL` or `FASTKV_LOGARITHM_BINARY`. */
    int32_t logarithm;
    /** Always 0. */
    int32_t reserved;
} fastkv_lse;

/** Parameters of `fastkv_gather_indices`: `out[i] = list[rows[i]]`, and -1 for a row outside the list. */
typedef struct fastkv_gather_indices_params {
    /** i32 `[length]`. */
    uint64_t list;
    /** i32 `[count]`. */
    uint64_t rows;
    /** Receives i32 `[count]`. */
    uint64_t out;
    /** Numbers in the list. */
    int32_t length;
    /** Numbers wanted. */
    int32_t count;
} fastkv_gather_indices_params;

/** Pooling of scores along the keys: stride 1, padded by half the kernel. */
typedef struct fastkv_pooling {
    /** `FASTKV_POOLING_MAX`, whose padding is -inf, or `FASTKV_POOLING_AVERAGE`, whose zeros count. */
    int32_t kind;
    /** Keys in reach, odd, 1 to 63; 1 leaves scores as they are. */
    int32_t kernel;
} fastkv_pooling;

/**
 * Pages that sequences are spread over: token i of a sequence is slot `i % page_size` of page
 * `table[sequence][i / page_size]`. What is not in `[0, pages)`, -1 by convention, is no page: nobody
 * reads or writes the tokens there.
 */
typedef struct fastkv_pages {
    /** i32 `[sequences, table_pages]`. 0: there are no pages. */
    uint64_t table;
    /** Pages of a sequence in `table`. */
    int32_t table_pages;
    /** Pages of the tensors. */
    int32_t pages;
    /** Slots of a page. */
    int32_t page_size;
    /** Always 0. */
    int32_t reserved;
} fastkv_pages;

/**
 * Parameters of `fastkv_prefill_attention_*` and `fastkv_paged_attention_*`: causal attention of every (sequence, query head), and the
 * softmax probabilities of each sequence's last queries summed per key.
 *
 * Query i of a sequence sees keys `0..=positions[i]` of it. Lengths and positions are clipped to what is
 * described here. A query that sees no key has output 0 and LSE -inf.
 */
typedef struct fastkv_prefill_attention_params {
    /** Queries, `[sequence][query head][token][d]`. */
    fastkv_rows q;
    /** Keys, `[sequence][kv head][token][d]`, or `[page][kv head][slot][d]` where they lie in pages. */
    fastkv_rows k;
    /** Values, as the keys. */
    fastkv_rows v;
    /** Receives the output, as the queries. */
    fastkv_rows out;
    /**
     * Where keys and values in pages lie; a key without a page is seen by nobody. Table 0: there are no pages, as
     * always for `fastkv_prefill_attention_*`, and never for `fastkv_paged_attention_*`.
     */
    fastkv_pages pages;
    /** i32 `[sequences + 1]`: first query of each sequence on the token axis. 0: `q_tokens` each. */
    uint64_t cu_seqlens_q;
    /** i32 `[sequences + 1]`: first key of each sequence on the token axis. 0: `k_tokens` each. Pages: 0. */
    uint64_t cu_seqlens_k;
    /** i32 `[sequences]`: keys of each sequence, at most those described above. 0: as many. */
    uint64_t k_lengths;
    /**
     * i32, one for each query, sequence after sequence: the last key that it sees, within its sequence,
     * in any order; below 0 it sees none. 0: the queries are the last of the keys.
     */
    uint64_t positions;
    /** Receives LSE. Base 0: not wanted. */
    fastkv_lse lse;
    /** u32 words, a bit for each query head, lowest bit first: heads that are biased. 0: none. */
    uint64_t bias_heads;
    /** u32 words, a bit for each key of a sequence, lowest bit first: keys that are biased. 0: none. */
    uint64_t bias_keys;
    /** Words of `bias_keys` from one sequence to the next. */
    int64_t bias_key_stride;
    /** Receives f32 `[sequence][score head][key]`: probabilities summed over the window. 0: not wanted. */
    uint64_t scores;
    /** Elements of `scores` from one sequence to the next. */
    int64_t score_sequence_stride;
    /** Elements of `scores` from one head to the next. */
    int64_t score_head_stride;
    /** i32 zeros: `[0]` next item of work, then finished window tiles of each (sequence, kv head). */
    uint64_t queue;
    /** Factor of the products of queries and keys. */
    float scale;
    /** Added to the scaled product where the query head and the key are biased. */
    float bias;
    /** Sequences in the batch. */
    int32_t sequences;
    /** Query heads, a multiple of `kv_heads`. */
    int32_t query_heads;
    /** Heads of keys and values. */
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
    /** kv heads whose tiles come before those of other heads, so that their keys and values stay in L2. */
    int32_t section_heads;
    /** Keys of a score item, a multiple of 32. */
    int32_t score_keys;
    /** Room for queries in shared memory, in slots of 64, while keys are scored; two or more. */
    int32_t score_slots;
} fastkv_prefill_attention_params;

/** A `CUtensorMap`, which the copy engine of Hopper reads. */
typedef struct fastkv_tensor_map {
    /** What `cuTensorMapEncodeTiled` wrote. */
    uint64_t words[16];
} fastkv_tensor_map;

/**
 * Parameters of `fastkv_sm90_attention_*`: what the portable form takes, and maps of the tensors that come
 * by the copy engine, as {64 elements, token, d / 64, head, sequence} in boxes of 128 tokens of a head. Keys and
 * values in pages: {64 elements, slot, d / 64, head, page} in boxes of 64 elements of a page's slots, of 128 where
 * it has more. Pages are 128 slots, a part of that which is a multiple of 8, or a multiple of it. Aligned to 64 bytes.
 */
typedef struct fastkv_sm90_attention_params {
    /** Queries. */
    fastkv_tensor_map q;
    /** Keys. */
    fastkv_tensor_map k;
    /** Values. */
    fastkv_tensor_map v;
    /** The rest. */
    fastkv_prefill_attention_params attention;
    /** Zeros. */
    uint64_t reserved[6];
} fastkv_sm90_attention_params;

/**
 * A KV cache of lists, one for each (sequence, kv head), each with a length of its own on the device.
 *
 * Ragged, where there are no pages: entry i of a list is row `start + i` of `k` and `v`. Paged: entry i
 * is token i of its sequence, whose lists share pages and length, and an entry without a page is absent:
 * nobody sees it.
 *
 * Lengths are clipped to `capacity`, to the list's own room, and to `rows`; lists with a negative start
 * are empty: no list can make a kernel touch memory outside the tensors described here.
 */
typedef struct fastkv_cache {
    /**
     * Keys, rotated. Ragged: `token_stride` from one row to the next, the rest unused. Paged:
     * `sequence_stride` from one page to the next, `token_stride` from one slot to the next.
     */
    fastkv_rows k;
    /** Values, as the keys. */
    fastkv_rows v;
    /** i64 `[sequences, heads]`: row of a list's first entry. 0: lists stand `capacity` apart. */
    uint64_t starts;
    /**
     * i32 `[sequences, heads]`, paged `[sequences]`: entries in use. Below 0: a place of the batch that is not in
     * use; it has no entries, nothing is appended, and it is not full.
     */
    uint64_t lengths;
    /** i32 `[sequences, heads]`: rows that belong to a list. 0: `capacity` for every list. */
    uint64_t capacities;
    /**
     * i32: original position of every entry, `[rows]`, or `[pages, page_size, heads]`. 0: not kept.
     */
    uint64_t positions;
    /** Where the entries of a paged cache lie. */
    fastkv_pages pages;
    /** Rows of `k` and `v` where the cache is ragged. */
    int64_t rows;
    /** Entries that a list can have, at most. */
    int32_t capacity;
    /** Sequences in the batch. */
    int32_t sequences;
    /** kv heads. */
    int32_t heads;
    /** Always 0. */
    int32_t reserved;
} fastkv_cache;

/**
 * Parameters of `fastkv_decode_*`: attention of the newest tokens of each sequence over its lists.
 *
 * Where `k_new` is given, the tokens' own keys and values are seen too and are appended to the lists,
 * whose lengths grow; a list without room for all of them stays as it is, and `full` says so. Where it
 * is 0 the last `tokens` entries of each list are the queries' own. A query sees the keys up to its
 * own. A query that sees none has output 0 and LSE -inf.
 */
typedef struct fastkv_decode_params {
    /** The lists; `lengths` and `positions` grow where something is appended. */
    fastkv_cache cache;
    /** Queries, `[sequence][query head][token][d]`. */
    fastkv_rows q;
    /** Keys of the new tokens, rotated, `[sequence][kv head][token][d]`. Base 0: nothing is appended. */
    fastkv_rows k_new;
    /** Values of the new tokens, as their keys. */
    fastkv_rows v_new;
    /** Receives the output, as the queries. */
    fastkv_rows out;
    /** i32 `[sequences, tokens]`: positions of the new tokens. 0 where none are kept. */
    uint64_t positions_new;
    /** Receives the LSE of the queries; token i of sequence s is number `s * tokens + i` of a row. Base 0: none. */
    fastkv_lse lse;
    /** i32: set to 1 where a list had no room; left alone otherwise. */
    uint64_t full;
    /** u32 words, a bit for each query head, lowest bit first: heads that are biased. 0: none. */
    uint64_t bias_heads;
    /** u32 words, a bit for each position of a sequence, lowest bit first: keys that are biased. */
    uint64_t bias_keys;
    /** Words of `bias_keys` from one sequence to the next. */
    int64_t bias_key_stride;
    /** f32 `[lists, query tiles, chunks, queries, d]`: what a chunk adds to an output. */
    uint64_t partials;
    /** f32 `[lists, query tiles, chunks, queries, 2]`: maximum and sum of each row of a chunk. */
    uint64_t statistics;
    /**
     * i32 zeros, and zeros again afterwards: finished chunks of each (list, query tile), then finished blocks of the
     * grid.
     */
    uint64_t finished;
    /** Factor of the products of queries and keys. */
    float scale;
    /** Added to the scaled product where the query head and the key's position are biased. */
    float bias;
    /** Positions that have a bit in `bias_keys`; those behind are not biased. */
    int32_t bias_positions;
    /** Query heads of a kv head. */
    int32_t group;
    /** New tokens of each sequence. */
    int32_t tokens;
    /** Query rows of a list, `group * tokens`, in tiles of `queries`. */
    int32_t query_tiles;
    /** Rows of a query tile, 8 or 16. */
    int32_t queries;
    /** Chunks that a list can have, at most FASTKV_DECODE_CHUNKS. */
    int32_t chunks;
} fastkv_decode_params;

/**
 * Parameters of `fastkv_compact`: entries of a cache moved to the front of their lists, in place.
 *
 * Indices ascend, so no row is overwritten before it was read. A list ends where it stops to ascend, or
 * leaves the entries of the cache.
 */
typedef struct fastkv_compact_params {
    /** The lists. */
    fastkv_cache cache;
    /** i32: ascending indices of the entries kept, `index_capacity` of them for each list. */
    uint64_t indices;
    /** Elements of `indices` from one sequence to the next. */
    int64_t index_sequence_stride;
    /** Elements of `indices` from one head to the next; 0 where all heads share one list. */
    int64_t index_head_stride;
    /** i32 `[sequences, heads]`: indices in use. 0: `index_capacity` for every list. */
    uint64_t kept;
    /** Receives i32 `[sequences, heads]`: entries that were kept. */
    uint64_t lengths_out;
    /** Room for indices in each list. */
    int32_t index_capacity;
    /** Bytes of a row: head size times element size. */
    int32_t row_bytes;
    /** Bytes of an element, the unit of the strides. */
    int32_t element_bytes;
    /** log2 of the lanes that share a row: the smallest power of two that covers it, at most 32. */
    int32_t lane_shift;
} fastkv_compact_params;

/** Where rows of a destination go that is paged, one by one. */
typedef struct fastkv_slots {
    /** i64 `[out_rows]`: slot of each row, counted over all pages; -1 skips the row. 0: rows are dense. */
    uint64_t slots;
    /** Elements from one page to the next. */
    int64_t page_stride;
    /** Elements from one head to the next; 0 where a page belongs to one head. */
    int64_t head_stride;
    /** Elements from one slot of a page to the next. */
    int64_t slot_stride;
    /** Pages of the destination. */
    int32_t pages;
    /** Slots of a page. */
    int32_t page_size;
} fastkv_slots;

/** Parameters of `fastkv_gather_kv`: the kept rows of K and of V, moved to ragged or paged caches. */
typedef struct fastkv_gather_kv_params {
    /** Which rows, for each (sequence, kv head). */
    fastkv_kept kept;
    /** K, rows of `row_bytes`; where it is paged `sequence_stride` leads from page to page. */
    fastkv_rows k;
    /** V, rows of `row_bytes`, as K. */
    fastkv_rows v;
    /** Where the tokens of paged sources lie. */
    fastkv_pages pages;
    /** Where the rows of paged destinations go. */
    fastkv_slots slots;
    /** Receives rows of K: `[out_rows, d]`, dense, or the first page. */
    uint64_t k_out;
    /** Receives rows of V, as K. */
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

/** Element types, as the `dtype` fields of parameter structs name them: IEEE half precision. */
static const int32_t FASTKV_DTYPE_F16 = 0;

/** bfloat16. */
static const int32_t FASTKV_DTYPE_BF16 = 1;

/** IEEE single precision. */
static const int32_t FASTKV_DTYPE_F32 = 2;

/** Elements that a thread of the llama kernels moves at once, of any type; widths are multiples of it. */
static const int32_t FASTKV_PIECE = 8;

/** Threads of a block of `fastkv_add`, `fastkv_convert`, `fastkv_rope` and `fastkv_silu_mul`. */
static const int32_t FASTKV_LLAMA_THREADS = 256;

/** Most threads of a block of `fastkv_rms_norm`. */
static const int32_t FASTKV_NORM_THREADS = 512;

/** Most pieces of a row that each thread of `fastkv_rms_norm` holds. */
static const int32_t FASTKV_NORM_PIECES = 4;

/** Tokens of a block of `fastkv_rope`. */
static const int32_t FASTKV_ROPE_TOKENS = 4;

/** The largest head that `fastkv_rope` turns. */
static const int32_t FASTKV_ROPE_HEAD_DIM = 256;

/** Threads of a block of `fastkv_sample`. */
static const int32_t FASTKV_SAMPLE_THREADS = 1024;

/** Parameters of `fastkv_add`: `x += y`, each sum rounded once. */
typedef struct fastkv_add_params {
    /** `[rows, width]`; `sequence_stride` and `head_stride` are not used, here and below. */
    fastkv_rows x;
    /** Of the same shape. */
    fastkv_rows y;
    /** Elements of a row. */
    int32_t width;
    /** Element type of `x`. */
    int32_t x_dtype;
    /** Element type of `y`. */
    int32_t y_dtype;
    /** Always 0. */
    int32_t reserved;
} fastkv_add_params;

/** Parameters of `fastkv_convert`: `out = x` in another element type. */
typedef struct fastkv_convert_params {
    /** `[rows, width]`. */
    fastkv_rows x;
    /** Of the same shape. */
    fastkv_rows out;
    /** Elements of a row. */
    int32_t width;
    /** Element type of `x`. */
    int32_t x_dtype;
    /** Element type of `out`. */
    int32_t out_dtype;
    /** Always 0. */
    int32_t reserved;
} fastkv_convert_params;

/** Parameters of `fastkv_embed`: rows of an embedding table. */
typedef struct fastkv_embed_params {
    /** `[vocabulary, width]`, dense. */
    uint64_t table;
    /** i32 `[rows]`: row of the table for each row of `out`. One outside the table gives zeros. */
    uint64_t ids;
    /** Receives the rows, `[rows, width]`, dense. */
    uint64_t out;
    /**
     * i32: becomes the largest i + 1 of an `ids[i]` outside the table, if that is more than it holds.
     * 0: not wanted.
     */
    uint64_t fault;
    /** Rows of the table. */
    int32_t vocabulary;
    /** Elements of a row. */
    int32_t width;
    /** Element type of the table. */
    int32_t table_dtype;
    /** Element type of `out`. */
    int32_t out_dtype;
} fastkv_embed_params;

/**
 * Parameters of `fastkv_rms_norm`: `out = x / sqrt(mean(x^2) + epsilon) * weight`, of `x += added`
 * where something is to be added first.
 */
typedef struct fastkv_rms_norm_params {
    /** `[rows, width]`; written where `added` is there, its sums rounded once. */
    fastkv_rows x;
    /** `[rows, width]` of `dtype`; base 0: nothing to add. */
    fastkv_rows added;
    /** Receives the normed rows, `[rows, width]` of `dtype`. */
    fastkv_rows out;
    /** `[width]` of `dtype`. */
    uint64_t weight;
    /** Elements of a row. */
    int32_t width;
    /** Element type of `x`. */
    int32_t x_dtype;
    /** Element type of all else. */
    int32_t dtype;
    /** What keeps a row of zeros from a division by zero. */
    float epsilon;
} fastkv_rms_norm_params;

/**
 * Parameters of `fastkv_rope`: rotates heads of Q and K, pairs (i, i + d/2) by
 * `position * inverse_frequencies[i]`, and appends K and V to a ragged cache.
 *
 * Token i of a sequence goes to row `starts + lengths + i` of each kv head. Rows outside `[0, out_rows)`
 * are dropped, and so are those of a negative start or length.
 */
typedef struct fastkv_rope_params {
    /** Queries `[sequence][query head][token][d]`. */
    fastkv_rows q;
    /** Receives them rotated; may be `q` itself. */
    fastkv_rows q_out;
    /** Keys `[sequence][kv head][token][d]`. */
    fastkv_rows k;
    /** Values, of the same shape. */
    fastkv_rows v;
    /** Receives rotated keys, `[out_rows, d]`, dense. */
    uint64_t k_out;
    /** Receives values, `[out_rows, d]`, dense. */
    uint64_t v_out;
    /** i64 `[sequences, kv_heads]`: first row of each cache. */
    uint64_t starts;
    /** i32 `[sequences, kv_heads]`: entries in each cache so far. 0: none. */
    uint64_t lengths;
    /** i32 `[sequences, kv_heads]`: receives the lengths with the new entries; not `lengths`. 0: not wanted. */
    uint64_t lengths_out;
    /** i32 `[out_rows]`: receives the position of every row appended. 0: not wanted. */
    uint64_t positions_out;
    /** i32 `[sequences, tokens]`, or `[total_tokens]` where sequences are packed. */
    uint64_t positions;
    /** f32 `[d / 2]`. 0: nothing is turned; keys are appended as they are. */
    uint64_t inverse_frequencies;
    /** i32 `[sequences + 1]`: first token of each sequence on a packed token axis. 0: not packed. */
    uint64_t cu_seqlens;
    /** Rows that the caches hold together. */
    int64_t out_rows;
    /** Sequences in the batch. */
    int32_t sequences;
    /** Tokens of each sequence; where they are packed, no sequence has more. */
    int32_t tokens;
    /** Tokens of all sequences where they are packed. */
    int32_t total_tokens;
    /** Heads of Q; may be 0. */
    int32_t query_heads;
    /** Heads of K and of V; 0: nothing is appended. */
    int32_t kv_heads;
    /** d. */
    int32_t head_dim;
    /** Element type of all tensors. */
    int32_t dtype;
    /** Always 0. */
    int32_t reserved;
} fastkv_rope_params;

/** How the next token of a row is drawn. */
typedef struct fastkv_draw {
    /** Softmax temperature; 0 or less, or NaN, takes the most likely token. */
    float temperature;
    /** Only the fewest most likely tokens whose probabilities sum up to it; 1 or more for all. */
    float top_p;
    /** Uniform random number in [0, 1). */
    float uniform;
    /** Only so many of the most likely tokens; 0 or less for all. Comes before `top_p`. */
    int32_t top_k;
} fastkv_draw;

/** Parameters of `fastkv_sample`: a token for each row of logits. */
typedef struct fastkv_sample_params {
    /** `[rows, vocabulary]`. */
    fastkv_rows logits;
    /** `fastkv_draw` for each row. 0: the most likely token of every row. */
    uint64_t draws;
    /** i32 `[rows]`: receives the tokens; -1 where every logit is NaN. */
    uint64_t tokens;
    /** Logits of a row. */
    int32_t vocabulary;
    /** Element type of the logits. */
    int32_t dtype;
} fastkv_sample_params;

/** Parameters of `fastkv_silu_mul`: `out = gate / (1 + exp(-gate)) * up`. */
typedef struct fastkv_silu_mul_params {
    /** `[rows, width]`. */
    fastkv_rows gate;
    /** Of the same shape. */
    fastkv_rows up;
    /** Receives the products; may be `gate` or `up` itself. */
    fastkv_rows out;
    /** Elements of a row. */
    int32_t width;
    /** Element type of all three. */
    int32_t dtype;
} fastkv_silu_mul_params;

/**
 * Parameters of `fastkv_window_scores_*`: the softmax probabilities of each sequence's last queries,
 * summed per key. Where there is no LSE, `fastkv_window_partials_*` and `fastkv_window_lse`, which take
 * the same parameters, make one of the window before.
 *
 * Query i of a sequence sees keys `0..=positions[i]` of it. Lengths are clipped to what is described here.
 */
typedef struct fastkv_window_scores_params {
    /** Queries, `[sequence][query head][token][d]`. */
    fastkv_rows q;
    /** Keys, `[sequence][kv head][token][d]`, or `[page][kv head][slot][d]` where they lie in pages. */
    fastkv_rows k;
    /** Where keys in pages lie; a key without a page is seen by nobody. Table 0: there are no pages. */
    fastkv_pages pages;
    /** i32 `[sequences + 1]`: first query of each sequence on the token axis. 0: `q_tokens` each. */
    uint64_t cu_seqlens_q;
    /** i32 `[sequences + 1]`: first key of each sequence on the token axis. 0: `k_tokens` each. Pages: 0. */
    uint64_t cu_seqlens_k;
    /** i32 `[sequences]`: keys of each sequence, at most those described above. 0: as many. */
    uint64_t k_lengths;
    /**
     * i32, one for each query, sequence after sequence: the last key that it sees, within its sequence,
     * in any order; below 0 it sees none. 0: the queries are the last of the keys.
     */
    uint64_t positions;
    /**
     * Of all queries; -inf, or +inf: the query has no probabilities. With `partials` of the queries of each
     * window alone, which `fastkv_window_lse` writes.
     */
    fastkv_lse lse;
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
 * Parameters of `fastkv_column_sums_*`: probabilities of all queries, which are the last of the keys, summed
 * with weights over the queries and the GQA group.
 */
typedef struct fastkv_column_sums_params {
    /**
     * What to sum: `window` holds all queries, `score_heads` is `kv_heads`, `lse` is the caller's, and
     * `positions` and `partials` are 0.
     */
    fastkv_window_scores_params sums;
    /** What the first query of a sequence counts. */
    float weight;
    /** What each next one counts more. */
    float step;
    /** Keys that a query counts on, its own and those before it; 0 to 2^30. */
    int32_t band;
    /** Always 0. */
    int32_t reserved;
} fastkv_column_sums_params;

/** Scores of keys, f32 `[head][key]`. */
typedef struct fastkv_score_table {
    /** The first. */
    uint64_t base;
    /** Elements from one head to the next. */
    int64_t head_stride;
    /** Keys of each head. */
    int32_t keys;
    /** Always 0. */
    int32_t reserved;
} fastkv_score_table;

/** Parameters of `fastkv_add_scores`: `out = a + b`, where keys that one lacks count 0. */
typedef struct fastkv_add_scores_params {
    /** One summand. */
    fastkv_score_table a;
    /** The other. */
    fastkv_score_table b;
    /** Receives the sums. */
    fastkv_score_table out;
} fastkv_add_scores_params;

/** Parameters of `fastkv_gather_scores`: `out[i] = scores[entries[i]]` for each head. */
typedef struct fastkv_gather_scores_params {
    /** What is gathered; an entry outside it, -1 by convention, gives 0. */
    fastkv_score_table scores;
    /** Receives the scores. */
    fastkv_score_table out;
    /** i32, `out.keys` keys for each head. */
    uint64_t entries;
    /** Elements of `entries` from one head to the next. */
    int64_t entry_stride;
} fastkv_gather_scores_params;

/**
 * Parameters of `fastkv_raise_scores`: `scores[head][key] = +inf` for every head, where the position of the key
 * has a bit that is not set: what a bias of the same bits leaves alone.
 */
typedef struct fastkv_raise_scores_params {
    /** Scores of all heads. */
    fastkv_score_table scores;
    /** i32, a position for each key. */
    uint64_t positions;
    /** u32 words, a bit for each of `marked_positions` positions, lowest bit first. */
    uint64_t marked;
    /** Positions that have a bit; no key at a later one is raised. */
    int32_t marked_positions;
    /** Always 0. */
    int32_t reserved;
} fastkv_raise_scores_params;

/**
 * Parameters of `fastkv_share_keys`: how many keys each head keeps where all share a number of them, and where its
 * list begins in a store of all lists, one behind the other. A head with `picks` of the best keys keeps
 * `min(sure + round((picks - sure) * share + every), keys) + tail`, where `sure` is `min(assured, picks)`, rounded in
 * f64, half to even.
 */
typedef struct fastkv_share_keys_params {
    /** i32 `[count]`, ascending: the best keys of all heads together, `head * keys + key`. */
    uint64_t best;
    /** Receives i32 `[heads]`. */
    uint64_t counts;
    /** Receives i64 `[heads]`: the first row of each list. */
    uint64_t starts;
    /** What a pick is worth. */
    double share;
    /** Best keys. */
    int32_t count;
    /** Heads that share. */
    int32_t heads;
    /** Keys of each head. */
    int32_t keys;
    /** Picks that a head keeps beside its share. */
    int32_t assured;
    /** Keys that every head gets without a pick. */
    int32_t every;
    /** Keys behind those, which every head keeps. */
    int32_t tail;
    /** Rows between a list and the next. */
    int32_t slack;
    /** Zero. */
    int32_t reserved;
} fastkv_share_keys_params;

/**
 * Parameters of `fastkv_mark_keys`: a bit for each entry of the lists of a ragged cache, set where the bit of
 * its position is.
 */
typedef struct fastkv_mark_keys_params {
    /** i32 `[rows]`: positions of all entries. */
    uint64_t positions;
    /** i64 `[lists]`: first row of each list. */
    uint64_t starts;
    /** i32 `[lists]`: entries of each list. */
    uint64_t lengths;
    /** u32 words, a bit for each of `marked_positions` positions, lowest bit first. */
    uint64_t marked;
    /** Receives u32 `[lists][words]`, a bit for each entry, lowest bit first; those behind a list are 0. */
    uint64_t out;
    /** Entries of all lists. */
    int64_t rows;
    /** Positions that have a bit; no later one is marked. */
    int32_t marked_positions;
    /** Words for each list. */
    int32_t words;
} fastkv_mark_keys_params;

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
    /** i32 `[sequences]`: keys of each sequence, at most those described above. 0: as many. */
    uint64_t lengths;
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

/**
 * Parameters of the selection kernels. Each sequence has `rows` rows, whose items are the keys of the
 * sequence, or pages of them. Of a sequence's keys the last `window` have no score, and of those the
 * first `tail` are always kept; what is behind them is not there for a selection.
 *
 * Lengths are clipped to `keys`, counts to the items there are and to `capacity`.
 */
typedef struct fastkv_select_params {
    /** f32 `[sequence][(row * groups + group) * heads + head][key]`, by the strides below. */
    uint64_t scores;
    /** Elements of `scores` from one sequence to the next. */
    int64_t sequence_stride;
    /** Elements of `scores` from one score head to the next. */
    int64_t head_stride;
    /** i32 `[sequences]`: keys of each sequence. 0: see `cu_seqlens`. */
    uint64_t lengths;
    /** i32 `[sequences + 1]`: where sequences begin in a packed batch. 0: `keys` keys each. */
    uint64_t cu_seqlens;
    /** i32 `[sequences, rows]`: items to keep. 0: `count` in every row. */
    uint64_t counts;
    /** i32 `[sequences, rows, capacity]`: receives the kept items, ascending, and -1 behind them. */
    uint64_t kept;
    /** i32 `[sequences, rows]`: receives how many were kept. */
    uint64_t kept_lengths;
    /** Selection in several launches: `FASTKV_SELECT_STATE_BYTES` for each row, zero at first. */
    uint64_t states;
    /** Selection in several launches: u32 ranks, `rank_stride` for each row. */
    uint64_t ranks;
    /** Selection in several launches: two u32 for each block of each row. */
    uint64_t splits;
    /** Elements of `ranks` from one row to the next, a multiple of 4. */
    int64_t rank_stride;
    /** The most keys of a sequence. */
    int32_t keys;
    /** Keys at the end of a sequence that have no score. */
    int32_t window;
    /** Of those, how many are kept. */
    int32_t tail;
    /** Keys at the beginning of a sequence that are kept. */
    int32_t sinks;
    /** Rows of each sequence. */
    int32_t rows;
    /** Groups of score heads of each row. */
    int32_t groups;
    /** Score heads of each group, which are summed. */
    int32_t heads;
    /** `FASTKV_REDUCTION_SUM` or `FASTKV_REDUCTION_MAX` over the groups of a row. */
    int32_t reduction;
    /** Pooling of the scores of each score head. */
    fastkv_pooling pooling;
    /** Keys of a page; 1 selects keys. */
    int32_t page;
    /** Items to keep. */
    int32_t count;
    /** Room for items in each row of `kept`. */
    int32_t capacity;
    /** Selection in several launches: items of a block, a multiple of 4. */
    int32_t chunk;
    /** `fastkv_select_digit`: which digit of the ranks, 1 or 2. */
    int32_t digit;
    /** Always 0. */
    int32_t reserved;
} fastkv_select_params;

#endif
