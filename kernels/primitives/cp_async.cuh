// Copies from global to shared memory that a thread does not wait for.
#pragma once

#include <stdint.h>

// 16 bytes past L1, or 16 zeros without a read where `wanted` is false.
__device__ __forceinline__ void cp_async(uint32_t shared, uint64_t global, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(wanted ? 16 : 0)
                 : "memory");
}

// Closes a group: the copies of this thread since the last one.
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until no more than `open` groups of this thread are under way.
template <int open>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
}

// 4 bytes.
__device__ __forceinline__ void cp_async_word(uint32_t shared, uint64_t global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}
