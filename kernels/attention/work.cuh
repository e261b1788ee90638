// The order of work in a persistent grid: blocks take items from one queue until it is empty.
//
// First come the tiles of queries, section after section of kv heads, in a section the last tile of
// every sequence, then the one before: the longest first, and with them those that hold observation
// windows. Query heads that share keys are neighbours. Then come the score items.
//
// A score item waits until the tiles of its window are done. That cannot deadlock: items are taken in
// order, so all those tiles were taken before, by blocks that run; tiles of queries wait for nothing,
// and a block that has taken a tile ahead of time is at work on another tile, never on a score item.
#pragma once

#include "batch.cuh"
#include "primitives/signal.cuh"

// The same number, but what is computed from it is computed anew each time: while keys go by registers
// are dearer than a few operations.
__device__ __forceinline__ int32_t fresh(int32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}

// Queries or keys of the batch.
struct Axis {
    uint64_t cu_seqlens;
    uint64_t lengths;
    int32_t tokens;
    int32_t longest;
    int32_t sequences;

    __device__ __forceinline__ Span span(int32_t sequence) const {
        Span span = span_of(cu_seqlens, tokens, longest, sequence);
        span.tokens = keys_of(span, lengths, sequence);
        return span;
    }

    __device__ __forceinline__ bool all_are_equal() const { return !cu_seqlens && !lengths; }

    __device__ __forceinline__ int32_t tiles(int32_t sequence, int32_t size) const {
        const int32_t length = fresh(span(sequence).tokens);
        return length / size + (length % size != 0);
    }

    // Over all sequences, counting at most `most` of each. For a whole warp.
    __device__ __forceinline__ int32_t total_tiles(int32_t size, int32_t most) const {
        if (all_are_equal()) {
            return sequences * min(tiles(0, size), most);
        }
        int32_t sum = 0;
#pragma unroll 1
        for (int32_t sequence = threadIdx.x % 32; sequence < sequences; sequence += 32) {
            sum += min(tiles(sequence, size), most);
        }
        return __reduce_add_sync(~0u, sum);
    }
};

__device__ __forceinline__ Axis query_axis(const fastkv_prefill_attention_params& p) {
    return {p.cu_seqlens_q, 0, p.q_tokens, p.max_q_tokens, p.sequences};
}

__device__ __forceinline__ Axis key_axis(const fastkv_prefill_attention_params& p) {
    return {p.cu_seqlens_k, p.k_lengths, p.k_tokens, p.max_k_tokens, p.sequences};
}

// A tile of tokens: `index` counts from the sequence's first.
struct Tile {
    int32_t sequence;
    int32_t index;
};

// Tile `number` in the order: last tile of every sequence, the one before of every sequence that has
// one, and so on. For a whole warp.
__device__ __forceinline__ Tile tile_at(const Axis& axis, int32_t size, int32_t number) {
    if (axis.all_are_equal()) {
        const int32_t sequences = fresh(axis.sequences);
        return {number % sequences, axis.tiles(0, size) - 1 - number / sequences};
    }
    // The largest rank before which no more than `number` tiles stand.
    int32_t rank = 0;
    for (int32_t above = axis.longest / size + 1; above - rank > 1;) {
        const int32_t middle = rank + (above - rank) / 2;
        if (axis.total_tiles(size, middle) <= number) {
            rank = middle;
        } else {
            above = middle;
        }
    }
    // Among the sequences that are that long, the one so many places on.
    int32_t place = number - axis.total_tiles(size, rank);
    const int32_t lane = threadIdx.x % 32;
    for (int32_t first = 0;; first += 32) {
        const int32_t sequence = first + lane;
        const int32_t tiles = sequence < axis.sequences ? axis.tiles(sequence, size) : 0;
        const uint32_t long_enough = __ballot_sync(~0u, tiles > rank);
        const int32_t before = __popc(long_enough & ((1u << lane) - 1));
        const uint32_t found = __ballot_sync(~0u, tiles > rank && before == place);
        if (found) {
            const int32_t owner = __ffs(found) - 1;
            return {first + owner, __shfl_sync(~0u, tiles, owner) - 1 - rank};
        }
        place -= __popc(long_enough);
    }
}

