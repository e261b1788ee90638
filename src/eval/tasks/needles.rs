//! The needle family.

use super::{EvalError, Prose, Question, Scoring, lines, said};
use crate::eval::haystack::noise;
use crate::eval::words::{adjective_nouns, numbers, pairs, shuffle, uuids};
use crate::random::SplitMix64;

/// A variant: what is hidden where, and what is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needles {
    pub(super) name: &'static str,
    haystack: Haystack,
    keys: Kind,
    values: Kind,
    /// Keys that are hidden, values of each, keys that are asked for.
    hidden: usize,
    each: usize,
    asked: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Haystack {
    Noise,
    Prose,
    Needles,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Words,
    Numbers,
    Uuids,
}

/// Places between the sentences of prose, in percent of its length, from 0 to 100 in even steps.
const DEPTHS: usize = 40;

impl Kind {
    fn draw(self, count: usize, random: &mut SplitMix64) -> Result<Vec<String>, EvalError> {
        Ok(match self {
            Self::Words => adjective_nouns(count, random)?,
            Self::Numbers => numbers(count, random),
            Self::Uuids => uuids(count, random),
        })
    }

    fn noun(self) -> &'static str {
        match self {
            Self::Words => "word",
            Self::Numbers => "number",
            Self::Uuids => "code",
        }
    }
}

impl Needles {
    /// Noise; a word's number.
    pub const SINGLE_1: Self = Self::new("single_1", Haystack::Noise, Kind::Words, Kind::Numbers, [1, 1, 1]);
    /// Prose; a word's number.
    pub const SINGLE_2: Self = Self::new("single_2", Haystack::Prose, Kind::Words, Kind::Numbers, [1, 1, 1]);
    /// Prose; a word's UUID.
    pub const SINGLE_3: Self = Self::new("single_3", Haystack::Prose, Kind::Words, Kind::Uuids, [1, 1, 1]);
    /// Prose; the number of one of four words.
    pub const MULTIKEY_1: Self =
        Self::new("multikey_1", Haystack::Prose, Kind::Words, Kind::Numbers, [4, 1, 1]);
    /// Nothing but needles; a word's number.
    pub const MULTIKEY_2: Self =
        Self::new("multikey_2", Haystack::Needles, Kind::Words, Kind::Numbers, [1, 1, 1]);
    /// Nothing but needles; a UUID's UUID.
    pub const MULTIKEY_3: Self =
        Self::new("multikey_3", Haystack::Needles, Kind::Uuids, Kind::Uuids, [1, 1, 1]);
    /// Prose; the four numbers of a word.
    pub const MULTIVALUE: Self =
        Self::new("multivalue", Haystack::Prose, Kind::Words, Kind::Numbers, [1, 4, 1]);
    /// Prose; the numbers of four words.
    pub const MULTIQUERY: Self =
        Self::new("multiquery", Haystack::Prose, Kind::Words, Kind::Numbers, [4, 1, 4]);

    const fn new(
        name: &'static str,
        haystack: Haystack,
        keys: Kind,
        values: Kind,
        counts: [usize; 3],
    ) -> Self {
        let [hidden, each, asked] = counts;
        Self { name, haystack, keys, values, hidden, each, asked }
    }

    /// How many values a right answer has.
    pub(super) fn values_asked(&self) -> usize {
        self.asked * self.each
    }

    pub(super) fn units(&self) -> (usize, usize) {
        let most = if self.haystack == Haystack::Needles && self.keys == Kind::Words {
            pairs() - 1
        } else {
            usize::MAX
        };
        (self.hidden * self.each, most)
    }

