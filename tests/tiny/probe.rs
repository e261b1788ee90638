//! A backend that counts: the CPU's arithmetic, chunks of any size, the keys and values that are truly
//! alive, and selections that can be forced, which it judges. Each test program uses its share of this.
#![allow(dead_code)]

use std::collections::VecDeque;
use std::mem::take;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use fastkv::backend::cpu::{CpuBackend, Indices, Kv, KvBatch, Rotary, Scores, Tensor, Weight};
use fastkv::backend::{Backend, BackendError, Bias, Columns, Select, Share, Visible};
use fastkv::model::StoredTensor;
use fastkv::policy::Pooling;

/// Entries of keys and values.
#[derive(Debug, Default)]
pub(crate) struct Alive {
    now: AtomicUsize,
    peak: AtomicUsize,
}

#[derive(Debug)]
pub(crate) struct Probe {
    pub(crate) inner: CpuBackend,
    pub(crate) chunk_rows: usize,
    alive: Arc<Alive>,
    forced: Mutex<VecDeque<Vec<Vec<u32>>>>,
    scored: Mutex<Scored>,
    judged: Mutex<Vec<Judged>>,
    failing_steps: AtomicUsize,
    fails_joining: AtomicBool,
}

/// Not counted: prefills are what is measured.
#[derive(Debug)]
pub(crate) struct Joined {
    batch: KvBatch,
    /// Steps that there is room for.
    room: usize,
    head_dim: usize,
    longest_key: f64,
}

#[derive(Debug)]
pub(crate) struct Counted {
    kv: Kv,
    entries: usize,
    head_dim: usize,
    /// Length of the longest key that ever joined.
    longest_key: f64,
    alive: Arc<Alive>,
}

/// What scores are made of.
#[derive(Clone, Copy, Debug, Default)]
struct Scored {
    /// Query heads whose products they sum; 0 where they are sums of probabilities.
    products: usize,
    /// The most that lengths of a query and a key came to, one times the other.
    lengths: f64,
    head_dim: usize,
}

/// A forced selection by the scores that there were.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Judged {
    /// How far the best key that is left out of a list is above the worst that is in it, as by the error of a logit: 0
    /// where no key is better than one that is kept.
    pub(crate) off: f64,
    /// The most that `|q| |k| / d` is: what a logit is off where `q` or `k` is off by its own size.
    pub(crate) reach: f64,
}

impl Alive {
    fn resize(&self, from: usize, to: usize) {
        let now = self.now.load(Relaxed) + to - from;
        self.now.store(now, Relaxed);
        self.peak.fetch_max(now, Relaxed);
    }
}

impl Probe {
    pub(crate) fn new(chunk_rows: usize) -> Self {
        let inner = CpuBackend::new(Some(1)).expect("a thread");
        let failing_steps = AtomicUsize::new(0);
        let fails_joining = AtomicBool::new(false);
        Self {
            inner,
            chunk_rows,
            alive: Arc::default(),
            forced: Mutex::default(),
            scored: Mutex::default(),
            judged: Mutex::default(),
            failing_steps,
            fails_joining,
        }
    }

    /// What the next selections give, in their order, whatever the scores.
    pub(crate) fn force(&self, selections: Vec<Vec<Vec<u32>>>) {
        *self.forced.lock().expect("a lock") = selections.into();
    }

    /// Selections that are still forced.
    pub(crate) fn forced(&self) -> usize {
        self.forced.lock().expect("a lock").len()
    }

    /// Begins with scores anew: those of a prompt count for the evictions behind it, those before it do not.
    pub(crate) fn forget_scores(&self) {
        *self.scored.lock().expect("a lock") = Scored::default();
    }

    /// What was forced since this was last asked.
    pub(crate) fn judged(&self) -> Vec<Judged> {
        take(&mut *self.judged.lock().expect("a lock"))
    }

