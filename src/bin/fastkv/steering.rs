//! Options of attention steering.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, bail};
use clap::Args;
use fastkv::policy::{DEFAULT_ALPHA, HeadScores, Plan, Steering};

use crate::exit::Usage;
use crate::input::Prompt;

/// Attention steering (PASTA): chosen heads look less at what is not highlighted.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Attention steering")]
pub(crate) struct SteeringOptions {
    /// Highlight this text wherever it stands in the prompt; may be repeated
    #[arg(long, value_name = "TEXT", requires = "steer_heads")]
    steer: Vec<String>,
    /// Highlight tokens of the prompt by position, the end left out (10..14); may be repeated
    #[arg(long, value_name = "FROM..TO", value_parser = span, requires = "steer_heads")]
    steer_tokens: Vec<Range<usize>>,
    /// Heads to steer: a list (3-12,4-1), or a JSON file, either {"layer": [heads]} or the head scores of
    /// `fastkv profile heads`
    #[arg(long, value_name = "LIST|FILE")]
    steer_heads: Option<String>,
    /// Of a file of head scores, steer this many of the best
    #[arg(long, value_name = "N", default_value_t = 8, requires = "steer_heads")]
    steer_best: usize,
    /// What is left of the attention to other tokens, above 0 and at most 1
    #[arg(
        long,
        value_name = "ALPHA",
        default_value_t = DEFAULT_ALPHA,
        allow_negative_numbers = true,
        requires = "steer_heads"
    )]
    alpha: f64,
}

impl SteeringOptions {
    /// The plan, steered where that is asked for.
    pub(crate) fn apply(&self, plan: Plan, prompt: &Prompt) -> Result<Plan> {
        let Some(heads) = &self.steer_heads else { return Ok(plan) };
        let mut spans = self.steer_tokens.clone();
        for text in &self.steer {
            spans.extend(spans_of(text, &prompt.pieces()?)?);
        }
        let heads = self.heads(heads)?;
        Ok(plan.steer(Steering { spans, heads, alpha: self.alpha })?)
    }

    fn heads(&self, list: &str) -> Result<Vec<(usize, usize)>> {
        if let Some(heads) = list.split(',').map(head).collect() {
            return Ok(heads);
        }
        let context = || format!("--steer-heads {list}");
        let text = std::fs::read(list)
            .with_context(|| format!("{} is no list of heads such as 3-12,4-1, and no file", context()))?;
        if let Ok(layers) = serde_json::from_slice::<BTreeMap<usize, Vec<usize>>>(&text) {
            let of_layer =
                |(layer, heads): (usize, Vec<usize>)| heads.into_iter().map(move |head| (layer, head));
            return Ok(layers.into_iter().flat_map(of_layer).collect());
        }
        let scores: HeadScores = serde_json::from_slice(&text).with_context(context)?;
        Ok(scores.ranking().into_iter().take(self.steer_best).map(|(head, _)| head).collect())
    }
}

/// Tokens that a text reaches into, wherever it stands.
fn spans_of(text: &str, pieces: &[String]) -> Result<Vec<Range<usize>>> {
    if text.is_empty() {
        bail!(Usage("--steer is empty: give a part of the prompt".to_owned()));
    }
    let prompt = pieces.concat();
    let mut ends = Vec::new();
    for piece in pieces {
        ends.push(ends.last().unwrap_or(&0) + piece.len());
    }
    let token = |byte: usize| ends.partition_point(|end| *end <= byte);
    // The text of a letter is that of the last token of those that give its bytes.
    let letter = |byte: usize| match token(byte) {
        token if ends[token] - pieces[token].len() == byte => {
            ends.partition_point(|end| *end < byte) + usize::from(byte > 0)
        }
        token => token,
    };
    let spans: Vec<_> = prompt
        .match_indices(text)
        .map(|(first, found)| letter(first)..token(first + found.len() - 1) + 1)
        .collect();
    if spans.is_empty() {
        bail!(Usage(format!("--steer {text:?} is not in the prompt")));
    }
    Ok(spans)
}

/// A layer and a query head, such as 3-12.
fn head(text: &str) -> Option<(usize, usize)> {
    let (layer, head) = text.trim().split_once('-')?;
    Some((layer.parse().ok()?, head.parse().ok()?))
}

fn span(text: &str) -> Result<Range<usize>, String> {
    let span = text.split_once("..").and_then(|(first, end)| Some(first.parse().ok()?..end.parse().ok()?));
    span.ok_or_else(|| "give the first position and the one behind the last, such as 10..14".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_found_with_all_the_tokens_they_reach_into() {
        let pieces = ["<s>", "the", " num", "ber", " is", " the", " num"].map(String::from);
        assert_eq!(spans_of("number", &pieces).expect("there"), vec![Range { start: 2, end: 4 }]);
        assert_eq!(spans_of("the num", &pieces).expect("twice"), [1..3, 5..7]);
        assert_eq!(spans_of("e n", &pieces).expect("twice"), [1..3, 5..7]);
        // The second and the third token give bytes of the letter that the fourth one ends.
        let pieces = ["a", "", "", "日本", "", "語"].map(String::from);
        assert_eq!(spans_of("日", &pieces).expect("there"), vec![Range { start: 1, end: 4 }]);
        assert_eq!(spans_of("本", &pieces).expect("there"), vec![Range { start: 3, end: 4 }]);
        assert_eq!(spans_of("本語", &pieces).expect("there"), vec![Range { start: 3, end: 6 }]);
        assert!(spans_of("numbers", &pieces).is_err());
        assert!(spans_of("", &pieces).is_err());
    }

    #[test]
    fn heads_and_spans_are_read() {
        assert_eq!(head("3-12"), Some((3, 12)));
        assert_eq!(head("3"), None);
        assert_eq!(span("10..14"), Ok(10..14));
        assert!(span("10-14").is_err());
    }
}
