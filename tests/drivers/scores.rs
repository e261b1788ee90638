//! Scores of keys by themselves, and their pooling.

use crate::support::{
    emulator::Emulator,
    recorder::{Recorded, Recorder},
    scores::{Case, check},
};
use fastkv::{
    abi::{self, Pages, PoolScoresParams, Pooling, Rows, WindowScoresParams},
    kernels::{
        DType, Kernel,
        batch::{Bias, Lengths, Lse, ScoreHeads, ScoreRows, Scores, Window, default_scale},
        images, scores,
    },
};
use proptest::prelude::*;
use ptx_emulator::Schedule;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Every form fits the shared memory that every chip has, has room for the queries that it is to hold,
    /// and two slots where it has not.
    #[test]
    fn blocks_have_room(
        head_dim in prop::sample::select(vec![64_u32, 96, 128, 256]),
        group in 1_u32..=16,
        window in 1_u32..=64,
        keys in 1_u32..1 << 20,
    ) {
        let recorder = Recorder::default();
        let work = scores::WindowScores {
            q: Rows::token_major(1 << 40, 64, 8 * group, head_dim),
            k: Rows::token_major(1 << 41, keys, 8, head_dim),
            query_heads: 8 * group,
            head_dim,
            keys: Lengths::dense(keys),
            scores: Scores {
                head_stride: keys.into(),
                window: Window::Last(window),
                heads: ScoreHeads::Group,
                ..window_scores().scores
            },
            ..window_scores()
        };
        // SAFETY: the recorder touches no memory.
        unsafe { scores::window_scores(&recorder, &work) }.unwrap();
        let Recorded { grid, params, .. } = recorder.last();
        let params: WindowScoresParams = bytemuck::pod_read_unaligned(&params);
        let [slots, block_keys] = [params.slots, params.block_keys].map(|number| number as u32);
        let columns = group * window.next_multiple_of(8);
        let step = if head_dim == 256 { 64 } else { 128 };
        prop_assert!(step * head_dim * 2 + slots * 64 * (head_dim * 2 + 8) <= 99 << 10);
        prop_assert_eq!(params.partial_columns as u32, columns);
        let resident = if 8 * keys <= 512 << 10 { 256 } else { 512 };
        prop_assert_eq!(block_keys, if columns <= slots * 64 { resident } else { step });
        prop_assert!(columns <= slots * 64 || slots == 2);
        prop_assert_eq!(grid, [keys.div_ceil(block_keys), 8, 1]);
    }
}

#[test]
fn window_scores_fills_its_params() {
    let recorder = Recorder::default();
    let work = window_scores();
    // SAFETY: the recorder touches no memory.
    unsafe { scores::window_scores(&recorder, &work) }.unwrap();
    assert_eq!(recorder.launches().len(), 1);
    let Recorded { kernel, grid, block, params } = recorder.last();
    assert_eq!((kernel, grid, block), (Kernel::WindowScoresBf16D128, [4, 8, 1], [128, 1, 1]));
    let expected = WindowScoresParams {
        q: work.q,
        k: work.k,
        lse: abi::Lse { base: 1 << 42, head_stride: 64, token_stride: 1, ..abi::Lse::default() },
        scores: 1 << 50,
        score_sequence_stride: 32_000,
        score_head_stride: 1000,
        scale: default_scale(128),
        sequences: 1,
        query_heads: 32,
        kv_heads: 8,
        q_tokens: 64,
        k_tokens: 1000,
        max_q_tokens: 64,
        max_k_tokens: 1000,
        window: 32,
        score_heads: 32,
        block_keys: 256,
        slots: 2,
        partial_columns: 128,
        ..WindowScoresParams::default()
    };
    assert_eq!(bytemuck::pod_read_unaligned::<WindowScoresParams>(&params), expected);
}

