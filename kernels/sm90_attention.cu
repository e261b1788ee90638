// Causal prefill attention on Hopper: FlashAttention-3 (Shah et al., arXiv 2407.08608) over ragged batches,
// with queries at explicit positions and scores in the same launch. What it computes is what the portable
// form in attention.cu computes.
//
// Two warpgroups have 64 queries each and multiply; one warp fills rings of two tiles of queries, two of keys and two
// of values by the copy engine. A warpgroup asks for the products of its next keys, then for those of its last
// probabilities with their values, and does the softmax of the first while the second go on; meanwhile the
// other warpgroup has the tensor cores, since the two take turns.
//
// Keys go by from the last that a row sees down to the first; those that every row of a warpgroup sees
// come without a mask. Keys may lie in pages: then each lane of the copying warp asks for what is in one page.

#include "abi.h"
#include "attention/mask.cuh"
#include "attention/score.cuh"
#include "attention/softmax.cuh"
#include "attention/work.cuh"
#include "batch.cuh"
#include "primitives/convert.cuh"
#include "primitives/global.cuh"
#include "primitives/ldmatrix.cuh"
#include "primitives/registers.cuh"
#include "primitives/shared.cuh"
#include "primitives/tma.cuh"
#include "primitives/wgmma.cuh"

#include <cfloat>

static_assert(sizeof(fastkv_sm90_attention_params) == 768, "src/abi.rs was generated for another layout");

namespace {

// Queries of a tile, and keys of one.
constexpr int32_t ROWS = FASTKV_SM90_ATTENTION_ROWS;
constexpr int32_t GROUP_ROWS = 64; // of a warpgroup
constexpr int32_t GROUPS = ROWS / GROUP_ROWS;
constexpr int32_t GROUP_THREADS = 128;
constexpr int32_t CONSUMERS = GROUPS * GROUP_THREADS;
constexpr int32_t THREADS = CONSUMERS + GROUP_THREADS;
static_assert(THREADS == FASTKV_SM90_ATTENTION_THREADS, "the driver starts as many");
constexpr int32_t STAGES = 2;

// Tiles as they lie in shared memory: 64 columns of all rows, then the next 64.
constexpr uint32_t HALF_BYTES = ROWS * 128;
template <int d>
constexpr uint32_t TILE_BYTES = d / 64 * HALF_BYTES;

// Where a chunk of 16 bytes of a row lies in a tile.
__device__ __forceinline__ uint32_t chunk_offset(int32_t row, int32_t chunk) {
    return chunk / 8 * HALF_BYTES + row * 128 + (chunk % 8 ^ row % 8) * 16;
}

// The kernel's parameters, where the copy engine can read the maps.
struct alignas(64) Params {
    fastkv_sm90_attention_params of;
};

// What consumers have to know of an item.
struct Item {
    int32_t number;
    QueryTile tile; // and what belongs to it, where it is one:
    Span queries;
    Span keys;
    int32_t blocks;         // tiles of keys that any row sees
    int32_t all_see[GROUPS]; // of these, the first so many are seen by every row of a warpgroup
    float bias;             // of biased keys, before products are scaled; 0 for none
    bool lacks_page;        // whether a key that any row sees has no page
};

// How far the pages of the last sequence were looked at, and the first key that was found without one.
struct Looked {
    int32_t sequence;
    int32_t keys;
    int32_t absent;
};

// Items and their queries have a ring as well: while one is at work, the next arrives.
struct Shared {
    uint64_t full_q[STAGES], empty_q[STAGES];
    uint64_t full_k[STAGES], empty_k[STAGES];
    uint64_t full_v[STAGES], empty_v[STAGES];
    uint64_t landed; // values that the producer has to do with
    uint32_t landings;
    Item items[STAGES];
    Work work;
    Looked looked; // for the producer
    int32_t next;  // score item
};

// The parts of dynamic shared memory.
template <int d>
struct Tiles {
    uint32_t first;

    __device__ __forceinline__ uint32_t q(uint32_t round) const { return first + round % STAGES * TILE_BYTES<d>; }

