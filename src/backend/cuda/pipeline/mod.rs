//! The CUDA backend: the drivers of the kernels behind [`Backend`], on any [`Device`].
//!
//! Nothing but `read*`, `kv_positions` and `count_kv` waits for the device: what the host has to know, it knows from
//! the counts of a plan.

mod attention;
mod batch;
mod columns;
mod eviction;
mod handles;
mod memory;
mod requirements;
mod selection;
mod steering;

use std::fmt::{Debug, Display};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};

pub use self::batch::{KvBatch, Recording};
pub use self::handles::{Indices, Kv, Rotary, Scores, Tensor, UncountedKv, Weight};
use self::handles::{List, Span};
use self::memory::{Block, Machine};
pub use self::requirements::check_model;
use self::steering::Marks;
use super::CudaLauncher;
use crate::abi::{Kept, Pages, Rows, Slots};
use crate::backend::{Backend, BackendError, Bias, Columns, Select, Share, Visible};
use crate::kernels::activation::{Add, Convert, SiluMul, add, convert, silu_mul};
use crate::kernels::embed::{Embed, embed};
use crate::kernels::gather::{GatherIndices, GatherKv, GatherRows, gather_indices, gather_kv, gather_rows};
use crate::kernels::norm::{RmsNorm, rms_norm};
use crate::kernels::rope::{Append, Rope, rope};
use crate::kernels::{DType, Device, Matmul, MatrixProduct};
use crate::model::{Dtype, StoredTensor};
use crate::policy::{MAX_WINDOW, Pooling};

/// A GPU, or what stands for one in tests. Products, attention and the cache are in the model's 16-bit
/// type with sums in f32; the residual stream is f32 (see [`RmsNorm`] for why), and so are scores and the
/// logits.
#[derive(Debug)]
pub struct CudaBackend<D: Device = CudaLauncher> {
    machine: Arc<Machine<D>>,
    name: String,
    dtype: DType,
    chunk_rows: usize,
    /// Scratch memory of matrix products, which run one after the other.
    workspace: Block<D>,
    workspace_bytes: usize,
    /// The inverse frequencies used last: a prompt asks for the same ones again and again.
    frequencies: Mutex<Option<Frequencies<D>>>,
    /// The highlighted tokens used last, in the same way.
    marks: Mutex<Option<Marks<D>>>,
}

/// Inverse frequencies, and where they lie.
type Frequencies<D> = (Vec<f32>, Arc<Block<D>>);

/// Rows of a pass through a layer: enough to keep a GPU busy, and little memory beside a long prompt.
const CHUNK_ROWS: usize = 8192;

impl<D: MatrixProduct + Debug> CudaBackend<D> {
    /// A backend for models of a 16-bit type. Weights that are stored in another are converted to it, so
    /// BF16 is what an f32 checkpoint gets.
    ///
    /// # Errors
    /// A library for matrix products that is missing, a type of 32 bits, or a device without room.
    pub fn new(device: D, name: impl Into<String>, dtype: DType) -> Result<Self, BackendError> {
        if dtype == DType::F32 {
            return Err(shape("a CUDA backend", "an element type of F32, where it takes F16 or BF16".into()));
        }
        let workspace_bytes = device.matmul_workspace()?;
        let machine = Arc::new(Machine::new(device));
        let workspace = machine.block("the scratch memory of matrix products", workspace_bytes)?;
        let name = format!("{}, {}", name.into(), if dtype == DType::F16 { "f16" } else { "bf16" });
        let chunk_rows = CHUNK_ROWS;
        let (frequencies, marks) = (Mutex::default(), Mutex::default());
        Ok(Self { machine, name, dtype, chunk_rows, workspace, workspace_bytes, frequencies, marks })
    }

    /// Passes of another number of rows through a layer; at least [`MAX_WINDOW`].
    #[must_use]
    pub fn with_chunk_rows(mut self, rows: usize) -> Self {
        self.chunk_rows = rows.max(MAX_WINDOW);
        self
    }

    /// The device it runs on.
    pub fn device(&self) -> &D {
        &self.machine.device
    }

    /// The model's type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of device memory in use, and the most at once since [`forget_peak`](Self::forget_peak).
    pub fn memory(&self) -> (usize, usize) {
        self.machine.used()
    }

    /// Begins to look for the peak anew.
    pub fn forget_peak(&self) {
        self.machine.forget_peak();
    }

    /// A weight whose elements the caller writes, given their address: for those that are no file's.
    ///
    /// # Errors
    /// A device without room, and what `write` says.
    pub fn weight_with(
        &self,
        shape: &[usize],
        write: impl FnOnce(&D, u64) -> Result<(), crate::kernels::Error>,
    ) -> Result<Weight<D>, BackendError> {
        let block = self.machine.array("a weight", shape.iter().product(), 2)?;
        write(&self.machine.device, block.address())?;
        Ok(Weight { block, shape: shape.to_vec() })
    }

