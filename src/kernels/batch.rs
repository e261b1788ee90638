//! How a batch of queries and keys is described: what attention, and scores by themselves, have in common.

use std::ops::Range;

use super::{
    Error,
    check::{self, Presence, range},
};
use crate::abi;

/// Queries that a window may have.
const MAX_WINDOW: u32 = 64;

/// Query heads that may share a kv head.
const MAX_GROUP: u32 = 16;

/// Below this the maximum of a softmax, which begins at -2^100, stays finite when it is scaled.
const MOST_SCALE: f32 = (1_u32 << 27) as f32;

/// Below this a product with its bias stays above that maximum.
const MOST_BIAS: f32 = (1_u128 << 99) as f32;

/// How many tokens each sequence has, and where they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Lengths {
    /// Address of i32 `[sequences + 1]`: the first token of each sequence, and the end of the last, where
    /// sequences are packed along the token axis. 0: every sequence has `tokens`.
    pub cu_seqlens: u64,
    /// Tokens of each sequence, or of all together where they are packed.
    pub tokens: u32,
    /// Tokens of the longest sequence, or more: what the work is sized by. Tokens past it are not read.
    pub longest: u32,
}

/// A number that is added to the scaled logit of a query head and a key where both are marked: attention
/// steering as in PASTA (arXiv 2311.02262), whose rescaling by a factor is a bias of its logarithm.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bias {
    /// Address of u32 words, bit `h % 32` of word `h / 32` for query head h.
    pub heads: u64,
    /// Address of u32 words for each sequence, bit `k % 32` of word `k / 32` for key k of the sequence.
    pub keys: u64,
    /// Words of `keys` from one sequence to the next.
    pub key_stride: i64,
    /// What to add: below 2^99 in magnitude when divided by the scale.
    pub value: f32,
}

/// Where the logarithm of each query's softmax denominator is (LSE), f32: query i of a sequence and a query head
/// stands at `base + sequence * sequence_stride + head * head_stride + i * token_stride`. What lies between them is
/// neither read nor written.
///
/// | attention that leaves it | shape | |
/// |---|---|---|
/// | of this crate, flash-attn's varlen | `[heads, tokens]` | [`Lse::head_major`] |
/// | flash-attn, cuDNN, PyTorch, with room for more queries too | `[sequences, heads, room]` | [`Lse::padded`] |
/// | FlashInfer, of base 2 | `[tokens, heads]` | [`Lse::token_major`] with [`Logarithm::Binary`] |
///
/// Queries are those of the description, which need not be all that the prompt has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lse {
    /// Address of the first.
    pub base: u64,
    /// Elements from one sequence to the next. 0: all sequences stand in one row, and i is the query's place on the token
    /// axis: `cu_seqlens` says where a sequence begins, and without it each has room for `tokens`.
    pub sequence_stride: i64,
    /// Elements from one query head to the next.
    pub head_stride: i64,
    /// Elements from one query to the next.
    pub token_stride: i64,
    /// What kind of logarithm.
    pub logarithm: Logarithm,
}

/// The base of logarithms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Logarithm {
    /// e.
    #[default]
    Natural,
    /// 2.
    Binary,
}

/// Probabilities summed over queries, for every key of a sequence: `scores[sequence][head][key]`, f32.
/// What lies past a sequence's keys is not written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scores {
    /// Address of the first.
    pub base: u64,
    /// Elements from one sequence to the next.
    pub sequence_stride: i64,
    /// Elements from one head to the next.
    pub head_stride: i64,
    /// Which queries to sum over.
    pub window: Window,
    /// What `head` counts.
    pub heads: ScoreHeads,
}

/// Scores of keys: `scores[sequence][head][key]`, f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ScoreRows {
    /// Address of the first.
    pub base: u64,
    /// Elements from one sequence to the next.
    pub sequence_stride: i64,
    /// Elements from one head to the next.
    pub head_stride: i64,
}

/// The queries whose probabilities are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// The last of each sequence, 1 to 64; all of them where there are fewer.
    Last(u32),
    /// All queries, as H2O (arXiv 2306.14048) and FastGen (arXiv 2310.01801) want.
    All,
}

/// No queries, which is refused: a window has to be named.
impl Default for Window {
    fn default() -> Self {
        Self::Last(0)
    }
}

