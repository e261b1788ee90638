// Matrix products of a warpgroup: four warps, 64 rows, operands where the copy engine puts them.
//
// Accumulators lie as those of `mma`: block j of eight columns is d[j], with rows lane / 4 and 8 more. A
// group of products runs on while the warps do other things; until it is waited for its accumulators,
// and the shared memory that it reads, belong to it.
#pragma once

#include "primitives/mma.cuh"

// A tile in shared memory as the copy engine leaves it with a swizzle of 128 bytes: rows of 64 elements.
// Where a product runs along the rows, `half` is the distance in bytes from columns 0 to 63 to the next 64.
// In two words, so that steps are additions to the first.
struct Matrix {
    uint32_t low, high;

    __device__ __forceinline__ Matrix(uint32_t at, uint32_t half = 16)
        : low(at >> 4 | half >> 4 << 16), high(1024 >> 4 | 1u << 30) {}

    __device__ __forceinline__ uint64_t plus(uint32_t bytes) const {
        return uint64_t(high) << 32 | (low + (bytes >> 4));
    }
};

// Stands before every group: what the warps did to registers and shared memory comes first.
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all but `pending` groups are done. `d` are the accumulators of one that is: nothing of them is
// read earlier.
template <int pending, int blocks>
__device__ __forceinline__ void products_wait(float (&d)[blocks][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#pragma unroll
    for (int j = 0; j < blocks; ++j) {
        asm volatile("" : "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])::"memory");
    }
}

#define FASTKV_BLOCK(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define FASTKV_BLOCKS_4(d, j) \
    FASTKV_BLOCK(d, j), FASTKV_BLOCK(d, j + 1), FASTKV_BLOCK(d, j + 2), FASTKV_BLOCK(d, j + 3)
#define FASTKV_BLOCKS_8(d) FASTKV_BLOCKS_4(d, 0), FASTKV_BLOCKS_4(d, 4)
#define FASTKV_BLOCKS_16(d) FASTKV_BLOCKS_8(d), FASTKV_BLOCKS_4(d, 8), FASTKV_BLOCKS_4(d, 12)
#define FASTKV_NAMES_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTKV_NAMES_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d = a b^T, plus d if `accumulate`: a is 64 x 16, b 128 x 16, both rows first in shared memory.
template <typename T>
__device__ __forceinline__ void multiply_rows(float (&d)[16][4], uint64_t a, uint64_t b, bool accumulate);

// d += a b: a is 64 x 16, four words a lane, b 16 x 64 or 16 x 128, rows first in shared memory.
template <typename T>
__device__ __forceinline__ void multiply_columns(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b);
template <typename T>
__device__ __forceinline__ void multiply_columns(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b);

#define FASTKV_PRODUCTS(T, type)                                                                             \
    template <>                                                                                              \
    __device__ __forceinline__ void multiply_rows<T>(float (&d)[16][4], uint64_t a, uint64_t b,              \
                                                     bool accumulate) {                                      \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %66, 0;\n\t"                                     \
                     "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                            \
                     " {" FASTKV_NAMES_64 "}, %64, %65, p, 1, 1, 0, 0;\n\t}"                                 \
                     : FASTKV_BLOCKS_16(d)                                                                   \
                     : "l"(a), "l"(b), "r"(int32_t(accumulate))                                              \
                     : "memory");                                                                            \
    }                                                                                                        \
    template <>                                                                                              \
    __device__ __forceinline__ void multiply_columns<T>(float (&d)[16][4], const uint32_t (&a)[4],           \
                                                        uint64_t b) {                                        \
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" FASTKV_NAMES_64       \
                     "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                             \
                     : FASTKV_BLOCKS_16(d)                                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                    \
                     : "memory");                                                                            \
    }                                                                                                        \
    template <>                                                                                              \
    __device__ __forceinline__ void multiply_columns<T>(float (&d)[8][4], const uint32_t (&a)[4],            \
                                                        uint64_t b) {                                        \
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" FASTKV_NAMES_32        \
                     "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                             \
                     : FASTKV_BLOCKS_8(d)                                                                    \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                                    \
                     : "memory");                                                                            \
    }

FASTKV_PRODUCTS(F16, "f16")
FASTKV_PRODUCTS(BF16, "bf16")
