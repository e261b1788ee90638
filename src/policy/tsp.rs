//! FastKV's token-selective propagation in front of another policy's caches.

use serde::{Deserialize, Serialize};

use super::plan::{Plan, Propagate, Saliency};
use super::{Budget, FastKv, ModelShape, Policy, PolicyError, Settling};

/// Layers up to the TSP layer read the whole prompt, deeper ones the tokens that it picks; each keeps
/// what another policy keeps of the tokens it reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Tsp {
    /// How tokens are scored that go on.
    pub saliency: Saliency,
    /// Tokens that go on past the TSP layer: T, or the TSP rate ρ.
    pub propagation: Budget,
    /// As [`FastKv::tsp_layer`](field@FastKv::tsp_layer).
    pub tsp_layer: Option<usize>,
    /// As [`FastKv::settling`].
    #[serde(default)]
    pub settling: Option<Settling>,
    /// The policy of the caches. Behind the TSP layer its rate r becomes r/ρ of fewer tokens, as
    /// FastKV's does.
    pub cache: Box<Policy>,
}

impl Tsp {
    /// FastKV's propagation and this policy's caches.
    pub fn with(cache: Policy) -> Self {
        let FastKv { saliency, propagation, tsp_layer, settling, .. } = FastKv::default();
        Self { saliency, propagation, tsp_layer, settling, cache: Box::new(cache) }
    }

    pub(super) fn plan(&self, shape: ModelShape, prompt: usize) -> Result<Plan, PolicyError> {
        if matches!(
            *self.cache,
            Policy::Full
                | Policy::FastKv(_)
                | Policy::GemFilter(_)
                | Policy::PyramidInfer(_)
                | Policy::Tsp(_)
        ) {
            return Err(PolicyError::Composition(self.cache.name()));
        }
        let Self { saliency, propagation, tsp_layer, settling, .. } = *self;
        saliency.check()?;
        let fastkv = FastKv { saliency, propagation, tsp_layer, settling, ..FastKv::default() };
        let last = fastkv.tsp_layer(shape)?;
        let propagated = fastkv.propagated(prompt)?;
        let mut plan = self.cache.plan(shape, prompt)?;
        let late = self.late().plan(shape, propagated)?.layers;
        let early = plan.layers;
        let rules = |tsp_layer: usize| {
            if propagated == prompt || tsp_layer + 1 == shape.layers {
                return early.clone();
            }
            let mut layers = [&early[..=tsp_layer], &late[tsp_layer + 1..]].concat();
            layers[tsp_layer].propagate = Some(Propagate::Top { count: propagated, saliency });
            layers
        };
        (plan.layers, plan.candidates) = match settling {
            Some(settling) => settling.plan(shape, last, rules)?,
            None => (rules(last), None),
        };
        Ok(plan)
    }

    /// The policy of the caches behind the TSP layer.
    fn late(&self) -> Policy {
        let mut cache = (*self.cache).clone();
        if let (Some(Budget::Rate(rate)), Budget::Rate(propagation)) =
            (cache.retention_mut(), self.propagation)
        {
            *rate = (*rate / propagation).min(1.0);
        }
        cache
    }
}

impl Policy {
    /// The budget of the policy's caches, where it has one.
    fn retention_mut(&mut self) -> Option<&mut Budget> {
        match self {
            Self::SnapKv(options) => Some(&mut options.retention),
            Self::PyramidKv(options) => Some(&mut options.retention),
            Self::AdaKv(options) => Some(&mut options.retention),
            Self::HeadKv(options) => Some(&mut options.retention),
            Self::H2o(options) => Some(&mut options.retention),
            Self::StreamingLlm(options) => Some(&mut options.retention),
            Self::Random(options) => Some(&mut options.retention),
            _ => None,
        }
    }
}
