//! The TSP layer picked during prefill, where the sets of tokens that would go on settle.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::plan::{LayerPlan, Plan, Propagate};
use super::{ModelShape, PolicyError, check_share};

/// Picks the TSP layer during prefill: from the second candidate on, the first layer that would hand on
/// almost the tokens that the layer before it would.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Settling {
    /// The first candidate, 0-based, which is only compared with. `None`: at a quarter of the depth;
    /// sets of shallower layers hardly depend on what is asked.
    pub first: Option<usize>,
    /// The share of the tokens chosen beside the window that two candidates in a row have to have in
    /// common. By chance it is about the TSP rate.
    pub overlap: f64,
}

impl Default for Settling {
    fn default() -> Self {
        Self { first: None, overlap: 0.8 }
    }
}

impl Settling {
    /// The last candidate where none is given: at 13/16 of the depth, layer 25 of 32, where even hard
    /// retrieval has settled.
    pub(super) fn default_last(layers: usize) -> usize {
        (layers * 13 / 16).saturating_sub(1)
    }

    /// The rules for a TSP layer at the last candidate, and what holds if an earlier one is picked;
    /// `rules` has the plan for each.
    pub(super) fn plan(
        &self,
        shape: ModelShape,
        last: usize,
        rules: impl Fn(usize) -> Vec<LayerPlan>,
    ) -> Result<(Vec<LayerPlan>, Option<Candidates>), PolicyError> {
        let Self { first, overlap } = *self;
        let first = first.unwrap_or((shape.layers / 4).min(last));
        if first > last {
            return Err(PolicyError::Candidates { first, last });
        }
        check_share("the overlap", overlap, (0.0..=1.0).contains(&overlap), "a share from 0 to 1")?;
        // A layer behind the TSP layer does the same wherever that is.
        let mut earliest = rules(first);
        let candidates = earliest[first].propagate.map(|propagate| {
            let late = earliest.drain(first + 1..=last).collect();
            Candidates { first, last, overlap, propagate, late }
        });
        Ok((rules(last), candidates))
    }
}

/// Layers that may become the TSP layer. Each chooses what would go on; tokens go on from the first whose
/// choice has enough in common with that of the candidate before it, or from the last candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Candidates {
    /// The first candidate, 0-based, which is only compared with.
    pub first: usize,
    /// The last one.
    pub last: usize,
    /// The share of the tokens chosen beside the newest that two candidates in a row have to have in common.
    pub overlap: f64,
    /// What every candidate but the last would hand on.
    pub propagate: Propagate,
    /// Rules of the layers behind the first candidate, up to the last one, where they come behind the TSP
    /// layer.
    pub late: Vec<LayerPlan>,
}

impl Candidates {
    /// The rules of a layer that comes behind the TSP layer at `settled`, where they are not the plan's.
    pub(super) fn late(&self, layer: usize, settled: usize) -> Option<&LayerPlan> {
        let behind = settled < layer && layer <= self.last;
        let index = layer.checked_sub(self.first)?.checked_sub(1)?;
        self.late.get(index).filter(|_| behind)
    }
}

impl Plan {
    /// The rules of a layer, given the TSP layer where that is picked during prefill and has been.
    pub fn rules(&self, layer: usize, settled: Option<usize>) -> Cow<'_, LayerPlan> {
        let rules = &self.layers[layer];
        let Some(candidates) = &self.candidates else { return Cow::Borrowed(rules) };
        let chooses = match settled {
            Some(settled) => layer == settled,
            None => layer >= candidates.first,
        };
        match settled.and_then(|settled| candidates.late(layer, settled)) {
            Some(late) => Cow::Borrowed(late),
            None if chooses && layer < candidates.last => {
                Cow::Owned(LayerPlan { propagate: Some(candidates.propagate), ..rules.clone() })
            }
            None => Cow::Borrowed(rules),
        }
    }
}
