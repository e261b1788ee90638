// What becomes of sums of attention between the launches that make them and the selection that ranks by
// them: added up from chunk to chunk and step to step, gathered where entries leave a cache, raised where
// keys stay in any case. And the bits that tell biased keys when a bias is given by position.
//
// A score, or a key, a thread: all are launches more than work.

#include "abi.h"

#include <math_constants.h>

static_assert(sizeof(fastkv_score_table) == 24, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_add_scores_params) == 72, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_gather_scores_params) == 64, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_raise_scores_params) == 48, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_mark_keys_params) == 56, "src/abi.rs was generated for another layout");

namespace {

__device__ __forceinline__ int32_t own_column() { return blockIdx.x * FASTKV_SUMS_THREADS + threadIdx.x; }

// Whether the bit of a position is as wanted; one that has no bit is not.
__device__ __forceinline__ bool has_bit(uint64_t bits, int32_t positions, int32_t position, bool wanted) {
    if (uint32_t(position) >= uint32_t(positions)) {
        return false;
    }
    const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(bits) + position / 32);
    return (word >> position % 32 & 1) == wanted;
}

__device__ __forceinline__ float* row_of(const fastkv_score_table& rows, int32_t head) {
    return reinterpret_cast<float*>(rows.base) + head * rows.head_stride;
}

// A head's score of a key, 0 where there is none.
__device__ __forceinline__ float score_of(const fastkv_score_table& rows, int32_t head, int32_t key) {
    return uint32_t(key) < uint32_t(rows.keys) ? row_of(rows, head)[key] : 0.0f;
}

} // namespace

// Grids: x = blocks of columns, y = heads.

extern "C" __global__ void __launch_bounds__(FASTKV_SUMS_THREADS)
    fastkv_add_scores(__grid_constant__ const fastkv_add_scores_params p) {
    const int32_t head = blockIdx.y;
    const int32_t key = own_column();
    if (key < p.out.keys) {
        row_of(p.out, head)[key] = score_of(p.a, head, key) + score_of(p.b, head, key);
    }
}

extern "C" __global__ void __launch_bounds__(FASTKV_SUMS_THREADS)
    fastkv_gather_scores(__grid_constant__ const fastkv_gather_scores_params p) {
    const int32_t head = blockIdx.y;
    const int32_t column = own_column();
    if (column < p.out.keys) {
        const int32_t* list = reinterpret_cast<const int32_t*>(p.entries) + head * p.entry_stride;
        row_of(p.out, head)[column] = score_of(p.scores, head, __ldg(list + column));
    }
}

extern "C" __global__ void __launch_bounds__(FASTKV_SUMS_THREADS)
    fastkv_raise_scores(__grid_constant__ const fastkv_raise_scores_params p) {
    const int32_t key = own_column();
    if (key < p.scores.keys) {
        const int32_t position = __ldg(reinterpret_cast<const int32_t*>(p.positions) + key);
        if (has_bit(p.marked, p.marked_positions, position, false)) {
            row_of(p.scores, blockIdx.y)[key] = CUDART_INF_F;
        }
    }
}

// Every warp leaves a word.
extern "C" __global__ void __launch_bounds__(FASTKV_SUMS_THREADS)
    fastkv_mark_keys(__grid_constant__ const fastkv_mark_keys_params p) {
    const int32_t list = blockIdx.y;
    const int32_t key = own_column();
    if (key / 32 >= p.words) {
        return;
    }
    const int64_t start = __ldg(reinterpret_cast<const int64_t*>(p.starts) + list);
    const int32_t length = __ldg(reinterpret_cast<const int32_t*>(p.lengths) + list);
    bool marked = false;
    if (key < length && start >= 0 && start + key < p.rows) {
        const int32_t position = __ldg(reinterpret_cast<const int32_t*>(p.positions) + start + key);
        marked = has_bit(p.marked, p.marked_positions, position, true);
    }
    const uint32_t word = __ballot_sync(~0u, marked);
    if (threadIdx.x % 32 == 0) {
        reinterpret_cast<uint32_t*>(p.out)[int64_t(list) * p.words + key / 32] = word;
    }
}
