//! Selections.

use crate::support::{
    emulator::Emulator,
    random::Random,
    recorder::{Recorded, Recorder, Resources},
    select::{Case, check},
};
use fastkv::{
    abi::{Pooling, SelectParams},
    kernels::{
        Kernel,
        batch::{Lengths, ScoreRows},
        images,
        select::{self, Form, Reduction, SelectTopk},
    },
};
use proptest::prelude::*;
use ptx_emulator::Schedule;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// The blocks of a long row reach every item, in chunks that a block has room for; the parts of the
    /// workspace lie in it, one behind the other.
    #[test]
    fn grids_cover_long_rows(keys in 1_u32..=1 << 27, page in 1_u32..5000, rows in 1_u32..40) {
        let recorder = Recorder::default();
        let mut work = SelectTopk {
            keys: Lengths::dense(keys),
            page,
            rows,
            form: Some(Form::Grid),
            ..work()
        };
        work.scores.head_stride = keys.into();
        work.workspace_bytes = select::select_topk_workspace(&recorder, &work).unwrap();
        // SAFETY: the recorder touches no memory.
        unsafe { select::select_topk(&recorder, &work) }.unwrap();
        for Recorded { grid, params, .. } in recorder.launches() {
            let params: SelectParams = bytemuck::pod_read_unaligned(&params);
            let items = u64::from(keys.div_ceil(params.page as u32));
            let chunk = params.chunk as u64;
            prop_assert!(chunk.is_multiple_of(4) && (4..=4096).contains(&chunk));
            prop_assert!(chunk == 4 || chunk * u64::from(page) <= 4096);
            prop_assert_eq!(grid, [rows * 2, items.div_ceil(chunk) as u32, 1]);
            let rows = u64::from(rows) * 2;
            prop_assert!(params.rank_stride as u64 >= items && params.rank_stride % 4 == 0);
            prop_assert!(params.ranks >= params.states + rows * 24608 && params.ranks.is_multiple_of(16));
            prop_assert!(params.splits >= params.ranks + rows * params.rank_stride as u64 * 4);
            let end = params.splits + rows * u64::from(grid[1]) * 8;
            prop_assert!((end..end + 256).contains(&(work.workspace + work.workspace_bytes as u64)));
        }
    }
}

/// Instructions of PTX for 128 items of a warp, on the way from scores to indices: beside barriers they are what
/// the time of a long row goes by.
#[test]
#[cfg_attr(not(fastkv_kernels), ignore = "built without nvcc")]
fn items_take_few_instructions() {
    assert!(images::built());
    const ITEMS: [usize; 2] = [65_536, 98_304];
    let mut random = Random(1);
    let scores: Vec<f32> = (0..ITEMS[1]).map(|_| random.symmetric()).collect();
    for (form, bar) in [(Form::Cluster, 250), (Form::Grid, 300)] {
        let [fewer, more] = ITEMS.map(|items| {
            let emulator = Emulator::new(Schedule::Eager, (9, 0));
            check(&emulator, form, vec![Case::plain(vec![scores[..items].to_vec()], vec![2048])]).unwrap();
            emulator.counters().warp_instructions
        });
        let each = (more - fewer) * 128 / (ITEMS[1] - ITEMS[0]) as u64;
        assert!(each <= bar, "{form:?}: {each} instructions, the bar is {bar}");
    }
}

