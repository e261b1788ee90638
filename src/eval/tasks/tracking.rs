//! Variable tracking: a chain of names that hold one value.

use super::needles::insert;
use super::{Question, Scoring, lines};
use crate::eval::haystack::noise;
use crate::eval::words::letters;
use crate::random::SplitMix64;

/// Lines of the chain: a value, and four hops.
pub(super) const LINES: usize = 5;

/// Sentences of noise in the example.
const EXAMPLE_NOISE: usize = 10;

pub(super) fn question(units: usize, random: &mut SplitMix64) -> Question {
    let example = Chain::new(EXAMPLE_NOISE, 3, random);
    let chain = Chain::new(units, 5, random);
    let instruction =
        "Follow the names through the text: a name that is set to another name holds the same value.";
    let context = format!(
        "{instruction}\n{}\n{}\n{} {}\n\n{instruction}\n{}",
        example.text,
        example.question(),
        example.prefix(),
        example.names.join(", "),
        chain.text
    );
    let (question, prefix) = (chain.question(), chain.prefix());
    lines(context, question, prefix, chain.names, Scoring::Contains)
}

struct Chain {
    names: Vec<String>,
    value: usize,
    text: String,
}

impl Chain {
    fn new(units: usize, letters_of_a_name: usize, random: &mut SplitMix64) -> Self {
        let names: Vec<String> =
            letters(LINES, letters_of_a_name, random).into_iter().map(|name| name.to_uppercase()).collect();
        let value = 10_000 + random.below(89_999);
        let mut lines = vec![format!("LET {} = {value}.", names[0])];
        lines.extend(names.windows(2).map(|pair| format!("LET {} = {}.", pair[1], pair[0])));
        let mut places: Vec<usize> = lines.iter().map(|_| random.below(units + 1)).collect();
        places.sort_unstable();
        let hay: Vec<String> = noise(units).into_iter().map(str::to_owned).collect();
        let text = insert(&hay, &lines, &places).join(" ");
        Self { names, value, text }
    }

    fn question(&self) -> String {
        format!("Which {LINES} names hold the value {} in the text above?", self.value)
    }

    fn prefix(&self) -> String {
        format!("The {LINES} names that hold the value {} are", self.value)
    }
}
