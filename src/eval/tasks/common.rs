//! Common words: the ten that a list repeats most.

use super::{EvalError, Question, Scoring, lines};
use crate::eval::words::{adjective_nouns, pairs, shuffle};
use crate::random::SplitMix64;

/// Words that are asked for.
const COMMON: usize = 10;

/// The most other words a list can have.
pub(super) fn most() -> usize {
    pairs() - EXAMPLE.0 - COMMON
}

/// Words of the solved example, the common ones included, and how often common and other ones stand in it.
const EXAMPLE: (usize, [usize; 2]) = (40, [10, 3]);

/// How often common words stand in the list, and others.
fn repeats(length: usize) -> [usize; 2] {
    if length < 4096 { [6, 1] } else { [30, 3] }
}

pub(super) fn question(length: usize, units: usize, random: &mut SplitMix64) -> Result<Question, EvalError> {
    // All different, so that the example is no help.
    let words = adjective_nouns(EXAMPLE.0 + COMMON + units, random)?;
    let (example, words) = words.split_at(EXAMPLE.0);
    let instruction = format!(
        "Below is a numbered list in which some words stand more often than others. Remember the {COMMON} that stand most often."
    );
    let question = format!("Which {COMMON} words stand most often in the list above?");
    let prefix = format!("The {COMMON} words that stand most often are");
    let context = format!(
        "{instruction}\n{}\n{question}\n{prefix} {}\n\n{instruction}\n{}",
        list(example, EXAMPLE.1, random),
        example[..COMMON].join(", "),
        list(words, repeats(length), random),
    );
    Ok(lines(context, question, prefix, words[..COMMON].to_vec(), Scoring::Contains))
}

/// A shuffled, numbered list; the first words are the common ones.
fn list(words: &[String], [common, other]: [usize; 2], random: &mut SplitMix64) -> String {
    let mut entries: Vec<&String> = Vec::new();
    for (index, word) in words.iter().enumerate() {
        entries.extend(std::iter::repeat_n(word, if index < COMMON { common } else { other }));
    }
    shuffle(&mut entries, random);
    let numbered: Vec<String> =
        entries.iter().enumerate().map(|(index, word)| format!("{}. {word}", index + 1)).collect();
    numbered.join(" ")
}
