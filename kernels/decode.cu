// Attention of the newest tokens over the compact cache, with their keys and values appended in passing.
//
// Memory decides: every key and value is read once, for all heads of its GQA group. A list is cut into
// chunks (flash decoding), the blocks of a fixed grid share all chunks of the batch, and the block that
// finishes the last chunk of a list merges them.
//
// Lengths are read by every block at its start and advanced by the last block of the grid at its end;
// new keys and values are read where the caller has them, so nobody reads a row that is written.
//
// Values that are not finite: a key that a row does not see adds nothing to it, whatever it holds. Of several new
// tokens the first do not see the last, and their probability of 0 times such a value would be NaN. So these few
// values are taken out of the products, and added when a chunk is done to the rows that see them: the loop over
// what all rows see has nothing of it.

#include "abi.h"
#include "decode/softmax.cuh"
#include "decode/work.cuh"
#include "lse.cuh"
#include "primitives/convert.cuh"
#include "primitives/cp_async.cuh"
#include "primitives/global.cuh"
#include "primitives/ldmatrix.cuh"
#include "primitives/mma.cuh"
#include "primitives/shared.cuh"
#include "primitives/signal.cuh"

static_assert(sizeof(fastkv_cache) == 144, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_decode_params) == 408, "src/abi.rs was generated for another layout");

namespace {

constexpr float LOG2_E = 1.44269504f;
constexpr int32_t WARP_KEYS = FASTKV_DECODE_WARP_KEYS;

// What a block holds in shared memory: two stages of keys and values, and the queries of two items.
// Rows are 16 bytes longer than they need be, so that eight neighbours lie in different banks. A warp
// fills and reads its own keys alone, and waits for no other warp until the item ends.
template <int d>
struct Shape {
    // Two warps where rows are long, so that several blocks fit an SM.
    static constexpr int32_t warps = d > 128 ? 2 : 4;
    static constexpr int32_t threads = 32 * warps;
    static constexpr int32_t tile_keys = warps * WARP_KEYS;
    static constexpr int32_t vectors = d / 8; // of a row
    static constexpr int32_t row = 2 * d + FASTKV_VECTOR_BYTES;
    static constexpr int32_t values = WARP_KEYS * row; // where they begin behind a warp's keys
    static constexpr int32_t warp_bytes = 2 * values;
    static constexpr int32_t stage = warps * warp_bytes;
    static constexpr int32_t queries = 2 * stage;

    // When an item ends its last stage holds each warp's result instead: rows of f32, so long that the
    // lanes of a warp write to different banks, then maximum and sum of each row.
    static constexpr int32_t result_row = d + 4;
    static constexpr int32_t statistics = FASTKV_DECODE_QUERIES * result_row * 4;
    static_assert(statistics + FASTKV_DECODE_QUERIES * 8 <= warp_bytes, "a result fits the stage");
    static constexpr int32_t factor_row = FASTKV_DECODE_CHUNKS + 1; // rows of factors for a merge
    static_assert(FASTKV_DECODE_QUERIES * factor_row * 4 <= stage, "merge factors fit the stage");
    static_assert(FASTKV_DECODE_BLOCK_KEYS % tile_keys == 0, "a chunk is whole tiles");
};

__device__ __forceinline__ uint64_t row_address(const fastkv_rows& rows, int32_t sequence, int32_t head,
                                                int32_t token) {
    return rows.base +
           2 * (sequence * rows.sequence_stride + head * rows.head_stride + token * rows.token_stride);
}

// One row of a query tile.
struct Row {
    int32_t token;
    int32_t head;

    __device__ __forceinline__ Row(const fastkv_decode_params& p, const Cursor& at, int32_t row) {
        const int32_t of_list = at.query_tile * p.queries + row;
        token = of_list / p.group;
        head = at.list.head(p.cache) * p.group + of_list % p.group;
    }

