//! The CPU backend: f32 on all cores.

mod attention;
mod columns;
mod gemm;
mod linear;
mod scores;
mod simd;
mod tensor;
mod weight;

use std::ops::Range;

use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use self::tensor::KvHead;
pub use self::tensor::{Indices, Kv, KvBatch, Rotary, Scores, Tensor};
pub use self::weight::Weight;
use super::{Backend, BackendError, Bias, Columns, Select, Share, Visible};
use crate::messages::count;
use crate::model::StoredTensor;
use crate::policy::Pooling;

/// A pool of worker threads and f32 arithmetic.
#[derive(Debug)]
pub struct CpuBackend {
    pool: ThreadPool,
}

/// Rows below which an element-wise operation is not worth sharing out.
const ROWS_PER_TASK: usize = 16;

impl CpuBackend {
    /// A backend with this many worker threads; `None`: one for each core.
    ///
    /// # Errors
    /// [`BackendError::Threads`] where the system does not start them.
    pub fn new(threads: Option<usize>) -> Result<Self, BackendError> {
        let threads = threads.unwrap_or(0);
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("fastkv-{index}"))
            .build()
            .map_err(|error| BackendError::Threads { threads, reason: error.to_string() })?;
        Ok(Self { pool })
    }

    /// Worker threads.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Calls `work(row number, row)` for every row.
    fn for_rows(&self, data: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
        if data.len() <= ROWS_PER_TASK * width {
            data.chunks_exact_mut(width).enumerate().for_each(|(row, data)| work(row, data));
        } else {
            self.pool.install(|| {
                data.par_chunks_exact_mut(width)
                    .with_min_len(ROWS_PER_TASK)
                    .enumerate()
                    .for_each(|(row, data)| work(row, data));
            });
        }
    }

    /// Attention, steered or not.
    fn attend(
        &self,
        queries: &Tensor,
        kv: &Kv,
        visible: Visible<'_, Indices>,
        bias: Option<&Bias<'_>>,
    ) -> Result<Tensor, BackendError> {
        check_queries("attention", queries, kv)?;
        check_bias("attention", queries, kv, bias)?;
        let count = queries.rows;
        match visible {
            Visible::Aligned => {
                if let Some(head) = kv.heads.iter().find(|head| head.len() < count) {
                    let problem = format!("{count} queries for the last of {} keys", head.len());
                    return Err(shape("attention", problem));
                }
                self.pool.install(|| {
                    attention::attention(queries, kv, bias, |length, row| length - count + row + 1)
                })
            }
            Visible::Rows { rows, first } => {
                let rows = rows.single("attention")?;
                let fits = |row: &u32| kv.heads.iter().all(|head| (*row as usize) < head.len());
                let Some(rows) =
                    rows.get(first..first.saturating_add(count)).filter(|rows| rows.iter().all(fits))
                else {
                    let problem = format!("{count} queries from element {first} of {} rows", rows.len());
                    return Err(shape("attention", problem));
                };
                self.pool.install(|| attention::attention(queries, kv, bias, |_, row| rows[row] as usize + 1))
            }
        }
    }
}

impl Backend for CpuBackend {
    type Tensor = Tensor;
    type Weight = Weight;
    type Rotary = Rotary;
    type Scores = Scores;
    type Indices = Indices;
    type Kv = Kv;
    type UncountedKv = Kv;
    type KvBatch = KvBatch;
    type Recording = ();

    fn name(&self) -> String {
        format!("cpu, {}, f32", count(self.threads(), "thread"))
    }

    fn kv_element_bytes(&self) -> usize {
        size_of::<f32>()
    }

    fn windows_at_once(&self) -> usize {
        self.threads()
    }

    fn chunk_rows(&self) -> usize {
        // Enough rows for every thread; beyond some thousands only memory grows.
        (512 * self.threads()).clamp(1024, 4096)
    }