/// Whose probabilities are summed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScoreHeads {
    /// Each query head has scores of its own.
    #[default]
    Query,
    /// The query heads of a GQA group are summed, too: scores of each kv head.
    Group,
}

/// `1 / sqrt(head_dim)`.
pub fn default_scale(head_dim: u32) -> f32 {
    1.0 / (head_dim as f32).sqrt()
}

/// A head size that kernels exist for.
pub(super) fn check_head_dim(head_dim: u32) -> Result<(), Error> {
    if ![64, 96, 128, 256].contains(&head_dim) {
        return Err(Error::argument("head_dim", head_dim, "64, 96, 128 or 256"));
    }
    Ok(())
}

/// Query heads in groups.
pub(super) fn check_heads(query_heads: u32, kv_heads: u32) -> Result<(), Error> {
    if kv_heads == 0 {
        return Err(Error::argument("kv_heads", 0, "1 or more"));
    }
    if !query_heads.is_multiple_of(kv_heads) || !(1..=MAX_GROUP).contains(&(query_heads / kv_heads)) {
        let expected = format!("1 to {MAX_GROUP} times kv_heads = {kv_heads}");
        return Err(Error::argument("query_heads", query_heads, expected));
    }
    Ok(())
}

pub(super) fn check_scale(scale: f32) -> Result<(), Error> {
    if !(scale > 0.0 && scale < MOST_SCALE) {
        return Err(Error::argument("scale", scale, "a positive number below 2^27"));
    }
    Ok(())
}

impl Lengths {
    /// Every sequence has `tokens`.
    pub const fn dense(tokens: u32) -> Self {
        Self { cu_seqlens: 0, tokens, longest: tokens }
    }

    /// Sequences of up to `longest` tokens packed along an axis of `tokens`, at the address of their
    /// `cu_seqlens`.
    pub const fn packed(cu_seqlens: u64, tokens: u32, longest: u32) -> Self {
        Self { cu_seqlens, tokens, longest }
    }

    pub(super) fn check(self, name: &str) -> Result<(), Error> {
        let Self { cu_seqlens, tokens, longest } = self;
        check::entries(&format!("{name}.tokens"), tokens.into())?;
        let fits = if cu_seqlens == 0 { longest == tokens } else { longest <= tokens };
        if !fits {
            let relation = if cu_seqlens == 0 { "without cu_seqlens" } else { "at most" };
            let expected = format!("{relation} the tokens there are, {tokens}");
            return Err(Error::argument(format!("{name}.longest"), longest, expected));
        }
        Ok(())
    }

    /// Tokens of all sequences.
    pub(super) fn rows(self, sequences: u32) -> i128 {
        let sequences = if self.cu_seqlens == 0 { sequences } else { 1 };
        i128::from(sequences) * i128::from(self.tokens)
    }

    /// The addresses of `cu_seqlens`.
    pub(super) fn check_starts(self, name: &str, sequences: u32) -> Result<Range<u64>, Error> {
        let name = format!("{name}.cu_seqlens");
        range(&name, self.cu_seqlens, i128::from(sequences) + 1, 4, Presence::Optional)
    }
}

impl Bias {
    /// The addresses of the words for heads, and of those for keys.
    pub(super) fn check(
        self,
        sequences: u32,
        query_heads: u32,
        keys: Lengths,
        scale: f32,
    ) -> Result<[Range<u64>; 2], Error> {
        if self.value.is_nan() || (self.value / scale).abs() >= MOST_BIAS {
            let expected =
                "a number below 2^99 when divided by scale: to hide keys is what positions are for";
            return Err(Error::argument("bias.value", self.value, expected));
        }
        let words = i64::from(keys.longest.div_ceil(32));
        if self.key_stride < words && sequences > 1 || self.key_stride < 0 {
            let expected = format!("{words} or more: a bit for each of {} keys", keys.longest);
            return Err(Error::argument("bias.key_stride", self.key_stride, expected));
        }
        let words = i128::from(sequences.saturating_sub(1)) * i128::from(self.key_stride) + i128::from(words);
        let head_words = query_heads.div_ceil(32).into();
        Ok([
            range("bias.heads", self.heads, head_words, 4, Presence::Needed)?,
            range("bias.keys", self.keys, words, 4, Presence::Needed)?,
        ])
    }
}

