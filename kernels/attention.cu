// Causal prefill attention on mma.sync and cp.async, for every chip from Ampere on: FlashAttention-2
// (Dao, arXiv 2307.08691) over ragged batches, with queries at explicit positions.
//
// A block of 4 warps takes a tile of queries; each warp has 32 rows of it (16 where d = 256).
// Keys come in blocks of 64, from the last that any row sees down to the first. There is one buffer for
// keys and one for values: while one is used the other is filled, and a second block on the same SM
// covers what is left of the latency. Keys in pages come row by row from places that are found a block ahead.
//
// Values that are not finite: a key that a row does not see contributes nothing to the row, whatever
// it holds. What a row sees spreads as IEEE arithmetic says: NaN in a key makes the row NaN, a value that
// is not finite reaches its column of the row.

#include "abi.h"
#include "attention/mask.cuh"
#include "attention/score.cuh"
#include "attention/softmax.cuh"
#include "attention/work.cuh"
#include "batch.cuh"
#include "primitives/convert.cuh"
#include "primitives/cp_async.cuh"
#include "primitives/global.cuh"
#include "primitives/ldmatrix.cuh"
#include "primitives/mma.cuh"
#include "primitives/shared.cuh"

static_assert(sizeof(fastkv_prefill_attention_params) == 336, "src/abi.rs was generated for another layout");

namespace {

constexpr int THREADS = FASTKV_ATTENTION_THREADS;
constexpr int WARPS = THREADS / 32;
// Keys of a block.
constexpr int KEYS = 64;

// Fragments of 16 rows for each warp: as many as registers allow. For Hopper, which has a form of its own
// for d = 128, ptxas needs more of them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr int WIDEST = 96;
#else
constexpr int WIDEST = 128;
#endif
template <int d>
constexpr int FRAGMENTS = d <= WIDEST ? 2 : 1;

// Queries of a tile.
template <int d>
constexpr int QUERIES = WARPS * FRAGMENTS<d> * 16;

// How a block of threads shares out the chunks of rows: `LANES` threads to a row, each with every
// `LANES`-th chunk, and `STEP` rows at once.
template <int d>
struct Share {
    static constexpr int LANES = d % 64 == 0 ? d / 8 : 4;
    static constexpr int STEP = THREADS / LANES;

    static __device__ __forceinline__ int row() {
        return threadIdx.x / LANES;
    }

    static __device__ __forceinline__ int chunk() {
        return threadIdx.x % LANES;
    }
};

// Copies rows first..first + count to shared memory without waiting; rows from `end` on become zeros.
// `base` is row 0. The driver sees to it that strides count bytes in 32 bits.
template <int d, int count>
__device__ __forceinline__ void copy_rows(uint32_t shared, uint64_t base, int64_t stride, int32_t first,
                                          int32_t end) {
    using Share = Share<d>;
    const int32_t row_bytes = 2 * int32_t(stride);
    uint64_t row_base = base + int64_t(first + Share::row()) * row_bytes + Share::chunk() * 16;
#pragma unroll
    for (int step = 0; step < count; step += Share::STEP) {
        const int row = step + Share::row();
#pragma unroll
        for (int chunk = 0; chunk < d / 8; chunk += Share::LANES) {
            cp_async(shared + Rows<d>::offset(row, chunk + Share::chunk()), row_base + chunk * 16,
                     first + row < end);
        }
        row_base += int64_t(Share::STEP) * row_bytes;
    }
}

// Copies rows that stand so many bytes behind `base`, or zeros for those below 0, without waiting.
template <int d, int count>
__device__ __forceinline__ void copy_rows(uint32_t shared, uint64_t base, const int64_t (&places)[count]) {
    using Share = Share<d>;
#pragma unroll
    for (int step = 0; step < count; step += Share::STEP) {
        const int row = step + Share::row();
        const int64_t place = places[row];
        const uint64_t from = base + max(place, int64_t(0)) + Share::chunk() * 16;
#pragma unroll
        for (int chunk = 0; chunk < d / 8; chunk += Share::LANES) {
            cp_async(shared + Rows<d>::offset(row, chunk + Share::chunk()), from + chunk * 16, place >= 0);
        }
    }
}

// Whether the values that a thread has copied itself are finite.
template <typename T, int d>
__device__ __forceinline__ bool own_values_finite(uint32_t values) {
    bool all = true;
    for (int row = Share<d>::row(); row < KEYS; row += Share<d>::STEP) {
        for (int chunk = Share<d>::chunk(); chunk < d / 8; chunk += Share<d>::LANES) {
            const uint4 v = load_shared_vector(values + Rows<d>::offset(row, chunk));
            for (const uint32_t pair : {v.x, v.y, v.z, v.w}) {
                all = all && finite<T>(pair) && finite<T>(pair >> 16);
            }
        }
    }
    return all;
}

// Puts zeros in the place of values that are not finite.
template <typename T, int d>
__device__ __forceinline__ void clean(uint32_t values) {
#pragma unroll 1
    for (int word = threadIdx.x; word < KEYS * d / 2; word += THREADS) {
        const uint32_t address = values + 4 * word;
        store_shared(address, finite_part<T>(load_shared(address)));
    }
}

// What a block of threads works on, in shared memory: nothing of it takes registers while keys go by.
struct Item {
    int32_t number;
    ScoreItem score;
    QueryTile tile; // and what belongs to it:
    Span queries;
    Span keys;
    uint64_t k, v; // the first key and its value, or the first slots of page 0
    float bias;    // in units of products, 0 where the head has none
};

// Where the keys of two blocks, one in use and the next, and their values lie in pages: bytes from the first slot of
// page 0, below 0 where a key has no page.
struct Places {
    int64_t k[2][KEYS];
    int64_t v[2][KEYS];

