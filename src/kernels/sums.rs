//! What becomes of sums of attention before a selection ranks by them: added up from chunk to chunk and step to
//! step, gathered where entries leave a cache, raised where keys stay in any case. And the bits that tell
//! biased keys of a bias that is given by position.

use std::ops::Range;

use super::{
    Error, Kernel, Launch, Launcher,
    check::{MAX_GRID_YZ, Presence, apart, count, range},
};
use crate::abi::{
    self, AddScoresParams, GatherScoresParams, MarkKeysParams, RaiseScoresParams, ScoreTable as Table,
};

/// Scores of keys, f32 `[head][key]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ScoreTable {
    /// Address of the first.
    pub base: u64,
    /// Elements from one head to the next.
    pub head_stride: i64,
    /// Keys of each head.
    pub keys: u32,
}

/// `out = a + b` for each of `heads`; keys that one lacks count 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct AddScores {
    /// One summand.
    pub a: ScoreTable,
    /// The other.
    pub b: ScoreTable,
    /// Receives the sums; overlaps neither.
    pub out: ScoreTable,
    /// Heads of all three.
    pub heads: u32,
}

/// `out[i] = scores[entries[i]]` for each of `heads`, 0 for an entry outside the scores, as -1 behind a list is.
#[derive(Clone, Copy, Debug, Default)]
pub struct GatherScores {
    /// What is gathered.
    pub scores: ScoreTable,
    /// Receives it; overlaps nothing else.
    pub out: ScoreTable,
    /// Address of i32, `out.keys` keys for each head.
    pub entries: u64,
    /// Elements of `entries` from one head to the next.
    pub entry_stride: i64,
    /// Heads of both tables.
    pub heads: u32,
}

/// `scores[head][key] = +inf` for each of `heads`, where the position of the key has a bit that is not set: the keys
/// that a [`batch::Bias`](super::batch::Bias) of the same bits leaves alone, so that a selection takes them first.
#[derive(Clone, Copy, Debug, Default)]
pub struct RaiseScores {
    /// The scores.
    pub scores: ScoreTable,
    /// Address of i32, a position for each key of the scores.
    pub positions: u64,
    /// Address of u32 words, a bit for each of `marked_positions` positions, lowest bit first.
    pub marked: u64,
    /// Positions that have a bit; no key at a later one is raised.
    pub marked_positions: u32,
    /// Heads of the scores.
    pub heads: u32,
}

/// A bit for each entry of the lists of a ragged cache, set where the bit of its position is: how
/// [`batch::Bias`](super::batch::Bias) tells the keys of a prompt, made from how it tells positions.
#[derive(Clone, Copy, Debug, Default)]
pub struct MarkKeys {
    /// Address of i32 `[rows]`: positions of all entries.
    pub positions: u64,
    /// Address of i64 `[lists]`: first row of each list.
    pub starts: u64,
    /// Address of i32 `[lists]`: entries of each list.
    pub lengths: u64,
    /// Address of u32 words, a bit for each of `marked_positions` positions, lowest bit first.
    pub marked: u64,
    /// Address that receives u32 `[lists][words]`, a bit for each entry; those behind a list are 0. Overlaps
    /// nothing else.
    pub out: u64,
    /// Entries of all lists.
    pub rows: u64,
    /// Positions that have a bit; no later one is marked.
    pub marked_positions: u32,
    /// Lists to mark.
    pub lists: u32,
    /// Words for each list: as many as its entries need.
    pub words: u32,
}

/// Queues the sum. With no key it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is device memory of the size its comment states until the kernel is done. Nothing
/// else touches `out` meanwhile, and nothing writes the rest.
pub unsafe fn add_scores<D: Launcher + ?Sized>(device: &D, work: &AddScores) -> Result<(), Error> {
    let AddScores { a, b, out, heads } = *work;
    if check_heads(heads)? == 0 || out.keys == 0 {
        return Ok(());
    }
    let most = a.keys.max(b.keys);
    if out.keys != most {
        return Err(Error::argument("out.keys", out.keys, format!("{most}, as many as the longer one has")));
    }
    let inputs = [("a", a.check("a", heads)?), ("b", b.check("b", heads)?)];
    apart(&[("out", out.check("out", heads)?)], &inputs)?;
    let params = AddScoresParams { a: a.params(), b: b.params(), out: out.params() };
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe { device.launch(&launch(Kernel::AddScores, out.keys, heads, bytemuck::bytes_of(&params))) }
}

/// Queues the gather of scores. With nothing to gather it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is device memory of the size its comment states until the kernel is done. Nothing
/// else touches `out` meanwhile, and nothing writes the rest.
pub unsafe fn gather_scores<D: Launcher + ?Sized>(device: &D, work: &GatherScores) -> Result<(), Error> {
    let GatherScores { scores, out, entries, entry_stride, heads } = *work;
    if check_heads(heads)? == 0 || out.keys == 0 {
        return Ok(());
    }
    if entry_stride < 0 {
        return Err(Error::argument("entry_stride", entry_stride, "0 or more"));
    }
    let listed = i128::from(heads - 1) * i128::from(entry_stride) + i128::from(out.keys);
    let inputs = [
        ("scores", scores.check("scores", heads)?),
        ("entries", range("entries", entries, listed, 4, Presence::Needed)?),
    ];
    apart(&[("out", out.check("out", heads)?)], &inputs)?;
    let params = GatherScoresParams { scores: scores.params(), out: out.params(), entries, entry_stride };
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe { device.launch(&launch(Kernel::GatherScores, out.keys, heads, bytemuck::bytes_of(&params))) }
}

