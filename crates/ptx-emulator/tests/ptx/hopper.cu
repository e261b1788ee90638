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
// BUG 0 none, 1 does not wait, 2 expects too few bytes, 3 expects too many, 4 next copy without barrier, 5 the
// tile is wiped by threads before the next copy, and no proxy fence stands between, 6 one copy too many.
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
        for (int n = threadIdx.x; n < 1024; n += blockDim.x) tile[n] = 0xdead;
        if (BUG != 5) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads();
    }
    if (BUG == 6 && threadIdx.x == 0) {
        expect(barrier, 2048);
        load_tile(shared_address(tile), &map, x, y, barrier);
    }
}
KERNEL tiles_correct(const __grid_constant__ Map map, uint16_t* out, int x, int y, int count) { tiles<0>(map, out, x, y, count); }
KERNEL tiles_early(const __grid_constant__ Map map, uint16_t* out, int x, int y, int count) { tiles<1>(map, out, x, y, count); }
KERNEL tiles_few(const __grid_constant__ Map map, uint16_t* out, int x, int y, int count) { tiles<2>(map, out, x, y, count); }
KERNEL tiles_many(const __grid_constant__ Map map, uint16_t* out, int x, int y, int count) { tiles<3>(map, out, x, y, count); }
KERNEL tiles_overwritten(const __grid_constant__ Map map, uint16_t* out, int x, int y, int count) { tiles<4>(map, out, x, y, count); }
KERNEL tiles_unfenced(const __grid_constant__ Map map, uint16_t* out, int x, int y, int count) { tiles<5>(map, out, x, y, count); }
KERNEL tiles_left(const __grid_constant__ Map map, uint16_t* out, int x, int y, int count) { tiles<6>(map, out, x, y, count); }

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

// Words through device memory: threads write them, an engine copies them to shared memory and from there to
// another place, where threads read them. BUG 1 the engine is not told of what threads wrote, 2 threads read when
// the copy has only read its source, 3 the thread ends without waiting for its copy.
template <int BUG> __device__ void relay(uint32_t* there, uint32_t* back, uint32_t* out) {
    __shared__ __align__(128) uint32_t box[64];
    __shared__ uint64_t full;
    uint32_t barrier = shared_address(&full), at = shared_address(box);
    there[threadIdx.x] = threadIdx.x * 3;
    if (BUG != 1) asm volatile("fence.proxy.async.global;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0) {
        init(barrier, 1);
        expect(barrier, 256);
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(at), "l"(there),
                     "r"(256), "r"(barrier)
                     : "memory");
        wait_parity(barrier, 0);
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(back), "r"(at), "r"(256) : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        if (BUG == 2)
            asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        else if (BUG != 3)
            asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    if (BUG != 3) out[threadIdx.x] = back[63 - threadIdx.x];
}
KERNEL relay_correct(uint32_t* there, uint32_t* back, uint32_t* out) { relay<0>(there, back, out); }
KERNEL relay_unfenced(uint32_t* there, uint32_t* back, uint32_t* out) { relay<1>(there, back, out); }
KERNEL relay_early(uint32_t* there, uint32_t* back, uint32_t* out) { relay<2>(there, back, out); }
KERNEL relay_left(uint32_t* there, uint32_t* back, uint32_t* out) { relay<3>(there, back, out); }

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