// The next item of the queue. For one thread.
__device__ __forceinline__ int32_t take_item(const fastkv_prefill_attention_params& p) {
    return atomicAdd(reinterpret_cast<int32_t*>(p.queue), 1);
}

// How many items there are of each kind.
struct Work {
    int32_t query_tiles; // of one head
    int32_t tile_items;
    int32_t items;

    // For a whole warp, which may share the struct.
    __device__ __forceinline__ void count(const fastkv_prefill_attention_params& p, int32_t tile_rows) {
        const int32_t of_queries = query_axis(p).total_tiles(tile_rows, INT32_MAX);
        const int32_t of_keys =
            p.scores ? key_axis(p).total_tiles(p.score_keys, INT32_MAX) : 0;
        if (threadIdx.x % 32 == 0) {
            query_tiles = of_queries;
            tile_items = of_queries * p.query_heads;
            items = tile_items + of_keys * p.kv_heads;
        }
        __syncwarp();
    }
};

// A tile of queries of one head.
struct QueryTile {
    int32_t head;
    Tile tile;
};

// For a whole warp; `item` is below `work.tile_items`.
__device__ __forceinline__ QueryTile query_tile(const fastkv_prefill_attention_params& p, const Work& work,
                                                int32_t tile_rows, int32_t item) {
    const int32_t group = fresh(p.query_heads) / p.kv_heads;
    const int32_t section_items = work.query_tiles * p.section_heads * group;
    const int32_t first_head = item / section_items * p.section_heads;
    const int32_t heads = min(p.section_heads, p.kv_heads - first_head) * group;
    const int32_t place = item % section_items;
    return {first_head * group + place % heads, tile_at(query_axis(p), tile_rows, place / heads)};
}

// A stretch of `score_keys` keys of one kv head.
struct ScoreItem {
    int32_t kv_head;
    Tile keys;
};

// For a whole warp; `item` counts from the first score item.
__device__ __forceinline__ ScoreItem score_item(const fastkv_prefill_attention_params& p, int32_t item) {
    return {item % p.kv_heads, tile_at(key_axis(p), p.score_keys, item / p.kv_heads)};
}

// The first tile of a sequence whose LSE scores need.
__device__ __forceinline__ int32_t first_window_tile(const fastkv_prefill_attention_params& p,
                                                     int32_t queries, int32_t tile_rows) {
    return max(0, queries - p.window) / tile_rows;
}

__device__ __forceinline__ uint64_t finished_tiles(const fastkv_prefill_attention_params& p,
                                                   int32_t sequence, int32_t kv_head) {
    return p.queue + 4 * (1 + int64_t(sequence) * p.kv_heads + kv_head);
}

// Tells that a tile of queries, or one of its `signals` parts, is done. For one thread, once all that work on
// it have written its LSE and met at a barrier.
__device__ __forceinline__ void signal_tile(const fastkv_prefill_attention_params& p, const QueryTile& item,
                                            int32_t queries, int32_t tile_rows) {
    if (p.scores && item.tile.index >= first_window_tile(p, queries, tile_rows)) {
        const int32_t kv_head = item.head / (p.query_heads / p.kv_heads);
        add_release(finished_tiles(p, item.tile.sequence, kv_head), 1);
    }
}

// Waits for the LSE of a window of every head of a GQA group. For one thread; a barrier has to follow.
template <int32_t signals>
__device__ __forceinline__ void wait_for_window(const fastkv_prefill_attention_params& p,
                                                const ScoreItem& item, int32_t queries, int32_t tile_rows) {
    const int32_t tiles = (queries + tile_rows - 1) / tile_rows - first_window_tile(p, queries, tile_rows);
    wait_acquire(finished_tiles(p, item.keys.sequence, item.kv_head), tiles * (p.query_heads / p.kv_heads) * signals);
}
