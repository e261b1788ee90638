// Barriers in shared memory that count arrivals and bytes of copies, and numbered barriers.
#pragma once

#include <stdint.h>

__device__ __forceinline__ uint32_t shared_address(const void* at) {
    return uint32_t(__cvta_generic_to_shared(at));
}

__device__ __forceinline__ void mbarrier_init(uint64_t& barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
                 : "memory");
}

// Makes barriers known to the copy engine. Follows the last `mbarrier_init`; a barrier has to follow.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Arrives, and has the phase wait for that many bytes as well.
__device__ __forceinline__ void mbarrier_arrive_expecting(uint64_t& barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
                 "r"(bytes)
                 : "memory");
}

// Waits until the phase of this parity has ended; of a fresh barrier, the phase of parity 1 has.
__device__ __forceinline__ void mbarrier_wait(uint64_t& barrier, uint32_t parity) {
    asm volatile("{\n\t.reg .pred ended;\n"
                 "AGAIN:\n\tmbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n\t"
                 "@!ended bra AGAIN;\n\t}" ::"r"(shared_address(&barrier)),
                 "r"(parity)
                 : "memory");
}

// Numbered barriers, 1 to 15, of whole warps: 0 is that of __syncthreads.
template <int32_t threads>
__device__ __forceinline__ void barrier_sync(int32_t number) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "n"(threads) : "memory");
}

template <int32_t threads>
__device__ __forceinline__ void barrier_arrive(int32_t number) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "n"(threads) : "memory");
}
