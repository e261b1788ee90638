//! FastKV (arXiv 2502.01068).

use serde::{Deserialize, Serialize};

use super::plan::{Keep, LayerPlan, Pooling, PoolingKind, Propagate, Saliency};
use super::settling::{Candidates, Settling};
use super::{Budget, DEFAULT_RETENTION, ModelShape, PolicyError, check_rate, share};

/// FastKV's options. [`Default`] is the latest paper's proportional setting.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct FastKv {
    /// How tokens are scored.
    pub saliency: Saliency,
    /// Tokens each layer keeps of the prompt for a kv head: C, or the retention rate r.
    pub retention: Budget,
    /// Tokens that go on past the TSP layer: T, or the TSP rate ρ.
    pub propagation: Budget,
    /// The last layer that reads the whole prompt, 0-based; `None`: half depth, `layers / 2 − 1`,
    /// the authors' choice for each model they publish. With `settling` the last that may; `None`: at
    /// 13/16 of the depth.
    pub tsp_layer: Option<usize>,
    /// Pick the TSP layer during prefill, no deeper than `tsp_layer`.
    pub settling: Option<Settling>,
}

impl Default for FastKv {
    fn default() -> Self {
        Self::proportional()
    }
}

impl FastKv {
    /// The latest paper: r = 0.1, ρ = 0.2, window 8, max pooling 7.
    pub fn proportional() -> Self {
        Self {
            saliency: Saliency { window: 8, pooling: Pooling { kind: PoolingKind::Max, kernel: 7 } },
            retention: Budget::Rate(DEFAULT_RETENTION),
            propagation: Budget::Rate(0.2),
            tsp_layer: None,
            settling: None,
        }
    }

    /// Versions 1 and 2 of the paper: C = 512, T = 2048, window 8, average pooling 7.
    pub fn constant() -> Self {
        Self {
            saliency: Saliency { window: 8, pooling: Pooling { kind: PoolingKind::Average, kernel: 7 } },
            retention: Budget::Tokens(512),
            propagation: Budget::Tokens(2048),
            tsp_layer: None,
            settling: None,
        }
    }

    pub(super) fn plan(
        &self,
        shape: ModelShape,
        prompt: usize,
    ) -> Result<(Vec<LayerPlan>, Option<Candidates>), PolicyError> {
        self.saliency.check()?;
        let window = self.saliency.window;
        let last = self.tsp_layer(shape)?;
        let early = self.retention.tokens("retention", prompt, window, "the observation window")?;
        let propagated = self.propagated(prompt)?;
        let late = self.late_retention(early, prompt, propagated);
        let rules = |tsp_layer| self.layers(shape, tsp_layer, (prompt, early), (propagated, late));
        match self.settling {
            Some(settling) => settling.plan(shape, last, rules),
            None => Ok((rules(last), None)),
        }
    }

    /// Rules with this TSP layer, given how many tokens layers up to it and behind it read and keep.
    fn layers(
        &self,
        shape: ModelShape,
        tsp_layer: usize,
        early: (usize, usize),
        late: (usize, usize),
    ) -> Vec<LayerPlan> {
        let (propagated, saliency) = (late.0, self.saliency);
        let rules = |layer| {
            let (rows, count) = if layer <= tsp_layer { early } else { late };
            let keep = if rows <= count { Keep::All } else { Keep::Top { count, saliency } };
            let goes_on = layer == tsp_layer && layer + 1 < shape.layers && propagated < rows;
            let propagate = goes_on.then_some(Propagate::Top { count: propagated, saliency });
            LayerPlan { rows, keep, propagate }
        };
        (0..shape.layers).map(rules).collect()
    }

    /// The last layer that reads, or may read, the whole prompt.
    pub(super) fn tsp_layer(&self, shape: ModelShape) -> Result<usize, PolicyError> {
        let last = shape.layers - 1;
        let default = match self.settling {
            Some(_) => Settling::default_last(shape.layers),
            None => (shape.layers / 2).saturating_sub(1),
        };
        match self.tsp_layer.unwrap_or(default) {
            layer if layer > last => Err(PolicyError::TspLayer { layer, last }),
            layer => Ok(layer),
        }
    }

    /// T, between the window and the prompt.
    pub(super) fn propagated(&self, prompt: usize) -> Result<usize, PolicyError> {
        let window = self.saliency.window;
        let tokens = match self.propagation {
            Budget::Rate(rate) => {
                check_rate("propagation", rate)?;
                share(prompt, rate).max(window)
            }
            Budget::Tokens(value) if value < window => {
                return Err(PolicyError::Budget {
                    option: "propagation",
                    value,
                    reserved: window,
                    reason: "the observation window",
                    least: window,
                });
            }
            Budget::Tokens(value) => value,
        };
        Ok(tokens.min(prompt))
    }

    /// Tokens a layer behind the TSP layer keeps of its `propagated` ones. With two rates it is the
    /// rate r/ρ of them, so that every layer ends with about the same; r ≥ ρ keeps all of them.
    fn late_retention(&self, early: usize, prompt: usize, propagated: usize) -> usize {
        match (self.retention, self.propagation) {
            (Budget::Rate(retention), Budget::Rate(propagation)) if propagated < prompt => {
                let rate = retention / propagation;
                if rate >= 1.0 { propagated } else { share(propagated, rate).max(self.saliency.window + 1) }
            }
            _ => early,
        }
    }
}