    __device__ __forceinline__ uint32_t k(uint32_t turn) const {
        return first + (STAGES + turn % STAGES) * TILE_BYTES<d>;
    }

    __device__ __forceinline__ uint32_t v(uint32_t turn) const {
        return first + (2 * STAGES + turn % STAGES) * TILE_BYTES<d>;
    }
};

// Where the rings stand, in what a consumer needs of it: additions and no more from tile to tile.
struct Ring {
    uint32_t stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        parity ^= stage;
        stage ^= 1;
    }
};
static_assert(STAGES == 2, "the other stage is the next");

// The same number in all lanes, known to be so.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(~0u, x, 0); }

// The bias of an item, where its head has one.
struct Bias {
    float value;
    const uint32_t* words;
    int32_t keys;

    // The bits of a tile of keys.
    __device__ __forceinline__ void load(uint32_t (&bits)[ROWS / 32], int32_t block) const {
#pragma unroll
        for (int i = 0; i < ROWS / 32; ++i) {
            bits[i] = biased_keys(words, block * ROWS + 32 * i, keys);
        }
    }
};

// Which keys of a tile are not like others.
enum class Marks { NONE, BIASED, ABSENT };

// What stands before this stays there. ptxas takes arithmetic past a wait for products that it does not need, and the
// softmax would begin when the products beside which it is to run are done; past a branch it takes nothing. `never` is
// false, by something that stands before and that ptxas cannot know.
__device__ __forceinline__ void stay_before(bool never) {
    if (__any_sync(~0u, never)) {
        asm volatile("nanosleep.u32 1;");
    }
}

// -- The producer: one warp, which fills the rings.

template <int d>
struct Producer {
    const Params& params;
    Shared& shared;
    Tiles<d> tiles;
    // Tiles of keys so far: where the rings stand.
    uint32_t turn = 0;

    __device__ __forceinline__ const fastkv_prefill_attention_params& p() const { return params.of.attention; }

    static __device__ __forceinline__ bool leads() { return threadIdx.x % 32 == 0; }

    // Whether any of a sequence's first `keys` keys has no page. For the whole warp.
    __device__ __forceinline__ bool lacks_page(int32_t sequence, int32_t keys) const {
        Looked& looked = shared.looked;
        const bool known = looked.sequence == sequence && looked.keys >= keys;
        __syncwarp();
        if (!known) {
            const int32_t absent = first_absent(p().pages, sequence, keys, threadIdx.x % 32, 32);
            const int32_t first = __reduce_min_sync(~0u, absent);
            if (leads()) {
                looked = {sequence, keys, first};
            }
            __syncwarp();
        }
        return looked.absent < keys;
    }

    // Finds out what an item is. For the whole warp.
    __device__ __forceinline__ Item find(int32_t number) const {
        Item item = {number};
        if (number >= shared.work.tile_items) {
            return item;
        }
        item.tile = query_tile(p(), shared.work, ROWS, number);
        item.queries = query_axis(p()).span(item.tile.tile.sequence);
        item.keys = key_axis(p()).span(item.tile.tile.sequence);
        item.keys.row = 0; // nobody asks for it, and there are no registers for it
        int32_t most = -1;
#pragma unroll
        for (int32_t group = 0; group < GROUPS; ++group) {
            int32_t least = INT32_MAX;
            for (int32_t i = 0; i < GROUP_ROWS; i += 32) {
                const int32_t row = item.tile.tile.index * ROWS + group * GROUP_ROWS + i + threadIdx.x % 32;
                if (row < item.queries.tokens) {
                    const int32_t last = last_key(p(), item.queries, item.keys, row);
                    least = min(least, last);
                    most = max(most, last);
                }
            }
            // Rows past the last query see everything.
            item.all_see[group] = (min(__reduce_min_sync(~0u, least), INT32_MAX - 1) + 1) / ROWS;
        }
        most = __reduce_max_sync(~0u, most);
        item.blocks = (most + ROWS) / ROWS;
        item.lacks_page = p().pages.table && lacks_page(item.tile.tile.sequence, most + 1);
        item.bias = is_biased(p(), item.tile.head) ? __fdividef(p().bias, p().scale) : 0.0f;
        return item;
    }

