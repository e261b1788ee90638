//! Passkey: a number between a prefix and a suffix of noise.

use super::{Question, Scoring, lines};
use crate::eval::haystack::noise;
use crate::random::SplitMix64;

pub(super) fn question(units: usize, random: &mut SplitMix64) -> Question {
    let key = 1 + random.below(50_000);
    let before = random.below(units + 1);
    let stated = format!("The pass key is {key}. Remember it: {key} is the pass key.");
    let parts = [
        "One important fact is hidden in the text below, among much that does not matter. Find it and memorise it.".to_owned(),
        noise(before).join(" "),
        stated,
        noise(units - before).join(" "),
    ];
    let context = parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n");
    let question = "What is the pass key?".to_owned();
    let depth = Some(before as f64 / units as f64);
    Question {
        depth,
        ..lines(context, question, "The pass key is".to_owned(), vec![key.to_string()], Scoring::FirstNumber)
    }
}
