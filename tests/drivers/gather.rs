//! Gathers.

use crate::support::recorder::{Recorded, Recorder};
use fastkv::{
    abi::{Cache, GatherIndicesParams, GatherKvParams, GatherRowsParams, Kept, Pages, Rows, Slots},
    kernels::{DType, Kernel, gather},
};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The rows that a grid reaches: every one of a list, whatever its length, and no more blocks than
    /// there is work for.
    #[test]
    fn grids_cover_long_lists(capacity in 1_i32..=1 << 30, width in prop::sample::select(vec![8_u32, 64, 80, 128, 512])) {
        let recorder = Recorder::default();
        let work = gather::GatherKv {
            kept: Kept { capacity, out_rows: i64::from(capacity) * 8, ..kv().kept },
            k_out: 1 << 50,
            v_out: 1 << 60,
            head_dim: width,
            k: Rows::token_major(4096, 1000, 8, width),
            v: Rows::token_major(4096, 1000, 8, width),
            ..kv()
        };
        // SAFETY: the recorder touches no memory.
        unsafe { gather::gather_kv(&recorder, &work) }.unwrap();
        let Recorded { grid, block, params, .. } = recorder.last();
        let params: GatherKvParams = bytemuck::pod_read_unaligned(&params);
        let tile = (block[0] >> params.lane_shift) * 4;
        prop_assert_eq!(grid, [8, (capacity as u32).div_ceil(tile).min(65_535), 2]);
        prop_assert!(params.row_bytes as u32 == width * 2);
        prop_assert!(params.lane_shift <= 5 && 16 << params.lane_shift >= params.row_bytes.min(512));
    }
}

#[test]
fn gather_kv_fills_its_params() {
    let recorder = Recorder::default();
    // SAFETY: the recorder touches no memory.
    unsafe { gather::gather_kv(&recorder, &kv()) }.unwrap();
    let Recorded { kernel, grid, block, params } = recorder.last();
    assert_eq!((kernel, grid, block), (Kernel::GatherKv, [8, 4, 2], [128, 1, 1]));
    let expected = GatherKvParams {
        kept: kv().kept,
        k: Rows { base: 4096, sequence_stride: 1_024_000, head_stride: 128, token_stride: 1024 },
        v: Rows { base: 4096, sequence_stride: 1_024_000, head_stride: 128, token_stride: 1024 },
        pages: Pages::default(),
        slots: Slots::default(),
        k_out: 1 << 50,
        v_out: 1 << 51,
        row_bytes: 256,
        element_bytes: 2,
        lane_shift: 4,
        reserved: 0,
    };
    assert_eq!(bytemuck::pod_read_unaligned::<GatherKvParams>(&params), expected);
}

#[test]
fn gather_rows_fills_its_params() {
    let recorder = Recorder::default();
    // SAFETY: the recorder touches no memory.
    unsafe { gather::gather_rows(&recorder, &rows()) }.unwrap();
    let Recorded { kernel, grid, block, params } = recorder.last();
    assert_eq!((kernel, grid, block), (Kernel::GatherRows, [100, 1, 1], [128, 1, 1]));
    let params: GatherRowsParams = bytemuck::pod_read_unaligned(&params);
    assert_eq!((params.row_bytes, params.element_bytes, params.out), (8192, 2, 1 << 50));
    assert_eq!(params.rows.token_stride, 4096);
}

#[test]
fn nothing_to_move_launches_nothing() {
    let recorder = Recorder::default();
    let zero = |change: fn(&mut Kept)| {
        let mut kept = Kept { indices: 0, ..kv().kept };
        change(&mut kept);
        // SAFETY: the recorder touches no memory.
        unsafe { gather::gather_kv(&recorder, &gather::GatherKv { kept, k_out: 0, v_out: 0, ..kv() }) }
    };
    zero(|kept| kept.capacity = 0).unwrap();
    zero(|kept| kept.sequences = 0).unwrap();
    zero(|kept| kept.tokens = 0).unwrap();
    zero(|kept| kept.out_rows = 0).unwrap();
    zero(|kept| kept.heads = 0).unwrap();
    assert!(recorder.launches().is_empty());
}

