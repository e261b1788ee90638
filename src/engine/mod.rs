//! The layerwise prefill and the decode loop: read a [`Plan`](crate::policy::Plan), call a
//! [`Backend`], fill a [`Cache`](crate::cache::Cache).

mod append;
mod check;
mod choice;
mod control;
mod decode;
mod error;
mod generate;
mod layer_cache;
mod llama;
mod memory;
mod named;
mod observe;
mod prefill;
mod reading;
mod restart;
mod sampler;
mod settling;
mod trace;

use std::ops::ControlFlow;

use crate::backend::{Backend, BackendError};
use crate::model::{LlamaConfig, ModelDir};
use crate::policy::ModelShape;

pub use append::HeadScores;
pub use control::{Cancel, Control, Progress};
pub use error::EngineError;
pub use generate::{FinishReason, Generation, GenerationOptions, Turn};
pub use llama::check_tokens;
pub use memory::{Bytes, MemoryEstimate, MemoryOptions};
pub use prefill::{Prefill, PrefillOptions, Prompt};
pub use sampler::{Sampler, Sampling};
pub use trace::{HeadSet, LayerTrace, Overlap, Settled, Trace};

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
        Self::load_with(backend, model, |_, _| ControlFlow::Continue(()))
    }

    /// The same, which can take some seconds where weights go to a memory of their own: `progress` is told of the bytes
    /// of the file so far, and of how many there are.
    ///
    /// # Errors
    /// [`EngineError::Cancelled`] after `progress` said `Break`.
    pub fn load_with(
        backend: B,
        model: &ModelDir,
        progress: impl FnMut(u64, u64) -> ControlFlow<()>,
    ) -> Result<Self, EngineError> {
        let llama = Llama::load(&backend, model, progress)?;
        Ok(Self { backend, llama })
    }

    /// A model whose weights are no file's: `weight` makes each, given the name that Hugging Face has for it and
    /// its shape. With tied embeddings there is no `lm_head.weight`.
    ///
    /// # Errors
    /// What `weight` says.
    pub fn with_weights(
        backend: B,
        config: LlamaConfig,
        mut weight: impl FnMut(&B, &str, &[usize]) -> Result<B::Weight, BackendError>,
    ) -> Result<Self, EngineError> {
        let tied = config.tie_word_embeddings;
        let llama = Llama::new(config, tied, |name, shape| Ok(weight(&backend, name, shape)?))?;
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
}