    fn forced_or(&self, scores: &Scores, select: impl FnOnce() -> Result<Indices>) -> Result<Indices> {
        match self.next_forced(scores)? {
            Some(lists) => Ok(lists),
            None => select(),
        }
    }

    fn next_forced(&self, scores: &Scores) -> Result<Option<Indices>> {
        let Some(lists) = self.forced.lock().expect("a lock").pop_front() else {
            return Ok(None);
        };
        let judged = self.judge(&self.inner.read_scores(scores)?, &lists);
        self.judged.lock().expect("a lock").push(judged);
        self.inner.indices(lists).map(Some)
    }

    /// Logits that are off by e make a probability off by a factor of e^2e, once for itself and once for the sum; so a
    /// key that is kept may lie below one that is not by e^4e. A product is off by its logit's error times √d, and a
    /// sum of them by as many times as much.
    fn judge(&self, scores: &[Vec<f32>], lists: &[Vec<u32>]) -> Judged {
        let Scored { products, lengths, head_dim } = *self.scored.lock().expect("a lock");
        let of_head = |(scores, list): (&Vec<f32>, &Vec<u32>)| {
            let of = |is_kept: bool| {
                let keys =
                    (0..scores.len() as u32).filter(move |key| list.binary_search(key).is_ok() == is_kept);
                keys.map(|key| f64::from(scores[key as usize]))
            };
            let best_left = of(false).fold(f64::NEG_INFINITY, f64::max);
            let worst_kept = of(true).fold(f64::INFINITY, f64::min);
            match (best_left > worst_kept, products) {
                (false, _) => 0.0,
                (true, 0) => (best_left / worst_kept).ln() / 4.0,
                (true, terms) => (best_left - worst_kept) / (2.0 * terms as f64 * (head_dim as f64).sqrt()),
            }
        };
        let off = scores.iter().zip(lists).map(of_head).fold(0.0, f64::max);
        Judged { off, reach: lengths / head_dim as f64 }
    }

    /// Where heads share a number of keys a head's count hangs on how many of its keys are among the best of all. So a
    /// count that is off takes keys near the least of these, but for the rounding of the count.
    fn judge_counts(&self, scores: &[Vec<f32>], mean: usize, counts: impl Iterator<Item = [usize; 2]>) {
        let mut all: Vec<f64> = scores.concat().into_iter().map(f64::from).collect();
        all.sort_by(|a, b| b.total_cmp(a));
        let least = all[(mean * scores.len()).clamp(1, all.len()) - 1];
        let of_head = |(scores, [found, own]): (&Vec<f32>, [usize; 2])| {
            let mut distances: Vec<f64> =
                scores.iter().map(|score| (f64::from(*score) / least).ln().abs()).collect();
            distances.sort_by(f64::total_cmp);
            found.abs_diff(own).checked_sub(2).map_or(0.0, |last| distances[last] / 4.0)
        };
        let off = scores.iter().zip(counts).map(of_head).fold(0.0, f64::max);
        let Scored { lengths, head_dim, .. } = *self.scored.lock().expect("a lock");
        let judged = Judged { off, reach: lengths / head_dim as f64 };
        self.judged.lock().expect("a lock").push(judged);
    }

    /// Notes what scores of these queries and keys are made of.
    fn note(&self, queries: &Tensor, kv: &Counted, of_products: bool) -> Result<()> {
        let head_dim = kv.head_dim;
        let numbers = self.inner.read(queries)?;
        let products = if of_products { numbers.len() / self.rows(queries) / head_dim } else { 0 };
        let lengths = longest(&numbers, head_dim) * kv.longest_key;
        let mut scored = self.scored.lock().expect("a lock");
        let before = if scored.products == products { scored.lengths } else { 0.0 };
        *scored = Scored { products, lengths: before.max(lengths), head_dim };
        Ok(())
    }

