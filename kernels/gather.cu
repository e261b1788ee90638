// Moves the rows that a selection kept to where they stay: rows of K and V into a ragged or paged cache,
// or to the front of the lists where they lie, rows of hidden states into the shorter sequence behind
// the TSP layer.
//
// All are copies. What matters is to have enough bytes in flight (about 23 KB per SM on an H200) and
// to move them 16 bytes a thread; indices, lengths and starts are noise beside the rows.

#include "abi.h"
#include "cache.cuh"
#include "primitives/global.cuh"

static_assert(sizeof(fastkv_kept) == 88, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_rows) == 32, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_pages) == 24, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_slots) == 40, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_compact_params) == 200, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_gather_indices_params) == 32, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_gather_kv_params) == 248, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_gather_rows_params) == 136, "src/abi.rs was generated for another layout");

namespace {

// One list of a selection with every limit applied: reading and writing within it is safe whatever
// the lists hold.
struct Selection {
    const int32_t* indices;
    int32_t length;      // indices to follow
    int32_t tokens;      // valid indices lie in [0, tokens)
    int64_t start;       // destination row of the first index
    int64_t first_token; // token 0 of this sequence on the packed token axis, else 0
    int64_t position;    // the same on the axis of `positions`
};

__device__ __forceinline__ Selection selection_of(const fastkv_kept& kept, int32_t sequence, int32_t head) {
    const int64_t list = int64_t(sequence) * kept.heads + head;
    Selection l;
    l.indices = reinterpret_cast<const int32_t*>(kept.indices) + sequence * kept.index_sequence_stride +
                head * kept.index_head_stride;
    l.start = kept.starts ? reinterpret_cast<const int64_t*>(kept.starts)[list] : list * kept.capacity;
    int64_t length = kept.capacity;
    if (kept.lengths) {
        length = min(length, int64_t(reinterpret_cast<const int32_t*>(kept.lengths)[list]));
    }
    const int64_t room = l.start < 0 ? 0 : kept.out_rows - l.start;
    l.length = int32_t(max(int64_t(0), min(length, room)));
    if (kept.cu_seqlens) {
        const int32_t* begin = reinterpret_cast<const int32_t*>(kept.cu_seqlens) + sequence;
        l.first_token = begin[0];
        l.tokens = l.first_token < 0 ? 0 : max(0, min(begin[1], kept.tokens) - begin[0]);
        l.position = l.first_token;
    } else {
        l.first_token = 0;
        l.tokens = kept.tokens;
        l.position = int64_t(sequence) * kept.tokens;
    }
    return l;
}

// The index at `row` of the list, or -1 where there is nothing to take.
__device__ __forceinline__ int32_t index_at(const Selection& l, int32_t row) {
    if (row >= l.length) {
        return -1;
    }
    const int32_t index = __ldg(l.indices + row);
    return uint32_t(index) < uint32_t(l.tokens) ? index : -1;
}

__device__ __forceinline__ void store_position(const fastkv_kept& kept, const Selection& l, int32_t index,
                                               int64_t place) {
    const int32_t position =
        kept.positions ? reinterpret_cast<const int32_t*>(kept.positions)[l.position + index] : index;
    reinterpret_cast<int32_t*>(kept.positions_out)[place] = position;
}

// A tensor that rows come from or go to, for one (sequence, head).
struct Tensor {
    uint64_t base;
    int64_t page; // bytes from one page to the next, 0 without pages
    int64_t row;  // bytes from one row to the next

