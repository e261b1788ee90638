//! Needles in a haystack: facts among filler, and a question about one of them.

use serde::{Deserialize, Serialize};

use super::dialect::{Dialect, DialectError, fill};
use super::words::shuffle;
use super::{Question, Scoring};
use crate::random::SplitMix64;

/// How many facts a prompt holds, and how alike their keys are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NeedleTask {
    /// Facts.
    pub needles: usize,
    /// Adjectives that keys are drawn from; `None`: all.
    #[serde(default)]
    pub adjectives_drawn: Option<usize>,
    /// Animals that keys are drawn from; `None`: all.
    #[serde(default)]
    pub animals_drawn: Option<usize>,
}

/// A prompt and what is right.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NeedlePrompt {
    /// Filler and facts, without the question.
    pub context: String,
    /// What is asked behind it.
    pub question: String,
    /// The answer.
    pub answer: String,
    /// The facts, in the order of the text; the question asks for one of them.
    pub facts: Vec<Planted>,
}

/// A fact of a prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Planted {
    /// What it is about.
    pub key: String,
    /// What is said of it.
    pub value: String,
    /// The word of the context at which its sentence begins.
    pub word: usize,
}

impl NeedlePrompt {
    /// A prompt of at most `tokens` words, as close to it as whole sentences get. In a word-level
    /// vocabulary a word is a token.
    ///
    /// # Errors
    /// Too few tokens for the facts, or more facts than keys.
    pub fn generate(
        dialect: &Dialect,
        task: NeedleTask,
        tokens: usize,
        seed: u64,
    ) -> Result<Self, DialectError> {
        Self::generate_at(dialect, task, tokens, seed, None)
    }

    /// [`generate`](Self::generate) with all facts behind the same share of the filler's sentences, from
    /// 0 to 1.
    ///
    /// # Errors
    /// As for `generate`.
    pub fn generate_at(
        dialect: &Dialect,
        task: NeedleTask,
        tokens: usize,
        seed: u64,
        depth: Option<f64>,
    ) -> Result<Self, DialectError> {
        let random = &mut SplitMix64::new(seed);
        let facts: Vec<(String, String, String)> = keys(dialect, task, random)?
            .into_iter()
            .map(|(adjective, animal)| {
                let value = value(dialect, random);
                let sentence = fill(&dialect.needle.sentence, |slot| match slot {
                    "adjective" => adjective.clone(),
                    "animal" => animal.clone(),
                    _ => value.clone(),
                });
                (format!("{adjective} {animal}"), value, sentence)
            })
            .collect();
        let (asked, answer, _) = &facts[random.below(facts.len())];
        let (adjective, animal) = asked.split_once(' ').unwrap_or((asked, ""));
        let question = fill(&dialect.needle.question, |slot| {
            if slot == "adjective" { adjective.to_owned() } else { animal.to_owned() }
        });
        let answer = answer.clone();

        let taken = words(&question) + facts.iter().map(|(_, _, sentence)| words(sentence)).sum::<usize>();
        let too_short = DialectError::TooShort { tokens, facts: facts.len(), least: taken };
        let mut room = tokens.checked_sub(taken).ok_or(too_short)?;
        let mut filler = Vec::new();
        loop {
            let sentence = dialect.filler_sentence(random);
            match room.checked_sub(words(&sentence)) {
                Some(left) => room = left,
                None => break,
            }
            filler.push(sentence);
        }
        let place = |depth: f64| (depth.clamp(0.0, 1.0) * filler.len() as f64).round() as usize;
        let mut places: Vec<usize> =
            facts.iter().map(|_| depth.map_or_else(|| random.below(filler.len() + 1), place)).collect();
        places.sort_unstable();

        let mut context: Vec<&str> = Vec::new();
        let mut planted = Vec::new();
        let mut word = 0;
        let mut waiting = places.iter().zip(&facts).peekable();
        for index in 0..=filler.len() {
            while let Some((_, (key, value, sentence))) = waiting.next_if(|(place, _)| **place == index) {
                planted.push(Planted { key: key.clone(), value: value.clone(), word });
                word += words(sentence);
                context.push(sentence);
            }
            if let Some(sentence) = filler.get(index) {
                word += words(sentence);
                context.push(sentence);
            }
        }
        Ok(Self { context: context.join(" "), question, answer, facts: planted })
    }

    /// The prompt as a question of any task, with the place of the fact that is asked for.
    pub fn into_question(self, answer_tokens: usize) -> Question {
        let length = words(&self.context).max(1) as f64;
        let is_asked = |fact: &&Planted| fact.value == self.answer && self.question.contains(&fact.key);
        let asked = self.facts.iter().find(is_asked);
        let needle = asked.and_then(|fact| {
            let sentence: usize = self.context.split(' ').take(fact.word).map(|word| word.len() + 1).sum();
            let first = sentence + self.context.get(sentence..)?.find(&fact.value)?;
            Some(first..first + fact.value.len())
        });
        Question {
            depth: asked.map(|fact| fact.word as f64 / length),
            needle,
            context: self.context,
            question: self.question,
            prefix: String::new(),
            separator: " ",
            references: vec![self.answer],
            scoring: Scoring::Whole,
            answer_tokens,
        }
    }

    /// Context and question.
    pub fn text(&self) -> String {
        format!("{} {}", self.context, self.question)
    }
}

/// Different pairs of an adjective and an animal.
fn keys(
    dialect: &Dialect,
    task: NeedleTask,
    random: &mut SplitMix64,
) -> Result<Vec<(String, String)>, DialectError> {
    let adjectives = draw(dialect.words("adjective"), task.adjectives_drawn, random);
    let animals = draw(dialect.words("animal"), task.animals_drawn, random);
    let pairs = adjectives.len() * animals.len();
    if task.needles == 0 {
        return Err(DialectError::NoFacts);
    }
    if task.needles > pairs {
        return Err(DialectError::TooManyFacts { facts: task.needles, keys: pairs });
    }
    let mut numbers: Vec<usize> = Vec::new();
    while numbers.len() < task.needles {
        let number = random.below(pairs);
        if !numbers.contains(&number) {
            numbers.push(number);
        }
    }
    let key =
        |number: usize| (adjectives[number / animals.len()].clone(), animals[number % animals.len()].clone());
    Ok(numbers.into_iter().map(key).collect())
}

/// Different numbers, as words.
fn value(dialect: &Dialect, random: &mut SplitMix64) -> String {
    draw(dialect.words("number"), Some(dialect.needle.numbers_per_value), random).join(" ")
}

/// `count` different words in random order; `None`: all.
fn draw(words: &[String], count: Option<usize>, random: &mut SplitMix64) -> Vec<String> {
    let mut words = words.to_vec();
    shuffle(&mut words, random);
    words.truncate(count.unwrap_or(usize::MAX));
    words
}

fn words(text: &str) -> usize {
    text.split_whitespace().count()
}
