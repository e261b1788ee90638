// How decode splits the lists of a cache.
//
// A list is cut into chunks by its own length alone, and chunks are merged in their order: what comes out
// does not depend on how many blocks there are, nor on what else is in the batch.
#pragma once

#include "cache.cuh"

// Entries of a list and the new tokens behind them.
__device__ __forceinline__ int32_t keys_of(const fastkv_decode_params& p, const List& l) {
    return l.length + (p.k_new.base ? p.tokens : 0);
}

// To end a chunk costs about as much time as to read a block of keys: chunks are up to 4 blocks where that
// leaves 16 of them, and longer only where there would be too many.
__device__ __forceinline__ int32_t chunk_keys(const fastkv_decode_params& p, const List& l) {
    const auto blocks = [&](int32_t chunks) {
        const int32_t keys = FASTKV_DECODE_BLOCK_KEYS * chunks;
        return (keys_of(p, l) + keys - 1) / keys;
    };
    return max(min(blocks(16), 4), blocks(FASTKV_DECODE_CHUNKS)) * FASTKV_DECODE_BLOCK_KEYS;
}

// At least one, so that a list without keys has somebody to write its output.
__device__ __forceinline__ int32_t chunks_of(const fastkv_decode_params& p, const List& l) {
    const int32_t size = max(1, chunk_keys(p, l));
    return max(1, (keys_of(p, l) + size - 1) / size);
}

// Whether the new tokens of a list can be appended: all of them or none.
template <bool paged>
__device__ __forceinline__ bool has_room(const fastkv_decode_params& p, const List& l) {
    if (length_at(p.cache, l.index) < 0 || p.tokens > room_of(p.cache, l.index, l.start) - l.length) {
        return false;
    }
    for (int32_t token = 0; paged && token < p.tokens; ++token) {
        if (Place<paged>(p.cache, l, l.length + token).page < 0) {
            return false;
        }
    }
    return true;
}

// Where a block is in its share of the work: a tile of keys, of a chunk, for a tile of queries. A share
// is a stretch of all (list, chunk, query tile), in this order: query tiles come last, so that the same
// keys are read again while they are in L2.
struct Cursor {
    List list;
    int32_t chunk;
    int32_t query_tile;
    int32_t key;    // first of the tile
    int32_t end;    // behind the last of the chunk
    int32_t items;  // left, this one included
    int32_t parity; // changes from item to item

    // First key of the chunk.
    __device__ __forceinline__ int32_t begin(const fastkv_decode_params& p) const {
        return chunk * chunk_keys(p, list);
    }

    // Goes to the first tile of the chunk.
    __device__ __forceinline__ void enter(const fastkv_decode_params& p) {
        key = begin(p);
        end = min(key + chunk_keys(p, list), keys_of(p, list));
    }

    // Goes on to the next tile; false where there is none.
    template <int32_t tile_keys>
    __device__ __forceinline__ bool advance(const fastkv_decode_params& p) {
        key += tile_keys;
        if (key < end) {
            return true;
        }
        if (--items == 0) {
            return false;
        }
        parity ^= 1;
        if (++query_tile == p.query_tiles) {
            query_tile = 0;
            if (++chunk == chunks_of(p, list)) {
                chunk = 0;
                list = list_at(p.cache, list.index + 1);
            }
        }
        enter(p);
        return true;
    }
};

// The first item of this block and the number of its items, for a whole block.
template <int32_t threads>
__device__ __forceinline__ Cursor first_item(const fastkv_decode_params& p) {
    __shared__ int32_t warp_sums[threads / 32];
    __shared__ int32_t found[2];
    const auto items_of = [&](int32_t list) { return chunks_of(p, list_at(p.cache, list)) * p.query_tiles; };
    const int32_t lists = p.cache.sequences * p.cache.heads;
    const int32_t share = (lists + threads - 1) / threads;
    const int32_t first = min(lists, int32_t(threadIdx.x) * share);
    const int32_t last = min(lists, first + share);
    int32_t own = 0;
    for (int32_t list = first; list < last; ++list) {
        own += items_of(list);
    }
    int32_t sum = own;
#pragma unroll
    for (int32_t distance = 1; distance < 32; distance *= 2) {
        const int32_t below = __shfl_up_sync(~0u, sum, distance);
        sum += threadIdx.x % 32 >= distance ? below : 0;
    }
    if (threadIdx.x % 32 == 31) {
        warp_sums[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    int32_t before = sum - own;
    int32_t total = 0;
#pragma unroll
    for (int32_t warp = 0; warp < threads / 32; ++warp) {
        before += warp < threadIdx.x / 32 ? warp_sums[warp] : 0;
        total += warp_sums[warp];
    }
    // As many for each block, and none for the last blocks, rather than one more for some.
    const int32_t each = (total - 1) / int32_t(gridDim.x) + 1;
    const int32_t begin = int32_t(min(int64_t(total), int64_t(each) * blockIdx.x));
    const int32_t end = int32_t(min(int64_t(total), int64_t(begin) + each));
    if (before <= begin && begin < before + own) {
        int32_t list = first;
        int32_t item = begin - before;
        for (int32_t items; item >= (items = items_of(list)); item -= items) {
            ++list;
        }
        found[0] = list;
        found[1] = item;
    }
    __syncthreads();
    Cursor at = {};
    at.items = end - begin;
    if (at.items > 0) {
        at.list = list_at(p.cache, found[0]);
        at.chunk = found[1] / p.query_tiles;
        at.query_tile = found[1] % p.query_tiles;
        at.enter(p);
    }
    return at;
}
