//! Scores added up, gathered and raised; keys marked.

use crate::support::recorder::{Recorded, Recorder};
use fastkv::{
    abi::{AddScoresParams, MarkKeysParams, ScoreTable as Table},
    kernels::{
        Error, Kernel,
        sums::{
            AddScores, GatherScores, MarkKeys, RaiseScores, ScoreTable, add_scores, gather_scores, mark_keys,
            raise_scores,
        },
    },
};

fn table(place: u64, keys: u32) -> ScoreTable {
    ScoreTable { base: place << 40, head_stride: 1024, keys }
}

fn add() -> AddScores {
    AddScores { a: table(1, 1000), b: table(2, 900), out: table(3, 1000), heads: 8 }
}

fn gather() -> GatherScores {
    GatherScores { scores: table(1, 1000), out: table(2, 100), entries: 3 << 40, entry_stride: 100, heads: 8 }
}

fn raise() -> RaiseScores {
    RaiseScores {
        scores: table(1, 1000),
        positions: 2 << 40,
        marked: 3 << 40,
        marked_positions: 500,
        heads: 8,
    }
}

fn mark() -> MarkKeys {
    MarkKeys {
        positions: 1 << 40,
        starts: 2 << 40,
        lengths: 3 << 40,
        marked: 4 << 40,
        out: 5 << 40,
        rows: 8000,
        marked_positions: 500,
        lists: 8,
        words: 32,
    }
}

#[test]
fn a_thread_for_each_column() {
    let recorder = Recorder::default();
    // SAFETY: the recorder touches no memory, here and below.
    unsafe {
        add_scores(&recorder, &add()).unwrap();
        gather_scores(&recorder, &gather()).unwrap();
        raise_scores(&recorder, &raise()).unwrap();
        mark_keys(&recorder, &mark()).unwrap();
    }
    let launches = recorder.launches();
    let grids: Vec<_> = launches.iter().map(|launch| (launch.kernel, launch.grid, launch.block[0])).collect();
    let expected = [
        (Kernel::AddScores, [4, 8, 1], 256),
        (Kernel::GatherScores, [1, 8, 1], 256),
        (Kernel::RaiseScores, [4, 8, 1], 256),
        (Kernel::MarkKeys, [4, 8, 1], 256),
    ];
    assert_eq!(grids, expected);
    let Recorded { params, .. } = &launches[0];
    let of = |place: u64, keys| Table { base: place << 40, head_stride: 1024, keys, reserved: 0 };
    let expected = AddScoresParams { a: of(1, 1000), b: of(2, 900), out: of(3, 1000) };
    assert_eq!(bytemuck::pod_read_unaligned::<AddScoresParams>(params), expected);
    let params: MarkKeysParams = bytemuck::pod_read_unaligned(&launches[3].params);
    assert_eq!((params.rows, params.marked_positions, params.words), (8000, 500, 32));
}

#[test]
fn nothing_to_do_launches_nothing() {
    let recorder = Recorder::default();
    let none = ScoreTable { base: 0, head_stride: 0, keys: 0 };
    // SAFETY: as above.
    unsafe {
        add_scores(&recorder, &AddScores { a: none, b: none, out: none, heads: 8 }).unwrap();
        add_scores(&recorder, &AddScores { heads: 0, ..add() }).unwrap();
        gather_scores(&recorder, &GatherScores { out: none, ..gather() }).unwrap();
        raise_scores(&recorder, &RaiseScores { marked_positions: 0, ..raise() }).unwrap();
        raise_scores(&recorder, &RaiseScores { scores: none, ..raise() }).unwrap();
        mark_keys(&recorder, &MarkKeys { lists: 0, ..mark() }).unwrap();
        mark_keys(&recorder, &MarkKeys { words: 0, ..mark() }).unwrap();
    }
    assert!(recorder.launches().is_empty());
}

