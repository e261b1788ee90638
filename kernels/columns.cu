// Sums of attention over many queries, for policies that look beyond a window (H2O, FastGen, PyramidInfer):
// the probabilities of all queries of a sequence, summed for each key and over the GQA group, given LSE. A
// query may count more than the one before it, and on the nearest of its keys alone. Memory is a tile of
// products; queries whose bands miss a block's keys are not read for it.

#include "abi.h"
#include "batch.cuh"

static_assert(sizeof(fastkv_column_sums_params) == 288, "src/abi.rs was generated for another layout");

namespace {

constexpr int WARPS = FASTKV_SCORES_THREADS / 32;

template <typename T, int d>
__device__ __forceinline__ void column_sums(const fastkv_column_sums_params& p) {
    extern __shared__ __align__(128) uint8_t memory[];
    const int32_t kv_head = blockIdx.y;
    const int32_t sequence = blockIdx.z;
    const Window window = window_of(p.sums, sequence, kv_head);
    const ScoreRows out = score_rows_of(p.sums, sequence, kv_head);
    const int32_t first = blockIdx.x * p.sums.block_keys;
    WindowScores<T, d, WARPS, true>::run(window, out, first, first + p.sums.block_keys,
                                         __cvta_generic_to_shared(memory), p.sums.slots,
                                         {p.weight, p.step, p.band});
}

} // namespace

// Grid: x = blocks of keys, y = kv heads, z = sequences; shared memory for the keys of a step and `slots`
// of queries.
#define FASTKV_COLUMN_SUMS(name, type, d)                                                                  \
    extern "C" __global__ void __launch_bounds__(FASTKV_SCORES_THREADS, 3)                                \
        fastkv_column_sums_##name##_##d(__grid_constant__ const fastkv_column_sums_params p) {             \
        column_sums<type, d>(p);                                                                           \
    }

FASTKV_COLUMN_SUMS(f16, F16, 64)
FASTKV_COLUMN_SUMS(f16, F16, 96)
FASTKV_COLUMN_SUMS(f16, F16, 128)
FASTKV_COLUMN_SUMS(f16, F16, 256)
FASTKV_COLUMN_SUMS(bf16, BF16, 64)
FASTKV_COLUMN_SUMS(bf16, BF16, 96)
FASTKV_COLUMN_SUMS(bf16, BF16, 128)
FASTKV_COLUMN_SUMS(bf16, BF16, 256)