    fn tensor(
        &self,
        what: &'static str,
        rows: usize,
        width: usize,
        dtype: DType,
    ) -> Result<Tensor<D>, BackendError> {
        let elements = rows.saturating_mul(width);
        Ok(Tensor { block: self.machine.array(what, elements, dtype.bytes() as usize)?, rows, width, dtype })
    }

    /// `x` in the model's type, converted to `scratch` where it is not.
    fn narrow<'a>(
        &self,
        x: &'a Tensor<D>,
        scratch: &'a mut Option<Tensor<D>>,
    ) -> Result<&'a Tensor<D>, BackendError> {
        if x.dtype == self.dtype {
            return Ok(x);
        }
        let out = self.tensor("narrowed activations", x.rows, x.width, self.dtype)?;
        let work = Convert {
            x: x.matrix(0),
            out: out.matrix(0),
            rows: x.rows as u32,
            width: x.width as u32,
            x_dtype: x.dtype,
            out_dtype: out.dtype,
        };
        // SAFETY: two live tensors of the size stated, in stream order.
        unsafe { convert(self.device(), &work) }?;
        Ok(scratch.insert(out))
    }

    /// The normed rows of `x`, to which something may be added first.
    fn norm(
        &self,
        x: &Tensor<D>,
        rows: Range<usize>,
        added: Option<Rows>,
        weight: u64,
        epsilon: f32,
    ) -> Result<Tensor<D>, BackendError> {
        let out = self.tensor("normed activations", rows.len(), x.width, self.dtype)?;
        let work = RmsNorm {
            x: x.matrix(rows.start),
            added,
            out: out.matrix(0),
            weight,
            rows: rows.len() as u32,
            width: x.width as u32,
            x_dtype: x.dtype,
            dtype: out.dtype,
            epsilon,
        };
        // SAFETY: live blocks of the sizes stated, in stream order.
        unsafe { rms_norm(self.device(), &work) }?;
        Ok(out)
    }

    /// `x · weightᵀ + bias` in the first columns of `out`.
    fn product(
        &self,
        x: &Tensor<D>,
        weight: &Weight<D>,
        bias: Option<&Weight<D>>,
        out: &Tensor<D>,
    ) -> Result<(), BackendError> {
        let (columns, inner) = weight.matrix("linear")?;
        if x.width != inner {
            return Err(shape("linear", format!("rows of {} for a weight of {inner} columns", x.width)));
        }
        let bias = bias.map_or(Ok(0), |bias| bias.vector("linear", columns))?;
        let mut scratch = None;
        let x = self.narrow(x, &mut scratch)?;
        let weight = Rows { base: weight.block.address(), token_stride: inner as i64, ..Rows::default() };
        self.multiply(x.matrix(0), x.rows, weight, [columns, inner], bias, (out.matrix(0), out.dtype))
    }

    fn multiply(
        &self,
        x: Rows,
        rows: usize,
        weight: Rows,
        [columns, inner]: [usize; 2],
        bias: u64,
        (out, out_dtype): (Rows, DType),
    ) -> Result<(), BackendError> {
        let work = Matmul {
            x,
            weight,
            bias,
            out,
            accumulate: false,
            rows: rows as u32,
            columns: columns as u32,
            inner: inner as u32,
            dtype: self.dtype,
            out_dtype,
            workspace: self.workspace.address(),
            workspace_bytes: self.workspace_bytes,
        };
        // SAFETY: live blocks of the sizes stated, in stream order.
        Ok(unsafe { self.device().matmul(&work) }?)
    }

    fn frequencies(&self, values: &[f32]) -> Result<Arc<Block<D>>, BackendError> {
        let mut last = self.frequencies.lock().unwrap_or_else(PoisonError::into_inner);
        let block = match &*last {
            Some((known, block)) if known == values => Arc::clone(block),
            _ => {
                let block = Arc::new(self.machine.upload("rotary frequencies", values)?);
                *last = Some((values.to_vec(), Arc::clone(&block)));
                block
            }
        };
        // Another thread may ask for others, and this block would go.
        self.machine.hold(&block);
        Ok(block)
    }

    /// A store with lists of these lengths and so many rows more in each.
    fn store(
        &self,
        head_dim: usize,
        lengths: &[usize],
        room: usize,
        shared: bool,
    ) -> Result<Kv<D>, BackendError> {
        let mut start = 0_usize;
        let lists: Vec<List> = lengths
            .iter()
            .map(|&length| {
                let list = List { start, length, capacity: length.saturating_add(room) };
                start = start.saturating_add(list.capacity);
                list
            })
            .collect();
        let kv = Kv { lists, shared, ..self.blank(head_dim, lengths.len(), start)? };
        let starts: Vec<i64> = kv.lists.iter().map(|list| list.start as i64).collect();
        kv.starts.write(0, bytemuck::cast_slice(&starts))?;
        self.write_lengths(&kv)?;
        Ok(kv)
    }

    /// Blocks for so many lists, of so many rows together, without any lists.
    fn blank(&self, head_dim: usize, lists: usize, rows: usize) -> Result<Kv<D>, BackendError> {
        Ok(Kv {
            keys: self.machine.array("keys", rows.saturating_mul(head_dim), 2)?,
            values: self.machine.array("values", rows.saturating_mul(head_dim), 2)?,
            positions: self.machine.array("positions of keys", rows, 4)?,
            starts: self.machine.array("starts of lists", lists, 8)?,
            lengths: self.machine.array("lengths of lists", 2 * lists, 4)?,
            second_half: false,
            head_dim,
            lists: Vec::new(),
            shared: false,
        })
    }

    fn write_lengths(&self, kv: &Kv<D>) -> Result<(), BackendError> {
        let lengths: Vec<i32> = kv.lists.iter().map(|list| list.length as i32).collect();
        let offset = if kv.second_half { 4 * lengths.len() } else { 0 };
        kv.lengths.write(offset, bytemuck::cast_slice(&lengths))
    }

    /// The same entries with room for more in every list.
    fn grown(&self, kv: &Kv<D>, room: usize) -> Result<Kv<D>, BackendError> {
        let lists: Vec<_> = kv.lists.iter().map(|list| (kv, *list)).collect();
        self.copied(kv.head_dim, &lists, room, kv.shared)
    }

    /// A store of lists that lie elsewhere, with room for more in each.
    fn copied(
        &self,
        head_dim: usize,
        lists: &[(&Kv<D>, List)],
        room: usize,
        shared: bool,
    ) -> Result<Kv<D>, BackendError> {
        let lengths: Vec<usize> = lists.iter().map(|(_, list)| list.length).collect();
        let copied = self.store(head_dim, &lengths, room, shared)?;
        for ((kv, from), to) in lists.iter().zip(&copied.lists) {
            for (to_block, from_block, row_bytes) in [
                (&copied.keys, &kv.keys, 2 * head_dim),
                (&copied.values, &kv.values, 2 * head_dim),
                (&copied.positions, &kv.positions, 4),
            ] {
                let (to, from_at) = (to.start * row_bytes, from.start * row_bytes);
                to_block.copy(to, from_block, from_at, from.length * row_bytes)?;
            }
        }
        Ok(copied)
    }

    /// Copies the listed entries of a store into the lists of another, whose lengths and starts are on the device.
    fn gather_into(
        &self,
        out: &Kv<D>,
        rows: usize,
        kv: &Kv<D>,
        entries: u64,
        capacity: usize,
    ) -> Result<(), BackendError> {
        // Positions are those of the tokens, where all heads have the same ones.
        let spans = if kv.shared { kv.spans() } else { kv.lists_apart() };
        for span in spans {
            let Span { first_head, heads, list } = span;
            let first = first_head as u64;
            let work = GatherKv {
                kept: Kept {
                    indices: entries + 4 * first * capacity as u64,
                    index_head_stride: capacity as i64,
                    lengths: out.lengths_address(false) + 4 * first,
                    starts: out.starts.address() + 8 * first,
                    positions: kv.positions.address() + 4 * list.start as u64,
                    positions_out: out.positions.address(),
                    out_rows: rows as i64,
                    sequences: 1,
                    heads: heads as i32,
                    tokens: list.length as i32,
                    capacity: capacity as i32,
                    ..Kept::default()
                },
                k: kv.tensor(&kv.keys, span),
                v: kv.tensor(&kv.values, span),
                pages: Pages::default(),
                slots: Slots::default(),
                k_out: out.keys.address(),
                v_out: out.values.address(),
                head_dim: kv.head_dim as u32,
                dtype: self.dtype,
            };
            // SAFETY: live blocks of the sizes stated, in stream order.
            unsafe { gather_kv(self.device(), &work) }?;
        }
        Ok(())
    }
}

