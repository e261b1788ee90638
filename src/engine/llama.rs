//! A Llama decoder on a backend: the steps of a layer, for any rows of the residual stream.

use std::collections::HashMap;
use std::ops::Range;

use super::EngineError;
use crate::backend::{Backend, BackendError};
use crate::model::{LlamaConfig, ModelDir};
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
        let stored: HashMap<_, _> = weights.tensors().map(|tensor| (tensor.name(), tensor)).collect();
        // Only the output projection can be missing, where it is the embedding.
        Self::new(model.config.clone(), |name, _| {
            backend.weight(stored.get(name).copied().unwrap_or(&weights.lm_head))
        })
    }

    /// Weights by the names that Hugging Face gives them, each of the shape that is told.
    pub(super) fn new(
        config: LlamaConfig,
        mut weight: impl FnMut(&str, &[usize]) -> Result<B::Weight, BackendError>,
    ) -> Result<Self, EngineError> {
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
        Ok(Self {
            embedding: weight("model.embed_tokens.weight", &[vocabulary, hidden])?,
            layers: (0..config.num_layers)
                .map(|layer| Layer::new(&config, layer, &mut weight))
                .collect::<Result<_, _>>()?,
            norm: weight("model.norm.weight", &[hidden])?,
            lm_head: weight("lm_head.weight", &[vocabulary, hidden])?,
            config,
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
    fn new(
        config: &LlamaConfig,
        layer: usize,
        weight: &mut impl FnMut(&str, &[usize]) -> Result<B::Weight, BackendError>,
    ) -> Result<Self, EngineError> {
        let &LlamaConfig { hidden_size: hidden, intermediate_size: inner, .. } = config;
        let (queries, keys) = (config.query_heads * config.head_dim, config.kv_heads * config.head_dim);
        let of_layer = |name: &str| format!("model.layers.{layer}.{name}");
        let mut linear = |name: &str, shape: [usize; 2], bias: bool| -> Result<Linear<B>, EngineError> {
            Ok(Linear {
                weight: weight(&of_layer(&format!("{name}.weight")), &shape)?,
                bias: bias.then(|| weight(&of_layer(&format!("{name}.bias")), &shape[..1])).transpose()?,
            })
        };
        let (attention, mlp) = (config.attention_bias, config.mlp_bias);
        Ok(Self {
            q: linear("self_attn.q_proj", [queries, hidden], attention)?,
            k: linear("self_attn.k_proj", [keys, hidden], attention)?,
            v: linear("self_attn.v_proj", [keys, hidden], attention)?,
            o: linear("self_attn.o_proj", [hidden, queries], attention)?,
            gate: linear("mlp.gate_proj", [inner, hidden], mlp)?,
            up: linear("mlp.up_proj", [inner, hidden], mlp)?,
            down: linear("mlp.down_proj", [hidden, inner], mlp)?,
            input_norm: weight(&of_layer("input_layernorm.weight"), &[hidden])?,
            post_attention_norm: weight(&of_layer("post_attention_layernorm.weight"), &[hidden])?,
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
