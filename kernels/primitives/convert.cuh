// 16-bit elements to and from f32.
#pragma once

#include "primitives/mma.cuh"

// Two elements in a word, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second);

template <>
__device__ __forceinline__ uint32_t pack<F16>(float first, float second) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

template <>
__device__ __forceinline__ uint32_t pack<BF16>(float first, float second) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

template <typename T>
__device__ __forceinline__ float widen(uint16_t element);

template <>
__device__ __forceinline__ float widen<F16>(uint16_t element) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(element));
    return value;
}

template <>
__device__ __forceinline__ float widen<BF16>(uint16_t element) {
    return __uint_as_float(uint32_t(element) << 16);
}

// The bits of an element's exponent: all set in infinities and NaN, and there alone.
template <typename T>
constexpr uint16_t EXPONENT = 0x7C00;
template <>
constexpr uint16_t EXPONENT<BF16> = 0x7F80;

template <typename T>
__device__ __forceinline__ bool finite(uint32_t element) {
    return (element & EXPONENT<T>) != EXPONENT<T>;
}

// A pair of elements, with zeros in the place of those that are not finite.
template <typename T>
__device__ __forceinline__ uint32_t finite_part(uint32_t pair) {
    return pair & ((finite<T>(pair) ? 0xFFFF : 0) | (finite<T>(pair >> 16) ? 0xFFFF0000 : 0));
}
