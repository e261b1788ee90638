// A row of a selection: what it chooses from, how much it keeps, and the ranks of its items.
//
// An item is a key, or a page of keys. A rank is a score in an order of integers: larger is better, -0
// equals +0, NaN is below everything, and items that are always kept are above everything.
#pragma once

#include "scoring/pool.cuh"

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
    if (isnan(score)) {
        return LOWEST_RANK;
    }
    const uint32_t bits = __float_as_uint(score + 0.0f); // -0 becomes +0
    return bits >> 31 ? ~bits : bits | 1u << 31;
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

// Ranks of keys key..key+4 by their scores; `key` is a multiple of 4. Behind the last key they mean nothing.
__device__ __forceinline__ uint4 key_ranks(const fastkv_select_params& p, const Row& row, int32_t key,
                                           const FourScores& scores) {
    uint32_t ranks[4];
#pragma unroll
    for (int32_t i = 0; i < 4; ++i) {
        const bool forced = key + i < p.sinks || key + i >= row.group.keys;
        ranks[i] = forced ? FORCED_RANK : rank_of(scores.of[i]);
    }
    return make_uint4(ranks[0], ranks[1], ranks[2], ranks[3]);
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

// The whole block writes the ranks of items first..first+count to shared memory, which has room for a
// multiple of four; `first` is such a multiple. A page has the rank of its best key: a sum would favour
// full pages, a mean would hide one key that matters among many that do not.
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
    if (is_plain(p, row)) {
        // Vectors that a thread asks for at once.
        constexpr int32_t BATCH = 4;
        constexpr int32_t STEP = 4 * FASTKV_SELECT_THREADS;
        const int32_t whole = min(end, row.group.keys) - (BATCH - 1) * STEP - 4;
        for (; key <= whole; key += BATCH * STEP) {
            FourScores scores[BATCH];
#pragma unroll
            for (int32_t i = 0; i < BATCH; ++i) {
                scores[i] = load_vector(row.group.first + key + i * STEP);
            }
#pragma unroll
            for (int32_t i = 0; i < BATCH; ++i) {
                vectors[(key - begin + i * STEP) / 4] = key_ranks(p, row, key + i * STEP, scores[i]);
            }
        }
    }
    for (; key < end; key += 4 * FASTKV_SELECT_THREADS) {
        const uint4 four = key_ranks(p, row, key, row_scores(p, row, key));
        if (p.page > 1) {
            raise_pages(ranks, p.page, first, key, end, four);
        } else {
            vectors[(key - begin) / 4] = four;
        }
    }
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
