//! Chooses what stays: the best keys of every (sequence, kv head), or the best pages, or one set for the
//! whole sequence.
//!
//! Scores are pooled along the keys for each score head and reduced over the heads that share a row, on
//! the way in. The number of keys and the number to keep are read on the device, so a launch can be
//! captured in a CUDA graph and replayed for other lengths. What is kept depends on a row's scores alone,
//! to the bit: not on the rest of the batch, the device, or the kernels that did it.

use super::{
    Error, Kernel, Launch, Launcher,
    batch::{Lengths, ScoreRows},
    check::{self, Presence, apart, last, range},
    images,
};
use crate::abi::{self, Pooling, SelectParams};

/// What each row of a batch keeps. A sequence has `rows` rows, and each chooses among its keys by the scores
/// of `groups` x `heads` score heads. `rows` = kv heads and `heads` = query heads of each is the selection of
/// a layer's cache; `rows` = 1 and `groups` = kv heads is one set for all of them, as the TSP layer's.
///
/// A sequence of n keys has scores for the first n - `window`. Always kept are its first `sinks` keys, and
/// the first `tail` behind the scored ones; both count towards `count`. Where that leaves no room for all
/// of them, the first ones stay. Otherwise the highest scores win, ties go to the lower key, and NaN comes
/// last.
#[derive(Clone, Copy, Debug, Default)]
pub struct SelectTopk {
    /// Scores of every score head, `(row * groups + group) * heads + head`. Strides that are multiples of 4
    /// are read faster.
    pub scores: ScoreRows,
    /// Sequences in the batch.
    pub sequences: u32,
    /// Rows of each sequence.
    pub rows: u32,
    /// Groups of score heads of each row.
    pub groups: u32,
    /// Score heads of each group, whose pooled scores are summed.
    pub heads: u32,
    /// How many keys each sequence has.
    pub keys: Lengths,
    /// Address of i32 `[sequences]`: how many keys each sequence has, where `keys` only says how many it has
    /// at most. 0: as `keys` says.
    pub lengths: u64,
    /// Keys at the end of each sequence that have no score: the observation window, as a rule.
    pub window: u32,
    /// How many of those are kept.
    pub tail: u32,
    /// Keys at the beginning of each sequence that are kept whatever their score.
    pub sinks: u32,
    /// Pooling of each head's scores along the keys.
    pub pooling: Pooling,
    /// How the groups of a row become one.
    pub reduction: Reduction,
    /// Keys of a page; 1 selects keys. A larger page is kept or dropped as a whole, by the score of its
    /// best key; `count`, `capacity` and the indices then mean pages.
    /// [`gather_indices`](super::gather::gather_indices) of a sequence's block table by them is its new one.
    pub page: u32,
    /// How many to keep in each row, forced ones included: at most what there is, and `capacity`.
    pub count: u32,
    /// Address of i32 `[sequences, rows]`, how many to keep in each; 0: `count`.
    pub counts: u64,
    /// Address of i32 `[sequences, rows, capacity]`: receives indices, ascending, and -1 behind them.
    pub kept: u64,
    /// Address of i32 `[sequences, rows]`: receives how many were kept.
    pub kept_lengths: u64,
    /// Room for indices in each row of `kept`.
    pub capacity: u32,
    /// Address of scratch memory, a multiple of 256; what it holds does not matter. May be 0 where none is
    /// needed.
    pub workspace: u64,
    /// Its size; [`select_topk_workspace`] says how much is needed.
    pub workspace_bytes: usize,
    /// Which kernels do it; `None` leaves it to the driver.
    pub form: Option<Form>,
}

/// How the scores of several groups become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Reduction {
    /// Their sum.
    #[default]
    Sum,
    /// The largest: a key that one group needs is kept for all.
    Max,
}

/// Ways to do a selection. All give the same result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// One launch, a block for each row, which holds the ranks of at most 16384 items.
    Block,
    /// One launch, a cluster of 8 blocks for each row, which hold at most 393216 items: compute capability
    /// 9.0 alone.
    Cluster,
    /// Five launches, a block for every 4096 keys of each row.
    Grid,
}

/// Items that the shared memory of a block is meant to hold: 64 KB, which every chip has.
const BLOCK_ITEMS: u32 = 16 << 10;
/// Items that a cluster holds, 192 KB in each block.
const CLUSTER_ITEMS: u32 = abi::SELECT_CLUSTER as u32 * (48 << 10);
/// What a grid is high enough for, even where large pages fill little more than half of each chunk.
const MAX_KEYS: u32 = 1 << 27;
/// Rows of which each has a cluster of its own.
const MAX_ROWS: u64 = i32::MAX as u64 / abi::SELECT_CLUSTER as u64;

/// Bytes of scratch memory that [`select_topk`] needs for this work on this device.
///
/// # Errors
/// [`Error::Argument`] for sizes that cannot be right.
pub fn select_topk_workspace<D: Launcher + ?Sized>(device: &D, work: &SelectTopk) -> Result<usize, Error> {
    let sizes = Sizes::of(work)?;
    match form(device, work, &sizes)? {
        Form::Grid => Ok(sizes.workspace()?.bytes),
        Form::Block | Form::Cluster => Ok(0),
    }
}