    // A tile of a tensor whose sequences lie apart, or are packed along the token axis.
    __device__ __forceinline__ void load(uint32_t to, const fastkv_tensor_map& map, uint64_t cu_seqlens,
                                         const Item& item, int32_t token, int32_t head, uint64_t& full) const {
        if (leads()) {
            mbarrier_arrive_expecting(full, TILE_BYTES<d>);
            copy_tile(to, &map, {0, token, 0, head, cu_seqlens ? 0 : item.tile.tile.sequence}, full);
        }
    }

    // Where keys lie in pages, the page of this lane's part of a tile, below 0 where it has none.
    template <bool paged>
    __device__ __forceinline__ int32_t page(const Item& item, int32_t block) const {
        if (!paged) {
            return 0;
        }
        const int32_t row = threadIdx.x % 32 * min(p().pages.page_size, ROWS);
        const int32_t key = block * ROWS + row;
        const bool is_key = block >= 0 && row < ROWS && key < item.keys.tokens;
        return is_key ? page_of(p().pages, item.tile.tile.sequence, key) : -1;
    }

    // A tile of keys or values. Where they lie in pages each lane asks for its part: what is in one page, which is
    // zeros where there is none.
    template <bool paged>
    __device__ __forceinline__ void load_tokens(uint32_t to, const fastkv_tensor_map& map, const Item& item,
                                                int32_t block, int32_t page, int32_t head, uint64_t& full) const {
        if (!paged) {
            load(to, map, p().cu_seqlens_k, item, item.keys.first + block * ROWS, head, full);
            return;
        }
        if (leads()) {
            mbarrier_arrive_expecting(full, TILE_BYTES<d>);
        }
        __syncwarp();
        const int32_t row = threadIdx.x % 32 * min(p().pages.page_size, ROWS);
        if (row < ROWS) {
            const int32_t slot = (block * ROWS + row) % p().pages.page_size;
#pragma unroll
            for (int32_t half = 0; half < d / 64; ++half) {
                copy_tile(to + half * HALF_BYTES + row * 128, &map, {0, slot, half, head, page}, full);
            }
        }
    }

    template <bool paged>
    __device__ __forceinline__ void load_keys(const Item& item, uint32_t turn, int32_t block, int32_t page,
                                              int32_t head) const {
        const uint32_t stage = turn % STAGES;
        mbarrier_wait(shared.empty_k[stage], ~turn / STAGES % 2);
        load_tokens<paged>(tiles.k(turn), params.of.k, item, block, page, head, shared.full_k[stage]);
    }

    template <bool paged>
    __device__ __forceinline__ void load_values(const Item& item, uint32_t turn, int32_t block, int32_t page,
                                                int32_t head) const {
        const uint32_t stage = turn % STAGES;
        mbarrier_wait(shared.empty_v[stage], ~turn / STAGES % 2);
        const int32_t rows = item.keys.tokens - block * ROWS;
        // Behind the end of a tensor the copy engine puts zeros itself.
        const bool clears = rows < ROWS && (paged || p().cu_seqlens_k || p().k_lengths);
        uint64_t& full = shared.full_v[stage];
        load_tokens<paged>(tiles.v(turn), params.of.v, item, block, page, head, clears ? shared.landed : full);
        if (clears) {
            clear_behind(tiles.v(turn), rows);
            if (leads()) {
                mbarrier_arrive(full);
            }
        }
    }

    // Waits for a tile of values that only has so many rows of its sequence, and puts zeros behind them. There may be the
    // next sequence, or what nobody has written: probabilities are 0 there, but 0 times what is not finite is not.
    __device__ __forceinline__ void clear_behind(uint32_t values, int32_t rows) const {
        mbarrier_wait(shared.landed, shared.landings % 2);
        for (int32_t i = threadIdx.x % 32; i < (ROWS - rows) * (d / 8); i += 32) {
            clear_shared_vector(values + chunk_offset(rows + i / (d / 8), i % (d / 8)));
        }
        fence_proxy();
        __syncwarp();
        if (leads()) {
            ++shared.landings;
        }
        __syncwarp();
    }

