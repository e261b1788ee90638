//! Decoding.

use crate::support::{
    decode::{Case, check},
    emulator::Emulator,
    recorder::{Recorded, Recorder},
};
use fastkv::{
    abi::{Cache, DecodeParams, Pages, Rows},
    kernels::{
        DType, Kernel,
        batch::{Bias, Lse},
        decode::{Decode, MAX_TOKENS, decode, decode_counters, decode_workspace},
        images,
    },
};
use proptest::prelude::*;
use ptx_emulator::Schedule;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Chunks, query tiles and scratch memory for every shape there is.
    #[test]
    fn splits_and_workspaces(
        sequences in 1_i32..300, heads in 1_i32..64, group in 1_u32..=16, tokens in 1_u32..=8,
        capacity in prop_oneof![0_i32..200, 0..1 << 30], head_dim in prop::sample::select(vec![64_u32, 96, 128, 256]),
    ) {
        let case = step();
        let cache = Cache { sequences, heads, capacity, ..case.cache };
        let work = Decode { cache, query_heads: heads as u32 * group, tokens, head_dim, ..case };
        let bytes = decode_workspace(&work).unwrap() as u64;
        let blocks = (capacity as u64 + u64::from(tokens)).div_ceil(64);
        let rows = u64::from(group * tokens);
        let padded = if rows <= 8 { 8 } else { rows.next_multiple_of(16) };
        let lists = sequences as u64 * heads as u64;
        let chunks = if blocks == 1 { 0 } else { blocks.min(64) };
        let least = lists * padded * chunks * (u64::from(head_dim) + 2) * 4;
        prop_assert!(bytes.is_multiple_of(256) && bytes > least);
        prop_assert!(bytes <= least + 4 * lists * padded.div_ceil(8) + 4 * 256);
        let without_counters = decode_workspace(&Decode { counters: 4096, ..work }).unwrap() as u64;
        let counters = 4 * decode_counters(&work).unwrap() as u64;
        prop_assert_eq!(without_counters, bytes - counters.next_multiple_of(256));
    }
}

#[test]
fn fills_its_params() {
    let (launch, params) = launched(&step());
    // Three blocks of 72.25 KiB do not fit the 164 KiB of compute capability 8.0, two do.
    assert_eq!(
        (launch.kernel, launch.grid, launch.block),
        (Kernel::DecodeBf16D128Q8, [216, 1, 1], [128, 1, 1])
    );
    let workspace = 1 << 55;
    let expected = DecodeParams {
        cache: step().cache,
        q: step().q,
        k_new: step().k_new,
        v_new: step().v_new,
        out: step().out,
        positions_new: 4096,
        full: 1 << 17,
        finished: workspace,
        statistics: workspace + 256,
        partials: workspace + 256 + 16 * 64 * 8 * 8,
        scale: 0.125,
        bias_positions: 100,
        group: 4,
        tokens: 1,
        query_tiles: 1,
        queries: 8,
        chunks: 64,
        ..DecodeParams::default()
    };
    assert_eq!(params, expected);
}

/// A launch with counters of its own is nothing but the kernel: no memset before it.
#[test]
fn counters_of_the_caller_are_not_cleared() {
    let fills = |counters| {
        let recorder = Recorder::default();
        // SAFETY: the recorder touches no memory.
        unsafe { decode(&recorder, &Decode { counters, ..step() }) }.unwrap();
        let params: DecodeParams = bytemuck::pod_read_unaligned(&recorder.last().params);
        (recorder.fills(), params.finished)
    };
    assert_eq!(fills(0), (vec![(1 << 55, 4 * 17)], 1 << 55));
    assert_eq!(fills(1 << 18), (vec![], 1 << 18));
    assert_eq!(decode_counters(&step()).unwrap(), 17);
}

/// Counters of the caller leave the workspace to what chunks leave, which is nothing where a list is one of them.
#[test]
fn a_list_of_one_chunk_needs_no_workspace() {
    let bytes = |work: Decode| decode_workspace(&work).unwrap();
    let counters = 1 << 18;
    assert_eq!((bytes(step()), bytes(Decode { counters, ..step() })), (4_260_096, 4_259_840));
    let short = Decode { cache: Cache { capacity: 63, ..step().cache }, ..step() };
    assert_eq!((bytes(short), bytes(Decode { counters, ..short })), (256, 0));
    launched(&Decode { counters, workspace: 0, ..short });
    let message = "workspace is 0x0; it must be a device address, a multiple of 256";
    Recorder::refuses(decode, short, |work| work.workspace = 0, message);
}