    // For a whole block of threads; a barrier has to follow.
    __device__ __forceinline__ void find(const fastkv_prefill_attention_params& p, const Item& item, int32_t block) {
        if (threadIdx.x < KEYS) {
            const int32_t key = block * KEYS + threadIdx.x;
            const int64_t page = key < item.keys.tokens ? page_of(p.pages, item.tile.tile.sequence, key) : -1;
            const int64_t slot = uint32_t(key) % uint32_t(p.pages.page_size);
            const auto place = [&](const fastkv_rows& rows) {
                return page < 0 ? page : 2 * (page * rows.sequence_stride + slot * rows.token_stride);
            };
            k[block % 2][threadIdx.x] = place(p.k);
            v[block % 2][threadIdx.x] = place(p.v);
        }
    }
};

struct Present : Item {
    // The last key that each query sees; and of each warp's threads, the least and the most of these.
    int32_t last[THREADS];
    int32_t least[WARPS];
    int32_t most[WARPS];
};

// A tile of queries of one head while its block of threads walks over the keys.
template <typename T, int d, bool paged>
struct Walk {
    static constexpr int M = FRAGMENTS<d>;
    // Column blocks of the logits and of the output.
    static constexpr int S = KEYS / 8;
    static constexpr int O = d / 8;

    const fastkv_prefill_attention_params& p;
    const Present& present;
    Places& places;  // of no use without pages
    uint32_t shared; // queries, then a block of keys, then one of values

    Softmax softmax[M];
    float out[M][O][4];

    __device__ __forceinline__ void load_keys(int32_t block) const {
        if (paged) {
            copy_rows<d>(keys(), present.k, places.k[block % 2]);
        } else {
            copy_rows<d, KEYS>(keys(), present.k, p.k.token_stride, block * KEYS, present.keys.tokens);
        }
        cp_async_commit();
    }

    __device__ __forceinline__ void load_values(int32_t block) const {
        if (paged) {
            copy_rows<d>(values(), present.v, places.v[block % 2]);
        } else {
            copy_rows<d, KEYS>(values(), present.v, p.v.token_stride, block * KEYS, present.keys.tokens);
        }
        cp_async_commit();
    }

    // The parts of shared memory.
    __device__ __forceinline__ uint32_t warp_queries() const {
        return shared + threadIdx.x / 32 * (M * 16 * Rows<d>::BYTES);
    }

    __device__ __forceinline__ uint32_t keys() const {
        return shared + QUERIES<d> * Rows<d>::BYTES;
    }

    __device__ __forceinline__ uint32_t values() const {
        return keys() + KEYS * Rows<d>::BYTES;
    }