/// Without LSE there are a pass over the keys, and what puts its parts together, before the scores; all
/// take the same parameters.
#[test]
fn two_passes_where_there_is_no_lse() {
    let recorder = Recorder::default();
    let mut work = scores::WindowScores { lse: None, workspace: 1 << 52, ..window_scores() };
    work.workspace_bytes = scores::window_scores_workspace(&work).unwrap();
    // Two blocks of keys for each kv head, 128 columns of 8 bytes each; 32 queries of 32 heads.
    assert_eq!(work.workspace_bytes, 8 * 2 * 128 * 8 + 32 * 32 * 4);
    // SAFETY: the recorder touches no memory.
    unsafe { scores::window_scores(&recorder, &work) }.unwrap();
    let launches = recorder.launches();
    let kernels = launches.iter().map(|launch| (launch.kernel, launch.grid)).collect::<Vec<_>>();
    let expected = [
        (Kernel::WindowPartialsBf16D128, [2, 8, 1]),
        (Kernel::WindowLse, [1, 8, 1]),
        (Kernel::WindowScoresBf16D128, [4, 8, 1]),
    ];
    assert_eq!(kernels, expected);
    assert!(launches.iter().all(|launch| launch.params == launches[0].params));
    let params: WindowScoresParams = bytemuck::pod_read_unaligned(&launches[0].params);
    assert_eq!(params.partials, 1 << 52);
    let lse = abi::Lse {
        base: (1 << 52) + 8 * 2 * 128 * 8,
        sequence_stride: 32 * 32,
        head_stride: 32,
        token_stride: 1,
        ..abi::Lse::default()
    };
    assert_eq!(params.lse, lse);

    // 16 heads of 256 elements: the first pass takes 64 columns at a time.
    let wide = scores::WindowScores {
        q: Rows::token_major(1 << 40, 64, 16, 256),
        k: Rows::token_major(1 << 41, 1000, 1, 256),
        query_heads: 16,
        kv_heads: 1,
        head_dim: 256,
        dtype: DType::F16,
        ..work
    };
    // SAFETY: the recorder touches no memory.
    unsafe { scores::window_scores(&recorder, &wide) }.unwrap();
    let grids: Vec<_> = recorder.launches()[3..].iter().map(|launch| (launch.kernel, launch.grid)).collect();
    let expected = [
        (Kernel::WindowPartialsF16D256, [2 * 8, 1, 1]),
        (Kernel::WindowLse, [4, 1, 1]),
        (Kernel::WindowScoresF16D256, [16, 1, 1]),
    ];
    assert_eq!(grids, expected);
}

#[test]
fn nothing_to_score_launches_nothing() {
    let recorder = Recorder::default();
    let empty = Scores { base: 0, ..window_scores().scores };
    for work in [
        scores::WindowScores { sequences: 0, scores: empty, ..window_scores() },
        scores::WindowScores { keys: Lengths::dense(0), scores: empty, ..window_scores() },
        scores::WindowScores { keys: Lengths::packed(4096, 100, 0), scores: empty, ..window_scores() },
    ] {
        // SAFETY: the recorder touches no memory.
        unsafe { scores::window_scores(&recorder, &work) }.unwrap();
    }
    for work in [
        scores::PoolScores { sequences: 0, ..pool_scores() },
        scores::PoolScores { keys: Lengths::dense(0), ..pool_scores() },
        scores::PoolScores { tail: 1000, ..pool_scores() },
        scores::PoolScores { groups: None, total: None, ..pool_scores() },
    ] {
        // SAFETY: the recorder touches no memory.
        unsafe { scores::pool_scores(&recorder, &work) }.unwrap();
    }
    assert!(recorder.launches().is_empty());
}

