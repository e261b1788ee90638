//! The decode loop.

use serde::Serialize;

use super::{Control, Engine, EngineError, Sampler, Sampling};
use crate::backend::Backend;
use crate::cache::Cache;

/// How an answer is generated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationOptions {
    /// Tokens at most.
    pub max_tokens: usize,
    /// How each is chosen.
    pub sampling: Sampling,
    /// Tokens that end the answer.
    pub stop_tokens: Vec<u32>,
}

/// An answer. The cache holds all its tokens but the last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Generation {
    /// Its tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token came.
    Stop,
    /// As many tokens as asked for.
    MaxTokens,
    /// The model's context is full.
    ContextFull,
    /// The caller asked to stop.
    Cancelled,
}

impl<B: Backend> Engine<B> {
    /// Generates behind a filled cache, whose last token led to these logits. `on_token` is told of
    /// every token as it comes, but for the one that ends the answer.
    ///
    /// # Errors
    /// Sampling parameters out of range, logits that are not this model's, or a failure of the backend. Cancellation is no error: what
    /// was generated so far is returned.
    pub fn generate(
        &self,
        cache: &mut Cache<B>,
        logits: Vec<f32>,
        options: &GenerationOptions,
        control: &Control<'_>,
        mut on_token: impl FnMut(u32),
    ) -> Result<Generation, EngineError> {
        let mut sampler = Sampler::new(options.sampling)?;
        self.llama.check_logits(&logits)?;
        let limit = self.config().context_limit().tokens;
        // Only the caller's own cancellation is of interest inside a step; progress is the tokens.
        let step = Control { cancel: control.cancel, progress: None };
        let mut logits = logits;
        let mut tokens = Vec::new();
        let finish = loop {
            if tokens.len() == options.max_tokens {
                break FinishReason::MaxTokens;
            }
            if control.check().is_err() {
                break FinishReason::Cancelled;
            }
            let token = sampler.choose(&logits);
            if options.stop_tokens.contains(&token) {
                break FinishReason::Stop;
            }
            tokens.push(token);
            on_token(token);
            control.report(tokens.len(), options.max_tokens);
            if tokens.len() == options.max_tokens {
                break FinishReason::MaxTokens;
            }
            if cache.logical_length() == limit {
                break FinishReason::ContextFull;
            }
            logits = match self.append(cache, &[token], &step) {
                Err(EngineError::Cancelled) => break FinishReason::Cancelled,
                result => result?,
            };
        };
        Ok(Generation { tokens, finish })
    }
}