    // s = queries times keys.
    __device__ __forceinline__ void multiply(float (&s)[M][S][4]) const {
        const int lane = threadIdx.x % 32;
        const uint32_t query_lane = fresh(warp_queries() + Rows<d>::offset(lane % 16, lane / 16));
        const uint32_t key_lane = fresh(keys() + Rows<d>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2));
        clear(s);
#pragma unroll
        for (int step = 0; step < d / 16; ++step) {
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) {
                ldmatrix(a[m], Rows<d>::advance(query_lane, step) + m * 16 * Rows<d>::BYTES);
            }
#pragma unroll
            for (int j = 0; j < S; j += 2) {
                uint32_t b[4];
                ldmatrix(b, Rows<d>::advance(key_lane, step) + j * 8 * Rows<d>::BYTES);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    mma<T>(s[m][j], a[m], b[0], b[1]);
                    mma<T>(s[m][j + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    // out += probabilities times values.
    __device__ __forceinline__ void accumulate(const float (&s)[M][S][4]) {
        const int lane = threadIdx.x % 32;
        const uint32_t value_lane = fresh(values() + Rows<d>::offset(lane % 16, lane / 16));
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step) {
            // Keeps the loads of later steps behind this one, for whom there are no registers yet.
            __syncwarp();
            uint32_t a[M][4];
#pragma unroll
            for (int m = 0; m < M; ++m) {
                const float(&left)[4] = s[m][2 * step];
                const float(&right)[4] = s[m][2 * step + 1];
                a[m][0] = pack<T>(left[0], left[1]);
                a[m][1] = pack<T>(left[2], left[3]);
                a[m][2] = pack<T>(right[0], right[1]);
                a[m][3] = pack<T>(right[2], right[3]);
            }
#pragma unroll
            for (int j = 0; j < O; j += 2) {
                uint32_t b[4];
                ldmatrix_transposed(b, Rows<d>::advance(value_lane, j / 2) + step * 16 * Rows<d>::BYTES);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    mma<T>(out[m][j], a[m], b[0], b[1]);
                    mma<T>(out[m][j + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    // The last key that a row of this lane sees, counted from the first of a block.
    __device__ __forceinline__ int32_t last_key(int m, int half, int32_t block) const {
        const int row = threadIdx.x / 32 * (M * 16) + 16 * m + 8 * half + threadIdx.x % 32 / 4;
        return present.last[row] - block * KEYS;
    }

    __device__ __forceinline__ void mask(float (&s)[M][S][4], int32_t block) const {
        if (present.bias != 0.0f) {
            const uint32_t* biased = bias_words(p, present.tile.tile.sequence);
            uint32_t words[KEYS / 32];
#pragma unroll
            for (int i = 0; i < KEYS / 32; ++i) {
                words[i] = biased_keys(biased, block * KEYS + 32 * i, present.keys.tokens);
            }
#pragma unroll
            for (int m = 0; m < M; ++m) {
                add_bias(s[m], words, present.bias);
            }
        }
        if (paged) {
            uint32_t absent[KEYS / 32];
            uint32_t any = 0;
#pragma unroll
            for (int i = 0; i < KEYS / 32; ++i) {
                absent[i] = __ballot_sync(~0u, places.k[block % 2][32 * i + threadIdx.x % 32] < 0);
                any |= absent[i];
            }
            if (any) {
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    hide_absent(s[m], absent);
                }
            }
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
            hide(s[m], last_key(m, 0, block), last_key(m, 1, block));
        }
    }

    // Adds values that are not finite to the rows that see their key, and puts zeros in their place, so
    // that rows that do not see it can multiply it by their probability of 0.
    __device__ __forceinline__ void take_out_not_finite(int32_t block) {
        const int column = 2 * (threadIdx.x % 4);
#pragma unroll 1
        for (int key = 0; key < KEYS; ++key) {
#pragma unroll
            for (int j = 0; j < O; ++j) {
                const uint32_t pair = load_shared(values() + Rows<d>::offset(key, j) + 2 * column);
                if (!finite<T>(pair) || !finite<T>(pair >> 16)) {
                    const float first = finite<T>(pair) ? 0.0f : widen<T>(pair);
                    const float second = finite<T>(pair >> 16) ? 0.0f : widen<T>(pair >> 16);
#pragma unroll
                    for (int m = 0; m < M; ++m) {
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            if (key <= last_key(m, half, block)) {
                                out[m][j][2 * half] += first;
                                out[m][j][2 * half + 1] += second;
                            }
                        }
                    }
                }
            }
        }
        __syncthreads();
        clean<T, d>(values());
        __syncthreads();
    }

    // One block of keys, which are on their way. `masked`: a row may not see all of them, or they may
    // carry the bias or lack a page.
    template <bool masked>
    __device__ __forceinline__ void step(int32_t block) {
        cp_async_wait<0>();
        __syncthreads();
        load_values(block);
        float s[M][S][4];
        multiply(s);
        if (masked) {
            mask(s, block);
        }
        if (paged && block > 0) {
            places.find(p, present, block - 1);
        }

        cp_async_wait<0>();
        bool all_finite = true;
        if (masked) {
            all_finite = __syncthreads_and(own_values_finite<T, d>(values()));
        } else {
            __syncthreads();
        }
        if (block > 0) {
            load_keys(block - 1);
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
            float shrink[2];
            softmax[m].update(s[m], p.scale * LOG2_E, shrink);
#pragma unroll
            for (int j = 0; j < O; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    out[m][j][i] *= shrink[i / 2];
                }
            }
        }
        if (masked && !all_finite) {
            take_out_not_finite(block);
        }
        accumulate(s);
    }

    template <int N>
    static __device__ __forceinline__ void clear(float (&c)[M][N][4]) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    c[m][j][i] = 0.0f;
                }
            }
        }
    }
};

// Output and LSE of a warp's rows. The output goes by way of the warp's queries in shared memory, which
// nobody needs any more, so that it leaves in whole rows.
template <typename T, int d, bool paged>
__device__ __forceinline__ void store_rows(const fastkv_prefill_attention_params& p, const Present& present,
                                           const Walk<T, d, paged>& walk) {
    constexpr int M = FRAGMENTS<d>;
    const int lane = threadIdx.x % 32;
    const int32_t head = present.tile.head;
    __syncwarp();
    const int32_t first_row = present.tile.tile.index * QUERIES<d> + threadIdx.x / 32 * (M * 16);
    const int32_t rows = present.queries.tokens - first_row;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float normalize, lse;
            walk.softmax[m].finish(i, p.scale, normalize, lse);
            const int row = 16 * m + 8 * i + lane / 4;
            if (p.lse.base && lane % 4 == 0 && row < rows) {
                const int32_t sequence = present.tile.tile.sequence;
                store_lse(p.lse, lse_place(p.lse, sequence, present.queries.row, head, first_row + row), lse);
            }
#pragma unroll
            for (int j = 0; j < d / 8; ++j) {
                store_shared(walk.warp_queries() + Rows<d>::offset(row, j) + lane % 4 * 4,
                             pack<T>(walk.out[m][j][2 * i] * normalize, walk.out[m][j][2 * i + 1] * normalize));
            }
        }
    }
    __syncwarp();
    const uint64_t out = row_address(p.out, present.tile.tile.sequence, head, present.queries.first + first_row);
    for (int index = lane; index < M * 16 * Rows<d>::CHUNKS; index += 32) {
        const int row = index / Rows<d>::CHUNKS;
        const int chunk = index % Rows<d>::CHUNKS;
        if (row < rows) {
            store(out + 2 * row * p.out.token_stride + chunk * 16,
                  load_shared_vector(walk.warp_queries() + Rows<d>::offset(row, chunk)));
        }
    }
}

