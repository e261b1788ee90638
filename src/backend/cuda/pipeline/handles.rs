//! What the handles of the CUDA backend hold: blocks of device memory, and their sizes on the host.

use std::sync::Arc;

use super::memory::Block;
use super::shape;
use crate::abi::{self, Rows};
use crate::backend::BackendError;
use crate::kernels::batch::ScoreRows;
use crate::kernels::sums::ScoreTable;
use crate::kernels::{DType, Device};

/// Activations `[rows, width]`: the residual stream in f32, all else in the model's 16-bit type.
#[derive(Debug)]
pub struct Tensor<D: Device> {
    pub(super) block: Block<D>,
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) dtype: DType,
}

/// A weight in the model's 16-bit type.
#[derive(Debug)]
pub struct Weight<D: Device> {
    pub(super) block: Block<D>,
    pub(super) shape: Vec<usize>,
}

/// Inverse frequencies and positions: kernels compute the angles as they turn.
#[derive(Debug)]
pub struct Rotary<D: Device> {
    pub(super) frequencies: Arc<Block<D>>,
    pub(super) half: usize,
    pub(super) positions: Arc<Block<D>>,
    pub(super) rows: usize,
}

/// Scores `[heads][stride]` in f32, of which `keys` are there.
#[derive(Debug)]
pub struct Scores<D: Device> {
    pub(super) block: Block<D>,
    pub(super) heads: usize,
    pub(super) keys: usize,
    pub(super) stride: usize,
}

/// Lists `[lists][capacity]` of i32, with -1 behind the end of a list. Their lengths are known on the host.
#[derive(Debug)]
pub struct Indices<D: Device> {
    pub(super) block: Arc<Block<D>>,
    pub(super) lengths: Vec<usize>,
    pub(super) capacity: usize,
}

/// Keys, values and positions of all heads, list after list.
#[derive(Debug)]
pub struct Kv<D: Device> {
    pub(super) keys: Block<D>,
    pub(super) values: Block<D>,
    /// i32, a position for each row.
    pub(super) positions: Block<D>,
    /// i64, the first row of each list.
    pub(super) starts: Block<D>,
    /// i32, the length of each list, twice: an append reads one half and writes the other.
    pub(super) lengths: Block<D>,
    /// Which half holds.
    pub(super) second_half: bool,
    pub(super) head_dim: usize,
    pub(super) lists: Vec<List>,
    /// Whether all lists hold the same tokens.
    pub(super) shared: bool,
}

/// A store whose lists are on the device alone: it has blocks, and no lists yet.
#[derive(Debug)]
pub struct UncountedKv<D: Device> {
    pub(super) kv: Kv<D>,
    pub(super) heads: usize,
    /// Rows between a list and the next.
    pub(super) slack: usize,
}

/// Where a list lies, in rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct List {
    pub(super) start: usize,
    pub(super) length: usize,
    pub(super) capacity: usize,
}

/// Heads that one launch can take, because they lie evenly and have one length.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) first_head: usize,
    pub(super) heads: usize,
    pub(super) list: List,
}

impl<D: Device> Tensor<D> {
    pub(super) fn row_bytes(&self) -> usize {
        self.width * self.dtype.bytes() as usize
    }

    /// Rows from `first` on, as one matrix.
    pub(super) fn matrix(&self, first: usize) -> Rows {
        let base = self.block.address() + (first * self.row_bytes()) as u64;
        Rows { base, token_stride: self.width as i64, ..Rows::default() }
    }

    /// Heads of `head_dim` from `first_head` on.
    pub(super) fn heads(&self, first_head: usize, head_dim: usize) -> Rows {
        let offset = (first_head * head_dim) as u64 * u64::from(self.dtype.bytes());
        Rows { head_stride: head_dim as i64, base: self.block.address() + offset, ..self.matrix(0) }
    }
}

impl<D: Device> Weight<D> {
    /// Where its elements lie.
    pub fn address(&self) -> u64 {
        self.block.address()
    }

    /// Rows and columns of a matrix.
    pub(super) fn matrix(&self, operation: &'static str) -> Result<(usize, usize), BackendError> {
        match self.shape[..] {
            [rows, columns] => Ok((rows, columns)),
            _ => Err(shape(operation, format!("a matrix is wanted, not {:?}", self.shape))),
        }
    }