#[test]
fn gather_kv_refuses() {
    let refuses = |change: fn(&mut gather::GatherKv), message: &str| {
        Recorder::refuses(gather::gather_kv, kv(), change, message)
    };
    refuses(|w| w.head_dim = 100, "head_dim is 100; it must be a multiple of 8 from 8 to 536870912 for BF16");
    refuses(|w| w.head_dim = 0, "head_dim is 0; it must be a multiple of 8 from 8 to 536870912 for BF16");
    refuses(
        |w| (w.head_dim, w.dtype) = (u32::MAX - 3, DType::F32),
        "head_dim is 4294967292; it must be a multiple of 4 from 4 to 268435456 for F32",
    );
    refuses(|w| w.kept.heads = -1, "kept.heads is -1; it must be 0 or more");
    refuses(|w| w.kept.capacity = i32::MIN, "kept.capacity is -2147483648; it must be 0 or more");
    refuses(
        |w| w.kept.capacity = (1 << 30) + 1,
        "kept.capacity is 1073741825; it must be at most 1073741824",
    );
    refuses(|w| w.kept.out_rows = -1, "kept.out_rows is -1; it must be 0 or more");
    refuses(
        |w| (w.kept.sequences, w.kept.heads) = (1 << 16, 1 << 15),
        "kept.sequences * kept.heads is 2147483648; it must be at most 2147483647",
    );
    refuses(|w| w.kept.indices = 0, "kept.indices is 0x0; it must be a device address, a multiple of 4");
    refuses(|w| w.kept.starts = 4, "kept.starts is 0x4; it must be a device address, a multiple of 8");
    refuses(|w| w.kept.lengths = 6, "kept.lengths is 0x6; it must be a device address, a multiple of 4");
    refuses(|w| w.kept.index_head_stride = -100, "kept.index_head_stride is -100; it must be 0 or more");
    refuses(
        |w| w.kept.index_head_stride = i64::MAX,
        "kept.indices is 0x1000; it must be 64563604257983430749 elements of 4 bytes below 2^63",
    );
    refuses(
        |w| w.kept.out_rows = 799,
        "kept.out_rows is 799; it must be sequences * heads * capacity = 800 or more where starts is absent",
    );
    refuses(|w| w.k.base = 0, "k is 0x0; it must be a device address, a multiple of 16");
    refuses(|w| w.v.base = 4104, "v is 0x1008; it must be a device address, a multiple of 16");
    refuses(
        |w| w.v.head_stride = 100,
        "v.head_stride is 100; it must be 0 or a positive multiple of 8 for BF16 (16 bytes)",
    );
    refuses(
        |w| w.k.token_stride = -1024,
        "k.token_stride is -1024; it must be 0 or a positive multiple of 8 for BF16 (16 bytes)",
    );
    refuses(|w| w.k.token_stride = 64, "k.token_stride is 64; it must be 128 or more: rows must not overlap");
    refuses(
        |w| w.k.token_stride = i64::MAX - 7,
        "k is 0x1000; it must be 9214148664817921025224 elements of 2 bytes below 2^63",
    );
    refuses(
        |w| w.kept.cu_seqlens = 4096,
        "k.sequence_stride is 1024000; it must be 0 where cu_seqlens packs the sequences along the token axis",
    );
    refuses(|w| w.k_out = 0, "k_out is 0x0; it must be a device address, a multiple of 16");
    refuses(|w| w.v_out = 4096, "v_out is 0x1000..0x33000; it must be apart from k, 0x1000..0x1f5000");
    refuses(
        |w| w.v_out = w.k_out,
        "v_out is 0x4000000000000..0x4000000032000; it must be apart from k_out, \
         0x4000000000000..0x4000000032000",
    );
    refuses(
        |w| w.v_out = (i64::MAX - 4095) as u64,
        "v_out is 0x7ffffffffffff000; it must be 204800 elements of 1 bytes below 2^63",
    );
    refuses(
        |w| {
            w.pages = Pages { table: 4096, table_pages: 63, pages: 100, page_size: 16, reserved: 0 };
            w.kept.cu_seqlens = 4096;
        },
        "kept.cu_seqlens is 0x1000; it must be 0 where there are pages",
    );
    refuses(
        |w| w.slots = Slots { pages: 0, ..slots() },
        "slots.pages is 0; it must be 1 or more where destinations are paged",
    );
}

