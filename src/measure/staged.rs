//! A backend that takes the time of its operations, by stage.

use std::cell::RefCell;
use std::fmt::{self, Debug, Display, Formatter};
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::Measurable;
use crate::backend::{Backend, BackendError, Bias, Columns, Select, Share, Visible};
use crate::model::StoredTensor;
use crate::policy::Pooling;

/// Passes everything on; from [`start`](Self::start) to [`stop`](Self::stop) a mark follows every operation.
pub struct Staged<B: Measurable> {
    inner: B,
    marks: RefCell<Option<Marks<B>>>,
}

/// Each with the stage of what it follows.
type Marks<B> = Vec<(Stage, <B as Measurable>::Mark)>;

#[derive(Clone, Copy)]
enum Stage {
    Attention,
    Products,
    Scores,
    Selection,
    Gather,
    Rest,
}

/// Seconds of the stages of a prefill; together the time that it took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StageSeconds {
    /// Attention, and scores that are asked for together with it.
    pub attention: f64,
    /// Matrix products with weights.
    pub products: f64,
    /// Scores that are asked for by themselves, and what is made of them: sums over heads, pooling.
    pub scores: f64,
    /// The best of the scores.
    pub selection: f64,
    /// Copies of what was selected, and the selection itself where heads share their keys.
    pub gather: f64,
    /// Embedding, norms, rotation, activations, the way to the host and back.
    pub rest: f64,
}

impl StageSeconds {
    /// Each with its name.
    pub fn named(&self) -> [(&'static str, f64); 6] {
        let Self { attention, products, scores, selection, gather, rest } = *self;
        [
            ("attention", attention),
            ("products", products),
            ("scores", scores),
            ("selection", selection),
            ("gather", gather),
            ("rest", rest),
        ]
    }

    fn of(&mut self, stage: Stage) -> &mut f64 {
        match stage {
            Stage::Attention => &mut self.attention,
            Stage::Products => &mut self.products,
            Stage::Scores => &mut self.scores,
            Stage::Selection => &mut self.selection,
            Stage::Gather => &mut self.gather,
            Stage::Rest => &mut self.rest,
        }
    }
}

impl<B: Measurable> Staged<B> {
    /// Takes no time yet.
    pub fn new(inner: B) -> Self {
        Self { inner, marks: RefCell::default() }
    }

    /// What everything is passed on to.
    pub fn inner(&self) -> &B {
        &self.inner
    }

    /// Takes times from now on.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn start(&self) -> Result<(), BackendError> {
        let begin = self.inner.mark()?;
        self.marks.replace(Some(vec![(Stage::Rest, begin)]));
        Ok(())
    }

    /// The times since [`start`](Self::start), all 0 without; none are taken any more. What stands between two
    /// operations counts with the second.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn stop(&self) -> Result<StageSeconds, BackendError> {
        let marks = self.marks.take().unwrap_or_default();
        let mut sums = StageSeconds::default();
        for pair in marks.windows(2) {
            *sums.of(pair[1].0) += self.inner.seconds(&pair[0].1, &pair[1].1)?;
        }
        Ok(sums)
    }

    fn follow(&self, stage: Stage) -> Result<(), BackendError> {
        if let Some(marks) = &mut *self.marks.borrow_mut() {
            marks.push((stage, self.inner.mark()?));
        }
        Ok(())
    }
}

impl<B: Measurable> Debug for Staged<B> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

/// Operations by their stages.
macro_rules! pass_on {
    ($($stage:ident { $(fn $name:ident($($argument:ident: $kind:ty),*) -> $out:ty;)* })*) => {$($(
        fn $name(&self, $($argument: $kind),*) -> Result<$out, BackendError> {
            let out = self.inner.$name($($argument),*)?;
            self.follow(Stage::$stage)?;
            Ok(out)
        }
    )*)*};
}

// Every operation is here, those too that the trait could make of others: the backend may know better.
impl<B: Measurable> Backend for Staged<B> {
    type Tensor = B::Tensor;
    type Weight = B::Weight;
    type Rotary = B::Rotary;
    type Scores = B::Scores;
    type Indices = B::Indices;
    type Kv = B::Kv;
    type UncountedKv = B::UncountedKv;
    type KvBatch = B::KvBatch;
    type Recording = B::Recording;

    fn name(&self) -> String {
        self.inner.name()
    }

    fn kv_element_bytes(&self) -> usize {
        self.inner.kv_element_bytes()
    }

    fn chunk_rows(&self) -> usize {
        self.inner.chunk_rows()
    }

    fn windows_at_once(&self) -> usize {
        self.inner.windows_at_once()
    }

    fn free_memory(&self) -> Option<u64> {
        self.inner.free_memory()
    }

    fn reserve(&self, bytes: u64) {
        self.inner.reserve(bytes);
    }

    fn weight_bytes(&self, stored: &StoredTensor) -> u64 {
        self.inner.weight_bytes(stored)
    }