#[test]
fn short_rows_have_a_block() {
    let recorder = Recorder::hopper();
    // SAFETY: the recorder touches no memory.
    unsafe { select::select_topk(&recorder, &work()) }.unwrap();
    let Recorded { kernel, grid, block, params } = recorder.last();
    assert_eq!((kernel, grid, block), (Kernel::SelectBlock, [16, 1, 1], [512, 1, 1]));
    assert_eq!(recorder.resources(), [Resources { cluster: [1; 3], shared_bytes: 8528 + 4 * 1000 }]);
    let expected = SelectParams {
        scores: 1 << 20,
        sequence_stride: 32_000,
        head_stride: 1000,
        lengths: 4096,
        cu_seqlens: 0,
        counts: 8192,
        kept: 1 << 40,
        kept_lengths: 1 << 41,
        states: 1 << 42,
        ranks: 1 << 42,
        splits: 1 << 42,
        rank_stride: 1000,
        keys: 1000,
        window: 8,
        tail: 8,
        sinks: 4,
        rows: 8,
        groups: 1,
        heads: 4,
        reduction: 0,
        pooling: Pooling { kind: 0, kernel: 7 },
        page: 1,
        count: 100,
        capacity: 120,
        chunk: 4096,
        digit: 0,
        reserved: 0,
    };
    assert_eq!(bytemuck::pod_read_unaligned::<SelectParams>(&params), expected);
    assert_eq!(select::select_topk_workspace(&recorder, &work()), Ok(0));
}

/// By the keys, of which large pages have many for each item.
#[test]
fn long_rows_have_a_grid() {
    for (keys, page, kernels) in [(16_384, 1, 1), (16_385, 1, 5), (16_385, 1000, 5)] {
        let recorder = Recorder::default();
        let work = SelectTopk { keys: Lengths::dense(keys), page, ..work() };
        // SAFETY: the recorder touches no memory.
        unsafe { select::select_topk(&recorder, &work) }.unwrap();
        assert_eq!(recorder.launches().len(), kernels);
    }
    let recorder = Recorder::default();
    // SAFETY: the recorder touches no memory.
    unsafe { select::select_topk(&recorder, &SelectTopk { keys: Lengths::dense(16_385), ..work() }) }
        .unwrap();
    let launches = recorder.launches();
    let digits = launches
        .iter()
        .map(|launch| (launch.kernel, bytemuck::pod_read_unaligned::<SelectParams>(&launch.params).digit));
    assert!(digits.eq([
        (Kernel::SelectRank, 0),
        (Kernel::SelectDigit, 1),
        (Kernel::SelectDigit, 2),
        (Kernel::SelectSplit, 2),
        (Kernel::SelectWrite, 2),
    ]));
}

/// So that no product of it with a number of items that a row has is more than 32 bits hold.
#[test]
fn pages_are_no_larger_than_rows() {
    let recorder = Recorder::default();
    // SAFETY: the recorder touches no memory.
    unsafe { select::select_topk(&recorder, &SelectTopk { page: i32::MAX as u32, ..work() }) }.unwrap();
    let params: SelectParams = bytemuck::pod_read_unaligned(&recorder.last().params);
    assert_eq!(params.page, 1000);
}

/// Where there is code for it.
#[test]
fn long_rows_have_a_cluster_on_hopper() {
    let built = images::images().iter().any(|image| image.name == "sm90_select");
    for (keys, shared_bytes) in [(16_385, 25_424 + 4 * 2052), (393_216, 25_424 + 4 * 49_152), (393_217, 0)] {
        let recorder = Recorder::hopper();
        let work = SelectTopk { keys: Lengths::dense(keys), ..work() };
        // SAFETY: the recorder touches no memory.
        unsafe { select::select_topk(&recorder, &work) }.unwrap();
        let Recorded { kernel, grid, .. } = recorder.last();
        if built && keys <= 393_216 {
            assert_eq!((kernel, grid), (Kernel::SelectCluster, [8 * 16, 1, 1]));
            assert_eq!(recorder.resources(), [Resources { cluster: [8, 1, 1], shared_bytes }]);
            assert!(shared_bytes <= 227 << 10);
        } else {
            if built {
                let error = select::select_topk_workspace(
                    &recorder,
                    &SelectTopk { form: Some(Form::Cluster), ..work },
                );
                let message = "form is Cluster for 393217 items; it must be another for more than 393216";
                assert_eq!(error.unwrap_err().to_string(), message);
            }
            assert_eq!((kernel, grid[0]), (Kernel::SelectWrite, 16));
        }
    }
}

