// Moves the rows that a selection kept to where they stay: rows of K and V into the ragged cache,
// rows of hidden states into the shorter sequence behind the TSP layer.
//
// Both are copies. What matters is to have enough bytes in flight (about 23 KB per SM on an H200) and
// to move them 16 bytes a thread; indices, lengths and starts are noise beside the rows.

#include "abi.h"
#include "primitives/global.cuh"

static_assert(sizeof(fastkv_kept) == 88, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_rows) == 32, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_gather_indices_params) == 32, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_gather_kv_params) == 184, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_gather_rows_params) == 136, "src/abi.rs was generated for another layout");

namespace {

// One list of a selection with every limit applied: reading and writing within it is safe whatever
// the lists hold.
struct List {
    const int32_t* indices;
    int32_t length;      // indices to follow
    int32_t tokens;      // valid indices lie in [0, tokens)
    int64_t start;       // destination row of the first index
    int64_t first_token; // token 0 of this sequence on the packed token axis, else 0
    int64_t position;    // the same on the axis of `positions`
};

__device__ __forceinline__ List list_of(const fastkv_kept& kept, int32_t sequence, int32_t head) {
    const int64_t list = int64_t(sequence) * kept.heads + head;
    List l;
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
__device__ __forceinline__ int32_t index_at(const List& l, int32_t row) {
    if (row >= l.length) {
        return -1;
    }
    const int32_t index = __ldg(l.indices + row);
    return uint32_t(index) < uint32_t(l.tokens) ? index : -1;
}

__device__ __forceinline__ void store_position(const fastkv_kept& kept, const List& l, int32_t row,
                                               int32_t index) {
    const int32_t position =
        kept.positions ? reinterpret_cast<const int32_t*>(kept.positions)[l.position + index] : index;
    reinterpret_cast<int32_t*>(kept.positions_out)[l.start + row] = position;
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
    const List l = list_of(p.kept, sequence, head);

    const bool values = blockIdx.z == 1;
    const int64_t offset =
        values ? sequence * p.v.sequence_stride + head * p.v.head_stride + l.first_token * p.v.token_stride
               : sequence * p.k.sequence_stride + head * p.k.head_stride + l.first_token * p.k.token_stride;
    const uint64_t source = (values ? p.v.base : p.k.base) + offset * p.element_bytes;
    const int64_t source_row = (values ? p.v.token_stride : p.k.token_stride) * p.element_bytes;
    const uint64_t out = (values ? p.v_out : p.k_out) + uint64_t(l.start) * p.row_bytes;

    const int32_t lane_bytes = (threadIdx.x & ((1 << p.lane_shift) - 1)) * FASTKV_VECTOR_BYTES;
    const int32_t group = threadIdx.x >> p.lane_shift;
    const int32_t groups = FASTKV_GATHER_KV_THREADS >> p.lane_shift;
    const uint32_t tile = groups * FASTKV_GATHER_KV_ROWS;

    // Unsigned, so that a step past the end of the longest list cannot wrap.
    for (uint32_t first = blockIdx.y * tile; first < uint32_t(l.length); first += gridDim.y * tile) {
        int32_t index[FASTKV_GATHER_KV_ROWS];
#pragma unroll
        for (int32_t i = 0; i < FASTKV_GATHER_KV_ROWS; ++i) {
            index[i] = index_at(l, first + i * groups + group);
        }
        for (int32_t byte = lane_bytes; byte < p.row_bytes; byte += FASTKV_VECTOR_BYTES << p.lane_shift) {
            uint4 vector[FASTKV_GATHER_KV_ROWS];
#pragma unroll
            for (int32_t i = 0; i < FASTKV_GATHER_KV_ROWS; ++i) {
                if (index[i] >= 0) {
                    vector[i] = load_once(source + index[i] * source_row + byte);
                }
            }
#pragma unroll
            for (int32_t i = 0; i < FASTKV_GATHER_KV_ROWS; ++i) {
                if (index[i] >= 0) {
                    const int64_t row = int64_t(first) + i * groups + group;
                    store(out + row * p.row_bytes + byte, vector[i]);
                }
            }
        }
        if (p.kept.positions_out && !values && lane_bytes == 0) {
#pragma unroll
            for (int32_t i = 0; i < FASTKV_GATHER_KV_ROWS; ++i) {
                if (index[i] >= 0) {
                    store_position(p.kept, l, first + i * groups + group, index[i]);
                }
            }
        }
    }
}

// Grid: x = row of the list, y = sequence. One block moves one row (8 KB for Llama 3.1 8B), four
// vectors a thread in flight.
extern "C" __global__ void __launch_bounds__(256)
    fastkv_gather_rows(__grid_constant__ const fastkv_gather_rows_params p) {
    constexpr int32_t UNROLL = 4;
    const int32_t sequence = blockIdx.y;
    const int32_t row = blockIdx.x;
    const List l = list_of(p.kept, sequence, 0);
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
        store_position(p.kept, l, row, index);
    }
}
