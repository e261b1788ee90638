// Radix selection: the rank of the worst item that is kept, found digit by digit from the top, and the
// kept items in their order. Integers throughout, so that nothing depends on who came first. Ranks are read
// in fours; behind the last item of a row lie lowest ones, which are never kept: they come behind all others.
//
// 32 bits are three digits of 11, 11 and 10. A histogram of the first says which of its values the
// worst kept rank has, one of the second among the items with that value goes on from there, and so
// on. Then all items above that rank are kept, and of those that have it the first few.
#pragma once

#include <stdint.h>

#include "../abi.h"

constexpr int32_t WARPS = FASTKV_SELECT_THREADS / 32;
constexpr int32_t DIGITS = 3;
constexpr uint32_t ALL_LANES = 0xffffffff;
static_assert(FASTKV_SELECT_BINS == 4 * FASTKV_SELECT_THREADS, "a thread has four bins");

// What is known of the worst kept rank: its leading digits, and how many items that share them are
// still to be kept. In the end: the rank, and how many of the items that have it are kept.
struct Threshold {
    uint32_t rank;
    int32_t wanted;
};

// Items above the threshold and items at it.
struct alignas(8) Split {
    uint32_t above;
    uint32_t equal;
};

// How many items have each value of a digit, and how many have one of each stretch of values: the digit of the
// worst kept rank is looked for among the stretches, and then among the values of one.
struct Histogram {
    uint32_t bins[FASTKV_SELECT_BINS];
    uint32_t stretches[FASTKV_SELECT_BINS / 32];
};
static_assert(FASTKV_SELECT_BINS / 32 == 2 * 32, "a lane looks at two stretches");

struct SelectScratch {
    uint32_t warps[WARPS];
    Threshold found;
};

__device__ __forceinline__ int32_t shift_of(int32_t digit) {
    return digit == 0 ? 21 : digit == 1 ? 10 : 0;
}

// Whether a rank has the leading digits of the threshold.
__device__ __forceinline__ bool matches(uint32_t rank, int32_t digit, const Threshold& threshold) {
    return digit == 0 || (rank ^ threshold.rank) >> shift_of(digit - 1) == 0;
}

__device__ __forceinline__ uint32_t digit_of(uint32_t rank, int32_t digit) {
    return rank >> shift_of(digit) & (digit == 2 ? 1023 : 2047);
}

// Sum of `value` over the lanes before this one.
__device__ __forceinline__ uint32_t sum_of_lanes_before(uint32_t value) {
    const int32_t lane = threadIdx.x % 32;
    uint32_t sum = value;
#pragma unroll
    for (int32_t step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(ALL_LANES, sum, step);
        sum += lane >= step ? other : 0;
    }
    return sum - value;
}

// Sum of `value`, which all lanes of a warp share, over the warps before this one, and over all of them.
__device__ __forceinline__ uint32_t sum_of_warps_before(uint32_t value, SelectScratch& scratch, uint32_t& all) {
    __syncthreads(); // the last sums have been read
    if (threadIdx.x % 32 == 0) {
        scratch.warps[threadIdx.x / 32] = value;
    }
    __syncthreads();
    uint32_t before = 0;
    all = 0;
#pragma unroll
    for (int32_t warp = 0; warp < WARPS; ++warp) {
        before += warp < threadIdx.x / 32 ? scratch.warps[warp] : 0;
        all += scratch.warps[warp];
    }
    return before;
}

// Sum of `value` over the block.
__device__ __forceinline__ uint32_t sum_of_block(uint32_t value, SelectScratch& scratch) {
    uint32_t all;
    sum_of_warps_before(__reduce_add_sync(ALL_LANES, value), scratch, all);
    return all;
}

// A thread has four bins.
__device__ __forceinline__ uint4& bins_of_thread(uint32_t* bins) {
    return reinterpret_cast<uint4*>(bins)[threadIdx.x];
}

__device__ __forceinline__ void clear_bins(Histogram& histogram) {
    bins_of_thread(histogram.bins) = make_uint4(0, 0, 0, 0);
    __syncthreads();
}

// Sums of the stretches of a histogram, given each thread's four bins.
__device__ __forceinline__ void sum_stretches(uint4 bins, uint32_t* stretches) {
    uint32_t sum = bins.x + bins.y + bins.z + bins.w;
#pragma unroll
    for (int32_t distance = 1; distance < 8; distance *= 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    }
    if (threadIdx.x % 8 == 0) {
        stretches[threadIdx.x / 8] = sum;
    }
    __syncthreads();
}

// Histogram of a digit over those of `count` ranks that match the threshold so far. Softmax scores share
// few exponents and pooling makes neighbours equal, so many lanes hit one bin: adding the constant 1 and
// asking for nothing back is an instruction of its own, which counts them at once.
__device__ __forceinline__ void count_digits(const uint32_t* ranks, int32_t count, int32_t digit,
                                             const Threshold& threshold, Histogram& histogram) {
    for (int32_t item = 4 * threadIdx.x; item < count; item += 4 * FASTKV_SELECT_THREADS) {
        const uint4 four = *reinterpret_cast<const uint4*>(ranks + item);
        for (const uint32_t rank : {four.x, four.y, four.z, four.w}) {
            if (matches(rank, digit, threshold)) {
                atomicAdd(histogram.bins + digit_of(rank, digit), 1);
            }
        }
    }
    __syncthreads();
}

// Histograms that are added up lie in one place alone, in that of the block itself.
struct OneHistogram {
    static constexpr int32_t COUNT = 1;

    template <typename T>
    static __device__ __forceinline__ T load(const T* address, int32_t) {
        return *address;
    }
};