/// 63 pages of 16 keys, of which two sequences have at most 40 each.
#[test]
fn keys_may_lie_in_pages() {
    let recorder = Recorder::default();
    let work = paged();
    // SAFETY: the recorder touches no memory.
    unsafe { scores::window_scores(&recorder, &work) }.unwrap();
    let Recorded { kernel, grid, params, .. } = recorder.last();
    assert_eq!((kernel, grid), (Kernel::WindowScoresBf16D128, [3, 8, 2]));
    let params: WindowScoresParams = bytemuck::pod_read_unaligned(&params);
    assert_eq!((params.k, params.pages, params.k_lengths), (work.k, work.pages, 1 << 45));
    assert_eq!((params.cu_seqlens_k, params.k_tokens, params.max_k_tokens), (0, 640, 640));

    let refuses = |change: fn(&mut scores::WindowScores), message: &str| {
        Recorder::refuses(scores::window_scores, paged(), change, message)
    };
    refuses(|w| w.keys.cu_seqlens = 4096, "keys.cu_seqlens is 0x1000; it must be 0 where there are pages");
    refuses(
        |w| (w.keys, w.scores.head_stride, w.scores.sequence_stride) = (Lengths::dense(641), 641, 32 * 641),
        "keys.tokens is 641; it must be at most pages.table_pages * pages.page_size = 640",
    );
    refuses(|w| w.pages.pages = 0, "pages.pages is 0; it must be 1 or more where there are pages");
    refuses(|w| w.pages.page_size = -1, "pages.page_size is -1; it must be 1 or more where there are pages");
    refuses(|w| w.pages.table = 2, "pages.table is 0x2; it must be a device address, a multiple of 4");
    refuses(|w| w.lengths = 3, "lengths is 0x3; it must be a device address, a multiple of 4");
    refuses(
        |w| w.lengths = w.scores.base + 4,
        "scores is 0x4000000000000..0x4000000028000; it must be apart from lengths, \
         0x4000000000004..0x400000000000c",
    );
    refuses(
        |w| w.pages.table = w.scores.base,
        "scores is 0x4000000000000..0x4000000028000; it must be apart from pages.table, \
         0x4000000000000..0x4000000000140",
    );
    // The last page ends in the scores.
    refuses(
        |w| w.k.base = w.scores.base + 16 - 63 * 16 * 8 * 128 * 2,
        "scores is 0x4000000000000..0x4000000028000; it must be apart from k, 0x3ffffffe08010..0x4000000000010",
    );
}

/// Keys that no query observes score 0, and there need be nothing of the queries.
#[test]
fn no_queries_need_no_tensors() {
    let recorder = Recorder::default();
    let work = scores::WindowScores {
        q: Rows::default(),
        queries: Lengths::dense(0),
        lse: Some(Lse::default()),
        ..window_scores()
    };
    // SAFETY: the recorder touches no memory.
    unsafe { scores::window_scores(&recorder, &work) }.unwrap();
    assert_eq!(recorder.launches().len(), 1);
}

