//! Prefill attention.

use crate::support::{
    attention::{Case, check},
    emulator::Emulator,
    recorder::{Recorded, Recorder},
};
use fastkv::{
    abi::{self, Pages, PrefillAttentionParams, Rows, Sm90AttentionParams},
    kernels::{
        DType, Kernel, TensorMap,
        attention::{self, Form, PrefillAttention},
        batch::{Bias, Lengths, Logarithm, Lse, ScoreHeads, Scores, Window, default_scale},
        images,
    },
};
use ptx_emulator::Schedule;

#[test]
fn fills_its_params() {
    let recorder = Recorder::default();
    let work = prepared(scored());
    // SAFETY: the recorder touches no memory.
    unsafe { attention::prefill_attention(&recorder, &work) }.unwrap();
    let Recorded { kernel, grid, block, params } = recorder.last();
    assert_eq!((kernel, block), (Kernel::PrefillAttentionBf16D128, [128, 1, 1]));
    // 108 multiprocessors, two blocks on each.
    assert_eq!(grid, [216, 1, 1]);
    let expected = PrefillAttentionParams {
        q: work.q,
        k: work.k,
        v: work.v,
        out: work.out,
        pages: Pages::default(),
        cu_seqlens_q: 0,
        cu_seqlens_k: 0,
        k_lengths: 0,
        positions: 0,
        // Behind the next item and a counter for each of 2 x 8 kv heads.
        lse: abi::Lse {
            base: WORKSPACE + 256,
            // 2 x 1000 queries in whole stretches of 256 bytes.
            head_stride: 2048,
            token_stride: 1,
            ..abi::Lse::default()
        },
        bias_heads: 0,
        bias_keys: 0,
        bias_key_stride: 0,
        scores: 1 << 52,
        score_sequence_stride: 32 * 1000,
        score_head_stride: 1000,
        queue: WORKSPACE,
        scale: default_scale(128),
        bias: 0.0,
        sequences: 2,
        query_heads: 32,
        kv_heads: 8,
        q_tokens: 1000,
        k_tokens: 1000,
        max_q_tokens: 1000,
        max_k_tokens: 1000,
        window: 8,
        score_heads: 32,
        section_heads: 8,
        score_keys: 512,
        score_slots: 2,
    };
    assert_eq!(bytemuck::pod_read_unaligned::<PrefillAttentionParams>(&params), expected);
}

#[test]
fn optional_parts_fill_theirs() {
    let recorder = Recorder::default();
    let work = prepared(PrefillAttention {
        positions: 4096,
        queries: Lengths::packed(4096, 1000, 600),
        q: Rows::packed(4096, 32, 128),
        out: Rows::packed(1 << 50, 32, 128),
        bias: Some(Bias { heads: 4096, keys: 8192, key_stride: 40, value: -2.5 }),
        lse: Some(Lse { logarithm: Logarithm::Binary, ..Lse::token_major(1 << 54, 33) }),
        scores: Some(Scores { window: Window::All, heads: ScoreHeads::Group, ..scored().scores.unwrap() }),
        ..scored()
    });
    assert_eq!(work.workspace_bytes, 256);
    // SAFETY: the recorder touches no memory.
    unsafe { attention::prefill_attention(&recorder, &work) }.unwrap();
    let params: PrefillAttentionParams = bytemuck::pod_read_unaligned(&recorder.last().params);
    assert_eq!((params.cu_seqlens_q, params.cu_seqlens_k, params.positions), (4096, 0, 4096));
    assert_eq!((params.q_tokens, params.max_q_tokens), (1000, 600));
    assert_eq!((params.bias_heads, params.bias_keys, params.bias_key_stride), (4096, 8192, 40));
    assert_eq!(params.bias, -2.5);
    let lse = abi::Lse {
        base: 1 << 54,
        sequence_stride: 0,
        head_stride: 1,
        token_stride: 33,
        logarithm: abi::LOGARITHM_BINARY,
        reserved: 0,
    };
    assert_eq!(params.lse, lse);
    assert_eq!((params.window, params.score_heads, params.score_keys), (600, 8, 128));
}

