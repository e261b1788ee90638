// Causal attention as kernels for Hopper do it: a warp that copies, two warpgroups that multiply, rings of
// tiles between them. It is what the emulator is proven on as a whole, and what examples/mutants.rs plants
// bugs in. Compiled to attention.ptx by
//   nvcc --ptx -arch=compute_90a -O3 -std=c++17 -o attention.ptx attention.cu
#include <stdint.h>

// A tile is 128 rows of a head of 128 elements of bf16: two halves of 64 columns, rows of 128 bytes in each.
constexpr int32_t ROWS = 128;
constexpr int32_t HEAD = 128;
constexpr uint32_t HALF_BYTES = ROWS * 128;
constexpr uint32_t TILE_BYTES = 2 * HALF_BYTES;
constexpr int32_t STAGES = 2;
constexpr int32_t CONSUMER_WARPS = 8;
constexpr int32_t THREADS = 128 + 32 * CONSUMER_WARPS;

struct alignas(64) TensorMap {
    uint8_t bytes[128];
};

struct Params {
    // [tokens, heads, HEAD] as {64 columns, token, half, head}, boxes of a tile, 128-byte swizzle.
    TensorMap q, k, v;
    uint16_t* out; // [query tokens, query heads, HEAD]
    float* lse;    // [query heads, query tokens], natural logarithm
    // [sequences + 1]: first token of each sequence.
    const int32_t* cu_queries;
    const int32_t* cu_keys;
    uint32_t* queue; // items taken, 0 at first
    int32_t sequences, query_heads, kv_heads, query_tokens;
    float scale;
    int32_t reserved;
};

// What a consumer has to know of an item.
struct Tile {
    int32_t head;   // -1 at the end of the queue
    int32_t token;  // of the first query
    int32_t rows;   // queries in the tile
    int32_t blocks; // tiles of keys that any of them sees
    int32_t limit;  // last key that the first of them sees
};

struct Shared {
    uint64_t full_q, empty_q;
    uint64_t full_k[STAGES], empty_k[STAGES];
    uint64_t full_v[STAGES], empty_v[STAGES];
    Tile tile;
};

// -- mbarrier

__device__ __forceinline__ uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

__device__ __forceinline__ void init(uint64_t& barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void arrive(uint64_t& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

__device__ __forceinline__ void arrive_expecting(uint64_t& barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
                 : "memory");
}

// Until the phase of this parity has ended.
__device__ __forceinline__ void wait(uint64_t& barrier, uint32_t parity) {
    asm volatile("{\n.reg .pred ended;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
                 "@!ended bra AGAIN;\n}" ::"r"(shared_address(&barrier)),
                 "r"(parity)
                 : "memory");
}

// -- Copies

__device__ __forceinline__ void load_tile(uint32_t to, const TensorMap& map, int32_t token, int32_t head,
                                          uint64_t& barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
                 "l"(&map), "r"(0), "r"(token), "r"(0), "r"(head), "r"(shared_address(&barrier))
                 : "memory");
}

// What this thread did to shared memory comes before what copies and products do next.
__device__ __forceinline__ void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// -- Numbered barriers