    fn weight(&self, stored: &StoredTensor) -> Result<Weight, BackendError> {
        Ok(Weight::new(stored))
    }

    fn embed(&self, table: &Weight, ids: &[u32]) -> Result<Tensor, BackendError> {
        let (vocabulary, width) = table.matrix("embed")?;
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
            return Err(shape("embed", format!("token {id} in a vocabulary of {vocabulary}")));
        }
        let mut out = Tensor::zeros("embeddings", ids.len(), width)?;
        let mut scratch = Vec::new();
        for (row, id) in out.data.chunks_exact_mut(width).zip(ids) {
            let first = *id as usize * width;
            row.copy_from_slice(table.widened(first..first + width, &mut scratch));
        }
        Ok(out)
    }

    fn embed_list(&self, table: &Weight, ids: &Indices) -> Result<Tensor, BackendError> {
        self.embed(table, ids.single("embed_list")?)
    }

    fn rms_norm(
        &self,
        x: &Tensor,
        rows: Range<usize>,
        weight: &Weight,
        epsilon: f32,
    ) -> Result<Tensor, BackendError> {
        let width = x.width;
        if rows.start > rows.end || rows.end > x.rows {
            return Err(shape("rms_norm", format!("rows {rows:?} of {}", x.rows)));
        }
        let weight = weight.vector("rms_norm", width)?;
        let mut out = Tensor::zeros("normed activations", rows.len(), width)?;
        let x = &x.data[rows.start * width..rows.end * width];
        self.for_rows(&mut out.data, width, |row, out| {
            simd::rms_norm(out, &x[row * width..(row + 1) * width], weight, epsilon);
        });
        Ok(out)
    }

    fn linear(&self, x: &Tensor, weight: &Weight, bias: Option<&Weight>) -> Result<Tensor, BackendError> {
        self.pool.install(|| linear::linear(x, weight, bias))
    }

    fn swiglu(&self, mut gate: Tensor, up: &Tensor) -> Result<Tensor, BackendError> {
        let width = gate.width;
        same_shape("swiglu", &gate, up.rows, up.width)?;
        self.for_rows(&mut gate.data, width, |row, gate| {
            simd::swiglu(gate, &up.data[row * width..(row + 1) * width]);
        });
        Ok(gate)
    }

    fn add(&self, x: &mut Tensor, first_row: usize, y: &Tensor) -> Result<(), BackendError> {
        let width = x.width;
        if y.width != width || first_row.saturating_add(y.rows) > x.rows {
            let problem = format!("{}×{} at row {first_row} of {}×{width}", y.rows, y.width, x.rows);
            return Err(shape("add", problem));
        }
        let rows = &mut x.data[first_row * width..(first_row + y.rows) * width];
        self.for_rows(rows, width, |row, x| {
            simd::add_scaled(x, &y.data[row * width..(row + 1) * width], 1.0);
        });
        Ok(())
    }

    fn rotary(&self, inverse_frequencies: &[f32], positions: &Indices) -> Result<Rotary, BackendError> {
        let positions = positions.single("rotary")?;
        let half = inverse_frequencies.len();
        if half == 0 {
            return Err(shape("rotary", "0 frequencies, where a head needs at least 1".to_owned()));
        }
        let mut cosines = tensor::zeros("cosines", positions.len(), half)?;
        let mut sines = tensor::zeros("sines", positions.len(), half)?;
        self.pool.install(|| {
            cosines.par_chunks_exact_mut(half).zip(sines.par_chunks_exact_mut(half)).zip(positions).for_each(
                |((cosines, sines), position)| {
                    for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(inverse_frequencies)
                    {
                        (*sine, *cosine) = (*position as f32 * frequency).sin_cos();
                    }
                },
            );
        });
        Ok(Rotary { half, cosines, sines })
    }

    fn rotate(&self, x: &mut Tensor, angles: &Rotary, first_row: usize) -> Result<(), BackendError> {
        let Rotary { half, cosines, sines } = angles;
        if !x.width.is_multiple_of(2 * half) || first_row.saturating_add(x.rows) > cosines.len() / half {
            let problem = format!(
                "{} rows of {} from row {first_row}, with {} angles of {half}",
                x.rows,
                x.width,
                cosines.len() / half
            );
            return Err(shape("rotate", problem));
        }
        let width = x.width;
        self.for_rows(&mut x.data, width, |row, x| {
            let angles = (first_row + row) * half..(first_row + row + 1) * half;
            for head in x.chunks_exact_mut(2 * half) {
                simd::rotate(head, &cosines[angles.clone()], &sines[angles.clone()]);
            }
        });
        Ok(())
    }

    fn new_kv(&self, kv_heads: usize, head_dim: usize, capacity: usize) -> Result<Kv, BackendError> {
        if kv_heads == 0 || head_dim == 0 {
            return Err(shape("new_kv", format!("{kv_heads} kv heads of {head_dim}")));
        }
        let heads = (0..kv_heads).map(|_| KvHead::with_capacity(head_dim, capacity));
        Ok(Kv { head_dim, heads: heads.collect::<Result<_, _>>()? })
    }

    fn append_kv(
        &self,
        kv: &mut Kv,
        keys: &Tensor,
        values: &Tensor,
        positions: &Indices,
        first_row: usize,
    ) -> Result<(), BackendError> {
        let head_dim = kv.head_dim;
        same_shape("append_kv", keys, values.rows, kv.heads.len() * head_dim)?;
        same_shape("append_kv", values, keys.rows, keys.width)?;
        let positions = positions.single("append_kv")?;
        let Some(positions) = positions.get(first_row..first_row.saturating_add(keys.rows)) else {
            let problem = format!("{} rows from row {first_row} of {}", keys.rows, positions.len());
            return Err(shape("append_kv", problem));
        };
        for (index, head) in kv.heads.iter_mut().enumerate() {
            let column = index * head_dim..(index + 1) * head_dim;
            for (key, value) in keys.data.chunks_exact(keys.width).zip(values.data.chunks_exact(values.width))
            {
                head.keys.extend_from_slice(&key[column.clone()]);
                head.values.extend_from_slice(&value[column.clone()]);
            }
            head.positions.extend_from_slice(positions);
        }
        Ok(())
    }

    fn truncate_kv(&self, kv: &mut Kv, lengths: &[usize]) -> Result<(), BackendError> {
        if lengths.len() != kv.heads.len() {
            return Err(shape(
                "truncate_kv",
                format!("{} lengths for {} kv heads", lengths.len(), kv.heads.len()),
            ));
        }
        for (head, length) in kv.heads.iter_mut().zip(lengths) {
            head.truncate(*length, kv.head_dim);
        }
        Ok(())
    }

    fn kv_lengths(&self, kv: &Kv) -> Vec<usize> {
        kv.heads.iter().map(KvHead::len).collect()
    }

    fn kv_positions(&self, kv: &Kv) -> Result<Vec<Vec<u32>>, BackendError> {
        Ok(kv.heads.iter().map(|head| head.positions.clone()).collect())
    }

    fn attention(
        &self,
        queries: &Tensor,
        kv: &Kv,
        visible: Visible<'_, Indices>,
    ) -> Result<Tensor, BackendError> {
        self.attend(queries, kv, visible, None)
    }

    fn window_scores(&self, queries: &Tensor, kv: &Kv) -> Result<Scores, BackendError> {
        check_queries("window_scores", queries, kv)?;
        self.pool.install(|| scores::window_scores(queries, kv, None))
    }

    fn biased_attention(
        &self,
        queries: &Tensor,
        kv: &Kv,
        visible: Visible<'_, Indices>,
        bias: &Bias<'_>,
    ) -> Result<Tensor, BackendError> {
        self.attend(queries, kv, visible, Some(bias))
    }

    fn biased_window_scores(
        &self,
        queries: &Tensor,
        kv: &Kv,
        bias: &Bias<'_>,
    ) -> Result<Scores, BackendError> {
        check_queries("biased_window_scores", queries, kv)?;
        check_bias("biased_window_scores", queries, kv, Some(bias))?;
        self.pool.install(|| scores::window_scores(queries, kv, Some(bias)))
    }

    fn column_sums(
        &self,
        queries: &Tensor,
        kv: &Kv,
        columns: Columns,
        bias: Option<&Bias<'_>>,
    ) -> Result<Scores, BackendError> {
        check_queries("column_sums", queries, kv)?;
        check_bias("column_sums", queries, kv, bias)?;
        if let Some(head) = kv.heads.iter().find(|head| head.len() < queries.rows) {
            return Err(shape(
                "column_sums",
                format!("{} queries for the last of {} keys", queries.rows, head.len()),
            ));
        }
        self.pool.install(|| columns::column_sums(queries, kv, columns, bias))
    }

    fn add_scores(&self, a: &Scores, b: &Scores) -> Result<Scores, BackendError> {
        scores::add(a, b)
    }

    fn gather_scores(&self, scores: &Scores, entries: &Indices) -> Result<Scores, BackendError> {
        scores::gather(scores, entries)
    }

    fn raise_scores(
        &self,
        scores: &mut Scores,
        positions: &Indices,
        highlighted: &[bool],
    ) -> Result<(), BackendError> {
        let positions = positions.single("raise_scores")?;
        if positions.len() < scores.keys {
            let problem = format!("{} positions for {} keys", positions.len(), scores.keys);
            return Err(shape("raise_scores", problem));
        }
        scores::raise(scores, positions, highlighted);
        Ok(())
    }

    fn query_key_products(&self, query: &Tensor, kv: &Kv) -> Result<Scores, BackendError> {
        check_queries("query_key_products", query, kv)?;
        self.pool.install(|| scores::query_key_products(query, kv))
    }

    fn retain_kv(&self, kv: &mut Kv, entries: &Indices) -> Result<(), BackendError> {
        if entries.lists.len() != kv.heads.len() {
            let problem = format!("{} lists for {} kv heads", entries.lists.len(), kv.heads.len());
            return Err(shape("retain_kv", problem));
        }
        for (head, list) in kv.heads.iter().zip(&entries.lists) {
            let ascends = list.windows(2).all(|pair| pair[0] < pair[1]);
            if !ascends || list.last().is_some_and(|last| *last as usize >= head.len()) {
                let problem = format!("entries of {} that do not ascend, or are not there", head.len());
                return Err(shape("retain_kv", problem));
            }
        }
        let width = kv.head_dim;
        for (head, list) in kv.heads.iter_mut().zip(&entries.lists) {
            for (to, &entry) in list.iter().enumerate() {
                let from = entry as usize;
                head.keys.copy_within(from * width..(from + 1) * width, to * width);
                head.values.copy_within(from * width..(from + 1) * width, to * width);
                head.positions[to] = head.positions[from];
            }
            head.truncate(list.len(), width);
        }
        Ok(())
    }

    fn rows(&self, x: &Tensor) -> usize {
        x.rows
    }

    fn slice_rows(&self, x: &Tensor, rows: Range<usize>) -> Result<Tensor, BackendError> {
        if rows.start > rows.end || rows.end > x.rows {
            return Err(shape("slice_rows", format!("rows {rows:?} of {}", x.rows)));
        }
        let data = x.data[rows.start * x.width..rows.end * x.width].to_vec();
        Ok(Tensor { rows: rows.len(), width: x.width, data })
    }

    fn concat_rows(&self, parts: &[&Tensor]) -> Result<Tensor, BackendError> {
        let Some(first) = parts.first() else { return Err(shape("concat_rows", "no parts".to_owned())) };
        let rows = parts.iter().map(|part| part.rows).sum();
        parts.iter().try_for_each(|part| same_shape("concat_rows", part, part.rows, first.width))?;
        let data = parts.iter().flat_map(|part| part.data.iter().copied()).collect();
        Ok(Tensor { rows, width: first.width, data })
    }

    fn pool_groups(
        &self,
        scores: &Scores,
        kv_heads: usize,
        keys: usize,
        pooling: Pooling,
    ) -> Result<Scores, BackendError> {
        self.pool.install(|| scores::pool_groups(scores, kv_heads, keys, pooling))
    }

    fn sum_heads(&self, scores: &Scores) -> Result<Scores, BackendError> {
        scores::sum_heads(scores)
    }

    fn select(&self, scores: &Scores, select: Select) -> Result<Indices, BackendError> {
        let heads = scores.heads().count();
        scores::select(scores, &vec![select.count; heads], select.tail)
    }

    fn select_each(&self, scores: &Scores, counts: &[usize], tail: usize) -> Result<Indices, BackendError> {
        scores::select(scores, counts, tail)
    }

    fn indices(&self, lists: Vec<Vec<u32>>) -> Result<Indices, BackendError> {
        Ok(Indices { lists })
    }

    fn write_list(&self, list: &mut Indices, numbers: &[u32]) -> Result<(), BackendError> {
        let length = list.single("write_list")?.len();
        if numbers.len() != length {
            return Err(shape("write_list", format!("{} numbers for a list of {length}", numbers.len())));
        }
        list.lists = vec![numbers.to_vec()];
        Ok(())
    }

    fn read_indices(&self, indices: &Indices) -> Result<Vec<Vec<u32>>, BackendError> {
        Ok(indices.lists.clone())
    }

    fn gather_indices(&self, list: &Indices, rows: &Indices) -> Result<Indices, BackendError> {
        let list = list.single("gather_indices")?;
        let rows = rows.single("gather_indices")?;
        let gathered = rows.iter().map(|&row| list.get(row as usize).copied()).collect::<Option<_>>();
        let gathered = gathered
            .ok_or_else(|| shape("gather_indices", format!("a row beyond the {} there are", list.len())))?;
        Ok(Indices { lists: vec![gathered] })
    }

    fn gather_rows(&self, x: &Tensor, rows: &Indices) -> Result<Tensor, BackendError> {
        let rows = rows.single("gather_rows")?;
        let mut out = Tensor::zeros("gathered rows", rows.len(), x.width)?;
        gather(&mut out.data, &x.data, x.width, rows, "gather_rows")?;
        Ok(out)
    }

    fn gather_kv(&self, kv: &Kv, entries: &Indices, slack: usize) -> Result<Kv, BackendError> {
        if entries.lists.len() != kv.heads.len() {
            let problem = format!("{} lists for {} kv heads", entries.lists.len(), kv.heads.len());
            return Err(shape("gather_kv", problem));
        }
        let heads = kv.heads.iter().zip(&entries.lists).map(|(head, entries)| {
            let mut kept = KvHead::with_capacity(kv.head_dim, entries.len().saturating_add(slack))?;
            kept.keys.resize(entries.len() * kv.head_dim, 0.0);
            kept.values.resize(entries.len() * kv.head_dim, 0.0);
            gather(&mut kept.keys, &head.keys, kv.head_dim, entries, "gather_kv")?;
            gather(&mut kept.values, &head.values, kv.head_dim, entries, "gather_kv")?;
            kept.positions.extend(entries.iter().map(|&entry| head.positions[entry as usize]));
            Ok(kept)
        });
        Ok(Kv { head_dim: kv.head_dim, heads: heads.collect::<Result<_, BackendError>>()? })
    }

    fn gather_kv_shared(
        &self,
        kv: &Kv,
        scores: &Scores,
        share: Share,
        slack: usize,
    ) -> Result<Kv, BackendError> {
        if !(0.0..=1.0).contains(&share.floor) {
            return Err(shape("gather_kv_shared", format!("a floor of {}, no share", share.floor)));
        }
        if kv.heads.iter().any(|head| head.len() != scores.keys.saturating_add(share.tail)) {
            let lengths: Vec<_> = kv.heads.iter().map(KvHead::len).collect();
            let problem =
                format!("lists of {lengths:?} for {} scores and a tail of {}", scores.keys, share.tail);
            return Err(shape("gather_kv_shared", problem));
        }
        let kept = scores::select(scores, &scores::shared_counts(scores, share), share.tail)?;
        self.gather_kv(kv, &kept, slack)
    }

    fn count_kv(&self, kv: Kv) -> Result<Kv, BackendError> {
        Ok(kv)
    }

    fn join_kv(&self, stores: Vec<Kv>, room: usize) -> Result<KvBatch, BackendError> {
        KvBatch::join(stores, room)
    }

    fn split_kv(&self, batch: KvBatch, steps: usize) -> Result<Vec<Kv>, BackendError> {
        Ok(batch.split(steps))
    }

    fn decode_attention(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        positions: &Indices,
        batch: &mut KvBatch,
    ) -> Result<Tensor, BackendError> {
        let sequences = batch.stores.len();
        same_shape("decode_attention", queries, sequences, queries.width)?;
        let attend = |(row, kv): (usize, &mut Kv)| {
            let of_row = |x| self.slice_rows(x, row..row + 1);
            self.append_kv(kv, &of_row(keys)?, &of_row(values)?, positions, row)?;
            self.attention(&of_row(queries)?, kv, Visible::Aligned)
        };
        let attended = batch.stores.iter_mut().enumerate().map(attend).collect::<Result<Vec<_>, _>>()?;
        self.concat_rows(&attended.iter().collect::<Vec<_>>())
    }

    fn read(&self, x: &Tensor) -> Result<Vec<f32>, BackendError> {
        Ok(x.data.clone())
    }

    fn read_scores(&self, scores: &Scores) -> Result<Vec<Vec<f32>>, BackendError> {
        Ok(scores.heads().map(<[f32]>::to_vec).collect())
    }
}