    pub(super) fn question(
        &self,
        prose: &Prose,
        units: usize,
        random: &mut SplitMix64,
    ) -> Result<Question, EvalError> {
        let others = if self.haystack == Haystack::Needles { units } else { 0 };
        // The needles that are hidden come first, so that units change the haystack alone.
        let keys = self.keys.draw(self.hidden + others, random)?;
        let values = self.values.draw(self.hidden * self.each + others, random)?;
        let (hidden, other_keys) = keys.split_at(self.hidden);
        let (hidden_values, other_values) = values.split_at(self.hidden * self.each);
        let needle = |key: &String, value: &String| {
            format!("Remember that the secret {} of {key} is {value}.", self.values.noun())
        };
        let needles: Vec<String> = hidden_values
            .iter()
            .enumerate()
            .map(|(index, value)| needle(&hidden[index / self.each], value))
            .collect();
        let mut asked: Vec<usize> = (0..self.hidden).collect();
        shuffle(&mut asked, random);
        asked.truncate(self.asked);
        let references: Vec<String> = asked
            .iter()
            .flat_map(|key| &hidden_values[key * self.each..(key + 1) * self.each])
            .cloned()
            .collect();

        let hay: Vec<String> = match self.haystack {
            Haystack::Noise => noise(units).into_iter().map(str::to_owned).collect(),
            Haystack::Prose => prose.sentences(units, random).into_iter().map(str::to_owned).collect(),
            Haystack::Needles => {
                other_keys.iter().zip(other_values).map(|(key, value)| needle(key, value)).collect()
            }
        };
        let places: Vec<usize> = match self.haystack {
            Haystack::Prose => {
                depths(needles.len(), random).into_iter().map(|percent| units * percent / 100).collect()
            }
            _ => needles.iter().map(|_| random.below(units + 1)).collect(),
        };
        let glue = if self.haystack == Haystack::Needles { "\n" } else { " " };
        let text = insert(&hay, &needles, &places).join(glue);

        let (kind, one) = (self.values.noun(), self.values_asked() == 1);
        let kinds = if one { kind.to_owned() } else { format!("{kind}s") };
        let names = and(asked.iter().map(|key| hidden[*key].as_str()).collect());
        let (all, verb) = if one { ("", "is") } else { ("all ", "are") };
        let instruction = format!(
            "Secret {kind}s are hidden in the text below. Read it with care: it will be asked what they are."
        );
        let question = format!("What {verb} {all}the secret {kinds} of {names} that the text above gives?");
        let prefix = format!("The secret {kinds} of {names} that the text gives {verb}");
        let depth = (needles.len() == 1).then(|| places[0] as f64 / units.max(1) as f64);
        let context = format!("{instruction}\n{text}");
        let statement = |value: &String| needle(&hidden[asked[0]], value);
        let needle = references.first().filter(|_| one);
        let needle = needle.and_then(|value| said(&context, &statement(value), value));
        Ok(Question { depth, needle, ..lines(context, question, prefix, references, Scoring::Contains) })
    }
}

/// Different ones of the even percentages, in random order.
fn depths(count: usize, random: &mut SplitMix64) -> Vec<usize> {
    let mut percents: Vec<usize> =
        (0..DEPTHS).map(|step| (step as f64 * 100.0 / (DEPTHS - 1) as f64).round() as usize).collect();
    shuffle(&mut percents, random);
    percents.truncate(count);
    percents
}

/// The hay with needle i put before its element `places[i]`.
pub(super) fn insert<'a>(hay: &'a [String], needles: &'a [String], places: &[usize]) -> Vec<&'a str> {
    let mut order: Vec<usize> = (0..needles.len()).collect();
    order.sort_by_key(|needle| places[*needle]);
    let mut order = order.into_iter().peekable();
    let mut text = Vec::with_capacity(hay.len() + needles.len());
    for index in 0..=hay.len() {
        while let Some(needle) = order.next_if(|needle| places[*needle] == index) {
            text.push(needles[needle].as_str());
        }
        text.extend(hay.get(index).map(String::as_str));
    }
    text
}

/// `a`, `a and b`, `a, b and c`.
fn and(names: Vec<&str>) -> String {
    match names.as_slice() {
        [] => String::new(),
        [one] => (*one).to_owned(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}
