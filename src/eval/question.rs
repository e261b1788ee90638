//! What is asked, and the text a model reads for it.

use std::ops::Range;

use serde::Serialize;

use super::Scoring;

/// A prompt whose right answer is known. The parts are joined by [`separator`](Self::separator).
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Question {
    /// Instruction and context: what is compressed in the query-agnostic setting.
    pub context: String,
    /// What is asked behind it.
    pub question: String,
    /// How the answer begins: with a chat template, behind the assistant's header.
    pub prefix: String,
    /// Between the parts.
    pub separator: &'static str,
    /// What a right answer holds.
    pub references: Vec<String>,
    /// Where in the context the needle stands, from 0 to 1, where there is one place.
    pub depth: Option<f64>,
    /// Bytes of the context that say the answer, where one place does.
    pub needle: Option<Range<usize>>,
    /// How an answer is scored.
    pub scoring: Scoring,
    /// Tokens that the answer may take.
    pub answer_tokens: usize,
}

impl Question {
    /// The text for a model without a chat template.
    pub fn text(&self) -> String {
        let parts = [&self.context, &self.question, &self.prefix];
        let parts: Vec<&str> =
            parts.into_iter().map(String::as_str).filter(|part| !part.is_empty()).collect();
        parts.join(self.separator)
    }
}
