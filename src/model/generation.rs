//! `generation_config.json`: when to stop, and the sampling its author recommends.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::json::{self, Fields};
use super::{LlamaConfig, ModelError};

/// Defaults for generation that come with a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct GenerationConfig {
    /// Tokens that end an answer: `eos_token_id` of this file, or else of `config.json`; sorted, each
    /// once, possibly none.
    pub stop_tokens: Vec<u32>,
    /// Whether to sample at all; false is greedy.
    pub do_sample: bool,
    /// Divides the logits; above 0.
    pub temperature: Option<f32>,
    /// Nucleus mass, above 0 and at most 1.
    pub top_p: Option<f32>,
    /// Candidates to sample from, at least 1.
    pub top_k: Option<usize>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` of a model directory; where there is none, what `config` says.
    ///
    /// # Errors
    /// The file is there but unreadable, not a JSON object, or has a field that makes no sense.
    pub fn from_directory(directory: &Path, config: &LlamaConfig) -> Result<Self, ModelError> {
        let file = directory.join("generation_config.json");
        match json::read(&file, "") {
            Ok(text) => Self::read(&file, &text, config),
            Err(ModelError::FileMissing { .. }) => Ok(Self::of(config)),
            Err(error) => Err(error),
        }
    }

    /// What follows from `config.json` alone: its stop tokens, greedy.
    pub fn of(config: &LlamaConfig) -> Self {
        Self {
            stop_tokens: sorted(config.eos_token_ids.clone()),
            do_sample: false,
            temperature: None,
            top_p: None,
            top_k: None,
        }
    }

    fn read(file: &Path, text: &[u8], config: &LlamaConfig) -> Result<Self, ModelError> {
        let map = json::object(file, text)?;
        let fields = Fields::new(file, &map);
        let stop_tokens = fields.tokens("eos_token_id", config.vocab_size)?;
        // Sampling is off below, but files in the wild switch it off by a temperature of 0 as well.
        let temperature = fields.number("temperature", "a number of at least 0", |value| value >= 0.0)?;
        Ok(Self {
            stop_tokens: sorted(stop_tokens.unwrap_or_else(|| config.eos_token_ids.clone())),
            do_sample: fields.boolean("do_sample")?.unwrap_or(false) && temperature != Some(0.0),
            temperature: temperature.filter(|value| *value > 0.0).map(|value| value as f32),
            top_p: fields
                .number("top_p", "a number above 0 and at most 1", |value| value > 0.0 && value <= 1.0)?
                .map(|value| value as f32),
            // 0 is how transformers spells "no limit".
            top_k: match fields.get("top_k").and_then(Value::as_u64) {
                Some(0) => None,
                _ => fields.count("top_k", usize::MAX)?,
            },
        })
    }
}

fn sorted(mut tokens: Vec<u32>) -> Vec<u32> {
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}