#[test]
fn each_type_and_head_size_has_a_kernel() {
    let mut seen = Vec::new();
    for dtype in [DType::F16, DType::BF16] {
        for head_dim in [64, 96, 128, 256] {
            let recorder = Recorder::default();
            let rows = |base, heads| Rows::token_major(base, 1000, heads, head_dim);
            let work = prepared(PrefillAttention {
                q: rows(4096, 32),
                k: rows(4096, 8),
                v: rows(4096, 8),
                out: rows(1 << 50, 32),
                head_dim,
                dtype,
                ..plain()
            });
            // SAFETY: the recorder touches no memory.
            unsafe { attention::prefill_attention(&recorder, &work) }.unwrap();
            let name = format!("fastkv_prefill_attention_{dtype:?}_{head_dim}").to_lowercase();
            assert_eq!(recorder.last().kernel.entry(), name);
            seen.push(recorder.last().kernel);
            let page = Rows::token_major(4096, 16, 8, head_dim);
            let paged = prepared(PrefillAttention { k: page, v: page, pages: paged().pages, ..work });
            // SAFETY: the recorder touches no memory.
            unsafe { attention::prefill_attention(&recorder, &paged) }.unwrap();
            assert_eq!(recorder.last().kernel.entry(), name.replace("prefill", "paged"));
            seen.push(recorder.last().kernel);
        }
    }
    seen.dedup();
    assert_eq!(seen.len(), 16);
}

#[test]
fn keys_may_lie_in_pages() {
    let recorder = Recorder::default();
    let work = prepared(paged());
    // SAFETY: the recorder touches no memory.
    unsafe { attention::prefill_attention(&recorder, &work) }.unwrap();
    let params: PrefillAttentionParams = bytemuck::pod_read_unaligned(&recorder.last().params);
    assert_eq!((params.k, params.v, params.pages, params.k_lengths), (work.k, work.v, work.pages, 1 << 43));
    assert_eq!((params.cu_seqlens_k, params.k_tokens, params.max_k_tokens), (0, 1000, 1000));

    let refuses = |change: fn(&mut PrefillAttention), message: &str| {
        Recorder::refuses(attention::prefill_attention, prepared(paged()), change, message)
    };
    refuses(|w| w.keys.cu_seqlens = 4096, "keys.cu_seqlens is 0x1000; it must be 0 where there are pages");
    refuses(
        |w| w.keys = Lengths::dense(1025),
        "keys.tokens is 1025; it must be at most pages.table_pages * pages.page_size = 1024",
    );
    // Pages are there, however few keys are.
    refuses(
        |w| (w.keys, w.k.base) = (Lengths::dense(0), 0),
        "k is 0x0; it must be a device address, a multiple of 16",
    );
    refuses(|w| w.pages.pages = 0, "pages.pages is 0; it must be 1 or more where there are pages");
    refuses(|w| w.pages.page_size = -1, "pages.page_size is -1; it must be 1 or more where there are pages");
    refuses(|w| w.pages.table = 2, "pages.table is 0x2; it must be a device address, a multiple of 4");
    refuses(|w| w.lengths = 3, "lengths is 0x3; it must be a device address, a multiple of 4");
    refuses(
        |w| w.lengths = w.out.base,
        "out is 0x4000000000000..0x4000000fa0000; it must be apart from lengths, 0x4000000000000..0x4000000000008",
    );
    // The last page ends in the output.
    refuses(
        |w| w.v.base = w.out.base + 16 - 130 * 16 * 8 * 128 * 2,
        "out is 0x4000000000000..0x4000000fa0000; it must be apart from v, 0x3ffffffbf0010..0x4000000000010",
    );
}

/// A box is what a tile of keys takes of a page.
#[test]
fn hopper_copies_pages_in_boxes() {
    if !images::built() {
        return;
    }
    for (page_size, rows) in [(8, 8), (64, 64), (128, 128), (384, 128)] {
        let recorder = Recorder::hopper();
        let page = Rows::token_major(1 << 40, page_size as u32, 8, 128);
        let pages = Pages { page_size, table_pages: 125, ..paged().pages };
        let work = PrefillAttention { k: page, v: Rows { base: 1 << 41, ..page }, pages, ..paged() };
        // SAFETY: the recorder touches no memory.
        unsafe { attention::prefill_attention(&recorder, &prepared(work)) }.unwrap();
        assert_eq!(recorder.last().kernel, Kernel::Sm90AttentionBf16D128);
        let [_, k, v] = recorder.maps().try_into().unwrap();
        let slots = page_size as u64;
        let expected = TensorMap {
            base: 1 << 40,
            sizes: [64, slots, 2, 8, 130],
            strides: [2048, 128, 256, 2048 * slots],
            box_sizes: [64, rows, 1, 1, 1],
            dtype: DType::BF16,
        };
        assert_eq!(k, expected);
        assert_eq!(v, TensorMap { base: 1 << 41, ..expected });
    }
}

