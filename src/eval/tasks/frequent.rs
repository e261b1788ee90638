//! Frequent words: coded words whose counts fall with the square of the rank.

use super::{Question, Scoring, lines};
use crate::eval::words::{letters, shuffle};
use crate::random::SplitMix64;

/// ζ(2) = π²/6.
const ZETA_2: f64 = std::f64::consts::PI * std::f64::consts::PI / 6.0;

/// What stands for the most frequent word, and is to be ignored.
const DOTS: &str = "...";

/// Words that are asked for: ranks 1 to 3.
const ASKED: usize = 3;

/// An N from which on the counts of ranks 1 to 4 all differ.
pub(super) const FEWEST: usize = 60;

/// Different words of a prompt of so many tokens.
fn vocabulary(length: usize) -> usize {
    (length.saturating_sub(50) / 50).max(ASKED + 2)
}

/// How often the word of a rank, from 0, stands: `int(N · (rank + 1)⁻² / ζ(2))`.
fn count(units: usize, rank: usize) -> usize {
    (units as f64 / ((rank + 1) * (rank + 1)) as f64 / ZETA_2) as usize
}

pub(super) fn question(length: usize, units: usize, random: &mut SplitMix64) -> Question {
    let mut words = letters(vocabulary(length), 6, random);
    words[0] = DOTS.to_owned();
    let mut text: Vec<&str> = Vec::new();
    for (rank, word) in words.iter().enumerate() {
        text.extend(std::iter::repeat_n(word.as_str(), count(units, rank)));
    }
    shuffle(&mut text, random);
    let context = format!(
        "Below is a text in coded words. Keep track of how often each of them stands in it; dots ({DOTS}) do not count.\n{}",
        text.join(" ")
    );
    let question = format!("Which {ASKED} coded words stand most often in the text above, dots aside?");
    let prefix = format!("The {ASKED} coded words that stand most often are");
    lines(context, question, prefix, words[1..=ASKED].to_vec(), Scoring::Contains)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_that_are_asked_for_differ() {
        let differ = |units| (1..=ASKED).all(|rank| count(units, rank) > count(units, rank + 1));
        assert!((FEWEST..100_000).all(differ));
    }
}
