// Reductions over the 32 lanes of a converged warp: every lane gets the result, the same in every run.
#pragma once

#include <stdint.h>

template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
    for (int32_t distance = 16; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
    }
    return value;
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
    return warp_reduce(value, [](T a, T b) { return a + b; });
}