    __device__ __forceinline__ uint64_t address(const fastkv_rows& rows, int32_t sequence) const {
        return row_address(rows, sequence, head, token);
    }
};

__device__ __forceinline__ int32_t rows_of(const fastkv_decode_params& p, const Cursor& at) {
    return min(p.queries, p.group * p.tokens - at.query_tile * p.queries);
}

__device__ __forceinline__ bool bit(uint64_t words, int32_t index) {
    return __ldg(reinterpret_cast<const uint32_t*>(words) + index / 32) >> (index % 32) & 1;
}

template <bool paged>
__device__ __forceinline__ bool is_biased(const fastkv_decode_params& p, const List& l, int32_t entry,
                                          const Place<paged>& place) {
    const int32_t* positions = reinterpret_cast<const int32_t*>(p.cache.positions);
    const int32_t position = positions ? positions[place.row(p.cache, l.head(p.cache))] : entry;
    return uint32_t(position) < uint32_t(p.bias_positions) &&
           bit(p.bias_keys + 4 * l.sequence(p.cache) * p.bias_key_stride, position);
}

// Two bits for each of a warp's keys: whether it is there, and 16 bits up whether it is biased.
struct Keys {
    static constexpr uint32_t all = (1u << WARP_KEYS) - 1;
    uint32_t bits;

