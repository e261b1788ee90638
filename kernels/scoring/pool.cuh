// Pooling of scores along the keys, and their reduction over a group of heads: what a selection ranks.
// One definition for everything that pools, so that pooling alone and pooling on the way into a
// selection give the same bits: taps are taken in the order of the keys, heads in their order.
//
// A thread does four neighbouring keys at once, since these share most of what they read.
#pragma once

#include <math.h>

#include "../abi.h"

// The scores of a group of heads: key i of head h stands at `first[h * head_stride + i]`.
struct ScoreGroup {
    const float* first;
    int64_t head_stride;
    int32_t heads;
    int32_t keys; // that have a score; what lies behind them is not read
};

struct FourScores {
    float of[4];
};

// Scores of keys key..key+4 of one head, `outside` where there is no such key; `key` is a multiple of 4.
__device__ __forceinline__ FourScores load_scores(const float* head, int32_t keys, int32_t key, float outside) {
    FourScores four;
    if (key >= 0 && keys - key >= 4 && reinterpret_cast<uintptr_t>(head) % FASTKV_VECTOR_BYTES == 0) {
        const float4 vector = __ldg(reinterpret_cast<const float4*>(head + key));
        four = {vector.x, vector.y, vector.z, vector.w};
    } else {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
            four.of[i] = key + i >= 0 && key + i < keys ? __ldg(head + key + i) : outside;
        }
    }
    return four;
}

// Pooled scores of four keys of one head: stride 1, padded by half the kernel on either side. Max pads
// with -inf and passes over NaN, average counts the zeros of the padding. REACH is half the kernel where
// that is known when compiling, else -1.
template <int32_t KIND, int32_t REACH>
__device__ __forceinline__ FourScores pool(const float* head, int32_t keys, int32_t key, int32_t kernel) {
    constexpr float OUTSIDE = KIND == FASTKV_POOLING_MAX ? -INFINITY : 0.0f;
    const int32_t reach = REACH < 0 ? kernel / 2 : REACH;
    const int32_t vectors = (reach + 3) / 4;
    FourScores pooled = {OUTSIDE, OUTSIDE, OUTSIDE, OUTSIDE};
#pragma unroll(REACH < 0 ? 1 : 2 * ((REACH + 3) / 4) + 1)
    for (int32_t vector = -vectors; vector <= vectors; ++vector) {
        const FourScores near = load_scores(head, keys, key + 4 * vector, OUTSIDE);
#pragma unroll
        for (int32_t from = 0; from < 4; ++from) {
#pragma unroll
            for (int32_t to = 0; to < 4; ++to) {
                if (abs(4 * vector + from - to) <= reach) {
                    pooled.of[to] = KIND == FASTKV_POOLING_MAX ? fmaxf(pooled.of[to], near.of[from])
                                                               : pooled.of[to] + near.of[from];
                }
            }
        }
    }
    if (KIND == FASTKV_POOLING_AVERAGE) {
#pragma unroll
        for (int32_t to = 0; to < 4; ++to) {
            pooled.of[to] = __fdiv_rn(pooled.of[to], float(kernel));
        }
    }
    return pooled;
}

// The same for any pooling. A kernel of 1 leaves scores as they are, NaN included; 7 is what FastKV and
// SnapKV use.
__device__ __forceinline__ FourScores pool(const fastkv_pooling& pooling, const float* head, int32_t keys,
                                           int32_t key) {
    if (pooling.kernel == 1) {
        return load_scores(head, keys, key, 0.0f);
    }
    if (pooling.kind == FASTKV_POOLING_MAX) {
        return pooling.kernel == 7 ? pool<FASTKV_POOLING_MAX, 3>(head, keys, key, 7)
                                   : pool<FASTKV_POOLING_MAX, -1>(head, keys, key, pooling.kernel);
    }
    return pooling.kernel == 7 ? pool<FASTKV_POOLING_AVERAGE, 3>(head, keys, key, 7)
                               : pool<FASTKV_POOLING_AVERAGE, -1>(head, keys, key, pooling.kernel);
}

// Scores of keys key..key+4 for a group of heads: pooled for each head, then summed, or the largest of
// them. Pooling comes first, since a maximum and a sum do not commute. The largest passes over NaN,
// unless all are.
__device__ __forceinline__ FourScores pool_group(const ScoreGroup& group, const fastkv_pooling& pooling,
                                                 int32_t reduction, int32_t key) {
    FourScores reduced;
    for (int32_t head = 0; head < group.heads; ++head) {
        const FourScores one = pool(pooling, group.first + head * group.head_stride, group.keys, key);
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
            const float sum = (head == 0 ? 0.0f : reduced.of[i]) + one.of[i];
            const float largest = head == 0 ? one.of[i] : fmaxf(reduced.of[i], one.of[i]);
            reduced.of[i] = reduction == FASTKV_REDUCTION_SUM ? sum : largest;
        }
    }
    return reduced;
}