    // All tiles of an item, in the order of their use: values come one behind their keys. For the whole warp.
    template <bool paged>
    __device__ __forceinline__ void feed(const Item& item, uint32_t round, int32_t& next) {
        const int32_t kv_head = item.tile.head / (p().query_heads / p().kv_heads);
        int32_t block = item.blocks - 1;
        int32_t of_keys = page<paged>(item, block);
        if (block >= 0) {
            load_keys<paged>(item, turn, block, of_keys, kv_head);
        }
        const uint32_t slot = round % STAGES;
        mbarrier_wait(shared.empty_q[slot], ~round / STAGES % 2);
        if (leads()) {
            shared.items[slot] = item;
        }
        if (block >= 0) {
            load(tiles.q(round), params.of.q, p().cu_seqlens_q, item,
                 item.queries.first + item.tile.tile.index * ROWS, item.tile.head, shared.full_q[slot]);
        } else if (leads()) {
            mbarrier_arrive(shared.full_q[slot]);
        }
        // Asked for now, the next item is known once this one is fed.
        next = leads() ? take_item(p()) : 0;
#pragma unroll 1
        for (; block > 0; --block, ++turn) {
            const int32_t of_values = of_keys;
            of_keys = page<paged>(item, block - 1);
            load_keys<paged>(item, turn + 1, block - 1, of_keys, kv_head);
            load_values<paged>(item, turn, block, of_values, kv_head);
        }
        if (block == 0) {
            load_values<paged>(item, turn++, 0, of_keys, kv_head);
        }
    }

    __device__ __forceinline__ void run() {
        int32_t next = leads() ? take_item(p()) : 0;
#pragma unroll 1
        for (uint32_t round = 0;; ++round) {
            const Item item = find(__shfl_sync(~0u, next, 0));
            if (item.number >= shared.work.tile_items) {
                if (leads()) {
                    const uint32_t slot = round % STAGES;
                    mbarrier_wait(shared.empty_q[slot], ~round / STAGES % 2);
                    shared.items[slot].number = item.number;
                    mbarrier_arrive(shared.full_q[slot]);
                }
                return;
            }
            if (p().pages.table) {
                feed<true>(item, round, next);
            } else {
                feed<false>(item, round, next);
            }
            __syncwarp();
        }
    }
};

// -- A consumer: a warpgroup with half of the queries.

template <typename T, int d>
struct Consumer {
    // Column blocks of the logits and of the output.
    static constexpr int S = ROWS / 8;
    static constexpr int O = d / 8;

    const fastkv_prefill_attention_params& p;
    Shared& shared;
    Tiles<d> tiles;
    int32_t group;
    Ring ring; // the present tile of keys
    // Descriptors of the queries, of the present keys, and of the last tile's values. Those of the other stage
    // are what is left of the sum of both.
    Matrix queries, keys, values;

    Softmax softmax;
    float s[S][4];
    float out[O][4];
    uint32_t weights[S / 2][4]; // probabilities of the last tile of keys
    int32_t last[2];            // keys that this thread's two rows see
    float shrink[2];

    __device__ __forceinline__ Consumer(const fastkv_prefill_attention_params& p, Shared& shared, Tiles<d> tiles,
                                        int32_t group)
        : p(p), shared(shared), tiles(tiles), group(group), queries(queries_at(0)),
          keys(keys_at(0)), values(values_at(0)) {}

    // The thread's first row of a tile; the other is 8 further down.
    __device__ __forceinline__ int32_t row() const {
        return group * GROUP_ROWS + threadIdx.x % GROUP_THREADS / 32 * 16 + threadIdx.x % 32 / 4;
    }

    __device__ __forceinline__ void meet() const { barrier_sync<GROUP_THREADS>(1 + GROUPS + group); }

    // This warp is done with a tile.
    __device__ __forceinline__ void release(uint64_t& empty) const {
        if (threadIdx.x % 32 == 0) {
            mbarrier_arrive(empty);
        }
    }

