// Thread-block clusters: blocks that run at the same time and read each other's shared memory.
#pragma once

#include <stdint.h>

// Number of this block within its cluster.
__device__ __forceinline__ uint32_t cluster_block() {
    uint32_t number;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(number));
    return number;
}

// The two halves of a barrier among all threads of a cluster. What was written before the first is seen
// behind the second.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// 16 bytes of the shared memory of another block of the cluster, at the place that `own` has in this one.
__device__ __forceinline__ uint4 load_cluster(const uint4* own, uint32_t block) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(uint32_t(__cvta_generic_to_shared(own))), "r"(block));
    uint4 value;
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address)
                 : "memory");
    return value;
}
