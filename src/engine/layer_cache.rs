//! What a layer leaves in the cache, in numbers that the host may not know yet.

use crate::backend::{Backend, BackendError};

pub(super) struct LayerCache<B: Backend> {
    pub(super) kv: Entries<B>,
    /// Bytes that held all of the layer's entries while some were copied.
    pub(super) full_bytes: usize,
}

pub(super) enum Entries<B: Backend> {
    Counted(B::Kv),
    Uncounted(B::UncountedKv),
}

impl<B: Backend> Entries<B> {
    /// The entries, counted. Waits for the device where they are not.
    pub(super) fn counted(self, backend: &B) -> Result<B::Kv, BackendError> {
        match self {
            Self::Counted(kv) => Ok(kv),
            Self::Uncounted(kv) => backend.count_kv(kv),
        }
    }
}

/// The entries of all layers, and the most bytes that were alive at once: those of the layers before, of the one at work,
/// and of its copy. Waits for the device where a layer is not counted.
pub(super) fn count_entries<B: Backend>(
    backend: &B,
    caches: Vec<LayerCache<B>>,
    bytes: impl Fn(&B::Kv) -> usize,
) -> Result<(Vec<B::Kv>, usize), BackendError> {
    let (mut kept, mut peak) = (0, 0);
    let mut layers = Vec::with_capacity(caches.len());
    for LayerCache { kv, full_bytes } in caches {
        let kv = kv.counted(backend)?;
        let own = bytes(&kv);
        peak = peak.max(kept + full_bytes + own);
        kept += own;
        layers.push(kv);
    }
    Ok((layers, peak))
}
