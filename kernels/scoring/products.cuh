// Products of keys with the queries of a window: what scores and LSE of a window are made of.
//
// The product is turned around, S^T = K Q^T, so that keys stand in rows. Every warp has 32 keys (16 where
// d = 256) of its own; it holds them in registers while it walks over the queries, so that the next
// ones can already be on their way to the same place in shared memory. Columns are tiles of 8 queries
// of one head, padded where the window ends, head after head.
#pragma once

#include "../abi.h"
#include "../cache.cuh"
#include "../primitives/cp_async.cuh"
#include "../primitives/ldmatrix.cuh"
#include "../primitives/mma.cuh"
#include "../primitives/shared.cuh"
#include "../rows.cuh"

#include <math_constants.h>

// The queries of a window of one (sequence, kv head), and the keys. Strides count elements; token
// counts are at most 2^30, tiles of all heads together at most 2^31.
struct Window {
    uint64_t q; // first query of the window, first head of the group
    int64_t q_head_stride;
    int64_t q_token_stride;
    uint64_t k; // first key of the sequence, or where there are pages the first slot of page 0
    int64_t k_token_stride;
    fastkv_pages pages; // table 0: there are none, and neither are the next two
    int64_t k_page_stride;
    int32_t sequence; // of the table
    const float* lse; // first query of the window, first head of the group; or null
    int64_t lse_head_stride;
    int64_t lse_token_stride;
    float lse_factor; // makes an LSE a logarithm of base 2
    const int32_t* positions; // the last key that each query of the window sees; or null
    int32_t first_sees;       // where positions is null: the last key that the first query sees
    int32_t queries;
    int32_t heads; // query heads of the group
    int32_t keys;
    const uint32_t* bias_heads; // a bit for each query head of the layer; or null
    const uint32_t* bias_keys;  // a bit for each key of the sequence; or null
    int32_t first_head;         // of the group, for bias_heads
    float bias;
    float scale;

    // Tiles of 8 queries for each head; one of padding where there are no queries.
    __device__ __forceinline__ int32_t tiles() const { return (queries - 1) / 8 + 1; }
};

constexpr float LOG2_E = 1.44269504f;

// Products of `warps` warps, which are the block.
template <typename T, int d, int warps>
struct WindowProducts {
    // Fragments of 16 keys for each warp.
    static constexpr int M = d == 256 ? 1 : 2;
    static constexpr int WARP_KEYS = 16 * M;
    // Keys of a step of the block.
    static constexpr int STEP = warps * WARP_KEYS;
    // A slot of shared memory holds that many tiles, with LSE and last key of every column.
    static constexpr int SLOT_TILES = 8;
    static constexpr int SLOT_COLUMNS = 8 * SLOT_TILES;
    static constexpr int KEY_BYTES = STEP * Rows<d>::BYTES;
    static constexpr int SLOT_BYTES = SLOT_COLUMNS * (Rows<d>::BYTES + 8);

    // Lanes that copy a row: their chunks together are 128 bytes, or 64 where rows are 192.
    static constexpr int LANES = Rows<d>::WHOLE ? 8 : 4;

    const Window& window;
    uint32_t queries; // shared memory: columns, their LSE, the last key that each sees
    uint32_t lse;
    uint32_t sees;
    uint32_t warp_keys;            // shared memory of this warp's keys
    uint32_t fragments[M][d / 16][4]; // this warp's keys

    __device__ __forceinline__ WindowProducts(const Window& window, uint32_t shared, int32_t slots)
        : window(window), queries(shared + KEY_BYTES),
          lse(queries + slots * SLOT_COLUMNS * Rows<d>::BYTES), sees(lse + slots * SLOT_COLUMNS * 4),
          warp_keys(shared + threadIdx.x / 32 * (WARP_KEYS * Rows<d>::BYTES)) {}

    // The first key of this warp in a step.
    static __device__ __forceinline__ int32_t warp_first(int32_t step) {
        return step + threadIdx.x / 32 * WARP_KEYS;
    }

    // The page of this lane's key of a step, below 0 where there is none: asked for a step before it is needed.
    __device__ __forceinline__ int32_t page_at(int32_t step, int32_t end) const {
        const int lane = threadIdx.x % 32;
        const int32_t key = warp_first(step) + lane;
        return window.pages.table && lane < WARP_KEYS && key < end
                   ? page_of(window.pages, window.sequence, key)
                   : -1;
    }

    // Copies this warp's keys of a step, given `page_at`, without waiting; zeros for those from `end` on and for
    // those without a page. Returns a bit for each key, set unless it has no page.
    __device__ __forceinline__ uint32_t load_keys(int32_t step, int32_t end, int32_t page) const {
        constexpr int ROWS = 32 / LANES;
        const int lane = threadIdx.x % 32;
        const int32_t first = warp_first(step);
        if (!window.pages.table) {
#pragma unroll
            for (int pass = 0; pass < WARP_KEYS / ROWS; ++pass) {
                const int row = pass * ROWS + lane / LANES;
                const bool wanted = first + row < end;
                copy_key(row, (wanted ? first + row : 0) * window.k_token_stride, wanted);
            }
            return ~0u;
        }
        const int32_t slot = uint32_t(first + lane) % uint32_t(window.pages.page_size);
#pragma unroll
        for (int pass = 0; pass < WARP_KEYS / ROWS; ++pass) {
            const int row = pass * ROWS + lane / LANES;
            const int32_t of_row = __shfl_sync(~0u, page, row);
            const int64_t in_page = __shfl_sync(~0u, slot, row) * window.k_token_stride;
            const bool wanted = of_row >= 0;
            copy_key(row, wanted ? of_row * window.k_page_stride + in_page : 0, wanted);
        }
        return __ballot_sync(~0u, page >= 0);
    }

