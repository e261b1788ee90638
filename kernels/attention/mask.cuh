// Which keys a row sees, and which carry the bias.
#pragma once

#include "attention/work.cuh"

#include <math_constants.h>

// The last key that query `row` of a sequence sees, within its keys; -1 for none.
__device__ __forceinline__ int32_t last_key(const fastkv_prefill_attention_params& p, const Span& queries,
                                            const Span& keys, int32_t row) {
    const int32_t last = p.positions
                             ? __ldg(reinterpret_cast<const int32_t*>(p.positions) + queries.row + row)
                             : row + keys.tokens - queries.tokens;
    return max(-1, min(last, keys.tokens - 1));
}

// Whether a bit is set in a row of words.
__device__ __forceinline__ bool bit(uint64_t words, int32_t index) {
    return __ldg(reinterpret_cast<const uint32_t*>(words) + index / 32) >> (index % 32) & 1;
}

__device__ __forceinline__ bool is_biased(const fastkv_prefill_attention_params& p, int32_t head) {
    return p.bias_heads && p.bias_keys && p.bias != 0.0f && bit(p.bias_heads, head);
}

// The bits of a sequence's keys, a bit each.
__device__ __forceinline__ const uint32_t* bias_words(const fastkv_prefill_attention_params& p, int32_t sequence) {
    return reinterpret_cast<const uint32_t*>(p.bias_keys) + sequence * p.bias_key_stride;
}

// Those of keys first..first + 32, `first` a multiple of 32; none past the sequence's end.
__device__ __forceinline__ uint32_t biased_keys(const uint32_t* words, int32_t first, int32_t keys) {
    return first < keys ? __ldg(words + first / 32) : 0;
}

// Adds `bias` to the logits of biased keys: bit c of `words` is column c.
template <int blocks>
__device__ __forceinline__ void add_bias(float (&s)[blocks][4], const uint32_t (&words)[blocks / 4],
                                         float bias) {
    const int32_t column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int j = 0; j < blocks; ++j) {
        const uint32_t bits = words[j / 4] >> (8 * (j % 4) + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s[j][i] = bits >> (i % 2) & 1 ? s[j][i] + bias : s[j][i];
        }
    }
}

// The first of a sequence's first `keys` keys without a page, among those of every `step`-th page from `page` on;
// INT32_MAX where all have one.
__device__ __forceinline__ int32_t first_absent(const fastkv_pages& pages, int32_t sequence, int32_t keys, int32_t page,
                                                int32_t step) {
    int32_t found = INT32_MAX;
#pragma unroll 8
    for (int64_t key = int64_t(page) * pages.page_size; key < keys; key += int64_t(step) * pages.page_size) {
        found = page_of(pages, sequence, int32_t(key)) < 0 ? min(found, int32_t(key)) : found;
    }
    return found;
}

// Hides absent keys: bit c of `words` is column c.
template <int blocks>
__device__ __forceinline__ void hide_absent(float (&s)[blocks][4], const uint32_t (&words)[blocks / 4]) {
    const int32_t column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int j = 0; j < blocks; ++j) {
        const uint32_t bits = words[j / 4] >> (8 * (j % 4) + column);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            s[j][i] = bits >> (i % 2) & 1 ? -CUDART_INF_F : s[j][i];
        }
    }
}

// Hides the columns past `last` of a lane's two rows: columns that they do not see.
template <int blocks>
__device__ __forceinline__ void hide(float (&s)[blocks][4], int32_t last0, int32_t last1) {
    // Relative to the lane's first column, so that every column compares with a constant.
    const int32_t column = 2 * (threadIdx.x % 4);
    last0 -= column;
    last1 -= column;
#pragma unroll
    for (int j = 0; j < blocks; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            s[j][i] = 8 * j + i > last0 ? -CUDART_INF_F : s[j][i];
            s[j][2 + i] = 8 * j + i > last1 ? -CUDART_INF_F : s[j][2 + i];
        }
    }
}
