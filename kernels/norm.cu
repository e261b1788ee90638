// RMSNorm, and the residual sum before it.
//
// A block holds its row in registers, so x is read once and all else is read or written once. Squares are
// summed in f32, in an order that only the width decides: a row's result does not depend on the others.

#include "piece.cuh"
#include "primitives/warp.cuh"

static_assert(sizeof(fastkv_rms_norm_params) == 120, "src/abi.rs was generated for another layout");

namespace {

// The sum over a block of at most 32 warps, the same in every thread.
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float of_warp[FASTKV_NORM_THREADS / 32];
    const int32_t warps = blockDim.x / 32;
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) {
        of_warp[threadIdx.x / 32] = value;
    }
    __syncthreads();
    const int32_t lane = threadIdx.x % 32;
    return warp_sum(lane < warps ? of_warp[lane] : 0.0f);
}

template <class X, class T>
__device__ __forceinline__ void rms_norm(const fastkv_rms_norm_params& p) {
    // Pieces of a tensor that a thread asks for before it looks at the first: all that it has, but for very wide rows.
    // Of f32 they would take too many registers.
    constexpr int32_t TOGETHER = T::BYTES == 4 ? 1 : 2;
    static_assert(FASTKV_NORM_PIECES % TOGETHER == 0, "no piece is left over");
    const int64_t row = blockIdx.x;
    const auto column = [](int32_t n) { return int32_t(threadIdx.x + n * blockDim.x) * FASTKV_PIECE; };
    Piece piece[FASTKV_NORM_PIECES];
    Vectors<T> other[TOGETHER];
#pragma unroll
    for (int32_t first = 0; first < FASTKV_NORM_PIECES; first += TOGETHER) {
#pragma unroll
        for (int32_t n = first; n < first + TOGETHER; ++n) {
            if (column(n) < p.width) {
                piece[n] = load_piece<X>(element<X>(p.x, row, column(n)));
            }
        }
        if (!p.added.base) {
            continue;
        }
#pragma unroll
        for (int32_t n = first; n < first + TOGETHER; ++n) {
            if (column(n) < p.width) {
                other[n - first] = load_vectors_once<T>(element<T>(p.added, row, column(n)));
            }
        }
#pragma unroll
        for (int32_t n = first; n < first + TOGETHER; ++n) {
            if (column(n) < p.width) {
                const Piece added = other[n - first].unpack();
#pragma unroll
                for (int32_t i = 0; i < FASTKV_PIECE; ++i) {
                    piece[n].x[i] += added.x[i];
                }
                // The same as after a sum of its own.
                piece[n] = rounded<X>(piece[n]);
                store_piece<X>(element<X>(p.x, row, column(n)), piece[n]);
            }
        }
    }
    // On their way while the block adds up.
#pragma unroll
    for (int32_t n = 0; n < TOGETHER; ++n) {
        if (column(n) < p.width) {
            other[n] = load_vectors_once<T>(p.weight + int64_t(column(n)) * T::BYTES);
        }
    }
    float squares = 0.0f;
#pragma unroll
    for (int32_t n = 0; n < FASTKV_NORM_PIECES; ++n) {
        if (column(n) < p.width) {
#pragma unroll
            for (int32_t i = 0; i < FASTKV_PIECE; ++i) {
                squares = fmaf(piece[n].x[i], piece[n].x[i], squares);
            }
        }
    }
    const float scale = rsqrtf(block_sum(squares) / p.width + p.epsilon);
#pragma unroll
    for (int32_t n = 0; n < FASTKV_NORM_PIECES; ++n) {
        if (column(n) < p.width) {
            const Piece weight = n < TOGETHER ? other[n].unpack()
                                              : load_piece_once<T>(p.weight + int64_t(column(n)) * T::BYTES);
#pragma unroll
            for (int32_t i = 0; i < FASTKV_PIECE; ++i) {
                piece[n].x[i] *= scale * weight.x[i];
            }
            store_piece<T>(element<T>(p.out, row, column(n)), piece[n]);
        }
    }
}

} // namespace

// Grid: x = row. Threads for the whole row with at most FASTKV_NORM_PIECES pieces each.
extern "C" __global__ void __launch_bounds__(FASTKV_NORM_THREADS)
    fastkv_rms_norm(__grid_constant__ const fastkv_rms_norm_params p) {
    with_dtype(p.x_dtype, [&](auto x_type) {
        with_dtype(p.dtype, [&](auto type) { rms_norm<decltype(x_type), decltype(type)>(p); });
    });
}
