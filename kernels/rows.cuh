// Rows of 16-bit elements in shared memory, as `cp_async` brings them and `ldmatrix` takes them.
#pragma once

#include <stdint.h>

// Rows of d elements, 16-byte chunks swizzled so that the same chunk of 8 rows in succession lies in 8
// different groups of banks. Buffers are aligned to 128 bytes.
template <int d>
struct Rows {
    static constexpr int CHUNKS = d / 8;
    static constexpr int BYTES = 2 * d;
    // Rows of 96 elements are 1.5 times as wide as all banks: two rows in succession differ already.
    static constexpr bool WHOLE = d % 64 == 0;

    static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
        return row * BYTES + (chunk ^ (WHOLE ? row & 7 : row >> 1 & 3)) * 16;
    }

    // From chunk c of a row to chunk c + 2 `step`, where c is 0 or 1.
    static __device__ __forceinline__ uint32_t advance(uint32_t offset, int step) {
        constexpr int SWIZZLED = WHOLE ? 0x60 : 0x20;
        return (offset ^ (step * 32 & SWIZZLED)) + (step * 32 & ~SWIZZLED);
    }
};