    __device__ __forceinline__ uint32_t present() const { return bits & all; }
    __device__ __forceinline__ uint32_t biased() const { return bits >> 16; }
};
static_assert(WARP_KEYS == 16, "two bits for each key");

// Begins to load a warp's keys, or values, that lie one behind the other.
template <int d>
__device__ __forceinline__ void load_neighbours(const fastkv_rows& rows, int64_t offset, uint32_t shared) {
    using S = Shape<d>;
    const int32_t lane = threadIdx.x % 32;
    // Copies of a warp after which it is at the beginning of a row again, and the rows until there.
    constexpr int32_t period = 32 % S::vectors == 0 ? 1 : S::vectors / 4;
    constexpr int32_t step = 32 * period / S::vectors;
    static_assert(step * S::vectors == 32 * period && WARP_KEYS % step == 0, "whole rows");
#pragma unroll
    for (int32_t i = 0; i < period; ++i) {
        const int32_t row = (i * 32 + lane) / S::vectors;
        const int32_t byte = (i * 32 + lane) % S::vectors * FASTKV_VECTOR_BYTES;
        uint64_t from = rows.base + 2 * (offset + row * rows.token_stride) + byte;
#pragma unroll
        for (int32_t j = 0; j < WARP_KEYS; j += step) {
            cp_async(shared + (row + j) * S::row + byte, from, true);
            from += 2 * step * rows.token_stride;
        }
    }
}

// Begins to load a warp's keys and values of a tile. Absent ones become zeros.
template <int d, bool paged>
__device__ __forceinline__ Keys load_keys(const fastkv_decode_params& p, const Cursor& at, uint32_t shared) {
    using S = Shape<d>;
    const int32_t lane = threadIdx.x % 32;
    const int32_t warp = threadIdx.x / 32;
    shared += warp * S::warp_bytes;
    // Most are entries of one page, or of a ragged list: no lane has to look for its own.
    const int32_t first = at.key + warp * WARP_KEYS;
    if (first + WARP_KEYS <= at.list.length && !p.bias_heads &&
        (!paged || p.cache.pages.page_size % WARP_KEYS == 0)) {
        const Place<paged> place(p.cache, at.list, first);
        if (place.page >= 0) {
            const int32_t head = paged ? at.list.head(p.cache) : 0;
            load_neighbours<d>(p.cache.k, place.offset(p.cache.k, head), shared);
            load_neighbours<d>(p.cache.v, place.offset(p.cache.v, head), shared + S::values);
            return {Keys::all};
        }
    }
    // Half the lanes look up keys, half values; which is which is told when they are copied.
    const bool is_value = lane >= WARP_KEYS;
    const int32_t entry = first + lane % WARP_KEYS;
    uint64_t address = 0;
    bool biased = false;
    if (entry < at.list.length) {
        const Place<paged> place(p.cache, at.list, entry);
        if (place.page >= 0) {
            const fastkv_rows& rows = is_value ? p.cache.v : p.cache.k;
            address = rows.base + 2 * place.offset(rows, at.list.head(p.cache));
            biased = p.bias_heads && is_biased(p, at.list, entry, place);
        }
    } else if (entry < keys_of(p, at.list)) {
        address = row_address(is_value ? p.v_new : p.k_new, at.list.sequence(p.cache), at.list.head(p.cache),
                              entry - at.list.length);
    }
#pragma unroll
    for (int32_t i = 0; i < 2 * WARP_KEYS * S::vectors / 32; ++i) {
        const int32_t row = (i * 32 + lane) / S::vectors; // values follow keys
        const int32_t byte = (i * 32 + lane) % S::vectors * FASTKV_VECTOR_BYTES;
        const uint64_t from = __shfl_sync(~0u, address, row);
        cp_async(shared + row * S::row + byte, from + byte, from != 0);
    }
    return {(__ballot_sync(~0u, address != 0) & Keys::all) | __ballot_sync(~0u, biased) << 16};
}

// Begins to load the queries of an item; rows behind the last are zeros.
template <int d, int tiles>
__device__ __forceinline__ void load_queries(const fastkv_decode_params& p, const Cursor& at,
                                             uint32_t shared) {
    using S = Shape<d>;
    const int32_t rows = rows_of(p, at);
    for (int32_t vector = threadIdx.x; vector < 8 * tiles * S::vectors; vector += S::threads) {
        const int32_t row = vector / S::vectors;
        const int32_t byte = vector % S::vectors * FASTKV_VECTOR_BYTES;
        const uint64_t from = Row(p, at, row).address(p.q, at.list.sequence(p.cache));
        cp_async(shared + row * S::row + byte, row < rows ? from + byte : p.q.base, row < rows);
    }
}

// Writes the new tokens of a chunk behind the list's last entry, for a whole block.
template <int d, bool paged>
__device__ __forceinline__ void append(const fastkv_decode_params& p, const Cursor& at) {
    using S = Shape<d>;
    const int32_t begin = max(at.begin(p), at.list.length);
    if (begin >= at.end || !has_room<paged>(p, at.list)) {
        return;
    }
    const int32_t head = at.list.head(p.cache);
    const int32_t sequence = at.list.sequence(p.cache);
    for (int32_t part = threadIdx.x; part < (at.end - begin) * S::vectors; part += S::threads) {
        const int32_t entry = begin + part / S::vectors;
        const int32_t byte = part % S::vectors * FASTKV_VECTOR_BYTES;
        const int32_t token = entry - at.list.length;
        const Place<paged> place(p.cache, at.list, entry);
        store(p.cache.k.base + 2 * place.offset(p.cache.k, head) + byte,
              load_once(row_address(p.k_new, sequence, head, token) + byte));
        store(p.cache.v.base + 2 * place.offset(p.cache.v, head) + byte,
              load_once(row_address(p.v_new, sequence, head, token) + byte));
        if (p.cache.positions && byte == 0) {
            const int32_t* positions = reinterpret_cast<const int32_t*>(p.positions_new);
            reinterpret_cast<int32_t*>(p.cache.positions)[place.row(p.cache, head)] =
                positions[int64_t(sequence) * p.tokens + token];
        }
    }
}

// Output of one warp, transposed: with g = lane / 4 and t = lane % 4, o[n][i] holds rows 8 n + 2 t and
// 8 n + 2 t + 1 at elements 16 i + g, and the same 8 elements on.
template <int d, int tiles>
struct Output {
    ColumnSoftmax<tiles> softmax;
    float o[tiles][d / 16][4] = {};
};

// Whether a warp took values that are not finite out of its part of a chunk; in shared memory, so that the loop does
// not carry it along.
__device__ __forceinline__ int32_t& taken_out() {
    __shared__ int32_t of_warp[4];
    return of_warp[threadIdx.x / 32];
}

// The first key that some new token does not see, or less.
__device__ __forceinline__ int32_t first_not_seen(const fastkv_decode_params& p, const Cursor& at) {
    return keys_of(p, at.list) - (p.tokens - 1);
}

// Puts zeros in the place of a warp's values that are not finite, from row `first` up to `end`.
template <typename T, int d>
__device__ __forceinline__ void take_out_not_finite(uint32_t values, int32_t first, int32_t end) {
    bool any = false;
#pragma unroll 1
    for (int32_t row = first; row < end; ++row) {
#pragma unroll 1
        for (int32_t word = threadIdx.x % 32; word < d / 2; word += 32) {
            const uint32_t address = values + row * Shape<d>::row + 4 * word;
            const uint32_t pair = load_shared(address);
            if (finite_part<T>(pair) != pair) {
                store_shared(address, finite_part<T>(pair));
                any = true;
            }
        }
    }
    if (__any_sync(~0u, any) && threadIdx.x % 32 == 0) {
        taken_out() = 1;
    }
    __syncwarp();
}

// Adds what was taken out of a chunk to four elements of a row, as far as the row sees it.
template <typename T, bool paged>
__device__ __forceinline__ float4 add_not_finite(const fastkv_decode_params& p, const Cursor& at, int32_t row,
                                                 int32_t element, float4 sum) {
    const int32_t sequence = at.list.sequence(p.cache);
    const int32_t head = at.list.head(p.cache);
    const int32_t end = min(at.end, first_not_seen(p, at) + Row(p, at, row).token);
#pragma unroll 1
    for (int32_t key = max(at.begin(p), first_not_seen(p, at)); key < end; ++key) {
        uint64_t from;
        if (key < at.list.length) {
            const Place<paged> place(p.cache, at.list, key);
            if (place.page < 0) {
                continue;
            }
            from = p.cache.v.base + 2 * place.offset(p.cache.v, head);
        } else {
            from = row_address(p.v_new, sequence, head, key - at.list.length);
        }
        const uint2 value = *reinterpret_cast<const uint2*>(from + 2 * element);
        const auto taken = [](uint32_t x) { return finite<T>(x) ? 0.0f : widen<T>(uint16_t(x)); };
        sum.x += taken(value.x);
        sum.y += taken(value.x >> 16);
        sum.z += taken(value.y);
        sum.w += taken(value.y >> 16);
    }
    return sum;
}

// Where a lane's addresses of keys, values and queries stand behind those of a stage and of a chunk. Hidden from the
// compiler, which would compute them anew for every tile.
template <int d, int tiles>
struct Lanes {
    uint32_t keys, queries, values;