/// Queues the raise. With no key or no bit it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is device memory of the size its comment states until the kernel is done. Nothing
/// else touches the scores meanwhile, and nothing writes the rest.
pub unsafe fn raise_scores<D: Launcher + ?Sized>(device: &D, work: &RaiseScores) -> Result<(), Error> {
    let RaiseScores { scores, positions, marked, marked_positions, heads } = *work;
    let bits = count("marked_positions", marked_positions)?;
    if check_heads(heads)? == 0 || bits == 0 || scores.keys == 0 {
        return Ok(());
    }
    let raised = scores.check("scores", heads)?;
    let words = i128::from(marked_positions.div_ceil(32));
    let inputs = [
        ("positions", range("positions", positions, scores.keys.into(), 4, Presence::Needed)?),
        ("marked", range("marked", marked, words, 4, Presence::Needed)?),
    ];
    apart(&[("scores", raised)], &inputs)?;
    let params =
        RaiseScoresParams { scores: scores.params(), positions, marked, marked_positions: bits, reserved: 0 };
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe { device.launch(&launch(Kernel::RaiseScores, scores.keys, heads, bytemuck::bytes_of(&params))) }
}

/// Queues the marking. With no list, or lists without entries, it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is device memory of the size its comment states until the kernel is done. Nothing
/// else touches `out` meanwhile, and nothing writes the rest.
pub unsafe fn mark_keys<D: Launcher + ?Sized>(device: &D, work: &MarkKeys) -> Result<(), Error> {
    let MarkKeys { positions, starts, lengths, marked, out, rows, marked_positions, lists, words } = *work;
    if words > MOST_WORDS {
        return Err(Error::argument("words", words, format!("at most {MOST_WORDS}")));
    }
    if lists > MAX_GRID_YZ {
        return Err(Error::argument("lists", lists, format!("at most {MAX_GRID_YZ}")));
    }
    if lists == 0 || words == 0 {
        return Ok(());
    }
    let params = MarkKeysParams {
        positions,
        starts,
        lengths,
        marked,
        out,
        // More than it holds have no addresses.
        rows: rows as i64,
        marked_positions: count("marked_positions", marked_positions)?,
        words: words as i32,
    };
    let needed = |present: bool| if present { Presence::Needed } else { Presence::Optional };
    let bits = i128::from(marked_positions.div_ceil(32));
    let inputs = [
        ("positions", range("positions", positions, rows.into(), 4, needed(rows > 0))?),
        ("starts", range("starts", starts, lists.into(), 8, Presence::Needed)?),
        ("lengths", range("lengths", lengths, lists.into(), 4, Presence::Needed)?),
        ("marked", range("marked", marked, bits, 4, needed(bits > 0))?),
    ];
    let marks = range("out", out, i128::from(lists) * i128::from(words), 4, Presence::Needed)?;
    apart(&[("out", marks)], &inputs)?;
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe { device.launch(&launch(Kernel::MarkKeys, 32 * words, lists, bytemuck::bytes_of(&params))) }
}

/// Bits of so many words are entries that a kernel counts in 32 bits.
const MOST_WORDS: u32 = 1 << 25;

impl ScoreTable {
    fn check(self, name: &str, heads: u32) -> Result<Range<u64>, Error> {
        let Self { base, head_stride, keys } = self;
        const MOST: u32 = 1 << 30;
        if keys > MOST {
            return Err(Error::argument(format!("{name}.keys"), keys, format!("at most {MOST}")));
        }
        if head_stride < keys.into() {
            let expected = format!("{keys} or more: the keys of a head");
            return Err(Error::argument(format!("{name}.head_stride"), head_stride, expected));
        }
        if keys == 0 {
            return Ok(0..0);
        }
        let elements = i128::from(heads - 1) * i128::from(head_stride) + i128::from(keys);
        range(name, base, elements, 4, Presence::Needed)
    }

    fn params(self) -> Table {
        Table { base: self.base, head_stride: self.head_stride, keys: self.keys as i32, reserved: 0 }
    }
}

fn check_heads(heads: u32) -> Result<u32, Error> {
    if heads > MAX_GRID_YZ {
        return Err(Error::argument("heads", heads, format!("at most {MAX_GRID_YZ}")));
    }
    Ok(heads)
}

/// A thread for each column of each row.
fn launch(kernel: Kernel, columns: u32, rows: u32, params: &[u8]) -> Launch<'_> {
    let threads = abi::SUMS_THREADS as u32;
    Launch {
        kernel,
        grid: [columns.div_ceil(threads), rows, 1],
        cluster: [1, 1, 1],
        block: [threads, 1, 1],
        shared_bytes: 0,
        params,
    }
}
