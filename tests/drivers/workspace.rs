//! What the drivers say of workspaces ahead of any work: sizes alone count, and the largest work needs the most.

use fastkv::{
    abi::{Cache, Pages, Pooling, Rows},
    kernels::{
        DType, Launcher,
        attention::{PrefillAttention, prefill_attention_workspace},
        batch::{Lengths, ScoreHeads, ScoreRows, Scores, Window},
        decode::{Decode, decode_workspace},
        scores::{WindowScores, window_scores_workspace},
        select::{Reduction, SelectTopk, select_topk_workspace},
    },
};
use proptest::prelude::*;

use crate::support::recorder::Recorder;

/// Bounds of a batch, with no address at all.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    sequences: u32,
    kv_heads: u32,
    /// Of a prompt; of the list of a cache.
    longest: u32,
    tokens: u32,
}

fn workspaces(launcher: &Recorder, bounds: Bounds, group: u32, window: u32, page: u32) -> [usize; 4] {
    let Bounds { sequences, kv_heads, longest, tokens } = bounds;
    let query_heads = group * kv_heads;
    let lengths = Lengths { cu_seqlens: 0, tokens: longest, longest };
    let scores = Scores {
        base: 0,
        sequence_stride: 0,
        head_stride: 0,
        window: Window::Last(window),
        heads: ScoreHeads::Query,
    };
    let attention = PrefillAttention {
        sequences,
        query_heads,
        kv_heads,
        head_dim: 128,
        dtype: DType::F16,
        queries: lengths,
        keys: lengths,
        scale: 1.0,
        scores: Some(scores),
        ..Default::default()
    };
    let alone = WindowScores {
        q: Rows::default(),
        k: Rows::default(),
        sequences,
        query_heads,
        kv_heads,
        head_dim: 128,
        dtype: DType::F16,
        queries: Lengths::dense(window.min(longest)),
        keys: lengths,
        scale: 1.0,
        scores,
        ..Default::default()
    };
    let selection = SelectTopk {
        scores: ScoreRows { base: 0, sequence_stride: 0, head_stride: 0 },
        sequences,
        rows: kv_heads,
        groups: 1,
        heads: group,
        keys: lengths,
        lengths: 0,
        window: 0,
        tail: 0,
        sinks: 0,
        pooling: Pooling::NONE,
        reduction: Reduction::Sum,
        page,
        count: 1,
        counts: 0,
        kept: 0,
        kept_lengths: 0,
        capacity: 1,
        workspace: 0,
        workspace_bytes: 0,
        form: None,
    };
    let step = Decode {
        cache: Cache {
            pages: Pages::default(),
            capacity: longest as i32,
            sequences: sequences as i32,
            heads: kv_heads as i32,
            ..Cache::default()
        },
        q: Rows::default(),
        k_new: Rows::default(),
        v_new: Rows::default(),
        out: Rows::default(),
        positions_new: 0,
        lse: None,
        full: 0,
        bias: None,
        bias_positions: 0,
        scale: 1.0,
        query_heads,
        tokens,
        head_dim: 128,
        dtype: DType::F16,
        counters: 0,
        workspace: 0,
        workspace_bytes: 0,
    };
    [
        prefill_attention_workspace(&attention),
        window_scores_workspace(&alone),
        select_topk_workspace(launcher, &selection),
        decode_workspace(&step),
    ]
    .map(|bytes| bytes.expect("sizes that can be right"))
}

fn bounds() -> impl Strategy<Value = Bounds> {
    // On both sides of what one block, and one cluster, can select from.
    let longest = prop_oneof![0..300_u32, 16_000..17_000_u32, 300_000..500_000_u32];
    (0..5_u32, 1..5_u32, longest, 1..=8_u32).prop_map(|(sequences, kv_heads, longest, tokens)| Bounds {
        sequences,
        kv_heads,
        longest,
        tokens,
    })
}

proptest! {
    #[test]
    fn the_largest_work_needs_the_most(
        a in bounds(), b in bounds(), group in 1..=16_u32, window in 1..=64_u32, page in prop_oneof![Just(1_u32), Just(16)],
    ) {
        let largest = Bounds {
            sequences: a.sequences.max(b.sequences),
            kv_heads: a.kv_heads.max(b.kv_heads),
            longest: a.longest.max(b.longest),
            tokens: a.tokens.max(b.tokens),
        };
        for launcher in [Recorder::default(), Recorder::hopper()] {
            let most = workspaces(&launcher, largest, group, window, page);
            for bounds in [a, b] {
                let needed = workspaces(&launcher, bounds, group, window, page);
                prop_assert!(
                    needed.iter().zip(&most).all(|(needed, most)| needed <= most),
                    "compute capability {:?}: {needed:?} for {bounds:?}, {most:?} for {largest:?}",
                    launcher.compute_capability(),
                );
            }
        }
    }
}