    __device__ __forceinline__ Lanes() {
        using S = Shape<d>;
        const int32_t lane = threadIdx.x % 32;
        keys = threadIdx.x / 32 * S::warp_bytes + lane % 16 * S::row + lane / 16 * 16;
        queries = tiles == 1 ? lane % 8 * S::row + lane / 8 * 16
                             : (lane % 8 + lane / 16 * 8) * S::row + lane / 8 % 2 * 16;
        values = threadIdx.x / 32 * S::warp_bytes + S::values + (lane % 8 + lane / 16 * 8) * S::row + lane / 8 % 2 * 16;
        asm volatile("" : "+r"(keys), "+r"(queries), "+r"(values));
    }
};

// One tile of a warp: S^T = K Q^T with keys as the 16 rows, then O^T = V^T P^T. What leaves the first product
// with a key in a row enters the second with a key in a column, so P is transposed between the lanes.
//
// Bits of `biased_rows`: query rows 8 n + 2 t + c, with t = lane % 4, at 2 n + c.
template <typename T, int d, int tiles>
__device__ __forceinline__ void multiply(const fastkv_decode_params& p, const Cursor& at, const Keys& keys,
                                         uint32_t biased_rows, uint32_t queries, uint32_t stage,
                                         const Lanes<d, tiles>& lanes, Output<d, tiles>& out) {
    using S = Shape<d>;
    const int32_t lane = threadIdx.x % 32;
    const int32_t warp = threadIdx.x / 32;

    // One tile of queries is summed in two chains, so that products need not wait for each other.
    constexpr int32_t chains = tiles == 1 ? 2 : 1;
    float sums[chains][tiles][4] = {};
    const uint32_t key_lane = stage + lanes.keys;
    const uint32_t query_lane = queries + lanes.queries;
    uint32_t q[4];
#pragma unroll
    for (int32_t step = 0; step < d / 16; ++step) {
        // Of two tiles one step, of one tile two.
        if (tiles == 2 || step % 2 == 0) {
            ldmatrix(q, query_lane + step * 32);
        }
        uint32_t a[4];
        ldmatrix(a, key_lane + step * 32);
#pragma unroll
        for (int32_t n = 0; n < tiles; ++n) {
            const int32_t first = tiles == 2 ? 2 * n : step % 2 * 2;
            mma<T>(sums[step % chains][n], a, q[first], q[first + 1]);
        }
    }
    float(&s)[tiles][4] = sums[0];
#pragma unroll
    for (int32_t i = 0; i < 4 && chains == 2; ++i) {
        s[0][i] += sums[chains - 1][0][i];
    }

    const int32_t column = 2 * (lane % 4);
    if (keys.biased() && biased_rows) {
        const float bias = p.bias / p.scale;
#pragma unroll
        for (int32_t i = 0; i < 4 * tiles; ++i) {
            const bool biased =
                keys.biased() >> (lane / 4 + i / 2 % 2 * 8) & biased_rows >> (2 * (i / 4) + i % 2) & 1;
            s[i / 4][i % 4] += biased ? bias : 0.0f;
        }
    }
    if (keys.present() != Keys::all || p.tokens > 1) {
#pragma unroll
        for (int32_t i = 0; i < 2 * tiles; ++i) {
            // A token does not see those after it, which are the last keys.
            const int32_t after = p.tokens - 1 - Row(p, at, 8 * (i / 2) + column + i % 2).token;
            const int32_t seen = keys_of(p, at.list) - after - at.key - warp * WARP_KEYS;
            const uint32_t before = seen <= 0 ? 0 : seen < WARP_KEYS ? (1u << seen) - 1 : Keys::all;
            const uint32_t visible = keys.present() & before;
#pragma unroll
            for (int32_t half = 0; half < 2; ++half) {
                float& logit = s[i / 2][2 * half + i % 2];
                logit = visible >> (lane / 4 + 8 * half) & 1 ? logit : -CUDART_INF_F;
            }
        }
        // Computed anew where it is needed, which is rarely, so that the loop carries nothing of it.
        int32_t tokens = p.tokens;
        asm volatile("" : "+r"(tokens));
        if (tokens > 1) {
            const int32_t end = keys_of(p, at.list) - at.key - warp * WARP_KEYS;
            take_out_not_finite<T, d>(stage + warp * S::warp_bytes + S::values, max(0, end - tokens + 1),
                                      min(WARP_KEYS, end));
        }
    }

    if (out.softmax.grows(s, p.scale * LOG2_E)) {
        float shrink[tiles][2];
        out.softmax.grow(s, p.scale * LOG2_E, shrink);
#pragma unroll
        for (int32_t n = 0; n < tiles; ++n) {
#pragma unroll
            for (int32_t i = 0; i < d / 4; ++i) {
                out.o[n][i / 4][i % 4] *= shrink[n][i % 2];
            }
        }
    }
    out.softmax.exponentiate(s, p.scale * LOG2_E);

    uint32_t probabilities[tiles][2];
#pragma unroll
    for (int32_t i = 0; i < 2 * tiles; ++i) {
        const float* pair = s[i / 2] + 2 * (i % 2);
        probabilities[i / 2][i % 2] = transposed(pack<T>(pair[0], pair[1]));
    }
    const uint32_t value_lane = stage + lanes.values;
#pragma unroll
    for (int32_t i = 0; i < d / 16; ++i) {
        uint32_t a[4];
        ldmatrix_transposed(a, value_lane + i * 32);
#pragma unroll
        for (int32_t n = 0; n < tiles; ++n) {
            mma<T>(out.o[n][i], a, probabilities[n][0], probabilities[n][1]);
        }
    }
}

// Leaves a warp's result in its own part of a stage that is used up.
template <int d, int tiles>
__device__ __forceinline__ void leave_result(char* stage, const Output<d, tiles>& out) {
    using S = Shape<d>;
    const int32_t lane = threadIdx.x % 32;
    char* own = stage + threadIdx.x / 32 * S::warp_bytes;
    float* result = reinterpret_cast<float*>(own);
#pragma unroll
    for (int32_t n = 0; n < tiles; ++n) {
#pragma unroll
        for (int32_t i = 0; i < d / 16; ++i) {
#pragma unroll
            for (int32_t j = 0; j < 4; ++j) {
                const int32_t row = 8 * n + 2 * (lane % 4) + j % 2;
                result[row * S::result_row + 16 * i + lane / 4 + j / 2 * 8] = out.o[n][i][j];
            }
        }
#pragma unroll
        for (int32_t c = 0; c < 2; ++c) {
            const float sum = column_reduce(out.softmax.sum[n][c], [](float a, float b) { return a + b; });
            if (lane < 4) {
                reinterpret_cast<float2*>(own + S::statistics)[8 * n + 2 * lane + c] =
                    make_float2(out.softmax.maximum[n][c], sum);
            }
        }
    }
}

__device__ __forceinline__ float4 add_scaled(float4 sum, float factor, float4 value) {
    return make_float4(fmaf(factor, value.x, sum.x), fmaf(factor, value.y, sum.y),
                       fmaf(factor, value.z, sum.z), fmaf(factor, value.w, sum.w));
}

// A row without keys has maximum -inf, and so have all its parts.
__device__ __forceinline__ float finite(float maximum) { return maximum == -CUDART_INF_F ? 0.0f : maximum; }

template <typename T>
__device__ __forceinline__ void store_output(const fastkv_decode_params& p, const Cursor& at, int32_t row,
                                             int32_t element, float4 value) {
    const uint64_t address = Row(p, at, row).address(p.out, at.list.sequence(p.cache)) + 2 * element;
    *reinterpret_cast<uint2*>(address) =
        make_uint2(pack<T>(value.x, value.y), pack<T>(value.z, value.w));
}

__device__ __forceinline__ void store_lse(const fastkv_decode_params& p, const Cursor& at, int32_t row,
                                          float maximum, float sum) {
    const Row r(p, at, row);
    const int32_t sequence = at.list.sequence(p.cache);
    const int64_t place = lse_place(p.lse, sequence, int64_t(sequence) * p.tokens, r.head, r.token);
    store_lse(p.lse, place,
              sum == 0.0f ? -CUDART_INF_F : fmaf(maximum, p.scale, log2_approx(sum) * 0.693147181f));
}

// Adds the chunks of a list in their order. The block that finished the last of them does.
template <typename T, int d>
__device__ __forceinline__ void merge_chunks(const fastkv_decode_params& p, const Cursor& at, int32_t slot,
                                             float* factors) {
    using S = Shape<d>;
    const int32_t rows = rows_of(p, at);
    const int32_t chunks = chunks_of(p, at.list);
    const int32_t lane = threadIdx.x % 32;
    const float2* statistics = reinterpret_cast<const float2*>(p.statistics) + int64_t(slot) * p.queries;
    for (int32_t row = threadIdx.x / 32; row < rows; row += S::warps) {
        float2 part[2];
#pragma unroll
        for (int32_t i = 0; i < 2; ++i) {
            const int32_t chunk = lane + 32 * i;
            part[i] = chunk < chunks ? __ldcg(statistics + chunk * p.queries + row)
                                     : make_float2(-CUDART_INF_F, 0.0f);
        }
        float most = fmaxf(part[0].x, part[1].x);
#pragma unroll
        for (int32_t distance = 16; distance > 0; distance /= 2) {
            most = fmaxf(most, __shfl_xor_sync(~0u, most, distance));
        }
        float weight[2];
#pragma unroll
        for (int32_t i = 0; i < 2; ++i) {
            weight[i] = exp2_approx((part[i].x - finite(most)) * p.scale * LOG2_E);
        }
        float sum = fmaf(weight[0], part[0].y, weight[1] * part[1].y);
#pragma unroll
        for (int32_t distance = 16; distance > 0; distance /= 2) {
            sum += __shfl_xor_sync(~0u, sum, distance);
        }
        const float normalize = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
        for (int32_t i = 0; i < 2; ++i) {
            factors[row * S::factor_row + lane + 32 * i] = weight[i] * normalize;
        }
        if (p.lse.base && lane == 0) {
            store_lse(p, at, row, most, sum);
        }
    }
    __syncthreads();
    const float4* partials = reinterpret_cast<const float4*>(p.partials) + int64_t(slot) * p.queries * (d / 4);
    for (int32_t part = threadIdx.x; part < rows * (d / 4); part += S::threads) {
        const int32_t row = part / (d / 4);
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        // As many as cost an SM no block are asked for at a time, the last few as well, with the last chunk in the place
        // of those that are not there: one by one, each would be a wait that the whole launch ends with.
        constexpr int32_t BATCH = d < 128 ? 8 : 16;
#pragma unroll 1
        for (int32_t first = 0; first < chunks; first += BATCH) {
            float4 of[BATCH];
#pragma unroll
            for (int32_t i = 0; i < BATCH; ++i) {
                const int32_t chunk = min(first + i, chunks - 1);
                of[i] = __ldcg(partials + int64_t(chunk) * p.queries * (d / 4) + part);
            }
#pragma unroll
            for (int32_t i = 0; i < BATCH; ++i) {
                if (first + i < chunks) {
                    sum = add_scaled(sum, factors[row * S::factor_row + first + i], of[i]);
                }
            }
        }
        store_output<T>(p, at, row, part % (d / 4) * 4, sum);
    }
}

// Whether a block is the last of `count` that come here with a counter; what the others did before can be
// seen then. The last one leaves the counter as it was, at 0, for the next launch. For a whole block.
__device__ __forceinline__ bool is_last(uint64_t counter, int32_t count) {
    __shared__ int32_t before;
    __syncthreads();
    if (threadIdx.x == 0) {
        before = add_acquire_release(counter, 1);
        if (before == count - 1) {
            *reinterpret_cast<int32_t*>(counter) = 0;
        }
    }
    __syncthreads();
    return before == count - 1;
}

// Ends an item: adds the results of the warps, and where the list is one chunk that is the output.
template <typename T, int d, bool paged>
__device__ __forceinline__ void finish_item(const fastkv_decode_params& p, const Cursor& at, char* stage) {
    using S = Shape<d>;
    const int32_t chunks = chunks_of(p, at.list);
    const int32_t tile = at.list.index * p.query_tiles + at.query_tile;
    const int32_t slot = tile * p.chunks + at.chunk;
    const bool adds = __syncthreads_or(taken_out());
    // To add nothing where nothing was taken out could still make 0 of -0: bits depend on no other chunk.
    if (adds && threadIdx.x % 32 == 0) {
        taken_out() = 0;
    }
    for (int32_t part = threadIdx.x; part < rows_of(p, at) * (d / 4); part += S::threads) {
        const int32_t row = part / (d / 4);
        const int32_t element = part % (d / 4) * 4;
        float2 statistics[S::warps];
        float most = -CUDART_INF_F;
#pragma unroll
        for (int32_t warp = 0; warp < S::warps; ++warp) {
            const char* own = stage + warp * S::warp_bytes + S::statistics;
            statistics[warp] = reinterpret_cast<const float2*>(own)[row];
            most = fmaxf(most, statistics[warp].x);
        }
        float sum = 0.0f;
        float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int32_t warp = 0; warp < S::warps; ++warp) {
            const float weight = exp2_approx((statistics[warp].x - finite(most)) * p.scale * LOG2_E);
            const float* own = reinterpret_cast<const float*>(stage + warp * S::warp_bytes);
            sum = fmaf(weight, statistics[warp].y, sum);
            value = add_scaled(value, weight,
                               *reinterpret_cast<const float4*>(own + row * S::result_row + element));
        }
        if (adds) {
            value = add_not_finite<T, paged>(p, at, row, element, value);
        }
        if (chunks > 1) {
            const int64_t place = int64_t(slot) * p.queries + row;
            reinterpret_cast<float4*>(p.partials)[place * (d / 4) + element / 4] = value;
            if (element == 0) {
                reinterpret_cast<float2*>(p.statistics)[place] = make_float2(most, sum);
            }
        } else {
            const float normalize = sum == 0.0f ? 0.0f : 1.0f / sum;
            store_output<T>(p, at, row, element,
                            add_scaled(make_float4(0.0f, 0.0f, 0.0f, 0.0f), normalize, value));
            if (p.lse.base && element == 0) {
                store_lse(p, at, row, most, sum);
            }
        }
    }
    if (chunks > 1 && is_last(p.finished + 4 * int64_t(tile), chunks)) {
        merge_chunks<T, d>(p, at, tile * p.chunks, reinterpret_cast<float*>(stage));
    }
    // The stage is free from here on.
    __syncthreads();
}

