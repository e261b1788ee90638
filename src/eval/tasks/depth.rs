//! Depth map: a needle at a given depth of prose, scored by exact match.

use super::needles::insert;
use super::{EvalError, Prose, Question, Scoring, lines, said};
use crate::eval::words::{adjective_nouns, numbers};
use crate::random::SplitMix64;

pub(super) fn question(
    prose: &Prose,
    units: usize,
    depth: f64,
    random: &mut SplitMix64,
) -> Result<Question, EvalError> {
    let (key, number) = (&adjective_nouns(1, random)?[0], &numbers(1, random)[0]);
    let hay: Vec<String> = prose.sentences(units, random).into_iter().map(str::to_owned).collect();
    let place = (depth.clamp(0.0, 1.0) * units as f64).round() as usize;
    let needle = [format!("The number on the door of {key} is {number}.")];
    let context = format!(
        "Read the text below; there will be a question about it.\n{}",
        insert(&hay, &needle, &[place]).join(" ")
    );
    let question = format!("Which number is on the door of {key}? Answer with the number alone.");
    let prefix = format!("The number on the door of {key} is");
    Ok(Question {
        depth: Some(depth),
        needle: said(&context, &needle[0], number),
        ..lines(context, question, prefix, vec![number.clone()], Scoring::FirstNumber)
    })
}