#[test]
fn no_rows_launch_nothing() {
    for (sequences, rows) in [(0, 8), (2, 0)] {
        let recorder = Recorder::default();
        let work = SelectTopk { sequences, rows, kept: 0, kept_lengths: 0, ..work() };
        // SAFETY: the recorder touches no memory.
        unsafe { select::select_topk(&recorder, &work) }.unwrap();
        assert!(recorder.launches().is_empty());
    }
}

/// Rows without keys or places still have lengths, and their places are emptied.
#[test]
fn empty_rows_are_launched() {
    let no_scores = ScoreRows { base: 0, sequence_stride: 0, head_stride: 0 };
    let recorder = Recorder::default();
    for work in [
        SelectTopk { keys: Lengths::dense(8), scores: no_scores, ..work() },
        SelectTopk { keys: Lengths::dense(0), scores: no_scores, ..work() },
        SelectTopk { capacity: 0, kept: 0, ..work() },
        SelectTopk { count: 0, counts: 0, ..work() },
    ] {
        // SAFETY: the recorder touches no memory.
        unsafe { select::select_topk(&recorder, &work) }.unwrap();
    }
    assert_eq!(recorder.launches().len(), 4);
}

#[test]
fn select_topk_refuses() {
    let refuses = |change: fn(&mut SelectTopk), message: &str| {
        Recorder::refuses(select::select_topk, work(), change, message)
    };
    refuses(|w| w.groups = 0, "groups is 0; it must be from 1 to 2147483647");
    refuses(|w| w.heads = 0, "heads is 0; it must be from 1 to 2147483647");
    refuses(|w| w.page = 0, "page is 0; it must be from 1 to 2147483647");
    refuses(|w| w.sinks = u32::MAX, "sinks is 4294967295; it must be from 0 to 2147483647");
    refuses(|w| w.window = 1 << 31, "window is 2147483648; it must be from 0 to 2147483647");
    refuses(|w| w.capacity = 1 << 31, "capacity is 2147483648; it must be from 0 to 2147483647");
    refuses(|w| w.count = 1 << 31, "count is 2147483648; it must be from 0 to 2147483647");
    refuses(|w| w.pooling.kernel = 4, "pooling.kernel is 4; it must be an odd number from 1 to 63");
    refuses(|w| w.pooling.kernel = 65, "pooling.kernel is 65; it must be an odd number from 1 to 63");
    refuses(|w| w.pooling.kind = 2, "pooling.kind is 2; it must be 0 for max or 1 for average");
    refuses(
        |w| w.tail = 9,
        "tail is 9; it must be at most window = 8: keys with a score compete for their place",
    );
    refuses(
        |w| w.keys = Lengths::dense((1 << 27) + 1),
        "keys.longest is 134217729; it must be at most 134217728",
    );
    refuses(
        |w| w.keys.longest = 999,
        "keys.longest is 999; it must be without cu_seqlens the tokens there are, 1000",
    );
    refuses(
        |w| (w.sequences, w.rows) = (1 << 14, 1 << 14),
        "sequences * rows is 268435456; it must be at most 268435455",
    );
    refuses(|w| w.heads = 1 << 28, "rows * groups * heads is 2147483648; it must be at most 2147483647");
    refuses(|w| w.scores.head_stride = -1, "scores.head_stride is -1; it must be 0 or more");
    refuses(|w| w.scores.sequence_stride = -4, "scores.sequence_stride is -4; it must be 0 or more");
    refuses(|w| w.scores.base = 0, "scores is 0x0; it must be a device address, a multiple of 4");
    refuses(|w| w.scores.base = 4098, "scores is 0x1002; it must be a device address, a multiple of 4");
    refuses(
        |w| w.scores.head_stride = i64::MAX,
        "scores is 0x100000; it must be 285924533142498083009 elements of 4 bytes below 2^63",
    );
    refuses(|w| w.lengths = 2, "lengths is 0x2; it must be a device address, a multiple of 4");
    refuses(|w| w.counts = 5, "counts is 0x5; it must be a device address, a multiple of 4");
    refuses(
        |w| w.keys.cu_seqlens = 3,
        "keys.cu_seqlens is 0x3; it must be a device address, a multiple of 4",
    );
    refuses(|w| w.kept = 0, "kept is 0x0; it must be a device address, a multiple of 4");
    refuses(|w| w.kept_lengths = 0, "kept_lengths is 0x0; it must be a device address, a multiple of 4");
    refuses(
        |w| w.kept_lengths = w.counts,
        "kept_lengths is 0x2000..0x2040; it must be apart from counts, 0x2000..0x2040",
    );
    refuses(
        |w| w.kept = w.kept_lengths,
        "kept_lengths is 0x20000000000..0x20000000040; it must be apart from kept, 0x20000000000..0x20000001e00",
    );
    refuses(
        |w| w.kept = w.scores.base,
        "kept is 0x100000..0x101e00; it must be apart from scores, 0x100000..0x13e7e0",
    );
    refuses(
        |w| (w.form, w.workspace_bytes) = (Some(Form::Grid), 457_983),
        "workspace_bytes is 457983; it must be 457984 or more, as select_topk_workspace says",
    );
    refuses(
        |w| (w.form, w.workspace) = (Some(Form::Grid), 8),
        "workspace is 0x8; it must be a device address, a multiple of 256",
    );
    refuses(
        |w| (w.form, w.workspace) = (Some(Form::Grid), w.kept),
        "workspace is 0x10000000000..0x1000006fd00; it must be apart from kept, 0x10000000000..0x10000001e00",
    );
    refuses(
        |w| w.form = Some(Form::Cluster),
        "form is Cluster; it must be another: its kernel is for compute capability 9.0, and built for it",
    );
    refuses(
        |w| (w.form, w.keys) = (Some(Form::Block), Lengths::dense(16_385)),
        "form is Block for 16385 items; it must be another for more than 16384",
    );
}