#[test]
fn every_shape_has_its_kernel() {
    let kernel = |dtype, head_dim, query_heads, tokens| {
        let case = step();
        let rows = |base, heads| Rows::head_major(base, heads, tokens, head_dim);
        let (launch, params) = launched(&Decode {
            q: rows(case.q.base, query_heads),
            out: rows(case.out.base, query_heads),
            k_new: rows(case.k_new.base, 8),
            v_new: rows(case.v_new.base, 8),
            cache: Cache {
                k: Rows { token_stride: head_dim.into(), ..case.cache.k },
                v: Rows { token_stride: head_dim.into(), ..case.cache.v },
                ..case.cache
            },
            dtype,
            head_dim,
            query_heads,
            tokens,
            ..case
        });
        assert_eq!(launch.block, [if head_dim == 256 { 64 } else { 128 }, 1, 1]);
        (launch.kernel, params.group, params.query_tiles, params.queries)
    };
    assert_eq!(kernel(DType::F16, 64, 64, 1), (Kernel::DecodeF16D64Q8, 8, 1, 8));
    assert_eq!(kernel(DType::F16, 96, 72, 1), (Kernel::DecodeF16D96Q16, 9, 1, 16));
    assert_eq!(kernel(DType::BF16, 256, 8, 8), (Kernel::DecodeBf16D256Q8, 1, 1, 8));
    assert_eq!(kernel(DType::BF16, 128, 40, 5), (Kernel::DecodeBf16D128Q16, 5, 2, 16));
    assert_eq!(kernel(DType::F16, 256, 128, 8), (Kernel::DecodeF16D256Q16, 16, 8, 16));
    assert_eq!(kernel(DType::BF16, 64, 16, 4), (Kernel::DecodeBf16D64Q8, 2, 1, 8));
}

/// No more blocks than there can be chunks.
#[test]
fn small_work_has_a_small_grid() {
    let case = step();
    let (launch, params) = launched(&Decode { cache: Cache { capacity: 63, ..case.cache }, ..case });
    assert_eq!((launch.grid, params.chunks), ([16, 1, 1], 1));
    let (launch, params) = launched(&Decode { cache: Cache { capacity: 64, ..case.cache }, ..case });
    assert_eq!((launch.grid, params.chunks), ([32, 1, 1], 2));
}

#[test]
fn nothing_to_decode_launches_nothing() {
    let recorder = Recorder::default();
    for cache in [Cache { sequences: 0, ..step().cache }, Cache { heads: 0, ..step().cache }] {
        for query_heads in [step().query_heads, u32::MAX] {
            let work = Decode { cache, query_heads, tokens: MAX_TOKENS, workspace: 0, ..step() };
            // SAFETY: the recorder touches no memory.
            unsafe { decode(&recorder, &work) }.unwrap();
        }
    }
    assert!(recorder.launches().is_empty());
}

