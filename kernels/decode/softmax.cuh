// Softmax of the columns of S^T, as `mma` leaves it: running maximum and sum of each query, as
// attention/softmax.cuh does it for rows.
//
// A lane has two queries of each tile of 8, c = 0 and 1: s[n][c] and s[n][c + 2] belong to two keys, and the
// 8 lanes that share a query have two keys each.
#pragma once

#include "primitives/exp2.cuh"

#include <math_constants.h>

template <typename Combine>
__device__ __forceinline__ float column_reduce(float value, Combine combine) {
#pragma unroll
    for (int32_t distance = 4; distance < 32; distance *= 2) {
        value = combine(value, __shfl_xor_sync(~0u, value, distance));
    }
    return value;
}

// `maximum` may lag behind the largest logit, and `sum` is this lane's share.
template <int tiles>
struct ColumnSoftmax {
    // Binary logarithm of the largest exponential: below what f16 can hold, with room for sums.
    static constexpr float LARGEST = 8.0f;

    float maximum[tiles][2];
    float sum[tiles][2] = {};

    __device__ __forceinline__ ColumnSoftmax() {
#pragma unroll
        for (int32_t n = 0; n < tiles; ++n) {
            maximum[n][0] = maximum[n][1] = -CUDART_INF_F;
        }
    }

    // Whether a query of the warp has a logit so far above its maximum that probabilities would become large:
    // any number near the maximum does in its place, and what was accumulated seldom has to shrink.
    __device__ __forceinline__ bool grows(const float (&s)[tiles][4], float factor) const {
        bool grows = false;
#pragma unroll
        for (int32_t i = 0; i < 2 * tiles; ++i) {
            grows |= (highest(s[i / 2], i % 2) - maximum[i / 2][i % 2]) * factor > LARGEST;
        }
        return __any_sync(~0u, grows);
    }

    // Takes in the maxima of these logits; `shrink` is for what was accumulated before.
    __device__ __forceinline__ void grow(const float (&s)[tiles][4], float factor, float (&shrink)[tiles][2]) {
#pragma unroll
        for (int32_t i = 0; i < 2 * tiles; ++i) {
            float& most = maximum[i / 2][i % 2];
            const float before = most;
            most = column_reduce(fmaxf(most, highest(s[i / 2], i % 2)),
                                 [](float a, float b) { return fmaxf(a, b); });
            shrink[i / 2][i % 2] = exp2_approx((before - base(most)) * factor);
            sum[i / 2][i % 2] *= shrink[i / 2][i % 2];
        }
    }

    // Replaces logits by exp2((logit - maximum) * factor), and adds them up.
    __device__ __forceinline__ void exponentiate(float (&s)[tiles][4], float factor) {
#pragma unroll
        for (int32_t n = 0; n < tiles; ++n) {
#pragma unroll
            for (int32_t c = 0; c < 2; ++c) {
                const float offset = -base(maximum[n][c]) * factor;
                s[n][c] = exp2_approx(fmaf(s[n][c], factor, offset));
                s[n][c + 2] = exp2_approx(fmaf(s[n][c + 2], factor, offset));
                sum[n][c] += s[n][c] + s[n][c + 2];
            }
        }
    }

  private:
    static __device__ __forceinline__ float highest(const float (&s)[4], int32_t c) {
        return fmaxf(s[c], s[c + 2]);
    }

    // A query that has seen no key yet has maximum -inf, and gets zeros.
    static __device__ __forceinline__ float base(float maximum) {
        return maximum == -CUDART_INF_F ? 0.0f : maximum;
    }
};
