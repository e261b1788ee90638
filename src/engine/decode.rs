//! One step of several sequences that decode together.

use super::llama::{Part, Projected, Span};
use super::{Engine, EngineError};
use crate::backend::Backend;
use crate::cache::Cache;
use crate::model::RopeScaling;

/// Sequences that take their steps together. While they do, their caches are empty.
#[derive(Debug)]
pub(super) struct Together<B: Backend> {
    /// Of every layer.
    layers: Vec<B::KvBatch>,
    /// The newest token of each sequence.
    ids: B::Indices,
    /// Their positions.
    positions: B::Indices,
    /// What follows them.
    logits: Option<B::Tensor>,
    recording: B::Recording,
    steps: usize,
    room: usize,
}

/// Steps that are taken without a look at the memory of the caches.
const MOST_ROOM: usize = 256;

impl<B: Backend> Together<B> {
    /// Whether there is room for one more token of each sequence.
    pub(super) fn has_room(&self) -> bool {
        self.steps < self.room
    }
}

impl<B: Backend> Engine<B> {
    /// Whether a step of this cache is nothing but attention over it, at angles that do not change with its length.
    pub(super) fn steps_plainly(&self, cache: &Cache<B>) -> bool {
        let stretches = matches!(self.llama.config.rope.scaling, RopeScaling::Dynamic { .. });
        cache.is_plain() && !stretches
    }

    /// Joins caches, which are not none, for as many steps as `tokens` says, or fewer.
    ///
    /// # Errors
    /// Where the backend fails. The caches are lost then.
    pub(super) fn join(
        &self,
        caches: &mut [&mut Cache<B>],
        tokens: usize,
    ) -> Result<Together<B>, EngineError> {
        let backend = &self.backend;
        let room = tokens.min(MOST_ROOM);
        let mut stores: Vec<_> = caches.iter_mut().map(|cache| cache.take_layers().into_iter()).collect();
        let mut layers = Vec::with_capacity(self.llama.layers.len());
        for _ in &self.llama.layers {
            layers.push(backend.join_kv(stores.iter_mut().flat_map(Iterator::next).collect(), room)?);
        }
        let list = || backend.indices(vec![vec![0; caches.len()]]);
        let (ids, positions) = (list()?, list()?);
        Ok(Together {
            layers,
            ids,
            positions,
            logits: None,
            recording: B::Recording::default(),
            steps: 0,
            room,
        })
    }

    /// Gives the caches, which are those that were joined, their entries back.
    pub(super) fn part(
        &self,
        together: Together<B>,
        caches: &mut [&mut Cache<B>],
    ) -> Result<(), EngineError> {
        let Together { layers, steps, .. } = together;
        let mut of_cache: Vec<Vec<B::Kv>> = caches.iter().map(|_| Vec::new()).collect();
        for layer in layers {
            let stores = self.backend.split_kv(layer, steps)?;
            of_cache.iter_mut().zip(stores).for_each(|(layers, kv)| layers.push(kv));
        }
        caches.iter_mut().zip(of_cache).for_each(|(cache, layers)| cache.put_layers(layers));
        Ok(())
    }

    /// Reads one token behind each sequence, for which there is room; returns the logits behind each. After an error
    /// no sequence has grown.
    pub(super) fn step(
        &self,
        together: &mut Together<B>,
        caches: &mut [&mut Cache<B>],
        tokens: &[u32],
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        let (backend, llama) = (&self.backend, &self.llama);
        let Together { layers, ids, positions, logits, recording, steps, .. } = together;
        let at: Vec<u32> = caches.iter().map(|cache| cache.logical_length() as u32).collect();
        backend.write_list(ids, tokens)?;
        backend.write_list(positions, &at)?;
        let frequencies = llama.config.rope.inverse_frequencies(llama.config.head_dim, 0);
        let work = || {
            // What there is goes first, so that its memory can be had again.
            *logits = None;
            let angles = backend.rotary(&frequencies, positions)?;
            let mut hidden = backend.embed_list(&llama.embedding, ids)?;
            for (layer, kv) in llama.layers.iter().zip(layers.iter_mut()) {
                let span = Span { positions, angles: &angles, rows: 0..tokens.len() };
                let part = Part { hidden: &mut hidden, span };
                layer.read(backend, &llama.config, &mut [part], |_, span, projected| {
                    let Projected { queries, keys, values } = projected;
                    Ok(backend.decode_attention(&queries, &keys, &values, span.positions, kv)?)
                })?;
            }
            *logits = Some(llama.logits_of(backend, &hidden)?);
            Ok::<_, EngineError>(())
        };
        // SAFETY: the engine has the weights, and the rest stays beside the recording until the sequences part.
        unsafe { backend.repeat(recording, work) }?;
        let rows = match logits {
            Some(logits) => llama.read_logits(backend, logits)?,
            None => Vec::new(),
        };
        *steps += 1;
        for (cache, token) in caches.iter_mut().zip(tokens) {
            cache.parts_mut().1.tokens.ids.push(*token);
            cache.advance(1);
        }
        Ok(rows)
    }
}
