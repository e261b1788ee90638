// How many keys each head keeps where all heads share a number of them: AdaKV's budgets (arXiv 2407.11550), told by
// the best keys of all heads together, so that no host has to look at these before the keys are gathered.
//
// A launch and nothing beside it: one warp, a head a lane, a search of the list each.

#include "abi.h"

static_assert(sizeof(fastkv_share_keys_params) == 64, "src/abi.rs was generated for another layout");

namespace {

constexpr uint32_t FULL_WARP = ~0u;
constexpr int32_t LANES = 32;

// How many of the best keys belong to earlier heads.
__device__ __forceinline__ int32_t picks_before(const fastkv_share_keys_params& p, int32_t head) {
    if (head >= p.heads) {
        return p.count;
    }
    const int32_t* best = reinterpret_cast<const int32_t*>(p.best);
    const int64_t first = int64_t(head) * p.keys;
    int32_t low = 0;
    int32_t high = p.count;
    while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (__ldg(best + middle) < first) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

__device__ __forceinline__ int32_t kept_of(const fastkv_share_keys_params& p, int32_t picks) {
    const int32_t sure = min(p.assured, picks);
    // Rounded after each step, as a host does: not fused.
    const double shared = __dadd_rn(__dmul_rn(picks - sure, p.share), p.every);
    return sure + min(__double2int_rn(shared), p.keys - sure) + p.tail;
}

} // namespace

extern "C" __global__ void __launch_bounds__(LANES)
    fastkv_share_keys(__grid_constant__ const fastkv_share_keys_params p) {
    const int32_t lane = threadIdx.x;
    int64_t before = 0; // rows of the heads of earlier rounds
    for (int32_t first = 0; first < p.heads; first += LANES) {
        const int32_t head = first + lane;
        const int32_t earlier = picks_before(p, head);
        const int32_t next = __shfl_down_sync(FULL_WARP, earlier, 1);
        const int32_t upto = lane < LANES - 1 ? next : picks_before(p, head + 1);
        const int32_t kept = head < p.heads ? kept_of(p, upto - earlier) : 0;
        const int64_t rows = int64_t(kept) + p.slack;
        int64_t end = rows;
        for (int32_t reach = 1; reach < LANES; reach *= 2) {
            const int64_t other = __shfl_up_sync(FULL_WARP, end, reach);
            end += lane >= reach ? other : 0;
        }
        if (head < p.heads) {
            reinterpret_cast<int32_t*>(p.counts)[head] = kept;
            reinterpret_cast<int64_t*>(p.starts)[head] = before + end - rows;
        }
        before += __shfl_sync(FULL_WARP, end, LANES - 1);
    }
}
