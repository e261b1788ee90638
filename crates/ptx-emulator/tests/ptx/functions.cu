// Functions that nvcc leaves as such, printf and assert. Compiled to functions.ptx by
//   nvcc --ptx -arch=compute_90 -O3 -std=c++17 -o functions.ptx functions.cu
#include <assert.h>
#include <stdint.h>
#include <stdio.h>

#define KERNEL extern "C" __global__ void

struct Box {
    double weight;
    int sides[3];
};

__device__ __noinline__ int add(int a, int b) {
    if (a > 20) return b;
    return a + b * 2;
}
__device__ __noinline__ float sum(const float* values, int count) {
    float total = 0;
    for (int i = 0; i < count; ++i) total += values[i];
    return total;
}
// A structure there and back, a call within the call, and shared memory of the function.
__device__ __noinline__ Box packed(Box box, int by) {
    __shared__ int scratch[64];
    scratch[threadIdx.x] = by;
    __syncthreads();
    box.weight *= by;
    box.sides[by % 3] = add(by, box.sides[0]);
    box.sides[2] += scratch[63 - threadIdx.x];
    __syncthreads();
    return box;
}
// Some lanes return early, the others meet them behind the call.
__device__ __noinline__ void raise(uint32_t* flags, int i) {
    if (i % 3 == 0) return;
    flags[i] = i;
    if (i % 3 == 1) return;
    flags[i] = 2 * i;
}
KERNEL calls(float* out, uint32_t* flags, float x) {
    float values[8];
    for (int i = 0; i < 8; ++i) values[(i * 3 + threadIdx.x) & 7] = i * x;
    int i = threadIdx.x;
    Box first = packed({1.5, {1, 2, 3}}, i), second = packed({0.5, {4, 5, 6}}, 63 - i);
    flags[i] = 0;
    raise(flags, i);
    unsigned lanes = __ballot_sync(0xffffffffu, true);
    out[i] = add(i, 7) + sum(values, 4 + i % 5) + first.weight + first.sides[0] + 10 * first.sides[1] + 100 * first.sides[2] +
             second.weight + second.sides[0] + 10 * second.sides[1] + 100 * second.sides[2] + (lanes == 0xffffffffu);
    if (i == 5) printf("thread %d of %s: %f, %5.2f%%, %llu\n", i, "all", 0.5f * i, x, 1ull << 40);
}

KERNEL asserts(const int* in) { assert(in[threadIdx.x] < 5); }