#[test]
fn window_scores_refuses() {
    let refuses = |change: fn(&mut scores::WindowScores), message: &str| {
        Recorder::refuses(scores::window_scores, window_scores(), change, message)
    };
    refuses(|w| w.head_dim = 80, "head_dim is 80; it must be 64, 96, 128 or 256");
    refuses(|w| w.dtype = DType::F32, "dtype is F32; it must be F16 or BF16");
    refuses(|w| w.kv_heads = 0, "kv_heads is 0; it must be 1 or more");
    refuses(|w| w.query_heads = 0, "query_heads is 0; it must be 1 to 16 times kv_heads = 8");
    refuses(|w| w.query_heads = 33, "query_heads is 33; it must be 1 to 16 times kv_heads = 8");
    refuses(|w| w.kv_heads = 1, "query_heads is 32; it must be 1 to 16 times kv_heads = 1");
    refuses(|w| w.sequences = 65_536, "sequences is 65536; it must be at most 65535");
    refuses(
        |w| (w.kv_heads, w.query_heads) = (65_536, 65_536),
        "kv_heads is 65536; it must be at most 65535",
    );
    refuses(|w| w.scale = 0.0, "scale is 0; it must be a positive number below 2^27");
    refuses(|w| w.scale = f32::NAN, "scale is NaN; it must be a positive number below 2^27");
    refuses(
        |w| w.keys = Lengths::dense(u32::MAX),
        "keys.tokens is 4294967295; it must be at most 1073741824",
    );
    refuses(
        |w| w.queries.longest = 63,
        "queries.longest is 63; it must be without cu_seqlens the tokens there are, 64",
    );
    refuses(
        |w| w.keys = Lengths::packed(4096, 10, 11),
        "keys.longest is 11; it must be at most the tokens there are, 10",
    );
    refuses(|w| w.scores.window = Window::Last(0), "scores.window is 0; it must be 1 to 64 queries");
    refuses(|w| w.scores.window = Window::Last(65), "scores.window is 65; it must be 1 to 64 queries");
    refuses(
        |w| (w.scores.window, w.lse) = (Window::All, None),
        "lse is None; it must be given where scores.window is All",
    );
    refuses(
        |w| (w.scores.window, w.queries) = (Window::All, Lengths::dense((1 << 28) + 1)),
        "queries.longest is 268435457; it must be at most 268435456 where 4 heads share keys and scores.window is All",
    );
    refuses(|w| w.k.base = 0, "k is 0x0; it must be a device address, a multiple of 16");
    refuses(|w| w.q.base = 8, "q is 0x8; it must be a device address, a multiple of 16");
    refuses(
        |w| w.q.head_stride = 12,
        "q.head_stride is 12; it must be 0 or a positive multiple of 8 for BF16 (16 bytes)",
    );
    refuses(|w| w.k.token_stride = 64, "k.token_stride is 64; it must be 128 or more: rows must not overlap");
    refuses(|w| w.positions = 2, "positions is 0x2; it must be a device address, a multiple of 4");
    refuses(
        |w| w.queries.cu_seqlens = 4,
        "q.sequence_stride is 262144; it must be 0 where cu_seqlens packs the sequences along the token axis",
    );
    refuses(
        |w| (w.keys.cu_seqlens, w.k.sequence_stride) = (2, 0),
        "keys.cu_seqlens is 0x2; it must be a device address, a multiple of 4",
    );
    refuses(
        |w| w.lse = Some(Lse::head_major(1 << 42, 63)),
        "lse.head_stride is 63; it must be 64 or more: queries must not share a place",
    );
    refuses(
        |w| w.lse = Some(Lse::token_major(1 << 42, 31)),
        "lse.token_stride is 31; it must be 32 or more: queries must not share a place",
    );
    refuses(
        |w| w.lse = Some(Lse::head_major(0, 64)),
        "lse is 0x0; it must be a device address, a multiple of 4",
    );
    refuses(
        |w| w.bias = Some(Bias { value: f32::INFINITY, ..bias() }),
        "bias.value is inf; it must be a number below 2^99 when divided by scale: to hide keys is what positions are for",
    );
    refuses(
        |w| w.bias = Some(Bias { key_stride: -1, ..bias() }),
        "bias.key_stride is -1; it must be 32 or more: a bit for each of 1000 keys",
    );
    refuses(
        |w| w.bias = Some(Bias { heads: 0, ..bias() }),
        "bias.heads is 0x0; it must be a device address, a multiple of 4",
    );
    refuses(
        |w| w.bias = Some(Bias { keys: 6, ..bias() }),
        "bias.keys is 0x6; it must be a device address, a multiple of 4",
    );
    refuses(
        |w| w.bias = Some(Bias { heads: w.scores.base, ..bias() }),
        "scores is 0x4000000000000..0x400000001f400; it must be apart from bias.heads, 0x4000000000000..0x4000000000004",
    );
    refuses(
        |w| w.scores.head_stride = 999,
        "scores.head_stride is 999; it must be 1000 or more: the keys of the longest sequence",
    );
    refuses(
        |w| (w.sequences, w.scores.sequence_stride) = (2, 31_999),
        "lse.head_stride is 64; it must be 128 or more: queries must not share a place",
    );
    refuses(
        |w| (w.sequences, w.scores.sequence_stride, w.lse) = (2, 31_999, Some(Lse::padded(4, 32, 64))),
        "scores.sequence_stride is 31999; it must be 32000 or more: 32 heads",
    );
    refuses(|w| w.scores.base = 2, "scores is 0x2; it must be a device address, a multiple of 4");
    refuses(
        |w| w.scores.base = w.k.base + 16,
        "scores is 0x20000000010..0x2000001f410; it must be apart from k, 0x20000000000..0x200001f4000",
    );
    refuses(
        |w| (w.lse, w.workspace) = (None, 128),
        "workspace is 0x80; it must be a device address, a multiple of 256",
    );
    refuses(|w| w.lse = None, "workspace is 0x0; it must be a device address, a multiple of 256");
    refuses(
        |w| (w.lse, w.workspace) = (None, 1 << 52),
        "workspace_bytes is 0; it must be 20480 or more, as window_scores_workspace says",
    );
    refuses(
        |w| (w.lse, w.workspace, w.workspace_bytes) = (None, w.scores.base, 20_480),
        "workspace is 0x4000000000000..0x4000000005000; it must be apart from scores, 0x4000000000000..0x400000001f400",
    );
}

