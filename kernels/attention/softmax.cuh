// Softmax of rows whose logits come block after block: running maximum and sum of each row, and the
// factor by which what was accumulated so far has to shrink (Milakov and Gimelshein, arXiv 1805.02867).
//
// Logits lie as `mma` and `wgmma` leave them: s[j][0], s[j][1] belong to one row of a lane, s[j][2],
// s[j][3] to the row 8 further down, and the four lanes of a quad share both rows.
#pragma once

#include "primitives/exp2.cuh"

#include <math_constants.h>

template <typename Combine>
__device__ __forceinline__ float quad_reduce(float value, Combine combine) {
    value = combine(value, __shfl_xor_sync(~0u, value, 1));
    return combine(value, __shfl_xor_sync(~0u, value, 2));
}

// Two rows. `sum` is this lane's share until `finish`.
struct Softmax {
    // Where nothing but -inf has come by, the maximum is a number far below any product: -inf less it is still
    // -inf, and exp2 makes it 0. Any factor below 2^28 keeps it finite.
    static constexpr float LOWEST = -0x1p100f;

    float maximum[2] = {LOWEST, LOWEST};
    float sum[2] = {0.0f, 0.0f};

    // Replaces logits by exp2((logit - maximum) * factor); `shrink` is for what was accumulated before.
    template <int blocks>
    __device__ __forceinline__ void update(float (&s)[blocks][4], float factor, float (&shrink)[2]) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float most = maximum[row];
#pragma unroll
            for (int j = 0; j < blocks; ++j) {
                most = fmaxf(most, fmaxf(s[j][2 * row], s[j][2 * row + 1]));
            }
            most = quad_reduce(most, [](float a, float b) { return fmaxf(a, b); });
            shrink[row] = exp2_approx((maximum[row] - most) * factor);
            maximum[row] = most;
            const float offset = -most * factor;
            float added = 0.0f;
#pragma unroll
            for (int j = 0; j < blocks; ++j) {
#pragma unroll
                for (int i = 2 * row; i < 2 * row + 2; ++i) {
                    s[j][i] = exp2_approx(fmaf(s[j][i], factor, offset));
                    added += s[j][i];
                }
            }
            sum[row] = fmaf(sum[row], shrink[row], added);
        }
    }

    // The factor that makes probabilities of what was accumulated, and the natural logarithm of the sum.
    // A row that saw nothing but -inf has 0 and -inf.
    __device__ __forceinline__ void finish(int row, float scale, float& normalize, float& lse) const {
        const float total = quad_reduce(sum[row], [](float a, float b) { return a + b; });
        const bool seen = total != 0.0f;
        normalize = seen ? __fdividef(1.0f, total) : 0.0f;
        lse = seen ? fmaf(maximum[row], scale, log2_approx(total) * 0.693147181f) : -CUDART_INF_F;
    }
};