#[test]
fn hopper_has_a_form_of_its_own() {
    if !images::built() {
        return;
    }
    for (head_dim, entry, kib) in
        [(64, "fastkv_sm90_attention_f16_64", 97), (128, "fastkv_sm90_attention_f16_128", 193)]
    {
        let recorder = Recorder::hopper();
        // Queries after one another; keys in rows of 10 heads.
        let work = prepared(PrefillAttention {
            q: Rows::packed(4096, 32, head_dim),
            k: Rows::token_major(8192, 1000, 10, head_dim),
            v: Rows::token_major(12288, 1000, 10, head_dim),
            out: Rows::packed(1 << 50, 32, head_dim),
            queries: Lengths::packed(4096, 1000, 600),
            head_dim,
            dtype: DType::F16,
            ..scored()
        });
        // SAFETY: the recorder touches no memory.
        unsafe { attention::prefill_attention(&recorder, &work) }.unwrap();
        let Recorded { kernel, grid, block, params } = recorder.last();
        assert_eq!((kernel.entry(), grid, block), (entry, [108, 1, 1], [384, 1, 1]));
        assert_eq!(recorder.resources()[0].shared_bytes, kib << 10);
        let params: Sm90AttentionParams = bytemuck::pod_read_unaligned(&params);
        assert_eq!((params.attention.score_keys, params.attention.score_slots), (512, 4));
        assert_eq!([params.q, params.k, params.v].map(|map| map.words[0]), [4096, 8192, 12288]);
        let [q, k, v] = recorder.maps().try_into().unwrap();
        let (d, halves) = (u64::from(head_dim), u64::from(head_dim / 64));
        let half = if halves == 1 { 16 } else { 128 };
        let box_sizes = [64, 128, head_dim / 64, 1, 1];
        let expected = TensorMap {
            base: 4096,
            sizes: [64, 1000, halves, 32, 1],
            strides: [64 * d, half, 2 * d, 16],
            box_sizes,
            dtype: DType::F16,
        };
        assert_eq!(q, expected);
        let sizes = [64, 1000, halves, 8, 2];
        let strides = [20 * d, half, 2 * d, 20_000 * d];
        assert_eq!(k, TensorMap { base: 8192, sizes, strides, ..expected });
        assert_eq!(v, TensorMap { base: 12288, ..k });
    }
}

#[test]
fn hopper_takes_the_portable_form_for_what_its_own_does_not_do() {
    if !images::built() {
        return;
    }
    let wide = |base, heads| Rows::token_major(base, 1000, heads, 96);
    let shared = |base| Rows { head_stride: 0, ..Rows::token_major(base, 1000, 8, 128) };
    let none = |base| Rows { base, ..Rows::default() };
    let apart = |sequence_stride| Rows { sequence_stride, ..plain().k };
    for (work, why) in [
        (
            PrefillAttention {
                q: wide(4096, 32),
                k: wide(4096, 8),
                v: wide(4096, 8),
                out: wide(1 << 50, 32),
                head_dim: 96,
                ..plain()
            },
            "head_dim is 64 or 128",
        ),
        (PrefillAttention { pages: Pages { page_size: 24, ..paged().pages }, ..paged() }, PAGES),
        (PrefillAttention { pages: Pages { page_size: 192, ..paged().pages }, ..paged() }, PAGES),
        (PrefillAttention { k: shared(4096), ..plain() }, STRIDES),
        (PrefillAttention { k: apart(1 << 39), ..plain() }, STRIDES),
        (PrefillAttention { keys: Lengths::dense(0), ..plain() }, STRIDES),
        (PrefillAttention { k: none(0), v: none(0), keys: Lengths::dense(0), ..plain() }, STRIDES),
    ] {
        let recorder = Recorder::hopper();
        // SAFETY: the recorder touches no memory.
        unsafe { attention::prefill_attention(&recorder, &prepared(work)) }.unwrap();
        assert_eq!(recorder.last().kernel.image(), "attention", "{why}");
        let forced = prepared(PrefillAttention { form: Some(Form::Hopper), ..work });
        // SAFETY: the recorder touches no memory.
        let error = unsafe { attention::prefill_attention(&recorder, &forced) }.unwrap_err();
        assert_eq!(error.to_string(), format!("form is Hopper; it must be Portable: Hopper's {why}"));
    }
    let elsewhere = prepared(PrefillAttention { form: Some(Form::Hopper), ..plain() });
    // SAFETY: the recorder touches no memory.
    let error = unsafe { attention::prefill_attention(&Recorder::default(), &elsewhere) }.unwrap_err();
    assert!(error.to_string().ends_with("kernel is for compute capability 9.0, and built for it"), "{error}");
    let portable = prepared(PrefillAttention { form: Some(Form::Portable), ..plain() });
    let recorder = Recorder::hopper();
    // SAFETY: the recorder touches no memory.
    unsafe { attention::prefill_attention(&recorder, &portable) }.unwrap();
    assert_eq!(recorder.last().kernel, Kernel::PrefillAttentionBf16D128);
    let widest = prepared(PrefillAttention { k: apart((1 << 39) - 8), ..plain() });
    // SAFETY: the recorder touches no memory.
    unsafe { attention::prefill_attention(&recorder, &widest) }.unwrap();
    assert_eq!(recorder.last().kernel, Kernel::Sm90AttentionBf16D128);
}

