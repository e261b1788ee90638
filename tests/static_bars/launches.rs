//! The blocks that the drivers launch, of every kernel on every chip: for long prompts of Llama 3.1 8B, with heads of
//! every size, and for as many keys as a form of a selection takes.

use std::{collections::BTreeMap, sync::LazyLock};

use fastkv::{
    abi::{Cache, Kept, Pages, Pooling, Rows},
    kernels::{
        DType, Error, Launcher,
        activation::{Add, Convert, SiluMul, add, convert, silu_mul},
        attention::{Form, PrefillAttention, prefill_attention},
        batch::{Lengths, Lse, ScoreHeads, ScoreRows, Scores, Window},
        columns::{ColumnSums, column_sums},
        decode::{Decode, decode},
        embed::{Embed, embed},
        gather::{
            Compact, GatherIndices, GatherKv, GatherRows, compact, gather_indices, gather_kv, gather_rows,
        },
        norm::{RmsNorm, rms_norm},
        rope::{Rope, rope},
        sample::{Sample, sample},
        scores::{PoolScores, WindowScores, pool_scores, window_scores},
        select::{self, SelectTopk, select_topk},
        share::{ShareKeys, share_keys},
        sums::{
            AddScores, GatherScores, MarkKeys, RaiseScores, ScoreTable, add_scores, gather_scores, mark_keys,
            raise_scores,
        },
    },
};

use crate::{recorder::Recorder, sass::Compiled};

/// A block as a driver launches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Block {
    /// Bytes of dynamic shared memory.
    pub(crate) shared_bytes: u32,
    pub(crate) threads: u32,
}

/// The largest block that is launched of a kernel; `None` where no launch here needs it.
pub(crate) fn block(kernel: &Compiled) -> Option<Block> {
    static BLOCKS: LazyLock<BTreeMap<(&str, &str), Block>> = LazyLock::new(|| {
        let mut blocks = BTreeMap::new();
        for (arch, chip) in [("sm_80", (8, 0)), ("sm_89", (8, 9)), ("sm_90", (9, 0))] {
            let device = Recorder::of(chip);
            launch_all(&device).expect("descriptions that drivers accept");
            for (launch, resources) in device.launches().iter().zip(device.resources()) {
                let block =
                    Block { shared_bytes: resources.shared_bytes, threads: launch.block.iter().product() };
                let largest = blocks.entry((arch, launch.kernel.entry())).or_insert(block);
                *largest = block.max(*largest);
            }
        }
        blocks
    });
    BLOCKS.get(&(kernel.arch.trim_end_matches('a'), &*kernel.entry)).copied()
}

const TOKENS: u32 = 128 << 10;
const QUERY_HEADS: u32 = 32;
const KV_HEADS: u32 = 8;
const HIDDEN: u32 = 4096;
const MLP: u32 = 14_336;
const VOCABULARY: u32 = 128_256;
const WINDOW: u32 = 8;
const PAGE: u32 = 16;

/// Addresses far apart.
const fn place(number: u64) -> u64 {
    number << 40
}

const WORKSPACE: u64 = place(30);
const WORKSPACE_BYTES: usize = 1 << 40;

fn launch_all(device: &Recorder) -> Result<(), Error> {
    for dtype in [DType::F16, DType::BF16] {
        for head_dim in [64, 96, 128, 256] {
            with_heads(device, dtype, head_dim)?;
        }
    }
    selections(device)?;
    movements(device)?;
    forward(device)?;
    sums(device)
}

fn matrix(number: u64, width: u32) -> Rows {
    Rows::packed(place(number), 1, width)
}

