//! A Llama decoder on a backend: the steps of a layer, for any rows of the residual stream.

use std::ops::Range;

use super::EngineError;
use crate::backend::Backend;
use crate::model::{self, LlamaConfig, ModelDir};
use crate::policy::ModelShape;

/// The weights of a model.
#[derive(Debug)]
pub(super) struct Llama<B: Backend> {
    pub(super) config: LlamaConfig,
    pub(super) embedding: B::Weight,
    pub(super) layers: Vec<Layer<B>>,
    norm: B::Weight,
    lm_head: B::Weight,
}

/// The weights of a decoder layer.
#[derive(Debug)]
pub(super) struct Layer<B: Backend> {
    input_norm: B::Weight,
    q: Linear<B>,
    k: Linear<B>,
    v: Linear<B>,
    o: Linear<B>,
    post_attention_norm: B::Weight,
    gate: Linear<B>,
    up: Linear<B>,
    down: Linear<B>,
}

/// Where rows stand in the sequence.
#[derive(Debug)]
pub(super) struct Places<B: Backend> {
    /// Their original positions.
    pub(super) positions: B::Indices,
    /// The rotary angles of those.
    angles: B::Rotary,
}

#[derive(Debug)]
struct Linear<B: Backend> {
    weight: B::Weight,
    bias: Option<B::Weight>,
}

impl<B: Backend> Llama<B> {
    pub(super) fn load(backend: &B, model: &ModelDir) -> Result<Self, EngineError> {
        let weights = &model.weights;
        Ok(Self {
            config: model.config.clone(),
            embedding: backend.weight(&weights.embedding)?,
            layers: weights
                .layers
                .iter()
                .map(|layer| Layer::load(backend, layer))
                .collect::<Result<_, _>>()?,
            norm: backend.weight(&weights.norm)?,
            lm_head: backend.weight(&weights.lm_head)?,
        })
    }

    pub(super) fn shape(&self) -> ModelShape {
        ModelShape::from(&self.config)
    }

    /// The places of rows at these positions, in a sequence that has `length` tokens so far.
    pub(super) fn places(
        &self,
        backend: &B,
        positions: B::Indices,
        length: usize,
    ) -> Result<Places<B>, EngineError> {
        let frequencies = self.config.rope.inverse_frequencies(self.config.head_dim, length);
        Ok(Places { angles: backend.rotary(&frequencies, &positions)?, positions })
    }

    /// Next-token logits behind one row of the residual stream.
    pub(super) fn logits(
        &self,
        backend: &B,
        hidden: &B::Tensor,
        row: usize,
    ) -> Result<Vec<f32>, EngineError> {
        let normed = backend.rms_norm(hidden, row..row + 1, &self.norm, self.config.rms_norm_eps)?;
        let logits = backend.read(&backend.logits(&normed, &self.lm_head)?)?;
        self.check_logits(&logits)?;
        Ok(logits)
    }

    /// There is a number for every token.
    pub(super) fn check_logits(&self, logits: &[f32]) -> Result<(), EngineError> {
        let vocabulary = self.config.vocab_size;
        if logits.len() != vocabulary {
            return Err(EngineError::WrongLogits { logits: logits.len(), vocabulary });
        }
        match logits.iter().position(|logit| !logit.is_finite()) {
            Some(token) => Err(EngineError::NotFinite { value: logits[token], token }),
            None => Ok(()),
        }
    }
}

impl<B: Backend> Layer<B> {
    fn load(backend: &B, weights: &model::LayerWeights) -> Result<Self, EngineError> {
        let linear = |linear: &model::Linear| -> Result<Linear<B>, EngineError> {
            let bias = linear.bias.as_ref().map(|bias| backend.weight(bias)).transpose()?;
            Ok(Linear { weight: backend.weight(&linear.weight)?, bias })
        };
        Ok(Self {
            input_norm: backend.weight(&weights.input_norm)?,
            q: linear(&weights.q)?,
            k: linear(&weights.k)?,
            v: linear(&weights.v)?,
            o: linear(&weights.o)?,
            post_attention_norm: backend.weight(&weights.post_attention_norm)?,
            gate: linear(&weights.gate)?,
            up: linear(&weights.up)?,
            down: linear(&weights.down)?,
        })
    }

    /// The normed rows that projections read.
    pub(super) fn attention_input(
        &self,
        backend: &B,
        config: &LlamaConfig,
        hidden: &B::Tensor,
        rows: Range<usize>,
    ) -> Result<B::Tensor, EngineError> {
        Ok(backend.rms_norm(hidden, rows, &self.input_norm, config.rms_norm_eps)?)
    }

