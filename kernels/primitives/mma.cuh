// Matrix products of a warp, and the element types they take.
//
// A fragment is what a lane holds of a matrix. With g = lane / 4 and t = lane % 4:
//   A, 16 x 16, rows first:     a[0] (g, 2t) (g, 2t + 1)   a[1] the same 8 rows down
//                               a[2], a[3] the same 8 columns on
//   B, 16 x 8, columns first:   b[0] (2t, g) (2t + 1, g)   b[1] the same 8 rows down
//   C, 16 x 8:                  c[0], c[1] (g, 2t) (g, 2t + 1)   c[2], c[3] the same 8 rows down
// so two C fragments side by side, packed, are an A fragment.
#pragma once

#include <stdint.h>

struct F16 {};
struct BF16 {};

// c += a b.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<F16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<BF16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