#[test]
fn refuses() {
    let refuses = |change: fn(&mut Decode), message: &str| Recorder::refuses(decode, step(), change, message);
    refuses(|w| w.cache.sequences = -1, "cache.sequences is -1; it must be 0 or more");
    refuses(|w| w.cache.rows = -1, "cache.rows is -1; it must be 0 or more");
    refuses(|w| w.cache.capacity = i32::MAX, "cache.capacity is 2147483647; it must be at most 1073741824");
    refuses(
        |w| (w.cache.sequences, w.cache.heads) = (1 << 16, 1 << 15),
        "cache.sequences * cache.heads is 2147483648; it must be at most 2147483647",
    );
    refuses(
        |w| w.cache.sequences = 1 << 23,
        "cache.sequences * cache.heads is 67108864; it must be at most 33554431",
    );
    refuses(|w| w.query_heads = 30, "query_heads is 30; it must be 1 to 16 times kv_heads = 8");
    refuses(|w| w.query_heads = 136, "query_heads is 136; it must be 1 to 16 times kv_heads = 8");
    refuses(|w| w.tokens = 0, "tokens is 0; it must be from 1 to 8");
    refuses(|w| w.tokens = 9, "tokens is 9; it must be from 1 to 8");
    refuses(|w| w.head_dim = 80, "head_dim is 80; it must be 64, 96, 128 or 256");
    refuses(|w| w.dtype = DType::F32, "dtype is F32; it must be F16 or BF16");
    refuses(|w| w.q.base = 8, "q is 0x8; it must be a device address, a multiple of 16");
    refuses(
        |w| w.k_new.head_stride = 4,
        "k_new.head_stride is 4; it must be 0 or a positive multiple of 8 for BF16 (16 bytes)",
    );
    refuses(|w| w.full = 0, "full is 0x0; it must be a device address, a multiple of 4");
    refuses(
        |w| (w.cache.positions, w.positions_new) = (4096, 0),
        "positions_new is 0x0; it must be a device address, a multiple of 4",
    );
    refuses(
        |w| w.lse = Some(Lse::padded(2, 32, 1)),
        "lse is 0x2; it must be a device address, a multiple of 4",
    );
    refuses(
        |w| w.lse = Some(Lse { sequence_stride: 16, ..Lse::padded(4096, 32, 1) }),
        "lse.sequence_stride is 16; it must be 32 or more: queries must not share a place",
    );
    refuses(|w| w.scale = 0.0, "scale is 0; it must be a positive number below 2^27");
    refuses(|w| w.scale = f32::NAN, "scale is NaN; it must be a positive number below 2^27");
    refuses(
        |w| w.cache.starts = 0,
        "cache.rows is 100000; it must be sequences * heads * capacity = 1600000 or more where starts is absent",
    );
    refuses(|w| w.cache.lengths = 0, "cache.lengths is 0x0; it must be a device address, a multiple of 4");
    refuses(|w| w.cache.starts = 4, "cache.starts is 0x4; it must be a device address, a multiple of 8");
    refuses(
        |w| w.cache.v.token_stride = 64,
        "cache.v.token_stride is 64; it must be 128 or more: rows must not overlap",
    );
    refuses(
        |w| w.cache.rows = i64::MAX,
        "cache.k is 0x10000000000000; it must be 1180591620717411303296 elements of 2 bytes below 2^63",
    );
    refuses(
        |w| w.k_new.base = w.cache.v.base,
        "cache.v is 0x20000000000000..0x2000000186a000; it must be apart from k_new, \
         0x20000000000000..0x20000000001000",
    );
    refuses(
        |w| w.out.base = w.q.base,
        "out is 0x1000000000000..0x1000000004000; it must be apart from q, 0x1000000000000..0x1000000004000",
    );
    refuses(
        |w| w.out.head_stride = 64,
        "out.head_stride is 64; it must be 128 or more: rows must not overlap",
    );
    refuses(
        |w| w.out.sequence_stride = 2048,
        "out.sequence_stride is 2048; it must be 4096 or more: rows must not overlap",
    );
    refuses(
        |w| (w.tokens, w.out.token_stride) = (2, 128),
        "out.token_stride is 128; it must be 4096 or more: rows must not overlap",
    );
    refuses(|w| w.counters = 6, "counters is 0x6; it must be a device address, a multiple of 4");
    refuses(|w| w.workspace = 128, "workspace is 0x80; it must be a device address, a multiple of 256");
    refuses(
        |w| w.workspace_bytes = 4,
        "workspace_bytes is 4; it must be 4260096 or more, as decode_workspace says",
    );
    refuses(
        |w| w.bias = Some(Bias { keys: 0, ..bias() }),
        "bias.keys is 0x0; it must be a device address, a multiple of 4",
    );
    refuses(
        |w| w.bias = Some(Bias { key_stride: 3, ..bias() }),
        "bias.key_stride is 3; it must be 4 or more: a bit for each of 100 keys",
    );
}