impl<D: MatrixProduct + Debug> Backend for CudaBackend<D> {
    type Tensor = Tensor<D>;
    type Weight = Weight<D>;
    type Rotary = Rotary<D>;
    type Scores = Scores<D>;
    type Indices = Indices<D>;
    type Kv = Kv<D>;
    type UncountedKv = UncountedKv<D>;
    type KvBatch = KvBatch<D>;
    type Recording = Recording<D>;

    fn name(&self) -> String {
        self.name.clone()
    }

    fn kv_element_bytes(&self) -> usize {
        self.dtype.bytes() as usize
    }

    fn chunk_rows(&self) -> usize {
        self.chunk_rows
    }

    fn free_memory(&self) -> Option<u64> {
        self.device().free_memory()
    }

    fn reserve(&self, bytes: u64) {
        // A hint. A device that is lost says so again.
        let _ = usize::try_from(bytes).map(|bytes| self.device().reserve(bytes));
    }

    fn weight_bytes(&self, stored: &StoredTensor) -> u64 {
        stored.len() as u64 * u64::from(self.dtype.bytes())
    }

    fn weight(&self, stored: &StoredTensor) -> Result<Weight<D>, BackendError> {
        let same = match stored.dtype() {
            Dtype::Bf16 => self.dtype == DType::BF16,
            Dtype::F16 => self.dtype == DType::F16,
            Dtype::F32 => false,
        };
        let block = self.machine.array("a weight", stored.len(), 2)?;
        if same && cfg!(target_endian = "little") {
            block.write(0, stored.bytes())?;
        } else {
            // Panel by panel, so that a large tensor is not in host memory twice over.
            let mut wide = vec![0.0; stored.len().min(CONVERTED)];
            for first in (0..stored.len()).step_by(CONVERTED) {
                let wide = &mut wide[..CONVERTED.min(stored.len() - first)];
                stored.read_f32(first, wide);
                let narrow: Vec<u16> = match self.dtype {
                    DType::F16 => wide.iter().map(|value| f16::from_f32(*value).to_bits()).collect(),
                    _ => wide.iter().map(|value| bf16::from_f32(*value).to_bits()).collect(),
                };
                block.write(2 * first, bytemuck::cast_slice(&narrow))?;
            }
        }
        Ok(Weight { block, shape: stored.shape().to_vec() })
    }