    /// Lets the attention of the n-th layer that decodes from now on fail, once.
    pub(crate) fn fail_decoding(&self, layers: usize) {
        self.failing_steps.store(layers, Relaxed);
    }

    /// Lets sequences not be joined, once.
    pub(crate) fn fail_joining(&self) {
        self.fails_joining.store(true, Relaxed);
    }

    /// Entries alive now.
    pub(crate) fn now(&self) -> usize {
        self.alive.now.load(Relaxed)
    }

    /// The most entries alive at once.
    pub(crate) fn peak(&self) -> usize {
        self.alive.peak.load(Relaxed)
    }

    fn entries(&self, kv: &Kv) -> usize {
        let positions = self.inner.kv_positions(kv).expect("positions");
        positions.iter().map(Vec::len).sum::<usize>()
    }

    fn counted(&self, kv: Kv, head_dim: usize, longest_key: f64) -> Counted {
        let entries = self.entries(&kv);
        self.alive.resize(0, entries);
        Counted { kv, entries, head_dim, longest_key, alive: Arc::clone(&self.alive) }
    }

    fn recount(&self, kv: &mut Counted) {
        let entries = self.entries(&kv.kv);
        self.alive.resize(kv.entries, entries);
        kv.entries = entries;
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.alive.resize(self.entries, 0);
    }
}

/// Length of the longest of these vectors.
fn longest(numbers: &[f32], head_dim: usize) -> f64 {
    let length = |vector: &[f32]| vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    numbers.chunks(head_dim).map(length).fold(0.0, f64::max)
}

type Result<T> = std::result::Result<T, BackendError>;

impl Backend for Probe {
    type Tensor = Tensor;
    type Weight = Weight;
    type Rotary = Rotary;
    type Scores = Scores;
    type Indices = Indices;
    type Kv = Counted;
    type UncountedKv = Counted;
    type KvBatch = Joined;
    type Recording = ();

    fn name(&self) -> String {
        "probe".to_owned()
    }

    fn kv_element_bytes(&self) -> usize {
        self.inner.kv_element_bytes()
    }

    fn chunk_rows(&self) -> usize {
        self.chunk_rows
    }

    fn weight(&self, stored: &StoredTensor) -> Result<Weight> {
        self.inner.weight(stored)
    }

    fn embed(&self, table: &Weight, ids: &[u32]) -> Result<Tensor> {
        self.inner.embed(table, ids)
    }

    fn embed_list(&self, table: &Weight, ids: &Indices) -> Result<Tensor> {
        self.inner.embed_list(table, ids)
    }

    fn rms_norm(&self, x: &Tensor, rows: Range<usize>, weight: &Weight, epsilon: f32) -> Result<Tensor> {
        self.inner.rms_norm(x, rows, weight, epsilon)
    }

    fn linear(&self, x: &Tensor, weight: &Weight, bias: Option<&Weight>) -> Result<Tensor> {
        self.inner.linear(x, weight, bias)
    }

    fn swiglu(&self, gate: Tensor, up: &Tensor) -> Result<Tensor> {
        self.inner.swiglu(gate, up)
    }

    fn add(&self, x: &mut Tensor, first_row: usize, y: &Tensor) -> Result<()> {
        self.inner.add(x, first_row, y)
    }

    fn rotary(&self, inverse_frequencies: &[f32], positions: &Indices) -> Result<Rotary> {
        self.inner.rotary(inverse_frequencies, positions)
    }

    fn rotate(&self, x: &mut Tensor, angles: &Rotary, first_row: usize) -> Result<()> {
        self.inner.rotate(x, angles, first_row)
    }

    fn new_kv(&self, kv_heads: usize, head_dim: usize, capacity: usize) -> Result<Counted> {
        Ok(self.counted(self.inner.new_kv(kv_heads, head_dim, capacity)?, head_dim, 0.0))
    }

