//! Tiny random models whose heads are of sizes that kernels have: on a device they say what the transformers library
//! says, in `expected.json` beside them.

use std::fmt::Debug;
use std::path::Path;

use fastkv::engine::{Control, Engine, EngineError, PrefillOptions};
use fastkv::kernels::{DType, MatrixProduct};
use fastkv::model::ModelDir;
use fastkv::policy::Policy;
use serde_json::Value;

use super::backend::{TYPES, activations_error, cuda, near};
use super::{Check, oracle};

pub(crate) fn checks<D: MatrixProduct + Clone + Debug>() -> Vec<Check<D>> {
    vec![Check::hopper("fixtures_answer_as_transformers_does", |device, seed| {
        let at = seed as usize % 2;
        let ((dtype, _, unit), name) = (TYPES[at], ["bf16-d64", "f16-d128"][at]);
        conforms(device, name, dtype, activations_error(unit)).map_err(|error| format!("{name}: {error}"))
    })]
}

/// Logits behind every prompt, and each token of the answer is the best one behind those before it, or as good as that.
fn conforms<D: MatrixProduct + Clone + Debug>(
    device: &D,
    name: &str,
    dtype: DType,
    allowed: f64,
) -> Result<(), String> {
    let directory = Path::new("tests/fixtures/models").join(name);
    let model = ModelDir::open(&directory).map_err(|error| error.to_string())?;
    let expected = oracle::checkpoint::json(&directory.join("expected.json"));
    let error = |error: EngineError| error.to_string();
    let engine = Engine::load(cuda(device, dtype)?, &model).map_err(error)?;
    let control = Control::default();
    for prompt in list(&expected["prompts"]) {
        let ids = tokens(&prompt["ids"]);
        // Positions stand in order, and the last of them is the prompt's.
        let last = list(list(&prompt["logits"]).last().ok_or("no logits")?);
        let last: Vec<f32> = last.iter().map(|logit| logit.as_f64().expect("a logit") as f32).collect();
        let plan = Policy::Full.plan(engine.shape(), ids.len()).map_err(|error| error.to_string())?;
        let options = PrefillOptions { slack: 4, ..PrefillOptions::default() };
        let mut prefill = engine.prefill(&ids, &plan, &options, &control).map_err(error)?;
        near("logits", &prefill.logits, &last, allowed)?;
        let mut logits = prefill.logits;
        for (step, token) in tokens(&prompt["greedy"]).into_iter().enumerate() {
            let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let largest = logits.iter().fold(0.0, |most: f32, logit| most.max(logit.abs()));
            let behind = f64::from((best - logits[token as usize]) / largest);
            if logits.iter().any(|logit| !logit.is_finite()) || behind > 2.0 * allowed {
                return Err(format!(
                    "step {step}: {token} is behind the best by {behind} of the largest logit"
                ));
            }
            logits = engine.append(&mut prefill.cache, &[token], &control).map_err(error)?;
        }
    }
    Ok(())
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

fn tokens(value: &Value) -> Vec<u32> {
    list(value).iter().map(|id| id.as_u64().expect("a token") as u32).collect()
}
