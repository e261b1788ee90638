//! Reading behind a filled cache: decoding, a second turn, a question.

use super::llama::{check_tokens, chunks};
use super::{Control, Engine, EngineError};
use crate::backend::{Backend, Visible};
use crate::cache::Cache;

impl<B: Backend> Engine<B> {
    /// Reads more tokens behind a filled cache, which keeps all of them: a second turn, or the
    /// question behind a compressed context. Returns the logits behind the last of them. After an
    /// error the cache is what it was.
    ///
    /// # Errors
    /// A cache of another model, no tokens, an id outside the vocabulary, more tokens than the model's
    /// context takes, cancellation, or a failure of the backend.
    pub fn append(
        &self,
        cache: &mut Cache<B>,
        ids: &[u32],
        control: &Control<'_>,
    ) -> Result<Vec<f32>, EngineError> {
        let model = self.llama.shape();
        if cache.shape() != model {
            return Err(EngineError::WrongCache { cache: cache.shape(), model });
        }
        check_tokens(&self.llama.config, ids, cache.logical_length())?;
        control.check()?;
        let lengths = cache.physical_lengths(&self.backend);
        let logits = self.read_behind(cache, ids, control);
        match &logits {
            Ok(_) => cache.advance(ids.len()),
            Err(_) => cache.truncate(&self.backend, &lengths)?,
        }
        logits
    }

    fn read_behind(
        &self,
        cache: &mut Cache<B>,
        ids: &[u32],
        control: &Control<'_>,
    ) -> Result<Vec<f32>, EngineError> {
        let backend = &self.backend;
        let llama = &self.llama;
        let first = cache.logical_length();
        let positions = backend.indices(vec![(first as u32..(first + ids.len()) as u32).collect()])?;
        let places = llama.places(backend, positions, first + ids.len())?;
        let mut hidden = backend.embed(&llama.embedding, ids)?;
        for (index, layer) in llama.layers.iter().enumerate() {
            let kv = cache.layer_mut(index);
            for rows in chunks(ids.len(), backend.chunk_rows()) {
                control.check()?;
                layer.read(backend, &llama.config, &mut hidden, rows, &places, kv, |queries, kv| {
                    Ok(backend.attention(queries, kv, Visible::Aligned)?)
                })?;
            }
            control.report((index + 1) * ids.len(), llama.layers.len() * ids.len());
        }
        llama.logits(backend, &hidden, ids.len() - 1)
    }
}