const PAGES: &str = "pages have 8, 16, 32, 64 or a multiple of 128 slots";
const STRIDES: &str = "copy engine takes tensors with keys whose strides are neither 0 nor 2^40 bytes";

#[test]
fn small_batches_have_small_grids() {
    let recorder = Recorder::default();
    // A tile has 64 queries or more: on some chips 128.
    for (queries, blocks) in [(1, 32), (64, 32), (65, 64)] {
        let q = Rows::token_major(4096, queries, 32, 128);
        let work = prepared(PrefillAttention {
            q,
            out: Rows { base: 1 << 50, ..q },
            sequences: 1,
            queries: Lengths::dense(queries),
            ..plain()
        });
        // SAFETY: the recorder touches no memory.
        unsafe { attention::prefill_attention(&recorder, &work) }.unwrap();
        assert_eq!(recorder.last().grid, [blocks, 1, 1]);
    }
}

#[test]
fn keys_of_many_heads_stay_within_l2() {
    let recorder = Recorder::default();
    let section = |keys| {
        let rows = Rows::token_major(4096, keys, 8, 128);
        let work = prepared(PrefillAttention { k: rows, v: rows, keys: Lengths::dense(keys), ..plain() });
        // SAFETY: the recorder touches no memory.
        unsafe { attention::prefill_attention(&recorder, &work) }.unwrap();
        bytemuck::pod_read_unaligned::<PrefillAttentionParams>(&recorder.last().params).section_heads
    };
    assert_eq!([0, 1000, 16_384, 32_768, 1 << 20].map(section), [8, 8, 4, 2, 1]);
}

#[test]
fn no_query_launches_nothing() {
    let recorder = Recorder::default();
    for (sequences, queries) in
        [(0, Lengths::dense(5)), (2, Lengths::dense(0)), (2, Lengths::packed(4096, 5, 0))]
    {
        let work =
            PrefillAttention { sequences, queries, q: Rows::default(), out: Rows::default(), ..plain() };
        // SAFETY: the recorder touches no memory.
        unsafe { attention::prefill_attention(&recorder, &work) }.unwrap();
    }
    assert!(recorder.launches().is_empty());
}

