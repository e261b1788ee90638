// Registers that the warps of a warpgroup hand over to others of the block. All four do so together.
#pragma once

// Keeps `count` a thread, a multiple of 8, and gives the rest away.
template <int count>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// Waits until there are `count` a thread.
template <int count>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
