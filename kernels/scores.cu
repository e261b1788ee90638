// Scores of keys by themselves, for engines that bring their own attention: given LSE, or in two passes
// over the keys where there is none. And pooling by itself, for ranks that add theirs before they select.
//
// Both passes stream the keys once. With a window they are bound by memory, so what matters is that a
// block's next keys are on their way while it works on the present ones, and that several blocks share
// an SM.

#include "abi.h"
#include "batch.cuh"
#include "scoring/lse.cuh"
#include "scoring/pool.cuh"
#include "scoring/window.cuh"

static_assert(sizeof(fastkv_pooling) == 8, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_window_scores_params) == 272, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_pool_scores_params) == 112, "src/abi.rs was generated for another layout");

namespace {

constexpr int WARPS = FASTKV_SCORES_THREADS / 32;

// Partials of a sequence and kv head: `partial_columns` for each FASTKV_PARTIAL_KEYS keys.
__device__ __forceinline__ Partial* partials_of(const fastkv_window_scores_params& p, int32_t sequence,
                                                int32_t kv_head) {
    const int64_t chunks = (p.max_k_tokens - 1) / FASTKV_PARTIAL_KEYS + 1;
    return reinterpret_cast<Partial*>(p.partials) +
           (int64_t(sequence) * p.kv_heads + kv_head) * chunks * p.partial_columns;
}

template <typename T, int d>
__device__ __forceinline__ void window_scores(const fastkv_window_scores_params& p) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int32_t kv_head = blockIdx.y;
    const int32_t sequence = blockIdx.z;
    Window window = window_of(p, sequence, kv_head);
    if (p.partials) {
        // That of the first pass has no queries before the window's.
        window.lse = reinterpret_cast<const float*>(p.lse.base) +
                     lse_place(p.lse, sequence, 0, window.first_head, 0);
    }
    const ScoreRows out = score_rows_of(p, sequence, kv_head);
    const int32_t first = blockIdx.x * p.block_keys;
    WindowScores<T, d, WARPS>::run(window, out, first, first + p.block_keys,
                                   __cvta_generic_to_shared(memory), p.slots);
}

template <typename T, int d>
__device__ __forceinline__ void window_partials(const fastkv_window_scores_params& p) {
    using Partials = WindowPartials<T, d, WARPS>;
    extern __shared__ __align__(128) uint8_t memory[];
    const int32_t parts = (p.partial_columns - 1) / Partials::COLUMNS + 1;
    const int32_t chunk = blockIdx.x / parts;
    const int32_t tile = blockIdx.x % parts * Partials::TILES;
    const int32_t kv_head = blockIdx.y;
    const int32_t sequence = blockIdx.z;
    Window window = window_of(p, sequence, kv_head);
    window.lse = nullptr; // that is what is to be found
    const int32_t first = chunk * FASTKV_PARTIAL_KEYS;
    if (first < window.keys && tile < window.heads * window.tiles()) {
        Partial* out = partials_of(p, sequence, kv_head) + int64_t(chunk) * p.partial_columns + tile * 8;
        Partials::run(window, out, first, first + FASTKV_PARTIAL_KEYS, tile, memory);
    }
}

} // namespace

// Grid: x = blocks of keys, y = kv heads, z = sequences; shared memory for the keys of a step and `slots`
// of queries.
#define FASTKV_WINDOW_SCORES(name, type, d)                                                                \
    extern "C" __global__ void __launch_bounds__(FASTKV_SCORES_THREADS, d == 64 ? 4 : 3)                   \
        fastkv_window_scores_##name##_##d(__grid_constant__ const fastkv_window_scores_params p) {         \
        window_scores<type, d>(p);                                                                         \
    }

FASTKV_WINDOW_SCORES(f16, F16, 64)
FASTKV_WINDOW_SCORES(f16, F16, 96)
FASTKV_WINDOW_SCORES(f16, F16, 128)
FASTKV_WINDOW_SCORES(f16, F16, 256)
FASTKV_WINDOW_SCORES(bf16, BF16, 64)
FASTKV_WINDOW_SCORES(bf16, BF16, 96)
FASTKV_WINDOW_SCORES(bf16, BF16, 128)
FASTKV_WINDOW_SCORES(bf16, BF16, 256)

// Grid: x = blocks of FASTKV_PARTIAL_KEYS keys, for each of them parts of the columns; y = kv heads,
// z = sequences.
#define FASTKV_WINDOW_PARTIALS(name, type, d)                                                              \
    extern "C" __global__ void __launch_bounds__(FASTKV_SCORES_THREADS, 3)                                \
        fastkv_window_partials_##name##_##d(__grid_constant__ const fastkv_window_scores_params p) {       \
        window_partials<type, d>(p);                                                                       \
    }

