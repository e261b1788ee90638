// Scores of keys: the softmax probabilities of a window of queries, summed over the queries. The fused
// attention kernel and the kernel that only scores call the same function and get the same bits.
//
// With the LSE of every query at hand a probability is exp(scale q.k + bias - lse), so keys do not
// depend on each other. Queries whose tiles fit stay in shared memory while keys stream past them, as
// those of a window do; more than that (all queries of a long sequence) stream past the keys.
//
// The order of a key's sum does not depend on the block, on its share of the keys or on its memory:
// blocks of 64 queries counted from the window's first; in a block a lane's pairs of columns, then the
// lanes; then the blocks, then the heads in their order. A query that does not see the key adds 0.
//
// Queries may count with a weight that grows in a line, and on the nearest of their keys alone
// (`weighed`): what sums over all queries are made of.
#pragma once

#include "../primitives/exp2.cuh"
#include "products.cuh"

// Where scores go.
struct ScoreRows {
    float* first;   // of key 0, for the first head of the group or for the group
    int64_t stride; // elements from one head to the next
    bool group_sum; // whether scores are summed over the group
};

// How the queries of a window count. Their last keys are then those of their own places.
struct Weights {
    float first;  // of the first query
    float step;   // what each next one weighs more
    int32_t band; // keys that a query counts on, its own and those before it; 0 to 2^30
};

template <typename T, int d, int warps, bool weighed = false>
struct WindowScores {
    using Products = WindowProducts<T, d, warps>;
    static constexpr int M = Products::M;
    // Tiles whose columns a lane adds before the lanes come together.
    static constexpr int BLOCK_TILES = 8;

    // Shared memory for `slots` of 64 columns, two or more; aligned to 128 bytes.
    static constexpr int shared_bytes(int slots) { return Products::KEY_BYTES + slots * Products::SLOT_BYTES; }

    // Scores keys first..end, `first` a multiple of 32. For the whole block, which has met at a barrier
    // since shared memory was used last, and meets before it is used next. `wait` is called by all when the first
    // keys are on their way, and returns when LSE is there.
    template <typename Wait>
    static __device__ __forceinline__ void run(const Window& window, const ScoreRows& out, int32_t first,
                                               int32_t end, uint32_t shared, int32_t slots,
                                               const Weights& weights, Wait wait) {
        WindowScores scores{Products(window, shared, slots), out, weights, min(end, window.keys)};
        scores.walk(first, slots, wait);
    }

    // The same where LSE is there.
    static __device__ __forceinline__ void run(const Window& window, const ScoreRows& out, int32_t first,
                                               int32_t end, uint32_t shared, int32_t slots,
                                               const Weights& weights = {}) {
        run(window, out, first, end, shared, slots, weights, [] {});
    }

    Products products;
    const ScoreRows& out;
    const Weights& weights;
    int32_t end;

    // This step's keys.
    int32_t warp_first;
    uint32_t present; // those of the warp that there are
    bool keys_biased; // any of the warp's
    float bias[M][2]; // of this lane's

    // How far the walk over a step's tiles has come, and the sums so far.
    int32_t head;
    int32_t tile; // of the head
    int32_t end_tile; // where `weighed`: the tile behind the last of the head in this step
    float sums[2 * M]; // of this lane's columns, for the warp's keys lane / 4 + 8 i
    float head_sum;    // of one key of this lane, `own_row`
    float group_sum;

    template <typename Wait>
    __device__ __forceinline__ void walk(int32_t first, int32_t slots, Wait wait) {
        const Window& window = products.window;
        const int32_t tiles = window.tiles();
        const bool resident = window.heads * tiles <= slots * Products::SLOT_TILES;
        if (first >= end) {
            return;
        }
        uint32_t next_present = products.load_keys(first, end, products.page_at(first, end));
        int32_t next_page = products.page_at(first + Products::STEP, end);
        wait();
        if (resident) {
            products.load_queries(0, 0, window.heads * tiles, 0, tiles);
        }
        cp_async_commit();
#pragma unroll 1
        for (int32_t step = first; step < end; step += Products::STEP) {
            // Blocks of queries that see none of these keys add nothing. The last query sees all keys, so its
            // block stays.
            int32_t skipped = 0;
            if (!resident && !window.positions) {
                const int32_t blind = max(0, step - window.first_sees) / 8;
                skipped = blind / BLOCK_TILES * BLOCK_TILES;
            }
            end_tile = tiles;
            if (weighed && !resident) {
                // The first query whose band begins behind these keys.
                const int64_t beyond =
                    int64_t(step) + Products::STEP - 1 + weights.band - window.first_sees;
                const int64_t in_reach = (beyond - 1) / 8 + 1;
                end_tile = max(skipped + 1, int32_t(min(int64_t(tiles), in_reach)));
            }
            const int32_t head_tiles = end_of_head() - skipped;
            const int32_t step_tiles = window.heads * head_tiles;
            const int32_t slot_tiles = resident ? step_tiles : Products::SLOT_TILES;
            if (!resident) {
                __syncthreads();
                products.load_queries(0, 0, min(slot_tiles, step_tiles), skipped, head_tiles);
                cp_async_commit();
            }
            cp_async_wait<0>();
            if (resident && step > first) {
                __syncwarp();
            } else {
                __syncthreads();
            }
            products.take_keys();
            __syncwarp();
            present = next_present;
            if (step + Products::STEP < end) {
                next_present = products.load_keys(step + Products::STEP, end, next_page);
                next_page = products.page_at(step + 2 * Products::STEP, end);
            }
            cp_async_commit();

            warp_first = Products::warp_first(step);
            keys_biased = products.key_bias(step, end, bias);
            begin(skipped);
            int32_t slot = 0;
#pragma unroll 1
            for (int32_t done = 0; done < step_tiles; done += slot_tiles) {
                if (done > 0) {
                    cp_async_wait<0>();
                    __syncthreads();
                }
                const int32_t next = done + slot_tiles;
                if (next < step_tiles) {
                    products.load_queries(slot ^ 1, next, min(slot_tiles, step_tiles - next), skipped, head_tiles);
                    cp_async_commit();
                }
                add_tiles(slot * Products::SLOT_COLUMNS, min(slot_tiles, step_tiles - done), skipped);
                slot ^= 1;
            }
            if (out.group_sum) {
                store(out.first, group_sum);
            }
        }
    }