#[test]
fn refuses_what_is_not_apart() {
    let refuses = |change: fn(&mut Decode), message: &str| Recorder::refuses(decode, step(), change, message);
    refuses(
        |w| w.lse = Some(Lse::padded(w.out.base, 32, 1)),
        "lse is 0x8000000000000..0x8000000000100; it must be apart from out, \
         0x8000000000000..0x8000000004000",
    );
    refuses(
        |w| (w.lse, w.k_new) = (Some(Lse::padded(w.cache.lengths, 32, 1)), Rows::default()),
        "lse is 0x10000..0x10100; it must be apart from cache.lengths, 0x10000..0x10040",
    );
    refuses(
        |w| w.full = w.q.base,
        "full is 0x1000000000000..0x1000000000004; it must be apart from q, 0x1000000000000..0x1000000004000",
    );
    refuses(
        |w| w.full = w.positions_new,
        "full is 0x1000..0x1004; it must be apart from positions_new, 0x1000..0x1008",
    );
    refuses(
        |w| w.bias = Some(Bias { keys: w.full, ..bias() }),
        "full is 0x20000..0x20004; it must be apart from bias.keys, 0x20000..0x20020",
    );
    refuses(
        |w| w.full = w.cache.lengths,
        "cache.lengths is 0x10000..0x10040; it must be apart from full, 0x10000..0x10004",
    );
    refuses(
        |w| w.cache.lengths = w.cache.starts + 8,
        "cache.lengths is 0x1008..0x1048; it must be apart from cache.starts, 0x1000..0x1080",
    );
    refuses(
        |w| w.cache.positions = w.positions_new,
        "cache.positions is 0x1000..0x62a80; it must be apart from positions_new, 0x1000..0x1008",
    );
    refuses(
        |w| w.counters = w.cache.k.base,
        "counters is 0x10000000000000..0x10000000000044; it must be apart from cache.k, \
         0x10000000000000..0x1000000186a000",
    );
    refuses(
        |w| w.counters = w.workspace + 256,
        "workspace is 0x80000000000000..0x80000000410000; it must be apart from counters, \
         0x80000000000100..0x80000000000144",
    );
    refuses(
        |w| w.workspace = w.cache.v.base,
        "workspace is 0x20000000000000..0x20000000410100; it must be apart from cache.v, \
         0x20000000000000..0x2000000186a000",
    );
    refuses(
        |w| w.workspace = w.out.base,
        "workspace is 0x8000000000000..0x8000000410100; it must be apart from out, \
         0x8000000000000..0x8000000004000",
    );
}

#[test]
fn refuses_pages() {
    let refuses = |change: fn(&mut Cache), message: &str| {
        let work = Decode { cache: paged(), ..step() };
        Recorder::refuses(decode, work, |work| change(&mut work.cache), message);
    };
    launched(&Decode { cache: paged(), ..step() });
    refuses(|c| c.pages.pages = 0, "cache.pages.pages is 0; it must be 1 or more where there are pages");
    refuses(
        |c| c.pages.page_size = -1,
        "cache.pages.page_size is -1; it must be 1 or more where there are pages",
    );
    refuses(
        |c| c.pages.pages = i32::MAX,
        "cache.pages.pages * cache.pages.page_size is 34359738352; it must be at most 2147483647",
    );
    refuses(
        |c| c.capacity = 161,
        "cache.capacity is 161; it must be at most cache.pages.table_pages * cache.pages.page_size = 160",
    );
    refuses(|c| c.starts = 4096, "cache.starts is 0x1000; it must be 0 where the cache is paged");
    refuses(|c| c.capacities = 4096, "cache.capacities is 0x1000; it must be 0 where the cache is paged");
    refuses(
        |c| c.k.head_stride = 64,
        "cache.k.head_stride is 64; it must be 128 or more: rows must not overlap",
    );
    refuses(
        |c| c.v.token_stride = 512,
        "cache.v.token_stride is 512; it must be 1024 or more: rows must not overlap",
    );
    refuses(
        |c| c.v.sequence_stride = 15 * 1024,
        "cache.v.sequence_stride is 15360; it must be 16384 or more: rows must not overlap",
    );
    refuses(|c| c.pages.table = 2, "cache.pages.table is 0x2; it must be a device address, a multiple of 4");
}

/// Rows that are read alone may be the same; axes of one element have no stride, and heads may lie outside tokens.
#[test]
fn strides_that_do_no_harm() {
    let cache = paged();
    let shared = Cache { k: Rows { head_stride: 0, ..cache.k }, ..cache };
    launched(&Decode { cache: shared, k_new: Rows::default(), v_new: Rows::default(), ..step() });
    let rows = |base| Rows::head_major(base, 8, 16, 128);
    launched(&Decode { cache: Cache { k: rows(1 << 52), v: rows(1 << 53), ..cache }, ..step() });
    // A page of one head; K and V take turns.
    let rows = |base| Rows { base, sequence_stride: 2 * 16 * 128, head_stride: 0, token_stride: 128 };
    let (k, v) = (rows(1 << 52), rows((1 << 52) + 2 * 16 * 128));
    let cache = Cache { k, v, sequences: 16, heads: 1, ..cache };
    launched(&Decode { cache, query_heads: 4, out: Rows::token_major(1 << 51, 1, 4, 128), ..step() });
}