    fn append_kv(
        &self,
        kv: &mut Counted,
        keys: &Tensor,
        values: &Tensor,
        positions: &Indices,
        first_row: usize,
    ) -> Result<()> {
        self.inner.append_kv(&mut kv.kv, keys, values, positions, first_row)?;
        kv.longest_key = kv.longest_key.max(longest(&self.inner.read(keys)?, kv.head_dim));
        self.recount(kv);
        Ok(())
    }

    fn truncate_kv(&self, kv: &mut Counted, lengths: &[usize]) -> Result<()> {
        self.inner.truncate_kv(&mut kv.kv, lengths)?;
        self.recount(kv);
        Ok(())
    }

    fn kv_lengths(&self, kv: &Counted) -> Vec<usize> {
        self.inner.kv_lengths(&kv.kv)
    }

    fn kv_positions(&self, kv: &Counted) -> Result<Vec<Vec<u32>>> {
        self.inner.kv_positions(&kv.kv)
    }

    fn attention(&self, queries: &Tensor, kv: &Counted, visible: Visible<'_, Indices>) -> Result<Tensor> {
        assert!(self.rows(queries) <= self.chunk_rows, "a pass of no more rows than a chunk");
        self.inner.attention(queries, &kv.kv, visible)
    }

    fn window_scores(&self, queries: &Tensor, kv: &Counted) -> Result<Scores> {
        self.note(queries, kv, false)?;
        self.inner.window_scores(queries, &kv.kv)
    }

    fn biased_attention(
        &self,
        queries: &Tensor,
        kv: &Counted,
        visible: Visible<'_, Indices>,
        bias: &Bias<'_>,
    ) -> Result<Tensor> {
        self.inner.biased_attention(queries, &kv.kv, visible, bias)
    }

    fn biased_window_scores(&self, queries: &Tensor, kv: &Counted, bias: &Bias<'_>) -> Result<Scores> {
        self.note(queries, kv, false)?;
        self.inner.biased_window_scores(queries, &kv.kv, bias)
    }

    fn column_sums(
        &self,
        queries: &Tensor,
        kv: &Counted,
        columns: Columns,
        bias: Option<&Bias<'_>>,
    ) -> Result<Scores> {
        self.note(queries, kv, false)?;
        self.inner.column_sums(queries, &kv.kv, columns, bias)
    }

    fn add_scores(&self, a: &Scores, b: &Scores) -> Result<Scores> {
        self.inner.add_scores(a, b)
    }

    fn gather_scores(&self, scores: &Scores, entries: &Indices) -> Result<Scores> {
        self.inner.gather_scores(scores, entries)
    }

    fn raise_scores(&self, scores: &mut Scores, positions: &Indices, highlighted: &[bool]) -> Result<()> {
        self.inner.raise_scores(scores, positions, highlighted)
    }

    fn query_key_products(&self, query: &Tensor, kv: &Counted) -> Result<Scores> {
        self.note(query, kv, true)?;
        self.inner.query_key_products(query, &kv.kv)
    }

    fn retain_kv(&self, kv: &mut Counted, entries: &Indices) -> Result<()> {
        self.inner.retain_kv(&mut kv.kv, entries)?;
        self.recount(kv);
        Ok(())
    }

    fn rows(&self, x: &Tensor) -> usize {
        self.inner.rows(x)
    }

    fn slice_rows(&self, x: &Tensor, rows: Range<usize>) -> Result<Tensor> {
        self.inner.slice_rows(x, rows)
    }

    fn concat_rows(&self, parts: &[&Tensor]) -> Result<Tensor> {
        self.inner.concat_rows(parts)
    }

    fn pool_groups(&self, scores: &Scores, kv_heads: usize, keys: usize, pooling: Pooling) -> Result<Scores> {
        self.inner.pool_groups(scores, kv_heads, keys, pooling)
    }

    fn sum_heads(&self, scores: &Scores) -> Result<Scores> {
        self.inner.sum_heads(scores)
    }