// Lets the lists grow by the new tokens. The last block of the grid does, when all have read the lengths.
template <int32_t threads, bool paged>
__device__ __forceinline__ void advance_lengths(const fastkv_decode_params& p) {
    const int32_t step = paged ? p.cache.heads : 1; // the heads share a length
    const int32_t lengths = p.cache.sequences * p.cache.heads / step;
    bool full = false;
    for (int32_t i = threadIdx.x; i < lengths; i += threads) {
        const List l = list_at(p.cache, i * step);
        if (has_room<paged>(p, l)) {
            reinterpret_cast<int32_t*>(p.cache.lengths)[i] = l.length + p.tokens;
        } else {
            full |= length_at(p.cache, l.index) >= 0;
        }
    }
    if (__syncthreads_or(full) && threadIdx.x == 0) {
        *reinterpret_cast<int32_t*>(p.full) = 1;
    }
}

template <typename T, int d, int tiles, bool paged>
__device__ __forceinline__ void decode(const fastkv_decode_params& p) {
    using S = Shape<d>;
    extern __shared__ __align__(16) char memory[];
    const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
    const int32_t lane = threadIdx.x % 32;

    Cursor at = first_item<S::threads>(p);
    if (threadIdx.x % 32 == 0) {
        taken_out() = 0;
    }
    __syncwarp();
    if (at.items > 0) {
        Keys keys = load_keys<d, paged>(p, at, shared);
        load_queries<d, tiles>(p, at, shared + S::queries);
        cp_async_commit();
        Output<d, tiles> out;
        const Lanes<d, tiles> lanes;
        uint32_t biased_rows = 0;
        int32_t stage = 0;
        bool enters = true; // an item
        bool more;
        do {
            // The next tile loads while this one is worked on.
            Cursor ahead = at;
            Keys keys_ahead = {};
            more = ahead.advance<S::tile_keys>(p);
            if (more) {
                keys_ahead = load_keys<d, paged>(p, ahead, shared + (stage ^ S::stage));
                if (ahead.parity != at.parity) {
                    load_queries<d, tiles>(p, ahead, shared + S::queries + ahead.parity * 8 * tiles * S::row);
                }
            }
            cp_async_commit();
            cp_async_wait<1>();
            if (enters) {
                // Queries are everybody's.
                __syncthreads();
                biased_rows = 0;
                for (int32_t i = 0; p.bias_heads && i < 2 * tiles; ++i) {
                    const int32_t row = 8 * (i / 2) + 2 * (lane % 4) + i % 2;
                    const bool biased = row < rows_of(p, at) && bit(p.bias_heads, Row(p, at, row).head);
                    biased_rows |= uint32_t(biased) << i;
                }
            } else {
                __syncwarp();
            }
            multiply<T>(p, at, keys, biased_rows, shared + S::queries + at.parity * 8 * tiles * S::row,
                        shared + stage, lanes, out);
            __syncwarp();
            enters = ahead.parity != at.parity;
            if (!more || enters) {
                leave_result(memory + stage, out);
                finish_item<T, d, paged>(p, at, memory + stage);
                if (p.k_new.base && at.query_tile == 0) {
                    append<d, paged>(p, at);
                }
                out = {};
            }
            at = ahead;
            keys = keys_ahead;
            stage ^= S::stage;
        } while (more);
    }
    if (p.k_new.base) {
        const int64_t tile_count = int64_t(p.cache.sequences) * p.cache.heads * p.query_tiles;
        if (is_last(p.finished + 4 * tile_count, gridDim.x)) {
            advance_lengths<S::threads, paged>(p);
        }
    }
}

} // namespace