FASTKV_WINDOW_PARTIALS(f16, F16, 64)
FASTKV_WINDOW_PARTIALS(f16, F16, 96)
FASTKV_WINDOW_PARTIALS(f16, F16, 128)
FASTKV_WINDOW_PARTIALS(f16, F16, 256)
FASTKV_WINDOW_PARTIALS(bf16, BF16, 64)
FASTKV_WINDOW_PARTIALS(bf16, BF16, 96)
FASTKV_WINDOW_PARTIALS(bf16, BF16, 128)
FASTKV_WINDOW_PARTIALS(bf16, BF16, 256)

// Grid: x = columns of a group, y = kv heads, z = sequences. A thread puts the partials of a query of a
// head together, neighbouring threads read neighbouring partials.
extern "C" __global__ void __launch_bounds__(FASTKV_SCORES_THREADS)
    fastkv_window_lse(__grid_constant__ const fastkv_window_scores_params p) {
    const int32_t kv_head = blockIdx.y;
    const int32_t sequence = blockIdx.z;
    const Window window = window_of(p, sequence, kv_head);
    const int32_t column = blockIdx.x * FASTKV_SCORES_THREADS + threadIdx.x;
    const int32_t head = column / (window.tiles() * 8);
    const int32_t query = column % (window.tiles() * 8);
    if (head >= window.heads || query >= window.queries) {
        return;
    }
    const Partial* partial = partials_of(p, sequence, kv_head) + column;
    Partial whole = {-CUDART_INF_F, 0.0f};
    for (int32_t first = 0; first < window.keys; first += FASTKV_PARTIAL_KEYS) {
        whole.add(*partial);
        partial += p.partial_columns;
    }
    store_lse(p.lse, lse_place(p.lse, sequence, 0, window.first_head + head, query), whole.lse());
}

// Grid: x = blocks of FASTKV_POOL_KEYS keys, y = sequences. A warp sums groups of query heads, a lane
// four keys of each; sums over all heads meet in shared memory.
extern "C" __global__ void __launch_bounds__(FASTKV_POOL_THREADS)
    fastkv_pool_scores(__grid_constant__ const fastkv_pool_scores_params p) {
    constexpr int WIDTH = FASTKV_POOL_THREADS / 32;
    __shared__ float sums[WIDTH][FASTKV_POOL_KEYS];
    const int32_t sequence = blockIdx.y;
    const Span span = span_of(p.cu_seqlens, p.tokens, p.max_tokens, sequence);
    const int32_t keys = keys_of(span, p.lengths, sequence) - p.tail;
    const int32_t first = blockIdx.x * FASTKV_POOL_KEYS;
    if (first >= keys) {
        return;
    }
    const int32_t warp = threadIdx.x / 32;
    const int32_t column = threadIdx.x % 32 * 4;
    const int32_t heads = p.query_heads / p.kv_heads;
    const float* scores = reinterpret_cast<const float*>(p.scores) + sequence * p.sequence_stride;
    float* groups = reinterpret_cast<float*>(p.groups) + sequence * p.group_sequence_stride;
    float total = 0.0f;
    for (int32_t begin = 0; begin < p.kv_heads; begin += WIDTH) {
        const int32_t kv_head = begin + warp;
        if (kv_head < p.kv_heads) {
            const ScoreGroup group = {scores + int64_t(kv_head) * heads * p.head_stride, p.head_stride, heads, keys};
            const FourScores pooled = pool_group(group, p.pooling, first + column);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sums[warp][column + i] = pooled.of[i];
                if (p.groups && first + column + i < keys) {
                    groups[kv_head * p.group_head_stride + first + column + i] = pooled.of[i];
                }
            }
        }
        if (p.total) {
            __syncthreads();
            if (threadIdx.x < FASTKV_POOL_KEYS) {
                for (int32_t head = begin; head < min(p.kv_heads, begin + WIDTH); ++head) {
                    total += sums[head - begin][threadIdx.x];
                }
            }
            __syncthreads();
        }
    }
    if (p.total && threadIdx.x < FASTKV_POOL_KEYS && first + int32_t(threadIdx.x) < keys) {
        reinterpret_cast<float*>(p.total)[sequence * p.total_sequence_stride + first + threadIdx.x] = total;
    }
}
