// Rotary position embedding of Q and K, fused with the append of K and V to the layer's cache.
//
// Angles are rounded to f32, as models are trained with, and then reduced exactly: sine and cosine are
// right for every position. They are computed once a token for all of its heads.

#include "piece.cuh"

static_assert(sizeof(fastkv_rope_params) == 240, "src/abi.rs was generated for another layout");

namespace {

// Cosine and sine of an angle. The multiple of pi/2 is taken off in f64, whose pi/2 is off by 6e-17: by
// 8e-8 altogether at an angle of 2^31, by nothing at the positions of this world. What is left lies within
// pi/4, where the series to x^11 are good to f32.
__device__ __forceinline__ float2 turn(float angle) {
    const long long quarters = __double2ll_rn(double(angle) * 0x1.45f306dc9c883p-1);
    const float x = float(fma(double(quarters), -0x1.921fb54442d18p+0, double(angle)));
    const float y = x * x;
    float sine = fmaf(y, -1.0f / 39916800, 1.0f / 362880);
    sine = fmaf(y, sine, -1.0f / 5040);
    sine = fmaf(y, sine, 1.0f / 120);
    sine = fmaf(y, sine, -1.0f / 6);
    sine = fmaf(y * x, sine, x);
    float cosine = fmaf(y, -1.0f / 3628800, 1.0f / 40320);
    cosine = fmaf(y, cosine, -1.0f / 720);
    cosine = fmaf(y, cosine, 1.0f / 24);
    cosine = fmaf(y, cosine, -0.5f);
    cosine = fmaf(y, cosine, 1.0f);
    const bool odd = quarters & 1;
    const float c = odd ? sine : cosine;
    const float s = odd ? cosine : sine;
    return {(quarters + 1) & 2 ? -c : c, quarters & 2 ? -s : s};
}

// Where a sequence lies on the token axis, with every limit applied.
struct Sequence {
    int64_t first; // token 0 on a packed token axis, else 0
    int32_t tokens;
};

__device__ __forceinline__ Sequence sequence_of(const fastkv_rope_params& p, int32_t sequence) {
    if (!p.cu_seqlens) {
        return {0, p.tokens};
    }
    const int32_t* begin = reinterpret_cast<const int32_t*>(p.cu_seqlens) + sequence;
    const int32_t end = min(begin[1], p.total_tokens);
    return {begin[0], begin[0] < 0 || end < begin[0] ? 0 : min(p.tokens, end - begin[0])};
}

// Address of the first element of a row.
template <class T>
__device__ __forceinline__ uint64_t row_of(const fastkv_rows& rows, int32_t sequence, int32_t head,
                                           int64_t token) {
    return rows.base +
           (sequence * rows.sequence_stride + head * rows.head_stride + token * rows.token_stride) * T::BYTES;
}

// Row of a cache for a token of the sequence, or -1 where there is no room.
__device__ __forceinline__ int64_t cache_row(const fastkv_rope_params& p, int32_t sequence, int32_t head,
                                             int32_t token) {
    const int64_t list = int64_t(sequence) * p.kv_heads + head;
    const int64_t start = reinterpret_cast<const int64_t*>(p.starts)[list];
    const int64_t length = p.lengths ? reinterpret_cast<const int32_t*>(p.lengths)[list] : 0;
    // Unsigned, so that no sum of theirs can wrap.
    const uint64_t row = uint64_t(start) + uint64_t(length) + token;
    return start >= 0 && length >= 0 && row < uint64_t(p.out_rows) ? int64_t(row) : -1;
}

template <class T>
__device__ __forceinline__ void rope(const fastkv_rope_params& p, float2* turns) {
    const int32_t sequence = blockIdx.y;
    const Sequence s = sequence_of(p, sequence);
    const int32_t first = blockIdx.x * FASTKV_ROPE_TOKENS;
    const int32_t count = min(s.tokens - first, FASTKV_ROPE_TOKENS);
    if (count <= 0) {
        return;
    }
    const int32_t half = p.head_dim / 2;
    const int32_t* positions = reinterpret_cast<const int32_t*>(p.positions) + first +
                               (p.cu_seqlens ? s.first : int64_t(sequence) * p.tokens);
    if (p.inverse_frequencies) {
        for (int32_t i = threadIdx.x; i < count * half; i += FASTKV_LLAMA_THREADS) {
            const float frequency = reinterpret_cast<const float*>(p.inverse_frequencies)[i % half];
            turns[i] = turn(float(positions[i / half]) * frequency);
        }
        __syncthreads();
    }

    const int32_t heads = p.query_heads + p.kv_heads;
    const int32_t pieces = half / FASTKV_PIECE;
    for (int32_t i = threadIdx.x; i < count * heads * pieces; i += FASTKV_LLAMA_THREADS) {
        const int32_t column = i % pieces * FASTKV_PIECE;
        const int32_t head = i / pieces % heads;
        const int32_t token = i / pieces / heads;
        const int64_t packed_token = s.first + first + token;
        const bool query = head < p.query_heads;
        const int32_t kv_head = head - p.query_heads;
        uint64_t from, to;
        if (query) {
            from = row_of<T>(p.q, sequence, head, packed_token);
            to = row_of<T>(p.q_out, sequence, head, packed_token);
        } else {
            const int64_t row = cache_row(p, sequence, kv_head, first + token);
            if (row < 0) {
                continue;
            }
            from = row_of<T>(p.k, sequence, kv_head, packed_token);
            to = p.k_out + row * p.head_dim * T::BYTES;
        }
        Piece low = load_piece<T>(from + column * T::BYTES);
        Piece high = load_piece<T>(from + (column + half) * T::BYTES);
        if (p.inverse_frequencies) {
#pragma unroll
            for (int32_t j = 0; j < FASTKV_PIECE; ++j) {
                const float2 turn = turns[token * half + column + j];
                const float a = low.x[j];
                const float b = high.x[j];
                low.x[j] = a * turn.x - b * turn.y;
                high.x[j] = b * turn.x + a * turn.y;
            }
        }
        store_piece<T>(to + column * T::BYTES, low);
        store_piece<T>(to + (column + half) * T::BYTES, high);
    }

    const int32_t vectors = p.head_dim * T::BYTES / FASTKV_VECTOR_BYTES;
    for (int32_t i = threadIdx.x; i < count * p.kv_heads * vectors; i += FASTKV_LLAMA_THREADS) {
        const int32_t byte = i % vectors * FASTKV_VECTOR_BYTES;
        const int32_t head = i / vectors % p.kv_heads;
        const int32_t token = i / vectors / p.kv_heads;
        const int64_t row = cache_row(p, sequence, head, first + token);
        if (row < 0) {
            continue;
        }
        const uint64_t from = row_of<T>(p.v, sequence, head, s.first + first + token);
        store(p.v_out + row * p.head_dim * T::BYTES + byte, load_once(from + byte));
        if (p.positions_out && byte == 0) {
            reinterpret_cast<int32_t*>(p.positions_out)[row] = positions[token];
        }
    }
}

// What each cache of a sequence holds when its tokens are appended; a place that is not in use stays so. The blocks
// that append read the old lengths, so the new ones go elsewhere.
__device__ __forceinline__ void advance(const fastkv_rope_params& p, int32_t sequence) {
    const int32_t tokens = sequence_of(p, sequence).tokens;
    for (int32_t head = threadIdx.x; head < p.kv_heads; head += FASTKV_LLAMA_THREADS) {
        const int64_t list = int64_t(sequence) * p.kv_heads + head;
        const int32_t before = p.lengths ? reinterpret_cast<const int32_t*>(p.lengths)[list] : 0;
        reinterpret_cast<int32_t*>(p.lengths_out)[list] = before < 0 ? before : before + tokens;
    }
}

} // namespace

// Grid: x = tiles of FASTKV_ROPE_TOKENS tokens, y = sequence.
extern "C" __global__ void __launch_bounds__(FASTKV_LLAMA_THREADS)
    fastkv_rope(__grid_constant__ const fastkv_rope_params p) {
    if (p.lengths_out && blockIdx.x == 0) {
        advance(p, blockIdx.y);
    }
    __shared__ float2 turns[FASTKV_ROPE_TOKENS * FASTKV_ROPE_HEAD_DIM / 2];
    with_dtype(p.dtype, [&](auto type) { rope<decltype(type)>(p, turns); });
}
