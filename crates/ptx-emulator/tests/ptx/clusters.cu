// Kernels of clusters of CTAs, most with planted bugs. Compiled to clusters.ptx by
//   nvcc --ptx -arch=compute_90a -O3 -std=c++17 -o clusters.ptx clusters.cu
#include <cooperative_groups.h>
#include <stdint.h>

#define KERNEL extern "C" __global__ void

namespace cg = cooperative_groups;

struct alignas(64) Map {
    uint8_t bytes[128];
};

__device__ __forceinline__ uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }
__device__ __forceinline__ uint32_t rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ uint32_t ranks() {
    uint32_t ranks;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(ranks));
    return ranks;
}
__device__ __forceinline__ uint32_t map(uint32_t at, uint32_t rank) {
    uint32_t mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(at), "r"(rank));
    return mapped;
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}
__device__ __forceinline__ void init(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void arrive_remote(uint32_t barrier) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait_parity(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra DONE;\nbra AGAIN;\nDONE:\n}" ::"r"(barrier), "r"(parity)
                 : "memory");
}

// What a thread can know about its place, 16 words for each CTA.
KERNEL places(uint32_t* out) {
    __shared__ uint32_t box[4];
    cg::cluster_group cluster = cg::this_cluster();
    uint32_t* at = out + (blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)) * 16;
    uint32_t* peer = cluster.map_shared_rank(box, cluster.num_blocks() - 1);
    uint32_t words[16];
    asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(words[0]));
    asm("mov.u32 %0, %%cluster_ctaid.y;" : "=r"(words[1]));
    asm("mov.u32 %0, %%cluster_ctaid.z;" : "=r"(words[2]));
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(words[3]));
    asm("mov.u32 %0, %%cluster_nctaid.y;" : "=r"(words[4]));
    asm("mov.u32 %0, %%cluster_nctaid.z;" : "=r"(words[5]));
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(words[6]));
    asm("mov.u32 %0, %%clusterid.y;" : "=r"(words[7]));
    asm("mov.u32 %0, %%clusterid.z;" : "=r"(words[8]));
    asm("mov.u32 %0, %%nclusterid.x;" : "=r"(words[9]));
    asm("mov.u32 %0, %%nclusterid.y;" : "=r"(words[10]));
    asm("{\n.reg .pred p;\nmov.pred p, %%is_explicit_cluster;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(words[11]));
    words[12] = cluster.block_rank();
    words[13] = cluster.num_blocks();
    words[14] = cluster.query_shared_rank(peer) * 16 + cluster.query_shared_rank(box);
    uint32_t near, far, mapped;
    asm("{\n.reg .pred p;\nisspacep.shared::cta p, %1;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(near) : "l"(peer));
    asm("{\n.reg .pred p;\nisspacep.shared::cluster p, %1;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(far) : "l"(peer));
    asm("{\n.reg .u64 wide;\ncvta.to.shared::cluster.u64 wide, %1;\ncvt.u32.u64 %0, wide;\n}" : "=r"(mapped) : "l"(peer));
    words[15] = near * 2 + far + 4 * (mapped == map(shared_address(box), cluster.num_blocks() - 1));
    for (int i = 0; i < 16; ++i) at[i] = words[i];
}

// Every CTA counts its values into the bins of all: bin b lies in rank b / 32. BUG 1 no barrier between
// clearing and counting, 2 none between counting and reading, 3 CTAs alone synchronise, 4 the neighbour's
// bins are read and no barrier stands before the end.
template <int BUG> __device__ void histogram(const uint32_t* in, uint32_t* out, int count) {
    __shared__ uint32_t bins[32];
    cg::cluster_group cluster = cg::this_cluster();
    if (threadIdx.x < 32) bins[threadIdx.x] = 0;
    if (BUG == 3)
        __syncthreads();
    else if (BUG != 1)
        cluster.sync();
    const uint32_t* own = in + blockIdx.x * count;
    uint32_t mask = 32 * cluster.num_blocks() - 1;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        uint32_t bin = own[i] & mask;
        atomicAdd(cluster.map_shared_rank(bins, bin / 32) + bin % 32, 1);
    }
    if (BUG != 2) cluster.sync();
    uint32_t neighbour = (cluster.block_rank() + 1) % cluster.num_blocks();
    const uint32_t* theirs = cluster.map_shared_rank(bins, neighbour);
    if (threadIdx.x < 32) out[blockIdx.x * 32 + threadIdx.x] = theirs[threadIdx.x];
    if (BUG != 4) cluster.sync();
}
KERNEL histogram_correct(const uint32_t* in, uint32_t* out, int count) { histogram<0>(in, out, count); }
KERNEL histogram_uncleared(const uint32_t* in, uint32_t* out, int count) { histogram<1>(in, out, count); }
KERNEL histogram_early(const uint32_t* in, uint32_t* out, int count) { histogram<2>(in, out, count); }
KERNEL histogram_ctas(const uint32_t* in, uint32_t* out, int count) { histogram<3>(in, out, count); }
KERNEL histogram_left(const uint32_t* in, uint32_t* out, int count) { histogram<4>(in, out, count); }
// The cluster's size is the kernel's own.
KERNEL __cluster_dims__(4, 1, 1) histogram_of_four(const uint32_t* in, uint32_t* out, int count) { histogram<0>(in, out, count); }

// Each thread hands a number to the next CTA. BUG 1 the arrival is relaxed, 2 the number is written between
// arrival and wait, 3 arrives twice, 4 waits without arriving, 5 one CTA never comes to the last barrier, and
// nobody needs it, 6 one CTA ends, and then its memory is read, 7 the address of a peer in shared::cta.
template <int BUG> __device__ void exchange(uint32_t* out) {
    __shared__ uint32_t box[64];
    uint32_t at = shared_address(&box[threadIdx.x]), next = (rank() + 1) % ranks(), value;
    // Only that the others have begun.
    cluster_arrive_relaxed();
    cluster_wait();
    if (BUG == 2) cluster_arrive();
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(map(at, next)), "r"(rank() * 100 + threadIdx.x) : "memory");
    if (BUG == 1)
        cluster_arrive_relaxed();
    else if (BUG != 2 && BUG != 4)
        cluster_arrive();
    if (BUG == 3) cluster_arrive();
    cluster_wait();
    if (BUG == 6 && rank() == 1) return;
    if (BUG == 7)
        asm volatile("ld.shared::cta.u32 %0, [%1];" : "=r"(value) : "r"(map(at, next)) : "memory");
    else if (BUG == 6)
        asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(map(at, next)) : "memory");
    else
        value = box[threadIdx.x];
    out[blockIdx.x * 64 + threadIdx.x] = value;
    if (BUG == 5 && rank() == 0) return;
    cluster_sync();
}
KERNEL exchange_correct(uint32_t* out) { exchange<0>(out); }
KERNEL exchange_relaxed(uint32_t* out) { exchange<1>(out); }
KERNEL exchange_between(uint32_t* out) { exchange<2>(out); }
KERNEL exchange_twice(uint32_t* out) { exchange<3>(out); }
KERNEL exchange_unarrived(uint32_t* out) { exchange<4>(out); }
KERNEL exchange_one_less(uint32_t* out) { exchange<5>(out); }
KERNEL exchange_ended(uint32_t* out) { exchange<6>(out); }
KERNEL exchange_misnamed(uint32_t* out) { exchange<7>(out); }

