// The selection of select.cu on Hopper: a cluster of blocks holds the ranks of a row in its shared memory
// from the first digit to the last index, in one launch. A block's histograms stay where they are, and
// each of the others reads there what it needs of them: one barrier for each digit.

#include "abi.h"
#include "primitives/cluster.cuh"
#include "select/radix.cuh"
#include "select/row.cuh"

namespace {

// Shared memory of a block; the ranks follow. A histogram for each digit, so that none is cleared while
// others read it.
struct ClusterShared {
    Histogram histograms[DIGITS];
    SelectScratch scratch;
    uint32_t padding[2];
};
static_assert(sizeof(ClusterShared) == FASTKV_SELECT_CLUSTER_BYTES, "the driver counts on another size");
static_assert(sizeof(ClusterShared) % FASTKV_VECTOR_BYTES == 0, "ranks are read as vectors");

// The histograms of a digit of all blocks.
struct ClusterHistograms {
    static constexpr int32_t COUNT = FASTKV_SELECT_CLUSTER;

    template <typename T>
    static __device__ __forceinline__ T load(const T* own, int32_t block) {
        return load_cluster(own, block);
    }
};

} // namespace

// Grid: x = (row, block of the cluster).
extern "C" __global__ void __launch_bounds__(FASTKV_SELECT_THREADS, 1)
    fastkv_select_cluster(__grid_constant__ const fastkv_select_params p) {
    extern __shared__ uint4 dynamic_shared[];
    ClusterShared& shared = *reinterpret_cast<ClusterShared*>(dynamic_shared);
    uint32_t* ranks = reinterpret_cast<uint32_t*>(&shared + 1);
    const uint32_t number = blockIdx.x / FASTKV_SELECT_CLUSTER;
    const int32_t block = cluster_block();
    const Row row = row_of(p, number);
    if (row.kept > 0) {
        const int32_t share = (row.items + 4 * FASTKV_SELECT_CLUSTER - 1) / (4 * FASTKV_SELECT_CLUSTER) * 4;
        const int32_t first = min(block * share, row.items);
        const int32_t count = min(share, row.items - first);
#pragma unroll
        for (int32_t digit = 0; digit < DIGITS; ++digit) {
            clear_bins(shared.histograms[digit]);
        }
        load_ranks(p, row, first, count, ranks);

        Threshold threshold = {0, row.kept};
        Split mine = {0, 0};
#pragma unroll
        for (int32_t digit = 0; digit < DIGITS; ++digit) {
            Histogram& histogram = shared.histograms[digit];
            count_digits(ranks, count, digit, threshold, histogram);
            sum_stretches(bins_of_thread(histogram.bins), histogram.stretches);
            cluster_arrive();
            cluster_wait();
            threshold = next_digit<ClusterHistograms>(histogram.bins, histogram.stretches, digit, threshold,
                                                      shared.scratch, block, mine);
        }
        // Nobody reads another block's memory any more; none may end before that.
        cluster_arrive();
        const Split before = {sum_of_block(mine.above, shared.scratch), sum_of_block(mine.equal, shared.scratch)};
        write_kept(ranks, first, count, threshold, before, kept_of(p, number), shared.scratch);
        cluster_wait();
    }
    finish_row(p, row, number, block, FASTKV_SELECT_CLUSTER);
}