fn gather(
    out: &mut [f32],
    from: &[f32],
    width: usize,
    rows: &[u32],
    operation: &'static str,
) -> Result<(), BackendError> {
    for (out, &row) in out.chunks_exact_mut(width).zip(rows) {
        let first = row as usize * width;
        let row = from
            .get(first..first + width)
            .ok_or_else(|| shape(operation, format!("row {row} of {}", from.len() / width)))?;
        out.copy_from_slice(row);
    }
    Ok(())
}

fn check_queries(operation: &'static str, queries: &Tensor, kv: &Kv) -> Result<(), BackendError> {
    let kv_width = kv.heads.len() * kv.head_dim;
    if kv_width == 0 || queries.width == 0 || !queries.width.is_multiple_of(kv_width) {
        let problem = format!(
            "queries of {} elements are no whole groups of {} kv heads of {}",
            queries.width,
            kv.heads.len(),
            kv.head_dim
        );
        return Err(shape(operation, problem));
    }
    Ok(())
}

fn check_bias(
    operation: &'static str,
    queries: &Tensor,
    kv: &Kv,
    bias: Option<&Bias<'_>>,
) -> Result<(), BackendError> {
    let heads = queries.width / kv.head_dim;
    match bias {
        Some(bias) if bias.heads.len() != heads => {
            Err(shape(operation, format!("a bias of {} heads for {heads}", bias.heads.len())))
        }
        _ => Ok(()),
    }
}

fn same_shape(operation: &'static str, x: &Tensor, rows: usize, width: usize) -> Result<(), BackendError> {
    if (x.rows, x.width) == (rows, width) {
        return Ok(());
    }
    Err(shape(operation, format!("{}×{} beside {rows}×{width}", x.rows, x.width)))
}

fn shape(operation: &'static str, problem: String) -> BackendError {
    BackendError::Shape { operation, problem }
}