// The first CTA of two fills a ring in the second: stores and an arrival at the other's mbarrier, or stores
// that count themselves (ASYNC). BUG 1 the stage is not waited for, 2 nobody waits for the mbarriers to
// be there, 3 too many bytes expected, 4 the reader never says that it has read, 5 the writer ends before the
// last of those arrivals.
template <bool ASYNC, int BUG> __device__ void ring(const uint32_t* in, uint32_t* out, int count) {
    __shared__ uint32_t stage[2][32];
    __shared__ uint64_t barriers[4];
    uint32_t full = shared_address(&barriers[0]), empty = shared_address(&barriers[2]);
    if (threadIdx.x == 0)
        for (int i = 0; i < 2; ++i) {
            init(full + 8 * i, ASYNC ? 1 : 32);
            init(empty + 8 * i, 32);
        }
    if (BUG == 2)
        __syncthreads();
    else
        cluster_sync();
    for (int i = 0; i < count; ++i) {
        uint32_t s = i % 2, parity = i / 2 & 1;
        if (rank() == 0) {
            if (BUG != 1) wait_parity(empty + 8 * s, parity ^ 1);
            uint32_t at = map(shared_address(&stage[s][threadIdx.x]), 1), barrier = map(full + 8 * s, 1);
            uint32_t value = in[i * 32 + threadIdx.x];
            if (ASYNC) {
                asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(at), "r"(value),
                             "r"(barrier)
                             : "memory");
            } else {
                asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(at), "r"(value) : "memory");
                arrive_remote(barrier);
            }
        } else {
            if (ASYNC && threadIdx.x == 0) expect(full + 8 * s, BUG == 3 ? 256 : 128);
            wait_parity(full + 8 * s, parity);
            out[i * 32 + threadIdx.x] = stage[s][31 - threadIdx.x];
            if (BUG != 4) arrive_remote(map(empty + 8 * s, 0));
        }
    }
    if (BUG != 5) cluster_sync();
}
KERNEL ring_correct(const uint32_t* in, uint32_t* out, int count) { ring<false, 0>(in, out, count); }
KERNEL ring_async(const uint32_t* in, uint32_t* out, int count) { ring<true, 0>(in, out, count); }
KERNEL ring_full(const uint32_t* in, uint32_t* out, int count) { ring<false, 1>(in, out, count); }
KERNEL ring_async_full(const uint32_t* in, uint32_t* out, int count) { ring<true, 1>(in, out, count); }
KERNEL ring_unmet(const uint32_t* in, uint32_t* out, int count) { ring<false, 2>(in, out, count); }
KERNEL ring_many(const uint32_t* in, uint32_t* out, int count) { ring<true, 3>(in, out, count); }
KERNEL ring_stuck(const uint32_t* in, uint32_t* out, int count) { ring<false, 4>(in, out, count); }
KERNEL ring_left(const uint32_t* in, uint32_t* out, int count) { ring<false, 5>(in, out, count); }