    __device__ __forceinline__ uint64_t at(int32_t page_number, int64_t row_number) const {
        return base + page_number * page + row_number * row;
    }
};

__device__ __forceinline__ Tensor source_of(const fastkv_gather_kv_params& p, const fastkv_rows& rows,
                                            const Selection& l, int32_t sequence, int32_t head) {
    const int64_t page = p.pages.table ? rows.sequence_stride : 0;
    const int64_t first = (p.pages.table ? 0 : sequence * rows.sequence_stride) + head * rows.head_stride +
                          l.first_token * rows.token_stride;
    return {rows.base + first * p.element_bytes, page * p.element_bytes, rows.token_stride * p.element_bytes};
}

__device__ __forceinline__ Tensor destination_of(const fastkv_gather_kv_params& p, uint64_t base,
                                                 int32_t head) {
    if (!p.slots.slots) {
        return {base, 0, p.row_bytes};
    }
    return {base + head * p.slots.head_stride * p.element_bytes, p.slots.page_stride * p.element_bytes,
            p.slots.slot_stride * p.element_bytes};
}

// Where a row of the list comes from and goes to, and the place of its position; `index` below 0: it stays.
struct Move {
    int32_t index;
    uint64_t from;
    uint64_t to;
    int64_t place;
};

__device__ __forceinline__ Move move_of(const fastkv_gather_kv_params& p, const Selection& l,
                                        const Tensor& source, const Tensor& destination, int32_t sequence,
                                        int32_t head, int32_t row, int32_t index) {
    Move m;
    m.index = row < l.length && uint32_t(index) < uint32_t(l.tokens) ? index : -1;
    if (m.index < 0) {
        return m;
    }
    if (p.pages.table) {
        const int32_t page = page_of(p.pages, sequence, m.index);
        m.from = source.at(page, uint32_t(m.index) % uint32_t(p.pages.page_size));
        m.index = page < 0 ? -1 : m.index;
    } else {
        m.from = source.at(0, m.index);
    }
    m.place = l.start + row;
    if (p.slots.slots) {
        const int64_t slot = __ldg(reinterpret_cast<const int64_t*>(p.slots.slots) + m.place);
        const uint32_t page = uint32_t(slot) / uint32_t(p.slots.page_size);
        m.to = destination.at(page, uint32_t(slot) % uint32_t(p.slots.page_size));
        m.place = p.slots.head_stride == 0 ? slot : slot * p.kept.heads + head;
        m.index = slot >= 0 && slot < int64_t(p.slots.pages) * p.slots.page_size ? m.index : -1;
    } else {
        m.to = destination.at(0, m.place);
    }
    return m;
}

} // namespace

// Grid: x = tiles of the rows. A thread has one number.
extern "C" __global__ void __launch_bounds__(FASTKV_GATHER_INDICES_THREADS)
    fastkv_gather_indices(__grid_constant__ const fastkv_gather_indices_params p) {
    const uint32_t i = blockIdx.x * FASTKV_GATHER_INDICES_THREADS + threadIdx.x;
    if (i < uint32_t(p.count)) {
        const int32_t row = reinterpret_cast<const int32_t*>(p.rows)[i];
        const bool known = uint32_t(row) < uint32_t(p.length);
        reinterpret_cast<int32_t*>(p.out)[i] = known ? reinterpret_cast<const int32_t*>(p.list)[row] : -1;
    }
}