// d[64][128] = a[64][64] * b, one warpgroup, four steps of 16. TRANSPOSED: b lies as [64 of k][128] in two
// halves of 64 columns, else as [128][64 of k]. REGISTERS: a comes in registers. BUG 1 no proxy fence, 2 the
// result is used before the wait, 3 shared memory is overwritten before the wait, 4 the wait leaves one
// group, 5 one warp of four never comes, 8 one warp has another descriptor, 6 no wgmma.fence at all. TWICE: the product is multiplied by three and
// added to itself; 7 without another wgmma.fence.
__device__ __forceinline__ uint64_t descriptor(uint32_t at, uint32_t leading, uint32_t stride) {
    return uint64_t(at >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}
template <bool TRANSPOSED> __device__ __forceinline__ void product(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, 0, %67;\n}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSED));
}
template <bool TRANSPOSED> __device__ __forceinline__ void product(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANSPOSED));
}
template <bool TRANSPOSED, bool REGISTERS, int BUG, bool TWICE = false> __device__ void gemm(const uint16_t* a, const uint16_t* b, float* out) {
    __shared__ __align__(1024) uint16_t as[64 * 64], bs[128 * 64];
    for (int n = threadIdx.x; n < 64 * 64; n += 128) {
        int row = n / 64, k = n % 64;
        as[row * 64 + (k / 8 ^ row % 8) * 8 + k % 8] = a[n];
    }
    for (int n = threadIdx.x; n < 128 * 64; n += 128) {
        if (TRANSPOSED) {
            // Element (k, column) of b.
            int k = n / 128, column = n % 128;
            bs[column / 64 * 4096 + k * 64 + (column % 64 / 8 ^ k % 8) * 8 + column % 8] = b[n];
        } else {
            int column = n / 64, k = n % 64;
            bs[column * 64 + (k / 8 ^ column % 8) * 8 + k % 8] = b[n];
        }
    }
    if (BUG != 1) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (BUG == 5 && threadIdx.x >= 96) return;
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, first = threadIdx.x % 4 * 2;
    uint32_t fragments[4][4];
    for (int step = 0; step < 4; ++step)
        for (int n = 0; n < 4; ++n)
            fragments[step][n] = *reinterpret_cast<const uint32_t*>(a + (row + n % 2 * 8) * 64 + step * 16 + first + n / 2 * 8);
    float d[64];
    for (int n = 0; n < 64; ++n) d[n] = 0.0f;
    if (BUG != 6) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    auto multiply = [&](bool adds) {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            uint64_t left = descriptor(shared_address(as) + (BUG == 8 && threadIdx.x >= 96 ? 0 : step * 32), 16, 1024);
            uint64_t right = TRANSPOSED ? descriptor(shared_address(bs) + step * 2048, 8192, 1024)
                                        : descriptor(shared_address(bs) + step * 32, 16, 1024);
            if constexpr (REGISTERS)
                product<TRANSPOSED>(d, fragments[step], right, adds || step > 0);
            else
                product<TRANSPOSED>(d, left, right, adds || step > 0);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    };
    multiply(false);
    if (TWICE) {
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        for (int n = 0; n < 64; ++n) d[n] *= 3;
        if (BUG != 7) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
        multiply(true);
    }
    if (BUG == 3) bs[threadIdx.x] = 0;
    if (BUG != 2) asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(BUG == 4 ? 1 : 0) : "memory");
    for (int n = 0; n < 64; ++n)
        out[(row + n / 2 % 2 * 8) * 128 + n / 4 * 8 + first + n % 2] = d[n];
    if (BUG == 0) bs[threadIdx.x] = 0;
}
KERNEL gemm_shared(const uint16_t* a, const uint16_t* b, float* out) { gemm<false, false, 0>(a, b, out); }
KERNEL gemm_transposed(const uint16_t* a, const uint16_t* b, float* out) { gemm<true, false, 0>(a, b, out); }
KERNEL gemm_registers(const uint16_t* a, const uint16_t* b, float* out) { gemm<false, true, 0>(a, b, out); }
KERNEL gemm_registers_transposed(const uint16_t* a, const uint16_t* b, float* out) { gemm<true, true, 0>(a, b, out); }
KERNEL gemm_unfenced(const uint16_t* a, const uint16_t* b, float* out) { gemm<false, false, 1>(a, b, out); }
KERNEL gemm_unwaited(const uint16_t* a, const uint16_t* b, float* out) { gemm<false, false, 2>(a, b, out); }
KERNEL gemm_overwritten(const uint16_t* a, const uint16_t* b, float* out) { gemm<false, true, 3>(a, b, out); }
KERNEL gemm_one_left(const uint16_t* a, const uint16_t* b, float* out) { gemm<false, false, 4>(a, b, out); }
KERNEL gemm_three_warps(const uint16_t* a, const uint16_t* b, float* out) { gemm<false, false, 5>(a, b, out); }
KERNEL gemm_unequal(const uint16_t* a, const uint16_t* b, float* out) { gemm<false, false, 8>(a, b, out); }
KERNEL gemm_unordered(const uint16_t* a, const uint16_t* b, float* out) { gemm<false, false, 6>(a, b, out); }
KERNEL gemm_twice(const uint16_t* a, const uint16_t* b, float* out) { gemm<false, false, 0, true>(a, b, out); }
KERNEL gemm_twice_unordered(const uint16_t* a, const uint16_t* b, float* out) { gemm<false, false, 7, true>(a, b, out); }

// Two warpgroups share out registers: 128 each of 256 threads at first, or more. BUG 1 nobody gives any back, 2
// gives back more than it has, 3 takes less than it has, 4 one warp of the warpgroup takes another number, 5 one does
// not take part.
template <int BUG> __device__ void share_registers(uint32_t* out) {
    if (threadIdx.x < 128) {
        if (BUG == 2) asm volatile("setmaxnreg.dec.sync.aligned.u32 160;");
        else if (BUG != 1) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    } else {
        if (BUG == 5 && threadIdx.x >= 224) return;
        if (BUG == 3) asm volatile("setmaxnreg.inc.sync.aligned.u32 96;");
        else if (BUG == 4 && threadIdx.x >= 224) asm volatile("setmaxnreg.inc.sync.aligned.u32 208;");
        else asm volatile("setmaxnreg.inc.sync.aligned.u32 216;");
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    out[threadIdx.x] = threadIdx.x;
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
#define SHARE extern "C" __global__ void __launch_bounds__(256, 2)
SHARE registers_correct(uint32_t* out) { share_registers<0>(out); }
SHARE registers_kept(uint32_t* out) { share_registers<1>(out); }
SHARE registers_grown(uint32_t* out) { share_registers<2>(out); }
SHARE registers_shrunk(uint32_t* out) { share_registers<3>(out); }
SHARE registers_unequal(uint32_t* out) { share_registers<4>(out); }
SHARE registers_alone(uint32_t* out) { share_registers<5>(out); }