/// Attention with the scores of the last queries, of keys in pages too, these scores alone with and without LSE, the sums of all queries, and
/// steps of decoding of one token and of four.
fn with_heads(device: &Recorder, dtype: DType, head_dim: u32) -> Result<(), Error> {
    let rows = |number, heads| Rows::token_major(place(number), TOKENS, heads, head_dim);
    let (query_heads, kv_heads) = (QUERY_HEADS, KV_HEADS);
    let lengths = Lengths::dense(TOKENS);
    let scores = Scores {
        base: place(5),
        sequence_stride: i64::from(QUERY_HEADS * TOKENS),
        head_stride: TOKENS.into(),
        window: Window::Last(WINDOW),
        heads: ScoreHeads::Query,
    };
    let attention = PrefillAttention {
        q: rows(1, QUERY_HEADS),
        k: rows(2, KV_HEADS),
        v: rows(3, KV_HEADS),
        out: rows(4, QUERY_HEADS),
        sequences: 1,
        query_heads,
        kv_heads,
        head_dim,
        dtype,
        queries: lengths,
        keys: lengths,
        scale: 1.0,
        scores: Some(scores),
        workspace: WORKSPACE,
        workspace_bytes: WORKSPACE_BYTES,
        ..Default::default()
    };
    let page = |number| Rows::token_major(place(number), PAGE, KV_HEADS, head_dim);
    let pages = (TOKENS / PAGE) as i32;
    let in_pages = PrefillAttention {
        k: page(2),
        v: page(3),
        pages: Pages { table: place(8), table_pages: pages, pages, page_size: PAGE as i32, reserved: 0 },
        ..attention
    };
    let window = WindowScores {
        q: attention.q,
        k: attention.k,
        sequences: 1,
        query_heads,
        kv_heads,
        head_dim,
        dtype,
        queries: lengths,
        keys: lengths,
        scale: 1.0,
        scores,
        workspace: WORKSPACE,
        workspace_bytes: WORKSPACE_BYTES,
        ..Default::default()
    };
    let lse = Some(Lse::head_major(place(6), TOKENS));
    let all = Scores { window: Window::All, heads: ScoreHeads::Group, ..scores };
    let sums =
        ColumnSums { sums: WindowScores { lse, scores: all, ..window }, weight: 1.0, ..Default::default() };
    let step = |tokens| {
        let queries = |number| Rows::token_major(place(number), tokens, QUERY_HEADS, head_dim);
        Decode {
            cache: cache(head_dim),
            q: queries(1),
            out: queries(4),
            scale: 1.0,
            query_heads,
            tokens,
            head_dim,
            dtype,
            workspace: WORKSPACE,
            workspace_bytes: WORKSPACE_BYTES,
            ..Default::default()
        }
    };
    // SAFETY: the recorder touches no memory.
    unsafe {
        prefill_attention(device, &attention)?;
        prefill_attention(device, &PrefillAttention { form: Some(Form::Portable), ..attention })?;
        prefill_attention(device, &PrefillAttention { form: Some(Form::Portable), ..in_pages })?;
        window_scores(device, &window)?;
        column_sums(device, &sums)?;
        decode(device, &step(1))?;
        decode(device, &step(4))
    }
}

/// A list of `TOKENS` for every kv head.
fn cache(head_dim: u32) -> Cache {
    let dense = |number| Rows { base: place(number), token_stride: head_dim.into(), ..Rows::default() };
    Cache {
        k: dense(2),
        v: dense(3),
        lengths: place(7),
        rows: i64::from(KV_HEADS * TOKENS),
        capacity: TOKENS as i32,
        sequences: 1,
        heads: KV_HEADS as i32,
        ..Cache::default()
    }
}

/// Each form with as many keys as it takes.
fn selections(device: &Recorder) -> Result<(), Error> {
    let select = |form, keys: u32| {
        let work = SelectTopk {
            scores: ScoreRows { base: place(1), sequence_stride: 0, head_stride: keys.into() },
            sequences: 1,
            rows: KV_HEADS,
            groups: 1,
            heads: QUERY_HEADS / KV_HEADS,
            keys: Lengths::dense(keys),
            window: WINDOW,
            tail: WINDOW,
            pooling: Pooling::max(7),
            page: 1,
            count: 2048,
            kept: place(2),
            kept_lengths: place(3),
            capacity: 2048,
            workspace: WORKSPACE,
            workspace_bytes: WORKSPACE_BYTES,
            form: Some(form),
            ..Default::default()
        };
        // SAFETY: the recorder touches no memory.
        unsafe { select_topk(device, &work) }
    };
    select(select::Form::Block, 16 << 10)?;
    select(select::Form::Grid, 1 << 20)?;
    if device.compute_capability() == (9, 0) {
        select(select::Form::Cluster, 384 << 10)?;
    }
    let share = ShareKeys {
        best: place(1),
        count: KV_HEADS * 2048,
        heads: KV_HEADS,
        keys: TOKENS,
        mean: 2048,
        counts: place(2),
        starts: place(3),
        ..Default::default()
    };
    let pool = PoolScores {
        scores: ScoreRows { base: place(1), sequence_stride: 0, head_stride: TOKENS.into() },
        sequences: 1,
        query_heads: QUERY_HEADS,
        kv_heads: KV_HEADS,
        keys: Lengths::dense(TOKENS),
        pooling: Pooling::max(7),
        total: Some(ScoreRows { base: place(2), ..ScoreRows::default() }),
        ..Default::default()
    };
    // SAFETY: as above.
    unsafe {
        share_keys(device, &share)?;
        pool_scores(device, &pool)
    }
}

