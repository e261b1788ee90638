// Copies of tiles by the copy engine, which reads what a tile is from a tensor map.
#pragma once

#include "primitives/mbarrier.cuh"

// Begins to copy a tile of a tensor of five dimensions; its bytes count towards a phase of the barrier.
__device__ __forceinline__ void copy_tile(uint32_t shared, const void* map, const int32_t (&at)[5],
                                          uint64_t& barrier) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(shared),
                 "l"(map), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4]),
                 "r"(shared_address(&barrier))
                 : "memory");
}

__device__ __forceinline__ void prefetch_map(const void* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// What this thread did to shared memory comes before what copies and products do there next.
__device__ __forceinline__ void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
