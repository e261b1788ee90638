//! Reading behind a filled cache: decoding, a second turn, a question.

use super::llama::{Part, Projected, check_tokens, chunks};
use super::{Control, Engine, EngineError};
use crate::backend::{Backend, Bias, Columns, Visible};
use crate::cache::Cache;

/// Every query counts the same, on all keys.
pub(super) const EVERY_QUERY: Columns = Columns { weight: 1.0, step: 0.0, band: None };

/// Looks at the queries of a chunk of one layer, the entries they attend to, and how they are steered.
type Watch<'a, B> = dyn FnMut(&<B as Backend>::Tensor, &<B as Backend>::Kv, Option<&Bias<'_>>) -> Result<(), EngineError>
    + 'a;

/// Attention of one layer by query head and entry.
pub type HeadScores = Vec<Vec<f32>>;

impl<B: Backend> Engine<B> {
    /// Reads more tokens behind a filled cache: a second turn, or the question behind a compressed
    /// context. The cache keeps all of them, unless its policy evicts in decoding: then what is over
    /// goes behind the last of them. Returns the logits behind the last of them. After an error the
    /// cache is what it was, or lost where a device failed while it evicted, or again while it went back.
    ///
    /// # Errors
    /// A cache of another model or another backend, no tokens, an id outside the vocabulary, more tokens than the model's
    /// context takes, cancellation, or a failure of the backend.
    pub fn append(
        &self,
        cache: &mut Cache<B>,
        ids: &[u32],
        control: &Control<'_>,
    ) -> Result<Vec<f32>, EngineError> {
        self.append_watched(cache, ids, control, &mut |_, _, _| Ok(()))
    }

