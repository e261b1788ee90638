//! StreamingLLM (arXiv 2309.17453): attention sinks and the most recent tokens.

use serde::{Deserialize, Serialize};

use super::plan::{Keep, LayerPlan};
use super::{Budget, DEFAULT_RETENTION, ModelShape, PolicyError};

/// StreamingLLM's options. Keys keep their original rotation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StreamingLlm {
    /// Tokens kept at the start.
    pub sinks: usize,
    /// Tokens each layer keeps of the prompt, the sinks included.
    pub retention: Budget,
}

impl Default for StreamingLlm {
    fn default() -> Self {
        Self { sinks: 4, retention: Budget::Rate(DEFAULT_RETENTION) }
    }
}

impl StreamingLlm {
    /// Every budget exceeds this many tokens, as it exceeds the window in other policies.
    const RESERVED: usize = 8;

    pub(super) fn layers(&self, shape: ModelShape, prompt: usize) -> Result<Vec<LayerPlan>, PolicyError> {
        let reserved = self.sinks.max(Self::RESERVED);
        let count = self.retention.tokens("retention", prompt, reserved, "sinks and recent tokens")?;
        let keep = if prompt <= count {
            Keep::All
        } else {
            Keep::Ends { sinks: self.sinks, recent: count - self.sinks }
        };
        Ok(vec![LayerPlan { rows: prompt, keep, propagate: None }; shape.layers])
    }
}