    /// The address of a vector of this length.
    pub(super) fn vector(&self, operation: &'static str, length: usize) -> Result<u64, BackendError> {
        match self.shape[..] {
            [found] if found == length => Ok(self.block.address()),
            _ => Err(shape(operation, format!("a vector of {length} is wanted, not {:?}", self.shape))),
        }
    }
}

impl<D: Device> Scores<D> {
    /// The address of a head's scores.
    pub(super) fn row(&self, head: usize) -> u64 {
        self.block.address() + 4 * (head * self.stride) as u64
    }

    pub(super) fn table(&self) -> ScoreTable {
        let Self { block, keys, stride, .. } = self;
        ScoreTable { base: block.address(), head_stride: *stride as i64, keys: *keys as u32 }
    }

    pub(super) fn rows(&self) -> ScoreRows {
        ScoreRows { base: self.block.address(), sequence_stride: 0, head_stride: self.stride as i64 }
    }
}

impl<D: Device> Indices<D> {
    /// The length of the only list.
    pub(super) fn single(&self, operation: &'static str) -> Result<usize, BackendError> {
        match self.lengths[..] {
            [length] => Ok(length),
            _ => Err(shape(operation, format!("one list is wanted, not {}", self.lengths.len()))),
        }
    }

    /// The address of an element of the only list, which has `count` from there on.
    pub(super) fn from(
        &self,
        operation: &'static str,
        first: usize,
        count: usize,
    ) -> Result<u64, BackendError> {
        let length = self.single(operation)?;
        if first.saturating_add(count) > length {
            return Err(shape(operation, format!("{count} rows from row {first} of {length}")));
        }
        Ok(self.block.address() + 4 * first as u64)
    }
}

impl<D: Device> Kv<D> {
    /// Rows that all lists have room for.
    pub(super) fn rows(&self) -> usize {
        self.lists.iter().map(|list| list.capacity).sum()
    }

    pub(super) fn lengths_address(&self, second_half: bool) -> u64 {
        self.lengths.address() + if second_half { 4 * self.lists.len() as u64 } else { 0 }
    }

    /// The lists in as few spans as there can be.
    pub(super) fn spans(&self) -> Vec<Span> {
        let alike = |pair: &[List]| {
            pair[0].length == pair[1].length
                && pair[0].start + pair[0].capacity == pair[1].start
                && pair[0].capacity == pair[1].capacity
        };
        if self.lists.windows(2).all(alike) {
            return vec![Span { first_head: 0, heads: self.lists.len(), list: self.lists[0] }];
        }
        self.lists_apart()
    }

    /// Each list by itself.
    pub(super) fn lists_apart(&self) -> Vec<Span> {
        let span = |(head, list): (usize, &List)| Span { first_head: head, heads: 1, list: *list };
        self.lists.iter().enumerate().map(span).collect()
    }

    /// The length that all lists have.
    pub(super) fn common(&self, operation: &'static str) -> Result<Span, BackendError> {
        match self.spans()[..] {
            [span] => Ok(span),
            _ => {
                let lengths: Vec<_> = self.lists.iter().map(|list| list.length).collect();
                Err(shape(operation, format!("heads of one length are wanted, not {lengths:?}")))
            }
        }
    }

    /// Keys or values of a span, `[head][token][head_dim]`, 2 bytes each.
    pub(super) fn tensor(&self, block: &Block<D>, span: Span) -> Rows {
        let row_bytes = 2 * self.head_dim as u64;
        Rows {
            base: block.address() + span.list.start as u64 * row_bytes,
            sequence_stride: 0,
            head_stride: (span.list.capacity * self.head_dim) as i64,
            token_stride: self.head_dim as i64,
        }
    }

    /// All lists as decoding sees them.
    pub(super) fn cache(&self) -> abi::Cache {
        let tensor = |block: &Block<D>| Rows {
            base: block.address(),
            token_stride: self.head_dim as i64,
            ..Rows::default()
        };
        abi::Cache {
            k: tensor(&self.keys),
            v: tensor(&self.values),
            starts: self.starts.address(),
            lengths: self.lengths_address(self.second_half),
            positions: self.positions.address(),
            rows: self.rows() as i64,
            // What a launch is sized by: the longest list as it is, not the room it has.
            capacity: self.lists.iter().map(|list| list.length).max().unwrap_or(0) as i32,
            sequences: 1,
            heads: self.lists.len() as i32,
            ..abi::Cache::default()
        }
    }
}