    fn embed(&self, table: &Weight<D>, ids: &[u32]) -> Result<Tensor<D>, BackendError> {
        let (vocabulary, _) = table.matrix("embed")?;
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
            return Err(shape("embed", format!("token {id} in a vocabulary of {vocabulary}")));
        }
        self.embed_list(table, &self.indices(vec![ids.to_vec()])?)
    }

    fn embed_list(&self, table: &Weight<D>, ids: &Indices<D>) -> Result<Tensor<D>, BackendError> {
        let (vocabulary, width) = table.matrix("embed_list")?;
        let rows = ids.single("embed_list")?;
        let out = self.tensor("the residual stream", rows, width, DType::F32)?;
        let work = Embed {
            table: table.block.address(),
            ids: ids.block.address(),
            out: out.block.address(),
            fault: 0,
            rows: rows as u32,
            vocabulary: vocabulary as u32,
            width: width as u32,
            table_dtype: self.dtype,
            out_dtype: out.dtype,
        };
        // SAFETY: live blocks of the sizes stated, in stream order.
        unsafe { embed(self.device(), &work) }?;
        Ok(out)
    }

    fn rms_norm(
        &self,
        x: &Tensor<D>,
        rows: Range<usize>,
        weight: &Weight<D>,
        epsilon: f32,
    ) -> Result<Tensor<D>, BackendError> {
        if rows.start > rows.end || rows.end > x.rows {
            return Err(shape("rms_norm", format!("rows {rows:?} of {}", x.rows)));
        }
        self.norm(x, rows, None, weight.vector("rms_norm", x.width)?, epsilon)
    }

    fn add_norm(
        &self,
        x: &mut Tensor<D>,
        first_row: usize,
        y: &Tensor<D>,
        weight: &Weight<D>,
        epsilon: f32,
    ) -> Result<Tensor<D>, BackendError> {
        check_sum("add_norm", x, first_row, y)?;
        if y.dtype != self.dtype {
            return Err(shape("add_norm", format!("{:?} is added, not {:?}", y.dtype, self.dtype)));
        }
        let weight = weight.vector("add_norm", x.width)?;
        self.norm(x, first_row..first_row + y.rows, Some(y.matrix(0)), weight, epsilon)
    }

    fn linear(
        &self,
        x: &Tensor<D>,
        weight: &Weight<D>,
        bias: Option<&Weight<D>>,
    ) -> Result<Tensor<D>, BackendError> {
        let (columns, _) = weight.matrix("linear")?;
        let out = self.tensor("projected activations", x.rows, columns, self.dtype)?;
        self.product(x, weight, bias, &out)?;
        Ok(out)
    }

    fn logits(&self, x: &Tensor<D>, head: &Weight<D>) -> Result<Tensor<D>, BackendError> {
        let (vocabulary, _) = head.matrix("logits")?;
        // Products want rows that begin where 16 bytes do, and vocabularies have any size.
        let padded = self.tensor("logits", x.rows, vocabulary.next_multiple_of(4), DType::F32)?;
        self.product(x, head, None, &padded)?;
        if padded.width == vocabulary || x.rows == 1 {
            return Ok(Tensor { width: vocabulary, ..padded });
        }
        let out = self.tensor("logits without gaps", x.rows, vocabulary, DType::F32)?;
        for row in 0..x.rows {
            let (to, from) = (row * out.row_bytes(), row * padded.row_bytes());
            out.block.copy(to, &padded.block, from, out.row_bytes())?;
        }
        Ok(out)
    }

    fn swiglu(&self, gate: Tensor<D>, up: &Tensor<D>) -> Result<Tensor<D>, BackendError> {
        if (gate.rows, gate.width) != (up.rows, up.width) {
            let problem = format!("{}×{} beside {}×{}", gate.rows, gate.width, up.rows, up.width);
            return Err(shape("swiglu", problem));
        }
        let (mut narrow_gate, mut narrow_up) = (None, None);
        self.narrow(&gate, &mut narrow_gate)?;
        let up = self.narrow(up, &mut narrow_up)?;
        let out = narrow_gate.unwrap_or(gate);
        let work = SiluMul {
            gate: out.matrix(0),
            up: up.matrix(0),
            out: out.matrix(0),
            rows: out.rows as u32,
            width: out.width as u32,
            dtype: out.dtype,
        };
        // SAFETY: live blocks of the sizes stated, in stream order.
        unsafe { silu_mul(self.device(), &work) }?;
        Ok(out)
    }

    fn add(&self, x: &mut Tensor<D>, first_row: usize, y: &Tensor<D>) -> Result<(), BackendError> {
        check_sum("add", x, first_row, y)?;
        let work = Add {
            x: x.matrix(first_row),
            y: y.matrix(0),
            rows: y.rows as u32,
            width: y.width as u32,
            x_dtype: x.dtype,
            y_dtype: y.dtype,
        };
        // SAFETY: live blocks of the sizes stated, in stream order.
        Ok(unsafe { add(self.device(), &work) }?)
    }

    fn rotary(&self, inverse_frequencies: &[f32], positions: &Indices<D>) -> Result<Rotary<D>, BackendError> {
        if inverse_frequencies.is_empty() {
            return Err(shape("rotary", "0 frequencies, where a head needs at least 1".to_owned()));
        }
        Ok(Rotary {
            frequencies: self.frequencies(inverse_frequencies)?,
            half: inverse_frequencies.len(),
            positions: Arc::clone(&positions.block),
            rows: positions.single("rotary")?,
        })
    }

    fn rotate(&self, x: &mut Tensor<D>, angles: &Rotary<D>, first_row: usize) -> Result<(), BackendError> {
        let head_dim = 2 * angles.half;
        if !x.width.is_multiple_of(head_dim) || first_row.saturating_add(x.rows) > angles.rows {
            let problem = format!(
                "{} rows of {} from row {first_row}, with {} angles of {}",
                x.rows, x.width, angles.rows, angles.half
            );
            return Err(shape("rotate", problem));
        }
        let heads = x.heads(0, head_dim);
        let work = Rope {
            q: heads,
            q_out: heads,
            query_heads: (x.width / head_dim) as u32,
            append: None,
            positions: angles.positions.address() + 4 * first_row as u64,
            inverse_frequencies: angles.frequencies.address(),
            cu_seqlens: 0,
            sequences: 1,
            tokens: x.rows as u32,
            total_tokens: x.rows as u32,
            head_dim: head_dim as u32,
            dtype: x.dtype,
        };
        // SAFETY: live blocks of the sizes stated, in stream order.
        Ok(unsafe { rope(self.device(), &work) }?)
    }

    fn new_kv(&self, kv_heads: usize, head_dim: usize, capacity: usize) -> Result<Kv<D>, BackendError> {
        if kv_heads == 0 || head_dim == 0 {
            return Err(shape("new_kv", format!("{kv_heads} kv heads of {head_dim}")));
        }
        self.store(head_dim, &vec![0; kv_heads], capacity, true)
    }

    fn append_kv(
        &self,
        kv: &mut Kv<D>,
        keys: &Tensor<D>,
        values: &Tensor<D>,
        positions: &Indices<D>,
        first_row: usize,
    ) -> Result<(), BackendError> {
        let width = kv.lists.len() * kv.head_dim;
        if keys.width != width || (values.rows, values.width) != (keys.rows, width) {
            let problem = format!(
                "keys of {}×{} and values of {}×{} for {} kv heads of {}",
                keys.rows,
                keys.width,
                values.rows,
                values.width,
                kv.lists.len(),
                kv.head_dim
            );
            return Err(shape("append_kv", problem));
        }
        let positions = positions.from("append_kv", first_row, keys.rows)?;
        if keys.rows == 0 {
            return Ok(());
        }
        if kv.lists.iter().any(|list| list.length + keys.rows > list.capacity) {
            let longest = kv.lists.iter().map(|list| list.length).max().unwrap_or(0);
            *kv = self.grown(kv, keys.rows + (longest / 2).max(64))?;
        }
        let (mut narrow_keys, mut narrow_values) = (None, None);
        let keys = self.narrow(keys, &mut narrow_keys)?;
        let values = self.narrow(values, &mut narrow_values)?;
        let work = Rope {
            q: Rows::default(),
            q_out: Rows::default(),
            query_heads: 0,
            append: Some(Append {
                k: keys.heads(0, kv.head_dim),
                v: values.heads(0, kv.head_dim),
                k_out: kv.keys.address(),
                v_out: kv.values.address(),
                starts: kv.starts.address(),
                lengths: kv.lengths_address(kv.second_half),
                lengths_out: kv.lengths_address(!kv.second_half),
                positions_out: kv.positions.address(),
                out_rows: kv.rows() as u64,
                kv_heads: kv.lists.len() as u32,
            }),
            positions,
            inverse_frequencies: 0,
            cu_seqlens: 0,
            sequences: 1,
            tokens: keys.rows as u32,
            total_tokens: keys.rows as u32,
            head_dim: kv.head_dim as u32,
            dtype: self.dtype,
        };
        // SAFETY: live blocks of the sizes stated, in stream order; every list has room for the rows.
        unsafe { rope(self.device(), &work) }?;
        kv.second_half = !kv.second_half;
        kv.lists.iter_mut().for_each(|list| list.length += keys.rows);
        Ok(())
    }

    fn truncate_kv(&self, kv: &mut Kv<D>, lengths: &[usize]) -> Result<(), BackendError> {
        if lengths.len() != kv.lists.len() {
            let problem = format!("{} lengths for {} kv heads", lengths.len(), kv.lists.len());
            return Err(shape("truncate_kv", problem));
        }
        for (list, length) in kv.lists.iter_mut().zip(lengths) {
            list.length = list.length.min(*length);
        }
        kv.shared &= kv.lists.windows(2).all(|pair| pair[0].length == pair[1].length);
        self.write_lengths(kv)
    }

    fn owns(&self, kv: &Kv<D>) -> bool {
        kv.keys.is_of(&self.machine)
    }

    fn kv_lengths(&self, kv: &Kv<D>) -> Vec<usize> {
        kv.lists.iter().map(|list| list.length).collect()
    }

    fn kv_positions(&self, kv: &Kv<D>) -> Result<Vec<Vec<u32>>, BackendError> {
        kv.lists.iter().map(|list| kv.positions.read(4 * list.start, list.length)).collect()
    }

    fn attention(
        &self,
        queries: &Tensor<D>,
        kv: &Kv<D>,
        visible: Visible<'_, Indices<D>>,
    ) -> Result<Tensor<D>, BackendError> {
        attention::attention(self, queries, kv, visible, None)
    }

    fn window_scores(&self, queries: &Tensor<D>, kv: &Kv<D>) -> Result<Scores<D>, BackendError> {
        attention::window_scores(self, queries, kv, None)
    }

    fn attention_with_scores(
        &self,
        queries: &Tensor<D>,
        kv: &Kv<D>,
        window: usize,
    ) -> Result<(Tensor<D>, Scores<D>), BackendError> {
        attention::attention_with_scores(self, queries, kv, window)
    }

    fn biased_attention(
        &self,
        queries: &Tensor<D>,
        kv: &Kv<D>,
        visible: Visible<'_, Indices<D>>,
        bias: &Bias<'_>,
    ) -> Result<Tensor<D>, BackendError> {
        attention::attention(self, queries, kv, visible, Some(bias))
    }

    fn biased_window_scores(
        &self,
        queries: &Tensor<D>,
        kv: &Kv<D>,
        bias: &Bias<'_>,
    ) -> Result<Scores<D>, BackendError> {
        attention::window_scores(self, queries, kv, Some(bias))
    }

    fn column_sums(
        &self,
        queries: &Tensor<D>,
        kv: &Kv<D>,
        columns: Columns,
        bias: Option<&Bias<'_>>,
    ) -> Result<Scores<D>, BackendError> {
        columns::column_sums(self, queries, kv, columns, bias)
    }

    fn attention_with_columns(
        &self,
        queries: &Tensor<D>,
        kv: &Kv<D>,
        columns: &[Columns],
        bias: Option<&Bias<'_>>,
    ) -> Result<(Tensor<D>, Vec<Scores<D>>), BackendError> {
        columns::attention_with_columns(self, queries, kv, columns, bias)
    }

    fn add_scores(&self, a: &Scores<D>, b: &Scores<D>) -> Result<Scores<D>, BackendError> {
        eviction::add_scores(self, a, b)
    }

    fn gather_scores(&self, scores: &Scores<D>, entries: &Indices<D>) -> Result<Scores<D>, BackendError> {
        eviction::gather_scores(self, scores, entries)
    }

    fn raise_scores(
        &self,
        scores: &mut Scores<D>,
        positions: &Indices<D>,
        highlighted: &[bool],
    ) -> Result<(), BackendError> {
        steering::raise_scores(self, scores, positions, highlighted)
    }

    fn retain_kv(&self, kv: &mut Kv<D>, entries: &Indices<D>) -> Result<(), BackendError> {
        eviction::retain_kv(self, kv, entries)
    }

    fn query_key_products(&self, query: &Tensor<D>, kv: &Kv<D>) -> Result<Scores<D>, BackendError> {
        attention::query_key_products(self, query, kv)
    }

    fn rows(&self, x: &Tensor<D>) -> usize {
        x.rows
    }

    fn slice_rows(&self, x: &Tensor<D>, rows: Range<usize>) -> Result<Tensor<D>, BackendError> {
        if rows.start > rows.end || rows.end > x.rows {
            return Err(shape("slice_rows", format!("rows {rows:?} of {}", x.rows)));
        }
        let out = self.tensor("some rows", rows.len(), x.width, x.dtype)?;
        out.block.copy(0, &x.block, rows.start * x.row_bytes(), rows.len() * x.row_bytes())?;
        Ok(out)
    }

    fn concat_rows(&self, parts: &[&Tensor<D>]) -> Result<Tensor<D>, BackendError> {
        let Some(first) = parts.first() else { return Err(shape("concat_rows", "no parts".to_owned())) };
        if let Some(part) = parts.iter().find(|part| (part.width, part.dtype) != (first.width, first.dtype)) {
            let problem =
                format!("{} of {:?} beside {} of {:?}", part.width, part.dtype, first.width, first.dtype);
            return Err(shape("concat_rows", problem));
        }
        let rows = parts.iter().map(|part| part.rows).sum();
        let out = self.tensor("joined rows", rows, first.width, first.dtype)?;
        let mut at = 0;
        for part in parts {
            out.block.copy(at, &part.block, 0, part.rows * part.row_bytes())?;
            at += part.rows * part.row_bytes();
        }
        Ok(out)
    }

    fn pool_groups(
        &self,
        scores: &Scores<D>,
        kv_heads: usize,
        keys: usize,
        pooling: Pooling,
    ) -> Result<Scores<D>, BackendError> {
        selection::pool_groups(self, scores, kv_heads, keys, pooling)
    }

    fn sum_heads(&self, scores: &Scores<D>) -> Result<Scores<D>, BackendError> {
        selection::sum_heads(self, scores)
    }

    fn select(&self, scores: &Scores<D>, select: Select) -> Result<Indices<D>, BackendError> {
        selection::select(self, scores, &vec![select.count; scores.heads], select.tail)
    }

    fn select_each(
        &self,
        scores: &Scores<D>,
        counts: &[usize],
        tail: usize,
    ) -> Result<Indices<D>, BackendError> {
        selection::select(self, scores, counts, tail)
    }

    fn indices(&self, lists: Vec<Vec<u32>>) -> Result<Indices<D>, BackendError> {
        let lengths: Vec<usize> = lists.iter().map(Vec::len).collect();
        let capacity = lengths.iter().copied().max().unwrap_or(0);
        let mut padded = vec![u32::MAX; lists.len() * capacity];
        for (row, list) in padded.chunks_exact_mut(capacity.max(1)).zip(&lists) {
            row[..list.len()].copy_from_slice(list);
        }
        Ok(Indices { block: Arc::new(self.machine.upload("lists", &padded)?), lengths, capacity })
    }

    fn write_list(&self, list: &mut Indices<D>, numbers: &[u32]) -> Result<(), BackendError> {
        let length = list.single("write_list")?;
        if numbers.len() != length {
            return Err(shape("write_list", format!("{} numbers for a list of {length}", numbers.len())));
        }
        list.block.write(0, bytemuck::cast_slice(numbers))
    }

    fn read_indices(&self, indices: &Indices<D>) -> Result<Vec<Vec<u32>>, BackendError> {
        let Indices { block, lengths, capacity } = indices;
        lengths.iter().enumerate().map(|(list, length)| block.read(4 * list * capacity, *length)).collect()
    }

    fn gather_indices(&self, list: &Indices<D>, rows: &Indices<D>) -> Result<Indices<D>, BackendError> {
        let (length, count) = (list.single("gather_indices")?, rows.single("gather_indices")?);
        let out = self.machine.array("gathered numbers", count, 4)?;
        let work = GatherIndices {
            list: list.block.address(),
            rows: rows.block.address(),
            out: out.address(),
            length: length as u32,
            count: count as u32,
        };
        // SAFETY: live blocks of the sizes stated, in stream order.
        unsafe { gather_indices(self.device(), &work) }?;
        Ok(Indices { block: Arc::new(out), lengths: vec![count], capacity: count })
    }

    fn gather_rows(&self, x: &Tensor<D>, rows: &Indices<D>) -> Result<Tensor<D>, BackendError> {
        let count = rows.single("gather_rows")?;
        let out = self.tensor("gathered rows", count, x.width, x.dtype)?;
        let work = GatherRows {
            kept: Kept {
                indices: rows.block.address(),
                out_rows: count as i64,
                sequences: 1,
                heads: 1,
                tokens: x.rows as i32,
                capacity: count as i32,
                ..Kept::default()
            },
            rows: x.matrix(0),
            out: out.block.address(),
            width: x.width as u32,
            dtype: x.dtype,
        };
        // SAFETY: live blocks of the sizes stated, in stream order.
        unsafe { gather_rows(self.device(), &work) }?;
        Ok(out)
    }

    fn gather_kv(&self, kv: &Kv<D>, entries: &Indices<D>, slack: usize) -> Result<Kv<D>, BackendError> {
        if entries.lengths.len() != kv.lists.len() {
            let problem = format!("{} lists for {} kv heads", entries.lengths.len(), kv.lists.len());
            return Err(shape("gather_kv", problem));
        }
        let out = self.store(kv.head_dim, &entries.lengths, slack, false)?;
        self.gather_into(&out, out.rows(), kv, entries.block.address(), entries.capacity)?;
        Ok(out)
    }

    fn gather_kv_shared(
        &self,
        kv: &Kv<D>,
        scores: &Scores<D>,
        share: Share,
        slack: usize,
    ) -> Result<UncountedKv<D>, BackendError> {
        selection::gather_kv_shared(self, kv, scores, share, slack)
    }

    fn count_kv(&self, kv: UncountedKv<D>) -> Result<Kv<D>, BackendError> {
        selection::count_kv(kv)
    }

    fn join_kv(&self, stores: Vec<Kv<D>>, room: usize) -> Result<KvBatch<D>, BackendError> {
        batch::join(self, stores, room)
    }

    fn split_kv(&self, batch: KvBatch<D>, steps: usize) -> Result<Vec<Kv<D>>, BackendError> {
        batch::split(self, batch, steps)
    }

    fn decode_attention(
        &self,
        queries: &Tensor<D>,
        keys: &Tensor<D>,
        values: &Tensor<D>,
        positions: &Indices<D>,
        batch: &mut KvBatch<D>,
    ) -> Result<Tensor<D>, BackendError> {
        batch::decode_attention(self, queries, keys, values, positions, batch)
    }

    unsafe fn repeat<E: From<BackendError> + Display>(
        &self,
        recording: &mut Recording<D>,
        work: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        // SAFETY: the caller's promise.
        unsafe { batch::repeat(self, recording, work) }
    }

    fn read(&self, x: &Tensor<D>) -> Result<Vec<f32>, BackendError> {
        let count = x.rows * x.width;
        Ok(match x.dtype {
            DType::F32 => x.block.read(0, count)?,
            DType::F16 => x.block.read::<u16>(0, count)?.into_iter().map(widen::<f16>).collect(),
            DType::BF16 => x.block.read::<u16>(0, count)?.into_iter().map(widen::<bf16>).collect(),
        })
    }

    fn read_scores(&self, scores: &Scores<D>) -> Result<Vec<Vec<f32>>, BackendError> {
        (0..scores.heads).map(|head| scores.block.read(4 * head * scores.stride, scores.keys)).collect()
    }
}

/// Elements of a weight that are converted at a time.
const CONVERTED: usize = 1 << 20;

fn widen<T: bytemuck::Pod + Into<f32>>(bits: u16) -> f32 {
    bytemuck::cast::<u16, T>(bits).into()
}

/// Whether `y` can be added to the rows of `x` from `first_row` on.
fn check_sum<D: Device>(
    operation: &'static str,
    x: &Tensor<D>,
    first_row: usize,
    y: &Tensor<D>,
) -> Result<(), BackendError> {
    if y.width == x.width && first_row.saturating_add(y.rows) <= x.rows {
        return Ok(());
    }
    let problem = format!("{}×{} at row {first_row} of {}×{}", y.rows, y.width, x.rows, x.width);
    Err(shape(operation, problem))
}

fn shape(operation: &'static str, problem: String) -> BackendError {
    BackendError::Shape { operation, problem }
}
