//! Whether a plan can be followed.

use std::borrow::Cow;
use std::ops::Range;

use super::EngineError;
use crate::policy::{Candidates, Keep, ModelShape, Plan, Propagate, Restart, Saliency};

/// The plan is for this model and prompt, and its numbers fit together.
pub(super) fn check_plan(plan: &Plan, model: ModelShape, tokens: usize) -> Result<(), EngineError> {
    if plan.shape != model || plan.prompt_tokens != tokens || plan.layers.len() != model.layers {
        let plan_tokens = plan.prompt_tokens;
        return Err(EngineError::WrongPlan { plan: plan.shape, plan_tokens, model, tokens });
    }
    if let Some(steering) = &plan.steering {
        plan.check_steering(steering)?;
    }
    let mut rows = tokens;
    if let Some(Restart { layer, count, pooling }) = plan.restart {
        let broken = |problem: String| EngineError::BrokenPlan { layer, problem };
        if layer >= model.layers {
            return Err(broken(format!("is to pick tokens, but the last is {}", model.layers - 1)));
        }
        if count == 0 || count > tokens {
            return Err(broken(format!("picks {count} of {tokens} tokens")));
        }
        pooling.check().map_err(|error| broken(format!("cannot rank: {error}")))?;
        rows = count;
    }
    let settled = check_candidates(plan)?.map(Some).chain([None]);
    for settled in settled {
        check_layers(plan, settled, rows)?;
    }
    Ok(())
}

/// The layers that tokens may go on from before the last candidate.
fn check_candidates(plan: &Plan) -> Result<Range<usize>, EngineError> {
    let Some(Candidates { first, last, overlap, late, .. }) = &plan.candidates else { return Ok(0..0) };
    let (first, last) = (*first, *last);
    let broken = |problem: String| EngineError::BrokenPlan { layer: first, problem };
    if first > last || last >= plan.layers.len() || late.len() != last - first {
        let known = late.len();
        return Err(broken(format!(
            "is the first candidate for the TSP layer and {last} the last, with {known} rules for those between"
        )));
    }
    if !(0.0..=1.0).contains(overlap) {
        return Err(broken(format!("settles at an overlap of {overlap}, no share from 0 to 1")));
    }
    if plan.restart.is_some() || plan.layers[..last].iter().any(|layer| layer.propagate.is_some()) {
        return Err(broken(format!(
            "is a candidate for the TSP layer, but not all tokens reach layer {last}"
        )));
    }
    Ok(first..last)
}

/// Every layer can be followed, with the TSP layer where it is told.
fn check_layers(plan: &Plan, settled: Option<usize>, mut rows: usize) -> Result<(), EngineError> {
    let model = plan.shape;
    for layer in 0..plan.layers.len() {
        // Without a TSP layer so far, what candidates choose goes no further.
        let rules = match settled {
            Some(_) => plan.rules(layer, settled),
            None => Cow::Borrowed(&plan.layers[layer]),
        };
        let broken = |problem: String| EngineError::BrokenPlan { layer, problem };
        if rules.rows != rows {
            return Err(broken(format!("reads {} tokens, but {rows} reach it", rules.rows)));
        }
        check_keep(&rules.keep, model, rows).map_err(broken)?;
        if let Some(propagate) = rules.propagate {
            let (count, reserved) = (propagate.count(), propagate.reserved());
            if let Propagate::Top { saliency, .. } = propagate {
                saliency.check().map_err(|error| broken(format!("cannot score: {error}")))?;
            }
            if reserved == 0 || !(reserved..=rows).contains(&count) {
                return Err(broken(format!(
                    "hands on {count} of {rows} tokens, of which {reserved} are the newest"
                )));
            }
            rows = count;
        }
    }
    Ok(())
}

/// A rule can be followed in a layer of this many rows; else what is wrong with it.
fn check_keep(keep: &Keep, model: ModelShape, rows: usize) -> Result<(), String> {
    let fits = |count: usize, window: usize| match count {
        count if count > rows => Err(format!("keeps {count} of {rows} tokens")),
        count if count < window => Err(format!("keeps {count} tokens, fewer than the window's {window}")),
        _ => Ok(()),
    };
    let scored = |saliency: &Saliency| saliency.check().map_err(|error| format!("cannot score: {error}"));
    match keep {
        Keep::All => Ok(()),
        Keep::Ends { sinks, recent } => fits(sinks.saturating_add(*recent), 0),
        Keep::Random { count, window, .. } => fits(*count, *window),
        // Its budget may exceed the prompt, for the tokens to come.
        Keep::Heavy { count, window } if *window == 0 || count < window => {
            Err(format!("keeps {count} tokens, fewer than its window of {window}, or none in it"))
        }
        Keep::Heavy { .. } => Ok(()),
        Keep::Recovered { recovery, local, frequent } => {
            let share = |value: &f64| (0.0..=1.0).contains(value);
            match [recovery, local, frequent].into_iter().find(|value| !share(value)) {
                Some(value) => Err(format!("recovers by {value}, no share from 0 to 1")),
                None => Ok(()),
            }
        }
        Keep::Top { count, saliency } => scored(saliency).and_then(|()| fits(*count, saliency.window)),
        Keep::Each { counts, saliency } => {
            scored(saliency)?;
            if counts.len() != model.kv_heads {
                return Err(format!("has {} budgets for {} kv heads", counts.len(), model.kv_heads));
            }
            counts.iter().try_for_each(|count| fits(*count, saliency.window))
        }
        Keep::Shared { count, floor, saliency } => {
            scored(saliency)?;
            if !(0.0..=1.0).contains(floor) {
                return Err(format!("gives every head {floor} of the mean, no share from 0 to 1"));
            }
            fits(*count, saliency.window)
        }
    }
}
