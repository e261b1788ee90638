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

impl KvHead {
    pub(super) fn with_capacity(head_dim: usize, entries: usize) -> Result<Self, BackendError> {
        Ok(Self {
            keys: reserve("keys", entries, head_dim)?,
            values: reserve("values", entries, head_dim)?,
            positions: Vec::with_capacity(entries),
        })
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