impl Lse {
    /// `[heads, tokens]`: the queries of all sequences, head after head.
    pub fn head_major(base: u64, tokens: u32) -> Self {
        Self { base, head_stride: tokens.into(), token_stride: 1, ..Self::default() }
    }

    /// `[tokens, heads]`: the heads of all sequences, query after query.
    pub fn token_major(base: u64, heads: u32) -> Self {
        Self { base, head_stride: 1, token_stride: heads.into(), ..Self::default() }
    }

    /// `[sequences, heads, room]`: room for so many queries in each sequence, however many it has.
    pub fn padded(base: u64, heads: u32, room: u32) -> Self {
        let head_stride = i64::from(room);
        // 0 would put all in one row.
        let sequence_stride = (i64::from(heads) * head_stride).max(1);
        Self { base, sequence_stride, head_stride, token_stride: 1, ..Self::default() }
    }

    /// Its addresses for queries, no two of which share a place.
    pub(super) fn check(
        self,
        sequences: u32,
        query_heads: u32,
        queries: Lengths,
    ) -> Result<Range<u64>, Error> {
        let in_a_row = self.sequence_stride == 0;
        let [sequences, tokens] =
            if in_a_row { [1, queries.rows(sequences)] } else { [sequences.into(), queries.longest.into()] };
        let elements = check::span_apart(
            [
                ("lse.sequence_stride", self.sequence_stride, sequences),
                ("lse.head_stride", self.head_stride, query_heads.into()),
                ("lse.token_stride", self.token_stride, tokens),
            ],
            1,
            "queries must not share a place",
        )?;
        range("lse", self.base, elements, 4, Presence::Needed)
    }
}

impl From<Lse> for abi::Lse {
    fn from(lse: Lse) -> Self {
        let Lse { base, sequence_stride, head_stride, token_stride, logarithm } = lse;
        let logarithm = match logarithm {
            Logarithm::Natural => abi::LOGARITHM_NATURAL,
            Logarithm::Binary => abi::LOGARITHM_BINARY,
        };
        Self { base, sequence_stride, head_stride, token_stride, logarithm, reserved: 0 }
    }
}

impl Scores {
    /// Heads that have scores.
    pub(super) fn count(self, query_heads: u32, kv_heads: u32) -> u32 {
        match self.heads {
            ScoreHeads::Query => query_heads,
            ScoreHeads::Group => kv_heads,
        }
    }

    /// Their addresses for one sequence or more.
    pub(super) fn check(self, sequences: u32, heads: u32, keys: Lengths) -> Result<Range<u64>, Error> {
        let Self { base, sequence_stride, head_stride, .. } = self;
        ScoreRows { base, sequence_stride, head_stride }.check("scores", sequences, heads, keys)
    }
}

impl ScoreRows {
    /// Their addresses for one sequence or more.
    pub(super) fn check(
        self,
        name: &str,
        sequences: u32,
        heads: u32,
        keys: Lengths,
    ) -> Result<Range<u64>, Error> {
        let keys = i64::from(keys.longest);
        if self.head_stride < keys {
            let expected = format!("{keys} or more: the keys of the longest sequence");
            return Err(Error::argument(format!("{name}.head_stride"), self.head_stride, expected));
        }
        let sequence = i128::from(heads - 1) * i128::from(self.head_stride) + i128::from(keys);
        if sequences > 1 && i128::from(self.sequence_stride) < sequence {
            let expected = format!("{sequence} or more: {heads} heads");
            return Err(Error::argument(format!("{name}.sequence_stride"), self.sequence_stride, expected));
        }
        let before = i128::from(sequences - 1) * i128::from(self.sequence_stride.max(0));
        range(name, self.base, before + sequence, 4, Presence::Needed)
    }
}

impl Window {
    pub(super) fn check(self) -> Result<(), Error> {
        match self {
            Self::Last(queries) if !(1..=MAX_WINDOW).contains(&queries) => {
                Err(Error::argument("scores.window", queries, format!("1 to {MAX_WINDOW} queries")))
            }
            _ => Ok(()),
        }
    }

    /// The most queries of a sequence that it holds.
    pub(super) fn queries(self, longest: u32) -> u32 {
        match self {
            Self::Last(queries) => queries,
            Self::All => longest,
        }
    }
}