    __device__ __forceinline__ Matrix queries_at(uint32_t round) const {
        return Matrix(uniform(tiles.q(round) + group * GROUP_ROWS * 128));
    }
    __device__ __forceinline__ Matrix keys_at(uint32_t stage) const { return Matrix(tiles.k(stage)); }
    __device__ __forceinline__ Matrix values_at(uint32_t stage) const { return Matrix(tiles.v(stage), HALF_BYTES); }

    __device__ __forceinline__ void multiply_keys() {
        products_fence();
#pragma unroll
        for (int step = 0; step < d / 16; ++step) {
            const uint32_t at = step / 4 * HALF_BYTES + step % 4 * 32;
            multiply_rows<T>(s, queries.plus(at), keys.plus(at), step > 0);
        }
        products_commit();
    }

    __device__ __forceinline__ void multiply_values() {
        products_fence();
#pragma unroll
        for (int step = 0; step < ROWS / 16; ++step) {
            multiply_columns<T>(out, weights[step], values.plus(step * 16 * 128));
        }
        products_commit();
    }

    __device__ __forceinline__ void pack_weights() {
#pragma unroll
        for (int step = 0; step < S / 2; ++step) {
            const float(&left)[4] = s[2 * step];
            const float(&right)[4] = s[2 * step + 1];
            weights[step][0] = pack<T>(left[0], left[1]);
            weights[step][1] = pack<T>(left[2], left[3]);
            weights[step][2] = pack<T>(right[0], right[1]);
            weights[step][3] = pack<T>(right[2], right[3]);
        }
    }

    // The softmax of the logits of a tile.
    template <bool masked>
    __device__ __forceinline__ void update(int32_t block) {
        if (masked) {
            hide(s, last[0] - block * ROWS, last[1] - block * ROWS);
        }
        softmax.update(s, p.scale * LOG2_E, shrink);
    }