#[test]
fn refuses() {
    let refuses = |change: fn(&mut PrefillAttention), message: &str| {
        Recorder::refuses(attention::prefill_attention, prepared(scored()), change, message)
    };
    refuses(|w| w.head_dim = 80, "head_dim is 80; it must be 64, 96, 128 or 256");
    refuses(|w| w.dtype = DType::F32, "dtype is F32; it must be F16 or BF16");
    refuses(|w| w.kv_heads = 0, "kv_heads is 0; it must be 1 or more");
    refuses(|w| w.query_heads = 0, "query_heads is 0; it must be 1 to 16 times kv_heads = 8");
    refuses(|w| w.query_heads = 12, "query_heads is 12; it must be 1 to 16 times kv_heads = 8");
    refuses(|w| w.query_heads = 136, "query_heads is 136; it must be 1 to 16 times kv_heads = 8");
    refuses(
        |w| w.queries.tokens = (1 << 30) + 1,
        "queries.tokens is 1073741825; it must be at most 1073741824",
    );
    refuses(
        |w| w.keys.longest = 999,
        "keys.longest is 999; it must be without cu_seqlens the tokens there are, 1000",
    );
    refuses(
        |w| w.keys = Lengths::packed(4096, 1000, 1001),
        "keys.longest is 1001; it must be at most the tokens there are, 1000",
    );
    refuses(|w| w.scale = 0.0, "scale is 0; it must be a positive number below 2^27");
    refuses(|w| w.scale = f32::NAN, "scale is NaN; it must be a positive number below 2^27");
    refuses(|w| w.scale = f32::INFINITY, "scale is inf; it must be a positive number below 2^27");
    refuses(|w| w.scale = 2_f32.powi(27), "scale is 134217730; it must be a positive number below 2^27");
    refuses(
        |w| w.sequences = 1 << 22,
        "sequences is 4194304; it must be fewer: 67108864 tiles of 32 heads are 2^30 or more",
    );
    refuses(
        |w| (w.sequences, w.keys) = (16, Lengths::dense(1 << 30)),
        "sequences is 16; it must be fewer: 33554432 tiles of 32 heads are 2^30 or more",
    );
    refuses(
        |w| w.sequences = u32::MAX,
        "sequences is 4294967295; it must be fewer: 68719476720 tiles of 32 heads are 2^30 or more",
    );

    // 2^67, which 64 bits do not hold.
    refuses(
        |w| {
            (w.sequences, w.queries) = (1 << 31, Lengths::dense(1 << 30));
            (w.query_heads, w.kv_heads) = (1 << 12, 1 << 12);
        },
        "sequences is 2147483648; it must be fewer: 36028797018963968 tiles of 4096 heads are 2^30 or more",
    );
    refuses(|w| w.q.base = 0, "q is 0x0; it must be a device address, a multiple of 16");
    refuses(|w| w.k.base = 4104, "k is 0x1008; it must be a device address, a multiple of 16");
    refuses(
        |w| w.v.head_stride = 100,
        "v.head_stride is 100; it must be 0 or a positive multiple of 8 for BF16 (16 bytes)",
    );
    refuses(|w| w.k.token_stride = 1 << 30, "k.token_stride is 1073741824; it must be at most 1073741823");
    refuses(
        |w| w.keys = Lengths::packed(4096, 1000, 1000),
        "k.sequence_stride is 1024000; it must be 0 where cu_seqlens packs the sequences along the token axis",
    );
    refuses(|w| w.positions = 2, "positions is 0x2; it must be a device address, a multiple of 4");
    refuses(
        |w| w.queries.cu_seqlens = 2,
        "q.sequence_stride is 4096000; it must be 0 where cu_seqlens packs the sequences along the token axis",
    );
    refuses(
        |w| {
            w.queries.cu_seqlens = 2;
            (w.q.sequence_stride, w.out.sequence_stride) = (0, 0);
        },
        "queries.cu_seqlens is 0x2; it must be a device address, a multiple of 4",
    );
    refuses(
        |w| {
            w.keys.cu_seqlens = 2;
            (w.k.sequence_stride, w.v.sequence_stride) = (0, 0);
        },
        "keys.cu_seqlens is 0x2; it must be a device address, a multiple of 4",
    );
    refuses(
        |w| w.out.head_stride = 64,
        "out.head_stride is 64; it must be 128 or more: rows must not overlap",
    );
    refuses(
        |w| w.out.sequence_stride = 2_048_000,
        "out.sequence_stride is 2048000; it must be 4096000 or more: rows must not overlap",
    );
    refuses(|w| w.out.base = w.q.base, "out is 0x1000..0xfa1000; it must be apart from q, 0x1000..0xfa1000");

    refuses(
        |w| w.bias = Some(Bias { value: f32::NEG_INFINITY, ..BIAS }),
        "bias.value is -inf; it must be a number below 2^99 when divided by scale: to hide keys is what \
         positions are for",
    );
    refuses(
        |w| (w.scale, w.bias) = (1e-30, Some(Bias { value: 1e20, ..BIAS })),
        "bias.value is 100000000000000000000; it must be a number below 2^99 when divided by scale: to hide keys \
         is what positions are for",
    );
    refuses(
        |w| (w.scale, w.bias) = (0.5, Some(Bias { value: -2_f32.powi(98), ..BIAS })),
        "bias.value is -316912650000000000000000000000; it must be a number below 2^99 when divided by scale: to \
         hide keys is what positions are for",
    );
    refuses(
        |w| w.bias = Some(Bias { key_stride: 31, ..BIAS }),
        "bias.key_stride is 31; it must be 32 or more: a bit for each of 1000 keys",
    );
    refuses(
        |w| w.bias = Some(Bias { heads: 0, ..BIAS }),
        "bias.heads is 0x0; it must be a device address, a multiple of 4",
    );
    refuses(
        |w| w.bias = Some(Bias { keys: 6, ..BIAS }),
        "bias.keys is 0x6; it must be a device address, a multiple of 4",
    );
    refuses(
        |w| w.bias = Some(Bias { keys: w.out.base, ..BIAS }),
        "out is 0x4000000000000..0x4000000fa0000; it must be apart from bias.keys, \
         0x4000000000000..0x4000000000100",
    );

    refuses(
        |w| w.lse = Some(Lse::head_major(1 << 54, 1999)),
        "lse.head_stride is 1999; it must be 2000 or more: queries must not share a place",
    );
    refuses(
        |w| w.lse = Some(Lse::token_major(1 << 54, 31)),
        "lse.token_stride is 31; it must be 32 or more: queries must not share a place",
    );
    refuses(
        |w| w.lse = Some(Lse::padded(1 << 54, 32, 999)),
        "lse.head_stride is 999; it must be 1000 or more: queries must not share a place",
    );
    refuses(
        |w| w.lse = Some(Lse { sequence_stride: 31_999, ..Lse::padded(1 << 54, 32, 1000) }),
        "lse.sequence_stride is 31999; it must be 32000 or more: queries must not share a place",
    );
    refuses(
        |w| w.lse = Some(Lse { token_stride: 0, ..Lse::head_major(1 << 54, 2000) }),
        "lse.token_stride is 0; it must be 1 or more: queries must not share a place",
    );
    refuses(
        |w| w.lse = Some(Lse { head_stride: -2000, ..Lse::head_major(1 << 54, 2000) }),
        "lse.head_stride is -2000; it must be 1 or more: queries must not share a place",
    );
    refuses(
        |w| w.lse = Some(Lse { sequence_stride: -32_000, ..Lse::padded(1 << 54, 32, 1000) }),
        "lse.sequence_stride is -32000; it must be 1 or more: queries must not share a place",
    );
    refuses(
        |w| w.lse = Some(Lse { head_stride: i64::MAX, ..Lse::head_major(1 << 54, 2000) }),
        "lse is 0x40000000000000; it must be 285924533142498052017 elements of 4 bytes below 2^63",
    );
    refuses(
        |w| w.lse = Some(Lse::head_major(0, 2000)),
        "lse is 0x0; it must be a device address, a multiple of 4",
    );
    // The last element of the last sequence is the output's first.
    refuses(
        |w| w.lse = Some(Lse::padded(w.out.base + 4 - 4 * (2 * 32 * 1010 - 10), 32, 1010)),
        "lse is 0x3fffffffc0e2c..0x4000000000004; it must be apart from out, 0x4000000000000..0x4000000fa0000",
    );

    refuses(
        |w| w.scores.as_mut().unwrap().window = Window::Last(0),
        "scores.window is 0; it must be 1 to 64 queries",
    );
    refuses(
        |w| w.scores.as_mut().unwrap().window = Window::Last(65),
        "scores.window is 65; it must be 1 to 64 queries",
    );
    refuses(
        |w| w.scores.as_mut().unwrap().base = 0,
        "scores is 0x0; it must be a device address, a multiple of 4",
    );
    refuses(
        |w| w.scores.as_mut().unwrap().head_stride = 999,
        "scores.head_stride is 999; it must be 1000 or more: the keys of the longest sequence",
    );
    refuses(
        |w| w.scores.as_mut().unwrap().sequence_stride = 31_999,
        "scores.sequence_stride is 31999; it must be 32000 or more: 32 heads",
    );
    refuses(
        |w| w.scores.as_mut().unwrap().base = w.out.base,
        "scores is 0x4000000000000..0x400000003e800; it must be apart from out, \
         0x4000000000000..0x4000000fa0000",
    );

    refuses(|w| w.workspace = 0, "workspace is 0x0; it must be a device address, a multiple of 256");
    refuses(
        |w| w.workspace += 128,
        "workspace is 0x8000000000080; it must be a device address, a multiple of 256",
    );
    refuses(
        |w| w.workspace_bytes -= 1,
        "workspace_bytes is 262399; it must be 262400 or more, as prefill_attention_workspace says",
    );
    refuses(
        |w| w.workspace = w.out.base,
        "workspace is 0x4000000000000..0x4000000040100; it must be apart from out, \
         0x4000000000000..0x4000000fa0000",
    );
}

