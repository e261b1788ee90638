//! Attention steering: PASTA (arXiv 2311.02262).

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::plan::{Keep, LayerPlan, Plan, Propagate, SINKS};
use super::{PolicyError, check_share};
use crate::messages::count;

/// Chosen heads look less at tokens of the prompt outside the highlighted spans: `log α` is added to
/// their logits, in prefill and in decoding. Generated tokens are left alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Steering {
    /// Positions of the prompt that are highlighted; several spans form a union.
    pub spans: Vec<Range<usize>>,
    /// Steered heads: layer and query head, 0-based.
    pub heads: Vec<(usize, usize)>,
    /// What is left of the attention weight of other tokens before it is normalised again, above 0.
    pub alpha: f64,
}

/// The authors' α.
pub const DEFAULT_ALPHA: f64 = 0.01;

impl Steering {
    /// Highlighted positions below `end`, ascending, each once.
    pub fn positions(&self, end: usize) -> Vec<u32> {
        let mut positions: Vec<u32> = self
            .spans
            .iter()
            .flat_map(|span| span.start..span.end.min(end))
            .map(|position| position as u32)
            .collect();
        positions.sort_unstable();
        positions.dedup();
        positions
    }
}

impl Plan {
    /// The plan with steered heads. Caches keep as many tokens more as are highlighted, which come first. Budgets
    /// of what later layers read grow where the highlighted tokens would not fit.
    ///
    /// # Errors
    /// Spans that are empty or not in the prompt, heads that the model does not have or none, α outside
    /// (0, 1].
    pub fn steer(mut self, steering: Steering) -> Result<Self, PolicyError> {
        self.check_steering(&steering)?;
        let highlighted = steering.positions(self.prompt_tokens).len();
        let mut rows = self.prompt_tokens;
        if let Some(restart) = &mut self.restart {
            restart.count = restart.count.max(highlighted);
            rows = restart.count;
        }
        let make_room = |propagate: &mut Propagate, rows: usize| {
            // The first tokens are as sure as what is highlighted there, and the earlier of the two win.
            let sinks = if matches!(propagate, Propagate::Recent { .. }) { SINKS } else { 0 };
            let least = (propagate.reserved() + sinks + highlighted).min(rows);
            *propagate.count_mut() = propagate.count().max(least);
            propagate.count()
        };
        let steer = |layers: &mut [LayerPlan], mut rows: usize| {
            for layer in layers {
                layer.rows = rows;
                let grow = |count: &mut usize| *count = (*count + highlighted).min(rows);
                match &mut layer.keep {
                    Keep::Top { count, .. } | Keep::Shared { count, .. } => grow(count),
                    Keep::Each { counts, .. } => counts.iter_mut().for_each(grow),
                    // Tokens to come count too.
                    Keep::Heavy { count, .. } => *count = count.saturating_add(highlighted),
                    // What is named by place or by class has no budget to grow.
                    Keep::All | Keep::Ends { .. } | Keep::Random { .. } | Keep::Recovered { .. } => {}
                }
                if let Some(propagate) = &mut layer.propagate {
                    rows = make_room(propagate, rows);
                }
            }
        };
        steer(&mut self.layers, rows);
        if let Some(candidates) = &mut self.candidates {
            let handed_on = make_room(&mut candidates.propagate, rows);
            steer(&mut candidates.late, handed_on);
        }
        self.steering = Some(steering);
        Ok(self)
    }

    /// Highlighted positions of the prompt, ascending.
    pub fn highlighted(&self) -> Vec<u32> {
        self.steering.as_ref().map_or_else(Vec::new, |steering| steering.positions(self.prompt_tokens))
    }

    pub(crate) fn check_steering(&self, steering: &Steering) -> Result<(), PolicyError> {
        let Steering { spans, heads, alpha } = steering;
        check_share("alpha", *alpha, *alpha > 0.0 && *alpha <= 1.0, "a number above 0 and at most 1")?;
        let tokens = self.prompt_tokens;
        if let Some(span) = spans.iter().find(|span| span.is_empty() || span.end > tokens) {
            return Err(PolicyError::Span { start: span.start, end: span.end, tokens });
        }
        if spans.is_empty() || heads.is_empty() {
            return Err(PolicyError::NothingToSteer);
        }
        let (layers, query_heads) = (self.shape.layers, self.shape.query_heads);
        match heads.iter().find(|(layer, head)| *layer >= layers || *head >= query_heads) {
            Some(&(layer, head)) => Err(PolicyError::Head { layer, head, layers, query_heads }),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Steering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spans: Vec<String> =
            self.spans.iter().map(|span| format!("{}..{}", span.start, span.end)).collect();
        write!(
            f,
            "{} steered to tokens {} (α {})",
            count(self.heads.len(), "head"),
            spans.join(", "),
            self.alpha
        )
    }
}
