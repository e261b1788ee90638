// Rows of the embedding table, the beginning of the residual stream.

#include "piece.cuh"

static_assert(sizeof(fastkv_embed_params) == 48, "src/abi.rs was generated for another layout");

// Grid: x = row. An id outside the table reads nothing: it may come from a sampler that had no answer.
extern "C" __global__ void __launch_bounds__(FASTKV_LLAMA_THREADS)
    fastkv_embed(__grid_constant__ const fastkv_embed_params p) {
    const int64_t row = blockIdx.x;
    const int32_t id = reinterpret_cast<const int32_t*>(p.ids)[row];
    const bool known = uint32_t(id) < uint32_t(p.vocabulary);
    if (!known && p.fault && threadIdx.x == 0) {
        atomicMax(reinterpret_cast<int32_t*>(p.fault), int32_t(row) + 1);
    }
    with_dtype(p.table_dtype, [&](auto table_type) {
        with_dtype(p.out_dtype, [&](auto out_type) {
            using Table = decltype(table_type);
            using Out = decltype(out_type);
            const int32_t step = blockDim.x * FASTKV_PIECE;
            for (int32_t column = threadIdx.x * FASTKV_PIECE; column < p.width; column += step) {
                Piece piece = {};
                if (known) {
                    piece = load_piece_once<Table>(p.table + (int64_t(id) * p.width + column) * Table::BYTES);
                }
                store_piece<Out>(p.out + (row * p.width + column) * Out::BYTES, piece);
            }
        });
    });
}
