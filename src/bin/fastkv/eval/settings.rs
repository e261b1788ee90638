//! What has to agree for answers to go into one file.

use std::path::PathBuf;

use anyhow::{Context, Result};
use fastkv::eval::TASKS_VERSION;
use fastkv::model::ModelDir;
use serde_json::{Map, Value, json};

use super::Arguments;
use super::arms::Arm;
use crate::exam::{Exam, Material};

impl Arguments {
    /// What has to agree for answers to go into one file.
    pub(super) fn settings(
        &self,
        model: &ModelDir,
        exams: &[Exam],
        lengths: &[usize],
        material: &Material,
        arms: &[Arm],
        chat: bool,
    ) -> Result<Map<String, Value>> {
        let file = |path: &PathBuf| -> Result<Value> {
            Ok(json!(digest(&std::fs::read(path).with_context(|| path.display().to_string())?)))
        };
        let policies = arms.iter().map(|arm| json!({ "policy": arm.name, "options": arm.options }));
        let settings = [
            ("model", json!(fingerprint(model)?)),
            ("tasks", json!(exams.iter().map(|exam| exam.name.as_str()).collect::<Vec<_>>())),
            ("tasks_version", json!(TASKS_VERSION)),
            ("task_files", self.task_file.iter().map(file).collect::<Result<_>>()?),
            ("lengths", json!(lengths)),
            ("samples", json!(self.samples(material.dialect.is_some()))),
            ("depths", json!(exams.iter().any(Exam::has_depths).then_some(&material.depths))),
            ("prompt_seed", json!(self.prompt_seed)),
            ("haystack", self.haystack.as_ref().map(file).transpose()?.unwrap_or(json!("own"))),
            ("query_agnostic", json!(self.query_agnostic)),
            ("chat", json!(chat)),
            ("exact_shortcuts", json!(self.policy_options.exact_shortcuts())),
            ("policies", policies.collect()),
        ];
        Ok(settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }
}

/// What tells a model from others: its configuration, tokenizer and dialect, and of its weights the size and
/// the last norm.
fn fingerprint(model: &ModelDir) -> Result<String> {
    let mut bytes = model.weights.total_bytes().to_le_bytes().to_vec();
    bytes.extend(model.weights.norm.bytes());
    for name in ["config.json", "tokenizer.json", "dialect.json"] {
        match std::fs::read(model.path.join(name)) {
            Ok(text) => bytes.extend(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| name.to_owned()),
        }
    }
    Ok(digest(&bytes))
}

/// FNV-1a, 64 bits, in hexadecimal.
pub(super) fn digest(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}
