// A row of a selection: what it chooses from, how much it keeps, and the ranks of its items.
//
// An item is a key, or a page of keys. A rank is a score in an order of integers: larger is better, -0
// equals +0, NaN is below everything, and items that are always kept are above everything.
#pragma once

#include "scoring/pool.cuh"

#include <math_constants.h>

// Below the rank of every number; what NaN has.
constexpr uint32_t LOWEST_RANK = 0;
// Above the rank of +inf.
constexpr uint32_t FORCED_RANK = 0xffffffff;

// With every limit applied: whatever lengths and counts on the device hold, reading and writing within
// a row is safe.
struct Row {
    ScoreGroup group; // the first of them
    int32_t keys;  // the scored ones and the tail
    int32_t items; // keys, or pages of them
    int32_t kept;  // items to keep
};

__device__ __forceinline__ Row row_of(const fastkv_select_params& p, uint32_t number) {
    const uint32_t sequence = number / uint32_t(p.rows);
    const int64_t head = int64_t(number % uint32_t(p.rows)) * p.groups * p.heads;
    int64_t length = p.keys;
    if (p.lengths) {
        length = reinterpret_cast<const int32_t*>(p.lengths)[sequence];
    } else if (p.cu_seqlens) {
        const int32_t* begin = reinterpret_cast<const int32_t*>(p.cu_seqlens) + sequence;
        length = int64_t(begin[1]) - begin[0];
    }
    length = max(int64_t(0), min(length, int64_t(p.keys)));

    Row row;
    row.group.first =
        reinterpret_cast<const float*>(p.scores) + sequence * p.sequence_stride + head * p.head_stride;
    row.group.head_stride = p.head_stride;
    row.group.heads = p.heads;
    row.group.keys = max(int64_t(0), length - p.window);
    row.keys = min(length, int64_t(row.group.keys) + p.tail);
    row.items = row.keys / p.page + (row.keys % p.page != 0);
    const int32_t wanted = p.counts ? reinterpret_cast<const int32_t*>(p.counts)[number] : p.count;
    row.kept = max(0, min(wanted, min(row.items, p.capacity)));
    return row;
}

__device__ __forceinline__ uint32_t rank_of(float score) {
    const int32_t bits = __float_as_int(score + 0.0f); // -0 becomes +0
    return isnan(score) ? LOWEST_RANK : bits ^ (bits >> 31 | INT32_MIN);
}

// Scores of keys key..key+4 for a row. The sum over groups is taken in their order, the largest passes
// over NaN unless all are.
__device__ __forceinline__ FourScores row_scores(const fastkv_select_params& p, const Row& row, int32_t key) {
    FourScores scores;
    ScoreGroup group = row.group;
#pragma unroll 1
    for (int32_t number = 0; number < p.groups; ++number) {
        const FourScores one = pool_group(group, p.pooling, key);
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
            if (number == 0) {
                scores.of[i] = one.of[i];
            } else if (p.reduction == FASTKV_REDUCTION_SUM) {
                scores.of[i] += one.of[i];
            } else {
                scores.of[i] = fmaxf(scores.of[i], one.of[i]);
            }
        }
        group.first += group.heads * group.head_stride;
    }
    return scores;
}

__device__ __forceinline__ uint4 ranks_of(const FourScores& scores) {
    return make_uint4(rank_of(scores.of[0]), rank_of(scores.of[1]), rank_of(scores.of[2]), rank_of(scores.of[3]));
}

// Raises the ranks of pages to those of the four keys from `key` on, as far as these lie before `end`.
// `ranks` begins with page `first`.
__device__ __forceinline__ void raise_pages(uint32_t* ranks, int32_t page_keys, int32_t first, int32_t key,
                                            int32_t end, uint4 four) {
    const uint32_t of[4] = {four.x, four.y, four.z, four.w};
    int32_t page = key / page_keys;
    int32_t left = (page + 1) * page_keys - key; // keys of the page from here on
    uint32_t best = LOWEST_RANK;
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
        if (key + i < end) {
            if (left == 0) {
                atomicMax(ranks + page - first, best);
                best = LOWEST_RANK;
                left = page_keys;
                ++page;
            }
            best = max(best, of[i]);
            --left;
        }
    }
    atomicMax(ranks + page - first, best);
}

// Whether a row's scores are taken as they lie, in whole vectors.
__device__ __forceinline__ bool is_plain(const fastkv_select_params& p, const Row& row) {
    return p.page == 1 && p.groups * p.heads == 1 && p.pooling.kernel == 1 && is_aligned(row.group);
}