/// Queues the selection. Without rows it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is 0 where that is allowed, or device memory of the size its comment states,
/// until the kernels are done. Nothing else writes `kept`, `kept_lengths` or the workspace meanwhile, and
/// nothing writes what is read.
pub unsafe fn select_topk<D: Launcher + ?Sized>(device: &D, work: &SelectTopk) -> Result<(), Error> {
    let sizes = Sizes::of(work)?;
    let form = form(device, work, &sizes)?;
    if sizes.rows == 0 {
        return Ok(());
    }
    let workspace = if form == Form::Grid { sizes.workspace()? } else { Workspace::default() };
    check_addresses(work, &sizes, workspace.bytes)?;

    let mut params = SelectParams {
        scores: work.scores.base,
        sequence_stride: work.scores.sequence_stride,
        head_stride: work.scores.head_stride,
        lengths: work.lengths,
        cu_seqlens: work.keys.cu_seqlens,
        counts: work.counts,
        kept: work.kept,
        kept_lengths: work.kept_lengths,
        states: work.workspace,
        ranks: work.workspace + workspace.ranks as u64,
        splits: work.workspace + workspace.splits as u64,
        rank_stride: sizes.rank_stride().into(),
        keys: work.keys.longest as i32,
        window: work.window as i32,
        tail: work.tail as i32,
        sinks: work.sinks as i32,
        rows: work.rows as i32,
        groups: work.groups as i32,
        heads: work.heads as i32,
        reduction: match work.reduction {
            Reduction::Sum => abi::REDUCTION_SUM,
            Reduction::Max => abi::REDUCTION_MAX,
        },
        pooling: work.pooling,
        page: sizes.page as i32,
        count: work.count as i32,
        capacity: work.capacity as i32,
        chunk: sizes.chunk as i32,
        digit: 0,
        reserved: 0,
    };
    let launch = |kernel, grid, cluster, shared_bytes, params: &SelectParams| {
        // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
        unsafe {
            device.launch(&Launch {
                kernel,
                grid,
                cluster,
                block: [abi::SELECT_THREADS as u32, 1, 1],
                shared_bytes,
                params: bytemuck::bytes_of(params),
            })
        }
    };
    match form {
        Form::Block => {
            let shared_bytes = abi::SELECT_BLOCK_BYTES as u32 + 4 * sizes.items.next_multiple_of(4);
            launch(Kernel::SelectBlock, [sizes.rows, 1, 1], [1; 3], shared_bytes, &params)
        }
        Form::Cluster => {
            let blocks = abi::SELECT_CLUSTER as u32;
            let share = sizes.items.div_ceil(blocks).next_multiple_of(4);
            let shared_bytes = abi::SELECT_CLUSTER_BYTES as u32 + 4 * share;
            let grid = [sizes.rows * blocks, 1, 1];
            launch(Kernel::SelectCluster, grid, [blocks, 1, 1], shared_bytes, &params)
        }
        Form::Grid => {
            // SAFETY: the states are the first part of the workspace, whose size was checked.
            unsafe { device.fill(work.workspace, 0, workspace.states) }?;
            let grid = [sizes.rows, sizes.chunks(), 1];
            launch(Kernel::SelectRank, grid, [1; 3], 0, &params)?;
            for digit in [1, 2] {
                params.digit = digit;
                launch(Kernel::SelectDigit, grid, [1; 3], 0, &params)?;
            }
            launch(Kernel::SelectSplit, grid, [1; 3], 0, &params)?;
            launch(Kernel::SelectWrite, grid, [1; 3], 0, &params)
        }
    }
}

/// The form that was asked for, if it can do the work, or the one that is likely the fastest.
fn form<D: Launcher + ?Sized>(device: &D, work: &SelectTopk, sizes: &Sizes) -> Result<Form, Error> {
    let clusters = device.compute_capability() == (9, 0)
        && images::images().iter().any(|image| image.name == Kernel::SelectCluster.image());
    let Some(form) = work.form else {
        // By keys: a block would read the keys of many large pages alone.
        return Ok(if sizes.keys <= BLOCK_ITEMS {
            Form::Block
        } else if clusters && sizes.items <= CLUSTER_ITEMS {
            Form::Cluster
        } else {
            Form::Grid
        });
    };
    if form == Form::Cluster && !clusters {
        let expected = "another: its kernel is for compute capability 9.0, and built for it";
        return Err(Error::argument("form", "Cluster", expected));
    }
    let most = match form {
        Form::Block => BLOCK_ITEMS,
        Form::Cluster => CLUSTER_ITEMS,
        Form::Grid => u32::MAX,
    };
    if sizes.items > most {
        let value = format!("{form:?} for {} items", sizes.items);
        return Err(Error::argument("form", value, format!("another for more than {most}")));
    }
    Ok(form)
}

