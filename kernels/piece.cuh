// Rows of any element type in pieces of eight elements, the unit of the llama kernels: 16 bytes of a
// 16-bit type, 32 of f32.
#pragma once

#include "abi.h"
#include "primitives/convert.cuh"
#include "primitives/global.cuh"

// An element type of 16 bits, two elements in a word.
template <class T>
struct Paired {
    static constexpr int32_t BYTES = 2;
    static __device__ __forceinline__ float2 unpack(uint32_t word) {
        return {widen<T>(uint16_t(word)), widen<T>(uint16_t(word >> 16))};
    }
    static __device__ __forceinline__ uint32_t pack(float first, float second) {
        return ::pack<T>(first, second);
    }
};

struct F32 {
    static constexpr int32_t BYTES = 4;
};

// Eight elements in f32.
struct Piece {
    float x[FASTKV_PIECE];
};

template <class T>
__device__ __forceinline__ Piece unpack(uint4 low, uint4 high) {
    Piece piece;
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    if constexpr (T::BYTES == 4) {
#pragma unroll
        for (int32_t i = 0; i < FASTKV_PIECE; ++i) {
            piece.x[i] = __uint_as_float(words[i]);
        }
    } else {
#pragma unroll
        for (int32_t i = 0; i < FASTKV_PIECE / 2; ++i) {
            const float2 pair = T::unpack(words[i]);
            piece.x[2 * i] = pair.x;
            piece.x[2 * i + 1] = pair.y;
        }
    }
    return piece;
}

// A piece as it lies in memory.
template <class T>
struct Vectors {
    uint4 of[T::BYTES / 2];

    __device__ __forceinline__ Piece unpack() const { return ::unpack<T>(of[0], of[T::BYTES / 2 - 1]); }
};

template <class T>
__device__ __forceinline__ Vectors<T> load_vectors_once(uint64_t address) {
    Vectors<T> vectors;
#pragma unroll
    for (int32_t i = 0; i < T::BYTES / 2; ++i) {
        vectors.of[i] = load_once(address + i * FASTKV_VECTOR_BYTES);
    }
    return vectors;
}

// A piece that nothing writes during the kernel.
template <class T>
__device__ __forceinline__ Piece load_piece_once(uint64_t address) {
    const uint4 low = load_once(address);
    return unpack<T>(low, T::BYTES == 4 ? load_once(address + FASTKV_VECTOR_BYTES) : low);
}

// A piece that this kernel may write as well.
template <class T>
__device__ __forceinline__ Piece load_piece(uint64_t address) {
    const uint4 low = load(address);
    return unpack<T>(low, T::BYTES == 4 ? load(address + FASTKV_VECTOR_BYTES) : low);
}

template <class T>
__device__ __forceinline__ void store_piece(uint64_t address, const Piece& piece) {
    const float* x = piece.x;
    if constexpr (T::BYTES == 4) {
        store(address, {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                        __float_as_uint(x[3])});
        store(address + FASTKV_VECTOR_BYTES, {__float_as_uint(x[4]), __float_as_uint(x[5]),
                                              __float_as_uint(x[6]), __float_as_uint(x[7])});
    } else {
        store(address, {T::pack(x[0], x[1]), T::pack(x[2], x[3]), T::pack(x[4], x[5]), T::pack(x[6], x[7])});
    }
}

// What `store_piece` leaves of a piece.
template <class T>
__device__ __forceinline__ Piece rounded(const Piece& piece) {
    if constexpr (T::BYTES == 4) {
        return piece;
    } else {
        const float* x = piece.x;
        const uint4 words = {T::pack(x[0], x[1]), T::pack(x[2], x[3]), T::pack(x[4], x[5]), T::pack(x[6], x[7])};
        return unpack<T>(words, words);
    }
}

// Calls `f` with the element type that a parameter struct names: a branch that a whole grid takes.
template <class F>
__device__ __forceinline__ void with_dtype(int32_t dtype, F f) {
    if (dtype == FASTKV_DTYPE_F16) {
        f(Paired<F16>{});
    } else if (dtype == FASTKV_DTYPE_BF16) {
        f(Paired<BF16>{});
    } else {
        f(F32{});
    }
}

// Address of element `column` of a row of a matrix.
template <class T>
__device__ __forceinline__ uint64_t element(const fastkv_rows& matrix, int64_t row, int32_t column) {
    return matrix.base + (row * matrix.token_stride + column) * T::BYTES;
}
