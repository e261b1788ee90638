// Pooling of scores along the keys, and their sum over a group of heads: what a selection ranks.
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

__device__ __forceinline__ FourScores load_vector(const float* scores) {
    const float4 vector = __ldg(reinterpret_cast<const float4*>(scores));
    return {vector.x, vector.y, vector.z, vector.w};
}

// What a mean or a maximum begins with: a score of the padding, which changes neither.
__device__ __forceinline__ float padding_of(int32_t kind) {
    return kind == FASTKV_POOLING_MAX ? -INFINITY : 0.0f;
}

__device__ __forceinline__ float taken(int32_t kind, float pooled, float score) {
    return kind == FASTKV_POOLING_MAX ? fmaxf(pooled, score) : pooled + score;
}

// Vectors of a head that a thread has in flight: all there are for a kernel of up to 9.
constexpr int32_t POOL_BATCH = 3;

struct Near {
    FourScores of[POOL_BATCH];
};

__device__ __forceinline__ Near load_near(const float* first) {
    Near near;
#pragma unroll
    for (int32_t i = 0; i < POOL_BATCH; ++i) {
        near.of[i] = load_vector(first + 4 * i);
    }
    return near;
}

// Takes of vectors that begin `from` keys behind the first of four keys what these have in reach.
template <int32_t KIND>
__device__ __forceinline__ void take(FourScores& pooled, const Near& near, int32_t from, int32_t reach) {
#pragma unroll
    for (int32_t i = 0; i < 4 * POOL_BATCH; ++i) {
#pragma unroll
        for (int32_t to = 0; to < 4; ++to) {
            if (abs(from + i - to) <= reach) {
                pooled.of[to] = taken(KIND, pooled.of[to], near.of[i / 4].of[i % 4]);
            }
        }
    }
}

// The same at the ends of a row, and for rows that are no vectors.
__device__ __forceinline__ FourScores pool_edge(const fastkv_pooling& pooling, const float* head, int32_t keys,
                                                int32_t key) {
    const int32_t reach = pooling.kernel / 2;
    FourScores pooled;
#pragma unroll
    for (int32_t to = 0; to < 4; ++to) {
        const int32_t end = min(keys, key + to + reach + 1);
        pooled.of[to] = padding_of(pooling.kind);
#pragma unroll 1
        for (int32_t from = max(0, key + to - reach); from < end; ++from) {
            pooled.of[to] = taken(pooling.kind, pooled.of[to], __ldg(head + from));
        }
    }
    return pooled;
}

// Pooled scores of four keys of one head, from what is in their reach.
__device__ __forceinline__ FourScores pooled_of(int32_t kind, int32_t kernel, FourScores taken) {
    if (kind == FASTKV_POOLING_AVERAGE) {
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
            taken.of[i] = __fdiv_rn(taken.of[i], float(kernel));
        }
    }
    return taken;
}

__device__ __forceinline__ FourScores load_scores(const ScoreGroup& group, const float* head, int32_t key,
                                                  bool whole) {
    if (whole) {
        return load_vector(head + key);
    }
    FourScores scores;
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
        scores.of[i] = key + i < group.keys ? __ldg(head + key + i) : 0.0f;
    }
    return scores;
}

// The sum over the heads of a group, in their order, of what `of_head` makes of each. `TOGETHER` heads are
// asked for at once.
template <int32_t TOGETHER, typename OfHead>
__device__ __forceinline__ FourScores sum_heads(const ScoreGroup& group, OfHead of_head) {
    FourScores sums = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll TOGETHER
    for (int32_t head = 0; head < group.heads; ++head) {
        const FourScores one = of_head(group.first + head * group.head_stride);
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
            sums.of[i] += one.of[i];
        }
    }
    return sums;
}

