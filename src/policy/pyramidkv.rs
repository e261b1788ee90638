//! PyramidKV (arXiv 2406.02069), one set for each kv head.

use serde::{Deserialize, Serialize};

use super::plan::{Keep, LayerPlan, Pooling, PoolingKind, Saliency};
use super::{Budget, DEFAULT_RETENTION, ModelShape, PolicyError, check_share};

/// PyramidKV's options.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PyramidKv {
    /// How tokens are scored.
    pub saliency: Saliency,
    /// Tokens a layer keeps of the prompt for a kv head, on average over the layers.
    pub retention: Budget,
    /// β: the last layer keeps 1/β of the average, its window aside.
    pub steepness: f64,
}

impl Default for PyramidKv {
    fn default() -> Self {
        Self {
            saliency: Saliency { window: 32, pooling: Pooling { kind: PoolingKind::Max, kernel: 7 } },
            retention: Budget::Rate(DEFAULT_RETENTION),
            steepness: 20.0,
        }
    }
}

impl PyramidKv {
    pub(super) fn layers(&self, shape: ModelShape, prompt: usize) -> Result<Vec<LayerPlan>, PolicyError> {
        self.saliency.check()?;
        let steepness = self.steepness;
        check_share(
            "steepness",
            steepness,
            (1.0..=1e6).contains(&steepness),
            "a number from 1 to a million",
        )?;
        let window = self.saliency.window;
        let count = self.retention.tokens("retention", prompt, window, "the observation window")?;
        let counts = if prompt <= count {
            vec![prompt; shape.layers]
        } else {
            self.falling(shape.layers, prompt, count - window).map(|budget| window + budget).collect()
        };
        let keep = |count| match prompt <= count {
            true => Keep::All,
            false => Keep::Top { count, saliency: self.saliency },
        };
        Ok(counts
            .into_iter()
            .map(|count| LayerPlan { rows: prompt, keep: keep(count), propagate: None })
            .collect())
    }

    /// Budgets beside the window, the first layer first: a straight line around `mean`.
    fn falling(&self, layers: usize, prompt: usize, mean: usize) -> impl Iterator<Item = usize> {
        let room = prompt - self.saliency.window;
        let mut last = (mean as f64 / self.steepness).floor();
        let mut first = 2.0 * mean as f64 - last;
        if first >= room as f64 {
            first = room as f64;
            last = 2.0 * mean as f64 - first;
        }
        if layers == 1 || prompt / 2 < mean {
            (first, last) = (mean as f64, mean as f64);
        }
        let step = move |layer: usize| layer as f64 * (first - last) / (layers - 1).max(1) as f64;
        (0..layers).map(move |layer| (first - step(layer)).round() as usize)
    }
}