#[test]
fn refuses() {
    let recorder = Recorder::default();
    let refused = |result: Result<(), Error>, message: &str| {
        assert_eq!(result.expect_err(message).to_string(), message);
        assert!(recorder.launches().is_empty(), "{message}");
    };
    // SAFETY: as above.
    unsafe {
        let out = table(3, 999);
        refused(
            add_scores(&recorder, &AddScores { out, ..add() }),
            "out.keys is 999; it must be 1000, as many as the longer one has",
        );
        let a = ScoreTable { head_stride: 999, ..table(1, 1000) };
        refused(
            add_scores(&recorder, &AddScores { a, ..add() }),
            "a.head_stride is 999; it must be 1000 or more: the keys of a head",
        );
        refused(
            add_scores(&recorder, &AddScores { heads: 65_536, ..add() }),
            "heads is 65536; it must be at most 65535",
        );
        refused(
            add_scores(&recorder, &AddScores { out: table(1, 1000), ..add() }),
            "out is 0x10000000000..0x10000007fa0; it must be apart from a, 0x10000000000..0x10000007fa0",
        );
        refused(
            gather_scores(&recorder, &GatherScores { entries: 0, ..gather() }),
            "entries is 0x0; it must be a device address, a multiple of 4",
        );
        refused(
            gather_scores(&recorder, &GatherScores { entry_stride: -1, ..gather() }),
            "entry_stride is -1; it must be 0 or more",
        );
        refused(
            gather_scores(&recorder, &GatherScores { out: table(3, 100), ..gather() }),
            "out is 0x30000000000..0x30000007190; it must be apart from entries, \
             0x30000000000..0x30000000c80",
        );
        let scores = table(1, (1 << 30) + 1);
        refused(
            gather_scores(&recorder, &GatherScores { scores, ..gather() }),
            "scores.keys is 1073741825; it must be at most 1073741824",
        );
        refused(
            raise_scores(&recorder, &RaiseScores { marked_positions: u32::MAX, ..raise() }),
            "marked_positions is 4294967295; it must be at most 2147483647",
        );
        refused(
            raise_scores(&recorder, &RaiseScores { positions: 1 << 40, ..raise() }),
            "scores is 0x10000000000..0x10000007fa0; it must be apart from positions, \
             0x10000000000..0x10000000fa0",
        );
        refused(
            raise_scores(&recorder, &RaiseScores { marked: 2, ..raise() }),
            "marked is 0x2; it must be a device address, a multiple of 4",
        );
        refused(
            mark_keys(&recorder, &MarkKeys { words: (1 << 25) + 1, ..mark() }),
            "words is 33554433; it must be at most 33554432",
        );
        refused(
            mark_keys(&recorder, &MarkKeys { lists: 65_536, ..mark() }),
            "lists is 65536; it must be at most 65535",
        );
        refused(
            mark_keys(&recorder, &MarkKeys { marked: 0, marked_positions: 1, ..mark() }),
            "marked is 0x0; it must be a device address, a multiple of 4",
        );
        refused(
            mark_keys(&recorder, &MarkKeys { rows: u64::MAX, ..mark() }),
            "positions is 0x10000000000; it must be 18446744073709551615 elements of 4 bytes below 2^63",
        );
        refused(
            mark_keys(&recorder, &MarkKeys { out: 4 << 40, ..mark() }),
            "out is 0x40000000000..0x40000000400; it must be apart from marked, 0x40000000000..0x40000000040",
        );
    }
}

/// A launch that fails says which, how large, and with what.
#[test]
fn a_failed_launch_names_kernel_grid_and_parameters() {
    let recorder = Recorder::failing();
    // SAFETY: as above.
    let error = unsafe { raise_scores(&recorder, &raise()) }.expect_err("a failing device").to_string();
    for part in [
        "launching fastkv_raise_scores failed: CUDA error 719 (LAUNCH_FAILED)",
        "grid [4, 8, 1]",
        "block [256, 1, 1]",
        "RaiseScoresParams { scores: ScoreTable { base: 1099511627776, head_stride: 1024, keys: 1000",
        "marked_positions: 500",
    ] {
        assert!(error.contains(part), "no {part} in {error}");
    }
}