    /// Rotated queries of normed rows, whose places begin at `first_row`.
    pub(super) fn queries(
        &self,
        backend: &B,
        normed: &B::Tensor,
        places: &Places<B>,
        first_row: usize,
    ) -> Result<B::Tensor, EngineError> {
        let mut queries = self.q.apply(backend, normed)?;
        backend.rotate(&mut queries, &places.angles, first_row)?;
        Ok(queries)
    }

    /// Appends rotated keys, and values, of normed rows, whose places begin at `first_row`.
    pub(super) fn append_kv(
        &self,
        backend: &B,
        kv: &mut B::Kv,
        normed: &B::Tensor,
        places: &Places<B>,
        first_row: usize,
    ) -> Result<(), EngineError> {
        let mut keys = self.k.apply(backend, normed)?;
        backend.rotate(&mut keys, &places.angles, first_row)?;
        let values = self.v.apply(backend, normed)?;
        Ok(backend.append_kv(kv, &keys, &values, &places.positions, first_row)?)
    }

    /// The whole layer for rows that follow those in `kv`: they join it, and `attend` is given their
    /// queries.
    pub(super) fn read(
        &self,
        backend: &B,
        config: &LlamaConfig,
        hidden: &mut B::Tensor,
        rows: Range<usize>,
        places: &Places<B>,
        kv: &mut B::Kv,
        attend: impl FnOnce(&B::Tensor, &B::Kv) -> Result<B::Tensor, EngineError>,
    ) -> Result<(), EngineError> {
        let normed = self.attention_input(backend, config, hidden, rows.clone())?;
        self.append_kv(backend, kv, &normed, places, rows.start)?;
        let queries = self.queries(backend, &normed, places, rows.start)?;
        let attended = attend(&queries, kv)?;
        self.finish(backend, config, hidden, rows, &attended)
    }

    /// What follows attention: output projection, MLP, and both residual sums into `hidden[rows]`.
    pub(super) fn finish(
        &self,
        backend: &B,
        config: &LlamaConfig,
        hidden: &mut B::Tensor,
        rows: Range<usize>,
        attended: &B::Tensor,
    ) -> Result<(), EngineError> {
        let projected = self.o.apply(backend, attended)?;
        backend.add(hidden, rows.start, &projected)?;
        let first_row = rows.start;
        let normed = backend.rms_norm(hidden, rows, &self.post_attention_norm, config.rms_norm_eps)?;
        let gate = self.gate.apply(backend, &normed)?;
        let up = self.up.apply(backend, &normed)?;
        let down = self.down.apply(backend, &backend.swiglu(gate, &up)?)?;
        Ok(backend.add(hidden, first_row, &down)?)
    }
}

impl<B: Backend> Linear<B> {
    fn apply(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor, EngineError> {
        Ok(backend.linear(x, &self.weight, self.bias.as_ref())?)
    }
}

impl From<&LlamaConfig> for ModelShape {
    fn from(config: &LlamaConfig) -> Self {
        Self {
            layers: config.num_layers,
            query_heads: config.query_heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
        }
    }
}

/// Whether a model can read tokens whose first one stands at this position: what a prefill or an append
/// would find out after loading.
///
/// # Errors
/// No tokens, an id outside the vocabulary, or more tokens than the model's context takes.
pub fn check_tokens(config: &LlamaConfig, ids: &[u32], first: usize) -> Result<(), EngineError> {
    if ids.is_empty() {
        return Err(EngineError::NoTokens);
    }
    let vocabulary = config.vocab_size;
    if let Some(index) = ids.iter().position(|id| *id as usize >= vocabulary) {
        return Err(EngineError::TokenOutOfRange { id: ids[index], position: first + index, vocabulary });
    }
    let tokens = first + ids.len();
    let limit = config.context_limit();
    if tokens > limit.tokens {
        return Err(EngineError::ContextExceeded { tokens, limit: limit.tokens, reason: limit.reason });
    }
    Ok(())
}

/// Row ranges of at most `chunk` rows; the last one is full, so that it holds the whole window.
pub(super) fn chunks(rows: usize, chunk: usize) -> impl Iterator<Item = Range<usize>> {
    let first = match rows % chunk {
        0 => chunk.min(rows),
        remainder => remainder,
    };
    (first..=rows).step_by(chunk).map(move |end| end.saturating_sub(chunk)..end)
}
