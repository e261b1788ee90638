//! Sums over columns.

use crate::support::recorder::{Recorded, Recorder};
use fastkv::{
    abi::{ColumnSumsParams, Rows},
    kernels::{
        DType, Kernel,
        batch::{Lengths, Lse, ScoreHeads, Scores, Window, default_scale},
        columns::{ColumnSums, column_sums},
        scores::WindowScores,
    },
};

/// 4096 queries, the last of 10000 keys, of Llama 3.1 8B.
fn work() -> ColumnSums {
    ColumnSums {
        sums: WindowScores {
            q: Rows::token_major(1 << 40, 4096, 32, 128),
            k: Rows::head_major(1 << 41, 8, 10_000, 128),
            sequences: 1,
            query_heads: 32,
            kv_heads: 8,
            head_dim: 128,
            dtype: DType::BF16,
            queries: Lengths::dense(4096),
            keys: Lengths::dense(10_000),
            scale: default_scale(128),
            lse: Some(Lse::head_major(1 << 42, 4096)),
            scores: Scores {
                base: 1 << 50,
                sequence_stride: 0,
                head_stride: 10_000,
                window: Window::All,
                heads: ScoreHeads::Group,
            },
            ..Default::default()
        },
        weight: 1.0,
        step: 0.25,
        band: Some(3000),
    }
}

#[test]
fn fills_its_params() {
    let recorder = Recorder::default();
    // SAFETY: the recorder touches no memory, here and below.
    unsafe { column_sums(&recorder, &work()) }.unwrap();
    let Recorded { kernel, grid, block, params } = recorder.last();
    // More queries than stay in shared memory: a block has a step of keys.
    assert_eq!((kernel, grid, block), (Kernel::ColumnSumsBf16D128, [79, 8, 1], [128, 1, 1]));
    let params: ColumnSumsParams = bytemuck::pod_read_unaligned(&params);
    assert_eq!((params.weight, params.step, params.band), (1.0, 0.25, 3000));
    let sums = params.sums;
    assert_eq!((sums.window, sums.score_heads, sums.slots, sums.block_keys), (4096, 8, 2, 128));
    assert_eq!((sums.lse, sums.positions, sums.partials), (Lse::head_major(1 << 42, 4096).into(), 0, 0));

    // No band reaches beyond the keys.
    for band in [None, Some(u32::MAX), Some(10_000)] {
        // SAFETY: as above.
        unsafe { column_sums(&recorder, &ColumnSums { band, ..work() }) }.unwrap();
        let params: ColumnSumsParams = bytemuck::pod_read_unaligned(&recorder.last().params);
        assert_eq!(params.band, 10_000);
    }
}

#[test]
fn refuses() {
    let refuses =
        |change: fn(&mut ColumnSums), message: &str| Recorder::refuses(column_sums, work(), change, message);
    refuses(|w| w.sums.scores.window = Window::Last(8), "sums.scores.window is Last(8); it must be All");
    refuses(|w| w.sums.scores.heads = ScoreHeads::Query, "sums.scores.heads is Query; it must be Group");
    refuses(
        |w| w.sums.positions = 4096,
        "sums.positions is 0x1000; it must be 0: the queries are the last of the keys",
    );
    refuses(|w| w.weight = f32::NAN, "weight is NaN; it must be a finite number");
    refuses(|w| w.step = f32::INFINITY, "step is inf; it must be a finite number");
    refuses(|w| w.sums.lse = None, "lse is None; it must be given where scores.window is All");
    refuses(|w| w.sums.head_dim = 80, "head_dim is 80; it must be 64, 96, 128 or 256");
}

#[test]
fn nothing_to_sum_launches_nothing() {
    let recorder = Recorder::default();
    let mut work = work();
    work.sums.keys = Lengths::dense(0);
    // SAFETY: as above.
    unsafe { column_sums(&recorder, &work) }.unwrap();
    assert!(recorder.launches().is_empty());
}
