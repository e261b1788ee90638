//! SnapKV (arXiv 2404.14469), one set for each kv head.

use serde::{Deserialize, Serialize};

use super::plan::{Keep, LayerPlan, Pooling, PoolingKind, Saliency};
use super::{Budget, DEFAULT_RETENTION, ModelShape, PolicyError};

/// SnapKV's options. [`Default`] has the authors' window of 32 and max pooling 7.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SnapKv {
    /// How tokens are scored.
    pub saliency: Saliency,
    /// Tokens each layer keeps of the prompt for a kv head.
    pub retention: Budget,
}

impl Default for SnapKv {
    fn default() -> Self {
        Self {
            saliency: Saliency { window: 32, pooling: Pooling { kind: PoolingKind::Max, kernel: 7 } },
            retention: Budget::Rate(DEFAULT_RETENTION),
        }
    }
}

impl SnapKv {
    pub(super) fn layers(&self, shape: ModelShape, prompt: usize) -> Result<Vec<LayerPlan>, PolicyError> {
        self.saliency.check()?;
        let count =
            self.retention.tokens("retention", prompt, self.saliency.window, "the observation window")?;
        let keep = if prompt <= count { Keep::All } else { Keep::Top { count, saliency: self.saliency } };
        Ok(vec![LayerPlan { rows: prompt, keep, propagate: None }; shape.layers])
    }
}
