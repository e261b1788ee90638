//! The operations every backend has.

use std::fmt::{Debug, Display};
use std::ops::Range;

use super::BackendError;
use crate::model::StoredTensor;
use crate::policy::Pooling;

/// The operations of a Llama forward and of a policy, on handles that the same backend gave.
///
/// Shapes are row-major. A tensor is `[rows, width]`; queries are `[rows, query heads · head_dim]`,
/// keys and values `[rows, kv heads · head_dim]`. Query head h reads kv head `h / group`. Rotary
/// embedding turns pairs (i, i + head_dim/2), as Hugging Face stores Llama.
pub trait Backend: Debug {
    /// Activations `[rows, width]`.
    type Tensor: Debug;
    /// A weight: a matrix `[out, in]` or a vector `[width]`.
    type Weight: Debug;
    /// Rotary angles, a row for each position.
    type Rotary: Debug;
    /// Scores `[heads, keys]` in f32.
    type Scores: Debug;
    /// Lists of token numbers, each ascending.
    type Indices: Debug;
    /// One layer's keys and values: for each kv head a list of entries with their original
    /// positions. Lengths may differ from head to head.
    type Kv: Debug;
    /// A [`Kv`](Self::Kv) whose lengths nobody has asked for yet.
    type UncountedKv: Debug;
    /// One layer's keys and values of several sequences that decode together.
    type KvBatch: Debug;
    /// Work that is done again and again.
    type Recording: Debug + Default;

    /// What it runs on, in words.
    fn name(&self) -> String;

    /// Bytes of one element of the KV cache.
    fn kv_element_bytes(&self) -> usize;

    /// Rows that one pass through a layer should take, so that temporaries stay small beside the
    /// residual stream; no fewer than [`MAX_WINDOW`](crate::policy::MAX_WINDOW), since the last pass
    /// has to hold the window.
    fn chunk_rows(&self) -> usize;

    /// How many query heads have the probabilities of a window, `[queries, keys]` in f32, at the same time while
    /// [`window_scores`](Self::window_scores) sums them up; 0 where nobody has them.
    fn windows_at_once(&self) -> usize {
        0
    }

    /// Bytes that are free in a memory of its own; `None` where it shares the machine's.
    fn free_memory(&self) -> Option<u64> {
        None
    }

    /// Says that about so many bytes will be asked for, in many pieces: a backend may have them ready. Where there are
    /// not so many, whatever does not fit says so when it is asked for.
    fn reserve(&self, bytes: u64) {
        let _ = bytes;
    }

    /// Bytes that a stored tensor takes when it is usable: as many as in the file, which may be it.
    fn weight_bytes(&self, stored: &StoredTensor) -> u64 {
        stored.bytes().len() as u64
    }

    /// Makes a stored tensor usable.
    fn weight(&self, stored: &StoredTensor) -> Result<Self::Weight, BackendError>;

    /// Rows `ids` of the embedding table `[vocabulary, width]`. Every id is below the vocabulary.
    fn embed(&self, table: &Self::Weight, ids: &[u32]) -> Result<Self::Tensor, BackendError>;

    /// [`embed`](Self::embed) of ids in a single list.
    fn embed_list(&self, table: &Self::Weight, ids: &Self::Indices) -> Result<Self::Tensor, BackendError>;

    /// `x / sqrt(mean(x²) + epsilon) · weight` of the given rows.
    fn rms_norm(
        &self,
        x: &Self::Tensor,
        rows: Range<usize>,
        weight: &Self::Weight,
        epsilon: f32,
    ) -> Result<Self::Tensor, BackendError>;

    /// `x · weightᵀ + bias`.
    fn linear(
        &self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        bias: Option<&Self::Weight>,
    ) -> Result<Self::Tensor, BackendError>;

    /// Logits: `x · headᵀ`, in f32 also where activations are narrower.
    fn logits(&self, x: &Self::Tensor, head: &Self::Weight) -> Result<Self::Tensor, BackendError> {
        self.linear(x, head, None)
    }

    /// `silu(gate) · up`, element by element.
    fn swiglu(&self, gate: Self::Tensor, up: &Self::Tensor) -> Result<Self::Tensor, BackendError>;

    /// Adds `y` to the rows of `x` that begin at `first_row`.
    fn add(&self, x: &mut Self::Tensor, first_row: usize, y: &Self::Tensor) -> Result<(), BackendError>;

    /// [`add`](Self::add), then [`rms_norm`](Self::rms_norm) of the rows that it changed. A backend may do both in
    /// one pass.
    fn add_norm(
        &self,
        x: &mut Self::Tensor,
        first_row: usize,
        y: &Self::Tensor,
        weight: &Self::Weight,
        epsilon: f32,
    ) -> Result<Self::Tensor, BackendError> {
        self.add(x, first_row, y)?;
        self.rms_norm(x, first_row..first_row + self.rows(y), weight, epsilon)
    }

