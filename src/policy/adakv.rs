//! AdaKV (arXiv 2407.11550): the heads of a layer share its budget.

use serde::{Deserialize, Serialize};

use super::plan::{Keep, LayerPlan, Pooling, PoolingKind, Saliency};
use super::{Budget, DEFAULT_RETENTION, ModelShape, PolicyError, check_share};

/// AdaKV's options.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdaKv {
    /// How tokens are scored.
    pub saliency: Saliency,
    /// Tokens each layer keeps of the prompt for a kv head, on average over its heads.
    pub retention: Budget,
    /// α: the share of the average that every head gets whatever its scores.
    pub floor: f64,
}

impl Default for AdaKv {
    fn default() -> Self {
        Self {
            saliency: Saliency { window: 32, pooling: Pooling { kind: PoolingKind::Max, kernel: 7 } },
            retention: Budget::Rate(DEFAULT_RETENTION),
            floor: 0.2,
        }
    }
}

impl AdaKv {
    pub(super) fn layers(&self, shape: ModelShape, prompt: usize) -> Result<Vec<LayerPlan>, PolicyError> {
        let Self { saliency, retention, floor } = *self;
        saliency.check()?;
        check_share("floor", floor, (0.0..=1.0).contains(&floor), "a share from 0 to 1")?;
        let count = retention.tokens("retention", prompt, saliency.window, "the observation window")?;
        let keep = if prompt <= count { Keep::All } else { Keep::Shared { count, floor, saliency } };
        Ok(vec![LayerPlan { rows: prompt, keep, propagate: None }; shape.layers])
    }
}