    __device__ __forceinline__ int32_t end_of_head() const {
        return weighed ? end_tile : products.window.tiles();
    }

    __device__ __forceinline__ void begin(int32_t skipped) {
        head = 0;
        tile = skipped;
        head_sum = 0.0f;
        group_sum = 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * M; ++i) {
            sums[i] = 0.0f;
        }
    }

    // Adds the columns of `count` tiles that begin at a column of shared memory.
    __device__ __forceinline__ void add_tiles(int32_t column, int32_t count, int32_t skipped) {
#pragma unroll 1
        for (int32_t pair = 0; pair < count; pair += 2) {
            // Of this lane's two columns in each tile.
            float offset[2][2];
            int32_t last[2][2];
            int32_t furthest = -1;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const uint32_t at = (column + (pair + j) * 8 + threadIdx.x % 4 * 2) * 4;
                const uint2 lse = load_shared_pair(products.lse + at);
                const uint2 sees = load_shared_pair(products.sees + at);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float given = __uint_as_float(i ? lse.y : lse.x);
                    offset[j][i] = -given * products.window.lse_factor;
                    // A query that saw nothing has no probabilities: kernels of attention say so by either infinity.
                    last[j][i] = fabsf(given) == CUDART_INF_F ? -1 : int32_t(i ? sees.y : sees.x);
                    if (!weighed || last[j][i] - weights.band < warp_first + Products::WARP_KEYS - 1) {
                        furthest = max(furthest, last[j][i]);
                    }
                }
            }
            const bool seen = __any_sync(~0u, furthest >= warp_first);
            float s[2][M][4];
            if (seen) {
                products.multiply(column + pair * 8, s);
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (pair + j < count) {
                    if (seen) {
                        bool all_see = min(last[j][0], last[j][1]) >= warp_first + Products::WARP_KEYS - 1;
                        if (weighed) {
                            all_see &= max(last[j][0], last[j][1]) - weights.band < warp_first;
                        }
                        const bool biased = keys_biased && products.head_is_biased(head);
                        if (__all_sync(~0u, all_see) && !biased) {
                            add<false>(s[j], offset[j], last[j], false);
                        } else {
                            add<true>(s[j], offset[j], last[j], biased);
                        }
                    }
                    next_tile(skipped);
                }
            }
        }
    }

    // Adds this lane's columns of a tile. `masked`: a query may not see every key, or keys are biased.
    template <bool masked>
    __device__ __forceinline__ void add(const float (&s)[M][4], const float (&offset)[2],
                                        const int32_t (&last)[2], bool biased) {
        const float factor = products.window.scale * LOG2_E;
        float weight[2];
        if (weighed) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                weight[i] = fmaf(weights.step, float(last[i] - products.window.first_sees), weights.first);
            }
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float probability[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float shift = offset[i];
                    if (masked) {
                        shift += biased ? bias[m][half] : 0.0f;
                    }
                    probability[i] = exp2_approx(fmaf(s[m][2 * half + i], factor, shift));
                    const int32_t key = warp_first + 16 * m + 8 * half + int32_t(threadIdx.x % 32 / 4);
                    if (masked && (key > last[i] || weighed && key <= last[i] - weights.band)) {
                        probability[i] = 0.0f;
                    }
                    if (weighed) {
                        probability[i] *= weight[i];
                    }
                }
                sums[2 * m + half] += probability[0] + probability[1];
            }
        }
    }

    __device__ __forceinline__ void next_tile(int32_t skipped) {
        const bool head_ends = ++tile == end_of_head();
        if (head_ends || tile % BLOCK_TILES == 0) {
            head_sum += add_lanes();
        }
        if (head_ends) {
            if (out.group_sum) {
                group_sum += head_sum;
            } else {
                store(out.first + head * out.stride, head_sum);
            }
            head_sum = 0.0f;
            tile = skipped;
            ++head;
        }
    }

    // Sums over the lanes that share keys, each lane for one of its keys, and clears them.
    __device__ __forceinline__ float add_lanes() {
        // In each exchange a lane gives away half of its keys and gets the other lane's share of the rest.
        const bool odd = threadIdx.x & 1;
        float kept[M];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            kept[m] = odd ? sums[2 * m + 1] : sums[2 * m];
            kept[m] += __shfl_xor_sync(~0u, odd ? sums[2 * m] : sums[2 * m + 1], 1);
            sums[2 * m] = 0.0f;
            sums[2 * m + 1] = 0.0f;
        }
        if (M == 1) {
            return kept[0] + __shfl_xor_sync(~0u, kept[0], 2);
        }
        const bool upper = threadIdx.x & 2;
        return (upper ? kept[M - 1] : kept[0]) + __shfl_xor_sync(~0u, upper ? kept[0] : kept[M - 1], 2);
    }

    // Stores this lane's key.
    __device__ __forceinline__ void store(float* row, float score) const {
        const int lane = threadIdx.x % 32;
        const int32_t key = warp_first + lane / 4 + 8 * (lane % (2 * M));
        if (lane % 4 < 2 * M && key < end) {
            row[key] = present >> (key - warp_first) & 1 ? score : 0.0f;
        }
    }
};
