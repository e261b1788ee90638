// The next token of each row of logits: the most likely one, or a draw by temperature, top-k and top-p.
//
// Nothing is sorted. Tokens are ordered by their distance to the largest logit, and "where does the running
// sum of probabilities reach this?" is answered by histograms that narrow the range of distances until one
// value is left. The three questions of a draw (the k-th token, the end of the nucleus, the token of the
// random number) are all of that form. Probabilities are integers, units of 2^-40 of the largest, so sums
// do not depend on their order and every run gives the same token.
//
// One block reads a row from L2 about eight times (once for the most likely token alone).

#include "piece.cuh"
#include "primitives/warp.cuh"

#include <math_constants.h>

static_assert(sizeof(fastkv_draw) == 16, "src/abi.rs was generated for another layout");
static_assert(sizeof(fastkv_sample_params) == 56, "src/abi.rs was generated for another layout");

namespace {

using Mass = unsigned long long;

constexpr int32_t THREADS = FASTKV_SAMPLE_THREADS;
constexpr int32_t WARPS = THREADS / 32;
static_assert(WARPS == 32, "a warp reduces the results of all warps");
// A bin for each thread.
constexpr int32_t BINS = THREADS;
constexpr int32_t MASS_BITS = 40;
// Just above the bits of infinity, the largest distance.
constexpr uint32_t PAST_ALL = 0x7f800001;

struct Histogram {
    Mass mass[BINS];
    uint32_t count[BINS];
};

// What a row is drawn by.
struct Row {
    uint64_t logits;
    int32_t vocabulary;
    float max;
    float exponent; // log2(e) / temperature
};

// Tokens whose distances, as bits, lie in [low, high), and what stands before them.
struct Range {
    uint32_t low;
    uint32_t high;
    Mass mass_before;
    Mass mass;
    uint32_t count_before;
    uint32_t count;
};

// Calls `f(token, logit)` for tokens from `first` on, `step` pieces apart, up to `end`.
template <class T, class F>
__device__ __forceinline__ void each_logit(uint64_t logits, int32_t first, int32_t step, int32_t end, F f) {
    int32_t token = first;
    for (; token + FASTKV_PIECE <= end; token += step * FASTKV_PIECE) {
        const Piece piece = load_piece_once<T>(logits + int64_t(token) * T::BYTES);
#pragma unroll
        for (int32_t i = 0; i < FASTKV_PIECE; ++i) {
            f(token + i, piece.x[i]);
        }
    }
    // Of all threads one stands before the end, at the elements that fill no piece.
    for (; token < end; ++token) {
        float logit;
        if constexpr (T::BYTES == 4) {
            logit = reinterpret_cast<const float*>(logits)[token];
        } else {
            logit = T::unpack(reinterpret_cast<const uint16_t*>(logits)[token]).x;
        }
        f(token, logit);
    }
}

template <class T, class F>
__device__ __forceinline__ void each_logit(const Row& row, F f) {
    each_logit<T>(row.logits, threadIdx.x * FASTKV_PIECE, THREADS, row.vocabulary, f);
}

// Sums of the values of the threads before this one.
template <class V>
__device__ __forceinline__ V sum_before(V value) {
    __shared__ V of_warp[WARPS];
    const int32_t lane = threadIdx.x % 32;
    const auto scan = [lane](V sum) {
#pragma unroll
        for (int32_t distance = 1; distance < 32; distance *= 2) {
            const V below = __shfl_up_sync(0xffffffffu, sum, distance);
            sum += lane >= distance ? below : V(0);
        }
        return sum;
    };
    const V inclusive = scan(value);
    __syncthreads();
    if (lane == 31) {
        of_warp[threadIdx.x / 32] = inclusive;
    }
    __syncthreads();
    const V warps = of_warp[lane];
    const V before = __shfl_sync(0xffffffffu, scan(warps) - warps, threadIdx.x / 32);
    return before + inclusive - value;
}

// The most likely token in the low half, inverted, below the order of its logit; 0 where all are NaN.
template <class T>
__device__ __forceinline__ Mass most_likely(const Row& row) {
    __shared__ Mass of_warp[WARPS];
    Mass best = 0;
    each_logit<T>(row, [&](int32_t token, float logit) {
        // Minus zero becomes zero: they are equal.
        const int32_t bits = __float_as_int(logit + 0.0f);
        const uint32_t order = uint32_t(bits) ^ (uint32_t(bits >> 31) | 0x80000000u);
        if (logit == logit) {
            best = max(best, Mass(order) << 32 | uint32_t(~token));
        }
    });
    const auto larger = [](Mass a, Mass b) { return max(a, b); };
    best = warp_reduce(best, larger);
    if (threadIdx.x % 32 == 0) {
        of_warp[threadIdx.x / 32] = best;
    }
    __syncthreads();
    return warp_reduce(of_warp[threadIdx.x % 32], larger);
}

// Calls `f(token, distance)` as each_logit does, for logits that are numbers.
template <class F>
__device__ __forceinline__ auto distances(const Row& row, F f) {
    return [&row, f](int32_t token, float logit) {
        if (logit == logit) {
            // Of equal infinities the difference is no number.
            f(token, logit == row.max ? 0.0f : row.max - logit);
        }
    };
}

__device__ __forceinline__ Mass mass_of(const Row& row, float distance) {
    // What is forbidden, by a logit of -inf, is so at an infinite temperature too, whose exponent is 0.
    if (distance == CUDART_INF_F) {
        return 0;
    }
    // An infinite exponent times no distance is no number.
    const float power = distance == 0.0f ? 1.0f : exp2f(-distance * row.exponent);
    return __float2ull_rn(power * float(Mass(1) << MASS_BITS));
}

// Bin of a distance in the first histogram: even steps of the exponent, the last bin for all from about
// 2^-MASS_BITS down. Never falls as the distance grows, which is all that is needed of it.
__device__ __forceinline__ int32_t first_bin(const Row& row, float distance) {
    return min(BINS - 1, __float2int_rz(distance * row.exponent * (float(BINS) / MASS_BITS)));
}

// The bits of the first distance that falls into this bin or a later one.
__device__ __forceinline__ uint32_t first_of_bin(const Row& row, int32_t bin) {
    uint32_t low = 0, high = PAST_ALL;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (first_bin(row, __uint_as_float(middle)) < bin) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// Counts tokens by `bin(distance)`; a bin outside the histogram is not counted. Neighbours of one bin are
// added together first: where logits are equal, all threads would wait for the same word.
template <class T, class Bin>
__device__ __forceinline__ void fill(const Row& row, Histogram& histogram, Bin bin_of) {
    __syncthreads();
    histogram.mass[threadIdx.x] = 0;
    histogram.count[threadIdx.x] = 0;
    __syncthreads();
    uint32_t bin = BINS;
    uint32_t count = 0;
    Mass mass = 0;
    const auto flush = [&] {
        if (bin < BINS) {
            atomicAdd(&histogram.mass[bin], mass);
            atomicAdd(&histogram.count[bin], count);
        }
    };
    each_logit<T>(row, distances(row, [&](int32_t, float distance) {
        const uint32_t next = bin_of(distance);
        if (next != bin) {
            flush();
            bin = next;
            count = 0;
            mass = 0;
        }
        count += 1;
        mass += mass_of(row, distance);
    }));
    flush();
    __syncthreads();
}

// The bin in which the running sum, of counts or of masses, reaches `target`, which is more than 0 and at
// most the sum of all; what stands before it counts from what stands before the histogram.
__device__ __forceinline__ int32_t reach(const Histogram& histogram, bool by_count, Mass target, Range& range) {
    __shared__ Range found;
    __shared__ int32_t found_bin;
    const Mass mass = histogram.mass[threadIdx.x];
    const uint32_t count = histogram.count[threadIdx.x];
    const Mass mass_before = range.mass_before + sum_before(mass);
    const uint32_t count_before = range.count_before + sum_before(count);
    const Mass before = by_count ? count_before : mass_before;
    if (before < target && target <= before + (by_count ? count : mass)) {
        found = {0, 0, mass_before, mass, count_before, count};
        found_bin = threadIdx.x;
    }
    __syncthreads();
    range = found;
    return found_bin;
}

// The tokens at which the running sum reaches `target`: all of one distance, or a single one.
template <class T>
__device__ __forceinline__ Range descend(const Row& row, const Histogram& first, Histogram& next, bool by_count,
                                         Mass target) {
    Range range = {};
    const int32_t bin = reach(first, by_count, target, range);
    uint32_t low = first_of_bin(row, bin);
    uint32_t high = bin == BINS - 1 ? PAST_ALL : first_of_bin(row, bin + 1);
    while (range.count > 1 && high - low > 1) {
        const int32_t bits = 32 - __clz(high - low - 1);
        const int32_t shift = max(0, bits - (31 - __clz(BINS)));
        fill<T>(row, next, [=](float distance) {
            const uint32_t key = __float_as_uint(distance);
            return low <= key && key < high ? (key - low) >> shift : uint32_t(BINS);
        });
        low += uint32_t(reach(next, by_count, target, range)) << shift;
        high = min(high, low + (1u << shift));
    }
    range.low = low;
    range.high = high;
    return range;
}

// The token of this rank, by number, among those of a range.
template <class T>
__device__ __forceinline__ int32_t token_of(const Row& row, const Range& range, uint32_t rank) {
    __shared__ int32_t token;
    const int32_t pieces = (row.vocabulary + FASTKV_PIECE - 1) / FASTKV_PIECE;
    const int32_t share = (pieces + THREADS - 1) / THREADS * FASTKV_PIECE;
    const int32_t first = min(int32_t(threadIdx.x) * share, row.vocabulary);
    const int32_t end = min(first + share, row.vocabulary);
    const auto each = [&](auto f) {
        each_logit<T>(row.logits, first, 1, end, distances(row, [&](int32_t token, float distance) {
            const uint32_t key = __float_as_uint(distance);
            if (range.low <= key && key < range.high) {
                f(token);
            }
        }));
    };
    uint32_t count = 0;
    each([&](int32_t) { ++count; });
    uint32_t before = sum_before(count);
    if (before <= rank && rank < before + count) {
        each([&](int32_t candidate) {
            if (before++ == rank) {
                token = candidate;
            }
        });
    }
    __syncthreads();
    return token;
}

template <class T>
__device__ __forceinline__ int32_t sample(const fastkv_sample_params& p, Histogram& first, Histogram& next) {
    Row row = {element<T>(p.logits, blockIdx.x, 0), p.vocabulary, 0.0f, 0.0f};
    const Mass best = most_likely<T>(row);
    if (best == 0) {
        return -1;
    }
    const int32_t favourite = int32_t(~uint32_t(best));
    if (!p.draws) {
        return favourite;
    }
    const fastkv_draw draw = reinterpret_cast<const fastkv_draw*>(p.draws)[blockIdx.x];
    if (!(draw.temperature > 0.0f)) {
        return favourite;
    }
    const uint32_t order = uint32_t(best >> 32);
    row.max = __uint_as_float(order & 0x80000000u ? order ^ 0x80000000u : ~order);
    row.exponent = 1.44269504f / draw.temperature;
    fill<T>(row, first, [&](float distance) { return uint32_t(first_bin(row, distance)); });

    Mass kept = sum_before(first.mass[threadIdx.x]) + first.mass[threadIdx.x];
    uint32_t count = sum_before(first.count[threadIdx.x]) + first.count[threadIdx.x];
    __shared__ Mass all_mass;
    __shared__ uint32_t all_count;
    if (threadIdx.x == THREADS - 1) {
        all_mass = kept;
        all_count = count;
    }
    __syncthreads();
    kept = all_mass;
    count = all_count;

    Range range;
    Mass rank = 0;
    // Each question narrows what is kept; the last one is the draw itself.
    for (int32_t question = 0; question < 3; ++question) {
        Mass target;
        if (question == 0) {
            if (draw.top_k <= 0 || uint32_t(draw.top_k) >= count) {
                continue;
            }
            target = draw.top_k;
        } else if (question == 1) {
            if (!(draw.top_p < 1.0f)) {
                continue;
            }
            target = min(max(__double2ull_ru(double(draw.top_p) * double(kept)), Mass(1)), kept);
        } else {
            const double uniform = draw.uniform > 0.0f ? draw.uniform : 0.0f;
            // An infinite product becomes the largest integer, which has none behind it.
            target = min(__double2ull_rd(uniform * double(kept)), kept - 1) + 1;
        }
        const bool by_count = question == 0;
        range = descend<T>(row, first, next, by_count, target);
        const Mass each = range.mass / range.count;
        rank = by_count ? target - range.count_before - 1 : (target - range.mass_before - 1) / each;
        kept = range.mass_before + (rank + 1) * each;
    }
    return token_of<T>(row, range, uint32_t(rank));
}

} // namespace

// Grid: x = row.
extern "C" __global__ void __launch_bounds__(FASTKV_SAMPLE_THREADS)
    fastkv_sample(__grid_constant__ const fastkv_sample_params p) {
    __shared__ Histogram first, next;
    with_dtype(p.dtype, [&](auto type) {
        const int32_t token = sample<decltype(type)>(p, first, next);
        if (threadIdx.x == 0) {
            reinterpret_cast<int32_t*>(p.tokens)[blockIdx.x] = token;
        }
    });
}