// Attention of one tile of queries of one head.
template <typename T, int d, bool paged>
__device__ __forceinline__ void attend(const fastkv_prefill_attention_params& p, Present& present,
                                       Walk<T, d, paged>& walk) {
    // Rows past the last query see what nobody asks for, so that they change nothing.
    const int32_t first_row = present.tile.tile.index * QUERIES<d>;
    const int32_t row = first_row + threadIdx.x;
    int32_t least = INT32_MAX, most = -1;
    if (threadIdx.x < QUERIES<d> && row < present.queries.tokens) {
        least = most = last_key(p, present.queries, present.keys, row);
    }
    present.last[threadIdx.x] = least;
    least = __reduce_min_sync(~0u, least);
    most = __reduce_max_sync(~0u, most);
    if (threadIdx.x % 32 == 0) {
        present.least[threadIdx.x / 32] = least;
        present.most[threadIdx.x / 32] = most;
    }
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
        least = min(least, present.least[warp]);
        most = max(most, present.most[warp]);
    }

    walk.clear(walk.out);

    // Blocks from the last that a row sees; those below `all_see` are seen by every row.
    const int32_t blocks = (most + KEYS) / KEYS;
    int32_t all_see = present.bias != 0.0f ? 0 : (least + 1) / KEYS;
    if (paged && blocks > 0) {
        walk.places.find(p, present, blocks - 1);
        const int32_t absent = first_absent(p.pages, present.tile.tile.sequence, most + 1, threadIdx.x, THREADS);
        all_see = __syncthreads_or(absent <= most) ? 0 : all_see;
    }
    if (blocks > 0) {
        const uint64_t q = row_address(p.q, present.tile.tile.sequence, present.tile.head, present.queries.first);
        copy_rows<d, QUERIES<d>>(walk.shared, q, p.q.token_stride, first_row, present.queries.tokens);
        walk.load_keys(blocks - 1);
    }
    int32_t block = blocks - 1;
