//! H2O (arXiv 2306.14048): heavy hitters of all attention, in prefill and in decoding.

use serde::{Deserialize, Serialize};

use super::plan::{Keep, LayerPlan};
use super::{Budget, DEFAULT_RETENTION, ModelShape, PolicyError, check_window};

/// H2O's options.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct H2o {
    /// The newest tokens, which are kept in any case.
    pub window: usize,
    /// Tokens each layer keeps for a kv head, the window included, in prefill and in decoding.
    pub retention: Budget,
}

impl Default for H2o {
    fn default() -> Self {
        Self { window: 32, retention: Budget::Rate(DEFAULT_RETENTION) }
    }
}

impl H2o {
    pub(super) fn layers(&self, shape: ModelShape, prompt: usize) -> Result<Vec<LayerPlan>, PolicyError> {
        check_window(self.window)?;
        let count = self.retention.tokens("retention", prompt, self.window, "the window")?;
        // A prompt within the budget stays whole, and the rule goes on in decoding.
        let keep = Keep::Heavy { count, window: self.window };
        Ok(vec![LayerPlan { rows: prompt, keep, propagate: None }; shape.layers])
    }
}
