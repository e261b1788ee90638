//! How answers are held against what is right. Every score is from 0 to 100.

use serde::{Deserialize, Serialize};

use super::measures;

/// A way to score.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scoring {
    /// The share of references that stand in the answer, case-folded.
    Contains,
    /// Whether the answer is the reference, blanks at either end aside.
    Whole,
    /// Whether the first number of the answer is the reference.
    FirstNumber,
    /// F1 of the words, normalised as SQuAD does; the best of the references.
    F1,
    /// ROUGE-L: F1 of the longest common subsequence of words; the best of the references.
    RougeL,
    /// Whether the class is named, over how many classes are.
    Classification,
    /// The share of the numbers in the answer that are the reference's number.
    Number,
    /// Similarity of the first line of code: 1 − edits without substitution over both lengths, in whole
    /// percent; the best of the references.
    Code,
}

/// What a score is made from, beside the answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Key<'a> {
    /// What is right.
    pub references: &'a [String],
    /// The classes there are, for [`Scoring::Classification`].
    pub classes: &'a [String],
}

impl Scoring {
    /// Scores an answer, from 0 to 100. Control characters count as line breaks.
    pub fn score(self, prediction: &str, key: Key<'_>) -> f64 {
        let prediction: String =
            prediction.chars().map(|char| if char.is_control() { '\n' } else { char }).collect();
        let prediction = prediction.trim();
        let best = |measure: &dyn Fn(&str) -> f64| {
            key.references.iter().map(|reference| measure(reference)).fold(0.0, f64::max)
        };
        let share = match self {
            Self::Contains => {
                let folded = prediction.to_lowercase();
                let found =
                    key.references.iter().filter(|reference| folded.contains(&reference.to_lowercase()));
                found.count() as f64 / key.references.len().max(1) as f64
            }
            Self::Whole => best(&|reference| f64::from(prediction == reference.trim())),
            Self::FirstNumber => {
                let first = numbers(prediction).next();
                best(&|reference| f64::from(first == Some(reference.trim())))
            }
            Self::F1 => best(&|reference| measures::f1(prediction, reference)),
            Self::RougeL => best(&|reference| measures::rouge_l(prediction, reference)),
            Self::Classification => best(&|reference| classification(prediction, reference, key.classes)),
            Self::Number => best(&|reference| {
                let right = numbers(reference).next();
                let all = numbers(prediction).count();
                numbers(prediction).filter(|number| Some(*number) == right).count() as f64 / all.max(1) as f64
            }),
            Self::Code => {
                best(&|reference| (100.0 * measures::similarity(code(prediction), reference)).round() / 100.0)
            }
        };
        100.0 * share
    }

    /// Whether an answer is exactly right: of several references in [`Scoring::Contains`] those and
    /// nothing else, in any order; otherwise one of the references. Case, blanks at either end and a full
    /// stop at the end do not count.
    pub fn is_exact(self, prediction: &str, key: Key<'_>) -> bool {
        let plain = |text: &str| text.trim().trim_end_matches('.').trim_end().to_lowercase();
        let prediction = plain(prediction);
        match self {
            Self::FirstNumber => self.score(&prediction, key) == 100.0,
            Self::Contains if key.references.len() > 1 => {
                let mut items: Vec<&str> = prediction
                    .split(|char: char| char.is_whitespace() || ",;".contains(char))
                    .filter(|item| !item.is_empty() && *item != "and")
                    .collect();
                let mut references: Vec<String> =
                    key.references.iter().map(|reference| plain(reference)).collect();
                items.sort_unstable();
                references.sort_unstable();
                items == references
            }
            _ => key.references.iter().any(|reference| plain(reference) == prediction),
        }
    }
}

/// Runs of decimal digits.
fn numbers(text: &str) -> impl Iterator<Item = &str> {
    text.split(|char: char| !char.is_ascii_digit()).filter(|digits| !digits.is_empty())
}

/// LongBench's: of the classes named in the answer, those that are part of the right one's name do not
/// count.
fn classification(prediction: &str, right: &str, classes: &[String]) -> f64 {
    let named: Vec<&String> = classes
        .iter()
        .filter(|class| prediction.contains(class.as_str()))
        .filter(|class| class.as_str() == right || !right.contains(class.as_str()))
        .collect();
    if named.iter().any(|class| class.as_str() == right) { 1.0 / named.len() as f64 } else { 0.0 }
}

