//! PyramidInfer (arXiv 2405.12532): every layer hands on fewer tokens than it read.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use super::plan::{Keep, LayerPlan, Propagate};
use super::{ModelShape, PolicyError, check_share, share};

/// PyramidInfer's options.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PyramidInfer {
    /// The share of the prompt, its newest tokens, that always goes on and ranks the rest.
    pub recent: f64,
    /// ρ0: what the share of older tokens that go on falls to, from 1 in the first layer.
    pub decay: f64,
}

impl Default for PyramidInfer {
    fn default() -> Self {
        Self { recent: 0.2, decay: 0.7 }
    }
}

/// No fewer older tokens are ranked, and no fewer go on.
const LEAST: usize = 64;

impl PyramidInfer {
    pub(super) fn layers(&self, shape: ModelShape, prompt: usize) -> Result<Vec<LayerPlan>, PolicyError> {
        let Self { recent, decay } = *self;
        check_share("recent", recent, (0.0..=1.0).contains(&recent), "a share from 0 to 1")?;
        check_share("decay", decay, (0.0..=1.0).contains(&decay), "a share from 0 to 1")?;
        let recent = share(prompt, recent).saturating_add(1);
        let mut rows = prompt;
        Ok((0..shape.layers)
            .map(|layer| {
                let falling = ((PI * layer as f64 / shape.layers as f64).cos() + 1.0) / 2.0;
                let older = rows.saturating_sub(recent);
                let kept = share(older, (1.0 - decay) * falling + decay);
                let narrows = older > LEAST && kept > LEAST && kept < older && layer + 1 < shape.layers;
                let propagate = narrows.then_some(Propagate::Recent { count: kept + recent, recent });
                let plan = LayerPlan { rows, keep: Keep::All, propagate };
                rows = propagate.map_or(rows, |propagate| propagate.count());
                plan
            })
            .collect())
    }
}
