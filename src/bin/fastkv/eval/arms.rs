//! The policies that answer, each with its options and budget.

use anyhow::Result;
use fastkv::model::ModelDir;
use fastkv::policy::{Budget, Policy};
use serde_json::{Value, json};

use super::settings::digest;
use crate::options::{PolicyName, PolicyOptions};

/// A policy under test.
pub(super) struct Arm {
    pub(super) name: String,
    pub(super) policy: Policy,
    /// Its options for people and files: lists as long as the vocabulary are told by their digests.
    pub(super) options: Value,
    /// A rate, or a number of tokens.
    pub(super) retention: Value,
}

/// Every policy, at every budget where it has one.
pub(super) fn arms(
    names: &[PolicyName],
    options: &PolicyOptions,
    budgets: &[Budget],
    model: &ModelDir,
) -> Result<Vec<Arm>> {
    let variants = match budgets {
        [] => vec![options.clone()],
        budgets => budgets.iter().map(|budget| options.with_retention(*budget)).collect(),
    };
    let mut arms: Vec<Arm> = Vec::new();
    let mut completed = Vec::new();
    for options in &variants {
        let mut policies = options.policies(names)?;
        options.complete(&mut policies, model)?;
        completed.push(policies);
    }
    for (index, name) in names.iter().enumerate() {
        for policies in &completed {
            let arm = Arm::new(name.text(), policies[index].clone());
            if !arms.iter().any(|other| other.policy == arm.policy && other.name == arm.name) {
                arms.push(arm);
            }
        }
    }
    Ok(arms)
}

impl Arm {
    fn new(name: String, policy: Policy) -> Self {
        let retention = match policy.retention() {
            None => Value::Null,
            Some(Budget::Rate(rate)) => json!(rate),
            Some(Budget::Tokens(tokens)) => json!(tokens),
        };
        let mut options = serde_json::to_value(&policy).unwrap_or_default();
        shorten(&mut options);
        Self { name, policy, options, retention }
    }

    /// What a record of a file has to say to be this arm's.
    pub(super) fn is(&self, policy: &str, options: &Value) -> bool {
        self.name == policy && self.options == *options
    }

    /// Its row in a table.
    pub(super) fn label(&self, with_budget: bool) -> String {
        match &self.retention {
            retention if with_budget && !retention.is_null() => format!("{} {retention}", self.name),
            _ => self.name.clone(),
        }
    }
}

/// Head scores and classes of tokens by their digests.
fn shorten(options: &mut Value) {
    let Value::Object(fields) = options else { return };
    for (name, value) in fields {
        match name.as_str() {
            "heads" | "classes" => *value = json!(digest(value.to_string().as_bytes())),
            _ => shorten(value),
        }
    }
}
