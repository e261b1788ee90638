//! What needles are hidden in, sentence by sentence.

use std::path::Path;

use super::EvalError;
use super::words::shuffle;
use crate::random::SplitMix64;
use crate::utf8;

/// Running text in paragraphs of sentences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prose {
    paragraphs: Vec<Vec<String>>,
}

const OWN: &str = include_str!("prose.txt");

/// Sentences that say nothing, over and over.
const NOISE: [&str; 5] =
    ["The kettle is on.", "The rain is soft.", "The lane is long.", "Out we go.", "Home we come again."];

impl Default for Prose {
    /// The text that comes with the crate.
    fn default() -> Self {
        Self { paragraphs: paragraphs(OWN) }
    }
}

impl Prose {
    /// A text of the user's own; blank lines separate paragraphs.
    ///
    /// # Errors
    /// A file that cannot be read, or with fewer than two sentences.
    pub fn from_file(path: &Path) -> Result<Self, EvalError> {
        let unusable = |reason: String| EvalError::Haystack { path: path.to_path_buf(), reason };
        let text = utf8::read(path).map_err(|error| unusable(error.to_string()))?;
        let paragraphs = paragraphs(&text);
        let sentences: usize = paragraphs.iter().map(Vec::len).sum();
        if sentences < 2 {
            return Err(unusable(format!(
                "there must be two sentences or more to plant needles between, not {sentences}"
            )));
        }
        Ok(Self { paragraphs })
    }

    /// So many sentences: the paragraphs in random order, in another one each time round.
    pub(super) fn sentences(&self, count: usize, random: &mut SplitMix64) -> Vec<&str> {
        let mut order: Vec<&Vec<String>> = self.paragraphs.iter().collect();
        let mut sentences = Vec::with_capacity(count);
        while sentences.len() < count {
            shuffle(&mut order, random);
            sentences.extend(order.iter().flat_map(|paragraph| paragraph.iter().map(String::as_str)));
        }
        sentences.truncate(count);
        sentences
    }
}

/// So many sentences of noise.
pub(super) fn noise(count: usize) -> Vec<&'static str> {
    NOISE.into_iter().cycle().take(count).collect()
}

fn paragraphs(text: &str) -> Vec<Vec<String>> {
    let text = text.replace("\r\n", "\n");
    let paragraphs = text.split("\n\n").map(sentences);
    paragraphs.filter(|sentences| !sentences.is_empty()).collect()
}

/// Splits behind full stops, exclamation marks and question marks.
fn sentences(paragraph: &str) -> Vec<String> {
    let mut sentences = Vec::new();
    let mut sentence = String::new();
    for word in paragraph.split_whitespace() {
        if !sentence.is_empty() {
            sentence.push(' ');
        }
        sentence += word;
        if word.trim_end_matches(['"', '\'', ')', '”', '’']).ends_with(['.', '!', '?', '。', '！', '？'])
        {
            sentences.push(std::mem::take(&mut sentence));
        }
    }
    if !sentence.is_empty() {
        sentences.push(sentence);
    }
    sentences
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_prose_is_long_and_does_not_repeat() {
        let Prose { paragraphs } = Prose::default();
        let mut all: Vec<&String> = paragraphs.iter().flatten().collect();
        assert!(all.len() > 120, "{}", all.len());
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), paragraphs.iter().map(Vec::len).sum::<usize>());
    }

    #[test]
    fn texts_fall_into_sentences() {
        let paragraphs = paragraphs("One is here. Is two?\r\nYes! \n\n\n\nHe said: \"Three.\" and four");
        assert_eq!(
            paragraphs,
            [vec!["One is here.", "Is two?", "Yes!"], vec!["He said: \"Three.\"", "and four"]]
        );
    }

    #[test]
    fn every_round_has_every_sentence() {
        let prose = Prose::default();
        let all: usize = prose.paragraphs.iter().map(Vec::len).sum();
        let text = prose.sentences(2 * all, &mut SplitMix64::new(1));
        let sorted = |part: &[&str]| {
            let mut part = part.to_vec();
            part.sort_unstable();
            part.join(" ")
        };
        assert_eq!(sorted(&text[..all]), sorted(&text[all..]));
        assert_ne!(text[..all], text[all..]);
    }
}
