// What stands between the matrix products of a layer element by element: the gated activation of the
// MLP, the residual sum where it is not part of a norm, and changes of the element type.

#include "piece.cuh"

static_assert(sizeof(fastkv_add_params) == 80, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_convert_params) == 80, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_silu_mul_params) == 104, "src/abi.rs was generated for another layout");

// Grids: x = row, y = tiles of columns. A thread has one piece, and this is its column.
__device__ __forceinline__ int32_t own_column() {
    return (blockIdx.y * FASTKV_LLAMA_THREADS + threadIdx.x) * FASTKV_PIECE;
}

extern "C" __global__ void __launch_bounds__(FASTKV_LLAMA_THREADS)
    fastkv_add(__grid_constant__ const fastkv_add_params p) {
    const int64_t row = blockIdx.x;
    const int32_t column = own_column();
    if (column >= p.width) {
        return;
    }
    with_dtype(p.x_dtype, [&](auto x_type) {
        with_dtype(p.y_dtype, [&](auto y_type) {
            using X = decltype(x_type);
            using Y = decltype(y_type);
            Piece x = load_piece<X>(element<X>(p.x, row, column));
            const Piece y = load_piece_once<Y>(element<Y>(p.y, row, column));
#pragma unroll
            for (int32_t i = 0; i < FASTKV_PIECE; ++i) {
                x.x[i] += y.x[i];
            }
            store_piece<X>(element<X>(p.x, row, column), x);
        });
    });
}

extern "C" __global__ void __launch_bounds__(FASTKV_LLAMA_THREADS)
    fastkv_convert(__grid_constant__ const fastkv_convert_params p) {
    const int64_t row = blockIdx.x;
    const int32_t column = own_column();
    if (column >= p.width) {
        return;
    }
    with_dtype(p.x_dtype, [&](auto x_type) {
        with_dtype(p.out_dtype, [&](auto out_type) {
            using X = decltype(x_type);
            using Out = decltype(out_type);
            store_piece<Out>(element<Out>(p.out, row, column), load_piece_once<X>(element<X>(p.x, row, column)));
        });
    });
}

extern "C" __global__ void __launch_bounds__(FASTKV_LLAMA_THREADS)
    fastkv_silu_mul(__grid_constant__ const fastkv_silu_mul_params p) {
    const int64_t row = blockIdx.x;
    const int32_t column = own_column();
    if (column >= p.width) {
        return;
    }
    with_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        Piece gate = load_piece<T>(element<T>(p.gate, row, column));
        const Piece up = load_piece<T>(element<T>(p.up, row, column));
#pragma unroll
        for (int32_t i = 0; i < FASTKV_PIECE; ++i) {
            // Where the power overflows the quotient is 0, as it should.
            gate.x[i] = __fdividef(gate.x[i], 1.0f + __expf(-gate.x[i])) * up.x[i];
        }
        store_piece<T>(element<T>(p.out, row, column), gate);
    });
}
