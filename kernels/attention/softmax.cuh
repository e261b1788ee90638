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
    float maximum[2] = {-CUDART_INF_F, -CUDART_INF_F};
    float sum[2] = {0.0f, 0.0f};

    // Replaces logits by exp2((logit - maximum) * factor); `shrink` is for what was accumulated before.
    // A row that has seen no key yet has maximum -inf; where `masked` says that there may be such rows
    // they get zeros.
    template <bool masked, int blocks>
    __device__ __forceinline__ void update(float (&s)[blocks][4], float factor, float (&shrink)[2]) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float most = maximum[row];
#pragma unroll
            for (int j = 0; j < blocks; ++j) {
                most = fmaxf(most, fmaxf(s[j][2 * row], s[j][2 * row + 1]));
            }
            most = quad_reduce(most, [](float a, float b) { return fmaxf(a, b); });
            const float base = masked && most == -CUDART_INF_F ? 0.0f : most;
            shrink[row] = exp2_approx((maximum[row] - base) * factor);
            maximum[row] = most;
            const float offset = -base * factor;
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
    // A row that saw no key has 0 and -inf.
    __device__ __forceinline__ void finish(int row, float scale, float& normalize, float& lse) const {
        const float total = quad_reduce(sum[row], [](float a, float b) { return a + b; });
        const bool seen = total != 0.0f;
        normalize = seen ? __fdividef(1.0f, total) : 0.0f;
        lse = seen ? fmaf(maximum[row], scale, log2_approx(total) * 0.693147181f) : -CUDART_INF_F;
    }
};
