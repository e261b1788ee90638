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
    const int64_t row = blockIdx.x;
    const int32_t step = blockDim.x * FASTKV_PIECE;
    Piece piece[FASTKV_NORM_PIECES];
    float squares = 0.0f;
#pragma unroll
    for (int32_t n = 0; n < FASTKV_NORM_PIECES; ++n) {
        const int32_t column = threadIdx.x * FASTKV_PIECE + n * step;
        if (column < p.width) {
            piece[n] = load_piece<X>(element<X>(p.x, row, column));
            if (p.added.base) {
                const Piece added = load_piece_once<T>(element<T>(p.added, row, column));
#pragma unroll
                for (int32_t i = 0; i < FASTKV_PIECE; ++i) {
                    piece[n].x[i] += added.x[i];
                }
                // The same as after a sum of its own.
                piece[n] = rounded<X>(piece[n]);
                store_piece<X>(element<X>(p.x, row, column), piece[n]);
            }
#pragma unroll
            for (int32_t i = 0; i < FASTKV_PIECE; ++i) {
                squares = fmaf(piece[n].x[i], piece[n].x[i], squares);
            }
        }
    }
    const float scale = rsqrtf(block_sum(squares) / p.width + p.epsilon);
#pragma unroll
    for (int32_t n = 0; n < FASTKV_NORM_PIECES; ++n) {
        const int32_t column = threadIdx.x * FASTKV_PIECE + n * step;
        if (column < p.width) {
            const Piece weight = load_piece_once<T>(p.weight + int64_t(column) * T::BYTES);
#pragma unroll
            for (int32_t i = 0; i < FASTKV_PIECE; ++i) {
                piece[n].x[i] *= scale * weight.x[i];
            }
            store_piece<T>(element<T>(p.out, row, column), piece[n]);
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
