// The selection of select.cu on Hopper: a cluster of blocks holds the ranks of a row in its shared memory
// from the first digit to the last index, in one launch. A block's histograms stay where they are, and
// each of the others reads them there: one barrier for each digit.

#include "abi.h"
#include "primitives/cluster.cuh"
#include "select/radix.cuh"
#include "select/row.cuh"

namespace {

// Shared memory of a block; the ranks follow. A histogram for each digit, so that none is cleared while
// others read it.
struct ClusterShared {
    uint32_t bins[DIGITS][FASTKV_SELECT_BINS];
    SelectScratch scratch;
    uint32_t padding[2];
};
static_assert(sizeof(ClusterShared) == FASTKV_SELECT_CLUSTER_BYTES, "the driver counts on another size");
static_assert(sizeof(ClusterShared) % FASTKV_VECTOR_BYTES == 0, "ranks are read as vectors");

__device__ __forceinline__ void add(uint4& sum, uint4 four) {
    sum = make_uint4(sum.x + four.x, sum.y + four.y, sum.z + four.z, sum.w + four.w);
}

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
            clear_bins(shared.bins[digit]);
        }
        load_ranks(p, row, first, count, ranks);

        Threshold threshold = {0, row.kept};
        // This thread's share of the items above the threshold, and of those at it, in the blocks before.
        Split mine = {0, 0};
#pragma unroll
        for (int32_t digit = 0; digit < DIGITS; ++digit) {
            count_digits(ranks, count, digit, threshold, shared.bins[digit]);
            cluster_arrive();
            cluster_wait();
            uint4 all = make_uint4(0, 0, 0, 0);
            uint4 before = make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int32_t other = 0; other < FASTKV_SELECT_CLUSTER; ++other) {
                const uint4 four = load_cluster(bins_of_thread(shared.bins[digit]), other);
                add(all, four);
                if (other < block) {
                    add(before, four);
                }
            }
            threshold = next_digit(from_the_top(all), digit, threshold, shared.scratch);
            const uint4 four = from_the_top(before);
            const uint32_t of[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int32_t i = 0; i < 4; ++i) {
                const uint32_t bin = bin_of(i);
                const uint32_t found = digit_of(threshold.rank, digit);
                mine.above += bin > found ? of[i] : 0;
                mine.equal += digit == DIGITS - 1 && bin == found ? of[i] : 0;
            }
        }
        // Nobody reads another block's memory any more; none may end before that.
        cluster_arrive();
        Split before;
        sum_before(mine.above, shared.scratch, before.above);
        sum_before(mine.equal, shared.scratch, before.equal);
        write_kept(ranks, first, count, threshold, before, kept_of(p, number), shared.scratch);
        cluster_wait();
    }
    finish_row(p, row, number, block, FASTKV_SELECT_CLUSTER);
}