__device__ __forceinline__ void barrier_sync(int32_t id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void barrier_arrive(int32_t id) { asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory"); }

// -- Products of a warpgroup

#define OPERANDS_8(d, n) \
    "+f"(d[n]), "+f"(d[n + 1]), "+f"(d[n + 2]), "+f"(d[n + 3]), "+f"(d[n + 4]), "+f"(d[n + 5]), "+f"(d[n + 6]), "+f"(d[n + 7])
#define OPERANDS_64(d)                                                                                     \
    OPERANDS_8(d, 0), OPERANDS_8(d, 8), OPERANDS_8(d, 16), OPERANDS_8(d, 24), OPERANDS_8(d, 32), OPERANDS_8(d, 40), \
        OPERANDS_8(d, 48), OPERANDS_8(d, 56)
#define NAMES_64                                                                                                   \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "        \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// A tile in shared memory, 128-byte swizzle: `leading` is the distance of its halves where the product runs
// over rows, 1024 that of 8 rows. In two words, so that steps are additions to the first.
struct Matrix {
    uint32_t low, high;

    __device__ __forceinline__ Matrix(uint32_t at, uint32_t leading)
        : low(at >> 4 | leading >> 4 << 16), high(1024 >> 4 | 1u << 30) {}
    __device__ __forceinline__ uint64_t plus(uint32_t bytes) const {
        return uint64_t(high) << 32 | (low + (bytes >> 4));
    }
};

__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until all but `PENDING` groups are done; nothing of `d` is read earlier.
template <int32_t PENDING> __device__ __forceinline__ void products_wait(float (&d)[64]) {
    asm volatile("wgmma.wait_group.sync.aligned %64;" : OPERANDS_64(d) : "n"(PENDING) : "memory");
}

// d[64][128] = a[64][16] * b[128][16]^T, plus d if `accumulate`.
__device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " NAMES_64 ", %64, %65, p, 1, 1, 0, 0;\n}"
                 : OPERANDS_64(d)
                 : "l"(a), "l"(b), "r"(int32_t(accumulate)));
}

