//! The control: a seeded uniform choice beside the window.

use serde::{Deserialize, Serialize};

use super::plan::{Keep, LayerPlan};
use super::{Budget, DEFAULT_RETENTION, ModelShape, PolicyError, check_window};
use crate::random::mix;

/// Options of the random choice.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Random {
    /// Tokens kept at the end.
    pub window: usize,
    /// Tokens each layer keeps of the prompt for a kv head, the window included.
    pub retention: Budget,
    /// Seed of the choice; every layer and kv head draws its own set.
    pub seed: u64,
}

impl Default for Random {
    fn default() -> Self {
        Self { window: 8, retention: Budget::Rate(DEFAULT_RETENTION), seed: 0 }
    }
}

impl Random {
    pub(super) fn layers(&self, shape: ModelShape, prompt: usize) -> Result<Vec<LayerPlan>, PolicyError> {
        check_window(self.window)?;
        let count = self.retention.tokens("retention", prompt, self.window, "the window")?;
        let keep = if prompt <= count {
            Keep::All
        } else {
            Keep::Random { count, window: self.window, seed: self.seed }
        };
        Ok(vec![LayerPlan { rows: prompt, keep, propagate: None }; shape.layers])
    }
}

/// What [`Keep::Random`] keeps before the window: `count` of `candidates` positions, ascending. They are
/// those whose hash of (seed, layer, head, position) is smallest, so that a set does not depend on the
/// order in which sets are drawn.
pub fn random_positions(
    candidates: usize,
    count: usize,
    seed: u64,
    layer: usize,
    kv_head: usize,
) -> Vec<u32> {
    let stream = mix(mix(seed ^ mix(layer as u64)) ^ mix(!(kv_head as u64)));
    let mut order: Vec<u32> = (0..candidates as u32).collect();
    let count = count.min(candidates);
    if count < candidates {
        order.select_nth_unstable_by_key(count, |&position| (mix(stream ^ u64::from(position)), position));
        order.truncate(count);
        order.sort_unstable();
    }
    order
}
