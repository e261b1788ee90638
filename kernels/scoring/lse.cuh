// LSE of a window's queries from keys that are split among blocks: each block leaves the largest logit and
// the sum of exponentials relative to it, for every query; then these are put together in the order of
// the keys.
#pragma once

#include "../primitives/exp2.cuh"
#include "products.cuh"

// A sum of exponentials: exp2(maximum) * sum, where maximum is the largest exponent; -inf for none.
struct Partial {
    float maximum;
    float sum;

    // What exponents are relative to.
    __device__ __forceinline__ float base() const { return maximum == -CUDART_INF_F ? 0.0f : maximum; }

    __device__ __forceinline__ void add(const Partial& other) {
        const Partial own = *this;
        maximum = fmaxf(maximum, other.maximum);
        sum = own.sum * exp2_approx(own.maximum - base()) + other.sum * exp2_approx(other.maximum - base());
    }

    // Natural logarithm of the whole; -inf for nothing.
    __device__ __forceinline__ float lse() const { return (base() + log2_approx(sum)) * (1.0f / LOG2_E); }
};

template <typename T, int d, int warps>
struct WindowPartials {
    using Products = WindowProducts<T, d, warps>;
    static constexpr int M = Products::M;
    // Room for columns: as much as leaves a block the shared memory that every chip has.
    static constexpr int SLOTS = d == 256 ? 1 : 2;
    static constexpr int TILES = SLOTS * Products::SLOT_TILES;
    static constexpr int COLUMNS = SLOTS * Products::SLOT_COLUMNS;
    static constexpr int STATE = Products::KEY_BYTES + SLOTS * Products::SLOT_BYTES;

    // Shared memory, aligned to 128 bytes.
    static constexpr int SHARED_BYTES = STATE + warps * COLUMNS * int(sizeof(Partial));

    // Partials of keys first..end for the window's tiles from `tile` on, at most TILES of them. `first` is
    // a multiple of 32; `out` is for the first of those tiles' columns.
    static __device__ __forceinline__ void run(const Window& window, Partial* out, int32_t first, int32_t end,
                                               int32_t tile, uint8_t* memory) {
        const int32_t tiles = min(TILES, window.heads * window.tiles() - tile);
        Products products(window, __cvta_generic_to_shared(memory), SLOTS);
        // Of each warp; lanes 0 to 3 hold two columns of every tile.
        Partial* states = reinterpret_cast<Partial*>(memory + STATE);
        Partial* state = states + threadIdx.x / 32 * COLUMNS;

        end = min(end, window.keys);
        products.load_queries(0, tile, tiles, 0, window.tiles());
        uint32_t next_present = products.load_keys(first, end, products.page_at(first, end));
        int32_t next_page = products.page_at(first + Products::STEP, end);
        cp_async_commit();
        for (int32_t column = threadIdx.x % 32; column < COLUMNS; column += 32) {
            state[column] = {-CUDART_INF_F, 0.0f};
        }
#pragma unroll 1
        for (int32_t step = first; step < end; step += Products::STEP) {
            cp_async_wait<0>();
            if (step > first) {
                __syncwarp();
            } else {
                __syncthreads();
            }
            products.take_keys();
            __syncwarp();
            const uint32_t present = next_present;
            if (step + Products::STEP < end) {
                next_present = products.load_keys(step + Products::STEP, end, next_page);
                next_page = products.page_at(step + 2 * Products::STEP, end);
            }
            cp_async_commit();
            float bias[M][2];
            const bool biased = products.key_bias(step, end, bias);
#pragma unroll 1
            for (int32_t pair = 0; pair < tiles; pair += 2) {
                float s[2][M][4];
                products.multiply(pair * 8, s);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    if (pair + j < tiles) {
                        const bool head_biased =
                            biased && products.head_is_biased((tile + pair + j) / window.tiles());
                        add(products, s[j], bias, head_biased, present, step, end, (pair + j) * 8, state);
                    }
                }
            }
        }
        cp_async_wait<0>();
        __syncthreads();
        for (int32_t column = threadIdx.x; column < tiles * 8; column += warps * 32) {
            Partial whole = states[column];
            for (int warp = 1; warp < warps; ++warp) {
                whole.add(states[warp * COLUMNS + column]);
            }
            out[column] = whole;
        }
    }

    // Adds the warp's keys, those that are `present`, to a tile's partials.
    static __device__ __forceinline__ void add(const Products& products, const float (&s)[M][4],
                                               const float (&bias)[M][2], bool biased, uint32_t present,
                                               int32_t step, int32_t end, int32_t tile_column, Partial* state) {
        const int lane = threadIdx.x % 32;
        const int32_t column = tile_column + lane % 4 * 2;
        const float factor = products.window.scale * LOG2_E;
        const uint2 sees = load_shared_pair(products.sees + column * 4);
        Partial partial[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int32_t last = min(int32_t(i ? sees.y : sees.x), end - 1) - Products::warp_first(step) - lane / 4;
            float logits[2 * M];
            float most = -CUDART_INF_F;
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float logit = fmaf(s[m][2 * half + i], factor, biased ? bias[m][half] : 0.0f);
                    const int row = 16 * m + 8 * half;
                    const bool seen = row <= last && present >> (row + lane / 4) & 1;
                    logits[2 * m + half] = seen ? logit : -CUDART_INF_F;
                    most = fmaxf(most, logits[2 * m + half]);
                }
            }
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) {
                most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
            }
            partial[i] = {most, 0.0f};
            const float base = partial[i].base();
#pragma unroll
            for (int key = 0; key < 2 * M; ++key) {
                partial[i].sum += exp2_approx(logits[key] - base);
            }
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) {
                partial[i].sum += __shfl_xor_sync(~0u, partial[i].sum, lanes);
            }
        }
        if (lane < 4) {
            state[column].add(partial[0]);
            state[column + 1].add(partial[1]);
        }
    }
};
