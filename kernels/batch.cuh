// How a batch lies in memory: what attention, and scores by themselves, have in common. Both kinds of
// parameter structs name these things alike.
#pragma once

#include "abi.h"
#include "lse.cuh"
#include "scoring/window.cuh"

// The tokens of one sequence.
struct Span {
    int32_t first; // on the token axis of a tensor in which sequences have a stride
    int32_t tokens;
    int64_t row; // where all sequences stand in one row: LSE, positions
};

// Clipped to the tensor and to `longest`, whatever cu_seqlens holds.
__device__ __forceinline__ Span span_of(uint64_t cu_seqlens, int32_t tokens, int32_t longest,
                                        int32_t sequence) {
    if (!cu_seqlens) {
        return {0, tokens, int64_t(sequence) * tokens};
    }
    const int32_t* begin = reinterpret_cast<const int32_t*>(cu_seqlens) + sequence;
    const int32_t first = __ldg(begin);
    const int32_t end = min(__ldg(begin + 1), tokens);
    if (first < 0 || end <= first) {
        return {0, 0, 0};
    }
    return {first, min(end - first, longest), first};
}

// The keys of a sequence, of which there may be fewer than its span has room for.
__device__ __forceinline__ int32_t keys_of(const Span& span, uint64_t lengths, int32_t sequence) {
    return lengths ? max(0, min(span.tokens, __ldg(reinterpret_cast<const int32_t*>(lengths) + sequence)))
                   : span.tokens;
}

// The address of a row of 16-bit elements.
__device__ __forceinline__ uint64_t row_address(const fastkv_rows& rows, int32_t sequence, int32_t head,
                                                int32_t token) {
    return rows.base +
           2 * (sequence * rows.sequence_stride + head * rows.head_stride + token * rows.token_stride);
}

// The address of a key or value of a sequence whose first stands at `first` of the token axis; of one in pages, or 0
// where there is no page.
__device__ __forceinline__ uint64_t token_address(const fastkv_rows& rows, const fastkv_pages& pages, int32_t first,
                                                  int32_t sequence, int32_t head, int32_t token) {
    if (!pages.table) {
        return row_address(rows, sequence, head, first + token);
    }
    const int32_t page = page_of(pages, sequence, token);
    return page < 0 ? 0 : row_address(rows, page, head, uint32_t(token) % uint32_t(pages.page_size));
}

// The last `p.window` queries of a sequence for the heads of a GQA group, and its keys, which lie in pages where there
// are any, or never: then nothing of pages is compiled.
template <bool may_be_paged = true, typename Params>
__device__ __forceinline__ Window window_of(const Params& p, int32_t sequence, int32_t kv_head) {
    const Span queries = span_of(p.cu_seqlens_q, p.q_tokens, p.max_q_tokens, sequence);
    const int32_t count = min(queries.tokens, p.window);
    const int32_t first = queries.tokens - count;
    const int32_t heads = p.query_heads / p.kv_heads;
    Window window;
    window.q = row_address(p.q, sequence, kv_head * heads, queries.first + first);
    window.q_head_stride = p.q.head_stride;
    window.q_token_stride = p.q.token_stride;
    const Span keys = span_of(p.cu_seqlens_k, p.k_tokens, p.max_k_tokens, sequence);
    window.keys = keys_of(keys, p.k_lengths, sequence);
    window.pages = p.pages;
    window.pages.table = may_be_paged ? p.pages.table : 0;
    window.sequence = sequence;
    window.k_page_stride = p.k.sequence_stride;
    window.k =
        window.pages.table ? row_address(p.k, 0, kv_head, 0) : row_address(p.k, sequence, kv_head, keys.first);
    window.k_token_stride = p.k.token_stride;
    window.lse = reinterpret_cast<const float*>(p.lse.base) +
                 lse_place(p.lse, sequence, queries.row, kv_head * heads, first);
    window.lse_head_stride = p.lse.head_stride;
    window.lse_token_stride = p.lse.token_stride;
    window.lse_factor = p.lse.logarithm == FASTKV_LOGARITHM_BINARY ? 1.0f : LOG2_E;
    window.positions =
        p.positions ? reinterpret_cast<const int32_t*>(p.positions) + queries.row + first : nullptr;
    window.first_sees = window.keys - count;
    window.queries = count;
    window.heads = heads;
    window.bias_heads = reinterpret_cast<const uint32_t*>(p.bias_heads);
    window.bias_keys =
        p.bias_keys ? reinterpret_cast<const uint32_t*>(p.bias_keys) + sequence * p.bias_key_stride : nullptr;
    window.first_head = kv_head * heads;
    window.bias = p.bias;
    window.scale = p.scale;
    return window;
}

// Where the scores of a GQA group go.
template <typename Params>
__device__ __forceinline__ ScoreRows score_rows_of(const Params& p, int32_t sequence, int32_t kv_head) {
    const bool group_sum = p.score_heads < p.query_heads;
    const int32_t heads = group_sum ? 1 : p.query_heads / p.kv_heads;
    float* scores = reinterpret_cast<float*>(p.scores) + sequence * p.score_sequence_stride;
    return {scores + kv_head * heads * p.score_head_stride, p.score_head_stride, group_sum};
}