    // Copies this lane's part of a key that stands so many elements behind the first, or of zeros.
    __device__ __forceinline__ void copy_key(int row, int64_t element, bool wanted) const {
        const uint64_t key = window.k + 2 * element;
#pragma unroll
        for (int chunk = threadIdx.x % LANES; chunk < Rows<d>::CHUNKS; chunk += LANES) {
            cp_async(warp_keys + Rows<d>::offset(row, chunk), key + chunk * 16, wanted);
        }
    }

    // Copies `count` tiles to slots from `slot` on without waiting: those from `tile` on when each head has
    // `head_tiles`, the first of them `skipped`. Behind an odd one, which is the last of all, stands padding.
    __device__ __forceinline__ void load_queries(int32_t slot, int32_t tile, int32_t count, int32_t skipped,
                                                 int32_t head_tiles) const {
        constexpr int ROWS = warps * 32 / LANES;
        const int32_t columns = (count + 1) / 2 * 16;
#pragma unroll 1
        for (int32_t column = threadIdx.x / LANES; column < columns; column += ROWS) {
            const int32_t in_order = tile + column / 8;
            const int32_t head = in_order / head_tiles;
            const int32_t query = (skipped + in_order % head_tiles) * 8 + column % 8;
            const bool wanted = head < window.heads && query < window.queries;
            const int32_t row = slot * SLOT_COLUMNS + column;
            const uint64_t from =
                window.q + (wanted ? 2 * (head * window.q_head_stride + query * window.q_token_stride) : 0);
#pragma unroll
            for (int chunk = threadIdx.x % LANES; chunk < Rows<d>::CHUNKS; chunk += LANES) {
                cp_async(queries + Rows<d>::offset(row, chunk), from + chunk * 16, wanted);
            }
            if (threadIdx.x % LANES == 0) {
                if (wanted && window.lse) {
                    cp_async_word(lse + row * 4, uint64_t(window.lse + head * window.lse_head_stride +
                                                          query * window.lse_token_stride));
                } else {
                    store_shared(lse + row * 4, 0);
                }
                if (wanted && window.positions) {
                    cp_async_word(sees + row * 4, uint64_t(window.positions + query));
                } else {
                    store_shared(sees + row * 4, wanted ? window.first_sees + query : -1);
                }
            }
        }
    }

    // Takes this warp's keys into registers. What was copied has arrived, for every lane.
    __device__ __forceinline__ void take_keys() {
        const int lane = threadIdx.x % 32;
        const uint32_t first = warp_keys + Rows<d>::offset(lane % 16, lane / 16);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int step = 0; step < d / 16; ++step) {
                ldmatrix(fragments[m][step], Rows<d>::advance(first, step) + m * 16 * Rows<d>::BYTES);
            }
        }
    }

    // Products with two neighbouring tiles, from `column` of shared memory on.
    __device__ __forceinline__ void multiply(int32_t column, float (&s)[2][M][4]) const {
        const int lane = threadIdx.x % 32;
        const uint32_t first = queries + Rows<d>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2) +
                               column * Rows<d>::BYTES;
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[0][m][i] = 0.0f;
                s[1][m][i] = 0.0f;
            }
        }
#pragma unroll
        for (int step = 0; step < d / 16; ++step) {
            uint32_t b[4];
            ldmatrix(b, Rows<d>::advance(first, step));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma<T>(s[0][m], fragments[m][step], b[0], b[1]);
                mma<T>(s[1][m], fragments[m][step], b[2], b[3]);
            }
        }
    }

    // What the bias adds to the logits of this lane's keys, in powers of two: key lane / 4 of the warp and
    // those 8 rows apart. Returns whether it adds anything to any key of the warp.
    __device__ __forceinline__ bool key_bias(int32_t step, int32_t end, float (&bias)[M][2]) const {
        const int32_t first = warp_first(step);
        uint32_t bits = 0;
        if (window.bias_heads && window.bias_keys && window.bias != 0.0f && first < end) {
            // The keys of a warp that has 16 may begin in the middle of a word.
            bits = __ldg(window.bias_keys + first / 32) >> first % 32;
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * m + 8 * half + threadIdx.x % 32 / 4;
                bias[m][half] = bits >> row & 1 ? window.bias * LOG2_E : 0.0f;
            }
        }
        return bits != 0;
    }

    // Whether the bias applies to a head of the group, where `key_bias` adds any.
    __device__ __forceinline__ bool head_is_biased(int32_t head) const {
        const int32_t index = window.first_head + head;
        return __ldg(window.bias_heads + index / 32) >> (index % 32) & 1;
    }
};
