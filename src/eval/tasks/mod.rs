//! Tasks for any tokenizer and any length. Structure and counts are those of RULER (arXiv 2404.06654),
//! Landmark's passkey (arXiv 2305.16300), Kamradt's needle test and MInference's key-value retrieval;
//! words, wording and random stream are this crate's own.
//!
//! A prompt is a pure function of task, units, seed and depth. Units are what a haystack is made of:
//! sentences, needles, words, pairs.

mod common;
mod depth;
mod frequent;
mod needles;
mod pairs;
mod passkey;
mod sizing;
mod tracking;

pub use needles::Needles;
pub use sizing::{Measure, Size};

use std::ops::Range;

use super::{EvalError, Prose, Question, Scoring};
use crate::random::{SplitMix64, mix};

/// A generated task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Needles with keys and values; see [`Needles`].
    Needle(Needles),
    /// Which names hold a value, by a chain of four assignments.
    VariableTracking,
    /// The ten words that stand most often in a list.
    CommonWords,
    /// The three most frequent coded words, counts falling with the square of the rank.
    FrequentWords,
    /// A number in noise.
    Passkey,
    /// The value of a key in a JSON object of random pairs.
    KeyValue,
    /// A needle at given depths of prose.
    DepthMap,
}

/// How the prompts of a version of the crate differ from another's: changes whenever a prompt does.
pub const TASKS_VERSION: u32 = 1;

impl Task {
    /// Every task.
    pub const ALL: [Self; 14] = [
        Self::Needle(Needles::SINGLE_1),
        Self::Needle(Needles::SINGLE_2),
        Self::Needle(Needles::SINGLE_3),
        Self::Needle(Needles::MULTIKEY_1),
        Self::Needle(Needles::MULTIKEY_2),
        Self::Needle(Needles::MULTIKEY_3),
        Self::Needle(Needles::MULTIVALUE),
        Self::Needle(Needles::MULTIQUERY),
        Self::VariableTracking,
        Self::CommonWords,
        Self::FrequentWords,
        Self::Passkey,
        Self::KeyValue,
        Self::DepthMap,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Needle(needles) => needles.name,
            Self::VariableTracking => "variable_tracking",
            Self::CommonWords => "common_words",
            Self::FrequentWords => "frequent_words",
            Self::Passkey => "passkey",
            Self::KeyValue => "key_value",
            Self::DepthMap => "depth_map",
        }
    }

    /// The task of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.name() == name)
    }

    /// Tokens that an answer may take.
    pub fn answer_tokens(self) -> usize {
        match self {
            Self::Needle(_) | Self::KeyValue => 128,
            Self::VariableTracking => 30,
            Self::CommonWords => 120,
            Self::FrequentWords => 50,
            Self::Passkey | Self::DepthMap => 16,
        }
    }

    /// Whether [`Self::question`] goes by its depth.
    pub fn has_depths(self) -> bool {
        self == Self::DepthMap
    }

    /// Whether one place says the answer: then [`Question::needle`] is it.
    pub fn has_needle(self) -> bool {
        match self {
            Self::Needle(needles) => needles.values_asked() == 1,
            Self::KeyValue | Self::DepthMap => true,
            // The pass key is said twice.
            Self::VariableTracking | Self::CommonWords | Self::FrequentWords | Self::Passkey => false,
        }
    }

    /// The prompt of so many units and a seed. `length` is the number of tokens it is meant for, which
    /// some counts follow.
    ///
    /// # Errors
    /// More units than there are different words.
    pub fn question(
        self,
        prose: &Prose,
        length: usize,
        units: usize,
        seed: u64,
        depth: f64,
    ) -> Result<Question, EvalError> {
        // Tasks do not share their streams.
        let salt = self.name().bytes().fold(0, |salt, byte| mix(salt ^ u64::from(byte)));
        let random = &mut SplitMix64::new(mix(seed) ^ salt);
        let mut question = match self {
            Self::Needle(needles) => needles.question(prose, units, random)?,
            Self::VariableTracking => tracking::question(units, random),
            Self::CommonWords => common::question(length, units, random)?,
            Self::FrequentWords => frequent::question(length, units, random),
            Self::Passkey => passkey::question(units, random),
            Self::KeyValue => pairs::question(units, random),
            Self::DepthMap => depth::question(prose, units, depth, random)?,
        };
        question.answer_tokens = self.answer_tokens();
        Ok(question)
    }

    /// The fewest units a prompt can have, and the most.
    fn units(self) -> (usize, usize) {
        match self {
            Self::Needle(needles) => needles.units(),
            Self::VariableTracking => (tracking::LINES, usize::MAX),
            Self::CommonWords => (1, common::most()),
            Self::FrequentWords => (frequent::FEWEST, usize::MAX),
            Self::Passkey | Self::KeyValue => (1, usize::MAX),
            Self::DepthMap => (2, usize::MAX),
        }
    }
}

/// A question whose parts stand on lines of their own.
fn lines(
    context: String,
    question: String,
    prefix: String,
    references: Vec<String>,
    scoring: Scoring,
) -> Question {
    Question {
        context,
        question,
        prefix,
        separator: "\n",
        references,
        depth: None,
        needle: None,
        scoring,
        answer_tokens: 0,
    }
}

/// Where the context says a value: at the end of its statement, which stands there once.
fn said(context: &str, statement: &str, value: &str) -> Option<Range<usize>> {
    let first = context.find(statement)? + statement.rfind(value)?;
    Some(first..first + value.len())
}
