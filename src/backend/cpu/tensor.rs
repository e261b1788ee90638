//! What the CPU backend's handles are: plain vectors of f32.

use crate::backend::BackendError;

/// Activations `[rows, width]`.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) data: Vec<f32>,
}

/// Cosines and sines, `half` of each for every position.
#[derive(Debug)]
pub struct Rotary {
    pub(super) half: usize,
    pub(super) cosines: Vec<f32>,
    pub(super) sines: Vec<f32>,
}

/// Scores `[heads, keys]`.
#[derive(Clone, Debug)]
pub struct Scores {
    heads: usize,
    pub(super) keys: usize,
    pub(super) data: Vec<f32>,
}

/// Lists of token numbers.
#[derive(Clone, Debug)]
pub struct Indices {
    pub(super) lists: Vec<Vec<u32>>,
}

/// One layer's keys and values, head by head.
#[derive(Clone, Debug)]
pub struct Kv {
    pub(super) head_dim: usize,
    pub(super) heads: Vec<KvHead>,
}

/// One layer's keys and values of several sequences.
#[derive(Debug)]
pub struct KvBatch {
    pub(super) stores: Vec<Kv>,
    /// Of each sequence, the lengths of its lists when it joined.
    lengths: Vec<Vec<usize>>,
}

/// The entries of one kv head: `[entries, head_dim]` each.
#[derive(Clone, Debug)]
pub(super) struct KvHead {
    pub(super) keys: Vec<f32>,
    pub(super) values: Vec<f32>,
    pub(super) positions: Vec<u32>,
}

impl Tensor {
    pub(super) fn zeros(what: &'static str, rows: usize, width: usize) -> Result<Self, BackendError> {
        Ok(Self { rows, width, data: zeros(what, rows, width)? })
    }
}

impl Scores {
    pub(super) fn zeros(heads: usize, keys: usize) -> Result<Self, BackendError> {
        Ok(Self { heads, keys, data: zeros("scores", heads, keys)? })
    }

    /// The scores of each head. A head of no keys is a head still.
    pub(super) fn heads(&self) -> impl Iterator<Item = &[f32]> {
        (0..self.heads).map(|head| &self.data[head * self.keys..(head + 1) * self.keys])
    }
}

impl Indices {
    /// The only list.
    pub(super) fn single(&self, operation: &'static str) -> Result<&[u32], BackendError> {
        match self.lists.as_slice() {
            [list] => Ok(list),
            lists => Err(BackendError::Shape {
                operation,
                problem: format!("one list of token numbers is wanted, not {}", lists.len()),
            }),
        }
    }
}

impl KvBatch {
    /// Reserves room for so many entries more in each list.
    pub(super) fn join(mut stores: Vec<Kv>, room: usize) -> Result<Self, BackendError> {
        let Some(first) = stores.first() else {
            return Err(BackendError::Shape { operation: "join_kv", problem: "no sequences".to_owned() });
        };
        let (heads, head_dim) = (first.heads.len(), first.head_dim);
        if let Some(kv) = stores.iter().find(|kv| (kv.heads.len(), kv.head_dim) != (heads, head_dim)) {
            let problem = format!("{}×{} beside {heads}×{head_dim}", kv.heads.len(), kv.head_dim);
            return Err(BackendError::Shape { operation: "join_kv", problem });
        }
        let lengths = stores.iter().map(|kv| kv.heads.iter().map(KvHead::len).collect()).collect();
        for head in stores.iter_mut().flat_map(|kv| &mut kv.heads) {
            head.reserve(head_dim, room)?;
        }
        Ok(Self { stores, lengths })
    }

    pub(super) fn split(mut self, steps: usize) -> Vec<Kv> {
        for (kv, lengths) in self.stores.iter_mut().zip(&self.lengths) {
            for (head, length) in kv.heads.iter_mut().zip(lengths) {
                head.truncate(length.saturating_add(steps), kv.head_dim);
            }
        }
        self.stores
    }
}

impl KvHead {
    pub(super) fn with_capacity(head_dim: usize, entries: usize) -> Result<Self, BackendError> {
        Ok(Self {
            keys: reserve("keys", entries, head_dim)?,
            values: reserve("values", entries, head_dim)?,
            positions: Vec::with_capacity(entries),
        })
    }

    fn reserve(&mut self, head_dim: usize, entries: usize) -> Result<(), BackendError> {
        let elements = entries.saturating_mul(head_dim);
        let reserved =
            [&mut self.keys, &mut self.values].into_iter().all(|data| data.try_reserve(elements).is_ok());
        if !reserved || self.positions.try_reserve(entries).is_err() {
            let bytes = elements.saturating_mul(2 * size_of::<f32>());
            return Err(BackendError::OutOfMemory { what: "keys and values of tokens to come", bytes });
        }
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.positions.len()
    }

    /// Forgets the entries behind this length.
    pub(super) fn truncate(&mut self, length: usize, head_dim: usize) {
        let elements = length.saturating_mul(head_dim);
        self.keys.truncate(elements);
        self.values.truncate(elements);
        self.positions.truncate(length);
    }
}

/// `rows · width` zeros, or the figure that could not be had.
pub(super) fn zeros(what: &'static str, rows: usize, width: usize) -> Result<Vec<f32>, BackendError> {
    let mut data = reserve(what, rows, width)?;
    data.resize(rows * width, 0.0);
    Ok(data)
}

fn reserve(what: &'static str, rows: usize, width: usize) -> Result<Vec<f32>, BackendError> {
    let elements = rows.saturating_mul(width);
    let mut data = Vec::new();
    data.try_reserve_exact(elements)
        .map_err(|_| BackendError::OutOfMemory { what, bytes: elements.saturating_mul(size_of::<f32>()) })?;
    Ok(data)
}
