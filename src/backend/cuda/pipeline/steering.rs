//! The bias of steered heads, as kernels take it: a bit for each head, and one for each key. And what is highlighted
//! comes first in selections.

use std::fmt::Debug;
use std::sync::{Arc, PoisonError};

use super::handles::Span;
use super::memory::Block;
use super::{CudaBackend, Indices, Kv, Scores, shape};
use crate::backend::{BackendError, Bias};
use crate::kernels::sums::{MarkKeys, RaiseScores, mark_keys, raise_scores as raise};
use crate::kernels::{Device, MatrixProduct, batch};

/// A bias on the device.
#[derive(Debug)]
pub(super) struct Steered<D: Device> {
    /// A bit for each query head, then for each kv head a word with the bits of its group.
    heads: Block<D>,
    layer_words: usize,
    /// A bit for each position of the prompt.
    positions: Arc<Block<D>>,
    tokens: usize,
    /// A bit for each entry of each list, of one list where all hold the same tokens.
    keys: Option<Block<D>>,
    /// Words of a list there.
    words: usize,
    amount: f32,
}

/// Highlighted tokens, and where the bits of the others lie.
pub(super) type Marks<D> = (Vec<bool>, Arc<Block<D>>);

impl<D: MatrixProduct + Debug> Steered<D> {
    /// The bias over a store; `None` where no head is steered. With `by_key` its entries are marked, which
    /// every kernel needs but the one of decoding.
    pub(super) fn of(
        backend: &CudaBackend<D>,
        operation: &'static str,
        bias: Option<&Bias<'_>>,
        kv: &Kv<D>,
        group: usize,
        by_key: bool,
    ) -> Result<Option<Self>, BackendError> {
        let Some(Bias { heads, highlighted, amount }) = bias else { return Ok(None) };
        let query_heads = group * kv.lists.len();
        if heads.len() != query_heads {
            return Err(shape(operation, format!("a bias of {} heads for {query_heads}", heads.len())));
        }
        if !heads.contains(&true) {
            return Ok(None);
        }
        let mut bits = words(heads);
        let layer_words = bits.len();
        bits.extend(heads.chunks(group).flat_map(words));
        let mut steered = Self {
            heads: backend.machine.upload("steered heads", &bits)?,
            layer_words,
            positions: backend.marks(highlighted)?,
            tokens: highlighted.len(),
            keys: None,
            words: 0,
            amount: *amount,
        };
        if by_key {
            steered.mark(backend, kv)?;
        }
        Ok(Some(steered))
    }

    fn mark(&mut self, backend: &CudaBackend<D>, kv: &Kv<D>) -> Result<(), BackendError> {
        let lists = if kv.shared { 1 } else { kv.lists.len() };
        let longest = kv.lists.iter().map(|list| list.length).max().unwrap_or(0);
        self.words = longest.div_ceil(32);
        let out = backend.machine.array("biased keys", lists * self.words, 4)?;
        let work = MarkKeys {
            positions: kv.positions.address(),
            starts: kv.starts.address(),
            lengths: kv.lengths_address(kv.second_half),
            marked: self.positions.address(),
            out: out.address(),
            rows: kv.rows() as u64,
            marked_positions: self.tokens as u32,
            lists: lists as u32,
            words: self.words as u32,
        };
        // SAFETY: live blocks of the sizes stated, in stream order.
        unsafe { mark_keys(backend.device(), &work) }?;
        self.keys = Some(out);
        Ok(())
    }

    /// For the kernel of decoding, which looks at positions, and how many have a bit.
    pub(super) fn of_positions(&self) -> (batch::Bias, u32) {
        let bias = batch::Bias {
            heads: self.heads.address(),
            keys: self.positions.address(),
            key_stride: self.tokens.div_ceil(32) as i64,
            value: self.amount,
        };
        (bias, self.tokens as u32)
    }

    /// The spans of a store that have one set of biased keys each.
    pub(super) fn spans(kv: &Kv<D>) -> Vec<Span> {
        if kv.shared { kv.spans() } else { kv.lists_apart() }
    }

    /// For the kernels that look at keys, whose heads are those of one of [`spans`](Self::spans).
    pub(super) fn of_keys(&self, span: Span, kv: &Kv<D>) -> Option<batch::Bias> {
        let whole = span.heads == kv.lists.len();
        let word = if whole { 0 } else { self.layer_words + span.first_head };
        let list = if kv.shared { 0 } else { span.first_head };
        self.keys.as_ref().map(|keys| batch::Bias {
            heads: self.heads.address() + 4 * word as u64,
            keys: keys.address() + 4 * (list * self.words) as u64,
            key_stride: self.words as i64,
            value: self.amount,
        })
    }
}

pub(super) fn raise_scores<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    scores: &Scores<D>,
    positions: &Indices<D>,
    highlighted: &[bool],
) -> Result<(), BackendError> {
    let marks = backend.marks(highlighted)?;
    let work = RaiseScores {
        scores: scores.table(),
        positions: positions.from("raise_scores", 0, scores.keys)?,
        marked: marks.address(),
        marked_positions: highlighted.len() as u32,
        heads: scores.heads as u32,
    };
    // SAFETY: live blocks of the sizes stated, in stream order.
    Ok(unsafe { raise(backend.device(), &work) }?)
}

impl<D: MatrixProduct + Debug> CudaBackend<D> {
    /// A bit for each token that is not highlighted. Most layers and steps of a prompt ask for the same as the last.
    fn marks(&self, highlighted: &[bool]) -> Result<Arc<Block<D>>, BackendError> {
        let mut last = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((known, block)) if known == highlighted => Ok(Arc::clone(block)),
            _ => {
                let others: Vec<bool> = highlighted.iter().map(|highlighted| !highlighted).collect();
                let block = Arc::new(self.machine.upload("highlighted tokens", &words(&others))?);
                *last = Some((highlighted.to_vec(), Arc::clone(&block)));
                Ok(block)
            }
        }
    }
}

/// Bits, the lowest of a word first.
fn words(bits: &[bool]) -> Vec<u32> {
    let word = |bits: &[bool]| bits.iter().rev().fold(0, |word, bit| word << 1 | u32::from(*bit));
    bits.chunks(32).map(word).collect()
}