// Those of the items from..to that a block has are always kept.
__device__ __forceinline__ void force(uint32_t* ranks, int32_t first, int32_t count, int32_t from, int32_t to) {
    const int32_t end = min(to, first + count);
    for (int32_t item = max(from, first) + threadIdx.x; item < end; item += FASTKV_SELECT_THREADS) {
        ranks[item - first] = FORCED_RANK;
    }
}

// The whole block writes the ranks of items first..first+count to shared memory, which has room for a
// multiple of four, and up to there the lowest ones; `first` is such a multiple. A page has the rank of its
// best key: a sum would favour full pages, a mean would hide one key that matters among many that do not.
__device__ __forceinline__ void load_ranks(const fastkv_select_params& p, const Row& row, int32_t first,
                                           int32_t count, uint32_t* ranks) {
    uint4* vectors = reinterpret_cast<uint4*>(ranks);
    if (p.page > 1) {
        for (int32_t item = 4 * threadIdx.x; item < count; item += 4 * FASTKV_SELECT_THREADS) {
            vectors[item / 4] = make_uint4(LOWEST_RANK, LOWEST_RANK, LOWEST_RANK, LOWEST_RANK);
        }
        __syncthreads();
    }
    const int32_t begin = first * p.page;
    const int32_t end = min(int64_t(row.keys), (int64_t(first) + count) * p.page);
    int32_t key = begin + 4 * threadIdx.x;
    uint4* four = vectors + threadIdx.x;
    if (is_plain(p, row)) {
        // Vectors that a thread asks for at once.
        constexpr int32_t BATCH = 8;
        constexpr int32_t STEP = 4 * FASTKV_SELECT_THREADS;
        const int32_t last = min(end, row.group.keys) - 4;
        const int32_t whole = key <= last ? (last - key) / STEP + 1 : 0;
#pragma unroll 1
        for (int32_t left = whole; left > 0; left -= BATCH) {
            // The last few as well, with the last vector in the place of those that are not there: one by one, each would
            // be a wait.
            FourScores scores[BATCH];
#pragma unroll
            for (int32_t i = 0; i < BATCH; ++i) {
                scores[i] = load_vector(row.group.first + key + min(i, left - 1) * STEP);
            }
#pragma unroll
            for (int32_t i = 0; i < BATCH; ++i) {
                four[min(i, left - 1) * FASTKV_SELECT_THREADS] = ranks_of(scores[i]);
            }
            key += min(left, BATCH) * STEP;
            four += min(left, BATCH) * FASTKV_SELECT_THREADS;
        }
    }
    for (; key < end; key += 4 * FASTKV_SELECT_THREADS, four += FASTKV_SELECT_THREADS) {
        FourScores scores = row_scores(p, row, key);
#pragma unroll
        for (int32_t i = 0; i < 4; ++i) {
            scores.of[i] = key + i < row.group.keys ? scores.of[i] : CUDART_NAN_F;
        }
        if (p.page > 1) {
            raise_pages(ranks, p.page, first, key, end, ranks_of(scores));
        } else {
            *four = ranks_of(scores);
        }
    }
    __syncthreads();
    const int32_t of_sinks = p.sinks / p.page + (p.sinks % p.page != 0);
    const int32_t of_tail = row.keys > row.group.keys ? row.group.keys / p.page : row.items;
    force(ranks, first, count, 0, min(of_sinks, row.items));
    force(ranks, first, count, max(of_sinks, of_tail), row.items);
    __syncthreads();
}

__device__ __forceinline__ int32_t* kept_of(const fastkv_select_params& p, uint32_t row) {
    return reinterpret_cast<int32_t*>(p.kept) + int64_t(row) * p.capacity;
}

// What is left to write of a row: its length, and -1 behind the kept items, shared among `blocks`.
__device__ __forceinline__ void finish_row(const fastkv_select_params& p, const Row& row, uint32_t number,
                                           int32_t block, int32_t blocks) {
    int32_t* kept = kept_of(p, number);
    const int64_t step = int64_t(blocks) * FASTKV_SELECT_THREADS;
    for (int64_t i = int64_t(row.kept) + block * FASTKV_SELECT_THREADS + threadIdx.x; i < p.capacity; i += step) {
        kept[i] = -1;
    }
    if (block == 0 && threadIdx.x == 0) {
        reinterpret_cast<int32_t*>(p.kept_lengths)[number] = row.kept;
    }
}
