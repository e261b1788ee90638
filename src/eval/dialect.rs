//! The sentences a small model knows: `dialect.json` in its directory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::NeedleTask;
use crate::messages::count;
use crate::random::SplitMix64;

/// Words and sentence templates, where `{word kind}` stands for any word of that kind. Words are
/// separated by one blank, punctuation included.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Dialect {
    /// The word that ends an answer.
    pub answer_end: String,
    pub(super) needle: Needle,
    tasks: BTreeMap<String, NeedleTask>,
    filler: Vec<Filler>,
    words: BTreeMap<String, Vec<String>>,
}

/// How a fact is stated and asked for.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct Needle {
    /// Has the slots `{adjective}`, `{animal}` and `{value}`.
    pub(super) sentence: String,
    /// Has the slots `{adjective}` and `{animal}`.
    pub(super) question: String,
    pub(super) numbers_per_value: usize,
}

/// Sentences that say nothing of interest.
#[derive(Clone, Debug, PartialEq, Deserialize)]
struct Filler {
    probability: f64,
    templates: Vec<String>,
}

/// A dialect that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialectError {
    /// The file could not be read.
    #[error("{}: {source} (needle prompts need the model's own sentences)", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is not a dialect.
    #[error("{}: {source}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        source: serde_json::Error,
    },
    /// Templates and words do not fit each other.
    #[error("{}: {problem}", path.display())]
    Inconsistent {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        problem: String,
    },
    /// A task that the dialect does not have.
    #[error("there is no task '{name}': the dialect has {known}")]
    UnknownTask {
        /// The name given.
        name: String,
        /// The names there are.
        known: String,
    },
    /// A prompt too short for its facts and its question.
    #[error(
        "no room in {} for {} and the question: {least} are the least",
        count(*.tokens, "token"), count(*.facts, "fact")
    )]
    TooShort {
        /// Tokens asked for.
        tokens: usize,
        /// Facts asked for.
        facts: usize,
        /// The least that works.
        least: usize,
    },
    /// A prompt that has nothing to ask for.
    #[error("0 facts leave nothing to ask for: give at least 1")]
    NoFacts,
    /// More facts than there are different keys.
    #[error("{facts} facts need as many different keys, but {keys} can be made")]
    TooManyFacts {
        /// Facts asked for.
        facts: usize,
        /// Different keys there are.
        keys: usize,
    },
}

impl DialectError {
    /// The same as told to who gave `tokens`, of which `beside` are no words of the prompt.
    #[must_use]
    pub fn among(self, tokens: usize, beside: usize) -> Self {
        match self {
            Self::TooShort { facts, least, .. } => Self::TooShort { tokens, facts, least: least + beside },
            other => other,
        }
    }
}

impl Dialect {
    /// Reads `dialect.json` of a model directory.
    ///
    /// # Errors
    /// A missing or malformed file, or one whose templates name words that it does not list.
    pub fn from_directory(directory: &Path) -> Result<Self, DialectError> {
        let path = directory.join("dialect.json");
        let text = std::fs::read_to_string(&path)
            .map_err(|source| DialectError::Unreadable { path: path.clone(), source })?;
        let dialect: Self = serde_json::from_str(&text)
            .map_err(|source| DialectError::Malformed { path: path.clone(), source })?;
        match dialect.problem() {
            None => Ok(dialect),
            Some(problem) => Err(DialectError::Inconsistent { path, problem }),
        }
    }

    /// A task by its name.
    ///
    /// # Errors
    /// [`DialectError::UnknownTask`], with the names there are.
    pub fn task(&self, name: &str) -> Result<NeedleTask, DialectError> {
        self.tasks.get(name).copied().ok_or_else(|| DialectError::UnknownTask {
            name: name.to_owned(),
            known: self.tasks.keys().map(String::as_str).collect::<Vec<_>>().join(", "),
        })
    }

    /// The names of all tasks.
    pub fn tasks(&self) -> impl Iterator<Item = &str> {
        self.tasks.keys().map(String::as_str)
    }

    /// Words of a kind that a template may name.
    pub(super) fn words(&self, kind: &str) -> &[String] {
        &self.words[kind]
    }

    /// A sentence that says nothing of interest.
    pub(super) fn filler_sentence(&self, random: &mut SplitMix64) -> String {
        let mut left = random.unit() * self.filler.iter().map(|filler| filler.probability).sum::<f64>();
        let filler = self.filler.iter().find(|filler| {
            left -= filler.probability;
            left < 0.0
        });
        let templates = &filler.unwrap_or(&self.filler[0]).templates;
        let template = &templates[random.below(templates.len())];
        fill(template, |kind| {
            let words = self.words(kind);
            words[random.below(words.len())].clone()
        })
    }

    fn problem(&self) -> Option<String> {
        let of_needle = ["adjective", "animal", "number"].map(String::from);
        let of_filler = self.filler.iter().flat_map(|filler| &filler.templates).flat_map(|t| slots(t));
        for kind in of_filler.chain(of_needle) {
            if self.words.get(&kind).is_none_or(Vec::is_empty) {
                return Some(format!("there are no words for the slot {{{kind}}}"));
            }
        }
        let blank = |text: &str| text.trim().is_empty();
        if let Some((kind, _)) = self.words.iter().find(|(_, words)| words.iter().any(|word| blank(word))) {
            return Some(format!("{{{kind}}} has a word that is blank"));
        }
        let mut templates = self.filler.iter().flat_map(|filler| &filler.templates);
        if let Some(template) = templates.find(|template| blank(template)) {
            return Some(format!("the template {template:?} holds no word"));
        }
        if self.filler.is_empty() || self.filler.iter().any(|filler| filler.probability <= 0.0) {
            return Some("there must be filler, and each kind's probability above 0".to_owned());
        }
        if self.filler.iter().any(|filler| filler.templates.is_empty()) {
            return Some("every kind of filler needs a template".to_owned());
        }
        if self.words["number"].len() < self.needle.numbers_per_value {
            return Some("there are fewer numbers than a value has".to_owned());
        }
        None
    }
}

/// The template with every `{slot}` replaced.
pub(super) fn fill(template: &str, mut word: impl FnMut(&str) -> String) -> String {
    let mut filled = String::new();
    let mut rest = template;
    while let Some((before, slot, after)) = next_slot(rest) {
        filled.push_str(before);
        filled.push_str(&word(slot));
        rest = after;
    }
    filled + rest
}

fn slots(template: &str) -> Vec<String> {
    let mut slots = Vec::new();
    fill(template, |slot| {
        slots.push(slot.to_owned());
        String::new()
    });
    slots
}

fn next_slot(template: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = template.split_once('{')?;
    let (slot, after) = rest.split_once('}')?;
    Some((before, slot, after))
}
