// Vector accesses to global memory.
#pragma once

#include <stdint.h>

// 16 bytes that are read once: past L1, which they would only flush. Not through the read-only path
// (.nc): ptxas may then move a load behind stores, and does, and a row of loads waits one by one.
__device__ __forceinline__ uint4 load_once(uint64_t address) {
    uint4 value;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
        : "l"(address)
        : "memory");
    return value;
}

__device__ __forceinline__ void store(uint64_t address, uint4 value) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
}

// 16 bytes that this kernel may write as well.
__device__ __forceinline__ uint4 load(uint64_t address) {
    uint4 value;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address)
                 : "memory");
    return value;
}