// The threshold with one digit more, from histograms that together hold `wanted` items or more; `wanted` is
// not 0, so exactly one lane finds it. The first warp looks, and adds to its lanes' `before` what the first
// `preceding` histograms have above the digit, and with the last digit at it.
template <typename Histograms>
__device__ __forceinline__ Threshold next_digit(const uint32_t* bins, const uint32_t* stretches, int32_t digit,
                                                const Threshold& threshold, SelectScratch& scratch,
                                                int32_t preceding, Split& before) {
    if (threadIdx.x < 32) {
        const int32_t lane = threadIdx.x;
        const uint32_t wanted = threshold.wanted;
        // The first lane has the two highest stretches, of which y is the higher.
        const uint2* pair = reinterpret_cast<const uint2*>(stretches) + 31 - lane;
        uint2 all = make_uint2(0, 0), first = make_uint2(0, 0);
#pragma unroll
        for (int32_t i = 0; i < Histograms::COUNT; ++i) {
            const uint2 two = Histograms::load(pair, i);
            all = make_uint2(all.x + two.x, all.y + two.y);
            first = i < preceding ? make_uint2(first.x + two.x, first.y + two.y) : first;
        }
        const uint32_t above_y = sum_of_lanes_before(all.x + all.y);
        const uint32_t above_x = above_y + all.y;
        const bool in_y = above_y < wanted && wanted <= above_x;
        const bool in_x = above_x < wanted && wanted <= above_x + all.x;
        const int32_t owner = __ffs(__ballot_sync(ALL_LANES, in_x || in_y)) - 1;
        const int32_t stretch = __shfl_sync(ALL_LANES, 2 * (31 - lane) + in_y, owner);
        uint32_t above = __shfl_sync(ALL_LANES, in_y ? above_y : above_x, owner);
        before.above += lane < owner ? first.x + first.y : in_x ? first.y : 0;

        const int32_t bin = 32 * stretch + 31 - lane;
        uint32_t items = 0, first_items = 0;
#pragma unroll
        for (int32_t i = 0; i < Histograms::COUNT; ++i) {
            const uint32_t one = Histograms::load(bins + bin, i);
            items += one;
            first_items += i < preceding ? one : 0;
        }
        above += sum_of_lanes_before(items);
        before.above += wanted > above + items ? first_items : 0;
        if (above < wanted && wanted <= above + items) {
            before.equal = digit == DIGITS - 1 ? first_items : 0;
            scratch.found = {threshold.rank | uint32_t(bin) << shift_of(digit), int32_t(wanted - above)};
        }
    }
    __syncthreads();
    const Threshold found = scratch.found;
    return found;
}

// A warp's share of `count` items.
struct WarpItems {
    static constexpr int32_t STEP = 4 * 32;
    int32_t begin, end;

    __device__ __forceinline__ explicit WarpItems(int32_t count) {
        const int32_t share = (count + WARPS * STEP - 1) / (WARPS * STEP) * STEP;
        begin = min(int32_t(threadIdx.x / 32) * share, count);
        end = min(begin + share, count);
    }

    // How many of them lie above the threshold, and how many at it, in one word, which also holds the sums
    // over a block: it has fewer than 2^16 items.
    __device__ __forceinline__ uint32_t split(const uint32_t* ranks, uint32_t threshold) const {
        uint32_t both = 0;
        for (int32_t item = begin + 4 * (threadIdx.x % 32); item < end; item += STEP) {
            const uint4 four = *reinterpret_cast<const uint4*>(ranks + item);
            for (const uint32_t rank : {four.x, four.y, four.z, four.w}) {
                both += rank > threshold ? 1 << 16 : rank == threshold;
            }
        }
        return __reduce_add_sync(ALL_LANES, both);
    }
};

// Writes the kept ones of `count` items, whose numbers begin at `first`, in ascending order. `before`
// counts the items of the row that lie before them, which says where to write.
__device__ __forceinline__ void write_kept(const uint32_t* ranks, int32_t first, int32_t count,
                                           const Threshold& threshold, Split before, int32_t* kept,
                                           SelectScratch& scratch) {
    const uint32_t wanted = threshold.wanted;
    const WarpItems items(count);
    uint32_t all;
    const uint32_t of_warps = sum_of_warps_before(items.split(ranks, threshold.rank), scratch, all);
    before.above += of_warps >> 16;
    before.equal += of_warps & 0xffff;
    const int32_t lane = threadIdx.x % 32;
    const uint32_t lanes_before = (1u << lane) - 1;
    for (int32_t step = items.begin; step < items.end; step += WarpItems::STEP) {
        // Asked of all four before the first is looked at, so that they do not wait for each other.
        uint32_t of[4], high[4];
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
            const int32_t item = step + 32 * i + lane;
            of[i] = item < items.end ? ranks[item] : 0;
        }
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
            const int32_t item = step + 32 * i + lane;
            high[i] = __ballot_sync(ALL_LANES, item < items.end && of[i] >= threshold.rank);
        }
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
            const int32_t item = step + 32 * i + lane;
            if (high[i] == 0) {
                continue;
            }
            const bool is_high = high[i] >> lane & 1;
            const uint32_t at = __ballot_sync(ALL_LANES, is_high && of[i] == threshold.rank);
            const uint32_t above = before.above + __popc((high[i] ^ at) & lanes_before);
            const uint32_t equal = before.equal + __popc(at & lanes_before);
            if (is_high && (of[i] > threshold.rank || equal < wanted)) {
                kept[above + min(equal, wanted)] = first + item;
            }
            before.above += __popc(high[i] ^ at);
            before.equal += __popc(at);
        }
    }
}
