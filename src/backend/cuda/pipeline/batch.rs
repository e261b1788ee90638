//! Sequences that decode together, and steps that repeat.

use std::fmt::{self, Debug, Display};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::handles::{Kv, List};
use super::memory::{Block, Pool};
use super::{CudaBackend, Indices, Tensor, attention, shape};
use crate::abi::{self, Rows};
use crate::backend::BackendError;
use crate::kernels::batch::default_scale;
use crate::kernels::decode::Decode;
use crate::kernels::{self, Device, Graph, MatrixProduct};

/// The lists of several sequences in one store. Their lengths grow on the device; on the host they are what they
/// were when the sequences joined.
#[derive(Debug)]
pub struct KvBatch<D: Device> {
    kv: Kv<D>,
    sequences: usize,
    /// Entries that the longest list can have.
    capacity: usize,
    /// i32, what each list can have.
    capacities: Block<D>,
    /// Of each sequence, whether all its lists hold the same tokens.
    shared: Vec<bool>,
    /// Raised by a step that finds no room.
    full: Block<D>,
    /// Zeros between steps: one for each list, as the queries of its group fit one tile, and one.
    counters: Block<D>,
}

/// A step that was done before: the memory it needs and, from its second time on, what it queued.
pub struct Recording<D: Device> {
    pool: Option<Arc<Pool<D>>>,
    graph: Option<Box<dyn Graph>>,
    /// Why nothing is captured, where that is so.
    declined: Option<String>,
    /// What the graph reads and others may let go of.
    held: Vec<Arc<Block<D>>>,
}

impl<D: Device> Default for Recording<D> {
    fn default() -> Self {
        Self { pool: None, graph: None, declined: None, held: Vec::new() }
    }
}

impl<D: Device> Debug for Recording<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pool, graph, declined, .. } = self;
        let mut fields = f.debug_struct("Recording");
        fields.field("pool", pool).field("graph", graph).field("declined", declined).finish()
    }
}

pub(super) fn join<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    stores: Vec<Kv<D>>,
    room: usize,
) -> Result<KvBatch<D>, BackendError> {
    let Some(first) = stores.first() else { return Err(shape("join_kv", "no sequences".to_owned())) };
    let like = (first.lists.len(), first.head_dim);
    if let Some(kv) = stores.iter().find(|kv| (kv.lists.len(), kv.head_dim) != like) {
        let problem = format!("{}×{} beside {}×{}", kv.lists.len(), kv.head_dim, like.0, like.1);
        return Err(shape("join_kv", problem));
    }
    let (sequences, shared) = (stores.len(), stores.iter().map(|kv| kv.shared).collect());
    let has_room = |list: &List| list.capacity - list.length >= room;
    let mut stores = stores;
    let kv = match &stores[..] {
        [kv] if kv.lists.iter().all(has_room) => stores.remove(0),
        _ => {
            let lists = stores.iter().flat_map(|kv| kv.lists.iter().map(move |list| (kv, *list)));
            backend.copied(like.1, &lists.collect::<Vec<_>>(), room, false)?
        }
    };
    let capacity = kv.lists.iter().map(|list| list.length).max().unwrap_or(0).saturating_add(room);
    let capacities: Vec<i32> = kv.lists.iter().map(|list| list.capacity as i32).collect();
    let capacities = backend.machine.upload("capacities of lists", &capacities)?;
    let full = backend.machine.upload("a flag", &[0_i32])?;
    let counters = backend.machine.array("counters of decoding", kv.lists.len() + 1, 4)?;
    counters.fill(0)?;
    Ok(KvBatch { kv, sequences, capacity, capacities, shared, full, counters })
}

pub(super) fn split<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    batch: KvBatch<D>,
    steps: usize,
) -> Result<Vec<Kv<D>>, BackendError> {
    let KvBatch { mut kv, sequences, shared, .. } = batch;
    for list in &mut kv.lists {
        list.length = list.length.saturating_add(steps).min(list.capacity);
    }
    if sequences == 1 {
        backend.write_lengths(&kv)?;
        return Ok(vec![kv]);
    }
    let heads = kv.lists.len() / sequences;
    let of_sequence = |(lists, shared): (&[List], &bool)| {
        let lists: Vec<_> = lists.iter().map(|list| (&kv, *list)).collect();
        backend.copied(kv.head_dim, &lists, 0, *shared)
    };
    kv.lists.chunks(heads).zip(&shared).map(of_sequence).collect()
}

