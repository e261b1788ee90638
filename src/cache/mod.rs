//! The compacted KV cache of one sequence.

mod eviction;
mod steer;

pub use eviction::TokenSet;
pub(crate) use eviction::{Eviction, EvictionRule, Read, Shares, Tokens, UNPOOLED};
pub(crate) use steer::Steer;

use crate::backend::{Backend, BackendError};
use crate::policy::ModelShape;

/// Keys and values of every layer. Its *logical* length is the number of tokens the sequence has, and
/// so the position of the next one; its *physical* lengths, one for each layer and kv head, count the
/// entries that were kept. Keys carry the rotation of their original positions.
#[derive(Debug)]
pub struct Cache<B: Backend> {
    layers: Vec<B::Kv>,
    shape: ModelShape,
    tokens: usize,
    element_bytes: usize,
    decoding: Decoding<B>,
}

/// What decoding does beside attending and appending.
#[derive(Debug)]
pub(crate) struct Decoding<B: Backend> {
    pub(crate) steer: Option<Steer>,
    /// By layer.
    pub(crate) evictions: Vec<Option<Eviction<B>>>,
    pub(crate) tokens: Tokens,
}

impl<B: Backend> Cache<B> {
    pub(crate) fn new(
        layers: Vec<B::Kv>,
        shape: ModelShape,
        tokens: usize,
        element_bytes: usize,
        decoding: Decoding<B>,
    ) -> Self {
        Self { layers, shape, tokens, element_bytes, decoding }
    }

    /// Tokens of the sequence: the position of the next one.
    pub fn logical_length(&self) -> usize {
        self.tokens
    }

    /// Entries of each layer's kv heads.
    pub fn physical_lengths(&self, backend: &B) -> Vec<Vec<usize>> {
        self.layers.iter().map(|layer| backend.kv_lengths(layer)).collect()
    }

    /// Original positions of the entries, by layer and kv head. Waits for the device.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn positions(&self, backend: &B) -> Result<Vec<Vec<Vec<u32>>>, BackendError> {
        self.layers.iter().map(|layer| backend.kv_positions(layer)).collect()
    }

    /// Bytes of all keys and values.
    pub fn bytes(&self, backend: &B) -> usize {
        let entries: usize = self.layers.iter().flat_map(|layer| backend.kv_lengths(layer)).sum();
        entries * 2 * self.shape.head_dim * self.element_bytes
    }

    pub(crate) fn shape(&self) -> ModelShape {
        self.shape
    }

    /// The layers' entries, and what else decoding looks at.
    pub(crate) fn parts_mut(&mut self) -> (&mut [B::Kv], &mut Decoding<B>) {
        (&mut self.layers, &mut self.decoding)
    }

    /// Whether decoding does nothing but attend and append.
    pub(crate) fn is_plain(&self) -> bool {
        self.decoding.steer.is_none() && self.decoding.evictions.iter().all(Option::is_none)
    }

    /// The entries of all layers, which are gone from here until they are [put back](Self::put_layers).
    pub(crate) fn take_layers(&mut self) -> Vec<B::Kv> {
        std::mem::take(&mut self.layers)
    }

    pub(crate) fn put_layers(&mut self, layers: Vec<B::Kv>) {
        self.layers = layers;
    }

    /// Whether the entries are this backend's.
    pub(crate) fn is_of(&self, backend: &B) -> bool {
        self.layers.iter().all(|layer| backend.owns(layer))
    }

    /// Whether entries that were taken never came back, or it could not go back to what it was.
    pub(crate) fn is_lost(&self) -> bool {
        self.layers.len() != self.shape.layers
    }

    /// Forgets the entries behind these lengths, by layer and kv head. Where the backend fails at it, the cache is
    /// lost.
    pub(crate) fn truncate(&mut self, backend: &B, lengths: &[Vec<usize>]) {
        let mut layers = self.layers.iter_mut().zip(lengths);
        if layers.any(|(layer, lengths)| backend.truncate_kv(layer, lengths).is_err()) {
            self.layers.clear();
        }
    }

    pub(crate) fn advance(&mut self, tokens: usize) {
        self.tokens += tokens;
    }
}