    /// Angles `position · inverse_frequency` for a list of positions.
    fn rotary(
        &self,
        inverse_frequencies: &[f32],
        positions: &Self::Indices,
    ) -> Result<Self::Rotary, BackendError>;

    /// Turns every head of `x` in place; row i takes the angles of row `first_row + i`.
    fn rotate(
        &self,
        x: &mut Self::Tensor,
        angles: &Self::Rotary,
        first_row: usize,
    ) -> Result<(), BackendError>;

    /// An empty store with room for `capacity` entries a head.
    fn new_kv(&self, kv_heads: usize, head_dim: usize, capacity: usize) -> Result<Self::Kv, BackendError>;

    /// Appends a row's entry to every head. `positions` are the original positions of the rows,
    /// beginning at its element `first_row`. Keys are rotated already.
    fn append_kv(
        &self,
        kv: &mut Self::Kv,
        keys: &Self::Tensor,
        values: &Self::Tensor,
        positions: &Self::Indices,
        first_row: usize,
    ) -> Result<(), BackendError>;

    /// Forgets the entries behind these lengths, one for each kv head; a longer one forgets nothing.
    fn truncate_kv(&self, kv: &mut Self::Kv, lengths: &[usize]) -> Result<(), BackendError>;

    /// Whether a store is one of this backend, and not of another that may have another memory.
    fn owns(&self, kv: &Self::Kv) -> bool {
        let _ = kv;
        true
    }

    /// Entries of each kv head.
    fn kv_lengths(&self, kv: &Self::Kv) -> Vec<usize>;

    /// Original positions of the entries of each kv head.
    fn kv_positions(&self, kv: &Self::Kv) -> Result<Vec<Vec<u32>>, BackendError>;

    /// Softmax attention of the queries over the store, scaled by 1/√head_dim.
    fn attention(
        &self,
        queries: &Self::Tensor,
        kv: &Self::Kv,
        visible: Visible<'_, Self::Indices>,
    ) -> Result<Self::Tensor, BackendError>;

    /// Attention probabilities of the given queries, which belong to the last keys of the store,
    /// summed over the queries: `[query heads, keys]`. Every head of the store has one length.
    fn window_scores(&self, queries: &Self::Tensor, kv: &Self::Kv) -> Result<Self::Scores, BackendError>;

    /// [`attention`](Self::attention) of queries that belong to the last keys, and
    /// [`window_scores`](Self::window_scores) of the last `window` of them. A backend may do both
    /// in one pass.
    fn attention_with_scores(
        &self,
        queries: &Self::Tensor,
        kv: &Self::Kv,
        window: usize,
    ) -> Result<(Self::Tensor, Self::Scores), BackendError> {
        let attended = self.attention(queries, kv, Visible::Aligned)?;
        let scores = self.window_scores(&self.last_rows(queries, window)?, kv)?;
        Ok((attended, scores))
    }

    /// [`attention`](Self::attention) with steered heads; see [`Bias`].
    fn biased_attention(
        &self,
        queries: &Self::Tensor,
        kv: &Self::Kv,
        visible: Visible<'_, Self::Indices>,
        bias: &Bias<'_>,
    ) -> Result<Self::Tensor, BackendError>;

    /// [`window_scores`](Self::window_scores) with steered heads.
    fn biased_window_scores(
        &self,
        queries: &Self::Tensor,
        kv: &Self::Kv,
        bias: &Bias<'_>,
    ) -> Result<Self::Scores, BackendError>;

    /// Attention probabilities of the queries, which belong to the last keys of each head, in sums over
    /// the queries and over the query heads of each kv head: `[kv heads, keys of the longest head]`,
    /// with zeros behind shorter heads. Never more than a tile of probabilities at once.
    fn column_sums(
        &self,
        queries: &Self::Tensor,
        kv: &Self::Kv,
        columns: Columns,
        bias: Option<&Bias<'_>>,
    ) -> Result<Self::Scores, BackendError>;

    /// [`attention`](Self::attention) of queries that belong to the last keys, steered where there is a bias, and
    /// their [`column_sums`](Self::column_sums), each in its way. A backend may find the normalisers of
    /// the softmax once for all.
    fn attention_with_columns(
        &self,
        queries: &Self::Tensor,
        kv: &Self::Kv,
        columns: &[Columns],
        bias: Option<&Bias<'_>>,
    ) -> Result<(Self::Tensor, Vec<Self::Scores>), BackendError> {
        let attended = match bias {
            Some(bias) => self.biased_attention(queries, kv, Visible::Aligned, bias)?,
            None => self.attention(queries, kv, Visible::Aligned)?,
        };
        let sums = columns.iter().map(|columns| self.column_sums(queries, kv, *columns, bias));
        Ok((attended, sums.collect::<Result<_, _>>()?))
    }

