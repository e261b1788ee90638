//! GemFilter (arXiv 2409.17422): early layers pick tokens, and the model starts anew with these.

use serde::{Deserialize, Serialize};

use super::plan::{LayerPlan, Pooling, PoolingKind, Restart};
use super::{Budget, DEFAULT_RETENTION, ModelShape, PolicyError};

/// GemFilter's options.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GemFilter {
    /// The layer that ranks tokens, 0-based; `None`: `round(13/32 · layers)`, the authors' choice.
    pub filter_layer: Option<usize>,
    /// Tokens that are read anew, and so the cache of every layer.
    pub retention: Budget,
    /// Pooling of the ranking along the prompt.
    pub pooling: Pooling,
}

impl Default for GemFilter {
    fn default() -> Self {
        Self {
            filter_layer: None,
            retention: Budget::Rate(DEFAULT_RETENTION),
            pooling: Pooling { kind: PoolingKind::Average, kernel: 5 },
        }
    }
}

impl GemFilter {
    pub(super) fn plan(
        &self,
        shape: ModelShape,
        prompt: usize,
    ) -> Result<(Option<Restart>, Vec<LayerPlan>), PolicyError> {
        self.pooling.check()?;
        let last = shape.layers - 1;
        let default = (13.0 / 32.0 * shape.layers as f64).round() as usize;
        let layer = self.filter_layer.unwrap_or(default.min(last));
        if layer > last {
            return Err(PolicyError::FilterLayer { layer, last });
        }
        let count = self.retention.tokens("retention", prompt, 0, "none")?;
        let restart = (count < prompt).then_some(Restart { layer, count, pooling: self.pooling });
        Ok((restart, vec![LayerPlan::full(count.min(prompt)); shape.layers]))
    }
}