#[test]
fn workspaces_that_no_address_space_has_are_refused() {
    let work = scores::WindowScores {
        sequences: 65_535,
        query_heads: 65_535 * 16,
        kv_heads: 65_535,
        keys: Lengths::dense(1 << 30),
        lse: None,
        ..window_scores()
    };
    let error = scores::window_scores_workspace(&work).unwrap_err().to_string();
    assert!(error.starts_with("workspace is 36"), "{error}");
}

#[test]
fn pool_scores_fills_its_params() {
    let recorder = Recorder::default();
    // SAFETY: the recorder touches no memory.
    unsafe { scores::pool_scores(&recorder, &pool_scores()) }.unwrap();
    let Recorded { kernel, grid, block, params } = recorder.last();
    assert_eq!((kernel, grid, block), (Kernel::PoolScores, [8, 2, 1], [256, 1, 1]));
    let expected = PoolScoresParams {
        scores: 1 << 40,
        sequence_stride: 32_000,
        head_stride: 1000,
        cu_seqlens: 0,
        lengths: 0,
        groups: 1 << 41,
        group_sequence_stride: 8000,
        group_head_stride: 1000,
        total: 1 << 42,
        total_sequence_stride: 1000,
        pooling: Pooling::max(7),
        sequences: 2,
        query_heads: 32,
        kv_heads: 8,
        tokens: 1000,
        max_tokens: 1000,
        tail: 8,
    };
    assert_eq!(bytemuck::pod_read_unaligned::<PoolScoresParams>(&params), expected);
}

#[test]
fn pool_scores_refuses() {
    let refuses = |change: fn(&mut scores::PoolScores), message: &str| {
        Recorder::refuses(scores::pool_scores, pool_scores(), change, message)
    };
    refuses(|w| w.kv_heads = 0, "kv_heads is 0; it must be 1 or more");
    refuses(
        |w| w.query_heads = 0,
        "query_heads is 0; it must be a multiple of kv_heads = 8 from there to 2147483647",
    );
    refuses(
        |w| w.query_heads = 9,
        "query_heads is 9; it must be a multiple of kv_heads = 8 from there to 2147483647",
    );
    refuses(
        |w| w.query_heads = 1 << 31,
        "query_heads is 2147483648; it must be a multiple of kv_heads = 8 from there to 2147483647",
    );
    refuses(|w| w.sequences = 1 << 16, "sequences is 65536; it must be at most 65535");
    refuses(|w| w.tail = 1 << 31, "tail is 2147483648; it must be at most 2147483647");
    refuses(|w| w.pooling = Pooling::max(8), "pooling.kernel is 8; it must be an odd number from 1 to 63");
    refuses(
        |w| w.pooling = Pooling::average(65),
        "pooling.kernel is 65; it must be an odd number from 1 to 63",
    );
    refuses(|w| w.pooling.kind = 2, "pooling.kind is 2; it must be 0 for max or 1 for average");
    refuses(
        |w| w.keys.longest = 7,
        "keys.longest is 7; it must be without cu_seqlens the tokens there are, 1000",
    );
    refuses(|w| w.lengths = 2, "lengths is 0x2; it must be a device address, a multiple of 4");
    refuses(|w| w.scores.base = 0, "scores is 0x0; it must be a device address, a multiple of 4");
    refuses(
        |w| w.scores.head_stride = 0,
        "scores.head_stride is 0; it must be 1000 or more: the keys of the longest sequence",
    );
    refuses(
        |w| w.groups.as_mut().unwrap().sequence_stride = 7999,
        "groups.sequence_stride is 7999; it must be 8000 or more: 8 heads",
    );
    refuses(
        |w| w.total.as_mut().unwrap().sequence_stride = 0,
        "total.sequence_stride is 0; it must be 1000 or more: 1 heads",
    );
    refuses(
        |w| w.total = w.groups,
        "total is 0x20000000000..0x20000008ca0; it must be apart from groups, 0x20000000000..0x2000000fa00",
    );
}

