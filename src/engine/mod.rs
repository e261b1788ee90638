//! The layerwise prefill and the decode loop: read a [`Plan`](crate::policy::Plan), call a
//! [`Backend`], fill a [`Cache`].

mod control;
mod error;
mod generate;
mod llama;
mod memory;
mod prefill;
mod sampler;
mod trace;

use crate::backend::Backend;
use crate::cache::Cache;
use crate::model::{LlamaConfig, ModelDir};
use crate::policy::ModelShape;

pub use control::{Cancel, Control, Progress};
pub use error::EngineError;
pub use generate::{FinishReason, Generation, GenerationOptions};
pub use llama::check_tokens;
pub use memory::{Bytes, MemoryEstimate, MemoryOptions};
pub use prefill::{Prefill, PrefillOptions};
pub use sampler::{Sampler, Sampling};
pub use trace::{LayerTrace, Trace};

use llama::Llama;

/// A model on a backend.
#[derive(Debug)]
pub struct Engine<B: Backend> {
    backend: B,
    llama: Llama<B>,
}

impl<B: Backend> Engine<B> {
    /// Puts the model's weights where the backend wants them.
    ///
    /// # Errors
    /// Where the backend has no room for them.
    pub fn load(backend: B, model: &ModelDir) -> Result<Self, EngineError> {
        let llama = Llama::load(&backend, model)?;
        Ok(Self { backend, llama })
    }

    /// The model's configuration.
    pub fn config(&self) -> &LlamaConfig {
        &self.llama.config
    }

    /// What plans are made from.
    pub fn shape(&self) -> ModelShape {
        self.llama.shape()
    }

    /// Where the arithmetic happens.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Reads more tokens behind a filled cache, which keeps all of them: a second turn, or the
    /// question behind a compressed context. Returns the logits behind the last of them.
    ///
    /// # Errors
    /// A cache of another model, no tokens, an id outside the vocabulary, more tokens than the model's
    /// context takes, cancellation (the cache is spoilt then), or a failure of the backend.
    pub fn append(
        &self,
        cache: &mut Cache<B>,
        ids: &[u32],
        control: &Control<'_>,
    ) -> Result<Vec<f32>, EngineError> {
        let backend = &self.backend;
        let llama = &self.llama;
        if cache.shape() != llama.shape() {
            return Err(EngineError::WrongCache { cache: cache.shape(), model: llama.shape() });
        }
        let first = cache.logical_length();
        check_tokens(&llama.config, ids, first)?;
        control.check()?;
        let positions = backend.indices(vec![(first as u32..(first + ids.len()) as u32).collect()])?;
        let angles = llama.angles(backend, &positions, first + ids.len())?;
        let mut hidden = backend.embed(&llama.embedding, ids)?;
        let last = llama.layers.len() - 1;
        for (index, layer) in llama.layers.iter().enumerate() {
            let kv = cache.layer_mut(index);
            for rows in llama::chunks(ids.len(), backend.chunk_rows()) {
                control.check()?;
                let normed = layer.attention_input(backend, &llama.config, &hidden, rows.clone())?;
                layer.append_kv(backend, kv, &normed, &angles, &positions, rows.start)?;
                let queries = layer.queries(backend, &normed, &angles, rows.start)?;
                let attended = backend.attention(&queries, kv, crate::backend::Visible::Aligned)?;
                layer.finish(backend, &llama.config, &mut hidden, rows, &attended)?;
            }
            control.report((index + 1) * ids.len(), (last + 1) * ids.len());
        }
        cache.advance(ids.len());
        llama.logits(backend, &hidden, ids.len() - 1)
    }
}
