// Score items: what the blocks of an attention kernel do when the tiles of queries are taken.
#pragma once

#include "attention/work.cuh"
#include "scoring/window.cuh"

// Scores of one stretch of keys, once the LSE of the window is known. For the `warps` warps that are left of
// the block, which have met since shared memory was used last; tiles of queries have `tile_rows` rows and tell
// `signals` times that they are done.
template <typename T, int d, bool may_be_paged, int warps, int32_t tile_rows, int32_t signals>
__device__ __forceinline__ void score(const fastkv_prefill_attention_params& p, const ScoreItem& item,
                                      uint32_t shared) {
    const int32_t sequence = item.keys.sequence;
    const Window window = window_of<may_be_paged>(p, sequence, item.kv_head);
    const ScoreRows out = score_rows_of(p, sequence, item.kv_head);
    const int32_t first = item.keys.index * p.score_keys;
    WindowScores<T, d, warps>::run(window, out, first, first + p.score_keys, shared, p.score_slots, {}, [&] {
        if (threadIdx.x == 0) {
            wait_for_window<signals>(p, item, query_axis(p).span(sequence).tokens, tile_rows);
        }
        __syncthreads();
    });
}