    // After the softmax of a tile: its probabilities, and what they do to the output so far.
    __device__ __forceinline__ void finish_tile() {
        pack_weights();
#pragma unroll
        for (int j = 0; j < O; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                out[j][i] *= shrink[i / 2];
            }
        }
    }

    // What becomes of the logits of keys that are biased, given their bits, or have no page. Where some have none the bias
    // is loaded now, if there is one: such tiles are few.
    template <Marks marks>
    __device__ __forceinline__ void mark(int32_t block, int32_t sequence, const Bias& bias,
                                         uint32_t (&words)[ROWS / 32]) {
        if (marks == Marks::BIASED) {
            add_bias(s, words, bias.value);
        }
        if (marks == Marks::ABSENT) {
            if (bias.value != 0.0f) {
                bias.load(words, block);
                add_bias(s, words, bias.value);
            }
#pragma unroll
            for (int i = 0; i < ROWS / 32; ++i) {
                const int32_t key = block * ROWS + 32 * i + threadIdx.x % 32;
                words[i] = __ballot_sync(~0u, key < bias.keys && page_of(p.pages, sequence, key) < 0);
            }
            hide_absent(s, words);
        }
    }

    // Logits of one tile of keys while the values of the tile before are multiplied.
    template <bool masked, Marks marks>
    __device__ __forceinline__ void step(int32_t block, int32_t sequence, const Bias& bias) {
        uint32_t words[ROWS / 32];
        if (marks == Marks::BIASED) {
            bias.load(words, block);
        }
        const Ring before = ring;
        ring.advance();
        keys.low = keys_at(0).low + keys_at(1).low - keys.low;
        mbarrier_wait(shared.full_k[ring.stage], ring.parity);
        barrier_sync<CONSUMERS>(1 + group);
        multiply_keys();
        mbarrier_wait(shared.full_v[before.stage], before.parity);
        multiply_values();
        barrier_arrive<CONSUMERS>(1 + (group ^ 1));
        products_wait<1>(s);
        release(shared.empty_k[ring.stage]);
        stay_before(s[0][0] > FLT_MAX);
        mark<marks>(block, sequence, bias, words);
        update<masked>(block);
        stay_before(softmax.sum[0] + softmax.sum[1] < 0.0f);
        products_wait<0>(out);
        release(shared.empty_v[before.stage]);
        values.low = values_at(0).low + values_at(1).low - values.low;
        finish_tile();
    }

    template <Marks marks>
    __device__ __forceinline__ void attend(const Item& item) {
        int32_t block = int32_t(uniform(item.blocks)) - 1;
        const int32_t all_see = uniform(item.all_see[group]);
        const int32_t sequence = item.tile.tile.sequence;
        const Bias bias = {item.bias, bias_words(p, sequence), item.keys.tokens};
        uint32_t words[ROWS / 32];
        if (marks == Marks::BIASED) {
            bias.load(words, block);
        }
        mbarrier_wait(shared.full_k[ring.stage], ring.parity);
        multiply_keys();
        products_wait<0>(s);
        release(shared.empty_k[ring.stage]);
        mark<marks>(block, sequence, bias, words);
        update<true>(block);
        finish_tile();
#pragma unroll 1
        while (--block >= all_see) {
            step<true, marks>(block, sequence, bias);
        }
#pragma unroll 1
        for (; block >= 0; --block) {
            step<false, marks>(block, sequence, bias);
        }
        mbarrier_wait(shared.full_v[ring.stage], ring.parity);
        multiply_values();
        products_wait<0>(out);
        release(shared.empty_v[ring.stage]);
        ring.advance();
        keys.low = keys_at(ring.stage).low;
        values.low = values_at(ring.stage).low;
    }

    // Whether an element of one of the thread's rows is not finite.
    __device__ __forceinline__ bool is_suspect(int half) const {
        float probe = 0.0f;
#pragma unroll
        for (int j = 0; j < O; ++j) {
            probe = fmaf(out[j][2 * half], 0.0f, fmaf(out[j][2 * half + 1], 0.0f, probe));
        }
        return probe != 0.0f;
    }

    // A key that a row does not see has a probability of 0 there, and 0 times a value that is not finite is not 0.
    // What such values made of the elements of a row is computed anew from the keys that it sees: slowly, but such
    // rows are few. They have been stored by this warp.
    template <int half>
    __device__ __forceinline__ void mend(const Item& item, bool suspect) const {
        if (!__any_sync(~0u, suspect)) {
            return;
        }
        const int32_t own = item.tile.tile.index * ROWS + row() + 8 * half;
        const int32_t seen = last[half];
        const int32_t kv_head = item.tile.head / (p.query_heads / p.kv_heads);
        const int32_t sequence = item.tile.tile.sequence;
        const int32_t end = min(item.blocks * ROWS, item.keys.tokens);
        // Each thread of a row has every fourth pair of elements.
        const auto pair = [&](uint64_t of_row, int j) {
            return __ldg(reinterpret_cast<const uint32_t*>(of_row + 16 * j) + threadIdx.x % 4);
        };
        bool met = false;
#pragma unroll 1
        for (int32_t key = min(seen, end) + 1; suspect && key < end; ++key) {
            const uint64_t value = token_address(p.v, p.pages, item.keys.first, sequence, kv_head, key);
#pragma unroll 1
            for (int j = 0; value && j < O; ++j) {
                met = met || !finite<T>(pair(value, j)) || !finite<T>(pair(value, j) >> 16);
            }
        }
        const bool anew = __ballot_sync(~0u, met) >> (threadIdx.x % 32 / 4 * 4) & 15;
        const int32_t most = __reduce_max_sync(~0u, anew ? seen : -1);
        const float factor = p.scale * LOG2_E;
        const float maximum = softmax.maximum[half];
        float normalize, lse;
        softmax.finish(half, p.scale, normalize, lse);
        const uint64_t query =
            row_address(p.q, sequence, item.tile.head, item.queries.first + (anew ? own : 0));
        float sums[O][2] = {};
#pragma unroll 1
        for (int32_t key = 0; key <= most; ++key) {
            const uint64_t of_key = token_address(p.k, p.pages, item.keys.first, sequence, kv_head, key);
            if (!of_key) {
                continue;
            }
            float product = 0.0f;
#pragma unroll 1
            for (int j = 0; j < O; ++j) {
                const uint32_t a = pair(query, j);
                const uint32_t b = pair(of_key, j);
                product = fmaf(widen<T>(a), widen<T>(b), product);
                product = fmaf(widen<T>(a >> 16), widen<T>(b >> 16), product);
            }
            product = quad_reduce(product, [](float x, float y) { return x + y; });
            if (item.bias != 0.0f) {
                const uint32_t biased = biased_keys(bias_words(p, sequence), key / 32 * 32, item.keys.tokens);
                product += biased >> (key % 32) & 1 ? item.bias : 0.0f;
            }
            if (anew && key <= seen) {
                const float weight = exp2_approx((product - maximum) * factor);
                const uint64_t value = token_address(p.v, p.pages, item.keys.first, sequence, kv_head, key);
#pragma unroll
                for (int j = 0; j < O; ++j) {
                    const uint32_t two = pair(value, j);
                    sums[j][0] = fmaf(weight, widen<T>(two), sums[j][0]);
                    sums[j][1] = fmaf(weight, widen<T>(two >> 16), sums[j][1]);
                }
            }
        }
        if (anew) {
            const uint64_t to = row_address(p.out, sequence, item.tile.head, item.queries.first + own);
#pragma unroll
            for (int j = 0; j < O; ++j) {
                uint16_t* two = reinterpret_cast<uint16_t*>(to + 16 * j) + threadIdx.x % 4 * 2;
                const uint32_t better = pack<T>(sums[j][0] * normalize, sums[j][1] * normalize);
                two[0] = finite<T>(two[0]) ? two[0] : uint16_t(better);
                two[1] = finite<T>(two[1]) ? two[1] : uint16_t(better >> 16);
            }
        }
    }

    // Output and LSE. The output goes by way of the warp's own queries in shared memory, in the item's tile there, so
    // that it leaves in whole rows.
    __device__ __forceinline__ void store_rows(const Item& item, uint32_t shared_tile) {
        const int32_t lane = threadIdx.x % 32;
        const int32_t left = item.queries.tokens - item.tile.tile.index * ROWS; // rows of the tile
        float normalize[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float lse;
            softmax.finish(half, p.scale, normalize[half], lse);
            const int32_t own = row() + 8 * half;
            if (p.lse.base && lane % 4 == 0 && own < left) {
                const Tile tile = item.tile.tile;
                const int32_t query = tile.index * ROWS + own;
                store_lse(p.lse, lse_place(p.lse, tile.sequence, item.queries.row, item.tile.head, query), lse);
            }
        }
        const int32_t first = row() - lane / 4;
#pragma unroll
        for (int j = 0; j < O; j += 2) {
            const uint32_t words[4] = {
                pack<T>(out[j][0] * normalize[0], out[j][1] * normalize[0]),
                pack<T>(out[j][2] * normalize[1], out[j][3] * normalize[1]),
                pack<T>(out[j + 1][0] * normalize[0], out[j + 1][1] * normalize[0]),
                pack<T>(out[j + 1][2] * normalize[1], out[j + 1][3] * normalize[1]),
            };
            stmatrix(shared_tile + chunk_offset(first + lane % 16, j + lane / 16), words);
        }
        __syncwarp();
        const uint64_t to = row_address(p.out, item.tile.tile.sequence, item.tile.head,
                                        item.queries.first + item.tile.tile.index * ROWS);
#pragma unroll
        for (int32_t index = lane; index < 16 * O; index += 32) {
            const int32_t own = first + index / O;
            if (own < left) {
                store(to + 2 * own * p.out.token_stride + index % O * 16,
                      load_shared_vector(shared_tile + chunk_offset(own, index % O)));
            }
        }
        // The queries after the next are copied to where these rows were.
        fence_proxy();
        __syncwarp();
    }

    // Returns the first item that is no tile of queries.
    __device__ __forceinline__ int32_t run() {
        // The second lets the first begin.
        if (group == 1) {
            barrier_arrive<CONSUMERS>(1);
        }
#pragma unroll 1
        for (uint32_t round = 0;; ++round) {
            const uint32_t slot = round % STAGES;
            mbarrier_wait(shared.full_q[slot], round / STAGES % 2);
            const Item& item = shared.items[slot];
            if (item.number >= shared.work.tile_items) {
                return item.number;
            }
            queries = queries_at(slot);
            softmax = {};
#pragma unroll
            for (int j = 0; j < O; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    out[j][i] = 0.0f;
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int32_t own = item.tile.tile.index * ROWS + row() + 8 * half;
                last[half] = own < item.queries.tokens ? last_key(p, item.queries, item.keys, own) : INT32_MAX;
            }
            if (uniform(item.blocks) > 0) {
                if (uniform(item.lacks_page)) {
                    attend<Marks::ABSENT>(item);
                } else if (uniform(item.bias != 0.0f)) {
                    attend<Marks::BIASED>(item);
                } else {
                    attend<Marks::NONE>(item);
                }
            }
            const bool suspect[2] = {is_suspect(0), is_suspect(1)};
            store_rows(item, tiles.q(slot));
            mend<0>(item, suspect[0]);
            mend<1>(item, suspect[1]);
            // Read before the producer may write the next item, which it may once all warps are done here.
            const QueryTile tile = item.tile;
            const int32_t tokens = item.queries.tokens;
            mbarrier_arrive(shared.empty_q[slot]);
            if (p.scores) {
                meet();
                if (threadIdx.x % GROUP_THREADS == 0) {
                    signal_tile(p, tile, tokens, ROWS);
                }
            }
        }
    }
};

