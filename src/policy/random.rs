//! The control: a seeded uniform choice beside the window.

use serde::{Deserialize, Serialize};

use super::plan::{Keep, LayerPlan};
use super::{Budget, DEFAULT_RETENTION, ModelShape, PolicyError, check_window};

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

/// `count` of `candidates` positions, ascending: those whose hash of (seed, layer, head, position) is
/// smallest, so that a set does not depend on the order in which sets are drawn.
pub(crate) fn positions(
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

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014), one step ahead so that 0 does not map to 0.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