/// Rows of keys, values, queries and results lie so that no two lanes of a request want the same bank at
/// once; but rows of 96 elements are 12 vectors, so that a copy by 8 lanes may lie in two of them.
#[test]
#[cfg_attr(not(fastkv_kernels), ignore = "built without nvcc")]
fn shared_memory_has_no_bank_conflicts() {
    assert!(images::built());
    for head_dim in [64, 96, 128, 256] {
        for group in [4, 16] {
            let emulator = Emulator::new(Schedule::Eager, (8, 0));
            check(&emulator, &Case::new(head_dim, group, &[&[400, 1000]])).unwrap();
            let counters = emulator.counters();
            assert!(counters.matrix_products > 500, "{counters:?}");
            let most = if head_dim == 96 { counters.shared_passes / 10 } else { 0 };
            assert!(counters.bank_conflicts <= most, "{head_dim}, {group}: {counters:?}");
        }
    }
}

/// Instructions of PTX for the 16 keys that a warp takes at a time, which are what its time goes by where memory
/// does not decide: the loop holds much that few tiles need, so its length in machine code says little.
#[test]
#[cfg_attr(not(fastkv_kernels), ignore = "built without nvcc")]
fn keys_take_few_instructions() {
    assert!(images::built());
    // Both lists are 64 chunks: what the longer one takes more is keys.
    const KEYS: [usize; 2] = [16_384, 20_480];
    for (group, bar) in [(4, 260), (16, 350)] {
        let [fewer, more] = KEYS.map(|keys| {
            let emulator = Emulator::new(Schedule::Eager, (9, 0));
            check(&emulator, &Case::new(128, group, &[&[keys - 1]])).unwrap();
            emulator.counters().warp_instructions
        });
        let each = (more - fewer) * 16 / (KEYS[1] - KEYS[0]) as u64;
        assert!(each <= bar, "{group} queries: {each} instructions, the bar is {bar}");
    }
}

/// A failure of the device reaches the caller as it is.
#[test]
fn device_errors_pass() {
    // SAFETY: the recorder touches no memory.
    let error = unsafe { decode(&Recorder::failing(), &step()) }.unwrap_err();
    assert!(error.to_string().contains("failed: CUDA error 719 (LAUNCH_FAILED)"), "{error}");
}

/// Launches with a workspace of the right size.
fn launched(work: &Decode) -> (Recorded, DecodeParams) {
    let recorder = Recorder::default();
    let work = Decode { workspace_bytes: decode_workspace(work).unwrap(), ..*work };
    // SAFETY: the recorder touches no memory.
    unsafe { decode(&recorder, &work) }.unwrap();
    let launch = recorder.last();
    let params = bytemuck::pod_read_unaligned(&launch.params);
    (launch, params)
}

/// A layer of Llama 3.1 8B, two sequences, lists that may become very long.
fn step() -> Decode {
    let heads = |base, heads| Rows::token_major(base, 1, heads, 128);
    Decode {
        cache: Cache {
            k: Rows { token_stride: 128, ..heads(1 << 52, 0) },
            v: Rows { token_stride: 128, ..heads(1 << 53, 0) },
            starts: 4096,
            lengths: 1 << 16,
            rows: 100_000,
            capacity: 100_000,
            sequences: 2,
            heads: 8,
            ..Cache::default()
        },
        q: heads(1 << 48, 32),
        k_new: heads(1 << 49, 8),
        v_new: heads(1 << 50, 8),
        out: heads(1 << 51, 32),
        positions_new: 4096,
        lse: None,
        full: 1 << 17,
        bias: None,
        bias_positions: 100,
        scale: 0.125,
        query_heads: 32,
        tokens: 1,
        head_dim: 128,
        dtype: DType::BF16,
        counters: 0,
        workspace: 1 << 55,
        workspace_bytes: 1 << 40,
    }
}

fn paged() -> Cache {
    Cache {
        k: Rows::token_major(1 << 52, 16, 8, 128),
        v: Rows::token_major(1 << 53, 16, 8, 128),
        pages: Pages { table: 4096, table_pages: 10, pages: 1000, page_size: 16, reserved: 0 },
        starts: 0,
        rows: 0,
        capacity: 160,
        ..step().cache
    }
}

fn bias() -> Bias {
    Bias { heads: 4096, keys: 4096, key_stride: 4, value: -4.6 }
}