// Grid: x = (sequence, head), y = tiles of rows, z = K or V. A group of 2^lane_shift lanes moves a row
// and each thread has FASTKV_GATHER_KV_ROWS of them in flight: 64 bytes a thread, 128 KB on an SM full
// of blocks. Neighbouring groups take neighbouring rows, so that a warp's stores are one stretch.
extern "C" __global__ void __launch_bounds__(FASTKV_GATHER_KV_THREADS)
    fastkv_gather_kv(__grid_constant__ const fastkv_gather_kv_params p) {
    const int32_t sequence = blockIdx.x / p.kept.heads;
    const int32_t head = blockIdx.x % p.kept.heads;
    const Selection l = selection_of(p.kept, sequence, head);

    const bool values = blockIdx.z == 1;
    const Tensor source = source_of(p, values ? p.v : p.k, l, sequence, head);
    const Tensor destination = destination_of(p, values ? p.v_out : p.k_out, head);

    const int32_t lane_bytes = (threadIdx.x & ((1 << p.lane_shift) - 1)) * FASTKV_VECTOR_BYTES;
    const int32_t group = threadIdx.x >> p.lane_shift;
    const int32_t groups = FASTKV_GATHER_KV_THREADS >> p.lane_shift;
    const uint32_t tile = groups * FASTKV_GATHER_KV_ROWS;

    // Unsigned, so that a step past the end of the longest list cannot wrap.
    for (uint32_t first = blockIdx.y * tile; first < uint32_t(l.length); first += gridDim.y * tile) {
        // Asked for by all before one is looked at: behind branches each would be a wait of its own.
        int32_t index[FASTKV_GATHER_KV_ROWS];
#pragma unroll
        for (int32_t i = 0; i < FASTKV_GATHER_KV_ROWS; ++i) {
            index[i] = __ldg(l.indices + min(int32_t(first) + i * groups + group, l.length - 1));
        }
        Move move[FASTKV_GATHER_KV_ROWS];
#pragma unroll
        for (int32_t i = 0; i < FASTKV_GATHER_KV_ROWS; ++i) {
            move[i] = move_of(p, l, source, destination, sequence, head, first + i * groups + group, index[i]);
        }
        for (int32_t byte = lane_bytes; byte < p.row_bytes; byte += FASTKV_VECTOR_BYTES << p.lane_shift) {
            uint4 vector[FASTKV_GATHER_KV_ROWS];
#pragma unroll
            for (int32_t i = 0; i < FASTKV_GATHER_KV_ROWS; ++i) {
                if (move[i].index >= 0) {
                    vector[i] = load_once(move[i].from + byte);
                }
            }
#pragma unroll
            for (int32_t i = 0; i < FASTKV_GATHER_KV_ROWS; ++i) {
                if (move[i].index >= 0) {
                    store(move[i].to + byte, vector[i]);
                }
            }
        }
        if (p.kept.positions_out && !values && lane_bytes == 0) {
#pragma unroll
            for (int32_t i = 0; i < FASTKV_GATHER_KV_ROWS; ++i) {
                if (move[i].index >= 0) {
                    store_position(p.kept, l, move[i].index, move[i].place);
                }
            }
        }
    }
}

namespace {

// Indices at the front of a list that ascend within `[0, length)`, for a whole block.
__device__ __forceinline__ int32_t ascending(const int32_t* indices, int32_t count, int32_t length) {
    __shared__ int32_t end;
    if (threadIdx.x == 0) {
        end = count;
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < count; i += FASTKV_COMPACT_THREADS) {
        const int32_t index = __ldg(indices + i);
        if (index >= length || index <= (i == 0 ? -1 : __ldg(indices + i - 1))) {
            atomicMin(&end, i);
            break;
        }
    }
    __syncthreads();
    return end;
}

template <bool paged>
__device__ __forceinline__ void compact(const fastkv_compact_params& p) {
    const fastkv_cache& cache = p.cache;
    const List list = list_at(cache, blockIdx.x);
    const int32_t head = list.head(cache);
    const int32_t* indices = reinterpret_cast<const int32_t*>(p.indices) +
                             list.sequence(cache) * p.index_sequence_stride + head * p.index_head_stride;
    const int32_t kept = p.kept ? reinterpret_cast<const int32_t*>(p.kept)[list.index] : p.index_capacity;
    const int32_t count = ascending(indices, min(kept, p.index_capacity), list.length);

    const bool values = blockIdx.y == 1;
    const fastkv_rows& rows = values ? cache.v : cache.k;
    int32_t* positions = values ? nullptr : reinterpret_cast<int32_t*>(cache.positions);
    const int32_t lane_bytes = (threadIdx.x & ((1 << p.lane_shift) - 1)) * FASTKV_VECTOR_BYTES;
    const int32_t group = threadIdx.x >> p.lane_shift;
    const int32_t groups = FASTKV_COMPACT_THREADS >> p.lane_shift;
    const int32_t tile = groups * FASTKV_GATHER_KV_ROWS;

    // What is read lies at or behind what is written, in its own tile and, as indices ascend, in all later
    // ones: reading a tile before writing it is all the order there has to be.
    for (int32_t first = 0; first < count; first += tile) {
        uint64_t from[FASTKV_GATHER_KV_ROWS];
        uint64_t to[FASTKV_GATHER_KV_ROWS];
        int32_t position[FASTKV_GATHER_KV_ROWS];
        int32_t* position_out[FASTKV_GATHER_KV_ROWS];
#pragma unroll
        for (int32_t i = 0; i < FASTKV_GATHER_KV_ROWS; ++i) {
            const int32_t row = first + i * groups + group;
            const int32_t index = row < count ? __ldg(indices + row) : row;
            from[i] = 0;
            position_out[i] = nullptr;
            if (index != row) {
                const Place<paged> source(cache, list, index);
                const Place<paged> destination(cache, list, row);
                if (source.page >= 0 && destination.page >= 0) {
                    from[i] = rows.base + source.offset(rows, head) * p.element_bytes;
                    to[i] = rows.base + destination.offset(rows, head) * p.element_bytes;
                    if (positions && lane_bytes == 0) {
                        position[i] = positions[source.row(cache, head)];
                        position_out[i] = positions + destination.row(cache, head);
                    }
                }
            }
        }
        for (int32_t byte = lane_bytes; byte - lane_bytes < p.row_bytes;
             byte += FASTKV_VECTOR_BYTES << p.lane_shift) {
            uint4 vector[FASTKV_GATHER_KV_ROWS];
#pragma unroll
            for (int32_t i = 0; i < FASTKV_GATHER_KV_ROWS; ++i) {
                if (from[i] && byte < p.row_bytes) {
                    vector[i] = load_once(from[i] + byte);
                }
            }
            __syncthreads();
#pragma unroll
            for (int32_t i = 0; i < FASTKV_GATHER_KV_ROWS; ++i) {
                if (from[i] && byte < p.row_bytes) {
                    store(to[i] + byte, vector[i]);
                }
                if (position_out[i] && byte == 0) {
                    *position_out[i] = position[i];
                }
            }
        }
    }
    if (!values && threadIdx.x == 0) {
        // A place that is not in use stays so.
        const int32_t before = length_at(cache, list.index);
        reinterpret_cast<int32_t*>(p.lengths_out)[list.index] = before < 0 ? before : max(0, count);
    }
}

} // namespace

