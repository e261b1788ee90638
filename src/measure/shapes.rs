//! Models by the name of their shape.

use crate::model::LlamaConfig;

/// Shapes that random weights can be made for: a name, and the `config.json` of such a model. The two small ones are
/// for a CPU.
pub const SHAPES: [(&str, &str); 4] = [
    (
        "llama-3.1-8b",
        r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 132096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}"#,
    ),
    (
        "llama-3.2-1b",
        r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "max_position_embeddings": 132096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
            "tie_word_embeddings": true}"#,
    ),
    (
        "small",
        r#"{"model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1792,
            "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
            "max_position_embeddings": 66560, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}"#,
    ),
    (
        "tiny",
        r#"{"model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 448,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
            "max_position_embeddings": 66560, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}"#,
    ),
];

/// The configuration of a shape's name.
pub fn shape(name: &str) -> Option<LlamaConfig> {
    let (_, config) = SHAPES.into_iter().find(|(known, _)| *known == name)?;
    LlamaConfig::from_json(config).ok()
}

/// Elements of all weights of a model without biases.
pub fn parameters(config: &LlamaConfig) -> u64 {
    let [hidden, mlp] = [config.hidden_size, config.intermediate_size].map(|size| size as u64);
    let queries = (config.query_heads * config.head_dim) as u64;
    let keys = (config.kv_heads * config.head_dim) as u64;
    let layer = 2 * hidden * (queries + keys) + 3 * hidden * mlp + 2 * hidden;
    let tables = if config.tie_word_embeddings { 1 } else { 2 };
    tables * config.vocab_size as u64 * hidden + config.num_layers as u64 * layer + hidden
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_models_of_their_published_size() {
        for (name, _) in SHAPES {
            assert!(shape(name).is_some(), "{name}");
        }
        assert!(shape("llama-5").is_none());
        let size = |name| parameters(&shape(name).expect("a shape"));
        assert_eq!(size("llama-3.1-8b"), 8_030_261_248);
        assert_eq!(size("llama-3.2-1b"), 1_235_814_400);
    }
}
