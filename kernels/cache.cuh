// The lists of a KV cache, with every limit applied.
#pragma once

#include "abi.h"

// The page of a token, or -1 where there is none.
__device__ __forceinline__ int32_t page_of(const fastkv_pages& pages, int32_t sequence, int32_t token) {
    const int32_t* table =
        reinterpret_cast<const int32_t*>(pages.table) + int64_t(sequence) * pages.table_pages;
    const int32_t page = table[uint32_t(token) / uint32_t(pages.page_size)];
    return page < pages.pages ? max(page, -1) : -1;
}

// One list: its entries can be reached whatever the device arrays hold.
struct List {
    int32_t index;  // sequence * heads + head
    int32_t length; // entries in use
    int64_t start;  // row of the first entry

    __device__ __forceinline__ int32_t sequence(const fastkv_cache& cache) const {
        return index / cache.heads;
    }

    __device__ __forceinline__ int32_t head(const fastkv_cache& cache) const { return index % cache.heads; }
};

// Entries that a list could have.
__device__ __forceinline__ int32_t room_of(const fastkv_cache& cache, int32_t index, int64_t start) {
    if (cache.pages.table) {
        return cache.capacity;
    }
    int64_t room = min(int64_t(cache.capacity), start < 0 ? 0 : cache.rows - start);
    if (cache.capacities) {
        room = min(room, int64_t(reinterpret_cast<const int32_t*>(cache.capacities)[index]));
    }
    return int32_t(max(int64_t(0), room));
}

// What the device array says of a list: below 0 where its place is not in use.
__device__ __forceinline__ int32_t length_at(const fastkv_cache& cache, int32_t index) {
    return reinterpret_cast<const int32_t*>(cache.lengths)[cache.pages.table ? index / cache.heads : index];
}

__device__ __forceinline__ List list_at(const fastkv_cache& cache, int32_t index) {
    List l;
    l.index = index;
    l.start = cache.starts ? reinterpret_cast<const int64_t*>(cache.starts)[index]
                           : int64_t(index) * cache.capacity;
    l.length = max(0, min(length_at(cache, index), room_of(cache, index, l.start)));
    return l;
}

// Where an entry of a list is: a slot of a page, or a row of a ragged cache, which is one page.
template <bool paged>
struct Place {
    int32_t page; // below 0 where the entry is absent
    int64_t slot;

    __device__ __forceinline__ Place(const fastkv_cache& cache, const List& l, int32_t entry) {
        if (paged) {
            page = page_of(cache.pages, l.sequence(cache), entry);
            slot = uint32_t(entry) % uint32_t(cache.pages.page_size);
        } else {
            page = 0;
            slot = l.start + entry;
        }
    }

    // Elements from the first of K, or of V, to the entry's row.
    __device__ __forceinline__ int64_t offset(const fastkv_rows& rows, int32_t head) const {
        const int64_t of_page = paged ? page * rows.sequence_stride + head * rows.head_stride : 0;
        return of_page + slot * rows.token_stride;
    }

    // Index of the entry in `positions`.
    __device__ __forceinline__ int64_t row(const fastkv_cache& cache, int32_t head) const {
        return paged ? (page * int64_t(cache.pages.page_size) + slot) * cache.heads + head : slot;
    }
};