/// Rows of K and V, of hidden states, of a cache, and positions.
fn movements(device: &Recorder) -> Result<(), Error> {
    const HEAD_DIM: u32 = 128;
    let kept = |heads: u32| Kept {
        indices: place(1),
        index_head_stride: 2048,
        out_rows: i64::from(heads * 2048),
        sequences: 1,
        heads: heads as i32,
        tokens: TOKENS as i32,
        capacity: 2048,
        ..Kept::default()
    };
    let kv = GatherKv {
        kept: kept(KV_HEADS),
        k: Rows::token_major(place(2), TOKENS, KV_HEADS, HEAD_DIM),
        v: Rows::token_major(place(3), TOKENS, KV_HEADS, HEAD_DIM),
        k_out: place(4),
        v_out: place(5),
        head_dim: HEAD_DIM,
        ..Default::default()
    };
    let hidden = GatherRows {
        kept: kept(1),
        rows: matrix(2, HIDDEN),
        out: place(4),
        width: HIDDEN,
        ..Default::default()
    };
    let compaction = Compact {
        cache: cache(HEAD_DIM),
        indices: place(1),
        index_capacity: 2048,
        lengths_out: place(4),
        head_dim: HEAD_DIM,
        ..Default::default()
    };
    let positions =
        GatherIndices { list: place(1), rows: place(2), out: place(3), length: TOKENS, count: 2048 };
    // SAFETY: as above.
    unsafe {
        gather_kv(device, &kv)?;
        gather_rows(device, &hidden)?;
        compact(device, &compaction)?;
        gather_indices(device, &positions)
    }
}

/// What a forward needs beside attention and matrix products. The widest rows that fill a block of a norm.
fn forward(device: &Recorder) -> Result<(), Error> {
    let (rows, width) = (TOKENS, HIDDEN);
    let out_dtype = DType::F32;
    let ids = Embed {
        table: place(1),
        ids: place(2),
        out: place(3),
        rows,
        vocabulary: VOCABULARY,
        width,
        out_dtype,
        ..Default::default()
    };
    let norm = RmsNorm {
        x: matrix(1, MLP),
        out: matrix(2, MLP),
        weight: place(3),
        rows,
        width: MLP,
        epsilon: 1e-5,
        ..Default::default()
    };
    let q = Rows::token_major(place(1), TOKENS, QUERY_HEADS, 128);
    let rotation = Rope {
        q,
        q_out: q,
        query_heads: QUERY_HEADS,
        positions: place(2),
        inverse_frequencies: place(3),
        sequences: 1,
        tokens: TOKENS,
        head_dim: 128,
        ..Default::default()
    };
    let gate = SiluMul {
        gate: matrix(1, MLP),
        up: matrix(2, MLP),
        out: matrix(1, MLP),
        rows,
        width: MLP,
        ..Default::default()
    };
    let sum = Add { x: matrix(1, width), y: matrix(2, width), rows, width, ..Default::default() };
    let conversion =
        Convert { x: matrix(1, width), out: matrix(2, width), rows, width, out_dtype, ..Default::default() };
    let token = Sample {
        logits: matrix(1, VOCABULARY),
        tokens: place(2),
        rows: 1,
        vocabulary: VOCABULARY,
        ..Default::default()
    };
    // SAFETY: as above.
    unsafe {
        embed(device, &ids)?;
        rms_norm(device, &norm)?;
        rope(device, &rotation)?;
        silu_mul(device, &gate)?;
        add(device, &sum)?;
        convert(device, &conversion)?;
        sample(device, &token)
    }
}

/// What becomes of scores before a selection.
fn sums(device: &Recorder) -> Result<(), Error> {
    let heads = KV_HEADS;
    let table = |number, keys: u32| ScoreTable { base: place(number), head_stride: keys.into(), keys };
    let scores = |number| table(number, TOKENS);
    let sum = AddScores { a: scores(1), b: scores(2), out: scores(3), heads };
    let moved =
        GatherScores { scores: scores(1), out: table(2, 2048), entries: place(3), entry_stride: 2048, heads };
    let raised = RaiseScores {
        scores: scores(1),
        positions: place(2),
        marked: place(3),
        marked_positions: TOKENS,
        heads,
    };
    let marks = MarkKeys {
        positions: place(1),
        starts: place(2),
        lengths: place(3),
        marked: place(4),
        out: place(5),
        rows: u64::from(KV_HEADS * TOKENS),
        marked_positions: TOKENS,
        lists: KV_HEADS,
        words: TOKENS / 32,
    };
    // SAFETY: as above.
    unsafe {
        add_scores(device, &sum)?;
        gather_scores(device, &moved)?;
        raise_scores(device, &raised)?;
        mark_keys(device, &marks)
    }
}