// Grid: x, a few blocks per SM, which share all chunks of all lists. Registers are held to what lets
// three blocks live on an SM, or four where d = 128 and queries fill one tile.
#define FASTKV_DECODE(name, T, d, tiles, queries)                                                            \
    extern "C" __global__ void __launch_bounds__(Shape<d>::threads, d == 128 ? 5 - tiles : 3)                \
        fastkv_decode_##name##_##d##_q##queries(__grid_constant__ const fastkv_decode_params p) {            \
        p.cache.pages.table ? decode<T, d, tiles, true>(p) : decode<T, d, tiles, false>(p);                  \
    }

FASTKV_DECODE(f16, F16, 64, 1, 8)
FASTKV_DECODE(f16, F16, 64, 2, 16)
FASTKV_DECODE(f16, F16, 96, 1, 8)
FASTKV_DECODE(f16, F16, 96, 2, 16)
FASTKV_DECODE(f16, F16, 128, 1, 8)
FASTKV_DECODE(f16, F16, 128, 2, 16)
FASTKV_DECODE(f16, F16, 256, 1, 8)
FASTKV_DECODE(f16, F16, 256, 2, 16)
FASTKV_DECODE(bf16, BF16, 64, 1, 8)
FASTKV_DECODE(bf16, BF16, 64, 2, 16)
FASTKV_DECODE(bf16, BF16, 96, 1, 8)
FASTKV_DECODE(bf16, BF16, 96, 2, 16)
FASTKV_DECODE(bf16, BF16, 128, 1, 8)
FASTKV_DECODE(bf16, BF16, 128, 2, 16)
FASTKV_DECODE(bf16, BF16, 256, 1, 8)
FASTKV_DECODE(bf16, BF16, 256, 2, 16)
