//! Key-value retrieval: one value of a JSON object of random pairs.

use super::{Question, Scoring, lines, said};
use crate::eval::words::uuids;
use crate::random::SplitMix64;

pub(super) fn question(units: usize, random: &mut SplitMix64) -> Question {
    let asked = random.below(units);
    let uuids = uuids(2 * units, random);
    let pairs: Vec<String> =
        uuids.chunks_exact(2).map(|pair| format!("\"{}\": \"{}\"", pair[0], pair[1])).collect();
    let (key, value) = (&uuids[2 * asked], &uuids[2 * asked + 1]);
    let context = format!(
        "Below is a JSON object of keys and values. Extract the value of the key that is asked for.\n{{{}}}",
        pairs.join(", ")
    );
    let question = format!("What is the value of the key \"{key}\"?");
    let prefix = format!("The value of the key \"{key}\" is");
    let depth = Some(asked as f64 / units as f64);
    let needle = said(&context, &pairs[asked], value);
    Question { depth, needle, ..lines(context, question, prefix, vec![value.clone()], Scoring::Contains) }
}
