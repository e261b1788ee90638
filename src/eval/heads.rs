//! Scores of attention heads: how much a head takes part in finding a needle.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// How heads are scored while an answer is produced, token by token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HeadScoring {
    /// A head gains 1/|needle| when what it attends to most lies in the needle and is the token that is
    /// produced (arXiv 2404.15574).
    Retrieval,
    /// Of the |needle| positions that a head attends to most, each in the needle adds its attention over
    /// |needle|: retrieval-reasoning heads (HeadKV, arXiv 2410.19258).
    Reasoning,
}

impl HeadScoring {
    /// What a head gains in one step: its attention to all positions, the tokens there, the positions of
    /// the needle, and the token produced.
    pub fn gain(self, attention: &[f32], ids: &[u32], needle: &Range<usize>, produced: u32) -> f64 {
        let length = needle.len().max(1);
        let mut ranked: Vec<usize> = (0..attention.len()).collect();
        ranked.sort_by(|a, b| attention[*b].total_cmp(&attention[*a]));
        match self {
            Self::Retrieval => {
                let hits =
                    |position: &usize| needle.contains(position) && ids.get(*position) == Some(&produced);
                if ranked.first().is_some_and(hits) { 1.0 / length as f64 } else { 0.0 }
            }
            Self::Reasoning => {
                let most = ranked.iter().take(length).filter(|position| needle.contains(position));
                most.map(|position| f64::from(attention[*position]) / length as f64).sum()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_gain_by_what_they_look_at() {
        let ids = [7, 8, 9, 5, 6];
        let gain = |scoring: HeadScoring, attention: [f32; 5], produced| {
            scoring.gain(&attention, &ids, &(1..3), produced)
        };
        use HeadScoring::{Reasoning, Retrieval};
        // The most attended position is 2, which holds token 9.
        let looking = [0.1, 0.2, 0.5, 0.15, 0.05];
        assert_eq!(gain(Retrieval, looking, 9), 0.5);
        assert_eq!(gain(Retrieval, looking, 8), 0.0, "another token is produced");
        assert_eq!(gain(Retrieval, [0.6, 0.2, 0.1, 0.05, 0.05], 7), 0.0, "outside the needle");
        // Of the two most attended positions both are in the needle, or one.
        assert!((gain(Reasoning, looking, 0) - (0.5 + 0.2) / 2.0).abs() < 1e-7);
        assert!((gain(Reasoning, [0.6, 0.1, 0.2, 0.06, 0.04], 0) - 0.2 / 2.0).abs() < 1e-7);
        assert_eq!(gain(Reasoning, [0.6, 0.01, 0.02, 0.3, 0.07], 0), 0.0);
    }
}