// Tiles of 16 x 64 halves, each loaded once for all CTAs of the cluster: rank r sends its quarter of the rows
// to everybody. BUG 1 the next tile waits for the sender's own threads alone, 2 the mask leaves out the last
// CTA, 3 the mask names a CTA that is not there, 4 each CTA counts only what it sent itself.
template <int BUG> __device__ void multicast(const Map& tensor, uint16_t* out, int count) {
    __shared__ __align__(1024) uint16_t tile[32 * 64];
    __shared__ uint64_t barriers[2];
    uint32_t full = shared_address(&barriers[0]), empty = shared_address(&barriers[1]);
    if (threadIdx.x == 0) {
        init(full, 1);
        init(empty, BUG == 1 ? 1 : ranks());
    }
    cluster_sync();
    uint32_t rows = 32 / ranks();
    for (int i = 0; i < count; ++i) {
        if (threadIdx.x == 0) {
            expect(full, BUG == 4 ? 4096 / ranks() : 4096);
            wait_parity(empty, (i & 1) ^ 1);
            uint16_t mask = (1 << (ranks() + (BUG == 3))) - 1;
            if (BUG == 2) mask >>= 1;
            asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                         " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(tile) + rank() * rows * 128),
                         "l"(&tensor), "r"(0), "r"(int(32 * i + rank() * rows)), "r"(full), "h"(mask)
                         : "memory");
        }
        wait_parity(full, i & 1);
        for (int n = threadIdx.x; n < 2048; n += blockDim.x) {
            int row = n / 64, chunk = (n % 64 / 8) ^ (row % 8);
            out[(blockIdx.x * count + i) * 2048 + n] = tile[row * 64 + chunk * 8 + n % 8];
        }
        __syncthreads();
        // Everybody tells every sender that this CTA has read.
        if (BUG == 1) {
            if (threadIdx.x == 0) arrive_remote(map(empty, rank()));
        } else if (threadIdx.x < ranks()) {
            arrive_remote(map(empty, threadIdx.x));
        }
    }
    cluster_sync();
}
KERNEL multicast_correct(const __grid_constant__ Map tensor, uint16_t* out, int count) { multicast<0>(tensor, out, count); }
KERNEL multicast_overwritten(const __grid_constant__ Map tensor, uint16_t* out, int count) { multicast<1>(tensor, out, count); }
KERNEL multicast_one_less(const __grid_constant__ Map tensor, uint16_t* out, int count) { multicast<2>(tensor, out, count); }
KERNEL multicast_one_more(const __grid_constant__ Map tensor, uint16_t* out, int count) { multicast<3>(tensor, out, count); }
KERNEL multicast_few(const __grid_constant__ Map tensor, uint16_t* out, int count) { multicast<4>(tensor, out, count); }

// A block of bytes from one CTA to the next by an engine. BUG 1 no proxy fence, 2 the source is overwritten
// before it is read, 3 the copy goes to its own CTA.
template <int BUG> __device__ void push(uint32_t* out) {
    __shared__ __align__(128) uint32_t from[64], to[64];
    __shared__ uint64_t barrier;
    uint32_t full = shared_address(&barrier), next = (rank() + 1) % ranks();
    if (threadIdx.x == 0) {
        init(full, 1);
        expect(full, 256);
    }
    from[threadIdx.x] = rank() * 1000 + threadIdx.x;
    if (BUG != 1) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    cluster_sync();
    if (threadIdx.x == 0) {
        uint32_t target = BUG == 3 ? rank() : next;
        asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         map(shared_address(to), target)),
                     "r"(shared_address(from)), "r"(256), "r"(map(full, target))
                     : "memory");
    }
    if (BUG == 2) from[threadIdx.x] = 0;
    wait_parity(full, 0);
    out[blockIdx.x * 64 + threadIdx.x] = to[63 - threadIdx.x];
    cluster_sync();
    from[threadIdx.x] = 0;
}
KERNEL push_correct(uint32_t* out) { push<0>(out); }
KERNEL push_unfenced(uint32_t* out) { push<1>(out); }
KERNEL push_changed(uint32_t* out) { push<2>(out); }
KERNEL push_home(uint32_t* out) { push<3>(out); }
