// Chooses the best keys of every row, or the best pages: which entries of the KV cache stay, and which
// tokens go on behind the TSP layer.
//
// A short row is one block's work. A long one takes several launches of many blocks: ranks and first
// digit, second digit, third digit, counts, indices. No block waits for another: the last one to finish
// a histogram reads it.

#include "abi.h"
#include "primitives/signal.cuh"
#include "select/radix.cuh"
#include "select/row.cuh"

static_assert(sizeof(fastkv_pooling) == 8, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_select_params) == 160, "src/abi.rs was generated for another layout");

namespace {

// Shared memory of a block that has a row to itself; the ranks follow.
struct BlockShared {
    Histogram histogram;
    SelectScratch scratch;
    uint32_t padding[2];
};
static_assert(sizeof(BlockShared) == FASTKV_SELECT_BLOCK_BYTES, "the driver counts on another size");
static_assert(sizeof(BlockShared) % FASTKV_VECTOR_BYTES == 0, "ranks are read as vectors");

// What the launches of a row hand on.
struct State {
    uint32_t bins[DIGITS][FASTKV_SELECT_BINS];
    uint32_t blocks_done[DIGITS];
    Threshold threshold;
    uint32_t padding[3];
};
static_assert(sizeof(State) == FASTKV_SELECT_STATE_BYTES, "the driver counts on another size");

// A block's share of a row in several launches.
struct Chunk {
    uint32_t row;
    int32_t first;
    int32_t count; // items; 0 where the row has none for this block, or keeps none
    uint32_t* ranks;
    Split* splits; // of all chunks of the row
    State* state;
};

__device__ __forceinline__ Chunk chunk_of(const fastkv_select_params& p, const Row& row) {
    Chunk chunk;
    chunk.row = blockIdx.x;
    chunk.first = min(int64_t(blockIdx.y) * p.chunk, int64_t(row.items));
    chunk.count = row.kept == 0 ? 0 : min(p.chunk, row.items - chunk.first);
    chunk.ranks = reinterpret_cast<uint32_t*>(p.ranks) + chunk.row * p.rank_stride + chunk.first;
    chunk.splits = reinterpret_cast<Split*>(p.splits) + int64_t(chunk.row) * gridDim.y;
    chunk.state = reinterpret_cast<State*>(p.states) + chunk.row;
    return chunk;
}

// Adds a block's histogram of a digit to the row's. The last block of the row to do so finds the digit.
__device__ __forceinline__ void share_digit(const fastkv_select_params& p, const Row& row, const Chunk& chunk,
                                            int32_t digit, const Threshold& threshold, Histogram& histogram,
                                            SelectScratch& scratch) {
    uint32_t* all = chunk.state->bins[digit];
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
        const int32_t bin = threadIdx.x + i * FASTKV_SELECT_THREADS;
        if (histogram.bins[bin] != 0) {
            atomicAdd(all + bin, histogram.bins[bin]);
        }
    }
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        const int32_t blocks = (row.items + p.chunk - 1) / p.chunk;
        last = add_acquire_release(reinterpret_cast<uint64_t>(&chunk.state->blocks_done[digit]), 1) == blocks - 1;
    }
    __syncthreads();
    if (last) {
        sum_stretches(bins_of_thread(all), histogram.stretches);
        Split before = {0, 0};
        const Threshold found =
            next_digit<OneHistogram>(all, histogram.stretches, digit, threshold, scratch, 0, before);
        if (threadIdx.x == 0) {
            chunk.state->threshold = found;
        }
    }
}

} // namespace

// Grid: x = row. The whole of a short row: ranks stay in shared memory.
extern "C" __global__ void __launch_bounds__(FASTKV_SELECT_THREADS, 1)
    fastkv_select_block(__grid_constant__ const fastkv_select_params p) {
    extern __shared__ uint4 dynamic_shared[];
    BlockShared& shared = *reinterpret_cast<BlockShared*>(dynamic_shared);
    uint32_t* ranks = reinterpret_cast<uint32_t*>(&shared + 1);
    const Row row = row_of(p, blockIdx.x);
    if (row.kept > 0) {
        load_ranks(p, row, 0, row.items, ranks);
        Threshold threshold = {0, row.kept};
        Split before = {0, 0};
#pragma unroll
        for (int32_t digit = 0; digit < DIGITS; ++digit) {
            Histogram& histogram = shared.histogram;
            clear_bins(histogram);
            count_digits(ranks, row.items, digit, threshold, histogram);
            sum_stretches(bins_of_thread(histogram.bins), histogram.stretches);
            threshold = next_digit<OneHistogram>(histogram.bins, histogram.stretches, digit, threshold,
                                                 shared.scratch, 0, before);
        }
        write_kept(ranks, 0, row.items, threshold, before, kept_of(p, blockIdx.x), shared.scratch);
    }
    finish_row(p, row, blockIdx.x, 0, 1);
}