#[test]
fn gather_kv_refuses_what_is_not_apart() {
    let refuses = |change: fn(&mut gather::GatherKv), message: &str| {
        Recorder::refuses(gather::gather_kv, kv(), change, message)
    };
    refuses(
        |w| (w.kept.indices, w.k_out) = (1 << 30, 1 << 30),
        "k_out is 0x40000000..0x40032000; it must be apart from kept.indices, 0x40000000..0x40000c80",
    );
    refuses(
        |w| w.kept.positions_out = w.kept.indices,
        "kept.positions_out is 0x1000..0x1c80; it must be apart from kept.indices, 0x1000..0x1c80",
    );
    refuses(
        |w| (w.kept.positions, w.kept.positions_out) = (1 << 30, 1 << 30),
        "kept.positions_out is 0x40000000..0x40000c80; it must be apart from kept.positions, \
         0x40000000..0x40000fa0",
    );
    refuses(
        |w| (w.k.base, w.kept.positions_out) = (1 << 40, 1 << 40),
        "kept.positions_out is 0x10000000000..0x10000000c80; it must be apart from k, \
         0x10000000000..0x100001f4000",
    );
    refuses(
        |w| w.kept.positions_out = w.k_out,
        "kept.positions_out is 0x4000000000000..0x4000000000c80; it must be apart from k_out, \
         0x4000000000000..0x4000000032000",
    );
    // A position for each slot of all pages.
    refuses(
        |w| {
            w.slots = Slots { slots: 1 << 30, ..slots() };
            w.kept.positions_out = (1 << 30) - 51_196;
        },
        "kept.positions_out is 0x3fff3804..0x40000004; it must be apart from slots.slots, \
         0x40000000..0x40001900",
    );
}

#[test]
fn paged_destinations_refuse() {
    let refuses = |change: fn(&mut Slots), message: &str| {
        let work = gather::GatherKv { slots: slots(), ..kv() };
        Recorder::refuses(gather::gather_kv, work, |work| change(&mut work.slots), message);
    };
    refuses(|s| s.head_stride = 64, "k_out.head_stride is 64; it must be 128 or more: rows must not overlap");
    refuses(
        |s| s.slot_stride = 512,
        "k_out.token_stride is 512; it must be 1024 or more: rows must not overlap",
    );
    refuses(
        |s| s.page_stride = 15 * 1024,
        "k_out.sequence_stride is 15360; it must be 16384 or more: rows must not overlap",
    );
    // Pages of one head have no stride of heads, and are as dense as they can be.
    let slots = Slots { page_stride: 16 * 128, head_stride: 0, slot_stride: 128, ..slots() };
    let recorder = Recorder::default();
    // SAFETY: the recorder touches no memory.
    unsafe { gather::gather_kv(&recorder, &gather::GatherKv { slots, ..kv() }) }.unwrap();
    assert_eq!(recorder.launches().len(), 1);
}

/// Pages of K and V may take turns, as engines lay them out.
#[test]
fn paged_destinations_may_interleave() {
    let recorder = Recorder::default();
    let work = gather::GatherKv { slots: slots(), v_out: kv().k_out + 2 * 16 * 1024, ..kv() };
    // SAFETY: the recorder touches no memory.
    unsafe { gather::gather_kv(&recorder, &work) }.unwrap();
    assert_eq!(recorder.launches().len(), 1);
}

#[test]
fn gather_rows_refuses() {
    let refuses = |change: fn(&mut gather::GatherRows), message: &str| {
        Recorder::refuses(gather::gather_rows, rows(), change, message)
    };
    refuses(|w| w.width = 4, "width is 4; it must be a multiple of 8 from 8 to 536870912 for BF16");
    refuses(|w| w.kept.heads = 8, "kept.heads is 8; it must be 1: hidden states have no heads");
    refuses(|w| w.kept.sequences = 65_536, "kept.sequences is 65536; it must be at most 65535");
    refuses(
        |w| w.kept.positions_out = w.out,
        "kept.positions_out is 0x4000000000000..0x4000000000190; it must be apart from out, \
         0x4000000000000..0x40000000c8000",
    );
    refuses(|w| w.out = w.rows.base, "out is 0x1000..0xc9000; it must be apart from rows, 0x1000..0x7d1000");
}