/// The workspace holds the next item, a counter for each (sequence, kv head) with scores, and LSE with
/// scores where the caller wants none.
#[test]
fn workspaces_are_exact() {
    let bytes = |work: PrefillAttention| attention::prefill_attention_workspace(&work).unwrap();
    assert_eq!(bytes(plain()), 256);
    assert_eq!(bytes(scored()), 256 + 32 * 2048 * 4);
    assert_eq!(bytes(PrefillAttention { lse: Some(Lse::head_major(4, 2000)), ..scored() }), 256);
    assert_eq!(bytes(PrefillAttention { sequences: 8, ..scored() }), 512 + 32 * 8000 * 4);
    let packed = Lengths::packed(4096, 1000, 1000);
    assert_eq!(bytes(PrefillAttention { queries: packed, ..scored() }), 256 + 32 * 1024 * 4);
}

/// A failure of the device reaches the caller as it is.
#[test]
fn device_errors_pass() {
    // SAFETY: the recorder touches no memory.
    let error =
        unsafe { attention::prefill_attention(&Recorder::failing(), &prepared(plain())) }.unwrap_err();
    assert!(error.to_string().contains("failed: CUDA error 719 (LAUNCH_FAILED)"), "{error}");
}

/// Rows in shared memory are swizzled so that no access meets another in a bank.
#[test]
#[cfg_attr(not(fastkv_kernels), ignore = "built without nvcc")]
fn shared_memory_has_no_bank_conflicts() {
    for head_dim in [64, 96, 128, 256] {
        let emulator = Emulator::new(Schedule::Eager, (8, 0));
        check(&emulator, &Case::plain(DType::BF16, head_dim, [1, 1], &[(128, 256)])).unwrap();
        let counters = emulator.counters();
        assert!(counters.shared_requests > 1000 && counters.matrix_products > 1000, "{counters:?}");
        assert_eq!(counters.bank_conflicts, 0, "{head_dim}: {counters:?}");
    }
}

