//! Likeness of two texts, from 0 to 1.

use std::collections::HashMap;

/// F1 of the words: lower case, without punctuation and the articles (SQuAD, arXiv 1606.05250).
pub(super) fn f1(prediction: &str, reference: &str) -> f64 {
    let article = |word: &String| ["a", "an", "the"].contains(&word.as_str());
    let normalised = |text: &str| words(text).into_iter().filter(|word| !article(word)).collect::<Vec<_>>();
    let (prediction, reference) = (normalised(prediction), normalised(reference));
    let mut left: HashMap<&String, usize> = HashMap::new();
    reference.iter().for_each(|word| *left.entry(word).or_default() += 1);
    let common = prediction.iter().filter(|word| match left.get_mut(word) {
        Some(count) if *count > 0 => {
            *count -= 1;
            true
        }
        _ => false,
    });
    harmonic(common.count(), prediction.len(), reference.len())
}

/// F1 of the longest common subsequence of words (ROUGE-L, Lin 2004).
pub(super) fn rouge_l(prediction: &str, reference: &str) -> f64 {
    let (prediction, reference) = (words(prediction), words(reference));
    harmonic(longest_common(&prediction, &reference), prediction.len(), reference.len())
}

/// Twice the longest common subsequence of characters over both lengths.
pub(super) fn similarity(prediction: &str, reference: &str) -> f64 {
    let (prediction, reference): (Vec<char>, Vec<char>) =
        (prediction.chars().collect(), reference.chars().collect());
    harmonic(longest_common(&prediction, &reference), prediction.len(), reference.len())
}

/// The harmonic mean of precision and recall.
fn harmonic(common: usize, predicted: usize, right: usize) -> f64 {
    if common == 0 { 0.0 } else { 2.0 * common as f64 / (predicted + right) as f64 }
}

/// Lower case, punctuation taken out; of scripts without blanks every character is a word.
fn words(text: &str) -> Vec<String> {
    let mut spaced = String::new();
    for char in text.to_lowercase().chars().filter(|char| !is_punctuation(*char)) {
        match char {
            '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' => {
                spaced.extend([' ', char, ' '])
            }
            _ => spaced.push(char),
        }
    }
    spaced.split_whitespace().map(str::to_owned).collect()
}

fn is_punctuation(char: char) -> bool {
    char.is_ascii_punctuation() || "，。、；：？！“”‘’（）《》【】…—·「」".contains(char)
}

fn longest_common<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for a in a {
        let mut diagonal = 0;
        for (index, b) in b.iter().enumerate() {
            let above = row[index + 1];
            row[index + 1] = if a == b { diagonal + 1 } else { above.max(row[index]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f1_counts_words_as_often_as_both_have_them() {
        assert_eq!(f1("The cat!", "a cat"), 1.0);
        // Common: cat, sat. Precision 2/3, recall 2/4.
        assert!(
            (f1("cat cat sat", "cat sat on mats") - 2.0 * (2.0 / 3.0) * 0.5 / (2.0 / 3.0 + 0.5)).abs()
                < 1e-12
        );
        assert_eq!(f1("dog", "cat"), 0.0);
        assert_eq!(f1("", ""), 0.0);
        assert_eq!(f1("北京。", "北京"), 1.0);
        assert_eq!(f1("南京", "北京"), 0.5);
    }

    #[test]
    fn rouge_l_keeps_the_order() {
        // Longest: police the gunman, of 4 and 4.
        assert_eq!(rouge_l("police kill the gunman", "police killed the gunman"), 0.75);
        assert_eq!(rouge_l("gunman the kill police", "police killed the gunman"), 0.25);
        assert_eq!(rouge_l("", "word"), 0.0);
    }

    #[test]
    fn similarity_is_of_characters() {
        assert_eq!(similarity("kitten", "sitting"), 8.0 / 13.0);
        assert_eq!(similarity("", ""), 0.0);
        assert_eq!(similarity("ab", "ab"), 1.0);
    }
}