// d[64][128] += a[64][16] * b[16][128], a in registers, b with its columns first.
__device__ __forceinline__ void multiply(float (&d)[64], const uint32_t* a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " NAMES_64
                 ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : OPERANDS_64(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// -- Arithmetic

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint32_t pack(float first, float second) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

// The same number in all lanes, known to be so.
__device__ __forceinline__ int32_t uniform(int32_t x) { return __shfl_sync(~0u, x, 0); }

// -- The producer: one thread that fills the rings.

struct Producer {
    const Params& params;
    Shared& shared;
    uint32_t q_tile, k_tiles, v_tiles;

    // The tile of an item, its first key and kv head. The items of a kv head stand together, its keys stay in
    // L2; tiles with the most keys come first, the query heads of a tile one behind the other.
    __device__ __forceinline__ Tile tile_of(uint32_t item, uint32_t per_head, int32_t& key_token, int32_t& kv_head) const {
        const int32_t group = params.query_heads / params.kv_heads;
        Tile tile = {-1, 0, 0, 0, 0};
        kv_head = item / per_head;
        if (kv_head >= params.kv_heads) return tile;
        int32_t rest = item % per_head;
        int32_t sequence = 0, queries, tiles;
        for (;; ++sequence) {
            queries = params.cu_queries[sequence + 1] - params.cu_queries[sequence];
            tiles = (queries + ROWS - 1) / ROWS;
            if (rest < tiles * group) break;
            rest -= tiles * group;
        }
        const int32_t first = (tiles - 1 - rest / group) * ROWS;
        const int32_t keys = params.cu_keys[sequence + 1] - params.cu_keys[sequence];
        key_token = params.cu_keys[sequence];
        tile.head = kv_head * group + rest % group;
        tile.token = params.cu_queries[sequence] + first;
        tile.rows = min(queries - first, ROWS);
        // The last query sees the last key.
        tile.limit = first + keys - queries;
        tile.blocks = max(0, tile.limit + tile.rows + ROWS - 1) / ROWS;
        return tile;
    }

    __device__ __forceinline__ void load_k(uint32_t turn, int32_t token, int32_t head) {
        const uint32_t stage = turn % STAGES;
        wait(shared.empty_k[stage], ~turn / STAGES % 2);
        arrive_expecting(shared.full_k[stage], TILE_BYTES);
        load_tile(k_tiles + stage * TILE_BYTES, params.k, token, head, shared.full_k[stage]);
    }

    __device__ __forceinline__ void load_v(uint32_t turn, int32_t token, int32_t head) {
        const uint32_t stage = turn % STAGES;
        wait(shared.empty_v[stage], ~turn / STAGES % 2);
        arrive_expecting(shared.full_v[stage], TILE_BYTES);
        load_tile(v_tiles + stage * TILE_BYTES, params.v, token, head, shared.full_v[stage]);
    }

    __device__ __forceinline__ void run() {
        uint32_t per_head = 0;
        for (int32_t n = 0; n < params.sequences; ++n) {
            per_head += (params.cu_queries[n + 1] - params.cu_queries[n] + ROWS - 1) / ROWS;
        }
        per_head *= params.query_heads / params.kv_heads;
        uint32_t item = per_head == 0 ? ~0u : atomicAdd(params.queue, 1);
        // Tiles of keys so far: where the rings stand.
        uint32_t turn = 0;
        for (uint32_t round = 0;; ++round) {
            int32_t token = 0, kv_head = 0;
            const Tile tile = per_head == 0 ? Tile{-1, 0, 0, 0, 0} : tile_of(item, per_head, token, kv_head);
            int32_t key = token + (tile.blocks - 1) * ROWS;
            if (tile.blocks > 0) load_k(turn, key, kv_head);
            wait(shared.empty_q, ~round % 2);
            shared.tile = tile;
            if (tile.head < 0) {
                arrive(shared.full_q);
                return;
            }
            arrive_expecting(shared.full_q, TILE_BYTES);
            load_tile(q_tile, params.q, tile.token, tile.head, shared.full_q);
            item = atomicAdd(params.queue, 1);
            // Values come one tile behind their keys, in the order of use.
#pragma unroll 1
            for (int32_t n = 1; n < tile.blocks; ++n, ++turn, key -= ROWS) {
                load_k(turn + 1, key - ROWS, kv_head);
                load_v(turn, key, kv_head);
            }
            if (tile.blocks > 0) load_v(turn++, key, kv_head);
        }
    }
};

// -- A consumer: a warpgroup with 64 of the queries.

struct Consumer {
    const Params& params;
    Shared& shared;
    uint32_t q_tile, k_tiles, v_tiles;
    // Its number, 0 or 1: also the numbered barrier, less 1, at which it waits for its turn to multiply.
    int32_t number;

    // Of the two rows that a thread has, `lane / 4` and 8 more.
    float scores[64], sums[64];
    uint32_t weights[32];
    float highest[2], total[2], rescale[2];
    // Last column seen, from the thread's first column of the tile at hand.
    int32_t limit[2];
    // Tiles of keys so far.
    uint32_t turn;

    // Scores become weights; what was summed before has to be multiplied by `rescale`.
    template <bool MASKED> __device__ __forceinline__ void softmax() {
        const float scale = params.scale * 1.4426950408889634f;
        if (MASKED) {
#pragma unroll
            for (int32_t n = 0; n < 64; ++n) {
                if (n / 4 * 8 + n % 2 > limit[n / 2 % 2]) scores[n] = -INFINITY;
            }
        }
#pragma unroll
        for (int32_t row = 0; row < 2; ++row) {
            float most = highest[row];
#pragma unroll
            for (int32_t n = 0; n < 32; ++n) most = fmaxf(most, scores[n / 2 * 4 + row * 2 + n % 2]);
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            // A row that has not seen a key yet has weights of 0, not of NaN.
            const float shift = MASKED && most == -INFINITY ? 0.0f : most * scale;
            rescale[row] = exp2_approx(fmaf(highest[row], scale, -shift));
            highest[row] = most;
            float sum = 0.0f;
#pragma unroll
            for (int32_t n = 0; n < 32; ++n) {
                float& score = scores[n / 2 * 4 + row * 2 + n % 2];
                score = exp2_approx(fmaf(score, scale, -shift));
                sum += score;
            }
            total[row] = fmaf(total[row], rescale[row], sum);
        }
    }

    __device__ __forceinline__ void pack_weights() {
#pragma unroll
        for (int32_t n = 0; n < 32; ++n) weights[n] = pack(scores[2 * n], scores[2 * n + 1]);
    }

    __device__ __forceinline__ void multiply_keys(uint32_t stage) {
        const Matrix q(uniform(q_tile + number * 64 * 128), 16);
        const Matrix k(uniform(k_tiles + stage * TILE_BYTES), 16);
        products_fence();
#pragma unroll
        for (int32_t step = 0; step < HEAD / 16; ++step) {
            const uint32_t at = step / 4 * HALF_BYTES + step % 4 * 32;
            multiply(scores, q.plus(at), k.plus(at), step > 0);
        }
        products_commit();
    }

    __device__ __forceinline__ void multiply_values(uint32_t stage) {
        const Matrix v(uniform(v_tiles + stage * TILE_BYTES), HALF_BYTES);
        products_fence();
#pragma unroll
        for (int32_t step = 0; step < ROWS / 16; ++step) multiply(sums, weights + 4 * step, v.plus(step * 16 * 128));
        products_commit();
    }

    // This warp has read what it needs of a tile.
    __device__ __forceinline__ void release(uint64_t& empty) {
        if (threadIdx.x % 32 == 0) arrive(empty);
    }

    // Scores of one tile of keys while the values of the tile before are multiplied; then, while the other
    // consumer has the tensor cores, the softmax.
    template <bool MASKED> __device__ __forceinline__ void step() {
        const uint32_t before = turn++;
        wait(shared.full_k[turn % STAGES], turn / STAGES % 2);
        barrier_sync(1 + number);
        multiply_keys(turn % STAGES);
        wait(shared.full_v[before % STAGES], before / STAGES % 2);
        multiply_values(before % STAGES);
        barrier_arrive(2 - number);
        products_wait<1>(scores);
        release(shared.empty_k[turn % STAGES]);
        limit[0] += ROWS;
        limit[1] += ROWS;
        softmax<MASKED>();
        products_wait<0>(sums);
        release(shared.empty_v[before % STAGES]);
        pack_weights();
#pragma unroll
        for (int32_t n = 0; n < 64; ++n) sums[n] *= rescale[n / 2 % 2];
    }

    __device__ __forceinline__ void attend(const Tile& tile, int32_t row) {
        int32_t block = tile.blocks - 1;
        const int32_t column = block * ROWS + threadIdx.x % 4 * 2;
        limit[0] = tile.limit + row - column;
        limit[1] = limit[0] + 8;

        wait(shared.full_k[turn % STAGES], turn / STAGES % 2);
        multiply_keys(turn % STAGES);
        products_wait<0>(scores);
        release(shared.empty_k[turn % STAGES]);
        softmax<true>();
        pack_weights();

        // Tiles that every query of this consumer sees as a whole need no mask.
        const int32_t whole = max(0, tile.limit + number * 64 + 1) / ROWS;
#pragma unroll 1
        while (--block >= whole) step<true>();
#pragma unroll 1
        for (; block >= 0; --block) step<false>();

        wait(shared.full_v[turn % STAGES], turn / STAGES % 2);
        multiply_values(turn % STAGES);
        products_wait<0>(sums);
        release(shared.empty_v[turn % STAGES]);
        ++turn;
    }

    // The rows of a warp go through its own rows of the tile of queries, so that whole rows are stored.
    __device__ __forceinline__ void store(const Tile& tile, int32_t row) {
        const int32_t lane = threadIdx.x % 32;
        float inverse[2];
#pragma unroll
        for (int32_t n = 0; n < 2; ++n) {
            total[n] += __shfl_xor_sync(~0u, total[n], 1);
            total[n] += __shfl_xor_sync(~0u, total[n], 2);
            inverse[n] = total[n] == 0.0f ? 0.0f : 1.0f / total[n];
            if (lane % 4 == 0 && row + 8 * n < tile.rows) {
                const float lse = highest[n] * params.scale + log2_approx(total[n]) * 0.6931471805599453f;
                params.lse[int64_t(tile.head) * params.query_tokens + tile.token + row + 8 * n] =
                    total[n] == 0.0f ? -INFINITY : lse;
            }
        }
        const int32_t first = row - lane / 4;
        // Lanes name rows of four 8 x 8 matrices: 16 rows, then the same 8 columns on.
        const uint32_t from = q_tile + (first + lane % 16) * 128;
#pragma unroll
        for (int32_t n = 0; n < 8; ++n) {
            const uint32_t chunk = (n % 4 * 2 + lane / 16) ^ lane % 8;
            const float* at = sums + 8 * n;
            store_matrices(from + n / 4 * HALF_BYTES + chunk * 16, pack(at[0] * inverse[0], at[1] * inverse[0]),
                           pack(at[2] * inverse[1], at[3] * inverse[1]), pack(at[4] * inverse[0], at[5] * inverse[0]),
                           pack(at[6] * inverse[1], at[7] * inverse[1]));
        }
        __syncwarp();
        // Half a warp for each row.
#pragma unroll
        for (int32_t n = 0; n < 8; ++n) {
            const int32_t to = first + 2 * n + lane / 16, chunk = lane % 16;
            uint4 eight;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(eight.x), "=r"(eight.y), "=r"(eight.z), "=r"(eight.w)
                         : "r"(q_tile + chunk / 8 * HALF_BYTES + to * 128 + (chunk % 8 ^ to % 8) * 16)
                         : "memory");
            if (to < tile.rows) {
                const int64_t out = int64_t(tile.token + to) * params.query_heads + tile.head;
                reinterpret_cast<uint4*>(params.out)[out * (HEAD / 8) + chunk] = eight;
            }
        }
        // The next queries are copied to where these rows were.
        fence_proxy();
        __syncwarp();
        release(shared.empty_q);
    }

    __device__ __forceinline__ void run() {
        const int32_t row = number * 64 + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        turn = 0;
        // The other consumer lets the first begin.
        if (number == 1) barrier_arrive(1);
        for (uint32_t round = 0;; ++round) {
            wait(shared.full_q, round % 2);
            Tile tile = shared.tile;
            tile.blocks = uniform(tile.blocks);
            if (tile.head < 0) return;
            highest[0] = highest[1] = -INFINITY;
            total[0] = total[1] = 0.0f;
#pragma unroll
            for (int32_t n = 0; n < 64; ++n) sums[n] = 0.0f;
            if (tile.blocks > 0) attend(tile, row);
            store(tile, row);
        }
    }
};

// As many blocks as fit the GPU. Dynamic shared memory: five tiles, and 1 KB to align them.
extern "C" __global__ void __launch_bounds__(THREADS, 1) attention(__grid_constant__ const Params params) {
    extern __shared__ uint8_t dynamic[];
    __shared__ Shared shared;
    const uint32_t q_tile = (shared_address(dynamic) + 1023) / 1024 * 1024;
    const uint32_t k_tiles = q_tile + TILE_BYTES, v_tiles = k_tiles + STAGES * TILE_BYTES;
    if (threadIdx.x == 0) {
        init(shared.full_q, 1);
        init(shared.empty_q, CONSUMER_WARPS);
        for (int32_t stage = 0; stage < STAGES; ++stage) {
            init(shared.full_k[stage], 1);
            init(shared.empty_k[stage], CONSUMER_WARPS);
            init(shared.full_v[stage], 1);
            init(shared.empty_v[stage], CONSUMER_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) Producer{params, shared, q_tile, k_tiles, v_tiles}.run();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        Consumer{params, shared, q_tile, k_tiles, v_tiles, int32_t(threadIdx.x / 128) - 1}.run();
    }
}