/// Appends a row of each sequence in passing. Nothing here may depend on how many steps there were: it may be
/// queued again as it is.
pub(super) fn decode_attention<D: MatrixProduct + Debug>(
    backend: &CudaBackend<D>,
    queries: &Tensor<D>,
    keys: &Tensor<D>,
    values: &Tensor<D>,
    positions: &Indices<D>,
    batch: &KvBatch<D>,
) -> Result<Tensor<D>, BackendError> {
    let KvBatch { kv, sequences, capacity, capacities, full, counters, .. } = batch;
    let (rows, heads) = (*sequences, kv.lists.len() / sequences);
    let width = heads * kv.head_dim;
    let whole_groups = queries.width > 0 && queries.width.is_multiple_of(width);
    let news = [keys, values].into_iter().all(|x| (x.rows, x.width) == (rows, width));
    if !whole_groups || queries.rows != rows || !news {
        let problem = format!(
            "queries of {}×{}, keys of {}×{} and values of {}×{} for {rows} sequences of {heads} kv heads of {}",
            queries.rows, queries.width, keys.rows, keys.width, values.rows, values.width, kv.head_dim
        );
        return Err(shape("decode_attention", problem));
    }
    let positions_new = positions.from("decode_attention", 0, rows)?;
    let (mut narrow_queries, mut narrow_keys, mut narrow_values) = (None, None, None);
    let queries = backend.narrow(queries, &mut narrow_queries)?;
    let keys = backend.narrow(keys, &mut narrow_keys)?;
    let values = backend.narrow(values, &mut narrow_values)?;
    let out = backend.tensor("attention", rows, queries.width, queries.dtype)?;
    // A row is a sequence of one token.
    let of_sequences = |x: &Tensor<D>| Rows { sequence_stride: x.width as i64, ..x.heads(0, kv.head_dim) };
    let work = Decode {
        cache: abi::Cache {
            capacities: capacities.address(),
            capacity: *capacity as i32,
            sequences: rows as i32,
            heads: heads as i32,
            ..kv.cache()
        },
        q: of_sequences(queries),
        k_new: of_sequences(keys),
        v_new: of_sequences(values),
        out: of_sequences(&out),
        positions_new,
        lse: None,
        full: full.address(),
        bias: None,
        bias_positions: 0,
        scale: default_scale(kv.head_dim as u32),
        query_heads: (queries.width / kv.head_dim) as u32,
        tokens: 1,
        head_dim: kv.head_dim as u32,
        dtype: queries.dtype,
        counters: counters.address(),
        workspace: 0,
        workspace_bytes: 0,
    };
    attention::step(backend, work)?;
    Ok(out)
}

/// Does `work` once as it is, so that all its memory is there and all kernels are loaded; captures it when it comes
/// again; and from then on queues what was captured.
///
/// # Safety
/// As for [`Backend::repeat`](crate::backend::Backend::repeat).
pub(super) unsafe fn repeat<D: MatrixProduct + Debug, E: From<BackendError> + Display>(
    backend: &CudaBackend<D>,
    recording: &mut Recording<D>,
    mut work: impl FnMut() -> Result<(), E>,
) -> Result<(), E> {
    let Recording { pool, graph, declined, held } = recording;
    let launch = |graph: &dyn Graph| {
        // SAFETY: the pool keeps the memory of what was captured, `held` what is shared, and the caller the handles that
        // `work` uses.
        unsafe { graph.launch() }.map_err(|error| E::from(error.into()))
    };
    if let Some(graph) = graph {
        return launch(graph.as_ref());
    }
    let is_first = pool.is_none();
    let pool = pool.get_or_insert_with(|| Arc::new(Pool::new(&backend.machine)));
    if !is_first && declined.is_none() {
        let mut queue = || {
            work().map_err(|error: E| kernels::Error::Device {
                operation: "to capture a step",
                reason: error.to_string(),
            })
        };
        pool.captures.store(true, Relaxed);
        // SAFETY: as above; what is captured is not queued before.
        let captured = || unsafe { backend.device().capture(&mut queue) };
        let (captured, shared) = backend.machine.with_pool(pool, captured);
        pool.captures.store(false, Relaxed);
        // A step that cannot be captured can still be done.
        *declined = Some(match captured {
            Ok(Some(captured)) => {
                *held = shared;
                return launch(graph.insert(captured).as_ref());
            }
            Ok(None) => "the device captures nothing".to_owned(),
            Err(error) => error.to_string(),
        });
    }
    backend.machine.with_pool(pool, work).0
}