// The same of pooled scores of keys key..key+4, where all that is in their reach lies in whole vectors of the rows.
template <int32_t KIND>
__device__ __forceinline__ FourScores sum_inside(const ScoreGroup& group, int32_t kernel, int32_t key) {
    const int32_t reach = kernel / 2;
    const int32_t vectors = (reach + 3) / 4;
    return sum_heads<1>(group, [&](const float* head) {
        const float padding = padding_of(KIND);
        FourScores pooled = {padding, padding, padding, padding};
#pragma unroll 1
        for (int32_t batch = -vectors; batch <= vectors; batch += POOL_BATCH) {
            take<KIND>(pooled, load_near(head + key + 4 * batch), 4 * batch, reach);
        }
        return pooled_of(KIND, kernel, pooled);
    });
}

// The same for a kernel of 7, of which one batch holds all. Heads are asked for some at a time, the last few as well,
// with the last head in the place of those that are not there: one by one, each would be a wait.
template <int32_t KIND>
__device__ __forceinline__ FourScores sum_inside_7(const ScoreGroup& group, int32_t key) {
    constexpr int32_t TOGETHER = 4;
    FourScores sums = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 1
    for (int32_t first = 0; first < group.heads; first += TOGETHER) {
        Near near[TOGETHER];
#pragma unroll
        for (int32_t i = 0; i < TOGETHER; ++i) {
            const int32_t head = min(first + i, group.heads - 1);
            near[i] = load_near(group.first + head * group.head_stride + key - 4);
        }
#pragma unroll
        for (int32_t i = 0; i < TOGETHER; ++i) {
            if (first + i < group.heads) {
                const float padding = padding_of(KIND);
                FourScores pooled = {padding, padding, padding, padding};
                take<KIND>(pooled, near[i], -4, 3);
                pooled = pooled_of(KIND, 7, pooled);
#pragma unroll
                for (int32_t to = 0; to < 4; ++to) {
                    sums.of[to] += pooled.of[to];
                }
            }
        }
    }
    return sums;
}

// Whether rows begin at whole vectors.
__device__ __forceinline__ bool is_aligned(const ScoreGroup& group) {
    return reinterpret_cast<uintptr_t>(group.first) % FASTKV_VECTOR_BYTES == 0 && group.head_stride % 4 == 0;
}

// Scores of keys key..key+4 for a group of heads: pooled for each head, then summed, since a maximum and a
// sum do not commute. `key` is a multiple of 4, and what lies behind the last key means nothing. Stride 1,
// padded by half the kernel on either side: max pads with -inf and passes over NaN, average counts the
// zeros of the padding. A kernel of 1 leaves scores as they are, NaN included; 7 is what FastKV and SnapKV
// use.
__device__ __forceinline__ FourScores pool_group(const ScoreGroup& group, const fastkv_pooling& pooling,
                                                 int32_t key) {
    const int32_t vectors = (pooling.kernel / 2 + 3) / 4;
    const int32_t left = group.keys - key;
    const bool aligned = is_aligned(group);
    if (pooling.kernel == 1) {
        const bool whole = aligned && left >= 4;
        return sum_heads<4>(group, [&](const float* head) { return load_scores(group, head, key, whole); });
    }
    if (!aligned || key < 4 * vectors || left < 4 * (vectors + POOL_BATCH)) {
        return sum_heads<1>(group, [&](const float* head) {
            return pooled_of(pooling.kind, pooling.kernel, pool_edge(pooling, head, group.keys, key));
        });
    }
    if (pooling.kind == FASTKV_POOLING_MAX) {
        return pooling.kernel == 7 ? sum_inside_7<FASTKV_POOLING_MAX>(group, key)
                                   : sum_inside<FASTKV_POOLING_MAX>(group, pooling.kernel, key);
    }
    return pooling.kernel == 7 ? sum_inside_7<FASTKV_POOLING_AVERAGE>(group, key)
                               : sum_inside<FASTKV_POOLING_AVERAGE>(group, pooling.kernel, key);
}