    fn select(&self, scores: &Scores, select: Select) -> Result<Indices> {
        self.forced_or(scores, || self.inner.select(scores, select))
    }

    fn select_each(&self, scores: &Scores, counts: &[usize], tail: usize) -> Result<Indices> {
        self.forced_or(scores, || self.inner.select_each(scores, counts, tail))
    }

    fn indices(&self, lists: Vec<Vec<u32>>) -> Result<Indices> {
        self.inner.indices(lists)
    }

    fn write_list(&self, list: &mut Indices, numbers: &[u32]) -> Result<()> {
        self.inner.write_list(list, numbers)
    }

    fn read_indices(&self, indices: &Indices) -> Result<Vec<Vec<u32>>> {
        self.inner.read_indices(indices)
    }

    fn gather_indices(&self, list: &Indices, rows: &Indices) -> Result<Indices> {
        self.inner.gather_indices(list, rows)
    }

    fn gather_rows(&self, x: &Tensor, rows: &Indices) -> Result<Tensor> {
        self.inner.gather_rows(x, rows)
    }

    fn gather_kv(&self, kv: &Counted, entries: &Indices, slack: usize) -> Result<Counted> {
        let gathered = self.inner.gather_kv(&kv.kv, entries, slack)?;
        Ok(self.counted(gathered, kv.head_dim, kv.longest_key))
    }

    fn gather_kv_shared(&self, kv: &Counted, scores: &Scores, share: Share, slack: usize) -> Result<Counted> {
        let own = self.inner.gather_kv_shared(&kv.kv, scores, share, slack)?;
        let gathered = match self.next_forced(scores)? {
            Some(lists) => {
                let gathered = self.inner.gather_kv(&kv.kv, &lists, slack)?;
                let [found, expected] = [&gathered, &own].map(|kv| self.inner.kv_lengths(kv));
                let counts = found.into_iter().zip(expected).map(|(found, own)| [found, own]);
                self.judge_counts(&self.inner.read_scores(scores)?, share.mean, counts);
                gathered
            }
            None => own,
        };
        Ok(self.counted(gathered, kv.head_dim, kv.longest_key))
    }

    fn count_kv(&self, kv: Counted) -> Result<Counted> {
        Ok(kv)
    }

    fn join_kv(&self, stores: Vec<Counted>, room: usize) -> Result<Joined> {
        if self.fails_joining.swap(false, Relaxed) {
            return Err(BackendError::OutOfMemory { what: "a test", bytes: 1 });
        }
        let head_dim = stores[0].head_dim;
        let longest_key = stores.iter().map(|kv| kv.longest_key).fold(0.0, f64::max);
        let stores = stores.iter().map(|kv| kv.kv.clone()).collect();
        Ok(Joined { batch: self.inner.join_kv(stores, room)?, room, head_dim, longest_key })
    }

    fn split_kv(&self, batch: Joined, steps: usize) -> Result<Vec<Counted>> {
        let stores = self.inner.split_kv(batch.batch, steps)?.into_iter();
        Ok(stores.map(|kv| self.counted(kv, batch.head_dim, batch.longest_key)).collect())
    }

    fn decode_attention(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        positions: &Indices,
        batch: &mut Joined,
    ) -> Result<Tensor> {
        if self.failing_steps.load(Relaxed) > 0 && self.failing_steps.fetch_sub(1, Relaxed) == 1 {
            return Err(BackendError::OutOfMemory { what: "a test", bytes: 1 });
        }
        batch.room = batch.room.checked_sub(1).expect("room for the step");
        self.inner.decode_attention(queries, keys, values, positions, &mut batch.batch)
    }

    fn read(&self, x: &Tensor) -> Result<Vec<f32>> {
        self.inner.read(x)
    }

    fn read_scores(&self, scores: &Scores) -> Result<Vec<Vec<f32>>> {
        self.inner.read_scores(scores)
    }
}
