//! `config.json` of a Llama or Mistral checkpoint.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::json::{self, Fields};
use super::rope::MAX_POSITIONS;
use super::{ModelError, RopeConfig, RopeScaling};

/// Most query heads that may share a kv head.
pub const MAX_GQA_RATIO: usize = 16;

/// Longest head, in elements.
pub const MAX_HEAD_DIM: usize = 256;

/// The shape of a Llama-architecture model and the numbers its forward pass needs, all checked:
/// products of any three sizes fit a `u64`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LlamaConfig {
    /// Whose modelling code of transformers is followed.
    pub architecture: Architecture,
    /// Rows of the embedding and of the output projection.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads, `kv_heads` times 1 to [`MAX_GQA_RATIO`].
    pub query_heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of a head: even, at most [`MAX_HEAD_DIM`]; `query_heads · head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether q, k, v and o projections have biases.
    pub attention_bias: bool,
    /// Whether gate, up and down projections have biases.
    pub mlp_bias: bool,
    /// Trained context in tokens, for most RoPE types before they stretch it; see [`Self::context_limit`].
    pub max_position_embeddings: usize,
    /// Keys a query sees, itself included: those with `query − key < sliding_window`.
    pub sliding_window: Option<usize>,
    /// Token that begins a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// `dtype` (or `torch_dtype`) as written, such as `bfloat16`. Informative: tensors carry their own.
    pub dtype: Option<String>,
}

/// Architectures that share the Llama forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// `LlamaForCausalLM`.
    Llama,
    /// `MistralForCausalLM`.
    Mistral,
}

/// The longest sequence for which the model's answer is the one it was trained to give.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ContextLimit {
    /// Prompt and answer together.
    pub tokens: usize,
    /// Which fields the number comes from.
    pub reason: String,
}

impl LlamaConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// The file cannot be read, or [`Self::from_json`] refuses it.
    pub fn from_file(path: &Path) -> Result<Self, ModelError> {
        let text = json::read(path, "every Hugging Face model directory has one")?;
        Self::read(path, &text)
    }

    /// Reads the text of a `config.json`; messages call the file `config.json`.
    ///
    /// Sizes are required; the rest has the defaults of transformers.
    ///
    /// # Errors
    /// [`ModelError`] for text that is not a JSON object, for a field that is missing or absurd, and
    /// for whatever changes the forward pass in a way that is not implemented: other architectures,
    /// activations and RoPE types, quantised weights.
    pub fn from_json(text: &str) -> Result<Self, ModelError> {
        Self::read(Path::new("config.json"), text.as_bytes())
    }

    /// The longest sequence the model can take, and why.
    ///
    /// A sliding window caps it: up to `sliding_window` tokens every query sees all keys before it, so
    /// full attention gives the exact result, and beyond it would not.
    pub fn context_limit(&self) -> ContextLimit {
        let positions = self.max_position_embeddings;
        let (tokens, reason) = match self.rope.scaling {
            RopeScaling::Default => (positions, format!("max_position_embeddings = {positions}")),
            RopeScaling::Linear { factor } => (
                times(positions, factor),
                format!("max_position_embeddings = {positions} times the linear RoPE factor {factor}"),
            ),
            RopeScaling::Dynamic { factor, .. } => (
                times(positions, factor),
                format!("max_position_embeddings = {positions} times the dynamic RoPE factor {factor}"),
            ),
            RopeScaling::Llama3 { factor, original_max_position_embeddings: original, .. } => {
                // The stretched length, but where nobody wrote it.
                if positions == original {
                    let reason = format!(
                        "original_max_position_embeddings = {original} times the llama3 RoPE factor {factor}"
                    );
                    (times(original, factor), reason)
                } else {
                    (positions, format!("max_position_embeddings = {positions}"))
                }
            }
        };
        match self.sliding_window {
            Some(window) if window < tokens => {
                ContextLimit { tokens: window, reason: format!("sliding_window = {window}") }
            }
            _ => ContextLimit { tokens, reason },
        }
    }

    /// Query heads per kv head, 1 to [`MAX_GQA_RATIO`].
    pub fn gqa_ratio(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    pub(super) fn read(file: &Path, text: &[u8]) -> Result<Self, ModelError> {
        let map = json::object(file, text)?;
        let fields = Fields::new(file, &map);
        let architecture = architecture(&fields)?;
        if fields.get("quantization_config").is_some() {
            return Err(fields.unsupported("quantization_config", "checkpoints stored as BF16, F16 or F32"));
        }
        if !matches!(fields.string("hidden_act")?, None | Some("silu")) {
            return Err(fields.unsupported("hidden_act", "silu"));
        }

        let vocab_size = fields.required_count("vocab_size", MAX_VOCABULARY)?;
        let hidden_size = fields.required_count("hidden_size", MAX_WIDTH)?;
        let query_heads = fields.required_count("num_attention_heads", MAX_HEADS)?;
        let max_position_embeddings = fields.required_count("max_position_embeddings", MAX_POSITIONS)?;
        let rms_norm_eps = fields
            .number("rms_norm_eps", "a number above 0 and below 1", |eps| eps as f32 > 0.0 && eps < 1.0)?;
        let head_dim = head_dim(&fields, hidden_size, query_heads)?;
        let rope = RopeConfig::read(&fields, max_position_embeddings)?;
        if matches!(rope.scaling, RopeScaling::Dynamic { .. }) && head_dim < 4 {
            return Err(fields.wrong("head_dim", "at least 4 for the dynamic RoPE type"));
        }

        Ok(Self {
            architecture,
            vocab_size,
            hidden_size,
            intermediate_size: fields.required_count("intermediate_size", MAX_WIDTH)?,
            num_layers: fields.required_count("num_hidden_layers", MAX_LAYERS)?,
            query_heads,
            kv_heads: kv_heads(&fields, architecture, query_heads)?,
            head_dim,
            rms_norm_eps: rms_norm_eps.unwrap_or(1e-6) as f32,
            rope,
            tie_word_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
            attention_bias: fields.boolean("attention_bias")?.unwrap_or(false),
            mlp_bias: fields.boolean("mlp_bias")?.unwrap_or(false),
            max_position_embeddings,
            sliding_window: sliding_window(&fields, architecture)?,
            bos_token_id: fields.token("bos_token_id", vocab_size)?,
            eos_token_ids: fields.tokens("eos_token_id", vocab_size)?.unwrap_or_default(),
            dtype: match fields.string("dtype")? {
                Some(name) => Some(name),
                None => fields.string("torch_dtype")?,
            }
            .map(str::to_owned),
        })
    }
}

// Far above any model, low enough that no product of sizes overflows.
const MAX_VOCABULARY: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 12;
const MAX_LAYERS: usize = 1 << 12;

const SUPPORTED: &str = "LlamaForCausalLM (model_type llama), MistralForCausalLM (model_type mistral)";

/// What MistralConfig takes where config.json is silent.
const MISTRAL_KV_HEADS: usize = 8;
const MISTRAL_SLIDING_WINDOW: usize = 4096;

fn architecture(fields: &Fields<'_>) -> Result<Architecture, ModelError> {
    let of_type = match fields.string("model_type")? {
        None => None,
        Some("llama") => Some(Architecture::Llama),
        Some("mistral") => Some(Architecture::Mistral),
        Some(_) => return Err(fields.unsupported("model_type", SUPPORTED)),
    };
    let of_class = match fields.get("architectures") {
        None => None,
        Some(Value::Array(names)) if names.is_empty() => None,
        Some(Value::Array(names)) => match names.iter().find_map(|name| match name.as_str() {
            Some("LlamaForCausalLM") => Some(Architecture::Llama),
            Some("MistralForCausalLM") => Some(Architecture::Mistral),
            _ => None,
        }) {
            Some(architecture) => Some(architecture),
            None => return Err(fields.unsupported("architectures", SUPPORTED)),
        },
        Some(_) => return Err(fields.wrong("architectures", "a list of class names")),
    };
    // The model type decides, as it does for AutoModelForCausalLM.
    of_type.or(of_class).ok_or_else(|| fields.missing("model_type", "llama or mistral"))
}

fn head_dim(fields: &Fields<'_>, hidden_size: usize, query_heads: usize) -> Result<usize, ModelError> {
    match fields.count("head_dim", usize::MAX)? {
        Some(head_dim) if head_dim > MAX_HEAD_DIM || head_dim % 2 != 0 => {
            Err(fields.wrong("head_dim", &format!("even and at most {MAX_HEAD_DIM}")))
        }
        Some(head_dim) => Ok(head_dim),
        None if !hidden_size.is_multiple_of(query_heads) => Err(fields.wrong(
            "hidden_size",
            &format!("a multiple of num_attention_heads = {query_heads} where head_dim is absent"),
        )),
        None => match hidden_size / query_heads {
            head_dim if head_dim <= MAX_HEAD_DIM && head_dim % 2 == 0 => Ok(head_dim),
            head_dim => Err(fields.wrong(
                "hidden_size",
                &format!(
                    "such that head_dim = hidden_size / num_attention_heads, now {head_dim}, is even and at most \
                     {MAX_HEAD_DIM}"
                ),
            )),
        },
    }
}

fn kv_heads(
    fields: &Fields<'_>,
    architecture: Architecture,
    query_heads: usize,
) -> Result<usize, ModelError> {
    let field = "num_key_value_heads";
    let kv_heads = match fields.count(field, MAX_HEADS)? {
        Some(kv_heads) => kv_heads,
        None if architecture == Architecture::Mistral && !fields.has(field) => MISTRAL_KV_HEADS,
        None => query_heads,
    };
    if !query_heads.is_multiple_of(kv_heads) {
        return Err(fields.wrong(field, &format!("a divisor of num_attention_heads = {query_heads}")));
    }
    let ratio = query_heads / kv_heads;
    if ratio > MAX_GQA_RATIO {
        return Err(fields.wrong(
            field,
            &format!(
                "at least num_attention_heads / {MAX_GQA_RATIO}: {query_heads} query heads would share {kv_heads} kv \
                 heads {ratio} to 1"
            ),
        ));
    }
    Ok(kv_heads)
}

fn sliding_window(fields: &Fields<'_>, architecture: Architecture) -> Result<Option<usize>, ModelError> {
    // Layers that differ in their window would still agree within it; any other kind would not.
    if let Some(layers) = fields.get("layer_types") {
        let Value::Array(layers) = layers else {
            return Err(fields.wrong("layer_types", "a list"));
        };
        let known = |layer: &Value| matches!(layer.as_str(), Some("full_attention" | "sliding_attention"));
        if !layers.iter().all(known) {
            return Err(fields.unsupported("layer_types", "full_attention, sliding_attention"));
        }
    }
    let window = fields.count("sliding_window", usize::MAX)?;
    if fields.boolean("use_sliding_window")? == Some(false) {
        return Ok(None);
    }
    match architecture {
        Architecture::Mistral if !fields.has("sliding_window") => Ok(Some(MISTRAL_SLIDING_WINDOW)),
        _ => Ok(window),
    }
}

fn times(tokens: usize, factor: f64) -> usize {
    // `as` saturates; positions stop at i32.
    ((tokens as f64 * factor) as usize).min(MAX_POSITIONS)
}