/// Fragments, copies and LSE lie so that no two lanes of a request want the same bank at once.
#[test]
#[cfg_attr(not(fastkv_kernels), ignore = "built without nvcc")]
fn shared_memory_has_no_bank_conflicts() {
    assert!(images::built());
    for head_dim in [64, 96, 128, 256] {
        let emulator = Emulator::new(Schedule::Eager, (8, 0));
        check(&emulator, &Case::plain(DType::BF16, head_dim, 4, 32, 512)).unwrap();
        let counters = emulator.counters();
        assert!(counters.shared_requests > 1000 && counters.matrix_products > 1000, "{counters:?}");
        assert_eq!(counters.bank_conflicts, 0, "{head_dim}: {counters:?}");
    }
}

/// A layer of Llama 3.1 8B: 1000 keys, the last 64 queries at hand, 32 of which observe.
fn window_scores() -> scores::WindowScores {
    scores::WindowScores {
        q: Rows::token_major(1 << 40, 64, 32, 128),
        k: Rows::token_major(1 << 41, 1000, 8, 128),
        sequences: 1,
        query_heads: 32,
        kv_heads: 8,
        head_dim: 128,
        dtype: DType::BF16,
        queries: Lengths::dense(64),
        keys: Lengths::dense(1000),
        scale: default_scale(128),
        lse: Some(Lse::head_major(1 << 42, 64)),
        scores: Scores {
            base: 1 << 50,
            sequence_stride: 32_000,
            head_stride: 1000,
            window: Window::Last(32),
            heads: ScoreHeads::Query,
        },
        ..Default::default()
    }
}

/// The same keys in pages of 16, `[page][slot][kv head]`, of two sequences.
fn paged() -> scores::WindowScores {
    scores::WindowScores {
        q: Rows::token_major(1 << 40, 64, 32, 128),
        k: Rows::token_major(1 << 41, 16, 8, 128),
        pages: Pages { table: 1 << 46, table_pages: 40, pages: 63, page_size: 16, reserved: 0 },
        sequences: 2,
        keys: Lengths::dense(640),
        lengths: 1 << 45,
        lse: Some(Lse::padded(1 << 42, 32, 64)),
        scores: Scores { sequence_stride: 32 * 640, head_stride: 640, ..window_scores().scores },
        ..window_scores()
    }
}

/// Of one sequence, which needs no stride.
fn bias() -> Bias {
    Bias { heads: 1 << 43, keys: 1 << 44, key_stride: 0, value: -4.6 }
}

/// Scores of two such sequences.
fn pool_scores() -> scores::PoolScores {
    let rows = |base, heads: i64| ScoreRows { base, sequence_stride: heads * 1000, head_stride: 1000 };
    scores::PoolScores {
        scores: rows(1 << 40, 32),
        sequences: 2,
        query_heads: 32,
        kv_heads: 8,
        keys: Lengths::dense(1000),
        tail: 8,
        pooling: Pooling::max(7),
        groups: Some(rows(1 << 41, 8)),
        total: Some(ScoreRows { head_stride: 0, ..rows(1 << 42, 1) }),
        ..Default::default()
    }
}