    /// [`append`](Self::append) of one token, and its attention probabilities: `[layer][query head][entry]`.
    /// Every kv head of the cache holds as many entries.
    ///
    /// # Errors
    /// As for `append`, and a cache whose heads differ.
    pub fn append_observed(
        &self,
        cache: &mut Cache<B>,
        id: u32,
        control: &Control<'_>,
    ) -> Result<(Vec<f32>, Vec<HeadScores>), EngineError> {
        let mut attention = Vec::new();
        let mut watch = |query: &B::Tensor, kv: &B::Kv, bias: Option<&Bias<'_>>| {
            let scores = match bias {
                Some(bias) => self.backend.biased_window_scores(query, kv, bias)?,
                None => self.backend.window_scores(query, kv)?,
            };
            attention.push(self.backend.read_scores(&scores)?);
            Ok(())
        };
        let logits = self.append_watched(cache, &[id], control, &mut watch)?;
        Ok((logits, attention))
    }

    fn append_watched(
        &self,
        cache: &mut Cache<B>,
        ids: &[u32],
        control: &Control<'_>,
        watch: &mut Watch<'_, B>,
    ) -> Result<Vec<f32>, EngineError> {
        self.check_cache(cache)?;
        check_tokens(&self.llama.config, ids, cache.logical_length())?;
        control.check()?;
        let lengths = cache.physical_lengths(&self.backend);
        let logits = self.read_behind(cache, ids, control, watch);
        match &logits {
            Ok(_) => cache.advance(ids.len()),
            Err(_) => cache.truncate(&self.backend, &lengths),
        }
        logits
    }

    /// The cache is of this model and this backend, and it is there.
    pub(super) fn check_cache(&self, cache: &Cache<B>) -> Result<(), EngineError> {
        let model = self.llama.shape();
        if cache.shape() != model {
            return Err(EngineError::WrongCache { cache: cache.shape(), model });
        }
        if cache.is_lost() {
            return Err(EngineError::LostCache);
        }
        match cache.is_of(&self.backend) {
            true => Ok(()),
            false => Err(EngineError::ForeignCache { backend: self.backend.name() }),
        }
    }

    fn read_behind(
        &self,
        cache: &mut Cache<B>,
        ids: &[u32],
        control: &Control<'_>,
        watch: &mut Watch<'_, B>,
    ) -> Result<Vec<f32>, EngineError> {
        let backend = &self.backend;
        let llama = &self.llama;
        let first = cache.logical_length();
        let positions = backend.indices(vec![(first as u32..(first + ids.len()) as u32).collect()])?;
        let places = llama.places(backend, positions, first + ids.len())?;
        let mut hidden = backend.embed(&llama.embedding, ids)?;
        let (layers, decoding) = cache.parts_mut();
        // Attention of these tokens, where a layer evicts by it.
        let mut seen: Vec<Option<B::Scores>> = layers.iter().map(|_| None).collect();
        for (index, (layer, kv)) in llama.layers.iter().zip(layers).enumerate() {
            let bias = decoding.steer.as_ref().and_then(|steer| steer.bias(index));
            let evicts = decoding.evictions[index].is_some();
            for rows in chunks(ids.len(), backend.chunk_rows()) {
                control.check()?;
                let part = Part { hidden: &mut hidden, span: places.span(rows) };
                layer.read(backend, &llama.config, &mut [part], |_, span, projected| {
                    let Projected { queries, keys, values } = projected;
                    backend.append_kv(kv, &keys, &values, span.positions, span.rows.start)?;
                    watch(&queries, kv, bias.as_ref())?;
                    if evicts {
                        let (attended, sums) =
                            backend.attention_with_columns(&queries, kv, &[EVERY_QUERY], bias.as_ref())?;
                        for sums in sums {
                            seen[index] = Some(match &seen[index] {
                                Some(before) => backend.add_scores(before, &sums)?,
                                None => sums,
                            });
                        }
                        return Ok(attended);
                    }
                    Ok(match &bias {
                        Some(bias) => backend.biased_attention(&queries, kv, Visible::Aligned, bias)?,
                        None => backend.attention(&queries, kv, Visible::Aligned)?,
                    })
                })?;
            }
            control.report((index + 1) * ids.len(), llama.layers.len() * ids.len());
        }
        let logits = llama.logits(backend, &[&hidden])?.remove(0);
        self.evict(cache, ids, &seen)?;
        Ok(logits)
    }

    /// Lets go of what each layer's rule does not keep. Nothing is changed before all is decided, and a cache that is
    /// changed in part is lost.
    fn evict(
        &self,
        cache: &mut Cache<B>,
        ids: &[u32],
        seen: &[Option<B::Scores>],
    ) -> Result<(), EngineError> {
        let backend = &self.backend;
        let (layers, decoding) = cache.parts_mut();
        let before = decoding.tokens.ids.len();
        decoding.tokens.ids.extend(ids);
        let decide = || {
            let mut decided = Vec::new();
            for ((kv, eviction), seen) in layers.iter().zip(&decoding.evictions).zip(seen) {
                decided.push(match (eviction, seen) {
                    (Some(eviction), Some(seen)) => {
                        let sums = backend.add_scores(&eviction.sums, seen)?;
                        let kept = eviction.rule.choose(backend, kv, &sums, &decoding.tokens)?;
                        let sums = match &kept {
                            Some(kept) => backend.gather_scores(&sums, kept)?,
                            None => sums,
                        };
                        Some((kept, sums))
                    }
                    _ => None,
                });
            }
            Ok::<_, EngineError>(decided)
        };
        let decided = decide();
        if decided.is_err() {
            decoding.tokens.ids.truncate(before);
        }
        let decided = decided?;
        let evict = || {
            for ((kv, eviction), decided) in layers.iter_mut().zip(&mut decoding.evictions).zip(decided) {
                if let (Some(eviction), Some((kept, sums))) = (eviction, decided) {
                    if let Some(kept) = kept {
                        backend.retain_kv(kv, &kept)?;
                    }
                    eviction.sums = sums;
                }
            }
            Ok(())
        };
        let evicted = evict();
        if evicted.is_err() {
            cache.take_layers();
        }
        evicted
    }
}