/// What follows from the sizes in a description.
struct Sizes {
    /// Of all sequences.
    rows: u32,
    /// Of each sequence.
    score_heads: i32,
    /// Of a page, no larger than a sequence.
    page: u32,
    /// The most keys that a row has a score for.
    scored: u32,
    /// The most keys that a row chooses from.
    keys: u32,
    /// The most items that a row chooses from.
    items: u32,
    /// Items of a block of [`Form::Grid`].
    chunk: u32,
}

/// Where the parts of a workspace begin; states come first.
#[derive(Default)]
struct Workspace {
    states: usize,
    ranks: usize,
    splits: usize,
    bytes: usize,
}

impl Sizes {
    fn of(work: &SelectTopk) -> Result<Self, Error> {
        let most = i32::MAX as u32;
        for (what, size, least) in [
            ("groups", work.groups, 1),
            ("heads", work.heads, 1),
            ("window", work.window, 0),
            ("tail", work.tail, 0),
            ("sinks", work.sinks, 0),
            ("page", work.page, 1),
            ("count", work.count, 0),
            ("capacity", work.capacity, 0),
        ] {
            if !(least..=most).contains(&size) {
                return Err(Error::argument(what, size, format!("from {least} to {most}")));
            }
        }
        work.pooling.check("pooling")?;
        work.keys.check("keys")?;
        let longest = work.keys.longest;
        if longest > MAX_KEYS {
            return Err(Error::argument("keys.longest", longest, format!("at most {MAX_KEYS}")));
        }
        if work.tail > work.window {
            let expected =
                format!("at most window = {}: keys with a score compete for their place", work.window);
            return Err(Error::argument("tail", work.tail, expected));
        }
        let rows = u64::from(work.sequences) * u64::from(work.rows);
        if rows > MAX_ROWS {
            return Err(Error::argument("sequences * rows", rows, format!("at most {MAX_ROWS}")));
        }
        let heads = u128::from(work.rows) * u128::from(work.groups) * u128::from(work.heads);
        if heads > u128::from(most) {
            return Err(Error::argument("rows * groups * heads", heads, format!("at most {most}")));
        }
        let scored = longest.saturating_sub(work.window);
        let keys = longest.min(scored + work.tail);
        let page = work.page.min(keys.max(1));
        let chunk = (abi::SELECT_CHUNK as u32 / page / 4 * 4).max(4);
        Ok(Self {
            rows: rows as u32,
            score_heads: heads as i32,
            page,
            scored,
            keys,
            items: keys.div_ceil(page),
            chunk,
        })
    }

    fn chunks(&self) -> u32 {
        self.items.div_ceil(self.chunk).max(1)
    }

    fn rank_stride(&self) -> u32 {
        self.items.next_multiple_of(4)
    }

    fn workspace(&self) -> Result<Workspace, Error> {
        let mut bytes = 0;
        let mut part = |row_bytes: u64| {
            let begin = bytes;
            bytes = (begin + u128::from(self.rows) * u128::from(row_bytes)).next_multiple_of(256);
            begin
        };
        part(abi::SELECT_STATE_BYTES as u64);
        let ranks = part(4 * u64::from(self.rank_stride()));
        let splits = part(8 * u64::from(self.chunks()));
        match isize::try_from(bytes) {
            Ok(bytes) => Ok(Workspace {
                states: self.rows as usize * abi::SELECT_STATE_BYTES as usize,
                ranks: ranks as usize,
                splits: splits as usize,
                bytes: bytes as usize,
            }),
            Err(_) => Err(Error::argument("workspace", format_args!("{bytes} bytes"), "below 2^63")),
        }
    }
}

fn check_addresses(work: &SelectTopk, sizes: &Sizes, workspace_bytes: usize) -> Result<(), Error> {
    let ScoreRows { base, sequence_stride, head_stride } = work.scores;
    for (what, stride) in [("scores.sequence_stride", sequence_stride), ("scores.head_stride", head_stride)] {
        if stride < 0 {
            return Err(Error::argument(what, stride, "0 or more"));
        }
    }
    let needed = |elements: i128| if elements > 0 { Presence::Needed } else { Presence::Optional };
    let rows = i128::from(sizes.rows);
    let scores = match sizes.scored {
        0 => 0,
        scored => {
            last(work.sequences as i32, sequence_stride)
                + last(sizes.score_heads, head_stride)
                + i128::from(scored)
        }
    };
    let kept = rows * i128::from(work.capacity);
    let read = [
        ("scores", range("scores", base, scores, 4, needed(scores))?),
        ("lengths", range("lengths", work.lengths, work.sequences.into(), 4, Presence::Optional)?),
        ("keys.cu_seqlens", work.keys.check_starts("keys", work.sequences)?),
        ("counts", range("counts", work.counts, rows, 4, Presence::Optional)?),
    ];
    let says = "select_topk_workspace";
    let written = [
        ("kept", range("kept", work.kept, kept, 4, needed(kept))?),
        ("kept_lengths", range("kept_lengths", work.kept_lengths, rows, 4, Presence::Needed)?),
        ("workspace", check::workspace(work.workspace, work.workspace_bytes, workspace_bytes, says)?),
    ];
    apart(&written, &read)
}