    /// `a + b`, head by head; where one has fewer keys, those it lacks count 0.
    fn add_scores(&self, a: &Self::Scores, b: &Self::Scores) -> Result<Self::Scores, BackendError>;

    /// The named scores, one list for each head: `[heads, keys of the longest list]`, with zeros behind
    /// shorter ones.
    fn gather_scores(
        &self,
        scores: &Self::Scores,
        entries: &Self::Indices,
    ) -> Result<Self::Scores, BackendError>;

    /// Makes the scores of highlighted keys +∞ in every head, so that selection takes these first. A single list
    /// says the original position of every key and perhaps of some behind them; no position beyond `highlighted`
    /// is.
    fn raise_scores(
        &self,
        scores: &mut Self::Scores,
        positions: &Self::Indices,
        highlighted: &[bool],
    ) -> Result<(), BackendError>;

    /// Dot products of one row of queries with all keys, neither scaled nor normalised:
    /// `[query heads, keys]`. Every head of the store has one length.
    fn query_key_products(&self, query: &Self::Tensor, kv: &Self::Kv) -> Result<Self::Scores, BackendError>;

    /// Forgets all but the named entries, one ascending list for each kv head, in place. With lists that fit
    /// it can only fail as a device does.
    fn retain_kv(&self, kv: &mut Self::Kv, entries: &Self::Indices) -> Result<(), BackendError>;

    /// Rows of a tensor.
    fn rows(&self, x: &Self::Tensor) -> usize;

    /// Copy of some rows.
    fn slice_rows(&self, x: &Self::Tensor, rows: Range<usize>) -> Result<Self::Tensor, BackendError>;

    /// The rows of all parts, one behind the other. There is a part, and all have one width and type.
    fn concat_rows(&self, parts: &[&Self::Tensor]) -> Result<Self::Tensor, BackendError>;

    /// Copy of the last `count` rows.
    fn last_rows(&self, x: &Self::Tensor, count: usize) -> Result<Self::Tensor, BackendError> {
        let rows = self.rows(x);
        match rows.checked_sub(count) {
            Some(first) => self.slice_rows(x, first..rows),
            None => {
                Err(BackendError::Shape { operation: "last_rows", problem: format!("{count} of {rows}") })
            }
        }
    }

    /// Scores of the first `keys` keys, pooled along the keys per query head, then summed over the
    /// query heads of each kv head: `[kv heads, keys]`.
    fn pool_groups(
        &self,
        scores: &Self::Scores,
        kv_heads: usize,
        keys: usize,
        pooling: Pooling,
    ) -> Result<Self::Scores, BackendError>;

    /// Scores summed over heads: `[1, keys]`. Apart from [`select`](Self::select), so that ranks
    /// which hold a share of the heads each can add theirs in between.
    fn sum_heads(&self, scores: &Self::Scores) -> Result<Self::Scores, BackendError>;

    /// The best keys of each head; see [`Select`].
    fn select(&self, scores: &Self::Scores, select: Select) -> Result<Self::Indices, BackendError>;

    /// [`select`](Self::select) with a count for each head.
    fn select_each(
        &self,
        scores: &Self::Scores,
        counts: &[usize],
        tail: usize,
    ) -> Result<Self::Indices, BackendError>;

    /// Makes lists of token numbers usable.
    fn indices(&self, lists: Vec<Vec<u32>>) -> Result<Self::Indices, BackendError>;

    /// Puts other numbers into a single list, as many as it has.
    fn write_list(&self, list: &mut Self::Indices, numbers: &[u32]) -> Result<(), BackendError>;

    /// The lists. Waits for the device.
    fn read_indices(&self, indices: &Self::Indices) -> Result<Vec<Vec<u32>>, BackendError>;

    /// `list[rows]`, for two single lists: the positions of selected rows.
    fn gather_indices(
        &self,
        list: &Self::Indices,
        rows: &Self::Indices,
    ) -> Result<Self::Indices, BackendError>;

    /// The rows of `x` that a single list names.
    fn gather_rows(&self, x: &Self::Tensor, rows: &Self::Indices) -> Result<Self::Tensor, BackendError>;

    /// A store of the named entries, one list for each kv head, with room for `slack` more a head.
    fn gather_kv(
        &self,
        kv: &Self::Kv,
        entries: &Self::Indices,
        slack: usize,
    ) -> Result<Self::Kv, BackendError>;

