// Vector accesses to global memory.
#pragma once

#include <stdint.h>

// 16 bytes that are read once and that nothing writes during the kernel: past L1, which they would
// only flush, through the read-only path.
__device__ __forceinline__ uint4 load_once(uint64_t address) {
    uint4 value;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
        : "l"(address));
    return value;
}

__device__ __forceinline__ void store(uint64_t address, uint4 value) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
}
