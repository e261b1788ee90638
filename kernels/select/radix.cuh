// Radix selection: the rank of the worst item that is kept, found digit by digit from the top, and the
// kept items in their order. Integers throughout, so that nothing depends on who came first.
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

// Sum of `value` over the threads of the block before this one, and over all of them.
__device__ __forceinline__ uint32_t sum_before(uint32_t value, SelectScratch& scratch, uint32_t& all) {
    const int32_t lane = threadIdx.x % 32;
    uint32_t sum = value;
#pragma unroll
    for (int32_t step = 1; step < 32; step *= 2) {
        const uint32_t other = __shfl_up_sync(ALL_LANES, sum, step);
        sum += lane >= step ? other : 0;
    }
    __syncthreads(); // the last sums have been read
    if (lane == 31) {
        scratch.warps[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    uint32_t before = 0;
    all = 0;
#pragma unroll
    for (int32_t warp = 0; warp < WARPS; ++warp) {
        before += warp < threadIdx.x / 32 ? scratch.warps[warp] : 0;
        all += scratch.warps[warp];
    }
    return before + sum - value;
}

__device__ __forceinline__ void clear_bins(uint32_t* bins) {
    reinterpret_cast<uint4*>(bins)[threadIdx.x] = make_uint4(0, 0, 0, 0);
    __syncthreads();
}

// Histogram of a digit over those of `count` ranks that match the threshold so far. Softmax scores share
// few exponents and pooling makes neighbours equal, so many lanes hit one bin: adding the constant 1 and
// asking for nothing back is an instruction of its own, which counts them at once.
__device__ __forceinline__ void count_digits(const uint32_t* ranks, int32_t count, int32_t digit,
                                             const Threshold& threshold, uint32_t* bins) {
    for (int32_t tile = 0; tile < count; tile += 4 * FASTKV_SELECT_THREADS) {
        const int32_t item = tile + 4 * threadIdx.x;
        if (item < count) {
            const uint4 four = *reinterpret_cast<const uint4*>(ranks + item);
            const uint32_t of[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int32_t i = 0; i < 4; ++i) {
                if (item + i < count && matches(of[i], digit, threshold)) {
                    atomicAdd(bins + digit_of(of[i], digit), 1);
                }
            }
        }
    }
    __syncthreads();
}

// A thread has four bins, and the first thread the highest: bin_of(0) to bin_of(3), from the top.
__device__ __forceinline__ int32_t bin_of(int32_t i) {
    return FASTKV_SELECT_BINS - 1 - 4 * int32_t(threadIdx.x) - i;
}

__device__ __forceinline__ const uint4* bins_of_thread(const uint32_t* bins) {
    return reinterpret_cast<const uint4*>(bins) + FASTKV_SELECT_THREADS - 1 - threadIdx.x;
}

__device__ __forceinline__ uint4 from_the_top(uint4 bins) {
    return make_uint4(bins.w, bins.z, bins.y, bins.x);
}

// The threshold with one digit more, from each thread's four bins. The bins hold `wanted` items or
// more, and `wanted` is not 0, so exactly one thread finds it.
__device__ __forceinline__ Threshold next_digit(uint4 bins, int32_t digit, const Threshold& threshold,
                                                SelectScratch& scratch) {
    const uint32_t of[4] = {bins.x, bins.y, bins.z, bins.w};
    uint32_t all;
    uint32_t above = sum_before(of[0] + of[1] + of[2] + of[3], scratch, all);
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
        const uint32_t wanted = threshold.wanted;
        if (above < wanted && wanted <= above + of[i]) {
            scratch.found.rank = threshold.rank | uint32_t(bin_of(i)) << shift_of(digit);
            scratch.found.wanted = wanted - above;
        }
        above += of[i];
    }
    __syncthreads();
    const Threshold found = scratch.found;
    return found;
}

// Items above the threshold and items at it: how many, or one bit for each of four.
struct alignas(8) Split {
    uint32_t above;
    uint32_t equal;
};

__device__ __forceinline__ Split split_four(const uint32_t* ranks, int32_t item, int32_t count,
                                            uint32_t threshold) {
    Split bits = {0, 0};
    if (item < count) {
        const uint4 four = *reinterpret_cast<const uint4*>(ranks + item);
        const uint32_t of[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
            const bool exists = item + i < count;
            bits.above |= uint32_t(exists && of[i] > threshold) << i;
            bits.equal |= uint32_t(exists && of[i] == threshold) << i;
        }
    }
    return bits;
}

// Writes the kept ones of `count` items, whose numbers begin at `first`, in ascending order. `before`
// counts the items of the row that lie before them, which says where to write.
__device__ __forceinline__ void write_kept(const uint32_t* ranks, int32_t first, int32_t count,
                                           const Threshold& threshold, Split before, int32_t* kept,
                                           SelectScratch& scratch) {
    const uint32_t wanted = threshold.wanted;
    for (int32_t tile = 0; tile < count; tile += 4 * FASTKV_SELECT_THREADS) {
        const int32_t item = tile + 4 * threadIdx.x;
        const Split bits = split_four(ranks, item, count, threshold.rank);
        // Both in one word: a tile has 2048 items.
        uint32_t all;
        const uint32_t sum = sum_before(__popc(bits.above) << 16 | __popc(bits.equal), scratch, all);
        uint32_t above = before.above + (sum >> 16);
        uint32_t equal = before.equal + (sum & 0xffff);
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
            const bool is_above = bits.above >> i & 1;
            const bool is_equal = bits.equal >> i & 1;
            if (is_above || (is_equal && equal < wanted)) {
                kept[above + min(equal, wanted)] = first + item + i;
            }
            above += is_above;
            equal += is_equal;
        }
        before.above += all >> 16;
        before.equal += all & 0xffff;
    }
}