    fn owns(&self, kv: &B::Kv) -> bool {
        self.inner.owns(kv)
    }

    fn kv_lengths(&self, kv: &B::Kv) -> Vec<usize> {
        self.inner.kv_lengths(kv)
    }

    fn rows(&self, x: &B::Tensor) -> usize {
        self.inner.rows(x)
    }

    /// What is queued as one piece has no stages.
    unsafe fn repeat<E: From<BackendError> + Display>(
        &self,
        recording: &mut B::Recording,
        mut work: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        if self.marks.borrow().is_some() {
            return work();
        }
        // SAFETY: the caller's promise.
        unsafe { self.inner.repeat(recording, work) }
    }

    pass_on! {
        Attention {
            fn attention(queries: &B::Tensor, kv: &B::Kv, visible: Visible<'_, B::Indices>) -> B::Tensor;
            fn attention_with_scores(queries: &B::Tensor, kv: &B::Kv, window: usize) -> (B::Tensor, B::Scores);
            fn biased_attention(
                queries: &B::Tensor,
                kv: &B::Kv,
                visible: Visible<'_, B::Indices>,
                bias: &Bias<'_>
            ) -> B::Tensor;
            fn attention_with_columns(
                queries: &B::Tensor,
                kv: &B::Kv,
                columns: &[Columns],
                bias: Option<&Bias<'_>>
            ) -> (B::Tensor, Vec<B::Scores>);
            fn decode_attention(
                queries: &B::Tensor,
                keys: &B::Tensor,
                values: &B::Tensor,
                positions: &B::Indices,
                batch: &mut B::KvBatch
            ) -> B::Tensor;
        }
        Products {
            fn linear(x: &B::Tensor, weight: &B::Weight, bias: Option<&B::Weight>) -> B::Tensor;
            fn logits(x: &B::Tensor, head: &B::Weight) -> B::Tensor;
        }
        Scores {
            fn window_scores(queries: &B::Tensor, kv: &B::Kv) -> B::Scores;
            fn biased_window_scores(queries: &B::Tensor, kv: &B::Kv, bias: &Bias<'_>) -> B::Scores;
            fn column_sums(
                queries: &B::Tensor,
                kv: &B::Kv,
                columns: Columns,
                bias: Option<&Bias<'_>>
            ) -> B::Scores;
            fn query_key_products(query: &B::Tensor, kv: &B::Kv) -> B::Scores;
            fn add_scores(a: &B::Scores, b: &B::Scores) -> B::Scores;
            fn gather_scores(scores: &B::Scores, entries: &B::Indices) -> B::Scores;
            fn raise_scores(scores: &mut B::Scores, positions: &B::Indices, highlighted: &[bool]) -> ();
            fn pool_groups(scores: &B::Scores, kv_heads: usize, keys: usize, pooling: Pooling) -> B::Scores;
            fn sum_heads(scores: &B::Scores) -> B::Scores;
        }
        Selection {
            fn select(scores: &B::Scores, select: Select) -> B::Indices;
            fn select_each(scores: &B::Scores, counts: &[usize], tail: usize) -> B::Indices;
        }
        Gather {
            fn gather_kv(kv: &B::Kv, entries: &B::Indices, slack: usize) -> B::Kv;
            fn gather_kv_shared(kv: &B::Kv, scores: &B::Scores, share: Share, slack: usize) -> B::UncountedKv;
            fn retain_kv(kv: &mut B::Kv, entries: &B::Indices) -> ();
            fn gather_rows(x: &B::Tensor, rows: &B::Indices) -> B::Tensor;
            fn gather_indices(list: &B::Indices, rows: &B::Indices) -> B::Indices;
        }
        Rest {
            fn weight(stored: &StoredTensor) -> B::Weight;
            fn embed(table: &B::Weight, ids: &[u32]) -> B::Tensor;
            fn embed_list(table: &B::Weight, ids: &B::Indices) -> B::Tensor;
            fn rms_norm(x: &B::Tensor, rows: Range<usize>, weight: &B::Weight, epsilon: f32) -> B::Tensor;
            fn swiglu(gate: B::Tensor, up: &B::Tensor) -> B::Tensor;
            fn add(x: &mut B::Tensor, first_row: usize, y: &B::Tensor) -> ();
            fn add_norm(
                x: &mut B::Tensor,
                first_row: usize,
                y: &B::Tensor,
                weight: &B::Weight,
                epsilon: f32
            ) -> B::Tensor;
            fn rotary(inverse_frequencies: &[f32], positions: &B::Indices) -> B::Rotary;
            fn rotate(x: &mut B::Tensor, angles: &B::Rotary, first_row: usize) -> ();
            fn new_kv(kv_heads: usize, head_dim: usize, capacity: usize) -> B::Kv;
            fn append_kv(
                kv: &mut B::Kv,
                keys: &B::Tensor,
                values: &B::Tensor,
                positions: &B::Indices,
                first_row: usize
            ) -> ();
            fn truncate_kv(kv: &mut B::Kv, lengths: &[usize]) -> ();
            fn kv_positions(kv: &B::Kv) -> Vec<Vec<u32>>;
            fn count_kv(kv: B::UncountedKv) -> B::Kv;
            fn join_kv(stores: Vec<B::Kv>, room: usize) -> B::KvBatch;
            fn split_kv(batch: B::KvBatch, steps: usize) -> Vec<B::Kv>;
            fn slice_rows(x: &B::Tensor, rows: Range<usize>) -> B::Tensor;
            fn concat_rows(parts: &[&B::Tensor]) -> B::Tensor;
            fn last_rows(x: &B::Tensor, count: usize) -> B::Tensor;
            fn indices(lists: Vec<Vec<u32>>) -> B::Indices;
            fn write_list(list: &mut B::Indices, numbers: &[u32]) -> ();
            fn read_indices(indices: &B::Indices) -> Vec<Vec<u32>>;
            fn read(x: &B::Tensor) -> Vec<f32>;
            fn read_scores(scores: &B::Scores) -> Vec<Vec<f32>>;
        }
    }
}

impl<B: Measurable> Measurable for Staged<B> {
    type Source = B::Source;
    type Mark = B::Mark;

    const WEIGHT_ELEMENT_BYTES: usize = B::WEIGHT_ELEMENT_BYTES;
    const MARKED_ROWS: usize = B::MARKED_ROWS;

    fn source(&self, seed: u64) -> B::Source {
        self.inner.source(seed)
    }

    fn random_weight(
        &self,
        source: &mut B::Source,
        shape: &[usize],
        fan_in: usize,
    ) -> Result<B::Weight, BackendError> {
        self.inner.random_weight(source, shape, fan_in)
    }

    fn finish(&self) -> Result<(), BackendError> {
        self.inner.finish()
    }

    fn mark(&self) -> Result<B::Mark, BackendError> {
        self.inner.mark()
    }

    fn seconds(&self, from: &B::Mark, to: &B::Mark) -> Result<f64, BackendError> {
        self.inner.seconds(from, to)
    }

    fn forget_memory_peak(&self) {
        self.inner.forget_memory_peak();
    }

    fn memory_peak(&self) -> Option<usize> {
        self.inner.memory_peak()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::backend::cpu::CpuBackend;
    use crate::engine::{Cancel, Control, PrefillOptions, Prompt};
    use crate::measure::{prefill, prefill_by_stage, random_engine, random_tokens, shape};
    use crate::policy::{FastKv, Policy};

    #[test]
    fn stages_together_are_the_whole_and_answers_stay_the_same() {
        let config = shape("tiny").expect("a shape");
        let plain = || CpuBackend::new(Some(1)).expect("a thread");
        let staged = random_engine(Staged::new(plain()), config.clone(), 1, |_| ()).expect("it fits");
        let plain = random_engine(plain(), config.clone(), 1, |_| ()).expect("it fits");
        let ids = random_tokens(200, config.vocab_size, 1);
        let (options, control) = (PrefillOptions::default(), Control::default());
        let read = |policy: Policy, marked_rows: usize| {
            let plan = policy.plan(plain.shape(), ids.len()).expect("valid");
            let prompts = [Prompt { ids: &ids, plan: &plan }];
            let (expected, _) = prefill(&plain, &prompts, &options, &control).expect("it runs");
            let begin = Instant::now();
            let found =
                prefill_by_stage(&staged, &prompts, &options, &control, marked_rows).expect("it runs");
            assert_eq!(found.prefills[0].logits, expected[0].logits);
            (found, begin.elapsed().as_secs_f64())
        };
        assert_eq!(read(Policy::Full, 201).0.stages, None);
        for (policy, selects) in [(Policy::Full, false), (Policy::FastKv(FastKv::proportional()), true)] {
            let (found, most) = read(policy, 200);
            let stages = found.stages.expect("marks");
            let sum: f64 = stages.named().map(|(_, seconds)| seconds).iter().sum();
            // The clock is read once more at either end.
            assert!(sum > 0.2 * found.seconds && sum <= most, "{stages:?}: {} of {most} s", found.seconds);
            assert!(stages.attention > 0.0 && stages.products > 0.0 && stages.rest > 0.0);
            for seconds in [stages.scores, stages.selection] {
                assert_eq!(seconds > 0.0, selects, "{stages:?}");
            }
        }
        // What fails leaves no marks behind.
        let cancel = Cancel::default();
        cancel.cancel();
        let plan = Policy::Full.plan(plain.shape(), ids.len()).expect("valid");
        let cancelled = Control { cancel: Some(&cancel), progress: None };
        let prompts = [Prompt { ids: &ids, plan: &plan }];
        assert!(prefill_by_stage(&staged, &prompts, &options, &cancelled, 0).is_err());
        assert!(staged.backend().marks.borrow().is_none());
    }
}