const WORKSPACE: u64 = 1 << 51;

const BIAS: Bias = Bias { heads: 4096, keys: 4096, key_stride: 32, value: 1.0 };

/// A layer of Llama 3.1 8B, two sequences of 1000 tokens.
fn plain() -> PrefillAttention {
    PrefillAttention {
        q: Rows::token_major(4096, 1000, 32, 128),
        k: Rows::token_major(4096, 1000, 8, 128),
        v: Rows::token_major(4096, 1000, 8, 128),
        out: Rows::token_major(1 << 50, 1000, 32, 128),
        sequences: 2,
        query_heads: 32,
        kv_heads: 8,
        head_dim: 128,
        dtype: DType::BF16,
        queries: Lengths::dense(1000),
        keys: Lengths::dense(1000),
        scale: default_scale(128),
        ..Default::default()
    }
}

/// The same with keys in 130 pages of 16, of which each sequence has at most 64.
fn paged() -> PrefillAttention {
    PrefillAttention {
        k: Rows::token_major(1 << 40, 16, 8, 128),
        v: Rows::token_major(1 << 41, 16, 8, 128),
        pages: Pages { table: 1 << 42, table_pages: 64, pages: 130, page_size: 16, reserved: 0 },
        keys: Lengths::dense(1000),
        lengths: 1 << 43,
        ..plain()
    }
}

/// The same with FastKV's window.
fn scored() -> PrefillAttention {
    let scores = Scores {
        base: 1 << 52,
        sequence_stride: 32 * 1000,
        head_stride: 1000,
        window: Window::Last(8),
        heads: ScoreHeads::Query,
    };
    PrefillAttention { scores: Some(scores), ..plain() }
}

/// With the workspace that it needs.
fn prepared(work: PrefillAttention) -> PrefillAttention {
    let workspace_bytes = attention::prefill_attention_workspace(&work).unwrap();
    PrefillAttention { workspace: WORKSPACE, workspace_bytes, ..work }
}