#[test]
fn gather_indices_launches_and_refuses() {
    let work = gather::GatherIndices { list: 4096, rows: 8192, out: 1 << 50, length: 1000, count: 257 };
    let recorder = Recorder::default();
    // SAFETY: the recorder touches no memory, here and below.
    unsafe { gather::gather_indices(&recorder, &work) }.unwrap();
    let Recorded { kernel, grid, block, params } = recorder.last();
    assert_eq!((kernel, grid, block), (Kernel::GatherIndices, [2, 1, 1], [256, 1, 1]));
    let expected = GatherIndicesParams { list: 4096, rows: 8192, out: 1 << 50, length: 1000, count: 257 };
    assert_eq!(bytemuck::pod_read_unaligned::<GatherIndicesParams>(&params), expected);
    for (change, message) in [
        (
            gather::GatherIndices { list: 0, ..work },
            "list is 0x0; it must be a device address, a multiple of 4",
        ),
        (
            gather::GatherIndices { rows: 2, ..work },
            "rows is 0x2; it must be a device address, a multiple of 4",
        ),
        (
            gather::GatherIndices { count: 1 << 31, ..work },
            "count is 2147483648; it must be at most 2147483647",
        ),
        (
            gather::GatherIndices { out: 4096, ..work },
            "out is 0x1000..0x1404; it must be apart from list, 0x1000..0x1fa0",
        ),
        (
            gather::GatherIndices { out: 8192, ..work },
            "out is 0x2000..0x2404; it must be apart from rows, 0x2000..0x2404",
        ),
    ] {
        let recorder = Recorder::default();
        // SAFETY: as above.
        let error = unsafe { gather::gather_indices(&recorder, &change) }.expect_err(message);
        assert_eq!(error.to_string(), message);
        assert!(recorder.launches().is_empty());
    }
}

#[test]
fn compact_launches_and_refuses() {
    let recorder = Recorder::default();
    // A paged cache has one length for all heads of a sequence, and the new ones may follow.
    let pages = Pages { table: 4096, table_pages: 7, pages: 100, page_size: 16, reserved: 0 };
    let rows = |base| Rows::token_major(base, 16, 8, 128);
    let cache =
        Cache { k: rows(1 << 50), v: rows(1 << 51), lengths: (1 << 21) - 4, pages, ..compaction().cache };
    // SAFETY: the recorder touches no memory, here and below.
    unsafe { gather::compact(&recorder, &gather::Compact { cache, ..compaction() }) }.unwrap();
    let Recorded { kernel, grid, block, .. } = recorder.last();
    assert_eq!((kernel, grid, block), (Kernel::Compact, [8, 2, 1], [512, 1, 1]));
    // SAFETY: as above.
    unsafe { gather::compact(&recorder, &gather::Compact { index_capacity: 0, indices: 0, ..compaction() }) }
        .unwrap();

    let refuses = |change: fn(&mut gather::Compact), message: &str| {
        Recorder::refuses(gather::compact, compaction(), change, message)
    };
    refuses(|w| w.head_dim = 4, "head_dim is 4; it must be a multiple of 8 from 8 to 536870912 for BF16");
    refuses(
        |w| w.index_capacity = (1 << 30) + 1,
        "index_capacity is 1073741825; it must be at most 1073741824",
    );
    refuses(
        |w| w.cache.capacity = (1 << 30) + 1,
        "cache.capacity is 1073741825; it must be at most 1073741824",
    );
    refuses(|w| w.index_sequence_stride = -1, "index_sequence_stride is -1; it must be 0 or more");
    refuses(|w| w.index_head_stride = -1, "index_head_stride is -1; it must be 0 or more");
    refuses(|w| w.indices = 0, "indices is 0x0; it must be a device address, a multiple of 4");
    refuses(|w| w.kept = 2, "kept is 0x2; it must be a device address, a multiple of 4");
    refuses(|w| w.lengths_out = 0, "lengths_out is 0x0; it must be a device address, a multiple of 4");
    refuses(
        |w| w.lengths_out = w.indices,
        "lengths_out is 0x1000..0x1020; it must be apart from indices, 0x1000..0x1640",
    );
    refuses(
        |w| w.cache.positions = w.indices,
        "cache.positions is 0x1000..0x1c80; it must be apart from indices, 0x1000..0x1640",
    );
    refuses(
        |w| w.lengths_out = w.cache.lengths + 28,
        "lengths_out is 0x10001c..0x10003c; it must be apart from cache.lengths, 0x100000..0x100020",
    );
    refuses(
        |w| w.cache.rows = 799,
        "cache.rows is 799; it must be sequences * heads * capacity = 800 or more where starts is absent",
    );
    refuses(
        |w| w.cache.k.token_stride = 64,
        "cache.k.token_stride is 64; it must be 128 or more: rows must not overlap",
    );
    refuses(
        |w| {
            w.cache.pages = Pages { table: 4096, table_pages: 7, pages: 100, page_size: 16, reserved: 0 };
            (w.cache.k, w.cache.v) =
                (Rows::token_major(1 << 50, 16, 4, 128), Rows::token_major(1 << 51, 16, 8, 128));
        },
        "cache.k.token_stride is 512; it must be 1024 or more: rows must not overlap",
    );
    refuses(
        |w| w.cache.positions = 2,
        "cache.positions is 0x2; it must be a device address, a multiple of 4",
    );
    refuses(
        |w| w.cache.capacities = 2,
        "cache.capacities is 0x2; it must be a device address, a multiple of 4",
    );
}

