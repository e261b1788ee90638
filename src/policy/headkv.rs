//! HeadKV (arXiv 2410.19258): budgets of heads from scores that were measured beforehand.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::plan::{Keep, LayerPlan, Pooling, PoolingKind, Saliency};
use super::{Budget, DEFAULT_RETENTION, ModelShape, PolicyError, check_share};

/// HeadKV's options.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HeadKv {
    /// How tokens are scored.
    pub saliency: Saliency,
    /// Tokens a layer keeps of the prompt for a kv head, on average over all heads of all layers.
    pub retention: Budget,
    /// β: 1/β of the budget is shared out by score, the rest evenly.
    pub pooled: f64,
    /// What the heads scored.
    pub heads: HeadScores,
}

/// Scores of query heads, a list of samples for each, in the file format of the authors:
/// `{"layer-head": [scores]}`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<String, Vec<f64>>", into = "BTreeMap<String, Vec<f64>>")]
pub struct HeadScores(BTreeMap<(usize, usize), Vec<f64>>);

/// Head scores that no budget can be made from.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum HeadScoresError {
    /// No scores at all.
    #[error("there are none, and every query head needs one")]
    Empty,
    /// A key that is no head.
    #[error("{0:?} is no head: a layer and a query head are wanted, such as \"3-12\"")]
    Name(String),
    /// A head without a score.
    #[error("head {layer}-{head} has no scores, but the model has {layers} layers of {heads} query heads")]
    Missing {
        /// Its layer.
        layer: usize,
        /// Its number among the query heads.
        head: usize,
        /// Layers of the model.
        layers: usize,
        /// Query heads of a layer.
        heads: usize,
    },
    /// A head that the model does not have.
    #[error("head {layer}-{head} is of another model: this one has {layers} layers of {heads} query heads")]
    Unknown {
        /// Its layer.
        layer: usize,
        /// Its number among the query heads.
        head: usize,
        /// Layers of the model.
        layers: usize,
        /// Query heads of a layer.
        heads: usize,
    },
    /// A score that is no share of anything.
    #[error("head {layer}-{head} scores {score}: numbers from 0 up are wanted")]
    Score {
        /// Its layer.
        layer: usize,
        /// Its number among the query heads.
        head: usize,
        /// The score.
        score: f64,
    },
    /// Heads that all score nothing.
    #[error("every score is 0, so that no head is better than another")]
    Zero,
}

impl Default for HeadKv {
    fn default() -> Self {
        Self {
            saliency: Saliency { window: 32, pooling: Pooling { kind: PoolingKind::Max, kernel: 7 } },
            retention: Budget::Rate(DEFAULT_RETENTION),
            pooled: 1.2,
            heads: HeadScores::default(),
        }
    }
}

impl HeadKv {
    pub(super) fn layers(&self, shape: ModelShape, prompt: usize) -> Result<Vec<LayerPlan>, PolicyError> {
        let saliency = self.saliency;
        saliency.check()?;
        check_share(
            "pooled",
            self.pooled,
            (1.0..=1e6).contains(&self.pooled),
            "a number from 1 to a million",
        )?;
        let shares = self.heads.shares(shape)?;
        let window = saliency.window;
        let count = self.retention.tokens("retention", prompt, window, "the observation window")?;
        if prompt <= count {
            return Ok(vec![LayerPlan::full(prompt); shape.layers]);
        }
        let mean = count - window;
        let by_score = (mean as f64 / self.pooled).floor();
        let even = mean as f64 - by_score;
        let pool = by_score * (shape.layers * shape.kv_heads) as f64;
        let budget = |share: &f64| ((share * pool + even).round_ties_even() as usize).min(prompt - window);
        Ok(shares
            .chunks_exact(shape.kv_heads)
            .map(|shares| {
                let counts: Vec<usize> = shares.iter().map(|share| window + budget(share)).collect();
                let keep = match counts.iter().all(|count| *count == prompt) {
                    true => Keep::All,
                    false => Keep::Each { counts, saliency },
                };
                LayerPlan { rows: prompt, keep, propagate: None }
            })
            .collect())
    }
}

impl HeadScores {
    /// Whether no head has scores.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Scores of one sample more. Samples of a head are averaged.
    pub fn add(&mut self, layer: usize, query_head: usize, score: f64) {
        self.0.entry((layer, query_head)).or_default().push(score);
    }

    /// The mean score of each head, best first; of equal ones the first layer, then the first head.
    pub fn ranking(&self) -> Vec<((usize, usize), f64)> {
        let mean = |scores: &Vec<f64>| scores.iter().sum::<f64>() / scores.len().max(1) as f64;
        let mut heads: Vec<_> = self.0.iter().map(|(head, scores)| (*head, mean(scores))).collect();
        heads.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        heads
    }

    /// Shares of all kv heads, layer by layer, that sum to 1: the means of their query heads, summed.
    fn shares(&self, shape: ModelShape) -> Result<Vec<f64>, HeadScoresError> {
        let ModelShape { layers, query_heads: heads, .. } = shape;
        if self.is_empty() {
            return Err(HeadScoresError::Empty);
        }
        if let Some((layer, head)) =
            self.0.keys().copied().find(|(layer, head)| *layer >= layers || *head >= heads)
        {
            return Err(HeadScoresError::Unknown { layer, head, layers, heads });
        }
        let mut shares = vec![0.0; layers * shape.kv_heads];
        for layer in 0..layers {
            for head in 0..heads {
                let missing = HeadScoresError::Missing { layer, head, layers, heads };
                let scores = self.0.get(&(layer, head)).filter(|scores| !scores.is_empty()).ok_or(missing)?;
                if let Some(score) = scores.iter().copied().find(|score| !score.is_finite() || *score < 0.0) {
                    return Err(HeadScoresError::Score { layer, head, score });
                }
                let mean = scores.iter().sum::<f64>() / scores.len() as f64;
                shares[layer * shape.kv_heads + head / shape.group()] += mean;
            }
        }
        let total: f64 = shares.iter().sum();
        if total == 0.0 {
            return Err(HeadScoresError::Zero);
        }
        Ok(shares.into_iter().map(|share| share / total).collect())
    }
}

impl TryFrom<BTreeMap<String, Vec<f64>>> for HeadScores {
    type Error = HeadScoresError;

    fn try_from(scores: BTreeMap<String, Vec<f64>>) -> Result<Self, HeadScoresError> {
        let head = |(name, scores): (String, Vec<f64>)| {
            let numbers = name
                .split_once('-')
                .and_then(|(layer, head)| Some((layer.parse().ok()?, head.parse().ok()?)));
            numbers.map(|head| (head, scores)).ok_or(HeadScoresError::Name(name))
        };
        scores.into_iter().map(head).collect::<Result<_, _>>().map(Self)
    }
}

impl From<HeadScores> for BTreeMap<String, Vec<f64>> {
    fn from(HeadScores(scores): HeadScores) -> Self {
        scores.into_iter().map(|((layer, head), scores)| (format!("{layer}-{head}"), scores)).collect()
    }
}