    /// A store of the best keys of each head, with room for `slack` more a head, where heads share a number of
    /// keys; see [`Share`]. Every head of the store has one length, that of the scores and the tail behind them.
    fn gather_kv_shared(
        &self,
        kv: &Self::Kv,
        scores: &Self::Scores,
        share: Share,
        slack: usize,
    ) -> Result<Self::UncountedKv, BackendError>;

    /// The store, now that its lengths are wanted. Waits for the device.
    fn count_kv(&self, kv: Self::UncountedKv) -> Result<Self::Kv, BackendError>;

    /// Puts the lists of several sequences side by side, with room for so many tokens more of each. All have as
    /// many kv heads of one size. One sequence alone that has the room stays where it is.
    fn join_kv(&self, stores: Vec<Self::Kv>, room: usize) -> Result<Self::KvBatch, BackendError>;

    /// Takes the sequences apart again, after so many steps of [`decode_attention`](Self::decode_attention).
    /// Entries of a step that is not counted are forgotten.
    fn split_kv(&self, batch: Self::KvBatch, steps: usize) -> Result<Vec<Self::Kv>, BackendError>;

    /// A step of every sequence: row i of the keys and values joins the lists of sequence i, at original position
    /// `positions[i]`, and query row i attends to all of them, its own included. There is room; a list without it stays
    /// as it is.
    fn decode_attention(
        &self,
        queries: &Self::Tensor,
        keys: &Self::Tensor,
        values: &Self::Tensor,
        positions: &Self::Indices,
        batch: &mut Self::KvBatch,
    ) -> Result<Self::Tensor, BackendError>;

    /// Does `work`, which asks for the same operations on the same handles every time: only what their memory
    /// holds differs. A backend may keep what it queues, and queue that again without calling `work`; handles that
    /// `work` returned last then hold the new results.
    ///
    /// # Safety
    /// Handles that `work` was given, and those that it leaves behind, are there whenever the recording is used again.
    unsafe fn repeat<E: From<BackendError> + Display>(
        &self,
        recording: &mut Self::Recording,
        mut work: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        let _ = recording;
        work()
    }

    /// The numbers of a tensor, row by row. Waits for the device.
    fn read(&self, x: &Self::Tensor) -> Result<Vec<f32>, BackendError>;

    /// The scores of each head. Waits for the device.
    fn read_scores(&self, scores: &Self::Scores) -> Result<Vec<Vec<f32>>, BackendError>;
}

/// Which keys a query sees.
#[derive(Debug)]
pub enum Visible<'a, Indices> {
    /// The queries belong to the last keys of each head, in order: query i of m sees the first
    /// `length − m + i + 1` of a head's keys.
    Aligned,
    /// Query i sees keys `0..=rows[first + i]`: a selection of the rows that the keys come from.
    Rows {
        /// A single list of row numbers.
        rows: &'a Indices,
        /// Its element that belongs to query 0.
        first: usize,
    },
}

/// The `count` best keys of each head, and the `tail` keys behind those that were scored:
/// ascending; ties go to the lower key, NaN ranks last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Select {
    /// Keys chosen by score; all of them where there are no more.
    pub count: usize,
    /// Keys behind the scored ones that are kept in any case: the window.
    pub tail: usize,
}

/// Keys that heads share: the scores of all heads are ranked together (ties go to the lower head, then
/// the lower key; NaN ranks last), and a head with `picks` of the best `heads · mean` gets
/// `sure + round((picks − sure) · (1 − floor) + int((mean − assured) · floor))` keys, half to even, where `sure` is
/// `min(assured, picks)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    /// Keys of a head on average.
    pub mean: usize,
    /// Keys among those that each head keeps beside its share, as they are its best: what steering highlights.
    pub assured: usize,
    /// The share of the mean that every head gets.
    pub floor: f64,
    /// Keys behind the scored ones that are kept in any case: the window.
    pub tail: usize,
}

/// How queries count in sums of attention probabilities.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Columns {
    /// Weight of the first query.
    pub weight: f32,
    /// What each next query weighs more.
    pub step: f32,
    /// Sum only what falls on the nearest keys of each query, itself included; `None`: on all.
    pub band: Option<usize>,
}

/// Attention steering (PASTA, arXiv 2311.02262): before the softmax, chosen heads add `amount` to the
/// logits of the tokens of the prompt that are not highlighted. A key is told by its original position.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bias<'a> {
    /// For each query head, whether it is steered.
    pub heads: &'a [bool],
    /// For each token of the prompt, whether it is highlighted. Keys at later positions get no bias.
    pub highlighted: &'a [bool],
    /// What is added: log α, below 0.
    pub amount: f32,
}