/// A failure of the device reaches the caller as it is.
#[test]
fn device_errors_pass() {
    let recorder = Recorder::failing();
    // SAFETY: the recorder touches no memory.
    let error = unsafe { gather::gather_kv(&recorder, &kv()) }.unwrap_err();
    assert!(error.to_string().contains("failed: CUDA error 719 (LAUNCH_FAILED)"), "{error}");
}

/// A layer of Llama 3.1 8B, 1000 tokens, 100 kept.
fn kv() -> gather::GatherKv {
    gather::GatherKv {
        kept: Kept {
            indices: 4096,
            index_sequence_stride: 800,
            index_head_stride: 100,
            out_rows: 800,
            sequences: 1,
            heads: 8,
            tokens: 1000,
            capacity: 100,
            ..Kept::default()
        },
        k: Rows::token_major(4096, 1000, 8, 128),
        v: Rows::token_major(4096, 1000, 8, 128),
        pages: Pages::default(),
        slots: Slots::default(),
        k_out: 1 << 50,
        v_out: 1 << 51,
        head_dim: 128,
        dtype: DType::BF16,
    }
}

/// Pages of 16 slots, of K and then of V.
fn slots() -> Slots {
    Slots {
        slots: 4096,
        page_stride: 2 * 16 * 1024,
        head_stride: 128,
        slot_stride: 1024,
        pages: 100,
        page_size: 16,
    }
}

/// A cache of 100 entries for each head, of which 50 stay.
fn compaction() -> gather::Compact {
    gather::Compact {
        cache: Cache {
            k: Rows { base: 1 << 50, token_stride: 128, ..Rows::default() },
            v: Rows { base: 1 << 51, token_stride: 128, ..Rows::default() },
            lengths: 1 << 20,
            rows: 800,
            capacity: 100,
            sequences: 1,
            heads: 8,
            ..Cache::default()
        },
        indices: 4096,
        index_sequence_stride: 400,
        index_head_stride: 50,
        index_capacity: 50,
        kept: 0,
        lengths_out: 1 << 21,
        head_dim: 128,
        dtype: DType::BF16,
    }
}

fn rows() -> gather::GatherRows {
    gather::GatherRows {
        kept: Kept { heads: 1, out_rows: 100, ..kv().kept },
        rows: Rows::token_major(4096, 1000, 1, 4096),
        out: 1 << 50,
        width: 4096,
        dtype: DType::BF16,
    }
}
