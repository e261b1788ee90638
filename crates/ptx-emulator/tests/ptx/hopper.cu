// Bulk copies, tensor maps and wgmma, each with planted bugs. Compiled to hopper.ptx by
//   nvcc --ptx -arch=compute_90a -O3 -std=c++17 -o hopper.ptx hopper.cu
#include <stdint.h>

#define KERNEL extern "C" __global__ void

struct alignas(64) Map {
    uint8_t bytes[128];
};

__device__ __forceinline__ uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }
__device__ __forceinline__ void wait_parity(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(barrier), "r"(parity)
                 : "memory");
}
__device__ __forceinline__ void init(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void load_tile(uint32_t to, const Map* map, int x, int y, uint32_t barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                 ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(barrier)
                 : "memory");
}

// A tile of 16 x 64 halves through shared memory into a plain array, tile after tile along y.
// BUG 0 none, 1 does not wait, 2 expects too few bytes, 3 expects too many, 4 next copy without barrier.
template <int BUG> __device__ void tiles(const Map& map, uint16_t* out, int x, int y, int count) {
    __shared__ __align__(1024) uint16_t tile[16 * 64];
    __shared__ uint64_t full;
    uint32_t barrier = shared_address(&full);
    if (threadIdx.x == 0) init(barrier, 1);
    __syncthreads();
    for (int i = 0; i < count; ++i) {
        if (threadIdx.x == 0) {
            expect(barrier, BUG == 2 ? 1024 : BUG == 3 ? 4096 : 2048);
            load_tile(shared_address(tile), &map, x, y + 16 * i, barrier);
        }
        if (BUG != 1) wait_parity(barrier, i & 1);
        for (int n = threadIdx.x; n < 1024; n += blockDim.x) {
            // 16-byte chunks are permuted by the row within 8.
            int row = n / 64, chunk = (n % 64 / 8) ^ (row % 8);
            out[i * 1024 + n] = tile[row * 64 + chunk * 8 + n % 8];
        }
        if (BUG != 4) __syncthreads();
    }
}
KERNEL tiles_correct(const __grid_constant__ Map map, uint16_t* out, int x, int y, int count) { tiles<0>(map, out, x, y, count); }
KERNEL tiles_early(const __grid_constant__ Map map, uint16_t* out, int x, int y, int count) { tiles<1>(map, out, x, y, count); }
KERNEL tiles_few(const __grid_constant__ Map map, uint16_t* out, int x, int y, int count) { tiles<2>(map, out, x, y, count); }
KERNEL tiles_many(const __grid_constant__ Map map, uint16_t* out, int x, int y, int count) { tiles<3>(map, out, x, y, count); }
KERNEL tiles_overwritten(const __grid_constant__ Map map, uint16_t* out, int x, int y, int count) { tiles<4>(map, out, x, y, count); }

// A tile made by threads and stored by a tensor copy. BUG 1 no proxy fence, 2 no barrier, 3 the tile is
// changed before the copy has read it.
template <int BUG> __device__ void stores(const Map& map, int x, int y) {
    __shared__ __align__(1024) uint16_t tile[16 * 64];
    for (int n = threadIdx.x; n < 1024; n += blockDim.x) {
        int row = n / 64, chunk = (n % 64 / 8) ^ (row % 8);
        tile[row * 64 + chunk * 8 + n % 8] = n;
    }
    if (BUG != 1) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    if (BUG != 2) __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(x), "r"(y),
                     "r"(shared_address(tile))
                     : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        if (BUG != 3) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        tile[0] = 1;
    }
}
KERNEL stores_correct(const __grid_constant__ Map map, int x, int y) { stores<0>(map, x, y); }
KERNEL stores_unfenced(const __grid_constant__ Map map, int x, int y) { stores<1>(map, x, y); }
KERNEL stores_early(const __grid_constant__ Map map, int x, int y) { stores<2>(map, x, y); }
KERNEL stores_changed(const __grid_constant__ Map map, int x, int y) { stores<3>(map, x, y); }

// A row of bytes there and back, without a tensor map.
KERNEL row(const uint8_t* in, uint8_t* out, uint32_t bytes) {
    __shared__ __align__(128) uint8_t box[4096];
    __shared__ uint64_t full;
    uint32_t barrier = shared_address(&full), at = shared_address(box);
    if (threadIdx.x == 0) {
        init(barrier, 1);
        expect(barrier, bytes);
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(at), "l"(in),
                     "r"(bytes), "r"(barrier)
                     : "memory");
        wait_parity(barrier, 0);
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(out), "r"(at), "r"(bytes) : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
}
