//! A prompt that is read twice: a first pass picks the tokens of the second (GemFilter).

use std::slice::from_mut;

use super::EngineError;
use super::llama::Part;
use super::prefill::Run;
use super::reading::{Reading, attend_all, read_keys};
use crate::backend::{Backend, Select};
use crate::cache::Decoding;
use crate::policy::{Keep, LayerPlan, Plan, Restart};

/// What a restart goes by.
pub(super) struct Restarting<'a, B: Backend> {
    pub(super) rule: &'a Restart,
    /// All tokens.
    pub(super) ids: B::Indices,
    /// Positions of the second pass.
    pub(super) positions: B::Indices,
}

impl<B: Backend> Run<'_, B> {
    /// The first pass, where there is one: picks tokens, and begins again with these as the prompt.
    pub(super) fn start_anew(&mut self, plan: &Plan) -> Result<(), EngineError> {
        let Some(Restarting { rule, ids, positions }) = self.restart.take() else { return Ok(()) };
        let (backend, llama) = (self.backend, self.llama);
        let shape = llama.shape();
        let rules = LayerPlan::full(self.rows);
        let steer = self.decoding.steer.clone();
        for (index, layer) in llama.layers[..rule.layer].iter().enumerate() {
            let mut reading = Reading::begin(self, index, &rules, steer.as_ref(), false)?;
            attend_all(layer, from_mut(&mut reading))?;
            self.first_pass_bytes = reading.kv_bytes();
        }
        let layer = &llama.layers[rule.layer];
        let mut reading = Reading::begin(self, rule.layer, &rules, None, false)?;
        read_keys(layer, from_mut(&mut reading))?;
        let (full_bytes, kv) = (reading.kv_bytes(), reading.kv);
        self.first_pass_bytes = full_bytes;

        let last = self.rows - 1;
        let span = self.places.span(last..self.rows);
        let part = Part { hidden: &mut self.hidden, span: span.clone() };
        let normed = layer.attention_input(backend, &llama.config, &[part])?;
        let query = layer.queries(backend, &normed, &[span])?.remove(0);
        let products = backend.query_key_products(&query, &kv)?;
        drop(kv);
        let pooled = backend.pool_groups(&products, shape.kv_heads, self.rows, rule.pooling)?;
        let mut ranked = backend.sum_heads(&pooled)?;
        if let Some(steer) = &steer {
            backend.raise_scores(&mut ranked, &self.places.positions, steer.highlighted())?;
        }
        let chosen = backend.select(&ranked, Select { count: rule.count, tail: 0 })?;

        self.rows = rule.count;
        self.prompt_tokens = self.rows;
        self.hidden = backend.embed_list(&llama.embedding, &backend.gather_indices(&ids, &chosen)?)?;
        self.places = llama.places(backend, positions, self.rows)?;
        self.positions = Some((0..self.rows as u32).collect());
        let by_token = |layer: &LayerPlan| matches!(layer.keep, Keep::Recovered { .. });
        if plan.steering.is_some() || self.trace.is_some() || plan.layers.iter().any(by_token) {
            self.recall(&chosen)?;
        } else {
            // Nothing asks for them, so that nobody has to wait for them.
            self.decoding.tokens.ids.clear();
        }
        Ok(())
    }

    /// Tells the host which tokens are read anew. Waits for the device.
    fn recall(&mut self, chosen: &B::Indices) -> Result<(), EngineError> {
        let chosen = self.backend.read_indices(chosen)?.concat();
        let Decoding { steer, tokens, .. } = &mut self.decoding;
        tokens.ids = chosen.iter().map(|position| tokens.ids[*position as usize]).collect();
        tokens.highlighted = steer.as_ref().map_or_else(Vec::new, |steer| steer.rows(&chosen));
        *steer = steer.as_ref().map(|steer| steer.of_tokens(&chosen));
        self.restarted = Some(chosen);
        Ok(())
    }
}