/// Sizes are computed in full where no machine has that much.
#[test]
fn workspaces_may_be_huge() {
    let work = SelectTopk { sequences: 1 << 27, rows: 1, keys: Lengths::dense(1 << 27), ..work() };
    let bytes = select::select_topk_workspace(&Recorder::default(), &work).unwrap();
    assert!(bytes as u128 >= 4 << 54);
}

/// A failure of the device reaches the caller as it is.
#[test]
fn device_errors_pass() {
    for form in [Form::Block, Form::Grid] {
        let recorder = Recorder::failing();
        // SAFETY: the recorder touches no memory.
        let error = unsafe { select::select_topk(&recorder, &SelectTopk { form: Some(form), ..work() }) }
            .unwrap_err();
        assert!(error.to_string().contains("failed: CUDA error 719 (LAUNCH_FAILED)"), "{error}");
    }
}

/// Two sequences of up to 1000 keys of Llama 3.1 8B, 100 kept.
fn work() -> SelectTopk {
    SelectTopk {
        scores: ScoreRows { base: 1 << 20, sequence_stride: 32_000, head_stride: 1000 },
        sequences: 2,
        rows: 8,
        groups: 1,
        heads: 4,
        keys: Lengths::dense(1000),
        lengths: 4096,
        window: 8,
        tail: 8,
        sinks: 4,
        pooling: Pooling::max(7),
        reduction: Reduction::Sum,
        page: 1,
        count: 100,
        counts: 8192,
        kept: 1 << 40,
        kept_lengths: 1 << 41,
        capacity: 120,
        workspace: 1 << 42,
        workspace_bytes: 1 << 40,
        form: None,
    }
}