/// The first line that is no comment and no fence, where there is one.
fn code(prediction: &str) -> &str {
    let is_code = |line: &&str| !["`", "#", "//"].iter().any(|mark| line.contains(mark));
    prediction.lines().find(is_code).unwrap_or(prediction)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(scoring: Scoring, prediction: &str, references: &[&str]) -> f64 {
        let references: Vec<String> = references.iter().copied().map(str::to_owned).collect();
        scoring.score(prediction, Key { references: &references, classes: &[] })
    }

    fn exact(scoring: Scoring, prediction: &str, references: &[&str]) -> bool {
        let references: Vec<String> = references.iter().copied().map(str::to_owned).collect();
        scoring.is_exact(prediction, Key { references: &references, classes: &[] })
    }

    #[test]
    fn references_are_found_whatever_their_case() {
        use Scoring::Contains;
        assert_eq!(score(Contains, "It is 1234567, I think.", &["1234567"]), 100.0);
        assert_eq!(score(Contains, "abcde,\u{0}FGHIJ", &["ABCDE", "FGHIJ", "KLMNO", "PQRST"]), 50.0);
        assert_eq!(score(Contains, "", &["1"]), 0.0);
        assert_eq!(score(Contains, "123 4567", &["1234567"]), 0.0, "in one piece");
    }

    #[test]
    fn exact_is_the_references_and_nothing_else() {
        use Scoring::{Contains, FirstNumber, Whole};
        assert!(exact(Contains, " 1234567.\n", &["1234567"]));
        assert!(!exact(Contains, "1234567 or so", &["1234567"]));
        assert!(exact(Contains, "klmno, ABCDE\nand FGHIJ.", &["ABCDE", "FGHIJ", "KLMNO"]));
        assert!(!exact(Contains, "ABCDE, FGHIJ, KLMNO, ZZZZZ", &["ABCDE", "FGHIJ", "KLMNO"]));
        assert!(!exact(Contains, "ABCDE ABCDE", &["ABCDE", "FGHIJ"]));
        assert!(exact(FirstNumber, "17 apples, or 18", &["17"]));
        assert!(exact(Whole, "17 36 82 ", &["17 36 82"]) && !exact(Whole, "17 36", &["17 36 82"]));
    }

    #[test]
    fn the_first_number_counts() {
        assert_eq!(score(Scoring::FirstNumber, "The key is 4711. Not 17.", &["4711"]), 100.0);
        assert_eq!(score(Scoring::FirstNumber, "17 and 4711", &["4711"]), 0.0);
        assert_eq!(score(Scoring::FirstNumber, "47110", &["4711"]), 0.0);
        assert_eq!(score(Scoring::FirstNumber, "none", &["4711"]), 0.0);
    }

    #[test]
    fn numbers_count_by_their_share() {
        assert_eq!(score(Scoring::Number, "Paragraph 3", &["Paragraph 3"]), 100.0);
        assert_eq!(score(Scoring::Number, "Paragraphs 3, 4, 3 and 5", &["Paragraph 3"]), 50.0);
        assert_eq!(score(Scoring::Number, "none", &["17"]), 0.0);
    }

    #[test]
    fn classes_are_told_apart() {
        let classes: Vec<String> = ["Sport", "Sport event", "Food"].map(String::from).into();
        let references = ["Sport event".to_owned()];
        let score = |prediction: &str| {
            Scoring::Classification.score(prediction, Key { references: &references, classes: &classes })
        };
        assert_eq!(score("Sport event"), 100.0, "a part of the name is no other class");
        assert_eq!(score("Food or Sport event"), 50.0);
        assert_eq!(score("Sport"), 0.0);
    }

    #[test]
    fn code_is_its_first_line() {
        assert_eq!(score(Scoring::Code, "```rust\n// sum\nlet a = b;\nmore", &["let a = b;"]), 100.0);
        // 2 · 3 common characters of 3 + 5.
        assert_eq!(score(Scoring::Code, "abc", &["aXbYc"]), 75.0);
        assert_eq!(score(Scoring::Code, "# x", &["# x"]), 100.0, "where there is nothing else");
    }
}
