//! The tensors of a Llama model, found by name and held to the configuration's shapes.

use std::ops::ControlFlow;

use super::stored::check_finite;
use super::{Checkpoint, LlamaConfig, ModelError, StoredTensor};

/// Every tensor a forward pass reads. Below, `H` is the hidden size, `I` the intermediate size, `V`
/// the vocabulary and `d` the head dimension; linear weights are `[outputs, inputs]`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LlamaWeights {
    /// `[V, H]`.
    pub embedding: StoredTensor,
    /// From the input on.
    pub layers: Vec<LayerWeights>,
    /// RMSNorm before the output projection, `[H]`.
    pub norm: StoredTensor,
    /// `[V, H]`: the embedding itself where the two are tied.
    pub lm_head: StoredTensor,
    /// Whether `lm_head` is `embedding`.
    pub tied: bool,
}

/// One decoder layer.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LayerWeights {
    /// RMSNorm before attention, `[H]`.
    pub input_norm: StoredTensor,
    /// `[query_heads · d, H]`.
    pub q: Linear,
    /// `[kv_heads · d, H]`.
    pub k: Linear,
    /// `[kv_heads · d, H]`.
    pub v: Linear,
    /// `[H, query_heads · d]`.
    pub o: Linear,
    /// RMSNorm before the MLP, `[H]`.
    pub post_attention_norm: StoredTensor,
    /// `[I, H]`.
    pub gate: Linear,
    /// `[I, H]`.
    pub up: Linear,
    /// `[H, I]`.
    pub down: Linear,
}

/// `y = W x + b`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Linear {
    /// `[outputs, inputs]`.
    pub weight: StoredTensor,
    /// `[outputs]`.
    pub bias: Option<StoredTensor>,
}

impl LlamaWeights {
    /// Finds the tensors of `config` in `checkpoint`. Tensors that the model does not know, such as the
    /// `rotary_emb.inv_freq` of early checkpoints, are left alone.
    ///
    /// As in transformers, a `lm_head.weight` that differs from the embedding is used even where the
    /// configuration says they are tied.
    ///
    /// # Errors
    /// A tensor is missing, mis-shaped or of another type, or a projection has a bias that the
    /// configuration denies.
    pub fn find(checkpoint: &Checkpoint, config: &LlamaConfig) -> Result<Self, ModelError> {
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);
        let layers = (0..config.num_layers)
            .map(|layer| LayerWeights::find(checkpoint, config, layer))
            .collect::<Result<_, _>>()?;
        let embedding = checkpoint.tensor("model.embed_tokens.weight", &[vocabulary, hidden])?;
        let norm = checkpoint.tensor("model.norm.weight", &[hidden])?;
        let head = "lm_head.weight";
        let lm_head = match checkpoint.tensor(head, &[vocabulary, hidden]) {
            Err(ModelError::TensorMissing { .. }) if config.tie_word_embeddings => None,
            Err(ModelError::TensorMissing { file, tensor, .. }) => {
                let hint =
                    "; config.json says tie_word_embeddings = false, so the model must have one".to_owned();
                return Err(ModelError::TensorMissing { file, tensor, hint });
            }
            Err(other) => return Err(other),
            Ok(tensor) if config.tie_word_embeddings && same(&tensor, &embedding) => None,
            Ok(tensor) => Some(tensor),
        };
        let tied = lm_head.is_none();
        let lm_head = lm_head.unwrap_or_else(|| embedding.clone());
        Ok(Self { embedding, layers, norm, lm_head, tied })
    }

    /// All tensors in the order in which a forward pass reads them; a tied `lm_head` is not repeated.
    pub fn tensors(&self) -> impl Iterator<Item = &StoredTensor> {
        std::iter::once(&self.embedding)
            .chain(self.layers.iter().flat_map(LayerWeights::tensors))
            .chain(std::iter::once(&self.norm))
            .chain((!self.tied).then_some(&self.lm_head))
    }

    /// Bytes of all these tensors as stored.
    pub fn total_bytes(&self) -> u64 {
        self.tensors().map(|tensor| tensor.bytes().len() as u64).sum()
    }

    /// Looks for NaN and infinity in these tensors; see [`Checkpoint::check_finite`].
    ///
    /// # Errors
    /// [`ModelError::NonFinite`] for the first in the order of [`Self::tensors`];
    /// [`ModelError::Cancelled`] after `progress` said `Break`.
    pub fn check_finite(
        &self,
        progress: impl Fn(u64, u64) -> ControlFlow<()> + Sync,
    ) -> Result<(), ModelError> {
        check_finite(self.tensors(), progress)
    }
}

impl LayerWeights {
    fn find(checkpoint: &Checkpoint, config: &LlamaConfig, layer: usize) -> Result<Self, ModelError> {
        let hidden = config.hidden_size;
        let intermediate = config.intermediate_size;
        let queries = config.query_heads * config.head_dim;
        let keys = config.kv_heads * config.head_dim;
        let norm = |name: &str| checkpoint.tensor(&format!("model.layers.{layer}.{name}.weight"), &[hidden]);
        let attention = |name: &str, outputs, inputs| {
            let module = format!("model.layers.{layer}.self_attn.{name}");
            Linear::find(checkpoint, &module, [outputs, inputs], ("attention_bias", config.attention_bias))
        };
        let mlp = |name: &str, outputs, inputs| {
            let module = format!("model.layers.{layer}.mlp.{name}");
            Linear::find(checkpoint, &module, [outputs, inputs], ("mlp_bias", config.mlp_bias))
        };
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            q: attention("q_proj", queries, hidden)?,
            k: attention("k_proj", keys, hidden)?,
            v: attention("v_proj", keys, hidden)?,
            o: attention("o_proj", hidden, queries)?,
            post_attention_norm: norm("post_attention_layernorm")?,
            gate: mlp("gate_proj", intermediate, hidden)?,
            up: mlp("up_proj", intermediate, hidden)?,
            down: mlp("down_proj", hidden, intermediate)?,
        })
    }

    fn tensors(&self) -> impl Iterator<Item = &StoredTensor> {
        std::iter::once(&self.input_norm)
            .chain([&self.q, &self.k, &self.v, &self.o].into_iter().flat_map(Linear::tensors))
            .chain(std::iter::once(&self.post_attention_norm))
            .chain([&self.gate, &self.up, &self.down].into_iter().flat_map(Linear::tensors))
    }
}

impl Linear {
    fn find(
        checkpoint: &Checkpoint,
        module: &str,
        shape: [usize; 2],
        (switch, has_bias): (&str, bool),
    ) -> Result<Self, ModelError> {
        let weight = checkpoint.tensor(&format!("{module}.weight"), &shape)?;
        let name = format!("{module}.bias");
        if has_bias {
            return Ok(Self { weight, bias: Some(checkpoint.tensor(&name, &shape[..1])?) });
        }
        // Left out silently, a bias would change every answer.
        match checkpoint.file_of(&name) {
            Some(file) => Err(ModelError::TensorUnexpected {
                file: file.to_path_buf(),
                tensor: name,
                reason: format!("config.json says (or implies) {switch} = false"),
            }),
            None => Ok(Self { weight, bias: None }),
        }
    }

    fn tensors(&self) -> impl Iterator<Item = &StoredTensor> {
        std::iter::once(&self.weight).chain(&self.bias)
    }
}

fn same(a: &StoredTensor, b: &StoredTensor) -> bool {
    a.dtype() == b.dtype() && a.bytes() == b.bytes()
}
