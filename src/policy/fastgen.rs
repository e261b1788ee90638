//! FastGen (arXiv 2310.01801): each head gets the cheapest set of tokens that recovers its attention.

use serde::{Deserialize, Serialize};

use super::plan::{Keep, LayerPlan, TokenClasses};
use super::{ModelShape, PolicyError, check_share};

/// FastGen's options.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FastGen {
    /// The share of a head's attention that its set has to recover.
    pub recovery: f64,
    /// The share of tokens, the newest, that are local.
    pub local: f64,
    /// The share of tokens, the most attended, that are frequent.
    pub frequent: f64,
    /// Special tokens and punctuation of the tokenizer.
    pub classes: TokenClasses,
}

impl Default for FastGen {
    fn default() -> Self {
        Self { recovery: 0.95, local: 0.3, frequent: 0.3, classes: TokenClasses::default() }
    }
}

impl FastGen {
    pub(super) fn layers(&self, shape: ModelShape, prompt: usize) -> Result<Vec<LayerPlan>, PolicyError> {
        let Self { recovery, local, frequent, .. } = *self;
        let shares = [("recovery", recovery), ("local", local), ("frequent", frequent)];
        for (option, value) in shares {
            check_share(option, value, (0.0..=1.0).contains(&value), "a share from 0 to 1")?;
        }
        let keep = Keep::Recovered { recovery, local, frequent };
        Ok(vec![LayerPlan { rows: prompt, keep, propagate: None }; shape.layers])
    }
}