template <typename T, int d>
__device__ __forceinline__ void prefill_attention(const Params& params) {
    extern __shared__ uint8_t dynamic[];
    __shared__ Shared shared;
    const fastkv_prefill_attention_params& p = params.of.attention;
    const Tiles<d> tiles = {(shared_address(dynamic) + 1023) / 1024 * 1024};
    if (threadIdx.x == 0) {
        for (int32_t stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(shared.full_q[stage], 1);
            // Every thread that reads the item says so itself.
            mbarrier_init(shared.empty_q[stage], CONSUMERS);
            mbarrier_init(shared.full_k[stage], 1);
            mbarrier_init(shared.empty_k[stage], CONSUMERS / 32);
            mbarrier_init(shared.full_v[stage], 1);
            mbarrier_init(shared.empty_v[stage], CONSUMERS / 32);
        }
        mbarrier_init(shared.landed, 1);
        mbarrier_init_fence();
        shared.landings = 0;
        shared.looked = {-1, 0, 0};
    }
    if (threadIdx.x < 32) {
        shared.work.count(p, ROWS);
    }
    __syncthreads();
    if (threadIdx.x >= CONSUMERS) {
        give_registers<40>();
        if (threadIdx.x < CONSUMERS + 32) {
            Producer<d>{params, shared, tiles}.run();
        }
        return;
    }
    take_registers<232>();
    int32_t number = Consumer<T, d>(p, shared, tiles, int32_t(uniform(threadIdx.x / GROUP_THREADS))).run();
    // The producer is gone; what is left of the block scores keys, once both warpgroups are done with their tiles.
    __syncthreads();
    while (number < shared.work.items) {
        const ScoreItem item = score_item(p, number - shared.work.tile_items);
        // Asked for now, the next item is known once this one is scored.
        const int32_t next = threadIdx.x == 0 ? take_item(p) : 0;
        score<T, d, true, CONSUMERS / 32, ROWS, GROUPS>(p, item, tiles.first);
        if (threadIdx.x == 0) {
            shared.next = next;
        }
        __syncthreads();
        number = shared.next;
    }
}

} // namespace

// Grid: as many blocks as SMs, or fewer. Dynamic shared memory: two tiles of queries, two of keys, two of
// values, and 1 KB to align them.
#define FASTKV_SM90_ATTENTION(name, type, d)                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                               \
        fastkv_sm90_attention_##name##_##d(__grid_constant__ const Params params) {                         \
        prefill_attention<type, d>(params);                                                                 \
    }

FASTKV_SM90_ATTENTION(f16, F16, 64)
FASTKV_SM90_ATTENTION(f16, F16, 128)
FASTKV_SM90_ATTENTION(bf16, BF16, 64)
FASTKV_SM90_ATTENTION(bf16, BF16, 128)
