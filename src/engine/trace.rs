//! What a prefill kept, for people and tests to look at.

use serde::Serialize;

use crate::cache::TokenSet;

/// What a prefill kept, layer by layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Trace {
    /// One entry for each layer.
    pub layers: Vec<LayerTrace>,
    /// Original positions that a restart read anew; the layers then read no others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restarted: Option<Vec<u32>>,
    /// Which of the candidates became the TSP layer, where the plan has candidates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub settled: Option<Settled>,
    /// The last token's residual stream behind the last layer.
    #[serde(skip)]
    pub hidden: Vec<f32>,
}

/// Which of several candidates became the TSP layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Settled {
    /// The layer tokens went on from; `None`: from none, the last candidate being the model's last layer.
    pub layer: Option<usize>,
    /// For each candidate that was looked at, but the first, in order.
    pub overlaps: Vec<Overlap>,
}

/// What a candidate for the TSP layer has in common with the candidate before it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Overlap {
    /// The candidate.
    pub layer: usize,
    /// The share of the tokens it chose, beside the newest, that the one before chose too.
    pub share: f64,
}

/// What a prefill kept in one layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerTrace {
    /// Tokens the layer read.
    pub rows: usize,
    /// Original positions kept, ascending, for each kv head.
    pub kept: Vec<Vec<u32>>,
    /// Share of the window's attention that fell on kept tokens, for each kv head: the sum of
    /// unpooled probabilities on them, over window queries times query heads of the group.
    pub mass: Vec<f32>,
    /// Original positions that went on to the next layer, where not all did.
    pub propagated: Option<Vec<u32>>,
    /// The set that each kv head got, where heads have sets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sets: Option<Vec<HeadSet>>,
}

/// The set of tokens that a kv head keeps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HeadSet {
    /// The cheapest that recovers enough.
    pub set: TokenSet,
    /// The share of attention that each set recovers, in the order of [`TokenSet`], [`TokenSet::Full`]
    /// left out.
    pub recovered: [f64; 4],
}

/// The share of window attention on the kept ones of rows, for each kv head. All are told by their positions.
pub(super) fn retained_mass(
    scores: &[Vec<f32>],
    window: usize,
    positions: &[u32],
    kept: &[Vec<u32>],
) -> Vec<f32> {
    let group = scores.len() / kept.len();
    let head_mass = |(scores, kept): (&[Vec<f32>], &Vec<u32>)| {
        let row = |position: &u32| positions.partition_point(|before| before < position);
        let on_kept =
            |scores: &Vec<f32>| -> f64 { kept.iter().map(|position| f64::from(scores[row(position)])).sum() };
        (scores.iter().map(on_kept).sum::<f64>() / (window * group) as f64) as f32
    };
    scores.chunks(group).zip(kept).map(head_mass).collect()
}