// Grid of this and of the following: x = row, y = chunk of its items. Ranks of the items, and their
// first digit.
extern "C" __global__ void __launch_bounds__(FASTKV_SELECT_THREADS, 1)
    fastkv_select_rank(__grid_constant__ const fastkv_select_params p) {
    __shared__ uint4 vectors[FASTKV_SELECT_CHUNK / 4];
    __shared__ alignas(16) Histogram histogram;
    __shared__ SelectScratch scratch;
    const Row row = row_of(p, blockIdx.x);
    const Chunk chunk = chunk_of(p, row);
    if (chunk.count == 0) {
        return;
    }
    uint32_t* ranks = reinterpret_cast<uint32_t*>(vectors);
    clear_bins(histogram);
    load_ranks(p, row, chunk.first, chunk.count, ranks);
    for (int32_t item = 4 * threadIdx.x; item < chunk.count; item += 4 * FASTKV_SELECT_THREADS) {
        reinterpret_cast<uint4*>(chunk.ranks)[item / 4] = vectors[item / 4];
    }
    const Threshold threshold = {0, row.kept};
    count_digits(ranks, chunk.count, 0, threshold, histogram);
    share_digit(p, row, chunk, 0, threshold, histogram, scratch);
}

// The second or the third digit.
extern "C" __global__ void __launch_bounds__(FASTKV_SELECT_THREADS)
    fastkv_select_digit(__grid_constant__ const fastkv_select_params p) {
    __shared__ alignas(16) Histogram histogram;
    __shared__ SelectScratch scratch;
    const Row row = row_of(p, blockIdx.x);
    const Chunk chunk = chunk_of(p, row);
    if (chunk.count == 0) {
        return;
    }
    clear_bins(histogram);
    const Threshold threshold = chunk.state->threshold;
    count_digits(chunk.ranks, chunk.count, p.digit, threshold, histogram);
    share_digit(p, row, chunk, p.digit, threshold, histogram, scratch);
}

// How many items of each chunk lie above the threshold, and how many at it.
extern "C" __global__ void __launch_bounds__(FASTKV_SELECT_THREADS)
    fastkv_select_split(__grid_constant__ const fastkv_select_params p) {
    __shared__ SelectScratch scratch;
    const Row row = row_of(p, blockIdx.x);
    const Chunk chunk = chunk_of(p, row);
    if (chunk.count == 0) {
        return;
    }
    const uint32_t of_warp = WarpItems(chunk.count).split(chunk.ranks, chunk.state->threshold.rank);
    uint32_t all;
    sum_of_warps_before(of_warp, scratch, all);
    if (threadIdx.x == 0) {
        chunk.splits[blockIdx.y] = {all >> 16, all & 0xffff};
    }
}

// The kept items of each chunk.
extern "C" __global__ void __launch_bounds__(FASTKV_SELECT_THREADS)
    fastkv_select_write(__grid_constant__ const fastkv_select_params p) {
    __shared__ SelectScratch scratch;
    const Row row = row_of(p, blockIdx.x);
    const Chunk chunk = chunk_of(p, row);
    if (chunk.count > 0) {
        Split mine = {0, 0};
        for (uint32_t before = threadIdx.x; before < blockIdx.y; before += FASTKV_SELECT_THREADS) {
            mine.above += chunk.splits[before].above;
            mine.equal += chunk.splits[before].equal;
        }
        const Split before = {sum_of_block(mine.above, scratch), sum_of_block(mine.equal, scratch)};
        const Threshold threshold = chunk.state->threshold;
        write_kept(chunk.ranks, chunk.first, chunk.count, threshold, before, kept_of(p, blockIdx.x), scratch);
    }
    finish_row(p, row, blockIdx.x, blockIdx.y, gridDim.y);
}
