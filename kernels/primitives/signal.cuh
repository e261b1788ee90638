// Words in global memory by which blocks tell each other how far they are.
#pragma once

#include <stdint.h>

// Adds to a counter after everything that this thread has seen or done before.
__device__ __forceinline__ void add_release(uint64_t address, int32_t count) {
    asm volatile("fence.acq_rel.gpu;\n\tred.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(address), "r"(count)
                 : "memory");
}

// The same, and what it was; what others did before their additions can be seen after it.
__device__ __forceinline__ int32_t add_acquire_release(uint64_t address, int32_t count) {
    int32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(count)
                 : "memory");
    return before;
}

// Waits until a counter reaches `count`; what was done before the additions can be seen after it.
__device__ __forceinline__ void wait_acquire(uint64_t address, int32_t count) {
    int32_t seen;
    while (true) {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(address) : "memory");
        if (seen >= count) {
            return;
        }
        __nanosleep(64);
    }
}
