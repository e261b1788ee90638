// Where the LSE of queries lies, and how it is stored.
#pragma once

#include "abi.h"

// Elements before that of a query, which counts from its sequence's first; `row` is that one's place where all
// sequences stand in one row.
__device__ __forceinline__ int64_t lse_place(const fastkv_lse& lse, int32_t sequence, int64_t row, int32_t head,
                                             int32_t query) {
    const int64_t token = (lse.sequence_stride ? 0 : row) + query;
    return sequence * lse.sequence_stride + head * lse.head_stride + token * lse.token_stride;
}

// Stores the LSE of a query, given its natural logarithm.
__device__ __forceinline__ void store_lse(const fastkv_lse& lse, int64_t place, float natural) {
    constexpr float log2_e = 1.44269504f;
    reinterpret_cast<float*>(lse.base)[place] =
        lse.logarithm == FASTKV_LOGARITHM_BINARY ? natural * log2_e : natural;
}