// Grid: x = (sequence, head), y = K or V. One block moves all rows of its list, front to back, so that
// order is its own affair.
extern "C" __global__ void __launch_bounds__(FASTKV_COMPACT_THREADS)
    fastkv_compact(__grid_constant__ const fastkv_compact_params p) {
    p.cache.pages.table ? compact<true>(p) : compact<false>(p);
}

// Grid: x = row of the list, y = sequence. One block moves one row (8 KB for Llama 3.1 8B), four
// vectors a thread in flight.
extern "C" __global__ void __launch_bounds__(256)
    fastkv_gather_rows(__grid_constant__ const fastkv_gather_rows_params p) {
    constexpr int32_t UNROLL = 4;
    const int32_t sequence = blockIdx.y;
    const int32_t row = blockIdx.x;
    const Selection l = selection_of(p.kept, sequence, 0);
    const int32_t index = index_at(l, row);
    if (index < 0) {
        return;
    }
    const int64_t offset =
        sequence * p.rows.sequence_stride + (l.first_token + index) * p.rows.token_stride;
    const uint64_t source = p.rows.base + offset * p.element_bytes;
    const uint64_t out = p.out + uint64_t(l.start + row) * p.row_bytes;

    const int32_t step = blockDim.x * FASTKV_VECTOR_BYTES;
    for (int32_t first = threadIdx.x * FASTKV_VECTOR_BYTES; first < p.row_bytes; first += UNROLL * step) {
        uint4 vector[UNROLL];
#pragma unroll
        for (int32_t i = 0; i < UNROLL; ++i) {
            if (first + i * step < p.row_bytes) {
                vector[i] = load_once(source + first + i * step);
            }
        }
#pragma unroll
        for (int32_t i = 0; i < UNROLL; ++i) {
            if (first + i * step < p.row_bytes) {
                store(out + first + i * step, vector[i]);
            }
        }
    }
    if (p.kept.positions_out && threadIdx.x == 0) {
        store_position(p.kept, l, index, l.start + row);
    }
}