#pragma unroll 1
    for (; block >= all_see; --block) {
        walk.template step<true>(block);
    }
#pragma unroll 1
    for (; block >= 0; --block) {
        walk.template step<false>(block);
    }
}

// Finds out what an item is. For one warp.
template <int d, bool paged>
__device__ __forceinline__ void find(const fastkv_prefill_attention_params& p, const Work& work, int32_t number,
                                     Present& present) {
    Item item = {number};
    if (number < work.tile_items) {
        item.tile = query_tile(p, work, QUERIES<d>, number);
        const int32_t sequence = item.tile.tile.sequence;
        const int32_t kv_head = item.tile.head / (fresh(p.query_heads) / p.kv_heads);
        item.queries = query_axis(p).span(sequence);
        item.keys = key_axis(p).span(sequence);
        item.k = row_address(p.k, paged ? 0 : sequence, kv_head, item.keys.first);
        item.v = row_address(p.v, paged ? 0 : sequence, kv_head, item.keys.first);
        const float scale = __int_as_float(fresh(__float_as_int(p.scale)));
        item.bias = is_biased(p, item.tile.head) ? __fdividef(p.bias, scale) : 0.0f;
    } else if (number < work.items) {
        item.score = score_item(p, number - work.tile_items);
    }
    if (threadIdx.x == 0) {
        static_cast<Item&>(present) = item;
    }
}

// The grid's blocks take items from the queue until it is empty: tiles of queries, then score items.
template <typename T, int d, bool paged>
__device__ __forceinline__ void prefill_attention(const fastkv_prefill_attention_params& p) {
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ Present present;
    __shared__ Work work;
    const uint32_t shared = __cvta_generic_to_shared(memory);
    // Behind the values. Scoring, which takes all of the memory, needs none.
    Places& places = *reinterpret_cast<Places*>(memory + (QUERIES<d> + 2 * KEYS) * Rows<d>::BYTES);

    if (threadIdx.x < 32) {
        work.count(p, QUERIES<d>);
    }
    int32_t next = threadIdx.x == 0 ? take_item(p) : 0;
    while (true) {
        if (threadIdx.x < 32) {
            find<d, paged>(p, work, __shfl_sync(~0u, next, 0), present);
        }
        __syncthreads();
        if (present.number >= work.tile_items) {
            break;
        }
        Walk<T, d, paged> walk{p, present, places, shared};
        attend(p, present, walk);
        // Asked for now, the next item is known once the output is stored.
        next = threadIdx.x == 0 ? take_item(p) : 0;
        store_rows(p, present, walk);
        // Everybody has written its LSE, and is done with shared memory.
        __syncthreads();
        if (threadIdx.x == 0) {
            signal_tile(p, present.tile, present.queries.tokens, QUERIES<d>);
        }
    }
    while (present.number < work.items) {
        next = threadIdx.x == 0 ? take_item(p) : 0;
        score<T, d, paged, WARPS, QUERIES<d>, 1>(p, present.score, shared);
        __syncthreads();
        if (threadIdx.x < 32) {
            find<d, paged>(p, work, __shfl_sync(~0u, next, 0), present);
        }
        __syncthreads();
    }
}

} // namespace

#define FASTKV_PREFILL_ATTENTION(name, type, d)                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                               \
        fastkv_prefill_attention_##name##_##d(__grid_constant__ const fastkv_prefill_attention_params p) {  \
        prefill_attention<type, d, false>(p);                                                               \
    }                                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                               \
        fastkv_paged_attention_##name##_##d(__grid_constant__ const fastkv_prefill_attention_params p) {    \
        prefill_attention<type, d, true>(p);                                                                \
    }

FASTKV_PREFILL_ATTENTION(f16, F16, 64)
FASTKV_PREFILL_ATTENTION(f16, F16, 96)
FASTKV_PREFILL_ATTENTION(f16, F16, 128)
FASTKV_PREFILL_ATTENTION(f16, F16, 256)
FASTKV_PREFILL_ATTENTION(bf16, BF16, 64)
FASTKV_PREFILL_ATTENTION(bf16, BF16, 96)
FASTKV_PREFILL_ATTENTION(bf16, BF16, 128)
FASTKV_PREFILL_ATTENTION(bf16, BF16, 256)
