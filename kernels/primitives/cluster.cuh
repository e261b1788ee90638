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

// Where another block of the cluster has what lies at `own` in this one.
__device__ __forceinline__ uint32_t cluster_address(const void* own, uint32_t block) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(uint32_t(__cvta_generic_to_shared(own))), "r"(block));
    return address;
}

// A word, or two, of the shared memory of another block.
__device__ __forceinline__ uint32_t load_cluster(const uint32_t* own, uint32_t block) {
    uint32_t value;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(cluster_address(own, block)) : "memory");
    return value;
}

__device__ __forceinline__ uint2 load_cluster(const uint2* own, uint32_t block) {
    uint2 value;
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
                 : "=r"(value.x), "=r"(value.y)
                 : "r"(cluster_address(own, block))
                 : "memory");
    return value;
}
